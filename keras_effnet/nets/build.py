"""Builds a functional Keras model with random weights from an `Architecture`, and checks its arguments."""

import dataclasses
from collections.abc import Iterable
from itertools import chain, count
from numbers import Integral, Real
from typing import Any

import keras

from keras_effnet import compat
from keras_effnet.errors import one_of
from keras_effnet.nets import blocks, inspection
from keras_effnet.nets.architecture import EPSILONS, Architecture
from keras_effnet.nets.normalization import constants


def build(
    architecture: Architecture,
    inputs: Any,
    preprocessing: Any,
    *,
    include_top: bool = True,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: Any = "softmax",
    name: str | None = None,
    data_format: str = "channels_last",
    dtype: Any = None,
    prefix: str = "",
) -> keras.Model:
    """Builds a net on a Keras tensor.

    Args:
        architecture: An `Architecture`.
        inputs: Keras tensor of pixels 0-255. See `input_of()`.
        preprocessing: See `normalization.constants()`.
        include_top: Boolean, whether to include the classifier. Defaults to True.
        pooling: `"avg"`, `"max"` or None. Used without the top only. Defaults to None.
        classes: Integer, outputs of the classifier. Defaults to 1000.
        classifier_activation: Activation of the classifier, None for logits. Defaults to `"softmax"`.
        name: String. Defaults to the name of the architecture.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `"channels_last"`.
        dtype: Dtype or dtype policy. Defaults to Keras' policy.
        prefix: String in front of the name of each layer. Defaults to `""`.

    Returns:
        A `keras.Model` with random weights.

    Raises:
        ValueError: If an argument is not valid.

    Example:

    >>> from keras_effnet.nets.scaling import resolve
    >>> from keras_effnet.nets.variants import VARIANTS
    >>> b0 = resolve(VARIANTS["efficientnet-b0"])
    >>> build(b0, keras.Input((32, 32, 3)), "imagenet", classes=10).output_shape
    (None, 10)
    """
    channels = inputs.shape[-1 if data_format == "channels_last" else 1]
    scale, offset = constants(preprocessing, channels)
    style = blocks.Style(
        activation=architecture.activation,
        bn_momentum=architecture.bn_momentum,
        bn_epsilon=architecture.bn_epsilon,
        data_format=data_format,
        dtype=policy(dtype),
        padding=architecture.padding,
        depthwise_name=architecture.depthwise_name,
        prefix=prefix,
    )
    x = blocks.stem(style, inputs, architecture.stem_filters, scale, offset)
    for block, rate in zip(architecture.blocks, architecture.drop_connect_rates, strict=True):
        x = blocks.body(style, x, block, rate)
    x = blocks.head(style, x, architecture.head_filters)
    if include_top:
        x = blocks.classifier(style, x, classes, architecture.dropout_rate, classifier_activation)
    elif pooling:
        x = style.pool(x, pooling)
    return functional(keras.utils.get_source_inputs(inputs), x, name or architecture.name)


def functional(inputs, outputs, name: str) -> keras.Model:
    """Creates a functional model that can be exported before it is called.

    Args:
        inputs: Keras tensor or list of them.
        outputs: Keras tensor, or a structure of them.
        name: String, name of the model.

    Returns:
        A `keras.Model`.
    """
    # Keras warns if a model with a list of one input is called with a tensor.
    if isinstance(inputs, list) and len(inputs) == 1:
        (inputs,) = inputs
    model = keras.Model(inputs, outputs, name=name)
    compat.mark_called(model)
    return model


def override(architecture: Architecture, padding: str | None = None, **rates: float | None) -> Architecture:
    """Replaces the padding and rates of an architecture.

    Args:
        architecture: An `Architecture`.
        padding: See `Architecture`. It brings its epsilon. Defaults to None: the architecture's.
        **rates: Floats by field name, such as `dropout_rate`. None keeps the architecture's rate.

    Returns:
        An `Architecture`.

    Raises:
        ValueError: If the padding is unknown, or a rate is not at least 0 and less than 1.
    """
    given: dict[str, Any] = {}
    if padding is not None:
        given = {"padding": one_of("padding", padding, tuple(EPSILONS)), "bn_epsilon": EPSILONS[padding]}
    given |= {name: between(name, rate, None) for name, rate in rates.items() if rate is not None}
    return dataclasses.replace(architecture, **given)


def between(name: str, value, default):
    """Checks that a rate is at least 0 and less than 1.

    Args:
        name: String, name of the argument.
        value: The received value. None for the default.
        default: Float or None.

    Returns:
        The rate as a float, or the default.

    Raises:
        ValueError: If the rate is out of range.
    """
    if value is None:
        return default
    if not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"Expected {name} to be at least 0 and less than 1. Received: {name}={value!r}")
    return float(value)


def policy(dtype) -> keras.DTypePolicy:
    """Converts a dtype to a dtype policy.

    Args:
        dtype: Dtype or dtype policy. None for Keras' policy.

    Returns:
        A `keras.DTypePolicy`.

    Raises:
        ValueError: If it is neither a dtype nor a dtype policy.
    """
    if dtype is None:
        dtype = keras.config.dtype_policy()
    try:
        if not isinstance(dtype, keras.DTypePolicy | str):
            dtype = keras.backend.standardize_dtype(dtype)
        return dtype if isinstance(dtype, keras.DTypePolicy) else keras.DTypePolicy(dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected a dtype or a dtype policy, such as 'float32' or 'mixed_bfloat16'. Received: dtype={dtype!r}"
        ) from error


def check_head(include_top, pooling, classes, classifier_activation, pretrained: bool) -> None:
    """Checks the arguments that define the end of a net.

    Args:
        include_top: See `build()`.
        pooling: See `build()`.
        classes: See `build()`.
        classifier_activation: See `build()`.
        pretrained: Boolean, whether the classifier comes from published weights.

    Raises:
        ValueError: If an argument is not valid, or does not fit the pretrained classifier.
    """
    if pooling is not None:
        one_of("pooling", pooling, ("avg", "max"))
    if not include_top:
        return
    if not isinstance(classes, Integral) or isinstance(classes, bool) or classes < 1:
        raise ValueError(f"Expected classes to be a positive integer. Received: classes={classes!r}")
    known: list[Any] = [None, "softmax", keras.activations.softmax, keras.activations.linear, "linear"]
    if int(classes) > 1001:  # ImageNet-21k, whose sets are trained with a sigmoid
        known += ["sigmoid", keras.activations.sigmoid]
    names = [name for name in ("softmax", "sigmoid") if name in known]
    if pretrained and classifier_activation not in known:
        raise ValueError(
            f"Expected classifier_activation to be {' or '.join(map(repr, names))} or None for a pretrained top. "
            f"Received: classifier_activation={classifier_activation!r}"
        )


def input_of(input_tensor, input_shape, resolution, include_top, data_format) -> Any:
    """Returns the Keras tensor that a net is built on.

    Args:
        input_tensor: Keras tensor, or None for a new input.
        input_shape: Tuple of integers without the batch size. Height and width may be None. None for the default:
            `resolution` with the top, any size without it, and 3 channels.
        resolution: Integer, default height and width.
        include_top: Boolean, whether the net has a classifier.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        A Keras tensor.

    Raises:
        ValueError: If `input_tensor` is no Keras tensor or has another shape, or the shape is not valid.
    """
    channels_last = data_format == "channels_last"
    if input_tensor is not None:
        if not keras.utils.is_keras_tensor(input_tensor):
            raise ValueError(
                "Expected input_tensor to be a Keras tensor, such as keras.Input(...). "
                f"Received: {type(input_tensor).__name__}"
            )
        shape = tuple(input_tensor.shape[1:])
        if input_shape is not None and tuple(input_shape) != shape:
            raise ValueError(
                f"Expected input_shape to be None or the shape of input_tensor, {shape}. "
                f"Received: input_shape={input_shape}"
            )
    elif input_shape is None:
        side = resolution if include_top else None
        shape = (side, side, 3) if channels_last else (3, side, side)
    else:
        if not isinstance(input_shape, Iterable):
            input_shape = (input_shape,)
        shape = tuple(int(size) if isinstance(size, Integral) else size for size in input_shape)
    channels_axis = 2 if channels_last else 0
    known = [size for axis, size in enumerate(shape) if size is not None or axis == channels_axis]
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in known):
        order = "height, width, channels" if channels_last else "channels, height, width"
        raise ValueError(
            f"Expected input_shape to be three positive numbers ({order}); height and width may be None. "
            f"Received: {shape}"
        )
    return keras.Input(shape, name="input_layer") if input_tensor is None else input_tensor


def free_prefix(name: str, tensor) -> str:
    """Returns a prefix that keeps the names of a net's layers unique in the graph of a Keras tensor.

    Args:
        name: String, name of the model.
        tensor: A Keras tensor.

    Returns:
        String. Empty, or made from `name` if the graph already has layers with the names of a net's layers.
    """
    around = _names_around(tensor)
    candidates = chain(("", f"{name}_"), (f"{name}_{number}_" for number in count(1)))
    return next(start for start in candidates if not any(_is_ours(other, start) for other in around))


def _is_ours(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and bool(inspection.LAYER.fullmatch(name.removeprefix(prefix)))


def _names_around(tensor) -> set[str]:
    found, queue = {}, [compat.producer(tensor)]
    while queue:
        operation = queue.pop()
        if id(operation) in found:
            continue
        found[id(operation)] = operation.name
        queue += compat.neighbors(operation)
    return set(found.values())

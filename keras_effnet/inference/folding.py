"""Folds batch normalization and preprocessing into the neighboring convolutions, for inference."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count
from textwrap import shorten
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.nets import initializers
from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D

# Layers that do nothing at inference.
_TRAINING_ONLY = (
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.RandomBrightness,
    keras.layers.RandomContrast,
    keras.layers.RandomFlip,
    keras.layers.RandomRotation,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
    keras.layers.SpatialDropout2D,
)

# Layers that are linear except for their activation, and how many of the last axes of their kernels are outputs.
_LINEAR: dict[type, int] = {
    keras.layers.Conv2D: 1,
    keras.layers.DepthwiseConv2D: 2,
    keras.layers.Dense: 1,
    CondConv2D: 1,
    DepthwiseCondConv2D: 2,
}


_mapped: Any = keras.tree.map_structure  # its annotations allow None


class Tensor:
    """A value that flows between steps.

    Attributes:
        shape: Tuple of integers, with None for a size that the model leaves open.
        rank: Integer, number of its axes.
    """

    def __init__(self, spec):
        self.shape = tuple(spec.shape)
        self.rank = len(self.shape)


class _Affine(NamedTuple):
    """`x * scale + offset`, along an axis counted from the end, or with one number for all (`axis` None)."""

    scale: np.ndarray
    offset: np.ndarray
    axis: int | None


@dataclass
class Step:
    """A call of a layer, or of an operation of `keras.ops`, with a `Tensor` in place of each tensor.

    Attributes:
        source: The first `Tensor` that the call takes.
        bias: Array or number, what a linear layer adds.
    """

    operation: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    affine: _Affine | None = None  # set if the call does nothing else
    changed: dict[str, np.ndarray] = field(default_factory=dict)  # arrays that replace the layer's own

    @property
    def source(self) -> Tensor:
        return next(value for value in keras.tree.flatten((self.args, self.kwargs)) if isinstance(value, Tensor))

    @source.setter
    def source(self, tensor: Tensor) -> None:
        old = self.source
        given: Any = (self.args, self.kwargs)
        self.args, self.kwargs = _mapped(lambda value: tensor if value is old else value, given)

    def value(self, name: str) -> np.ndarray:
        """Returns a kernel or bias in float64.

        Args:
            name: String, the layer's attribute.

        Returns:
            Array.
        """
        found = self.changed.get(name)
        return numbers(getattr(self.operation, name)) if found is None else found

    @property
    def bias(self) -> np.ndarray | float:
        return self.value("bias") if self.operation.use_bias or "bias" in self.changed else 0.0


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Folds batch normalization and preprocessing into the convolutions, which makes a smaller model for inference.

    A scale or offset before or after a convolution becomes part of its kernel and bias. There are two exceptions. A
    convolution that pads with zeros takes only the scale of its input: the offset would be missing around the image, so
    it stays, as a Rescaling layer. Mixed experts take only the scale, since their bias would be mixed as well. Dropout
    and other layers that act only in training are removed, and nested models are merged into one graph.

    Args:
        model: A functional or sequential model: of this package, of keras.applications, or built on them. It is not
            changed.

    Returns:
        A new functional `keras.Model` with its own weights. It computes what the model computes at inference.

    Raises:
        ValueError: If the model is neither functional nor sequential.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None)
    >>> folded = ke.fold_batch_norm(model)
    >>> len(folded.layers) < len(model.layers)
    True
    """
    return _folded(model, [keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name) for x in check(model).inputs])


def for_inference(model: keras.Model, shape: tuple[int, ...], batch_size: int | None = None) -> keras.Model:
    """Folds a model as `fold_batch_norm()` does, for an exporter: all in float32, for images of one size.

    Args:
        model: See `fold_batch_norm()`. A model with one input.
        shape: Tuple of integers. The shape of an image.
        batch_size: Integer, or None for any. Defaults to None.

    Returns:
        A functional `keras.Model`.

    Raises:
        ValueError: If the model is neither functional nor sequential.
    """
    return _folded(check(model), [keras.Input(shape, batch_size, dtype="float32", name="image")], "float32")


def check(model) -> Any:
    """Checks that the graph of a model's layers is known.

    Args:
        model: The received value.

    Returns:
        The model.

    Raises:
        ValueError: If it is neither functional nor sequential, or has no input yet.
    """
    if not _is_graph(model) or not model.built:
        raise ValueError(
            "Expected a functional or sequential model with a defined input. Received: "
            f"{getattr(model, 'name', model)!r}, a {type(model).__name__}"
        )
    return model


def _is_graph(layer) -> bool:
    """Returns whether a model does no more than its layers. A subclass with its own `call()` may do more."""
    known = isinstance(layer, keras.Sequential) or compat.is_functional(layer)
    return known and type(layer).call.__module__.startswith("keras.")


class Trace(NamedTuple):
    """The calls in a model and in the models inside it, in order, without layers that act only in training.

    Attributes:
        inputs: List of `Tensor`.
        steps: List of `Step`.
        outputs: The model's outputs, with a `Tensor` for each.
    """

    inputs: list[Tensor]
    steps: list[Step]
    outputs: Any


def trace(model: keras.Model) -> Trace:
    """Returns the calls in a model.

    Args:
        model: A functional or sequential model.

    Returns:
        A `Trace`.

    Raises:
        ValueError: If the model is neither functional nor sequential.
    """
    steps: list[Step] = []
    inputs = [Tensor(tensor) for tensor in check(model).inputs]
    outputs = _trace(model, keras.tree.pack_sequence_as(_inputs(model), inputs), steps)
    return Trace(inputs, steps, outputs)


def _inputs(model) -> Any:
    """Returns the structure of a model's inputs."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _folded(model, given: list, dtype: str | None = None) -> keras.Model:
    """Folds a model on new inputs. With `dtype`, all layers compute in it."""
    inputs, steps, outputs = trace(model)
    known = {id(token): tensor for token, tensor in zip(inputs, given, strict=True)}
    integers = {place for place, tensor in known.items() if not keras.backend.is_float_dtype(tensor.dtype)}
    results = _call(_Folding(steps, outputs, integers).steps(), known, outputs, dtype)
    folded = keras.Model(keras.tree.pack_sequence_as(_inputs(model), given), results, name=model.name)
    if hasattr(model, "weights_record"):  # `load_image()` reads the expected preprocessing from it
        folded.weights_record = model.weights_record
    compat.mark_called(folded)
    return folded


def _trace(model, inputs, steps: list[Step]):
    """Appends the calls in a model to `steps`, and returns its outputs."""

    def call(operation, *args, **kwargs):
        training = kwargs.get("training")
        if type(operation) in _TRAINING_ONLY and not training and args:
            return args[0]
        if _is_graph(operation) and args:
            if training:
                raise ValueError(
                    f"Expected models in inference mode. Received: {operation.name!r}, which is called with "
                    "training=True"
                )
            return _trace(operation, args[0], steps)
        outputs = [Tensor(tensor) for tensor in compat.first_outputs(operation)]
        affine = _affine(operation, outputs[0].rank) if not training and kwargs.get("mask") is None else None
        steps.append(Step(operation, args, kwargs, outputs, affine))
        return outputs[0] if len(outputs) == 1 else outputs

    if isinstance(model, keras.Sequential):
        for layer in model.layers:
            inputs = call(layer, inputs)
        return inputs
    return compat.run_graph(model, inputs, call)


def numbers(value) -> np.ndarray:
    """Returns a tensor of the backend as a float64 array.

    Args:
        value: A tensor or variable of numbers.

    Returns:
        Array.
    """
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")), "float64")


def _affine(layer, rank: int) -> _Affine | None:
    if type(layer) not in (keras.layers.BatchNormalization, keras.layers.Rescaling, keras.layers.Normalization):
        return None  # a subclass may do more
    match layer:
        case keras.layers.BatchNormalization():
            scale = 1 / np.sqrt(numbers(layer.moving_variance) + layer.epsilon)
            scale = scale * numbers(layer.gamma) if layer.scale else scale
            offset = (numbers(layer.beta) if layer.center else 0) - numbers(layer.moving_mean) * scale
            return _Affine(scale, offset, layer.axis if layer.axis < 0 else layer.axis - rank)
        case keras.layers.Rescaling():
            pair = np.asarray(layer.scale, "float64"), np.asarray(layer.offset, "float64")
            # Keras applies a flat scale along the axis of a global setting, but a flat offset along the last.
            if pair[0].ndim and keras.config.image_data_format() == "channels_first":
                pair = pair[0].reshape(pair[0].shape + (1,) * (3 - pair[0].ndim)), pair[1]
        case keras.layers.Normalization() if not layer.invert and layer.mean is not None:
            deviation = np.maximum(np.sqrt(numbers(layer.variance)), keras.config.epsilon())
            pair = 1 / deviation, -numbers(layer.mean) / deviation
        case _:
            return None
    axes = {place - row.ndim for row in pair for place, size in enumerate(row.shape) if size > 1}
    if len(axes) > 1:
        return None
    scale, offset = (row.reshape(-1) for row in pair)
    return _Affine(scale, offset, axes.pop() if axes else None)


class _Folding:
    """Folds as many affine steps as possible into other steps."""

    def __init__(self, steps: list[Step], outputs, integers: set[int]):
        self._steps = steps
        self._integers = integers  # integer inputs, which the remaining preprocessing has to cast
        self._makers = {id(tensor): step for step in steps for tensor in step.outputs}
        self._uses = Counter(id(value) for step in steps for value in keras.tree.flatten((step.args, step.kwargs)))
        self._uses.update(id(tensor) for tensor in keras.tree.flatten(outputs))
        self._calls = Counter(id(step.operation) for step in steps)
        self._gone: set[int] = set()

    def steps(self) -> list[Step]:
        """Returns the remaining steps."""
        for step in self._steps:
            if step.affine is not None:
                self._into_what_is_before(step, step.affine)
        for step in self._steps:
            if self._takes(step, before=True):
                self._into_what_comes_next(step)
        return [step for step in self._steps if id(step) not in self._gone]

    def _before(self, step: Step) -> Step | None:
        """Returns the step that makes a step's input, if nothing else uses it."""
        return self._makers.get(id(step.source)) if self._uses[id(step.source)] == 1 else None

    def _takes(self, step: Step, before: bool) -> bool:
        """Returns whether the kernel of a step can take a scale of its input (`before`) or of its output."""
        layer = step.operation
        if id(step) in self._gone or type(layer) not in _LINEAR or self._calls[id(layer)] > 1:
            return False
        if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
            return False
        if before:
            return not _mixed(layer) and getattr(layer, "groups", 1) == 1
        return layer.activation is keras.activations.linear and not (_mixed(layer) and layer.use_bias)

    def _into_what_is_before(self, step: Step, affine: _Affine) -> None:
        maker = self._before(step)
        if maker is None:
            return
        scale, offset, axis = affine
        if maker.affine is not None and (axis == maker.affine.axis or None in (axis, maker.affine.axis)):
            step.affine = _Affine(
                maker.affine.scale * scale,
                maker.affine.offset * scale + offset,
                maker.affine.axis if axis is None else axis,
            )
            self._gone.add(id(maker))
            step.source = maker.source
        elif self._takes(maker, before=False) and axis in (None, _channels(maker.operation)):
            kernel = maker.value("kernel")
            shape = kernel.shape[-_LINEAR[type(maker.operation)] :]
            count = int(np.prod(shape))
            maker.changed["kernel"] = kernel * np.broadcast_to(scale, count).reshape(shape)
            if _mixed(maker.operation):
                step.affine = _Affine(np.ones(count), np.broadcast_to(offset, count), _channels(maker.operation))
                return
            maker.changed["bias"] = np.broadcast_to(maker.bias * scale + offset, count)
            self._gone.add(id(step))
            maker.outputs = step.outputs
            self._makers[id(step.outputs[0])] = maker

    def _into_what_comes_next(self, step: Step) -> None:
        first, maker = step, self._before(step)
        if maker is not None and isinstance(maker.operation, keras.layers.ZeroPadding2D):
            first, maker = maker, self._before(maker)
        if maker is None or maker.affine is None or maker.affine.axis not in (None, _channels(step.operation)):
            return
        scale, offset, axis = maker.affine
        kernel = step.value("kernel")
        rows = [np.broadcast_to(row, kernel.shape[-2])[:, None] for row in (scale, offset)]
        padded = first is not step or (
            getattr(step.operation, "padding", "valid") != "valid" and max(step.operation.kernel_size) > 1
        )
        if np.any(offset) and padded:
            if np.all(scale):
                step.changed["kernel"] = kernel * rows[0]
                maker.affine = _Affine(np.ones_like(scale), offset / scale, axis)
            return
        step.changed["kernel"] = kernel * rows[0]
        outputs = _LINEAR[type(step.operation)]
        summed = (kernel * rows[1]).sum(tuple(range(kernel.ndim - outputs))).reshape(-1)
        step.changed["bias"] = step.bias + summed
        if id(maker.source) in self._integers:
            maker.affine = _Affine(np.ones_like(scale), np.zeros_like(offset), axis)
            return
        self._gone.add(id(maker))
        first.source = maker.source


def _mixed(layer) -> bool:
    return isinstance(layer, CondConv2D | DepthwiseCondConv2D)


def _channels(layer) -> int:
    """Returns the axis of a layer's channels, counted from the end."""
    return -1 if getattr(layer, "data_format", "channels_last") == "channels_last" else -3


def _call(steps: list[Step], known: dict[int, Any], outputs, dtype: str | None):
    """Calls copies of the layers on Keras tensors. `known` maps the `id()` of each `Tensor` to its Keras tensor."""
    layers: dict[int, Any] = {}
    names = {tensor.name for tensor in known.values()}

    def filled(value):
        return known[id(value)] if isinstance(value, Tensor) else value

    def free(name: str) -> str:
        name = next(other for other in chain((name,), (f"{name}_{n}" for n in count(1))) if other not in names)
        names.add(name)
        return name

    for step in steps:
        args, kwargs = _mapped(filled, (step.args, step.kwargs))
        old = step.operation
        if dtype and _goes_by_rows(step.affine, known[id(step.source)]):
            known[id(step.outputs[0])] = _by_rows(step, known[id(step.source)], free)
            continue
        # A shared affine layer may have another scale and offset in each place.
        layer = layers.get(id(old)) if step.affine is None else None
        if layer is None:
            try:
                layer = layers[id(old)] = _copied(step, free(old.name), dtype)
                results = layer(*args, **kwargs) if kwargs or len(args) != 1 else initializers.apply(layer, args[0])
                _fill(layer, step)
            except Exception as error:  # a custom layer may raise anything
                raise ValueError(
                    f"Expected layers that can be rebuilt from their configuration. Received: {old.name!r}, a "
                    f"{type(old).__name__}: {shorten(str(error), 200)}"
                ) from error
        else:
            results = layer(*args, **kwargs)
        known |= {id(token): made for token, made in zip(step.outputs, keras.tree.flatten(results), strict=True)}
    return _mapped(filled, outputs)


def _goes_by_rows(affine: _Affine | None, x) -> bool:
    if affine is None or affine.axis != -1 or len(x.shape) != 4 or None in x.shape[1:] or x.shape[-1] > 4:
        return False
    return bool(np.all(affine.scale == 1))


def _by_rows(step: Step, x, free: Callable[[str], str]):
    """Adds the offset of a pixel to whole rows of pixels, where the size of an image is known.

    Runtimes are slow at adding three numbers along the last axis: 1.3 of ONNX Runtime's 40 ms for B0, by rows 0.1.
    """
    affine: Any = step.affine
    _, height, width, channels = x.shape
    offset = np.tile(np.broadcast_to(affine.offset, channels), width).tolist()
    rows = keras.layers.Reshape((height, width * channels), name=free("image_rows"))(x)
    rows = keras.layers.Rescaling(1.0, offset, name=free(step.operation.name), dtype="float32")(rows)
    return keras.layers.Reshape((height, width, channels), name=free("image_pixels"))(rows)


def _copied(step: Step, name: str, dtype: str | None):
    old, affine = step.operation, step.affine
    if affine is not None and not isinstance(old, keras.layers.BatchNormalization):
        shape = [1] * (step.outputs[0].rank - 1)
        if affine.axis is None:
            scale, offset = float(affine.scale[0]), float(affine.offset[0])
        else:
            shape[affine.axis] = -1
            size = max(affine.scale.size, affine.offset.size)
            scale, offset = (np.broadcast_to(row, size).reshape(shape).tolist() for row in affine[:2])
        return keras.layers.Rescaling(scale, offset, name=name, dtype=dtype or old.dtype_policy)
    config = old.get_config() | {"name": name}
    if dtype and isinstance(old, keras.Layer):
        config["dtype"] = dtype
    if affine is not None:
        config |= {"scale": True, "center": True}
    if "bias" in step.changed:
        config["use_bias"] = True
    return old.__class__.from_config(config)


def _fill(layer, step: Step) -> None:
    old = step.operation
    if step.affine is not None and isinstance(old, keras.layers.BatchNormalization):
        layer.gamma.assign(step.affine.scale)
        layer.beta.assign(step.affine.offset)
        layer.moving_mean.assign(np.zeros_like(step.affine.offset))
        layer.moving_variance.assign(np.full_like(step.affine.scale, 1 - old.epsilon))
    elif step.changed:
        for name in ("kernel", "bias"):
            if name in step.changed or getattr(old, name, None) is not None:
                getattr(layer, name).assign(step.value(name))
    elif isinstance(layer, keras.Layer) and type(layer) is type(old):
        for weight, value in zip(layer.weights, old.weights, strict=True):
            # A copy, since JAX may donate a buffer that two models share.
            weight.assign(np.array(keras.ops.convert_to_numpy(value.value)))
    if hasattr(layer, "finalize_state"):  # Normalization computes with copies of its weights
        layer.finalize_state()

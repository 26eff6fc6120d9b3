"""Builds models: `create_model()`, and one function per variant that fills in its name."""

import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import keras
import numpy as np

from keras_effnet import model_metadata
from keras_effnet.errors import one_of
from keras_effnet.nets import inspection
from keras_effnet.nets.build import build, check_head, free_prefix, functional, input_of, override
from keras_effnet.nets.normalization import constants, scheme_of
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS, find_model

Arguments = ParamSpec("Arguments")


def create_model(
    variant: str,
    /,
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: str | Callable | None = "softmax",
    name: str | None = None,
    *,
    preprocessing: Any = "auto",
    dropout_rate: float | None = None,
    drop_connect_rate: float | None = None,
    bn_momentum: float | None = None,
    bn_epsilon: float | None = None,
    data_format: str | None = None,
    dtype: Any = None,
    blocks: Any = None,
    padding: str | None = None,
) -> keras.Model:
    """Builds an EfficientNet as a functional model that takes pixels 0-255.

    Args:
        variant: String, one of `keras_effnet.list_models()`, or another name of it, such as `"b0"` or
            `"tf_efficientnet_b0"`.
        include_top: Boolean, whether to include the classifier. Defaults to True.
        weights: Tag of published weights (`keras_effnet.list_weights()`); `"imagenet"` for the default set, trained on
            ImageNet alone; `"best"` for the set with the highest published top-1 among those trained on ImageNet alone;
            path of a file in any format that `keras_effnet.weights.load()` reads; address on the Hugging Face Hub,
            `"hf://owner/name"`, `"hf://owner/name@revision/file"` or `"timm/name"`; or None for random values.
            Defaults to `"imagenet"`. The layers are the same for every value, but for the padding.
        input_tensor: Keras tensor to build on, such as the output of `keras.layers.Input()`. Defaults to None. If its
            graph already has layers with the same names, the new layers are prefixed with the model's name.
        input_shape: Tuple of height, width and channels (channels, height and width for `channels_first`). Height and
            width may be None. Defaults to the variant's resolution with the top, and to any size without it. Pretrained
            weights fit any number of channels: the first kernel is summed or repeated, as in timm.
        pooling: Without the top: `"avg"` or `"max"` for global pooling, None for the last convolution's output.
            Defaults to None.
        classes: Integer, outputs of the classifier. Defaults to 1000. For any other number that the weights lack, the
            body is pretrained and the classifier is new: it is filled with zeros, with a warning.
        classifier_activation: Activation of the classifier, None for logits. Defaults to `"softmax"`. With a published
            classifier, only these two.
        name: String, the model's name. Defaults to `variant`. Several models that are layers of one model need
            different names.
        preprocessing: `"auto"` for the scheme that the weights expect; `"imagenet"`, `"inception"`, `"tpu127"` or
            `"tpu128"`; a pair (scale, offset) for `pixels * scale + offset`; or None for inputs that are already
            normalized. Defaults to `"auto"`.
        dropout_rate: Float, rate before the classifier. Defaults to the variant's.
        drop_connect_rate: Float, rate at which the last blocks are dropped. Defaults to the variant's, 0.2.
        bn_momentum: Float, momentum of batch normalization. Defaults to the variant's: 0.9 for V2 and for nets that
            only timm or Composer has, else 0.99.
        bn_epsilon: Float, epsilon of batch normalization. Defaults to None: that of a `.keras` file of weights, else
            1e-3, or 1e-5 with symmetric padding.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras' setting.
        dtype: Dtype or dtype policy, such as `"mixed_bfloat16"`. Defaults to Keras' policy. The input's arithmetic and
            the classifier stay in the policy's variable dtype.
        blocks: Channels of a pruned net: a `keras_effnet.pruning.Plan`, the path of its file, or `(expand, se, out)`
            for each block, as a sequence or as a dict by block name. `weights` must then be None, or the path of a
            pruned net's weights. Defaults to None: the variant's channels.
        padding: `"same"` as in TensorFlow, or `"symmetric"` as in PyTorch: timm's own nets, keras-hub, NVIDIA's and
            Composer's. Defaults to None: that of the weights, else the variant's.

    Returns:
        A `keras.Model`. Its `labels` are the class names that a `.keras` file of weights contains, else None.

    Raises:
        ValueError: If an argument is not valid, or the weights do not fit.
        OSError: If the weights cannot be downloaded or read.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.create_model("efficientnet-b0", weights=None, classes=10)
    >>> model.count_params()
    4062374

    Reference:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, arXiv 1905.11946, table 1.
    """
    variant = find_model(variant)
    row = VARIANTS[variant]
    origin = _Origin.of(variant, weights)
    architecture = override(
        resolve(row),
        origin.padding(padding, row.padding),
        dropout_rate=dropout_rate,
        drop_connect_rate=drop_connect_rate,
        bn_momentum=bn_momentum,
        bn_epsilon=origin.epsilon if bn_epsilon is None else bn_epsilon,
    )
    if blocks is not None:
        architecture = _pruned(architecture, blocks, origin)
    data_format = one_of(
        "data_format", data_format or keras.config.image_data_format(), ("channels_last", "channels_first")
    )
    is_new = include_top and not origin.has_classifier(classes, architecture)
    check_head(include_top, pooling, classes, classifier_activation, origin.record is not None and not is_new)
    name = name or variant
    inputs = input_of(input_tensor, input_shape, origin.resolution or row.resolution, include_top, data_format)
    channels = inputs.shape[-1 if data_format == "channels_last" else 1]
    prefix = "" if input_tensor is None else free_prefix(name, inputs)
    model = build(
        architecture,
        inputs,
        origin.preprocessing(preprocessing, row.preprocessing, channels),
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        classifier_activation=classifier_activation,
        name=name,
        data_format=data_format,
        dtype=dtype,
        prefix=prefix,
    )
    known = padding if origin.record is None else architecture.padding
    origin.load_into(model, include_top and not is_new, classes, prefix, known)
    if is_new:
        _start_classifier(model.get_layer(f"{prefix}predictions"), weights, classes)
    return model


def has_classifier(variant: str, weights: str | os.PathLike | None, classes: int) -> bool:
    """Returns whether `create_model()` loads a classifier from the weights.

    Args:
        variant: See `create_model()`.
        weights: See `create_model()`.
        classes: See `create_model()`.

    Returns:
        Boolean. False if a new classifier replaces that of the weights, with a warning.

    Raises:
        ValueError: If the weights are unknown.
        OSError: If the file cannot be read.
    """
    variant = find_model(variant)
    return _Origin.of(variant, weights).has_classifier(classes, resolve(VARIANTS[variant]))


def classes_of(variant: str, weights: str | os.PathLike | None) -> int:
    """Returns the number of classes of published weights.

    Args:
        variant: See `create_model()`.
        weights: See `create_model()`.

    Returns:
        Integer. 1000 for other weights.

    Raises:
        ValueError: If the weights are unknown.
        OSError: If the file cannot be read.
    """
    record = _Origin.of(find_model(variant), weights).record
    return record.classes if record else 1000


def numerics_of(variant: str, weights: str | os.PathLike | None, padding: str | None = None) -> dict[str, Any]:
    """Returns the padding and the epsilon that `create_model()` builds with. Warns if the weights fit both paddings.

    Args:
        variant: See `create_model()`.
        weights: See `create_model()`.
        padding: See `create_model()`.

    Returns:
        Dict of arguments of `create_model()`: `"padding"` and `"bn_epsilon"`, which may be None for the padding's.

    Raises:
        ValueError: If the weights are unknown, or for a net with other layers.
        OSError: If the file cannot be read.
    """
    variant = find_model(variant)
    row, origin = VARIANTS[variant], _Origin.of(variant, weights)
    chosen = origin.padding(padding, row.padding)
    if origin.path is not None and origin.record is None:
        from keras_effnet.weights import convert

        convert.check_numerics(origin.path, override(resolve(row), chosen, bn_epsilon=origin.epsilon), padding)
    return {"padding": chosen, "bn_epsilon": origin.epsilon}


def _start_classifier(classifier: Any, weights, classes: int) -> None:
    # Zeros, as in Big Transfer (arXiv 1912.11370, `zero_head` in its code), and as `keras-effnet train` starts it.
    classifier.set_weights([np.zeros_like(values) for values in classifier.get_weights()])
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_code.co_filename == __file__:  # the warning names the caller's line
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"The classifier is new, filled with zeros, and must be trained: weights={os.fspath(weights)!r} has none for "
        f"{classes} classes",
        stacklevel=level,
    )


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Source of a model's values: a published record, a file, or neither."""

    record: Any = None
    path: Any = None  # of a file that the user named
    description: Any = None  # of that file, by the config.json beside it

    @classmethod
    def of(cls, variant, weights) -> "_Origin":
        if weights is None:
            return cls()
        from keras_effnet.weights import hub, registry
        from keras_effnet.weights.formats import opening

        if not isinstance(weights, str | os.PathLike):
            raise ValueError(
                f"Expected weights to be a tag, the path of a file, an address, or None. Received: weights={weights!r}"
            )
        is_file = os.path.isfile(weights)
        address = hub.Address.of(weights)
        if isinstance(weights, str) and not is_file:
            try:
                named = address is not None and not (address.revision or address.file)
                return cls(registry.find(variant, address.repository if address and named else weights))
            except ValueError as error:
                if address is None and not opening.exists(weights):
                    if not (os.sep in weights or weights.endswith(opening.SUFFIXES)):
                        raise
                    raise FileNotFoundError(
                        f"Expected a weights file. Received: weights={weights!r}, which does not exist"
                    ) from error
                if address is not None and registry.is_published(address.repository):
                    raise
        place = hub.local(weights)
        description = hub.describe(place)
        if description is not None and description.variant != variant:
            raise ValueError(
                f"Expected weights of {variant}. Received: weights={os.fspath(weights)!r}, of "
                f"{description.architecture}"
            )
        return cls(registry.recognise(variant, place) if os.path.isfile(place) else None, place, description)

    @property
    def preset(self) -> Any:
        """The `Preset` of keras-hub that the file is, or None."""
        return self.description and self.description.preset

    @property
    def resolution(self) -> int | None:
        known = self.record or self.description
        return known and known.resolution

    def padding(self, asked: str | None, usual: str) -> str:
        """Returns the padding to build with. Raises if the weights were trained with another."""
        known = None
        if self.record is not None:
            known = self.record.padding
        elif self.path is not None:
            from keras_effnet.weights import padding

            known = padding.stated_padding(self.path)
        if asked is not None and known is not None and asked != known:
            raise ValueError(
                f"Expected padding={known!r}, which these weights were trained with (None selects it). Received: "
                f"padding={asked!r}"
            )
        return asked or known or usual

    @property
    def epsilon(self) -> float | None:
        """Epsilon of batch normalization in the net that a file describes, or None for the padding's."""
        if self.path is None:
            return None
        if self.preset is not None:
            return self.preset.net.bn_epsilon
        from keras_effnet.weights.formats import keras_file

        layers = keras_file.numerics_of(self.path)
        return layers and layers.bn_epsilon

    def has_classifier(self, classes: int, architecture) -> bool:
        """Returns whether the classifier comes from the weights. With 1000 classes it must, unless there are none."""
        from keras_effnet.weights import convert

        if classes == 1000 and (self.record is None or self.record.classes == 1000):
            return True
        if self.path is not None:
            return convert.classes_of(self.path, architecture) == classes
        return self.record is None or classes in [self.record.classes + file.class_offset for file in self.record.files]

    def preprocessing(self, asked, usual, channels: int):
        """Returns the preprocessing to build with. Raises if the weights were trained with another scheme."""
        from keras_effnet.weights import convert

        known = None
        if self.record is not None:
            known = self.record.preprocessing
        elif self.path is not None:
            known = convert.pixels_of(self.path)
        if isinstance(asked, str) and asked == "auto":
            if self.preset is None:
                return known or usual
            if self.preset.pixels is None:
                from keras_effnet.weights.keras2.conversion import NO_PREPROCESSING

                warnings.warn(f"{self.path}: the preset lacks {NO_PREPROCESSING}", stacklevel=4)
            return known
        if known is not None and isinstance(asked, str) and constants(asked, channels) != constants(known, channels):
            raise ValueError(
                f"Expected preprocessing={scheme_of(*constants(known, channels))!r}, which these weights were trained "
                f"with ('auto' selects it). Received: preprocessing={asked!r}. "
                "For other constants, pass a pair (scale, offset). To normalize the inputs yourself, pass None"
            )
        return asked

    def load_into(self, model, include_top: bool, classes: int, prefix: str, padding: str | None) -> None:
        from keras_effnet.weights import convert, store

        path = self.path
        if path is None and self.record is not None:
            path = store.fetch(self.record, include_top, classes)
        if path is not None:
            convert.load(model, path, include_top=include_top, prefix=prefix, padding=padding)
        if self.record is not None or self.path is None:  # other files have no record
            model.weights_record = self.record
        model.labels = None
        own = os.fspath(self.path or "")
        if include_top and own.endswith(".keras"):
            model.labels = model_metadata.metadata(own).get("labels")
        if self.description is not None and self.record is None:
            model.labels = self.description.labels if include_top else None
            model.expects = model_metadata.Expects.of(self.description)


def _pruned(architecture, blocks, origin: _Origin):
    from keras_effnet.nets import pruning_plan

    if origin.record is not None:
        raise ValueError(
            "Expected weights=None, or the path of a pruned net's weights, when blocks are given. Received: "
            f"weights={origin.record.tag!r}, which have all channels of {architecture.name}"
        )
    return pruning_plan.narrowed(architecture, blocks)


def features(model: keras.Model, levels: int | tuple[int, ...] = (1, 2, 3, 4, 5)) -> keras.Model:
    """Returns a model of the feature maps of another model, at strides 2, 4, 8, 16 and 32.

    Args:
        model: A model of this package, with or without a top. Both share their layers.
        levels: Integer or tuple of integers from 1 to 5. `reduction_i` has a stride of 2 ** i. Defaults to all.

    Returns:
        A `keras.Model` whose output is a dict from `"reduction_1"`, ... to tensors (batch, height, width, channels).

    Raises:
        ValueError: If the model is not of this package, or a level does not exist.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None)
    >>> ke.features(model).output["reduction_5"].shape
    (None, 7, 7, 320)

    Reference:
        tensorflow/tpu efficientnet_model.py:646-665: the last block before each stride.
    """
    reading = inspection.read(model)
    reductions = reading.architecture.reductions
    ends = (reading.layers["stem_activation"], *reading.block_ends)
    outputs = {}
    for level in (levels,) if isinstance(levels, int) else levels:
        if level not in range(1, len(reductions) + 1):
            raise ValueError(f"Expected levels from 1 to {len(reductions)}. Received: levels={levels}")
        outputs[f"reduction_{level}"] = ends[reductions[level - 1] + 1].output
    return functional(model.inputs, outputs, f"{model.name}_features")


def _named(
    function: Callable[Concatenate[str, Arguments], keras.Model], variant: str
) -> Callable[Arguments, keras.Model]:
    def build(*args: Arguments.args, **kwargs: Arguments.kwargs) -> keras.Model:
        return function(variant, *args, **kwargs)

    parameters = list(inspect.signature(function).parameters.values())[1:]
    setattr(build, "__signature__", inspect.Signature(parameters, return_annotation=keras.Model))  # noqa: B010
    row = VARIANTS[variant]
    build.__doc__ = (
        f"Builds `{variant}`: {row.resolution} x {row.resolution} pixels, width {row.width}, depth {row.depth} "
        f"({row.source})."
        f"\n\n    Same as `create_model({variant!r}, ...)`. See `create_model()` for the arguments.\n"
    )
    return build


EfficientNetB0 = _named(create_model, "efficientnet-b0")

EfficientNetB1 = _named(create_model, "efficientnet-b1")

EfficientNetB2 = _named(create_model, "efficientnet-b2")

EfficientNetB3 = _named(create_model, "efficientnet-b3")

EfficientNetB4 = _named(create_model, "efficientnet-b4")

EfficientNetB5 = _named(create_model, "efficientnet-b5")

EfficientNetB6 = _named(create_model, "efficientnet-b6")

EfficientNetB7 = _named(create_model, "efficientnet-b7")

EfficientNetB8 = _named(create_model, "efficientnet-b8")

EfficientNetL2 = _named(create_model, "efficientnet-l2")

EfficientNetLite0 = _named(create_model, "efficientnet-lite0")

EfficientNetLite1 = _named(create_model, "efficientnet-lite1")

EfficientNetLite2 = _named(create_model, "efficientnet-lite2")

EfficientNetLite3 = _named(create_model, "efficientnet-lite3")

EfficientNetLite4 = _named(create_model, "efficientnet-lite4")

EfficientNetEdgeTPUS = _named(create_model, "efficientnet-edgetpu-s")

EfficientNetEdgeTPUM = _named(create_model, "efficientnet-edgetpu-m")

EfficientNetEdgeTPUL = _named(create_model, "efficientnet-edgetpu-l")

EfficientNetCondConvB0x4 = _named(create_model, "efficientnet-condconv-b0-4e")

EfficientNetCondConvB0x8 = _named(create_model, "efficientnet-condconv-b0-8e")

EfficientNetCondConvB0x8Depth = _named(create_model, "efficientnet-condconv-b0-8e-depth")

EfficientNetB1Pruned = _named(create_model, "efficientnet-b1-pruned")

EfficientNetB2Pruned = _named(create_model, "efficientnet-b2-pruned")

EfficientNetB3Pruned = _named(create_model, "efficientnet-b3-pruned")

EfficientNetV2B0 = _named(create_model, "efficientnetv2-b0")

EfficientNetV2B1 = _named(create_model, "efficientnetv2-b1")

EfficientNetV2B2 = _named(create_model, "efficientnetv2-b2")

EfficientNetV2B3 = _named(create_model, "efficientnetv2-b3")

EfficientNetV2S = _named(create_model, "efficientnetv2-s")

EfficientNetV2M = _named(create_model, "efficientnetv2-m")

EfficientNetV2L = _named(create_model, "efficientnetv2-l")

EfficientNetV2XL = _named(create_model, "efficientnetv2-xl")

EfficientNetV2RWT = _named(create_model, "efficientnetv2-rw-t")

EfficientNetV2RWTGC = _named(create_model, "efficientnetv2-rw-t-gc")

EfficientNetV2RWS = _named(create_model, "efficientnetv2-rw-s")

EfficientNetV2RWM = _named(create_model, "efficientnetv2-rw-m")

EfficientNetXB0 = _named(create_model, "efficientnet-x-b0")

EfficientNetXB1 = _named(create_model, "efficientnet-x-b1")

EfficientNetXB2 = _named(create_model, "efficientnet-x-b2")

EfficientNetXB3 = _named(create_model, "efficientnet-x-b3")

EfficientNetXB4 = _named(create_model, "efficientnet-x-b4")

EfficientNetXB5 = _named(create_model, "efficientnet-x-b5")

EfficientNetXB6 = _named(create_model, "efficientnet-x-b6")

EfficientNetXB7 = _named(create_model, "efficientnet-x-b7")

EfficientNetHB5 = _named(create_model, "efficientnet-h-b5")

EfficientNetXB5Timm = _named(create_model, "efficientnet-x-b5-timm")

EfficientNetHB5Timm = _named(create_model, "efficientnet-h-b5-timm")

EfficientNetB0Composer = _named(create_model, "efficientnet-b0-composer")

for _name, _function in list(globals().items()):
    if _name.startswith("EfficientNet"):
        _function.__name__ = _function.__qualname__ = _name

"""Which layers of Keras 2 have a counterpart in Keras 3, and how their settings are translated. Tables first."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

# Layers that mean the same in both. Keras 2 could write others; they are named in an error and never run.
SAME = frozenset(
    (
        "Activation",
        "ActivityRegularization",
        "Add",
        "AlphaDropout",
        "Average",
        "AveragePooling2D",
        "BatchNormalization",
        "CategoryEncoding",
        "CenterCrop",
        "Concatenate",
        "Conv2D",
        "Conv2DTranspose",
        "Cropping2D",
        "Dense",
        "DepthwiseConv2D",
        "Dot",
        "Dropout",
        "ELU",
        "Embedding",
        "Flatten",
        "GaussianDropout",
        "GaussianNoise",
        "GlobalAveragePooling1D",
        "GlobalAveragePooling2D",
        "GlobalMaxPooling1D",
        "GlobalMaxPooling2D",
        "GroupNormalization",
        "InputLayer",
        "LayerNormalization",
        "LeakyReLU",
        "MaxPooling2D",
        "Maximum",
        "Minimum",
        "Multiply",
        "Normalization",
        "PReLU",
        "Permute",
        "RandomBrightness",
        "RandomContrast",
        "RandomFlip",
        "RandomRotation",
        "RandomTranslation",
        "RandomZoom",
        "ReLU",
        "RepeatVector",
        "Rescaling",
        "Reshape",
        "Resizing",
        "SeparableConv2D",
        "Softmax",
        "SpatialDropout2D",
        "Subtract",
        "UnitNormalization",
        "UpSampling2D",
        "ZeroPadding2D",
    )
)

# RandomCrop is not among them: it crops at inference too in Keras 2, and only in training in Keras 3.

# Other names of layers: those of older releases, and the custom ones of qubvel/efficientnet and segmentation_models,
# which are a Dropout and an Activation under another name.
RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "BatchNormalizationV1": ("BatchNormalization", {}),
    "BatchNormalizationV2": ("BatchNormalization", {}),
    "SyncBatchNormalization": ("BatchNormalization", {"synchronized": True}),
    "FixedDropout": ("Dropout", {}),
    "Swish": ("Activation", {"activation": "swish"}),
    "Convolution2D": ("Conv2D", {}),
    "GlobalAvgPool2D": ("GlobalAveragePooling2D", {}),
    "GlobalMaxPool2D": ("GlobalMaxPooling2D", {}),
    "AvgPool2D": ("AveragePooling2D", {}),
    "MaxPool2D": ("MaxPooling2D", {}),
}

MODELS = ("Functional", "Model", "Sequential")

# Layers that have variables whatever their settings are.
ALWAYS_STORED = (
    "BatchNormalization",
    "Conv2D",
    "Conv2DTranspose",
    "Dense",
    "DepthwiseConv2D",
    "Embedding",
    "PReLU",
    "SeparableConv2D",
)

MERGING = ("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract")

# hard_sigmoid is not among them: Keras 3 computes another function of this name.
ACTIVATIONS = frozenset(
    (
        "elu",
        "exponential",
        "gelu",
        "hard_swish",
        "leaky_relu",
        "linear",
        "log_softmax",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "softmax",
        "softplus",
        "softsign",
        "swish",
        "tanh",
    )
)

# What TensorFlow called the same functions.
ALIASES = {"softmax_v2": "softmax", "log_softmax_v2": "log_softmax"}

# Settings that a class writes and that mean nothing.
UNUSED = {
    "Embedding": ("input_length",),
    "SeparableConv2D": ("kernel_initializer", "kernel_regularizer", "kernel_constraint"),
}

_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos3", "lanczos5", "nearest")

# The only values of settings at which Keras 3 computes the same, by class and name. Keras 2 had more interpolations.
# TensorFlow has no transposed convolution with dilation for CPUs, where Keras 2 had its own.
VALUES: dict[tuple[str, str], tuple] = {
    ("Conv2DTranspose", "dilation_rate"): (1, [1, 1]),
    ("Embedding", "mask_zero"): (False,),
    ("Resizing", "interpolation"): (*_INTERPOLATIONS, "area"),
    ("UpSampling2D", "interpolation"): (*_INTERPOLATIONS, "area"),
}

# Settings that have another name in Keras 3, by class and name.
CALLED: dict[tuple[str, str], str] = {("LeakyReLU", "alpha"): "negative_slope"}

# Settings that Keras 3 lacks, with the values at which they mean nothing. None: they never change the outputs.
NEUTRAL: dict[str, tuple | None] = {
    "batch_input_shape": None,
    "fused": None,
    "groups": (1,),
    "implementation": None,
    "noise_shape": (None,),
    "ragged": (False,),
    "rng_type": None,
    "renorm": (False,),
    "renorm_clipping": None,
    "renorm_momentum": None,
    "virtual_batch_size": (None,),
    "adjustment": (None,),
    "input_shape": None,
    "input_dim": None,
    "batch_size": None,
    "autocast": None,
    "experimental_autocast": None,
    "token": None,
}


@dataclass(frozen=True)
class Foreign:
    """A layer that Keras 3 cannot rebuild.

    Args:
        layer: String, the layer's name.
        reason: String.
    """

    layer: str
    reason: str


class ForeignLayerError(ValueError):
    """Raised for a layer that Keras 3 cannot rebuild."""

    def __init__(self, foreign: Foreign):
        super().__init__(f"{foreign.layer}: {foreign.reason}")
        self.foreign = foreign


def dtype_of(config: dict[str, Any]) -> str | None:
    """Returns the name of a layer's type or policy, in any of the forms that Keras 2 wrote.

    Args:
        config: A layer's config.

    Raises:
        ForeignLayerError: If it is none that Keras 3 has.
    """
    dtype = config.get("dtype")
    if isinstance(dtype, dict):
        inner = dtype.get("config")
        dtype = inner.get("name") if isinstance(inner, dict) else None
    if dtype is None or dtype in ("infer", "_infer"):
        return None
    known = ("float16", "float32", "float64", "bfloat16", "mixed_float16", "mixed_bfloat16", "uint8", "int32", "int64")
    if dtype not in known:
        raise ForeignLayerError(Foreign(str(config.get("name"))[:80], f"the type {str(dtype)[:40]!r} is unknown"))
    return dtype


def make(class_name: str, config: dict[str, Any]) -> "keras.layers.Layer":
    """Returns the layer of Keras 3 that computes what a layer of Keras 2 did.

    Args:
        class_name: String, the layer's class in Keras 2.
        config: Dict, the layer's config.

    Raises:
        ForeignLayerError: If Keras 3 has no such layer, or it has a setting that Keras 3 lacks.
    """
    import keras

    name = str(config.get("name", class_name))
    class_name, more = RENAMED.get(class_name, (class_name, {}))
    if class_name not in SAME:
        known = class_name.isidentifier() and hasattr(keras.layers, class_name)
        reason = f"{class_name} is not converted" if known else f"no layer of Keras 3 is a {class_name[:80]}"
        raise ForeignLayerError(Foreign(name[:80], reason))
    made: Callable = getattr(keras.layers, class_name)
    config = {**config, **more}
    accepted = _parameters(made)
    given: dict[str, Any] = {}
    trainable = True
    for key, value in config.items():
        key = CALLED.get((class_name, key), key)
        if key in UNUSED.get(class_name, ()):
            continue
        if key == "name":
            given[key] = _name(value)
        elif key == "trainable":
            trainable = bool(value)
        elif key == "dtype":
            given[key] = dtype_of(config)
        elif value not in VALUES.get((class_name, key), (value,)):
            raise ForeignLayerError(Foreign(name[:80], f"{class_name} with {key}={str(value)[:40]} is not converted"))
        elif key in accepted:
            given[key] = _translated(class_name, name, key, value)
        elif key not in NEUTRAL or (NEUTRAL[key] is not None and value not in (NEUTRAL[key] or ())):
            raise ForeignLayerError(Foreign(name[:80], f"{class_name} has no {key[:40]}={str(value)[:40]} in Keras 3"))
    try:
        layer = made(**given)
        layer.trainable = trainable
        return layer
    except Exception as error:  # whatever a layer raises for a setting that is none
        raise ForeignLayerError(Foreign(name[:80], " ".join(str(error).split())[:200])) from error


def _parameters(made: Callable) -> set[str]:
    """Returns the arguments of a layer of Keras 3, those of its base classes included."""
    found: set[str] = {"activity_regularizer"}
    for one in inspect.getmro(made):  # type: ignore[arg-type]
        if one.__name__ == "Layer":
            break
        if "__init__" in one.__dict__:
            parameters = inspect.signature(one.__init__).parameters
            found |= set(parameters)
            if "kwargs" not in parameters:  # nothing reaches the base class
                return found - {"self", "activity_regularizer"}
    return found - {"self", "kwargs", "args"}


def _translated(class_name: str, name: str, key: str, value: Any) -> Any:
    """Returns a setting in Keras 3's form."""
    import keras

    def foreign(what: str) -> ForeignLayerError:
        return ForeignLayerError(Foreign(name[:80], f"the {what} {_shown(value)} is none of Keras 3"))

    if key.endswith("activation"):
        if isinstance(value, dict) and value.get("class_name") == "function":
            value = value.get("config")
        if isinstance(value, dict) and value.get("class_name") in SAME and isinstance(value.get("config"), dict):
            return make(value["class_name"], value["config"])
        value = ALIASES.get(value, value) if isinstance(value, str) else value
        if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
            raise foreign("activation")
        return value
    for kind in ("initializer", "regularizer", "constraint"):
        if key.endswith(kind):
            made = _object(getattr(keras, f"{kind}s"), value)
            if made is None and value is not None and kind != "initializer":
                raise foreign(kind)
            # What a trained variable started from does not matter.
            return "zeros" if made is None and kind == "initializer" else made
    if key == "axis" and class_name == "BatchNormalization" and isinstance(value, list):
        if len(value) != 1:
            raise foreign("list of axes")
        return value[0]
    if isinstance(value, dict):  # a tensor, as TensorFlow 2.9 and later store it
        inner = value.get("config")
        value = inner.get("value") if isinstance(inner, dict) else value
    if isinstance(value, dict) or (isinstance(value, list | str) and len(value) > 10_000):
        raise foreign(f"setting {key[:40]}")
    if key in ("scale", "offset", "mean", "variance") and value is not None:
        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise foreign(f"setting {key}") from error
        # One number per channel, which Keras 2 broadcast from any rank.
        return numbers.ravel().tolist() if numbers.ndim > 1 and numbers.size == numbers.shape[-1] else value
    return tuple(value) if key in ("noise_shape", "target_shape", "dims") and isinstance(value, list) else value


def _object(module: Any, value: Any) -> Any:
    """Returns an initializer, regularizer or constraint of Keras, or None where Keras has none of its class."""
    class_name, config = (value.get("class_name"), value.get("config")) if isinstance(value, dict) else (value, {})
    made = getattr(module, class_name, None) if isinstance(class_name, str) else None
    if not inspect.isclass(made) or not isinstance(config, dict):
        return None
    known = set(inspect.signature(made).parameters)
    plain = {
        key: entry for key, entry in config.items() if key in known and isinstance(entry, str | int | float | None)
    }
    try:
        return made(**plain)
    except (TypeError, ValueError):
        return None


def _name(value: Any) -> Any:
    """Returns a layer's name without slashes, which Keras 3 does not take."""
    return value.replace("/", "_") if isinstance(value, str) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("class_name", value)
    return repr(str(value)[:40])

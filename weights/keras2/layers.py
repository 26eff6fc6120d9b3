"""Which layers of Keras 2 have a counterpart in Keras 3, and how their settings are translated. Tables first."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        "Flatten",
        "GaussianDropout",
        "GaussianNoise",
        "GlobalAveragePooling2D",
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
        "RandomCrop",
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

MERGING = ("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract")

ACTIVATIONS = frozenset(
    (
        "elu",
        "exponential",
        "gelu",
        "hard_sigmoid",
        "hard_swish",
        "leaky_relu",
        "linear",
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

# Settings that Keras 3 lacks, with the values at which they mean nothing. None: they never change the outputs.
NEUTRAL: dict[str, tuple | None] = {
    "batch_input_shape": None,
    "fused": None,
    "groups": (1,),
    "implementation": None,
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
        raise ForeignLayerError(Foreign(name[:80], f"no layer of Keras 3 is a {class_name[:80]}"))
    made: Callable = getattr(keras.layers, class_name)
    config = {**config, **more}
    accepted = _parameters(made)
    given: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("name", "trainable"):
            given[key] = value
        elif key == "dtype":
            given[key] = dtype_of(config)
        elif key in accepted:
            given[key] = _translated(class_name, name, key, value)
        elif key not in NEUTRAL or (NEUTRAL[key] is not None and value not in (NEUTRAL[key] or ())):
            raise ForeignLayerError(Foreign(name[:80], f"{class_name} has no {key[:40]}={str(value)[:40]} in Keras 3"))
    try:
        return made(**given)
    except (TypeError, ValueError) as error:
        raise ForeignLayerError(Foreign(name[:80], " ".join(str(error).split())[:200])) from error


def _parameters(made: Callable) -> set[str]:
    """Returns the arguments of a layer of Keras 3, those of its base classes included."""
    found: set[str] = set()
    for one in inspect.getmro(made):  # type: ignore[arg-type]
        if one.__name__ == "Layer":
            break
        if "__init__" in one.__dict__:
            found |= set(inspect.signature(one.__init__).parameters)
    return found - {"self", "kwargs", "args"} | {"activity_regularizer"}


def _translated(class_name: str, name: str, key: str, value: Any) -> Any:
    """Returns a setting in Keras 3's form."""
    import keras

    def foreign(what: str) -> ForeignLayerError:
        return ForeignLayerError(Foreign(name[:80], f"the {what} {_shown(value)} is none of Keras 3"))

    if key.endswith("activation"):
        if isinstance(value, dict) and value.get("class_name") == "function":
            value = value.get("config")
        if value is not None and value not in ACTIVATIONS:
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
        return value[0]
    if isinstance(value, dict):  # a tensor, as TensorFlow 2.9 and later store it
        inner = value.get("config")
        value = inner.get("value") if isinstance(inner, dict) else value
    if isinstance(value, dict) or (isinstance(value, list | str) and len(value) > 10_000):
        raise foreign(f"setting {key[:40]}")
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


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("class_name", value)
    return repr(str(value)[:40])

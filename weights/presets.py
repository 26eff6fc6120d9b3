"""Which net, head and pixels a preset of keras-hub describes, in this package's terms. No Keras.

Reference:
    keras_hub/src/models/efficientnet/efficientnet_backbone.py, keras_hub/src/models/image_classifier.py and
    keras_hub/src/layers/preprocessing/image_converter.py, 0.32.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from keras_effnet.errors import one_line
from keras_effnet.nets.architecture import Architecture, Block
from keras_effnet.nets.normalization import scheme_near
from keras_effnet.nets.variants import identify, nearest
from keras_effnet.weights.formats import opening, preset_file
from keras_effnet.weights.formats.preset_file import Documents

_CLASS = "EfficientNetBackbone"

# Arguments of the net that an older preset may lack, with their defaults.
_DEFAULTS: dict[str, Any] = {
    "data_format": "channels_last",
    "stackwise_force_input_filters": 0,
    "dropout": 0.2,
    "depth_divisor": 8,
    "min_depth": 8,
    "input_shape": [None, None, 3],
    "activation": "swish",
    "include_stem_padding": True,
    "use_depth_divisor_as_min_depth": False,
    "cap_round_filter_decrease": False,
    "stem_conv_padding": "valid",
    "batch_norm_epsilon": 1e-5,
    "projection_activation": None,
}

# Other names of the widths and depths, which its constructor takes.
_OTHER_NAMES = {
    "stackwise_width_coefficients": "width_coefficient",
    "stackwise_depth_coefficients": "depth_coefficient",
}

# Arguments that every net has.
_REQUIRED = {
    "stackwise_kernel_sizes",
    "stackwise_num_repeats",
    "stackwise_input_filters",
    "stackwise_output_filters",
    "stackwise_expansion_ratios",
    "stackwise_squeeze_and_excite_ratios",
    "stackwise_strides",
    "stackwise_block_types",
}

# Arguments that the outputs do not depend on, or that the tensors show. "v1" blocks do not take the option.
_WITHOUT_EFFECT = {"name", "trainable", "dtype", "batch_norm_momentum", "num_features", "stackwise_nores_option"}

# Activations without settings, by keras-hub's name: those of Keras 3.
_ACTIVATIONS = {
    name: name
    for name in ("elu", "gelu", "hard_silu", "linear", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "tanh")
} | {"swish": "silu", "hard_swish": "hard_silu"}
_OF_HEADS = {name: name for name in ("softmax", "sigmoid", "linear", "log_softmax", "softplus", "relu", "tanh")}

# What this package has a net for. Its nets pad the first convolution as the others.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "data_format": ("channels_last",),
    "include_stem_padding": (True,),
    "stem_conv_padding": ("valid",),
    "use_depth_divisor_as_min_depth": (False, True),
    "cap_round_filter_decrease": (False, True),
}

_BLOCKS, _FILTERS = 1000, 1 << 16  # more than any net has

_MIXTURE = (
    "pad their convolutions with strides as TensorFlow does where they are depthwise, and as PyTorch does where they "
    "are full. No net of this package does"
)


class ForeignPresetError(ValueError):
    """Raised for a model of keras-hub that this package cannot represent.

    Args:
        path: Path of the file.
        kind: String. What the file is.
        reason: String.
    """

    def __init__(self, path: Any, kind: str, reason: str):
        super().__init__(f"Expected an EfficientNet that this package has. Received: {str(path)!r}, {kind}: {reason}")
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Head:
    """The classifier of a preset.

    Args:
        classes: Integer.
        pooling: `"avg"` or `"max"`.
        dropout: Float, rate before the dense layer.
        activation: Name of a Keras activation, or None for logits.
    """

    classes: int
    pooling: str
    dropout: float
    activation: str | None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in words."""
        pooling = {"avg": "GlobalAveragePooling2D", "max": "GlobalMaxPooling2D"}[self.pooling]
        activation = f", {self.activation}" if self.activation else ""
        return pooling, f"Dropout({self.dropout:g})", f"Dense({self.classes}{activation})"


@dataclass(frozen=True)
class Pixels:
    """What a preset does with images before the net.

    Args:
        preprocessing: See `nets.normalization.constants()`.
        size: Tuple of height and width, or None where it does not resize.
        interpolation: See `images.resizing.crop_and_resize()`; or None if there is no such way.
        crop_mode: See `images.resizing.crop_and_resize()`; or None if there is no such way.
    """

    preprocessing: Any
    size: tuple[int, int] | None
    interpolation: str | None
    crop_mode: str | None


@dataclass(frozen=True)
class Preset:
    """What keras-hub saved.

    Args:
        kind: String. What it is, and the program that wrote it.
        writer: String. The program.
        net: An `Architecture`. Its name is that of the variant, or of the nearest one.
        input_shape: Tuple of height, width and channels. Height and width may be None.
        head: A `Head`, or None.
        pixels: A `Pixels`, or None where it does not say it.
        left: Tuple of strings: what this package does not take, and why.
    """

    kind: str
    writer: str
    net: Architecture
    input_shape: tuple[int | None, int | None, int]
    head: Head | None
    pixels: Pixels | None
    left: tuple[str, ...]

    @property
    def size_of_images(self) -> tuple[int | None, int | None, int]:
        """Shape of the net's input: where the net leaves the size open, that of the image converter."""
        height, width, channels = self.input_shape
        size = self.pixels and self.pixels.size
        return (*size, channels) if size and height is None and width is None else (height, width, channels)


def read(path: Any) -> Preset | None:
    """Reads what a preset of keras-hub, or a `.keras` file of it, describes.

    Args:
        path: Path of any file or folder.

    Returns:
        A `Preset`, or None for everything else.

    Raises:
        OSError: If a file cannot be read.
        ForeignPresetError: If it holds another model than an EfficientNet of this package.
        ValueError: If it is damaged.
    """
    place = Path(path)
    parts = [place, *(place / name for name in (preset_file.CONFIG, preset_file.BODY, *preset_file.BESIDE))]
    stamps = tuple((each.stat().st_mtime_ns, each.stat().st_size) if each.exists() else None for each in parts)
    return _read(os.fspath(place.absolute()), os.fspath(path), stamps)


@lru_cache(maxsize=8)
def _read(place: str, told: str, stamps: tuple) -> Preset | None:
    documents = preset_file.read(Path(place))
    if documents is None:
        return None
    kind = f"{documents.kind} of {documents.writer}"

    def refuse(reason: str) -> NoReturn:
        raise ForeignPresetError(told, kind, reason)

    config = documents.backbone
    if documents.name != _CLASS:
        refuse(f"{documents.name}: not an EfficientNet")
    if documents.kind != "a preset" and documents.around:
        refuse(
            f"its {_CLASS} is in a {documents.around}. Save that layer alone: "
            f"model.get_layer({one_line(config.get('name'), 80)!r}).save_to_preset(folder)"
        )
    try:
        net, last = _architecture(config)
        shape = _input_shape(config)
        head = None if documents.classifier is None else _head(documents.classifier)
        found = {name: _pixels(converter, shape[2]) for name, converter in documents.converters.items()}
    except _FieldError as error:
        refuse(str(error))
    except RecursionError as error:
        raise _damaged(told, "a field of it is nested too deep") from error
    pixels = next(iter(found.values()), None)
    if any(each != pixels for each in found.values()):
        raise _damaged(told, f"{' and '.join(found)} have image converters that differ")
    with opening.opened(Path(place)) as tensors:
        shapes = {f"/{name}": stored.shape for name, stored in tensors.items()}
        bias = tensors["dense/1"].shape if "dense/1" in tensors else None
    features = _kernel(told, shapes, last, (1, 1, net.blocks[-1].filters_out, None))[3]
    _kernel(told, shapes, "conv2d/0", (3, 3, shape[2], net.stem_filters))
    if head is not None and bias != (head.classes,):
        raise _damaged(told, f"its classifier has num_classes={head.classes}, and its weights have a bias of {bias}")
    net = replace(net, head_filters=features)  # the config does not hold num_features
    net = replace(net, name=identify(net.blocks) or nearest(net) or "efficientnet")
    if head is not None:
        net = replace(net, dropout_rate=head.dropout)
    return Preset(kind, documents.writer, net, shape, head, pixels, _left(documents, pixels))


def _kernel(told: str, shapes: dict[str, tuple], name: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """Returns the shape of a kernel. Raises if it is not that of the net: None stands for any number of channels."""
    found = [shape for full, shape in shapes.items() if full.endswith(f"/{name}")]
    shape = found[0] if len(found) == 1 else ()
    if len(shape) != 4 or any(side not in (wanted, None) for side, wanted in zip(expected, shape, strict=True)):
        wanted = " x ".join(str(side or "any") for side in expected)
        received = " x ".join(map(str, shape)) or "none"
        raise _damaged(told, f"expected {name} of {wanted}, as it describes its net. Received: {received}")
    if not 0 < shape[3] <= _FILTERS:
        raise _damaged(told, f"expected {name} of 1 to {_FILTERS} channels. Received: {shape[3]}")
    return shape


def _damaged(told: str, why: str) -> ValueError:
    return ValueError(f"Expected a whole model of keras-hub. Received: {told!r}, but {why}")


class _FieldError(ValueError):
    def __init__(self, field: str, value: Any, why: str):
        super().__init__(f"its {one_line(field, 80)} is {one_line(value, 80)}, and {why}")


def _left(documents: Documents, pixels: Pixels | None) -> tuple[str, ...]:
    """Returns what a net of this package does not take, in words."""
    said = [f"{documents.around}, the model around the net"] if documents.around else []
    if pixels is not None and pixels.size is not None and None in (pixels.interpolation, pixels.crop_mode):
        wanted = ["pad_to_aspect_ratio"] if pixels.crop_mode is None else []
        wanted += ["interpolation or antialias"] if pixels.interpolation is None else []
        said.append(f"how its image converter resizes ({' and '.join(wanted)}), which this package does not have")
    return tuple(said)


def _number(field: str, value: Any, least: float, most: float, whole: bool = True) -> Any:
    good = type(value) in ((int,) if whole else (int, float)) and least <= value <= most
    if not good:
        kind = "a whole number" if whole else "a number"
        raise _FieldError(field, value, f"{kind} from {least:g} to {most:g} was expected")
    return value


def _choice(field: str, value: Any, choices: Iterable[Any]) -> Any:
    if not any(type(value) is type(each) and value == each for each in choices):
        raise _FieldError(field, value, f"{' or '.join(map(str, choices))} was expected")
    return value


def _activation(field: str, value: Any, known: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise _FieldError(field, value, f"one of {', '.join(known)} was expected")
    return known[value]


def _architecture(config: dict[str, Any]) -> tuple[Architecture, str]:
    """Returns the net that a config describes, and the name of the kernel of its last convolution."""
    _check_known(config)
    given = {**_DEFAULTS, **config}
    count = len(_list(given, "stackwise_kernel_sizes", None))
    if not 0 < count <= _BLOCKS:
        raise _FieldError("stackwise_kernel_sizes", given["stackwise_kernel_sizes"], "a list of sizes was expected")
    _check_supported(given, count)
    activation = _activation("activation", given["activation"], _ACTIVATIONS)
    projected = given["projection_activation"] or None
    if projected is not None and _activation("projection_activation", projected, _ACTIVATIONS) != activation:
        raise _FieldError("projection_activation", projected, f"{activation} was expected, as everywhere in the net")
    filters, width = (_list(given, f"stackwise_{each}", count)[0] for each in ("input_filters", "width_coefficients"))
    stem = _rounded(given, "stackwise_input_filters", filters, width)
    blocks = _blocks(given, count, stem, projected is not None)
    # It counts the blocks before scaling, and this package after it.
    counted = len(blocks) / sum(_list(given, "stackwise_num_repeats", count))
    rate = _number("dropout", given["dropout"], 0, 0.99, whole=False) * counted
    if rate * (len(blocks) - 1) / len(blocks) >= 1:
        raise _FieldError("dropout", given["dropout"], "the last block's rate has to be less than 1")
    epsilon = _number("batch_norm_epsilon", given["batch_norm_epsilon"], 1e-9, 1, whole=False)
    net = Architecture(
        name="",
        stem_filters=stem,
        blocks=tuple(blocks),
        head_filters=0,
        activation=activation,
        dropout_rate=0.0,
        drop_connect_rate=rate,
        padding="symmetric",
        bn_epsilon=float(epsilon),
    )
    # Keras 3 numbers the layers of a class, see naming_tables.KERAS3: the last convolution comes after all others.
    before = 1 + sum(1 + bool(block.expand_filters) + 2 * bool(block.se_filters) for block in blocks)
    return net, f"conv2d_{before}/0"


def _check_known(config: dict[str, Any]) -> None:
    """Raises for a field that this package does not know, and for one that is there by both of its names."""
    known = _REQUIRED | _DEFAULTS.keys() | _OTHER_NAMES.keys() | set(_OTHER_NAMES.values()) | _WITHOUT_EFFECT
    for field in sorted(config.keys() - known):
        raise _FieldError(field, config[field], "this package does not know this field of keras-hub")
    for one, other in _OTHER_NAMES.items():
        if one in config and other in config:
            raise _FieldError(one, config[one], f"it has {other} too")


def _check_supported(given: dict[str, Any], count: int) -> None:
    """Raises for blocks and settings that no net of this package has."""
    types = _list(given, "stackwise_block_types", count)
    others = sorted({one_line(kind, 80) for kind in types} - {"v1"})
    if others:
        raise _FieldError("stackwise_block_types", ", ".join(others), f"such blocks {_MIXTURE}")
    for field, choices in _CHOICES.items():
        _choice(field, given[field], choices)


def _blocks(given: dict[str, Any], count: int, stem: int, projected: bool) -> list[Block]:
    """Returns the blocks of all stacks.

    Args:
        given: Dict, the config with its defaults.
        count: Integer. Stacks.
        stem: Integer. Channels of the first convolution.
        projected: Boolean, whether projections have an activation.
    """

    def each(field: str) -> list[Any]:
        return _list(given, field, count)

    widths, depths = each("stackwise_width_coefficients"), each("stackwise_depth_coefficients")
    kernels, strides = each("stackwise_kernel_sizes"), each("stackwise_strides")
    ratios, squeezes = each("stackwise_expansion_ratios"), each("stackwise_squeeze_and_excite_ratios")
    forced = each("stackwise_force_input_filters")
    inputs, outputs = each("stackwise_input_filters"), each("stackwise_output_filters")
    repeats = each("stackwise_num_repeats")
    blocks: list[Block] = []
    arriving = stem
    for stage in range(count):
        _number("stackwise_num_repeats", repeats[stage], 1, _BLOCKS)
        _number("stackwise_depth_coefficients", depths[stage], 0.01, 100, whole=False)
        _number("stackwise_strides", strides[stage], 1, 2)
        if _number("stackwise_kernel_sizes", kernels[stage], 1, 31) % 2 == 0:
            raise _FieldError("stackwise_kernel_sizes", kernels[stage], "an odd number was expected")
        ratio = _number("stackwise_expansion_ratios", ratios[stage], 1, 64, whole=False)
        if ratio != int(ratio):
            raise _FieldError("stackwise_expansion_ratios", ratio, "a whole number was expected")
        squeeze = _number("stackwise_squeeze_and_excite_ratios", squeezes[stage], 0, 64, whole=False)
        declared = _rounded(given, "stackwise_input_filters", inputs[stage], widths[stage])
        filters_out = _rounded(given, "stackwise_output_filters", outputs[stage], widths[stage])
        for repeat in range(math.ceil(depths[stage] * repeats[stage])):
            if len(blocks) == _BLOCKS:
                raise _FieldError("stackwise_depth_coefficients", depths[stage], f"at most {_BLOCKS} blocks")
            declared = filters_out if repeat else declared
            if _number("stackwise_force_input_filters", forced[stage], 0, _FILTERS):
                declared = _rounded(given, "stackwise_force_input_filters", forced[stage], widths[stage])
            step = 1 if repeat else strides[stage]
            residual = step == 1 and declared == filters_out
            squeezed = 0 < squeeze <= 1
            if declared != arriving and (residual or (squeezed and ratio == 1)):
                raise _FieldError("stackwise_input_filters", inputs[stage], f"{arriving} channels arrive there")
            blocks.append(
                Block(
                    name=f"{stage + 1}{_letters(repeat)}",
                    operator="mbconv",
                    kernel_size=kernels[stage],
                    strides=step,
                    filters_in=arriving,
                    expand_filters=declared * int(ratio) if ratio != 1 else 0,
                    se_filters=max(1, int(declared * squeeze)) if squeezed else 0,
                    filters_out=filters_out,
                    residual=residual,
                    project_activation=projected,
                )
            )
            arriving = filters_out
    return blocks


def _list(given: dict[str, Any], field: str, count: int | None) -> list[Any]:
    """Returns a list of a config, one entry per stack: it may be longer, and a single value is that of all stacks."""
    value = given.get(field, given.get(_OTHER_NAMES.get(field, field)))
    if count is not None and not isinstance(value, list):
        value = [value] * count
    if not isinstance(value, list) or len(value) < (count or 0):
        raise _FieldError(field, value, f"a list of {count or 'sizes'} was expected")
    # The last convolution takes the last of a longer list, which the shapes of the tensors show.
    return value[:count]


def _rounded(given: dict[str, Any], field: str, filters: Any, width: Any) -> int:
    """Returns scaled channels, as `round_filters()` of efficientnet_backbone.py does."""
    divisor = _number("depth_divisor", given["depth_divisor"], 1, 1024)
    least = divisor
    if not given["use_depth_divisor_as_min_depth"]:
        least = _number("min_depth", given["min_depth"], 1, _FILTERS)
    scaled = _number(field, filters, 1, _FILTERS) * _number(
        "stackwise_width_coefficients", width, 0.01, 100, whole=False
    )
    rounded = max(least, int(scaled + divisor / 2) // divisor * divisor)
    if given["cap_round_filter_decrease"] and rounded < 0.9 * scaled:
        rounded += divisor
    return rounded


def _input_shape(config: dict[str, Any]) -> tuple[int | None, int | None, int]:
    shape = config.get("input_shape", _DEFAULTS["input_shape"])
    if not isinstance(shape, list) or len(shape) != 3:
        raise _FieldError("input_shape", shape, "height, width and channels were expected")
    height, width = (side if side is None else _number("input_shape", side, 1, 1 << 16) for side in shape[:2])
    return height, width, _number("input_shape", shape[2], 1, 1024)


def _head(config: dict[str, Any]) -> Head:
    pooling, activation = config.get("pooling", "avg"), config.get("activation")
    if pooling not in ("avg", "max"):
        raise _FieldError("pooling", pooling, "avg or max was expected")
    return Head(
        _number("num_classes", config.get("num_classes"), 1, 10**7),
        pooling,
        float(_number("dropout", config.get("dropout", 0.0), 0, 0.99, whole=False)),
        None if activation in (None, "linear") else _activation("activation", activation, _OF_HEADS | _ACTIVATIONS),
    )


def _pixels(config: dict[str, Any], channels: int) -> Pixels:
    old = sorted(config.keys() & {"mean", "variance", "height", "width"})
    if old:
        raise _FieldError(old[0], config[old[0]], "scale, offset and image_size were expected, as keras-hub saves them")
    numbers = [
        _per_channel(field, config.get(field), default, channels)
        for field, default in (("scale", 1.0), ("offset", 0.0))
    ]
    size = config.get("image_size")
    if size is not None:
        if not isinstance(size, list) or len(size) != 2:
            raise _FieldError("image_size", size, "height and width were expected")
        size = _number("image_size", size[0], 1, 1 << 16), _number("image_size", size[1], 1, 1 << 16)
    crops, pads = (config.get(f"{way}_to_aspect_ratio", way == "crop") for way in ("crop", "pad"))
    plain = not config.get("antialias", False)
    return Pixels(
        scheme_near(*numbers),
        size,
        # Resizing() of Keras 3 samples at the centers of pixels.
        "half-pixel-bilinear" if plain and config.get("interpolation", "bilinear") == "bilinear" else None,
        None if pads else "center" if crops else "squash",
    )


def _per_channel(field: str, value: Any, default: float, channels: int) -> list[float]:
    values = value if isinstance(value, list) else [default if value is None else value]
    if len(values) not in (1, channels):
        raise _FieldError(field, value, f"a number for each of {channels} channels was expected")
    found = [float(_number(field, each, -1e6, 1e6, whole=False)) for each in values]
    return found * channels if len(found) == 1 else found


def _letters(index: int) -> str:
    letter = chr(ord("a") + index % 26)
    return letter if index < 26 else _letters(index // 26 - 1) + letter

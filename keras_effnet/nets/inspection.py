"""Reads the architecture of a Keras model from its layers: the inverse of building it."""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.nets.architecture import Architecture, Block, padding_of


@dataclass(frozen=True)
class Reading:
    """The result of `read()`.

    Args:
        architecture: An `Architecture`. Its name is the model's.
        layers: Dict of the model's layers by name without prefix.
        block_ends: Tuple of the last layer of each block.
        scale: Tuple of floats, one per input channel.
        offset: Tuple of floats, one per input channel.
        size: Tuple of the input's height and width, each an integer or None.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.
    """

    architecture: Architecture
    layers: dict[str, Any]
    block_ends: tuple[Any, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    size: tuple[int | None, int | None]
    channels: int
    classes: int | None


# Names of the layers without prefix. The groups of a block's layer are its block and its part.
LAYER = re.compile(
    r"preprocessing|stem_(?:conv(?:_pad)?|bn|activation)|top_(?:conv|bn|activation|dropout)|(?:avg|max)_pool|predictions"
    r"|block(\d+[a-z]+)_((?:s2d_|expand_|project_)(?:conv(?:_pad)?|bn|activation)|dwconv2?(?:_pad)?|bn|activation"
    r"|se_(?:squeeze|reduce|expand|excite|share(?:_flat|_softmax)?|flat|context|pixel|norm|activation|gate)|routing(?:_pool)?|drop|add)"
)


def read(model: keras.Model, prefix: str | None = None, others: bool = False) -> Reading:
    """Reads the architecture of a model from its layers, also after saving and loading it.

    Args:
        model: A functional model that was built by this package, or loaded from its file. Layers around it are ignored.
        prefix: String in front of the layers' names. Defaults to None: detected, if there is only one.
        others: Boolean, whether to read the EfficientNets of keras.applications too. They pad explicitly and normalize
            in other layers, so only tasks that change nothing can use them. Defaults to False.

    Returns:
        A `Reading`.

    Raises:
        ValueError: If the model's layers are not those of an EfficientNet of this package.

    Example:

    >>> import keras_effnet as ke
    >>> reading = read(ke.EfficientNetB0(weights=None, classes=10))
    >>> reading.architecture.blocks[1].expand_filters, reading.classes
    (96, 10)
    """
    found = {layer.name: layer for layer in getattr(model, "layers", [])}
    prefixes = [name.removesuffix("stem_conv") for name in found if name.endswith("stem_conv")]
    needed = ("stem_conv", "top_conv") if others else ("preprocessing", "stem_conv", "top_conv")
    prefixes = [start for start in prefixes if {f"{start}{part}" for part in needed} <= found.keys()]
    if prefix is None and len(prefixes) == 1:
        prefix = prefixes[0]
    if prefix not in prefixes:
        raise ValueError(
            "Expected a model of this package, or one whose layers include exactly one EfficientNet. Received: "
            f"{getattr(model, 'name', model)!r} with {len(prefixes)}. If the EfficientNet is a layer of the model, "
            "pass that layer: model.get_layer(name)"
        )
    named = {name.removeprefix(prefix): layer for name, layer in found.items() if name.startswith(prefix)}
    try:
        return _read(model, {name: layer for name, layer in named.items() if LAYER.fullmatch(name)})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the layers of an EfficientNet of this package. Received: {model.name!r}"
            f", whose layers differ ({error})"
        ) from error


def find(model: keras.Model, others: bool = False) -> tuple[keras.Model, Reading]:
    """Finds the EfficientNet in a model: the model itself, or a layer of it, as in `Sequential([body, ...])`.

    Args:
        model: A model.
        others: See `read()`.

    Returns:
        Tuple of the model that has the network's layers, and its `Reading`.

    Raises:
        ValueError: If the model has no EfficientNet, or several.
    """
    try:
        return model, read(model, others=others)
    except ValueError:
        found = []
        for layer in getattr(model, "layers", []):
            if isinstance(layer, keras.Model):
                with suppress(ValueError):
                    found.append(find(layer, others))
        if len(found) != 1:
            raise
        return found[0]


def _read(model: keras.Model, named: dict) -> Reading:
    groups: dict[str, dict] = {}
    for name, layer in named.items():
        match = LAYER.fullmatch(name)
        if match and match[1]:
            groups.setdefault(match[1], {})[match[2]] = layer
    stem_conv, top_conv = named["stem_conv"], named["top_conv"]
    activation = named["stem_activation"].get_config()["activation"]
    blocks, arriving, depthwise = [], stem_conv.filters, "dwconv"
    for name, group in groups.items():
        depthwise = next((key for key in ("dwconv", "dwconv2") if key in group), depthwise)
        expand, reduce, project = group.get("expand_conv"), group.get("se_reduce"), group["project_conv"]
        spatial = group.get(depthwise) or expand or project
        operator = {depthwise: "mbconv", "expand_conv": "fused", "project_conv": "conv"}
        acting = group.get("activation") or group.get("expand_activation") or group["project_activation"]
        own = acting.get_config()["activation"]
        blocks.append(
            Block(
                name=name,
                operator=next(kind for key, kind in operator.items() if key in group),
                kernel_size=spatial.kernel_size[0],
                strides=spatial.strides[0],
                filters_in=arriving,
                expand_filters=expand.filters if expand else 0,
                se_filters=reduce.filters if reduce else 0,
                filters_out=project.filters,
                residual="add" in group,
                num_experts=group["routing"].units if "routing" in group else 0,
                activation="" if own == activation else own,
                project_activation="project_activation" in group,
                space_to_depth="s2d_conv" in group,
                global_context="se_share" in group,
            )
        )
        arriving = project.filters
    # The last residual block has the largest rate, so the base rate computed from it has the least rounding error.
    drops = [(group["drop"].rate, index) for index, group in enumerate(groups.values()) if "drop" in group]
    rate, index = drops[-1] if drops else (0.0, 1)
    pixels, scale, offset = _normalization(stem_conv)
    shape = pixels.shape
    channels_last = stem_conv.data_format == "channels_last"
    height, width, channels = shape[1:] if channels_last else (*shape[2:], shape[1])
    dropout, predictions = named.get("top_dropout"), named.get("predictions")
    return Reading(
        architecture=Architecture(
            name=model.name,
            stem_filters=stem_conv.filters,
            blocks=tuple(blocks),
            head_filters=top_conv.filters,
            activation=activation,
            dropout_rate=dropout.rate if dropout else 0.0,
            drop_connect_rate=round(rate * len(blocks) / index, 12),
            padding=_padding(named),
            bn_epsilon=named["stem_bn"].epsilon,
            bn_momentum=named["stem_bn"].momentum,
            depthwise_name=depthwise,
        ),
        layers=named,
        block_ends=tuple(list(group.values())[-1] for group in groups.values()),
        scale=tuple(np.ravel(scale).tolist()),
        offset=tuple(np.ravel(offset).tolist()),
        size=(height, width),
        channels=channels,
        classes=predictions.units if predictions else None,
    )


def _padding(named: dict) -> str:
    """Returns the padding of the convolutions with strides."""
    pads = [layer.padding for name, layer in named.items() if name.endswith("_pad")]
    return padding_of(pads, named["stem_bn"].epsilon, "preprocessing" in named)


def _normalization(stem_conv) -> tuple[Any, Any, Any]:
    """Returns the pixels that a net takes, and the scale and offset that its layers before the stem amount to."""
    tensor, scale, offset = stem_conv.input, np.ones(1), np.zeros(1)
    while True:
        layer = compat.producer(tensor)
        if isinstance(layer, keras.layers.Rescaling):
            factor, added = np.asarray(layer.scale), np.asarray(layer.offset)
        elif isinstance(layer, keras.layers.Normalization):
            mean, variance = (np.asarray(keras.ops.convert_to_numpy(each)) for each in (layer.mean, layer.variance))
            deviation = np.sqrt(np.maximum(variance, keras.config.epsilon()))
            factor, added = 1 / deviation, -mean / deviation
        elif isinstance(layer, keras.layers.ZeroPadding2D):
            factor, added = np.ones(1), np.zeros(1)
        else:
            return tensor, scale, offset
        scale, offset = scale * np.ravel(factor), offset + scale * np.ravel(added)
        tensor = compat.inputs_of(tensor)[0]

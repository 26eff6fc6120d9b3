"""Functional builders of stem, blocks and head, and `read()`, their inverse: a model's architecture from its layers.

Layers that own weights have keras.applications' names and order. `padding="same"` everywhere: static padding layers
compute another net where a size is odd or unknown.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_effnet import initializers
from keras_effnet.arch import Architecture, Block
from keras_effnet.layers import CondConv2D, DepthwiseCondConv2D


@dataclass(frozen=True)
class Style:
    """What all layers of one net have in common.

    Args:
        activation: Name of a Keras activation.
        bn_momentum: Float, share of the old moving statistics that a training step keeps.
        bn_epsilon: Float, added to the variance.
        data_format: `"channels_last"` or `"channels_first"`.
        dtype: A `keras.DTypePolicy`.
        prefix: String in front of every layer's name.
    """

    activation: str
    bn_momentum: float
    bn_epsilon: float
    data_format: str
    dtype: keras.DTypePolicy
    prefix: str = ""

    @property
    def float_dtype(self) -> str:
        """Where a low precision costs accuracy and saves nothing: the input's arithmetic and the classifier."""
        return self.dtype.variable_dtype

    def apply(self, layer_class, name: str, inputs, *args, dtype=None, **kwargs):
        """Makes a layer in this style and applies it."""
        layer = layer_class(*args, name=self.prefix + name, dtype=dtype or self.dtype, **kwargs)
        return initializers.apply(layer, inputs)

    def conv(self, x, filters: int, kernel_size: int, name: str, strides: int = 1, routing=None, **kwargs):
        """A convolution, without bias unless asked for; of mixed experts if there is a routing."""
        kwargs = {"kernel_initializer": initializers.kernel(), **kwargs}
        return self._convolve(
            (layers.Conv2D, CondConv2D), name, x, routing, filters, kernel_size, strides=strides, **kwargs
        )

    def depthwise(self, x, kernel_size: int, name: str, strides: int = 1, routing=None):
        """A depthwise convolution; of mixed experts if there is a routing."""
        kwargs = {"depthwise_initializer": initializers.kernel()}
        return self._convolve(
            (layers.DepthwiseConv2D, DepthwiseCondConv2D), name, x, routing, kernel_size, strides=strides, **kwargs
        )

    def _convolve(self, layer_classes, name: str, x, routing, *args, **kwargs):
        kwargs = {"use_bias": False, "padding": "same", "data_format": self.data_format, **kwargs}
        plain, mixed = layer_classes
        if routing is None:
            return self.apply(plain, name, x, *args, **kwargs)
        return self.apply(mixed, name, [x, routing], *args, num_experts=routing.shape[-1], **kwargs)

    def norm(self, x, name: str, activation_name: str | None = None):
        """Batch normalisation, and the net's activation behind it if that has a name."""
        axis = -1 if self.data_format == "channels_last" else 1
        x = self.apply(
            layers.BatchNormalization, name, x, axis=axis, momentum=self.bn_momentum, epsilon=self.bn_epsilon
        )
        return x if activation_name is None else self.apply(layers.Activation, activation_name, x, self.activation)

    def pool(self, x, kind: str, keepdims: bool = False, name: str | None = None):
        """A global pool of kind `"avg"` or `"max"`."""
        layer_class = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[kind]
        return self.apply(layer_class, name or f"{kind}_pool", x, data_format=self.data_format, keepdims=keepdims)


def stem(style: Style, x, filters: int, scale, offset):
    """Preprocessing (`x * scale + offset`, a number per channel) and the first convolution.

    Args:
        style: A `Style`.
        x: Keras tensor of pixels, (batch, height, width, channels) or (batch, channels, height, width).
        filters: Integer, output channels.
        scale: List of floats, one per channel of `x`.
        offset: List of floats, one per channel of `x`.

    Returns:
        Keras tensor of half the height and width, rounded up.
    """
    # Rank 3 says by itself which axis is the channels': Keras places a flat list by a global setting.
    nest = (
        (lambda row: [[list(row)]])
        if style.data_format == "channels_last"
        else (lambda row: [[[value]] for value in row])
    )
    x = style.apply(layers.Rescaling, "preprocessing", x, nest(scale), nest(offset), dtype=style.float_dtype)
    x = style.conv(x, filters, 3, "stem_conv", strides=2)
    return style.norm(x, "stem_bn", "stem_activation")


def mbconv(style: Style, x, block: Block, name: str):
    """Expansion, depthwise, squeeze-and-excite, projection. tensorflow/tpu efficientnet_model.py:306-396."""
    routing = _routing(style, x, block.num_experts, name) if block.num_experts else None
    if block.expand_filters:
        x = style.conv(x, block.expand_filters, 1, f"{name}expand_conv", routing=routing)
        x = style.norm(x, f"{name}expand_bn", f"{name}expand_activation")
    x = style.depthwise(x, block.kernel_size, f"{name}dwconv", block.strides, routing=routing)
    x = style.norm(x, f"{name}bn", f"{name}activation")
    if block.se_filters:
        gate = style.pool(x, "avg", keepdims=True, name=f"{name}se_squeeze")
        gate = style.conv(gate, block.se_filters, 1, f"{name}se_reduce", use_bias=True, activation=style.activation)
        gate = style.conv(gate, block.inner_filters, 1, f"{name}se_expand", use_bias=True, activation="sigmoid")
        x = style.apply(layers.Multiply, f"{name}se_excite", [x, gate])
    x = style.conv(x, block.filters_out, 1, f"{name}project_conv", routing=routing)
    return style.norm(x, f"{name}project_bn")


def _routing(style: Style, x, num_experts: int, name: str):
    """A block's weights of its experts, from what comes in. tensorflow/tpu efficientnet_model.py:204-209, :342-353."""
    x = style.pool(x, "avg", name=f"{name}routing_pool")
    return style.apply(layers.Dense, f"{name}routing", x, num_experts, activation="sigmoid")


def fused(style: Style, x, block: Block, name: str):
    """One full convolution in place of expansion and depthwise. tensorflow/tpu efficientnet_model.py:399-469."""
    x = style.conv(x, block.inner_filters, block.kernel_size, f"{name}expand_conv", block.strides)
    x = style.norm(x, f"{name}expand_bn", f"{name}expand_activation")
    x = style.conv(x, block.filters_out, 1, f"{name}project_conv")
    return style.norm(x, f"{name}project_bn")


OPERATORS = {"mbconv": mbconv, "fused": fused}


def body(style: Style, x, block: Block, drop_connect_rate: float):
    """A block with its skip connection, which drops the block's own part of single examples while training.

    Args:
        style: A `Style`.
        x: Keras tensor of `block.filters_in` channels.
        block: A `Block`.
        drop_connect_rate: Float, share of the examples that are dropped.

    Returns:
        Keras tensor of `block.filters_out` channels.
    """
    name = f"block{block.name}_"
    y = OPERATORS[block.operator](style, x, block, name)
    if block.residual:
        y = style.apply(layers.Dropout, f"{name}drop", y, drop_connect_rate, noise_shape=(None, 1, 1, 1))
        y = style.apply(layers.Add, f"{name}add", [y, x])
    return y


def head(style: Style, x, filters: int):
    """The last convolution."""
    return style.norm(style.conv(x, filters, 1, "top_conv"), "top_bn", "top_activation")


def classifier(style: Style, x, classes: int, dropout_rate: float, activation):
    """Global average, dropout and the dense layer."""
    x = style.pool(x, "avg")
    x = style.apply(layers.Dropout, "top_dropout", x, dropout_rate)
    return style.apply(
        layers.Dense,
        "predictions",
        x,
        classes,
        activation=activation,
        kernel_initializer=initializers.classifier(),
        dtype=style.float_dtype,
    )


@dataclass(frozen=True)
class Reading:
    """What `read()` finds in a model.

    Args:
        architecture: An `Architecture`. Its name is the model's.
        layers: Dict of the model's layers by their names without prefix.
        block_ends: Tuple of the last layer of each block.
        scale: Tuple of floats, a number per input channel.
        offset: Tuple of floats, a number per input channel.
        size: Tuple of the input's height and width, each an integer or None.
        channels: Integer, the input's channels.
        classes: Integer, or None for a model with no top.
    """

    architecture: Architecture
    layers: dict[str, Any]
    block_ends: tuple[Any, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    size: tuple[int | None, int | None]
    channels: int
    classes: int | None


# Names of the layers without prefix; the group of a block's layer is its block and its part.
LAYER = re.compile(
    r"preprocessing|stem_(?:conv|bn|activation)|top_(?:conv|bn|activation|dropout)|(?:avg|max)_pool|predictions"
    r"|block(\d+[a-z])_((?:expand_|project_)?(?:conv|bn|activation)|dwconv|bn|activation"
    r"|se_(?:squeeze|reduce|expand|excite)|routing(?:_pool)?|drop|add)"
)


def read(model: keras.Model, prefix: str | None = None) -> Reading:
    """Reads the architecture of a model off its layers: the inverse of building it, also after saving and loading.

    Args:
        model: A functional model that was built by this package, or loaded from its file. Layers around it are left
            out.
        prefix: String in front of the layers' names. Defaults to None: found, if there is only one.

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
    prefixes = [name.removesuffix("preprocessing") for name in found if name.endswith("preprocessing")]
    prefixes = [start for start in prefixes if {f"{start}stem_conv", f"{start}top_conv"} <= found.keys()]
    if prefix is None and len(prefixes) == 1:
        prefix = prefixes[0]
    if prefix not in prefixes:
        raise ValueError(
            "Expected a model of this package, or one whose own layers hold one EfficientNet. Received: "
            f"{getattr(model, 'name', model)!r}, which holds {len(prefixes)}. Where it is a layer of the model, pass "
            "that layer: model.get_layer(name)"
        )
    named = {name.removeprefix(prefix): layer for name, layer in found.items() if name.startswith(prefix)}
    return _read(model, {name: layer for name, layer in named.items() if LAYER.fullmatch(name)})


def find(model: keras.Model) -> tuple[keras.Model, Reading]:
    """Finds the EfficientNet in a model: the model itself, or a layer of it, as in `Sequential([body, ...])`.

    Args:
        model: A model.

    Returns:
        Tuple of the model that holds the network's layers, and its `Reading`.

    Raises:
        ValueError: If there is none, or several.
    """
    try:
        return model, read(model)
    except ValueError:
        found = []
        for layer in getattr(model, "layers", []):
            if isinstance(layer, keras.Model):
                with suppress(ValueError):
                    found.append(find(layer))
        if len(found) != 1:
            raise
        return found[0]


def _read(model: keras.Model, named: dict) -> Reading:
    groups: dict[str, dict] = {}
    for name, layer in named.items():
        match = LAYER.fullmatch(name)
        if match and match[1]:
            groups.setdefault(match[1], {})[match[2]] = layer
    stem_conv, top_conv, rescaling = named["stem_conv"], named["top_conv"], named["preprocessing"]
    blocks, arriving = [], stem_conv.filters
    for name, group in groups.items():
        spatial = group.get("dwconv") or group["expand_conv"]
        expand, reduce = group.get("expand_conv"), group.get("se_reduce")
        filters_out = group["project_conv"].filters
        blocks.append(
            Block(
                name=name,
                operator="mbconv" if "dwconv" in group else "fused",
                kernel_size=spatial.kernel_size[0],
                strides=spatial.strides[0],
                filters_in=arriving,
                expand_filters=expand.filters if expand else 0,
                se_filters=reduce.filters if reduce else 0,
                filters_out=filters_out,
                residual="add" in group,
                num_experts=group["routing"].units if "routing" in group else 0,
            )
        )
        arriving = filters_out
    # The last residual block has the largest rate, so the least rounding on the way back to the base rate.
    drops = [(group["drop"].rate, index) for index, group in enumerate(groups.values()) if "drop" in group]
    rate, index = drops[-1] if drops else (0.0, 1)
    shape = rescaling.output.shape
    channels_last = stem_conv.data_format == "channels_last"
    height, width, channels = shape[1:] if channels_last else (*shape[2:], shape[1])
    dropout, predictions = named.get("top_dropout"), named.get("predictions")
    return Reading(
        architecture=Architecture(
            name=model.name,
            stem_filters=stem_conv.filters,
            blocks=tuple(blocks),
            head_filters=top_conv.filters,
            activation=named["stem_activation"].get_config()["activation"],
            dropout_rate=dropout.rate if dropout else 0.0,
            drop_connect_rate=round(rate * len(blocks) / index, 12),
        ),
        layers=named,
        block_ends=tuple(list(group.values())[-1] for group in groups.values()),
        scale=tuple(np.ravel(rescaling.scale).tolist()),
        offset=tuple(np.ravel(rescaling.offset).tolist()),
        size=(height, width),
        channels=channels,
        classes=predictions.units if predictions else None,
    )

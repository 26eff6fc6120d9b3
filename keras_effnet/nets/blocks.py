"""Functional builders: stem, blocks, head and classifier."""

from dataclasses import dataclass

import keras
from keras import layers

from keras_effnet.nets import initializers
from keras_effnet.nets.architecture import Block
from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D


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

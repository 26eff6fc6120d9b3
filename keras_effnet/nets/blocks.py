"""Functional builders of stem, blocks, head and classifier."""

from dataclasses import dataclass, replace

import keras
from keras import layers

from keras_effnet.nets import initializers
from keras_effnet.nets.architecture import Block
from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D


@dataclass(frozen=True)
class Style:
    """Settings shared by all layers of a net, and builders of single layers.

    Args:
        activation: Name of a Keras activation.
        bn_momentum: Float, share of the old moving statistics that a training step keeps.
        bn_epsilon: Float, added to the variance.
        data_format: `"channels_last"` or `"channels_first"`.
        dtype: A `keras.DTypePolicy`.
        padding: See `Architecture`.
        depthwise_name: See `Architecture`.
        prefix: String in front of every layer's name.
    """

    activation: str
    bn_momentum: float
    bn_epsilon: float
    data_format: str
    dtype: keras.DTypePolicy
    padding: str = "same"
    depthwise_name: str = "dwconv"
    prefix: str = ""

    @property
    def float_dtype(self) -> str:
        """Dtype of the input's arithmetic and the classifier, where low precision costs accuracy and saves nothing."""
        return self.dtype.variable_dtype

    def apply(self, layer_class, name: str, inputs, *args, dtype=None, **kwargs):
        """Creates a layer in this style and applies it.

        Args:
            layer_class: Class of the layer.
            name: String, name of the layer without the prefix.
            inputs: Keras tensor or list of them.
            *args: Arguments of the layer.
            dtype: Dtype or dtype policy. Defaults to the style's.
            **kwargs: Arguments of the layer.

        Returns:
            The layer's output.
        """
        layer = layer_class(*args, name=self.prefix + name, dtype=dtype or self.dtype, **kwargs)
        return initializers.apply(layer, inputs)

    def conv(self, x, filters: int, kernel_size: int, name: str, strides: int = 1, routing=None, **kwargs):
        """Applies a convolution, by default without bias.

        Args:
            x: Keras tensor.
            filters: Integer, output channels.
            kernel_size: Integer.
            name: String, name of the layer without the prefix.
            strides: Integer. Defaults to 1.
            routing: Keras tensor of routing weights, for a convolution that mixes experts. Defaults to None.
            **kwargs: Further arguments of the layer.

        Returns:
            Keras tensor.
        """
        kwargs = {"kernel_initializer": initializers.kernel(), **kwargs}
        return self._convolve(
            (layers.Conv2D, CondConv2D), name, x, routing, (filters, kernel_size), strides=strides, **kwargs
        )

    def depthwise(self, x, kernel_size: int, name: str, strides: int = 1, routing=None):
        """Applies a depthwise convolution without bias.

        Args:
            x: Keras tensor.
            kernel_size: Integer.
            name: String, name of the layer without the prefix.
            strides: Integer. Defaults to 1.
            routing: Keras tensor of routing weights, for a convolution that mixes experts. Defaults to None.

        Returns:
            Keras tensor.
        """
        kwargs = {"depthwise_initializer": initializers.kernel()}
        return self._convolve(
            (layers.DepthwiseConv2D, DepthwiseCondConv2D), name, x, routing, (kernel_size,), strides=strides, **kwargs
        )

    def _convolve(self, layer_classes, name: str, x, routing, args: tuple[int, ...], **kwargs):
        kwargs = {"use_bias": False, "padding": "same", "data_format": self.data_format, **kwargs}
        plain, mixed = layer_classes
        side = args[-1]
        # Without strides both paddings are equal. Even kernels are padded as in TensorFlow by timm too.
        if self.padding == "symmetric" and kwargs["strides"] > 1 and side % 2:
            x = self.apply(layers.ZeroPadding2D, f"{name}_pad", x, side // 2, data_format=self.data_format)
            kwargs["padding"] = "valid"
        if routing is None:
            return self.apply(plain, name, x, *args, **kwargs)
        return self.apply(mixed, name, [x, routing], *args, num_experts=routing.shape[-1], **kwargs)

    def norm(self, x, name: str, activation_name: str | None = None):
        """Applies batch normalization and, if its layer is given a name, the net's activation.

        Args:
            x: Keras tensor.
            name: String, name of the batch normalization without the prefix.
            activation_name: String, name of the activation's layer without the prefix. Defaults to None: no activation.

        Returns:
            Keras tensor.
        """
        axis = -1 if self.data_format == "channels_last" else 1
        x = self.apply(
            layers.BatchNormalization, name, x, axis=axis, momentum=self.bn_momentum, epsilon=self.bn_epsilon
        )
        return x if activation_name is None else self.apply(layers.Activation, activation_name, x, self.activation)

    def pool(self, x, kind: str, keepdims: bool = False, name: str | None = None):
        """Applies a global pooling.

        Args:
            x: Keras tensor.
            kind: `"avg"` or `"max"`.
            keepdims: Boolean, whether height and width stay, with size 1. Defaults to False.
            name: String, name of the layer without the prefix. Defaults to `"avg_pool"` or `"max_pool"`.

        Returns:
            Keras tensor.
        """
        layer_class = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[kind]
        return self.apply(layer_class, name or f"{kind}_pool", x, data_format=self.data_format, keepdims=keepdims)


def stem(style: Style, x, filters: int, scale, offset):
    """Applies preprocessing, `x * scale + offset`, and the first convolution.

    Args:
        style: A `Style`.
        x: Keras tensor of pixels, (batch, height, width, channels) or (batch, channels, height, width).
        filters: Integer, output channels.
        scale: List of floats, one per channel of `x`.
        offset: List of floats, one per channel of `x`.

    Returns:
        Keras tensor of half the height and width, rounded up.
    """
    # Nested to rank 3, because Keras places a flat list by its global data format.
    nest = (
        (lambda row: [[list(row)]])
        if style.data_format == "channels_last"
        else (lambda row: [[[value]] for value in row])
    )
    x = style.apply(layers.Rescaling, "preprocessing", x, nest(scale), nest(offset), dtype=style.float_dtype)
    x = style.conv(x, filters, 3, "stem_conv", strides=2)
    return style.norm(x, "stem_bn", "stem_activation")


def mbconv(style: Style, x, block: Block, name: str):
    """Applies expansion, depthwise convolution, squeeze-and-excite and projection.

    Args:
        style: A `Style`.
        x: Keras tensor of `block.filters_in` channels.
        block: A `Block`.
        name: String in front of the name of each layer.

    Returns:
        Keras tensor of `block.filters_out` channels.

    Reference:
        tensorflow/tpu efficientnet_model.py:306-396.
    """
    routing = _routing(style, x, block.num_experts, name) if block.num_experts else None
    if block.space_to_depth:
        x = style.conv(x, block.inner_filters, 2, f"{name}s2d_conv", strides=2)
        x = style.norm(x, f"{name}s2d_bn", f"{name}s2d_activation")
    if block.expand_filters:
        x = style.conv(x, block.expand_filters, 1, f"{name}expand_conv", routing=routing)
        x = style.norm(x, f"{name}expand_bn", f"{name}expand_activation")
    x = style.depthwise(x, block.kernel_size, name + style.depthwise_name, block.strides, routing=routing)
    x = style.norm(x, f"{name}bn", f"{name}activation")
    x = _excited(style, x, block, name)
    return _projected(style, x, block, name, routing=routing)


def _excited(style: Style, x, block: Block, name: str):
    """Applies squeeze-and-excite, if the block has it."""
    if not block.se_filters:
        return x
    if block.global_context:
        return style.apply(layers.Multiply, f"{name}se_excite", [x, _global_context(style, x, block, name)])
    gate = style.pool(x, "avg", keepdims=True, name=f"{name}se_squeeze")
    gate = style.conv(gate, block.se_filters, 1, f"{name}se_reduce", use_bias=True, activation=style.activation)
    gate = style.conv(gate, block.inner_filters, 1, f"{name}se_expand", use_bias=True, activation="sigmoid")
    return style.apply(layers.Multiply, f"{name}se_excite", [x, gate])


def _global_context(style: Style, x, block: Block, name: str):
    """Computes a gate from the sum of the pixels by learnt shares, in place of their mean, with layer normalization.

    Reference:
        Cao et al., arXiv 1904.11492, figure 4 (d); timm/layers/global_context.py 1.0.31.
    """
    last, filters = style.data_format == "channels_last", block.inner_filters
    # The shares in full precision: bfloat16 rounds their logarithms to 8 bits. Over both axes: Keras warns of a softmax
    # over one axis where a map has one pixel.
    exact = style.float_dtype
    share = style.conv(x, 1, 1, f"{name}se_share", use_bias=True, dtype=exact)
    share = style.apply(layers.Softmax, f"{name}se_share_softmax", share, axis=(1, 2) if last else (2, 3), dtype=exact)
    share = style.apply(layers.Reshape, f"{name}se_share_flat", share, (-1, 1) if last else (1, -1))
    pixels = style.apply(layers.Reshape, f"{name}se_flat", x, (-1, filters) if last else (filters, -1))
    gate = style.apply(layers.Dot, f"{name}se_context", [pixels, share], 1 if last else 2)
    # Of one pixel, whose channels are last: Keras 3.15 normalizes no others on PyTorch.
    gate = style.apply(layers.Reshape, f"{name}se_pixel", gate, (1, 1, filters))
    inner = replace(style, data_format="channels_last")
    gate = inner.conv(gate, block.se_filters, 1, f"{name}se_reduce", use_bias=True)
    gate = style.apply(layers.LayerNormalization, f"{name}se_norm", gate, epsilon=1e-6)
    gate = style.apply(layers.Activation, f"{name}se_activation", gate, style.activation)
    gate = inner.conv(gate, filters, 1, f"{name}se_expand", use_bias=True, activation="sigmoid")
    return style.apply(layers.Reshape, f"{name}se_gate", gate, (1, 1, filters) if last else (filters, 1, 1))


def _projected(style: Style, x, block: Block, name: str, kernel_size: int = 1, strides: int = 1, routing=None):
    """Applies the projection, and the activation if the block has one there."""
    x = style.conv(x, block.filters_out, kernel_size, f"{name}project_conv", strides, routing)
    return style.norm(x, f"{name}project_bn", f"{name}project_activation" if block.project_activation else None)


def _routing(style: Style, x, num_experts: int, name: str):
    """Computes the weights of a block's experts from its input.

    Reference:
        tensorflow/tpu efficientnet_model.py:204-209, :342-353.
    """
    x = style.pool(x, "avg", name=f"{name}routing_pool")
    return style.apply(layers.Dense, f"{name}routing", x, num_experts, activation="sigmoid")


def fused(style: Style, x, block: Block, name: str):
    """Applies one full convolution in place of expansion and depthwise convolution, squeeze-and-excite and projection.

    Args:
        style: A `Style`.
        x: Keras tensor of `block.filters_in` channels.
        block: A `Block`.
        name: String in front of the name of each layer.

    Returns:
        Keras tensor of `block.filters_out` channels.

    Reference:
        tensorflow/tpu efficientnet_model.py:399-469; google/automl efficientnetv2/effnetv2_model.py `FusedMBConvBlock`.
    """
    x = style.conv(x, block.expand_filters, block.kernel_size, f"{name}expand_conv", block.strides)
    x = style.norm(x, f"{name}expand_bn", f"{name}expand_activation")
    x = _excited(style, x, block, name)
    return _projected(style, x, block, name)


def conv(style: Style, x, block: Block, name: str):
    """Applies the projection alone, as one full convolution with the activation after it.

    Args:
        style: A `Style`.
        x: Keras tensor of `block.filters_in` channels.
        block: A `Block`.
        name: String in front of the name of each layer.

    Returns:
        Keras tensor of `block.filters_out` channels.

    Reference:
        google/automl efficientnetv2/effnetv2_model.py `FusedMBConvBlock`, with an expansion of 1.
    """
    return _projected(style, x, block, name, block.kernel_size, block.strides)


OPERATORS = {"mbconv": mbconv, "fused": fused, "conv": conv}


def body(style: Style, x, block: Block, drop_connect_rate: float):
    """Applies a block and its skip connection. In training, the block's part is dropped for some examples.

    Args:
        style: A `Style`.
        x: Keras tensor of `block.filters_in` channels.
        block: A `Block`.
        drop_connect_rate: Float, share of the examples for which the block is dropped.

    Returns:
        Keras tensor of `block.filters_out` channels.
    """
    name = f"block{block.name}_"
    inside = replace(style, activation=block.activation or style.activation)
    y = OPERATORS[block.operator](inside, x, block, name)
    if block.residual:
        y = style.apply(layers.Dropout, f"{name}drop", y, drop_connect_rate, noise_shape=(None, 1, 1, 1))
        # The short way first: Keras walks a graph from its end by recursion, which V2-XL would make too deep.
        y = style.apply(layers.Add, f"{name}add", [x, y])
    return y


def head(style: Style, x, filters: int):
    """Applies the last convolution.

    Args:
        style: A `Style`.
        x: Keras tensor.
        filters: Integer, output channels.

    Returns:
        Keras tensor of `filters` channels.
    """
    return style.norm(style.conv(x, filters, 1, "top_conv"), "top_bn", "top_activation")


def classifier(style: Style, x, classes: int, dropout_rate: float, activation):
    """Applies global average pooling, dropout and the dense layer.

    Args:
        style: A `Style`.
        x: Keras tensor.
        classes: Integer, outputs of the dense layer.
        dropout_rate: Float.
        activation: Activation of the dense layer.

    Returns:
        Keras tensor, (batch, classes).
    """
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

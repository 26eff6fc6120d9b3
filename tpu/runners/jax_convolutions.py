"""Convolutions that XLA compiles badly, rewritten with custom gradients.

Depthwise convolutions are sums of shifted images: on processors XLA's own take ten times as long to train
(docs/training.md). For one kernel per example, XLA's gradient of such a sum moves three times as much memory on a TPU.
CondConv of 1 x 1 is one convolution with all experts, since kernels per example also move three times as much memory
(docs/tpu.md).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D


@keras.saving.register_keras_serializable("keras_effnet")
class ShiftedDepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D`, computed as a sum of shifted images, one for each element of the kernel.

    Args:
        *args: See `keras.layers.DepthwiseConv2D`.
        **kwargs: See `keras.layers.DepthwiseConv2D`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.runners.jax_convolutions import ShiftedDepthwiseConv2D
    >>> ShiftedDepthwiseConv2D(3, strides=2, padding="same")(keras.ops.ones((1, 5, 5, 4))).shape  # doctest: +SKIP
    (1, 3, 3, 4)
    """

    def call(self, inputs):
        """Computes the convolution.

        Args:
            inputs: Tensor (batch, height, width, channels).

        Returns:
            Tensor (batch, height, width, channels).
        """
        plain = (
            self.depth_multiplier == 1
            and set(self.dilation_rate) == {1}
            and self.activation is keras.activations.linear
        )
        if not plain or self.data_format != "channels_last" or self.padding != "same":
            return super().call(inputs)
        outputs: Any = _convolved(inputs, self.kernel[:, :, :, 0], tuple(self.strides))
        return outputs + self.bias if self.use_bias else outputs


@keras.saving.register_keras_serializable("keras_effnet")
class ShiftedDepthwiseCondConv2D(DepthwiseCondConv2D):
    """`DepthwiseCondConv2D` with a custom gradient.

    Args:
        *args: See `keras_effnet.layers.DepthwiseCondConv2D`.
        **kwargs: See `keras_effnet.layers.DepthwiseCondConv2D`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.runners.jax_convolutions import ShiftedDepthwiseCondConv2D
    >>> layer = ShiftedDepthwiseCondConv2D(3, num_experts=4, padding="same")
    >>> layer([keras.ops.ones((2, 5, 5, 8)), keras.ops.ones((2, 4))]).shape  # doctest: +SKIP
    (2, 5, 5, 8)
    """

    def _convolve(self, x, routing):
        if self.depth_multiplier > 1 or set(self.dilation_rate) != {1} or self.padding != "same":
            return super()._convolve(x, routing)
        kernels = jnp.reshape(self._mixed(routing), (*self.kernel_size, -1, 1, 1, x.shape[-1]))
        return _convolved(x, kernels, tuple(self.strides))


@keras.saving.register_keras_serializable("keras_effnet")
class AllExpertsCondConv2D(CondConv2D):
    """`CondConv2D` that convolves with all experts at once if its kernel is 1 x 1.

    It multiplies the arithmetic by the number of experts, which a TPU can afford, and writes no kernel per example. The
    routing weights scale the inputs or the outputs, whichever have fewer channels.

    Args:
        *args: See `keras_effnet.layers.CondConv2D`.
        **kwargs: See `keras_effnet.layers.CondConv2D`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.runners.jax_convolutions import AllExpertsCondConv2D
    >>> layer = AllExpertsCondConv2D(24, 1, num_experts=4)
    >>> layer([keras.ops.ones((2, 5, 5, 8)), keras.ops.ones((2, 4))]).shape  # doctest: +SKIP
    (2, 5, 5, 24)
    """

    def _convolve(self, x, routing):
        if self.kernel_size != (1, 1) or self.strides != (1, 1):
            return super()._convolve(x, routing)
        experts = self.kernel.value[:, 0, 0].astype(x.dtype)
        if self.filters < x.shape[-1]:
            return _summed_experts(x, routing, experts)
        return pointwise(_repeated(x, routing), experts.reshape(-1, self.filters))


def pointwise(x, kernel):
    """Computes a 1 x 1 convolution.

    Args:
        x: Array (batch, height, width, channels).
        kernel: Array (channels, filters).

    Returns:
        Array (batch, height, width, filters).
    """
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", dimension_numbers=layout)


def _repeated(x, routing):
    """Repeats the channels for each expert, times its weight."""
    repeated = x[:, :, :, None] * routing[:, None, None, :, None]
    return repeated.reshape(*x.shape[:3], -1)


def wide(x):
    """Casts to float32, or keeps a wider type: sums need the precision.

    Args:
        x: Array.

    Returns:
        Array of the same shape.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def over_places(a, b):
    """Sums the products of all pairs of channels over all positions of all images.

    Args:
        a: Array (batch, height, width, channels).
        b: Array (batch, height, width, other channels).

    Returns:
        Array (channels, other channels), in float32 or wider.
    """
    places, precision = (0, 1, 2), jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, ((places, places), ((), ())), preferred_element_type=precision)


def _by_expert(outputs, routing):
    """Returns each expert's outputs with its weights, as slices, which need no change of layout."""
    parts = jnp.split(outputs, routing.shape[1], axis=-1)
    return [(wide(part), wide(routing[:, n, None, None, None])) for n, part in enumerate(parts)]


@jax.custom_vjp
def _summed_experts(x, routing, experts):
    return _sum_experts(x, routing, experts)[0]


def _sum_experts(x, routing, experts):
    kernel = experts.transpose(1, 0, 2).reshape(x.shape[-1], -1)
    # The barriers keep these values in the layer's precision. The compiler would store them in float32.
    outputs = jax.lax.optimization_barrier(pointwise(x, kernel))
    y = functools.reduce(jnp.add, (part * weight for part, weight in _by_expert(outputs, routing)))
    return y.astype(x.dtype), (x, routing, experts, outputs)


def _sum_experts_back(kept, dy):
    x, routing, experts, outputs = kept
    dy = jax.lax.optimization_barrier(dy)
    sums = [jnp.sum(part * wide(dy), (1, 2, 3)) for part, _ in _by_expert(outputs, routing)]
    repeated = jax.lax.optimization_barrier(_repeated(dy, routing))
    dx = pointwise(repeated, experts.transpose(0, 2, 1).reshape(-1, x.shape[-1]))
    d_experts = over_places(x, repeated).reshape(x.shape[-1], len(experts), -1).transpose(1, 0, 2)
    return dx, jnp.stack(sums, 1).astype(routing.dtype), d_experts.astype(experts.dtype)


_summed_experts.defvjp(_sum_experts, _sum_experts_back)


def _sides(size: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """Returns the output size along an axis, and the padding of "same" before and after."""
    outputs = -(-size // stride)
    padding = max((outputs - 1) * stride + kernel - size, 0)
    return outputs, padding // 2, padding - padding // 2


def _shifts(padded, kernel, strides, sizes):
    """Yields the row and column of each element of the kernel, and the shifted image that it multiplies."""
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            begin = (row, column)
            ends = (b + (n - 1) * s + 1 for b, n, s in zip(begin, sizes, strides, strict=True))
            rows, columns = (slice(b, e, s) for b, e, s in zip(begin, ends, strides, strict=True))
            yield row, column, padded[:, rows, columns]


def _geometry(x, kernel, strides):
    sides = [_sides(*one) for one in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)]
    return [n for n, _, _ in sides], [(0, 0), *((before, behind) for _, before, behind in sides), (0, 0)]


def _summed(shifts, kernel):
    return functools.reduce(jnp.add, (wide(part) * wide(kernel[row, column]) for row, column, part in shifts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(x, kernel, strides):
    """Depthwise convolution with a kernel (height, width, channels), or (height, width, batch, 1, 1, channels)."""
    sizes, padding = _geometry(x, kernel, strides)
    shifts = _shifts(jnp.pad(x, padding), kernel.shape, strides, sizes)
    return _summed(shifts, kernel).astype(x.dtype)


def _forward(x, kernel, strides):
    return _convolved(x, kernel, strides), (x, kernel)


def _backward(strides, kept, dy):
    x, kernel = kept
    sizes, padding = _geometry(x, kernel, strides)
    shifts = _shifts(jnp.pad(x, padding), kernel.shape, strides, sizes)
    axes = (0, 1, 2) if kernel.ndim == 3 else (1, 2)
    sums = [jnp.sum(wide(part) * wide(dy), axes).astype(kernel.dtype) for _, _, part in shifts]
    # The transposed convolution: the flipped kernel over `dy`, with zeros between its elements.
    around = [(0, 0, 0)]
    for axis, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        before = kernel.shape[axis] - 1 - padding[axis + 1][0]
        spread = (size - 1) * stride + 1
        around.append((before, x.shape[axis + 1] + kernel.shape[axis] - 1 - before - spread, stride - 1))
    apart = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [*around, (0, 0, 0)])
    dx = _summed(_shifts(apart, kernel.shape, (1, 1), x.shape[1:3]), kernel[::-1, ::-1])
    return dx.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape)


_convolved.defvjp(_forward, _backward)

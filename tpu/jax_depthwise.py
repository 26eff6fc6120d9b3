"""Depthwise convolutions as sums of shifted images, with gradients that are such sums too.

On processors XLA's own takes ten times as long to train (docs/training.md). Where each example has a kernel of its own,
XLA's gradient of such a sum moves three times as much memory on a TPU (benchmarks/tpu_traffic.md).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_effnet.layers import DepthwiseCondConv2D


@keras.saving.register_keras_serializable("keras_effnet")
class ShiftedDepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` as a sum of shifted images, one for each element of the kernel.

    Args:
        *args: See `keras.layers.DepthwiseConv2D`.
        **kwargs: See `keras.layers.DepthwiseConv2D`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.jax_depthwise import ShiftedDepthwiseConv2D
    >>> ShiftedDepthwiseConv2D(3, strides=2, padding="same")(keras.ops.ones((1, 5, 5, 4))).shape  # doctest: +SKIP
    (1, 3, 3, 4)
    """

    def call(self, inputs):
        """Convolves.

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
    """`DepthwiseCondConv2D` with a gradient of its own.

    Args:
        *args: See `keras_effnet.layers.DepthwiseCondConv2D`.
        **kwargs: See `keras_effnet.layers.DepthwiseCondConv2D`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.jax_depthwise import ShiftedDepthwiseCondConv2D
    >>> layer = ShiftedDepthwiseCondConv2D(3, num_experts=4, padding="same")
    >>> layer([keras.ops.ones((2, 5, 5, 8)), keras.ops.ones((2, 4))]).shape  # doctest: +SKIP
    (2, 5, 5, 8)
    """

    def _convolve(self, x, routing):
        if self.depth_multiplier > 1 or set(self.dilation_rate) != {1} or self.padding != "same":
            return super()._convolve(x, routing)
        kernels = jnp.reshape(self._mixed(routing), (*self.kernel_size, -1, 1, 1, x.shape[-1]))
        return _convolved(x, kernels, tuple(self.strides))


def _sides(size: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """Outputs along an axis, and what "same" puts before and behind."""
    outputs = -(-size // stride)
    padding = max((outputs - 1) * stride + kernel - size, 0)
    return outputs, padding // 2, padding - padding // 2


def _shifts(padded, kernel, strides, sizes):
    """What each element of the kernel is multiplied by."""
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
    """Not in a low precision."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    products = (part.astype(wide) * kernel[row, column].astype(wide) for row, column, part in shifts)
    return functools.reduce(jnp.add, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(x, kernel, strides):
    """Kernels are (height, width, channels), or (height, width, batch, 1, 1, channels)."""
    sizes, padding = _geometry(x, kernel, strides)
    shifts = _shifts(jnp.pad(x, padding), kernel.shape, strides, sizes)
    return _summed(shifts, kernel).astype(x.dtype)


def _forward(x, kernel, strides):
    return _convolved(x, kernel, strides), (x, kernel)


def _backward(strides, kept, dy):
    x, kernel = kept
    sizes, padding = _geometry(x, kernel, strides)
    shifts = _shifts(jnp.pad(x, padding), kernel.shape, strides, sizes)
    wide, axes = jnp.promote_types(x.dtype, jnp.float32), (0, 1, 2) if kernel.ndim == 3 else (1, 2)
    sums = [jnp.sum(part.astype(wide) * dy.astype(wide), axes).astype(kernel.dtype) for _, _, part in shifts]
    # The same the other way round: with the kernel turned, over `dy` with zeros in between.
    around = [(0, 0, 0)]
    for axis, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        before = kernel.shape[axis] - 1 - padding[axis + 1][0]
        spread = (size - 1) * stride + 1
        around.append((before, x.shape[axis + 1] + kernel.shape[axis] - 1 - before - spread, stride - 1))
    apart = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [*around, (0, 0, 0)])
    dx = _summed(_shifts(apart, kernel.shape, (1, 1), x.shape[1:3]), kernel[::-1, ::-1])
    return dx.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape)


_convolved.defvjp(_forward, _backward)

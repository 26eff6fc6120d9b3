"""Depthwise convolution for processors, where XLA's own takes ten times as long to train (docs/training.md)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import keras


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(x, kernel, strides):
    sizes, padding = _geometry(x, kernel, strides)
    shifts = _shifts(jnp.pad(x, padding), kernel.shape, strides, sizes)
    return functools.reduce(jnp.add, (part * kernel[row, column] for row, column, part in shifts))


def _forward(x, kernel, strides):
    return _convolved(x, kernel, strides), (x, kernel)


def _backward(strides, kept, dy):
    x, kernel = kept
    sizes, padding = _geometry(x, kernel, strides)
    shifts = _shifts(jnp.pad(x, padding), kernel.shape, strides, sizes)
    sums = [jnp.sum(part * dy, (0, 1, 2), dtype="float32").astype(kernel.dtype) for _, _, part in shifts]
    # The same the other way round: with the kernel turned, over `dy` with zeros in between.
    around = [(0, 0, 0)]
    for axis, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        before = kernel.shape[axis] - 1 - padding[axis + 1][0]
        spread = (size - 1) * stride + 1
        around.append((before, x.shape[axis + 1] + kernel.shape[axis] - 1 - before - spread, stride - 1))
    wide = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [*around, (0, 0, 0)])
    turned = kernel[::-1, ::-1]
    back = _shifts(wide, kernel.shape, (1, 1), x.shape[1:3])
    dx = functools.reduce(jnp.add, (part * turned[row, column] for row, column, part in back))
    return dx, jnp.stack(sums).reshape(kernel.shape)


_convolved.defvjp(_forward, _backward)

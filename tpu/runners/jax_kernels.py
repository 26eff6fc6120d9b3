"""Kernels for TPUs, in Pallas, of what their compiler divides into passes over the same images."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # of a register

_CHANNELS, _IMAGES = 16, 128  # that one step of a kernel's grid takes: they fill registers, also in bfloat16

_VMEM = 12 * 2**20  # bytes that the blocks of a step may take

_LIMIT = 16 * 2**20  # with what the compiler puts beside them: v2 to v4 have no more

_COLUMNS = 32  # that are computed at a time: more do not stay in registers


class Inner(NamedTuple):
    """What a depthwise convolution reads: `activation(x * scale + offset)`, and how x is normalised; (channels,)."""

    scale: Any
    offset: Any
    mean: Any
    root: Any


class Outer(NamedTuple):
    """The gradient of what it gives, y: `(dz * share + spread) * slope * scale + y * k2 + k1`.

    `slope` is the activation's at `y * gain + offset`. Share and spread are (images, channels), the rest (channels,).
    """

    gain: Any
    offset: Any
    scale: Any
    k2: Any
    k1: Any
    share: Any
    spread: Any


class _Geometry(NamedTuple):
    kernel: int
    stride: int
    height: int  # of y
    width: int
    before: int  # what "same" puts before x
    rows: int  # of y, in a step

    @property
    def tiles(self) -> int:
        return self.height // self.rows

    @property
    def lag(self) -> int:
        """A tile of x needs the next one of y."""
        return int(self.tiles > 1)

    @property
    def left(self) -> int:
        """Columns of zeros before y's gradient."""
        return (self.kernel - 1 - self.before) // self.stride

    @property
    def right(self) -> int:
        """Columns behind it."""
        return (self.before + self.stride - 1) // self.stride

    @property
    def around(self) -> int:
        return self.left + self.width + self.right

    @property
    def columns(self) -> int:
        """Of y, that are computed at a time."""
        return max(n for n in range(1, _COLUMNS + 1) if not self.width % n)

    @property
    def ring(self) -> int:
        """Rows of y's gradient that are kept: a tile, and those before and behind."""
        return self.rows * (1 + 2 * self.lag)

    def bytes(self, itemsize: int) -> int:
        """What a step takes: two of each block, as the next one comes meanwhile."""
        images = 4 * self.rows * self.width * (self.stride**2 + 1) * itemsize
        return (images + self.ring * self.around * 4) * _CHANNELS * _IMAGES

    def taps(self, row: int, column: int):
        """For a place of x, by what it is more than a multiple of the stride: which element of the kernel takes it to
        which place of y."""
        for i in range(self.kernel):
            for j in range(self.kernel):
                down, across = row + self.before - i, column + self.before - j
                if not down % self.stride and not across % self.stride:
                    yield i * self.kernel + j, down // self.stride, across // self.stride


def fits(x, kernel, strides) -> bool:
    """Whether `depthwise_gradients()` takes them.

    Args:
        x: Array (images, height, width, channels), or its shape and dtype.
        kernel: Array (height, width, channels), or the same.
        strides: Pair of integers.

    Returns:
        Boolean.

    Example:

    >>> import jax
    >>> from keras_effnet.tpu.runners.jax_kernels import fits
    >>> images = jax.ShapeDtypeStruct((128, 14, 14, 672), "bfloat16")
    >>> fits(images, jax.ShapeDtypeStruct((5, 5, 672), "bfloat16"), (2, 2))
    True
    """
    images, height, width, channels = x.shape
    if height % strides[0] or width % strides[0] or channels % _CHANNELS or images % _IMAGES:
        return False
    if strides[0] != strides[1] or kernel.shape[0] != kernel.shape[1]:
        return False
    return _geometry(x, kernel.shape[0], strides[0]).bytes(x.dtype.itemsize) <= _VMEM


def _geometry(x, kernel: int, stride: int) -> _Geometry:
    height, width = x.shape[1] // stride, x.shape[2] // stride
    before = max((height - 1) * stride + kernel - x.shape[1], 0) // 2
    every = [_Geometry(kernel, stride, height, width, before, n) for n in range(1, height + 1) if not height % n]
    # As high as the kernel reaches, so that only tiles next to each other meet.
    every = [one for one in every if one.rows >= max(one.left, one.right) or one.tiles == 1]
    return max((one for one in every if one.bytes(x.dtype.itemsize) <= _VMEM), default=every[0])


def depthwise_gradients(
    x,
    y,
    dz,
    kernel,
    inner: Inner,
    outer: Outer,
    activations: tuple[Callable, Callable],
    interpret: bool = False,
):
    """All gradients of a depthwise convolution between two normalisations, in one pass over the images.

    The compiler makes two passes over what the convolution reads and two over what it gives, and writes the gradient in
    between. Images are in the lanes here, as the compiler has them.

    Args:
        x: Array (images, height, width, channels), before normalisation and activation.
        y: Array (images, new height, new width, channels), what the convolution gave.
        dz: Array like y.
        kernel: Array (height, width, channels).
        inner: `Inner`.
        outer: `Outer`.
        activations: Pair of functions, before and behind the convolution.
        interpret: Boolean, whether JAX interprets the kernel, where there is no TPU. Defaults to False.

    Returns:
        The gradient of the first activation's input, like x; that of the kernel, in float32; and the sums over all
        places of the first, and of its product with the normalised x.

    Reference:
        benchmarks/tpu_traffic.md.
    """
    side, channels = kernel.shape[0], kernel.shape[2]
    at = _geometry(x, side, x.shape[1] // y.shape[1])
    x, y, dz = (jnp.transpose(images, (1, 2, 3, 0)) for images in (x, y, dz))
    lanes = min(x.shape[-1], _IMAGES)
    constants = jnp.stack([*inner, *outer[:5]], 1).astype(jnp.float32)
    taps = kernel.reshape(-1, channels).T.astype(jnp.float32)
    # Rows and columns apart by what they are more than a multiple of the stride.
    apart = x.reshape(x.shape[0], at.width, at.stride, *x.shape[2:])

    def block(rows, *others, tile):
        return pl.BlockSpec((rows, *others, _CHANNELS, lanes), lambda c, n, t: (tile(t), *(0 for _ in others), c, n))

    late = block(at.rows * at.stride, at.width, at.stride, tile=lambda t: jnp.maximum(t - at.lag, 0))
    soon = block(at.rows, at.width, tile=lambda t: jnp.minimum(t, at.tiles - 1))
    per_image = pl.BlockSpec((_CHANNELS, lanes), lambda c, n, t: (c, n))
    per_channel = [pl.BlockSpec((_CHANNELS, of.shape[1]), lambda c, n, t: (c, 0)) for of in (constants, taps)]
    count = side * side + 2
    sums = (channels // _CHANNELS, x.shape[-1] // lanes, count, _LANES)
    du, sums = pl.pallas_call(
        functools.partial(_kernel, at, activations),
        grid=(*sums[:2], at.tiles + at.lag),
        in_specs=[*per_channel, per_image, per_image, late, soon, soon],
        out_specs=[late, pl.BlockSpec((1, 1, count, _LANES), lambda c, n, t: (c, n, 0, 0))],
        out_shape=[jax.ShapeDtypeStruct(apart.shape, x.dtype), jax.ShapeDtypeStruct(sums, jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32)
            for shape in (
                (at.ring, at.around, _CHANNELS, lanes),
                (count, _CHANNELS, lanes),
                (count - 2, _CHANNELS, lanes),
            )
        ],
        # Tiles follow each other; the two cores of a v4 or a v5p may take different channels.
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_LIMIT, dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(constants, taps, outer.share.T, outer.spread.T, apart, y, dz)
    totals = sums[..., :_CHANNELS].sum(1).transpose(1, 0, 2).reshape(count, channels)
    return du.reshape(x.shape).transpose(3, 0, 1, 2), totals[:-2].reshape(kernel.shape), totals[-2], totals[-1]


def _kernel(at, activations, constants, taps, share, spread, x, y, dz, du, sums, ring, total, tap):
    """A tile: y's gradient of the next one, then everything of x. Tiles of the same images and channels follow on."""
    step = pl.program_id(2)
    lanes = share.shape[-1]
    wide = jnp.float32

    def constant(of, n):
        return jnp.broadcast_to(of[:, n : n + 1], (_CHANNELS, lanes))

    @pl.when(step == 0)
    def _():
        for scratch in (ring, total):
            scratch[...] = jnp.zeros(scratch.shape, wide)
        for n in range(at.kernel**2):
            tap[n] = constant(taps, n)

    @pl.when(step < at.tiles)
    def _():
        gain, offset, scale, k2, k1 = (constant(constants, 4 + n) for n in range(5))
        shares, spreads = share[...].astype(wide), spread[...].astype(wide)

        def part(n, begin):
            columns = pl.ds(begin, at.columns)
            outputs = y[n, columns].astype(wide)
            u = outputs * gain + offset
            _, back = jax.vjp(activations[1], u)
            (slope,) = back(jnp.ones_like(u))
            gradient = (dz[n, columns].astype(wide) * shares + spreads) * slope * scale + outputs * k2 + k1
            ring[(step * at.rows + n) % at.ring, pl.ds(at.left + begin, at.columns)] = gradient

        _for_each_part(at, part)

    @pl.when(step >= at.lag)
    def _():
        scale, offset, mean, root = (constant(constants, n) for n in range(4))
        first = (step - at.lag) * at.rows

        def place(n, begin, row, column):
            inputs = x[n * at.stride + row, pl.ds(begin, at.columns), column].astype(wide)
            a, back = jax.vjp(activations[0], inputs * scale + offset)
            da = jnp.zeros_like(a)
            for element, down, across in at.taps(row, column):
                line = first + n + down
                inside = jnp.logical_and(line >= 0, line < at.height).astype(wide)
                columns = pl.ds(at.left + across + begin, at.columns)
                gradient = ring[(line + at.ring) % at.ring, columns] * inside
                da += gradient * tap[element]
                total[element] += jnp.sum(a * gradient, 0)
            (here,) = back(da)
            total[at.kernel**2] += jnp.sum(here, 0)
            total[at.kernel**2 + 1] += jnp.sum(here * (inputs - mean) * root, 0)
            du[n * at.stride + row, pl.ds(begin, at.columns), column] = here.astype(du.dtype)

        def part(n, begin):
            for row in range(at.stride):
                for column in range(at.stride):
                    place(n, begin, row, column)

        _for_each_part(at, part)

    @pl.when(step == at.tiles - 1 + at.lag)
    def _():
        # Channels from a register's rows to its lanes, by a diagonal: older TPUs have no other way.
        shape = (_CHANNELS, _LANES)
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        diagonal = (rows == columns).astype(wide)
        for n in range(at.kernel**2 + 2):
            sums[0, 0, n : n + 1] = jnp.sum(jnp.sum(total[n], -1, keepdims=True) * diagonal, 0, keepdims=True)


def _for_each_part(at: _Geometry, part: Callable) -> None:
    """Calls it with each row of a tile, and where each part of its columns begins."""

    def row(n, carry):
        def columns(m, carry):
            part(n, m * at.columns)
            return carry

        return jax.lax.fori_loop(0, at.width // at.columns, columns, carry)

    jax.lax.fori_loop(0, at.rows, row, 0)

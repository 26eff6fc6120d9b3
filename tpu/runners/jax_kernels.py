"""A Pallas kernel for TPUs that computes in one pass what the compiler splits into several."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # of a register

_CHANNELS, _IMAGES = 16, 128  # per step of a kernel's grid: they fill registers, also in bfloat16

_VMEM = 12 * 2**20  # bytes that the blocks of a step may take

_LIMIT = 16 * 2**20  # bytes with what the compiler adds: v2 to v4 have no more

_COLUMNS = 32  # computed at a time: more do not stay in registers


class Inner(NamedTuple):
    """The input of a depthwise convolution, `activation(x * scale + offset)`, and the statistics that normalize x.

    All are arrays (channels,).
    """

    scale: Any
    offset: Any
    mean: Any
    root: Any


class Outer(NamedTuple):
    """The gradient of the convolution's output y: `(dz * share + spread) * slope * scale + y * k2 + k1`.

    `slope` is that of the activation at `y * gain + offset`. Share and spread are (images, channels), the others
    (channels,).
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
    before: int  # padding of "same" before x
    rows: int  # of y, per step

    @property
    def tiles(self) -> int:
        return self.height // self.rows

    @property
    def lag(self) -> int:
        """Steps between a tile of y and the same tile of x, which also needs the next tile of y."""
        return int(self.tiles > 1)

    @property
    def left(self) -> int:
        """Columns of zeros before y's gradient."""
        return (self.kernel - 1 - self.before) // self.stride

    @property
    def right(self) -> int:
        """Columns of zeros after it."""
        return (self.before + self.stride - 1) // self.stride

    @property
    def around(self) -> int:
        return self.left + self.width + self.right

    @property
    def columns(self) -> int:
        """Columns of y that are computed at a time."""
        return max(n for n in range(1, _COLUMNS + 1) if not self.width % n)

    @property
    def ring(self) -> int:
        """Rows of y's gradient that are kept: a tile, the one before and the one after."""
        return self.rows * (1 + 2 * self.lag)

    def bytes(self, itemsize: int) -> int:
        """Memory of a step, with two of each block, because the next one is loaded meanwhile."""
        images = 4 * self.rows * self.width * (self.stride**2 + 1) * itemsize
        return (images + self.ring * self.around * 4) * _CHANNELS * _IMAGES

    def taps(self, row: int, column: int):
        """Yields the kernel elements that read a position of x (modulo the stride), each with its position in y."""
        for i in range(self.kernel):
            for j in range(self.kernel):
                down, across = row + self.before - i, column + self.before - j
                if not down % self.stride and not across % self.stride:
                    yield i * self.kernel + j, down // self.stride, across // self.stride


def fits(x, kernel, strides) -> bool:
    """Returns whether `depthwise_gradients()` supports a convolution.

    Args:
        x: Array (images, height, width, channels), or its shape and dtype.
        kernel: Array (height, width, channels), or its shape and dtype.
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
    # At least as high as the kernel reaches, so that a tile only depends on its neighbors.
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
    """Computes all gradients of a depthwise convolution between two normalizations, in one pass over the images.

    The compiler makes two passes over the convolution's input and two over its output, and writes the gradient in
    between. Here images are in the lanes, as in the compiler's layout.

    Args:
        x: Array (images, height, width, channels), the input before normalization and activation.
        y: Array (images, new height, new width, channels), the output of the convolution.
        dz: Array like y.
        kernel: Array (height, width, channels).
        inner: `Inner`.
        outer: `Outer`.
        activations: Pair of functions, before and after the convolution.
        interpret: Boolean, whether JAX interprets the kernel, for machines without a TPU. Defaults to False.

    Returns:
        Tuple of the gradient of the first activation's input, like x; the gradient of the kernel, in float32; and the
        sums over all positions of the first, and of its product with the normalized x.

    Reference:
        docs/tpu.md.
    """
    side, channels = kernel.shape[0], kernel.shape[2]
    at = _geometry(x, side, x.shape[1] // y.shape[1])
    x, y, dz = (jnp.transpose(images, (1, 2, 3, 0)) for images in (x, y, dz))
    lanes = min(x.shape[-1], _IMAGES)
    constants = jnp.stack([*inner, *outer[:5]], 1).astype(jnp.float32)
    taps = kernel.reshape(-1, channels).T.astype(jnp.float32)
    # Columns are split by their remainder modulo the stride.
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
        # Tiles are sequential. The two cores of a v4 or a v5p may take different channels.
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_LIMIT, dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(constants, taps, outer.share.T, outer.spread.T, apart, y, dz)
    totals = sums[..., :_CHANNELS].sum(1).transpose(1, 0, 2).reshape(count, channels)
    return du.reshape(x.shape).transpose(3, 0, 1, 2), totals[:-2].reshape(kernel.shape), totals[-2], totals[-1]


def _kernel(at, activations, constants, taps, share, spread, x, y, dz, du, sums, ring, total, tap):
    """A step of the grid: y's gradient for one tile, then all gradients of x for the tile before it.

    The steps over the tiles of the same images and channels are consecutive.
    """
    step = pl.program_id(2)
    inner, outer = activations
    pl.when(step == 0)(functools.partial(_clear, at, taps, ring, total, tap))
    pl.when(step < at.tiles)(
        functools.partial(_output_gradient, at, outer, step, constants, share, spread, y, dz, ring),
    )
    pl.when(step >= at.lag)(
        functools.partial(_input_gradients, at, inner, step, constants, x, du, ring, total, tap),
    )
    pl.when(step == at.tiles - 1 + at.lag)(functools.partial(_write_sums, at, total, sums))


def _constant(of, n: int, lanes: int):
    """A column of constants, for all images."""
    return jnp.broadcast_to(of[:, n : n + 1], (_CHANNELS, lanes))


def _clear(at, taps, ring, total, tap) -> None:
    """Prepares the scratch memory before the first tile."""
    for scratch in (ring, total):
        scratch[...] = jnp.zeros(scratch.shape, jnp.float32)
    for n in range(at.kernel**2):
        tap[n] = _constant(taps, n, tap.shape[-1])


def _output_gradient(at, activation, step, constants, share, spread, y, dz, ring) -> None:
    """Puts a tile of y's gradient into the ring."""
    wide = jnp.float32
    gain, offset, scale, k2, k1 = (_constant(constants, 4 + n, share.shape[-1]) for n in range(5))
    shares, spreads = share[...].astype(wide), spread[...].astype(wide)

    def part(n, begin):
        columns = pl.ds(begin, at.columns)
        outputs = y[n, columns].astype(wide)
        u = outputs * gain + offset
        _, back = jax.vjp(activation, u)
        (slope,) = back(jnp.ones_like(u))
        gradient = (dz[n, columns].astype(wide) * shares + spreads) * slope * scale + outputs * k2 + k1
        ring[(step * at.rows + n) % at.ring, pl.ds(at.left + begin, at.columns)] = gradient

    _for_each_part(at, part)


def _input_gradients(at, activation, step, constants, x, du, ring, total, tap) -> None:
    """Writes a tile of x's gradient, and adds to the kernel's gradient and to the sums."""
    wide = jnp.float32
    scale, offset, mean, root = (_constant(constants, n, tap.shape[-1]) for n in range(4))
    first = (step - at.lag) * at.rows

    def place(n, begin, row, column):
        inputs = x[n * at.stride + row, pl.ds(begin, at.columns), column].astype(wide)
        a, back = jax.vjp(activation, inputs * scale + offset)
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


def _write_sums(at, total, sums) -> None:
    """Writes the sums after the last tile."""
    # Channels move from a register's rows to its lanes through a diagonal: older TPUs have no other way.
    shape = (_CHANNELS, _LANES)
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    diagonal = (rows == columns).astype(jnp.float32)
    for n in range(at.kernel**2 + 2):
        sums[0, 0, n : n + 1] = jnp.sum(jnp.sum(total[n], -1, keepdims=True) * diagonal, 0, keepdims=True)


def _for_each_part(at: _Geometry, part: Callable) -> None:
    """Calls `part` with each row of a tile and the first column of each part of the row."""

    def row(n, carry):
        def columns(m, carry):
            part(n, m * at.columns)
            return carry

        return jax.lax.fori_loop(0, at.width // at.columns, columns, carry)

    jax.lax.fori_loop(0, at.rows, row, 0)

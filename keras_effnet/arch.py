"""What a network is, in plain numbers. Standard library only.

A `Variant` is a row of the table as the papers print it: stages, a width and a depth coefficient. `resolve()` turns
it, once, into an `Architecture`: a tuple of `Block`s whose fields are final integers. Everything else (builders,
descriptions, plots, weight names) reads the blocks and multiplies nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

Widths = tuple[int, int, int]  # of a block: expand_filters, se_filters, filters_out


@dataclass(frozen=True)
class Stage:
    """One stage before scaling: a row of table 1 of arXiv 1905.11946.

    Args:
        repeats: Integer, number of blocks.
        kernel_size: Integer, side of the spatial convolution's kernel.
        strides: Integer, strides of the first block; the others have 1.
        expand_ratio: Integer, width inside a block over `filters_in`. 1: no expansion convolution.
        filters_in: Integer, declared input channels. The widths inside the first block follow from this number, also
            where the tensor that arrives has another one (EdgeTPU declares 24 behind a stem of 32).
        filters_out: Integer, output channels.
        se_ratio: Float, squeeze-and-excite width over `filters_in`. 0: none.
        operator: `"mbconv"` (depthwise) or `"fused"` (one full convolution in place of expansion and depthwise).
        residual: Boolean, whether blocks that keep their shape have a skip connection.
        num_experts: Integer, kernels per convolution that are mixed for each example. 0: an ordinary convolution.
    """

    repeats: int
    kernel_size: int
    strides: int
    expand_ratio: int
    filters_in: int
    filters_out: int
    se_ratio: float = 0.25
    operator: str = "mbconv"
    residual: bool = True
    num_experts: int = 0


@dataclass(frozen=True)
class Block:
    """One block after scaling; every width is the number of channels of a tensor.

    Args:
        name: String, stage and place in it as in keras.applications: `"1a"`, `"2a"`, `"2b"`, ...
        operator: `"mbconv"` or `"fused"`.
        kernel_size: Integer, side of the spatial convolution's kernel.
        strides: Integer, 1 or 2.
        filters_in: Integer, channels that arrive.
        expand_filters: Integer, channels of the expansion. 0: no expansion convolution.
        se_filters: Integer, squeeze-and-excite width. 0: none.
        filters_out: Integer, channels that leave.
        residual: Boolean, whether the input is added to the output.
        num_experts: Integer, see `Stage`.
    """

    name: str
    operator: str
    kernel_size: int
    strides: int
    filters_in: int
    expand_filters: int
    se_filters: int
    filters_out: int
    residual: bool
    num_experts: int = 0

    @property
    def stage(self) -> int:
        """Number of the stage that the block belongs to, from 1."""
        return int(self.name.rstrip("abcdefghijklmnopqrstuvwxyz"))

    @property
    def inner_filters(self) -> int:
        """Channels between expansion and projection."""
        return self.expand_filters or self.filters_in


@dataclass(frozen=True)
class Variant:
    """One member of the family as its paper or repository declares it.

    Args:
        name: String, as the TPU repository spells it.
        stages: Tuple of `Stage`.
        width: Float, width coefficient.
        depth: Float, depth coefficient.
        resolution: Integer, side of the input in pixels.
        dropout_rate: Float, rate before the classifier.
        source: String, where the numbers come from.
        activation: Name of a Keras activation.
        drop_connect_rate: Float, rate that the last block would reach if the blocks were counted from 1.
        fixed_ends: Boolean, whether stem and head keep their width and first and last stage their depth (Lite).
        preprocessing: String, the usual scheme of the variant's weights (a key of `preprocessing.SCHEMES`).
        class_offset: Integer, classes before ImageNet's 1000 in the original's own checkpoints.
        widths: Tuple of `(expand_filters, se_filters, filters_out)` per block, where a pruned net has other ones than
            its stages say. Defaults to None.
    """

    name: str
    stages: tuple[Stage, ...]
    width: float
    depth: float
    resolution: int
    dropout_rate: float
    source: str
    activation: str = "silu"
    drop_connect_rate: float = 0.2
    fixed_ends: bool = False
    preprocessing: str = "imagenet"
    class_offset: int = 0
    widths: tuple[Widths, ...] | None = None


@dataclass(frozen=True)
class Architecture:
    """A network's layers as final integers. See `resolve()`.

    Args:
        name: String.
        stem_filters: Integer, output channels of the first convolution.
        blocks: Tuple of `Block`.
        head_filters: Integer, output channels of the last convolution.
        activation: Name of a Keras activation.
        dropout_rate: Float, rate before the classifier.
        drop_connect_rate: Float, see `drop_connect_rates`.
    """

    name: str
    stem_filters: int
    blocks: tuple[Block, ...]
    head_filters: int
    activation: str
    dropout_rate: float
    drop_connect_rate: float

    @property
    def drop_connect_rates(self) -> tuple[float, ...]:
        """Rate of each block: it grows linearly over all blocks, counted after depth scaling.

        tensorflow/tpu efficientnet_model.py:656-659: block 0 never drops, the last of N drops (N - 1) / N of the rate.
        """
        return tuple(self.drop_connect_rate * index / len(self.blocks) for index in range(len(self.blocks)))

    @property
    def widths(self) -> dict[str, Widths]:
        """Channels of each block by its name: `(expand_filters, se_filters, filters_out)`."""
        return {block.name: (block.expand_filters, block.se_filters, block.filters_out) for block in self.blocks}

    @property
    def reductions(self) -> tuple[int, ...]:
        """Index of the block behind each endpoint reduction_1, ...: the last before a stride, and the last of all."""
        following = [block.strides for block in self.blocks[1:]] + [2]
        return tuple(index for index, strides in enumerate(following) if strides > 1)


STEM_FILTERS, HEAD_FILTERS = 32, 1280  # before scaling: tensorflow/tpu efficientnet_model.py:518-521, :586-589


def round_filters(filters: int, width: float, divisor: int = 8) -> int:
    """Scales a width to the nearest multiple of `divisor`, but never down by more than a tenth.

    Args:
        filters: Integer, channels before scaling.
        width: Float, width coefficient. 1 leaves `filters` as a multiple of `divisor`.
        divisor: Integer, defaults to 8.

    Returns:
        Integer, channels after scaling.

    Example:

    >>> round_filters(24, 1.1), round_filters(32, 1.2), round_filters(1280, 4.3)
    (24, 40, 5504)

    Reference:
        tensorflow/tpu efficientnet_model.py:106-122.
    """
    scaled = filters * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Scales a number of blocks, rounding up.

    Args:
        repeats: Integer, blocks before scaling.
        depth: Float, depth coefficient.

    Returns:
        Integer, blocks after scaling.

    Example:

    >>> round_repeats(4, 3.1)
    13

    Reference:
        tensorflow/tpu efficientnet_model.py:125-130.
    """
    return math.ceil(repeats * depth)


def resolve(variant: Variant) -> Architecture:
    """Scales a variant's stages into final integers.

    Args:
        variant: A `Variant`.

    Returns:
        An `Architecture`.

    Example:

    >>> from keras_effnet.variants import VARIANTS
    >>> b0 = resolve(VARIANTS["efficientnet-b0"])
    >>> len(b0.blocks), b0.blocks[1].expand_filters, b0.blocks[1].se_filters
    (16, 96, 4)

    Reference:
        tensorflow/tpu efficientnet_model.py:211, :253-263, :518-545, :586-589.
    """
    stem_filters, head_filters = (
        filters if variant.fixed_ends else round_filters(filters, variant.width)
        for filters in (STEM_FILTERS, HEAD_FILTERS)
    )
    ends = (0, len(variant.stages) - 1) if variant.fixed_ends else ()
    blocks: list[Block] = []
    arriving = stem_filters
    for number, stage in enumerate(variant.stages):
        filters_out = round_filters(stage.filters_out, variant.width)
        declared = round_filters(stage.filters_in, variant.width)
        repeats = stage.repeats if number in ends else round_repeats(stage.repeats, variant.depth)
        for repeat in range(repeats):
            strides = stage.strides if repeat == 0 else 1
            blocks.append(
                Block(
                    name=f"{number + 1}{chr(ord('a') + repeat)}",
                    operator=stage.operator,
                    kernel_size=stage.kernel_size,
                    strides=strides,
                    filters_in=arriving,
                    expand_filters=declared * stage.expand_ratio if stage.expand_ratio != 1 else 0,
                    se_filters=max(1, int(declared * stage.se_ratio)) if stage.se_ratio else 0,
                    filters_out=filters_out,
                    residual=stage.residual and strides == 1 and arriving == filters_out,
                    num_experts=stage.num_experts,
                )
            )
            arriving = declared = filters_out
    architecture = Architecture(
        name=variant.name,
        stem_filters=stem_filters,
        blocks=tuple(blocks),
        head_filters=head_filters,
        activation=variant.activation,
        dropout_rate=variant.dropout_rate,
        drop_connect_rate=variant.drop_connect_rate,
    )
    return architecture if variant.widths is None else with_widths(architecture, variant.widths)


def with_widths(
    architecture: Architecture, widths: Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
) -> Architecture:
    """The same layers with other numbers of channels: a pruned net.

    Args:
        architecture: An `Architecture`.
        widths: Sequence of `(expand_filters, se_filters, filters_out)` for each block, or dict of them by the blocks'
            names. 0 where a block has no such convolution; of one without expansion the channels that arrive will do.

    Returns:
        An `Architecture`.

    Raises:
        ValueError: If the widths are not those of such a net.

    Example:

    >>> from keras_effnet.variants import VARIANTS
    >>> b0 = resolve(VARIANTS["efficientnet-b0"])
    >>> with_widths(b0, b0.widths | {"2b": (100, 5, 24)}).blocks[2].expand_filters
    100
    """
    names = [block.name for block in architecture.blocks]
    if isinstance(widths, Mapping):
        if set(widths) != set(names):
            others = ", ".join(map(repr, sorted(set(names) ^ set(widths), key=str)))
            raise ValueError(f"Expected widths of the blocks {names[0]} to {names[-1]}. Missing or too many: {others}")
        widths = [widths[name] for name in names]
    if len(widths) != len(names):
        raise ValueError(
            f"Expected widths of the {len(names)} blocks of {architecture.name}. Received: {len(widths)} of them"
        )
    blocks, arriving = [], architecture.stem_filters
    for block, given in zip(architecture.blocks, widths, strict=True):
        before = (block.expand_filters, block.se_filters, block.filters_out)
        whole = (
            isinstance(given, Sequence)
            and len(given) == 3
            and all(isinstance(width, Integral) and not isinstance(width, bool) for width in given)
        )
        expand, se, out = map(int, given if whole else (-1, -1, -1))
        if not block.expand_filters and expand == arriving:
            expand = 0
        # A convolution stays one, and none stays none.
        if not all((new > 0) == (old > 0) and new >= 0 for new, old in zip((expand, se, out), before, strict=True)):
            raise ValueError(
                f"Expected (expand, se, out) of block {block.name} as positive integers, 0 where it has no such "
                f"convolution, such as {before}. Received: {given!r}"
            )
        if block.residual and out != arriving:
            raise ValueError(
                f"Expected {arriving} output channels of block {block.name}, whose input is added to it. "
                f"Received: {given!r}"
            )
        blocks.append(replace(block, filters_in=arriving, expand_filters=expand, se_filters=se, filters_out=out))
        arriving = out
    return replace(architecture, blocks=tuple(blocks))


class Layer(NamedTuple):
    """A layer that owns variables.

    Args:
        kind: Name of the Keras layer's class.
        shapes: Dict from the variable's name to its shape, in Keras' order.
    """

    kind: str
    shapes: dict[str, tuple[int, ...]]


def owners(architecture: Architecture, channels: int = 3, classes: int | None = 1000) -> dict[str, Layer]:
    """The layers that own variables, in the model's order: what a file of weights has to hold.

    Args:
        architecture: An `Architecture`.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.

    Returns:
        Dict from the layer's name (keras.applications') to a `Layer`.

    Example:

    >>> from keras_effnet.variants import VARIANTS
    >>> owners(resolve(VARIANTS["efficientnet-b0"]))["block1a_dwconv"].shapes
    {'kernel': (3, 3, 32, 1)}
    """
    found: dict[str, Layer] = {}

    def kernels(name: str, kind: str, shape: tuple[int, ...], experts: int, **biases: tuple[int, ...]) -> None:
        kind, shape = (kind.replace("Conv", "CondConv"), (experts, *shape)) if experts else (kind, shape)
        found[name] = Layer(kind, {"kernel": shape, **biases})

    def conv(name: str, size: int, filters_in: int, filters: int, norm: str = "", experts: int = 0) -> None:
        biases: dict[str, tuple[int, ...]] = {} if norm else {"bias": (filters,)}
        kernels(name, "Conv2D", (size, size, filters_in, filters), experts, **biases)
        if norm:
            batch_norm(norm, filters)

    def batch_norm(name: str, filters: int) -> None:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        found[name] = Layer("BatchNormalization", dict.fromkeys(names, (filters,)))

    conv("stem_conv", 3, channels, architecture.stem_filters, norm="stem_bn")
    for block in architecture.blocks:
        start, inside, experts = f"block{block.name}_", block.inner_filters, block.num_experts
        if experts:
            found[f"{start}routing"] = Layer("Dense", {"kernel": (block.filters_in, experts), "bias": (experts,)})
        if block.operator == "fused":
            conv(f"{start}expand_conv", block.kernel_size, block.filters_in, inside, norm=f"{start}expand_bn")
        else:
            if block.expand_filters:
                conv(f"{start}expand_conv", 1, block.filters_in, inside, norm=f"{start}expand_bn", experts=experts)
            kernels(f"{start}dwconv", "DepthwiseConv2D", (block.kernel_size, block.kernel_size, inside, 1), experts)
            batch_norm(f"{start}bn", inside)
        if block.se_filters:
            conv(f"{start}se_reduce", 1, inside, block.se_filters)
            conv(f"{start}se_expand", 1, block.se_filters, inside)
        conv(f"{start}project_conv", 1, inside, block.filters_out, norm=f"{start}project_bn", experts=experts)
    filters = architecture.head_filters
    conv("top_conv", 1, architecture.blocks[-1].filters_out, filters, norm="top_bn")
    if classes is not None:
        found["predictions"] = Layer("Dense", {"kernel": (filters, classes), "bias": (classes,)})
    return found

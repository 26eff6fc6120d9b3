"""Dataclasses that describe a network in plain numbers. Standard library only.

A `Variant` is a table row as the papers print it: stages, a width and a depth coefficient. `scaling.resolve()` converts
it into an `Architecture`: a tuple of `Block`s whose fields are final integers. All other code (builders, descriptions,
plots, weight names) reads the blocks and scales nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

Widths = tuple[int, int, int]  # (expand_filters, se_filters, filters_out) of a block

# Epsilon of batch normalization with each padding: the original's, and that of timm's own nets, keras-hub and Composer.
EPSILONS = {"same": 1e-3, "symmetric": 1e-5}


def padding_of(pads: Sequence[Sequence[Sequence[int]]], epsilon: float, has_preprocessing: bool) -> str:
    """Returns the padding of a net whose layers are known.

    keras.applications has padding layers too. At the size that they were built for, they pad as TensorFlow does: one
    side of them is shorter wherever the map has an even size. Where all maps have odd sizes, the sides are equal.

    Args:
        pads: Sequence of the pairs (top, bottom) and (left, right) of each padding layer before a convolution.
        epsilon: Float, epsilon of batch normalization.
        has_preprocessing: Boolean, whether a layer is called as those of this package that normalize pixels.

    Returns:
        Key of `EPSILONS`.
    """
    equal = all(before == after for pad in pads for before, after in pad)
    return "symmetric" if pads and equal and (has_preprocessing or epsilon == EPSILONS["symmetric"]) else "same"


@dataclass(frozen=True)
class Stage:
    """One stage before scaling: a row of table 1 of arXiv 1905.11946.

    Args:
        repeats: Integer, number of blocks.
        kernel_size: Integer, side of the spatial convolution's kernel.
        strides: Integer, strides of the first block. All others have strides 1.
        expand_ratio: Integer, width inside a block over `filters_in`. 1: no expansion convolution.
        filters_in: Integer, declared input channels. They set the widths inside the first block, even if its input has
            a different number of channels (EdgeTPU declares 24 after a stem of 32).
        filters_out: Integer, output channels.
        se_ratio: Float, squeeze-and-excite width over `filters_in`. 0: none.
        operator: See `Block`.
        residual: Boolean, whether blocks that keep the shape of their input have a skip connection.
        num_experts: Integer, kernels per convolution, mixed for each example. 0: an ordinary convolution.
        activation: Name of a Keras activation. Empty: the net's.
        project_activation: Boolean, whether the activation also follows the projection. Always with `"conv"`.
        space_to_depth: Boolean, whether the first block starts with `Block.space_to_depth`. All blocks then have four
            times `filters_out`.
        first_kernel_size: Integer, side of the first block's kernel where it differs. 0: `kernel_size`.
        se_of_input: Boolean, whether squeeze-and-excite takes its width from the channels that arrive, where they
            differ from `filters_in`.
        global_context: Boolean, whether squeeze-and-excite weights the pixels that it sums up, and normalizes the sum.
            See `nets.blocks`.
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
    activation: str = ""
    project_activation: bool = False
    space_to_depth: bool = False
    first_kernel_size: int = 0
    se_of_input: bool = False
    global_context: bool = False


@dataclass(frozen=True)
class Block:
    """One block after scaling. Every width is a tensor's number of channels.

    Args:
        name: String, stage and position in it, as in keras.applications: `"1a"`, `"2a"`, `"2b"`, ...
        operator: `"mbconv"` (depthwise), `"fused"` (one full convolution in place of expansion and depthwise) or
            `"conv"` (the projection alone, as one full convolution).
        kernel_size: Integer, side of the spatial convolution's kernel.
        strides: Integer, 1 or 2.
        filters_in: Integer, input channels.
        expand_filters: Integer, channels of the expansion. 0: no expansion convolution.
        se_filters: Integer, squeeze-and-excite width. 0: none.
        filters_out: Integer, output channels.
        residual: Boolean, whether the input is added to the output.
        num_experts: Integer, see `Stage`.
        activation: See `Stage`.
        project_activation: See `Stage`.
        space_to_depth: Boolean, whether a learnt 2 x 2 convolution with strides of 2 comes first. It has four times
            `filters_in` channels.
        global_context: See `Stage`.
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
    activation: str = ""
    project_activation: bool = False
    space_to_depth: bool = False
    global_context: bool = False

    @property
    def stage(self) -> int:
        """Number of the block's stage, from 1."""
        return int(self.name.rstrip("abcdefghijklmnopqrstuvwxyz"))

    @property
    def inner_filters(self) -> int:
        """Channels between expansion and projection."""
        return self.expand_filters or self.filters_in * (4 if self.space_to_depth else 1)

    @property
    def reduction(self) -> int:
        """Strides of the whole block."""
        return self.strides * (2 if self.space_to_depth else 1)


@dataclass(frozen=True)
class Variant:
    """One member of the family, as declared in its paper or repository.

    Args:
        name: String, as the TPU repository spells it.
        family: String, the group that lists show it in.
        stages: Tuple of `Stage`.
        width: Float, width coefficient.
        depth: Float, depth coefficient, or a tuple of one for each stage.
        resolution: Integer, side of the input in pixels.
        dropout_rate: Float, rate before the classifier.
        source: String, where the numbers come from.
        activation: Name of a Keras activation.
        drop_connect_rate: Float, rate that the last block would reach if the blocks were counted from 1.
        fixed_ends: Boolean, whether stem and head keep their width, and the first and last stage their depth (Lite).
        preprocessing: String, the usual scheme of the variant's weights (a key of `normalization.SCHEMES`).
        class_offset: Integer, classes before ImageNet's 1000 in the original checkpoints.
        widths: Tuple of `(expand_filters, se_filters, filters_out)` per block of a pruned net. Defaults to None: the
            widths follow from the stages.
        stem_filters: Integer, channels of the first convolution before scaling.
        head_filters: Integer, channels of the last convolution before scaling.
        least_share: Float, see `scaling.round_filters()`.
        padding: See `Architecture`.
        bn_momentum: See `Architecture`.
        depthwise_name: See `Architecture`.
    """

    name: str
    family: str
    stages: tuple[Stage, ...]
    width: float
    depth: float | tuple[float, ...]
    resolution: int
    dropout_rate: float
    source: str
    activation: str = "silu"
    drop_connect_rate: float = 0.2
    fixed_ends: bool = False
    preprocessing: str = "imagenet"
    class_offset: int = 0
    widths: tuple[Widths, ...] | None = None
    stem_filters: int = 32  # tensorflow/tpu efficientnet_model.py:518-521
    head_filters: int = 1280  # efficientnet_model.py:586-589
    least_share: float = 0.9
    padding: str = "same"
    bn_momentum: float = 0.99
    depthwise_name: str = "dwconv"


@dataclass(frozen=True)
class Architecture:
    """A network's layers as final integers. See `scaling.resolve()`.

    Args:
        name: String, name of the variant or model.
        stem_filters: Integer, output channels of the first convolution.
        blocks: Tuple of `Block`.
        head_filters: Integer, output channels of the last convolution.
        activation: Name of a Keras activation.
        dropout_rate: Float, rate before the classifier.
        drop_connect_rate: Float, see `drop_connect_rates`.
        padding: Key of `EPSILONS`. `"same"`: TensorFlow's, which adds an odd row and column at the end. `"symmetric"`:
            PyTorch's, which adds equal numbers on both sides. They differ where a convolution has strides.
        bn_epsilon: Float, epsilon of batch normalization.
        bn_momentum: Float, momentum of batch normalization.
        depthwise_name: String, how the names of depthwise convolutions end: `"dwconv"`, or `"dwconv2"` as
            keras.applications calls those of V2.
    """

    name: str
    stem_filters: int
    blocks: tuple[Block, ...]
    head_filters: int
    activation: str
    dropout_rate: float
    drop_connect_rate: float
    padding: str = "same"
    bn_epsilon: float = EPSILONS["same"]
    bn_momentum: float = 0.99
    depthwise_name: str = "dwconv"

    @property
    def drop_connect_rates(self) -> tuple[float, ...]:
        """Rate of each block. It grows linearly over all blocks, counted after depth scaling.

        tensorflow/tpu efficientnet_model.py:656-659: block 0 never drops, the last of N drops (N - 1) / N of the rate.
        """
        return tuple(self.drop_connect_rate * index / len(self.blocks) for index in range(len(self.blocks)))

    @property
    def widths(self) -> dict[str, Widths]:
        """Channels of each block by name: `(expand_filters, se_filters, filters_out)`."""
        return {block.name: (block.expand_filters, block.se_filters, block.filters_out) for block in self.blocks}

    @property
    def reductions(self) -> tuple[int, ...]:
        """Index of the block of each endpoint reduction_1, ...: the last before each stride, and the last of all.

        -1 is the stem, where the first block has strides.
        """
        following = [block.reduction for block in self.blocks] + [2]
        return tuple(index - 1 for index, strides in enumerate(following) if strides > 1)


def with_widths(
    architecture: Architecture, widths: Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
) -> Architecture:
    """Returns an architecture with the same layers and other channels, such as that of a pruned net.

    Args:
        architecture: An `Architecture`.
        widths: Sequence of `(expand_filters, se_filters, filters_out)` for each block, or dict of them by block name.
            0 where a block has no such convolution. For a block without expansion, `expand_filters` may also be the
            number of its input channels.

    Returns:
        An `Architecture`.

    Raises:
        ValueError: If the widths do not fit the blocks.

    Example:

    >>> from keras_effnet.nets.scaling import resolve
    >>> from keras_effnet.nets.variants import VARIANTS
    >>> b0 = resolve(VARIANTS["efficientnet-b0"])
    >>> with_widths(b0, b0.widths | {"2b": (100, 5, 24)}).blocks[2].expand_filters
    100
    """
    names = [block.name for block in architecture.blocks]
    if isinstance(widths, Mapping):
        if set(widths) != set(names):
            others = sorted(set(names) ^ set(widths), key=str)
            shown = ", ".join(map(repr, others[:5])) + ", ..." * (len(others) > 5)
            raise ValueError(f"Expected widths for the blocks {names[0]} to {names[-1]}. Missing or unknown: {shown}")
        widths = [widths[name] for name in names]
    if len(widths) != len(names):
        raise ValueError(
            f"Expected widths for the {len(names)} blocks of {architecture.name}. Received: {len(widths)} widths"
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
        # Widths add or remove no convolution.
        if not all((new > 0) == (old > 0) and new >= 0 for new, old in zip((expand, se, out), before, strict=True)):
            raise ValueError(
                f"Expected (expand, se, out) of block {block.name} to be positive integers, or 0 for a convolution "
                f"that it does not have, such as {before}. Received: {given!r}"
            )
        if block.residual and out != arriving:
            raise ValueError(
                f"Expected {arriving} output channels of block {block.name}, because its input is added to its output. "
                f"Received: {given!r}"
            )
        blocks.append(replace(block, filters_in=arriving, expand_filters=expand, se_filters=se, filters_out=out))
        arriving = out
    return replace(architecture, blocks=tuple(blocks))

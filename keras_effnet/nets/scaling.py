"""Compound scaling: converts the stages of a paper into the integers of a net. Standard library only."""

import math

from keras_effnet.nets.architecture import Architecture, Block, Variant, with_widths

STEM_FILTERS, HEAD_FILTERS = 32, 1280  # before scaling: tensorflow/tpu efficientnet_model.py:518-521, :586-589


def round_filters(filters: int, width: float, divisor: int = 8) -> int:
    """Scales a width to the nearest multiple of `divisor`, but never down by more than a tenth.

    Args:
        filters: Integer, channels before scaling.
        width: Float, width coefficient. With 1, `filters` is still rounded to a multiple of `divisor`.
        divisor: Integer. Defaults to 8.

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

    >>> from keras_effnet.nets.variants import VARIANTS
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

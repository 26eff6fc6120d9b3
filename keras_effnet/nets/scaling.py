"""Compound scaling: converts the stages of a paper into the integers of a net. Standard library only."""

import math

from keras_effnet.nets.architecture import EPSILONS, Architecture, Block, Variant, with_widths


def round_filters(filters: int, width: float, divisor: int = 8, least_share: float = 0.9) -> int:
    """Scales a width to the nearest multiple of `divisor`, by default never down by more than a tenth.

    Args:
        filters: Integer, channels before scaling.
        width: Float, width coefficient. With 1, `filters` is still rounded to a multiple of `divisor`.
        divisor: Integer. Defaults to 8.
        least_share: Float, share of the scaled width that has to remain. Defaults to 0.9. 0 for EfficientNetV2.

    Returns:
        Integer, channels after scaling.

    Example:

    >>> round_filters(24, 1.1), round_filters(32, 1.2), round_filters(1280, 4.3)
    (24, 40, 5504)

    Reference:
        tensorflow/tpu efficientnet_model.py:106-122; google/automl efficientnetv2/effnetv2_model.py `round_filters`.
    """
    scaled = filters * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < least_share * scaled else rounded


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

    def rounded(filters: int) -> int:
        return round_filters(filters, variant.width, least_share=variant.least_share)

    stem_filters, head_filters = (
        filters if variant.fixed_ends else rounded(filters) for filters in (variant.stem_filters, variant.head_filters)
    )
    depths = variant.depth if isinstance(variant.depth, tuple) else (variant.depth,) * len(variant.stages)
    ends = (0, len(variant.stages) - 1) if variant.fixed_ends else ()
    blocks: list[Block] = []
    arriving = stem_filters
    for number, (stage, depth) in enumerate(zip(variant.stages, depths, strict=True)):
        filters_out = rounded(stage.filters_out) * (4 if stage.space_to_depth else 1)
        declared = rounded(stage.filters_in)
        repeats = stage.repeats if number in ends else round_repeats(stage.repeats, depth)
        for repeat in range(repeats):
            strides = stage.strides if repeat == 0 else 1
            expands = stage.operator == "fused" or (stage.operator == "mbconv" and stage.expand_ratio != 1)
            squeezed = arriving if stage.se_of_input else declared
            blocks.append(
                Block(
                    name=f"{number + 1}{_letters(repeat)}",
                    operator=stage.operator,
                    kernel_size=(stage.first_kernel_size if repeat == 0 else 0) or stage.kernel_size,
                    strides=strides,
                    filters_in=arriving,
                    expand_filters=declared * stage.expand_ratio if expands else 0,
                    se_filters=max(1, int(squeezed * stage.se_ratio)) if stage.se_ratio else 0,
                    filters_out=filters_out,
                    residual=stage.residual and strides == 1 and arriving == filters_out,
                    num_experts=stage.num_experts,
                    activation=stage.activation,
                    project_activation=stage.project_activation,
                    space_to_depth=stage.space_to_depth and repeat == 0,
                    global_context=stage.global_context,
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
        padding=variant.padding,
        bn_epsilon=EPSILONS[variant.padding],
        bn_momentum=variant.bn_momentum,
        depthwise_name=variant.depthwise_name,
    )
    return architecture if variant.widths is None else with_widths(architecture, variant.widths)


def _letters(index: int) -> str:
    """Returns a, b, ..., z, aa, ab, ..., as keras.applications names the blocks of a stage."""
    letter = chr(ord("a") + index % 26)
    return letter if index < 26 else _letters(index // 26 - 1) + letter

"""Which channels of a net can be removed, and which of them only together."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from keras_effnet.nets import inspection
from keras_effnet.nets.architecture import Architecture, with_widths


class Group(NamedTuple):
    """Channels that can go one by one, each together with what belongs to it in other layers.

    Args:
        name: String, that of the first layer which puts the channels out, without `_conv`.
        width: Name of the `Block` field that counts them.
        blocks: Tuple of the indices of the blocks that share them.
        size: Integer, their number.
    """

    name: str
    width: str
    blocks: tuple[int, ...]
    size: int


def groups(architecture: Architecture) -> tuple[Group, ...]:
    """The groups of channels of a net that pruning may narrow.

    A block's expansion, with depthwise convolution and gate; its squeeze-and-excite width; and the projections that
    residual connections add up. Stem, first stage and head stay whole, as in the published nets (utils_pruning.py
    :437-472).

    Args:
        architecture: An `Architecture`.

    Returns:
        Tuple of `Group`.

    Example:

    >>> from keras_effnet.nets.variants import VARIANTS
    >>> b0 = arch.resolve(VARIANTS["efficientnet-b0"])
    >>> [(group.name, group.blocks, group.size) for group in groups(b0)][:3]
    [('block2a_expand', (1,), 96), ('block2a_se_reduce', (1,), 4), ('block2a_project', (1, 2), 24)]
    """
    net, found = architecture.blocks, []
    for index, block in enumerate(net):
        if block.stage == 1:
            continue
        if block.expand_filters:
            found.append(Group(f"block{block.name}_expand", "expand_filters", (index,), block.expand_filters))
        if block.se_filters:
            found.append(Group(f"block{block.name}_se_reduce", "se_filters", (index,), block.se_filters))
        if not block.residual:
            last = index
            while last + 1 < len(net) and net[last + 1].residual:
                last += 1
            chain = tuple(range(index, last + 1))
            # The depthwise convolution of a block without expansion has the channels that arrive.
            if all(follower.expand_filters for follower in net[index + 1 : last + 2]):
                found.append(Group(f"block{block.name}_project", "filters_out", chain, block.filters_out))
    return tuple(found)


def with_sizes(architecture: Architecture, sizes: Mapping[Group, int]) -> Architecture:
    """The net whose groups have other sizes."""
    rows: list[dict[str, int]] = [{} for _ in architecture.blocks]
    for group, size in sizes.items():
        for index in group.blocks:
            rows[index][group.width] = size
    narrow = dataclasses.replace(
        architecture,
        blocks=tuple(dataclasses.replace(block, **row) for block, row in zip(architecture.blocks, rows, strict=True)),
    )
    return with_widths(architecture, narrow.widths)


# The layers of a block: what arrives on the last but one axis of their kernels and what leaves on the last.
CHANNELS = {
    "routing": ("arriving", ""),
    "expand_conv": ("arriving", "expand_filters"),
    "expand_bn": ("", "expand_filters"),
    "dwconv": ("expand_filters", ""),
    "bn": ("", "expand_filters"),
    "se_reduce": ("expand_filters", "se_filters"),
    "se_expand": ("se_filters", "expand_filters"),
    "project_conv": ("expand_filters", "filters_out"),
    "project_bn": ("", "filters_out"),
}


def _outer(block_layer: str) -> int:
    """Axis of a kernel's output channels; a depthwise kernel has them before its multiplier."""
    return -2 if block_layer == "dwconv" else -1


def kernels_of(reading: inspection.Reading) -> dict[str, list[tuple[Any, int]]]:
    """Of each group the layers whose kernels put its channels out, with their axis."""
    found: dict[str, list[tuple[Any, int]]] = {}
    for group in groups(reading.architecture):
        members = found.setdefault(group.name, [])
        for index in group.blocks:
            start = f"block{reading.architecture.blocks[index].name}_"
            for name, channels in CHANNELS.items():
                layer = reading.layers.get(start + name)
                if layer is not None and hasattr(layer, "kernel") and group.width == channels[_outer(name)]:
                    members.append((layer, _outer(name)))
    return found

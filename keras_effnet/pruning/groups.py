"""Groups of channels that pruning can narrow, and the layers that each group passes through."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from keras_effnet.nets import inspection
from keras_effnet.nets.architecture import Architecture, with_widths

# Layers of a block, with the width on the second to last axis of their kernels (input) and on the last (output).
CHANNELS = {
    "routing": ("arriving", ""),
    "expand_conv": ("arriving", "expand_filters"),
    "expand_bn": ("", "expand_filters"),
    "dwconv": ("expand_filters", ""),
    "dwconv2": ("expand_filters", ""),
    "bn": ("", "expand_filters"),
    "se_reduce": ("expand_filters", "se_filters"),
    "se_expand": ("se_filters", "expand_filters"),
    "se_share": ("expand_filters", ""),
    "se_flat": ("", "expand_filters"),
    "se_pixel": ("", "expand_filters"),
    "se_gate": ("", "expand_filters"),
    "se_norm": ("", "se_filters"),
    "project_conv": ("expand_filters", "filters_out"),
    "project_bn": ("", "filters_out"),
}


class Group(NamedTuple):
    """Channels that can be removed one by one, each from all layers that share it.

    Args:
        name: String, name of the first layer that outputs the channels, without `_conv`.
        width: String, name of the `Block` field that holds their number.
        blocks: Tuple of integers, indices of the blocks that share the channels.
        size: Integer, number of channels.
    """

    name: str
    width: str
    blocks: tuple[int, ...]
    size: int


def groups(architecture: Architecture) -> tuple[Group, ...]:
    """Returns the groups of channels that pruning may narrow.

    They are the expansion of a block, with its depthwise convolution and gate; its squeeze-and-excite width, except
    with global context; and the projections that residual connections add up. Stem, first stage and head stay whole, as
    in the published nets (utils_pruning.py:437-472).

    Args:
        architecture: An `Architecture`.

    Returns:
        Tuple of `Group`.

    Example:

    >>> from keras_effnet.nets.scaling import resolve
    >>> from keras_effnet.nets.variants import VARIANTS
    >>> b0 = resolve(VARIANTS["efficientnet-b0"])
    >>> [(group.name, group.blocks, group.size) for group in groups(b0)][:3]
    [('block2a_expand', (1,), 96), ('block2a_se_reduce', (1,), 4), ('block2a_project', (1, 2), 24)]
    """
    net, found = architecture.blocks, []
    for index, block in enumerate(net):
        if block.stage == 1:
            continue
        if block.expand_filters:
            found.append(Group(f"block{block.name}_expand", "expand_filters", (index,), block.expand_filters))
        if block.se_filters and not block.global_context:  # whose normalization averages over all of them
            found.append(Group(f"block{block.name}_se_reduce", "se_filters", (index,), block.se_filters))
        if not block.residual:
            last = index
            while last + 1 < len(net) and net[last + 1].residual:
                last += 1
            chain = tuple(range(index, last + 1))
            # Without expansion, a block's depthwise convolution works on the incoming channels directly.
            if all(follower.expand_filters for follower in net[index + 1 : last + 2]):
                found.append(Group(f"block{block.name}_project", "filters_out", chain, block.filters_out))
    return tuple(found)


def with_sizes(architecture: Architecture, sizes: Mapping[Group, int]) -> Architecture:
    """Returns the architecture with new group sizes.

    Args:
        architecture: An `Architecture`.
        sizes: Mapping from a `Group` to its number of channels. Other groups keep theirs.

    Returns:
        An `Architecture`.
    """
    rows: list[dict[str, int]] = [{} for _ in architecture.blocks]
    for group, size in sizes.items():
        for index in group.blocks:
            rows[index][group.width] = size
    narrow = dataclasses.replace(
        architecture,
        blocks=tuple(dataclasses.replace(block, **row) for block, row in zip(architecture.blocks, rows, strict=True)),
    )
    return with_widths(architecture, narrow.widths)


def kernels_of(reading: inspection.Reading) -> dict[str, list[tuple[Any, int]]]:
    """Returns the layers whose kernels output the channels of each group.

    Args:
        reading: The `Reading` of a model.

    Returns:
        Dict from a group's name to a list of pairs: a layer, and the axis of the channels in its kernel.
    """
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


def _outer(block_layer: str) -> int:
    """Returns the axis of a kernel's output channels. In a depthwise kernel, they precede the multiplier."""
    return -2 if block_layer.startswith("dwconv") else -1

"""Counts the parameters, layers and multiply-adds of an architecture, stage by stage. No Keras."""

import math
from itertools import groupby

from keras_effnet.nets.architecture import Architecture, Block


def costs(architecture: Architecture, size: tuple[int, int], channels: int, classes: int | None) -> dict[str, int]:
    """Counts parameters and multiply-adds as `describe()` does.

    Args:
        architecture: An `Architecture`.
        size: Tuple of the input's height and width.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.

    Returns:
        Dict of `params` (trainable) and `macs` (multiply-adds for one image).

    Example:

    >>> from keras_effnet.nets.scaling import resolve
    >>> from keras_effnet.nets.variants import VARIANTS
    >>> costs(resolve(VARIANTS["efficientnet-b0"]), (224, 224), 3, 1000)
    {'params': 5288548, 'macs': 385814752}
    """
    params, norms, macs = total(stage_rows(architecture, size, channels, classes))
    return {"params": params + 2 * norms, "macs": macs}


def stage_rows(architecture: Architecture, size, channels: int, classes: int | None):
    """Yields the rows of the paper's table 1: stem, stages, head.

    Args:
        architecture: An `Architecture`.
        size: Tuple of the input's height and width, or None if it is unknown.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.

    Returns:
        Iterator of dicts. Keys that begin with _ are for `total()` and `describe()` to sum up.
    """
    known, size = size is not None, size or (0, 0)

    def row(stage, operator, filters, layers, kernel_size, strides, **more):
        shown = {"stage": stage, "operator": operator, "resolution": list(size) if known else None, "channels": filters}
        return {**shown, "layers": layers, "kernel_size": kernel_size, "strides": strides, **more}

    filters = architecture.stem_filters
    params, after = 9 * channels * filters, _halved(size, 2)
    pads = architecture.padding == "symmetric"
    # In V1, keras.applications has a padding layer, and another one that divides by deviations.
    counted = (5 + pads, 7 if _pads_explicitly(architecture) else 5)
    cost = {"_params": params, "_norms": filters, "_macs": math.prod(after) * params, "_layers": counted}
    yield row(1, "Conv3x3", filters, 1, 3, 2, **cost)
    size = after
    rates = iter(architecture.drop_connect_rates)
    for number, group in groupby(architecture.blocks, key=lambda block: block.stage):
        members, leaving, counts = list(group), size, []
        for block in members:
            counts.append((*_block_cost(block, leaving), *_block_layers(architecture, block, next(rates) > 0)))
            leaving = _halved(leaving, block.reduction)
        params, norms, macs, ours, theirs = map(sum, zip(*counts, strict=True))
        first = members[0]
        yield row(
            number + 1,
            _operator(first),
            first.filters_out,
            len(members),
            first.kernel_size,
            first.reduction,
            expand_filters=[block.expand_filters for block in members],
            se_filters=[block.se_filters for block in members],
            num_experts=[block.num_experts for block in members],
            global_context=first.global_context,
            _params=params,
            _norms=norms,
            _macs=macs,
            _layers=(ours, theirs),
        )
        size = leaving
    last, filters = architecture.blocks[-1], architecture.head_filters
    conv, dense = last.filters_out * filters, 0 if classes is None else filters * classes
    cost = {"_params": conv + dense + (classes or 0), "_norms": filters, "_macs": math.prod(size) * conv + dense}
    operator = "Conv1x1" if classes is None else "Conv1x1 & Pooling & FC"
    yield row(last.stage + 2, operator, filters, 1, 1, 1, **cost, _layers=(3, 3))


def total(stages) -> tuple[int, int, int]:
    """Sums up the counts of all stages.

    Args:
        stages: Iterable of the dicts that `stage_rows()` yields.

    Returns:
        Tuple of kernel and bias parameters, batch-norm channels, and multiply-adds for one image.
    """
    rows = [(stage["_params"], stage["_norms"], stage["_macs"]) for stage in stages]
    params, norms, macs = map(sum, zip(*rows, strict=True))
    return params, norms, macs


def _operator(block: Block) -> str:
    name = {"mbconv": "MBConv", "fused": "FusedMBConv", "conv": "FusedMBConv"}[block.operator]
    ratio = block.inner_filters / block.filters_in if block.expand_filters else 1
    return f"{'Cond' * bool(block.num_experts)}{name}{ratio:.2g}"


def _block_cost(block: Block, size: tuple[int, int]) -> tuple[int, int, int]:
    """Counts kernel and bias parameters, batch-norm channels, and multiply-adds for one image of `size`."""
    inside, taps = block.inner_filters, block.kernel_size**2
    start, arriving = 0, block.filters_in
    if block.space_to_depth:
        start, arriving, size = 4 * arriving * inside, inside, _halved(size, 2)
    pixels, out_pixels = math.prod(size), math.prod(_halved(size, block.strides))
    expand, spatial, project = arriving * block.expand_filters, taps * inside, inside * block.filters_out
    norms = inside * bool(start) + block.expand_filters + block.filters_out
    if block.operator == "mbconv":
        macs = pixels * (start + expand) + out_pixels * (spatial + project)
        norms += inside
    else:
        expand, spatial, project = taps * expand, 0, project * (1 if block.expand_filters else taps)
        macs = out_pixels * (expand + project)
    gate = 2 * inside * block.se_filters
    biases = block.se_filters + inside if block.se_filters else 0
    if block.global_context:  # the shares, the sum by them, and layer normalization
        biases += inside + 1 + 2 * block.se_filters
        macs += 2 * out_pixels * inside
    kernels, routing = expand + spatial + project, block.filters_in * block.num_experts
    params = start + max(block.num_experts, 1) * kernels + gate + biases + routing + block.num_experts
    # Mixed experts add the sums of their kernels: arXiv 1904.04971, section 3.
    mixing = block.num_experts * kernels + routing
    return params, norms, macs + gate + mixing


def _pads_explicitly(architecture: Architecture) -> bool:
    """Returns whether keras.applications has padding layers: in V1."""
    return architecture.depthwise_name == "dwconv"


def _block_layers(architecture: Architecture, block: Block, drops: bool) -> tuple[int, int]:
    """Counts the layers of a block: in this package and in keras.applications."""
    shared = 3 * (bool(block.expand_filters) + (block.operator == "mbconv") + block.space_to_depth)
    shared += 2 + block.project_activation + 2 * bool(block.num_experts)
    strided = block.strides > 1
    pads = strided and architecture.padding == "symmetric"
    ours = shared + (12 if block.global_context else 4 * bool(block.se_filters)) + 2 * block.residual + pads
    # keras.applications has a padding layer before V1's strided convolutions, a reshaping layer in squeeze-and-excite,
    # and no dropout layer for a rate of 0.
    pads = strided and _pads_explicitly(architecture)
    theirs = shared + 5 * bool(block.se_filters) + block.residual * (1 + drops) + pads
    return ours, theirs


def _halved(size: tuple[int, int], strides: int) -> tuple[int, int]:
    """Returns height and width after a convolution with padding "same"."""
    return math.ceil(size[0] / strides), math.ceil(size[1] / strides)

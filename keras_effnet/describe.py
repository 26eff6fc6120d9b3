"""Looking at a model: `describe()` as data, `plot()` as a block diagram. No Keras unless a model is given."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.arch import Architecture, Block, resolve
from keras_effnet.errors import one_of, unknown
from keras_effnet.preprocessing import scheme_of
from keras_effnet.variants import VARIANTS, identify

if TYPE_CHECKING:
    import keras


def _halved(size: tuple[int, int], strides: int) -> tuple[int, int]:
    """Height and width behind a convolution with padding "same"."""
    return math.ceil(size[0] / strides), math.ceil(size[1] / strides)


def _block_cost(block: Block, size: tuple[int, int]) -> tuple[int, int, int]:
    """Kernel and bias parameters, batch-norm channels, and multiply-adds of one image of `size`."""
    inside, pixels, out_pixels = block.inner_filters, math.prod(size), math.prod(_halved(size, block.strides))
    taps = block.kernel_size**2
    project = inside * block.filters_out
    if block.operator == "fused":
        spatial = taps * block.filters_in * inside
        return spatial + project, inside + block.filters_out, out_pixels * (spatial + project)
    expand = block.filters_in * block.expand_filters
    gate = 2 * inside * block.se_filters
    biases = block.se_filters + inside if block.se_filters else 0
    kernels, routing = expand + taps * inside + project, block.filters_in * block.num_experts
    params = max(block.num_experts, 1) * kernels + gate + biases + routing + block.num_experts
    # Of mixed experts, the sums of their kernels come on top: arXiv 1904.04971, section 3.
    mixing = block.num_experts * kernels + routing
    macs = pixels * expand + out_pixels * (taps * inside + project) + gate + mixing
    return params, block.expand_filters + inside + block.filters_out, macs


def _block_layers(block: Block, drops: bool) -> tuple[int, int]:
    """Number of layers: ours, and as keras.applications builds such a block."""
    shared = 5 if block.operator == "fused" else 5 + 3 * bool(block.expand_filters) + 2 * bool(block.num_experts)
    ours = shared + 4 * bool(block.se_filters) + 2 * block.residual
    # It pads strided convolutions by a layer, reshapes in squeeze-and-excite, and has no dropout layer for a rate of 0.
    theirs = shared + 5 * bool(block.se_filters) + block.residual * (1 + drops) + (block.strides > 1)
    return ours, theirs


def _operator(block: Block) -> str:
    name = {"mbconv": "MBConv", "fused": "FusedMBConv"}[block.operator]
    ratio = block.inner_filters / block.filters_in if block.expand_filters else 1
    return f"{'Cond' * bool(block.num_experts)}{name}{ratio:.2g}"


def describe(model: "str | keras.Model") -> dict[str, Any]:
    """What a model is, as data.

    Args:
        model: Name of a model, or a model of this package.

    Returns:
        Dict with

        - `name`, `variant` (None where the blocks are no known model's), `activation`, `dropout_rate`,
          `drop_connect_rate`, `preprocessing` (name of the scheme, None, or a pair);
        - `resolution` ([height, width] in pixels), `channels`, `classes` (None without top);
        - `params` (trainable, as papers count them), `non_trainable_params` (batch-norm statistics), `macs`
          (multiply-adds for one image: of the convolutions, the classifier and, of mixed experts, the routing and the
          sums of kernels; the TPU repository's figures for CondConv, whose B0 has 391 M, are 1.4 % higher);
        - `layers`: without top, `ours` and as `keras_applications` counts them;
        - `stages`, a dict per row of the paper's table: `stage`, `operator`, `resolution` at its input, `channels` at
          its output, `layers`, `kernel_size`, `strides`, and lists of `expand_filters`, `se_filters` and `num_experts`
          per block;
        - `weights`, a dict per published set: `tag`, `top1` and `top5` in per cent (None where not published),
          `preprocessing`, `source`, `publisher` (`"tpu"` or `"timm"`), and whether it is the `default`, which
          `weights="imagenet"` means.

    Raises:
        ValueError: If the model is unknown, or not of this package.

    Example:

    >>> import keras_effnet as ke
    >>> b0 = ke.describe("efficientnet-b0")
    >>> b0["params"], b0["macs"], b0["layers"]["keras_applications"]
    (5288548, 385814752, 237)

    Reference:
        arXiv 1905.11946, tables 1 and 2.
    """
    from keras_effnet.weights import registry

    if isinstance(model, str):
        one_of("model", model, VARIANTS)
        row = VARIANTS[model]
        architecture, size, channels, classes = resolve(row), (row.resolution,) * 2, 3, 1000
        variant, preprocessing = model, row.preprocessing
    else:
        from keras_effnet import blocks

        reading = blocks.read(model)
        architecture, channels, classes = reading.architecture, reading.channels, reading.classes
        variant = identify(architecture.blocks)
        usual = VARIANTS[variant].resolution if variant else None
        size = tuple(side or usual for side in reading.size)
        preprocessing = scheme_of(reading.scale, reading.offset)
    known_size: Any = size if None not in size else None
    stages = list(_stages(architecture, known_size, channels, classes))
    params, norms, macs = _total(stages)
    ours, theirs = (sum(stage["_layers"][side] for stage in stages) for side in (0, 1))
    return {
        "name": architecture.name,
        "variant": variant,
        "resolution": list(known_size) if known_size else None,
        "channels": channels,
        "classes": classes,
        "params": params + 2 * norms,
        "non_trainable_params": 2 * norms,
        "macs": macs if known_size else None,
        "layers": {"ours": ours, "keras_applications": theirs},
        "activation": architecture.activation,
        "dropout_rate": architecture.dropout_rate,
        "drop_connect_rate": architecture.drop_connect_rate,
        "preprocessing": preprocessing,
        "stages": [{key: value for key, value in stage.items() if not key.startswith("_")} for stage in stages],
        "weights": [
            {
                "tag": record.tag,
                "top1": record.top1,
                "top5": record.top5,
                "preprocessing": record.preprocessing,
                "source": record.source,
                "publisher": record.publisher,
                "default": record.default,
            }
            for record in (registry.of_model(variant) if variant else ())
        ],
    }


def costs(architecture: Architecture, size: tuple[int, int], channels: int, classes: int | None) -> dict[str, int]:
    """What a network costs, as `describe()` counts it.

    Args:
        architecture: An `Architecture`.
        size: Tuple of the input's height and width.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.

    Returns:
        Dict of `params` (trainable) and `macs` (multiply-adds for one image).

    Example:

    >>> costs(resolve(VARIANTS["efficientnet-b0"]), (224, 224), 3, 1000)
    {'params': 5288548, 'macs': 385814752}
    """
    params, norms, macs = _total(_stages(architecture, size, channels, classes))
    return {"params": params + 2 * norms, "macs": macs}


def _total(stages) -> tuple[int, int, int]:
    rows = [(stage["_params"], stage["_norms"], stage["_macs"]) for stage in stages]
    params, norms, macs = map(sum, zip(*rows, strict=True))
    return params, norms, macs


def _stages(architecture: Architecture, size, channels: int, classes: int | None):
    """Rows of the paper's table 1: stem, stages, head. Keys that begin with _ are summed up by `describe()`."""
    known, size = size is not None, size or (0, 0)

    def row(stage, operator, filters, layers, kernel_size, strides, **more):
        shown = {"stage": stage, "operator": operator, "resolution": list(size) if known else None, "channels": filters}
        return {**shown, "layers": layers, "kernel_size": kernel_size, "strides": strides, **more}

    filters = architecture.stem_filters
    params, after = 9 * channels * filters, _halved(size, 2)
    cost = {"_params": params, "_norms": filters, "_macs": math.prod(after) * params, "_layers": (5, 7)}
    yield row(1, "Conv3x3", filters, 1, 3, 2, **cost)
    size = after
    rates = iter(architecture.drop_connect_rates)
    for number, group in groupby(architecture.blocks, key=lambda block: block.stage):
        members, leaving, costs = list(group), size, []
        for block in members:
            costs.append((*_block_cost(block, leaving), *_block_layers(block, next(rates) > 0)))
            leaving = _halved(leaving, block.strides)
        params, norms, macs, ours, theirs = map(sum, zip(*costs, strict=True))
        first = members[0]
        yield row(
            number + 1,
            _operator(first),
            first.filters_out,
            len(members),
            first.kernel_size,
            first.strides,
            expand_filters=[block.expand_filters for block in members],
            se_filters=[block.se_filters for block in members],
            num_experts=[block.num_experts for block in members],
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


_COLOURS = {1: "#8c8c8c", 3: "#3b76af", 5: "#c8553d"}  # by kernel size
_SUFFIXES = (".svg", ".png", ".pdf")


def plot(models: "str | keras.Model | list[str | keras.Model]", path: str | os.PathLike) -> Path:
    """Draws a block diagram: stem, each stage as a row of its blocks, head; several models side by side.

    Args:
        models: Name of a model, a model of this package, or a list of them.
        path: Path of the picture, which ends in .svg, .png or .pdf. Its folder exists.

    Returns:
        The path.

    Raises:
        ValueError: If a model is unknown, or the path ends otherwise.
        OSError: If the picture cannot be written.

    Example:

    >>> import tempfile, keras_effnet as ke
    >>> ke.plot(["efficientnet-b0", "efficientnet-b1"], f"{tempfile.mkdtemp()}/b0-b1.svg").name
    'b0-b1.svg'
    """
    models = list(models) if isinstance(models, list | tuple) else [models]
    if not models:
        raise ValueError("Expected one model or more. Received: models=[]")
    path = Path(path)
    _check_picture(path)
    descriptions = [describe(model) for model in models]
    figures = figure_class()

    box = 0.5 if len(models) == 1 else 0.19  # inches
    widths = [
        max(2.1, box * max(stage["layers"] for stage in description["stages"])) + 0.25 for description in descriptions
    ]
    width = max(sum(widths) + 0.2, 3.6)
    height = 0.62 * max(len(description["stages"]) for description in descriptions) + 1.3
    figure = figures(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    left = 0.2
    for description, column in zip(descriptions, widths, strict=True):
        _draw(axes, description, left, box)
        left += column
    for place, (kernel_size, label) in enumerate({3: "kernel 3x3", 5: "kernel 5x5", 1: "stem, head"}.items()):
        style = {"color": _COLOURS[kernel_size], "fontsize": 7, "va": "center"}
        axes.text(0.2 + 0.85 * place, height - 0.4, f"■ {label}", **style)
    notes = "px: side of the stage's input. Dark: stride 2." + " In a box: channels inside." * (box > 0.4)
    axes.text(0.2, height - 0.2, notes, color=_COLOURS[1], fontsize=6.5, va="center")
    return _save(figure, path)


def _check_picture(path: Path) -> None:
    if path.suffix.lower() not in _SUFFIXES:
        raise unknown("kind of picture", path.suffix or path.name, _SUFFIXES)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"Expected a folder for the picture. Received: {str(path.parent)!r}, which does not exist"
        )


def figure_class():
    """Matplotlib's figure. An `ImportError` tells where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib, which draws the picture. Bring it with: pip install matplotlib"
        ) from error
    return Figure


def _save(figure, path: Path) -> Path:
    import matplotlib

    # Fixed identifiers and no date: the same call writes the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "keras_effnet"}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


# A line of the picture each: models, tag, colour, and where a point's label stands (in typographic points; None: none).
_LINES = {
    "baseline": (r"efficientnet-(b\d)", "baseline", "#8c8c8c", None),
    "AutoAugment": (r"efficientnet-(b\d)", "autoaugment", "#3b76af", (4, -9)),
    "RandAugment": (r"efficientnet-(b\d)", "randaugment", "#519e3e", None),
    "AdvProp": (r"efficientnet-(b\d)", "advprop", "#8d69b8", None),
    "NoisyStudent (with unlabelled images)": (
        r"efficientnet-(b\d|l2)",
        r"noisy-student(?:-475)?",
        "#c8553d",
        (-12, 4),
    ),
    "Lite": (r"efficientnet-(lite\d)", "baseline", "#d68a2e", (4, -9)),
    "EdgeTPU": (r"efficientnet-edgetpu-([sml])", "baseline", "#3a9c9c", (-9, 3)),
    "CondConv": (r"efficientnet-condconv-b0-(.*)", "baseline", "#b85c9a", (4, -9)),
    "pruned": (r"efficientnet-(b\d)-pruned", ".*", "#222222", (4, -9)),
}


def tradeoff() -> list[dict[str, Any]]:
    """What each published set of weights reaches, and what its model costs.

    Returns:
        List of a dict per set of each model that `create_model()` builds: `model`, `tag`, `top1` in per cent,
        `publisher`, `resolution` in pixels, `params`, and `macs` at that resolution.

    Example:

    >>> rows = tradeoff()
    >>> rows[0]["model"], rows[0]["tag"], rows[0]["top1"]
    ('efficientnet-b0', 'baseline', 76.7)
    """
    from keras_effnet.weights import registry

    rows = []
    for name, variant in VARIANTS.items():
        architecture, params = resolve(variant), describe(name)["params"]
        for record in registry.of_model(name):
            side = record.resolution or variant.resolution
            macs = costs(architecture, (side, side), 3, 1000)["macs"]
            rows.append(
                {
                    "model": name,
                    "tag": record.tag,
                    "top1": record.top1,
                    "publisher": record.publisher,
                    "resolution": side,
                    "params": params,
                    "macs": macs,
                }
            )
    return rows


def plot_tradeoff(path: str | os.PathLike) -> Path:
    """Draws top-1 accuracy over parameters and over multiply-adds, a line per training method.

    Args:
        path: Path of the picture, which ends in .svg, .png or .pdf. Its folder exists.

    Returns:
        The path.

    Raises:
        ValueError: If the path ends otherwise.
        OSError: If the picture cannot be written.

    Example:

    >>> import tempfile
    >>> plot_tradeoff(f"{tempfile.mkdtemp()}/tradeoff.svg").name
    'tradeoff.svg'

    Reference:
        arXiv 1905.11946, figures 1 and 5.
    """
    path = Path(path)
    _check_picture(path)
    figure = figure_class()(figsize=(11, 5.2), layout="constrained")
    rows = tradeoff()
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, unit, label in zip(
        panels, ("params", "macs"), (1e6, 1e9), ("parameters, million", "multiply-adds, billion"), strict=True
    ):
        for title, (models, tag, colour, offset) in _LINES.items():
            chosen = [
                (row[key] / unit, row["top1"], match[1].capitalize())
                for row in rows
                if (match := re.fullmatch(models, row["model"]))
                and re.fullmatch(tag, row["tag"])
                and (row["publisher"] == "tpu" or "pruned" in row["model"])
            ]
            if not chosen:
                continue
            chosen.sort()
            across, up, _ = zip(*chosen, strict=True)
            axes.plot(across, up, "o-", color=colour, markersize=4, linewidth=1.2, label=title)
            for x, y, name in chosen if offset else ():
                axes.annotate(name, (x, y), offset, textcoords="offset points", fontsize=6.5, color=colour)
        ports = [(row[key] / unit, row["top1"]) for row in rows if row["tag"].startswith("tf_")]
        style = {"marker": "x", "color": "#bbbbbb", "s": 10, "linewidths": 0.8, "zorder": 0}
        axes.scatter(*zip(*ports, strict=True), label="timm's ports, as timm measures them", **style)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="#eeeeee", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ImageNet top-1, per cent")
    panels[0].legend(fontsize=7, frameon=False, loc="lower right")
    return _save(figure, path)


def plot_channels(
    whole: Mapping[str, Sequence[int]], pruned: Mapping[str, Sequence[int]], path: str | os.PathLike
) -> Path:
    """Draws how many channels of each block a pruned net keeps.

    Args:
        whole: Dict from a block's name to `(expand, se, out)`, as `Architecture.widths`.
        pruned: Likewise, of the pruned net.
        path: Path of the picture, which ends in .svg, .png or .pdf. Its folder exists.

    Returns:
        The path.

    Raises:
        ValueError: If the path ends otherwise.
        OSError: If the picture cannot be written.

    Example:

    >>> import tempfile
    >>> b1, pruned = (resolve(VARIANTS[name]).widths for name in ("efficientnet-b1", "efficientnet-b1-pruned"))
    >>> plot_channels(b1, pruned, f"{tempfile.mkdtemp()}/channels.png").name
    'channels.png'
    """
    path = Path(path)
    _check_picture(path)
    figure = figure_class()(figsize=(max(6, 0.36 * len(whole)), 4.6), layout="constrained")
    places = range(len(whole))
    for axes, column, title, colour in zip(
        figure.subplots(2, 1, sharex=True),
        (0, 2),
        ("inside (expansion)", "out"),
        (_COLOURS[3], _COLOURS[5]),
        strict=True,
    ):
        before, after = ([widths[column] for widths in net.values()] for net in (whole, pruned))
        axes.bar(places, before, color="#dddddd", label="removed")
        axes.bar(places, after, color=colour, label="kept")
        for place, (full, left) in enumerate(zip(before, after, strict=True)):
            if full:
                axes.annotate(
                    f"{left / full:.0%}", (place, full), (0, 2), textcoords="offset points", ha="center", fontsize=6.5
                )
        axes.set_ylabel(f"channels {title}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        axes.set_xticks(places, whole)
    return _save(figure, path)


def _draw(axes, description: dict, left: float, box: float) -> None:
    """One model's column: a title, then a caption and a row of boxes per stage. The channels give a box its height."""
    from matplotlib.patches import Rectangle

    macs = "" if description["macs"] is None else f", {description['macs'] / 1e9:.2f} G multiply-adds"
    axes.text(left, 0.28, description["name"], fontsize=10, weight="bold", va="center")
    axes.text(left, 0.5, f"{description['params'] / 1e6:.1f} M parameters{macs}", fontsize=6.5, va="center")
    for number, stage in enumerate(description["stages"]):
        top = 0.9 + 0.62 * number
        side = "" if stage["resolution"] is None else f", {stage['resolution'][0]} px"
        kernel = f" {stage['kernel_size']}x{stage['kernel_size']}" if "MBConv" in stage["operator"] else ""
        operator = stage["operator"].split(" &")[0]
        axes.text(
            left, top - 0.09, f"{operator}{kernel}, {stage['channels']} channels{side}", fontsize=6.5, va="center"
        )
        colour = _COLOURS[stage["kernel_size"] if "MBConv" in stage["operator"] else 1]
        tall = min(0.36, 0.08 + 0.026 * math.log2(stage["channels"]))
        for index in range(stage["layers"]):
            strided = index == 0 and stage["strides"] > 1
            place = (left + index * box, top)
            axes.add_patch(
                Rectangle(place, box * 0.86, tall, facecolor=colour, alpha=1.0 if strided else 0.55, edgecolor="none")
            )
            if box > 0.4 and "expand_filters" in stage:
                inside = stage["expand_filters"][index] or "-"
                ink = "white" if strided else "black"
                axes.text(
                    left + (index + 0.43) * box,
                    top + tall / 2,
                    inside,
                    color=ink,
                    fontsize=6.5,
                    ha="center",
                    va="center",
                )

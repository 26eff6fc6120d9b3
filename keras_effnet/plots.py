"""Plots of models: block diagrams, accuracy over cost of all weights, and the channels that pruning keeps."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.describe import describe
from keras_effnet.errors import unknown
from keras_effnet.nets.params_and_macs import costs
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS

if TYPE_CHECKING:
    import keras

_COLORS = {1: "#8c8c8c", 2: "#d68a2e", 3: "#3b76af", 5: "#c8553d"}  # by kernel size

_SUFFIXES = (".svg", ".png", ".pdf")

# Lines of `plot_tradeoff()`: models, tag, color, and offset of the labels (in typographic points; None: no labels).
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
    "V2": (r"efficientnetv2-(\w+)", "1k", "#6b4f2a", (-12, 4)),
    "V2, from ImageNet-21k": (r"efficientnetv2-(\w+)", "21k-ft1k", "#c7a17a", None),
    "pruned": (r"efficientnet-(b\d)-pruned", ".*", "#222222", (4, -9)),
}


def plot(models: "str | os.PathLike | keras.Model | list", path: str | os.PathLike) -> Path:
    """Draws a block diagram: stem, a row of blocks per stage, and head. Several models are drawn side by side.

    Args:
        models: A model, see `describe()`, or a list of models.
        path: Path of the picture, which ends in .svg, .png or .pdf. Its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: If a model is unknown, or the path has another ending.
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
        style = {"color": _COLORS[kernel_size], "fontsize": 7, "va": "center"}
        axes.text(0.2 + 0.85 * place, height - 0.4, f"■ {label}", **style)
    notes = "px: side of the stage's input. Dark: stride 2." + " In a box: channels inside." * (box > 0.4)
    axes.text(0.2, height - 0.2, notes, color=_COLORS[1], fontsize=6.5, va="center")
    return _save(figure, path)


def tradeoff() -> list[dict[str, Any]]:
    """Lists the accuracy of all published weights and the cost of their models.

    Returns:
        List of dicts, one per set of weights of each model that `create_model()` builds: `model`, `tag`, `top1` in
        percent, `publisher`, `resolution` in pixels, `params`, and `macs` at that resolution.

    Example:

    >>> rows = tradeoff()
    >>> rows[0]["model"], rows[0]["tag"], rows[0]["top1"]
    ('efficientnet-b0', 'efficientnet_b0.ra4_e3600_r224_in1k', 79.364)
    """
    from keras_effnet.weights import registry

    rows = []
    for name, variant in VARIANTS.items():
        architecture, params = resolve(variant), describe(name)["params"]
        for record in registry.of_model(name):
            if record.top1 is None:
                continue
            side = record.resolution
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
    """Draws top-1 accuracy over parameters and over multiply-adds, with a line per training method.

    Args:
        path: Path of the picture, which ends in .svg, .png or .pdf. Its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: If the path has another ending.
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
        for title, (models, tag, color, offset) in _LINES.items():
            chosen = [
                (row[key] / unit, row["top1"], match[1].capitalize())
                for row in rows
                if (match := re.fullmatch(models, row["model"]))
                and re.fullmatch(tag, row["tag"])
                and (row["publisher"] != "timm" or "pruned" in row["model"])
            ]
            if not chosen:
                continue
            chosen.sort()
            across, up, _ = zip(*chosen, strict=True)
            axes.plot(across, up, "o-", color=color, markersize=4, linewidth=1.2, label=title)
            for x, y, name in chosen if offset else ():
                axes.annotate(name, (x, y), offset, textcoords="offset points", fontsize=6.5, color=color)
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
        whole: Dict from block name to `(expand, se, out)`, as in `Architecture.widths`.
        pruned: The same for the pruned net.
        path: Path of the picture, which ends in .svg, .png or .pdf. Its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: If the path has another ending.
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
    for axes, column, title, color in zip(
        figure.subplots(2, 1, sharex=True),
        (0, 2),
        ("inside (expansion)", "out"),
        (_COLORS[3], _COLORS[5]),
        strict=True,
    ):
        before, after = ([widths[column] for widths in net.values()] for net in (whole, pruned))
        axes.bar(places, before, color="#dddddd", label="removed")
        axes.bar(places, after, color=color, label="kept")
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


def figure_class():
    """Returns Matplotlib's class `Figure`.

    Returns:
        A class.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib, which draws the picture. Install it with: pip install matplotlib"
        ) from error
    return Figure


def _check_picture(path: Path) -> None:
    if path.suffix.lower() not in _SUFFIXES:
        raise unknown("kind of picture", path.suffix or path.name, _SUFFIXES)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"Expected a folder for the picture. Received: {str(path.parent)!r}, which does not exist"
        )


def _draw(axes, description: dict, left: float, box: float) -> None:
    """Draws the column of a model: a title, then a caption and boxes per stage. The height of a box shows channels."""
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
        color = _COLORS[stage["kernel_size"] if "MBConv" in stage["operator"] else 1]
        tall = min(0.36, 0.08 + 0.026 * math.log2(stage["channels"]))
        for index in range(stage["layers"]):
            strided = index == 0 and stage["strides"] > 1
            place = (left + index * box, top)
            axes.add_patch(
                Rectangle(place, box * 0.86, tall, facecolor=color, alpha=1.0 if strided else 0.55, edgecolor="none")
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


def _save(figure, path: Path) -> Path:
    import matplotlib

    # Fixed identifiers and no date: the same call writes the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "keras_effnet"}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path

"""Writes a training run as one HTML file: curves, accuracy, augmented images and mistakes."""

import base64
import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any
from unicodedata import east_asian_width

import numpy as np
import tensorflow as tf

from keras_effnet.images.decoding import decode_image
from keras_effnet.inference.map_pictures import overlay
from keras_effnet.plots import figure_class
from keras_effnet.tpu.config import Recipe
from keras_effnet.tpu.input import mixing
from keras_effnet.tpu.input.crops import train_crop
from keras_effnet.tpu.input.example_readers import viewed
from keras_effnet.tpu.input.pipeline import changed, keys
from keras_effnet.tpu.input.sources import Source
from keras_effnet.tpu.reports.evaluation import evaluate_run
from keras_effnet.tpu.reports.run_folder import configuration, open_run
from keras_effnet.tpu.reports.scoring import ClassScores, Scores, png
from keras_effnet.tpu.resume import cloud_files

MISTAKES = 24  # images
SKIPPED = 20  # names
ORIGINALS, EPOCHS, MIXED = 4, 5, 2  # rows and columns of the grid of augmented images
POINTS = 1500  # of a curve
SIDE = 192  # pixels of an image on the page
LABELLED = 30  # classes of a confusion matrix with names
LETTERS = 20  # of such a name

_COLORS = {"train": "#8a8f98", "raw": "#d97706", "average": "#2f81c7"}  # readable on white and on black


def write(workdir: str | os.PathLike, examples: int = 2000) -> str:
    """Writes the report of a run, finished, running or killed. Changes nothing else in its folder.

    Args:
        workdir: Path of the run's folder, which may be on Cloud Storage (`gs://`).
        examples: Integer, maximum number of evaluation examples to search for mistakes. Defaults to 2000.

    Returns:
        String, path of the report: `report.html` in the folder.

    Raises:
        ValueError: If the folder is not that of a run.

    Example:

    >>> from keras_effnet.tpu.reports import html_report as report
    >>> report.write("runs/digits")  # doctest: +SKIP
    'runs/digits/report.html'
    """
    workdir = os.fspath(workdir).rstrip("/")
    recipe, resolved = configuration(workdir)
    rows = [_comparable(row) for row in cloud_files.rows(f"{workdir}/metrics.jsonl")]
    page = _page(
        f"{recipe.model.name} on {os.path.basename(recipe.data.source.rstrip('/'))}",
        [_head(workdir, recipe, resolved, rows), *_body(workdir, recipe, resolved, rows, examples)],
    )
    path = f"{workdir}/report.html"
    try:
        cloud_files.write(path, page)
    except tf.errors.OpError as error:
        raise OSError(f"Could not write {path!r}: {error.message}") from error
    return path


def _comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row whose loss has no weight decay, as in evaluations. Rows of earlier versions only have the other."""
    return row | {"loss": row["data_loss"]} if "data_loss" in row else row


def _body(workdir: str, recipe: Recipe, resolved: dict, rows: list[dict], examples: int) -> Iterable[str]:
    yield _section("Curves", lambda: _curves(rows))
    size = resolved.get("image_size") or recipe.image_size
    opened: list[Source] = []

    def source() -> Source:
        if not opened:
            opened.append(open_run(workdir, recipe))
        return opened[0]

    yield _section("Training images", lambda: _augmented(source(), recipe, size, resolved.get("classes")))
    scored: list[tuple[Scores, list[str], str]] = []

    def mistakes() -> str:
        scored.append(evaluate_run(workdir, source(), examples, MISTAKES))
        scores, names, origin = scored[0]
        return _mistakes(scores, names, origin, source().eval_count)

    yield _section("Most confident mistakes", mistakes)
    if scored:
        yield _section("Confusion matrix", lambda: _confusion_matrix(scored[0][0], scored[0][1]))
        yield _section("Classes", lambda: _classes(scored[0][0], scored[0][1]))
    yield _section("Unreadable images", lambda: _skipped(workdir, scored[0][0].skipped if scored else []))
    text = escape(tf.io.gfile.GFile(f"{workdir}/config.json").read())
    yield f"<details><summary>Configuration</summary><pre>{text}</pre></details>"


def _section(title: str, make: Callable[[], str]) -> str:
    try:
        inside = make()
    except Exception as error:  # whatever libraries raise: the page shows why this section is missing, and the others
        reason = re.sub(r"{{.*?}} *", "", str(getattr(error, "message", error)))  # TensorFlow's names of its graphs
        inside = f'<p class="lacking">{escape(" ".join(reason.split())[:600] or type(error).__name__)}</p>'
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    def cells(kind: str, values) -> str:
        return "".join(
            f"<{kind}{' class=right' * (place in right)}>{escape(str(value))}</{kind}>"
            for place, value in enumerate(values)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', columns)}</tr></thead>" if any(columns) else ""
    return f'<div class="wide"><table>{head}<tbody>{lines}</tbody></table></div>'


def _head(workdir: str, recipe: Recipe, resolved: dict, rows: list[dict]) -> str:
    done, total = max((row["step"] for row in rows), default=0), resolved.get("steps")
    finished = tf.io.gfile.exists(f"{workdir}/result.json")
    path = f"{workdir}/metrics.jsonl" if rows else f"{workdir}/config.json"
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(tf.io.gfile.stat(path).mtime_nsec / 1e9))
    state = "Finished" if finished else "Not finished"
    early = json.loads(tf.io.gfile.GFile(f"{workdir}/result.json").read()).get("stopped_early") if finished else None
    steps = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    facts = [
        f"{recipe.epochs:g} epochs, batch size {recipe.batch_size:,}" if total else "",  # chosen with the steps
        f"seed {recipe.run.seed}",
        early or "",
        f"recipe from {recipe.source}" if recipe.source else "",
    ]
    share = f'<progress max="{total}" value="{done}"></progress>' if total and not finished else ""
    title = f"{escape(recipe.model.name)} <small>on {escape(recipe.data.source)}</small>"
    return (
        f"<header><h1>{title}</h1><p><b class={'done' if finished else 'open'}>{state}</b> {steps}, last updated "
        f"{written}.</p>{share}<p class=quiet>{escape(', '.join(fact for fact in facts if fact))}</p></header>"
        f"{_section('Results', lambda: _numbers(recipe, rows))}"
    )


def _numbers(recipe: Recipe, rows: list[dict]) -> str:
    evaluated = [row for row in rows if row.get("split") == "eval"]
    trained = [row for row in rows if row.get("split") == "train"]
    if not evaluated:
        loss = f"Training loss {trained[-1]['loss']:.4g} at step {trained[-1]['step']:,}. " if trained else ""
        return f"<p>{loss}No evaluation yet.</p>"
    last, best = evaluated[-1], max(evaluated, key=lambda row: row.get("ema_top1", 0))

    def number(name: str, form: str) -> str:
        return form.format(last[name]) if name in last else ""

    cells = [
        (title, number(f"ema_{name}", form), number(name, form))
        for title, name, form in (("top-1", "top1", "{:.2%}"), ("top-5", "top5", "{:.2%}"), ("loss", "loss", "{:.4g}"))
    ]
    tiles = [("top-1, moving average", cells[0][1]), ("best so far", f"{best.get('ema_top1', 0):.2%}")]
    if recipe.expected_top1:
        tiles.append(("published", f"{recipe.expected_top1:g}%"))
    if trained and "images_per_second" in trained[-1]:
        tiles.append(("images/s", f"{trained[-1]['images_per_second']:,.0f}"))
    shown = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in tiles)
    of = f"Step {last['step']:,}, {last.get('examples', 0):,.0f} examples. Best at step {best['step']:,}."
    return (
        f'<div class="tiles">{shown}</div>'
        f"{_table(['', 'moving average', 'raw weights'], cells, right=(1, 2))}<p class=quiet>{of}</p>"
    )


def _curves(rows: list[dict]) -> str:
    if not rows:
        return "<p>No metrics yet.</p>"
    lines = {
        "loss": [("train", "loss", "train"), ("eval", "loss", "raw"), ("eval", "ema_loss", "average")],
        "top-1": [("train", "top1", "train"), ("eval", "top1", "raw"), ("eval", "ema_top1", "average")],
        "top-5": [("train", "top5", "train"), ("eval", "top5", "raw"), ("eval", "ema_top5", "average")],
        "learning rate": [("train", "learning_rate", "train")],
    }
    drawn = "".join(f"<figure>{_svg(title, some, rows)}</figure>" for title, some in lines.items())
    marks = (("train", "training"), ("average", "evaluation, moving average"), ("raw", "evaluation, raw weights"))
    legend = "".join(f'<span><i style="background:{_COLORS[name]}"></i>{text}</span>' for name, text in marks)
    return f'<p class="legend">{legend}</p><div class="curves">{drawn}</div>'


def _svg(title: str, lines, rows: list[dict]) -> str:
    figures = figure_class()
    from matplotlib import rc_context, ticker

    # Text stays text, so that it takes the page's font and color. The salt makes ids unique across the page's figures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = figures(figsize=(4.8, 2.7), layout="constrained")
        axes = figure.subplots()
        drawn = []
        for split, name, color in lines:
            points = [(row["step"], row[name]) for row in rows if row.get("split") == split and name in row]
            points = points[:: -(-len(points) // POINTS)] if points else []
            if not points:
                continue
            style = {"marker": "o", "markersize": 2.5} if len(points) < 40 else {}
            axes.plot(*zip(*points, strict=True), color=_COLORS[color], linewidth=1.4, **style)
            drawn += [value for _, value in points]
        if title == "loss" and drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
            axes.set_yscale("log")
        if title.startswith("top"):
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axes.tick_params(color="#888888")
        axes.grid(color="#888888", alpha=0.25, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color="#888888")
        return _embedded(figure, title)


def _embedded(figure, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _picture(pixels: np.ndarray, alt: str) -> str:
    """Embeds an image in the page. A small one is enlarged without smoothing."""
    from PIL import Image

    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    image = Image.fromarray(pixels)
    small = max(image.size) < SIDE // 2
    if small:
        kind, content = "png", png(pixels)
    else:
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        kind, content = "jpeg", file.getvalue()
    data = base64.b64encode(content).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{" class=small" * small} {size} alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def samples(source: Source, recipe: Recipe, size: int, count: int, epochs: int) -> list[dict[str, Any]]:
    """Returns training images, unchanged and as the run sees them in its first epochs.

    Args:
        source: `Source`.
        recipe: `Recipe`.
        size: Integer, side of an image in pixels.
        count: Integer, number of images.
        epochs: Integer, number of epochs.

    Returns:
        List of dicts: `name`, `label`, `original` (uint8 pixels in the original size), `seen` (an array of pixels for
        each epoch) and `keys` (from which mixing draws, for each epoch).
    """
    examples = source.train

    def one(content, number, epoch):
        cropping, changing, mixing = keys(recipe.run.seed, epoch, number)
        image = train_crop(content, size, recipe.data, recipe.augment, cropping)
        return changed(image, recipe.data, recipe.augment, changing), mixing

    see, found = tf.function(one, autograph=False), []
    for row in examples.sample(2 * count):  # some may be unreadable
        content = examples.load(row["image"], python=False)
        try:
            value = content.numpy()
            content = tf.constant(viewed(value)) if isinstance(value, bytes) else content
            original = decode_image(value) if isinstance(value, bytes) else value
            seen = [see(content, row["id"], tf.constant(epoch, tf.int64)) for epoch in range(epochs)]
        except (OSError, ValueError, tf.errors.InvalidArgumentError):
            continue
        found.append(
            {
                "name": row["name"].numpy().decode(errors="replace"),
                "label": int(row["label"]),
                "original": original,
                "seen": [image.numpy() for image, _ in seen],
                "keys": [key.numpy() for _, key in seen],
            }
        )
    # Evenly spaced, because a folder's examples come class by class.
    return found[:: max(1, len(found) // count)][:count]


def _augmented(source: Source, recipe: Recipe, size: int, classes: int | None) -> str:
    rows = samples(source, recipe, size, ORIGINALS, EPOCHS)
    if not rows:
        return "<p>None of the sampled images could be read.</p>"
    how, mixed = recipe.augment, []
    if how.mixup or how.cutmix:
        labels = tf.one_hot([row["label"] for row in rows], classes or recipe.data.classes or source.classes)
        for epoch in range(MIXED):
            images, keys = (np.stack([row[name][epoch] for row in rows]) for name in ("seen", "keys"))
            mixed.append(mixing.mix(images, labels, keys, mixup_alpha=how.mixup, cutmix_alpha=how.cutmix)[0].numpy())
    heads = [
        "original",
        *(f"epoch {n + 1}" for n in range(EPOCHS)),
        *(f"epoch {n + 1}, mixed" for n in range(MIXED if mixed else 0)),
    ]
    cells = [f"<span>{escape(head)}</span>" for head in heads]
    for place, row in enumerate(rows):
        label = source.labels[row["label"]] if row["label"] < len(source.labels) else row["label"]
        seen = [row["original"], *row["seen"], *(batch[place] for batch in mixed)]
        pixels = [np.clip(np.rint(image), 0, 255).astype("uint8") for image in seen]
        cells += [_picture(image, f"{label}: {head}") for image, head in zip(pixels, heads, strict=True)]
    steps = [
        f"random crop of at least {how.min_area:.0%} of the area" if how.crop == "inception" else "center crop",
        "horizontal flip" if how.flip else "",
        {"none": "", "autoaugment": "AutoAugment", "randaugment": f"RandAugment {how.layers}x{how.magnitude:g}"}[
            how.policy
        ],
        f"erasing {how.erase:g}" if how.erase else "",
        f"mixup {how.mixup:g}" if how.mixup else "",
        f"cutmix {how.cutmix:g}" if how.cutmix else "",
    ]
    caption = f"{', '.join(step for step in steps if step)}; {size}x{size} pixels."
    if mixed:
        caption += " Mixed: with another of these images, as in a batch."
    return (
        f"<p class=quiet>{escape(caption)}</p>"
        f'<div class="seen" style="grid-template-columns:repeat({len(heads)},minmax(3.6rem,1fr))">'
        f"{''.join(cells)}</div>"
    )


def _mistakes(scores: Scores, names: list[str], origin: str, total: int) -> str:
    count, wrong = len(scores.names), int((~scores.hits).sum())
    of = "" if count + len(scores.skipped) >= total else f", sampled from {total:,},"
    caption = (
        f"{wrong:,} of {count:,} examples{of} are wrong: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, with the "
        f"moving average in {origin}. The images are shown as the network sees them."
    )
    if any(mistake.map is not None for mistake in scores.mistakes):
        caption += " Beside each, the places that support the predicted class: the brighter, the more they add to it."
    cards = []
    for mistake in scores.mistakes:
        name, place = scores.names[mistake.place], mistake.place
        true, said = names[scores.labels[place]], names[scores.classes[place, 0]]
        pictures = _picture(mistake.pixels, f"{true}, predicted as {said}")
        if mistake.map is not None:
            pictures += _picture(overlay(mistake.pixels, mistake.map), f"Places that support {said}")
        cards.append(
            f'<figure class="card"><div>{pictures}</div><figcaption>'
            f"<b>{escape(said)}</b>, {scores.probabilities[place, 0]:.1%}<br>label: {escape(true)}<br>"
            f'<small title="{escape(name)}">{escape(os.path.basename(name))}</small></figcaption></figure>'
        )
    return f'<p class="quiet">{escape(caption)}</p><div class="cards">{"".join(cards)}</div>'


def _confusion_matrix(scores: Scores, names: list[str]) -> str:
    present, counts = scores.matrix()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Faint enough for text on it, on white and on black, and even a single confusion is visible.
    colors = np.zeros((*shares.shape, 4))
    colors[..., :3] = [int(_COLORS["average"][place : place + 2], 16) / 255 for place in (1, 3, 5)]
    colors[..., 3] = np.where(shares > 0, 0.12 + 0.6 * shares, 0)
    caption = f"{len(present)} classes: a row for each label, a column for each prediction, in percent of the row."
    if len(present) <= LABELLED:
        picture = _labelled_matrix(shares, colors, [names[number] for number in present])
    else:
        picture = _plain_matrix(colors)
        caption += " The classes are in the order of their numbers. Correct predictions are on the diagonal."
    return f'<p class="quiet">{caption}</p><div class="wide matrix">{picture}</div>'


def _labelled_matrix(shares: np.ndarray, colors: np.ndarray, names: Sequence[str]) -> str:
    figures = figure_class()
    from matplotlib import rc_context

    count, cell = len(names), 0.34  # inches
    short = [name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name in names]
    margin = 0.15 + 0.07 * max(sum(2 if east_asian_width(letter) in "FW" else 1 for letter in name) for name in short)
    side = margin + cell * count
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "confusion matrix", "font.size": 8, "text.parse_math": False}
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        figure = figures(figsize=(side, side))
        axes = figure.add_axes((margin / side, 0, cell * count / side, cell * count / side))
        axes.imshow(colors, interpolation="nearest", aspect="auto")
        for row, column in np.argwhere(shares > 0):
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(count), short, rotation=90)
        axes.set_yticks(range(count), short)
        axes.set_xticks(np.arange(0.5, count - 1), minor=True)
        axes.set_yticks(np.arange(0.5, count - 1), minor=True)
        axes.grid(which="minor", color="#888888", alpha=0.25, linewidth=0.6)
        axes.tick_params(which="both", length=0, top=True, labeltop=True, labelbottom=False)
        axes.spines[:].set_color("#888888")
        return _embedded(figure, "confusion matrix")


def _plain_matrix(colors: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.rint(255 * colors).astype("uint8")).save(file, "PNG")
    side = max(600, len(colors))
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{side}" height="{side}"'
    return f'<img class="small" {size} alt="confusion matrix" src="data:image/png;base64,{data}">'


def _classes(scores: Scores, names: list[str]) -> str:
    confusions = _table(
        ["class", "predicted as", "examples"],
        [(names[true], names[said], often) for true, said, often in scores.confusions()],
        right=(2,),
    )
    worst = sorted(scores.per_class(), key=lambda one: (one.f1, -one.support))

    def line(one: ClassScores) -> str:
        precision = "" if one.precision is None else f"{one.precision:.1%}"
        cells = (one.support, precision, f"{one.recall:.1%}", f"{one.f1:.1%}")
        return (
            f"<tr><td>{escape(names[one.number])}</td>{''.join(f'<td class=right>{cell}</td>' for cell in cells)}"
            f'<td class="bar"><i style="width:{100 * one.f1:.1f}%"></i></td></tr>'
        )

    def lines(some) -> str:
        return "".join(map(line, some))

    heads = ("support", "precision", "recall", "F1")
    head = f"<tr><th>class</th>{''.join(f'<th class=right>{head}</th>' for head in heads)}<th></th></tr>"
    first = f'<div class="wide classes"><table>{head}{lines(worst[:20])}</table></div>'
    rest = ""
    if worst[20:]:
        rest = f'<details><summary>{len(worst) - 20} more</summary><div class="wide classes"><table>{head}'
        rest += f"{lines(worst[20:])}</table></div></details>"
    return (
        f'<div class="halves"><div><h3>Lowest F1</h3>{first}{rest}</div>'
        f"<div><h3>Most frequent confusions</h3>{confusions}</div></div>"
    )


def _skipped(workdir: str, evaluated: Sequence[str]) -> str:
    rows = [row for path in tf.io.gfile.glob(f"{workdir}/skipped-*.jsonl") for row in cloud_files.rows(path)]
    names = list(dict.fromkeys([*(row["name"] for row in rows), *evaluated]))
    if not names:
        return "<p>All images could be read.</p>"
    more = f" The first {SKIPPED}:" if len(names) > SKIPPED else ""
    listed = "".join(f"<li>{escape(name)}</li>" for name in names[:SKIPPED])
    return f"<p>{len(names):,} image{'s' * (len(names) > 1)} could not be read.{more}</p><ul>{listed}</ul>"


# Lets the browser block all requests.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #666c75; --back: #fff; --card: #f5f6f8; --line: #e1e4e8;
  --blue: #2f81c7; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6eb; --quiet: #9aa1ab; --back: #15171a; --card: #1f2226;
  --line: #343a41; --warn: #f0a44b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; } h1 small { font-weight: 400; color: var(--quiet); }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: .5rem 0; }
p { margin: .4rem 0; } .quiet, figcaption { color: var(--quiet); font-size: .87rem; }
.done, .open { padding: .1rem .55rem; border-radius: 1rem; color: #fff; font-size: .8rem; background: #2e7d4f; }
.open { background: var(--quiet); } progress { width: 100%; accent-color: var(--blue); }
.lacking { border-left: 3px solid var(--warn); padding: .4rem .8rem; background: var(--card); }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); margin: 0 0 1rem; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; color: var(--quiet);
  font-size: .82rem; } .tiles b { display: block; font-size: 1.45rem; color: var(--text); line-height: 1.3; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--quiet); font-weight: 500; font-size: .85rem; }
td, th { padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line); }
.right { text-align: right; white-space: nowrap; }
.bar { width: 7rem; padding-right: 0; } .bar i { display: block; height: .55rem; border-radius: .2rem;
  background: var(--blue); min-width: 1px; }
.classes td:first-child { min-width: 5rem; }
@media (max-width: 30rem) { .bar { display: none; } .classes td, .classes th { padding-right: .7rem; } }
.halves { display: grid; gap: 1rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; } .curves { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.curves svg { width: 100%; height: auto; display: block; }
.curves text { fill: currentColor !important; font-family: inherit !important; }
.matrix text { fill: currentColor !important; font-family: inherit !important; } .matrix svg { display: block; }
.legend span { margin-right: 1.2rem; font-size: .87rem; white-space: nowrap; } .legend i { display: inline-block;
  width: 1.1rem; height: .22rem; border-radius: 2px; margin-right: .4rem; vertical-align: middle; }
img { display: block; max-width: 100%; height: auto; border-radius: .25rem; background: var(--card); }
.small { image-rendering: pixelated; }
.seen { display: grid; gap: .4rem; align-items: center; overflow-x: auto; } .seen img { width: 100%; }
.seen span { color: var(--quiet); font-size: .78rem; text-align: center; line-height: 1.2; }
.cards { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); margin-top: .8rem; }
.card div { display: grid; gap: .3rem; grid-template-columns: 1fr 1fr; }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain; }
.card figcaption { line-height: 1.35; margin-top: .3rem; }
.card b { color: var(--text); } details { margin-top: 1.5rem; } summary { cursor: pointer; color: var(--quiet); }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: .5rem; font-size: .8rem; }
"""


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )

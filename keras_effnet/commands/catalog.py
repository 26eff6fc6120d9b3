"""`keras-effnet list`, `describe` and `plot`: the models and weights, and their structure."""

import contextlib
from itertools import groupby

import click

from keras_effnet.commands.options import AS_JSON, choose_backend
from keras_effnet.commands.output import quiet, show, show_json, table
from keras_effnet.errors import few


@click.command("list")
@click.argument("pattern", required=False)
@click.option("--weights", "of_weights", is_flag=True, help="List the published weights, one row for each.")
@AS_JSON
def list_(pattern, of_weights, as_json) -> None:
    """List the models, or their published weights.

    PATTERN selects names; it may contain * and ?.
    """
    from keras_effnet.describe import describe
    from keras_effnet.nets.variants import list_models

    names = list_models(pattern)
    if of_weights:
        _list_weights(names, as_json)
        return
    rows = [describe(name) for name in names]
    if as_json:
        keys = ("name", "family", "resolution", "params", "macs", "weights")
        show_json({"models": [{key: row[key] for key in keys} for row in rows]})
        return
    shown = []
    for family, group in groupby(rows, key=lambda row: row["family"]):
        shown += [_models(family, group), ""]
    show(*shown, '* the default, weights="imagenet". For timm\'s ports, run: keras-effnet list --weights')


def _models(family: str, rows):
    models = table(family, "name", ">pixels", ">parameters", ">multiply-adds", "weights: top-1 in %")
    for row in rows:
        sets = ", ".join(
            f"{record['tag']} {record['top1'] or ''}".strip() + "*" * record["default"]
            for record in row["weights"]
            if not record["tag"].startswith("tf_") or len(row["weights"]) == 1
        )
        models.add_row(
            row["name"], str(row["resolution"][0]), f"{row['params'] / 1e6:.1f} M", f"{row['macs'] / 1e9:.2f} G", sets
        )
    return models


def _list_weights(names: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from keras_effnet.weights import registry

    best = {name: registry.best(name) for name in names}
    records = [record for name in names for record in registry.of_model(name)]
    if as_json:
        show_json({"weights": [asdict(record) for record in records]})
        return
    sets = table("", "model", "tag", ">top-1", ">top-5", ">pixels", "preprocessing", "padding", "more data", "files")
    for record in records:
        formats = ", ".join(dict.fromkeys(file.format for file in record.files))
        cells = (
            record.model.removeprefix("efficientnet-"),
            record.tag + "*" * record.default + "+" * (record is best[record.model]),
            record.top1 or "",
            record.top5 or "",
            record.resolution,
            record.preprocessing,
            record.padding,
            "yes" if record.extra_data else "",
            formats,
        )
        sets.add_row(*map(str, cells))
    show(
        sets,
        '* the default, weights="imagenet". + the best of those trained on ImageNet alone, weights="best". '
        "All are Apache-2.0. --json adds sources, addresses and hashes.",
    )


@click.command("describe", short_help="Show the stages, cost and published weights of MODEL.")
@click.argument("name", metavar="MODEL")
@AS_JSON
def describe_(name, as_json) -> None:
    """Show the stages, cost and published weights of MODEL: a name, a .keras file, or the folder of a run."""
    from keras_effnet.describe import describe

    with _loading(name):
        found = describe(name)
    if as_json:
        show_json(found)
        return
    stages = table("Stages", ">stage", "operator", "kernel", ">stride", ">resolution", ">channels", ">layers")
    for row in found["stages"]:
        height, width = row["resolution"] or ("?", "?")
        kernel = f"{row['kernel_size']}x{row['kernel_size']}"
        cells = (
            row["stage"],
            row["operator"]
            + (f", {row['num_experts'][0]} experts" if any(row.get("num_experts", ())) else "")
            + ", global context" * row.get("global_context", False),
            kernel,
            row["strides"],
            f"{height}x{width}",
            row["channels"],
            row["layers"],
        )
        stages.add_row(*map(str, cells))
    facts = table(found["name"], "", ">")
    counted = found["layers"]
    for label, value in (
        ("parameters", f"{found['params']:,}"),
        ("batch-norm statistics", f"{found['non_trainable_params']:,}"),
        ("multiply-adds", f"{found['macs']:,}" if found["macs"] else "depend on the image size"),
        ("layers without top", f"{counted['ours']:,}"),
        ("the same in keras.applications", f"{counted['keras_applications']:,}"),
        ("activation", found["activation"]),
        ("padding, epsilon", f"{found['padding']}, {found['bn_epsilon']}"),
        ("dropout, drop connect", f"{found['dropout_rate']}, {found['drop_connect_rate']}"),
        *([("classes", few(found["labels"]))] if found["labels"] else []),
    ):
        facts.add_row(label, value)
    sets = table("Published weights (* default)", "tag", ">top-1 %", "preprocessing", "source")
    for record in found["weights"]:
        sets.add_row(
            record["tag"] + "*" * record["default"],
            str(record["top1"] or ""),
            record["preprocessing"],
            record["source"],
        )
    show(facts, "", stages, "", sets)


@contextlib.contextmanager
def _loading(*models: str):
    """Chooses Keras' backend and keeps it quiet, where a file has to be loaded. Names need no Keras."""
    from keras_effnet.model_loader import resolve

    if all(resolve(model).kind == "name" for model in models):
        yield
        return
    choose_backend()
    with quiet():
        yield


@click.command("plot", short_help="Draw models side by side.")
@click.argument("names", nargs=-1, metavar="[MODEL...]")
@click.argument("out", metavar="OUT.svg|png|pdf")
@click.option("--tradeoff", is_flag=True, help="Plot top-1 of all published weights over parameters and multiply-adds.")
@AS_JSON
def plot_(names, out, tradeoff, as_json) -> None:
    """Draw models side by side, one row of blocks per stage. MODEL is as in `describe`.

    With --tradeoff, plot the accuracy of all published weights over the cost of their models instead.
    """
    from keras_effnet.plots import plot, plot_tradeoff

    if bool(names) == tradeoff:
        raise click.UsageError("Expected names of models, or --tradeoff without names.")
    with _loading(*names):
        path = plot_tradeoff(out) if tradeoff else plot(list(names), out)
    if as_json:
        show_json({"path": str(path)})
    else:
        click.echo(f"Saved {path}")

"""`keras-effnet predict`, `export` and `benchmark`: classify photos, write models for runtimes, measure their speed."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

import click

from keras_effnet.commands.options import (
    AS_JSON,
    BEST,
    DECODE,
    DEVICE,
    MODEL,
    PRECISION,
    RECURSIVE,
    RUNTIME,
    WEIGHTS,
    choose_backend,
    comma_separated,
)
from keras_effnet.commands.output import JsonList, complain, progress, quiet, show, show_json, spinner, table


@click.command()
@click.argument("photographs", nargs=-1, required=True, metavar="PHOTO...")
@MODEL
@WEIGHTS
@BEST
@RECURSIVE
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="Classes to show per photo.")
@RUNTIME
@PRECISION
@DEVICE
@DECODE
@click.option("--jsonl", metavar="FILE", help="Save a line of JSON per photo to FILE. Run again to continue the file.")
@click.option("--csv", metavar="FILE", help="Save a row per photo to FILE. Run again to continue the file.")
@AS_JSON
@click.pass_context
def predict(
    ctx, photographs, model, weights, best, recursive, top, runtime, precision, device, decode, jsonl, csv, as_json
):
    """Classify photos.

    PHOTO is an image file, or a folder of them; its subfolders are searched only with --recursive. The first run
    prepares the model for this machine and caches the result. Results come as soon as they are ready, in order.

    Exit status 2 if a photo cannot be read.
    """
    from keras_effnet.images.folders import photographs as listed
    from keras_effnet.inference.classifier import Classifier
    from keras_effnet.inference.prediction_files import PredictionFile, check_place

    wanted = [(kind, place) for kind, place in (("jsonl", jsonl), ("csv", csv)) if place is not None]
    if jsonl and csv and os.path.abspath(jsonl) == os.path.abspath(csv):
        raise ValueError(f"Expected two files for --jsonl and --csv. Received: {jsonl!r} twice")
    for _, place in wanted:  # before the model is prepared
        check_place(place)
    with contextlib.suppress(ImportError):  # a cached model needs no backend
        choose_backend()
    try:
        with spinner(f"Preparing {model}"):
            classifier = Classifier(model, weights, top, runtime, precision, best, decode, device)
    except ModuleNotFoundError:
        choose_backend()
        raise
    paths = listed(photographs, recursive)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(PredictionFile(place, kind, classifier.name, top)) for kind, place in wanted]
        if files:
            paths = list(dict.fromkeys(paths))
        left = [path for path in paths if not files or any(os.path.abspath(path) not in file.done for file in files)]
        printing = None if files and not as_json else _Printer(model, weights, as_json, sys.stdout)
        failed = sum(any(os.path.abspath(path) in file.failed for file in files) for path in paths)
        hidden = len(left) < 8 or (printing is not None and sys.stdout.isatty())
        stack.enter_context(quiet())
        tell = stack.enter_context(progress("Photos", len(paths), hidden, len(paths) - len(left), "images"))
        for result in stack.enter_context(contextlib.closing(classifier.predict_files(left))):
            for file in files:
                file.write(result)
            if printing:
                printing.add(result)
            if "error" in result:
                failed += 1
                complain(result["error"])
            tell(advance=1)
        if printing:
            printing.end()
    if classifier.note:
        click.echo(classifier.note, err=True)
    for file in files:
        broken = f", {len(file.failed)} of them with an error" * bool(file.failed)
        click.echo(f"{file.path}: {len(file.done)} photos, {file.new} of them new{broken}", err=True)
    ctx.exit(2 if failed else 0)


class _Printer:
    """Prints a table per photo, or one JSON object."""

    def __init__(self, model: str, weights: str, as_json: bool, file):
        self._json = JsonList({"model": model, "weights": weights}, "photographs", file) if as_json else None
        self._file = file

    def add(self, result: dict) -> None:
        if self._json:
            self._json.add(result)
        elif "predictions" in result:
            classes = table(result["path"], ">class id", "name", ">probability")
            for row in result["predictions"]:
                classes.add_row(str(row["class_id"]), row["name"], f"{row['probability']:.1%}")
            show(classes, "", file=self._file)

    def end(self) -> None:
        if self._json:
            self._json.end()


@click.command(short_help="Export MODEL for a runtime.")
@click.argument("model")
@click.argument("out")
@click.option("--format", "kind", help="savedmodel, onnx, litert, openvino or web. Default: from the suffix of OUT.")
@click.option("--precision", default="float32", show_default=True, help="float32, float16 or int8.")
@WEIGHTS
@BEST
@click.option(
    "--calibration",
    multiple=True,
    metavar="PHOTO|FOLDER",
    help="Photos to calibrate int8 with: 100 or more, like those that the model will see. May be repeated.",
)
@click.option("--labels", metavar="FILE", help="Text file with one class name per line. Default: those of MODEL.")
@click.option("--size", nargs=2, type=click.IntRange(1), help="Height and width, if the model takes any size.")
@click.option("--maps", is_flag=True, help="Also return a map for each class, as the last output.")
@AS_JSON
def export(model, out, kind, precision, weights, best, calibration, labels, size, maps, as_json) -> None:
    """Export MODEL for a runtime: a name, a .keras file, or the folder of a run.

    OUT ends in .onnx, .tflite or .xml (OpenVINO); any other name is the folder of a SavedModel. The file is saved only
    if its outputs match Keras'. For int8, the difference is only reported.

    With --format web, OUT is a folder of static files: a page that classifies photos in the visitor's browser. It holds
    onnxruntime-web, which npm fetches the first time.
    """
    choose_backend()
    from keras_effnet.inference import export as exporter
    from keras_effnet.model_loader import load_model

    if labels is not None:
        labels = Path(labels).read_text(encoding="utf-8").splitlines()
    with spinner(f"Exporting {model}"):
        net = load_model(model, weights, best=best)
        report = exporter.export(
            net,
            out,
            kind,
            precision,
            calibration=list(calibration) or None,
            labels=labels,
            input_shape=exporter.sized(net, size) if size else None,
            maps=maps,
        )
    if as_json:
        show_json(report)
        return
    facts = table(report["path"], "", ">")
    facts.add_row("size", f"{report['size'] / 1e6:.1f} MB")
    images = {"random": "random pixels", "photographs": "photos"}
    for name, value in report["difference"].items():
        facts.add_row(f"largest difference from Keras, {images[name]}", f"{value:.1e} of the largest output")
    for key, name in (("top1_agreement", "same top-1 as Keras"), ("top5_overlap", "shared top-5 classes")):
        if key in report:
            facts.add_row(name, f"{report[key]:.1%}")
    if "cosine" in report:
        facts.add_row("cosine of the logits", f"{report['cosine']:.4f}")
    if report.get("float_layers"):
        facts.add_row("layers left in float", str(len(report["float_layers"])))
    if report["format"] == "web":
        facts.add_row("to open it", f"python -m http.server -d {shlex.quote(report['path'])}")
    show(facts)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--runtimes",
    callback=comma_separated,
    help="Comma-separated: litert, onnxruntime, openvino, keras. Default: all installed but keras.",
)
@click.option(
    "--precisions",
    callback=comma_separated,
    default="float32",
    show_default=True,
    help="Comma-separated: float32, float16, int8, bfloat16.",
)
@click.option("--batch-sizes", callback=comma_separated, default="1,8,32", show_default=True, help="Comma-separated.")
@click.option("--threads", type=click.IntRange(1), help="Processors to use. Default: all.")
@click.option(
    "--rounds",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Times to measure each combination, all in turn.",
)
@click.option(
    "--refresh", is_flag=True, help="Also forget which runtime is the fastest: Predictor measures again for each model."
)
@click.option("--plot", metavar="OUT.png|svg|pdf", help="Also plot the results to this file.")
@AS_JSON
@click.pass_context
def benchmark(ctx, models, runtimes, precisions, batch_sizes, threads, rounds, refresh, plot, as_json) -> None:
    """Measure the speed of models on this machine.

    MODEL is a name (with random weights), a .keras file, the folder of a run or an exported model.

    Exit status 2 if a runtime cannot run a model.
    """
    with contextlib.suppress(ImportError):
        choose_backend()
    from keras_effnet.inference import benchmark as benchmarks
    from keras_effnet.inference import export_cache
    from keras_effnet.plots import figure_class

    if plot:
        figure_class()  # a missing package is reported before the work
    if not all(size.isdecimal() and int(size) for size in batch_sizes):
        raise ValueError(f"Expected batch sizes of at least 1. Received: {', '.join(batch_sizes)}")
    if refresh:
        export_cache.forget_fastest()
    with quiet(), progress("Measuring") as tell:
        rows = benchmarks.benchmark(
            models,
            runtimes,
            precisions,
            [int(size) for size in batch_sizes],
            threads,
            rounds,
            lambda what, done, total: tell(description=what, completed=done, total=total),
        )
    if plot:
        benchmarks.plot(rows, plot)
    if as_json:
        show_json({"rows": rows})
        return
    columns = ("model", "runtime", "precision", ">batch", ">milliseconds", ">images/s", ">memory")
    speeds = table("", *columns)
    for row in rows:
        cells = [Path(row["model"]).name, row["runtime"], row["precision"]]
        if "error" in row:
            complain(f"{' '.join(cells)}: {row['error']}")
            continue
        seconds = {name: value * 1e3 for name, value in row["seconds"].items()}
        cells += [str(row["batch_size"]), "{median:.2f} ({min:.2f}-{max:.2f})".format(**seconds)]
        memory = f"{row['memory'] / 2**20:.0f} MiB" if row["memory"] else ""
        speeds.add_row(*cells, f"{row['images_per_second']:.1f}", memory)
    show(speeds)
    ctx.exit(2 if any("error" in row for row in rows) else 0)

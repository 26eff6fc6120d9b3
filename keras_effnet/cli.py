"""`keras-effnet`: parsing and printing only, every verb one call into the library."""

import atexit
import contextlib
import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from keras_effnet import __version__

RUNNER = click.option(
    "--runner",
    type=click.Choice(["tensorflow", "jax"]),
    help="What computes. Defaults to KERAS_BACKEND, or tensorflow.",
)
AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on standard output."
)


class _Commands(click.Group):
    """Tells an error of the library in one line. Exit status 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `keras-effnet list | head`: click ends quietly
            raise
        except (ValueError, OSError, ImportError) as error:
            _complain(error)
            ctx.exit(2)


def _complain(error) -> None:
    click.echo(f"error: {' '.join(str(error).split())}", err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="keras-effnet")
def main() -> None:
    """EfficientNets in Keras."""


def _table(title, *columns: str):
    """A table whose last lines are rows; a column that begins with > is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # As plain text: brackets in a file's name are no markup.
    title = Text(title, style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        side = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=side, overflow="fold")  # a name is wrapped, not cut
    return table


def _print(*parts) -> None:
    from rich.console import Console

    # Into a pipe or a file each row is one line, however long, which others can search.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    for part in parts:
        console.print(part)


def _print_json(value: dict) -> None:
    click.echo(json.dumps(value, indent=2))


def _choose_backend() -> None:
    """Keras takes TensorFlow unless told otherwise; where that is not installed, the first backend that is."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "KERAS_BACKEND" in os.environ:
        return
    configured = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if find_spec(str(json.loads(configured.read_text()).get("backend", "tensorflow"))):
            return
    installed = [backend for backend in ("tensorflow", "jax", "torch") if find_spec(backend)]
    if not installed:
        raise ImportError(
            "Expected TensorFlow, JAX or PyTorch, which Keras computes with. Bring one with: pip install tensorflow"
        )
    os.environ["KERAS_BACKEND"] = installed[0]


RUNTIME = click.option(
    "--runtime", default="auto", show_default=True, help="litert, onnxruntime, openvino or keras; auto: the fastest."
)
PRECISION = click.option("--precision", default="float32", show_default=True, help="float32, float16 or int8.")


@contextlib.contextmanager
def _preparing(what: str):
    """Says what the wait is for; what libraries print meanwhile does not belong to the result."""
    from rich.console import Console

    with Console(stderr=True).status(f"Preparing {what}"), contextlib.redirect_stdout(sys.stderr):
        yield


@main.command()
@click.argument("photographs", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--model", default="efficientnet-lite0", show_default=True, help="See `keras-effnet list`.")
@click.option("--weights", default="imagenet", show_default=True, help="Tag of published weights, or path of a file.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="Classes per photograph.")
@RUNTIME
@PRECISION
@AS_JSON
@click.pass_context
def predict(ctx, photographs, model, weights, top, runtime, precision, as_json) -> None:
    """Name what is on photographs: files, or folders of them (not the folders inside).

    The first time, the model is made ready for this machine, which is remembered.
    """
    from keras_effnet import predictor, preprocessing

    with contextlib.suppress(ImportError):  # what was prepared already needs none
        _choose_backend()
    try:
        with _preparing(model):
            classifier = predictor.Classifier(model, weights, top, runtime, precision)
    except ModuleNotFoundError:
        _choose_backend()
        raise
    count = len(preprocessing.photographs(photographs))
    with _progress("Photographs", count, disable=count < 8) as tell:
        results = classifier(photographs, lambda done: tell(advance=done))
    failed = [result for result in results if "error" in result]
    if as_json:
        _print_json({"model": model, "weights": weights, "photographs": results})
    else:
        for result in results:
            if "predictions" in result:
                table = _table(result["path"], ">class id", "name", ">probability")
                for row in result["predictions"]:
                    table.add_row(str(row["class_id"]), row["name"], f"{row['probability']:.1%}")
                _print(table, "")
    for result in failed:
        _complain(result["error"])
    ctx.exit(2 if failed else 0)


@main.command("list")
@click.argument("pattern", required=False)
@click.option("--weights", "of_weights", is_flag=True, help="A row per published set of weights instead.")
@AS_JSON
def list_(pattern, of_weights, as_json) -> None:
    """List the models, all or those like PATTERN (with * and ?), or their published weights."""
    from keras_effnet.describe import describe
    from keras_effnet.variants import list_models

    names = list_models(pattern)
    if of_weights:
        _list_weights(names, as_json)
        return
    rows = [describe(name) for name in names]
    if as_json:
        _print_json(
            {"models": [{key: row[key] for key in ("name", "resolution", "params", "macs", "weights")} for row in rows]}
        )
        return
    table = _table("", "name", ">pixels", ">parameters", ">multiply-adds", "weights: top-1 in per cent")
    for row in rows:
        sets = ", ".join(
            "{tag} {top1}".format(**record) + "*" * record["default"]
            for record in row["weights"]
            if record["publisher"] == "tpu" or len(row["weights"]) == 1
        )
        table.add_row(
            row["name"], str(row["resolution"][0]), f"{row['params'] / 1e6:.1f} M", f"{row['macs'] / 1e9:.2f} G", sets
        )
    _print(table, "* is what `imagenet` means. timm's ports: `keras-effnet list --weights`.")


def _list_weights(names: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from keras_effnet.variants import VARIANTS
    from keras_effnet.weights import registry

    records = [record for name in names for record in registry.of_model(name)]
    if as_json:
        _print_json({"weights": [asdict(record) for record in records]})
        return
    table = _table("", "model", "tag", ">top-1", ">top-5", ">pixels", "preprocessing", "files")
    for record in records:
        formats = ", ".join(dict.fromkeys(file.format for file in record.files))
        cells = (
            record.model.removeprefix("efficientnet-"),
            record.tag + "*" * record.default,
            record.top1,
            record.top5 or "",
            record.resolution or VARIANTS[record.model].resolution,
            record.preprocessing,
            formats,
        )
        table.add_row(*map(str, cells))
    _print(table, "* is what `imagenet` means. All are Apache-2.0. --json: with sources, addresses and hashes.")


@main.command("describe")
@click.argument("name")
@AS_JSON
def describe_(name, as_json) -> None:
    """Show a model's stages, cost and published weights."""
    from keras_effnet.describe import describe

    found = describe(name)
    if as_json:
        _print_json(found)
        return
    stages = _table("Stages", ">stage", "operator", "kernel", ">stride", ">resolution", ">channels", ">layers")
    for row in found["stages"]:
        height, width = row["resolution"]
        kernel = f"{row['kernel_size']}x{row['kernel_size']}"
        cells = (
            row["stage"],
            row["operator"] + (f", {row['num_experts'][0]} experts" if any(row.get("num_experts", ())) else ""),
            kernel,
            row["strides"],
            f"{height}x{width}",
            row["channels"],
            row["layers"],
        )
        stages.add_row(*map(str, cells))
    facts = _table(found["name"], "", ">")
    counted = found["layers"]
    for label, value in (
        ("parameters", f"{found['params']:,}"),
        ("batch-norm statistics", f"{found['non_trainable_params']:,}"),
        ("multiply-adds", f"{found['macs']:,}"),
        ("layers with no top", f"{counted['ours']:,}"),
        ("as keras.applications counts them", f"{counted['keras_applications']:,}"),
        ("activation", found["activation"]),
        ("dropout, drop connect", f"{found['dropout_rate']}, {found['drop_connect_rate']}"),
    ):
        facts.add_row(label, value)
    sets = _table("Published weights (* imagenet)", "tag", ">top-1 %", "preprocessing", "source")
    for record in found["weights"]:
        sets.add_row(
            record["tag"] + "*" * record["default"], str(record["top1"]), record["preprocessing"], record["source"]
        )
    _print(facts, "", stages, "", sets)


@main.command("plot")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.argument("out", metavar="OUT.svg|png|pdf")
@click.option("--tradeoff", is_flag=True, help="Draw top-1 over parameters and multiply-adds of all published weights.")
@AS_JSON
def plot_(names, out, tradeoff, as_json) -> None:
    """Draw models side by side, a row of blocks per stage; or what all weights reach at what cost."""
    from keras_effnet.describe import plot, plot_tradeoff

    if bool(names) == tradeoff:
        raise click.UsageError("Expected names of models, or --tradeoff with none.")
    path = plot_tradeoff(out) if tradeoff else plot(list(names), out)
    if as_json:
        _print_json({"path": str(path)})
    else:
        click.echo(f"Wrote {path}")


SOURCE = click.option(
    "--from", "source", default="auto", show_default=True, help="tpu, timm, keras or lukemelas; auto looks inside."
)
RAW = click.option("--raw", is_flag=True, help="Take the weights themselves, not their moving average.")


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--model", help="Recognised from the tensors unless given.")
@SOURCE
@click.option("--to", "target", help="tpu, timm, keras or own. Default: by DST's ending.")
@RAW
@click.option(
    "--preprocessing",
    default="auto",
    show_default=True,
    help="What a .keras or .h5 file does with pixels: imagenet, inception, tpu127.",
)
@AS_JSON
def convert(src, dst, model, source, target, raw, preprocessing, as_json) -> None:
    """Convert weights from SRC to DST.

    SRC is a .keras, .h5, .safetensors or torch file, or a TensorFlow checkpoint (folder, prefix or .tar.gz). DST ends
    in .keras or .weights.h5 (this package), .safetensors (timm) or .h5 (keras.applications), or is the prefix of a
    TensorFlow checkpoint.
    """
    _choose_backend()
    from rich.console import Console

    from keras_effnet import weights

    with Console(stderr=True).status("Converting"), contextlib.redirect_stdout(sys.stderr):
        name = weights.convert_file(src, dst, model, source, target, raw=raw, preprocessing=preprocessing)
    if as_json:
        _print_json({"model": name, "path": dst})
    else:
        click.echo(f"Wrote {dst}: {name}")


@main.command()
@click.argument("model")
@click.argument("out")
@click.option("--format", "kind", help="savedmodel, onnx, litert or openvino. Default: by OUT's ending.")
@PRECISION
@click.option("--weights", default="imagenet", show_default=True, help="Tag of published weights, or path of a file.")
@click.option("--calibration", multiple=True, metavar="PHOTO|FOLDER", help="Photographs for int8, 100 or more.")
@click.option("--labels", metavar="FILE", help="Text file with the name of a class in each line.")
@click.option("--size", nargs=2, type=click.IntRange(1), help="Height and width, for a model of any size.")
@AS_JSON
def export(model, out, kind, precision, weights, calibration, labels, size, as_json) -> None:
    """Write MODEL for a runtime, once it was seen to compute what Keras does: a name, or a .keras file.

    OUT ends in .onnx, .tflite or .xml (OpenVINO); another name is the folder of a SavedModel.
    """
    _choose_backend()
    from keras_effnet import exporter
    from keras_effnet.predictor import load

    if labels is not None:
        labels = Path(labels).read_text(encoding="utf-8").splitlines()
    with _preparing(model):
        net = load(model, weights)
        report = exporter.export(
            net,
            out,
            kind,
            precision,
            calibration=list(calibration) or None,
            labels=labels,
            input_shape=exporter.sized(net, size) if size else None,
        )
    if as_json:
        _print_json(report)
        return
    table = _table(report["path"], "", ">")
    table.add_row("size", f"{report['size'] / 1e6:.1f} MB")
    for name, value in report["difference"].items():
        table.add_row(f"largest difference to Keras, {name}", f"{value:.1e} of the largest output")
    for key, name in (("top1_agreement", "same top-1 as Keras"), ("top5_overlap", "of the top-5 the same")):
        if key in report:
            table.add_row(name, f"{report[key]:.1%}")
    if "cosine" in report:
        table.add_row("cosine of the logits", f"{report['cosine']:.4f}")
    if report.get("float_layers"):
        table.add_row("layers left in float", str(len(report["float_layers"])))
    _print(table)


def _chosen(ctx, parameter, value) -> list[str] | None:
    return value and [part.strip() for part in value.split(",")]


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--runtimes", callback=_chosen, help="With commas between. Default: all that are installed.")
@click.option("--precisions", callback=_chosen, default="float32", show_default=True, help="With commas between.")
@click.option("--batch-sizes", callback=_chosen, default="1,8,32", show_default=True, help="With commas between.")
@click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="All are measured in turn.")
@click.option("--plot", metavar="OUT.png|svg|pdf", help="Draw them, too.")
@AS_JSON
@click.pass_context
def benchmark(ctx, models, runtimes, precisions, batch_sizes, threads, rounds, plot, as_json) -> None:
    """Measure how fast MODELs are here: names (with random weights), .keras or exported files."""
    with contextlib.suppress(ImportError):
        _choose_backend()
    from keras_effnet import benchmark as benchmarks
    from keras_effnet.describe import figure_class

    if plot:
        figure_class()  # what is missing is told before the work
    if not all(size.isdecimal() and int(size) for size in batch_sizes):
        raise ValueError(f"Expected batch sizes as numbers from 1. Received: {', '.join(batch_sizes)}")
    with _progress("Measuring") as tell, contextlib.redirect_stdout(sys.stderr):
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
        _print_json({"rows": rows})
        return
    columns = ("model", "runtime", "precision", ">batch", ">milliseconds", ">images/s", ">memory")
    table = _table("", *columns)
    for row in rows:
        cells = [Path(row["model"]).name, row["runtime"], row["precision"]]
        if "error" in row:
            _complain(f"{' '.join(cells)}: {row['error']}")
            continue
        seconds = {name: value * 1e3 for name, value in row["seconds"].items()}
        cells += [str(row["batch_size"]), "{median:.2f} ({min:.2f}-{max:.2f})".format(**seconds)]
        memory = f"{row['memory'] / 2**20:.0f} MiB" if row["memory"] else ""
        table.add_row(*cells, f"{row['images_per_second']:.1f}", memory)
    _print(table)
    ctx.exit(2 if any("error" in row for row in rows) else 0)


@main.command()
@click.argument("file")
@click.option("--model", required=True, help="See `keras-effnet list`.")
@SOURCE
@RAW
@click.option("--no-top", is_flag=True, help="Leave the classifier out.")
@AS_JSON
@click.pass_context
def verify(ctx, file, model, source, raw, no_top, as_json) -> None:
    """Show what of FILE would be loaded into a model and what not. Exit status 1 if it does not fit."""
    from dataclasses import asdict

    from keras_effnet import weights

    report = weights.verify(file, model, source, include_top=not no_top, raw=raw)
    if as_json:
        _print_json(asdict(report) | {"fits": report.fits})
    else:
        for problem in report.problems:
            click.echo(problem)
        for reason, count in report.ignored.items():
            click.echo(f"{count} not needed: {reason}")
        if report.model and not report.fits:
            click.echo(f"These are the tensors of {report.model}.")
        top = "no classifier" if report.classes is None else f"{report.classes} classes"
        verdict = (
            "fits" if report.fits else f"does not fit: {len(report.problems)} missing (-), unexpected (+), wrong (!)"
        )
        click.echo(f"{len(report.loaded)} variables match. {report.format} file with {top}: {verdict}")
    ctx.exit(0 if report.fits else 1)


@main.command()
@click.argument("model")
@click.argument("tag", default="imagenet")
@click.option("--no-top", is_flag=True, help="The file without the classifier, where there is one.")
@AS_JSON
def download(model, tag, no_top, as_json) -> None:
    """Bring the weights of MODEL to this machine: those called TAG, or `imagenet`."""
    from keras_effnet.weights import registry, store

    path = store.bring(registry.find(model, tag), include_top=not no_top)
    if as_json:
        _print_json({"model": model, "tag": tag, "path": str(path)})
    else:
        click.echo(path)


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("recipe", required=False)
@click.option("--data", "source", help="Short for --data.source.")
@click.option("--workdir", help="Folder of the run, or one on Cloud Storage. A run that is in it goes on.")
@click.option("--allow-changes", is_flag=True, help="Go on with another recipe than the run had.")
@RUNNER
@AS_JSON
@click.option("-h", "--help", "asked", is_flag=True, help="Show this, or after a recipe's name all its fields.")
@click.argument("changes", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def train(ctx, recipe, source, workdir, allow_changes, runner, as_json, asked, changes) -> None:
    """Train RECIPE, or go on with it. Without one: list all.

    RECIPE is a name, or the path of a config.json that a run has written. Each of its fields can be changed, such as
    with --batch-size 256 or --optimizer.peak 0.128.

    Exit status: 75 after SIGTERM or when another host was lost, 130 after Ctrl-C, both with the state saved: the same
    command goes on.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if recipe is None and asked:
        click.echo(ctx.get_help())
        return
    done = _ending_plainly()
    _need_training(runner)
    from keras_effnet.tpu import config, recipes

    if recipe is None:
        _list_recipes(recipes.every(), as_json)
        return
    if recipe.startswith("-"):
        raise ValueError(f"Expected the recipe's name first. Received: {recipe}")
    changes = [*changes, *(("--data.source", source) if source else ()), *(("--help",) if asked else ())]
    chosen = config.override(recipes.find(recipe), changes, f"keras-effnet train {recipe} --workdir DIR")
    if not workdir:
        raise ValueError("Expected a folder for the run: --workdir DIR. Received: none")
    from keras_effnet.tpu.train import train as run

    result = run(chosen, workdir, quiet=as_json, allow_changes=allow_changes)
    if as_json:
        _print_json(result)
    else:
        click.echo(f"Wrote {workdir}/model.keras: top-1 {result['ema_top1']:.2%} after {result['steps']} steps")
    done.append(0)


def _ending_plainly() -> list[int]:
    """Has the process end, with the status that is put into the list, once all libraries have cleaned up.

    A thread that comes to Python while the interpreter is taken apart aborts it: status 134 after a whole run.
    Called before they are imported, so that what they do at the end comes first.
    """
    status: list[int] = []

    def leave() -> None:
        if status:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status[0])

    atexit.register(leave)
    return status


@main.command("tpu-plan", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("recipe")
@click.option("--topology", default="v5e:2x4", show_default=True, help="Generation, and how its chips are laid out.")
@click.option("--global-batch", type=click.IntRange(1), help="Images of a step on all chips. Defaults to the recipe's.")
@click.option(
    "--dtype", type=click.Choice(["float32", "mixed_bfloat16"]), help="Defaults to the recipe's, else bfloat16."
)
@click.option("--eval", "evaluation", is_flag=True, help="The step of an evaluation instead of the training's.")
@click.option("--search", is_flag=True, help="Find the largest batch that fits. Compiles some 3 to 6 times.")
@AS_JSON
@click.option("-h", "--help", "asked", is_flag=True, help="Show this.")
@click.argument("changes", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def tpu_plan(ctx, recipe, topology, global_batch, dtype, evaluation, search, as_json, asked, changes) -> None:
    """Tell what a step of RECIPE takes on Cloud TPUs, without one: whether it fits, memory, bounds on speed and hours.

    RECIPE is that of a training, or a model's name. Its fields can be changed as in `train`, such as with
    --run.fused layers. The TPUs' own compiler answers, after minutes; it comes with: pip install libtpu.
    """
    if asked:
        click.echo(ctx.get_help())
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    _need_training("jax")
    from keras_effnet.tpu import config, recipes
    from keras_effnet.variants import VARIANTS

    if recipe.startswith("-"):
        raise ValueError(f"Expected the recipe's name first. Received: {recipe}")
    told = {"--batch-size": global_batch, "--run.precision": dtype}
    changes = [*changes, *(part for name, value in told.items() if value for part in (name, str(value)))]
    base = config.Recipe(config.Model(recipe)) if recipe in VARIANTS else recipes.find(recipe)
    chosen = config.override(base, changes, f"keras-effnet tpu-plan {recipe}")
    from keras_effnet.tpu import plan

    with _compiling() as tell:
        result = (plan.largest if search else plan.plan)(chosen, topology, evaluation, tell)
    if as_json:
        _print_json(result)
    else:
        _print_plan(result)
    ctx.exit(0 if result["fits"] else 1)


@contextlib.contextmanager
def _compiling():
    """A line on standard error with the time that it takes. Gives a function that says what is done."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str) -> None:
            bar.update(task, description=what)
            if not console.is_terminal:
                click.echo(what, err=True)

        yield tell


def _print_plan(result: dict) -> None:
    table = _table(f"{result['model']}, {result['step']} step on {result['topology']}", "", ">")

    def row(name: str, value, form: str = "{}", scale: float = 1.0) -> None:
        table.add_row(name, "unknown" if value is None else form.format(value / scale))

    for images, fits in result.get("tried", ()):
        table.add_row(f"batch of {images}", "fits" if fits else "does not fit")
    table.add_row("global batch", f"{result['global_batch']} on {result['chips']} chips")
    row("images per chip", result["images_per_chip"], "{:g}")
    side = result["image_size"]
    table.add_row("pixels, precision", f"{side} x {side}, {result['precision']}")
    table.add_row("fused", result["fused"])
    table.add_row("fits", "yes" if result["fits"] else "no")
    limit = result["hbm_bytes_of_chip"] / 2**30
    row("memory per chip, at most", result["peak_hbm_bytes_per_chip"], f"{{:.2f}} of {limit:.2f} GiB", 2**30)
    row("parameters and inputs", result["argument_bytes_per_chip"], "{:.2f} GiB", 2**30)
    row("temporaries", result["temporary_bytes_per_chip"], "{:.2f} GiB", 2**30)
    row("arithmetic per image", result["flop_per_image"], "{:.2f} GFLOP", 1e9)
    row("operands and results of fusions per image", result["fusion_bytes_per_image"], "{:.1f} MB", 1e6)
    row("moved between memory and chip per image", result["hbm_bytes_per_image"], "{:.1f} MB", 1e6)
    row("exchanges between chips per step", result["reductions_per_step"], "{:.0f}")
    row("step, at least", result["roofline_seconds_per_step"], "{:.1f} ms", 1e-3)
    table.add_row("what bounds it", result["bound"] or "unknown")
    row("images/s per chip, at most", result["images_per_second_per_chip"], "{:,.0f}")
    if result["step"] == "training":
        row("hours of the recipe, at least", result["hours"], "{:.1f}")
    _print(table)
    click.echo("By the TPUs' compiler; nothing ran. A real step also waits for the vector unit, other chips and input.")


@main.command()
@RUNNER
@AS_JSON
@click.pass_context
def doctor(ctx, runner, as_json) -> None:
    """Tell what runs here, what a training would run on, and what to do about what does not. Exit status 1 if so."""
    from dataclasses import asdict

    if runner:
        os.environ["KERAS_BACKEND"] = runner
    from keras_effnet.tpu.doctor import examine

    findings = examine()
    if as_json:
        strategy = next(finding.found for finding in findings if finding.what == "Strategy")
        _print_json({"findings": [asdict(finding) for finding in findings], "strategy": strategy})
    else:
        from rich.text import Text  # keras_effnet[plot] is no markup

        table = _table("", "what", "found", "verdict", "what to do")
        for finding in findings:
            table.add_row(*map(Text, (finding.what, finding.found, finding.verdict, finding.advice)))
        _print(table)
    ctx.exit(1 if any(finding.verdict == "problem" for finding in findings) else 0)


def _need_training(runner: str | None = None) -> None:
    if runner:
        os.environ["KERAS_BACKEND"] = runner
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    from keras_effnet.tpu.doctor import RUNNERS, lacking

    if backend not in RUNNERS:
        raise ValueError(f"Expected Keras on {' or '.join(RUNNERS)}, to train. Received: KERAS_BACKEND={backend}")
    missing, bring = lacking(backend)
    if missing:
        told = ", ".join(missing)
        raise ImportError(f"Expected what training needs. Received: no {told}. Bring it with: {bring}")


def _list_recipes(found, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        _print_json({"recipes": {name: asdict(recipe) for name, recipe in found.items()}})
        return
    table = _table("", "recipe", "model", "data", ">epochs", ">batch", "augmentation", ">top-1", "source")
    for name, recipe in found.items():
        cells = (
            name,
            recipe.model.name.removeprefix("efficientnet-"),
            recipe.data.source,
            f"{recipe.epochs:g}",
            recipe.batch_size,
            recipe.augment.policy,
            recipe.expected_top1 or "",
            recipe.source,
        )
        table.add_row(*map(str, cells))
    _print(
        table,
        "Top-1 in per cent, as published; none was run by us. Fields: keras-effnet train RECIPE --help",
    )


@main.command("eval")
@click.argument("model")
@click.option("--data", "source", help="Folder, digits, or the name of a TensorFlow dataset. Of a run: its own.")
@click.option("--weights", default="imagenet", show_default=True, help="Tag of published weights, or path of a file.")
@click.option("--data-dir", help="Where TensorFlow Datasets keeps its files.")
@click.option("--split", "eval_split", help="Of a TensorFlow dataset, of TFRecords, or a folder's folder.")
@click.option("--first-label", default=1, show_default=True, help="Number of the first class in TFRecords.")
@click.option("--eval-crop", "crop", type=float, help="Share of the shorter side. Default: as the weights expect.")
@click.option("--interpolation", help="bicubic or bilinear. Default: as the weights expect.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--limit", type=click.IntRange(1), help="Most examples to evaluate.")
@click.option("--predictions", metavar="FILE.jsonl", help="Write a line per image: its class, and the five likeliest.")
@click.option("--all-classes", is_flag=True, help="Show all classes, not only the ten worst.")
@AS_JSON
def evaluate_(
    model, source, weights, data_dir, eval_split, first_label, predictions, all_classes, as_json, **arguments
) -> None:
    """Evaluate MODEL on a data set: its top-1, that of each class, and what it confuses.

    MODEL is a name (see `keras-effnet list`), a .keras file with an EfficientNet in it, or a training run's folder.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _need_training()
    from keras_effnet.tpu.config import Data
    from keras_effnet.tpu.evaluate import evaluate

    if source is None and (data_dir or eval_split or first_label != 1):
        raise ValueError("Expected --data with --data-dir, --split and --first-label. Received: none")
    data = source and Data(source, data_dir=data_dir, eval_split=eval_split, first_label=first_label)
    with _progress("Images") as tell, contextlib.redirect_stdout(sys.stderr):
        arguments["on_progress"] = lambda done, total: tell(completed=done, total=total)
        result = evaluate(model, data, weights, predictions=predictions, **arguments)
    if as_json:
        _print_json(result)
        return
    facts = _table(result["model"], "", ">")
    rows = [("top-1", f"{result['top1']:.2%}"), ("top-5", f"{result['top5']:.2%}")]
    if result["published"]:
        rows.append(("published top-1", f"{result['published']['top1']} % ({result['difference']:+.2f} points)"))
    rows += [("images", f"{result['examples']:,}"), ("that cannot be read", f"{len(result['skipped']):,}")]
    used = result["preprocessing"]
    size = "x".join(map(str, used["size"]))
    rows += [("pixels", f"{size}, {used['crop']:.1%} of the side, {used['interpolation']}")]
    rows += [("weights", str(result["weights"] or "of the file"))]
    rows += [("speed", f"{result['images_per_second']:.1f} images/s")]
    for row in rows:
        facts.add_row(*row)
    worst = sorted(result["classes"], key=lambda row: (row["top1"], -row["examples"]))
    shown = result["classes"] if all_classes else worst[:10]
    title = "Classes" if len(shown) == len(worst) else f"The {len(shown)} worst of {len(worst)} classes"
    classes = _table(title, ">class", "name", ">images", ">top-1")
    for row in shown:
        classes.add_row(str(row["class"]), row["name"], str(row["examples"]), f"{row['top1']:.1%}")
    _print(facts, "", classes)
    if result["confusions"]:
        confusions = _table("Most often confused", "class", "taken for", ">images")
        for row in result["confusions"]:
            confusions.add_row(row["true"], row["predicted"], str(row["count"]))
        _print("", confusions)
    for name in result["skipped"]:
        click.echo(f"cannot be read: {name}", err=True)


@main.command()
@click.argument("workdir")
@click.option("--examples", default=2000, show_default=True, type=click.IntRange(1), help="Most that are evaluated.")
@AS_JSON
def report(workdir, examples, as_json) -> None:
    """Write WORKDIR/report.html about a training run: one that has ended, goes on, or was killed.

    Curves, accuracies, what augmentation makes of the images, and the mistakes that the network is most sure of.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow takes the whole memory of a GPU, which may be that of the run itself.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _need_training()
    from rich.console import Console

    from keras_effnet.tpu.report import write

    with Console(stderr=True).status("Evaluating and drawing"), contextlib.redirect_stdout(sys.stderr):
        path = write(workdir, examples)
    if as_json:
        _print_json({"path": path})
    else:
        click.echo(f"Wrote {path}")


@contextlib.contextmanager
def _progress(what: str, total: int | None = None, disable: bool = False):
    """A bar on standard error. Gives a function that is called with `advance`, or `completed` and `total`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=disable, redirect_stdout=False) as bar:
        yield partial(bar.update, bar.add_task(what, total=total))


@main.command()
@click.argument("model", metavar="MODEL.keras")
@click.option("--data", required=True, help="Folder with one per class, or with such ones called train and val.")
@click.option("--out", required=True, help="Folder for pruned.keras, plan.json and the report.")
@click.option("--reduction", default=0.4, show_default=True, help="Share of the whole model's cost to save.")
@click.option("--cost", default="macs", show_default=True, help="macs, params or latency.")
@click.option("--solver", default="greedy", show_default=True, help="greedy or exact.")
@click.option("--importance", default="gradient", show_default=True, help="gradient, taylor or magnitude.")
@click.option("--divisor", default=8, show_default=True, help="Of the numbers of channels that stay.")
@click.option("--calibration", default=1000, show_default=True, help="Photographs for the importance.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(0), help="Of distillation.")
@click.option("--gamma", default=0.2, show_default=True, help="Weight of the distillation.")
@click.option("--learning-rate", default=0.01, show_default=True)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--crop", is_flag=True, help="Crop photographs as for the published weights. As it was trained is right.")
@AS_JSON
def prune(model, as_json, **arguments) -> None:
    """Remove channels of MODEL.keras, a classifier, and train it to compute what it computed.

    Goes on where it was interrupted. The report is also written to the folder, as JSON, Markdown and a picture.
    """
    _choose_backend()
    from keras_effnet import pruner

    # Keras writes its progress on standard output, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        report = pruner.prune(model, on_step=lambda step: click.echo(step, err=True), **arguments)
    if as_json:
        _print_json(report)
        return
    accuracy = _table("Accuracy", "model", ">")
    for name, value in report["accuracy"].items():
        accuracy.add_row(name, f"{value:.2%}")
    costs = _table(model, "", ">whole", ">pruned", ">ratio")
    rows = [("multiply-adds", report["macs"], "{:,.0f}"), ("parameters", report["params"], "{:,.0f}")]
    rows += [(f"latency, {name}", seconds, "{:.5f} s") for name, seconds in report["latency"].items()]
    for name, row, form in rows:
        costs.add_row(
            name, *(form.format(row[net]) for net in ("whole", "pruned")), f"{row['pruned'] / row['whole']:.3f}"
        )
    _print(costs, "", accuracy)
    click.echo(f"Wrote {arguments['out']}: pruned.keras, plan.json, report.json, report.md, channels.png")


if __name__ == "__main__":
    main()

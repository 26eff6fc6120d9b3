"""`keras-effnet train`, `eval` and `report`: train recipes, evaluate models, report on runs."""

import os

import click

from keras_effnet.commands.options import AS_JSON, BEST, RUNNER, WEIGHTS, need_training
from keras_effnet.commands.output import progress, quiet, show, show_json, spinner, table


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("recipe", required=False)
@click.option("--data", "source", help="Data to train on: short for --data.source.")
@click.option("--workdir", help="Folder of the run, local or on Cloud Storage. A run that it holds is resumed.")
@click.option("--allow-changes", is_flag=True, help="Resume even if the recipe has changed.")
@RUNNER
@AS_JSON
@click.option("-h", "--help", "asked", is_flag=True, help="Show this message; after RECIPE, show its fields.")
@click.argument("changes", nargs=-1, type=click.UNPROCESSED, metavar="[--FIELD VALUE]...")
@click.pass_context
def train(ctx, recipe, source, workdir, allow_changes, runner, as_json, asked, changes) -> None:
    """Train RECIPE, or resume its training. Without RECIPE, list all recipes.

    RECIPE is a name, or the path of the config.json of a run. --FIELD VALUE changes a field of the recipe, for example
    --batch-size 256 --optimizer.peak 0.128.

    Exit status 75 after SIGTERM, after SIGHUP (a closed terminal), or if another host is lost; 130 after Ctrl-C. The
    state is saved: run the same command again to resume.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if recipe is None and asked:
        click.echo(ctx.get_help())
        return
    need_training(runner)
    from keras_effnet.tpu import config, recipes

    if recipe is None:
        _list_recipes(recipes.every(), as_json)
        return
    if recipe.startswith("-"):
        raise ValueError(f"Expected the name of the recipe first. Received: {recipe}")
    changes = [*changes, *(("--data.source", source) if source else ()), *(("--help",) if asked else ())]
    chosen = config.override(recipes.find(recipe), changes, f"keras-effnet train {recipe} --workdir DIR")
    if not workdir:
        raise ValueError("Expected a folder for the run: --workdir DIR. Received: none")
    from keras_effnet.tpu.train import train as run

    result = run(chosen, workdir, quiet=as_json, allow_changes=allow_changes)
    if as_json:
        show_json(result)
    else:
        click.echo(f"Saved {workdir}/model.keras: top-1 {result['ema_top1']:.2%} after {result['steps']} steps")


def _list_recipes(found, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        show_json({"recipes": {name: asdict(recipe) for name, recipe in found.items()}})
        return
    rows = table("", "recipe", "model", "data", ">epochs", ">batch", "augmentation", ">top-1", "source")
    for name, recipe in found.items():
        cells = (
            name,
            recipe.model.name.removeprefix("efficientnet-"),
            recipe.data.source,
            "by size" if recipe.epochs is None else f"{recipe.epochs:g}",
            recipe.batch_size or "by size",
            recipe.augment.policy,
            recipe.expected_top1 or "",
            recipe.source,
        )
        rows.add_row(*map(str, cells))
    show(
        rows,
        "Top-1 in %, as published; we have not rerun these trainings. All fields: keras-effnet train RECIPE --help",
    )


@click.command("eval", short_help="Evaluate MODEL on a data set: top-1, top-5, confusions.")
@click.argument("model")
@click.option(
    "--data",
    "source",
    help="Folder, CSV file, digits, or name of a TensorFlow dataset. Default: the data of the run.",
)
@WEIGHTS
@BEST
@click.option("--data-dir", help="Folder in which TensorFlow Datasets keeps its files.")
@click.option("--split", "eval_split", help="Split of a TensorFlow dataset or of TFRecords, or a subfolder of --data.")
@click.option("--first-label", default=1, show_default=True, help="Number of the first class in TFRecords.")
@click.option("--eval-crop", "crop", type=float, help="Share of the shorter side to keep. Default: as for the weights.")
@click.option("--interpolation", help="bicubic, bilinear or half-pixel-bilinear. Default: as for the weights.")
@click.option(
    "--batch-size",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Images that a Keras model predicts at once.",
)
@click.option("--limit", type=click.IntRange(1), help="Evaluate at most this many examples.")
@click.option("--predictions", metavar="FILE.jsonl", help="Save one line per image: its class and the top 5.")
@click.option("--all-classes", is_flag=True, help="Show all classes, not only the ten worst.")
@AS_JSON
def evaluate_(
    model, source, weights, data_dir, eval_split, first_label, predictions, all_classes, as_json, **arguments
) -> None:
    """Evaluate MODEL on a data set: top-1, top-5, each class, and the most frequent confusions.

    MODEL is a name, a .keras file that contains an EfficientNet, the folder of a training run, or an exported model.
    """
    need_training()
    from keras_effnet.tpu.config import Data
    from keras_effnet.tpu.reports.evaluation import evaluate

    if source is None and (data_dir or eval_split or first_label != 1):
        raise ValueError("Expected --data with --data-dir, --split and --first-label. Received: none")
    data = source and Data(source, data_dir=data_dir, eval_split=eval_split, first_label=first_label)
    with quiet(), progress("Images") as tell:
        arguments["on_progress"] = lambda done, total: tell(completed=done, total=total)
        result = evaluate(model, data, weights, predictions=predictions, **arguments)
    if as_json:
        show_json(result)
        return
    facts = table(result["model"], "", ">")
    rows = [("top-1", f"{result['top1']:.2%}"), ("top-5", f"{result['top5']:.2%}")]
    if result["difference"] is not None:
        rows.append(("published top-1", f"{result['published']['top1']} % ({result['difference']:+.2f} points)"))
    rows += [("images", f"{result['examples']:,}"), ("unreadable images", f"{len(result['skipped']):,}")]
    used = result["preprocessing"]
    size = "x".join(map(str, used["size"]))
    rows += [("pixels", f"{size}, crop {used['crop']:.1%}, {used['interpolation']}")]
    rows += [("weights", str(result["weights"] or "from the file"))]
    rows += [("speed", f"{result['images_per_second']:.1f} images/s")]
    for row in rows:
        facts.add_row(*row)
    worst = sorted(result["classes"], key=lambda row: (row["top1"], -row["examples"]))
    shown = result["classes"] if all_classes else worst[:10]
    title = "Classes" if len(shown) == len(worst) else f"The {len(shown)} worst of {len(worst)} classes"
    classes = table(title, ">class", "name", ">images", ">top-1")
    for row in shown:
        classes.add_row(str(row["class"]), row["name"], str(row["examples"]), f"{row['top1']:.1%}")
    show(facts, "", classes)
    if result["confusions"]:
        confusions = table("Most frequent confusions", "class", "predicted as", ">images")
        for row in result["confusions"]:
            confusions.add_row(row["true"], row["predicted"], str(row["count"]))
        show("", confusions)
    for name in result["skipped"]:
        click.echo(f"Skipped unreadable image: {name}", err=True)


@click.command()
@click.argument("workdir")
@click.option(
    "--examples", default=2000, show_default=True, type=click.IntRange(1), help="Evaluate at most this many images."
)
@AS_JSON
def report(workdir, examples, as_json) -> None:
    """Write a report about a training run to WORKDIR/report.html.

    The run may be finished, running or killed. The report shows curves, accuracies, augmented images, and the mistakes
    with the highest confidence.
    """
    # TensorFlow reserves all memory of a GPU, which the run itself may be using.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    need_training()
    from keras_effnet.tpu.reports.html_report import write

    with spinner("Evaluating and plotting"):
        path = write(workdir, examples)
    if as_json:
        show_json({"path": path})
    else:
        click.echo(f"Saved {path}")

"""`keras-effnet prune`: a smaller model from a trained one."""

import contextlib
import sys

import click

from keras_effnet.commands.options import AS_JSON, choose_backend
from keras_effnet.commands.output import show, show_json, table


@click.command(short_help="Remove channels of a trained classifier, and distill it.")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    help="Folder with one subfolder of photos per class, or with train and val folders of this kind; or a CSV file.",
)
@click.option("--out", required=True, help="Folder for pruned.keras, plan.json and the report.")
@click.option("--reduction", default=0.4, show_default=True, help="Share of the whole model's cost to remove.")
@click.option("--cost", default="macs", show_default=True, help="Cost to reduce: macs, params or latency.")
@click.option("--solver", default="greedy", show_default=True, help="How to choose the channels: greedy or exact.")
@click.option(
    "--importance",
    default="gradient",
    show_default=True,
    help="How to rate the channels: gradient, taylor or magnitude.",
)
@click.option("--divisor", default=8, show_default=True, help="Keep multiples of this many channels.")
@click.option("--calibration", default=1000, show_default=True, help="Number of photos to rate the channels with.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(0), help="Epochs of distillation.")
@click.option("--gamma", default=0.2, show_default=True, help="Weight of the distillation loss.")
@click.option("--learning-rate", default=0.01, show_default=True, help="Learning rate of the distillation.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Photos per batch.")
@click.option(
    "--crop", is_flag=True, help="Crop photos as for the published weights. Use it if the training used that crop."
)
@AS_JSON
def prune(model, as_json, **arguments) -> None:
    """Remove channels of MODEL, a classifier, and distill the whole model into the smaller one.

    MODEL is a .keras file or the folder of a run.

    Run the same command again to resume an interrupted run. The report is also saved to the folder, as JSON, Markdown
    and a picture.
    """
    choose_backend()
    from keras_effnet.pruning import workflow

    # Keras prints its progress on standard output, which is reserved for the result.
    with contextlib.redirect_stdout(sys.stderr):
        report = workflow.prune(model, on_step=lambda step: click.echo(step, err=True), **arguments)
    if as_json:
        show_json(report)
        return
    accuracy = table("Accuracy", "model", ">")
    for name, value in report["accuracy"].items():
        accuracy.add_row(name, f"{value:.2%}")
    costs = table(model, "", ">whole", ">pruned", ">ratio")
    rows = [("multiply-adds", report["macs"], "{:,.0f}"), ("parameters", report["params"], "{:,.0f}")]
    rows += [(f"latency, {name}", seconds, "{:.5f} s") for name, seconds in report["latency"].items()]
    for name, row, form in rows:
        costs.add_row(
            name, *(form.format(row[net]) for net in ("whole", "pruned")), f"{row['pruned'] / row['whole']:.3f}"
        )
    show(costs, "", accuracy)
    click.echo(f"Saved to {arguments['out']}: pruned.keras, plan.json, report.json, report.md, channels.png")

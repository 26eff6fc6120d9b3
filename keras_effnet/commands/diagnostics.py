"""`keras-effnet doctor` and `tpu-plan`: what this machine can do, and what a TPU slice would need."""

import os

import click

from keras_effnet.commands.options import AS_JSON, RUNNER, need_training
from keras_effnet.commands.output import show, show_json, table, timer


@click.command(short_help="Check this machine, and say how to fix what is missing.")
@RUNNER
@AS_JSON
@click.pass_context
def doctor(ctx, runner, as_json) -> None:
    """Check the versions and devices of this machine, and say how to fix what is missing.

    Exit status 1 if there is a problem.
    """
    from dataclasses import asdict

    if runner:
        os.environ["KERAS_BACKEND"] = runner
    from keras_effnet.tpu.doctor.examine import examine

    findings = examine()
    if as_json:
        strategy = next(finding.found for finding in findings if finding.what == "Strategy")
        show_json({"findings": [asdict(finding) for finding in findings], "strategy": strategy})
    else:
        from rich.text import Text  # plain, since rich reads keras_effnet[plot] as markup

        rows = table("", "what", "found", "verdict", "what to do")
        for finding in findings:
            rows.add_row(*map(Text, (finding.what, finding.found, finding.verdict, finding.advice)))
        show(rows)
    ctx.exit(1 if any(finding.verdict == "problem" for finding in findings) else 0)


@click.command("tpu-plan", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("recipe")
@click.option("--topology", default="v5e:2x4", show_default=True, help="TPU generation and layout of its chips.")
@click.option("--global-batch", type=click.IntRange(1), help="Images per step on all chips. Default: the recipe's.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "mixed_bfloat16"]),
    help="Precision of the step. Default: the recipe's, or mixed_bfloat16.",
)
@click.option("--eval", "evaluation", is_flag=True, help="Plan an evaluation step instead of a training step.")
@click.option("--search", is_flag=True, help="Find the largest batch that fits. Compiles 3 to 6 times.")
@AS_JSON
@click.help_option("-h", "--help", help="Show this message and exit.")
@click.argument("changes", nargs=-1, type=click.UNPROCESSED, metavar="[--FIELD VALUE]...")
@click.pass_context
def tpu_plan(ctx, recipe, topology, global_batch, dtype, evaluation, search, as_json, changes) -> None:
    """Check whether a step of RECIPE fits on Cloud TPUs.

    No TPU is needed. The TPU compiler reports memory, memory traffic and lower bounds on the time, after some minutes.
    Install it with: pip install libtpu.

    RECIPE is a training recipe or the name of a model. --FIELD VALUE changes a field of the recipe as in `train`, for
    example --run.fused layers.

    Exit status 1 if the step does not fit.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    need_training("jax")
    from keras_effnet.nets.variants import find_model, is_model
    from keras_effnet.tpu import config, recipes

    if recipe.startswith("-"):
        raise ValueError(f"Expected the name of the recipe first. Received: {recipe}")
    told = {"--batch-size": global_batch, "--run.precision": dtype}
    changes = [*changes, *(part for name, value in told.items() if value for part in (name, str(value)))]
    base = config.Recipe(config.Model(find_model(recipe))) if is_model(recipe) else recipes.find(recipe)
    chosen = config.override(base, changes, f"keras-effnet tpu-plan {recipe}")
    from keras_effnet.tpu.planning import planner

    with timer() as tell:
        result = (planner.largest if search else planner.plan)(chosen, topology, evaluation, tell)
    if as_json:
        show_json(result)
    else:
        _show_plan(result)
    ctx.exit(0 if result["fits"] else 1)


def _show_plan(result: dict) -> None:
    rows = table(f"{result['model']}, {result['step']} step on {result['topology']}", "", ">")

    def row(name: str, value, form: str = "{}", scale: float = 1.0) -> None:
        rows.add_row(name, "unknown" if value is None else form.format(value / scale))

    for images, fits in result.get("tried", ()):
        rows.add_row(f"batch of {images}", "fits" if fits else "does not fit")
    rows.add_row("global batch", f"{result['global_batch']} on {result['chips']} chips")
    row("images per chip", result["images_per_chip"], "{:g}")
    for stage in result.get("stages", ()):
        peak, seconds = stage["peak_hbm_bytes_per_chip"], stage["roofline_seconds_per_step"]
        told = f"{peak / 2**30:.2f} GiB" + ("" if seconds is None else f", {seconds / 1e-3:.1f} ms per step at least")
        rows.add_row(f"stage of {stage['image_size']} pixels", told)
    side = result["image_size"]
    rows.add_row("pixels, precision", f"{side} x {side}, {result['precision']}")
    rows.add_row("fused", result["fused"])
    rows.add_row("fits", "yes" if result["fits"] else "no")
    limit = result["hbm_bytes_of_chip"] / 2**30
    row("peak memory per chip", result["peak_hbm_bytes_per_chip"], f"{{:.2f}} of {limit:.2f} GiB", 2**30)
    row("parameters and inputs", result["argument_bytes_per_chip"], "{:.2f} GiB", 2**30)
    row("temporaries", result["temporary_bytes_per_chip"], "{:.2f} GiB", 2**30)
    row("arithmetic per image", result["flop_per_image"], "{:.2f} GFLOP", 1e9)
    row("operands and results of fusions per image", result["fusion_bytes_per_image"], "{:.1f} MB", 1e6)
    row("memory traffic per image", result["hbm_bytes_per_image"], "{:.1f} MB", 1e6)
    row("exchanges between chips per step", result["reductions_per_step"], "{:.0f}")
    row("time per step, at least", result["roofline_seconds_per_step"], "{:.1f} ms", 1e-3)
    rows.add_row("bound by", result["bound"] or "unknown")
    row("images/s per chip, at most", result["images_per_second_per_chip"], "{:,.0f}")
    if result["step"] == "training":
        row("hours for the recipe, at least", result["hours"], "{:.1f}")
    show(rows)
    click.echo(
        "From the TPU compiler; nothing was run. A real step also waits for the vector unit, other chips and input."
    )

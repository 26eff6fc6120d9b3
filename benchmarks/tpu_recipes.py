"""Compiles the training step of every recipe for a TPU slice, without a TPU, and prints the table of docs/tpu.md.

    python benchmarks/tpu_recipes.py                       # what the record lacks; all of it takes hours on two cores
    python benchmarks/tpu_recipes.py --only b0_baseline    # only these recipes
    python benchmarks/tpu_recipes.py --recorded            # print the recorded table, compile nothing

Results are recorded in tpu_recipes.json, and the next run resumes from there. Another compiler, JAX or topology needs
another --record. Recipes that differ only in their data are compiled once. Where a recipe's batch does not fit, the
table also shows a half, a quarter or an eighth of it that fits, not necessarily the largest. Needs: pip install libtpu.
"""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from keras_effnet.errors import one_of

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

RECORD = Path(__file__).with_suffix(".json")
COLUMNS = (
    "recipe",
    "pixels",
    "batch",
    "memory per chip",
    "fits",
    "batch that fits",
    "memory traffic, MB/image",
    "images/s per chip, at most",
    "hours, at least",
)


def compiled(name: str, topology: str) -> list[dict[str, Any]]:
    """Plans a recipe with its own batch and, while that does not fit, with half the batch."""
    from keras_effnet.tpu import recipes
    from keras_effnet.tpu.planning import planner

    recipe = recipes.find(name)
    plans = [planner.plan_apart(recipe, topology, tell=lambda text: click.echo(text, err=True))]
    batch = plans[-1]["global_batch"]
    while not plans[-1]["fits"] and batch // 2 >= plans[-1]["devices"]:
        batch //= 2
        # Skips a batch that cannot fit, judged by the memory of the last one.
        last = plans[-1]
        if last["peak_hbm_bytes_per_chip"] * batch / last["global_batch"] < last["hbm_bytes_of_chip"]:
            changed = dataclasses.replace(recipe, batch_size=batch)
            plans.append(planner.plan_apart(changed, topology, tell=lambda text: click.echo(text, err=True)))
    return plans


def cells(plans: list[dict[str, Any]]) -> tuple[str, ...]:
    """Returns a row of the table without the name of the recipe."""
    first, last = plans[0], plans[-1]
    memory = f"{first['peak_hbm_bytes_per_chip'] / 2**30:.1f} GiB"
    row = [str(first["image_size"]), str(first["global_batch"]), memory, "yes" if first["fits"] else "no"]
    row.append("" if first["fits"] else str(last["global_batch"]) if last["fits"] else "none")
    if not last["fits"]:
        return (*row, "", "", "")
    speed = f"{last['images_per_second_per_chip']:,.0f} ({last['bound']})"
    hours = "" if last["hours"] is None else f"{last['hours']:.1f}"
    return (*row, f"{last['hbm_bytes_per_image'] / 1e6:.0f}", speed, hours)


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the table in Markdown. Recipes with the same program share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, plans in rows.items():
        names.setdefault((plans[0]["model"], *cells(plans)), []).append(name)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([", ".join(same), *row[1:]] for row, same in names.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check(only: tuple[str, ...], known: Collection[str]) -> None:
    try:
        for name in only:
            one_of("recipe", name, known)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.option("--topology", default="v5e:2x4", show_default=True)
@click.option("--only", multiple=True, help="Compile only this recipe. May be repeated.")
@click.option(
    "--record", type=click.Path(dir_okay=False, path_type=Path), default=RECORD, help="JSON file with the results."
)
@click.option("--recorded", is_flag=True, help="Print the recorded table, compile nothing.")
def main(topology, only, record, recorded) -> None:
    """Compile the training step of every recipe and print a table in Markdown."""
    found = json.loads(record.read_text()) if record.exists() else {}
    rows: dict[str, list[dict[str, Any]]] = found.pop("recipes", {})
    if not recorded:
        from keras_effnet.tpu import recipes

        head = {"topology": topology, **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")}}
        if found not in ({}, head):
            raise click.UsageError(
                f"Expected the versions and topology of {record.name}: {found}. Received: {head}. "
                "Use another file: --record FILE"
            )
        every = recipes.every()
        _check(only, every)
        for name in only or every:
            if name not in rows:
                rows[name] = compiled(name, topology)
                rows = {known: rows[known] for known in every if known in rows}
                record.write_text(json.dumps({**head, "recipes": rows}, indent=1) + "\n")
    _check(only, rows)
    click.echo(table({name: rows[name] for name in only or rows}))


if __name__ == "__main__":
    main()

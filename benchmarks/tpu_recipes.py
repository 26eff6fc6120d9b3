"""All recipes' training steps, compiled for a slice of TPUs that is not here: the table of docs/tpu.md.

    python benchmarks/tpu_recipes.py                       # some hours on two cores; pip install libtpu
    python benchmarks/tpu_recipes.py --only b0_baseline    # those that are named
    python benchmarks/tpu_recipes.py --recorded            # the table of what was recorded, nothing is compiled

What was compiled is recorded in tpu_recipes.json, and the next run goes on from there; another compiler, JAX or
topology has to have another --record. Recipes that differ in their data alone are compiled once. Where a recipe's batch
does not fit, the largest half of it (a quarter, and so on) that does stands beside it.
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
COLUMNS = ("recipe", "pixels", "batch", "memory", "fits", "batch that does", "MB/image", "images/s per chip", "hours")


def compiled(name: str, topology: str) -> list[dict[str, Any]]:
    """Plans of a recipe: of its own batch, and if that does not fit, of smaller ones until one does."""
    from keras_effnet.tpu import recipes
    from keras_effnet.tpu.planning import planner

    recipe = recipes.find(name)
    plans = [planner.plan_apart(recipe, topology, tell=lambda told: click.echo(told, err=True))]
    batch = recipe.batch_size
    while not plans[-1]["fits"] and batch // 2 >= plans[-1]["devices"]:
        batch //= 2
        # What surely does not fit, by what the last one took, is not compiled.
        last = plans[-1]
        if last["peak_hbm_bytes_per_chip"] * batch / last["global_batch"] < last["hbm_bytes_of_chip"]:
            changed = dataclasses.replace(recipe, batch_size=batch)
            plans.append(planner.plan_apart(changed, topology, tell=lambda told: click.echo(told, err=True)))
    return plans


def cells(plans: list[dict[str, Any]]) -> tuple[str, ...]:
    """A row, without the recipe's name."""
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
    """In Markdown; recipes with one program in one row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, plans in rows.items():
        names.setdefault((plans[0]["model"], *cells(plans)), []).append(name)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([", ".join(of), *row[1:]] for row, of in names.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check(only: tuple[str, ...], known: Collection[str]) -> None:
    try:
        for name in only:
            one_of("recipe", name, known)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.option("--topology", default="v5e:2x4", show_default=True)
@click.option("--only", multiple=True, help="These recipes.")
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), default=RECORD, help="Its file.")
@click.option("--recorded", is_flag=True, help="Compile nothing.")
def main(topology, only, record, recorded) -> None:
    """Print a table in Markdown."""
    found = json.loads(record.read_text()) if record.exists() else {}
    rows: dict[str, list[dict[str, Any]]] = found.pop("recipes", {})
    if not recorded:
        from keras_effnet.tpu import recipes

        head = {"topology": topology, **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")}}
        if found not in ({}, head):
            raise click.UsageError(
                f"Expected another --record than {record.name}, which is of {found}. Received: {head}"
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

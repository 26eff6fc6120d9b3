"""All recipes' training steps, compiled for a slice of TPUs that is not here: the table of docs/tpu.md.

    python benchmarks/tpu_recipes.py                       # some hours on two cores, the first time; pip install libtpu
    python benchmarks/tpu_recipes.py --only b0_baseline    # those that are named

What was compiled once is remembered: it goes on where it was stopped, and recipes that differ in their data alone are
compiled once. A batch that does not fit is halved until it does.
"""

import dataclasses
import os

import click

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

from keras_effnet.tpu import plan, recipes

COLUMNS = ("recipe", "pixels", "batch", "fits", "largest half that fits", "memory", "MB/image", "images/s", "hours")


def row(name: str, topology: str) -> list[str]:
    """Of a recipe: its own batch, and the first half of it that fits."""
    recipe = recipes.find(name)
    first = found = plan.plan(recipe, topology, tell=lambda told: click.echo(told, err=True))
    count = first["devices"]
    while not found["fits"] and recipe.batch_size // 2 >= count:
        recipe = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2 // count * count)
        found = plan.plan(recipe, topology, tell=lambda told: click.echo(told, err=True))
    cells = [name, first["image_size"], first["global_batch"], "yes" if first["fits"] else "no"]
    cells += [found["global_batch"], f"{found['peak_hbm_bytes_per_chip'] / 2**30:.1f} GiB"]
    if not found["fits"]:
        return [*map(str, cells), "", "", ""]
    hours = "" if found["hours"] is None else f"{found['hours']:.1f}"
    speed = f"{found['images_per_second_per_chip']:,.0f}"
    return [*map(str, cells), f"{found['hbm_bytes_per_image'] / 1e6:.0f}", f"{speed} ({found['bound']})", hours]


@click.command()
@click.option("--topology", default="v5e:2x4", show_default=True)
@click.option("--only", multiple=True, help="These recipes.")
def main(topology, only) -> None:
    """Print a table in Markdown."""
    click.echo(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in only or recipes.every():
        click.echo(f"| {' | '.join(row(name, topology))} |")


if __name__ == "__main__":
    main()

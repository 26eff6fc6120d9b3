"""Whether a run may go on with this recipe, runner and these devices."""

import dataclasses
import json

import tensorflow as tf

from keras_effnet.tpu.config import Recipe, flat, from_json


def changes_of(recipe: Recipe, workdir: str) -> list[str]:
    """What is computed otherwise than in the run that is in a folder."""
    path = f"{workdir}/config.json"
    if not tf.io.gfile.exists(path):
        return []
    old, new = (flat(dataclasses.asdict(one)) for one in (from_json(tf.io.gfile.GFile(path).read()), recipe))
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    free = ("run.", "source ", "expected_top1 ")  # what does not change what is computed
    return [told for told in changed if not told.startswith(free) or told.startswith("run.seed")]


def other_devices(devices: dict[str, int], workdir: str) -> list[str]:
    """What devices that are not the run's change: who reads what, and which images share batch statistics."""
    old = json.loads(tf.io.gfile.GFile(f"{workdir}/config.json").read()).get("resolved", {})
    names = ("hosts", "images_per_statistics")
    return [f"{name} {old[name]} -> {devices[name]}" for name in names if old.get(name, devices[name]) != devices[name]]


def check_allowed(changes: list[str], allow_changes: bool, workdir: str) -> None:
    if changes and not allow_changes:
        raise ValueError(
            f"Expected the recipe of the run that is in {workdir!r}, an empty folder, or --allow-changes. Received: "
            + ", ".join(changes)
        )

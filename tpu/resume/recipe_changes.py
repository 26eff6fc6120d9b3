"""Whether a run may resume with this recipe, this runner and these devices."""

import dataclasses
import json
from typing import Any

import tensorflow as tf

from keras_effnet.tpu.config import SIZED, Recipe, flat, from_json, settled, with_fields

_FEW = 6  # changes in an error


def changes_of(recipe: Recipe, workdir: str) -> list[str]:
    """Compares a recipe with that of the run in a folder.

    Fields that do not change what is computed are left out: `source`, `expected_top1`, and all of `run` but the seed.
    mixed_float16 counts, because it adds the scale of the loss to the state.

    Args:
        recipe: `Recipe`.
        workdir: String, path of the run folder.

    Returns:
        List of strings such as `"epochs 0.5 -> 0.6"`, empty if the folder has no config.json.
    """
    path = f"{workdir}/config.json"
    if not tf.io.gfile.exists(path):
        return []
    before = settled(from_json(tf.io.gfile.GFile(path).read()))  # of a version without some fields
    old, new = (flat(dataclasses.asdict(one)) for one in (before, recipe))
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    ignored = ("run.", "source ", "expected_top1 ")
    kept = ("run.seed", "mixed_float16")
    return [change for change in changed if not change.startswith(ignored) or any(sign in change for sign in kept)]


def recorded(recipe: Recipe, workdir: str) -> tuple[Recipe, dict[str, Any]]:
    """Fills the fields that a recipe leaves to the size of the data as the run in a folder did.

    Args:
        recipe: `Recipe`.
        workdir: String, path of the run folder, with its config.json.

    Returns:
        Tuple of the `Recipe`, and a dict of the fields that the run has chosen.
    """
    path = f"{workdir}/config.json"
    old, new = (flat(dataclasses.asdict(one)) for one in (from_json(tf.io.gfile.GFile(path).read()), recipe))
    kept = {name: old[name] for name in SIZED if new[name] is None}
    return with_fields(recipe, kept), _resolved(path).get("chosen", {})


def probed(workdir: str) -> bool:
    """Returns whether a folder holds the results of a probe. It has no checkpoints.

    Args:
        workdir: String, path of the run folder.

    Returns:
        Boolean.
    """
    path = f"{workdir}/config.json"
    if not all(tf.io.gfile.exists(one) for one in (path, f"{workdir}/result.json")):
        return False
    return from_json(tf.io.gfile.GFile(path).read()).probe.views > 0


def check_runner(name: str, workdir: str) -> None:
    """Checks that a run resumes with the runner that wrote its checkpoints.

    Args:
        name: String, the runner: `"tensorflow"` or `"jax"`.
        workdir: String, path of the run folder.

    Raises:
        ValueError: If the run has another runner.
    """
    path = f"{workdir}/config.json"
    before = _resolved(path).get("runner", "tensorflow") if tf.io.gfile.exists(path) else "tensorflow"
    if before != name:
        model = f"{workdir}/model.keras"
        hint = f". To start a new run from its weights: --model.weights {model} --model.keep-top"
        raise ValueError(
            f"Expected --runner {before}, whose checkpoints are in {workdir!r}. Received: {name}"
            + hint * tf.io.gfile.exists(model)
        )


def other_devices(devices: dict[str, int], workdir: str) -> list[str]:
    """Compares devices with those of the run in a folder.

    Only two numbers change what is computed: that of hosts decides which host reads what, and that of images per
    statistics which images share batch statistics.

    Args:
        devices: Dict with the integers `hosts` and `images_per_statistics`.
        workdir: String, path of the run folder.

    Returns:
        List of strings such as `"hosts 1 -> 2"`.
    """
    old = _resolved(f"{workdir}/config.json")
    names = ("hosts", "images_per_statistics")
    return [f"{name} {old[name]} -> {devices[name]}" for name in names if old.get(name, devices[name]) != devices[name]]


def check_allowed(changes: list[str], allow_changes: bool, workdir: str) -> None:
    """Checks that a run has not changed, or that changes are allowed.

    Args:
        changes: List of strings, as `changes_of()` and `other_devices()` return them.
        allow_changes: Boolean, whether to allow them.
        workdir: String, path of the run folder.

    Raises:
        ValueError: If there are changes and they are not allowed.
    """
    if changes and not allow_changes:
        more = f" and {len(changes) - _FEW} more" if len(changes) > _FEW else ""
        raise ValueError(
            f"Expected the recipe of the run in {workdir!r}, an empty folder, or --allow-changes. Received: "
            + ", ".join(changes[:_FEW])
            + more
        )


def _resolved(path: str) -> dict[str, Any]:
    return json.loads(tf.io.gfile.GFile(path).read()).get("resolved", {})

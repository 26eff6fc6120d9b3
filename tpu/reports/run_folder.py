"""Reads the folder of a run: its recipe, data and model."""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_effnet.tpu.config import Recipe, from_json
from keras_effnet.tpu.input.crops import eval_image
from keras_effnet.tpu.input.example_readers import viewed
from keras_effnet.tpu.input.sources import Source, open_source
from keras_effnet.tpu.resume.checkpoints import steps


@dataclass(frozen=True)
class Trained:
    """The model of a run.

    Args:
        recipe: `Recipe`.
        size: Integer, side of an image in pixels.
        net: A `keras.Model` with the moving average of all variables.
        origin: String, name of the file that the weights were loaded from.
    """

    recipe: Recipe
    size: int
    net: Any
    origin: str

    def read(self) -> Callable[[bytes], np.ndarray]:
        """Returns a function from an image's bytes to the pixels that the run evaluates on."""
        cut = tf.function(lambda encoded: eval_image(encoded, self.size, self.recipe.data), autograph=False)
        return lambda encoded: cut(tf.constant(viewed(encoded))).numpy()


def trained(workdir, best: bool = False) -> Trained:
    """Loads the model of a run: `model.keras`, or else the moving average of the newest readable checkpoint.

    Args:
        workdir: Path of the run's folder.
        best: Boolean, whether to load `best.keras` instead of `model.keras`, if it exists. Defaults to False.

    Returns:
        A `Trained`.

    Raises:
        ValueError: If neither exists or can be read.
    """
    from keras_effnet.tpu.model_from_recipe import build

    workdir = os.fspath(workdir).rstrip("/")
    recipe, resolved = configuration(workdir)
    size = resolved.get("image_size") or recipe.image_size
    problems = []
    chosen = "best.keras" if best and tf.io.gfile.exists(f"{workdir}/best.keras") else "model.keras"
    if tf.io.gfile.exists(f"{workdir}/{chosen}"):
        try:
            net = keras.saving.load_model(f"{workdir}/{chosen}", compile=False)
            return Trained(recipe, size, net, chosen)
        except Exception as error:  # whatever Keras raises for a half-written file
            problems.append(f"{chosen}: {error}")
    for step in reversed(steps(f"{workdir}/checkpoints")):
        path = f"{workdir}/checkpoints/ckpt-{step}"
        try:
            average = (_averages_of_jax if resolved.get("runner") == "jax" else _averages)(path)
            net: Any = build(recipe, resolved["classes"], "float32")
            for variable in net.weights:
                variable.assign(average(variable.path))
            return Trained(recipe, size, net, os.path.basename(path))
        except (tf.errors.OpError, OSError, KeyError, ValueError, RuntimeError) as error:
            problems.append(f"{os.path.basename(path)}: {error}")
    raise ValueError(
        f"Expected a readable model.keras or checkpoint in {workdir!r}. Received: {_few(problems) or 'none yet'}"
    )


def configuration(workdir: str) -> tuple[Recipe, dict[str, Any]]:
    """Reads a run's recipe, and the values that the run resolved from it.

    Args:
        workdir: Path of the run's folder.

    Returns:
        Tuple of a `Recipe` and a dict, which is empty if the run has not resolved them yet.

    Raises:
        ValueError: If the folder is not that of a run.
    """
    try:
        text = tf.io.gfile.GFile(f"{workdir}/config.json").read()
    except tf.errors.OpError as error:
        raise ValueError(f"Expected the folder of a run, with its config.json. Received: {workdir!r}") from error
    return from_json(text), json.loads(text).get("resolved", {})


def open_run(workdir, recipe: Recipe) -> Source:
    """Opens the data of a run as the run itself does, without writing to its folder.

    Args:
        workdir: Path of the run's folder.
        recipe: `Recipe`.

    Returns:
        A `Source`.
    """
    counted = f"{os.fspath(workdir).rstrip('/')}/records.json"
    with tempfile.TemporaryDirectory() as folder:
        if tf.io.gfile.exists(counted):
            tf.io.gfile.copy(counted, f"{folder}/records.json")
        return open_source(recipe.data, cache=f"{folder}/records.json")


def labels_of(workdir) -> Sequence[str]:
    """Returns the class names of a finished run.

    Args:
        workdir: Path of the run's folder.

    Returns:
        Sequence of strings. Empty if the run has not finished.
    """
    path = f"{os.fspath(workdir).rstrip('/')}/result.json"
    return json.loads(tf.io.gfile.GFile(path).read())["labels"] if tf.io.gfile.exists(path) else ()


def _few(problems: Sequence[str]) -> str:
    first = [" ".join(problem.split())[:120] for problem in problems[:2]]
    return "; ".join(first + [f"and {len(problems) - 2} more"] * (len(problems) > 2))


def _averages(path: str) -> Callable[[str], Any]:
    reader: Any = tf.train.load_checkpoint(path)

    def average(name: str):
        key = name.replace(".", "..").replace("/", ".S")  # as TensorFlow escapes the names of objects
        return reader.get_tensor(f"state/averages/{key}/.ATTRIBUTES/VARIABLE_VALUE")

    return average


def _averages_of_jax(path: str) -> Callable[[str], Any]:
    if keras.backend.backend() != "jax":  # the run may be using its devices
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from keras_effnet.tpu.resume import orbax_folders

    if problem := orbax_folders.damage(path):
        raise ValueError(problem)
    tree = orbax_folders.read(path)["state"]["averages"]
    return lambda name: functools.reduce(dict.__getitem__, name.split("/"), tree)

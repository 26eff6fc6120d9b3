"""What lies in the folder of a run: its recipe, its data and its model."""

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

from keras_effnet.nets.variants import VARIANTS
from keras_effnet.tpu.config import Recipe, from_json
from keras_effnet.tpu.input.crops import eval_image
from keras_effnet.tpu.input.sources import Source, open_source
from keras_effnet.tpu.resume.checkpoints import steps


@dataclass(frozen=True)
class Trained:
    """What a run has come to.

    Args:
        recipe: `Recipe`.
        size: Integer, pixels of an image's side.
        net: A `keras.Model` with the moving average of all variables.
        origin: String, the file that its values are from.
    """

    recipe: Recipe
    size: int
    net: Any
    origin: str

    def read(self) -> Callable[[bytes], np.ndarray]:
        """Function from an image's bytes to the pixels that the run is evaluated on."""
        cut = tf.function(lambda encoded: eval_image(encoded, self.size, self.recipe.data))
        return lambda encoded: cut(tf.constant(encoded)).numpy()


def trained(workdir) -> Trained:
    """The model of a run: the one that it saved in the end, or else the moving average of its newest checkpoint.

    Args:
        workdir: Path of the run's folder.

    Returns:
        A `Trained`.

    Raises:
        ValueError: If there is neither, or nothing can be read.
    """
    from keras_effnet.tpu.from_recipe import build

    workdir = os.fspath(workdir).rstrip("/")
    recipe, resolved = configuration(workdir)
    size = resolved.get("image_size") or recipe.model.image_size or VARIANTS[recipe.model.name].resolution
    told = []
    if tf.io.gfile.exists(f"{workdir}/model.keras"):
        try:
            net = keras.models.load_model(f"{workdir}/model.keras", compile=False)
            return Trained(recipe, size, net, "model.keras")
        except Exception as error:  # whatever a file that was half written makes Keras raise
            told.append(f"model.keras: {error}")
    for step in reversed(steps(f"{workdir}/checkpoints")):
        path = f"{workdir}/checkpoints/ckpt-{step}"
        try:
            average = (_averages_of_jax if resolved.get("runner") == "jax" else _averages)(path)
            net: Any = build(recipe, resolved["classes"], "float32")
            for variable in net.weights:
                variable.assign(average(variable.path))
            return Trained(recipe, size, net, os.path.basename(path))
        except (tf.errors.OpError, OSError, KeyError, ValueError, RuntimeError) as error:
            told.append(f"{os.path.basename(path)}: {error}")
    raise ValueError(
        f"Expected model.keras or a checkpoint in {workdir!r} that can be read. Received: "
        f"{'; '.join(told) or 'none yet'}"
    )


def _averages(path: str) -> Callable[[str], Any]:
    reader: Any = tf.train.load_checkpoint(path)

    def average(name: str):
        key = name.replace(".", "..").replace("/", ".S")  # as TensorFlow escapes names of objects
        return reader.get_tensor(f"state/averages/{key}/.ATTRIBUTES/VARIABLE_VALUE")

    return average


def _averages_of_jax(path: str) -> Callable[[str], Any]:
    if keras.backend.backend() != "jax":  # its devices may be those of the run
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from keras_effnet.tpu.resume import orbax_folders

    if problem := orbax_folders.damage(path):
        raise ValueError(problem)
    tree = orbax_folders.read(path)["state"]["averages"]
    return lambda name: functools.reduce(dict.__getitem__, name.split("/"), tree)


def configuration(workdir: str) -> tuple[Recipe, dict[str, Any]]:
    """A run's recipe, and the numbers that followed from it.

    Args:
        workdir: Path of the run's folder.

    Returns:
        Pair of a `Recipe` and a dict, which is empty where the run did not come so far.

    Raises:
        ValueError: If there is no run.
    """
    try:
        text = tf.io.gfile.GFile(f"{workdir}/config.json").read()
    except tf.errors.OpError as error:
        raise ValueError(f"Expected the folder of a run, with its config.json. Received: {workdir!r}") from error
    return from_json(text), json.loads(text).get("resolved", {})


def open_run(workdir, recipe: Recipe) -> Source:
    """The data of a run, as the run itself opens it; nothing is written to its folder.

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
    """Names of the classes of a run that came to its end."""
    path = f"{os.fspath(workdir).rstrip('/')}/result.json"
    return json.loads(tf.io.gfile.GFile(path).read())["labels"] if tf.io.gfile.exists(path) else ()

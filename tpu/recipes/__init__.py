"""Recipes, one file each with a row per model. Each file's docstring names command, hardware, top-1 and source."""

import importlib
import pkgutil

from keras_effnet.errors import one_of
from keras_effnet.tpu import config


def every() -> dict[str, config.Recipe]:
    """Returns all recipes.

    Returns:
        Dict from the name of a recipe to its `keras_effnet.tpu.config.Recipe`.

    Example:

    >>> from keras_effnet.tpu import recipes
    >>> recipes.every()["b0_baseline"].expected_top1
    76.7
    """
    found: dict[str, config.Recipe] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        found |= importlib.import_module(f"{__name__}.{module}").RECIPES
    return found


def find(name: str) -> config.Recipe:
    """Returns a recipe by its name, or reads the one of a run.

    Args:
        name: String, name of a recipe, or path of the config.json of a run.

    Returns:
        A `keras_effnet.tpu.config.Recipe`.

    Raises:
        ValueError: If there is no such recipe. The message names the nearest ones.

    Example:

    >>> from keras_effnet.tpu import recipes
    >>> recipes.find("b5_randaugment").augment.magnitude
    17.0
    """
    if name.endswith(".json"):
        import tensorflow as tf  # for gs://

        with tf.io.gfile.GFile(name) as file:
            return config.from_json(file.read())
    found = every()
    return found[one_of("recipe", name, found)]

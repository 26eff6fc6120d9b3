"""The recipes: a file each, with a row per model. A file's docstring tells command, hardware, top-1 and source."""

import importlib
import pkgutil

from keras_effnet.errors import one_of
from keras_effnet.tpu import config


def every() -> dict[str, config.Recipe]:
    """All recipes.

    Returns:
        Dict from a recipe's name to a `keras_effnet.tpu.config.Recipe`.

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
    """A recipe.

    Args:
        name: String, its name; or the path of a config.json that a run has written.

    Returns:
        A `keras_effnet.tpu.config.Recipe`.

    Raises:
        ValueError: If there is none, with the nearest names.

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

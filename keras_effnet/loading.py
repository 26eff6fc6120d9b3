"""Loads a Keras model by its name, or from a `.keras` file."""

import os
from typing import TYPE_CHECKING, Any

from keras_effnet.errors import unknown
from keras_effnet.nets.variants import VARIANTS

if TYPE_CHECKING:
    import keras


def load(model: str | os.PathLike, weights: str | os.PathLike | None = "imagenet") -> "keras.Model":
    """The model of a name or a file.

    Args:
        model: Name of a model, or path of a `.keras` file.
        weights: For a name: tag of its weights, path of a file, or None for random ones. Defaults to `"imagenet"`.

    Returns:
        A `keras.Model`.

    Raises:
        OSError: If the file does not exist, or the weights cannot be brought.
        ValueError: If the name is unknown, or the file is no model.
    """
    name = os.fspath(model)
    if name in VARIANTS:
        from keras_effnet.models import create_model

        return create_model(name, weights=weights)
    check_file(name, (".keras",))
    import keras

    try:
        loaded: Any = keras.saving.load_model(name, compile=False)
    except (TypeError, NotImplementedError) as error:  # what Keras raises for a layer that it does not know
        raise ValueError(
            f"Expected a model whose layers are known here. Received: {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    return loaded


def check_file(name: str, endings: tuple[str, ...]) -> None:
    if os.path.isfile(name) and name.endswith(endings):
        return
    if not name.endswith(endings):
        raise unknown("model", name, [*VARIANTS, f"the path of a file that ends in {' or '.join(endings)}"])
    raise FileNotFoundError(f"Expected the file of a model. Received: {name!r}, which does not exist")

"""Loads a Keras model by name or from a `.keras` file."""

import os
from typing import TYPE_CHECKING, Any

from keras_effnet.errors import unknown
from keras_effnet.nets.variants import VARIANTS

if TYPE_CHECKING:
    import keras


def load(model: str | os.PathLike, weights: str | os.PathLike | None = "imagenet") -> "keras.Model":
    """Loads a model by name or from a file.

    Args:
        model: Name of a model, or path of a `.keras` file.
        weights: For a name: tag of its weights, path of a file, or None for random weights. Defaults to `"imagenet"`.

    Returns:
        A `keras.Model`.

    Raises:
        OSError: If the file does not exist, or the weights cannot be downloaded or read.
        ValueError: If the name is unknown, or the file is not a model.
    """
    name = os.fspath(model)
    if name in VARIANTS:
        from keras_effnet.models import create_model

        return create_model(name, weights=weights)
    check_file(name, (".keras",))
    import keras

    try:
        loaded: Any = keras.saving.load_model(name, compile=False)
    except (TypeError, NotImplementedError) as error:  # raised by Keras for an unknown layer
        raise ValueError(
            f"Expected a model whose layers Keras knows. Received: {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    return loaded


def check_file(name: str, endings: tuple[str, ...]) -> None:
    """Checks that a model file exists.

    Args:
        name: String, path of the file.
        endings: Tuple of the valid endings of the path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path has another ending.
    """
    if os.path.isfile(name) and name.endswith(endings):
        return
    if not name.endswith(endings):
        raise ValueError(
            f"{unknown('model', name, VARIANTS)}, or pass the path of a file that ends in {' or '.join(endings)}"
        )
    raise FileNotFoundError(f"Expected a model file. Received: {name!r}, which does not exist")

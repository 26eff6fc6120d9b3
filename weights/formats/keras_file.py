"""Reads `.keras` files."""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.weights.formats.h5_file import opened_h5
from keras_effnet.weights.formats.tensors import Tensors
from keras_effnet.weights.formats.torch_file import is_torch


@contextmanager
def opened_keras(path: Path) -> Iterator[Tensors]:
    """Opens a `.keras` file. The tensors can be read while the context is open.

    Args:
        path: Path of the file.

    Yields:
        Dict from name to `Stored`. See `opened_h5()`.

    Raises:
        ValueError: If the file is damaged, or not of Keras.
    """
    with tempfile.TemporaryDirectory(prefix="keras_effnet-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                entry = archive.getinfo("model.weights.h5")
                if entry.file_size > (64 << 20) + 20 * path.stat().st_size:  # Keras does not compress them
                    raise ValueError(f"it declares {entry.file_size:,} bytes")
                archive.extract(entry, folder)
        except Exception as error:  # zipfile and zlib raise exceptions of many kinds for a damaged file
            raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({error})") from error
        with opened_h5(Path(folder) / "model.weights.h5", path) as tensors:
            yield tensors


def is_keras(path) -> bool:
    """Returns whether a path is a `.keras` file, by its content.

    Args:
        path: Path.
    """
    return os.path.isfile(path) and zipfile.is_zipfile(path) and not is_torch(Path(path))


def preprocessing_of(path):
    """Returns the preprocessing that a `.keras` file of this package has in its model.

    Args:
        path: Path of a file of any format.

    Returns:
        Pair (scale, offset) of lists of floats, or None where the file has none.

    Raises:
        ValueError: If the file is a damaged archive.
    """
    with _layers(path) as layers:
        for layer in layers:
            if layer["class_name"] == "Rescaling" and layer["config"]["name"].endswith("preprocessing"):
                return tuple(np.ravel(layer["config"][key]).tolist() for key in ("scale", "offset"))
    return None


def padding_of(path) -> str | None:
    """Returns the padding of the EfficientNet in a `.keras` file.

    Args:
        path: Path of a file of any format.

    Returns:
        Key of `nets.architecture.EPSILONS`, or None where the file is of another format or has no such net.

    Raises:
        ValueError: If the file is a damaged archive.
    """
    with _layers(path) as layers:
        found = {layer["config"]["name"]: layer["config"] for layer in layers}
        pads = [config["padding"] for name, config in found.items() if name.endswith("_conv_pad")]
        if not any(name.endswith("stem_conv") for name in found):
            return None
        equal = all(before == after for pad in pads for before, after in pad)
        return "symmetric" if pads and equal else "same"


@contextmanager
def _layers(path) -> Iterator[list[dict[str, Any]]]:
    """Yields the layers of the model in a `.keras` file, none for other files. Damage becomes a ValueError."""
    if not is_keras(path):
        yield []
        return
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > 1 << 28:
                raise ValueError("its config.json is too large")
            config = json.loads(archive.read("config.json"))["config"]
        yield _flat(config["layers"])
    except Exception as error:  # zipfile, zlib and json raise exceptions of many kinds for a damaged file
        raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({error})") from error


def _flat(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the layers of a model and of the models nested in it."""
    return [inner for layer in layers for inner in (layer, *_flat(layer["config"].get("layers") or []))]

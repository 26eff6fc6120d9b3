"""Reads `.keras` files, and the layers of models in them and in h5 files of Keras 3."""

import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.nets.architecture import padding_of
from keras_effnet.weights.formats import hdf5
from keras_effnet.weights.formats.h5_file import model_config, opened_h5
from keras_effnet.weights.formats.tensors import Tensors
from keras_effnet.weights.formats.torch_file import is_torch

_WEIGHTS = "model.weights.h5"


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
                archive.extract(_weights(archive, path), folder)
        except Exception as error:  # zipfile and zlib raise exceptions of many kinds for a damaged file
            raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({one_line(error)})") from error
        with opened_h5(Path(folder) / _WEIGHTS, path) as tensors:
            yield tensors


def _weights(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    entry = archive.getinfo(_WEIGHTS)
    if entry.file_size > hdf5.most_unpacked(path.stat().st_size):
        raise ValueError(f"it declares {entry.file_size:,} bytes")
    return entry


def check_weights(path) -> None:
    """Raises for a file whose weights would crash or hang Keras, which reads them with HDF5.

    Args:
        path: Path of a `.keras` file.

    Raises:
        Exception: Of many kinds if the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if _WEIGHTS in archive.namelist():
            hdf5.File(io.BytesIO(archive.read(_weights(archive, Path(path))))).check()


def is_keras(path) -> bool:
    """Returns whether a path is a `.keras` file, by its content.

    Args:
        path: Path.
    """
    return os.path.isfile(path) and zipfile.is_zipfile(path) and not is_torch(Path(path))


def preprocessing_of(path):
    """Returns the preprocessing that a file of Keras 3 has in its model, which this package built.

    Args:
        path: Path of a file of any format.

    Returns:
        Pair (scale, offset) of lists of floats, or None where the file has none.

    Raises:
        ValueError: If the file is a damaged archive.
    """
    with _layers(path) as layers:
        for layer in layers:
            if layer.get("class_name") == "Rescaling" and _name(layer).endswith("preprocessing"):
                pixels = [np.ravel(np.asarray(layer["config"][key], np.float64)) for key in ("scale", "offset")]
                if not np.isfinite(np.concatenate(pixels)).all():
                    raise ValueError("its preprocessing is not of finite numbers")
                scale, offset = np.broadcast_arrays(*pixels)
                return scale.tolist(), offset.tolist()
    return None


class Numerics(NamedTuple):
    """What the layers of an EfficientNet compute besides their weights.

    Args:
        padding: Key of `nets.architecture.EPSILONS`.
        bn_epsilon: Float, epsilon of batch normalization.
        activated: Set of the blocks' names whose projection an activation follows.
    """

    padding: str
    bn_epsilon: float
    activated: frozenset[str]


def numerics_of(path) -> Numerics | None:
    """Returns what the layers of the EfficientNet in a file of Keras 3 compute.

    Args:
        path: Path of a file of any format.

    Returns:
        A `Numerics`, or None where the file describes no such layers.

    Raises:
        ValueError: If the file is a damaged archive.
    """
    with _layers(path) as layers:
        found = {_name(layer): layer["config"] for layer in layers}
        epsilon = next((config.get("epsilon") for name, config in found.items() if name.endswith("stem_bn")), None)
        if epsilon is None:
            return None
        pads = [config["padding"] for name, config in found.items() if re.search("conv2?_pad$", name)]
        padding = padding_of(pads, epsilon, any(name.endswith("preprocessing") for name in found))
        activated = (re.search(r"block(\d+[a-z]+)_project_activation$", name) for name in found)
        return Numerics(padding, epsilon, frozenset(match[1] for match in activated if match))


@contextmanager
def described(path) -> Iterator[Any]:
    """Opens the description of the model in a file of Keras 3. Damage, also what the caller finds, is a ValueError.

    Args:
        path: Path of a file of any format.

    Yields:
        The parsed JSON, which may be of any type. None for other files.

    Raises:
        ValueError: If the file is damaged.
    """
    archived = is_keras(path)
    text = None if archived else model_config(path)
    try:
        if archived:
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("config.json").file_size > 1 << 28:
                    raise ValueError("its config.json is too large")
                text = archive.read("config.json")
        yield json.loads(text) if text else None
    except Exception as error:  # zipfile, zlib and json raise exceptions of many kinds for a damaged file
        kind = "a .keras file" if archived else "an h5 file of Keras' structure"
        raise ValueError(f"Expected {kind}. Received: {str(path)!r} ({one_line(error)})") from error


@contextmanager
def _layers(path) -> Iterator[list[dict[str, Any]]]:
    """Yields the layers of the model in a file of Keras 3, none for other files. Damage becomes a ValueError."""
    with described(path) as model:
        yield [] if model is None else _flat(model["config"].get("layers") or [])


def _flat(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the layers of a model and of the models nested in it. A user's own layers may have no configuration."""
    told = [layer for layer in layers if isinstance(layer.get("config"), dict)]
    return [inner for layer in told for inner in (layer, *_flat(layer["config"].get("layers") or []))]


def _name(layer: dict[str, Any]) -> str:
    return layer["config"].get("name") or layer.get("name") or ""

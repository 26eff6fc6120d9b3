"""Reads h5 files of Keras 2, Keras 3 and keras.applications, and writes those of keras.applications."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.files import replacing, writing
from keras_effnet.weights.formats.tensors import Stored, Tensors

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

_STRINGS = (bytes, str, np.bytes_, np.str_)


@contextmanager
def opened_h5(file, path: Path) -> Iterator[Tensors]:
    """Opens an h5 file of Keras. The tensors can be read while the context is open.

    Args:
        file: Path of the h5 file.
        path: Path to name in errors, and whose size limits what the file may declare.

    Yields:
        Dict from name to `Stored`. Names are layer/variable in legacy files (weights only or a whole model), and
        layer/number in files of Keras 3.

    Raises:
        ValueError: If the file is damaged, or not of Keras.
    """
    import h5py

    try:
        opened_file = h5py.File(file, "r")
    except Exception as error:
        raise _not_h5(path, error) from error
    with opened_file:
        try:
            limit = 1000 * path.stat().st_size
            legacy = "model_weights" in opened_file or any(key.startswith("layer_names") for key in opened_file.attrs)
            tensors = dict((_h5_legacy if legacy else _h5_keras3)(opened_file, limit))
        except Exception as error:  # h5py raises exceptions of many kinds for a damaged file
            raise _not_h5(path, error) from error
        yield tensors


def _not_h5(path, error) -> ValueError:
    return ValueError(f"Expected an h5 file of Keras' structure. Received: {str(path)!r} ({error})")


def _h5_legacy(file, limit: int):
    group: Any = _inside(file, "model_weights") if "model_weights" in file else file
    for layer in _names(group, "layer_names"):
        members = _inside(group, layer)
        names = list(_names(members, "weight_names"))
        # If the layer is a model, its members' names precede their variables.
        nested = len({name.rpartition("/")[0] for name in names}) > 1
        for name in names:
            *front, variable = name.split(":")[0].split("/")
            owner = front[-1] if nested and front else layer
            key = f"{owner}/{variable.replace('depthwise_kernel', 'kernel')}"
            yield key, _dataset(_inside(members, name), limit)


def _h5_keras3(file, limit: int):
    import h5py

    found: list[str] = []
    # Follows hard links only, so that nothing is read from outside of the file, or twice.
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in found:
        yield name.removeprefix("layers/").replace("/vars/", "/"), _dataset(file[name], limit)


def _names(group, attribute: str) -> Iterator[str]:
    """Yields a list of names. Keras splits those that are too long for one attribute."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    for part in parts or [attribute]:
        for name in group.attrs[part]:
            if not isinstance(name, _STRINGS):
                raise ValueError(f"{part} contains something other than names")
            yield name.decode() if isinstance(name, bytes) else str(name)


def _inside(group, name: str):
    """Returns a member by its path. Follows hard links only."""
    import h5py

    for part in name.strip("/").split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{name[:80]!r} is not in this file")
        group = group[part]
    return group


def _dataset(dataset, limit: int) -> Stored:
    """Returns a dataset of numbers in this file, no larger than a well-compressed one can be."""
    bfloat16 = dataset.attrs.get("dtype") == "bfloat16"  # how Keras stores a type that h5 lacks
    if not (dataset.dtype.kind in "fiu" or bfloat16) or dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"{dataset.name[:80]} stores no numbers in this file")
    if dataset.nbytes > limit:
        raise ValueError(f"{dataset.name[:80]} declares {dataset.nbytes:,} bytes")

    def read() -> np.ndarray:
        if bfloat16:
            import ml_dtypes

            return np.asarray(dataset[()]).view(ml_dtypes.bfloat16)
        return np.asarray(dataset)

    return Stored(tuple(dataset.shape), read)


def write_h5(path, tensors: dict[str, np.ndarray], preprocessing) -> Path:
    """Writes an h5 file for keras.applications, which loads it by the order of its layers.

    Args:
        path: Path of the file.
        tensors: Dict of arrays by layer/variable, in the order of the layers.
        preprocessing: Pair (scale, offset) of sequences of floats, the model's preprocessing.

    Returns:
        The path.
    """
    import h5py

    # keras.applications divides by 255, then subtracts a mean and divides by the root of a variance.
    scale, offset = (np.asarray(numbers, np.float64) for numbers in preprocessing)
    deviation = 1 / (255 * scale)
    statistics = {
        "normalization/mean": np.float32(-offset * deviation),
        "normalization/variance": np.float32(deviation**2),
        "normalization/count": np.zeros((), np.int32),
    }
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in (statistics | tensors).items():
        layer, variable = name.split("/")
        layers.setdefault(layer, {})[variable] = value
    with replacing(path) as temporary, writing(path), h5py.File(temporary, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"  # the format of this file
        for layer, variables in layers.items():
            group = file.create_group(layer)
            names = {variable: f"{layer}/{_keras2(layer, variable)}:0" for variable in variables}
            group.attrs["weight_names"] = [name.encode() for name in names.values()]
            for variable, value in variables.items():
                group.create_dataset(names[variable], data=value)
    return Path(path)


def _keras2(layer: str, variable: str) -> str:
    return "depthwise_kernel" if layer.endswith("dwconv") and variable == "kernel" else variable

"""Reads h5 files of Keras 2, Keras 3 and keras.applications, and writes those of keras.applications."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.files import replacing, writing
from keras_effnet.weights.formats import hdf5
from keras_effnet.weights.formats.tensors import Stored, Tensors

_DEEP = "depthwise_conv2d"
_WHOLE = "model_weights"  # the group of the layers, beside that of the optimizer


@contextmanager
def opened_h5(file, path: Path) -> Iterator[Tensors]:
    """Opens an h5 file of Keras. The tensors can be read while the context is open.

    Args:
        file: Path of the h5 file.
        path: Path to name in errors.

    Yields:
        Dict from name to `Stored`. Names are layer/variable in legacy files (weights only or a whole model), and
        layer/number in files of Keras 3.

    Raises:
        ValueError: If the file is damaged, or not of Keras.
    """
    with opened_h5_file(file, path) as opened_file:
        with _damage_named(path):
            tensors = dict((_h5_legacy if is_legacy(opened_file) else _h5_keras3)(opened_file))
        yield tensors


@contextmanager
def opened_h5_file(file, path: Path) -> Iterator[hdf5.File]:
    """Opens an h5 file.

    Args:
        file: Path of the h5 file.
        path: Path to name in errors.

    Yields:
        A `hdf5.File`.

    Raises:
        ValueError: If the file is damaged.
    """
    with open(file, "rb") as data:
        with _damage_named(path):
            opened_file = hdf5.File(data)
        yield opened_file


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds
        raise ValueError(
            f"Expected an h5 file of Keras' structure. Received: {str(path)!r} ({one_line(error)})"
        ) from error


def is_legacy(file: hdf5.File) -> bool:
    """Returns whether an h5 file has the structure of Keras 2 and of Keras 1.

    Args:
        file: `hdf5.File`.
    """
    return _WHOLE in file.members(file.root) or any(name.startswith("layer_names") for name in file.root.attributes)


def _with_layers(file: hdf5.File) -> hdf5.Item:
    """Returns the group that has the layers of a legacy file."""
    return file.find(file.root, _WHOLE) if _WHOLE in file.members(file.root) else file.root


def layers_of(file: hdf5.File) -> Iterator[tuple[str, dict[tuple[str, str], Stored]]]:
    """Yields the layers of a legacy file, with their variables.

    Args:
        file: `hdf5.File`.

    Yields:
        Tuple of the layer's name, and a dict from (owner, variable) to `Stored`. The owner is the name that the layer
        had when it was built or, where the layer is a model, that of a layer in it.

    Raises:
        ValueError: If two variables have the same name.
    """
    group = _with_layers(file)
    taken: set[str] = set()
    stored = _Reader(file)
    for layer in file.names(group, "layer_names"):
        if layer in taken:
            raise ValueError(f"{layer[:80]!r} occurs twice")
        taken.add(layer)
        members = file.find(group, layer)
        names = list(file.names(members, "weight_names"))
        found: dict[tuple[str, str], Stored] = {}
        for name in names:
            *front, variable = name.split(":")[0].split("/")
            key = ("/".join(front) or layer, variable)
            if key in found:
                raise ValueError(f"{name[:80]!r} occurs twice in {layer[:80]!r}")
            found[key] = stored(file.find(members, name), name)
        yield layer, found


MARK = "stem_conv"  # each net of keras.applications has a layer of this name


def names_when_built(layers: dict[str, dict[tuple[str, str], Stored]], version: str) -> dict[str, str]:
    """Returns the names that renamed layers of a net had when they were built, which their variables still have.

    Users of Keras 2 write `layer._name += "_2"` so that two nets fit in a model. The addition is taken back if it is
    that of a whole net, and if no other layer has, or had, one of the net's names.

    Args:
        layers: See `layers_of()`.
        version: String. The version of Keras that wrote the file.

    Returns:
        Dict from the name of a layer to the name that it had.
    """
    if not version.startswith("2."):  # Keras 3 renames the variables too
        return {}
    additions: dict[tuple[str, str], dict[str, str]] = {}
    for layer, variables in layers.items():
        owners = {owner for owner, _ in variables}
        owner = owners.pop() if len(owners) == 1 else layer
        front, found, back = layer.partition(owner)
        if found and (front or back):
            additions.setdefault((front, back), {})[layer] = owner
    whole = [place for place, found in additions.items() if MARK in found.values()]
    if len(whole) != 1:
        return {}
    (front, back), renamed = whole[0], additions[whole[0]]
    built = set(renamed.values())
    others = {name for layer in layers.keys() - renamed.keys() for name in (layer, *(who for who, _ in layers[layer]))}
    if len(built) != len(renamed) or built & others:
        return {}
    for layer, variables in layers.items():
        name = layer[len(front) : len(layer) - len(back)]
        if not variables and layer == front + name + back and name and name not in layers and name not in built:
            renamed[layer] = name
            built.add(name)
    return renamed


def _h5_legacy(file: hdf5.File) -> Iterator[tuple[str, Stored]]:
    layers = dict(layers_of(file))
    renamed = names_when_built(layers, _version(file))
    for layer, variables in layers.items():
        is_model = len({owner for owner, _ in variables}) > 1
        for (owner, variable), stored in variables.items():
            yield f"{layer}/{owner}/{variable}" if is_model else f"{renamed.get(layer, layer)}/{variable}", stored


def _h5_keras3(file: hdf5.File) -> Iterator[tuple[str, Stored]]:
    found: list[tuple[str, hdf5.Item]] = []
    dependencies: dict[str, list[str]] = {}

    for name, item in file.items():
        model, _, layer = _with_slashes(name).rpartition("/")
        if item.is_dataset:
            found.append((name, item))
        elif model.rpartition("/")[2] == _DEPENDENCIES:
            dependencies.setdefault(model, []).append(layer)
    usual = {f"{model}/{old}": new for model, names in dependencies.items() for old, new in _renumbered(names).items()}
    taken: set[str] = set()
    stored = _Reader(file)
    for name, item in found:
        told = _with_slashes(name)
        if usual:
            told = _as_layers(told, usual)
            if told in taken:
                raise ValueError(f"{told[:80]!r} occurs twice")
            taken.add(told)
        yield told.removeprefix("layers/").replace("/vars/", "/"), stored(item, name)


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")  # on Windows, tf_keras has joined the parts with backslashes


# Where Keras 2.12 to 2.14 stored the layers of a model. Keras 2.15 and later call it "layers".
_DEPENDENCIES = "_layer_checkpoint_dependencies"


def _as_layers(name: str, usual: dict[str, str]) -> str:
    """Returns the name that a tensor of Keras 2.12 to 2.14 has in later releases."""
    parts = name.split("/")
    told = [usual.get("/".join(parts[: end + 1]), part) for end, part in enumerate(parts)]
    return "/".join("layers" if part == _DEPENDENCIES else part for part in told)


def _renumbered(names: list[str]) -> dict[str, str]:
    """Returns the names that the layers of a model have in later releases: numbered by their class, without gaps.

    Reference:
        keras/src/saving/saving_lib.py and keras/src/engine/functional.py. Until 2.13, a layer with weights counts
        twice. Each layer has one group, with or without weights.
    """
    numbers: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        kind, _, number = name.rpartition("_") if re.search(r"_\d{1,6}$", name) else (name, "", "0")
        numbers.setdefault(kind, []).append((int(number), name))
    found = {}
    for kind, layers in numbers.items():
        before = -1
        for rank, (number, name) in enumerate(sorted(layers)):
            if number - before > (2 if rank else 1):
                raise ValueError(f"a layer before {name[:80]!r} is missing")
            before = number
            found[name] = f"{kind}_{rank}" if rank else kind
    return found


class _Reader:
    """Reads the datasets of a file, each once.

    Args:
        file: `hdf5.File`.
    """

    def __init__(self, file: hdf5.File):
        self._file = file
        self._taken: set[int] = set()

    def __call__(self, item: hdf5.Item, name: str) -> Stored:
        if item.address in self._taken:
            raise ValueError(f"{name[:80]!r} is also the dataset of another variable")
        self._taken.add(item.address)
        dataset = self._file.dataset(item, name)
        # How Keras 3 and Keras 2 store a type that h5 lacks.
        bfloat16 = self._file.text(item, "dtype") == "bfloat16" or dataset.dtype == np.dtype("V2")
        if bfloat16 and dataset.dtype.itemsize != 2:
            raise ValueError(f"{name[:80]!r} stores no bfloat16")

        def read() -> np.ndarray:
            if bfloat16:
                import ml_dtypes

                return dataset.read().view(ml_dtypes.bfloat16)
            return dataset.read()

        return Stored(dataset.shape, read)


def is_h5(path) -> bool:
    """Returns whether a path is an h5 file.

    Args:
        path: Path.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(8) == hdf5.SIGNATURE


def keras_version(path) -> str | None:
    """Returns the version of Keras that wrote an h5 file, or None for any other file.

    Args:
        path: Path of a file.
    """
    if not is_h5(path):
        return None
    with opened_h5_file(path, Path(path)) as file, _damage_named(Path(path)):
        return _version(file) or None


def names_layers(path) -> bool:
    """Returns whether an h5 file holds the names of layers.

    Keras numbers layers by their class in `.weights.h5` files. Since 3.6, it adds their names.

    Args:
        path: Path of an h5 file.

    Raises:
        ValueError: If the file is damaged.
    """
    with opened_h5_file(path, Path(path)) as file, _damage_named(Path(path)):
        groups = (item for name, item in file.items() if name.rpartition("/")[2] == "vars" and item.is_group)
        first = next(groups, None)
        return is_legacy(file) or first is None or "name" in first.attributes


def _version(file: hdf5.File) -> str:
    return file.text(_with_layers(file), "keras_version") or file.text(file.root, "keras_version") or ""


def model_config(path) -> str | None:
    """Returns the configuration of the whole model that Keras 3 has saved in an h5 file.

    Args:
        path: Path of a file of any format.

    Returns:
        String of JSON, or None where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    if not (keras_version(path) or "").startswith("3."):
        return None
    with opened_h5_file(path, Path(path)) as file, _damage_named(Path(path)):
        return file.text(file.root, "model_config")


def padding_of(path) -> str | None:
    """Returns the padding of a net of this package or of keras-hub in an h5 file.

    Its layers are listed, also those without weights.

    Args:
        path: Path of a file of any format.

    Returns:
        Key of `nets.architecture.EPSILONS`, or None where the file is of another format or program.

    Raises:
        ValueError: If the file is damaged.
    """
    if not is_h5(path):
        return None
    with opened_h5_file(path, Path(path)) as file, _damage_named(Path(path)):
        if is_legacy(file):
            names, own, pad = list(file.names(_with_layers(file), "layer_names")), "preprocessing", "stem_conv_pad"
        else:
            parts = (part for name, _ in file.items() for part in _with_slashes(name).split("/"))
            names = list(dict.fromkeys(parts))
            own, pad = "rescaling", "zero_padding2d"
            # keras_hub/src/models/efficientnet/efficientnet_backbone.py, 0.32: before the stem and each depthwise one.
            pads, deep = (sum(bool(re.fullmatch(rf"{kind}(_\d+)?", name)) for name in names) for kind in (pad, _DEEP))
            if deep and pads == deep + 1:
                return "symmetric"
    # keras.applications has padding layers too, and normalizes in a layer of its own.
    if not any(name.endswith(own) for name in names) or any(name.startswith("normalization") for name in names):
        return None
    return "symmetric" if any(name.endswith(pad) for name in names) else "same"


def write_h5(path, tensors: dict[str, np.ndarray], preprocessing=None) -> Path:
    """Writes an h5 file for keras.applications, which loads it by the order of its layers.

    Args:
        path: Path of the file.
        tensors: Dict of arrays by layer/variable, in the order of the layers.
        preprocessing: Pair (scale, offset) of sequences of floats, the model's preprocessing. Defaults to None: its net
            has no weights for it, as in V2.

    Returns:
        The path.
    """
    import h5py

    statistics: dict[str, Any] = {}
    if preprocessing is not None:
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
    return "depthwise_kernel" if layer.endswith(("dwconv", "dwconv2")) and variable == "kernel" else variable

"""Reads h5 files of Keras 2, Keras 3 and keras.applications, and writes those of keras.applications."""

import mmap
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.files import replacing, writing
from keras_effnet.weights.formats.tensors import Stored, Tensors

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

_DEEP = "depthwise_conv2d"


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
    with opened_h5_file(file, path) as opened_file:
        with _damage_named(path):
            tensors = dict((_h5_legacy if is_legacy(opened_file) else _h5_keras3)(opened_file, path))
        yield tensors


@contextmanager
def opened_h5_file(file, path: Path) -> Iterator[Any]:
    """Opens an h5 file.

    Args:
        file: Path of the h5 file.
        path: Path to name in errors.

    Yields:
        A `h5py.File`.

    Raises:
        ValueError: If the file is damaged.
    """
    import h5py

    with _damage_named(path):
        _check(file)
        opened_file = h5py.File(file, "r")
    with opened_file:
        yield opened_file


def _check(path) -> None:
    """Raises for damage that HDF5 2.0 does not stand: it would fill the memory, or never end.

    Reference:
        HDF5 File Format Specification 3.0. Its sections stand in the functions.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_superblock(data)
        _check_texts(data, _lengths_of_texts(data))


def _check_superblock(data: mmap.mmap) -> None:
    """Raises for a file without addresses and lengths of 8 bytes, or with a driver, whose size is not checked.

    Reference:
        "II.A. Disk Format: Level 0A - Format Signature and Superblock".
    """
    sizes = data[13:15] if data[8] < 2 else data[9:11]
    drivers = {0: data[48:56], 1: data[52:60]}
    if data[:8] != HDF5_SIGNATURE or sizes != b"\x08\x08" or drivers.get(data[8], b"\xff" * 8) != b"\xff" * 8:
        raise ValueError("it does not begin as the files of Keras do")


def _lengths_of_texts(data: mmap.mmap) -> dict[int, dict[int, int]]:
    """Returns a dict from the address of a heap of texts to a dict from the index of a text to its length.

    Raises:
        ValueError: If a free entry has no length: HDF5 searches the heap without end. Or if heaps overlap.

    Reference:
        "III.E. Level 1E - Global Heap".
    """
    found: dict[int, dict[int, int]] = {}
    left = len(data) // 16 + 1  # texts to look at: more only where heaps overlap
    for heap in re.finditer(rb"GCOL\x01\0\0\0", data):
        place = heap.end() + 8
        end = min(heap.start() + int.from_bytes(data[heap.end() : place], "little"), len(data))
        lengths = found.setdefault(heap.start(), {})
        while place + 16 <= end:
            left -= 1
            if not left:
                raise ValueError("its texts overlap")
            index, length = struct.unpack("<H6xQ", data[place : place + 16])
            if not index and length < 16:  # it counts these 16 bytes
                raise ValueError("a text in it is damaged")
            lengths[index] = length
            place += 16 + -(-length // 8) * 8 if index else length
    return found


def _check_texts(data: mmap.mmap, heaps: dict[int, dict[int, int]]) -> None:
    """Raises for an attribute whose text is declared longer than it is: HDF5 reserves that many bytes, up to 4 GB.

    Reference:
        "IV.A.2.b. The Dataspace Message", "IV.A.2.d. The Datatype Message" and "IV.A.2.m. The Attribute Message".
    """
    left = len(data) // 16 + 1  # texts to look at: more only where attributes overlap
    for declared in re.finditer(rb"\x10\0\0\0\x10\0\0\0\x01\0\0\0", data):  # the type of a text of any length
        for shape in (declared.end() + 4, declared.end() + 8):  # without and with padding
            head = {b"\x01": 8, b"\x02": 4}.get(data[shape : shape + 1])
            if head is None or shape + head > len(data):
                continue
            sides, has_limits = data[shape + 1], data[shape + 2] & 1
            place = shape + head + 8 * sides * (1 + has_limits)
            while place + 16 <= len(data):
                length, address, index = struct.unpack("<IQI", data[place : place + 16])
                if address not in heaps:
                    break
                left -= 1
                if not left:
                    raise ValueError("its texts overlap")
                if length > heaps[address].get(index, len(data)):
                    raise ValueError("a text in it is damaged")
                place += 16


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # h5py raises exceptions of many kinds for a damaged file
        raise ValueError(
            f"Expected an h5 file of Keras' structure. Received: {str(path)!r} ({one_line(error)})"
        ) from error


def is_legacy(file) -> bool:
    """Returns whether an h5 file has the structure of Keras 2 and of Keras 1.

    Args:
        file: A `h5py.File`.
    """
    return "model_weights" in file or any(key.startswith("layer_names") for key in file.attrs)


def layers_of(file, path: Path) -> Iterator[tuple[str, dict[tuple[str, str], Stored]]]:
    """Yields the layers of a legacy file, with their variables.

    Args:
        file: A `h5py.File`.
        path: Path whose size limits what the file may declare.

    Yields:
        Tuple of the layer's name, and a dict from (owner, variable) to `Stored`. The owner is the name that the layer
        had when it was built or, where the layer is a model, that of a layer in it.

    Raises:
        ValueError: If two variables have the same name.
    """
    group: Any = _inside(file, "model_weights") if "model_weights" in file else file
    stored = _Reader(file, path)
    for layer in _names(group, "layer_names"):
        members = _inside(group, layer)
        names = list(_names(members, "weight_names"))
        found: dict[tuple[str, str], Stored] = {}
        for name in names:
            *front, variable = name.split(":")[0].split("/")
            key = ("/".join(front) or layer, variable)
            if key in found:
                raise ValueError(f"{name[:80]!r} occurs twice in {layer[:80]!r}")
            found[key] = stored(_inside(members, name))
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


def _h5_legacy(file, path: Path) -> Iterator[tuple[str, Stored]]:
    layers = dict(layers_of(file, path))
    renamed = names_when_built(layers, _version(file))
    for layer, variables in layers.items():
        is_model = len({owner for owner, _ in variables}) > 1
        for (owner, variable), stored in variables.items():
            yield f"{layer}/{owner}/{variable}" if is_model else f"{renamed.get(layer, layer)}/{variable}", stored


def _h5_keras3(file, path: Path) -> Iterator[tuple[str, Stored]]:
    import h5py

    found: list[str] = []
    dependencies: dict[str, list[str]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(name)
            return
        model, _, layer = _with_slashes(name).rpartition("/")
        if model.rpartition("/")[2] == _DEPENDENCIES:
            dependencies.setdefault(model, []).append(layer)

    # Follows hard links only, so that nothing is read from outside of the file, or twice.
    file.visititems(note)
    usual = {f"{model}/{old}": new for model, names in dependencies.items() for old, new in _renumbered(names).items()}
    taken: set[str] = set()
    stored = _Reader(file, path)
    for name in found:
        told = _with_slashes(name)
        if usual:
            told = _as_layers(told, usual)
            if told in taken:
                raise ValueError(f"{told[:80]!r} occurs twice")
            taken.add(told)
        yield told.removeprefix("layers/").replace("/vars/", "/"), stored(file[name])


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


def _names(group, attribute: str) -> Iterator[str]:
    """Yields a list of names. Keras splits those that are too long for one attribute."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    for part in parts or [attribute]:
        for name in _attribute(group, part, dimensions=1):
            yield name.decode() if isinstance(name, bytes) else str(name)


def _inside(group, name: str):
    """Returns a member by its path. Follows hard links only."""
    import h5py

    for part in name.strip("/").split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{name[:80]!r} is not in this file")
        group = group[part]
    return group


class _Reader:
    """Reads the datasets of a file: each once, and together no more than the file can hold.

    Args:
        file: A `h5py.File`.
        path: Path whose size limits what a compressed dataset may declare.
    """

    def __init__(self, file, path: Path):
        self._limit = 1000 * path.stat().st_size
        self._left = file.id.get_filesize()
        self._taken: set[Any] = set()

    def __call__(self, dataset) -> Stored:
        stored = _dataset(dataset, self._limit)
        if dataset.id in self._taken:  # which compares the places in the file
            raise ValueError(f"{dataset.name[:80]} is also the dataset of another variable")
        self._taken.add(dataset.id)
        if dataset.chunks is None:  # not compressed
            self._left -= dataset.nbytes
        if self._left < 0 or (dataset.nbytes and not dataset.id.get_storage_size()):
            raise ValueError("its datasets declare more bytes than it has")
        return stored


def _dataset(dataset, limit: int) -> Stored:
    """Returns a dataset of numbers in this file, no larger than a well-compressed one can be."""
    # How Keras 3 and Keras 2 store a type that h5 lacks.
    bfloat16 = text_of(dataset, "dtype") == "bfloat16" or dataset.dtype == np.dtype("V2")
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


def is_h5(path) -> bool:
    """Returns whether a path is an h5 file.

    Args:
        path: Path.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(8) == HDF5_SIGNATURE


def text_of(item, attribute: str) -> str | None:
    """Returns an attribute that is a text, or None if there is no such attribute.

    Args:
        item: A group or dataset of h5py.
        attribute: String. The name of the attribute.

    Raises:
        ValueError: If the attribute is not a text.
    """
    if attribute not in item.attrs:
        return None
    value = _attribute(item, attribute, dimensions=0)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _attribute(item, attribute: str, dimensions: int) -> Any:
    """Returns an attribute that is a text, or a list of texts: Keras stores no others.

    Raises:
        ValueError: If the attribute is of another type. It is not read then: for some types that only a damaged file
            declares, h5py 3.16 with HDF5 2.0 ends the process.
    """
    import h5py

    stored = item.attrs.get_id(attribute)
    if len(stored.shape) == dimensions == 1 and not stored.shape[0]:
        return []  # the names of a layer without weights, stored as an empty list of numbers
    if len(stored.shape) == dimensions and isinstance(stored.get_type(), h5py.h5t.TypeStringID):
        value = item.attrs[attribute]
        if all(isinstance(each, bytes | str) for each in (value if dimensions else [value])):
            return value
    raise ValueError(f"its attribute {attribute} is not {'a list of names' if dimensions else 'a text'}")


def keras_version(path) -> str | None:
    """Returns the version of Keras that wrote an h5 file, or None for any other file.

    Args:
        path: Path of a file.
    """
    if not is_h5(path):
        return None
    with opened_h5_file(path, Path(path)) as opened_file, _damage_named(Path(path)):
        return _version(opened_file) or None


def names_layers(path) -> bool:
    """Returns whether an h5 file holds the names of layers.

    Keras numbers layers by their class in `.weights.h5` files. Since 3.6, it adds their names.

    Args:
        path: Path of an h5 file.

    Raises:
        ValueError: If the file is damaged.
    """
    import h5py

    def named(name: str, item: Any) -> bool | None:
        is_layer = isinstance(item, h5py.Group) and name.rpartition("/")[2] == "vars"
        return "name" in item.attrs if is_layer else None

    with opened_h5_file(path, Path(path)) as opened_file, _damage_named(Path(path)):
        return is_legacy(opened_file) or opened_file.visititems(named) is not False


def _version(file) -> str:
    group = file.get("model_weights", file)
    return text_of(group, "keras_version") or text_of(file, "keras_version") or ""


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
    with opened_h5_file(path, Path(path)) as opened_file, _damage_named(Path(path)):
        return text_of(opened_file, "model_config")


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
    with opened_h5_file(path, Path(path)) as opened_file, _damage_named(Path(path)):
        group = opened_file.get("model_weights", opened_file)
        if is_legacy(opened_file):
            names, own, pad = list(_names(group, "layer_names")), "preprocessing", "stem_conv_pad"
        else:
            found: list[str] = []
            opened_file.visit(found.append)
            names = list(dict.fromkeys(part for name in found for part in _with_slashes(name).split("/")))
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

"""Reads h5 files of Keras 2, Keras 3 and keras.applications, and writes those of keras.applications."""

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.files import replacing, writing
from keras_effnet.weights.formats.h5_structure import HDF5_SIGNATURE, Attribute, Headers, check
from keras_effnet.weights.formats.tensors import Stored, Tensors

_DEEP = "depthwise_conv2d"
_WHOLE = "model_weights"  # the group of the layers, beside that of the optimizer


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


class H5File:
    """An open h5 file.

    Args:
        root: A `h5py.File`.
        headers: `Headers` of its groups and datasets.
    """

    def __init__(self, root, headers: Headers):
        self.root = root
        self.headers = headers

    def attributes(self, item) -> dict[str, Attribute]:
        """Returns the attributes of a group or dataset.

        Args:
            item: A group or dataset of h5py.
        """
        return self.headers.attributes(address_of(item))

    def text(self, item, name: str) -> str | None:
        """Returns an attribute that is a text, or None if there is no such attribute.

        Args:
            item: A group or dataset of h5py.
            name: String. The name of the attribute.

        Raises:
            ValueError: If the attribute is not a text, or damaged.
        """
        attribute = self.attributes(item).get(name)
        if attribute is None:
            return None
        if not attribute.stored or attribute.shape:
            raise ValueError(f"its attribute {name!r} is not a text")
        return self.headers.values(attribute)[0].decode(errors="replace")

    def names(self, group, name: str) -> Iterator[str]:
        """Yields a list of names. Keras splits those that are too long for one attribute.

        Args:
            group: A group of h5py.
            name: String. The name of the attribute, without the number of a part.

        Raises:
            ValueError: If there is no such attribute, if it is not a list of texts, or if it is damaged.
        """
        attributes = self.attributes(group)
        parts = [name] if name in attributes else []
        while f"{name}{len(parts)}" in attributes:
            parts.append(f"{name}{len(parts)}")
        for part in parts or [name]:
            attribute = attributes.get(part)
            if attribute is None:
                raise ValueError(f"it has no attribute {part!r}")
            if attribute.shape == (0,):  # the names of a layer without weights, an empty list of numbers
                continue
            if not attribute.stored or len(attribute.shape) != 1:
                raise ValueError(f"its attribute {part!r} is not a list of names")
            for each in self.headers.values(attribute):
                yield each.decode()

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yields the path and the object of each group and dataset, once, in the order of their names.

        It follows hard links only, so that nothing is read from outside of the file. So does h5py's `visititems()`, but
        that never ends where parts of a damaged group link to each other in a circle.
        """
        import h5py

        seen = {address_of(self.root)}
        waiting = [("", self.root)]
        while waiting:
            path, item = waiting.pop()
            if path:
                yield path, item
            members = []
            for name in self._members(item) if isinstance(item, h5py.Group) else ():
                if isinstance(item.get(name, getlink=True), h5py.HardLink):
                    member = item[name]
                    address = address_of(member)
                    if address not in seen:
                        seen.add(address)
                        members.append((f"{path}/{name}" if path else name, member))
            waiting += reversed(members)

    def _members(self, group) -> list[str]:
        """Returns the names of a group's members. They are in the file, and do not overlap there."""
        found: list[str] = []
        left = self.root.id.get_filesize()

        def note(name: bytes) -> None:
            nonlocal left
            left -= len(name)
            if left < 0:
                raise ValueError("names in it overlap")
            found.append(name.decode(errors="surrogateescape"))

        group.id.links.iterate(note)
        return found

    def layers(self) -> Any:
        """Returns the group that has the layers of a legacy file.

        Raises:
            ValueError: If it is in another file.
        """
        return _inside(self.root, _WHOLE) if self.is_whole else self.root

    @property
    def is_whole(self) -> bool:
        """Whether it is a legacy file with the layers of a whole model."""
        return self.root.get(_WHOLE, getlink=True) is not None


def address_of(item) -> int:
    """Returns the address of the header of a group or dataset.

    Args:
        item: A group or dataset of h5py.
    """
    import h5py

    # h5o.get_info() also follows the links between parts of a group, which may form circles.
    low, high = h5py.h5g.get_objinfo(item.id).objno
    return low + (high << 32)


@contextmanager
def opened_h5_file(file, path: Path) -> Iterator[H5File]:
    """Opens an h5 file.

    Args:
        file: Path of the h5 file.
        path: Path to name in errors.

    Yields:
        An `H5File`.

    Raises:
        ValueError: If the file is damaged.
    """
    import h5py

    with ExitStack() as stack:
        with _damage_named(path):
            data = stack.enter_context(open(file, "rb"))
            with mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                check(mapped)
            root = stack.enter_context(h5py.File(file, "r"))
        yield H5File(root, Headers(data))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # h5py raises exceptions of many kinds for a damaged file
        raise ValueError(
            f"Expected an h5 file of Keras' structure. Received: {str(path)!r} ({one_line(error)})"
        ) from error


def is_legacy(file: H5File) -> bool:
    """Returns whether an h5 file has the structure of Keras 2 and of Keras 1.

    Args:
        file: `H5File`.
    """
    return file.is_whole or any(name.startswith("layer_names") for name in file.attributes(file.root))


def layers_of(file: H5File, path: Path) -> Iterator[tuple[str, dict[tuple[str, str], Stored]]]:
    """Yields the layers of a legacy file, with their variables.

    Args:
        file: `H5File`.
        path: Path whose size limits what the file may declare.

    Yields:
        Tuple of the layer's name, and a dict from (owner, variable) to `Stored`. The owner is the name that the layer
        had when it was built or, where the layer is a model, that of a layer in it.

    Raises:
        ValueError: If two variables have the same name.
    """
    group = file.layers()
    taken: set[str] = set()
    stored = _Reader(file, path)
    for layer in file.names(group, "layer_names"):
        if layer in taken:
            raise ValueError(f"{layer[:80]!r} occurs twice")
        taken.add(layer)
        members = _inside(group, layer)
        names = list(file.names(members, "weight_names"))
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


def _h5_legacy(file: H5File, path: Path) -> Iterator[tuple[str, Stored]]:
    layers = dict(layers_of(file, path))
    renamed = names_when_built(layers, _version(file))
    for layer, variables in layers.items():
        is_model = len({owner for owner, _ in variables}) > 1
        for (owner, variable), stored in variables.items():
            yield f"{layer}/{owner}/{variable}" if is_model else f"{renamed.get(layer, layer)}/{variable}", stored


def _h5_keras3(file: H5File, path: Path) -> Iterator[tuple[str, Stored]]:
    import h5py

    found: list[str] = []
    dependencies: dict[str, list[str]] = {}

    for name, item in file.items():
        model, _, layer = _with_slashes(name).rpartition("/")
        if isinstance(item, h5py.Dataset):
            found.append(name)
        elif model.rpartition("/")[2] == _DEPENDENCIES:
            dependencies.setdefault(model, []).append(layer)
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
        yield told.removeprefix("layers/").replace("/vars/", "/"), stored(file.root[name])


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
        file: `H5File`.
        path: Path whose size limits what a compressed dataset may declare.
    """

    def __init__(self, file: H5File, path: Path):
        self._file = file
        self._limit = 1000 * path.stat().st_size
        self._left = file.root.id.get_filesize()
        self._taken: set[Any] = set()

    def __call__(self, dataset) -> Stored:
        stored = self._stored(dataset)
        if dataset.id in self._taken:  # which compares the places in the file
            raise ValueError(f"{dataset.name[:80]} is also the dataset of another variable")
        self._taken.add(dataset.id)
        if dataset.chunks is None:  # not compressed
            self._left -= dataset.nbytes
        if self._left < 0 or (dataset.nbytes and not dataset.id.get_storage_size()):
            raise ValueError("its datasets declare more bytes than it has")
        return stored

    def _stored(self, dataset) -> Stored:
        """Returns a dataset of numbers in this file, no larger than a well-compressed one can be."""
        self._file.headers.check_chunks(address_of(dataset))
        # How Keras 3 and Keras 2 store a type that h5 lacks.
        bfloat16 = self._file.text(dataset, "dtype") == "bfloat16" or dataset.dtype == np.dtype("V2")
        if not (dataset.dtype.kind in "fiu" or bfloat16) or dataset.external is not None or dataset.is_virtual:
            raise ValueError(f"{dataset.name[:80]} stores no numbers in this file")
        if dataset.nbytes > self._limit:
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
    import h5py

    with opened_h5_file(path, Path(path)) as file, _damage_named(Path(path)):
        groups = (item for name, item in file.items() if name.rpartition("/")[2] == "vars")
        first = next((item for item in groups if isinstance(item, h5py.Group)), None)
        return is_legacy(file) or first is None or "name" in file.attributes(first)


def _version(file: H5File) -> str:
    return file.text(file.layers(), "keras_version") or file.text(file.root, "keras_version") or ""


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
            names, own, pad = list(file.names(file.layers(), "layer_names")), "preprocessing", "stem_conv_pad"
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

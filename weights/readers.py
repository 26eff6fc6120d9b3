"""From a file to `{name: array}` in the names of the program that wrote it. No Keras, no torch."""

import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMATS = ("keras", "lukemelas")  # namings whose files `read()` knows
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py: first object of a file from before torch 1.6


def read(path) -> tuple[str, dict[str, np.ndarray]]:
    """Reads a file of a foreign format, which is recognised by its content.

    Args:
        path: Path of a Keras h5 file or a torch state dict.

    Returns:
        Name of the naming (a key of `namemaps.NAMINGS`), and the arrays by name.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If its content is not what its format promises, or of no known format.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(HDF5_SIGNATURE):
        return "keras", read_h5(path)
    if start.startswith(b"\x80"):
        tensors = read_torch(path)
        if "_conv_stem.weight" not in tensors:
            raise ValueError(
                "Expected the names of EfficientNet-PyTorch (_conv_stem.weight, ...). "
                f"Received: {str(path)!r} without them"
            )
        return "lukemelas", tensors
    raise ValueError(
        f"Expected weights as .weights.h5 or .keras of this package, .h5 of keras.applications, or a legacy .pth of "
        f"EfficientNet-PyTorch. Received: {str(path)!r}, whose first bytes are {start[:8]!r}"
    )


def read_h5(path) -> dict[str, np.ndarray]:
    """Reads a legacy Keras h5 file, weights only or whole model, by layer name.

    Args:
        path: Path of the file.

    Returns:
        Arrays by `layer/variable`.

    Raises:
        ValueError: If the file has another structure.
    """
    import h5py

    tensors = {}
    try:
        with h5py.File(path, "r") as file:
            group: Any = file.get("model_weights", file)
            for layer in group.attrs["layer_names"]:
                layer = layer.decode() if isinstance(layer, bytes) else layer
                for name in group[layer].attrs["weight_names"]:
                    name = name.decode() if isinstance(name, bytes) else name
                    variable = name.rsplit("/", 1)[-1].split(":")[0].replace("depthwise_kernel", "kernel")
                    tensors[f"{layer}/{variable}"] = np.asarray(group[layer][name])
    except (KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected an h5 file of keras.applications' structure. Received: {str(path)!r} ({error})"
        ) from error
    return tensors


_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class _Tensor(NamedTuple):
    """What a state dict says of a tensor before its storage is read."""

    storage: tuple[str, str, int]  # dtype, key, number of elements
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _StateDict(pickle.Unpickler):
    """Unpickles what a state dict needs and nothing else: no name outside of this table is ever imported."""

    def find_class(self, module_name, global_name):
        match module_name, global_name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return self.rebuild
            case "torch", name if name in _STORAGES:
                return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no state dict needs")

    # A bound method, since a pickle can set attributes of a class or function that it names, but not of this.
    def rebuild(self, storage, offset, size, stride, *_):
        return _Tensor(storage, offset, size, stride)

    def persistent_load(self, pid):
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage" or dtype not in _STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no storage")
        return dtype, key, count


def _unpickle(file: io.BytesIO, size: int):
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if "PUT" in opcode.name and argument > size:  # the C unpickler allocates as many places as the number says
            raise pickle.UnpicklingError(f"its memo has a place {argument}")
    file.seek(start)
    return _StateDict(file).load()


def read_torch(path) -> dict[str, np.ndarray]:
    """Reads a state dict that torch saved before version 1.6, without torch and without running anything in it.

    Args:
        path: Path of the file.

    Returns:
        Arrays by name.

    Raises:
        ValueError: If the file is damaged, holds anything but tensors, or asks for code to be run.

    Reference:
        torch/serialization.py, `_legacy_save` and `_legacy_load`.
    """
    data = Path(path).read_bytes()
    file = io.BytesIO(data)
    try:
        if _unpickle(file, len(data)) != TORCH_MAGIC:
            raise ValueError("it does not begin with torch's number")
        _protocol, system = _unpickle(file, len(data)), _unpickle(file, len(data))
        if system.get("little_endian") is not True:
            raise ValueError("it was not written on a little-endian machine")
        state, keys = _unpickle(file, len(data)), _unpickle(file, len(data))
        state = state.get("state_dict", state)
        wrong = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, _Tensor))]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no tensor")
        dtypes = {tensor.storage[1]: (tensor.storage[0], tensor.storage[2]) for tensor in state.values()}
        place, storages = file.tell(), {}
        for key in keys:
            dtype, promised = dtypes[key]
            count = int.from_bytes(data[place : place + 8], "little")
            if count != promised or place + 8 + count * np.dtype(dtype).itemsize > len(data):
                raise ValueError(f"storage {key} is cut short")
            storages[key] = np.frombuffer(data, dtype, count, place + 8)
            place += 8 + storages[key].nbytes
        return {name: _view(tensor, storages[tensor.storage[1]]) for name, tensor in state.items()}
    except Exception as error:  # unpickling a damaged file raises whatever its bytes happen to ask for
        raise ValueError(
            f"Expected a state dict saved by torch. Received: {str(path)!r}, but {error or type(error).__name__}"
        ) from error


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    numbers = (tensor.offset, *tensor.size, *tensor.stride)
    if len(tensor.size) != len(tensor.stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a tensor has size {tensor.size} and stride {tensor.stride}")
    if math.prod(tensor.size) and tensor.offset + sum(
        (n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True)
    ) >= len(storage):
        raise ValueError(f"a tensor of size {tensor.size} reaches beyond its storage")
    if math.prod(tensor.size) > len(storage):
        raise ValueError(f"a tensor of size {tensor.size} repeats its storage")
    strides = [stride * storage.itemsize for stride in tensor.stride]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.size, strides, writeable=False)


def is_own(path) -> bool:
    """Whether Keras 3 wrote this file: a `.keras` archive, or weights by layer in the order of a model's classes.

    Args:
        path: Path of a file.

    Returns:
        Boolean.
    """
    return bool(re.search(r"\.(keras|weights\.h5)$", str(path)))


def preprocessing_of(path):
    """The numbers of the preprocessing that a `.keras` file carries in its model.

    Args:
        path: Path of a file of any format.

    Returns:
        Pair (scale, offset) of lists of floats, or None where the file holds none.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if "config.json" not in archive.namelist():
            return None
        config = json.loads(archive.read("config.json"))
    for layer in config.get("config", {}).get("layers", []):
        if layer.get("class_name") == "Rescaling" and layer["config"]["name"].endswith("rescaling"):
            return tuple(np.ravel(layer["config"][key]).tolist() for key in ("scale", "offset"))
    return None

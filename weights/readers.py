"""From a file to `{name: array}` in the names of the program that wrote it. No Keras, no torch."""

import io
import json
import math
import pickletools
import re
import zipfile
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


def _dataset(dataset, file_size: int) -> np.ndarray:
    """Numbers that stand in this very file, no more of them than a well-compressed one can hold."""
    if dataset.dtype.kind not in "fiu" or dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"{dataset.name[:80]} holds no numbers of this file")
    if dataset.nbytes > 1000 * file_size:
        raise ValueError(f"{dataset.name[:80]} declares {dataset.nbytes:,} bytes")
    return np.asarray(dataset)


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
                    tensors[f"{layer}/{variable}"] = _dataset(group[layer][name], Path(path).stat().st_size)
    except Exception as error:  # h5py raises whatever a damaged file makes of it
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


class _Storage(NamedTuple):
    """What a state dict says of the numbers behind a tensor, which stand later in the file."""

    dtype: str
    key: str
    length: int


class _Tensor(NamedTuple):
    """What a state dict says of a tensor."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}" for name in _STORAGES),
}


class _Global(NamedTuple):
    name: str


def _unpickle(file: io.BytesIO):
    """Reads one pickle in a state dict's vocabulary. Nothing that it names is imported, called, hashed or printed."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(type(key) is str for key in items[::2]):
                    raise ValueError("it has a key that is no string")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise ValueError(f"it asks for {argument[:80].replace(' ', '.')}, which no state dict needs")
                stack.append(_Global(argument))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if function == _Global("collections OrderedDict") and arguments == ():
                    stack.append({})
                elif function == _Global("torch._utils _rebuild_tensor_v2") and isinstance(arguments[0], _Storage):
                    stack.append(_Tensor(*arguments[:4]))
                else:
                    raise ValueError("it calls what no state dict calls")
            case "BINPERSID":
                kind, storage, key, _, count, *_ = stack.pop()
                dtype = _STORAGES[storage.name.removeprefix("torch ")]
                if kind != "storage" or type(key) is not str or type(count) is not int:
                    raise ValueError("it refers to what is no storage")
                stack.append(_Storage(dtype, key, count))
            case "BUILD":
                stack.pop()  # torch's `_metadata`, the versions of a module's parts
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it has the instruction {name}, which no state dict needs")
    raise ValueError("it ends early")


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
        magic = _unpickle(file)
        if type(magic) is not int or magic != TORCH_MAGIC:
            raise ValueError("it does not begin with torch's number")
        _protocol, system = _unpickle(file), _unpickle(file)
        if system.get("little_endian") is not True:
            raise ValueError("it was not written on a little-endian machine")
        state, keys = _unpickle(file), _unpickle(file)
        state = state.get("state_dict", state)
        wrong = [name for name, value in state.items() if not isinstance(value, _Tensor)]
        if wrong:
            raise ValueError(f"{wrong[0][:80]!r} is no tensor")
        known = {tensor.storage.key: tensor.storage for tensor in state.values()}
        place, storages = file.tell(), {}
        for key in keys:
            dtype, _, promised = known[key]
            count = int.from_bytes(data[place : place + 8], "little")
            if count != promised or place + 8 + count * np.dtype(dtype).itemsize > len(data):
                raise ValueError(f"storage {key} is cut short")
            storages[key] = np.frombuffer(data, dtype, count, place + 8)
            place += 8 + storages[key].nbytes
        return {name: _view(tensor, storages[tensor.storage.key]) for name, tensor in state.items()}
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
    """Whether a file is called as Keras 3 calls its own: it reads them under these names only.

    Args:
        path: Path of a file.

    Returns:
        Boolean.
    """
    return bool(re.search(r"\.(keras|weights\.h5)$", str(path)))


def preprocessing_of(path):
    """The numbers of the preprocessing that a `.keras` file of this package carries in its model.

    Args:
        path: Path of a file of any format.

    Returns:
        Pair (scale, offset) of lists of floats, or None where the file holds none.

    Raises:
        ValueError: If the file is a damaged archive.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            layers = json.loads(archive.read("config.json"))["config"]["layers"]
        for layer in layers:
            if layer["class_name"] == "Rescaling" and layer["config"]["name"].endswith("preprocessing"):
                return tuple(np.ravel(layer["config"][key]).tolist() for key in ("scale", "offset"))
    except Exception as error:  # zipfile, zlib and json raise what a damaged file makes of it
        raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({error})") from error
    return None

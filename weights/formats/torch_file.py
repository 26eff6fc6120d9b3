"""Reads torch files, of the formats before and since version 1.6. Needs no torch and runs no code from a file."""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_effnet.errors import few, one_line

MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py: first object of a file from before torch 1.6

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
    "BFloat16Storage": "bfloat16",
}


class _Storage(NamedTuple):
    """The numbers of a tensor, which come later in the file."""

    dtype: str
    key: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, as a state dict describes it."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# Where training programs keep the weights: timm/models/_helpers.py, load_state_dict; Lightning; PyTorch's tutorials.
_AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict")
_WEIGHTS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights")

_ADVICE = "In the program that made it, save the state dict alone: torch.save(model.state_dict(), path)"

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

_DICTS = ("collections OrderedDict", "argparse Namespace")  # the latter in timm's training checkpoints

_GLOBALS = {
    *_DICTS,
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in _STORAGES),
}


class _Global(NamedTuple):
    """A name in place of the class or function that the pickle asks to import."""

    name: str


def is_torch(path: Path) -> bool:
    """Returns whether an archive was saved by torch.

    Args:
        path: Path of a zip archive.

    Returns:
        Boolean.

    Raises:
        ValueError: If the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.namelist())
    except Exception as error:  # zipfile raises exceptions of many kinds for a damaged file
        raise ValueError(f"Expected an archive. Received: {str(path)!r} ({one_line(error)})") from error


def read_torch(path, raw: bool = False) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Reads a state dict, alone or in a training checkpoint.

    Args:
        path: Path of the file.
        raw: Boolean, whether to read the raw weights where the checkpoint also has their moving average. Defaults to
            False.

    Returns:
        Dict from name to (shape, function that returns the array).

    Raises:
        ValueError: If the file is damaged, contains anything but tensors, or asks to run code.

    Reference:
        torch/serialization.py, `_legacy_save`, `_legacy_load` and `_save`.
    """
    try:
        state, storage = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(Path(path))
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__.strip('_').lower()}. {_ADVICE}")
        keys = _WEIGHTS + _AVERAGES if raw else _AVERAGES + _WEIGHTS
        chosen = next((key for key in keys if _holds_tensors(state.get(key))), None)
        state = state if chosen is None else state[chosen]
        wrong = [str(name)[:80] for name, value in state.items() if not isinstance(value, _Tensor)]
        if wrong:
            place = "" if chosen is None else f" in its {chosen!r}"
            other = ", or pass --raw for its raw weights" if chosen in _AVERAGES else ""
            keys = few(repr(str(name)[:80]) for name in state)
            raise ValueError(f"{wrong[0]!r}{place} is no tensor. {_ADVICE}{other}. Its keys: {keys}")
        return {name: (_size(tensor), _viewer(tensor, storage)) for name, tensor in state.items()}
    except Exception as error:  # unpickling a damaged file raises exceptions of any kind
        raise ValueError(
            f"Expected a state dict saved by torch. Received: {str(path)!r}, but {one_line(error)}"
        ) from error


def _holds_tensors(value: Any) -> bool:
    """Returns whether a value is a dict with a tensor anywhere in it: an average that is switched off has none."""
    return isinstance(value, dict) and any(True for _ in _tensors(value))


def _unpickle(file: io.BytesIO):
    """Reads one pickle with the instructions of a state dict. Never imports, calls, hashes or prints what it names."""
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
                if not all(type(key) in (str, int) for key in items[::2]):
                    raise ValueError("it has a key that is neither a string nor an integer")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise ValueError(
                        f"it holds an object of {argument[:80].replace(' ', '.')}, which no state dict needs: only "
                        f"tensors, numbers, texts, lists and dicts are read. {_ADVICE}"
                    )
                stack.append(_Global(argument))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_result(function, arguments))
            case "BINPERSID":
                stack.append(_referred(stack.pop()))
            case "BUILD":
                stack.pop()  # torch's `_metadata`, the versions of a module's parts; timm's training arguments
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it has the instruction {name}, which no state dict needs")
    raise ValueError("it ends early")


def _result(function: Any, arguments: Any) -> Any:
    """Returns what stands for the result of a call: an empty dict, or a tensor."""
    name = function.name if isinstance(function, _Global) else ""
    if name in _DICTS and type(arguments) is tuple and not arguments:
        return {}
    if name == "torch._utils _rebuild_tensor_v2" and isinstance(arguments[0], _Storage):
        return _Tensor(*arguments[:4])
    if name == "torch._utils _rebuild_parameter" and isinstance(arguments[0], _Tensor):
        return arguments[0]
    raise ValueError("it calls a function that no state dict calls")


def _referred(reference: Any) -> _Storage:
    """Returns the storage of a persistent id."""
    kind, storage, key, _, count, *_ = reference
    if storage.name.endswith("BFloat16Storage"):
        import ml_dtypes  # noqa: F401  registers the type in NumPy
    dtype = _STORAGES[storage.name.removeprefix("torch ")]
    if kind != "storage" or type(key) is not str or type(count) is not int:
        raise ValueError("it refers to something other than a storage")
    return _Storage(dtype, key, count)


def _read_legacy(path: Path):
    data = path.read_bytes()
    file = io.BytesIO(data)
    magic = _unpickle(file)
    if type(magic) is not int or magic != MAGIC:
        raise ValueError("it does not begin with torch's magic number")
    _protocol, system = _unpickle(file), _unpickle(file)
    if system.get("little_endian") is not True:
        raise ValueError("it was not written on a little-endian machine")
    state, keys = _unpickle(file), _unpickle(file)
    known = {tensor.storage.key: tensor.storage for tensor in _tensors(state)}
    place, storages = file.tell(), {}
    if not all(type(key) is str and key in known for key in keys):
        raise ValueError("it lists a storage that no tensor has")
    for key in keys:
        dtype, _, promised = known[key]
        count = int.from_bytes(data[place : place + 8], "little")
        if count != promised or place + 8 + count * np.dtype(dtype).itemsize > len(data):
            raise ValueError(f"storage {key} is cut short")
        storages[key] = np.frombuffer(data, dtype, count, place + 8)
        place += 8 + storages[key].nbytes
    return state, lambda storage: storages[storage.key]


def _tensors(state):
    """Yields all tensors of nested dicts and sequences, which may refer to themselves in a pickle."""
    queue, seen = [state], set()
    while queue:
        value = queue.pop()
        if isinstance(value, _Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            queue += value.values() if isinstance(value, dict) else value


def _read_zip(path: Path):
    archive = zipfile.ZipFile(path)
    pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it holds no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and _stored(archive, f"{folder}byteorder") != b"little":
        raise ValueError("it was not written on a little-endian machine")
    state = _unpickle(io.BytesIO(_stored(archive, pickles[0])))

    def storage(of: _Storage) -> np.ndarray:
        data = _stored(archive, f"{folder}data/{of.key}")
        if len(data) < of.length * np.dtype(of.dtype).itemsize:
            raise ValueError(f"storage {of.key} is cut short")
        return np.frombuffer(data, of.dtype, of.length)

    return state, storage


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads an entry, which torch writes uncompressed, and verifies its checksum."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{name[:80]!r} is compressed")
    return archive.read(entry)


def _size(tensor: _Tensor) -> tuple[int, ...]:
    # Checks types first: other objects may be too large to compare or print.
    parts = (tensor.size, tensor.stride)
    if not all(type(part) is tuple and all(type(number) is int for number in part) for part in parts):
        raise ValueError("a tensor's size is invalid")
    if type(tensor.offset) is not int or min((tensor.offset, *tensor.size, *tensor.stride)) < 0:
        raise ValueError("a tensor's size is invalid")
    if len(tensor.size) != len(tensor.stride) or len(tensor.size) > 8:
        raise ValueError("a tensor's size does not fit its strides")
    if math.prod(tensor.size) > tensor.storage.length:
        raise ValueError("a tensor is larger than its storage")
    return tensor.size


def _viewer(tensor: _Tensor, storage) -> Callable[[], np.ndarray]:
    def view() -> np.ndarray:
        numbers = storage(tensor.storage)
        reach = sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
        if math.prod(tensor.size) and tensor.offset + reach >= len(numbers):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [stride * numbers.itemsize for stride in tensor.stride]
        return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.size, strides, writeable=False)

    return view

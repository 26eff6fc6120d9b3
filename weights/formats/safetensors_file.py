"""Reads and writes `.safetensors` files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.files import replacing, writing
from keras_effnet.weights.formats.tensors import Stored, Tensors


def read_safetensors(path: Path) -> Tensors:
    """Opens a .safetensors file.

    Args:
        path: Path of the file.

    Returns:
        Dict from name to `Stored`.

    Raises:
        ValueError: If the file is damaged, or of another format.
    """
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
        names = list(file.keys())
        return {name: Stored(tuple(file.get_slice(name).get_shape()), _getter(file.get_tensor, name)) for name in names}
    except Exception as error:  # safetensors raises its own exception class
        raise ValueError(f"Expected a .safetensors file. Received: {str(path)!r} ({one_line(error)})") from error


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in a header, which the library writes in random order: equal weights give equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def metadata_of(path) -> dict[str, str]:
    """Returns the metadata in the header of a .safetensors file, none for other files.

    Args:
        path: Path of a file of any format.

    Returns:
        Dict of strings.

    Raises:
        ValueError: If the file is damaged.
    """
    if not str(path).endswith(".safetensors"):
        return {}
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except Exception as error:  # safetensors raises its own exception class
        raise ValueError(f"Expected a .safetensors file. Received: {str(path)!r} ({one_line(error)})") from error


def _getter(function: Callable, name: str) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(function(name))


def write_safetensors(path, tensors: dict[str, np.ndarray], counters: Iterable[str] = (), metadata=None) -> Path:
    """Writes a .safetensors file.

    Args:
        path: Path of the file.
        tensors: Dict of arrays by name.
        counters: Names of integers, which are written as 0. Defaults to none.
        metadata: Dict of strings for the file's header. Defaults to torch's.

    Returns:
        The path.
    """
    from safetensors.numpy import save_file

    everything = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    everything |= {name: np.zeros((), np.int64) for name in counters}
    with replacing(path) as temporary, writing(path):
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(everything, temporary, metadata=metadata or {"format": "pt"})
        _sort_metadata(temporary)
        temporary.chmod(mode)  # the library makes it unreadable for other users
    return Path(path)

"""Opens a file of any format and returns its tensors by their names in it. No Keras. Runs no code from a file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keras_effnet.errors import one_line
from keras_effnet.weights.formats import preset_file, torch_file
from keras_effnet.weights.formats.h5_file import opened_h5
from keras_effnet.weights.formats.hdf5 import SIGNATURE
from keras_effnet.weights.formats.keras_file import opened_keras
from keras_effnet.weights.formats.safetensors_file import read_safetensors
from keras_effnet.weights.formats.tensorflow_checkpoint import (
    is_archive,
    is_part,
    named_by,
    prefix_of,
    read_tensors,
    unpack,
)
from keras_effnet.weights.formats.tensors import Stored, Tensors
from keras_effnet.weights.formats.torch_file import is_torch

SUFFIXES = (
    ".keras",
    ".h5",
    ".hdf5",
    ".safetensors",
    ".pth",
    ".pt",
    ".bin",
    ".tar.gz",
    ".tgz",
    ".tar",
    ".ckpt",
    ".index",
)


@contextmanager
def opened(path, raw: bool = False) -> Iterator[Tensors]:
    """Opens a file, whose format is recognized by its content. The tensors can be read while the context is open.

    Args:
        path: Path of an h5, .keras, .safetensors or torch file; of the folder of a preset of keras-hub; or of a
            TensorFlow checkpoint: a folder, a prefix or a .tar.gz.
        raw: Boolean, whether to read the raw weights where a torch checkpoint also has their moving average. Defaults
            to False.

    Yields:
        Dict from name to `Stored`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or of no known format.
    """
    path = named_by(_path(path))
    preset = preset_file.folder_of(path) if path.is_dir() else None
    if preset is not None:
        with preset_file.opened_preset(preset) as tensors:
            yield tensors
        return
    if not path.is_file() or is_part(path):
        yield read_tensors(prefix_of(path))
        return
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(SIGNATURE):
        with opened_h5(path, path) as tensors:
            yield tensors
    elif len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        yield read_safetensors(path)  # before the others: the length of its header may begin like a zip or a pickle
    elif start.startswith(b"PK") and not is_torch(path):
        with opened_keras(path) as tensors:
            yield tensors
    elif start.startswith((b"PK", b"\x80")):
        yield {name: Stored(*stored) for name, stored in torch_file.read_torch(path, raw).items()}
    elif is_archive(path):
        with tempfile.TemporaryDirectory(prefix="keras_effnet-") as folder:
            unpack(path, Path(folder))
            prefix = prefix_of(Path(folder), path)
            try:
                tensors = read_tensors(prefix)
            except (OSError, ValueError) as error:  # which names the temporary folder
                reason = one_line(_without(str(error), folder, path.name))
                raise ValueError(f"Expected a checkpoint in a .tar.gz. Received: {str(path)!r} ({reason})") from error
            yield tensors
    else:
        raise ValueError(
            "Expected weights as .keras, .h5, .safetensors, .pth, or a TensorFlow checkpoint (folder, prefix or "
            f".tar.gz). Received: {str(path)!r}, whose first bytes are {start[:8]!r}"
        )


def _path(path) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"Expected the path of a weights file. Received: {path!r}")
    return Path(path)


def _without(message: str, folder: str, name: str) -> str:
    """Returns a message where the files of a folder have no folder, and the folder itself has another name."""
    for told, instead in ((f"{folder}{os.sep}", ""), (folder, name)):
        message = message.replace(repr(told)[1:-1], repr(instead)[1:-1]).replace(told, instead)
    return message


def exists(path) -> bool:
    """Returns whether a file, a folder, or a checkpoint with this prefix exists.

    Args:
        path: Path.

    Returns:
        Boolean.
    """
    return os.path.exists(path) or os.path.exists(f"{os.fspath(path)}.index")

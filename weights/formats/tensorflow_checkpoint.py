"""Reads and writes TensorFlow checkpoints: a folder, a prefix or an archive.

Reading does not use TensorFlow, which aborts the process on a malformed index. Writing does.
"""

import math
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.files import folder_beside, writing
from keras_effnet.weights.formats.tensors import Stored, Tensors

_TABLE = 0xDB4775248B80FB57  # the last eight bytes of an index

_DTYPES = {  # tensorflow/core/framework/types.proto; without strings and other types that are not numbers
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "<u1",
    5: "<i2",
    6: "<i1",
    9: "<i8",
    14: "bfloat16",
    17: "<u2",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}


def unpack(path: Path, folder: Path) -> None:
    """Extracts a checkpoint from an archive: plain files only, by their base names.

    Args:
        path: Path of the archive.
        folder: Path of an existing folder to extract to.

    Raises:
        OSError: If the files cannot be read or written.
        ValueError: If the archive is damaged, contains anything but plain files, or declares more bytes than an archive
            of its size can contain.
    """
    # Trained weights do not compress; unused slots of a training checkpoint compress to nothing.
    allowed = max(1 << 30, 20 * path.stat().st_size)
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                allowed -= member.size
                _check_member(member, allowed)
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and _of_checkpoint(name):
                    if (folder / name).exists():
                        raise ValueError(f"it contains {name[:80]!r} twice")
                    data: Any = archive.extractfile(member)
                    with open(folder / name, "wb") as file:
                        while chunk := data.read(1 << 20):
                            file.write(chunk)
    except Exception as error:  # tarfile, gzip and zlib raise exceptions of many kinds for a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise  # such as a full disk
        raise ValueError(f"Expected a checkpoint in a .tar.gz. Received: {str(path)!r} ({error})") from error


def _check_member(member: tarfile.TarInfo, allowed: int) -> None:
    """Raises if a member leaves its folder, is not a plain file, or exceeds the allowed size."""
    if ".." in member.name.split("/") or member.name.startswith("/"):
        raise ValueError(f"{member.name[:80]!r} leaves its folder")
    if member.issym() or member.islnk() or member.isdev() or member.issparse():
        raise ValueError(f"{member.name[:80]!r} is not a plain file")
    if allowed < 0:
        raise ValueError(f"{member.name[:80]!r} declares {member.size:,} bytes")


def _of_checkpoint(name: str) -> bool:
    return name == "checkpoint" or bool(re.fullmatch(r"(?!\._).*\.(index|data-\d{5}-of-\d{5})", name))


def prefix_of(path: Path, told: Path | None = None) -> str:
    """Returns the prefix by which TensorFlow names a checkpoint.

    Args:
        path: Path of a folder, of one of the checkpoint's files, or a prefix.
        told: Path to name in errors. Defaults to `path`.

    Returns:
        String, the path without `.index`.

    Raises:
        ValueError: If the folder contains no checkpoint, or several and no file that names the latest.
    """
    if path.is_dir():
        found = sorted(file.name.removesuffix(".index") for file in path.glob("*.index"))
        latest = _latest(path / "checkpoint")
        if latest in found:
            found = [latest]
        if len(found) != 1:
            raise ValueError(
                f"Expected a folder with one checkpoint, or with a file 'checkpoint' that names one. Received: "
                f"{str(told or path)!r} with {', '.join(map(repr, found[:5])) or 'none'}"
            )
        return str(path / found[0])
    return re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", str(path))


def _latest(state: Path) -> str | None:
    """Returns the base name of the checkpoint that TensorFlow's text file names."""
    try:
        match = re.search(r'^model_checkpoint_path: "(.*)"$', state.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return match[1].rsplit("/", 1)[-1] if match else None


def read_tensors(prefix: str) -> Tensors:
    """Opens a TensorFlow checkpoint.

    Args:
        prefix: String. The path without `.index`.

    Returns:
        Dict from name to `Stored`, of the tensors that hold numbers.

    Raises:
        OSError: If a file does not exist, or cannot be read.
        ValueError: If the checkpoint is damaged.
    """
    if not os.path.exists(f"{prefix}.index"):
        raise FileNotFoundError(f"Expected a weights file. Received: {prefix!r}, which does not exist")
    return {name: Stored(*stored) for name, stored in read_checkpoint(prefix).items()}


def read_checkpoint(prefix: str) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Reads the index of a checkpoint. A tensor is read, and its checksum verified, when its function is called.

    Args:
        prefix: String. The path without `.index`.

    Returns:
        Dict from name to (shape, function that returns the array), of the tensors that hold numbers.

    Raises:
        OSError: If the files cannot be read.
        ValueError: If the files are damaged.
    """
    data = Path(f"{prefix}.index").read_bytes()
    try:
        return dict(_tensors(prefix, data))
    except (ValueError, IndexError, KeyError, OverflowError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a TensorFlow checkpoint. Received: {prefix!r} ({error})") from error


def _tensors(prefix: str, data: bytes) -> Iterator[tuple[str, tuple]]:
    if len(data) < 48 or int.from_bytes(data[-8:], "little") != _TABLE:
        raise ValueError("its index has no valid footer")
    footer = data[-48:-8]
    _, place = _varint(footer, 0)  # of the table's properties, which are not needed
    _, place = _varint(footer, place)
    header: dict[int, list] | None = None
    for _, handle in _block(data, *_handle(footer, place)):
        for name, entry in _block(data, *_handle(handle, 0)):
            fields = _fields(entry)
            if not name:
                header = fields
                if _one(fields, 2):
                    raise ValueError("it was not written on a little-endian machine")
                continue
            if header is None:
                raise ValueError("its index has no header")
            stored = _tensor(prefix, name.decode(), fields, _one(header, 1))
            if stored is not None:
                yield name.decode(), stored


def _tensor(prefix: str, name: str, fields: dict[int, list], shards: int):
    kind = _DTYPES.get(_one(fields, 1))
    if kind is None:
        return None
    if 7 in fields:
        raise ValueError(f"{name[:80]!r} is stored in slices")
    if kind == "bfloat16":
        import ml_dtypes  # noqa: F401  registers the type in NumPy
    shape = tuple(_one(_fields(size), 1) for size in _fields(_one(fields, 2, b"")).get(2, []))
    dtype, size, offset = np.dtype(kind), _one(fields, 5), _one(fields, 4)
    path = f"{prefix}.data-{_one(fields, 3):05d}-of-{shards:05d}"
    checksum = _one(fields, 6)
    if not 0 <= math.prod(shape) * dtype.itemsize == size or any(length < 0 for length in shape):
        raise ValueError(f"{name[:80]!r} has {size} bytes for shape {shape[:10]}")
    if offset + size > os.path.getsize(path):
        raise ValueError(f"{name[:80]!r} declares {size:,} bytes that {os.path.basename(path)} does not hold")

    def read() -> np.ndarray:
        with open(path, "rb") as file:
            file.seek(offset)
            numbers = file.read(size)
        if len(numbers) != size or _masked_crc(numbers) != checksum:
            raise ValueError(f"the checksum of {name[:80]!r} does not match")
        return np.frombuffer(numbers, dtype).reshape(shape)

    return shape, read


def _masked_crc(data: bytes) -> int:
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number in its index does not end")


def _handle(data: bytes, place: int) -> tuple[int, int]:
    offset, place = _varint(data, place)
    return offset, _varint(data, place)[0]


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the pairs of a block. A key is stored without the start that it shares with the key before."""
    end = offset + size
    if end + 5 > len(data) or size < 4:
        raise ValueError("its index is cut short")
    if _masked_crc(data[offset : end + 1]) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise ValueError("the checksum of its index does not match")
    if data[end]:
        raise ValueError("its index is compressed, which no TensorFlow release since 1.2 does")
    restarts = int.from_bytes(data[end - 4 : end], "little")
    last = end - 4 - 4 * restarts
    key, place = b"", offset
    while place < last:
        shared, place = _varint(data, place)
        own, place = _varint(data, place)
        length, place = _varint(data, place)
        if shared > len(key) or place + own + length > last:
            raise ValueError("an entry of its index is cut short")
        key = key[:shared] + data[place : place + own]
        place += own
        yield key, data[place : place + length]
        place += length


def _fields(message: bytes) -> dict[int, list]:
    """Returns the fields of a protocol buffer by their numbers."""
    found: dict[int, list] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 == 0:
            value, place = _varint(message, place)
            value = value - (1 << 64) if value >> 63 else value
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, place = int.from_bytes(message[place : place + width], "little"), place + width
        elif tag & 7 == 2:
            length, place = _varint(message, place)
            value, place = message[place : place + length], place + length
        else:
            raise ValueError("its index contains an invalid message")
        if place > len(message):
            raise ValueError("a message in its index is cut short")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _one(fields: dict[int, list], number: int, default: Any = 0) -> Any:
    value = fields.get(number, [default])[-1]
    if type(value) is not type(default):
        raise ValueError("its index contains a message of another kind")
    return value


def write_checkpoint(path, tensors: dict[str, np.ndarray], counter: str) -> Path:
    """Writes a TensorFlow checkpoint, and the text file that names the latest one in the folder.

    Args:
        path: Path of a folder (existing, or ending in a slash), or a prefix.
        tensors: Dict of arrays by name.
        counter: String. Name of the number of training steps, which is written as 0.

    Returns:
        Path, the prefix.

    Raises:
        ImportError: If TensorFlow is not installed.
        OSError: If the files cannot be written.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "Expected TensorFlow, which writes its checkpoints. Install it with: pip install tensorflow"
        ) from error
    prefix = Path(path)
    if str(path).endswith(("/", os.sep)):
        prefix.mkdir(parents=True, exist_ok=True)
    if prefix.is_dir():
        prefix = prefix / "model.ckpt"
    names = [*tensors, counter]
    with folder_beside(prefix) as folder:
        temporary = folder / prefix.name
        with writing(prefix):
            tf.raw_ops.SaveV2(
                prefix=str(temporary),
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[*map(tf.constant, tensors.values()), tf.constant(0, tf.int64)],
            )
        state = folder / "checkpoint"
        state.write_text(f'model_checkpoint_path: "{prefix.name}"\nall_model_checkpoint_paths: "{prefix.name}"\n')
        # Data without an index is not a checkpoint, so the old index is removed first and the new one written last.
        Path(f"{prefix}.index").unlink(missing_ok=True)
        for file in sorted(folder.glob("*.data-*")):
            shutil.move(file, prefix.parent / file.name)
        os.replace(f"{temporary}.index", f"{prefix}.index")
        os.replace(state, prefix.parent / "checkpoint")
    return prefix

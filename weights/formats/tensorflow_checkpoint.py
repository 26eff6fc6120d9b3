"""Reads and writes TensorFlow checkpoints: a folder, a prefix or an archive.

Reading does not use TensorFlow, which aborts the process on a malformed index. Writing does.
"""

import glob
import math
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.files import folder_beside, writing
from keras_effnet.weights.formats.object_graph import ObjectGraph
from keras_effnet.weights.formats.protobuf import fields, one, varint
from keras_effnet.weights.formats.tensors import Stored, Tensors

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # tensorflow/python/checkpoint/graph_view.py: name of the graph's tensor

_KEY = 4096  # bytes of a name

_STRING = 7  # tensorflow/core/framework/types.proto

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
        raise ValueError(f"Expected a checkpoint in a .tar.gz. Received: {str(path)!r} ({one_line(error)})") from error


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


_IN_A_FOLDER = ("checkpoint", "saved_model.pb", "keras_metadata.pb")  # parts of what their folder holds

_OF_A_PREFIX = re.compile(r"\.(index|meta|data-\d+-of-\d+)$")


def named_by(path: Path) -> Path:
    """Returns the path of the checkpoint or SavedModel that one of its files belongs to.

    Args:
        path: Path of any file, folder or prefix.

    Returns:
        Path: a folder, a prefix, or `path` itself, which also names a checkpoint beside a folder of its prefix's name.

    Raises:
        ValueError: If the prefix is also the path of a file.
    """
    if path.name in _IN_A_FOLDER and path.is_file():
        return path.parent
    prefix = Path(_OF_A_PREFIX.sub("", str(path)))
    if path.is_dir() or prefix == path or prefix.is_dir():
        return path
    if prefix.exists():
        raise ValueError(
            f"Expected a prefix that only a checkpoint has. Received: {str(path)!r} beside {prefix.name!r}"
        )
    return prefix


def is_part(path: Path) -> bool:
    """Returns whether a path is that of a file of a checkpoint, by its name.

    Args:
        path: Path.
    """
    return path.is_file() and _OF_A_PREFIX.search(path.name) is not None


def is_checkpoint(path) -> bool:
    """Returns whether weights that could be read are those of a checkpoint.

    Args:
        path: Path.
    """
    return not os.path.isfile(path) or is_part(Path(path)) or is_archive(path)


def is_archive(path) -> bool:
    """Returns whether a file begins as an archive does: compressed or not, damaged or not.

    Args:
        path: Path of a file.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or start[257:262] == b"ustar"


def prefix_of(path: Path, told: Path | None = None) -> str:
    """Returns the prefix by which TensorFlow names a checkpoint.

    Args:
        path: See `named_by()`.
        told: Path to name in errors. Defaults to `path`.

    Returns:
        String, the path without `.index`.

    Raises:
        ValueError: If the folder contains no checkpoint, or several and no file that names the latest.
    """
    path = named_by(path)
    if (path / "saved_model.pb").is_file():
        return str(path / "variables" / "variables")
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
    return _OF_A_PREFIX.sub("", str(path)) if is_part(path) else str(path)


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
        Dict from name to `Stored`, of the tensors that hold numbers. Where TensorFlow 2 stored a graph of objects,
        variables are called by their layers, as in an h5 file of Keras.

    Raises:
        OSError: If a file does not exist, or cannot be read.
        ValueError: If the checkpoint is damaged.
    """
    if not os.path.exists(f"{prefix}.index") and not glob.glob(f"{glob.escape(prefix)}.data-*"):
        raise FileNotFoundError(f"Expected a weights file. Received: {prefix!r}, which does not exist")
    found = {name: Stored(*stored) for name, stored in read_checkpoint(prefix).items()}
    graph = read_graph(prefix)
    if graph is None:
        return found
    titles: dict[str, str] = {}
    taken: set[str] = set()
    for variable in graph.variables():
        if variable.key in found and variable.key not in titles:
            title = variable.title if variable.title not in taken else "/".join(variable.path)
            titles[variable.key] = title
            taken.add(title)
    return {titles.get(key, key): stored for key, stored in found.items()}


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
    with _damage_named(prefix):
        return {entry.name: entry.tensor() for entry in _entries(prefix) if entry.kind in _DTYPES}


def read_graph(prefix: str) -> ObjectGraph | None:
    """Reads the graph of objects that TensorFlow 2 stores in a checkpoint.

    Args:
        prefix: String. The path without `.index`.

    Returns:
        An `ObjectGraph`, or None for a checkpoint of TensorFlow 1.

    Raises:
        OSError: If the files cannot be read.
        ValueError: If the files are damaged.
    """
    with _damage_named(prefix):
        entry = next((entry for entry in _entries(prefix) if entry.name == GRAPH), None)
        return None if entry is None else ObjectGraph(entry.string())


@contextmanager
def _damage_named(prefix: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError, KeyError, OverflowError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a TensorFlow checkpoint. Received: {prefix!r} ({one_line(error)})") from error


@dataclass(frozen=True)
class _Entry:
    """An entry of the index.

    Args:
        name: String. The tensor's name.
        kind: Integer. TensorFlow's number of its type.
        fields: See `protobuf.fields()`.
        path: String. The file with its bytes.
    """

    name: str
    kind: int
    fields: dict[int, list]
    path: str

    def _shape(self) -> tuple[int, ...]:
        shape = tuple(one(fields(size), 1) for size in fields(one(self.fields, 2, b"")).get(2, []))
        if any(length < 0 for length in shape):
            raise ValueError(f"{self.name[:80]!r} has the shape {shape[:10]}")
        return shape

    def _extent(self) -> tuple[int, int]:
        """Returns where the bytes start, and how many there are."""
        offset, size = one(self.fields, 4), one(self.fields, 5)
        _check_there(self.path)
        if size < 0 or offset < 0 or offset + size > os.path.getsize(self.path):
            raise ValueError(
                f"{self.name[:80]!r} declares {size:,} bytes that {os.path.basename(self.path)} does not hold"
            )
        return offset, size

    def _bytes(self) -> bytes:
        offset, size = self._extent()
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.name[:80]!r} is cut short")
        return data

    def _verify(self, checksum: int) -> None:
        if checksum != one(self.fields, 6):
            raise ValueError(f"the checksum of {self.name[:80]!r} does not match")

    def tensor(self) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
        if 7 in self.fields:
            raise ValueError(f"{self.name[:80]!r} is stored in slices")
        kind = _DTYPES[self.kind]
        if kind == "bfloat16":
            import ml_dtypes  # noqa: F401  registers the type in NumPy
        shape, dtype, (_, size) = self._shape(), np.dtype(kind), self._extent()
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{self.name[:80]!r} has {size} bytes for shape {shape[:10]}")

        def read() -> np.ndarray:
            data = self._bytes()
            self._verify(_masked(google_crc32c.value(data)))
            return np.frombuffer(data, dtype).reshape(shape)

        return shape, read

    def string(self) -> bytes:
        """Returns the only string of the tensor (tensorflow/core/util/tensor_bundle/tensor_bundle.cc, 2.20)."""
        if self.kind != _STRING or self._shape():
            raise ValueError(f"{self.name[:80]!r} is no string")
        data = self._bytes()
        length, place = varint(data, 0)
        text = data[place + 4 :]
        wide = length.to_bytes(4 if length < 1 << 32 else 8, "little")
        crc = _masked(google_crc32c.value(wide))
        if len(text) != length or crc != int.from_bytes(data[place : place + 4], "little"):
            raise ValueError(f"the length of {self.name[:80]!r} does not match")
        crc = google_crc32c.extend(google_crc32c.value(wide), data[place : place + 4])
        self._verify(_masked(google_crc32c.extend(crc, text)))
        return text


def _check_there(part: str) -> None:
    if not os.path.exists(part):
        folder, name = os.path.split(part)
        raise FileNotFoundError(f"Expected all files of a TensorFlow checkpoint. Received: {folder!r} without {name}")


def _entries(prefix: str) -> Iterator[_Entry]:
    _check_there(f"{prefix}.index")
    data = Path(f"{prefix}.index").read_bytes()
    if len(data) < 48 or int.from_bytes(data[-8:], "little") != _TABLE:
        raise ValueError("its index has no valid footer")
    footer = data[-48:-8]
    _, place = varint(footer, 0)  # of the table's properties, which are not needed
    _, place = varint(footer, place)
    shards: int | None = None
    read = 0
    for _, handle in _block(data, *_handle(footer, place)):
        offset, size = _handle(handle, 0)
        read += size
        if read > len(data):
            raise ValueError("its index refers to the same part more than once")
        for name, value in _block(data, offset, size):
            entry = fields(value)
            if not name:
                shards = one(entry, 1)
                if one(entry, 2):
                    raise ValueError("it was not written on a little-endian machine")
            elif shards is None:
                raise ValueError("its index has no header")
            else:
                file = f"{prefix}.data-{one(entry, 3):05d}-of-{shards:05d}"
                yield _Entry(name.decode(), one(entry, 1), entry, file)


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _handle(data: bytes, place: int) -> tuple[int, int]:
    offset, place = varint(data, place)
    return offset, varint(data, place)[0]


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the pairs of a block. A key is stored without the start that it shares with the key before."""
    end = offset + size
    if end + 5 > len(data) or size < 4:
        raise ValueError("its index is cut short")
    if _masked(google_crc32c.value(data[offset : end + 1])) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise ValueError("the checksum of its index does not match")
    if data[end]:
        raise ValueError("its index is compressed, which no TensorFlow release since 1.2 does")
    restarts = int.from_bytes(data[end - 4 : end], "little")
    last = end - 4 - 4 * restarts
    key, place = b"", offset
    while place < last:
        shared, place = varint(data, place)
        own, place = varint(data, place)
        length, place = varint(data, place)
        if shared > len(key) or shared + own > _KEY or place + own + length > last:
            raise ValueError("an entry of its index is cut short")
        key = key[:shared] + data[place : place + own]
        place += own
        yield key, data[place : place + length]
        place += length


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

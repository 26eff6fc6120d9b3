"""From a file to its tensors, in the names of the program that wrote it. No Keras. Nothing in a file is run."""

import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_effnet.weights import registry, tf_files, torch_files

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
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class Stored(NamedTuple):
    """A tensor in a file.

    Args:
        shape: Tuple of integers.
        read: Function that gives the array.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Stored]


@contextmanager
def opened(path, raw: bool = False) -> Iterator[Tensors]:
    """Opens a file, whose format is recognised by its content, and gives its tensors while it is open.

    Args:
        path: Path of an h5, .keras, .safetensors or torch file; of a TensorFlow checkpoint as a folder, a prefix or a
            .tar.gz.
        raw: Boolean, whether to take the weights themselves where a torch checkpoint holds their moving average.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If its content is not what its format promises, or of no known format.
    """
    path = _path(path)
    if path.name == "checkpoint" and path.is_file():  # TensorFlow's note of the folder's latest
        path = path.parent
    if not path.is_file() or path.suffix in (".index", ".meta"):
        yield _checkpoint(_prefix(path))
        return
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(HDF5_SIGNATURE):
        with _h5(path, path) as tensors:
            yield tensors
    elif start.startswith(b"PK") and not _is_torch(path):
        with _keras_archive(path) as tensors:
            yield tensors
    elif start.startswith((b"PK", b"\x80")):
        registry.refuse(path)
        yield {name: Stored(*stored) for name, stored in torch_files.read_torch(path, raw).items()}
    elif len(start) > 8 and start[8:9] == b"{":
        yield _safetensors(path)
    elif start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or start[257:262] == b"ustar":
        with tempfile.TemporaryDirectory(prefix="keras_effnet-") as folder:
            _unpack(path, Path(folder))
            yield _checkpoint(_prefix(Path(folder), path))
    elif re.search(r"\.data-\d+-of-\d+$", path.name):
        yield _checkpoint(_prefix(path))
    else:
        raise ValueError(
            "Expected weights as .keras, .h5, .safetensors, .pth, or a TensorFlow checkpoint (folder, prefix or "
            f".tar.gz). Received: {str(path)!r}, whose first bytes are {start[:8]!r}"
        )


def _path(path) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"Expected the path of a file of weights. Received: {path!r}")
    return Path(path)


def exists(path) -> bool:
    """Whether there is a file, a folder, or a checkpoint of this prefix.

    Args:
        path: Path.

    Returns:
        Boolean.
    """
    return os.path.exists(path) or os.path.exists(f"{os.fspath(path)}.index")


def _is_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.namelist())
    except Exception as error:  # zipfile raises what a damaged file makes of it
        raise ValueError(f"Expected an archive. Received: {str(path)!r} ({error})") from error


# h5

_STRINGS = (bytes, str, np.bytes_, np.str_)


@contextmanager
def _h5(file, path: Path) -> Iterator[Tensors]:
    """Legacy Keras h5, weights only or whole model, as layer/variable; or Keras 3's, as layer/number."""
    import h5py

    try:
        opened_file = h5py.File(file, "r")
    except Exception as error:
        raise _not_h5(path, error) from error
    with opened_file:
        try:
            limit = 1000 * path.stat().st_size
            legacy = "model_weights" in opened_file or any(key.startswith("layer_names") for key in opened_file.attrs)
            tensors = dict((_h5_legacy if legacy else _h5_keras3)(opened_file, limit))
        except Exception as error:  # h5py raises whatever a damaged file makes of it
            raise _not_h5(path, error) from error
        yield tensors


def _not_h5(path, error) -> ValueError:
    return ValueError(f"Expected an h5 file of Keras' structure. Received: {str(path)!r} ({error})")


def _h5_legacy(file, limit: int):
    group: Any = _inside(file, "model_weights") if "model_weights" in file else file
    for layer in _names(group, "layer_names"):
        members = _inside(group, layer)
        names = list(_names(members, "weight_names"))
        # Of a layer that is a model, the members' names stand in front of their variables.
        nested = len({name.rpartition("/")[0] for name in names}) > 1
        for name in names:
            *front, variable = name.split(":")[0].split("/")
            owner = front[-1] if nested and front else layer
            key = f"{owner}/{variable.replace('depthwise_kernel', 'kernel')}"
            yield key, _dataset(_inside(members, name), limit)


def _h5_keras3(file, limit: int):
    import h5py

    found: list[str] = []
    # Follows hard links only: nothing outside of the file, and nothing twice.
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in found:
        yield name.removeprefix("layers/").replace("/vars/", "/"), _dataset(file[name], limit)


def _names(group, attribute: str) -> Iterator[str]:
    """A list of names, which Keras splits up where it is too long for one attribute."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    for part in parts or [attribute]:
        for name in group.attrs[part]:
            if not isinstance(name, _STRINGS):
                raise ValueError(f"{part} holds something else than names")
            yield name.decode() if isinstance(name, bytes) else str(name)


def _inside(group, name: str):
    """A member by its path, through hard links only."""
    import h5py

    for part in name.strip("/").split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{name[:80]!r} is not in this very file")
        group = group[part]
    return group


def _dataset(dataset, limit: int) -> Stored:
    """Numbers that stand in this very file, no more of them than a well-compressed one can hold."""
    bfloat16 = dataset.attrs.get("dtype") == "bfloat16"  # Keras' way to store what h5 does not know
    if not (dataset.dtype.kind in "fiu" or bfloat16) or dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"{dataset.name[:80]} holds no numbers of this file")
    if dataset.nbytes > limit:
        raise ValueError(f"{dataset.name[:80]} declares {dataset.nbytes:,} bytes")

    def read() -> np.ndarray:
        if bfloat16:
            import ml_dtypes

            return np.asarray(dataset[()]).view(ml_dtypes.bfloat16)
        return np.asarray(dataset)

    return Stored(tuple(dataset.shape), read)


@contextmanager
def _keras_archive(path: Path) -> Iterator[Tensors]:
    with tempfile.TemporaryDirectory(prefix="keras_effnet-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                entry = archive.getinfo("model.weights.h5")
                if entry.file_size > (64 << 20) + 20 * path.stat().st_size:  # Keras does not compress them
                    raise ValueError(f"it declares {entry.file_size:,} bytes")
                archive.extract(entry, folder)
        except Exception as error:  # zipfile and zlib raise what a damaged file makes of it
            raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({error})") from error
        with _h5(Path(folder) / "model.weights.h5", path) as tensors:
            yield tensors


# safetensors


def _safetensors(path: Path) -> Tensors:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
        names = list(file.keys())
        return {name: Stored(tuple(file.get_slice(name).get_shape()), _getter(file.get_tensor, name)) for name in names}
    except Exception as error:  # safetensors has its own kind of exception
        raise ValueError(f"Expected a .safetensors file. Received: {str(path)!r} ({error})") from error


def _getter(function: Callable, name: str) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(function(name))


# TensorFlow


def _unpack(path: Path, folder: Path) -> None:
    """Takes the checkpoint out of an archive: plain files, under their own names, and no more than it can hold."""
    # Trained numbers do not shrink; a training checkpoint's untouched slots shrink to nothing.
    allowed = max(1 << 30, 20 * path.stat().st_size)
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if ".." in member.name.split("/") or member.name.startswith("/"):
                    raise ValueError(f"{member.name[:80]!r} leaves its folder")
                if member.issym() or member.islnk() or member.isdev() or member.issparse():
                    raise ValueError(f"{member.name[:80]!r} is no plain file")
                allowed -= member.size
                if allowed < 0:
                    raise ValueError(f"{member.name[:80]!r} declares {member.size:,} bytes")
                if member.isfile() and _of_checkpoint(name):
                    if (folder / name).exists():
                        raise ValueError(f"it holds {name[:80]!r} twice")
                    data: Any = archive.extractfile(member)
                    with open(folder / name, "wb") as file:
                        while chunk := data.read(1 << 20):
                            file.write(chunk)
    except Exception as error:  # tarfile, gzip and zlib raise what a damaged file makes of it
        if isinstance(error, OSError) and error.errno is not None:
            raise  # such as a full disk
        raise ValueError(f"Expected a checkpoint in a .tar.gz. Received: {str(path)!r} ({error})") from error


def _of_checkpoint(name: str) -> bool:
    return name == "checkpoint" or bool(re.fullmatch(r"(?!\._).*\.(index|data-\d{5}-of-\d{5})", name))


def _prefix(path: Path, told: Path | None = None) -> str:
    """What TensorFlow calls a checkpoint by."""
    if path.is_dir():
        found = sorted(file.name.removesuffix(".index") for file in path.glob("*.index"))
        latest = _latest(path / "checkpoint")
        if latest in found:
            found = [latest]
        if len(found) != 1:
            raise ValueError(
                f"Expected a folder with one checkpoint, or with a file 'checkpoint' that names one. Received: "
                f"{str(told or path)!r} with {', '.join(map(repr, found[:10])) or 'none'}"
            )
        return str(path / found[0])
    return re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", str(path))


def _latest(state: Path) -> str | None:
    """The checkpoint that TensorFlow's text file names, of which only the name matters here."""
    try:
        match = re.search(r'^model_checkpoint_path: "(.*)"$', state.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return match[1].rsplit("/", 1)[-1] if match else None


def _checkpoint(prefix: str) -> Tensors:
    if not os.path.exists(f"{prefix}.index"):
        raise FileNotFoundError(f"Expected a file of weights. Received: {prefix!r}, which does not exist")
    return {name: Stored(*stored) for name, stored in tf_files.read_checkpoint(prefix).items()}


def preprocessing_of(path):
    """The numbers of the preprocessing that a `.keras` file of this package carries in its model.

    Args:
        path: Path of a file of any format.

    Returns:
        Pair (scale, offset) of lists of floats, or None where the file holds none.

    Raises:
        ValueError: If the file is a damaged archive.
    """
    if not os.path.isfile(path) or not zipfile.is_zipfile(path) or _is_torch(Path(path)):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > 1 << 28:
                raise ValueError("its config.json is too large")
            layers = json.loads(archive.read("config.json"))["config"]["layers"]
        for layer in layers:
            if layer["class_name"] == "Rescaling" and layer["config"]["name"].endswith("preprocessing"):
                return tuple(np.ravel(layer["config"][key]).tolist() for key in ("scale", "offset"))
    except Exception as error:  # zipfile, zlib and json raise what a damaged file makes of it
        raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({error})") from error
    return None

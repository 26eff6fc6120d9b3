"""The files that this package keeps: where they are, whether they are intact, who may use them, and when they go.

They lie in `home()`, one folder for each of `KINDS`, and can all be made again. The rest of the folder are downloads,
whose paths are those of their URLs.
"""

import contextlib
import json
import os
import re
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_effnet import files

LIMIT = "KERAS_EFFNET_CACHE_LIMIT"
DEFAULT_LIMIT = "20GB"
_ABOUT = "about.json"
_SUMS = "sums.json"


@dataclass(frozen=True)
class Kind:
    """A kind of kept files.

    Args:
        title: String, for users.
        entries: String, pattern of the entries in its folder: folders or files, each kept or removed as a whole.
        days: Integer. Entries that nobody has used for so long are removed. None: only the limit counts.
    """

    title: str
    entries: str
    days: int | None = None


KINDS = {
    "predictor": Kind("exports", "*"),
    "converted": Kind("converted weights", "*/*.safetensors"),
    "features": Kind("features", "*", days=30),
    "plans": Kind("plans", "*.json"),
    "jax": Kind("compiled programs", "*-cache"),
}
_DOWNLOADS = "downloads"


@dataclass(frozen=True)
class Entry:
    """One entry of the cache.

    Args:
        kind: Key of `KINDS`, or `"downloads"`.
        path: Path.
        model: String, the model it belongs to. Empty if unknown.
        bytes: Integer, size of all its files.
        used: Float, time of its last use, in seconds since 1970.
    """

    kind: str
    path: Path
    model: str
    bytes: int
    used: float

    @property
    def title(self) -> str:
        """The kind, for users."""
        return KINDS[self.kind].title if self.kind in KINDS else "download"


def home() -> Path:
    """Returns the folder of all kept files: `KERAS_EFFNET_HOME`, or the system's folder for caches.

    Returns:
        Path. The folder may not exist yet.
    """
    import platformdirs  # not pooch.os_cache: weights that are saved already need no network library

    chosen = os.environ.get("KERAS_EFFNET_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("keras_effnet"))


# --- Whose files.


def is_mine(path) -> bool:
    """Returns whether a file belongs to the user of this process, or to root.

    Args:
        path: Path. Need not exist.

    Returns:
        Boolean.
    """
    try:
        owner = os.stat(path).st_uid
    except OSError:
        return False
    return os.name != "posix" or owner in (os.geteuid(), 0)


def folder(kind: str, name: str = "") -> Path:
    """Returns a folder of the cache, and makes it if necessary. Other users cannot write to it.

    Args:
        kind: Key of `KINDS`.
        name: String, a folder in the one of the kind. Defaults to `""`.

    Returns:
        Path of an existing folder.

    Raises:
        OSError: If the folder belongs to another user, or cannot be made.
        ValueError: If the limit of the cache is not valid.
    """
    limit()
    root = home()
    root.mkdir(parents=True, exist_ok=True)
    made = root
    for part in (kind, *Path(name).parts):
        made = made / part
        crowded = made.parent.stat().st_mode & 0o022
        with contextlib.suppress(FileExistsError):
            made.mkdir(mode=0o700 if crowded else 0o755)
        if not is_mine(made):
            raise OSError(
                f"Expected a cache that belongs to you. Received: {str(made)!r}, which belongs to user "
                f"{made.stat().st_uid}. Set KERAS_EFFNET_HOME to another folder"
            )
        if made.stat().st_mode & 0o022:
            with contextlib.suppress(PermissionError):  # root's
                made.chmod(0o700)
    return made


# --- Whether they are intact.


def checksum(*paths) -> str:
    """Returns the CRC-32C of files. It shows damage, not tampering.

    Args:
        *paths: Paths, in a fixed order.

    Returns:
        String of eight hexadecimal digits.
    """
    import google_crc32c

    value = 0
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                value = google_crc32c.extend(value, part)
    return f"{value:08x}"


def write_json(path, value: dict[str, Any]) -> None:
    """Writes a JSON object with its checksum.

    Args:
        path: Path.
        value: Dict.
    """
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps({"crc32c": _sum(value), "value": value}))


def read_json(path) -> dict[str, Any] | None:
    """Reads what `write_json()` has written.

    Args:
        path: Path.

    Returns:
        Dict. None if the file is missing, damaged, or another user's.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(Path(path).read_text())
        if is_mine(path) and found["crc32c"] == _sum(found["value"]):
            return found["value"]
    return None


def _sum(value) -> str:
    import google_crc32c

    return f"{google_crc32c.value(json.dumps(value, sort_keys=True).encode()):08x}"


def tell_of_damage(path) -> None:
    """Warns that a kept file is not used.

    Args:
        path: Path.
    """
    reason = "is damaged" if is_mine(path) else "belongs to another user"
    warnings.warn(f"A kept file {reason} and is made again: {path}", stacklevel=4)


def remove_damaged(place: Path, pattern: str) -> None:
    """Removes the damaged files of a folder to which a library writes. Call `record_sums()` once it has written.

    Args:
        place: Path of the folder.
        pattern: String, pattern of the files' names.
    """
    sums = read_json(place / _SUMS) or {}
    for path in place.glob(pattern):
        with contextlib.suppress(OSError):
            if not is_mine(path) or sums.get(path.name, found := checksum(path)) != found:
                tell_of_damage(path)
                path.unlink()


def record_sums(place: Path, pattern: str) -> None:
    """Records the checksums of files that have none yet. See `remove_damaged()`.

    Args:
        place: Path of the folder.
        pattern: String, pattern of the files' names.
    """
    before = read_json(place / _SUMS) or {}
    with contextlib.suppress(OSError):
        found = {path.name: before.get(path.name) or checksum(path) for path in place.glob(pattern)}
        if found != before:
            write_json(place / _SUMS, found)


# --- Who uses them.


class Hold:
    """Protects an entry from removal until this object is collected or its process ends, in whatever way.

    Args:
        path: Path of a folder or file of the cache.

    Attributes:
        path: Path.

    Raises:
        OSError: If it does not exist.
    """

    def __init__(self, path):
        self.path = Path(path)
        if os.name != "posix":  # there, an open file cannot be removed
            return
        import fcntl

        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.stat(path)  # raises if it was removed meanwhile
        if not os.path.samestat(found, os.fstat(descriptor)):
            raise FileNotFoundError(f"Expected {str(path)!r}. Received: it was replaced while it was opened")
        with contextlib.suppress(OSError):  # read-only
            os.utime(descriptor)


def use(kind: str, name: str, model: str) -> Hold:
    """Returns a folder of the cache that is not removed while it is in use.

    Args:
        kind: Key of `KINDS`.
        name: String, the folder's name.
        model: String, the model it belongs to.

    Returns:
        `Hold` of an existing folder, which is in use as long as this object lives.

    Raises:
        OSError: See `folder()`.
        ValueError: See `folder()`.
    """
    while True:
        place = folder(kind, name)
        with contextlib.suppress(FileNotFoundError):  # removed after it was found
            hold = Hold(place)
            break
    files.sweep(place)
    if read_json(place / _ABOUT) is None:
        with contextlib.suppress(OSError):  # read-only
            write_json(place / _ABOUT, {"model": model})
    return hold


# --- What is there, and when it goes.


def entries() -> list[Entry]:
    """Returns all entries of the cache, the last used one first.

    Returns:
        List of `Entry`.
    """
    found = [made for kind, path in _paths() if (made := _entry(kind, path))]
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def _paths() -> Iterator[tuple[str, Path]]:
    root = home()
    for name, kind in KINDS.items():
        yield from ((name, path) for path in (root / name).glob(kind.entries) if not path.name.startswith("."))
    yield from ((_DOWNLOADS, path) for path in (root / "hub").glob("models--*"))
    for top in root.iterdir() if root.is_dir() else ():
        if top.name not in (*KINDS, "hub"):
            places = top.rglob("*") if top.is_dir() else [top]
            yield from ((_DOWNLOADS, path) for path in places if path.is_file() and path.suffix != ".sha256")


def _entry(kind: str, path: Path) -> Entry | None:
    try:
        inside = [path] if path.is_file() else [each for each in path.rglob("*") if not each.is_dir()]
        size, used = sum(each.lstat().st_size for each in inside), path.stat().st_mtime
    except OSError:  # removed meanwhile
        return None
    return Entry(kind, path, _model_of(kind, path), size, used)


def _model_of(kind: str, path: Path) -> str:
    match kind:
        case "predictor" | "features":
            return (read_json(path / _ABOUT) or {}).get("model", "")
        case "plans":
            return (read_json(path) or {}).get("model", "")
        case "converted":
            return path.parent.name
        case "downloads":
            return path.name
    return ""


def remove(chosen: Iterable[Entry], on_removed: Callable[[Entry], Any] = lambda entry: None) -> list[Entry]:
    """Removes entries that no process uses.

    Args:
        chosen: Iterable of `Entry`.
        on_removed: Function of an `Entry`, called after each. Defaults to one that does nothing.

    Returns:
        List of the entries that are in use, or cannot be removed, and stay.
    """
    kept = []
    for entry in chosen:
        if _removed(entry.path):
            on_removed(entry)
        else:
            kept.append(entry)
    return kept


def _removed(path: Path) -> bool:
    try:
        with _alone(path), files.folder_beside(path) as rubbish:
            os.replace(path, rubbish / path.name)  # at once, so that nobody sees a part of it
        return True
    except FileNotFoundError:
        return True
    except OSError:  # in use, or not permitted
        return False


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Raises an `OSError` if a process has a `Hold` of the path. None is granted inside."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def over(found: Iterable[Entry], size: float) -> list[Entry]:
    """Returns the entries to remove, so that the others are not larger than a size. The last used ones stay.

    Args:
        found: Iterable of `Entry`.
        size: Float, bytes.

    Returns:
        List of `Entry`, the one that was not used for the longest time first.

    Example:

    >>> from pathlib import Path
    >>> from keras_effnet.cache import Entry, over
    >>> old, new = (Entry("plans", Path(f"{time}.json"), "", 100, time) for time in (1, 2))
    >>> over([old, new], 150) == [old]
    True
    """
    left, doomed = size, []
    for entry in sorted(found, key=lambda entry: entry.used, reverse=True):
        left -= entry.bytes
        if left < 0:
            doomed.append(entry)
    return doomed[::-1]


def trim() -> None:
    """Removes what was not used for too long, and what exceeds the limit. Downloads count for neither."""
    found = [entry for entry in entries() if entry.kind in KINDS]
    now = time.time()

    def is_old(entry: Entry) -> bool:
        days = KINDS[entry.kind].days
        return days is not None and now - entry.used > days * 24 * 3600

    remove(filter(is_old, found))
    remove(over((entry for entry in found if not is_old(entry)), limit()))


def limit() -> float:
    """Returns the limit of the cache in bytes: `KERAS_EFFNET_CACHE_LIMIT`, or 20 GB.

    Returns:
        Float. Infinity for `"none"`.

    Raises:
        ValueError: If the variable is not a size.
    """
    text = os.environ.get(LIMIT) or DEFAULT_LIMIT
    if text.lower() == "none":
        return float("inf")
    try:
        return size_of(text)
    except ValueError as error:
        raise ValueError(f"{error}, in {LIMIT}, or none") from error


def size_of(text: str) -> float:
    """Reads a size.

    Args:
        text: String, such as `"2GB"`.

    Returns:
        Float, bytes.

    Raises:
        ValueError: If the text is not a size.

    Example:

    >>> from keras_effnet.cache import size_of
    >>> size_of("1.5GB")
    1500000000.0
    """
    return _quantity(text, {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}, "a size such as 2GB")


def age_of(text: str) -> float:
    """Reads a length of time.

    Args:
        text: String, such as `"30d"`: days, hours (`h`) or minutes (`m`).

    Returns:
        Float, seconds.

    Raises:
        ValueError: If the text is not a length of time.

    Example:

    >>> from keras_effnet.cache import age_of
    >>> age_of("30d")
    2592000.0
    """
    return _quantity(text, {"D": 86400, "H": 3600, "M": 60}, "a length of time such as 30d, 12h or 5m")


def _quantity(text: str, units: dict[str, float], what: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise ValueError(f"Expected {what}. Received: {text!r}")
    return float(found[1]) * units[found[2].upper()]

"""The files that this package makes and keeps: where they are, whether they are intact, who may use them, when they go.

They lie in `home()`, in a folder for each of `KINDS`, and can all be made again. Downloads are beside them, see
`keras_effnet.weights.downloads`.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import stat
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_effnet import files

LIMIT = "KERAS_EFFNET_CACHE_LIMIT"
DEFAULT_LIMIT = "20GB"
_ABOUT = "about.json"
_SUMS = "sums.json"
_LOCK, _MAKING = "lock", "making"
_WRITTEN = 10.0  # seconds after which a file of another library is taken for complete


@dataclass(frozen=True)
class Kind:
    """A kind of kept files.

    Args:
        title: String, for users.
        entries: String, pattern of its entries: folders or files, each kept or removed as a whole.
        name: String, regular expression of the names of entries. What has another name is not ours.
        days: Integer. Entries that nobody has used for so long are removed. None: only the limit counts.
    """

    title: str
    entries: str
    name: str
    days: int | None = None


_HASH = "[0-9a-f]{32}"
KINDS = {
    "predictor": Kind("exports", "*", _HASH),
    "converted": Kind("converted weights", "*/*.safetensors", r".+-[0-9a-f]{16}\.safetensors"),
    "features": Kind("features", "*", _HASH, days=30),
    "plans": Kind("plans", "*.json", rf"{_HASH}\.json"),
    "jax": Kind("compiled programs", "*-cache", r".+-cache"),
}


@dataclass(frozen=True)
class Entry:
    """One entry of the cache.

    Args:
        kind: Key of `KINDS`, or `"downloads"`.
        path: Path of a folder or a file.
        model: String, the model it belongs to. Empty if unknown.
        bytes: Integer, size of all its files.
        used: Float, time in seconds since 1970: of its last use; for downloads and compiled programs, of its making.
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


def is_ours(path) -> bool:
    """Returns whether a file can be trusted: others cannot write to it.

    It belongs to the user of this process, to root, or to the owner of `home()`, whom the user has chosen.

    Args:
        path: Path.

    Returns:
        Boolean. False if there is no such file.
    """
    try:
        found = os.stat(path)
    except OSError:
        return False
    if os.name != "posix":
        return True
    trusted = {os.geteuid(), 0}
    with contextlib.suppress(OSError):  # it cannot be made
        trusted.add(os.stat(home()).st_uid)
    open_to_all = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o002
    return found.st_uid in trusted and not open_to_all


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
    made = home()
    made.mkdir(parents=True, exist_ok=True)
    for part in (kind, *Path(name).parts):
        crowded = made.stat().st_mode & 0o022
        made = made / part
        with contextlib.suppress(FileExistsError):
            made.mkdir(mode=0o700 if crowded else 0o755)
        if made.stat().st_mode & 0o002:
            with contextlib.suppress(OSError):  # another user's, or read-only
                made.chmod(0o700)
        if not is_ours(made):
            raise PermissionError(
                f"Expected a cache to which no other user can write. Received: {str(made)!r} of user "
                f"{made.stat().st_uid}. Set KERAS_EFFNET_HOME to another folder"
            )
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
        if is_ours(path) and found["crc32c"] == _sum(found["value"]):
            return found["value"]
    return None


def _sum(value) -> str:
    import google_crc32c

    return f"{google_crc32c.value(json.dumps(value, sort_keys=True).encode()):08x}"


_told: set[tuple[Path, int]] = set()


def tell_of_damage(path) -> None:
    """Warns that a kept file is not used, once until it is made again.

    Args:
        path: Path of the file.
    """
    path = Path(path)
    with contextlib.suppress(OSError):  # it is gone
        known = path, path.stat().st_mtime_ns
        if known in _told:
            return
        _told.add(known)
        reason = "is damaged" if is_ours(path) else "can be written by another user"
        warnings.warn(f"A kept file {reason} and is made again: {path}", stacklevel=4)


def remove_damaged(place: Path, pattern: str) -> None:
    """Removes the damaged files of a folder to which a library writes. Call `record_sums()` once it has written.

    Args:
        place: Path of the folder.
        pattern: String, pattern of the files' names.
    """
    sums, intact = read_json(place / _SUMS) or {}, {}
    for path in place.glob(pattern):
        with contextlib.suppress(OSError):
            found = checksum(path)
            if is_ours(path) and sums.get(path.name, found) == found:
                intact |= {path.name: found} if path.name in sums else {}
            else:
                tell_of_damage(path)
                path.unlink()
    if intact != sums:
        with contextlib.suppress(OSError):  # read-only
            write_json(place / _SUMS, intact)


def record_sums(place: Path, pattern: str) -> None:
    """Records the checksums of files that have none yet. See `remove_damaged()`.

    Args:
        place: Path of the folder.
        pattern: String, pattern of the files' names.
    """
    before = read_json(place / _SUMS) or {}
    with contextlib.suppress(OSError):
        # Another process may still be writing the newest ones.
        done = [path for path in place.glob(pattern) if time.time() - path.stat().st_mtime > _WRITTEN]
        found = {path.name: before.get(path.name) or checksum(path) for path in done}
        if found != before:
            write_json(place / _SUMS, found)


# --- Who uses them.


class Hold:
    """Protects an entry from removal: until this object is collected, or until its process ends, however it ends.

    Args:
        path: Path of a folder or file of the cache.

    Attributes:
        path: Path.

    Raises:
        OSError: If it does not exist.
    """

    def __init__(self, path):
        self.path = Path(path)
        if os.name == "posix":  # elsewhere, an open file cannot be removed
            descriptor = _opened(self.path, os.O_CREAT)
            weakref.finalize(self, os.close, descriptor)
            _wait_for_lock(descriptor, exclusive=False)
            # Raises if the entry was removed meanwhile.
            if not os.path.samestat(os.stat(_lock_of(self.path)), os.fstat(descriptor)):
                raise FileNotFoundError(f"Expected {str(path)!r}. Received: it was replaced while it was opened")
        with contextlib.suppress(OSError):  # read-only
            os.utime(self.path)


def _lock_of(path: Path) -> Path:
    """Returns the file whose lock protects an entry. Network file systems lock no folders."""
    return path / _LOCK if path.is_dir() else path


def _opened(path: Path, flags: int = 0) -> int:
    """Opens the lock of an entry, for writing if that is allowed: network file systems need it."""
    lock = _lock_of(path)
    with contextlib.suppress(OSError):
        return os.open(lock, os.O_RDWR | os.O_CLOEXEC | (flags if lock != path else 0), 0o644)
    return os.open(lock, os.O_RDONLY | os.O_CLOEXEC)


def _wait_for_lock(descriptor: int, exclusive: bool) -> None:
    import fcntl

    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


@contextlib.contextmanager
def making(place: Path) -> Iterator[None]:
    """Lets one process after the other make the content of a folder. Whoever waited finds it made.

    Args:
        place: Path of the folder.
    """
    with open(place / _MAKING, "a") as file:
        if os.name == "posix":
            _wait_for_lock(file.fileno(), exclusive=True)
        yield


def use(kind: str, name: str, model: str) -> Hold:
    """Returns a folder of the cache that is not removed while it is in use.

    Where the cache cannot be used, it is a folder for this process alone, with a warning.

    Args:
        kind: Key of `KINDS`.
        name: String, the folder's name.
        model: String, the model it belongs to.

    Returns:
        `Hold` of an existing folder, which is in use as long as this object lives.

    Raises:
        ValueError: If the limit of the cache is not valid.
    """
    try:
        hold = _held(kind, name)
    except OSError as error:
        place = _own_folder(str(error)) / kind / name
        place.mkdir(parents=True, exist_ok=True)
        return Hold(place)
    files.sweep(hold.path)
    if read_json(hold.path / _ABOUT) is None:
        with contextlib.suppress(OSError):  # read-only
            write_json(hold.path / _ABOUT, {"model": model})
    return hold


def _held(kind: str, name: str) -> Hold:
    for _ in range(9):
        with contextlib.suppress(FileNotFoundError):  # removed after it was found
            return Hold(folder(kind, name))
    return Hold(folder(kind, name))


@functools.cache
def _own_folder(reason: str) -> Path:
    """Returns a folder that is removed when this process ends."""
    warnings.warn(f"Exports and features are made for this process alone. {reason}", stacklevel=5)
    own = tempfile.TemporaryDirectory(prefix="keras_effnet-")
    atexit.register(own.cleanup)
    return Path(own.name)


# --- What is there, and when it goes.


def entries() -> list[Entry]:
    """Returns all entries of the cache but downloads, the last used one first.

    Returns:
        List of `Entry`.
    """
    found = [_entry(kind, path) for kind, path in _paths()]
    return sorted(filter(None, found), key=lambda entry: entry.used, reverse=True)


def _paths() -> Iterator[tuple[str, Path]]:
    for name, kind in KINDS.items():
        with contextlib.suppress(OSError):
            paths = (home() / name).glob(kind.entries)
            yield from ((name, path) for path in paths if re.fullmatch(kind.name, path.name))


def _entry(kind: str, path: Path) -> Entry | None:
    try:
        return Entry(kind, path, _model_of(kind, path), bytes_of(path), path.stat().st_mtime)
    except OSError:  # removed meanwhile
        return None


def bytes_of(path: Path) -> int:
    """Returns the size of a file, or of all files in a folder, in bytes.

    Args:
        path: Path.

    Raises:
        OSError: If it does not exist.
    """
    inside = [path] if path.is_file() else [each for each in path.rglob("*") if not each.is_dir()]
    return sum(each.lstat().st_size for each in inside)


def _model_of(kind: str, path: Path) -> str:
    match kind:
        case "predictor" | "features":
            return (read_json(path / _ABOUT) or {}).get("model", "")
        case "plans":
            return (read_json(path) or {}).get("model", "")
        case "converted":
            return path.parent.name
    return ""


def remove(chosen: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Removes entries that no process uses.

    Args:
        chosen: Iterable of `Entry`.

    Returns:
        Tuple of the list of the removed entries and that of the entries that are in use, or cannot be removed.
    """
    removed, kept = [], []
    for entry in chosen:
        (removed if _removed(entry.path) else kept).append(entry)
    return removed, kept


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
    path.stat()  # raises if it is gone
    if os.name != "posix" or not _lock_of(path).exists():  # never used
        yield
        return
    import fcntl

    descriptor = _opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_used(path: Path) -> bool:
    """Returns whether a process has a `Hold` of an entry.

    Args:
        path: Path.
    """
    try:
        with _alone(path):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def over(found: Iterable[Entry], size: float) -> list[Entry]:
    """Returns the entries to remove, so that the others are not larger than a size.

    What is larger alone goes first; then what was not used for the longest time.

    Args:
        found: Iterable of `Entry`.
        size: Float, bytes.

    Returns:
        List of `Entry`, in the order in which they go.

    Example:

    >>> from pathlib import Path
    >>> from keras_effnet.cache import Entry, over
    >>> old, new = (Entry("plans", Path(f"{time}.json"), "", 100, time) for time in (1, 2))
    >>> over([new, old], 150) == [old]
    True
    """
    found = sorted(found, key=lambda entry: (entry.bytes <= size, entry.used))
    left, doomed = sum(entry.bytes for entry in found), []
    for entry in found:
        if left <= size:
            break
        left -= entry.bytes
        doomed.append(entry)
    return doomed


def trim() -> None:
    """Removes what was not used for too long, and what exceeds the limit. What is in use stays and does not count."""
    for place in [*(home() / name for name in KINDS), *(home() / "converted").glob("*")]:
        files.sweep(place)  # of removals that were killed
    found = [entry for entry in entries() if not is_used(entry.path)]
    old = [entry for entry in found if _is_old(entry)]
    remove(old)
    remove(over([entry for entry in found if entry not in old], limit()))


def _is_old(entry: Entry) -> bool:
    days = KINDS[entry.kind].days
    return days is not None and time.time() - entry.used > days * 24 * 3600


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

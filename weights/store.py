"""Provides the weights of a record as a file that loads fast: downloaded, checked, converted and cached.

There are no locks: processes that need the same file at the same time each make it, and the last one's stays.
"""

import os
import warnings
from contextlib import suppress
from pathlib import Path

from keras_effnet import cache, files
from keras_effnet.weights.downloads import REMEDY, addresses, discard, is_mirror_folder, locate, pin, place
from keras_effnet.weights.formats import safetensors_file
from keras_effnet.weights.registry import File, Record, digest

_in_use: dict[Path, cache.Hold] = {}  # of converted files, until this process ends

KEPT_AS = 1  # version of the conversion: a higher number discards what was converted before


def candidates(record: Record, include_top: bool = True, classes: int | None = None) -> list[File]:
    """Returns the files of a record that fit, in the order in which they are tried. Does not look for the files.

    Args:
        record: A `Record`.
        include_top: Boolean, whether the classifier is needed. Defaults to True.
        classes: Integer. Classes of the classifier. Defaults to None: the record's, without background.

    Returns:
        List of `File`.
    """
    files = [file for file in record.files if file.include_top or not include_top]
    if include_top and classes not in (None, record.classes):
        files = [file for file in files if record.classes + file.class_offset == classes]
    return sorted(files, key=lambda file: file.include_top and not include_top)


def fetch(record: Record, include_top: bool = True, classes: int | None = None) -> Path:
    """Finds a record's weights on this machine, or downloads and converts them.

    Args:
        record: A `Record`.
        include_top: Boolean, whether the classifier is needed. Defaults to True.
        classes: Integer. See `candidates()`.

    Returns:
        Path of a file that `convert.load()` reads.

    Raises:
        OSError: If no file of the record exists or can be downloaded.
        ValueError: If the downloaded file is not the expected one. It is deleted.
    """
    background = include_top and classes not in (None, record.classes)
    files = candidates(record, include_top, classes)
    for file in () if background else files:
        kept = _kept(record, file)
        if kept is not None:
            _tell_of_a_port(file, files[0])
            return kept
    failures: list[OSError | ValueError] = []
    for file in files:
        saved = bool(file.url) and place(file).exists()
        try:
            path = _prepared(record, file, locate(file), background, keep=saved)
        except (OSError, ValueError) as error:
            failures.append(error)
            continue
        _tell_of_a_port(file, files[0])
        return path
    raise _all_failed(files, failures) from failures[0]


def _tell_of_a_port(file: File, wanted: File) -> None:
    if file.format != wanted.format:
        missing = wanted.url or f"the package {wanted.package}"
        warnings.warn(
            f"Could not get {missing}. Using the {file.format} file of the same weights instead", stacklevel=3
        )


def _all_failed(files: list[File], failures: list[OSError | ValueError]) -> OSError | ValueError:
    """Returns the first file's error, with the URLs of the others before its remedy."""
    urls = [file.url for file in files[1:] if file.url and not is_mirror_folder()]
    start, remedy, rest = str(failures[0]).partition(f". {REMEDY}")
    more = f" and {len(urls) - 2} more" if len(urls) > 2 else ""
    also = f". Also tried: {', '.join(urls[:2])}{more}" if urls else ""
    return (ValueError if isinstance(failures[0], ValueError) else OSError)(f"{start}{also}{remedy}{rest}")


def _prepared(record: Record, file: File, path: Path, background: bool, keep: bool) -> Path:
    """Checks a download before it is used, and converts a format that is slow to read."""
    from keras_effnet.weights import convert

    if file.package or (file.format == "keras" and file.hash):
        return path  # checked by its hash, and fast to read
    try:
        values = convert.read(path, record.model, file.format, drop_background=not background)
    except ValueError as error:
        if not keep:
            discard(file)
        raise ValueError(f"{error}, from {addresses(file)[0]}") from error
    pin(file, path)
    if background:
        return path
    with suppress(OSError):  # a read-only folder, for example: then the file is converted each time
        return _keep(record, file, values)
    return path


def _stem(record: Record, file: File) -> Path:
    return cache.home() / "converted" / record.model / f"{record.tag}-{file.format}{KEPT_AS}"


def _keep(record: Record, file: File, values) -> Path:
    """Saves converted weights. The name contains the hash of the content, which reveals a damaged file."""
    stem = _stem(record, file)
    cache.folder("converted", record.model)
    tensors = {"/".join(key): value for key, value in values.items()}
    with files.folder_beside(stem) as folder:
        temporary = safetensors_file.write_safetensors(
            folder / "x.safetensors", tensors, metadata={"made_from": file.url}
        )
        final = stem.with_name(f"{stem.name}-{_short(temporary)}.safetensors")
        os.replace(temporary, final)
    _in_use[final] = cache.Hold(final)
    cache.trim()
    return final


def _kept(record: Record, file: File) -> Path | None:
    stem = _stem(record, file)
    for path in stem.parent.glob(f"{stem.name}-*.safetensors"):
        with suppress(OSError):  # removed by another process, or not readable
            hold = cache.Hold(path)
            is_ours = cache.is_ours(path)
            if is_ours and path.stem.removeprefix(f"{stem.name}-") == _short(path):
                _in_use[path] = hold
                return path
            cache.tell_of_damage(path)
            if is_ours:
                path.unlink()
    return None


def _short(path: Path) -> str:
    return digest(path, "sha256").partition(":")[2][:16]

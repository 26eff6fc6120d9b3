"""Finds photos: in files and folders, in a folder per class, or in a CSV file. The same rules for every command."""

import csv
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from keras_effnet.errors import few
from keras_effnet.images.decoding import decode_image, formats

BUNDLED = Path(__file__).parent / "photographs"  # bundled photos, for int8 calibration without the user's own

VALIDATION = ("val", "validation", "test")  # names of the folder beside `train`, and of splits in CSV files

EVAL_SHARE = 0.2  # without such a folder, this share of each class is held out

MAX_UNREADABLE = 0.05  # as `data.max_corrupt` of a recipe

METADATA = "metadata.csv"  # the labels of a Hugging Face imagefolder

# Names of the columns, the first that a file has: ours, then Hugging Face's.
_PATHS, _LABELS, _SPLITS = ("path", "file_name"), ("label",), ("split",)


@dataclass(frozen=True)
class Files:
    """How to look into folders. Another storage brings other functions.

    Args:
        listed: Function from the path of a folder to the names in it.
        is_folder: Function from a path to a boolean.
        read: Function from the path of a file to its bytes.
    """

    listed: Callable[[str], Iterable[str]] = os.listdir
    is_folder: Callable[[str], bool] = os.path.isdir
    read: Callable[[str], bytes] = lambda path: Path(path).read_bytes()

    def folders(self, place: str) -> list[str]:
        """Returns the names of the folders in a folder, without hidden ones."""
        return [name for name in self._names(place) if self.is_folder(f"{place}/{name}")]

    def photos(self, place: str) -> list[str]:
        """Returns the paths of the photos in a folder, by their suffixes and without hidden ones."""
        return [f"{place}/{name}" for name in self._names(place) if is_photo(name)]

    def _names(self, place: str) -> list[str]:
        names = (name.rstrip("/") for name in self.listed(place))
        return sorted(name for name in names if name and not name.startswith("."))


LOCAL = Files()


@dataclass(frozen=True)
class Labelled:
    """Photos to train and evaluate with.

    Args:
        labels: List of the class names, in alphabetical order.
        train: List of pairs (path, class number).
        test: List of pairs (path, class number).
        notes: List of sentences about classes that are left out, or not evaluated.
    """

    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    notes: list[str] = field(default_factory=list)


@cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    known = formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def is_photo(name: str) -> bool:
    """Returns whether a file's suffix is that of a photo, in upper or lower case.

    Args:
        name: String, name or path of a file.

    Returns:
        Boolean.
    """
    return PurePosixPath(name).suffix.lower() in _suffixes()


def photographs(paths: Iterable[str | os.PathLike], recursive: bool = False) -> list[str]:
    """Lists files, and the photos in folders in alphabetical order.

    Args:
        paths: Paths of files or folders.
        recursive: Boolean, whether to search folders in folders too. Defaults to False.

    Returns:
        List of paths. A folder without photos is listed itself, so that it is reported.
    """
    found: list[str] = []
    for path in (str(Path(path)) for path in paths):  # without "./" and "//"
        inside = list(_inside(path, recursive)) if os.path.isdir(path) else []
        found += inside or [path]
    return found


def _inside(folder: str, recursive: bool) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            visible = sorted((one.name, _is_folder(one)) for one in entries if not one.name.startswith("."))
    except OSError:  # reported when it is opened as a photo
        return
    start = "" if folder == os.curdir else folder
    yield from (os.path.join(start, name) for name, is_folder in visible if not is_folder and is_photo(name))
    for name, is_folder in visible if recursive else ():
        if is_folder:
            yield from _inside(os.path.join(start, name), recursive)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reported when it is opened as a photo
        return False


def readable(
    photos: Sequence[Any], read: Callable[[Any], Any] = decode_image, most: float = MAX_UNREADABLE
) -> list[tuple[Any, Any]]:
    """Reads photos, and skips those that cannot be read with one warning that names them.

    Args:
        photos: Sequence of paths or bytes.
        read: Function from a path or bytes to pixels. Defaults to `decode_image()`.
        most: Float, the largest share of unreadable photos. Defaults to 0.05.

    Returns:
        List of pairs (photo, pixels).

    Raises:
        ValueError: If a larger share cannot be read.
    """

    def tried(photo):
        try:
            return read(photo), None
        except (OSError, ValueError, MemoryError) as error:
            return None, str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        results = list(zip(photos, pool.map(tried, photos), strict=True))
    broken = [photo for photo, (_, problem) in results if problem]
    if broken:
        named = few([f"{len(one)} bytes" if isinstance(one, bytes) else str(one) for one in broken])
        if len(broken) > max(most * len(photos), 1 if len(photos) > 1 else 0):
            first = next(problem for _, (_, problem) in results if problem)
            raise ValueError(
                f"Expected at most {most:.0%} of the photos to be unreadable. Received: {len(broken)} of "
                f"{len(photos)}: {named}. The first: {first}"
            )
        warnings.warn(f"Skipped {len(broken)} of {len(photos)} photos that cannot be read: {named}", stacklevel=3)
    return [(photo, pixels) for photo, (pixels, problem) in results if not problem]


def labelled(folder: str | os.PathLike, eval_share: float = EVAL_SHARE, files: Files = LOCAL) -> Labelled:
    """Finds photos to train and evaluate with.

    Args:
        folder: Path of a folder with one folder per class; of a folder with `train` and `val` (or `validation`, or
            `test`) that each have one folder per class; of a folder as Hugging Face's `imagefolder` reads it, with the
            labels in metadata.csv (`file_name`, `label`), perhaps in `train` and `val`; or of a CSV file with the
            columns `path` and `label`, and perhaps `split`. Paths in a CSV file start at its folder.
        eval_share: Float. Without a part to evaluate on, this share of each class is held out. Which photos these are
            depends on their names only. Defaults to 0.2.
        files: A `Files`. Defaults to local files.

    Returns:
        A `Labelled`. A class without photos is left out, and a class of one photo is not evaluated: `notes` name them.

    Raises:
        ValueError: If a CSV file cannot be read, or there are no photos of at least one class to train on, or none to
            evaluate on.
    """
    root = os.fspath(folder).rstrip("/")
    if not 0 < eval_share < 1:
        raise ValueError(f"Expected a share above 0 and below 1 to evaluate on. Received: {eval_share}")
    train, test = _parts(root, files)
    if test is None:
        train, test = _held_out(train, eval_share)
    notes = [f"Class {name!r} has no photo: it is left out" for name, some in train.items() if not some]
    strange = [name for name, some in test.items() if some and not train.get(name)]
    train = {name: some for name, some in train.items() if some}
    if strange or not train:
        told = f"photos of {few(strange)} only to evaluate on" if strange else "no photos"
        raise ValueError(
            "Expected a folder per class with photos, or train and val with the same classes, or a CSV file with the "
            f"columns path and label. Received: {root!r} with {told}"
        )
    labels = sorted(train)
    notes += [f"Class {name!r} has no photo to evaluate on" for name in labels if not test.get(name)]
    if not any(test.values()):
        raise ValueError(f"Expected photos to evaluate on. Received: {root!r} with {_counted(train)}")
    train_pairs, test_pairs = (
        [(file, number) for number, name in enumerate(labels) for file in part.get(name, ())] for part in (train, test)
    )
    return Labelled(labels, train_pairs, test_pairs, notes)


def classes_of(folder: str | os.PathLike, split: str | None = None, files: Files = LOCAL) -> dict[str, list[str]]:
    """Finds all photos of a folder or CSV file, or of one split of it.

    Args:
        folder: See `labelled()`.
        split: String, name of a folder in the folder, or a value of the column `split`. Defaults to None: all photos.
        files: A `Files`. Defaults to local files.

    Returns:
        Dict from the name of a class to the paths of its photos.

    Raises:
        ValueError: If there is no such split.
    """
    root = os.fspath(folder).rstrip("/")
    if root.endswith(".csv"):
        return _of_table(root, files).get(split, {}) if split else _merged(_of_table(root, files))
    return _classes(f"{root}/{split}" if split else root, files)


def splits_of(folder: str | os.PathLike, files: Files = LOCAL) -> list[str]:
    """Returns the names of the parts of a folder or CSV file: folders that contain folders or labels.

    Args:
        folder: See `labelled()`.
        files: A `Files`. Defaults to local files.

    Returns:
        List of strings.
    """
    root = os.fspath(folder).rstrip("/")
    if root.endswith(".csv"):
        return [split for split in _of_table(root, files) if split]
    return [name for name in files.folders(root) if _is_part(f"{root}/{name}", files)]


def _is_part(place: str, files: Files) -> bool:
    return bool(files.folders(place)) or METADATA in files.listed(place)


def _parts(root: str, files: Files) -> tuple[dict[str, list[str]], dict[str, list[str]] | None]:
    """Returns the photos of each class to train on, and to evaluate on or None."""
    if root.endswith(".csv"):
        table = _of_table(root, files)
        held = next((name for name in VALIDATION if name in table), None)
        if held is None:
            return _merged(table), None
        return _merged({split: part for split, part in table.items() if split in ("train", "")}), table[held]
    try:
        parts = files.folders(root)
    except OSError as error:
        raise ValueError(f"Expected a folder of photos with one folder per class. Received: {root!r}") from error
    held = next((name for name in VALIDATION if name in parts), None)
    if held and "train" in parts:
        return _classes(f"{root}/train", files), _classes(f"{root}/{held}", files)
    if "train" in parts and _is_part(f"{root}/train", files) and len(parts) == 1:
        return _classes(f"{root}/train", files), None
    return _classes(root, files), None


def _classes(place: str, files: Files) -> dict[str, list[str]]:
    if METADATA in files.listed(place):
        return _merged(_of_table(f"{place}/{METADATA}", files))
    return {name: files.photos(f"{place}/{name}") for name in files.folders(place)}


def _of_table(path: str, files: Files) -> dict[str, dict[str, list[str]]]:
    """Reads a CSV file. Returns for each split, `""` without one, the paths of the photos of each class."""
    try:
        rows = csv.DictReader(io.StringIO(files.read(path).decode("utf-8-sig"), newline=""))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a CSV file in UTF-8. Received: {path!r}, which cannot be read: {error}") from error
    place = path.rpartition("/")[0] or "."
    names = rows.fieldnames or []
    columns = [next((name for name in wanted if name in names), None) for wanted in (_PATHS, _LABELS, _SPLITS)]
    if None in columns[:2]:
        raise ValueError(f"Expected a CSV file with the columns path and label. Received: {path!r} with {few(names)}")
    found: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(rows, 2):
        file, label, split = ((row.get(column) or "").strip() if column else "" for column in columns)
        if not file or not label:
            raise ValueError(f"Expected a path and a label in each row. Received: row {number} of {path!r}: {row}")
        absolute = file.startswith("/") or "://" in file
        found.setdefault(split, {}).setdefault(label, []).append(file if absolute else f"{place}/{file}")
    return found


def _merged(table: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in table.values():
        for label, paths in part.items():
            found.setdefault(label, []).extend(paths)
    return found


def _held_out(classes: dict[str, list[str]], share: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Divides the photos of each class. The order of the hashes of their names is as good as a random one."""
    train, test = {}, {}
    for name, photos in classes.items():
        count = min(max(1, round(share * len(photos))), len(photos) - 1) if photos else 0

        def drawn(photo: str, name: str = name) -> bytes:
            return hashlib.sha256(f"{name}/{photo.rpartition('/')[2]}".encode()).digest()

        held = set(sorted(photos, key=drawn)[:count])
        train[name] = [photo for photo in photos if photo not in held]
        test[name] = [photo for photo in photos if photo in held]
    return train, test


def _counted(classes: dict[str, list[str]]) -> str:
    return few([f"{len(some)} of {name!r}" for name, some in classes.items()])

"""Finds photos in files and folders, or in a folder per class."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_effnet.images.decoding import formats

BUNDLED = Path(__file__).parent / "photographs"  # bundled photos, for int8 calibration without the user's own

VALIDATION = ("val", "validation", "test")  # names of the folder beside `train`

HELD_OUT = 5  # without such a folder, every fifth photo of a class is held out


def photographs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Lists files, and the images in folders in alphabetical order.

    Args:
        paths: Paths of files or folders.

    Returns:
        List of paths. A folder without images is listed itself, so that it is reported.
    """
    from PIL import Image

    known = formats()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in known}
    found = []
    for path in map(Path, paths):
        try:
            files = sorted(path.iterdir()) if os.path.isdir(path) else []
        except OSError:  # reported when it is opened as a photo
            files = []
        images = [file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        found += images or [path]
    return found


def _folders(place: str) -> list[str]:
    return [path.name for path in Path(place).iterdir() if path.is_dir()]


def _photographs(place: str) -> list[Path]:
    return [path for path in photographs([place]) if path.is_file()]


def labelled(
    folder: str | os.PathLike,
    folders: Callable[[str], Iterable[str]] = _folders,
    files: Callable[[str], Sequence[Any]] = _photographs,
) -> tuple[list[str], list[tuple[Any, int]], list[tuple[Any, int]]]:
    """Finds photos to train and test with.

    Args:
        folder: Path of a folder with one folder per class, or of a folder with `train` and `val` (or `validation`, or
            `test`) that each have one folder per class. In the first case, every fifth photo of a class is held out.
        folders: Function from the path of a folder to the names of the folders in it. Defaults to local folders.
        files: Function from the path of a folder to the photos in it, in order. Defaults to local files.

    Returns:
        Tuple of the class names in alphabetical order, and two lists of pairs (path, class number): to train and to
        test with.

    Raises:
        ValueError: If there is no folder, or photos of a class are missing.
    """

    def classes(place: str) -> dict[str, Sequence[Any]]:
        names = sorted(name for name in folders(place) if not name.startswith("."))
        return {name: files(f"{place}/{name}") for name in names}

    root = os.fspath(folder)
    try:
        parts = set(folders(root))
    except OSError as error:
        raise ValueError(f"Expected a folder of photos with one folder per class. Received: {root!r}") from error
    held = next((name for name in VALIDATION if name in parts), None)
    if held and "train" in parts:
        train, test = classes(f"{root}/train"), classes(f"{root}/{held}")
    else:
        found = classes(root)
        test = {name: some[HELD_OUT - 1 :: HELD_OUT] for name, some in found.items()}
        train = {name: [f for place, f in enumerate(some, 1) if place % HELD_OUT] for name, some in found.items()}
    empty = [name for name, some in train.items() if not some]
    if not train or empty or list(test) != list(train) or not any(test.values()):
        told = f"no photo of {', '.join(empty)}" if empty else f"{', '.join(train) or 'none'} to train on"
        told += f", {', '.join(name for name, some in test.items() if some) or 'none'} to test on"
        raise ValueError(
            "Expected a folder per class with photos, or 'train' and 'val' with the same ones. "
            f"Received: {root!r} with {told}"
        )
    pairs = [[(file, number) for number, name in enumerate(train) for file in part[name]] for part in (train, test)]
    return list(train), pairs[0], pairs[1]

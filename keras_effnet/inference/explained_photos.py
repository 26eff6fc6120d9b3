"""Explains photos: a picture of each in a folder, and a page of all."""

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from keras_effnet import files
from keras_effnet.images.folders import photographs
from keras_effnet.inference import map_pictures
from keras_effnet.inference.classifier import Classifier, told

METHODS = ("cam", "grad-cam", "grad-cam++")  # here, since class_maps imports Keras
PAGE = "index.html"


def explain_photos(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    classifier: Classifier,
    classes: Sequence[str] = (),
    method: str = "cam",
    layer: str | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Writes a picture of each photo, with maps of what speaks for its classes, and a page that shows all.

    Args:
        paths: Sequence of paths of photos or of folders that contain them.
        out: Path of the folder to write to. It is created if its parent exists.
        classifier: A `Classifier`; for `"cam"`, one with maps.
        classes: Sequence of strings, names or numbers of the classes to explain. Defaults to none: the most likely of
            each photo.
        method: See `explain()`. Defaults to `"cam"`.
        layer: See `explain()`. Defaults to None.

    Yields:
        A dict per photo with `path`, and either `predictions` and `picture`, the path of the picture, or `error`.

    Raises:
        OSError: If the folder cannot be written to.
        ValueError: If a class or a layer is unknown, the folder holds the photos, or it has another program's page.
    """
    out, found = Path(out), photographs(paths)
    check_folder(out, found)
    class_ids = [classifier.class_id(name) for name in classes] or None
    rows: Any = (
        classifier.explain_files(found, class_ids)
        if method == "cam"
        else _by_gradients(classifier, found, class_ids, method, layer)
    )
    out.mkdir(exist_ok=True)
    channels_last = classifier.predictor.input_shape[-1] <= 4
    taken: set[str] = set()
    done: list[dict[str, Any]] = []

    def cards() -> Iterator[str]:
        for row in rows:
            if "error" in row:
                done.append(row)
                yield map_pictures.error_card(row["error"])
                continue
            path, pixels, maps = row["path"], row.pop("pixels"), row.pop("maps")
            shown = map_pictures.Explanation(map_pictures.viewed(pixels, channels_last), row["predictions"], maps)
            picture = out / _free(os.path.splitext(os.path.basename(path))[0], taken)
            with files.replacing(picture) as temporary:
                temporary.write_bytes(shown.picture())
            done.append(row | {"picture": str(picture)})
            yield shown.card(os.path.basename(path))

    about = (
        "Left, the photo as the model sees it. Beside it, for each class, the places that speak for it: the brighter, "
        "the more they add to its score. Each map has its own scale."
    )
    with closing(rows), files.replacing(out / PAGE) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for part in map_pictures.page(f"What {classifier.name} looks at", about, cards()):
            file.write(part)
            yield from done
            done.clear()


def check_folder(out: str | os.PathLike, found: Iterable[str]) -> None:
    """Checks that explanations can be written to a folder.

    Args:
        out: Path of the folder.
        found: Iterable of the paths of the photos.

    Raises:
        OSError: If it is a file, or cannot be created.
        ValueError: If it holds the photos, or another program's page.
    """
    out = Path(out)
    folder = os.path.realpath(out)
    if any(os.path.dirname(os.path.realpath(path)) == folder for path in found):
        raise ValueError(f"Expected a folder other than that of the photos. Received: {str(out)!r}")
    page = out / PAGE
    if page.exists() and map_pictures.GENERATOR not in page.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise ValueError(f"Expected a new folder, or one of `explain`. Received: {str(out)!r} with another {PAGE}")
    if not out.is_dir():
        if out.exists():
            raise NotADirectoryError(f"Expected a folder to write to. Received: {str(out)!r}, a file")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"Expected a folder to create {out.name!r} in. Received: {str(out.parent)!r}, which does not exist"
            )


def _free(stem: str, taken: set[str]) -> str:
    """Returns the name of a picture that no other photo has."""
    name, number = f"{stem}.jpg", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.jpg"
    taken.add(name)
    return name


def _by_gradients(
    classifier: Classifier, paths: Sequence[str], class_ids: Sequence[int] | None, method: str, layer: str | None
) -> Generator[dict[str, Any], None, None]:
    from keras_effnet.inference.class_maps import explain

    load, net = classifier.image_loader(), classifier.model()
    for path in paths:
        try:
            pixels = load(path)
        except (OSError, ValueError, MemoryError) as error:
            yield {"path": path, "error": told(path, error)}
            continue
        best = classifier.ranked(classifier.predictor(pixels)[0], class_ids=class_ids)
        numbers = [row["class_id"] for row in best]
        maps = explain(net, [pixels] * len(numbers), numbers, method, layer)
        yield {"path": path, "predictions": best, "maps": list(maps), "pixels": pixels}

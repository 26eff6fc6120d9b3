"""Explains photos: a picture of each in a folder, and a page of all."""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from keras_effnet import files
from keras_effnet.images.folders import photographs
from keras_effnet.inference import batches, map_pictures
from keras_effnet.inference.classifier import Classifier, told
from keras_effnet.inference.explain import check

PAGE = "index.html"


def explain_photos(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    classifier: Classifier,
    classes: Sequence[str] = (),
    method: str = "cam",
    layer: str | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Writes a picture of each photo, with maps of the places that support its classes, and a page of all.

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
        ValueError: If a class or a layer is unknown, the model has no maps, or the folder holds other files.
    """
    check(method, layer)
    out = Path(out)
    found = photos_for(out, paths)
    class_ids = [classifier.class_id(name) for name in classes] or None
    if method == "cam":
        rows: Any = classifier.explain_files(found, class_ids)
    else:
        from keras_effnet.inference.class_maps import Explainer

        rows = _by_gradients(classifier, Explainer(classifier.model(), method, layer), found, class_ids)
    return _written(rows, out, f"What {classifier.name} looks at")


def _written(rows: Any, out: Path, title: str) -> Generator[dict[str, Any], None, None]:
    out.mkdir(exist_ok=True)
    if not _is_own(out):  # the folder of a run that is killed is one that can be written to
        (out / PAGE).write_text("".join(map_pictures.page(title, "Not finished.", [])), encoding="utf-8")
    taken: set[str] = set()
    done: list[dict[str, Any]] = []

    def cards() -> Iterator[str]:
        for row in rows:
            if "error" in row:
                done.append(row)
                yield map_pictures.error_card(row["error"])
                continue
            path, pixels, maps = row["path"], row.pop("pixels"), row.pop("maps")
            shown = map_pictures.Explanation(pixels, row["predictions"], maps)
            picture = _free(out, os.path.splitext(os.path.basename(path))[0], taken)
            with files.replacing(picture) as temporary:
                temporary.write_bytes(shown.picture())
            done.append(row | {"picture": str(picture)})
            yield shown.card(os.path.basename(path))

    about = (
        "Left, the photo as the model sees it. Beside it, for each class, the places that support it: the brighter, "
        "the more they add to its score. Each map has its own scale."
    )
    with closing(rows), files.replacing(out / PAGE) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for part in map_pictures.page(title, about, cards()):
            file.write(part)
            yield from done
            done.clear()


def photos_for(out: str | os.PathLike, paths: Sequence[str | os.PathLike]) -> list[str]:
    """Lists photos whose explanations can be written to a folder, without those that the folder has from before.

    Args:
        out: Path of the folder: a new one, an empty one, or one of `explain_photos()`.
        paths: Sequence of paths of photos or of folders that contain them.

    Returns:
        List of paths.

    Raises:
        OSError: If the folder is a file, or cannot be created.
        ValueError: If the folder holds other files.
    """
    out = Path(out)
    if not out.is_dir():
        if os.path.lexists(out):
            raise NotADirectoryError(f"Expected a folder to write to. Received: {str(out)!r}, a file")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"Expected a folder to create {out.name!r} in. Received: {str(out.parent)!r}, which does not exist"
            )
    elif any(out.iterdir()) and not _is_own(out):
        raise ValueError(
            f"Expected a new or empty folder, or one that `explain` has written. Received: {str(out)!r}, with other "
            "files"
        )
    folder, found = os.path.realpath(out), photographs(paths)
    others = [path for path in found if os.path.dirname(os.path.realpath(path)) != folder]
    if found and not others:
        raise ValueError(f"Expected a folder other than that of the photos. Received: {str(out)!r}")
    return others


def _is_own(out: Path) -> bool:
    try:
        with (out / PAGE).open(encoding="utf-8", errors="replace") as file:
            return map_pictures.GENERATOR in file.read(1000)
    except OSError:
        return False


def _free(out: Path, stem: str, taken: set[str]) -> Path:
    """Returns the path of a picture that no other photo has, and that replaces no other file."""
    path, number = out / f"{stem}.jpg", 1
    # Some disks take Cat.jpg and cat.jpg for the same file.
    while path.name.casefold() in taken or (os.path.lexists(path) and not map_pictures.is_own_picture(path)):
        number += 1
        path = out / f"{stem}-{number}.jpg"
    taken.add(path.name.casefold())
    return path


def _by_gradients(
    classifier: Classifier, explainer: Any, paths: Sequence[str], class_ids: Sequence[int] | None
) -> Generator[dict[str, Any], None, None]:
    load = classifier.image_loader()
    for path in paths:
        try:
            pixels = load(path)
        except (OSError, ValueError, MemoryError) as error:
            yield {"path": path, "error": told(path, error)}
            continue
        best = classifier.ranked(classifier.predictor(pixels)[0], class_ids=class_ids)
        maps = [explainer(pixels, row["class_id"])[0] for row in best]
        shown = batches.viewed(pixels, classifier.predictor.input_shape[-1] <= 4)
        yield {"path": path, "predictions": best, "maps": maps, "pixels": shown}

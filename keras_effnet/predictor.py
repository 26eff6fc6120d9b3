"""From photographs to named classes."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet import preprocessing

BATCH = 16  # photographs that are decoded before the model sees them


def photographs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files as they are given, and the images of folders in alphabetical order.

    Args:
        paths: Paths of files or folders.

    Returns:
        List of paths. A folder without an image stays in it as it is, to be reported.
    """
    from PIL import Image

    formats = preprocessing.formats()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}
    found = []
    for path in map(Path, paths):
        try:
            files = sorted(path.iterdir()) if os.path.isdir(path) else []
        except OSError:  # told when it is opened as a photograph
            files = []
        images = [file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        found += images or [path]
    return found


def classify(
    paths: Iterable[str | os.PathLike],
    model: str = "efficientnet-lite0",
    weights: str = "imagenet",
    top: int = 5,
    on_progress: Callable[[int], Any] = lambda done: None,
) -> list[dict[str, Any]]:
    """Classifies photographs with a pretrained model. One that cannot be read does not stop the others.

    Args:
        paths: Paths of image files, or of folders of them.
        model: Name of a model. Defaults to `"efficientnet-lite0"`.
        weights: Tag of the weights, or path of a file. Defaults to `"imagenet"`.
        top: Integer, classes per photograph. Defaults to 5.
        on_progress: Function that is called with 1 for each photograph that was read.

    Returns:
        List of a dict per photograph: `path`, and either `predictions` (a list of dicts with `class_id`, 0-999,
        `wnid`, `name` and `probability`) or `error`.

    Raises:
        ValueError: If model, weights or top are not valid.
        OSError: If the weights cannot be brought.

    Example:

    >>> classify(["docs/coffee.png"], top=1)[0]["predictions"][0]["name"]
    'espresso'
    """
    from keras_effnet.models import create_model

    preprocessing.rank(np.zeros((0, 1000)), top)  # an invalid top is told before the work
    net = create_model(model, weights=weights)
    paths = photographs(paths)
    results: list[dict[str, Any]] = [{"path": os.fspath(path)} for path in paths]
    for start in range(0, len(paths), BATCH):
        batch, images = results[start : start + BATCH], []
        for path, result in zip(paths[start:], batch, strict=False):
            try:
                if os.path.isdir(path):
                    raise ValueError(f"Expected photographs. Received: {str(path)!r}, a folder without any")
                images.append(preprocessing.load_image(path, net))
            except (OSError, ValueError, MemoryError) as error:
                result["error"] = str(error) or type(error).__name__
            on_progress(1)
        if images:
            named = iter(preprocessing.rank(np.asarray(net.predict_on_batch(np.stack(images))), top))
            for result in batch:
                if "error" not in result:
                    keys = ("class_id", "wnid", "name", "probability")
                    result["predictions"] = [dict(zip(keys, row, strict=True)) for row in next(named)]
    return results

"""Classifies photos: from files and folders to named classes."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from keras_effnet.errors import one_of
from keras_effnet.images import class_names, folders, photo_loader
from keras_effnet.inference.predictor import Predictor
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.weights import registry

BATCH = 16  # photos to decode before the model runs on them


class Classifier:
    """Classifies photos with a pretrained ImageNet classifier.

    Args:
        model: Name of a model. Defaults to `"efficientnet-lite0"`.
        weights: Tag of the weights, or path of a file. Defaults to `"imagenet"`.
        top: Integer. Classes per photo. Defaults to 5.
        runtime: See `Predictor`.
        precision: See `Predictor`.

    Call arguments:
        paths: Paths of image files, or of folders that contain them.
        on_progress: Function, called with 1 after each photo. Defaults to none.

    Returns:
        List of dicts, one per photo, with `path` and either `predictions` (a list of dicts with `class_id`, 0-999,
        `wnid`, `name` and `probability`) or `error`. A photo that cannot be read does not stop the others.

    Raises:
        ValueError: If `model`, `weights` or `top` is not valid.
        OSError: If the weights cannot be downloaded.

    Example:

    >>> Classifier(top=1)(["docs/coffee.png"])[0]["predictions"][0]["name"]
    'espresso'
    """

    def __init__(
        self,
        model: str = "efficientnet-lite0",
        weights: str | os.PathLike = "imagenet",
        top: int = 5,
        runtime: str = "auto",
        precision: str = "float32",
    ):
        class_names.rank(np.zeros((0, 1000)), top)  # raises for an invalid `top` before any work
        one_of("model", model, VARIANTS)
        self.top = top
        self.predictor = Predictor(model, runtime, precision, weights=weights)
        if os.path.isfile(weights):
            record = registry.recognise(model, weights) or registry.default(model)
        else:
            try:
                record = registry.find(model, os.fspath(weights))
            except ValueError:  # no tag: the folder or prefix of a checkpoint, which `Predictor` has loaded
                record = registry.default(model)
        self._load = photo_loader.image_loader(model, record and record.tag, shape=self.predictor.input_shape)

    def __call__(
        self, paths: Iterable[str | os.PathLike], on_progress: Callable[[int], Any] = lambda done: None
    ) -> list[dict[str, Any]]:
        paths = folders.photographs(paths)
        results: list[dict[str, Any]] = [{"path": os.fspath(path)} for path in paths]
        for start in range(0, len(paths), BATCH):
            batch, images = results[start : start + BATCH], []
            for path, result in zip(paths[start:], batch, strict=False):
                try:
                    if os.path.isdir(path):
                        raise ValueError(f"Expected photos. Received: {str(path)!r}, a folder without photos")
                    images.append(self._load(path))
                except (OSError, ValueError, MemoryError) as error:
                    result["error"] = str(error) or type(error).__name__
                on_progress(1)
            if images:
                named = iter(class_names.rank(self.predictor(np.stack(images)), self.top))
                for result in batch:
                    if "error" not in result:
                        keys = ("class_id", "wnid", "name", "probability")
                        result["predictions"] = [dict(zip(keys, row, strict=True)) for row in next(named)]
        return results

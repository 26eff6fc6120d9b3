"""Classifies photos: from files and folders to named classes."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from keras_effnet import class_names
from keras_effnet.images import folders, photo_loader
from keras_effnet.inference.predictor import Predictor
from keras_effnet.model_loader import Reference, resolve
from keras_effnet.weights import registry

BATCH = 16  # photos to decode before the model runs on them


class Classifier:
    """Classifies photos, with a pretrained ImageNet classifier or with your own.

    Args:
        model: Name of a model, or path of a `.keras` file, of a run's folder or of an exported model. Defaults to
            `"efficientnet-lite0"`.
        weights: For a name: tag of the weights, or path of a file. Defaults to `"imagenet"`.
        top: Integer. Classes per photo. Defaults to 5. If the model has fewer, all of them are returned.
        runtime: See `Predictor`.
        precision: See `Predictor`.
        best: Boolean, whether to use a run's best.keras. See `load_model()`. Defaults to False.

    Attributes:
        note: String that says where the names of the classes are missing or assumed, or None.

    Call arguments:
        paths: Paths of image files, or of folders that contain them.
        on_progress: Function, called with 1 after each photo. Defaults to none.

    Returns:
        List of dicts, one per photo, with `path` and either `predictions` (a list of dicts with `class_id`, from 0,
        `name` and `probability`, for ImageNet also `wnid`) or `error`. A photo that cannot be read does not stop the
        others. Outputs that are not probabilities are taken for logits.

    Raises:
        ValueError: If `model`, `weights` or `top` is not valid.
        OSError: If the weights cannot be downloaded, or a file cannot be read.

    Example:

    >>> Classifier(top=1)(["docs/coffee.png"])[0]["predictions"][0]["name"]
    'espresso'
    """

    def __init__(
        self,
        model: str | os.PathLike = "efficientnet-lite0",
        weights: str | os.PathLike = "imagenet",
        top: int = 5,
        runtime: str = "auto",
        precision: str = "float32",
        best: bool = False,
    ):
        class_names.rank(np.zeros((0, 1000)), top)  # raises for an invalid `top` before any work
        found = resolve(model, best, exports=True)
        self.top, self.note = top, None
        self.predictor = Predictor(found.place, runtime, precision, weights=found.tag_of(weights))
        self._load = self._loader(found, weights)
        self._labels = self.predictor.labels

    def _loader(self, found: Reference, weights) -> Callable[[Any], np.ndarray]:
        """Returns the function that loads photos for the model."""
        shape = self.predictor.input_shape
        if found.kind != "name":
            return photo_loader.loader_of(self.predictor.metadata | {"input_shape": shape})
        if os.path.isfile(weights):
            record = registry.recognise(found.place, weights) or registry.default(found.place)
        else:
            try:
                record = registry.find(found.place, os.fspath(found.tag_of(weights)))
            except ValueError:  # no tag: the folder or prefix of a checkpoint, which `Predictor` has loaded
                record = registry.default(found.place)
        return photo_loader.image_loader(found.place, record and record.tag, shape=shape)

    def _names(self, classes: int) -> list[str] | None:
        """Returns the names of the classes, or None for ImageNet's."""
        labels = self._labels
        if labels is None:
            if classes != 1000:
                self._labels = labels = [str(number) for number in range(classes)]
                self.note = (
                    "The model has no class names: these are class numbers. To add the names, save it with "
                    "keras_effnet.save_model(model, path, labels=[...])"
                )
            elif not self.predictor.metadata.get("weights"):
                self.note = "The model has 1000 classes without names: these are ImageNet's"
        return None if labels is None or labels == class_names.labels() else labels

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
                rows = iter(self._ranked(np.stack(images)))
                for result in batch:
                    if "error" not in result:
                        result["predictions"] = next(rows)
        return results

    def _ranked(self, images: np.ndarray) -> list[list[dict[str, Any]]]:
        """Returns the most likely classes of each image."""
        outputs = self.predictor(images)
        if not isinstance(outputs, np.ndarray) or outputs.ndim != 2:
            told = f"shape {outputs.shape}" if isinstance(outputs, np.ndarray) else "several outputs"
            raise ValueError(f"Expected a classifier with one output of shape (batch, classes). Received: {told}")
        if outputs.min() < 0 or outputs.max() > 1 + 1e-3:
            outputs = np.exp(outputs - outputs.max(1, keepdims=True))
            outputs /= outputs.sum(1, keepdims=True)
        names = self._names(outputs.shape[1])
        keys = ("class_id", "wnid", "name", "probability")
        ranked = class_names.rank(outputs, self.top, names)
        return [
            [{key: value for key, value in zip(keys, row, strict=True) if value is not None} for row in rows]
            for rows in ranked
        ]

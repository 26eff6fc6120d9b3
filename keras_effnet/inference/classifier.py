"""Classifies photos: from files and folders to named classes."""

import glob
import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet import class_names
from keras_effnet.errors import one_of, unknown
from keras_effnet.images import photo_loader
from keras_effnet.inference.predictor import Predictor
from keras_effnet.model_loader import load_model, resolve
from keras_effnet.weights import registry


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
        decode: See `load_image()`. Defaults to `"exact"`.
        device: See `Predictor`. Defaults to `"auto"`.
        maps: Boolean, whether to compute maps too, for `explain_files()`. Defaults to False.
        threads: See `Predictor`. Defaults to None.

    Attributes:
        name: String, the model, its weights, and what else the predictions depend on. Files of predictions hold it.
        note: String that says where the names of the classes are missing or assumed, or None.

    Call arguments:
        paths: Paths of image files, or of folders that contain them.

    Returns:
        List of dicts, one per photo, with `path` and either `predictions` (a list of dicts with `class_id`, from 0,
        `name` and `probability`, for ImageNet also `wnid`) or `error`. A photo that cannot be read does not stop the
        others. Outputs that are not probabilities are taken for logits.

    Raises:
        ValueError: If `model`, `weights`, `top` or `decode` is not valid.
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
        decode: str = "exact",
        device: str = "auto",
        maps: bool = False,
        threads: int | None = None,
    ):
        class_names.rank(np.zeros((0, 1000)), top)  # raises for an invalid `top` before any work
        found = resolve(model, best, exports=True)
        one_of("decode", decode, photo_loader.DECODE)
        self.top, self.note, self._decode = top, None, decode
        tag = found.tag_of(weights)
        self.predictor = Predictor(found.place, runtime, precision, threads, weights=tag, device=device, maps=maps)
        self._labels = self.predictor.labels
        self._of_imagenet = self._labels == class_names.labels()
        self._named = found, weights

    def _names(self, classes: int) -> list[str] | None:
        """Returns the names of the classes, or None for ImageNet's."""
        if self._labels is None:
            labels, self.note = class_names.names_of(self.predictor.metadata, classes)
            self._of_imagenet = labels == class_names.labels()  # first: other threads look for the labels
            self._labels = labels
        return None if self._of_imagenet else self._labels

    @cached_property
    def name(self) -> str:
        """The model, its weights, and what else the predictions depend on. Files of predictions hold it."""
        found, weights = self._named
        # A file is known by its content, since a later run may replace it.
        if found.kind != "name":
            parts = [os.path.basename(found.place), _content(found.place)]
        else:
            tag = str(found.tag_of(weights))
            parts = [found.place, os.path.basename(tag), "" if _is_tag(found.place, tag) else _content(tag)]
        parts += [str(self.predictor.precision).replace("float32", "")]
        parts += [f"decode={self._decode}" if self._decode != "exact" else ""]
        return " ".join(part for part in parts if part)

    def __call__(self, paths: Iterable[str | os.PathLike]) -> list[dict[str, Any]]:
        return list(self.predict_files(paths))

    def predict_files(self, paths: Iterable[str | os.PathLike]) -> Generator[dict[str, Any], None, None]:
        """Classifies photos as the call does, and yields each result as soon as it is ready.

        Args:
            paths: See `Classifier`.

        Yields:
            A dict per photo, see `Classifier`.
        """
        with closing(self.predictor.predict_files(paths, decode=self._decode)) as rows:
            for path, outputs, error in rows:
                if error is None:
                    yield {"path": path, "predictions": self.ranked(outputs)}
                else:
                    yield {"path": path, "error": told(path, error)}

    def explain_files(
        self, paths: Iterable[str | os.PathLike], class_ids: Sequence[int] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Classifies photos, with a map of the places that support each class.

        Args:
            paths: See `Classifier`.
            class_ids: Sequence of integers, the classes to explain. Defaults to None: the most likely of each photo.

        Yields:
            A dict per photo, see `Classifier`, with the chosen classes as `predictions`, and with `maps`, a list of a
            map for each of them, see `keras_effnet.explain()`, and `pixels`, the photo as the model sees it.

        Raises:
            ValueError: If the classifier was created without `maps=True`.
        """

        def chosen(outputs: Any) -> list[int]:
            return [row["class_id"] for row in self.ranked(outputs, class_ids=class_ids)]

        return self._explained(self.predictor.explain_files(paths, decode=self._decode, classes=chosen), class_ids)

    def _explained(self, stream, class_ids: Sequence[int] | None) -> Generator[dict[str, Any], None, None]:
        with closing(stream) as rows:
            for path, outputs, error, maps, pixels in rows:
                if error is None:
                    best = self.ranked(outputs, class_ids=class_ids)
                    yield {"path": path, "predictions": best, "maps": list(np.moveaxis(maps, -1, 0)), "pixels": pixels}
                else:
                    yield {"path": path, "error": told(path, error)}

    def image_loader(self) -> Callable[[Any], np.ndarray]:
        """Returns the function that loads photos, see `Predictor.image_loader()`.

        Returns:
            Function from a path, or a file's bytes, to an array of pixels.
        """
        return self.predictor.image_loader(self._decode)

    def model(self) -> Any:
        """Loads the Keras model.

        Returns:
            A `keras.Model`.

        Raises:
            ValueError: If the classifier runs an exported file.
        """
        found, weights = self._named
        return load_model(found.place, found.tag_of(weights))

    def class_id(self, given: str) -> int:
        """Returns the number of a class.

        Args:
            given: String, the name of a class or its number, from 0.

        Returns:
            Integer.

        Raises:
            ValueError: If there is no such class.
        """
        classes = self._classes
        names = self._names(classes) or class_names.labels()
        if given in names:
            return names.index(given)
        if given.isdecimal() and int(given) < classes:
            return int(given)
        if given.isdecimal():
            raise ValueError(f"Expected the number of a class, from 0 to {classes - 1}. Received: {given}")
        raise unknown("class", given, names)

    @cached_property
    def _classes(self) -> int:
        return self.predictor(np.zeros((1, *self.predictor.input_shape), "uint8")).shape[-1]

    @cached_property
    def _returns_logits(self) -> bool:
        """Whether the model returns logits, by its outputs for noise, black and white."""
        return class_names.returns_logits(self.predictor, self.predictor.input_shape)

    def ranked(
        self, outputs: Any, top: int | None = None, class_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Returns the most likely classes of a photo.

        Args:
            outputs: What `predictor` returns for the photo, without the axis of the batch.
            top: Integer. Classes to return. Defaults to None: the classifier's `top`.
            class_ids: Sequence of integers, the classes to return. Defaults to None: the most likely.

        Returns:
            List of dicts, see `Classifier`.

        Raises:
            ValueError: If the model is not a classifier with one output, or `top` is not a positive integer.
        """
        if isinstance(outputs, dict | list) or outputs.ndim != 1:
            several = isinstance(outputs, dict | list)
            told = "several outputs" if several else f"shape {('batch', *outputs.shape)}".replace("'", "")
            raise ValueError(f"Expected a classifier with one output of shape (batch, classes). Received: {told}")
        outputs = class_names.probabilities(outputs, lambda: self._returns_logits)
        top = self.top if top is None else top
        top = top if class_ids is None else len(outputs)
        (best,) = class_names.rank(outputs[None], top, self._names(len(outputs)))
        if class_ids is not None:
            by_class = {row[0]: row for row in best}
            best = [by_class[number] for number in class_ids]
        keys = ("class_id", "wnid", "name", "probability")
        return [{key: value for key, value in zip(keys, row, strict=True) if value is not None} for row in best]


def told(path: str | os.PathLike, error: Exception) -> str:
    """Returns why a photo cannot be classified.

    Args:
        path: Path of the photo.
        error: The exception.

    Returns:
        String.
    """
    if isinstance(error, IsADirectoryError):
        return f"Expected photos. Received: {path!r}, a folder without photos"
    return str(error) or type(error).__name__


def _is_tag(variant: str, weights: str) -> bool:
    """Returns whether weights are published ones, or random. A folder may have the same name."""
    if os.path.isfile(weights):
        return False
    try:
        return weights == "None" or bool(registry.find(variant, weights))
    except ValueError:
        return False


def _content(place: str) -> str:
    """Returns a hash of a file and of what belongs to it, of a folder, or of a checkpoint."""
    path = Path(place)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    elif path.is_file():
        files = [path, *path.parent.glob(f"{glob.escape(path.stem)}.bin")]  # OpenVINO's weights
    else:
        files = list(path.parent.glob(f"{glob.escape(path.name)}.*"))
    digests = [registry.digest(str(file), "sha256") for file in sorted(set(files))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12] if digests else ""

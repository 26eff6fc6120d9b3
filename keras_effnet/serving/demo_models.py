"""The models of `keras-effnet demo`: what they answer about a photo, for the page."""

import hashlib
import threading
import time
from collections.abc import Collection
from statistics import median
from typing import Any

import numpy as np

from keras_effnet import model_metadata
from keras_effnet.class_names import names_of
from keras_effnet.errors import one_line
from keras_effnet.images.decoding import image_shape
from keras_effnet.images.resizing import crop_window
from keras_effnet.inference import runtimes
from keras_effnet.inference.classifier import Classifier
from keras_effnet.inference.predictor import Predictor

RUNS, SECONDS = 5, 0.25  # a photo is predicted until one of them is reached, since a single time varies
MOST_PIXELS = 100_000_000  # of a photo; decoded, it takes 300 MB


def named(reference: str) -> tuple[str, str]:
    """Splits a model's reference from its precision.

    Args:
        reference: String: what `Predictor` takes, perhaps with a precision, as in `"b0@int8"`.

    Returns:
        Tuple of the model and its precision.

    Example:

    >>> named("b0@int8"), named("runs/me@home")
    (('b0', 'int8'), ('runs/me@home', 'float32'))
    """
    model, _, precision = reference.rpartition("@")
    return (model, precision) if model and precision in runtimes.PRECISIONS else (reference, "float32")


class DemoModel:
    """A model of the page. It answers one photo at a time, so that its times are its own.

    Args:
        reference: See `named()`.

    Attributes:
        name: String, the reference.
        map_note: String that says why there are no maps, or None.

    Raises:
        ImportError: See `Predictor`.
        OSError: See `Predictor`.
        ValueError: See `Predictor`.
    """

    def __init__(self, reference: str):
        self.name = reference
        model, precision = named(reference)
        self._classifier = Classifier(model, precision=precision)
        self._load = self._classifier.predictor.image_loader(max_pixels=MOST_PIXELS)
        self._lock = threading.Lock()
        self.map_note: str | None = None
        self._explainer: Predictor | None = None
        self._is_timed_with_map = bool(self._classifier.predictor.metadata.get("maps"))
        if self._is_timed_with_map:  # a file that always computes them
            self._explainer = self._classifier.predictor
        else:
            try:  # another predictor, so that the time is the model's without its maps
                self._explainer = Classifier(model, precision=precision, maps=True).predictor
            except ValueError as error:
                self.map_note = one_line(error)
        # A runtime prepares itself at the first image. A model that is no classifier is told now.
        outputs = self._answer(np.zeros(self._classifier.predictor.input_shape, "uint8"))
        self._classifier.ranked(outputs)
        self._outputs = outputs.size

    def facts(self) -> dict[str, Any]:
        """Returns what the page tells about the model.

        Returns:
            Dict for JSON. Two models with the same `classes` have the same classes.
        """
        predictor = self._classifier.predictor
        shape = predictor.input_shape
        names, note = names_of(predictor.metadata, self._outputs)
        return {
            "name": self.name,
            "size": list(shape[:2] if shape[-1] <= 4 else shape[1:]),
            "precision": predictor.precision,
            "runtime": predictor.runtime,
            "classes": hashlib.sha256("\n".join(names).encode()).hexdigest()[:12],
            "note": note,
            "map_note": self.map_note,
            "timed_with_map": self._is_timed_with_map,
        }

    def classify(self, photo: bytes, also: Collection[int] = ()) -> dict[str, Any]:
        """Classifies a photo.

        Args:
            photo: The bytes of an image file.
            also: Numbers of classes to return too.

        Returns:
            Dict for JSON: `predictions`, a list of the five most likely classes and those of `also`, each with its
            `rank` and, where the model has maps, its `map`; `milliseconds` to `decode` and to `predict`, the median of
            some `runs`; the height and width of the `photo`; and its `crop`, which the model sees.

        Raises:
            ValueError: If the photo is not an image, is damaged or too large.
        """
        height, width = image_shape(photo)
        with self._lock:
            start = time.perf_counter()
            pixels = self._load(photo)
            decode = time.perf_counter() - start
            outputs, times = self._timed(pixels)
            maps = self._maps(pixels)
        rows = self._rows(outputs, also)
        if maps is not None:
            for row in rows:
                row["map"] = maps[..., row["class_id"]].astype("float64").round(4).tolist()
        return {
            "predictions": rows,
            "milliseconds": {"decode": 1e3 * decode, "predict": 1e3 * median(times), "runs": len(times)},
            "photo": {"height": height, "width": width},
            "crop": self._crop((height, width)),
        }

    def _rows(self, outputs: np.ndarray, also: Collection[int]) -> list[dict[str, Any]]:
        """Returns the five most likely classes and those of `also`, in the order of their ranks."""
        order = np.argsort(-outputs, kind="stable")
        rank = {int(number): place for place, number in enumerate(order, 1)}
        numbers = [number for number in rank if rank[number] <= self._classifier.top or number in also]
        return [row | {"rank": rank[row["class_id"]]} for row in self._classifier.ranked(outputs, class_ids=numbers)]

    def _answer(self, pixels: np.ndarray) -> Any:
        outputs = self._classifier.predictor(pixels)
        return outputs[0] if isinstance(outputs, np.ndarray) else outputs

    def _timed(self, pixels: np.ndarray) -> tuple[np.ndarray, list[float]]:
        times: list[float] = []
        while True:
            start = time.perf_counter()
            outputs = self._answer(pixels)
            times.append(time.perf_counter() - start)
            if len(times) == RUNS or sum(times) > SECONDS:
                return outputs, times

    def _maps(self, pixels: np.ndarray) -> np.ndarray | None:
        return None if self._explainer is None else self._explainer.explain(pixels).maps[0]

    def _crop(self, shape: tuple[int, int]) -> dict[str, int]:
        """Returns the part of a photo that the model sees, in pixels."""
        expects = model_metadata.expects_in(self._classifier.predictor.metadata) or model_metadata.Expects()
        window = crop_window(shape, tuple(self.facts()["size"]), expects.crop_padding, expects.crop_mode)
        return dict(zip(("top", "left", "height", "width"), window, strict=True))

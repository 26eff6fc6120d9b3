"""Runs a classifier over examples and scores it: top-1, top-5, precision and recall per class, confusions."""

import heapq
import io
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_effnet import class_names
from keras_effnet.tpu.input.example_readers import Items, Records

TOP = 5
CONFUSIONS = 10


@dataclass(frozen=True)
class Mistake:
    """A misclassified example.

    Args:
        place: Integer, index of the example.
        pixels: uint8 array (height, width, channels), the model's input.
        map: float32 array (rows, columns), the places that support the predicted class, see `keras_effnet.explain()`.
            None if the model's head has no such map.
    """

    place: int
    pixels: np.ndarray
    map: np.ndarray | None = None


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class.

    Args:
        number: Integer, the class.
        support: Integer, number of its examples.
        precision: Float, share of correct ones among the examples predicted as this class. None if there are none.
        recall: Float, share of its examples that are predicted as this class: its top-1.
        f1: Float, harmonic mean of precision and recall.
    """

    number: int
    support: int
    precision: float | None
    recall: float
    f1: float


@dataclass(frozen=True)
class Scores:
    """A model's predictions for all examples.

    Args:
        names: List of strings, names of the examples.
        labels: int32 array (examples,), the model's class number of each label.
        classes: int32 array (examples, 5 or fewer), the most probable classes first.
        probabilities: float32 array of the same shape.
        skipped: List of strings, names of the unreadable examples.
        mistakes: List of `Mistake`, the most confident first.
    """

    names: list[str]
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    skipped: list[str]
    mistakes: list[Mistake]

    @property
    def hits(self) -> np.ndarray:
        """Boolean array (examples,), whether the most probable class is correct."""
        return self.classes[:, 0] == self.labels

    @property
    def top1(self) -> float:
        """Share of examples whose most probable class is correct."""
        return float(self.hits.mean())

    @property
    def top5(self) -> float:
        """Share of examples whose true class is among the five most probable."""
        return float((self.classes == self.labels[:, None]).any(1).mean())

    def matrix(self) -> tuple[list[int], np.ndarray]:
        """Returns the classes that occur, and counts of examples: a row per label, a column per predicted class."""
        said = self.classes[:, 0]
        present, places = np.unique(np.concatenate([self.labels, said]), return_inverse=True)
        counts = np.zeros((len(present), len(present)), int)
        np.add.at(counts, tuple(np.split(places, 2)), 1)
        return present.tolist(), counts

    def per_class(self) -> list[ClassScores]:
        """Returns the scores of each class that has examples."""
        present, counts = self.matrix()
        rows = zip(present, counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist(), strict=True)
        return [
            ClassScores(label, support, hits / said if said else None, hits / support, 2 * hits / (support + said))
            for label, hits, support, said in rows
            if support
        ]

    def confusions(self, count: int = CONFUSIONS) -> list[tuple[int, int, int]]:
        """Returns the most frequent mistakes: true class, predicted class, count."""
        wrong = np.flatnonzero(~self.hits)
        pairs = Counter((int(self.labels[place]), int(self.classes[place, 0])) for place in wrong)
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        return [(true, said, often) for (true, said), often in ordered[:count]]


def score(
    net: keras.Model,
    rows: tf.data.Dataset,
    examples: Items | Records,
    read: Callable[[bytes], np.ndarray],
    numbers: np.ndarray,
    *,
    batch_size: int = 32,
    keep: int = 0,
    on_progress: Callable[[int], Any] = lambda done: None,
) -> Scores:
    """Runs a model over examples. Only a few batches of pixels are in memory at a time.

    Args:
        net: A `keras.Model` that returns probabilities or logits.
        rows: `tf.data.Dataset` of `examples.evaluate()` or `examples.sample()`.
        examples: `Items` or `Records`.
        read: Function from an image's bytes to pixels.
        numbers: Integers (the data's classes,), the model's class number of each class of the data.
        batch_size: Integer. Defaults to 32.
        keep: Integer, number of most confident mistakes whose pixels are kept. Defaults to 0.
        on_progress: Function of an integer, the number of examples done.

    Returns:
        `Scores`.

    Raises:
        ValueError: If a label is not among the classes, the storage does not respond, or a prediction is not finite.
    """
    tally, done = _Tally(net, numbers, keep), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ready = _decoded(pool, rows, examples, read, ahead=2 * batch_size)
        for batch in iter(lambda: list(itertools.islice(ready, batch_size)), []):
            tally.skipped += [name for name, _, pixels in batch if pixels is None]
            whole = [(name, label, pixels) for name, label, pixels in batch if pixels is not None]
            done += len(batch)
            if whole:
                _check_labels(whole, len(numbers))
                tally.add(whole, _predict(net, whole))
            on_progress(done)
    return tally.scores()


def png(pixels: np.ndarray) -> bytes:
    """Encodes an image as PNG.

    Args:
        pixels: uint8 array (height, width, channels).

    Returns:
        Bytes.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


class _Tally:
    """Collects predictions batch by batch, and the pixels of the most confident mistakes.

    Args:
        net: See `score()`.
        numbers: See `score()`.
        keep: See `score()`.
    """

    def __init__(self, net: keras.Model, numbers: np.ndarray, keep: int):
        self._net, self._numbers, self._keep = net, numbers, keep
        self._logits: bool | None = None
        self._names: list[str] = []
        self.skipped: list[str] = []
        self._labels: list[int] = []
        self._classes: list[np.ndarray] = []
        self._probabilities: list[np.ndarray] = []
        self._kept: list[tuple[float, int, np.ndarray]] = []

    def add(self, batch: list[tuple[str, int, np.ndarray]], outputs: np.ndarray) -> None:
        """Adds a batch of names, labels and pixels, with the model's outputs."""
        probabilities = class_names.probabilities(outputs, lambda: self._returns_logits(batch[0][2].shape))
        order = np.argsort(-outputs, axis=1, kind="stable")[:, :TOP].astype("int32")
        shares = np.take_along_axis(probabilities, order, 1)
        for (name, label, pixels), best, share in zip(batch, order, shares, strict=True):
            if self._keep and best[0] != self._numbers[label]:
                self._keep_mistake(float(share[0]), pixels)
            self._names.append(name)
            self._labels.append(int(self._numbers[label]))
        self._classes.append(order)
        self._probabilities.append(shares)

    def _returns_logits(self, shape: tuple[int, ...]) -> bool:
        if self._logits is None:
            self._logits = class_names.returns_logits(self._net.predict_on_batch, shape)
        return self._logits

    def _keep_mistake(self, share: float, pixels: np.ndarray) -> None:
        shown = np.clip(np.rint(pixels), 0, 255).astype("uint8")
        mistake = (share, -len(self._names), shown)
        (heapq.heappush if len(self._kept) < self._keep else heapq.heappushpop)(self._kept, mistake)

    def scores(self) -> Scores:
        classes, probabilities = self._classes, self._probabilities
        width = min(TOP, len(classes[0][0])) if classes else 0
        ranked = sorted(self._kept, reverse=True, key=lambda one: one[:2])
        return Scores(
            self._names,
            np.array(self._labels, "int32"),
            np.concatenate(classes) if classes else np.zeros((0, width), "int32"),
            np.concatenate(probabilities) if classes else np.zeros((0, width), "float32"),
            self.skipped,
            [Mistake(-place, pixels) for _, place, pixels in ranked],
        )


def _check_labels(batch: list[tuple[str, int, np.ndarray]], classes: int) -> None:
    for name, label, _ in batch:
        if not 0 <= label < classes:
            raise ValueError(
                f"Expected labels from 0 to {classes - 1} (see --first-label). Received: {label} for {name}"
            )


def _predict(net, batch: list[tuple[str, int, np.ndarray]]) -> np.ndarray:
    outputs = np.asarray(net.predict_on_batch(np.stack([pixels for *_, pixels in batch])), "float32")
    if not np.isfinite(outputs).all():
        raise ValueError(
            "Expected finite numbers from the model. Received: NaN or infinity in the batch that starts with "
            f"{batch[0][0]}"
        )
    return outputs


def _decoded(pool, rows, examples, read, ahead: int) -> Iterator[tuple[str, int, np.ndarray | None]]:
    """Yields the name, label and pixels of each example in order; None for the pixels of an unreadable one."""

    def one(row):
        name = row["name"].numpy().decode(errors="replace")
        try:
            content = examples.load(row["image"], python=False).numpy()
        except tf.errors.OpError as error:  # the storage failed: the photo is not to blame
            raise ValueError(f"Could not read {name}: {error.message}") from error
        try:
            pixels = read(content if isinstance(content, bytes) else png(content))
        except (OSError, ValueError, MemoryError, tf.errors.OpError):
            pixels = None
        return name, int(row["label"]), pixels

    waiting: deque[Future] = deque()
    try:
        for row in rows:
            waiting.append(pool.submit(one, row))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except tf.errors.OpError as error:
        raise ValueError(f"Could not read all of the data: {error.message}") from error
    finally:
        for future in waiting:
            future.cancel()

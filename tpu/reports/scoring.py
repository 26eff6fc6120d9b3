"""Runs a classifier over examples and scores it: top-1, top-5, precision and recall per class, confusions."""

import functools
import heapq
import io
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_effnet import class_names
from keras_effnet.inference import photo_stream
from keras_effnet.inference.predictor import Predictor
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
    net: keras.Model | Predictor,
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
        net: A `keras.Model` or a `Predictor` that returns probabilities or logits.
        rows: `tf.data.Dataset` of `examples.evaluate()` or `examples.sample()`.
        examples: `Items` or `Records`.
        read: Function from an image's bytes to pixels.
        numbers: Integers (the data's classes,), the model's class number of each class of the data.
        batch_size: Integer, examples that a `keras.Model` predicts at once. Defaults to 32.
        keep: Integer, number of most confident mistakes whose pixels are kept, of a `keras.Model`. Defaults to 0.
        on_progress: Function of an integer, the number of examples done.

    Returns:
        `Scores`.

    Raises:
        ValueError: If a label is not among the classes, the storage does not respond, or a prediction is not finite.
    """
    listed, load = _listed(rows), functools.partial(_load, examples, read)
    if isinstance(net, Predictor):
        found: Generator[_Predicted, None, None] = _streamed(net, listed, load)
        tally = _Tally(net, numbers, shape=net.input_shape)
    else:
        found = _batched(net, listed, load, batch_size)
        tally = _Tally(net.predict_on_batch, numbers, keep=keep)
    done = 0
    try:
        with closing(found):
            while some := list(itertools.islice(found, batch_size)):
                done += len(some)
                tally.skipped += [one.name for one in some if one.outputs is None]
                tally.add([one for one in some if one.outputs is not None])
                on_progress(done)
    except _StorageError as error:
        raise ValueError(str(error)) from error
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


class _Example(NamedTuple):
    """An example that is not read yet: its name, its label in the data, and what `examples.load()` reads."""

    name: str
    label: int
    image: tf.Tensor


class _Predicted(NamedTuple):
    """The name and label of an example, with the model's outputs: None if it cannot be read."""

    name: str
    label: int
    outputs: Any = None
    pixels: Any = None


class _Tally:
    """Collects predictions batch by batch, and the pixels of the most confident mistakes.

    Args:
        run: Function from a batch of images to the outputs.
        numbers: See `score()`.
        shape: Tuple of integers, the shape of an image. Defaults to None: that of the pixels.
        keep: See `score()`. Defaults to 0.
    """

    def __init__(self, run: Callable, numbers: np.ndarray, *, shape: tuple[int, ...] | None = None, keep: int = 0):
        self._run, self._numbers, self._shape, self._keep = run, numbers, shape, keep
        self._logits: bool | None = None
        self._names: list[str] = []
        self.skipped: list[str] = []
        self._labels: list[int] = []
        self._classes: list[np.ndarray] = []
        self._probabilities: list[np.ndarray] = []
        self._kept: list[tuple[float, int, np.ndarray]] = []

    def add(self, batch: list[_Predicted]) -> None:
        """Adds examples with their outputs."""
        if not batch:
            return
        self._check(batch)
        outputs = np.stack([one.outputs for one in batch]).astype("float32")
        probabilities = class_names.probabilities(outputs, lambda: self._returns_logits(batch))
        order = np.argsort(-outputs, axis=1, kind="stable")[:, :TOP].astype("int32")
        shares = np.take_along_axis(probabilities, order, 1)
        for example, best, share in zip(batch, order, shares, strict=True):
            label = int(self._numbers[example.label])
            if self._keep and best[0] != label:
                self._keep_mistake(float(share[0]), example.pixels)
            self._names.append(example.name)
            self._labels.append(label)
        self._classes.append(order)
        self._probabilities.append(shares)

    def _check(self, batch: list[_Predicted]) -> None:
        for name, label, outputs, _ in batch:
            if not 0 <= label < len(self._numbers):
                raise ValueError(
                    f"Expected labels from 0 to {len(self._numbers) - 1} (see --first-label). Received: {label} for "
                    f"{name}"
                )
            if not np.isfinite(outputs).all():
                raise ValueError(f"Expected finite numbers from the model. Received: NaN or infinity for {name}")

    def _returns_logits(self, batch: list[_Predicted]) -> bool:
        if self._logits is None:
            self._logits = class_names.returns_logits(self._run, self._shape or batch[0].pixels.shape)
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


def _listed(rows: tf.data.Dataset) -> Generator[_Example, None, None]:
    try:
        for row in rows:
            yield _Example(row["name"].numpy().decode(errors="replace"), int(row["label"]), row["image"])
    except tf.errors.OpError as error:
        raise ValueError(f"Could not read all of the data: {error.message}") from error


class _StorageError(Exception):
    """The storage failed: the photo is not to blame."""


def _load(examples: Items | Records, read: Callable[[bytes], np.ndarray], example: _Example) -> np.ndarray:
    """Returns the pixels of an example. Raises `ValueError` or `OSError` if it cannot be decoded."""
    try:
        content = examples.load(example.image, python=False).numpy()
    except (tf.errors.OpError, OSError, ValueError, MemoryError) as error:
        raise _StorageError(f"Could not read {example.name}: {getattr(error, 'message', error)}") from error
    try:
        return read(content if isinstance(content, bytes) else png(content))
    except tf.errors.OpError as error:
        raise ValueError(error.message) from error


def _streamed(net: Predictor, listed: Iterable[_Example], load: Callable) -> Generator[_Predicted, None, None]:
    """Decodes and predicts on all threads at once, as `Predictor.predict_files()` does. Keeps no pixels."""

    def rows(run: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], list[np.ndarray]]:
        return lambda images: [run(images)]

    few, run = rows(net), rows(net.on_one_thread)
    stream: Any = photo_stream.stream(listed, load, run, net.threads, net.batch, run_few=few)
    with closing(stream):
        for (name, label, _), outputs, error in stream:
            yield _Predicted(name, label) if error else _Predicted(name, label, *outputs)


def _batched(
    net: keras.Model, listed: Iterable[_Example], load: Callable, size: int
) -> Generator[_Predicted, None, None]:
    """Decodes in threads while the model predicts batches."""
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        closing(_decoded(pool, listed, load, ahead=2 * size)) as ready,
    ):
        while some := list(itertools.islice(ready, size)):
            images = [pixels for *_, pixels in some if pixels is not None]
            rows = iter(np.asarray(net.predict_on_batch(np.stack(images)), "float32") if images else ())
            for name, label, pixels in some:
                yield _Predicted(name, label) if pixels is None else _Predicted(name, label, next(rows), pixels)


def _decoded(
    pool: ThreadPoolExecutor, listed: Iterable[_Example], load: Callable, ahead: int
) -> Generator[tuple[str, int, np.ndarray | None], None, None]:
    """Yields names and labels in order, with the pixels; None for those of an unreadable example."""

    def one(example: _Example) -> tuple[str, int, np.ndarray | None]:
        try:
            return example.name, example.label, load(example)
        except (OSError, ValueError, MemoryError):  # as photo_stream skips it
            return example.name, example.label, None

    waiting: deque[Future] = deque()
    try:
        for example in listed:
            waiting.append(pool.submit(one, example))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()

"""What a model says about each example, and what follows: top-1, top-5, classes, confusions."""

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

from keras_effnet.tpu.input.examples import Items, Records

TOP = 5

CONFUSIONS = 10


@dataclass(frozen=True)
class Mistake:
    """An example that was taken for another class.

    Args:
        place: Integer, which of the examples.
        pixels: uint8 array (height, width, channels), what the model saw.
    """

    place: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Scores:
    """What a model said of each example.

    Args:
        names: List of the examples' names.
        labels: int32 array (examples,), class numbers of the model.
        classes: int32 array (examples, 5 or fewer), the most probable classes first.
        probabilities: float32 array of the same shape.
        skipped: List of the names of what could not be read.
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
        """Boolean array (examples,), whether the first class is the right one."""
        return self.classes[:, 0] == self.labels

    @property
    def top1(self) -> float:
        """Share of examples whose most probable class is the right one."""
        return float(self.hits.mean())

    @property
    def top5(self) -> float:
        """Share of examples whose class is among the five most probable."""
        return float((self.classes == self.labels[:, None]).any(1).mean())

    def per_class(self) -> list[tuple[int, int, float]]:
        """Class number, examples and top-1 of each class that there is an example of."""
        seen = [(int(label), self.hits[self.labels == label]) for label in np.unique(self.labels)]
        return [(label, len(hits), float(hits.mean())) for label, hits in seen]

    def confusions(self, count: int = CONFUSIONS) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: right class, predicted class, how often."""
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
    """Asks a model about examples. A few batches of pixels are in memory at a time.

    Args:
        net: A `keras.Model` that gives probabilities or logits.
        rows: `tf.data.Dataset` of `examples.evaluate()` or `examples.sample()`.
        examples: `Items` or `Records`.
        read: Function from an image's bytes to pixels.
        numbers: Integers (the data's classes,), the model's class of each.
        batch_size: Integer. Defaults to 32.
        keep: Integer, the most confident mistakes whose pixels are kept. Defaults to 0.
        on_progress: Function that is called with the number of examples that are done.

    Returns:
        `Scores`.

    Raises:
        ValueError: If a label is not among the classes, the storage does not answer, or the model gives no numbers.
    """
    names: list[str] = []
    labels, classes, probabilities, skipped = [], [], [], []
    kept: list[tuple[float, int, np.ndarray]] = []
    activate: Callable | None = None
    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ready = _decoded(pool, rows, examples, read, ahead=2 * batch_size)
        for batch in iter(lambda: list(itertools.islice(ready, batch_size)), []):
            skipped += [name for name, _, pixels in batch if pixels is None]
            whole = [(name, label, pixels) for name, label, pixels in batch if pixels is not None]
            done += len(batch)
            if whole:
                for name, label, _ in whole:
                    if not 0 <= label < len(numbers):
                        raise ValueError(
                            f"Expected labels from 0 to {len(numbers) - 1} (see --first-label). Received: {label}, of "
                            f"{name}"
                        )
                outputs = np.asarray(net.predict_on_batch(np.stack([pixels for *_, pixels in whole])), "float32")
                if not np.isfinite(outputs).all():
                    raise ValueError(
                        f"Expected finite numbers from the model. Received: others, of {whole[0][0]} or the next images"
                    )
                activate = activate or (_same if _are_probabilities(outputs) else _softmax)
                order = np.argsort(-outputs, axis=1, kind="stable")[:, :TOP].astype("int32")
                shares = np.take_along_axis(activate(outputs), order, 1)
                for (name, label, pixels), best, share in zip(whole, order, shares, strict=True):
                    if keep and best[0] != numbers[label]:
                        shown = np.clip(np.rint(pixels), 0, 255).astype("uint8")
                        place = (float(share[0]), -len(names), shown)
                        (heapq.heappush if len(kept) < keep else heapq.heappushpop)(kept, place)
                    names.append(name)
                    labels.append(int(numbers[label]))
                classes.append(order)
                probabilities.append(shares)
            on_progress(done)
    width = min(TOP, len(classes[0][0])) if classes else 0
    return Scores(
        names,
        np.array(labels, "int32"),
        np.concatenate(classes) if classes else np.zeros((0, width), "int32"),
        np.concatenate(probabilities) if classes else np.zeros((0, width), "float32"),
        skipped,
        [Mistake(-place, pixels) for _, place, pixels in sorted(kept, reverse=True, key=lambda one: one[:2])],
    )


def _same(outputs):
    return outputs


def _softmax(outputs):
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _are_probabilities(outputs) -> bool:
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-2))


def _decoded(pool, rows, examples, read, ahead: int) -> Iterator[tuple[str, int, np.ndarray | None]]:
    """Name, label and pixels of each example in their order; no pixels of what cannot be read."""

    def one(row):
        name = row["name"].numpy().decode(errors="replace")
        try:
            content = examples.load(row["image"]).numpy()
        except tf.errors.OpError as error:  # a storage that does not answer is no photograph's fault
            raise ValueError(f"Expected to read {name}. Received: {error.message}") from error
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
        raise ValueError(f"Expected to read all of the data. Received: {error.message}") from error
    finally:
        for future in waiting:
            future.cancel()


def png(pixels: np.ndarray) -> bytes:
    """A picture as the bytes of a file.

    Args:
        pixels: uint8 array (height, width, channels).

    Returns:
        Bytes.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()

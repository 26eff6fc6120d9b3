"""Computes the features of photos with a frozen body, once, and keeps them on disk."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_effnet import __version__, cache, files
from keras_effnet.tpu.config import Recipe
from keras_effnet.tpu.input.crops import eval_image, train_crop
from keras_effnet.tpu.input.example_readers import Items, Records
from keras_effnet.tpu.input.pipeline import changed, keys
from keras_effnet.tpu.input.skipped_examples import Skipped

CHUNK = 256  # photos per file: at most so many are lost when a run is killed

_FORMAT = 1  # increased when crops or files change, which invalidates all that is kept


@dataclass(frozen=True)
class Features:
    """The features of photos.

    Args:
        values: float32 array (photos, features).
        labels: int32 array (photos,), the classes.
        ordinals: int64 array (photos,), the photos' numbers in their data set. Unreadable photos are missing.
    """

    values: np.ndarray
    labels: np.ndarray
    ordinals: np.ndarray


@dataclass(frozen=True)
class View:
    """One view of all photos of a data set.

    Args:
        examples: `Items` or `Records`.
        count: Integer, number of photos.
        recipe: `Recipe`.
        size: Integer, side of an image in pixels.
        number: Integer. 0 for the center crop, as in evaluation. Others are random, as the recipe's `augment` says.
    """

    examples: Items | Records
    count: int
    recipe: Recipe
    size: int
    number: int = 0

    @tf.autograph.experimental.do_not_convert
    def images(self, chunks: Sequence[int], batch: int) -> tf.data.Dataset:
        """Returns batches of the ordinals, labels and float32 pixels of the readable photos in some chunks."""
        wanted = tf.constant(chunks, tf.int64)

        def read(example):
            image = tf.cast(self._image(self.examples.load(example["image"]), example["id"]), tf.float32)
            return example["ordinal"], example["label"], image

        rows = self.examples.evaluate(0, 1).filter(lambda one: tf.reduce_any(one["ordinal"] // CHUNK == wanted))
        rows = rows.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).ignore_errors()
        return rows.batch(batch).prefetch(tf.data.AUTOTUNE)

    def _image(self, content, number):
        data, how = self.recipe.data, self.recipe.augment
        if not self.number:
            return eval_image(content, self.size, data)
        cropping, changing, _ = keys(self.recipe.run.seed, tf.constant(self.number, tf.int64), number)
        return changed(train_crop(content, self.size, data, how, cropping), data, how, changing)

    def key(self, body: str) -> str:
        """Returns a hash of all that the features depend on.

        Args:
            body: String, hash of the body.

        Returns:
            String.
        """
        data = self.recipe.data
        told: list[Any] = [_FORMAT, __version__, body, self.size, data.interpolation, data.eval_crop, data.crop_mode]
        if self.number:
            told += [self.number, self.recipe.run.seed, data.transfer, dataclasses.asdict(self.recipe.augment)]
        hashed = hashlib.sha256(json.dumps(told).encode())
        hashed.update(_digest(self.examples, data.first_label))
        return hashed.hexdigest()[:32]


def _digest(examples: Items | Records, first_label: int) -> bytes:
    """Hashes the paths, sizes and times of files, or pixels; and the labels."""
    hashed = hashlib.sha256()
    if isinstance(examples, Records):
        for part in examples.parts:
            hashed.update(f"{_stat(part.path)} {part.skip} {part.count} {first_label}\n".encode())
        return hashed.digest()
    hashed.update(np.ascontiguousarray(examples.labels).tobytes())
    if examples.images.dtype == object:
        for path in examples.images:
            hashed.update(_stat(path).encode())
    else:
        hashed.update(np.ascontiguousarray(examples.images).tobytes())
    return hashed.digest()


def _stat(path: str) -> str:
    try:
        found: Any = tf.io.gfile.stat(path)
    except tf.errors.OpError:  # reported when it is read
        return f"{path}\n"
    return f"{path} {found.length} {found.mtime_nsec}\n"


def compute(
    view: View,
    body: str,
    predict: Callable[[np.ndarray], np.ndarray],
    skipped: Skipped,
    on_progress: Callable[[int], Any] = lambda done: None,
) -> Features:
    """Computes the features of a view, or reads those that are on disk.

    They are kept under `KERAS_EFFNET_HOME`, in a folder that is named after a hash of all that they depend on. A killed
    process leaves complete files, and the next one computes the rest.

    Args:
        view: `View`.
        body: String, hash of the body.
        predict: Function from a float32 batch of images to their features.
        skipped: `Skipped`, which records unreadable photos.
        on_progress: Function of an integer, the number of photos that are done since the last call.

    Returns:
        `Features`.

    Raises:
        OSError: If the disk is full.
        ValueError: If too many photos are unreadable, or the storage does not answer.
    """
    folder = cache.use("features", view.key(body), view.recipe.model.name)
    skipped.probe = view.examples.probe
    kept = {number: _read(folder.path, number) for number in range(-(-view.count // CHUNK))}
    missing = [number for number, chunk in kept.items() if chunk is None]
    for number, chunk in kept.items():
        if chunk is not None:
            _account(view, number, chunk, skipped)
            on_progress(min(CHUNK, view.count - number * CHUNK))
    for number, chunk in _computed(view, predict, missing) if missing else ():
        _account(view, number, chunk, skipped)  # first: a storage that fails must not leave a chunk without photos
        _write(folder.path, number, chunk)
        kept[number] = chunk
        on_progress(min(CHUNK, view.count - number * CHUNK))
    if missing:
        cache.trim()
    chunks = [chunk for _, chunk in sorted(kept.items()) if chunk is not None and len(chunk.ordinals)]
    if not chunks:
        raise ValueError(f"Expected readable photos. Received: none of {view.count} in {view.recipe.data.source!r}")
    return Features(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in _FIELDS))


_FIELDS = [field.name for field in dataclasses.fields(Features)]


def _computed(view: View, predict, missing: Sequence[int]) -> Iterator[tuple[int, Features]]:
    """Yields the missing chunks in order, those without a readable photo included."""

    def rows():
        for ordinals, labels, images in view.images(missing, view.recipe.batch_size or 32):
            yield from zip(ordinals.numpy(), labels.numpy(), predict(images.numpy()), strict=True)

    left = iter(missing)
    for number, group in itertools.groupby(rows(), key=lambda row: int(row[0]) // CHUNK):
        for empty in itertools.takewhile(lambda other, number=number: other != number, left):
            yield empty, _chunk([])
        yield number, _chunk(list(group))
    for empty in left:
        yield empty, _chunk([])


def _chunk(rows: Sequence[Any]) -> Features:
    ordinals, labels, values = zip(*rows, strict=True) if rows else ((), (), ())
    made = np.stack(values) if rows else np.zeros((0, 0), "float32")
    return Features(np.asarray(made, "float32"), np.array(labels, "int32"), np.array(ordinals, "int64"))


@tf.autograph.experimental.do_not_convert
def _account(view: View, number: int, chunk: Features, skipped: Skipped) -> None:
    """Records the photos of a chunk that could not be read."""
    first, end = number * CHUNK, min((number + 1) * CHUNK, view.count)
    lost = np.setdiff1d(np.arange(first, end), chunk.ordinals)
    if not len(lost):
        return
    rows = view.examples.evaluate(0, 1).filter(lambda one: tf.reduce_any(one["ordinal"] == tf.constant(lost)))
    for row in rows:
        skipped(row["ordinal"].numpy(), 1, [row["name"].numpy()])


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"


def _read(folder: Path, number: int) -> Features | None:
    path = _path(folder, number)
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file) as found:
            if cache.is_ours(path):
                return Features(*(found[name] for name in _FIELDS))  # zipfile compares their checksums
    except Exception:  # of a damaged file, NumPy and zipfile raise anything
        pass
    cache.tell_of_damage(path)
    return None


def _write(folder: Path, number: int, chunk: Features) -> None:
    path = _path(folder, number)
    with files.writing(path), files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{name: getattr(chunk, name) for name in _FIELDS})

"""Examples that a pipeline reads: files or pixels in any order, or records from files."""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

# Computes one element of a random permutation without building the permutation.
SHUFFLED: Any = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]


def _key(seed: int, epoch):
    return tf.stack([tf.constant(seed, tf.int64), epoch])


def viewed(encoded: bytes) -> bytes:
    """Returns the bytes of an image that TensorFlow decodes as a viewer shows it.

    Args:
        encoded: Bytes of an image file.

    Returns:
        The same bytes of a JPEG without rotation, in gray or RGB; else a BMP of what `decode_image()` returns. Empty
        for a file that it cannot read: TensorFlow then raises an error without a traceback of Python.
    """
    from PIL import Image

    from keras_effnet.images.decoding import decode_image

    if encoded.startswith(b"\xff\xd8"):
        with contextlib.suppress(Exception):  # decode_image() raises an error that says more
            image = Image.open(io.BytesIO(encoded), formats=["JPEG"])
            if image.mode in ("L", "RGB") and image.getexif().get(_ORIENTATION, 1) == 1:
                return encoded
    content = io.BytesIO()
    with contextlib.suppress(OSError, ValueError, MemoryError):
        Image.fromarray(decode_image(encoded)).save(content, "BMP")
    return content.getvalue()


_ORIENTATION = 0x0112  # EXIF 2.3, table 4


BLOCK = 256  # examples between two marks

_ENDLESS = np.iinfo(np.int64).max


def marked(examples: tf.data.Dataset, ordinal) -> tf.data.Dataset:
    """Appends a mark: a row without an example, which can always be read. At it, a reader notices what is missing.

    Args:
        examples: `tf.data.Dataset` of dicts.
        ordinal: Integer scalar, number of the example that is expected after the mark.

    Returns:
        `tf.data.Dataset` of the same dicts, with `mark`, which is True for the mark alone.
    """
    mark = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
    mark |= {"ordinal": tf.cast(ordinal, tf.int64), "mark": tf.constant(True)}
    return examples.map(lambda one: {**one, "mark": False}).concatenate(tf.data.Dataset.from_tensors(mark))


@dataclass(frozen=True)
class Items:
    """Examples that can be read in any order: files, or pixels in memory.

    Args:
        images: Array of paths, strings; or of pixels, uint8 (examples, height, width, 3).
        labels: Integer array (examples,).
    """

    images: np.ndarray
    labels: np.ndarray

    def count(self, host: int, hosts: int) -> int:
        """Returns the number of examples of one host in a training epoch, the same for all hosts."""
        return len(self.labels) // hosts

    @tf.autograph.experimental.do_not_convert
    def train(self, seed: int, start: int, host: int, hosts: int, batch: int, marks: bool = False) -> tf.data.Dataset:
        """Returns one host's examples from number `start` on, endlessly. Each epoch has its own order.

        The hosts' batches of `batch` images, interleaved, are the batches that a single host would read. With `marks`,
        a mark follows each `BLOCK` of examples, see `marked()`.
        """
        everything = len(self.labels)

        def example(ordinal):
            place = (ordinal // batch * hosts + host) * batch + ordinal % batch
            epoch = place // everything
            index = SHUFFLED(place % everything, _key(seed, epoch), everything - 1)
            return self._example(ordinal, epoch, index)

        def block(number):
            end = (number + 1) * BLOCK
            return marked(tf.data.Dataset.range(tf.maximum(number * BLOCK, start), end).map(example), end)

        if marks:
            return tf.data.Dataset.range(start // BLOCK, _ENDLESS).flat_map(block)
        return tf.data.Dataset.range(start, _ENDLESS).map(example)

    def evaluated(self, host: int, hosts: int) -> int:
        """Returns the number of examples of one host in an evaluation."""
        return len(range(host, len(self.labels), hosts))

    @tf.autograph.experimental.do_not_convert
    def evaluate(self, host: int, hosts: int) -> tf.data.Dataset:
        """Returns one host's examples, each once."""
        return self._once(tf.data.Dataset.range(host, len(self.labels), hosts))

    @tf.autograph.experimental.do_not_convert
    def sample(self, count: int) -> tf.data.Dataset:
        """Returns at most `count` examples, evenly spaced, because folders are sorted by class."""
        chosen = np.linspace(0, len(self.labels), min(count, len(self.labels)), endpoint=False)
        return self._once(tf.data.Dataset.from_tensor_slices(chosen.astype("int64")))

    def _once(self, indices: tf.data.Dataset) -> tf.data.Dataset:
        zero = tf.constant(0, tf.int64)
        return indices.enumerate().map(lambda ordinal, index: self._example(ordinal, zero, index))

    def _example(self, ordinal, epoch, index):
        image = tf.gather(self.images, index)
        name = image if image.dtype == tf.string else tf.strings.as_string(index)
        label = tf.gather(tf.constant(self.labels, tf.int32), index)
        return {"ordinal": ordinal, "epoch": epoch, "id": index, "name": name, "image": image, "label": label}

    def probe(self, name: str) -> None:
        """Reads an example's file and raises the storage's error if it cannot be reached."""
        if self.images.dtype == object:
            tf.io.read_file(name)

    def load(self, image, python: bool = True):
        """Returns the bytes of a file as a viewer shows it, or the pixels.

        A JPEG that needs no rotation and no conversion of its colors stays as it is. All others are decoded by
        `decode_image()`. `python` is False for a host that runs no Python: TensorFlow then decodes all files.
        """
        if image.dtype != tf.string:
            return image
        encoded = tf.io.read_file(image)
        return tf.ensure_shape(tf.numpy_function(viewed, [encoded], tf.string, False), []) if python else encoded


def _mixed(window, key) -> tf.data.Dataset:
    last = tf.size(window["label"], tf.int64) - 1
    order = SHUFFLED(tf.range(last + 1), key, last)
    return tf.data.Dataset.range(last + 1).map(
        lambda place: {name: tf.gather(values, order[place]) for name, values in window.items()}
    )


@dataclass(frozen=True)
class Part:
    """A range of records in a file.

    Args:
        path: String.
        skip: Integer, number of records before the range.
        count: Integer, number of records in the range.
    """

    path: str
    skip: int
    count: int


@dataclass(frozen=True)
class Records:
    """Examples in files of records, which are read in order and shuffled in a buffer.

    Args:
        parts: Sequence of `Part`. Each host reads its own.
        parse: Function of a record that returns the bytes of its image and its label, int32.
        buffer: Integer, number of records to shuffle at a time.
    """

    parts: Sequence[Part]
    parse: Callable
    buffer: int

    def _parts(self, host: int, hosts: int) -> list[Part]:
        if len(self.parts) < hosts:
            raise ValueError(
                f"Expected at least one file of records for each of {hosts} hosts. Received: {len(self.parts)} files"
            )
        return list(self.parts[host::hosts])

    def count(self, host: int, hosts: int) -> int:
        """Returns the number of examples of one host in a training epoch."""
        return sum(part.count for part in self._parts(host, hosts))

    @tf.autograph.experimental.do_not_convert
    def train(self, seed: int, start: int, host: int, hosts: int, batch: int, marks: bool = False) -> tf.data.Dataset:
        """Returns one host's examples from number `start` on, endlessly. Each epoch has its own order.

        With `marks`, a mark follows each epoch, see `marked()`.
        """
        del batch  # each host has its own files
        count, first = self.count(host, hosts), start // self.count(host, hosts)

        def one(epoch):
            key = _key(seed, epoch)
            last = tf.constant(len(self._parts(host, hosts)) - 1, tf.int64)
            order = tf.data.Dataset.range(last + 1).map(lambda place: SHUFFLED(place, key, last))
            examples = self._read(order, host, hosts)
            # Not Dataset.shuffle: it mixes the process' global seed into its own, and takes no tensor as a seed.
            windows: Any = examples.batch(self.buffer).enumerate()
            examples = windows.flat_map(lambda number, window: _mixed(window, tf.random.fold_in(key, number)))
            skip = tf.where(epoch == first, tf.constant(start - first * count, tf.int64), tf.constant(0, tf.int64))
            examples = examples.enumerate(epoch * count).skip(skip)
            examples = examples.map(lambda number, one: {**one, "ordinal": number, "epoch": epoch})
            return marked(examples, (epoch + 1) * count) if marks else examples

        return tf.data.Dataset.range(first, _ENDLESS).flat_map(one)

    def evaluated(self, host: int, hosts: int) -> int:
        """Returns the number of examples of one host in an evaluation."""
        return self.count(host, hosts)

    @tf.autograph.experimental.do_not_convert
    def evaluate(self, host: int, hosts: int) -> tf.data.Dataset:
        """Returns one host's examples, each once."""
        order = tf.data.Dataset.range(len(self._parts(host, hosts)))
        zero = tf.constant(0, tf.int64)
        return (
            self._read(order, host, hosts)
            .enumerate()
            .map(lambda ordinal, example: {**example, "ordinal": ordinal, "epoch": zero})
        )

    @tf.autograph.experimental.do_not_convert
    def sample(self, count: int) -> tf.data.Dataset:
        """Returns at most `count` examples, the first of each file."""
        return self.evaluate(0, 1).take(count)

    def _read(self, order: tf.data.Dataset, host: int, hosts: int) -> tf.data.Dataset:
        parts = self._parts(host, hosts)
        paths = tf.constant([part.path for part in parts])
        skips, counts = (np.array([getattr(part, name) for part in parts]) for name in ("skip", "count"))

        def records(place):
            path = tf.gather(paths, place)
            some = tf.data.TFRecordDataset(path, buffer_size=8 << 20)
            some = some.skip(tf.gather(skips, place)).take(tf.gather(counts, place))
            number = place * hosts + host  # among all hosts' files

            def example(index, record):
                image, label = self.parse(record)
                name = tf.strings.join([path, tf.strings.as_string(index)], ":")
                return {"id": number * 2**32 + index, "name": name, "image": image, "label": label}

            return some.enumerate(tf.cast(tf.gather(skips, place), tf.int64)).map(example)

        return order.interleave(
            records, cycle_length=min(len(parts), 16), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )

    def probe(self, name: str) -> None:
        """Reads from an example's file and raises the storage's error if it cannot be reached."""
        with tf.io.gfile.GFile(name.rpartition(":")[0], "rb") as file:
            file.read(1)

    def load(self, image, python: bool = True):
        """Returns the bytes of an image file."""
        return image

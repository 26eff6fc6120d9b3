"""Examples that a pipeline reads in any order: files, pixels in memory, or records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

# A permutation's value at an index, without the permutation.
SHUFFLED: Any = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]


def _key(seed: int, epoch):
    return tf.stack([tf.constant(seed, tf.int64), epoch])


@dataclass(frozen=True)
class Items:
    """Examples that are read in any order: files, or pixels in memory.

    Args:
        images: Array of paths, strings; or of pixels, uint8 (examples, height, width, 3).
        labels: Integers (examples,).
    """

    images: np.ndarray
    labels: np.ndarray

    def count(self, host: int, hosts: int) -> int:
        """Examples of one host in an epoch of training: the same for all hosts."""
        return len(self.labels) // hosts

    def train(self, seed: int, start: int, host: int, hosts: int, batch: int) -> tf.data.Dataset:
        """One host's examples without end, from number `start` on, each epoch in an order of its own.

        All hosts' batches, of `batch` images each, are one after the other what a single host's are.
        """
        everything = len(self.labels)

        def example(ordinal):
            place = (ordinal // batch * hosts + host) * batch + ordinal % batch
            epoch = place // everything
            index = SHUFFLED(place % everything, _key(seed, epoch), everything - 1)
            return self._example(ordinal, epoch, index)

        return tf.data.Dataset.range(start, np.iinfo(np.int64).max).map(example)

    def evaluated(self, host: int, hosts: int) -> int:
        """Examples of one host in an evaluation."""
        return len(range(host, len(self.labels), hosts))

    def evaluate(self, host: int, hosts: int) -> tf.data.Dataset:
        """One host's examples, once."""
        return self._once(tf.data.Dataset.range(host, len(self.labels), hosts))

    def sample(self, count: int) -> tf.data.Dataset:
        """So many examples, once, from all over: a folder's come class by class."""
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
        """Reads what an example is in, for the error that there is if it cannot be reached."""
        if self.images.dtype == object:
            tf.io.read_file(name)

    def load(self, image):
        """What is decoded: the bytes of a file, or pixels."""
        return tf.io.read_file(image) if image.dtype == tf.string else image


def _mixed(window, key) -> tf.data.Dataset:
    last = tf.size(window["label"], tf.int64) - 1
    order = SHUFFLED(tf.range(last + 1), key, last)
    return tf.data.Dataset.range(last + 1).map(
        lambda place: {name: tf.gather(values, order[place]) for name, values in window.items()}
    )


@dataclass(frozen=True)
class Part:
    """Some records of a file, from `skip` on."""

    path: str
    skip: int
    count: int


@dataclass(frozen=True)
class Records:
    """Examples in files of records, which are read from front to back and shuffled as they come.

    Args:
        parts: Sequence of `Part`. Each host reads its own.
        parse: Function of a record to the bytes of its image and its label, int32.
        buffer: Integer, records that are shuffled among.
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
        """Examples of one host in an epoch of training."""
        return sum(part.count for part in self._parts(host, hosts))

    def train(self, seed: int, start: int, host: int, hosts: int, batch: int) -> tf.data.Dataset:
        """One host's examples without end, from number `start` on, each epoch in an order of its own."""
        del batch  # each host has files of its own
        count, first = self.count(host, hosts), start // self.count(host, hosts)

        def one(epoch):
            key = _key(seed, epoch)
            last = tf.constant(len(self._parts(host, hosts)) - 1, tf.int64)
            order = tf.data.Dataset.range(last + 1).map(lambda place: SHUFFLED(place, key, last))
            examples = self._read(order, host, hosts)
            # Dataset.shuffle takes the process' global seed into its own, and none that is a tensor.
            windows: Any = examples.batch(self.buffer).enumerate()
            examples = windows.flat_map(lambda number, window: _mixed(window, tf.random.fold_in(key, number)))
            skip = tf.where(epoch == first, tf.constant(start - first * count, tf.int64), tf.constant(0, tf.int64))
            return examples.enumerate(epoch * count).skip(skip).map(lambda n, x: {**x, "ordinal": n, "epoch": epoch})

        return tf.data.Dataset.range(first, np.iinfo(np.int64).max).flat_map(one)

    def evaluated(self, host: int, hosts: int) -> int:
        """Examples of one host in an evaluation."""
        return self.count(host, hosts)

    def evaluate(self, host: int, hosts: int) -> tf.data.Dataset:
        """One host's examples, once."""
        order = tf.data.Dataset.range(len(self._parts(host, hosts)))
        zero = tf.constant(0, tf.int64)
        return (
            self._read(order, host, hosts)
            .enumerate()
            .map(lambda ordinal, example: {**example, "ordinal": ordinal, "epoch": zero})
        )

    def sample(self, count: int) -> tf.data.Dataset:
        """So many examples, once: the first of each file."""
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
        """Reads what an example is in, for the error that there is if it cannot be reached."""
        with tf.io.gfile.GFile(name.rpartition(":")[0], "rb") as file:
            file.read(1)

    def load(self, image):
        """What is decoded: the bytes of a file."""
        return image

"""Where examples come from: folders, the original's TFRecords, TensorFlow datasets, scikit-learn's digits."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_effnet.pruner import labelled
from keras_effnet.tpu import files
from keras_effnet.tpu.config import Data

# A permutation's value at an index, without the permutation.
SHUFFLED: Any = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]
EVALUATED = ("validation", "val", "test")  # names of splits


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
        whole = tf.data.Dataset.range(host, len(self.labels), hosts)
        zero = tf.constant(0, tf.int64)
        return whole.enumerate().map(lambda ordinal, index: self._example(ordinal, zero, index))

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


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        train: `Items` or `Records` to train on.
        evaluate: `Items` or `Records` to evaluate on.
        train_count: Integer, examples to train on, on all hosts.
        eval_count: Integer, examples to evaluate on, on all hosts.
        classes: Integer.
        labels: List of the classes' names, empty where nothing says.
    """

    train: Items | Records
    evaluate: Items | Records
    train_count: int
    eval_count: int
    classes: int
    labels: Sequence[str] = ()


def open_source(data: Data, cache: str | None = None) -> Source:
    """Finds out what `data.source` is, and what is in it.

    Args:
        data: `Data`.
        cache: Path of a file where the numbers of records are kept, which take a reading of all files to count.
            Defaults to None.

    Returns:
        A `Source`.

    Raises:
        ValueError: If there is nothing of the kind.

    Example:

    >>> from keras_effnet.tpu.config import Data
    >>> from keras_effnet.tpu.sources import open_source
    >>> found = open_source(Data(source="digits"))
    >>> found.train_count, found.eval_count, found.classes
    (1437, 360, 10)
    """
    if data.source == "digits":
        _only(data, "the digits")
        return _digits()
    if tf.io.gfile.isdir(data.source):
        if any(not tf.io.gfile.isdir(path) for path in tf.io.gfile.glob(f"{data.source}/train-*")):
            _only(data, "TFRecords", "holdout_shards")
            return _tfrecords(data, cache)
        _only(data, "a folder of photographs")
        return _folder(data)
    if any(mark in data.source for mark in ("://", "\\")) or data.source.startswith((".", "/", "~")):
        raise ValueError(f"Expected a folder, digits, or the name of a TensorFlow dataset. Received: {data.source!r}")
    _only(data, "a TensorFlow dataset", "data_dir", "train_split", "eval_split")
    return _tensorflow_dataset(data)


def _only(data: Data, kind: str, *fields: str) -> None:
    """A field that would do nothing is a mistake."""
    for name in ("holdout_shards", "data_dir", "train_split", "eval_split"):
        if getattr(data, name) and name not in fields:
            raise ValueError(f"Expected no data.{name} for {kind}. Received: {getattr(data, name)!r}")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.repeat((digits.images * (255 / 16)).astype("uint8")[..., None], 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(pixels))
    parts = [Items(pixels[which], digits.target[which].astype("int32")) for which in (order[360:], order[:360])]
    return Source(parts[0], parts[1], len(order) - 360, 360, 10, [str(digit) for digit in range(10)])


def _folder(data: Data) -> Source:
    root = data.source.rstrip("/")

    def names(place: str) -> list[str]:
        return sorted(name for name in tf.io.gfile.listdir(place) if not name.startswith("."))

    def folders(place: str) -> list[str]:
        return [name.rstrip("/") for name in names(place) if tf.io.gfile.isdir(f"{place}/{name}")]

    def files(place: str) -> list[str]:
        # Whatever its name ends in: what is no photograph is named and counted as it is read.
        return [f"{place}/{name}" for name in names(place) if not name.endswith("/")]

    labels, *pairs = labelled(root, folders, files)
    train, test = (
        Items(np.array([file for file, _ in part], dtype=object), np.array([label for _, label in part], "int32"))
        for part in pairs
    )
    return Source(train, test, len(train.labels), len(test.labels), data.classes or len(labels), labels)


def _tfrecords(data: Data, cache: str | None) -> Source:
    """The layout of tensorflow/tpu tools/datasets/imagenet_to_gcs.py; hold-out as imagenet_input.py:388-406."""
    train = sorted(tf.io.gfile.glob(f"{data.source}/train-*"))
    test = sorted(tf.io.gfile.glob(f"{data.source}/validation-*"))
    if data.holdout_shards:
        train, test = train[data.holdout_shards :], train[: data.holdout_shards]
    if not train or not test:
        raise ValueError(
            f"Expected files train-* and validation-*, or fewer data.holdout_shards than files. Received: {len(train)} "
            f"files to train on and {len(test)} to evaluate on in {data.source!r}"
        )
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(record):
        row = tf.io.parse_single_example(record, features)
        return row["image/encoded"], tf.cast(row["image/class/label"], tf.int32) - data.first_label

    counts = _count([*train, *test], cache)
    parts = [[Part(path, 0, counts[path]) for path in paths] for paths in (train, test)]
    sums = [sum(part.count for part in some) for some in parts]
    sources = [Records(some, parse, data.shuffle_buffer) for some in parts]
    return Source(sources[0], sources[1], sums[0], sums[1], data.classes or 1000)


def _count(paths: Sequence[str], cache: str | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    if cache and tf.io.gfile.exists(cache):
        counts = json.loads(tf.io.gfile.GFile(cache).read())
    todo = [path for path in paths if path not in counts]
    if todo:
        zero, one = np.int64(0), np.int64(1)
        numbers = tf.data.Dataset.from_tensor_slices(todo).map(
            lambda path: tf.data.TFRecordDataset(path, buffer_size=8 << 20).reduce(zero, lambda n, _: n + one),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        try:
            counts |= {path: int(number) for path, number in zip(todo, numbers, strict=True)}
        except tf.errors.OpError as error:
            raise ValueError(f"Expected whole files of records. Received: {error.message}") from error
        if cache:
            files.write(cache, json.dumps(counts))
    return counts


def _tensorflow_dataset(data: Data) -> Source:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(data.source, data_dir=data.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(data.source, ["digits", *tfds.list_builders()], n=3)
        raise ValueError(
            f"Expected --data as a folder, as digits, or as the name of a TensorFlow dataset{' such as ' * bool(near)}"
            f"{', '.join(near)}. Received: {data.source!r}"
        ) from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a data set's own code raises
        raise ValueError(
            f"Expected a TensorFlow dataset that is prepared in data.data_dir, or that can be. Received: "
            f"{data.source!r}, and {type(error).__name__}: {error}"
        ) from error
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(
            f"Expected a TensorFlow dataset in the format tfrecord. Received: {builder.info.file_format.value}. "
            "Prepare it with file_format='tfrecord'"
        )
    features = builder.info.features
    image = next((name for name, kind in features.items() if isinstance(kind, tfds.features.Image)), None)
    label = next((name for name, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"Expected a data set of images with a class. Received: {data.source!r} with {list(features)}")

    def parse(record):
        row = features.deserialize_example(record, decoders={image: tfds.decode.SkipDecoding()})
        return row[image], tf.cast(row[label], tf.int32)

    splits = builder.info.splits
    test = data.eval_split or next((name for name in EVALUATED if name in splits), None)
    if test is None:
        raise ValueError(f"Expected data.eval_split, such as train[90%:]. Received: none, and {list(splits)}")
    parts = []
    for split in (data.train_split or "train", test):
        try:
            steps = splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(f"Expected a split made of {list(splits)}. Received: {split!r}") from error
        parts.append([Part(str(step.filename), step.skip, step.take) for step in steps])
    sums = [sum(part.count for part in some) for some in parts]
    sources = [Records(some, parse, data.shuffle_buffer) for some in parts]
    names = features[label].names or ()
    return Source(sources[0], sources[1], sums[0], sums[1], features[label].num_classes, names)

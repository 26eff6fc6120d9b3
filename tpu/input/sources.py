"""Opens data sets: image folders, the original's TFRecords, TensorFlow datasets, scikit-learn's digits."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_effnet.errors import FEW, few
from keras_effnet.images import folders
from keras_effnet.tpu.config import Data
from keras_effnet.tpu.input.example_readers import Items, Part, Records
from keras_effnet.tpu.resume import cloud_files

EVALUATED = ("validation", "val", "test")  # names of splits


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        train: `Items` or `Records` to train on.
        evaluate: `Items` or `Records` to evaluate on.
        train_count: Integer, number of training examples on all hosts.
        eval_count: Integer, number of evaluation examples on all hosts.
        classes: Integer, number of classes.
        labels: List of class names, empty if unknown.
        notes: List of sentences for the user, such as the classes that have no photos.
    """

    train: Items | Records
    evaluate: Items | Records
    train_count: int
    eval_count: int
    classes: int
    labels: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluated:
    """The part of a data set that a model is evaluated on.

    Args:
        examples: `Items` or `Records`.
        count: Integer, number of examples.
        classes: Integer, number of classes, or None if unknown.
        labels: List of class names, empty if unknown.
    """

    examples: Items | Records
    count: int
    classes: int | None
    labels: Sequence[str] = ()


def open_source(data: Data, cache: str | None = None) -> Source:
    """Opens the data set that `data.source` names.

    Args:
        data: `Data`.
        cache: Path of a JSON file that caches the number of records per file. Counting them reads every file.
            Defaults to None.

    Returns:
        A `Source`.

    Raises:
        ValueError: If there is no such data set, or it cannot be read.

    Example:

    >>> from keras_effnet.tpu.config import Data
    >>> from keras_effnet.tpu.input.sources import open_source
    >>> found = open_source(Data(source="digits"))
    >>> found.train_count, found.eval_count, found.classes
    (1437, 360, 10)
    """
    kind = _kind(data, "train")
    if kind == "digits":
        _only(data, "the digits")
        return _digits()
    if kind == "records":
        _only(data, "TFRecords", "holdout_shards")
        return _tfrecords(data, cache)
    if kind == "folder":
        _only(data, "a folder of photos", "eval_share")
        return _folder(data)
    _only(data, "a TensorFlow dataset", "data_dir", "train_split", "eval_split")
    return _tensorflow_dataset(data)


def open_evaluation(data: Data) -> Evaluated:
    """Opens only the part of a data set to evaluate on. The data set may lack a training part.

    Args:
        data: `Data`. Its `eval_split` is a split of a TensorFlow dataset, the prefix of TFRecord file names (by default
            `validation`), or the name of a subfolder. By default, the subfolder `val`, `validation` or `test` is used,
            or the whole folder if it has none of them.

    Returns:
        An `Evaluated`.

    Raises:
        ValueError: If there is no such data set, or it cannot be read.

    Example:

    >>> from keras_effnet.tpu.config import Data
    >>> from keras_effnet.tpu.input.sources import open_evaluation
    >>> open_evaluation(Data(source="digits")).count
    360
    """
    kind = _kind(data, data.eval_split or "validation", "train")
    if kind == "digits":
        _only(data, "the digits")
        whole = _digits()
        return Evaluated(whole.evaluate, whole.eval_count, whole.classes, whole.labels)
    if kind == "records":
        _only(data, "TFRecords", "holdout_shards", "eval_split")
        paths = sorted(tf.io.gfile.glob(f"{data.source}/{data.eval_split or 'validation'}-*"))
        if data.holdout_shards:
            paths = sorted(tf.io.gfile.glob(f"{data.source}/train-*"))[: data.holdout_shards]
        if not paths:
            raise ValueError(
                f"Expected files {data.eval_split or 'validation'}-*, or another data.eval_split. Received: none in "
                f"{data.source!r}"
            )
        return Evaluated(*_records(data, paths, _count(paths, None)), data.classes)
    if kind == "folder":
        _only(data, "a folder of photos", "eval_split")
        return _evaluated_folder(data)
    _only(data, "a TensorFlow dataset", "data_dir", "eval_split")
    dataset = _prepared(data)
    return Evaluated(*dataset.records(data, dataset.test(data)), dataset.classes, dataset.labels)


def _kind(data: Data, *parts: str) -> str:
    """Returns "digits", "records", "folder" or "dataset". Files whose names begin with one of `parts` are records."""
    if data.source == "digits":
        return "digits"
    if data.source.endswith(".csv"):
        return "folder"
    if tf.io.gfile.isdir(data.source):
        found = (path for part in parts for path in tf.io.gfile.glob(f"{data.source}/{part}-*"))
        return "records" if any(not tf.io.gfile.isdir(path) for path in found) else "folder"
    if any(mark in data.source for mark in ("://", "\\")) or data.source.startswith((".", "/", "~")):
        raise ValueError(
            f"Expected a folder, a CSV file, digits, or the name of a TensorFlow dataset. Received: {data.source!r}"
        )
    return "dataset"


def _only(data: Data, kind: str, *fields: str) -> None:
    """Raises if a field is set that has no effect on this kind of source."""
    for name in ("holdout_shards", "data_dir", "train_split", "eval_split", "eval_share"):
        if getattr(data, name) != getattr(Data(), name) and name not in fields:
            raise ValueError(f"Expected no data.{name} for {kind}. Received: {getattr(data, name)!r}")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.repeat((digits.images * (255 / 16)).astype("uint8")[..., None], 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(pixels))
    parts = [Items(pixels[which], digits.target[which].astype("int32")) for which in (order[360:], order[:360])]
    return Source(parts[0], parts[1], len(order) - 360, 360, 10, [str(digit) for digit in range(10)])


def _read(path: str) -> bytes:
    try:
        return tf.io.gfile.GFile(path, "rb").read()
    except tf.errors.OpError as error:
        raise OSError(error.message) from error


# Also on Cloud Storage.
FILES = folders.Files(tf.io.gfile.listdir, tf.io.gfile.isdir, _read)


def _items(pairs: Sequence[tuple[str, int]]) -> Items:
    return Items(np.array([file for file, _ in pairs], dtype=object), np.array([label for _, label in pairs], "int32"))


def _folder(data: Data) -> Source:
    found = folders.labelled(data.source, data.eval_share, FILES)
    train, test = map(_items, (found.train, found.test))
    classes = data.classes or len(found.labels)
    return Source(train, test, len(train.labels), len(test.labels), classes, found.labels, found.notes)


def _evaluated_folder(data: Data) -> Evaluated:
    root = data.source.rstrip("/")
    parts = folders.splits_of(root, FILES)
    named = [] if root.endswith(".csv") else FILES.folders(root)
    if data.eval_split and data.eval_split not in (*parts, *named):
        raise ValueError(f"Expected a split made of {few(parts or named)}. Received: {data.eval_split!r}")
    # A class may be called "test". Then it contains no folders.
    split = data.eval_split or next((name for name in folders.VALIDATION if name in parts), None)
    found = {name: some for name, some in folders.classes_of(root, split, FILES).items() if some}
    # Number the classes as training on this folder does.
    numbered = folders.classes_of(root, "train", FILES) if split and "train" in parts else found
    labels = sorted(name for name, some in numbered.items() if some)
    pairs = [(file, labels.index(name)) for name, some in sorted(found.items()) if name in labels for file in some]
    strange = [name for name in found if name not in labels]
    if not pairs or strange:
        trained = f"{few(labels)} to train on, and " if strange else ""
        place = f"{root}/{split}" if split else root
        # Of many, those that are not in train come first.
        names = sorted(found, key=lambda name: (len(found) > FEW and name in labels, name))
        raise ValueError(
            f"Expected a folder of photos per class. Received: {place!r} with {trained}{few(names) or 'none'}"
        )
    examples = _items(pairs)
    return Evaluated(examples, len(examples.labels), data.classes or len(labels), labels)


def _tfrecords(data: Data, cache: str | None) -> Source:
    """Opens files in the layout of tensorflow/tpu tools/datasets/imagenet_to_gcs.py."""
    train = sorted(tf.io.gfile.glob(f"{data.source}/train-*"))
    test = sorted(tf.io.gfile.glob(f"{data.source}/validation-*"))
    if data.holdout_shards:  # as imagenet_input.py:388-406
        train, test = train[data.holdout_shards :], train[: data.holdout_shards]
    if not train or not test:
        raise ValueError(
            f"Expected files train-* and validation-*, or fewer data.holdout_shards than files. Received: {len(train)} "
            f"files to train on and {len(test)} to evaluate on in {data.source!r}"
        )
    counts = _count([*train, *test], cache)
    (trained, train_count), (tested, test_count) = (_records(data, paths, counts) for paths in (train, test))
    return Source(trained, tested, train_count, test_count, data.classes or 1000)


def _records(data: Data, paths: Sequence[str], counts: dict[str, int]) -> tuple[Records, int]:
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(record):
        row = tf.io.parse_single_example(record, features)
        return row["image/encoded"], tf.cast(row["image/class/label"], tf.int32) - data.first_label

    parts = [Part(path, 0, counts[path]) for path in paths]
    return Records(parts, parse, data.shuffle_buffer), sum(part.count for part in parts)


def _is_whole(path: str) -> bool:
    try:
        for _ in tf.data.TFRecordDataset(path):
            pass
    except tf.errors.OpError:
        return False
    return True


@tf.autograph.experimental.do_not_convert
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
            broken = few([path for path in todo if not _is_whole(path)])
            raise ValueError(f"Expected complete TFRecord files. Received: {broken}. {error.message}") from error
        if cache:
            cloud_files.write(cache, json.dumps(counts))
    return counts


@dataclass(frozen=True)
class _Prepared:
    """A TensorFlow dataset on this machine."""

    parse: Callable
    splits: Any
    classes: int
    labels: Sequence[str]

    def test(self, data: Data) -> str:
        """Returns the name of the split to evaluate on."""
        test = data.eval_split or next((name for name in EVALUATED if name in self.splits), None)
        if test is None:
            raise ValueError(
                f"Expected data.eval_split, such as train[90%:]. Received: none, with the splits {list(self.splits)}"
            )
        return test

    def records(self, data: Data, split: str) -> tuple[Records, int]:
        """Returns a split's records and their number."""
        try:
            steps = self.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(f"Expected a split made of {list(self.splits)}. Received: {split!r}") from error
        parts = [Part(str(step.filename), step.skip, step.take) for step in steps]
        return Records(parts, self.parse, data.shuffle_buffer), sum(part.count for part in parts)


def _tensorflow_dataset(data: Data) -> Source:
    dataset = _prepared(data)
    test = dataset.test(data)
    (trained, train_count), (tested, test_count) = (
        dataset.records(data, split) for split in (data.train_split or "train", test)
    )
    return Source(trained, tested, train_count, test_count, dataset.classes, dataset.labels)


def _prepared(data: Data) -> _Prepared:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(data.source, data_dir=data.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(data.source, ["digits", *tfds.list_builders()], n=3)
        raise ValueError(
            "Expected --data as a folder, a CSV file, digits, or the name of a TensorFlow dataset. Received: "
            f"{data.source!r}{'. Nearest: ' * bool(near)}{', '.join(map(repr, near))}"
        ) from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a data set's own code raises
        raise ValueError(
            f"Expected a TensorFlow dataset that can be prepared in data.data_dir. Received: {data.source!r}, with "
            f"{type(error).__name__}: {error}"
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

    return _Prepared(parse, builder.info.splits, features[label].num_classes, features[label].names or ())

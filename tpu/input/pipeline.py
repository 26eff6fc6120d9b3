"""Turns a source's examples into batches: decodes, crops, augments, and records what cannot be read."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_effnet.tpu.config import Augment, Data, Recipe
from keras_effnet.tpu.input import augment, mixing
from keras_effnet.tpu.input.crops import eval_image, train_crop
from keras_effnet.tpu.input.example_readers import marked
from keras_effnet.tpu.input.skipped_examples import Skipped
from keras_effnet.tpu.input.sources import Source

NAMED = 64  # at most this many consecutive unreadable images are named


@dataclass(frozen=True)
class Host:
    """One of the machines that read the data.

    Args:
        index: Integer, number of this host, from 0. Defaults to 0.
        count: Integer, number of hosts. Defaults to 1.
    """

    index: int = 0
    count: int = 1


@tf.autograph.experimental.do_not_convert
def training(
    source: Source,
    recipe: Recipe,
    size: int,
    batch: int,
    skipped: Skipped | None,
    *,
    parts: int = 1,
    start: int = 0,
    host: Host | None = None,
) -> tf.data.Dataset:
    """Returns one host's training batches, endlessly.

    The randomness of an example depends only on the recipe's seed, the epoch and the example.

    Args:
        source: `Source`.
        recipe: `Recipe`.
        size: Integer, side of an image in pixels.
        batch: Integer, images per batch on this host.
        skipped: `Skipped`, which records unreadable images; or None for a host that runs no Python, where an unreadable
            image raises an error that names it.
        parts: Integer, number of replicas on this host. Each batch is split into as many consecutive parts.
            Defaults to 1.
        start: Integer, number of examples that this host has already trained on. Defaults to 0.
        host: `Host`. Defaults to a single host.

    Returns:
        A `tf.data.Dataset` of images, uint8 or float32 (part, size, size, 3), and labels, int32 (part,). With mixup
        or CutMix the labels are float32 (part, classes).

    Example:

    >>> from keras_effnet.tpu.config import Augment, Data, Recipe
    >>> from keras_effnet.tpu.input.skipped_examples import Skipped
    >>> from keras_effnet.tpu.input.pipeline import training
    >>> from keras_effnet.tpu.input.sources import open_source
    >>> source = open_source(Data(source="digits"))
    >>> images, labels = next(iter(training(source, Recipe(), 32, 4, Skipped(None, source.train_count))))
    >>> images.shape, images.dtype, labels.shape
    (TensorShape([4, 32, 32, 3]), tf.uint8, TensorShape([4]))
    """
    host = host or Host()
    examples, data, seed = source.train, recipe.data, recipe.run.seed
    first = start if skipped is None else skipped.position(start)
    classes = recipe.data.classes or source.classes
    if skipped is not None:  # an empty `Skipped` is false
        skipped.probe = examples.probe

    def read(example):
        key = keys(seed, example["epoch"], example["id"])[0]
        return train_crop(examples.load(example["image"], skipped is not None), size, data, recipe.augment, key)

    def finish(example):
        example = _labelled(example, classes)
        _, changing, mixing = keys(seed, example["epoch"], example["id"])
        return {**example, "image": changed(example["image"], data, recipe.augment, changing), "key": mixing}

    raw = examples.train(seed, first, host.index, host.count, batch, marks=True)
    dataset = _checked(raw, read, size, first, skipped)
    dataset = dataset.map(finish, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = _batches(dataset, recipe.augment, classes, batch, parts)
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(_options(recipe))


def _batches(dataset: tf.data.Dataset, how: Augment, classes: int, batch: int, parts: int) -> tf.data.Dataset:
    """Batches of images and labels, mixed if `how` says so, in as many parts as the host has replicas."""
    if not (how.mixup or how.cutmix):
        return dataset.map(lambda x: (x["image"], x["label"])).batch(batch // parts, drop_remainder=True)

    def mix(x):
        labels = tf.one_hot(x["label"], classes)
        return mixing.mix(x["image"], labels, x["key"], mixup_alpha=how.mixup, cutmix_alpha=how.cutmix)

    # Mix before splitting, so that partners do not depend on the number of replicas.
    dataset = dataset.batch(batch, drop_remainder=True).map(mix, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.rebatch(batch // parts, drop_remainder=True)


def keys(seed: int, epoch, number) -> list[Any]:
    """Returns the seeds of an example's randomness.

    Args:
        seed: Integer, seed of the run.
        epoch: Integer scalar.
        number: Integer scalar, number of the example.

    Returns:
        List of three seeds: for the crop, for the other augmentation, and for mixup or CutMix.
    """
    key: Any = tf.constant([seed, 0], tf.int64)
    for part in (epoch, number):
        key = tf.random.fold_in(key, part)
    return tf.unstack(tf.random.split(key, 3))


def names(source: Source, recipe: Recipe, batch: int, skipped: Skipped | None, start: int, host: Host) -> list[str]:
    """Returns the names of the examples in a batch of `training()`.

    Args:
        source: `Source`.
        recipe: `Recipe`.
        batch: Integer, images per batch on this host.
        skipped: See `training()`.
        start: Integer, number of examples on this host before the batch.
        host: `Host`.

    Returns:
        List of strings.
    """
    first = start if skipped is None else skipped.position(start)
    examples = source.train.train(recipe.run.seed, first, host.index, host.count, batch)
    found = (x["name"].numpy().decode() for x in examples if skipped is None or int(x["ordinal"]) not in skipped)
    return list(itertools.islice(found, batch))


@tf.autograph.experimental.do_not_convert
def evaluation(
    source: Source,
    recipe: Recipe,
    size: int,
    batch: int,
    skipped: Skipped | None,
    *,
    parts: int = 1,
    host: Host | None = None,
) -> tf.data.Dataset:
    """Returns one host's evaluation batches. Each example occurs once, and the last batches are padded.

    Args:
        source: `Source`.
        recipe: `Recipe`.
        size: Integer, side of an image in pixels.
        batch: Integer, images per batch on this host.
        skipped: See `training()`.
        parts: Integer, number of replicas on this host. Each batch is split into as many consecutive parts.
            Defaults to 1.
        host: `Host`. Defaults to a single host.

    Returns:
        A `tf.data.Dataset` of images, float32 (part, size, size, 3), labels, int32 (part,), and weights, float32
        (part,), which are 0 for padding. All hosts have the same number of batches.
    """
    host = host or Host()
    examples = source.evaluate
    if skipped is not None:  # an empty `Skipped` is false
        skipped.probe = examples.probe
    counts = [examples.evaluated(index, host.count) for index in range(host.count)]
    mine = counts[host.index]

    def read(example):
        return eval_image(examples.load(example["image"], skipped is not None), size, recipe.data)

    raw = marked(examples.evaluate(host.index, host.count), mine)
    dataset = _checked(raw, read, size, 0, skipped)
    classes = recipe.data.classes or source.classes
    dataset = dataset.map(lambda x: (x["image"], _labelled(x, classes)["label"], tf.ones([])))
    filling = tf.data.Dataset.from_tensors((tf.zeros([size, size, 3]), tf.zeros([], tf.int32), tf.zeros([]))).repeat()
    steps = -(-max(counts) // batch)
    dataset = dataset.concatenate(filling).take(steps * batch).batch(batch // parts, drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(_options(recipe))


def _options(recipe: Recipe) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if recipe.run.threads:
        options.threading.private_threadpool_size = recipe.run.threads
    return options


def _labelled(example, classes: int):
    label = example["label"]
    problem = "Expected labels from 0 to classes - 1 (data.classes, data.first_label). Received this label and example:"
    check = tf.debugging.Assert((label >= 0) & (label < classes), [problem, label, example["name"]])
    with tf.control_dependencies([check]):
        return {**example, "label": tf.identity(label)}


def _told(example) -> dict[str, Any]:
    return {name: example[name] for name in ("ordinal", "epoch", "id", "name", "mark", "before", "lost", "label")}


def _checked(raw: tf.data.Dataset, read: Callable, size: int, first: int, skipped: Skipped | None) -> tf.data.Dataset:
    """Returns the readable examples, and reports the others: a gap in the ordinals shows that some are missing.

    A gap is noticed at the next example that can be read, or at the next mark, see `marked()`.

    Each example carries the names of those before it, because a map can only drop an example that raises. A `try` for
    each example costs more than a tenth of the speed.
    """

    def remember(state, example):
        names, last, lost = state
        # A truncated file yields no ordinals: only the mark after its epoch shows the gap.
        ordinal, mark = example["ordinal"], example["mark"]
        lost += ordinal - last - 1
        names_now = tf.where(mark, names, tf.concat([names[1:], example["name"][None]], 0))
        last = ordinal - tf.cast(mark, tf.int64)
        return (names_now, last, lost), {**example, "before": names, "lost": lost}

    def seen(example):
        image = tf.cond(example["mark"], lambda: tf.zeros([size, size, 3]), lambda: read(example))
        return {**_told(example), "image": image}

    def compare(expected, example):
        ordinal, before = example["ordinal"], example["before"]
        fewer = "Expected all records that were counted. Received fewer: a file was not read to its end. Missing:"
        whole = tf.debugging.Assert(example["lost"] == 0, [fewer, example["lost"]])
        with tf.control_dependencies([whole]):
            if skipped is None:
                missing = before[-tf.cast(tf.clip_by_value(ordinal - expected, 1, NAMED), tf.int32) :]
                report = tf.debugging.Assert(
                    ordinal == expected,
                    ["Expected images that can be read. Received:", tf.strings.reduce_join(missing, separator=", ")],
                )
            else:
                report = tf.cond(
                    ordinal > expected,
                    lambda: tf.numpy_function(skipped, [expected, ordinal - expected, before], tf.int64),
                    lambda: tf.constant(0, tf.int64),
                )
        with tf.control_dependencies([report]):
            following = ordinal + 1 - tf.cast(example["mark"], tf.int64)
            return following, {**example, "ordinal": tf.identity(ordinal)}

    last = tf.constant(first - 1, tf.int64)
    done = raw.scan((tf.fill([NAMED], ""), last, tf.constant(0, tf.int64)), remember)
    done = done.map(seen, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).ignore_errors()
    return done.scan(tf.constant(first, tf.int64), compare).filter(lambda example: ~example["mark"])


def changed(image, data: Data, how: Augment, key):
    """Flips and augments an image, and casts it to the type in which it leaves the host.

    Args:
        image: Float32 tensor (size, size, 3) of pixels 0-255.
        data: `Data`, for the type.
        how: `Augment`.
        key: Integers (2,), seed.

    Returns:
        Tensor (size, size, 3) of pixels 0-255, of the type `data.transfer`.

    Reference:
        tensorflow/tpu efficientnet preprocessing.py:160-198.
    """
    flipping, policy, erasing = tf.unstack(tf.random.split(key, 3))
    if how.flip:
        image = tf.image.stateless_random_flip_left_right(image, flipping)
    if how.policy == "none" and not how.erase:
        if data.transfer == "float32":
            return image
        return tf.cast(tf.clip_by_value(image, 0.0, 255.0) + 0.5, tf.uint8)
    image = tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)  # truncated: preprocessing.py:177-187
    if how.policy == "autoaugment":
        image = augment.auto_augment(image, policy)
    elif how.policy == "randaugment":
        image = augment.rand_augment(
            image,
            policy,
            layers=how.layers,
            magnitude=how.magnitude,
            magnitude_std=how.magnitude_std,
            probability=how.op_probability,
        )
    if how.erase:
        image = augment.erase(image, erasing, how.erase)
    return image if data.transfer == "uint8" else tf.cast(image, tf.float32)

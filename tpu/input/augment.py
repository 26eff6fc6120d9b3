"""AutoAugment, RandAugment and random erasing for a tf.data map. The first two match the original bit for bit."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_effnet.errors import one_of
from keras_effnet.nets.normalization import SCHEMES
from keras_effnet.tpu.input.image_ops import AUTOAUGMENT, OPS, RANDAUGMENT, Hparams, apply_op, paste

_MEAN, _STD = SCHEMES["imagenet"]

RANDAUGMENT_OPS = tuple(OPS)

# tensorflow/tpu autoaugment.py:36-68: two ops per row, each with its probability and level.
POLICY_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)

_POLICY_OPS = tuple(sorted({name for steps in POLICY_V0 for name, _, _ in steps}))


class Steps(NamedTuple):
    """The ops drawn for one image. Each field is a tensor with one row per step.

    Args:
        op: int32, (steps,), indices into the list of op names.
        level: float64, (steps,).
        sign: float64, (steps,), 1 or -1.
        applied: bool, (steps,). An op that is not applied leaves the image unchanged.
        place: float32, (steps, 2), Cutout's center as fractions of height and width, 0-1.

    Example:

    >>> draw_policy([1, 2])._fields
    ('op', 'level', 'sign', 'applied', 'place')
    """

    op: Any
    level: Any
    sign: Any
    applied: Any
    place: Any


def split_seed(seed, count: int) -> list[Any]:
    """Splits a seed into independent seeds.

    Args:
        seed: int32 or int64 tensor, (2,).
        count: Integer, how many seeds to return.

    Returns:
        List of tensors, (2,).
    """
    # Cast first: an int32 seed of the same value splits into different seeds.
    return tf.unstack(tf.random.split(tf.cast(seed, tf.int64), count))


def _draw(seed, op, level, probability) -> Steps:
    applied, sign, *place = tf.unstack(tf.random.stateless_uniform([4, op.shape[0]], seed))
    return Steps(
        op=op,
        level=level,
        sign=tf.where(sign < 0.5, tf.constant(-1.0, tf.float64), 1.0),
        applied=tf.floor(applied + probability) > 0,
        place=tf.stack(place, axis=1),
    )


def draw_policy(seed) -> Steps:
    """Draws the steps of `auto_augment()`: one of the 25 rows of `POLICY_V0`, and which of its two ops to apply.

    Args:
        seed: int32 or int64 tensor, (2,).

    Returns:
        `Steps` with 2 steps. Their ops are indices into the sorted names of the policy's ops.

    Example:

    >>> draw_policy([1, 2]).op.shape
    TensorShape([2])
    """
    which, rest = split_seed(seed, 2)
    row = tf.random.stateless_uniform([], which, maxval=len(POLICY_V0), dtype=tf.int32)
    names, probabilities, levels = (
        [[step[part] for step in steps] for steps in POLICY_V0] for part in range(len(POLICY_V0[0][0]))
    )
    op = tf.constant([[_POLICY_OPS.index(name) for name in steps] for steps in names])[row]
    return _draw(rest, op, tf.constant(levels, tf.float64)[row], tf.constant(probabilities)[row])


def draw_ops(
    seed,
    layers: int = 2,
    magnitude: float = 10.0,
    magnitude_std: float = 0.0,
    probability: float = 1.0,
    count: int = 16,
) -> Steps:
    """Draws the steps of `rand_augment()`.

    Args:
        seed: int32 or int64 tensor, (2,).
        layers: See `rand_augment()`.
        magnitude: See `rand_augment()`.
        magnitude_std: See `rand_augment()`.
        probability: See `rand_augment()`.
        count: Integer, number of ops to draw from. Defaults to the 16 of `RANDAUGMENT_OPS`.

    Returns:
        `Steps` with `layers` steps.

    Example:

    >>> draw_ops([1, 2], layers=3, magnitude=9).level.numpy().tolist()
    [9.0, 9.0, 9.0]
    """
    which, strength, rest = split_seed(seed, 3)
    op = tf.random.stateless_uniform([layers], which, maxval=count, dtype=tf.int32)
    level = tf.fill([layers], tf.constant(magnitude, tf.float64))
    if magnitude_std:
        noise = tf.random.stateless_normal([layers], strength, stddev=magnitude_std, dtype=tf.float64)
        level = tf.maximum(level + noise, 0.0)
    return _draw(rest, op, level, probability)


def _run(image, steps: Steps, names: Sequence[str], hparams: Hparams):
    """Applies the steps. One switch over all ops per step keeps the graph small: it holds each op once per step."""
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    for op, level, sign, applied, place in zip(*map(tf.unstack, steps), strict=True):
        center = tf.cast(place * size, tf.int32)

        def branch(name, image=image, level=level, sign=sign, center=center):
            return lambda: apply_op(name, image, level, sign, hparams, center)

        branches = [*map(branch, names), lambda image=image: tf.identity(image)]
        image = tf.ensure_shape(tf.switch_case(tf.where(applied, op, len(names)), branches), image.shape)
    return image


def auto_augment(image, seed):
    """Applies AutoAugment's ImageNet policy "v0": one of 25 pairs of ops, each op with its own probability.

    Args:
        image: uint8 tensor, (height, width, 3), at least 3 pixels high and wide.
        seed: int32 or int64 tensor, (2,).

    Returns:
        uint8 tensor, (height, width, 3).

    Example:

    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> auto_augment(image, seed=[1, 2]).shape
    TensorShape([32, 32, 3])

    Reference:
        arXiv 1805.09501; tensorflow/tpu models/official/efficientnet/autoaugment.py:644-672.
    """
    image = tf.convert_to_tensor(image)
    return _run(image, draw_policy(seed), _POLICY_OPS, AUTOAUGMENT)


def rand_augment(
    image,
    seed,
    layers: int = 2,
    magnitude: float = 10.0,
    magnitude_std: float = 0.0,
    probability: float = 1.0,
    ops: Sequence[str] = RANDAUGMENT_OPS,
):
    """Applies RandAugment: uniformly drawn ops, one after the other, all with the same level.

    Args:
        image: uint8 tensor, (height, width, 3), at least 3 pixels high and wide.
        seed: int32 or int64 tensor, (2,).
        layers: Integer, number of ops. Defaults to 2.
        magnitude: Float, level of the ops, at least 0. The published recipes use 17 and 28. Defaults to 10.
        magnitude_std: Float, standard deviation of the level, which is drawn for each op and clipped at 0.
            Defaults to 0.
        probability: Float from 0 to 1, probability that an op is applied. Defaults to 1, as in the original.
        ops: Keys of `OPS` to draw from. Defaults to the original's 16.

    Returns:
        uint8 tensor, (height, width, 3).

    Raises:
        ValueError: If `ops` is empty, an op is unknown, or a number is out of range.

    Example:

    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> rand_augment(image, seed=[1, 2], magnitude=17).shape
    TensorShape([32, 32, 3])

    Reference:
        arXiv 1909.13719; tensorflow/tpu models/official/efficientnet/autoaugment.py:675-717.
    """
    for name in ops:
        one_of("op", name, OPS)
    require("at least one op", len(ops) > 0, ops=ops)
    require("at least one layer", layers > 0, layers=layers)
    require("a magnitude of at least 0", magnitude >= 0, magnitude=magnitude)
    require("a standard deviation of at least 0", magnitude_std >= 0, magnitude_std=magnitude_std)
    require("a probability from 0 to 1", 0 <= probability <= 1, probability=probability)
    image = tf.convert_to_tensor(image)
    steps = draw_ops(seed, layers, magnitude, magnitude_std, probability, len(ops))
    return _run(image, steps, ops, RANDAUGMENT)


def erase(
    image,
    seed,
    probability: float,
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_aspect: float = 0.3,
    mode: str = "pixel",
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
):
    """Erases a random rectangle.

    Args:
        image: uint8 tensor, (height, width, 3).
        seed: int32 or int64 tensor, (2,).
        probability: Float from 0 to 1, probability of erasing anything.
        min_area: Float, smallest area of the rectangle as a fraction of the image. Defaults to 0.02.
        max_area: Float, largest area as a fraction of the image. Defaults to 1/3.
        min_aspect: Float, smallest ratio of height to width. The largest is its inverse. Defaults to 0.3.
        mode: `"pixel"` fills with values drawn from a normal distribution and clipped, `"const"` with the mean.
            Defaults to `"pixel"`.
        mean: 3 floats, in pixels 0-255. Defaults to ImageNet's.
        std: 3 floats, in pixels 0-255. Defaults to ImageNet's.

    Returns:
        uint8 tensor, (height, width, 3), unchanged if none of 10 rectangles fits into the image.

    Raises:
        ValueError: If `mode` is unknown, or a number is out of range.

    Example:

    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> erased = erase(image, [1, 2], probability=1.0, mode="const")
    >>> erased.numpy().reshape(-1, 3).max(axis=0)
    array([124, 116, 104], dtype=uint8)

    Reference:
        arXiv 1708.04896; timm/data/random_erasing.py, whose images are normalized, so that 0 is the mean.
    """
    one_of("mode", mode, ("pixel", "const"))
    require("a probability from 0 to 1", 0 <= probability <= 1, probability=probability)
    require("areas 0 < min_area <= max_area <= 1", 0 < min_area <= max_area <= 1, min_area=min_area, max_area=max_area)
    require("an aspect ratio 0 < min_aspect <= 1", 0 < min_aspect <= 1, min_aspect=min_aspect)
    image = tf.convert_to_tensor(image)
    whether, where, what = split_seed(seed, 3)

    def erased():
        # timm tries up to 10 times. Here all 10 are drawn at once, and the first that fits is used.
        area, aspect, *place = tf.unstack(tf.random.stateless_uniform([4, 10], where))
        limits = tf.shape(image)[:2]
        pixels = tf.cast(limits[0] * limits[1], tf.float32) * (min_area + (max_area - min_area) * area)
        aspect = tf.exp(math.log(min_aspect) * (1 - 2 * aspect))
        sizes = tf.cast(tf.round(tf.sqrt(tf.stack([pixels * aspect, pixels / aspect], axis=1))), tf.int32)
        fits = tf.reduce_all(sizes < limits, axis=1)
        first = tf.argmax(fits)
        size = tf.where(fits[first], sizes[first], 0)
        corner = tf.cast(tf.stack(place, axis=1)[first] * tf.cast(limits - size + 1, tf.float32), tf.int32)
        shape = tf.concat([size, [3]], 0)
        patch = tf.broadcast_to(tf.constant(mean, tf.float32), shape)
        if mode == "pixel":
            patch += tf.random.stateless_normal(shape, what) * tf.constant(std, tf.float32)
        patch = tf.cast(tf.round(tf.clip_by_value(patch, 0.0, 255.0)), image.dtype)
        return tf.ensure_shape(paste(image, patch, corner[0], corner[1]), image.shape)

    return tf.cond(tf.random.stateless_uniform([], whether) < probability, erased, lambda: tf.identity(image))


def require(what: str, holds: bool, **received) -> None:
    """Checks a condition on arguments.

    Args:
        what: String, the expectation.
        holds: Boolean, whether the condition holds.
        **received: The arguments by name, for the error.

    Raises:
        ValueError: If the condition does not hold.
    """
    if not holds:
        values = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise ValueError(f"Expected {what}. Received: {values}")

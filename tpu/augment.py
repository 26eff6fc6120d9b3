"""Augmentation inside a tf.data map: AutoAugment and RandAugment bit for bit as the original's, erasing, mixing.

Nothing here has a random state: each function takes a seed, and the same seed gives the same result, eagerly and in a
graph. Levels say how strongly an op works; they are 0-10 as in the original, and go on beyond.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_effnet.errors import one_of
from keras_effnet.preprocessing import SCHEMES

_FILL = 128  # what lies beyond the image's edge, and in a cutout; autoaugment.py:611, :692
_MEAN, _STD = SCHEMES["imagenet"]


class Hparams(NamedTuple):
    """What a level of 10 means for two ops.

    Args:
        cutout_const: Integer, half of the side that Cutout covers, in pixels.
        translate_const: Integer, how far TranslateX and TranslateY move the image, in pixels.

    Example:

    >>> AUTOAUGMENT.translate_const
    250
    """

    cutout_const: int
    translate_const: int


AUTOAUGMENT = Hparams(cutout_const=100, translate_const=250)  # autoaugment.py:669-670
RANDAUGMENT = Hparams(cutout_const=40, translate_const=100)  # autoaugment.py:694-695


def _paste(image, patch, top, left):
    """The image with a rectangle replaced. Concatenation copies memory; tf.where takes 10 times as long."""
    bottom, right = top + tf.shape(patch)[0], left + tf.shape(patch)[1]
    rows = image[top:bottom]
    return tf.concat([image[:top], tf.concat([rows[:, :left], patch, rows[:, right:]], 1), image[bottom:]], 0)


def _blend(degenerate, image, factor):
    # The original clips only if it extrapolates; if it does not, clipping changes nothing. It truncates.
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    blended = degenerate + tf.cast(factor, tf.float32) * (image - degenerate)
    return tf.cast(tf.clip_by_value(blended, 0.0, 255.0), tf.uint8)


def _project(image, *rows):
    """Maps each pixel (x, y) of the result to (a x + b y + c, d x + e y + f) of the image, the nearest pixel."""
    # One kernel that fills with grey itself. The original marks the holes in a fourth channel: 2-3 times as long.
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack([tf.cast(value, tf.float32) for value in (*rows, 0.0, 0.0)])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(_FILL),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def _autocontrast(image):
    # 1.5 times as fast as official's, since rows of 3 * width numbers vectorise and channels of 3 do not.
    width = tf.shape(image)[1]
    rows = tf.reshape(image, [-1, width * 3])
    low, high = (
        tf.cast(reduce(tf.reshape(reduce(rows, 0), [-1, 3]), 0), tf.float32)
        for reduce in (tf.reduce_min, tf.reduce_max)
    )
    flat = low == high
    scale = tf.where(flat, 1.0, 255.0 / tf.where(flat, 1.0, high - low))
    offset = tf.where(flat, 0.0, -low * scale)
    stretched = tf.cast(rows, tf.float32) * tf.tile(scale, width[None]) + tf.tile(offset, width[None])
    return tf.reshape(tf.cast(tf.clip_by_value(stretched, 0.0, 255.0), tf.uint8), tf.shape(image))


def _equalize(image):
    # 1.5 times as fast as official's: one histogram and one look-up for the three channels, which are told apart by
    # adding 0, 256, 512, and again in rows of 3 * width numbers.
    rows = tf.cast(tf.reshape(image, [-1, tf.shape(image)[1] * 3]), tf.int32)
    rows += tf.tile(tf.constant([0, 256, 512]), tf.shape(image)[1][None])
    histogram = tf.reshape(tf.histogram_fixed_width(rows, [0, 767], 768), [3, 256])
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    # The original's sum without the last bin that is not empty.
    step = tf.reduce_max(tf.where(histogram > 0, below, 0), axis=1, keepdims=True) // 255
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    table = tf.cast(tf.where(step == 0, tf.range(256), table), tf.uint8)
    return tf.reshape(tf.gather(tf.reshape(table, [-1]), rows), tf.shape(image))


def _rotate(image, degrees):
    angle = tf.cast(degrees * (math.pi / 180.0), tf.float32)
    cos, sin = tf.cos(angle), tf.sin(angle)
    height, width = (tf.cast(tf.shape(image)[axis] - 1, tf.float32) for axis in (0, 1))
    x = (width - (cos * width - sin * height)) / 2.0
    y = (height - (sin * width + cos * height)) / 2.0
    return _project(image, cos, -sin, x, sin, cos, y)


def _posterize(image, bits):
    # More than 8 bits shift by 256 less, and TensorFlow takes any shift above 7 as 7. Twice as fast as official's.
    shift = tf.cast(8 - bits, tf.uint8)
    return tf.bitwise.bitwise_and(image, tf.bitwise.left_shift(tf.constant(255, tf.uint8), shift))


def _solarize(image, threshold):
    # A threshold wraps modulo 256, as it does where the original makes it a uint8. 5 times as fast as official's.
    bright = tf.cast(image >= tf.cast(threshold, tf.uint8), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * 255)


def _solarize_add(image, addition):
    # 4 times as fast as official's, which adds in int64.
    addition = tf.cast(tf.minimum(addition, 255), tf.uint8)
    return image + tf.cast(image < 128, tf.uint8) * tf.minimum(addition, 255 - image)


def _color(image, factor):
    return _blend(tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), image, factor)


def _contrast(image, factor):
    # What the original takes for the mean grey is the number of pixels / 256: autoaugment.py:208-210.
    mean = tf.minimum(tf.shape(image)[0] * tf.shape(image)[1] // 256, 255)
    return _blend(mean, image, factor)


def _brightness(image, factor):
    return _blend(0, image, factor)


def _sharpness(image, factor):
    # Each term is rounded, row by row. A convolution of oneDNN does not round in between, and tf.add_n's terms are
    # reordered in a graph: after either, some numbers in a thousand are truncated to others.
    height, width = tf.shape(image)[0] - 2, tf.shape(image)[1] - 2
    pixels = tf.cast(image, tf.float32)
    edge, middle = (pixels * (tf.constant(weight) / 13.0) for weight in (1.0, 5.0))
    places = [(y, x) for y in range(3) for x in range(3)]
    terms = [(middle if (y, x) == (1, 1) else edge)[y : y + height, x : x + width] for y, x in places]
    smooth = tf.floor(tf.reduce_sum(tf.stack(terms), 0))
    return _paste(image, _blend(smooth, pixels[1:-1, 1:-1], factor), 1, 1)


def _cutout(image, half, center):
    size = tf.shape(image)[:2]
    low, high = tf.maximum(center - half, 0), tf.minimum(center + half, size)
    shape = tf.concat([tf.maximum(high - low, 0), [3]], 0)
    return _paste(image, tf.fill(shape, tf.constant(_FILL, tf.uint8)), low[0], low[1])


def _whole(value):
    return tf.cast(value, tf.int32) if tf.is_tensor(value) else int(value)


def _share(most: float) -> Callable:
    return lambda level, _: level / 10 * most


def _number(most: int) -> Callable:
    return lambda level, _: _whole(level / 10 * most)


def _factor(level, _):
    return level / 10 * 1.8 + 0.1


def _distance(level, hparams):
    return level / 10 * float(hparams.translate_const)


class Op(NamedTuple):
    """One op.

    Args:
        function: Function of an image and the argument, if there is one.
        argument: Function of a level and `Hparams`, to the number that `function` takes. None: it takes none. A
            Python number gives a Python number, a float64 tensor the tensor of the same value.
        signed: Boolean, whether the number also comes negative. Defaults to False.
        placed: Boolean, whether `function` takes a place in the image, too. Defaults to False.

    Example:

    >>> OPS["Solarize"].argument(9, AUTOAUGMENT)
    230
    """

    function: Callable
    argument: Callable | None = None
    signed: bool = False
    placed: bool = False


# autoaugment.py:450-532, in the order of RandAugment's list, :696-699. Ours, and not those of tf-models-official:
# tests/test_augment.py says for each whether its pixels differ from the original's, or how much slower it is.
OPS = {
    "AutoContrast": Op(_autocontrast),
    "Equalize": Op(_equalize),
    "Invert": Op(lambda image: 255 - image),
    "Rotate": Op(_rotate, _share(30.0), signed=True),
    "Posterize": Op(_posterize, _number(4)),
    "Solarize": Op(_solarize, _number(256)),
    "Color": Op(_color, _factor),
    "Contrast": Op(_contrast, _factor),
    "Brightness": Op(_brightness, _factor),
    "Sharpness": Op(_sharpness, _factor),
    "ShearX": Op(lambda image, share: _project(image, 1, share, 0, 0, 1, 0), _share(0.3), signed=True),
    "ShearY": Op(lambda image, share: _project(image, 1, 0, 0, share, 1, 0), _share(0.3), signed=True),
    "TranslateX": Op(lambda image, pixels: _project(image, 1, 0, pixels, 0, 1, 0), _distance, signed=True),
    "TranslateY": Op(lambda image, pixels: _project(image, 1, 0, 0, 0, 1, pixels), _distance, signed=True),
    "Cutout": Op(_cutout, lambda level, hparams: _whole(level / 10 * hparams.cutout_const), placed=True),
    "SolarizeAdd": Op(_solarize_add, _number(110)),
}
RANDAUGMENT_OPS = tuple(OPS)

# tensorflow/tpu autoaugment.py:36-68: two ops each, with probability and level.
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


def apply_op(name: str, image, level, sign=1, hparams: Hparams = AUTOAUGMENT, center=None):
    """Applies one op, without chance.

    Args:
        name: Key of `OPS`.
        image: uint8 tensor, (height, width, 3), at least 3 pixels high and wide.
        level: Number from 0 up, or float64 tensor, (). The original's are 0-10, and RandAugment's beyond.
        sign: 1 or -1, or float64 tensor, (): the direction of Rotate, ShearX, ShearY, TranslateX and TranslateY; the
            other ops have none. Defaults to 1.
        hparams: `Hparams`. Defaults to `AUTOAUGMENT`.
        center: int32 tensor, (2,), row and column of Cutout's centre. Defaults to the image's.

    Returns:
        uint8 tensor, (height, width, 3).

    Raises:
        ValueError: If `name` is unknown.

    Example:

    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> int(apply_op("Invert", image, level=0)[0, 0, 0])
    255

    Reference:
        tensorflow/tpu models/official/efficientnet/autoaugment.py:82-447, :477-532.
    """
    op = OPS[one_of("op", name, OPS)]
    image = tf.convert_to_tensor(image)
    arguments: list[Any] = []
    if op.argument:
        value = op.argument(level, hparams)
        arguments.append(value * sign if op.signed else value)
    if op.placed:
        arguments.append(tf.shape(image)[:2] // 2 if center is None else tf.convert_to_tensor(center, tf.int32))
    return tf.ensure_shape(op.function(image, *arguments), image.shape)


class Steps(NamedTuple):
    """What was drawn for one image: each member is a tensor with a row per step.

    Args:
        op: int32, (steps,), indices into the names that were drawn from.
        level: float64, (steps,).
        sign: float64, (steps,), 1 or -1.
        applied: bool, (steps,). An op that is not applied leaves the image alone.
        place: float32, (steps, 2), Cutout's centre as shares of height and width, 0-1.

    Example:

    >>> draw_policy([1, 2])._fields
    ('op', 'level', 'sign', 'applied', 'place')
    """

    op: Any
    level: Any
    sign: Any
    applied: Any
    place: Any


def _split(seed, count: int) -> list[Any]:
    # Of int64 alone, since an int32 seed of the same value would give others.
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
    """Draws what `auto_augment()` does: one of the 25 rows of `POLICY_V0`, and which of its two ops are applied.

    Args:
        seed: int32 or int64 tensor, (2,).

    Returns:
        `Steps` of 2 steps, whose ops are indices into the sorted names of the policy's ops.

    Example:

    >>> draw_policy([1, 2]).op.shape
    TensorShape([2])
    """
    which, rest = _split(seed, 2)
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
    """Draws what `rand_augment()` does.

    Args:
        seed: int32 or int64 tensor, (2,).
        layers: See `rand_augment()`.
        magnitude: See `rand_augment()`.
        magnitude_std: See `rand_augment()`.
        probability: See `rand_augment()`.
        count: Integer, how many ops there are to pick from. Defaults to the 16 of `RANDAUGMENT_OPS`.

    Returns:
        `Steps` of `layers` steps.

    Example:

    >>> draw_ops([1, 2], layers=3, magnitude=9).level.numpy().tolist()
    [9.0, 9.0, 9.0]
    """
    which, strength, rest = _split(seed, 3)
    op = tf.random.stateless_uniform([layers], which, maxval=count, dtype=tf.int32)
    level = tf.fill([layers], tf.constant(magnitude, tf.float64))
    if magnitude_std:
        noise = tf.random.stateless_normal([layers], strength, stddev=magnitude_std, dtype=tf.float64)
        level = tf.maximum(level + noise, 0.0)
    return _draw(rest, op, level, probability)


def _run(image, steps: Steps, names: Sequence[str], hparams: Hparams):
    """One switch over all ops per step, to which level and sign come as tensors: a graph with each op once per step."""
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    for op, level, sign, applied, place in zip(*map(tf.unstack, steps), strict=True):
        center = tf.cast(place * size, tf.int32)

        def branch(name, image=image, level=level, sign=sign, center=center):
            return lambda: apply_op(name, image, level, sign, hparams, center)

        branches = [*map(branch, names), lambda image=image: tf.identity(image)]
        image = tf.ensure_shape(tf.switch_case(tf.where(applied, op, len(names)), branches), image.shape)
    return image


def auto_augment(image, seed):
    """AutoAugment's policy for ImageNet, "v0": one of 25 pairs of ops, each op with its own probability.

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
    """RandAugment: ops that are picked uniformly, one after the other, all with the same level.

    Args:
        image: uint8 tensor, (height, width, 3), at least 3 pixels high and wide.
        seed: int32 or int64 tensor, (2,).
        layers: Integer, how many ops. Defaults to 2.
        magnitude: Float, their level, from 0. Defaults to 10. The published recipes have 17 and 28.
        magnitude_std: Float, standard deviation of the level, which is drawn anew for each op and is at least 0.
            Defaults to 0.
        probability: Float from 0 to 1, of each op being applied. Defaults to 1, as in the original.
        ops: Keys of `OPS` to pick from. Defaults to the original's 16.

    Returns:
        uint8 tensor, (height, width, 3).

    Raises:
        ValueError: If an op is unknown, there are none, or a number is out of range.

    Example:

    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> rand_augment(image, seed=[1, 2], magnitude=17).shape
    TensorShape([32, 32, 3])

    Reference:
        arXiv 1909.13719; tensorflow/tpu models/official/efficientnet/autoaugment.py:675-717.
    """
    for name in ops:
        one_of("op", name, OPS)
    _require("at least one op", len(ops) > 0, ops=ops)
    _require("at least one layer", layers > 0, layers=layers)
    _require("a magnitude from 0", magnitude >= 0, magnitude=magnitude)
    _require("a standard deviation from 0", magnitude_std >= 0, magnitude_std=magnitude_std)
    _require("a probability", 0 <= probability <= 1, probability=probability)
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
        probability: Float from 0 to 1, of erasing at all.
        min_area: Float, the rectangle's least share of the image. Defaults to 0.02.
        max_area: Float, its largest share. Defaults to 1/3.
        min_aspect: Float, the least ratio of height to width; the largest is its inverse. Defaults to 0.3.
        mode: `"pixel"`: each number is drawn from a normal distribution and clipped. `"const"`: all pixels are the
            mean. Defaults to `"pixel"`.
        mean: 3 floats, in pixels 0-255. Defaults to ImageNet's.
        std: 3 floats, in pixels 0-255. Defaults to ImageNet's.

    Returns:
        uint8 tensor, (height, width, 3). If none of 10 rectangles fits into the image, it stays as it is.

    Raises:
        ValueError: If `mode` is unknown, or a number is out of range.

    Example:

    >>> image = tf.zeros((32, 32, 3), tf.uint8)
    >>> erased = erase(image, [1, 2], probability=1.0, mode="const")
    >>> erased.numpy().reshape(-1, 3).max(axis=0)
    array([124, 116, 104], dtype=uint8)

    Reference:
        arXiv 1708.04896; timm/data/random_erasing.py, whose images are normalised: 0 is the mean there.
    """
    one_of("mode", mode, ("pixel", "const"))
    _require("a probability", 0 <= probability <= 1, probability=probability)
    _require(
        "shares 0 < min_area <= max_area <= 1", 0 < min_area <= max_area <= 1, min_area=min_area, max_area=max_area
    )
    _require("an aspect ratio 0 < min_aspect <= 1", 0 < min_aspect <= 1, min_aspect=min_aspect)
    image = tf.convert_to_tensor(image)
    whether, where, what = _split(seed, 3)

    def erased():
        # timm tries up to 10 times; here the 10 are drawn at once, and the first that fits is taken.
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
        return tf.ensure_shape(_paste(image, patch, corner[0], corner[1]), image.shape)

    return tf.cond(tf.random.stateless_uniform([], whether) < probability, erased, lambda: tf.identity(image))


def mix(images, labels, seeds, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
    """Mixes each example of a batch with another: the first with the last, the second with the last but one, ...

    Args:
        images: Tensor of any type of number, (batch, height, width, channels).
        labels: float32 tensor, one-hot or smoothed, (batch, classes).
        seeds: int32 or int64 tensor, (batch, 2). What is drawn for an example depends on its own alone.
        mixup_alpha: Float, alpha of mixup's Beta distribution. Defaults to 0: no mixup.
        cutmix_alpha: Float, alpha of CutMix's Beta distribution. Defaults to 0: no CutMix. If both are given, one of
            the two is drawn for each example.

    Returns:
        Pair of images and labels, of the same types and shapes. Integers are rounded.

    Raises:
        ValueError: If an alpha is negative.

    Example:

    >>> images, labels = tf.zeros((4, 32, 32, 3), tf.uint8), tf.eye(4)
    >>> images, labels = mix(images, labels, tf.random.split([1, 2], 4), mixup_alpha=0.2)
    >>> labels.shape
    TensorShape([4, 4])

    Reference:
        arXiv 1710.09412; arXiv 1905.04899; tensorflow/tpu
        models/official/efficientnet/imagenet_input.py:134-160, whose partner and max(weight, 1 - weight) are mixup's.
    """
    _require("a mixup_alpha from 0", mixup_alpha >= 0, mixup_alpha=mixup_alpha)
    _require("a cutmix_alpha from 0", cutmix_alpha >= 0, cutmix_alpha=cutmix_alpha)
    images, labels = tf.convert_to_tensor(images), tf.convert_to_tensor(labels)
    if not mixup_alpha and not cutmix_alpha:
        return images, labels
    size = tf.shape(images)[1:3]
    partners = tf.shape(images)[0] - 1

    # Example by example: its numbers stay in the cache, which takes half the time of passes over the whole batch.
    def one(place):
        first, second, third = _split(seeds[place], 3)
        which, *center = tf.unstack(tf.random.stateless_uniform([3], third))
        own, other = images[place], images[partners - place]

        def blended():
            beta = _beta(first, mixup_alpha)
            weight = tf.maximum(beta, 1 - beta)
            return _weighted(own, other, weight), weight

        def pasted():
            half = tf.cast(tf.sqrt(1 - _beta(second, cutmix_alpha)) * tf.cast(size, tf.float32), tf.int32) // 2
            middle = tf.cast(tf.stack(center) * tf.cast(size, tf.float32), tf.int32)
            low, high = tf.maximum(middle - half, 0), tf.minimum(middle + half, size)
            pixels = _paste(own, other[low[0] : high[0], low[1] : high[1]], low[0], low[1])
            share = 1 - tf.reduce_prod(high - low) / tf.reduce_prod(size)
            return tf.ensure_shape(pixels, own.shape), tf.cast(share, tf.float32)

        if not mixup_alpha or not cutmix_alpha:
            return blended() if mixup_alpha else pasted()
        return tf.cond(which < 0.5, pasted, blended)

    kinds = tf.TensorSpec(images.shape[1:], images.dtype), tf.TensorSpec([], tf.float32)
    mixed, share = tf.map_fn(one, tf.range(partners + 1), fn_output_signature=kinds)
    share = tf.cast(share, labels.dtype)[:, None]
    return tf.ensure_shape(mixed, images.shape), labels * share + tf.reverse(labels, [0]) * (1 - share)


def _weighted(own, other, weight):
    mixed = tf.cast(own, tf.float32) * weight + tf.cast(other, tf.float32) * (1 - weight)
    return tf.cast(tf.round(mixed) if own.dtype.is_integer else mixed, own.dtype)


def _beta(seed, alpha: float):
    one, other = tf.unstack(tf.random.stateless_gamma([2], seed, tf.constant(alpha)))
    return tf.math.divide_no_nan(one, one + other)  # at a tiny alpha both may underflow


def _require(what: str, holds: bool, **received) -> None:
    if not holds:
        values = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise ValueError(f"Expected {what}. Received: {values}")

"""The ops of AutoAugment and RandAugment. They match the original bit for bit."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_effnet.errors import one_of

_FILL = 128  # gray beyond the image's edge and inside a cutout: autoaugment.py:611, :692


class Hparams(NamedTuple):
    """The strength of Cutout and the translations at level 10.

    Args:
        cutout_const: Integer, half the side of Cutout's square, in pixels.
        translate_const: Integer, distance of TranslateX and TranslateY, in pixels.

    Example:

    >>> AUTOAUGMENT.translate_const
    250
    """

    cutout_const: int
    translate_const: int


AUTOAUGMENT = Hparams(cutout_const=100, translate_const=250)  # autoaugment.py:669-670

RANDAUGMENT = Hparams(cutout_const=40, translate_const=100)  # autoaugment.py:694-695


def paste(image, patch, top, left):
    """Returns the image with a rectangle replaced.

    Args:
        image: Tensor (height, width, channels).
        patch: Tensor of the same type, the rectangle's pixels. It fits into the image.
        top: Integer scalar, first row to replace.
        left: Integer scalar, first column to replace.

    Returns:
        Tensor like `image`.
    """
    # By concatenation, which copies memory. tf.where takes 10 times as long.
    bottom, right = top + tf.shape(patch)[0], left + tf.shape(patch)[1]
    rows = image[top:bottom]
    return tf.concat([image[:top], tf.concat([rows[:, :left], patch, rows[:, right:]], 1), image[bottom:]], 0)


def _blend(degenerate, image, factor):
    # The original clips only where it extrapolates; elsewhere clipping changes nothing. It truncates.
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    blended = degenerate + tf.cast(factor, tf.float32) * (image - degenerate)
    return tf.cast(tf.clip_by_value(blended, 0.0, 255.0), tf.uint8)


def _project(image, *rows):
    """Fills each pixel (x, y) of the result with the image's pixel nearest to (a x + b y + c, d x + e y + f)."""
    # This kernel fills holes with gray. The original marks them in a fourth channel, which takes 2-3 times as long.
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack([tf.cast(value, tf.float32) for value in (*rows, 0.0, 0.0)])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(_FILL),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def _autocontrast(image):
    # 1.5 times as fast as official's: rows of 3 * width numbers vectorize, channels of 3 do not.
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
    # 1.5 times as fast as official's: one histogram and one lookup for the three channels, offset by 0, 256 and 512 to
    # keep them apart, in rows of 3 * width numbers.
    rows = tf.cast(tf.reshape(image, [-1, tf.shape(image)[1] * 3]), tf.int32)
    rows += tf.tile(tf.constant([0, 256, 512]), tf.shape(image)[1][None])
    histogram = tf.reshape(tf.histogram_fixed_width(rows, [0, 767], 768), [3, 256])
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    # The original's sum leaves out the last nonempty bin.
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
    # Above 8 bits the shift wraps modulo 256, and TensorFlow treats shifts above 7 as 7. Twice as fast as official's.
    shift = tf.cast(8 - bits, tf.uint8)
    return tf.bitwise.bitwise_and(image, tf.bitwise.left_shift(tf.constant(255, tf.uint8), shift))


def _solarize(image, threshold):
    # The threshold wraps modulo 256, as in the original's cast to uint8. 5 times as fast as official's.
    bright = tf.cast(image >= tf.cast(threshold, tf.uint8), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * 255)


def _solarize_add(image, addition):
    # 4 times as fast as official's, which adds in int64.
    addition = tf.cast(tf.minimum(addition, 255), tf.uint8)
    return image + tf.cast(image < 128, tf.uint8) * tf.minimum(addition, 255 - image)


def _color(image, factor):
    return _blend(tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), image, factor)


def _contrast(image, factor):
    # The original's "mean" is the number of pixels / 256: autoaugment.py:208-210.
    mean = tf.minimum(tf.shape(image)[0] * tf.shape(image)[1] // 256, 255)
    return _blend(mean, image, factor)


def _brightness(image, factor):
    return _blend(0, image, factor)


def _sharpness(image, factor):
    # Each term is rounded, in row order. A oneDNN convolution does not round in between, and a graph reorders the terms
    # of tf.add_n: with either, a few pixels in a thousand differ after truncation.
    height, width = tf.shape(image)[0] - 2, tf.shape(image)[1] - 2
    pixels = tf.cast(image, tf.float32)
    edge, middle = (pixels * (tf.constant(weight) / 13.0) for weight in (1.0, 5.0))
    places = [(y, x) for y in range(3) for x in range(3)]
    terms = [(middle if (y, x) == (1, 1) else edge)[y : y + height, x : x + width] for y, x in places]
    smooth = tf.floor(tf.reduce_sum(tf.stack(terms), 0))
    return paste(image, _blend(smooth, pixels[1:-1, 1:-1], factor), 1, 1)


def _cutout(image, half, center):
    size = tf.shape(image)[:2]
    low, high = tf.maximum(center - half, 0), tf.minimum(center + half, size)
    shape = tf.concat([tf.maximum(high - low, 0), [3]], 0)
    return paste(image, tf.fill(shape, tf.constant(_FILL, tf.uint8)), low[0], low[1])


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
    """An augmentation op.

    Args:
        function: Function of an image, then the number from `argument`, then a center, as the op needs them.
        argument: Function of a level and `Hparams` that returns the number for `function`, or None if `function`
            takes no number. For a Python level it returns a Python number, for a float64 tensor a tensor of the same
            value. Defaults to None.
        signed: Boolean, whether the number may be negated. Defaults to False.
        placed: Boolean, whether `function` takes a center. Defaults to False.

    Example:

    >>> OPS["Solarize"].argument(9, AUTOAUGMENT)
    230
    """

    function: Callable
    argument: Callable | None = None
    signed: bool = False
    placed: bool = False


# autoaugment.py:450-532, in the order of RandAugment's list, :696-699. tests/tpu/input/test_augment.py gives the reason
# for not using each op of tf-models-official ("official"): different pixels than the original's, less speed, or others.
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


def apply_op(name: str, image, level, sign=1, hparams: Hparams = AUTOAUGMENT, center=None):
    """Applies one op, without randomness.

    Args:
        name: Key of `OPS`.
        image: uint8 tensor, (height, width, 3), at least 3 pixels high and wide.
        level: Number of at least 0, or float64 tensor, (). The original uses 0-10, and more for RandAugment.
        sign: 1 or -1, or float64 tensor, (), the direction of Rotate, ShearX, ShearY, TranslateX and TranslateY. Other
            ops ignore it. Defaults to 1.
        hparams: `Hparams`. Defaults to `AUTOAUGMENT`.
        center: int32 tensor, (2,), row and column of Cutout's center. Defaults to the image's center.

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

"""Crops and resizes an image: random crops for training, the center for evaluation."""

import tensorflow as tf

from keras_effnet.tpu.config import Augment, Data


def eval_image(encoded, size: int, data: Data):
    """Returns the center crop that the network is evaluated on, equal to the original's bit for bit.

    Args:
        encoded: Bytes of a JPEG, PNG, GIF or BMP file; or pixels, uint8 (height, width, 3).
        size: Integer, side of the result in pixels.
        data: `Data`, for the crop and the interpolation.

    Returns:
        Float32 tensor (size, size, 3) of pixels 0-255. Bicubic interpolation slightly exceeds this range.

    Reference:
        tensorflow/tpu efficientnet preprocessing.py:88-137.
    """
    encoded = tf.convert_to_tensor(encoded)
    return _resized(_decoded(encoded, _middle(_shape(encoded), size, data)), size, data)


def train_crop(encoded, size: int, data: Data, how: Augment, key):
    """Returns a crop to train on, random if `how.crop` says so.

    Args:
        encoded: Bytes of a JPEG, PNG, GIF or BMP file; or pixels, uint8 (height, width, 3).
        size: Integer, side of the result in pixels.
        data: `Data`, for the center crop and the interpolation.
        how: `Augment`.
        key: Integers (2,), seed.

    Returns:
        Float32 tensor (size, size, 3) of pixels 0-255. Bicubic interpolation slightly exceeds this range.

    Reference:
        tensorflow/tpu efficientnet preprocessing.py:40-118.
    """
    shape = _shape(encoded)
    window = _middle(shape, size, data)
    if how.crop == "inception":
        window = _random_window(shape, window, how, key)
    return _resized(_decoded(encoded, window), size, data)


def _shape(encoded):
    if encoded.dtype != tf.string:
        return tf.shape(encoded)
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.extract_jpeg_shape(encoded),
        lambda: tf.shape(tf.io.decode_image(encoded, channels=3, expand_animations=False)),
    )


def eval_padding(size: int, data: Data) -> int:
    """Returns the pixels that evaluation crops away, measured at the size of the result.

    Args:
        size: Integer, side of the result in pixels.
        data: `Data`, for the crop.

    Returns:
        Integer, `crop_padding` of `images.resizing.crop_and_resize()`.
    """
    return 32 if data.eval_crop is None else round(size * (1 / data.eval_crop - 1))


def _middle(shape, size: int, data: Data):
    whole = shape[:2] if data.crop_mode == "squash" else tf.fill([2], tf.minimum(shape[0], shape[1]))
    sides = tf.cast(size / (size + eval_padding(size, data)) * tf.cast(whole, tf.float32), tf.int32)
    return tf.concat([(shape[:2] - sides + 1) // 2, sides], 0)


def _random_window(shape, middle, how: Augment, key):
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        key,
        min_object_covered=how.min_covered,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(how.min_area, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], extent[:2]], 0)
    # If no window was found, or only the whole image, the original uses the center: preprocessing.py:107-113.
    return tf.where(tf.reduce_all(extent[:2] == shape[:2]), middle, window)


def _decoded(encoded, window):
    def cut(pixels):
        return tf.slice(pixels, [window[0], window[1], 0], [window[2], window[3], 3])

    if encoded.dtype != tf.string:
        return cut(encoded)
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_and_crop_jpeg(encoded, window, channels=3),
        lambda: cut(tf.io.decode_image(encoded, channels=3, expand_animations=False)),
    )


def _resized(image, size: int, data: Data):
    resize = tf.raw_ops.ResizeBicubic if data.interpolation == "bicubic" else tf.raw_ops.ResizeBilinear
    half_pixel = data.interpolation.startswith("half-pixel")
    image = resize(images=image[None], size=[size, size], align_corners=False, half_pixel_centers=half_pixel)[0]
    return tf.ensure_shape(image, [size, size, 3])

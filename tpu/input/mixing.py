"""Mixup and CutMix for a tf.data map."""

from typing import Any

import tensorflow as tf

from keras_effnet.tpu.input.augment import require, split_seed
from keras_effnet.tpu.input.image_ops import paste


def mix(images: Any, labels: Any, seeds, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0):
    """Mixes each example of a batch with a partner: the first with the last, the second with the second to last, ...

    Args:
        images: Tensor of any numeric type, (batch, height, width, channels).
        labels: float32 tensor, one-hot or smoothed, (batch, classes).
        seeds: int32 or int64 tensor, (batch, 2). The draw for an example depends only on its own seed.
        mixup_alpha: Float, alpha of mixup's Beta distribution. Defaults to 0 (no mixup).
        cutmix_alpha: Float, alpha of CutMix's Beta distribution. If both alphas are given, mixup mixes the first half
            of the batch and CutMix the second. Defaults to 0 (no CutMix).

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
        arXiv 1710.09412; arXiv 1905.04899; tensorflow/tpu models/official/efficientnet/imagenet_input.py:134-160, for
        the partner and for mixup's max(weight, 1 - weight); google/automl efficientnetv2/datasets.py `mixing`, for the
        halves.
    """
    require("a mixup_alpha of at least 0", mixup_alpha >= 0, mixup_alpha=mixup_alpha)
    require("a cutmix_alpha of at least 0", cutmix_alpha >= 0, cutmix_alpha=cutmix_alpha)
    images, labels = tf.convert_to_tensor(images), tf.convert_to_tensor(labels)
    if not mixup_alpha and not cutmix_alpha:
        return images, labels
    if mixup_alpha and cutmix_alpha:
        half = tf.shape(images)[0] // 2
        one = mix(images[:half], labels[:half], seeds[:half], mixup_alpha=mixup_alpha)
        other = mix(images[half:], labels[half:], seeds[half:], cutmix_alpha=cutmix_alpha)
        whole = (tf.concat(pair, 0) for pair in zip(one, other, strict=True))
        return tuple(map(tf.ensure_shape, whole, (images.shape, labels.shape)))
    size = tf.shape(images)[1:3]
    partners = tf.shape(images)[0] - 1

    # Example by example: the data stays in the cache, which takes half the time of passes over the whole batch.
    def one(place):
        first, second, third = split_seed(seeds[place], 3)
        _, *center = tf.unstack(tf.random.stateless_uniform([3], third))
        own, other = images[place], images[partners - place]

        def blended():
            beta = _beta(first, mixup_alpha)
            weight = tf.maximum(beta, 1 - beta)
            return _weighted(own, other, weight), weight

        def pasted():
            half = tf.cast(tf.sqrt(1 - _beta(second, cutmix_alpha)) * tf.cast(size, tf.float32), tf.int32) // 2
            middle = tf.cast(tf.stack(center) * tf.cast(size, tf.float32), tf.int32)
            low, high = tf.maximum(middle - half, 0), tf.minimum(middle + half, size)
            pixels = paste(own, other[low[0] : high[0], low[1] : high[1]], low[0], low[1])
            share = 1 - tf.reduce_prod(high - low) / tf.reduce_prod(size)
            return tf.ensure_shape(pixels, own.shape), tf.cast(share, tf.float32)

        return blended() if mixup_alpha else pasted()

    kinds = tf.TensorSpec(images.shape[1:], images.dtype), tf.TensorSpec([], tf.float32)
    mixed, share = tf.map_fn(one, tf.range(partners + 1), fn_output_signature=kinds)
    share = tf.cast(share, labels.dtype)[:, None]
    return tf.ensure_shape(mixed, images.shape), labels * share + tf.reverse(labels, [0]) * (1 - share)


def _weighted(own, other, weight):
    mixed = tf.cast(own, tf.float32) * weight + tf.cast(other, tf.float32) * (1 - weight)
    return tf.cast(tf.round(mixed) if own.dtype.is_integer else mixed, own.dtype)


def _beta(seed, alpha: float):
    one, other = tf.unstack(tf.random.stateless_gamma([2], seed, tf.constant(alpha)))
    return tf.math.divide_no_nan(one, one + other)  # for a tiny alpha both may underflow

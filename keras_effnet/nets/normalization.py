"""Schemes that normalize pixels 0-255 as a net was trained: scale and offset per channel."""

from collections.abc import Sequence

import numpy as np

from keras_effnet.errors import unknown

# name: (mean, standard deviation) of pixels 0-255, per channel.
SCHEMES = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # efficientnet_builder.py:31-32
    "inception": ((127.5,) * 3, (127.5,) * 3),  # AdvProp, eval_ckpt_main.py:66-68; timm's mean and std of 0.5
    "tpu127": ((127.0,) * 3, (128.0,) * 3),  # lite, edgetpu and condconv builders:30-32
    "tpu128": ((128.0,) * 3, (128.0,) * 3),  # V2 S to XL: google/automl efficientnetv2/preprocessing.py
}


def constants(preprocessing, channels: int) -> tuple[list[float], list[float]]:
    """Returns the constants of a model's Rescaling layer, whose output is `pixels * scale + offset`.

    Args:
        preprocessing: A key of `SCHEMES`; a pair (scale, offset) of floats, or of sequences with one float per channel;
            or None for no preprocessing.
        channels: Integer. If it is not 3, all channels use the mean over the scheme's channels.

    Returns:
        Two lists of floats: scale and offset per channel.

    Raises:
        ValueError: If `preprocessing` is none of these.

    Example:

    >>> constants("tpu127", channels=1)
    ([0.0078125], [-0.9921875])
    """
    if preprocessing is None:
        return [1.0] * channels, [0.0] * channels
    if isinstance(preprocessing, str):
        if preprocessing not in SCHEMES:
            raise unknown("preprocessing", preprocessing, ["auto", *SCHEMES])
        mean, deviation = np.array(SCHEMES[preprocessing])
        pair = 1 / deviation, -mean / deviation
        if channels != len(mean):
            pair = tuple(np.full(channels, row.mean()) for row in pair)
    else:
        pair = preprocessing
    try:
        scale, offset = (np.broadcast_to(np.asarray(row, "float64"), (channels,)).tolist() for row in pair)
        if not np.isfinite([scale, offset]).all():
            raise ValueError("a number is not finite")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected preprocessing to be one of auto, {', '.join(SCHEMES)}, a pair (scale, offset) of one or "
            f"{channels} numbers each, or None. Received: preprocessing={preprocessing!r}"
        ) from error
    return scale, offset


def scheme_near(scale: Sequence[float], offset: Sequence[float]):
    """Returns the scheme of numbers that differ from it by no more than rounding to float32.

    Args:
        scale: Sequence of floats, one per channel.
        offset: Sequence of floats, one per channel.

    Returns:
        Key of `SCHEMES`, or the pair itself.
    """
    found = list(scale), list(offset)
    near = (name for name in SCHEMES if np.allclose(constants(name, len(found[0])), found, rtol=1e-6, atol=0))
    return next(near, found)


def scheme_of(scale: Sequence[float], offset: Sequence[float]):
    """Returns the scheme of a scale and an offset: the inverse of `constants()`.

    Args:
        scale: Sequence of floats, one per channel.
        offset: Sequence of floats, one per channel.

    Returns:
        Key of `SCHEMES`, None for no preprocessing, or the pair itself.
    """
    found = list(scale), list(offset)
    return next((name for name in (None, *SCHEMES) if constants(name, len(found[0])) == found), found)

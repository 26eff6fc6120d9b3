"""Loads photos as a model expects them: decoded, cropped and resized."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet.errors import one_of
from keras_effnet.images.decoding import decode_image
from keras_effnet.images.resizing import crop_and_resize
from keras_effnet.nets.variants import VARIANTS, nearest

if TYPE_CHECKING:
    import keras


def load_image(source, model: "str | keras.Model", weights: str | None = "auto") -> np.ndarray:
    """Decodes, crops and resizes a photo for a model. The model itself normalizes the pixels.

    Args:
        source: Path of an image file, or its bytes.
        model: Name of a model, or a model of this package. It sets the size and the number of channels.
        weights: Tag of the weights whose crop and interpolation to use. Defaults to `"auto"`: the weights that the
            model was created with, or its variant's usual ones if it was loaded from a file or is part of another
            model. For a name, or a model created without weights, the rules of the original's newest evaluation code
            apply: bicubic, with an eighth cropped away.

    Returns:
        float32 array of pixels, nominally 0-255, (height, width, channels), or (channels, height, width) for a
        `channels_first` model.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, or the model or the weights are unknown.

    Example:

    >>> import keras_effnet as ke
    >>> pixels = ke.load_image("docs/cat.png", "efficientnet-lite0")
    >>> pixels.shape
    (224, 224, 3)
    """
    return image_loader(model, weights)(source)


def image_loader(
    model: "str | keras.Model",
    weights: str | None = "auto",
    crop: bool = True,
    shape: tuple[int, ...] | None = None,
) -> Callable[[Any], np.ndarray]:
    """Returns a function that loads photos as `load_image()` does, but inspects the model only once.

    Args:
        model: See `load_image()`.
        weights: See `load_image()`.
        crop: Boolean, whether to use the crop and interpolation of the weights. Defaults to True. False for the largest
            window of the model's shape, bilinear.
        shape: Tuple of integers, shape of an image, for a model that may be from another package. Without rules for
            that model, those of the original's newest evaluation code apply. Defaults to None: the model is of this
            package.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If the model or the weights are unknown.
    """
    if shape is None:
        size, channels, channels_last, record = expected_by(model, weights)
    else:
        channels_last = shape[-1] <= 4
        height, width, channels = shape if channels_last else (*shape[1:], shape[0])
        size = height, width
        record = None
        with contextlib.suppress(ValueError):
            record = expected_by(model, weights)[3]
    rules: tuple[Any, ...] = (0, "bilinear") if not crop else ()
    if crop and record:
        rules = (record.crop_padding, record.interpolation)

    def load(source) -> np.ndarray:
        pixels = crop_and_resize(decode_image(source, channels), size, *rules)
        return pixels if channels_last else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return load


def expected_by(model, weights) -> tuple[tuple[int, int], int, bool, Any]:
    """Returns the images that a model expects, and the record of the weights whose crop and interpolation to use.

    Args:
        model: See `load_image()`.
        weights: See `load_image()`.

    Returns:
        Tuple of (height, width), number of channels, whether channels come last, and the record or None.

    Raises:
        ValueError: If the model, the weights or the input size are unknown.
    """
    from keras_effnet.weights import registry

    if isinstance(model, str):
        one_of("model", model, VARIANTS)
        name, variant, size, channels, channels_last, record = model, model, (None, None), 3, True, None
    else:
        from keras_effnet.nets import inspection

        holder, reading = inspection.find(model)
        name, variant, channels = model.name, nearest(reading.architecture), reading.channels
        channels_last = reading.layers["stem_conv"].data_format == "channels_last"
        size = tuple(model.input_shape[1:3] if channels_last else model.input_shape[2:4])
        # A model that was loaded from a file, or is part of another one, does not know its weights: assume the usual.
        usual = registry.default(variant) if variant else None
        record = getattr(holder, "weights_record", usual)
    if weights is None:
        record = None
    elif weights != "auto":
        if variant is None:
            raise ValueError(
                f"Expected a known model when weights are given. Received: weights={weights!r} and {name!r}, "
                "whose blocks match no known model"
            )
        record = registry.find(variant, weights)
    height, width = size
    if height is None or width is None:
        if variant is None:
            raise ValueError(f"Expected a model with a known input size. Received: {name!r} of size {size}")
        side = (record and record.resolution) or VARIANTS[variant].resolution
        height, width = height or side, width or side
    return (height, width), channels, channels_last, record

"""Loads a photo as a model expects it: decoded, cropped and resized."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet.errors import one_of
from keras_effnet.nets.variants import VARIANTS, nearest

if TYPE_CHECKING:
    import keras

from keras_effnet.images.decoding import decode_image
from keras_effnet.images.resizing import crop_and_resize


def load_image(source, model: "str | keras.Model", weights: str | None = "auto") -> np.ndarray:
    """Decodes, crops and resizes a photograph for a model. The model itself normalises it.

    Args:
        source: Path of an image file, or its bytes.
        model: Name of a model, or a model of this package: gives the size, and the number of channels.
        weights: Tag of the weights whose crop and interpolation hold. Defaults to `"auto"`: those that the model was
            made with, or the usual ones of a model that was loaded from a file or built on. For a name alone, or a
            model made without weights, the original's newest evaluation code holds: bicubic, an eighth cropped away.

    Returns:
        float32 array of pixels, nominally 0-255, (height, width, channels), or (channels, height, width) for a
        model in channels_first.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, or model or weights are unknown.

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
    """`load_image()` for many photographs: what the model expects is found out once.

    Args:
        model: See `load_image()`.
        weights: See `load_image()`.
        crop: Boolean, whether the weights' crop and interpolation hold. Defaults to True. False: the largest window
            of the model's shape, bilinear.
        shape: Tuple of integers, an image's, where the model may be another package's: without a rule of its own, the
            original's newest evaluation code holds. Defaults to None: the model is of this package.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If model or weights are unknown.
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
    """Size, number of channels, whether these come last, and the record whose crop and interpolation hold."""
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
        # One that is loaded from a file, or was built on, does not know its weights: its variant's usual ones then.
        usual = registry.default(variant) if variant else None
        record = getattr(holder, "weights_record", usual)
    if weights is None:
        record = None
    elif weights != "auto":
        if variant is None:
            raise ValueError(
                f"Expected a known model where weights are given. Received: weights={weights!r} and {name!r}, "
                "whose blocks are no known model's"
            )
        record = registry.find(variant, weights)
    height, width = size
    if height is None or width is None:
        if variant is None:
            raise ValueError(f"Expected a model of known input size. Received: {name!r} of size {size}")
        side = (record and record.resolution) or VARIANTS[variant].resolution
        height, width = height or side, width or side
    return (height, width), channels, channels_last, record

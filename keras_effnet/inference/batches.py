"""Images on their way into a model, and as a viewer shows them."""

from typing import Any

import numpy as np


def of_images(images: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns images as a batch.

    Args:
        images: Array of one or more images of numbers.
        shape: Tuple of integers. The shape of an image, with None for a size that the model leaves open.

    Returns:
        float32 array (count, *shape).

    Raises:
        ValueError: If the images are an empty batch, have another shape, or contain NaN or infinity.
    """
    try:
        array = np.asarray(images)
    except ValueError as error:  # images of different shapes
        raise ValueError(f"Expected numeric pixels, in images of one shape. Received: {error}") from error
    if array.dtype.kind not in "uifb":
        raise ValueError(f"Expected numeric pixels, in images of one shape. Received: dtype {array.dtype}")
    if array.ndim == 3:
        array = array[None]
    told = ", ".join(map(str, shape))
    sizes = zip(array.shape[1:], shape, strict=False)
    if array.ndim != 1 + len(shape) or any(wanted not in (None, size) for size, wanted in sizes):
        raise ValueError(f"Expected images of shape (count, {told}). Received: {np.shape(images)}")
    if not len(array):
        raise ValueError(f"Expected at least one image of shape ({told}). Received: an empty batch")
    pixels = np.ascontiguousarray(array, "float32")
    if array.dtype.kind == "f" and not np.isfinite(pixels).all():
        wrong = np.flatnonzero(~np.isfinite(pixels).all((1, 2, 3)))
        raise ValueError(f"Expected finite pixels. Received: NaN or infinity in image {wrong[0]} of {len(array)}")
    return pixels


def viewed(pixels: np.ndarray, channels_last: bool = True) -> np.ndarray:
    """Returns a model's input as an image that a viewer shows.

    Args:
        pixels: Array of pixels 0-255, with 1, 3 or 4 channels.
        channels_last: Boolean, whether the channels come last. Defaults to True.

    Returns:
        uint8 array (height, width, 3).
    """
    pixels = np.clip(np.rint(pixels if channels_last else np.moveaxis(pixels, 0, -1)), 0, 255).astype("uint8")
    return np.ascontiguousarray(np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels[..., :3])

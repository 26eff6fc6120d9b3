"""Crops and resizes as the original's evaluation does, without TensorFlow."""

import numpy as np

from keras_effnet.errors import one_of


def crop_and_resize(
    pixels: np.ndarray,
    size: tuple[int, int],
    crop_padding: int | None = None,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
) -> np.ndarray:
    """Crops and resizes as the original's evaluation does: a padded center crop, then TensorFlow's resize.

    As in the original, there is no antialiasing and no clipping: bicubic values range from about -27 to 288.

    Args:
        pixels: Array of numbers 0-255, (height, width, channels).
        size: Pair of integers, height and width of the result.
        crop_padding: Integer, pixels to crop away, measured at the size of the result. Defaults to None: an eighth, as
            in the original's newest code.
        interpolation: `"bicubic"` or `"bilinear"`, both on the grid of TensorFlow 1; or `"half-pixel-bilinear"`, on
            that of TensorFlow 2. Defaults to `"bicubic"`.
        crop_mode: `"center"` for the largest window of the result's shape; or `"squash"` for the whole image, which
            changes its proportions. Both are cropped by `crop_padding`. Defaults to `"center"`.

    Returns:
        float32 array, (*size, channels).

    Raises:
        ValueError: If `interpolation` or `crop_mode` is unknown.

    Reference:
        tensorflow/tpu preprocessing.py:81-93, :118-137; tensorflow/core/kernels/image/resize_bicubic_op.cc;
        google/automl efficientnetv2/preprocessing.py `preprocess_for_eval`.
    """
    one_of("interpolation", interpolation, _TAPS)
    one_of("crop_mode", crop_mode, CROP_MODES)
    height, width = size
    side = min(size)
    padding = round(side * (1 / 0.875 - 1)) if crop_padding is None else crop_padding
    fraction = np.float32(side / (side + padding))
    rows, columns = pixels.shape[:2]
    window = (rows, columns)
    if crop_mode == "center":
        window = (min(rows, columns * height / width), min(columns, rows * width / height))
    # Less the padding. In float32, as in the original.
    for axis, (length, total, out) in enumerate(zip(window, (rows, columns), size, strict=True)):
        crop = max(1, int(fraction * np.float32(length)))
        start = (total - crop + 1) // 2
        indices, weights = _TAPS[interpolation](crop, out)
        taken = np.take(pixels, start + indices, axis=axis)
        weights = np.expand_dims(weights, tuple(n for n in range(taken.ndim) if n not in (axis, axis + 1)))
        pixels = (taken * weights).sum(axis + 1, dtype="float32")
    return pixels


def _bicubic_taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and weights, (out, 4), of TensorFlow's legacy bicubic resize: a = -0.75, table of 1024 steps."""
    a = np.float32(-0.75)
    near = np.arange(1025, dtype="float32") / np.float32(1024)
    far = near + np.float32(1)
    inner = ((a + 2) * near - (a + 3)) * near * near + 1
    outer = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    place, step = _legacy_grid(length, out)
    step = np.rint(step * 1024).astype(int)
    weights = np.stack([outer[step], inner[step], inner[1024 - step], outer[1024 - step]], axis=1)
    return np.clip(place[:, None] + np.arange(-1, 3), 0, length - 1), weights


def _bilinear_taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and weights, (out, 2), of TensorFlow's legacy bilinear resize."""
    place, step = _legacy_grid(length, out)
    return np.minimum(place[:, None] + np.arange(2), length - 1), np.stack([1 - step, step], axis=1)


def _half_pixel_taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and weights, (out, 2), of TensorFlow 2's bilinear resize."""
    where = (np.arange(out, dtype="float32") + np.float32(0.5)) * (np.float32(length) / np.float32(out))
    where -= np.float32(0.5)
    place = np.floor(where)
    step = where - place
    indices = np.clip(place.astype(int)[:, None] + np.arange(2), 0, length - 1)
    return indices, np.stack([1 - step, step], axis=1)


def _legacy_grid(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each output pixel the input pixel before it, and its distance from that."""
    where = np.arange(out, dtype="float32") * (np.float32(length) / np.float32(out))
    place = np.floor(where)
    return place.astype(int), where - place


_TAPS = {"bicubic": _bicubic_taps, "bilinear": _bilinear_taps, "half-pixel-bilinear": _half_pixel_taps}
INTERPOLATIONS = tuple(_TAPS)
CROP_MODES = ("center", "squash")

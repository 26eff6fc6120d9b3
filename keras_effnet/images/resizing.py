"""Crops and resizes as the original's evaluation does, without TensorFlow."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from keras_effnet.errors import one_of

# Measured on two processors; the numbers depend on caches, the results do not.
_ROWS = 16  # output rows at a time
_COLUMNS, _FEW_COLUMNS, _LARGE = 8, 4, 4  # output columns per matrix; fewer where an image shrinks more than this
_PRODUCT = 200_000  # multiplications at a time: with more, BLAS starts threads, which only wait for each other


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
    top, left, rows, columns = crop_window(pixels.shape[:2], size, crop_padding, crop_mode)
    cut = pixels[top : top + rows, left : left + columns]
    return resize(cut, size, interpolation)


def crop_window(
    shape: Sequence[int], size: tuple[int, int], crop_padding: int | None = None, crop_mode: str = "center"
) -> tuple[int, int, int, int]:
    """Returns the part of an image that `crop_and_resize()` keeps.

    Args:
        shape: Pair of integers, height and width of the image.
        size: See `crop_and_resize()`.
        crop_padding: See `crop_and_resize()`.
        crop_mode: See `crop_and_resize()`.

    Returns:
        Tuple of integers: top, left, height and width.

    Raises:
        ValueError: If `crop_mode` is unknown.
    """
    one_of("crop_mode", crop_mode, CROP_MODES)
    height, width = size
    rows, columns = shape
    window = (rows, columns)
    if crop_mode == "center":
        window = (min(rows, columns * height / width), min(columns, rows * width / height))
    # Less the padding. In float32, as in the original.
    fraction = np.float32(_fraction(size, crop_padding))
    kept_rows, kept_columns = (max(1, int(fraction * np.float32(length))) for length in window)
    return (rows - kept_rows + 1) // 2, (columns - kept_columns + 1) // 2, kept_rows, kept_columns


def twice_the_crop(size: tuple[int, int], crop_padding: int | None = None) -> tuple[int, int]:
    """Returns the smallest height and width at which each side of the crop has twice the pixels of the result.

    Args:
        size: See `crop_and_resize()`.
        crop_padding: See `crop_and_resize()`.

    Returns:
        Pair of integers.
    """
    height, width = (math.ceil(2 * side / _fraction(size, crop_padding)) + 1 for side in size)
    return height, width


def _fraction(size: tuple[int, int], crop_padding: int | None) -> float:
    """Returns the share of the image's side that is kept."""
    side = min(size)
    return side / (side + (round(side * (1 / 0.875 - 1)) if crop_padding is None else crop_padding))


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resizes all of an image as `crop_and_resize()` does.

    Args:
        pixels: See `crop_and_resize()`.
        size: See `crop_and_resize()`.
        interpolation: See `crop_and_resize()`.

    Returns:
        float32 array, (*size, channels).

    Raises:
        ValueError: If `interpolation` is unknown.
    """
    one_of("interpolation", interpolation, _TAPS)
    # Some rows at a time, and from them a few columns at a time.
    (height, width), channels = size, pixels.shape[2]
    indices, weights = _taps(interpolation, pixels.shape[0], height)
    first, matrices = _column_matrices(interpolation, pixels.shape[1], width, channels)
    span, made = matrices.shape[1:]
    resized = np.empty((height, len(matrices), made), "float32")
    step = max(1, _PRODUCT // (span * made))
    for start in range(0, height, step):
        part = slice(start, start + step)
        rows = _make_rows(pixels, indices[part], weights[part])
        for block, (place, matrix) in enumerate(zip(first, matrices, strict=True)):
            np.matmul(rows[:, place : place + span], matrix, out=resized[part, block])
    return np.ascontiguousarray(resized.reshape(height, -1, channels)[:, :width])


def _make_rows(pixels: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted sums of rows of pixels, (rows, values). Reads only the rows that they are made of."""
    made = np.empty((len(indices), math.prod(pixels.shape[1:])), "float32")
    for start in range(0, len(indices), _ROWS):
        part = slice(start, start + _ROWS)
        taken = pixels[indices[part]].astype("float32")
        np.matmul(weights[part, None], taken.reshape(*taken.shape[:2], -1), out=made[part, None])
    return made


@lru_cache(16)
def _column_matrices(interpolation: str, length: int, out: int, channels: int) -> tuple[list[int], np.ndarray]:
    """Returns what makes the output columns of rows, in blocks of neighbours.

    Args:
        interpolation: Key of `_TAPS`.
        length: Integer, input columns.
        out: Integer, output columns.
        channels: Integer.

    Returns:
        List of the first value in a row of pixels that each block reads, and array of matrices, (blocks, values read,
        values made). The last block may make more columns than there are: they are zero.
    """
    indices, weights = _taps(interpolation, length, out)
    columns = _FEW_COLUMNS if length > _LARGE * out else _COLUMNS
    block, place = np.divmod(np.arange(out), columns)
    first = indices[::columns].min(1)
    span = int((indices.max(1) - first[block]).max()) + 1
    first = np.minimum(first, length - span)
    matrices = np.zeros((len(first), span, columns), "float32")
    for index, weight in zip(indices.T, weights.T, strict=True):
        matrices[block, index - first[block], place] += weight
    alike = np.zeros((len(first), span, channels, columns, channels), "float32")  # each channel for itself
    for channel in range(channels):
        alike[:, :, channel, :, channel] = matrices
    return (first * channels).tolist(), alike.reshape(len(first), span * channels, columns * channels)


@lru_cache(16)
def _taps(interpolation: str, length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    return _TAPS[interpolation](length, out)


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

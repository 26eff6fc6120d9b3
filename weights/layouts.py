"""Named layouts of arrays, invertible but for the one that drops something. No Keras."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Two functions of an array, each the other's inverse.

    Args:
        to_keras: Function from the foreign array, and the shape that ours has, to ours.
        from_keras: Function from our array to the foreign one.
    """

    to_keras: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    from_keras: Callable[[np.ndarray], np.ndarray]


def _transpose(*axes: int) -> Layout:
    return Layout(lambda array, shape: array.transpose(axes), lambda array: array.transpose(np.argsort(axes)))


def _rows(*axes: int) -> Layout:
    """An expert's kernel per row, flat. `axes`: where ours has the axes of what was made flat, experts first."""

    def to_keras(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) != len(axes) or array.shape != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"Expected one flat kernel per expert, of shape {shape}. Received: {array.shape}")
        return array.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))

    return Layout(to_keras, lambda array: array.transpose(axes).reshape(len(array), -1))


def _background_is_gone(array: np.ndarray) -> np.ndarray:
    raise ValueError(
        "Expected the classifier of 1001 classes that the original has, the first of them background. Received: one of "
        "1000, whose background class is gone. Load the original weights into a model built with classes=1001"
    )


LAYOUTS: dict[str, Layout] = {
    "keep": Layout(lambda array, shape: array, lambda array: array),
    "OIHW->HWIO": _transpose(2, 3, 1, 0),
    "C1HW->HWC1": _transpose(2, 3, 0, 1),
    "OI->IO": _transpose(1, 0),
    "E(HWIO)->EHWIO": _rows(0, 1, 2, 3, 4),
    "E(OIHW)->EHWIO": _rows(0, 4, 3, 1, 2),
    "E(C1HW)->EHWC1": _rows(0, 3, 4, 1, 2),
    # edgetpu/README.md:35: label 0 is background; main.py:679 says so of any original net with 1001 classes.
    "drop-background-class": Layout(lambda array, shape: array[..., 1:], _background_is_gone),
}


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Fits a stem's kernel of 3 input channels to another number: summed for one, else repeated and rescaled.

    Args:
        kernel: Array (height, width, 3, filters).
        channels: Integer.

    Returns:
        Array (height, width, `channels`, filters).

    Reference:
        timm/models/_manipulate.py `adapt_input_conv`, 1.0.31.
    """
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // 3), 1))[:, :, :channels]
    return repeated * np.float32(3 / channels)

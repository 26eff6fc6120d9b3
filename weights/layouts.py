"""Named array layouts, each with its inverse. No Keras."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How another program stores an array: a function to our layout, and its inverse.

    Args:
        to_keras: Function of the foreign array and the shape of ours. Returns our array.
        from_keras: Function of our array. Returns the foreign one.
    """

    to_keras: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    from_keras: Callable[[np.ndarray], np.ndarray]


def _transpose(*axes: int) -> Layout:
    return Layout(lambda array, shape: array.transpose(axes), lambda array: array.transpose(np.argsort(axes)))


def _rows(*axes: int) -> Layout:
    """A row per expert: its kernel, flattened. `axes` gives the order of our axes before flattening, experts first."""

    def to_keras(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) != len(axes) or array.shape != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"Expected one flat kernel per expert, of shape {shape}. Received: {array.shape}")
        return array.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))

    return Layout(to_keras, lambda array: array.transpose(axes).reshape(len(array), -1))


def _background_is_gone(array: np.ndarray) -> np.ndarray:
    raise ValueError(
        "Expected a classifier with the original's 1001 classes, the first of them background. Received: one with 1000 "
        "classes, without background. Load the original weights into a model built with classes=1001"
    )


LAYOUTS: dict[str, Layout] = {
    "keep": Layout(lambda array, shape: array, lambda array: array),
    "OIHW->HWIO": _transpose(2, 3, 1, 0),
    "C1HW->HWC1": _transpose(2, 3, 0, 1),
    "OI->IO": _transpose(1, 0),
    "E(HWIO)->EHWIO": _rows(0, 1, 2, 3, 4),
    "E(OIHW)->EHWIO": _rows(0, 4, 3, 1, 2),
    "E(C1HW)->EHWC1": _rows(0, 3, 4, 1, 2),
    # Not invertible. edgetpu/README.md:35: label 0 is background; main.py:679: in any original net with 1001 classes.
    "drop-background-class": Layout(lambda array, shape: array[..., 1:], _background_is_gone),
}


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapts the stem's kernel from 3 input channels to another number.

    For one channel the kernel is summed; for any other number it is repeated and rescaled.

    Args:
        kernel: Array (height, width, 3, filters).
        channels: Integer. The new number of input channels.

    Returns:
        Array (height, width, `channels`, filters).

    Reference:
        timm/models/_manipulate.py `adapt_input_conv`, 1.0.31.
    """
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // 3), 1))[:, :, :channels]
    return repeated * np.float32(3 / channels)

"""Named, invertible layouts of arrays. No Keras."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Two functions of an array, each the other's inverse.

    Args:
        to_keras: Function from the foreign array to ours.
        from_keras: Function from our array to the foreign one.
    """

    to_keras: Callable[[np.ndarray], np.ndarray]
    from_keras: Callable[[np.ndarray], np.ndarray]


def _transpose(*axes: int) -> Layout:
    return Layout(lambda array: array.transpose(axes), lambda array: array.transpose(np.argsort(axes)))


LAYOUTS: dict[str, Layout] = {
    "keep": Layout(lambda array: array, lambda array: array),
    "OIHW->HWIO": _transpose(2, 3, 1, 0),
    "C1HW->HWC1": _transpose(2, 3, 0, 1),
    "OI->IO": _transpose(1, 0),
}

"""The type of a tensor in a file: its shape, and a function that reads it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Stored(NamedTuple):
    """A tensor in a file.

    Args:
        shape: Tuple of integers.
        read: Function that returns the array.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Stored]

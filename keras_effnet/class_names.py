"""Names of the ImageNet classes, and the most likely classes of a prediction."""

import csv
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

FEW = 20  # classes
_TABLE = Path(__file__).with_name("imagenet_classes.csv")  # imagenet_classes.md has its sources and license


@cache
def classes() -> list[tuple[str, str]]:
    """Returns the ImageNet classes in the usual order.

    Returns:
        List of pairs (WordNet id, name). The names are torchvision's, such as `"tiger cat"`.
    """
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return [(row["wnid"], row["name"]) for row in csv.DictReader(file)]


def labels() -> list[str]:
    """Returns the names of the ImageNet classes in the usual order, as commands, exports and reports print them.

    Returns:
        List of strings.
    """
    return [name for _, name in classes()]


def decode_predictions(
    preds, top: int = 5, labels: Sequence[str] | None = None
) -> list[list[tuple[str | None, str, float]]]:
    """Names the most likely classes. Works offline.

    The names of ImageNet classes are those of `keras.applications`, such as `"tiger_cat"`. Two of Keras' names stand
    for two classes each, `"crane"` and `"maillot"`. Here, one of each pair has torchvision's name: `"crane_bird"` and
    `"maillot_tank_suit"`.

    Args:
        preds: Array or tensor, (batch, classes), as returned by a classifier.
        top: Integer, classes per row. Defaults to 5. If the model has fewer, all of them are returned.
        labels: List of the model's class names, such as `model.labels`, for a model of your own classes. Defaults to
            None: the 1000 ImageNet classes.

    Returns:
        List with a list per row of tuples (WordNet id, name, score), most likely first. With `labels`, the names are
        those of the list, unchanged, and the WordNet id is None.

    Raises:
        ValueError: If there is not one column per class, or `top` is not a positive integer.

    Example:

    >>> import numpy as np
    >>> decode_predictions(np.eye(1000)[[282]], top=1)
    [[('n02123159', 'tiger_cat', 1.0)]]
    >>> decode_predictions(np.array([[0.25, 0.75]]), labels=["my cat", "my dog"])
    [[(None, 'my dog', 0.75), (None, 'my cat', 0.25)]]
    """
    named = rank(preds, top, labels)
    if labels is None:
        named = [[(index, wnid, name.replace(" ", "_"), score) for index, wnid, name, score in row] for row in named]
    return [[(wnid, name, score) for _, wnid, name, score in row] for row in named]


def rank(preds, top: int = 5, labels: Sequence[str] | None = None) -> list[list[tuple[int, str | None, str, float]]]:
    """Names the most likely classes and their numbers. The names are those of `labels()`, or of the argument.

    Args:
        preds: See `decode_predictions()`.
        top: See `decode_predictions()`.
        labels: See `decode_predictions()`.

    Returns:
        List with a list per row of tuples (class number from 0, WordNet id or None, name, score), most likely first.

    Raises:
        ValueError: See `decode_predictions()`.
    """
    if not isinstance(preds, np.ndarray | Sequence):
        import keras

        preds = keras.ops.convert_to_numpy(preds)
    preds = np.asarray(preds)
    known = classes() if labels is None else [(None, str(label)) for label in labels]
    if preds.ndim != 2 or preds.shape[1] != len(known):
        expected = "the 1000 ImageNet classes" if labels is None else f"{len(known)} labels"
        hint = ". For other classes, pass their names, such as labels=model.labels" if labels is None else ""
        raise ValueError(f"Expected shape (batch, {len(known)}), for {expected}. Received: shape {preds.shape}{hint}")
    if not (isinstance(top, Integral) and top >= 1):
        raise ValueError(f"Expected top to be a positive integer. Received: top={top!r}")
    order = np.argsort(-preds, axis=1, kind="stable")[:, : int(top)]
    return [
        [(int(index), *known[index], float(row[index])) for index in best]
        for row, best in zip(preds, order, strict=True)
    ]


def names_of(metadata: dict[str, Any], classes: int) -> tuple[list[str], str | None]:
    """Returns the names that the classes of a model are shown with: its labels, else ImageNet's for 1000, else numbers.

    Args:
        metadata: See `keras_effnet.metadata()`.
        classes: Integer. Outputs of the model.

    Returns:
        Tuple of a list of strings, and a note that says where the names are missing or assumed, or None.
    """
    known = metadata.get("labels")
    if known is not None:
        return known, None
    if classes != 1000:
        return [str(number) for number in range(classes)], (
            "The model has no class names: these are class numbers. To add the names, save it with "
            "keras_effnet.save_model(model, path, labels=[...])"
        )
    note = None if metadata.get("weights") else "The model has 1000 classes without names: these are ImageNet's"
    return labels(), note


def returns_logits(run: Callable[[np.ndarray], Any], input_shape: Iterable[int]) -> bool:
    """Returns whether a classifier returns logits, by its outputs for noise, black and white.

    Args:
        run: Function from a float32 batch of images to the outputs.
        input_shape: Iterable of integers. The shape of an image.

    Returns:
        Boolean. False if the outputs are probabilities.
    """
    pixels = np.random.default_rng(0).uniform(0, 255, (3, *input_shape)).astype("float32")
    pixels[1], pixels[2] = 0, 255
    return not _are_shares(run(pixels))


def probabilities(outputs: np.ndarray, logits: Callable[[], bool]) -> np.ndarray:
    """Returns the outputs of a classifier as probabilities: unchanged if they are, else their softmax.

    Args:
        outputs: Float array (..., classes).
        logits: Function that returns whether the model returns logits, by its outputs for other images. It is called
            only if the outputs do not show it: the logits of a few classes may happen to lie between 0 and 1.

    Returns:
        Float array (..., classes).
    """
    if _are_shares(outputs) and not (outputs.shape[-1] < FEW and logits()):
        return outputs
    powers = np.exp(outputs - outputs.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _are_shares(outputs) -> bool:
    return bool(outputs.min() >= 0 and outputs.max() <= 1 + 1e-3)

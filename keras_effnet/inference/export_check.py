"""Checks an export: runs it and Keras on the same images, and measures how far they are apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet.inference import runtimes
from keras_effnet.inference.folding import numbers


def runner_of(path: Path, kind: str) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Opens an exported model.

    Args:
        path: Path of the exported file, or of the folder of a SavedModel or a page.
        kind: String. The format, see `export()`.

    Returns:
        Function from a float32 batch of images to the list of outputs.

    Raises:
        ImportError: If no runtime of the format is installed.
        ValueError: If the runtime cannot open the file.
    """
    if kind == "web":
        path = path / runtimes.WEB_MODEL
    if kind != "savedmodel":
        return runtimes.Pool(runtimes.of_file(path), path, runtimes.cores())
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(path)
    return lambda images: [np.asarray(each) for each in tf.nest.flatten(loaded.serve(images))]


def compare(
    model, path: Path, kind: str, tried: dict[str, np.ndarray], with_maps: keras.Model | None = None
) -> dict[str, Any]:
    """Measures how far the outputs of an export are from Keras'.

    Args:
        model: The Keras model.
        path: Path of the export.
        kind: String. The format of the export, see `export()`.
        tried: Dict of float32 batches of images by name.
        with_maps: The model whose last output are maps, if the export has them. Defaults to None.

    Returns:
        Dict with `difference`: for each name, the largest difference of an output, relative to its largest value in
        Keras. If the first output is (images, classes), also what `agreement()` returns for the last batch.

    Raises:
        ImportError: See `runner_of()`.
        ValueError: If the outputs have other shapes than in Keras.
    """
    run = runner_of(path, kind)
    difference: dict[str, float] = {}
    expected = found = np.zeros(0)
    for name, images in tried.items():
        # A few at a time: the first maps of the large models take a gigabyte for 20 images.
        parts = [images[place : place + 4] for place in range(0, len(images), 4)]
        rows = [[numbers(each) for each in keras.tree.flatten(model.predict_on_batch(part))] for part in parts]
        wanted = [np.concatenate(each).astype("float32") for each in zip(*rows, strict=True)]
        if with_maps is None:
            got = run(images)
        else:  # maps of a few images: they are large
            *got, maps = run(parts[0])
            rest = [run(part)[:-1] for part in parts[1:]]
            got = [np.concatenate(each) for each in zip(got, *rest, strict=True)]
            wanted_maps = numbers(keras.tree.flatten(with_maps.predict_on_batch(parts[0]))[-1])
            got, wanted = [*got, maps], [*wanted, wanted_maps.astype("float32")]
        if [each.shape for each in got] != [each.shape for each in wanted]:
            raise ValueError(
                f"Expected outputs of the same shapes as in Keras, {[each.shape for each in wanted]}. Received: "
                f"{[each.shape for each in got]} from the {kind} export of {model.name!r}. Nothing was saved"
            )
        pairs = list(zip(wanted, got, strict=True))
        difference[name] = float(np.max([np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) for a, b in pairs]))
        expected, found = pairs[0]
    report: dict[str, Any] = {"difference": difference}
    if expected.ndim == 2:
        report |= agreement(expected, found)
    return report


def agreement(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Measures how well the outputs of two models for the same images agree.

    Args:
        expected: Array (images, classes) of logits or probabilities.
        found: Array of the same shape.

    Returns:
        Dict with `top1_agreement` and `top5_overlap`, shares from 0 to 1, and `cosine`, the mean cosine of the logits.
        Logits are computed from probabilities up to a constant.
    """
    logits = [_logits(each) for each in (expected, found)]
    order = [np.argsort(-each, 1, kind="stable") for each in (expected, found)]
    count = min(5, expected.shape[1])
    shared = [len(np.intersect1d(a[:count], b[:count])) / count for a, b in zip(*order, strict=True)]
    lengths = np.linalg.norm(logits[0], axis=1) * np.linalg.norm(logits[1], axis=1)
    return {
        "top1_agreement": float(np.mean(order[0][:, 0] == order[1][:, 0])),
        "top5_overlap": float(np.mean(shared)),
        "cosine": float(np.mean((logits[0] * logits[1]).sum(1) / np.maximum(lengths, 1e-30))),
    }


def _logits(outputs: np.ndarray) -> np.ndarray:
    outputs = outputs.astype("float64")
    if (outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=0.02):
        outputs = np.log(np.maximum(outputs, 1e-9))
    return outputs - outputs.mean(1, keepdims=True)

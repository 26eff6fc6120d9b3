"""Datasets and losses that `fit` takes: the first batch, and the loss that suits a classifier."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_effnet import compat

# What the trainers here are given


def first(dataset: Any) -> tuple[Any, Any]:
    """Pixels and labels of a dataset's first batch.

    Args:
        dataset: What `keras.Model.fit()` takes: an iterable of batches, or a pair of arrays.

    Returns:
        Tuple of two arrays or tensors.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(dataset, tuple | list) and not any(isinstance(part, tuple | list) for part in dataset[:1]):
        batch = [part[:1] for part in dataset]
    elif isinstance(dataset, keras.utils.PyDataset):
        batch = dataset[0]
    elif isinstance(dataset, Iterable) and not isinstance(dataset, Iterator | tuple | list):
        batch = next(iter(dataset), None)
    else:
        raise ValueError(
            "Expected a pair of arrays (pixels, labels), or a dataset of batches of them that can be gone through "
            f"again. Received: {type(dataset).__name__}"
        )
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(f"Expected batches of (pixels, labels). Received: {type(batch).__name__}")
    return batch[0], batch[1]


def fit(runner: keras.Model, dataset: Any, batch_size: int, **kwargs) -> keras.callbacks.History:
    """`runner.fit()` on arrays or on batches."""
    first(dataset)
    if isinstance(dataset, tuple | list):
        arrays = dict(zip(("x", "y", "sample_weight"), dataset, strict=False))
        return runner.fit(**arrays, batch_size=batch_size, **kwargs)
    return runner.fit(dataset, **kwargs)


def loss_of(model: keras.Model, dataset: Any, loss: Any = None) -> Any:
    """What was asked for, or what the model is compiled with, or the cross-entropy that suits its output and labels.

    Args:
        model: A classifier.
        dataset: See `first()`.
        loss: A Keras loss, or None.

    Returns:
        A Keras loss, or its name.
    """
    loss = loss or getattr(model, "loss", None)
    if isinstance(loss, dict | list | tuple) and len(loss) == 1:
        (loss,) = loss.values() if isinstance(loss, dict) else loss
    if loss is not None:
        return loss
    shape, classes = first(dataset)[1].shape, model.output_shape[-1]
    activation = getattr(last_operation(model)[0], "activation", None)
    if classes == 1 or activation == keras.activations.sigmoid:
        return keras.losses.BinaryCrossentropy(from_logits=activation != keras.activations.sigmoid)
    one_hot = len(shape) > 1 and shape[-1] == classes
    kind = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
    return kind(from_logits=not ends_in_activation(model))


def last_operation(model: keras.Model):
    """The operation that puts a model's output out, inside of models that stand last, and its input."""
    output = model.outputs[0]
    operation = compat.producer(output)
    if isinstance(operation, keras.Model):
        return last_operation(operation)
    return operation, compat.inputs_of(output)[0]


def ends_in_activation(model: keras.Model) -> bool:
    operation, _ = last_operation(model)
    softmax = isinstance(operation, keras.layers.Softmax) or type(operation).__name__ == "Softmax"
    return softmax or getattr(operation, "activation", None) not in (
        None,
        keras.activations.linear,
    )

"""What `fit()` needs from a dataset and a classifier: the first batch, and a suitable loss."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_effnet import compat


def first(dataset: Any) -> tuple[Any, Any]:
    """Returns the pixels and labels of a dataset's first batch.

    Args:
        dataset: What `keras.Model.fit()` takes: an iterable of batches, or a pair of arrays.

    Returns:
        Tuple of two arrays or tensors.

    Raises:
        ValueError: If the dataset has no batch of pixels and labels, or can be iterated only once.
    """
    if isinstance(dataset, tuple | list) and not any(isinstance(part, tuple | list) for part in dataset[:1]):
        batch = [part[:1] for part in dataset]
    elif isinstance(dataset, keras.utils.PyDataset):
        batch = dataset[0]
    elif isinstance(dataset, Iterable) and not isinstance(dataset, Iterator | tuple | list):
        batch = next(iter(dataset), None)
    else:
        raise ValueError(
            "Expected a pair of arrays (pixels, labels), or a dataset of such batches that can be iterated more than "
            f"once. Received: {type(dataset).__name__}"
        )
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(f"Expected batches of (pixels, labels). Received: {type(batch).__name__}")
    return batch[0], batch[1]


def fit(runner: keras.Model, dataset: Any, batch_size: int, **kwargs) -> keras.callbacks.History:
    """Calls `runner.fit()` with arrays or with batches."""
    first(dataset)
    if isinstance(dataset, tuple | list):
        arrays = dict(zip(("x", "y", "sample_weight"), dataset, strict=False))
        return runner.fit(**arrays, batch_size=batch_size, **kwargs)
    return runner.fit(dataset, **kwargs)


def loss_of(model: keras.Model, dataset: Any, loss: Any = None) -> Any:
    """Returns the given loss, else the model's own, else the cross-entropy that suits its output and labels.

    Args:
        model: A classifier.
        dataset: See `first()`.
        loss: A Keras loss. Defaults to None.

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
    """Returns the operation that computes a model's output, and its input.

    If the last layer is itself a model, looks inside it.
    """
    output = model.outputs[0]
    operation = compat.producer(output)
    if isinstance(operation, keras.Model):
        return last_operation(operation)
    return operation, compat.inputs_of(output)[0]


def ends_in_activation(model: keras.Model) -> bool:
    """Returns whether a model's output passes through an activation, such as softmax."""
    operation, _ = last_operation(model)
    softmax = isinstance(operation, keras.layers.Softmax) or type(operation).__name__ == "Softmax"
    return softmax or getattr(operation, "activation", None) not in (None, keras.activations.linear)

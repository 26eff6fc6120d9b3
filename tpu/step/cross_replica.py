"""Layers that work across replicas: batch statistics over groups of replicas, dropout masks of the global batch."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras

ops: Any = keras.ops


@dataclass(frozen=True)
class Place:
    """The place of a replica among several, and how it exchanges values with the others.

    Args:
        count: Integer, number of replicas.
        index: Integer scalar tensor, number of this replica.
        sum: Function of a list of arrays. Returns their sums over all replicas.
        mean: Function of an array and the size of a group. Returns the mean over this replica's group.
        mask: Function of a seed, a rate, a shape and a dtype. Returns this replica's part of the mask that
            `keras.random.dropout` draws for the global batch. Defaults to None: each replica draws the whole mask.
    """

    count: int
    index: Any
    sum: Callable[[list[Any]], list[Any]]
    mean: Callable[[Any, int], Any]
    mask: Callable[[Any, float, tuple[int, ...], Any], Any] | None = None


_here: ContextVar[Place | None] = ContextVar("_here", default=None)


@contextlib.contextmanager
def at(place: Place | None) -> Iterator[None]:
    """Sets the place of the replica whose layers are called inside.

    Args:
        place: `Place`, or None if there is only one replica.

    Returns:
        Context manager.
    """
    token = _here.set(place)
    try:
        yield
    finally:
        _here.reset(token)


def group_size(replicas: int, choice: str | int = "auto") -> int:
    """Returns how many replicas share their batch statistics.

    Args:
        replicas: Integer, number of replicas.
        choice: `"auto"`, the original's rule: no groups up to 8 replicas, then groups of max(8, replicas / 8); `"all"`;
            or an integer that divides `replicas`. Defaults to `"auto"`.

    Returns:
        Integer, 1 if the replicas share nothing.

    Raises:
        ValueError: If the replicas cannot be divided into such groups.

    Example:

    >>> from keras_effnet.tpu.step.cross_replica import group_size
    >>> [group_size(replicas) for replicas in (1, 8, 16, 128)]
    [1, 1, 8, 16]

    Reference:
        tensorflow/tpu efficientnet utils.py:142-165.
    """
    if choice == "auto":
        size = max(8, replicas // 8) if replicas > 8 else 1
    else:
        size = replicas if choice == "all" else int(choice) if str(choice).isdecimal() else 0
    if size < 1 or replicas % size:
        raise ValueError(
            f"Expected a batch-norm group that divides the {replicas} replicas, 'auto' or 'all'. "
            f"Received: {choice!r}" + (f", which makes groups of {size}" if size else "")
        )
    return size


def group_mean(values, group: int):
    """Returns the mean over this replica's group.

    Args:
        values: Tensor.
        group: Integer, number of replicas that share their statistics.

    Returns:
        Tensor like `values`, unchanged if there is only one replica.
    """
    place = _here.get()
    return place.mean(values, group) if place and group > 1 else values


@keras.saving.register_keras_serializable("keras_effnet")
class GroupBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization with the statistics of a group of replicas: means of their means and of their mean squares.

    Args:
        group: Integer, number of replicas that share their statistics. Defaults to 1.
        one_pass: Boolean, whether to compute mean and mean square in one pass over the inputs, relative to the moving
            mean. Defaults to False: the mean first, then the variance about it.
        **kwargs: See `keras.layers.BatchNormalization`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.step.cross_replica import GroupBatchNormalization
    >>> tuple(GroupBatchNormalization(group=8)(keras.ops.ones((4, 2, 2, 3))).shape)
    (4, 2, 2, 3)

    Reference:
        tensorflow/tpu efficientnet utils.py:114-165.
    """

    def __init__(self, *, group: int = 1, one_pass: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.group = group
        self.one_pass = one_pass

    def get_config(self):
        """Returns the configuration, with `group` and `one_pass`."""
        return {**super().get_config(), "group": self.group, "one_pass": self.one_pass}

    def _moments(self, inputs, mask):
        # Relative to the moving mean: subtracting squares of large numbers would leave few digits.
        shift = ops.stop_gradient(ops.convert_to_tensor(self.moving_mean))
        if self.one_pass:
            shape = [1] * len(inputs.shape)
            shape[self.axis] = -1
            inputs = inputs - ops.reshape(shift, shape)
            parts = [ops.mean(inputs, self._reduction_axes), ops.mean(ops.square(inputs), self._reduction_axes)]
        else:
            mean, variance = ops.moments(inputs, axes=self._reduction_axes)
            parts = [mean - shift, variance + ops.square(mean - shift)]
        both = group_mean(ops.stack(parts), self.group)
        moved, square = both[0], both[1]
        return moved + shift, ops.maximum(square - ops.square(moved), 0.0)


@keras.saving.register_keras_serializable("keras_effnet")
class GlobalDropout(keras.layers.Dropout):
    """Dropout that draws the masks of the global batch, however many replicas share it.

    Args:
        *args: See `keras.layers.Dropout`.
        **kwargs: See `keras.layers.Dropout`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.step.cross_replica import GlobalDropout
    >>> float(GlobalDropout(0.5)(keras.ops.ones((1, 1)), training=False)[0, 0])
    1.0
    """

    def call(self, inputs, training=False):
        """Applies dropout in training.

        Args:
            inputs: Tensor whose first axis is the batch.
            training: Boolean. Defaults to False.

        Returns:
            Tensor like `inputs`.
        """
        place = _here.get()
        if not training or not self.rate or place is None:
            return super().call(inputs, training=training)
        shape = ops.shape(inputs)
        noise = self.noise_shape or [None] * len(shape)
        rest = [size or shape[axis] for axis, size in enumerate(noise)][1:]
        if place.mask:
            part = place.mask(self.seed_generator.next(), self.rate, (shape[0], *rest), inputs.dtype)
            return inputs * ops.stop_gradient(part)
        ones = ops.ones([shape[0] * place.count, *rest], inputs.dtype)
        mask = keras.random.dropout(ones, self.rate, seed=self.seed_generator)
        part = ops.slice(mask, [place.index * shape[0], *(0 for _ in rest)], [shape[0], *rest])
        return inputs * ops.stop_gradient(part)


def spread(
    model: keras.Model,
    group: int | None,
    instead: Mapping[type, type[keras.layers.Layer]] | None = None,
    one_pass: bool = False,
) -> keras.Model:
    """Returns the same model for one of several replicas, with batch normalization and dropout replaced.

    Args:
        model: A functional `keras.Model` of this package. The new model shares its other layers.
        group: Integer, number of replicas that share their batch statistics. None: there is only one replica.
        instead: Mapping from classes of layers to classes with the same variables that replace them. Defaults to None.
        one_pass: Boolean, see `GroupBatchNormalization`. Defaults to False.

    Returns:
        A `keras.Model` with variables of the same names and order.

    Example:

    >>> import keras_effnet as ke
    >>> from keras_effnet.tpu.step.cross_replica import spread
    >>> model = ke.EfficientNetLite0(weights=None, classes=10, input_shape=(32, 32, 3))
    >>> spread(model, 8).get_layer("stem_bn").group
    8
    """
    instead = instead or {}

    def replace(layer):
        config = layer.get_config()
        match layer:
            case keras.layers.BatchNormalization() if group or one_pass:
                new = GroupBatchNormalization.from_config({**config, "group": group or 1, "one_pass": one_pass})
            case keras.layers.Dropout() if group:
                new = GlobalDropout.from_config(config)
            case _ if type(layer) in instead:
                new = instead[type(layer)].from_config(config)
            case _:
                return layer
        new.trainable = layer.trainable
        return new

    copy: Any = keras.models.clone_model(model, clone_function=replace)
    for new, old in zip(copy.variables, model.variables, strict=True):
        new.assign(old)
    return copy

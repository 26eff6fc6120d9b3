"""Layers that see beyond their replica: batch statistics over groups of replicas, masks of the global batch."""

from typing import Any

import keras
import tensorflow as tf

ops: Any = keras.ops


def group_size(replicas: int, choice: str | int = "auto") -> int:
    """How many replicas share their batch statistics.

    Args:
        replicas: Integer, all of them.
        choice: `"auto"`: the original's rule, none up to 8 replicas and then groups of max(8, replicas / 8); `"all"`;
            or an integer that divides `replicas`. Defaults to `"auto"`.

    Returns:
        Integer, 1 where each is for itself.

    Raises:
        ValueError: If groups of this size are not possible.

    Example:

    >>> from keras_effnet.tpu.replicas import group_size
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
            f"Expected groups for batch normalisation that divide the {replicas} replicas, 'auto' or 'all'. "
            f"Received: {choice!r}" + (f", which makes groups of {size}" if size else "")
        )
    return size


@keras.saving.register_keras_serializable("keras_effnet")
class GroupBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation with the statistics of a group of replicas: means of their means and of their mean squares.

    Args:
        group: Integer, replicas that share their statistics. Defaults to 1.
        **kwargs: See `keras.layers.BatchNormalization`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.replicas import GroupBatchNormalization
    >>> GroupBatchNormalization(group=8)(keras.ops.ones((4, 2, 2, 3))).shape
    TensorShape([4, 2, 2, 3])

    Reference:
        tensorflow/tpu efficientnet utils.py:114-165.
    """

    def __init__(self, *, group: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.group = group

    def get_config(self):
        """The configuration, with the size of the group."""
        return {**super().get_config(), "group": self.group}

    def _moments(self, inputs, mask):
        mean, variance = ops.moments(inputs, axes=self._reduction_axes)
        # Relative to where the mean was: squares of large numbers, subtracted, would leave few digits.
        shift = ops.stop_gradient(ops.convert_to_tensor(self.moving_mean))
        moved = mean - shift
        moved, square = tf.unstack(_group_mean(tf.stack([moved, variance + ops.square(moved)]), self.group))
        return moved + shift, square - ops.square(moved)


def _group_mean(values, group: int):
    context: Any = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync if context else 1
    if group <= 1 or replicas == 1:
        return values
    if group == replicas:
        return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
    if isinstance(context.strategy, tf.distribute.TPUStrategy):
        groups = [list(range(start, start + group)) for start in range(0, replicas, group)]
        return tf.compat.v1.tpu.cross_replica_sum(values, groups) / group
    everyone = tf.ensure_shape(context.all_gather(values[None], axis=0), [replicas, *values.shape])
    first = context.replica_id_in_sync_group // group * group
    return tf.reduce_mean(tf.ensure_shape(everyone[first : first + group], [group, *values.shape]), axis=0)


@keras.saving.register_keras_serializable("keras_effnet")
class GlobalDropout(keras.layers.Dropout):
    """Dropout whose masks are those of the global batch, however many replicas share it.

    Args:
        *args: See `keras.layers.Dropout`.
        **kwargs: See `keras.layers.Dropout`.

    Example:

    >>> import keras
    >>> from keras_effnet.tpu.replicas import GlobalDropout
    >>> float(GlobalDropout(0.5)(keras.ops.ones((1, 1)), training=False)[0, 0])
    1.0
    """

    def call(self, inputs, training=False):
        """Drops in training.

        Args:
            inputs: Tensor whose first axis is the batch's.
            training: Boolean. Defaults to False.

        Returns:
            Tensor like `inputs`.
        """
        context: Any = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync if context else 1
        if not training or not self.rate or replicas == 1:
            return super().call(inputs, training=training)
        here = tf.shape(inputs)[0]
        noise = self.noise_shape or [None] * inputs.shape.rank
        rest = [size or tf.shape(inputs)[axis] for axis, size in enumerate(noise)]
        ones = tf.ones([here * replicas, *rest[1:]], inputs.dtype)
        mask = keras.random.dropout(ones, self.rate, seed=self.seed_generator)
        start = context.replica_id_in_sync_group * here
        begin = tf.stack([start] + [0] * (inputs.shape.rank - 1))
        part = tf.slice(mask, begin, tf.stack([here, *([-1] * (inputs.shape.rank - 1))]))
        return inputs * tf.stop_gradient(part)


def spread(model: keras.Model, group: int) -> keras.Model:
    """The same model for a replica among others. It shares all layers but batch normalisation and dropout.

    Args:
        model: A functional `keras.Model` of this package.
        group: Integer, replicas that share their batch statistics.

    Returns:
        A `keras.Model` with variables of the same names and order.

    Example:

    >>> import keras_effnet as ke
    >>> from keras_effnet.tpu.replicas import spread
    >>> model = ke.EfficientNetLite0(weights=None, classes=10, input_shape=(32, 32, 3))
    >>> spread(model, 8).get_layer("stem_bn").group
    8
    """

    def replace(layer):
        match layer:
            case keras.layers.BatchNormalization():
                new = GroupBatchNormalization.from_config({**layer.get_config(), "group": group})
            case keras.layers.Dropout():
                new = GlobalDropout.from_config(layer.get_config())
            case _:
                return layer
        new.trainable = layer.trainable
        return new

    copy: Any = keras.models.clone_model(model, clone_function=replace)
    for new, old in zip(copy.variables, model.variables, strict=True):
        new.assign(old)
    return copy

"""The moving average of what a model has learnt, batch-norm statistics included, with the original's arithmetic."""

from typing import Any

import keras

ops: Any = keras.ops


def decay_at(step, decay: float = 0.9999):
    """Share of the old average that a step keeps: small at first, so that the first values are soon forgotten.

    Args:
        step: Integer scalar, number of steps that are done: 1 after the first.
        decay: Float, what the share grows to. Defaults to 0.9999.

    Returns:
        Float32 scalar tensor, `min(decay, (1 + step) / (10 + step))`.

    Example:

    >>> from keras_effnet.tpu.step.moving_average import decay_at
    >>> round(float(decay_at(10)), 4)
    0.55

    Reference:
        tensorflow/tpu efficientnet main.py:425-428, with num_updates=global_step.
    """
    now = ops.cast(step, "float32")
    return ops.minimum(ops.cast(decay, "float32"), (1.0 + now) / (10.0 + now))


def average(averages, values, step, decay: float = 0.9999):
    """The averages after a step. They start as the values before the first one.

    Args:
        averages: List of arrays.
        values: List of arrays: trainable variables and the moving statistics of batch normalisation.
        step: Integer scalar, number of steps that are done, this one too.
        decay: Float, 0 for no average: the values. Defaults to 0.9999.

    Returns:
        List of arrays.

    Example:

    >>> import numpy as np
    >>> from keras_effnet.tpu.step.moving_average import average
    >>> round(float(average([np.float32(0)], [np.float32(1)], step=1)[0]), 4)
    0.8182
    """
    if not decay:
        return list(values)
    keep = decay_at(step, decay)
    return [old - (1.0 - keep) * (old - value) for old, value in zip(averages, values, strict=True)]

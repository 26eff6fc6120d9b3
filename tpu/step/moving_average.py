"""The moving average of all variables, batch-norm statistics included, with the original's arithmetic."""

from typing import Any

import keras

ops: Any = keras.ops


def decay_at(step, decay: float = 0.9999):
    """Returns the share of the old average that a step keeps. It starts small, so that early values fade quickly.

    Args:
        step: Integer scalar, number of steps done: 1 after the first.
        decay: Float, the largest share. Defaults to 0.9999.

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
    """Returns the averages after a step. They start as the values before the first step.

    Args:
        averages: List of arrays.
        values: List of arrays: trainable variables and the moving statistics of batch normalization.
        step: Integer scalar, number of steps done, including this one.
        decay: Float, the largest share of the old average. 0 returns the values. Defaults to 0.9999.

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

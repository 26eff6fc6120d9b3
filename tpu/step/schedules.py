"""Learning-rate schedules as pure functions of the step."""

import math
from dataclasses import dataclass

import numpy as np

from keras_effnet.errors import one_of
from keras_effnet.tpu.step.optimizers import ops

SHAPES = ("exponential", "cosine", "constant", "poly")


@dataclass(frozen=True)
class Schedule:
    """The learning rate at a step, in float32 as the original computes it.

    Args:
        peak: Float, learning rate at the end of the warm-up.
        steps_per_epoch: Float, images divided by the global batch, not rounded.
        total_steps: Integer, steps of the whole run.
        kind: `"exponential"`, `"cosine"`, `"constant"` or `"poly"`. Defaults to `"exponential"`.
        warmup_epochs: Float, epochs in which the learning rate grows linearly. Defaults to 5.
        warmup_start: Float, learning rate at step 0. Defaults to 0.
        decay_rate: Float, factor of the exponential decay. Defaults to 0.97.
        decay_epochs: Float, epochs between two applications of the factor, a staircase. Defaults to 2.4.
        decay_from: `"start"`, the decay counts from step 0, as in the original, so that the first step after the
            warm-up is already below the peak; or `"warmup"`, from the end of the warm-up. Defaults to `"start"`.
        per_epoch: Boolean, whether the learning rate changes only between epochs. The first epoch then has
            `warmup_start`, or the first of equal parts of the warm-up if that is 0. Defaults to False.

    Raises:
        ValueError: If there is no such `kind` or `decay_from`.

    Example:

    >>> from keras_effnet.tpu.step.schedules import Schedule
    >>> rate = Schedule(peak=0.128, steps_per_epoch=1281167 / 2048, total_steps=218949)
    >>> f"{float(rate(3126)):.6f} {float(rate(3127)):.6f}"
    '0.127959 0.120435'

    Reference:
        tensorflow/tpu efficientnet utils.py:37-80. `per_epoch`: NVIDIA DeepLearningExamples, optimizers.py:120-130;
        with `warmup_start`, timm's scheduler.
    """

    peak: float
    steps_per_epoch: float
    total_steps: int
    kind: str = "exponential"
    warmup_epochs: float = 5.0
    warmup_start: float = 0.0
    decay_rate: float = 0.97
    decay_epochs: float = 2.4
    decay_from: str = "start"
    per_epoch: bool = False

    def __post_init__(self):
        one_of("schedule", self.kind, SHAPES)
        one_of("decay_from", self.decay_from, ("start", "warmup"))

    def __call__(self, step):
        """Returns the learning rate of a step.

        Args:
            step: Integer scalar, from 0.

        Returns:
            Float32 scalar tensor.
        """
        now = ops.cast(step, "float32")
        # Everything below counts in steps, or with `per_epoch` in epochs.
        epoch, total = self.steps_per_epoch, self.total_steps
        warmup = int(self.warmup_epochs * epoch)
        if self.per_epoch:
            now, epoch, total, warmup = ops.floor(now / epoch), 1.0, total / epoch, self.warmup_epochs
        rate = self._decayed(now, epoch, total, warmup)
        if not warmup:
            return rate
        climbed = now + 1.0 if self.per_epoch and not self.warmup_start else now
        # In this order of operations the result equals TensorFlow's graph to the last bit.
        slope = np.float32(self.peak - self.warmup_start) * (np.float32(1) / np.float32(warmup))
        return ops.where(now < warmup, self.warmup_start + climbed * slope, rate)

    def _decayed(self, now, epoch, total, warmup):
        if self.kind == "poly":
            # The original's ends at 0.1, not at a share of the peak: utils.py:56-68.
            share = ops.clip(ops.maximum(now - warmup, 1.0) / (total - warmup + 1.0), 0.0, 1.0)
            height = ops.cast(self.peak, "float32") - ops.cast(0.1, "float32")
            return height * ops.square(1.0 - share) + 0.1
        if self.decay_from == "warmup":
            now, total = ops.maximum(now - warmup, 0.0), total - warmup
        if self.kind == "exponential":
            # In whole epochs, multiples of 2.4 occur, and float32's 2.4 is slightly larger.
            now = now + 1e-3 if self.per_epoch else now
            times = ops.floor(now / (self.decay_epochs * epoch))
            return self.peak * ops.power(ops.cast(self.decay_rate, "float32"), times)
        if self.kind == "cosine":
            return 0.5 * self.peak * (1.0 + ops.cos(math.pi * ops.minimum(now, total) / total))
        return ops.full((), self.peak, dtype="float32")

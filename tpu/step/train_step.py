"""One training step as pure functions of arrays, which every runner computes."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from keras_effnet.errors import one_of
from keras_effnet.tpu.step import losses, moving_average
from keras_effnet.tpu.step.cross_replica import Place, at
from keras_effnet.tpu.step.optimizers import Optimizer, is_classifier, is_kernel
from keras_effnet.tpu.step.schedules import Schedule

ops: Any = keras.ops

METRICS = ("loss", "top1", "top5")

# Those of a training step, whose loss includes the weight decay. `data_loss` does not.
TRAINING_METRICS = (*METRICS, "data_loss")

# Dynamic loss scaling: Micikevicius et al., arXiv 1710.03740. The first scale and the steps until it grows are those of
# keras.optimizers.LossScaleOptimizer, the largest scale is NVIDIA Apex'.
FIRST_SCALE, LARGEST_SCALE, GROWS_AFTER = 2.0**15, 2.0**24, 2000

# The variables that have weight decay.
DECAYED: dict[str, Callable[[keras.Variable], bool]] = {
    "no-batch-norm": lambda variable: variable.name not in ("gamma", "beta"),
    "all": lambda variable: True,
    "kernels": is_kernel,
}


class State(NamedTuple):
    """Everything that a step changes, except the number of steps.

    Args:
        trainable: List of arrays, in the order of `model.trainable_variables`.
        moving: List of arrays: the variables without gradients, such as the statistics of batch normalization.
        slots: List of dicts of arrays, the optimizer's state of each trainable variable.
        averages: List of arrays, the moving averages of `trainable` followed by `moving`.
        scaling: List of two scalars: the factor of the loss, and the number of steps since it has changed. Empty
            without loss scaling, as by default.
    """

    trainable: Sequence[Any]
    moving: Sequence[Any]
    slots: Sequence[dict[str, Any]]
    averages: Sequence[Any]
    scaling: Sequence[Any] = ()


@dataclass(frozen=True)
class Learner:
    """Loss, update and prediction of a model, for arrays that the caller holds.

    Args:
        model: A `keras.Model` that returns logits. A step neither reads nor changes its values.
        optimizer: An `Optimizer`.
        schedule: A `Schedule`.
        smoothing: Float, label smoothing. Defaults to 0.1.
        weight_decay: Float, factor of half the sum of squares in the loss. Defaults to 1e-5.
        decayed: The variables with weight decay: `"no-batch-norm"` for all but the gamma and beta of normalizations, as
            in the original; `"all"`; or `"kernels"`, without biases. Defaults to `"no-batch-norm"`.
        average_decay: Float, decay of the moving average. Defaults to 0.9999.
        body_scale: Float, factor of the learning rate for all variables but the classifier's. Defaults to 1.
        seed: Integer, seed of the masks of dropout and drop connect. Defaults to 0.
        class_weights: Tuple of floats, factors of the loss of each class in training. Defaults to None: 1 for all.
        scales_loss: Boolean, whether to scale the loss dynamically, for gradients in float16. Defaults to False.
        loss: Key of `losses.LOSSES`. Defaults to `"softmax"`.

    Reference:
        tensorflow/tpu efficientnet main.py:414-467.
    """

    model: keras.Model
    optimizer: Optimizer
    schedule: Schedule
    smoothing: float = 0.1
    weight_decay: float = 1e-5
    decayed: str = "no-batch-norm"
    average_decay: float = 0.9999
    body_scale: float = 1.0
    seed: int = 0
    class_weights: tuple[float, ...] | None = None
    scales_loss: bool = False
    loss: str = "softmax"

    @property
    def moving(self) -> list[keras.Variable]:
        """The variables without gradients, in the order of `State.moving`."""
        return [v for v in self.model.non_trainable_variables if not _is_seed(v)]

    def by_name(self, state: State) -> dict[str, dict[str, Any]]:
        """Names the arrays of a state by the paths of their variables.

        Args:
            state: `State`.

        Returns:
            Dict of the dicts `variables` and `averages`, by path; `slots`, by path, colon and name of the slot; and
            `scaling`, if the loss is scaled.
        """
        trainable = [v.path for v in self.model.trainable_variables]
        paths = [*trainable, *(v.path for v in self.moving)]
        found: dict[str, dict[str, Any]] = {
            "variables": dict(zip(paths, [*state.trainable, *state.moving], strict=True)),
            "averages": dict(zip(paths, state.averages, strict=True)),
            "slots": {
                f"{path}:{name}": value
                for path, slot in zip(trainable, state.slots, strict=True)
                for name, value in slot.items()
            },
        }
        if state.scaling:
            found["scaling"] = dict(zip(("scale", "steps"), state.scaling, strict=True))
        return found

    def start(self) -> State:
        """Returns the state before the first step, from the model's values.

        Returns:
            A `State` of arrays.
        """
        trainable = [ops.copy(v.value) for v in self.model.trainable_variables]
        moving = [ops.copy(v.value) for v in self.moving]
        scaling = [ops.full((), value, dtype="float32") for value in (FIRST_SCALE, 0.0) if self.scales_loss]
        return State(trainable, moving, self.optimizer.start(trainable), [*trainable, *moving], scaling)

    def logits(self, trainable, moving, images, step=None):
        """Runs the model and returns its logits in float32.

        Args:
            trainable: List of arrays.
            moving: List of arrays.
            images: Pixels 0-255 (batch, height, width, channels).
            step: Integer scalar, number of steps done before. It determines the masks, with the seed. None for a
                prediction.

        Returns:
            Tuple of the logits (batch, classes) and the new `moving`.
        """
        variables, values, seeds = self.model.non_trainable_variables, iter(moving), 0
        mapping = []
        for variable in variables:
            if _is_seed(variable):
                mapping.append(self._mask_seed(seeds, 0 if step is None else step, variable.dtype))
                seeds += 1
            else:
                mapping.append(next(values))
        logits, after = self.model.stateless_call(trainable, mapping, images, training=step is not None)
        after = [value for variable, value in zip(variables, after, strict=True) if not _is_seed(variable)]
        return ops.cast(logits, "float32"), after

    def _mask_seed(self, index: int, step, dtype):
        # By layer and step: a resumed run draws the masks that it would have drawn.
        key = zlib.crc32(f"{self.seed}/{index}".encode()) >> 1
        return ops.stack([ops.cast(key, dtype), ops.cast(step, dtype)])

    def train(
        self,
        state: State,
        images,
        labels,
        step,
        batch: int,
        gradient: Callable,
        place: Place | None = None,
    ) -> tuple[State, dict[str, Any]]:
        """Computes a complete training step of one replica.

        Args:
            state: The `State` before the step, the same on all replicas.
            images: Pixels 0-255 of this replica's part of the batch.
            labels: Class numbers (part,), or shares of classes (part, classes).
            step: Integer scalar, number of steps done before.
            batch: Integer, images in the global batch.
            gradient: Function of a function and its argument, a list of arrays. Returns the result of the function, a
                tuple that begins with a scalar, and the gradients of that scalar.
            place: `Place` of this replica among several. Defaults to None: there is only one.

        Returns:
            Tuple of the `State` after the step, the same on all replicas, and a dict of this replica's shares of
            `TRAINING_METRICS`.
        """
        count = place.count if place else 1

        def objective(trainable):
            loss, *others = self.objective(trainable, state.moving, images, labels, step, batch, count)
            return (loss * state.scaling[0] if state.scaling else loss, *others)

        with at(place):
            (_, moving, metrics), gradients = gradient(objective, state.trainable)
        if place:
            gradients, moving = place.sum(gradients), list(moving)
            # Batch statistics only: `moving` holds frozen variables too.
            places = [n for n, v in enumerate(self.moving) if v.name in ("moving_mean", "moving_variance")]
            for n, total in zip(places, place.sum([moving[n] for n in places]), strict=True):
                moving[n] = total / count
        if state.scaling:
            gradients = [g / state.scaling[0] for g in gradients]
        return self.update(state, gradients, moving, step), metrics

    def objective(self, trainable, moving, images, labels, step, batch: int, replicas: int = 1):
        """Returns this replica's share of the loss. The sum over all replicas is the loss of the global batch.

        Args:
            trainable: List of arrays.
            moving: List of arrays.
            images: Pixels 0-255 of this replica's part of the batch.
            labels: Class numbers (part,), or shares of classes (part, classes).
            step: Integer scalar, number of steps done before.
            batch: Integer, images in the global batch.
            replicas: Integer, number of replicas. Defaults to 1.

        Returns:
            Tuple of the loss, the new `moving`, and a dict of this replica's shares of `TRAINING_METRICS`.
        """
        logits, after = self.logits(trainable, moving, images, step)
        metrics = self._metrics(labels, logits, self.class_weights)
        metrics = {name: ops.sum(values) / batch for name, values in metrics.items()}
        metrics["data_loss"] = metrics["loss"]
        metrics["loss"] = metrics["loss"] + self.penalty(trainable) / replicas
        return metrics["loss"], after, metrics

    def _metrics(self, labels, logits, class_weights=None) -> dict[str, Any]:
        """`METRICS` of each example."""
        return {
            "loss": losses.LOSSES[self.loss](labels, logits, self.smoothing, class_weights),
            "top1": losses.hits(labels, logits, 1),
            "top5": losses.hits(labels, logits, 5),
        }

    def penalty(self, trainable):
        """Returns the term of the loss for the weight decay.

        Args:
            trainable: List of arrays.

        Returns:
            Float32 scalar tensor.
        """
        has_decay = DECAYED[one_of("decayed", self.decayed, DECAYED)]
        pairs = zip(self.model.trainable_variables, trainable, strict=True)
        return self.weight_decay * losses.l2([value for variable, value in pairs if has_decay(variable)])

    def update(self, state: State, gradients, moving, step) -> State:
        """Returns the state after a step.

        Args:
            state: The `State` before the step.
            gradients: List of arrays, gradients of the loss of the global batch.
            moving: List of arrays, new values of `State.moving`, the same on all replicas.
            step: Integer scalar, number of steps done before.

        Returns:
            A `State`.
        """
        variables = self.model.trainable_variables
        kernels = [is_kernel(v) for v in variables]
        scales = [1.0 if is_classifier(v) else self.body_scale for v in variables]
        trainable, slots = self.optimizer.step(
            gradients, state.trainable, state.slots, self.schedule(step), step + 1, kernels, scales
        )
        averages = moving_average.average(state.averages, [*trainable, *moving], step + 1, self.average_decay)
        after = State(trainable, moving, slots, averages)
        return _kept_finite(state, after, gradients) if state.scaling else after

    def score(self, trainable, moving, images, labels, weights):
        """Sums the metrics over a batch of an evaluation.

        Args:
            trainable: List of arrays.
            moving: List of arrays.
            images: Pixels 0-255 (batch, height, width, channels).
            labels: Class numbers (batch,).
            weights: Floats (batch,), 0 for examples that only fill up the batch.

        Returns:
            Dict of the sums of `METRICS`. The loss has no term for the weight decay and no weights of classes.
        """
        logits, _ = self.logits(trainable, moving, images)
        return {name: ops.sum(values * weights) for name, values in self._metrics(labels, logits).items()}


def _kept_finite(before: State, after: State, gradients) -> State:
    """Returns `after` with the next loss scale; or `before` with half the scale, if a gradient is not finite."""
    scale, steps = before.scaling
    finite = ops.all(ops.stack([ops.all(ops.isfinite(g)) for g in gradients]))
    # With nothing left to halve, the variables become what the gradients are, which ends the run with an error.
    taken = ops.logical_or(finite, scale <= 1.0)

    def chosen(new, old):
        if isinstance(new, dict):
            return {name: chosen(new[name], old[name]) for name in new}
        if isinstance(new, (list, tuple)):
            return [chosen(one, other) for one, other in zip(new, old, strict=True)]
        return ops.where(taken, new, old)

    grows = steps + 1 >= GROWS_AFTER
    larger = ops.where(grows, ops.minimum(scale * 2, LARGEST_SCALE), scale)
    scaling = [
        ops.where(finite, larger, ops.maximum(scale / 2, 1.0)),
        ops.where(ops.logical_and(finite, ops.logical_not(grows)), steps + 1, 0.0),
    ]

    def kept(name: str) -> Any:
        return chosen(getattr(after, name), getattr(before, name))

    return State(kept("trainable"), kept("moving"), kept("slots"), kept("averages"), scaling)


def _is_seed(variable) -> bool:
    return variable.name == "seed_generator_state"

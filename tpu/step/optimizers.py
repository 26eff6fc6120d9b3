"""Optimizers as pure functions of arrays, with the original's exact arithmetic.

They use only Keras' operations, so that every runner computes the same. An optimizer is a row of `OPTIMIZERS`: the
initial values of its slots, and the rule for a step of one variable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from keras_effnet.errors import one_of

ops: Any = keras.ops


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of all optimizers.

    Args:
        momentum: Float, share of the previous step that is kept (`beta_1` of Adam, AdamW and LAMB). Defaults to 0.9.
        decay: Float, decay of the mean of squared gradients (`beta_2` of Adam, AdamW and LAMB). Defaults to 0.9.
        epsilon: Float, keeps the divisor away from zero. Defaults to 1e-3.
        trust: Float, trust coefficient of LARS. Defaults to 1e-3.
        layer_decay: Float, weight decay inside AdamW, LARS and LAMB, which is not part of the loss. Defaults to 0.
    """

    momentum: float = 0.9
    decay: float = 0.9
    epsilon: float = 1e-3
    trust: float = 1e-3
    layer_decay: float = 0.0


@dataclass(frozen=True)
class Rule:
    """A row of `OPTIMIZERS`.

    Args:
        slots: Dict from the name of each slot, an array per variable, to its initial value.
        step: Function of the gradient, the variable, its slots, the learning rate, the `Hyperparameters`, the number
            of this step from 1, and whether the variable is a kernel. Returns the new variable and the new slots.
    """

    slots: dict[str, float]
    step: Callable[..., tuple[Any, dict[str, Any]]]


def _sgd(g, v, slots, rate, hyper, step, is_kernel):
    return v - rate * g, slots


def _momentum(g, v, slots, rate, hyper, step, is_kernel):
    momentum = hyper.momentum * slots["momentum"] + g
    return v - rate * momentum, {"momentum": momentum}


def _rmsprop(g, v, slots, rate, hyper, step, is_kernel):
    rms = slots["rms"] + (1 - hyper.decay) * (ops.square(g) - slots["rms"])
    momentum = hyper.momentum * slots["momentum"] + rate * g / ops.sqrt(rms + hyper.epsilon)
    return v - momentum, {"rms": rms, "momentum": momentum}


def _rmsprop_torch(g, v, slots, rate, hyper, step, is_kernel):
    rms = hyper.decay * slots["rms"] + (1 - hyper.decay) * ops.square(g)
    momentum = hyper.momentum * slots["momentum"] + g / (ops.sqrt(rms) + hyper.epsilon)
    return v - rate * momentum, {"rms": rms, "momentum": momentum}


def _adam(g, v, slots, rate, hyper, step, is_kernel):
    mean = hyper.momentum * slots["mean"] + (1 - hyper.momentum) * g
    square = hyper.decay * slots["square"] + (1 - hyper.decay) * ops.square(g)
    step = ops.cast(step, "float32")
    rate = rate * ops.sqrt(1 - ops.power(hyper.decay, step)) / (1 - ops.power(hyper.momentum, step))
    return v - rate * mean / (ops.sqrt(square) + hyper.epsilon), {"mean": mean, "square": square}


def _adamw(g, v, slots, rate, hyper, step, is_kernel):
    kept = v - rate * hyper.layer_decay * v if is_kernel else v
    return _adam(g, kept, slots, rate, hyper, step, is_kernel)


def _ratio(part, whole, otherwise: float = 1.0):
    """Returns `part / whole` where both are above zero, else `otherwise`."""
    safe = ops.where(whole > 0, whole, ops.ones_like(whole))
    return ops.where((part > 0) & (whole > 0), part / safe, ops.full_like(part, otherwise))


def _norm(x):
    return ops.sqrt(ops.sum(ops.square(x)))


def _lars(g, v, slots, rate, hyper, step, is_kernel):
    if is_kernel:
        size = _norm(v)
        rate = rate * _ratio(hyper.trust * size, _norm(g) + hyper.layer_decay * size)
        g = g + hyper.layer_decay * v
    momentum = hyper.momentum * slots["momentum"] + rate * g
    return v - momentum, {"momentum": momentum}


def _lamb(g, v, slots, rate, hyper, step, is_kernel):
    mean = hyper.momentum * slots["mean"] + (1 - hyper.momentum) * g
    square = hyper.decay * slots["square"] + (1 - hyper.decay) * ops.square(g)
    step = ops.cast(step, "float32")
    mean_now = mean / (1 - ops.power(hyper.momentum, step))
    square_now = square / (1 - ops.power(hyper.decay, step))
    change = mean_now / (ops.sqrt(square_now) + hyper.epsilon)
    if is_kernel:
        change = change + hyper.layer_decay * v
        rate = rate * _ratio(_norm(v), _norm(change))
    return v - rate * change, {"mean": mean, "square": square}


OPTIMIZERS = {
    "sgd": Rule({}, _sgd),
    "momentum": Rule({"momentum": 0.0}, _momentum),
    # tensorflow/tpu utils.py:83-101, TensorFlow 1's kernel: the mean square starts at 1, epsilon is under the root, and
    # the learning rate is inside the momentum.
    "rmsprop": Rule({"rms": 1.0, "momentum": 0.0}, _rmsprop),
    # tf.keras, as in NVIDIA's TensorFlow recipe: the mean square starts at 0.
    "rmsprop-keras": Rule({"rms": 0.0, "momentum": 0.0}, _rmsprop),
    # torch.optim.RMSprop, as in NVIDIA's PyTorch recipe and Composer's.
    "rmsprop-torch": Rule({"rms": 0.0, "momentum": 0.0}, _rmsprop_torch),
    # Kingma & Ba, arXiv 1412.6980. As in Keras, in the order of the end of section 2: epsilon is that text's
    # epsilon-hat, beside the uncorrected root.
    "adam": Rule({"mean": 0.0, "square": 0.0}, _adam),
    # Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, with the learning rate as eta * alpha. Kernels only decay.
    "adamw": Rule({"mean": 0.0, "square": 0.0}, _adamw),
    # You et al., arXiv 1708.03888. Biases and batch-norm variables take plain momentum steps, as in tensorflow/tpu.
    "lars": Rule({"momentum": 0.0}, _lars),
    # You et al., arXiv 1904.00962, algorithm 2.
    "lamb": Rule({"mean": 0.0, "square": 0.0}, _lamb),
}


class Optimizer:
    """Updates all variables of a model.

    Args:
        name: String, a row of `OPTIMIZERS`: `"rmsprop"`, as in the original, `"rmsprop-keras"`, `"rmsprop-torch"`,
            `"momentum"`, `"sgd"`, `"adam"`, `"adamw"`, `"lars"` or `"lamb"`. Defaults to `"rmsprop"`.
        hyper: `Hyperparameters`. Defaults to the original's.
        clip_norm: Float, largest global norm of the gradients, which are scaled down to it. Defaults to None.

    Raises:
        ValueError: If there is no such optimizer.

    Example:

    >>> import numpy as np
    >>> from keras_effnet.tpu.step.optimizers import Optimizer
    >>> optimizer = Optimizer("rmsprop")
    >>> slots = optimizer.start([np.ones(2, "float32")])
    >>> (new,), slots = optimizer.step([np.ones(2, "float32")], [np.ones(2, "float32")], slots, 0.1, 1, [True])
    >>> [round(float(value), 4) for value in new]
    [0.9, 0.9]

    Reference:
        tensorflow/tpu efficientnet utils.py:83-111.
    """

    def __init__(self, name: str = "rmsprop", hyper: Hyperparameters | None = None, clip_norm: float | None = None):
        self.rule = OPTIMIZERS[one_of("optimizer", name, OPTIMIZERS)]
        self.hyper, self.clip_norm = hyper or Hyperparameters(), clip_norm

    def start(self, variables) -> list[dict[str, Any]]:
        """Returns the slots of each variable before the first step.

        Args:
            variables: List of arrays.

        Returns:
            List of dicts from the name of a slot to an array of the variable's shape.
        """
        return [
            {name: ops.full(v.shape, value, dtype="float32") for name, value in self.rule.slots.items()}
            for v in variables
        ]

    def step(self, gradients, variables, slots, rate, step, is_kernel, scales=None):
        """Computes one step of all variables.

        Args:
            gradients: List of arrays, gradients of the loss of the global batch.
            variables: List of arrays.
            slots: List of dicts, as returned by `start()` or the previous step.
            rate: Scalar, learning rate.
            step: Integer scalar, number of this step, from 1.
            is_kernel: List of booleans, false for biases and batch-norm variables.
            scales: List of floats, a factor of the learning rate for each variable. Defaults to 1 for all.

        Returns:
            Tuple of the new variables and the new slots.
        """
        if self.clip_norm is not None:
            size = ops.sqrt(sum(ops.sum(ops.square(g)) for g in gradients))
            scale = ops.minimum(1.0, self.clip_norm / ops.maximum(size, 1e-30))
            gradients = [g * scale for g in gradients]
        rates = [rate if scale == 1 else rate * scale for scale in scales or [1.0] * len(variables)]
        done = [
            self.rule.step(g, v, kept, its_rate, self.hyper, step, kernel)
            for g, v, kept, its_rate, kernel in zip(gradients, variables, slots, rates, is_kernel, strict=True)
        ]
        return [new for new, _ in done], [kept for _, kept in done]


def is_kernel(variable: keras.Variable) -> bool:
    """Returns whether a variable is a kernel: neither a bias nor part of a normalization.

    Args:
        variable: A `keras.Variable` of a model of this package.

    Returns:
        Boolean.
    """
    return variable.name not in ("bias", "gamma", "beta")


def is_classifier(variable: keras.Variable) -> bool:
    """Returns whether a variable belongs to the classifier, the last layer.

    Args:
        variable: A `keras.Variable` of a model of this package.

    Returns:
        Boolean.
    """
    return "predictions" in variable.path.split("/")

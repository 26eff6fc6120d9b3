"""Initial values of a layer's variables, drawn with NumPy: equal on every backend, and with nothing to compile.

Keras draws each variable with random operations of the backend. JAX compiles them once per shape, which takes most of
the time to build keras.applications' B0 there (benchmarks/build.py).
"""

from copy import copy
from typing import Any

import keras
import numpy as np

VarianceScaling = keras.initializers.VarianceScaling


def kernel() -> VarianceScaling:
    """Returns the initializer of convolutions: normal with variance 2 / fan_out. A depthwise kernel has fan_out k * k.

    Returns:
        A Keras initializer.

    Reference:
        tensorflow/tpu efficientnet_model.py:61-83.
    """
    return VarianceScaling(2.0, "fan_out", "untruncated_normal")


def classifier() -> VarianceScaling:
    """Returns the initializer of the classifier: uniform within 1 / sqrt(classes).

    Returns:
        A Keras initializer.

    Reference:
        tensorflow/tpu efficientnet_model.py:86-103.
    """
    return VarianceScaling(1 / 3, "fan_out", "uniform")


def _on_device(values: Any) -> Any:
    """Returns an array as JAX puts it on its device. Other backends take arrays of NumPy as they are.

    `jax.numpy.asarray`, which Keras calls, compiles a copy for each new shape.
    """
    if keras.backend.backend() != "jax" or not isinstance(values, np.ndarray):
        return values
    import jax

    return jax.device_put(values)


class _Drawn(keras.initializers.Initializer):
    """Draws with NumPy the distribution of `declared`, a built-in Keras initializer."""

    def __init__(self, declared: keras.initializers.Initializer):
        self.declared = declared

    def __call__(self, shape, dtype=None):
        return _on_device(self.draw(shape, dtype))

    def draw(self, shape, dtype=None):
        """Returns the values as an array of NumPy, or of the backend for a distribution that only Keras draws."""
        dtype = keras.backend.standardize_dtype(dtype)
        match self.declared:
            case keras.initializers.Zeros():
                return np.zeros(shape, dtype)
            case keras.initializers.Ones():
                return np.ones(shape, dtype)
            case VarianceScaling(
                scale=scale, mode="fan_out" | "fan_avg" as mode, distribution=distribution, seed=int(seed)
            ):
                fans = shape[-1:] if mode == "fan_out" else shape[-2:]
                variance = scale / (float(np.prod(shape[:-2])) * float(np.mean(fans)))
                generator = np.random.default_rng(seed)
                if distribution == "untruncated_normal":
                    return (generator.standard_normal(shape, "float32") * np.float32(variance**0.5)).astype(dtype)
                if distribution == "uniform":
                    limit = np.float32((3 * variance) ** 0.5)
                    return ((2 * generator.random(shape, "float32") - 1) * limit).astype(dtype)
        return self.declared(shape, dtype=dtype)


def per_expert(initializer):
    """Returns a function that draws a stack of kernels, each as `initializer` draws a single one.

    Args:
        initializer: A Keras initializer. With a fixed seed it returns equal values for equal shapes. Each expert after
            the first therefore gets another seed, derived from that one.

    Returns:
        Function of a shape, whose first axis is that of the experts, and a dtype.
    """

    def draw(shape, dtype=None):
        experts = [_reseeded(initializer, expert) for expert in range(shape[0])]
        kernels: list[Any] = [getattr(expert, "draw", expert)(shape[1:], dtype=dtype) for expert in experts]
        if not isinstance(kernels[0], np.ndarray):
            return keras.ops.stack(kernels)
        return _on_device(np.stack(kernels))

    return draw


def _reseeded(initializer, step: int):
    if isinstance(initializer, _Drawn):
        return _Drawn(_reseeded(initializer.declared, step))
    seed = getattr(initializer, "seed", None)
    if step == 0 or not isinstance(seed, int):  # a SeedGenerator advances by itself
        return initializer
    # Not the next integers: other layers may have those as seeds.
    own = copy(initializer)
    own.seed = int(np.random.SeedSequence((seed % 2**32, step)).generate_state(1)[0] >> 1)
    return own


def apply(layer: keras.Layer, inputs, *, empty: bool = False, **arguments: Any):
    """Calls a new layer, with its variables drawn by NumPy.

    The layer keeps its built-in initializers. Its configuration therefore holds nothing of this package, and a saved
    model loads wherever Keras does. Seeds come from Keras: `keras.utils.set_random_seed()` applies.

    Args:
        layer: A Keras layer that has not been called.
        inputs: Keras tensor or list of them.
        empty: Boolean, whether the variables start from zeros, as they are assigned next. Defaults to False.
        **arguments: Arguments of the call.

    Returns:
        The layer's output.
    """
    declared = {
        name: value for name, value in vars(layer).items() if name.endswith("_initializer") and value is not None
    }
    for name, initializer in declared.items():
        setattr(layer, name, _Drawn(keras.initializers.Zeros() if empty else initializer))
    outputs = layer(inputs, **arguments)
    for name, initializer in declared.items():
        setattr(layer, name, initializer)
    return outputs

"""First values of a layer's variables, drawn with NumPy: the same on every backend, and nothing to compile.

Keras draws each variable with the backend's random operations, which JAX compiles once per shape: most of the time
that keras.applications' B0 takes to build there (benchmarks/build.py).
"""

import keras
import numpy as np

VarianceScaling = keras.initializers.VarianceScaling


def kernel() -> VarianceScaling:
    """Normal with variance 2 / fan_out, as in tensorflow/tpu efficientnet_model.py:61-83 (a depthwise kernel's fan_out is k * k)."""
    return VarianceScaling(2.0, "fan_out", "untruncated_normal")


def classifier() -> VarianceScaling:
    """Uniform within 1 / sqrt(classes), as in tensorflow/tpu efficientnet_model.py:86-103."""
    return VarianceScaling(1 / 3, "fan_out", "uniform")


class _Drawn(keras.initializers.Initializer):
    """Draws what `declared`, a built-in Keras initializer, stands for."""

    def __init__(self, declared: keras.initializers.Initializer):
        self.declared = declared

    def __call__(self, shape, dtype=None):
        dtype = keras.backend.standardize_dtype(dtype)
        if isinstance(self.declared, keras.initializers.Zeros | keras.initializers.Ones):
            return np.full(shape, float(isinstance(self.declared, keras.initializers.Ones)), "float32").astype(dtype)
        if not isinstance(self.declared, VarianceScaling):
            return self.declared(shape, dtype=dtype)
        config = self.declared.get_config()
        fan_out = float(np.prod(shape[:-2]) * shape[-1])
        if config["mode"] != "fan_out":
            return self.declared(shape, dtype=dtype)
        variance = config["scale"] / max(1.0, fan_out)
        generator = np.random.default_rng(self.declared.seed)
        match config["distribution"]:
            case "untruncated_normal":
                values = generator.standard_normal(shape, "float32") * np.float32(variance**0.5)
            case "uniform":
                values = (2 * generator.random(shape, "float32") - 1) * np.float32((3 * variance) ** 0.5)
            case _:
                return self.declared(shape, dtype=dtype)
        return values.astype(dtype)


def apply(layer: keras.Layer, inputs):
    """`layer(inputs)`, with the variables of a new layer drawn by NumPy.

    The layer keeps the built-in initializers that it was made with, so that its configuration holds nothing of this
    package and a saved model loads wherever Keras does. Seeds are Keras' own: `keras.utils.set_random_seed` holds.

    Args:
        layer: A Keras layer that was not called before.
        inputs: Keras tensor or list of them.

    Returns:
        The layer's output.
    """
    declared = {name: value for name, value in vars(layer).items() if name.endswith("_initializer") and value is not None}
    for name, initializer in declared.items():
        setattr(layer, name, _Drawn(initializer))
    outputs = layer(inputs)
    for name, initializer in declared.items():
        setattr(layer, name, initializer)
    return outputs

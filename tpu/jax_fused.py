"""Layers of a training step that belong together, each with a gradient of its own that reads images less often.

Same variables, same mathematics; what each saves on a TPU is in benchmarks/tpu_traffic.md.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_effnet import blocks
from keras_effnet.tpu.replicas import GroupBatchNormalization, group_mean

_IMAGE = (0, 1, 2)  # the axes that batch statistics are over


class _Unit(keras.Layer):
    """Layers that follow each other, as one. It has their variables, and is one of them in training only.

    Args:
        layers: List of built layers, in the order of the model.
    """

    def __init__(self, layers: list[Any]):
        super().__init__(name=f"{layers[0].name}_unit", dtype=layers[0].dtype_policy)
        self.parts = layers
        self.built = True

    def call(self, inputs, training=False):
        """The layers' outputs, with batch statistics in training.

        Args:
            inputs: Tensor (batch, height, width, channels).
            training: Boolean. Defaults to False.

        Returns:
            Tensor (batch, height, width, channels).
        """
        inputs = keras.ops.cast(inputs, self.compute_dtype)
        return self._trained(inputs) if training else self._plain(inputs)

    def _plain(self, x):
        raise NotImplementedError

    def _trained(self, x):
        raise NotImplementedError

    def compute_output_shape(self, input_shape):
        raise NotImplementedError


def _remembered(norm, outputs, mean, variance):
    """The outputs, once the moving statistics are what Keras makes of these."""
    for moving, value in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
        moving.assign(moving * norm.momentum + value * (1.0 - norm.momentum))
    return outputs


def _wide(x):
    """Float32, or what is wider already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _statistics(x, shift, group: int):
    """Mean and variance over a group of replicas, in one pass over the images."""
    moved = _wide(x) - shift
    both = jnp.stack([jnp.mean(moved, _IMAGE), jnp.mean(jnp.square(moved), _IMAGE)])
    moved, square = group_mean(both, group)
    return moved + shift, jnp.maximum(square - jnp.square(moved), 0.0)


def _normalized(x, mean, variance, gamma, beta, epsilon):
    scale = gamma * jax.lax.rsqrt(variance + epsilon)
    return (_wide(x) * scale + (beta - mean * scale)).astype(x.dtype)


class ExpandUnit(_Unit):
    """A convolution of 1 x 1, batch normalisation and activation.

    Batch normalisation's gradient is linear in the convolution's output, which is linear in the input: what would be
    read at each place again becomes small matrices.

    Args:
        layers: List of the convolution, batch normalisation and activation.
    """

    def _plain(self, x):
        convolution, norm, activation = self.parts
        return activation(norm(convolution(x), training=False))

    def _trained(self, x):
        convolution, norm, activation = self.parts
        kernel = convolution.kernel.value[0, 0].astype(self.compute_dtype)
        how = activation.activation, norm.epsilon, norm.group
        told: Any = _expanded(how, x, kernel, norm.gamma.value, norm.beta.value, norm.moving_mean.value)
        return _remembered(norm, *told)

    def compute_output_shape(self, input_shape):
        """Shape of the outputs.

        Args:
            input_shape: Tuple.

        Returns:
            Tuple.
        """
        return (*input_shape[:3], self.parts[0].filters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expanded(how, x, kernel, gamma, beta, shift):
    return _expand(how, x, kernel, gamma, beta, shift)[0]


def _expand(how, x, kernel, gamma, beta, shift):
    activation, epsilon, group = how
    y = _pointwise(x, kernel)
    mean, variance = _statistics(y, shift, group)
    z = activation(_normalized(y, mean, variance, gamma, beta, epsilon))
    return (z, mean, variance), (x, kernel, gamma, beta, y, mean, variance)


def _pointwise(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", dimension_numbers=layout)


def _over_places(a, b):
    """Sums of products over all places: (a's channels, b's channels), not in a low precision."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, ((_IMAGE, _IMAGE), ((), ())), preferred_element_type=wide)


def _expand_back(how, kept, gradients):
    activation, epsilon, group = how
    x, kernel, gamma, beta, y, mean, variance = kept
    places = y.size / y.shape[-1]
    root = jax.lax.rsqrt(variance + epsilon)
    scale, low = gamma * root, x.dtype
    _, back = jax.vjp(activation, _normalized(y, mean, variance, gamma, beta, epsilon))
    (du,) = back(gradients[0])
    wide = _wide(du)
    s1 = jnp.sum(wide, _IMAGE)
    s2 = jnp.sum(wide * ((_wide(y) - mean) * root), _IMAGE)
    mean1, mean2 = group_mean(jnp.stack([s1, s2]) / places, group)
    # d loss / dy = scale * du - scale * mean1 - (y - mean) * slope, and y = x @ kernel.
    slope = root * scale * mean2
    weights, inputs = _wide(kernel), jnp.sum(_wide(x), _IMAGE)
    d_kernel = (
        _over_places(x, du) * scale
        - jnp.outer(inputs, scale * mean1)
        - (_over_places(x, x) @ weights - jnp.outer(inputs, mean)) * slope
    )
    constant = weights @ (mean * slope - scale * mean1)
    dx = (
        _pointwise(du, (weights * scale).T.astype(low))
        - _pointwise(x, ((weights * slope) @ weights.T).astype(low))
        + constant.astype(low)
    )
    return dx, d_kernel.astype(kernel.dtype), s2, s1, jnp.zeros_like(mean)


_expanded.defvjp(_expand, _expand_back)


class ExciteUnit(_Unit):
    """Batch normalisation, activation, and squeeze-and-excite.

    Batch normalisation's sums behind the gate are put together from sums over each image, which need no pass of their
    own.

    Args:
        layers: List of batch normalisation, activation, the pool, the two convolutions of the gate, and the product.
    """

    def _plain(self, x):
        norm, activation, pool, reduce, expand, multiply = self.parts
        x = activation(norm(x, training=False))
        return multiply([x, expand(reduce(pool(x)))])

    def _trained(self, x):
        norm, activation, _, reduce, expand, _ = self.parts
        gate = [layer.activation for layer in (reduce, expand)]
        variables = [v.value for layer in (reduce, expand) for v in (layer.kernel, layer.bias)]
        how = activation.activation, tuple(gate), norm.epsilon, norm.group
        told: Any = _excited(how, x, norm.gamma.value, norm.beta.value, variables, norm.moving_mean.value)
        return _remembered(norm, *told)

    def compute_output_shape(self, input_shape):
        """Shape of the outputs.

        Args:
            input_shape: Tuple.

        Returns:
            Tuple.
        """
        return input_shape


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _excited(how, x, gamma, beta, gate, shift):
    return _excite(how, x, gamma, beta, gate, shift)[0]


def _gate(activations, pooled, variables):
    """The two convolutions, on one place of each image."""
    kernels, biases = variables[0::2], variables[1::2]
    for activation, kernel, bias in zip(activations, kernels, biases, strict=True):
        pooled = activation(pooled @ kernel[0, 0].astype(pooled.dtype) + bias.astype(pooled.dtype))
    return pooled


def _excite(how, x, gamma, beta, gate, shift):
    activation, activations, epsilon, group = how
    mean, variance = _statistics(x, shift, group)
    a = activation(_normalized(x, mean, variance, gamma, beta, epsilon))
    pooled = jnp.mean(_wide(a), (1, 2)).astype(a.dtype)
    share = _gate(activations, pooled, gate)
    kept = (x, gamma, beta, gate, mean, variance, pooled, share)
    return (a * share[:, None, None], mean, variance), kept


def _excite_back(how, kept, gradients):
    activation, activations, epsilon, group = how
    x, gamma, beta, gate, mean, variance, pooled, share = kept
    dz, low, places = gradients[0], x.dtype, x.size / x.shape[-1]
    area = x.shape[1] * x.shape[2]
    root = jax.lax.rsqrt(variance + epsilon)
    scale = gamma * root
    u = _normalized(x, mean, variance, gamma, beta, epsilon)
    a, back = jax.vjp(activation, u)
    (slope,) = back(jnp.ones_like(u))

    # In float32 these sums are taken while `dz` is computed; in bfloat16 the compiler makes passes of them.
    def total(value):
        return jnp.sum(value, (1, 2))

    wide, steep, images = map(_wide, (dz, slope, x))
    q = wide * steep
    sums = [total(value) for value in (q, q * images, steep, steep * images)]
    d_share = total(wide * _wide(a))
    _, gate_back = jax.vjp(functools.partial(_gate, activations), pooled, gate)
    d_pooled, d_gate = gate_back(d_share.astype(low))
    spread, shares = _wide(d_pooled) / area, _wide(share)
    first, second = (jnp.sum(shares * sums[n] + spread * sums[n + 2], 0) for n in (0, 1))
    s1, s2 = first, (second - mean * first) * root
    mean1, mean2 = group_mean(jnp.stack([s1, s2]) / places, group)
    k2 = -root * scale * mean2
    k1 = -mean * k2 - scale * mean1
    du = (dz * share[:, None, None] + spread.astype(low)[:, None, None]) * slope
    dx = du * scale.astype(low) + x * k2.astype(low) + k1.astype(low)
    return dx, s2, s1, d_gate, jnp.zeros_like(mean)


_excited.defvjp(_excite, _excite_back)

# The units, and their parts' names in a block of `blocks.mbconv()`.
UNITS: dict[str, tuple[Callable[[list[Any]], _Unit], tuple[str, ...]]] = {
    "expand": (ExpandUnit, ("expand_conv", "expand_bn", "expand_activation")),
    "excite": (ExciteUnit, ("bn", "activation", "se_squeeze", "se_reduce", "se_expand", "se_excite")),
}


def fuse(model: keras.Model, units: Iterable[str] | None = None) -> keras.Model:
    """The same model with layers that belong together as one.

    Args:
        model: A functional `keras.Model` of this package, whose batch normalisations are `GroupBatchNormalization`.
        units: Names of `UNITS`. Defaults to all.

    Returns:
        A `keras.Model` with the same variables in the same order.

    Example:

    >>> model = fuse(spread(model, 1, one_pass=True))  # doctest: +SKIP
    """
    named = blocks.read(model).layers
    starts: dict[str, _Unit] = {}
    inside: set[str] = set()
    for place in dict.fromkeys(name.split("_")[0] for name in named if name.startswith("block")):
        for make, parts in (UNITS[unit] for unit in (UNITS if units is None else units)):
            layers: list[Any] = [named.get(f"{place}_{part}") for part in parts]
            if all(map(_is_plain, layers)):
                starts[layers[0].name] = make(layers)
                inside |= {layer.name for layer in layers[1:]}

    def call(layer, *args, **kwargs):
        if layer.name in starts:
            return starts[layer.name](*args)
        if layer.name in inside:
            return keras.tree.flatten(args)[0]
        return layer(*args, **kwargs)

    fused: Any = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    if [v.path for v in fused.variables] != [v.path for v in model.variables]:
        raise ValueError("Expected a model whose layers follow each other. Received: variables in another order")
    return fused


def _is_plain(layer) -> bool:
    """Whether a layer is there, is trained, and is what a unit takes: no mixed experts, the channels last."""
    match layer:
        case GroupBatchNormalization():
            return layer.one_pass and layer.trainable and layer.scale and layer.center
        case keras.layers.Conv2D():
            return layer.trainable and layer.data_format == "channels_last" and set(layer.kernel_size) == {1}
        case keras.layers.Activation() | keras.layers.GlobalAveragePooling2D() | keras.layers.Multiply():
            return True
    return False

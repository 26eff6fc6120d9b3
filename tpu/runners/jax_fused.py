"""Groups of layers fused into one for training, with custom gradients that read the images fewer times.

The variables and the mathematics are unchanged. The savings on a TPU are in docs/tpu.md.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_effnet.nets import inspection
from keras_effnet.tpu.runners import jax_kernels
from keras_effnet.tpu.runners.jax_convolutions import over_places, pointwise, wide
from keras_effnet.tpu.step.cross_replica import GroupBatchNormalization, group_mean

_IMAGE = (0, 1, 2)  # the axes that batch statistics reduce


class _Unit(keras.Layer):
    """A sequence of layers, fused in training only. It owns their variables.

    Args:
        layers: List of built layers, in the order of the model.
        interpret: Boolean, whether JAX interprets TPU kernels. Defaults to False.
    """

    needs_tpu = False
    sizes = frozenset({1})  # kernel sizes that its convolutions may have

    def __init__(self, layers: list[Any], interpret: bool = False):
        super().__init__(name=f"{layers[0].name}_unit", dtype=layers[0].dtype_policy)
        self.parts = layers
        self.interpret = interpret
        self.built = True

    def call(self, inputs, training=False):
        """Computes the outputs of the layers, with batch statistics in training.

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
    """Updates the moving statistics as Keras does, and returns the outputs."""
    for moving, value in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
        moving.assign(moving * norm.momentum + value * (1.0 - norm.momentum))
    return outputs


def _statistics(x, shift, group: int):
    """Returns mean and variance over a group of replicas, in one pass over the images."""
    moved = wide(x) - shift
    both = jnp.stack([jnp.mean(moved, _IMAGE), jnp.mean(jnp.square(moved), _IMAGE)])
    moved, square = group_mean(both, group)
    return moved + shift, jnp.maximum(square - jnp.square(moved), 0.0)


def _normalized(x, mean, variance, gamma, beta, epsilon):
    scale = gamma * jax.lax.rsqrt(variance + epsilon)
    return (wide(x) * scale + (beta - mean * scale)).astype(x.dtype)


class ExpandUnit(_Unit):
    """A 1 x 1 convolution, batch normalization and activation.

    The gradient of batch normalization is linear in the convolution's output, which is linear in its input. So small
    matrices replace another pass over the images.

    Args:
        layers: List of the convolution, batch normalization and activation.
    """

    def _plain(self, x):
        return _plain_expand(self.parts, x)

    def _trained(self, x):
        how, values = _of_expand(self.parts, self.compute_dtype)
        outputs, *statistics = _expanded(how, x, *values)  # type: ignore[misc]
        return _remembered(self.parts[1], outputs, *statistics)

    def compute_output_shape(self, input_shape):
        """Returns the shape of the outputs.

        Args:
            input_shape: Tuple.

        Returns:
            Tuple.
        """
        return self.parts[0].compute_output_shape(input_shape)


def _plain_expand(parts, x):
    convolution, norm, activation = parts
    return activation(norm(convolution(x), training=False))


def _of_expand(parts, dtype):
    """Returns the static configuration of an expansion, and its arrays."""
    convolution, norm, activation = parts
    kernel = convolution.kernel.value.astype(dtype)
    values = norm.gamma.value, norm.beta.value, norm.moving_mean.value
    return (activation.activation, norm.epsilon, norm.group, tuple(convolution.strides)), (kernel, *values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expanded(how, x, kernel, gamma, beta, shift):
    return _expand(how, x, kernel, gamma, beta, shift)[0]


def _expand(how, x, kernel, gamma, beta, shift):
    activation, epsilon, group, strides = how
    y = _convolved(x, kernel, strides)
    mean, variance = _statistics(y, shift, group)
    z = activation(_normalized(y, mean, variance, gamma, beta, epsilon))
    return (z, mean, variance), (x, kernel, gamma, beta, y, mean, variance)


def _convolved(x, kernel, strides) -> Any:
    return keras.ops.conv(x, kernel, strides, "same", data_format="channels_last")


def _expand_back(how, kept, gradients):
    activation, epsilon, _, _ = how
    _, _, gamma, beta, y, mean, variance = kept
    root = jax.lax.rsqrt(variance + epsilon)
    _, back = jax.vjp(activation, _normalized(y, mean, variance, gamma, beta, epsilon))
    (du,) = back(gradients[0])
    s1 = jnp.sum(wide(du), _IMAGE)
    s2 = jnp.sum(wide(du) * ((wide(y) - mean) * root), _IMAGE)
    return _expand_behind(how, kept, du, s1, s2)


def _expand_behind(how, kept, du, s1, s2):
    """Returns all gradients from the gradient of the activation's input and its sums."""
    _, epsilon, group, strides = how
    x, kernel, gamma, _, y, mean, variance = kept
    places = y.size / y.shape[-1]
    root = jax.lax.rsqrt(variance + epsilon)
    scale, low = gamma * root, x.dtype
    mean1, mean2 = group_mean(jnp.stack([s1, s2]) / places, group)
    # d loss / dy = scale * du - scale * mean1 - (y - mean) * slope, and for a 1 x 1 kernel, y = x @ kernel.
    slope = root * scale * mean2
    if kernel.shape[:2] != (1, 1):
        dy = (wide(du) * scale - wide(y) * slope + (mean * slope - scale * mean1)).astype(low)
        _, back = jax.vjp(functools.partial(_convolved, strides=strides), x, kernel)
        return *back(dy), s2, s1, jnp.zeros_like(mean)
    weights, inputs = wide(kernel[0, 0]), jnp.sum(wide(x), _IMAGE)
    d_kernel = (
        over_places(x, du) * scale
        - jnp.outer(inputs, scale * mean1)
        - (over_places(x, x) @ weights - jnp.outer(inputs, mean)) * slope
    )
    constant = weights @ (mean * slope - scale * mean1)
    dx = (
        pointwise(du, (weights * scale).T.astype(low))
        - pointwise(x, ((weights * slope) @ weights.T).astype(low))
        + constant.astype(low)
    )
    return dx, d_kernel.astype(kernel.dtype).reshape(kernel.shape), s2, s1, jnp.zeros_like(mean)


_expanded.defvjp(_expand, _expand_back)


class ExciteUnit(_Unit):
    """Batch normalization, activation, and squeeze-and-excite.

    The sums that the gradient of batch normalization needs behind the gate are built from sums over each image, which
    take no extra pass.

    Args:
        layers: List of batch normalization, activation, the pooling, the two convolutions of the gate, and the product.
    """

    def _plain(self, x):
        return _plain_excite(self.parts, x)

    def _trained(self, x):
        how, values = _of_excite(self.parts)
        outputs, *statistics = _excited(how, x, *values)  # type: ignore[misc]
        return _remembered(self.parts[0], outputs, *statistics)

    def compute_output_shape(self, input_shape):
        """Returns the shape of the outputs.

        Args:
            input_shape: Tuple.

        Returns:
            Tuple.
        """
        return input_shape


def _plain_excite(parts, x):
    norm, activation, pool, reduce, expand, multiply = parts
    x = activation(norm(x, training=False))
    return multiply([x, expand(reduce(pool(x)))])


def _of_excite(parts):
    """Returns the static configuration of the layers after a depthwise convolution, and their arrays."""
    norm, activation, _, reduce, expand, _ = parts
    gate = tuple(layer.activation for layer in (reduce, expand))
    variables = [v.value for layer in (reduce, expand) for v in (layer.kernel, layer.bias)]
    values = norm.gamma.value, norm.beta.value, variables, norm.moving_mean.value
    return (activation.activation, gate, norm.epsilon, norm.group), values


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _excited(how, x, gamma, beta, gate, shift):
    return _excite(how, x, gamma, beta, gate, shift)[0]


def _gate(activations, pooled, variables):
    """Applies the gate's two convolutions to the pooled images."""
    kernels, biases = variables[0::2], variables[1::2]
    for activation, kernel, bias in zip(activations, kernels, biases, strict=True):
        pooled = activation(pooled @ kernel[0, 0].astype(pooled.dtype) + bias.astype(pooled.dtype))
    return pooled


def _excite(how, x, gamma, beta, gate, shift):
    activation, activations, epsilon, group = how
    mean, variance = _statistics(x, shift, group)
    a = activation(_normalized(x, mean, variance, gamma, beta, epsilon))
    pooled = jnp.mean(wide(a), (1, 2)).astype(a.dtype)
    share = _gate(activations, pooled, gate)
    kept = (x, gamma, beta, gate, mean, variance, pooled, share)
    return (a * share[:, None, None], mean, variance), kept


def _excite_back(how, kept, gradients):
    outer, slope, others = _excite_ahead(how, kept, gradients[0])
    return _excite_through(outer, slope, kept[0], gradients[0]), *others


def _excite_through(outer, slope, x, dz):
    """Returns the gradient of batch normalization's input."""
    share, spread, scale, k2, k1 = (value.astype(x.dtype) for value in (outer.share, outer.spread, *outer[2:5]))
    du = (dz * share[:, None, None] + spread[:, None, None]) * slope
    return du * scale + x * k2 + k1


def _excite_ahead(how, kept, dz):
    """Returns what `_excite_through()` needs, the activation's slope, and all gradients but that of the images."""
    activation, activations, epsilon, group = how
    x, gamma, beta, gate, mean, variance, pooled, share = kept
    low, places = x.dtype, x.size / x.shape[-1]
    area = x.shape[1] * x.shape[2]
    root = jax.lax.rsqrt(variance + epsilon)
    scale = gamma * root
    u = _normalized(x, mean, variance, gamma, beta, epsilon)
    a, back = jax.vjp(activation, u)
    (slope,) = back(jnp.ones_like(u))

    # In float32 the compiler takes these sums while it computes `dz`. In bfloat16 it would make extra passes.
    def total(value):
        return jnp.sum(value, (1, 2))

    steep, images = wide(slope), wide(x)
    q = wide(dz) * steep
    sums = [total(value) for value in (q, q * images, steep, steep * images)]
    d_share = total(wide(dz) * wide(a))
    _, gate_back = jax.vjp(functools.partial(_gate, activations), pooled, gate)
    d_pooled, d_gate = gate_back(d_share.astype(low))
    spread, shares = wide(d_pooled) / area, wide(share)
    first, second = (jnp.sum(shares * sums[n] + spread * sums[n + 2], 0) for n in (0, 1))
    s1, s2 = first, (second - mean * first) * root
    mean1, mean2 = group_mean(jnp.stack([s1, s2]) / places, group)
    k2 = -root * scale * mean2
    k1 = -mean * k2 - scale * mean1
    outer = jax_kernels.Outer(scale, beta - mean * scale, scale, k2, k1, share, spread)
    return outer, slope, (s2, s1, d_gate, jnp.zeros_like(mean))


_excited.defvjp(_excite, _excite_back)


class BodyUnit(_Unit):
    """An expansion, the depthwise convolution after it, and the layers up to squeeze-and-excite.

    Between the two normalizations, the gradients take one pass over the images: `jax_kernels.depthwise_gradients()`.

    Args:
        layers: List of the layers of an `ExpandUnit`, the depthwise convolution, and the layers of an `ExciteUnit`.
        interpret: Boolean, whether JAX interprets the kernel, for machines without a TPU. Defaults to False.
    """

    needs_tpu = True

    def _halves(self):
        return self.parts[:3], self.parts[3], self.parts[4:]

    def _plain(self, x):
        first, depthwise, second = self._halves()
        return _plain_excite(second, depthwise(_plain_expand(first, x)))

    def _trained(self, x):
        first, depthwise, second = self._halves()
        (inner, expand), (outer, excite) = _of_expand(first, self.compute_dtype), _of_excite(second)
        kernel = depthwise.kernel.value[..., 0].astype(self.compute_dtype)
        how = inner, (tuple(depthwise.strides), self.interpret), outer
        outputs, *statistics = _bodied(how, x, expand, kernel, excite)  # type: ignore[misc]
        for norm, two in ((first[1], statistics[:2]), (second[0], statistics[2:])):
            outputs = _remembered(norm, outputs, *two)
        return outputs

    def compute_output_shape(self, input_shape):
        """Returns the shape of the outputs.

        Args:
            input_shape: Tuple.

        Returns:
            Tuple.
        """
        return self.parts[3].compute_output_shape(self.parts[0].compute_output_shape(input_shape))


class FirstUnit(BodyUnit):
    """The same for the stem and the first block.

    Args:
        layers: See `BodyUnit`.
        interpret: See `BodyUnit`.
    """

    sizes = frozenset({1, 3})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bodied(how, x, expand, kernel, excite):
    return _body(how, x, expand, kernel, excite)[0]


def _body(how, x, expand, kernel, excite):
    inner, (strides, _), outer = how
    (a, *first), of_expand = _expand(inner, x, *expand)
    (z, *second), of_excite = _excite(outer, _depthwise(a, kernel, strides), *excite)
    return (z, *first, *second), (of_expand, kernel, of_excite)


def _depthwise(x, kernel, strides) -> Any:
    return keras.ops.depthwise_conv(x, kernel[..., None], strides, "same", data_format="channels_last")


def _body_back(how, kept, gradients):
    (activation, epsilon, _, _), (strides, interpret), outer = how
    of_expand, kernel, of_excite = kept
    _, _, gamma, beta, x, mean, variance = of_expand
    y, dz = of_excite[0], gradients[0]
    around, slope, d_excite = _excite_ahead(outer, of_excite, dz)
    if jax_kernels.fits(x, kernel, strides):
        root = jax.lax.rsqrt(variance + epsilon)
        inner = jax_kernels.Inner(gamma * root, beta - mean * gamma * root, mean, root)
        activations = activation, outer[0]
        du, d_kernel, *sums = jax_kernels.depthwise_gradients(x, y, dz, kernel, inner, around, activations, interpret)
        d_expand = _expand_behind(how[0], of_expand, du, *sums)
    else:
        a = activation(_normalized(x, mean, variance, gamma, beta, epsilon))
        _, back = jax.vjp(functools.partial(_depthwise, strides=strides), a, kernel)
        da, d_kernel = back(_excite_through(around, slope, y, dz))
        d_expand = _expand_back(how[0], of_expand, (da,))
    return d_expand[0], d_expand[1:], d_kernel.astype(kernel.dtype), d_excite


_bodied.defvjp(_body, _body_back)

# The units, and the names of their layers in a block of `blocks.mbconv()`. The first unit that matches is used.
_EXPAND = ("{}_expand_conv", "{}_expand_bn", "{}_expand_activation")

_STEM = ("stem_conv", "stem_bn", "stem_activation")

_EXCITE = ("bn", "activation", "se_squeeze", "se_reduce", "se_expand", "se_excite")

UNITS: dict[str, tuple[type[_Unit], tuple[str, ...]]] = {
    "first": (FirstUnit, (*_STEM, *(f"block1a_{part}" for part in ("dwconv", *_EXCITE)))),
    "body": (BodyUnit, (*_EXPAND, *(f"{{}}_{part}" for part in ("dwconv", *_EXCITE)))),
    "expand": (ExpandUnit, _EXPAND),
    "excite": (ExciteUnit, tuple(f"{{}}_{part}" for part in _EXCITE)),
}


def units(fused: str) -> list[str]:
    """Returns the units of a value of `Run.fused`.

    Args:
        fused: `"none"`, `"layers"`, or `"kernels"`, which needs a TPU.

    Returns:
        List of names of `UNITS`.

    Example:

    >>> from keras_effnet.tpu.runners.jax_fused import units
    >>> units("layers")
    ['expand', 'excite']
    """
    chosen = {"none": (), "layers": (False,), "kernels": (False, True)}[fused]
    return [name for name, (unit, _) in UNITS.items() if unit.needs_tpu in chosen]


def fuse(model: keras.Model, chosen: Iterable[str] | None = None, interpret: bool = False) -> keras.Model:
    """Fuses the layers of a model into units.

    Args:
        model: A functional `keras.Model` of this package, whose batch normalizations are `GroupBatchNormalization`.
        chosen: Names of `UNITS`. Defaults to all.
        interpret: Boolean, whether JAX interprets TPU kernels, for machines without a TPU. Defaults to False.

    Returns:
        A `keras.Model` with the same variables in the same order.

    Example:

    >>> model = fuse(spread(model, 1, one_pass=True))  # doctest: +SKIP
    """
    named = inspection.read(model).layers
    names = set(UNITS if chosen is None else chosen)
    kinds = [kind for name, kind in UNITS.items() if name in names]
    starts: dict[str, _Unit] = {}
    inside: set[str] = set()
    for place in dict.fromkeys(name.split("_")[0] for name in named if name.startswith("block")):
        for make, parts in kinds:
            layers: list[Any] = [named.get(part.format(place)) for part in parts]
            plain = all(_is_plain(layer, make.sizes) for layer in layers)
            if plain and not (inside | starts.keys()) & {layer.name for layer in layers}:
                starts[layers[0].name] = make(layers, interpret)
                inside |= {layer.name for layer in layers[1:]}

    def call(layer, *args, **kwargs):
        if layer.name in starts:
            return starts[layer.name](*args)
        if layer.name in inside:
            return keras.tree.flatten(args)[0]
        return layer(*args, **kwargs)

    fused: Any = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    if [v.path for v in fused.variables] != [v.path for v in model.variables]:
        raise ValueError("Expected a model whose fused layers are consecutive. Received: variables in another order")
    return fused


def _is_plain(layer, sizes) -> bool:
    """Whether a layer exists, is trainable, and fits into a unit: no mixed experts or other padding, channels last."""
    match layer:
        case keras.layers.DepthwiseConv2D():
            plain = layer.depth_multiplier == 1 and set(layer.dilation_rate) == {1} and not layer.use_bias
            return plain and layer.trainable and layer.data_format == "channels_last" and layer.padding == "same"
        case GroupBatchNormalization():
            return layer.one_pass and layer.trainable and layer.scale and layer.center
        case keras.layers.Conv2D():
            plain = layer.padding == "same" and layer.data_format == "channels_last"
            return plain and layer.trainable and set(layer.kernel_size) <= sizes
        case keras.layers.Activation() | keras.layers.GlobalAveragePooling2D() | keras.layers.Multiply():
            return True
    return False

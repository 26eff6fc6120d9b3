"""Protects the JAX runner's fused layers, convolutions and Pallas kernel: the plain model's outputs and gradients."""

import math
from functools import partial

import keras
import numpy as np
import pytest
from helpers import BACKEND

if BACKEND != "jax":
    pytest.skip("JAX only: test_backends.py runs it", allow_module_level=True)

import jax
import jax.numpy as jnp
import mini  # adds a variant to the tables, so not in the process of the other tests

import keras_effnet as ke
from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.runners import jax_fused, jax_kernels, jax_runner, jax_step
from keras_effnet.tpu.runners.jax_convolutions import (
    AllExpertsCondConv2D,
    ShiftedDepthwiseCondConv2D,
    ShiftedDepthwiseConv2D,
)
from keras_effnet.tpu.runners.jax_fused import BodyUnit, ExciteUnit, ExpandUnit, FirstUnit, fuse
from keras_effnet.tpu.step.cross_replica import GlobalDropout, Place, at, spread
from keras_effnet.tpu.step.optimizers import Optimizer
from keras_effnet.tpu.step.schedules import Schedule
from keras_effnet.tpu.step.train_step import Learner

SIDE, IMAGES, MINI = 48, 4, "efficientnet-mini"
LAYERS = jax_fused.units("layers")
assert MINI in mini.VARIANTS


def net(name: str = MINI, dtype: str = "float32") -> keras.Model:
    """Returns a model without dropout, with other values than the initial ones, whose means are all zero."""
    keras.utils.set_random_seed(0)
    model = ke.create_model(
        name,
        weights=None,
        classes=10,
        classifier_activation=None,
        input_shape=(SIDE, SIDE, 3),
        dropout_rate=0,
        drop_connect_rate=0,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.name in ("gamma", "beta", "bias", "moving_mean"):
            variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    return model


def adapted(model: keras.Model, units) -> keras.Model:
    instead = {keras.layers.DepthwiseConv2D: ShiftedDepthwiseConv2D}  # XLA's own takes minutes to train on a processor
    plain = spread(model, None, instead, one_pass=units is not None)
    return plain if units is None else fuse(plain, units, interpret=True)


def gradients(model: keras.Model, dtype: str = "float32"):
    """Returns loss, moving statistics and gradients of a batch, the latter two as one vector each."""
    learner = Learner(model, Optimizer("rmsprop"), Schedule(0.1, 10, 100), weight_decay=0)
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3)), dtype)
    labels = jnp.asarray(rng.integers(0, 10, IMAGES), "int32")
    start = learner.start()

    def objective(trainable):
        loss, moving, _ = learner.objective(trainable, start.moving, images, labels, 0, IMAGES)
        return loss, moving

    (loss, moving), found = jax.jit(jax.value_and_grad(objective, has_aux=True))(start.trainable)
    flat = [np.concatenate([np.ravel(np.asarray(v, "float64")) for v in some]) for some in (moving, found)]
    return float(loss), *flat


def distance(one, other) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_units_have_the_plain_models_gradients(monkeypatch):
    """In float32 they are as close to those of float64 (with Keras' float32 statistics) as the plain model's are.

    TPU kernels are interpreted. They are not used if a TPU has too few images to fill its lanes.
    """
    with jax.enable_x64(True):
        keras.config.set_floatx("float64")
        try:
            exact = gradients(adapted(net(dtype="float64"), None), "float64")
        finally:
            keras.config.set_floatx("float32")
            keras.config.set_dtype_policy("float32")  # Keras sets one on first use
    model, kernel, calls = net(), jax_kernels.depthwise_gradients, []
    monkeypatch.setattr(jax_kernels, "depthwise_gradients", lambda *given: calls.append(1) or kernel(*given))
    every = jax_fused.UNITS
    for units, lanes, kernels in ((None, 128, 0), ((), 128, 0), (LAYERS, 128, 0), (every, IMAGES, 3), (every, 128, 0)):
        monkeypatch.setattr(jax_kernels, "_IMAGES", lanes)
        calls.clear()
        found = gradients(adapted(model, units))
        assert len(calls) == kernels
        assert found[0] == pytest.approx(exact[0], rel=1e-6)
        assert distance(found[1], exact[1]) < 1e-7 and distance(found[2], exact[2]) < 1e-6


def test_low_precision_is_as_near_to_the_exact_gradient(monkeypatch):
    monkeypatch.setattr(jax_kernels, "_IMAGES", IMAGES)
    exact = gradients(adapted(net(), None))[2]
    low = [gradients(adapted(net(dtype="mixed_bfloat16"), units))[2] for units in (None, LAYERS, jax_fused.UNITS)]
    plain, *fused = (distance(found, exact) for found in low)
    assert all(0 < one < 1.1 * plain for one in fused)


def test_what_becomes_one_and_what_does_not():
    """Mixed experts and frozen statistics are not fused. Variables and evaluation equal the plain model's."""

    def units(model):
        kinds = [type(layer) for layer in model.layers]
        return tuple(map(kinds.count, (FirstUnit, BodyUnit, ExpandUnit, ExciteUnit)))

    model = net("efficientnet-b0")
    assert units(adapted(model, LAYERS)) == (0, 0, 15, 16)
    fused = adapted(model, jax_fused.UNITS)
    assert units(fused) == (1, 15, 0, 0)
    assert [v.path for v in fused.variables] == [v.path for v in model.variables]
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype("uint8")
    predict = [jax.jit(lambda x, net=net: net(x, training=False)) for net in (model, fused)]
    np.testing.assert_allclose(predict[1](images), predict[0](images), rtol=1e-4, atol=1e-5)
    assert units(adapted(net("efficientnet-lite0"), jax_fused.UNITS)) == (0, 0, 15, 0)
    mixed = adapted(net("efficientnet-condconv-b0-8e"), jax_fused.UNITS)
    experts = sum("expand_conv" in layer.name for layer in mixed.layers if "CondConv" in type(layer).__name__)
    assert units(mixed) == (1, 15 - experts, 0, experts) and experts > 2
    for layer in model.layers:
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    assert units(adapted(model, jax_fused.UNITS)) == (0, 0, 0, 0)


@pytest.mark.parametrize(("noise", "dtype"), [(None, "float32"), ((None, 1, 1, 1), "bfloat16")])
def test_a_replica_draws_its_part_of_the_batchs_masks(noise, dtype):
    layer, images = GlobalDropout(0.3, noise_shape=noise, seed=7), jnp.ones((8, 5, 3, 2), dtype)
    seed = layer.seed_generator.state.value
    parts = []
    for index in range(4):
        place = Place(4, index, None, None, partial(jax_step._own_part, index))
        with at(place):
            step = jax.make_jaxpr(lambda x: layer.stateless_call([], [seed], x, training=True)[0])(images)
            parts.append(jax.core.eval_jaxpr(step.jaxpr, step.consts, images)[0])
        assert max(math.prod(value.aval.shape) for row in step.eqns for value in row.outvars) <= images.size
    whole = keras.random.dropout(jnp.ones((32, 5, 3, 2), dtype), 0.3, noise, seed=seed)
    assert 0.3 < np.mean(np.array(whole) != 0) < 0.95 and np.array_equal(jnp.concatenate(parts), whole)


def test_kernels_are_for_a_tpu():
    with pytest.raises(ValueError, match=r"Expected a TPU for --run.fused kernels. Received: cpu. Nearest: layers"):
        jax_runner.connect(Run(fused="kernels"))


def gradients_of(layer, kernel, images, routing):
    """Returns a layer's outputs for a kernel, and the gradients of all inputs."""
    layer.build([images.shape, routing.shape])

    def total(kernel, images, routing):
        outputs, _ = layer.stateless_call([kernel], [], [images, routing])
        return jnp.sum(jnp.sin(outputs)), outputs

    values = (jnp.asarray(value, "float32") for value in (kernel, images, routing))
    gradients, outputs = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*values)
    return [outputs, *gradients]


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "images", "memory", "rows"),
    [
        (6, 3, 1, 4, 2**24, 6),  # all rows in one tile
        (12, 5, 1, 4, 2**20, 2),  # as few rows as the kernel reaches
        (12, 3, 2, 4, 2**20, 1),
        (12, 5, 2, 128, 3 * 2**20, 2),
        (16, 5, 2, 256, 3 * 2**20, 2),  # twice the lanes
    ],
)
def test_depthwise_kernel_has_the_gradients(monkeypatch, side, kernel, stride, images, memory, rows):
    """The gradients between two normalizations, computed tile by tile, equal those of XLA's passes."""
    rng, channels, small = np.random.default_rng(0), 32, side // stride
    shapes = [(images, side, side, channels), (images, small, small, channels), (images, small, small, channels)]
    shapes += [(kernel, kernel, channels), *[(channels,)] * 9, *[(images, channels)] * 2]
    x, y, dz, weights, *rest = (jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes)
    inner, outer = jax_kernels.Inner(*rest[:4]), jax_kernels.Outer(*rest[4:])
    silu = jax.nn.silu
    monkeypatch.setattr(jax_kernels, "_VMEM", memory)
    monkeypatch.setattr(jax_kernels, "_COLUMNS", 4)
    assert jax_kernels._geometry(x, kernel, stride).rows == rows
    found = jax_kernels.depthwise_gradients(x, y, dz, weights, inner, outer, (silu, silu), interpret=True)

    def convolved(u, weights):
        return keras.ops.depthwise_conv(silu(u), weights[..., None], stride, "same")

    _, back = jax.vjp(silu, y * outer.gain + outer.offset)
    dy = (dz * outer.share[:, None, None] + outer.spread[:, None, None]) * back(jnp.ones_like(y))[0] * outer.scale
    _, back = jax.vjp(convolved, x * inner.scale + inner.offset, weights)
    du, d_weights = back(dy + y * outer.k2 + outer.k1)
    sums = [jnp.sum(du * of, (0, 1, 2)) for of in (1, (x - inner.mean) * inner.root)]
    for one, other in zip(found, (du, d_weights, *sums), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize(("side", "kernel", "strides"), [(7, 3, 1), (9, 5, 2), (6, 5, 1), (8, 3, 2)])
def test_mixed_depthwise_kernels_have_the_layers_gradient(side, kernel, strides):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in ((3, kernel, kernel, 6, 1), (4, side, side, 6), (4, 3))]
    layers = [
        made(kernel, num_experts=3, strides=strides, padding="same", use_bias=False)
        for made in (DepthwiseCondConv2D, ShiftedDepthwiseCondConv2D)
    ]
    for one, other in zip(*(gradients_of(layer, *values) for layer in layers), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=3e-6 * np.abs(one).max())


# More channels out than in, and fewer; a kernel that is left to the layer.
@pytest.mark.parametrize(("channels", "filters", "kernel"), [(6, 10, 1), (10, 6, 1), (6, 10, 3)])
def test_all_experts_at_once_have_the_layers_gradient(channels, filters, kernel):
    rng = np.random.default_rng(0)
    shapes = ((3, kernel, kernel, channels, filters), (4, 6, 6, channels), (4, 3))
    values = [rng.normal(size=shape) for shape in shapes]
    layers = [
        made(filters, kernel, num_experts=3, padding="same", use_bias=False)
        for made in (CondConv2D, AllExpertsCondConv2D)
    ]
    for one, other in zip(*(gradients_of(layer, *values) for layer in layers), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=3e-6 * np.abs(one).max())
    low = gradients_of(
        AllExpertsCondConv2D(filters, kernel, num_experts=3, use_bias=False, dtype="mixed_bfloat16"), *values
    )
    assert [value.dtype for value in low] == ["bfloat16", "float32", "float32", "float32"]

"""Layers that are one in a step of JAX' runner compute what the plain model does."""

import keras
import numpy as np
import pytest
from conftest import BACKEND

if BACKEND != "jax":
    pytest.skip("JAX' runner; test_backends.py starts it", allow_module_level=True)

import jax
import jax.numpy as jnp
import mini  # which adds a net to the tables: not in the process of the other tests

import keras_effnet as ke
from keras_effnet.layers import DepthwiseCondConv2D
from keras_effnet.tpu import jax_fused
from keras_effnet.tpu.jax_depthwise import ShiftedDepthwiseCondConv2D, ShiftedDepthwiseConv2D
from keras_effnet.tpu.jax_fused import ExciteUnit, ExpandUnit, fuse
from keras_effnet.tpu.optim import Optimizer, Schedule
from keras_effnet.tpu.replicas import spread
from keras_effnet.tpu.step import Learner

SIDE, IMAGES, MINI = 48, 4, "efficientnet-mini"
assert MINI in mini.VARIANTS


def net(name: str = MINI, dtype: str = "float32") -> keras.Model:
    """Without masks, and away from where training begins: there all means are zero."""
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
    instead = {keras.layers.DepthwiseConv2D: ShiftedDepthwiseConv2D}  # XLA's own takes minutes to train here
    plain = spread(model, None, instead, one_pass=units is not None)
    return plain if units is None else fuse(plain, units)


def gradients(model: keras.Model, dtype: str = "float32"):
    """Loss, moving statistics and gradients of a batch, as one vector each."""
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


def test_units_have_the_plain_models_gradients():
    """Float32's are as near as the plain model's to those of float64 (with Keras' float32 statistics)."""
    with jax.enable_x64(True):
        keras.config.set_floatx("float64")
        try:
            exact = gradients(adapted(net(dtype="float64"), None), "float64")
        finally:
            keras.config.set_floatx("float32")
            keras.config.set_dtype_policy("float32")  # Keras chose one when it was asked first
    model = net()
    for units in (None, (), jax_fused.UNITS):
        found = gradients(adapted(model, units))
        assert found[0] == pytest.approx(exact[0], rel=1e-6)
        assert distance(found[1], exact[1]) < 1e-7 and distance(found[2], exact[2]) < 1e-6


def test_low_precision_is_as_near_to_the_exact_gradient():
    exact = gradients(adapted(net(), None))[2]
    low = [gradients(adapted(net(dtype="mixed_bfloat16"), units))[2] for units in (None, jax_fused.UNITS)]
    plain, fused = (distance(found, exact) for found in low)
    assert 0 < fused < 1.1 * plain


def test_what_becomes_one_and_what_does_not():
    """Mixed experts and frozen statistics stay as they are; variables and evaluation are the plain model's."""

    def units(model):
        kinds = [type(layer) for layer in model.layers]
        return kinds.count(ExpandUnit), kinds.count(ExciteUnit)

    model = net("efficientnet-b0")
    fused = adapted(model, jax_fused.UNITS)
    assert units(fused) == (15, 16)
    assert [v.path for v in fused.variables] == [v.path for v in model.variables]
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype("uint8")
    predict = [jax.jit(lambda x, net=net: net(x, training=False)) for net in (model, fused)]
    np.testing.assert_allclose(predict[1](images), predict[0](images), rtol=1e-4, atol=1e-5)
    assert units(adapted(net("efficientnet-lite0"), jax_fused.UNITS)) == (15, 0)
    mixed = adapted(net("efficientnet-condconv-b0-8e"), jax_fused.UNITS)
    experts = sum("expand_conv" in layer.name for layer in mixed.layers if "CondConv" in type(layer).__name__)
    assert units(mixed) == (15 - experts, 16) and experts > 2
    for layer in model.layers:
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    assert units(adapted(model, jax_fused.UNITS)) == (0, 0)


@pytest.mark.parametrize(("side", "kernel", "strides"), [(7, 3, 1), (9, 5, 2), (6, 5, 1), (8, 3, 2)])
def test_mixed_depthwise_kernels_have_the_layers_gradient(side, kernel, strides):
    rng = np.random.default_rng(0)
    images, routing = rng.normal(size=(4, side, side, 6)), rng.uniform(size=(4, 3))
    layers = [
        made(kernel, num_experts=3, strides=strides, padding="same", use_bias=False)
        for made in (DepthwiseCondConv2D, ShiftedDepthwiseCondConv2D)
    ]
    found = []
    for layer in layers:
        layer.build([(4, side, side, 6), (4, 3)])

        def total(kernel, images, routing, layer=layer):
            outputs, _ = layer.stateless_call([kernel], [], [images, routing])
            return jnp.sum(jnp.sin(outputs)), outputs

        values = (layers[0].kernel.value, jnp.asarray(images, "float32"), jnp.asarray(routing, "float32"))
        gradients, outputs = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*values)
        found.append([outputs, *gradients])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)

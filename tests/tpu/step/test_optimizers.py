"""Protects optimizers, schedules, the moving average and the loss: they equal the original and other libraries."""

import math
from typing import get_args, get_type_hints

import keras
import numpy as np
import pytest
from helpers import BACKEND, golden

from keras_effnet.tpu import config
from keras_effnet.tpu.step import losses, moving_average
from keras_effnet.tpu.step.optimizers import OPTIMIZERS, Hyperparameters, Optimizer
from keras_effnet.tpu.step.schedules import Schedule
from keras_effnet.tpu.step.train_step import Learner

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="training runs on TensorFlow and JAX")
SCHEDULES = golden("tpu/schedules.json")


@pytest.mark.parametrize("batch", ["2048", "4096"])
def test_learning_rates_are_the_originals_to_the_last_bit(batch):
    row = SCHEDULES["learning_rate"][batch]

    def rates(steps, **how):
        schedule = Schedule(row["initial_lr"], row["steps_per_epoch"], row["total_steps_for_cosine"], **how)
        return {step: np.float32(schedule(int(step))) for step in steps}

    def expected(values):
        return {step: np.float32(value) for step, value in values.items()}

    for kind in ("exponential", "cosine", "constant", "poly"):
        values = row["values"][kind]
        found = rates(values, kind=kind)
        if BACKEND == "tensorflow" or kind != "cosine":  # XLA's cosine has another last bit
            assert found == expected(values), kind
    values = row["values"]["exponential_no_warmup"]
    assert rates(values, warmup_epochs=0) == expected(values)
    assert rates(row["staircase_edges"]) == expected(row["staircase_edges"])


def test_other_recipes_learning_rates():
    # NVIDIA, optimizers.py:120-130: a sixteenth more in each epoch of the warm-up, then a cosine over the rest.
    schedule = Schedule(0.08, 10.0, 400 * 10, "cosine", warmup_epochs=16, decay_from="warmup", per_epoch=True)
    rates = [float(schedule(10 * epoch + 3)) for epoch in range(400)]
    expected = [0.08 * (e + 1) / 16 for e in range(16)]
    expected += [0.5 * 0.08 * (1 + math.cos(math.pi * (e - 16) / 384)) for e in range(16, 400)]
    assert rates == pytest.approx(expected, rel=1e-5, abs=0.08 * 2**-23)  # of 1 + cosine
    # timm: up from 1e-6, then 0.97 every 2.4 epochs, counted in whole epochs.
    schedule = Schedule(0.048, 10.0, 4500, warmup_start=1e-6, per_epoch=True)
    rates = [float(schedule(10 * epoch)) for epoch in range(50)]
    expected = [1e-6 + e * (0.048 - 1e-6) / 5 for e in range(5)] + [0.048 * 0.97 ** (e // 2.4) for e in range(5, 50)]
    assert rates == pytest.approx(expected, rel=1e-5)
    # Composer: a complete cosine after the warm-up.
    schedule = Schedule(0.08, 10.0, 1000, "cosine", warmup_epochs=16, decay_from="warmup")
    assert float(schedule(160)) == pytest.approx(0.08) and float(schedule(580)) == pytest.approx(0.04)
    assert float(schedule(1000)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="Nearest: 'cosine'"):
        Schedule(1.0, 1.0, 1, "cosin")


def follow(name: str, hyper=None, rate=0.1, gradients=(), start=(), kernels=True, clip_norm=None):
    optimizer = Optimizer(name, hyper, clip_norm)
    values, slots, trace = [keras.ops.convert_to_tensor(start)], optimizer.start([np.array(start, "float32")]), []
    for step, gradient in enumerate(gradients, 1):
        values, slots = optimizer.step([keras.ops.convert_to_tensor(gradient)], values, slots, rate, step, [kernels])
        trace.append({"v": np.array(values[0]), **{slot: np.array(value) for slot, value in slots[0].items()}})
    return trace


def test_rmsprop_is_the_originals():
    rule = SCHEDULES["rmsprop"]
    gradients = [np.array(g, "float32") for g in rule["gradients"]]
    trace = follow("rmsprop", None, rule["settings"]["learning_rate"], gradients, np.array(rule["initial"], "float32"))
    for found, expected in zip(trace, rule["trace"][1:], strict=True):
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=2e-7, err_msg=name)


GRADIENTS = [np.random.default_rng(seed).normal(0, 1, (3, 2)).astype("float32") for seed in range(5)]
START = np.random.default_rng(9).normal(0, 1, (3, 2)).astype("float32")


def test_rmsprop_torch_is_pytorchs():
    torch = pytest.importorskip("torch")
    variable = torch.nn.Parameter(torch.tensor(START))
    theirs = torch.optim.RMSprop([variable], lr=0.1, alpha=0.9, eps=0.01, momentum=0.9)
    ours = follow("rmsprop-torch", Hyperparameters(epsilon=0.01), 0.1, GRADIENTS, START)
    for gradient, found in zip(GRADIENTS, ours, strict=True):
        variable.grad = torch.tensor(gradient)
        theirs.step()
        np.testing.assert_allclose(found["v"], variable.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_other_optimizers():
    (*_, last) = follow("sgd", None, 0.1, GRADIENTS, START)
    np.testing.assert_allclose(last["v"], START - 0.1 * sum(GRADIENTS), atol=1e-6)
    value, kept = START.copy(), np.zeros_like(START)
    for gradient in GRADIENTS:
        kept = 0.9 * kept + gradient
        value = value - 0.1 * kept
    np.testing.assert_allclose(follow("momentum", None, 0.1, GRADIENTS, START)[-1]["v"], value, atol=1e-6)

    # Keras' Lamb has no decay.
    variable = keras.Variable(START)
    theirs = keras.optimizers.Lamb(0.1, beta_1=0.9, beta_2=0.99, epsilon=1e-6)
    ours = follow("lamb", Hyperparameters(decay=0.99, epsilon=1e-6), 0.1, GRADIENTS, START)
    for gradient, found in zip(GRADIENTS, ours, strict=True):
        theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        np.testing.assert_allclose(found["v"], np.array(variable), rtol=2e-4, atol=1e-5)

    # Keras' AdamW decays all variables; ours, kernels only.
    for name, theirs, decay in (
        ("adam", keras.optimizers.Adam(0.1, beta_2=0.99, epsilon=0.01), 0.0),
        ("adamw", keras.optimizers.AdamW(0.1, weight_decay=0.2, beta_2=0.99, epsilon=0.01), 0.2),
    ):
        hyper, variable = Hyperparameters(decay=0.99, epsilon=0.01, layer_decay=decay), keras.Variable(START)
        ours = follow(name, hyper, 0.1, GRADIENTS, START)
        for gradient, found in zip(GRADIENTS, ours, strict=True):
            theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
            np.testing.assert_allclose(found["v"], np.array(variable), rtol=2e-6, atol=2e-7, err_msg=name)
        undecayed = follow("adam", hyper, 0.1, GRADIENTS, START)[-1]["v"]
        np.testing.assert_array_equal(follow(name, hyper, 0.1, GRADIENTS, START, kernels=False)[-1]["v"], undecayed)
        assert np.array_equal(ours[-1]["v"], undecayed) == (decay == 0)

    # You et al., arXiv 1708.03888, algorithm 1.
    hyper = Hyperparameters(trust=0.01, layer_decay=0.1)
    value, kept = START.copy(), np.zeros_like(START)
    for gradient in GRADIENTS:
        size = np.linalg.norm(value)
        local = 0.01 * size / (np.linalg.norm(gradient) + 0.1 * size)
        kept = 0.9 * kept + 0.5 * local * (gradient + 0.1 * value)
        value = value - kept
    np.testing.assert_allclose(follow("lars", hyper, 0.5, GRADIENTS, START)[-1]["v"], value, atol=1e-6)
    # A bias takes plain steps. A variable of zeros still moves.
    plain = follow("momentum", None, 0.5, GRADIENTS, START)[-1]["v"]
    np.testing.assert_allclose(follow("lars", hyper, 0.5, GRADIENTS, START, kernels=False)[-1]["v"], plain, atol=1e-5)
    assert np.abs(follow("lars", hyper, 0.5, GRADIENTS, 0 * START)[-1]["v"]).min() > 0
    with pytest.raises(ValueError, match="Nearest: 'rmsprop'"):
        Optimizer("rmsprob")
    known = {"sgd", "momentum", "rmsprop", "rmsprop-keras", "rmsprop-torch", "adam", "adamw", "lars", "lamb"}
    assert set(OPTIMIZERS) == set(get_args(get_type_hints(config.Optimizer)["name"])) == known


def test_the_body_learns_more_slowly():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(2, name="predictions")])
    steps = {}
    for scale in (1.0, 0.1):
        optimizer = Optimizer("adamw", Hyperparameters(layer_decay=0.1))
        learner = Learner(model, optimizer, Schedule(0.1, 1, 9, "constant", 0), body_scale=scale)
        state = learner.start()
        after = learner.update(state, [keras.ops.ones_like(v) for v in state.trainable], [], 0)
        pairs = zip(after.trainable, state.trainable, strict=True)
        steps[scale] = [np.array(new) - np.array(old) for new, old in pairs]
    for slow, fast, factor in zip(steps[0.1], steps[1.0], (0.1, 0.1, 1, 1), strict=True):
        np.testing.assert_allclose(slow, factor * fast, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_together():
    optimizer = Optimizer("sgd", clip_norm=1.0)
    gradients = [np.array([3.0], "float32"), np.array([4.0], "float32")]
    values, _ = optimizer.step(gradients, [np.zeros(1, "float32")] * 2, [{}, {}], 1.0, 1, [True, True])
    np.testing.assert_allclose([float(v[0]) for v in values], [-0.6, -0.8], rtol=1e-6)
    values, _ = optimizer.step([g / 10 for g in gradients], [np.zeros(1, "float32")] * 2, [{}, {}], 1.0, 1, [True] * 2)
    np.testing.assert_allclose([float(v[0]) for v in values], [-0.3, -0.4], rtol=1e-6)


def test_the_moving_average_is_the_originals():
    rule = SCHEDULES["ema"]
    for step, row in rule["measured_decay_at_num_updates"].items():
        assert float(moving_average.decay_at(int(step))) == pytest.approx(row["measured"], abs=3e-8)
    shadow = [np.float32(0)]
    for row in rule["trace_value_grows_by_1_per_step_from_0"]["resource_variables"]:
        shadow = moving_average.average(shadow, [np.float32(row["value"])], row["global_step"])
        assert float(shadow[0]) == pytest.approx(row["shadow"], rel=1e-6)
    assert moving_average.average([np.float32(3)], [np.float32(0.1)], 5, 0.0)[0] == np.float32(0.1)


def test_the_loss_is_keras_losses():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (6, 7)).astype("float32"), rng.integers(0, 7, 6)
    shares = np.eye(7, dtype="float32")[labels] * 0.7 + np.eye(7, dtype="float32")[labels[::-1]] * 0.3
    for given, dense in ((labels, np.eye(7)[labels]), (shares, shares)):
        theirs = keras.losses.categorical_crossentropy(dense, logits, from_logits=True, label_smoothing=0.1)
        np.testing.assert_allclose(np.array(losses.cross_entropy(given, logits, 0.1)), np.array(theirs), rtol=1e-5)
        alone = keras.losses.binary_crossentropy(dense, logits, from_logits=True, label_smoothing=0.1)
        np.testing.assert_allclose(
            np.array(losses.sigmoid_cross_entropy(given, logits, 0.1)), np.array(alone), rtol=1e-5
        )
    # A mixed example has its classes' losses, each with its share and its weight.
    weights = losses.balancing(np.repeat(np.arange(7), [9, 1, 4, 4, 4, 5, 1]), 7)
    whole = [np.array(losses.cross_entropy(np.full(6, label), logits, 0.1)) for label in range(7)]
    expected = sum(weights[label] * shares[:, label] * whole[label] for label in range(7))
    np.testing.assert_allclose(np.array(losses.cross_entropy(shares, logits, 0.1, weights)), expected, rtol=1e-5)
    np.testing.assert_allclose(np.dot(weights, [9, 1, 4, 4, 4, 5, 1]) / 28, 1)
    np.testing.assert_allclose(np.multiply(weights, [9, 1, 4, 4, 4, 5, 1]), 4)
    order = np.argsort(-logits, axis=1)
    for k in (1, 3):
        expected = [label in row[:k] for label, row in zip(labels, order, strict=True)]
        np.testing.assert_array_equal(np.array(losses.hits(labels, logits, k)), expected)
    # Of equal logits the first is the prediction, as in argmax.
    flat = np.zeros((3, 4), "float32")
    np.testing.assert_array_equal(np.array(losses.hits(np.array([0, 1, 3]), flat, 1)), [1, 0, 0])
    np.testing.assert_array_equal(np.array(losses.hits(np.array([0, 1, 3]), flat, 2)), [1, 1, 0])
    # With bfloat16 logits, the loss is that of the rounded numbers in float32.
    low = keras.ops.cast(logits, "bfloat16")
    found = losses.cross_entropy(labels, low)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(
        np.array(found), np.array(losses.cross_entropy(labels, keras.ops.cast(low, "float32"))), rtol=1e-6
    )

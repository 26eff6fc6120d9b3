"""Tests that pruned models compute what masked ones compute, cost what their plan says, and learn from a teacher."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache

import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    ROOT,
    arrays,
    fill,
    forget_variants,
    image,
    leading,
    run,
    same_weights,
    shallow_nets,
)

import keras_effnet as ke
from keras_effnet import compat, pruning
from keras_effnet.nets import inspection
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.pruning import costs, groups

SMALL = {"weights": None, "classes": 3, "input_shape": (32, 32, 3)}
# One variant for each kind of block. The others only have more blocks.
KINDS = (
    "efficientnet-lite0",
    "efficientnet-edgetpu-s",
    "efficientnet-condconv-b0-4e",
    "efficientnetv2-rw-t-gc",
    "efficientnet-b0",
)
LARGE = [name for name in VARIANTS if name not in KINDS]


@pytest.fixture
def short(shallow):
    """Leaves each net its first two stages and its last one: plain, residual and, where it has them, mixed blocks."""
    for name, variant in [*VARIANTS.items()]:
        first, second, *_, last = variant.stages
        VARIANTS[name] = replace(variant, stages=(first, second, replace(last, filters_in=second.filters_out)))
    forget_variants()


@cache
def shared() -> keras.Model:
    """Returns a shallow B0 for tests that only read it."""
    with shallow_nets():
        return ke.EfficientNetB0(**SMALL)


@pytest.fixture(scope="module")
def digits():
    """Returns a few small real images and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.repeat(np.repeat(found.images[:96], 4, 1), 4, 2)[..., None].repeat(3, -1)
    return (pixels * (255 / 16)).astype("float32"), found.target[:96] % 3


def lively(model, project=0.2):
    """Fills a model so that every channel matters: no normalization is near its initial values."""
    generator = np.random.default_rng(0)
    for layer in compat.all_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            # A block adds little to its input, so that rounding errors do not grow over the 88 blocks of L2.
            scale = project if "project" in layer.name else 1
            layer.gamma.assign(scale * generator.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(generator.normal(0, 0.3, layer.beta.shape))
            layer.moving_mean.assign(generator.normal(0, 0.1, layer.moving_mean.shape))
    return model


def random_plan(model, seed: int) -> pruning.Plan:
    """Returns a plan for random importance scores and a random reduction."""
    generator = np.random.default_rng(seed)
    architecture = inspection.find(model)[1].architecture
    scores = {group.name: generator.lognormal(0, 2, group.size) for group in groups.groups(architecture)}
    reduction = float(generator.uniform(0.1, 0.6))
    return pruning.plan(model, None, reduction, importance=scores, divisor=int(generator.choice([1, 8])))


def masked(model, plan):
    """Returns a copy of the whole model whose variables make the removed channels zero after every layer.

    A channel is zero after a normalization whose gamma and beta are zero, and its activation keeps it zero.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    _, reading = inspection.find(copy)

    def zero(name, channels, *variables):
        for variable in variables:
            weight = getattr(reading.layers[name], variable)
            value = np.array(keras.ops.convert_to_numpy(weight))
            value[..., list(channels)] = 0
            weight.assign(value)

    chains = {group.name: group.blocks for group in groups.groups(reading.architecture)}
    for name, channels in plan.removed.items():
        start = name[: name.index("_") + 1]
        if name.endswith("_expand"):
            for norm in ("expand_bn", "bn"):
                if start + norm in reading.layers:
                    zero(start + norm, channels, "gamma", "beta")
        elif name.endswith("_se_reduce"):
            zero(name, channels, "kernel", "bias")
        else:
            for index in chains[name]:
                zero(f"block{reading.architecture.blocks[index].name}_project_bn", channels, "gamma", "beta")
    return copy


def check(model, plan, folder):
    """Checks the pruned model against the masked one, its plan and its files. Returns the pruned model."""
    _, reading = inspection.find(model)
    whole = reading.architecture.widths
    smaller = pruning.apply(model, plan)
    x = image(32)
    expected = run(masked(model, plan), x)
    assert np.abs(expected - run(model, x)).max() > 1e-4 * np.abs(expected).max()  # the mask does something
    assert np.abs(run(smaller, x) - expected).max() < 1e-5 * max(1, np.abs(expected).max())

    described = ke.describe(smaller)
    assert described["macs"] == costs.cost(smaller) == plan.after < plan.before == costs.cost(model)
    assert described["params"] + described["non_trainable_params"] == smaller.count_params()
    assert inspection.read(smaller).architecture.widths == plan.blocks
    assert plan.blocks["1a"] == whole["1a"]
    assert all(new > 0 for name, row in plan.blocks.items() for new, old in zip(row, whole[name], strict=True) if old)
    assert plan.reduction == pytest.approx(plan.asked, rel=0.01, abs=0.001)

    path = folder / "pruned.keras"
    smaller.save(path)
    assert same_weights(keras.models.load_model(path), smaller)
    plan.save(folder / "plan.json")
    assert pruning.Plan.load(folder / "plan.json") == plan
    rebuilt = ke.create_model(plan.model, blocks=folder / "plan.json", **{**SMALL, "weights": path})
    assert same_weights(rebuilt, smaller)
    return smaller


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("name", "seed"), leading([*((name, 0) for name in KINDS), (KINDS[0], 1)], 4))
def test_pruned_is_masked(name, seed, tmp_path):
    model = lively(ke.create_model(name, classifier_activation=None, **SMALL))
    smaller = check(model, random_plan(model, seed), tmp_path)
    # The round trip through timm's names finds the widths from the weights alone.
    ke.weights.export(smaller, tmp_path / "pruned.safetensors")
    assert ke.weights.convert_file(tmp_path / "pruned.safetensors", tmp_path / "again.keras") == name
    assert same_weights(keras.models.load_model(tmp_path / "again.keras"), smaller)
    other = ke.create_model(name, blocks=inspection.read(smaller).architecture.widths, **SMALL)
    report = ke.weights.load(other, tmp_path / "pruned.safetensors")
    assert report.fits and same_weights(other, smaller)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="each kind of block runs on every backend above")
@pytest.mark.long
@pytest.mark.parametrize("name", LARGE)
def test_every_pruned_variant_is_masked(name, tmp_path):
    model = lively(ke.create_model(name, classifier_activation=None, **SMALL))
    check(model, random_plan(model, len(name)), tmp_path)
    keras.backend.clear_session()


@pytest.mark.usefixtures("short")
def test_a_head_of_ones_own_is_kept(tmp_path):
    body = fill(ke.EfficientNetB0(weights=None, include_top=False, pooling="avg"))
    body.trainable = False
    mine = keras.Sequential(
        [keras.Input((32, 32, 3)), body, keras.layers.Dropout(0.2), keras.layers.Dense(3, activation="softmax")]
    )
    plan = random_plan(mine, 3)
    smaller = pruning.apply(mine, plan)
    x = image(32)
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in mine.layers]
    assert not smaller.layers[0].trainable and smaller.layers[-1].trainable
    copy = keras.models.clone_model(mine, clone_function=lambda layer: masked(layer, plan) if layer is body else layer)
    assert np.abs(run(smaller, x) - run(copy, x)).max() < 1e-5
    assert plan.before == costs.cost(mine) == ke.describe(masked(ke.EfficientNetB0(**SMALL), plan))["macs"]
    smaller.save(tmp_path / "mine.keras")
    assert same_weights(keras.models.load_model(tmp_path / "mine.keras"), smaller)
    assert smaller.layers[0].name == "efficientnet-b0" and smaller.count_params() < mine.count_params()

    def unknown_to_keras(labels, outputs):
        return keras.ops.mean(outputs)

    mine.compile("adam", unknown_to_keras)
    assert same_weights(pruning.apply(mine, plan), smaller) and mine.compiled


@pytest.mark.usefixtures("short")
def test_channels_first_and_prefix():
    inputs = keras.Input((3, 32, 32))
    ke.EfficientNetB0(include_top=False, weights=None, input_tensor=inputs, data_format="channels_first")
    second = ke.EfficientNetB0(**{**SMALL, "input_shape": None}, input_tensor=inputs, data_format="channels_first")
    plan = random_plan(second, 5)
    smaller = pruning.apply(second, plan)
    assert inspection.read(smaller).architecture.widths == plan.blocks
    assert smaller.count_params() == ke.EfficientNetB0(blocks=plan, **SMALL).count_params()


# Importance


@pytest.mark.usefixtures("short", "eager")
def test_taylor_importance_is_the_slope_of_the_loss(digits):
    """The sum of w * dL/dw over a channel is the slope of the loss in the scale of the channel's kernel."""
    model = lively(ke.EfficientNetB0(**SMALL), project=1)
    before = model.get_weights()
    data = digits[0][:8], digits[1][:8]
    found = pruning.importance(model, data, "taylor", batch_size=4, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))
    assert found.keys() == {group.name for group in groups.groups(inspection.read(model).architecture)}
    layer = model.get_layer("block3a_se_reduce")  # no other kernel outputs its channels
    kernel = np.array(keras.ops.convert_to_numpy(layer.kernel))
    for channel in np.argsort(-found[layer.name])[:3]:
        losses = []
        for scale in (1.3, 0.7):
            scaled = kernel.copy()
            scaled[..., channel] *= scale
            layer.kernel.assign(scaled)
            likely = np.log(run(model, data[0]).astype(float))[np.arange(8), data[1]]
            losses.append(-likely.reshape(2, 4).mean(1))
        slope = np.abs((losses[0] - losses[1]) / 0.6).mean()
        assert found[layer.name][channel] == pytest.approx(slope, rel=0.05)


@pytest.mark.usefixtures("short", "eager")
def test_importance_equals_gradients_of_the_backend(digits):
    if BACKEND != "tensorflow":
        pytest.skip("compared with TensorFlow's own tape")
    import tensorflow as tf

    model = lively(ke.create_model("efficientnet-condconv-b0-4e", **SMALL))
    data = digits[0][:8], digits[1][:8]
    gradients = []
    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    for half in (slice(0, 4), slice(4, 8)):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(data[1][half], model(data[0][half], training=False))
            loss = tf.reduce_mean(loss)
        gradients.append(tape.gradient(loss, [layer.kernel.value for layer in layers]))
    kernels = {layer.name: layer.kernel.numpy() for layer in layers}
    by_name = {layer.name: np.stack(pair) for layer, pair in zip(layers, zip(*gradients, strict=True), strict=True)}

    def score(name, axis, kind):
        product = kernels[name] * by_name[name]
        product = product.mean(0) if kind == "gradient" else product
        axes = tuple(n for n in range(product.ndim) if n != axis % product.ndim and (kind == "gradient" or n))
        if kind == "gradient":
            return np.abs(product).sum(axes)
        return np.abs(product.sum(axes)).mean(0)

    for kind in ("gradient", "taylor"):
        found = pruning.importance(model, data, kind, batch_size=4, verbose=0)
        for block in ("block2b", "block3a"):
            expected = sum(
                score(f"{block}_{name}", axis, kind)
                for name, axis in (("expand_conv", -1), ("dwconv", -2), ("se_expand", -1))
            )
            assert found[f"{block}_expand"] == pytest.approx(expected, rel=1e-3, abs=1e-6 * float(expected.max()))
        expected = sum(score(f"block2{letter}_project_conv", -1, kind) for letter in "ab")
        assert found["block2a_project"] == pytest.approx(expected, rel=1e-3, abs=1e-6 * float(expected.max()))


@pytest.mark.usefixtures("shallow")
def test_magnitude_needs_no_data():
    model = shared()
    found = pruning.importance(model, None, "magnitude")["block2b_se_reduce"]
    kernel = np.abs(keras.ops.convert_to_numpy(model.get_layer("block2b_se_reduce").kernel))
    assert found == pytest.approx(kernel.sum((0, 1, 2)), rel=1e-5)


@pytest.mark.usefixtures("short", "eager")
def test_frozen_layers_are_judged_too(digits):
    model, data = ke.EfficientNetLite0(**SMALL), tuple(part[:32] for part in digits)
    expected = pruning.importance(model, data, verbose=0)
    model.trainable = False
    found = pruning.importance(model, data, verbose=0)
    assert not model.trainable and not model.get_layer("stem_conv").trainable
    assert all(np.allclose(found[name], expected[name], rtol=1e-3) for name in expected)


# Plans


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("solver", leading(["exact", "greedy"], 1))
@pytest.mark.usefixtures("shallow")
def test_a_plan_meets_its_budget(cost, solver):
    model = shared()
    for reduction in (0.05, 0.4, 0.8):
        plan = pruning.plan(model, None, reduction, cost, solver, "magnitude")
        # Within a hundredth, or one channel: in a chain of residual blocks, one costs up to a thousandth here.
        assert reduction <= plan.reduction <= max(1.01 * reduction, reduction + 0.001)
        assert plan.after == costs.cost(pruning.apply(model, plan), cost)
        assert 0 <= plan.gap < 1e-2 and (plan.cost, plan.solver) == (cost, solver)
        for name, (expand, se, out) in inspection.read(model).architecture.widths.items():
            for new, old in zip(plan.blocks[name], (expand, se, out), strict=True):
                assert new >= min(old, max(old and 1, 0.1 * old))
    by_eight = pruning.plan(model, None, 0.4, importance="magnitude")
    assert all(expand % 8 == 0 for expand, _, _ in by_eight.blocks.values())


@pytest.mark.usefixtures("shallow")
def test_the_most_important_channels_stay():
    model = shared()
    parts = groups.groups(inspection.read(model).architecture)
    scores = {group.name: np.arange(group.size, dtype=float) for group in parts}
    plan = pruning.plan(model, None, 0.5, importance=scores)
    assert plan.removed
    for name, channels in plan.removed.items():
        assert channels == tuple(range(len(channels))), name


@pytest.mark.usefixtures("shallow")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="measures the machine")
@pytest.mark.long
def test_latency_as_a_cost():
    model = ke.EfficientNetLite0(weights=None, classes=3, input_shape=(96, 96, 3))
    plan = pruning.plan(model, None, 0.1, cost="latency", importance="magnitude")
    assert 0 < plan.after < plan.before < 5
    assert plan.reduction >= 0.1
    assert costs.cost(pruning.apply(model, plan)) < costs.cost(model)


@pytest.mark.usefixtures("shallow")
def test_a_plan_is_a_small_readable_file(tmp_path):
    model = shared()
    plan = random_plan(model, 0)
    found = json.loads(plan.save(tmp_path / "plan.json").read_text())
    assert found["model"] == "efficientnet-b0" and found["blocks"]["1a"] == [0, 8, 16]
    assert os.path.getsize(tmp_path / "plan.json") < 30_000
    assert ke.EfficientNetB0(blocks=plan, **SMALL).count_params() == pruning.apply(model, plan).count_params()
    rows = list(plan.blocks.values())
    assert ke.describe(ke.EfficientNetB0(blocks=rows, **SMALL))["macs"] == plan.after


@pytest.mark.usefixtures("short")
def test_a_pruned_model_can_be_pruned_again(tmp_path):
    model = lively(ke.EfficientNetB0(**SMALL))
    once = pruning.apply(model, random_plan(model, 1))
    plan = random_plan(once, 2)
    assert plan.model == "efficientnet-b0"
    assert check(once, plan, tmp_path).count_params() < once.count_params()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"reduction": 1.2}, "Expected reduction between 0 and 1"),
        ({"reduction": True}, "Expected reduction as a number between 0 and 1"),
        ({"reduction": 0.995}, r"Expected reduction of at most 0\.\d+"),
        ({"cost": "flops"}, "Unknown cost"),
        ({"solver": "exakt"}, "Nearest: 'exact'"),
        ({"importance": "grad"}, "Nearest: 'gradient'"),
        ({"importance": {}}, "Expected importance of block2a_expand as 96 finite numbers"),
        ({"floor": 1}, "Expected floor"),
        ({"divisor": 0}, "Expected divisor"),
    ],
)
@pytest.mark.usefixtures("shallow")
def test_wrong_arguments_of_a_plan_are_told(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        pruning.plan(shared(), None, **{"importance": "magnitude", **arguments})


def test_wrong_plans_are_told(tmp_path):
    model = ke.EfficientNetB0(**SMALL)
    plan = random_plan(model, 0)
    with pytest.raises(
        ValueError, match=r"Expected a plan made for .*, whose block .* keeps \(.*\) channels .*Received: None, in a"
    ):
        pruning.apply(ke.EfficientNetB1(**SMALL), plan)
    with pytest.raises(ValueError, match=r"Expected a plan for 'efficientnet-b1'\. Received: one for"):
        ke.EfficientNetB1(blocks=plan, **SMALL)
    with pytest.raises(ValueError, match="weights=None, or the path"):
        ke.EfficientNetB0(blocks=plan, classes=3)
    with pytest.raises(ValueError, match=r"Expected a Plan, the path of one.*Received: int 5"):
        ke.EfficientNetB0(blocks=5, **SMALL)
    with pytest.raises(ValueError, match="Expected the plan to remove fewer than 96 channels of block2a_expand"):
        pruning.apply(model, replace(plan, removed={"block2a_expand": tuple(range(96))}))
    with pytest.raises(ValueError, match="Nearest: 'block2a_expand'"):
        pruning.apply(model, replace(plan, removed={"block2a_expnd": (1,)}))
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ValueError, match="Expected the JSON of a plan"):
        pruning.apply(model, tmp_path / "plan.json")
    with pytest.raises(ValueError, match="Expected a model of this package"):
        pruning.plan(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), None, importance="magnitude")


# Data and losses


def test_what_a_model_is_judged_by(digits):
    """Chooses a loss that suits the labels and the output if the model is not compiled with one."""
    from keras_effnet.pruning.data_and_loss import loss_of

    def head(units, activation):
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation=activation)])

    one_hot, numbers = np.eye(3)[[0, 1]], np.array([0, 1])
    x = np.zeros((2, 4))
    for units, activation, labels, kind, logits in (
        (3, "softmax", numbers, "SparseCategoricalCrossentropy", False),
        (3, None, numbers, "SparseCategoricalCrossentropy", True),
        (3, "softmax", one_hot, "CategoricalCrossentropy", False),
        (3, "sigmoid", one_hot, "BinaryCrossentropy", False),
        (1, "sigmoid", numbers, "BinaryCrossentropy", False),
        (1, None, numbers, "BinaryCrossentropy", True),
    ):
        loss = loss_of(head(units, activation), (x, labels))
        assert (type(loss).__name__, loss.get_config()["from_logits"]) == (kind, logits)
    compiled = head(3, "softmax")
    compiled.compile(loss={"dense": "mse"} if compiled.layers[-1].name == "dense" else ["mse"])
    assert loss_of(compiled, (x, numbers)) == "mse"


@pytest.mark.usefixtures("short", "eager")
@pytest.mark.parametrize("kind", leading(["PyDataset", "batches", "three arrays"], 1))
def test_data_of_any_kind(kind, digits):
    model = ke.EfficientNetLite0(**SMALL)
    expected = pruning.importance(model, digits, verbose=0)
    if kind == "batches":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices(digits).batch(32)
    elif kind == "PyDataset":

        class Data(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, index):
                return tuple(part[32 * index : 32 * index + 32] for part in digits)

        data = Data()
    else:
        data = (*digits, np.ones(len(digits[0])))
    found = pruning.importance(model, data, verbose=0)
    assert all(np.allclose(found[name], expected[name], rtol=1e-3) for name in expected)


@pytest.mark.usefixtures("shallow")
def test_data_that_are_gone_after_a_look_are_refused(digits):
    for data in ((batch for batch in [digits]), [digits, digits], 5):
        with pytest.raises(ValueError, match=r"Expected a pair of arrays \(pixels, labels\), or a dataset"):
            pruning.importance(shared(), data, verbose=0)


@pytest.mark.usefixtures("shallow")
def test_layers_around_the_net_count_and_keep_their_state():
    inputs = keras.Input((32, 32, 3))
    norm = keras.layers.Normalization()
    norm.adapt(np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)))
    body = ke.EfficientNetLite0(weights=None, include_top=False, input_shape=(32, 32, 3), preprocessing=None)
    x = keras.layers.Conv2D(64, 3, padding="same", use_bias=False)(body(norm(inputs)))
    mine = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))
    trainable = sum(int(np.prod(weight.shape)) for weight in mine.trainable_weights)
    assert costs.cost(mine, "params") == trainable
    assert costs.cost(mine) == ke.describe(body)["macs"] + 9 * 1280 * 64 + 64 * 3
    nothing = pruning.apply(
        mine, replace(random_plan(mine, 0), removed={}, blocks=inspection.find(mine)[1].architecture.widths)
    )
    assert np.abs(run(nothing, image(32)) - run(mine, image(32))).max() < 1e-5


# Distillation


def taught(digits, **kwargs):
    teacher = lively(ke.EfficientNetLite0(**SMALL))
    student = pruning.apply(teacher, random_plan(teacher, 4))
    history = pruning.distill(student, teacher, digits, epochs=2, verbose=0, **kwargs)
    return teacher, student, history.history


@pytest.mark.usefixtures("shallow", "eager")
def test_distillation_is_the_tasks_loss_and_the_modules_differences(digits):
    """Compares the terms with the outputs of both models, without training."""
    teacher = lively(ke.EfficientNetB0(dropout_rate=0, drop_connect_rate=0, bn_momentum=0.5, **SMALL))
    student = pruning.apply(teacher, random_plan(teacher, 4))
    distiller = pruning.Distiller(student, teacher, gamma=0.3)
    distiller.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", metrics=["accuracy"])
    data = digits[0][:8], digits[1][:8]
    logs = distiller.evaluate(*data, verbose=0, return_dict=True)
    terms = {name.removesuffix("_mse"): value for name, value in logs.items() if name.endswith("_mse")}
    stages = [f"stage{number}" for number in range(1, 8)]
    ends = ["top_conv", "top_bn", "top_activation", "avg_pool", "logits"]
    assert sorted(terms) == sorted(["stem_conv", "stem_bn", "stem_activation", *stages, *ends])
    assert logs["distillation_loss"] == pytest.approx(np.mean(list(terms.values())), rel=1e-4)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + 0.3 * logs["distillation_loss"], rel=1e-4)
    probabilities = run(student, data[0])
    expected = -np.log(probabilities[np.arange(8), data[1]]).mean()
    assert logs["task_loss"] == pytest.approx(expected, rel=1e-3)

    def difference(name):
        ours, theirs = (
            run(keras.Model(model.inputs, model.get_layer(name).output), data[0]) for model in (student, teacher)
        )
        return np.mean((ours - theirs) ** 2)

    assert terms["top_conv"] == pytest.approx(difference("top_conv"), rel=1e-3)
    assert terms["avg_pool"] == pytest.approx(difference("avg_pool"), rel=1e-3)
    # The logits come before the softmax, whose output determines them only up to a constant per example.
    logs_of = [np.log(run(model, data[0])) for model in (student, teacher)]
    centered = [values - values.mean(-1, keepdims=True) for values in logs_of]
    assert terms["logits"] >= np.mean((centered[0] - centered[1]) ** 2) * 0.999
    # A stage whose width was pruned is compared through its projection.
    assert set(distiller.projections) == {
        f"stage{number}"
        for number, letter in enumerate("abaaaaa", 1)
        if plan_widths(student)[name := f"{number}{letter}"] != plan_widths(teacher)[name]
    }


def plan_widths(model):
    return {name: out for name, (_, _, out) in inspection.read(model).architecture.widths.items()}


@pytest.mark.usefixtures("shallow")
@pytest.mark.long  # test_a_model_with_a_head_of_ones_own_is_distilled trains in CI
def test_the_student_learns_and_the_teacher_stays(digits):
    teacher = lively(ke.EfficientNetLite0(bn_momentum=0.5, dropout_rate=0, drop_connect_rate=0, **SMALL))
    teacher.get_layer("stem_conv").trainable = False
    before, flags = teacher.get_weights(), [layer.trainable for layer in teacher.layers]
    count = len(teacher.trainable_weights)
    student = pruning.apply(teacher, random_plan(teacher, 4))
    kinds = [type(layer).__name__ for layer in student.layers]
    history = pruning.distill(
        student, teacher, digits, digits, epochs=8, gamma=1.0, optimizer="adam", verbose=0
    ).history
    assert (
        history["loss"][-1] < history["loss"][0] and history["distillation_loss"][-1] < history["distillation_loss"][0]
    )
    assert all(np.array_equal(a, b) for a, b in zip(teacher.get_weights(), before, strict=True))
    assert [layer.trainable for layer in teacher.layers] == flags and teacher.trainable
    assert len(teacher.trainable_weights) == count
    assert [type(layer).__name__ for layer in student.layers] == kinds  # the projections are gone
    assert {"val_accuracy", "val_task_loss", "stage4_mse", "val_logits_mse"} <= history.keys()
    assert run(student, digits[0][:2]).shape == (2, 3)


@pytest.mark.usefixtures("short", "eager")
def test_a_model_with_a_head_of_ones_own_is_distilled(digits):
    def mine():
        body = lively(ke.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3)))
        return keras.Sequential([body, keras.layers.Dropout(0.1), keras.layers.Dense(3, activation="softmax")])

    teacher = mine()
    student = pruning.apply(teacher, random_plan(teacher, 1))
    distiller = pruning.Distiller(student, teacher)
    assert {"stage3", "avg_pool", "logits"} <= set(distiller.modules)
    data = tuple(part[:32] for part in digits)
    assert pruning.distill(student, teacher, data, epochs=1, verbose=0).history["logits_mse"][0] > 0
    student.layers[0].trainable = False
    with pytest.raises(ValueError, match=r"are frozen. Set student.get_layer\('efficientnet-b0'\).trainable"):
        pruning.distill(student, teacher, data, verbose=0)
    with pytest.raises(ValueError, match="which shares some"):
        pruning.Distiller(teacher, teacher)
    with pytest.raises(ValueError, match="same modules"):
        pruning.Distiller(ke.EfficientNetB0(**{**SMALL, "classes": 4}), teacher)


def distilled(backup, out) -> None:
    """Saves the weights of a student of a small net, after two epochs."""
    pixels = np.random.default_rng(0).uniform(0, 255, (32, 32, 32, 3)).astype("float32")

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return pixels[16 * index : 16 * index + 16], np.arange(16) % 3

    with shallow_nets(stages=3):
        teacher = lively(ke.EfficientNetB0(dropout_rate=0, drop_connect_rate=0, bn_momentum=0.5, **SMALL))
        student = pruning.apply(teacher, random_plan(teacher, 4))
        say = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: print("epoch", epoch, flush=True))
        more = {"epochs": 2, "verbose": 0, "shuffle": False, "callbacks": [say]}
        pruning.distill(student, teacher, Data(), backup_dir=backup, **more)
        np.savez(out, *student.get_weights())


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_a_killed_distillation_goes_on(tmp_path, capfd):
    """Kills a process at the start of its second epoch. The next one ends with the weights of an uninterrupted run."""
    script = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT / "tests" / "pruning")]!r}
import keras, tensorflow as tf
import test_pruning
tf.config.run_functions_eagerly(True)  # for so few steps, less work than tracing
keras.utils.set_random_seed(0)
test_pruning.distilled(*sys.argv[1:])
"""

    def start(backup, out):
        command = [sys.executable, "-c", script, str(tmp_path / backup), str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    distilled(tmp_path / "whole", tmp_path / "whole.npz")
    assert capfd.readouterr().out.split() == ["epoch", "0", "epoch", "1"]
    with start("killed", "killed.npz") as first:
        for line in first.stdout:
            if line.strip() == "epoch 1":
                first.send_signal(signal.SIGKILL)
                break
    assert first.returncode == -signal.SIGKILL
    assert start("killed", "killed.npz").communicate()[0].split() == ["epoch", "1"]
    one, other = (arrays(tmp_path / name) for name in ("whole.npz", "killed.npz"))
    for key in one:
        assert np.abs(one[key] - other[key]).max() <= 1e-4 * max(1, np.abs(one[key]).max()), key
    assert not (tmp_path / "killed").exists()

"""A training step against the original's model_fn, and on more than one device."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import BACKEND, ROOT, golden, image, seeded

import keras_effnet as ke
from keras_effnet import blocks
from keras_effnet.tpu.optim import Optimizer, Schedule
from keras_effnet.tpu.step import Learner
from keras_effnet.weights import convert, namemaps
from keras_effnet.weights.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's runner")
if BACKEND == "tensorflow":
    import tensorflow as tf

    from keras_effnet.tpu import replicas, runner

GOLDEN = golden("tpu/train-efficientnet-b0.json")


def filled(name: str, scope: str, **kwargs):
    """A model that gives logits, filled as the original's, and its variables by the original's names."""
    model = ke.create_model(
        name,
        weights=None,
        dropout_rate=0,
        drop_connect_rate=0,
        classifier_activation=None,
        preprocessing=None,
        **kwargs,
    )
    reading = blocks.read(model)
    names = convert.foreign_names(reading.architecture, namemaps.TPU, reading.channels, reading.classes)
    variables = {}
    for (layer, variable), found in names.items():
        target = next(weight for weight in reading.layers[layer].weights if weight.name == variable)
        layout, full = LAYOUTS[found.layout], f"{scope}/{found.foreign}"
        shape = layout.from_keras(np.empty(found.shape)).shape
        target.assign(layout.to_keras(seeded(full, shape), found.shape))
        variables[full] = target
    return model, variables


def test_three_steps_are_the_originals():
    """Loss, weight decay, the gradient of each variable, RMSProp, batch normalisation and the moving average."""
    model, variables = filled("efficientnet-b0", GOLDEN["model"], input_shape=(64, 64, 3))
    steps = GOLDEN["train_steps"]
    schedule = Schedule(steps["base_lr"], steps["steps_per_epoch"], 10**7)
    learner = Learner(model, Optimizer("rmsprop"), schedule, GOLDEN["label_smoothing"], GOLDEN["weight_decay"])
    state = runner.variables_of(learner)
    images, labels = tf.constant(image(64, batch=4)), tf.constant(GOLDEN["labels"])
    start = [[tf.identity(v) for v in some] for some in (state.trainable, state.moving)]

    @tf.function
    def gradients():
        trainable = start[0]
        with tf.GradientTape() as tape:
            tape.watch(trainable)
            loss, _, _ = learner.objective(trainable, start[1], images, labels, steps["start_global_step"], 4)
        return loss, learner.logits(trainable, start[1], images, 0)[0], tape.gradient(loss, trainable)

    loss, logits, found = gradients()
    assert float(loss) == pytest.approx(GOLDEN["loss"], rel=1e-5)
    assert float(learner.penalty(start[0])) == pytest.approx(GOLDEN["l2_term"], rel=1e-6)
    np.testing.assert_allclose(logits[:, :16], GOLDEN["train_logits_first16"], rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(np.argmax(logits, -1), GOLDEN["train_logits_argmax"])
    places = {id(variable): place for place, variable in enumerate(model.trainable_variables)}
    sizes = {name: float(tf.norm(found[places[id(variables[name])]])) for name in GOLDEN["grad_l2"]}
    assert len(sizes) == len(found)
    whole = GOLDEN["global_grad_norm"]
    assert float(tf.linalg.global_norm(found)) == pytest.approx(whole, rel=1e-5)
    for name, size in sizes.items():
        # Batch normalisation takes a shift in front of the next one away: those gradients are rounding alone.
        assert size == pytest.approx(GOLDEN["grad_l2"][name], rel=1e-4, abs=1e-7 * whole), name
    excluded = [v for v in model.trainable_variables if v.name in ("gamma", "beta")]
    assert {id(variables[name]) for name in GOLDEN["weight_decay_excluded"]} == {id(v) for v in excluded}

    step = tf.function(runner.replica_step(learner, state, 4))
    averages = dict(zip([id(v) for v in (*model.trainable_variables, *learner.moving)], state.averages, strict=True))
    first = {name: (np.array(variable), averages[id(variable)].numpy()) for name, variable in variables.items()}
    for number, row in enumerate(steps["steps"], steps["start_global_step"]):
        metrics = step(images, labels, tf.constant(number))
        assert float(metrics["loss"]) == pytest.approx(row["loss_before_update"], rel=1e-4)
        for name, size in row.get("moving_stats_l2", {}).items():
            assert np.linalg.norm(variables[name]) == pytest.approx(size, rel=1e-5), name
        for short, expected in row["variables"].items():
            variable = variables[f"{GOLDEN['model']}/{short}"]
            value, average = np.array(variable), averages[id(variable)].numpy()
            before, average_before = first[f"{GOLDEN['model']}/{short}"]
            for what, got in (
                ("l2", np.linalg.norm(value)),
                ("delta_l2", np.linalg.norm(value.astype(float) - before)),
                ("first4", value.ravel()[:4]),
                ("ema_first4", average.ravel()[:4]),
            ):
                np.testing.assert_allclose(got, expected[what], rtol=1e-4, atol=4e-6, err_msg=f"{short} {what}")
            # The average moves by a ten-thousandth of what it follows: few digits of its float32 tell.
            moved = np.linalg.norm(average.astype(float) - average_before)
            rounding = 6e-8 * float(np.linalg.norm(average))
            assert moved == pytest.approx(expected["ema_delta_l2"], rel=1e-4, abs=rounding), short


def test_moving_variance_takes_the_variance_of_the_batch():
    """golden/tpu/batchnorm.json: of the population, without n / (n - 1)."""
    rule = golden("tpu/batchnorm.json")
    x = np.random.default_rng(0).normal(2, 3, rule["input_shape"]).astype("float32")
    measured = rule["train: utils.TpuBatchNormalization (fused=False)"]
    assert np.allclose(measured["moving_variance_update / population variance"], 1, atol=1e-5)
    for layer in (
        keras.layers.BatchNormalization(momentum=rule["momentum"], epsilon=rule["epsilon"]),
        replicas.GroupBatchNormalization(momentum=rule["momentum"], epsilon=rule["epsilon"]),
    ):
        layer(x, training=True)
        update = (np.array(layer.moving_variance) - rule["momentum"]) / (1 - rule["momentum"])
        np.testing.assert_allclose(update / x.var((0, 1, 2)), 1, rtol=1e-4)


def test_which_replicas_share_their_statistics():
    assert [replicas.group_size(n) for n in (1, 2, 8, 16, 64, 128, 1024)] == [1, 1, 1, 8, 8, 16, 128]
    assert replicas.group_size(4, "all") == 4 and replicas.group_size(8, "2") == 2
    with pytest.raises(ValueError, match="which makes groups of 3"):
        replicas.group_size(8, 3)
    with pytest.raises(ValueError, match=r"'auto' or 'all'. Received: 'some'$"):
        replicas.group_size(8, "some")


SPREAD = """
import os, sys
import numpy as np, tensorflow as tf, keras
sys.path.insert(0, {tests!r})
count, group, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * count)
from keras_effnet.arch import resolve
from keras_effnet.variants import VARIANTS
from keras_effnet import blocks
from keras_effnet.tpu import replicas, runner
from keras_effnet.tpu.optim import Optimizer, Schedule
from keras_effnet.tpu.step import Learner

names = [f"CPU:{{n}}" for n in range(count)]
strategy = tf.distribute.MirroredStrategy(names) if count > 1 else tf.distribute.OneDeviceStrategy("CPU:0")
with strategy.scope():
    keras.utils.set_random_seed(0)
    # The first blocks of B0, with all that there is in it: drop connect, squeeze-and-excite, dropout.
    style = blocks.Style("silu", 0.9, 1e-3, "channels_last", keras.DTypePolicy("float32"))
    inputs = keras.Input((16, 16, 3))
    x = blocks.stem(style, inputs, 32, [1 / 127.5] * 3, [-1.0] * 3)
    for block in resolve(VARIANTS["efficientnet-b0"]).blocks[:3]:
        x = blocks.body(style, x, block, 0.2)
    model = keras.Model(inputs, blocks.classifier(style, blocks.head(style, x, 16), 5, 0.2, None))
    if count > 1:
        model = replicas.spread(model, replicas.group_size(count, group))
    learner = Learner(model, Optimizer("rmsprop"), Schedule(0.01, 10, 100, warmup_epochs=0), seed=3)
    state = runner.variables_of(learner)
step = runner.replica_step(learner, state, 16)

@tf.function
def run(images, labels, number):
    shares = strategy.run(step, args=(images, labels, number))
    return {{name: strategy.reduce("SUM", value, axis=None) for name, value in shares.items()}}

rng, losses = np.random.default_rng(0), []
for number in range(6):
    batch = rng.uniform(0, 255, (16, 16, 16, 3)).astype("float32"), rng.integers(0, 5, 16)
    part = tf.data.Dataset.from_tensor_slices(batch).batch(16 // count)
    images, labels = next(iter(strategy.distribute_datasets_from_function(lambda _: part)))
    losses.append(float(run(images, labels, tf.constant(number))["loss"]))
values = [variable.numpy() for variable in tf.nest.flatten(state)]
np.savez(out, losses=losses, **{{str(n): value for n, value in enumerate(values)}})
"""


@pytest.mark.parametrize(
    "counts", [pytest.param((2,), marks=pytest.mark.slow), pytest.param((2, 8), marks=pytest.mark.long)]
)
def test_one_two_and_eight_replicas_learn_the_same(counts, tmp_path):
    """Losses and all variables of real processes; masks of dropout and drop connect are of the global batch."""
    script = tmp_path / "spread.py"
    script.write_text(SPREAD.format(tests=str(ROOT / "tests")))

    def run(count, group="all"):
        out = tmp_path / f"{count}-{group}.npz"
        subprocess.run([sys.executable, script, str(count), group, out], check=True, capture_output=True, cwd=tmp_path)
        return np.load(out)

    one = run(1)
    for count in counts:
        other = run(count)
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
        for name in one.files:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-4 * np.abs(one[name]).max() + 1e-6)
    if 8 not in counts:
        return
    # Two that share nothing, and two pairs that share, see the same halves of the batch.
    halves, pairs = run(2, "1"), run(4, "2")
    assert not np.allclose(halves["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(pairs["losses"], halves["losses"], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("efficientnet-b0", marks=pytest.mark.slow),
        pytest.param("efficientnet-edgetpu-s", marks=pytest.mark.slow),
        pytest.param("efficientnet-lite0", marks=pytest.mark.long),
    ],
)
def test_steps_compile_with_xla(name):
    model = ke.create_model(name, weights=None, classifier_activation=None, classes=10, input_shape=(32, 32, 3))
    learner = Learner(model, Optimizer("rmsprop"), Schedule(0.01, 10, 100))
    state = runner.variables_of(learner)
    before = [variable.numpy() for variable in state.trainable]
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)), tf.uint8)
    labels = tf.constant([0, 1, 2, 3])
    plain = runner.replica_score(learner, state, raw=True)
    expected = {key: float(value) for key, value in plain(images, labels, tf.ones(4)).items()}
    score = tf.function(plain, jit_compile=True)
    found = score(images, labels, tf.ones(4))
    assert {key: float(value) for key, value in found.items()} == pytest.approx(expected, rel=1e-3)
    step = tf.function(runner.replica_step(learner, state, 4), jit_compile=True)
    metrics = step(images, labels, tf.constant(50))
    assert np.isfinite(float(metrics["loss"]))
    assert all(not np.array_equal(a, b) for a, b in zip(before, state.trainable, strict=True))
    shapes = step.get_concrete_function(images, labels, tf.constant(50)).graph
    assert all(tensor.shape.is_fully_defined() for op in shapes.get_operations() for tensor in op.outputs)


def test_masks_follow_from_seed_and_step():
    model = ke.EfficientNetLite0(
        weights=None, classes=10, input_shape=(32, 32, 3), classifier_activation=None, dropout_rate=0.5
    )
    images = tf.constant(np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)), tf.float32)

    def logits(seed, step):
        learner = Learner(model, Optimizer("sgd"), Schedule(0.1, 10, 100), seed=seed)
        state = learner.start()
        return learner.logits(state.trainable, state.moving, images, step)[0].numpy()

    assert np.array_equal(logits(1, 7), logits(1, 7))
    assert not np.allclose(logits(1, 7), logits(1, 8)) and not np.allclose(logits(1, 7), logits(2, 7))


def test_low_precision_computes_and_float32_keeps():
    """mixed_bfloat16: the loss, its gradients and all that is kept are float32."""
    logits = {}
    for policy in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        model = ke.EfficientNetLite0(
            weights=None,
            classes=10,
            input_shape=(96, 96, 3),
            classifier_activation=None,
            dtype=policy,
            dropout_rate=0,
            drop_connect_rate=0,
        )
        learner = Learner(model, Optimizer("rmsprop"), Schedule(0.1, 10, 100))
        state = learner.start()
        images = tf.constant(np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3)), tf.uint8)
        with tf.GradientTape() as tape:
            tape.watch(state.trainable)
            loss, moving, _ = learner.objective(state.trainable, state.moving, images, tf.range(8), 0, 8)
        gradients = tape.gradient(loss, state.trainable)
        after = learner.update(state, gradients, moving, tf.constant(0))
        assert {value.dtype for value in (loss, *gradients, *tf.nest.flatten(after))} == {tf.float32}
        assert model.get_layer("stem_conv").compute_dtype == ("bfloat16" if "bfloat16" in policy else "float32")
        logits[policy] = learner.logits(state.trainable, state.moving, images, 0)[0].numpy()
    whole, low = (values.ravel() for values in logits.values())
    assert not np.allclose(whole, low, rtol=1e-3) and np.corrcoef(whole, low)[0, 1] > 0.97

"""Protects the arithmetic of a training step: it equals the original's model_fn, on one device and on many."""

import os
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import BACKEND, golden, image, seeded

import keras_effnet as ke
from keras_effnet.nets import inspection
from keras_effnet.tpu import model_from_recipe
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.step import cross_replica
from keras_effnet.tpu.step.optimizers import Optimizer
from keras_effnet.tpu.step.schedules import Schedule
from keras_effnet.tpu.step.train_step import Learner
from keras_effnet.weights import name_translation, naming_tables
from keras_effnet.weights.layouts import LAYOUTS

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's runner")
if BACKEND == "tensorflow":
    from keras_effnet.tpu.runners import tensorflow_runner as runner
else:
    import jax

    from keras_effnet.tpu.runners import jax_runner as runner
    from keras_effnet.tpu.runners import jax_trainer

GOLDEN = golden("tpu/train-efficientnet-b0.json")


def filled(name: str, scope: str, **kwargs):
    """Returns a model with logits and the original's seeded values, and its variables by the original's names."""
    model = ke.create_model(
        name,
        weights=None,
        dropout_rate=0,
        drop_connect_rate=0,
        classifier_activation=None,
        preprocessing=None,
        **kwargs,
    )
    reading = inspection.read(model)
    names = name_translation.foreign_names(reading.architecture, naming_tables.TPU, reading.channels, reading.classes)
    variables = {}
    for (layer, variable), found in names.items():
        target = next(weight for weight in reading.layers[layer].weights if weight.name == variable)
        layout, full = LAYOUTS[found.layout], f"{scope}/{found.foreign}"
        shape = layout.from_keras(np.empty(found.shape)).shape
        target.assign(layout.to_keras(seeded(full, shape), found.shape))
        variables[full] = target
    return model, variables


def stepping(learner: Learner, batch: int):
    """Returns a runner's step on one device, which returns the loss, and a function for values and averages by path."""
    if BACKEND == "tensorflow":
        state = runner.variables_of(learner)
        one = tf.function(runner.replica_step(learner, state, batch))

        def step(images, labels, number):
            return float(one(tf.constant(images), tf.constant(labels), tf.constant(number))["loss"])

        def values():
            return learner.by_name(state)
    else:
        machine = runner.Devices(runner.make_mesh(jax.devices(), 1), 1)
        kept, stop = machine.variables(learner), np.zeros(1, "float32")
        compiled = runner.train_step(learner, machine.mesh, batch)

        def step(images, labels, number):
            kept.state, told = compiled(kept.state, images, labels, np.int32(number), stop)
            return float(told[0])

        def values():
            return learner.by_name(kept.state)

    def both():
        found = values()
        pairs = {path: (value, found["averages"][path]) for path, value in found["variables"].items()}
        return {path: (np.array(value), np.array(average)) for path, (value, average) in pairs.items()}

    return step, both


def test_three_steps_are_the_originals():
    """Compares loss, weight decay, each gradient, RMSProp, batch normalization and the moving average."""
    model, variables = filled("efficientnet-b0", GOLDEN["model"], input_shape=(64, 64, 3))
    steps = GOLDEN["train_steps"]
    schedule = Schedule(steps["base_lr"], steps["steps_per_epoch"], 10**7)
    learner = Learner(model, Optimizer("rmsprop"), schedule, GOLDEN["label_smoothing"], GOLDEN["weight_decay"])
    images, labels = image(64, batch=4), np.asarray(GOLDEN["labels"], "int32")
    start = learner.start()

    def gradients(trainable):
        def objective(trainable):
            return learner.objective(trainable, start.moving, images, labels, steps["start_global_step"], 4)

        told, found = runner.gradient(objective, trainable)
        return told[0], learner.logits(trainable, start.moving, images, 0)[0], found

    once = gradients if BACKEND == "tensorflow" else jax.jit(gradients)  # TensorFlow takes longer to trace it
    loss, logits, found = once(start.trainable)
    found = [np.asarray(gradient) for gradient in found]
    assert float(loss) == pytest.approx(GOLDEN["loss"], rel=1e-5)
    assert float(learner.penalty(start.trainable)) == pytest.approx(GOLDEN["l2_term"], rel=1e-6)
    np.testing.assert_allclose(logits[:, :16], GOLDEN["train_logits_first16"], rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(np.argmax(logits, -1), GOLDEN["train_logits_argmax"])
    places = {id(variable): place for place, variable in enumerate(model.trainable_variables)}
    sizes = {name: float(np.linalg.norm(found[places[id(variables[name])]])) for name in GOLDEN["grad_l2"]}
    assert len(sizes) == len(found)
    whole = GOLDEN["global_grad_norm"]
    norms = [np.linalg.norm(gradient.astype(float)) for gradient in found]
    assert np.linalg.norm(norms) == pytest.approx(whole, rel=1e-5)
    for name, size in sizes.items():
        # Batch normalization removes a shift before it: the gradients of such shifts are only rounding.
        assert size == pytest.approx(GOLDEN["grad_l2"][name], rel=1e-4, abs=1e-7 * whole), name
    excluded = [v for v in model.trainable_variables if v.name in ("gamma", "beta")]
    assert {id(variables[name]) for name in GOLDEN["weight_decay_excluded"]} == {id(v) for v in excluded}

    step, values = stepping(learner, 4)
    first = values()
    for number, row in enumerate(steps["steps"], steps["start_global_step"]):
        assert step(images, labels, number) == pytest.approx(row["loss_before_update"], rel=1e-4)
        now = values()
        for name, size in row.get("moving_stats_l2", {}).items():
            assert np.linalg.norm(now[variables[name].path][0]) == pytest.approx(size, rel=1e-5), name
        for short, expected in row["variables"].items():
            path = variables[f"{GOLDEN['model']}/{short}"].path
            (value, average), (before, average_before) = now[path], first[path]
            for what, got in (
                ("l2", np.linalg.norm(value)),
                ("delta_l2", np.linalg.norm(value.astype(float) - before)),
                ("first4", value.ravel()[:4]),
                ("ema_first4", average.ravel()[:4]),
            ):
                np.testing.assert_allclose(got, expected[what], rtol=1e-4, atol=4e-6, err_msg=f"{short} {what}")
            # The average moves by a ten-thousandth of what it follows, which is few digits of its float32.
            moved = np.linalg.norm(average.astype(float) - average_before)
            rounding = 6e-8 * float(np.linalg.norm(average))
            assert moved == pytest.approx(expected["ema_delta_l2"], rel=1e-4, abs=rounding), short


def test_moving_variance_takes_the_variance_of_the_batch():
    """The population variance, without n / (n - 1), as in golden/tpu/batchnorm.json."""
    rule = golden("tpu/batchnorm.json")
    x = np.random.default_rng(0).normal(2, 3, rule["input_shape"]).astype("float32")
    measured = rule["train: utils.TpuBatchNormalization (fused=False)"]
    assert np.allclose(measured["moving_variance_update / population variance"], 1, atol=1e-5)
    for layer in (
        keras.layers.BatchNormalization(momentum=rule["momentum"], epsilon=rule["epsilon"]),
        cross_replica.GroupBatchNormalization(momentum=rule["momentum"], epsilon=rule["epsilon"]),
    ):
        layer(x, training=True)
        update = (np.array(layer.moving_variance) - rule["momentum"]) / (1 - rule["momentum"])
        np.testing.assert_allclose(update / x.var((0, 1, 2)), 1, rtol=1e-4)


def test_totals_of_earlier_versions_are_completed(tmp_path):
    """Checkpoints once lacked the sum of the losses without weight decay."""
    if BACKEND == "jax":
        state = {"slots": {"a": 1}, "scaling": {"scale": 2}}
        found = jax_trainer.upgraded({"totals": np.array([6.0, 2.0, 3.0, 4.0], "float32"), "state": state})
        np.testing.assert_array_equal(found["totals"], [6, 2, 3, 6, 4])
        assert found["state"] == {"slots": {"a": 1}}
        assert jax_trainer.upgraded(found | {"state": state}, scales_loss=True)["state"] == state
        assert np.array_equal(jax_trainer.upgraded(found)["totals"], found["totals"])
        return
    old = tf.train.Checkpoint(sums=tf.Variable([6.0, 2.0, 3.0]), steps=tf.Variable(4))
    totals = runner.Totals()
    status = tf.train.Checkpoint(totals=totals).read(tf.train.Checkpoint(totals=old).write(str(tmp_path / "old")))
    status.assert_existing_objects_matched()
    totals.complete()
    totals.complete()
    assert (totals.sums.numpy().tolist(), totals.steps.numpy()) == ([6, 2, 3, 6], 4)


def test_which_replicas_share_their_statistics():
    assert [cross_replica.group_size(n) for n in (1, 2, 8, 16, 64, 128, 1024)] == [1, 1, 1, 8, 8, 16, 128]
    assert cross_replica.group_size(4, "all") == 4 and cross_replica.group_size(8, "2") == 2
    with pytest.raises(ValueError, match="which makes groups of 3"):
        cross_replica.group_size(8, 3)
    with pytest.raises(ValueError, match=r"'auto' or 'all'. Received: 'some'$"):
        cross_replica.group_size(8, "some")


SPREAD = """
import os, sys
kinds = int, str, float, int, str, str
count, group, rate, steps, fused, out = (kind(part) for kind, part in zip(kinds, sys.argv[1:], strict=True))
import numpy as np, tensorflow as tf, keras
from keras_effnet.nets import blocks
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.tpu import train
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.step import cross_replica
from keras_effnet.tpu.step.train_step import Learner
from keras_effnet.tpu.step.optimizers import Optimizer
from keras_effnet.tpu.step.schedules import Schedule

machine = train.runner.connect(Run(cpu_replicas=count, batch_norm_group=group))
assert machine.count == count
with machine.scope():
    keras.utils.set_random_seed(0)
    # The first blocks of B0, with all its parts: drop connect, squeeze-and-excite, dropout.
    style = blocks.Style("silu", 0.9, 1e-3, "channels_last", keras.DTypePolicy("float32"))
    inputs = keras.Input((16, 16, 3))
    x = blocks.stem(style, inputs, 32, [1 / 127.5] * 3, [-1.0] * 3)
    for block in resolve(VARIANTS["efficientnet-b0"]).blocks[:3]:
        x = blocks.body(style, x, block, rate)
    model = keras.Model(inputs, blocks.classifier(style, blocks.head(style, x, 16), 5, rate, None))
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:  # the same on both backends
        if len(variable.shape) > 1:
            variable.assign(rng.normal(0, 1, variable.shape) * np.sqrt(2 / np.prod(variable.shape[:-1])))
    model = machine.adapted(model, cross_replica.group_size(count, group), () if fused == "kernels" else fused)
    if fused == "kernels":  # TPU kernels, interpreted, with as many images as a TPU has lanes
        from keras_effnet.tpu.runners import jax_fused, jax_kernels
        jax_kernels._IMAGES = 16 // count
        model = jax_fused.fuse(model, interpret=True)
        assert "BodyUnit" in [type(layer).__name__ for layer in model.layers]
    learner = Learner(model, Optimizer("rmsprop"), Schedule(0.004, 10, 100, warmup_epochs=0), seed=3)
    state = machine.variables(learner)
step, losses = tf.Variable(0, dtype=tf.int64), []

def batches(host, parts, python):
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(0, 255, (steps * 16, 16, 16, 3)).astype("float32"), rng.integers(0, 5, steps * 16)
    images += 20 * labels[:, None, None, None]
    return tf.data.Dataset.from_tensor_slices((images, labels.astype("int32"))).batch(16 // parts)

trainer = machine.trainer(learner, state, step, lambda: iter(machine.batches(batches)), 16)
for _ in range(steps):
    losses.append(float(trainer.train(tf.constant(1))["loss"]))
kinds = learner.by_name(getattr(state, "state", state)).items()
np.savez(out, losses=losses, **{f"{kind} {name}": np.array(v) for kind, some in kinds for name, v in some.items()})
"""


def spread(
    backend: str, out, count: int = 1, group: str = "all", rate: float = 0.0, steps: int = 6, fused: str = "none"
):
    """Runs a few steps in a separate process. Returns the losses and all variables."""
    command = [sys.executable, "-c", SPREAD, *map(str, (count, group, rate, steps, fused, out))]
    forced = f"--xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": forced if backend == "jax" else ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return np.load(out)


def same(one, other, rtol=1e-4):
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
    for name in one.files:
        np.testing.assert_allclose(other[name], one[name], rtol=rtol, atol=rtol * np.abs(one[name]).max() + 1e-6)


@tensorflow_only
@pytest.mark.long
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_one_and_many_replicas_learn_the_same(backend, tmp_path):
    """The global batch determines the masks of dropout and drop connect, and shared batch statistics."""
    one = spread(backend, tmp_path / "one.npz", rate=0.2)
    same(one, spread(backend, tmp_path / "many.npz", 8 if backend == "jax" else 2, rate=0.2))


@tensorflow_only
@pytest.mark.long
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_groups_share_their_statistics(backend, tmp_path):
    one, eight = (spread(backend, tmp_path / f"{count}.npz", count, rate=0.2) for count in (1, 8))
    same(one, eight)
    # Two replicas that share nothing see the same halves of the batch as two pairs that share statistics.
    halves, pairs = spread(backend, tmp_path / "halves.npz", 2, "1"), spread(backend, tmp_path / "pairs.npz", 4, "2")
    assert not np.allclose(halves["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(pairs["losses"], halves["losses"], rtol=1e-5)


@tensorflow_only
@pytest.mark.long
@pytest.mark.parametrize("counts", [(1,), (1, 8)])
def test_both_runners_have_the_same_curve(counts, tmp_path):
    """50 steps agree up to float32 rounding without masks, on 1 and 8 devices. With masks, their means agree."""
    one = spread("tensorflow", tmp_path / "tensorflow.npz", steps=50)
    assert np.mean(one["losses"][-10:]) < 0.9 * np.mean(one["losses"][:10])  # the model learns
    for count in counts:
        same(one, spread("jax", tmp_path / f"{count}.npz", count, steps=50), rtol=1e-3)
    if 8 not in counts:
        return
    masked = [spread(backend, tmp_path / f"{backend}.npz", rate=0.3, steps=50) for backend in ("tensorflow", "jax")]
    means = [np.mean(one["losses"][25:]) for one in masked]
    assert means[0] == pytest.approx(means[1], rel=0.05) and not np.allclose(masked[0]["losses"], masked[1]["losses"])


@tensorflow_only
@pytest.mark.long
def test_layers_as_one_have_the_same_curve(tmp_path):
    """Runs 50 steps of the JAX runner on one device, and on two pairs that share batch statistics."""
    for count, group in ((1, "all"), (4, "2")):
        plain, *others = (
            spread("jax", tmp_path / f"{count}-{fused}.npz", count, group, 0.2, 50, fused)
            for fused in ("none", "layers", "kernels")
        )
        for fused in others:
            same(plain, fused, rtol=1e-3)


@tensorflow_only
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("efficientnet-b0", marks=pytest.mark.long),
        pytest.param("efficientnet-edgetpu-s", marks=pytest.mark.long),
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


@tensorflow_only
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


def test_an_overflow_halves_the_scale_and_changes_nothing():
    """Gradients in float16 are those of a scaled loss. A step whose gradients are not finite is skipped."""
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(0, 1, (4, 8, 8, 3)).astype("float32"), np.array([0, 1, 2, 0], "int32")

    def learner(policy: str, scales_loss: bool) -> Learner:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8, 8, 3))
        x = keras.layers.Conv2D(4, 3, dtype=policy)(inputs)
        x = keras.layers.GlobalAveragePooling2D(dtype=policy)(keras.layers.BatchNormalization(dtype=policy)(x))
        model = keras.Model(inputs, keras.layers.Dense(3, dtype=policy)(x))
        return Learner(model, Optimizer("adam"), Schedule(0.1, 10, 100, warmup_epochs=0), scales_loss=scales_loss)

    def step(one: Learner, scaling: list[float] | None = None):
        """Returns all values before and after a step, in order, and the scaling after it."""
        before = one.start()
        if scaling:
            before = before._replace(scaling=[keras.ops.convert_to_tensor(value, "float32") for value in scaling])
        after, metrics = one.train(before, images, labels, 0, 4, runner.gradient)
        assert np.isfinite(float(metrics["loss"])) and "scaling" in one.by_name(after)
        values = [keras.tree.map_structure(np.asarray, keras.tree.flatten(state[:4])) for state in (before, after)]
        return *values, [float(value) for value in after.scaling]

    # In float32, a power of 2 changes no bit.
    plain, scaled = (learner("float32", scales_loss) for scales_loss in (False, True))
    assert not plain.start().scaling and "scaling" not in plain.by_name(plain.start())
    expected, _ = plain.train(plain.start(), images, labels, 0, 4, runner.gradient)
    before, after, scaling = step(scaled)
    assert scaling == [2**15, 1]
    for found, value in zip(after, keras.tree.flatten(expected[:4]), strict=True):
        np.testing.assert_array_equal(found, value)

    low = learner("mixed_float16", True)
    before, after, scaling = step(low)
    assert scaling == [2**15, 1] and all(value.dtype == np.float32 for value in after)
    assert not any(np.array_equal(old, new) for old, new in zip(before, after, strict=True) if old.ndim > 1)
    before, after, scaling = step(low, [2.0**100, 7])
    assert scaling == [2**99, 0]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new, old)
    assert step(low, [2.0**10, 1999])[-1] == [2**11, 0] and step(scaled, [2.0**24, 1999])[-1] == [2**24, 0]
    # With nothing left to halve, the runner finds the variables that are not finite.
    state = low.start()._replace(scaling=[keras.ops.ones(()), keras.ops.zeros(())])
    broken = low.update(state, [value * np.inf for value in state.trainable], state.moving, 0)
    assert not np.isfinite(np.asarray(broken.trainable[0])).all() and float(broken.scaling[0]) == 1


def test_auto_is_bfloat16_where_a_gpu_has_it():
    def chosen(precision="auto", is_tpu=False, capability=(0, 0)):
        return model_from_recipe.policy(Run(precision=precision), SimpleNamespace(is_tpu=is_tpu, capability=capability))

    assert chosen() == chosen(capability=(7, 5)) == chosen("float32", capability=(9, 0)) == "float32"
    assert chosen(is_tpu=True) == chosen(capability=(8, 0)) == chosen(capability=(12, 0)) == "mixed_bfloat16"
    assert chosen("mixed_float16", capability=(9, 0)) == "mixed_float16"
    assert runner.connect(Run(devices="cpu")).capability == (0, 0)


@tensorflow_only
@pytest.mark.usefixtures("shallow")
def test_low_precision_computes_and_float32_keeps():
    """With mixed_bfloat16, the loss, its gradients and the whole state are float32."""
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
    assert not np.allclose(whole, low, rtol=1e-3) and np.corrcoef(whole, low)[0, 1] > 0.99

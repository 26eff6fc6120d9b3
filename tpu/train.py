"""Trains one recipe on whatever devices there are. Read top to bottom."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from typing import Any

import keras
import orbit
import tensorflow as tf

from keras_effnet import blocks, models
from keras_effnet.errors import one_of
from keras_effnet.tpu import data, optim, replicas
from keras_effnet.tpu.config import Recipe, Run, flat, from_json, to_json
from keras_effnet.tpu.progress import Log
from keras_effnet.tpu.runner import Evaluator, Trainer, connect, variables_of
from keras_effnet.tpu.sources import Source, open_source
from keras_effnet.tpu.step import Learner, State
from keras_effnet.variants import VARIANTS


@contextlib.contextmanager
def _plainly():
    """An error of TensorFlow's, as of a storage that refuses, is told like any other."""
    try:
        yield
    except tf.errors.OpError as error:
        raise ValueError(error.message) from error


@_plainly()
def train(recipe: Recipe, workdir: str | os.PathLike, quiet: bool = False) -> dict[str, Any]:
    """Trains a recipe, or goes on with one that was interrupted.

    The folder then holds config.json, checkpoints, metrics.jsonl, TensorBoard's files, skipped-*.jsonl (what could not
    be read), model.keras with the moving average of all variables, and result.json.

    Args:
        recipe: `Recipe`.
        workdir: Path of a folder, which may be on Cloud Storage (`gs://`).
        quiet: Boolean, whether to show no progress. Defaults to False.

    Returns:
        Dict of what stands in result.json: `steps`, `top1` and `top5` (shares), the same of the moving average
        (`ema_top1`, ...), `images_per_second` and more.

    Raises:
        ValueError: If the recipe does not fit the data, the devices, or the run that is in the folder.

    Example:

    >>> from keras_effnet.tpu import override, recipes
    >>> from keras_effnet.tpu.train import train
    >>> recipe = override(recipes.find("digits_demo"), ["--epochs", "2"])
    >>> result = train(recipe, "runs/digits")  # doctest: +SKIP

    Reference:
        tensorflow/tpu efficientnet main.py.
    """
    workdir = os.fspath(workdir).rstrip("/")
    tf.io.gfile.makedirs(workdir)

    # The recipe is written down before anything else happens.
    _check(recipe)
    _write_config(recipe, workdir)

    # Devices. Everything below is the same for one processor and for a slice of TPUs.
    strategy = connect(recipe.run)
    count = strategy.num_replicas_in_sync
    _check_batches(recipe, count)

    # What is trained on what.
    source = open_source(recipe.data, cache=f"{workdir}/records.json")
    size = recipe.model.image_size or VARIANTS[recipe.model.name].resolution
    classes = recipe.data.classes or source.classes
    if classes < source.classes:
        raise ValueError(f"Expected data.classes of at least the {source.classes} that there are. Received: {classes}")
    steps_per_epoch = source.train_count / recipe.batch_size  # a float, as in the original
    total = int(recipe.epochs * steps_per_epoch)
    if total < 1:
        raise ValueError(
            f"Expected at least one step: epochs * {source.train_count} images / batch_size. Received: "
            f"epochs={recipe.epochs:g}, batch_size={recipe.batch_size}"
        )
    numbers = {"image_size": size, "classes": classes, "steps": total, "steps_per_epoch": steps_per_epoch}
    _write_config(recipe, workdir, **numbers, peak=recipe.peak, replicas=count)

    # The model and all that a step changes are made together, where the devices want it.
    with strategy.scope():
        keras.utils.set_random_seed(recipe.run.seed)
        model = build(recipe, classes, "mixed_bfloat16" if _is_low(recipe.run, strategy) else "float32")
        if count > 1:
            model = replicas.spread(model, replicas.group_size(count, recipe.run.batch_norm_group))
        learner = make_learner(model, recipe, steps_per_epoch, total)
        state = variables_of(learner)
    step = orbit.utils.create_global_step()

    # Checkpoints. Restored: the one in the folder, else what the model was built with.
    checkpoint = tf.train.Checkpoint(step=step, state=_by_name(learner, state))
    manager = tf.train.CheckpointManager(
        checkpoint,
        f"{workdir}/checkpoints",
        max_to_keep=recipe.run.keep,
        step_counter=step,
        checkpoint_interval=max(1, round(recipe.run.save_every * steps_per_epoch)),
    )

    # Data. Each host reads its own part, from where the restored step left it.
    accounts: dict[str, data.Skipped] = {}

    def train_batches():
        def part(context):
            host = _host(context, strategy)
            batch, here = recipe.batch_size // host.count, count // host.count
            path = f"{workdir}/skipped-{host.index}.jsonl"
            if not step.numpy() and tf.io.gfile.exists(path):
                tf.io.gfile.remove(path)  # of a run that did not come to its first checkpoint
            skipped = data.Skipped(path, source.train.count(host.index, host.count), recipe.data.max_corrupt)
            accounts[f"train {host.index}"] = skipped
            return data.training(
                source, recipe, size, batch, skipped, parts=here, start=int(step.numpy()) * batch, host=host
            )

        return iter(strategy.distribute_datasets_from_function(part))

    def eval_batches():
        def part(context):
            host = _host(context, strategy)
            skipped = data.Skipped(None, source.evaluate.evaluated(host.index, host.count), recipe.data.max_corrupt)
            accounts[f"eval {host.index}"] = skipped
            batch, here = (recipe.run.eval_batch or recipe.batch_size) // host.count, count // host.count
            return data.evaluation(source, recipe, size, batch, skipped, parts=here, host=host)

        return iter(strategy.distribute_datasets_from_function(part))

    log = Log(workdir, recipe.batch_size, total, quiet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(log.text))  # orbit prints what it does
        controller = orbit.Controller(
            strategy=strategy,
            trainer=Trainer(strategy, learner, state, step, train_batches, recipe.batch_size, recipe.run.xla),
            evaluator=Evaluator(strategy, learner, state, eval_batches, recipe.run.eval_raw),
            global_step=step,
            checkpoint_manager=manager,
            steps_per_loop=recipe.run.steps_per_loop,
            summary_dir=f"{workdir}/tensorboard/train",
            eval_summary_dir=f"{workdir}/tensorboard/eval",
            train_actions=[lambda metrics: log.trained(int(step.numpy()), metrics)],
        )
        done = int(step.numpy())
        if done >= total and tf.io.gfile.exists(f"{workdir}/result.json"):
            return json.loads(tf.io.gfile.GFile(f"{workdir}/result.json").read())
        # Loop.
        log.begin(done)
        stack.callback(log.end)
        every = max(1.0, recipe.run.eval_every * steps_per_epoch)
        stops = (min(total, int(number * every)) for number in itertools.count(1))
        try:
            while True:
                if done < total:
                    target = next(stop for stop in stops if stop > done)
                    controller.train(target, checkpoint_at_completion=target == total)
                results = controller.evaluate()
                done = int(step.numpy())
                log.evaluated(done, _checked(results, source, accounts))
                if done >= total:
                    break
        except tf.errors.OpError as error:
            for account in accounts.values():
                if account.problem:
                    raise ValueError(account.problem) from error
            raise

    export(recipe, classes, learner, state).save(f"{workdir}/model.keras")
    skipped = sorted({name for account in accounts.values() for name in account.names})
    result = {"model": recipe.model.name, "steps": done, "epochs": recipe.epochs, **log.last, "skipped": len(skipped)}
    result |= {
        "labels": list(source.labels),
        "expected_top1": recipe.expected_top1,
        "seconds": round(time.monotonic() - log.started, 1),
    }
    with tf.io.gfile.GFile(f"{workdir}/result.json", "w") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    return result


def _check(recipe: Recipe) -> None:
    one_of("model", recipe.model.name, VARIANTS)
    named = {"batch_size": recipe.batch_size, "epochs": recipe.epochs}
    named |= {f"run.{name}": getattr(recipe.run, name) for name in ("steps_per_loop", "keep", "cpu_replicas")}
    named |= {f"run.{name}": getattr(recipe.run, name) for name in ("eval_every", "save_every")}
    for name, value in named.items():
        if value <= 0:
            raise ValueError(f"Expected {name} above 0. Received: {value}")


def _host(context, strategy: tf.distribute.Strategy) -> data.Host:
    if context.num_input_pipelines > 1 and isinstance(strategy, tf.distribute.TPUStrategy):
        raise ValueError(
            "Expected a TPU slice with one host, whose process reads the data and knows what it skipped. Received: one "
            f"with {context.num_input_pipelines} hosts"
        )
    return data.Host(context.input_pipeline_id, context.num_input_pipelines)


def _write_config(recipe: Recipe, workdir: str, **resolved) -> None:
    path = f"{workdir}/config.json"
    if tf.train.latest_checkpoint(f"{workdir}/checkpoints") and tf.io.gfile.exists(path):
        old, new = (flat(dataclasses.asdict(one)) for one in (from_json(tf.io.gfile.GFile(path).read()), recipe))
        changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        free = ("run.", "source ", "expected_top1 ")  # what does not change what is computed
        changed = [told for told in changed if not told.startswith(free) or told.startswith("run.seed")]
        if changed:
            raise ValueError(
                f"Expected the recipe of the run that is in {workdir!r}, or an empty folder. Received: "
                + ", ".join(changed)
            )
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(to_json(recipe, **resolved))


def _check_batches(recipe: Recipe, count: int) -> None:
    for name, size in (("batch_size", recipe.batch_size), ("run.eval_batch", recipe.run.eval_batch or count)):
        if size < 1 or size % count:
            raise ValueError(f"Expected {name} as a multiple of the {count} replicas. Received: {size}")


def _is_low(run: Run, strategy: tf.distribute.Strategy) -> bool:
    is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    return run.precision == "mixed_bfloat16" or (run.precision == "auto" and is_tpu)


def build(recipe: Recipe, classes: int, dtype: str) -> keras.Model:
    """The model of a recipe with the values that its training starts from; it gives logits.

    Args:
        recipe: `Recipe`.
        classes: Integer.
        dtype: String, dtype or policy of the layers.

    Returns:
        A `keras.Model`.
    """
    how, donor = recipe.model, None
    scheme: Any = how.preprocessing
    if how.weights is not None:
        top: dict[str, Any] = {"classes": classes} if how.keep_top else {"include_top": False}
        donor = models.create_model(
            how.name, weights=how.weights, preprocessing=scheme, classifier_activation=None, **top, **_shape(recipe)
        )
        scheme = _scheme(donor)
    model = models.create_model(
        how.name,
        weights=None,
        classes=classes,
        classifier_activation=None,
        preprocessing=scheme,
        dtype=dtype,
        **_shape(recipe),
    )
    for layer in donor.layers if donor else ():
        model.get_layer(layer.name).set_weights(layer.get_weights())
    for layer in model.layers:
        frozen = how.freeze == "batch-norm" and isinstance(layer, keras.layers.BatchNormalization)
        if frozen or (how.freeze == "all-but-top" and layer.name != "predictions"):
            layer.trainable = False
    return model


def _shape(recipe: Recipe) -> dict[str, Any]:
    how = recipe.model
    size = how.image_size or VARIANTS[how.name].resolution
    return {
        "input_shape": (size, size, 3),
        "dropout_rate": how.dropout_rate,
        "drop_connect_rate": how.drop_connect_rate,
        "bn_momentum": how.bn_momentum,
        "bn_epsilon": how.bn_epsilon,
    }


def _scheme(model: keras.Model) -> tuple[Any, Any]:
    """What a model does with pixels: scale and offset."""
    reading = blocks.read(model)
    return reading.scale, reading.offset


def make_learner(model: keras.Model, recipe: Recipe, steps_per_epoch: float, total: int) -> Learner:
    """Loss, optimizer, schedule and average of a recipe.

    Args:
        model: A `keras.Model` that gives logits.
        recipe: `Recipe`.
        steps_per_epoch: Float.
        total: Integer, steps of the whole run.

    Returns:
        A `Learner`.
    """
    how = recipe.optimizer
    hyper = {field.name: getattr(how, field.name) for field in dataclasses.fields(optim.Hyperparameters)}
    schedule = dataclasses.asdict(recipe.schedule)
    return Learner(
        model,
        optim.Optimizer(how.name, optim.Hyperparameters(**hyper), how.clip_norm),
        optim.Schedule(recipe.peak, steps_per_epoch, total, **schedule),
        smoothing=recipe.label_smoothing,
        weight_decay=how.weight_decay,
        decayed=how.decayed,
        average_decay=recipe.average_decay,
        seed=recipe.run.seed,
    )


def export(recipe: Recipe, classes: int, learner: Learner, state: State) -> keras.Model:
    """A plain model with the moving average of all variables.

    Args:
        recipe: `Recipe`.
        classes: Integer.
        learner: `Learner`.
        state: `State`.

    Returns:
        A `keras.Model` that gives probabilities.
    """
    scheme = _scheme(learner.model)
    model = models.create_model(
        recipe.model.name, weights=None, classes=classes, preprocessing=scheme, **_shape(recipe)
    )
    names = [v.path for v in (*learner.model.trainable_variables, *learner.moving)]
    averages = dict(zip(names, state.averages, strict=True))
    for variable in model.weights:
        variable.assign(averages[variable.path])
    return model


def _by_name(learner: Learner, state: State) -> dict[str, Any]:
    trainable = [v.path for v in learner.model.trainable_variables]
    moving = [v.path for v in learner.moving]
    slots = {
        f"{path}:{name}": variable
        for path, slot in zip(trainable, state.slots, strict=True)
        for name, variable in slot.items()
    }
    return {
        "variables": dict(zip([*trainable, *moving], [*state.trainable, *state.moving], strict=True)),
        "averages": dict(zip([*trainable, *moving], state.averages, strict=True)),
        "slots": slots,
    }


def _checked(results: Any, source: Source, accounts: dict[str, data.Skipped]) -> dict[str, float]:
    """The results, if each example was counted once."""
    skipped = sum(len(account) for name, account in accounts.items() if name.startswith("eval"))
    if results["examples"] + skipped != source.eval_count:
        raise ValueError(
            f"Expected to evaluate {source.eval_count} examples. Received: {results['examples']:.0f}, and {skipped} "
            "that cannot be read"
        )
    return dict(results)

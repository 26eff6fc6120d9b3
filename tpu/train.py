"""Prepares a run: its data, model and devices; starts or resumes it, and saves what it leaves. See `_train()`."""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import orbit
import tensorflow as tf

from keras_effnet.errors import one_of
from keras_effnet.ranges import check_fields
from keras_effnet.tpu import training_loop
from keras_effnet.tpu.config import Recipe, Run, to_json
from keras_effnet.tpu.input import pipeline
from keras_effnet.tpu.input.example_readers import Items
from keras_effnet.tpu.input.sources import Source, open_source
from keras_effnet.tpu.model_from_recipe import build, classes_of, export, freezing, make_learner, policy, save, whole
from keras_effnet.tpu.recipes.finetune import decided
from keras_effnet.tpu.reports import html_report
from keras_effnet.tpu.reports.progress import Log
from keras_effnet.tpu.resume import cloud_files, lock, stop_signals
from keras_effnet.tpu.resume.checkpoints import Checkpoints, full, steps
from keras_effnet.tpu.resume.recipe_changes import (
    changes_of,
    check_allowed,
    check_runner,
    other_devices,
    probed,
    recorded,
)
from keras_effnet.tpu.step import cross_replica
from keras_effnet.tpu.step.losses import balancing
from keras_effnet.tpu.step.train_step import Learner
from keras_effnet.tpu.training_loop import Job

# The module that computes steps on devices, by Keras' backend. Everything else is shared.
RUNNERS = {"tensorflow": "keras_effnet.tpu.runners.tensorflow_runner", "jax": "keras_effnet.tpu.runners.jax_runner"}

runner: Any = importlib.import_module(RUNNERS[one_of("KERAS_BACKEND for training", keras.backend.backend(), RUNNERS)])


@contextlib.contextmanager
def _plainly():
    """Turns errors of TensorFlow, such as those of a storage, and of the devices into a `ValueError`."""
    try:
        yield
    except (tf.errors.OpError, *runner.ERRORS) as error:
        raise ValueError(getattr(error, "message", None) or str(error)) from error


@_plainly()
def train(
    recipe: Recipe, workdir: str | os.PathLike, quiet: bool = False, allow_changes: bool = False
) -> dict[str, Any]:
    """Trains a recipe, or resumes its training, with Keras' backend: TensorFlow or JAX.

    Leaves in the folder: config.json, checkpoints, metrics.jsonl, TensorBoard's files, skipped-*.jsonl (unreadable
    images), model.keras with the moving average of all variables, best.keras with the best moving average if that is
    not the last, report.html and result.json.

    SIGTERM, SIGHUP and Ctrl-C save the state after the current step and end the process.

    Args:
        recipe: `Recipe`.
        workdir: Path of the run folder, which may be on Cloud Storage (`gs://`). All hosts have to see it.
        quiet: Boolean, whether to show no progress. Defaults to False.
        allow_changes: Boolean, whether to resume even if the recipe has changed. Defaults to False.

    Returns:
        Dict, the content of result.json: `steps`, `top1` and `top5` (as shares), the same of the moving average
        (`ema_top1`, ...), the best step and its top-1, `stopped_early` (the reason, or None), `images_per_second` and
        more.

    Raises:
        ValueError: If the recipe does not fit the data, the devices or the run in the folder; if another run uses the
            folder; or if the loss is not finite.
        OSError: If the disk is full.
        SystemExit: With status 75 after SIGTERM or SIGHUP, or when another host is lost: the same call resumes. With
            130 after Ctrl-C.

    Example:

    >>> from keras_effnet.tpu import override, recipes
    >>> from keras_effnet.tpu.train import train
    >>> recipe = override(recipes.find("digits_demo"), ["--epochs", "2"])
    >>> result = train(recipe, "runs/digits")  # doctest: +SKIP

    Reference:
        tensorflow/tpu efficientnet main.py.
    """
    workdir = os.fspath(workdir).rstrip("/")
    recipe = whole(recipe)
    _check(recipe)
    index, hosts = runner.place()
    try:
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(stop_signals.Watch())
            tf.io.gfile.makedirs(workdir)
            if index == 0:
                taken = f"Another run has taken over {workdir}. This run stops and saves nothing more"
                stack.enter_context(lock.locked(workdir, lambda: stop_signals.at_once(2, taken)))
            if recipe.probe.views:
                from keras_effnet.tpu.probe import probe

                return probe(recipe, workdir, hosts, quiet, allow_changes)
            return _train(recipe, workdir, quiet, allow_changes, watch, stack)
    except KeyboardInterrupt:  # before the first step; from then on the watch catches Ctrl-C
        message = f"Stopped before the first step. {stop_signals.RESUME}"
        raise training_loop.ended(stop_signals.INTERRUPTED, message) from None
    except Exception as error:
        lost = runner.is_lost(error)
        if runner.WAITS and hosts > 1:
            atexit.register(_leave, stop_signals.AGAIN if lost else 2)
        if lost:
            message = "Lost another host. Run the same command again on all hosts to resume from the last checkpoint"
            raise training_loop.ended(stop_signals.AGAIN, message) from error
        if plain := full(error, workdir):
            raise plain from error
        raise


def _train(
    recipe: Recipe,
    workdir: str,
    quiet: bool,
    allow_changes: bool,
    watch: stop_signals.Watch,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    host = pipeline.Host(*runner.place())

    # The recipe is saved before anything else happens. That of an existing run stays until this one is known to fit.
    resumes = bool(steps(f"{workdir}/checkpoints"))
    chosen = {}
    if resumes:
        recipe, chosen = recorded(recipe, workdir)
        check_runner(runner.NAME, workdir)
    changes = changes_of(recipe, workdir) if resumes or probed(workdir) else []
    check_allowed(changes, allow_changes, workdir)
    if host.index == 0 and not resumes:
        _write_config(recipe, workdir, runner=runner.NAME)

    # From here on, one processor and a slice of TPUs are the same.
    machine = _connect(recipe.run)
    watch.hold()
    source = _open_source(recipe, workdir, host)
    recipe, fresh = decided(recipe, source.train_count, machine.count)
    group, devices = _divide(recipe, machine.count, host.count)
    if resumes:
        changes += other_devices(devices, workdir)
        check_allowed(changes, allow_changes, workdir)

    job = _planned(recipe, workdir, host, machine, source)
    learner, state, step = _build(job, group)
    trainer = machine.trainer(learner, state, step, _train_batches(job, step), recipe.batch_size, recipe.run.xla)
    stack.callback(trainer.close)
    evaluator = machine.evaluator(learner, state, trainer, _eval_batches(job), recipe.run.eval_raw)

    log = Log(workdir, recipe.batch_size, job.total, quiet, job.writes)
    checkpoints = _open_checkpoints(job, machine.files(step, trainer, learner, state), step)
    done = _restore(job, checkpoints, log)
    _write_numbers(job, devices, chosen | fresh)
    _tell(job, log, done, fresh, changes)
    log.resume(done)
    before = _results(workdir)
    if before and not changes and (done >= job.total or training_loop.early(job, log, done)):
        return before
    if job.writes and (changes or before.get("stopped_early")):
        _remove_outdated(workdir, changes)

    watch.begin(lambda: trainer.stop.assign(1.0))
    stack.enter_context(contextlib.redirect_stdout(log.text))  # orbit prints what it does
    controller = training_loop.controller(job, trainer, evaluator, step, checkpoints, log)
    log.begin()
    stack.callback(log.end)
    with training_loop.end_explained(job, step, checkpoints, log, watch):
        done = training_loop.run(job, controller, trainer, checkpoints, log, done)
    return _save_results(job, learner, state, checkpoints, log, done)


def _tell(job: Job, log: Log, done: int, chosen: dict[str, Any], changes: list[str]) -> None:
    """Tells what is not in the recipe as it was given."""
    if chosen:
        words = {name.rpartition(".")[2].replace("_", " "): value for name, value in chosen.items()}
        told = ", ".join(f"{name} {value:g}" for name, value in words.items())
        log.note(f"Chosen for {job.source.train_count:,} training images: {told}")
    for change in changes:
        log.note(f"From step {done} on: {change}")
    for note in job.source.notes:
        log.note(note)


def _write_numbers(job: Job, devices: dict[str, int], chosen: dict[str, Any]) -> None:
    """Writes config.json with the numbers that follow from the recipe, the data and the devices."""
    if not job.writes:
        return
    numbers: dict[str, Any] = {"image_size": job.size, "classes": job.classes, "steps": job.total}
    numbers |= {"steps_per_epoch": job.steps_per_epoch, "peak": job.recipe.peak}
    numbers |= {"chosen": chosen} if chosen else {}
    if job.recipe.progress.sizes:
        numbers["stage_ends"] = job.recipe.stage_ends(job.total)
    _write_config(job.recipe, job.workdir, **numbers, **devices, runner=runner.NAME)


def _connect(run: Run) -> Any:
    if run.deterministic:
        keras.utils.set_random_seed(run.seed)  # TensorFlow then requires a seed
        tf.config.experimental.enable_op_determinism()
    return runner.connect(run)


def _divide(recipe: Recipe, count: int, hosts: int) -> tuple[int, dict[str, int]]:
    """Divides the batch over the replicas. Returns how many share batch statistics, and numbers for config.json."""
    for name, size in (("batch_size", recipe.batch_size), ("run.eval_batch", recipe.run.eval_batch or count)):
        if size < 1 or size % count:
            raise ValueError(f"Expected {name} to be a multiple of the {count} replicas. Received: {size}")
    group = cross_replica.group_size(count, recipe.run.batch_norm_group)
    return group, {"replicas": count, "hosts": hosts, "images_per_statistics": recipe.batch_size // count * group}


def _open_source(recipe: Recipe, workdir: str, host: pipeline.Host) -> Source:
    counts = f"{workdir}/records.json"
    return open_source(recipe.data, cache=counts if host.index == 0 or tf.io.gfile.exists(counts) else None)


def _planned(recipe: Recipe, workdir: str, host: pipeline.Host, machine: Any, source: Source) -> Job:
    """Returns the numbers of the run, which follow from the data."""
    size, classes = recipe.image_size, classes_of(recipe, source)
    steps_per_epoch = source.train_count / recipe.batch_size
    total = int(recipe.epochs * steps_per_epoch)
    if total < 1:
        raise ValueError(
            f"Expected at least one step: epochs * {source.train_count} images / batch_size. Received: "
            f"epochs={recipe.epochs:g}, batch_size={recipe.batch_size}"
        )
    return Job(recipe, workdir, host, machine, source, size, classes, steps_per_epoch, total)


def _build(job: Job, group: int) -> tuple[Learner, Any, tf.Variable]:
    """Builds the model and all that a step changes. Returns learner, state, and the number of steps done."""
    recipe, machine, class_weights = job.recipe, job.machine, _class_weights(job)
    with machine.scope():
        keras.utils.set_random_seed(recipe.run.seed)
        model = build(recipe, job.classes, policy(recipe.run, machine))
        model = machine.adapted(model, group, recipe.run.fused)
        learner = make_learner(model, recipe, job.steps_per_epoch, job.total, class_weights)
        state = machine.variables(learner)
    return learner, state, orbit.utils.create_global_step()


def _class_weights(job: Job) -> tuple[float, ...] | None:
    if not job.recipe.data.balance:
        return None
    if not isinstance(job.source.train, Items):
        raise ValueError(
            "Expected a folder of photos or the digits with data.balance, whose labels are known before they are read. "
            f"Received: records of {job.recipe.data.source!r}"
        )
    return balancing(job.source.train.labels, job.classes)


def _train_batches(job: Job, step: tf.Variable) -> Callable[[], Iterator]:
    """Returns a function that starts to read the training data where the restored step left it."""

    def part(host: pipeline.Host, parts: int, python: bool):
        batch, path = job.recipe.batch_size // host.count, f"{job.workdir}/skipped-{host.index}.jsonl"
        if not step.numpy() and tf.io.gfile.exists(path):
            tf.io.gfile.remove(path)  # left by a run that ended before its first checkpoint
        skipped = job.account("train", path, job.source.train.count(host.index, host.count)) if python else None
        done = int(step.numpy())
        how, start = _stage(job, done), done * batch
        return pipeline.training(job.source, how, how.image_size, batch, skipped, parts=parts, start=start, host=host)

    return lambda: iter(job.machine.batches(part))


def _stage(job: Job, done: int) -> Recipe:
    """Returns the recipe of the stage that trains after a step. A stage's first batch has its own compiled step."""
    number = sum(end <= done for end in job.recipe.stage_ends(job.total)[:-1])
    return job.recipe.stage(number)


def _eval_batches(job: Job) -> Callable[[], Iterator]:
    """Returns a function that starts to read the evaluation data."""

    def part(host: pipeline.Host, parts: int, python: bool):
        batch = (job.recipe.run.eval_batch or job.recipe.batch_size) // host.count
        skipped = job.account("eval", None, job.source.evaluate.evaluated(host.index, host.count)) if python else None
        return pipeline.evaluation(job.source, job.recipe, job.size, batch, skipped, parts=parts, host=host)

    @functools.cache  # TensorFlow never frees the functions of a pipeline, so all evaluations share one
    def batches():
        return job.machine.batches(part)

    def start():
        found = batches()
        if "eval" in job.accounts:
            job.accounts["eval"].forget()
        return iter(found)

    return start


def _open_checkpoints(job: Job, form: Any, step: tf.Variable) -> Checkpoints:
    run = job.recipe.run
    return Checkpoints(
        f"{job.workdir}/checkpoints",
        form,
        step,
        keep=run.keep,
        every=max(1, round(run.save_every * job.steps_per_epoch)),
        minutes=run.save_minutes,
        writes=job.writes,
    )


def _restore(job: Job, checkpoints: Checkpoints, log: Log) -> int:
    """Restores the newest readable checkpoint, if there is one. Returns its step, else 0."""
    done = checkpoints.restore(log.note)
    if job.machine.total(done) != done * job.host.count:
        raise ValueError(
            f"Expected all hosts to see the same checkpoints in {job.workdir!r}. Received: step {done} on this host, "
            "another step on another host"
        )
    return done


def _results(workdir: str) -> dict[str, Any]:
    """Reads the results of an earlier run in the folder. Empty if none has ended."""
    path = f"{workdir}/result.json"
    return json.loads(tf.io.gfile.GFile(path).read()) if tf.io.gfile.exists(path) else {}


def _remove_outdated(workdir: str, changes: list[str]) -> None:
    """Removes the results of the run before its changes, or before its early end."""
    names = ["result.json", "model.keras", "best.keras", "report.html"]
    if any(change.startswith(("data.", "hosts ")) for change in changes):  # other examples could not be read
        names.insert(0, "skipped-*.jsonl")
    for name in names:
        for path in tf.io.gfile.glob(f"{workdir}/{name}"):
            tf.io.gfile.remove(path)


def _save_results(job: Job, learner: Learner, state: Any, checkpoints: Checkpoints, log: Log, done: int):
    """Saves the last and the best model, result.json and the report. Returns the results."""
    recipe, best = job.recipe, log.best or done
    result = {
        "model": recipe.model.name,
        "steps": done,
        "epochs": recipe.epochs,
        **log.last,
        "best_step": best,
        "best_ema_top1": log.scores[best],
        "stopped_early": training_loop.early(job, log, done),
        "skipped": len(_skipped_names(job)),
        "labels": list(job.source.labels),
        "expected_top1": recipe.expected_top1,
        "seconds": round(time.monotonic() - log.started, 1),
    }
    if job.writes:
        result["metadata"] = _save(job, export(recipe, job.classes, learner, state), "model.keras", done, log)
        if log.scores[best] > log.scores[done]:
            if checkpoints.take(best):
                _save(job, export(recipe, job.classes, learner, state), "best.keras", best, log)
            else:
                log.note(f"No best.keras: the checkpoint of step {best} cannot be read")
        cloud_files.write(f"{job.workdir}/result.json", json.dumps(result, indent=2) + "\n")
    if job.writes and recipe.run.report:
        try:
            html_report.write(job.workdir)
        except Exception as error:  # whatever plotting or the data raises, the run is complete without a report
            log.note(f"No report: {error}")
    return result


def _save(job: Job, model: keras.Model, name: str, step: int, log: Log) -> dict[str, Any]:
    """Saves a model of a step. Returns its metadata."""
    epochs = round(step / job.steps_per_epoch, 2)
    return save(model, f"{job.workdir}/{name}", job.recipe, job.source.labels, step, epochs, log.scores[step])


def _skipped_names(job: Job) -> set[str]:
    found = {name for account in job.accounts.values() for name in account.names}
    for path in tf.io.gfile.glob(f"{job.workdir}/skipped-*.jsonl"):  # of other hosts
        found |= {row["name"] for row in cloud_files.rows(path)}
    return found


def _check(recipe: Recipe) -> None:
    check_fields(recipe)
    freezing(recipe.model)
    sizes = recipe.progress.sizes
    for name, values in dataclasses.asdict(recipe.progress).items():
        if values and len(values) != len(sizes):
            raise ValueError(
                f"Expected {len(sizes)} values of --progress.{name}, one for each of --progress.sizes. Received: "
                f"{len(values)}"
            )


def _leave(code: int) -> None:
    """Ends the process before JAX does, which would wait for hosts that wait for this one's part of a step."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _write_config(recipe: Recipe, workdir: str, **resolved) -> None:
    cloud_files.write(f"{workdir}/config.json", to_json(recipe, **resolved))

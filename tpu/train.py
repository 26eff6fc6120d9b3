"""Trains one recipe on whatever devices there are. Read top to bottom."""

import atexit
import contextlib
import ctypes
import functools
import importlib
import itertools
import json
import os
import sys
import time
from typing import Any

import keras
import orbit
import tensorflow as tf

from keras_effnet.errors import one_of
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.tpu.config import Recipe, to_json
from keras_effnet.tpu.from_recipe import build, export, make_learner, policy
from keras_effnet.tpu.input import pipeline
from keras_effnet.tpu.input.skipped import Skipped
from keras_effnet.tpu.input.sources import Source, open_source
from keras_effnet.tpu.reports import html_report
from keras_effnet.tpu.reports.progress import Log
from keras_effnet.tpu.resume import cloud_files, lock, stops
from keras_effnet.tpu.resume.changes import changes_of, check_allowed, other_devices
from keras_effnet.tpu.resume.checkpoints import Checkpoints, full, steps
from keras_effnet.tpu.step import replicas

# What moves the arrays about, by Keras' backend: the devices, and the step on them. The rest is the same.
RUNNERS = {"tensorflow": "keras_effnet.tpu.runners.tensorflow_runner", "jax": "keras_effnet.tpu.runners.jax_runner"}

runner: Any = importlib.import_module(RUNNERS[one_of("KERAS_BACKEND for training", keras.backend.backend(), RUNNERS)])


@contextlib.contextmanager
def _plainly():
    """An error of TensorFlow's, as of a storage that refuses, or of the devices is told like any other."""
    try:
        yield
    except (tf.errors.OpError, *runner.ERRORS) as error:
        raise ValueError(getattr(error, "message", None) or str(error)) from error


@_plainly()
def train(
    recipe: Recipe, workdir: str | os.PathLike, quiet: bool = False, allow_changes: bool = False
) -> dict[str, Any]:
    """Trains a recipe, or goes on with one that was interrupted, with Keras' backend: TensorFlow or JAX.

    The folder then holds config.json, checkpoints, metrics.jsonl, TensorBoard's files, skipped-*.jsonl (what could not
    be read), model.keras with the moving average of all variables, best.keras with the best ones seen where those are
    not the last, report.html and result.json.

    SIGTERM and Ctrl-C save the state after the step that is being done, and end the process.

    Args:
        recipe: `Recipe`.
        workdir: Path of a folder, which may be on Cloud Storage (`gs://`). All hosts have to see it.
        quiet: Boolean, whether to show no progress. Defaults to False.
        allow_changes: Boolean, whether a run goes on with another recipe than it had. Defaults to False.

    Returns:
        Dict of what stands in result.json: `steps`, `top1` and `top5` (shares), the same of the moving average
        (`ema_top1`, ...), the step that was the best and its top-1, `images_per_second` and more.

    Raises:
        ValueError: If the recipe does not fit the data, the devices, or the run that is in the folder; if another
            run uses the folder; or if the loss is no longer finite.
        OSError: If there is no room on the disk.
        SystemExit: With status 75 after SIGTERM, or if another host was lost: the same call goes on. With 130 after
            Ctrl-C.

    Example:

    >>> from keras_effnet.tpu import override, recipes
    >>> from keras_effnet.tpu.train import train
    >>> recipe = override(recipes.find("digits_demo"), ["--epochs", "2"])
    >>> result = train(recipe, "runs/digits")  # doctest: +SKIP

    Reference:
        tensorflow/tpu efficientnet main.py.
    """
    workdir = os.fspath(workdir).rstrip("/")
    _check(recipe)
    index, hosts = runner.place()
    try:
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(stops.Watch())
            tf.io.gfile.makedirs(workdir)
            if index == 0:
                taken = f"Another run has taken {workdir} over: this one stops, and saves nothing more"
                stack.enter_context(lock.locked(workdir, lambda: stops.at_once(2, taken)))
            return _train(recipe, workdir, quiet, allow_changes, watch, stack)
    except KeyboardInterrupt:  # before the first step; then the watch takes it
        raise _ended(stops.INTERRUPTED, "Stopped before the first step") from None
    except Exception as error:
        lost = runner.is_lost(error)
        if runner.WAITS and hosts > 1:
            atexit.register(_leave, stops.AGAIN if lost else 2)
        if lost:
            raise _ended(stops.AGAIN, "Lost another host. Start all: they go on from the last checkpoint") from error
        if plain := full(error, workdir):
            raise plain from error
        raise


def _train(
    recipe: Recipe,
    workdir: str,
    quiet: bool,
    allow_changes: bool,
    watch: stops.Watch,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    index, hosts = runner.place()
    writes = index == 0

    # The recipe is written down before anything else happens; that of a run that is there, once it is known to fit.
    goes_on = bool(steps(f"{workdir}/checkpoints"))
    changes = changes_of(recipe, workdir) if goes_on else []
    if goes_on:
        _check_runner(workdir)
    check_allowed(changes, allow_changes, workdir)
    if writes and not goes_on:
        _write_config(recipe, workdir, runner=runner.NAME)

    # Devices. Everything below is the same for one processor and for a slice of TPUs.
    if recipe.run.deterministic:
        keras.utils.set_random_seed(recipe.run.seed)  # which TensorFlow then asks for
        tf.config.experimental.enable_op_determinism()
    machine = runner.connect(recipe.run)
    watch.hold()
    count = machine.count
    _check_batches(recipe, count)
    group = replicas.group_size(count, recipe.run.batch_norm_group)
    devices = {"replicas": count, "hosts": hosts, "images_per_statistics": recipe.batch_size // count * group}
    if goes_on:
        changes += other_devices(devices, workdir)
        check_allowed(changes, allow_changes, workdir)

    # What is trained on what.
    counts = f"{workdir}/records.json"
    source = open_source(recipe.data, cache=counts if writes or tf.io.gfile.exists(counts) else None)
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

    # The model and all that a step changes are made together, where the devices want it.
    with machine.scope():
        keras.utils.set_random_seed(recipe.run.seed)
        model = build(recipe, classes, policy(recipe.run, machine))
        model = machine.adapted(model, group, recipe.run.fused)
        learner = make_learner(model, recipe, steps_per_epoch, total)
        state = machine.variables(learner)
    step = orbit.utils.create_global_step()

    # Data. Each host reads its own part, from where the restored step left it.
    accounts: dict[str, Skipped] = {}

    def account(name: str, path: str | None, examples: int) -> Skipped:
        accounts[name] = Skipped(path, examples, recipe.data.max_corrupt)
        return accounts[name]

    def train_batches():
        def part(host: pipeline.Host, parts: int, python: bool):
            batch, path = recipe.batch_size // host.count, f"{workdir}/skipped-{host.index}.jsonl"
            if not step.numpy() and tf.io.gfile.exists(path):
                tf.io.gfile.remove(path)  # of a run that did not come to its first checkpoint
            skipped = account("train", path, source.train.count(host.index, host.count)) if python else None
            start = int(step.numpy()) * batch
            return pipeline.training(source, recipe, size, batch, skipped, parts=parts, start=start, host=host)

        return iter(machine.batches(part))

    def evaluated(host: pipeline.Host, parts: int, python: bool):
        batch = (recipe.run.eval_batch or recipe.batch_size) // host.count
        skipped = account("eval", None, source.evaluate.evaluated(host.index, host.count)) if python else None
        return pipeline.evaluation(source, recipe, size, batch, skipped, parts=parts, host=host)

    @functools.cache  # TensorFlow never frees a pipeline's functions: one for all evaluations
    def evaluation():
        return machine.batches(evaluated)

    def eval_batches():
        batches = evaluation()
        if "eval" in accounts:
            accounts["eval"].forget()
        return iter(batches)

    trainer = machine.trainer(learner, state, step, train_batches, recipe.batch_size, recipe.run.xla)
    stack.callback(trainer.close)
    evaluator = machine.evaluator(learner, state, trainer, eval_batches, recipe.run.eval_raw)

    # Checkpoints. Restored: the newest whole one in the folder, else what the model was built with.
    log = Log(workdir, recipe.batch_size, total, quiet, writes)
    checkpoints = Checkpoints(
        f"{workdir}/checkpoints",
        machine.files(step, trainer, learner, state),
        step,
        keep=recipe.run.keep,
        every=max(1, round(recipe.run.save_every * steps_per_epoch)),
        minutes=recipe.run.save_minutes,
        writes=writes,
    )
    done = checkpoints.restore(log.note)
    if machine.total(done) != done * hosts:
        raise ValueError(
            f"Expected all hosts to see the same checkpoints in {workdir!r}. Received: this one goes on after step "
            f"{done}, and another one does not"
        )
    if writes:
        _write_config(recipe, workdir, **numbers, peak=recipe.peak, **devices, runner=runner.NAME)
    for change in changes:
        log.note(f"From step {done} on: {change}")
    result_path = f"{workdir}/result.json"
    if done >= total and tf.io.gfile.exists(result_path) and not changes:
        return json.loads(tf.io.gfile.GFile(result_path).read())
    if writes:
        # What other data lacked, or other hosts did, says nothing; and an end that is no longer the end is none.
        stale = ["skipped-*.jsonl"] if any(told.startswith(("data.", "hosts ")) for told in changes) else []
        for name in [*stale, "result.json", "model.keras", "best.keras", "report.html"] if changes else []:
            for path in tf.io.gfile.glob(f"{workdir}/{name}"):
                tf.io.gfile.remove(path)

    # Loop.
    every = max(1.0, recipe.run.eval_every * steps_per_epoch)

    def next_stop(after: int) -> int:
        return next(min(total, int(n * every)) for n in itertools.count(int(after / every)) if int(n * every) > after)

    def save() -> None:
        checkpoints.save(log.best)

    def trained(metrics) -> None:
        log.trained(int(step.numpy()), metrics)
        if checkpoints.due() or int(step.numpy()) == total:
            save()
        if trainer.asked:
            raise stops.Asked

    watch.begin(lambda: trainer.stop.assign(1.0))
    stack.enter_context(contextlib.redirect_stdout(log.text))  # orbit prints what it does
    loop = recipe.run.steps_per_loop
    controller = orbit.Controller(
        strategy=machine.strategy,
        trainer=trainer,
        evaluator=evaluator,
        global_step=step,
        # The same steps whether or not it was interrupted.
        steps_per_loop=lambda done: loop - int(done) % loop,
        summary_dir=f"{workdir}/tensorboard/train" if writes else None,
        eval_summary_dir=f"{workdir}/tensorboard/eval" if writes else None,
        train_actions=[trained],
    )
    log.begin(done)
    stack.callback(log.end)
    try:
        try:
            while True:
                due = done >= total or (done and done == next_stop(done - 1))
                if due and done not in log.scores:
                    results = controller.evaluate()
                    log.evaluated(done, _checked(results, source, accounts, machine))
                    if log.best == done:
                        save()
                    _give_back()
                if done >= total:
                    break
                controller.train(next_stop(done), checkpoint_at_completion=False)
                done = int(step.numpy())
        except stops.Asked:
            save()
            told = f"Stopped after step {int(step.numpy())} of {total}, which is saved"
            raise _ended(watch.code, told, log) from None
    except stops.NonFiniteError as problem:
        log.note(str(problem))
        raise _non_finite(problem, source, recipe, accounts, checkpoints, workdir) from None
    except tf.errors.OpError as error:
        for skipped in accounts.values():
            if skipped.problem:
                raise ValueError(skipped.problem) from error
        print(error.message, file=log.text)  # for train.log
        raise

    result = {"model": recipe.model.name, "steps": done, "epochs": recipe.epochs, **log.last}
    best = log.best or done
    result |= {
        "best_step": best,
        "best_ema_top1": log.scores[best],
        "skipped": len(_skipped_names(workdir, accounts)),
        "labels": list(source.labels),
        "expected_top1": recipe.expected_top1,
        "seconds": round(time.monotonic() - log.started, 1),
    }
    if writes:
        _save(export(recipe, classes, learner, state), f"{workdir}/model.keras")
        if log.scores[best] > log.scores[done]:
            if checkpoints.take(best):
                _save(export(recipe, classes, learner, state), f"{workdir}/best.keras")
            else:
                log.note(f"No best.keras: the checkpoint of step {best} cannot be read")
        cloud_files.write(result_path, json.dumps(result, indent=2) + "\n")
    if writes and recipe.run.report:
        try:
            html_report.write(workdir)
        except Exception as error:  # whatever drawing and data do: the run is whole without it
            log.note(f"No report: {error}")
    return result


def _give_back() -> None:
    """Returns freed memory to the system: glibc keeps it in pieces, some 50 MB more from one evaluation to another."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _save(model: keras.Model, path: str) -> None:
    with cloud_files.replacing(path) as here:
        model.save(here)


def _ended(code: int, told: str, log: Log | None = None) -> stops.Stopped:
    told += ". The same command goes on"
    if log:
        log.note(told)
    if log is None or log.quiet:  # so are the hosts that do not write
        stops.say(told)
    return stops.Stopped(code, told)


def _non_finite(
    problem: stops.NonFiniteError,
    source: Source,
    recipe: Recipe,
    accounts: dict[str, Skipped],
    checkpoints: Checkpoints,
    workdir: str,
) -> ValueError:
    """Names the step and its batch, on this host, and where the run could go on."""
    index, hosts = runner.place()
    batch, host = recipe.batch_size // hosts, pipeline.Host(index, hosts)
    names = pipeline.names(source, recipe, batch, accounts.get("train"), (problem.step - 1) * batch, host)
    path = f"{workdir}/nonfinite-{index}.json"
    cloud_files.write(
        path, json.dumps({"step": problem.step, "what": problem.what, "examples": names}, indent=2) + "\n"
    )
    last = max(checkpoints.steps(), default=None)
    kept = "No checkpoint was written yet" if last is None else f"The last checkpoint, of step {last}, is kept"
    return ValueError(
        f"Expected a finite loss. Received: {problem.what} at step {problem.step}, with {', '.join(names[:3])}, ... "
        f"(all {len(names)} of its batch on this host: {path}). {kept}. Another learning rate, or clipping, goes on "
        "from there: --allow-changes --optimizer.peak ... --optimizer.clip-norm ..."
    )


def _skipped_names(workdir: str, accounts: dict[str, Skipped]) -> set[str]:
    found = {name for account in accounts.values() for name in account.names}
    for path in tf.io.gfile.glob(f"{workdir}/skipped-*.jsonl"):  # the other hosts'
        found |= {row["name"] for row in cloud_files.rows(path)}
    return found


def _check(recipe: Recipe) -> None:
    one_of("model", recipe.model.name, VARIANTS)
    named = {"batch_size": recipe.batch_size, "epochs": recipe.epochs}
    named |= {f"run.{name}": getattr(recipe.run, name) for name in ("steps_per_loop", "keep", "cpu_replicas")}
    named |= {f"run.{name}": getattr(recipe.run, name) for name in ("eval_every", "save_every")}
    for name, value in named.items():
        if value <= 0:
            raise ValueError(f"Expected {name} above 0. Received: {value}")


def _leave(code: int) -> None:
    """Ends the process before JAX, at its end, waits for other hosts, which wait for this one's part of a step."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _check_runner(workdir: str) -> None:
    path = f"{workdir}/config.json"
    told = json.loads(tf.io.gfile.GFile(path).read()) if tf.io.gfile.exists(path) else {}
    before = told.get("resolved", {}).get("runner", "tensorflow")
    if before != runner.NAME:
        learned = f"{workdir}/model.keras"
        other = f". A new run may start from what that one learned: --model.weights {learned} --model.keep-top"
        raise ValueError(
            f"Expected --runner {before}, whose checkpoints are in {workdir!r}. Received: {runner.NAME}"
            + other * tf.io.gfile.exists(learned)
        )


def _write_config(recipe: Recipe, workdir: str, **resolved) -> None:
    cloud_files.write(f"{workdir}/config.json", to_json(recipe, **resolved))


def _check_batches(recipe: Recipe, count: int) -> None:
    for name, size in (("batch_size", recipe.batch_size), ("run.eval_batch", recipe.run.eval_batch or count)):
        if size < 1 or size % count:
            raise ValueError(f"Expected {name} as a multiple of the {count} replicas. Received: {size}")


def _checked(results: Any, source: Source, accounts: dict[str, Skipped], machine) -> dict[str, float]:
    """The results, if each example was counted once."""
    skipped = machine.total(len(accounts["eval"]) if "eval" in accounts else 0)
    if results["examples"] + skipped != source.eval_count:
        raise ValueError(
            f"Expected to evaluate {source.eval_count} examples. Received: {results['examples']:.0f}, and {skipped} "
            "that cannot be read"
        )
    return dict(results)

"""Trains and evaluates in turn until the last step or an early end; saves, and explains why a run ends."""

import contextlib
import ctypes
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import orbit
import tensorflow as tf

from keras_effnet.tpu.config import Recipe
from keras_effnet.tpu.input import pipeline
from keras_effnet.tpu.input.skipped_examples import Skipped
from keras_effnet.tpu.input.sources import Source
from keras_effnet.tpu.reports.progress import Log
from keras_effnet.tpu.resume import cloud_files, stop_signals
from keras_effnet.tpu.resume.checkpoints import Checkpoints


@dataclass(frozen=True)
class Job:
    """What the parts of a run share.

    Args:
        recipe: `Recipe`.
        workdir: String, path of the run folder.
        host: `pipeline.Host`, this machine.
        machine: `Devices` of the runner.
        source: `Source`.
        size: Integer, height and width of an image in pixels.
        classes: Integer, number of classes.
        steps_per_epoch: Float, images divided by the global batch, not rounded, as in the original.
        total: Integer, steps of the whole run.
        accounts: Dict of the `Skipped` of `"train"` and `"eval"`, which are added when they begin to read.
    """

    recipe: Recipe
    workdir: str
    host: pipeline.Host
    machine: Any
    source: Source
    size: int
    classes: int
    steps_per_epoch: float
    total: int
    accounts: dict[str, Skipped] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether this host writes the files of the run."""
        return self.host.index == 0

    def account(self, name: str, path: str | None, examples: int) -> Skipped:
        """Opens the account of the examples that cannot be read."""
        self.accounts[name] = Skipped(path, examples, self.recipe.data.max_corrupt)
        return self.accounts[name]


def controller(job: Job, trainer, evaluator, step: tf.Variable, checkpoints: Checkpoints, log: Log):
    """Returns the controller of a run, which logs each loop and saves when a checkpoint is due.

    Args:
        job: `Job`.
        trainer: The runner's `orbit.AbstractTrainer`.
        evaluator: The runner's `orbit.AbstractEvaluator`.
        step: `tf.Variable`, the number of steps done.
        checkpoints: `Checkpoints`.
        log: `Log`.

    Returns:
        `orbit.Controller`. Its `train()` raises `stop_signals.Asked` after the step in which a signal arrived.
    """
    loop = job.recipe.run.steps_per_loop

    def trained(metrics) -> None:
        done = int(step.numpy())
        log.trained(done, metrics)
        if checkpoints.due() or done == job.total:
            checkpoints.save(log.best)
        if trainer.asked:
            raise stop_signals.Asked

    return orbit.Controller(
        strategy=job.machine.strategy,
        trainer=trainer,
        evaluator=evaluator,
        global_step=step,
        # The loops end at the same steps whether or not the run was interrupted.
        steps_per_loop=lambda done: loop - int(done) % loop,
        summary_dir=f"{job.workdir}/tensorboard/train" if job.writes else None,
        eval_summary_dir=f"{job.workdir}/tensorboard/eval" if job.writes else None,
        train_actions=[trained],
    )


def run(job: Job, controller: orbit.Controller, trainer, checkpoints: Checkpoints, log: Log, done: int) -> int:
    """Trains and evaluates in turn until the last step, or an early end.

    Args:
        job: `Job`.
        controller: See `controller()`.
        trainer: See `controller()`.
        checkpoints: `Checkpoints`.
        log: `Log`.
        done: Integer, number of steps done before.

    Returns:
        Integer, number of steps done.
    """
    ends = job.recipe.stage_ends(job.total)
    while True:
        due = done >= job.total or (done and done == _next_stop(job, done - 1))
        if due and done not in log.scores:
            results = controller.evaluate()
            log.evaluated(done, _checked(job, results))
            if log.best == done or early(job, log, done):
                checkpoints.save(log.best)
            _give_back()
        if reason := early(job, log, done):
            log.note(reason.capitalize())
        if done >= job.total or reason:
            return done
        stop = min(_next_stop(job, done), next(end for end in ends if end > done))
        controller.train(stop, checkpoint_at_completion=False)
        done = int(controller.global_step.numpy())
        if done in ends:
            trainer.close()  # it then reads the next stage


def early(job: Job, log: Log, done: int) -> str | None:
    """Returns why a run ends before its last step, which follows from the evaluations in its log.

    Args:
        job: `Job`.
        log: `Log`.
        done: Integer, number of steps done.

    Returns:
        String, or None if the run goes on.
    """
    patience = job.recipe.run.patience
    if patience is None or done >= job.total or done not in log.scores or log.waited < patience:
        return None
    return (
        f"stopped early at step {done} of {job.total}: {log.waited} evaluations without a better top-1 than that of "
        f"step {log.best}"
    )


def _next_stop(job: Job, after: int) -> int:
    """Returns the step of the first evaluation after a step."""
    every = max(1.0, job.recipe.run.eval_every * job.steps_per_epoch)
    return next(min(job.total, int(n * every)) for n in itertools.count(int(after / every)) if int(n * every) > after)


def _checked(job: Job, results: Any) -> dict[str, float]:
    """Checks that an evaluation has counted each example once. Returns its results."""
    skipped = job.machine.total(len(job.accounts["eval"]) if "eval" in job.accounts else 0)
    if results["examples"] + skipped != job.source.eval_count:
        raise ValueError(
            f"Expected to evaluate {job.source.eval_count} examples. Received: {results['examples']:.0f}, and "
            f"{skipped} that cannot be read"
        )
    return dict(results)


def _give_back() -> None:
    """Returns freed memory to the system. glibc keeps it in pieces, some 50 MB more with each evaluation."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def end_explained(job: Job, step: tf.Variable, checkpoints: Checkpoints, log: Log, watch: stop_signals.Watch):
    """Saves the state if the loop is asked to stop, and explains why it ends early.

    Args:
        job: `Job`.
        step: `tf.Variable`, the number of steps done.
        checkpoints: `Checkpoints`.
        log: `Log`.
        watch: `stop_signals.Watch`, with the exit status of the signal.

    Raises:
        stop_signals.Stopped: After a signal.
        ValueError: If the loss is not finite, or too many images cannot be read.
        tf.errors.OpError: If something else fails. Its message is in train.log.
    """
    try:
        try:
            yield
        except stop_signals.Asked:
            checkpoints.save(log.best)
            message = f"Stopped and saved after step {int(step.numpy())} of {job.total}. {stop_signals.RESUME}"
            raise ended(watch.code, message, log) from None
    except stop_signals.NonFiniteError as problem:
        log.note(str(problem))
        raise _non_finite(job, problem, checkpoints) from None
    except tf.errors.OpError as error:
        for skipped in job.accounts.values():
            if skipped.problem:
                raise ValueError(skipped.problem) from error
        print(error.message, file=log.text)  # for train.log
        raise


def ended(code: int, message: str, log: Log | None = None) -> stop_signals.Stopped:
    """Writes why a run ends to its log, and to the screen where the log does not.

    Args:
        code: Integer, exit status.
        message: String.
        log: `Log`. Defaults to None.

    Returns:
        `stop_signals.Stopped`, to be raised.
    """
    if log:
        log.note(message)
    if log is None or log.quiet:  # hosts that do not write are quiet too
        stop_signals.say(message)
    return stop_signals.Stopped(code, message)


def _non_finite(job: Job, problem: stop_signals.NonFiniteError, checkpoints: Checkpoints) -> ValueError:
    """Returns an error with the step, its batch on this host, and how to resume. Saves the names of the batch."""
    batch, host = job.recipe.batch_size // job.host.count, job.host
    first = (problem.step - 1) * batch
    names = pipeline.names(job.source, job.recipe, batch, job.accounts.get("train"), first, host)
    path = f"{job.workdir}/nonfinite-{host.index}.json"
    cloud_files.write(
        path, json.dumps({"step": problem.step, "what": problem.what, "examples": names}, indent=2) + "\n"
    )
    last = max(checkpoints.steps(), default=None)
    again = "start again" if last is None else f"resume from step {last}"
    return ValueError(
        f"Expected a finite loss. Received: {problem.what} at step {problem.step}, with {', '.join(names[:2])}, ... "
        f"(all {len(names)} on this host: {path}). To {again} with another learning rate or with clipping: "
        "--allow-changes --optimizer.peak ... --optimizer.clip-norm ..."
    )

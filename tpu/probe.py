"""Fits a classifier on the features of a frozen body: the recipe `probe`. Read `probe()` for the steps of a run."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_effnet.inference.predictor import Predictor
from keras_effnet.nets import inspection
from keras_effnet.tpu import model_from_recipe, recipes
from keras_effnet.tpu.config import Recipe, flat, settled, to_json, with_fields
from keras_effnet.tpu.input import features
from keras_effnet.tpu.input.features import Features, View
from keras_effnet.tpu.input.skipped_examples import Skipped
from keras_effnet.tpu.input.sources import Source, open_source
from keras_effnet.tpu.reports import html_report
from keras_effnet.tpu.reports.progress import Log
from keras_effnet.tpu.resume import cloud_files, stop_signals
from keras_effnet.tpu.resume.checkpoints import steps
from keras_effnet.tpu.resume.recipe_changes import changes_of, check_allowed
from keras_effnet.tpu.step import linear_classifier
from keras_effnet.tpu.step.linear_classifier import Classifier, Fit
from keras_effnet.tpu.step.losses import balancing

# Fields of a recipe that change nothing here, besides `run`.
UNUSED = (
    *("epochs", "average_decay", "optimizer.", "schedule.", "augment.mixup", "augment.cutmix"),
    *("model.drop", "model.bn_momentum", "model.keep_top", "model.freeze", "run.precision", "run.patience"),
)

EVERY = 5.0  # seconds between two lines of progress


def probe(
    recipe: Recipe, workdir: str, hosts: int = 1, quiet: bool = False, allow_changes: bool = False
) -> dict[str, Any]:
    """Fits a classifier on the features of a frozen body. Called by `train()` for a recipe with `probe.views`.

    The features are computed once, by `keras_effnet.Predictor`, and kept on disk: a run with another penalty, or after
    an interruption, computes only what is missing.

    Leaves in the folder: config.json, metrics.jsonl, skipped-0.jsonl (unreadable photos), model.keras with the body and
    the classifier, result.json, and with `run.report` also report.html.

    Args:
        recipe: `Recipe`.
        workdir: String, path of the run folder, which exists and is locked.
        hosts: Integer, number of hosts. Defaults to 1, and more are refused.
        quiet: Boolean, whether to show no progress. Defaults to False.
        allow_changes: Boolean, whether to replace the results of another recipe. Defaults to False.

    Returns:
        Dict, the content of result.json.

    Raises:
        ValueError: If the recipe does not fit the data or the run in the folder, or too many photos are unreadable.
        OSError: If the disk is full.
        SystemExit: With status 130 after Ctrl-C. The same call resumes.
    """
    started = time.monotonic()
    _check(recipe, hosts)
    finished = tf.io.gfile.exists(f"{workdir}/result.json")
    changes = changes_of(recipe, workdir) if finished or steps(f"{workdir}/checkpoints") else []
    check_allowed(changes, allow_changes, workdir)
    job = _open(recipe, workdir)
    told = job.told()
    if finished and not changes and _told_before(workdir) == told:
        return json.loads(tf.io.gfile.GFile(f"{workdir}/result.json").read())
    _remove_outdated(workdir)
    cloud_files.write(f"{workdir}/config.json", to_json(recipe))
    log = Log(workdir, 1, 1, quiet)
    log.resume(-1)  # there are no steps to resume
    for note in job.source.notes:
        log.note(note)
    try:
        views, tests, skipped = _features(job, log)
        result = _evaluated(job, _fit(job, views, log), tests, skipped, log)
        result["seconds"] = round(time.monotonic() - started, 1)
        _finish(job, told, result, log)
        return result
    except KeyboardInterrupt:
        message = f"Stopped. {stop_signals.RESUME}"
        log.note(message)
        if quiet:
            stop_signals.say(message)
        raise stop_signals.Stopped(stop_signals.INTERRUPTED, message) from None
    finally:
        log.end()


@dataclass(frozen=True)
class _Job:
    """What the parts of a run share.

    Args:
        recipe: `Recipe`.
        workdir: String, path of the run folder.
        source: `Source`.
        size: Integer, height and width of an image in pixels.
        classes: Integer, number of classes.
        body: A `keras.Model` that returns features.
        digest: String, hash of the body.
    """

    recipe: Recipe
    workdir: str
    source: Source
    size: int
    classes: int
    body: Any
    digest: str

    def views(self) -> list[View]:
        """Returns the views of the training photos."""
        source = self.source
        numbers = range(self.recipe.probe.views)
        return [View(source.train, source.train_count, self.recipe, self.size, number) for number in numbers]

    def tests(self) -> View:
        """Returns the view of the photos to evaluate on."""
        return View(self.source.evaluate, self.source.eval_count, self.recipe, self.size)

    def told(self) -> dict[str, Any]:
        """Returns what config.json tells besides the recipe."""
        keys = [view.key(self.digest) for view in (*self.views(), self.tests())]
        numbers = {"image_size": self.size, "classes": self.classes, "runner": keras.backend.backend()}
        return numbers | {"features": keys}


def _check(recipe: Recipe, hosts: int) -> None:
    if hosts > 1:
        raise ValueError(f"Expected one host for a probe. Received: {hosts} hosts")
    own = settled(with_fields(recipes.find("probe"), {"model.name": recipe.model.name}))
    usual, given = (flat(dataclasses.asdict(one)) for one in (own, recipe))
    wrong = [f"{name}={given[name]}" for name in given if name.startswith(UNUSED) and given[name] != usual[name]]
    if wrong:
        raise ValueError(
            "Expected only fields that a probe uses: probe, data, augment, model.name, model.image_size, model.weights "
            f"and label_smoothing. Received: {', '.join(wrong[:3])}. To train by steps, use the recipe finetune"
        )


def _open(recipe: Recipe, workdir: str) -> _Job:
    """Opens the data set and builds the body."""
    source = open_source(recipe.data, cache=f"{workdir}/records.json")
    size, classes = recipe.image_size, model_from_recipe.classes_of(recipe, source)
    keras.utils.set_random_seed(recipe.run.seed)
    body = model_from_recipe.body(recipe)
    reading = inspection.read(body)
    how, pixels = recipe.model, (reading.scale, reading.offset)
    hashed = hashlib.sha256(" ".join(map(str, (how.name, how.bn_epsilon, how.padding, *pixels))).encode())
    for values in body.get_weights():
        hashed.update(np.ascontiguousarray(values).tobytes())
    return _Job(recipe, workdir, source, size, classes, body, hashed.hexdigest())


def _told_before(workdir: str) -> dict[str, Any]:
    told = json.loads(tf.io.gfile.GFile(f"{workdir}/config.json").read()).get("resolved", {})
    return {name: value for name, value in told.items() if name != "steps"}


def _remove_outdated(workdir: str) -> None:
    for name in ("result.json", "model.keras", "best.keras", "report.html", "skipped-0.jsonl"):
        if tf.io.gfile.exists(f"{workdir}/{name}"):
            tf.io.gfile.remove(f"{workdir}/{name}")


def _features(job: _Job, log: Log) -> tuple[list[Features], Features, set[str]]:
    """Computes the features. Returns those of each view, those to evaluate on, and the names of unreadable photos."""
    predictor: Callable[[np.ndarray], Any] | None = None

    def predict(images: np.ndarray) -> np.ndarray:
        nonlocal predictor
        if predictor is None:  # not opened if all features are on disk
            predictor = Predictor(job.body)
        return predictor(images)

    views, tests = job.views(), job.tests()
    share = job.recipe.data.max_corrupt
    accounts = [
        Skipped(f"{job.workdir}/skipped-0.jsonl", job.source.train_count, share),
        Skipped(None, job.source.eval_count, share),
    ]
    total = len(views) * job.source.train_count + job.source.eval_count
    with _Progress(total, log) as progress:
        some = [features.compute(view, job.digest, predict, accounts[0], progress.add) for view in views]
        tested = features.compute(tests, job.digest, predict, accounts[1], progress.add)
    _check_labels(job, [*some, tested])
    return some, tested, {name for account in accounts for name in account.names}


def _check_labels(job: _Job, found: list[Features]) -> None:
    for one in found:
        wrong = one.labels[(one.labels < 0) | (one.labels >= job.classes)]
        if len(wrong):
            raise ValueError(
                "Expected labels from 0 to classes - 1 (data.classes, data.first_label). "
                f"Received: {wrong[0]}, with {job.classes} classes"
            )


class _Progress(AbstractContextManager):
    """Shows how many images are done: a bar on a terminal, else a line from time to time."""

    def __init__(self, total: int, log: Log):
        self._total, self._log, self._done = total, log, 0
        self._since = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self):
        if not self._log.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("Features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, count: int) -> None:
        """Adds a number of images."""
        self._done += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif now - self._last > EVERY:
            self._last, rate = now, self._done / (now - self._since)
            self._log.note(f"features of {self._done}/{self._total} images  {rate:.1f} images/s")


def _fit(job: _Job, views: list[Features], log: Log) -> Fit:
    """Fits the classifier on all views."""
    values, labels, photos = (np.concatenate([getattr(one, name) for one in views]) for name in _FIELDS)
    weights = None
    if job.recipe.data.balance:
        weights = np.array(balancing(views[0].labels, job.classes))[labels]
    found = linear_classifier.fit(
        values,
        labels,
        job.classes,
        groups=photos,
        weights=weights,
        smoothing=job.recipe.label_smoothing,
        l2=job.recipe.probe.l2,
        seed=job.recipe.run.seed,
    )
    how = "" if found.held_out is None else f", chosen by held-out training photos (top-1 {found.held_out:.2%})"
    log.note(f"fitted {len(views[0].labels)} photos in {len(views)} views, L2 {found.l2:g}{how}")
    return found


_FIELDS = ("values", "labels", "ordinals")


def _scores(classifier: Classifier, tests: Features) -> dict[str, float]:
    """Returns loss, top-1 and top-5 under the names of a moving average: the only weights of this run."""
    logits = classifier.logits(tests.values).astype("float64")
    logits -= logits.max(1, keepdims=True)
    own = logits[np.arange(len(logits)), tests.labels][:, None]
    losses = np.log(np.exp(logits).sum(1)) - own[:, 0]
    ranks = (logits > own).sum(1)
    found = {"ema_loss": losses.mean(), "ema_top1": (ranks < 1).mean(), "ema_top5": (ranks < 5).mean()}
    return {name: float(value) for name, value in found.items()} | {"examples": float(len(logits))}


def _evaluated(job: _Job, fit: Fit, tests: Features, skipped: set[str], log: Log) -> dict[str, Any]:
    """Evaluates the classifier and saves the model. Returns the results."""
    recipe, done = job.recipe, fit.iterations
    log.total = done
    log.evaluated(done, _scores(fit.classifier, tests))
    model = model_from_recipe.with_classifier(recipe, job.body, fit.classifier.kernel, fit.classifier.bias)
    views, top1 = recipe.probe.views, log.scores[done]
    path, labels = f"{job.workdir}/model.keras", job.source.labels
    metadata = model_from_recipe.save(model, path, recipe, labels, done, views, top1)
    return {
        "model": recipe.model.name,
        "steps": done,
        "epochs": recipe.probe.views,
        **log.last,
        "best_step": done,
        "best_ema_top1": log.scores[done],
        "stopped_early": None,
        "skipped": len(skipped),
        "labels": list(job.source.labels),
        "expected_top1": recipe.expected_top1,
        "l2": fit.l2,
        "held_out_top1": fit.held_out,
        "metadata": metadata,
    }


def _finish(job: _Job, told: dict[str, Any], result: dict[str, Any], log: Log) -> None:
    """Saves config.json, result.json and the report."""
    cloud_files.write(f"{job.workdir}/config.json", to_json(job.recipe, steps=result["steps"], **told))
    cloud_files.write(f"{job.workdir}/result.json", json.dumps(result, indent=2) + "\n")
    if job.recipe.run.report:
        try:
            html_report.write(job.workdir)
        except Exception as error:  # whatever plotting or the data raises, the run is complete without a report
            log.note(f"No report: {error}")

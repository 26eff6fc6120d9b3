"""Runs `keras-effnet prune`: from a trained model and a folder of photos to a pruned model and a report."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_effnet import compat, files, model_metadata, ranges
from keras_effnet.errors import few
from keras_effnet.images.decoding import decode_image
from keras_effnet.images.folders import labelled, readable
from keras_effnet.images.photo_loader import image_loader
from keras_effnet.inference.predictor import Predictor
from keras_effnet.model_loader import load_model, resolve
from keras_effnet.nets import inspection, pruning_plan
from keras_effnet.plots import figure_class, plot_channels
from keras_effnet.pruning import choose_channels, costs, cut_channels
from keras_effnet.pruning.distillation import distill
from keras_effnet.pruning.photo_batches import Photographs
from keras_effnet.pruning.report import markdown
from keras_effnet.weights import registry


class _Photos(NamedTuple):
    """The photos of a folder, in batches.

    Args:
        classes: List of the names of the classes with photos.
        labels: List of the names of the model's classes.
        training: Batches to distill with, shuffled.
        testing: Batches to evaluate on.
        calibration: Batches of training photos to compute the importance from.
    """

    classes: list[str]
    labels: list[str]
    training: Photographs
    testing: Photographs
    calibration: Photographs


def prune(
    path: str | os.PathLike,
    data: str | os.PathLike,
    out: str | os.PathLike,
    reduction: float = 0.4,
    *,
    cost: str = "macs",
    solver: str = "greedy",
    importance: str = "gradient",
    divisor: int = 8,
    calibration: int = 1000,
    epochs: int = 10,
    gamma: float = 0.2,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    crop: bool = False,
    verbose: int = 1,
    on_step: Callable[[str], Any] = lambda step: None,
) -> dict[str, Any]:
    """Plans, prunes, distills and evaluates.

    Saves `pruned.keras`, `plan.json`, `report.json`, `report.md` and `channels.png` to the folder `out`. The same call
    resumes an interrupted run, with the same plan and after the last finished epoch.

    Args:
        path: Path of a trained classifier as a `.keras` file, or of a run's folder.
        data: Path of a folder of photos, or of a CSV file. See `labelled()`. Without labels, the model's outputs are
            the classes in alphabetical order.
        out: Path of the folder to save to. It is created if it does not exist.
        reduction: See `pruning.plan()`.
        cost: See `pruning.plan()`.
        solver: See `pruning.plan()`.
        importance: `"gradient"`, `"taylor"` or `"magnitude"`. See `pruning.importance()`.
        divisor: See `pruning.plan()`.
        calibration: Integer, number of photos to compute the importance from. Defaults to 1000.
        epochs: Integer, epochs of distillation. Defaults to 10.
        gamma: See `distill()`.
        learning_rate: See `distill()`.
        batch_size: Integer. Defaults to 32.
        crop: Boolean, whether to crop photos as `load_image()` does for the published weights, if the model's metadata
            do not say how. Choose what the model was trained with. Defaults to False: the largest window with the shape
            of the model's input.
        verbose: See `keras.Model.fit()`.
        on_step: Function to call with a message before each step.

    Returns:
        Dict, the content of `report.json`.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be read or written.
        ValueError: If an argument is not valid, the model and the folder differ in their classes, or too many photos
            cannot be read.
    """
    ranges.check(
        reduction=(reduction, float, ranges.INSIDE),
        divisor=(divisor, int, ranges.COUNT),
        calibration=(calibration, int, ranges.COUNT),
        epochs=(epochs, int, ranges.NOT_NEGATIVE),
        gamma=(gamma, float, ranges.NOT_NEGATIVE),
        learning_rate=(learning_rate, float, ranges.POSITIVE),
        batch_size=(batch_size, int, ranges.COUNT),
    )
    out = Path(out)
    figure_class()  # fails before the work if matplotlib is not installed
    path = resolve(path).place
    teacher, photos = _inputs(path, data, calibration, batch_size, crop, on_step)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"reduction": reduction, "cost": cost, "solver": solver, "importance": importance, "divisor": divisor}
    distillation = {"epochs": epochs, "gamma": gamma, "learning_rate": learning_rate}
    asked = settings | distillation | {"calibration": calibration, "batch_size": batch_size, "crop": crop}
    used = (*photos.training.files, *photos.testing.files)
    asked |= {"model": registry.digest(path, "sha256"), "photographs": [str(file) for file, _ in used]}

    state = out / ".training"
    if not _can_resume(state, asked):
        on_step(f"Computing the importance of the channels from {len(photos.calibration.files)} photos")
        plan = choose_channels.plan(
            teacher, photos.calibration, reduction, cost, solver, importance, divisor=divisor, verbose=verbose
        )
        _start(state, asked, plan, out / "plan.json")
    plan = pruning_plan.Plan.load(out / "plan.json")
    student = cut_channels.apply(teacher, plan)
    accuracies = _distill(teacher, student, photos, distillation, state / "backup", verbose, on_step)
    student.labels, student.weights_record = photos.labels, None
    student.expects = model_metadata.expects_of(teacher)
    student.training_record = {"pruned_from": os.fspath(path), "data": os.fspath(data), "accuracy": accuracies}
    model_metadata.save_model(student, out / "pruned.keras")
    on_step("Measuring the latency")
    report = {
        "model": os.fspath(path),
        "photographs": {
            "train": len(photos.training.files),
            "test": len(photos.testing.files),
            "calibration": len(photos.calibration.files),
            "classes": photos.classes,
        },
        "plan": settings | {"asked": reduction, "reduction": plan.reduction, "gap": plan.gap, "variant": plan.model},
        "distillation": distillation,
        "accuracy": accuracies,
        "macs": _both(teacher, student, photos.calibration, "macs"),
        "params": _both(teacher, student, photos.calibration, "params"),
        "latency": _latencies(teacher, student, on_step),
        "metadata": model_metadata.of(student),
        "blocks": {"whole": inspection.find(teacher)[1].architecture.widths, "pruned": plan.blocks},
    }
    _save_report(report, out)
    shutil.rmtree(state)
    return report


def _inputs(path, data, calibration: int, batch_size: int, crop: bool, on_step) -> tuple[Any, _Photos]:
    """Loads the model and finds the photos. Raises an error if they do not exist or do not match."""
    teacher: Any = load_model(path)
    inspection.find(teacher)
    found = labelled(data)
    for note in found.notes:
        on_step(note)
    labels, numbers = _numbered(teacher, found.labels, os.fspath(data))
    train, test = ([(file, numbers[label]) for file, label in part] for part in (found.train, found.test))
    load = image_loader(teacher, crop=crop)
    unreadable = {file for file, _ in (*train, *test)} - {
        file for file, _ in readable([file for file, _ in (*train, *test)], lambda file: decode_image(file).shape)
    }
    train, test = ([pair for pair in part if pair[0] not in unreadable] for part in (train, test))
    chosen = np.random.default_rng(0).permutation(len(train))[:calibration]
    return teacher, _Photos(
        classes=found.labels,
        labels=labels,
        training=Photographs(train, load, batch_size, shuffle=True),
        testing=Photographs(test, load, batch_size),
        calibration=Photographs([train[place] for place in chosen], load, batch_size),
    )


def _numbered(teacher, classes: list[str], data: str) -> tuple[list[str], list[int]]:
    """Returns the names of the model's classes, and the number that the model gives to each class of the data."""
    outputs = teacher.output_shape[-1] if len(teacher.outputs) == 1 and len(teacher.output_shape) == 2 else None
    labels = model_metadata.labels_of(teacher)
    if outputs is None or (labels is None and outputs != len(classes)):
        raise ValueError(
            f"Expected a model with {len(classes)} classes, as in {data!r}. Received: {teacher.name!r}, whose "
            f"output has the shape {teacher.output_shape}"
        )
    labels = labels or classes
    strange = [name for name in classes if name not in labels]
    if strange:
        raise ValueError(f"Expected classes of the model: {few(labels)}. Received: {few(strange)} in {data!r}")
    return labels, [labels.index(name) for name in classes]


def _can_resume(state: Path, asked: dict[str, Any]) -> bool:
    """Returns whether an interrupted call had the same arguments, model and photos."""
    settings = state / "settings.json"
    return settings.is_file() and json.loads(settings.read_text()) == asked


def _start(state: Path, asked: dict[str, Any], plan: pruning_plan.Plan, plan_file: Path) -> None:
    """Saves the plan and what it was asked for. Discards the state of another interrupted call."""
    shutil.rmtree(state, ignore_errors=True)  # only once there is a plan, so that a wrong argument loses no work
    plan.save(plan_file)
    state.mkdir()
    (state / "settings.json").write_text(json.dumps(asked))


def _distill(
    teacher, student, photos: _Photos, distillation: dict[str, Any], backup: Path, verbose: int, on_step
) -> dict[str, float]:
    """Distills the teacher into the student, if for any epochs. Returns the accuracies of all models."""

    def accuracy(model) -> float:
        found = model.predict(photos.testing, verbose=verbose)
        return float(np.mean(np.argmax(found, -1) == photos.testing.labels(photos.testing.files)))

    on_step(f"Evaluating the whole and the pruned model on {len(photos.testing.files)} photos")
    accuracies = {"whole": accuracy(teacher), "pruned": accuracy(student)}
    if distillation["epochs"]:
        on_step(f"Distilling for {distillation['epochs']} epochs of {len(photos.training.files)} photos")
        for layer in compat.all_layers(student):  # frozen layers could not make up for the removed channels
            layer.trainable = True
        distill(student, teacher, photos.training, **distillation, backup_dir=backup, verbose=verbose)
        on_step("Evaluating the distilled model")
        accuracies["distilled"] = accuracy(student)
    return accuracies


def _save_report(report: dict[str, Any], out: Path) -> None:
    """Saves a report as a picture, JSON and Markdown."""
    plot_channels(report["blocks"]["whole"], report["blocks"]["pruned"], out / "channels.png")
    with files.replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    with files.replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(report))


def _both(teacher, student, data, cost: str) -> dict[str, float]:
    """Returns the cost of both models."""
    return dict(zip(("whole", "pruned"), (costs.cost(model, cost, data) for model in (teacher, student)), strict=True))


def _latencies(teacher, student, on_step) -> dict[str, dict[str, float]]:
    """Returns the median seconds of both models for a batch, in Keras and in the fastest runtime on this machine."""
    runs = {f"keras, batch {size}": costs.latency([teacher, student], size) for size in (1, 32)}
    try:
        runs["predictor, batch 1"] = predictor_latency([teacher, student])
    except (ImportError, ValueError) as error:  # a custom layer that cannot be exported
        on_step(f"Skipping the latency in a Predictor: {' '.join(str(error).split())[:200]}")
    return {name: dict(zip(("whole", "pruned"), times, strict=True)) for name, times in runs.items()}


def predictor_latency(models: Sequence[keras.Model], runtime: str = "auto", rounds: int = 50) -> list[float]:
    """Measures how long models take for one image in a `Predictor`. The models take turns.

    Args:
        models: Sequence of models with one input.
        runtime: See `Predictor`. Defaults to `"auto"`: the runtime that is fastest for the first model.
        rounds: Integer, measurements per model. Defaults to 50.

    Returns:
        List of the median seconds of each model.

    Raises:
        ImportError: If the runtime is not installed.
        ValueError: If a model cannot be exported.
    """
    runs = []
    for model in models:
        predictor = Predictor(model, runtime, device="auto" if runtime == "keras" else "cpu")
        runtime = predictor.runtime
        pixels = np.random.default_rng(0).uniform(0, 255, predictor.input_shape).astype("float32")
        runs.append(partial(predictor, pixels))
    return costs.timed(runs, rounds)

"""`keras-effnet prune`: from a trained model and a folder of photos to a pruned model and a report."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet import compat, files
from keras_effnet.images.folders import labelled
from keras_effnet.images.loading import image_loader
from keras_effnet.inference.predictor import Predictor
from keras_effnet.nets import inspection, pruning_plan
from keras_effnet.plots import figure_class, plot_channels
from keras_effnet.pruning import choose, costs, cut
from keras_effnet.pruning.batches import Photographs
from keras_effnet.pruning.distillation import distill
from keras_effnet.pruning.report import markdown
from keras_effnet.weights import registry


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

    The folder `out` then holds `pruned.keras`, `plan.json`, `report.json`, `report.md` and `channels.png`. The same
    call goes on where an earlier one was interrupted: with its plan, and after the last epoch that was finished.

    Args:
        path: Path of a trained classifier as a `.keras` file.
        data: Path of a folder of photographs, see `labelled()`. The classes' alphabetical order is the model's.
        out: Path of the folder to write to. Made where it does not exist.
        reduction: See `pruning.plan()`.
        cost: See `pruning.plan()`.
        solver: See `pruning.plan()`.
        importance: `"gradient"`, `"taylor"` or `"magnitude"`, see `pruning.importance()`.
        divisor: See `pruning.plan()`.
        calibration: Integer, photographs that the importance is computed from. Defaults to 1000.
        epochs: Integer, of distillation. Defaults to 10.
        gamma: See `distill()`.
        learning_rate: See `distill()`.
        batch_size: Integer. Defaults to 32.
        crop: Boolean, whether photographs are cropped as `load_image()` does for the published weights. Defaults to
            False: the largest window of the model's shape. As the model was trained is right.
        verbose: As in `keras.Model.fit()`.
        on_step: Function that is called with each step's name.

    Returns:
        Dict, the content of `report.json`.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If a file cannot be read or written.
        ValueError: If an argument is not valid, or the model and the folder have other numbers of classes.
    """
    out = Path(out)
    figure_class()  # what is missing is told before the work
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Expected a .keras file. Received: {os.fspath(path)!r}, which does not exist")
    names, train, test = labelled(data)
    teacher: Any = keras.models.load_model(path, compile=False)
    inspection.find(teacher)
    if len(teacher.outputs) != 1 or teacher.output_shape != (None, len(names)):
        raise ValueError(
            f"Expected a model of the {len(names)} classes of {os.fspath(data)!r}. Received: {teacher.name!r}, whose "
            f"output has the shape {teacher.output_shape}"
        )
    load = image_loader(teacher, crop=crop)
    chosen = np.random.default_rng(0).permutation(len(train))[:calibration]
    calibrating = Photographs([train[place] for place in chosen], load, batch_size)
    training, testing = Photographs(train, load, batch_size, shuffle=True), Photographs(test, load, batch_size)
    out.mkdir(parents=True, exist_ok=True)

    settings = {"reduction": reduction, "cost": cost, "solver": solver, "importance": importance, "divisor": divisor}
    distillation = {"epochs": epochs, "gamma": gamma, "learning_rate": learning_rate}
    # An interrupted call goes on only where all is as it was.
    state = out / ".training"
    asked = settings | distillation | {"calibration": calibration, "batch_size": batch_size, "crop": crop}
    asked |= {"model": registry.digest(path, "sha256"), "photographs": [str(file) for file, _ in (*train, *test)]}
    going_on = (state / "settings.json").is_file() and json.loads((state / "settings.json").read_text()) == asked
    if not going_on:
        on_step(f"Importance of the channels, from {len(chosen)} photographs")
        plan = choose.plan(teacher, calibrating, reduction, cost, solver, importance, divisor=divisor, verbose=verbose)
        shutil.rmtree(state, ignore_errors=True)  # of another call, whose work a wrong argument does not lose
        plan.save(out / "plan.json")
        state.mkdir()
        (state / "settings.json").write_text(json.dumps(asked))
    plan = pruning_plan.Plan.load(out / "plan.json")
    student = cut.apply(teacher, plan)

    def accuracy(model) -> float:
        found = model.predict(testing, verbose=verbose)
        return float(np.mean(np.argmax(found, -1) == testing.labels(testing.files)))

    on_step(f"Accuracy of the whole and of the pruned model, on {len(test)} photographs")
    accuracies = {"whole": accuracy(teacher), "pruned": accuracy(student)}
    if epochs:
        on_step(f"Distillation, {epochs} epochs of {len(train)} photographs")
        for layer in compat.all_layers(student):  # what was frozen cannot make up for what it lost
            layer.trainable = True
        distill(
            student,
            teacher,
            training,
            **distillation,
            backup_dir=state / "backup",
            verbose=verbose,
        )
        on_step("Accuracy after distillation")
        accuracies["distilled"] = accuracy(student)
    with files.replacing(out / "pruned.keras") as temporary:
        student.save(temporary)
    on_step("Latency")
    report = {
        "model": os.fspath(path),
        "photographs": {"train": len(train), "test": len(test), "calibration": len(chosen), "classes": names},
        "plan": settings | {"asked": reduction, "reduction": plan.reduction, "gap": plan.gap, "variant": plan.model},
        "distillation": distillation,
        "accuracy": accuracies,
        "macs": _both(teacher, student, calibrating, "macs"),
        "params": _both(teacher, student, calibrating, "params"),
        "latency": _latencies(teacher, student, on_step),
        "blocks": {"whole": inspection.find(teacher)[1].architecture.widths, "pruned": plan.blocks},
    }
    plot_channels(report["blocks"]["whole"], plan.blocks, out / "channels.png")
    with files.replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    with files.replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(report))
    shutil.rmtree(state)
    return report


def _both(teacher, student, data, cost: str) -> dict[str, float]:
    return dict(zip(("whole", "pruned"), (costs.cost(model, cost, data) for model in (teacher, student)), strict=True))


def _latencies(teacher, student, on_step) -> dict[str, dict[str, float]]:
    """Median seconds for a batch, each model with the other in turn: in Keras, and in the fastest runtime here."""
    runs = {f"keras, batch {size}": costs.latency([teacher, student], size) for size in (1, 32)}
    try:
        runs["predictor, batch 1"] = predictor_latency([teacher, student])
    except (ImportError, ValueError) as error:  # a layer of a user's own that cannot be exported
        on_step(f"No latency in a Predictor: {' '.join(str(error).split())[:200]}")
    return {name: dict(zip(("whole", "pruned"), times, strict=True)) for name, times in runs.items()}


def predictor_latency(models: Sequence[keras.Model], runtime: str = "auto", rounds: int = 50) -> list[float]:
    """Measures what models take for one image in a `Predictor`, in turn.

    Args:
        models: Models of one input.
        runtime: See `Predictor`. Defaults to `"auto"`: the first model's fastest, for all of them.
        rounds: Integer, times that each is measured. Defaults to 50.

    Returns:
        List of the median seconds of each.

    Raises:
        ImportError: If the runtime is missing.
        ValueError: If a model cannot be exported.
    """
    runs = []
    for model in models:
        predictor = Predictor(model, runtime)
        runtime = predictor.runtime
        pixels = np.random.default_rng(0).uniform(0, 255, predictor.input_shape).astype("float32")
        runs.append(partial(predictor, pixels))
    return costs.timed(runs, rounds)

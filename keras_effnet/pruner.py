"""From a trained model and a folder of photographs to a pruned model and a report."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet import blocks, pruning
from keras_effnet.describe import figure_class, plot_channels
from keras_effnet.predictor import Predictor
from keras_effnet.preprocessing import image_loader, photographs
from keras_effnet.weights import registry, writers

HELD_OUT = 5  # of a folder that is not split already, each fifth photograph
VALIDATION = ("val", "validation", "test")


class Photographs(keras.utils.PyDataset):
    """Batches of (pixels, class numbers) from files, decoded, cropped and resized as the model's weights expect.

    Args:
        files: Sequence of pairs of a path and a class number.
        load: Function from a path to pixels, see `preprocessing.image_loader()`.
        batch_size: Integer.
        shuffle: Boolean, whether each epoch has an order of its own.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], load: Callable, batch_size: int, shuffle: bool = False):
        super().__init__(workers=2)
        self.files, self.load, self.batch_size, self.shuffle = list(files), load, batch_size, shuffle
        self._random = np.random.default_rng(0)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.files) // self.batch_size)

    def on_epoch_end(self):
        """Draws the next epoch's order."""
        count = len(self.files)
        self._order = self._random.permutation(count) if self.shuffle else np.arange(count)

    def __getitem__(self, index):
        chosen = [self.files[place] for place in self._order[index * self.batch_size : (index + 1) * self.batch_size]]
        return np.stack([self.load(path) for path, _ in chosen]), self.labels(chosen)

    @staticmethod
    def labels(files) -> np.ndarray:
        """Class numbers of files."""
        return np.array([label for _, label in files], "int32")


def _folders(place: str) -> list[str]:
    return [path.name for path in Path(place).iterdir() if path.is_dir()]


def _photographs(place: str) -> list[Path]:
    return [path for path in photographs([place]) if path.is_file()]


def labelled(
    folder: str | os.PathLike,
    folders: Callable[[str], Iterable[str]] = _folders,
    files: Callable[[str], Sequence[Any]] = _photographs,
) -> tuple[list[str], list[tuple[Any, int]], list[tuple[Any, int]]]:
    """Finds photographs to train and to test with.

    Args:
        folder: Path of a folder with one for each class; or of one with such folders `train` and `val` (or
            `validation`, or `test`). Else each fifth photograph of a class is held out.
        folders: Function of a folder's path to the names of the folders in it. Defaults to those of this machine.
        files: Function of a folder's path to the photographs in it, in order. Defaults to those of this machine.

    Returns:
        Tuple of the classes' names, in alphabetical order, and the two lists of pairs (path, class number).

    Raises:
        ValueError: If there are none.
    """

    def classes(place: str) -> dict[str, Sequence[Any]]:
        names = sorted(name for name in folders(place) if not name.startswith("."))
        return {name: files(f"{place}/{name}") for name in names}

    root = os.fspath(folder)
    try:
        parts = set(folders(root))
    except OSError as error:
        raise ValueError(f"Expected a folder of photographs, one folder per class. Received: {root!r}") from error
    held = next((name for name in VALIDATION if name in parts), None)
    if held and "train" in parts:
        train, test = classes(f"{root}/train"), classes(f"{root}/{held}")
    else:
        found = classes(root)
        test = {name: some[HELD_OUT - 1 :: HELD_OUT] for name, some in found.items()}
        train = {name: [f for place, f in enumerate(some, 1) if place % HELD_OUT] for name, some in found.items()}
    empty = [name for name, some in train.items() if not some]
    if not train or empty or list(test) != list(train) or not any(test.values()):
        told = f"no photograph of {', '.join(empty)}" if empty else f"{', '.join(train) or 'none'} to train on"
        told += f", {', '.join(name for name, some in test.items() if some) or 'none'} to test on"
        raise ValueError(
            f"Expected a folder per class with photographs, or 'train' and 'val' with the same ones. Received: "
            f"{root!r} with {told}"
        )
    pairs = [[(file, number) for number, name in enumerate(train) for file in part[name]] for part in (train, test)]
    return list(train), pairs[0], pairs[1]


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
        gamma: See `pruning.distill()`.
        learning_rate: See `pruning.distill()`.
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
    blocks.find(teacher)
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
        plan = pruning.plan(teacher, calibrating, reduction, cost, solver, importance, divisor=divisor, verbose=verbose)
        shutil.rmtree(state, ignore_errors=True)  # of another call, whose work a wrong argument does not lose
        plan.save(out / "plan.json")
        state.mkdir()
        (state / "settings.json").write_text(json.dumps(asked))
    plan = pruning.Plan.load(out / "plan.json")
    student = pruning.apply(teacher, plan)

    def accuracy(model) -> float:
        found = model.predict(testing, verbose=verbose)
        return float(np.mean(np.argmax(found, -1) == testing.labels(testing.files)))

    on_step(f"Accuracy of the whole and of the pruned model, on {len(test)} photographs")
    accuracies = {"whole": accuracy(teacher), "pruned": accuracy(student)}
    if epochs:
        on_step(f"Distillation, {epochs} epochs of {len(train)} photographs")
        for layer in student._flatten_layers():  # what was frozen cannot make up for what it lost
            layer.trainable = True
        pruning.distill(
            student,
            teacher,
            training,
            **distillation,
            backup_dir=state / "backup",
            verbose=verbose,
        )
        on_step("Accuracy after distillation")
        accuracies["distilled"] = accuracy(student)
    with writers.replacing(out / "pruned.keras") as temporary:
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
        "blocks": {"whole": blocks.find(teacher)[1].architecture.widths, "pruned": plan.blocks},
    }
    plot_channels(report["blocks"]["whole"], plan.blocks, out / "channels.png")
    with writers.replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    with writers.replacing(out / "report.md") as temporary:
        temporary.write_text(_markdown(report))
    shutil.rmtree(state)
    return report


def _both(teacher, student, data, cost: str) -> dict[str, float]:
    return dict(
        zip(("whole", "pruned"), (pruning.cost(model, cost, data) for model in (teacher, student)), strict=True)
    )


def _latencies(teacher, student, on_step) -> dict[str, dict[str, float]]:
    """Median seconds for a batch, each model with the other in turn: in Keras, and in the fastest runtime here."""
    runs = {f"keras, batch {size}": pruning.latency([teacher, student], size) for size in (1, 32)}
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
    return pruning.timed(runs, rounds)


def _markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    plan, accuracy = report["plan"], report["accuracy"]

    def row(name: str, key: str, scale: float, unit: str) -> str:
        whole, pruned = report[key]["whole"], report[key]["pruned"]
        return f"| {name} | {whole / scale:.2f} {unit} | {pruned / scale:.2f} {unit} | {pruned / whole:.3f} |"

    lines = [
        f"# {Path(report['model']).name}, pruned",
        "",
        f"{plan['reduction']:.1%} of the {plan['cost']} less ({plan['asked']:.1%} asked; importance "
        f"{plan['importance']}, solver {plan['solver']}, gap to the fractional bound {plan['gap']:.2e}).",
        "",
        "| | whole | pruned | ratio |",
        "|---|---|---|---|",
        row("multiply-adds", "macs", 1e6, "M"),
        row("parameters", "params", 1e6, "M"),
    ]
    for name, seconds in report["latency"].items():
        whole, pruned = seconds["whole"], seconds["pruned"]
        lines.append(f"| latency, {name} | {whole * 1e3:.2f} ms | {pruned * 1e3:.2f} ms | {pruned / whole:.3f} |")
    counted = report["photographs"]
    lines += [
        "",
        f"| model | accuracy on {counted['test']} photographs of {len(counted['classes'])} classes |",
        "|---|---|",
        *(f"| {name} | {value:.2%} |" for name, value in accuracy.items()),
        "",
        "![channels that are kept per block](channels.png)",
        "",
        "| block | expand | squeeze-and-excite | out |",
        "|---|---|---|---|",
    ]
    for name, old in report["blocks"]["whole"].items():
        pairs = zip(old, report["blocks"]["pruned"][name], strict=True)
        cells = (f"{new} of {full}" if new != full else str(full or "-") for full, new in pairs)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

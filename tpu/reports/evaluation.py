"""Evaluates a classifier on a data set: a published model, a saved one, or that of a training run."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_effnet import class_names, files, model_metadata, models, ranges
from keras_effnet.errors import one_of
from keras_effnet.images import photo_loader
from keras_effnet.images.resizing import INTERPOLATIONS
from keras_effnet.inference.class_maps import Explainer
from keras_effnet.inference.predictor import Predictor
from keras_effnet.model_loader import Reference, check_finite, load_model, resolve
from keras_effnet.nets import inspection
from keras_effnet.tpu.config import Data
from keras_effnet.tpu.input.sources import Evaluated, Source, open_evaluation
from keras_effnet.tpu.reports.run_folder import labels_of, open_run, trained
from keras_effnet.tpu.reports.scoring import TOP, Scores, score
from keras_effnet.weights import convert


def evaluate(
    model: "str | os.PathLike | keras.Model",
    data: Data | None = None,
    weights: str | os.PathLike = "imagenet",
    *,
    crop: float | None = None,
    interpolation: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    predictions: str | os.PathLike | None = None,
    best: bool = False,
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates a classifier with the crop, interpolation and normalization of its published weights.

    Args:
        model: Name of a model; path of a `.keras` file with an EfficientNet in it; path of a training run's folder,
            which is evaluated exactly as the run evaluates itself; path of an exported model; or a `keras.Model`.
        data: `Data`. Only `source`, `data_dir`, `eval_split`, `first_label`, `holdout_shards` and `classes` are used.
            For a 1000-class model, folders named by WordNet ids may hold any of the ImageNet classes. Defaults to the
            data of the run.
        weights: With the name of a model: tag of a published set, or path of a file. With a `.keras` file: tag of the
            set whose crop and interpolation to use, by default those of the file's metadata, else the variant's usual
            ones. Defaults to `"imagenet"`.
        crop: Float, share of the shorter side to keep. Defaults to what the weights expect.
        interpolation: See `images.resizing.crop_and_resize()`. Defaults to what the weights expect.
        batch_size: Integer, images that a Keras model predicts at once. Defaults to 32.
        limit: Integer, maximum number of examples, taken from all over a folder or from the beginning of records.
            Defaults to None: all.
        predictions: Path of a file to write, with one JSON object per line: the `name`, `label` and five most
            probable classes of an example. Defaults to None.
        best: Boolean, whether to evaluate a run's best.keras instead of its model.keras, where it has one. Defaults to
            False.
        on_progress: Function of two integers: the number of examples done, and of all examples.

    Returns:
        Dict: `top1` and `top5` (shares), `examples`, `skipped` (names of unreadable examples), `published` and the
        `difference` from it in points, `preprocessing`, `classes` (a dict each: `class`, `name`, `examples`, `top1`,
        `precision`, None if the class was never predicted, `recall` and `f1`), `confusions` (`true`, `predicted`,
        `count`), `seconds`, `images_per_second`.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If an argument is not valid, the data does not exist, or its classes are not the model's.

    Example:

    >>> from keras_effnet.tpu.config import Data
    >>> from keras_effnet.tpu.reports.evaluation import evaluate
    >>> result = evaluate("efficientnet-lite0", Data("photographs"))  # doctest: +SKIP

    Reference:
        tensorflow/tpu efficientnet eval_ckpt_main.py.
    """
    _check_arguments(data, crop, interpolation, batch_size, limit)
    subject = _subject(model, weights, crop, interpolation, best)
    found, place = _open_data(model, data, subject)
    numbers, names = _classes(found, subject, place)

    began = time.monotonic()
    total = min(found.count, limit or found.count)
    with files.replacing(predictions) if predictions else nullcontext() as temporary:
        scores = score(
            subject.net,
            found.examples.sample(total) if limit else found.examples.evaluate(0, 1),
            found.examples,
            subject.read,
            numbers,
            batch_size=batch_size,
            on_progress=lambda done: on_progress(done, total),
        )
        _check_complete(scores, total, place)
        if temporary:
            with open(temporary, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in _rows(scores, names))
    seconds = time.monotonic() - began

    record = subject.record
    return {
        "model": model.name if isinstance(model, keras.Model) else os.fspath(model),
        "weights": record.tag if record else (subject.run.origin if subject.run else None),
        "data": place,
        **_summary(scores, names, subject),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(scores.names) / seconds, 2),
    }


def evaluate_run(workdir, source: Source, examples: int, keep: int) -> tuple[Scores, list[str], str]:
    """Evaluates a run's model on the run's evaluation data and keeps the images of some mistakes.

    Args:
        workdir: Path of the run's folder.
        source: `Source` of `open_run()`.
        examples: Integer, maximum number of examples.
        keep: Integer, number of most confident mistakes whose pixels are kept.

    Returns:
        Tuple of the `Scores`, with maps of the mistakes, the class names, and the name of the file that holds the
        model's weights.

    Raises:
        ValueError: If there is no model yet, or the data has changed.
    """
    subject = _subject(workdir, "imagenet", None, None)
    how, part = subject.run.recipe, source.evaluate
    numbers, names = _classes(_evaluated(source), subject, how.data.source)
    rows = part.sample(examples) if examples < source.eval_count else part.evaluate(0, 1)
    scores = score(subject.net, rows, part, subject.read, numbers, keep=keep)
    if not scores.names:
        raise ValueError(f"Expected readable images. Received: none in {how.data.source!r}")
    return _explained(scores, subject.net), names, subject.run.origin


def _explained(scores: Scores, net) -> Scores:
    """Adds maps to the mistakes, if the model's head has them and they show more than one place."""
    if not scores.mistakes:
        return scores
    said = [int(scores.classes[mistake.place, 0]) for mistake in scores.mistakes]
    try:
        explainer = Explainer(net)
    except ValueError:  # another head
        return scores
    maps = explainer(np.stack([mistake.pixels for mistake in scores.mistakes]), said)
    if maps[0].size == 1:
        return scores
    pairs = zip(scores.mistakes, maps, strict=True)
    return replace(scores, mistakes=[replace(mistake, map=values) for mistake, values in pairs])


@dataclass(frozen=True)
class _Subject:
    """The model to evaluate, with its preprocessing and origin."""

    net: Any
    outputs: int
    read: Callable[[bytes], np.ndarray]
    used: dict[str, Any]
    record: Any = None
    run: Any = None
    labels: Sequence[str] = ()


def _check_arguments(data, crop, interpolation, batch_size: int, limit: int | None) -> None:
    ranges.check(batch_size=(batch_size, int, ranges.COUNT))
    if limit is not None:
        ranges.check(limit=(limit, int, ranges.COUNT))
    if crop is not None:
        ranges.check(crop=(crop, float, ranges.ABOVE_0))
    if data is not None:
        ranges.check(first_label=(data.first_label, int, ranges.NOT_NEGATIVE))
    if interpolation is not None:
        one_of("interpolation", interpolation, INTERPOLATIONS)


def _subject(model, weights, crop, interpolation, best: bool = False) -> _Subject:
    folder = "" if isinstance(model, keras.Model) else os.fspath(model).rstrip("/")
    if not folder or not tf.io.gfile.exists(f"{folder}/config.json"):
        found = None if isinstance(model, keras.Model) else resolve(model, exports=True)
        if found and found.kind == "export":
            return _subject_of_export(found.place, crop, interpolation)
        net = _network(found, weights) if found else model
        return _subject_of_model(net, weights, crop, interpolation)
    if crop or interpolation:
        raise ValueError(
            "Expected no crop and no interpolation with the folder of a run, which has its own. "
            f"Received: crop={crop}, interpolation={interpolation!r}"
        )
    return _subject_of_run(folder, best)


def _subject_of_run(folder: str, best: bool) -> _Subject:
    run = trained(folder, best)
    check_finite(run.net)
    how, size = run.recipe.data, run.size
    used = _used((size, size), how.eval_crop or size / (size + 32), how.interpolation, how.crop_mode)
    return _Subject(run.net, _outputs(run.net), run.read(), used, run=run, labels=labels_of(folder))


def _subject_of_model(net, weights, crop, interpolation) -> _Subject:
    outputs = _outputs(net)
    check_finite(net)
    # A model that does not record its weights gets the preprocessing of its variant's usual ones, or of `weights`.
    known = hasattr(net, "weights_record") or weights == "imagenet" or os.path.isfile(weights)
    read, used = _reader(photo_loader.expected_by(net, "auto" if known else weights), crop, interpolation)
    record = getattr(net, "weights_record", None) if outputs == 1000 else None
    # Of ImageNet's classes, data may know the WordNet ids, the names, or only the numbers.
    labels = () if record else model_metadata.labels_of(net) or ()
    return _Subject(net, outputs, read, used, record, labels=labels)


def _subject_of_export(path: str, crop, interpolation) -> _Subject:
    predictor = Predictor(path)
    read, used = _reader(photo_loader.expected_by(path, "auto"), crop, interpolation)
    outputs = predictor(np.zeros((1, *predictor.input_shape), "float32"))
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2:
        shapes = keras.tree.map_structure(np.shape, outputs)
        raise ValueError(f"Expected a classifier with one output of shape (batch, classes). Received: {shapes}")
    return _Subject(predictor, outputs.shape[-1], read, used, labels=predictor.labels or ())


def _reader(expected, crop, interpolation) -> tuple[Callable[[bytes], np.ndarray], dict[str, Any]]:
    """Returns a function from an image's bytes to pixels, and what it does to them."""
    size, channels, channels_last, rules = expected
    side = min(size)
    share = crop or (None if rules and rules.crop_padding is not None else 0.875)
    padding = rules.crop_padding if share is None else round(side * (1 / share - 1))
    usual = model_metadata.Expects.of(rules) if rules else model_metadata.Expects()
    used = replace(usual, crop_padding=padding, interpolation=interpolation or usual.interpolation)
    read = photo_loader.loader(size, channels, channels_last, used)
    return read, _used(size, side / (side + padding), used.interpolation, used.crop_mode)


def _used(size: Sequence[int], crop: float, interpolation: str, crop_mode: str) -> dict[str, Any]:
    """Returns what the result says of the pixels."""
    shown = {"size": list(size), "crop": round(crop, 4), "interpolation": interpolation}
    return shown | ({"crop_mode": crop_mode} if crop_mode != "center" else {})


def _network(found: Reference, weights) -> Any:
    if found.kind == "name" and os.path.isfile(weights):
        classes = convert.verify(weights, found.place).classes or 1000
        return models.create_model(found.place, weights=weights, classes=classes)
    return load_model(found.place, found.tag_of(weights))


def _outputs(net) -> int:
    inspection.find(net, others=True)
    if len(net.inputs) != 1 or len(net.outputs) != 1 or len(net.output_shape) != 2 or not net.output_shape[-1]:
        raise ValueError(
            f"Expected a classifier with one input and one output of shape (batch, classes). Received: {net.name!r} "
            f"with output shape {net.output_shape}"
        )
    return net.output_shape[-1]


def _open_data(model, data: Data | None, subject: _Subject) -> tuple[Evaluated, str]:
    if data is not None:
        return open_evaluation(data), data.source
    if not subject.run:
        raise ValueError("Expected data: only the folder of a run has its own. Received: none")
    recipe = subject.run.recipe
    return _evaluated(open_run(model, recipe)), recipe.data.source


def _evaluated(source: Source) -> Evaluated:
    return Evaluated(source.evaluate, source.eval_count, None, source.labels)


def _classes(found: Evaluated, subject: _Subject, source: str) -> tuple[np.ndarray, list[str]]:
    """Returns the model's class number of each class of the data, and the names of the model's classes."""
    labels, outputs = found.labels, subject.outputs
    wnids = dict(class_names.classes()) if outputs == 1000 else {}
    by_wnid = bool(wnids and labels and set(labels) <= wnids.keys())
    known = list(wnids) if by_wnid else list(subject.labels)
    names = [f"{wnid} {name}" for wnid, name in wnids.items()] if by_wnid or subject.record else known or list(labels)
    names += map(str, range(len(names), outputs))
    if labels and known:
        missing = [name for name in labels if name not in known]
        if missing:
            raise ValueError(f"Expected classes of the model: {_few(known)}. Received: {_few(missing)} in {source!r}")
        return np.array([known.index(name) for name in labels]), names
    classes = found.classes or outputs
    if classes != outputs:
        raise ValueError(
            f"Expected data with the model's {outputs} classes{', or folders named by WordNet ids' * bool(wnids)}. "
            f"Received: {classes} classes in {source!r}{': ' * bool(labels)}{_few(labels)}"
        )
    return np.arange(outputs), names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:TOP]) + ", ..." * (len(names) > TOP)


def _check_complete(scores: Scores, total: int, place: str) -> None:
    if len(scores.names) + len(scores.skipped) != total:
        raise ValueError(
            f"Expected {total} examples. Received: {len(scores.names)} readable and {len(scores.skipped)} unreadable"
        )
    if not scores.names:
        raise ValueError(f"Expected readable images. Received: none of {total} in {place!r}")


def _rows(scores: Scores, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for place, name in enumerate(scores.names):
        best = zip(scores.classes[place].tolist(), scores.probabilities[place].tolist(), strict=True)
        label = int(scores.labels[place])
        yield {
            "name": name,
            "label": label,
            "label_name": names[label],
            "predictions": [{"class": one, "name": names[one], "probability": share} for one, share in best],
        }


def _summary(scores: Scores, names: Sequence[str], subject: _Subject) -> dict[str, Any]:
    record = subject.record
    return {
        "examples": len(scores.names),
        "skipped": scores.skipped,
        "top1": scores.top1,
        "top5": scores.top5,
        "published": record and {"top1": record.top1, "top5": record.top5, "source": record.source},
        "difference": round(100 * scores.top1 - record.top1, 3) if record and record.top1 else None,
        "preprocessing": subject.used,
        "classes": [
            {"class": one.number, "name": names[one.number], "examples": one.support, "top1": one.recall}
            | {"precision": one.precision, "recall": one.recall, "f1": one.f1}
            for one in scores.per_class()
        ],
        "confusions": [
            {"true": names[true], "predicted": names[said], "count": often} for true, said, often in scores.confusions()
        ],
    }

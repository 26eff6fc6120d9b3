"""How well a classifier does on a data set: published weights, a saved model, or what a run has come to."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_effnet import files, models
from keras_effnet.errors import one_of
from keras_effnet.images import class_names, decoding, loading, resizing
from keras_effnet.nets import inspection
from keras_effnet.nets.variants import VARIANTS
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
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates a classifier, with the crop, interpolation and normalisation that its weights are published with.

    Args:
        model: Name of a model; path of a `.keras` file with an EfficientNet in it; path of a training run's folder,
            which is evaluated as the run itself does it, to the last image; or a `keras.Model`.
        data: `Data`: `source`, `data_dir`, `eval_split`, `first_label`, `holdout_shards` and `classes` are used. Of a
            1000-class model, folders that are called by WordNet ids may be any of ImageNet's classes. Defaults to a
            run's own.
        weights: Of a model's name: tag of a published set, or path of a file. Of a `.keras` file: tag of the set
            whose crop and interpolation hold, by default those of the variant's usual one.
        crop: Float, share of the shorter side that is evaluated. Defaults to what the weights expect.
        interpolation: `"bicubic"` or `"bilinear"`. Defaults to what the weights expect.
        batch_size: Integer. Defaults to 32.
        limit: Integer, most examples to evaluate, which are taken from all over a folder, or from the beginning of
            records. Defaults to None: all.
        predictions: Path of a file to write: an object a line with an example's `name`, `label` and five most
            probable classes. Defaults to None.
        on_progress: Function that is called with the number of examples that are done, and of all.

    Returns:
        Dict: `top1` and `top5` (shares), `examples`, `skipped` (names of what could not be read), `published` and the
        `difference` from it in points, `preprocessing`, `classes` (a dict each: `class`, `name`, `examples`, `top1`),
        `confusions` (`true`, `predicted`, `count`), `seconds`, `images_per_second`.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If an argument is not valid, there is no such data, or its classes are not the model's.

    Example:

    >>> from keras_effnet.tpu.config import Data
    >>> from keras_effnet.tpu.reports.evaluation import evaluate
    >>> result = evaluate("efficientnet-lite0", Data("photographs"))  # doctest: +SKIP

    Reference:
        tensorflow/tpu efficientnet eval_ckpt_main.py.
    """
    for name, value in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"Expected {name} of at least 1. Received: {value}")
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"Expected a crop above 0 and up to 1. Received: {crop}")
    if interpolation is not None:
        one_of("interpolation", interpolation, ("bicubic", "bilinear"))
    subject = _subject(model, weights, crop, interpolation)
    if data is not None:
        found, place = open_evaluation(data), data.source
    elif subject.run:
        source, place = open_run(model, subject.run.recipe), subject.run.recipe.data.source
        found = Evaluated(source.evaluate, source.eval_count, None, source.labels)
    else:
        raise ValueError("Expected data. Received: none")
    numbers, names = _classes(found, subject, place)
    examples, record = found.examples, subject.record

    began = time.monotonic()
    total = min(found.count, limit or found.count)
    with files.replacing(predictions) if predictions else nullcontext() as temporary:
        scores = score(
            subject.net,
            examples.sample(total) if limit else examples.evaluate(0, 1),
            examples,
            subject.read,
            numbers,
            batch_size=batch_size,
            on_progress=lambda done: on_progress(done, total),
        )
        if len(scores.names) + len(scores.skipped) != total:
            raise ValueError(
                f"Expected {total} examples. Received: {len(scores.names)}, and {len(scores.skipped)} that cannot be "
                "read"
            )
        if not scores.names:
            raise ValueError(f"Expected images that can be read. Received: none of {total} in {place!r}")
        if temporary:
            with open(temporary, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in _rows(scores, names))
    seconds = time.monotonic() - began
    return {
        "model": model.name if isinstance(model, keras.Model) else os.fspath(model),
        "weights": record.tag if record else (subject.run.origin if subject.run else None),
        "data": place,
        "examples": len(scores.names),
        "skipped": scores.skipped,
        "top1": scores.top1,
        "top5": scores.top5,
        "published": record and {"top1": record.top1, "top5": record.top5, "source": record.source},
        "difference": round(100 * scores.top1 - record.top1, 3) if record else None,
        "preprocessing": subject.used,
        "classes": [
            {"class": label, "name": names[label], "examples": examples, "top1": top1}
            for label, examples, top1 in scores.per_class()
        ],
        "confusions": [
            {"true": names[true], "predicted": names[said], "count": often} for true, said, often in scores.confusions()
        ],
        "seconds": round(seconds, 2),
        "images_per_second": round(len(scores.names) / seconds, 2),
    }


def evaluate_run(workdir, source: Source, examples: int, keep: int) -> tuple[Scores, list[str], str]:
    """What a run's model says of its own evaluation data, for those who want to see the images.

    Args:
        workdir: Path of the run's folder.
        source: `Source` of `open_run()`.
        examples: Integer, most examples to look at.
        keep: Integer, the most confident mistakes whose pixels are kept.

    Returns:
        Tuple of the `Scores`, the names of the classes, and the file that the model's values are from.

    Raises:
        ValueError: If there is no model yet, or the data is not as it was.
    """
    subject = _subject(workdir, "imagenet", None, None)
    how, part = subject.run.recipe, source.evaluate
    numbers, names = _classes(Evaluated(part, source.eval_count, None, source.labels), subject, how.data.source)
    rows = part.sample(examples) if examples < source.eval_count else part.evaluate(0, 1)
    scores = score(subject.net, rows, part, subject.read, numbers, keep=keep)
    if not scores.names:
        raise ValueError(f"Expected images that can be read. Received: none in {how.data.source!r}")
    return scores, names, subject.run.origin


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


def _network(model, weights) -> Any:
    if isinstance(model, keras.Model):
        return model
    name = os.fspath(model)
    if not name.endswith(".keras") and name not in VARIANTS and os.path.sep not in name:
        one_of("model", name, VARIANTS)
    if name in VARIANTS:
        classes = 1000
        if os.path.isfile(weights):
            classes = convert.verify(weights, name).classes or 1000
        return models.create_model(name, weights=weights, classes=classes)
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"Expected the name of a model, a .keras file, or the folder of a run. Received: {name!r}, which is none"
        )
    return keras.models.load_model(name, compile=False)


def _outputs(net) -> int:
    inspection.find(net)
    if len(net.inputs) != 1 or len(net.outputs) != 1 or len(net.output_shape) != 2 or not net.output_shape[-1]:
        raise ValueError(
            f"Expected a classifier, with one input and an output of (batch, classes). Received: {net.name!r}, whose "
            f"output has the shape {net.output_shape}"
        )
    return net.output_shape[-1]


@dataclass(frozen=True)
class _Subject:
    """What is evaluated: a model, how it sees images, and where it is from."""

    net: Any
    outputs: int
    read: Callable[[bytes], np.ndarray]
    used: dict[str, Any]
    record: Any = None
    run: Any = None
    labels: Sequence[str] = ()


def _subject(model, weights, crop, interpolation) -> _Subject:
    folder = "" if isinstance(model, keras.Model) else os.fspath(model).rstrip("/")
    if folder and tf.io.gfile.exists(f"{folder}/config.json"):
        if crop or interpolation:
            raise ValueError("Expected no crop and no interpolation for the folder of a run, whose own hold")
        run = trained(folder)
        how, size = run.recipe.data, run.size
        used = {"size": [size, size], "crop": round(how.eval_crop or size / (size + 32), 4)}
        used["interpolation"] = how.interpolation
        return _Subject(run.net, _outputs(run.net), run.read(), used, run=run, labels=labels_of(folder))
    net = _network(model, weights)
    outputs = _outputs(net)
    # A model that does not know its weights is seen as its variant's usual ones, or as those that are named.
    known = hasattr(net, "weights_record") or weights == "imagenet" or os.path.isfile(weights)
    size, channels, channels_last, rules = loading.expected_by(net, "auto" if known else weights)
    side = min(size)
    share = crop or (None if rules else 0.875)
    padding = rules.crop_padding if share is None else round(side * (1 / share - 1))
    interpolation = interpolation or (rules.interpolation if rules else "bicubic")

    # preprocessing.image_loader(), with a crop and an interpolation that may be others than the weights'.
    def read(encoded):
        pixels = decoding.decode_image(encoded, channels)
        pixels = resizing.crop_and_resize(pixels, size, padding, interpolation)
        return pixels if channels_last else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    used = {"size": list(size), "crop": round(side / (side + padding), 4), "interpolation": interpolation}
    return _Subject(net, outputs, read, used, getattr(net, "weights_record", None))


def _classes(found: Evaluated, subject: _Subject, source: str) -> tuple[np.ndarray, list[str]]:
    """The model's class of each of the data's, and the names of the model's classes."""
    labels, outputs = found.labels, subject.outputs
    wnids = dict(class_names.classes()) if outputs == 1000 else {}
    by_wnid = bool(wnids and labels and set(labels) <= wnids.keys())
    known = list(wnids) if by_wnid else list(subject.labels)
    names = [f"{wnid} {name}" for wnid, name in wnids.items()] if by_wnid or subject.record else known or list(labels)
    names += map(str, range(len(names), outputs))
    if labels and known:
        missing = [name for name in labels if name not in known]
        if missing:
            raise ValueError(f"Expected classes of the model: {_few(known)}. Received: {source!r} with {_few(missing)}")
        return np.array([known.index(name) for name in labels]), names
    classes = found.classes or outputs
    if classes != outputs:
        raise ValueError(
            f"Expected data of the model's {outputs} classes"
            f"{', or folders that are called by WordNet ids' * bool(wnids)}. Received: {classes} classes in "
            f"{source!r}{': ' * bool(labels)}{_few(labels)}"
        )
    return np.arange(outputs), names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:TOP]) + ", ..." * (len(names) > TOP)

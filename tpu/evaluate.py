"""How well a classifier does on a data set: published weights, a saved model, or what a run has come to."""

import functools
import heapq
import io
import itertools
import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_effnet import blocks, models, preprocessing
from keras_effnet.errors import one_of
from keras_effnet.tpu.checkpoints import steps
from keras_effnet.tpu.config import Data, Recipe, from_json
from keras_effnet.tpu.data import eval_image
from keras_effnet.tpu.sources import Evaluated, Items, Records, Source, open_evaluation, open_source
from keras_effnet.variants import VARIANTS
from keras_effnet.weights import convert, writers

TOP = 5
CONFUSIONS = 10


@dataclass(frozen=True)
class Mistake:
    """An example that was taken for another class.

    Args:
        place: Integer, which of the examples.
        pixels: uint8 array (height, width, channels), what the model saw.
    """

    place: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Scores:
    """What a model said of each example.

    Args:
        names: List of the examples' names.
        labels: int32 array (examples,), class numbers of the model.
        classes: int32 array (examples, 5 or fewer), the most probable classes first.
        probabilities: float32 array of the same shape.
        skipped: List of the names of what could not be read.
        mistakes: List of `Mistake`, the most confident first.
    """

    names: list[str]
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    skipped: list[str]
    mistakes: list[Mistake]

    @property
    def hits(self) -> np.ndarray:
        """Boolean array (examples,), whether the first class is the right one."""
        return self.classes[:, 0] == self.labels

    @property
    def top1(self) -> float:
        """Share of examples whose most probable class is the right one."""
        return float(self.hits.mean())

    @property
    def top5(self) -> float:
        """Share of examples whose class is among the five most probable."""
        return float((self.classes == self.labels[:, None]).any(1).mean())

    def per_class(self) -> list[tuple[int, int, float]]:
        """Class number, examples and top-1 of each class that there is an example of."""
        seen = [(int(label), self.hits[self.labels == label]) for label in np.unique(self.labels)]
        return [(label, len(hits), float(hits.mean())) for label, hits in seen]

    def confusions(self, count: int = CONFUSIONS) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: right class, predicted class, how often."""
        wrong = np.flatnonzero(~self.hits)
        pairs = Counter((int(self.labels[place]), int(self.classes[place, 0])) for place in wrong)
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        return [(true, said, often) for (true, said), often in ordered[:count]]


@dataclass(frozen=True)
class Trained:
    """What a run has come to.

    Args:
        recipe: `Recipe`.
        size: Integer, pixels of an image's side.
        net: A `keras.Model` with the moving average of all variables.
        origin: String, the file that its values are from.
    """

    recipe: Recipe
    size: int
    net: Any
    origin: str

    def read(self) -> Callable[[bytes], np.ndarray]:
        """Function from an image's bytes to the pixels that the run is evaluated on."""
        cut = tf.function(lambda encoded: eval_image(encoded, self.size, self.recipe.data))
        return lambda encoded: cut(tf.constant(encoded)).numpy()


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
    >>> from keras_effnet.tpu.evaluate import evaluate
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
    with writers.replacing(predictions) if predictions else nullcontext() as temporary:
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


def score(
    net: keras.Model,
    rows: tf.data.Dataset,
    examples: Items | Records,
    read: Callable[[bytes], np.ndarray],
    numbers: np.ndarray,
    *,
    batch_size: int = 32,
    keep: int = 0,
    on_progress: Callable[[int], Any] = lambda done: None,
) -> Scores:
    """Asks a model about examples. A few batches of pixels are in memory at a time.

    Args:
        net: A `keras.Model` that gives probabilities or logits.
        rows: `tf.data.Dataset` of `examples.evaluate()` or `examples.sample()`.
        examples: `Items` or `Records`.
        read: Function from an image's bytes to pixels.
        numbers: Integers (the data's classes,), the model's class of each.
        batch_size: Integer. Defaults to 32.
        keep: Integer, the most confident mistakes whose pixels are kept. Defaults to 0.
        on_progress: Function that is called with the number of examples that are done.

    Returns:
        `Scores`.

    Raises:
        ValueError: If a label is not among the classes, the storage does not answer, or the model gives no numbers.
    """
    names: list[str] = []
    labels, classes, probabilities, skipped = [], [], [], []
    kept: list[tuple[float, int, np.ndarray]] = []
    activate: Callable | None = None
    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ready = _decoded(pool, rows, examples, read, ahead=2 * batch_size)
        for batch in iter(lambda: list(itertools.islice(ready, batch_size)), []):
            skipped += [name for name, _, pixels in batch if pixels is None]
            whole = [(name, label, pixels) for name, label, pixels in batch if pixels is not None]
            done += len(batch)
            if whole:
                for name, label, _ in whole:
                    if not 0 <= label < len(numbers):
                        raise ValueError(
                            f"Expected labels from 0 to {len(numbers) - 1} (see --first-label). Received: {label}, of "
                            f"{name}"
                        )
                outputs = np.asarray(net.predict_on_batch(np.stack([pixels for *_, pixels in whole])), "float32")
                if not np.isfinite(outputs).all():
                    raise ValueError(
                        f"Expected finite numbers from the model. Received: others, of {whole[0][0]} or the next images"
                    )
                activate = activate or (_same if _are_probabilities(outputs) else _softmax)
                order = np.argsort(-outputs, axis=1, kind="stable")[:, :TOP].astype("int32")
                shares = np.take_along_axis(activate(outputs), order, 1)
                for (name, label, pixels), best, share in zip(whole, order, shares, strict=True):
                    if keep and best[0] != numbers[label]:
                        shown = np.clip(np.rint(pixels), 0, 255).astype("uint8")
                        place = (float(share[0]), -len(names), shown)
                        (heapq.heappush if len(kept) < keep else heapq.heappushpop)(kept, place)
                    names.append(name)
                    labels.append(int(numbers[label]))
                classes.append(order)
                probabilities.append(shares)
            on_progress(done)
    width = min(TOP, len(classes[0][0])) if classes else 0
    return Scores(
        names,
        np.array(labels, "int32"),
        np.concatenate(classes) if classes else np.zeros((0, width), "int32"),
        np.concatenate(probabilities) if classes else np.zeros((0, width), "float32"),
        skipped,
        [Mistake(-place, pixels) for _, place, pixels in sorted(kept, reverse=True, key=lambda one: one[:2])],
    )


def _same(outputs):
    return outputs


def _softmax(outputs):
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _are_probabilities(outputs) -> bool:
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-2))


def _decoded(pool, rows, examples, read, ahead: int) -> Iterator[tuple[str, int, np.ndarray | None]]:
    """Name, label and pixels of each example in their order; no pixels of what cannot be read."""

    def one(row):
        name = row["name"].numpy().decode(errors="replace")
        try:
            content = examples.load(row["image"]).numpy()
        except tf.errors.OpError as error:  # a storage that does not answer is no photograph's fault
            raise ValueError(f"Expected to read {name}. Received: {error.message}") from error
        try:
            pixels = read(content if isinstance(content, bytes) else png(content))
        except (OSError, ValueError, MemoryError, tf.errors.OpError):
            pixels = None
        return name, int(row["label"]), pixels

    waiting: deque[Future] = deque()
    try:
        for row in rows:
            waiting.append(pool.submit(one, row))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except tf.errors.OpError as error:
        raise ValueError(f"Expected to read all of the data. Received: {error.message}") from error
    finally:
        for future in waiting:
            future.cancel()


def png(pixels: np.ndarray) -> bytes:
    """A picture as the bytes of a file.

    Args:
        pixels: uint8 array (height, width, channels).

    Returns:
        Bytes.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def trained(workdir) -> Trained:
    """The model of a run: the one that it saved in the end, or else the moving average of its newest checkpoint.

    Args:
        workdir: Path of the run's folder.

    Returns:
        A `Trained`.

    Raises:
        ValueError: If there is neither, or nothing can be read.
    """
    from keras_effnet.tpu.train import build

    workdir = os.fspath(workdir).rstrip("/")
    recipe, resolved = configuration(workdir)
    size = resolved.get("image_size") or recipe.model.image_size or VARIANTS[recipe.model.name].resolution
    told = []
    if tf.io.gfile.exists(f"{workdir}/model.keras"):
        try:
            net = keras.models.load_model(f"{workdir}/model.keras", compile=False)
            return Trained(recipe, size, net, "model.keras")
        except Exception as error:  # whatever a file that was half written makes Keras raise
            told.append(f"model.keras: {error}")
    for step in reversed(steps(f"{workdir}/checkpoints")):
        path = f"{workdir}/checkpoints/ckpt-{step}"
        try:
            average = (_averages_of_jax if resolved.get("runner") == "jax" else _averages)(path)
            net: Any = build(recipe, resolved["classes"], "float32")
            for variable in net.weights:
                variable.assign(average(variable.path))
            return Trained(recipe, size, net, os.path.basename(path))
        except (tf.errors.OpError, OSError, KeyError, ValueError, RuntimeError) as error:
            told.append(f"{os.path.basename(path)}: {error}")
    raise ValueError(
        f"Expected model.keras or a checkpoint in {workdir!r} that can be read. Received: "
        f"{'; '.join(told) or 'none yet'}"
    )


def _averages(path: str) -> Callable[[str], Any]:
    reader: Any = tf.train.load_checkpoint(path)

    def average(name: str):
        key = name.replace(".", "..").replace("/", ".S")  # as TensorFlow escapes names of objects
        return reader.get_tensor(f"state/averages/{key}/.ATTRIBUTES/VARIABLE_VALUE")

    return average


def _averages_of_jax(path: str) -> Callable[[str], Any]:
    if keras.backend.backend() != "jax":  # its devices may be those of the run
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from keras_effnet.tpu import jax_checkpoints

    if problem := jax_checkpoints.damage(path):
        raise ValueError(problem)
    tree = jax_checkpoints.read(path)["state"]["averages"]
    return lambda name: functools.reduce(dict.__getitem__, name.split("/"), tree)


def configuration(workdir: str) -> tuple[Recipe, dict[str, Any]]:
    """A run's recipe, and the numbers that followed from it.

    Args:
        workdir: Path of the run's folder.

    Returns:
        Pair of a `Recipe` and a dict, which is empty where the run did not come so far.

    Raises:
        ValueError: If there is no run.
    """
    try:
        text = tf.io.gfile.GFile(f"{workdir}/config.json").read()
    except tf.errors.OpError as error:
        raise ValueError(f"Expected the folder of a run, with its config.json. Received: {workdir!r}") from error
    return from_json(text), json.loads(text).get("resolved", {})


def open_run(workdir, recipe: Recipe) -> Source:
    """The data of a run, as the run itself opens it; nothing is written to its folder.

    Args:
        workdir: Path of the run's folder.
        recipe: `Recipe`.

    Returns:
        A `Source`.
    """
    counted = f"{os.fspath(workdir).rstrip('/')}/records.json"
    with tempfile.TemporaryDirectory() as folder:
        if tf.io.gfile.exists(counted):
            tf.io.gfile.copy(counted, f"{folder}/records.json")
        return open_source(recipe.data, cache=f"{folder}/records.json")


def _labels_of(workdir) -> Sequence[str]:
    """Names of the classes of a run that came to its end."""
    path = f"{os.fspath(workdir).rstrip('/')}/result.json"
    return json.loads(tf.io.gfile.GFile(path).read())["labels"] if tf.io.gfile.exists(path) else ()


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
    blocks.find(net)
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
        return _Subject(run.net, _outputs(run.net), run.read(), used, run=run, labels=_labels_of(folder))
    net = _network(model, weights)
    outputs = _outputs(net)
    # A model that does not know its weights is seen as its variant's usual ones, or as those that are named.
    known = hasattr(net, "weights_record") or weights == "imagenet" or os.path.isfile(weights)
    size, channels, channels_last, rules = preprocessing._expected_by(net, "auto" if known else weights)
    side = min(size)
    share = crop or (None if rules else 0.875)
    padding = rules.crop_padding if share is None else round(side * (1 / share - 1))
    interpolation = interpolation or (rules.interpolation if rules else "bicubic")

    # preprocessing.image_loader(), with a crop and an interpolation that may be others than the weights'.
    def read(encoded):
        pixels = preprocessing.decode_image(encoded, channels)
        pixels = preprocessing.crop_and_resize(pixels, size, padding, interpolation)
        return pixels if channels_last else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    used = {"size": list(size), "crop": round(side / (side + padding), 4), "interpolation": interpolation}
    return _Subject(net, outputs, read, used, getattr(net, "weights_record", None))


def _classes(found: Evaluated, subject: _Subject, source: str) -> tuple[np.ndarray, list[str]]:
    """The model's class of each of the data's, and the names of the model's classes."""
    labels, outputs = found.labels, subject.outputs
    wnids = dict(preprocessing.classes()) if outputs == 1000 else {}
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

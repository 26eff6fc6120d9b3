"""From photographs to named classes, on the fastest library that is installed."""

import hashlib
import inspect
import json
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet import __version__, preprocessing, runtimes
from keras_effnet.errors import one_of, unknown
from keras_effnet.variants import VARIANTS
from keras_effnet.weights import registry, store, writers

if TYPE_CHECKING:
    import keras

BATCH = 16  # photographs that are decoded before the model sees them
KEPT_AS = 1  # counts up when exports change, so that what was kept before is made anew


class Predictor:
    """A model for inference, on the fastest library that is installed here.

    The model is exported once, folded (`fold_batch_norm()`) and tried against Keras, and kept on disk under what it
    holds, so that the next time it starts without Keras' export, and without Keras where it is given by name or path.

    Args:
        model: A functional or sequential `keras.Model` of images (of this package, of keras.applications, or built on
            them; its weights are those of now), the path of its `.keras` file, the name of a model, or the path of an
            exported file: `.tflite`, `.onnx`, `.xml`.
        runtime: `"litert"`, `"onnxruntime"`, `"openvino"`, or `"keras"` for Keras itself. Defaults to `"auto"`: the
            fastest of those that are installed, by a short measurement on this machine, which is remembered.
        precision: `"float32"`, `"float16"` or `"int8"`, see `export()`. Defaults to `"float32"`.
        threads: Integer, processors to use. Defaults to None: all that this process may use.
        weights: For the name of a model: tag of its weights, path of a file, or None for random ones. Defaults to
            `"imagenet"`.
        calibration: For `"int8"`, see `export()`. Defaults to None.
        input_shape: Tuple of integers, an image's shape, for a model of any size. Defaults to None.

    Call arguments:
        images: Array of pixels 0-255, uint8 or of any other numbers: one image, or any number of them. Any number of
            threads may call at once.

    Returns:
        What `model.predict(images)` returns: float32 arrays with a row for each image. One image alone gives one row.

    Raises:
        ImportError: If the runtime, or what exports to it, is not installed.
        OSError: If a file or the weights cannot be read.
        ValueError: If an argument is not valid, the model has layers that cannot be exported, or images have another
            shape, are none, or hold NaN.

    Example:

    >>> import keras_effnet as ke, numpy as np
    >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
    >>> predictor = ke.Predictor(model)
    >>> predictor(np.zeros((3, 32, 32, 3), "uint8")).shape
    (3, 2)
    """

    def __init__(
        self,
        model: "keras.Model | str | os.PathLike",
        runtime: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
        *,
        weights: str | os.PathLike | None = "imagenet",
        calibration: Any = None,
        input_shape: tuple[int, ...] | None = None,
    ):
        one_of("precision", precision, runtimes.PRECISIONS)
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f"Expected threads as a positive integer. Received: threads={threads!r}")
        self.precision, self.threads = precision, threads or runtimes.cores()
        source = _Source(model, weights, precision, calibration, input_shape)
        if source.exported:
            self.runtime, self.path = runtimes.of_file(source.exported, runtime), Path(source.exported)
            self._run: Any = runtimes.Pool(self.runtime, self.path, self.threads)
            record = {"input_shape": self._run.input_shape} | runtimes.metadata(self.path)
            self.precision = record.get("precision", self.precision)
        else:
            self.runtime, self.path, record, self._run = source.opened(runtime, self.threads)
        self.input_shape: tuple[int, ...] = tuple(record["input_shape"])
        self.labels: list[str] | None = record.get("labels")
        self._structure = record.get("outputs")

    def __repr__(self):
        return f"<Predictor {self.input_shape} {self.precision} on {self.runtime}, {self.threads} threads>"

    def __call__(self, images) -> Any:
        rows = self._run(self._checked(images))
        match self._structure:
            case list(names) if all(isinstance(name, str) for name in names):
                return dict(zip(names, rows, strict=True))
            case int():
                return rows
        return rows[0] if len(rows) == 1 else rows

    def _checked(self, images) -> np.ndarray:
        try:
            array = np.asarray(images)
        except ValueError as error:  # of several shapes
            raise ValueError(f"Expected pixels as numbers, in images of one shape. Received: {error}") from error
        if array.dtype.kind not in "uifb":
            raise ValueError(f"Expected pixels as numbers, in images of one shape. Received: dtype {array.dtype}")
        if array.ndim == 3:
            array = array[None]
        told = ", ".join(map(str, self.input_shape))
        if array.ndim != 4 or array.shape[1:] != self.input_shape:
            raise ValueError(f"Expected images of shape (count, {told}). Received: {np.shape(images)}")
        if not len(array):
            raise ValueError(f"Expected at least one image of shape ({told}). Received: an empty batch")
        pixels = np.ascontiguousarray(array, "float32")
        if array.dtype.kind == "f" and not np.isfinite(pixels).all():
            wrong = np.flatnonzero(~np.isfinite(pixels).all((1, 2, 3)))
            raise ValueError(f"Expected finite pixels. Received: NaN or infinity in image {wrong[0]} of {len(array)}")
        return pixels


class _Source:
    """What a predictor is made of, and the folder in which its exports are kept."""

    def __init__(self, model, weights, precision: str, calibration, input_shape):
        self.exported = None
        self.precision, self._calibration, self._shape = precision, calibration, input_shape
        self._weights = weights
        self._model: Any = model
        if isinstance(model, str | os.PathLike):
            name = os.fspath(model)
            if name in VARIANTS:
                told = ["name", name, _weights_of(name, weights)]
            else:
                _existing(name, (".keras", *runtimes.FORMATS.values()))
                if not name.endswith(".keras"):
                    self.exported = name
                    return
                told = ["file", registry.digest(name, "sha256")]
        else:
            told = ["model", _fingerprint(model)]
        if precision == "int8" and calibration is not None:
            told.append(_told(calibration))
        told += [KEPT_AS, __version__, version("keras"), input_shape and list(input_shape)]
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
        self.folder = store.home() / "predictor" / key

    def model(self) -> Any:
        """The Keras model."""
        if not isinstance(self._model, str | os.PathLike):
            return self._model
        self._model = load(self._model, self._weights)
        return self._model

    def opened(self, runtime: str, threads: int) -> tuple[str, Path | None, dict[str, Any], Any]:
        """The runtime, its file, what is known of the model, and what runs images."""
        one_of("runtime", runtime, ["auto", *runtimes.RUNTIMES, "keras"])
        if runtime == "keras":
            return self._keras()
        names = runtimes.choose(runtime)
        if runtime != "auto":
            return self._opened(runtime, threads)
        chosen = self._remembered(names, threads) or self._fastest(names, threads)
        return self._opened(chosen, threads) if chosen else self._keras()

    def _opened(self, name: str, threads: int) -> tuple[str, Path | None, dict[str, Any], Any]:
        path, record = self._made(name)
        return name, path, record, runtimes.Pool(name, path, threads)

    def _keras(self):
        from keras_effnet import exporter
        from keras_effnet.folding import for_inference

        if self.precision != "float32":
            raise ValueError(f"Expected float32 for Keras itself. Received: precision={self.precision!r}")
        model = self.model()
        shape = exporter.shape_of(model, self._shape)
        lock = threading.Lock()
        net: Any = for_inference(model, shape)

        def run(images: np.ndarray) -> list[np.ndarray]:
            import keras

            rows = []
            for start in range(0, len(images), BATCH):
                part = images[start : start + BATCH]
                # Of one size where there are many, since each size is compiled.
                missing = BATCH - len(part) if len(images) > BATCH else 0
                part = np.concatenate([part, np.zeros((missing, *shape), "float32")]) if missing else part
                with lock:
                    outputs = net.predict_on_batch(part)
                made = [np.asarray(keras.ops.convert_to_numpy(each)) for each in keras.tree.flatten(outputs)]
                rows.append([each[: len(each) - missing] for each in made])
            return [np.concatenate(each) for each in zip(*rows, strict=True)]

        return "keras", None, {"outputs": exporter.outputs_of(model), "input_shape": shape}, run

    def _places(self, name: str) -> tuple[Path, Path]:
        """The file for a runtime, and what is known of it."""
        kind = runtimes.RUNTIMES[name].formats[0]
        path = self.folder / f"{self.precision}{runtimes.FORMATS[kind]}"
        return path, path.with_suffix(f".{kind}.json")

    def _kept(self, name: str) -> dict[str, Any] | None:
        """What is known of a runtime's file, if that is there and whole."""
        path, told = self._places(name)
        with suppress(OSError, ValueError, KeyError):
            record = json.loads(told.read_text())
            if path.stat().st_size == record["size"]:
                return record
        return None

    def _made(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The file for a runtime, made if it is not there."""
        path, told = self._places(name)
        record = self._kept(name)
        if record is not None:
            return path, record
        from keras_effnet import exporter

        model = self.model()
        self.folder.mkdir(parents=True, exist_ok=True)
        writers.sweep(self.folder)
        kind = runtimes.RUNTIMES[name].formats[0]
        report = exporter.export(
            model, path, kind, self.precision, calibration=self._calibration, input_shape=self._shape
        )
        record = report | {key: value for key, value in runtimes.metadata(path).items() if key not in report}
        with writers.replacing(told) as temporary:
            temporary.write_text(json.dumps(record))
        return path, record

    def _choices(self) -> Path:
        return self.folder / f"{self.precision}.fastest.json"

    def _remembered(self, names: list[str], threads: int) -> str | None:
        try:
            chosen = json.loads(self._choices().read_text())[runtimes.measured_on(names, threads)]["chosen"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return chosen if chosen in names else None

    def _fastest(self, names: list[str], threads: int) -> str | None:
        """The fastest runtime, of those that this backend exports to."""
        if not all(self._kept(name) for name in names):
            from keras_effnet import exporter

            exporter.shape_of(self.model(), self._shape)  # what no runtime mends is told as it is
        pools, reasons = {}, {}
        for name in names:
            try:
                _, _, record, pool = self._opened(name, threads)
                pools[name] = pool, record
            except (ImportError, ValueError) as error:
                reasons[name] = error
        if not pools:
            told = "; ".join(f"{name}: {' '.join(str(error).split())}" for name, error in reasons.items())
            if self.precision != "float32":
                raise ValueError(
                    f"Expected a runtime for {self.precision}. Received: {told or 'none that is installed'}. "
                    "Bring one with: pip install 'keras_effnet[tensorflow]'"
                )
            warnings.warn(
                f"Keras itself computes, which is slower: {told or 'no runtime is installed'}. "
                "Bring one with: pip install 'keras_effnet[tensorflow]'",
                stacklevel=4,
            )
            return None
        shape = next(iter(pools.values()))[1]["input_shape"]
        image = np.random.default_rng(0).uniform(0, 255, (1, *shape)).astype("float32")
        times = runtimes.seconds_each([lambda pool=pool: pool(image) for pool, _ in pools.values()])
        seconds = dict(zip(pools, times, strict=True))
        chosen = min(seconds, key=lambda name: seconds[name])
        try:
            known = json.loads(self._choices().read_text())
        except (OSError, ValueError):
            known = {}
        known[runtimes.measured_on(names, threads)] = {"chosen": chosen, "seconds": seconds}
        with writers.replacing(self._choices()) as temporary:
            temporary.write_text(json.dumps(known))
        return chosen


def load(model: str | os.PathLike, weights: str | os.PathLike | None = "imagenet") -> "keras.Model":
    """The model of a name or a file.

    Args:
        model: Name of a model, or path of a `.keras` file.
        weights: For a name: tag of its weights, path of a file, or None for random ones. Defaults to `"imagenet"`.

    Returns:
        A `keras.Model`.

    Raises:
        OSError: If the file does not exist, or the weights cannot be brought.
        ValueError: If the name is unknown, or the file is no model.
    """
    name = os.fspath(model)
    if name in VARIANTS:
        from keras_effnet.models import create_model

        return create_model(name, weights=weights)
    _existing(name, (".keras",))
    import keras

    try:
        loaded: Any = keras.saving.load_model(name, compile=False)
    except (TypeError, NotImplementedError) as error:  # what Keras raises for a layer that it does not know
        raise ValueError(
            f"Expected a model whose layers are known here. Received: {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    return loaded


def _existing(name: str, endings: tuple[str, ...]) -> None:
    if os.path.isfile(name) and name.endswith(endings):
        return
    if not name.endswith(endings):
        raise unknown("model", name, [*VARIANTS, f"the path of a file that ends in {' or '.join(endings)}"])
    raise FileNotFoundError(f"Expected the file of a model. Received: {name!r}, which does not exist")


def _weights_of(name: str, weights) -> Any:
    """What tells weights from others, without bringing them."""
    if weights is None:
        return None
    if os.path.isfile(weights):
        return registry.digest(weights, "sha256")
    try:
        record = registry.find(name, os.fspath(weights))
    except ValueError:
        from keras_effnet.weights import readers

        if not readers.exists(weights):
            raise
        # A checkpoint, which is a folder or the beginning of files' names.
        path = Path(weights)
        files = sorted(path.iterdir() if path.is_dir() else path.parent.glob(f"{path.name}.*"))
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [record.tag, *(file.hash or file.url or file.package for file in record.files)]


def _told(calibration) -> str:
    """A hash of calibration images, or of their files' names and times."""
    hashed = hashlib.sha256()
    if hasattr(calibration, "shape"):
        hashed.update(np.asarray(calibration).tobytes())
        return hashed.hexdigest()
    for each in [calibration] if isinstance(calibration, str | bytes | os.PathLike) else calibration:
        if isinstance(each, str | os.PathLike):
            for path in preprocessing.photographs([each]):
                found = os.stat(path)
                hashed.update(f"{path} {found.st_size} {found.st_mtime_ns}".encode())
        else:
            hashed.update(each if isinstance(each, bytes) else np.asarray(each).tobytes())
    return hashed.hexdigest()


_PROCESS = secrets.token_hex(16)


def _fingerprint(model) -> str:
    """A hash of all that a model computes with: layers, weights, and the code of layers that are a user's own."""
    import keras

    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a Keras model, the name of one, or the path of a file. Received: {type(model).__name__}"
        )
    from keras_effnet.folding import check

    check(model)
    hashed = hashlib.sha256(model.to_json().encode())
    for layer in model._flatten_layers():
        functions = [value for value in vars(layer).values() if inspect.isfunction(value)]
        for own in (type(layer), *functions):
            if own.__module__.partition(".")[0] in ("keras", "keras_effnet"):
                continue
            try:
                hashed.update(inspect.getsource(own).encode())
            except (OSError, TypeError):  # typed at a prompt: of this process alone
                hashed.update(f"{_PROCESS} {id(own)}".encode())
    for weight in model.weights:
        hashed.update(np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(weight.value, "float32"))).tobytes())
    record = getattr(model, "weights_record", None)
    hashed.update(f"{record and (record.model, record.tag)}".encode())
    return hashed.hexdigest()


class Classifier:
    """Names what is on photographs, with a model that has its pretrained classifier.

    Args:
        model: Name of a model. Defaults to `"efficientnet-lite0"`.
        weights: Tag of the weights, or path of a file. Defaults to `"imagenet"`.
        top: Integer, classes per photograph. Defaults to 5.
        runtime: See `Predictor`.
        precision: See `Predictor`.

    Returns:
        When called with paths of image files, or of folders of them: a list of a dict per photograph, with `path`, and
        either `predictions` (a list of dicts with `class_id`, 0-999, `wnid`, `name` and `probability`) or `error`. One
        that cannot be read does not stop the others.

    Raises:
        ValueError: If model, weights or top are not valid.
        OSError: If the weights cannot be brought.

    Example:

    >>> Classifier(top=1)(["docs/coffee.png"])[0]["predictions"][0]["name"]
    'espresso'
    """

    def __init__(
        self,
        model: str = "efficientnet-lite0",
        weights: str | os.PathLike = "imagenet",
        top: int = 5,
        runtime: str = "auto",
        precision: str = "float32",
    ):
        preprocessing.rank(np.zeros((0, 1000)), top)  # what is invalid is told before the work
        one_of("model", model, VARIANTS)
        self.top = top
        self.predictor = Predictor(model, runtime, precision, weights=weights)
        if os.path.isfile(weights):
            record = registry.recognise(model, weights) or registry.default(model)
        else:
            try:
                record = registry.find(model, os.fspath(weights))
            except ValueError:  # a checkpoint's folder or prefix, which was loaded
                record = registry.default(model)
        self._load = preprocessing.image_loader(model, record and record.tag, shape=self.predictor.input_shape)

    def __call__(
        self, paths: Iterable[str | os.PathLike], on_progress: Callable[[int], Any] = lambda done: None
    ) -> list[dict[str, Any]]:
        paths = preprocessing.photographs(paths)
        results: list[dict[str, Any]] = [{"path": os.fspath(path)} for path in paths]
        for start in range(0, len(paths), BATCH):
            batch, images = results[start : start + BATCH], []
            for path, result in zip(paths[start:], batch, strict=False):
                try:
                    if os.path.isdir(path):
                        raise ValueError(f"Expected photographs. Received: {str(path)!r}, a folder without any")
                    images.append(self._load(path))
                except (OSError, ValueError, MemoryError) as error:
                    result["error"] = str(error) or type(error).__name__
                on_progress(1)
            if images:
                named = iter(preprocessing.rank(self.predictor(np.stack(images)), self.top))
                for result in batch:
                    if "error" not in result:
                        keys = ("class_id", "wnid", "name", "probability")
                        result["predictions"] = [dict(zip(keys, row, strict=True)) for row in next(named)]
        return results

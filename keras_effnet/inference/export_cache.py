"""The exports that a `Predictor` keeps on disk: made once, found again by the content of the model."""

import hashlib
import inspect
import json
import os
import secrets
import threading
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet import __version__, compat, files
from keras_effnet.errors import one_of
from keras_effnet.images import folders
from keras_effnet.inference import runtimes
from keras_effnet.loading import check_file, load
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.weights import registry, store

BATCH = 16  # images that Keras computes at a time
KEPT_AS = 1  # counts up when exports change, so that what was kept before is made anew


class ExportCache:
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
                check_file(name, (".keras", *runtimes.FORMATS.values()))
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
        from keras_effnet.inference import export
        from keras_effnet.inference.folding import for_inference

        if self.precision != "float32":
            raise ValueError(f"Expected float32 for Keras itself. Received: precision={self.precision!r}")
        model = self.model()
        shape = export.shape_of(model, self._shape)
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

        return "keras", None, {"outputs": export.outputs_of(model), "input_shape": shape}, run

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
        from keras_effnet.inference import export

        model = self.model()
        self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep(self.folder)
        kind = runtimes.RUNTIMES[name].formats[0]
        report = export.export(
            model, path, kind, self.precision, calibration=self._calibration, input_shape=self._shape
        )
        record = report | {key: value for key, value in runtimes.metadata(path).items() if key not in report}
        with files.replacing(told) as temporary:
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
            from keras_effnet.inference import export

            export.shape_of(self.model(), self._shape)  # what no runtime mends is told as it is
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
        with files.replacing(self._choices()) as temporary:
            temporary.write_text(json.dumps(known))
        return chosen


def _weights_of(name: str, weights) -> Any:
    """What tells weights from others, without bringing them."""
    if weights is None:
        return None
    if os.path.isfile(weights):
        return registry.digest(weights, "sha256")
    try:
        record = registry.find(name, os.fspath(weights))
    except ValueError:
        from keras_effnet.weights.formats import opening

        if not opening.exists(weights):
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
            for path in folders.photographs([each]):
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
    from keras_effnet.inference.folding import check

    check(model)
    hashed = hashlib.sha256(model.to_json().encode())
    for layer in compat.all_layers(model):
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

"""Caches the exports of a `Predictor` on disk, under a hash of the model's content."""

import hashlib
import inspect
import json
import os
import secrets
import threading
import warnings
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from keras_effnet import __version__, cache, compat, model_metadata
from keras_effnet.errors import one_of
from keras_effnet.images import folders
from keras_effnet.inference import runtimes
from keras_effnet.model_loader import check_finite, load_model, resolve
from keras_effnet.weights import registry

_FASTEST = ".fastest.json"
KEPT_AS = 5  # increased when exports change, which invalidates all that are cached


class ExportCache:
    """Opens a model for a `Predictor`, with exports that it caches on disk.

    The cache folder is named after a hash of the model, the weights, the calibration images, the input shape, and the
    versions of this package and Keras. A file that is already an export is opened directly: nothing is cached.

    Args:
        model: See `Predictor`.
        weights: See `Predictor`.
        precision: See `Predictor`.
        calibration: See `Predictor`.
        input_shape: See `Predictor`.
        loaded: The Keras model, if it has been loaded already. Defaults to None.
        maps: See `Predictor`.

    Attributes:
        exported: Path of the exported file that was given as `model`, or None.
        hold: `cache.Hold` of the cache folder, or None before the first export. Keep it as long as the runtime.

    Raises:
        OSError: If a file does not exist or cannot be read.
        ValueError: If the model or the weights are unknown, or the model is neither functional nor sequential.
    """

    def __init__(
        self, model, weights, precision: str, calibration, input_shape, loaded: Any = None, maps: bool = False
    ):
        self.exported = None
        self.hold: cache.Hold | None = None
        self._intact: set[Path] = set()
        self.precision, self._calibration, self._shape = precision, calibration, input_shape
        self._stored = precision if precision in runtimes.STORED else "float32"  # the precision of the file
        self._weights, self._maps = weights, maps
        self._model: Any = model
        self._given = model
        if isinstance(model, str | os.PathLike):
            found = resolve(model, exports=True)
            if found.kind == "export":
                self.exported = found.place
                return
            if found.kind == "name":
                self._weights = found.tag_of(weights)
                told = ["name", found.place, _weights_of(found.place, self._weights)]
            else:
                told = ["file", registry.digest(found.place, "sha256")]
            self._model, self._name = found.place, str(found.place)
        else:
            told = ["model", _fingerprint(model)]
            self._name = model.name
        self._model = self._model if loaded is None else loaded
        if precision == "int8" and calibration is not None:
            told.append(_told(calibration))
        if maps:
            told.append("maps")
        told += [KEPT_AS, __version__, version("keras"), input_shape and list(input_shape)]
        self._key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    def model(self) -> Any:
        """Returns the Keras model, which is loaded on first use.

        Returns:
            A `keras.Model`.

        Raises:
            OSError: If the weights cannot be downloaded.
            ValueError: If the file is not a model.
        """
        if isinstance(self._model, str | os.PathLike):
            self._model = load_model(self._model, self._weights)
        return self._model

    def opened(self, runtime: str, threads: int, device: str = "cpu") -> tuple[str, Path | None, dict[str, Any], Any]:
        """Opens the model on a runtime, and exports it first unless the export is cached.

        Args:
            runtime: See `Predictor`.
            threads: Integer. Processors to use.
            device: `"cpu"` or `"cuda"`. Defaults to `"cpu"`.

        Returns:
            Tuple of the name of the runtime, the path of the export (None for Keras), a dict with at least
            `input_shape` and `outputs`, and a function from a float32 batch of images to the list of outputs.

        Raises:
            ImportError: If the runtime, or the package that exports to it, is not installed.
            ValueError: If the runtime is unknown, or the model cannot be exported to it in this precision.
        """
        one_of("runtime", runtime, ["auto", *runtimes.FAST, "keras"])
        if device == "cuda":
            return self._on_gpu(runtime)
        if runtime == "keras":
            return self._keras()
        names = runtimes.choose(runtime, self.precision)
        if runtime != "auto":
            return self._opened(runtime, threads)
        compared = [*names, *runtimes.choose("auto")] if self.precision == "bfloat16" else names
        measured_on = runtimes.measured_on(compared, threads)
        choice = self._remembered(names, measured_on) or self._fastest(names, threads, measured_on)
        if not choice:
            return self._keras()
        times = choice.get("seconds", {})
        slower = min(times.values()) / choice["float32"] if "float32" in choice else 0
        if slower > 1.05:  # less is within what measurements differ by
            smaller = ", unless the size of the file matters more" if self.precision == "int8" else ""
            warnings.warn(
                f"On this machine, {self.precision} takes {slower:.2f} times as long as float32. "
                f"Use precision='float32'{smaller}",
                stacklevel=5,
            )
        return self._opened(choice["chosen"], threads)

    def _opened(self, name: str, threads: int) -> tuple[str, Path | None, dict[str, Any], Any]:
        path, record = self._made(name)
        return name, path, record, runtimes.Pool(name, path, threads, self.precision)

    def _on_gpu(self, runtime: str):
        """Opens the model on ONNX Runtime's CUDA provider if there is one, else on Keras."""
        if runtime != "keras" and runtimes.has_cuda_provider():
            path, record = self._made("onnxruntime")
            return "onnxruntime", path, record, runtimes.CudaSession(path)
        if runtime != "onnxruntime" and self.precision == "float32" and compat.sees_gpu():
            return self._keras()
        raise ValueError(
            "Expected a runtime for the GPU: pip install onnxruntime-gpu, or, for float32, a backend of Keras that "
            f"sees the GPU. Received: neither, for runtime={runtime!r} and {self.precision}"
        )

    def _keras(self):
        """Opens the folded model on Keras itself."""
        from keras_effnet.inference import export
        from keras_effnet.inference.class_maps import with_maps
        from keras_effnet.inference.folding import for_inference

        if self.precision != "float32":
            raise ValueError(
                f"Expected precision='float32' for runtime='keras'. Received: precision={self.precision!r}"
            )
        model = self.model()
        shape = export.shape_of(model, self._shape)
        check_finite(model)
        net = with_maps(model, shape) if self._maps else for_inference(model, shape)
        record = export.metadata_of(model, shape, self.precision, maps=self._maps)
        return "keras", None, record, _OnKeras(net, shape)

    @property
    def _folder(self) -> Path:
        """The cache folder, which is made on first use and not removed while it is in use."""
        self.hold = self.hold or cache.use("predictor", self._key, self._name)
        return self.hold.path

    def _places(self, name: str) -> tuple[Path, Path]:
        """Returns the paths of the export for a runtime, and of its record."""
        kind = self._format(name)
        path = self._folder / f"{self._stored}{runtimes.FORMATS[kind]}"
        return path, path.with_suffix(f".{kind}.json")

    def _format(self, name: str) -> str:
        runtime = runtimes.RUNTIMES[name]
        return runtime.int8 if self.precision == "int8" and runtime.int8 else runtime.formats[0]

    def _kept(self, name: str) -> dict[str, Any] | None:
        """Returns the record of the export for a runtime, or None if the export is missing or damaged."""
        path, told = self._places(name)
        with suppress(OSError):  # it cannot be read, or another process replaces it
            files = runtimes.files_of(path)
            if not told.exists() or not files:
                return None
            record = cache.read_json(told)
            if record is None:
                cache.tell_of_damage(told)
                return None
            if path in self._intact or (all(map(cache.is_ours, files)) and cache.checksum(*files) == record["crc32c"]):
                self._intact.add(path)
                return record
            cache.tell_of_damage(path)
        return None

    def _made(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Returns the path and the record of the export for a runtime. Exports the model if necessary."""
        path, told = self._places(name)
        record = self._kept(name)
        if record is not None:
            return path, record
        from keras_effnet.inference import export

        model = self.model()
        with cache.making(self._folder):
            record = self._kept(name)  # of a process that was faster
            if record is None:
                report = export.export(
                    *(model, path, self._format(name), self._stored),
                    calibration=self._calibration,
                    input_shape=self._shape,
                    maps=self._maps,
                )
                found = model_metadata.metadata(path)
                record = report | {key: value for key, value in found.items() if key not in report}
                record["crc32c"] = cache.checksum(*runtimes.files_of(path))
                cache.write_json(told, record)
                cache.trim()
        return path, record

    def _choices(self) -> Path:
        return self._folder / f"{self.precision}{_FASTEST}"

    def _remembered(self, names: list[str], measured_on: str) -> dict[str, Any] | None:
        choice = (cache.read_json(self._choices()) or {}).get(measured_on)
        return choice if choice and choice["chosen"] in names else None

    def _fastest(self, names: list[str], threads: int, measured_on: str) -> dict[str, Any] | None:
        """Measures all runtimes that the model can be exported to, in turn, and remembers the fastest.

        Returns:
            Dict with the name of the fastest as `chosen` and the `seconds` of each; for int8 and bfloat16 also the
            seconds of the fastest in `float32`. None if there is no runtime.
        """
        pools, reasons = self.pools(names, threads)
        if not pools:
            told = "; ".join(f"{name}: {shorten(str(error), 150)}" for name, error in reasons.items())
            told = told or "no runtime is installed"
            if self.precision != "float32":
                extra = "export" if self.precision == "bfloat16" else "tensorflow"
                raise ValueError(
                    f"Expected a runtime for {self.precision}. Run: pip install 'keras_effnet[{extra}]'. "
                    f"Received: {told}"
                )
            warnings.warn(
                "Running on Keras, which is slower. For a faster runtime, run: pip install 'keras_effnet[tensorflow]'. "
                f"Reason: {told}",
                stacklevel=5,
            )
            return None
        whole: dict[str, runtimes.Pool] = {}
        if self.precision in ("int8", "bfloat16"):
            other = ExportCache(self._given, self._weights, "float32", None, self._shape, self._model, self._maps)
            whole, _ = other.pools(runtimes.choose("auto"), threads)
        image = np.random.default_rng(0).uniform(0, 255, (1, *next(iter(pools.values())).input_shape)).astype("float32")
        calls = [partial(pool, image) for pool in (*pools.values(), *whole.values())]
        times = runtimes.seconds_each(calls)
        seconds = dict(zip(pools, times, strict=False))
        choice = {"chosen": min(seconds, key=lambda name: seconds[name]), "seconds": seconds}
        if whole:
            choice["float32"] = min(times[len(pools) :])
        cache.write_json(self._choices(), (cache.read_json(self._choices()) or {}) | {measured_on: choice})
        return choice

    def pools(self, names: list[str], threads: int) -> tuple[dict[str, runtimes.Pool], dict[str, Exception]]:
        """Opens the model on several runtimes, and exports it first where the export is not cached.

        Args:
            names: List of keys of `RUNTIMES`.
            threads: Integer. Processors to use.

        Returns:
            Tuple of the `Pool` of each runtime, and for the others, why the model cannot be exported to them.

        Raises:
            ValueError: If the model cannot be exported to any runtime.
        """
        if not all(self._kept(name) for name in names):
            from keras_effnet.inference import export

            # An error of the model itself is raised, not collected.
            export.shape_of(self.model(), self._shape)
            check_finite(self.model())
        pools: dict[str, runtimes.Pool] = {}
        reasons: dict[str, Exception] = {}
        for name in names:
            try:
                pools[name] = self._opened(name, threads)[3]
            except (ImportError, ValueError) as error:
                reasons[name] = error
        return pools, reasons


def forget_fastest() -> None:
    """Forgets which runtime is the fastest for each model, so that the next `Predictor` measures again."""
    for path in (cache.home() / "predictor").glob(f"*/*{_FASTEST}"):
        with suppress(OSError):
            path.unlink()


class _OnKeras:
    """Runs a net with Keras, as `runtimes.Pool` does with a runtime. Keras has its own threads."""

    batch = 16

    def __init__(self, net: Any, shape: tuple[int, ...]):
        self._net, self._shape = net, shape
        self._lock = threading.Lock()

    def check(self) -> None:
        """See `runtimes.Pool`."""

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        import keras

        rows = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            # Pads the last batch, since Keras compiles each batch size anew.
            missing = self.batch - len(part) if len(images) > self.batch else 0
            part = np.concatenate([part, np.zeros((missing, *self._shape), "float32")]) if missing else part
            with self._lock:
                outputs = self._net.predict_on_batch(part)
            made = [np.asarray(keras.ops.convert_to_numpy(each)) for each in keras.tree.flatten(outputs)]
            rows.append([each[: len(each) - missing] for each in made])
        return [np.concatenate(each) for each in zip(*rows, strict=True)]

    on_one_thread = __call__


def _weights_of(name: str, weights) -> Any:
    """Identifies weights without downloading them: by hash, by tag, or by the files of a checkpoint."""
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
        # A checkpoint: a folder, or the prefix of its files.
        path = Path(weights)
        files = sorted(path.iterdir() if path.is_dir() else path.parent.glob(f"{path.name}.*"))
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [record.tag, *(file.hash or file.url or file.package for file in record.files)]


def _told(calibration) -> str:
    """Hashes calibration images, or the paths, sizes and times of their files."""
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
    """Hashes all that a model computes with: layers, weights, and the source code of custom layers."""
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
            except (OSError, TypeError):  # defined at a prompt: valid in this process only
                hashed.update(f"{_PROCESS} {id(own)}".encode())
    for weight in model.weights:
        hashed.update(np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(weight.value, "float32"))).tobytes())
    hashed.update(json.dumps(model_metadata.of(model)).encode())  # labels, crop, record
    return hashed.hexdigest()

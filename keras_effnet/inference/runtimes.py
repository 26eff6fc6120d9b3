"""Runs exported models with LiteRT, ONNX Runtime or OpenVINO, without Keras or TensorFlow."""

import hashlib
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from glob import glob
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from textwrap import shorten
from typing import Any

import numpy as np

from keras_effnet import compat
from keras_effnet.errors import one_of, unknown

Run = Callable[[np.ndarray], list[np.ndarray]]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Runtime:
    """A library that runs exported models.

    Args:
        package: String. Its name for pip.
        module: String. Its name for `import`.
        formats: Tuple of strings. The formats that it runs. Models are exported to the first.
        open: Function of a path, a number of runners, and the threads of each. Returns the shape of an image and the
            runners. A runner takes a float32 batch of one image and returns the list of outputs. Only one thread at a
            time may use it.
        forks: Boolean, whether the library still works in a fork of a process that has used it.
        fast: Boolean, whether a `Predictor` exports models to it. Otherwise it only opens files.
        int8: String. The format that models are exported to in int8. Defaults to the first of `formats`.
        bfloat16: Like `open`, but computes in bfloat16. Defaults to None: it cannot.
    """

    package: str
    module: str
    formats: tuple[str, ...]
    open: Callable[[str, int, int], tuple[Shape, list[Run]]]
    forks: bool = True
    fast: bool = True
    int8: str = ""
    bfloat16: Callable[[str, int, int], tuple[Shape, list[Run]]] | None = None

    @property
    def installed(self) -> bool:
        """Whether the module can be imported."""
        return find_spec(self.module) is not None


STORED = ("float32", "float16", "int8")  # precisions of exported files
PRECISIONS = (*STORED, "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
CUDA = "CUDAExecutionProvider"

# format: suffix of its files. A SavedModel is a folder with a file of this name.
SAVED_MODEL = "saved_model.pb"
WEB_MODEL = "model.onnx"  # in the folder of a page
FORMATS = {"litert": ".tflite", "onnx": ".onnx", "openvino": ".xml"}


def _litert(path: str, count: int, threads: int) -> tuple[Shape, list[Run]]:
    from ai_edge_litert.interpreter import Interpreter

    def runner() -> tuple[Shape, Run]:
        interpreter = Interpreter(path, num_threads=threads)
        (place,) = interpreter.get_input_details()
        _check(place["shape"], str(np.dtype(place["dtype"])))
        if place["shape_signature"][0] == -1:
            interpreter.resize_tensor_input(place["index"], (1, *place["shape"][1:]))
        interpreter.allocate_tensors()
        places = [detail["index"] for detail in interpreter.get_output_details()]

        def run(image: np.ndarray) -> list[np.ndarray]:
            interpreter.set_tensor(place["index"], image)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for index in places]

        return tuple(map(int, place["shape"][1:])), run

    shapes, runs = zip(*(runner() for _ in range(count)), strict=True)
    return shapes[0], list(runs)


def _onnxruntime(path: str, count: int, threads: int) -> tuple[Shape, list[Run]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (place,) = session.get_inputs()
    _check(place.shape, str(place.type).replace("tensor(float)", "float32"))
    run: Any = partial(_run, session, place.name)
    return tuple(place.shape[1:]), [run] * count


def _run(session, place: str, image: np.ndarray) -> list[np.ndarray]:
    return session.run(None, {place: image})


def _openvino(path: str, count: int, threads: int, precision: str = "f32") -> tuple[Shape, list[Run]]:
    openvino = compat.load_openvino()
    model = openvino.Core().read_model(path)
    sides = [-1 if side.is_dynamic else side.get_length() for side in model.input().get_partial_shape()]
    _check(sides, model.input().element_type.to_dtype().name)
    model.reshape([1, *sides[1:]])
    hints = {"NUM_STREAMS": count, "INFERENCE_NUM_THREADS": count * threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def runner() -> Run:
        request = compiled.create_infer_request()

        def run(image: np.ndarray) -> list[np.ndarray]:
            request.infer({0: image})
            return [request.get_output_tensor(place).data.copy() for place in range(len(compiled.outputs))]

        return run

    return tuple(sides[1:]), [runner() for _ in range(count)]


def _savedmodel(path: str, count: int, threads: int) -> tuple[Shape, list[Run]]:
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    (spec,) = serve.structured_input_signature[1].values()
    _check([side or -1 for side in spec.shape], spec.dtype.name)
    outputs = sorted(serve.structured_outputs)

    def run(image: np.ndarray) -> list[np.ndarray]:
        found = serve(**{spec.name: tf.constant(image)})
        return [found[name].numpy() for name in outputs]

    return tuple(spec.shape[1:]), [run] * count


def files_of(path: str | os.PathLike) -> list[Path]:
    """Returns the paths of all files of an export."""
    path = Path(path)
    parts = [path, path.with_suffix(".bin")] if path.suffix == FORMATS["openvino"] else [path]
    inside = [file for each in parts for file in ([each] if each.is_file() else sorted(each.rglob("*")))]
    return [file for file in inside if file.is_file()]


def size_of(path: str | os.PathLike) -> int:
    """Returns the size of all files of an export, in bytes."""
    return sum(file.stat().st_size for file in files_of(path))


def _check(shape, dtype: str) -> None:
    """Checks that a model takes a batch of float images of one size. Files of other programs may not."""
    known = all(isinstance(side, int | np.integer) and side > 0 for side in shape[1:])
    if len(shape) != 4 or dtype != "float32" or not known:
        raise ValueError(f"Expected an input of float32 images of one size. Received: {dtype} {list(shape)}")


RUNTIMES = {
    "litert": Runtime("ai-edge-litert", "ai_edge_litert", ("litert",), _litert),
    "onnxruntime": Runtime("onnxruntime", "onnxruntime", ("onnx",), _onnxruntime, forks=False),
    "openvino": Runtime(
        "openvino",
        "openvino",
        ("onnx", "openvino"),
        _openvino,
        forks=False,
        int8="openvino",  # ONNX Runtime needs other places to quantize
        bfloat16=partial(_openvino, precision="bf16"),
    ),
    "tensorflow": Runtime("tensorflow", "tensorflow", ("savedmodel",), _savedmodel, forks=False, fast=False),
}

FAST = [name for name, runtime in RUNTIMES.items() if runtime.fast]
IN_BFLOAT16 = [name for name, runtime in RUNTIMES.items() if runtime.bfloat16]


def of_file(path: str | os.PathLike, name: str = "auto", precision: str = "float32") -> str:
    """Returns the runtime to open a file with.

    Args:
        path: Path of an exported model.
        name: Key of `RUNTIMES`, or `"auto"` for the first that is installed. Defaults to `"auto"`.
        precision: See `Predictor`. Only `"bfloat16"` matters here. Defaults to `"float32"`.

    Returns:
        Key of `RUNTIMES`.

    Raises:
        ImportError: If the runtime is not installed.
        ValueError: If the runtime does not open files with this suffix, or cannot compute in this precision here.
    """
    kind = next((kind for kind, ending in FORMATS.items() if os.fspath(path).endswith(ending)), None)
    kind = "savedmodel" if os.path.isfile(os.path.join(path, SAVED_MODEL)) else kind
    able = [other for other, runtime in RUNTIMES.items() if kind in runtime.formats]
    if not able:
        raise ValueError(
            f"Expected a file that ends in one of {', '.join(FORMATS.values())}. Received: {os.fspath(path)!r}"
        )
    if name == "auto" and precision == "bfloat16":
        (name,) = IN_BFLOAT16
        if name not in able:
            endings = ", ".join(FORMATS[each] for each in RUNTIMES[name].formats)
            raise ValueError(
                f"Expected a file that ends in one of {endings} for bfloat16. Received: {os.fspath(path)!r}"
            )
    elif name == "auto":
        name = next((other for other in able if RUNTIMES[other].installed), able[0])
    elif name not in able:
        raise unknown(f"runtime for {os.fspath(path)!r}", name, able)
    _need(name)
    _check_precision(name, precision)
    return name


def choose(name: str, precision: str = "float32") -> list[str]:
    """Returns the runtimes that a name selects.

    Args:
        name: One of `FAST`, `"keras"`, or `"auto"` for all that are installed.
        precision: See `Predictor`. Only `"bfloat16"` matters here. Defaults to `"float32"`.

    Returns:
        List of keys of `RUNTIMES`, or `["keras"]`.

    Raises:
        ImportError: If the named runtime is not installed.
        ValueError: If the name is unknown, or the runtime cannot compute in this precision here.
    """
    one_of("runtime", name, ["auto", *FAST, "keras"])
    if name == "auto" and precision == "bfloat16":
        name = IN_BFLOAT16[0]
    if name == "auto":
        return [other for other in FAST if RUNTIMES[other].installed]
    if name != "keras":
        _need(name)
    _check_precision(name, precision)
    return [name]


def _check_precision(name: str, precision: str) -> None:
    if precision != "bfloat16":
        return
    if name not in IN_BFLOAT16:
        raise ValueError(f"Expected runtime={IN_BFLOAT16[0]!r} for bfloat16. Received: runtime={name!r}")
    if not has_bfloat16():
        raise ValueError(
            "Expected a processor that computes in bfloat16 (AVX512-BF16 or AMX). Received: one that does not. "
            "Nearest: float32"
        )


def has_bfloat16() -> bool:
    """Returns whether OpenVINO is installed and this processor computes in bfloat16."""
    if not RUNTIMES["openvino"].installed:
        return False
    return "BF16" in compat.load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _need(name: str) -> None:
    if not RUNTIMES[name].installed:
        raise ImportError(
            f"Expected {RUNTIMES[name].package} for runtime={name!r}. Received: not installed. "
            f"Run: pip install {RUNTIMES[name].package}"
        )


class Pool:
    """Runs an exported model: a single image on all threads, many images with one thread each.

    The result of an image does not depend on the others, and no runtime has to plan for a new batch size. On two cores,
    this is also faster in all three (benchmarks/inference.py). Several threads may call at once.

    Args:
        runtime: Key of `RUNTIMES`.
        path: Path of the file.
        threads: Integer. Threads to use.
        precision: `"bfloat16"` to compute a float32 file in it. Anything else: as the file says. Defaults to
            `"float32"`.

    Attributes:
        batch: Integer. Images to pass to `on_one_thread()` at a time.

    Raises:
        ValueError: If the runtime cannot open the file.
    """

    batch = 1

    def __init__(self, runtime: str, path: str | os.PathLike, threads: int, precision: str = "float32"):
        self._runtime, self._path, self._threads = runtime, os.fspath(path), threads
        own = RUNTIMES[runtime]
        self._opener = own.bfloat16 if precision == "bfloat16" and own.bfloat16 else own.open
        self._start()

    def _start(self) -> None:
        self._file = self._stat()
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._opened = False
        self._runners: SimpleQueue[Run] = SimpleQueue()
        self.input_shape, (self._alone,) = self._open(1, self._threads)
        self._process = os.getpid()

    def _stat(self) -> tuple[int, int]:
        found = os.stat(self._path)
        return found.st_size, found.st_mtime_ns

    def _open(self, count: int, threads: int) -> tuple[Shape, list[Run]]:
        try:
            return self._opener(self._path, count, threads)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # each library raises its own types
            raise ValueError(
                f"Expected a model that {self._runtime} opens. Received: {self._path!r}: {shorten(str(error), 200)}"
            ) from error

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs the model.

        Args:
            images: float32 array with a batch of at least one image.

        Returns:
            List of arrays, one for each output.

        Raises:
            ValueError: If the process was forked and the runtime does not survive that, or the file has changed.
        """
        self.check()
        if len(images) < self._threads or self._threads == 1:
            with self._lock:
                rows = [self._alone(image) for image in _each(images)]
        else:
            rows = self._on_all_threads(images)
        return _batch_of(rows)

    def on_one_thread(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs the model on one thread, for a caller whose other threads do the same. At most `threads` run at once.

        Args:
            images: See `__call__()`.

        Returns:
            See `__call__()`.

        Raises:
            ValueError: See `__call__()`.
        """
        self.check()
        with self._runner() as run:
            return _batch_of([run(image) for image in _each(images)])

    def check(self) -> None:
        """Checks that the runtime works in this process. Opens the file again in a fork.

        Raises:
            ValueError: If the process was forked and the runtime does not survive that.
        """
        if os.getpid() != self._process:  # a fork has the memory of its parent, but none of its threads
            if not RUNTIMES[self._runtime].forks:
                raise ValueError(
                    f"Expected a Predictor created in this process, since {self._runtime} does not survive a fork. "
                    "Received: one of the parent process. Create it after the fork, or use runtime='litert'"
                )
            self._start()

    @contextmanager
    def _runner(self) -> Iterator[Run]:
        """Lends one of the runners that use one thread each. They are opened on first use."""
        # The lock is also held while an image runs on all threads. Who needs nothing opened does not wait for that.
        with nullcontext() if self._opened else self._lock:
            if not self._opened:
                if self._stat() != self._file:
                    raise ValueError(f"Expected the file not to change while in use. Received: {self._path!r}, changed")
                for run in self._open(self._threads, 1)[1]:
                    self._runners.put(run)
                self._opened = True
        run = self._runners.get()
        try:
            yield run
        finally:
            self._runners.put(run)

    def _on_all_threads(self, images: np.ndarray) -> list[list[np.ndarray]]:
        with self._lock:
            self._workers = self._workers or ThreadPoolExecutor(self._threads, "keras_effnet")
        rows: list[Any] = [None] * len(images)
        places = itertools.count()

        def work() -> None:
            with self._runner() as run:
                while (place := next(places)) < len(images):
                    rows[place] = run(images[place : place + 1])

        for job in [self._workers.submit(work) for _ in range(self._threads)]:
            job.result()
        return rows


def _each(images: np.ndarray) -> Iterator[np.ndarray]:
    return (images[place : place + 1] for place in range(len(images)))


def _batch_of(rows: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


class CudaSession:
    """Runs an ONNX file on an NVIDIA GPU, with ONNX Runtime's CUDA provider. Several threads may call at once.

    Batches are padded to a power of two, since each new size is planned anew. At most 64 images run at once.

    Args:
        path: Path of the file.
        provider: String. Defaults to `"CUDAExecutionProvider"`.

    Attributes:
        batch: Integer. Images to pass to `on_one_thread()` at a time.
        input_shape: Tuple of integers. The shape of an image.

    Raises:
        ValueError: If ONNX Runtime cannot use the provider, or cannot open the file.
    """

    batch = 16

    def __init__(self, path: str | os.PathLike, provider: str = CUDA):
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls") and provider == CUDA:
            onnxruntime.preload_dlls()  # those of CUDA and cuDNN that pip has installed
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            # By default, CUDA multiplies float32 with the precision of 10 bits (TF32).
            wanted = (provider, {"use_tf32": "0"}) if provider == CUDA else provider
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[wanted])
        except Exception as error:  # ONNX Runtime raises its own types
            raise ValueError(f"Expected a model that {provider} opens. Received: {shorten(str(error), 200)}") from error
        if session.get_providers()[0] != provider:  # it falls back without an error
            raise ValueError(
                f"Expected ONNX Runtime with {provider}. Received: {', '.join(session.get_providers())}. Check that "
                "the versions of CUDA and cuDNN are those that this onnxruntime-gpu needs"
            )
        (place,) = session.get_inputs()
        _check(place.shape, str(place.type).replace("tensor(float)", "float32"))
        self.input_shape = tuple(place.shape[1:])
        self._fixed = place.shape[0] if isinstance(place.shape[0], int) and place.shape[0] > 0 else None
        self._run, self._lock = partial(_run, session, place.name), threading.Lock()

    def check(self) -> None:
        """See `Pool`."""

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs the model. See `Pool`."""
        rows = []
        largest = self._fixed or 64
        for start in range(0, len(images), largest):
            part = images[start : start + largest]
            size = self._fixed or 1 << (len(part) - 1).bit_length()
            padded = np.zeros((size, *part.shape[1:]), "float32")
            padded[: len(part)] = part
            try:
                with self._lock:  # more at once would only take more memory
                    outputs = self._run(padded)
            except Exception as error:  # ONNX Runtime raises its own types
                raise ValueError(
                    f"Expected {size} images to run on the GPU. Received: {shorten(str(error), 200)}"
                ) from error
            rows.append([output[: len(part)] for output in outputs])
        return _batch_of(rows)

    on_one_thread = __call__


def device_of(device: str, runtime: str = "auto", precision: str = "float32") -> str:
    """Returns where a `Predictor` runs a model.

    Args:
        device: `"auto"`, `"cpu"` or `"cuda"`.
        runtime: See `Predictor`. Defaults to `"auto"`.
        precision: See `Predictor`. Defaults to `"float32"`.

    Returns:
        `"cpu"` or `"cuda"`. For `"auto"`, the GPU if this process may use one, the ONNX Runtime that is installed is
        the one for GPUs, and the runtime and the precision allow it. Keras chooses its device itself.

    Raises:
        ValueError: If the device is unknown, or the runtime or the precision does not run on a GPU.
    """
    one_of("device", device, DEVICES)
    able = runtime in ("auto", "onnxruntime", "keras") and precision in ("float32", "float16")
    if device == "cuda" and not able:
        raise ValueError(
            "Expected runtime='auto', 'onnxruntime' or 'keras', and float32 or float16, for device='cuda'. "
            f"Received: runtime={runtime!r}, precision={precision!r}"
        )
    usable = able and runtime != "keras" and has_gpu() and has_cuda_provider()
    return "cuda" if device == "cuda" or (device == "auto" and usable) else "cpu"


def has_gpu() -> bool:
    """Returns whether there is an NVIDIA GPU that this process may use, by its device files: on Linux only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    return visible not in ("", "-1") and bool(glob("/dev/nvidia[0-9]*") or glob("/dev/dxg"))


def has_cuda_provider() -> bool:
    """Returns whether the ONNX Runtime that is installed was built for GPUs."""
    if not RUNTIMES["onnxruntime"].installed:
        return False
    import onnxruntime

    return CUDA in onnxruntime.get_available_providers()


def seconds_each(
    runs: Sequence[Callable[[], Any]], rounds: int = 9, least: float = 0.02, most: float = 10
) -> list[float]:
    """Measures functions in turn.

    Other processes only ever add to the time of a call. So the fastest call tells what a function needs.

    Args:
        runs: Sequence of functions without arguments.
        rounds: Integer. Defaults to 9.
        least: Float. Seconds per function and round: it is called until they have passed. Defaults to 0.02.
        most: Float. Seconds after which no further round begins. Defaults to 10.

    Returns:
        List of the seconds of each function's fastest call.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    first = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - first > most:
            break
        for run, seconds in zip(runs, times, strict=True):
            begun = end = time.perf_counter()
            while end - begun < least:
                start = end
                run()
                end = time.perf_counter()
                seconds.append(end - start)
    return [min(seconds) for seconds in times]


@cache
def machine() -> str:
    """Returns what a measurement of speed depends on: the processor, and how many of its cores this process may use."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = dict(line.split(":", 1) for line in lines if line.startswith(("model name", "model\t", "flags")))
        name = " ".join(" ".join(told.values()).split())
    except (OSError, ValueError):
        pass
    return f"{platform.machine()} {name} {cores()}"


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _release(runtime: Runtime) -> str:
    """Returns the version of the package that contains the module. ONNX Runtime for GPUs is another package."""
    with suppress(PackageNotFoundError):
        return version(runtime.package)
    return " ".join(f"{name} {version(name)}" for name in packages_distributions().get(runtime.module, ()))


def measured_on(names: Sequence[str], threads: int) -> str:
    """Returns the key of a cached measurement. It depends on the processor, the releases and the number of threads.

    Args:
        names: Sequence of keys of `RUNTIMES`. The runtimes that were compared.
        threads: Integer. Threads that each used.

    Returns:
        String.
    """
    releases = {name: _release(RUNTIMES[name]) for name in sorted(names)}
    return hashlib.sha256(json.dumps([machine(), releases, threads]).encode()).hexdigest()[:16]

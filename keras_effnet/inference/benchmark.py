"""Measures the speed of models by runtime, precision and batch size, each in a separate process."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.inference import runtimes
from keras_effnet.inference.predictor import Predictor
from keras_effnet.model_loader import resolve


class Worker:
    """A process that opens a `Predictor` and times it on request.

    In one process, the threads of the libraries would slow each other down, and their memory would add up.

    Args:
        *arguments: Arguments of `Predictor`: model, runtime, precision and threads.
    """

    _predictor: Any  # set in the process only

    def __init__(self, *arguments):
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), self._open, arguments)

    @classmethod
    def _open(cls, model, runtime, precision, threads) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        cls._predictor = _predictor(model, runtime, precision, threads)

    @classmethod
    def _seconds(cls, batch_size: int, least: float) -> float:
        shape = (batch_size, *cls._predictor.input_shape)
        images = np.random.default_rng(0).uniform(0, 255, shape).astype("float32")
        cls._predictor(images)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < least:
            cls._predictor(images)
            count += 1
        return (time.perf_counter() - start) / count

    @staticmethod
    def _memory() -> int | None:
        with suppress(OSError, StopIteration):  # Linux only; getrusage() also counts the memory of the parent
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        return None

    def seconds(self, batch_size: int, least: float = 0.2) -> float:
        """Returns the mean seconds per call, over as many calls as fill `least` seconds, after one to warm up."""
        return self._pool.submit(self._seconds, batch_size, least).result()

    def memory(self) -> int | None:
        """Returns the peak memory of the process in bytes, or None where the system does not report it."""
        return self._pool.submit(self._memory).result()

    def stop(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


def _predictor(model, runtime: str, precision: str, threads: int | None) -> Predictor:
    # All runtimes on the same device, but for Keras, which runs where its backend does.
    device = "auto" if runtime == "keras" else "cpu"
    return Predictor(model, runtime, precision, threads, weights=None, device=device)


@contextmanager
def _running(worker: Worker) -> Iterator[Worker]:
    try:
        yield worker
    finally:
        worker.stop()


def benchmark(
    models: Sequence[str],
    names: Sequence[str] | None = None,
    precisions: Sequence[str] = ("float32",),
    batch_sizes: Sequence[int] = (1, 8, 32),
    threads: int | None = None,
    rounds: int = 5,
    on_progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Measures the latency, throughput and memory of models.

    Args:
        models: Sequence of model names (with random weights), or paths of `.keras` files, of runs' folders or of
            exported models.
        names: Sequence of runtimes. Defaults to None: all that are installed; for an exported model, the first that
            opens it.
        precisions: Sequence of precisions, see `Predictor`. Defaults to `("float32",)`.
        batch_sizes: Sequence of integers. Defaults to (1, 8, 32).
        threads: Integer. Processors to use. Defaults to None: all.
        rounds: Integer. Each round measures every combination once, in turn. Defaults to 5.
        on_progress: Function, called with a description, the number of finished steps, and their total.

    Returns:
        List of dicts, one per model, runtime, precision and batch size, with `seconds` per call (`median`, `min`,
        `max`), `images_per_second` and `memory`: the peak of its process in bytes, or None where the system does not
        report it. If a runtime cannot run a model, the dict has `error` instead.

    Raises:
        ValueError: If an argument is not valid.

    Example:

    >>> rows = benchmark(["efficientnet-lite0"], ["onnxruntime"], batch_sizes=[1], rounds=1)
    >>> rows[0]["images_per_second"] > 0
    True
    """
    chosen = names and [name for each in names for name in runtimes.choose(each)]
    threads = threads or runtimes.cores()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers: dict[tuple[str, str, str], Worker] = {}
        asked = [
            (model, name, precision)
            for model in models
            for precision in precisions
            for name in chosen or _usual(model, precision)
        ]
        for place, (model, name, precision) in enumerate(asked):
            on_progress(f"{Path(model).name} for {name}, {precision}", place, len(asked))
            try:
                _predictor(model, name, precision, threads)  # exports the model unless it is cached
            except (ImportError, ValueError) as error:
                rows.append({"model": model, "runtime": name, "precision": precision, "error": str(error)})
                continue
            workers[model, name, precision] = stack.enter_context(_running(Worker(model, name, precision, threads)))
        times: dict[Any, list[float]] = {(key, size): [] for key in workers for size in batch_sizes}
        for done in range(rounds):
            for count, (key, size) in enumerate(times):
                on_progress(" ".join((Path(key[0]).name, *key[1:])), done * len(times) + count, rounds * len(times))
                times[key, size].append(workers[key].seconds(size))
        for (key, size), seconds in times.items():
            median = statistics.median(seconds)
            rows.append(
                dict(zip(("model", "runtime", "precision"), key, strict=True))
                | {
                    "batch_size": size,
                    "threads": threads,
                    "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
                    "images_per_second": size / median,
                    "memory": workers[key].memory(),
                }
            )
    return rows


def _usual(model: str, precision: str) -> list[str]:
    """Returns the runtimes to measure a model on."""
    if precision == "bfloat16":
        return runtimes.IN_BFLOAT16
    found = resolve(model, exports=True)
    return [runtimes.of_file(found.place)] if found.kind == "export" else runtimes.choose("auto")


def plot(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Plots latency and throughput over the batch size.

    Args:
        rows: List of dicts, as returned by `benchmark()`.
        path: Path of an image file, in a format that matplotlib writes.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the file cannot be written.
        ValueError: If matplotlib does not write that format.
    """
    from keras_effnet.plots import figure_class

    lines: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
    for row in rows:
        if "error" not in row:
            key = (Path(row["model"]).name, row["runtime"], row["precision"])
            lines.setdefault(key, []).append(
                (row["batch_size"], row["seconds"]["median"] * 1e3, row["images_per_second"])
            )
    several = [len({key[place] for key in lines}) > 1 for place in range(3)]
    figure = figure_class()(figsize=(10, 4), layout="constrained")
    for axes, place, what in zip(
        figure.subplots(1, 2), (1, 2), ("milliseconds per call", "images per second"), strict=True
    ):
        for key, points in lines.items():
            label = " ".join(part for part, shown in zip(key, several, strict=True) if shown) or key[1]
            axes.plot([point[0] for point in points], [point[place] for point in points], "o-", label=label)
        sizes = sorted({point[0] for points in lines.values() for point in points})
        axes.set(xscale="log", xlabel="batch size", ylabel=what)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(yscale="log")
    figure.axes[1].set(ylim=(0, None))
    figure.axes[1].legend(frameon=False, fontsize=8)
    path = Path(path)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ValueError(f"Expected an image format that matplotlib writes. Received: {str(path)!r}") from error
    return path

"""Runs a model over photos: decodes and predicts on all processors at once, and yields the results in order."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

AHEAD = 8  # finished photos (or batches) per thread that may wait for an earlier one: only their outputs are in memory
AHEAD_WITH_MAPS = 2


class FilePrediction(NamedTuple):
    """What a model predicts for a photo.

    Attributes:
        path: String, the path, without `./` and double slashes.
        outputs: What the model returns for the photo, without the axis of the batch. None if the photo cannot be read.
        error: The exception, or None.
    """

    path: str | os.PathLike
    outputs: Any
    error: Exception | None = None


class FileExplanation(NamedTuple):
    """What a model predicts for a photo, with a map for each class.

    Attributes:
        path: String, the path, without `./` and double slashes.
        outputs: What the model returns for the photo, without the axis of the batch. None if the photo cannot be read.
        error: The exception, or None.
        maps: float32 array (height, width, classes), see `keras_effnet.explain()`.
        pixels: uint8 array (height, width, 3), the photo as the model sees it.
    """

    path: str | os.PathLike
    outputs: Any
    error: Exception | None = None
    maps: Any = None
    pixels: Any = None


def stream(
    paths: Iterable[Any],
    load: Callable[[Any], np.ndarray],
    run: Callable[[np.ndarray], list[np.ndarray]],
    threads: int,
    batch: int = 1,
    ahead: int = AHEAD,
    run_few: Callable[[np.ndarray], list[np.ndarray]] | None = None,
) -> Generator[FilePrediction, None, None]:
    """Yields what a model predicts for each photo, in order. Each thread loads a photo and runs the model on it.

    The next photos are only taken from `paths` as results are taken from the stream, so that memory does not grow with
    their number.

    Args:
        paths: Iterable of paths, or of other references to photos that `load` takes.
        load: Function from a path to pixels. If it raises `OSError`, `ValueError` or `MemoryError`, the photo is
            skipped.
        run: Function from a float32 batch of images to the list of outputs. Several threads call it at once.
        threads: Integer.
        batch: Integer. Photos that a thread loads before it runs the model on them. Defaults to 1.
        ahead: Integer. Finished batches per thread that may wait for an earlier one: their outputs are in memory.
            Defaults to `AHEAD`.
        run_few: Function that replaces `run` if there are fewer photos than threads: it may use all of them itself.
            Defaults to None: `run`.

    Yields:
        `FilePrediction`, with the list of outputs. Its `path` is the item of `paths`.
    """

    rest = iter(paths)
    if run_few:
        head = list(itertools.islice(rest, threads))
        run = run_few if len(head) < threads else run
        rest = itertools.chain(head, rest)

    def work(some: list) -> list[FilePrediction]:
        found: list[Any] = [_tried(load, path) for path in some]
        images = [pixels for pixels in found if not isinstance(pixels, Exception)]
        outputs = run(np.stack(images)) if images else []
        rows = (list(row) for row in zip(*outputs, strict=True))
        return [
            FilePrediction(path, None, one) if isinstance(one, Exception) else FilePrediction(path, next(rows))
            for path, one in zip(some, found, strict=True)
        ]

    waiting: deque[Future] = deque()
    workers = ThreadPoolExecutor(threads, "keras_effnet")
    try:
        while some := list(itertools.islice(rest, batch)):
            waiting.append(workers.submit(work, some))
            while waiting and (len(waiting) > ahead * threads or waiting[0].done()):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:  # also if the caller takes no more
        workers.shutdown(cancel_futures=True)


def _tried(load: Callable[[Any], np.ndarray], path) -> np.ndarray | Exception:
    try:
        return load(path)
    except (OSError, ValueError, MemoryError) as error:
        return error

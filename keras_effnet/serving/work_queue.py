"""A bounded queue of images, and the threads that decode and classify them."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from keras_effnet.images import folders
from keras_effnet.inference.classifier import Classifier
from keras_effnet.serving import formats
from keras_effnet.serving.metrics import Metrics

WINDOW = 0.003  # seconds that the first image of a batch waits for others that are being decoded


class FullError(Exception):
    """The queue has no room for a request."""


@dataclass
class Ticket:
    """A request in the queue.

    Args:
        images: Sequence of files' bytes, or the error that stands for an image.
        top: Integer. Classes per image.
        end: Float. Time of `time.monotonic()` after which nobody waits for the answer.

    Attributes:
        answer: Future of the event loop: a dict per image, with `predictions` or `error`, in order.
        dropped: Boolean, whether nobody waits for the answer any more.
    """

    images: Sequence[bytes | ValueError]  # none any more, once it is forgotten
    top: int
    end: float
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    dropped: bool = False

    def __post_init__(self):
        self._loop = self.answer.get_loop()
        self._lock = threading.Lock()
        self._rows: list[Any] = [{"error": str(one)} if isinstance(one, ValueError) else None for one in self.images]
        self._left = sum(row is None for row in self._rows)
        if self.complete:
            self.answer.set_result(self._rows)

    @property
    def complete(self) -> bool:
        """Whether all images have their results."""
        return not self._left

    @property
    def over(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.dropped or time.monotonic() > self.end

    def drop(self, _: Any = None) -> None:
        """Says that nobody waits for the answer any more."""
        self.dropped = True
        self.answer.cancel()

    def put(self, place: int, row: dict[str, Any]) -> None:
        """Adds the result of an image, from any thread. The last one completes the answer.

        Args:
            place: Integer. The image's place in the request.
            row: Dict with `predictions` or `error`.
        """
        with self._lock:
            self._rows[place] = row
            self._left -= 1
            done = self.complete
        if done:
            self._tell(lambda: self.answer.done() or self.answer.set_result(self._rows))

    def fail(self, error: Exception) -> None:
        """Ends the request with an error that is not the image's, from any thread.

        Args:
            error: The exception.
        """
        self._tell(lambda: self.answer.done() or self.answer.set_exception(error))

    def _tell(self, what: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: at the end of a drain, nobody waits
            self._loop.call_soon_threadsafe(what)


class _Job(NamedTuple):
    ticket: Ticket
    place: int  # of an image, and not of an error


class WorkQueue:
    """A bounded queue of images, and the threads that decode and classify them.

    On a processor, each thread decodes an image and runs the model on it with one core; an image that is alone has all
    cores. On a GPU, images that are ready within a few milliseconds run together.

    Args:
        classifier: `Classifier`.
        size: Integer. Images that may wait.
        max_pixels: Integer. Pixels of an image, at most.
        metrics: `Metrics`.

    Raises:
        ValueError: If the model is not a classifier with one output.
    """

    def __init__(self, classifier: Classifier, size: int, max_pixels: int, metrics: Metrics):
        self._classifier, self._size, self._metrics = classifier, size, metrics
        predictor = classifier.predictor
        self._load = predictor.image_loader(max_pixels=max_pixels)
        self._together = _Together(predictor.on_one_thread, predictor.batch) if predictor.batch > 1 else None
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._busy, self._closed = 0, False
        photo = next(folders.BUNDLED.glob("*.jpg")).read_bytes()
        for run in (predictor, predictor.on_one_thread):  # opens everything before the first request
            classifier.ranked(run(self._load(photo))[0])
        # On a GPU, as many images are decoded as make two batches: one runs meanwhile.
        count = predictor.threads + (2 * predictor.batch if predictor.batch > 1 else 0)
        self._threads = [threading.Thread(target=self._work, name="serve", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self, count: int = 1) -> None:
        """Checks that there is room.

        Args:
            count: Integer. Images. Defaults to 1.

        Raises:
            FullError: If there is none.
        """
        if len(self._waiting) + count > self._size:
            raise FullError

    def add(self, ticket: Ticket) -> None:
        """Adds all images of a request, or none.

        Args:
            ticket: `Ticket`.

        Raises:
            FullError: If there is no room.
        """
        jobs = [_Job(ticket, place) for place, one in enumerate(ticket.images) if not isinstance(one, ValueError)]
        with self._changed:
            self.check(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify(len(jobs))

    def forget(self, ticket: Ticket) -> None:
        """Removes the images of a request that nobody waits for any more, and their bytes.

        Args:
            ticket: `Ticket`.
        """
        ticket.dropped = True
        with self._changed:
            ticket.images = ()
            left = deque(job for job in self._waiting if job.ticket is not ticket)
            self._metrics.images.labels("dropped").inc(len(self._waiting) - len(left))
            self._waiting = left

    def close(self, seconds: float) -> None:
        """Ends the threads once nothing waits.

        Args:
            seconds: Float. How long to wait for them. A thread that still decodes then ends with the process.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                image = job.ticket.images[job.place]  # alone: the request may be forgotten meanwhile
                alone = not self._waiting and not self._busy
                self._busy += 1
            try:
                self._answer(job, image, alone)
            except Exception as error:  # the thread lives on
                self._metrics.images.labels("error").inc()
                job.ticket.fail(error)
            del job, image  # with its bytes
            with self._changed:
                self._busy -= 1

    def _answer(self, job: _Job, image: Any, alone: bool) -> None:
        ticket, place = job
        if ticket.over:
            self._metrics.images.labels("dropped").inc()
            return
        begun = time.perf_counter()
        try:
            formats.check(image)
            pixels = self._load(image)
        except (OSError, ValueError, MemoryError) as error:
            self._metrics.images.labels("error").inc()
            ticket.put(place, {"error": str(error) or type(error).__name__})
            return
        decoded = time.perf_counter()
        self._metrics.decode.observe(decoded - begun)
        outputs = self._run(pixels, alone)
        self._metrics.predict.observe(time.perf_counter() - decoded)
        ticket.put(place, {"predictions": self._classifier.ranked(outputs, ticket.top)})
        self._metrics.images.labels("ok").inc()

    def _run(self, pixels: np.ndarray, alone: bool) -> np.ndarray:
        if self._together:
            return self._together(pixels, lambda: self._busy > 1)
        predictor = self._classifier.predictor
        return (predictor(pixels) if alone else predictor.on_one_thread(pixels))[0]


class _Together:
    """Runs the images of several threads as one batch: one of the threads for all that are ready.

    Args:
        run: Function from a batch of images to a row for each.
        most: Integer. Images of a batch.
    """

    def __init__(self, run: Callable[[np.ndarray], Any], most: int):
        self._run, self._most = run, most
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._ready: deque[_Ready] = deque()

    def __call__(self, pixels: np.ndarray, others: Callable[[], bool]) -> np.ndarray:
        own = _Ready(pixels)
        with self._lock:
            self._ready.append(own)
        with self._turn:
            while not own.done:  # the lock is not fair: a full batch may be ready before this image
                if len(self._ready) < self._most and others():
                    time.sleep(WINDOW)
                self._run_ready()
        if own.error:
            raise own.error
        return own.outputs

    def _run_ready(self) -> None:
        with self._lock:
            batch = [self._ready.popleft() for _ in range(min(self._most, len(self._ready)))]
        try:
            rows = self._run(np.stack([each.pixels for each in batch]))
        except Exception as error:
            for each in batch:
                each.done, each.error = True, error
            return
        for each, row in zip(batch, rows, strict=True):
            each.done, each.outputs = True, row


@dataclass(eq=False)
class _Ready:
    pixels: np.ndarray
    done: bool = False
    outputs: Any = None
    error: Exception | None = None

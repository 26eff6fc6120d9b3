"""Checkpoints: when they are written, which ones are kept, and which one a run resumes from."""

import errno
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

# Raised when a damaged checkpoint is read. The reader of the index raises plain OpError, and IndexError for a file that
# is too short. Other errors mean that the storage does not answer; they say nothing about the checkpoint.
_DAMAGE = (tf.errors.DataLossError, tf.errors.OutOfRangeError, tf.errors.NotFoundError, tf.errors.InvalidArgumentError)

_LONG = 100  # characters of an error of TensorFlow or orbax in ours

# The file that is written last, by TensorFlow and beside the folders of orbax. Without it there is no checkpoint.
_LAST = (r"ckpt-(\d+)\.index", r"ckpt-(\d+)\.crc32c\.json")


def steps(folder: str) -> list[int]:
    """Lists the steps that have a checkpoint.

    Args:
        folder: String, path of the folder of checkpoints, which need not exist.

    Returns:
        Sorted list of integers.
    """
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    return sorted(int(found[1]) for last in _LAST for name in names if (found := re.fullmatch(last, name)))


class Format(Protocol):
    """How a checkpoint is stored: as files and folders whose names begin with `ckpt-` and the step."""

    def write(self, path: str) -> None:
        """Writes a checkpoint.

        Args:
            path: String, prefix of its files and folders.
        """

    def read(self, path: str) -> str | None:
        """Restores the values of a checkpoint.

        Args:
            path: String, prefix of its files and folders.

        Returns:
            String that says how the checkpoint is damaged, or None if it is not.

        Raises:
            ValueError: If the checkpoint is of another model.
        """


class Bundles:
    """TensorFlow's checkpoints. They have checksums of every tensor and of the index, which is written last.

    Args:
        checkpoint: `tf.train.Checkpoint`.
    """

    def __init__(self, checkpoint: tf.train.Checkpoint):
        self._checkpoint = checkpoint

    def write(self, path: str) -> None:
        """See `Format`."""
        self._checkpoint.write(path)

    def read(self, path: str) -> str | None:
        """See `Format`."""
        try:
            self._checkpoint.read(path).assert_existing_objects_matched()
        except (tf.errors.OpError, IndexError) as error:
            for file in {f"{path}.index", *_parts(path)}:  # raises if the storage does not answer
                with tf.io.gfile.GFile(file, "rb") as opened:
                    while opened.read(64 << 20):
                        pass
            if not isinstance(error, (*_DAMAGE, IndexError)) and type(error) is not tf.errors.OpError:
                raise
            return " ".join(str(error).split())
        except (AssertionError, ValueError) as error:
            raise other_model(path, error) from error
        return None


def other_model(path: str, told: object) -> ValueError:
    """Returns the error for a checkpoint of another model.

    Args:
        path: String, prefix of the checkpoint.
        told: The first difference, as an error or a string.

    Returns:
        A `ValueError` for the caller to raise.
    """
    found = " ".join(str(told).split())[: 2 * _LONG]
    return ValueError(f"Expected the variables of this model in {path!r}. Received: {found}")


def _parts(path: str) -> list[str]:
    # First the file that was written last: without it the rest is no checkpoint.
    found = tf.io.gfile.glob([f"{path}.*", path])
    return sorted(found, key=lambda part: not part.endswith((".index", ".json")))


def _remove(path: str) -> None:
    if tf.io.gfile.isdir(path):
        tf.io.gfile.rmtree(path)
    else:
        tf.io.gfile.remove(path)


class Checkpoints:
    """Writes and restores the checkpoints of a folder, and keeps the newest and the best.

    Args:
        folder: String, path of the folder.
        form: `Format`.
        step: `tf.Variable`, the number of steps done, which is part of the checkpoint.
        keep: Integer, number of newest checkpoints to keep.
        every: Integer, steps between two checkpoints.
        minutes: Float, minutes after which a checkpoint is due in any case, or None.
        writes: Boolean, whether this process writes. Defaults to True.
    """

    def __init__(
        self,
        folder: str,
        form: Format,
        step: tf.Variable,
        keep: int,
        every: int,
        minutes: float | None,
        writes: bool = True,
    ):
        self.folder, self.keep, self.every, self.minutes, self.writes = folder, keep, every, minutes, writes
        self._form, self._step = form, step
        self._last, self._when = 0, time.monotonic()

    def steps(self) -> list[int]:
        """Lists the steps that have a checkpoint, in order."""
        return steps(self.folder)

    def path(self, step: int) -> str:
        """Returns the prefix of the checkpoint of a step."""
        return f"{self.folder}/ckpt-{step}"

    def restore(self, tell: Callable[[str], Any]) -> int:
        """Restores the newest readable checkpoint, and sets damaged newer ones aside.

        Args:
            tell: Function that is called with each message, a string.

        Returns:
            Integer, the step of the checkpoint, 0 if there is none.

        Raises:
            ValueError: If all checkpoints are damaged, or one is of another model.
        """
        self._clean()
        found, damaged = self.steps()[::-1], {}
        for step in found:
            problem = self._form.read(self.path(step))
            if problem:
                damaged[step] = problem
                continue
            for other, problem in damaged.items():
                tell(f"The checkpoint of step {other} cannot be read and is set aside: {problem}")
                if self.writes:
                    self._set_aside(other)
            tell(f"restored from checkpoint: {self.path(step)}")
            self._last, self._when = step, time.monotonic()
            return step
        if found:
            raise ValueError(
                f"Expected a readable checkpoint in {self.folder!r}. Received: those of steps "
                f"{', '.join(map(str, found))}, all damaged. To start over, use another folder. "
                f"{damaged[found[0]][:_LONG]}"
            )
        return 0

    def take(self, step: int) -> bool:
        """Restores the checkpoint of a step, if it exists and is readable.

        Args:
            step: Integer.

        Returns:
            Boolean, whether it was restored.
        """
        return step in self.steps() and self._form.read(self.path(step)) is None

    def due(self) -> bool:
        """Returns whether it is time for a checkpoint."""
        late = self.minutes is not None and time.monotonic() - self._when >= 60 * self.minutes
        # These steps do not depend on whether another checkpoint was written in between.
        return late or int(self._step.numpy()) // self.every > self._last // self.every

    def save(self, best: int | None = None) -> None:
        """Writes a checkpoint of the current step, unless it exists, and deletes old ones.

        Args:
            best: Integer, step of the best checkpoint, which is kept. Defaults to None.

        Raises:
            OSError: If the disk is full. Earlier checkpoints are intact.
        """
        step = int(self._step.numpy())
        if self.writes and step not in self.steps():
            try:
                self._form.write(self.path(step))
            except Exception as error:  # TensorFlow and orbax raise different classes
                self._clean()
                if plain := full(error, self.folder):
                    raise plain from error
                raise
        self._last, self._when = step, time.monotonic()
        if self.writes:
            found = self.steps()
            for old in found[: -self.keep]:
                if old != best:
                    self._delete(old)

    def _delete(self, step: int) -> None:
        for path in _parts(self.path(step)):
            _remove(path)

    def _set_aside(self, step: int) -> None:
        for path in _parts(self.path(step)):
            folder, _, name = path.rpartition("/")
            aside = f"{folder}/damaged-{name}"
            if tf.io.gfile.isdir(aside):
                tf.io.gfile.rmtree(aside)
            tf.io.gfile.rename(path, aside, overwrite=True)

    def _clean(self) -> None:
        """Removes checkpoints that a killed process left incomplete."""
        if not (self.writes and tf.io.gfile.isdir(self.folder)):
            return
        whole = self.steps()
        for name in tf.io.gfile.listdir(self.folder):
            name = name.rstrip("/")
            found = re.match(r"ckpt-(\d+)", name)
            if found and (int(found[1]) not in whole or re.search("temp|tmp", name)):
                _remove(f"{self.folder}/{name}")


def full(error: Exception, folder: str) -> OSError | None:
    """Translates an error into a plain one if it means that the disk is full.

    Args:
        error: Exception.
        folder: String, path of the folder that was written to.

    Returns:
        An `OSError` for the caller to raise, or None.
    """
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    if not isinstance(error, OSError) and not any(sign in str(error) for sign in ("No space left", "quota exceeded")):
        return None
    return OSError(
        f"Expected free space on the disk of {folder!r} or for temporary files. Received: no space left. Free some and "
        f"run the same command again to resume: what was saved is intact. {' '.join(str(error).split())[:_LONG]}"
    )

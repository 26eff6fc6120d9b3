"""Checkpoints: which are written and kept, and which one a run goes on from."""

import errno
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

# What reading a damaged one raises; the index' reader has no class of its own, and a file that is too short is an
# IndexError. Other errors say that a storage does not answer, and nothing about what lies in it.
_DAMAGE = (tf.errors.DataLossError, tf.errors.OutOfRangeError, tf.errors.NotFoundError, tf.errors.InvalidArgumentError)

# What is written last, of TensorFlow's checkpoints and of orbax' folders: without it there is none.
_LAST = (r"ckpt-(\d+)\.index", r"ckpt-(\d+)\.crc32c\.json")


def steps(folder: str) -> list[int]:
    """The steps of which there is a checkpoint, in order.

    Args:
        folder: String, path of the checkpoints' folder, which need not exist.

    Returns:
        List of integers.
    """
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    return sorted(int(found[1]) for last in _LAST for name in names if (found := re.fullmatch(last, name)))


class Format(Protocol):
    """How one checkpoint lies in a folder: files and folders whose names begin with `ckpt-` and the step."""

    def write(self, path: str) -> None:
        """Writes one.

        Args:
            path: String, what its names begin with.
        """

    def read(self, path: str) -> str | None:
        """Takes the values of one.

        Args:
            path: String, what its names begin with.

        Returns:
            String, how it is damaged; or None.

        Raises:
            ValueError: If it is one of another model.
        """


class Bundles:
    """TensorFlow's own checkpoints. It keeps a sum of every tensor and of the index, and writes the index last.

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
            for file in {f"{path}.index", *_parts(path)}:  # all bytes can be had: or that is the error
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
    """The error that a checkpoint is one of another model.

    Args:
        path: String.
        told: What shows it.

    Returns:
        ValueError.
    """
    return ValueError(f"Expected the variables of this model in {path!r}. Received: {' '.join(str(told).split())}")


def _parts(path: str) -> list[str]:
    # What was written last comes first: without it the rest is no checkpoint.
    found = tf.io.gfile.glob([f"{path}.*", path])
    return sorted(found, key=lambda part: not part.endswith((".index", ".json")))


def _remove(path: str) -> None:
    if tf.io.gfile.isdir(path):
        tf.io.gfile.rmtree(path)
    else:
        tf.io.gfile.remove(path)


class Checkpoints:
    """The checkpoints of a folder: the newest ones and the best.

    Args:
        folder: String, path of a folder.
        form: `Format`.
        step: `tf.Variable`, the number of steps done, which is part of the checkpoint.
        keep: Integer, newest ones that are kept.
        every: Integer, steps between two.
        minutes: Float, after which one is written too, or None.
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
        """The steps of which there is one, in order."""
        return steps(self.folder)

    def path(self, step: int) -> str:
        """Where that of a step lies."""
        return f"{self.folder}/ckpt-{step}"

    def restore(self, tell: Callable[[str], Any]) -> int:
        """Takes the newest one that can be read. Those that cannot are set aside.

        Args:
            tell: Function that is called with what there is to say.

        Returns:
            Integer, its step; 0 where there is none.

        Raises:
            ValueError: If there are some and none can be read, or one is of another model.
        """
        self._clean()
        found, damaged = self.steps()[::-1], {}
        for step in found:
            problem = self._form.read(self.path(step))
            if problem:
                damaged[step] = problem
                continue
            for other, told in damaged.items():
                tell(f"The checkpoint of step {other} cannot be read and is set aside: {told}")
                if self.writes:
                    self._set_aside(other)
            tell(f"restored from checkpoint: {self.path(step)}")
            self._last, self._when = step, time.monotonic()
            return step
        if found:
            raise ValueError(
                f"Expected a checkpoint that can be read in {self.folder!r}. Received: those of steps "
                f"{', '.join(map(str, found))}, all damaged. To start anew, use another folder. {damaged[found[0]]}"
            )
        return 0

    def take(self, step: int) -> bool:
        """Takes the values of one, if it can be read.

        Args:
            step: Integer.

        Returns:
            Boolean, whether it could be.
        """
        return step in self.steps() and self._form.read(self.path(step)) is None

    def due(self) -> bool:
        """Whether it is time to write one."""
        late = self.minutes is not None and time.monotonic() - self._when >= 60 * self.minutes
        # The same steps whether or not one in between was written.
        return late or int(self._step.numpy()) // self.every > self._last // self.every

    def save(self, best: int | None = None) -> None:
        """Writes one of now, unless there is one, and deletes what need not be kept.

        Args:
            best: Integer, step of the best one, which is kept. Defaults to None.

        Raises:
            OSError: If there is no room. What was saved before is as it was.
        """
        step = int(self._step.numpy())
        if self.writes and step not in self.steps():
            try:
                self._form.write(self.path(step))
            except Exception as error:  # each library has its own
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
        """Removes what a process that was killed left half written."""
        if not (self.writes and tf.io.gfile.isdir(self.folder)):
            return
        whole = self.steps()
        for name in tf.io.gfile.listdir(self.folder):
            name = name.rstrip("/")
            found = re.match(r"ckpt-(\d+)", name)
            if found and (int(found[1]) not in whole or re.search("temp|tmp", name)):
                _remove(f"{self.folder}/{name}")


def full(error: Exception, folder: str) -> OSError | None:
    """An error in plain words, if it is that of a disk without room.

    Args:
        error: Exception.
        folder: String, path of what was written to.

    Returns:
        OSError, or None.
    """
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    if not isinstance(error, OSError) and not any(told in str(error) for told in ("No space left", "quota exceeded")):
        return None
    return OSError(
        f"Expected room on the disk of {folder!r}, or for temporary files. Received: no space left. What was saved "
        f"before is whole: make room, and the same command goes on. {' '.join(str(error).split())[:200]}"
    )

"""Checkpoints: which are written and kept, and which one a run goes on from."""

import errno
import re
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

# What reading a damaged one raises; the index' reader has no class of its own, and a file that is too short is an
# IndexError. Other errors say that a storage does not answer, and nothing about what lies in it.
_DAMAGE = (tf.errors.DataLossError, tf.errors.OutOfRangeError, tf.errors.NotFoundError, tf.errors.InvalidArgumentError)


def steps(folder: str) -> list[int]:
    """The steps of which there is a checkpoint, in order.

    Args:
        folder: String, path of the checkpoints' folder, which need not exist.

    Returns:
        List of integers.
    """
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"ckpt-(\d+)\.index", name)))


class Checkpoints:
    """The checkpoints of a folder: the newest ones and the best.

    TensorFlow keeps a sum of every tensor and of the index, and writes the index last: one that is damaged or half
    written cannot be read.

    Args:
        folder: String, path of a folder.
        checkpoint: `tf.train.Checkpoint`.
        step: `tf.Variable`, the number of steps done, which is part of the checkpoint.
        keep: Integer, newest ones that are kept.
        every: Integer, steps between two.
        minutes: Float, after which one is written too, or None.
        writes: Boolean, whether this process writes. Defaults to True.
    """

    def __init__(
        self,
        folder: str,
        checkpoint: tf.train.Checkpoint,
        step: tf.Variable,
        keep: int,
        every: int,
        minutes: float | None,
        writes: bool = True,
    ):
        self.folder, self.keep, self.every, self.minutes, self.writes = folder, keep, every, minutes, writes
        self._checkpoint, self._step = checkpoint, step
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
            problem = self._read(step)
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

    def _read(self, step: int) -> str | None:
        """Takes the values of one, or tells how it is damaged."""
        try:
            self._checkpoint.read(self.path(step)).assert_existing_objects_matched()
        except (tf.errors.OpError, IndexError) as error:
            for path in {f"{self.path(step)}.index", *self._files(step)}:  # all bytes can be had: or that is the error
                with tf.io.gfile.GFile(path, "rb") as file:
                    while file.read(64 << 20):
                        pass
            if not isinstance(error, (*_DAMAGE, IndexError)) and type(error) is not tf.errors.OpError:
                raise
            return " ".join(str(error).split())
        except (AssertionError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"Expected the variables of this model in {self.path(step)!r}. Received: {told}"
            ) from error
        return None

    def take(self, step: int) -> bool:
        """Takes the values of one, if it can be read.

        Args:
            step: Integer.

        Returns:
            Boolean, whether it could be.
        """
        return step in self.steps() and self._read(step) is None

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
                self._checkpoint.write(self.path(step))
            except tf.errors.OpError as error:
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

    def _files(self, step: int) -> list[str]:
        # The index first: without it the rest is no checkpoint.
        return sorted(tf.io.gfile.glob(f"{self.path(step)}.*"), key=lambda path: not path.endswith(".index"))

    def _delete(self, step: int) -> None:
        for path in self._files(step):
            tf.io.gfile.remove(path)

    def _set_aside(self, step: int) -> None:
        for path in self._files(step):
            folder, _, name = path.rpartition("/")
            tf.io.gfile.rename(path, f"{folder}/damaged-{name}", overwrite=True)

    def _clean(self) -> None:
        """Removes what a process that was killed left half written."""
        if not (self.writes and tf.io.gfile.isdir(self.folder)):
            return
        whole = self.steps()
        for name in tf.io.gfile.listdir(self.folder):
            name = name.rstrip("/")
            path, found = f"{self.folder}/{name}", re.match(r"ckpt-(\d+)", name)
            if found and tf.io.gfile.isdir(path):
                tf.io.gfile.rmtree(path)
            elif found and (int(found[1]) not in whole or "tempstate" in name):
                tf.io.gfile.remove(path)


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

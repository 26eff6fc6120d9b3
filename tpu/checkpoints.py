"""Checkpoints: which are written and kept, and which one a run goes on from."""

import errno
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_effnet.tpu.stops import NonFiniteError

# A storage that does not answer says nothing about what lies in it.
_AWAY = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnauthenticatedError,
    tf.errors.CancelledError,
)


class Checkpoints:
    """The checkpoints of a folder: the newest ones and the best.

    TensorFlow keeps a sum of every tensor and of the index, and writes the index last: one that is damaged or half
    written cannot be read.

    Args:
        folder: String, path of a folder.
        checkpoint: `tf.train.Checkpoint`.
        step: `tf.Variable`, the number of steps done, which is part of the checkpoint.
        values: Sequence of `tf.Variable`, those that must be finite.
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
        values: Sequence[Any],
        keep: int,
        every: int,
        minutes: float | None,
        writes: bool = True,
    ):
        self.folder, self.keep, self.every, self.minutes, self.writes = folder, keep, every, minutes, writes
        self._checkpoint, self._step, self._values = checkpoint, step, values
        self._last, self._when = 0, time.monotonic()

        @tf.function
        def finite(tensors):
            return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])

        self._finite: Any = finite

    def steps(self) -> list[int]:
        """The steps of which there is one, in order."""
        names = tf.io.gfile.listdir(self.folder) if tf.io.gfile.isdir(self.folder) else []
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"ckpt-(\d+)\.index", name)))

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
        found = self.steps()[::-1]
        for step in found:
            try:
                self._read(step)
            except _AWAY:
                raise
            except (tf.errors.OpError, IndexError) as error:  # IndexError: TensorFlow's, of a file that is too short
                tell(f"The checkpoint of step {step} cannot be read and is set aside: {' '.join(str(error).split())}")
                if self.writes:
                    self._set_aside(step)
                continue
            tell(f"restored from checkpoint: {self.path(step)}")
            self._last, self._when = step, time.monotonic()
            return step
        if found:
            raise ValueError(
                f"Expected a checkpoint that can be read in {self.folder!r}. Received: those of steps "
                f"{', '.join(map(str, found))}, all damaged. To start anew, use another folder"
            )
        return 0

    def _read(self, step: int) -> None:
        try:
            self._checkpoint.read(self.path(step)).assert_existing_objects_matched()
        except (AssertionError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"Expected the variables of this model in {self.path(step)!r}. Received: {told}"
            ) from error

    def take(self, step: int) -> bool:
        """Takes the values of one, if it can be read.

        Args:
            step: Integer.

        Returns:
            Boolean, whether it could be.
        """
        try:
            self._read(step)
        except (tf.errors.OpError, IndexError):
            return False
        return True

    def due(self) -> bool:
        """Whether it is time to write one."""
        late = self.minutes is not None and time.monotonic() - self._when >= 60 * self.minutes
        return late or int(self._step.numpy()) - self._last >= self.every

    def save(self, best: int | None = None) -> None:
        """Writes one of now, unless there is one, and deletes what need not be kept.

        Args:
            best: Integer, step of the best one, which is kept. Defaults to None.

        Raises:
            NonFiniteError: If a variable is not finite. Nothing is written then.
            OSError: If there is no room. What was saved before is as it was.
        """
        step = int(self._step.numpy())
        if self.writes and step not in self.steps():
            if not self._finite([tf.convert_to_tensor(value) for value in self._values]):
                raise NonFiniteError(step, "variables that are not finite")
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
        f"Expected room on the disk of {folder!r}. Received: no space left. What was saved before is whole: make room, "
        "and the same command goes on"
    )

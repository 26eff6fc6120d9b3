"""The examples that a host could not read: counted, named, and kept for a resumed run."""

import json
import logging
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_effnet.tpu.resume import cloud_files


class Skipped:
    """What one host could not read, kept in a file: where a run goes on follows from it.

    Args:
        path: Path of a file of JSON lines. None: only in memory.
        per_epoch: Integer, examples of an epoch on this host.
        most: Float, share of an epoch's examples from which on the run stops. Defaults to 1.

    Example:

    >>> from keras_effnet.tpu.input.skipped import Skipped
    >>> skipped = Skipped(None, per_epoch=100)
    >>> _ = skipped(3, 1, [b"cat/broken.jpg"])
    >>> skipped.position(10), skipped.names
    (11, ['cat/broken.jpg'])
    """

    def __init__(self, path: str | None, per_epoch: int, most: float = 1.0):
        self.path, self.per_epoch, self.most = path, per_epoch, most
        self.problem: str | None = None
        self.probe: Callable[[str], None] | None = None
        self._found: dict[int, str] = {}
        if path and tf.io.gfile.exists(path):
            self._found = {row["ordinal"]: row["name"] for row in cloud_files.rows(path)}
            cloud_files.write(path, self._lines(self._found))  # without a last line that is half written

    def __call__(self, first, count, names) -> np.int64:
        """Takes note of examples, from number `first` on, with the names of the last of them."""
        if self.problem:  # the run stops; what is read ahead is no longer looked at
            raise ValueError(self.problem)
        first, count = int(first), int(count)
        told = [name.decode() for name in names][-count:]
        told = ["?"] * (count - len(told)) + told
        new = {first + place: name for place, name in enumerate(told) if first + place not in self._found}
        self._try(new.values())
        self._found |= new
        for name in new.values():
            logging.getLogger("keras_effnet").warning("Skipped an image that cannot be read: %s", name)
        if self.path and new:
            with tf.io.gfile.GFile(self.path, "a") as file:
                file.write(self._lines(new))
        epoch = first // self.per_epoch
        bad = sum(number // self.per_epoch == epoch for number in self._found)
        if bad > self.most * self.per_epoch:
            self.problem = (
                f"Expected at most {self.most:.1%} of the images to be unreadable (data.max_corrupt). Received: {bad} "
                f"of {self.per_epoch}, such as {', '.join(self.names[-3:])}"
            )
            raise ValueError(self.problem)
        return np.int64(0)

    def _try(self, names) -> None:
        """A storage that does not answer is no photograph's fault."""
        for name in names:
            try:
                if self.probe and name != "?":
                    self.probe(name)
            except tf.errors.OpError as error:
                self.problem = f"Expected to read {name}. Received: {error.message}"
                raise ValueError(self.problem) from error

    @staticmethod
    def _lines(found: dict[int, str]) -> str:
        return "".join(json.dumps({"ordinal": number, "name": name}) + "\n" for number, name in found.items())

    def forget(self) -> None:
        """Begins anew, for another look at the same examples."""
        self._found.clear()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._found

    @property
    def names(self) -> list[str]:
        """The names of what was skipped, each once."""
        return list(dict.fromkeys(self._found.values()))

    def position(self, examples: int) -> int:
        """The number of the next example, after so many that could be read."""
        for number in sorted(self._found):
            examples += number <= examples
        return examples

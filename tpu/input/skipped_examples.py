"""Counts and names the examples that a host could not read, and stores them for a resumed run."""

import json
import logging
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_effnet.tpu.resume import cloud_files


class Skipped:
    """The examples that one host could not read. A resumed run needs them to find its position.

    Args:
        path: Path of a file of JSON lines, or None to keep them in memory only.
        per_epoch: Integer, examples per epoch on this host.
        most: Float, largest share of an epoch's examples that may be unreadable, but not all. Defaults to 1.

    Example:

    >>> from keras_effnet.tpu.input.skipped_examples import Skipped
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
        self._named: set[str] = set()  # each photo is named once, not once an epoch
        if path and tf.io.gfile.exists(path):
            self._found = {row["ordinal"]: row["name"] for row in cloud_files.rows(path)}
            self._named |= set(self._found.values())
            cloud_files.write(path, self._lines(self._found))  # drops a half-written last line

    def __call__(self, first, count, names) -> np.int64:
        """Records `count` unreadable examples from number `first` on. `names` holds the names of the last of them."""
        if self.problem:  # the run is stopping: ignore what was read ahead
            raise ValueError(self.problem)
        first, count = int(first), int(count)
        known = [name.decode() for name in names][-count:]
        every = ["?"] * (count - len(known)) + known
        new = {first + place: name for place, name in enumerate(every) if first + place not in self._found}
        self._try(new.values())
        self._store(new)
        self._found |= new
        for name in new.values():
            if name not in self._named or name == "?":
                logging.getLogger("keras_effnet").warning("Skipped unreadable image: %s", name)
        self._named |= set(new.values())
        epoch = first // self.per_epoch
        bad = sum(number // self.per_epoch == epoch for number in self._found)
        if bad > self.most * self.per_epoch or bad >= self.per_epoch:
            most = f"Expected at most {self.most:.1%} of the images to be unreadable (data.max_corrupt)"
            expected = most if bad < self.per_epoch else "Expected at least one image that can be read"
            self.problem = (
                f"{expected}. Received: {bad} of {self.per_epoch} unreadable, such as {', '.join(self.names[-3:])}"
            )
            raise ValueError(self.problem)
        return np.int64(0)

    def _try(self, names) -> None:
        """Stops the run if the storage does not answer: then no image is at fault."""
        for name in names:
            try:
                if self.probe and name != "?":
                    self.probe(name)
            except tf.errors.OpError as error:
                self.problem = f"Expected to read {name}. Received: {error.message}"
                raise ValueError(self.problem) from error

    def _store(self, new: dict[int, str]) -> None:
        """Stops the run if the file cannot be written: the examples that follow would count as unreadable."""
        if not self.path or not new:
            return
        try:
            with tf.io.gfile.GFile(self.path, "a") as file:
                file.write(self._lines(new))
        except tf.errors.OpError as error:
            self.problem = f"Expected to write {self.path}. Received: {error.message}"
            raise ValueError(self.problem) from error

    @staticmethod
    def _lines(found: dict[int, str]) -> str:
        return "".join(json.dumps({"ordinal": number, "name": name}) + "\n" for number, name in found.items())

    def forget(self) -> None:
        """Clears the record, to read the same examples again."""
        self._found.clear()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._found

    @property
    def names(self) -> list[str]:
        """The names of the skipped examples, each once."""
        return list(dict.fromkeys(self._found.values()))

    def position(self, examples: int) -> int:
        """Returns the number of the next example after `examples` readable ones."""
        for number in sorted(self._found):
            examples += number <= examples
        return examples

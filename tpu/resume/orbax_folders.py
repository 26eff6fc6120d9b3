"""Checkpoints as folders that orbax writes, each beside a file with the checksums of its files."""

import json
import os
from collections.abc import Callable
from typing import Any

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorflow as tf

from keras_effnet.tpu.resume import cloud_files
from keras_effnet.tpu.resume.checkpoints import other_model


def _orbax() -> ocp.Checkpointer:
    # Each process on its own: with data parallelism every process has all values, and only one writes.
    me = jax.process_index() if jax.distributed.is_initialized() else 0
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"keras-effnet-{me}")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


class Folders:
    """Stores a nested dict of arrays in a folder, and detects every damaged bit.

    Args:
        take: Function without arguments that returns the dict to write.
        give: Function that is called with the dict that was read.
        upgrade: Function from a dict that this or an earlier version has written to one of this version. Defaults to
            returning it unchanged.
    """

    def __init__(
        self,
        take: Callable[[], dict[str, Any]],
        give: Callable[[dict[str, Any]], Any],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found,
    ):
        self._take, self._give, self._upgrade = take, give, upgrade

    def write(self, path: str) -> None:
        """See `Format`."""
        with _orbax() as checkpointer:
            checkpointer.save(_whole(path), self._take(), force=True)
        # Last: without it there is no checkpoint.
        cloud_files.write(
            _sums(path), json.dumps({name: _sum(f"{path}/{name}") for name in _names(path)}, indent=1) + "\n"
        )

    def read(self, path: str) -> str | None:
        """See `Format`."""
        problem = damage(path)
        if problem:
            return problem
        found, mine = self._upgrade(read(path)), self._take()
        if (received := _shapes(found)) != (expected := _shapes(mine)):
            names = sorted(received.keys() ^ expected.keys())
            names = names or [name for name in received if received[name] != expected[name]]
            raise other_model(path, f"{names[0]} {received.get(names[0])}, not {expected.get(names[0])}")
        self._give(found)
        return None


def read(path: str) -> dict[str, Any]:
    """Reads the arrays of a checkpoint, without checking it.

    Args:
        path: String, path of the folder.

    Returns:
        Nested dict of arrays.
    """
    with _orbax() as checkpointer:
        return checkpointer.restore(_whole(path))


def damage(path: str) -> str | None:
    """Compares the files of a checkpoint with their checksums.

    Args:
        path: String, path of the folder.

    Returns:
        String that names the first damaged file, or None if there is none.
    """
    try:
        sums = json.loads(tf.io.gfile.GFile(_sums(path)).read())
        names = sums.keys()
    except (ValueError, UnicodeDecodeError, AttributeError) as error:
        return f"Its checksums cannot be read: {error}"
    existing = _names(path) if tf.io.gfile.isdir(path) else []
    if missing := sorted(names - set(existing)):
        return f"{missing[0]} is missing"
    wrong = [name for name in names if _sum(f"{path}/{name}") != sums[name]]
    return f"{wrong[0]} is damaged" if wrong else None


def _whole(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _sums(path: str) -> str:
    return f"{path}.crc32c.json"


def _names(path: str) -> list[str]:
    # Cloud Storage lists folders with a slash at the end.
    found = (f"{folder.rstrip('/')}/{name}" for folder, _, names in tf.io.gfile.walk(path) for name in names)
    return sorted(name.removeprefix(path).lstrip("/") for name in found)


def _sum(path: str) -> int:
    total = google_crc32c.Checksum()
    with tf.io.gfile.GFile(path, "rb") as file:
        while piece := file.read(64 << 20):
            total.update(piece)
    return int(total.hexdigest(), 16)


def _shapes(tree: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        found |= _shapes(value, path) if isinstance(value, dict) else {path: np.shape(value)}
    return found

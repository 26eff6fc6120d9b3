"""Writes files atomically, on a disk or on Cloud Storage."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def write(path: str, text: str) -> None:
    """Writes a text file. Readers see the old file or the new one, never a part.

    Args:
        path: String, path of the file.
        text: String.

    Raises:
        tf.errors.OpError: If the file cannot be written. The old file is then unchanged.
    """
    with _new(path) as new, tf.io.gfile.GFile(new, "w") as file:
        file.write(text)


@contextlib.contextmanager
def _new(path: str):
    """Yields the path of a temporary file that then replaces `path`, or is removed after an error."""
    new = f"{path}.new"
    try:
        yield new
        tf.io.gfile.rename(new, path, overwrite=True)
    except BaseException:
        if tf.io.gfile.exists(new):
            tf.io.gfile.remove(new)
        raise


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yields a path on this machine for a new file that then replaces `path`.

    Args:
        path: String, path of a file, which may be on Cloud Storage.

    Returns:
        Context manager whose value is a path with the same file name.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.join(folder, os.path.basename(path))
        yield here
        with _new(path) as new:
            tf.io.gfile.copy(here, new, overwrite=True)


def rows(path: str) -> list[dict[str, Any]]:
    """Reads the objects of a JSON Lines file. Skips lines that a killed process left incomplete.

    Args:
        path: String, path of the file, which need not exist.

    Returns:
        List of dicts.
    """
    if not tf.io.gfile.exists(path):
        return []
    found = []
    for line in tf.io.gfile.GFile(path).read().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found

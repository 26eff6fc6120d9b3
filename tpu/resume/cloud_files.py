"""Writes files that are whole or not there, also on Cloud Storage."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def write(path: str, text: str) -> None:
    """Writes a text file: whoever looks sees the old one or the new one.

    Args:
        path: String, path of the file.
        text: String.

    Raises:
        tf.errors.OpError: If it cannot be written. The old one is then as it was.
    """
    with _new(path) as new, tf.io.gfile.GFile(new, "w") as file:
        file.write(text)


@contextlib.contextmanager
def _new(path: str):
    """The path of what then takes the place of a file, or goes."""
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
    """A path on this machine to write a file to, which then takes the place of `path`.

    Args:
        path: String, path of a file, which may be on Cloud Storage.

    Returns:
        Context manager that gives a path of the same ending.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.join(folder, os.path.basename(path))
        yield here
        with _new(path) as new:
            tf.io.gfile.copy(here, new, overwrite=True)


def rows(path: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. What a process that was killed wrote half of is left away.

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

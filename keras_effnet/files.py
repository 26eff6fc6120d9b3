"""Writes files completely or not at all."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".keras_effnet-"


@contextmanager
def naming(path) -> Iterator[None]:
    """Adds the path to an `OSError` that names no file, such as for a full disk.

    Args:
        path: Path of the file, for the message.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def writing(path) -> Iterator[None]:
    """Converts a library's own exception, such as for a full disk, into an `OSError`, and names the file.

    Args:
        path: Path of the file, for the message.
    """
    try:
        with naming(path):
            yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"Could not write {str(path)!r}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def replacing(path) -> Iterator[Path]:
    """Yields a temporary path to write to, and moves the file to `path` once it is written.

    Args:
        path: Path of the file.
    """
    path = Path(path)
    with folder_beside(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def folder_beside(path) -> Iterator[Path]:
    """Yields a temporary folder on the same disk as a file, and removes it at the end.

    Args:
        path: Path of the file.
    """
    parent = Path(path).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write to. Received: {str(parent)!r}, which does not exist")
    with tempfile.TemporaryDirectory(dir=parent, prefix=_PREFIX, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def sweep(folder: Path) -> None:
    """Removes temporary folders that killed processes left behind, once they are a day old.

    Args:
        folder: Path of the folder to sweep.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - newest > 24 * 3600:
                shutil.rmtree(left)

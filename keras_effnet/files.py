"""Files that are whole or not there."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".keras_effnet-"


@contextmanager
def writing(path) -> Iterator[None]:
    """Makes of a library's own exception, such as for a full disk, what Python calls such an error."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"Expected to write {str(path)!r}. Received: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def replacing(path) -> Iterator[Path]:
    """Gives a path beside the wanted one to write to, and moves it there once it is written.

    Args:
        path: Path of the file.
    """
    path = Path(path)
    with folder_beside(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def folder_beside(path) -> Iterator[Path]:
    """Gives a folder on the same disk as a file, and removes it in the end.

    Args:
        path: Path of the file.
    """
    parent = Path(path).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write to. Received: {str(parent)!r}, which does not exist")
    with tempfile.TemporaryDirectory(dir=parent, prefix=_PREFIX, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def sweep(folder: Path) -> None:
    """Removes what processes that were killed left of their work, once it is a day old.

    Args:
        folder: Path.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - newest > 24 * 3600:
                shutil.rmtree(left)

"""Locks a run folder for one run at a time, on a disk or on Cloud Storage."""

import contextlib
import errno
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_effnet.tpu.resume.cloud_files import rows, write

BEAT = 10.0  # seconds between heartbeats, where the file system has no locks


@contextlib.contextmanager
def locked(folder: str, on_lost: Callable[[], Any], beat: float = BEAT) -> Iterator[None]:
    """Keeps other runs out of a folder until the process ends, in whatever way.

    Args:
        folder: String, path of the folder. On a file system, the lock is the system's. On Cloud Storage, it is a file
            that changes with every heartbeat; after a run was killed, the next one waits for three heartbeats.
        on_lost: Function without arguments. Called from another thread if another run has taken over the folder because
            the heartbeats of this one stopped for too long. The system's locks cannot be lost.
        beat: Float, seconds between heartbeats. Defaults to 10.

    Raises:
        ValueError: If another run uses the folder.
    """
    with _beating(folder, on_lost, beat) if "://" in folder else _held(folder):
        yield


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


def _refused(folder: str, owner: dict[str, Any]) -> ValueError:
    known = ", ".join(f"{name} {owner[name]}" for name in ("host", "process", "since") if name in owner)
    return ValueError(f"Expected a folder that no other run uses. Received: {folder!r}, which is in use ({known})")


@contextlib.contextmanager
def _held(folder: str):
    import fcntl

    with open(os.path.join(folder, "lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            owner = {}
            with contextlib.suppress(ValueError):
                owner = json.loads(file.read())
            raise _refused(folder, owner) from error
        file.truncate(0)
        file.write(json.dumps(_me()))
        file.flush()
        yield


@contextlib.contextmanager
def _beating(folder: str, on_lost: Callable[[], Any], beat: float):
    path, name, done = f"{folder}/lock", uuid.uuid4().hex, threading.Event()

    def read() -> dict[str, Any]:
        found = rows(path)
        return found[0] if found else {}

    def is_mine() -> bool:
        return read().get("name") == name

    def sign(number: int) -> None:
        write(path, json.dumps(_me() | {"name": name, "beat": number}) + "\n")

    before = read()
    if before:
        print(f"Waiting {3 * beat:g} s to see whether the run in {folder} is still alive", file=sys.stderr, flush=True)
        for _ in range(12):
            time.sleep(beat / 4)
            if read() != before:
                raise _refused(folder, before)
    sign(0)
    time.sleep(beat / 2)  # if two runs found the folder free, the last one to write owns it
    if not is_mine():
        raise _refused(folder, read())

    def keep_alive() -> None:
        for number in itertools.count(1):
            if done.wait(beat):
                return
            with contextlib.suppress(tf.errors.OpError):  # the storage may answer at the next beat
                if not is_mine():
                    on_lost()
                    return
                sign(number)

    thread = threading.Thread(target=keep_alive, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(tf.errors.OpError):
            if is_mine():
                tf.io.gfile.remove(path)

"""Checks the other hosts of a run: TF_CONFIG, KERAS_DISTRIBUTION, and whether those hosts answer."""

import errno
import json
import os
import re
import socket
import threading
from collections.abc import Collection

from keras_effnet.tpu.doctor.finding import Finding
from keras_effnet.tpu.environment import processes

PATIENCE = 2.0  # seconds to wait for another host


def hosts(backend: str) -> tuple[int, Finding]:
    """Checks the environment variables that name the hosts of a run, and whether those hosts answer.

    Args:
        backend: String, Keras' backend.

    Returns:
        Tuple of the number of processes, and a `Finding`.
    """
    if backend != "jax":
        return cluster(os.environ.get("TF_CONFIG", ""))
    what = "KERAS_DISTRIBUTION"
    try:
        named = processes()
    except ValueError as error:
        return 1, Finding(what, "set", "problem", f"Correct its variables. {error}")
    if named is None:
        return 1, Finding(what, "not set", "none")
    first, index, count = named
    found, silent = f"{count} processes, this is {index}", _silent([first]) if index else {}
    if not silent:
        return count, Finding(what, found, "ok")
    found += f"; no answer from {first} ({silent[first]})"
    return count, Finding(what, found, "warning", "Start the same command there, or correct the address")


def cluster(text: str) -> tuple[int, Finding]:
    """Checks TF_CONFIG, and whether the other workers answer.

    Args:
        text: String, the value of the variable. `""` if it is not set.

    Returns:
        Tuple of the number of workers, and a `Finding`.

    Example:

    >>> cluster("")
    (1, Finding(what='TF_CONFIG', found='not set', verdict='none', advice=''))
    >>> cluster('{"cluster": {"worker": ["one:2222", "two:2222"]}, "task": {"type": "worker", "index": 2}}')[1].advice
    'Correct it. Expected task.index from 0 to 1. Received: 2'
    """
    if not text.strip():
        return 1, Finding("TF_CONFIG", "not set", "none")
    try:
        workers, own, place = _parse(text)
    except ValueError as error:
        return 1, Finding("TF_CONFIG", "set", "problem", f"Correct it. {error}")
    found = f"{len(workers)} workers, this is {place}" if len(workers) > 1 else "1 worker"
    silent = _silent([address for address in workers if address != own])
    if not silent:
        return len(workers), Finding("TF_CONFIG", found, "ok")
    # A host without a worker refuses the connection; an unreachable one does not answer at all.
    waiting = all(reason == "refused" for reason in silent.values())
    listed = ", ".join(f"{address} ({reason})" for address, reason in silent.items())
    advice = "Start the same command there" if waiting else "Correct the address, or open the port between the machines"
    return len(workers), Finding(
        "TF_CONFIG", f"{found}; no answer from {listed}", "warning" if waiting else "problem", advice
    )


def _parse(text: str) -> tuple[list[str], str, str]:
    shape = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"Expected JSON such as {shape}. Received: {text[:100]} ({error})") from error
    groups, task = (value.get(name) for name in ("cluster", "task")) if isinstance(value, dict) else (None, None)
    if not isinstance(groups, dict) or not isinstance(task, dict) or not groups:
        raise ValueError(f"Expected {shape}. Received: {text[:200]}")
    for kind, addresses in groups.items():
        good = isinstance(addresses, list) and addresses
        if not good or not all(re.fullmatch(r".+:\d{1,5}", str(address)) for address in addresses):
            raise ValueError(f"Expected a list of host:port as cluster.{kind}. Received: {addresses!r}")
    kind, index = task.get("type"), task.get("index")
    if kind not in groups:
        raise ValueError(f"Expected task.type among {', '.join(groups)}. Received: {kind!r}")
    count = len(groups[kind])
    if not str(index).isdecimal() or int(str(index)) >= count:
        raise ValueError(f"Expected task.index from 0 to {count - 1}. Received: {index!r}")
    workers = [*groups.get("chief", []), *groups.get("worker", [])]
    return workers, groups[kind][int(str(index))], f"{kind} {index}"


def _silent(addresses: Collection[str]) -> dict[str, str]:
    reasons = dict.fromkeys(addresses, f"timeout after {PATIENCE:g} s")

    def knock(address: str) -> None:
        host, port = address.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
            reasons.pop(address)
        except TimeoutError:
            pass
        except (OSError, OverflowError) as error:
            refused = getattr(error, "errno", None) == errno.ECONNREFUSED
            reasons[address] = "refused" if refused else str(error)

    # Daemon threads, because resolving a name has no timeout.
    threads = [threading.Thread(target=knock, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE + 0.5)
    return dict(reasons)

"""Free memory and disk space, and the number of processors."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from keras_effnet.tpu.doctor.finding import Finding

ENOUGH = 2 * 2**30  # bytes: TensorFlow takes 0.7 GB once imported, and the largest weights, L2's, are 1.9 GB


def memory() -> Finding:
    """The memory that this process may use: the machine's, or the limit of its control group.

    Returns:
        A `Finding`.

    Example:

    >>> memory().what
    'Memory'
    """
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kibibytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
        total, free = kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        try:
            total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return Finding("Memory", "unknown", "none")
    found = ""
    for limit, used in _control_groups():
        if limit < total:
            total, free, found = limit, min(free, limit - used), " (limit of the control group)"
    verdict, advice = ("ok", "") if free >= ENOUGH else ("warning", f"Free some: {_gib(ENOUGH)} or more")
    return Finding("Memory", f"{_gib(free)} of {_gib(total)} free{found}", verdict, advice)


def _control_groups() -> list[tuple[int, int]]:
    """Limit and use of each group that this process is in: version 2, else version 1."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", "memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                # Files that were read and can be forgotten are no use.
                stat = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                found.append((limit, used - int(stat[1]) if stat else used))
            if folder == root:
                break
    return found


def disk(what: str, folder: Path, advice: str) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(what, f"{folder}: {error.strerror}", "warning", advice)
    if not os.access(there, os.W_OK):
        return Finding(what, f"{folder} cannot be written to", "warning", advice)
    return Finding(what, f"{_gib(free)} free", *(("ok", "") if free >= ENOUGH else ("warning", advice)))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

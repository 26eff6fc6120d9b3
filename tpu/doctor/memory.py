"""Checks free memory and disk space, and counts processors."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from keras_effnet.tpu.doctor.finding import Finding

ENOUGH = 2 * 2**30  # bytes: TensorFlow takes 0.7 GB once imported; the largest weights, those of L2, take 1.9 GB


def memory() -> Finding:
    """Checks the memory that this process may use: that of the machine, or the limit of its control group.

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
    verdict, advice = ("ok", "") if free >= ENOUGH else ("warning", f"Free up memory: {_gib(ENOUGH)} or more")
    return Finding("Memory", f"{_gib(free)} of {_gib(total)} free{found}", verdict, advice)


def disk(what: str, folder: Path, advice: str) -> Finding:
    """Checks the disk of a folder, which need not exist yet.

    Args:
        what: String, the name of the finding.
        folder: Path.
        advice: String, what to do if it is not writable or has too little space.

    Returns:
        A `Finding`.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(what, f"{folder}: {error.strerror}", "warning", advice)
    if not os.access(there, os.W_OK):
        return Finding(what, f"{folder} is not writable", "warning", advice)
    return Finding(what, f"{_gib(free)} free", *(("ok", "") if free >= ENOUGH else ("warning", advice)))


def processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _control_groups() -> list[tuple[int, int]]:
    """Returns the limit and use of each control group of this process, in version 2 or version 1."""
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
            with contextlib.suppress(OSError, ValueError):  # missing, or "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                # The inactive page cache can be reclaimed, so it does not count as used.
                stat = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                found.append((limit, used - int(stat[1]) if stat else used))
            if folder == root:
                break
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"

"""Finds TPU chips and the processes that hold them, GPUs, and the devices that JAX sees."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from keras_effnet.tpu.doctor.finding import Finding

DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # v2 to v4, and later ones
LOCK = "/tmp/libtpu_lockfile"


def chips_of(patterns: Sequence[str]) -> list[str]:
    """Returns the device files of the TPU chips, from patterns such as `DEVICES`."""
    return [path for path in _files(patterns) if _is_googles(path)]


def who_holds(devices: Sequence[str] = DEVICES, lock: str = LOCK) -> dict[int, str]:
    """Finds the processes that hold the TPU. Only root sees which files the processes of other users have open.

    Args:
        devices: Patterns of the TPU's device files. Defaults to those of Cloud TPU.
        lock: String, path of the file that libtpu locks while it holds the TPU. Defaults to libtpu's.

    Returns:
        Dict of command lines by process id.

    Example:

    >>> who_holds(["/no/such/device"], "/no/such/lock")
    {}
    """
    wanted = {os.path.realpath(path) for path in (*_files(devices), *glob(lock))}
    numbers: set[int] = set()
    for link in glob("/proc/[0-9]*/fd/*") if wanted else ():
        try:
            held = os.readlink(link) in wanted
        except OSError:  # it has ended, or belongs to another user
            continue
        if held:
            numbers.add(int(link.split("/")[2]))
    numbers |= _lockers(lock)
    return {number: _command(number) for number in sorted(numbers - {os.getpid()})}


def tpu_finding(chips: list[str], holders: dict[int, str]) -> Finding:
    """Reports the chips of `chips_of()` and their holders from `who_holds()`."""
    if not chips:
        return Finding("TPU", "none", "none")
    found = f"{len(chips)} {'chip' if len(chips) == 1 else 'chips'}"
    if holders:
        processes = ", ".join(f"{number} ({command[:200]})" for number, command in holders.items())
        return Finding(
            "TPU", f"{found}, held by process {processes}", "problem", "Stop that process, or wait until it ends"
        )
    if os.path.exists(LOCK) and not os.access(LOCK, os.R_OK | os.W_OK):
        # libtpu treats a file that it cannot open as locked: https://github.com/jax-ml/jax/issues/10192
        advice = f"If `sudo lsof -w {chips[0]}` names no process either, run: sudo rm {LOCK}"
        return Finding("TPU", f"{found}, {LOCK} belongs to another user", "problem", advice)
    unsure = "" if os.geteuid() == 0 else ", as far as this user can see"
    return Finding("TPU", f"{found}, free{unsure}", "ok")


def nvidia_gpus() -> list[str] | str:
    """Returns the names of NVIDIA's GPUs, or the error of nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    try:
        done = subprocess.run([tool, "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    names = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)
    return names if names or not done.returncode else f"nvidia-smi: {(done.stdout + done.stderr).strip()[-200:]}"


def gpu_finding(names: list[str] | str, seen: int | None) -> Finding:
    """Reports GPUs.

    Args:
        names: Result of `nvidia_gpus()`.
        seen: Integer, how many GPUs TensorFlow sees. None if unknown or not needed.

    Returns:
        A `Finding`.
    """
    if isinstance(names, str):
        return Finding("GPU", names, "warning", "Reinstall NVIDIA's driver and restart the machine")
    if not names:
        return Finding("GPU", f"{seen} that TensorFlow sees", "ok") if seen else Finding("GPU", "none", "none")
    listed = ", ".join(names)
    if seen is None:
        return Finding("GPU", listed, "ok")
    if seen:
        return Finding("GPU", f"{listed}; TensorFlow sees {seen}", "ok")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
        return Finding("GPU", f"{listed}; TensorFlow sees none with {hidden}", "warning", "Unset CUDA_VISIBLE_DEVICES")
    advice = "Install CUDA for TensorFlow with: pip install 'tensorflow[and-cuda]'"
    return Finding("GPU", f"{listed}; TensorFlow sees none", "problem", advice)


def jax_devices(answer: dict, tpu: bool, held: bool, tensorflow_has_it: bool) -> Finding:
    """Reports the devices that JAX sees.

    Args:
        answer: Dict, JAX's answer of `ask()`.
        tpu: Boolean, whether the machine has a TPU.
        held: Boolean, whether another process holds it.
        tensorflow_has_it: Boolean, whether tensorflow-tpu is installed.

    Returns:
        A `Finding`.
    """
    devices = answer.get("devices", [])
    if not devices:
        return Finding("JAX sees", "nothing", "none")
    found = ", ".join(f"{devices.count(kind)} {kind}" for kind in dict.fromkeys(devices))
    if not tpu or "tpu" in devices:
        return Finding("JAX sees", found, "ok")
    if held:
        return Finding("JAX sees", f"{found}; the TPU was not tried, because it is held", "ok")
    if tensorflow_has_it or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return Finding("JAX sees", found, "ok")
    return Finding(
        "JAX sees", f"{found} but not the TPU", "warning", "Install JAX for TPUs with: pip install 'jax[tpu]'"
    )


def _lockers(lock: str) -> set[int]:
    # libtpu takes it with lockf(), and /proc/locks lists the locks of all users (tensorflow:
    # compiler/xla/stream_executor/tpu/tpu_initializer_helper.cc).
    try:
        found = os.stat(lock)
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    # An arrow marks a process that waits for the lock.
    found = (re.search(rf"\s(\d+) {place} ", line) for line in lines if "->" not in line)
    return {int(match[1]) for match in found if match}


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _files(patterns: Sequence[str]) -> list[str]:
    # /dev/accel is also a folder, for devices of other vendors.
    found = (path for one in patterns for path in ([one] if os.path.exists(one) else glob(one)))
    return sorted(path for path in found if not os.path.isdir(path))


def _is_googles(path: str) -> bool:
    # /dev/vfio has a file per group of devices, of any vendor; 0x1ae0 is Google (jax:_src/hardware_utils.py).
    if not path.startswith("/dev/vfio/"):
        return True
    vendors = glob(f"/sys/kernel/iommu_groups/{Path(path).name}/devices/*/vendor")
    return not vendors or any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)

"""TPU chips, GPUs, and the strategy that a training would use on them."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from keras_effnet.tpu.config import Run
from keras_effnet.tpu.doctor.backends import is_here
from keras_effnet.tpu.doctor.finding import Finding

DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # v2 to v4, and later ones

LOCK = "/tmp/libtpu_lockfile"


def strategy(run: Run, tpu: bool = False, gpus: int = 0, workers: int = 1) -> str:
    """What a run would be distributed with, as `connect()` in tpu/runner.py decides it.

    Args:
        run: `Run`.
        tpu: Boolean, whether a TPU and its library are there. Defaults to False.
        gpus: Integer, GPUs that TensorFlow sees. Defaults to 0.
        workers: Integer, workers that TF_CONFIG names. Defaults to 1.

    Returns:
        String: the name of a `tf.distribute.Strategy`, and its devices.

    Raises:
        ValueError: If the devices that are asked for are not there.

    Example:

    >>> strategy(Run(), gpus=2)
    'MirroredStrategy on GPU:0, GPU:1'
    >>> strategy(Run(devices="cpu"), gpus=2)
    'OneDeviceStrategy on CPU:0'
    """
    if run.devices == "tpu" and not tpu:
        raise ValueError("Expected a TPU and libtpu (run.devices). Received: none is there")
    if tpu and run.devices in ("auto", "tpu"):
        if workers > 1:
            raise ValueError(f"Expected no TF_CONFIG with a TPU. Received: one that names {workers} workers")
        return "TPUStrategy"
    if run.devices == "gpu" and not gpus:
        raise ValueError("Expected a GPU that TensorFlow can use (run.devices). Received: none is there")
    if gpus and run.devices != "cpu" and run.cpu_replicas == 1:
        names = [f"GPU:{number}" for number in range(gpus)]
    else:
        names = [f"CPU:{number}" for number in range(run.cpu_replicas)]
    if workers > 1 and run.cpu_replicas > 1:
        raise ValueError(f"Expected run.cpu_replicas=1 with {workers} workers. Received: {run.cpu_replicas}")
    if workers > 1:
        return f"MultiWorkerMirroredStrategy of {workers} workers on {', '.join(names)} of each"
    return f"{'MirroredStrategy' if len(names) > 1 else 'OneDeviceStrategy'} on {', '.join(names)}"


def who_holds(devices: Sequence[str] = DEVICES, lock: str = LOCK) -> dict[int, str]:
    """The processes that hold the TPU. Of other users' processes only root sees what they have open.

    Args:
        devices: Patterns of the TPU's files. Defaults to those of Cloud TPU.
        lock: String, the file that libtpu locks while it has the TPU. Defaults to libtpu's.

    Returns:
        Dict of their command lines, by number of process.

    Example:

    >>> who_holds(["/no/such/device"], "/no/such/lock")
    {}
    """
    wanted = {os.path.realpath(path) for path in (*_files(devices), *glob(lock))}
    numbers: set[int] = set()
    for link in glob("/proc/[0-9]*/fd/*") if wanted else ():
        try:
            held = os.readlink(link) in wanted
        except OSError:  # it has ended, or is another user's
            continue
        if held:
            numbers.add(int(link.split("/")[2]))
    numbers |= _lockers(lock)
    return {number: _command(number) for number in sorted(numbers - {os.getpid()})}


def _lockers(lock: str) -> set[int]:
    # As libtpu takes it: lockf(), which /proc/locks tells of whoever's process it is (tensorflow:
    # compiler/xla/stream_executor/tpu/tpu_initializer_helper.cc).
    try:
        found = os.stat(lock)
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    # An arrow: one that waits.
    found = (re.search(rf"\s(\d+) {place} ", line) for line in lines if "->" not in line)
    return {int(match[1]) for match in found if match}


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _files(patterns: Sequence[str]) -> list[str]:
    # /dev/accel is also a folder, of other makers' devices.
    found = (path for one in patterns for path in ([one] if os.path.exists(one) else glob(one)))
    return sorted(path for path in found if not os.path.isdir(path))


def chips_of(patterns: Sequence[str]) -> list[str]:
    return [path for path in _files(patterns) if _is_googles(path)]


def _is_googles(path: str) -> bool:
    # /dev/vfio has a file for a group of devices of any maker; 0x1ae0 is Google (jax:_src/hardware_utils.py).
    if not path.startswith("/dev/vfio/"):
        return True
    vendors = glob(f"/sys/kernel/iommu_groups/{Path(path).name}/devices/*/vendor")
    return not vendors or any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)


def tpu_finding(chips: list[str], holders: dict[int, str]) -> Finding:
    if not chips:
        return Finding("TPU", "none", "none")
    found = f"{len(chips)} {'chip' if len(chips) == 1 else 'chips'}"
    if holders:
        told = ", ".join(f"{number} ({command[:200]})" for number, command in holders.items())
        return Finding("TPU", f"{found}, held by process {told}", "problem", "Stop that process, or wait for its end")
    if os.path.exists(LOCK) and not os.access(LOCK, os.R_OK | os.W_OK):
        # libtpu takes a file that it cannot open for one that is locked: https://github.com/jax-ml/jax/issues/10192
        advice = f"If `sudo lsof -w {chips[0]}` names no process either: sudo rm {LOCK}"
        return Finding("TPU", f"{found}, {LOCK} is another user's", "problem", advice)
    unsure = "" if os.geteuid() == 0 else ", as far as this user sees"
    return Finding("TPU", f"{found}, free{unsure}", "ok")


def nvidia_gpus() -> list[str] | str:
    """The GPUs' names, or why they are not known."""
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
    """`seen` is how many TensorFlow sees, None if it could not be asked or need not see them."""
    if isinstance(names, str):
        return Finding("GPU", names, "warning", "Install NVIDIA's driver again, and start the machine anew")
    if not names:
        return Finding("GPU", f"{seen} that TensorFlow sees", "ok") if seen else Finding("GPU", "none", "none")
    told = ", ".join(names)
    if seen is None:
        return Finding("GPU", told, "ok")
    if seen:
        return Finding("GPU", f"{told}; TensorFlow sees {seen}", "ok")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
        return Finding("GPU", f"{told}; TensorFlow sees none with {hidden}", "warning", "unset CUDA_VISIBLE_DEVICES")
    return Finding("GPU", f"{told}; TensorFlow sees none", "problem", "pip install 'tensorflow[and-cuda]'")


def jax_devices(answer: dict, tpu: bool, held: bool, tensorflow_has_it: bool) -> Finding:
    devices = answer.get("devices", [])
    if not devices:
        return Finding("JAX sees", "nothing", "none")
    found = ", ".join(f"{devices.count(kind)} {kind}" for kind in dict.fromkeys(devices))
    if not tpu or "tpu" in devices:
        return Finding("JAX sees", found, "ok")
    if held:
        return Finding("JAX sees", f"{found}; was not asked for the TPU, which is held", "ok")
    if tensorflow_has_it or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return Finding("JAX sees", found, "ok")
    return Finding("JAX sees", f"{found} and not the TPU", "warning", "pip install 'jax[tpu]'")


def strategy_of_tensorflow(run: Run, tpu: bool, gpus: int | None, workers: int, training: Finding) -> Finding:
    if training.verdict == "problem":
        return Finding("Strategy", "none", "none", "See Training")
    tpu = is_here("libtpu") and (tpu or bool(os.environ.get("TPU_NAME")))  # as the runner finds it
    try:
        return Finding("Strategy", strategy(run, tpu, gpus or 0, workers), "ok")
    except ValueError as error:
        return Finding("Strategy", "none", "problem", str(error))


def strategy_of_jax(
    run: Run, devices: Sequence[str], chips: bool, sees: Finding, workers: int, training: Finding
) -> Finding:
    """As `connect()` in tpu/jax_runner.py decides it."""
    if training.verdict == "problem":
        return Finding("Strategy", "none", "none", "See Training")
    if chips and "tpu" not in devices and run.devices in ("auto", "tpu") and run.cpu_replicas == 1:
        return Finding("Strategy", "the TPU, which JAX was not asked for or does not see", sees.verdict, "See JAX sees")
    wanted = (devices[0] if devices else "device") if run.devices == "auto" else run.devices
    if wanted not in devices:
        told = f"Expected a {wanted.upper()} that JAX sees (run.devices). Received: {', '.join(devices) or 'nothing'}"
        return Finding("Strategy", "none", "problem", told)
    count = run.cpu_replicas if run.cpu_replicas > 1 else devices.count(wanted)
    told = f"JAX, data parallel on {count} {wanted}" + (f" of each of {workers} processes" if workers > 1 else "")
    return Finding("Strategy", told, "ok")

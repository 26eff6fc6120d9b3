"""What runs on this machine, what would be trained on, and what to do about what does not run."""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from glob import glob
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from keras_effnet.tpu.config import Run, processes
from keras_effnet.weights import store

OURS = "keras-effnet"
DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # v2 to v4, and later ones
LOCK = "/tmp/libtpu_lockfile"
ENOUGH = 2 * 2**30  # bytes: TensorFlow takes 0.7 GB once imported, and the largest weights, L2's, are 1.9 GB
PATIENCE = 2.0  # seconds for another worker's port

TENSORFLOWS = ("tensorflow", "tensorflow-tpu", "tensorflow-cpu", "tf-nightly")
LAST_ON_TPU = "2.19.1"  # keras:requirements-tensorflow-tpu.txt
ON_A_TPU = "See On a Cloud TPU in docs/training.md"
TRAINING = ("tensorflow", "orbit", "tyro", "tensorflow_datasets", "importlib_resources")
# Of each backend: what else its runner needs, and what brings all.
RUNNERS = {
    "tensorflow": ((), "pip install 'keras_effnet[tensorflow,tpu]'"),
    "jax": (("jax", "orbax.checkpoint"), "pip install 'keras_effnet[tensorflow,tpu,jax]'"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: String, its name.
        found: String: its version, number or state.
        verdict: `"ok"`, `"warning"`, `"problem"` (training does not start, or not on what is there) or `"none"` (it is
            not here and need not be).
        advice: String, what to do. Defaults to `""`.
    """

    what: str
    found: str
    verdict: str
    advice: str = ""


@dataclass(frozen=True)
class Fit:
    """A version that one package asks another for, in its own metadata, with the name of the row that tells it."""

    asker: str
    extra: str
    asked: str
    row: str
    verdict: str
    advice: str


# What is asked is read from the packages that are installed: a row says whom to ask, and what to do.
FITS = (
    Fit("keras-effnet", "", "keras", "Keras", "problem", "pip install '{asked}{wanted}'"),
    Fit("keras-effnet", "tensorflow", "tensorflow", "TensorFlow", "problem", "pip install '{asked}{wanted}'"),
    Fit("keras-effnet", "jax", "jax", "JAX", "problem", "pip install '{asked}{wanted}'"),
    Fit("tensorflow", "", "keras", "Keras", "problem", "pip install '{asked}{wanted}'"),
    Fit("tensorflow", "", "libtpu", "libtpu", "problem", "pip install '{asked}{wanted}'"),
    Fit("jax", "", "jaxlib", "jaxlib", "problem", "pip install '{asked}{wanted}'"),
    Fit("jax", "tpu", "libtpu", "libtpu", "problem", "pip install 'jax[tpu]=={version}'"),
    Fit("tf-keras", "", "tensorflow", "tf_keras", "problem", "pip install 'tf_keras=={minor}.*'"),
    # orbit, which is what is taken of it, asks for no TensorFlow: docs/training.md.
    Fit("tf-models-official", "", "tensorflow", "tf-models-official", "warning", "pip install '{asked}{wanted}'"),
)
ROWS = {
    "TensorFlow": TENSORFLOWS,
    "Keras": ("keras",),
    "JAX": ("jax",),
    "jaxlib": ("jaxlib",),
    "libtpu": ("libtpu",),
    "tf_keras": ("tf-keras",),
    "tf-models-official": ("tf-models-official",),
}
IMPORTED = {"tensorflow": "TensorFlow", "keras": "Keras", "jax": "JAX"}


def examine(run: Run | None = None, devices: Sequence[str] = DEVICES) -> list[Finding]:
    """Looks at this machine.

    What has to be imported is asked in processes of their own, and no TPU is used that another process holds.

    Args:
        run: `Run`, how it would be trained. Defaults to None, a recipe's own.
        devices: Patterns of the TPU's files. Defaults to those of Cloud TPU.

    Returns:
        List of `Finding`. That called Strategy tells what would be trained on.

    Example:

    >>> [finding for finding in examine() if finding.verdict == "problem"]  # doctest: +SKIP
    []
    """
    run = run or Run()
    versions, requires = _installed()
    chips = _chips(devices)
    holders = who_holds(chips)
    backend, told_by = _backend()
    here = [name for name in IMPORTED if _is_here(name)]
    keras = ["keras"] if "keras" in here and _is_here(backend) else []
    subjects = [["tensorflow", *keras] if backend == "tensorflow" else ["tensorflow"]] if "tensorflow" in here else []
    subjects += [keras] if keras and backend != "tensorflow" else []
    subjects += [["jax"]] if "jax" in here else []
    with ThreadPoolExecutor() as pool:
        smi = pool.submit(_nvidia)
        group = pool.submit(_hosts, backend)
        answers: dict[str, dict] = {}
        for answer in pool.map(lambda some: _ask(some, backend, bool(holders)), subjects):
            answers |= answer
    workers, config = group.result()

    packages = {row.what: row for row in compare(versions, requires, bool(chips), backend)}
    for name, row in IMPORTED.items():
        if name not in here and packages[row].found != "not installed":
            answers[name] = {"error": "its files are not there"}
    if "error" in answers.get(backend, {}):
        answers.pop("keras", None)  # it fails for the same reason
    for name, row in IMPORTED.items():
        if name in answers:
            distribution = next((known for known in ROWS[row] if known in versions), name)
            needed = name != "jax" or backend == "jax"
            packages[row] = _started(packages[row], answers[name], distribution, needed)
    gpus = answers.get("tensorflow", {}).get("gpus") if backend == "tensorflow" else None
    broken = [name for name in dict.fromkeys(("tensorflow", backend)) if "error" in answers.get(name, {})]
    training = _training(backend, broken, "tensorflow-tpu" in versions)
    sees = _jax_sees(answers.get("jax", {}), bool(chips), bool(holders), "tensorflow-tpu" in versions)
    if backend == "jax":
        chosen = _strategy_of_jax(run, answers.get("jax", {}).get("devices", []), bool(chips), sees, workers, training)
    else:
        chosen = _strategy(run, bool(chips), gpus, workers, training)
    return [
        Finding("Python", platform.python_version(), "ok"),
        *extras(versions, requires),
        *packages.values(),
        _keras_backend(backend, told_by),
        _tpu(chips, holders),
        _gpu(smi.result(), gpus),
        sees,
        Finding("Processors", str(_processors()), "ok"),
        memory(),
        _disk("Disk, this folder", Path.cwd(), "Change to a folder with room, or make some"),
        _disk("Disk, weights", store.home(), "Make room, or set KERAS_EFFNET_HOME to another folder"),
        config,
        training,
        chosen,
    ]


def compare(
    versions: Mapping[str, str],
    requires: Mapping[str, Iterable[str]],
    tpu: bool = False,
    backend: str = "tensorflow",
) -> list[Finding]:
    """Whether versions fit each other. Looks at nothing but what it is given.

    Args:
        versions: Dict of the installed packages' versions by name.
        requires: Dict of what packages ask for, by name, as in their metadata.
        tpu: Boolean, whether a TPU is there. Defaults to False.
        backend: String, Keras' backend: what would train. Defaults to `"tensorflow"`.

    Returns:
        List of `Finding`.

    Example:

    >>> asks = {"tf_keras": ["tensorflow<2.20,>=2.19"]}
    >>> compare({"keras": "3.15.1", "tensorflow": "2.20.0", "tf_keras": "2.19.0"}, asks)[-1]
    Finding(what='tf_keras', found='2.19.0', verdict='problem', advice="tf-keras 2.19.0 asks for tensorflow<2.20,>=2.19:
    pip install 'tf_keras==2.20.*'")
    """
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    requires = {canonicalize_name(name): list(asked) for name, asked in requires.items()}
    complaints: dict[str, list[tuple[str, str]]] = {row: [] for row in ROWS}
    frameworks = [name for name in TENSORFLOWS if name in versions]
    on_tpu = "tensorflow-tpu" in frameworks
    for fit in FITS:
        for asker, asked in ((a, b) for a in _names(fit.asker, versions) for b in _names(fit.asked, versions)):
            if on_tpu and fit.asker == "tf-models-official":
                continue  # installed without its dependencies, as docs/training.md says
            wanted = _wanted(requires.get(asker, ()), fit.asked, fit.extra)
            if wanted.contains(versions[asked], prereleases=True):
                continue
            advice = fit.advice.format(
                asked=asked,
                wanted=wanted,
                version=versions[asker],
                minor=".".join(versions[asked].split(".")[:2]),
            )
            verdict = fit.verdict
            if fit.asked == "libtpu" and not tpu:
                verdict = "warning"
            elif on_tpu and (asker, asked) == ("jax", "libtpu"):
                # tensorflow-tpu's libtpu is there; JAX cannot have another.
                verdict, advice = "warning", "keep JAX off the TPU: JAX_PLATFORMS=cpu"
            extra = f"[{fit.extra}]" if fit.extra and asker != "keras-effnet" else ""
            complaints[fit.row].append(
                (verdict, f"{asker}{extra} {versions[asker]} asks for {fit.asked}{wanted}: {advice}")
            )
    if len(frameworks) > 1:
        told = f"{' and '.join(frameworks)} write the same folder: pip uninstall all of them and install one"
        complaints["TensorFlow"].append(("problem", told))
    if on_tpu and Version(versions["tensorflow-tpu"]) > Version(LAST_ON_TPU):
        told = f"Keras says that {LAST_ON_TPU} is the last version for TPUs. {ON_A_TPU}"
        complaints["TensorFlow"].append(("warning", told))
    if tpu and frameworks and not on_tpu and backend != "jax":
        told = f"It cannot use the TPU; JAX can, with --runner jax, or tensorflow-tpu {LAST_ON_TPU}. {ON_A_TPU}"
        complaints["TensorFlow"].append(("problem", told))
    if on_tpu and backend == "jax":
        told = "It takes the TPU that JAX trains on: pip uninstall tensorflow-tpu, pip install 'tensorflow-cpu<2.21'"
        complaints["TensorFlow"].append(("problem", told))
    elif on_tpu and "jax" in versions and "libtpu" in versions:
        # https://github.com/Kaggle/docker-python/issues/1370
        told = "A process holds the TPU once, and both it and tensorflow-tpu take it: JAX_PLATFORMS=cpu, or uninstall"
        complaints["JAX"].append(("warning", told))

    rows = []
    for row, names in ROWS.items():
        found = [versions[name] + (f" ({name})" if name != names[0] else "") for name in names if name in versions]
        if found:
            verdicts = [verdict for verdict, _ in complaints[row]]
            verdict = next((name for name in ("problem", "warning") if name in verdicts), "ok")
            rows.append(Finding(row, ", ".join(found), verdict, ". ".join(told for _, told in complaints[row])))
        elif row == "Keras":
            rows.append(Finding(row, "not installed", "problem", "pip install keras"))
        elif row in ("TensorFlow", "JAX", "libtpu"):
            rows.append(Finding(row, "not installed", "none"))
    return rows


def extras(versions: Mapping[str, str], requires: Mapping[str, Iterable[str]]) -> list[Finding]:
    """What this package asks for and what of its extras is here. Looks at nothing but what it is given.

    Args:
        versions: See `compare()`.
        requires: See `compare()`.

    Returns:
        List of `Finding`: one for the package, one for all extras, and one for each that is here in part.

    Example:

    >>> asks = {"keras_effnet": ["click>=8.2", "matplotlib>=3.9; extra == 'plot'", "pydot>=3; extra == 'plot'"]}
    >>> extras({"keras_effnet": "0.1.0", "click": "8.3", "pydot": "4.0"}, asks)[-1]
    Finding(what='Extra plot', found='no matplotlib', verdict='warning', advice="pip install 'keras_effnet[plot]'")
    """
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    asked = [Requirement(text) for name in requires if canonicalize_name(name) == OURS for text in requires[name]]
    named = sorted({name for one in asked for name in re.findall(r"extra == [\"'](.+?)[\"']", str(one.marker or ""))})
    told_elsewhere = {fit.asked for fit in FITS if fit.asker == OURS}
    whole, absent, rows = [], [], []
    for extra in ("", *(name for name in named if name not in ("all", "dev", "test"))):
        if extra == "tpu" and "tensorflow-tpu" in versions:
            continue  # installed otherwise, as docs/training.md says; Training tells of it
        group = [one for one in asked if _applies(one, extra)]
        missing = [f"no {one.name}" for one in group if canonicalize_name(one.name) not in versions]
        if extra == "tensorflow" and any(name in versions for name in TENSORFLOWS):
            missing = []
        wrong = [
            f"{one.name} {versions[name]} where {one.specifier} is asked for"
            for one in group
            if (name := canonicalize_name(one.name)) in versions and name not in told_elsewhere
            if not one.specifier.contains(versions[name], prereleases=True)
        ]
        if not extra:
            found = ", ".join([versions.get(OURS, "not installed"), *missing, *wrong])
            verdict, advice = ("problem", "pip install keras_effnet") if missing or wrong else ("ok", "")
            if OURS not in versions:
                verdict, advice = "warning", "pip install keras_effnet: what it asks for is known only then"
            rows.append(Finding("keras_effnet", found, verdict, advice))
        elif not missing and not wrong:
            whole.append(extra)
        elif len(missing) == len(group):
            absent.append(extra)
        else:
            advice = f"pip install 'keras_effnet[{extra}]'"
            rows.append(Finding(f"Extra {extra}", ", ".join([*missing, *wrong]), "warning", advice))
    told = [f"{', '.join(whole)}" if whole else "none", *([f"not installed: {', '.join(absent)}"] if absent else [])]
    rows.insert(1, Finding("Extras", "; ".join(told), "ok" if whole else "none"))
    return rows


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


def _chips(patterns: Sequence[str]) -> list[str]:
    return [path for path in _files(patterns) if _is_googles(path)]


def _is_googles(path: str) -> bool:
    # /dev/vfio has a file for a group of devices of any maker; 0x1ae0 is Google (jax:_src/hardware_utils.py).
    if not path.startswith("/dev/vfio/"):
        return True
    vendors = glob(f"/sys/kernel/iommu_groups/{Path(path).name}/devices/*/vendor")
    return not vendors or any(Path(vendor).read_text().strip() == "0x1ae0" for vendor in vendors)


def _tpu(chips: list[str], holders: dict[int, str]) -> Finding:
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


def cluster(text: str) -> tuple[int, Finding]:
    """What TF_CONFIG says, and whether the other workers answer.

    Args:
        text: String, the variable's value; empty if it is not set.

    Returns:
        The number of workers, and a `Finding`.

    Example:

    >>> cluster("")
    (1, Finding(what='TF_CONFIG', found='not set', verdict='none', advice=''))
    >>> cluster('{"cluster": {"worker": ["one:2222", "two:2222"]}, "task": {"type": "worker", "index": 2}}')[1].advice
    'Expected task.index from 0 to 1. Received: 2'
    """
    if not text.strip():
        return 1, Finding("TF_CONFIG", "not set", "none")
    try:
        workers, own, place = _parse(text)
    except ValueError as error:
        return 1, Finding("TF_CONFIG", "set", "problem", str(error))
    found = f"{len(workers)} workers, this is {place}" if len(workers) > 1 else "1 worker"
    silent = _silent([address for address in workers if address != own])
    if not silent:
        return len(workers), Finding("TF_CONFIG", found, "ok")
    # A worker that was not started refuses; one that cannot be reached does not even do that.
    waiting = all(reason == "refused" for reason in silent.values())
    told = ", ".join(f"{address} ({reason})" for address, reason in silent.items())
    advice = "Start the same command there" if waiting else "Correct the address, or open the port between the machines"
    return len(workers), Finding(
        "TF_CONFIG", f"{found}; no answer of {told}", "warning" if waiting else "problem", advice
    )


def _parse(text: str) -> tuple[list[str], str, str]:
    shape = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"Expected JSON such as {shape}. Received: {text[:200]} ({error})") from error
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
    reasons = dict.fromkeys(addresses, f"nothing in {PATIENCE:g} s")

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

    # Daemons: looking a name up takes no time limit.
    threads = [threading.Thread(target=knock, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE + 0.5)
    return dict(reasons)


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


def _disk(what: str, folder: Path, advice: str) -> Finding:
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


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


QUESTIONS = {
    "tensorflow": """
import tensorflow as tf
answer = {"version": tf.__version__, "gpus": len(tf.config.list_physical_devices("GPU"))}
""",
    "keras": """
import keras
answer = {"version": keras.__version__, "backend": keras.backend.backend()}
""",
    "jax": """
import jax
answer = {"version": jax.__version__, "devices": [device.platform for device in jax.devices()]}
""",
}
MARK = "keras-effnet doctor: "


def _ask(subjects: list[str], backend: str, held: bool, seconds: float = 60) -> dict[str, dict]:
    """Asks one after the other in a process of their own, whose end is no end of ours."""
    code = f"""
import json
for name, question in {[(name, QUESTIONS[name]) for name in subjects]!r}:
    found = {{}}
    try:
        exec(question, found)
        answer = found["answer"]
    except BaseException as error:
        answer = {{"error": f"{{type(error).__name__}}: {{error}}".strip().splitlines()[-1]}}
    print({MARK!r} + json.dumps({{name: answer}}), flush=True)
"""
    environment = {
        **os.environ,
        # TensorFlow imports Keras, whose backend is no fault of TensorFlow's.
        "KERAS_BACKEND": "tensorflow" if "tensorflow" in subjects else backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_LOAD_LIBRARY": "0",  # TensorFlow's, which takes the TPU by being imported (tpu_initializer_helper.cc)
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if held or subjects != ["jax"] or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        environment["JAX_PLATFORMS"] = "cpu"  # of several hosts each waits for all others
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=environment,
        )
        out, errors = done.stdout, done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode < 0:
            reason = f"the process was ended by {signal.Signals(-done.returncode).name}"
        else:
            reason = f"the process ended with status {done.returncode}"
        reason = ": ".join([reason, *errors[-1:]])
    except subprocess.TimeoutExpired as error:
        out, reason = error.stdout or b"", f"no answer in {seconds:g} s"
    except OSError as error:
        out, reason = b"", str(error)
    answers: dict[str, dict] = {}
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            answers |= json.loads(line.removeprefix(MARK))
    left = [name for name in subjects if name not in answers]
    return answers | ({left[0]: {"error": reason}} if left else {})


def _started(row: Finding, answer: dict, name: str, needed: bool) -> Finding:
    """A package's row, with what its import said."""
    if "error" in answer:
        told = f"It does not start: {answer['error']}. Install it again: pip install --force-reinstall {name}"
        return replace(
            row,
            found="broken" if row.verdict == "none" else row.found,
            verdict="problem" if needed or row.verdict == "problem" else "warning",
            advice=". ".join(filter(None, (row.advice, told))),
        )
    if row.found == "not installed":
        return Finding(row.what, answer["version"], "warning", "It has no metadata, which tells what it fits")
    return row


def _is_here(module: str) -> bool:
    try:
        return bool(find_spec(module))
    except (ImportError, ValueError):  # of what is no module's name
        return False


def _backend() -> tuple[str, str]:
    """Keras' backend, as `keras-effnet` chooses it, and who says so."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name, "KERAS_BACKEND"
    configured = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
    try:
        name = str(json.loads(configured.read_text()).get("backend", "tensorflow"))
        if _is_here(name):
            return name, "keras.json"
    except (OSError, ValueError, AttributeError):
        pass
    return next((name for name in ("tensorflow", "jax", "torch") if _is_here(name)), "tensorflow"), ""


def _keras_backend(backend: str, told_by: str) -> Finding:
    found = f"{backend} ({told_by})" if told_by else backend
    if backend not in ("tensorflow", "jax", "torch"):
        return Finding("Keras backend", found, "problem", f"Expected tensorflow, jax or torch. Received: {backend}")
    if not _is_here(backend):
        return Finding("Keras backend", f"{found} is not installed", "problem", f"pip install {backend}")
    return Finding("Keras backend", found, "ok")


def lacking(backend: str) -> tuple[list[str], str]:
    """What training with one of Keras' backends needs and is not here.

    Args:
        backend: String, a key of `RUNNERS`.

    Returns:
        Tuple of a list of modules, and of the command that brings all.
    """
    more, bring = RUNNERS[backend]
    return [name for name in (*TRAINING, *more) if not _is_here(name)], bring


def _training(backend: str, broken: Sequence[str], on_tpu: bool) -> Finding:
    if backend not in RUNNERS:
        advice = "Training is TensorFlow's or JAX': --runner, or KERAS_BACKEND"
        return Finding("Training", f"not with KERAS_BACKEND={backend}", "problem", advice)
    missing, bring = lacking(backend)
    if missing:
        return Finding("Training", f"no {', '.join(missing)}", "problem", ON_A_TPU if on_tpu else bring)
    if broken:
        names = ", ".join(IMPORTED[name] for name in broken)
        return Finding("Training", f"{names} does not start", "problem", f"See {names}")
    return Finding("Training", "complete", "ok")


def _nvidia() -> list[str] | str:
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


def _gpu(names: list[str] | str, seen: int | None) -> Finding:
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


def _jax_sees(answer: dict, tpu: bool, held: bool, tensorflow_has_it: bool) -> Finding:
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


def _strategy(run: Run, tpu: bool, gpus: int | None, workers: int, training: Finding) -> Finding:
    if training.verdict == "problem":
        return Finding("Strategy", "none", "none", "See Training")
    tpu = _is_here("libtpu") and (tpu or bool(os.environ.get("TPU_NAME")))  # as the runner finds it
    try:
        return Finding("Strategy", strategy(run, tpu, gpus or 0, workers), "ok")
    except ValueError as error:
        return Finding("Strategy", "none", "problem", str(error))


def _strategy_of_jax(
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


def _hosts(backend: str) -> tuple[int, Finding]:
    if backend != "jax":
        return cluster(os.environ.get("TF_CONFIG", ""))
    what = "KERAS_DISTRIBUTION"
    try:
        told = processes()
    except ValueError as error:
        return 1, Finding(what, "set", "problem", str(error))
    if told is None:
        return 1, Finding(what, "not set", "none")
    first, index, count = told
    found, silent = f"{count} processes, this is {index}", _silent([first]) if index else {}
    if not silent:
        return count, Finding(what, found, "ok")
    found += f"; no answer of {first} ({silent[first]})"
    return count, Finding(what, found, "warning", "Start the same command there, or correct the address")


def _installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Versions of what the table of versions and this package's extras name, and what each of them asks for."""
    names = {name for fit in FITS for name in (fit.asker, fit.asked)} | set(TENSORFLOWS)
    with contextlib.suppress(metadata.PackageNotFoundError):  # sources that are not installed
        names |= {Requirement(text).name for text in metadata.requires(OURS) or ()}
    versions, requires = {}, {}
    for name in map(canonicalize_name, names):
        with contextlib.suppress(metadata.PackageNotFoundError, InvalidVersion, TypeError):  # TypeError: half removed
            distribution = metadata.distribution(name)
            versions[name], requires[name] = str(Version(distribution.version)), distribution.requires or []
    return versions, requires


def _names(name: str, versions: Mapping[str, str]) -> list[str]:
    return [one for one in (TENSORFLOWS if name == "tensorflow" else (name,)) if one in versions]


def _wanted(requires: Iterable[str], name: str, extra: str) -> SpecifierSet:
    wanted = SpecifierSet()
    for requirement in map(Requirement, requires):
        if canonicalize_name(requirement.name) == name and _applies(requirement, extra, extra != ""):
            wanted &= requirement.specifier
    return wanted


def _applies(requirement: Requirement, extra: str, base_too: bool = False) -> bool:
    """Whether it is asked for here with this extra, and not without it unless `base_too`."""
    marker = requirement.marker
    plain = marker is None or marker.evaluate({"extra": ""})
    if not extra or (plain and base_too):
        return plain
    return not plain and marker is not None and marker.evaluate({"extra": extra})

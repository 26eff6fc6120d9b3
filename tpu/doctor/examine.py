"""Runs all checks of `keras-effnet doctor` and lists their findings."""

import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keras_effnet import cache
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.doctor.backends import (
    IMPORTED,
    ask,
    backend_finding,
    is_here,
    keras_backend,
    started,
    training_finding,
)
from keras_effnet.tpu.doctor.devices import (
    DEVICES,
    chips_of,
    gpu_finding,
    jax_devices,
    nvidia_gpus,
    tpu_finding,
    who_holds,
)
from keras_effnet.tpu.doctor.finding import Finding
from keras_effnet.tpu.doctor.hosts import hosts
from keras_effnet.tpu.doctor.memory import disk, memory, processors
from keras_effnet.tpu.doctor.strategies import strategy_of_jax, strategy_of_tensorflow
from keras_effnet.tpu.doctor.versions import ROWS, compare, extras, installed


def examine(run: Run | None = None, devices: Sequence[str] = DEVICES) -> list[Finding]:
    """Checks this machine: versions, backends, devices, hosts, memory and disks.

    TensorFlow, Keras and JAX are imported in separate processes. A TPU that another process holds is left alone.

    Args:
        run: `Run`, how training would run. Defaults to None: `Run()`.
        devices: Patterns of the TPU's device files. Defaults to those of Cloud TPU.

    Returns:
        List of `Finding`. The one named Strategy says which devices training would use.

    Example:

    >>> [finding for finding in examine() if finding.verdict == "problem"]  # doctest: +SKIP
    []
    """
    run = run or Run()
    versions, requires = installed()
    chips = chips_of(devices)
    holders = who_holds(chips)
    backend, told_by = keras_backend()
    here = [name for name in IMPORTED if is_here(name)]
    subjects = _by_process(here, backend)
    with ThreadPoolExecutor() as pool:
        smi = pool.submit(nvidia_gpus)
        group = pool.submit(hosts, backend)
        answers: dict[str, dict] = {}
        for answer in pool.map(lambda some: ask(some, backend, bool(holders)), subjects):
            answers |= answer
    workers, config = group.result()

    packages = {row.what: row for row in compare(versions, requires, bool(chips), backend)}
    answers = _with_missing_files(answers, packages, here, backend)
    packages = _with_answers(packages, answers, versions, backend)
    tensorflow, jax = answers.get("tensorflow", {}), answers.get("jax", {})
    gpus = tensorflow.get("gpus") if backend == "tensorflow" else None
    on_tpu = "tensorflow-tpu" in versions
    broken = [name for name in dict.fromkeys(("tensorflow", backend)) if "error" in answers.get(name, {})]
    training = training_finding(backend, broken, on_tpu)
    sees = jax_devices(jax, bool(chips), bool(holders), on_tpu)
    if backend == "jax":
        chosen = strategy_of_jax(run, jax.get("devices", []), bool(chips), sees, workers, training)
    else:
        chosen = strategy_of_tensorflow(run, bool(chips), gpus, workers, training)
    return [
        Finding("Python", platform.python_version(), "ok"),
        *extras(versions, requires),
        *packages.values(),
        backend_finding(backend, told_by),
        tpu_finding(chips, holders),
        gpu_finding(smi.result(), gpus),
        sees,
        Finding("Processors", str(processors()), "ok"),
        memory(),
        disk("Disk, this folder", Path.cwd(), "Free up space, or change to another folder"),
        disk("Disk, weights", cache.home(), "Free up space, or set KERAS_EFFNET_HOME to another folder"),
        config,
        training,
        chosen,
    ]


def _by_process(here: Sequence[str], backend: str) -> list[list[str]]:
    """Returns the modules to import in each process. Keras joins TensorFlow if that is its backend."""
    keras = ["keras"] if "keras" in here and is_here(backend) else []
    subjects = [["tensorflow", *keras] if backend == "tensorflow" else ["tensorflow"]] if "tensorflow" in here else []
    subjects += [keras] if keras and backend != "tensorflow" else []
    subjects += [["jax"]] if "jax" in here else []
    return subjects


def _with_missing_files(
    answers: Mapping[str, dict], packages: Mapping[str, Finding], here: Sequence[str], backend: str
) -> dict[str, dict]:
    """Adds an error for each package that has metadata but no module."""
    missing = [name for name, row in IMPORTED.items() if name not in here and packages[row].found != "not installed"]
    answers = {**answers, **{name: {"error": "its files are missing"} for name in missing}}
    if "error" in answers.get(backend, {}):
        answers.pop("keras", None)  # it fails for the same reason
    return answers


def _with_answers(
    packages: Mapping[str, Finding], answers: Mapping[str, dict], versions: Mapping[str, str], backend: str
) -> dict[str, Finding]:
    """Replaces the findings of the packages that were imported."""
    found = dict(packages)
    for name, row in IMPORTED.items():
        if name in answers:
            distribution = next((known for known in ROWS[row] if known in versions), name)
            needed = name != "jax" or backend == "jax"
            found[row] = started(found[row], answers[name], distribution, needed)
    return found

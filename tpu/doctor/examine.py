"""What runs on this machine, what would be trained on, and what to do about what does not run."""

import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    strategy_of_jax,
    strategy_of_tensorflow,
    tpu_finding,
    who_holds,
)
from keras_effnet.tpu.doctor.finding import Finding
from keras_effnet.tpu.doctor.hosts import hosts
from keras_effnet.tpu.doctor.memory import disk, memory, processors
from keras_effnet.tpu.doctor.versions import ROWS, compare, extras, installed
from keras_effnet.weights import store


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
    versions, requires = installed()
    chips = chips_of(devices)
    holders = who_holds(chips)
    backend, told_by = keras_backend()
    here = [name for name in IMPORTED if is_here(name)]
    keras = ["keras"] if "keras" in here and is_here(backend) else []
    subjects = [["tensorflow", *keras] if backend == "tensorflow" else ["tensorflow"]] if "tensorflow" in here else []
    subjects += [keras] if keras and backend != "tensorflow" else []
    subjects += [["jax"]] if "jax" in here else []
    with ThreadPoolExecutor() as pool:
        smi = pool.submit(nvidia_gpus)
        group = pool.submit(hosts, backend)
        answers: dict[str, dict] = {}
        for answer in pool.map(lambda some: ask(some, backend, bool(holders)), subjects):
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
            packages[row] = started(packages[row], answers[name], distribution, needed)
    gpus = answers.get("tensorflow", {}).get("gpus") if backend == "tensorflow" else None
    broken = [name for name in dict.fromkeys(("tensorflow", backend)) if "error" in answers.get(name, {})]
    training = training_finding(backend, broken, "tensorflow-tpu" in versions)
    sees = jax_devices(answers.get("jax", {}), bool(chips), bool(holders), "tensorflow-tpu" in versions)
    if backend == "jax":
        chosen = strategy_of_jax(run, answers.get("jax", {}).get("devices", []), bool(chips), sees, workers, training)
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
        disk("Disk, this folder", Path.cwd(), "Change to a folder with room, or make some"),
        disk("Disk, weights", store.home(), "Make room, or set KERAS_EFFNET_HOME to another folder"),
        config,
        training,
        chosen,
    ]

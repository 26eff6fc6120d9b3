"""Reports the devices that training would use, and how it would distribute over them."""

import os
from collections.abc import Sequence

from keras_effnet.tpu.config import Run
from keras_effnet.tpu.doctor.backends import is_here
from keras_effnet.tpu.doctor.finding import Finding


def strategy(run: Run, tpu: bool = False, gpus: int = 0, workers: int = 1) -> str:
    """Returns the strategy of a run, as `connect()` in tpu/runners/tensorflow_runner.py chooses it.

    Args:
        run: `Run`.
        tpu: Boolean, whether there is a TPU and libtpu is installed. Defaults to False.
        gpus: Integer, number of GPUs that TensorFlow sees. Defaults to 0.
        workers: Integer, number of workers in TF_CONFIG. Defaults to 1.

    Returns:
        String, the name of a `tf.distribute.Strategy` and its devices.

    Raises:
        ValueError: If the requested devices do not exist, or the settings exclude each other.

    Example:

    >>> strategy(Run(), gpus=2)
    'MirroredStrategy on GPU:0, GPU:1'
    >>> strategy(Run(devices="cpu"), gpus=2)
    'OneDeviceStrategy on CPU:0'
    """
    if run.devices == "tpu" and not tpu:
        raise ValueError("Expected a TPU and libtpu (run.devices). Received: none. Choose another run.devices")
    if tpu and run.devices in ("auto", "tpu"):
        if workers > 1:
            raise ValueError(f"Expected no TF_CONFIG with a TPU. Received: one with {workers} workers. Unset it")
        return "TPUStrategy"
    if run.devices == "gpu" and not gpus:
        raise ValueError(
            "Expected a GPU that TensorFlow sees (run.devices). Received: none. Choose another run.devices"
        )
    if gpus and run.devices != "cpu" and run.cpu_replicas == 1:
        names = [f"GPU:{number}" for number in range(gpus)]
    else:
        names = [f"CPU:{number}" for number in range(run.cpu_replicas)]
    if workers > 1 and run.cpu_replicas > 1:
        raise ValueError(
            f"Expected run.cpu_replicas=1 with {workers} workers. Received: {run.cpu_replicas}. Set it to 1"
        )
    if workers > 1:
        return f"MultiWorkerMirroredStrategy of {workers} workers on {', '.join(names)} of each"
    return f"{'MirroredStrategy' if len(names) > 1 else 'OneDeviceStrategy'} on {', '.join(names)}"


def strategy_of_tensorflow(run: Run, tpu: bool, gpus: int | None, workers: int, training: Finding) -> Finding:
    """Reports the strategy of a run on TensorFlow, as `strategy()` chooses it."""
    if training.verdict == "problem":
        return Finding("Strategy", "none", "none", "See Training")
    tpu = is_here("libtpu") and (tpu or bool(os.environ.get("TPU_NAME")))  # as the runner decides it
    try:
        return Finding("Strategy", strategy(run, tpu, gpus or 0, workers), "ok")
    except ValueError as error:
        return Finding("Strategy", "none", "problem", str(error))


def strategy_of_jax(
    run: Run, devices: Sequence[str], chips: bool, sees: Finding, workers: int, training: Finding
) -> Finding:
    """Reports the devices of a run on JAX, as `connect()` in tpu/runners/jax_runner.py chooses them."""
    if training.verdict == "problem":
        return Finding("Strategy", "none", "none", "See Training")
    if chips and "tpu" not in devices and run.devices in ("auto", "tpu") and run.cpu_replicas == 1:
        return Finding("Strategy", "the TPU, which JAX did not try or does not see", sees.verdict, "See JAX sees")
    wanted = (devices[0] if devices else "device") if run.devices == "auto" else run.devices
    if wanted not in devices:
        seen = ", ".join(devices) or "none"
        advice = (
            f"Expected a {wanted.upper()} that JAX sees (run.devices). Received: {seen}. Choose another run.devices"
        )
        return Finding("Strategy", "none", "problem", advice)
    count = run.cpu_replicas if run.cpu_replicas > 1 else devices.count(wanted)
    found = f"JAX, data parallel on {count} {wanted}" + (f" of each of {workers} processes" if workers > 1 else "")
    return Finding("Strategy", found, "ok")

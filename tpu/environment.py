"""Reads from the environment whether there is a TPU, and the processes of a run."""

import os
from glob import glob
from importlib.util import find_spec


def has_tpu() -> bool:
    """Returns whether libtpu is installed, and this machine has a TPU or the environment names one.

    Returns:
        Boolean.
    """
    named = os.environ.get("TPU_NAME") or glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*")
    return bool(find_spec("libtpu") and named)


def without_tpu() -> None:
    """Keeps libtpu quiet on a machine without a TPU.

    Otherwise it queries the network for the kind of machine, and only one process at a time can use it.
    """
    if has_tpu():
        return
    values = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost"}
    values |= {"WORKER_ID": "0", "LOG_DIR": "disabled", "MIN_LOG_LEVEL": "3", "STDERR_LOG_LEVEL": "3"}
    for name, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **{f"TPU_{name}": values[name] for name in values}}.items():
        os.environ.setdefault(name, value)


def processes() -> tuple[str, int, int] | None:
    """Reads the processes of a run on JAX from Keras' variables KERAS_DISTRIBUTION_*.

    Returns:
        Tuple of the address of the first process, the number of this one and their count. None if no variable is set.

    Raises:
        ValueError: If only some of the variables are set, or this process' number is out of range.
    """
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    addresses, count, index = values = [os.environ.get(f"KERAS_DISTRIBUTION_{name}", "") for name in names]
    if not any(values):
        return None
    if not (addresses and count.isdecimal() and index.isdecimal()):
        raise ValueError(
            "Expected KERAS_DISTRIBUTION_JOB_ADDRESSES=host:port of the first process, _NUM_PROCESSES and _PROCESS_ID. "
            f"Received: {', '.join(map(repr, values))}"
        )
    if int(index) >= int(count):
        raise ValueError(
            f"Expected KERAS_DISTRIBUTION_PROCESS_ID from 0 to {int(count) - 1}, of _NUM_PROCESSES={count}. "
            f"Received: {index}"
        )
    return addresses.split(",")[0], int(index), int(count)

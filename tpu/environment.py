"""What the environment says of the devices: a TPU, and the other processes of a run."""

import os
from glob import glob
from importlib.util import find_spec


def has_tpu() -> bool:
    """Whether this machine has a TPU, and its library; or the environment names one.

    Returns:
        Boolean.
    """
    named = os.environ.get("TPU_NAME") or glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*")
    return bool(find_spec("libtpu") and named)


def without_tpu() -> None:
    """Keeps libtpu quiet on a machine that has no TPU.

    It would ask the network what machine this is, and belong to one process at a time.
    """
    if has_tpu():
        return
    told = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost"}
    told |= {"WORKER_ID": "0", "LOG_DIR": "disabled", "MIN_LOG_LEVEL": "3", "STDERR_LOG_LEVEL": "3"}
    for name, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **{f"TPU_{name}": told[name] for name in told}}.items():
        os.environ.setdefault(name, value)


def processes() -> tuple[str, int, int] | None:
    """Who the processes of a run on JAX are, by Keras' variables KERAS_DISTRIBUTION_*.

    Returns:
        Tuple of the first one's address, this one's number and how many there are. None where nothing is said.

    Raises:
        ValueError: If the environment says half of it, or a number that is none of theirs.
    """
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    addresses, count, index = told = [os.environ.get(f"KERAS_DISTRIBUTION_{name}", "") for name in names]
    if not any(told):
        return None
    if not (addresses and count.isdecimal() and index.isdecimal()):
        raise ValueError(
            "Expected KERAS_DISTRIBUTION_JOB_ADDRESSES=host:port of the first process, _NUM_PROCESSES and _PROCESS_ID. "
            f"Received: {', '.join(map(repr, told))}"
        )
    if int(index) >= int(count):
        raise ValueError(
            f"Expected KERAS_DISTRIBUTION_PROCESS_ID from 0 to {int(count) - 1}, of _NUM_PROCESSES={count}. "
            f"Received: {index}"
        )
    return addresses.split(",")[0], int(index), int(count)

"""The JAX runner: finds the devices of all hosts and connects the model, data, trainer and checkpoints to them."""

import atexit
import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import tensorflow as tf
from jax.sharding import Mesh, NamedSharding

from keras_effnet import cache
from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.environment import has_tpu, processes, without_tpu
from keras_effnet.tpu.input.pipeline import Host
from keras_effnet.tpu.resume.orbax_folders import Folders
from keras_effnet.tpu.runners.eval_loop import Evaluator
from keras_effnet.tpu.runners.jax_convolutions import (
    AllExpertsCondConv2D,
    ShiftedDepthwiseCondConv2D,
    ShiftedDepthwiseConv2D,
)
from keras_effnet.tpu.runners.jax_fused import fuse, units
from keras_effnet.tpu.runners.jax_step import EACH, make_mesh, score_step
from keras_effnet.tpu.runners.jax_step import gradient as gradient
from keras_effnet.tpu.runners.jax_step import train_step as train_step
from keras_effnet.tpu.runners.jax_trainer import Kept, Trainer, upgraded
from keras_effnet.tpu.step.cross_replica import group_size, spread
from keras_effnet.tpu.step.train_step import Learner

NAME = "jax"

WAITS = True  # an ending process waits for hosts that are gone

PATIENCE = 24 * 3600  # seconds that an ending host waits for the others; a host that dies is noticed earlier

# Errors raised when devices or other hosts fail.
ERRORS = (jax.errors.JaxRuntimeError,)


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Args:
        mesh: `jax.sharding.Mesh` with the axes `jax_step.AXES`, of the devices of all hosts.
        hosts: Integer, number of processes that each drive some of the replicas.
    """

    mesh: Mesh
    hosts: int
    strategy: None = None
    """Orbit gets no strategy: it only counts steps."""

    @property
    def count(self) -> int:
        """The number of replicas on all hosts."""
        return self.mesh.size

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs."""
        return self.mesh.devices.flat[0].platform == "tpu"

    @property
    def capability(self) -> tuple[int, int]:
        """The lowest compute capability of the GPUs in use. (0, 0) for other devices."""
        texts = [str(getattr(device, "compute_capability", "")) for device in self.mesh.devices.flat]
        found = [re.fullmatch(r"(\d+)\.(\d+)", text) for text in texts]  # not of AMD's, such as gfx90a
        return min((int(one[1]), int(one[2])) if one else (0, 0) for one in found)

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to build a model and its state: on the host's processor, if JAX may use it."""
        try:
            return jax.default_device(jax.local_devices(backend="cpu")[0])
        except RuntimeError:  # JAX_PLATFORMS=tpu
            return contextlib.nullcontext()

    def adapted(self, model: keras.Model, group: int, fused: str | Collection[str] = "none") -> keras.Model:
        """Adapts a model for training on these devices.

        Args:
            model: A functional `keras.Model` of this package.
            group: Integer, number of replicas that share batch statistics.
            fused: Layers to fuse, as `Run.fused` or a collection of names of `jax_fused.UNITS`. Defaults to `"none"`.

        Returns:
            A `keras.Model` with variables of the same names and order.
        """
        on_processor = self.mesh.devices.flat[0].platform == "cpu"
        instead: dict[type, type] = {DepthwiseCondConv2D: ShiftedDepthwiseCondConv2D}
        instead |= {keras.layers.DepthwiseConv2D: ShiftedDepthwiseConv2D} if on_processor else {}
        instead |= {CondConv2D: AllExpertsCondConv2D} if self.is_tpu else {}
        model = spread(model, group if self.count > 1 else None, instead, one_pass=fused != "none")
        return model if fused == "none" else fuse(model, units(fused) if isinstance(fused, str) else fused)

    def total(self, value: int) -> int:
        """Sums a number over all processes.

        Args:
            value: Integer, the number of this process.

        Returns:
            Integer.
        """
        if self.hosts == 1:
            return value
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.asarray(value)).sum())

    def batches(self, part: Callable[[Host, int, bool], tf.data.Dataset]) -> Iterable:
        """Returns the batches of all hosts, on their devices.

        Args:
            part: Function that returns a `tf.data.Dataset`. Its arguments are a `Host`, the number of parts of each
                batch (here 1), and whether the reading host runs Python (here True).

        Returns:
            Iterable of batches.
        """
        return _Fed(self.mesh, part(Host(jax.process_index(), self.hosts), 1, True))

    def variables(self, learner: Learner) -> "Kept":
        """Puts the initial state of a training on all devices.

        Args:
            learner: `Learner`.

        Returns:
            `Kept`.
        """
        return Kept(learner, self.mesh)

    def trainer(self, learner, state: "Kept", step, batches, batch: int, xla: bool = False) -> "Trainer":
        """Returns a `Trainer`. `xla` has no effect: JAX always compiles."""
        return Trainer(self.mesh, learner, state, step, batches, batch)

    def evaluator(self, learner: Learner, state: "Kept", trainer: "Trainer", batches, raw: bool) -> Evaluator:
        """Returns the evaluator of a run.

        Args:
            learner: `Learner`.
            state: `Kept`.
            trainer: `Trainer`. Asking it to stop also stops the evaluation.
            batches: Function without arguments that returns an iterator of batches.
            raw: Boolean, whether to evaluate the raw weights in addition to their moving average.

        Returns:
            `Evaluator`.
        """
        one = score_step(learner, self.mesh, raw)

        def score(*batch):
            now = state.state
            return one(now.trainable, now.moving, now.averages, *batch, trainer.stop.value)

        return Evaluator(score, batches)

    def files(self, step, trainer: "Trainer", learner: Learner, state: "Kept") -> Folders:
        """Returns the reader and writer of checkpoints.

        Args:
            step: `tf.Variable`, the number of steps done.
            trainer: `Trainer`.
            learner: `Learner`.
            state: `Kept`.

        Returns:
            `Folders`.
        """

        def take():
            return {"step": np.asarray(step.numpy()), "totals": trainer.totals, "state": state.by_path()}

        def give(tree):
            step.assign(int(tree["step"]))
            trainer.totals = np.asarray(tree["totals"])
            state.assign(tree["state"])

        return Folders(take, give, lambda tree: upgraded(tree, learner.scales_loss))


class _Fed:
    """A host's batches as arrays over all devices."""

    def __init__(self, mesh: Mesh, dataset: tf.data.Dataset):
        self._where, self._dataset = NamedSharding(mesh, EACH), dataset

    def __iter__(self) -> Iterator:
        for batch in self._dataset.as_numpy_iterator():
            yield tuple(jax.make_array_from_process_local_data(self._where, part) for part in batch)


def connect(run: Run) -> Devices:
    """Finds the devices of a run and prepares JAX for them.

    Args:
        run: `Run`.

    Returns:
        `Devices`: all TPU chips, all GPUs, or the processors of all hosts.

    Raises:
        ValueError: If the requested devices do not exist, or do not support `run.fused`.
    """
    _, hosts = place()
    without_tpu()
    _configure(run)
    found = _found(run, hosts)
    # Cache compiled steps, which take minutes. Not for processors: another of the same kind may not run the program.
    if found[0].platform != "cpu" and not getattr(jax.config, "jax_compilation_cache_dir", None):
        with contextlib.suppress(OSError):  # a folder that cannot be used
            _keep_programs(cache.folder("jax"))
    return Devices(make_mesh(found, group_size(len(found), run.batch_norm_group)), hosts)


def _keep_programs(place: Path) -> None:
    """Lets JAX keep compiled programs in a folder."""
    cache.remove_damaged(place, "*-cache")
    jax.config.update("jax_compilation_cache_dir", str(place))
    atexit.register(cache.trim)
    atexit.register(cache.record_sums, place, "*-cache")


def _configure(run: Run) -> None:
    """Sets what TensorFlow and JAX must know before they are first used."""
    # TensorFlow only reads data: a device belongs to one process, and there to one library.
    with contextlib.suppress(RuntimeError):  # TensorFlow was used in this process
        tf.config.set_visible_devices([], "GPU")
    if run.devices != "auto":
        jax.config.update(
            "jax_platforms", {"gpu": "cuda"}.get(run.devices, run.devices) + ",cpu" * (run.devices != "cpu")
        )
    if run.cpu_replicas > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX was used in this process
            jax.config.update("jax_num_cpu_devices", run.cpu_replicas)
    if run.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def _found(run: Run, hosts: int) -> list[Any]:
    """Returns the devices that `run` asks for, or raises."""
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"Expected a device that JAX can use (run.devices={run.devices!r}). Received: {error}"
        ) from error
    if run.devices in ("tpu", "gpu") and found[0].platform != run.devices:
        raise ValueError(
            f"Expected a {run.devices.upper()} that JAX can use (run.devices). Received: only {found[0].platform}"
        )
    if run.cpu_replicas > 1 or run.devices == "cpu":
        found = jax.devices("cpu")
    if jax.process_count() != hosts:
        raise ValueError(f"Expected JAX to connect {hosts} hosts. Received: {jax.process_count()}")
    if run.cpu_replicas > 1 and len(found) != run.cpu_replicas * hosts:
        raise ValueError(
            f"Expected run.cpu_replicas={run.cpu_replicas} before JAX is used in this process. Received: "
            f"{len(found)}, because JAX is already in use"
        )
    if run.fused == "kernels" and found[0].platform != "tpu":
        raise ValueError(f"Expected a TPU for --run.fused kernels. Received: {found[0].platform}. Nearest: layers")
    return found


def place() -> tuple[int, int]:
    """Returns the number of this host and the number of hosts. Host 0 writes.

    Hosts connect through KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID. A Cloud TPU needs none of
    them, because JAX queries the machine.

    Returns:
        Tuple of two integers.

    Raises:
        ValueError: If only some of these variables are set.
    """
    named = processes()
    if named and named[2] > 1:
        first, host, hosts = named
        if not jax.distributed.is_initialized():
            # As keras.distribution.initialize(), except for the time that an ending host waits for the others.
            jax.distributed.initialize(first, hosts, host, shutdown_timeout_seconds=PATIENCE)
        return host, hosts  # without asking JAX, which would select the devices before connect() does
    alone = named or not has_tpu() or "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu")
    if not alone and not jax.distributed.is_initialized():
        with contextlib.suppress(ValueError):  # the machine knows of no other hosts
            jax.distributed.initialize(shutdown_timeout_seconds=PATIENCE)
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "heartbeat", "onnection", "oordination", "peer")


def is_lost(error: Exception) -> bool:
    """Returns whether an error means that another host has ended.

    Args:
        error: Exception.

    Returns:
        Boolean.
    """
    # In small programs, the processor's client raises a ValueError instead.
    signs = _LOST if isinstance(error, ERRORS) else ("Gloo",) if isinstance(error, ValueError) else ()
    return any(sign in str(error) for sign in signs) and place()[1] > 1

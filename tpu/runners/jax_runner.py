"""The step of `Learner` on one device or many with JAX, as orbit's trainer and evaluator."""

import collections
import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import orbit
import tensorflow as tf
from jax.extend.random import threefry2x32_p
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_effnet.nets.condconv import CondConv2D, DepthwiseCondConv2D
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.environment import has_tpu, processes, without_tpu
from keras_effnet.tpu.input.pipeline import Host
from keras_effnet.tpu.resume.orbax_folders import Folders
from keras_effnet.tpu.resume.stops import Asked, NonFiniteError
from keras_effnet.tpu.runners.eval_loop import Evaluator
from keras_effnet.tpu.runners.jax_convolutions import (
    AllExpertsCondConv2D,
    ShiftedDepthwiseCondConv2D,
    ShiftedDepthwiseConv2D,
)
from keras_effnet.tpu.runners.jax_fused import fuse, units
from keras_effnet.tpu.step.learner import METRICS, Learner, State
from keras_effnet.tpu.step.replicas import Place, group_size, spread
from keras_effnet.weights import store

NAME = "jax"

WAITS = True  # at a process' end, for hosts that are gone

PATIENCE = 24 * 3600  # seconds in which the last host has to come to its end; one that dies is noticed before

# What devices and other hosts end a run with.
ERRORS = (jax.errors.JaxRuntimeError,)

# Groups of replicas that share batch statistics, and the replicas in one.
AXES = ("group", "member")

ALL, EACH = PartitionSpec(), PartitionSpec(AXES)

AHEAD = 2  # steps that are handed to the devices before the first of them is looked at


@dataclass(frozen=True)
class Devices:
    """What a run computes on.

    Args:
        mesh: `jax.sharding.Mesh` with the axes `AXES`, of the devices of all hosts.
        hosts: Integer, processes that each drive some of the replicas.
    """

    mesh: Mesh
    hosts: int
    strategy: None = None
    """Orbit is told of no devices: it only counts."""

    @property
    def count(self) -> int:
        """Replicas, on all hosts."""
        return self.mesh.size

    @property
    def is_tpu(self) -> bool:
        """Whether they are TPUs."""
        return self.mesh.devices.flat[0].platform == "tpu"

    def scope(self) -> contextlib.AbstractContextManager:
        """Where a model and what goes with it are made: on the host, where it may be used."""
        try:
            return jax.default_device(jax.local_devices(backend="cpu")[0])
        except RuntimeError:  # JAX_PLATFORMS=tpu
            return contextlib.nullcontext()

    def adapted(self, model: keras.Model, group: int, fused: str | Collection[str] = "none") -> keras.Model:
        """A model as it is trained on these devices.

        Args:
            model: A functional `keras.Model` of this package.
            group: Integer, replicas that share their batch statistics.
            fused: What is one, as `Run.fused`; or a collection of names of `jax_fused.UNITS`. Defaults to `"none"`.

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
        """The sum of a number of each process' over all of them.

        Args:
            value: Integer, this process'.

        Returns:
            Integer.
        """
        if self.hosts == 1:
            return value
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.asarray(value)).sum())

    def batches(self, part: Callable[[Host, int, bool], tf.data.Dataset]) -> Iterable:
        """What each host reads, on its devices.

        Args:
            part: Function of a `Host`, of the parts that make its batch, one here, and of whether Python runs where
                it is read, which it does. It gives a `tf.data.Dataset`.

        Returns:
            Iterable of batches.
        """
        return _Fed(self.mesh, part(Host(jax.process_index(), self.hosts), 1, True))

    def variables(self, learner: Learner) -> "Kept":
        """Arrays of all that a step changes, on all devices.

        Args:
            learner: `Learner`.

        Returns:
            `Kept`.
        """
        return Kept(learner, self.mesh)

    def trainer(self, learner, state: "Kept", step, batches, batch: int, xla: bool = False) -> "Trainer":
        """See `Trainer`. It is compiled in any case."""
        return Trainer(self.mesh, learner, state, step, batches, batch)

    def evaluator(self, learner: Learner, state: "Kept", trainer: "Trainer", batches, raw: bool) -> Evaluator:
        """What evaluates a run.

        Args:
            learner: `Learner`.
            state: `Kept`.
            trainer: `Trainer`, which is asked to stop.
            batches: Function without arguments that gives an iterator of batches.
            raw: Boolean, whether the variables themselves are evaluated too, and not only their moving average.

        Returns:
            `Evaluator`.
        """
        one = score_step(learner, self.mesh, raw)

        def score(*batch):
            now = state.state
            return one(now.trainable, now.moving, now.averages, *batch, trainer.stop.value)

        return Evaluator(score, batches)

    def files(self, step, trainer: "Trainer", learner: Learner, state: "Kept") -> Folders:
        """How checkpoints of it are written and read.

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

        return Folders(take, give)


class _Fed:
    """Batches of a host as arrays over all devices."""

    def __init__(self, mesh: Mesh, dataset: tf.data.Dataset):
        self._where, self._dataset = NamedSharding(mesh, EACH), dataset

    def __iter__(self) -> Iterator:
        for batch in self._dataset.as_numpy_iterator():
            yield tuple(jax.make_array_from_process_local_data(self._where, part) for part in batch)


def connect(run: Run) -> Devices:
    """The devices of a run.

    Args:
        run: `Run`.

    Returns:
        `Devices`: all TPU chips, all GPUs, or the processors; of all hosts, where there are several.

    Raises:
        ValueError: If the devices that are asked for are not there, or not those that `run.fused` is for.
    """
    _, hosts = place()
    without_tpu()
    # TensorFlow only reads: a device belongs to one process, and in it to one library.
    with contextlib.suppress(RuntimeError):  # it was used in this process
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
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"Expected a device that JAX can use (run.devices={run.devices!r}). Received: {error}"
        ) from error
    if run.devices in ("tpu", "gpu") and found[0].platform != run.devices:
        raise ValueError(
            f"Expected a {run.devices.upper()} that JAX can use (run.devices). Received: {found[0].platform} alone"
        )
    if run.cpu_replicas > 1 or run.devices == "cpu":
        found = jax.devices("cpu")
    if jax.process_count() != hosts:
        raise ValueError(f"Expected {jax.process_count()} hosts that know of each other. Received: {hosts}")
    if run.cpu_replicas > 1 and len(found) != run.cpu_replicas * hosts:
        raise ValueError(
            f"Expected run.cpu_replicas={run.cpu_replicas} before JAX is used in a process. Received: it has "
            f"{len(found)} devices"
        )
    if run.fused == "kernels" and found[0].platform != "tpu":
        raise ValueError(f"Expected a TPU with --run.fused kernels. Received: {found[0].platform}; nearest: layers")
    # A step compiles for minutes: once. What is compiled for a processor may not run on another one of its kind.
    if found[0].platform != "cpu" and not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(store.home() / "jax"))
    return Devices(make_mesh(found, group_size(len(found), run.batch_norm_group)), hosts)


def make_mesh(devices, group: int) -> Mesh:
    """Devices as groups that share batch statistics.

    Args:
        devices: Sequence of JAX devices.
        group: Integer, how many share their batch statistics.

    Returns:
        `jax.sharding.Mesh` with the axes `AXES`.
    """
    return Mesh(np.asarray(devices).reshape(-1, group), AXES)


def place() -> tuple[int, int]:
    """Which of the hosts this is, and how many there are. Number 0 writes.

    Hosts find each other by KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID; on a Cloud TPU, where
    JAX asks the machine, without.

    Returns:
        Tuple of two integers.

    Raises:
        ValueError: If the environment says half of it.
    """
    told = processes()
    if told and told[2] > 1:
        first, host, hosts = told
        if not jax.distributed.is_initialized():
            # As keras.distribution.initialize(), but for the time that a host waits at its end for the others.
            jax.distributed.initialize(first, hosts, host, shutdown_timeout_seconds=PATIENCE)
        return host, hosts  # to ask JAX would choose the devices, which connect() does
    alone = told or not has_tpu() or "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu")
    if not alone and not jax.distributed.is_initialized():
        with contextlib.suppress(ValueError):  # a machine that knows of no others
            jax.distributed.initialize(shutdown_timeout_seconds=PATIENCE)
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "heartbeat", "onnection", "oordination", "peer")


def is_lost(error: Exception) -> bool:
    """Whether an error is that of another host's end.

    Args:
        error: Exception.

    Returns:
        Boolean.
    """
    # ValueError is what the processor's client makes of it, in small programs.
    signs = _LOST if isinstance(error, ERRORS) else ("Gloo",) if isinstance(error, ValueError) else ()
    return any(told in str(error) for told in signs) and place()[1] > 1


class Kept:
    """All that a step changes, on all devices.

    Args:
        learner: `Learner`.
        mesh: `jax.sharding.Mesh`.
    """

    def __init__(self, learner: Learner, mesh: Mesh):
        self._learner, self._where = learner, NamedSharding(mesh, ALL)
        self.state = self._put(learner.start())

    def _put(self, state: State) -> State:
        # Each host puts what is its own: jax.device_put() would compare all values over the network.
        def put(value):
            value = np.asarray(value)
            return jax.make_array_from_callback(value.shape, self._where, lambda index: value[index])

        return jax.tree.map(put, state)

    def by_path(self) -> dict[str, Any]:
        """A nested dict of arrays, by the parts of the variables' paths.

        Returns:
            Nested dict of NumPy arrays.
        """
        state = jax.tree.map(np.asarray, self.state)
        return {kind: _nested(some) for kind, some in self._learner.by_name(state).items()}

    def assign(self, tree: dict[str, Any]) -> None:
        """Takes what `by_path()` gave.

        Args:
            tree: Nested dict of arrays.
        """
        leaves, form = jax.tree.flatten(self.state)
        places = self._learner.by_name(jax.tree.unflatten(form, range(len(leaves))))
        found = {place: _at(tree[kind], name) for kind, some in places.items() for name, place in some.items()}
        self.state = self._put(jax.tree.unflatten(form, [found[place] for place in range(len(leaves))]))

    @property
    def averages(self) -> list[np.ndarray]:
        """See `State`."""
        return [np.asarray(value) for value in self.state.averages]


def _keys(name: str) -> list[str]:
    return name.replace(":", "/").split("/")


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = _keys(name)
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[leaf] = value
    return tree


def _at(tree: dict[str, Any], name: str) -> Any:
    for key in _keys(name):
        tree = tree[key]
    return tree


def gradient(function: Callable, values):
    """What a function does, whose first part is a scalar, and that scalar's gradients.

    Args:
        function: Function of a list of arrays.
        values: List of arrays.

    Returns:
        Tuple of what the function does, and a list of arrays.
    """

    def scalar_first(values):
        told = function(values)
        return told[0], told

    (_, told), gradients = jax.value_and_grad(scalar_first, has_aux=True)(values)
    return told, gradients


def _here(mesh: Mesh) -> Place:
    index = jax.lax.axis_index(AXES)
    return Place(
        mesh.size,
        index,
        lambda values: jax.lax.psum(values, AXES),
        lambda values, group: jax.lax.pmean(values, "member"),
        partial(_own_part, index) if _counts() else None,
    )


def _counts() -> bool:
    """Whether JAX draws each random number from the key and the number's place, as it does unless told otherwise."""
    config: Any = jax.config
    return config.jax_threefry_partitionable and config.jax_default_prng_impl == "threefry2x32"


def _own_part(index, seed, rate: float, shape: tuple[int, ...], dtype):
    """A replica's rows of the global batch's mask, bit by bit, without those of the others.

    What `jax.random.bernoulli` computes: 23 bits of what becomes of a place under the key, as a number below 1.
    """
    count = math.prod(shape)
    place = jnp.uint32(index) * np.uint32(count) + jax.lax.iota("uint32", count).reshape(shape)
    high, low = threefry2x32_p.bind(*jnp.broadcast_arrays(seed[0], seed[1], jnp.uint32(0), place))
    kept = ((high ^ low) >> 9).astype("float32") * 2**-23 < 1 - rate
    return jnp.where(kept, jnp.ones((), dtype) / (1 - rate), 0)


def train_step(learner: Learner, mesh: Mesh, batch: int) -> Any:
    """The training step, compiled when it is first called; or lowered for devices that are not here.

    Args:
        learner: `Learner`.
        mesh: `jax.sharding.Mesh` with the axes `AXES`.
        batch: Integer, images of the global batch.

    Returns:
        Jitted function of a `State`, which it consumes, of images and labels, divided over the devices, of the number
        of steps done before, and of one number per device, above 0 to stop. It gives the `State` after the step, and
        one array: the means of `METRICS` over the batch, and the sum of the last argument.

    Example:

    >>> compiled = train_step(learner, mesh, 1024).lower(state, images, labels, number, stop)  # doctest: +SKIP
    """

    def part(state, images, labels, number, stop):
        here = _here(mesh) if mesh.size > 1 else None
        after, metrics = learner.train(state, images, labels, number, batch, gradient, here)
        told = jnp.stack([*(metrics[name] for name in METRICS), stop[0]])
        return after, jax.lax.psum(told, AXES)

    # What is the same everywhere is not checked: gradients are summed here, as losses are shares.
    step = jax.shard_map(part, mesh=mesh, in_specs=(ALL, EACH, EACH, ALL, EACH), out_specs=(ALL, ALL), check_vma=False)
    return jax.jit(step, donate_argnums=0)


def score_step(learner: Learner, mesh: Mesh, raw: bool) -> Any:
    """The step of an evaluation, compiled when it is first called; or lowered for devices that are not here.

    Args:
        learner: `Learner`.
        mesh: `jax.sharding.Mesh` with the axes `AXES`.
        raw: Boolean, whether the variables themselves are evaluated too, and not only their moving average.

    Returns:
        Jitted function of the lists `trainable`, `moving` and `averages` of a `State`, of images, labels and weights,
        divided over the devices, and of one number per device. It gives a dict of sums over the batch.
    """

    def part(trainable, moving, averages, images, labels, weights, stop):
        split = len(trainable)
        sums = learner.score(averages[:split], averages[split:], images, labels, weights)
        sums = {f"ema_{name}": value for name, value in sums.items()}
        if raw:
            sums |= learner.score(trainable, moving, images, labels, weights)
        return jax.lax.psum(sums | {"examples": jnp.sum(weights), "asked": stop[0]}, AXES)

    specs = (ALL, ALL, ALL, EACH, EACH, EACH, EACH)
    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=ALL, check_vma=False))


class _Stop:
    """A number on each device, above 0 once this process is asked to stop."""

    def __init__(self, mesh: Mesh):
        self._where, self._here = NamedSharding(mesh, EACH), len(mesh.local_devices)
        self.assign(0.0)

    def assign(self, value: float) -> None:
        self.value = jax.make_array_from_process_local_data(self._where, np.full(self._here, value, np.float32))


class Trainer(orbit.AbstractTrainer):
    """Trains for a number of steps, or until it is asked to stop.

    Args:
        mesh: `jax.sharding.Mesh` with the axes `AXES`.
        learner: `Learner`.
        kept: `Kept`.
        step: `tf.Variable`, int64: the number of steps done.
        batches: Function without arguments that gives an iterator of batches, from `step` on.
        batch: Integer, images of the global batch.
    """

    def __init__(self, mesh: Mesh, learner: Learner, kept: Kept, step, batches: Callable, batch: int):
        self._learner, self._kept, self._step = learner, kept, step
        self._batches, self._iterator = batches, None
        self._one = train_step(learner, mesh, batch)
        self._finite = jax.jit(
            lambda state: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state)]))
        )
        # Sums of the metrics since the last look at them, and the number of steps. In a checkpoint, a run that goes on
        # tells the same means.
        self.totals = np.zeros(len(METRICS) + 1, np.float32)
        self.stop, self.asked = _Stop(mesh), False

    def train(self, num_steps) -> Any:
        """Trains.

        Args:
            num_steps: Integer tensor.

        Returns:
            Dict of the metrics' means, and of the learning rate of the last step.

        Raises:
            Asked: If it was asked to stop before the last of them. After the last one, `asked` is True.
            NonFiniteError: If the loss, or what is trained, is not.
        """
        self._iterator = self._iterator or self._batches()
        kept, waiting = self._kept, collections.deque()
        done = int(self._step.numpy())
        target, asked = done + int(num_steps), False
        while done < target and not asked:
            batch = next(self._iterator)
            if len(waiting) == AHEAD:  # the same step on all hosts, which then stop after the same one
                asked = self._look(*waiting.popleft())
            kept.state, told = self._one(kept.state, *batch, np.int32(done), self.stop.value)
            done += 1
            waiting.append((done, told))
        while waiting:
            asked |= self._look(*waiting.popleft())
        if not self._finite(kept.state):
            raise NonFiniteError(done, "variables that are not finite, with a loss that still is,")
        self._step.assign(done)
        self.asked = asked
        if done < target:
            raise Asked
        *sums, steps = self.totals
        self.totals = np.zeros_like(self.totals)
        values = dict(zip(METRICS, (value / steps for value in sums), strict=True))
        return values | {"learning_rate": self._learner.schedule(done - 1)}

    def close(self) -> None:
        """Ends reading. Its threads run Python, and one that still does at the interpreter's end ends the process."""
        self._iterator = None

    def _look(self, step: int, told) -> bool:
        """Takes note of a step, and whether somebody asks to stop."""
        *metrics, asked = np.asarray(told)
        if not math.isfinite(metrics[0]):
            raise NonFiniteError(step, f"a loss of {metrics[0]}")
        self.totals = self.totals + np.asarray([*metrics, 1], np.float32)
        return bool(asked > 0)

"""The step of `Learner` on one device or many with tf.distribute, as orbit's trainer and evaluator."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import orbit
import tensorflow as tf

from keras_effnet.tpu.config import Run
from keras_effnet.tpu.environment import has_tpu
from keras_effnet.tpu.input.pipeline import Host
from keras_effnet.tpu.resume.checkpoints import Bundles
from keras_effnet.tpu.resume.stops import Asked, NonFiniteError
from keras_effnet.tpu.runners.eval_loop import Evaluator
from keras_effnet.tpu.step.learner import METRICS, Learner, State
from keras_effnet.tpu.step.replicas import Place, spread

NAME = "tensorflow"

WAITS = False  # at a process' end, for hosts that are gone

# What devices and other hosts end a run with.
ERRORS = (tf.errors.OpError,)


@dataclass(frozen=True)
class Devices:
    """What a run computes on.

    Args:
        strategy: `tf.distribute.Strategy`.
        hosts: Integer, processes that each drive some of the replicas.
    """

    strategy: tf.distribute.Strategy
    hosts: int

    @property
    def count(self) -> int:
        """Replicas, on all hosts."""
        return self.strategy.num_replicas_in_sync

    @property
    def is_tpu(self) -> bool:
        """Whether they are TPUs."""
        return isinstance(self.strategy, tf.distribute.TPUStrategy)

    def scope(self) -> contextlib.AbstractContextManager:
        """Where a model and what goes with it are made."""
        return self.strategy.scope()

    def adapted(self, model: keras.Model, group: int, fused: str = "none") -> keras.Model:
        """A model as it is trained on these devices.

        Args:
            model: A functional `keras.Model` of this package.
            group: Integer, replicas that share their batch statistics.
            fused: As `Run.fused`, which JAX alone can, see `connect()`. Defaults to `"none"`.

        Returns:
            A `keras.Model` with variables of the same names and order.
        """
        return spread(model, group) if self.count > 1 else model

    def total(self, value: int) -> int:
        """The sum of a number of each process' over all of them.

        Args:
            value: Integer, this process'.

        Returns:
            Integer.
        """
        if self.hosts == 1:
            return value
        strategy = self.strategy
        share = tf.constant(value * self.hosts / self.count, tf.float64)

        def one():
            return tf.identity(share)

        @tf.function
        def summed():
            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(one), axis=None)

        return round(float(summed()))

    def batches(self, part: Callable[[Host, int, bool], tf.data.Dataset]) -> Iterable:
        """What each host reads, on its devices.

        Args:
            part: Function of a `Host`, of the replicas that it has, so many parts make its batch, and of whether
                Python runs where it is read. It gives a `tf.data.Dataset`.

        Returns:
            Iterable of batches.
        """

        def read(context):
            host = Host(context.input_pipeline_id, context.num_input_pipelines)
            # One process drives all hosts of a slice of TPUs.
            return part(host, self.count // host.count, not (self.is_tpu and host.count > 1))

        return self.strategy.distribute_datasets_from_function(read)

    def variables(self, learner: Learner) -> State:
        """See `variables_of()`."""
        return variables_of(learner)

    def trainer(self, learner, state, step, batches, batch: int, xla: bool = False) -> "Trainer":
        """See `Trainer`."""
        return Trainer(self.strategy, learner, state, step, batches, batch, xla)

    def evaluator(self, learner: Learner, state: State, trainer: "Trainer", batches, raw: bool) -> Evaluator:
        """What evaluates a run.

        Args:
            learner: `Learner`.
            state: `State` of `tf.Variable`.
            trainer: `Trainer`, which is asked to stop.
            batches: Function without arguments that gives an iterator of distributed batches.
            raw: Boolean, whether the variables themselves are evaluated too, and not only their moving average.

        Returns:
            `Evaluator`.
        """
        strategy, one = self.strategy, replica_score(learner, state, raw)

        def told(images, labels, weights, asked):
            return one(images, labels, weights) | {"asked": tf.identity(asked)}  # a tensor for each replica

        def score(images, labels, weights):
            sums = strategy.run(told, args=(images, labels, weights, trainer.stop.read_value()))
            return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None) for name, value in sums.items()}

        return Evaluator(tf.function(score), batches)

    def files(self, step, trainer: "Trainer", learner: Learner, state: State) -> Bundles:
        """How checkpoints of it are written and read.

        Args:
            step: `tf.Variable`, the number of steps done.
            trainer: `Trainer`.
            learner: `Learner`.
            state: `State` of `tf.Variable`.

        Returns:
            `Bundles`.
        """
        return Bundles(tf.train.Checkpoint(step=step, totals=trainer.totals, state=learner.by_name(state)))


def connect(run: Run) -> Devices:
    """The devices of a run.

    Args:
        run: `Run`.

    Returns:
        `Devices`: the TPU, all GPUs, the processor; or those of several hosts where the environment's TF_CONFIG names
        them.

    Raises:
        ValueError: If the devices that are asked for are not there, or `run` asks for what JAX alone has.
    """
    _, hosts = place()
    if run.fused != "none":
        raise ValueError(f"Expected --runner jax with --run.fused {run.fused}. Received: tensorflow")
    return Devices(_strategy(run, hosts), hosts)


def _strategy(run: Run, hosts: int) -> tf.distribute.Strategy:
    wants_tpu = run.devices == "tpu" or (run.devices == "auto" and has_tpu())
    if hosts > 1:
        if run.cpu_replicas > 1 or wants_tpu:
            raise ValueError(
                f"Expected no TPU, of which one process drives all hosts, and run.cpu_replicas=1 where TF_CONFIG names "
                f"{hosts} workers. Received: run.devices={run.devices!r}, run.cpu_replicas={run.cpu_replicas}"
            )
        if run.devices == "cpu":
            tf.config.set_visible_devices([], "GPU")
        return tf.distribute.MultiWorkerMirroredStrategy()
    if wants_tpu:
        name = run.tpu or os.environ.get("TPU_NAME", "local")
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    gpus = tf.config.list_physical_devices("GPU") if run.devices != "cpu" else []
    if run.devices == "gpu" and not gpus:
        raise ValueError("Expected a GPU that TensorFlow can use (run.devices). Received: none is there")
    if run.devices == "gpu" and run.cpu_replicas > 1:
        raise ValueError(f"Expected run.cpu_replicas=1 with run.devices='gpu'. Received: {run.cpu_replicas}")
    if gpus and run.cpu_replicas == 1:
        names = [f"GPU:{number}" for number in range(len(gpus))]
    else:
        names = [f"CPU:{number}" for number in range(run.cpu_replicas)]
        _divide_processor(run.cpu_replicas)
    return tf.distribute.MirroredStrategy(names) if len(names) > 1 else tf.distribute.OneDeviceStrategy(names[0])


def place() -> tuple[int, int]:
    """Which of the hosts this is, and how many there are, from the environment's TF_CONFIG. Number 0 writes.

    Returns:
        Tuple of two integers: (0, 1) without TF_CONFIG, and on a TPU, all of which one process drives.

    Raises:
        ValueError: If TF_CONFIG cannot be read.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return 0, 1
    try:
        told = json.loads(text)
        cluster, task = told.get("cluster", {}), told.get("task", {})
        hosts = [(kind, number) for kind in ("chief", "worker") for number in range(len(cluster.get(kind, ())))]
        return (hosts.index((task["type"], int(task["index"]))), len(hosts)) if len(hosts) > 1 else (0, 1)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            'Expected TF_CONFIG like {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", '
            f'"index": 0}}}}. Received: {text}'
        ) from error


# What the end of another host looks like to one that waits for it.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)

_LOST_INTERNALLY = ("Collective", "unhealthy", "heartbeat", "onnection", "oordination")


def is_lost(error: Exception) -> bool:
    """Whether an error is that of another host's end.

    Args:
        error: Exception.

    Returns:
        Boolean.
    """
    internal = isinstance(error, tf.errors.InternalError)
    if not isinstance(error, _LOST) and not (internal and any(told in str(error) for told in _LOST_INTERNALLY)):
        return False
    # Last: to ask for devices starts TensorFlow, and a call that was refused before leaves it as it is.
    return place()[1] > 1 or bool(tf.config.list_logical_devices("TPU"))


def _divide_processor(count: int) -> None:
    processor = tf.config.list_physical_devices("CPU")[0]
    if count == 1 or len(tf.config.get_logical_device_configuration(processor) or ()) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise ValueError(
            f"Expected run.cpu_replicas={count} before TensorFlow is used in a process. Received: it was used"
        ) from error


def variables_of(learner: Learner) -> State:
    """TensorFlow variables for all that a step changes: the model's own, and what goes with them.

    Args:
        learner: `Learner`. Call this in the strategy's scope, as the model was built.

    Returns:
        A `State` of `tf.Variable`.
    """
    state = learner.start()
    kept = tf.nest.map_structure(lambda value: tf.Variable(value, trainable=False), (state.slots, state.averages))
    own = [[v.value for v in some] for some in (learner.model.trainable_variables, learner.moving)]
    return State(own[0], own[1], kept[0], kept[1])


def replica_step(learner: Learner, state: State, batch: int) -> Callable:
    """One replica's training step.

    Args:
        learner: `Learner`.
        state: `State` of `tf.Variable`, which the step changes.
        batch: Integer, images of the global batch.

    Returns:
        Function of images, labels and the number of steps done before; it gives this replica's shares of the metrics.
    """

    def step(images, labels, number):
        context: Any = tf.distribute.get_replica_context()
        before = tf.nest.map_structure(tf.convert_to_tensor, state)
        here = _here(context) if context.num_replicas_in_sync > 1 else None
        after, metrics = learner.train(before, images, labels, number, batch, gradient, here)
        _assign(context, state, after)
        return metrics

    return step


def gradient(function: Callable, values):
    """What a function does, whose first part is a scalar, and that scalar's gradients.

    Args:
        function: Function of a list of arrays.
        values: List of arrays.

    Returns:
        Tuple of what the function does, and a list of arrays.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        told = function(values)
    return told, tape.gradient(told[0], values)


def _here(context) -> Place:
    count, index = context.num_replicas_in_sync, context.replica_id_in_sync_group

    def total(values):
        return context.all_reduce(tf.distribute.ReduceOp.SUM, values)

    def mean(values, group: int):
        if group == count:
            return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
        if isinstance(context.strategy, tf.distribute.TPUStrategy):
            groups = [list(range(start, start + group)) for start in range(0, count, group)]
            return tf.compat.v1.tpu.cross_replica_sum(values, groups) / group
        everyone = tf.ensure_shape(context.all_gather(values[None], axis=0), [count, *values.shape])
        first = index // group * group
        return tf.reduce_mean(tf.ensure_shape(everyone[first : first + group], [group, *values.shape]), axis=0)

    return Place(count, index, total, mean)


def _assign(context, state: State, values: State) -> None:
    pairs = list(zip(tf.nest.flatten(state), tf.nest.flatten(values), strict=True))
    if context.num_replicas_in_sync == 1:
        for variable, value in pairs:
            variable.assign(value)
        return

    def everywhere(strategy, values):
        for (variable, _), value in zip(pairs, values, strict=True):
            strategy.extended.update(variable, lambda v, x: v.assign(x), args=(value,), group=False)

    # As Keras' optimizers do it: on TPUs there is nothing to merge.
    tf.__internal__.distribute.interim.maybe_merge_call(everywhere, context.strategy, [value for _, value in pairs])


def replica_score(learner: Learner, state: State, raw: bool) -> Callable:
    """One replica's step of an evaluation.

    Args:
        learner: `Learner`.
        state: `State` of `tf.Variable`.
        raw: Boolean, whether the variables themselves are evaluated too.

    Returns:
        Function of images, labels and weights; it gives this replica's sums, and the number of examples.
    """

    def score(images, labels, weights):
        averages = [tf.convert_to_tensor(v) for v in state.averages]
        split = len(state.trainable)
        sums = learner.score(averages[:split], averages[split:], images, labels, weights)
        sums = {f"ema_{name}": value for name, value in sums.items()}
        if raw:
            trainable, moving = ([tf.convert_to_tensor(v) for v in some] for some in (state.trainable, state.moving))
            sums |= learner.score(trainable, moving, images, labels, weights)
        return sums | {"examples": tf.reduce_sum(weights)}

    return score


class Totals(tf.Module):
    """Sums of the metrics since the last look at them. In a checkpoint, a run that goes on tells the same means."""

    def __init__(self):
        super().__init__()
        self.sums = tf.Variable(tf.zeros([len(METRICS)]), trainable=False)
        self.steps = tf.Variable(tf.constant(0), trainable=False)


class Trainer(orbit.AbstractTrainer):
    """Trains for a number of steps inside one graph, or until it is asked to stop.

    Args:
        strategy: `tf.distribute.Strategy`.
        learner: `Learner`.
        state: `State` of `tf.Variable`.
        step: `tf.Variable`, int64: the number of steps done.
        batches: Function without arguments that gives an iterator of distributed batches, from `step` on.
        batch: Integer, images of the global batch.
        xla: Boolean, whether a step on a single device is compiled with XLA. Defaults to False.
    """

    def __init__(self, strategy, learner: Learner, state: State, step, batches: Callable, batch: int, xla=False):
        self._batches, self._iterator, self._step, self._learner = batches, None, step, learner
        self.totals = totals = Totals()
        # 1 to stop after the step; and whether that was seen, by all hosts.
        self.stop, self.asked = tf.Variable(tf.zeros([]), trainable=False), False
        one = replica_step(learner, state, batch)
        if xla and strategy.num_replicas_in_sync > 1:
            raise ValueError("Expected run.xla only on a single device. Received: several")
        if xla:
            one = tf.function(one, jit_compile=True)

        def told(images, labels, number, stop):
            metrics = one(images, labels, number)
            # One tensor: many hosts sum it over the network, and agree with it to stop when one of them is asked to.
            return tf.stack([*(metrics[name] for name in METRICS), stop])

        def loop(iterator, count):
            sums = tf.zeros([len(METRICS) + 1])
            for _ in tf.range(count):
                images, labels = next(iterator)
                number = tf.cast(step.read_value(), tf.int32)
                shares = strategy.run(told, args=(images, labels, number, self.stop.read_value()))
                sums = strategy.reduce(tf.distribute.ReduceOp.SUM, shares, axis=None)
                step.assign_add(1)
                totals.sums.assign_add(sums[:-1])
                totals.steps.assign_add(1)
                if not tf.math.is_finite(sums[0]) or sums[-1] > 0:
                    break
            # A gradient may be no number where the loss still is one. Once in a loop, before anything is saved.
            kept = [tf.reduce_all(tf.math.is_finite(value)) for value in tf.nest.flatten(state)]
            return sums, tf.reduce_all(kept)

        self._loop = tf.function(loop)

    def close(self) -> None:
        """Ends reading. Its threads run Python, and one that still does at the interpreter's end ends the process."""
        self._iterator = None

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
        target = int(self._step.numpy()) + int(num_steps)
        sums, finite = self._loop(self._iterator, num_steps)
        loss, *_, asked = sums.numpy()
        step, self.asked = int(self._step.numpy()), bool(asked)
        if not math.isfinite(loss):
            raise NonFiniteError(step, f"a loss of {loss}")
        if not finite:
            raise NonFiniteError(step, "variables that are not finite, with a loss that still is,")
        if step < target:
            raise Asked
        values = self.totals.sums.numpy() / int(self.totals.steps.numpy())
        self.totals.sums.assign(tf.zeros([len(METRICS)]))
        self.totals.steps.assign(0)
        return dict(zip(METRICS, values, strict=True)) | {"learning_rate": self._learner.schedule(step - 1)}

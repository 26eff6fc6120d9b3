"""The TensorFlow runner: trains and evaluates on the devices of a `tf.distribute.Strategy`, with orbit."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import orbit
import tensorflow as tf

from keras_effnet import compat
from keras_effnet.tpu.config import Run
from keras_effnet.tpu.environment import has_tpu
from keras_effnet.tpu.input.pipeline import Host
from keras_effnet.tpu.resume.checkpoints import Bundles
from keras_effnet.tpu.resume.stop_signals import Asked, NonFiniteError
from keras_effnet.tpu.runners.eval_loop import Evaluator
from keras_effnet.tpu.step.cross_replica import Place, spread
from keras_effnet.tpu.step.train_step import TRAINING_METRICS, Learner, State

NAME = "tensorflow"

WAITS = False  # an ending process does not wait for hosts that are gone

WATCH = 5  # seconds between two looks at the other hosts

# Errors raised when devices or other hosts fail.
ERRORS = (tf.errors.OpError,)


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Args:
        strategy: `tf.distribute.Strategy`.
        hosts: Integer, number of processes that each drive some of the replicas.
    """

    strategy: tf.distribute.Strategy
    hosts: int

    @property
    def count(self) -> int:
        """The number of replicas on all hosts."""
        return self.strategy.num_replicas_in_sync

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs."""
        return isinstance(self.strategy, tf.distribute.TPUStrategy)

    @property
    def capability(self) -> tuple[int, int]:
        """The lowest compute capability of the GPUs in use. (0, 0) for other devices."""
        gpus = any(":GPU:" in name for name in self.strategy.extended.worker_devices)
        details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU") if gpus else ())
        return min((one.get("compute_capability", (0, 0)) for one in details), default=(0, 0))

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to build a model and its state."""
        return self.strategy.scope()

    def adapted(self, model: keras.Model, group: int, fused: str = "none") -> keras.Model:
        """Adapts a model for training on these devices.

        Args:
            model: A functional `keras.Model` of this package.
            group: Integer, number of replicas that share batch statistics.
            fused: Not used: `connect()` refuses all but `"none"`, since only JAX fuses layers. Defaults to `"none"`.

        Returns:
            A `keras.Model` with variables of the same names and order.
        """
        return spread(model, group) if self.count > 1 else model

    def total(self, value: int) -> int:
        """Sums a number over all processes.

        Args:
            value: Integer, the number of this process.

        Returns:
            Integer.
        """
        if self.hosts == 1:
            return value
        return round(float(_summed(self.strategy)(tf.constant(value * self.hosts / self.count, tf.float64))))

    def batches(self, part: Callable[[Host, int, bool], tf.data.Dataset]) -> Iterable:
        """Returns the batches of all hosts, on their devices.

        Args:
            part: Function that returns a `tf.data.Dataset`. Its arguments are a `Host`, the number of parts of each
                batch (one per replica of the host), and whether the reading host runs Python.

        Returns:
            Iterable of batches.
        """

        def read(context):
            host = Host(context.input_pipeline_id, context.num_input_pipelines)
            # One process drives all hosts of a slice of TPUs.
            return part(host, self.count // host.count, not (self.is_tpu and host.count > 1))

        return self.strategy.distribute_datasets_from_function(read)

    def variables(self, learner: Learner) -> State:
        """Returns `variables_of(learner)`."""
        return variables_of(learner)

    def trainer(self, learner, state, step, batches, batch: int, xla: bool = False) -> "Trainer":
        """Returns a `Trainer`."""
        return Trainer(self.strategy, learner, state, step, batches, batch, xla)

    def evaluator(self, learner: Learner, state: State, trainer: "Trainer", batches, raw: bool) -> Evaluator:
        """Returns the evaluator of a run.

        Args:
            learner: `Learner`.
            state: `State` of `tf.Variable`.
            trainer: `Trainer`. Asking it to stop also stops the evaluation.
            batches: Function without arguments that returns an iterator of distributed batches.
            raw: Boolean, whether to evaluate the raw weights in addition to their moving average.

        Returns:
            `Evaluator`.
        """
        strategy, one = self.strategy, replica_score(learner, state, raw)

        def replica(images, labels, weights, asked):
            return one(images, labels, weights) | {"asked": tf.identity(asked)}  # a tensor for each replica

        def score(images, labels, weights):
            sums = strategy.run(replica, args=(images, labels, weights, trainer.stop.read_value()))
            return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None) for name, value in sums.items()}

        return Evaluator(tf.function(score, autograph=False), batches)

    def files(self, step, trainer: "Trainer", learner: Learner, state: State) -> Bundles:
        """Returns the reader and writer of checkpoints.

        Args:
            step: `tf.Variable`, the number of steps done.
            trainer: `Trainer`.
            learner: `Learner`.
            state: `State` of `tf.Variable`.

        Returns:
            `Bundles`.
        """
        return Bundles(tf.train.Checkpoint(step=step, totals=trainer.totals, state=learner.by_name(state)))


@functools.cache  # TensorFlow never frees a function
def _summed(strategy: tf.distribute.Strategy) -> Callable:
    """Returns a function that sums a number over all replicas."""

    @tf.function(autograph=False)
    def summed(share):
        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(tf.identity, (share,)), axis=None)

    return summed


def connect(run: Run) -> Devices:
    """Finds the devices of a run.

    Args:
        run: `Run`.

    Returns:
        `Devices`: the TPU, all GPUs, or the processor; those of all hosts if the environment variable TF_CONFIG names
        several.

    Raises:
        ValueError: If the requested devices do not exist, or `run` needs JAX.
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
                f"Expected run.cpu_replicas=1 and no TPU if TF_CONFIG names {hosts} workers, since one process drives "
                f"all hosts of a TPU. Received: run.cpu_replicas={run.cpu_replicas}, run.devices={run.devices!r}"
            )
        if run.devices == "cpu":
            tf.config.set_visible_devices([], "GPU")
        compat.watch_hosts(WATCH)
        return tf.distribute.MultiWorkerMirroredStrategy()
    return _tpu_strategy(run) if wants_tpu else _local_strategy(run)


def _tpu_strategy(run: Run) -> tf.distribute.Strategy:
    name = run.tpu or os.environ.get("TPU_NAME", "local")
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _local_strategy(run: Run) -> tf.distribute.Strategy:
    """Uses all GPUs of this machine, or its processor."""
    gpus = tf.config.list_physical_devices("GPU") if run.devices != "cpu" else []
    if run.devices == "gpu" and not gpus:
        raise ValueError("Expected a GPU that TensorFlow can use (run.devices). Received: none")
    if run.devices == "gpu" and run.cpu_replicas > 1:
        raise ValueError(f"Expected run.cpu_replicas=1 with run.devices='gpu'. Received: {run.cpu_replicas}")
    if gpus and run.cpu_replicas == 1:
        names = [f"GPU:{number}" for number in range(len(gpus))]
    else:
        names = [f"CPU:{number}" for number in range(run.cpu_replicas)]
        _divide_processor(run.cpu_replicas)
    return tf.distribute.MirroredStrategy(names) if len(names) > 1 else tf.distribute.OneDeviceStrategy(names[0])


def place() -> tuple[int, int]:
    """Returns the number of this host and the number of hosts, from the environment variable TF_CONFIG. Host 0 writes.

    Returns:
        Tuple of two integers: (0, 1) without TF_CONFIG, and on a TPU, where one process drives all hosts.

    Raises:
        ValueError: If TF_CONFIG cannot be read.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return 0, 1
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        hosts = [(kind, number) for kind in ("chief", "worker") for number in range(len(cluster.get(kind, ())))]
        return (hosts.index((task["type"], int(task["index"]))), len(hosts)) if len(hosts) > 1 else (0, 1)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            'Expected TF_CONFIG like {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", '
            f'"index": 0}}}}. Received: {text}'
        ) from error


# The errors that a waiting host gets when another host ends.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)

_LOST_INTERNALLY = ("Collective", "unhealthy", "heartbeat", "onnection", "oordination")


def is_lost(error: Exception) -> bool:
    """Returns whether an error means that another host has ended.

    Args:
        error: Exception.

    Returns:
        Boolean.
    """
    internal = isinstance(error, tf.errors.InternalError)
    if not isinstance(error, _LOST) and not (internal and any(sign in str(error) for sign in _LOST_INTERNALLY)):
        return False
    # Last, because listing devices starts TensorFlow, which a call that was refused before must not do.
    return place()[1] > 1 or bool(tf.config.list_logical_devices("TPU"))


def _divide_processor(count: int) -> None:
    processor = tf.config.list_physical_devices("CPU")[0]
    if count == 1 or len(tf.config.get_logical_device_configuration(processor) or ()) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise ValueError(
            f"Expected run.cpu_replicas={count} before TensorFlow is used in this process. Received: already used"
        ) from error


def variables_of(learner: Learner) -> State:
    """Creates the TensorFlow variables that a step changes, and reuses those of the model.

    Args:
        learner: `Learner`. Call this in the scope of the strategy that the model was built in.

    Returns:
        A `State` of `tf.Variable`.
    """
    state = learner.start()
    kept = tf.nest.map_structure(lambda value: tf.Variable(value, trainable=False), tuple(state[2:]))
    own = [[v.value for v in some] for some in (learner.model.trainable_variables, learner.moving)]
    return State(own[0], own[1], *kept)


def replica_step(learner: Learner, state: State, batch: int) -> Callable:
    """Returns the training step of one replica.

    Args:
        learner: `Learner`.
        state: `State` of `tf.Variable`, which the step changes.
        batch: Integer, images of the global batch.

    Returns:
        Function of images, labels and the number of steps done. It returns this replica's shares of the metrics.
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
    """Calls a function and computes the gradients of its first result, a scalar.

    Args:
        function: Function of a list of tensors that returns a tuple, first a scalar.
        values: List of tensors.

    Returns:
        Tuple of the function's results, and the list of gradients.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        results = function(values)
    return results, tape.gradient(results[0], values)


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

    # As in Keras' optimizers: on TPUs there is nothing to merge.
    tf.__internal__.distribute.interim.maybe_merge_call(everywhere, context.strategy, [value for _, value in pairs])


def replica_score(learner: Learner, state: State, raw: bool) -> Callable:
    """Returns the evaluation step of one replica.

    Args:
        learner: `Learner`.
        state: `State` of `tf.Variable`.
        raw: Boolean, whether to evaluate the raw weights in addition to their moving average.

    Returns:
        Function of images, labels and weights. It returns this replica's sums, and the number of examples.
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
    """Sums of the metrics since the last report. In checkpoints, so that a resumed run reports the same means."""

    def __init__(self):
        super().__init__()
        # Without a fixed length, because checkpoints of earlier versions lack the last of `TRAINING_METRICS`.
        self.sums = tf.Variable(tf.zeros([len(TRAINING_METRICS)]), trainable=False, shape=[None])
        self.steps = tf.Variable(tf.constant(0), trainable=False)

    def complete(self) -> None:
        """Adds the loss without weight decay to the sums of an earlier version: up to there, the loss with it."""
        sums = self.sums.numpy()
        if len(sums) < len(TRAINING_METRICS):
            self.sums.assign([*sums, sums[0]])


class Trainer(orbit.AbstractTrainer):
    """Trains for a number of steps in one graph, or until it is asked to stop.

    Args:
        strategy: `tf.distribute.Strategy`.
        learner: `Learner`.
        state: `State` of `tf.Variable`.
        step: `tf.Variable`, int64, the number of steps done.
        batches: Function without arguments that returns an iterator of distributed batches from `step` on.
        batch: Integer, images of the global batch.
        xla: Boolean, whether to compile the step of a single device with XLA. Defaults to False.
    """

    def __init__(self, strategy, learner: Learner, state: State, step, batches: Callable, batch: int, xla=False):
        self._batches, self._iterator, self._step, self._learner, self._state = batches, None, step, learner, state
        self.totals = totals = Totals()
        # `stop` is 1 to stop after the current step. `asked` is whether all hosts saw that one of them was asked.
        self.stop, self.asked = tf.Variable(tf.zeros([]), trainable=False), False
        one = replica_step(learner, state, batch)
        if xla and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                f"Expected a single device with run.xla. Received: {strategy.num_replicas_in_sync} replicas"
            )
        if xla:
            one = tf.function(one, jit_compile=True, autograph=False)

        def replica(images, labels, number, stop):
            metrics = one(images, labels, number)
            # One tensor, because hosts sum it over the network. With it they also agree to stop if one is asked to.
            return tf.stack([*(metrics[name] for name in TRAINING_METRICS), stop])

        def loop(iterator, count):
            def advance(_):
                images, labels = next(iterator)
                number = tf.cast(step.read_value(), tf.int32)
                shares = strategy.run(replica, args=(images, labels, number, self.stop.read_value()))
                sums = strategy.reduce(tf.distribute.ReduceOp.SUM, shares, axis=None)
                step.assign_add(1)
                totals.sums.assign_add(sums[:-1])
                totals.steps.assign_add(1)
                return [sums]

            def goes_on(sums):
                return tf.math.is_finite(sums[0]) & (sums[-1] <= 0)

            start = tf.zeros([len(TRAINING_METRICS) + 1])
            (sums,) = tf.while_loop(goes_on, advance, [start], maximum_iterations=count)
            # Gradients may be non-finite although the loss is finite. Check once per loop, before anything is saved.
            kept = [tf.reduce_all(tf.math.is_finite(value)) for value in tf.nest.flatten(state)]
            return sums, tf.reduce_all(kept)

        # Without AutoGraph, which leaves a file in /tmp for each function if the process is killed.
        self._loop = tf.function(loop, autograph=False)

    def close(self) -> None:
        """Stops reading: a reader thread that still runs Python when the interpreter exits would kill the process."""
        self._iterator = None

    def train(self, num_steps) -> Any:
        """Trains for a number of steps.

        Args:
            num_steps: Integer tensor.

        Returns:
            Dict of the means of the metrics, the learning rate of the last step, and the next scale of the loss if it
            is scaled.

        Raises:
            Asked: If it was asked to stop before the last step. If asked during the last step, `asked` is True.
            NonFiniteError: If the loss or a variable is not finite.
        """
        self._iterator = self._iterator or self._batches()
        self.totals.complete()
        target = int(self._step.numpy()) + int(num_steps)
        sums, finite = self._loop(self._iterator, num_steps)
        loss, *_, asked = sums.numpy()
        step, self.asked = int(self._step.numpy()), bool(asked)
        if not math.isfinite(loss):
            raise NonFiniteError(step, f"a loss of {loss}")
        if not finite:
            raise NonFiniteError(step, "non-finite variables (the loss is finite)")
        if step < target:
            raise Asked
        values = self.totals.sums.numpy() / int(self.totals.steps.numpy())
        self.totals.sums.assign(tf.zeros([len(TRAINING_METRICS)]))
        self.totals.steps.assign(0)
        last = {"learning_rate": self._learner.schedule(step - 1)}
        if self._state.scaling:
            last["loss_scale"] = self._state.scaling[0].numpy()
        return dict(zip(TRAINING_METRICS, values, strict=True)) | last

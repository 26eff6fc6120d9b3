"""Trains with JAX: the state on all devices, and the loop of steps as orbit's trainer."""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbit
from jax.sharding import Mesh, NamedSharding

from keras_effnet.tpu.resume.stop_signals import Asked, NonFiniteError
from keras_effnet.tpu.runners.jax_step import ALL, EACH, train_step
from keras_effnet.tpu.step.train_step import TRAINING_METRICS, Learner, State

AHEAD = 2  # steps handed to the devices before the result of the first is read


class Kept:
    """The state that a step changes, replicated on all devices.

    Args:
        learner: `Learner`.
        mesh: `jax.sharding.Mesh`.
    """

    def __init__(self, learner: Learner, mesh: Mesh):
        self._learner, self._where = learner, NamedSharding(mesh, ALL)
        self.state = self._put(learner.start())

    def _put(self, state: State) -> State:
        # Each host fills its own devices: jax.device_put() would compare all values over the network.
        def put(value):
            value = np.asarray(value)
            return jax.make_array_from_callback(value.shape, self._where, lambda index: value[index])

        return jax.tree.map(put, state)

    def by_path(self) -> dict[str, Any]:
        """Returns the state by the parts of the variables' paths.

        Returns:
            Nested dict of NumPy arrays.
        """
        state = jax.tree.map(np.asarray, self.state)
        return {kind: _nested(some) for kind, some in self._learner.by_name(state).items()}

    def assign(self, tree: dict[str, Any]) -> None:
        """Restores the state.

        Args:
            tree: Nested dict of arrays, from `by_path()`.
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


def upgraded(tree: dict[str, Any], scales_loss: bool = False) -> dict[str, Any]:
    """Adds what a checkpoint of an earlier version lacks: the sum of the losses without weight decay, here with it.

    Args:
        tree: Nested dict of arrays, from a checkpoint.
        scales_loss: Boolean, whether this run scales the loss. If not, the scale of the checkpoint is dropped. Defaults
            to False.

    Returns:
        Nested dict of arrays.
    """
    totals = tree["totals"]
    added = len(TRAINING_METRICS) + 1 - len(totals)
    tree = tree | {"totals": np.insert(totals, len(totals) - 1, [totals[0]] * added)}
    if not scales_loss and "scaling" in tree["state"]:
        tree["state"] = {kind: some for kind, some in tree["state"].items() if kind != "scaling"}
    return tree


class _Stop:
    """A number on each device, above 0 after this process is asked to stop."""

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
        step: `tf.Variable`, int64, the number of steps done.
        batches: Function without arguments that returns an iterator of batches from `step` on.
        batch: Integer, images of the global batch.
    """

    def __init__(self, mesh: Mesh, learner: Learner, kept: Kept, step, batches: Callable, batch: int):
        self._learner, self._kept, self._step = learner, kept, step
        self._batches, self._iterator = batches, None
        self._one = train_step(learner, mesh, batch)
        self._finite = jax.jit(
            lambda state: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state)]))
        )
        # Sums of the metrics since they were last reported, and the number of steps. They are part of a checkpoint, so
        # that a resumed run reports the same means.
        self.totals = np.zeros(len(TRAINING_METRICS) + 1, np.float32)
        self.stop, self.asked = _Stop(mesh), False

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
        kept, waiting = self._kept, collections.deque()
        done = int(self._step.numpy())
        target, asked = done + int(num_steps), False
        while done < target and not asked:
            batch = next(self._iterator)
            if len(waiting) == AHEAD:  # all hosts look at the same step, so that they stop after the same one
                asked = self._look(*waiting.popleft())
            kept.state, result = self._one(kept.state, *batch, np.int32(done), self.stop.value)
            done += 1
            waiting.append((done, result))
        while waiting:
            asked |= self._look(*waiting.popleft())
        if not self._finite(kept.state):
            raise NonFiniteError(done, "non-finite variables (the loss is finite)")
        self._step.assign(done)
        self.asked = asked
        if done < target:
            raise Asked
        *sums, steps = self.totals
        self.totals = np.zeros_like(self.totals)
        values = dict(zip(TRAINING_METRICS, (value / steps for value in sums), strict=True))
        last = {"learning_rate": self._learner.schedule(done - 1)}
        if kept.state.scaling:
            last["loss_scale"] = np.asarray(kept.state.scaling[0])
        return values | last

    def close(self) -> None:
        """Stops reading: a reader thread that still runs Python when the interpreter exits would kill the process."""
        self._iterator = None

    def _look(self, step: int, result) -> bool:
        """Adds a step's metrics to the totals, and returns whether any host is asked to stop."""
        *metrics, asked = np.asarray(result)
        if not math.isfinite(metrics[0]):
            raise NonFiniteError(step, f"a loss of {metrics[0]}")
        self.totals = self.totals + np.asarray([*metrics, 1], np.float32)
        return bool(asked > 0)

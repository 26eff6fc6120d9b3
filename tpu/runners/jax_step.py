"""The training and evaluation steps with JAX, compiled over a mesh of devices."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.sharding import Mesh, PartitionSpec

from keras_effnet.tpu.step.cross_replica import Place
from keras_effnet.tpu.step.train_step import TRAINING_METRICS, Learner

# Groups of replicas that share batch statistics, and the replicas in a group.
AXES = ("group", "member")

ALL, EACH = PartitionSpec(), PartitionSpec(AXES)


def make_mesh(devices, group: int) -> Mesh:
    """Arranges devices in groups that share batch statistics.

    Args:
        devices: Sequence of JAX devices.
        group: Integer, number of devices per group.

    Returns:
        `jax.sharding.Mesh` with the axes `AXES`.
    """
    return Mesh(np.asarray(devices).reshape(-1, group), AXES)


def train_step(learner: Learner, mesh: Mesh, batch: int) -> Any:
    """Returns the training step. It compiles when first called, or can be lowered for devices that this machine lacks.

    Args:
        learner: `Learner`.
        mesh: `jax.sharding.Mesh` with the axes `AXES`.
        batch: Integer, images of the global batch.

    Returns:
        Jitted function of a `State`, which it donates; images and labels, sharded over the devices; the number of
        steps done; and one number per device, above 0 to stop. It returns the new `State` and one array: the means of
        `TRAINING_METRICS` over the batch, and the sum of the last argument.

    Example:

    >>> compiled = train_step(learner, mesh, 1024).lower(state, images, labels, number, stop)  # doctest: +SKIP
    """

    def part(state, images, labels, number, stop):
        here = _here(mesh) if mesh.size > 1 else None
        after, metrics = learner.train(state, images, labels, number, batch, gradient, here)
        shares = jnp.stack([*(metrics[name] for name in TRAINING_METRICS), stop[0]])
        return after, jax.lax.psum(shares, AXES)

    # Replication is not checked: `Learner` sums the gradients itself, because each replica's loss is a share.
    step = jax.shard_map(part, mesh=mesh, in_specs=(ALL, EACH, EACH, ALL, EACH), out_specs=(ALL, ALL), check_vma=False)
    return jax.jit(step, donate_argnums=0)


def score_step(learner: Learner, mesh: Mesh, raw: bool) -> Any:
    """Returns the evaluation step. Like `train_step()`, it can be lowered for devices that this machine lacks.

    Args:
        learner: `Learner`.
        mesh: `jax.sharding.Mesh` with the axes `AXES`.
        raw: Boolean, whether to evaluate the raw weights in addition to their moving average.

    Returns:
        Jitted function of the lists `trainable`, `moving` and `averages` of a `State`; images, labels and weights,
        sharded over the devices; and one number per device. It returns a dict of sums over the batch.
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


def gradient(function: Callable, values):
    """Calls a function and computes the gradients of its first result, a scalar.

    Args:
        function: Function of a list of arrays that returns a tuple, first a scalar.
        values: List of arrays.

    Returns:
        Tuple of the function's results, and the list of gradients.
    """

    def scalar_first(values):
        results = function(values)
        return results[0], results

    (_, results), gradients = jax.value_and_grad(scalar_first, has_aux=True)(values)
    return results, gradients


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
    """Whether JAX computes each random number from the key and the number's position, which is its default."""
    config: Any = jax.config
    return config.jax_threefry_partitionable and config.jax_default_prng_impl == "threefry2x32"


def _own_part(index, seed, rate: float, shape: tuple[int, ...], dtype):
    """Draws only a replica's rows of the global batch's dropout mask, bit for bit as in the whole mask.

    As `jax.random.bernoulli`: 23 bits of the hash of a position under the key, as a number below 1.
    """
    count = math.prod(shape)
    place = jnp.uint32(index) * np.uint32(count) + jax.lax.iota("uint32", count).reshape(shape)
    high, low = threefry2x32_p.bind(*jnp.broadcast_arrays(seed[0], seed[1], jnp.uint32(0), place))
    kept = ((high ^ low) >> 9).astype("float32") * 2**-23 < 1 - rate
    return jnp.where(kept, jnp.ones((), dtype) / (1 - rate), 0)

"""Chooses the channels that stay within a budget."""

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_effnet.errors import one_of
from keras_effnet.nets import inspection
from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.pruning_plan import Plan
from keras_effnet.nets.variants import nearest
from keras_effnet.pruning import knapsack
from keras_effnet.pruning.costs import COSTS, image_size
from keras_effnet.pruning.groups import Group, groups, with_sizes
from keras_effnet.pruning.importance import KINDS, importance

# The plan


def plan(
    model: keras.Model,
    dataset: Any,
    reduction: float = 0.4,
    cost: str = "macs",
    solver: str = "greedy",
    importance: str | Mapping[str, np.ndarray] = "gradient",
    *,
    floor: float = 0.1,
    divisor: int = 8,
    loss: Any = None,
    batch_size: int = 32,
    verbose: str | int = "auto",
) -> Plan:
    """Chooses the channels of a trained model that stay within a budget: those that matter most for what they cost.

    Args:
        model: A model of this package, or a functional or sequential one that holds one. It stays as it is.
        dataset: See `importance()`. A thousand images will do.
        reduction: Float between 0 and 1, share of the whole model's cost to save. Defaults to 0.4.
        cost: `"macs"` (multiply-adds of one image), `"params"` (trainable), or `"latency"` (measured on this machine
            and backend, for one image; the total is a sum of what single blocks were measured to save).
        solver: `"greedy"`, or `"exact"`, which finds a best choice at the same budget.
        importance: `"gradient"`, `"taylor"` or `"magnitude"`, see `importance()`; or a dict as it returns.
        floor: Float, smallest share of each group of channels that stays; at least one channel does. Defaults to 0.1
            (the published nets keep at least 0.19).
        divisor: Integer, of which the numbers of channels that stay are multiples, as far as the budget can be met
            so. Defaults to 8, the multiples that runtimes compute fastest with (benchmarks/pruning.py); the published
            nets have 1.
        loss: See `importance()`.
        batch_size: Integer, for arrays. Defaults to 32.
        verbose: As in `keras.Model.fit()`.

    Returns:
        A `Plan`. `plan.save(path)` writes it, `apply(model, plan)` carries it out, and
        `create_model(plan.model, blocks=plan)` builds such a net from scratch.

    Raises:
        ValueError: If an argument is not valid, or the floor keeps more than the budget.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> plan = ke.pruning.plan(model, data, reduction=0.4, verbose=0)
    >>> abs(plan.reduction - 0.4) < 0.004
    True

    Reference:
        arXiv 2002.08258, section 3.
    """
    one_of("cost", cost, COSTS)
    one_of("solver", solver, knapsack.SOLVERS)
    for name, share in (("reduction", reduction), ("floor", floor)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"Expected {name} between 0 and 1. Received: {name}={share!r}")
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise ValueError(f"Expected divisor as a positive integer. Received: divisor={divisor!r}")
    kind = importance if isinstance(importance, str) else "given"
    if kind != "given":
        one_of("importance", kind, KINDS)
    _, reading = inspection.find(model)
    net = reading.architecture
    parts = groups(net)
    price = COSTS[cost](model, reading, image_size(model, reading, dataset))
    scores = (
        _checked(importance, parts)
        if not isinstance(importance, str)
        else _importance(model, dataset, kind, loss=loss, batch_size=batch_size, verbose=verbose)
    )
    before = price(net)
    target = (1 - reduction) * before
    # A coarse step may miss a small budget: a channel of a chain costs in many layers.
    while True:
        found = _chosen(net, scores, price, target, solver, floor, divisor)
        if found:
            stay, gap = found
            smaller = with_sizes(net, stay)
            if divisor == 1 or target - price(smaller) <= 0.01 * reduction * before:
                break
        elif divisor == 1:
            lowest = 1 - price(with_sizes(net, {group: _least(group.size, floor) for group in parts})) / before
            raise ValueError(
                f"Expected reduction of at most {lowest:.3f}, at which a share of {floor} of each group of channels "
                f"stays. Received: reduction={reduction}"
            )
        divisor = max(1, divisor // 2)
    removed = {
        group.name: tuple(np.sort(np.argsort(-scores[group.name], kind="stable")[stay[group] :]).tolist())
        for group in parts
    }
    return Plan(
        model=nearest(net),
        blocks=smaller.widths,
        removed={name: channels for name, channels in removed.items() if channels},
        before=before,
        after=price(smaller),
        asked=reduction,
        cost=cost,
        solver=solver,
        gap=gap,
        importance=kind,
    )


def _chosen(
    net: Architecture, scores, price, target: float, solver: str, floor: float, divisor: int
) -> tuple[dict[Group, int], float] | None:
    """How many channels of each group stay, those of the highest scores, and the solver's gap. None: too many do."""
    parts = groups(net)
    steps = [_steps(group.size, _least(group.size, floor), divisor) for group in parts]
    before = price(net)
    # The saving of one channel, with what the next layers save.
    unit = [before - price(with_sizes(net, {group: group.size - 1})) if group.size > 1 else 0 for group in parts]
    ranked = [np.append(0, np.cumsum(-np.sort(-scores[group.name]))) for group in parts]
    items = knapsack.Items(
        [np.diff(sums[sizes]) for sums, sizes in zip(ranked, steps, strict=True)],
        [np.diff(sizes) * saving for sizes, saving in zip(steps, unit, strict=True)],
    )

    def sizes_of(counts) -> dict[Group, int]:
        return {group: int(step[count]) for group, step, count in zip(parts, steps, counts, strict=True)}

    def fits(counts) -> bool:
        return price(with_sizes(net, sizes_of(counts))) <= target

    if not fits([0] * len(parts)):
        return None
    # Savings do not add up, so that the capacity with which the net meets the target is searched for.
    low, high = 0.0, float(np.sum(items.weights))
    for _ in range(50):
        middle = (low + high) / 2
        met = fits(items.counts(knapsack.greedy(items.values, items.weights, middle)))
        low, high = (middle, high) if met else (low, middle)
    counts = items.counts(knapsack.SOLVERS[solver](items.values, items.weights, low))
    counts = items.filled(counts, fits)
    return sizes_of(counts), items.solution(counts).gap


def _least(size: int, floor: float) -> int:
    return max(1, math.ceil(floor * size))


def _steps(size: int, least: int, divisor: int) -> np.ndarray:
    """The numbers of channels that a group may keep: multiples of the divisor, and all of them."""
    divisor = min(divisor, size)
    lowest = -(-least // divisor) * divisor
    return np.unique(np.append(np.arange(min(lowest, size), size, divisor), size))


_importance = importance  # the argument of the same name hides it


def _checked(scores: Mapping[str, np.ndarray], parts: tuple[Group, ...]) -> dict[str, np.ndarray]:
    found = {name: np.asarray(values, float) for name, values in scores.items()}
    for group in parts:
        values = found.get(group.name)
        if values is None or values.shape != (group.size,) or not np.isfinite(values).all() or (values < 0).any():
            shape = None if values is None else values.shape
            raise ValueError(
                f"Expected importance of {group.name} as {group.size} finite numbers of at least 0. Received: {shape}"
            )
    return found

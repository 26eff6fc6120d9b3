"""Chooses the channels to keep within a budget."""

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_effnet import ranges
from keras_effnet.errors import one_of
from keras_effnet.model_loader import check_finite
from keras_effnet.nets import inspection
from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.pruning_plan import Plan
from keras_effnet.nets.variants import nearest
from keras_effnet.pruning import knapsack
from keras_effnet.pruning.costs import COSTS, Price, image_size
from keras_effnet.pruning.groups import Group, groups, with_sizes
from keras_effnet.pruning.importance import KINDS
from keras_effnet.pruning.importance import importance as importance_of


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
    """Chooses the channels of a trained model to keep within a budget: those of the highest importance for their cost.

    Args:
        model: A model of this package, or a functional or sequential model that contains one. It stays unchanged.
        dataset: See `importance()`. A thousand images are enough.
        reduction: Float between 0 and 1. Share of the whole model's cost to remove. Defaults to 0.4.
        cost: String. `"macs"` (multiply-adds for one image), `"params"` (trainable), or `"latency"` (for one image, on
            this machine and backend; adds up the savings measured for single blocks). Defaults to `"macs"`.
        solver: String. `"greedy"`, or `"exact"`, which finds an optimal choice for the same budget. Defaults to
            `"greedy"`.
        importance: `"gradient"`, `"taylor"` or `"magnitude"`, or a dict of scores. See `importance()`. Defaults to
            `"gradient"`.
        floor: Float between 0 and 1. Smallest share of each group of channels to keep. Every group keeps at least one
            channel. Defaults to 0.1 (the published nets keep at least 0.19).
        divisor: Integer. The kept numbers of channels are multiples of it, where the budget allows. Defaults to 8, the
            multiples that runtimes compute fastest (benchmarks/pruning.py). The published nets use 1.
        loss: See `importance()`.
        batch_size: Integer. Batch size for arrays. Defaults to 32.
        verbose: See `keras.Model.fit()`. Defaults to `"auto"`.

    Returns:
        A `Plan`. `plan.save(path)` saves it, `apply(model, plan)` returns the pruned model, and
        `create_model(plan.model, blocks=plan)` builds the same network from scratch.

    Raises:
        ValueError: If an argument is not valid, or the floor keeps more channels than the budget allows.

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
    _check_arguments(reduction, cost, solver, importance, floor, divisor)
    _, reading = inspection.find(model)
    check_finite(model)
    net = reading.architecture
    price = COSTS[cost](model, reading, image_size(model, reading, dataset))
    if isinstance(importance, str):
        scores = importance_of(model, dataset, importance, loss=loss, batch_size=batch_size, verbose=verbose)
    else:
        scores = _checked(importance, groups(net))
    sizes, gap = _search(net, scores, price, reduction, solver, floor, divisor)
    smaller = with_sizes(net, sizes)
    return Plan(
        model=nearest(net),
        blocks=smaller.widths,
        removed=_removed(sizes, scores),
        before=price(net),
        after=price(smaller),
        asked=reduction,
        cost=cost,
        solver=solver,
        gap=gap,
        importance=importance if isinstance(importance, str) else "given",
    )


def _check_arguments(reduction, cost, solver, importance, floor, divisor) -> None:
    one_of("cost", cost, COSTS)
    one_of("solver", solver, knapsack.SOLVERS)
    ranges.check(
        reduction=(reduction, float, ranges.INSIDE),
        floor=(floor, float, ranges.INSIDE),
        divisor=(divisor, int, ranges.COUNT),
    )
    if isinstance(importance, str):
        one_of("importance", importance, KINDS)


def _search(
    net: Architecture, scores: Mapping[str, np.ndarray], price: Price, reduction, solver: str, floor, divisor: int
) -> tuple[dict[Group, int], float]:
    """Searches for the group sizes that meet the budget closely, with the largest divisor that can.

    Returns the sizes and the solver's gap. Raises a `ValueError` if the floor keeps more than the budget.
    """
    before = price(net)
    target = (1 - reduction) * before
    # A coarse step may miss a small budget: a channel of a residual chain costs in many layers.
    while True:
        found = _chosen(net, scores, price, target, solver, floor, divisor)
        if found and (divisor == 1 or target - price(with_sizes(net, found[0])) <= 0.01 * reduction * before):
            return found
        if not found and divisor == 1:
            smallest = with_sizes(net, {group: _least(group.size, floor) for group in groups(net)})
            raise ValueError(
                f"Expected reduction of at most {1 - price(smallest) / before:.3f}, which keeps a share of {floor} of "
                f"each group of channels. Received: reduction={reduction}"
            )
        divisor = max(1, divisor // 2)


def _chosen(
    net: Architecture, scores, price: Price, target: float, solver: str, floor: float, divisor: int
) -> tuple[dict[Group, int], float] | None:
    """Chooses how many channels of each group to keep, those of the highest scores first.

    Returns the group sizes and the solver's gap, or None if even the smallest sizes cost more than the target.
    """
    parts = groups(net)
    steps = [_steps(group.size, _least(group.size, floor), divisor) for group in parts]
    before = price(net)
    # Savings of one channel, including those in the next layers.
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
    # The savings of several groups do not add up, so search for the capacity at which the net meets the target.
    low, high = 0.0, float(np.sum(items.weights))
    for _ in range(50):
        middle = (low + high) / 2
        met = fits(items.counts(knapsack.greedy(items.values, items.weights, middle)))
        low, high = (middle, high) if met else (low, middle)
    counts = items.counts(knapsack.SOLVERS[solver](items.values, items.weights, low))
    counts = items.filled(counts, fits)
    return sizes_of(counts), items.solution(counts).gap


def _least(size: int, floor: float) -> int:
    """Returns the smallest number of channels that a group may keep."""
    return max(1, math.ceil(floor * size))


def _steps(size: int, least: int, divisor: int) -> np.ndarray:
    """Returns the numbers of channels that a group may keep: multiples of the divisor, and all of them."""
    divisor = min(divisor, size)
    lowest = -(-least // divisor) * divisor
    return np.unique(np.append(np.arange(min(lowest, size), size, divisor), size))


def _removed(sizes: Mapping[Group, int], scores: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Returns the channels of the lowest scores, in ascending order, of each group that does not keep all."""
    removed = {
        group.name: tuple(np.sort(np.argsort(-scores[group.name], kind="stable")[size:]).tolist())
        for group, size in sizes.items()
    }
    return {name: channels for name, channels in removed.items() if channels}


def _checked(scores: Mapping[str, np.ndarray], parts: tuple[Group, ...]) -> dict[str, np.ndarray]:
    """Returns a user's scores as arrays of floats, if there is a valid one for each channel."""
    found = {name: np.asarray(values, float) for name, values in scores.items()}
    for group in parts:
        values = found.get(group.name)
        if values is None or values.shape != (group.size,) or not np.isfinite(values).all() or (values < 0).any():
            received = "none" if values is None else f"shape {values.shape}"
            raise ValueError(
                f"Expected importance of {group.name} as {group.size} finite numbers of at least 0. Received: "
                f"{received}"
            )
    return found

"""Solvers of the 0/1 knapsack problem: which items to keep within a capacity. Uses NumPy only."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Solution:
    """A choice of items.

    Args:
        chosen: Array of booleans, one per item.
        value: Float, sum of the chosen items' values.
        bound: Float, upper bound on the value of any choice: the optimum if items could be divided.
    """

    chosen: np.ndarray
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """Share of the bound by which the choice may fall short of the best one."""
        return max(0.0, 1 - self.value / self.bound) if self.bound > 0 else 0.0


def greedy(values, weights, capacity: float) -> Solution:
    """Goes through the items by descending value per weight and takes each that still fits.

    Args:
        values: Array of floats, at least 0.
        weights: Array of integers or floats, at least 0.
        capacity: Number, largest total weight of the chosen items.

    Returns:
        A `Solution`. Its value is at least the bound minus the value of one item.

    Raises:
        ValueError: If a weight above 0 is so small that its value per weight overflows.

    Example:

    >>> solution = greedy([60, 100, 120], [10, 20, 30], 50)
    >>> solution.chosen.tolist(), solution.value, solution.bound
    ([True, True, False], 160.0, 240.0)

    Reference:
        Dantzig, Discrete-Variable Extremum Problems, Operations Research 5(2), 1957.
    """
    values, weights = np.asarray(values, float), np.asarray(weights)
    order, whole, left = _whole_items(values, weights, capacity)
    chosen = np.zeros(len(values), bool)
    chosen[order[:whole]] = True
    bound = float(values[chosen].sum())
    if whole < len(order):
        bound += float(left / weights[order[whole]] * values[order[whole]])
        lightest = np.minimum.accumulate(weights[order][::-1])[::-1]  # of an item and all after it
        for place in range(whole + 1, len(order)):
            if lightest[place] > left:
                break
            item = order[place]
            if weights[item] <= left:
                chosen[item] = True
                left -= weights[item]
    return Solution(chosen, float(values[chosen].sum()), bound)


def _whole_items(values: np.ndarray, weights: np.ndarray, capacity: float) -> tuple[np.ndarray, int, float]:
    """Returns the items by descending value per weight, how many of the first ones fit, and the capacity left."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        density = np.where(weights > 0, values / weights, np.inf)
    if np.isinf(density[weights > 0]).any():  # infinities cannot be ranked
        raise ValueError(
            "Expected weights that are 0 or large enough to divide their values by. Received: a weight of "
            f"{np.min(weights[weights > 0])}"
        )
    order = np.argsort(-density, kind="stable")
    total = np.cumsum(weights[order])
    whole = int(np.searchsorted(total, capacity, side="right"))
    return order, whole, capacity - (total[whole - 1] if whole else 0)


STATES = 5_000_000  # limit of the exact solver's states at a time: about a gigabyte


def exact(values, weights, capacity: float) -> Solution:
    """Finds an optimal choice, by dynamic programming over the items on which the greedy choice may be wrong.

    With thousands of items of almost equal value per weight, as channels are, a general solver of integer programs
    (SciPy's HiGHS) takes minutes. This one takes a tenth of a second.

    Args:
        values: See `greedy()`.
        weights: See `greedy()`.
        capacity: See `greedy()`.

    Returns:
        A `Solution`.

    Raises:
        RuntimeError: If too many choices are almost equally good.
        ValueError: See `greedy()`.

    Example:

    >>> exact([60, 100, 120], [10, 20, 30], 50).chosen.tolist()
    [False, True, True]

    Reference:
        Pisinger, A Minimal Algorithm for the 0-1 Knapsack Problem, Operations Research 45(5), 1997.
    """
    values, weights = np.asarray(values, float), np.asarray(weights)
    best = greedy(values, weights, capacity)
    order, whole, room = _whole_items(values, weights, capacity)
    if whole == len(order):
        return best
    price = values[order[whole]] / weights[order[whole]]
    chosen = np.zeros(len(values), bool)
    chosen[order[:whole]] = True
    # Choosing an item against its price lowers the bound by this much. The losses of a choice add up.
    loss = np.abs(values - price * weights)
    limit, end = best.bound - best.value, None
    # A state is the weight and the loss of the changes so far. `steps` records how each state was reached.
    weight, lost = np.zeros(1, weights.dtype), np.zeros(1)
    steps: list[tuple[int, np.ndarray, np.ndarray]] = []
    for item in np.argsort(loss, kind="stable"):
        if loss[item] >= limit:
            break
        change = -weights[item] if chosen[item] else weights[item]
        origin = np.tile(np.arange(len(weight)), 2)
        turned = np.repeat([False, True], len(weight))
        weight, lost = np.append(weight, weight + change), np.append(lost, lost + loss[item])
        alive = np.flatnonzero(lost < limit)
        alive = alive[np.lexsort((lost[alive], weight[alive]))]
        # Drop a state that weighs at least as much as another without being worth more.
        worth = price * weight[alive] - lost[alive]
        alive = alive[np.append(True, worth[1:] > np.maximum.accumulate(worth)[:-1])]
        if len(alive) > STATES:
            raise RuntimeError(
                f"Expected items that differ more. Received: more than {STATES} almost equal choices. Nearest: 'greedy'"
            )
        weight, lost = weight[alive], lost[alive]
        steps.append((int(item), origin[alive], turned[alive]))
        total = np.where(weight <= room, lost + price * (room - weight), np.inf)
        state = int(total.argmin())
        if total[state] < limit:
            limit, end = total[state], (len(steps), state)
    if end is None:
        return best
    place, state = end
    for item, origin, turned in reversed(steps[:place]):
        if turned[state]:
            chosen[item] = ~chosen[item]
        state = origin[state]
    return Solution(chosen, float(values[chosen].sum()), best.bound)


class Items:
    """Items in groups. The items of a group are taken in order.

    Args:
        values: List of arrays of floats, one per group.
        weights: List of arrays of numbers, one per group.
    """

    def __init__(self, values: list[np.ndarray], weights: list[np.ndarray]):
        self.values, self.weights = np.concatenate(values), np.concatenate(weights)
        self.sizes = [len(group) for group in values]
        self._owner = np.repeat(np.arange(len(values)), self.sizes)
        self._place = np.concatenate([np.arange(size) for size in self.sizes])
        self._start = np.cumsum([0, *self.sizes])

    def counts(self, solution: Solution) -> np.ndarray:
        """Returns the number of items that a solution takes of each group."""
        return np.bincount(self._owner[solution.chosen], minlength=len(self.sizes))

    def solution(self, counts: np.ndarray) -> Solution:
        """Returns the solution with these numbers of items, with the bound for a capacity equal to their weight."""
        chosen = self._place < counts[self._owner]
        bound = greedy(self.values, self.weights, self.weights[chosen].sum()).bound
        return Solution(chosen, float(self.values[chosen].sum()), bound)

    def filled(self, counts: np.ndarray, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
        """Drops items of the lowest value per weight until the rest fits, then adds the best items that still fit.

        Args:
            counts: Array of integers, number of items taken of each group.
            fits: Function of such an array that returns whether these items fit. No items at all always fit.

        Returns:
            Array of integers, the new counts.
        """

        def density(group: int, place: int) -> float:
            item = self._start[group] + place
            return float(self.values[item] / self.weights[item]) if self.weights[item] > 0 else math.inf

        counts = counts.copy()
        while not fits(counts):
            counts[min(np.flatnonzero(counts).tolist(), key=lambda group: density(group, counts[group] - 1))] -= 1
        while True:
            open_groups = [group for group, size in enumerate(self.sizes) if counts[group] < size]
            for group in sorted(open_groups, key=lambda group: density(group, counts[group]), reverse=True):
                counts[group] += 1
                if fits(counts):
                    break
                counts[group] -= 1
            else:
                return counts


SOLVERS = {"greedy": greedy, "exact": exact}

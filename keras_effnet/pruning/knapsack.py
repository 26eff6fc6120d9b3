"""The 0/1 knapsack: which items to keep within a capacity. NumPy only."""

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
        bound: Float, what no choice exceeds: the optimum if items could be divided.
    """

    chosen: np.ndarray
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """Share of the bound that the choice may lack."""
        return max(0.0, 1 - self.value / self.bound) if self.bound > 0 else 0.0


def greedy(values, weights, capacity: float) -> Solution:
    """Takes the items in the order of value per weight, each that still fits.

    Args:
        values: Array of floats, at least 0.
        weights: Array of integers or floats, at least 0.
        capacity: Number, what the chosen items' weights may add up to.

    Returns:
        A `Solution`. Its value is at least the bound less the value of one item.

    Raises:
        ValueError: If a weight above 0 is so small that its value per weight is beyond a float.

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
        lightest = np.minimum.accumulate(weights[order][::-1])[::-1]  # of an item and all behind it
        for place in range(whole + 1, len(order)):
            if lightest[place] > left:
                break
            item = order[place]
            if weights[item] <= left:
                chosen[item] = True
                left -= weights[item]
    return Solution(chosen, float(values[chosen].sum()), bound)


def _whole_items(values: np.ndarray, weights: np.ndarray, capacity: float) -> tuple[np.ndarray, int, float]:
    """The items by falling value per weight, how many of these fit one after the other, and the capacity left."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        density = np.where(weights > 0, values / weights, np.inf)
    if np.isinf(density[weights > 0]).any():  # infinities have no order
        raise ValueError(
            "Expected weights that are 0, or large enough for their values to be divided by. Received: "
            f"{np.min(weights[weights > 0])} among the weights"
        )
    order = np.argsort(-density, kind="stable")
    total = np.cumsum(weights[order])
    whole = int(np.searchsorted(total, capacity, side="right"))
    return order, whole, capacity - (total[whole - 1] if whole else 0)


STATES = 5_000_000  # of the exact solver at once: about a gigabyte


def exact(values, weights, capacity: float) -> Solution:
    """Finds a best choice: dynamic programming over the items that the greedy choice leaves in doubt.

    A general solver of integer programmes (SciPy's HiGHS) takes minutes where thousands of items are nearly worth
    their price, as channels are; this takes a tenth of a second.

    Args:
        values: See `greedy()`.
        weights: See `greedy()`.
        capacity: See `greedy()`.

    Returns:
        A `Solution`.

    Raises:
        RuntimeError: If too many choices are alike.
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
    # To choose an item otherwise than by its price costs the bound this much: of a choice these losses add up.
    loss = np.abs(values - price * weights)
    limit, end = best.bound - best.value, None
    # A state is what the changes so far weigh and lose. `steps` remembers how each came about.
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
        # One that weighs no less and is worth no more than another leads nowhere.
        worth = price * weight[alive] - lost[alive]
        alive = alive[np.append(True, worth[1:] > np.maximum.accumulate(worth)[:-1])]
        if len(alive) > STATES:
            raise RuntimeError("Expected items that differ more. Received: too many equal choices. Use 'greedy'")
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
    """Items in groups, of each of which the first ones are taken first.

    Args:
        values: List of an array of floats per group.
        weights: List of an array of numbers per group.
    """

    def __init__(self, values: list[np.ndarray], weights: list[np.ndarray]):
        self.values, self.weights = np.concatenate(values), np.concatenate(weights)
        self.sizes = [len(group) for group in values]
        self._owner = np.repeat(np.arange(len(values)), self.sizes)
        self._place = np.concatenate([np.arange(size) for size in self.sizes])
        self._start = np.cumsum([0, *self.sizes])

    def counts(self, solution: Solution) -> np.ndarray:
        """How many items of each group a solution takes."""
        return np.bincount(self._owner[solution.chosen], minlength=len(self.sizes))

    def solution(self, counts: np.ndarray) -> Solution:
        """The solution that takes so many items of each group, with the bound at what they weigh."""
        chosen = self._place < counts[self._owner]
        bound = greedy(self.values, self.weights, self.weights[chosen].sum()).bound
        return Solution(chosen, float(self.values[chosen].sum()), bound)

    def filled(self, counts: np.ndarray, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
        """Drops the items of the least value per weight until all fit, then takes the best ones that still do.

        Args:
            counts: Array of integers, items of each group that are taken.
            fits: Function of such an array, which is true of none.

        Returns:
            Array of integers.
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

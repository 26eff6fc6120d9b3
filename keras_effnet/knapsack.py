"""The 0/1 knapsack: which items to keep within a capacity. NumPy; the exact solver is SciPy's HiGHS."""

import math
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
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(weights > 0, values / weights, np.inf)
    order = np.argsort(-density, kind="stable")
    total = np.cumsum(weights[order])
    whole = int(np.searchsorted(total, capacity, side="right"))
    return order, whole, capacity - (total[whole - 1] if whole else 0)


def exact(values, weights, capacity: float) -> Solution:
    """Finds a best choice: an integer programme over the items that the greedy choice leaves in doubt.

    Args:
        values: See `greedy()`.
        weights: See `greedy()`.
        capacity: See `greedy()`.

    Returns:
        A `Solution`.

    Raises:
        ImportError: If SciPy is missing.
        RuntimeError: If the solver gives up.

    Example:

    >>> exact([60, 100, 120], [10, 20, 30], 50).chosen.tolist()
    [False, True, True]

    Reference:
        Dembo and Hammer, A Reduction Algorithm for Knapsack Problems, Methods of Operations Research 36, 1980.
    """
    values, weights = np.asarray(values, float), np.asarray(weights)
    best = greedy(values, weights, capacity)
    order, whole, _ = _whole_items(values, weights, capacity)
    if whole == len(order):
        return best
    price = values[order[whole]] / weights[order[whole]]
    # What an item gives beyond its price: a choice against that is worth so much less than the bound.
    profit = values - price * weights
    by_doubt = np.argsort(np.abs(profit), kind="stable")
    size = 32
    while True:
        # Items of a profit beyond what the best choice lacks are decided.
        core = by_doubt[:size]
        chosen = profit > 0
        chosen[core] = False
        chosen[core] = _milp(values[core], weights[core], capacity - weights[chosen].sum())
        value = float(values[chosen].sum())
        if value > best.value:
            best = Solution(chosen, value, best.bound)
        if size >= len(order) or abs(profit[by_doubt[size]]) > best.bound - best.value:
            return best
        size *= 2


def _milp(values: np.ndarray, weights: np.ndarray, capacity: float) -> np.ndarray:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError(
            "Expected SciPy, which solves the knapsack exactly. Bring it with: pip install scipy; or choose 'greedy'"
        ) from error
    if np.issubdtype(weights.dtype, np.integer):
        capacity = math.floor(capacity)
    scale, limit = float(weights.max()) or 1.0, capacity
    while True:
        result = milp(
            -values * (1e4 / (float(values.max()) or 1.0)),  # its tolerance is absolute, 1e-6
            constraints=LinearConstraint((weights / scale)[None], ub=limit / scale),
            bounds=Bounds(0, 1),
            integrality=np.ones(len(values)),
            options={"mip_rel_gap": 0.0, "time_limit": 120.0},
        )
        if result.status != 0:
            raise RuntimeError(f"Expected a solved knapsack of {len(values)} items. Received: {result.message}")
        chosen = np.asarray(result.x) > 0.5
        excess = weights[chosen].sum() - capacity
        if excess <= 0:
            return chosen
        limit -= max(excess, 1e-6 * scale)  # its tolerance, 1e-6, let a little too much in


SOLVERS = {"greedy": greedy, "exact": exact}

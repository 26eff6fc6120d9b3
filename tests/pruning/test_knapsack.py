"""Tests the knapsack solvers against all choices, SciPy and each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_effnet.pruning import knapsack

# Costs are counts or measurements: 0, or not too small a fraction of the largest.
NUMBERS = st.integers(0, 60) | st.floats(1e-9, 60)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=11), st.floats(0, 1.1), st.booleans())
def test_solvers_against_all_choices(items, share, whole):
    values, weights = (np.array(column) for column in zip(*items, strict=True))
    if whole:
        weights = weights.astype(int)
    capacity = share * weights.sum()
    choices = (np.arange(2 ** len(items))[:, None] >> np.arange(len(items)) & 1).astype(bool)
    fitting = choices[choices @ weights <= capacity]
    best = (fitting @ values).max()
    for name, solver in knapsack.SOLVERS.items():
        solution = solver(values, weights, capacity)
        assert weights[solution.chosen].sum() <= capacity * (1 + 1e-12)
        assert solution.value == pytest.approx(values[solution.chosen].sum())
        assert solution.bound >= best * (1 - 1e-12)
        assert solution.gap == pytest.approx(max(0, 1 - solution.value / solution.bound) if solution.bound else 0)
        # A solution is at most its reported gap below the best value. The exact solver reaches it.
        assert best * (1 - 1e-12) - solution.value <= solution.gap * solution.bound + 1e-9
        if name == "exact":
            assert solution.value == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert knapsack.greedy(values, weights, capacity).value >= best - values.max() - 1e-9


@pytest.mark.parametrize("name", knapsack.SOLVERS)
def test_weights_too_small_to_divide_by_are_refused(name):
    with pytest.raises(ValueError, match=r"0 or large enough to divide their values by. Received: a weight of 2"):
        knapsack.SOLVERS[name]([4, 60], [2.3e-308, 2.4e-308], 2.5e-308)


def test_the_bound_is_the_fractional_optimum():
    from scipy.optimize import linprog

    generator = np.random.default_rng(0)
    for _ in range(20):
        values, weights = generator.random(50), generator.integers(1, 100, 50)
        capacity = generator.random() * weights.sum()
        divided = linprog(-values, weights[None], [capacity], bounds=(0, 1))
        assert knapsack.greedy(values, weights, capacity).bound == pytest.approx(-divided.fun, rel=1e-9)


def test_the_exact_solver_against_a_general_one():
    from scipy.optimize import Bounds, LinearConstraint, milp

    generator = np.random.default_rng(1)
    for size in (20, 40, 60):
        values, weights = generator.lognormal(0, 1, size), generator.integers(1, 1000, size)
        capacity = int(0.4 * weights.sum())
        general = milp(
            -values,
            constraints=LinearConstraint(weights[None], ub=capacity),
            bounds=Bounds(0, 1),
            integrality=np.ones(size),
            options={"mip_rel_gap": 0.0},
        )
        assert knapsack.exact(values, weights, capacity).value == pytest.approx(-general.fun, rel=1e-6)


def test_the_exact_solver_gains_where_greedy_stops_short():
    """As with channels, values have a heavy tail and few sizes, so that thousands of items are almost equally good."""
    generator = np.random.default_rng(0)
    weights = np.repeat(generator.integers(1_000, 100_000, 16), 500)
    values = generator.lognormal(0, 3, len(weights))
    capacity = int(0.6 * weights.sum())
    near, best = (solver(values, weights, capacity) for solver in (knapsack.greedy, knapsack.exact))
    assert weights[best.chosen].sum() <= capacity
    assert 0 <= best.gap < near.gap < 1e-4


def test_nothing_and_everything():
    for solver in knapsack.SOLVERS.values():
        assert not solver([1.0, 2.0], [3, 4], 2).chosen.any()
        assert solver([1.0, 2.0], [3, 4], 7).chosen.all()
        assert solver([1.0, 0.0], [0, 0], 0).value == 1

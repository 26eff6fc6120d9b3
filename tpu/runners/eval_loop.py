"""Evaluates during a run, with either runner."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orbit

from keras_effnet.tpu.resume.stop_signals import Asked


class Evaluator(orbit.AbstractEvaluator):
    """Evaluates on all examples, or until it is asked to stop.

    Args:
        score: Function of a batch. Returns a dict of sums over the batch on all replicas, with the number of
            `examples`, and `asked`, above 0 to stop.
        batches: Function without arguments. Returns an iterable of all batches.
    """

    def __init__(self, score: Callable[..., Mapping[str, Any]], batches: Callable[[], Iterable]):
        self._score, self._batches = score, batches

    def evaluate(self, num_steps) -> Any:
        """Evaluates on all examples.

        Args:
            num_steps: Not used.

        Returns:
            Dict of means over all examples, and their number.

        Raises:
            Asked: If it was asked to stop.
        """
        totals: dict[str, float] = {}
        for batch in self._batches():
            for name, value in self._score(*batch).items():
                totals[name] = totals.get(name, 0.0) + float(value)
            if totals.pop("asked"):
                raise Asked
        examples = totals.pop("examples")
        return {name: value / examples for name, value in totals.items()} | {"examples": examples}

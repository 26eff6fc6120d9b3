"""Pruning plans: which channels of a net stay, and the JSON file that stores them."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.nets.architecture import Architecture, Widths, with_widths


@dataclass(frozen=True)
class Plan:
    """A choice of channels to remove from a net. Its file is a small JSON object.

    Args:
        model: Name of the net's variant, or of the variant that the net was cut from.
        blocks: Dict from block name to the number of channels that stay, `(expand, se, out)`.
        removed: Dict from group name to the tuple of channels to remove, counted from 0.
        before: Float, cost of the whole net.
        after: Float, cost of the pruned net.
        asked: Float, requested reduction as a share of the cost.
        cost: `"macs"`, `"latency"` (in seconds) or `"params"`.
        solver: `"greedy"` or `"exact"`.
        gap: Float, difference between the fractional bound and the importance that stays, as a share of the bound. No
            choice with the same cost, summed over the groups, keeps more importance than the bound.
        importance: String, how the importance of the channels was measured.
    """

    model: str | None
    blocks: dict[str, Widths]
    removed: dict[str, tuple[int, ...]] = field(repr=False)
    before: float
    after: float
    asked: float
    cost: str = "macs"
    solver: str = "greedy"
    gap: float = 0.0
    importance: str = "gradient"

    @property
    def reduction(self) -> float:
        """Reduction as a share of the cost."""
        return 1 - self.after / self.before

    def save(self, path: str | os.PathLike) -> Path:
        """Saves the plan as JSON.

        Args:
            path: Path of the file. Its folder must exist.

        Returns:
            The path.

        Raises:
            OSError: If the file cannot be written.
        """
        from keras_effnet import files

        rows = dataclasses.asdict(self)
        rows["removed"] = {name: _told(channels) for name, channels in self.removed.items()}
        # One line per entry of a dict, not one per number.
        parts = [f"  {json.dumps(key)}: {_lines(value)}" for key, value in rows.items()]
        with files.replacing(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Loads a plan from a file that `save()` wrote.

        Args:
            path: Path of the file.

        Returns:
            A `Plan`.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file is not a plan.
        """
        text = Path(path).read_bytes()
        try:
            rows = json.loads(text)
            rows["blocks"] = {str(name): tuple(widths) for name, widths in rows["blocks"].items()}
            rows["removed"] = {str(name): _channels(told) for name, told in rows["removed"].items()}
            plan = cls(**rows)
            if not 0 <= plan.after <= plan.before or not plan.before or not plan.blocks:
                raise ValueError("its costs or blocks are not valid")
            return plan
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Expected the JSON of a plan. Received: {str(path)!r} ({error})") from error


def _lines(value) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n  }"


def _told(channels: Sequence[int]) -> str:
    """Writes ascending numbers as ranges, such as "0-3,7"."""
    array = np.asarray(channels, int)
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1) if len(array) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _channels(told: str) -> tuple[int, ...]:
    """Reads what `_told()` wrote."""
    ends = [run.partition("-")[::2] for run in told.split(",") if told]
    return tuple(channel for first, last in ends for channel in range(int(first), int(last or first) + 1))


def narrowed(architecture: Architecture, plan: Any) -> Architecture:
    """Returns the architecture of a variant with the channels of a plan.

    Args:
        architecture: An `Architecture`, that of a variant.
        plan: A `Plan`, the path of its file, or widths as in `architecture.with_widths()`.

    Returns:
        An `Architecture`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the plan is for another net.
    """
    if isinstance(plan, str | os.PathLike):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        if plan.model not in (None, architecture.name):
            raise ValueError(f"Expected a plan for {architecture.name!r}. Received: one for {plan.model!r}")
        plan = plan.blocks
    if not isinstance(plan, Mapping | Sequence):
        raise ValueError(
            "Expected a Plan, the path of one, or (expand, se, out) for each block. "
            f"Received: {type(plan).__name__} {plan!r}"
        )
    return with_widths(architecture, plan)

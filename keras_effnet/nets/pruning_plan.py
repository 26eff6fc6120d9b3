"""A pruning plan as data: which channels of a net stay, and its JSON file."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.nets.architecture import Architecture, Widths, with_widths

# Plans


@dataclass(frozen=True)
class Plan:
    """Which channels of a net go. Its file is a small JSON object.

    Args:
        model: Name of the variant that the net is, or was cut from.
        blocks: Dict from a block's name to the channels that stay, `(expand, se, out)`.
        removed: Dict from a group's name to the tuple of its channels, from 0, that go.
        before: Float, cost of the whole net.
        after: Float, cost of the smaller one.
        asked: Float, the share of the cost that was to be saved.
        cost: `"macs"`, `"latency"` (in seconds) or `"params"`.
        solver: `"greedy"` or `"exact"`.
        gap: Float, how much less importance stays than the fractional bound, as a share of that: no choice of the same
            cost, summed up over the groups, has more than the bound.
        importance: String, how the channels were judged.
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
        """Share of the cost that is saved."""
        return 1 - self.after / self.before

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the plan as JSON.

        Args:
            path: Path of the file. Its folder exists.

        Returns:
            The path.

        Raises:
            OSError: If the file cannot be written.
        """
        from keras_effnet import files

        rows = dataclasses.asdict(self)
        rows["removed"] = {name: _told(channels) for name, channels in self.removed.items()}
        # A line per entry of a dict, and none per number.
        parts = [f"  {json.dumps(key)}: {_lines(value)}" for key, value in rows.items()]
        with files.replacing(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads what `save()` wrote.

        Args:
            path: Path of the file.

        Returns:
            A `Plan`.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it holds no plan.
        """
        text = Path(path).read_bytes()
        try:
            rows = json.loads(text)
            rows["blocks"] = {str(name): tuple(widths) for name, widths in rows["blocks"].items()}
            rows["removed"] = {str(name): _channels(told) for name, told in rows["removed"].items()}
            plan = cls(**rows)
            if not 0 <= plan.after <= plan.before or not plan.before or not plan.blocks:
                raise ValueError("it saves nothing that can be")
            return plan
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Expected the JSON of a plan. Received: {str(path)!r} ({error})") from error


def _lines(value) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n  }"


def _told(channels: Sequence[int]) -> str:
    """Numbers in ascending order as ranges: "0-3,7"."""
    array = np.asarray(channels, int)
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1) if len(array) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _channels(told: str) -> tuple[int, ...]:
    ends = [run.partition("-")[::2] for run in told.split(",") if told]
    return tuple(channel for first, last in ends for channel in range(int(first), int(last or first) + 1))


def narrowed(architecture: Architecture, plan: Any) -> Architecture:
    """A variant with the channels of a plan.

    Args:
        architecture: An `Architecture`, that of a variant.
        plan: A `Plan`, the path of its file, or widths as `arch.with_widths()` takes them.

    Returns:
        An `Architecture`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the plan is of another net.
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

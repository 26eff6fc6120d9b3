"""The ranges of numbers that users give, and the check that they are in them."""

import dataclasses
import math
import numbers
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The values that a number may have. In a dataclass, it stands beside the type of a field, in `Annotated`.

    Args:
        least: Float.
        most: Float. Defaults to infinity, which is not allowed itself.
        open: String: `"least"`, `"most"` or `"both"` if these are not allowed. Defaults to `""`: they are.

    Example:

    >>> from keras_effnet.ranges import Range
    >>> print(Range(0, 1, "most")), 1.0 in Range(0, 1), float("nan") in Range(0, 1)
    of at least 0 and below 1
    (None, True, False)
    """

    least: float
    most: float = math.inf
    open: Literal["", "least", "most", "both"] = ""

    def __contains__(self, value: float) -> bool:
        above = self.least < value if self.open in ("least", "both") else self.least <= value
        below = value < self.most if self.open in ("most", "both") or self.most == math.inf else value <= self.most
        return above and below

    def __str__(self):
        if self.open == "both":
            return f"between {self.least:g} and {self.most:.10g}"
        least = f"above {self.least:g}" if self.open == "least" else f"of at least {self.least:g}"
        if self.most == math.inf:
            return least
        return f"{least} and {'below' if self.open == 'most' else 'at most'} {self.most:.10g}"


POSITIVE = Range(0, open="least")
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, "most")
ABOVE_0 = Range(0, 1, "least")
INSIDE = Range(0, 1, "both")


def check(**arguments: tuple[Any, type, Range]) -> None:
    """Checks the types and the ranges of arguments.

    Args:
        **arguments: For each argument, its value, `int` or `float`, and its `Range`.

    Raises:
        ValueError: If a value has another type or is not in its range.

    Example:

    >>> from keras_effnet.ranges import COUNT, check
    >>> check(batch_size=(0, int, COUNT))
    Traceback (most recent call last):
    ...
    ValueError: Expected batch_size of at least 1. Received: 0
    """
    for name, (value, kind, within) in arguments.items():
        _raise(name, value, _expected(value, kind, True, within))


def check_fields(record: Any, ranges: bool = True) -> None:
    """Checks the types and the ranges of all fields of a dataclass.

    Args:
        record: A dataclass whose fields may be dataclasses.
        ranges: Boolean, whether to check the ranges too. Defaults to True.

    Raises:
        ValueError: If a value has another type than its field, or is not in its range.

    Example:

    >>> from keras_effnet.tpu.config import Optimizer, Recipe
    >>> from keras_effnet.ranges import check_fields
    >>> check_fields(Recipe(optimizer=Optimizer(peak=-1.0)))
    Traceback (most recent call last):
    ...
    ValueError: Expected optimizer.peak of at least 0. Received: -1.0
    """
    for name, value, hint in _fields(record):
        _raise(name, value, _expected(value, hint, ranges))


def _raise(name: str, value: Any, expected: str) -> None:
    if expected:
        raise ValueError(f"Expected {name} {expected}. Received: {value!r}")


_WORDS = {str: "a string", bool: "True or False"}


def _fields(record: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(record), include_extras=True)
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(hints[field.name]) and dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, hints[field.name]


def _expected(value: Any, hint: Any, ranges: bool, within: Range | None = None) -> str:
    """Returns what was expected in place of a value, or an empty string if it fits."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _expected(value, inside[0], ranges, next(each for each in inside[1:] if isinstance(each, Range)))
    if kind in (Union, types.UnionType):
        answers = [_expected(value, each, ranges, within) for each in inside]
        return "" if "" in answers else max(answers, key=len)
    if kind is Literal:
        return "" if value in inside and isinstance(value, str) else f"as one of {', '.join(map(str, inside))}"
    if kind is tuple:
        if not isinstance(value, tuple | list):
            return "as a tuple"
        return next(filter(None, (_expected(each, inside[0], ranges, within) for each in value)), "")
    if hint is types.NoneType:
        return "" if value is None else "as None"
    if hint not in (int, float):
        return "" if isinstance(value, hint) else f"as {_WORDS.get(hint, hint.__name__)}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if hint is int else numbers.Real):
        return f"as {'an integer' if hint is int else 'a number'} {within or ''}".rstrip()
    if not ranges or within is None or float(value) in within:
        return ""
    return str(within) if math.isfinite(value) else f"as a finite number {within}"

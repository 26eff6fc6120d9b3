"""Errors for a wrong choice: what was expected, what was received, the nearest valid choice."""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

Received = TypeVar("Received")


# What lists all choices of a kind, where they are too many for one line.
_COMMANDS = {
    "model": "keras-effnet list",
    "weights": "keras-effnet list --weights",
    "recipe": "keras-effnet train",
}
_FEW = 8


def unknown(what: str, received: object, choices: Iterable[str]) -> ValueError:
    """Returns the error for a name that is not among the choices.

    Args:
        what: String, the kind of choice: `"model"`, `"pooling"`, ...
        received: The received value.
        choices: The valid names.

    Returns:
        A `ValueError` for the caller to raise. Few choices are all named; of many, the nearest.

    Example:

    >>> print(unknown("pooling", "average", ["avg", "max"]))
    Unknown pooling. Expected one of: avg, max. Received: 'average'. Nearest: 'avg'
    """
    choices = list(choices)
    by_letters = {_letters(choice): choice for choice in choices}
    key = _letters(received)
    few = len(choices) <= _FEW
    nearest = difflib.get_close_matches(key, by_letters, n=1 if few else 3, cutoff=0.4)
    nearest = nearest or [choice for choice in by_letters if key and choice.endswith(key)][:1]
    parts = [f"Unknown {what}", f"Received: {received!r}"]
    if few:
        parts.insert(1, f"Expected one of: {', '.join(choices)}")
    elif not nearest:
        parts.insert(1, f"Expected one of {len(choices)} names, such as {', '.join(choices[:3])}")
    if nearest:
        parts.append(f"Nearest: {', '.join(repr(by_letters[name]) for name in nearest)}")
    command = _COMMANDS.get(what.split()[0])
    if command and not few:
        parts.append(f"`{command}` shows all")
    return ValueError(". ".join(parts))


def one_of(what: str, received: Received, choices: Collection[Any]) -> Received:
    """Checks a choice.

    Args:
        what: See `unknown()`.
        received: See `unknown()`.
        choices: See `unknown()`.

    Returns:
        The received value.

    Raises:
        ValueError: If it is not among the choices.

    Example:

    >>> one_of("pooling", "avg", ["avg", "max"])
    'avg'
    """
    if received not in choices:
        raise unknown(what, received, choices)
    return received


def _letters(name: object) -> str:
    return re.sub("[^a-z0-9]", "", str(name).lower())

"""How a wrong choice is told: what was expected, what was received, the nearest valid choice. Standard library only."""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

Received = TypeVar("Received")


def unknown(what: str, received: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not among the choices.

    Args:
        what: String, what the name stands for: `"model"`, `"weights"`, ...
        received: The value that came.
        choices: The valid names.

    Returns:
        A `ValueError`, to be raised by the caller.

    Example:

    >>> print(unknown("pooling", "average", ["avg", "max"]))
    Unknown pooling. Expected one of: avg, max. Received: 'average'. Nearest: 'avg'
    """
    choices = list(choices)
    by_letters = {_letters(choice): choice for choice in choices}
    key = _letters(received)
    nearest = difflib.get_close_matches(key, by_letters, n=1, cutoff=0.4) or [
        choice for choice in by_letters if key and choice.endswith(key)
    ]
    hint = f". Nearest: {by_letters[nearest[0]]!r}" if nearest else ""
    return ValueError(f"Unknown {what}. Expected one of: {', '.join(choices)}. Received: {received!r}{hint}")


def one_of(what: str, received: Received, choices: Collection[Any]) -> Received:
    """A choice, if it is one.

    Args:
        what: See `unknown()`.
        received: See `unknown()`.
        choices: See `unknown()`.

    Returns:
        What was received.

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

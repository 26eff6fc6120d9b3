"""Errors for a wrong choice: what was expected, what was received, the nearest valid choice, the command to run."""

import difflib
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

Received = TypeVar("Received")


# What lists all choices of a kind, where they are too many for one line.
_COMMANDS = {
    "model": "keras-effnet list",
    "weights": "keras-effnet list --weights",
    "recipe": "keras-effnet train",
}
FEW = 8


def unknown(what: str, received: object, choices: Iterable[str], key: Callable[[str], str] | None = None) -> ValueError:
    """Returns the error for a name that is not among the choices.

    Args:
        what: String, the kind of choice: `"model"`, `"pooling"`, ...
        received: The received value.
        choices: The valid names.
        key: Function from a name to the letters to compare. Defaults to None: all letters and digits.

    Returns:
        A `ValueError` for the caller to raise. Few choices are all named; of many, the nearest.

    Example:

    >>> print(unknown("pooling", "average", ["avg", "max"]))
    Unknown pooling. Expected one of: avg, max. Received: 'average'. Nearest: 'avg'
    """
    choices = list(choices)
    letters = _letters if key is None else lambda name: key(str(name))
    by_letters = {letters(choice): choice for choice in choices}
    wanted = letters(received)
    are_few = len(choices) <= FEW
    nearest = difflib.get_close_matches(wanted, by_letters, n=1 if are_few else 3, cutoff=0.4)
    if not nearest and key is not None:
        return unknown(what, received, choices)
    nearest = nearest or [choice for choice in by_letters if wanted and choice.endswith(wanted)][:1]
    parts = [f"Unknown {what}", f"Received: {received!r}"]
    if are_few:
        parts.insert(1, f"Expected one of: {', '.join(choices)}")
    elif not nearest:
        parts.insert(1, f"Expected one of {len(choices)} names, such as {', '.join(choices[:3])}")
    if nearest:
        parts.append(f"Nearest: {', '.join(repr(by_letters[name]) for name in nearest)}")
    command = _COMMANDS.get(what.split()[0])
    if command and not are_few:
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


def few(names: Iterable[Any]) -> str:
    """Returns the first names of a list, for a message.

    Args:
        names: The names.

    Returns:
        String: at most eight names, separated by commas.

    Example:

    >>> few(["cat", "dog"])
    'cat, dog'
    """
    names = [str(name) for name in names]
    return ", ".join(names[:FEW]) + f", ... ({len(names)})" * (len(names) > FEW)


def one_line(what: object, most: int = 500) -> str:
    """Returns what an exception or a text says, on one line. Libraries quote what is in a file, which may be anything.

    Args:
        what: An exception, or a string.
        most: Integer, the most characters to return. Defaults to 500.

    Returns:
        String of printable characters. The exception's name if it says nothing.

    Example:

    >>> one_line(ValueError("Invalid name:\\n 'a'"))
    "Invalid name: 'a'"
    """
    text = "".join(letter if letter.isprintable() else " " for letter in str(what)[: 10 * most])
    return " ".join(text.split())[:most] or type(what).__name__


def command_line(*words: object) -> str:
    """Returns a command of this package, as it is typed in a shell.

    Args:
        *words: The command's name, its arguments and options.

    Returns:
        String.

    Example:

    >>> command_line("convert", "my model.h5", "new.keras")
    "keras-effnet convert 'my model.h5' new.keras"
    """
    line = ["keras-effnet", *(os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in words)]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)


def _letters(name: object) -> str:
    return re.sub("[^a-z0-9]", "", str(name).lower())

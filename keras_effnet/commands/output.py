"""Prints tables, JSON, errors and progress, for all commands."""

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
from functools import partial

import click


def complain(error) -> None:
    """Prints an error on standard error, in one line."""
    click.echo(f"error: {' '.join(str(error).split())}", err=True)


def table(title, *columns: str):
    """Returns an empty table. A column whose name begins with > is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Plain text, since rich reads brackets in a file name as markup.
    title = Text(title, style="bold")
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        side = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=side, overflow="fold")  # a name is wrapped, not cut
    return made


def show(*parts, file=None) -> None:
    """Prints tables and text on standard output, or on another stream."""
    from rich.console import Console

    file = file or sys.stdout
    # In a pipe or a file, each row is one line, however long, so that other programs can search it.
    console = Console(file=file, width=None if file.isatty() else 1000, highlight=False)
    for part in parts:
        console.print(part)


def show_json(value: dict) -> None:
    """Prints a JSON object."""
    click.echo(json.dumps(value, indent=2))


class JsonList:
    """Prints a JSON object whose last value is a list, an item at a time. The text is that of `show_json()`.

    Args:
        value: Dict, the object without the list.
        key: String, the key of the list.
        file: The stream.
    """

    def __init__(self, value: dict, key: str, file):
        self._before, self._after = json.dumps(value | {key: ["*"]}, indent=2).rsplit('"*"', 1)
        self._none = json.dumps(value | {key: []}, indent=2)
        self._file = file

    def add(self, item) -> None:
        """Prints an item. The first one prints the beginning of the object too."""
        shown = json.dumps(item, indent=2).replace("\n", "\n    ")
        click.echo(self._before + shown, nl=False, file=self._file)
        self._before, self._none = ",\n    ", ""

    def end(self) -> None:
        """Prints the end of the object, or all of it if the list is empty."""
        click.echo(self._none or self._after, file=self._file)


@contextlib.contextmanager
def progress(what: str, total: int | None = None, disable: bool = False, completed: int = 0, unit: str = ""):
    """Shows a progress bar on standard error. Yields a function to call with `advance`, or `completed` and `total`.

    With a `unit`, the bar also shows how many are done per second.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.0f} {unit}/s" if unit and speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), Speed())
    with Progress(*columns, console=Console(stderr=True), disable=disable, redirect_stdout=False) as bar:
        yield partial(bar.update, bar.add_task(what, total=total, completed=completed))


@contextlib.contextmanager
def spinner(what: str):
    """Shows a spinner on standard error, and keeps the libraries quiet meanwhile."""
    from rich.console import Console

    with quiet() as stderr, Console(file=stderr).status(what):
        yield


@contextlib.contextmanager
def quiet():
    """Holds back what libraries print and log. If the work fails, all of it is shown.

    TensorFlow, LiteRT and absl write to file descriptor 2, past `sys.stderr`. Python's own standard error is unchanged,
    for the progress, warnings and errors of this package.

    Returns:
        Context manager that yields the stream of the terminal.
    """
    with tempfile.TemporaryFile() as held:
        text = io.TextIOWrapper(held, errors="replace", write_through=True)
        log = logging.StreamHandler(text)
        try:
            with _descriptor_2_into(held) as stderr, contextlib.redirect_stdout(text):
                logging.root.addHandler(log)
                try:
                    yield stderr
                finally:
                    logging.root.removeHandler(log)
        except Exception as error:
            if not isinstance(error, click.exceptions.Exit):
                held.seek(0)
                click.echo(held.read().decode(errors="replace"), err=True, nl=False)
            raise
        finally:
            text.detach()


@contextlib.contextmanager
def _descriptor_2_into(file):
    if sys.stderr is not sys.__stderr__:  # replaced, as in tests
        yield sys.stderr
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    # Never closed, since a library that is imported meanwhile may keep it for its log.
    sys.stderr = stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(file.fileno(), 2)
    try:
        yield stderr
    finally:
        stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        sys.stderr = sys.__stderr__


@contextlib.contextmanager
def timer():
    """Shows a spinner and the elapsed time on standard error. Yields a function to call with the current step."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str) -> None:
            bar.update(task, description=what)
            if not console.is_terminal:
                click.echo(what, err=True)

        yield tell

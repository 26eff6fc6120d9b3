"""`keras-effnet`: the commands, one module per group. They parse and print; the library does the work."""

import atexit
import contextlib
import os
import signal
import sys

import click

from keras_effnet import __version__
from keras_effnet.commands import (
    cache,
    catalog,
    diagnostics,
    explain,
    inference,
    pruning,
    serving,
    training,
    weight_files,
)
from keras_effnet.commands.output import complain


class _Commands(click.Group):
    """Prints an error of the library in one line. Exit status 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `keras-effnet list | head`: click ends quietly
            raise
        except (ValueError, OSError, ImportError) as error:
            complain(error)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="keras-effnet")
def main() -> None:
    """EfficientNets in Keras: classify, convert, train, prune and deploy."""


for command in (
    *(catalog.list_, catalog.describe_, catalog.plot_),
    *(weight_files.download, weight_files.convert, weight_files.verify),
    *(inference.predict, explain.explain, inference.export, inference.benchmark),
    *(serving.serve, serving.demo),
    *(training.train, training.evaluate_, training.report),
    *(diagnostics.doctor, diagnostics.tpu_plan, cache.cache_),
    pruning.prune,
):
    main.add_command(command)


def program() -> None:
    """Runs `keras-effnet`, and ends the process once all libraries have cleaned up.

    A library's thread that calls Python while the interpreter shuts down aborts the process: status 134 after a
    complete run. So the interpreter does not shut down.
    """
    status: list[int] = []

    def leave() -> None:
        if status:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status[0])

    numbers = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]  # Windows has no SIGHUP

    def stop(number: int, _) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)  # so that temporary files are removed

    for number in numbers:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)
    atexit.register(leave)  # before libraries are imported: the last one registered runs first
    try:
        main(prog_name="keras-effnet")
    except SystemExit as end:
        if isinstance(end.code, int):
            status.append(end.code)
        raise

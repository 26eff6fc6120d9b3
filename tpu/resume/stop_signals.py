"""Stops a run before its end, on a signal or an error, and says why."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

AGAIN = os.EX_TEMPFAIL  # 75, a temporary failure in BSD's sysexits.h: the same command resumes the run

INTERRUPTED = 128 + signal.SIGINT  # 130, as in shells

RESUME = "Run the same command again to resume"


class Stopped(SystemExit):
    """Ends the process because the run stopped before its end. Its state is kept.

    Args:
        code: Integer, exit status of the process: 75 if a supervisor may start the same command again, 130 after
            Ctrl-C.
        message: String.
    """

    def __init__(self, code: int, message: str):
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Asked(Exception):  # noqa: N818
    """Raised inside a run that was asked to stop."""


class NonFiniteError(Exception):
    """Raised when a loss or a variable is not finite.

    Args:
        step: Integer, number of the step, from 1.
        what: String that names what is not finite, such as `"a loss of nan"`.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} at step {step}")
        self.step, self.what = step, what


def say(text: str) -> None:
    """Prints to standard error. A closed pipe does not end the run.

    Args:
        text: String.
    """
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def at_once(code: int, text: str) -> None:
    """Ends the process at once, from any thread.

    Args:
        code: Integer, exit status.
        text: String to print first.
    """
    # First shows the cursor, which a progress bar hides.
    say("\x1b[?25h" * sys.stderr.isatty() + text)
    os._exit(code)


def _is_terminal(number: int) -> bool:
    with contextlib.suppress(OSError):  # a closed descriptor
        return os.isatty(number)
    return False


def _silence(descriptors: list[int]) -> None:
    """Lets what is written to a closed terminal vanish, in place of an error for each line."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in descriptors:
        os.dup2(nowhere, number)
    os.close(nowhere)


def _leave(*_) -> None:
    """Does nothing: the watch reads signals from its pipe."""


class Watch(contextlib.AbstractContextManager):
    """Catches SIGTERM and SIGHUP, and after `begin()` Ctrl-C too, at once, even while TensorFlow computes.

    SIGHUP comes when a terminal or a connection is closed; `nohup` ignores it, and so does this class then. The first
    signal after `begin()` asks the run to stop. A second one, or any before `begin()`, ends the process.
    Outside the main thread, where Python allows no handlers, it catches nothing.
    """

    def __init__(self):
        self.signal: int | None = None
        self._on_signal: Callable[[], object] | None = None
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._terminals = [number for number in range(3) if _is_terminal(number)]
        self._end, start = os.pipe()
        os.set_blocking(start, False)
        # Python runs handlers between bytecode instructions, and there are none during a whole loop of steps. To this
        # descriptor it writes right away.
        self._before = (signal.set_wakeup_fd(start, warn_on_full_buffer=False), start)
        self._take(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._take(signal.SIGHUP)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before[0])
            os.close(self._before[1])  # ends the thread

    def hold(self) -> None:
        """Installs the handlers again: TensorFlow's multi-host service replaces them when it connects."""
        for number in self._handlers:
            signal.signal(number, _leave)

    def begin(self, on_signal: Callable[[], object]) -> None:
        """Lets signals ask the run to stop from now on, as there is a state to save. Catches Ctrl-C too.

        Args:
            on_signal: Function without arguments that asks the run to stop. Called from another thread.
        """
        self._on_signal = on_signal
        if self._handlers:
            self._take(signal.SIGINT)

    def _take(self, number: int) -> None:
        self._handlers[number] = signal.signal(number, _leave)

    def _listen(self) -> None:
        while read := os.read(self._end, 1):
            number = read[0]
            if number not in self._handlers:
                continue
            if number == signal.SIGHUP:
                _silence(self._terminals)
                if self.signal is not None:  # both the shell and the system send it
                    continue
            if self.signal is not None:
                at_once(128 + number, "Stopped at once")
            self.signal = number
            if self._on_signal is None:
                at_once(AGAIN, f"Stopped before the first step. {RESUME}")
            else:
                self._on_signal()
                say(f"{signal.Signals(number).name}: saving after this step. A second signal stops at once")
        os.close(self._end)

    @property
    def code(self) -> int:
        """Exit status of a run that this watch, or that of another host, has stopped."""
        return INTERRUPTED if self.signal == signal.SIGINT else AGAIN

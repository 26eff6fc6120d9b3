"""How a run is asked to stop before its end, and how it says why it did."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

AGAIN = os.EX_TEMPFAIL  # 75: the same command goes on; what BSD's sysexits.h calls a temporary failure

INTERRUPTED = 128 + signal.SIGINT  # 130, as shells say it


class Stopped(SystemExit):
    """Ends the process: the run stopped before its end, and its state is kept.

    Args:
        code: Integer, exit status of the process: 75 where a supervisor may start the same command again, 130 after
            Ctrl-C.
        message: String.
    """

    def __init__(self, code: int, message: str):
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Asked(Exception):  # noqa: N818
    """Somebody asked the run to stop."""


class NonFiniteError(Exception):
    """A loss or a variable is no longer a number.

    Args:
        step: Integer, number of the step, from 1.
        what: String, such as `"a loss of nan"`.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} at step {step}")
        self.step, self.what = step, what


def say(text: str) -> None:
    """Says something on standard error, where that is still heard: a closed pipe ends no run.

    Args:
        text: String.
    """
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def at_once(code: int, text: str) -> None:
    """Ends the process, from any thread and whatever it is doing.

    Args:
        code: Integer, its exit status.
        text: String, the last word.
    """
    # First the cursor, which a progress bar hides.
    say("\x1b[?25h" * sys.stderr.isatty() + text)
    os._exit(code)


def _leave(*_) -> None:
    """A handler: the watch is told by another way."""


class Watch(contextlib.AbstractContextManager):
    """Notices SIGTERM, and from `begin()` on Ctrl-C, at once, also while TensorFlow computes.

    The first one after `begin()` asks the run to stop; a second one, or a SIGTERM before, ends the process. Outside a
    program's main thread, where Python allows no handlers, nothing is noticed.
    """

    def __init__(self):
        self.signal: int | None = None
        self._on_signal: Callable[[], object] | None = None
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._end, start = os.pipe()
        os.set_blocking(start, False)
        # Python runs handlers between its own instructions, of which there are none for a whole loop of steps; but it
        # writes to this descriptor within the signal.
        self._before = (signal.set_wakeup_fd(start, warn_on_full_buffer=False), start)
        self._take(signal.SIGTERM)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before[0])
            os.close(self._before[1])  # ends the thread

    def hold(self) -> None:
        """Takes the signals again: TensorFlow's service for many hosts, once connected, has a handler of its own."""
        for number in self._handlers:
            signal.signal(number, _leave)

    def begin(self, on_signal: Callable[[], object]) -> None:
        """From now on there is something to save.

        Args:
            on_signal: Function that is called with nothing, from another thread.
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
            if self.signal is not None:
                at_once(128 + number, "Stopped at once")
            self.signal = number
            if self._on_signal is None:
                at_once(AGAIN, "Stopped before the first step. The same command goes on")
            else:
                self._on_signal()
                say(f"{signal.Signals(number).name}: saving after this step; once more: at once")
        os.close(self._end)

    @property
    def code(self) -> int:
        """Exit status of a run that this, or another host's, stopped."""
        return INTERRUPTED if self.signal == signal.SIGINT else AGAIN

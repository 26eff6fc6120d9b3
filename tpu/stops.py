"""How a run is asked to stop before its end, and how it says why it did."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

AGAIN = os.EX_TEMPFAIL  # 75: the same command goes on; what BSD's sysexits.h calls a temporary failure
INTERRUPTED = 128 + signal.SIGINT  # 130, as shells say it
SIGNALS = (signal.SIGTERM, signal.SIGINT)


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


class Watch(contextlib.AbstractContextManager):
    """Notices SIGTERM and Ctrl-C at once, also while TensorFlow computes. A second one ends the process.

    Outside a program's main thread, where Python allows no handlers, it notices nothing.

    Args:
        on_signal: Function that is called with nothing, from another thread.
    """

    def __init__(self, on_signal: Callable[[], object]):
        self.on_signal = on_signal
        self.signal: int | None = None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._end, start = os.pipe()
        os.set_blocking(start, False)
        # Python runs handlers between its own instructions, of which there are none for a whole loop of steps; but it
        # writes to this descriptor within the signal.
        self._before = (signal.set_wakeup_fd(start, warn_on_full_buffer=False), start)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self, "_handlers"):
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before[0])
            os.close(self._before[1])  # ends the thread

    def _listen(self) -> None:
        while read := os.read(self._end, 1):
            number = read[0]
            if number not in SIGNALS:
                continue
            if self.signal is not None:
                # The cursor, which a progress bar hides.
                print("\x1b[?25h" * sys.stderr.isatty() + "Stopped at once", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self.signal = number
            name = signal.Signals(number).name
            print(f"{name}: saving after this step; once more: at once", file=sys.stderr, flush=True)
            self.on_signal()
        os.close(self._end)

    @property
    def code(self) -> int:
        """Exit status of a run that this, or another host's, stopped."""
        return INTERRUPTED if self.signal == signal.SIGINT else AGAIN

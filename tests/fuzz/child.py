"""Reads files in a process of its own: a crash, a hang, a full memory or a file that runs something is a verdict.

`python -m fuzz.child FD` reads lines of JSON from its input, [reader, path, valid], and answers each with a line on FD.
"""

import contextlib
import faulthandler
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

SECONDS = 10  # of the processor, for one file
GROWTH = 300 << 20  # bytes of memory that one file may take
RESERVED = 1 << 30  # bytes of addresses that one file may ask for
# An image may be small as a file and have up to Pillow's limit of 179 million pixels. One of them takes four bytes,
# and transparency four times that: the image, white, both on each other, and without alpha.
IMAGES = 3 << 30

# What no file may make the package do. Python tells it to `_heard` (https://docs.python.org/3/library/audit_events.html)
FORBIDDEN = {
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
}
CANARY = "fuzz_canary"  # a module that mutations name, to see whether anything imports what a file names

_heard: list[str] | None = None


def _hear(event: str, arguments: tuple) -> None:
    if _heard is None:
        return
    if event in FORBIDDEN or (event == "import" and CANARY in str(arguments[0])):
        _heard.append(f"{event}: {str(arguments[:1])[:100]}")
    elif event == "marshal.loads" and not sys._getframe(1).f_code.co_filename.startswith("<frozen"):
        _heard.append(event)  # code in a file
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        place = os.path.realpath(arguments[0])
        if not place.startswith((os.environ["TMPDIR"], "/dev/", "/proc/")):
            _heard.append(f"writes {place}")


def _size(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _problem(reader, path: Path) -> str:
    """Returns what is wrong with how a file is read, and where; or nothing."""
    try:
        reader(path)
        return ""
    except (ValueError, OSError) as error:
        text = str(error)
        if any(isinstance(each, MemoryError) for each in _causes(error)):
            return f"asks for too much memory: {text[:300]}"
        if len(text.splitlines()) != 1:
            return f"a message of {len(text.splitlines())} lines: {text[:500]!r}{_where(error)}"
        if not any(name in text for name in (path.name, *(each.name for each in path.parent.iterdir()))):
            return f"a message that does not name the file: {type(error).__name__}: {text[:500]}{_where(error)}"
        return ""
    except Exception as error:
        return "".join(traceback.format_exception_only(error)).strip()[:600] + _where(error)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parent.parent.parent
    own = [each for each in frames if Path(each.filename).resolve().is_relative_to(package)] or frames
    shown = "".join(f"\n  {Path(each.filename).name}:{each.lineno} {each.name}: {each.line}" for each in own[1:])
    return shown + f"\n  {frames[-1].filename}:{frames[-1].lineno}"


def judge(reader, path: Path, most: int = GROWTH) -> str:
    """Returns what is wrong with how a file is read, or nothing.

    Args:
        reader: Function of a path. It raises `AssertionError` for a result that is not well-formed.
        path: Path of the file.
        most: Integer, bytes of memory that it may take.
    """
    global _heard
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM, the most memory so far, starts again
    before, started = _size("VmRSS"), time.process_time()
    _heard = []
    try:
        problem = _problem(reader, path)
    finally:
        heard, _heard = _heard, None
    grown, seconds = _size("VmHWM") - before, time.process_time() - started
    if heard:
        return f"something ran: {', '.join(sorted(set(heard)))}"
    if not problem and grown > most:
        return f"took {grown >> 20} MB of memory"
    if not problem and seconds > SECONDS:
        return f"took {seconds:.0f} s"
    return problem


def _serve(answers) -> None:
    from fuzz.readers import READERS

    sys.addaudithook(_hear)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for line in sys.stdin:
        name, path, valid = json.loads(line)
        most = IMAGES if name == "image" else GROWTH
        if valid:  # imports what the reader needs
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            READERS[name](Path(path))
            resource.setrlimit(resource.RLIMIT_AS, (_size("VmSize") + RESERVED + most, hard))
        answers.write(json.dumps(judge(READERS[name], Path(path), most)) + "\n")
        answers.flush()


class Child:
    """A process that reads files. It starts again after a crash.

    Args:
        folder: Path of a folder for temporary files and for what libraries print.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def _start(self) -> None:
        self._answers, theirs = os.pipe()
        tests = Path(__file__).parent.parent
        (self._folder / "tmp").mkdir(exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": str(tests),
            "TMPDIR": os.path.realpath(self._folder / "tmp"),
            "KERAS_BACKEND": "tensorflow",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
            "TF_NUM_INTEROP_THREADS": "1",
            "TF_NUM_INTRAOP_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # nothing writes but into the folder
        }
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "fuzz.child", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs],
            env=environment,
        )
        os.close(theirs)
        self._told: set[tuple[str, Path]] = set()

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # type: ignore[union-attr]
            os.close(self._answers)
            self._log.close()
            self._process = None

    def problem(self, reader: str, path: Path, valid: list[Path]) -> str:
        """Reads a file. Returns what is wrong with how it is read, or nothing.

        Args:
            reader: Key of `readers.READERS`.
            path: Path of the file.
            valid: Paths of valid files, which a new process reads first.
        """
        if self._process is None:
            self._start()
        if (reader, valid[0]) not in self._told:
            self._told.add((reader, valid[0]))
            for each in valid:
                told = self._ask(reader, each, True)
                assert not told, f"a valid file is not read: {told}"
        told = self._ask(reader, path, False)
        if told.startswith(("took", "asks")):  # what it has reserved may stay
            self.stop()
        return told

    def _ask(self, reader: str, path: Path, valid: bool) -> str:
        seconds = 12 * SECONDS if valid else 6 * SECONDS  # of the clock: the processor may be busy
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([reader, str(path), valid]).encode() + b"\n")
            self._process.stdin.flush()
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], seconds)
            part = os.read(self._answers, 1 << 16) if ready else b""
            if not part:
                if not ready:
                    self._process.send_signal(signal.SIGABRT)  # writes where it is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
                status = self._process.poll()
                self.stop()
                log = (self._folder / "log").read_bytes().decode(errors="replace")
                where = log[-1500:] if "Current thread" not in log else log[log.index("Current thread") :][:1500]
                return f"took more than {seconds} s: {where}" if not ready else f"ended with status {status}: {where}"
            answer += part
        return json.loads(answer)


if __name__ == "__main__":
    faulthandler.enable()
    from fuzz import child  # one module, not a second one called __main__

    child._serve(os.fdopen(int(sys.argv[1]), "w"))

"""Protects resuming: real runs that are killed, stopped and damaged end bit-identical to undisturbed ones.

CI kills a progressive run once, on TensorFlow. `pytest -m long tests/tpu/resume/test_chaos.py` kills up to ten times,
on both runners, and in more runs: a complete run of digits_demo, which has to learn, and a fine-tuning with AutoAugment
and mixup.
"""

import contextlib
import json
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, same_weights
from PIL import Image

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)


OFTEN = "--run.deterministic --run.steps-per-loop 10 --run.save-every 0.5"
SHORT = f"--batch-size 32 --model.image-size 32 --epochs 4 --run.no-report {OFTEN}"
RUNS = {
    "short": f"digits_demo --model.name efficientnet-mini {SHORT} --augment.policy autoaugment --augment.mixup 0.2",
    "digits_demo": f"digits_demo {OFTEN}",
    "finetune": "finetune --data digits --model.image-size 64 --data.eval-crop 1 --augment.min-area 0.7 --epochs 5 "
    f"--augment.policy autoaugment --augment.mixup 0.2 {OFTEN}",
}


# Runs a command in the terminal of its session, as `ssh` does. `nohup pytest` would have it ignore SIGHUP.
OF_ITS_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Process:
    """A process of the command, and its output. With a terminal, `hang_up()` closes it."""

    started: ClassVar[list["Process"]] = []

    def __init__(self, workdir: Path, arguments: str, terminal: bool = False, **environment: str):
        self.log = open(workdir.parent / f"{workdir.name}-{time.monotonic_ns()}.log", "w+")  # noqa: SIM115
        line = [sys.executable, ROOT / "tests" / "mini.py", "train", *arguments.split(), "--workdir", str(workdir)]
        self.workdir, self.closed = workdir, threading.Event()
        environment = {**os.environ, "TMPDIR": str(temporary_of(workdir)), **environment}
        if not terminal:
            self.process = subprocess.Popen(line, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        else:
            self.master, slave = pty.openpty()
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
            line = [sys.executable, "-c", OF_ITS_TERMINAL, *line]
            self.process = subprocess.Popen(line, **streams, env=environment, start_new_session=True)
            os.close(slave)
            threading.Thread(target=self._copy).start()
        self.started.append(self)

    def _copy(self) -> None:
        """Shows what the process writes to its terminal, until that is closed."""
        while not self.closed.is_set():
            if select.select([self.master], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the process has ended
                    self.log.write(os.read(self.master, 4096).decode(errors="replace"))
        os.close(self.master)

    def hang_up(self) -> None:
        """Closes the terminal. The system then sends SIGHUP."""
        self.closed.set()

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def after(self, step: int, seconds: float = 300) -> "Process":
        """Waits until the output reports that so many steps are done."""
        deadline = time.monotonic() + seconds
        while not any(int(done) >= step for done in re.findall(r"step (\d+)/", self.said())):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def ended(self, status: int, seconds: float = 3600) -> str:
        assert self.process.wait(seconds) == status, self.said()
        told = self.said()
        self.log.close()
        return told


def temporary_of(workdir: Path) -> Path:
    """Returns the folder for the temporary files of a run."""
    path = workdir.parent / "tmp"
    path.mkdir(exist_ok=True)
    return path


def rows(workdir: Path) -> list[dict]:
    found = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # an incomplete line that a process is still writing
            break
    return found


def curve(workdir: Path) -> list[dict]:
    """Returns all metrics except those of speed."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows(workdir)]


def steps(workdir: Path) -> list[int]:
    """Returns the steps of the checkpoints."""
    found = (
        re.fullmatch(r"ckpt-(\d+)\.(index|crc32c\.json)", path.name) for path in workdir.glob("checkpoints/ckpt-*")
    )
    return sorted(int(one[1]) for one in found if one)


def newest(workdir: Path) -> int:
    return steps(workdir)[-1]


def done(workdir: Path) -> int:
    return rows(workdir)[-1]["step"]


def damage(workdir: Path, step: int, how: str) -> None:
    """Damages the largest file of a checkpoint."""
    found = [path for path in workdir.glob(f"checkpoints/ckpt-{step}*/**/*") if path.is_file()]
    found += workdir.glob(f"checkpoints/ckpt-{step}.*")
    path = max(found, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 16
    path.write_bytes(content)


def end_all() -> None:
    """Kills all processes, whatever failed."""
    for one in Process.started:
        one.process.kill()
        one.process.wait()
        one.hang_up()
        one.log.close()
    Process.started.clear()


@pytest.fixture(autouse=True)
def _none_stays():
    yield
    end_all()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of 500 MB, or returns None where this machine does not allow it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", disk], capture_output=True)
    yield disk if made.returncode == 0 else None
    end_all()
    if made.returncode == 0:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("runner", "name", "kills"),
    [
        ("tensorflow", "short", 1),
        ("jax", "short", 1),
        ("jax", "short", 10),
        ("tensorflow", "digits_demo", 10),
        ("jax", "digits_demo", 10),
        ("tensorflow", "finetune", 10),
    ],
)
@pytest.mark.long  # in CI, a progressive run is killed, below
def test_whatever_happens_the_end_is_the_same(runner, name, kills, tmp_path, small_disk, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    arguments, chance = f"{RUNS[name]} --runner {runner}", random.Random(name)
    reference = tmp_path / "reference"
    Process(reference, arguments).ended(0)
    total = done(reference)

    workdir = (small_disk or tmp_path) / "run"
    workdir.mkdir()
    run = Process(workdir, arguments).after(20)
    # Another run is refused and does no harm. This one is paused meanwhile, so that it does not reach its end.
    run.process.send_signal(signal.SIGSTOP)
    told = Process(workdir, arguments).ended(2)
    assert f"Expected a folder that no other run uses. Received: '{workdir}', which is in use" in told
    assert f"process {run.process.pid}" in told

    # SIGTERM, as from a supervisor, saves the state of the current step.
    run.process.send_signal(signal.SIGCONT)
    run.process.send_signal(signal.SIGTERM)
    told = run.ended(75, 60)
    assert f"Stopped and saved after step {newest(workdir)} of {total}. Run the same command again to resume" in told
    assert newest(workdir) < total - 60

    if runner == "jax":  # the other runner cannot read its checkpoints
        told = Process(workdir, f"{RUNS[name]} --runner tensorflow").ended(2)
        assert f"Expected --runner jax, whose checkpoints are in '{workdir}'" in told

    # kill -9 at random moments.
    for number in range(kills):
        # Leaves steps for the later kills, however fast the machine is. The last one has checkpoints before it.
        last = total - 60
        share = max(1, (last - done(workdir)) // (kills - number))
        until = last if number == kills - 1 else min(last, done(workdir) + chance.randint(1, share))
        run = Process(workdir, arguments).after(until)
        time.sleep(chance.uniform(0, 0.1 if name == "short" else 4))
        assert run.process.poll() is None, f"ended before kill {number}"
        run.process.kill()
        run.ended(-signal.SIGKILL)

    # The two newest checkpoints are damaged.
    *_, kept, second, first = steps(workdir)
    damage(workdir, first, "truncated")
    damage(workdir, second, "flipped")
    run = Process(workdir, arguments).after(kept)
    for step in (first, second):
        assert f"The checkpoint of step {step} cannot be read and is set aside" in run.said()
    assert f"restored from checkpoint: {workdir}/checkpoints/ckpt-{kept}" in run.said()

    # A full disk: the run says so, and saved files stay. Then there is space again.
    if small_disk:
        while run.process.poll() is None:
            # Paused while its disk is filled, and repeatedly, as it may just have removed an old checkpoint.
            run.process.send_signal(signal.SIGSTOP)
            room = os.statvfs(small_disk)
            with open(small_disk / "ballast", "ab") as file:
                file.write(bytes(max(0, room.f_bavail * room.f_frsize - 2**20)))
            run.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
        told = run.ended(2)
        assert f"Expected free space on the disk of '{workdir}" in told and "no space left" in told
        (small_disk / "ballast").unlink()
        assert not list(workdir.glob("checkpoints/*temp*")) and not list(workdir.glob("*.new"))
    else:
        run.process.kill()
        run.ended(-signal.SIGKILL)

    # Ctrl-C twice.
    if name != "short":
        run = Process(workdir, arguments).after(newest(workdir) + 1)
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGINT)
        run.ended(130, 60)

    Process(workdir, arguments).ended(0)
    models = [keras.models.load_model(place / "model.keras", compile=False) for place in (reference, workdir)]
    assert same_weights(*models)
    assert curve(workdir) == curve(reference)
    expected, found = (json.loads((place / "result.json").read_text()) for place in (reference, workdir))
    assert found | speed(expected) == expected and (name == "short" or found["ema_top1"] >= 0.85)
    # Without model.keras, `eval` reads the last checkpoint, with TensorFlow, as for any run that has not ended.
    (workdir / "model.keras").unlink()
    program = [sys.executable, ROOT / "tests" / "mini.py", "eval", workdir, "--json"]
    told = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["top1"] == pytest.approx(expected["ema_top1"], abs=0.005)
    # Only damaged checkpoints and TensorBoard's files are left over.
    left = files(workdir) - files(reference)
    assert left and all(re.match(rf"events\.out|damaged-ckpt-({first}|{second})\b", name) for name in left)
    assert len(steps(workdir)) <= 4
    assert not list(temporary_of(workdir).iterdir()) and not list(temporary_of(reference).iterdir())
    if not small_disk:
        pytest.skip("no small disk could be mounted; the rest holds")


PROGRESS = f"digits_demo --model.name efficientnet-mini {SHORT} --augment.policy randaugment"
STAGES = {
    2: "--epochs 2 --progress.sizes 24 40 --progress.magnitudes 2 8 --progress.mixups 0 0.2 --progress.cutmixes 0 0.2 "
    "--augment.layers 1",
    3: "--epochs 3 --progress.sizes 24 32 40 --progress.magnitudes 2 5 8 --progress.mixups 0 0.1 0.2 "
    "--progress.cutmixes 0 0.1 0.2",
}


@pytest.mark.parametrize(
    ("runner", "stages", "killed"),  # the run is killed in each of the stages `killed`
    [
        pytest.param("tensorflow", 2, [1], marks=pytest.mark.slow),
        pytest.param("tensorflow", 3, [0, 1, 2], marks=pytest.mark.long),
        pytest.param("jax", 3, [0, 1, 2], marks=pytest.mark.long),
    ],
)
def test_a_progressive_run_that_is_killed_ends_the_same(runner, stages, killed, tmp_path, monkeypatch):
    """Also where strings have other hashes."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    arguments = f"{PROGRESS} {STAGES[stages]} --runner {runner}"
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    Process(reference, arguments, PYTHONHASHSEED="0").ended(0)
    resolved = json.loads((reference / "config.json").read_text())["resolved"]
    total, ends = resolved["steps"], resolved["stage_ends"]
    assert ends == [total * stage // stages for stage in range(1, stages + 1)] and resolved["image_size"] == 32
    # The terminal is closed.
    run = Process(workdir, arguments, terminal=True)
    while not rows(workdir):
        assert run.process.poll() is None, run.said()
        time.sleep(0.02)
    run.hang_up()
    time.sleep(0.05)
    run.process.send_signal(signal.SIGHUP)  # the shell tells its jobs too
    run.ended(75, 60)
    assert done(workdir) <= newest(workdir) < ends[0]
    for end in (ends[stage] for stage in killed):  # some steps after a report in each stage, and before its end
        run = Process(workdir, arguments).after(end - 25)
        run.process.kill()
        run.ended(-signal.SIGKILL)
        assert done(workdir) < end
    Process(workdir, arguments).ended(0)
    models = [keras.models.load_model(place / "model.keras", compile=False) for place in (reference, workdir)]
    assert same_weights(*models) and models[0].input_shape == (None, 32, 32, 3)
    assert curve(workdir) == curve(reference)
    assert not list(temporary_of(workdir).iterdir())


@pytest.mark.parametrize(
    "runner",
    [
        pytest.param("tensorflow", marks=pytest.mark.long),  # the progressive run above compares two processes too
        pytest.param("jax", marks=pytest.mark.slow),
    ],
)
def test_two_processes_compute_the_same_bits(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    arguments = f"{RUNS['short']} --epochs 0.5 --runner {runner}"
    places = [tmp_path / name for name in ("one", "other")]
    for number, place in enumerate(places):  # one after the other, with other hashes of strings
        Process(place, arguments, PYTHONHASHSEED=str(number)).ended(0)
    models = [keras.models.load_model(place / "model.keras", compile=False) for place in places]
    assert same_weights(*models) and curve(places[0]) == curve(places[1])


def files(workdir: Path) -> set[str]:
    """Returns the names of all files in a run folder, except those inside a checkpoint."""
    paths = (path.relative_to(workdir) for path in workdir.rglob("*"))
    return {path.name for path in paths if not any("ckpt-" in str(folder) for folder in path.parents)}


def speed(result: dict) -> dict:
    """Returns the results that differ between two runs."""
    return {name: result[name] for name in ("seconds", "images_per_second")}


def two_addresses() -> list[str]:
    """Returns free addresses for two hosts on this machine."""
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def environments(runner: str, addresses: list[str]) -> list[dict[str, str]]:
    """Returns what tells two hosts of each other."""
    if runner == "jax":
        names = {"JOB_ADDRESSES": addresses[0], "NUM_PROCESSES": "2"}
        told = [names | {"PROCESS_ID": str(index)} for index in range(2)]
        return [{f"KERAS_DISTRIBUTION_{name}": value for name, value in one.items()} for one in told]
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    return [{"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})} for task in tasks]


@pytest.mark.long
@pytest.mark.parametrize("runner", ["tensorflow", "jax"])
def test_a_full_disk_of_one_host_ends_all(runner, tmp_path, small_disk, monkeypatch):
    """Host 1 writes the names of the photos that it cannot read, to a disk of its own."""
    if not small_disk:
        pytest.skip("no small disk could be mounted")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    chance = np.random.default_rng(0)
    for number in range(128):
        place = tmp_path / "photos" / ("val" if number < 4 else "train") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (40, 40, 3), "uint8")).save(place / f"{number}.jpg")
        if number % 16 == 5:
            (place / f"{number}.jpg").write_text("no photo")
    arguments = f"b0_baseline --runner {runner} --model.name efficientnet-mini --data {tmp_path / 'photos'}"
    arguments += " --epochs 1000 --batch-size 16 --model.image-size 32 --run.steps-per-loop 7 --run.no-report"
    arguments += " --data.max-corrupt 0.5"
    places = [tmp_path / "two", tmp_path / "other"]
    places[0].mkdir()
    places[1].symlink_to(small_disk)
    pairs = zip(places, environments(runner, two_addresses()), strict=True)
    first, second = [Process(place, arguments, **environment) for place, environment in pairs]
    first.after(21)
    with open(small_disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    told = second.ended(2, 300)
    died = time.monotonic()
    assert "Expected free space on the disk of" in told and "no space left" in told, told[-2000:]
    assert "Lost another host. Run the same command again on all hosts" in first.ended(75, 30)
    assert time.monotonic() - died < 30


@pytest.mark.long
@pytest.mark.parametrize("runner", ["tensorflow", "jax"])
def test_two_hosts_are_one_machine_and_one_that_is_lost_is_told(runner, tmp_path, monkeypatch):
    """Two real processes on loopback have the curve of one process with two replicas, even if a host dies."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    arguments = f"digits_demo --runner {runner} --model.name efficientnet-mini --epochs 1.5 --batch-size 32"
    arguments += " --model.image-size 32 --run.steps-per-loop 7 --run.save-every 0.3 --run.no-report"
    addresses = two_addresses()

    def hosts() -> list[Process]:
        return [Process(tmp_path / "two", arguments, **environment) for environment in environments(runner, addresses)]

    (tmp_path / "two").mkdir()
    Process(tmp_path / "one", f"{arguments} --run.cpu-replicas 2").ended(0)
    total = done(tmp_path / "one")
    # SIGTERM at either stops both, in the same step.
    first, second = hosts()
    first.after(14)
    second.process.send_signal(signal.SIGTERM)
    for told in (first.ended(75, 60), second.ended(75, 60)):
        assert f"Stopped and saved after step {newest(tmp_path / 'two')} of {total}. Run the same command again" in told
    # One dies.
    first, second = hosts()
    first.after(35)
    second.process.kill()
    died = time.monotonic()
    told = first.ended(75, 60)
    assert time.monotonic() - died < 60
    assert "Lost another host. Run the same command again on all hosts to resume" in told
    second.ended(-signal.SIGKILL)
    for host in hosts():
        host.ended(0)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(list(b.values())[2:], list(a.values())[2:], rtol=1e-5, err_msg=str(a["step"]))
    assert (tmp_path / "two" / "train.log").read_text().count("restored from checkpoint") == 2

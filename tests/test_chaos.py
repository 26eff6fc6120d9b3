"""Runs that are killed, stopped and damaged in real processes finish as undisturbed ones do, bit by bit.

`CHAOS_KILLS=10 pytest -m slow tests/test_chaos.py` kills ten times instead of twice, and does so to a fine-tuning with
AutoAugment and mixup too.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import BACKEND, same_weights

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))
pytestmark = pytest.mark.slow

OFTEN = "--run.deterministic --run.steps-per-loop 10 --run.save-every 0.5"
RUNS = {
    "digits_demo": f"digits_demo --epochs 12 {OFTEN}",
    "finetune": "finetune --data digits --model.image-size 64 --data.eval-crop 1 --augment.min-area 0.7 --epochs 5 "
    f"--augment.policy autoaugment --augment.mixup 0.2 {OFTEN}",
}


class Process:
    """The command, and what it says."""

    def __init__(self, workdir: Path, arguments: str, **environment: str):
        self.log = open(workdir.parent / f"{workdir.name}-{time.monotonic_ns()}.log", "w+")  # noqa: SIM115
        line = [sys.executable, "-m", "keras_effnet.cli", "train", *arguments.split(), "--workdir", str(workdir)]
        self.workdir = workdir
        self.process = subprocess.Popen(
            line, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def after(self, step: int, seconds: float = 300) -> "Process":
        """Waits until it says that so many steps are done."""
        deadline = time.monotonic() + seconds
        while not any(int(done) >= step for done in re.findall(r"step (\d+)/", self.said())):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def ended(self, status: int, seconds: float = 600) -> str:
        assert self.process.wait(seconds) == status, self.said()
        told = self.said()
        self.log.close()
        return told


def rows(workdir: Path) -> list[dict]:
    found = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # half a line, of a process that is just writing it
            break
    return found


def curve(workdir: Path) -> list[dict]:
    """All numbers but those of speed."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows(workdir)]


def newest(workdir: Path) -> int:
    return max(int(path.stem.removeprefix("ckpt-")) for path in workdir.glob("checkpoints/ckpt-*.index"))


def done(workdir: Path) -> int:
    return rows(workdir)[-1]["step"]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 500 MB, where this machine lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", disk], capture_output=True)
    yield disk if made.returncode == 0 else None
    if made.returncode == 0:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("name", ["digits_demo", *(["finetune"] if KILLS >= 10 else [])])
def test_whatever_happens_the_end_is_the_same(name, tmp_path, small_disk):
    arguments, chance = RUNS[name], random.Random(name)
    reference = tmp_path / "reference"
    Process(reference, arguments).ended(0)
    total = done(reference)
    assert json.loads((reference / "result.json").read_text())["ema_top1"] >= 0.8  # the demo learns

    workdir = (small_disk or tmp_path) / "run"
    workdir.mkdir()
    run = Process(workdir, arguments).after(20)
    # Another run may not use the folder, and does no harm there.
    told = Process(workdir, arguments).ended(2)
    assert f"Expected a folder that no other run uses. Received: '{workdir}', which one uses" in told
    assert f"process {run.process.pid}" in told

    # A supervisor's stop, and the state of the very step.
    run.process.send_signal(signal.SIGTERM)
    told = run.ended(75, 60)
    assert f"Stopped after step {newest(workdir)} of {total}, which is saved" in told

    # kill -9 at moments that nobody chose.
    for number in range(KILLS):
        run = Process(workdir, arguments).after(min(done(workdir) + 10, total - 40))
        time.sleep(chance.uniform(0, 2 if KILLS < 5 else 4))
        assert run.process.poll() is None, f"ended before kill {number}"
        run.process.kill()
        run.ended(-signal.SIGKILL)

    # Damaged checkpoints, one after the other.
    for how in ("truncated", "flipped"):
        step = newest(workdir)
        damage(workdir / "checkpoints" / f"ckpt-{step}.data-00000-of-00001", how)
        before = sorted(path.stem for path in workdir.glob("checkpoints/ckpt-*.index"))[:-1]
        run = Process(workdir, arguments)
        while "restored from checkpoint" not in run.said():
            assert run.process.poll() is None, run.said()
            time.sleep(0.05)
        assert f"The checkpoint of step {step} cannot be read and is set aside" in run.said()
        assert any(f"restored from checkpoint: {workdir}/checkpoints/{stem}" in run.said() for stem in before)
        run.process.kill()
        run.ended(-signal.SIGKILL)

    # No room: told, and what is there stays. Then room again.
    if small_disk:
        run = Process(workdir, arguments).after(newest(workdir))
        room = os.statvfs(small_disk)
        with open(small_disk / "ballast", "wb") as file:
            file.write(bytes(max(0, room.f_bavail * room.f_frsize - 2**20)))
        told = run.ended(2)
        assert f"Expected room on the disk of '{workdir}" in told and "no space left" in told
        (small_disk / "ballast").unlink()
        assert not list(workdir.glob("checkpoints/*temp*"))
    else:
        print("no small disk: mount is not allowed here")

    # Ctrl-C twice.
    run = Process(workdir, arguments).after(newest(workdir) + 1)
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGINT)
    run.ended(130, 60)

    Process(workdir, arguments).ended(0)
    models = [keras.models.load_model(place / "model.keras", compile=False) for place in (reference, workdir)]
    assert same_weights(*models)
    assert curve(workdir) == curve(reference)
    expected, found = (json.loads((place / "result.json").read_text()) for place in (reference, workdir))
    for speed in ("seconds", "images_per_second"):
        expected.pop(speed), found.pop(speed)
    assert found == expected
    left = {path.name for path in workdir.iterdir()}
    assert left <= {path.name for path in reference.iterdir()}
    assert len(list(workdir.glob("checkpoints/ckpt-*.index"))) <= 4


def test_two_hosts_are_one_machine_and_one_that_is_lost_is_told(tmp_path):
    """Two real processes on loopback: the curve of one process with two replicas, also over a host's death."""
    import socket

    arguments = (
        "digits_demo --epochs 2 --batch-size 32 --model.image-size 32 --run.steps-per-loop 7 --run.save-every 0.3"
    )
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()

    def host(index: int) -> Process:
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        return Process(tmp_path / "two", arguments, TF_CONFIG=json.dumps(config))

    (tmp_path / "two").mkdir()
    Process(tmp_path / "one", f"{arguments} --run.cpu-replicas 2").ended(0)
    hosts = [host(0), host(1)]
    hosts[0].after(35)
    hosts[1].process.kill()
    died = time.monotonic()
    told = hosts[0].ended(75, 60)
    assert time.monotonic() - died < 60
    assert "Lost another host at step" in told and "The same command goes on" in told
    hosts[1].ended(-signal.SIGKILL)
    # SIGTERM at either stops both, in the same step.
    hosts = [host(0), host(1)]
    hosts[0].after(newest(tmp_path / "two") + 7)
    hosts[1].process.send_signal(signal.SIGTERM)
    told = [one.ended(75, 60) for one in hosts]
    assert f"Stopped after step {newest(tmp_path / 'two')} of 89" in told[0]
    hosts = [host(0), host(1)]
    assert [one.ended(0) is not None for one in hosts] == [True, True]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(list(b.values())[2:], list(a.values())[2:], rtol=1e-5, err_msg=str(a["step"]))
    assert "restored from checkpoint" in (tmp_path / "two" / "train.log").read_text()

"""Protects what a run needs to resume: checkpoints, files, locks and signals, with real damage and real kills."""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKEND

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

import tensorflow as tf

from keras_effnet.tpu.resume import cloud_files, lock
from keras_effnet.tpu.resume.checkpoints import Bundles, Checkpoints


class Run:
    """A few variables and their checkpoints."""

    def __init__(self, folder, keep=2, shape=(3, 4), form="tensorflow"):
        self.step = tf.Variable(0, dtype=tf.int64)
        self.values = {f"block{n}/kernel": tf.Variable(tf.zeros(shape)) for n in range(5)}
        self.form: Any = Bundles(tf.train.Checkpoint(step=self.step, state=self.values))
        if form == "orbax":
            from keras_effnet.tpu.resume.orbax_folders import Folders

            self.form = Folders(self._take, self._give)
        self.checkpoints = Checkpoints(str(folder), self.form, self.step, keep=keep, every=10, minutes=None)
        self.told: list[str] = []

    def _take(self):
        return {"step": self.step.numpy(), "state": {name: value.numpy() for name, value in self.values.items()}}

    def _give(self, tree):
        self.step.assign(tree["step"])
        for name, value in self.values.items():
            value.assign(tree["state"][name])

    def save(self, step: int, best: int | None = None) -> None:
        self.step.assign(step)
        for variable in self.values.values():
            variable.assign(tf.fill(variable.shape, float(step)))
        self.checkpoints.save(best)

    def restore(self) -> int:
        step = self.checkpoints.restore(self.told.append)
        assert step == self.step.numpy()
        assert all((variable.numpy() == step).all() for variable in self.values.values())
        return step


def test_the_newest_and_the_best_are_kept(tmp_path):
    run = Run(tmp_path)
    for step in range(10, 70, 10):
        run.save(step, best=20 if step >= 20 else None)
    assert run.checkpoints.steps() == [20, 50, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"ckpt-{step}.{end}" for step in (20, 50, 60) for end in ("index", "data-00000-of-00001")
    )
    assert Run(tmp_path).restore() == 60


def test_it_is_time_by_steps_or_by_minutes(tmp_path):
    run = Run(tmp_path)
    run.step.assign(9)
    assert not run.checkpoints.due()
    run.checkpoints.minutes = 1e-4
    time.sleep(0.01)
    assert run.checkpoints.due()
    run.save(9)
    run.checkpoints.minutes = None
    run.step.assign(10)
    assert run.checkpoints.due()  # as if step 9 had no checkpoint
    run.save(10)
    run.step.assign(19)
    assert not run.checkpoints.due()


@pytest.mark.parametrize("end", ["index", "data-00000-of-00001"])
def test_no_damage_goes_unseen(tmp_path, end):
    """With any bit flipped, or cut to any length, a checkpoint is set aside for the one before. Padding is not read."""
    run = Run(tmp_path)
    run.save(10)
    run.save(20)
    newest = {path: path.read_bytes() for path in tmp_path.glob("ckpt-20.*")}
    path = tmp_path / f"ckpt-20.{end}"
    whole, chance = newest[path], random.Random(0)
    damages = [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 1)]
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damages.append(bytes(flipped))
    harmless = 0
    for damage in damages:
        for file, content in newest.items():
            file.write_bytes(content)
        path.write_bytes(damage)
        again = Run(tmp_path)
        if again.restore() == 20:  # with all values unchanged
            harmless += 1
            continue
        assert "of step 20 cannot be read" in again.told[0] and "ckpt-10" in again.told[1]
        assert again.checkpoints.steps() == [10]
    assert harmless <= (len(damages) // 4 if end == "index" else 0)
    # The run reaches that step again, and damaged files do not accumulate.
    again.save(20)
    assert Run(tmp_path).restore() == 20
    assert len(list(tmp_path.glob("damaged-*"))) <= 2


def test_no_damage_to_orbax_folders_goes_unseen(tmp_path):
    """Detects any flipped bit and any missing file, and tells them from incomplete and other models' checkpoints."""
    run, chance = Run(tmp_path, form="orbax"), random.Random(0)
    run.save(10)
    run.save(20)
    assert run.checkpoints.steps() == [10, 20]
    whole = {path: path.read_bytes() for path in tmp_path.glob("ckpt-20*/**/*") if path.is_file()}
    sums = tmp_path / "ckpt-20.crc32c.json"
    whole[sums] = sums.read_bytes()
    for path, content in whole.items():
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        for damage in (bytes(flipped), content[: len(content) // 2], None):
            if path == sums and damage is None:
                continue  # written last: without it there is no checkpoint
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            assert run.form.read(run.checkpoints.path(20)) is not None or (damage == bytes(flipped) and path == sums)
            path.write_bytes(content)
    assert run.form.read(run.checkpoints.path(20)) is None
    next(path for path in whole if path != sums).write_bytes(b"")
    again = Run(tmp_path, form="orbax")
    assert again.restore() == 10 and "of step 20 cannot be read" in again.told[0]
    assert again.checkpoints.steps() == [10] and (tmp_path / "damaged-ckpt-20").is_dir()
    with pytest.raises(ValueError, match=r"Expected the variables of this model.*ckpt-10.*\(3, 4\), not \(3, 5\)"):
        Run(tmp_path, shape=(3, 5), form="orbax").restore()
    (tmp_path / "ckpt-30").mkdir()
    (tmp_path / "ckpt-40.orbax-checkpoint-tmp-0").mkdir()
    again = Run(tmp_path, form="orbax")
    assert again.restore() == 10
    again.save(20)
    again.save(30)
    assert sorted(path.name for path in tmp_path.glob("ckpt-*")) == [
        f"ckpt-{step}{end}" for step in (20, 30) for end in ("", ".crc32c.json")
    ]


def test_orbax_folders_lie_in_relative_folders_and_on_cloud_storage(tmp_path, monkeypatch):
    """Cloud Storage lists folders with a slash at the end."""
    listed, at = tf.io.gfile.listdir, tf.io.gfile.isdir
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("tensorflow.python.lib.io.file_io")
    walked = lambda path: [f"{name}/" if at(os.path.join(path, name)) else name for name in listed(path)]  # noqa: E731
    for name in ("list_directory", "list_directory_v2"):
        monkeypatch.setattr(module, name, walked)
    Run("runs", form="orbax").save(10)
    assert not any("//" in name for name in json.loads(Path("runs/ckpt-10.crc32c.json").read_text()))
    assert Run("runs", form="orbax").restore() == 10


def test_none_that_can_be_read_is_no_new_beginning(tmp_path):
    run = Run(tmp_path)
    run.save(10)
    (tmp_path / "ckpt-10.index").write_bytes(b"")
    for _ in range(2):
        message = r"Expected a readable checkpoint in '.*'. Received: those of steps 10, all damaged"
        with pytest.raises(ValueError, match=message):
            Run(tmp_path).restore()


def test_a_storage_that_does_not_answer_is_no_damage(tmp_path):
    """If no file can be opened any more, all checkpoints are left alone."""
    run = Run(tmp_path)
    run.save(10)
    run.save(20)
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(tf.errors.OpError, match="Too many open files"):
            run.form.read(run.checkpoints.path(20))
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before and Run(tmp_path).restore() == 20


def test_another_model_is_not_damage(tmp_path):
    Run(tmp_path).save(10)
    with pytest.raises(ValueError, match=r"Expected the variables of this model.*ckpt-10.*\(3, 4\)"):
        Run(tmp_path, shape=(3, 5)).restore()
    assert Run(tmp_path).restore() == 10


def test_what_is_half_written_goes(tmp_path):
    run = Run(tmp_path)
    run.save(10)
    (tmp_path / "ckpt-20_temp").mkdir()
    (tmp_path / "ckpt-20_temp" / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"half")
    (tmp_path / "ckpt-20.data-00000-of-00001").write_bytes(b"no index")
    assert Run(tmp_path).restore() == 10
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".data-00000-of-00001", ".index"]


def test_files_are_whole(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    assert cloud_files.rows(path) == []
    cloud_files.write(path, '{"a": 1}\n{"b": 2}\n{"c"')
    assert cloud_files.rows(path) == [{"a": 1}, {"b": 2}]
    replacing = cloud_files.replacing(path)
    Path(replacing.__enter__()).write_text("half")
    assert not replacing.__exit__(KeyError, KeyError(), None)
    assert cloud_files.rows(path) == [{"a": 1}, {"b": 2}]
    with cloud_files.replacing(path) as here:
        Path(here).write_text("[]")
    assert Path(path).read_text() == "[]" and [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("scheme", [pytest.param("", marks=pytest.mark.long), "file://"])
def test_a_folder_has_one_run(tmp_path, scheme):
    """Tests the system's lock, and the one for storages without locks, which a killed process leaves behind."""
    folder, second = f"{scheme}{tmp_path}/one", f"{scheme}{tmp_path}/other"
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    code = "import os, sys, time\nfrom keras_effnet.tpu.resume import lock\n"
    code += "with lock.locked(sys.argv[1], lambda: os._exit(7), 0.4), lock.locked(sys.argv[2], print, 0.4):\n"
    code += "    print(1, flush=True); time.sleep(60)"
    line = [sys.executable, "-c", code, folder, second]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout and process.stdout.readline() == b"1\n"
    refused = pytest.raises(ValueError, match=rf"Expected a folder that no other run uses.*process {process.pid}")
    with refused, lock.locked(folder, pytest.fail, 0.4):
        pass
    if scheme:  # a paused process keeps the system's lock, but loses this one: another run takes over and ends it
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.6)
        with lock.locked(folder, pytest.fail, 0.4):
            process.send_signal(signal.SIGCONT)
            process.communicate(timeout=20)
            assert process.returncode == 7
            assert json.loads((tmp_path / "one" / "lock").read_text())["process"] == os.getpid()
        assert not (tmp_path / "one" / "lock").exists()
    else:
        process.kill()
        process.communicate()
    # It had no time to give back the other lock, whether it was killed or ended itself at once.
    kept = tmp_path / "other" / "lock"
    assert kept.exists()
    for _ in range(2):  # after a process that was killed, and after one that ended
        with lock.locked(second, pytest.fail, 0.4):
            assert json.loads(kept.read_text().splitlines()[0])["process"] != process.pid


WATCHING = """
import sys, threading, time
from keras_effnet.tpu.resume import stop_signals

asked = threading.Event()
with stop_signals.Watch() as watch:
    print("watching", flush=True)
    if sys.argv[1] == "begun":
        time.sleep(0.2)
        watch.begin(asked.set)
        print("begun", flush=True)
    asked.wait(60)
    if sys.argv[2] == "save":
        raise stop_signals.Stopped(watch.code, "saved")
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("state", "then", "signals", "status", "told"),
    [
        ("watching", "save", [signal.SIGTERM], 75, "Stopped before the first step"),
        ("begun", "save", [signal.SIGTERM], 75, "SIGTERM: saving after this step"),
        ("begun", "save", [signal.SIGINT], 130, "SIGINT: saving after this step"),
        ("begun", "hang", [signal.SIGINT, signal.SIGINT], 130, "Stopped at once"),
        ("begun", "hang", [signal.SIGINT, signal.SIGTERM], 143, "Stopped at once"),
    ],
)
@pytest.mark.parametrize("heard", [True, False])
def test_signals_stop_a_run_and_two_of_them_at_once(tmp_path, state, then, signals, status, told, heard):
    """Stops also if nobody reads the output any more, as when Ctrl-C ends `tee` too."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHING, state, then], stdout=subprocess.PIPE, stderr=writing, text=True
    )
    os.close(writing)
    assert process.stdout
    while process.stdout.readline().strip() != state:
        assert process.poll() is None
    said = ""
    if not heard:
        os.close(reading)
    for place, number in enumerate(signals):
        if place and heard:
            while "A second signal stops at once" not in said:
                said += os.read(reading, 1000).decode()
        elif place:
            time.sleep(0.5)
        process.send_signal(number)
    assert process.wait(20) == status
    if heard:
        with open(reading) as file:
            assert told in said + file.read()
    process.stdout.close()


def test_a_hosts_pipeline_needs_no_python_there(tmp_path):
    """As on a TPU pod, where one process drives all hosts, an unreadable image raises an error that names it."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            pixels = rng.integers(0, 256, (40, 40, 3), "uint8")
            (tmp_path / name / f"{number}.jpg").write_bytes(tf.io.encode_jpeg(pixels).numpy())
    (tmp_path / "b" / "7.jpg").write_bytes(b"")
    code = """
import sys
import tensorflow as tf
from keras_effnet.tpu.config import Data, Recipe
from keras_effnet.tpu.input import pipeline
from keras_effnet.tpu.input.sources import open_source

server = tf.distribute.Server({"worker": ["localhost:0"]}, job_name="worker", task_index=0, start=True)
cluster = tf.train.ClusterSpec({"worker": [server.target.removeprefix("grpc://")]})
tf.config.experimental_connect_to_cluster(cluster, job_name="chief")
source, recipe = open_source(Data(sys.argv[1])), Recipe()
with tf.device("/job:worker/task:0"):
    batches = iter(pipeline.training(source, recipe, 32, 4, None, host=pipeline.Host(0, 2)))
    images, labels = next(batches)
print(images.device, images.shape)
try:
    for _ in range(8):
        next(batches)
except tf.errors.InvalidArgumentError as error:
    print(error.message)
"""
    told = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert "/job:worker/replica:0/task:0" in told.stdout and "(4, 32, 32, 3)" in told.stdout, told.stderr[-2000:]
    assert "Expected images that can be read" in told.stdout and f"{tmp_path}/b/7.jpg" in told.stdout, told.stdout

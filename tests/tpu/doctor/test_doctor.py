"""`keras-effnet doctor`: its findings on this machine, and on machines faked by small packages and programs."""

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from helpers import BACKEND

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

from keras_effnet.tpu.config import Run
from keras_effnet.tpu.doctor import devices, examine, finding, hosts, versions
from keras_effnet.tpu.runners import tensorflow_runner

SEES_NOTHING = """
import os
assert os.environ["TPU_LOAD_LIBRARY"] == "0" and os.environ["KERAS_BACKEND"] == "tensorflow"
__version__ = "2.20.0"
class config:
    list_physical_devices = lambda kind: os.environ.get("GPUS", "").split()
"""
TAKES_WHAT_IT_MAY = """
import os
from types import SimpleNamespace
__version__ = "0.10.2"
devices = lambda: [SimpleNamespace(platform=os.environ.get("JAX_PLATFORMS", "tpu"))]
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Replaces programs, and packages in the processes that import them."""

    def play(tensorflow=SEES_NOTHING, smi="", **environment):
        for name, code in (("tensorflow", tensorflow), ("jax", TAKES_WHAT_IT_MAY), ("keras", "raise ImportError")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(code)
        if smi:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{smi}'\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
        for name in ("KERAS_BACKEND", "TF_CONFIG", "TPU_NAME", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
            monkeypatch.delenv(name, raising=False)
        paths = {"PYTHONPATH": tmp_path, "PATH": tmp_path}
        for name, value in {name: f"{path}:{os.environ.get(name, '')}" for name, path in paths.items()}.items():
            monkeypatch.setenv(name, value)
        for name, value in {"KERAS_BACKEND": "tensorflow", **environment}.items():
            monkeypatch.setenv(name, value)

    return play


def rows(**arguments) -> dict[str, finding.Finding]:
    return {finding.what: finding for finding in examine.examine(**arguments)}


def test_this_machine_as_json():
    command = [str(Path(sys.executable).parent / "keras-effnet"), "doctor", "--json"]
    environment = {name: value for name, value in os.environ.items() if name not in ("TF_CONFIG", "TPU_NAME")}
    result = subprocess.run(command, capture_output=True, text=True, env={**environment, "KERAS_BACKEND": "tensorflow"})
    told = json.loads(result.stdout)
    found = {row["what"]: row for row in told["findings"]}
    for what, name in (("TensorFlow", "tensorflow"), ("Keras", "keras"), ("JAX", "jax"), ("tf_keras", "tf_keras")):
        assert (found[what]["found"], found[what]["verdict"]) == (metadata.version(name), "ok")
    assert found["Training"]["verdict"] == "ok"
    assert told["strategy"].split(" on ")[0] == type(tensorflow_runner.connect(Run()).strategy).__name__
    problems = [row for row in told["findings"] if row["verdict"] == "problem"]
    assert result.returncode == bool(problems) and all(row["advice"] for row in problems), result.stderr


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os; os._exit(11)", "the process exited with status 11"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise ImportError('one\\nlibcudart.so.11 is missing')", "libcudart.so.11 is missing"),
    ],
)
def test_a_tensorflow_that_does_not_start_is_told_and_survived(machine, code, told):
    machine(code)
    found = rows()
    assert found["TensorFlow"].verdict == "problem" and told in found["TensorFlow"].advice
    assert "pip install --force-reinstall tensorflow" in found["TensorFlow"].advice
    assert found["Keras"].verdict == "ok"  # Keras is not to blame
    assert found["Training"].verdict == "problem" and found["Strategy"].found == "none"


def test_a_tpu_that_is_held_is_left_alone_and_its_holder_named(machine, tmp_path, monkeypatch):
    machine()
    device = tmp_path / "accel0"
    device.touch()
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdout.readline()
        held = rows(devices=[str(tmp_path / "accel[0-9]*")])
        holder.stdin.close()
    assert f"1 chip, held by process {holder.pid} ({sys.executable} -c import sys" in held["TPU"].found
    assert held["TPU"].verdict == "problem" and "Stop" in held["TPU"].advice
    assert held["JAX sees"].found.startswith("1 cpu; the TPU was not tried")
    assert held["TensorFlow"].verdict == "problem" and "tensorflow-tpu 2.19.1" in held["TensorFlow"].advice
    free = rows(devices=[str(device)])
    assert free["TPU"].found.startswith("1 chip, free") and free["TPU"].verdict == "ok"
    assert free["JAX sees"].found == "1 tpu"
    # With JAX on the TPU, plain TensorFlow is right: it only reads data.
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    free = rows(devices=[str(device)])
    assert free["TensorFlow"].verdict == "ok"
    assert (free["Strategy"].found, free["Strategy"].verdict) == ("JAX, data parallel on 1 tpu", "ok")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert rows(devices=[str(device)])["Strategy"].verdict == "warning"
    assert "GPU that JAX sees" in rows(run=Run(devices="gpu"))["Strategy"].advice


def test_libtpus_lock_is_seen(tmp_path):
    lock = tmp_path / "lock"
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin and holder.stdout
        holder.stdout.readline()
        assert list(devices.who_holds([], str(lock))) == [holder.pid] == list(devices._lockers(str(lock)))
        holder.stdin.close()
    assert devices.who_holds([], str(lock)) == {}


def test_a_gpu_that_tensorflow_does_not_see(machine, monkeypatch):
    machine(smi="GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)")
    found = rows()["GPU"]
    assert found.found == "NVIDIA A100-SXM4-40GB; TensorFlow sees none"
    assert (found.verdict, found.advice) == (
        "problem",
        "Install CUDA for TensorFlow with: pip install 'tensorflow[and-cuda]'",
    )
    monkeypatch.setenv("GPUS", "0 1")
    found = rows()
    assert found["GPU"].verdict == "ok" and found["Strategy"].found == "MirroredStrategy on GPU:0, GPU:1"
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    found = rows()
    assert found["Training"].verdict == "problem" and "--runner" in found["Training"].advice
    assert found["Keras"].verdict == "problem" and found["TensorFlow"].verdict == "ok"
    monkeypatch.setenv("KERAS_BACKEND", "theano")
    found = rows()
    assert found["Keras backend"].verdict == "problem" and "Received: theano" in found["Keras backend"].advice


def test_tf_config_is_read_and_workers_are_tried(machine):
    with socket.create_server(("127.0.0.1", 0)) as answers, socket.create_server(("127.0.0.1", 0)) as closed:
        here, gone = (f"127.0.0.1:{server.getsockname()[1]}" for server in (answers, closed))
        closed.close()

        def asked(*workers):
            return hosts.cluster(
                json.dumps({"cluster": {"worker": ["me:1", *workers]}, "task": {"type": "worker", "index": 0}})
            )

        assert asked(here) == (2, finding.Finding("TF_CONFIG", "2 workers, this is worker 0", "ok"))
        count, refused = asked(here, gone)
        assert count == 3 and refused.verdict == "warning" and f"{gone} (refused)" in refused.found
        _, unreachable = asked(gone, "worker.invalid:2222")
        assert unreachable.verdict == "problem" and "worker.invalid:2222" in unreachable.found
        machine(TF_CONFIG=json.dumps({"cluster": {"worker": [here, here]}, "task": {"type": "worker", "index": 1}}))
        assert rows()["Strategy"].found == "MultiWorkerMirroredStrategy of 2 workers on CPU:0 of each"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"cluster": ', 'Expected JSON such as {"cluster"'),
        ("[]", "Received: []"),
        ('{"cluster": {"worker": ["one"]}, "task": {}}', "list of host:port as cluster.worker. Received: ['one']"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', "among worker. Received: 'chief'"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "x"}}', "from 0 to 0. Received: 'x'"),
    ],
)
def test_a_wrong_tf_config_is_told(text, told):
    workers, finding = hosts.cluster(text)
    assert workers == 1 and finding.verdict == "problem" and told in finding.advice


# Requirements as in the metadata of the packages.
ASKS = {
    "keras_effnet": ["keras>=3.12", 'tensorflow<2.21,>=2.18; extra == "tensorflow"', 'jax>=0.4.35; extra == "jax"'],
    "tensorflow": ["keras>=3.10.0"],
    "tf_keras": ["tensorflow<2.21,>=2.20"],
    "tf-models-official": ["tensorflow~=2.20.0"],
    "jax": [
        "jaxlib<=0.10.2,>=0.10.1",
        'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
        'libtpu==0.0.42.*; extra == "tpu"',
    ],
}
TPU_219 = ASKS | {"tensorflow-tpu": ["keras>=3.5.0", "libtpu==0.0.10"], "tf_keras": ["tensorflow<2.20,>=2.19"]}
TPU_220 = ASKS | {"tensorflow-tpu": ["keras>=3.10.0", "libtpu~=0.0.14"]}


@pytest.mark.parametrize(
    ("installed", "asks", "tpu", "expected"),
    [
        ("tensorflow 2.20.0 tf_keras 2.20.1 tf-models-official 2.20.0 jax 0.10.2 jaxlib 0.10.2", ASKS, False, {}),
        ("tensorflow-tpu 2.19.1 libtpu 0.0.10 tf_keras 2.19.0 tf-models-official 2.20.0", TPU_219, True, {}),
        ("jax 0.10.2 jaxlib 0.10.2 libtpu 0.0.42.1", ASKS, True, {}),
        ("tensorflow-tpu 2.20.0 libtpu 0.0.14", TPU_220, True, {"TensorFlow": ("warning", "2.19.1 is the last")}),
        (
            "tensorflow-tpu 2.19.1 libtpu 0.0.42.1 jax 0.10.2 jaxlib 0.10.2",
            TPU_219,
            True,
            {"libtpu": ("problem", "pip install 'libtpu==0.0.10'"), "JAX": ("warning", "which only one can hold")},
        ),
        ("jax 0.10.2 jaxlib 0.10.2 libtpu 0.0.10", ASKS, True, {"libtpu": ("problem", "'jax[tpu]==0.10.2'")}),
        ("jax 0.10.2 jaxlib 0.10.2 libtpu 0.0.10", ASKS, False, {"libtpu": ("warning", "'jax[tpu]==0.10.2'")}),
        ("jax 0.10.2 jaxlib 0.9.0", ASKS, False, {"jaxlib": ("problem", "'jaxlib<=0.10.2,>=0.10.1'")}),
        ("tensorflow 2.20.0", ASKS, True, {"TensorFlow": ("problem", "cannot use the TPU")}),
        ("tensorflow 2.20.0 tensorflow-tpu 2.19.1", TPU_219, False, {"TensorFlow": ("problem", "the same folder")}),
        (
            "tensorflow 2.21.0 tf_keras 2.20.1 tf-models-official 2.20.0",
            ASKS,
            False,
            {
                "TensorFlow": ("problem", "'tensorflow<2.21,>=2.18'"),
                "tf_keras": ("problem", "'tf_keras==2.21.*'"),
                "tf-models-official": ("warning", "'tensorflow~=2.20.0'"),
            },
        ),
        ("tensorflow 2.20.0 keras 3.11.3", ASKS, False, {"Keras": ("problem", "'keras>=3.12'")}),
    ],
)
def test_versions_that_fit_and_that_do_not(installed, asks, tpu, expected):
    words = f"keras 3.15.1 keras_effnet 0.1.0 {installed}".split()
    found = versions.compare(dict(zip(words[::2], words[1::2], strict=True)), asks, tpu)
    told = {row.what: row for row in found if row.verdict not in ("ok", "none")}
    assert told.keys() == expected.keys()
    for what, (verdict, advice) in expected.items():
        assert told[what].verdict == verdict and advice in told[what].advice


def test_processes_of_jax(machine, monkeypatch):
    machine()
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert rows()["KERAS_DISTRIBUTION"].found == "not set"
    with socket.create_server(("127.0.0.1", 0)) as first:
        address = f"127.0.0.1:{first.getsockname()[1]}"
        for name, value in (("JOB_ADDRESSES", address), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
            monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
        found = rows()
        assert found["KERAS_DISTRIBUTION"].found == "2 processes, this is 1"
        assert found["KERAS_DISTRIBUTION"].verdict == "ok" and "of each of 2 processes" in found["Strategy"].found
    assert "no answer" in rows()["KERAS_DISTRIBUTION"].found
    monkeypatch.setenv("KERAS_DISTRIBUTION_PROCESS_ID", "2")
    assert "from 0 to 1, of _NUM_PROCESSES=2. Received: 2" in rows()["KERAS_DISTRIBUTION"].advice
    monkeypatch.delenv("KERAS_DISTRIBUTION_PROCESS_ID")
    assert rows()["KERAS_DISTRIBUTION"].verdict == "problem"

"""`Predictor` chooses the fastest runtime also on a busy machine, tells where int8 does not pay, and runs on GPUs."""

import json
import os
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from helpers import BACKEND, ROOT, invoked, tiny

import keras_effnet as ke
from keras_effnet import cache
from keras_effnet.inference import runtimes

pytestmark = pytest.mark.filterwarnings("ignore")  # of converters

SHAPE = (32, 40, 3)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of exports for each test."""
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model():
    return tiny(SHAPE)


def spun(seconds: float):
    """Returns a function that computes for so long, if no other process takes its core."""

    def work():
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    return work


@pytest.mark.parametrize("length", [0.001, 0.008])
def test_the_faster_of_two_functions_is_found_beside_busy_processes(length):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * runtimes.cores())]
    try:
        time.sleep(0.3)
        found = [runtimes.seconds_each([spun(1.2 * length), spun(length)]) for _ in range(4)]
        # Work of 8 ms is longer than the scheduler's slices: now and then, no call of it is left undisturbed.
        assert sum(fast < slow for slow, fast in found) >= 3
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_refresh_decides_anew(model, home, tmp_path):
    path = ke.save_model(model, tmp_path / "net.keras")
    ke.Predictor(path)
    (choices,) = home.glob("predictor/*/*.fastest.json")
    (key,), known = cache.read_json(choices), cache.read_json(choices)
    cache.write_json(choices, {key: {"chosen": "openvino", "seconds": {"openvino": 0}}})
    assert ke.Predictor(path).runtime == "openvino"
    done = invoked("benchmark", path, "--refresh", "--runtimes", "onnxruntime", "--batch-sizes", "1", "--rounds", "1")
    assert done.returncode == 0 and not choices.exists(), done.stderr
    ke.Predictor(path)
    assert cache.read_json(choices)[key]["seconds"].keys() == known[key]["seconds"].keys()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT's int8 is made on TensorFlow")
def test_int8_that_is_slower_than_float32_is_told(model, home):
    photos = np.random.default_rng(0).integers(0, 256, (4, *SHAPE)).astype("uint8")

    def made():
        return ke.Predictor(model, precision="int8", calibration=photos)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # whichever is faster here
        made()
    (choices,) = home.glob("predictor/*/int8.fastest.json")
    ((key, choice),) = cache.read_json(choices).items()
    # Both were measured, on the same runtimes.
    assert choice["float32"] > 0 and choice["seconds"][choice["chosen"]] == min(choice["seconds"].values())
    for share in (0.4, 1.5):
        times = dict.fromkeys(choice["seconds"], share * choice["float32"])
        cache.write_json(choices, {key: choice | {"seconds": times}})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made()
        told = [str(one.message) for one in caught if "float32" in str(one.message)]
        assert len(told) == (share > 1) and all("int8 takes 1.50 times as long as float32" in one for one in told)


def test_a_session_of_whole_batches_returns_what_a_pool_returns(model):
    alone = ke.Predictor(model, "onnxruntime")
    # The session for GPUs, on the provider that every machine has.
    session = runtimes.CudaSession(alone.path, "CPUExecutionProvider")
    images = np.random.default_rng(0).uniform(0, 255, (100, *SHAPE)).astype("float32")
    for count in (1, 2, 3, 64, len(images)):
        (rows,) = session(images[:count])
        assert rows.shape == (count, 3) and np.abs(rows - alone(images[:count])).max() < 1e-6
    assert session.input_shape == SHAPE


@pytest.mark.skipif(runtimes.has_gpu(), reason="for machines without a GPU")
def test_without_a_gpu_auto_is_the_processor_and_cuda_says_what_is_missing(model):
    assert ke.Predictor(model, "onnxruntime").device == "cpu"
    path = ke.Predictor(model, "onnxruntime").path
    for given in (model, path):
        with pytest.raises(ValueError, match="onnxruntime-gpu"):
            ke.Predictor(given, device="cuda")
    with pytest.raises(ValueError, match=r"CUDAExecutionProvider.*CPUExecutionProvider"):
        runtimes.CudaSession(path)
    for arguments in ({"runtime": "litert"}, {"precision": "int8"}):
        with pytest.raises(ValueError, match="for device='cuda'"):
            ke.Predictor(model, device="cuda", **arguments)
    with pytest.raises(ValueError, match="Nearest: 'cuda'"):
        ke.Predictor(model, device="cud")


def test_a_gpu_is_used_only_by_what_runs_on_it(monkeypatch):
    monkeypatch.setattr(runtimes, "has_gpu", lambda: True)
    assert runtimes.device_of("auto") == runtimes.device_of("auto", "keras") == "cpu"
    assert runtimes.device_of("cuda", "keras") == "cuda"
    monkeypatch.setattr(runtimes, "has_cuda_provider", lambda: True)
    assert runtimes.device_of("auto") == runtimes.device_of("auto", "onnxruntime") == "cuda"
    assert runtimes.device_of("auto", "litert") == runtimes.device_of("auto", precision="int8") == "cpu"
    assert runtimes.device_of("cpu") == "cpu"


def test_a_gpu_that_cannot_be_used_is_told_and_the_processor_used(model, monkeypatch):
    monkeypatch.setattr(runtimes, "has_gpu", lambda: True)
    assert ke.Predictor(model, "onnxruntime").device == "cpu"  # without onnxruntime-gpu, there is nothing to tell
    monkeypatch.setattr(runtimes, "has_cuda_provider", lambda: True)
    path = ke.Predictor(model, "onnxruntime", device="cpu").path
    for given in (model, path):  # an ONNX Runtime that says it has CUDA, but does not load it
        with pytest.warns(UserWarning, match=r"Running on the processor, since .*CUDA and cuDNN"):
            predictor = ke.Predictor(given, "onnxruntime")
        assert predictor.device == "cpu" and predictor(np.zeros(SHAPE)).shape == (1, 3)
        with pytest.raises(ValueError, match="CUDA and cuDNN"):
            ke.Predictor(given, "onnxruntime", device="cuda")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.parametrize(
    "part",
    [
        pytest.param("inference", marks=pytest.mark.slow),
        pytest.param("losses", marks=pytest.mark.long),
        pytest.param("training", marks=pytest.mark.long),
    ],
)
def test_the_benchmark_for_gpus_runs_small_on_a_processor(part, tmp_path):
    path = tmp_path / "rows.json"
    line = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--only", part, "--json", path]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"})
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    if part == "losses":  # here, both are the processor's
        assert len(rows["losses"]["losses"]) == 20 and rows["losses"]["largest relative difference"] < 1e-5
    for what in {"inference": ["Predictor"], "training": ["ours", "keras.applications, fit"]}.get(part, ()):
        assert rows[what]["images per second"]["median"] > 0 and rows[what]["peak MiB"] > 0, rows[what]

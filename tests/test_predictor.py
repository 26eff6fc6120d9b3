"""Predictor: what `predict()` gives, on every runtime, from any number of threads, without Keras once it is known."""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import BACKEND, ROOT
from test_folding import trained

import keras_effnet as ke
from keras_effnet import runtimes

# Converters use what TensorFlow, JAX, PyTorch and NumPy have deprecated; their warnings are not ours to end.
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = (48, 40, 3)
RUNTIMES = [*runtimes.choose("auto"), "keras"]
if BACKEND != "tensorflow":
    RUNTIMES.remove("litert")  # which only TensorFlow writes


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Exports of this module alone."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_EFFNET_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model():
    """A user's: built on a body, with a head of its own."""
    body = ke.EfficientNetLite0(include_top=False, weights=None, pooling="avg", input_shape=SHAPE)
    head = [keras.layers.Dropout(0.3), keras.layers.Dense(4, activation="softmax")]
    return trained(keras.Sequential([keras.Input(SHAPE), body, *head]))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (9, *SHAPE)).astype("uint8")


@pytest.fixture(scope="module")
def expected(model, images):
    return model.predict(images.astype("float32"), verbose=0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_gives_what_predict_gives(runtime, model, images, expected):
    predictor = ke.Predictor(model, runtime)
    assert predictor.runtime == runtime and predictor.input_shape == SHAPE
    for count in (1, 2, 9):
        found = predictor(images[:count])
        assert found.dtype == np.float32 and np.abs(found - expected[:count]).max() < 1e-5
    assert np.abs(predictor(images[3]) - expected[3:4]).max() < 1e-5
    assert np.abs(predictor(images.astype("float64")[::2]) - expected[::2]).max() < 1e-5
    alone = ke.Predictor(model, runtime, threads=1)
    assert np.abs(alone(images) - expected).max() < 1e-5
    images_before = images.copy()
    predictor(images)
    assert np.array_equal(images, images_before)


def test_auto_takes_the_fastest_and_remembers_it(model, images, expected, home):
    predictor = ke.Predictor(model)
    assert np.abs(predictor(images) - expected).max() < 1e-5
    told = json.loads((predictor.path.parent / "float32.fastest.json").read_text())
    (measured,) = told.values()
    assert set(measured["seconds"]) == set(RUNTIMES) - {"keras"}
    assert predictor.runtime == measured["chosen"] == min(measured["seconds"], key=measured["seconds"].get)
    # What is remembered is not measured again: another answer on disk is believed.
    other = max(measured["seconds"], key=measured["seconds"].get)
    (key,) = told
    (predictor.path.parent / "float32.fastest.json").write_text(json.dumps({key: {"chosen": other}}))
    assert ke.Predictor(model).runtime == other
    (predictor.path.parent / "float32.fastest.json").write_text("{ damaged")
    assert ke.Predictor(model).runtime in measured["seconds"]


def test_other_weights_are_another_model(model, images):
    runtime = RUNTIMES[0]
    before = ke.Predictor(model, runtime)
    bias = model.layers[-1].bias
    old = keras.ops.convert_to_numpy(bias.value)
    try:
        bias.assign(old + np.array([5, 0, 0, 0], "float32"))
        after = ke.Predictor(model, runtime)
        assert after.path.parent != before.path.parent
        assert np.abs(after(images) - model.predict(images.astype("float32"), verbose=0)).max() < 1e-5
        assert np.abs(after(images) - before(images)).max() > 0.1
    finally:
        bias.assign(old)


def test_a_file_needs_no_keras(model, images, expected, tmp_path):
    model.save(tmp_path / "mine.keras")
    runtime = RUNTIMES[-2]
    first = ke.Predictor(tmp_path / "mine.keras", runtime)
    np.save(tmp_path / "x.npy", images)
    code = (
        "import sys, numpy as np, keras_effnet as ke; x = np.load(sys.argv[3]); "
        "np.save(sys.argv[4], [ke.Predictor(sys.argv[1], sys.argv[5])(x), ke.Predictor(sys.argv[2])(x)]); "
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch') if name in sys.modules])"
    )
    line = [tmp_path / "mine.keras", first.path, tmp_path / "x.npy", tmp_path / "y.npy", runtime]
    result = subprocess.run([sys.executable, "-c", code, *map(str, line)], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
    for found in np.load(tmp_path / "y.npy"):
        assert np.abs(found - expected).max() < 1e-5


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_get_equal_results_and_memory_does_not_grow(runtime, model, images):
    predictor = ke.Predictor(model, runtime)
    wanted = {count: predictor(images[:count]) for count in (1, 3)}
    wrong, grown = [], []

    def work(number: int, turns: int) -> None:
        for turn in range(turns):
            for count in (1, 3):
                if not np.array_equal(predictor(images[:count]), wanted[count]):
                    wrong.append((number, turn, count))

    for turns in (25, 125):  # what libraries set up at first is no growth; then 2,000 predictions
        threads = [threading.Thread(target=work, args=(number, turns)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        grown.append(memory())
    assert not wrong
    assert grown[1] - grown[0] < 20e6


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x: x[..., :2], r"Expected images of shape \(count, 48, 40, 3\). Received: \(9, 48, 40, 2\)"),
        (lambda x: x[0, 0], r"Received: \(40, 3\)"),
        (lambda x: x[:0], "an empty batch"),
        (lambda x: np.where(np.arange(9)[:, None, None, None] == 4, np.nan, x), "NaN or infinity in image 4 of 9"),
        (lambda x: x * 1e39, "NaN or infinity in image 0"),
        (lambda x: x.astype(str), "as numbers"),
        (lambda x: [x[0], x[0, :9]], "images of one shape"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_images_are_refused(wrong, told, model, images):
    with pytest.raises(ValueError, match=told):
        ke.Predictor(model, RUNTIMES[0])(wrong(images))


def test_bad_arguments_are_refused(model, tmp_path):
    class Odd(keras.layers.Layer):
        def call(self, x):
            return keras.ops.add(x, np.random.default_rng().uniform(0, 100))  # no trace can know it

    class Mine(keras.Model):
        def call(self, inputs):
            return inputs

    inputs = keras.Input(SHAPE)
    odd = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(Odd()(inputs)))
    flat = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    (tmp_path / "bad.tflite").write_bytes(b"no model")
    for arguments, told in [
        ((model, "tensorrt"), "Unknown runtime"),
        ((model, "auto", "int4"), "Unknown precision"),
        ((model, "auto", "float32", 0), "positive integer"),
        ((model, "keras", "int8"), "Expected float32 for Keras itself"),
        (("efficientnet-b9",), "Unknown model.*Nearest: 'efficientnet-b"),
        (("b0.tfl",), "a file that ends in"),
        ((tmp_path / "bad.tflite",), "."),
        ((Mine(),), "Expected a functional or sequential model"),
        ((flat,), "Expected a model of one input, a batch of images"),
        ((lambda x: x,), "Expected a Keras model"),
        ((odd, RUNTIMES[0]), "outputs within 0.0001 of Keras'"),
    ]:
        with pytest.raises(ValueError, match=told):
            ke.Predictor(*arguments)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ke.Predictor("missing.keras")


def test_several_outputs_keep_their_names():
    net = ke.features(ke.EfficientNetLite0(weights=None, include_top=False, input_shape=SHAPE), (2, 5))
    x = np.random.default_rng(0).uniform(0, 255, (2, *SHAPE)).astype("float32")
    expected, found = net.predict(x, verbose=0), ke.Predictor(net, "onnxruntime")(x)
    assert found.keys() == expected.keys() == {"reduction_2", "reduction_5"}
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-4 * np.abs(value).max()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
def test_nets_of_keras_applications_and_mixed_experts(runtime):
    x = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    if runtime == "litert":
        net = ke.EfficientNetCondConvB0x4(weights=None, input_shape=(64, 64, 3), classes=3)
    else:
        net = keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classes=3)
    expected = net.predict(x, verbose=0)
    assert np.abs(ke.Predictor(net, runtime)(x) - expected).max() < 1e-5


def test_a_model_of_any_size_takes_the_one_that_is_asked_for():
    net = ke.EfficientNetLite0(weights=None, include_top=False, pooling="avg")
    assert net.input_shape == (None, None, None, 3)
    predictor = ke.Predictor(net, RUNTIMES[-2], input_shape=(40, 56, 3))
    x = np.random.default_rng(0).uniform(0, 255, (2, 40, 56, 3)).astype("float32")
    assert np.abs(predictor(x) - net.predict(x, verbose=0)).max() < 1e-4
    with pytest.raises(ValueError, match="Expected input_shape like the model's"):
        ke.Predictor(net, "keras", input_shape=(40, 56, 4))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_mixed_precision_is_float32_here(images):
    net = ke.EfficientNetLite0(weights=None, input_shape=SHAPE, classes=3, dtype="mixed_bfloat16")
    found = ke.Predictor(net, "onnxruntime", input_shape=SHAPE)(images)
    assert np.abs(found - net.predict(images.astype("float32"), verbose=0)).max() < 0.02


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_the_command_starts_without_tensorflow(monkeypatch):
    monkeypatch.chdir(ROOT)
    first = ke.Predictor("efficientnet-lite0", "onnxruntime")
    assert first.labels[281] == "tabby cat"
    code = (
        "import sys; from keras_effnet.cli import main\n"
        "try: main(['predict', 'docs/coffee.png', '--top', '1', '--runtime', 'onnxruntime'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch') if name in sys.modules])"
    )
    # Another folder of weights in which there are none: what was prepared is all that is needed.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert "espresso" in result.stdout and result.stdout.splitlines()[-1] == "[]", result.stderr

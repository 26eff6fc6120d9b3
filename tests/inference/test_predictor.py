"""`Predictor` returns what `predict()` returns: on every runtime, from many threads, without Keras once cached."""

import os
import resource
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, GOLDEN, arrays, leading, run, shallow_nets, tiny, trained

import keras_effnet as ke
from keras_effnet import cache
from keras_effnet.images.resizing import crop_and_resize
from keras_effnet.inference import runtimes
from keras_effnet.inference.export_check import agreement
from keras_effnet.nets.variants import VARIANTS

# Converters use deprecated parts of TensorFlow, JAX, PyTorch and NumPy. We cannot fix their warnings.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]

SHAPE = (48, 40, 3)
RUNTIMES = [*runtimes.choose("auto"), "keras"]
if BACKEND != "tensorflow":
    RUNTIMES.remove("litert")  # Keras exports it on TensorFlow only


@pytest.fixture(scope="module")
def model():
    """A user's model: a body with another head."""
    with shallow_nets():
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


def test_auto_takes_the_fastest_and_remembers_it(model, images, expected):
    predictor = ke.Predictor(model)
    assert np.abs(predictor(images) - expected).max() < 1e-5
    told = cache.read_json(predictor.path.parent / "float32.fastest.json")
    (measured,) = told.values()
    assert set(measured["seconds"]) == set(RUNTIMES) - {"keras"}
    assert predictor.runtime == measured["chosen"] == min(measured["seconds"], key=measured["seconds"].get)
    # A cached choice is not measured again: a different one on disk is used.
    other = max(measured["seconds"], key=measured["seconds"].get)
    (key,) = told
    cache.write_json(predictor.path.parent / "float32.fastest.json", {key: {"chosen": other}})
    assert ke.Predictor(model).runtime == other
    (predictor.path.parent / "float32.fastest.json").write_text("{ damaged")
    assert ke.Predictor(model).runtime in measured["seconds"]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "record"])
def test_a_damaged_export_is_made_again(damage, images):
    runtime, model = RUNTIMES[-2], tiny(SHAPE)
    expected = run(model, images.astype("float32"))
    path = ke.Predictor(model, runtime).path
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed":  # of the same size: in the middle, where the weights are
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
        assert path.read_bytes() != content
    else:
        (record,) = path.parent.glob(f"float32.{runtimes.RUNTIMES[runtime].formats[0]}.json")
        record.write_text(record.read_text().replace('"input_shape": [48', '"input_shape": [47'))
    named = record if damage == "record" else path
    with pytest.warns(UserWarning, match=f"A kept file is damaged and is made again: {named}"):
        again = ke.Predictor(model, runtime)
    assert np.abs(again(images) - expected).max() < 1e-5 and again.input_shape == SHAPE
    assert abs(path.stat().st_size - len(content)) < 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ke.Predictor(model, runtime)


def test_weights_that_are_no_numbers_are_told(model, tmp_path):
    wrong = keras.models.clone_model(model)
    wrong.set_weights(model.get_weights())
    kernel = next(weight for weight in wrong.weights if weight.path.endswith("block2a_dwconv/kernel"))
    values = keras.ops.convert_to_numpy(kernel.value).copy()
    values.flat[5] = np.nan
    kernel.assign(values)
    told = rf"Expected finite weights. Received: nan in '{kernel.path}' of the model .*, 1 of {values.size} values"
    for runtime in ("auto", "keras"):
        with pytest.raises(ValueError, match=told):
            ke.Predictor(wrong, runtime)
    with pytest.raises(ValueError, match=told):
        ke.export(wrong, tmp_path / "x.onnx")
    data = np.zeros((4, *SHAPE)), np.arange(4)
    with pytest.raises(ValueError, match=told):
        ke.pruning.plan(wrong, data)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name != "keras"])
def test_a_fork_opens_its_own(runtime, model, images, tmp_path):
    """Some servers load a model before they fork their workers."""
    np.save(tmp_path / "x.npy", images)
    path = ke.Predictor(model, runtime).path
    code = (
        "import os, sys, numpy as np, keras_effnet as ke\n"
        "forks = []; os.register_at_fork(before=lambda: forks.append(1))\n"
        "x = np.load(sys.argv[2]); p = ke.Predictor(sys.argv[1], sys.argv[3]); before = p(x); child = os.fork()\n"
        "if not child:\n"
        "    try: os._exit(0 if np.array_equal(p(x), before) else 3)\n"
        "    except ValueError as error: os._exit(4 if 'survive a fork' in str(error) else 5)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(forks))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "x.npy"), runtime]
    reporting = {name: value for name, value in os.environ.items() if name != "CI"}  # OpenVINO sends no telemetry in CI
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=reporting)
    assert result.stdout.split() == ["0" if runtimes.RUNTIMES[runtime].forks else "4", "1"], result.stderr


def test_other_weights_are_another_model(images):
    runtime, model = RUNTIMES[0], tiny(SHAPE)
    before = ke.Predictor(model, runtime)
    bias = model.layers[-1].bias
    bias.assign(keras.ops.convert_to_numpy(bias.value) + np.array([5, 0, 0], "float32"))
    after = ke.Predictor(model, runtime)
    assert after.path.parent != before.path.parent
    assert np.abs(after(images) - run(model, images.astype("float32"))).max() < 1e-5
    assert np.abs(after(images) - before(images)).max() > 0.1


def test_a_file_needs_no_keras(images, tmp_path):
    runtime, model = RUNTIMES[-2], tiny(SHAPE)
    expected = run(model, images.astype("float32"))
    model.save(tmp_path / "mine.keras")
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


@pytest.mark.parametrize(
    "runtime", [name if name == "litert" else pytest.param(name, marks=pytest.mark.long) for name in RUNTIMES]
)
def test_threads_get_equal_results_and_memory_does_not_grow(runtime, model, images):
    predictor = ke.Predictor(model, runtime)
    wanted = {count: predictor(images[:count]) for count in (1, 3)}
    wrong, grown = [], []

    def work(number: int, turns: int) -> None:
        for turn in range(turns):
            for count in (1, 3):
                if not np.array_equal(predictor(images[:count]), wanted[count]):
                    wrong.append((number, turn, count))

    # The first round is not counted, since libraries still allocate. Then 2,000 predictions (400 on slower Keras).
    for turns in (5, 25) if runtime == "keras" else (25, 125):
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
        (lambda x: x.astype(str), "numeric pixels"),
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
            return keras.ops.add(x, np.random.default_rng().uniform(0, 100))  # different in every trace

    class Mine(keras.Model):
        def call(self, inputs):
            return inputs

    inputs = keras.Input(SHAPE)
    odd = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(Odd()(inputs)))
    flat = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    for name in ("bad.tflite", "bad.onnx"):
        (tmp_path / name).write_bytes(b"no model")
    for arguments, told in [
        ((model, "tensorrt"), "Unknown runtime"),
        ((model, "auto", "int4"), "Unknown precision"),
        ((model, "auto", "float32", 0), "Expected threads of at least 1"),
        ((model, "keras", "int8"), "Expected precision='float32' for runtime='keras'"),
        (("efficientnet-b9",), "Unknown model.*Nearest: 'efficientnet-b"),
        (("b0.tfl",), r"Unknown model.*the path of a \.keras file"),
        ((tmp_path / "bad.tflite",), "Expected a model that litert opens"),
        ((tmp_path / "bad.onnx",), "Expected a model that onnxruntime opens"),
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
    whole = tiny(SHAPE)  # the outputs of ke.features() are such a dict
    levels = {f"reduction_{level}": whole.get_layer(f"{name}_activation") for level, name in ((2, "top"), (1, "stem"))}
    net = keras.Model(whole.inputs, {name: layer.output for name, layer in levels.items()})
    x = np.random.default_rng(0).uniform(0, 255, (2, *SHAPE)).astype("float32")
    expected, found = run(net, x), ke.Predictor(net, "onnxruntime")(x)
    assert found.keys() == expected.keys() == {"reduction_1", "reduction_2"}
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-4 * np.abs(value).max()


@pytest.mark.usefixtures("shallow")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.parametrize("runtime", leading(["openvino", "litert", "onnxruntime"], 1))
def test_nets_of_keras_applications_and_mixed_experts(runtime, monkeypatch):
    x = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    if runtime != "onnxruntime":  # OpenVINO does not compile Keras' own export of mixed experts
        row = VARIANTS["efficientnet-condconv-b0-4e"]
        first, mixed = row.stages[0], row.stages[5]
        stages = (first, replace(mixed, filters_in=first.filters_out))  # one block that mixes: each takes seconds
        monkeypatch.setitem(VARIANTS, row.name, replace(row, stages=stages))
        net = ke.EfficientNetCondConvB0x4(weights=None, input_shape=(64, 64, 3), classes=3)
        assert sum(isinstance(layer, ke.CondConv2D | ke.DepthwiseCondConv2D) for layer in net.layers) == 3
    else:
        net = keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classes=3)
    expected = net.predict(x, verbose=0)
    assert np.abs(ke.Predictor(net, runtime)(x) - expected).max() < 1e-5


def test_a_model_of_any_size_takes_the_one_that_is_asked_for():
    net = tiny((None, None, 3))
    predictor = ke.Predictor(net, RUNTIMES[-2], input_shape=(40, 56, 3))
    x = np.random.default_rng(0).uniform(0, 255, (2, 40, 56, 3)).astype("float32")
    assert np.abs(predictor(x) - net.predict(x, verbose=0)).max() < 1e-4
    with pytest.raises(ValueError, match="Expected input_shape to match the model's"):
        ke.Predictor(net, "keras", input_shape=(40, 56, 4))


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_mixed_precision_is_float32_here(images):
    mixed, whole = (
        ke.EfficientNetLite0(weights=None, input_shape=SHAPE, classes=3, dtype=dtype)
        for dtype in ("mixed_bfloat16", "float32")
    )
    whole.set_weights(mixed.get_weights())
    found = ke.Predictor(mixed, "onnxruntime")(images)
    assert np.abs(found - whole.predict(images.astype("float32"), verbose=0)).max() < 1e-5


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_int8_runs_and_tells_what_it_left_in_float(model, images, expected):
    predictor = ke.Predictor(model, "litert", "int8", calibration=images)
    assert np.abs(predictor(images) - expected).max() < 0.1
    assert predictor.path.stat().st_size < 0.4 * ke.Predictor(model, "litert").path.stat().st_size
    told = cache.read_json(predictor.path.with_suffix(".litert.json"))
    assert "stem_conv" in told["float_layers"] and "top_conv" not in told["float_layers"]
    errors = told["layer_errors"]
    assert any(name.startswith("block7a") for name in errors)
    assert list(errors.values()) == sorted(errors.values(), reverse=True) and max(errors.values()) > 0.01
    # Other images give other ranges, and another cache entry.
    small = tiny(SHAPE)
    one, other = (ke.Predictor(small, "litert", "int8", calibration=each) for each in (images[:4], images[:4] // 2))
    assert other.path != one.path


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.parametrize(("runtime", "top1"), [("litert", 0.9), ("onnxruntime", 0.85)])
def test_int8_keeps_lite0s_classes(runtime, top1):
    """Calibration and test use crops of different photos."""
    recorded = arrays(GOLDEN / "lite_real" / "lite0_logits.npz")
    wholes = [recorded[name].astype("float32") for name in recorded if name.endswith("pixels_uint8")]

    def crops(images, seed):
        random = np.random.default_rng(seed)
        found = []
        for place in range(112):
            side = random.integers(112, 225)
            top, left = random.integers(0, 225 - side, 2)
            crop = images[place % len(images)][top : top + side, left : left + side]
            found.append(np.clip(crop_and_resize(crop, (224, 224), 0), 0, 255))
        return np.stack(found)

    calibration, test = crops(wholes[::2], 0), crops(wholes[1::2], 1)
    expected = ke.Predictor("efficientnet-lite0", runtime)(test)
    found = agreement(expected, ke.Predictor("efficientnet-lite0", runtime, "int8", calibration=calibration)(test))
    assert found["top1_agreement"] >= top1 and found["top5_overlap"] >= top1 and found["cosine"] > 0.98

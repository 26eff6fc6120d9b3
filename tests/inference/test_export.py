"""Saved and exported models compute the same in a fresh process, and in the runtimes that people deploy with."""

import json
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, arrays, fill, run, shallow_nets, tiny, trained

import keras_effnet as ke
from keras_effnet.inference import export
from keras_effnet.nets.build import functional

# Converters use deprecated parts of TensorFlow, JAX, PyTorch and NumPy. We cannot fix their warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-5  # relative to the largest output


@pytest.fixture(scope="module")
def model():
    """The published Lite0, for small images: its record is the same, and its export faster."""
    return ke.EfficientNetLite0(input_shape=(64, 64, 3))


@pytest.fixture(scope="module")
def swish():
    """B0, with squeeze-and-excite, unlike Lite. It returns logits: with these weights, all probabilities are alike."""
    with shallow_nets():
        return fill(ke.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classifier_activation=None))


@pytest.fixture(scope="module")
def mixed():
    """A CondConv model: no export format has convolutions of mixed experts."""
    with shallow_nets():
        return fill(ke.EfficientNetCondConvB0x4(weights=None, input_shape=(64, 64, 3), classifier_activation=None))


@pytest.fixture(scope="module")
def pixels():
    photos = ("cat.png", "coffee.png")
    return np.stack([ke.load_image(ROOT / "docs" / name, "efficientnet-lite0") for name in photos])


FRESH = """
import json, sys, numpy as np, keras
sys.modules["keras_effnet"] = None  # a saved model needs only plain Keras
images, config, output, *paths = sys.argv[1:]
found = []
for path in paths:
    if path.endswith(".keras"):
        model = keras.saving.load_model(path)
    else:
        model = keras.models.model_from_json(open(config).read())
        model.load_weights(path)
    # JAX compiles an eager call operation by operation, the others run it sooner than they compile the model.
    run = model.predict_on_batch if keras.backend.backend() == "jax" else model
    found.append(keras.ops.convert_to_numpy(run(np.load(images))))
np.savez(output, *found)
"""


@pytest.mark.parametrize("suffix", [".keras", pytest.param(".weights.h5", marks=pytest.mark.long)])
def test_a_fresh_process_with_plain_keras_gives_the_same(mini, pixels, tmp_path, suffix):
    model = fill(ke.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classifier_activation=None))
    pixels = pixels[:, :64, :64]
    path, images, config, output = (str(tmp_path / name) for name in (f"m{suffix}", "x.npy", "m.json", "y.npz"))
    saved = {path: model}
    if suffix == ".keras":
        model.save(path)
        named = tiny((64, 64, 3))
        saved[ke.save_model(named, tmp_path / "named.keras", labels=["a", "b", "c"])] = named
    else:
        model.save_weights(path)
    np.save(images, pixels)
    (tmp_path / "m.json").write_text(model.to_json())
    line = [sys.executable, "-c", FRESH, images, config, output, *map(str, saved)]
    subprocess.run(line, check=True, capture_output=True)
    for found, model in zip(arrays(output).values(), saved.values(), strict=True):
        assert np.abs(found - run(model, pixels)).max() < 1e-6


def test_the_configuration_is_plain(model):
    text = model.to_json()
    assert "keras_effnet" not in text and json.loads(text)["class_name"] == "Functional"


@pytest.mark.long
@pytest.mark.parametrize("which", ["swish", "mixed"])
@pytest.mark.skipif(
    BACKEND == "torch", reason="Keras 3.15.1 on torch exports no SavedModel, nor one of keras.applications"
)
def test_saved_model(which, request, pixels, tmp_path):
    import tensorflow as tf

    net = request.getfixturevalue(which)
    x = pixels[:, :64, :64]
    net.export(tmp_path / "saved", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    expected = run(net, x)
    assert np.abs(loaded.serve(x).numpy() - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("which", ["swish", pytest.param("mixed", marks=pytest.mark.long)])
def test_onnx_has_one_input_and_the_same_numbers(which, request, pixels, tmp_path):
    import onnxruntime

    net = request.getfixturevalue(which)
    x = pixels[:, :64, :64]
    if which == "swish":  # an export takes seconds: one of the logits and of the five outputs of features()
        net = functional(net.inputs, {"logits": net.output, **ke.features(net).output}, "both")
    net.export(tmp_path / "m.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (node,) = session.get_inputs()
    outputs = keras.tree.flatten(run(net, x))
    assert len(outputs) == (6 if which == "swish" else 1)
    for found, expected in zip(session.run(None, {node.name: x}), outputs, strict=True):
        assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.long
@pytest.mark.parametrize("which", ["swish", "mixed"])
@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras exports LiteRT from TensorFlow; from torch with litert-torch"
)
def test_litert(which, request, pixels, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    net = request.getfixturevalue(which)
    x = pixels[:1, :64, :64]
    net.export(tmp_path / "m.tflite", format="litert", verbose=False)
    interpreter = Interpreter(str(tmp_path / "m.tflite"))
    interpreter.allocate_tensors()
    (node,) = interpreter.get_input_details()
    interpreter.set_tensor(node["index"], x)
    interpreter.invoke()
    expected = run(net, x)
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


# keras_effnet.export()

needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")


@pytest.fixture(scope="module")
def small():
    return tiny((48, 48, 3))


@needs_tensorflow
@pytest.mark.parametrize("kind", ["savedmodel", "onnx", "litert", "openvino"])
def test_an_export_is_tried_and_says_what_it_is(kind, small, tmp_path):
    path = tmp_path / f"mine{export.FORMATS[kind]}"
    report = ke.export(small, path, labels=["a", "b", "c"])
    assert report["format"] == kind and max(report["difference"].values()) < 1e-5
    told = ke.metadata(path)
    assert told["labels"] == ["a", "b", "c"] and told["input_shape"] == [48, 48, 3] and told["pixels"] == "0-255"
    assert told["preprocessing"]["scale"] == [1 / 128] * 3 and told["difference"] == report["difference"]
    files = sorted(path.parent.rglob("*"))
    assert not any("keras_effnet-" in str(file) for file in files)
    assert report["size"] == pytest.approx(sum(file.stat().st_size for file in files if file.is_file()), abs=200)
    if kind == "savedmodel":
        return
    x = np.random.default_rng(0).uniform(0, 255, (3, 48, 48, 3)).astype("float32")
    assert np.abs(ke.Predictor(path)(x) - run(small, x)).max() < 1e-5
    if kind == "litert":
        assert zipfile.ZipFile(path).read("labels.txt").decode().split() == ["a", "b", "c"]


@needs_tensorflow
def test_published_weights_travel_with_their_record(model, tmp_path):
    ke.export(model, tmp_path / "lite0.tflite")
    told = ke.metadata(tmp_path / "lite0.tflite")
    assert told["weights"]["tag"] == "baseline" and told["weights"]["licence"] == "Apache-2.0"
    assert told["preprocessing"] | {"crop_padding": 32, "interpolation": "bicubic"} == told["preprocessing"]
    assert len(told["labels"]) == 1000 and told["labels"][282] == "tiger cat"


@needs_tensorflow
@pytest.mark.parametrize(
    "kind", ["litert", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("onnx", "openvino"))]
)
def test_float16_is_half_the_size(kind, request, tmp_path):
    # OpenVINO's file describes the layers at length, so that the weights of three stages are not most of it.
    request.getfixturevalue("shallow" if kind == "openvino" else "mini")
    small = trained(ke.EfficientNetLite0(weights=None, input_shape=(48, 48, 3), classes=3))
    path = tmp_path / f"mine{export.FORMATS[kind]}"
    whole, half = ke.export(small, path), ke.export(small, path, precision="float16")
    assert half["size"] < 0.56 * whole["size"] and max(half["difference"].values()) < 2e-2
    assert ke.metadata(path)["precision"] == "float16"


@needs_tensorflow
def test_what_does_not_compute_the_same_is_not_kept(small, tmp_path):
    class Odd(keras.layers.Layer):
        def call(self, x):
            return keras.ops.add(x, np.random.default_rng().uniform(0, 100))  # different in every trace

    inputs = keras.Input((48, 48, 3))
    odd = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(Odd()(inputs)))
    path = tmp_path / "mine.tflite"
    ke.export(small, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"Expected outputs within 0.0001 of Keras'.*Nothing was saved"):
        ke.export(odd, path)
    for arguments, told in [
        ({"format": "tflite"}, "Unknown format"),
        ({"format": "onnx"}, "a path that ends in .onnx"),
        ({"precision": "int4"}, "Unknown precision"),
        ({"labels": ["a"]}, "a label for each of the model's 3 outputs"),
        ({"input_shape": (32, 32, 3)}, "Expected input_shape to match the model's"),
        ({"precision": "int8", "calibration": np.zeros((4, 32, 32, 3))}, r"Expected images of shape \(count, 48"),
    ]:
        with pytest.raises(ValueError, match=told):
            ke.export(small, path, **arguments)
    with pytest.raises(ValueError, match="Expected float32 for a SavedModel"):
        ke.export(small, tmp_path / "saved", precision="int8")
    with pytest.raises(OSError, match="Expected a folder to write to"):
        ke.export(small, tmp_path / "no" / "mine.tflite")
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "mine.png").write_bytes(b"")
    with pytest.raises(ValueError, match="another folder"):
        ke.export(small, tmp_path / "photographs")
    (tmp_path / "photographs" / "mine.png").unlink()
    (tmp_path / "photographs").rmdir()
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["mine.tflite"]

"""Quantization to 8 bits: what stays in float, weights whose sums are exact everywhere, and bfloat16 beside it."""

import keras
import numpy as np
import pytest
from helpers import fill, leading, shallow_nets
from hypothesis import given
from hypothesis import strategies as st

import keras_effnet as ke
from keras_effnet.inference import quantization, runtimes
from keras_effnet.inference.folding import for_inference

onnx = pytest.importorskip("onnx")

SHAPE = (48, 48, 3)

pytestmark = pytest.mark.filterwarnings("ignore")  # of converters


@pytest.fixture
def images():
    """As many as `export()` also takes of random pixels: Keras traces a model for each number of images."""
    return np.random.default_rng(0).uniform(0, 255, (2, *SHAPE)).astype("float32")


STAGES = {"lite0": 5, "b0": 4}  # to quantize one takes seconds


@pytest.fixture(params=STAGES)
def model(request):
    with shallow_nets(STAGES[request.param]):
        yield fill(ke.create_model(f"efficientnet-{request.param}", weights=None, input_shape=SHAPE, classes=5))


def numbers(value) -> np.ndarray:
    return keras.ops.convert_to_numpy(value)


@given(st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 4)), st.integers(0, 99))
def test_two_products_of_a_pair_fit_into_16_bits(shape, seed):
    side, inputs, outputs = shape
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(side, side, inputs, outputs)) ** 3
    tops = quantization.peaks(kernel, pairs=True)
    # Depthwise convolutions add no pairs, so all of the range is used.
    np.testing.assert_array_equal(quantization.peaks(kernel), np.abs(kernel).max((0, 1, 2)))
    weights = np.abs(np.rint(kernel / tops * 127)).astype(int)
    assert weights.max() <= 127
    taps = weights.reshape(-1, inputs, outputs)
    for rows in (*taps, taps.reshape(-1, outputs), taps.transpose(1, 0, 2).reshape(-1, outputs)):
        rows = np.pad(rows, ((0, len(rows) % 2), (0, 0)))
        assert (255 * (rows[::2] + rows[1::2])).max() < 2**15


@pytest.mark.usefixtures("eager")
def test_equal_ranges_in_the_channels_between_linear_convolutions(model, images):
    net = for_inference(model, SHAPE)
    before = numbers(net(images))
    kernels = {layer.name: numbers(layer.weights[0]) for layer in net.layers if layer.weights}

    def ranges(name: str) -> np.ndarray:
        layers = [net.get_layer(f"{name}_{end}").output for end in ("project_conv", "add") if has(f"{name}_{end}")]
        found = keras.Model(net.inputs, layers).predict(images, verbose=0)
        return np.max([np.abs(each).max((0, 1, 2)) for each in (found if len(layers) > 1 else [found])], 0)

    def has(name: str) -> bool:
        return any(layer.name == name for layer in net.layers)

    unequal = ranges("block1a")
    assert unequal.max() > 1.2 * unequal.min()
    quantization.equalize(net, images)
    np.testing.assert_allclose(numbers(net(images)), before, atol=2e-6)
    np.testing.assert_allclose(ranges("block1a"), unequal.max(), rtol=1e-3)
    changed = {
        name for name, kernel in kernels.items() if not np.array_equal(kernel, numbers(net.get_layer(name).weights[0]))
    }
    assert {"block1a_project_conv", "block2a_expand_conv", "top_conv"} <= changed
    # An activation function is not linear, so the channels around it stay.
    assert all(name.endswith(("project_conv", "expand_conv", "top_conv")) for name in changed)


def test_channels_without_values_and_layers_that_are_called_twice_are_not_scaled(images):
    def conv(filters: int, name: str, **options):
        return keras.layers.Conv2D(filters, 1, name=name, **options)

    inputs = keras.Input(SHAPE)
    zeros = conv(4, "zeros", kernel_initializer="zeros")(inputs)
    silent = keras.Model(inputs, conv(3, "reads", activation="relu")(zeros))
    both = conv(4, "both", activation="relu")  # reads channels that could be scaled, and others that could not
    twice = keras.Model(inputs, [both(conv(3, "linear")(inputs)), both(conv(3, "curved", activation="relu")(inputs))])
    for net, constant in ((silent, "zeros"), (twice, "linear")):
        folded = for_inference(net, SHAPE)
        kernel = numbers(folded.get_layer(constant).kernel).copy()
        before = folded.predict(images, verbose=0)
        quantization.equalize(folded, images)
        for one, other in zip(
            keras.tree.flatten(before), keras.tree.flatten(folded.predict(images, verbose=0)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(numbers(folded.get_layer(constant).kernel), kernel)


def kernels_of(graph) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the kernels of an ONNX graph in float, and those in 8 bits."""
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    whole, quantized = [], []
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        if node.input[1] in constants:
            whole.append(constants[node.input[1]])
        elif makers[node.input[1]].op_type == "DequantizeLinear" and makers[node.input[1]].input[0] in constants:
            quantized.append(constants[makers[node.input[1]].input[0]])
    return whole, quantized


# tests/inference/test_class_maps.py exports Lite0 in 8 bits.
@pytest.mark.parametrize("model", leading(["b0", "lite0"], 1), indirect=True)
def test_what_is_said_to_stay_in_float_does_and_all_else_is_in_8_bits(model, images, monkeypatch, tmp_path):
    path = tmp_path / "net.onnx"
    monkeypatch.setattr(quantization, "FLOAT", quantization.FLOAT[2:3])  # stages 1 and 2
    monkeypatch.chdir(tmp_path)
    report = ke.export(model, path, precision="int8", calibration=images)
    assert list(tmp_path.iterdir()) == [path]  # the quantizer's own files are gone, also where it was started
    whole, quantized = kernels_of(onnx.load(path).graph)
    # Exporters name the nodes: TensorFlow's leaves out the layer for some, JAX' for all. The kernels tell.
    net = for_inference(model, SHAPE)
    left = [layer for layer in net.layers if layer.name in report["float_layers"]]
    assert {"stem_conv", "block1a_dwconv", "block2a_project_conv"} <= set(report["float_layers"])
    assert len(whole) == len(left)
    for layer, kernel in zip(left, whole, strict=True):
        if layer.name == "stem_conv":
            np.testing.assert_allclose(np.sort(kernel, None), np.sort(numbers(layer.kernel), None), rtol=1e-5)
        assert kernel.size == numbers(layer.kernel).size
    others = [layer for layer in net.layers if hasattr(layer, "kernel") and layer not in left]
    assert len(quantized) == len(others) > 10
    for values, layer in zip(quantized, others, strict=True):
        assert values.dtype == np.int8 and values.size == numbers(layer.kernel).size
        kernel = values.astype(int)
        if kernel.ndim == 4 and kernel.shape[1] > 1:
            rows = np.abs(kernel.reshape(len(kernel), -1))
            rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
            assert (255 * (rows[:, ::2] + rows[:, 1::2])).max() < 2**15


@pytest.mark.usefixtures("eager")
def test_biases_of_layers_in_float_are_not_corrected(model, images):
    net = for_inference(model, SHAPE)
    versions = quantization.candidates(net, images, pairs=True)
    next(versions)
    bias = numbers(net.get_layer("block1a_project_conv").bias).copy()
    next(versions)  # now with stage 1 in float
    assert not np.array_equal(bias, numbers(net.get_layer("block1a_project_conv").bias))
    expected = for_inference(model, SHAPE)
    quantization.equalize(expected, images)
    for name in ("stem_conv", "block1a_dwconv", "block1a_project_conv"):
        np.testing.assert_allclose(
            numbers(net.get_layer(name).bias), numbers(expected.get_layer(name).bias), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("model", ["b0"], indirect=True)
def test_openvino_runs_the_convolutions_in_8_bits(model, images, monkeypatch, tmp_path):
    openvino = pytest.importorskip("openvino")
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path))
    predictor = ke.Predictor(model, "openvino", "int8", calibration=images)
    assert predictor.path.suffix == ".xml"
    graph = openvino.Core().read_model(predictor.path)
    graph.reshape([1, *SHAPE])
    kinds = [op.get_rt_info() for op in openvino.Core().compile_model(graph, "CPU").get_runtime_model().get_ops()]
    convolutions = [str(told["primitiveType"].astype(str)) for told in kinds if "Conv" in told["layerType"].astype(str)]
    float_layers = predictor.metadata["float_layers"]
    assert sum("I8" in kind for kind in convolutions) >= len(convolutions) - len(float_layers)
    # The second time, the cached file is opened.
    written = predictor.path.stat().st_mtime_ns
    again = ke.Predictor(model, "openvino", "int8", calibration=images)
    assert again.path.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again(images), predictor(images))


@pytest.mark.parametrize("model", ["lite0"], indirect=True)
def test_bfloat16_computes_in_it_or_says_that_this_processor_cannot(model, images, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path))
    whole = ke.Predictor(model, "openvino")
    for source, runtime in ((model, "openvino"), (whole.path, "auto")):
        if not runtimes.has_bfloat16():
            with pytest.raises(ValueError, match="Expected a processor that computes in bfloat16"):
                ke.Predictor(source, runtime, "bfloat16")
            continue
        predictor = ke.Predictor(source, runtime, "bfloat16")
        assert (predictor.runtime, predictor.precision, predictor.path) == ("openvino", "bfloat16", whole.path)
        difference = np.abs(predictor(images) - whole(images)).max()
        assert 1e-6 < difference < 0.02
    for runtime in ("onnxruntime", "keras"):
        with pytest.raises(ValueError, match=r"bfloat16|Expected precision='float32'"):
            ke.Predictor(model, runtime, "bfloat16")
    with pytest.raises(ValueError, match=r"precision='float32' for a file"):
        ke.export(model, tmp_path / "net.onnx", precision="bfloat16")

"""Quantizes to 8 bits: chooses the layers that stay in float, and prepares a model so that rounding changes less."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet import compat

# Layers that stay in float, in increasing order: the image, whose pixels need not be whole numbers, and the first
# stages, whose few channels differ widely in range. They cause most of the disagreement of Lite0 with its float model,
# and hold a hundredth of its weights (docs/benchmarks.md, int8).
# The shares of global context are about one over the number of pixels: too small for one scale of 8 bits.
_IMAGE = r"image_|preprocessing|rescaling|normalization|stem_|block\w+_se_(?:share|flat|context|norm)"

FLOAT = (_IMAGE, rf"{_IMAGE}|block1", rf"{_IMAGE}|block[12]", rf"{_IMAGE}|block[123]")

# Of the logits of the calibration images. From here on, Lite0 predicts float32's class for at least 99.6 % of the crops
# of which float32 is sure (docs/benchmarks.md). At 0.996, top-1 on crops of other photos agrees less in LiteRT: 88.4
# instead of 94.6 %.
COSINE = 0.997

# How much a channel is scaled at most. One that is quiet on the calibration images may not be on others.
_LARGEST_SCALE = 16

_MEASURED = 64  # images to average activations over


def candidates(net: keras.Model, images: np.ndarray, pairs: bool = False) -> Iterator[tuple[str, keras.Model]]:
    """Yields versions of a model to quantize, each with more layers in float than the one before.

    Args:
        net: A folded model. Its weights are changed in place.
        images: Array of images to measure the activations with.
        pairs: See `peaks()`.

    Yields:
        Pairs of a regular expression, which matches the names of the float layers, and the model.
    """
    equalize(net, images)
    layers = [layer for layer in net.layers if _takes(layer)]
    whole = {layer.name: _numpy(layer.bias) for layer in layers}
    shifts = dict(_shifts(net, layers, images[:_MEASURED], pairs))
    for pattern in FLOAT:
        for layer in layers:
            left = re.match(pattern, layer.name)
            layer.bias.assign(whole[layer.name] - (0 if left else shifts[layer.name]))
        yield pattern, net


def peaks(kernel: np.ndarray, pairs: bool = False) -> np.ndarray:
    """Returns, for each output of a convolution, what its largest quantized weight, 127, stands for.

    Args:
        kernel: Array (height, width, inputs, outputs).
        pairs: Boolean. Without VNNI, x86 processors multiply bytes in pairs and add both products in 16 bits, where
            255 x 127 + 255 x 127 saturates. If True, the magnitudes of a pair add up to 127 before rounding, and to 128
            after it, which is exact on every processor. Which weights are a pair depends on the runtime: next to
            each other in the inputs, or in the rows of the kernel. Defaults to False, as for depthwise convolutions,
            whose products are not added in pairs.

    Returns:
        Array (outputs,).
    """
    sizes = np.abs(kernel)
    if not pairs:
        return sizes.max((0, 1, 2))
    height, width, inputs, outputs = sizes.shape
    taps = sizes.reshape(height * width, inputs, outputs)
    orders = (taps, taps.reshape(1, -1, outputs), taps.transpose(1, 0, 2).reshape(1, -1, outputs))
    padded = [np.pad(order, ((0, 0), (0, order.shape[1] % 2), (0, 0))) for order in orders]
    return np.max([(order[:, ::2] + order[:, 1::2]).max((0, 1)) for order in padded], 0)


def equalize(net: keras.Model, images: np.ndarray) -> None:
    """Scales the channels between linear convolutions to one range, and the kernels that read them by the inverse.

    Activations have one scale for all channels, so those of a small range lose most. The model computes the same as
    before, except for rounding. Channels that an activation function follows stay as they are.

    Args:
        net: A folded model. Its weights are changed in place.
        images: Array of images to measure the ranges with.

    Reference:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, section
        4.1, with measured ranges, over all layers that add to the same channels.
    """
    streams = list(_streams(net))
    if not streams:
        return
    axes = _all_but_channels(streams[0][1][0])
    largest = keras.Model(
        net.inputs,
        [
            keras.ops.max(keras.ops.stack([keras.ops.max(keras.ops.abs(tensor), axes) for tensor in tensors]), 0)
            for tensors, _, _ in streams
        ],
    )
    found = [[_numpy(value) for value in keras.tree.flatten(largest.predict_on_batch(image[None]))] for image in images]
    for (_, makers, readers), rows in zip(streams, zip(*found, strict=True), strict=True):
        ranges = np.max(rows, 0)
        scale = np.minimum(ranges.max() / np.maximum(ranges, 1e-30), _LARGEST_SCALE)
        scale[ranges == 0] = 1
        for layer in makers:
            kernel = _numpy(layer.kernel)
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            layer.kernel.assign(kernel * scale.reshape(kernel.shape[2 if depthwise else 3 :]))
            layer.bias.assign(_numpy(layer.bias) * scale)
        for layer in readers:
            layer.kernel.assign(_numpy(layer.kernel) / scale[:, None])


def _streams(net) -> Iterator[tuple[list, list, list]]:
    """Yields tensors that additions tie together, the convolutions that make them, and those that read them."""
    makers: dict[int, Any] = {}
    readers: dict[int, list] = defaultdict(list)
    tensors: dict[int, Any] = {}
    group: dict[int, int] = {}
    calls: list[tuple[Any, list, list]] = []

    def call(operation, *args, **kwargs):
        outputs = compat.first_outputs(operation)
        calls.append((operation, keras.tree.flatten((args, kwargs)), outputs))
        return outputs[0] if len(outputs) == 1 else outputs

    compat.run_graph(net, net.input, call)
    if len({id(operation) for operation, _, _ in calls}) < len(calls):
        return  # a layer that is called twice has one kernel for two places
    for operation, read, made in calls:
        for tensor in made:
            makers[id(tensor)], group[id(tensor)], tensors[id(tensor)] = operation, id(tensor), tensor
        for value in read:
            readers[id(value)].append(operation)
        if isinstance(operation, keras.layers.Add):
            tied = {group.setdefault(id(tensor), id(tensor)) for tensor in read}
            group |= {place: id(made[0]) for place, one in group.items() if one in tied}
    results = {id(tensor) for tensor in net.outputs}
    for one in dict.fromkeys(group.values()):
        places = [place for place, other in group.items() if other == one]
        if not makers.keys() >= set(places):  # the input of the model
            continue
        made_by = [makers[place] for place in places if not isinstance(makers[place], keras.layers.Add)]
        read_by = [each for place in places for each in readers[place] if not isinstance(each, keras.layers.Add)]
        same = len({tuple(tensors[place].shape) for place in places}) == 1
        if same and read_by and not results & set(places) and all(map(_linear, made_by)) and all(map(_reads, read_by)):
            yield [tensors[place] for place in places], made_by, read_by


def _linear(layer) -> bool:
    return _reads(layer) and _takes(layer) and layer.activation is keras.activations.linear


def _reads(layer) -> bool:
    """Returns whether a layer is a convolution whose kernel can take a scale of each input."""
    plain = type(layer) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D) and getattr(layer, "groups", 1) == 1
    return plain and not (getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None))


def _takes(layer) -> bool:
    return isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D) and layer.use_bias


def _numpy(value) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value))


def _shifts(net, layers, images: np.ndarray, pairs: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields, for each layer, the mean shift of its outputs by the rounding of its kernel.

    Reference:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, section
        4.2, with measured means.
    """
    if not layers:
        return
    means = keras.Model(
        net.inputs, {layer.name: keras.ops.mean(layer.input, _all_but_channels(layer)) for layer in layers}
    )
    sums: dict[str, Any] = {}
    for image in images:
        for name, value in means.predict_on_batch(image[None]).items():
            sums[name] = sums.get(name, 0.0) + _numpy(value).astype("float64")
    for layer in layers:
        kernel = _numpy(layer.kernel).astype("float64")
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        single = depthwise or (layer.groups > 1 and kernel.shape[2] == 1)
        top = peaks(kernel.reshape(*kernel.shape[:2], 1, -1) if depthwise else kernel, pairs and not single)
        scale = np.maximum(top, 1e-12).reshape(kernel.shape[2:] if depthwise else -1) / 127
        error = np.rint(kernel / scale) * scale - kernel
        if depthwise:
            shift = (error * (sums[layer.name] / len(images))[:, None]).sum((0, 1)).reshape(-1)
        else:
            arriving = (sums[layer.name] / len(images)).reshape(layer.groups, -1)
            parts = np.split(error.sum((0, 1)), layer.groups, axis=1)
            shift = np.concatenate([row @ part for row, part in zip(arriving, parts, strict=True)])
        yield layer.name, shift


def _all_but_channels(layer) -> tuple[int, ...]:
    """Returns the axes of a layer's input, without that of its channels."""
    return (0, 1, 2) if layer.data_format == "channels_last" else (0, 2, 3)


def best(
    net: keras.Model,
    images: np.ndarray,
    quantise: Callable[[keras.Model, str], Any],
    run: Callable[[Any], Callable[[np.ndarray], np.ndarray]],
    cosine: Callable[[np.ndarray, np.ndarray], float],
    pairs: bool = False,
) -> tuple[Any, str]:
    """Quantizes a model with as few float layers as needed to keep the logits.

    Tries the versions of `candidates()` until the cosine of the logits reaches `COSINE`, and returns the best. Of
    several outputs, the first one counts. Models without known layer names or logits get the first version.

    Args:
        net: A folded model.
        images: Array of calibration images.
        quantise: Function that quantizes a model, given the regular expression of its float layers.
        run: Function from a result of `quantise` to a function from images to outputs.
        cosine: Function of the outputs of the float and of the quantized model.
        pairs: See `peaks()`.

    Returns:
        Tuple of the result of `quantise`, and the regular expression.
    """
    tried: list[tuple[float, Any, str]] = []

    def first(images: np.ndarray) -> np.ndarray:
        return _numpy(keras.tree.flatten(net.predict_on_batch(images))[0])

    expected = first(images[:1])
    if expected.ndim == 2:
        expected = np.concatenate([first(image[None]) for image in images])
    known = any(re.match(FLOAT[-1], layer.name) for layer in net.layers)
    for pattern, version in candidates(net, images, pairs):
        made = quantise(version, pattern)
        if expected.ndim != 2 or not known:
            return made, pattern
        tried.append((cosine(expected, run(made)(images)), made, pattern))
        if tried[-1][0] >= COSINE:
            break
    return max(tried, key=lambda each: each[0])[1:]


class Onnx:
    """Quantizes with ONNX Runtime's quantizer (QDQ), except for the layers that stay in float.

    Args:
        write: Function that saves a model to an ONNX file at a path.
        path: Path of the file.
        images: Array of calibration images.
        fused: Boolean. If False, the outputs of convolutions and the activation functions are quantized as well: ONNX
            Runtime has kernels of 8 bits for them. If True, only what convolutions read and what is added: OpenVINO
            computes activation functions in float, as the last step of a convolution.

    Call arguments:
        net: A folded model.
        pattern: Regular expression of the names of the float layers.

    Returns:
        Bytes, the content of the file.
    """

    def __init__(self, write: Callable[[keras.Model, Path], None], path: Path, images: np.ndarray, fused: bool):
        self._write, self._path, self._images, self._fused = write, path, images, fused
        self.known: set[str] = set()  # layers that can be in 8 bits

    def __call__(self, net: keras.Model, pattern: str) -> bytes:
        import onnx
        from onnx import numpy_helper
        from onnxruntime import quantization as q
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(q.CalibrationDataReader):
            def __init__(self, name: str, images):
                self._rows = iter([{name: image[None]} for image in images])

            def get_next(self) -> Any:
                return next(self._rows, None)

        self._write(net, self._path)
        prepared = self._path.with_name(f"prepared-{self._path.name}")
        quant_pre_process(self._path, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        for place, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{place}"
        onnx.save(model, prepared)
        constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        layers = _layers_of(model.graph, constants, net)
        self.known = set(layers.values())
        if not self.known:
            raise ValueError(
                f"Expected kernels of the model's layers in its ONNX graph. Received: none of {net.name!r}"
            )
        left = _float_nodes(model.graph, layers, pattern)
        options: dict[str, Any] = {"TensorQuantOverrides": _ranges(model.graph, constants, left)}
        if self._fused:
            options["OpTypesToExcludeOutputQuantization"] = list(_MULTIPLYING)
        q.quantize_static(
            prepared,
            self._path,
            Reader(model.graph.input[0].name, self._images),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            nodes_to_exclude=sorted(left),
            op_types_to_quantize=[*_MULTIPLYING, "Add"] if self._fused else None,
            extra_options=options,
        )
        prepared.unlink()
        return self._path.read_bytes()


_MULTIPLYING = ("Conv", "Gemm", "MatMul")


def _layers_of(graph, constants: dict[str, np.ndarray], net) -> dict[str, str]:
    """Returns the names of layers, by the names of their kernels in an ONNX graph.

    Exporters name nodes and constants differently, some not after layers. So kernels are found by their values.
    """
    known = [
        (layer.name, np.sort(_numpy(weight), None))
        for layer in net.layers
        for weight in layer.weights
        if len(weight.shape) in (2, 4)
    ]
    found: dict[str, str] = {}
    for node in graph.node:
        name = node.input[1] if node.op_type in _MULTIPLYING else ""
        if name not in constants or name in found or constants[name].ndim not in (2, 4):
            continue
        values = np.sort(constants[name], None)
        place = next((place for place, (_, kernel) in enumerate(known) if _same(kernel, values)), None)
        if place is not None:
            found[name] = known.pop(place)[0]
    return found


def _same(kernel: np.ndarray, values: np.ndarray) -> bool:
    return kernel.shape == values.shape and np.allclose(kernel, values, rtol=1e-4, atol=1e-7)


def _float_nodes(graph, layers: dict[str, str], pattern: str) -> set[str]:
    """Returns the names of nodes that stay in float: those of float layers, all that only these need, and softmax."""
    quantized: set[str] = set()  # tensors that depend on a quantized layer
    left = set()
    for node in graph.node:
        named = any(re.search(rf"(^|/)({pattern})", name) for name in (node.name, *node.output))
        multiplies = node.op_type in _MULTIPLYING
        if multiplies:  # a kernel that is mixed from experts is none of a layer
            named = node.input[1] not in layers or bool(re.match(pattern, layers[node.input[1]]))
        depends = bool(quantized.intersection(node.input)) or (multiplies and not named)
        if depends:
            quantized.update(node.output)
        if named or not depends or node.op_type == "Softmax":
            left.add(node.name)
    return left


def _ranges(graph, constants: dict[str, np.ndarray], left: set[str]) -> dict[str, list[dict]]:
    """Returns the range of each output of the quantized kernels, as ONNX Runtime's quantizer takes them."""
    from onnxruntime.quantization import QuantType

    found: dict[str, list[dict]] = {}
    for node in graph.node:
        if node.op_type not in _MULTIPLYING or node.name in left:
            continue
        kernel = constants[node.input[1]]
        attributes = {each.name: each.i for each in node.attribute}
        if kernel.ndim == 4:
            axis, ordered = 0, kernel.transpose(2, 3, 1, 0)
        else:
            axis, ordered = (0, kernel.T[None, None]) if attributes.get("transB") else (1, kernel[None, None])
        single = attributes.get("group", 1) > 1 and kernel.shape[1] == 1
        tops = np.maximum(peaks(ordered, pairs=not single), 1e-12).astype("float32")
        common = {"quant_type": QuantType.QInt8, "axis": axis}
        found[node.input[1]] = [common | {"rmin": -top, "rmax": top} for top in tops]
    return found


class LiteRT:
    """Quantizes with TensorFlow's converter, except for the layers that stay in float.

    Args:
        converter: Function from a model to a `tf.lite.TFLiteConverter`.
        images: Array of calibration images.

    Call arguments:
        net: A folded model.
        pattern: Regular expression of the names of the float layers.

    Returns:
        Bytes, the content of the file.
    """

    def __init__(self, converter: Callable[[keras.Model], Any], images: np.ndarray):
        self._converter, self._images = converter, images
        # Of each layer if all are in 8 bits, relative to the root mean square of its outputs.
        self.errors: dict[str, float] = {}

    def __call__(self, net: keras.Model, pattern: str) -> bytes:
        import tensorflow as tf

        lite = tf.lite.experimental
        converter = self._converter(net)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in self._images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
        debugger = lite.QuantizationDebugger(
            converter=converter,
            debug_dataset=lambda: ([image[None]] for image in self._images[:4]),
            debug_options=lite.QuantizationDebugOptions(layer_direct_compare_metrics={"relative": _relative}),
        )
        debugger.run()
        told = io.StringIO()
        debugger.layer_statistics_dump(told)
        rows = list(csv.DictReader(io.StringIO(told.getvalue())))
        names = [row["tensor_name"] for row in rows]
        # The softmax stays in float: most probabilities of 1,000 classes are below the first of 256 steps.
        debugger.options = lite.QuantizationDebugOptions(
            denylisted_nodes=[name for name in names if re.search(rf"(^|/)({pattern})", name)],
            denylisted_ops=["SOFTMAX"],
        )
        self.errors = self.errors or {_layer(row["tensor_name"]): float(row["relative"]) for row in rows}
        return debugger.get_nondebug_quantized_model()


def _layer(tensor: str) -> str:
    """Returns the layer of a tensor: the last part but one of its first name, without the number of the call."""
    parts = tensor.split(";")[0].split("/")
    return re.sub(r"_\d+$", "", parts[-2] if len(parts) > 1 else parts[0])


def _relative(expected, found, scale, zero) -> float:
    error = expected - (found.astype("float32") - zero) * scale
    return float(np.sqrt(np.mean(error**2) / max(np.mean(expected**2), 1e-20)))

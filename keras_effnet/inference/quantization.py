"""Quantizes to 8 bits: chooses the layers that stay in float, and corrects the biases for the rounding of kernels."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

# Layers that stay in float, in increasing order: the image, whose pixels need not be whole numbers, and the first
# stages, whose few channels differ widely in range. They cause most of the disagreement of Lite0 with its float model
# (26 % of 504 crops), and hold a hundredth of its weights (benchmarks/inference.py --agreement).
# The shares of global context are about one over the number of pixels: too small for one scale of 8 bits.
_IMAGE = r"image_|preprocessing|rescaling|normalization|stem_|block\w+_se_(?:share|flat|context|norm)"

FLOAT = (_IMAGE, rf"{_IMAGE}|block1", rf"{_IMAGE}|block[12]", rf"{_IMAGE}|block[123]")

COSINE = 0.999  # of the logits of the calibration images; a lower one shows in similar classes

_MEASURED = 64  # images to average activations over


def candidates(net: keras.Model, images: np.ndarray, levels: int = 127) -> Iterator[tuple[str, keras.Model]]:
    """Yields versions of a model to quantize, each with more layers in float than the one before.

    Args:
        net: A folded model. Its biases are changed in place.
        images: Array of images to measure the activations with.
        levels: Integer. The largest magnitude of a quantized weight. Defaults to 127.

    Yields:
        Pairs of a regular expression, which matches the names of the float layers, and the model.
    """
    layers = [layer for layer in net.layers if _takes(layer)]
    whole = {layer.name: _numpy(layer.bias) for layer in layers}
    shifts = dict(_shifts(net, layers, images[:_MEASURED], levels))
    for pattern in FLOAT:
        for layer in layers:
            left = re.match(pattern, layer.name)
            layer.bias.assign(whole[layer.name] - (0 if left else shifts[layer.name]))
        yield pattern, net


def _takes(layer) -> bool:
    return isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D) and layer.use_bias


def _numpy(value) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value))


def _shifts(net, layers, images: np.ndarray, levels: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields, for each layer, the mean shift of its outputs by the rounding of its kernel.

    Reference:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, section
        4.2, with measured means.
    """
    axes = {layer.name: (0, 1, 2) if layer.data_format == "channels_last" else (0, 2, 3) for layer in layers}
    if not layers:
        return
    means = keras.Model(net.inputs, {layer.name: keras.ops.mean(layer.input, axes[layer.name]) for layer in layers})
    sums: dict[str, Any] = {}
    for image in images:
        for name, value in means.predict_on_batch(image[None]).items():
            sums[name] = sums.get(name, 0.0) + _numpy(value).astype("float64")
    for layer in layers:
        kernel = _numpy(layer.kernel).astype("float64")
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        scale = np.maximum(np.abs(kernel).max((0, 1) if depthwise else (0, 1, 2), keepdims=True), 1e-12) / levels
        error = np.rint(kernel / scale) * scale - kernel
        if depthwise:
            shift = (error * (sums[layer.name] / len(images))[:, None]).sum((0, 1)).reshape(-1)
        else:
            arriving = (sums[layer.name] / len(images)).reshape(layer.groups, -1)
            parts = np.split(error.sum((0, 1)), layer.groups, axis=1)
            shift = np.concatenate([row @ part for row, part in zip(arriving, parts, strict=True)])
        yield layer.name, shift


def best(
    net: keras.Model,
    images: np.ndarray,
    quantise: Callable[[keras.Model, str], Any],
    run: Callable[[Any], Callable[[np.ndarray], np.ndarray]],
    cosine: Callable[[np.ndarray, np.ndarray], float],
    levels: int = 127,
) -> tuple[Any, str]:
    """Quantizes a model with as few float layers as needed to keep the logits.

    Tries the versions of `candidates()` until the cosine of the logits reaches `COSINE`, and returns the best. Models
    without known layer names or with other outputs get the first version.

    Args:
        net: A folded model.
        images: Array of calibration images.
        quantise: Function that quantizes a model, given the regular expression of its float layers.
        run: Function from a result of `quantise` to a function from images to outputs.
        cosine: Function of the outputs of the float and of the quantized model.
        levels: See `candidates()`.

    Returns:
        Tuple of the result of `quantise`, and the regular expression.
    """
    tried: list[tuple[float, Any, str]] = []
    expected = _numpy(keras.tree.flatten(net.predict_on_batch(images[:1]))[0])
    if expected.ndim == 2 and len(net.outputs) == 1:
        expected = np.concatenate([_numpy(net.predict_on_batch(image[None])) for image in images])
    known = any(re.match(FLOAT[-1], layer.name) for layer in net.layers)
    for pattern, version in candidates(net, images, levels):
        made = quantise(version, pattern)
        if expected.ndim != 2 or len(net.outputs) > 1 or not known:
            return made, pattern
        tried.append((cosine(expected, run(made)(images)), made, pattern))
        if tried[-1][0] >= COSINE:
            break
    return max(tried, key=lambda each: each[0])[1:]


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

"""Writes SavedModel, ONNX, LiteRT and OpenVINO files, with metadata inside."""

import json
import os
import re
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet import compat, model_metadata
from keras_effnet.inference import quantization
from keras_effnet.inference.export_check import agreement, runner_of
from keras_effnet.inference.folding import for_inference

_PRINTING = threading.RLock()  # all threads share standard output


@contextmanager
def quietly() -> Iterator[None]:
    """Suppresses what converters print and warn, and the bytecode of modules. Errors are raised as usual.

    AutoGraph imports modules that it writes into the temporary folder: their bytecode would stay there.

    Returns:
        Context manager.
    """
    with _PRINTING, warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            yield
        finally:
            sys.dont_write_bytecode = before


def _need(*modules: str) -> None:
    missing = [name for name in modules if not find_spec(name)]
    if missing:
        raise ImportError(
            f"Expected {', '.join(modules)} for this export. Received: no {', '.join(missing)}. "
            "Run: pip install 'keras_effnet[export]'"
        )


# Writers: each saves a model to a path, and returns what the report of `export()` says beyond the difference.


def _savedmodel(model, path: Path, shape, precision, photographs) -> dict[str, Any]:
    for_inference(model, shape).export(path, format="tf_saved_model", verbose=False)
    return {}


_ONNX_WRITERS = {"tensorflow": "tf2onnx", "jax": "jax2onnx", "torch": "onnxscript"}


def _onnx(model, path: Path, shape, precision: str, photographs, fused: bool = False) -> dict[str, Any]:
    _need("onnx", "onnxruntime", _ONNX_WRITERS[_backend()])
    import onnx

    def write(net, path: Path) -> None:
        if _backend() == "torch":  # there, Keras exports only models that have been called
            net(keras.ops.zeros((1, *shape)))
        net.export(str(path), format="onnx", verbose=False)

    net = for_inference(model, shape)
    if precision == "int8":
        quantise = quantization.Onnx(write, path, photographs, fused)
        left = _best(net, path, "onnx", photographs, quantise, pairs=True)["float_layers"]
        whole = {layer.name for layer in net.layers if layer.weights} - quantise.known
        return {"float_layers": [layer.name for layer in net.layers if layer.name in whole.union(left)]}
    write(net, path)
    if precision == "float16":
        onnx.save(_halved(onnx.load(path)), path)
    return {}


def _best(net, path: Path, kind: str, photographs: np.ndarray, quantise, pairs: bool = False) -> dict[str, Any]:
    """Saves the best of the quantized versions, see `quantization.best()`. Returns its float layers."""

    def run(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
        path.write_bytes(content)
        runner = runner_of(path, kind)
        parts = range(0, len(photographs), 8)  # maps of all classes, which are not looked at, are large
        return lambda images: np.concatenate([runner(images[start : start + 8])[0] for start in parts])

    content, pattern = quantization.best(
        net,
        photographs,
        quantise,
        run,
        lambda expected, found: agreement(expected, found)["cosine"],
        pairs,
    )
    path.write_bytes(content)
    left = [layer.name for layer in net.layers if layer.weights and re.match(pattern, layer.name)]
    return {"float_layers": left}


def _halved(graph):
    """Stores the large constants of an ONNX graph in float16. The runtime casts them when it loads the file."""
    import onnx
    from onnx import helper, numpy_helper

    casts = []
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 128:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return graph


def _litert(model, path: Path, shape, precision: str, photographs) -> dict[str, Any]:
    if _backend() != "tensorflow":
        raise ValueError(
            f"Expected KERAS_BACKEND=tensorflow for LiteRT. Received: KERAS_BACKEND={_backend()}. "
            "Nearest: onnx; or save the model and export it on TensorFlow"
        )
    _need("ai_edge_litert")
    import tensorflow as tf

    def converter(net):
        traced = tf.function(
            lambda image: net(image, training=False),
            input_signature=[tf.TensorSpec((1, *shape), tf.float32, "image")],
            autograph=False,
        )
        return tf.lite.TFLiteConverter.from_concrete_functions([compat.frozen(traced.get_concrete_function())])

    net = for_inference(model, shape, 1)
    if precision == "int8":
        quantise = quantization.LiteRT(converter, photographs)
        found = _best(net, path, "litert", photographs, quantise)
        worst = sorted(quantise.errors, key=lambda name: -quantise.errors[name])
        return found | {"layer_errors": {name: quantise.errors[name] for name in worst}}
    whole = converter(net)
    if precision == "float16":
        whole.optimizations = [tf.lite.Optimize.DEFAULT]
        whole.target_spec.supported_types = [tf.float16]
    path.write_bytes(whole.convert())
    return {}


def _openvino(model, path: Path, shape, precision: str, photographs) -> dict[str, Any]:
    _need("openvino")
    openvino = compat.load_openvino()
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        found = _onnx(model, graph, shape, "int8" if precision == "int8" else "float32", photographs, fused=True)
        net = openvino.Core().read_model(graph)  # convert_model() would send telemetry
        openvino.save_model(net, path, compress_to_fp16=precision == "float16")
    return found


WRITERS = {"savedmodel": _savedmodel, "onnx": _onnx, "litert": _litert, "openvino": _openvino}


def _backend() -> str:
    return keras.backend.backend()


# Metadata, in the place that each format has for it


def _add_to_savedmodel(path: Path, metadata: dict[str, Any]) -> None:
    extra = path / "assets.extra"
    extra.mkdir(exist_ok=True)
    (extra / model_metadata.MEMBER).write_text(json.dumps(metadata))


def _add_to_onnx(path: Path, metadata: dict[str, Any]) -> None:
    import onnx

    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {"keras_effnet": json.dumps(metadata)})
    onnx.save(graph, path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # weights from the JAX exporter, now inside the file


def _add_to_litert(path: Path, metadata: dict[str, Any]) -> None:
    """Appends a zip archive to the model, as the metadata library of the format does."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(model_metadata.MEMBER, json.dumps(metadata))
        if metadata["labels"]:
            archive.writestr("labels.txt", "\n".join(metadata["labels"]) + "\n")


def _add_to_openvino(path: Path, metadata: dict[str, Any]) -> None:
    openvino = compat.load_openvino()
    net = openvino.Core().read_model(path)
    net.set_rt_info(json.dumps(metadata), ["keras_effnet"])
    again = path.with_name(f"again-{path.name}")
    openvino.save_model(net, again, compress_to_fp16=False)
    del net
    os.replace(again, path)
    os.replace(again.with_suffix(".bin"), path.with_suffix(".bin"))


ADD_METADATA = {
    "savedmodel": _add_to_savedmodel,
    "onnx": _add_to_onnx,
    "litert": _add_to_litert,
    "openvino": _add_to_openvino,
}

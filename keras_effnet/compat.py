"""Every use of private API of other libraries, with its reason. tests/test_compat.py checks each of them."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

# Prefixes of the modules that export to ONNX and LiteRT.
_CONVERTERS = ("keras.src.export.onnx", "keras.src.export.litert", "tf2onnx.", "tensorflow.lite.")


def producer(tensor) -> Any:
    """Returns the operation that computes a Keras tensor.

    Keras has no public way from a tensor back to its graph.

    Args:
        tensor: A Keras tensor.

    Returns:
        A `keras.Operation`, often a layer.
    """
    return tensor._keras_history.operation


def inputs_of(tensor) -> list[Any]:
    """Returns the inputs of the call that computed a Keras tensor.

    The public `operation.input` returns the inputs of the operation's first call only.

    Args:
        tensor: A Keras tensor.

    Returns:
        List of Keras tensors.
    """
    operation, call, _ = tensor._keras_history
    return list(operation._inbound_nodes[call].input_tensors)


def first_outputs(operation) -> list[Any]:
    """Returns the outputs of an operation's first call.

    For a model, the public `operation.output` returns the outputs of its own graph instead.

    Args:
        operation: A `keras.Operation` that was called at least once.

    Returns:
        List of Keras tensors.
    """
    return list(operation._inbound_nodes[0].output_tensors)


def neighbors(operation) -> Iterator[Any]:
    """Yields the operations directly before and after an operation, in every graph that contains it.

    No public API finds the layers around a tensor that is not part of a model yet.

    Args:
        operation: A `keras.Operation`.

    Returns:
        Iterator of operations.
    """
    for node in operation._inbound_nodes:
        yield from (parent.operation for parent in node.parent_nodes)
    yield from (node.operation for node in operation._outbound_nodes)


def is_functional(layer) -> bool:
    """Returns whether a layer is a functional model.

    Keras has no public name for the class of functional models.

    Args:
        layer: A layer.

    Returns:
        Boolean.
    """
    return hasattr(layer, "_run_through_graph")


def run_graph(model, inputs, call: Callable) -> Any:
    """Runs the graph of a functional model, with a custom function in place of each layer's call.

    The public `keras.models.clone_model(call_function=)` does this only for Keras tensors and new layers.

    Args:
        model: A functional model.
        inputs: Values to use as the model's inputs, in the same structure.
        call: Function of an operation and its arguments, which returns the operation's outputs.

    Returns:
        The values of the model's outputs, in their structure.
    """
    return model._run_through_graph(inputs, call_fn=call)


def mark_called(model) -> None:
    """Marks a model as called, so that Keras exports it.

    Keras' ONNX exporter refuses a model that was built but never called. The layers of a functional model were called
    when it was built.

    Args:
        model: A `keras.Model`.
    """
    model._called = True


def all_layers(model) -> list[Any]:
    """Returns a model and all layers in it, at any depth.

    The public `model.layers` omits layers nested inside other layers.

    Args:
        model: A `keras.Model`.

    Returns:
        List of layers.
    """
    return list(model._flatten_layers())


def own_trainable(layer) -> bool:
    """Returns a layer's own `trainable` flag, regardless of the layers in it.

    Args:
        layer: A layer.

    Returns:
        Boolean.
    """
    return layer._trainable


def set_own_trainable(layer, value: bool) -> None:
    """Sets a layer's own `trainable` flag.

    The public setter also sets the flag of all layers inside.

    Args:
        layer: A layer.
        value: Boolean.
    """
    layer._trainable = value


def variable_index(optimizer, variable) -> int:
    """Returns the index of a variable among the variables that an optimizer trains.

    Keras passes `update_step()` the variable, but not its index.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
        variable: A `keras.Variable`.

    Returns:
        Integer.
    """
    return optimizer._get_variable_index(variable)


def in_xla() -> bool:
    """Returns whether TensorFlow traces the current call for XLA.

    TensorFlow's own control flow uses the same check.

    Returns:
        Boolean.
    """
    import tensorflow as tf
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def in_converter() -> bool:
    """Returns whether an exporter to ONNX or LiteRT traces the current call.

    To TensorFlow, this trace looks like that of `predict()`. Only the call stack shows the exporter.

    Returns:
        Boolean.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_CONVERTERS):
            return True
        frame = frame.f_back
    return False


def frozen(concrete_function) -> Any:
    """Returns a TensorFlow function with its variables turned into constants.

    The quantizing LiteRT converter cannot read variables. The public way, through a SavedModel, takes three times as
    long.

    Args:
        concrete_function: A concrete function of TensorFlow.

    Returns:
        A concrete function of TensorFlow.
    """
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(concrete_function)


def sees_gpu() -> bool:
    """Returns whether Keras' backend sees an NVIDIA GPU.

    Returns:
        Boolean.
    """
    import keras

    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return bool(tf.config.list_physical_devices("GPU"))
        case "jax":
            import jax

            try:
                return jax.default_backend() == "gpu"
            except RuntimeError:  # without a driver
                return False
        case "torch":
            import torch

            return torch.cuda.is_available()
    return False


def watch_hosts(seconds: int) -> None:
    """Sets how often TensorFlow's hosts ask whether the others are still there, and how long they wait for an answer.

    By default, a host asks every 30 seconds, and waits three times 10 for an answer. So a lost host may be noticed
    after a minute, and no public API changes that. Call it before the strategy is made, whose thread asks.

    Args:
        seconds: Integer, for both.
    """
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    for name in ("_check_health_interval", "_check_health_timeout"):
        getattr(CollectiveAllReduceExtended, name)  # raises if TensorFlow has renamed it
        setattr(CollectiveAllReduceExtended, name, seconds)


def load_openvino():
    """Imports OpenVINO without its telemetry.

    For telemetry, it forks this process from a separate thread. TensorFlow and JAX have threads that do not survive a
    fork.

    Returns:
        The module.
    """
    reports = "openvino_telemetry"
    if "openvino" in sys.modules or reports in sys.modules:
        return import_module("openvino")
    sys.modules[reports] = None  # type: ignore[assignment]
    try:
        return import_module("openvino")
    finally:
        del sys.modules[reports]

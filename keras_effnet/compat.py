"""Private API of Keras and TensorFlow: every use is here, with its reason. tests/test_compat.py checks each of them.

Nothing else in this package reads a name that begins with an underscore of another library.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

# Exporters to ONNX and LiteRT, by the start of the names of their modules.
_CONVERTERS = ("keras.src.export.onnx", "keras.src.export.litert", "tf2onnx.", "tensorflow.lite.")


def producer(tensor) -> Any:
    """The operation that computes a Keras tensor. Keras has no public way from a tensor back to its graph.

    Args:
        tensor: A Keras tensor.

    Returns:
        A `keras.Operation`, often a layer.
    """
    return tensor._keras_history.operation


def inputs_of(tensor) -> list[Any]:
    """The Keras tensors that the operation behind a tensor was called with, in the call that gave this tensor.

    `operation.input` raises where an operation was called more than once.

    Args:
        tensor: A Keras tensor.

    Returns:
        List of Keras tensors.
    """
    operation, call, _ = tensor._keras_history
    return list(operation._inbound_nodes[call].input_tensors)


def first_outputs(operation) -> list[Any]:
    """What an operation gave in its first call. `operation.output` raises where it was called more than once.

    Args:
        operation: A `keras.Operation` that was called.

    Returns:
        List of Keras tensors.
    """
    return list(operation._inbound_nodes[0].output_tensors)


def neighbors(operation) -> Iterator[Any]:
    """The operations just before and just after one in the graphs that it belongs to.

    The layers around a tensor that belongs to no model yet are known to no public API.

    Args:
        operation: A `keras.Operation`.

    Returns:
        Iterator of operations.
    """
    for node in operation._inbound_nodes:
        yield from (parent.operation for parent in node.parent_nodes)
    yield from (node.operation for node in operation._outbound_nodes)


def is_functional(layer) -> bool:
    """Whether a layer is a functional model. `keras.Functional` is no public name.

    Args:
        layer: A layer.

    Returns:
        Boolean.
    """
    return hasattr(layer, "_run_through_graph")


def run_graph(model, inputs, call: Callable) -> Any:
    """Goes through the graph of a functional model with a call of our own in place of each layer's.

    `keras.models.clone_model(call_function=)` does the same, but only with Keras tensors and new layers.

    Args:
        model: A functional model.
        inputs: What takes the place of the model's inputs, in their structure.
        call: Function of an operation and its arguments.

    Returns:
        What takes the place of the model's outputs.
    """
    return model._run_through_graph(inputs, call_fn=call)


def mark_called(model) -> None:
    """Lets Keras export a model that was built but never called.

    Keras' exporter to ONNX refuses such models. The layers of a functional model were called when it was built.

    Args:
        model: A `keras.Model`.
    """
    model._called = True


def all_layers(model) -> list[Any]:
    """A model and all layers in it, at any depth. `model.layers` leaves out those inside of layers.

    Args:
        model: A `keras.Model`.

    Returns:
        List of layers.
    """
    return list(model._flatten_layers())


def own_trainable(layer) -> bool:
    """Whether a layer itself is trainable, whatever the layers in it are.

    Args:
        layer: A layer.

    Returns:
        Boolean.
    """
    return layer._trainable


def set_own_trainable(layer, value: bool) -> None:
    """Sets what `own_trainable()` returns. The public setter would set it for all layers inside as well.

    Args:
        layer: A layer.
        value: Boolean.
    """
    layer._trainable = value


def variable_index(optimizer, variable) -> int:
    """The place of a variable among those of an optimizer, which `update_step()` is not told.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
        variable: A `keras.Variable`.

    Returns:
        Integer.
    """
    return optimizer._get_variable_index(variable)


def in_xla() -> bool:
    """Whether TensorFlow traces the current call for XLA. TensorFlow's own control flow asks in the same way.

    Returns:
        Boolean.
    """
    import tensorflow as tf
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def in_converter() -> bool:
    """Whether an exporter to ONNX or LiteRT traces the current call.

    To TensorFlow, the trace looks like that of `predict()`: only the call stack shows the exporter.

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
    """A TensorFlow function with its variables as constants.

    The quantizing converter to LiteRT cannot read variables, and the public way over a SavedModel takes three times
    as long.

    Args:
        concrete_function: A concrete function of TensorFlow.

    Returns:
        A concrete function of TensorFlow.
    """
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(concrete_function)

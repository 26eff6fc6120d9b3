"""Which operations of TensorFlow between the layers of a Keras 2 model have a layer of Keras 3, such as `x / 255`."""

from typing import Any

from keras_effnet.weights.keras2.layers import Foreign, ForeignLayerError

# With a number: the scale and offset of a Rescaling. The number comes second; in `1 - x`, first.
_WITH_NUMBER = {
    "math.truediv": lambda number: (1 / number, 0.0),
    "math.divide": lambda number: (1 / number, 0.0),
    "math.multiply": lambda number: (number, 0.0),
    "math.subtract": lambda number: (1.0, -number),
    "math.add": lambda number: (1.0, number),
    "__operators__.add": lambda number: (1.0, number),
}
_NUMBER_FIRST = _WITH_NUMBER | {"math.subtract": lambda number: (-1.0, number)}
_NOT_FIRST = ("math.truediv", "math.divide")

# Of two tensors.
_OF_TWO = {
    "math.multiply": "Multiply",
    "math.add": "Add",
    "__operators__.add": "Add",
    "math.subtract": "Subtract",
}

_ACTIVATIONS = {
    "math.sigmoid": "sigmoid",
    "math.tanh": "tanh",
    "nn.relu": "relu",
    "nn.relu6": "relu6",
    "nn.sigmoid": "sigmoid",
    "nn.silu": "silu",
    "nn.softmax": "softmax",
    "nn.swish": "silu",
    "nn.tanh": "tanh",
}

_FUNCTIONS = {"math.reduce_mean", "cast"} | _WITH_NUMBER.keys() | _ACTIVATIONS.keys()


def layer_of(config: dict[str, Any], operands: list[Any], settings: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Returns the layer of Keras 3 that computes an operation.

    Args:
        config: Dict. The config of a `TFOpLambda`, with the name of the function.
        operands: List of tensors, numbers, and lists of numbers.
        settings: Dict of other arguments.

    Returns:
        Tuple of the layer's class, its config, and its inputs.

    Raises:
        ForeignLayerError: If no layer of Keras 3 computes it.
    """
    function, name = str(config.get("function")), str(config.get("name"))
    tensors = [each for each in operands if hasattr(each, "shape")]
    found: tuple[str, dict[str, Any], Any] | None = None
    if function in _FUNCTIONS and tensors:
        found = _layer_of(function, operands, tensors, settings)
    if found is None:
        raise no_layer(config, settings)
    class_name, more, inputs = found
    # An operation computes in the type of its inputs, whatever type its layer has in Keras 2.
    return class_name, {"name": name.replace(".", "_"), "dtype": str(tensors[0].dtype)} | more, inputs


def no_layer(config: dict[str, Any], settings: dict[str, Any]) -> ForeignLayerError:
    """Returns the error for an operation that no layer of Keras 3 computes.

    Args:
        config: See `layer_of()`.
        settings: See `layer_of()`.
    """
    arguments = ", ".join(f"{key}={str(value)[:20]}" for key, value in settings.items())
    function, name = str(config.get("function")), str(config.get("name"))
    reason = f"no layer of Keras 3 is tf.{function[:40]}({arguments[:60]}) of these inputs"
    return ForeignLayerError(Foreign(name[:80], reason))


def _layer_of(
    function: str, operands: list[Any], tensors: list[Any], settings: dict[str, Any]
) -> tuple[str, dict[str, Any], Any] | None:
    first = tensors[0]
    if len(tensors) == 2:
        same = settings == {} and len(operands) == 2 and len(tensors[1].shape) == len(first.shape)
        return (_OF_TWO[function], {}, tensors) if function in _OF_TWO and same else None
    if function == "math.reduce_mean":
        axis, keepdims = settings.pop("axis", None), settings.pop("keepdims", False)
        pools = len(first.shape) == 4 and axis in ([1, 2], [2, 1]) and not settings and len(operands) == 1
        pools = pools and type(keepdims) is bool and "float" in str(first.dtype)
        more = {"keepdims": keepdims is True, "data_format": "channels_last"}
        return ("GlobalAveragePooling2D", more, first) if pools else None
    if function in _ACTIVATIONS:
        plain = settings in ({}, {"axis": -1}) and len(operands) == 1
        return ("Activation", {"activation": _ACTIVATIONS[function]}, first) if plain else None
    if function == "cast":
        same = settings == {"dtype": str(first.dtype)} and len(operands) == 1
        return ("Activation", {"activation": "linear"}, first) if same else None
    number: Any = next((each for each in operands if not hasattr(each, "shape")), None)
    ahead = operands[0] is not first
    if settings or type(number) not in (int, float) or "float" not in str(first.dtype):
        return None
    if (function in _NOT_FIRST and (ahead or number == 0)) or abs(number) > 1e30:
        return None
    scale, offset = (_NUMBER_FIRST if ahead else _WITH_NUMBER)[function](float(number))
    return "Rescaling", {"scale": scale, "offset": offset}, first

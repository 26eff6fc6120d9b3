"""Builds the model of Keras 3 that computes what a model of Keras 2 did, from its config and its variables."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_effnet.weights.formats.tensors import Stored
from keras_effnet.weights.keras2.layers import MERGING, MODELS, Foreign, ForeignLayerError, dtype_of, make
from keras_effnet.weights.keras2.operations import layer_of, no_layer

if TYPE_CHECKING:
    import keras

DEPTH = 20  # of models in models

_LAYERS = 20_000

_NUMBERS = 1 << 30  # of all variables: L2, the largest net, has 0.48e9

_CONSTANT = "_CONSTANT_VALUE"  # Keras 2's name for an operand that is no layer's output

OPERATION = "TFOpLambda"  # the class of an operation of TensorFlow between layers

_PASSES = 2_000  # over the layers of a model, most of which are in order


class Place(NamedTuple):
    """A layer's place in its model.

    Args:
        number: Integer. The number among the model's layers, without the input layer of a sequential model.
        name: String. The layer's name.
        class_name: String. The layer's class.
    """

    number: int
    name: str
    class_name: str


Path = tuple[Place, ...]  # from the outermost model to a layer

Find = Callable[[Path], dict[str, Stored]]  # the variables of a layer by their names


def rebuild(class_name: str, config: Any, find: Find) -> tuple["keras.Model", int]:
    """Builds a model of Keras 3 with the variables of one of Keras 2.

    Args:
        class_name: `"Functional"`, `"Model"` or `"Sequential"`.
        config: Dict. The model's config.
        find: Function that returns the variables of the layer at a `Path`, as dict from their names to `Stored`.

    Returns:
        Tuple of the model, and the number of variables that it took.

    Raises:
        ForeignLayerError: If Keras 3 cannot rebuild a layer.
        ValueError: If the config is damaged, or does not fit the variables.
    """
    if class_name not in MODELS:
        raise ForeignLayerError(Foreign("the model", f"no class of Keras 3 is a {class_name[:80]}"))
    builder = _Builder(find)
    try:
        return builder.model(class_name, config, ()), len(builder.taken)
    except ForeignLayerError:
        raise
    except Exception as error:  # whatever Keras raises for a description that is none
        raise ValueError(f"its description of the model is damaged ({' '.join(str(error).split())[:200]})") from error


def entries_of(class_name: str, config: Any) -> list[dict[str, Any]]:
    """Returns the descriptions of a model's layers, without the input layer of a sequential model.

    Args:
        class_name: `"Functional"`, `"Model"` or `"Sequential"`.
        config: Dict. The model's config, a list of layers in the first releases.
    """
    entries = list(config.get("layers", ()) if isinstance(config, dict) else config)
    has_input = class_name == "Sequential" and entries and entries[0]["class_name"] == "InputLayer"
    return entries[1:] if has_input else entries


def called(entry: dict[str, Any]) -> str:
    """Returns the name of a layer.

    Args:
        entry: Dict. Its description.
    """
    return str(entry.get("name") or entry["config"]["name"])


class _Builder:
    def __init__(self, find: Find):
        self.find = find
        self.count = 0
        self.numbers = 0
        self.taken: dict[int, Stored] = {}

    def model(self, class_name: str, config: dict[str, Any], path: Path) -> "keras.Model":
        if len(path) > DEPTH:
            raise ValueError(f"models in models, {DEPTH} deep")
        if isinstance(config, dict) and "layers" not in config:  # a class of the user's, which happens to be called so
            name = path[-1].name[:80] if path else "the model"
            raise ForeignLayerError(Foreign(name, f"its {class_name} is a class with layers as attributes"))
        if class_name == "Sequential":
            return self._sequential(config, path)
        return self._functional(config, path)

    def _places(self, entries: list[dict[str, Any]], path: Path) -> list[Path]:
        self.count += len(entries)
        if self.count > _LAYERS:
            raise ValueError(f"more than {_LAYERS} layers")
        places = []
        for index, entry in enumerate(entries):
            places.append((*path, Place(index, called(entry), str(entry["class_name"]))))
        return places

    def _layer(self, entry: dict[str, Any], path: Path) -> Any:
        class_name, config = str(entry["class_name"]), dict(entry["config"])
        if class_name in MODELS:
            made = self.model(class_name, config, path)
            if not config.get("trainable", True):  # True would thaw frozen layers in it
                made.trainable = False
            return made
        return make(class_name, config)

    def _call(self, layer: Any, inputs: Any, path: Path, **arguments: Any) -> Any:
        """Calls a layer on symbolic tensors, after a look at what its variables would take."""
        import keras

        from keras_effnet.nets import initializers

        if isinstance(layer, keras.Model) or layer.built:
            return layer(inputs, **arguments)
        # The state of a generator of random numbers does not matter.
        stored = {} if type(layer).__name__.startswith("Random") else self.find(path)
        _check_size(layer, inputs, stored)
        self.numbers += sum(int(np.prod(each.shape)) for each in stored.values())
        if self.numbers > _NUMBERS:
            raise ValueError(f"more than {_NUMBERS} numbers")
        _check_meaning(layer, inputs)
        outputs = initializers.apply(layer, inputs, empty=True, **arguments)
        _assign(layer, stored)
        self.taken |= {id(each): each for each in stored.values()}
        return outputs

    def _sequential(self, config: Any, path: Path) -> "keras.Model":
        import keras

        settings = config if isinstance(config, dict) else {"layers": config}
        shape = settings.get("build_input_shape")
        start = settings["layers"][0]
        first = start["config"]
        dtype = None
        if start["class_name"] == "InputLayer":
            shape, dtype = _shape_of(first), dtype_of(first)
        elif start["class_name"] not in MODELS:
            shape = first.get("batch_input_shape") or shape
        shape = None if shape is None else _shape_of({"batch_input_shape": shape})
        entries = entries_of("Sequential", config)
        places = self._places(entries, path)
        layers = [self._layer(entry, place) for entry, place in zip(entries, places, strict=True)]
        if shape is None and isinstance(layers[0], keras.Model):
            shape = layers[0].input_shape
        if shape is None:
            raise ValueError("a sequential model that was never called on inputs")
        entrance = keras.Input(batch_shape=tuple(shape), dtype=dtype)
        tensor = entrance
        for layer, place in zip(layers, places, strict=True):
            tensor = self._call(layer, tensor, place)
        return keras.Sequential([entrance, *layers], name=_without_slashes(settings.get("name")))

    def _functional(self, config: dict[str, Any], path: Path) -> "keras.Model":
        import keras

        entries = entries_of("Functional", config)
        places = self._places(entries, path)
        outputs: dict[str, dict[int, list[Any]]] = {}
        configs = {place[-1].name: entry["config"] for entry, place in zip(entries, places, strict=True)}
        waiting: list[tuple[Any, Path, int, Any]] = []
        first = _first_numbers(config)
        for entry, place in zip(entries, places, strict=True):
            name = place[-1].name
            if name in outputs:
                raise ValueError(f"two layers are called {name[:80]!r}")
            outputs[name] = {}
            if entry["class_name"] == "InputLayer":
                one = entry["config"]
                tensor = keras.Input(batch_shape=_shape_of(one), dtype=dtype_of(one), name=_without_slashes(name))
                outputs[name][0] = [tensor]
                continue
            layer = None if entry["class_name"] == OPERATION else self._layer(entry, place)
            start = first.get(name, 1 if isinstance(layer, keras.Model) and _has_input(entry) else 0)
            waiting += [(layer, place, start + number, node) for number, node in enumerate(entry["inbound_nodes"])]
        for _ in range(_PASSES):
            left = []
            for layer, place, number, node in waiting:
                if layer is None:
                    ready, given, arguments = _operands(node, outputs, place, configs[place[-1].name])
                else:
                    ready, given, arguments = _inputs(node, outputs, place)
                if not ready:
                    left.append((layer, place, number, node))
                    continue
                if layer is None:
                    kind, settings, given = layer_of(configs[place[-1].name], given, arguments)
                    layer, arguments = make(kind, settings), {}
                if isinstance(given, list) and len(given) == 1 and place[-1].class_name not in MERGING:
                    given = given[0]
                found = self._call(layer, given, place, **arguments)
                outputs[place[-1].name][number] = list(found) if isinstance(found, list | tuple) else [found]
            if left and len(left) == len(waiting):
                raise ValueError("its layers wait for each other")
            waiting = left
            if not waiting:
                break

        def tensors(key: str) -> Any:
            found = _mapped(config[key], lambda name, number, index, *_: outputs[name][number][index])
            return found[0] if isinstance(found, list) and len(found) == 1 else found

        return keras.Model(tensors("input_layers"), tensors("output_layers"), name=_without_slashes(config.get("name")))


def _without_slashes(name: Any) -> Any:
    return name.replace("/", "_") if isinstance(name, str) else name


def _mapped(value: Any, function: Callable) -> Any:
    """Returns a structure of references to tensors, with a function's results in their place."""
    if isinstance(value, dict):
        return {key: _mapped(entry, function) for key, entry in value.items()}
    if value and isinstance(value[0], str):
        return function(*value)
    return [_mapped(entry, function) for entry in value]


def _first_numbers(config: dict[str, Any]) -> dict[str, int]:
    """Returns the smallest number by which each layer's calls are referred to.

    A model's own link from its inputs to its outputs is counted or not, depending on the release of Keras 2.
    """
    found: dict[str, int] = {}

    def note(name, number, _=0, settings=None, *__):
        found[name] = number if name not in found else min(number, found[name])
        second = settings.get("y") if isinstance(settings, dict) else None
        if isinstance(second, list) and len(second) == 3 and isinstance(second[0], str):  # of an operation of two
            note(*second)

    for entry in config["layers"]:
        for node in entry["inbound_nodes"]:
            _mapped(node, note)
    _mapped(config["output_layers"], note)
    return found


def _has_input(entry: dict[str, Any]) -> bool:
    """Returns whether a model's first node links its own input to its output, as Keras 2 counts nodes."""
    if entry["class_name"] != "Sequential":
        return True
    layers = entry["config"]["layers"]
    return layers[0]["class_name"] == "InputLayer"


def _without_input(path: Path, name: Any) -> ForeignLayerError:
    return ForeignLayerError(Foreign(path[-1].name[:80], f"its input {str(name)[:40]!r} is no layer of the model"))


def _inputs(node: Any, outputs: dict[str, dict[int, list[Any]]], path: Path) -> tuple[bool, Any, dict[str, Any]]:
    """Returns whether the inputs of a call are there, the inputs, and the arguments of the call."""
    arguments: dict[str, Any] = {}
    missing: list[str] = []

    def tensor(name, number, index, *more):
        arguments.update(more[0] if more else {})
        if name not in outputs:
            raise _without_input(path, name)
        if number not in outputs[name]:
            missing.append(name)
            return None
        return outputs[name][number][index]

    found = _mapped(node, tensor)
    if missing:
        return False, None, {}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if arguments.keys() - {"training"} or type(arguments.get("training", False)) not in (bool, int):
        raise ForeignLayerError(Foreign(path[-1].name[:80], f"it is called with {', '.join(arguments)[:80]}"))
    if "training" in arguments:
        arguments["training"] = bool(arguments["training"])
    return True, found, arguments


def _operands(
    node: Any, outputs: dict[str, dict[int, list[Any]]], path: Path, config: dict[str, Any]
) -> tuple[bool, Any, dict[str, Any]]:
    """Returns whether the inputs of an operation are there, its operands, and its other arguments."""
    if not node or not isinstance(node[0], str):  # a list of tensors
        raise no_layer(config, {})
    name, number, value, *more = node
    settings = {key: one for key, one in (more[0] if more else {}).items() if one is not None and key != "name"}
    operands: list[Any] = [value] if name == _CONSTANT else [(name, number, value)]
    if "y" in settings:
        second = settings.pop("y")
        is_tensor = isinstance(second, list) and len(second) == 3 and isinstance(second[0], str)
        operands.append(tuple(second) if is_tensor else second)
    found = []
    for operand in operands:
        if not isinstance(operand, tuple):
            found.append(operand)
            continue
        if operand[0] not in outputs:
            raise _without_input(path, operand[0])
        if operand[1] not in outputs[operand[0]]:
            return False, None, {}
        found.append(outputs[operand[0]][operand[1]][operand[2]])
    return True, found, settings


def _check_meaning(layer: Any, inputs: Any) -> None:
    """Raises for the inputs of which a layer of Keras 3 makes something else."""
    kind, dtype = type(layer).__name__, str(getattr(inputs, "dtype", ""))
    interpolates = kind == "Resizing" or (kind == "UpSampling2D" and layer.interpolation != "nearest")
    if interpolates and "int" in dtype:
        raise ForeignLayerError(Foreign(layer.name[:80], f"{kind} of {dtype} rounds in Keras 3"))
    if kind == "LayerNormalization" and isinstance(layer.axis, list):
        axes = [axis % len(inputs.shape) for axis in layer.axis]
        if axes != sorted(axes):  # Keras 3 sorts the axes of its variables
            raise ForeignLayerError(Foreign(layer.name[:80], "LayerNormalization of axes in another order"))
    if kind == "CenterCrop" and None in inputs.shape[1:]:  # smaller images than the crop
        raise ForeignLayerError(Foreign(layer.name[:80], "CenterCrop of any size is another in Keras 3"))


def _shape_of(config: dict[str, Any]) -> tuple[int | None, ...]:
    shape = config.get("batch_input_shape") or config.get("batch_shape")
    if not shape or not all(size is None or (type(size) is int and 0 < size < 1 << 20) for size in shape):
        raise ValueError(f"an input of shape {str(shape)[:80]}")
    return tuple(shape)


# The variables of each class in Keras 3, by the names that Keras 2 gave them where those differ.
_ALIASES = {"depthwise_kernel": "kernel"}


def _expected(layer: Any, shape: tuple) -> list[tuple[int, ...]]:
    """Returns the shapes of a layer's variables, without biases and others that are not larger."""
    kind = type(layer).__name__
    if kind in ("GroupNormalization", "LayerNormalization") and not layer.center and not layer.scale:
        return []
    if kind in ("BatchNormalization", "GroupNormalization"):
        return [(shape[layer.axis],)]
    if kind == "Embedding":
        return [(layer.input_dim, layer.output_dim)]
    if kind == "PReLU":
        shared = layer.shared_axes or ()
        return [tuple(1 if axis in shared else size for axis, size in enumerate(shape[1:], 1))]
    if kind == "LayerNormalization":
        axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        return [tuple(shape[axis] for axis in axes)]
    if kind == "Normalization":
        return [] if layer.input_mean is not None else [tuple(shape[axis] for axis in layer.axis or ())]
    if kind == "Dense":
        return [(shape[-1], layer.units)]
    if kind not in ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"):
        return []
    channels, size = shape[-1 if layer.data_format == "channels_last" else 1], tuple(layer.kernel_size)
    if kind == "Conv2D":
        return [(*size, channels // layer.groups, layer.filters)]
    if kind == "Conv2DTranspose":
        return [(*size, layer.filters, channels)]
    depthwise = (*size, channels, layer.depth_multiplier)
    return [depthwise] if kind == "DepthwiseConv2D" else [depthwise, (1, 1, depthwise[2] * depthwise[3], layer.filters)]


def _check_size(layer: Any, inputs: Any, stored: dict[str, Stored]) -> None:
    """Raises where a layer would have other variables than the file: before memory is taken for them."""
    expected = _expected(layer, tuple(inputs.shape)) if hasattr(inputs, "shape") else []
    found = [each.shape for each in stored.values()]
    if not set(expected) <= set(found) or (stored and not expected):
        shapes = ", ".join(f"{name} {each.shape}" for name, each in list(stored.items())[:5]) or "no variables"
        raise ValueError(f"layer {layer.name[:80]!r} does not fit its variables: {shapes}")


def _assign(layer: Any, stored: dict[str, Stored]) -> None:
    weights = {weight.name: weight for weight in layer.weights if "seed_generator" not in weight.path}
    if stored.keys() <= {str(number) for number in range(len(weights))}:  # in the order of the layer
        stored = dict(zip(weights, [stored[number] for number in sorted(stored)], strict=False))
    names = {_ALIASES.get(name, name) if name not in weights else name: name for name in stored}
    extra = {name for name in names if name not in weights} - {"count"}
    if extra or weights.keys() - names.keys() - {"count"}:
        raise ValueError(
            f"layer {layer.name[:80]!r} has the variables {', '.join(weights)}, and the file "
            f"{', '.join(stored) or 'none'}"
        )
    for name, weight in weights.items():
        if name not in names:
            continue
        value = stored[names[name]].read()
        if value.shape != tuple(weight.shape):
            raise ValueError(f"{layer.name[:80]}/{name} has the shape {value.shape} in place of {tuple(weight.shape)}")
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{layer.name[:80]}/{name} has numbers that are not finite")
        weight.assign(np.array(value))
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()

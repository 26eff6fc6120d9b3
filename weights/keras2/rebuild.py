"""Builds the model of Keras 3 that computes what a model of Keras 2 did, from its config and its variables."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_effnet.weights.formats.tensors import Stored
from keras_effnet.weights.keras2.layers import MERGING, MODELS, Foreign, ForeignLayerError, dtype_of, make

if TYPE_CHECKING:
    import keras

_DEPTH = 20  # of models in models

_LAYERS = 20_000


class Place(NamedTuple):
    """A layer's place in its model.

    Args:
        number: Integer. The number among the model's layers, without the input layer of a sequential model.
        name: String. The layer's name.
        class_name: String. The layer's class.
        position: Integer. The number among the model's layers of this class.
    """

    number: int
    name: str
    class_name: str
    position: int


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
        return builder.model(class_name, config, ()), builder.taken
    except ForeignLayerError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its description of the model is damaged ({' '.join(str(error).split())[:200]})") from error


class _Builder:
    def __init__(self, find: Find):
        self.find = find
        self.count = 0
        self.taken = 0

    def model(self, class_name: str, config: dict[str, Any], path: Path) -> "keras.Model":
        if len(path) > _DEPTH:
            raise ValueError(f"models in models, {_DEPTH} deep")
        if class_name == "Sequential":
            return self._sequential(config, path)
        return self._functional(config, path)

    def _places(self, entries: list[dict[str, Any]], path: Path) -> list[Path]:
        self.count += len(entries)
        if self.count > _LAYERS:
            raise ValueError(f"more than {_LAYERS} layers")
        seen: dict[str, int] = {}
        places = []
        for index, entry in enumerate(entries):
            name = str(entry.get("name") or entry["config"]["name"])
            kind = str(entry["class_name"])
            places.append((*path, Place(index, name, kind, seen.get(kind, 0))))
            seen[kind] = seen.get(kind, 0) + 1
        return places

    def _layer(self, entry: dict[str, Any], path: Path) -> Any:
        class_name, config = str(entry["class_name"]), dict(entry["config"])
        if class_name in MODELS:
            made = self.model(class_name, config, path)
            made.trainable = config.get("trainable", True)
            return made
        return make(class_name, config)

    def _call(self, layer: Any, inputs: Any, path: Path, **arguments: Any) -> Any:
        """Calls a layer on symbolic tensors, after a look at what its variables would take."""
        import keras

        if isinstance(layer, keras.Model) or layer.built:
            return layer(inputs, **arguments)
        # The state of a generator of random numbers does not matter.
        stored = {} if type(layer).__name__.startswith("Random") else self.find(path)
        _check_size(layer, inputs, stored)
        outputs = layer(inputs, **arguments)
        _assign(layer, stored)
        self.taken += len(stored)
        return outputs

    def _sequential(self, config: Any, path: Path) -> "keras.Model":
        import keras

        settings = config if isinstance(config, dict) else {"layers": config}  # a list in the first releases
        entries = list(settings["layers"])
        shape = settings.get("build_input_shape")
        first = entries[0]["config"]
        dtype = None
        if entries[0]["class_name"] == "InputLayer":
            shape, dtype = _shape_of(first), dtype_of(first)
            entries = entries[1:]
        elif entries[0]["class_name"] not in MODELS:
            shape = first.get("batch_input_shape") or shape
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
        return keras.Sequential([entrance, *layers], name=settings.get("name"))

    def _functional(self, config: dict[str, Any], path: Path) -> "keras.Model":
        import keras

        entries = list(config["layers"])
        places = self._places(entries, path)
        outputs: dict[str, dict[int, list[Any]]] = {}
        waiting: list[tuple[Any, Path, int, Any]] = []
        for entry, place in zip(entries, places, strict=True):
            name = place[-1].name
            if name in outputs:
                raise ValueError(f"two layers are called {name[:80]!r}")
            outputs[name] = {}
            if entry["class_name"] == "InputLayer":
                one = entry["config"]
                tensor = keras.Input(batch_shape=_shape_of(one), dtype=dtype_of(one), name=name)
                outputs[name][0] = [tensor]
                continue
            layer = self._layer(entry, place)
            start = 1 if isinstance(layer, keras.Model) and _has_input(entry) else 0
            waiting += [(layer, place, start + number, node) for number, node in enumerate(entry["inbound_nodes"])]
        while waiting:
            left = []
            for layer, place, number, node in waiting:
                ready, inputs, arguments = _inputs(node, outputs, place)
                if not ready:
                    left.append((layer, place, number, node))
                    continue
                given = inputs if len(inputs) > 1 or place[-1].class_name in MERGING else inputs[0]
                found = self._call(layer, given, place, **arguments)
                outputs[place[-1].name][number] = list(found) if isinstance(found, list | tuple) else [found]
            if len(left) == len(waiting):
                raise ValueError("its layers wait for each other")
            waiting = left

        def tensors(key: str) -> Any:
            found = config[key]
            found = list(found.values()) if isinstance(found, dict) else found
            found = [found] if found and isinstance(found[0], str) else found
            return [outputs[name][number][index] for name, number, index, *_ in found]

        entrances, exits = tensors("input_layers"), tensors("output_layers")
        return keras.Model(
            entrances[0] if len(entrances) == 1 else entrances,
            exits[0] if len(exits) == 1 else exits,
            name=config.get("name"),
        )


def _has_input(entry: dict[str, Any]) -> bool:
    """Returns whether a model's first node links its own input to its output, as Keras 2 counts nodes."""
    if entry["class_name"] != "Sequential":
        return True
    layers = entry["config"]["layers"]
    return layers[0]["class_name"] == "InputLayer"


def _inputs(node: Any, outputs: dict[str, dict[int, list[Any]]], path: Path) -> tuple[bool, list[Any], dict[str, Any]]:
    """Returns whether the inputs of a call are there, the inputs, and the arguments of the call."""
    node = list(node.values()) if isinstance(node, dict) else node
    parts = [node] if node and isinstance(node[0], str) else node
    found, arguments = [], {}
    for part in parts:
        name, number, index, *more = part
        arguments |= more[0] if more else {}
        if name not in outputs:
            raise ForeignLayerError(
                Foreign(path[-1].name[:80], f"its input {str(name)[:40]!r} is no layer of the model")
            )
        if number not in outputs[name]:
            return False, [], {}
        found.append(outputs[name][number][index])
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if arguments.keys() - {"training"} or type(arguments.get("training", False)) not in (bool, int):
        raise ForeignLayerError(Foreign(path[-1].name[:80], f"it is called with {', '.join(arguments)[:80]}"))
    if "training" in arguments:
        arguments["training"] = bool(arguments["training"])
    return True, found, arguments


def _shape_of(config: dict[str, Any]) -> tuple[int | None, ...]:
    shape = config.get("batch_input_shape") or config.get("batch_shape")
    if not shape or not all(size is None or (type(size) is int and 0 < size < 1 << 20) for size in shape):
        raise ValueError(f"an input of shape {str(shape)[:80]}")
    return tuple(shape)


# The variables of each class in Keras 3, by the names that Keras 2 gave them where those differ.
_ALIASES = {"depthwise_kernel": "kernel"}


def _check_size(layer: Any, inputs: Any, stored: dict[str, Stored]) -> None:
    """Raises where a layer would have other variables than the file: before memory is taken for them."""
    kernel = next((stored[name] for name in ("kernel", "depthwise_kernel", "0") if name in stored), None)
    width = getattr(layer, "units", None) or getattr(layer, "filters", None)
    shape: Any = getattr(inputs, "shape", None)
    if width is None and not stored:
        return
    fits = shape is not None
    shape = shape or ()
    match type(layer).__name__:
        case "Dense":
            fits = fits and kernel is not None and kernel.shape == (shape[-1], width)
        case "Conv2D" | "DepthwiseConv2D":
            channels = shape[-1 if layer.data_format == "channels_last" else 1] if fits else 0
            groups = getattr(layer, "groups", 1)
            last = (channels // groups, width) if width else (channels, layer.depth_multiplier)
            fits = kernel is not None and kernel.shape == (*layer.kernel_size, *last)
        case _:
            largest = max((int(np.prod(each.shape)) for each in stored.values()), default=0)
            fits = fits and (width is None or any(width in each.shape for each in stored.values())) and largest > 0
    if not fits:
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

"""Opens weights of Keras 2 by names that tell a net from the layers that a user has put around it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from keras_effnet.weights.formats import h5_file, keras_file, opening
from keras_effnet.weights.formats.tensors import Tensors
from keras_effnet.weights.keras2.files import DAMAGE, archived, groups_of, numbered, opened_model
from keras_effnet.weights.keras2.layers import ALIASES, MODELS, RENAMED
from keras_effnet.weights.keras2.rebuild import DEPTH, called, entries_of

_OUTSIDE = "../"  # before the name of a tensor that is not of the net

_FIRST = "conv2d/0"  # its kernel, where layers are numbered by their class

# The variables of layers by their numbers in a file. A dense layer has a kernel and a bias, as convolutions have.
_ORDER = {
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Normalization": ("mean", "variance", "count"),
}
_KERNEL = ("kernel", "bias")

_FINAL = ("softmax", "linear")  # activations of a net's own classifier


@contextmanager
def opened_weights(path, raw: bool = False, logits: bool = False) -> Iterator[Tensors]:
    """Opens a file as `opening.opened()` does, where no layer around a net of Keras 2 can be taken for one of the net.

    Such a layer has the name of the net's classifier if a user called it so, or if layers are numbered by their class.
    Where a file describes its model, the description tells. Where layers have numbers, and nothing tells, a dense layer
    is taken for one of the user's.

    Args:
        path: See `opening.opened()`.
        raw: See `opening.opened()`.
        logits: Boolean, whether a classifier without softmax can be the net's. Defaults to False.

    Yields:
        Dict from name to `Stored`. Names of layers around the net start with "../".

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or of no known format.
    """
    with opening.opened(path, raw) as tensors:
        described = _description(Path(path))
        named = None
        if described is not None and described.archived:
            with suppress(*DAMAGE):
                named = _by_layer(described, tensors)
        if described is None or (described.archived and named is None):
            named_by_class = described is not None or (h5_file.is_h5(path) and not h5_file.names_layers(path))
            yield _numbered_apart(tensors) if named_by_class else tensors
            return
        tensors = named or tensors
        own = False
        with suppress(*DAMAGE):
            own = _is_own_top(described.class_name, described.config, _FINAL if logits else _FINAL[:1])
        if not own:
            rule = re.compile(r"(.*/)?(predictions|probs)/(kernel|bias)")
            tensors = {_OUTSIDE * bool(rule.fullmatch(name)) + name: stored for name, stored in tensors.items()}
        yield tensors


class _Description(NamedTuple):
    class_name: str
    config: Any
    archived: bool  # in a `.keras` file, where layers have numbers


def _description(path: Path) -> _Description | None:
    """Returns the model that a file of Keras 2 describes."""
    if keras_file.is_keras(path):
        found = archived(path)
        return None if found is None else _Description(*found[:2], archived=True)
    with opened_model(path) as old:
        return None if old is None else _Description(old.class_name, old.config, archived=False)


def _by_layer(described: _Description, tensors: Tensors) -> Tensors | None:
    """Returns the tensors of a `.keras` file by the names of their layers, or None where none is called as a net's."""
    found: Tensors = {}
    groups = groups_of(described.class_name, described.config, tensors)
    taken: set[str] = set()
    for layer, kind, place in _layers(described.class_name, described.config):
        group = groups[place]
        stored = {} if group in taken else numbered(tensors, group)
        taken.add(group)
        variables = _ORDER.get(kind, _KERNEL)
        names = {str(number): variable for number, variable in enumerate(variables[: len(stored)])}
        found |= {f"{layer}/{names.get(number, number)}": each for number, each in stored.items()}
    if not any(name.split("/")[-2:] == [h5_file.MARK, "kernel"] for name in found):
        return None
    # The state of the optimizer, and others that no layer has.
    owned = {f"{group}/" for group in taken}
    return found | {name: each for name, each in tensors.items() if f"{name.rpartition('/')[0]}/" not in owned}


def _layers(class_name: str, config: Any, place: tuple[int, ...] = (), start: str = "") -> Iterator[Any]:
    """Yields the name, the class and the place of each layer."""
    for number, entry in enumerate(entries_of(class_name, config)):
        name, kind = start + called(entry), str(entry["class_name"])
        yield name, kind, (*place, number)
        if kind in MODELS and len(place) < DEPTH:
            yield from _layers(kind, entry["config"], (*place, number), f"{name}/")


class _Layers:
    """The layers of a described model by their names.

    Args:
        class_name: String. The model's class.
        config: Dict. The model's config.
    """

    def __init__(self, class_name: str, config: Any):
        self.entries = {called(entry): entry for entry in entries_of(class_name, config)}
        self._config = config
        self._is_sequential = class_name == "Sequential"

    def source(self, name: str) -> tuple["_Layers", str]:
        """Returns the layer that a layer gets its input from, and the model that it is in: the innermost one."""
        layers, (found, number) = self, self._before(name)
        while layers.entries[found]["class_name"] in MODELS:
            entry = layers.entries[found]
            layers = _Layers(entry["class_name"], entry["config"])
            found, number = layers.output(number)
        return layers, found

    def kind(self, name: str) -> str:
        kind = self.entries[name]["class_name"]
        return RENAMED.get(kind, (kind,))[0]

    def is_last_of_net(self, name: str) -> bool:
        """Returns whether a layer is the last activation of a net, of keras.applications or keras_cv_attention_models.

        Its layers may have been renamed.
        """
        norm = self.source(name)[1] if self.kind(name) in ("Activation", "ReLU") else ""
        return bool(re.fullmatch(r"(\w+_)?(top|post)_bn(_\w+)?", norm))

    def _before(self, name: str) -> tuple[str, int]:
        """Returns the name of the layer or model before a layer, and the number of its output."""
        if self._is_sequential:
            names = [*self.entries]
            return names[names.index(name) - 1] if name != names[0] else "", 0
        link = self.entries[name]["inbound_nodes"][0]
        link = link[0] if isinstance(link[0], list) else link
        return link[0], link[2]

    def output(self, number: int) -> tuple[str, int]:
        """Returns the name of the layer that computes an output, and the number of the output of this layer."""
        if self._is_sequential:
            return [*self.entries][-1], 0
        outputs = self._config["output_layers"]
        if isinstance(outputs, dict):
            outputs = [outputs[key] for key in sorted(outputs)]
        found = outputs[number] if isinstance(outputs[0], list) else outputs
        return found[0], found[2]


def _is_own_top(class_name: str, config: Any, activations: tuple[str, ...]) -> bool:
    """Returns whether each layer that is called as a net's classifier is one: a dense layer on averages of the net."""
    model = _Layers(class_name, config)
    for name, entry in model.entries.items():
        kind, settings = entry["class_name"], entry["config"]
        if kind in MODELS and not _is_own_top(kind, settings, activations):
            return False
        if name not in ("predictions", "probs"):
            continue
        layers, below = model.source(name)
        for _ in range(DEPTH):
            layers, below = layers.source(below) if layers.kind(below) == "Dropout" else (layers, below)
        pool = layers.entries[below]["config"]
        is_pooled = layers.kind(below) == "GlobalAveragePooling2D" and not pool.get("keepdims")
        final = ALIASES.get(settings["activation"], settings["activation"])
        if kind != "Dense" or final not in activations:
            return False
        if not is_pooled:
            return False
        layers, features = layers.source(below)
        if not layers.is_last_of_net(features):
            return False
    return True


def _numbered_apart(tensors: Tensors) -> Tensors:
    """Returns the tensors of a file without names, where those that cannot be of the net are outside of its scope.

    Of the net are convolutions, and batch normalization: one after each convolution without bias.
    """
    scope = next((name.removesuffix(_FIRST) for name in tensors if re.fullmatch(rf"(.*/)?{_FIRST}", name)), None)
    if scope is None:
        return tensors
    pattern = re.compile(rf"{re.escape(scope)}([a-z_0-9]+?)(?:_(\d{{1,9}}))?/(\d{{1,9}})")
    kinds = {name: pattern.fullmatch(name) for name in tensors}
    count = sum(
        match[1] in ("conv2d", "depthwise_conv2d") and match[3] == "0" and f"{name[:-1]}1" not in tensors
        for name, match in kinds.items()
        if match
    )
    any_number = dict.fromkeys(("conv2d", "depthwise_conv2d", "optimizer"), len(tensors))
    inside = any_number | {"batch_normalization": count, "normalization": 1}
    outer, found = scope.removesuffix("layers/"), {}
    for name, stored in tensors.items():
        match = kinds[name]
        around = match and int(match[2] or 0) >= inside.get(match[1], 0)
        # Outside of the scope, which ends with the list of the model's layers.
        told = f"{outer}{name.removeprefix(scope)}" if outer else f"{_OUTSIDE}{name}"
        found[told if around and told not in tensors else name] = stored
    return found

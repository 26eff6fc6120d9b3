"""Reads the files of Keras 2: the description of the model in them, and the variables of each layer."""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keras_effnet.errors import one_line
from keras_effnet.weights.formats import hdf5
from keras_effnet.weights.formats.h5_file import is_h5, is_legacy, layers_of, opened_h5_file
from keras_effnet.weights.formats.keras_file import is_keras, opened_keras
from keras_effnet.weights.formats.object_graph import ObjectGraph
from keras_effnet.weights.formats.protobuf import fields, one
from keras_effnet.weights.formats.tensorflow_checkpoint import read_checkpoint, read_graph
from keras_effnet.weights.formats.tensors import Stored, Tensors
from keras_effnet.weights.keras2.layers import ALWAYS_STORED, MODELS, RENAMED, Foreign, ForeignLayerError
from keras_effnet.weights.keras2.rebuild import DEPTH, Find, called, entries_of
from keras_effnet.weights.keras2.rebuild import Path as Place

# What reading a damaged description raises. `rebuild()` says what is wrong with it.
DAMAGE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)

_CONFIG_SIZE = 8 << 20  # bytes of a description: B7's takes 0.6 MB


@dataclass(frozen=True)
class OldModel:
    """A whole model that Keras 2 has saved.

    Args:
        class_name: `"Functional"`, `"Model"` or `"Sequential"`.
        config: Dict. The model's config.
        find: See `rebuild.Find`.
        variables: Integer, the number of variables of its layers.
        writer: String. The program that wrote the file.
        kind: String. What the file is.
    """

    class_name: str
    config: dict[str, Any]
    find: Find
    variables: int
    writer: str
    kind: str

    @property
    def saved_model(self) -> bool:
        """Whether TensorFlow can run it."""
        return self.kind == "a SavedModel"


@contextmanager
def opened_model(path: Path) -> Iterator[OldModel | None]:
    """Opens a file of Keras 2 that describes its model. Variables can be read while the context is open.

    Args:
        path: Path of an h5 file or of a SavedModel's folder.

    Yields:
        An `OldModel`, or None for any other file, and for weights without a description.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged.
    """
    if (path / "saved_model.pb").is_file():
        yield _saved_model(path)
    elif is_h5(path):
        with opened_h5_file(path, path) as file:
            yield _h5(file, path)
    elif is_keras(path):
        description = archived(path)
        if description is None:
            yield None
            return
        with opened_keras(path) as tensors:
            yield _keras(tensors, *description)
    else:
        yield None


def _parsed(text: Any) -> tuple[str, Any]:
    """Returns the class and the config of a description in JSON."""
    if isinstance(text, bytes | str) and len(text) > _CONFIG_SIZE:
        raise ValueError("its description of the model is too long")
    found = json.loads(text)
    class_name, config = found["class_name"], _plain(found["config"])
    if not isinstance(class_name, str) or not isinstance(config, dict | list):
        raise ValueError("its description of the model is damaged")
    return class_name, config


def _plain(value: Any) -> Any:
    """Returns a description without the marks that TensorFlow sets for tuples."""
    if isinstance(value, dict):
        if value.get("class_name") in ("__tuple__", "TensorShape") and isinstance(value.get("items"), list):
            return _plain(value["items"])
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _h5(file: hdf5.File, path: Path) -> OldModel | None:
    try:
        description = file.text(file.root, "model_config")
        if description is None or not is_legacy(file):
            return None
        class_name, config = _parsed(description)
        stored = dict(layers_of(file))
        names = set(_names_of(config))
        version = file.text(file.root, "keras_version") or ""
        if version.startswith("3"):
            return None
    except Exception as error:  # of many kinds
        raise ValueError(
            f"Expected an h5 file of Keras' structure. Received: {str(path)!r} ({one_line(error)})"
        ) from error

    def find(place: Place) -> dict[str, Stored]:
        variables = stored.get(place[0].name, {})
        if len(place) == 1:
            return {variable: value for (_, variable), value in variables.items()}
        owner = _owner(place[-1].name, {owner for owner, _ in variables}, names)
        return {variable: value for (other, variable), value in variables.items() if other == owner}

    count = sum(len(variables) for variables in stored.values())
    writer = f"Keras {version}".strip()
    return _told_apart(OldModel(class_name, config, find, count, writer, "an h5 file"), stored)


def _names_of(config: Any) -> Iterator[str]:
    """Yields the names of all layers of a model."""
    for entry in config.get("layers", []) if isinstance(config, dict) else config:
        inner = entry["config"]
        yield str(inner["name"] if isinstance(inner, dict) else entry.get("name"))
        if entry["class_name"] in MODELS:
            yield from _names_of(inner)


def _owner(name: str, owners: set[str], names: set[str]) -> str | None:
    """Returns the name by which the variables of a layer of an inner model are stored.

    It is the layer's, perhaps within scopes. Where a net was built twice, TensorFlow has numbered the second's. Where
    layers were renamed (`layer._name += "_2"`), it is the name before that.
    """
    found = [owner for owner in owners if owner == name or owner.endswith(f"/{name}")]
    if not found:
        plain = re.sub(r"_\d+$", "", name)
        free = [owner for owner in owners if owner.rpartition("/")[2] not in names]
        last = {owner: owner.rpartition("/")[2] for owner in free}
        found = [owner for owner in free if {last[owner], re.sub(r"_\d+$", "", last[owner])} & {name, plain}]
    return found[0] if len(found) == 1 else None


def _told_apart(old: OldModel, stored: dict[str, dict[tuple[str, str], Stored]]) -> OldModel:
    """Returns a model of an h5 file that refuses the variables of layers whose names in the file mislead.

    Variables keep the names that their layers had when these were built. Of layers that were renamed later, one may
    have the name that another had. They are in order, so that the mistake shows: those of frozen layers come last.
    """
    names = set(_names_of(old.config))
    misled: dict[str, str] = {}
    with suppress(*DAMAGE):
        for entry in entries_of(old.class_name, old.config):
            if entry["class_name"] in MODELS:
                top = called(entry)
                ranks: dict[str, int] = {}
                for owner, _ in stored.get(top, {}):
                    ranks.setdefault(owner, len(ranks))
                name = _misled(_inner(entry), ranks, names)
                misled |= {top: name} if name else {}

    def find(place: Place) -> dict[str, Stored]:
        if place[0].name in misled:
            raise ForeignLayerError(Foreign(misled[place[0].name][:80], _RENAMED))
        return old.find(place)

    return replace(old, find=find)


_RENAMED = (
    "layers were renamed, and an h5 file does not tell it from others of its class. Save the model as .keras or as a "
    "SavedModel"
)


def _inner(entry: dict[str, Any], flags: tuple[bool, ...] = ()) -> Iterator[tuple[str, str, tuple[bool, ...]]]:
    """Yields the name, the class and the flags of each layer in a model that always has variables.

    The flags say whether the layer, and each model that it is in, is trainable. That of the outermost model does not
    count: its layers are in the same order whether it is or not.
    """
    for inner in entries_of(entry["class_name"], entry["config"]):
        kind, config = RENAMED.get(inner["class_name"], (inner["class_name"],))[0], inner["config"]
        own = (*flags, not isinstance(config, dict) or config.get("trainable") is not False)
        if kind in MODELS:
            yield from _inner(inner, own)
        elif kind in ALWAYS_STORED:
            yield called(inner), kind, own


def _misled(layers: Iterable[tuple[str, str, tuple]], ranks: dict[str, int], names: set[str]) -> str | None:
    """Returns the first layer that would get the variables of another, or None."""
    last: dict[tuple[str, tuple], int] = {}
    found = {name: (kind, flags) for name, kind, flags in layers}  # layers that are shared count once
    for name, key in found.items():
        owner = _owner(name, set(ranks), names)
        if owner is None:
            if any(each.rpartition("/")[2] not in names for each in ranks):
                return name
        elif ranks[owner] <= last.get(key, -1):
            return name
        else:
            last[key] = ranks[owner]
    return None


def archived(path: Path) -> tuple[str, Any, str] | None:
    """Returns the description in a `.keras` file of Keras 2.

    Args:
        path: Path of the file.

    Returns:
        Tuple of the model's class, its config, and the version of Keras; or None if that is not 2.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = ("metadata.json", "config.json")
            if any(archive.getinfo(name).file_size > _CONFIG_SIZE for name in names):
                raise ValueError("its description of the model is too long")
            metadata, config = (archive.read(name) for name in names)
        version = _text(json.loads(metadata)["keras_version"])
        return (*_parsed(config), version) if version.startswith("2") else None
    except Exception as error:  # zipfile, zlib and json raise exceptions of many kinds for a damaged file
        raise ValueError(f"Expected a .keras file. Received: {str(path)!r} ({one_line(error)})") from error


def _keras(tensors: Tensors, class_name: str, config: Any, version: str) -> OldModel:
    groups: dict[tuple[int, ...], str] = {}
    with suppress(*DAMAGE):
        groups = groups_of(class_name, config, tensors)

    def find(place: Place) -> dict[str, Stored]:
        return numbered(tensors, groups.get(tuple(step.number for step in place), ""))

    aside = re.compile(r"(optimizer|metrics)/|.*/(random_generator|seed_generator)/|.*[Rr]andom_[^/]*/")
    count = sum(not aside.match(name) for name in tensors)
    return OldModel(class_name, config, find, count, f"Keras {version}", "a .keras file")


def numbered(tensors: Tensors, group: str) -> dict[str, Stored]:
    """Returns the variables of a layer in a `.keras` file by their numbers.

    Args:
        tensors: Dict from name to `Stored`.
        group: String. See `groups_of()`.
    """
    found = {name.removeprefix(f"{group}/"): stored for name, stored in tensors.items() if name.startswith(f"{group}/")}
    return {number: stored for number, stored in found.items() if number.isdigit()}


def groups_of(class_name: str, config: Any, tensors: Tensors) -> dict[tuple[int, ...], str]:
    """Returns the names of the groups of a `.keras` file that hold the variables of layers.

    Layers that two models of a model share are stored once. The description does not say which are shared: they have
    the same name and settings in both, as other layers may have.

    Args:
        class_name: String. The model's class.
        config: Dict. The model's config.
        tensors: Dict from name to `Stored`.

    Returns:
        Dict from the places of layers, each a tuple of `Place.number`, to names.
    """
    stored = {name.rpartition("/")[0] for name in tensors}
    for shares in (False, True):
        groups = {place: (group, kind) for place, group, kind in _walk(class_name, config, shares, {})}
        if all(group in stored for group, kind in groups.values() if kind in ALWAYS_STORED):
            break
    return {place: group for place, (group, _) in groups.items()}


def _walk(
    class_name: str, config: Any, shares: bool, seen: dict[str, str], place: tuple[int, ...] = (), start: str = ""
) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Yields the place, the group and the class of each layer, in the order in which Keras 2 stores them.

    Reference:
        tf_keras/src/saving/saving_lib.py, 2.20: layers are numbered by their class within their model, those that were
        stored before excepted.
    """
    counts: Counter[str] = Counter()
    for number, entry in enumerate(entries_of(class_name, config)):
        kind = str(entry["class_name"])
        parts = [kind, *(entry.get(key) for key in ("name", "config", "build_config"))]
        told = json.dumps(parts, sort_keys=True) if shares else ""
        told = re.sub(r'(, )?"shared_object_id": \d+', "", told)  # of initializers, in one of the models only
        if told in seen:
            group = seen[told]
        else:
            name = _snake(kind)
            group = f"{start}{name}_{counts[name]}" if counts[name] else f"{start}{name}"
            counts[name] += 1
            seen |= {told: group} if shares else {}
        yield (*place, number), group, kind
        if kind in MODELS and len(place) < DEPTH:
            yield from _walk(kind, entry["config"], shares, seen, (*place, number), f"{group}/layers/")


def _snake(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _text(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return re.sub(r"[^\w.+-]", "", text)[:20]


def _saved_model(path: Path) -> OldModel | None:
    prefix = str(path / "variables" / "variables")
    graph = read_graph(prefix)
    try:
        description, version = _metadata(path)
        if description is None or graph is None:
            return None
        class_name, config = _parsed(description)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a SavedModel. Received: {str(path)!r} ({one_line(error)})") from error
    # Names that start with an underscore are not of layers: generators of random numbers.
    owned = [each for each in graph.variables() if not any(part.startswith("_") for part in each.path)]
    find = _in_graph(graph, prefix)
    return OldModel(class_name, config, find, len(owned), f"TensorFlow {version}".strip(), "a SavedModel")


def _metadata(path: Path) -> tuple[str | None, str]:
    """Returns the description of the root object, and TensorFlow's version.

    Reference:
        tensorflow/core/protobuf/saved_model.proto, meta_graph.proto, saved_object_graph.proto, 2.20;
        tf_keras/protobuf/saved_metadata.proto, 2.20. Until TensorFlow 2.4, objects held their metadata themselves.
    """
    meta = fields(one(fields((path / "saved_model.pb").read_bytes()), 2, b""))
    if not meta:
        raise ValueError("its saved_model.pb is empty")
    version = _text(one(fields(one(meta, 1, b"")), 5, b""))
    beside = path / "keras_metadata.pb"
    if beside.is_file():
        nodes = [fields(node) for node in fields(beside.read_bytes()).get(1, [])]
        root = next((node for node in nodes if one(node, 3, b"") == b"root"), None)
        return (one(root, 5, b"").decode() if root else None), version
    objects = fields(one(meta, 7, b"")).get(1, [])
    user = fields(one(fields(objects[0]), 4, b"")) if objects else {}
    text = one(user, 3, b"").decode()
    return (text if text.startswith("{") else None), version


def _in_graph(graph: ObjectGraph, prefix: str) -> Find:
    tensors = {key: Stored(*stored) for key, stored in read_checkpoint(prefix).items()}

    def find(place: Place) -> dict[str, Stored]:
        node = graph.at(tuple(f"layer-{step.number}" for step in place))
        if node is None:
            return {}
        attributes = graph.attributes(node).items()
        # Normalization has a second name for its variables.
        own = {name: key for name, (_, key) in attributes if key in tensors and not name.startswith("adapt_")}
        return {name: tensors[key] for name, key in own.items()}

    return find

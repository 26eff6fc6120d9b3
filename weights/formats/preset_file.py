"""Reads what keras-hub saves: the folder of a preset, and the description in a `.keras` file of its models.

Reference:
    keras_hub/src/utils/preset_utils.py `KerasPresetSaver`, 0.32: the names of the files, and what each holds.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from keras_effnet.errors import one_line
from keras_effnet.weights.formats import keras_file
from keras_effnet.weights.formats.h5_file import opened_h5
from keras_effnet.weights.formats.tensors import Tensors

CONFIG = "config.json"  # of the backbone
BODY = "model.weights.h5"
HEAD = "task.weights.h5"
_TASK = "task.json"
_PREPROCESSOR = "preprocessor.json"
_CONVERTER = "image_converter.json"
_METADATA = "metadata.json"
BESIDE = (_TASK, HEAD, _PREPROCESSOR, _CONVERTER, _METADATA)  # files that a preset may have

# The one task whose head is one dense layer on pooled features.
_CLASSIFIERS = ("EfficientNetImageClassifier", "ImageClassifier")

_LONGEST = 16 * 2**20  # bytes of a description, which may list thousands of class names


class Documents(NamedTuple):
    """The descriptions in a preset.

    Args:
        kind: String. What the file is.
        writer: String. The program that wrote it.
        name: String. Class of the net.
        backbone: Dict: the config of the net.
        classifier: Dict: the config of the classifier around it, or None.
        around: String. Name of another model around it, or empty.
        converters: Dict from the file that describes it to the config of what resizes and normalizes images.
    """

    kind: str
    writer: str
    name: str
    backbone: dict[str, Any]
    classifier: dict[str, Any] | None
    around: str
    converters: dict[str, dict[str, Any]]


def folder_of(path: Path) -> Path | None:
    """Returns the folder of the preset that a path names: the folder, or a file of weights in it.

    Args:
        path: Path.

    Returns:
        Path, or None where no config.json names keras-hub.
    """
    folder = path.parent if path.name in (BODY, HEAD) and not path.is_dir() else path
    try:
        return folder if _of_hub(parsed(folder / CONFIG)) else None
    except (OSError, ValueError, RecursionError):
        return None


def _of_hub(described: Any) -> bool:
    module = described.get("module") if isinstance(described, dict) else None
    return isinstance(module, str) and module.partition(".")[0] in ("keras_hub", "keras_nlp")


def parsed(path: Path) -> Any:
    """Returns what a JSON file beside weights holds.

    Args:
        path: Path of the file.

    Returns:
        Any value of JSON.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged.
        RecursionError: If it is nested too deep.
    """
    if path.stat().st_size > _LONGEST:
        raise ValueError(f"{path.name} has more than {_LONGEST} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def opened_preset(folder: Path) -> Iterator[Tensors]:
    """Opens the weights of a preset: those of the net and, if its head is a classifier, those of the head.

    Args:
        folder: Path of the folder.

    Yields:
        Dict from name to `Stored`. See `h5_file.opened_h5()`.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged.
    """
    documents = read(folder)
    names = [BODY, HEAD] if documents is not None and documents.classifier is not None else [BODY]
    with ExitStack() as stack:
        found: Tensors = {}
        for name in names:
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"Expected a preset of keras-hub with {name}. Received: {str(folder)!r}")
            tensors = stack.enter_context(opened_h5(path, path))
            twice = {each for each in found.keys() & tensors.keys() if not each.startswith("optimizer/")}
            if twice:
                raise ValueError(
                    f"Expected other tensors in {name} than in {BODY}. Received: {str(folder)!r}, where both have "
                    f"{min(twice)}"
                )
            found |= tensors
        yield found


def read(path: Path) -> Documents | None:
    """Reads the descriptions in a preset, or in a `.keras` file of a model of keras-hub.

    Args:
        path: Path of any file or folder.

    Returns:
        `Documents`, or None for everything else.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a description is damaged.
    """
    if path.suffix == ".keras" and keras_file.is_keras(path):
        with keras_file.described(path) as whole:
            return _of_archive(whole)
    if not path.is_dir() or folder_of(path) is None:
        return None
    try:
        return _of_folder(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected the descriptions of a preset of keras-hub. Received: {str(path)!r} ({one_line(error)})"
        ) from error


def _of_folder(folder: Path) -> Documents:
    found = {name: parsed(folder / name) for name in BESIDE if name != HEAD and (folder / name).is_file()}
    net = parsed(folder / CONFIG)
    name, backbone = _name(net, CONFIG), _config(net, CONFIG)
    task, metadata = found.get(_TASK), found.get(_METADATA, {})
    classifier = None if task is None else _classifier(task, _TASK)
    if classifier is not None and _net(_config(classifier.get("backbone"), _TASK)) != _net(backbone):
        raise ValueError(f"{_TASK} describes another net")
    around = ""
    if task is None and (folder / HEAD).is_file():
        around = f"{HEAD} without {_TASK}"
    elif task is not None and classifier is None:
        around = _name(task, _TASK)
    if not isinstance(metadata, dict):
        raise _other(metadata, _METADATA)
    writer = f"keras-hub {metadata.get('keras_hub_version', '')}"
    converters = {} if task is None else _converter(_config(task, _TASK).get("preprocessor"), _TASK)
    if _PREPROCESSOR in found:
        converters |= _converter(found[_PREPROCESSOR], _PREPROCESSOR)
    if _CONVERTER in found:
        converters |= {_CONVERTER: _config(found[_CONVERTER], _CONVERTER)}
    return Documents("a preset", one_line(writer, 30), name, backbone, classifier, around, converters)


def _of_archive(whole: Any) -> Documents | None:
    """Returns the descriptions in a model: the whole of it, or the first net of keras-hub in it."""
    classifier = _classifier(whole, CONFIG) if _of_hub(whole) else None
    if classifier is not None:
        net, around = classifier.get("backbone"), ""
        converters = _converter(classifier.get("preprocessor"), CONFIG)
    else:
        nets = (each for each in _objects(whole) if _of_hub(each) and str(each.get("class_name")).endswith("Backbone"))
        net, converters = next(nets, whole if _of_hub(whole) else None), {}
        if net is None:
            return None
        around = "" if net is whole else one_line(whole.get("class_name") if isinstance(whole, dict) else "list", 80)
    config = _config(net, CONFIG)
    return Documents("a .keras file", "keras-hub", _name(net, CONFIG), config, classifier, around, converters)


def _objects(described: Any) -> Iterator[dict[str, Any]]:
    """Yields the objects anywhere in a description: layers are also in the fields of wrappers and subclasses."""
    left = [described]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            yield each
        if isinstance(each, dict | list):
            left += reversed(each.values() if isinstance(each, dict) else each)


def _classifier(task: Any, where: str) -> dict[str, Any] | None:
    """Returns the config of a classifier, or None for another task."""
    return _config(task, where) if _name(task, where) in _CLASSIFIERS and _of_hub(task) else None


def _converter(preprocessor: Any, where: str) -> dict[str, dict[str, Any]]:
    """Returns the config of the image converter in a preprocessor, by the file that has it, or nothing."""
    converter = None if preprocessor is None else _config(preprocessor, where).get("image_converter")
    return {} if converter is None else {where: _config(converter, where)}


def _net(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that a net depends on."""
    return {key: value for key, value in config.items() if key not in ("name", "trainable", "dtype")}


def _config(described: Any, where: str) -> dict[str, Any]:
    config = described.get("config") if isinstance(described, dict) else None
    if not isinstance(config, dict):
        raise _other(described, where)
    return config


def _name(described: Any, where: str) -> str:
    name = described.get("class_name") if isinstance(described, dict) else None
    if not isinstance(name, str):
        raise _other(described, where)
    return one_line(name, 80)


def _other(described: Any, where: str) -> ValueError:
    received = one_line(described, 80)
    return ValueError(f"{where}: expected an object with a class_name and a config. Received: {received}")

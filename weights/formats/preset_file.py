"""Reads what keras-hub saves: the folder of a preset, and the description in a `.keras` file of its models.

Reference:
    keras_hub/src/utils/preset_utils.py `KerasPresetSaver`, 0.32: the names of the files, and what each holds.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from keras_effnet.errors import one_line
from keras_effnet.weights.formats.h5_file import opened_h5
from keras_effnet.weights.formats.keras_file import is_keras
from keras_effnet.weights.formats.tensors import Tensors

CONFIG = "config.json"  # of the backbone
BODY = "model.weights.h5"
HEAD = "task.weights.h5"
_TASK = "task.json"
_CONVERTER = "image_converter.json"
_METADATA = "metadata.json"
BESIDE = (_TASK, HEAD, _CONVERTER, _METADATA)  # files that a preset may have

# The one task whose head is one dense layer on pooled features.
_CLASSIFIERS = ("EfficientNetImageClassifier", "ImageClassifier")

_LONGEST = 16 * 2**20  # bytes of a description


class Documents(NamedTuple):
    """The descriptions in a preset.

    Args:
        kind: String. What the file is.
        writer: String. The program that wrote it.
        backbone: Dict: the description of the net.
        classifier: Dict: the config of the classifier around it, or None.
        around: String. Name of another model around it, or empty.
        converter: Dict: the config of what resizes and normalizes images, or None.
    """

    kind: str
    writer: str
    backbone: dict[str, Any]
    classifier: dict[str, Any] | None
    around: str
    converter: dict[str, Any] | None


def folder_of(path: Path) -> Path | None:
    """Returns the folder of the preset that a path names: the folder, or a file of weights in it.

    Args:
        path: Path.

    Returns:
        Path, or None where there is no preset.
    """
    folder = path.parent if path.name in (BODY, HEAD) and not path.is_dir() else path
    if not (folder / CONFIG).is_file():
        return None
    return folder if (folder / BODY).is_file() or _is_hubs(folder / CONFIG) else None


def _is_hubs(path: Path) -> bool:
    try:
        return _of_hub(_parsed(path))
    except (OSError, ValueError, RecursionError):
        return False


def _of_hub(described: Any) -> bool:
    module = described.get("module") if isinstance(described, dict) else None
    return isinstance(module, str) and module.partition(".")[0] in ("keras_hub", "keras_nlp")


def _parsed(path: Path) -> Any:
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
    if path.is_dir():
        if folder_of(path) is None:
            return None
        place, reader = path / CONFIG, _of_folder
    elif path.suffix == ".keras" and is_keras(path):
        place, reader = path, _of_archive
    else:
        return None
    try:
        return reader(path)
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and json raise exceptions of many kinds for a damaged file
        raise ValueError(
            f"Expected the description of a model of keras-hub. Received: {str(place)!r} ({one_line(error)})"
        ) from error


def _of_folder(folder: Path) -> Documents:
    backbone = _parsed(folder / CONFIG)
    if not _of_hub(backbone):
        raise ValueError("its module is not keras_hub")
    found = {name: _parsed(folder / name) if (folder / name).is_file() else None for name in BESIDE if name != HEAD}
    task, converter = found[_TASK], found[_CONVERTER]
    version = str((found[_METADATA] or {}).get("keras_hub_version", ""))[:20]
    classifier, around = _head_of(task) if task is not None else (None, "")
    inner = classifier and classifier.get("backbone")
    if inner and inner != backbone:
        raise ValueError(f"{_TASK} describes another net")
    pixels = None if converter is None else _config(converter)
    return Documents("a preset", f"keras-hub {version}".strip(), backbone, classifier, around, pixels)


def _of_archive(path: Path) -> Documents | None:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(CONFIG).file_size > _LONGEST:
            raise ValueError(f"{CONFIG} has more than {_LONGEST} bytes")
        text = archive.read(CONFIG)
    if b"keras_hub" not in text and b"keras_nlp" not in text:
        return None
    whole = json.loads(text)
    kind, writer = "a .keras file", "keras-hub"
    if not _of_hub(whole):  # layers of the user around it
        inner = next(filter(_of_hub, _inside(whole)), None)
        return inner and Documents(kind, writer, inner, None, str(whole.get("class_name"))[:80], None)
    config = _config(whole)
    if "backbone" not in config:
        return Documents(kind, writer, whole, None, "", None)
    classifier, around = _head_of(whole)
    preprocessor = config.get("preprocessor")
    converter = _config(preprocessor).get("image_converter") if preprocessor else None
    return Documents(kind, writer, config["backbone"], classifier, around, _config(converter) if converter else None)


def _inside(described: Any) -> Iterator[Any]:
    """Yields the layers of a model, and those of the models in it."""
    config = described.get("config") if isinstance(described, dict) else None
    for layer in (config.get("layers") or []) if isinstance(config, dict) else []:
        yield layer
        yield from _inside(layer)


def _head_of(task: Any) -> tuple[dict[str, Any] | None, str]:
    """Returns the config of a classifier, or the name of another task."""
    name = str(task["class_name"])[:80]
    return (_config(task), "") if name in _CLASSIFIERS and _of_hub(task) else (None, name)


def _config(described: Any) -> dict[str, Any]:
    config = described["config"]
    if not isinstance(config, dict):
        raise ValueError(f"the config of {str(described.get('class_name'))[:80]} is none")
    return config

"""Exports a model as a page without a server: static files that classify photos in the visitor's browser."""

import html
import json
import shutil
from pathlib import Path
from string import Template
from typing import Any

import keras
import numpy as np

from keras_effnet import class_names
from keras_effnet.images import folders
from keras_effnet.inference import onnxruntime_web, runtimes
from keras_effnet.inference.classifier import returns_logits
from keras_effnet.inference.export_check import runner_of
from keras_effnet.inference.export_formats import ADD_METADATA, WRITERS
from keras_effnet.model_metadata import Expects, expects_in
from keras_effnet.weights.registry import digest

METADATA = "metadata.json"
_PAGES = Path(__file__).parent.parent / "pages"
_INDEX = "web.html"
_ASSETS = (
    "web.js",
    "web.css",
    "icon.svg",
    "classifier.js",
    "preprocess.js",
    "photo_input.js",
    "bars.js",
    "common.css",
)
_RUNTIME, _EXAMPLES = "onnxruntime", "examples"


def write(model: keras.Model, path: Path, shape, precision: str, photographs: np.ndarray) -> dict[str, Any]:
    """Writes the folder, but for the page itself and the metadata: `add_metadata()` adds them.

    Args:
        model: A `keras.Model`.
        path: Path of the folder to make.
        shape: Tuple of integers. The shape of an image.
        precision: See `export()`.
        photographs: float32 array of images to calibrate int8 with.

    Returns:
        Dict: what `export()` reports beyond the difference.

    Raises:
        ImportError: If a package that the export needs is not installed, or npm is missing.
        OSError: If onnxruntime-web cannot be fetched.
        ValueError: If the model is not a classifier of photos.
    """
    outputs = None if isinstance(model, keras.Sequential) else model.output
    if isinstance(outputs, dict | list | tuple) or len(model.outputs[0].shape) != 2:
        told = [tuple(each.shape) for each in model.outputs]
        raise ValueError(
            f"Expected a classifier with one output of shape (batch, classes). Received: outputs of {told}"
        )
    if min(shape[0], shape[-1]) not in (1, 3, 4):
        raise ValueError(f"Expected a model of photos, with 1, 3 or 4 channels. Received: images of {shape}")
    (path / _RUNTIME).mkdir(parents=True)
    onnxruntime_web.copy_to(path / _RUNTIME)  # first: npm may be missing
    return WRITERS["onnx"](model, path / runtimes.WEB_MODEL, shape, precision, photographs)


def add_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Completes the folder.

    Args:
        path: Path of a folder that `write()` has made.
        metadata: See `keras_effnet.metadata()`.
    """
    graph = path / runtimes.WEB_MODEL
    ADD_METADATA["onnx"](graph, metadata)
    for name in _ASSETS:
        shutil.copy(_PAGES / name, path)
    shutil.copytree(folders.BUNDLED, path / _EXAMPLES)
    page = _page(path, metadata)
    text = Template((_PAGES / _INDEX).read_text(encoding="utf-8")).substitute(
        {key: html.escape(value) for key, value in _words(path, metadata, page).items()}
    )
    (path / "index.html").write_text(text, encoding="utf-8")
    page["files"] = sorted([METADATA, *_files_in(path)])
    (path / METADATA).write_text(json.dumps({"page": page, "metadata": metadata}))


def _page(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns what the page's scripts read."""
    graph = path / runtimes.WEB_MODEL
    shape = metadata["input_shape"]
    run = runner_of(graph, "onnx")
    (outputs,) = run(np.zeros((1, *shape), "float32"))
    channels_last = shape[-1] <= 4
    height, width, channels = shape if channels_last else (*shape[1:], shape[0])
    expects = expects_in(metadata) or Expects()
    return {
        "model": _file(path, graph),
        "runtime": _file(path, path / _RUNTIME / onnxruntime_web.WASM),
        "input": {
            "shape": shape,
            "size": [height, width],
            "channels": channels,
            "channelsLast": channels_last,
            "cropPadding": expects.crop_padding,
            "interpolation": expects.interpolation,
            "cropMode": expects.crop_mode,
        },
        "logits": returns_logits(lambda pixels: run(pixels)[0], shape),
        "classes": _names(metadata["labels"], outputs.shape[-1]),
        "examples": [f"{_EXAMPLES}/{each.name}" for each in sorted((path / _EXAMPLES).glob("*.jpg"))],
    }


def _file(folder: Path, path: Path) -> dict[str, Any]:
    """Returns what the page needs to load a file. With its version, no browser uses an older one that it has kept."""
    version = digest(path, "sha256").partition(":")[2][:12]
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "version": version}


def _names(labels: list[str] | None, classes: int) -> list[str]:
    """Returns the names of the classes as `Classifier` does: without labels, ImageNet's for 1000, else numbers."""
    if labels is None:
        return class_names.labels() if classes == 1000 else [str(number) for number in range(classes)]
    return labels


def _words(path: Path, metadata: dict[str, Any], page: dict[str, Any]) -> dict[str, str]:
    """Returns the words that the page's template leaves open."""
    height, width = page["input"]["size"]
    megabytes = (page["model"]["bytes"] + page["runtime"]["bytes"]) / 1e6
    return {
        "model": metadata["model"],
        "classes": f"{len(page['classes']):,} classes",
        "facts": f"{height} x {width} pixels, {metadata['precision']}, {megabytes:.0f} MB to load",
        "folder": path.name,
    }


def _files_in(path: Path) -> list[str]:
    return [file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()]


def foreign_files(path: Path) -> list[str]:
    """Returns the files in a folder that no earlier export of a page has written.

    Args:
        path: Path of an existing folder.

    Returns:
        List of strings, paths in the folder.
    """
    try:
        own = json.loads((path / METADATA).read_text())["page"]["files"]
    except (OSError, ValueError, LookupError, TypeError):
        own = []
    return sorted(set(_files_in(path)).difference(map(str, own)))

"""Exports a model as a page without a server: static files that classify photos in the visitor's browser."""

import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from string import Template
from typing import Any

import keras
import numpy as np

from keras_effnet.class_names import names_of, returns_logits
from keras_effnet.images import folders
from keras_effnet.inference import onnxruntime_web, runtimes
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
_ADDRESS = re.compile(r'((?:from|href=|src=) ?"[\w./]+\.(?:js|css|svg))"')
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
    if min(shape[0], shape[-1]) not in (1, 3):  # browsers round the colours of transparent pixels
        raise ValueError(f"Expected a model of photos, with 1 or 3 channels, for a page. Received: images of {shape}")
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
    for name in (*_ASSETS, _INDEX):
        shutil.copy(_PAGES / name, path)
    shutil.copytree(folders.BUNDLED, path / _EXAMPLES)
    page = _page(path, metadata)
    page["version"] = _add_version(path)
    index = path / _INDEX
    text = Template(index.read_text(encoding="utf-8")).substitute(
        {key: html.escape(value) for key, value in _words(path, metadata, page).items()}
    )
    index.write_text(text, encoding="utf-8")
    index.rename(path / "index.html")
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
    names, note = names_of(metadata, outputs.shape[-1])
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
        "classes": names,
        "note": note or "",
        "examples": [f"{_EXAMPLES}/{each.name}" for each in sorted((path / _EXAMPLES).glob("*.jpg"))],
    }


def _add_version(folder: Path) -> str:
    """Adds a version to the addresses in the page and its scripts, so that no browser mixes the files of two exports.

    Returns:
        The version: a hash of all files.
    """
    digests = [digest(folder / name, "sha256") for name in sorted(_files_in(folder))]
    version = hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
    for name in (*_ASSETS, _INDEX):
        file = folder / name
        text = file.read_text(encoding="utf-8").replace('const VERSION = ""', f'const VERSION = "{version}"')
        file.write_text(_ADDRESS.sub(rf'\1?{version}"', text), encoding="utf-8")
    return version


def _file(folder: Path, path: Path) -> dict[str, Any]:
    """Returns what the page needs to load a file. With its version, no browser uses an older one that it has kept."""
    version = digest(path, "sha256").partition(":")[2][:12]
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "version": version}


def _words(path: Path, metadata: dict[str, Any], page: dict[str, Any]) -> dict[str, str]:
    """Returns the words that the page's template leaves open."""
    height, width = page["input"]["size"]
    megabytes = (page["model"]["bytes"] + page["runtime"]["bytes"]) / 1e6
    return {
        "model": metadata["model"],
        "classes": f"{len(page['classes']):,} classes",
        "facts": f"{height} x {width} pixels, {metadata['precision']}, {megabytes:.0f} MB to load",
        "folder": path.name,
        "note": page["note"],
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

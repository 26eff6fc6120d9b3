"""Exports a Keras model to a file for a runtime: folds, quantizes, checks the result against Keras, adds metadata."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import keras
import numpy as np

from keras_effnet import compat, model_metadata
from keras_effnet.errors import few, one_of
from keras_effnet.files import folder_beside
from keras_effnet.images import decoding, folders, photo_loader, resizing
from keras_effnet.inference import runtimes, web_export
from keras_effnet.inference.class_maps import with_maps
from keras_effnet.inference.export_check import compare
from keras_effnet.inference.export_formats import ADD_METADATA, WRITERS, quietly
from keras_effnet.model_loader import check_finite, load_model
from keras_effnet.nets import inspection
from keras_effnet.nets.variants import VARIANTS, nearest

FORMATS = {"savedmodel": "", **runtimes.FORMATS, "web": ""}
_WRITERS = WRITERS | {"web": web_export.write}
_ADD_METADATA = ADD_METADATA | {"web": web_export.add_metadata}

# Largest difference from Keras' outputs, relative to the largest of them. For int8, it is only reported.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "mixed": 0.1, "int8": np.inf}


def export(
    model: "keras.Model | str | os.PathLike",
    path: str | os.PathLike,
    format: str | None = None,
    precision: str = "float32",
    *,
    calibration: Any = None,
    labels: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
    maps: bool = False,
) -> dict[str, Any]:
    """Exports a model for inference outside Keras, and checks that the file computes what Keras computes.

    Batch normalization and preprocessing are folded (`fold_batch_norm()`). All is float32 unless `precision` says
    otherwise. Inputs are pixels 0-255. The file also holds the preprocessing of photos, the labels and the source of
    the weights: `keras_effnet.metadata()` reads them.

    Args:
        model: A functional or sequential model of images: of this package, of keras.applications, or built on them; or
            the name of a model, or the path of a `.keras` file or of a run's folder.
        path: Path of the file, or of the folder for `"savedmodel"` and `"web"`. An existing export is replaced only
            after the new one has passed the check.
        format: `"savedmodel"`, `"onnx"`, `"litert"` or `"openvino"`; or `"web"` for a folder of static files, a page
            that classifies photos in the visitor's browser. Defaults to None: by the suffix of `path`, `.onnx`,
            `.tflite` or `.xml`; any other suffix is a SavedModel.
        precision: `"float32"`; `"float16"` for weights of half the size, with float32 arithmetic on processors; or
            `"int8"` for weights and activations of 8 bits. Defaults to `"float32"`.
        calibration: For `"int8"`, images to measure the activations with: an array with pixels 0-255, or a list of
            photos (paths, bytes, or folders), which are cropped and resized as the weights expect. Pass 100 or more
            images like those that the model will see. Defaults to None: crops of two bundled photos, with a warning.
        labels: List of class names. Defaults to None: `model.labels`, or ImageNet's if the model has published weights.
        input_shape: Tuple of integers. The shape of an image, for a model that takes any size. Defaults to None: the
            model's own, or the usual one of its variant.
        maps: Boolean, whether the file also returns class activation maps, (batch, height, width, classes), as its last
            output. `keras_effnet.explain()` says what they contain. Defaults to False.

    Returns:
        Dict with `path`, `format`, `precision`, `size` in bytes, `input_shape`, and `difference`: for random pixels and
        for photos, the largest difference from Keras' outputs, relative to the largest of them. For the photos in
        `calibration` or the bundled ones, also `top1_agreement`, `top5_overlap` and `cosine` (of the logits). For
        `"int8"`, also `float_layers`, the layers left in float, and for LiteRT `layer_errors`: the error of each layer
        if all are in 8 bits, relative to the root mean square of its outputs, largest first.

    Raises:
        ImportError: If a package that writes or runs the format is not installed.
        OSError: If the file cannot be written.
        ValueError: If an argument is not valid, or the export does not compute what Keras computes. An existing file
            is kept.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
    >>> report = ke.export(model, "lite0.tflite", labels=["cat", "coffee"])
    >>> report["difference"]["random"] < 1e-4
    True
    """
    if isinstance(model, str | os.PathLike):
        model = load_model(model)
    path = Path(path)
    kind = format or next((name for name, ending in runtimes.FORMATS.items() if path.suffix == ending), "savedmodel")
    _check_arguments(path, kind, precision, maps)
    shape = shape_of(model, input_shape)
    check_finite(model)
    read = photo_loader.image_loader(model, shape=shape)
    photographs = pixels_of(calibration, read, shape) if calibration is not None else _own_photographs(read, shape)
    if precision == "int8" and calibration is None:
        warnings.warn(
            "int8 is calibrated with crops of two bundled photos. Pass calibration= with 100 or more images like those "
            "that the model will see",
            stacklevel=2,
        )
    metadata = metadata_of(model, shape, precision, labels, maps)
    net = with_maps(model, shape) if maps else model
    random = np.random.default_rng(0).uniform(0, 255, (2, *shape)).astype("float32")
    tried = {"random": random, "photographs": photographs[:: max(1, len(photographs) // 64)][:64]}
    with folder_beside(path) as folder:
        temporary = folder / path.name
        found = _write(net, temporary, kind, shape, precision, photographs)
        report = compare(model, temporary, kind, tried, net if maps else None) | found
        _check_difference(model, kind, precision, report["difference"])
        _ADD_METADATA[kind](temporary, metadata | {"difference": report["difference"]})
        _move(temporary, path)
    return {
        "path": str(path),
        "format": kind,
        "precision": precision,
        "size": runtimes.size_of(path),
        "input_shape": list(shape),
        **report,
    }


def _check_arguments(path: Path, kind: str, precision: str, maps: bool) -> None:
    one_of("format", kind, FORMATS)
    if precision == "bfloat16":
        raise ValueError(
            "Expected precision='float32' for a file that is to run in bfloat16: ke.Predictor(path, "
            "precision='bfloat16') computes in it. Received: precision='bfloat16'"
        )
    one_of("precision", precision, runtimes.STORED)
    _check_target(path, kind)
    if FORMATS[kind] and path.suffix != FORMATS[kind]:
        raise ValueError(f"Expected a path that ends in {FORMATS[kind]} for {kind}. Received: {str(path)!r}")
    if kind == "savedmodel" and precision != "float32":
        raise ValueError(f"Expected float32 for a SavedModel. Received: precision={precision!r}. Nearest: litert")
    if kind == "web" and maps:
        raise ValueError("Expected maps=False for a page, which shows no maps. Received: maps=True. Nearest: onnx")


def _check_target(path: Path, kind: str) -> None:
    """Refuses to replace anything but an earlier export."""
    if path.name in ("", ".."):
        raise ValueError(f"Expected the path of a new file or folder. Received: {str(path)!r}")
    if kind not in _EARLIER:
        if path.is_dir():
            raise ValueError(f"Expected the path of a file. Received: {str(path)!r}, a folder")
    elif path.is_dir():
        foreign = _EARLIER[kind](path)
        if foreign:
            raise ValueError(
                f"Expected a new path, or an earlier {kind} export. Received: {str(path)!r}, another folder: it has "
                f"{few(foreign)}"
            )
    elif path.exists():
        raise ValueError(f"Expected the path of a folder for {kind}. Received: {str(path)!r}, a file")


def _beside_savedmodel(path: Path) -> list[str]:
    return [] if (path / runtimes.SAVED_MODEL).is_file() else sorted(each.name for each in path.iterdir())


# What lies in a folder that is not part of an earlier export.
_EARLIER = {"savedmodel": _beside_savedmodel, "web": web_export.foreign_files}


def _write(model, path: Path, kind: str, shape, precision: str, photographs: np.ndarray) -> dict[str, Any]:
    """Writes the file without metadata. Returns what the writer reports."""
    try:
        with quietly():
            return _WRITERS[kind](model, path, shape, precision, photographs)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # each converter raises its own types
        raise ValueError(
            f"Expected a model that can be exported to {kind}, {precision}. Received: {model.name!r}: "
            f"{type(error).__name__}: {shorten(str(error), 200)}"
        ) from error


def _check_difference(model, kind: str, precision: str, difference: dict[str, float]) -> None:
    worst = float(np.max(list(difference.values())))  # NaN if any is NaN
    bound = BOUNDS[precision]
    if any(layer.compute_dtype != "float32" for layer in compat.all_layers(model)):  # Keras rounds more than the export
        bound = max(bound, BOUNDS["mixed"])
    if not worst <= bound:
        raise ValueError(
            f"Expected outputs within {bound:g} of Keras', relative to the largest. Received: {worst:.2g} "
            f"from the {kind} export of {model.name!r}. Nothing was saved"
        )


def _move(made: Path, path: Path) -> None:
    """Moves a finished export, with the files beside it, to its path. The files that it replaces go to its old folder.

    The file that refers to the others is moved last, and its predecessor is removed first. So an interruption leaves a
    complete export or none.
    """
    parts = sorted(made.parent.iterdir(), key=lambda each: each == made)
    for each in reversed(parts):
        old = path.with_name(each.name)
        if os.path.lexists(old):
            os.replace(old, made.parent / f"old-{each.name}")
    for each in parts:
        os.replace(each, path.with_name(each.name))


def shape_of(model: keras.Model, input_shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Returns the shape of an image that a model takes.

    Args:
        model: A functional or sequential model.
        input_shape: Tuple of integers. The shape to use where the model leaves it open. Defaults to None: the usual
            size of the variant for models of this package, else 224.

    Returns:
        Tuple of integers.

    Raises:
        ValueError: If the model does not take one batch of images, or `input_shape` contradicts its shape.
    """
    inputs = getattr(model, "inputs", None) or []
    known = tuple(inputs[0].shape[1:]) if len(inputs) == 1 else ()
    if len(known) != 3:
        raise ValueError(
            f"Expected a model of one input, a batch of images. Received: {getattr(model, 'name', model)!r} with "
            f"{[tuple(tensor.shape) for tensor in inputs] or 'no known input'}"
        )
    if input_shape is None:
        side = 224
        with suppress(ValueError, KeyError):  # a model of another package, or of unknown widths
            side = VARIANTS[nearest(inspection.find(model, others=True)[1].architecture) or ""].resolution
        return tuple(side if size is None else size for size in known)
    shape = tuple(input_shape)
    if len(shape) != 3 or any(size not in (None, given) for size, given in zip(known, shape, strict=True)):
        raise ValueError(f"Expected input_shape to match the model's, {known}. Received: input_shape={input_shape}")
    return shape


def sized(model: keras.Model, size: tuple[int, int]) -> tuple[int, ...]:
    """Returns the shape of an image of a given size, with the channels last or first as in the model.

    Args:
        model: A functional or sequential model.
        size: Pair of integers, height and width.

    Returns:
        Tuple of integers.
    """
    shape = tuple(model.inputs[0].shape[1:])
    return (*size, shape[-1]) if shape[-1] is not None and shape[-1] <= 4 else (shape[0], *size)


def outputs_of(model: keras.Model) -> list[str] | int | None:
    """Returns the structure of a model's outputs.

    Args:
        model: A functional or sequential model.

    Returns:
        None for a single array, the sorted keys of a dict, or the length of a list or tuple.
    """
    structure = None if isinstance(model, keras.Sequential) else model.output
    match structure:
        case dict():
            return sorted(structure)
        case list() | tuple():
            return len(structure)
    return None


def pixels_of(images: Any, read: Callable[[Any], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Converts images to one array, and loads them if they are photos.

    Args:
        images: Array (count, *shape), or paths of photos or folders, or photos as bytes.
        read: Function from a path or bytes to pixels.
        shape: Tuple of integers. The shape of an image.

    Returns:
        float32 array (count, *shape).

    Raises:
        ValueError: If there are no images, too many cannot be read, or they have another shape or contain NaN or
            infinity.
    """
    if isinstance(images, str | bytes | os.PathLike):
        images = [images]
    if not hasattr(images, "shape") and len(images) and isinstance(images[0], str | bytes | os.PathLike):
        named = [each for each in images if not isinstance(each, bytes)]
        photos = [*folders.photographs(named, recursive=True), *(each for each in images if isinstance(each, bytes))]
        images = [pixels for _, pixels in folders.readable(photos, read)]
    array = np.asarray(images, "float32")
    if array.ndim != 4 or array.shape[1:] != shape or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"Expected images of shape (count, {', '.join(map(str, shape))}). Received: {array.shape}")
    return array


def _own_photographs(read, shape: tuple[int, ...], count: int = 100) -> np.ndarray:
    """Returns the two bundled photos and random crops of them, or random pixels if the model takes no photos."""
    if min(shape[0], shape[-1]) not in (1, 3, 4):
        return np.random.default_rng(1).uniform(0, 255, (8, *shape)).astype("float32")
    wholes = [decoding.decode_image(path, min(shape[0], shape[-1])) for path in sorted(folders.BUNDLED.glob("*.jpg"))]
    images = [read(path) for path in sorted(folders.BUNDLED.glob("*.jpg"))]
    random = np.random.default_rng(0)
    last = shape[-1] <= 4
    size = (shape[0], shape[1]) if last else (shape[1], shape[2])
    while len(images) < count:
        whole = wholes[len(images) % len(wholes)]
        sides = np.array(whole.shape[:2])
        height, width = np.rint(sides * random.uniform(0.4, 1, 2)).astype(int)
        top, left = random.integers(0, sides - (height, width) + 1)
        crop = whole[top : top + height, left : left + width]
        crop = crop * random.uniform(0.6, 1.2) + random.uniform(-30, 30)
        pixels = resizing.crop_and_resize(np.clip(crop, 0, 255), size, 0)
        images.append(pixels if last else pixels.transpose(2, 0, 1))
    return np.stack(images).astype("float32")


def metadata_of(
    model: keras.Model, shape: Sequence[int], precision: str, labels=None, maps: bool = False
) -> dict[str, Any]:
    """Returns what `keras_effnet.metadata()` reads back from an export, except for `difference`.

    Args:
        model: A functional or sequential model.
        shape: Sequence of integers. The shape of an image.
        precision: See `export()`.
        labels: See `export()`.
        maps: See `export()`. Defaults to False.

    Returns:
        Dict.

    Raises:
        ValueError: If there is not one label for each output.
    """
    found = model_metadata.of(model, labels, shape, outputs=outputs_of(model), precision=precision, maps=maps)
    with suppress(ValueError):  # a model of another package
        rules = photo_loader.expected_by(model, "auto")[3]
        if rules is not None:
            found["preprocessing"] |= asdict(model_metadata.Expects.of(rules))
    return found

"""From a Keras model to a file for a runtime: folded, quantised if wanted, tried against Keras, with its metadata."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.errors import one_of
from keras_effnet.files import folder_beside
from keras_effnet.images import class_names, decoding, folders, loading, resizing
from keras_effnet.inference import runtimes
from keras_effnet.inference.agreement import compare
from keras_effnet.inference.export_formats import ADD_METADATA, WRITERS, quietly
from keras_effnet.nets import inspection
from keras_effnet.nets.variants import VARIANTS, nearest

FORMATS = {"savedmodel": "", **runtimes.FORMATS}

# How far outputs may be from Keras', over their largest. What 8 bits make of them is told, not bounded.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "mixed": 0.1, "int8": np.inf}


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str | None = None,
    precision: str = "float32",
    *,
    calibration: Any = None,
    labels: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Writes a model for inference outside Keras, once it was seen to compute what Keras does.

    Batch normalisation and preprocessing are folded (`fold_batch_norm()`), all is float32 unless `precision` says
    otherwise, and pixels go in as 0-255. What the file expects of a photograph, its labels and where its weights are
    from are inside: `keras_effnet.runtimes.metadata()` reads them.

    Args:
        model: A functional or sequential model of images: of this package, of keras.applications, or built on them.
        path: Path of the file, or of the folder for `"savedmodel"`. Replaced if it exists, but only by an export that
            was tried.
        format: `"savedmodel"`, `"onnx"`, `"litert"` or `"openvino"`. Defaults to None: by the path's ending, `.onnx`,
            `.tflite` or `.xml`; none of them is a SavedModel.
        precision: `"float32"`; `"float16"` for weights of half the size, with float32 arithmetic on processors; or
            `"int8"` for weights and activations of 8 bits. Defaults to `"float32"`.
        calibration: For `"int8"`, what activations are measured with: an array of images with pixels 0-255, or a list
            of photographs (paths, bytes, or folders), which are cropped and resized as the weights expect. 100 or more
            of the kind that the model will see are right. Defaults to None: crops of two photographs, with a warning.
        labels: List of the classes' names. Defaults to None: ImageNet's where the model has its published weights.
        input_shape: Tuple of integers, an image's shape, for a model of any size. Defaults to None: the model's own,
            or its variant's usual one.

    Returns:
        Dict with `path`, `format`, `precision`, `size` in bytes, `input_shape`, and `difference`: of random pixels and
        of photographs the largest one to Keras' outputs, over the largest of these. For images in `calibration`, or
        the photographs, also `top1_agreement`, `top5_overlap` and `cosine` (of the logits). Of `"int8"` also
        `float_layers`, those that stayed in float, and for LiteRT `layer_errors`: of each layer with all of them in 8
        bits, over the root mean square of its outputs, the largest first.

    Raises:
        ImportError: If what writes or runs the format is not installed.
        OSError: If the file cannot be written.
        ValueError: If an argument is not valid, or the export does not compute what Keras does. The old file remains.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
    >>> report = ke.export(model, "lite0.tflite", labels=["cat", "coffee"])
    >>> report["difference"]["random"] < 1e-4
    True
    """
    path = Path(path)
    kind = format or next((name for name, ending in runtimes.FORMATS.items() if path.suffix == ending), "savedmodel")
    one_of("format", kind, FORMATS)
    one_of("precision", precision, runtimes.PRECISIONS)
    _check_target(path, kind)
    if FORMATS[kind] and path.suffix != FORMATS[kind]:
        raise ValueError(f"Expected a path that ends in {FORMATS[kind]} for {kind}. Received: {str(path)!r}")
    if kind == "savedmodel" and precision != "float32":
        raise ValueError(f"Expected float32 for a SavedModel. Received: precision={precision!r}. Nearest: litert")
    shape = shape_of(model, input_shape)
    read = loading.image_loader(model, shape=shape)
    photographs = pixels_of(calibration, read, shape) if calibration is not None else _own_photographs(read, shape)
    if precision == "int8" and calibration is None:
        warnings.warn(
            "int8 is calibrated with crops of two photographs. Pass calibration=, 100 or more images of the kind that "
            "the model will see",
            stacklevel=2,
        )
    metadata = _metadata(model, shape, precision, labels)
    random = np.random.default_rng(0).uniform(0, 255, (2, *shape)).astype("float32")
    tried = {"random": random, "photographs": photographs[:: max(1, len(photographs) // 64)][:64]}
    with folder_beside(path) as folder:
        temporary = folder / path.name
        try:
            with quietly():
                found = WRITERS[kind](model, temporary, shape, precision, photographs)
        except (ImportError, OSError, ValueError):
            raise
        except Exception as error:  # each converter has its own
            raise ValueError(
                f"Expected a model that can be written as {kind}, {precision}. Received: {model.name!r}: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        report = compare(model, temporary, kind, tried) | found
        worst = float(np.max(list(report["difference"].values())))  # of which NaN is one
        bound = BOUNDS[precision]
        if any(layer.compute_dtype != "float32" for layer in compat.all_layers(model)):  # Keras rounds more than we
            bound = max(bound, BOUNDS["mixed"])
        if not worst <= bound:
            raise ValueError(
                f"Expected outputs within {bound:g} of Keras', over their largest. Received: {worst:.2g} "
                f"from the {kind} file of {model.name!r}, which was not kept"
            )
        metadata |= {"difference": report["difference"]}
        ADD_METADATA[kind](temporary, metadata)
        # A file that names others comes last, and its predecessor goes first: what is between works or is not there.
        made = sorted(folder.iterdir(), key=lambda each: each == temporary)
        for each in reversed(made):
            old = path.with_name(each.name)
            if os.path.lexists(old):
                os.replace(old, folder / f"old-{each.name}")
        for each in made:
            os.replace(each, path.with_name(each.name))
    files = [path, path.with_suffix(".bin")] if kind == "openvino" else [path]
    inside = [file for each in files for file in ([each] if each.is_file() else each.rglob("*"))]
    size = sum(file.stat().st_size for file in inside if file.is_file())
    return {
        "path": str(path),
        "format": kind,
        "precision": precision,
        "size": size,
        "input_shape": list(shape),
        **report,
    }


def _check_target(path: Path, kind: str) -> None:
    """An export replaces another one, not a folder of something else."""
    if path.name in ("", ".."):
        raise ValueError(f"Expected the path of a new file or folder. Received: {str(path)!r}")
    if path.is_dir() and not (
        kind == "savedmodel" and ((path / "saved_model.pb").is_file() or not any(path.iterdir()))
    ):
        raise ValueError(f"Expected a new path, or that of an older export. Received: {str(path)!r}, another folder")
    if kind == "savedmodel" and path.exists() and not path.is_dir():
        raise ValueError(f"Expected the path of a folder for a SavedModel. Received: {str(path)!r}, a file")


def shape_of(model: keras.Model, input_shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of an image that a model takes.

    Args:
        model: A functional or sequential model.
        input_shape: Tuple of integers for what is unknown. Defaults to None: of this package's models, the variant's
            usual size, else 224.

    Returns:
        Tuple of integers.

    Raises:
        ValueError: If the model does not take one batch of images, or the two disagree.
    """
    inputs = getattr(model, "inputs", None) or []
    known = tuple(inputs[0].shape[1:]) if len(inputs) == 1 else ()
    if len(known) != 3:
        raise ValueError(
            f"Expected a model of one input, a batch of images. Received: {getattr(model, 'name', model)!r} with "
            f"{[tuple(tensor.shape) for tensor in inputs] or 'none that is known'}"
        )
    if input_shape is None:
        side = 224
        with suppress(ValueError, KeyError):  # another package's, or no known widths
            side = VARIANTS[nearest(inspection.find(model)[1].architecture) or ""].resolution
        return tuple(side if size is None else size for size in known)
    shape = tuple(input_shape)
    if len(shape) != 3 or any(size not in (None, given) for size, given in zip(known, shape, strict=True)):
        raise ValueError(f"Expected input_shape like the model's, {known}. Received: input_shape={input_shape}")
    return shape


def sized(model: keras.Model, size: tuple[int, int]) -> tuple[int, ...]:
    """An image's shape of a height and a width, wherever the model has its channels.

    Args:
        model: A functional or sequential model.
        size: Pair of integers.

    Returns:
        Tuple of integers.
    """
    shape = tuple(model.inputs[0].shape[1:])
    return (*size, shape[-1]) if shape[-1] is not None and shape[-1] <= 4 else (shape[0], *size)


def outputs_of(model: keras.Model) -> list[str] | int | None:
    """How a model's outputs are put together.

    Args:
        model: A functional or sequential model.

    Returns:
        None for one array, the names of a dict's arrays, or the number of them.
    """
    structure = None if isinstance(model, keras.Sequential) else model.output
    match structure:
        case dict():
            return sorted(structure)
        case list() | tuple():
            return len(structure)
    return None


def pixels_of(images: Any, read: Callable[[Any], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Images as an array: they are one, or the paths or bytes of photographs.

    Args:
        images: Array (count, *shape), or a sequence of paths of files or folders, or of bytes.
        read: Function from a path or bytes to pixels.
        shape: Tuple of integers, an image's.

    Returns:
        float32 array.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there is none, or they have another shape.
    """
    if isinstance(images, str | bytes | os.PathLike):
        images = [images]
    if not hasattr(images, "shape") and len(images) and isinstance(images[0], str | bytes | os.PathLike):
        found = [each if isinstance(each, bytes) else folders.photographs([each]) for each in images]
        images = [read(one) for each in found for one in ([each] if isinstance(each, bytes) else each)]
    array = np.asarray(images, "float32")
    if array.ndim != 4 or array.shape[1:] != shape or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"Expected images of shape (count, {', '.join(map(str, shape))}). Received: {array.shape}")
    return array


def _own_photographs(read, shape: tuple[int, ...], count: int = 100) -> np.ndarray:
    """Two photographs of this package, and crops of them, in order of how much of them is seen."""
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


def _metadata(model, shape, precision: str, labels) -> dict[str, Any]:
    outputs = model.outputs[0].shape[-1]
    record = getattr(model, "weights_record", None)
    if labels is None and record is not None and outputs == 1000:
        labels = [name for _, name in class_names.classes()]
    try:
        holder, reading = inspection.find(model)
        record = record or getattr(holder, "weights_record", None)
        pixels: dict[str, Any] = {"scale": list(reading.scale), "offset": list(reading.offset)}
    except ValueError:
        pixels = {}
    if record is not None:
        pixels |= {"crop_padding": record.crop_padding, "interpolation": record.interpolation}
    if labels is not None and len(labels) != outputs:
        raise ValueError(f"Expected a label for each of the model's {outputs} outputs. Received: {len(labels)} labels")
    told = record and {key: value for key, value in asdict(record).items() if key != "files"}
    return {
        "model": model.name,
        "input_shape": list(shape),
        "outputs": outputs_of(model),
        "pixels": "0-255",
        "preprocessing": pixels | {"inside": True},
        "precision": precision,
        "weights": told,
        "labels": None if labels is None else list(map(str, labels)),
    }

"""Converts whole models of Keras 2, and compares the outputs of old and new where TensorFlow can run the old one."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet import model_metadata
from keras_effnet.nets.normalization import constants
from keras_effnet.weights.keras2 import padding
from keras_effnet.weights.keras2.files import OldModel, opened_model
from keras_effnet.weights.keras2.layers import Foreign, ForeignLayerError
from keras_effnet.weights.keras2.rebuild import rebuild

if TYPE_CHECKING:
    import keras

# Runs a SavedModel in a process of its own, so that whatever its graph does ends with that process.
_RUN = """
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
call = model.signatures["serving_default"]
((name, spec),) = call.structured_input_signature[1].items()
arrays = np.load(sys.argv[2])
found = {}
for batch in arrays.files:
    outputs = call(**{name: tf.cast(arrays[batch], spec.dtype)})
    found |= {f"{batch} {key}": value.numpy() for key, value in outputs.items()}
np.savez(sys.argv[3], **found)
"""

_MINUTES = 10


@dataclass(frozen=True)
class Conversion:
    """What `convert()` has done.

    Args:
        model: String. Name of the model.
        path: String. The file that was saved.
        writer: String. The program that wrote the source, or empty where it was read by its names.
        left: Tuple of strings: what the source holds and the new file does not, and why.
        difference: Float, the largest difference of the outputs in their standard deviations, or None where they were
            not compared.
    """

    model: str
    path: str
    writer: str = ""
    left: tuple[str, ...] = ()
    difference: float | None = None


def convert(
    source_path,
    path,
    model: str | None,
    preprocessing: Any,
    labels: Sequence[str] | None,
    verify: bool,
) -> Conversion | Foreign | None:
    """Converts a whole model of Keras 2 to a `.keras` file.

    Args:
        source_path: Path of the file to convert.
        path: Path of the file to save.
        model: Name of the model that is expected, or None for any.
        preprocessing: See `convert.convert_file()`. A Rescaling layer in front of the model, or None for none.
        labels: List of class names, or None.
        verify: Boolean, whether to compare the outputs with those of a SavedModel.

    Returns:
        A `Conversion`; the first layer that Keras 3 cannot rebuild, as a `Foreign`; or None where the file holds no
        whole model of Keras 2.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the file is damaged, or holds no EfficientNet, or the outputs cannot be compared.
    """
    place = Path(source_path)
    if not place.exists():
        return None
    with opened_model(place) as old:
        if old is None:
            return None
        try:
            made = model_of(old, place)
            name = net_of(made)
        except ForeignLayerError as error:
            return error.foreign
    if model not in (None, name):
        raise ValueError(f"Expected {model!r}. Received: {str(place)!r}, which holds {name!r}")
    if verify and not old.saved_model:
        raise ValueError(f"Expected a SavedModel, which TensorFlow can run. Received: {str(place)!r} of {old.writer}")
    difference = largest_difference(made, place) if verify else None
    if preprocessing is not None:
        if _has_preprocessing(made):
            raise ValueError(
                f"Expected a model that takes normalized pixels. Received: {str(place)!r}, which normalizes them "
                "itself. Omit preprocessing"
            )
        made = _rescaled(made, *constants(preprocessing, made.inputs[0].shape[-1]))
    model_metadata.save_model(made, path, labels)
    return Conversion(name, os.fspath(path), old.writer, left_of(made), difference)


def padding_of(path: Any, resolution: int) -> str:
    """Returns where a file's net pads otherwise than this package, in words.

    Args:
        path: Path of any file.
        resolution: Integer. See `padding.difference()`.

    Returns:
        String, empty where both agree, or the file describes no model of Keras 2.
    """
    if not Path(path).exists():
        return ""
    with opened_model(Path(path)) as old:
        return padding.difference(old.config, resolution) if old else ""


def left_of(model: "keras.Model") -> tuple[str, ...]:
    """Returns what a rebuilt model lacks, in words: the normalization of pixels, if its program did that itself.

    Args:
        model: A `keras.Model`.
    """
    return () if _has_preprocessing(model) else (NO_PREPROCESSING,)


def head_of(model: "keras.Model") -> tuple[str, ...]:
    """Returns the layers around the EfficientNet of a model, in words.

    Args:
        model: A `keras.Model` with one EfficientNet.
    """
    from keras_effnet import compat
    from keras_effnet.nets import inspection

    holder, _ = inspection.find(model, others=True)
    inside = {id(layer) for layer in holder.layers} if holder is not model else set()
    found = []
    for layer in compat.all_layers(model):
        kind, config = type(layer).__name__, layer.get_config()
        own = holder is model and (_OF_THE_NET.search(layer.name) or kind in ("Rescaling", "Normalization"))
        if id(layer) in inside or own or kind in ("InputLayer", "Functional", "Sequential"):
            continue
        values = [config.get(key) for key in ("units", "rate", "activation")]
        said = ", ".join(str(each) for each in values if each not in (None, "linear"))
        found.append(f"{kind}({said})" if said else kind)
    return tuple(found)


_OF_THE_NET = re.compile(r"(^|_)(stem_|block\d+[a-z]+_|top_conv|top_bn|top_activation)")


NO_PREPROCESSING = (
    "the normalization of pixels, which the program did before the model. To add it to the model, pass --preprocessing "
    "imagenet, inception or tpu127"
)


def net_of(model: "keras.Model") -> str:
    """Returns the name of the EfficientNet in a model.

    Args:
        model: A `keras.Model`.

    Raises:
        ForeignLayerError: If it has none, or several.
    """
    from keras_effnet.nets import inspection
    from keras_effnet.nets.variants import identify

    try:
        reading = inspection.find(model, others=True)[1]
    except ValueError as error:
        reason = "its layers are not those of one EfficientNet, as keras.applications names them"
        raise ForeignLayerError(Foreign(model.name, reason)) from error
    return identify(reading.architecture.blocks) or reading.architecture.name


def _has_preprocessing(model: "keras.Model") -> bool:
    """Returns whether a model normalizes its pixels itself."""
    import keras

    kinds = (keras.layers.Rescaling, keras.layers.Normalization)
    return any(
        isinstance(layer, kinds) or (isinstance(layer, keras.Model) and _has_preprocessing(layer))
        for layer in model.layers
    )


def _rescaled(model: "keras.Model", scale: list[float], offset: list[float]) -> "keras.Model":
    """Returns a model that takes pixels 0-255, for one that takes normalized ones."""
    import keras

    inputs = keras.Input(model.inputs[0].shape[1:])
    rescaling: Any = keras.layers.Rescaling
    layer = rescaling(scale, offset, name="preprocessing")
    return keras.Model(inputs, model(layer(inputs)), name=model.name)


def model_of(old: OldModel, path: Path) -> "keras.Model":
    """Rebuilds a model of Keras 2 in Keras 3.

    Args:
        old: An `OldModel`, whose file is still open.
        path: Path to name in errors.

    Returns:
        A `keras.Model`.

    Raises:
        ForeignLayerError: If Keras 3 cannot rebuild a layer.
        ValueError: If the file is damaged, or has other variables than its model.
    """
    try:
        model, taken = rebuild(old.class_name, old.config, old.find)
        if taken != old.variables:
            raise ValueError(f"its layers have {taken} variables, and it holds {old.variables}")
    except ValueError as error:
        from keras_effnet.weights.keras2.layers import ForeignLayerError

        if isinstance(error, ForeignLayerError):
            raise
        raise ValueError(f"Expected a model of Keras 2. Received: {str(path)!r}, but {error}") from error
    for layer in model.layers:  # the nets' usual names, by which they are recognised
        layer.name = old.renamed.get(layer.name, layer.name)
    return model


def largest_difference(model: "keras.Model", path: Path) -> float:
    """Compares a rebuilt model with the SavedModel that it came from, on random pixels and on the bundled photos.

    Args:
        model: A `keras.Model`.
        path: Path of the SavedModel. TensorFlow runs its graph, in a process of its own.

    Returns:
        Float. The largest difference of an output, relative to the standard deviation of the outputs.

    Raises:
        ImportError: If TensorFlow is not installed.
        ValueError: If the SavedModel cannot be run.
    """
    images = _images(model)
    with tempfile.TemporaryDirectory(prefix="keras_effnet-") as folder:
        sent, back = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(sent, *images)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _RUN, path, sent, back], capture_output=True, text=True, timeout=60 * _MINUTES
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"Expected outputs within {_MINUTES} minutes. Received: none of {str(path)!r}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"Expected a SavedModel that TensorFlow runs. Received: {str(path)!r} ({last[:200]})")
        with np.load(back) as found:
            theirs = {key: found[key] for key in found.files}
    predictor: Any = model
    differences = []
    for number, batch in enumerate(images):
        outputs = predictor.predict(batch, verbose=0)
        names = getattr(model, "output_names", None) or [model.layers[-1].name]  # a sequential model has one output
        ours = dict(zip(names, outputs if isinstance(outputs, list) else [outputs], strict=True))
        named = {key.partition(" ")[2]: value for key, value in theirs.items() if key.startswith(f"arr_{number} ")}
        if len(ours) == len(named) == 1:
            named = dict(zip(ours, named.values(), strict=True))
        if ours.keys() != named.keys():
            received = f"{', '.join(named)} of {str(path)!r}"
            raise ValueError(f"Expected outputs called {', '.join(ours)}. Received: {received}")
        differences += [_difference(ours[name], named[name]) for name in ours]
    return max(differences)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / max(float(other.std()), 1e-12))


def _images(model: "keras.Model") -> list[np.ndarray]:
    """Returns batches of random pixels and of photos, in the shape of the model's input."""
    from PIL import Image

    shape = zip(model.inputs[0].shape[1:], (224, 224, 3), strict=True)
    height, width, channels = (size or default for size, default in shape)
    noise = np.random.default_rng(0).integers(0, 256, (4, height, width, channels))
    batches = [noise]
    if channels == 3:
        folder = Path(str(files("keras_effnet"))) / "images" / "photographs"
        resized = [Image.open(path).convert("RGB").resize((width, height)) for path in sorted(folder.glob("*.jpg"))]
        batches.append(np.stack([np.asarray(photo) for photo in resized]))
    return [batch.astype("float32") for batch in batches]

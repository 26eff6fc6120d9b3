"""Runs a SavedModel in TensorFlow, and compares its outputs with those of the model that was rebuilt from it."""

import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

# The largest difference in standard deviations, by the type that layers compute in. Both programs round: in float32 by
# 2e-5, in mixed_float16 by 2e-3 (bfloat16 has an eighth of float16's precision).
BOUNDS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}

# Runs a SavedModel in a process of its own, so that whatever its graph does ends with that process. Arrays are called
# by their batch and the name of an input or output.
_RUN = """
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
call = model.signatures["serving_default"]
specs = call.structured_input_signature[1]
batches = {}
for key, array in np.load(sys.argv[2]).items():
    batch, _, name = key.partition(" ")
    batches.setdefault(batch, {})[name] = array
found = {}
for batch, given in batches.items():
    if len(given) == len(specs) == 1:
        given = dict(zip(specs, given.values()))
    if given.keys() != specs.keys():
        sys.exit("its inputs are called " + ", ".join(specs) + ", and those of the new model " + ", ".join(given))
    outputs = call(**{name: tf.cast(given[name], spec.dtype) for name, spec in specs.items()})
    found |= {f"{batch} {key}": value.numpy() for key, value in outputs.items()}
np.savez(sys.argv[3], **found)
"""

_MINUTES = 10

_LEAST = 1e-3  # of the largest output: outputs that hardly depend on the image deviate by no more than they are rounded


def check(model: "keras.Model", path: Path) -> float:
    """Compares a rebuilt model with the SavedModel that it came from, on random inputs and on the bundled photos.

    Args:
        model: A `keras.Model`.
        path: Path of the SavedModel. TensorFlow runs its graph, in a process of its own.

    Returns:
        Float. The largest difference of an output, relative to the standard deviation of this output.

    Raises:
        ImportError: If TensorFlow is not installed.
        ValueError: If the SavedModel cannot be run, or its outputs differ by more than rounding.
    """
    found = largest_difference(model, path)
    bound = max(BOUNDS.get(str(variable), BOUNDS["float32"]) for variable in _types(model))
    if not found <= bound:
        raise ValueError(
            f"Expected outputs that differ by at most {bound:.0e} of their standard deviation. Received: "
            f"{str(path)!r}, whose rebuilt model differs by {found:.1e}. Nothing is saved"
        )
    return found


def _types(model: "keras.Model") -> set[str]:
    from keras_effnet import compat

    return {str(layer.compute_dtype) for layer in compat.all_layers(model)}


def largest_difference(model: "keras.Model", path: Path) -> float:
    """Returns the largest difference of an output, relative to its standard deviation. See `check()`.

    Args:
        model: A `keras.Model`.
        path: Path of the SavedModel.
    """
    import keras

    batches = _batches(model)
    theirs = _run(batches, path)
    predictor: Any = model
    ours: list[dict[str, np.ndarray]] = []
    for batch in batches:
        given = keras.tree.map_structure(lambda tensor, batch=batch: batch[tensor.name], inputs_of(model))
        outputs = keras.tree.flatten(predictor.predict(given, verbose=0))
        ours.append(dict(zip(_output_names(model), outputs, strict=True)))
    if len(ours[0]) == len(theirs[0]) == 1:
        theirs = [dict(zip(ours[0], each.values(), strict=True)) for each in theirs]
    if ours[0].keys() != theirs[0].keys():
        received = f"{', '.join(theirs[0])} of {str(path)!r}"
        raise ValueError(f"Expected outputs called {', '.join(ours[0])}. Received: {received}")
    return max(_difference([each[name] for each in ours], [each[name] for each in theirs]) for name in ours[0])


def inputs_of(model: Any) -> Any:
    """Returns the inputs of a model in the structure in which it takes them.

    Args:
        model: A functional or sequential `keras.Model`.

    Returns:
        A Keras tensor, or a list or dict of several.
    """
    from keras_effnet import compat

    return model.input if compat.is_functional(model) else model.inputs[0]


def _run(batches: list[dict[str, np.ndarray]], path: Path) -> list[dict[str, np.ndarray]]:
    """Returns the outputs of a SavedModel by their names, for each batch."""
    with tempfile.TemporaryDirectory(prefix="keras_effnet-") as folder:
        sent, back = Path(folder) / "in.npz", Path(folder) / "out.npz"
        named = {f"{number} {name}": array for number, batch in enumerate(batches) for name, array in batch.items()}
        np.savez(sent, **named)  # pyright: ignore[reportArgumentType]
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
            arrays = {key: found[key] for key in found.files}
    return [
        {key.partition(" ")[2]: array for key, array in arrays.items() if key.startswith(f"{number} ")}
        for number in range(len(batches))
    ]


def _output_names(model: Any) -> list[str]:
    """Returns the names that Keras 2 gives to outputs: those of their layers, numbered where they are equal."""
    given = getattr(model, "output_names", None) or [model.layers[-1].name]  # a sequential model has one output
    names: list[str] = []
    for name in given:
        told, number = name, 0
        while told in names:
            number += 1
            told = f"{name}_{number}"
        names.append(told)
    return names


def _difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Returns the largest difference of one output over all batches."""
    one, other = (np.concatenate([np.asarray(each, np.float64) for each in arrays]) for arrays in (ours, theirs))
    if one.shape != other.shape:
        raise ValueError(f"Expected outputs of the shape {one.shape[1:]}. Received: {other.shape[1:]}")
    scale = max(float(other.std()), _LEAST * float(np.abs(other).max()), 1e-12)
    return float(np.abs(one - other).max() / scale)


def _batches(model: "keras.Model") -> list[dict[str, np.ndarray]]:
    """Returns a batch of random inputs and one with photos, each by the names of the model's inputs."""
    random = np.random.default_rng(0)
    photos = _photographs() if any(_takes_photos(tensor.shape) for tensor in model.inputs) else []
    return [
        {tensor.name: _values(tensor, count, random, batch) for tensor in model.inputs}
        for count, batch in ((4, []), (len(photos), photos))
        if count
    ]


def _takes_photos(shape: tuple) -> bool:
    return len(shape) == 4 and shape[-1] in (3, None)


def _values(tensor: Any, count: int, random: np.random.Generator, photos: list) -> np.ndarray:
    if len(tensor.shape) != 4:
        shape = (count, *(size or 4 for size in tensor.shape[1:]))
        integers = "int" in str(tensor.dtype)
        return random.integers(0, 2, shape) if integers else random.normal(size=shape).astype("float32")
    height, width, channels = (size or own for size, own in zip(tensor.shape[1:], (224, 224, 3), strict=True))
    if photos and _takes_photos(tensor.shape):
        return np.stack([np.asarray(photo.resize((width, height))) for photo in photos]).astype("float32")
    return random.integers(0, 256, (count, height, width, channels)).astype("float32")


def _photographs() -> list:
    from PIL import Image

    folder = Path(str(files("keras_effnet"))) / "images" / "photographs"
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]

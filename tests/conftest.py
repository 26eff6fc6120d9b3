"""What the tests share: reference values, and models that are filled with seeded weights."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

from keras_effnet import blocks
from keras_effnet.weights import convert, namemaps

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from seeded_weights import image, seeded  # noqa: E402

BACKEND = keras.backend.backend()


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def fill(model: keras.Model) -> keras.Model:
    """Gives every variable the seeded value of its name in the original."""
    reading = blocks.read(model)
    names = convert.foreign_names(reading, namemaps.TPU)
    shapes = {(name, weight.name): weight.shape for name, layer in reading.layers.items() for weight in layer.weights}
    tensors = {f"net/{name}": seeded(f"net/{name}", shapes[ours]) for ours, (name, _) in names.items()}
    convert.assign(model, tensors, namemaps.TPU, "seeded weights")
    return model


def run(model: keras.Model, x) -> np.ndarray:
    # JAX compiles an eager call operation by operation; the others compile a model more slowly than they run it once.
    outputs = model.predict_on_batch(x) if BACKEND == "jax" else model(keras.ops.convert_to_tensor(x), training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def same_weights(one: keras.Model, other: keras.Model) -> bool:
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture
def photograph() -> str:
    return str(ROOT / "docs" / "cat.png")


__all__ = ["BACKEND", "GOLDEN", "ROOT", "fill", "golden", "image", "run", "same_weights", "seeded"]

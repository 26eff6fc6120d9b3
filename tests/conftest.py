"""What the tests share: reference values, and models that are filled with seeded weights."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Or each process with JAX asks libtpu for a TPU, which one process at a time may do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import keras
import numpy as np
import pytest

from keras_effnet import blocks
from keras_effnet.variants import VARIANTS
from keras_effnet.weights import convert, namemaps
from keras_effnet.weights.layouts import LAYOUTS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
gc.freeze()  # what was imported stays: looking through it took an eighth of the tests' time
sys.path.insert(0, str(GOLDEN))

from seeded_weights import image, seeded  # noqa: E402

BACKEND = keras.backend.backend()

# A commit passes or fails: the same examples in each run. HYPOTHESIS_PROFILE=default looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Keras goes through L2's graph in 890 nested calls, to which pytest and its workers add theirs.
sys.setrecursionlimit(3000)


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def fill(model: keras.Model) -> keras.Model:
    """Gives every variable the seeded value of its name in the original."""
    reading = blocks.read(model)
    names = convert.foreign_names(reading.architecture, namemaps.TPU, reading.channels, reading.classes)
    for (layer, variable), name in names.items():
        target = next(weight for weight in reading.layers[layer].weights if weight.name == variable)
        target.assign(seeded_as("net", name))
    return model


def seeded_as(scope: str, name: convert.Name) -> np.ndarray:
    """Our array of what the original's variable of that name is filled with."""
    layout = LAYOUTS[name.layout]
    return layout.to_keras(seeded(f"{scope}/{name.foreign}", layout.from_keras(np.empty(name.shape)).shape), name.shape)


def save_checkpoint(prefix, tensors: dict[str, np.ndarray]) -> str:
    """Writes a checkpoint as the original does, with TensorFlow's own Saver of TensorFlow 1."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        variables = {name: v1.Variable(value, name=name, use_resource=False) for name, value in tensors.items()}
        session.run(v1.global_variables_initializer())
        return v1.train.Saver(variables).save(session, os.fspath(prefix), write_meta_graph=False)


def lite0_package() -> Path:
    """The genuine weights of Lite0, as their package has them."""
    from importlib.metadata import distribution

    from keras_effnet.weights import registry

    file = next(file for file in registry.find("efficientnet-lite0", "imagenet").files if file.package)
    return Path(str(distribution(file.package).locate_file(file.path)))


def run(model: keras.Model, x) -> np.ndarray:
    # JAX compiles an eager call operation by operation; the others compile a model more slowly than they run it once.
    outputs = model.predict_on_batch(x) if BACKEND == "jax" else model(keras.ops.convert_to_tensor(x), training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def same_weights(one: keras.Model, other: keras.Model) -> bool:
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random values, whatever ran before it in its process."""
    keras.utils.set_random_seed(0)


def make_shallow() -> None:
    """Leaves the tables' nets one block in each stage, two in the second: where depth is not what a test is about.

    Tracing and compiling a training step takes a third to half of the time.
    """
    for name, variant in VARIANTS.items():
        numbered = enumerate(variant.stages)
        stages = tuple(replace(stage, repeats=min(stage.repeats, 2 if n == 1 else 1)) for n, stage in numbered)
        VARIANTS[name] = replace(variant, stages=stages, depth=1.0)


@pytest.fixture
def shallow(monkeypatch):
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, variant)
    make_shallow()


@pytest.fixture
def photograph() -> str:
    return str(ROOT / "docs" / "cat.png")


__all__ = [
    "BACKEND",
    "GOLDEN",
    "ROOT",
    "fill",
    "golden",
    "image",
    "lite0_package",
    "make_shallow",
    "run",
    "same_weights",
    "save_checkpoint",
    "seeded",
    "seeded_as",
]

"""Shared by all tests: reference values, models filled with seeded weights, and the command in its own process."""

import gc
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Otherwise, each process with JAX asks libtpu for a TPU, which only one process at a time may do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
import numpy as np
import pytest

from keras_effnet.nets import inspection
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS, identify, nearest, of_timm
from keras_effnet.weights import name_translation, naming_tables
from keras_effnet.weights.layouts import LAYOUTS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
gc.freeze()  # imported modules stay: collecting garbage among them took an eighth of the tests' time
sys.path.insert(0, str(GOLDEN))

import seeded_weights  # noqa: E402
from seeded_weights import image as image  # noqa: E402

BACKEND = keras.backend.backend()


def seeded(name: str, shape, fan_in: int | None = None) -> np.ndarray:
    """Returns the values of a variable. Each is drawn once in a process."""
    key = name, tuple(shape), fan_in
    if key not in _SEEDED:
        _SEEDED[key] = seeded_weights.seeded(*key)
        _SEEDED[key].flags.writeable = False
    return _SEEDED[key]


_SEEDED: dict[tuple, np.ndarray] = {}


# The browser that tests look with, or None, and flags with which it asks no other host for anything.
CHROMIUM = shutil.which("chromium")
BROWSING = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Options that make `keras-effnet train digits_demo` run for seconds.
SHORT = [
    "--epochs",
    "0.5",
    "--batch-size",
    "32",
    "--model.image-size",
    "32",
    "--run.steps-per-loop",
    "5",
    "--run.save-every",
    "0.2",
    "--run.eval-every",
    "0.3",
    "--run.eval-batch",
    "64",
    "--run.no-report",
]


def modules() -> list[str]:
    """Returns the names of all modules of the package."""
    folders = {
        "keras_effnet": ROOT / "keras_effnet",
        "keras_effnet.tpu": ROOT / "tpu",
        "keras_effnet.weights": ROOT / "weights",
    }
    found = []
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):  # does not follow the links to tpu/ and weights/
            parts = path.relative_to(folder).with_suffix("").parts
            found.append(".".join([package, *parts]).removesuffix(".__init__"))
    return sorted(set(found) - {"keras_effnet.__main__"})


def arrays(path) -> dict[str, np.ndarray]:
    """Loads all arrays of an .npz file, and closes it."""
    with np.load(path) as file:
        return dict(file)


def golden(name: str) -> dict:
    """Loads a JSON file of reference values from tests/golden."""
    return json.loads((GOLDEN / name).read_text())


def leading(values, count: int) -> list:
    """Returns parameters for a test: CI has room for the first ones, and `pytest -m long` runs the others."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=() if n < count else pytest.mark.long) for n, row in enumerate(rows)]


def fill(model: keras.Model) -> keras.Model:
    """Sets every variable to the seeded value of its name in the original."""
    reading = inspection.read(model)
    names = name_translation.foreign_names(reading.architecture, naming_tables.TPU, reading.channels, reading.classes)
    for (layer, variable), name in names.items():
        target = next(weight for weight in reading.layers[layer].weights if weight.name == variable)
        target.assign(seeded_as("net", name))
    return model


def seeded_as(scope: str, name: name_translation.Name) -> np.ndarray:
    """Returns the seeded value of a variable of the original, in Keras' layout."""
    layout = LAYOUTS[name.layout]
    return layout.to_keras(seeded(f"{scope}/{name.foreign}", layout.from_keras(np.empty(name.shape)).shape), name.shape)


def save_checkpoint(prefix, tensors: dict[str, np.ndarray]) -> str:
    """Saves a checkpoint as the original does, with the operation that the Saver of TensorFlow 1 runs."""
    import tensorflow as tf

    prefix = Path(prefix)
    values = [tf.constant(value) for value in tensors.values()]
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=[*tensors], shape_and_slices=[""] * len(tensors), tensors=values)
    (prefix.parent / "checkpoint").write_text(f'model_checkpoint_path: "{prefix.name}"\n')
    return str(prefix)


def timm_tensors(name: str) -> dict[str, np.ndarray]:
    """Returns timm's state dict with the values of its reference."""
    tensors = {}
    # A kernel's output sums over all of our axes except the last and, for mixed experts, the first.
    shapes = name_translation.foreign_names(resolve(VARIANTS[of_timm(name)[0]]), naming_tables.TIMM).values()
    sums = {one.foreign: one.shape[1 if len(one.shape) == 5 else 0 : -1] for one in shapes}
    for key, shape in golden(f"timm/{name}.json")["state_dict"]:
        if key.endswith("num_batches_tracked"):
            tensors[key] = np.zeros((), np.int64)
        else:
            taps = sums[key][:2] if "conv_dw" in key else sums[key]
            tensors[key] = seeded(key, shape, int(np.prod(taps)) if len(shape) > 1 else None)
    return tensors


def save_torch(tensors, path):
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        torch.save(state, path, _use_new_zipfile_serialization=path.stem == "zip")
    return path


def lite0_package() -> Path:
    """Returns the path of Lite0's genuine weights in their package."""
    from importlib.metadata import distribution

    from keras_effnet.weights import registry

    file = next(file for file in registry.find("efficientnet-lite0", "imagenet").files if file.package)
    return Path(str(distribution(file.package).locate_file(file.path)))


def run(model: keras.Model, x) -> np.ndarray:
    """Returns the outputs of a model for a batch, as NumPy arrays."""
    # JAX compiles an eager call operation by operation. The others compile a model more slowly than they run it once.
    outputs = model.predict_on_batch(x) if BACKEND == "jax" else model(keras.ops.convert_to_tensor(x), training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def same_weights(one: keras.Model, other: keras.Model) -> bool:
    """Returns whether the weights of two models are equal, bit by bit."""
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@contextmanager
def shallow_nets(stages: int | None = None):
    """Reduces all variants to one block per stage, and two in the second, for tests that do not depend on depth.

    Tracing and compiling a training step then takes a third to half of the time.

    Args:
        stages: Integer, how many of the first stages stay. Three have the same kinds of layers as all, except in nets
            with mixed experts or two kinds of blocks, and take half of the time. Defaults to all.
    """
    import keras_effnet.models  # makes a function for each variant
    import keras_effnet.weights.registry  # noqa: F401  and a record for each of their sets

    before = dict(VARIANTS)
    for name, variant in before.items():
        if name.endswith("-pruned"):  # a row of widths for each of its blocks
            del VARIANTS[name]
            continue
        numbered = enumerate(variant.stages)
        kept = tuple(replace(stage, repeats=min(stage.repeats, 2 if n == 1 else 1)) for n, stage in numbered)
        VARIANTS[name] = replace(variant, stages=kept[:stages], depth=1.0)
    forget_variants()
    try:
        yield
    finally:
        VARIANTS.clear()
        VARIANTS.update(before)
        forget_variants()


def shallow_rows() -> list[dict]:
    """Returns the blocks of keras.applications' EfficientNets, as few as `shallow_nets()` leaves ours."""
    from keras.src.applications import efficientnet  # the public module has no nets of other depths

    rows = enumerate(efficientnet.DEFAULT_BLOCKS_ARGS)
    return [row | {"repeats": min(row["repeats"], 2 if n == 1 else 1)} for n, row in rows]


def forget_variants() -> None:
    """Empties the caches of what was looked up in the table of variants."""
    identify.cache_clear()
    nearest.cache_clear()


def trained(model):
    """Sets batch-norm statistics and scales far from 0 and 1, as after training, and returns the model."""
    random = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(random.uniform(0.7, 1.3, weight.shape))
        elif weight.name in ("beta", "moving_mean"):
            weight.assign(random.normal(0, 0.3, weight.shape))
    return model


def invoked(*arguments) -> subprocess.CompletedProcess:
    """Runs `keras-effnet` in this process, which needs no seconds to start."""
    from click.testing import CliRunner

    from keras_effnet.commands import main

    line = [*map(str, arguments)]
    done = CliRunner().invoke(main, line, prog_name="keras-effnet")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(line, done.exit_code, done.stdout, done.stderr)


def command(*arguments, cwd=None, **environment):
    """Runs `keras-effnet` in its own process."""
    line = [str(Path(sys.executable).parent / "keras-effnet"), *map(str, arguments)]
    return subprocess.run(
        line, capture_output=True, text=True, cwd=cwd, env={**os.environ, "KERAS_BACKEND": BACKEND, **environment}
    )


def tiny(shape: tuple = (32, 40, 3), classes: int = 3, activation: str | None = "softmax") -> keras.Model:
    """Returns a user's own classifier of a few layers, for tests that do not depend on the net.

    Its export takes a fifth of the time of that of a shallow EfficientNet.
    """
    layers, pixels = keras.layers, keras.Input(shape)
    x = layers.Rescaling([1 / 128] * shape[-1], [-1] * shape[-1], name="preprocessing")(pixels)
    for filters, name in ((8, "stem"), (16, "top")):
        x = layers.Conv2D(filters, 3, 2, "same", use_bias=False, name=f"{name}_conv")(x)
        x = layers.Activation("relu6", name=f"{name}_activation")(layers.BatchNormalization(name=f"{name}_bn")(x))
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return trained(keras.Model(pixels, layers.Dense(classes, activation, name="predictions")(x), name="tiny"))

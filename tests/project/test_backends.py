"""The same tests on Keras' other backends, each in a process of its own."""

import os
import subprocess
import sys

import pytest
from helpers import BACKEND, ROOT

# What CI has room for, and what it has not.
SLOW = {
    "jax": ("weights/test_convert.py",),
    "torch": ("test_models.py",),
}
_BOTH = (
    "inference/test_class_maps.py",
    "inference/test_export.py",
    "inference/test_folding.py",
    "inference/test_predictor.py",
    "inference/test_quantization.py",
    "commands/test_commands.py",
    "pruning/test_pruning.py",
)
LONG = {
    "jax": (
        *("nets/test_condconv.py", "tpu/runners/test_jax_fused.py"),
        *("tpu/step/test_train_step.py", "tpu/step/test_optimizers.py"),
        *_BOTH,
    ),
    "torch": ("nets/test_condconv.py", "weights/test_convert.py", *_BOTH),
}
FILES = [
    ("jax", "test_models.py"),
    *(pytest.param(backend, file, marks=pytest.mark.slow) for backend, files in SLOW.items() for file in files),
    *(pytest.param(backend, file, marks=pytest.mark.long) for backend, files in LONG.items() for file in files),
]
NETS = "efficientnet-b0 or condconv-b0-4e"
OWN = "channels_first and not global or bfloat16 or mixed_experts or drop_connect"
# Those in which a backend's variables are read, written or trained in ways of their own. JAX compiles an eager call
# operation by operation: its nets are compiled whole, as its users do.
CHOSEN = {
    "jax nets/test_condconv.py": "not eager and not fresh_process",
    # An ordinary net and one with mixed experts against the original, and what a backend computes in ways of its own.
    # CI has no time for the others. pruning/test_pruning.py trains on JAX.
    "jax test_models.py": f"original_outputs and ({NETS}) or {OWN}",
    "torch test_models.py": f"original_outputs and ({NETS}) or {OWN} or training_by_fit and b0",
    "inference/test_class_maps.py": "the_logit and (own or condconv or first) or linear_head",
    "inference/test_export.py": "swish or fresh_process",
    "inference/test_folding.py": "edgetpu-s or channels_first or border",
    "inference/test_predictor.py": "predict_gives and onnxruntime or any_size",
    "inference/test_quantization.py": "what_is_said and lite0",
    "commands/test_commands.py": "predict or convert",
    "pruning/test_pruning.py": "lite0-0 or slope or modules_differences or student_learns",
    "tpu/step/test_train_step.py": "originals or moving_variance",
    "weights/test_convert.py": ("round_trips and lite0 or own_head and weights or mixed_precision or all_or_nothing"),
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="started from the run on TensorFlow")
@pytest.mark.parametrize(("backend", "file"), FILES)
def test_backend(backend, file):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/{file}",
        "-k",
        CHOSEN.get(f"{backend} {file}") or CHOSEN.get(file, ""),
    ]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": backend}
    )
    assert result.returncode == 0, result.stdout[-6000:]

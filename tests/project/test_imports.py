"""What an import costs: the commands and names that work without Keras or a backend do not load them.

Who may import whom is in pyproject.toml: `lint-imports` checks it.
"""

import subprocess
import sys

import pytest
from helpers import ROOT

BACKENDS = ("keras", "tensorflow", "jax", "torch")


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("ke.describe('efficientnet-b0'); ke.list_models(); ke.weights", ("keras",)),
        ("ke.Predictor; import keras_effnet.inference.benchmark", (*BACKENDS, "onnxruntime")),
        (
            "ke.load_image('docs/cat.png', 'efficientnet-lite0', weights='imagenet'); "
            "ke.decode_predictions(numpy.eye(1000))",
            BACKENDS,
        ),
        ("import keras_effnet.commands", (*BACKENDS, "h5py", "matplotlib", "numpy", "PIL", "rich")),
    ],
)
def test_these_need_no_backend(code, names):
    code = f"import sys, keras_effnet as ke; {code}; print([name for name in {names} if name in sys.modules])"
    code = f"import numpy; {code}" if "numpy." in code else code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr

"""First contact is quiet: what libraries print and log is held back, and shown where the work fails."""

import os
import subprocess
import sys

import pytest
from helpers import BACKEND, ROOT

PROGRAM = """
import logging, os, sys, warnings
from keras_effnet.commands.output import spinner
with spinner("Preparing"):
    os.write(2, b"from a C++ library\\n")
    print("from Python's standard output")
    logging.getLogger("absl").warning("from a logger")
    warnings.warn("of ours")
    {end}
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize("end", ["pass", "raise ValueError('no room')", "1 / 0"])
def test_what_libraries_say_is_shown_only_where_the_work_fails(end):
    program = [sys.executable, "-c", PROGRAM.format(end=end)]
    result = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "" and "of ours" in result.stderr
    held = ("from a C++ library", "from Python's standard output", "from a logger")
    fails = end != "pass"
    assert [line in result.stderr for line in held] == [fails] * 3
    assert ("after" in result.stderr) is not fails


@pytest.mark.long  # .ci/run does the same with the README's first block
@pytest.mark.skipif(BACKEND != "tensorflow", reason="what TensorFlow prints")
def test_the_first_prediction_prints_no_other_librarys_log(tmp_path):
    """As in a fresh environment: nothing is cached, and no variable quiets TensorFlow."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS", "JAX_PLATFORMS", "KERAS_BACKEND"}
    environment = {key: value for key, value in os.environ.items() if key not in quiet}
    environment["KERAS_EFFNET_HOME"] = str(tmp_path)
    line = [os.path.join(os.path.dirname(sys.executable), "keras-effnet"), "predict", "docs/cat.png"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("docs/cat.png") and result.stdout.count("%") == 5

"""Whether TensorFlow, JAX and Keras start, each tried in a process of its own, and what training lacks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from keras_effnet.tpu.doctor.finding import Finding
from keras_effnet.tpu.doctor.versions import ON_A_TPU

TRAINING = ("tensorflow", "orbit", "tyro", "tensorflow_datasets", "importlib_resources")

# Of each backend: what else its runner needs, and what brings all.
RUNNERS = {
    "tensorflow": ((), "pip install 'keras_effnet[tensorflow,tpu]'"),
    "jax": (("jax", "orbax.checkpoint"), "pip install 'keras_effnet[tensorflow,tpu,jax]'"),
}

IMPORTED = {"tensorflow": "TensorFlow", "keras": "Keras", "jax": "JAX"}


QUESTIONS = {
    "tensorflow": """
import tensorflow as tf
answer = {"version": tf.__version__, "gpus": len(tf.config.list_physical_devices("GPU"))}
""",
    "keras": """
import keras
answer = {"version": keras.__version__, "backend": keras.backend.backend()}
""",
    "jax": """
import jax
answer = {"version": jax.__version__, "devices": [device.platform for device in jax.devices()]}
""",
}

MARK = "keras-effnet doctor: "


def ask(subjects: list[str], backend: str, held: bool, seconds: float = 60) -> dict[str, dict]:
    """Asks one after the other in a process of their own, whose end is no end of ours."""
    code = f"""
import json
for name, question in {[(name, QUESTIONS[name]) for name in subjects]!r}:
    found = {{}}
    try:
        exec(question, found)
        answer = found["answer"]
    except BaseException as error:
        answer = {{"error": f"{{type(error).__name__}}: {{error}}".strip().splitlines()[-1]}}
    print({MARK!r} + json.dumps({{name: answer}}), flush=True)
"""
    environment = {
        **os.environ,
        # TensorFlow imports Keras, whose backend is no fault of TensorFlow's.
        "KERAS_BACKEND": "tensorflow" if "tensorflow" in subjects else backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_LOAD_LIBRARY": "0",  # TensorFlow's, which takes the TPU by being imported (tpu_initializer_helper.cc)
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if held or subjects != ["jax"] or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        environment["JAX_PLATFORMS"] = "cpu"  # of several hosts each waits for all others
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=environment,
        )
        out, errors = done.stdout, done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode < 0:
            reason = f"the process was ended by {signal.Signals(-done.returncode).name}"
        else:
            reason = f"the process ended with status {done.returncode}"
        reason = ": ".join([reason, *errors[-1:]])
    except subprocess.TimeoutExpired as error:
        out, reason = error.stdout or b"", f"no answer in {seconds:g} s"
    except OSError as error:
        out, reason = b"", str(error)
    answers: dict[str, dict] = {}
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            answers |= json.loads(line.removeprefix(MARK))
    left = [name for name in subjects if name not in answers]
    return answers | ({left[0]: {"error": reason}} if left else {})


def started(row: Finding, answer: dict, name: str, needed: bool) -> Finding:
    """A package's row, with what its import said."""
    if "error" in answer:
        told = f"It does not start: {answer['error']}. Install it again: pip install --force-reinstall {name}"
        return replace(
            row,
            found="broken" if row.verdict == "none" else row.found,
            verdict="problem" if needed or row.verdict == "problem" else "warning",
            advice=". ".join(filter(None, (row.advice, told))),
        )
    if row.found == "not installed":
        return Finding(row.what, answer["version"], "warning", "It has no metadata, which tells what it fits")
    return row


def is_here(module: str) -> bool:
    try:
        return bool(find_spec(module))
    except (ImportError, ValueError):  # of what is no module's name
        return False


def keras_backend() -> tuple[str, str]:
    """Keras' backend, as `keras-effnet` chooses it, and who says so."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name, "KERAS_BACKEND"
    configured = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
    try:
        name = str(json.loads(configured.read_text()).get("backend", "tensorflow"))
        if is_here(name):
            return name, "keras.json"
    except (OSError, ValueError, AttributeError):
        pass
    return next((name for name in ("tensorflow", "jax", "torch") if is_here(name)), "tensorflow"), ""


def backend_finding(backend: str, told_by: str) -> Finding:
    found = f"{backend} ({told_by})" if told_by else backend
    if backend not in ("tensorflow", "jax", "torch"):
        return Finding("Keras backend", found, "problem", f"Expected tensorflow, jax or torch. Received: {backend}")
    if not is_here(backend):
        return Finding("Keras backend", f"{found} is not installed", "problem", f"pip install {backend}")
    return Finding("Keras backend", found, "ok")


def lacking(backend: str) -> tuple[list[str], str]:
    """What training with one of Keras' backends needs and is not here.

    Args:
        backend: String, a key of `RUNNERS`.

    Returns:
        Tuple of a list of modules, and of the command that brings all.
    """
    more, bring = RUNNERS[backend]
    return [name for name in (*TRAINING, *more) if not is_here(name)], bring


def training_finding(backend: str, broken: Sequence[str], on_tpu: bool) -> Finding:
    if backend not in RUNNERS:
        advice = "Training is TensorFlow's or JAX': --runner, or KERAS_BACKEND"
        return Finding("Training", f"not with KERAS_BACKEND={backend}", "problem", advice)
    missing, bring = lacking(backend)
    if missing:
        return Finding("Training", f"no {', '.join(missing)}", "problem", ON_A_TPU if on_tpu else bring)
    if broken:
        names = ", ".join(IMPORTED[name] for name in broken)
        return Finding("Training", f"{names} does not start", "problem", f"See {names}")
    return Finding("Training", "complete", "ok")

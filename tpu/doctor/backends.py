"""Checks whether TensorFlow, JAX and Keras can be imported, and what is missing for training."""

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

# By backend: the other modules that its runner needs, and the command that installs everything.
RUNNERS = {
    "tensorflow": ((), "pip install 'keras_effnet[tensorflow,tpu]'"),
    "jax": (("jax", "orbax.checkpoint"), "pip install 'keras_effnet[tensorflow,tpu,jax]'"),
}

IMPORTED = {"tensorflow": "TensorFlow", "keras": "Keras", "jax": "JAX"}  # modules and their rows

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
    """Imports modules one after the other in a separate process, which may crash.

    Args:
        subjects: List of keys of `QUESTIONS`.
        backend: String, Keras' backend.
        held: Boolean, whether another process holds the TPU.
        seconds: Float, timeout. Defaults to 60.

    Returns:
        Dict of answers by module, with an `error` for a module that fails. If the process ends early, the modules
        after that one are missing.
    """
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
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=_environment(subjects, backend, held),
        )
        out, errors = done.stdout, done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode < 0:
            reason = f"the process was killed by {signal.Signals(-done.returncode).name}"
        else:
            reason = f"the process exited with status {done.returncode}"
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
    """Adds the result of an import to a package's finding.

    Args:
        row: `Finding`.
        answer: Dict, an answer of `ask()`.
        name: String, the distribution to reinstall.
        needed: Boolean, whether training needs the package.

    Returns:
        A `Finding`.
    """
    if "error" in answer:
        advice = f"Reinstall it with: pip install --force-reinstall {name}. It does not start: {answer['error'][:200]}"
        return replace(
            row,
            found="broken" if row.verdict == "none" else row.found,
            verdict="problem" if needed or row.verdict == "problem" else "warning",
            advice=". ".join(filter(None, (row.advice, advice))),
        )
    if row.found == "not installed":
        return Finding(row.what, answer["version"], "warning", "Check its version by hand: it has no metadata")
    return row


def is_here(module: str) -> bool:
    """Returns whether a module is installed, without importing it."""
    try:
        return bool(find_spec(module))
    except (ImportError, ValueError):  # for a name that no module can have
        return False


def keras_backend() -> tuple[str, str]:
    """Returns Keras' backend as `keras-effnet` chooses it, and where it is set."""
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
    """Checks that Keras' backend is known and installed."""
    found = f"{backend} ({told_by})" if told_by else backend
    if backend not in ("tensorflow", "jax", "torch"):
        return Finding(
            "Keras backend", found, "problem", f"Set KERAS_BACKEND to tensorflow, jax or torch. Received: {backend}"
        )
    if not is_here(backend):
        return Finding(
            "Keras backend", f"{found} is not installed", "problem", f"Install it with: pip install {backend}"
        )
    return Finding("Keras backend", found, "ok")


def lacking(backend: str) -> tuple[list[str], str]:
    """Returns the modules that training needs and that are not installed.

    Args:
        backend: String, a key of `RUNNERS`.

    Returns:
        Tuple of a list of modules, and of the command that installs everything.
    """
    more, install = RUNNERS[backend]
    return [name for name in (*TRAINING, *more) if not is_here(name)], install


def training_finding(backend: str, broken: Sequence[str], on_tpu: bool) -> Finding:
    """Checks whether training can start.

    Args:
        backend: String, Keras' backend.
        broken: Sequence of keys of `IMPORTED`, the needed packages that do not start.
        on_tpu: Boolean, whether tensorflow-tpu is installed, which the extras do not install.

    Returns:
        A `Finding`.
    """
    if backend not in RUNNERS:
        advice = "Train with --runner tensorflow or --runner jax, or set KERAS_BACKEND to one of them"
        return Finding("Training", f"not with KERAS_BACKEND={backend}", "problem", advice)
    missing, install = lacking(backend)
    if missing:
        advice = ON_A_TPU if on_tpu else f"Install what is missing with: {install}"
        return Finding("Training", f"no {', '.join(missing)}", "problem", advice)
    if broken:
        names = ", ".join(IMPORTED[name] for name in broken)
        return Finding("Training", f"{names} does not start", "problem", f"See {names}")
    return Finding("Training", "complete", "ok")


def _environment(subjects: list[str], backend: str, held: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        # TensorFlow imports Keras; a broken backend of Keras must not count as an error of TensorFlow.
        "KERAS_BACKEND": "tensorflow" if "tensorflow" in subjects else backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_LOAD_LIBRARY": "0",  # otherwise importing TensorFlow takes the TPU (tpu_initializer_helper.cc)
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if held or subjects != ["jax"] or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        environment["JAX_PLATFORMS"] = "cpu"  # with several hosts, each waits for all others
    return environment

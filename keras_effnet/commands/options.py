"""Options that several commands share, and the backend that they choose."""

import contextlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

import click

BEST = click.option("--best", is_flag=True, help="Use a run's best.keras instead of its model.keras.")
MODEL = click.option(
    "--model",
    default="efficientnet-lite0",
    show_default=True,
    help="Name of a model, .keras file, folder of a run, or exported model.",
)
RECURSIVE = click.option("--recursive", is_flag=True, help="Search folders in folders too.")
PRECISION = click.option(
    "--precision", default="float32", show_default=True, help="float32, float16, int8 or bfloat16."
)
DECODE = click.option(
    "--decode",
    default="exact",
    show_default=True,
    help="exact; or fast, which shrinks large JPEGs while it decodes them. Some predictions may change.",
)
AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else."
)
RAW = click.option("--raw", is_flag=True, help="Load the raw weights instead of their moving average.")
RUNNER = click.option(
    "--runner",
    type=click.Choice(["tensorflow", "jax"]),
    help="Framework to train with. Default: KERAS_BACKEND, or tensorflow.",
)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu; cuda: an NVIDIA GPU; auto: the GPU, if onnxruntime-gpu finds one.",
)
RUNTIME = click.option(
    "--runtime", default="auto", show_default=True, help="litert, onnxruntime, openvino or keras. auto: the fastest."
)
SOURCE = click.option(
    "--from",
    "source",
    default="auto",
    show_default=True,
    help="Format of the names in the file: tpu, timm, keras or lukemelas. auto: detected.",
)
WEIGHTS = click.option(
    "--weights",
    default="imagenet",
    show_default=True,
    help="Tag of published weights, path of a weights file, or address (hf://owner/name).",
)


def comma_separated(ctx, parameter, value) -> list[str] | None:
    """Splits a comma-separated option: a callback for click."""
    return value and [part.strip() for part in value.split(",")]


def choose_backend() -> None:
    """Keeps the backend that Keras is configured for. If that is not installed, chooses the first that is."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "KERAS_BACKEND" in os.environ:
        return
    configured = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if find_spec(str(json.loads(configured.read_text()).get("backend", "tensorflow"))):
            return
    installed = [backend for backend in ("tensorflow", "jax", "torch") if find_spec(backend)]
    if not installed:
        raise ImportError(
            "Keras needs a backend. Expected TensorFlow, JAX or PyTorch. Received: none. "
            "Install one with: pip install tensorflow"
        )
    os.environ["KERAS_BACKEND"] = installed[0]


def need_training(runner: str | None = None) -> None:
    """Checks that all packages for training are installed, and sets Keras' backend."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if runner:
        os.environ["KERAS_BACKEND"] = runner
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    from keras_effnet.tpu.doctor.backends import RUNNERS, lacking

    if backend not in RUNNERS:
        raise ValueError(
            f"Training runs on {' or '.join(RUNNERS)}. Received: KERAS_BACKEND={backend}. Choose one with --runner"
        )
    missing, install = lacking(backend)
    if missing:
        raise ImportError(f"Expected the packages that training needs. Missing: {', '.join(missing)}. Run: {install}")

"""Measures training and inference on one GPU, beside keras.applications and timm, in at most 8 minutes.

    python benchmarks/gpu.py                           # on the machine with the GPU; nothing is downloaded
    python benchmarks/gpu.py --only training --minutes 4
    python benchmarks/gpu.py --small                   # tiny images and batches, for a machine without a GPU

Each row runs in a separate process, one after the other, the most important first. A row that the time left does not
allow is named as not measured. A package that is not installed is skipped with a message.

Training: images per second of a whole step with the same batch, which is in memory as uint8. Ours has the settings of
the recipe b0_baseline: RMSprop, label smoothing, weight decay, dropout, drop connect, top-1, top-5 and the moving
average of all variables. The peers do less: keras.applications' `fit()` with `jit_compile=True` has RMSprop, cross
entropy, dropout and drop connect; timm has the same with channels last, bfloat16 autocast and torch.compile. The start
of `fit()` counts, so its windows are longer.

Inference: `Predictor` and its peers with 1 and 64 images in the processor's memory.

Losses: those of 20 steps on the GPU beside those on the processor, in float32. Masks and batches are the same.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from inference import APPLICATIONS, TIMM
from timing import memory, spread, told

B0, B4, V2_S, CONDCONV = "efficientnet-b0", "efficientnet-b4", "efficientnetv2-s", "efficientnet-condconv-b0-8e"
WINDOWS = 5  # of which the median counts


@dataclass(frozen=True)
class Row:
    """What one process measures.

    Args:
        what: Key of `MEASURES`.
        model: String, name of the model.
        size: Integer, side of an image.
        batch: Integer, images of a step or a call.
        framework: `"tensorflow"`, `"jax"`, `"torch"` or `"onnxruntime"`.
        precision: `"float32"` or `"mixed_bfloat16"`.
        seconds: Float, length of a window.
    """

    what: str
    model: str = B0
    size: int = 224
    batch: int = 128
    framework: str = "tensorflow"
    precision: str = "mixed_bfloat16"
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.what} | {self.model} | {self.size} | {self.batch} | {self.framework} | {self.precision}"


def timed(row: Row, run: Callable[[int], object]) -> dict[str, Any]:
    """Returns images per second, by windows. `run` does a number of steps and waits for them."""
    begun = time.perf_counter()
    run(2)
    compiled = time.perf_counter() - begun
    begun = time.perf_counter()
    run(2)
    steps = max(1, round(row.seconds / ((time.perf_counter() - begun) / 2)))
    speeds = []
    for _ in range(WINDOWS):
        begun = time.perf_counter()
        run(steps)
        speeds.append(steps * row.batch / (time.perf_counter() - begun))
    return {"images per second": spread(speeds), "seconds to compile": compiled}


# Measures: functions of a row.


def ours(row: Row, xla: bool = False) -> dict[str, Any]:
    import tensorflow as tf
    from train import prepared

    *_, trainer = prepared(row.model, row.size, row.batch, row.precision, xla)
    return timed(row, lambda steps: trainer.train(tf.constant(steps)))


def ours_xla(row: Row) -> dict[str, Any]:
    return ours(row, True)


def losses(row: Row) -> dict[str, Any]:
    import tensorflow as tf
    from train import prepared

    *_, trainer = prepared(row.model, row.size, row.batch, row.precision)
    return {"losses": [float(trainer.train(tf.constant(1))["loss"]) for _ in range(20)]}


def applications_fit(row: Row) -> dict[str, Any]:
    import keras
    import tensorflow as tf
    from train import batch

    keras.mixed_precision.set_dtype_policy(row.precision)
    networks: Any = keras.applications
    model = getattr(networks, APPLICATIONS[row.model])(weights=None, input_shape=(row.size, row.size, 3))
    optimizer = keras.optimizers.RMSprop(1e-3, rho=0.9, momentum=0.9, epsilon=1e-3)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=has_gpu())
    data = tf.data.Dataset.from_tensors(batch(row.size, row.batch)).repeat().prefetch(tf.data.AUTOTUNE)
    # A step of Keras returns when it is issued; the metrics at the end of `fit()` wait for all.
    longer = replace(row, seconds=4 * row.seconds)
    return timed(longer, lambda steps: model.fit(data, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0))


def timm_training(row: Row) -> dict[str, Any]:
    import torch
    from train import batch

    library: Any = import_module("timm")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    model: Any = library.create_model(TIMM[row.model], drop_rate=0.2, drop_path_rate=0.2)
    model = torch.compile(model.to(device, memory_format=torch.channels_last).train())
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3, alpha=0.9, eps=1e-3, momentum=0.9)
    images, labels = batch(row.size, row.batch)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels last in memory
    targets = torch.from_numpy(labels).long().to(device)
    low = row.precision == "mixed_bfloat16"

    def train(steps: int) -> None:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            inputs = pixels.to(device, non_blocking=True).float() / 255
            with torch.autocast(device, torch.bfloat16, enabled=low):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        loss.item()

    return timed(row, train)


def predictor(row: Row) -> dict[str, Any]:
    import keras_effnet as ke

    run = ke.Predictor(row.model, weights=None)
    images = np.random.default_rng(0).integers(0, 256, (row.batch, *run.input_shape)).astype("float32")
    found = timed(row, lambda calls: [run(images) for _ in range(calls)])
    return found | {"runtime": f"{run.runtime} on {run.device}"}


def applications_call(row: Row) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    networks: Any = keras.applications
    model = getattr(networks, APPLICATIONS[row.model])(weights=None)
    call = tf.function(lambda x: model(x, training=False), jit_compile=has_gpu())
    images = np.random.default_rng(0).integers(0, 256, (row.batch, *model.input_shape[1:])).astype("float32")
    return timed(row, lambda calls: [call(tf.constant(images)).numpy() for _ in range(calls)])


def timm_call(row: Row) -> dict[str, Any]:
    import torch

    library: Any = import_module("timm")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = torch.compile(
        library.create_model(TIMM[row.model]).eval().to(device, memory_format=torch.channels_last)
    )
    images = torch.rand(row.batch, 3, row.size, row.size).to(memory_format=torch.channels_last)

    def run(calls: int) -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=row.precision != "float32"):
            for _ in range(calls):
                model(images.to(device)).float().cpu()

    return timed(row, run)


MEASURES: dict[str, Callable[[Row], dict[str, Any]]] = {
    "ours": ours,
    "ours, run.xla": ours_xla,
    "keras.applications, fit": applications_fit,
    "timm": timm_training,
    "losses": losses,
    "Predictor": predictor,
    "keras.applications, tf.function": applications_call,
    "timm, inference": timm_call,
}


def training_rows() -> list[Row]:
    """Returns the rows of training, the most important first."""
    peers = [("keras.applications, fit", "tensorflow"), ("timm", "torch")]
    own = [("ours", "tensorflow"), ("ours, run.xla", "tensorflow"), ("ours", "jax")]
    rows = [Row(what, framework=framework) for what, framework in (*own, *peers)]
    rows += [Row(what, B4, 380, 32, framework) for what, framework in (*own[1:], *peers)]
    rows += [Row(what, CONDCONV, framework=framework) for what, framework in own[1:]]
    rows += [Row(what, V2_S, 224, 64, framework) for what, framework in (*own[1:], *peers)]
    rows += [Row(what, framework=framework, precision="float32") for what, framework in (*own[1:], *peers)]
    return rows


def inference_rows() -> list[Row]:
    """Returns the rows of inference."""
    rows = []
    for batch in (1, 64):
        rows += [Row("Predictor", batch=batch, framework="onnxruntime", precision="float32")]
        rows += [Row("keras.applications, tf.function", batch=batch, precision="float32")]
        rows += [
            Row("timm, inference", batch=batch, framework="torch", precision=p) for p in ("float32", "mixed_bfloat16")
        ]
    return rows


def losses_rows() -> list[Row]:
    """Returns the rows that compare the GPU with the processor."""
    return [Row("losses", size=64, batch=16, framework=name, precision="float32") for name in ("tensorflow", "jax")]


SMALL = {
    "training": [
        Row("ours", size=32, batch=4, precision="float32", seconds=0.1),
        Row("keras.applications, fit", size=32, batch=4, precision="float32", seconds=0.1),
        Row("timm", size=32, batch=4, framework="torch", seconds=0.1),
    ],
    "losses": [Row("losses", size=32, batch=4, precision="float32")],
    "inference": [Row("Predictor", batch=2, framework="onnxruntime", precision="float32", seconds=0.1)],
}


def measured(row: Row, limit: float, **environment: str) -> dict[str, Any]:
    """Runs a row in a process of its own."""
    missing = [name for name in (row.framework, "timm" if "timm" in row.what else "keras") if not find_spec(name)]
    if missing:
        return {"error": f"{' and '.join(missing)} not installed"}
    if limit < 1:
        return {"error": "not measured: no time left"}
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_FORCE_GPU_ALLOW_GROWTH": "true", **environment}
    variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    variables["KERAS_BACKEND"] = row.framework if row.framework == "jax" else "tensorflow"
    command = [sys.executable, __file__, "--serve", json.dumps(asdict(row))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": "not measured: no time left"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["ended without a result"])[-1][:300]}
    return json.loads(lines[-1])


def peak_memory(framework: str) -> float | None:
    """Returns the peak memory of this process in MiB: the GPU's where the framework tells it, else the processor's."""
    found = None
    if framework == "torch":
        import torch

        found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    elif framework == "jax":
        import jax

        found = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    elif framework == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            found = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if found is None:
        return memory("VmHWM") if Path("/proc/self/status").exists() else None
    return found / 2**20


def has_gpu() -> bool:
    """Returns whether TensorFlow sees a GPU. On processors, XLA compiles these nets for minutes."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def card() -> str:
    """Returns the name of the GPU, or that there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


@click.command()
@click.option("--only", type=click.Choice(["training", "inference", "losses"]), help="Measure only this part.")
@click.option("--minutes", default=8.0, show_default=True, help="Time for all rows.")
@click.option("--small", is_flag=True, help="Tiny images and batches, for a machine without a GPU.")
@click.option("--json", "path", metavar="FILE", help="Also save the results to FILE, after each row.")
@click.option("--serve", hidden=True)
def main(only, minutes, small, path, serve) -> None:
    """Measure training and inference on one GPU."""
    if serve:
        row = Row(**json.loads(serve))
        found = MEASURES[row.what](row) | {"peak MiB": peak_memory(row.framework)}
        print(json.dumps(found))
        return
    end = time.monotonic() + 60 * minutes
    large = {"training": training_rows(), "losses": losses_rows(), "inference": inference_rows()}
    rows = [row for part, some in (SMALL if small else large).items() if only in (None, part) for row in some]
    print(
        f"{card()}\n\n| | model | size | batch | framework | precision | images/s | peak MiB |\n|{'---|' * 8}",
        flush=True,
    )
    results: dict[str, Any] = {"card": card(), "rows": []}
    for row in rows:
        found = measured(row, end - time.monotonic())
        if row.what == "losses" and "error" not in found:
            found |= _beside_processor(row, found["losses"], end - time.monotonic())
        results["rows"].append(asdict(row) | found)
        print(f"| {row} | {_told(found)} | {found.get('peak MiB') or 0:.0f} |", flush=True)
        if path:
            Path(path).write_text(json.dumps(results, indent=2))


def _beside_processor(row: Row, on_gpu: list[float], limit: float) -> dict[str, Any]:
    alone = measured(row, limit, CUDA_VISIBLE_DEVICES="-1", JAX_PLATFORMS="cpu")
    if "error" in alone:
        return {"error": f"on the processor: {alone['error']}"}
    return {"largest relative difference": float(np.max(np.abs(np.array(on_gpu) / alone["losses"] - 1)))}


def _told(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    if "losses" in found:
        return f"losses of 20 steps differ by at most {found['largest relative difference']:.1e} of the processor's"
    return told(found["images per second"], 0) + (f", {found['runtime']}" if "runtime" in found else "")


if __name__ == "__main__":
    main()

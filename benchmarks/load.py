"""Measures loading and converting weights: seconds paired with keras.applications, and memory over the weights' size.

Values are random; nothing is downloaded. `python benchmarks/load.py --help`
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from timing import seconds, spread

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Runs in a separate process, since the peak memory of a process never falls.
MEMORY = """
import sys
from pathlib import Path
import keras_effnet as ke
from keras_effnet.weights import convert

what, model, source, small, folder = sys.argv[1:]
def status(key):  # from Linux, since the peak of getrusage() starts at the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
ke.weights.convert_file(small, f"{folder}/small.safetensors")  # imports all that it needs
if what == "load":
    ke.create_model("efficientnet-lite0", weights=small)
    net = ke.create_model(model, weights=None)
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
if what == "load":
    ke.weights.load(net, source)
else:
    ke.weights.convert_file(source, f"{folder}/out.{what}", model)
print(status("VmHWM") - before)
"""


def load_times(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Times loading B0: ours from the store, with its hash checked, and keras.applications from h5, without a check."""
    os.environ["KERAS_EFFNET_HOME"] = str(folder / "home")
    import keras

    import keras_effnet as ke
    from keras_effnet.weights import convert, downloads, registry, store

    record = registry.find("efficientnet-b0", "noisy-student")
    peer: Any = keras.applications.EfficientNetB0
    ours, theirs = ke.EfficientNetB0(weights=None), peer(weights=None)
    archive = downloads.place(record.files[0])
    archive.parent.mkdir(parents=True)
    ke.weights.export(ours, folder / "model.ckpt")
    subprocess.run(
        ["tar", "czf", archive, "-C", folder, "checkpoint", *(p.name for p in folder.glob("model.*"))], check=True
    )
    first = seconds(lambda: store.fetch(record))
    h5 = ke.weights.export(ours, folder / "b0.h5", target="keras")
    runs = {
        "ours": lambda: convert.load(ours, store.fetch(record)),
        "keras.applications": lambda: theirs.load_weights(h5),
    }
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run))
    ratios = [mine / other for mine, other in zip(*found.values(), strict=True)]
    return {name: spread(values) for name, values in found.items()} | {
        "ratio": spread(ratios),
        "first conversion of the .tar.gz": spread([first]),
    }


def memory(model: str, folder: Path) -> dict[str, float]:
    """Returns the peak memory that a training checkpoint adds, relative to the size of the weights. Linux only."""
    import numpy as np

    import keras_effnet as ke
    from keras_effnet.nets.scaling import resolve
    from keras_effnet.nets.variants import VARIANTS
    from keras_effnet.nets.weight_shapes import owners
    from keras_effnet.weights import name_translation, naming_tables
    from keras_effnet.weights.formats import tensorflow_checkpoint

    small = folder / "small.ckpt"
    ke.weights.export(ke.EfficientNetLite0(weights=None), small)
    architecture, chance = resolve(VARIANTS[model]), np.random.default_rng(0)
    names = name_translation.foreign_names(architecture, naming_tables.TPU)
    values = {f"net/{name.foreign}": chance.random(name.shape, np.float32) for name in names.values()}
    size = sum(value.nbytes for value in values.values())
    assert size == 4 * sum(np.prod(s) for owner in owners(architecture).values() for s in owner.shapes.values())
    slots = ("", "/ExponentialMovingAverage", "/RMSProp", "/RMSProp_1")
    everything = {f"{name}{slot}": value for name, value in values.items() for slot in slots}
    tensorflow_checkpoint.write_checkpoint(folder / "big.ckpt", everything, "global_step")
    found = {}
    for what in ("safetensors", "h5", "load"):
        command = [sys.executable, "-c", MEMORY, what, model, folder / "big.ckpt", small, folder]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        found[what] = int(result.stdout.split()[-1]) / size
    return found


@click.command()
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Rounds of loading.")
@click.option("--model", default="efficientnet-b7", show_default=True, help="Model to measure the memory of.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(rounds, model, as_json) -> None:
    """Time loading B0, and measure the memory that converting a large model takes."""
    with tempfile.TemporaryDirectory() as folder:
        times = load_times(rounds, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        peaks = memory(model, Path(folder))
    if as_json:
        click.echo(json.dumps({"times": times, "memory": peaks}, indent=2))
        return
    for name, row in times.items():
        unit = "" if name == "ratio" else " s"
        click.echo(f"{name}: {row['median']:.3f}{unit} ({row['min']:.3f}-{row['max']:.3f})")
    for name, ratio in peaks.items():
        what = f"loading {model}" if name == "load" else f"converting {model} to .{name}"
        click.echo(f"{what}: {ratio:.2f} times the weights' size")


if __name__ == "__main__":
    main()

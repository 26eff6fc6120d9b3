"""Times `probe` and `finetune` beside the same by hand, and compares the accuracy of usual fine-tuning recipes.

    python benchmarks/finetune.py                               # 5 minutes on two cores
    python benchmarks/finetune.py --compare                     # some 25 minutes
    python benchmarks/finetune.py --compare --timm-python PATH  # the interpreter of an environment with timm
    python benchmarks/finetune.py --compare --only patches --epochs 1 --seeds 1   # 2 minutes: does it all work?

All start from the ImageNet weights of Lite0 and see images of 64 pixels. Each training is a process of its own.

The first part is timed from the start of the command to its end, on scikit-learn's digits (1437 to train on, 360 to
test with). The rows take turns. The cache is an empty folder:

- probe, first run: exports the body for the runtimes that are installed, and measures which is the fastest.
- probe, new features: the export is cached.
- probe, features on disk: the features too, as for a run with another penalty.
- finetune: the recipe with its own number of epochs, and with `--augment.min-area 0.7`: smaller crops cut digits off.
- by hand: what users of keras.applications write. `fit` for 10 epochs on a frozen body, in inference mode, then dropout
  of 0.2 and a softmax layer, Adam with its learning rate of 1e-3, batches of 32, no augmentation.

The second part trains with each recipe on the same batches of the same augmented images, which our pipeline makes, for
as many epochs. It tests on the same images too: the digits, and patches of scikit-image's photos. A class of these is a
photo, with patches to train on from its left half and patches to test with from its right half.

- ours: `keras-effnet train finetune`: momentum, cosine schedule, moving average of the weights.
- Keras: the guide "Transfer learning & fine-tuning" (keras.io/guides/transfer_learning): a frozen body in inference
  mode, dropout of 0.2 and a new layer, Adam with 1e-3; then the body is trained too, with its batch norm still in
  inference mode, Adam with 1e-5. Two of three epochs are of the first kind, as there.
- timm, RMSprop: the advice of timm's author for EfficientNets (pytorch-image-models issue 25): its RMSpropTF with a
  tenth of the usual learning rate, 0.1 * 0.016 * batch / 256. Else the defaults of timm's train.py: cosine schedule,
  label smoothing of 0.1, weight decay of 2e-5, warm-up from 1e-5.
- timm, AdamW: the same with AdamW, a learning rate of 5e-4 and weight decay of 0.05, which are the usual ones for a
  small batch; timm's documentation names none for fine-tuning.

Both of timm warm up for an epoch: train.py's 5 are meant for 300. Needs timm (`pip install timm`), whose rows are
skipped with a message if it is not installed, and scikit-image.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from timing import spread, told

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIZE, BATCH = 64, 32
PIXELS = ["--model.image-size", str(SIZE), "--data.eval-crop", "1"]
DIGITS = ["--data", "digits", *PIXELS, "--augment.no-flip"]
GENTLE = ["--augment.min-area", "0.7"]
# Tests only at the end, as the other recipes do.
ALONE = ["--run.no-report", "--run.no-eval-raw", "--run.eval-every", "1000"]
BY_HAND, OURS, KERAS = "by hand, Keras", "ours", "Keras"
TIMM = {"timm, RMSprop": "rmsproptf", "timm, AdamW": "adamw"}

# Photos of scikit-image. The others are drawings, or too small.
PHOTOS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text"),
)
PATCHES = {"train": 40, "val": 20}


# What runs in processes of its own. Each prints one JSON object.


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns pixels and labels for training and for testing, divided as `--data digits` does."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    small = [Image.fromarray((image * (255 / 16)).astype("uint8")) for image in found["images"]]
    pixels = np.stack([np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in small])
    pixels = np.repeat(pixels[..., None], 3, -1).astype("float32")
    order = np.random.default_rng(0).permutation(len(pixels))
    test, train = order[:360], order[360:]
    return (pixels[train], found["target"][train]), (pixels[test], found["target"][test])


def with_new_top(classes: int) -> tuple[Any, Any]:
    """Returns Lite0's body, frozen, and a model of it with a new classifier. Batch norm stays in inference mode."""
    import keras

    import keras_effnet as ke

    body: Any = ke.EfficientNetLite0(include_top=False, pooling="avg", input_shape=(SIZE, SIZE, 3))
    body.trainable = False
    inputs = keras.Input((SIZE, SIZE, 3))
    features = keras.layers.Dropout(0.2)(body(inputs, training=False))
    return body, keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(features))


def by_hand(epochs: str) -> dict[str, float]:
    import keras

    train, test = digits()
    keras.utils.set_random_seed(0)
    _, model = with_new_top(10)
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*train, batch_size=BATCH, epochs=int(epochs), verbose=0)
    return {"top1": model.evaluate(*test, batch_size=BATCH, verbose=0)[1]}


def images(folder: str, *options: str) -> dict[str, float]:
    """Saves the batches that a run of `finetune` with these options trains on, the images to test with, and weights."""
    import keras_effnet as ke
    from keras_effnet.tpu import recipes
    from keras_effnet.tpu.config import override
    from keras_effnet.tpu.input import pipeline
    from keras_effnet.tpu.input.skipped_examples import Skipped
    from keras_effnet.tpu.input.sources import open_source

    recipe = override(recipes.find("finetune"), ["--data.source", *options[1:]])
    source = open_source(recipe.data)
    steps = int(recipe.epochs * source.train_count / BATCH)
    train = pipeline.training(source, recipe, SIZE, BATCH, Skipped(None, source.train_count)).take(steps)
    test = pipeline.evaluation(source, recipe, SIZE, BATCH, Skipped(None, source.eval_count))
    for name, batches in (("train", train), ("test", test)):
        pixels, labels, *weights = (np.concatenate(parts) for parts in zip(*batches.as_numpy_iterator(), strict=True))
        real = weights[0] > 0 if weights else slice(None)
        np.savez(f"{folder}/{name}.npz", pixels=pixels[real], labels=labels[real])
    ke.weights.export(ke.EfficientNetLite0(), f"{folder}/lite0.safetensors", target="timm")
    return {"steps": steps, "classes": source.classes}


def saved(folder: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = np.load(f"{folder}/{name}.npz")
    return found["pixels"], found["labels"]


def keras_recipe(folder: str, seed: str, epochs: str) -> dict[str, float]:
    import keras
    import tensorflow as tf

    pixels, labels = saved(folder, "train")
    start = time.perf_counter()
    keras.utils.set_random_seed(int(seed))
    body, model = with_new_top(int(labels.max()) + 1)
    first = len(labels) // BATCH * max(1, round(2 / 3 * float(epochs))) // round(float(epochs)) * BATCH
    for part, rate in ((slice(first), 1e-3), (slice(first, None), 1e-5)):
        body.trainable = rate < 1e-3
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        if len(labels[part]):
            batches = tf.data.Dataset.from_tensor_slices((pixels[part], labels[part])).batch(BATCH)
            model.fit(batches.prefetch(2), verbose=0)
    seconds = time.perf_counter() - start
    return {"top1": model.evaluate(*saved(folder, "test"), batch_size=BATCH, verbose=0)[1], "seconds": seconds}


def timm_recipe(folder: str, seed: str, epochs: str, name: str) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file

    # By name, since the package is not a dependency.
    timm, optim, scheduler, loss = (import_module(f"timm{part}") for part in ("", ".optim", ".scheduler", ".loss"))
    torch.manual_seed(int(seed))
    torch.set_num_threads(os.cpu_count() or 1)
    pixels, labels = saved(folder, "train")
    start = time.perf_counter()
    model: Any = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(f"{folder}/lite0.safetensors"))
    model.reset_classifier(int(labels.max()) + 1)
    model = model.to(memory_format=torch.channels_last)
    how = {"rmsproptf": (0.1 * 0.016 * BATCH / 256, 2e-5, {"eps": 1e-3}), "adamw": (5e-4, 0.05, {})}
    rate, decay, more = how[name]
    optimizer = optim.create_optimizer_v2(model, opt=name, lr=rate, weight_decay=decay, momentum=0.9, **more)
    steps = len(labels) // BATCH
    warmup = int(steps / float(epochs)) if float(epochs) > 1 else 0
    schedule = scheduler.CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=warmup, warmup_lr_init=1e-5, warmup_prefix=False, t_in_epochs=False
    )
    entropy = loss.LabelSmoothingCrossEntropy(0.1)

    def given(batch: np.ndarray):
        return torch.from_numpy((batch.astype("float32") - 127) / 128).permute(0, 3, 1, 2)

    model.train()
    for step in range(steps):
        schedule.step_update(step)
        part = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        entropy(model(given(pixels[part])), torch.from_numpy(labels[part]).long()).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    model.eval()
    tested, truth = saved(folder, "test")
    with torch.inference_mode():
        said = np.concatenate([model(given(tested[at : at + BATCH])).argmax(1) for at in range(0, len(truth), BATCH)])
    return {"top1": float(np.mean(said == truth)), "seconds": seconds}


SERVED = {"by_hand": by_hand, "images": images, "keras": keras_recipe, "timm": timm_recipe}


# What the benchmark itself does.


def run(line: list[str], home: str) -> str:
    """Runs a command. Returns what it prints."""
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "KERAS_EFFNET_HOME": home})
    if done.returncode:
        raise click.ClickException(f"{' '.join(line[:6])} ended with {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout


def serve(name: str, *arguments: object, home: str, python: str = sys.executable) -> dict[str, float]:
    return json.loads(run([python, __file__, "serve", name, *map(str, arguments)], home).splitlines()[-1])


def trained(recipe: str, options: list[str], home: str) -> dict[str, Any]:
    """Runs `keras-effnet train` in a new folder. Returns its results."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "keras_effnet", "train", recipe, *options, "--workdir", f"{folder}/run", "--json"]
        text = run(line, home)
    return json.loads(text[text.index("{") :])


def times(rounds: int, epochs: int, home: str) -> dict[str, dict[str, Any]]:
    """Returns the seconds and the accuracies of all rows."""

    def probe(*removed: str):
        for name in removed:
            shutil.rmtree(Path(home, name), ignore_errors=True)
        return lambda: trained("probe", DIGITS, home)["ema_top1"]

    rows = {
        "probe, first run": lambda: probe("predictor", "features")(),
        "probe, new features": lambda: probe("features")(),
        "probe, features on disk": lambda: probe()(),
        "finetune": lambda: trained("finetune", [*DIGITS, *GENTLE], home)["ema_top1"],
        BY_HAND: lambda: serve("by_hand", epochs, home=home)["top1"],
    }
    found: dict[str, Any] = {name: {"seconds": [], "top1": []} for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            start = time.perf_counter()
            found[name]["top1"].append(row())
            found[name]["seconds"].append(time.perf_counter() - start)
            click.echo(f"{name}: {found[name]['seconds'][-1]:.1f} s, {found[name]['top1'][-1]:.2%}", err=True)
    return {name: {key: spread(values) for key, values in row.items()} for name, row in found.items()}


def patches(folder: Path) -> list[str]:
    """Saves patches of scikit-image's photos: left halves to train on, right halves to test with."""
    from PIL import Image

    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("Expected scikit-image for the patches: pip install scikit-image")
    data, generator = Path(spec.submodule_search_locations[0], "data"), np.random.default_rng(0)
    for name in PHOTOS:
        photo = Image.open(next(data.glob(f"{name}.*"))).convert("RGB")
        for left, (part, count) in zip((0, photo.width // 2), PATCHES.items(), strict=True):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                x = left + int(generator.integers(photo.width // 2 - SIZE + 1))
                y = int(generator.integers(photo.height - SIZE + 1))
                photo.crop((x, y, x + SIZE, y + SIZE)).save(place / f"{number:02}.png")
    return ["--data", str(folder), *PIXELS]


def compare(only: str | None, epochs: float, seeds: int, timm_python: str, home: str) -> dict[str, Any]:
    """Returns seconds and accuracies by data set and recipe."""
    has_timm = not subprocess.run([timm_python, "-c", "import timm"], capture_output=True).returncode
    if not has_timm:
        click.echo("timm is not installed: its recipes are skipped", err=True)
    names = [OURS, KERAS, *(TIMM if has_timm else ())]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"digits": lambda: [*DIGITS, *GENTLE], "patches": lambda: patches(Path(folder, "patches"))}
        for data in [only] if only else sources:
            options = [*sources[data](), "--epochs", f"{epochs:g}", "--batch-size", str(BATCH)]
            rows: dict[str, Any] = {name: {"top1": [], "seconds": []} for name in names}
            work: dict[str, float] = {}
            for seed in range(seeds):
                mine = [*options, "--run.seed", str(seed)]
                work = serve("images", folder, *mine, home=home)
                for name, row in rows.items():
                    top1, seconds = tested(name, folder, mine, seed, epochs, timm_python, home)
                    row["top1"].append(top1)
                    row["seconds"].append(seconds)
                    click.echo(f"{data}, seed {seed}, {name}: {top1:.2%}, {seconds:.0f} s", err=True)
            found[data] = {"work": work, "rows": rows} | verdict(rows)
    return found


def tested(name: str, folder: str, mine: list[str], seed: int, epochs: float, timm_python: str, home: str):
    """Trains with a recipe. Returns its top-1 and the seconds of the training."""
    if name == OURS:
        result = trained("finetune", [*mine, *ALONE], home)
        return result["ema_top1"], result["seconds"]
    if name == KERAS:
        result = serve("keras", folder, seed, epochs, home=home)
    else:
        result = serve("timm", folder, seed, epochs, TIMM[name], home=home, python=timm_python)
    return result["top1"], result["seconds"]


def verdict(rows: dict[str, Any]) -> dict[str, Any]:
    """Compares the mean accuracy of ours with that of the best other recipe, and with the spread of the seeds."""
    means = {name: float(np.mean(row["top1"])) for name, row in rows.items()}
    best = max((name for name in rows if name != OURS), key=lambda name: means[name])
    wide = max(np.ptp(rows[name]["top1"]) for name in (OURS, best))
    return {
        "best_other": best,
        "difference_in_points": 100 * (means[OURS] - means[best]),
        "spread_in_points": 100 * float(wide),
        "not_worse": bool(means[OURS] >= means[best] - wide),
    }


def facts() -> dict[str, Any]:
    """Returns what figures depend on: the date, the processor and the versions."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    packages = ("keras", "tensorflow", "onnxruntime", "ai-edge-litert", "openvino", "scipy", "torch")
    known = {}
    for package in packages:
        with contextlib.suppress(ImportError):
            known[package] = version(package)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": name,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # before: of a machine that does nothing else, below 0.5
        "python": platform.python_version(),
        "versions": known,
    }


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)


@click.command()
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1), help="Rounds of the first part.")
@click.option("--compare", "compares", is_flag=True, help="Compare usual recipes instead.")
@click.option("--only", type=click.Choice(["digits", "patches"]), help="With --compare: only this data set.")
@click.option("--epochs", default=5.0, show_default=True, help="With --compare: epochs of each training.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="With --compare: seeds.")
@click.option("--timm-python", default=sys.executable, help="Interpreter that has timm. Default: this one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(rounds, compares, only, epochs, seeds, timm_python, as_json) -> None:
    """Time probe and finetune on digits, or compare finetune with the recipes of Keras and timm."""
    report = facts()
    if not as_json:
        click.echo(", ".join(f"{key} {value}" for key, value in report.items()))
    with tempfile.TemporaryDirectory() as home:
        if not compares:
            report["times"] = times(rounds, 10, home)
        else:
            report |= {"epochs": epochs, "compare": compare(only, epochs, seeds, timm_python, home)}
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for name, found in report.get("compare", {}).items():
        rows = []
        for row, one in found["rows"].items():
            shares = 100 * np.array(one["top1"])
            wide = f"{shares.min():.2f}-{shares.max():.2f}"
            rows.append([row, f"{shares.mean():.2f}", wide, told(spread(one["seconds"]), 0)])
        work = f"{found['work']['steps']:g} steps of {BATCH} images, {seeds} seeds"
        table(f"{name}: {work}", ["mean top-1 in %", "range", "seconds of training"], rows)
        click.echo(
            f"ours to the best other ({found['best_other']}): {found['difference_in_points']:+.2f} points; spread of "
            f"the seeds: {found['spread_in_points']:.2f} points\n"
        )
    if "times" in report:
        rows = [
            [name, told(row["seconds"], 1), f"{100 * row['top1']['median']:.2f}"]
            for name, row in report["times"].items()
        ]
        table("digits, from the start of the command to its end", ["seconds", "top-1 in %"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        print(json.dumps(SERVED[sys.argv[2]](*sys.argv[3:])))
    else:
        main()

"""Times the input pipeline on the same JPEG files: ours, that of tf-models-official, and Keras' layers.

    python benchmarks/input.py                                 # 6 minutes on two cores
    python benchmarks/input.py --only plain --only cutmix

All read the same files, shuffled endlessly, and yield batches of 64 images of 224 x 224 pixels with labels. In each
round, the three take turns with one augmentation. Each starts a new iterator, which is warm before the clock starts.
Ratios are taken within a round. Besides the wall time, the time of all cores is reported, since a core of a shared
machine may be missing for a while. The 160 training files are crops of four photos, in a usual size of ImageNet: 500 x
375 pixels, quality 90. With 48 kB, they are half as large as ImageNet's on average.

The work is not exactly the same. Each pipeline does what its own documentation shows:

- ours (`keras_effnet.tpu.input.pipeline.training`, deterministic): decodes and resizes a random crop, bicubic, and
  flips it. Pixels are returned as uint8, and the model normalizes them.
- official (`official.vision.dataloaders.classification_input.Parser`, `decode_jpeg_only`; not deterministic, its
  default): decodes, flips and resizes a random crop, bilinear. Pixels are returned normalized, as float32.
  `MixupAndCutmix` takes batches.
- keras.layers: decodes the whole image and resizes it to 256 x 256, bilinear. Batches go through `RandomCrop`,
  `RandomFlip` and one more layer. `RandomCrop` crops all images of a batch at the same place. There is no layer for
  AutoAugment.

tf-models-official is skipped with a message if it is not installed (`pip install tf-models-official`).
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
from timing import spread, told

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIZE, BATCH, CLASSES = 224, 64, 1000
CASES = {
    "plain": {},
    "autoaugment": {"policy": "autoaugment"},
    "randaugment": {"policy": "randaugment", "layers": 2, "magnitude": 9.0},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "erase": {"erase": 0.2},
}
OURS, OFFICIAL, KERAS = "ours", "official", "keras.layers"


def photographs(folder: Path, number_of: int = 200) -> float:
    """Writes photos of two classes, and returns their mean size in bytes."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    docs = Path(__file__).resolve().parent.parent / "docs"
    samples: Any = load_sample_images()
    classes = {
        "scenes": [Image.fromarray(pixels) for pixels in samples.images],
        "things": [Image.open(docs / name).convert("RGB") for name in ("cat.png", "coffee.png")],
    }
    generator, sizes = np.random.default_rng(0), []
    for name, wholes in classes.items():
        (folder / name).mkdir()
        for number in range(number_of // len(classes)):
            whole = wholes[number % len(wholes)]
            width = min(whole.width, whole.height * 4 / 3) * generator.uniform(0.6, 1.0)
            left, top = generator.random(2) * (whole.width - width, whole.height - width * 3 / 4)
            part = whole.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + width * 3 / 4))
            file = BytesIO()
            part.save(file, "JPEG", quality=90)
            sizes.append(len(file.getvalue()))
            (folder / name / f"{number:03}.jpg").write_bytes(file.getvalue())
    return float(np.mean(sizes))


def ours(source, augment: dict[str, Any]):
    from keras_effnet.tpu.config import Augment, Data, Recipe
    from keras_effnet.tpu.input.pipeline import training
    from keras_effnet.tpu.input.skipped_examples import Skipped

    recipe = Recipe(data=Data(source.name, classes=CLASSES), augment=Augment(**augment))
    return training(source, recipe, SIZE, BATCH, Skipped(None, source.train_count))


def files(source):
    """Yields the paths of the files and their labels, endlessly, in random order."""
    import tensorflow as tf

    paths = tf.data.Dataset.from_tensor_slices((source.train.images.astype(str), source.train.labels))
    return paths.shuffle(source.train_count).repeat()


def official(source, augment: dict[str, Any]):
    import tensorflow as tf

    # By name: the package is not a dependency.
    common: Any = import_module("official.vision.configs.common")
    loader: Any = import_module("official.vision.dataloaders.classification_input")
    ops: Any = import_module("official.vision.ops.augment")
    policy = augment.get("policy")
    kinds = {
        "autoaugment": lambda: common.Augmentation(type="autoaug"),
        "randaugment": lambda: common.Augmentation(
            type="randaug",
            randaug=common.RandAugment(num_layers=augment["layers"], magnitude=augment["magnitude"]),
        ),
    }
    erasing = common.RandomErasing(probability=augment["erase"]) if "erase" in augment else None
    parser = loader.Parser(
        [SIZE, SIZE], CLASSES, aug_type=kinds[policy]() if policy else None, random_erasing=erasing
    ).parse_fn(is_training=True)

    def parse(path, label):
        return parser({loader.DEFAULT_IMAGE_FIELD_KEY: tf.io.read_file(path), loader.DEFAULT_LABEL_FIELD_KEY: label})

    dataset = files(source).map(parse, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH, drop_remainder=True)
    alphas = {f"{name}_alpha": augment.get(name, 0.0) for name in ("mixup", "cutmix")}
    if any(alphas.values()):
        dataset = dataset.map(ops.MixupAndCutmix(CLASSES, **alphas), num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.deterministic = False
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def keras_layers(source, augment: dict[str, Any]):
    import tensorflow as tf
    from keras import layers

    def read(path, label):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return tf.ensure_shape(tf.image.resize(image, [256, 256]), [256, 256, 3]), label

    steps: list[Any] = [layers.RandomCrop(SIZE, SIZE), layers.RandomFlip("horizontal")]
    if "policy" in augment:
        steps.append(layers.RandAugment(num_ops=augment["layers"], factor=augment["magnitude"] / 10))
    if "erase" in augment:
        probability: Any = (augment["erase"], augment["erase"])  # a single number would be an upper limit
        steps.append(layers.RandomErasing(probability))
    mixers = {"mixup": layers.MixUp, "cutmix": layers.CutMix}
    mixer: Any = next((mixers[name](augment[name]) for name in mixers if name in augment), None)

    def change(images, labels):
        for step in steps:
            images = step(images, training=True)
        if mixer is None:
            return images, labels
        mixed = mixer({"images": images, "labels": tf.one_hot(labels, CLASSES)}, training=True)
        return mixed["images"], mixed["labels"]

    dataset = files(source).map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH, drop_remainder=True)
    return dataset.map(change, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def measured(dataset, least: float) -> tuple[float, float]:
    """Returns the images per second, and the milliseconds of all cores per image."""
    iterator, start = iter(dataset), time.perf_counter()
    for _ in until(start + least / 2, 2):
        next(iterator)
    wall, processor, batches = time.perf_counter(), time.process_time(), 0
    for _ in until(wall + least, 4):
        next(iterator)
        batches += 1
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return batches * BATCH / wall, 1e3 * processor / (batches * BATCH)


def until(end: float, least: int):
    """Counts until the clock reaches `end`, but at least `least` times."""
    for number in count():
        if number >= least and time.perf_counter() >= end:
            return
        yield number


def compared(pipelines: dict[str, Any], rounds: int, least: float) -> dict[str, dict[str, Any]]:
    """Returns the figures of each pipeline, and how many times as fast ours is, in wall time and in core time."""
    for dataset in pipelines.values():
        images, labels = next(iter(dataset))  # traces the pipeline, and warms up the disk cache
        assert images.shape == (BATCH, SIZE, SIZE, 3) and labels.shape[0] == BATCH
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, dataset in pipelines.items():
            found[name].append(measured(dataset, least))
    return {
        name: {
            "images_per_second": spread([rate for rate, _ in rows]),
            "core_ms_per_image": spread([cost for _, cost in rows]),
            "ours_over": spread([mine / rate for (mine, _), (rate, _) in zip(found[OURS], rows, strict=True)]),
            "ours_over_by_cores": spread([cost / mine for (_, mine), (_, cost) in zip(found[OURS], rows, strict=True)]),
        }
        for name, rows in found.items()
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table("augmentation", "pipeline", title="Median (least-most) of the rounds", box=box.SIMPLE_HEAD)
    for column in ("images/s", "core ms/image", "speedup of ours", "by core time"):
        shown.add_column(column, justify="right")
    for case, rows in results.items():
        for name, row in rows.items():
            rate, cost, faster, cheaper = row.values()
            ratios = ["", ""] if name == OURS else [told(faster), told(cheaper)]
            shown.add_row(case if name == OURS else "", name, told(rate, 0), told(cost), *ratios)
    Console(width=120).print(shown)


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds of each augmentation.")
@click.option(
    "--seconds", "least", default=1.2, show_default=True, help="Seconds per turn, after half as many to warm up."
)
@click.option("--only", multiple=True, type=click.Choice(list(CASES)), help="Augmentation to time. Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(rounds, least, only, as_json) -> None:
    """Time our input pipeline against tf-models-official and Keras' layers."""
    from keras_effnet.tpu.config import Data
    from keras_effnet.tpu.input.sources import open_source

    peers: dict[str, Callable] = {OURS: ours, OFFICIAL: official, KERAS: keras_layers}
    if not find_spec("official"):
        click.echo("tf-models-official is not installed: its pipeline is not timed", err=True)
        del peers[OFFICIAL]
    with tempfile.TemporaryDirectory() as folder:
        size = photographs(Path(folder))
        source = open_source(Data(folder, classes=CLASSES))
        results = {}
        for case in only or CASES:
            pipelines = {
                name: make(source, CASES[case])
                for name, make in peers.items()
                if (case, name) != ("autoaugment", KERAS)
            }
            results[case] = compared(pipelines, rounds, least)
    if as_json:
        setting = {"rounds": rounds, "seconds": least, "batch": BATCH, "size": SIZE, "cores": os.cpu_count()}
        click.echo(json.dumps(setting | {"bytes_per_file": size, "results": results}, indent=2))
    else:
        table(results)


if __name__ == "__main__":
    main()

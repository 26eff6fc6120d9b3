"""Times classifying a folder of photos: `Predictor.predict_files()` and its alternatives, in turn, a process each.

    python benchmarks/folder.py                        # B0, 500 JPEGs of mixed sizes
    python benchmarks/folder.py --load                 # load_image() beside decoding alone, by size
    python benchmarks/folder.py --decode               # decode="fast" beside "exact": speed and agreement, Lite0
    python benchmarks/folder.py --memory 100000        # resident memory over links to 50 photos, beside 1,000 links

The JPEGs are cuts of the photos in scikit-image and scikit-learn. Each candidate decodes, crops to 224, and runs B0
with random weights. timm is timed if it is installed. Ratios are taken within a round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import timing
from inference import B0, LITE0, Worker, export, photographs
from timing import seconds, spread, told

SIZES = ((375, 500), (300, 451), (480, 640), (768, 1024), (1200, 1600))  # height, width


def write_photos(folder: Path, count: int, sizes=SIZES, kind: str = "jpg") -> list[str]:
    """Writes cuts of real photos in these sizes, in turn, and returns their paths."""
    from PIL import Image

    wholes = [Image.fromarray(pixels) for pixels in photographs().values()]
    random, paths = np.random.default_rng(0), []
    for number in range(count):
        whole, (height, width) = wholes[number % len(wholes)], sizes[number % len(sizes)]
        share = random.uniform(0.6, 1)
        box = [round(side * share) for side in whole.size]
        left, top = (int(random.integers(0, side - cut + 1)) for side, cut in zip(whole.size, box, strict=True))
        cut = whole.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + box[0], top + box[1]))
        paths.append(str(folder / f"{number:05}.{kind}"))
        cut.save(paths[-1], quality=90)  # of JPEGs; PNGs have none
    return paths


# Candidates: functions of the paths and of a folder with B0 as b0.keras and b0.onnx, which return the call to time.


def ours(paths: list[str], folder: str) -> Callable[[], Any]:
    import keras_effnet as ke

    predictor = ke.Predictor(f"{folder}/b0.keras")
    print(predictor, file=sys.stderr)
    return lambda: sum(1 for row in predictor.predict_files(paths) if row.error is None)


def one_by_one(paths: list[str], folder: str) -> Callable[[], Any]:
    import keras_effnet as ke

    predictor = ke.Predictor(f"{folder}/b0.keras")
    load = predictor.image_loader()
    return lambda: sum(len(predictor(load(path))) for path in paths)


def by_hand(paths: list[str], folder: str, export: str = "b0.onnx") -> Callable[[], Any]:
    """ONNX Runtime, as a user writes it: a thread per processor, each decodes and predicts."""
    from PIL import Image

    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(f"{folder}/{export}", options)
    place, *others = session.get_inputs()
    # Keras exports the constants of keras.applications' Normalization as inputs.
    constants = {one.name: np.ones([1 if side is None else side for side in one.shape], "float32") for one in others}

    def predict(path: str):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - 224) // 2, (height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), "float32")
        return session.run(None, {place.name: pixels[None], **constants})

    def call():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return len(list(pool.map(predict, paths)))

    return call


def by_hand_on_keras_export(paths: list[str], folder: str) -> Callable[[], Any]:
    return by_hand(paths, folder, f"{B0}.onnx")


def tf_data(paths: list[str], folder: str) -> Callable[[], Any]:
    import keras
    import tensorflow as tf

    networks: Any = keras.applications
    model = networks.EfficientNetB0(weights=None)
    function = tf.function(lambda x: model(x, training=False), reduce_retracing=True)

    def load(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        side = tf.cast(tf.cast(tf.minimum(tf.shape(image)[0], tf.shape(image)[1]), "float32") * 0.875, "int32")
        image = tf.image.resize_with_crop_or_pad(image, side, side)
        return tf.image.resize(image, (224, 224), "bicubic")

    def call():
        rows = tf.data.Dataset.from_tensor_slices(paths).map(load, tf.data.AUTOTUNE).batch(32).prefetch(2)
        return sum(len(function(images).numpy()) for images in rows)

    return call


class Photos:
    """A dataset for PyTorch's DataLoader, whose processes need it at the top of a module."""

    def __init__(self, paths: list[str], transform: Callable):
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: int):
        from PIL import Image

        return self._transform(Image.open(self._paths[place]).convert("RGB"))


def timm_loader(paths: list[str], folder: str) -> Callable[[], Any]:
    import torch

    timm: Any = import_module("timm")
    model = timm.create_model("tf_efficientnet_b0").eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    compiled = torch.compile(model, dynamic=False)

    dataset: Any = Photos(paths, transform)

    def call():
        loader = torch.utils.data.DataLoader(dataset, 32, num_workers=os.cpu_count() or 1)
        with torch.inference_mode():
            return sum(len(compiled(images).numpy()) for images in loader)

    return call


def compare(count: int, rounds: int) -> dict[str, Any]:
    candidates: dict[str, Callable] = {"Predictor.predict_files": ours, "Predictor, one after the other": one_by_one}
    candidates |= {"ONNX Runtime by hand, our export": by_hand}
    candidates |= {"ONNX Runtime by hand, Keras' export": by_hand_on_keras_export}
    candidates |= {"tf.data, keras.applications": tf_data}
    if find_spec("timm"):
        candidates["timm, DataLoader, torch.compile"] = timm_loader
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        paths = write_photos(folder, count)
        export(B0, place)
        _save_model(place)
        workers = {}
        for name, make in candidates.items():
            workers[name] = Worker(make, paths, place)
            stack.callback(workers[name].stop)
            assert workers[name].result() == count  # and warms up
        alone = Worker(_processor_time, paths, place)
        stack.callback(alone.stop)
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        processor = []
        for _ in range(rounds):
            for name, worker in workers.items():
                speeds[name].append(count / seconds(worker.result))
            processor.append(alone.result())
    mine = speeds["Predictor.predict_files"]
    bounds = [(os.cpu_count() or 1) / sum(each) for each in processor]
    loads, runs = zip(*processor, strict=True)
    return {
        "milliseconds": {"load": spread([each * 1e3 for each in loads]), "run": spread([each * 1e3 for each in runs])},
        "share of the bound": spread([a / b for a, b in zip(mine, bounds, strict=True)]),
        "images per second": {name: spread(each) for name, each in speeds.items()},
        "ours over it": {
            name: spread([a / b for a, b in zip(mine, each, strict=True)]) for name, each in speeds.items()
        },
    }


def _save_model(folder: str) -> None:
    """Saves B0, and exports it, in a process of its own."""
    code = (
        "import sys, keras_effnet as ke; net = ke.EfficientNetB0(weights=None); ke.save_model(net, sys.argv[1] + "
        "'/b0.keras'); ke.export(net, sys.argv[1] + '/b0.onnx'); ke.Predictor(sys.argv[1] + '/b0.keras')"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True)


def _processor_time(paths: list[str], folder: str) -> Callable[[], tuple[float, float]]:
    """Returns a call that measures the processor seconds of loading a photo, and of running the model on one thread."""
    import keras_effnet as ke

    predictor = ke.Predictor(f"{folder}/b0.keras", threads=1)
    load = predictor.image_loader()

    def call():
        begun = time.process_time()
        images = [load(path) for path in paths]
        between = time.process_time()
        for image in images:
            predictor(image)
        return (between - begun) / len(paths), (time.process_time() - between) / len(paths)

    return call


def loading(rounds: int) -> dict[str, Any]:
    """Times `load_image()` and its decoding alone, in turn."""
    from keras_effnet.images.decoding import decode_image
    from keras_effnet.images.photo_loader import image_loader

    exact, fast = image_loader(LITE0), image_loader(LITE0, decode="fast")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, kind in (((300, 451), "png"), ((375, 500), "jpg"), ((2000, 3000), "jpg")):
            (path,) = write_photos(Path(folder), 1, (size,), kind)
            data = Path(path).read_bytes()
            runs = {"decoding": decode_image, "load_image": exact, "load_image, fast": fast}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for place in range(rounds + 1):
                for name, run in runs.items():
                    taken = seconds(lambda run=run, data=data: run(data)) * 1e3
                    if place:  # the first warms up
                        times[name].append(taken)
            over = [a - b for a, b in zip(times["load_image"], times["decoding"], strict=True)]
            found[f"{kind} {size[1]} x {size[0]}"] = {
                "milliseconds": {name: spread(each) for name, each in times.items()},
                "load_image over decoding": spread(over),
            }
    return found


def fast_decoding() -> dict[str, Any]:
    """Compares `decode="fast"` with `"exact"` on JPEGs of 3000 x 2000, for Lite0 with its ImageNet weights."""
    import keras_effnet as ke

    predictor = ke.Predictor(LITE0)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), len(photographs()), ((2000, 3000),))
        rows = {how: list(predictor.predict_files(paths, decode=how)) for how in ("exact", "fast")}
    exact, fast = (np.stack([row.outputs for row in each]) for each in rows.values())
    return {
        "photos": len(paths),
        "same top-1": int((exact.argmax(1) == fast.argmax(1)).sum()),
        "largest difference of a probability": float(np.abs(exact - fast).max()),
    }


def memory(count: int) -> dict[str, Any]:
    """Returns the peak memory in MiB of `predict --csv` over links to 50 photos, for 1,000 links and for `count`.

    The model is Lite0 for images of 32 x 32: memory over many files is the point, not the model.
    """
    import keras_effnet as ke

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "photos").mkdir()
        photos = write_photos(Path(place) / "photos", 50, ((60, 80),))
        model = ke.save_model(ke.create_model(LITE0, weights=None, input_shape=(32, 32, 3)), f"{place}/net.keras")
        ke.Predictor(model)
        for number in (1000, count):
            links = Path(place) / f"links{number}"
            links.mkdir()
            for each in range(number):
                (links / f"{each:06}.jpg").symlink_to(photos[each % 50])
            command = [sys.executable, "-m", "keras_effnet", "predict", str(links), "--csv", f"{links}.csv"]
            command += ["--model", str(model)]
            begun = time.perf_counter()
            process, peak = subprocess.Popen(command), 0
            while process.poll() is None:  # getrusage() also counts the memory of the parent
                with suppress(OSError, StopIteration):
                    peak = timing.memory("VmHWM", process.pid)
                time.sleep(0.05)
            rows = Path(f"{links}.csv").read_text().count("\n") - 1
            if process.returncode or rows != number:
                raise RuntimeError(f"Expected {number} rows. Received: {rows}, status {process.returncode}")
            found[f"{number:,} files"] = {
                "peak MiB": peak,
                "images per second": number / (time.perf_counter() - begun),
            }
    return found


@click.command()
@click.option("--photos", default=500, show_default=True, type=click.IntRange(1), help="JPEGs to classify.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds, each of all candidates.")
@click.option("--load", is_flag=True, help="Time loading a photo instead.")
@click.option("--decode", is_flag=True, help='Compare decode="fast" with "exact" instead.')
@click.option("--memory", "links", type=click.IntRange(1000), help="Measure memory over this many links instead.")
def main(photos, rounds, load, decode, links) -> None:
    """Time classifying a folder of photos."""
    if load or decode or links:
        found = loading(5 * rounds) if load else fast_decoding() if decode else memory(links)
        print(json.dumps(found, indent=2))
        return
    found = compare(photos, rounds)
    times = {name: told(each, 1) for name, each in found["milliseconds"].items()}
    print(f"processor milliseconds per photo: {times['load']} to load, {times['run']} to run the model")
    print(f"predict_files over processors / that time: {told(found['share of the bound'])}\n")
    print("| candidate | images/s | predict_files, relative to it |\n|---|---|---|")
    for name, speed in found["images per second"].items():
        print(f"| {name} | {told(speed, 1)} | {told(found['ours over it'][name])} |")


if __name__ == "__main__":
    main()

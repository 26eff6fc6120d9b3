"""Times inference: `ke.Predictor` and its alternatives, each in a separate process, all in turn.

    python benchmarks/inference.py                     # B0, B4, Lite0, CondConv: float32, then int8
    python benchmarks/inference.py --model efficientnet-b0 --rounds 9
    python benchmarks/inference.py --agreement         # Lite0 in int8 and float32 on crops of real photos
    python benchmarks/inference.py --start             # the command, from its start to the first prediction
    python benchmarks/inference.py --plot docs/inference.png

Ratios are taken within a round. timm and ZeroModels are timed if they are installed (`pip install timm zeromodels`),
timm with channels first and the defaults of torch.compile, ZeroModels with V2 alone. Lite0 and `--agreement` need
scikit-image, whose photos calibrate int8. Calibration and test use different crops of the same photos. Weights are
random, except for Lite0.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from timing import spread, told

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

B0, B4, LITE0 = "efficientnet-b0", "efficientnet-b4", "efficientnet-lite0"
CONDCONV = "efficientnet-condconv-b0-8e"
V2_B0, V2_S = "efficientnetv2-b0", "efficientnetv2-s"
APPLICATIONS = {B0: "EfficientNetB0", B4: "EfficientNetB4", V2_B0: "EfficientNetV2B0", V2_S: "EfficientNetV2S"}
ZEROMODELS = {V2_B0: "EfficientNetV2B", V2_S: "EfficientNetV2S"}
TIMM = {B0: "tf_efficientnet_b0", B4: "tf_efficientnet_b4", V2_B0: "tf_efficientnetv2_b0", V2_S: "tf_efficientnetv2_s"}


def pixels(shape) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, shape).astype("float32")


def model_of(name: str) -> Any:
    """Returns the model that the peers run: that of keras.applications if there is one, else ours."""
    import keras

    import keras_effnet as ke

    keras.utils.set_random_seed(0)
    if name in APPLICATIONS:
        applications: Any = keras.applications
        return getattr(applications, APPLICATIONS[name])(weights=None)
    return ke.create_model(name, weights=None)


# Candidates: functions of a model's name, a folder for files and a batch size, which return the call to time.


def ours(name: str, folder: str, batch: int, precision: str = "float32", runtime: str = "auto") -> Callable[[], Any]:
    import keras_effnet as ke

    # Which layers stay in float depends on the weights. Lite0 has published ones, which come in a package.
    options: dict[str, Any] = {"weights": "imagenet" if name == LITE0 else None}
    options["calibration"] = crops(150, 2) if precision == "int8" else None
    predictor = ke.Predictor(name, runtime, precision, **options)
    print(f"{name} {precision}: {predictor.runtime}", file=sys.stderr)
    images = pixels((batch, *(predictor.input_shape or ())))
    return lambda: predictor(images)


def int8(name: str, folder: str, batch: int) -> Callable[[], Any]:
    return ours(name, folder, batch, "int8")


def bfloat16(name: str, folder: str, batch: int) -> Callable[[], Any]:
    return ours(name, folder, batch, "bfloat16")


def int8_litert(name: str, folder: str, batch: int) -> Callable[[], Any]:
    return ours(name, folder, batch, "int8", "litert")


def graph(name: str, folder: str, batch: int) -> Callable[[], Any]:
    import tensorflow as tf

    model = model_of(name)
    images = pixels((batch, *model.input_shape[1:]))
    function = tf.function(lambda x: model(x, training=False))
    return lambda: function(tf.constant(images)).numpy()


def zeromodels(name: str, folder: str, batch: int) -> Callable[[], Any]:
    import tensorflow as tf

    from keras_effnet.nets.variants import VARIANTS

    package: Any = import_module("zeromodels.models.efficientnetv2")
    side = VARIANTS[name].resolution
    model = package.EfficientNetV2ImageClassify(block_arch=ZEROMODELS[name], image_size=side, name="net")
    images = pixels((batch, side, side, 3))
    function = tf.function(lambda x: model(x, training=False))
    return lambda: function(tf.constant(images)).numpy()


def predict(name: str, folder: str, batch: int) -> Callable[[], Any]:
    model = model_of(name)
    images = pixels((batch, *model.input_shape[1:]))
    return lambda: model.predict(images, verbose=0)


def litert(name: str, folder: str, batch: int) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(f"{folder}/{name}.tflite", num_threads=os.cpu_count())
    place = interpreter.get_input_details()[0]
    images = pixels((batch, *place["shape"][1:]))
    interpreter.resize_tensor_input(place["index"], images.shape)
    interpreter.allocate_tensors()
    output = interpreter.get_output_details()[0]["index"]

    def call():
        interpreter.set_tensor(place["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return call


def onnxruntime(name: str, folder: str, batch: int) -> Callable[[], Any]:
    session = import_module("onnxruntime").InferenceSession(f"{folder}/{name}.onnx")
    image, *others = session.get_inputs()
    # Keras exports the constants of keras.applications' Normalization as inputs.
    feed = {image.name: pixels((batch, *image.shape[1:]))}
    feed |= {node.name: np.ones([1 if side is None else side for side in node.shape], "float32") for node in others}
    return lambda: session.run(None, feed)


def timm_compiled(name: str, folder: str, batch: int) -> Callable[[], Any]:
    import torch

    from keras_effnet.nets.variants import VARIANTS

    timm: Any = import_module("timm")
    torch.set_num_threads(os.cpu_count() or 1)
    model = timm.create_model(TIMM[name]).eval()
    side = VARIANTS[name].resolution
    images = torch.from_numpy(pixels((batch, 3, side, side)))
    compiled = torch.compile(model)

    def call():
        with torch.inference_mode():
            return compiled(images).numpy()

    return call


class Worker:
    """A process that prepares a call, and times it on request."""

    _call: Any  # set in the process only

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments):
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), self._build, (make, arguments))

    @classmethod
    def _build(cls, make, arguments) -> None:
        cls._call = staticmethod(make(*arguments))

    @classmethod
    def _seconds(cls, least: float) -> float:
        cls._call()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < least:
            cls._call()
            count += 1
        return (time.perf_counter() - start) / count

    def __call__(self, least: float = 0.5) -> float:
        return self._pool.submit(self._seconds, least).result()

    @classmethod
    def _result(cls) -> Any:
        return cls._call()

    def result(self) -> Any:
        return self._pool.submit(self._result).result()

    def stop(self) -> None:
        self._pool.shutdown()


def in_turn(name: str, rows: dict[str, tuple[Callable, int]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds per image of each candidate, by round."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        export(name, folder)
        workers = {}
        for row, (make, batch) in rows.items():
            workers[row] = Worker(make, name, folder, batch)
            stack.callback(workers[row].stop)
            workers[row]()
        times: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(rounds):
            for row, worker in workers.items():
                times[row].append(worker() / rows[row][1])
    return times


def export(name: str, folder: str) -> None:
    """Exports the peer's model with Keras itself, in a separate process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); from inference import model_of; model = model_of(sys.argv[1]); "
        "model._called = True; [model.export(f'{sys.argv[2]}/{sys.argv[1]}.{end}', format=kind, verbose=False) "
        "for end, kind in (('tflite', 'litert'), ('onnx', 'onnx'))]"
    )
    subprocess.run(
        [sys.executable, "-c", code, name, folder, str(Path(__file__).parent)], check=True, capture_output=True
    )


def compare(name: str, rounds: int) -> dict[str, Any]:
    from keras_effnet.inference import runtimes

    one: dict[str, tuple[Callable, int]] = {"Predictor": (ours, 1), "tf.function": (graph, 1)}
    one |= {"LiteRT, Keras' export": (litert, 1), "ONNX Runtime, Keras' export": (onnxruntime, 1)}
    one |= {"predict()": (predict, 1)}
    if find_spec("timm") and name in TIMM:
        one["timm, torch.compile"] = (timm_compiled, 1)
    if find_spec("zeromodels") and name in ZEROMODELS:
        one["ZeroModels, tf.function"] = (zeromodels, 1)
    many: dict[str, tuple[Callable, int]] = {"Predictor, 32": (ours, 32), "tf.function, 32": (graph, 32)}
    eight: dict[str, tuple[Callable, int]] = {}
    if name in (B0, LITE0):
        eight = {"Predictor, int8": (int8, 1), "Predictor, int8 in LiteRT": (int8_litert, 1)}
        many["Predictor, int8, 32"] = (int8, 32)
        if runtimes.has_bfloat16():
            eight["Predictor, bfloat16"] = (bfloat16, 1)
            many["Predictor, bfloat16, 32"] = (bfloat16, 32)
    times = in_turn(name, one | many | eight, rounds)
    exports = [times[row] for row in ("LiteRT, Keras' export", "ONNX Runtime, Keras' export")]
    times["the faster of the two exports"] = list(map(min, *exports))
    base = {row: "Predictor, 32" if row in many else "Predictor" for row in times}
    return {
        row: {
            "milliseconds": spread([value * 1e3 for value in seconds]),
            "ours over it": spread([a / b for a, b in zip(times[base[row]], seconds, strict=True)]),
        }
        for row, seconds in times.items()
    }


def photographs() -> dict[str, np.ndarray]:
    """Returns photos of scikit-image and scikit-learn: the 28 of the tests, and the pair of motorcycles."""
    from keras_effnet.images.decoding import decode_image

    recorded = np.load(Path(__file__).parent.parent / "tests" / "golden" / "lite_real" / "lite0_logits.npz")
    names = {name.split("/")[0] for name in recorded} | {"motorcycle_left.png", "motorcycle_right.png"}
    folders = [Path(str(import_module(name).__file__).rsplit("/", 1)[0]) for name in ("skimage", "sklearn")]
    files = {path.name: path for folder in folders for path in folder.rglob("*") if path.name in names}
    return {name: decode_image(path) for name, path in sorted(files.items())}


def crops(count: int, seed: int, size: tuple[int, int] = (224, 224)) -> np.ndarray:
    from keras_effnet.images.resizing import crop_and_resize

    wholes = list(photographs().values())
    random = np.random.default_rng(seed)
    found = []
    for place in range(count):
        whole = wholes[place % len(wholes)]
        side = int(min(whole.shape[:2]) * np.sqrt(random.uniform(0.25, 1)))
        top, left = (random.integers(0, length - side + 1) for length in whole.shape[:2])
        found.append(np.clip(crop_and_resize(whole[top : top + side, left : left + side], size, 0), 0, 255))
    return np.stack(found)


def agreement(count: int) -> dict[str, Any]:
    """Compares int8 with float32, for Lite0 with its ImageNet weights."""
    import keras_effnet as ke
    from keras_effnet.inference import export_check, runtimes

    images, calibration = crops(count, 1), crops(150, 2)
    expected = ke.Predictor(LITE0)(images)
    ordered = np.sort(expected, 1)
    sure = ordered[:, -1] - ordered[:, -2] > 0.1
    found: dict[str, Any] = {"photographs": len(photographs()), "crops": count, "sure": int(sure.sum())}
    tried = [(runtime, "int8") for runtime in runtimes.choose("auto")]
    tried += [("openvino", "bfloat16")] if runtimes.has_bfloat16() else []
    for runtime, precision in tried:
        predictor = ke.Predictor(LITE0, runtime, precision, calibration=calibration)
        got = predictor(images)
        kept = {"megabytes": runtimes.size_of(str(predictor.path)) / 1e6}
        kept["top1_agreement_where_sure"] = export_check.agreement(expected[sure], got[sure])["top1_agreement"]
        found[f"{runtime}, {precision}"] = export_check.agreement(expected, got) | kept
    return found


def start(rounds: int) -> dict[str, Any]:
    """Returns the seconds of the command from start to end, and which frameworks it imports."""
    photograph = str(Path(__file__).parent.parent / "docs" / "cat.png")
    command = [str(Path(sys.executable).with_name("keras-effnet")), "predict", photograph, "--model", LITE0]
    subprocess.run(command, check=True, capture_output=True)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
    code = "import sys; from keras_effnet.inference.classifier import Classifier; "
    code += "Classifier()([sys.argv[1]]); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, photograph], capture_output=True, text=True, check=True)
    modules = ran.stdout.split()
    return {"seconds": spread(seconds), "imported": sorted({"keras", "tensorflow", "torch", "jax"} & set(modules))}


def plot(results: dict[str, Any], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 1.9 * len(results)), layout="constrained")
    for axes, (name, rows) in zip(np.ravel(figure.subplots(len(results), 1)), results.items(), strict=True):
        shown = {row: value["milliseconds"] for row, value in rows.items() if row != "predict()"}
        medians = [value["median"] for value in shown.values()]
        errors = [[v["median"] - v["min"] for v in shown.values()], [v["max"] - v["median"] for v in shown.values()]]
        colours = ["#1f77b4" if row.startswith("Predictor") else "#b0b0b0" for row in shown]
        bars = axes.barh(list(shown), medians, xerr=errors, color=colours, ecolor="#606060")
        axes.bar_label(bars, [f"{value:.1f} ms" for value in medians], padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.axes[-1].set_xlabel("milliseconds per image (batch of 1 or 32)")
    figure.savefig(path, dpi=150)


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=(B0, B4, LITE0, CONDCONV),
    show_default=True,
    help="Model to time. May be repeated.",
)
@click.option("--rounds", default=7, show_default=True, help="Rounds, each of all candidates.")
@click.option("--agreement", "agree", is_flag=True, help="Compare int8 with float32 instead.")
@click.option("--start", "begin", is_flag=True, help="Time `keras-effnet predict` instead.")
@click.option("--plot", "picture", metavar="OUT.png", help="Also plot the results to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(models, rounds, agree, begin, picture, as_json) -> None:
    """Time `ke.Predictor` against TensorFlow, Keras' own exports, and timm."""
    if agree or begin:
        found = agreement(504) if agree else start(rounds)
        print(json.dumps(found, indent=2))
        return
    results = {}
    for name in models:
        results[name] = compare(name, rounds)
        if not as_json:
            print(f"\n| {name} | ms per image | Predictor's time, relative to it |\n|---|---|---|", flush=True)
            for row, value in results[name].items():
                print(f"| {row} | {told(value['milliseconds'])} | {told(value['ours over it'])} |", flush=True)
    if as_json:
        print(json.dumps(results, indent=2))
    if picture:
        plot(results, picture)


if __name__ == "__main__":
    main()

"""Prunes a model on real images, and times the importance of channels.

    python benchmarks/pruning.py               # 12 minutes on two cores
    python benchmarks/pruning.py --importance  # 8 minutes
    python benchmarks/pruning.py --divisors

The first fine-tunes Lite0 from its ImageNet weights on scikit-learn's digits (1797 real images of handwriting, 360 of
them held out, the same for every seed). It removes 40 % of the multiply-adds by several kinds of importance at the same
budget, and distills each result for the same number of epochs. The second alternates with a pass that computes
gradients and discards them. The third times Lite0 at its own size, pruned by 40 % with several divisors.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from timing import seconds, spread, told

import keras_effnet as ke
from keras_effnet import pruning
from keras_effnet.pruning import workflow
from keras_effnet.pruning.importance import KINDS


def digits(side: int):
    """Returns pixels and labels for training and for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    grey = [Image.fromarray((image * (255 / 16)).astype("uint8")) for image in found["images"]]
    pixels = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in grey])
    pixels = np.repeat(pixels[..., None], 3, -1).astype("float32")
    order = np.random.default_rng(0).permutation(len(pixels))
    test, train = order[:360], order[360:]
    return (pixels[train], found["target"][train]), (pixels[test], found["target"][test])


def taught(data, side: int, epochs: int):
    """Returns Lite0, fine-tuned."""
    body = ke.EfficientNetLite0(include_top=False, pooling="avg", input_shape=(side, side, 3), bn_momentum=0.9)
    model: Any = keras.Sequential([body, keras.layers.Dropout(0.2), keras.layers.Dense(10, activation="softmax")])
    rate: Any = keras.optimizers.schedules.CosineDecay(1e-3, epochs * -(-len(data[0]) // 32))
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(*data, batch_size=32, epochs=epochs, verbose=0)
    return model


def accuracy(model, data) -> float:
    return float(np.mean(np.argmax(model.predict(data[0], verbose=0), -1) == data[1]))


def on_digits(arguments) -> dict:
    train, test = digits(arguments.side)
    rows: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, list[float]] = {}
    teachers = []
    for seed in range(arguments.seeds):
        keras.utils.set_random_seed(seed)
        start = time.perf_counter()
        teacher = taught(train, arguments.side, arguments.epochs)
        teachers.append(accuracy(teacher, test))
        print(f"seed {seed}: teacher {teachers[-1]:.2%}, {time.perf_counter() - start:.0f} s", flush=True)
        scores = {kind: pruning.importance(teacher, train, kind, verbose=0) for kind in KINDS}
        generator = np.random.default_rng(seed)
        scores["random"] = {name: generator.random(len(values)) for name, values in scores["magnitude"].items()}
        for kind, importance in scores.items():
            keras.utils.set_random_seed(seed)
            start = time.perf_counter()
            plan = pruning.plan(teacher, train, arguments.reduction, importance=importance, verbose=0)
            student = pruning.apply(teacher, plan)
            row = rows.setdefault(kind, {"reduction": [], "pruned": [], "distilled": []})
            row["reduction"].append(plan.reduction)
            row["pruned"].append(accuracy(student, test))
            if kind == "gradient":
                timed = {f"keras, {size} at a time": pruning.latency([teacher, student], size) for size in (1, 32)}
                timed["Predictor"] = workflow.predictor_latency([teacher, student])
                for name, (whole, pruned) in timed.items():
                    ratios.setdefault(name, []).append(pruned / whole)
            pruning.distill(student, teacher, train, epochs=arguments.epochs, verbose=0)
            row["distilled"].append(accuracy(student, test))
            print(
                f"  {kind}: {row['reduction'][-1]:.2%} less, pruned {row['pruned'][-1]:.2%}, "
                f"distilled {row['distilled'][-1]:.2%}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    print(f"\n| importance | accuracy when pruned | after {arguments.epochs} epochs of distillation |\n|---|---|---|")
    print(f"| (teacher) | | {np.mean(teachers):.2%} |")
    for kind, row in rows.items():
        print(f"| {kind} | {np.mean(row['pruned']):.2%} | {np.mean(row['distilled']):.2%} |")
    for name, values in ratios.items():
        print(f"latency relative to the whole model, {name}: {told(spread(values), 3)}")
    return {"teachers": teachers, "rows": rows, "latency": ratios}


def divisors(arguments) -> dict:
    """Times Lite0 at its own size with 40 % fewer multiply-adds, with multiples of several divisors as channels."""
    model = ke.EfficientNetLite0()
    whole: dict[str, list[float]] = {}
    plans = {
        divisor: pruning.plan(model, None, 0.4, importance="magnitude", divisor=divisor) for divisor in (1, 4, 8, 16)
    }
    models = [model, *(pruning.apply(model, plan) for plan in plans.values())]
    for name, times in {
        "keras": pruning.latency(models, rounds=arguments.rounds),
        "litert": workflow.predictor_latency(models, "litert", arguments.rounds),
        "onnxruntime": workflow.predictor_latency(models, "onnxruntime", arguments.rounds),
    }.items():
        whole[name] = [value / times[0] for value in times[1:]]
        ratios = ", ".join(f"{divisor}: {ratio:.3f}" for divisor, ratio in zip(plans, whole[name], strict=True))
        print(
            f"latency relative to the whole model ({times[0] * 1e3:.1f} ms), {name}, by divisor: {ratios}", flush=True
        )
    return whole


def cost_of_importance(arguments) -> dict:
    import tensorflow as tf

    model = ke.EfficientNetB0(weights=None, classes=1000)
    generator = np.random.default_rng(0)
    data = (
        generator.uniform(0, 255, (arguments.images, 224, 224, 3)).astype("float32"),
        generator.integers(0, 1000, arguments.images),
    )

    def plain():
        @tf.function
        def step(pixels, labels):
            with tf.GradientTape() as tape:
                loss: Any = keras.losses.sparse_categorical_crossentropy(labels, model(pixels, training=False))
                loss = tf.reduce_mean(loss)
            return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

        for start in range(0, arguments.images, 32):
            step(data[0][start : start + 32], data[1][start : start + 32])

    def clocks(function) -> tuple[float, float]:
        """Returns wall time and core time: a core of a shared machine may be missing for a while."""
        start = time.process_time()
        return seconds(function), time.process_time() - start

    ratios: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        base = clocks(plain)
        for kind in ("gradient", "taylor"):
            taken = clocks(lambda kind=kind: pruning.importance(model, data, kind, verbose=0))
            for name, ours, theirs in zip(("wall", "processor"), taken, base, strict=True):
                ratios.setdefault(f"{kind}, {name}", []).append(ours / theirs)
        print(
            f"plain {base[0]:.1f} s; {', '.join(f'{name} {row[-1]:.2f}' for name, row in ratios.items())}", flush=True
        )
    for name, values in ratios.items():
        print(f"importance of {arguments.images} images relative to a plain pass, {name}: {told(spread(values))}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--importance", action="store_true", help="time the importance instead")
    parser.add_argument("--divisors", action="store_true", help="time Lite0 pruned with several divisors instead")
    parser.add_argument("--side", type=int, default=64, help="size of the digits in pixels")
    parser.add_argument("--reduction", type=float, default=0.4, help="share of the multiply-adds to remove")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of fine-tuning, and of distillation")
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions with another seed")
    parser.add_argument("--images", type=int, default=1000, help="images to time the importance with")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing")
    parser.add_argument("--out", help="JSON file to save all figures to")
    arguments = parser.parse_args()
    part = cost_of_importance if arguments.importance else divisors if arguments.divisors else on_digits
    figures = part(arguments)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"python": sys.version.split()[0], "keras": keras.__version__, **figures}, file, indent=2)


if __name__ == "__main__":
    main()

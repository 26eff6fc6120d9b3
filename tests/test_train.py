"""Whole runs: the command in processes of its own, and what it leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import BACKEND

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

from keras_effnet.tpu import data, recipes, runner
from keras_effnet.tpu.config import Data, Optimizer, Run, from_json, override
from keras_effnet.tpu.sources import open_source
from keras_effnet.tpu.train import train


def flags(text: str) -> list[str]:
    return text.split()


SHORT = override(
    recipes.find("digits_demo"),
    [
        "--epochs",
        "0.5",
        "--batch-size",
        "32",
        "--model.image-size",
        "32",
        "--run.steps-per-loop",
        "5",
        "--run.save-every",
        "0.2",
        "--run.eval-every",
        "0.3",
        "--run.eval-batch",
        "64",
    ],
)


def rows(workdir: Path, split: str) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def accuracy(path: Path, side: int) -> float:
    """Top-1 of a saved model on the digits that are kept for it, by Keras alone."""
    how = dataclasses.replace(SHORT, data=Data("digits", eval_crop=1.0))
    source = open_source(how.data)
    model = keras.models.load_model(path, compile=False)
    images, labels, weights = (
        np.concatenate(parts)
        for parts in zip(*data.evaluation(source, how, side, 60, data.Skipped(None, 360)), strict=True)
    )
    assert weights.sum() == 360
    return float(np.mean(np.argmax(model.predict(images, verbose=0), -1) == labels))


def test_a_run_leaves_what_it_learnt(tmp_path):
    result = train(SHORT, tmp_path / "run", quiet=True)
    steps = int(0.5 * 1437 / 32)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["examples"], result["skipped"]) == (steps, 360, 0)
    assert result["labels"] == [str(digit) for digit in range(10)]
    # Each number where it belongs.
    trained, evaluated = rows(tmp_path / "run", "train"), rows(tmp_path / "run", "eval")
    assert [row["step"] for row in evaluated] == [int(0.3 * 1437 / 32), steps]
    assert {"loss", "top1", "top5", "learning_rate", "images_per_second"} <= trained[0].keys()
    assert {"loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5"} <= evaluated[-1].keys()
    assert evaluated[-1]["ema_top1"] == result["ema_top1"]
    # The saved model is the moving average: what Keras says about it is what the run said.
    assert accuracy(tmp_path / "run" / "model.keras", 32) == pytest.approx(result["ema_top1"], abs=1e-6)
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert config == SHORT
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert resolved == {
        "image_size": 32,
        "classes": 10,
        "steps": steps,
        "steps_per_epoch": 1437 / 32,
        "peak": SHORT.peak,
        "replicas": 1,
    }
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    # Once more: nothing is left to do. Another recipe is not this run.
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(config, tmp_path / "run", quiet=True)
    assert again == result and (tmp_path / "run" / "metrics.jsonl").read_text() == before
    other = dataclasses.replace(SHORT, optimizer=Optimizer(peak=0.5))
    with pytest.raises(ValueError, match=r"Received: optimizer.peak 0.016 -> 0.5"):
        train(other, tmp_path / "run", quiet=True)


def command(workdir: Path, *arguments: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "keras_effnet.cli", "train", *arguments, "--workdir", str(workdir)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_and_learns(tmp_path):
    """digits_demo through the command, in a quarter of its epochs; the README has the whole runs' accuracy."""
    arguments = ["digits_demo", *flags("--epochs 12 --run.save-every 1.5 --run.steps-per-loop 10")]
    process = command(tmp_path, *arguments)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and rows(tmp_path, "train") and rows(tmp_path, "train")[-1]["step"] >= 60):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    saved = sorted(tmp_path.glob("checkpoints/ckpt-*.index"), key=os.path.getmtime)
    assert saved and not (tmp_path / "result.json").exists()
    before = rows(tmp_path, "train")
    process = command(tmp_path, *arguments)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "restored from checkpoint" in (tmp_path / "train.log").read_text()
    after = rows(tmp_path, "train")
    steps = [row["step"] for row in after]
    assert steps == sorted(set(steps)) and steps[-1] == int(12 * 1437 / 64)
    # What was done before the checkpoint stands as it was; what came after it was done again, on the same examples.
    kept = [row for row in before if row in after]
    assert kept and len(kept) < len(before)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ema_top1"] >= 0.8
    assert result["steps"] == steps[-1] and f"top-1 {result['ema_top1']:.2%}" in told


@pytest.mark.slow
def test_fine_tuning_starts_from_weights(tmp_path):
    """Lite0's genuine ImageNet weights, for a few steps on a folder of photographs."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name, level in (("dark", 60), ("light", 190)):
            (tmp_path / "photographs" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(level, 30, (70, 80, 3)).clip(0, 255).astype("uint8")
                path = tmp_path / "photographs" / split / name / f"{number}.jpg"
                path.write_bytes(tf.io.encode_jpeg(pixels).numpy())
    changes = [
        "--batch-size",
        "8",
        "--epochs",
        "4",
        "--model.image-size",
        "64",
        "--run.steps-per-loop",
        "6",
        "--run.eval-every",
        "2",
    ]
    recipe = override(recipes.find("finetune"), [*changes, "--data.source", str(tmp_path / "photographs")])
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result["ema_top1"] == 1.0 and result["examples"] == 16
    frozen = override(recipe, ["--model.freeze", "all-but-top", "--epochs", "1"])
    train(frozen, tmp_path / "frozen", quiet=True)
    model = keras.models.load_model(tmp_path / "frozen" / "model.keras", compile=False)
    import keras_effnet as ke

    body = ke.EfficientNetLite0(weights="imagenet", include_top=False, input_shape=(64, 64, 3))
    for layer in body.layers:
        for ours, theirs in zip(model.get_layer(layer.name).get_weights(), layer.get_weights(), strict=True):
            assert np.array_equal(ours, theirs), layer.name


def test_devices_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="Expected a GPU"):
        runner.connect(Run(devices="gpu"))
    with pytest.raises(ValueError, match=r"run.cpu_replicas=3 before TensorFlow is used"):
        runner.connect(Run(cpu_replicas=3))
    with pytest.raises(ValueError, match=r"Expected data.classes of at least the 10"):
        train(override(SHORT, ["--data.classes", "3"]), tmp_path, quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a directory"):
        train(SHORT, tmp_path / "file" / "run", quiet=True)
    with pytest.raises(ValueError, match="Expected batch_size above 0"):
        train(override(SHORT, ["--batch-size", "0"]), tmp_path / "none", quiet=True)
    with pytest.raises(ValueError, match=r"at least one step: epochs \* 1437 images / batch_size"):
        train(override(SHORT, ["--batch-size", "4096"]), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="Unknown model"):
        train(override(SHORT, ["--model.name", "efficientnet-lite9"]), tmp_path, quiet=True)

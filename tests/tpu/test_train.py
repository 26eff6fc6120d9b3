"""Protects complete runs of `train()`: their files, results, fine-tuning, and errors with a remedy."""

import dataclasses
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, SHORT, same_weights

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

from keras_effnet.nets.variants import VARIANTS
from keras_effnet.tpu import recipes
from keras_effnet.tpu import train as training
from keras_effnet.tpu.config import Data, Optimizer, Run, from_json, override, settled, with_fields
from keras_effnet.tpu.input import pipeline, skipped_examples
from keras_effnet.tpu.input.example_readers import Records
from keras_effnet.tpu.input.sources import open_source
from keras_effnet.tpu.recipes import finetune
from keras_effnet.tpu.runners import tensorflow_runner
from keras_effnet.tpu.train import train

RECIPE = override(recipes.find("digits_demo"), [*SHORT, "--model.name", "efficientnet-b0"])


def rows(workdir: Path, split: str) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def accuracy(path: Path, side: int) -> float:
    """Returns the top-1 of a saved model on the held-out digits, with Keras alone."""
    how = dataclasses.replace(RECIPE, data=Data("digits", eval_crop=1.0))
    source = open_source(how.data)
    model = keras.models.load_model(path, compile=False)
    images, labels, weights = (
        np.concatenate(parts)
        for parts in zip(*pipeline.evaluation(source, how, side, 60, skipped_examples.Skipped(None, 360)), strict=True)
    )
    assert weights.sum() == 360
    return float(np.mean(np.argmax(model.predict(images, verbose=0), -1) == labels))


@pytest.fixture
def mini(monkeypatch):
    """Reduces B0 to its first three stages, with a block each."""
    b0 = VARIANTS["efficientnet-b0"]
    stages = tuple(dataclasses.replace(stage, repeats=1) for stage in b0.stages[:3])
    monkeypatch.setitem(VARIANTS, "efficientnet-b0", dataclasses.replace(b0, stages=stages))


@pytest.mark.usefixtures("mini")
def test_a_run_leaves_what_it_learnt(tmp_path):
    how = override(RECIPE, ["--epochs", "0.25", "--run.eval-every", "0.15"])
    result = train(how, tmp_path / "run", quiet=True)
    steps = int(0.25 * 1437 / 32)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["examples"], result["skipped"]) == (steps, 360, 0)
    assert result["labels"] == [str(digit) for digit in range(10)]
    # Each number is in its row.
    trained, evaluated = rows(tmp_path / "run", "train"), rows(tmp_path / "run", "eval")
    assert [row["step"] for row in evaluated] == [int(0.15 * 1437 / 32), steps]
    assert {"loss", "top1", "top5", "data_loss", "learning_rate", "images_per_second"} <= trained[0].keys()
    # Without the weight decay of 1e-5, which grows with the variables.
    assert all(0.005 < row["loss"] - row["data_loss"] < 0.5 for row in trained)
    assert {"loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5"} <= evaluated[-1].keys()
    assert evaluated[-1]["ema_top1"] == result["ema_top1"]
    # The saved model is the moving average: Keras computes the accuracy that the run has reported.
    assert accuracy(tmp_path / "run" / "model.keras", 32) == pytest.approx(result["ema_top1"], abs=1e-6)
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert config == settled(how)  # with what follows from the model
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert resolved == {
        "image_size": 32,
        "classes": 10,
        "steps": steps,
        "steps_per_epoch": 1437 / 32,
        "peak": how.peak,
        "replicas": 1,
        "hosts": 1,
        "images_per_statistics": 32,
        "runner": "tensorflow",
    }
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    # The same call again has nothing left to do. Another recipe is refused.
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(config, tmp_path / "run", quiet=True)
    assert again == result and (tmp_path / "run" / "metrics.jsonl").read_text() == before
    other = dataclasses.replace(how, optimizer=Optimizer(peak=0.5))
    with pytest.raises(ValueError, match=r"Received: optimizer.peak 0.016 -> 0.5"):
        train(other, tmp_path / "run", quiet=True)
    # With allow_changes it resumes.
    longer = train(override(how, ["--epochs", "0.3"]), tmp_path / "run", quiet=True, allow_changes=True)
    assert longer["steps"] == int(0.3 * 1437 / 32)
    assert f"From step {steps} on: epochs 0.25 -> 0.3" in (tmp_path / "run" / "train.log").read_text()
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [int(0.15 * 1437 / 32), steps, longer["steps"]]
    # A run that is already past its new last step is evaluated where it is.
    (tmp_path / "run" / "result.json").unlink()
    shorter = train(override(how, ["--epochs", "0.2"]), tmp_path / "run", quiet=True, allow_changes=True)
    assert shorter["steps"] == longer["steps"] and shorter["ema_top1"] == longer["ema_top1"]
    # Devices that would share batch statistics among other images are refused.
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"images_per_statistics": 32', '"images_per_statistics": 8'))
    with pytest.raises(ValueError, match=r"Received: images_per_statistics 8 -> 32"):
        train(override(how, ["--epochs", "0.2"]), tmp_path / "run", quiet=True)


@pytest.mark.long  # tests/commands/test_own_classifier.py fine-tunes too
def test_fine_tuning_starts_from_weights(tmp_path):
    """Lite0 with ImageNet weights tells pieces of two photos apart after 24 steps of 8 images.

    With the usual random values in the classifier it does not: three of three such runs ended between 0.5 and 0.94.
    """
    import tensorflow as tf

    import keras_effnet as ke

    rng = np.random.default_rng(0)
    for whole in sorted((Path(ke.__file__).parent / "images" / "photographs").glob("*.jpg")):
        pixels = tf.io.decode_jpeg(whole.read_bytes()).numpy()
        for split, count in (("train", 24), ("val", 8)):
            folder = tmp_path / "photographs" / split / whole.stem
            folder.mkdir(parents=True)
            for number in range(count):
                top, left = (rng.integers(side - 120) for side in pixels.shape[:2])
                piece = tf.io.encode_jpeg(pixels[top : top + 120, left : left + 120])
                (folder / f"{number}.jpg").write_bytes(piece.numpy())
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
    assert result["ema_top1"] == 1.0 and result["ema_loss"] < 0.5 and result["examples"] == 16
    frozen = override(recipe, ["--model.freeze", "all-but-top", "--epochs", "1"])
    train(frozen, tmp_path / "frozen", quiet=True)
    model = keras.models.load_model(tmp_path / "frozen" / "model.keras", compile=False)
    body = ke.EfficientNetLite0(weights="imagenet", include_top=False, input_shape=(64, 64, 3))
    for layer in body.layers:
        for ours, theirs in zip(model.get_layer(layer.name).get_weights(), layer.get_weights(), strict=True):
            assert np.array_equal(ours, theirs), layer.name


def test_devices_that_are_not_there(tmp_path):
    import tensorflow as tf

    tf.constant(0)  # starts TensorFlow, whatever ran before in this process
    with pytest.raises(ValueError, match="Expected a GPU"):
        tensorflow_runner.connect(Run(devices="gpu"))
    with pytest.raises(ValueError, match=r"Expected --runner jax with --run.fused layers"):
        tensorflow_runner.connect(Run(fused="layers"))
    with pytest.raises(ValueError, match=r"run.cpu_replicas=3 before TensorFlow is used"):
        tensorflow_runner.connect(Run(cpu_replicas=3))
    with pytest.raises(ValueError, match=r"Expected data.classes to be at least 10, as there are in the data"):
        train(override(RECIPE, ["--data.classes", "3"]), tmp_path, quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a directory"):
        train(RECIPE, tmp_path / "file" / "run", quiet=True)
    with pytest.raises(ValueError, match="Expected batch_size of at least 1"):
        train(override(RECIPE, ["--batch-size", "0"]), tmp_path / "none", quiet=True)
    with pytest.raises(ValueError, match=r"at least one step: epochs \* 1437 images / batch_size"):
        train(override(RECIPE, ["--batch-size", "4096"]), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="Unknown model"):
        train(override(RECIPE, ["--model.name", "efficientnet-lite9"]), tmp_path, quiet=True)


@pytest.mark.usefixtures("mini")
def test_a_run_that_gets_no_better_ends_early(tmp_path, monkeypatch):
    """Even if it is interrupted, it ends at the same step with the same bits. It trains the blocks from `freeze` on.

    It keeps the numbers that it has chosen for its data, even if another version would choose others.
    """
    # Steps that change no prediction, so that the first evaluation is the best.
    still = [
        "--optimizer.peak",
        "1e-8",
        "--model.bn-momentum",
        "0.99999999",
        "--epochs",
        "0.25",
        "--run.eval-every",
        "0.05",
        "--run.save-every",
        "0.09",
        "--run.no-eval-raw",
    ]
    still += ["--batch-size", "None", "--schedule.warmup-epochs", "None"]
    how = override(RECIPE, ["--model.name", "efficientnet-b0", "--model.freeze", "block3", *still])
    patient = override(how, ["--run.patience", "2"])
    result = train(patient, tmp_path / "run", quiet=True)
    evaluated = [row["step"] for row in rows(tmp_path / "run", "eval")]
    assert evaluated == [2, 4, 6] and (result["steps"], result["best_step"]) == (6, 2)
    reason = "stopped early at step 6 of 11: 2 evaluations without a better top-1 than that of step 2"
    assert result["stopped_early"] == reason
    assert f"S{reason[1:]}" in (tmp_path / "run" / "train.log").read_text()
    model = keras.models.load_model(tmp_path / "run" / "model.keras", compile=False)
    config = (tmp_path / "run" / "config.json").read_text()
    chosen = {"batch_size": 32, "schedule.warmup_epochs": 0.025}
    assert json.loads(config)["resolved"]["chosen"] == chosen
    assert from_json(config) == with_fields(settled(patient), chosen)
    told = "Chosen for 1,437 training images: batch size 32, warmup epochs 0.025"
    assert (tmp_path / "run" / "train.log").read_text().count(told) == 1

    # Training changes the values that start at 0, whatever their rounding.
    moved = {v.path for v in model.weights if v.name in ("beta", "bias") and np.any(v.numpy())}
    assert moved == {
        v.path
        for v in model.weights
        if v.name in ("beta", "bias") and v.path.split("_")[0] not in ("stem", "block1a", "block2a")
    }

    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    for name in ("result.json", "model.keras", "checkpoints/ckpt-6.index"):
        (tmp_path / "killed" / name).unlink()
    monkeypatch.setattr(finetune, "_SIZES", ((None, 1, 8),))
    again = train(patient, tmp_path / "killed", quiet=True)
    assert (tmp_path / "killed" / "config.json").read_text() == config
    assert same_weights(keras.models.load_model(tmp_path / "killed" / "model.keras", compile=False), model)
    speed = ("seconds", "images_per_second")
    assert {**again, **dict.fromkeys(speed)} == {**result, **dict.fromkeys(speed)}

    # The run is complete. With more patience it continues.
    assert train(patient, tmp_path / "run", quiet=True) == result
    longer = train(how, tmp_path / "run", quiet=True)
    assert (longer["steps"], longer["stopped_early"]) == (11, None)
    with pytest.raises(ValueError, match=r"Expected run.patience of at least 1. Received: 0"):
        train(override(how, ["--run.patience", "0"]), tmp_path / "none", quiet=True)
    with pytest.raises(ValueError, match=r"Unknown model.freeze. .*Received: 'block4'. Nearest: 'block3'"):
        train(override(how, ["--model.freeze", "block4"]), tmp_path / "none", quiet=True)


@pytest.mark.usefixtures("mini")
def test_balance_needs_labels_that_are_known(tmp_path):
    how = override(RECIPE, ["--model.name", "efficientnet-b0", "--data.balance"])
    machine = tensorflow_runner.connect(Run())
    job = training._planned(how, str(tmp_path), pipeline.Host(), machine, open_source(how.data))
    learner, *_ = training._build(job, 1)
    counts = np.bincount(job.source.train.labels)
    assert learner.class_weights == pytest.approx(1437 / (10 * counts)) and min(counts) < max(counts)
    records = dataclasses.replace(job.source, train=Records([], lambda record: record, 1))
    with pytest.raises(ValueError, match=r"Expected a folder of photos or the digits with data.balance"):
        training._build(dataclasses.replace(job, source=records), 1)


@pytest.mark.usefixtures("mini")
def test_a_loss_that_is_not_finite_names_its_step_and_batch(tmp_path):
    changes = ["--optimizer.peak", "1e30", "--schedule.kind", "constant", "--schedule.warmup-epochs", "0"]
    wild = override(RECIPE, [*changes, "--run.save-every", "0.02", "--run.steps-per-loop", "1"])
    message = r"Expected a finite loss. Received: .* at step (\d+), with \d+, \d+, ... \(all 32 on this host: .*\). To "
    with pytest.raises(ValueError, match=message) as raised:
        train(wild, tmp_path, quiet=True)
    told = json.loads((tmp_path / "nonfinite-0.json").read_text())
    assert f"at step {told['step']}" in str(raised.value) and told["step"] <= 4
    # The names are those of exactly that batch.
    source = open_source(wild.data)
    start = (told["step"] - 1) * 32
    numbers = source.train.train(0, start, 0, 1, 32).take(32)
    assert told["examples"] == [str(int(example["id"])) for example in numbers] and len(set(told["examples"])) == 32
    # All checkpoints are finite. Another recipe may resume from them if changes are allowed.
    saved = sorted(tmp_path.glob("checkpoints/*.index"))
    assert all(int(path.stem.removeprefix("ckpt-")) < told["step"] for path in saved)
    with pytest.raises(ValueError, match=r"or --allow-changes. Received: optimizer.peak 1e\+30 -> 1e-06"):
        train(override(wild, ["--optimizer.peak", "1e-6"]), tmp_path, quiet=True)
    assert saved == sorted(tmp_path.glob("checkpoints/*.index"))


@pytest.mark.long  # tests/commands/test_own_classifier.py trains on such a folder too
@pytest.mark.usefixtures("shallow")
def test_a_folder_with_rotten_photographs(tmp_path):
    """Skips, counts and names 1 % truncated photos, an empty file and a text file. A fifth of them stops the run."""
    import tensorflow as tf

    rng, bad = np.random.default_rng(0), []
    for number in range(400):
        place = tmp_path / "photographs" / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        content = tf.io.encode_jpeg(rng.integers(0, 256, (40, 40, 3), "uint8")).numpy()
        path = place / f"{number}.jpg"
        if number in (3, 100, 203, 300):
            content = content[: len(content) // 2]
        elif number == 50:
            content = b""
        elif number == 51:
            content = b"no photograph"
        path.write_bytes(content)
        if number in (3, 100, 203, 300, 50, 51):
            bad.append(str(path))
        if number < 20:
            (tmp_path / "photographs" / "val" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            good = tf.io.encode_jpeg(rng.integers(0, 256, (40, 40, 3), "uint8")).numpy()
            (tmp_path / "photographs" / "val" / "ab"[number % 2] / f"{number}.jpg").write_bytes(good)
    recipe = override(
        RECIPE, ["--data.source", str(tmp_path / "photographs"), "--epochs", "1.3", "--run.eval-every", "9"]
    )
    result = train(recipe, tmp_path / "run", quiet=True)
    assert (result["skipped"], result["examples"]) == (6, 20)
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows} == set(bad)
    for number in range(0, 400, 5):
        path = tmp_path / "photographs" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"Expected at most 5.0% of the images to be unreadable.*Received: \d+ of 400"):
        train(recipe, tmp_path / "other", quiet=True)

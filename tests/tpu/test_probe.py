"""Protects the recipe `probe`: its classifier is the optimum, its model is one net, and features are computed once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from keras_effnet.model_metadata import metadata
from keras_effnet.nets.variants import B0_STAGES, VARIANTS
from keras_effnet.tpu import recipes
from keras_effnet.tpu.config import Probe, override
from keras_effnet.tpu.input import features, pipeline
from keras_effnet.tpu.input.skipped_examples import Skipped
from keras_effnet.tpu.input.sources import open_source
from keras_effnet.tpu.reports.evaluation import evaluate
from keras_effnet.tpu.step import linear_classifier
from keras_effnet.tpu.train import train


def correlated(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns features with correlations, different variances and a mean, and labels that depend on them."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12)) * np.geomspace(0.01, 30, 12) + 5
    labels = (values @ rng.normal(size=(12, classes)) / 30 + rng.gumbel(size=(count, classes))).argmax(1)
    return values.astype("float32"), labels


def shares(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize(("classes", "l2"), [(4, 0.1), (4, 1e-3), (3, 1e-2)])
def test_the_classifier_is_the_optimum_that_scikit_learn_finds(classes, l2):
    values, labels = correlated(300, classes)
    factors = np.where(labels == 0, 2.0, 0.5)
    found = linear_classifier.fit(values, labels, classes, weights=factors, l2=l2).classifier
    mean, transform = linear_classifier.whitening(values)
    theirs = LogisticRegression(C=1 / (l2 * len(values)), tol=1e-8, max_iter=10000)
    theirs.fit((values - mean) @ transform.astype("float64"), labels, sample_weight=factors)
    expected = theirs.predict_proba((values - mean) @ transform.astype("float64"))
    np.testing.assert_allclose(shares(found.logits(values)), expected, atol=1e-3)


def test_the_strength_is_chosen_by_photos_that_are_held_out_with_all_their_views():
    """Labels without a cause cannot be predicted. They could be if a photo's other views were among the fitted ones."""
    rng = np.random.default_rng(1)
    photos = rng.normal(size=(200, 40)).astype("float32")
    views = np.concatenate([photos, photos + 0.01 * rng.normal(size=photos.shape).astype("float32")])
    labels = rng.integers(0, 2, 200)
    found = linear_classifier.fit(views, np.tile(labels, 2), 2, groups=np.tile(np.arange(200), 2))
    assert found.held_out < 0.6 and found.l2 == max(linear_classifier.STRENGTHS)
    # Labels with a cause need less.
    found = linear_classifier.fit(views, np.tile(photos[:, 0] > 0, 2).astype(int), 2, groups=np.tile(np.arange(200), 2))
    assert found.held_out > 0.9 and found.l2 < 0.1


def test_few_photos_and_classes_without_any():
    values, labels = correlated(3, 3)
    found = linear_classifier.fit(values, np.array([0, 1, 3]), 5)
    assert (found.l2, found.held_out) == (linear_classifier.DEFAULT, None)
    logits = found.classifier.logits(values)
    assert logits.argmax(1).tolist() == [0, 1, 3]
    assert (logits[:, [2, 4]] < logits[:, [0, 1, 3]].min()).all()
    with pytest.raises(ValueError, match=r"Expected l2 above 0. Received: 0"):
        linear_classifier.fit(values, labels, 3, l2=0)


@pytest.fixture
def mini(monkeypatch):
    """The net of three blocks of tests/mini.py."""
    stages = tuple(replace(stage, repeats=1) for stage in B0_STAGES[:3])
    variant = replace(VARIANTS["efficientnet-b0"], name="efficientnet-mini", stages=stages)
    monkeypatch.setitem(VARIANTS, "efficientnet-mini", variant)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 300 digits of three classes, of which one to train on cannot be read."""
    digits = load_digits(n_class=3)
    for number, (pixels, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
        place = tmp_path / "photos" / ("train" if number % 5 else "val") / ["zero", "one", "two"][label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).resize((24, 24)).save(place / f"{number:03}.png")
    sorted((tmp_path / "photos" / "train" / "one").iterdir())[3].write_bytes(b"no photo")
    return tmp_path / "photos"


def recipe_of(photos: Path, *changes: str):
    small = ["--model.name", "efficientnet-mini", "--model.weights", "None", "--model.image-size", "32"]
    small += ["--data.eval-crop", "1", "--probe.views", "2"]
    return override(recipes.find("probe"), ["--data.source", str(photos), *small, *changes])


def chunks(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.glob("features/*/*.npz")}


def loaded(chunk: Path) -> dict[str, np.ndarray]:
    with np.load(chunk) as found:
        return dict(found)


@pytest.mark.usefixtures("mini", "eager")
def test_a_run_leaves_one_net_and_its_features(own_cache, photos, tmp_path, caplog):
    recipe = recipe_of(photos)
    result = train(recipe, tmp_path / "run", quiet=True)
    # A random body is enough for three digits.
    assert result["ema_top1"] > 0.8 and result["examples"] == 60 and result["labels"] == ["one", "two", "zero"]
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (row["split"], row["step"], row["ema_top1"]) == ("eval", result["steps"], result["ema_top1"])
    found = metadata(tmp_path / "run")
    assert found == metadata(tmp_path / "run" / "result.json") and found["labels"] == result["labels"]
    # The unreadable photo is named, once.
    broken = str(sorted((photos / "train" / "one").iterdir())[3])
    assert result["skipped"] == 1 and sum(broken in record.getMessage() for record in caplog.records) == 1
    lines = (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [broken]
    # The saved model computes the classifier of the features, from the pixels that a run evaluates on.
    model = keras.models.load_model(tmp_path / "run" / "model.keras", compile=False)
    source = open_source(recipe.data)
    images, labels, _ = next(iter(pipeline.evaluation(source, recipe, 32, 60, Skipped(None, 60))))
    probabilities = model.predict_on_batch(images.numpy())
    assert np.mean(probabilities.argmax(1) == labels.numpy()) == pytest.approx(result["ema_top1"])
    (values,) = [chunk["values"] for chunk in map(loaded, chunks(own_cache)) if len(chunk["labels"]) == 60]
    kernel, bias = model.get_layer("predictions").get_weights()
    np.testing.assert_allclose(probabilities, shares(values @ kernel + bias), atol=1e-3)
    # The folder is that of a run.
    assert evaluate(tmp_path / "run")["top1"] == pytest.approx(result["ema_top1"])

    # With another strength, the classifier is fitted to the features on disk. The same call again changes nothing.
    before = chunks(own_cache)
    assert len(before) == 3
    other = recipe_of(photos, "--probe.l2", "0.5")
    assert train(other, tmp_path / "other", quiet=True)["l2"] == 0.5 and chunks(own_cache) == before
    assert train(recipe, tmp_path / "run", quiet=True) == result
    with pytest.raises(ValueError, match=r"--allow-changes. Received: probe.l2 None -> 0.5"):
        train(other, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"--allow-changes. Received: .*probe.views 2 -> 0"):
        train(replace(recipe, probe=Probe()), tmp_path / "run", quiet=True)
    assert train(other, tmp_path / "run", quiet=True, allow_changes=True)["l2"] == 0.5
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    # Another photo means other features, of its part alone. The same call then fits again.
    with Image.open(photos / "train" / "two" / "002.png") as image:
        image.rotate(90).save(photos / "train" / "two" / "002.png")
    again = train(other, tmp_path / "run", quiet=True)
    assert again["ema_loss"] != result["ema_loss"] and len(chunks(own_cache)) == 5
    assert before.items() <= chunks(own_cache).items()
    # A run that squashes its photos evaluates itself so, and says it.
    assert "crop_mode" not in evaluate(tmp_path / "run")["preprocessing"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["crop_mode"] = "squash"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    found = evaluate(tmp_path / "run")
    assert found["preprocessing"] == {"size": [32, 32], "crop": 1.0, "interpolation": "bicubic", "crop_mode": "squash"}
    squashed = replace(recipe, data=replace(recipe.data, crop_mode="squash"))
    keys = {features.View(source.evaluate, 60, each, 32).key("x") for each in (recipe, squashed)}
    assert len(keys) == 2


@pytest.mark.usefixtures("mini")
def test_what_does_not_fit_is_refused(own_cache, photos, tmp_path):
    with pytest.raises(ValueError, match=r"only fields that a probe uses: .*Received: optimizer.peak=0.1"):
        train(recipe_of(photos, "--optimizer.peak", "0.1"), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"Expected probe.l2 above 0. Received: -1"):
        train(recipe_of(photos, "--probe.l2", "-1"), tmp_path / "run", quiet=True)
    for path in sorted((photos / "train" / "two").iterdir())[:20]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"Expected at most 5.0% of the images to be unreadable.*Received: \d+ of 240"):
        train(recipe_of(photos), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model.keras").exists()


def test_an_interruption_leaves_whole_files_and_the_next_call_computes_the_rest(own_cache, photos, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 64)
    recipe = recipe_of(photos)
    source = open_source(recipe.data)
    view = features.View(source.train, source.train_count, recipe, 32, 1)
    done, stop_after = [], 96  # images

    def means(images: np.ndarray) -> np.ndarray:
        if len(done) >= stop_after:
            raise KeyboardInterrupt
        done.extend(images.mean((1, 2)))
        return images.mean((1, 2))

    def compute():
        return features.compute(view, "means", means, Skipped(None, source.train_count, 0.05))

    before = chunks(own_cache)
    with pytest.raises(KeyboardInterrupt):
        compute()
    kept = chunks(own_cache).items() - before.items()
    assert [path.name for path, _ in kept] == ["000000.npz"]
    # A file that was cut short is computed again.
    stop_after, whole = 1000, len(done)
    found = compute()
    first = loaded(next(path for path, _ in kept))
    assert len(done) - whole == 239 - len(first["labels"]) and kept <= chunks(own_cache).items()
    lost = sorted((photos / "train" / "one").iterdir())[3]
    readable = [number for number, path in enumerate(source.train.images) if path != str(lost)]
    assert found.ordinals.tolist() == readable and len(found.values) == 239
    np.testing.assert_array_equal(found.labels, source.train.labels[readable])
    last = next(path for path in chunks(own_cache).keys() - before.keys() if path.name == "000003.npz")
    last.write_bytes(last.read_bytes()[:100])
    done.clear()
    with pytest.warns(UserWarning, match=f"A kept file is damaged and is made again: {last}"):
        again = compute()
    np.testing.assert_array_equal(again.values, found.values)
    assert len(done) == 48


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 75),
    ],
)
@pytest.mark.long  # tests/tpu/resume/test_chaos.py stops and kills runs in CI
def test_a_stopped_run_resumes(tmp_path, number, status):
    options = ["--model.name", "efficientnet-mini", "--model.weights", "None", "--model.image-size", "96"]
    options += ["--probe.views", "8"]  # enough work for the signal to arrive before the end
    line = [sys.executable, ROOT / "tests" / "mini.py", "train", "probe", "--data", "digits", *options]
    environment = {**os.environ, "KERAS_EFFNET_HOME": str(tmp_path / "cache")}
    line += ["--run.report", "--workdir", tmp_path / "run"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not chunks(tmp_path / "cache"):
        time.sleep(0.02)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == status and "Run the same command again to resume" in told
    kept = chunks(tmp_path / "cache")
    assert kept and not (tmp_path / "run" / "result.json").exists()
    subprocess.run(line, check=True, capture_output=True, env=environment)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["examples"] == 360 and kept.items() <= chunks(tmp_path / "cache").items()
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{result['ema_top1']:.2%}" in page and 'class="lacking"' not in page

"""Tests `keras-effnet prune`, from a user's model and photos to a report, in a process that is killed on the way."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, command, invoked, run
from PIL import Image

import keras_effnet as ke
from keras_effnet import pruning
from keras_effnet.images import folders
from keras_effnet.images.photo_loader import image_loader
from keras_effnet.pruning import costs, workflow
from keras_effnet.pruning.photo_batches import Photographs


def write_digits(folder: Path, side: int) -> tuple:
    """Saves scikit-learn's digits as photos, 360 of them in `test`, the others in `train`. Returns them as arrays."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    arrays = {"train": ([], []), "test": ([], [])}
    for place, index in enumerate(order):
        part, label = "test" if place < 360 else "train", int(found.target[index])
        image = Image.fromarray((found.images[index] * (255 / 16)).astype("uint8"))
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(folder / part / str(label) / f"{index}.png")
        arrays[part][0].append(np.asarray(image)[..., None].repeat(3, -1))
        arrays[part][1].append(label)
    return tuple((np.stack(pixels).astype("float32"), np.array(labels)) for pixels, labels in arrays.values())


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="minutes of training; the parts run on every backend")
def test_the_command_prunes_a_users_model(tmp_path):
    """Fine-tunes to 97 % or more, removes 40 % of the multiply-adds, is killed, resumes, distills to within a point."""
    side, epochs = 48, 6
    train, _ = write_digits(tmp_path / "digits", side)
    keras.utils.set_random_seed(0)
    body = ke.EfficientNetLite0(include_top=False, pooling="avg", input_shape=(side, side, 3), bn_momentum=0.9)
    mine = keras.Sequential([body, keras.layers.Dropout(0.2), keras.layers.Dense(10, activation="softmax")])
    rate = keras.optimizers.schedules.CosineDecay(1e-3, 45 * epochs)
    mine.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    mine.fit(*train, batch_size=32, epochs=epochs, verbose=0)
    mine.save(tmp_path / "mine.keras")

    arguments = ["prune", tmp_path / "mine.keras", "--data", tmp_path / "digits", "--out", tmp_path / "out"]
    arguments += ["--epochs", epochs, "--json"]
    first = subprocess.Popen(
        [str(Path(sys.executable).parent / "keras-effnet"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    printed = ""
    with first:
        for line in first.stderr:
            printed += line
            if "Epoch 3/" in line:
                first.send_signal(signal.SIGKILL)
                break
    assert first.returncode == -signal.SIGKILL
    assert "Computing the importance of the channels from 1000 photos" in printed
    assert not (tmp_path / "out" / "report.json").exists()
    plan = (tmp_path / "out" / "plan.json").read_text()

    result = command(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Epoch 3/" in result.stderr and "Epoch 2/" not in result.stderr  # resumed
    assert "Computing the importance" not in result.stderr and (tmp_path / "out" / "plan.json").read_text() == plan
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    accuracy = report["accuracy"]
    assert accuracy["whole"] >= 0.97 and accuracy["distilled"] >= accuracy["whole"] - 0.01 > accuracy["pruned"]
    assert 1 - report["macs"]["pruned"] / report["macs"]["whole"] == pytest.approx(0.4, rel=0.01)
    assert report["latency"].keys() == {"keras, batch 1", "keras, batch 32", "predictor, batch 1"}
    assert report["photographs"]["test"] == 360 and report["photographs"]["train"] == 1437

    smaller = keras.models.load_model(tmp_path / "out" / "pruned.keras")
    assert costs.cost(smaller) == report["macs"]["pruned"]
    assert smaller.count_params() < mine.count_params()
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"| distilled | {accuracy['distilled']:.2%} |" in page and "| 7a |" in page
    with Image.open(tmp_path / "out" / "channels.png") as picture:
        assert picture.width > 500
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"pruned.keras", "plan.json", "report.json", "report.md", "channels.png"}


def photographs(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, len(name), 10)).save(folder / name)
    return folder


def test_folders_of_classes(tmp_path):
    split = photographs(tmp_path / "a", "train/x/1.png", "train/y/1.png", "val/x/2.png", "val/y/3.jpg")
    found = folders.labelled(split)
    assert found.labels == ["x", "y"]
    assert [(Path(path).name, label) for path, label in found.train] == [("1.png", 0), ("1.png", 1)]
    assert [(Path(path).name, label) for path, label in found.test] == [("2.png", 0), ("3.jpg", 1)]
    plain = photographs(tmp_path / "b", *(f"{name}/{number}.png" for name in "xy" for number in range(10)))
    (plain / "x" / "notes.txt").write_text("no photograph")
    found = folders.labelled(plain)
    train, test = found.train, found.test
    assert len(train) == 16 and len(test) == 4 and not set(train) & set(test)
    # The images have the size of the model's input, with and without the weights' crop.
    model = ke.EfficientNetLite0(weights=None, input_shape=(32, 48, 3))
    for crop in (False, True):
        batches = Photographs(train, image_loader(model, crop=crop), 10, shuffle=True)
        (pixels, labels), (_, rest) = batches[0], batches[1]
        assert pixels.shape == (10, 32, 48, 3) and sorted([*labels, *rest]) == [0] * 8 + [1] * 8
    for folder, problem in (
        (tmp_path / "none", "one folder per class"),
        (photographs(tmp_path / "c", "1.png"), "with no photos"),
        (photographs(tmp_path / "d", "train/x/1.png", "val/y/1.png"), "photos of y only to evaluate on"),
    ):
        with pytest.raises(ValueError, match=problem):
            folders.labelled(folder)


@pytest.mark.usefixtures("shallow")
def test_what_does_not_fit_is_told_before_the_work(tmp_path, capfd):
    folder = photographs(tmp_path / "data", *(f"{name}/{number}.png" for name in "xy" for number in range(5)))
    model = ke.EfficientNetLite0(weights=None, classes=3, input_shape=(32, 32, 3))
    model.save(tmp_path / "three.keras")
    with pytest.raises(ValueError, match="Expected a model with 2 classes, as in"):
        workflow.prune(tmp_path / "three.keras", folder, tmp_path / "out")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match="Expected a model of this package"):
        workflow.prune(tmp_path / "other.keras", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    state = tmp_path / "other" / ".training" / "settings.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3)).save(tmp_path / "two.keras")
    with pytest.raises(ValueError, match="Nearest: 'exact'"):
        workflow.prune(tmp_path / "two.keras", folder, tmp_path / "other", solver="exakt")
    assert state.read_text() == "{}"  # the state of an interrupted call
    result = invoked("prune", tmp_path / "no.keras", "--data", folder, "--out", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.startswith("error: Expected a model file. Received: ")
    assert len(result.stderr.splitlines()) == 1 and not capfd.readouterr().err


@pytest.mark.usefixtures("shallow")
def test_load_image_knows_a_model_with_a_head_of_ones_own(photograph):
    body = ke.EfficientNetB1(weights=None, include_top=False, pooling="avg", input_shape=(240, 240, 3))
    mine = keras.Sequential([body, keras.layers.Dense(2)])
    assert np.array_equal(ke.load_image(photograph, mine), ke.load_image(photograph, body))
    # A pruned model expects the same photos as the whole one.
    whole = ke.EfficientNetB1(weights=None)
    del whole.weights_record
    smaller = pruning.apply(whole, pruning.plan(whole, None, importance="magnitude"))
    assert np.array_equal(ke.load_image(photograph, smaller), ke.load_image(photograph, whole))
    assert not np.array_equal(ke.load_image(photograph, whole), ke.load_image(photograph, "efficientnet-b1"))
    assert run(smaller, ke.load_image(photograph, smaller)[None]).shape == (1, 1000)

"""A user's own classifier in every command: labels and crop travel from a folder of odd photos to every file."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, command, invoked, shallow_nets, shallow_rows, tiny
from PIL import Image

import keras_effnet as ke
from keras_effnet.inference.classifier import Classifier
from keras_effnet.model_loader import resolve

if BACKEND != "tensorflow":
    pytest.skip("commands and files do not depend on the backend", allow_module_level=True)

CAT, COFFEE = ROOT / "docs" / "cat.png", ROOT / "docs" / "coffee.png"
LABELS = ["Große Katze", "coffee cup"]


def small(classes: int = 2, seed: int = 0, **more):
    keras.utils.set_random_seed(seed)
    with shallow_nets():
        return ke.create_model("lite0", weights=None, classes=classes, input_shape=(32, 32, 3), **more)


def patches(photo: Path, count: int, seed: int = 0) -> list[Image.Image]:
    whole, random = Image.open(photo).convert("RGB"), np.random.default_rng(seed)
    found = []
    for _ in range(count):
        side = int(random.integers(min(whole.size) // 2, min(whole.size)))
        left, top = (int(random.integers(0, length - side + 1)) for length in whole.size)
        found.append(whole.crop((left, top, left + side, top + side)).resize((96, 96)))
    return found


@pytest.fixture(scope="module")
def odd_photos(tmp_path_factory) -> Path:
    """Two classes with photos of all kinds, an empty one, one of a single photo, and files that are none."""
    root = tmp_path_factory.mktemp("odd") / "my photos"
    for label, photo in zip(LABELS, (CAT, COFFEE), strict=True):
        (root / label).mkdir(parents=True)
        for number, image in enumerate(patches(photo, 30)):
            image.save(root / label / f"{number:02}.jpg", quality=95)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    cup, *others = patches(COFFEE, 6, seed=1)
    gray = Image.fromarray(np.asarray(cup.convert("L")).astype("uint16") * 257)
    for name, image, more in (
        ("cmyk.jpg", cup.convert("CMYK"), {}),
        ("clear.png", others[0].convert("RGBA"), {}),
        ("gray16.png", gray, {}),
        ("new.webp", others[1], {}),
        ("scan.tiff", others[2], {}),
        ("UPPER.JPEG", others[3], {"format": "JPEG"}),
        ("phone.jpg", others[4].rotate(90), {"exif": rotated}),
    ):
        image.save(root / LABELS[1] / name, **more)
    (root / LABELS[0] / "text.jpg").write_text("not a photo")
    whole = (root / LABELS[1] / "07.jpg").read_bytes()
    (root / LABELS[1] / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / LABELS[0] / ".DS_Store").write_bytes(b"x")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.jpg").write_bytes(whole)
    (root / "empty").mkdir()
    (root / "single").mkdir()
    cup.save(root / "single" / "one.jpg")
    return root


def found_in(text: str, path) -> str:
    """Returns the most likely class that `predict --json` names for a photo."""
    rows = {row["path"]: row for row in json.loads(text)["photographs"]}
    return rows[str(path)]["predictions"][0]["name"]


@pytest.mark.long
def test_the_whole_way_of_a_folder_of_odd_photos(odd_photos, tmp_path):
    """Train, Ctrl-C, resume, predict, eval, describe, plot, prune, export to all formats, predict with each."""
    run, cat, cup = tmp_path / "runs" / "mine", odd_photos / LABELS[0] / "03.jpg", odd_photos / LABELS[1] / "scan.tiff"
    line = ["train", "finetune", "--data", str(odd_photos), "--workdir", str(run), "--model.image-size", "64"]
    line += [
        "--epochs",
        "12",
        "--batch-size",
        "16",
        "--run.no-report",
        "--data.eval-crop",
        "1",
        "--run.steps-per-loop",
        "5",
    ]
    program = [str(Path(sys.executable).parent / "keras-effnet"), *line]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(program, stdout=log, stderr=log)
        while "step 5/" not in (tmp_path / "log").read_text() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "Class 'empty' has no photo: it is left out" in said and "Class 'single' has no photo to evaluate on" in said
    done = command(*line)
    assert done.returncode == 0, done.stderr
    said += done.stderr
    assert "Traceback" not in said and said.count("text.jpg") >= 1 and said.count("truncated.jpg") >= 1
    result = json.loads((run / "result.json").read_text())
    assert result["labels"] == [*LABELS, "single"] and result["ema_top1"] > 0.8

    pruned = tmp_path / "pruned"
    options = ("--epochs", 1, "--calibration", 16, "--reduction", 0.2)
    with pytest.warns(UserWarning, match=r"Skipped 2 of .* that cannot be read: .*text\.jpg, .*truncated\.jpg"):
        assert invoked("prune", run, "--data", odd_photos, "--out", pruned, *options).returncode == 0
    models = [run, pruned / "pruned.keras"]
    for name in ("mine.onnx", "mine.tflite", "mine.xml", "saved"):
        models.append(tmp_path / name)
        assert invoked("export", run, tmp_path / name).returncode == 0
    models.append(tmp_path / "int8.tflite")
    with pytest.warns(UserWarning, match=r"Skipped 2 of .*text\.jpg, .*truncated\.jpg"):
        done = invoked("export", run, models[-1], "--precision", "int8", "--calibration", odd_photos)
    assert done.returncode == 0
    for model in models:
        assert ke.metadata(model)["labels"] == [*LABELS, "single"], model
        runtime = "keras" if model in models[:2] else "auto"
        broken = odd_photos / LABELS[0] / "text.jpg"
        done = invoked("predict", "--model", model, "--runtime", runtime, cat, cup, broken, "--json")
        assert done.returncode == 2 and "text.jpg" in done.stderr
        assert [found_in(done.stdout, path) for path in (cat, cup)] == LABELS, model
    for model in (run, models[-1]):
        scored = json.loads(invoked("eval", model, "--data", odd_photos, "--json").stdout)
        assert scored["top1"] > 0.8 and [Path(name).name for name in scored["skipped"]] == ["text.jpg", "truncated.jpg"]
        assert {row["name"] for row in scored["classes"]} <= {*LABELS, "single"}
    assert invoked("eval", models[-1], "--data", odd_photos).stderr.count("text.jpg") == 1
    assert "Große Katze, coffee cup, single" in invoked("describe", run).stdout
    assert invoked("plot", run, tmp_path / "mine.svg").returncode == 0


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pets") / "pets.keras"
    ke.save_model(small(), path, labels=LABELS, crop_padding=0, interpolation="bilinear")
    return path


def test_a_saved_model_keeps_its_names_and_its_crop(pets):
    model = ke.load_model(pets)
    assert model.labels == LABELS and model.weights_record is None
    assert np.array_equal(ke.load_image(CAT, pets), ke.load_image(CAT, model))
    whole = ke.load_image(CAT, small())
    assert not np.array_equal(ke.load_image(CAT, pets), whole)  # an eighth is cropped away, bicubic
    # That plain Keras reads such a file: tests/inference/test_export.py.
    assert ke.metadata(pets)["preprocessing"]["crop_padding"] == 0


def test_names_that_plain_keras_has_dropped_are_numbers(pets, tmp_path):
    plain = tmp_path / "plain.keras"
    keras.saving.load_model(pets).save(plain)
    assert ke.load_model(plain).labels is None and ke.metadata(plain) == {}
    done = invoked("predict", "--model", plain, CAT, COFFEE, "--runtime", "keras", "--json")
    assert done.returncode == 0 and done.stderr.count("The model has no class names") == 1
    names = [row["name"] for row in json.loads(done.stdout)["photographs"][0]["predictions"]]
    assert sorted(names) == ["0", "1"]


def test_published_weights_keep_their_record_and_imagenets_names(tmp_path):
    model = ke.EfficientNetLite0()
    ke.save_model(model, tmp_path / "lite0.keras")
    again = ke.load_model(tmp_path / "lite0.keras")
    assert again.weights_record == model.weights_record and again.labels[285] == "Egyptian cat"
    assert np.array_equal(ke.load_image(CAT, again), ke.load_image(CAT, model))
    assert np.array_equal(ke.load_image(CAT, tmp_path / "lite0.keras"), ke.load_image(CAT, model))


def test_logits_become_probabilities(tmp_path):
    ke.save_model(tiny(classes=2, activation=None), tmp_path / "logits.keras", labels=LABELS)
    (found,) = Classifier(tmp_path / "logits.keras", runtime="keras")([CAT])
    assert sum(row["probability"] for row in found["predictions"]) == pytest.approx(1)


def test_wrong_labels_save_nothing(tmp_path):
    for labels, problem in (
        (["cat"], "2 outputs. Received: 1 labels"),
        ("ab", "list of class names"),
        (["a", ""], "list of"),
    ):
        with pytest.raises(ValueError, match=problem):
            ke.save_model(tiny(classes=2), tmp_path / "pets.keras", labels=labels)
    with pytest.raises(ValueError, match=r"ends in \.keras"):
        ke.save_model(tiny(), tmp_path / "pets.h5")
    assert not list(tmp_path.iterdir())


def test_metadata_of_a_newer_version_is_refused(pets, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"metadata": {"schema": 2}}))
    with pytest.raises(ValueError, match=r"schema 1\. Received: .*of schema 2.*Update keras_effnet"):
        ke.metadata(path)
    path.write_text(json.dumps({"metadata": ke.metadata(pets)}))
    assert ke.metadata(path) == ke.metadata(pets)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *(
            (alias, "efficientnet-b0")
            for alias in ("b0", "B0", "EfficientNetB0", "efficientnet_b0", "tf_efficientnet_b0")
        ),
        *((alias, "efficientnet-lite0") for alias in ("lite0", "Lite0", "tf_efficientnet_lite0", "efficientnet-lite0")),
        ("tf_efficientnet_es", "efficientnet-edgetpu-s"),
        ("EfficientNetEdgeTPUS", "efficientnet-edgetpu-s"),
        ("tf_efficientnet_cc_b1_8e", "efficientnet-condconv-b0-8e-depth"),
        ("EfficientNetCondConvB0x8Depth", "efficientnet-condconv-b0-8e-depth"),
        ("efficientnet_b2_pruned", "efficientnet-b2-pruned"),
        ("L2", "efficientnet-l2"),
    ],
)
def test_each_alias_names_its_model(alias, name):
    assert resolve(alias).place == name and ke.describe(alias)["variant"] == name
    assert ke.list_weights(alias) == ke.list_weights(name)


def test_a_timm_name_brings_its_weights():
    found = resolve("tf_efficientnet_b0.ns_jft_in1k")
    assert (found.place, found.tag_of("imagenet"), found.tag_of("advprop")) == (
        "efficientnet-b0",
        "tf_efficientnet_b0.ns_jft_in1k",
        "advprop",
    )


def test_what_is_no_model_is_told_with_the_nearest(pets, tmp_path):
    for wrong, told in (
        ("efficientnet-b9", "Unknown model. Received: 'efficientnet-b9'. Nearest: 'efficientnet-b"),
        ("lite7", "Nearest: 'efficientnet-lite"),
        ("resnet50", "Unknown model"),
        (tmp_path / "none.keras", "which does not exist"),
        (tmp_path, "or the folder of a run"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            ke.load_model(wrong)
    weights = tmp_path / "mine.weights.h5"
    small().save_weights(weights)
    with pytest.raises(ValueError, match=r"a file of weights.*--weights"):
        ke.Predictor(weights)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has none yet\. Resume the run"):
        ke.describe(tmp_path / "run")
    for best in ("best.keras", "model.keras"):
        (tmp_path / "run" / best).write_bytes(pets.read_bytes())
    assert resolve(tmp_path / "run", best=True).place.endswith("best.keras")
    assert resolve(tmp_path / "run").place.endswith("model.keras")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("nested", [pytest.param(False, marks=pytest.mark.long), True])
def test_nets_of_keras_applications_are_models_too(nested, tmp_path, monkeypatch):
    # Each command loads the net anew. Theirs gets as few blocks as `shallow` gives ours.
    table = sys.modules[keras.applications.EfficientNetB0.__module__]
    monkeypatch.setattr(table, "DEFAULT_BLOCKS_ARGS", shallow_rows())
    net = keras.applications.EfficientNetB0(weights=None, classes=2, input_shape=(64, 48, 3), include_top=not nested)
    if nested:
        layers = keras.layers
        net = keras.Sequential(
            [keras.Input((64, 48, 3)), net, layers.GlobalAveragePooling2D(), layers.Dense(2)], name="mine"
        )
    ke.save_model(net, tmp_path / "theirs.keras", labels=LABELS)
    found = ke.describe(tmp_path / "theirs.keras")
    assert (found["variant"], found["resolution"], found["classes"]) == ("efficientnet-b0", [64, 48], 2)
    assert found["labels"] == LABELS and np.allclose(found["preprocessing"], ([1 / 255] * 3, [0] * 3))
    assert ke.load_image(CAT, tmp_path / "theirs.keras").shape == (64, 48, 3)
    assert ke.plot(tmp_path / "theirs.keras", tmp_path / "theirs.svg").exists()
    (row,) = Classifier(tmp_path / "theirs.keras", runtime="keras")([CAT])
    assert {one["name"] for one in row["predictions"]} == set(LABELS)

"""`evaluate()`: scores of published weights on photos, all layouts of validation sets, and error messages."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, invoked, tiny
from PIL import Image, ImageEnhance, ImageOps
from sklearn.metrics import precision_recall_fscore_support

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow reads", allow_module_level=True)

import sklearn.datasets
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_effnet as ke
from keras_effnet.images import photo_loader
from keras_effnet.inference import runtimes
from keras_effnet.inference.classifier import Classifier
from keras_effnet.tpu.config import Data
from keras_effnet.tpu.input.sources import open_evaluation
from keras_effnet.tpu.reports.evaluation import evaluate
from keras_effnet.weights import registry

CLASSES = {"n02123045": 281, "n07920052": 967, "n03877845": 698, "n11939491": 985}
BROKEN = "n07920052/10.jpg"


def photographs() -> list[Image.Image]:
    bundled = [Image.open(ROOT / "docs" / name).convert("RGB") for name in ("cat.png", "coffee.png")]
    return [*bundled, *map(Image.fromarray, sklearn.datasets.load_sample_images().images)]


def copies(photograph: Image.Image) -> list[bytes]:
    """Returns ten different variations of a photo, as PNG and JPEG."""
    found, random = [], np.random.default_rng(0)
    for number in range(10):
        width, height = photograph.size
        left, top, right, bottom = random.uniform(0, 0.35, 4)
        image = photograph.crop(
            (int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height))
        )
        image = ImageOps.mirror(image) if number % 2 else image
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.4, 1.6))
        file = io.BytesIO()
        if number == 9:
            image.save(file, "PNG")
        else:
            image.save(file, "JPEG", quality=20 + 8 * number)
        found.append(file.getvalue())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A validation set: a folder for each of four ImageNet classes, and one truncated file."""
    root = tmp_path_factory.mktemp("imagenet")
    for wnid, photograph in zip(CLASSES, photographs(), strict=True):
        (root / wnid).mkdir()
        for number, content in enumerate(copies(photograph)):
            (root / wnid / f"{number}.jpg").write_bytes(content)
    (root / BROKEN).write_bytes((root / "n07920052/0.jpg").read_bytes()[:900])
    return root


@pytest.fixture(scope="module")
def lite0():
    """The model of `result`, loaded once. Nothing changes it."""
    return ke.EfficientNetLite0()


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictions") / "rows.jsonl"
    found = evaluate("efficientnet-lite0", Data(str(folder)), batch_size=16, predictions=path)
    return found | {"rows": [json.loads(line) for line in path.read_text().splitlines()]}


def accuracy(rows) -> tuple[float, float]:
    ranked = [[one["class"] for one in row["predictions"]] for row in rows]
    pairs = list(zip(ranked, (row["label"] for row in rows), strict=True))
    return float(np.mean([best[0] == label for best, label in pairs])), float(np.mean([y in best for best, y in pairs]))


def test_each_image_is_what_the_plain_model_says(folder, result, lite0):
    model = lite0
    files = [path for path in sorted(folder.glob("*/*.jpg")) if not str(path).endswith(BROKEN)]
    assert sorted(row["name"] for row in result["rows"]) == list(map(str, files)) and len(files) == 40
    rows = {row["name"]: row for row in result["rows"]}
    plain = model.predict(np.stack([ke.load_image(path, model) for path in files]), verbose=0)
    named = ke.decode_predictions(plain)
    for path, probabilities, best in zip(files, plain, named, strict=True):
        row = rows[str(path)]
        assert row["label"] == CLASSES[path.parent.name] and row["label_name"].startswith(path.parent.name)
        assert row["predictions"][0]["class"] == np.argmax(probabilities)
        assert [one["name"].split(" ", 1)[0] for one in row["predictions"]] == [wnid for wnid, *_ in best]
        assert [one["probability"] for one in row["predictions"]] == pytest.approx([p for *_, p in best], abs=1e-4)
    assert (result["top1"], result["top5"]) == pytest.approx(accuracy(result["rows"]))
    assert 0.2 < result["top1"] < 1.0  # correct and wrong predictions are both compared above
    with pytest.raises(ValueError, match=r"1000 classes, or folders named by WordNet ids. Received: 10"):
        evaluate(model, Data("digits"))


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_probabilities_are_those_of_predict(activation, folder, shallow, eager, tmp_path):
    """Outputs of a sigmoid are probabilities, though their sum is not 1. Logits may lie between 0 and 1."""
    shape = {"include_top": False, "pooling": "avg", "input_shape": (32, 32, 3)}
    body = ke.EfficientNetLite0(weights=None, **shape)
    layer = keras.layers.Dense(2, activation, bias_initializer=keras.initializers.Constant(0.5))
    model = keras.Model(body.input, layer(body.output))
    ke.save_model(model, tmp_path / "two.keras", labels=list(CLASSES)[:2])
    photos = tmp_path / "photos"
    for wnid in list(CLASSES)[:2]:
        (photos / wnid).mkdir(parents=True)
        shutil.copy(folder / wnid / "3.jpg", photos / wnid)
    path = tmp_path / "rows.jsonl"
    evaluate(str(tmp_path / "two.keras"), Data(str(photos)), predictions=path)
    classifier = Classifier(str(tmp_path / "two.keras"), runtime="keras")
    for row in map(json.loads, path.read_text().splitlines()):
        (expected,) = classifier([row["name"]])
        for one in row["predictions"]:
            (other,) = [each for each in expected["predictions"] if each["name"] == one["name"]]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_an_export_predicts_as_predict_files_does(suffix, folder, tmp_path, monkeypatch):
    model = ke.save_model(tiny(classes=4), tmp_path / "four.keras", labels=sorted(CLASSES))
    path = tmp_path / f"four{suffix}"
    ke.export(model, path)
    found = evaluate(path, Data(str(folder)), batch_size=7, predictions=tmp_path / "rows.jsonl")
    assert found["skipped"] == [str(folder / BROKEN)] and found["examples"] == 40
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = ke.Predictor(path).predict_files([row["name"] for row in rows])
    for row, (_, outputs, _) in zip(rows, expected, strict=True):
        assert [one["class"] for one in row["predictions"]] == np.argsort(-outputs, kind="stable").tolist()
        assert [one["probability"] for one in row["predictions"]] == sorted(outputs.tolist(), reverse=True)
    monkeypatch.setattr(runtimes, "cores", lambda: 4)  # more than photos: each of these has all of them
    assert evaluate(path, Data(str(folder)), limit=3)["examples"] == 3
    records(tmp_path / "records", folder, first=1)
    with pytest.raises(ValueError, match=r"Expected labels from 0 to 3 \(see --first-label\). Received: 281 for .*:0"):
        evaluate(path, Data(str(tmp_path / "records")))


@pytest.mark.parametrize("suffix", [".keras", ".tflite"])
def test_a_photo_that_its_storage_loses_ends_the_evaluation(suffix, folder, tmp_path, monkeypatch):
    """It is not counted as damaged: the accuracy would be that of the others."""
    monkeypatch.setattr(runtimes, "cores", lambda: 2)  # with 40, the last photo would be read at once
    path = tmp_path / f"four{suffix}"
    (ke.save_model if suffix == ".keras" else ke.export)(tiny(classes=4), path)
    photos = shutil.copytree(folder, tmp_path / "photos")
    last = sorted(photos.glob("*/*.jpg"))[-1]
    with pytest.raises(ValueError, match=rf"Could not read {re.escape(str(last))}: .*No such file"):
        evaluate(path, Data(str(photos)), batch_size=4, on_progress=lambda done, _: last.unlink(missing_ok=True))


def test_what_is_told_beside_the_accuracy(folder, result):
    assert result["examples"] == 40 and result["skipped"] == [str(folder / BROKEN)]
    record = registry.find("efficientnet-lite0", "imagenet")
    assert result["published"]["top1"] == record.top1 == 75.1
    assert result["difference"] == pytest.approx(100 * result["top1"] - 75.1, abs=1e-3)
    assert result["preprocessing"] == {"size": [224, 224], "crop": 0.875, "interpolation": "bicubic"}
    assert [row["class"] for row in result["classes"]] == sorted(CLASSES.values())
    assert [row["examples"] for row in result["classes"]] == [10] * 4
    assert np.mean([row["top1"] for row in result["classes"]]) == pytest.approx(result["top1"])
    # Precision, recall and F1 are scikit-learn's.
    true, said = ([[row["label"], row["predictions"][0]["class"]][n] for row in result["rows"]] for n in (0, 1))
    expected = precision_recall_fscore_support(true, said, labels=sorted(CLASSES.values()), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "examples"), expected, strict=True):
        assert [row[name] or 0 for row in result["classes"]] == pytest.approx(values.tolist()), name
    wrong = [row for row in result["rows"] if row["predictions"][0]["class"] != row["label"]]
    assert sum(row["count"] for row in result["confusions"]) <= len(wrong)
    first = result["confusions"][0]
    alike = [r for r in wrong if (r["label_name"], r["predictions"][0]["name"]) == (first["true"], first["predicted"])]
    assert first["count"] == len(alike) == max(row["count"] for row in result["confusions"])


@pytest.mark.usefixtures("shallow", "eager")
def test_a_set_without_a_published_accuracy(folder, tmp_path):
    model: Any = ke.EfficientNetV2B0(weights=None, input_shape=(32, 32, 3))
    model.weights_record = registry.find("efficientnetv2-b0", "21k-ft1k")
    path = ke.save_model(model, tmp_path / "x.keras")
    found = evaluate(str(path), Data(str(folder)), limit=4)
    assert found["published"]["top1"] is None and found["difference"] is None
    assert "published top-1" not in invoked("eval", str(path), "--data", str(folder), "--limit", "4").stdout


def records(root, folder, first: int):
    """Writes the same bytes as TFRecords: two validation files and no training files."""
    root.mkdir()
    files = sorted(folder.glob("*/*.jpg"))
    for part in range(2):
        with tf.io.TFRecordWriter(str(root / f"validation-0000{part}-of-00002")) as writer:
            for path in files[part::2]:
                value = {
                    "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[path.read_bytes()])),
                    "image/class/label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[CLASSES[path.parent.name] + first])
                    ),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=value)).SerializeToString())
    return files


def test_the_same_bytes_in_other_layouts_give_the_same(folder, result, lite0, tmp_path):
    files = records(tmp_path / "records", folder, first=1)
    path = tmp_path / "rows.jsonl"
    found = evaluate(lite0, Data(str(tmp_path / "records")), batch_size=7, predictions=path)
    kept = ("top1", "top5", "examples", "classes", "confusions", "preprocessing")
    assert {name: found[name] for name in kept} == {name: result[name] for name in kept}
    # The names of records give their file and number.
    by_file = {row["name"]: row["predictions"] for row in result["rows"]}
    for row in map(json.loads, path.read_text().splitlines()):
        shard, number = row["name"].rsplit(":", 1)
        best = by_file[str(files[int(number) * 2 + int(shard.rsplit("validation-", 1)[1][:5])])]
        assert [one["class"] for one in row["predictions"]] == [one["class"] for one in best]
    assert len(found["skipped"]) == 1 and ":" in found["skipped"][0]
    with pytest.raises(ValueError, match=r"Expected labels from 0 to 999 \(see --first-label\). Received: -7"):
        evaluate(lite0, Data(str(tmp_path / "records"), first_label=1000))


@pytest.mark.long
def test_a_validation_split_alone_of_a_tensorflow_dataset(folder, result, tmp_path):
    wnids = sorted(CLASSES)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=wnids),
        }
    )
    files = [path for path in sorted(folder.glob("*/*.jpg")) if not str(path).endswith(BROKEN)]
    split = tf.data.Dataset.from_generator(
        lambda: ({"image": np.asarray(Image.open(path)), "label": wnids.index(path.parent.name)} for path in files),
        output_signature={"image": tf.TensorSpec((None, None, 3), tf.uint8), "label": tf.TensorSpec((), tf.int64)},
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name="few_photographs",
        version="1.0.0",
        data_dir=tmp_path,
        split_datasets={"validation": split},
        features=features,
    )
    found = evaluate("efficientnet-lite0", Data("few_photographs", data_dir=str(tmp_path)))
    assert (found["top1"], found["classes"]) == (result["top1"], result["classes"])
    some = evaluate("efficientnet-lite0", Data("few_photographs", data_dir=str(tmp_path)), limit=5)
    assert some["examples"] == 5


def test_which_folder_is_evaluated(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b", "c")[: 3 if split == "train" else 2]:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / f"{split}.jpg").touch()
    found = open_evaluation(Data(str(tmp_path)))
    assert (found.count, found.classes, list(found.labels)) == (2, 3, ["a", "b", "c"])
    assert all("/val/" in name for name in found.examples.images)
    found = open_evaluation(Data(str(tmp_path), eval_split="train"))
    assert found.count == 3
    with pytest.raises(ValueError, match=r"Expected a split made of train, val\. Received: 'test'"):
        open_evaluation(Data(str(tmp_path), eval_split="test"))
    (tmp_path / "val" / "test").mkdir()  # a class named like a split
    (tmp_path / "val" / "test" / "1.jpg").touch()
    assert open_evaluation(Data(str(tmp_path / "val"))).labels == ["a", "b", "test"]
    shutil.rmtree(tmp_path / "val" / "test")
    shutil.rmtree(tmp_path / "train" / "b")
    with pytest.raises(ValueError, match=r"Received: '.*/val' with a, c to train on, and a, b"):
        open_evaluation(Data(str(tmp_path)))


@pytest.mark.usefixtures("shallow", "eager")
def test_a_head_of_ones_own_and_those_that_do_not_match(folder, tmp_path):
    body = ke.EfficientNetLite0(weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3))
    net = keras.Sequential([body, keras.layers.Dense(4)], name="four")  # logits
    net.save(tmp_path / "four.keras")
    path = tmp_path / "rows.jsonl"
    found = evaluate(tmp_path / "four.keras", Data(str(folder)), crop=1.0, interpolation="bilinear", predictions=path)
    assert found["preprocessing"] == {"size": [32, 32], "crop": 1.0, "interpolation": "bilinear"}
    assert found["published"] is None and [row["name"] for row in found["classes"]] == sorted(CLASSES)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    load = photo_loader.image_loader(net, crop=False)  # the largest window, bilinear
    logits = net.predict(np.stack([load(row["name"]) for row in rows]), verbose=0)
    assert [row["predictions"][0]["class"] for row in rows] == np.argmax(logits, 1).tolist()
    sums = [sum(one["probability"] for one in row["predictions"]) for row in rows]
    assert sums == pytest.approx([1.0] * 40, abs=1e-5) and found["top5"] == 1.0
    # The number of classes is read from the file of weights.
    small = ke.EfficientNetLite0(weights=None, classes=4)
    small.save_weights(tmp_path / "four.weights.h5")
    found = evaluate("efficientnet-lite0", Data(str(folder)), tmp_path / "four.weights.h5", limit=8)
    assert (found["examples"], found["top5"], found["published"]) == (8, 1.0, None)
    assert len(found["classes"]) == 4  # sampled across the folder
    with pytest.raises(ValueError, match=r"the model's 4 classes. Received: 10 classes in 'digits': 0, 1"):
        evaluate(net, Data("digits"))
    with pytest.raises(ValueError, match=r"Expected a classifier with .* with output shape \(None, 1, 1, 1280\)"):
        evaluate(ke.EfficientNetLite0(weights=None, include_top=False, input_shape=(32, 32, 3)), Data(str(folder)))
    with pytest.raises(ValueError, match="Nearest: 'efficientnet-lite0'"):
        evaluate("efficientnet-lit0", Data(str(folder)))
    with pytest.raises(
        FileNotFoundError, match=r"Expected a model file. Received: 'missing.keras', which does not exist"
    ):
        evaluate("missing.keras", Data(str(folder)))
    with pytest.raises(ValueError, match=r"Expected data: only the folder of a run has its own. Received: none"):
        evaluate(net)
    kernel = net.layers[-1].kernel
    kernel.assign(kernel.value.numpy() * np.inf)
    with pytest.raises(ValueError, match=rf"Expected finite weights. Received: -?inf in '{kernel.path}' of the model"):
        evaluate(net, Data(str(folder)))


def test_the_command(folder, tmp_path):
    path = ke.save_model(tiny(classes=4), tmp_path / "four.keras", labels=sorted(CLASSES))
    result = evaluate(str(path), Data(str(folder)))
    line = [sys.executable, "-m", "keras_effnet", "eval", str(path), "--data", str(folder)]
    done = subprocess.run(
        [*line, "--json", "--predictions", str(tmp_path / "rows.jsonl")],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    timed = ("seconds", "images_per_second")
    assert {n: v for n, v in found.items() if n not in timed} == {n: v for n, v in result.items() if n not in timed}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 40 and "41/41" in done.stderr

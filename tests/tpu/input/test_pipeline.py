"""Protects the input pipeline: sources, crops, the order of examples, resuming, unreadable examples."""

import hashlib
import importlib.resources
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers import BACKEND, golden

from keras_effnet.images.resizing import crop_and_resize
from keras_effnet.tpu.config import Augment, Data, Recipe, Run

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow reads", allow_module_level=True)

import tensorflow as tf

from keras_effnet.tpu.input import crops, pipeline
from keras_effnet.tpu.input.skipped_examples import Skipped
from keras_effnet.tpu.input.sources import open_evaluation, open_source
from keras_effnet.tpu.resume import checkpoints

PHOTOGRAPHS = {
    name: (importlib.resources.files("sklearn.datasets.images") / f"{name}.jpg").read_bytes()
    for name in ("china", "flower")
}
PREPROCESSING = golden("tpu/preprocessing.json")


def picture(number: int, side: int = 40) -> np.ndarray:
    """Returns pixels whose mean encodes the number."""
    return np.clip(np.random.default_rng(number).normal(20 + 4 * number, 3, (side, side + 8, 3)), 0, 255).astype(
        "uint8"
    )


def told(image) -> int:
    """Returns the number of a picture."""
    return round((float(np.mean(image)) - 19.5) / 4)


def jpeg(number: int) -> bytes:
    return tf.io.encode_jpeg(picture(number), quality=95).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images to train on and 11 to evaluate on, in two classes, as JPEG and PNG."""
    root = tmp_path_factory.mktemp("photographs")
    for split, numbers in (("train", range(40)), ("val", range(40, 51))):
        for number in numbers:
            place = root / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            encode = {3: tf.io.encode_png}.get(number % 4)
            content = encode(picture(number)).numpy() if encode else jpeg(number)
            (place / f"{number:02}.{'png' if encode else 'jpg'}").write_bytes(content)
    return root


def record(number: int, label: int) -> bytes:
    features = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg(number)])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The original's layout: 4 files of 7, 8, 9 and 10 records to train on, one of 6 to evaluate on."""
    root, number = tmp_path_factory.mktemp("records"), 0
    for name, count in [(f"train-{n:05}-of-00004", 7 + n) for n in range(4)] + [("validation-00000-of-00001", 6)]:
        with tf.io.TFRecordWriter(str(root / name)) as writer:
            for _ in range(count):
                writer.write(record(number, number + 1))
                number += 1
    return root


def recipe(source, **augment) -> Recipe:
    return Recipe(
        data=Data(str(source), eval_crop=1.0, shuffle_buffer=8),
        augment=Augment(**{"crop": "none", "flip": False, **augment}),
        run=Run(seed=5),
    )


def train(how: Recipe, batches: int, batch: int = 6, **kwargs):
    source = open_source(how.data)
    host = kwargs.get("host") or pipeline.Host()
    skipped = kwargs.pop("skipped", Skipped(None, source.train.count(host.index, host.count)))
    dataset = pipeline.training(source, how, 32, batch, skipped, **kwargs)
    return [tuple(part.numpy() for part in row) for row in dataset.take(batches)]


def numbers(batches) -> list[int]:
    return [told(image) for images, *_ in batches for image in images]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("size", ["224", "240", "300"])
def test_evaluation_sees_the_originals_pixels_bit_by_bit(name, size):
    row = PREPROCESSING["eval"][name]["sizes"][size]
    for key, interpolation in (("default_bicubic", "bicubic"), ("resize_bilinear", "bilinear")):
        how = Data(eval_crop=0.875, interpolation=interpolation)
        image = tf.function(lambda encoded, how=how: crops.eval_image(encoded, int(size), how))(PHOTOGRAPHS[name])
        assert hashlib.sha256(image.numpy().tobytes()).hexdigest() == row[key]["sha256"]
    # The original's first rule, 32 pixels of padding, gives the same at 224.
    if size == "224":
        image = crops.eval_image(tf.constant(PHOTOGRAPHS[name]), 224, Data())
        assert hashlib.sha256(image.numpy().tobytes()).hexdigest() == row["default_bicubic"]["sha256"]


def drawn_windows(shape, how: Augment) -> np.ndarray:
    """Returns the crops of 400 seeds."""

    def window(number):
        return crops._random_window(shape, tf.zeros(4, tf.int32), how, tf.stack([0, number]))

    seeds = tf.data.Dataset.from_tensor_slices(tf.range(400))
    return np.array(list(seeds.map(window).as_numpy_iterator()))


def test_random_crops_are_those_of_the_original():
    """Areas and aspect ratios are those of TensorFlow's op with the original's arguments, from the same seeds."""
    shape = tf.constant([300, 400, 3])
    windows = drawn_windows(shape, Augment())
    area, ratio = windows[:, 2] * windows[:, 3] / 120000, windows[:, 3] / windows[:, 2]
    assert area.min() > 0.075 and 0.3 < area.mean() < 0.5 and area.max() > 0.85
    assert ratio.min() > 0.73 and ratio.max() < 1.36
    # An image too long for any crop is cropped in the center.
    middle = tf.constant([1, 2, 3, 4])
    whole = Augment(min_area=0.99)
    assert crops._random_window(tf.constant([4, 400, 3]), middle, whole, [0, 1]).numpy().tolist() == [1, 2, 3, 4]
    # V2's are smaller: google/automl efficientnetv2/preprocessing.py.
    small = Augment(min_area=0.05, min_covered=0.0)
    windows = drawn_windows(shape, small)
    assert 0.045 < (windows[:, 2] * windows[:, 3] / 120000).min() < 0.07


def test_v2_evaluates_the_whole_image():
    """google/automl efficientnetv2/preprocessing.py `preprocess_for_eval`, from 320 pixels on: tf.image.resize()."""
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), "uint8")
    expected = tf.image.resize(tf.cast(pixels, tf.float32), [32, 32])
    data = Data(interpolation="half-pixel-bilinear", eval_crop=1.0, crop_mode="squash")
    np.testing.assert_allclose(crops.eval_image(tf.constant(pixels), 32, data), expected, atol=1e-3)
    np.testing.assert_allclose(
        crop_and_resize(pixels, (32, 32), 0, "half-pixel-bilinear", "squash"), expected, atol=1e-3
    )
    center = crop_and_resize(pixels, (32, 32), 0, "half-pixel-bilinear")
    assert np.abs(center - expected).mean() > 10


def test_an_epoch_holds_each_example_once_in_an_order_of_its_own(folder, records):
    for source, count in ((folder, 40), (records, 34)):
        how = recipe(source)
        batches = train(how, 3 * count // 2, batch=2)
        drawn = numbers(batches)
        epochs = [drawn[start : start + count] for start in range(0, 3 * count, count)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
        assert epochs[0] != epochs[1] != epochs[2]
        assert numbers(train(how, 3 * count // 2, batch=2)) == drawn
        other = Recipe(how.model, how.data, how.augment, run=Run(seed=6))
        assert numbers(train(other, count // 2, batch=2)) != epochs[0]
        labels = [int(label) for _, labels in batches[: count // 2] for label in labels]
        assert labels == ([n % 2 for n in epochs[0]] if source == folder else epochs[0])


@pytest.mark.parametrize(
    "augment",
    [pytest.param({}, marks=pytest.mark.long), {"policy": "autoaugment", "mixup": 0.2, "cutmix": 1.0, "erase": 0.5}],
)
def test_a_run_goes_on_with_the_very_same_batches(folder, records, augment):
    for source, step in ((folder, 13), (records, 6)):
        # An example's changes depend on its number and epoch alone, from whatever source: a policy is traced once.
        changes = augment if source == folder else {name: how for name, how in augment.items() if name != "policy"}
        how = recipe(source, crop="inception", flip=True, **changes)
        whole, again = train(how, step + 2), train(how, 2, start=6 * step)
        for batch, other in zip(again, whole[step:], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(batch, other, strict=True)), (source, step)


def test_hosts_share_the_examples_and_replicas_the_batch(folder, records):
    for source, counts in ((folder, (20, 20)), (records, (16, 18))):
        parts = [
            numbers(train(recipe(source), counts[index] // 2, batch=2, host=pipeline.Host(index, 2)))
            for index in (0, 1)
        ]
        assert sorted(parts[0] + parts[1]) == list(range(sum(counts)))
    how = recipe(folder, crop="inception", flip=True, mixup=0.5)
    whole, parts = train(how, 2, batch=8), train(how, 8, batch=8, parts=4)
    for place, (images, labels) in enumerate(whole):
        assert np.array_equal(images, np.concatenate([part[0] for part in parts[4 * place : 4 * place + 4]]))
        assert np.array_equal(labels, np.concatenate([part[1] for part in parts[4 * place : 4 * place + 4]]))


@pytest.mark.parametrize("hosts", [1, 2])
def test_an_evaluation_counts_each_example_once(folder, hosts):
    source, seen = open_source(recipe(folder).data), []
    for index in range(hosts):
        skipped = Skipped(None, 11)
        rows = list(
            pipeline.evaluation(
                source, recipe(folder), 32, 4, skipped, parts=2, host=pipeline.Host(index, hosts)
            ).unbatch()
        )
        assert len(rows) == {1: 12, 2: 8}[hosts]  # as many batches on each host
        seen += [(told(image), int(label)) for image, label, weight in rows if weight]
        assert rows[0][0].dtype == tf.float32
    assert sorted(seen) == [(number, number % 2) for number in range(40, 51)]


def test_labels_are_those_of_the_model(folder, records):
    how = recipe(folder, mixup=0.2)
    how = Recipe(how.model, Data(**{**vars(how.data), "classes": 5}), how.augment, run=how.run)
    ((_, labels),) = train(how, 1)
    assert labels.shape == (6, 5) and np.allclose(labels.sum(1), 1)
    # Labels below first_label are refused.
    how = recipe(records)
    how = Recipe(how.model, Data(**{**vars(how.data), "first_label": 5}), how.augment, run=how.run)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Expected labels from 0 to classes - 1 .data.classes"):
        train(how, 5)
    with pytest.raises(ValueError, match=r"Expected no data.holdout_shards for a folder of photos"):
        open_source(Data(str(folder), holdout_shards=20))


def test_what_leaves_the_host(folder):
    ((images, labels),) = train(recipe(folder), 1)
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    how = recipe(folder)
    how = Recipe(how.model, Data(**{**vars(how.data), "transfer": "float32"}), how.augment, run=how.run)
    ((floats, _),) = train(how, 1)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(images, np.floor(np.clip(floats, 0, 255) + np.float32(0.5)))


def test_shards_are_held_out(records):
    source = open_source(Data(str(records), holdout_shards=1))
    assert (source.train_count, source.eval_count, source.classes) == (27, 7, 1000)
    rows = list(pipeline.evaluation(source, recipe(records), 32, 7, Skipped(None, 7)).unbatch())
    assert sorted(int(label) for _, label, _ in rows) == list(range(7))
    cache = records / "records.json"
    open_source(Data(str(records)), str(cache))
    assert sorted(json.loads(cache.read_text()).values()) == [6, 7, 8, 9, 10]
    with pytest.raises(ValueError, match=r"fewer data.holdout_shards than files. Received: 0 files to train"):
        open_source(Data(str(records), holdout_shards=4))
    with pytest.raises(ValueError, match="at least one file of records for each of 5 hosts"):
        open_source(Data(str(records))).train.count(0, 5)


def test_a_tensorflow_dataset_by_name(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
    )
    split = tf.data.Dataset.from_generator(
        lambda: ({"image": picture(n), "label": n % 2} for n in range(20)),
        output_signature={"image": tf.TensorSpec((None, None, 3), tf.uint8), "label": tf.TensorSpec((), tf.int64)},
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name="little_ones", version="1.0.0", data_dir=tmp_path, split_datasets={"train": split}, features=features
    )
    data_of = {"source": "little_ones", "data_dir": str(tmp_path), "eval_crop": 1.0, "shuffle_buffer": 8}
    how = Recipe(
        data=Data(**data_of, train_split="train[:75%]", eval_split="train[75%:]"),
        augment=Augment(crop="none", flip=False),
    )
    source = open_source(how.data)
    assert (source.train_count, source.eval_count, source.labels) == (15, 5, ["a", "b"])
    drawn = train(how, 15, batch=1)
    rows = list(pipeline.evaluation(source, how, 32, 5, Skipped(None, 5)).unbatch())
    found = numbers(drawn) + [told(image) for image, *_ in rows]
    assert sorted(found) == list(range(20))
    assert [int(labels[0]) for _, labels in drawn] == [number % 2 for number in numbers(drawn)]
    with pytest.raises(ValueError, match=r"Expected data.eval_split, such as train\[90%:\]"):
        open_source(Data(**data_of))
    with pytest.raises(ValueError, match="Expected a split made of"):
        open_source(Data(**data_of, eval_split="test"))
    with pytest.raises(ValueError, match=r"name of a TensorFlow dataset.*imagenette"):
        open_source(Data("imagenete"))


def test_other_places_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected a folder, a CSV file, digits, or the name"):
        open_source(Data("/nowhere/at/all"))
    for opened in (open_source, open_evaluation):
        with pytest.raises(ValueError, match=r"Expected a CSV file in UTF-8\. Received: 'missing\.csv'"):
            opened(Data("missing.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="with no photos"):
        open_source(Data(str(tmp_path)))


def spoil(folder, tmp_path, share_of):
    """Returns a copy in which some files are truncated, empty or text, and the paths of these files."""
    root = tmp_path / "spoilt"
    shutil.copytree(folder, root)
    files = sorted(root.glob("train/*/*.jpg"))
    bad = files[:: round(1 / share_of)]
    for place, path in enumerate(bad):
        content = path.read_bytes()
        path.write_bytes((content[: len(content) // 2], b"", b"no photograph")[place % 3])
    (root / "val" / "b" / "50.jpg").write_text("at the very end")
    (root / "val" / "b" / "notes.txt").write_text("not a photo by its name")
    return root, {str(path) for path in bad}


def test_what_cannot_be_read_is_skipped_counted_and_named(folder, tmp_path):
    root, bad = spoil(folder, tmp_path, 0.1)
    source, how = open_source(recipe(root).data), recipe(root, crop="inception", flip=True)
    account = str(tmp_path / "skipped.jsonl")
    batches = train(how, 18, skipped=Skipped(account, 40))
    found = Skipped(account, 40)
    assert set(found.names) == bad and len(found) >= 2 * len(bad)  # in each of the epochs
    # It resumes exactly where it stopped, past the unreadable examples.
    for step in (2, 7, 12):
        (batch,) = train(how, 1, start=6 * step, skipped=Skipped(account, 40))
        assert all(np.array_equal(a, b) for a, b in zip(batch, batches[step], strict=True))
    skipped = Skipped(None, 12)
    weights = [weight for *_, weights in pipeline.evaluation(source, how, 32, 4, skipped) for weight in weights.numpy()]
    assert sum(weights) == 11 and skipped.names == [f"{root}/val/b/50.jpg"]


def test_too_much_that_cannot_be_read_stops_the_run(folder, tmp_path):
    root, bad = spoil(folder, tmp_path, 0.3)
    skipped = Skipped(None, 40, 0.1)
    with pytest.raises(tf.errors.InvalidArgumentError):
        train(recipe(root), 7, skipped=skipped)
    assert skipped.problem and "at most 10.0% of the images to be unreadable (data.max_corrupt)" in skipped.problem
    assert set(skipped.names) <= bad and len(skipped) == 5


@pytest.mark.parametrize("most", [0.1, 1.0])
def test_a_run_of_which_nothing_can_be_read_stops(most, folder, records, tmp_path):
    """In place of looking for the next photo without end."""
    root = tmp_path / "spoilt"
    shutil.copytree(folder, root)
    for path in root.glob("train/*/*.*"):
        path.write_bytes(b"no photograph")
    skipped = Skipped(None, 40, most)
    with pytest.raises(tf.errors.InvalidArgumentError):
        train(recipe(root), 1, skipped=skipped)
    told = r"Expected at least one image that can be read. Received: 40 of 40 unreadable, such as "
    assert skipped.problem and re.match(told, skipped.problem)
    if most < 1:
        return  # what follows is the same for any share
    # Files of records that have become empty.
    copied = tmp_path / "records"
    shutil.copytree(records, copied)
    how = recipe(copied)
    source = open_source(how.data)
    for path in copied.glob("train-*"):
        path.write_bytes(b"")
    with pytest.raises(tf.errors.InvalidArgumentError, match="fewer: a file was not read to its end"):
        list(pipeline.training(source, how, 32, 6, Skipped(None, source.train_count, most)).take(1))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_on_a_full_disk_no_photo_that_can_be_read_is_skipped(folder, tmp_path, caplog):
    root, bad = spoil(folder, tmp_path, 0.1)
    account = tmp_path / "skipped.jsonl"
    skipped = Skipped(str(account), 40)
    account.symlink_to("/dev/full")
    batches = iter(pipeline.training(open_source(recipe(root).data), recipe(root), 32, 6, skipped))
    for _ in range(2):  # what was read ahead follows the error
        with pytest.raises(tf.errors.InvalidArgumentError):
            list(itertools.islice(batches, 20))
    assert skipped.problem and f"Expected to write {account}" in skipped.problem and "No space left" in skipped.problem
    assert not len(skipped) and set(re.findall(r"Skipped unreadable image: (.*)", caplog.text)) <= bad
    assert checkpoints.full(ValueError(skipped.problem), "runs/x")


def test_a_storage_that_does_not_answer_is_no_photographs_fault(folder, tmp_path):
    root = tmp_path / "moved"
    shutil.copytree(folder, root)
    source, how = open_source(recipe(root).data), recipe(root)
    for part in ("train", "val"):
        for path in sorted((root / part).rglob("*.*"))[::3]:
            path.unlink()
    for skipped, batches in (
        (Skipped(None, 40), lambda skipped: pipeline.training(source, how, 32, 6, skipped)),
        (Skipped(None, 11), lambda skipped: pipeline.evaluation(source, how, 32, 4, skipped)),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            list(batches(skipped).take(8))
        assert skipped.problem and skipped.problem.startswith(f"Expected to read {root}") and not len(skipped)


def test_a_file_of_records_that_rots_is_no_photograph(records, tmp_path):
    """Unreadable records are not skipped: all that follow would shift and carry wrong names."""
    root = tmp_path / "records"
    shutil.copytree(records, root)
    how, counts = recipe(root), str(tmp_path / "counts.json")
    source = open_source(how.data, cache=counts)
    for name in ("train-00001-of-00004", "validation-00000-of-00001"):
        content = bytearray((root / name).read_bytes())
        content[len(content) // 2] ^= 4
        (root / name).write_bytes(content)
    account = Skipped(str(tmp_path / "skipped.jsonl"), 34)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a file was not read to its end"):
        list(pipeline.training(source, how, 32, 6, account).take(12))
    assert not len(account)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a file was not read to its end"):
        list(pipeline.evaluation(source, how, 32, 4, Skipped(None, 6)))
    # Counting names the files.
    with pytest.raises(ValueError, match=rf"Received: {root}/train-00001-of-00004, {root}/validation-00000-of-00001\."):
        open_source(how.data)


def test_an_error_of_ours_is_not_taken_for_a_photographs(folder, monkeypatch):
    monkeypatch.setattr(pipeline.augment, "auto_augment", lambda image, key: tf.ensure_shape(image, [1, 1, 3]))
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        train(recipe(folder, policy="autoaugment"), 1)

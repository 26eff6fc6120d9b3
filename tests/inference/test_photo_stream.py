"""Folders of photos: every row is that of a call of its own. A file of predictions continues where it ended."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import BACKEND, command, leading, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import keras_effnet as ke
from keras_effnet.inference import photo_stream, runtimes
from keras_effnet.inference.classifier import Classifier
from keras_effnet.inference.prediction_files import PredictionFile

BROKEN = 5  # of the photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder of photos of several sizes. The one in place `BROKEN` cannot be read."""
    made = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(19):
        size = random.integers(20, 90, 2)
        Image.fromarray(random.integers(0, 256, (*size, 3), "uint8")).save(made / f"{number:02}.png")
    (made / f"{BROKEN:02}.png").write_text("no photo")
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ke.save_model(tiny(classes=5), tmp_path_factory.mktemp("model") / "five.keras", labels=list("abcde"))


@pytest.mark.parametrize("runtime", [*leading(runtimes.FAST, 1), "keras"])
def test_the_rows_of_a_folder_are_those_of_one_call_per_photo(runtime, folder, model):
    if runtime not in ("keras", *runtimes.choose("auto")):
        pytest.skip(f"{runtime} is not installed")
    alone = ke.Predictor(model, runtime, threads=1)
    expected = {}
    for path in sorted(folder.iterdir()):
        if path.stem != f"{BROKEN:02}":
            expected[str(path)] = alone(ke.load_image(path, model))[0]
    for threads in (1, 2, 5):
        found = list(ke.Predictor(model, runtime, threads=threads).predict_files(folder))
        assert [row.path for row in found] == sorted(map(str, folder.iterdir()))
        for place, (path, outputs, error) in enumerate(found):
            if place == BROKEN:
                assert outputs is None and "is not an image" in str(error)
            elif runtime == "keras":  # in batches of 16, which round differently
                assert np.abs(outputs - expected[path]).max() < 1e-6
            else:
                assert np.array_equal(outputs, expected[path])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 5), st.sets(st.integers(0, 60)), st.integers(0, 2**32 - 1))
def test_any_threads_batches_and_delays_give_the_same_rows(count, threads, batch, broken, seed):
    waits = np.random.default_rng(seed).choice([0, 0, 0, 0.002], count + 1)

    def load(number):
        time.sleep(waits[number])
        if number in broken:
            raise ValueError(f"number {number}")
        return np.full((2, 2, 3), number, "float32")

    def run(images):
        return [images.sum((1, 2, 3)), images[:, 0, 0]]

    found = list(photo_stream.stream(range(count), load, run, threads, batch))
    assert [row.path for row in found] == list(range(count))
    for number, outputs, error in found:
        if number in broken:
            assert outputs is None and str(error) == f"number {number}"
        else:
            assert outputs[0] == 12 * number and (outputs[1] == number).all() and error is None


def test_photos_are_taken_as_results_are_and_threads_end_with_the_stream():
    taken = itertools.count()
    before = threading.active_count()
    paths = (next(taken) for _ in iter(int, 1))  # without end
    rows = photo_stream.stream(paths, lambda path: np.zeros((1, 1, 3), "float32"), lambda images: [images], 2)
    for _ in range(50):
        next(rows)
    assert next(taken) <= 50 + 2 * photo_stream.AHEAD + 1
    rows.close()
    assert threading.active_count() == before


def test_a_result_does_not_wait_for_paths_that_come_later():
    given = []

    def paths():
        for number in range(5):
            given.append(number)
            yield number
            # The caller has the result of a photo, at the latest, two photos later.
            time.sleep(0.2)

    rows = photo_stream.stream(paths(), lambda path: np.zeros((1, 1, 3), "float32"), lambda images: [images], 2)
    assert [(row.path, len(given) <= row.path + 2) for row in rows] == [(number, True) for number in range(5)]


def test_warnings_of_the_caller_are_heard_while_photos_are_decoded(folder):
    load = ke.Predictor(tiny(), "keras").image_loader()
    rows = photo_stream.stream(sorted(folder.iterdir()) * 20, load, lambda images: [images], 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in rows:
            warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["mine"] * 380


def test_an_error_of_the_model_ends_the_stream():
    def run(images):
        raise RuntimeError("the model failed")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the model failed"):
        list(photo_stream.stream(range(100), lambda path: np.zeros((1, 1, 3), "float32"), run, 3))
    assert threading.active_count() == before


def test_logits_of_two_classes_are_told_from_probabilities_for_every_photo(tmp_path):
    # Between 0 and 1 for gray photos, above 1 for light ones.
    import keras

    photos = []
    for level in (100, 120, 250):
        photos.append(tmp_path / f"{level}.png")
        Image.new("RGB", (8, 8), (level,) * 3).save(photos[-1])
    pixels = keras.Input((8, 8, 3))
    mean = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 128)(pixels))
    net = keras.Model(pixels, keras.layers.Dense(2)(mean))
    net.layers[-1].set_weights([np.full((3, 2), [1 / 3, 0.3]), np.array([0, 0.05])])
    net.save(tmp_path / "net.keras")
    rows = Classifier(tmp_path / "net.keras", runtime="keras")(photos)
    assert [sum(best["probability"] for best in row["predictions"]) for row in rows] == pytest.approx([1, 1, 1])


def rows_of(path: Path) -> dict[str, str]:
    """Returns the classes, or the error, by the name of the photo. No photo has two rows."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        told = [
            (
                row["path"],
                row.get("error") or " ".join(f"{one['name']}{one['probability']}" for one in row["predictions"]),
            )
            for row in rows
        ]
    else:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        told = [
            (row["path"], row["error"] or " ".join(f"{row[f'name_{n}']}{row[f'probability_{n}']}" for n in (1, 2)))
            for row in rows
        ]
    found = {os.path.basename(name): value for name, value in told}
    assert len(found) == len(told)
    return found


def test_files_of_predictions_have_a_row_per_photo_and_a_second_call_adds_the_rest(folder, model, tmp_path):
    first, *_, last = sorted(folder.iterdir())
    arguments = ["--model", model, "--top", 2, "--runtime", "keras" if BACKEND != "tensorflow" else "litert"]
    files = [tmp_path / "rows.jsonl", tmp_path / "rows.csv"]
    ends = ["--jsonl", files[0], "--csv", files[1]]
    begun = command("predict", first, last, *arguments, "--csv", files[1])
    assert begun.returncode == 0 and begun.stdout == "" and "2 photos, 2 of them new" in begun.stderr, begun.stderr
    result = command("predict", folder, *arguments, *ends)
    assert result.returncode == 2 and "is not an image" in result.stderr  # one photo is broken
    printed = json.loads(command("predict", folder, *arguments, "--json").stdout)["photographs"]
    assert [row["path"] for row in printed] == sorted(map(str, folder.iterdir()))
    assert rows_of(files[0]) == rows_of(files[1]) and len(rows_of(files[0])) == 19
    expected = {Path(row["path"]).name: row for row in printed}
    for name, told in rows_of(files[0]).items():
        row = expected[name]
        best = row.get("predictions", ())
        assert told == (row.get("error") or " ".join(f"{one['name']}{one['probability']}" for one in best))
    before = [path.read_bytes() for path in files]
    again = command("predict", folder, *arguments, *ends)
    assert again.returncode == 2 and "19 photos, 0 of them new" in again.stderr
    assert before == [path.read_bytes() for path in files]


RESULTS = [
    {"path": "a.png", "predictions": [{"class_id": 1, "name": "b", "probability": 0.5}]},
    {"path": 'x "1",\n2.png', "predictions": [{"class_id": 0, "name": 'an "a", they say', "probability": 1e-7}]},
    {"path": "broken\udcff.png", "error": 'Expected "an image"\nReceived: none'},
    {"path": "a\rb.png", "predictions": [{"class_id": 3, "name": "c", "probability": 0.25}]},
    {"path": "é.png", "predictions": [{"class_id": 7, "name": "ü\nö", "probability": 1.0}]},
]


@pytest.mark.parametrize("top", [1, 3])  # of one class: a model may have fewer than are asked for
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_cut_off_at_any_byte_continues_without_a_double_or_missing_row(kind, top, tmp_path):
    path = tmp_path / f"rows.{kind}"
    with PredictionFile(path, kind, "m", top) as file:
        for result in RESULTS:
            file.write(result)
            file.write(result)  # once is enough
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with PredictionFile(path, kind, "m", top) as file:
            kept = len(file.done)
            assert file.done == {os.path.abspath(result["path"]) for result in RESULTS[:kept]}
            assert file.failed == {os.path.abspath(RESULTS[2]["path"])} & file.done and not file.new
            for result in RESULTS:
                file.write(result)
        assert path.read_bytes() == whole, length


def test_a_row_whose_line_break_an_editor_has_removed_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    with PredictionFile(path, "jsonl", "m", 1) as file:
        file.write(RESULTS[0])
    content = path.read_bytes()
    path.write_bytes(content.removesuffix(b"\n"))
    with PredictionFile(path, "jsonl", "m", 1) as file:
        assert file.done == {os.path.abspath("a.png")}
    assert path.read_bytes() == content


def test_a_file_of_predictions_belongs_to_the_content_of_its_model(model, tmp_path):
    import shutil

    first = Classifier(model, runtime="keras").name
    assert Classifier(shutil.copy(model, tmp_path), runtime="keras").name == first
    other = ke.load_model(model)
    other.get_layer("predictions").bias.assign([0, 1, 2, 3, 4])
    again = ke.save_model(other, tmp_path / model.name, labels=list("abcde"))
    names = {Classifier(again, runtime="keras", decode=decode).name for decode in ("exact", "fast")}
    assert len({first, *names}) == 3


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_with_other_rows_is_refused_and_left_as_it_is(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    with PredictionFile(path, kind, "m", 1) as file:
        file.write(RESULTS[0])
        with pytest.raises(BlockingIOError, match="in use"):
            PredictionFile(path, kind, "m", 1)
    two = {"path": "c.png", "predictions": [{"class_id": n, "name": "b", "probability": 0.5} for n in (1, 2)]}
    for content, model, top, expected in [
        (path.read_bytes(), "other", 1, "rows of 'm'"),
        (b"my notes\n", "m", 1, "my notes"),
        (b"[1]\n", "m", 1, r"\[?1\]?"),
        (b'{"a": 1}', "m", 1, "at its beginning"),  # without a line break: not a row that was cut off
        (b'{"path": "data", "files": []}', "m", 1, "the line|at its beginning"),
        (path.read_bytes() + b'"a\n' + b"b\n" * 9, "m", 1, "the line|a quote that does not end"),
        (b'nails of 5" and', "m", 1, "at its beginning"),
        (b'nails of 5"\n and', "m", 1, "at its beginning|nails"),
        (path.read_bytes(), "m", 2, "1 classes per photo, not 2|the columns path, model, error, class_id_1"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=expected), PredictionFile(path, kind, model, top) as file:
            file.write(two)
        assert path.read_bytes() == content


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.parametrize(
    "kind", [pytest.param("jsonl", marks=pytest.mark.slow), pytest.param("csv", marks=pytest.mark.long)]
)
def test_a_killed_command_continues_without_a_double_or_missing_row(kind, model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(4000):
        if number < 40:
            Image.fromarray(random.integers(0, 256, (300, 400, 3), "uint8")).save(photos / f"{number:04}.png")
        else:
            (photos / f"{number:04}.png").symlink_to(photos / f"{number % 40:04}.png")
    path = tmp_path / f"rows.{kind}"
    line = [sys.executable, "-m", "keras_effnet", "predict", photos, "--model", model, "--top", "2"]
    line += ["--runtime", "litert", f"--{kind}", path]
    line = list(map(str, line))
    kills = 0
    while kills < 10:
        had = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (path.exists() and path.stat().st_size > had):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        assert process.poll() is None, "the command ended before it was killed: use more photos"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert len(path.read_bytes().splitlines()) > 50
    subprocess.run(line, check=True, capture_output=True)
    found = rows_of(path)
    assert sorted(found) == [f"{number:04}.png" for number in range(4000)]
    whole = tmp_path / f"whole.{kind}"
    subprocess.run([*line[:-1], str(whole)], check=True, capture_output=True)
    assert rows_of(whole) == found

"""The commands work as a user types them, in real processes on real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import BACKEND, ROOT, command, invoked, lite0_package, same_weights, tiny
from PIL import Image

import keras_effnet as ke
from keras_effnet.commands import main

CAT, COFFEE = (str(ROOT / "docs" / name) for name in ("cat.png", "coffee.png"))


def test_predict_names_a_cat_and_a_coffee_cup(tmp_path):
    odd = tmp_path / "x[bold]y.png"
    odd.write_bytes(Path(CAT).read_bytes())
    result = command("predict", CAT, COFFEE, odd)
    assert odd.name in result.stdout.replace("\n", "")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.split(COFFEE)
    assert CAT in first and "tiger cat" in first and "espresso" in second
    assert first.count("%") == 5 and second.count("%") == 10


def test_predict_as_json_is_one_object_and_equals_the_library():
    # The folded net on Keras: an export of Lite1 would take 20 seconds.
    result = invoked("predict", CAT, "--model", "efficientnet-lite1", "--runtime", "keras", "--top", 3, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    model = ke.EfficientNetLite1()
    expected = ke.decode_predictions(model.predict_on_batch(ke.load_image(CAT, model)[None]), top=3)[0]
    assert found["model"] == "efficientnet-lite1"
    rows = found["photographs"][0]["predictions"]
    assert [row["wnid"] for row in rows] == [wnid for wnid, _, _ in expected]
    assert [row["probability"] for row in rows] == pytest.approx([score for *_, score in expected], abs=1e-4)
    assert rows[0]["class_id"] in (281, 282, 285)


def test_predict_goes_on_behind_bad_photographs_and_exits_2(tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    jpeg = tmp_path / "cut.jpg"
    Image.open(CAT).convert("RGB").save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-3000])
    (tmp_path / "empty").mkdir()
    bad = ["text.jpg", "cut.jpg", "empty", "missing.jpg", "[/b].png", "a" * 300 + ".png"]
    result = command("predict", *bad, COFFEE, "--json", cwd=tmp_path)
    assert result.returncode == 2
    *failed, good = json.loads(result.stdout)["photographs"]
    assert [row["path"] for row in failed] == bad and all("Expected" in row["error"] for row in failed)
    assert good["predictions"][0]["name"] == "espresso"
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 6 and "espresso" not in result.stderr


def test_predict_takes_folders_and_shows_progress_from_8_photographs_on(tmp_path):
    for number in range(17):  # more than a batch
        Image.open(COFFEE if number else CAT).save(tmp_path / f"{number:02}.png")
    for name in ("notes.txt", "notes.pdf", "._00.png"):
        (tmp_path / name).write_text("not an image")
    result = command("predict", tmp_path, "--json", "--top", 1)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["photographs"]
    names = [row["predictions"][0]["name"] for row in rows]
    assert len(rows) == 17 and names[1:] == ["espresso"] * 16 and names[0] != "espresso"
    assert "17/17" in result.stderr
    assert "Photos" in result.stderr and "Photos" not in command("predict", CAT, "--json").stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_predict_starts_without_tensorflow(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Of the exports that `predict` has compared above.
    first = ke.Predictor("efficientnet-lite0", "onnxruntime")
    assert first.labels[282] == "tiger cat"
    code = (
        "import sys; from keras_effnet.commands import main\n"
        "try: main(['predict', 'docs/coffee.png', '--top', '1', '--runtime', 'onnxruntime'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "espresso" in result.stdout and result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_export_and_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny((48, 48, 3), 2).save(tmp_path / "mine.keras")
    (tmp_path / "labels.txt").write_text("cat\ncoffee\n")
    result = invoked("export", "mine.keras", "mine.onnx", "--labels", "labels.txt")
    assert result.returncode == 0 and "largest difference from Keras, photos" in result.stdout, result.stderr
    assert ke.metadata(tmp_path / "mine.onnx")["labels"] == ["cat", "coffee"]
    line = [
        "benchmark",
        "mine.onnx",
        "mine.keras",
        "--batch-sizes",
        "2",
        "--rounds",
        "1",
        "--runtimes",
        "onnxruntime",
    ]
    result = invoked(*line, "--plot", "speed.png", "--json")  # it measures in processes of its own
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["model"], row["batch_size"]) for row in rows] == [(name, 2) for name in ("mine.onnx", "mine.keras")]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds"]["median"])
        assert 20e6 < row["memory"] < 1e9
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.size > (600, 200)
    told = invoked("benchmark", "mine.onnx", "--batch-sizes", "0")
    assert told.returncode == 2 and "Expected batch sizes of at least 1" in told.stderr


def test_list_describe_and_plot(tmp_path):
    listed = command("list")
    assert all(name in listed.stdout for name in ke.list_models()) and "noisy-student-475 88.2" in listed.stdout
    assert [row["name"] for row in json.loads(invoked("list", "*lite*", "--json").stdout)["models"]] == ke.list_models(
        "*lite*"
    )
    assert "CondMBConv6, 8 experts" in invoked("describe", "efficientnet-condconv-b0-8e").stdout
    described = invoked("describe", "efficientnet-b7")
    assert "813" in described.stdout and "66,347,960" in described.stdout and "randaugment" in described.stdout
    assert json.loads(invoked("describe", "efficientnet-b7", "--json").stdout) == ke.describe("efficientnet-b7")
    drawn = invoked("plot", "efficientnet-b0", "efficientnet-l2", tmp_path / "x.svg", "--json")
    assert (
        json.loads(drawn.stdout) == {"path": str(tmp_path / "x.svg")} and (tmp_path / "x.svg").stat().st_size > 10_000
    )


def test_list_of_weights_and_tradeoff(tmp_path):
    listed = command("list", "--weights")
    assert all(
        word in listed.stdout
        for word in ("noisy-student-475", "tf_efficientnet_l2.ns_jft_in1k_475", "98.648", "Apache-2.0")
    )
    rows = json.loads(invoked("list", "efficientnet-b0", "--weights", "--json").stdout)["weights"]
    assert [row["tag"] for row in rows] == ke.list_weights("efficientnet-b0")
    default = next(row for row in rows if row["default"])
    assert default["files"][0]["hash"] == "md5:902e53a9f72be733fc0bcb005b3ebbac"
    drawn = invoked("plot", "--tradeoff", tmp_path / "x.svg")
    assert drawn.returncode == 0 and (tmp_path / "x.svg").stat().st_size > 20_000


def test_convert_and_verify(tmp_path):
    path = tmp_path / "lite0.safetensors"
    source = lite0_package()
    assert json.loads(invoked("convert", source, path, "--json").stdout) == {
        "model": "efficientnet-lite0",
        "path": str(path),
        "writer": "",
        "left": [],
        "difference": None,
    }
    assert same_weights(ke.EfficientNetLite0(weights=path), ke.EfficientNetLite0())
    fits = invoked("verify", path, "--model", "efficientnet-lite0")
    assert fits.returncode == 0 and "247 variables match. timm file with 1000 classes: fits" in fits.stdout
    assert "keras-effnet convert" in invoked("verify", path).stdout
    other = invoked("verify", path, "--model", "efficientnet-lite1", "--json")
    assert other.returncode == 1 and not json.loads(other.stdout)["fits"]
    assert "- blocks.1.2.conv_pw.weight (for block2c_expand_conv/kernel)" in json.loads(other.stdout)["problems"]
    assert invoked("convert", path, tmp_path / "x.keras", "--preprocessing", "inception").returncode == 0
    assert ke.describe(ke.EfficientNetLite0(weights=tmp_path / "x.keras"))["preprocessing"] == "inception"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", CAT, "--model", "efficientnet-lite9"], "Nearest: 'efficientnet-lite"),
        (["predict", CAT, "--weights", "imagnet"], "Nearest: 'imagenet'"),
        (["convert", CAT, "x.h5"], "first bytes"),
        (["convert", "missing.pth", "x.h5"], "does not exist"),
        (["verify", CAT, "--model", "efficientnet-b0"], "first bytes"),
        (["download", "efficientnet-b0", "efficientnet_b1.ft_in1k"], "They are of efficientnet-b1"),
        (["plot", "x.svg"], "--tradeoff"),
        (["predict", CAT, "--weights", CAT], "first bytes"),
        (["predict", CAT, "--top", "0"], "1<=x<=1000"),
        (["predict"], "PHOTO"),
        (["describe", "b00"], "Nearest: 'efficientnet-b0'"),
        (["list", "*v3*"], "Unknown model"),
        (["plot", "efficientnet-b0", "x.jpg"], "Expected one of: .svg, .png"),
        (["predcit", CAT], "Did you mean 'predict'"),
        (["list", "--jsn"], "--json"),
    ],
)
def test_wrong_input_is_told_in_one_line(arguments, told):
    result = invoked(*arguments)
    assert result.returncode == 2 and not result.stdout
    lines = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", main.commands)
def test_each_command_explains_itself(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0 and "Show this message" in result.output
    summaries = CliRunner().invoke(main, ["--help"]).output.splitlines()
    (summary,) = (line for line in summaries if line.startswith(f"  {name} "))
    assert summary.endswith(".") and not summary.endswith("...")


def test_predict_uses_the_backend_that_is_installed(tmp_path):
    """If no backend is configured and TensorFlow is hidden, the command finds another."""
    if BACKEND != "tensorflow":
        pytest.skip("one run is enough")
    code = (
        "import importlib.util as u, os, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'tensorflow' else real(name, *a)\n"
        "from keras_effnet.commands.options import choose_backend; choose_backend()\n"
        "import keras; print(keras.backend.backend())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"} | {
        "KERAS_HOME": str(tmp_path)
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "jax", result.stderr


ENDS = """
import sys
import keras_effnet.commands as commands
class Last:
    def __del__(self):
        print("the interpreter shut down")
@commands.main.command()
def stop():
    raise SystemExit(75)
sys.modules["last"] = Last()
commands.program()
"""


@pytest.mark.parametrize(("line", "status"), [("list", 0), ("describe none", 2), ("stop", 75)])
def test_the_program_ends_before_the_interpreter_shuts_down(line, status):
    """A shutdown while a library's thread runs aborts the process, with status 134 in place of its own."""
    line = [sys.executable, "-c", ENDS, *line.split()]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert "shut down" not in result.stdout
    assert bool(result.stdout) is (line[-1] == "list")  # what is buffered is written

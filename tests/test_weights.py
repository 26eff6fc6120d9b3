"""Records, readers and the strict load. Real files, real damage."""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import BACKEND, fill, golden, same_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_effnet as ke
from keras_effnet.variants import VARIANTS
from keras_effnet.weights import readers, registry, store
from keras_effnet.weights.layouts import LAYOUTS

LITE0 = next(file for file in registry.find("efficientnet-lite0", "imagenet").files if file.package)


@pytest.fixture(scope="session")
def lite0_path() -> Path:
    return Path(str(distribution(LITE0.package).locate_file(LITE0.path)))


def test_records_are_the_published_ones():
    published = golden("tpu/published.json")["checkpoints"]
    ours = {file.url: record.top1 for record in registry.RECORDS for file in record.files if file.format == "tpu"}
    assert ours == {row["url"]: row["top1"] for row in published} and len(published) == 46


def test_records_are_unique_and_their_defaults_too():
    keys = [(record.model, record.tag) for record in registry.RECORDS]
    assert len(set(keys)) == len(keys)
    defaults = collections.Counter(record.model for record in registry.RECORDS if record.default)
    assert set(defaults.values()) == {1}
    assert set(VARIANTS) - set(defaults) == {"efficientnet-l2"}
    # Those of keras.applications: the same hosts' files and md5s as in the installed Keras.
    from keras.src.applications import efficientnet

    for short, hashes in efficientnet.WEIGHTS_HASHES.items():
        files = [file for file in registry.find(f"efficientnet-{short}", "imagenet").files if file.format == "keras"]
        assert [file.hash for file in files] == [f"md5:{value}" for value in hashes]
        assert files[0].url == f"{efficientnet.BASE_WEIGHTS_PATH}efficientnet{short}.h5"


def test_unreadable_records_say_so(monkeypatch):
    monkeypatch.setattr(keras, "Model", lambda *args, **kwargs: pytest.fail("it built the model first"))
    with pytest.raises(ValueError, match="TensorFlow checkpoint only") as caught:
        ke.EfficientNetB0(weights="noisy-student")
    assert "noisy_student_efficientnet-b0.tar.gz" in str(caught.value)


def test_a_download_that_fails_names_url_and_place(monkeypatch, tmp_path):
    file = registry.File("keras", url="http://127.0.0.1:9/efficientnetb0.h5", hash="md5:0")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/efficientnetb0\.h5.*by hand as .*models.efficientnetb0\.h5, or"):
        store._download(file)


def test_a_missing_package_names_the_command():
    file = registry.File("lukemelas", package="efficientnet-lite9-pytorch-model", path="x", hash="sha256:0")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite9-pytorch-model"):
        store._in_package(file)


def test_a_changed_package_is_refused():
    file = registry.File("lukemelas", package=LITE0.package, path=LITE0.path, hash="sha256:" + "0" * 64)
    with pytest.raises(OSError, match="Reinstall"):
        store._in_package(file)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_inverses(name):
    array = np.random.default_rng(0).random((2, 3, 4, 5)[: 2 if name == "OI->IO" else 4])
    layout = LAYOUTS[name]
    assert np.array_equal(layout.from_keras(layout.to_keras(array)), array)
    assert np.array_equal(layout.to_keras(layout.from_keras(array)), array)


def test_the_torch_reader_equals_torch(lite0_path):
    torch = pytest.importorskip("torch")
    expected = torch.load(lite0_path, weights_only=True)
    found = readers.read_torch(lite0_path)
    assert list(found) == list(expected) and len(found) == 296
    assert all(
        np.array_equal(found[name], value.numpy()) and found[name].dtype == value.numpy().dtype
        for name, value in expected.items()
    )


def test_the_torch_reader_follows_views_and_dtypes(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    state = {
        "base": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1, :, 1:3],
        "half": base.half(),
        "none": torch.zeros(0),
    }
    torch.save(
        {"state_dict": state, "other": 1}["state_dict"], tmp_path / "x.pth", _use_new_zipfile_serialization=False
    )
    found = readers.read_torch(tmp_path / "x.pth")
    assert all(np.array_equal(found[name], value.numpy()) for name, value in state.items())


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def torch_file(state) -> bytes:
    """A file of torch's legacy format with the pickle of `state` in its place."""
    file = io.BytesIO()
    for part in (readers.TORCH_MAGIC, 1001, {"little_endian": True}, state, []):
        pickle.dump(part, file, protocol=2)
    return file.getvalue()


# The state's place in a file of torch's format, filled by hand. A real unpickler ends the process with the first, never
# ends with the second, and takes gigabytes for others.
BOMBS = {
    "deep": b"\x80\x02})" + b"\x85" * 2_000_000 + b"Ns.",
    "exponential hash": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "exponential hash through the memo": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "reference": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"Q.",
    "huge memo": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "huge text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
    "early end": b"\x80\x02}",
    "other instruction": b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85\x81.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_pickle_bombs_are_refused_at_once(kind, tmp_path):
    path = tmp_path / "x.pth"
    start = b"".join(pickle.dumps(part, protocol=2) for part in (readers.TORCH_MAGIC, 1001, {"little_endian": True}))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); "
    code = limit + "import sys; from keras_effnet.weights import readers; readers.read(sys.argv[1])"
    for data in (start + BOMBS[kind], BOMBS[kind]):
        path.write_bytes(data)
        result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
        assert "ValueError: Expected a state dict" in result.stderr, result.stderr[-500:]


@pytest.mark.parametrize("function", [os.system, eval, open, getattr, collections.Counter])
def test_a_hostile_pickle_is_refused_and_runs_nothing(function, tmp_path):
    path, flag = tmp_path / "x.pth", tmp_path / "flag"
    argument = {os.system: f"touch {flag}", eval: f"open({str(flag)!r}, 'w')", open: str(flag)}.get(function, "x")
    arguments = (argument, "w") if function is open else (argument,)
    for data in (torch_file({"weight": Hostile(function, *arguments)}), pickle.dumps(Hostile(function, *arguments))):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="which no state dict needs"):
            readers.read(path)
    assert not flag.exists()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_torch_files_load_nothing(data, lite0_path, tmp_path):
    whole = lite0_path.read_bytes()
    head = 60_000  # the pickles; behind them are numbers, of which any is as good as another
    damaged = bytearray(whole[: data.draw(st.sampled_from([head // 2, head, len(whole) // 2, len(whole)]))])
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, min(len(damaged), head) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.pth"
    path.write_bytes(damaged)
    try:
        tensors = readers.read(path)[1]
    except ValueError:
        return
    assert all(isinstance(value, np.ndarray) for value in tensors.values())


def broken(tensors, kind):
    """A copy of a state dict with one fault."""
    tensors = dict(tensors)
    if kind == "missing":
        del tensors["_conv_head.weight"]
    elif kind == "unexpected":
        tensors["_conv_extra.weight"] = np.zeros(1)
    elif kind == "shape":
        tensors["_conv_head.weight"] = tensors["_conv_head.weight"][1:]
    elif kind == "rank":
        tensors["_conv_head.weight"] = tensors["_conv_head.weight"].ravel()
    elif kind == "nan":
        tensors["_bn1.weight"] = np.full_like(tensors["_bn1.weight"], np.nan)
    return tensors


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "- _conv_head.weight (for top_conv/kernel)"),
        ("unexpected", "+ _conv_extra.weight"),
        ("shape", "received (1, 1, 320, 1279)"),
        ("rank", "received (409600,)"),
        ("nan", "received 1280 others"),
    ],
)
def test_a_load_is_all_or_nothing(kind, told, lite0_path, monkeypatch):
    model = ke.EfficientNetLite0(weights=None)
    before = model.get_weights()
    tensors = broken(readers.read_torch(lite0_path), kind)
    monkeypatch.setattr(readers, "read_torch", lambda path: tensors)
    with pytest.raises(ValueError, match="missing") as caught:
        ke.weights.load(model, lite0_path)
    assert told in str(caught.value)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


def test_a_published_file_is_recognised_by_its_hash(lite0_path):
    by_path, by_tag = ke.EfficientNetLite0(weights=lite0_path), ke.EfficientNetLite0()
    assert by_path.weights_record == by_tag.weights_record == registry.find("efficientnet-lite0", "imagenet")
    with pytest.raises(ValueError, match="classes=1000"):
        ke.EfficientNetLite0(weights=lite0_path, classes=5)


def test_a_body_loads_from_a_file_with_a_top(lite0_path):
    whole, body = ke.EfficientNetLite0(), ke.EfficientNetLite0(include_top=False, weights=lite0_path)
    assert same_weights(keras.Model(whole.inputs, whole.get_layer("top_activation").output), body)


def test_layers_around_a_model_are_left_alone(lite0_path, tmp_path):
    plain = ke.EfficientNetLite0(include_top=False)
    inputs = keras.Input((64, 64, 1))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 1, name="my_stem_conv")(inputs))
    adapted = ke.EfficientNetLite0(include_top=False, input_tensor=keras.layers.Rescaling(2.0)(x))
    second = ke.EfficientNetLite0(include_top=False, input_tensor=x, name="second")
    joined = keras.Model(inputs, [adapted.output, keras.layers.Dense(3, name="out")(second.output)])
    for prefix in ("", "second_"):
        ke.weights.load(joined, lite0_path, prefix=prefix)
        for layer in plain.layers:
            if layer.get_weights():
                assert all(
                    map(np.array_equal, layer.get_weights(), joined.get_layer(prefix + layer.name).get_weights())
                )
    with pytest.raises(ValueError, match="holds 2"):
        ke.weights.load(joined, lite0_path)
    headed = keras.Model(plain.inputs, keras.layers.Dense(3, name="out")(plain.output))
    ke.weights.load(headed, lite0_path)
    assert set(ke.features(headed).output) == {f"reduction_{n}" for n in range(1, 6)}


def test_a_keras_file_of_keras_applications_keeps_the_weights_preprocessing(tmp_path):
    theirs = keras.applications.EfficientNetB0(weights=None, classes=5, input_shape=(64, 64, 3))
    path = tmp_path / "b0.keras"
    theirs.save(path)
    loaded = ke.EfficientNetB0(weights=path, classes=5, input_shape=(64, 64, 3))
    assert ke.describe(loaded)["preprocessing"] == "imagenet"
    kernel = theirs.get_layer("top_conv").get_weights()[0]
    assert np.array_equal(loaded.get_layer("top_conv").get_weights()[0], kernel)


def test_arguments_are_checked_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(store, "locate", lambda *args: pytest.fail("it looked for the file"))
    for wrong in (
        {"classes": 7},
        {"include_top": False, "pooling": "mean"},
        {"dtype": "bfloat17"},
        {"input_shape": (3, 3)},
        {"input_shape": (64, 64, 1)},
        {"dropout_rate": 2},
        {"preprocessing": "tpu127"},
        {"classifier_activation": "relu"},
        {"data_format": "NHWC"},
    ):
        with pytest.raises(ValueError, match="Received"):
            ke.EfficientNetB0(**wrong)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff\xfe", b'{"config": {"layers": [{"class_name": "Rescaling"}]}}', None]
)
def test_a_broken_archive_is_told(content, tmp_path):
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json" if content else "other", content or b"")
    with pytest.raises(ValueError, match=r"Expected a \.keras file"):
        ke.EfficientNetB0(weights=path)


def test_own_files_with_nan_change_nothing(tmp_path):
    model = ke.EfficientNetLite0(weights=None)
    before = model.get_weights()
    model.get_layer("top_bn").gamma.assign(np.full(1280, np.nan, "float32"))
    model.save_weights(tmp_path / "x.weights.h5")
    model.set_weights(before)
    with pytest.raises(ValueError, match="not finite"):
        ke.weights.load(model, tmp_path / "x.weights.h5")
    assert all(map(np.array_equal, model.get_weights(), before))


@pytest.mark.parametrize("fault", ["huge", "text", "external"])
def test_h5_files_with_traps_are_refused(fault, tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["stem_conv"]
        group = file.create_group("stem_conv")
        group.attrs["weight_names"] = ["stem_conv/kernel:0"]
        if fault == "huge":
            group.create_dataset("stem_conv/kernel:0", (10**13,), "float32", chunks=(1000,))
        elif fault == "text":
            group.create_dataset("stem_conv/kernel:0", data=[b"hello"])
        else:
            group.create_dataset("stem_conv/kernel:0", (4,), "float32", external=[("/etc/passwd", 0, 16)])
    with pytest.raises(ValueError, match="structure"):
        readers.read(path)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_own_files_load_by_path_and_carry_their_preprocessing(suffix, tmp_path):
    path = tmp_path / f"b0{suffix}"
    saved = fill(ke.EfficientNetB0(weights=None, preprocessing="inception", classes=5))
    saved.save(path) if suffix == ".keras" else saved.save_weights(path)
    loaded = ke.EfficientNetB0(weights=path, classes=5)
    assert same_weights(saved, loaded)
    scheme = ke.describe(loaded)["preprocessing"]
    assert scheme == ("inception" if suffix == ".keras" else "imagenet")
    if suffix == ".keras":
        with pytest.raises(ValueError, match="'inception', with which"):
            ke.EfficientNetB0(weights=path, classes=5, preprocessing="imagenet")
        assert ke.describe(ke.EfficientNetB0(weights=path, classes=5, preprocessing=None))["preprocessing"] is None


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("fault", ["other model", "other classes", "truncated", "text"])
def test_own_files_that_do_not_fit_change_nothing(suffix, fault, tmp_path):
    path = tmp_path / f"x{suffix}"
    other = ke.create_model(
        "efficientnet-b1" if fault == "other model" else "efficientnet-b0",
        weights=None,
        classes=5,
        input_shape=(32, 32, 3),
    )
    other.save(path) if suffix == ".keras" else other.save_weights(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    if fault == "text":
        path.write_text("hello")
    model = ke.EfficientNetB0(weights=None, classes=6 if fault == "other classes" else 5, input_shape=(32, 32, 3))
    before = model.get_weights()
    with pytest.raises(ValueError, match="Expected the weights of 'efficientnet-b0'"):
        ke.weights.load(model, path)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend writes the file")
@pytest.mark.parametrize("include_top", [True, False])
def test_an_h5_of_keras_applications_loads(include_top, tmp_path):
    theirs = keras.applications.EfficientNetB0(weights=None, include_top=include_top)
    ours = fill(ke.EfficientNetB0(weights=None, include_top=include_top))
    for layer in ours.layers:
        if layer.weights:
            theirs.get_layer(layer.name).set_weights(layer.get_weights())
    path = tmp_path / "b0.h5"
    theirs.save(path)
    loaded = ke.EfficientNetB0(weights=str(path), include_top=include_top)
    assert same_weights(ours, loaded)
    with h5py.File(path, "r+") as file:
        del file["model_weights"]["top_conv"]
    with pytest.raises(ValueError, match="structure"):
        ke.weights.load(loaded, path)


def test_an_unknown_format_is_told(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello, world")
    with pytest.raises(ValueError, match=r"first bytes are b'hello, w'"):
        ke.weights.load(ke.EfficientNetLite0(weights=None), path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        ke.weights.load(ke.EfficientNetLite0(weights=None), tmp_path)
    with pytest.raises(ValueError, match="Nearest: 'keras'"):
        ke.weights.load(ke.EfficientNetLite0(weights=None), path, source="kera")

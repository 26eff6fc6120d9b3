"""What a file of Keras 2 is named by, lacks or contradicts is told. Nothing is saved that computes otherwise."""

import re
import shlex
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, invoked

import keras_effnet as ke
from keras_effnet.weights import convert
from keras_effnet.weights.keras2 import comparison

tf_keras = pytest.importorskip("tf_keras")
if BACKEND != "tensorflow":
    pytest.skip("the files do not depend on the backend", allow_module_level=True)

import tensorflow as tf  # noqa: E402
from tf_keras.src.applications import efficientnet  # noqa: E402  the public module has no nets of other depths

# The net that B0 is with the fixture `mini`.
REPEATS = (1, 2, 1)
BLOCKS = [args | {"repeats": count} for args, count in zip(efficientnet.DEFAULT_BLOCKS_ARGS, REPEATS, strict=False)]
SCALE = 1 / (255 * np.sqrt(0.08))

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")


def body():
    """Returns a net whose pixels are not those that its variant usually has."""
    settings = {"weights": None, "include_top": False, "input_shape": (64, 64, 3), "blocks_args": BLOCKS}
    settings |= {"width_coefficient": 1.0, "depth_coefficient": 1.0, "default_size": 64, "model_name": "small"}
    net = efficientnet.EfficientNet(**settings)
    (pixels,) = (layer for layer in net.layers if isinstance(layer, tf_keras.layers.Normalization))
    pixels.set_weights([np.full(3, 0.5), np.full(3, 0.08), 0])
    pixels.finalize_state()  # it computes with copies
    return net


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a SavedModel, and a checkpoint of its weights."""
    layers, folder = tf_keras.layers, tmp_path_factory.mktemp("saved")
    model = tf_keras.Sequential([body(), layers.GlobalAveragePooling2D(), layers.Dense(3, activation="softmax")])
    model.save(folder / "my model", save_format="tf")
    model.save_weights(folder / "checkpoints" / "w")
    return folder


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("name", ["w", "w.index", "w.data-00000-of-00001", "checkpoint", "", "w.tar.gz"])
def test_each_file_of_a_checkpoint_names_all_of_it(name, saved, tmp_path):
    path = saved / "checkpoints" / name
    if name == "w.tar.gz":
        path = Path(shutil.make_archive(str(tmp_path / "w"), "gztar", saved / "checkpoints"))
    found = ke.weights.identify(path)
    assert found.kind == "weights: a checkpoint of TensorFlow 2 with the layers of keras.applications"
    convert.convert(path, tmp_path / "new.keras")
    layer = keras.saving.load_model(tmp_path / "new.keras").get_layer("preprocessing")
    for scale in (found.preprocessing[0], np.ravel(layer.scale)):
        np.testing.assert_allclose(scale, SCALE, rtol=1e-6)


@pytest.mark.usefixtures("mini")
def test_a_file_beside_a_prefix_of_its_name_is_not_taken_for_it(saved, tmp_path):
    shutil.copy(saved / "checkpoints" / "w.index", tmp_path / "w.index")
    (tmp_path / "w").write_bytes(b"")
    with pytest.raises(ValueError, match="Expected a prefix that only a checkpoint has"):
        ke.weights.identify(tmp_path / "w.index")


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("name", ["w.index", "w.data-00000-of-00001"])
def test_a_folder_beside_a_prefix_of_its_name_is_no_part_of_it(name, saved, tmp_path):
    folder = shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    (folder / "w").mkdir()
    (folder / "w" / "notes.txt").touch()
    found = ke.weights.identify(folder / name)
    assert found.kind == "weights: a checkpoint of TensorFlow 2 with the layers of keras.applications"
    assert shlex.split(found.command)[2] == str(folder / name)
    assert convert.convert(folder / name, tmp_path / "new.keras").model == "efficientnet-b0"
    layer = keras.saving.load_model(tmp_path / "new.keras").get_layer("preprocessing")
    np.testing.assert_allclose(np.ravel(layer.scale), SCALE, rtol=1e-6)
    model = ke.EfficientNetB0(weights=None, include_top=False, input_shape=(64, 64, 3))
    assert ke.weights.load(model, folder / name).fits


@pytest.mark.usefixtures("mini")
def test_a_keras_file_of_keras_2_is_not_called_a_checkpoint(tmp_path):
    path = tmp_path / "m.keras"
    body().save(path)
    told = "which is a .keras or .weights.h5 file of Keras 2.12 or later"
    with pytest.raises(ValueError, match=f"Received: '{re.escape(str(path))}', {re.escape(told)}"):
        ke.weights.load(ke.EfficientNetB0(weights=None, include_top=False), path, source="timm")


def without_variables(folder: Path) -> None:
    shutil.rmtree(folder / "variables")


def without(name: str):
    return lambda folder: (folder / name).unlink()


UNDESCRIBED = r"lacks the description of its layers .* If model\.export\(\) wrote it, convert the original"
INCOMPLETE = {
    "index": (without("variables/variables.index"), OSError, "variables' without variables.index"),
    "variables": (without_variables, OSError, "variables' without variables.index"),
    "shard": (without("variables/variables.data-00000-of-00001"), OSError, "without variables.data-00000-of-00001"),
    "graph": (lambda folder: (folder / "saved_model.pb").write_bytes(b""), ValueError, "saved_model.pb is empty"),
    "layers": (without("keras_metadata.pb"), None, UNDESCRIBED),
}


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("kind", INCOMPLETE)
def test_an_incomplete_saved_model_is_told(kind, saved, tmp_path):
    change, error, told = INCOMPLETE[kind]
    change(shutil.copytree(saved / "my model", tmp_path / "saved"))
    if error is None:
        done = convert.convert(tmp_path / "saved", tmp_path / "new.keras")
        assert done.left == ke.weights.identify(tmp_path / "saved").left
        assert re.search(told, done.left[0])
        assert "To keep it: --head linear:3" in done.left[1]
        return
    for call in (ke.weights.identify, lambda path: convert.convert(path, tmp_path / "new.keras")):
        with pytest.raises(error, match=told):
            call(tmp_path / "saved")
    assert not (tmp_path / "new.keras").exists()


@pytest.mark.usefixtures("mini")
def test_the_files_in_a_saved_model_name_their_folder_and_commands_are_quoted(saved):
    found = ke.weights.identify(saved / "my model" / "saved_model.pb")
    assert found.kind.startswith("a whole model of Keras 2: a SavedModel")
    told = invoked("verify", saved / "my model" / "keras_metadata.pb").stdout
    (line,) = re.findall("convert with: +(.+)", told)
    assert shlex.split(line) == ["keras-effnet", "convert", str(saved / "my model"), "my model.keras"]


def test_an_exported_model_has_no_layers(tmp_path):
    module = tf.Module()
    module.variables_by_number = [tf.Variable(1.0)]
    tf.saved_model.save(module, str(tmp_path / "exported"))
    for call in (ke.weights.identify, lambda path: convert.convert(path, tmp_path / "new.keras")):
        with pytest.raises(ValueError, match=UNDESCRIBED):
            call(tmp_path / "exported")


@pytest.mark.usefixtures("mini")
def test_a_model_whose_outputs_differ_is_not_saved(saved, tmp_path):
    """Here, the description is of another model than the variables."""
    folder, new = shutil.copytree(saved / "my model", tmp_path / "saved"), tmp_path / "new.keras"
    new.write_text("mine")
    described = folder / "keras_metadata.pb"
    described.write_bytes(described.read_bytes().replace(b'"softmax"', b'"sigmoid"'))  # as many bytes
    with pytest.raises(ValueError, match=r"by at most 1e-03 .* differs by \S+\. Nothing is saved"):
        convert.convert(folder, new, verify=True)
    assert new.read_text() == "mine"


@pytest.fixture(scope="module")
def two_in_three_out(tmp_path_factory):
    """A SavedModel of two inputs and a dict of outputs, two of which come from one layer. Its twin in Keras 3."""
    found = []
    for library in (tf_keras, keras):
        layers = library.layers
        table, photo = library.Input((4,), name="table"), library.Input((8, 8, 3), name="photo")
        shared, pooled = layers.Dense(2, name="shared"), layers.GlobalAveragePooling2D()(photo)
        last = layers.Dense(3, name="last")(layers.Concatenate()([table, pooled]))
        outputs = {"a": last, "b": shared(pooled), "c": shared(pooled * 2.0)}
        found.append(library.Model([table, photo], outputs))
    old, new = found
    path = tmp_path_factory.mktemp("two") / "saved"
    old.save(path, save_format="tf")
    new.set_weights(old.get_weights())
    return new, path


def test_several_inputs_and_outputs_are_compared_by_name(two_in_three_out):
    new, path = two_in_three_out
    assert comparison.check(new, path) < 1e-5
    other = keras.Sequential([keras.Input((4,), name="table"), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"its inputs are called .*photo.* and those of the new model table"):
        comparison.check(other, path)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("mixed_float16", 1e-2), ("mixed_bfloat16", 1e-1)])
def test_the_bound_is_that_of_the_type_that_layers_compute_in(dtype, bound, monkeypatch):
    layer = keras.layers.Dense(2, dtype=dtype)
    model = keras.Sequential([keras.Input((3,)), layer])
    for difference, fits in ((0.9 * bound, True), (1.1 * bound, False), (float("nan"), False)):
        monkeypatch.setattr(comparison, "largest_difference", lambda *_, found=difference: found)
        if fits:
            assert comparison.check(model, Path("x")) == difference
            continue
        with pytest.raises(ValueError, match=f"by at most {bound:.0e}"):
            comparison.check(model, Path("x"))


def unnormalized():
    config = body().get_config()
    config["layers"] = [each for each in config["layers"] if each["name"] not in ("rescaling", "normalization")]
    first = config["layers"][0]["name"]
    for each in config["layers"]:
        if each["name"] == "stem_conv_pad":
            each["inbound_nodes"] = [[[first, 0, 0, {}]]]
    return tf_keras.Model.from_config(config)


@pytest.mark.usefixtures("mini")
def test_the_pixels_of_one_input_of_several_are_normalized(tmp_path):
    layers = tf_keras.layers
    table, photo = tf_keras.Input((4,), name="table"), tf_keras.Input((64, 64, 3), name="photo")
    pooled = layers.GlobalAveragePooling2D()(unnormalized()(photo))
    tf_keras.Model([table, photo], layers.Dense(2)(layers.Concatenate()([table, pooled]))).save(tmp_path / "m.h5")
    assert ke.weights.identify(tmp_path / "m.h5").input_size == (64, 64)
    models = []
    for preprocessing in ("auto", "imagenet"):
        done = convert.convert(tmp_path / "m.h5", tmp_path / "new.keras", preprocessing=preprocessing)
        assert len(done.left) == (preprocessing == "auto")
        models.append(keras.saving.load_model(tmp_path / "new.keras", compile=False))
    numbers = np.ones((2, 4), "float32"), np.full((2, 64, 64, 3), 255.0, "float32")
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    expected = models[0]([numbers[0], np.broadcast_to(white.astype("float32"), (2, 64, 64, 3))])
    np.testing.assert_allclose(models[1]([*numbers]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("mini")
def test_of_two_images_it_is_not_known_which_to_normalize(tmp_path):
    net, layers = unnormalized(), tf_keras.layers
    photos = [tf_keras.Input((64, 64, 3), name=name) for name in ("one", "two")]
    pooled = [layers.GlobalAveragePooling2D()(net(photo)) for photo in photos]
    tf_keras.Model(photos, layers.Dense(2)(layers.Concatenate()(pooled))).save(tmp_path / "m.h5")
    (left,) = ke.weights.identify(tmp_path / "m.h5").left
    assert left.startswith("the normalization of pixels") and "--preprocessing" not in left
    with pytest.raises(ValueError, match="Expected a model with one input of images"):
        convert.convert(tmp_path / "m.h5", tmp_path / "new.keras", preprocessing="imagenet")

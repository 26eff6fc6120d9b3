"""Maps of the places that support a class: exact for a linear head, as a plain script's for others, also exported."""

import json
import os
import re
import shutil

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, invoked, leading, run, shallow_nets, tiny, trained
from PIL import Image

import keras_effnet as ke
from keras_effnet import cache
from keras_effnet.images import folders
from keras_effnet.inference import class_maps, explained_photos
from keras_effnet.inference.classifier import Classifier

# Converters use deprecated parts of TensorFlow, JAX, PyTorch and NumPy. We cannot fix their warnings.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]

ON_TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="written for TensorFlow, in parts")


def pixels(shape, count: int = 3) -> np.ndarray:
    random = np.random.default_rng(1).uniform(0, 255, (count, *shape)).astype("float32")
    return random * np.linspace(0.1, 1, count, dtype="float32").reshape(count, 1, 1, 1)


def net(name: str, shape=(75, 64, 3), **options):
    with shallow_nets():
        return trained(ke.create_model(name, weights=None, input_shape=shape, classes=6, **options))


def own(shape=(75, 64, 3), activation: str = "softmax", hidden: str | None = None):
    """A user's model: a body with a head of two dense layers."""
    with shallow_nets():
        body = ke.EfficientNetB0(include_top=False, weights=None, input_shape=shape)
    layers = keras.layers
    head = [layers.Dropout(0.3), layers.Dense(9, hidden), layers.BatchNormalization(), layers.Dense(6, activation)]
    pooling = layers.GlobalAveragePooling2D(keepdims=True), layers.Flatten(), layers.BatchNormalization()
    return trained(keras.Sequential([keras.Input(shape), body, *pooling, *head]))


def of_keras():
    return trained(keras.applications.EfficientNetB0(weights=None, classes=6, input_shape=(64, 64, 3)))


def first():
    """A model whose channels come first. TensorFlow does not convolve them on a processor."""
    return net("efficientnet-lite0", (3, 75, 64), data_format="channels_first")


def pruned():
    return trained(ke.create_model("efficientnet-b1-pruned", weights=None, input_shape=(64, 64, 3), classes=6))


MODELS = ({} if BACKEND == "tensorflow" else {"channels_first": first}) | {
    "own": own,
    "condconv": lambda: net("efficientnet-condconv-b0-4e"),
    "sigmoid": lambda: own(activation="sigmoid"),
    "mixed": lambda: net("efficientnet-lite0", dtype="mixed_bfloat16"),
    "lite0": lambda: net("efficientnet-lite0"),
    "v2": lambda: net("efficientnetv2-b0"),
    "logits": lambda: own(activation=None),
    "keras.applications": of_keras,
    "pruned": pruned,
}


def logits_of(outputs: np.ndarray, name: str) -> np.ndarray:
    """Returns logits, for a softmax up to a constant of each image."""
    outputs = outputs.astype("float64")
    match name:
        case "logits":
            return outputs
        case "sigmoid":
            return np.log(outputs / (1 - outputs))
    return np.log(outputs)


@pytest.mark.parametrize("name", leading(MODELS, 4))
def test_the_sum_of_a_map_and_the_bias_is_the_logit(name):
    model = MODELS[name]()
    images = pixels(model.input_shape[1:])
    expected = logits_of(run(model, images).astype("float64"), name)
    sums = np.stack([ke.explain(model, images, label).sum((1, 2)) for label in range(6)], 1)
    bias = expected - sums  # the same for all images, up to the constants
    if name not in ("logits", "sigmoid"):
        bias -= bias.mean(1, keepdims=True)
    # Sums of float32, or of bfloat16 with its 8 bits; and probabilities of float32.
    bound = (2e-2 if name == "mixed" else 1e-5) * np.abs(sums).max() + 3e-7
    assert np.abs(bias - bias[0]).max() < bound < np.ptp(sums, 0).max() / 2
    of_best = ke.explain(model, images)
    assert np.array_equal(of_best, ke.explain(model, images, expected.argmax(1)))
    assert of_best.shape[1] == -(-images.shape[1 if model.input_shape[-1] == 3 else 2] // 32)


def plain_grad_cam(model, images, classes, layer):
    """What scripts for TensorFlow do: a model with two outputs, and the gradient of one with respect to the other."""
    import tensorflow as tf

    both = keras.Model(model.inputs, [model.get_layer(layer).output, model.output])
    with tf.GradientTape() as tape:
        maps, scores = both(images, training=False)
        total = tf.reduce_sum(tf.gather(scores, classes, batch_dims=1))
    gradient = tape.gradient(total, maps).numpy()
    maps = maps.numpy()
    usual = np.maximum((gradient.mean((1, 2), keepdims=True) * maps).sum(-1), 0)
    share = gradient**2 / (2 * gradient**2 + maps.sum((1, 2), keepdims=True) * gradient**3 + 1e-30)
    weights = (share * np.maximum(gradient, 0)).sum((1, 2), keepdims=True)
    return usual, np.maximum((weights * maps).sum(-1), 0)


@ON_TENSORFLOW
@pytest.mark.parametrize("layer", ["top_activation", "block5a_activation"])
def test_gradients_give_what_a_plain_script_gives(layer):
    with_softmax, without = net("efficientnet-b0"), net("efficientnet-b0", classifier_activation=None)
    without.set_weights(with_softmax.get_weights())
    images, classes = pixels((75, 64, 3), 6), list(range(6))
    expected = plain_grad_cam(without, images, classes, layer)
    for method, wanted in zip(("grad-cam", "grad-cam++"), expected, strict=True):
        found = ke.explain(with_softmax, images, classes, method, layer)
        assert np.abs(found - wanted).max() < 1e-4 * wanted.max(), method
        if layer == "top_activation":
            assert np.array_equal(ke.explain(with_softmax, images, classes, method), found)


def test_gradients_of_a_linear_head_give_the_exact_map():
    model = own()
    images = pixels((75, 64, 3))
    exact = np.maximum(ke.explain(model, images, 2), 0)
    assert np.abs(ke.explain(model, images, 2, "grad-cam") - exact).max() < 1e-4 * exact.max()


@ON_TENSORFLOW
def test_a_head_with_a_hidden_layer_has_gradients():
    model = own(activation=None, hidden="relu")
    with pytest.raises(ValueError, match=r"average pooling and one dense layer. Received: .* Nearest: ke.explain\("):
        ke.explain(model, pixels((75, 64, 3)))
    inside = model.layers[0]
    flat = keras.Model(inside.inputs, keras.Sequential(model.layers[1:])(inside.output))
    images = pixels((75, 64, 3))
    expected = plain_grad_cam(flat, images, [1, 1, 1], "top_activation")[0]
    assert np.abs(ke.explain(model, images, 1, "grad-cam") - expected).max() < 1e-4 * expected.max()


@pytest.mark.parametrize("ending", leading([".onnx", *([".tflite"] if BACKEND == "tensorflow" else []), ".xml"], 2))
def test_an_export_carries_the_maps(ending, tmp_path):
    model, images = tiny((75, 64, 3), 6), pixels((75, 64, 3))
    path = tmp_path / f"mine{ending}"
    assert ke.export(model, path, labels=list("abcdef"), maps=True)["difference"]["random"] < 1e-4
    predictor = ke.Predictor(path)
    expected = run(model, images)
    assert np.abs(predictor(images) - expected).max() < 1e-5  # a predictor's calls give no maps
    outputs, maps = ke.Predictor(path, maps=True).explain(images)
    assert np.array_equal(outputs, predictor(images)) and maps.shape == (3, 19, 16, 6)
    wanted = ke.explain(model, images)
    assert np.abs(ke.explain(path, images) - wanted).max() < 1e-4 * np.abs(wanted).max()
    with pytest.raises(ValueError, match="method='cam' for an exported model"):
        ke.explain(path, images, method="grad-cam")
    assert ke.metadata(path)["maps"] is True and ke.metadata(path)["outputs"] is None
    told = invoked("predict", ROOT / "docs" / "cat.png", "--model", path, "--json")
    assert len(json.loads(told.stdout)["photographs"][0]["predictions"]) == 5
    told = invoked("explain", ROOT / "docs" / "cat.png", "--model", path, "--out", tmp_path / "out", "--json")
    (row,) = json.loads(told.stdout)["photographs"]
    assert len(row["predictions"]) == 3 and os.path.exists(row["picture"])


@ON_TENSORFLOW
@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("ending", leading([".onnx", ".tflite"], 1))
def test_an_export_in_8_bits_carries_them_too(ending, tmp_path):
    model, images = net("efficientnet-lite0"), pixels((75, 64, 3), 16)
    report = ke.export(model, tmp_path / f"small{ending}", precision="int8", calibration=images, maps=True)
    exact = ke.explain(model, images, 2)
    found = ke.explain(tmp_path / f"small{ending}", images, 2)
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.97
    # As many layers stay in float as without maps, so that the outputs are as exact.
    bare = ke.export(model, tmp_path / f"bare{ending}", precision="int8", calibration=images)
    assert report["float_layers"] == bare["float_layers"]


def test_a_predictor_explains_what_the_model_explains():
    model, images = tiny((75, 64, 3), 6), pixels((75, 64, 3))
    for runtime in ("keras", "onnxruntime"):
        predictor = ke.Predictor(model, runtime, maps=True)
        outputs, maps = predictor.explain(images)
        wanted = ke.explain(model, images)
        assert np.abs(maps[range(3), :, :, outputs.argmax(1)] - wanted).max() < 1e-4 * np.abs(wanted).max()
    with pytest.raises(ValueError, match="Expected a Predictor with maps"):
        ke.Predictor(model, "onnxruntime").explain(images)
    assert len([one for one in cache.entries() if one.kind == "predictor"]) >= 2  # with maps and without


@ON_TENSORFLOW
def test_a_folder_is_written_again_and_does_not_explain_itself(photos, tmp_path):
    """Also after a run that was killed. The second run finds the pictures of the first among the photos."""
    path, out = tmp_path / "mine.keras", photos / "explained"
    ke.save_model(tiny(classes=6), path)
    out.mkdir()
    (photos / "broken.jpg").unlink()
    classifier = Classifier(path, runtime="keras", maps=True)
    for _ in range(2):
        found = folders.photographs([photos], recursive=True)
        assert len(list(explained_photos.explain_photos(found, out, classifier))) == 3
        assert len(list(out.glob("*.jpg"))) == 3 and (out / "index.html").read_text().count("<article") == 3
    # Files of the user's own stay, also among the pictures.
    (out / "cat.jpg").write_bytes((photos / "same" / "cat.jpg").read_bytes())
    rows = list(explained_photos.explain_photos([photos / "cat.png"], out, classifier))
    assert rows[0]["picture"] == str(out / "cat-2.jpg")
    assert (out / "cat.jpg").read_bytes() == (photos / "same" / "cat.jpg").read_bytes()
    with pytest.raises(ValueError, match="Expected a folder other than that of the photos"):
        explained_photos.explain_photos([out], out, classifier)
    rows = explained_photos.explain_photos([photos / "cat.png"], tmp_path / "killed", classifier)
    next(rows)
    rows.close()
    assert "Not finished" in (tmp_path / "killed" / "index.html").read_text()
    assert len(list(explained_photos.explain_photos([photos / "cat.png"], tmp_path / "killed", classifier))) == 1


def test_layers_that_do_more_are_not_taken_for_plain_ones():
    class Cosine(keras.layers.Dense):
        def call(self, inputs):
            return keras.ops.matmul(keras.ops.normalize(inputs), keras.ops.normalize(self.kernel, axis=0))

    with shallow_nets():
        body = ke.EfficientNetB0(include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg")
    with pytest.raises(ValueError, match=r"with 'cosine'\. Nearest: .*method='grad-cam'"):
        ke.explain(keras.Sequential([body, Cosine(6, name="cosine")]), pixels((64, 64, 3)))
    # Of a subclass with its own softmax, gradients are those of the probabilities.
    certain, images = keras.Sequential([body, Cosine(6, "softmax", name="cosine")]), pixels((64, 64, 3))
    assert ke.explain(certain, images, 2, "grad-cam").shape == (3, 2, 2)
    # A pooling that also feeds a gate: the maps of its last call, and no export of the first's.
    pool, features = keras.layers.GlobalAveragePooling2D(name="pool"), body.get_layer("top_activation").output
    gate = keras.layers.Reshape((1, 1, -1))(keras.layers.Dense(1280, "sigmoid")(pool(features)))
    scores = keras.layers.Dense(6)(pool(keras.layers.Multiply()([features, gate])))
    model = keras.Model(body.inputs, scores)
    images = pixels((64, 64, 3))
    bias = run(model, images)[:, 2] - ke.explain(model, images, 2).sum((1, 2))
    assert np.abs(bias).max() < 1e-5  # the bias is 0
    with pytest.raises(ValueError, match=r"Expected a pooling layer that is called once. Received: 'pool'"):
        class_maps.with_maps(model, (64, 64, 3))


def test_gradients_in_mixed_precision():
    model = net("efficientnet-lite0", dtype="mixed_bfloat16")
    images = pixels((75, 64, 3))
    exact = np.maximum(ke.explain(model, images), 0)
    found = ke.explain(model, images, method="grad-cam")
    assert np.abs(found - exact).max() < 0.03 * exact.max()


def test_what_is_wrong_is_told(tmp_path):
    model, images = net("efficientnet-lite0"), pixels((75, 64, 3))
    wrong = {
        "Unknown method.*Nearest: 'grad-cam": {"method": "gradcam"},
        "class_id from 0 to 5. Received: class_id=6": {"class_id": 6},
        "one for each of 3 images": {"class_id": [1, 2]},
        r"class_id as an integer.*Received: 1\.5": {"class_id": 1.5},
        "layer=None for method='cam'": {"layer": "top_activation"},
        "Unknown layer.*Nearest: 'top_activation'": {"layer": "top_activaton", "method": "grad-cam"},
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            ke.explain(model, images, **arguments)
    with pytest.raises(ValueError, match=r"images of shape \(count, 75, 64, 3\)"):
        ke.explain(model, images[:, :60])
    features = net("efficientnet-lite0", include_top=False)
    with pytest.raises(ValueError, match=r"one output of shape \(batch, classes\)"):
        ke.explain(features, images)
    ke.export(tiny((75, 64, 3), 6), tmp_path / "bare.onnx")
    with pytest.raises(ValueError, match=r"Expected an export with maps.*maps=True"):
        ke.explain(tmp_path / "bare.onnx", images)


def test_an_overlay_covers_the_brightest_place():
    image = np.full((64, 48, 3), 100, "uint8")
    values = np.zeros((4, 3))
    values[1, 2], values[3, 0] = 2, -5
    covered = ke.overlay(image, values).astype(int)
    changed = np.abs(covered - 100).sum(-1)
    assert np.unravel_index(changed.argmax(), changed.shape)[0] in range(16, 32)
    assert changed[16:32, 32:].mean() > 10 * changed[48:, :16].mean() and covered.shape == (64, 48, 3)
    assert np.array_equal(ke.overlay(image, values, 0), image)
    nothing = np.full((7, 7), -0.05)
    nothing[:, :3] = -1
    assert np.array_equal(ke.overlay(image, nothing), image)  # nothing supports the class
    with pytest.raises(ValueError, match="Expected strength"):
        ke.overlay(image, values, 1.5)
    with pytest.raises(
        ValueError, match=r"a map of shape \(rows, columns\). Received: shapes \(64, 48, 3\) and \(4,\)"
    ):
        ke.overlay(image, np.zeros(4))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("cat", "coffee"):
        shutil.copy(ROOT / "docs" / f"{name}.png", folder)
    (folder / "same").mkdir()
    Image.open(folder / "cat.png").convert("RGB").save(folder / "same" / "cat.jpg")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


@ON_TENSORFLOW
def test_the_command_writes_pictures_and_a_page(photos, tmp_path):
    out = tmp_path / "out"
    # On Keras, without an export of 20 seconds: test_an_export_carries_the_maps explains with an exported file.
    done = invoked("explain", photos, "--recursive", "--runtime", "keras", "--out", out, "--json")
    assert done.returncode == 2 and "broken.jpg" in done.stderr  # one photo cannot be read: the others are there
    rows = {os.path.relpath(row["path"], photos): row for row in json.loads(done.stdout)["photographs"]}
    assert {name for name, row in rows.items() if "error" in row} == {"broken.jpg"}
    names = [each["name"] for each in rows["coffee.png"]["predictions"]]
    assert names[0] == "espresso" and len(names) == 3
    pictures = {row["picture"] for row in rows.values() if "error" not in row}
    assert sorted(os.path.basename(each) for each in pictures) == ["cat-2.jpg", "cat.jpg", "coffee.jpg"]
    with Image.open(rows["coffee.png"]["picture"]) as picture:
        tiles = np.asarray(picture.convert("RGB"), int)
    assert tiles.shape == (270, 4 * 224 + 3 * 8, 3)
    colors = [np.ptp(tiles[:224, start : start + 224], axis=2) for start in (0, 232)]
    # The map of the espresso is on the coffee, and the photo around it is gray.
    assert colors[1][60:120, 80:150].mean() > 60 and colors[1][200:, :30].mean() < 25 < colors[0][200:, :30].mean()
    page = (out / "index.html").read_text()
    assert page.count("<article") == 3 and page.count("data:image/jpeg") == 12 and "espresso" in page
    assert "broken.jpg" in page and not re.search(r'(?:src|href)="(?!data:)', page)


@ON_TENSORFLOW
def test_the_command_explains_given_classes_and_any_head(photos, tmp_path):
    path, out = tmp_path / "mine.keras", tmp_path / "out"
    layers, body = keras.layers, tiny()
    scores = layers.Dense(6, "softmax")(layers.Dense(9, "relu")(body.get_layer("avg_pool").output))
    ke.save_model(keras.Model(body.inputs, scores), path, labels=["ant", "bee", "cat", "dog", "eel", "fox"])
    explained = ["explain", photos / "cat.png", "--model", path, "--runtime", "keras", "--out", out]
    refused = invoked(*explained)
    assert refused.returncode == 2 and "keras-effnet explain --method grad-cam" in refused.stderr and not out.exists()
    done = invoked(*explained, "--method", "grad-cam", "--class", "dog", "--class", "0", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["photographs"]
    assert [each["name"] for each in row["predictions"]] == ["dog", "ant"] and os.path.exists(row["picture"])
    assert "Nearest: 'dog'" in invoked(*explained, "--method", "grad-cam", "--class", "dogs").stderr


@ON_TENSORFLOW
def test_the_command_spares_what_is_there(photos, tmp_path):
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("<html>mine")
    for folder in (photos, photos / "same", site):
        told = invoked("explain", photos / "cat.png", "--out", folder)
        assert told.returncode == 2 and f"Received: '{folder}', with other files" in told.stderr
    assert [path.name for path in site.iterdir()] == ["index.html"]
    told = invoked("explain", photos / "cat.png", "--out", tmp_path / "no" / "where")
    assert told.returncode == 2 and "which does not exist" in told.stderr
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before

"""Models compute the original's outputs and take the arguments of keras.applications.

Runs on any backend: tests/project/test_backends.py repeats it on the others.
"""

import base64
import io
import json
import marshal
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    GOLDEN,
    ROOT,
    arrays,
    fill,
    golden,
    image,
    leading,
    run,
    same_weights,
    save_checkpoint,
    save_torch,
    seeded,
    timm_tensors,
    trained,
)

import keras_effnet as ke
from keras_effnet import model_metadata
from keras_effnet.nets import inspection
from keras_effnet.nets.build import build
from keras_effnet.nets.normalization import SCHEMES
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS, of_timm
from keras_effnet.weights import registry

SMALL = (32, 32, 3)
ORIGINALS = {
    "efficientnet-b0": 2e-5,
    "efficientnet-lite0": 2e-5,
    "efficientnet-edgetpu-S": 2e-4,
    "efficientnet-condconv-b0-4e": 2e-5,
}


def original(file, folder, **kwargs):
    """Returns our model, loaded from a checkpoint of the original's variables, and the reference values."""
    reference = golden(f"tpu/{file}.json")
    model = ke.create_model(
        file.lower(),
        weights=None,
        preprocessing=None,
        classes=reference["num_classes"],
        classifier_activation=None,
        **kwargs,
    )
    tensors = {name: seeded(name, shape) for name, shape, _ in reference["variables"]}
    ke.weights.load(model, save_checkpoint(folder / "model.ckpt", tensors))
    return model, reference


def logits_error(ours, reference):
    """Returns the largest difference of the logits over their standard deviation."""
    expected = reference["golden"]
    first = np.abs(ours[:, :16] - expected["logits_first16"]).max()
    norm = np.abs(np.linalg.norm(ours, axis=1) - expected["logits_l2"]).max() / ours.shape[1] ** 0.5
    assert (np.argsort(-ours)[:, :5] == expected["logits_top5"]).all()
    return max(first, norm) / ours.std()


@pytest.mark.parametrize("file", ORIGINALS)
def test_original_outputs(file, tmp_path):
    model, reference = original(file, tmp_path)
    expected = reference["golden"]
    assert model.count_params() == reference["num_params_total"]
    layers = inspection.read(model).layers
    names = {
        "stem": "stem_activation",
        "features": list(layers)[list(layers).index("top_conv") - 1],
        "head_1x1": "top_activation",
    }
    endpoints = {key: layers[name].output for key, name in names.items()} | ke.features(model).output
    endpoints |= {"pooled": layers["avg_pool"].output, "logits": model.output}
    found = run(keras.Model(model.inputs, endpoints), image(224))
    assert logits_error(found.pop("logits"), reference) < ORIGINALS[file]
    pooled = found.pop("pooled")
    assert np.linalg.norm(pooled, axis=1) == pytest.approx(np.array(expected["pooled_l2"]), rel=2e-5)
    assert np.abs(pooled[:, :8] - expected["pooled_first8"]).max() < 2e-5 * pooled.std()
    assert found.keys() == expected["endpoints"].keys()
    for key, value in found.items():
        row = expected["endpoints"][key]
        assert list(value.shape) == row["shape"]
        assert np.linalg.norm(value) == pytest.approx(row["l2"], rel=2e-5)
        assert np.abs(value).max() == pytest.approx(row["max_abs"], rel=2e-5)


def test_original_outputs_tell_a_wrong_epsilon(tmp_path):
    model, reference = original("efficientnet-b0", tmp_path, bn_epsilon=1e-5)
    assert logits_error(run(model, image(224)), reference) > 100 * ORIGINALS["efficientnet-b0"]


def test_real_weights_name_real_photographs():
    reference = arrays(GOLDEN / "lite_real" / "lite0_logits.npz")
    names = sorted({key.rsplit("/", 1)[0] for key in reference})
    pixels = np.stack([reference[f"{name}/pixels_uint8"] for name in names])
    expected = np.stack([reference[f"{name}/logits"] for name in names])
    model = ke.EfficientNetLite0(classifier_activation=None)
    found = np.concatenate([run(model, batch) for batch in np.split(pixels, 4)])
    assert len(names) == 28
    assert np.abs(found - expected).max() < 2e-3
    assert (np.argsort(-found)[:, :5] == np.argsort(-expected)[:, :5]).all()


@pytest.mark.parametrize("name", ["efficientnet-lite1", "efficientnet-lite2"])
def test_other_packaged_weights_know_a_cat(name):
    model = ke.create_model(name)
    found = ke.decode_predictions(run(model, ke.load_image(ROOT / "docs/cat.png", model)[None]))[0]
    assert {wnid for wnid, _, _ in found} >= {"n02123045", "n02123159", "n02124075"}  # tabby, tiger cat, Egyptian cat


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="the same arithmetic is compared on every backend by the tests above"
)
@pytest.mark.parametrize("number", leading(range(8), 1))
def test_equals_keras_applications(number):
    theirs = getattr(keras.applications, f"EfficientNetB{number}")(
        weights=None, input_shape=(64, 64, 3), classifier_activation=None
    )
    ours = fill(
        ke.create_model(
            f"efficientnet-b{number}",
            weights=None,
            input_shape=(64, 64, 3),
            classifier_activation=None,
            preprocessing=(1 / 255, 0),
        )
    )
    for layer in ours.layers:
        if layer.weights:
            theirs.get_layer(layer.name).set_weights(layer.get_weights())
    weighted = [layer.name for layer in theirs.layers if layer.weights and not layer.name.startswith("normalization")]
    assert [layer.name for layer in ours.layers if layer.get_weights()] == [
        name for name in weighted if theirs.get_layer(name).get_weights()
    ]
    x = 255 * np.random.default_rng(0).random((2, 64, 64, 3), "float32")
    expected = run(theirs, x)
    assert np.abs(run(ours, x) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.usefixtures("shallow")
def test_odd_and_unknown_sizes_compute_the_same():
    fixed = fill(ke.EfficientNetB1(weights=None, include_top=False, input_shape=(75, 61, 3)))
    free = fill(ke.EfficientNetB1(weights=None, include_top=False))
    assert free.input_shape == (None, None, None, 3)
    x = image(75)[:, :, :61]
    assert run(fixed, x).shape == (2, 3, 2, 1280)
    assert np.abs(run(free, x) - run(fixed, x)).max() < 1e-4


def test_the_graph_does_not_depend_on_weights():
    def layers(**kwargs):
        config = json.loads(ke.EfficientNetLite0(**kwargs).to_json())["config"]["layers"]
        return [(layer["class_name"], layer["config"]["name"]) for layer in config]

    assert layers(weights=None) == layers(weights="imagenet") == layers(weights=None, preprocessing=None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("mini")
def test_preprocessing_is_the_schemes(scheme):
    model = ke.EfficientNetB0(weights=None, preprocessing=scheme, input_shape=SMALL)
    x = 255 * np.random.default_rng(0).random((1, *SMALL), "float32")
    mean, deviation = SCHEMES[scheme]
    found = run(keras.Model(model.inputs, model.get_layer("preprocessing").output), x)
    assert np.abs(found - (x - mean) / deviation).max() < 1e-5


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.usefixtures("shallow")
def test_other_channel_counts(channels):
    model = ke.EfficientNetB0(weights=None, input_shape=(32, 32, channels), classes=3)
    layer = model.get_layer("preprocessing")
    assert np.ravel(layer.scale).tolist() == pytest.approx(
        [np.mean([1 / n for n in SCHEMES["imagenet"][1]])] * channels
    )
    assert run(model, image(32)[..., :1].repeat(channels, -1)).shape == (2, 3)


@pytest.mark.usefixtures("shallow")
def test_arguments_of_keras_applications():
    x = image(32)
    assert run(ke.EfficientNetB0(False, None, None, SMALL, "avg"), x).shape == (2, 1280)
    assert run(ke.EfficientNetB0(False, None, None, SMALL, "max"), x).shape == (2, 1280)
    assert run(ke.EfficientNetB0(False, None, None, SMALL), x).shape == (2, 1, 1, 1280)
    model = ke.EfficientNetB0(True, None, None, SMALL, None, 7, None, "seven")
    assert model.name == "seven" and run(model, x).shape == (2, 7)
    probabilities = run(ke.EfficientNetB0(weights=None, input_shape=SMALL), x)
    assert probabilities.sum(1) == pytest.approx([1, 1], abs=1e-5)


NEW = "The classifier is new, filled with zeros, and must be trained"


def test_another_number_of_classes_gives_a_new_classifier_on_the_same_body():
    with pytest.warns(UserWarning, match=rf"^{NEW}: weights='imagenet' has none for 5 classes$") as caught:
        model = ke.EfficientNetLite0(classes=5)
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
    with pytest.warns(UserWarning, match=NEW) as caught:
        ke.create_model("lite0", classes=1, classifier_activation="sigmoid")
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
    body = ke.EfficientNetLite0(include_top=False, input_shape=(224, 224, 3))
    *values, kernel, bias = model.get_weights()
    assert kernel.shape == (1280, 5) and not kernel.any() and not bias.any()
    assert all(map(np.array_equal, values, body.get_weights()))
    maps = keras.Model(model.inputs, model.get_layer("top_activation").output)
    assert np.array_equal(run(maps, image(224)), run(body, image(224)))
    assert run(model, image(224)) == pytest.approx(0.2)
    assert model.weights_record is body.weights_record
    assert ke.EfficientNetLite0(classes=1000).get_weights()[-1].any()  # the published classifier, without a warning


@pytest.mark.usefixtures("mini")
def test_a_new_classifier_needs_only_the_file_without_one(tmp_path, monkeypatch):
    record = registry.find("efficientnet-b0", "imagenet")
    headless = next(file for file in record.files if not file.include_top)
    path = tmp_path / headless.url.removeprefix("https://storage.googleapis.com/")
    path.parent.mkdir()
    ke.weights.export(fill(ke.EfficientNetB0(weights=None, include_top=False)), path, target="keras")
    files = [replace(file, hash=registry.digest(path, "md5")) if file is headless else file for file in record.files]
    monkeypatch.setattr(registry, "RECORDS", (replace(record, files=tuple(files)),))
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(tmp_path))
    with pytest.warns(UserWarning, match=NEW):
        model = ke.EfficientNetB0(classes=5, input_shape=SMALL)
    body = ke.EfficientNetB0(include_top=False, input_shape=SMALL)
    maps = keras.Model(model.inputs, model.get_layer("top_activation").output)
    assert run(body, image(32)).std() > 0
    assert np.array_equal(run(maps, image(32)), run(body, image(32)))


@pytest.mark.usefixtures("mini")
def test_a_files_classifier_is_loaded_where_the_number_of_classes_is_the_same(tmp_path):
    small = {"input_shape": SMALL, "preprocessing": None}
    path, headless = tmp_path / "pets.keras", tmp_path / "headless.safetensors"
    model = fill(ke.EfficientNetB0(weights=None, classes=2, **small))
    model_metadata.save_model(model, path, labels=["cat", "dog"])
    same = ke.EfficientNetB0(weights=path, classes=2, **small)
    assert same_weights(same, model) and same.labels == ["cat", "dog"]
    with pytest.warns(UserWarning, match=rf"{NEW}: .*pets\.keras' has none for 3 classes"):
        other = ke.EfficientNetB0(weights=path, classes=3, **small)
    *values, kernel, bias = other.get_weights()
    assert kernel.shape == (1280, 3) and not kernel.any() and not bias.any() and other.labels is None
    assert all(map(np.array_equal, values, model.get_weights()))
    with pytest.raises(ValueError, match="expected shape"):  # 1000 is the default: perhaps `classes` was forgotten
        ke.EfficientNetB0(weights=path, **small)
    ke.weights.export(ke.EfficientNetB0(weights=path, include_top=False, **small), headless)
    with pytest.warns(UserWarning, match=NEW):
        ke.EfficientNetB0(weights=headless, classes=3, **small)


def test_rates_and_batch_norm_arguments_reach_the_layers():
    model = ke.EfficientNetB0(weights=None, dropout_rate=0.5, drop_connect_rate=0.4, bn_momentum=0.9, bn_epsilon=1e-5)
    drops = [layer.rate for layer in model.layers if layer.name.endswith("_drop")]
    assert max(drops) == pytest.approx(0.4 * 14 / 16) and model.get_layer("top_dropout").rate == 0.5
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {(layer.momentum, layer.epsilon) for layer in norms} == {(0.9, 1e-5)} and len(norms) == 49


@pytest.mark.usefixtures("shallow")
def test_drop_connect_drops_whole_examples():
    model = ke.EfficientNetB0(weights=None, drop_connect_rate=0.9, input_shape=SMALL)
    drop = inspection.read(model).layers["block2b_drop"]
    x = keras.ops.ones((64, *drop.input.shape[1:]))
    kept = keras.ops.convert_to_numpy(drop(x, training=True)).reshape(64, -1)
    assert {len(set(row)) for row in kept} == {1}
    assert set(np.round(kept[:, 0], 4)) == {0, np.round(1 / (1 - drop.rate), 4).astype("float32")}


@pytest.mark.usefixtures("mini")
def test_input_tensor_and_two_models_in_one_graph():
    inputs = keras.Input((32, 32, 3))
    left = ke.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_tensor=inputs)
    right = ke.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_tensor=inputs, name="right")
    assert left.get_layer("stem_conv") and right.get_layer("right_stem_conv")
    joined = keras.Model(inputs, keras.layers.Concatenate()([left.output, right.output]))
    assert run(joined, image(32)).shape == (2, 2560)
    third = ke.EfficientNetB0(weights=None, include_top=False, input_tensor=inputs, name="right")
    assert third.get_layer("right_1_stem_conv")
    fill(right)  # finds the layers despite the prefix
    assert np.abs(run(joined, image(32))[:, 1280:] - run(right, image(32))).max() < 1e-4
    nested = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.RandomFlip(), left])
    assert nested.output_shape == (None, 1280)


@pytest.mark.usefixtures("shallow")
def test_a_model_on_a_layer_of_another():
    inputs = keras.Input((64, 64, 1))
    x = keras.layers.Conv2D(3, 1)(inputs)
    model = ke.EfficientNetLite0(weights=None, include_top=False, input_tensor=x)
    assert model.input_shape == (None, 64, 64, 1) and model.output_shape == (None, 2, 2, 1280)


@pytest.mark.usefixtures("shallow")
def test_mixed_bfloat16_keeps_input_and_output_in_float32():
    shares = ke.EfficientNetV2RWTGC(weights=None, dtype="mixed_bfloat16").get_layer("block4a_se_share_softmax")
    assert shares.compute_dtype == "float32"
    model = fill(
        ke.EfficientNetB0(weights=None, dtype="mixed_bfloat16", input_shape=SMALL, classes=10, preprocessing=None)
    )
    plain = fill(ke.EfficientNetB0(weights=None, input_shape=SMALL, classes=10, preprocessing=None))
    assert model.get_layer("block1a_dwconv").compute_dtype == "bfloat16"
    assert model.get_layer("preprocessing").compute_dtype == model.get_layer("predictions").compute_dtype == "float32"
    found = run(model, image(32))
    assert found.dtype == np.float32
    assert np.abs(found - run(plain, image(32))).max() < 0.05


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has no such convolutions on a CPU")
@pytest.mark.usefixtures("mini")
def test_channels_first():
    first = fill(
        ke.EfficientNetB0(weights=None, data_format="channels_first", input_shape=(3, 64, 64), preprocessing="imagenet")
    )
    last = fill(ke.EfficientNetB0(weights=None, input_shape=(64, 64, 3), preprocessing="imagenet"))
    assert np.abs(run(first, image(64).transpose(0, 3, 1, 2)) - run(last, image(64))).max() < 1e-5
    assert ke.load_image(ROOT / "docs/cat.png", first).shape == (3, 64, 64)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has no such convolutions on a CPU")
@pytest.mark.usefixtures("shallow")
def test_channels_first_with_global_context():
    logits = {"weights": None, "preprocessing": "imagenet", "classifier_activation": None}
    first = ke.EfficientNetV2RWTGC(**logits, data_format="channels_first", input_shape=(3, 64, 64))
    last = trained(ke.EfficientNetV2RWTGC(**logits, input_shape=(64, 64, 3)))
    first.set_weights(last.get_weights())
    x = image(64) * 60
    expected = run(last, x)
    assert np.abs(run(first, x.transpose(0, 3, 1, 2)) - expected).max() < 1e-2 * np.ptp(expected, axis=0).max()


READ = [
    *("efficientnet-b0", "efficientnet-lite3", "efficientnet-edgetpu-l", "efficientnet-condconv-b0-8e-depth"),
    *("efficientnetv2-b0", "efficientnetv2-rw-s", "efficientnetv2-rw-t-gc", "efficientnet-x-b0"),
    *("efficientnet-x-b5-timm", "efficientnet-b0-composer"),
]


@pytest.mark.parametrize("name", READ)
@pytest.mark.usefixtures("shallow")
def test_reading_a_model_gives_what_it_was_built_from(name):
    reading = inspection.read(ke.create_model(name, weights=None))
    assert reading.architecture == resolve(VARIANTS[name])
    assert reading.size == (VARIANTS[name].resolution,) * 2


@pytest.mark.long
def test_the_deepest_net_is_built_saved_and_read_within_pythons_recursion(tmp_path):
    """V2-XL's longest path has more layers than Python allows nested calls, and Keras walks it by recursion."""
    net = resolve(VARIANTS["efficientnetv2-xl"])
    narrow = {"filters_in": 8, "filters_out": 8}
    blocks = tuple(
        replace(block, **narrow, expand_filters=8 * bool(block.expand_filters), residual=block.strides == 1)
        for block in net.blocks
    )
    thin = replace(net, stem_filters=8, head_filters=8, blocks=blocks)
    model = build(thin, keras.Input((32, 32, 3)), None, classes=2)
    assert model.layers[-1].output.shape == (None, 2) and len(model.layers) > 1200
    ke.save_model(model, tmp_path / "deep.keras")
    assert inspection.read(keras.saving.load_model(tmp_path / "deep.keras")).architecture.blocks == thin.blocks


@pytest.mark.parametrize("name", leading(["efficientnet_b0", "tf_efficientnetv2_b0"], 1))
def test_other_families_outputs(name, tmp_path):
    """V2 and symmetric padding against timm. tests/nets/test_family.py compares more nets, in float64."""
    variant, padding = of_timm(name)
    path = save_torch(timm_tensors(name), tmp_path / f"{name}.safetensors")
    model = ke.create_model(variant, weights=path, preprocessing=None, classifier_activation=None)
    expected = arrays(GOLDEN / f"timm/{name}.npz")["logits"]
    assert inspection.read(model).architecture.padding == padding
    assert np.abs(run(model, image(224)) - expected).max() < 2e-5 * expected.std()


@pytest.mark.usefixtures("shallow", "eager")
@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-condconv-b0-4e"])
def test_training_by_fit_learns_and_moves_every_variable(name):
    keras.utils.set_random_seed(0)
    rates = {"drop_connect_rate": 0.0, "dropout_rate": 0.0}
    model = ke.create_model(name, weights=None, input_shape=SMALL, classes=2, **rates)
    # Small steps: with batch norm over 16 values of a map of one position, the slope of the loss is in the thousands.
    model.compile(keras.optimizers.Adam(3e-7), "sparse_categorical_crossentropy")
    before = model.get_weights()
    y = np.arange(16) % 2
    x = 255 * np.random.default_rng(0).random((16, *SMALL), "float32") * (0.3 + 0.7 * y[:, None, None, None])
    losses = model.fit(x, y, epochs=3, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    still = [weight.path for weight, value in zip(model.weights, before, strict=True) if np.array_equal(weight, value)]
    assert not [path for path in still if "seed" not in path]


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="ordinary convolutions round by batch, in B0 on PyTorch by 1e-6 too; the layers' own tests run everywhere",
)
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("dtype", "bound"), leading([("float64", 1e-12), ("float32", 1e-6)], 1))
def test_mixed_experts_see_one_example_each(dtype, bound):
    """An example's logits do not depend on its position, on the other examples, or on the batch size."""
    model = ke.EfficientNetCondConvB0x8(weights=None, input_shape=(64, 64, 3), classifier_activation=None, dtype=dtype)
    x = 255 * np.random.default_rng(0).random((5, 64, 64, 3)).astype(dtype)
    y, order = run(fill(model), x), [3, 0, 4, 1, 2]
    bound *= np.abs(y).max()
    assert np.abs(run(model, x[order]) - y[order]).max() < bound
    others = 255 - x
    others[2] = x[2]
    assert np.abs(run(model, others)[2] - y[2]).max() < bound
    assert np.abs(model.predict(x, batch_size=2, verbose=0) - y).max() < bound


@pytest.mark.usefixtures("shallow")
def test_equal_seeds_give_equal_models():
    models = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        models.append(ke.EfficientNetLite0(weights=None))
    assert same_weights(*models[:2]) and not same_weights(*models[1:])


@pytest.mark.usefixtures("shallow")
def test_initial_values_have_the_originals_distribution():
    keras.utils.set_random_seed(0)
    model = ke.EfficientNetB0(weights=None)
    routed = ke.EfficientNetCondConvB0x4(weights=None)
    for net, name, variance in (
        (model, "top_conv", 2 / 1280),
        (model, "block6a_dwconv", 2 / 25),
        (model, "block4a_se_expand", 2 / 240),
        (routed, "block7a_project_conv", 2 / 320),
        (routed, "block7a_dwconv", 2 / 9),
        (routed, "block7a_routing", 2 / (192 + 4)),
    ):
        kernel = np.asarray(net.get_layer(name).get_weights()[0])
        for one in kernel if kernel.ndim == 5 else [kernel]:
            assert one.var() == pytest.approx(variance, rel=0.1) and abs(one.mean()) < 0.1 * variance**0.5
    kernel = model.get_layer("predictions").get_weights()[0]
    assert np.abs(kernel).max() == pytest.approx(1000**-0.5, rel=0.01)


WRONG = {
    "model": (lambda: ke.create_model("efficientnet-b9"), "Nearest: 'efficientnet-b"),
    "weights": (lambda: ke.EfficientNetB0(weights="noisystudent"), "Nearest: 'noisy-student'"),
    "no single-dataset weights": (lambda: ke.EfficientNetL2(), "noisy-student-475"),
    "file": (lambda: ke.EfficientNetB0(weights="nowhere/b0.weights.h5"), "does not exist"),
    "classes": (lambda: ke.EfficientNetB0(weights=None, classes=0), "positive integer"),
    "classes with pretrained body": (lambda: ke.EfficientNetLite0(classes="5"), "positive integer"),
    "activation with pretrained top": (lambda: ke.EfficientNetLite0(classifier_activation="relu"), "'softmax' or None"),
    "pooling": (lambda: ke.EfficientNetB0(False, None, pooling="mean"), "Expected one of: avg, max"),
    "shape": (lambda: ke.EfficientNetB0(weights=None, input_shape=(224, 224)), "height, width, channels"),
    "scalar shape": (lambda: ke.EfficientNetB0(weights=None, input_shape=64), "height, width, channels"),
    "channels": (lambda: ke.EfficientNetB0(weights=None, input_shape=(224, 224, None)), "three positive numbers"),
    "tensor": (lambda: ke.EfficientNetB0(weights=None, input_tensor=np.zeros((1, 32, 32, 3))), "Keras tensor"),
    "tensor and shape": (
        lambda: ke.EfficientNetB0(weights=None, input_tensor=keras.Input(SMALL), input_shape=(64, 64, 3)),
        "the shape of input_tensor",
    ),
    "preprocessing": (lambda: ke.EfficientNetB0(weights=None, preprocessing="imagnet"), "Nearest: 'imagenet'"),
    "preprocessing pair": (lambda: ke.EfficientNetB0(weights=None, preprocessing=(1, 2, 3)), "a pair (scale, offset)"),
    "conflicting preprocessing": (lambda: ke.EfficientNetLite0(preprocessing="imagenet"), "'tpu127'"),
    "rate": (lambda: ke.EfficientNetB0(weights=None, drop_connect_rate=1.0), "less than 1"),
    "data format": (lambda: ke.EfficientNetB0(weights=None, data_format="NHWC"), "channels_last"),
    "dtype": (lambda: ke.EfficientNetB0(weights=None, dtype="bfloat17"), "mixed_bfloat16"),
    "levels": (lambda: ke.features(ke.EfficientNetB0(False, None), levels=(6,)), "from 1 to 5"),
    "foreign model": (lambda: ke.features(keras.Sequential([keras.layers.Dense(1)])), "one EfficientNet"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("shallow")
def test_wrong_arguments_are_told_in_one_line(case):
    call, expected = WRONG[case]
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    message = str(caught.value)
    assert expected in message and "Received" in message and "\n" not in message


def test_every_returned_model_takes_an_array_without_a_warning(shallow, tmp_path):
    """Keras warns of the structure of the inputs where a model was built on a list. Warnings are errors here."""
    model = ke.EfficientNetB0(weights=None, classes=2, input_shape=(32, 32, 3))
    model.save(tmp_path / "b0.keras")
    plan = {
        block: (expand // 2, se, out) for block, (expand, se, out) in inspection.read(model).architecture.widths.items()
    }
    x = np.zeros((1, 32, 32, 3), "float32")
    for net in (
        model,
        ke.features(model),
        ke.fold_batch_norm(model),
        ke.EfficientNetB0(include_top=False, weights=None, input_tensor=keras.Input((32, 32, 3))),
        ke.create_model("efficientnet-b0", weights=None, input_shape=(32, 32, 3), blocks=plan),
        keras.saving.load_model(tmp_path / "b0.keras"),
    ):
        net(x)


def hostile(tmp_path):
    """Yields the paths of `.keras` files that would run something, or read another file, if they were trusted."""
    marker, other = tmp_path / "ran", tmp_path / "secret"
    other.write_bytes(np.ones(32, "float32").tobytes())
    plain = tmp_path / "plain.keras"
    keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="relu", name="mine")]).save(plain)
    with zipfile.ZipFile(plain) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def written(name: str, **changed) -> Path:
        with zipfile.ZipFile(tmp_path / f"{name}.keras", "w") as archive:
            for member, content in {**members, **changed}.items():
                archive.writestr(member, content)
        return tmp_path / f"{name}.keras"

    touch = {"args": ["touch", str(marker)]}
    code = base64.b64encode(marshal.dumps(compile(f"open({str(marker)!r}, 'w')", "x", "exec"))).decode()
    function = {"class_name": "__lambda__", "config": {"code": code, "defaults": None, "closure": None}}
    layers = {
        "lambda": {"module": "keras.layers", "class_name": "Lambda", "config": {"name": "mine", "function": function}},
        "process": {"module": "subprocess", "class_name": "Popen", "config": touch, "registered_name": None},
    }
    for name, config in {"system": ("os", "system"), "exec": ("builtins", "exec")}.items():
        module, called = config
        reference = {"module": module, "class_name": "function", "config": called, "registered_name": called}
        dense = {"name": "mine", "units": 4, "activation": reference}
        layers[name] = {"module": "keras.layers", "class_name": "Dense", "config": dense}
    for name, layer in layers.items():
        config = json.loads(members["config.json"])
        config["config"]["layers"][1] |= layer
        yield written(name, **{"config.json": json.dumps(config)})
    kernel = "layers/dense/vars/0"
    for name in ("external", "link"):
        content = io.BytesIO(members["model.weights.h5"])
        with h5py.File(content, "a") as file:
            del file[kernel]
            if name == "external":
                file.create_dataset(kernel, (8, 4), "f4", external=[(str(other), 0, 128)])
            else:
                file[kernel] = h5py.ExternalLink(str(other), "x")
        yield written(name, **{"model.weights.h5": content.getvalue()})


def test_a_hostile_model_is_refused(tmp_path):
    paths = list(hostile(tmp_path))
    assert ke.load_model(tmp_path / "plain.keras").count_params() == 36 and len(paths) == 6
    for path in paths:
        with pytest.raises(ValueError, match=f"Received: '{path}'"):
            ke.load_model(path)
    assert not (tmp_path / "ran").exists()

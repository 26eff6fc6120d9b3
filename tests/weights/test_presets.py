"""Presets of keras-hub become models that compute the same, or are refused by name.

The program's own files are recorded in golden/keras_hub. Where keras-hub is installed, the last test compares them with
the program, and `PYTHONPATH=tests python tests/weights/test_presets.py` records them anew.
"""

import json
import re
import zipfile
from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
from helpers import GOLDEN, golden, run, seeded

import keras_effnet as ke
from keras_effnet import models
from keras_effnet.nets.build import build
from keras_effnet.weights import convert, hub, padding, presets
from keras_effnet.weights.formats import keras_file

RECORD = "presets/classifier.json"
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
BACKBONE = {
    "stackwise_width_coefficients": [1.0, 0.5, 0.5],
    "stackwise_depth_coefficients": [1.0, 1.1, 1.0],
    "stackwise_kernel_sizes": [3, 5, 3],
    "stackwise_num_repeats": [1, 1, 1],
    "stackwise_input_filters": [8, 16, 24],
    "stackwise_output_filters": [8, 24, 32],
    "stackwise_expansion_ratios": [1, 6, 4],
    "stackwise_squeeze_and_excite_ratios": [0.25, 0.25, 0],
    "stackwise_strides": [1, 2, 2],
    "stackwise_block_types": ["v1", "v1", "v1"],
    "min_depth": None,
    "use_depth_divisor_as_min_depth": True,
    "cap_round_filter_decrease": True,
    "num_features": 40,
    "input_shape": (33, 33, 3),
}
LAST = "layers/conv2d_14/vars/0"  # the last convolution
VARIABLES = {"batch_normalization": ["gamma", "beta", "moving_mean", "moving_variance"]}


def value(name: str, shape) -> np.ndarray:
    """Returns the value of a tensor by its name in a file of keras-hub."""
    layer, number = re.fullmatch(r"layers/(\w+?)(?:_\d+)?/vars/(\d)", name).groups()
    return seeded(f"{name}/{VARIABLES.get(layer, ['kernel', 'bias'])[int(number)]}", tuple(shape))


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 33, 33, 3)).astype("float64")


def described(recorded=None) -> dict:
    """Returns the recorded documents, to be changed."""
    return json.loads(json.dumps((recorded or golden(RECORD))["documents"]))


def write(folder, documents: dict, weights: dict | None = None):
    """Writes a preset as keras-hub does: documents by file, and tensors with the recorded shapes."""
    folder.mkdir(exist_ok=True)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=4))
    for name, groups in (weights or golden(RECORD)["weights"]).items():
        with h5py.File(folder / name, "w") as file:
            for group, shape in groups:
                if shape is None:
                    file.create_group(group)
                else:
                    file[group] = value(group, shape)
    return folder


def archived() -> dict:
    """Returns the names in a preset's files and the shapes by the names in a `.keras` file."""
    weights = golden(RECORD)["weights"]
    body = {f"layers/efficient_net_backbone/{name}": (name, shape) for name, shape in weights["model.weights.h5"]}
    return {**body, **{name: (name, shape) for name, shape in weights["task.weights.h5"]}}


def write_archive(path, documents: dict):
    """Writes what `model.save()` of keras-hub does: one file of weights, and the description of the task."""
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for inner, (name, shape) in archived().items():
            if shape is not None:
                file[inner] = value(name, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".h5"), "model.weights.h5")
        archive.writestr("config.json", json.dumps(documents))
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
    return path


def in_float64(model):
    """Returns a copy that computes in float64."""
    copy = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    )
    copy.set_weights(model.get_weights())
    return copy


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("presets") / "pets", described())


@pytest.fixture(scope="module")
def converted(preset):
    """Returns what `convert` says of the preset, and the path of its file."""
    return convert.convert(preset, preset.with_suffix(".keras"), labels=list("abcd"))


def test_a_preset_becomes_a_model_that_computes_the_same(preset, converted, tmp_path):
    assert (converted.writer, converted.left) == ("keras-hub 0.32.0", ())
    model = ke.load_model(converted.path)
    expected = np.array(golden(RECORD)["logits"])
    # Keras rounds the numbers of a Rescaling to float32.
    assert np.abs(run(in_float64(model), pixels()) - expected).max() < 1e-6 * expected.std()
    assert model.input_shape == (None, 33, 33, 3) and model.labels == list("abcd")
    rules = ke.metadata(converted.path)["preprocessing"]
    np.testing.assert_allclose(rules["scale"], 1 / (255 * DEVIATION))
    assert (rules["crop_padding"], rules["interpolation"], rules["crop_mode"]) == (0, "half-pixel-bilinear", "center")
    archive = write_archive(tmp_path / "theirs.keras", described()["task.json"])
    ke.weights.convert_file(archive, tmp_path / "ours.keras")
    np.testing.assert_array_equal(run(ke.load_model(tmp_path / "ours.keras"), pixels()), run(model, pixels()))


def test_verify_says_what_a_preset_is(preset, tmp_path):
    found = ke.weights.identify(preset)
    assert (found.kind, found.classes, found.padding, found.input_size) == (
        "a preset of keras-hub 0.32.0",
        4,
        "symmetric",
        (33, 33),
    )
    assert found.head == ("GlobalAveragePooling2D", "Dropout(0.25)", "Dense(4)") and not found.left
    assert "x * 0.01712 - 2.118" in str(found) and found.command == f"keras-effnet convert {preset} pets.keras"
    assert ke.weights.identify(preset / "task.weights.h5") == found
    with pytest.raises(
        ValueError, match=r"a preset of keras-hub\. Convert it: keras-effnet convert .*pets model\.keras"
    ):
        ke.load_model(preset)
    archive = write_archive(tmp_path / "theirs.keras", described()["task.json"])
    other = ke.weights.identify(archive)
    assert other.command.endswith("theirs_new.keras")
    assert replace(other, path=found.path, kind=found.kind, command=found.command) == found


def test_presets_load_into_the_same_net_only(preset, converted, tmp_path):
    model = ke.load_model(converted.path)
    net = hub.describe(preset).net
    empty = build(net, keras.Input((33, 33, 3)), None, classes=4, name="empty")
    for path in (preset, preset / "model.weights.h5"):
        empty.set_weights([np.zeros_like(each) for each in empty.get_weights()])
        assert ke.weights.load(empty, path).fits
        assert all(np.array_equal(a, b) for a, b in zip(empty.get_weights(), model.get_weights(), strict=True))
    body = build(net, keras.Input((33, 33, 3)), None, include_top=False)
    assert ke.weights.load(body, preset).ignored["the classifier: the model has none"] == 2
    other = build(replace(net, activation="relu"), keras.Input((33, 33, 3)), None, include_top=False)
    before = other.get_weights()
    with pytest.raises(ValueError, match="the activation silu in place of relu"):
        ke.weights.load(other, preset)
    assert all(np.array_equal(a, b) for a, b in zip(before, other.get_weights(), strict=True))
    blocks = (*net.blocks[:-1], replace(net.blocks[-1], strides=1))
    for changed, message in (
        (replace(net, padding="same"), "weights are for padding='symmetric'"),
        (replace(net, blocks=blocks), "strides=2 in place of 1 in block 3a"),
    ):
        with pytest.raises(ValueError, match=message):
            padding.check_padding(preset, "keras3", changed, None)


def test_a_classifier_on_max_pooling_keeps_it(preset, converted, tmp_path):
    model = ke.load_model(converted.path)
    documents = described()
    documents["task.json"]["config"] |= {"pooling": "max", "activation": "sigmoid"}
    other = write(tmp_path / "max", documents)
    with pytest.raises(ValueError, match="on max pooling"):
        ke.weights.load(model, other)
    with pytest.raises(ValueError, match="on max pooling"):
        ke.weights.convert_file(other, tmp_path / "x.safetensors")
    ke.weights.convert_file(other, tmp_path / "x.safetensors", head="linear:4")
    ke.weights.convert_file(other, tmp_path / "max.keras")
    pooled = ke.load_model(tmp_path / "max.keras")
    features = keras.Model(model.inputs, model.get_layer("top_activation").output)
    kernel, bias = model.get_layer("predictions").get_weights()
    expected = 1 / (1 + np.exp(-(run(features, pixels()).max(axis=(1, 2)) @ kernel + bias)))
    np.testing.assert_allclose(run(pooled, pixels()), expected, rtol=1e-4)


def test_without_an_image_converter_pixels_are_left_as_they_are(tmp_path):
    (left,) = ke.weights.identify(write(tmp_path / "x", without_pixels())).left
    found = convert.convert(tmp_path / "x", tmp_path / "x.keras")
    assert found.left == (left,) and "the normalization of pixels" in left
    rules = ke.metadata(tmp_path / "x.keras")["preprocessing"]
    assert rules == {"scale": [1] * 3, "offset": [0] * 3, "inside": True}
    documents = without_pixels()
    documents["image_converter.json"] = described()["image_converter.json"]
    documents["image_converter.json"]["config"] |= {"crop_to_aspect_ratio": False, "pad_to_aspect_ratio": True}
    (left,) = ke.weights.identify(write(tmp_path / "x", documents)).left
    assert "how its image converter resizes (pad_to_aspect_ratio)" in left


def test_a_classifier_takes_the_pixels_of_its_own_description(tmp_path):
    """As `load_task()` of keras_hub/src/utils/preset_utils.py does, and `load_preprocessor()` without one."""
    places = {"task.json": ("preprocessor", "image_converter"), "preprocessor.json": ("image_converter",)}
    for name, inside in {**places, "image_converter.json": ()}.items():
        documents = described()
        for other in places.keys() - {name}:
            config = documents[other]["config"]
            config[places[other][0]] = None
        if name != "image_converter.json":
            del documents["image_converter.json"]
        (tmp_path / "x").mkdir(exist_ok=True)
        for old in (tmp_path / "x").iterdir():
            old.unlink()
        changed = documents[name]
        for field in inside:
            changed = changed["config"][field]
        changed["config"]["scale"] = 0.5
        assert hub.describe(write(tmp_path / "x", documents)).preprocessing[0] == [0.5] * 3
    documents["task.json"] = described()["task.json"]
    with pytest.raises(ValueError, match=r"task\.json and image_converter\.json have image converters that differ"):
        hub.describe(write(tmp_path / "x", documents))


def test_a_head_without_its_description_is_told(tmp_path, monkeypatch):
    documents = described()
    del documents["task.json"]
    monkeypatch.chdir(write(tmp_path / "pets", documents))
    found = ke.weights.identify(".")
    assert found.left[0] == "task.weights.h5 without task.json, the model around the net"
    assert found.command == "keras-effnet convert . pets.keras"


def without_pixels() -> dict:
    documents = described()
    del documents["image_converter.json"], documents["preprocessor.json"]
    documents["task.json"]["config"]["preprocessor"] = None
    return documents


def test_without_pixels_a_new_model_adds_none(tmp_path, monkeypatch):
    described = replace(hub.describe(write(tmp_path / "x", without_pixels())), variant="efficientnet-b0")
    monkeypatch.setattr(hub, "describe", lambda path: described)

    def build(net, inputs, preprocessing, **_):
        raise LookupError(preprocessing)

    monkeypatch.setattr(models, "build", build)
    with pytest.warns(UserWarning, match="lacks the normalization of pixels"), pytest.raises(LookupError, match="None"):
        ke.EfficientNetB0(weights=tmp_path / "x", include_top=False)


REFUSED = {
    "data_format": ("channels_first", "channels_last was expected"),
    "new_field": ("a\x1b[31m\nb", "this package does not know this field"),
    "width_coefficient": (1.0, "it has width_coefficient too"),
    "cap_round_filter_decrease": (1, "False or True was expected"),
    "stackwise_block_types": (["v1", "v1", "fused"], "fused, and such blocks pad"),
    "include_stem_padding": (False, "True was expected"),
    "stem_conv_padding": ("same", "valid was expected"),
    "activation": ({"class_name": "Lambda"}, "one of elu"),
    "projection_activation": ("relu", "silu was expected"),
    "stackwise_kernel_sizes": ([3, 4, 3], "an odd number"),
    "stackwise_strides": ([1, 3, 1], "a whole number from 1 to 2"),
    "stackwise_input_filters": ([8, 16, [2]], "a whole number"),
    "stackwise_num_repeats": ([1, 1e9, 1], "a whole number"),
    "stackwise_depth_coefficients": ([100, 100, 1e400], "a number from"),
    "stackwise_expansion_ratios": ([1, 6, 1.5], "a whole number"),
    "stackwise_output_filters": ([8, 24], "a list of 3"),
    "stackwise_force_input_filters": ([24, 0, 0], "8 channels arrive there"),
    "min_depth": ("x", "a whole number"),
    "batch_norm_epsilon": (0, "a number from 1e-09"),
    "input_shape": ([33, 33], "height, width and channels"),
    "dropout": (True, "a number from 0"),
}


def test_other_nets_of_keras_hub_are_refused_by_the_field(tmp_path):
    """Its fused blocks pad otherwise than its depthwise ones, which neither of our paddings does."""
    folder = write(tmp_path / "x", described())
    for field, (wrong, why) in REFUSED.items():
        documents = described()
        documents["config.json"]["config"][field] = wrong
        if field == "min_depth":
            documents["config.json"]["config"]["use_depth_divisor_as_min_depth"] = False
        (folder / "config.json").write_text(json.dumps(documents["config.json"]))
        (folder / "task.json").unlink(missing_ok=True)
        blamed = {
            "stackwise_force_input_filters": "stackwise_input_filters",
            "width_coefficient": "stackwise_width_coefficients",
        }.get(field, field)
        with pytest.raises(presets.ForeignPresetError, match=rf"its {blamed} is .*{re.escape(why)}") as caught:
            hub.local(folder)
        assert str(caught.value).isprintable()
        assert why in ke.weights.identify(folder).problem
    (folder / "config.json").write_text(json.dumps(described()["config.json"] | {"class_name": "ResNetBackbone"}))
    found = ke.weights.identify(folder)
    assert found.kind == "a preset of keras-hub 0.32.0" and found.problem == "ResNetBackbone: not an EfficientNet"
    net = described()["config.json"]
    wrapped = {"class_name": "TimeDistributed", "config": {"layer": net}}
    for name, config in (
        ("Sequential", {"layers": [{"module": "keras_hub.layers", "class_name": "RandAugment", "config": {}}, net]}),
        ("Functional", {"layers": [wrapped]}),
        ("PetsClassifier", {"backbone": net}),
    ):
        archive = write_archive(tmp_path / "nested.keras", {"class_name": name, "module": "pets", "config": config})
        with pytest.raises(ValueError, match=rf"is in a {name}.*get_layer\('efficient_net_backbone'\)\.save_to_preset"):
            hub.local(archive)
    layer = {"module": "keras_hub.layers", "class_name": "ImageConverter", "config": {}}
    ours = {"class_name": "Functional", "module": "keras", "config": {"layers": [layer]}}
    assert hub.describe(write_archive(tmp_path / "ours.keras", ours)) is None


def test_other_folders_with_a_config_are_no_presets(tmp_path):
    """An unzipped `.keras` file, and timm's folder."""
    write(tmp_path, {"config.json": {"module": "keras", "class_name": "Functional", "config": {}}})
    assert hub.local(tmp_path / "model.weights.h5") == tmp_path / "model.weights.h5"
    assert hub.describe(tmp_path / "model.weights.h5") is None
    write(tmp_path, {"config.json": {"architecture": "efficientnet_b0"}})
    assert hub.describe(hub.local(tmp_path)).architecture == "efficientnet_b0"
    (tmp_path / "model.safetensors").touch()
    assert hub.local(tmp_path) == tmp_path / "model.safetensors"


def test_a_new_head_on_a_net_that_is_no_variant(preset, tmp_path):
    ke.weights.convert_file(preset, tmp_path / "x.keras", head="linear:7")
    with keras_file.described(tmp_path / "x.keras") as model:
        layers = {layer["name"]: layer["config"] for layer in model["config"]["layers"]}
    assert layers["predictions"]["units"] == 7
    assert next(iter(layers.values()))["batch_shape"] == [None, 33, 33, 3]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation", "relu", "the activation silu"),
        ("projection_activation", "swish", "no activation after a projection"),
        ("batch_norm_epsilon", 1e-4, "bn_epsilon"),
    ],
)
def test_weights_alone_do_not_lose_what_the_preset_says(field, value, message, tmp_path, monkeypatch):
    documents = described()
    for document in (documents["config.json"], documents["task.json"]["config"]["backbone"]):
        document["config"][field] = value
    if field == "activation":  # a variant, whose activation is known
        monkeypatch.setattr(convert, "nearest", lambda net: "efficientnet-b0")
    with pytest.raises(ValueError, match=rf"{message}.*Convert it to a \.keras file"):
        ke.weights.convert_file(write(tmp_path / "x", documents), tmp_path / "x.weights.h5")


def test_damaged_presets_are_refused(tmp_path):
    body = golden(RECORD)["weights"]["model.weights.h5"]
    task = golden(RECORD)["weights"]["task.weights.h5"]
    for name, error in (("model.weights.h5", OSError), ("task.weights.h5", OSError)):
        folder = write(tmp_path / name, described())
        (folder / name).unlink()
        with pytest.raises(error, match=name):
            ke.weights.convert_file(folder, tmp_path / "x.keras")
    named = '{"module": "keras_hub", "class_name": "EfficientNetImageClassifier"%s}'
    wrong = ("{", "[]", '{"config": 1}', named % "", named % ', "config": {"preprocessor": 5, "image_converter": 5}')
    folder = write(tmp_path / "x", described())
    for name, document in described().items():
        rows = {"metadata.json": wrong[:2], "image_converter.json": wrong[:4], "config.json": wrong[:2] + wrong[3:]}
        for text in rows.get(name, wrong):
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match=r"a preset of keras-hub.*pets|config\.json|descriptions of a preset"):
                hub.local(folder)
        (folder / name).write_text(json.dumps(document))
    for config in ('{"backbone": 5}', '{"backbone": "x"}', '{"backbone": [1]}', '{"backbone": null}', "5", "[]"):
        archive = write_archive(tmp_path / "theirs.keras", json.loads(named % f', "config": {config}'))
        with pytest.raises(ValueError, match=r"Expected a \.keras file.*config\.json: expected an object"):
            hub.local(archive)
    empty = [[name, [1, 1, 16, 0] if name == LAST else shape] for name, shape in body]
    for channels, groups, message in (
        (4, body, r"conv2d/0 of 3 x 3 x 4 x 8.*Received: 3 x 3 x 3 x 8"),
        (3, empty, r"of 1 to 65536 channels\. Received: 0"),
    ):
        documents = without_pixels()
        for net in (documents["config.json"], documents["task.json"]["config"]["backbone"]):
            net["config"]["input_shape"] = [33, 33, channels]
        with pytest.raises(ValueError, match=message):
            hub.local(write(tmp_path / "odd", documents, {"model.weights.h5": groups, "task.weights.h5": task}))
    documents = described()
    documents["task.json"]["config"]["num_classes"] = 5
    with pytest.raises(ValueError, match=r"num_classes=5, and its weights have a bias of \(4,\)"):
        hub.local(write(tmp_path / "five", documents))
    documents["task.json"]["config"]["backbone"]["config"]["activation"] = "relu"
    with pytest.raises(ValueError, match=r"task\.json describes another net"):
        hub.local(write(tmp_path / "other", documents))
    wrong = {"model.weights.h5": [[name, shape] for name, shape in body if "depthwise_conv2d_1/vars/0" not in name]}
    folder = write(tmp_path / "lacking", described(), wrong | {"task.weights.h5": task})
    with pytest.raises(ValueError, match=r"- depthwise_conv2d_1/0 \(for block2a_dwconv/kernel\)"):
        ke.weights.identify(folder)
    folder = write(tmp_path / "nan", described())
    with h5py.File(folder / "model.weights.h5", "a") as file:
        file["layers/conv2d/vars/0"][0] = np.nan
    with pytest.raises(ValueError, match="expected finite numbers"):
        ke.weights.convert_file(folder, tmp_path / "x.keras")
    assert not (tmp_path / "x.keras").exists()


def test_weights_alone_say_their_padding(tmp_path):
    """keras-hub pads before each depthwise convolution, and lists those layers in a file of weights too."""
    write(tmp_path / "x", {})
    assert padding.stated_padding(tmp_path / "x" / "model.weights.h5") == "symmetric"


# The real program


def theirs(keras_hub):
    """Returns a small classifier of keras-hub, and what calls it, in float64."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        net = keras_hub.models.EfficientNetBackbone(**BACKBONE)
        converter = keras_hub.layers.EfficientNetImageConverter(
            image_size=(33, 33), scale=(1 / (255 * DEVIATION)).tolist(), offset=(-MEAN / DEVIATION).tolist()
        )
        preprocessor = keras_hub.models.EfficientNetImageClassifierPreprocessor(converter)
        model = keras_hub.models.EfficientNetImageClassifier(net, 4, preprocessor, dropout=0.25)
        return model, keras.Model(model.inputs, model.outputs)
    finally:
        keras.config.set_dtype_policy(before)


def recorded(keras_hub, folder) -> dict:
    """Returns what keras-hub writes, and computes with the values of `value()`."""
    model, call = theirs(keras_hub)
    model.save_to_preset(folder)
    weights = {}
    for path in sorted(folder.glob("*.h5")):
        groups = []
        with h5py.File(path) as file:
            file.visititems(lambda name, item, found=groups: found.append([name, list(getattr(item, "shape", [-1]))]))
        pads = re.compile(r"layers/zero_padding2d(_\d+)?")
        groups = [[name, None if shape == [-1] else shape] for name, shape in groups]
        weights[path.name] = [
            [name, shape] for name, shape in groups if pads.fullmatch(name) or (shape and "optimizer" not in name)
        ]
    write(folder, {}, weights)
    model.backbone.load_weights(folder / "model.weights.h5")
    for number, variable in enumerate(model.output_dense.weights):
        variable.assign(value(f"layers/dense/vars/{number}", variable.shape))
    ready = (pixels() * np.array(model.preprocessor.image_converter.scale)) + -MEAN / DEVIATION
    logits = np.asarray(call(keras.ops.convert_to_tensor(ready)))
    documents = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    program = f"keras-hub {keras_hub.__version__} with Keras {keras.__version__}, in float64"
    return {"program": program, "documents": documents, "weights": weights, "logits": logits.tolist()}


def test_the_recording_is_what_keras_hub_writes(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    found, before = recorded(keras_hub, tmp_path), golden(RECORD)
    theirs(keras_hub)[0].save(tmp_path / "m.keras")
    with keras_file.opened_keras(tmp_path / "m.keras") as real:
        saved = {name: stored.shape for name, stored in real.items() if not name.startswith("optimizer/")}
    with keras_file.opened_keras(write_archive(tmp_path / "x.keras", {})) as ours:
        assert saved == {name: stored.shape for name, stored in ours.items()}
    np.testing.assert_allclose(found.pop("logits"), before.pop("logits"), rtol=1e-9)
    for one in (found, before):
        one["documents"].pop("metadata.json")
        one.pop("program")
    assert found == before


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    import keras_hub

    with tempfile.TemporaryDirectory() as temporary:
        text = json.dumps(recorded(keras_hub, Path(temporary)))
    (GOLDEN / RECORD).parent.mkdir(exist_ok=True)
    (GOLDEN / RECORD).write_text(text)

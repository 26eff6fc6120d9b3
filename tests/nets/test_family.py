"""V2, X, H and timm's own nets compute what the programs of their authors compute, with both paddings."""

import re
import shutil
import warnings
from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    GOLDEN,
    arrays,
    fill,
    golden,
    image,
    leading,
    lite0_package,
    run,
    same_weights,
    save_checkpoint,
    save_torch,
    seeded,
    shallow_nets,
    shallow_rows,
    timm_tensors,
    trained,
)

import keras_effnet as ke
from keras_effnet import model_loader
from keras_effnet.model_metadata import Expects
from keras_effnet.nets import inspection
from keras_effnet.nets.variants import find_model, of_timm, timm_name
from keras_effnet.tpu import config, model_from_recipe, recipes
from keras_effnet.weights import convert, registry, store

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="test_backends.py repeats some on the others")

LONG = pytest.mark.long
RAW = {"preprocessing": None, "classifier_activation": None}  # logits of the input as it is
NETS = [
    "tf_efficientnetv2_b0",
    "gc_efficientnetv2_rw_t",
    "efficientnet_b0",
    pytest.param("efficientnetv2_rw_t", marks=LONG),
    pytest.param("efficientnet_b2", marks=LONG),
    pytest.param("efficientnet_x_b5", marks=LONG),
    pytest.param("tf_efficientnetv2_s", marks=LONG),
]


def logits_by_batch(model, x):
    """Returns the logits that batch normalization by the statistics of the batch gives, without dropout."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(x), training=True))


@pytest.mark.parametrize("name", NETS)
def test_timms_nets_give_timms_numbers(name, tmp_path):
    """In float64: the evaluation logits of V2's seeded weights reach 1e4, and float32 loses all of their digits."""
    variant, padding = of_timm(name)
    reference, values = golden(f"timm/{name}.json"), arrays(GOLDEN / f"timm/{name}.npz")
    size = reference["golden"]["resolution"]
    # The file's name says which padding its weights are for.
    path = save_torch(timm_tensors(name), tmp_path / f"{name}.safetensors")
    model = ke.create_model(variant, weights=path, **RAW, dtype="float64", input_shape=(size, size, 3))
    found = inspection.read(model).architecture
    assert (found.padding, found.bn_epsilon) == (padding, reference["bn_eps"])
    x = image(size).astype("float64")
    for ours, key in ((run(model, x), "logits_f64"), (logits_by_batch(model, x), "logits_train_bn_f64")):
        assert np.abs(ours - values[key]).max() < 1e-6 * values[key].std()


@pytest.mark.parametrize("size", ["b0", pytest.param("s", marks=LONG)])
def test_v2_gives_the_originals_numbers(size, tmp_path):
    """The reference of S was the second net of its process: its variables are stem_1/..., head_1/..., head/dense_1."""
    name = f"efficientnetv2-{size}"
    reference = golden(f"tpu/{name}.json")
    expected, side = reference["golden"], reference["golden"]["resolution"]
    tensors = {name: seeded(name, shape) for name, shape in reference["variables"]}
    assert any("stem_1/" in name for name in tensors) == (size == "s")
    # In float64: the difference is the reference's own error in float32.
    model = ke.create_model(name, weights=None, **RAW, dtype="float64", input_shape=(side, side, 3))
    x = image(side).astype("float64")
    report = ke.weights.load(model, save_checkpoint(tmp_path / "model.ckpt", tensors))
    assert len(report.loaded) == len(tensors) and ke.describe(model)["params"] == reference["params"]
    ends = run(ke.features(model), x)
    for level, row in expected["endpoints"].items():
        assert list(ends[level].shape) == row["shape"]
        # The reference's error grows with the depth: to more than the deviation at the end of S.
        if size == "b0" or level < "reduction_4":
            assert np.linalg.norm(ends[level]) == pytest.approx(row["l2"], rel=2e-5)
    if size == "b0":
        found = run(model, x)[:, :16] - expected["logits_first16"]
        assert np.abs(found).max() < 2e-5 * expected["logits_std"]
    by_batch = logits_by_batch(model, x)[:, :16] - expected["train_bn_logits_first16"]
    assert np.abs(by_batch).max() < 2e-5 * expected["train_bn_logits_std"]


@pytest.mark.parametrize("name", ["B0", pytest.param("B3", marks=LONG), pytest.param("S", marks=LONG)])
def test_v2_equals_keras_applications(name, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        arguments = {"weights": None, "classifier_activation": None, "input_shape": (64, 64, 3)}
        theirs = getattr(keras.applications, f"EfficientNetV2{name}")(**arguments)
        ours = getattr(ke, f"EfficientNetV2{name}")(**arguments)
    finally:
        keras.config.set_dtype_policy(before)
    for layer in theirs.layers:
        if layer.weights:
            ours.get_layer(layer.name).set_weights(layer.get_weights())
    x = np.random.default_rng(0).uniform(0, 255, (2, *theirs.input_shape[1:]))
    expected = run(theirs, x)
    assert np.abs(run(ours, x) - expected).max() < 1e-5 * (expected[0] - expected[1]).std()
    # Files both ways.
    theirs.load_weights(ke.weights.export(fill(ours), tmp_path / "ours.h5"))
    assert all(map(np.array_equal, theirs.get_weights(), ours.get_weights()))
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    values = ours.get_weights()
    ours.set_weights([1 + value for value in values])
    ke.weights.load(ours, tmp_path / "theirs.weights.h5")
    assert all(map(np.array_equal, ours.get_weights(), values))


@pytest.mark.parametrize("size", [225, 260, 301])
@pytest.mark.usefixtures("mini")
def test_both_paddings_differ_at_every_size(size):
    """Against convolutions that pad by hand: PyTorch's rule, (strides - 1 + kernel - 1) // 2 on both sides."""
    from keras import layers, ops

    model = ke.EfficientNetB0(weights=None, include_top=False, padding="symmetric", input_shape=(size, size, 3))
    for kernel in (3, 5):
        name = {3: "block2a_dwconv", 5: "block3a_dwconv"}[kernel]
        layer = model.get_layer(name)
        assert isinstance(layer, layers.DepthwiseConv2D) and layer.kernel_size == (kernel, kernel)
        x = np.random.default_rng(0).normal(size=(1, size, size, layer.kernel.shape[2])).astype("float32")
        pad = (2 - 1 + kernel - 1) // 2
        rows = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
        right = ops.depthwise_conv(np.pad(x, rows), layer.kernel, 2, "valid")
        before = model.get_layer(f"{name}_pad")
        assert np.array_equal(ops.convert_to_numpy(layer(before(x))), ops.convert_to_numpy(right))
        assert right.shape[1:3] == (-(-size // 2), -(-size // 2))


def test_the_other_padding_is_far_from_the_bound(tmp_path):
    path = save_torch(timm_tensors("efficientnet_b0"), tmp_path / "mine.safetensors")
    size = golden("timm/efficientnet_b0.json")["golden"]["resolution"]
    reference = arrays(GOLDEN / "timm/efficientnet_b0.npz")["logits_train_bn_f64"]
    model = ke.EfficientNetB0(weights=path, **RAW, padding="same", bn_epsilon=1e-5, input_shape=(size, size, 3))
    assert np.abs(logits_by_batch(model, image(size)) - reference).max() > 100 * 2e-5 * reference.std()


def unsaid(folder):
    """Returns a file of timm's kind that does not say its padding, as timm's own do not."""
    from safetensors.numpy import load_file

    model = ke.EfficientNetB0(weights=None, padding="symmetric")
    return save_torch(load_file(ke.weights.export(model, folder / "ours.safetensors")), folder / "pets.safetensors")


def test_a_file_that_does_not_say_its_padding_is_told(mini, tmp_path):
    path = unsaid(tmp_path)
    for do in (
        lambda: ke.EfficientNetB0(weights=path),
        lambda: ke.weights.convert_file(path, tmp_path / "x.keras"),
        lambda: ke.weights.load(ke.EfficientNetB0(weights=None), path),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            do()
        (message,) = [str(each.message) for each in told if each.category is UserWarning]
        assert re.search(r"fit two nets of timm.*tf_efficientnet_b0.*efficientnet_b0.*padding=", message)
    assert "same or symmetric: the file does not say it" in str(ke.weights.identify(path))
    model = ke.EfficientNetB0(weights=None, padding="symmetric")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ke.EfficientNetB0(weights=path, padding="same")
        ke.weights.load(model, path)
        ke.weights.load(ke.EfficientNetB0(weights=None), path, padding="same")
        ke.weights.convert_file(path, tmp_path / "y.keras", padding="symmetric")
        assert ke.describe(tmp_path / "y.keras")["padding"] == "symmetric"
    with pytest.raises(ValueError, match="Expected padding='symmetric', as the model has it"):
        ke.weights.load(model, path, padding="same")


@pytest.mark.parametrize("padding", leading(["symmetric", "same"], 1))
@pytest.mark.parametrize("kind", ["safetensors", "hub", "keras", "weights.h5"])
def test_what_we_save_says_its_padding(kind, padding, mini, tmp_path):
    model = ke.EfficientNetB0(weights=None, padding=padding, input_shape=(32, 32, 3), classes=3)
    fill(model)
    path = tmp_path / f"pets.{kind}"
    if kind == "keras":
        ke.save_model(model, path)
    elif kind == "weights.h5":
        model.save_weights(path)
    else:
        ke.weights.export(model, path, target="hub" if kind == "hub" else "timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = ke.EfficientNetB0(weights=path, input_shape=(32, 32, 3), classes=3)
    assert inspection.read(again).architecture == inspection.read(model).architecture
    assert same_weights(again, model)
    other = "same" if padding == "symmetric" else "symmetric"
    with pytest.raises(ValueError, match=f"padding='{padding}'"):
        ke.EfficientNetB0(weights=path, input_shape=(32, 32, 3), classes=3, padding=other)
    with pytest.raises(ValueError, match=f"padding='{padding}'"):
        ke.weights.load(ke.EfficientNetB0(weights=None, classes=3, padding=other), path)
    assert ke.weights.identify(path).padding == padding
    assert ke.weights.convert_file(path, tmp_path / "new.keras") == "efficientnet-b0"
    assert ke.describe(tmp_path / "new.keras")["padding"] == padding


def test_programs_without_symmetric_padding_get_no_such_file(mini, tmp_path):
    model = ke.EfficientNetB0(weights=None, padding="symmetric", classes=2)
    for target, file in (("tpu", "x.ckpt"), ("keras", "x.h5")):
        with pytest.raises(ValueError, match="Expected padding='same'"):
            ke.weights.export(model, tmp_path / file, target=target)
    with pytest.raises(ValueError, match="efficientnet-x-b0"):
        ke.weights.export(ke.EfficientNetXB0(weights=None, classes=2), tmp_path / "x", target="hub")
    assert not list(tmp_path.iterdir())


def test_names_of_timm_and_ours_are_inverse():
    for name in golden("timm/v2_native_cfgs.json"):
        bare = name.split(".")[0]
        if bare.endswith("_pruned"):
            continue
        assert timm_name(*of_timm(bare)) == bare
    assert of_timm("tf_efficientnet_b3") == ("efficientnet-b3", "same")
    assert of_timm("efficientnet_b1_pruned") == ("efficientnet-b1-pruned", "same")
    assert timm_name("efficientnet-x-b5", "same") is None and timm_name("efficientnetv2-b0", "symmetric") is None
    assert timm_name("efficientnetv2-rw-t-gc", "same") is None
    assert find_model("GC-EfficientNetV2-RW-T") == "efficientnetv2-rw-t-gc"


def test_a_set_of_timm_builds_its_net(shallow, tmp_path, monkeypatch):
    """Padding, epsilon, size and pixels are those of the set, whatever the row has."""
    monkeypatch.setattr(convert, "load", lambda *arguments, **named: None)
    monkeypatch.setattr("keras_effnet.weights.store.fetch", lambda *arguments: tmp_path)
    model = ke.EfficientNetB0(weights="efficientnet_b0.ra4_e3600_r224_in1k")
    found = ke.describe(model)
    assert (found["padding"], found["bn_epsilon"], found["preprocessing"]) == ("symmetric", 1e-5, "inception")
    assert found["resolution"] == [256, 256] and model.weights_record.crop_padding == 0
    assert ke.describe(ke.EfficientNetB0(weights="best"))["padding"] == "symmetric"
    with pytest.raises(ValueError, match="Expected padding='symmetric', which these weights"):
        ke.EfficientNetB0(weights="best", padding="same")
    large = ke.EfficientNetV2S(weights="21k", classes=21843, classifier_activation="sigmoid")
    assert large.output_shape == (None, 21843) and large.input_shape[1] == 224
    with pytest.warns(UserWarning, match="none for 1000 classes"):
        ke.EfficientNetV2S(weights="21k")


def test_a_keras_file_keeps_its_arithmetic(mini, tmp_path):
    """Epsilon and activations have no tensors: conversions, `weights=` and training read them from the layers."""
    size = {"input_shape": (32, 32, 3), "classes": 3}
    nvidia = fill(ke.EfficientNetB0(weights=None, padding="symmetric", bn_epsilon=1e-3, **size))
    composer = fill(ke.EfficientNetB0Composer(weights=None, **size))
    for name, model in {"nvidia": nvidia, "composer": composer}.items():
        ke.save_model(model, tmp_path / f"{name}.keras")
        variant = ke.weights.convert_file(tmp_path / f"{name}.keras", tmp_path / f"{name}2.keras")
        again = ke.load_model(tmp_path / f"{name}2.keras")
        assert ke.weights.identify(tmp_path / f"{name}.keras").model == variant
        first, second = (inspection.read(each).architecture for each in (model, again))
        assert replace(first, name="") == replace(second, name="", bn_momentum=first.bn_momentum)
        with pytest.raises(ValueError, match=r"bn_epsilon|Composer"):
            ke.weights.convert_file(tmp_path / f"{name}.keras", tmp_path / "x.safetensors")
    made = ke.EfficientNetB0(weights=tmp_path / "nvidia.keras", **size)
    assert inspection.read(made).architecture == inspection.read(nvidia).architecture
    recipe = config.Recipe(config.Model(weights=str(tmp_path / "nvidia.keras")))
    assert model_from_recipe.whole(recipe).model.bn_epsilon == 1e-3
    with pytest.raises(ValueError, match="activations after other projections"):
        ke.EfficientNetB0(weights=tmp_path / "composer.keras", **size)
    ke.save_model(fill(ke.EfficientNetB0(weights=None, padding="symmetric", **size)), tmp_path / "plain.keras")
    with pytest.raises(ValueError, match="activations after other projections"):
        ke.EfficientNetB0Composer(weights=tmp_path / "plain.keras", **size)
    with pytest.warns(UserWarning, match="for bn_epsilon=0.001, and the model has 1e-05"):
        ke.weights.load(ke.EfficientNetB0(weights=None, padding="symmetric", **size), tmp_path / "nvidia.keras")


def test_only_timms_files_are_read_by_their_names(tmp_path):
    from keras.src.applications import efficientnet  # the public module has no nets of other depths

    with shallow_nets():
        settings = {"blocks_args": shallow_rows(), "weights": None, "input_shape": (225, 225, 3)}
        theirs = efficientnet.EfficientNet(1.0, 1.0, 224, name="efficientnetb0", **settings)
        for name in ("efficientnet_b0.weights.h5", "efficientnet_b0.h5", "efficientnet_b0.keras"):
            (theirs.save_weights if "weights" in name else theirs.save)(tmp_path / name)
            assert ke.weights.identify(tmp_path / name).padding == "same"
        assert inspection.read(theirs, others=True).architecture.padding == "same"
    shutil.copy(lite0_package(), tmp_path / "efficientnet_lite0.pth")  # of EfficientNet-PyTorch
    assert ke.weights.identify(tmp_path / "efficientnet_lite0.pth").padding == "same"


def test_a_nested_net_says_its_padding(mini, tmp_path):
    body = ke.EfficientNetB0(weights=None, include_top=False, pooling="avg", padding="symmetric", preprocessing=None)
    model = keras.Sequential([keras.Input((32, 32, 3)), body, keras.layers.Dense(2)])
    for file in ("x.keras", "x.h5", "x.weights.h5"):
        (model.save_weights if "weights" in file else model.save)(tmp_path / file)
        assert ke.weights.identify(tmp_path / file).padding == "symmetric", file


class Unnamed(keras.layers.Layer):
    """A user's layer whose configuration leaves out its name."""

    def call(self, inputs):
        return inputs

    def get_config(self):
        return {}


def test_a_net_beside_a_layer_without_configuration_loads(mini, tmp_path):
    body = fill(ke.EfficientNetB0(weights=None, include_top=False, pooling="avg"))
    keras.Model(body.input, Unnamed()(body.output)).save(tmp_path / "x.keras")
    assert ke.weights.identify(tmp_path / "x.keras").padding == "same"
    loaded = ke.EfficientNetB0(weights=tmp_path / "x.keras", include_top=False, pooling="avg")
    assert all(map(np.array_equal, loaded.get_weights(), body.get_weights()))


def test_a_damaged_configuration_is_one_line(mini, tmp_path):
    model = ke.EfficientNetB0(weights=None, classes=2)
    model.save(tmp_path / "x.h5")
    before = model.get_weights()
    for damaged in ("{broken", '["x"]', '{"config": {"layers": ["x"]}}'):
        with h5py.File(tmp_path / "x.h5", "a") as file:
            file.attrs["model_config"] = damaged
        told = r"^Expected an h5 file of Keras' structure\. Received: '.*x\.h5' \(.+\)$"
        with pytest.raises(ValueError, match=told):
            ke.weights.load(model, tmp_path / "x.h5")
        assert all(map(np.array_equal, model.get_weights(), before))


def test_a_net_with_other_channels_says_its_padding(mini, tmp_path):
    widths = inspection.read(ke.EfficientNetB0(weights=None)).architecture.widths
    blocks = {name: (each[0] and each[0] - 4, *each[1:]) for name, each in widths.items()}
    for padding in ("same", "symmetric"):
        model = ke.EfficientNetB0(weights=None, classes=2, padding=padding, blocks=blocks)
        path = ke.weights.export(model, tmp_path / f"{padding}.safetensors")
        ke.weights.convert_file(path, tmp_path / "x.keras")
        assert ke.describe(tmp_path / "x.keras")["padding"] == padding


def test_a_set_with_other_classes_loads(mini, tmp_path, monkeypatch):
    for record in registry.RECORDS:
        assert store.candidates(record) and store.candidates(record, classes=record.classes)
    tag = "efficientnet_b5.sw_in12k"
    model = trained(ke.EfficientNetB5(weights=None, classes=11821, padding="symmetric"))
    place = tmp_path / f"mirror/timm/{tag}/resolve/main"
    place.mkdir(parents=True)
    ke.weights.export(model, place / "model.safetensors")
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    for _ in range(2):  # converted, then cached
        loaded = ke.load_model(tag)
        assert same_weights(loaded, model) and loaded.labels is None
        assert loaded.weights_record.tag == tag


def test_a_full_name_is_the_set_of_that_name():
    reference = model_loader.resolve("efficientnet_es.ra_in1k")
    assert (reference.place, reference.weights) == ("efficientnet-edgetpu-s", "efficientnet_es.ra_in1k")
    assert model_loader.resolve("tf_efficientnet_b0.ns_jft_in1k").weights == "tf_efficientnet_b0.ns_jft_in1k"
    assert model_loader.resolve("efficientnet_es_pruned.in1k").weights == "efficientnet_es_pruned.in1k"


def test_a_file_of_unknown_padding_is_told_before_training(mini, tmp_path):
    path = unsaid(tmp_path)
    with pytest.warns(UserWarning, match="fit two nets of timm"):
        model_from_recipe.whole(config.Recipe(config.Model(weights=str(path))))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for padding in ("same", "symmetric"):  # the user has chosen
            recipe = config.Recipe(config.Model(weights=str(path), padding=padding))
            assert model_from_recipe.whole(recipe).model.padding == padding


def test_a_net_without_published_weights_says_so():
    with pytest.raises(
        ValueError, match=r"weights=None or the path of a file, since efficientnet-x-b0 has no published"
    ):
        ke.EfficientNetXB0()
    with pytest.raises(ValueError, match=r"^Unknown weights for efficientnetv2-s\. Expected one of: imagenet, best, "):
        ke.EfficientNetV2S(weights="baseline")  # of many nets
    with pytest.raises(ValueError, match=r"Unknown padding.*Nearest: 'symmetric'"):
        ke.weights.load(ke.EfficientNetLite0(weights=None), lite0_package(), padding="symetric")


def test_fields_that_followed_a_model_follow_the_next():
    run = config.settled(config.Recipe(config.Model("efficientnetv2-s")))
    assert config.settled(config.override(run, ["--model.name", "b0"])).model.bn_momentum == 0.99
    kept = config.override(run, ["--model.name", "b0", "--model.bn-momentum", "0.9"])
    assert config.settled(kept).model.bn_momentum == 0.9
    timms = config.settled(config.Recipe(config.Model(weights="x.safetensors")), "symmetric")
    assert config.settled(config.override(timms, ["--model.weights", "None"])).model.padding == "same"
    nvidia = config.settled(config.override(recipes.every()["b0_nvidia_pytorch"], ["--model.name", "b1"])).model
    assert (nvidia.padding, nvidia.bn_epsilon) == ("symmetric", 1e-3)


@pytest.mark.usefixtures("shallow")
def test_v2s_rules_for_photos_survive_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_effnet.weights.store.fetch", lambda *arguments: None)
    model = ke.EfficientNetV2S()
    ke.weights.export(model, tmp_path / "x", target="hub")
    again = ke.EfficientNetV2S(weights=tmp_path / "x")
    assert again.expects == Expects(0, "half-pixel-bilinear", "squash")
    assert "half-pixel-bilinear, the whole photo" in (tmp_path / "x" / "README.md").read_text()

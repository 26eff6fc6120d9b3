"""Models that Keras 2 saved are rebuilt with the same outputs. No damaged or hostile one runs code or is half read."""

import json
import random
import re
import shutil
import warnings
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from helpers import BACKEND, command, leading, run, seeded

import keras_effnet as ke
from keras_effnet import compat
from keras_effnet.weights import convert
from keras_effnet.weights.keras2 import conversion, files, padding
from keras_effnet.weights.keras2.layers import ForeignLayerError

tf_keras = pytest.importorskip("tf_keras")
if BACKEND != "tensorflow":
    pytest.skip("the files do not depend on the backend", allow_module_level=True)

import tensorflow as tf  # noqa: E402
from tf_keras.src.applications import efficientnet  # noqa: E402  the public module has no nets of other depths

# Four blocks have most of what B0's sixteen have: one without expansion, one with a residual, and a 5 x 5 kernel.
REPEATS = (1, 2, 1)
BLOCKS = [args | {"repeats": count} for args, count in zip(efficientnet.DEFAULT_BLOCKS_ARGS, REPEATS, strict=False)]
KINDS = {"h5": "m.h5", "SavedModel": "saved", "keras": "m.keras"}
WEIGHTS = {"weights of h5": "w.h5", "checkpoint": "ckpt/w", "weights.h5": "w.weights.h5"}


def shuffled(model):
    """Sets all variables far from their initial values, so that the outputs depend on the pixels."""
    for number, weight in enumerate(model.weights):
        name, shape = weight.name.split(":")[0], tuple(weight.shape)
        if "normalization/" in name and "batch" not in name and shape == (3,):
            weight.assign(np.full(shape, 0.5 if name.endswith("mean") else 0.08))
        elif weight.dtype.is_floating and shape:
            weight.assign(seeded(f"{number}/{name}", shape))
    for layer in model.submodules:
        if isinstance(layer, tf_keras.layers.Normalization):
            layer.finalize_state()  # as loading does: it computes with copies of its variables
    return model


def settled(model, pixels):
    """Sets the statistics of the net to those of a batch. Otherwise, random variables make all images look alike."""
    nets = [each for each in (model, *model.submodules) if isinstance(each, tf_keras.Model)]
    net = next(each for each in nets if any("stem_conv" in layer.name for layer in each.layers))
    norms = [layer for layer in net.layers if isinstance(layer, tf_keras.layers.BatchNormalization)]
    before = [(layer.momentum, layer.trainable) for layer in norms]
    for layer in norms:
        layer.momentum, layer.trainable = 0.0, True
    net(pixels, training=True)
    for layer, (momentum, trainable) in zip(norms, before, strict=True):
        layer.momentum, layer.trainable = momentum, trainable


def small(size: int, **kwargs):
    """Returns an EfficientNet of four blocks, as B0 has them: the net that B0 is with the fixture `mini`."""
    settings = {"weights": None, "include_top": False, "input_shape": (size, size, 3), "blocks_args": BLOCKS}
    settings |= {"width_coefficient": 1.0, "depth_coefficient": 1.0, "default_size": size, "model_name": "small"}
    return efficientnet.EfficientNet(**settings | kwargs)


def flat(body):
    model = body(64, include_top=True, classes=7)
    model.get_layer("block2a_expand_conv").trainable = False
    return model


def nested(body):
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [body(64), layers.GlobalAveragePooling2D(), layers.Dropout(0.2), layers.Dense(5, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(np.zeros((2, 64, 64, 3)), np.zeros(2), verbose=0)  # gives the optimizer a state
    return model


def functional(body):
    """A frozen body at an odd size, called as Keras' guide does; augmentation; a head of two layers; two outputs."""
    layers, net = tf_keras.layers, body(65)
    net.trainable = False
    pixels = tf_keras.Input((65, 65, 3))
    x = layers.RandomFlip("horizontal")(pixels)
    x = layers.GlobalAveragePooling2D()(net(x, training=False))
    x = layers.Dense(16, activation="relu", kernel_regularizer="l2")(layers.BatchNormalization()(x))
    kind = layers.Dense(3, activation="softmax", name="kind")(x)
    return tf_keras.Model(pixels, [kind, layers.Dense(1, activation="sigmoid", name="sick")(x)])


def twice_wrapped(body):
    inner = tf_keras.Sequential([body(64), tf_keras.layers.GlobalMaxPooling2D()])
    return tf_keras.Sequential(
        [tf_keras.layers.Rescaling(1.0, input_shape=(64, 64, 3)), inner, tf_keras.layers.Dense(4)]
    )


def mixed_precision(body):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        layers = tf_keras.layers
        dense = layers.Dense(5, activation="softmax", dtype="float32")
        return tf_keras.Sequential([body(64), layers.GlobalAveragePooling2D(), dense])
    finally:
        tf_keras.mixed_precision.set_global_policy(None)  # that of floatx


def operations(body):
    """Operations of TensorFlow on the way, which Keras 2 saves as layers."""
    import tensorflow as tf

    layers, pixels = tf_keras.layers, tf_keras.Input((64, 64, 3))
    x = 1.0 - (pixels / 255.0 - 0.5) * 2.0
    pooled = tf.reduce_mean(body(64)(x + pixels * 0.01), [1, 2])
    x = tf.nn.relu(layers.Dense(8)(pooled)) * tf.sigmoid(layers.Dense(8)(pooled)) + 0.25
    return tf_keras.Model(pixels, tf.nn.softmax(layers.Dense(4)(x)))


class FixedDropout(tf_keras.layers.Dropout):
    """Of qubvel/efficientnet: a Dropout under another name."""


class Swish(tf_keras.layers.Layer):
    """Of qubvel/efficientnet before TensorFlow had it."""

    def call(self, inputs):
        return inputs * tf_keras.backend.sigmoid(inputs)


def custom(body):
    layers = tf_keras.layers
    head = [layers.GlobalAveragePooling2D(), Swish(), FixedDropout(0.2, noise_shape=(None, 1)), layers.LeakyReLU(0.1)]
    return tf_keras.Sequential([body(64), *head, layers.Dense(2)])


class Subclassed(tf_keras.Model):
    """What many tutorials write: a net and a head as attributes, called in code that no file describes."""

    def __init__(self, net, head):
        super().__init__()
        self.net, self.pool, self.head = net, tf_keras.layers.GlobalAveragePooling2D(), head

    def call(self, inputs, training=False):
        return self.head(self.pool(self.net(inputs, training=training)))


def renamed(body, change="{}_2"):
    """A net whose layers were renamed after they had been built, so that their variables have other names."""
    net = body(64)
    for layer in net.layers[1:]:
        layer._name = change.format(layer.name)
    return tf_keras.Model(net.input, tf_keras.layers.Dense(3)(tf_keras.layers.GlobalAveragePooling2D()(net.output)))


def under_other_names(net):
    for layer in net.layers[1:]:
        layer._name += "_2"
    return tf_keras.Model(net.input, net.output)  # which knows the names


def renamed_with_top(body):
    return under_other_names(body(64, include_top=True, classes=5))


def renamed_and_nested(body):
    layers = tf_keras.layers
    return tf_keras.Sequential([under_other_names(body(64)), layers.GlobalAveragePooling2D(), layers.Dense(5)])


def subclassed(body):
    model = Subclassed(body(64), tf_keras.layers.Dense(3))
    model(np.zeros((1, 64, 64, 3)))
    return model


def subclassed_with_layers(body):
    """A head of several layers, one of which could be taken for a classifier. The class has an unlucky name."""
    layers = tf_keras.layers
    head = tf_keras.Sequential([layers.BatchNormalization(), layers.Dense(16), layers.Dense(3)])
    model = type("Model", (Subclassed,), {})(body(64), head)
    model(np.zeros((1, 64, 64, 3)))
    return model


class Old:
    """A model of Keras 2, its files, and what it computes."""

    def __init__(self, model, folder: Path):
        tf.random.set_seed(0)  # of tf_keras' dropout, which draws while statistics are taken
        self.model, self.folder = model, folder
        side = model.input_shape[1] if model.inputs else 64
        self.pixels = np.random.default_rng(1).integers(0, 256, (3, side, side, 3)).astype("float64")
        settled(shuffled(model), self.pixels)
        outputs = model(self.pixels, training=False)  # `predict()` would trace it, which takes longer
        self.outputs = [each.numpy() for each in (outputs if isinstance(outputs, list) else [outputs])]

    def path(self, kind: str) -> Path:
        """Returns the path of a file of one kind, which is saved when a test asks for it first."""
        path = self.folder / {**KINDS, **WEIGHTS}[kind]
        if not path.exists() and not path.with_name(f"{path.name}.index").exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the format is old
                if kind in WEIGHTS:
                    self.model.save_weights(path)
                else:
                    self.model.save(path, **({"save_format": "tf"} if kind == "SavedModel" else {}))
        return path

    def check(self, path, bound=1e-10) -> keras.Model:
        """Checks that a file holds a model of Keras 3 with the same outputs."""
        model = keras.saving.load_model(path, compile=False)
        found = run(model, self.pixels)
        for ours, theirs in zip(found if isinstance(found, list) else [found], self.outputs, strict=True):
            assert ours.shape == theirs.shape
            assert theirs.std() > 1e-3 and np.abs(ours - theirs).max() < bound * theirs.std()
        return model


@pytest.fixture(autouse=True)
def float64():
    """Computes in float64. In float32, both versions of Keras round batch norm in another order, by 2e-5 in the end."""
    tf_keras.backend.set_floatx("float64")
    yield
    tf_keras.backend.set_floatx("float32")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Returns small models by name, each made when a test asks for it first."""
    made: dict[str, Old] = {}

    def get(make) -> Old:
        if make.__name__ not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            made[make.__name__] = Old(make(small), folder)
        return made[make.__name__]

    return get


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (flat, "h5"),
        (nested, "SavedModel"),
        (functional, "keras"),
        (custom, "h5"),
        (operations, "h5"),
        (renamed_with_top, "keras"),
        (renamed_and_nested, "h5"),
        pytest.param(renamed, "h5", marks=pytest.mark.long),
        *(pytest.param(renamed_and_nested, kind, marks=pytest.mark.long) for kind in ("SavedModel", "keras")),
        *(pytest.param(nested, kind, marks=pytest.mark.long) for kind in ("h5", "keras")),
        *(pytest.param(functional, kind, marks=pytest.mark.long) for kind in ("h5", "SavedModel")),
        *(pytest.param(twice_wrapped, kind, marks=pytest.mark.long) for kind in KINDS),
        *(pytest.param(mixed_precision, kind, marks=pytest.mark.long) for kind in KINDS),
    ],
)
def test_a_whole_model_computes_what_it_did(make, kind, old, tmp_path):
    source = old(make)
    done = convert.convert(source.path(kind), tmp_path / "new.keras")
    assert done.writer and not done.left
    # bfloat16 has 8 bits, and its sums are rounded in another order. Keras 3 rounds a Rescaling's numbers to float32.
    bound = {mixed_precision: 0.1, operations: 1e-6}.get(make, 1e-10)
    model = source.check(tmp_path / "new.keras", bound)
    assert not list(tmp_path.glob(".*"))
    frozen = [layer.name for layer in compat.all_layers(model) if not layer.trainable and layer.weights]
    assert make is not flat or frozen == ["block2a_expand_conv"]
    if make is functional:
        assert not model.get_layer("small").trainable
        assert [layer.name for layer in model.layers][-2:] == ["kind", "sick"]


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (nested, 0),
        (nested, 3),
        (functional, 0),
        (functional, 3),
    ],
)
@pytest.mark.long
def test_published_nets_are_recognised_in_a_fresh_process(make, number, tmp_path):
    def body(size, **kwargs):
        settings = {"weights": None, "include_top": False, "input_shape": (size, size, 3)} | kwargs
        return getattr(efficientnet, f"EfficientNetB{number}")(**settings)

    source = Old(make(body), tmp_path)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    for kind in KINDS:
        new, told = tmp_path / f"{kind}.new.keras", ("--verify",) if kind == "SavedModel" else ()
        labels = ("--labels", tmp_path / "labels.txt") if make is nested else ()
        done = command("convert", source.path(kind), new, *told, *labels, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["model"] == f"efficientnet-b{number}" and not found["left"]
        assert kind != "SavedModel" or found["difference"] < 1e-10
        source.check(new)
        assert make is not nested or ke.load_model(new).labels == list("abcde")
    if make is not nested:
        return
    for kind in WEIGHTS:
        new = tmp_path / f"{kind}.head.keras"
        done = convert.convert(source.path(kind), new, head="linear:5")
        assert done.model == f"efficientnet-b{number}" and not done.left
        # Our nets take any size, and their pixels are normalized in another layer. They are float32.
        model = ke.create_model(done.model, weights=new, classes=5, input_shape=(64, 64, 3))
        found = model.predict(source.pixels, verbose=0)
        assert np.abs(found - source.outputs[0]).max() < 1e-4 * source.outputs[0].std()
        body = ke.create_model(done.model, weights=None, include_top=False)
        report = ke.weights.load(body, source.path(kind))
        assert report.fits and sum(report.ignored.values()) >= 2


def save(source: Old, kind: str, release: str, monkeypatch) -> Path:
    """Saves a model as a release of Keras 2 does: where it stores layers in `.keras` and `.weights.h5` files.

    Reference:
        saving_lib.py of Keras 2.13, 2.14 and 2.15. Files of 2.13.1 have the same names, for each of these models.
    """
    from tf_keras.src.saving import saving_lib as lib

    if release != "2.15":
        monkeypatch.setattr(lib, "ATTR_SKIPLIST", lib.ATTR_SKIPLIST - {"_layer_checkpoint_dependencies"})
        walk = lib._walk_trackable
        monkeypatch.setattr(lib, "_walk_trackable", lambda trackable: reversed([*walk(trackable)]))
    if release == "2.13":
        monkeypatch.setattr(lib, "_save_container_state", all_of_container)
    source.folder = source.folder / release
    source.folder.mkdir(exist_ok=True)
    return source.path(kind)


def all_of_container(container, weights_store, assets_store, inner_path, visited_trackables):
    """Saves layers as Keras 2.13 did: one that was saved before also takes a number."""
    from tf_keras.src.saving import saving_lib as lib

    counts: dict[str, int] = {}
    for each in list(container.values() if isinstance(container, dict) else container):
        if lib._is_keras_trackable(each):
            name = lib.generic_utils.to_snake_case(type(each).__name__)
            number = counts[name] = counts.get(name, -1) + 1
            place = f"{inner_path}/{name}_{number}" if number else f"{inner_path}/{name}"
            lib._save_state(each, weights_store, assets_store, place, visited_trackables)


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize(
    ("kind", "release"),
    [
        ("weights.h5", "2.13"),
        *(pytest.param(kind, "2.15", marks=pytest.mark.long) for kind in (*WEIGHTS, "SavedModel", "keras")),
        *(pytest.param("keras", release, marks=pytest.mark.long) for release in ("2.13", "2.14")),
    ],
)
def test_the_net_and_the_head_of_a_class_of_ones_own(kind, release, old, tmp_path, monkeypatch):
    source = old(subclassed)
    monkeypatch.setattr(source, "folder", source.folder)
    path = save(source, kind, release, monkeypatch)
    body = convert.convert(path, tmp_path / "body.keras")
    assert re.search(r"(dense(_\d+)?|head): layers around the net\. To keep it: --head linear:3$", body.left[-1])
    assert len(body.left) == (2 if kind in KINDS else 1)
    features = keras.saving.load_model(tmp_path / "body.keras", compile=False)(source.pixels)
    theirs = np.asarray(source.model.net(source.pixels))
    assert np.abs(features - theirs).max() < 1e-4 * theirs.std()  # ours is float32
    assert not convert.convert(path, tmp_path / "new.keras", head="linear:3").left
    whole = keras.saving.load_model(tmp_path / "new.keras", compile=False)
    kernel, bias = whole.layers[-1].get_weights()
    outputs = theirs.mean((1, 2)) @ kernel + bias
    assert np.abs(outputs - source.outputs[0]).max() < 1e-6 * source.outputs[0].std()
    own = ke.EfficientNetB0(weights=None, include_top=False)
    assert ke.weights.load(own, path).ignored["layers around the net"] == 2


@pytest.mark.usefixtures("mini")
@pytest.mark.long
@pytest.mark.parametrize("kind", [*WEIGHTS, "SavedModel", "keras"])
def test_a_head_of_several_layers_is_left_as_a_whole(kind, old, tmp_path):
    path = old(subclassed_with_layers).path(kind)
    done = convert.convert(path, tmp_path / "body.keras")
    assert "layers around the net" in done.left[-1] and "--head" not in done.left[-1]
    assert len(done.left[-1].split(": ")[0].split(", ")) == 3
    done = convert.convert(path, tmp_path / "new.keras", head="linear:3")
    assert done.left[-1] == "a classifier of 3 classes: the file has 0. The new one is of zeros"


L = tf_keras.layers

HEADS = {
    "operation": lambda: [L.GlobalAveragePooling2D(), L.Lambda(lambda x: x * 2), L.Dense(1, name="predictions")],
    "hidden": lambda: [L.GlobalAveragePooling2D(), L.Lambda(abs), L.Dense(16, name="one"), L.ReLU()],
    "maximum": lambda: [L.GlobalMaxPooling2D(), L.Dense(4, activation="sigmoid", name="one"), L.Lambda(abs)],
    "several": lambda: [
        *(L.GlobalAveragePooling2D(), L.BatchNormalization(name="norm"), L.Dense(8, name="one")),
        *(L.Lambda(abs), L.Dense(4, name="two")),
    ],
    "two": lambda: [L.GlobalAveragePooling2D(), L.Lambda(abs), [L.Dense(4, name="one"), L.Dense(4, name="two")]],
    "linear": lambda: [L.Lambda(lambda x: x / 3)],
}
LEFT = {
    "operation": ("predictions", 1),
    "hidden": ("one", 16),
    "maximum": ("one", 4),
    "several": ("norm, one, two", None),
    "two": ("one, two", None),
    "linear": ("predictions", 4),
}


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("operation", "keras"),
        ("linear", "h5"),
        ("several", "weights.h5"),
        *(pytest.param("linear", kind, marks=pytest.mark.long) for kind in ("SavedModel", "keras")),
        *(pytest.param("maximum", kind, marks=pytest.mark.long) for kind in ("keras", "weights.h5")),
        *(pytest.param(name, "keras", marks=pytest.mark.long) for name in ("hidden", "several", "two")),
        *(pytest.param(name, "weights.h5", marks=pytest.mark.long) for name in ("operation", "hidden", "two")),
    ],
)
def test_a_head_that_is_not_rebuilt_is_not_taken_for_the_nets(name, kind, tmp_path):
    top = {"include_top": True, "classes": 4, "classifier_activation": None} if name == "linear" else {}
    net = small(64, **top)
    x = net.output
    for layer in HEADS[name]():
        x = [each(x) for each in layer] if isinstance(layer, list) else layer(x)
    source = Old(tf_keras.Model(net.input, x), tmp_path)
    path = source.path(kind)
    done = convert.convert(path, tmp_path / "new.keras")
    names, classes = LEFT[name]
    if kind == "weights.h5":  # layers have no names there
        names = {"several": "batch_normalization_13, dense, dense_1", "two": "dense, dense_1"}.get(name, "dense")
    hint = f". To keep it: --head linear:{classes}" if classes else ""
    assert done.left[-1] == f"{names}: layers around the net{hint}"
    assert len(done.left) == (1 if kind == "weights.h5" else 2)
    features = keras.saving.load_model(tmp_path / "new.keras", compile=False)(source.pixels)
    theirs = np.asarray(tf_keras.Model(net.input, net.get_layer("top_activation").output)(source.pixels))
    assert features.shape == theirs.shape and np.abs(features - theirs).max() < 1e-4 * theirs.std()
    own = ke.EfficientNetB0(weights=None, include_top=False)
    assert ke.weights.load(own, path).fits
    if classes:
        convert.convert(path, tmp_path / "head.keras", head=f"linear:{classes}")
        kernel = keras.saving.load_model(tmp_path / "head.keras", compile=False).layers[-1].get_weights()[0]
        dense = next(layer for layer in source.model.layers if isinstance(layer, L.Dense))
        np.testing.assert_array_equal(kernel, dense.get_weights()[0].astype("float32"))


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("change", leading(["{}_2", "mine_{}", "a_{}_b"], 1))
def test_renamed_layers_are_found_by_the_names_of_their_variables(change, tmp_path):
    model = shuffled(renamed(small, change))
    model.save_weights(tmp_path / "w.h5")
    body = ke.EfficientNetB0(weights=None, include_top=False)
    assert ke.weights.load(body, tmp_path / "w.h5").ignored["layers around the net"] == 2
    theirs = model.get_layer(change.format("block2b_expand_conv")).get_weights()[0]
    np.testing.assert_array_equal(body.get_layer("block2b_expand_conv").kernel, theirs.astype("float32"))
    # Nor are those of twins, or names that another layer has.
    twin = small(64)
    for net, front in ((twin, "left_"), (other := small(64), "right_")):
        for layer in (net, *net.layers[1:]):
            layer._name = front + layer.name
    pixels = tf_keras.Input((64, 64, 3))
    outputs = [tf_keras.layers.GlobalAveragePooling2D()(net(pixels)) for net in (twin, other)]
    flat = tf_keras.Model([twin.input, other.input], [twin.output, other.output])
    for number, pair in enumerate((flat, tf_keras.Model(pixels, outputs))):
        pair.save_weights(tmp_path / f"pair{number}.h5")
        with pytest.raises(ValueError, match="Expected"):
            ke.weights.load(body, tmp_path / f"pair{number}.h5")
    both = tf_keras.Model(model.input, [model.output, tf_keras.layers.Conv2D(3, 1, name="top_conv")(model.input)])
    both.save_weights(tmp_path / "both.h5")
    with pytest.raises(ValueError, match="Expected the names of an EfficientNet"):
        ke.weights.load(body, tmp_path / "both.h5")


@pytest.mark.parametrize("release", leading(("2.13", "2.14"), 1))
@pytest.mark.parametrize("make", leading((functional, flat, nested, twice_wrapped), 1))
def test_keras_files_of_earlier_releases(make, release, old, tmp_path, monkeypatch):
    source = old(make)
    monkeypatch.setattr(source, "folder", source.folder)
    convert.convert(save(source, "keras", release, monkeypatch), tmp_path / "new.keras")
    source.check(tmp_path / "new.keras")


def shared(body):
    """Two models in a model that share layers, of which a file stores one copy; and two layers of one description."""
    net, pixels = body(64), tf_keras.Input((64, 64, 3))
    front = tf_keras.Model(net.input, net.get_layer("block2a_expand_activation").output, name="front")
    pooled = [L.GlobalAveragePooling2D()(each(pixels)) for each in (front, net)]
    parts = [tf_keras.Sequential([L.Dense(4, name="same")], name=name) for name in ("one", "two")]
    return tf_keras.Model(pixels, L.Concatenate()([part(each) for part, each in zip(parts, pooled, strict=True)]))


@pytest.mark.parametrize("kind", leading(("keras", "SavedModel"), 1))
def test_layers_that_two_models_share(kind, old, tmp_path):
    assert not convert.convert(old(shared).path(kind), tmp_path / "new.keras").left
    old(shared).check(tmp_path / "new.keras")


@pytest.mark.parametrize(
    "names",
    [
        ("dense", "dense_2", "dense_3"),  # those that others had
        *(pytest.param(names, marks=pytest.mark.long) for names in [("dense_1", "dense", "dense_2"), ("a", "b", "c")]),
    ],
)
def test_variables_of_renamed_layers_are_not_permuted(names, tmp_path):
    head = tf_keras.Sequential([L.Dense(8, name=name) for name in ("dense", "dense_1", "dense_2")], name="head")
    pixels = tf_keras.Input((64, 64, 3))
    source = Old(tf_keras.Model(pixels, head(L.GlobalAveragePooling2D()(small(64)(pixels)))), tmp_path)
    for layer, name in zip(head.layers, names, strict=True):
        layer._name = name
    with files.opened_model(source.path("h5")) as found, pytest.raises(ForeignLayerError, match=r"Save .* as \.keras"):
        conversion.model_of(found, tmp_path / "m.h5")
    convert.convert(source.path("keras"), tmp_path / "new.keras")
    source.check(tmp_path / "new.keras")


def test_a_body_that_is_frozen_in_part_is_not_taken_for_a_renamed_one(tmp_path):
    """Users freeze a net and thaw its last layers. An h5 file has those first."""
    net = small(64)
    net.trainable = False
    for layer in net.layers[-8:]:
        layer.trainable = True
    source = Old(tf_keras.Sequential([net, L.GlobalAveragePooling2D(), L.Dense(3)]), tmp_path)
    assert not convert.convert(source.path("h5"), tmp_path / "new.keras").left
    source.check(tmp_path / "new.keras")


# Models by their net and their classifier, and whether the classifier is the net's own.
TOPS = {
    "pooling=avg": (lambda net, top: tf_keras.Sequential([pooled(net), top]), True),
    "activation": (lambda net, top: tf_keras.Sequential([pooled(net, L.ReLU(name="post_relu")), top]), False),
    "operation": (lambda net, top: tf_keras.Sequential([pooled(net, L.Lambda(abs)), top]), False),
    "between": (lambda net, top: tf_keras.Sequential([pooled(net), tf_keras.Sequential([L.Lambda(abs)]), top]), False),
    "dropout": (lambda net, top: tf_keras.Sequential([pooled(net), L.Dropout(0.1), top]), True),
    "dict": (lambda net, top: tf_keras.Model(net.input, {"label": top(pooled(net).output)}), True),
    "renamed": (lambda net, top: tf_keras.Sequential([under_other_names(net), L.GlobalAveragePooling2D(), top]), True),
}


def pooled(net, layer=None):
    return tf_keras.Model(net.input, L.GlobalAveragePooling2D()(layer(net.output) if layer else net.output))


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("name", leading(TOPS, 2))
def test_a_classifier_is_the_nets_if_nothing_is_between(name, tmp_path):
    make, owns = TOPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is old
        make(small(64), L.Dense(4, activation="softmax", name="predictions")).save(tmp_path / "m.h5")
    done = convert.convert(tmp_path / "m.h5", tmp_path / "new.safetensors")
    assert ("predictions: layers around the net. To keep it: --head linear:4" in done.left) is not owns
    assert ke.weights.identify(tmp_path / "new.safetensors").classes == (4 if owns else None)


def rebuilt(model, path: Path) -> keras.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is old
        model.save(path)
    with files.opened_model(path) as found:
        return conversion.model_of(found, path)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([L.LayerNormalization(center=False, scale=False), L.PReLU(), L.Dense(3)], (6,)),
        ([L.GroupNormalization(3, center=False, scale=False), L.PReLU(shared_axes=[1, 2]), L.Flatten()], (4, 4, 6)),
        ([L.Embedding(9, 5, input_length=4), L.GlobalAveragePooling1D(), L.Dense(2)], (4,)),
        ([L.UpSampling2D(2, interpolation="area"), L.Reshape((-1, 6)), L.GlobalMaxPooling1D()], (2, 2, 6)),
    ],
)
@pytest.mark.parametrize("kind", leading(("m.h5", "m.keras"), 1))
def test_layers_of_the_head_compute_what_they_did(layers, shape, kind, tmp_path):
    layers = [type(layer).from_config(layer.get_config()) for layer in layers]
    model = shuffled(tf_keras.Sequential([tf_keras.Input(shape), *layers]))
    values = np.random.default_rng(0).integers(0, 9, (3, *shape)).astype("float64")
    theirs = np.asarray(model(values))
    assert theirs.std() > 1e-3
    np.testing.assert_allclose(run(rebuilt(model, tmp_path / kind), values), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape", "dtype", "told"),
    [
        (lambda: L.UpSampling2D(2, interpolation="bilinear"), (4, 4, 3), "uint8", "UpSampling2D of uint8 rounds"),
        (lambda: L.UpSampling2D(2, interpolation="gaussian"), (4, 4, 3), None, "interpolation=gaussian is not conv"),
        (lambda: L.Resizing(4, 4, interpolation="mitchellcubic"), (9, 9, 3), None, "interpolation=mitchellcubic is"),
        (lambda: L.Conv2DTranspose(2, 3, dilation_rate=2), (4, 4, 3), None, r"dilation_rate=\[2, 2\] is not converted"),
        (lambda: L.BatchNormalization(axis=[1, 3]), (4, 4, 3), None, "the list of axes"),
        (lambda: L.LayerNormalization(axis=[3, 1]), (4, 4, 3), None, "axes in another order"),
        (lambda: L.Embedding(5, 2, mask_zero=True), (4,), None, "mask_zero=True is not converted"),
        (lambda: L.TimeDistributed(L.Dense(2)), (4, 3), None, "TimeDistributed is not converted"),
        (lambda: lambda x: tf.concat([x, x], -1), (4, 3), None, r"no layer of Keras 3 is tf\.concat"),
        (lambda: lambda x: tf.stack([x, x], 1), (4, 3), None, r"no layer of Keras 3 is tf\.stack"),
    ],
)
def test_layers_that_would_compute_something_else_are_named(make, shape, dtype, told, tmp_path):
    inputs = tf_keras.Input(shape, dtype=dtype)
    with pytest.raises(ForeignLayerError, match=told):
        rebuilt(tf_keras.Model(inputs, make()(inputs)), tmp_path / "m.h5")


def test_only_what_is_in_front_of_the_net_normalizes_its_pixels(tmp_path):
    config = small(64).get_config()
    config["layers"] = [each for each in config["layers"] if each["name"] not in ("rescaling", "normalization")]
    pad = next(each for each in config["layers"] if each["name"] == "stem_conv_pad")
    pad["inbound_nodes"] = [[[config["layers"][0]["name"], 0, 0, {}]]]
    net, table, pixels = tf_keras.Model.from_config(config), tf_keras.Input((2,)), tf_keras.Input((64, 64, 3))
    for front, normalizes in ((lambda x: x, False), (L.Rescaling(1 / 255), True)):
        x = L.GlobalAveragePooling2D()(net(front(pixels))) * 2.0
        x = L.Concatenate()([x, L.Normalization(mean=[0.0, 1.0], variance=[1.0, 2.0])(table)])
        model = rebuilt(tf_keras.Model([table, pixels], x), tmp_path / "m.h5")
        assert (conversion.left_of(model) == ()) is normalizes


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("name", leading(("opt", "optim"), 1))
def test_an_optimizer_is_no_layer_whatever_it_is_called(name, old, tmp_path):
    checkpoint = tf.train.Checkpoint(net=old(nested).model, **{name: old(nested).model.optimizer})
    checkpoint.write(str(tmp_path / "ckpt"))
    done = convert.convert(tmp_path / "ckpt", tmp_path / "new.keras")
    assert re.fullmatch(r"net/dense(_\d+)?: layers around the net\. To keep it: --head linear:5", *done.left)


def edited(source: Path, target: Path, change) -> Path:
    """Copies a whole model in h5, with its description changed."""
    shutil.copy(source, target)
    with h5py.File(target, "a") as file:
        config = json.loads(file.attrs["model_config"])
        config = change(config) or config
        file.attrs["model_config"] = json.dumps(config)
    return target


MARK = "/tmp/keras_effnet-hostile"


def test_a_foreign_layer_is_named_and_never_run(old, tmp_path):
    import base64
    import marshal

    code = base64.b64encode(marshal.dumps(compile(f"open({MARK!r}, 'w')", "x", "exec"))).decode()

    def with_lambda(config):
        layers = config["config"]["layers"]
        layers[-2] = {"class_name": "Lambda", "config": {"name": "mine", "function": [code, None, None]}}

    Path(MARK).unlink(missing_ok=True)
    path = edited(old(nested).path("h5"), tmp_path / "m.h5", with_lambda)
    with files.opened_model(path) as found:
        from keras_effnet.weights.keras2.layers import ForeignLayerError
        from keras_effnet.weights.keras2.rebuild import rebuild

        with pytest.raises(ForeignLayerError, match="mine: Lambda is not converted"):
            rebuild(found.class_name, found.config, found.find)
    assert not Path(MARK).exists()


BROKEN = {
    "not a model": lambda config: {"class_name": "Dense", "config": []},
    "a layer twice": lambda config: config["config"]["layers"].append(config["config"]["layers"][1]),
    "a huge layer": lambda config: config["config"]["layers"][-1]["config"].update(units=1 << 40),
    "a huge input": lambda config: _first(config).update(batch_input_shape=[None, 1 << 30, 4, 3]),
    "fewer units": lambda config: config["config"]["layers"][-1]["config"].update(units=4),
    "a text for a number": lambda config: config["config"]["layers"][-2]["config"].update(rate="much"),
    "no layers": lambda config: config["config"].update(layers=[]),
    "a missing layer": lambda config: config["config"]["layers"].pop() and None,
    "a circle": lambda config: _circle(config["config"]["layers"][1]["config"]["layers"]),
}


def _first(config) -> dict:
    return config["config"]["layers"][0]["config"]


def _circle(layers) -> None:
    layers[1]["inbound_nodes"] = [[[layers[2]["name"], 0, 0, {}]]]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_description_that_does_not_fit_converts_nothing(kind, old, tmp_path):
    path = edited(old(nested).path("h5"), tmp_path / "m.h5", BROKEN[kind])
    with pytest.raises(ValueError, match=r"Received: .*m\.h5"):
        ke.weights.convert_file(path, tmp_path / "new.keras")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.h5"]


@pytest.mark.parametrize("count", [20, *(pytest.param(count, marks=pytest.mark.long) for count in (200, 1000))])
@pytest.mark.parametrize("kind", leading(KINDS, 1))
def test_corrupted_models_are_an_error_or_right(kind, count, old, tmp_path):
    """A byte is changed, or a part is lost, anywhere in a file. What is converted all the same has the old outputs."""
    source, drawn = old(nested), random.Random(0)
    whole = source.path(kind)
    for number in range(count):
        copy = tmp_path / f"copy{number}{whole.suffix}"
        if whole.is_dir():
            shutil.copytree(whole, copy)
            parts = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "fingerprint.pb")
            place = parts[number % len(parts)]
        else:
            shutil.copy(whole, copy)
            place = copy
        data = bytearray(place.read_bytes())
        start = drawn.randrange(len(data))
        # Most of a file is tensors. Half of the changes are in the rest.
        start = start % 200_000 if number % 2 else start
        if number % 3:
            data[start] ^= 1 << drawn.randrange(8)
        else:
            del data[start : start + drawn.randrange(1, 5000)]
        place.write_bytes(bytes(data))
        new = tmp_path / "new.keras"
        try:
            with files.opened_model(copy) as found:
                if found is not None:
                    json.dumps(found.config)
                    for name, stored in _variables(found):
                        assert stored.read().shape == stored.shape, name
        except (ValueError, OSError):
            pass
        if number % 10 == 0:
            try:
                done = convert.convert(copy, new)
            except (ValueError, OSError):
                assert not new.exists()
            else:
                assert done.left or np.isfinite(keras.saving.load_model(new, compile=False).get_weights()[0]).all()
                new.unlink()
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()


def _variables(found):
    from keras_effnet.weights.keras2.rebuild import Place

    for index, layer in enumerate(found.config["layers"]):
        place = Place(index, str(layer["config"]["name"]), str(layer["class_name"]))
        yield from found.find((place,)).items()


def test_what_a_file_is(old, tmp_path):
    found = ke.weights.identify(old(nested).path("h5"))
    assert found.kind.startswith("a whole model of Keras 2: an h5 file of Keras 2.")
    assert found.head == ("GlobalAveragePooling2D", "Dropout(0.2)", "Dense(5, softmax)")
    assert (found.classes, found.input_size, found.left, found.problem) == (5, (64, 64), (), "")
    np.testing.assert_allclose(found.preprocessing[0], 1 / (255 * np.sqrt(found_variance(old(nested)))), rtol=1e-6)
    mobile = tf_keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=2, alpha=0.35)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mobile.save(tmp_path / "mobile.h5")
    other = ke.weights.identify(tmp_path / "mobile.h5")
    assert other.problem == "mobilenetv2_0.35_32: not an EfficientNet" and not other.command
    with pytest.raises(ValueError, match="Expected a model with one EfficientNet"):
        ke.weights.convert_file(tmp_path / "mobile.h5", tmp_path / "new.keras")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_alone_say_what_their_pixels_are(kind, old):
    source = old(nested)
    scale, _ = convert.pixels_of(source.path(kind))
    np.testing.assert_allclose(scale, 1 / (255 * np.sqrt(found_variance(source))), rtol=1e-6)


def found_variance(source: Old) -> np.ndarray:
    with h5py.File(source.path("h5")) as file:
        names: list[str] = []
        file.visit(names.append)
        name = next(name for name in names if re.search(r"/normalization(_\d+)?/variance:0$", name))
        return np.array(file[name]).ravel()


@pytest.mark.parametrize("call", ["reduce_max(x, [1, 2])", "reduce_mean(x, [1])", "reduce_mean(1 / (x + 2), [1, 2])"])
def test_operations_without_a_layer_are_named(call, tmp_path):
    import tensorflow as tf

    body = shuffled(small(64))
    features = eval(f"tf.{call}", {"tf": tf, "x": body.output})
    if features.shape.rank == 3:
        features = tf_keras.layers.Flatten()(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf_keras.Model(body.input, tf_keras.layers.Dense(3)(features)).save(tmp_path / "m.h5")
    with files.opened_model(tmp_path / "m.h5") as old, pytest.raises(ForeignLayerError, match=r"no layer .* is tf\."):
        conversion.model_of(old, tmp_path / "m.h5")


@pytest.mark.long
def test_metadata_of_the_first_releases_is_in_the_saved_model(old, tmp_path):
    """Until TensorFlow 2.4, the objects of a SavedModel held their descriptions themselves."""
    from tensorflow.core.protobuf import saved_model_pb2
    from tf_keras.protobuf import saved_metadata_pb2

    source = old(nested)
    folder = shutil.copytree(source.path("SavedModel"), tmp_path / "saved")
    metadata = saved_metadata_pb2.SavedMetadata.FromString((folder / "keras_metadata.pb").read_bytes())
    whole = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    for node in metadata.nodes:
        whole.meta_graphs[0].object_graph_def.nodes[node.node_id].user_object.metadata = node.metadata
    (folder / "saved_model.pb").write_bytes(whole.SerializeToString())
    (folder / "keras_metadata.pb").unlink()
    ke.weights.convert_file(folder, tmp_path / "new.keras")
    source.check(tmp_path / "new.keras")


@pytest.mark.usefixtures("mini")
def test_padding_that_differs_is_told_with_its_numbers():
    body = small(None)
    model = tf_keras.Sequential([tf_keras.Input((75, 75, 3)), body, tf_keras.layers.GlobalAveragePooling2D()])
    assert padding.difference(model.get_config(), 224) == (
        "the padding of stem_conv: at 75 x 75 pixels it pads (0, 1), for a map of 37 x 37. "
        "This package pads (1, 1), for 38 x 38, so outputs differ"
    )
    stem = tf_keras.Model(body.input, body.get_layer("stem_conv").output)
    assert tuple(stem(np.zeros((1, 75, 75, 3))).shape[1:3]) == (37, 37)
    own = ke.EfficientNetB0(weights=None, include_top=False, input_shape=(75, 75, 3))
    assert own.get_layer("stem_conv").output.shape[1:3] == (38, 38)
    # Where the size of the net itself is fixed, keras.applications pads as this package does.
    assert all(padding.difference(small(size).get_config(), 224) == "" for size in (64, 65, 75))
    broken = body.get_config()
    for layer in broken["layers"]:
        layer["config"] |= {"padding": [["a", "b"], [1, 1]]} if layer["class_name"] == "ZeroPadding2D" else {}
    assert padding.difference(broken, 224) == ""
    # Open sizes are compared at the variant's resolution: B0's maps are even, B3's are not.
    assert padding.difference(body.get_config(), 224) == ""
    assert "block3a_dwconv: at 300 x 300 pixels it pads (1, 2), for a map of 37 x 37" in padding.difference(
        body.get_config(), 300
    )


@pytest.mark.long
def test_padding_that_differs_is_told_by_every_command(tmp_path):
    body = shuffled(tf_keras.applications.EfficientNetB3(weights=None, include_top=False))
    pooled = tf_keras.layers.GlobalAveragePooling2D()(body.output)
    model = tf_keras.Model(body.input, tf_keras.layers.Lambda(lambda x: x * 2)(tf_keras.layers.Dense(5)(pooled)))
    model.save(tmp_path / "m.h5")
    told = "the padding of block3a_dwconv: at 300 x 300 pixels it pads"
    done = convert.convert(tmp_path / "m.h5", tmp_path / "m.keras")
    assert any(each.startswith(told) for each in done.left)
    assert any(each.startswith(told) for each in ke.weights.identify(tmp_path / "m.h5").left)
    with pytest.warns(UserWarning, match=told):
        ke.weights.load(ke.EfficientNetB3(weights=None, include_top=False), tmp_path / "m.h5")

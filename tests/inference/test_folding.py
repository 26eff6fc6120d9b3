"""A folded model computes what the original computes, and keeps the layers that cannot be folded exactly."""

import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND, leading, run, trained

import keras_effnet as ke
from keras_effnet.inference.folding import for_inference

layers = keras.layers
SHAPE = (65, 65, 3)  # odd, so that strided convolutions pad both sides differently
NETS = ["b0", "edgetpu-s", "condconv-b0-4e", "v2-rw-t-gc"]
REST = [
    "lite0",
    "b1-pruned",
    "condconv-b0-8e-depth",
    "b1",
    "b2",
    "b3",
    "b4",
    "b5",
    "lite1",
    "lite2",
    "lite3",
    "lite4",
    "edgetpu-m",
    "edgetpu-l",
    "condconv-b0-8e",
    "v2-b0",
    "v2-rw-s",
    "x-b0",
    "h-b5-timm",
]


def pixels(shape, count=2):
    return np.random.default_rng(1).uniform(0, 255, (count, *shape)).astype("float32")


def kinds(model):
    return [type(layer).__name__ for layer in model._flatten_layers() if layer is not model]


def check(model, shape=SHAPE, tolerance=1e-5):
    folded = ke.fold_batch_norm(model)
    x = pixels(shape)
    expected = run(model, x)
    assert np.abs(run(folded, x) - expected).max() <= tolerance * np.abs(expected).max()
    return folded


@pytest.mark.parametrize("name", leading(NETS + REST, len(NETS)))
@pytest.mark.usefixtures("shallow")
def test_every_variant_folds_exactly(name):
    model = trained(ke.create_model(name, weights=None, input_shape=SHAPE, classes=10))
    # In random models, sums of experts' kernels grow without bound, and rounding errors with them.
    folded = check(model, tolerance=1e-4 if "condconv" in name else 1e-5)
    assert len(folded.layers) < 0.85 * len(model.layers) or "condconv" in name
    left = kinds(folded)
    assert ("BatchNormalization" in left) == ("condconv" in name)
    assert "Dropout" not in left and left.count("Rescaling") == 1  # all first convolutions pad
    (rescaling,) = (layer for layer in folded.layers if isinstance(layer, layers.Rescaling))
    assert np.all(np.asarray(rescaling.scale) == 1)
    assert folded.count_params() < model.count_params()
    # For an exporter: one size, float32, and the offset added to rows of pixels.
    x = pixels(SHAPE)
    assert run(for_inference(model, SHAPE), x) == pytest.approx(run(folded, x), rel=1e-4, abs=1e-6)


def test_keras_applications_net_folds(monkeypatch):
    table = sys.modules[keras.applications.EfficientNetB0.__module__]
    monkeypatch.setattr(table, "DEFAULT_BLOCKS_ARGS", [row | {"repeats": 1} for row in table.DEFAULT_BLOCKS_ARGS[:3]])
    model = trained(keras.applications.EfficientNetB0(weights=None, input_shape=SHAPE, classes=10))
    (normalization,) = (layer for layer in model.layers if isinstance(layer, keras.layers.Normalization))
    normalization.set_weights([np.array([0.4, 0.5, 0.6]), np.array([0.04, 0.05, 0.06]), np.array(0)])
    normalization.finalize_state()
    folded = check(model)
    assert not {"BatchNormalization", "Normalization", "Dropout"} & set(kinds(folded))


@pytest.mark.usefixtures("mini")
def test_a_net_that_was_built_on_is_one_graph():
    body = ke.EfficientNetLite0(include_top=False, weights=None, pooling="avg", input_shape=SHAPE)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.RandomFlip(),
            body,
            layers.Dropout(0.2),
            layers.BatchNormalization(),
            layers.Dense(5, name="stem_conv"),  # a layer of the body has the same name
        ]
    )
    folded = check(trained(model))
    assert not {"BatchNormalization", "Functional", "RandomFlip"} & set(kinds(folded))
    inputs = keras.Input(SHAPE)
    check(keras.Model(inputs, layers.Dense(3)(body(inputs / 2.0))))


def test_the_border_is_as_it_was():
    """A wrong fold of an offset into a convolution that pads would change the border of the image."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling([[[0.1, 0.2, 0.3]]], [[[5.0, -6.0, 7.0]]])(inputs)
    valid = check(keras.Model(inputs, layers.Conv2D(4, 3)(x)), (8, 8, 3))
    same = check(keras.Model(inputs, layers.Conv2D(4, 3, padding="same")(x)), (8, 8, 3))
    padded = check(keras.Model(inputs, layers.Conv2D(4, 3)(layers.ZeroPadding2D()(x))), (8, 8, 3))
    plain = check(keras.Model(inputs, layers.Conv2D(4, 3, padding="same")(layers.Rescaling(0.1)(inputs))), (8, 8, 3))
    depthwise = check(keras.Model(inputs, layers.DepthwiseConv2D(3, depth_multiplier=2)(x)), (8, 8, 3))
    assert ["Rescaling" in kinds(model) for model in (valid, same, padded, plain, depthwise)] == [
        False,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.usefixtures("mini")
def test_a_shared_rescaling_is_another_in_each_place():
    inputs = keras.Input((8, 8, 3))
    shared = layers.Rescaling(1 / 127.5, -1.0)
    conv = layers.Conv2D(4, 3, padding="same")(shared(inputs))
    model = keras.Model(inputs, [shared(layers.Rescaling(2.0)(inputs)), shared(inputs), conv])
    folded, x = ke.fold_batch_norm(model), pixels((8, 8, 3))
    for got, expected in zip(run(folded, x), run(model, x), strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    body = ke.EfficientNetLite0(include_top=False, weights=None, pooling="avg", input_shape=SHAPE)
    inputs = keras.Input(SHAPE)
    twice = keras.Model(inputs, layers.Add()([body(layers.Rescaling(0.5)(inputs)), body(inputs)]))
    check(trained(twice))


@pytest.mark.usefixtures("mini")
def test_an_ensemble_is_one_graph():
    inputs = keras.Input(SHAPE)
    nets = [ke.EfficientNetB0(weights=None, input_shape=SHAPE, classes=3, name=name) for name in ("one", "two")]
    model = trained(keras.Model(inputs, layers.Average()([net(inputs) for net in nets])))
    check(model)
    x = pixels(SHAPE)
    assert run(for_inference(model, SHAPE), x) == pytest.approx(run(model, x), rel=1e-4, abs=1e-6)


def test_names_that_meet_are_told_apart():
    inputs = keras.Input((4,))
    first, second = (
        keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense"), layers.Dense(4, name="dense_1")])
        for _ in range(2)
    )
    check(keras.Model(inputs, second(first(inputs))), (4,))


class Tripled(layers.BatchNormalization):
    def call(self, inputs, **kwargs):
        return 3 * super().call(inputs, **kwargs)


def test_a_layer_of_ones_own_is_left_alone():
    inputs = keras.Input((8, 8, 4))
    folded = check(keras.Model(inputs, Tripled()(layers.Conv2D(4, 1)(inputs))), (8, 8, 4))
    assert "Tripled" in kinds(folded)
    steps = keras.ops.cast(keras.ops.cast(inputs / 50, "int32"), "float32")
    model = keras.Model(inputs, steps)
    assert np.array_equal(run(for_inference(model, (8, 8, 4)), pixels((8, 8, 4))), run(model, pixels((8, 8, 4))))
    heads = layers.MultiHeadAttention(1, 2)(query=inputs, value=inputs)
    check(keras.Model(inputs, heads), (8, 8, 4))


def test_an_input_of_integers_is_cast():
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    model = keras.Model(inputs, layers.Conv2D(4, 3)(layers.Rescaling(1 / 255)(inputs)))
    folded, x = ke.fold_batch_norm(model), pixels((8, 8, 3)).astype("uint8")
    assert run(folded, x) == pytest.approx(run(model, x), rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("shallow")
def test_what_is_called_for_training_stays_so():
    inputs = keras.Input(SHAPE)
    dropped = keras.Model(inputs, layers.Dropout(0.5)(inputs, training=True))
    assert "Dropout" in kinds(ke.fold_batch_norm(dropped))
    body = ke.EfficientNetLite0(include_top=False, weights=None, input_shape=SHAPE)
    with pytest.raises(ValueError, match="called with training=True"):
        ke.fold_batch_norm(keras.Model(inputs, body(inputs, training=True)))


def test_what_others_use_too_is_left_alone():
    inputs = keras.Input((8, 8, 4))
    shared = layers.Conv2D(4, 3, padding="same")
    first = layers.BatchNormalization()(shared(inputs))
    second = layers.BatchNormalization(center=False, scale=False)(shared(first))
    seen = layers.Conv2D(4, 1, activation="relu")(second)
    twice = layers.Conv2D(4, 1)(seen)
    outputs = layers.Add()([layers.BatchNormalization()(twice), twice, layers.BatchNormalization()(seen)])
    model = trained(keras.Model(inputs, [outputs, first]))
    folded = ke.fold_batch_norm(model)
    assert kinds(folded).count("BatchNormalization") == 3 and kinds(folded).count("Conv2D") == 3
    x = pixels((8, 8, 4))
    for got, expected in zip(run(folded, x), run(model, x), strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        (lambda: layers.Conv2D(6, 3, groups=2, use_bias=False), 1),  # takes the scale of its output, not of its input
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, dilation_rate=2), 0),
        (lambda: layers.Conv2D(6, 1, padding="same"), 0),
        (lambda: layers.Dense(6), 0),
        (lambda: layers.SeparableConv2D(6, 3), 2),
        (lambda: layers.Conv2DTranspose(6, 3), 2),
    ],
)
def test_layers_between_two_normalisations(layer, left):
    inputs = keras.Input((8, 8, 4))
    x = layers.BatchNormalization()(inputs)
    x = layer()(x)
    x = layers.BatchNormalization(gamma_initializer="random_normal")(x)
    model = trained(keras.Model(inputs, layers.Rescaling(2.0, 1.0)(x)))
    affine = {"BatchNormalization", "Rescaling"}
    assert sum(kind in affine for kind in kinds(check(model, (8, 8, 4)))) == left


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow convolves channels first on GPUs only")
def test_channels_first_folds():
    model = ke.EfficientNetLite0(weights=None, input_shape=(3, 65, 65), classes=3, data_format="channels_first")
    check(trained(model), (3, 65, 65))


def test_statistics_that_are_of_the_batch_stay():
    inputs = keras.Input((8, 8, 4))
    outputs = layers.BatchNormalization()(layers.Conv2D(4, 1)(inputs), training=True)
    folded = check(keras.Model(inputs, outputs), (8, 8, 4))
    assert "BatchNormalization" in kinds(folded)


@pytest.mark.usefixtures("mini")
def test_a_folded_model_is_an_ordinary_one(tmp_path):
    folded = ke.fold_batch_norm(ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=3))
    folded.save(tmp_path / "folded.keras")
    x = pixels((32, 32, 3))
    assert np.array_equal(run(keras.saving.load_model(tmp_path / "folded.keras"), x), run(folded, x))


def test_what_cannot_be_seen_is_refused():
    class Mine(keras.Model):
        def call(self, inputs):
            return inputs

    for model in (Mine(), keras.Sequential([layers.Dense(2)]), "efficientnet-b0"):
        with pytest.raises(ValueError, match="Expected a functional or sequential model"):
            ke.fold_batch_norm(model)

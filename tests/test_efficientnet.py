"""Code written for keras.applications.efficientnet runs with only the import changed.

Each program below is run with both modules. Its nets have fewer blocks, in both, and random weights.
"""

import inspect
import sys
from importlib import import_module

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, leading, run, shallow_rows
from keras import layers

import keras_effnet as ke

THEIRS = keras.applications.efficientnet
QUICK = {"run_eagerly": True}  # compiling a step takes half a minute


@pytest.fixture
def fewer_blocks(shallow, monkeypatch):
    """Does to the nets of keras.applications what `shallow` does to ours."""
    table = sys.modules[THEIRS.EfficientNetB0.__module__]
    monkeypatch.setattr(table, "DEFAULT_BLOCKS_ARGS", shallow_rows())


# Theirs changes only with Keras, whose version CI holds.
@pytest.fixture(params=leading(["keras_effnet.efficientnet", "keras.applications.efficientnet"], 1))
def efficientnet(request, fewer_blocks):
    """The module that a program imports."""
    return import_module(request.param)


def photos(count: int, side: int):
    return 255 * np.random.default_rng(0).random((count, side, side, 3), "float32")


def test_names_and_arguments():
    names = {name for name in dir(THEIRS) if not name.startswith("_")}
    assert names == set(ke.efficientnet.__all__)
    for name in names:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (ke.efficientnet, THEIRS))
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[key].default == theirs[key].default for key in theirs if key != "name")
        assert getattr(ke, name) is getattr(ke.efficientnet, name)


def test_a_photo_is_classified_with_every_call_that_keras_applications_needs():
    from keras_effnet.efficientnet import decode_predictions, preprocess_input

    model = ke.EfficientNetLite0(weights="imagenet")
    photo = keras.utils.load_img(ROOT / "docs/cat.png", target_size=(224, 224))
    x = np.expand_dims(keras.utils.img_to_array(photo), axis=0)
    assert preprocess_input(x) is x and preprocess_input(x, data_format="channels_last") is x
    (found,) = decode_predictions(run(model, preprocess_input(x)), top=3)
    assert {name for _, name, _ in found} == {"Egyptian_cat", "tabby", "tiger_cat"}


# keras.io/examples/vision/image_classification_efficientnet_fine_tuning
def test_fine_tuning_in_two_phases(efficientnet):
    inputs = layers.Input((32, 32, 3))
    x = keras.Sequential([layers.RandomRotation(0.15), layers.RandomFlip()])(inputs)
    body = efficientnet.EfficientNetB0(include_top=False, input_tensor=x, weights=None)
    body.trainable = False
    x = layers.GlobalAveragePooling2D(name="avg_pool")(body.output)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.2, name="top_dropout")(x)
    model = keras.Model(inputs, layers.Dense(3, activation="softmax", name="pred")(x))
    images, targets = efficientnet.preprocess_input(photos(4, 32)), np.eye(3)[np.arange(4) % 3]

    def moved() -> set[str]:
        """Trains a step and returns the layers that they changed."""
        before = {layer.name: layer.get_weights() for layer in model.layers}
        model.fit(images, targets, batch_size=4, epochs=1, verbose=0)
        pairs = {layer.name: zip(before[layer.name], layer.get_weights(), strict=True) for layer in model.layers}
        return {name for name, values in pairs.items() if not all(np.array_equal(*pair) for pair in values)}

    model.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy", metrics=["accuracy"], **QUICK)
    changed = {name.rstrip("_0123456789") for name in moved()}
    assert changed - {"sequential"} == {"batch_normalization", "pred"}  # the seeds of the augmentation change too
    for layer in model.layers[-20:]:
        if not isinstance(layer, layers.BatchNormalization):
            layer.trainable = True
    model.compile(keras.optimizers.Adam(1e-5), "categorical_crossentropy", metrics=["accuracy"], **QUICK)
    convolutions = ("expand_conv", "dwconv", "se_reduce", "se_expand", "project_conv")
    assert moved() & {layer.name for layer in body.layers} == {
        *(f"block7a_{name}" for name in convolutions),
        "top_conv",
    }


# keras.io/examples/vision/grad_cam
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the example records gradients with TensorFlow's tape")
@pytest.mark.filterwarnings("ignore:The structure of `inputs`")  # the example builds on `model.inputs`, a list
def test_grad_cam(efficientnet):
    import tensorflow as tf

    model = efficientnet.EfficientNetB0(weights=None, input_shape=(96, 96, 3))
    model.layers[-1].activation = None
    for last_conv in ("top_conv", "top_activation"):
        both = keras.Model(model.inputs, [model.get_layer(last_conv).output, model.output])
        with tf.GradientTape() as tape:
            maps, predictions = both(efficientnet.preprocess_input(photos(1, 96)))
            channel = predictions[:, tf.argmax(predictions[0])]
        importance = tf.reduce_mean(tape.gradient(channel, maps), axis=(0, 1, 2))
        heatmap = tf.squeeze(maps[0] @ importance[..., tf.newaxis])
        heatmap = (tf.maximum(heatmap, 0) / tf.reduce_max(heatmap)).numpy()
        assert heatmap.shape == (3, 3) and np.isfinite(heatmap).all() and np.ptp(heatmap) > 0


SKIPS = [*(f"block{stage}a_expand_activation" for stage in (2, 3, 4, 6)), "top_activation"]


def test_a_u_net_on_the_activations(efficientnet):
    encoder = efficientnet.EfficientNetB0(include_top=False, weights=None, input_shape=(64, 64, 3))
    *skips, x = (encoder.get_layer(name).output for name in SKIPS)
    assert [skip.shape[2:] for skip in (*skips, x)] == [(32, 96), (16, 144), (8, 240), (4, 672), (2, 1280)]
    for skip in reversed(skips):
        x = layers.UpSampling2D()(x)
        x = layers.Concatenate()([x, skip])
        x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(1, 3, strides=2, padding="same", activation="sigmoid")(x)
    model = keras.Model(encoder.input, x)
    assert model.output_shape == (None, 64, 64, 1)
    before = model.get_layer("stem_conv").get_weights()[0]
    model.compile("adam", "binary_crossentropy", **QUICK)
    masks = np.random.default_rng(0).integers(0, 2, (2, 64, 64, 1)).astype("float32")
    (loss,) = model.fit(photos(2, 64), masks, epochs=1, verbose=0).history["loss"]
    assert np.isfinite(loss) and not np.array_equal(before, model.get_layer("stem_conv").get_weights()[0])


@pytest.mark.usefixtures("fewer_blocks")
def test_layers_have_the_same_names_types_and_outputs():
    # The others have no weights: layers for the pixels, and in theirs for padding and for the shape of a squeeze.
    others = ("rescaling", "normalization", "preprocessing", "_pad", "_se_squeeze", "_se_reshape")

    def shown(model) -> list:
        kept = [layer for layer in model.layers[1:] if not any(part in layer.name for part in others)]
        return [(layer.name, type(layer), layer.output.shape) for layer in kept]

    for arguments in ((True, None, None, (64, 64, 3), None, 10), (False, None, None, (64, 64, 3), "avg")):
        ours, theirs = (shown(module.EfficientNetB0(*arguments)) for module in (ke.efficientnet, THEIRS))
        assert ours == theirs and len(ours) > 80

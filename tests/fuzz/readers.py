"""What the files are read with: a reader raises ValueError or OSError, or checks that its result is well-formed.

Each reader imports what it needs, and no more.
"""

import contextlib
from pathlib import Path

import numpy as np


def tensors(path: Path) -> None:
    """Every tensor of a file of weights."""
    from keras_effnet.weights.formats import opening

    for raw in (False, True):
        with opening.opened(path, raw) as found:
            for name, stored in found.items():
                assert type(name) is str and all(type(side) is int and side >= 0 for side in stored.shape), name
                try:
                    array = stored.read()
                except MemoryError:
                    raise
                except Exception:  # matching.read_values() adds the file and the tensor
                    continue
                assert isinstance(array, np.ndarray) and array.shape == stored.shape, (name, array.shape)
                assert array.dtype.kind in "fiub" or array.dtype.name == "bfloat16", (name, array.dtype)
                assert float(array.astype(np.float64).sum()) is not None


def stated(path: Path) -> None:
    """What a file says besides its weights: the version of Keras, padding, pixels, numerics."""
    from keras_effnet.weights import convert, padding
    from keras_effnet.weights.formats import h5_file, keras_file, safetensors_file

    assert isinstance(h5_file.keras_version(path), str | None)
    assert isinstance(h5_file.model_config(path), str | None)
    assert isinstance(keras_file.preprocessing_of(path), tuple | None)
    assert isinstance(keras_file.numerics_of(path), keras_file.Numerics | None)
    told = safetensors_file.metadata_of(path)
    assert all(isinstance(each, str) for pair in told.items() for each in pair)
    assert padding.stated_padding(path) in (None, "same", "symmetric")
    convert.pixels_of(path)


def whole_model(path: Path) -> None:
    """A model of Keras 2: its description, and the variables of its layers."""
    from keras_effnet.weights.keras2.files import opened_model
    from keras_effnet.weights.keras2.rebuild import Place

    with opened_model(path) as old:
        if old is None:
            return
        assert type(old.class_name) is str and isinstance(old.config, dict | list) and old.variables >= 0
        names = ["stem_conv", "stem_bn", "predictions"]
        for number, (name, kind) in enumerate(zip(names, ["Conv2D", "BatchNormalization", "Dense"], strict=True)):
            for stored in old.find((Place(number, name, kind),)).values():
                with contextlib.suppress(Exception):
                    assert stored.read().shape == stored.shape


def rebuilt(path: Path) -> None:
    """A model of Keras 2, rebuilt in Keras 3."""
    import keras

    from keras_effnet.weights.keras2 import conversion, padding
    from keras_effnet.weights.keras2.files import opened_model

    keras.backend.clear_session()
    with opened_model(path) as old:
        if old is None:
            return
        assert isinstance(padding.difference(old.config, 224), str)
        try:
            model = conversion.model_of(old, path)
            assert isinstance(model, keras.Model) and isinstance(conversion.net_of(model), str)
        except conversion.ForeignLayerError:  # `convert` and `identify` catch it
            return
        assert isinstance(conversion.left_of(model), tuple)


def identified(path: Path) -> None:
    """What `keras-effnet identify` says of a file."""
    import keras_effnet as ke

    assert str(ke.weights.identify(path))


def loaded(path: Path) -> None:
    """A `.keras` file, loaded with all that travels with it."""
    import keras

    import keras_effnet as ke

    keras.backend.clear_session()
    assert isinstance(ke.load_model(path), keras.Model)


def graph(path: Path) -> None:
    """The objects of a checkpoint of TensorFlow 2."""
    from keras_effnet.weights.formats.tensorflow_checkpoint import read_graph

    found = read_graph(str(path))
    if found is None:
        return
    for variable in found.variables():
        assert variable.path and variable.title is not None and type(variable.key) is str
    for node in range(len(found.children)):
        assert isinstance(found.attributes(node), dict)


def beside(path: Path) -> None:
    """The config.json beside a file of weights."""
    from keras_effnet.weights import hub

    described = hub.describe(path.parent / "model.safetensors")
    assert described is None or (described.variant and described.padding in ("same", "symmetric"))


def preset(path: Path) -> None:
    """A preset of keras-hub, and what a net needs of it."""
    from keras_effnet.nets.normalization import constants
    from keras_effnet.weights import hub

    place = hub.local(path)
    described = hub.describe(place)
    if described is None:
        return
    net = described.net
    assert net is not None and net.blocks and net.head_filters > 0 and net.padding == "symmetric"
    assert all(0 <= rate < 1 for rate in net.drop_connect_rates)
    assert described.preprocessing is None or constants(described.preprocessing, described.preset.input_shape[-1])
    tensors(Path(place))


def image(path: Path) -> None:
    """An image, whole and as `load_image()` reads it."""
    import keras_effnet as ke
    from keras_effnet.images.decoding import decode_image

    for channels in (1, 3, 4):
        pixels = decode_image(path, channels)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == channels and pixels.size
        if pixels.size > 1 << 24:
            return
    for decode in ("exact", "fast"):
        ready = ke.load_image(path, "efficientnet-lite0", decode=decode)
        assert ready.shape == (224, 224, 3) and np.isfinite(ready).all()


def recipe(path: Path) -> None:
    """The recipe in the config.json of a run."""
    from keras_effnet.tpu.config import Recipe, from_json, to_json

    try:
        found = from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{error} {path.name}") from error  # it reads a text, and knows no file
    assert isinstance(found, Recipe)
    assert to_json(from_json(to_json(found))) == to_json(found)


def metadata(path: Path) -> None:
    """What travels with a model."""
    import keras_effnet as ke
    from keras_effnet.model_metadata import expects_in

    found = ke.metadata(path)
    assert isinstance(found, dict) and all(isinstance(key, str) for key in found)
    expects_in(found)


def export(path: Path) -> None:
    """An exported model, opened and run."""
    import keras_effnet as ke

    predictor = ke.Predictor(path, threads=1)
    if np.prod(predictor.input_shape) < 1 << 20:
        predictor(np.zeros(predictor.input_shape, "float32"))


READERS = {
    reader.__name__: reader
    for reader in (
        tensors,
        stated,
        whole_model,
        rebuilt,
        identified,
        loaded,
        graph,
        beside,
        preset,
        image,
        recipe,
        metadata,
        export,
    )
}

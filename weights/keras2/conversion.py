"""Converts whole models of Keras 2."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet import model_metadata
from keras_effnet.nets.normalization import constants
from keras_effnet.weights.formats.h5_file import MARK
from keras_effnet.weights.keras2 import comparison, padding
from keras_effnet.weights.keras2.files import OldModel, opened_model
from keras_effnet.weights.keras2.layers import Foreign, ForeignLayerError
from keras_effnet.weights.keras2.rebuild import rebuild

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Conversion:
    """What `convert()` has done.

    Args:
        model: String. Name of the model.
        path: String. The file that was saved.
        writer: String. The program that wrote the source, or empty where it was read by its names.
        left: Tuple of strings: what the source holds and the new file does not, and why.
        difference: Float, the largest difference of the outputs in their standard deviations, or None where they were
            not compared.
    """

    model: str
    path: str
    writer: str = ""
    left: tuple[str, ...] = ()
    difference: float | None = None


def convert(
    source_path,
    path,
    model: str | None,
    preprocessing: Any,
    labels: Sequence[str] | None,
    verify: bool,
) -> Conversion | Foreign | None:
    """Converts a whole model of Keras 2 to a `.keras` file.

    Args:
        source_path: Path of the file to convert.
        path: Path of the file to save.
        model: Name of the model that is expected, or None for any.
        preprocessing: See `convert.convert_file()`. A Rescaling layer in front of the model, or None for none.
        labels: List of class names, or None.
        verify: Boolean, whether to compare the outputs with those of a SavedModel.

    Returns:
        A `Conversion`; the first layer that Keras 3 cannot rebuild, as a `Foreign`; or None where the file holds no
        whole model of Keras 2.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the file is damaged, or holds no EfficientNet, or the outputs cannot be compared.
    """
    place = Path(source_path)
    if not place.exists():
        return None
    with opened_model(place) as old:
        if old is None:
            return None
        try:
            made = model_of(old, place)
            name = net_of(made)
        except ForeignLayerError as error:
            return error.foreign
    if model not in (None, name):
        raise ValueError(f"Expected {model!r}. Received: {str(place)!r}, which holds {name!r}")
    if verify and not old.saved_model:
        raise ValueError(f"Expected a SavedModel, which TensorFlow can run. Received: {str(place)!r} of {old.writer}")
    difference = comparison.check(made, place) if verify else None
    if preprocessing is not None:
        if _has_preprocessing(made):
            raise ValueError(
                f"Expected a model that takes normalized pixels. Received: {str(place)!r}, which normalizes them "
                "itself. Omit preprocessing"
            )
        pixels = image_input(made)
        if pixels is None:
            inputs = ", ".join(f"{each.name} {each.shape[1:]} of {each.dtype}" for each in made.inputs)
            raise ValueError(
                f"Expected a model with one input of images, to normalize them. Received: {str(place)!r}, whose inputs "
                f"are {inputs}. Omit preprocessing"
            )
        made = _rescaled(made, pixels, *constants(preprocessing, pixels.shape[-1]))
    model_metadata.save_model(made, path, labels)
    return Conversion(name, os.fspath(path), old.writer, left_of(made), difference)


def padding_of(path: Any, resolution: int) -> str:
    """Returns where a file's net pads otherwise than this package, in words.

    Args:
        path: Path of any file.
        resolution: Integer. See `padding.difference()`.

    Returns:
        String, empty where both agree, or the file describes no model of Keras 2.
    """
    if not Path(path).exists():
        return ""
    with opened_model(Path(path)) as old:
        return padding.difference(old.config, resolution) if old else ""


def left_of(model: "keras.Model") -> tuple[str, ...]:
    """Returns what a rebuilt model lacks, in words: the normalization of pixels, if its program did that itself.

    Args:
        model: A `keras.Model`.
    """
    if _has_preprocessing(model):
        return ()
    return (NO_PREPROCESSING if image_input(model) is not None else _NO_PREPROCESSING,)


def image_input(model: "keras.Model") -> Any:
    """Returns the only input of images of a model, or None.

    Args:
        model: A `keras.Model`.

    Returns:
        A Keras tensor of floats, or None where there are several, or none.
    """
    images = [tensor for tensor in model.inputs if len(tensor.shape) == 4 and "float" in str(tensor.dtype)]
    return images[0] if len(images) == 1 else None


def head_of(model: "keras.Model") -> tuple[str, ...]:
    """Returns the layers around the EfficientNet of a model, in words.

    Args:
        model: A `keras.Model` with one EfficientNet.
    """
    from keras_effnet import compat
    from keras_effnet.nets import inspection

    holder, _ = inspection.find(model, others=True)
    inside = {id(layer) for layer in holder.layers} if holder is not model else set()
    found = []
    for layer in compat.all_layers(model):
        kind, config = type(layer).__name__, layer.get_config()
        own = holder is model and (_OF_THE_NET.search(layer.name) or kind in ("Rescaling", "Normalization"))
        if id(layer) in inside or own or kind in ("InputLayer", "Functional", "Sequential"):
            continue
        values = [config.get(key) for key in ("units", "rate", "activation")]
        said = ", ".join(str(each) for each in values if each not in (None, "linear"))
        found.append(f"{kind}({said})" if said else kind)
    return tuple(found)


_OF_THE_NET = re.compile(r"(^|_)(stem_|block\d+[a-z]+_|top_conv|top_bn|top_activation)")


UNDESCRIBED = (
    "the SavedModel lacks the description of its layers that model.save() of Keras 2 writes to keras_metadata.pb. If "
    "model.export() wrote it, convert the original"
)


def is_undescribed(path: Any) -> bool:
    """Returns whether a path is a SavedModel that does not describe its layers.

    Args:
        path: Path of any file.
    """
    if not isinstance(path, str | os.PathLike) or not (Path(path) / "saved_model.pb").is_file():
        return False
    with opened_model(Path(path)) as old:
        return old is None


_NO_PREPROCESSING = "the normalization of pixels, which the program did before the model"

NO_PREPROCESSING = f"{_NO_PREPROCESSING}. To add it to the model, pass --preprocessing imagenet, inception or tpu127"


def net_of(model: "keras.Model") -> str:
    """Returns the name of the EfficientNet in a model.

    Args:
        model: A `keras.Model`.

    Raises:
        ForeignLayerError: If it has none, or several.
    """
    from keras_effnet.nets import inspection
    from keras_effnet.nets.variants import identify

    try:
        reading = inspection.find(model, others=True)[1]
    except ValueError as error:
        reason = "its layers are not those of one whole EfficientNet, as keras.applications names them"
        raise ForeignLayerError(Foreign(model.name, reason)) from error
    return identify(reading.architecture.blocks) or reading.architecture.name


def _has_preprocessing(model: "keras.Model") -> bool:
    """Returns whether a model normalizes the pixels of its net itself: between its input and the net."""
    from keras_effnet.nets import inspection

    holder, reading = inspection.find(model, others=True)
    return any(_normalizes(layer) for layer in _before(model, holder, reading.layers["stem_conv"]))


def _normalizes(layer: Any) -> bool:
    import keras

    kinds = (keras.layers.Rescaling, keras.layers.Normalization)
    return isinstance(layer, kinds) or (isinstance(layer, keras.Model) and any(map(_normalizes, layer.layers)))


def _before(model: Any, holder: Any, stem: Any) -> set[Any]:
    """Returns the layers of a model between its inputs and the first convolution of the net in a model in it."""
    from keras_effnet import compat

    target = stem
    if model is not holder:
        target = next(layer for layer in model.layers if layer is holder or holder in compat.all_layers(layer))
    parents: dict[Any, set[Any]] = {}
    tensors = list(model.outputs)
    while tensors:
        tensor = tensors.pop()
        layer, inputs = compat.producer(tensor), compat.inputs_of(tensor)
        before = {compat.producer(each) for each in inputs}
        if not before <= parents.setdefault(layer, set()):
            parents[layer] |= before
            tensors += inputs
    found, waiting = set(), [target]
    while waiting:
        new = parents.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found | (_before(target, holder, stem) if target is not stem else set())


def _rescaled(model: Any, pixels: Any, scale: list[float], offset: list[float]) -> "keras.Model":
    """Returns a model one of whose inputs takes pixels 0-255, for one that takes normalized ones."""
    import keras

    def fresh(tensor: Any) -> Any:
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)

    rescaling: Any = keras.layers.Rescaling
    layer = rescaling(scale, offset, name="preprocessing")
    inputs = keras.tree.map_structure(fresh, comparison.inputs_of(model))
    given = keras.tree.map_structure(lambda tensor: layer(tensor) if tensor.name == pixels.name else tensor, inputs)
    return keras.Model(inputs, model(given), name=model.name)


def model_of(old: OldModel, path: Path) -> "keras.Model":
    """Rebuilds a model of Keras 2 in Keras 3.

    Args:
        old: An `OldModel`, whose file is still open.
        path: Path to name in errors.

    Returns:
        A `keras.Model`.

    Raises:
        ForeignLayerError: If Keras 3 cannot rebuild a layer.
        ValueError: If the file is damaged, or has other variables than its model.
    """
    try:
        model, taken = rebuild(old.class_name, old.config, old.find)
        if taken != old.variables:
            raise ValueError(f"its layers have {taken} variables, and it holds {old.variables}")
    except ValueError as error:
        if isinstance(error, ForeignLayerError):
            raise
        raise ValueError(f"Expected a model of Keras 2. Received: {str(path)!r}, but {error}") from error
    _restore_names(model)
    return model


def _restore_names(model: "keras.Model") -> None:
    """Gives the layers of a renamed net the names by which it is recognized.

    Users of Keras 2 write `layer._name += "_2"` for each layer of a net, so that two nets fit in a model. What they put
    before or after the name of its first convolution is taken from the names of its other layers too.
    """
    import keras

    from keras_effnet.nets import inspection

    names = {layer.name for layer in model.layers}
    stems = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D) and MARK in layer.name]
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            _restore_names(layer)
        elif len(stems) == 1:
            front, _, back = stems[0].partition(MARK)
            name = layer.name[len(front) : len(layer.name) - len(back)]
            if layer.name == front + name + back and name not in names and inspection.LAYER.fullmatch(name):
                layer.name = name

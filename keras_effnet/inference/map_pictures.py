"""Draws class activation maps over photos, and a page of many."""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_effnet import ranges
from keras_effnet.inference import batches

TILE, MARGIN, BAND = 224, 8, 46  # pixels of a picture: a photo's side, between photos, and the text below

# Red, green and blue, and how much they cover the photo, of equal steps from nothing to the largest value of a map.
_COLORS = np.array(
    [(59, 15, 112, 0), (140, 41, 129, 0.5), (222, 73, 104, 0.8), (254, 159, 109, 0.95), (252, 253, 150, 1)]
)
_COMMENT = b"keras_effnet explain"  # in the file of each picture, which may then be replaced
_BAR, _TEXT, _FAINT = "#2f81c7", "#1b1f24", "#e6e8eb"


def overlay(image: Any, map: Any, strength: float = 0.7) -> np.ndarray:
    """Draws a class activation map over its image.

    The image loses its own colors, so that those of the map stand out.

    Args:
        image: Array (height, width, channels) of pixels 0-255, with 1, 3 or 4 channels.
        map: Array (rows, columns), as `explain()` returns it for an image. Values below 0 are left out.
        strength: Float from 0 to 1, how much of the image the largest value covers. Defaults to 0.7.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        ValueError: If an array has another shape, or `strength` is not valid.

    Example:

    >>> import keras_effnet as ke, numpy as np
    >>> ke.overlay(np.zeros((64, 64, 3)), np.eye(2)).shape
    (64, 64, 3)
    """
    pixels, values = np.asarray(image), np.asarray(map, "float32")
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or values.ndim != 2:
        raise ValueError(
            "Expected an image of shape (height, width, channels) and a map of shape (rows, columns). Received: "
            f"shapes {pixels.shape} and {values.shape}"
        )
    ranges.check(strength=(strength, float, ranges.SHARE))
    shown = batches.viewed(pixels)
    return np.asarray(_covered(Image.fromarray(shown), values, strength))


def _covered(photo: Image.Image, values: np.ndarray, strength: float = 0.7) -> Image.Image:
    """Covers a photo, without its own colors, with those of a map."""
    shares = np.maximum(values, 0) / max(float(values.max()), 1e-30)
    shares = np.asarray(Image.fromarray(shares).resize(photo.size, Image.Resampling.BICUBIC))
    steps = _table(strength)[np.rint(np.clip(shares, 0, 1) * 255).astype("uint8")]
    color, cover = Image.fromarray(steps[..., :3].copy()), Image.fromarray(steps[..., 3].copy())
    return Image.composite(color, photo.convert("L").convert("RGB"), cover)


@cache
def _table(strength: float) -> np.ndarray:
    """Returns the color of each of 256 steps, uint8 (256, 4)."""
    where = np.linspace(0, 255, len(_COLORS))
    columns = [np.interp(np.arange(256), where, column) for column in _COLORS.T]
    columns[3] *= 255 * strength
    return np.rint(np.stack(columns, 1)).astype("uint8")


def is_own_picture(path: str | os.PathLike) -> bool:
    """Returns whether a file is a picture of an explanation.

    Args:
        path: Path of the file.

    Returns:
        Boolean.
    """
    try:
        with open(path, "rb") as file:
            return _COMMENT in file.read(500)
    except OSError:
        return False


class Explanation:
    """The tiles of an explained photo: the photo as the model sees it, and a map over it for each class.

    Args:
        pixels: Array (height, width, channels) of pixels 0-255.
        predictions: List of dicts with `name` and `probability`.
        maps: Sequence of a map for each.
    """

    def __init__(self, pixels: np.ndarray, predictions: Sequence[dict[str, Any]], maps: Sequence[np.ndarray]):
        photo = Image.fromarray(pixels)
        photo = photo.resize((TILE, round(TILE * photo.height / photo.width)), Image.Resampling.BICUBIC)
        self.predictions = predictions
        self.tiles = [photo, *(_covered(photo, values) for values in maps)]

    def picture(self) -> bytes:
        """Returns all tiles as one JPEG, with the probabilities as bars."""
        step, height = TILE + MARGIN, self.tiles[0].height
        picture = Image.new("RGB", (step * len(self.tiles) - MARGIN, height + BAND), "white")
        draw = ImageDraw.Draw(picture)
        for place, tile in enumerate(self.tiles):
            picture.paste(tile, (place * step, 0))
            if place:
                _draw_bar(draw, place * step, height + 6, self.predictions[place - 1])
        return _jpeg(picture)

    def card(self, title: str) -> str:
        """Returns the HTML of the photo: its tiles, and a bar for each class.

        Args:
            title: String, what to call the photo.

        Returns:
            String.
        """
        figures = [_figure(self.tiles[0], "", f"<figcaption>{escape(title)}</figcaption>")]
        for tile, row in zip(self.tiles[1:], self.predictions, strict=True):
            share = f"{row['probability']:.1%}"
            caption = (
                f"<figcaption><b>{escape(row['name'])}</b><span>{share}</span>"
                f'<i style="width:{100 * row["probability"]:.1f}%"></i></figcaption>'
            )
            figures.append(_figure(tile, f"Places that support {row['name']}, {share}", caption))
        return f'<article aria-label="{escape(title)}">{"".join(figures)}</article>'


def _draw_bar(draw: ImageDraw.ImageDraw, left: int, top: int, row: dict[str, Any]) -> None:
    font = _font()
    share = f"{row['probability']:.1%}"
    room = TILE - font.getlength(share) - 10
    name = row["name"]
    while len(name) > 1 and font.getlength(name) > room:
        name = f"{name[:-2]}…"
    draw.text((left, top), name, _TEXT, font)
    draw.text((left + TILE, top), share, _TEXT, font, anchor="ra")
    draw.rectangle((left, top + 22, left + TILE - 1, top + 29), _FAINT)
    draw.rectangle((left, top + 22, left + max(1, round(row["probability"] * (TILE - 1))), top + 29), _BAR)


@cache
def _font() -> Any:
    return ImageFont.load_default(15)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, comment=_COMMENT)
    return file.getvalue()


def _figure(tile: Image.Image, alt: str, caption: str) -> str:
    data = base64.b64encode(_jpeg(tile)).decode()
    size = f'width="{tile.width}" height="{tile.height}"'
    return f'<figure><img {size} alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">{caption}</figure>'


GENERATOR = '<meta name="generator" content="keras_effnet explain">'

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #5c6570; --card: #f4f5f7; --line: #e0e3e7;
  --blue: #2f81c7; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --quiet: #9aa4af; --card: #22272e; --line: #333a43; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); }
h1 { font-size: 1.5rem; margin: 0; } p { color: var(--quiet); max-width: 44rem; }
article { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(9rem, 45%), 14rem)); gap: .6rem;
  padding: 1rem 0; border-top: 1px solid var(--line); }
figure { margin: 0; min-width: 0; } img { display: block; width: 100%; height: auto; border-radius: .3rem; }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere; color: var(--quiet); }
figcaption b { color: var(--text); font-weight: 600; margin-right: .5rem; }
figcaption i { display: block; height: .4rem; min-width: 1px; margin-top: .25rem; border-radius: .2rem;
  background: var(--blue); }
.error { border-left: 3px solid #c8553d; padding: .5rem .8rem; background: var(--card); overflow-wrap: anywhere; }
"""


def page(title: str, about: str, cards: Iterable[str]) -> Iterable[str]:
    """Yields the parts of an HTML page that needs no other file.

    Args:
        title: String.
        about: String, a sentence below the title.
        cards: Iterable of HTML, one part for each photo.

    Yields:
        Strings.
    """
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{GENERATOR}'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><p>{escape(about)}</p><main>\n"
    )
    for card in cards:
        yield f"{card}\n"
    yield "</main></body></html>\n"


def error_card(error: str) -> str:
    """Returns the HTML of a photo that cannot be read.

    Args:
        error: String.

    Returns:
        String.
    """
    return f'<p class="error">{escape(error)}</p>'

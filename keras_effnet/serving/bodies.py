"""Reads the images of a request: the body itself, the parts of a form, or base64 in JSON. No name in it is a path."""

import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from keras_effnet.errors import one_line
from keras_effnet.serving.limits import Limits

FIELD = "image"
_PART_HEAD = 1 << 13  # bytes of a part's headers
_RAW, _FORM, _JSON = "", "multipart/form-data", "application/json"


class BodyError(Exception):
    """A request that cannot be read.

    Args:
        status: Integer. The status to answer with.
        told: String. What was expected, and what was received.
    """

    def __init__(self, status: int, told: str):
        super().__init__(told)
        self.status = status


async def images_of(kind: str, body: AsyncIterator[bytes], limits: Limits) -> list[bytes | ValueError]:
    """Reads the images of a request.

    Args:
        kind: String. The request's `Content-Type`. All but forms and JSON are one image.
        body: The body's chunks. It ends the request where it becomes too large.
        limits: `Limits`.

    Returns:
        List of files' bytes. A string that is not base64 gives the error in its place.

    Raises:
        BodyError: If the body is not what its type says, or has no image or too many.
    """
    name, options = parse_options_header(kind.encode("latin-1"))
    readers = {_FORM: _Form, _JSON: _Json}
    reader = readers.get(name.decode("latin-1").lower(), _Raw)(options, limits)
    async for chunk in body:
        reader.write(chunk)
    return reader.images()


class _Raw:
    def __init__(self, options: dict[bytes, bytes], limits: Limits):
        self._body = bytearray()

    def write(self, chunk: bytes) -> None:
        self._body += chunk

    def images(self) -> list[bytes | ValueError]:
        return [bytes(self._body)]


class _Json(_Raw):
    """`{"images": ["base64", ...]}`."""

    def __init__(self, options: dict[bytes, bytes], limits: Limits):
        super().__init__(options, limits)
        self._most = limits.images

    def images(self) -> list[bytes | ValueError]:
        # Base64 has none of these: without the check, a body of 32 MB could be millions of empty lists.
        if sum(map(self._body.count, (b",", b"[", b"{"))) > self._most + 8:
            raise BodyError(413, _too_many(self._most))
        try:
            found: Any = json.loads(self._body)
        except (ValueError, RecursionError) as error:
            raise BodyError(400, f'Expected JSON: {{"images": ["base64", ...]}}. Received: {one_line(error)}') from None
        texts = found.get("images") if isinstance(found, dict) and len(found) == 1 else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise BodyError(
                400, 'Expected JSON: {"images": ["base64", ...]}, with at least one string. Received: other'
            )
        if len(texts) > self._most:
            raise BodyError(413, _too_many(self._most))
        return [_decoded(text) for text in texts]


def _decoded(text: str) -> bytes | ValueError:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters that are not ASCII
        return ValueError(f"Expected base64. Received: {len(text)} characters: {one_line(error)}")


class _Form:
    """The parts of a form. Each is an image, and called so."""

    def __init__(self, options: dict[bytes, bytes], limits: Limits):
        self._most = limits.images
        self._images: list[bytearray] = []
        self._name, self._value, self._head, self._ended = bytearray(), bytearray(), 0, False
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 70:  # RFC 2046, section 5.1.1
            raise BodyError(400, "Expected a boundary of 1 to 70 characters in Content-Type. Received: another one")
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_head,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BodyError(400, f"Expected multipart/form-data. Received: {one_line(error)}") from None

    def images(self) -> list[bytes | ValueError]:
        if not self._ended or not self._images:
            raise BodyError(400, f"Expected a form with fields called {FIELD}. Received: one that ends before")
        return [bytes(data) for data in self._images]

    def _begin(self) -> None:
        if len(self._images) == self._most:
            raise BodyError(413, _too_many(self._most))
        self._images.append(bytearray())
        self._disposition, self._head = b"", 0

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, more: int) -> None:
        self._head += more
        if self._head > _PART_HEAD:
            raise BodyError(413, f"Expected at most {_PART_HEAD} bytes of headers in a part. Received: more")

    def _on_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _on_head(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        if name != FIELD:
            raise BodyError(400, f"Expected fields called {FIELD}. Received: {one_line(name, 50)!r}")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._images[-1] += data[start:end]

    def _on_end(self) -> None:
        self._ended = True


def _too_many(most: int) -> str:
    return f"Expected at most {most} images in a request. Received: more"

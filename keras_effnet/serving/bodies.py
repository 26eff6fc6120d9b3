"""Reads the images of a request: the body itself, the parts of a form, or base64 in JSON. No name in it is a path."""

import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.multipart import parse_options_header

from keras_effnet.errors import one_line
from keras_effnet.serving.limits import Limits

FIELD = "image"
_PART_HEAD = 1 << 11  # bytes of a part's headers
_PARAMETERS = 16  # of the headers of a part: python-multipart takes milliseconds for a thousand
_TYPE = 1 << 10  # characters of the request's Content-Type
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
    if len(kind) > _TYPE:
        raise BodyError(400, f"Expected a Content-Type of at most {_TYPE} characters. Received: {len(kind)}")
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


class _Form(_Raw):
    """The parts of a form. Each is an image, and called so.

    The boundary is searched for in the whole body, which takes no longer for a hostile one. python-multipart's parser
    takes seconds for one: it visits the bytes after a boundary one by one.
    """

    def __init__(self, options: dict[bytes, bytes], limits: Limits):
        super().__init__(options, limits)
        self._most = limits.images
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 70:  # RFC 2046, section 5.1.1
            raise BodyError(400, "Expected a boundary of 1 to 70 characters in Content-Type. Received: another one")
        self._between = b"\r\n--" + boundary
        self._body.extend(b"\r\n")  # before the first boundary too

    def images(self) -> list[bytes | ValueError]:
        _, *parts = self._body.split(self._between, self._most + 1)
        self._body.clear()
        images: list[bytes | ValueError] = []
        for part in parts:
            if part.startswith(b"--"):
                if not images:
                    told = f"Expected multipart/form-data with at least one field called {FIELD}. Received: none"
                    raise BodyError(400, told)
                return images
            if len(images) == self._most:
                raise BodyError(413, _too_many(self._most))
            images.append(_content(part))
        raise BodyError(400, f"Expected multipart/form-data with fields called {FIELD}. Received: one that ends before")


def _content(part: bytearray) -> bytes:
    """Returns a part of a form without its headers."""
    end = part.find(b"\r\n\r\n", 0, _PART_HEAD)
    rest, *lines = part[: max(end, 0)].split(b"\r\n")
    told = ""
    if end < 0:
        told = f"whose parts have at most {_PART_HEAD} bytes of headers, each with CRLF"
    elif rest.strip(b" \t"):
        told = "with each boundary on a line of its own"
    elif part.count(b";", 0, end) > _PARAMETERS:
        told = f"whose parts have at most {_PARAMETERS} parameters"
    if told:
        raise BodyError(400, f"Expected multipart/form-data {told}. Received: another")
    name = b""
    for line in lines:
        key, _, value = line.partition(b":")
        if key.lower() == b"content-disposition":
            name = parse_options_header(bytes(value))[1].get(b"name", b"")
    if name != FIELD.encode():
        told = repr(one_line(name.decode("utf-8", "replace"), 50)) if name else "one without a name"
        raise BodyError(400, f"Expected fields called {FIELD}. Received: {told}")
    return bytes(part[end + 4 :])


def _too_many(most: int) -> str:
    return f"Expected at most {most} images in a request. Received: more"

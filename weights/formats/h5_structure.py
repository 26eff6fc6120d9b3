"""Reads parts of an h5 file from its bytes: HDF5 2.0 crashes, hangs or fills the memory if they are damaged.

Reference:
    HDF5 File Format Specification 3.0. Each function names its section.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from math import prod
from typing import BinaryIO, NamedTuple

Data = bytes | mmap.mmap

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

_LAYOUT, _ATTRIBUTE, _CONTINUATION, _ATTRIBUTE_INFO = 0x08, 0x0C, 0x10, 0x15  # kinds of messages
_SHARED = 2  # a flag of messages
_FIXED_LENGTH, _ANY_LENGTH = 3, 9  # kinds of types
_CHUNKED = 2  # a kind of layout
_NOWHERE = b"\xff" * 8

# How texts are stored: in a heap, or in the attribute and padded. A function takes the padding away.
_HEAP = "heap"
_PADDED = {
    "zero at the end": lambda text: text.partition(b"\0")[0],
    "zeros": lambda text: text.rstrip(b"\0"),
    "spaces": lambda text: text.rstrip(b"\0").rstrip(b" "),
}


def check(data: Data) -> None:
    """Raises for a file that HDF5 2.0 cannot cope with.

    Args:
        data: The whole file.

    Raises:
        ValueError: If the file does not begin as those of Keras do, or if parts of it link to each other in a circle.
    """
    _check_superblock(data)
    _check_free_space(data)
    _check_groups(data)


def _check_superblock(data: Data) -> None:
    """Raises for a file whose addresses and lengths do not have 8 bytes, and for a driver, whose size is not checked.

    Reference:
        "II.A. Disk Format: Level 0A - Format Signature and Superblock".
    """
    version = data[8:9]
    sizes = data[13:15] if version < b"\2" else data[9:11]
    drivers = {b"\0": data[48:56], b"\1": data[52:60]}
    if data[:8] != HDF5_SIGNATURE or sizes != b"\x08\x08" or drivers.get(version, _NOWHERE) != _NOWHERE:
        raise ValueError("it does not begin as the files of Keras do")


def _check_free_space(data: Data) -> None:
    """Raises if the free parts of a group's names link to each other in a circle: HDF5 lists them without end.

    Reference:
        "III.D. Disk Format: Level 1D - Local Heaps".
    """
    left = len(data) // 16 + 1  # free parts: they do not overlap
    for place in _places(data, b"HEAP\0\0\0\0"):
        size, free, address = _numbers(data, place + 8, 3) or (0, 0, 0)
        while free + 16 <= size and address + free + 16 <= len(data):
            left -= 1
            if not left:
                raise ValueError("its free parts link in a circle")
            (free,) = _numbers(data, address + free, 1)


def _check_groups(data: Data) -> None:
    """Raises if parts of groups link to each other in a circle, or two of them to one: HDF5 follows all links.

    Reference:
        "III.A.1. Disk Format: Level 1A1 - Version 1 B-trees".
    """
    levels = {place: data[place + 5] for place in _places(data, b"TREE\0") if place + 24 <= len(data)}
    linked: set[int] = set()
    for place, level in levels.items():
        (used,) = struct.unpack("<H", data[place + 6 : place + 8])
        for child in _numbers(data, place + 24, 2 * used)[1::2]:
            if child in linked or levels.get(child, level - 1) != level - 1:
                raise ValueError("its groups link in a circle")
            linked.add(child)


def _places(data: Data, start: bytes) -> Iterator[int]:
    place = data.find(start)
    while place >= 0:
        yield place
        place = data.find(start, place + 1)


def _numbers(data: Data, place: int, count: int) -> tuple[int, ...]:
    """Returns numbers of 8 bytes, or none where the file ends before."""
    part = data[place : place + 8 * count]
    return struct.unpack(f"<{count}Q", part) if len(part) == 8 * count else ()


class Attribute(NamedTuple):
    """An attribute, before its value is read.

    Args:
        shape: Tuple of integers.
        size: Integer, the bytes of one entry.
        stored: String. How its texts are stored, or `""` if it has none that can be read.
        value: Bytes. All entries.
    """

    shape: tuple[int, ...] = ()
    size: int = 0
    stored: str = ""
    value: bytes = b""


class Headers:
    """The headers of the objects in an h5 file: groups and datasets.

    Headers and what they point to are read once, and together no more than the file's size: in a valid file, they do
    not overlap.

    Args:
        file: Binary file, open while this is used.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        self._objects: dict[int, tuple[dict[str, Attribute], bytes]] = {}
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}
        # Bytes that may still be read. Texts may be read twice.
        self._left, self._texts_left = self._size, 2 * self._size

    def attributes(self, address: int) -> dict[str, Attribute]:
        """Returns the attributes of a group or dataset.

        Args:
            address: Integer, that of the object's header.

        Raises:
            ValueError: If the header is damaged.

        Reference:
            "IV.A.2.m. The Attribute Message" and "IV.A.2.v. The Attribute Info Message".
        """
        return self._object(address)[0]

    def _object(self, address: int) -> tuple[dict[str, Attribute], bytes]:
        """Returns the attributes of a group or dataset, and the layout of a dataset."""
        if address not in self._objects:
            found, layout = {}, b""
            try:
                for kind, flags, body in self._messages(address):
                    if kind == _ATTRIBUTE_INFO and body[4 if body[1] & 1 else 2 :][:8] != _NOWHERE:
                        raise ValueError(
                            "its attributes are stored apart, in a format that is not read. Save it again without "
                            "libver and track_order"
                        )
                    if kind == _ATTRIBUTE and not flags & _SHARED:
                        name, attribute = _attribute(body)
                        found[name] = attribute
                    if kind == _LAYOUT:
                        layout = body
            except (struct.error, IndexError) as error:
                raise ValueError("an object in it has a damaged header") from error
            self._objects[address] = found, layout
        return self._objects[address]

    def check_chunks(self, address: int) -> None:
        """Raises if the tree of a dataset's chunks is damaged. HDF5 does not end where nodes link in a circle.

        Args:
            address: Integer, that of the dataset's header.

        Reference:
            "III.A.1. Disk Format: Level 1A1 - Version 1 B-trees" and "IV.A.2.i. The Data Layout Message".
        """
        layout = self._object(address)[1].ljust(16, b"\0")
        sides, kind = (layout[2], layout[1]) if layout[0] == 3 else layout[1:3]
        if layout[0] > 3 or kind != _CHUNKED:  # no tree, or another one with checksums
            return
        root = layout[3:11] if layout[0] == 3 else layout[8:16]
        key = 8 + 8 * sides
        waiting = [] if root == _NOWHERE else [(int.from_bytes(root, "little"), None)]
        for place, expected in waiting:
            start = self._part(place, 24)
            level, used = struct.unpack_from("<BH", start, 5)
            if start[:5] != b"TREE\1" or expected not in (None, level):
                raise ValueError("the chunks of a dataset are damaged")
            if level:
                children = struct.iter_unpack(f"<{key}xQ", self._part(place + 24, used * (key + 8)))
                waiting += [(child, level - 1) for (child,) in children]

    def values(self, attribute: Attribute) -> list[bytes]:
        """Returns the texts of an attribute.

        Args:
            attribute: `Attribute` that has texts.

        Raises:
            ValueError: If they are damaged.
        """
        if attribute.stored != _HEAP:
            places = range(0, len(attribute.value), attribute.size)
            without_padding = _PADDED[attribute.stored]
            return [without_padding(attribute.value[place : place + attribute.size]) for place in places]
        found = []
        for length, heap, index in struct.iter_unpack("<IQI", attribute.value):
            start, stored = self._heap(heap).get(index, (0, 0)) if length else (0, 0)
            self._texts_left -= length
            if length > stored or self._texts_left < 0:
                raise ValueError("a text in it is damaged")
            found.append(self._read(start, length).partition(b"\0")[0])
        return found

    def _read(self, place: int, length: int) -> bytes:
        if place + length > self._size:
            raise ValueError("it is cut")
        self._file.seek(place)
        return self._file.read(length)

    def _part(self, place: int, length: int) -> bytes:
        self._left -= length
        if self._left < 0:
            raise ValueError("its parts overlap")
        return self._read(place, length)

    def _messages(self, address: int) -> Iterator[tuple[int, int, bytes]]:
        """Yields the kind, the flags and the body of each message in an object's header.

        Reference:
            "IV.A.1. Data Object Headers" and "IV.A.2.q. The Object Header Continuation Message".
        """
        start = self._read(address, 6)
        is_new = start[:5] == b"OHDR\2"
        if is_new:
            flags = start[5]
            place = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
            width = 1 << (flags & 3)
            layout = "<BHB2x" if flags & 4 else "<BHB"
        elif start[:1] == b"\1":
            place, width, layout = address + 8, 8, "<HHB3x"
        else:
            raise ValueError("an object in it has no header")
        # The old length has 4 bytes, and 4 of padding.
        length = int.from_bytes(self._part(place, width)[: 8 if is_new else 4], "little")
        blocks = [(place + width, length)]
        for number, (place, length) in enumerate(blocks):
            block = self._part(place, length)
            if is_new and number:  # a signature before the messages, and a checksum after them
                block = block[4:-4]
            at, head = 0, struct.calcsize(layout)
            while at + head <= len(block):
                kind, size, flags = struct.unpack_from(layout, block, at)
                body = block[at + head : at + head + size]
                if len(body) < size:
                    raise ValueError("an object in it has a damaged header")
                yield kind, flags, body
                if kind == _CONTINUATION:
                    blocks.append(struct.unpack_from("<QQ", body))
                at += head + size

    def _heap(self, address: int) -> dict[int, tuple[int, int]]:
        """Returns a dict from the index of a text in a heap to its place and its length.

        Reference:
            "III.E. Level 1E - Global Heap".
        """
        if address not in self._heaps:
            start = self._part(address, 16)
            size = int.from_bytes(start[8:], "little")
            if start[:8] != b"GCOL\1\0\0\0" or size < 16:
                raise ValueError("a text in it is damaged")
            data, found, place = self._part(address + 16, size - 16), {}, 0
            while place + 16 <= len(data):
                index, length = struct.unpack_from("<H6xQ", data, place)
                if not index:  # the free space at the end
                    break
                found[index] = (address + 16 + place + 16, length)
                place += 16 + -(-length // 8) * 8
                if place > len(data):
                    raise ValueError("a text in it is damaged")
            self._heaps[address] = found
        return self._heaps[address]


def _attribute(body: bytes) -> tuple[str, Attribute]:
    """Returns the name and the attribute in a message."""
    version, flags, *lengths = struct.unpack_from("<BBHHH", body)
    place, parts = 9 if version == 3 else 8, []
    for length in lengths:
        parts.append(body[place : place + length])
        place += -(-length // 8) * 8 if version == 1 else length
    name = parts[0].partition(b"\0")[0].decode(errors="surrogateescape")
    if version not in (1, 2, 3) or (version > 1 and flags):  # a type that is stored elsewhere
        return name, Attribute()
    (size, stored), shape = _type(parts[1]), _shape(parts[2])
    if shape is None:
        return name, Attribute()
    value = body[place : place + size * prod(shape)] if stored else b""
    if stored and len(value) < size * prod(shape):
        raise ValueError(f"its attribute {name[:80]!r} is cut")
    return name, Attribute(shape, size, stored, value)


def _type(body: bytes) -> tuple[int, str]:
    """Returns the bytes that an entry takes, and how texts are stored, or `""` where the type is another.

    Reference:
        "IV.A.2.d. The Datatype Message".
    """
    kind, flags, size = struct.unpack_from("<BB2xI", body)
    if kind & 15 == _FIXED_LENGTH and size:
        return size, dict(enumerate(_PADDED)).get(flags & 15, "")
    if kind & 15 == _ANY_LENGTH and flags & 15 == 1 and size == 16 and body[12:16] == b"\1\0\0\0":
        return size, _HEAP
    return size, ""


def _shape(body: bytes) -> tuple[int, ...] | None:
    """Returns the shape of an attribute, or None where it has no value.

    Reference:
        "IV.A.2.b. The Dataspace Message".
    """
    version, rank, _, kind = struct.unpack_from("<BBBB", body)
    if version not in (1, 2):
        raise ValueError("an attribute in it has no shape")
    return None if version == 2 and kind == 2 else struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)

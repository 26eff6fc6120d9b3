"""Reads HDF5 files as Keras writes them, in Python: HDF5 2.0 crashes, hangs or fills the memory over damaged files.

Reference:
    HDF5 File Format Specification 3.0. Each function names its section.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from math import prod
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"

# Kinds of messages in the header of an object.
_SPACE, _LINKS, _TYPE, _LINK, _EXTERNAL, _LAYOUT = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08
_FILTERS, _ATTRIBUTE, _CONTINUATION, _SYMBOLS, _ATTRIBUTES = 0x0B, 0x0C, 0x10, 0x11, 0x15
# An item has one of each, or a few attributes, in its own header.
_ONCE = (_SPACE, _TYPE, _LAYOUT, _FILTERS, _ATTRIBUTE, _SYMBOLS)
_SHARED = 2  # a flag of messages: the body is stored elsewhere
_NOWHERE = b"\xff" * 8

_INTEGER, _FLOAT, _TEXT, _OPAQUE, _TEXT_IN_HEAP = 0, 1, 3, 5, 9  # kinds of types
_COMPACT, _CONTIGUOUS, _CHUNKED = 0, 1, 2  # kinds of layouts
_DEFLATE, _SHUFFLE = 1, 2  # filters

# Offset, precision, place and size of the exponent and of the mantissa, and bias of IEEE's numbers by their bytes.
_FLOATS = {2: (0, 16, 10, 5, 0, 10, 15), 4: (0, 32, 23, 8, 0, 23, 127), 8: (0, 64, 52, 11, 0, 52, 1023)}

_UNUSUAL = "is stored in a format that is not read. Save the file again with h5py's default options"
_TOO_MUCH = "its datasets declare more bytes than it has"
_LONG_TYPE = 1000  # bytes of the description of a type. HDF5 fills the memory for one of 64 KB, of types in types

# How texts are stored: in a heap, or in the attribute and padded. A function takes the padding away.
_HEAP = "heap"
_PADDED: dict[str, Callable[[bytes], bytes]] = {
    "zero at the end": lambda text: text.partition(b"\0")[0],
    "zeros": lambda text: text.rstrip(b"\0"),
    "spaces": lambda text: text.rstrip(b"\0").rstrip(b" "),
}


def most_unpacked(size: int) -> int:
    """Returns how many bytes of weights a file may unpack to. Keras does not compress them.

    Args:
        size: Integer, the bytes of the file.
    """
    return (64 << 20) + 20 * size


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


class Item:
    """A group or a dataset.

    Args:
        address: Integer. Two items with the same address are the same.
        messages: Dict from the kind of a message to the bodies of those in the item's header.
        attributes: Dict from name to `Attribute`.
    """

    def __init__(self, address: int, messages: dict[int, list[bytes]], attributes: dict[str, Attribute]):
        self.address = address
        self.messages = messages
        self.attributes = attributes

    @property
    def is_dataset(self) -> bool:
        """Whether it is a dataset."""
        return _LAYOUT in self.messages

    @property
    def is_group(self) -> bool:
        """Whether it is a group. A type that has a name is neither."""
        return not self.is_dataset and not self.messages.keys().isdisjoint((_SYMBOLS, _LINKS, _LINK))


class Dataset(NamedTuple):
    """The numbers of an item.

    Args:
        shape: Tuple of integers.
        dtype: `np.dtype`.
        is_chunked: Boolean. Whether it may be compressed.
        read: Function. Returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    is_chunked: bool
    read: Callable[[], np.ndarray]


class File:
    """An HDF5 file.

    What describes the data is read once, and together no more than the file's size: in a valid file, its parts do not
    overlap. So the time and the memory that a file takes follow from its size. Checksums of headers are not compared.

    Args:
        file: Binary file, open while this is used.

    Raises:
        ValueError, IndexError or struct.error: If it is not an HDF5 file, or damaged. So do all methods.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._lock = Lock()
        self._size = file.seek(0, os.SEEK_END)
        self._left = self._size  # bytes of descriptions that may still be read
        self._names_left, self._texts_left = 2 * self._size, 4 * self._size  # texts are read where they are asked for
        self._data_left, self._unpacked_left = self._size, most_unpacked(self._size)
        self._items: dict[int, Item] = {}
        self._members: dict[int, dict[str, int]] = {}
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}
        self.root = self._item(self._root_address())

    # Groups

    def items(self) -> Iterator[tuple[str, Item]]:
        """Yields the path and the item of each group and dataset, once, in the order of their names."""
        seen: set[int] = set()
        waiting = [("", self.root.address)]
        while waiting:
            path, address = waiting.pop()
            if address in seen:
                continue
            seen.add(address)
            item = self._item(address)
            if path:
                yield path, item
            if item.is_group:
                members = self.members(item)
                self._spend_names(len(path) * len(members))
                waiting += [(f"{path}/{name}" if path else name, members[name]) for name in reversed(members)]

    def find(self, group: Item, path: str) -> Item:
        """Returns a member of a group.

        Args:
            group: `Item`.
            path: String. Names separated by slashes.

        Raises:
            ValueError: If there is no such member, or if it is a link to another name.
        """
        for name in filter(None, path.split("/")):
            members = self.members(group) if group.is_group else {}
            if name not in members:
                raise ValueError(f"{path[:80]!r} is not in this file")
            group = self._item(members[name])
        return group

    def members(self, group: Item) -> dict[str, int]:
        """Returns a dict from the names of a group's members to their addresses. Links to other names are left out.

        Args:
            group: `Item`.
        """
        if group.address not in self._members:
            found: dict[bytes, int] = {}
            for body in group.messages.get(_SYMBOLS, ()):
                found |= self._symbols(*struct.unpack_from("<QQ", body))
            for body in group.messages.get(_LINKS, ()):
                if body[10 if body[1] & 1 else 2 :][:8] != _NOWHERE:
                    raise ValueError(f"a group in it {_UNUSUAL}")
            found |= dict(filter(None, map(_link, group.messages.get(_LINK, ()))))
            if any(not name or name == b"." or b"/" in name for name in found):
                raise ValueError("the names in a group are damaged")
            self._members[group.address] = {
                name.decode(errors="surrogateescape"): address for name, address in sorted(found.items())
            }
        return self._members[group.address]

    def _symbols(self, tree: int, heap: int) -> dict[bytes, int]:
        """Returns the members of a group in the old format.

        Reference:
            "III.A.1. Version 1 B-trees", "III.B. Symbol Table Nodes", "III.C. Symbol Table Entry" and "III.D. Local
            Heaps".
        """
        start, size, free, data = struct.unpack("<8sQQQ", self._part(heap, 32))
        if start[:5] != b"HEAP\0":
            raise ValueError("the names in a group are damaged")
        names, found = self._part(data, size), {}
        while free != 1 and free + 16 <= size:  # free parts, which HDF5 lists when it opens the group
            self._spend(16)
            (free,) = struct.unpack_from("<Q", names, free)
        for (node,) in self._leaves(tree, 0, "<8xQ"):
            start, count = struct.unpack("<6sH", self._part(node, 8))
            if start[:5] != b"SNOD\1":
                raise ValueError("a group in it is damaged")
            for place, address, link in struct.iter_unpack("<QQI20x", self._part(node + 8, 40 * count)):
                if link < 2:  # no link to another name
                    name = names[place : names.index(b"\0", place)]
                    self._spend_names(len(name))
                    found[name] = address
        return found

    def _leaves(self, root: int, kind: int, layout: str) -> Iterator[Any]:
        """Yields the entries of the lowest nodes of a tree, each a tuple that ends with an address.

        Args:
            root: Integer. Address of the tree.
            kind: Integer. 0 for groups, 1 for chunks.
            layout: String. A format of `struct`, of a key and the address after it.

        Reference:
            "III.A.1. Version 1 B-trees".
        """
        size = struct.calcsize(layout)
        waiting: list[tuple[int, int | None]] = [(root, None)]
        while waiting:
            place, expected = waiting.pop()
            start, level, used = struct.unpack("<5sBH16x", self._part(place, 24))
            if start != b"TREE" + bytes([kind]) or expected not in (None, level):
                raise ValueError("a tree in it is damaged")
            entries = [*struct.iter_unpack(layout, self._part(place + 24, used * size))]
            if level:
                waiting += [(entry[-1], level - 1) for entry in reversed(entries)]
            else:
                yield from entries

    # Attributes

    def text(self, item: Item, name: str) -> str | None:
        """Returns an attribute that is a text, or None if there is no such attribute.

        Args:
            item: `Item`.
            name: String. The name of the attribute.

        Raises:
            ValueError: If the attribute is not a text, or damaged.
        """
        attribute = item.attributes.get(name)
        if attribute is None:
            return None
        if not attribute.stored or attribute.shape:
            raise ValueError(f"its attribute {name!r} is not a text")
        return self._texts(attribute)[0].decode(errors="replace")

    def names(self, group: Item, name: str) -> Iterator[str]:
        """Yields a list of names. Keras splits those that are too long for one attribute.

        Args:
            group: `Item`.
            name: String. The name of the attribute, without the number of a part.

        Raises:
            ValueError: If there is no such attribute, if it is not a list of texts, or if it is damaged.
        """
        parts: list[str] = []
        while name not in group.attributes and f"{name}{len(parts)}" in group.attributes:
            parts.append(f"{name}{len(parts)}")
        for part in parts or [name]:
            attribute = group.attributes.get(part)
            if attribute is None:
                raise ValueError(f"it has no attribute {part!r}")
            if attribute.shape == (0,):  # the names of a layer without weights, an empty list of numbers
                continue
            if not attribute.stored or len(attribute.shape) != 1:
                raise ValueError(f"its attribute {part!r} is not a list of names")
            for each in self._texts(attribute):
                yield each.decode()

    def _texts(self, attribute: Attribute) -> list[bytes]:
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

    def _heap(self, address: int) -> dict[int, tuple[int, int]]:
        """Returns a dict from the index of a text in a heap to its place and its length.

        Reference:
            "III.E. Global Heap".
        """
        if address not in self._heaps:
            start, size = struct.unpack("<8sQ", self._part(address, 16))
            if start != b"GCOL\1\0\0\0" or size < 16:
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

    # Datasets

    def check(self) -> None:
        """Reads all that Keras may read with HDF5, and raises if it is damaged."""
        for path, item in self.items():
            for name in ("dtype", "name"):
                attribute = item.attributes.get(name)
                if attribute is not None and attribute.stored:
                    self._texts(attribute)
            if item.is_dataset:
                dataset = self.dataset(item, path, any_type=True)
                size, stored = _text_type(item.messages[_TYPE][0])
                if stored == _HEAP:
                    self._texts(Attribute(dataset.shape, size, stored, dataset.read().tobytes()))
                elif dataset.is_chunked:
                    dataset.read()

    def dataset(self, item: Item, path: str, any_type: bool = False) -> Dataset:
        """Returns the numbers of a dataset. Call it once for each dataset: their bytes are counted.

        Args:
            item: `Item` of a dataset.
            path: String. Its path, to name in errors.
            any_type: Boolean. Whether values of other types are returned as opaque ones. Defaults to False.

        Raises:
            ValueError: If it stores no numbers, none in this file, or none in a way that Keras stores them.

        Reference:
            "IV.A.2.i. The Data Layout Message".
        """
        if not item.is_dataset:
            raise ValueError(f"{path[:80]!r} is not a dataset")
        (space,), (kind,), (layout,) = (item.messages.get(each, [b""]) for each in (_SPACE, _TYPE, _LAYOUT))
        dtype, shape = _number_type(kind), _shape(space)
        if any_type and len(kind) <= _LONG_TYPE:
            dtype = dtype or np.dtype(f"V{int.from_bytes(kind[4:8], 'little')}")
            shape = (0,) if shape is None else shape
        if dtype is None or shape is None or _EXTERNAL in item.messages:
            raise ValueError(f"{path[:80]!r} stores no numbers in this file")
        whole, version, form = prod(shape) * dtype.itemsize, layout[0], layout[1]
        if version not in (3, 4, 5) or form > _CHUNKED or (form == _CHUNKED and version > 3):
            raise ValueError(f"{path[:80]!r} {_UNUSUAL}")
        if form == _CHUNKED:
            chunks = self._chunks(item, layout, shape, dtype)
            return Dataset(shape, dtype, True, lambda: self._assembled(chunks, shape, dtype))
        inside = layout[4:] if form == _COMPACT else b""
        place, size = (0, len(inside)) if form == _COMPACT else struct.unpack_from("<QQ", layout, 2)
        self._data_left -= whole
        if self._data_left < 0 or (whole and (size < whole or place + whole > self._size)):  # or it was never written
            raise ValueError(_TOO_MUCH)

        def read() -> np.ndarray:
            data = np.frombuffer(bytearray(inside[:whole]), np.uint8) if inside else self._array(place, whole)
            return data.view(dtype).reshape(shape)

        return Dataset(shape, dtype, False, read)

    def _chunks(self, item: Item, layout: bytes, shape: tuple[int, ...], dtype: np.dtype) -> "_Chunks":
        """Returns where the chunks of a dataset are."""
        filters = _filters(item.messages.get(_FILTERS, [b""])[0], dtype)
        sides, root = struct.unpack_from(f"<{layout[2]}I", layout, 11), layout[3:11]
        found: dict[tuple[int, ...], tuple[int, int, int]] = {}
        if root != _NOWHERE:
            entries = self._leaves(int.from_bytes(root, "little"), 1, f"<II{layout[2]}QQ")
            found = {tuple(place[:-1]): (address, size, skipped) for size, skipped, *place, address in entries}
        *chunk, itemsize = sides
        if len(chunk) != len(shape) or itemsize != dtype.itemsize or not all(chunk):
            raise ValueError("the chunks of a dataset are damaged")
        expected = prod(-(-side // step) for side, step in zip(shape, chunk, strict=True))
        fits = all(
            all(start % step == 0 and start < side for start, step, side in zip(place, chunk, shape, strict=True))
            and address + size <= self._size
            for place, (address, size, _) in found.items()
        )
        self._data_left -= sum(size for _, size, _ in found.values())
        self._unpacked_left -= len(found) * prod(sides)
        if len(found) != expected or not fits or self._data_left < 0 or self._unpacked_left < 0:
            raise ValueError(_TOO_MUCH)
        return _Chunks(tuple(chunk), filters, found)

    def _assembled(self, chunks: "_Chunks", shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        found = np.empty(shape, dtype)
        size = prod(chunks.sides) * dtype.itemsize
        for start, (address, stored, skipped) in chunks.places.items():
            data: Any = self._array(address, stored)
            for number, kind in reversed([*enumerate(chunks.filters)]):
                if skipped >> number & 1:
                    continue
                if kind == _DEFLATE:
                    data = np.frombuffer(_inflated(data, size + 1), np.uint8)
                elif len(data) == size:  # shuffled: the first bytes of all numbers, the second bytes, ...
                    data = np.ascontiguousarray(data.reshape(dtype.itemsize, -1).T).reshape(-1)
            if len(data) != size:
                raise ValueError("the chunks of a dataset are damaged")
            place = tuple(slice(first, first + side) for first, side in zip(start, chunks.sides, strict=True))
            part = found[place]
            part[...] = data.view(dtype).reshape(chunks.sides)[tuple(map(slice, part.shape))]
        return found

    # Bytes

    def _root_address(self) -> int:
        """Returns the address of the group that contains all others.

        Reference:
            "II.A. Format Signature and Superblock".
        """
        start = self._read(0, min(96, self._size))
        version = start[8:9]
        sizes = start[13:15] if version < b"\2" else start[9:11]
        drivers = {b"\0": start[48:56], b"\1": start[52:60]}
        roots = {b"\0": start[64:72], b"\1": start[68:76], b"\2": start[36:44], b"\3": start[36:44]}
        usual = sizes == b"\x08\x08" and drivers.get(version, _NOWHERE) == _NOWHERE and version in roots
        if start[:8] != SIGNATURE or not usual:
            raise ValueError("it does not begin as the files of Keras do")
        return int.from_bytes(roots[version], "little")

    def _item(self, address: int) -> Item:
        """Returns a group or a dataset.

        Reference:
            "IV.A.2.m. The Attribute Message" and "IV.A.2.v. The Attribute Info Message".
        """
        if address not in self._items:
            messages: dict[int, list[bytes]] = {}
            attributes: dict[str, Attribute] = {}
            for kind, flags, body in self._messages(address):
                if kind == _ATTRIBUTES and body[4 if body[1] & 1 else 2 :][:8] != _NOWHERE:
                    raise ValueError(f"an attribute in it {_UNUSUAL}")
                if kind == _ATTRIBUTE and not flags & _SHARED:
                    name, attribute = _attribute(body)
                    attributes[name] = attribute
                elif kind in _ONCE and (flags & _SHARED or kind in messages):
                    raise ValueError(f"a group or a dataset in it {_UNUSUAL}")
                else:
                    messages.setdefault(kind, []).append(body)
            self._items[address] = Item(address, messages, attributes)
        return self._items[address]

    def _messages(self, address: int) -> Iterator[tuple[int, int, bytes]]:
        """Yields the kind, the flags and the body of each message in the header of an item.

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
            raise ValueError("an item in it has no header")
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
                    raise ValueError("an item in it has a damaged header")
                yield kind, flags, body
                if kind == _CONTINUATION:
                    blocks.append(struct.unpack_from("<QQ", body))
                at += head + size

    def _array(self, place: int, length: int) -> np.ndarray:
        found = np.empty(length, np.uint8)
        with self._lock:
            self._file.seek(place if length else 0)
            if self._file.readinto(memoryview(found)) != length:  # type: ignore[attr-defined]
                raise ValueError("it is cut")
        return found

    def _read(self, place: int, length: int) -> bytes:
        if place + length > self._size:
            raise ValueError("it is cut")
        with self._lock:
            self._file.seek(place)
            return self._file.read(length)

    def _part(self, place: int, length: int) -> bytes:
        self._spend(length)
        return self._read(place, length)

    def _spend(self, length: int) -> None:
        self._left -= length
        if self._left < 0:
            raise ValueError("its parts overlap")

    def _spend_names(self, length: int) -> None:
        self._names_left -= length
        if self._names_left < 0:
            raise ValueError("its names overlap")


class _Chunks(NamedTuple):
    """Where the chunks of a dataset are.

    Args:
        sides: Tuple of integers, the shape of a chunk.
        filters: Tuple of filters, in the order in which they were applied.
        places: Dict from the first index of a chunk to its address, its size and the mask of filters that it skips.
    """

    sides: tuple[int, ...]
    filters: tuple[int, ...]
    places: dict[tuple[int, ...], tuple[int, int, int]]


def _inflated(data: np.ndarray, most: int) -> bytes:
    packed = zlib.decompressobj()
    try:
        found = packed.decompress(data.tobytes(), most)
    except zlib.error as error:
        raise ValueError(f"the chunks of a dataset are damaged ({error})") from error
    return found if packed.eof else b""


def _link(body: bytes) -> tuple[bytes, int] | None:
    """Returns the name and the address of a member, or None for a link to another name.

    Raises:
        ValueError: If it is in another file.

    Reference:
        "IV.A.2.g. The Link Message".
    """
    flags = body[1]
    place = 2
    if flags & 8:
        if body[place] == 1:
            return None
        if body[place]:
            raise ValueError("a group in it links to another file")
        place += 1
    place += (8 if flags & 4 else 0) + (1 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(body[place : place + width], "little")
    place += width
    return body[place : place + length], struct.unpack_from("<Q", body, place + length)[0]


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
    (size, stored), shape = _text_type(parts[1]), _shape(parts[2])
    if shape is None:
        return name, Attribute()
    value = body[place : place + size * prod(shape)] if stored else b""
    if stored and len(value) < size * prod(shape):
        raise ValueError(f"its attribute {name[:80]!r} is cut")
    return name, Attribute(shape, size, stored, value)


def _text_type(body: bytes) -> tuple[int, str]:
    """Returns the bytes that an entry takes, and how texts are stored, or `""` where the type is another.

    Reference:
        "IV.A.2.d. The Datatype Message".
    """
    kind, flags, size = struct.unpack_from("<BB2xI", body)
    if kind & 15 == _TEXT and size:
        return size, dict(enumerate(_PADDED)).get(flags & 15, "")
    if kind & 15 == _TEXT_IN_HEAP and flags & 15 == 1 and size == 16 and body[12:16] == b"\1\0\0\0":
        return size, _HEAP
    return size, ""


def _number_type(body: bytes) -> np.dtype | None:
    """Returns the type of numbers, or of opaque values of two bytes; or None.

    Reference:
        "IV.A.2.d. The Datatype Message".
    """
    kind, flags, size = struct.unpack_from("<BB2xI", body)
    order = ">" if flags & 1 else "<"
    if kind & 15 == _INTEGER and size in (1, 2, 4, 8) and struct.unpack_from("<HH", body, 8) == (0, 8 * size):
        return np.dtype(f"{order}{'i' if flags & 8 else 'u'}{size}")
    if kind & 15 == _FLOAT and not flags & 0x40 and struct.unpack_from("<HHBBBBI", body, 8) == _FLOATS.get(size):
        return np.dtype(f"{order}f{size}")
    return np.dtype("V2") if kind & 15 == _OPAQUE and size == 2 else None


def _shape(body: bytes) -> tuple[int, ...] | None:
    """Returns the shape of a dataset or an attribute, or None where it has no value.

    Reference:
        "IV.A.2.b. The Dataspace Message".
    """
    version, rank, _, kind = struct.unpack_from("<BBBB", body)
    if version not in (1, 2):
        raise ValueError("an item in it has no shape")
    return None if version == 2 and kind == 2 else struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)


def _filters(body: bytes, dtype: np.dtype) -> tuple[int, ...]:
    """Returns the filters of a dataset, in the order in which they were applied.

    Reference:
        "IV.A.2.l. The Filter Pipeline Message".
    """
    if not body:
        return ()
    version, count = body[:2]
    place, found = 8 if version == 1 else 2, []
    for _ in range(count):
        (kind,) = struct.unpack_from("<H", body, place)
        is_named = version == 1 or kind >= 256
        length = struct.unpack_from("<H", body, place + 2)[0] if is_named else 0
        place += 4 if is_named else 2
        _, values = struct.unpack_from("<HH", body, place)
        place += 4 + (-(-length // 8) * 8 if version == 1 else length)
        if kind == _SHUFFLE and values and struct.unpack_from("<I", body, place)[0] != dtype.itemsize:
            raise ValueError("the filters of a dataset are damaged")
        place += 4 * (values + (values & 1 if version == 1 else 0))
        found.append(kind)
    if not set(found) <= {_DEFLATE, _SHUFFLE} or len(set(found)) < len(found):
        raise ValueError("a dataset is stored with other filters than gzip and shuffle")
    return tuple(found)

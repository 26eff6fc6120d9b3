"""Strategies that damage valid files: bytes of any format, and the structures of JSON, zip, pickles, protobuf and h5.

Each function takes a valid file and returns a strategy of damaged ones.
"""

import base64
import contextlib
import copy
import io
import itertools
import json
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import h5py
import numpy as np
from hypothesis import strategies as st

# A gigabyte of zeros in bz2, in 86 bytes once more compressed: 785 bytes. And its CRC-32.
BOMB = zlib.decompress(
    base64.b85decode(
        "c-nJ{%CIzaj8qGb<l}sFpE17Af#CoH1BU{GL4&WG(*o6%Tn*Dl<wxa*zPv|G{7Htcpc5c@7O;vlteVRvDmf>*bn=TAxmpBF_}1}+2>|5%?Ck"
    )
)
BOMB_SIZE, BOMB_CRC = 1 << 30, 1533330096

WORDS = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"\n",
    b"../",
    b"/etc/passwd",
    b"{",
    b"[" * 2000,
    b"}",
    b'"',
    b":0",
    b"\x80\x02}",
    b"PK\x05\x06",
]
NUMBERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40]
NUMBERS += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def _edits(size: int) -> st.SearchStrategy:
    """Returns a strategy of edits: a kind, and what it needs. Half of them are near the start or the end."""
    anywhere = st.integers(0, max(size - 1, 0))
    near = st.integers(0, min(size, 96))
    place = st.one_of(anywhere, near, near.map(lambda number: max(size - 1 - number, 0)))
    length = st.one_of(st.integers(1, 8), st.integers(1, max(size // 2, 1)))
    return st.one_of(
        st.tuples(st.just("flip"), place, st.integers(1, 255)),
        st.tuples(
            st.just("number"),
            place,
            st.tuples(st.sampled_from("BHIQ"), st.sampled_from("<>"), st.sampled_from(NUMBERS)),
        ),
        st.tuples(st.just("zero"), place, length),
        st.tuples(st.just("remove"), place, length),
        st.tuples(st.just("repeat"), place, st.tuples(length, st.sampled_from([1, 1, 2, 20]))),
        st.tuples(st.just("swap"), place, st.tuples(place, length)),
        st.tuples(st.just("insert"), place, st.one_of(st.sampled_from(WORDS), st.binary(max_size=8))),
        st.tuples(st.just("cut"), place, st.none()),
    )


def _edited(data: bytes, edit: tuple) -> bytes:
    kind, place, more = edit
    place = min(place, max(len(data) - 1, 0))
    if kind == "cut":
        return data[:place]
    if kind == "insert":
        return data[:place] + more + data[place:]
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ more]) + data[place + 1 :] if data else data
    if kind == "number":
        width, order, number = more
        packed = struct.pack(order + width, number & ((1 << 8 * struct.calcsize(order + width)) - 1))
        return data[:place] + packed + data[place + len(packed) :]
    if kind == "zero":
        return data[:place] + bytes(min(more, len(data) - place)) + data[place + more :]
    if kind == "remove":
        return data[:place] + data[place + more :]
    if kind == "repeat":
        length, times = more
        return (
            data[:place]
            + data[place : place + length] * (1 + min(times, 10_000 // length + 1))
            + data[place + length :]
        )
    other, length = more
    first, second = sorted((place, min(other, len(data))))
    length = min(length, second - first)
    one, two = data[first : first + length], data[second : second + length]
    return data[:first] + two + data[first + length : second] + one + data[second + length :]


def of_bytes(data: bytes, most: int = 4) -> st.SearchStrategy[bytes]:
    """Flips, zeroes, cuts, removes, repeats, swaps and inserts bytes, and writes numbers that mean trouble."""

    def changed(edits: Sequence[tuple]) -> bytes:
        found = data
        for edit in edits:
            found = _edited(found, edit)
        return found

    return st.lists(_edits(len(data)), min_size=1, max_size=most).map(changed)


def _of(items: Sequence[Any]) -> st.SearchStrategy[Any]:
    """As `sampled_from()`, whose text names all items, of which some are large."""
    return st.integers(0, len(items) - 1).map(lambda number: items[number])


# JSON

_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]
STRANGE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    10**30,
    -(10**30),
    2**63,
]
STRANGE += [
    "",
    "a",
    "\0",
    "é\n\u2028\x1b[31m",
    "x" * 3000,
    "../../x",
    "/etc/passwd",
    "1",
    "float32",
    "fuzz_canary",
    "nan",
]
STRANGE += [[], [None], [-1], [0, 0], ["a", "a"], [1e300], {}, {"a": 1}, {"class_name": "Lambda"}, {"": []}, _DEEP]
STRANGE += [
    [0] * 400,
    {"module": "fuzz_canary", "class_name": "Canary", "config": {}, "registered_name": "fuzz_canary>C"},
]


def _places(tree: Any, path: tuple = ()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in _places(value, (*path, key)))]


def of_json(tree: Any, most: int = 3) -> st.SearchStrategy[Any]:
    """Replaces, removes, renames, repeats and exchanges the values of a tree of JSON."""
    places = _places(tree)[1:] or [()]
    edit = st.tuples(
        st.sampled_from(["replace"] * 4 + ["remove", "rename", "repeat", "exchange", "add", "list", "number"]),
        _of(places),
        _of(places),
        _of(STRANGE),
    )

    def changed(edits: Sequence[tuple]) -> Any:
        found = copy.deepcopy(tree)
        for kind, path, other, value in edits:
            found = _json_edited(found, kind, path, other, copy.deepcopy(value) if value is not _DEEP else value)
        return found

    return st.lists(edit, min_size=1, max_size=most).map(changed)


def _json_edited(tree: Any, kind: str, path: tuple, other: tuple, value: Any) -> Any:
    if not path:
        return value
    try:
        owner, there = tree, tree
        for key in path[:-1]:
            owner = owner[key]
        for key in other:
            there = there[key]
        old = owner[path[-1]]
    except (KeyError, IndexError, TypeError):  # an edit before has removed it
        return tree
    key = path[-1]
    if isinstance(owner, str):
        return tree
    if kind == "remove":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[str(value)[:40]] = owner.pop(key)
    elif kind == "repeat" and isinstance(owner, list):
        owner[key:key] = [copy.deepcopy(old)] * 3
    elif kind == "exchange":
        owner[key] = copy.deepcopy(there)
    elif kind == "add" and isinstance(old, dict):
        old[str(value)[:40]] = copy.deepcopy(there)
    elif kind == "list":
        owner[key] = [old]
    elif kind == "number" and type(old) in (int, float):
        owner[key] = old * -1 if value is None else old + (value if type(value) in (int, float) else 1)
    else:
        owner[key] = value
    return tree


def text(tree: Any) -> bytes:
    """Returns a tree as JSON."""
    return json.dumps(tree).encode()


def of_json_text(data: bytes | str) -> st.SearchStrategy[bytes]:
    """Changes JSON as a tree and as bytes."""
    data = data.encode() if isinstance(data, str) else data
    return st.one_of(of_json(json.loads(data)).map(text), of_json(json.loads(data)).map(text), of_bytes(data))


# safetensors


def of_safetensors(data: bytes) -> st.SearchStrategy[bytes]:
    """Changes offsets, shapes and types in the header, whose length stays right; or any bytes."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]

    def whole(head: bytes) -> bytes:
        return len(head).to_bytes(8, "little") + head + rest

    return st.one_of(of_json_text(header.rstrip()).map(whole), of_bytes(data))


# zip

Members = list[tuple[str, bytes]]


def zipped(members: Members, method: int = zipfile.ZIP_STORED) -> bytes:
    """Returns an archive, with valid checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names occur twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return file.getvalue()


def members_of(data: bytes) -> Members:
    """Returns the members of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def bomb(members: Members, name: str) -> bytes:
    """Returns an archive with a member of a gigabyte of zeros."""
    file = io.BytesIO(zipped([(other, data) for other, data in members if other != name] + [(name, BOMB)]))
    data = bytearray(file.getvalue())
    # In the header before the data and in the directory: method 12 is bz2.
    for mark, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = data.rfind(
            mark, 0, data.rfind(name.encode(), 0, len(data) if mark[2] == 1 else data.rfind(b"PK\x01\x02"))
        )
        for number in _headers(data, mark):
            if data[number + (30 if mark[2] == 3 else 46) :].startswith(name.encode()):
                place = number
        data[place + method : place + method + 2] = struct.pack("<H", 12)
        data[place + method + 6 : place + method + 10] = struct.pack("<I", BOMB_CRC)
        data[place + method + 14 : place + method + 18] = struct.pack("<I", BOMB_SIZE)
    return bytes(data)


def _headers(data: bytes, mark: bytes) -> list[int]:
    found, place = [], data.find(mark)
    while place >= 0:
        found.append(place)
        place = data.find(mark, place + 1)
    return found


def of_zip(data: bytes, inside: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]]) -> st.SearchStrategy[bytes]:
    """Removes, renames, repeats, compresses and exchanges the members of an archive, and changes what is in them.

    Args:
        data: Bytes of a zip archive.
        inside: Dict from the end of a member's name to the strategy of its bytes. The others are changed as bytes.
    """
    members = members_of(data)
    names = [name for name, _ in members]
    numbers = st.integers(0, len(members) - 1)

    def of_member(number: int) -> st.SearchStrategy[bytes]:
        name, content = members[number]
        of = next((each for end, each in inside.items() if name.endswith(end)), of_bytes)
        return of(content).map(lambda new: zipped([*members[:number], (name, new), *members[number + 1 :]]))

    def structural(edit: tuple) -> bytes:
        kind, number, other, name = edit
        found = list(members)
        if kind == "remove":
            del found[number]
        elif kind == "rename":
            found[number] = name, found[number][1]
        elif kind == "exchange":
            found[number], found[other] = (found[number][0], found[other][1]), (found[other][0], found[number][1])
        elif kind == "empty":
            found[number] = found[number][0], b""
        elif kind == "bomb":
            return bomb(members, members[number][0])
        elif kind == "add":
            found.append((name, found[number][1]))
        return zipped(found, zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED)

    kinds = ["remove", "rename", "exchange", "empty", "bomb", "add", "compress"]
    strange = st.sampled_from(["../x", "/x", "x" * 300, "a/b", *names, *(f"x/{name}" for name in names)])
    changed = st.tuples(st.sampled_from(kinds), numbers, numbers, strange).map(structural)
    deeper = [of_member(number) for number in range(len(members))]
    return st.one_of(changed, of_bytes(data), *deeper, *deeper)


# Pickles

_OPS = [
    b"0",
    b"1",
    b"2",
    b"(",
    b")",
    b"]",
    b"}",
    b"N",
    b"\x88",
    b"\x85",
    b"\x86",
    b"\x87",
    b"t",
    b"l",
    b"d",
    b"a",
    b"e",
    b"s",
]
_OPS += [b"u", b"b", b"R", b"Q", b"\x81", b"q\x00", b"h\x00", b"h\x05", b"K\x00", b"K\x01", b"J\xff\xff\xff\xff", b"."]
_OPS += [
    b"r\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xffa",
    b"\x8a\x08" + b"\xff" * 8,
    b"M\xff\xff",
    b"cos\nsystem\n",
    b"F1e400\n",
]
_OPS += [
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ca\x1b\x85\x0b\nb\n",
]
_OPS += [b"G" + struct.pack(">d", float("nan")), b"X\x03\x00\x00\x00a\nb", b"J\xff\xff\xff\x7f", b"i", b"V\\ud800\n"]


def of_pickle(data: bytes) -> st.SearchStrategy[bytes]:
    """Removes, repeats, exchanges and adds instructions of a pickle, or changes its bytes."""
    starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(starts)]
    place = st.integers(0, len(parts) - 1)
    kinds = st.sampled_from(["remove", "repeat", "exchange", "add", "replace", "move"])
    edit = st.tuples(kinds, place, place, st.sampled_from(_OPS))

    def changed(edits: Sequence[tuple]) -> bytes:
        found = list(parts)
        for kind, number, other, code in edits:
            number, other = min(number, len(found) - 1), min(other, len(found) - 1)
            if kind == "remove" and len(found) > 1:
                del found[number]
            elif kind == "repeat":
                found[number:number] = [found[number]] * 2
            elif kind == "exchange":
                found[number], found[other] = found[other], found[number]
            elif kind == "move":
                found.insert(other, found.pop(number))
            else:
                found[number : number + (kind == "replace")] = [code]
        return b"".join(found)

    return st.one_of(st.lists(edit, min_size=1, max_size=4).map(changed), of_bytes(data))


# Protocol buffers


def varint(number: int) -> bytes:
    """Returns a number as a protocol buffer writes it."""
    found = bytearray()
    number &= (1 << 64) - 1
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _parsed(data: bytes) -> list | None:
    """Returns the fields of a message, and of messages in it, as lists [number, kind, value]; None if it is none."""
    from keras_effnet.weights.formats.protobuf import varint as read

    found, place = [], 0
    try:
        while place < len(data):
            tag, place = read(data, place)
            kind = tag & 7
            if kind == 0:
                value, place = read(data, place)
            elif kind in (1, 5):
                value, place = data[place : place + (8 if kind == 1 else 4)], place + (8 if kind == 1 else 4)
            elif kind == 2:
                length, place = read(data, place)
                value, place = data[place : place + length], place + length
                inner = _parsed(value) if (value and not value.isascii()) or b"\n" in value[:1] else None
                value = value if inner is None else inner
            else:
                return None
            if place > len(data) or not tag >> 3:
                return None
            found.append([tag >> 3, kind, value])
    except (IndexError, ValueError):
        return None
    return found


def _packed(message: list) -> bytes:
    parts = []
    for number, kind, value in message:
        parts.append(varint(number << 3 | kind))
        if kind == 0:
            parts.append(varint(value if isinstance(value, int) else 1))
        elif kind == 2:
            inner = _packed(value) if isinstance(value, list) else value if isinstance(value, bytes) else b"1"
            parts += [varint(len(inner)), inner]
        else:
            parts.append(value if isinstance(value, bytes) else bytes(8 if kind == 1 else 4))
    return b"".join(parts)


def of_protobuf(data: bytes, most: int = 3) -> st.SearchStrategy[bytes]:
    """Changes numbers, kinds and values of fields at any depth, removes and repeats fields; or changes bytes."""
    tree = _parsed(data)
    if not tree:
        return of_bytes(data)

    def paths(message: list, before: tuple = ()) -> list[tuple]:
        found = []
        for index, (_, _, value) in enumerate(message):
            found.append((*before, index))
            if isinstance(value, list):
                found += paths(value, (*before, index))
        return found

    values = st.one_of(st.sampled_from([*NUMBERS, *WORDS, b"\xff\xfe", b"a" * 5000]), st.binary(max_size=6))
    kinds = st.sampled_from(["number", "kind", "value", "value", "value", "remove", "repeat", "nest"])
    edit = st.tuples(kinds, _of(paths(tree)), values)

    def changed(edits: Sequence[tuple]) -> bytes:
        found = copy.deepcopy(tree)
        for kind, path, value in edits:
            message = found
            for index in path[:-1]:
                message = message[index][2] if index < len(message) and isinstance(message[index][2], list) else []
            if path[-1] >= len(message):
                continue
            field = message[path[-1]]
            if kind == "remove":
                del message[path[-1]]
            elif kind == "repeat":
                message.insert(path[-1], copy.deepcopy(field))
            elif kind == "nest":
                field[1:] = [2, copy.deepcopy(found)] if len(data) < 2000 else [2, b""]
            elif kind == "number":
                field[0] = value if isinstance(value, int) and 0 < value < 1 << 29 else 1
            elif kind == "kind":
                field[1] = value % 6 if isinstance(value, int) else 2
                field[1] = 0 if field[1] in (3, 4) else field[1]
            else:
                field[1:] = [0 if isinstance(value, int) else 2, value]
        return _packed(found)

    return st.one_of(st.lists(edit, min_size=1, max_size=most).map(changed), of_bytes(data))


# TensorFlow's checkpoints: a table of entries, each block with a checksum


def masked(*parts: bytes) -> bytes:
    """Returns the checksum that TensorFlow stores for some bytes."""
    crc = google_crc32c.value(b"".join(parts))
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def entries_of(index: bytes) -> list[tuple[bytes, bytes]]:
    """Returns the pairs of an index."""
    from keras_effnet.weights.formats import tensorflow_checkpoint as reader

    footer = index[-48:-8]
    _, place = reader.varint(footer, 0)
    _, place = reader.varint(footer, place)
    handles = [value for _, value in reader._block(index, *reader._handle(footer, place))]
    return [pair for handle in handles for pair in reader._block(index, *reader._handle(handle, 0))]


def index_of(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Returns an index with valid checksums (tensorflow/core/lib/io/table_format.txt, 2.20)."""

    def block(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        rows = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
        rows += struct.pack("<II", 0, 1) + b"\0"  # one restart; not compressed
        return rows + masked(rows)

    data = block(entries)
    table = block([(b"\xff", varint(0) + varint(len(data) - 5))])
    handles = varint(0) + varint(0) + varint(len(data)) + varint(len(table) - 5)
    return data + table + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def of_index(index: bytes) -> st.SearchStrategy[bytes]:
    """Changes the entries of an index and makes its checksums valid; or changes its bytes."""
    entries = entries_of(index)

    def of_entry(number: int) -> st.SearchStrategy[bytes]:
        key, value = entries[number]
        before, after = entries[:number], entries[number + 1 :]
        return st.one_of(
            of_protobuf(value).map(lambda new: index_of([*before, (key, new), *after])),
            of_bytes(key, 2).map(lambda new: index_of([*before, (new, value), *after])),
            st.sampled_from([[], [(key, value)] * 2]).map(lambda new: index_of([*before, *new, *after])),
        )

    return st.one_of(of_bytes(index), *map(of_entry, range(len(entries))))


def of_graph(files: dict[str, bytes], index: str, data: str) -> st.SearchStrategy[dict[str, bytes]]:
    """Changes the graph of objects in a checkpoint, and makes all checksums valid.

    Args:
        files: Dict of the files' bytes.
        index: Key of the index.
        data: Key of the tensors.
    """
    from keras_effnet.weights.formats.protobuf import fields, one
    from keras_effnet.weights.formats.tensorflow_checkpoint import GRAPH

    entries = entries_of(files[index])
    entry = fields(dict(entries)[GRAPH.encode()])
    place, size = one(entry, 4), one(entry, 5)
    stored = files[data][place : place + size]
    graph = _string(stored)

    def whole(new: bytes) -> dict[str, bytes]:
        wide = len(new).to_bytes(4, "little")
        string = varint(len(new)) + masked(wide) + new
        checksum = int.from_bytes(masked(wide, masked(wide), new), "little")
        start = len(files[data])
        value = _packed(
            [[1, 0, 7], [2, 2, b""], [4, 0, start], [5, 0, len(string)], [6, 5, checksum.to_bytes(4, "little")]]
        )
        changed = [(key, value if key == GRAPH.encode() else old) for key, old in entries]
        return files | {index: index_of(changed), data: files[data] + string}

    return of_protobuf(graph).map(whole)


def _string(stored: bytes) -> bytes:
    """Returns the string of a tensor that holds one."""
    from keras_effnet.weights.formats.protobuf import varint as read

    return stored[read(stored, 0)[1] + 4 :]


# h5


def _traps() -> list[Callable]:
    """Returns functions that make what no file of weights holds."""

    def sparse(group, name):
        group.create_dataset(name, (10**9,), "float32", chunks=(1000,))

    def compressed(group, name):
        group.create_dataset(name, data=np.zeros(1 << 22, "float32"), compression=9, chunks=(1 << 20,))

    return [
        sparse,
        compressed,
        lambda group, name: group.create_dataset(name, data=b"text"),
        lambda group, name: group.create_dataset(name, data=["text"], dtype=h5py.string_dtype()),
        lambda group, name: group.create_dataset(name, (2,), np.dtype([("a", "f4"), ("b", "i8")])),
        lambda group, name: group.create_dataset(name, (2,), "c8"),
        lambda group, name: group.create_dataset(name, (2,), "V2"),
        lambda group, name: group.create_dataset(name, (0, 3), "f4", maxshape=(None, 3)),
        lambda group, name: group.create_dataset(name, data=h5py.Empty("f4")),
        lambda group, name: group.create_dataset(name, (4,), "f4", external=[("/etc/passwd", 0, 16)]),
        lambda group, name: group.create_dataset(name, (1,) * 20, ">f8"),
        lambda group, name: group.create_group(name),
        lambda group, name: group.__setitem__(name, h5py.SoftLink("/")),
        lambda group, name: group.__setitem__(name, h5py.ExternalLink("/etc/passwd", "/")),
        lambda group, name: group.__setitem__(name, group),
        lambda group, name: group.__setitem__(name, np.dtype("f4")),
    ]


_ATTRIBUTES = [
    0,
    1.5,
    float("nan"),
    "",
    "a",
    b"3.1.0",
    b"\xff\xfe",
    "2.0\n",
    np.zeros((2, 2)),
    np.array([b"a", b"b"]),
    h5py.Empty("f4"),
]
_ATTRIBUTES += [
    np.array([], "S1"),
    np.array([b"stem_conv"] * 3),
    np.bytes_(b"x" * 900),
    "x" * 900,
    True,
    np.void(b"ab"),
    "bfloat16",
]


_ARRAYS = [
    np.zeros(3, "f4"),
    np.zeros((0,), "f4"),
    np.zeros((2, 2), "i8"),
    np.float32(1),
    np.array([np.nan, np.inf]),
    np.zeros(2, "?"),
]


def of_h5(data: bytes) -> st.SearchStrategy[bytes]:
    """Changes attributes, JSON in them, groups and arrays of an h5 file; or its bytes, often those of types."""
    groups, attributes, members = ["/"], [], []
    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(lambda name, item: groups.append(name) if isinstance(item, h5py.Group) else None)
        for group in groups:
            attributes += [(group, name) for name in file[group].attrs]
            members += [(group, name) for name in file[group]]
        described = [(each, file[each[0]].attrs[each[1]]) for each in attributes]
        described = [
            (each, value) for each, value in described if isinstance(value, bytes | str) and value[:1] in ("{", b"{")
        ]

    def changed(edits: Sequence[tuple]) -> bytes:
        whole = io.BytesIO(data)
        with h5py.File(whole, "r+") as file:
            for kind, (group, name), value in edits:
                with contextlib.suppress(Exception):  # an edit before has removed it, or h5py refuses to write it
                    place = file[group].attrs if kind == "attribute" else file[group]
                    old = place[name] if isinstance(value, str) and value.startswith("as ") else None
                    del place[name]
                    if old is not None:
                        place[value[3:]] = old
                    elif callable(value):
                        value(place, name)
                    elif value is not None:
                        place[name] = value
        return whole.getvalue()

    names = _of(["as a", "as é\n", "as layer_names0", *(f"as {name}" for _, name in (*attributes, *members))])
    edits = []
    if attributes:
        edits.append(st.tuples(st.just("attribute"), _of(attributes), st.one_of(_of(_ATTRIBUTES), st.none(), names)))
    if members:
        new = st.one_of(st.none(), names, _of(_traps()), _of(_ARRAYS))
        edits.append(st.tuples(st.just("member"), _of(members), new))
    for place, value in described:
        new = of_json_text(value).map(lambda text: np.bytes_(text.rstrip(b"\0")))
        edits += [st.tuples(st.just("attribute"), st.just(place), new)] * 3
    damage = [st.lists(st.one_of(*edits), min_size=1, max_size=3).map(changed), of_bytes(data)]
    # The type, the shape and the place of an attribute's value follow its name. Headers of objects, nodes of trees, and
    # heaps with the lengths of texts begin with these bytes.
    titles = {re.escape(name.encode() + b"\0") for _, name in attributes} | {rb"\x01\0.\0\x01\0\0\0"}
    titles |= {b"GCOL", b"HEAP", b"SNOD", b"TREE"}
    ends = [found.end() for title in sorted(titles) for found in re.finditer(title, data, re.DOTALL)]
    places = [place for end in ends for place in range(end, min(end + 144, len(data)))]
    if places:
        byte = st.integers(0, 255).map(lambda number: bytes([number]))
        number = st.one_of(_of([0, 1, 15, 16, 1 << 31]), st.integers(1, 40).map(lambda number: -number))
        address = _of([found.start() for found in re.finditer(b"GCOL|HEAP|SNOD|TREE", data)] or [0])
        values = [each.map(lambda number: struct.pack("<Q", number % (1 << 64))) for each in (number, address)]
        value = st.one_of(byte, *values)
        edit = st.tuples(_of(places), value)
        damage.append(edit.map(lambda edit: data[: edit[0]] + edit[1] + data[edit[0] + len(edit[1]) :]))
    return st.one_of(damage)


# PNG


def of_png(data: bytes) -> st.SearchStrategy[bytes]:
    """Changes the chunks of a PNG and makes their checksums valid; or changes its bytes."""
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length

    def whole(parts: Sequence[tuple[bytes, bytes]]) -> bytes:
        rows = [
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in parts
        ]
        return data[:8] + b"".join(rows)

    def of_chunk(number: int) -> st.SearchStrategy[bytes]:
        kind, body = chunks[number]
        before, after = chunks[:number], chunks[number + 1 :]
        new = st.one_of(
            of_bytes(body, 2).map(lambda changed: [(kind, changed)]),
            st.sampled_from(
                [[], [(kind, body)] * 2, [(kind, body + bytes(9)), *after[:1]], [(kind, zlib.compress(bytes(1 << 20)))]]
            ),
            st.sampled_from([b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL"]).map(
                lambda name: [(kind, body), (name, body)]
            ),
        )
        return new.map(lambda parts: whole([*before, *parts, *after]))

    return st.one_of(of_bytes(data), *map(of_chunk, range(len(chunks))))

"""Files of every format are read exactly, and no damaged or hostile file runs code or changes a model."""

import collections
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path

import google_crc32c
import h5py
import keras
import numpy as np
import pytest
from helpers import BACKEND, fill, leading, lite0_package, save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_effnet as ke
from keras_effnet.weights.formats import h5_file, hdf5, opening, torch_file

SMALL = {"weights": None, "classes": 2, "input_shape": (32, 32, 3)}


def read_all(path, **kwargs):
    with opening.opened(path, **kwargs) as tensors:
        return {name: stored.read() for name, stored in tensors.items()}


@pytest.fixture(scope="session")
def lite0_path() -> Path:
    return lite0_package()


def test_the_torch_reader_equals_torch(lite0_path):
    torch = pytest.importorskip("torch")
    expected = torch.load(lite0_path, weights_only=True)
    found = read_all(lite0_path)
    assert list(found) == list(expected) and len(found) == 296
    assert all(
        np.array_equal(found[name], value.numpy()) and found[name].dtype == value.numpy().dtype
        for name, value in expected.items()
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_the_torch_reader_follows_views_and_dtypes(legacy, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    state = {
        "base": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1, :, 1:3],
        "half": base.half(),
        "brain": base.bfloat16(),
        "none": torch.zeros(0),
        "learned": torch.nn.Parameter(base.float()),
    }
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    found = read_all(path)
    assert found.keys() == state.keys()
    assert str(found["brain"].dtype) == "bfloat16"
    assert all(
        np.array_equal(found[name].astype(float), value.detach().double().numpy()) for name, value in state.items()
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_timms_training_checkpoints_give_their_average(legacy, tmp_path):
    """Reads the keys that timm's trainer writes, and the others that its loader accepts."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    average = {name: value * 2 for name, value in module.state_dict().items()}
    path = tmp_path / "checkpoint.pth.tar"
    whole = {
        "epoch": 3,
        "arch": "tf_efficientnet_b0",
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": Namespace(lr=0.1, opt="sgd", betas=None),
        "state_dict_ema": average,
        "metric": 77.1,
    }
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    assert np.array_equal(read_all(path)["weight"], average["weight"].numpy())
    assert np.array_equal(read_all(path, raw=True)["weight"], module.weight.detach().numpy())
    for key in ("model_ema", "ema", "ema_state_dict"):
        other = {"model": module.state_dict(), key: average}
        torch.save(other, path, _use_new_zipfile_serialization=not legacy)
        assert np.array_equal(read_all(path)["weight"], average["weight"].numpy())
        assert np.array_equal(read_all(path, raw=True)["weight"], module.weight.detach().numpy())
    torch.save({"model": module.state_dict(), "ema": {"decay": 0.9, "shadow": average}}, path)
    with pytest.raises(ValueError, match=r"'decay' in its 'ema' is no tensor.* pass --raw"):
        read_all(path)
    assert np.array_equal(read_all(path, raw=True)["weight"], module.weight.detach().numpy())


@pytest.mark.parametrize("average", [{}, {"decay": 0.9, "num_updates": 3}])
@pytest.mark.parametrize(("weights", "key"), [("model", "ema"), ("state_dict", "state_dict_ema")])
def test_an_average_without_tensors_does_not_hide_the_weights(weights, key, average, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.nn.Linear(2, 3).state_dict()
    for whole in ({weights: state, key: average}, {weights: average, key: state}):
        torch.save(whole, tmp_path / "x.pth")
        for raw in (False, True):
            assert np.array_equal(read_all(tmp_path / "x.pth", raw=raw)["weight"], state["weight"].numpy())


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (lambda state: {"state": {"model": state}, "epoch": 1}, r"'state' is no tensor\. .*: 'state', 'epoch'$"),
        (lambda state: state | {"epoch": 3}, r"'epoch' is no tensor\. .*'weight', 'bias', 'epoch'$"),
        (lambda state: [state], "it holds a list"),
        (lambda state: {"state_dict": state, "best": np.float64(0.5)}, r"an object of numpy\.\S*scalar"),
        (lambda state: {"state_dict": state, "args": {"path": Path("x")}}, r"an object of pathlib\.\S+"),
        (lambda state: {"state_dict": state, "seen": {1}}, r"an object of \S+\.set"),
    ],
)
def test_other_wrappers_say_what_to_save(wrap, told, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(wrap(dict(torch.nn.Linear(2, 3).state_dict())), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=told) as caught:
        read_all(tmp_path / "x.pth")
    assert "save the state dict alone: torch.save(model.state_dict(), path)" in str(caught.value)


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def torch_bytes(state) -> bytes:
    """Returns a file of torch's legacy format with a pickle of `state`."""
    file = io.BytesIO()
    for part in (torch_file.MAGIC, 1001, {"little_endian": True}, state, []):
        pickle.dump(part, file, protocol=2)
    return file.getvalue()


def torch_zip(pickled: bytes, path) -> None:
    """Writes a file of torch's current format around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(16))


# Pickles written by hand, in place of the state in a torch file. In a real unpickler, the first crashes the process,
# the second never ends, and others take gigabytes.
BOMBS = {
    "deep": b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.",
    "exponential hash": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "exponential hash through the memo": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "reference": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"Q.",
    "huge memo": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "huge text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
    "early end": b"\x80\x02}",
    "other instruction": b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85\x81.",
}

READ_EACH = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from keras_effnet.weights.formats.torch_file import read_torch
for path in sys.argv[1:]:
    try:
        read_torch(path)
    except ValueError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_pickle_bombs_are_refused_at_once(kind, tmp_path):
    start = b"".join(pickle.dumps(part, protocol=2) for part in (torch_file.MAGIC, 1001, {"little_endian": True}))
    paths = [tmp_path / f"{number}.pth" for number in range(3)]
    for path, data in zip(paths, (start + BOMBS[kind], BOMBS[kind], None), strict=True):
        path.write_bytes(data) if data else torch_zip(BOMBS[kind], path)
    result = subprocess.run([sys.executable, "-c", READ_EACH, *paths], capture_output=True, text=True, timeout=60)
    told = result.stdout.splitlines()
    assert len(told) == 3 and all(line.startswith("Expected a state dict") for line in told), result.stderr[-500:]


NEST = b")" + b"q\x00h\x00\x86" * 60  # a tuple of 2 ** 60 empty ones
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"


@pytest.mark.parametrize("place", ["size", "storages"])
def test_a_bomb_as_a_size_or_in_the_list_of_storages(place, tmp_path):
    size = NEST + b")" if place == "size" else b"K\x01\x85K\x01\x85"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + size + b"\x89NtR"
    state = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."
    keys = b"\x80\x02](" + (NEST if place == "storages" else b"X\x01\x00\x00\x000") + b"e."
    start = b"".join(pickle.dumps(part, protocol=2) for part in (torch_file.MAGIC, 1001, {"little_endian": True}))
    path = tmp_path / "x.pth"
    path.write_bytes(start + state + keys + struct.pack("<Qf", 1, 1.0))
    code = "import sys; from keras_effnet.weights.formats.torch_file import read_torch; read_torch(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    told = "a tensor's size is invalid" if place == "size" else "lists a storage that no tensor has"
    assert told in result.stderr, result.stderr[-500:]


@pytest.mark.parametrize("function", [os.system, eval, open, getattr, collections.Counter, Namespace])
def test_a_hostile_pickle_is_refused_and_runs_nothing(function, tmp_path):
    path, flag = tmp_path / "x.pth", tmp_path / "flag"
    argument = {os.system: f"touch {flag}", eval: f"open({str(flag)!r}, 'w')", open: str(flag)}.get(function, "x")
    arguments = (argument, "w") if function is open else (argument,)
    hostile = Hostile(function, *arguments)
    for data in (torch_bytes({"weight": hostile}), pickle.dumps(hostile), None):
        path.write_bytes(data) if data else torch_zip(pickle.dumps({"weight": hostile}, protocol=2), path)
        with pytest.raises(ValueError, match=r"no state dict|Received"):
            read_all(path)
    assert not flag.exists()


def test_a_compressed_torch_archive_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match="is compressed"):
        read_all(path)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff\xfe", b'{"config": {"layers": [{"class_name": "Rescaling"}]}}', None]
)
def test_a_broken_archive_is_told(content, tmp_path):
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json" if content else "other", content or b"")
    with pytest.raises(ValueError, match=r"Expected a \.keras file"):
        ke.EfficientNetB0(weights=path)


@pytest.mark.parametrize("fault", ["huge", "text", "external", "link", "soft link", "virtual"])
@pytest.mark.parametrize("kind", ["legacy", "keras3"])
def test_h5_files_with_traps_are_refused(kind, fault, tmp_path):
    path, other = tmp_path / "x.h5", tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.ones(4, "float32")
    with h5py.File(path, "w") as file:
        if kind == "legacy":
            file.attrs["layer_names"] = ["stem_conv"]
            name, group = "stem_conv/kernel:0", file.create_group("stem_conv")
            group.attrs["weight_names"] = [name]
        else:
            name, group = "0", file.create_group("layers/conv2d/vars")
        if fault == "huge":
            group.create_dataset(name, (10**13,), "float32", chunks=(1000,))
        elif fault == "text":
            group.create_dataset(name, data=[b"hello"])
        elif fault == "external":
            group.create_dataset(name, (4,), "float32", external=[("/etc/passwd", 0, 16)])
        elif fault == "virtual":
            layout = h5py.VirtualLayout((4,), "float32")
            layout[:] = h5py.VirtualSource(other, "x", (4,))
            group.create_virtual_dataset(name, layout)
        else:
            group[name] = h5py.ExternalLink(str(other), "/x") if fault == "link" else h5py.SoftLink("/elsewhere")
    with pytest.raises(ValueError, match=r"structure|names of an EfficientNet"):
        ke.weights.verify(path, "efficientnet-b0")


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
_BYTES = _TEXT.map(str.encode)
_LISTS = [st.lists(each, min_size=1, max_size=5) for each in (_TEXT, _BYTES)]
_VALUES = st.one_of(_TEXT, _BYTES.map(np.bytes_), *_LISTS, _LISTS[1].map(np.array), st.just([]))
LAYOUTS = [{}, {"libver": "latest"}, {"track_order": True}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None)
@given(st.dictionaries(_TEXT, _VALUES, max_size=8))
def test_attributes_of_an_h5_file_are_read_as_h5py_reads_them(layout, values):
    stored = io.BytesIO()
    with h5py.File(stored, "w", **layout) as file:
        group = file.create_group("a")
        group["x"] = file["y"] = 1.0
        for name, value in values.items():  # in turn, so that headers are continued
            group["x"].attrs[name] = group.attrs[name] = file.attrs[name] = value
            file["y"].attrs[name] = 1.5
    found = hdf5.File(stored)
    items = {"/": found.root} | dict(found.items())
    assert items.keys() == {"/", "a", "a/x", "y"}
    with h5py.File(stored) as root:
        for path in ("/", "a", "a/x"):
            assert items[path].attributes.keys() == root[path].attrs.keys() == values.keys()
            for name, value in values.items():
                expected = root[path].attrs[name]
                if isinstance(value, list | np.ndarray):
                    expected = [each.decode() if isinstance(each, bytes) else each for each in expected]
                    assert list(found.names(items[path], name)) == expected
                    with pytest.raises(ValueError, match="is not a text"):
                        found.text(items[path], name)
                else:
                    expected = expected.decode() if isinstance(expected, bytes) else expected
                    assert found.text(items[path], name) == expected
    for name in values:
        with pytest.raises(ValueError, match="is not a text"):
            found.text(items["y"], name)
    assert found.text(found.root, "none\0") is None


_TYPES = ["<f4", ">f4", "<f2", "<f8", "<i4", ">i8", "u1", "<u2", "V2"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_groups_and_datasets_of_an_h5_file_are_read_as_h5py_reads_them(layout, data):
    stored, random = io.BytesIO(), np.random.default_rng(0)
    with h5py.File(stored, "w", **layout) as file:
        for number in range(data.draw(st.integers(0, 8 if layout else 30))):
            shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
            values = np.frombuffer(random.bytes(16 * max(int(np.prod(shape)), 1)), data.draw(st.sampled_from(_TYPES)))
            values = values[: int(np.prod(shape))].reshape(shape)
            options = {}
            if shape and all(shape) and "libver" not in layout and data.draw(st.booleans()):
                chunks = tuple(data.draw(st.integers(1, side)) for side in shape)
                packed = {
                    "compression": data.draw(st.sampled_from([None, "gzip"])),
                    "shuffle": data.draw(st.booleans()),
                }
                options = {"chunks": chunks} | ({} if values.dtype.kind == "V" else packed)
            place = "/".join(data.draw(st.lists(st.sampled_from("abc"), max_size=3 if number % 7 else 0)))
            file.create_dataset(f"{place}/{number}", data=values, **options)
            if data.draw(st.integers(0, 9)) == 0:
                del file[data.draw(st.sampled_from(sorted(file)))]
    found, paths = hdf5.File(stored), []
    with h5py.File(stored) as root:
        root.visit(paths.append)
        assert [path for path, _ in found.items()] == paths
        for path, item in found.items():
            assert item.is_dataset is isinstance(root[path], h5py.Dataset) is not item.is_group
            if item.is_dataset:
                dataset = found.dataset(item, path)
                assert (dataset.shape, dataset.dtype) == (root[path].shape, root[path].dtype)
                expected = np.asarray(root[path][()], root[path].dtype)  # of a scalar, h5py turns the bytes around
                assert dataset.read().tobytes() == expected.tobytes()


def test_a_dataset_of_many_chunks_is_read():
    stored, values = io.BytesIO(), np.arange(60_000, dtype="int16").reshape(200, 300)
    with h5py.File(stored, "w") as file:
        file.create_dataset("x", data=values, chunks=(3, 7), compression="gzip", shuffle=True)
        file.create_dataset("y", data=values, maxshape=(None, 300), chunks=(9, 300))
    found = hdf5.File(stored)
    for path, item in found.items():
        np.testing.assert_array_equal(found.dataset(item, path).read(), values)


def test_data_and_deleted_parts_are_not_taken_for_parts_of_an_h5_file():
    inner, stored = io.BytesIO(), io.BytesIO()
    with h5py.File(inner, "w") as file:
        for number in range(50):
            file[f"model/x{number}/vars/0"] = np.zeros(7)
    with h5py.File(stored, "w") as file:
        file["inner"] = np.frombuffer(inner.getvalue(), "uint8")
        for name, count in (("model", 20), ("layers", 50)):
            for number in range(count):
                file[f"{name}/x{number}/vars/0"] = np.zeros(7)
            file.flush()
            if name == "model":
                del file[name]
    found, paths = hdf5.File(stored), []
    with h5py.File(stored) as file:
        file.visit(paths.append)
    assert [path for path, _ in found.items()] == paths


@pytest.mark.parametrize("values", [{f"a{number}": ["a"] for number in range(9)}, {"a": np.full(999, b"a" * 99)}])
def test_attributes_that_hdf5_stores_apart_are_refused(values):
    stored = io.BytesIO()
    with h5py.File(stored, "w", libver="latest") as file:
        file.attrs.update(values)
    with pytest.raises(ValueError, match="Save the file again with h5py's default options"):
        hdf5.File(stored)


@pytest.mark.parametrize("compression", ["lzf", "szip", "scaleoffset", "fletcher32", "twice"])
def test_other_filters_than_gzip_are_refused(compression):
    """HDF5 2.0 crashes for some damaged chunks."""
    stored, values = io.BytesIO(), np.arange(4096, dtype="int32")
    options = {"lzf": {"compression": "lzf"}, "szip": {"compression": "szip"}}
    options |= {"scaleoffset": {"scaleoffset": 0}, "fletcher32": {"fletcher32": True}}
    with h5py.File(stored, "w") as file:
        if compression == "twice":
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((4096,))
            plist.set_deflate(9)
            plist.set_deflate(9)
            space, kind = h5py.h5s.create_simple((4096,)), h5py.h5t.py_create(values.dtype)
            h5py.h5d.create(file.id, b"x", kind, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
        else:
            try:
                file.create_dataset("x", data=values, **options[compression])
            except ValueError:
                pytest.skip(f"this h5py cannot write {compression}")
    found = hdf5.File(stored)
    with pytest.raises(ValueError, match="other filters than gzip and shuffle"):
        found.dataset(found.find(found.root, "x"), "x")


@pytest.mark.parametrize("unpacked", [4, 1 << 24], ids=["short", "bomb"])
def test_chunks_that_unpack_to_another_size_are_refused(unpacked):
    stored = io.BytesIO()
    with h5py.File(stored, "w") as file:
        dataset = file.create_dataset("x", (4096,), "float32", chunks=(4096,), compression="gzip")
        dataset.id.write_direct_chunk((0,), zlib.compress(bytes(unpacked)))
    found = hdf5.File(stored)
    dataset = found.dataset(found.find(found.root, "x"), "x")
    tracemalloc.start()
    with pytest.raises(ValueError, match="the chunks of a dataset are damaged"):
        dataset.read()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_chunks_that_share_their_bytes_are_refused():
    """60 chunks of 8 MB, of the same 31 KB."""
    stored = io.BytesIO()
    with h5py.File(stored, "w") as file:
        dataset = file.create_dataset(
            "x", (60, 1), "u1", maxshape=(None, None), chunks=(1, 8_000_000), compression="gzip"
        )
        for row in range(60):
            dataset.id.write_direct_chunk((row, 0), zlib.compress(bytes(8_000_000)))
    for call in (hdf5.File.check, lambda file: file.dataset(file.find(file.root, "x"), "x")):
        with pytest.raises(ValueError, match="more bytes than it has"):
            call(hdf5.File(stored))


@pytest.mark.parametrize("value", [["a", "b"], 1j, h5py.Empty("f4"), np.array([True]), b"text", np.zeros(3, "f4")])
def test_a_check_before_keras_reads_a_file_accepts_all_types(value):
    stored = io.BytesIO()
    with h5py.File(stored, "w") as file:
        file["layers/mine/vars/0"] = value
        file["layers/mine/vars"].attrs["name"] = 3
    hdf5.File(stored).check()


@pytest.mark.parametrize("seed", [0, 1, 63])  # free parts of names whose links could be taken for a circle
def test_members_that_were_deleted_leave_a_readable_file(seed):
    stored, random, paths = io.BytesIO(), np.random.default_rng(seed), []
    with h5py.File(stored, "w") as file:
        for number in range(80):
            file.create_group("x" * int(random.integers(1, 40)) + str(number))
        for name in random.permutation(list(file))[:50]:
            del file[name]
        file.visit(paths.append)
    assert [path for path, _ in hdf5.File(stored).items()] == paths


def test_attributes_that_other_programs_write_are_read():
    h5t, stored = h5py.h5t, io.BytesIO()
    texts = {h5t.STR_NULLTERM: b"ab\0cd", h5t.STR_NULLPAD: b"ab\0\0\0", h5t.STR_SPACEPAD: b"ab   "}
    with h5py.File(stored, "w") as file:
        file["type"] = np.dtype("float32")
        for padding, value in texts.items():
            kind = h5t.C_S1.copy()
            kind.set_size(5)
            kind.set_strpad(padding)
            made = h5py.h5a.create(file.id, f"text{padding}".encode(), kind, h5py.h5s.create(h5py.h5s.SCALAR))
            made.write(np.array(value, "S5"), h5t.py_create(np.dtype("S5")))
        file.attrs["nothing"] = h5py.Empty("f4")
        file.attrs.create("number", 1.0, dtype=file["type"])
        file.attrs[b"\xe9"] = "name"
    found = hdf5.File(stored)
    with h5py.File(stored) as file:
        assert found.root.attributes.keys() - {"\udce9"} == file.attrs.keys() - {b"\xe9"}
        for padding in texts:
            assert found.text(found.root, f"text{padding}") == "ab" == file.attrs[f"text{padding}"].decode()
    for name in ("nothing", "number"):
        with pytest.raises(ValueError, match="is not a text"):
            found.text(found.root, name)


def circle(data: bytearray, kind: str) -> None:
    """Makes parts of an h5 file link to each other in circles."""
    if kind == "free space":
        heap = data.index(b"HEAP")
        _, free, address = struct.unpack_from("<QQQ", data, heap + 8)
        struct.pack_into("<Q", data, address + free, free)
        return
    part, tree = kind.split(" of ")
    for found in re.finditer(b"TREE", data):
        level, used = struct.unpack_from("<BH", data, found.end() + 1)
        if data[found.end()] == (tree == "chunks"):
            if part == "siblings":
                struct.pack_into("<Q", data, found.start() + 16, found.start())
            for child in range(used if part == "children" and level else 0):
                place = found.start() + 24 + (24 + 32 * child if tree == "chunks" else 8 + 16 * child)
                assert data[struct.unpack_from("<Q", data, place)[0] :].startswith(b"TREE")
                struct.pack_into("<Q", data, place, found.start())


CIRCLES = ["free space", *(f"{part} of {tree}" for part in ("siblings", "children") for tree in ("groups", "chunks"))]


@pytest.mark.parametrize("kind", CIRCLES)
@pytest.mark.parametrize("names", ["legacy", "keras3"])
def test_parts_of_an_h5_file_that_link_in_a_circle_do_not_hang(names, kind, tmp_path):
    """HDF5 2.0 follows such links without end, or until it crashes."""
    path, place = tmp_path / "x.h5", "stem_conv/stem_conv/kernel:0" if names == "legacy" else "layers/conv2d/vars/0"
    with h5py.File(path, "w") as file:
        chunks = (1,) if kind.endswith("chunks") else None
        file.create_dataset(place, data=np.arange(99.0, dtype="float32"), chunks=chunks)
        for number in range(999):  # so that trees have nodes
            file.create_group(f"layers/activation_{number}")
        if names == "legacy":
            file.attrs["layer_names"] = ["stem_conv"]
            file["stem_conv"].attrs["weight_names"] = ["stem_conv/kernel:0"]
    data = bytearray(path.read_bytes())
    circle(data, kind)
    assert data != path.read_bytes()
    path.write_bytes(data)
    expected = {"legacy": "stem_conv/kernel", "keras3": "conv2d/0"}[names]
    if kind.startswith("siblings"):  # links that are not followed
        assert list(read_all_of_h5(path)) == [expected]
    else:
        with pytest.raises(ValueError, match=r"Expected an h5 file .*(a tree in it is damaged|its parts overlap)"):
            read_all_of_h5(path)


def read_all_of_h5(path):
    h5_file.keras_version(path), h5_file.names_layers(path), h5_file.padding_of(path)
    with h5_file.opened_h5(path, path) as tensors:
        return {name: stored.read() for name, stored in tensors.items()}


def test_a_keras_file_with_a_circle_in_its_weights_is_refused(tmp_path):
    path = ke.save_model(keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]), tmp_path / "x.keras")
    with zipfile.ZipFile(path) as archive:
        parts = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    circle(parts["model.weights.h5"], "free space")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"x\.keras.*its parts overlap"):
        ke.load_model(path)


def test_texts_that_share_their_bytes_are_refused(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names0"] = ["a" * 5000]
        for number in range(1, 50):
            file.attrs[f"layer_names{number}"] = ["b"]
    data = bytearray(path.read_bytes())
    text = data.index(struct.pack("<IQ", 5000, data.index(b"GCOL")))
    reference = data[text : text + 16]
    for found in list(re.finditer(re.escape(struct.pack("<I", 1) + reference[4:12]), data)):
        data[found.start() : found.start() + 16] = reference
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a text in it is damaged"):
        h5_file.padding_of(path)


@pytest.mark.parametrize(
    ("link", "told"),
    [(h5py.SoftLink("/elsewhere"), "with no tensor"), (h5py.ExternalLink("other.h5", "/m"), "links to another file")],
    ids=["soft", "external"],
)
def test_the_layers_of_an_h5_file_are_in_this_file(link, told, tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_group("m").attrs["keras_version"] = "2.15.0"
    with h5py.File(path, "w") as file:
        file["model_weights"] = link
    with pytest.raises(ValueError, match=told):
        ke.weights.identify(path)


@pytest.mark.parametrize("length", [-16, -1, 1 << 62, 4096], ids=hex)
def test_the_wrong_length_of_a_text_is_refused(length, tmp_path):
    """HDF5 2.0 never stops reading if the length of a text plus 16 is 2**64."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.15.0"
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, data.index(b"GCOL") + 24, length % (1 << 64))
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.h5.*a text in it is damaged"):
        h5_file.keras_version(path)


@pytest.mark.parametrize("fault", ["linked", "never written"])
def test_an_h5_file_of_one_dataset_for_many_layers_is_refused(fault, tmp_path):
    """20 MB that 1,000 layers call theirs: by links, or by datasets that were never written, which read as zeros."""
    path, names = tmp_path / "x.h5", [f"dense_{number}" for number in range(1000)]
    layers = [{"class_name": "Dense", "config": {"name": name, "units": 2240, "use_bias": False}} for name in names]
    layers[0]["config"]["batch_input_shape"] = [None, 2240]
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": layers}})
        file.attrs["layer_names"] = names
        kernel = file.create_dataset("kernel", data=np.ones((2240, 2240), "float32"))
        for name in names:
            group = file.create_group(name)
            group.attrs["weight_names"] = ["kernel"]
            if fault == "linked":
                group["kernel"] = kernel
            else:
                group.create_dataset("kernel", kernel.shape, kernel.dtype)
    tracemalloc.start()
    for call in (ke.weights.identify, lambda path: ke.weights.convert_file(path, tmp_path / "new.keras")):
        with pytest.raises(ValueError, match=r"another variable|more bytes than it has"):
            call(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6 and [*tmp_path.iterdir()] == [path]


def add(archive, name, data=b"", **kwargs):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in kwargs.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("fault", ["parent", "absolute", "link", "hard link", "device", "huge", "twice"])
@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_archives_with_traps_are_refused(fault, mode, tmp_path):
    path, flag = tmp_path / "x.tar.gz", tmp_path.parent / "escaped.index"
    with tarfile.open(path, mode) as archive:
        if fault == "parent":
            add(archive, "../escaped.index", b"hello")
        elif fault == "absolute":
            add(archive, str(flag), b"hello")
        elif fault == "link":
            add(archive, "x.index", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        elif fault == "hard link":
            add(archive, "x.index", type=tarfile.LNKTYPE, linkname="/etc/passwd")
        elif fault == "device":
            add(archive, "x.index", type=tarfile.CHRTYPE)
        elif fault == "twice":
            add(archive, "a/x.index", b"hello")
            add(archive, "b/x.index", b"hello")
        else:
            header = tarfile.TarInfo("x.data-00000-of-00001")
            header.size = 100 << 30
            archive.fileobj.write(header.tobuf())  # and none of its zeros
    with pytest.raises(ValueError, match=r"leaves its folder|not a plain file|declares 107,374,182,400 bytes|twice"):
        read_all(path)
    assert not flag.exists()


def test_an_archive_of_zeros_ends_early(tmp_path):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        add(archive, "0.index", bytes(50 << 20))
        header = tarfile.TarInfo("1.index")
        header.size = 1000 << 20  # either alone could be true
        archive.fileobj.write(header.tobuf())
    with pytest.raises(ValueError, match="declares 1,048,576,000 bytes"):
        read_all(path)


@pytest.mark.parametrize("folder", ["", "a/"])
def test_an_archive_without_a_shard_does_not_name_the_temporary_folder(folder, tmp_path):
    save_checkpoint(tmp_path / "w", {"net/stem/conv2d/kernel": np.ones(3, np.float32)})
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "w.index", f"{folder}w.index")
    with pytest.raises(ValueError, match=r"'x\.tar\.gz' without w\.data-00000-of-00001\)$") as caught:
        read_all(path)
    assert "keras_effnet-" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 2**63, 10**9])
def test_a_safetensors_header_is_bounded(length, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4))
    with pytest.raises(ValueError, match=r"safetensors"):
        read_all(path)


def sealed(index: bytes, change) -> bytes:
    """Returns an index with a changed block and a valid checksum."""
    for size in range(4, len(index) - 5):
        crc = google_crc32c.value(index[: size + 1])
        if struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) == index[size + 1 : size + 5]:
            block = change(bytearray(index[:size])) + index[size : size + 1]
            crc = google_crc32c.value(bytes(block))
            return (
                bytes(block)
                + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
                + index[size + 5 :]
            )
    raise AssertionError("no block found")


def test_a_forged_index_of_a_checkpoint_is_refused(tmp_path):
    """If the checksums are valid and the rest is not, TensorFlow's own reader aborts the process."""
    name, chance = b"net/stem/conv2d/kernel", random.Random(0)
    prefix = save_checkpoint(tmp_path / "x", {name.decode(): np.ones((3, 3, 3, 8), np.float32)})
    index, refused = Path(f"{prefix}.index"), 0
    whole = index.read_bytes()
    expected = read_all(prefix)[name.decode()]

    def first_byte_of_entry(block):
        block[block.index(name) + len(name)] = 0xFF
        return block

    def any_bytes(block):
        for _ in range(chance.choice([1, 2, 5])):
            block[chance.randrange(len(block))] = chance.randrange(256)
        return block

    for change in (first_byte_of_entry, *[any_bytes] * 300):
        index.write_bytes(sealed(whole, change))
        try:
            tensors = read_all(prefix)
        except (ValueError, OSError):
            refused += 1
        else:  # another name, or the same numbers
            assert all(np.array_equal(value.ravel(), expected.ravel()) for value in tensors.values())
    assert refused > 100


def test_checkpoints_read_as_tensorflow_reads_them(tmp_path):
    tf = pytest.importorskip("tensorflow")
    kinds = ("float32", "float64", "float16", "int32", "int64", "uint8", "int8", "int16", "uint16", "uint32", "uint64")
    tensors = {f"a/{kind}": np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    tensors |= {f"b/{number}": np.full((number % 5, 2), number, "float32") for number in range(2000)}
    tensors["scalar"] = np.float32(3)
    prefix = str(tmp_path / "a[1] ü" / "x.ckpt")
    (tmp_path / "a[1] ü").mkdir()
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[*tensors, "text", "brain"],
        shape_and_slices=[""] * (len(tensors) + 2),
        tensors=[*map(tf.constant, tensors.values()), tf.constant("a"), tf.constant(1.5, tf.bfloat16)],
    )
    found = read_all(prefix)
    assert float(found.pop("brain")) == 1.5
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())


def test_folders_of_checkpoints(tmp_path):
    ones = {"net/stem/conv2d/kernel": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="with none"):
        read_all(tmp_path)
    save_checkpoint(tmp_path / "model.ckpt-1", ones)
    (tmp_path / "checkpoint").unlink()
    assert read_all(tmp_path)["net/stem/conv2d/kernel"].sum() == 3  # the only one
    save_checkpoint(tmp_path / "model.ckpt-2", {name: 2 * value for name, value in ones.items()})
    for path in (tmp_path, tmp_path / "model.ckpt-2", tmp_path / "model.ckpt-2.index"):
        assert read_all(path)["net/stem/conv2d/kernel"].sum() == 6
    assert read_all(tmp_path / "model.ckpt-2.data-00000-of-00001")["net/stem/conv2d/kernel"].sum() == 6
    (tmp_path / "model.ckpt-2").mkdir()  # which is another thing than the prefix
    for ending in ("index", "data-00000-of-00001"):
        assert read_all(tmp_path / f"model.ckpt-2.{ending}")["net/stem/conv2d/kernel"].sum() == 6
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt-2\.data-00001-of-00002', which does not exist"):
        read_all(tmp_path / "model.ckpt-2.data-00001-of-00002")
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(ValueError, match=r"'model\.ckpt-1', 'model\.ckpt-2'"):
        read_all(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_all(tmp_path / "model.ckpt-3")


def written(kind: str, folder: Path) -> tuple[Path, list[Path]]:
    """Saves a small model in a file of this kind. Returns the path to load, and the files that it consists of."""
    model = fill(ke.EfficientNetLite0(**SMALL))
    if kind in ("tpu", "tar.gz"):
        prefix = ke.weights.export(model, folder / "x.ckpt", target="tpu")
        files = sorted(folder.glob("x.ckpt.*"))
        if kind == "tpu":
            return prefix, files
        path = folder / "x.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for file in (*files, folder / "checkpoint"):
                archive.add(file, f"net/{file.name}")
    elif kind in ("legacy.pth", "zip.pth"):
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        path = folder / "tf_efficientnet_lite0.pth"
        state = load_file(ke.weights.export(model, folder / "x.safetensors", target="timm"))
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip.pth")
    elif kind == "safetensors":
        path = ke.weights.export(model, folder / "x.safetensors", target="timm")
    elif kind == "h5":
        path = ke.weights.export(model, folder / "x.h5", target="keras")
    else:
        path = folder / f"x.{kind}"
        model.save(path) if kind == "keras" else model.save_weights(path)
    return path, [path]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Returns a copy cut short, or with bits or bytes changed: anywhere, or where a format keeps its structure."""
    if chance.random() < 0.2:
        return data[: chance.randrange(len(data))]
    copy, reach = bytearray(data), chance.choice([len(data), min(len(data), 4096), min(len(data), 65536)])
    at_the_end = chance.random() < 0.3
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(reach)
        place = len(data) - 1 - place if at_the_end else place
        copy[place] ^= 1 << chance.randrange(8) if chance.random() < 0.5 else chance.randrange(1, 256)
    return bytes(copy)


KINDS = ("tpu", "safetensors", "zip.pth", "weights.h5", "keras", "tar.gz", "legacy.pth", "h5")
CHECKED = ("tpu", "tar.gz", "zip.pth", "keras")  # formats that carry checksums of their numbers


@pytest.mark.skipif(BACKEND != "tensorflow", reason="reading files does not depend on the backend")
@pytest.mark.parametrize("times", [12, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", leading(KINDS, 4))
def test_damaged_files_change_nothing(kind, times, mini, tmp_path):
    path, files = written(kind, tmp_path)
    model, whole = ke.EfficientNetLite0(**SMALL), {file: file.read_bytes() for file in files}
    before, chance = model.get_weights(), random.Random(times)
    ke.weights.load(model, path)
    right, refused = model.get_weights(), 0
    assert not all(map(np.array_equal, before, right))
    for _ in range(times):
        model.set_weights(before)
        file = chance.choice(files)
        file.write_bytes(damaged(whole[file], chance))
        try:
            ke.weights.load(model, path)
        except (ValueError, OSError):
            refused += 1
            assert all(map(np.array_equal, model.get_weights(), before))
        else:
            shapes = zip(model.get_weights(), right, strict=True)
            assert kind not in CHECKED or all(np.array_equal(found, wanted) for found, wanted in shapes)
        file.write_bytes(whole[file])
    assert refused > times / 10


@pytest.mark.parametrize("start", [b"\x80\x04", b"PK"])
def test_a_header_whose_length_begins_like_another_format_is_one_of_safetensors(start, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    tensors = {f"conv_stem.weight{number}": np.zeros((1, 1), np.float32) for number in range(9)}
    wanted = int.from_bytes(start, "little")
    save_file(tensors, path, metadata={"spare": ""})
    missing = wanted - int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, metadata={"spare": "x" * missing})
    assert path.read_bytes().startswith(start)
    with opening.opened(path) as found:
        assert found.keys() == tensors.keys()


@pytest.mark.usefixtures("mini")
def test_an_unknown_format_is_told(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello, world")
    model = ke.EfficientNetLite0(weights=None)
    with pytest.raises(ValueError, match=r"first bytes are b'hello, w'"):
        ke.weights.load(model, path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ke.weights.load(model, tmp_path / "y.bin")
    with pytest.raises(ValueError, match="Nearest: 'keras'"):
        ke.weights.load(model, path, source="kera")

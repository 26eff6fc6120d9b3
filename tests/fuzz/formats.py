"""The formats: small valid files, how they are damaged, and what they are read with."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fuzz import mutations
from fuzz.mutations import (
    of_bytes,
    of_h5,
    of_index,
    of_json_text,
    of_pickle,
    of_png,
    of_protobuf,
    of_safetensors,
    of_zip,
)
from helpers import golden
from hypothesis import strategies as st

Files = dict[str, bytes]  # by their paths in the folder of a case


class Format(NamedTuple):
    """A format.

    Args:
        make: Function of an empty folder. Returns the valid files, as bytes or as dicts of the files of a folder.
        damage: Function from such a file to the strategy of damaged ones.
        name: The path that the reader takes, in the folder of a case.
        reader: Key of `readers.READERS`.
        share: Integer. A case takes this many times longer than others, so there are fewer of them.
    """

    make: Callable[[Path], list[Any]]
    damage: Callable[[Any], st.SearchStrategy]
    name: str
    reader: str = "tensors"
    share: int = 1

    def write(self, case: "bytes | Files", folder: Path) -> Path:
        """Writes the files of a case anew: libraries may have mapped the ones before. Returns the path to read."""
        if isinstance(case, dict):
            shutil.rmtree(folder, ignore_errors=True)
        for name, data in (case if isinstance(case, dict) else {self.name: case}).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        return folder / self.name


def pack(case: "bytes | Files") -> bytes:
    """Returns a case as one file."""
    return mutations.zipped([*case.items()]) if isinstance(case, dict) else case


def unpack(data: bytes, is_folder: bool) -> "bytes | Files":
    """Returns the case in a file."""
    return dict(mutations.members_of(data)) if is_folder else data


def _any_file(files: Files, special: dict[str, Callable] | None = None) -> st.SearchStrategy[Files]:
    """Damages one file of several, or removes it."""

    def of(name: str) -> st.SearchStrategy[Files]:
        way = next((each for end, each in (special or {}).items() if name.endswith(end)), of_bytes)
        return way(files[name]).map(lambda new: files | {name: new})

    names = st.sampled_from(sorted(files))
    removed = names.map(lambda gone: {name: data for name, data in files.items() if name != gone})
    return st.one_of(removed, *map(of, sorted(files)), *map(of, sorted(files)))


def read_folder(folder: Path, under: str = "") -> Files:
    """Returns the files in a folder."""
    return {
        under + str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# Valid files


NUMBERS = np.linspace(-1, 1, 24, dtype="float32")
STATE = {
    "conv_stem.weight": NUMBERS.reshape(2, 3, 2, 2),
    "bn1.running_mean": NUMBERS[:2],
    "half": NUMBERS[:4].astype("float16"),
    "bn1.num_batches_tracked": np.zeros((), "int64"),
    "none": np.zeros((0, 3), "float32"),
}


def _safetensors(folder: Path) -> list[bytes]:
    from safetensors.numpy import save

    return [save(STATE, metadata={"format": "pt", "architecture": "efficientnet_b0", "padding": "same"})]


def _torch(folder: Path, new: bool) -> list[bytes]:
    import torch

    state = {name: torch.from_numpy(np.array(value)) for name, value in STATE.items()}
    state |= {"turned": state["conv_stem.weight"].permute(3, 1, 0, 2), "brain": state["half"].bfloat16()}
    parts = {
        "epoch": 3,
        "state_dict": state,
        "state_dict_ema": state,
        "args": Namespace(lr=0.1, betas=None),
        "metric": 77.1,
    }
    found = []
    for whole in (state, parts):
        file = io.BytesIO()
        torch.save(whole, file, _use_new_zipfile_serialization=new)
        found.append(file.getvalue())
    return found


def _of_legacy(data: bytes) -> st.SearchStrategy[bytes]:
    """Changes the pickles of a torch file from before 1.6, or its bytes."""
    import pickletools

    file, places = io.BytesIO(data), [0]
    for _ in range(5):
        list(pickletools.genops(file))
        places.append(file.tell())

    def of(number: int) -> st.SearchStrategy[bytes]:
        start, end = places[number : number + 2]
        return of_pickle(data[start:end]).map(lambda new: data[:start] + new + data[end:])

    return st.one_of(of_bytes(data), *map(of, range(5)), of(3), of(3))


@cache
def _keras2() -> Any:
    """Returns a model of Keras 2 with the first layers of a net."""
    import tf_keras

    layers = tf_keras.layers
    pixels = tf_keras.Input((8, 8, 3))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)), name="stem_conv_pad")(layers.Rescaling(1 / 255)(pixels))
    x = layers.Conv2D(2, 3, 2, "valid", use_bias=False, name="stem_conv")(x)
    x = layers.Activation("swish")(layers.BatchNormalization(name="stem_bn")(x))
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return tf_keras.Model(pixels, layers.Dense(2, activation="softmax", name="predictions")(x), name="small")


@cache
def _keras3() -> Any:
    import keras

    layers: Any = keras.layers
    entries = [
        keras.Input((8, 8, 3)),
        layers.Rescaling([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], name="preprocessing"),
        layers.ZeroPadding2D(((0, 1), (0, 1)), name="stem_conv_pad"),
        layers.Conv2D(2, 3, 2, use_bias=False, name="stem_conv"),
        layers.BatchNormalization(name="stem_bn"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(2, name="predictions"),
    ]
    return keras.Sequential(entries, name="small")


def _quiet(function: Callable, *arguments: Any, **kwargs: Any) -> None:
    """Calls a writer of Keras, which warns that a format is old."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*arguments, **kwargs)


def _h5(folder: Path) -> list[bytes]:
    import h5py

    _quiet(_keras3().save, folder / "3.h5")
    _keras3().save_weights(folder / "3.weights.h5")
    _keras2().save_weights(folder / "2.h5")
    _keras3().save_weights(folder / "2.14.weights.h5")
    with h5py.File(folder / "2.14.weights.h5", "a") as file:  # as that release called it
        file.move("layers", "_layer_checkpoint_dependencies")
    return [(folder / name).read_bytes() for name in ("3.weights.h5", "3.h5", "2.h5", "2.14.weights.h5")]


def _h5_of_keras2(folder: Path) -> list[bytes]:
    _quiet(_keras2().save, folder / "2.h5")
    return [(folder / "2.h5").read_bytes()]


def _archives(folder: Path) -> list[bytes]:
    import keras_effnet as ke

    ke.save_model(_keras3(), folder / "3.keras", labels=["cat", "dog"], crop_padding=0)
    return [(folder / "3.keras").read_bytes(), *_archives_of_keras2(folder)]


def _archives_of_keras2(folder: Path) -> list[bytes]:
    _quiet(_keras2().save, folder / "2.keras")
    return [(folder / "2.keras").read_bytes()]


INSIDE = {".json": of_json_text, ".h5": of_h5}


def _checkpoints(folder: Path) -> list[Files]:
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(folder / "x"),
        tensor_names=[*STATE, "text", "brain"],
        shape_and_slices=[""] * (len(STATE) + 2),
        tensors=[*map(tf.constant, STATE.values()), tf.constant("a"), tf.constant(1.5, tf.bfloat16)],
    )
    return [read_folder(folder)]


def _graphs(folder: Path) -> list[Files]:
    _keras2().save_weights(folder / "x")
    return [{name: data for name, data in read_folder(folder).items() if name != "checkpoint"}]


def _of_graph(files: Files) -> st.SearchStrategy[Files]:
    return mutations.of_graph(files, "x.index", "x.data-00000-of-00001")


def _tars(folder: Path) -> list[bytes]:
    found = []
    for mode in ("w:gz", "w", "w:bz2", "w:xz"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
            for name, data in _checkpoints(folder)[0].items():
                member = tarfile.TarInfo(f"net/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        found.append(file.getvalue())
    return found


def _of_tar(data: bytes) -> st.SearchStrategy[bytes]:
    """Changes the archive in a compressed one, or its bytes."""
    import gzip

    if data[:2] != b"\x1f\x8b":
        return of_bytes(data)
    return st.one_of(of_bytes(data), of_bytes(gzip.decompress(data)).map(lambda new: gzip.compress(new, 1)))


def _saved_models(folder: Path) -> list[Files]:
    """Returns a SavedModel without the graph that TensorFlow runs, which this package does not read."""
    from tensorflow.core.protobuf import saved_model_pb2

    _quiet(_keras2().save, folder / "m")
    files = read_folder(folder / "m", "m/")
    whole = saved_model_pb2.SavedModel.FromString(files["m/saved_model.pb"])
    whole.meta_graphs[0].ClearField("graph_def")
    whole.meta_graphs[0].object_graph_def.ClearField("concrete_functions")
    del whole.meta_graphs[0].object_graph_def.nodes[8:]
    files["m/saved_model.pb"] = whole.SerializeToString()
    # As TensorFlow until 2.4 saved it: the root holds its own description.
    from tf_keras.protobuf import saved_metadata_pb2

    node = saved_metadata_pb2.SavedMetadata.FromString(files["m/keras_metadata.pb"]).nodes[0]
    whole.meta_graphs[0].object_graph_def.nodes[0].user_object.metadata = node.metadata
    old = files | {"m/saved_model.pb": whole.SerializeToString()}
    del old["m/keras_metadata.pb"]
    return [files, old]


def _of_saved_model(files: Files) -> st.SearchStrategy[Files]:
    special: dict[str, Callable] = {".pb": of_protobuf, ".index": of_index}
    ways = [_any_file(files, special)]
    beside = files.get("m/keras_metadata.pb")
    if beside is not None:
        from tf_keras.protobuf import saved_metadata_pb2

        nodes = saved_metadata_pb2.SavedMetadata.FromString(beside)

        def whole(text: bytes) -> Files:
            changed = saved_metadata_pb2.SavedMetadata()
            changed.CopyFrom(nodes)
            changed.nodes[0].metadata = text.decode(errors="replace")
            return files | {"m/keras_metadata.pb": changed.SerializeToString()}

        ways.append(of_json_text(nodes.nodes[0].metadata).map(whole))
        variables = {name: data for name, data in files.items() if "variables" in name}
        names = [f"m/variables/variables.{end}" for end in ("index", "data-00000-of-00001")]
        ways.append(mutations.of_graph(variables, *names).map(lambda new: files | new))
    return st.one_of(*ways)


def _nets(folder: Path) -> list[bytes]:
    """Returns the weights of a whole net, all zero, which compresses to little."""
    import h5py

    import keras_effnet as ke

    net = ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3))
    path = ke.weights.export(net, folder / "net.h5", target="keras")
    with h5py.File(path) as old, h5py.File(folder / "small.h5", "w") as new:
        names: list[str] = []
        old.visit(names.append)
        new.attrs.update(old.attrs)
        for name in names:
            if isinstance(old[name], h5py.Group):
                new.create_group(name).attrs.update(old[name].attrs)
            else:
                zeros = np.zeros(old[name].shape, old[name].dtype)
                new.create_dataset(name, data=zeros, compression=9 if zeros.size > 64 else None)
    return [(folder / "small.h5").read_bytes()]


MODES = ("RGB", "L", "RGBA", "P")
KINDS = {
    "JPEG": [("RGB", {"quality": 80}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True, "exif": True})],
    "PNG": [("RGB", {}), ("P", {"transparency": 0}), ("I;16", {}), ("1", {}), ("RGBA", {"exif": True})],
    "GIF": [("P", {}), ("RGB", {"save_all": True})],
    "BMP": [("RGB", {}), ("P", {}), ("1", {})],
    "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"save_all": True})],
    "TIFF": [
        ("RGB", {}),
        ("L", {"compression": "tiff_lzw"}),
        ("F", {}),
        ("RGB", {"compression": "jpeg"}),
        ("1", {"compression": "group4"}),
    ],
    "JPEG2000": [("RGB", {}), ("L", {"irreversible": True})],
    "AVIF": [("RGB", {})],
    "ICO": [("RGBA", {})],
    "PPM": [("RGB", {}), ("L", {}), ("1", {})],
}


def _images(kind: str) -> list[bytes]:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), "uint8")
    found = []
    for mode, options in KINDS[kind]:
        picture = Image.fromarray(noise)
        options = dict(options)
        if mode in ("I;16", "F"):
            picture = Image.fromarray(noise[..., 0].astype("uint16" if mode == "I;16" else "float32") * 100)
        else:
            picture = picture.convert(mode)
        if options.pop("exif", False):
            exif = Image.Exif()
            exif[0x0112], exif[0x010E] = 6, "words"
            options["exif"] = exif.tobytes()
        if options.get("save_all"):
            options |= {"append_images": [Image.fromarray(255 - noise).convert(mode)], "duration": 50}
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def _recipes(folder: Path) -> list[bytes]:
    from keras_effnet.tpu.config import to_json
    from keras_effnet.tpu.recipes import find

    return [to_json(find(name), steps=10, classes=3).encode() for name in ("b0_autoaugment", "digits_demo")]


METADATA = {
    "schema": 1,
    "model": "small",
    "input_shape": [8, 8, 3],
    "pixels": "0-255",
    "preprocessing": {
        "scale": [0.1],
        "offset": [0.0],
        "crop_padding": 0,
        "interpolation": "bilinear",
        "crop_mode": "center",
        "inside": True,
    },
    "weights": {"model": "efficientnet-b0", "tag": "imagenet", "top1": 77.1, "classes": 1000},
    "labels": ["cat", "dog"],
    "training": None,
    "outputs": None,
    "precision": "float32",
}


def _graph_of_onnx() -> Any:
    import onnx
    from onnx import TensorProto, helper

    pixels = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 3])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    graph = helper.make_graph([node], "small", [pixels], [result], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"keras_effnet": json.dumps(METADATA)})
    onnx.checker.check_model(model)
    return model


def _onnx(folder: Path) -> list[bytes]:
    return [_graph_of_onnx().SerializeToString()]


def _of_onnx(data: bytes) -> st.SearchStrategy[bytes]:
    import onnx

    model = onnx.load_from_string(data)

    def whole(text: bytes) -> bytes:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.metadata_props[0].value = text.decode(errors="replace")
        return changed.SerializeToString()

    return st.one_of(of_protobuf(data), of_json_text(json.dumps(METADATA)).map(whole))


def _openvino(folder: Path) -> list[Files]:
    from keras_effnet import compat

    openvino = compat.load_openvino()
    (folder / "x.onnx").write_bytes(_graph_of_onnx().SerializeToString())
    net = openvino.Core().read_model(folder / "x.onnx")
    net.set_rt_info(json.dumps(METADATA), ["keras_effnet"])
    openvino.save_model(net, folder / "x.xml", compress_to_fp16=False)
    return [{name: (folder / name).read_bytes() for name in ("x.xml", "x.bin")}]


def _of_openvino(files: Files) -> st.SearchStrategy[Files]:
    from xml.sax.saxutils import quoteattr

    start, _, end = files["x.xml"].partition(b'<keras_effnet value="')
    end = end[end.index(b'"') + 1 :]

    def whole(text: bytes) -> Files:
        value = quoteattr(text.decode(errors="replace"), {'"': "&quot;"})
        return files | {"x.xml": start + b"<keras_effnet value=" + value.encode() + end}

    return st.one_of(_any_file(files), _any_file(files), of_json_text(json.dumps(METADATA)).map(whole))


def _tflites(folder: Path) -> list[bytes]:
    file = io.BytesIO(b"\x1c\0\0\0TFL3" + bytes(56))
    file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("keras_effnet.json", json.dumps(METADATA))
        archive.writestr("labels.txt", "cat\ndog\n")
    return [file.getvalue()]


def _of_tflite(data: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(of_bytes(data), of_zip(data, INSIDE).map(lambda archive: data[:64] + archive))


def _configs(folder: Path) -> list[Files]:
    configured = {
        "architecture": "tf_efficientnet_b0",
        "num_classes": 2,
        "num_features": 1280,
        "global_pool": "avg",
        "model_args": {"in_chans": 3},
        "label_names": ["cat", "dog"],
        "pretrained_cfg": {
            "tag": "a1",
            "input_size": [3, 224, 224],
            "crop_pct": 0.875,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "keras_effnet": {"interpolation": "half-pixel-bilinear"},
    }
    return [{"config.json": json.dumps(configured).encode(), "model.safetensors": b""}]


def _of_config(files: Files) -> st.SearchStrategy[Files]:
    return of_json_text(files["config.json"]).map(lambda new: files | {"config.json": new})


def _presets(folder: Path) -> list[Files]:
    """Returns a preset of keras-hub as it was recorded, with weights of zeros."""
    import h5py

    recorded = golden("presets/classifier.json")
    files = {f"m/{name}": json.dumps(document).encode() for name, document in recorded["documents"].items()}
    for name, groups in recorded["weights"].items():
        with h5py.File(folder / name, "w") as file:
            for group, shape in groups:
                if shape is not None:
                    file[group] = np.zeros(shape, "float32")
        files[f"m/{name}"] = (folder / name).read_bytes()
    return [files]


def _preset_archives(folder: Path) -> list[bytes]:
    """Returns the same classifier as a `.keras` file."""
    import h5py

    recorded = golden("presets/classifier.json")
    with h5py.File(folder / "x.h5", "w") as file:
        for group, shape in (row for groups in recorded["weights"].values() for row in groups):
            if shape is not None:
                file[group] = np.zeros(shape, "float32")
    task = json.dumps(recorded["documents"]["task.json"]).encode()
    return [mutations.zipped([("config.json", task), ("model.weights.h5", (folder / "x.h5").read_bytes())])]


def _of_archive(data: bytes) -> st.SearchStrategy[bytes]:
    return of_zip(data, INSIDE)


def _of_torch_zip(data: bytes) -> st.SearchStrategy[bytes]:
    return of_zip(data, {"data.pkl": of_pickle})


FORMATS: dict[str, Format] = {
    "safetensors": Format(_safetensors, of_safetensors, "x.safetensors"),
    "safetensors_stated": Format(_safetensors, of_safetensors, "x.safetensors", "stated"),
    "torch_zip": Format(lambda folder: _torch(folder, True), _of_torch_zip, "x.pth"),
    "torch_legacy": Format(lambda folder: _torch(folder, False), _of_legacy, "x.pth"),
    "h5": Format(_h5, of_h5, "x.h5"),
    "h5_stated": Format(_h5, of_h5, "x.h5", "stated"),
    "h5_keras2": Format(_h5_of_keras2, of_h5, "x.h5", "whole_model"),
    "keras": Format(_archives, _of_archive, "x.keras"),
    "keras_stated": Format(_archives, _of_archive, "x.keras", "stated"),
    "keras_keras2": Format(_archives_of_keras2, _of_archive, "x.keras", "whole_model"),
    "checkpoint": Format(_checkpoints, lambda files: _any_file(files, {".index": of_index}), "x"),
    "checkpoint_graph": Format(_graphs, _of_graph, "x", "graph"),
    "checkpoint_titles": Format(_graphs, _of_graph, "x"),
    "tar": Format(_tars, _of_tar, "x.tar.gz"),
    "tar_stated": Format(_tars, _of_tar, "x.tar.gz", "stated"),
    "saved_model": Format(_saved_models, _of_saved_model, "m", "whole_model"),
    **{
        f"image_{kind.lower()}": Format(
            lambda folder, kind=kind: _images(kind), of_png if kind == "PNG" else of_bytes, f"x.{kind.lower()}", "image"
        )
        for kind in KINDS
    },
    "recipe": Format(_recipes, of_json_text, "config.json", "recipe"),
    "preset": Format(_presets, lambda files: _any_file(files, INSIDE), "m", "preset", 2),
    "preset_keras": Format(_preset_archives, _of_archive, "x.keras", "preset", 2),
    "hub_config": Format(_configs, _of_config, "config.json", "beside"),
    "metadata_keras": Format(_archives, _of_archive, "x.keras", "metadata"),
    "metadata_litert": Format(_tflites, _of_tflite, "x.tflite", "metadata"),
    "metadata_onnx": Format(_onnx, _of_onnx, "x.onnx", "metadata"),
    "metadata_openvino": Format(_openvino, _of_openvino, "x.xml", "metadata"),
    "metadata_report": Format(
        lambda folder: [mutations.text({"metadata": METADATA})], of_json_text, "x.json", "metadata"
    ),
    # Whole ways through the package.
    "rebuilt": Format(lambda folder: _h5_of_keras2(folder), of_h5, "x.h5", "rebuilt", 50),
    "identified": Format(_nets, of_h5, "x.h5", "identified", 20),
    "loaded": Format(lambda folder: _archives(folder)[:1], _of_archive, "x.keras", "loaded", 20),
    "export_onnx": Format(_onnx, _of_onnx, "x.onnx", "export", 20),
    "export_openvino": Format(_openvino, _of_openvino, "x.xml", "export", 20),
    # Not .tflite: LiteRT 2.3 does not verify a graph, and ends the process on a damaged one.
}

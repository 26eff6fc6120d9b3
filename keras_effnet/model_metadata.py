"""What travels with a model: class names, and how photos are cropped, resized and normalized. One schema for all.

A `.keras` file holds it in a member of its own, an export in the place that its format has for metadata.
docs/metadata.md describes the keys.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet import class_names, compat, files
from keras_effnet.errors import one_line

if TYPE_CHECKING:
    import keras

SCHEMA = 1  # increased when a key changes its meaning

MEMBER = "keras_effnet.json"  # in a .keras file, a LiteRT file and a SavedModel


@dataclass(frozen=True)
class Expects:
    """How a model's photos are cropped and resized.

    Args:
        crop_padding: Integer. See `images.resizing.crop_and_resize()`.
        interpolation: String. See `images.resizing.crop_and_resize()`.
        crop_mode: String. See `images.resizing.crop_and_resize()`.
    """

    crop_padding: int | None = None
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    @classmethod
    def of(cls, rules: Any) -> "Expects":
        """Returns the fields that an object shares with this class.

        Args:
            rules: An `Expects`, or a `Record` or `Description` of weights.

        Returns:
            An `Expects`.
        """
        return cls(**{key.name: getattr(rules, key.name) for key in fields(cls)})


def expects_in(metadata: dict[str, Any]) -> Expects | None:
    """Returns how photos are cropped and resized, from the metadata of a file.

    Args:
        metadata: See `metadata()`.

    Returns:
        An `Expects`, or None if the metadata do not say it.
    """
    pixels = metadata.get("preprocessing", {})
    if "interpolation" not in pixels:
        return None
    return Expects(**{key.name: pixels[key.name] for key in fields(Expects) if key.name in pixels})


def holders(model: Any) -> list[Any]:
    """Returns a model, and the EfficientNet in it if that is a layer of it.

    Args:
        model: A `keras.Model`.

    Returns:
        List of one or two models.
    """
    from keras_effnet.nets import inspection

    try:
        holder, _ = inspection.find(model)
    except ValueError:
        return [model]
    return [model] if holder is model else [model, holder]


def expects_of(model: Any) -> Any:
    """Returns how a model's photos are cropped and resized.

    Args:
        model: A `keras.Model`.

    Returns:
        An `Expects`, or the `Record` of the weights, which has the same fields; or None if neither is known.
    """
    for holder in holders(model):
        found = getattr(holder, "expects", None) or getattr(holder, "weights_record", None)
        if found is not None:
            return found
    return None


def labels_of(model: Any) -> list[str] | None:
    """Returns a model's class names.

    Args:
        model: A `keras.Model`.

    Returns:
        List of strings: `model.labels`, or ImageNet's for 1000 classes with published weights. None if they are not
        known.
    """
    labels = getattr(model, "labels", None)
    if labels is not None:
        return [str(label) for label in labels]
    records = [getattr(holder, "weights_record", None) for holder in holders(model)]
    of_imagenet = any(record and record.classes == 1000 for record in records)
    return class_names.labels() if of_imagenet and model.outputs[0].shape[-1] == 1000 else None


def checked(labels: Sequence[str], outputs: int) -> list[str]:
    """Checks class names.

    Args:
        labels: Sequence of strings.
        outputs: Integer, classes of the model.

    Returns:
        List of strings.

    Raises:
        ValueError: If they are not one name for each class.
    """
    if isinstance(labels, str) or not all(isinstance(label, str) and label for label in labels):
        raise ValueError(f"Expected labels as a list of class names. Received: labels={labels!r:.200}")
    if len(labels) != outputs:
        raise ValueError(f"Expected a label for each of the model's {outputs} outputs. Received: {len(labels)} labels")
    return list(labels)


def of(
    model: "keras.Model",
    labels: Sequence[str] | None = None,
    input_shape: Sequence[int | None] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Returns the metadata of a model.

    Args:
        model: A functional or sequential `keras.Model` of images.
        labels: List of class names. Defaults to None: `model.labels`.
        input_shape: Shape of an image. Defaults to None: the model's own.
        **more: Further keys.

    Returns:
        Dict that JSON can hold. docs/metadata.md describes the keys.

    Raises:
        ValueError: If there is not one label for each output.
    """
    from keras_effnet.nets import inspection

    pixels: dict[str, Any] = {}
    record, expects = None, expects_of(model)
    for holder in reversed(holders(model)):
        record = getattr(holder, "weights_record", None) or record
    try:
        reading = inspection.find(model)[1]
        pixels = {"scale": list(reading.scale), "offset": list(reading.offset)}
    except ValueError:  # a net of another package
        pass
    if expects is not None:
        pixels |= asdict(Expects.of(expects))
    labels = labels_of(model) if labels is None else labels
    shape = model.inputs[0].shape[1:] if input_shape is None else input_shape
    return {
        "schema": SCHEMA,
        "model": model.name,
        "input_shape": list(shape),
        "pixels": "0-255",
        "preprocessing": pixels | {"inside": True},
        "weights": record and {key: value for key, value in asdict(record).items() if key != "files"},
        "labels": None if labels is None else checked(labels, model.outputs[0].shape[-1]),
        "training": getattr(model, "training_record", None),
        **more,
    }


def save_model(
    model: "keras.Model",
    path: str | os.PathLike,
    labels: Sequence[str] | None = None,
    *,
    crop_padding: int | None = None,
    interpolation: str | None = None,
) -> Path:
    """Saves a model with its class names, and with how photos are cropped and resized for it.

    `keras.saving.load_model()` reads the file too. Only `keras_effnet.load_model()` returns the class names, and only
    this function keeps them: `model.save()` drops them.

    Args:
        model: A functional or sequential `keras.Model` of images.
        path: Path of the file. It ends in `.keras`.
        labels: List of class names, in the order of the outputs. Defaults to None: `model.labels`, if there are any.
        crop_padding: Integer, pixels that are cropped away around a photo, measured at the size of the model's input:
            0 keeps the largest window. Defaults to None: as the model's weights expect.
        interpolation: `"bicubic"`, `"bilinear"` or `"half-pixel-bilinear"`. Defaults to None: as the model's weights
            expect.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the path has another ending, or there is not one label for each output.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None, classes=2)
    >>> path = ke.save_model(model, "pets.keras", labels=["cat", "dog"])
    >>> ke.load_model(path).labels
    ['cat', 'dog']
    """
    if not os.fspath(path).endswith(".keras"):
        raise ValueError(f"Expected a path that ends in .keras. Received: {os.fspath(path)!r}")
    found = of(model, labels)
    given = {"crop_padding": crop_padding, "interpolation": interpolation}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        found["preprocessing"] = asdict(Expects()) | found["preprocessing"] | given
    with files.naming(path), files.replacing(path) as temporary:
        model.save(temporary)
        add(temporary, found)
    return Path(path)


def add(path: str | os.PathLike, metadata: dict[str, Any]) -> None:
    """Adds metadata to a `.keras` file that has none. Keras ignores the member.

    Args:
        path: Path of the file.
        metadata: See `of()`.
    """
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MEMBER, json.dumps(metadata))


def metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what travels with a model: its class names, and how photos are cropped, resized and normalized for it.

    Args:
        path: Path of a `.keras` file, of an exported file (`.tflite`, `.onnx`, `.xml`, or the folder of a SavedModel),
            of the folder of a training run, or of a report (`result.json` of a run, `report.json` of pruning).

    Returns:
        Dict with the keys that docs/metadata.md describes. Empty for a file that another program has saved.

    Raises:
        ImportError: If the runtime of the format is not installed.
        OSError: If the file cannot be read.
        ValueError: If it is of another kind or damaged, or a newer version of this package has saved it.

    Example:

    >>> import keras_effnet as ke
    >>> path = ke.save_model(ke.EfficientNetB0(weights=None, classes=2), "pets.keras", labels=["cat", "dog"])
    >>> ke.metadata(path)["labels"]
    ['cat', 'dog']
    """
    place = Path(path)
    kind = place.suffix
    if place.is_dir():
        kind = "run" if (place / "config.json").is_file() else "savedmodel"
    if kind not in _READERS:
        raise ValueError(
            f"Expected a model or a report: a path that ends in {', '.join(k for k in _READERS if '.' in k)}, the "
            f"folder of a SavedModel, or that of a run. Received: {os.fspath(path)!r}"
        )
    if not place.exists():
        raise FileNotFoundError(f"Expected a model or a report. Received: {os.fspath(path)!r}, which does not exist")
    with _damage_named(place):
        text = _READERS[kind](place)
        found = json.loads(text) if text else {}
        if kind == ".json":
            found = found.get("metadata", {})
        _check_types(found)
    if found.get("schema", SCHEMA) > SCHEMA:  # files from before the first release have no number
        raise ValueError(
            f"Expected metadata of schema {SCHEMA}. Received: {os.fspath(path)!r} of schema {found['schema']}, which a "
            "newer keras_effnet has saved. Update keras_effnet to read it"
        )
    return found


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each library raises its own types
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"Expected a model or a report. Received: {os.fspath(path)!r}, whose metadata cannot be read "
            f"({one_line(error)})"
        ) from error


def _check_types(found: Any, types: dict[str, Any] | None = None, where: str = "") -> None:
    """Raises for a value of another type than docs/metadata.md names. A key may be missing, and others there."""
    if not isinstance(found, dict):
        raise ValueError(f"expected a dict, received {found!r:.80}")
    for key, kind in (_TYPES if types is None else types).items():
        value = found.get(key)
        if key in found and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ValueError(f"its key {where + key!r} is {value!r:.80}")
    if types is None:
        _check_types(found.get("preprocessing") or {}, _PIXELS, "preprocessing.")
        sides = found.get("input_shape") or []
        if not all(side is None or (type(side) is int and side > 0) for side in sides):
            raise ValueError(f"its key 'input_shape' is {sides!r:.80}")
        if not all(isinstance(label, str) for label in found.get("labels") or []):
            raise ValueError("its labels are not strings")


# docs/metadata.md. Files from before the first release may lack a key.
_TYPES: dict[str, Any] = {
    "schema": int,
    "model": str,
    "input_shape": list,
    "labels": list | None,
    "preprocessing": dict,
    "weights": dict | None,
    "training": dict | None,
    "outputs": list | int | None,
    "precision": str,
}
_PIXELS: dict[str, Any] = {
    "crop_padding": int | None,
    "interpolation": str,
    "crop_mode": str,
    "scale": list,
    "offset": list,
}

_LONGEST = 1 << 24  # bytes of the metadata, which may list thousands of class names


def _of_archive(path: Path) -> bytes | None:
    """Reads the member of a `.keras` file, or of the archive at the end of a LiteRT file."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            return None
        if archive.getinfo(MEMBER).file_size > _LONGEST:
            raise ValueError(f"more than {_LONGEST} bytes")
        return archive.read(MEMBER)


def _of_onnx(path: Path) -> str | None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(os.fspath(path), options)
    return session.get_modelmeta().custom_metadata_map.get("keras_effnet")


def _of_openvino(path: Path) -> str | None:
    net = compat.load_openvino().Core().read_model(path)
    return net.get_rt_info(["keras_effnet"]).value if net.has_rt_info(["keras_effnet"]) else None


def _of_savedmodel(path: Path) -> str | None:
    extra = path / "assets.extra" / MEMBER
    return extra.read_text() if extra.is_file() else None


# Functions that read the text of the metadata, by suffix or kind of folder.
_READERS: dict[str, Callable[[Path], Any]] = {
    ".keras": _of_archive,
    ".tflite": _of_archive,
    ".onnx": _of_onnx,
    ".xml": _of_openvino,
    ".json": Path.read_text,
    "savedmodel": _of_savedmodel,
    "run": lambda folder: _of_archive(folder / "model.keras"),
}

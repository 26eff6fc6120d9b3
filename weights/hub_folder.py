"""Saves a folder that is ready for the Hugging Face Hub: weights, timm's config.json, and a model card."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet import class_names, files
from keras_effnet.nets.variants import VARIANTS, timm_name
from keras_effnet.weights.formats import safetensors_file

# The files of such a folder. It may hold others, as a clone of a repository does, which stay.
_NAMES = ("model.safetensors", "config.json", "README.md")


def write(
    path: Any,
    tensors: dict[str, np.ndarray],
    counters: list[str],
    variant: str | None,
    padding: str,
    features: int,
    classes: int | None,
    pixels: tuple[list[float], list[float]],
    metadata: dict[str, Any],
) -> Path:
    """Saves a model as a folder that timm and this package load, also from the Hub.

    Args:
        path: Path of the folder. It is made. Files of the same names in it are replaced.
        tensors: Dict from timm's names to arrays.
        counters: See `safetensors_file.write_safetensors()`.
        variant: Name of the model, or None for a net that has other channels than any.
        padding: Key of `nets.architecture.EPSILONS`.
        features: Integer, channels of the features.
        classes: Integer, or None without a classifier.
        pixels: Tuple of scale and offset, see `nets.normalization.constants()`.
        metadata: See `model_metadata.of()`. Its labels, figures and licence stand in the card.

    Returns:
        Path of the folder.

    Raises:
        OSError: If it cannot be written.
        ValueError: If timm does not have the net.
    """
    architecture = variant and timm_name(variant, padding)
    if not (variant and architecture):
        found = f"{variant} with padding={padding!r}" if variant else "a net with other channels"
        raise ValueError(
            f"Expected a net that timm has, since the folder names it in its config.json. Received: {found}. Save it "
            "with model.save(), and upload that file"
        )
    size = VARIANTS[variant].resolution
    config = _config(architecture, size, features, classes, pixels, metadata)
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with files.folder_beside(place) as folder:
        told = {"format": "pt", "architecture": architecture}
        safetensors_file.write_safetensors(folder / _NAMES[0], tensors, counters, told)
        (folder / _NAMES[1]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / _NAMES[2]).write_text(_card(variant, config, metadata), encoding="utf-8")
        place.mkdir(exist_ok=True)
        # Should the process end here, no weights stand beside the config of others.
        (place / _NAMES[1]).unlink(missing_ok=True)
        for name in _NAMES:
            os.replace(folder / name, place / name)
    return place


def _config(
    architecture: str, resolution: int, features: int, classes: int | None, pixels, metadata: dict[str, Any]
) -> dict[str, Any]:
    scale, offset = (np.asarray(each, np.float64) for each in pixels)
    expects = metadata.get("preprocessing", {})
    shape = metadata.get("input_shape") or [None, None, len(scale)]
    sides = shape[:2] if shape[2] == len(scale) else shape[1:]  # else channels come first
    size = [side or resolution for side in sides]
    crop_padding = expects.get("crop_padding")
    labels = metadata.get("labels")
    pretrained = {
        "num_classes": classes or 0,
        "input_size": [len(scale), *size],
        "interpolation": expects.get("interpolation", "bicubic").removeprefix("half-pixel-"),
        # Without a padding, an eighth is cropped away, as in the original's newest evaluation code.
        "crop_pct": 0.875 if crop_padding is None else round(size[0] / (size[0] + crop_padding), 6),
        "crop_mode": expects.get("crop_mode", "center"),
        # timm divides by 255 first: (x / 255 - mean) / std.
        "mean": (-offset / scale / 255).round(9).tolist(),
        "std": (1 / scale / 255).round(9).tolist(),
        "fixed_input_size": False,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": _licence(metadata).lower(),
    }
    config: dict[str, Any] = {"architecture": architecture, "num_classes": classes or 0, "num_features": features}
    if labels is not None and labels != class_names.labels():
        config["label_names"] = labels
    if len(scale) != 3:
        config["model_args"] = {"in_chans": len(scale)}
    if expects.get("interpolation", "").startswith("half-pixel-"):
        config["keras_effnet"] = {"interpolation": expects["interpolation"]}  # timm has no name for it
    return config | {"pretrained_cfg": pretrained}


def _licence(metadata: dict[str, Any]) -> str:
    return (metadata.get("weights") or {}).get("licence") or "other"


def _card(variant: str, config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Returns the model card. Its first lines are what the Hub reads."""
    inner = config["pretrained_cfg"]
    channels, height, width = inner["input_size"]
    record, training = metadata.get("weights") or {}, metadata.get("training") or {}
    facts = {
        "Classes": config["num_classes"] or "none: the features of an image",
        "Input": f"{height} x {width} pixels with {channels} channels",
        "Normalization": f"(pixel / 255 - mean) / std, mean {inner['mean']}, std {inner['std']}",
        "Resizing": _resizing(config),
        "Published top-1": record.get("top1") and f"{record['top1']} % on ImageNet, says {record['source']}",
        "Weights": record.get("tag"),
        "Trained on": training.get("data"),
        "Started from": training.get("weights"),
        "Epochs": training.get("epochs"),
        "Top-1": training.get("top1") and f"{100 * training['top1']:.2f} %",
        "Licence": record.get("licence") or "not stated. Please fill it in, here and above",
    }
    rows = "\n".join(f"| {name} | {_cell(fact)} |" for name, fact in facts.items() if fact not in (None, ""))
    labels = config.get("label_names")
    named = f"\n## Classes\n\n{', '.join(_cell(label) for label in labels)}\n" if labels else ""
    classes = config["num_classes"]
    more = f", classes={classes}" if classes else ", include_top=False"
    return f"""---
license: {inner["license"]}
library_name: timm
pipeline_tag: {"image-classification" if classes else "image-feature-extraction"}
tags:
- image-classification
- efficientnet
- keras
---

# {variant}

| | |
|---|---|
{rows}
{named}
## Use it

With Keras 3. The model takes pixels from 0 to 255:

```python
import keras_effnet as ke

model = ke.create_model("{variant}", weights="hf://OWNER/NAME"{more})
```

With timm:

```python
import timm

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()
```

keras_effnet has saved this folder.
"""


def _resizing(config: dict[str, Any]) -> str:
    inner = config["pretrained_cfg"]
    interpolation = config.get("keras_effnet", inner)["interpolation"]
    if inner["crop_mode"] == "squash":
        share = inner["crop_pct"]
        return f"{interpolation}, the whole photo whatever its proportions; the center crop keeps {share} of each side"
    return f"{interpolation}, the center crop keeps {inner['crop_pct']} of the shorter side"


def _cell(fact: Any) -> str:
    return " ".join(str(fact).replace("|", "\\|").split())

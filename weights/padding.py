"""Which padding the weights in a file are for, where the file, its name or a config.json beside it says so.

Tensors of timm's own nets have the names and shapes of its ports of the original, and another padding and epsilon.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from keras_effnet.errors import one_of
from keras_effnet.nets.architecture import EPSILONS, Architecture, Block
from keras_effnet.nets.variants import VARIANTS, is_model, nearest, of_timm, timm_name
from keras_effnet.weights import hub
from keras_effnet.weights.formats import h5_file, keras_file, opening, safetensors_file

_TIMMS = (".safetensors", ".pth", ".pt", ".bin")  # files of timm


def stated_padding(path) -> str | None:
    """Returns the padding that the weights in a file are for.

    Args:
        path: Path of a file of any format.

    Returns:
        Key of `nets.architecture.EPSILONS`, or None where nothing says it.

    Raises:
        ValueError: If the file is damaged.
    """
    description = hub.describe(path)
    if description is not None:
        return description.padding
    if not Path(path).is_file():
        return None
    layers = keras_file.numerics_of(path)
    if layers is not None:
        return layers.padding
    if not str(path).endswith(_TIMMS):
        return h5_file.padding_of(path)
    told = safetensors_file.metadata_of(path)
    if told.get("padding") in EPSILONS:
        return told["padding"]
    # timm's files are called by the net and a tag, or by the net and the hash.
    names = [told.get("architecture", ""), re.split("[.-]", Path(path).name)[0]]
    name = next((name for name in names if re.match("(tf_|gc_)?efficientnet", name) and is_model(name)), None)
    return of_timm(name)[1] if name and _is_timms(path) else None


def _is_timms(path) -> bool:
    """Returns whether a file's tensors have timm's names. EfficientNet-PyTorch's start with an underscore."""
    with opening.opened(path) as tensors:
        return any(re.search(r"(^|\.)conv_stem\.weight$", name) for name in tensors)


def as_stated(path, architecture: Architecture) -> Architecture:
    """Returns the net of a file with all that the file, or what describes it, says of the layers besides their weights.

    Args:
        path: Path of a file of any format.
        architecture: An `Architecture`, as the tensors in the file describe it.

    Returns:
        An `Architecture`.

    Raises:
        ValueError: If the file is damaged.
    """
    description = hub.describe(path)
    if description is not None and description.net is not None:
        return replace(description.net, name=architecture.name)
    layers = keras_file.numerics_of(path)
    if layers is None:
        return architecture
    blocks = tuple(
        replace(block, project_activation=block.name in layers.activated) if block.operator == "mbconv" else block
        for block in architecture.blocks
    )
    return replace(architecture, padding=layers.padding, bn_epsilon=layers.bn_epsilon, blocks=blocks)


def padding_of_weights(path, format: str, architecture: Architecture) -> str | None:
    """Returns the padding that the weights in a file are for, by the file or because there is no other.

    Args:
        path: Path of the file.
        format: Key of `naming_tables.NAMINGS`.
        architecture: An `Architecture`, that of the net in the file.

    Returns:
        Key of `nets.architecture.EPSILONS`, or None where the file fits two nets and does not say which.

    Raises:
        ValueError: If the file is damaged.
    """
    usual = architecture.padding
    return stated_padding(path) or (None if format == "timm" and _two_nets(architecture) else usual)


def _two_nets(architecture: Architecture) -> list[str]:
    """Returns timm's names of both nets with these tensors, empty where there is one."""
    variant = nearest(architecture)
    if variant is None or VARIANTS[variant].padding != "same" or VARIANTS[variant].widths:
        return []
    names = [timm_name(variant, padding) for padding in EPSILONS]
    return [] if None in names else [name for name in names if name]


def _difference(found: Architecture, ours: Architecture) -> str | None:
    """Returns in words where the layers of two nets compute otherwise, or None."""
    if found.activation != ours.activation:
        return f"the activation {found.activation} in place of {ours.activation}"
    if len(found.blocks) != len(ours.blocks):
        return f"{len(found.blocks)} blocks in place of {len(ours.blocks)}"
    keys = {key for pair in zip(found.blocks, ours.blocks, strict=True) for key in _unequal(*pair)}
    if not keys:
        return None
    if keys == {"project_activation"}:
        return (
            "activations after other projections: efficientnet-b0 after none, efficientnet-b0-composer after the first"
        )
    one, other = next(pair for pair in zip(found.blocks, ours.blocks, strict=True) if pair[0] != pair[1])
    key = next(_unequal(one, other))
    return f"{key}={getattr(one, key)} in place of {getattr(other, key)} in block {one.name}"


def _unequal(one: Block, other: Block) -> Iterator[str]:
    return (key.name for key in fields(Block) if getattr(one, key.name) != getattr(other, key.name))


def check_padding(path, format: str, architecture: Architecture, asked: str | None, where: str = "the model") -> None:
    """Compares the padding of a net with what a file says. Warns where both would do and the file does not say it.

    Args:
        path: Path of the file.
        format: Key of `naming_tables.NAMINGS`.
        architecture: An `Architecture`.
        asked: The padding that the user names for the file, or None.
        where: String. What has the architecture, for the message.

    Raises:
        ValueError: If they differ.
    """
    if asked is not None:
        one_of("padding", asked, tuple(EPSILONS))
    stated, ours = stated_padding(path), architecture.padding
    if stated not in (None, ours):
        raise ValueError(
            f"Expected weights for padding={ours!r}, as {where} has it. Received: {str(path)!r}, whose weights are for "
            f"padding={stated!r}. Build the model with padding={stated!r}"
        )
    if asked not in (None, ours):
        raise ValueError(f"Expected padding={ours!r}, as {where} has it. Received: padding={asked!r}")
    found, told = as_stated(path, architecture), stated or asked
    other = _difference(found, architecture)
    if other:
        raise ValueError(f"Expected weights for the layers of {where}. Received: {str(path)!r}, whose net has {other}")
    if found.bn_epsilon != architecture.bn_epsilon:
        warnings.warn(
            f"{path}: these weights are for bn_epsilon={found.bn_epsilon:g}, and {where} has "
            f"{architecture.bn_epsilon:g}. Build the model with bn_epsilon={found.bn_epsilon:g}",
            stacklevel=3,
        )
    names = _two_nets(architecture) if told is None and format == "timm" and ours == "same" else []
    if names:
        warnings.warn(
            f"{path}: these weights fit two nets of timm, and the file names neither: {names[0]} (padding='same') and "
            f"{names[1]} (padding='symmetric'). Using padding='same'. If that is wrong, pass padding='symmetric' "
            "(convert: --padding symmetric; train: --model.padding symmetric)",
            stacklevel=3,
        )

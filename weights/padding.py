"""Which padding the weights in a file are for, where the file, its name or a config.json beside it says so.

Tensors of timm's own nets have the names and shapes of its ports of the original, and another padding and epsilon.
"""

import re
import warnings
from pathlib import Path

from keras_effnet.nets.architecture import EPSILONS, Architecture
from keras_effnet.nets.variants import VARIANTS, identify, is_model, of_timm, timm_name
from keras_effnet.weights import hub
from keras_effnet.weights.formats import h5_file, keras_file, safetensors_file


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
    found = keras_file.padding_of(path) or h5_file.padding_of(path)
    if found is None:
        net = safetensors_file.metadata_of(path).get("architecture", "")
        named = re.match(r"(tf_)?efficientnet(v2)?_[a-z0-9_]*", Path(path).name)
        if is_model(net):
            found = of_timm(net)[1]
        elif named:
            found = "same" if named[1] or re.search("b[123]_pruned", named[0]) else "symmetric"
    return found


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
    variant = identify(architecture.blocks)
    if variant is None or VARIANTS[variant].padding != "same" or VARIANTS[variant].widths:
        return []
    names = [timm_name(variant, padding) for padding in EPSILONS]
    return [] if None in names else [name for name in names if name]


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
    told, ours = asked or stated_padding(path), architecture.padding
    if told not in (None, ours):
        raise ValueError(
            f"Expected weights for padding={ours!r}, as {where} has it. Received: {str(path)!r}, whose weights are for "
            f"padding={told!r}. Build the model with padding={told!r}"
        )
    names = _two_nets(architecture) if told is None and format == "timm" and ours == "same" else []
    if names:
        warnings.warn(
            f"{path}: these weights fit two nets of timm, and the file does not say which: {names[0]}, with "
            f"padding='same', which is taken, and {names[1]}, with padding='symmetric'. Name the padding that they "
            "were trained with: padding=..., or --padding",
            stacklevel=3,
        )

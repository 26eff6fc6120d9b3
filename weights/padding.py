"""Which padding the weights in a file are for, where the file, its name or a config.json beside it says so.

Tensors of timm's own nets have the names and shapes of its ports of the original, and another padding and epsilon.
"""

import re
import warnings
from pathlib import Path

from keras_effnet.nets.architecture import Architecture
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
    told = asked or stated_padding(path)
    ours = architecture.padding
    if told not in (None, ours):
        raise ValueError(
            f"Expected weights for padding={ours!r}, as {where} has it. Received: {str(path)!r}, whose weights are for "
            f"padding={told!r}. Build the model with padding={told!r}"
        )
    variant = identify(architecture.blocks)
    if told is not None or format != "timm" or ours != "same" or variant is None or VARIANTS[variant].widths:
        return
    names = [timm_name(variant, padding) for padding in ("same", "symmetric")]
    if None not in names:
        warnings.warn(
            f"{path}: these weights fit two nets of timm, and the file does not say which: {names[0]}, with "
            f"padding='same', which is taken, and {names[1]}, with padding='symmetric'. Name the padding that they "
            "were trained with: padding=..., or --padding",
            stacklevel=3,
        )

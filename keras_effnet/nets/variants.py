"""Tables of all variants, one row each, with their sources. No Keras.

Line numbers refer to tensorflow/tpu @ 7dc921f, models/official/efficientnet.
"""

import math
import re
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

from keras_effnet.errors import unknown
from keras_effnet.nets.architecture import Architecture, Block, Stage, Variant, Widths
from keras_effnet.nets.scaling import resolve

# Table 1 of arXiv 1905.11946; efficientnet_builder.py:172-177.
B0_STAGES = (
    Stage(repeats=1, kernel_size=3, strides=1, expand_ratio=1, filters_in=32, filters_out=16),
    Stage(repeats=2, kernel_size=3, strides=2, expand_ratio=6, filters_in=16, filters_out=24),
    Stage(repeats=2, kernel_size=5, strides=2, expand_ratio=6, filters_in=24, filters_out=40),
    Stage(repeats=3, kernel_size=3, strides=2, expand_ratio=6, filters_in=40, filters_out=80),
    Stage(repeats=3, kernel_size=5, strides=1, expand_ratio=6, filters_in=80, filters_out=112),
    Stage(repeats=4, kernel_size=5, strides=2, expand_ratio=6, filters_in=112, filters_out=192),
    Stage(repeats=1, kernel_size=3, strides=1, expand_ratio=6, filters_in=192, filters_out=320),
)

# lite/efficientnet_lite_builder.py:49-54 and use_se=False.
LITE_STAGES = tuple(replace(stage, se_ratio=0.0) for stage in B0_STAGES)

# edgetpu/efficientnet_edgetpu_builder.py:51-58. A fused block's kernel is 3 (efficientnet_model.py:399-469).
EDGETPU_STAGES = (
    Stage(
        repeats=1,
        kernel_size=3,
        strides=1,
        expand_ratio=4,
        filters_in=24,
        filters_out=24,
        se_ratio=0.0,
        operator="fused",
        residual=False,
    ),
    Stage(
        repeats=2,
        kernel_size=3,
        strides=2,
        expand_ratio=8,
        filters_in=24,
        filters_out=32,
        se_ratio=0.0,
        operator="fused",
    ),
    Stage(
        repeats=4,
        kernel_size=3,
        strides=2,
        expand_ratio=8,
        filters_in=32,
        filters_out=48,
        se_ratio=0.0,
        operator="fused",
    ),
    Stage(repeats=5, kernel_size=5, strides=2, expand_ratio=8, filters_in=48, filters_out=96, se_ratio=0.0),
    Stage(repeats=4, kernel_size=5, strides=1, expand_ratio=8, filters_in=96, filters_out=144, se_ratio=0.0),
    Stage(repeats=2, kernel_size=5, strides=2, expand_ratio=8, filters_in=144, filters_out=192, se_ratio=0.0),
)

# condconv/efficientnet_condconv_builder.py:52-60: the blocks of the last three stages mix this many experts.
CONDCONV_STAGES = {
    experts: (*B0_STAGES[:4], *(replace(stage, num_experts=experts) for stage in B0_STAGES[4:])) for experts in (4, 8)
}

# name: (width, depth, resolution, dropout_rate)
_B = {  # efficientnet_builder.py:37-48
    "efficientnet-b0": (1.0, 1.0, 224, 0.2),
    "efficientnet-b1": (1.0, 1.1, 240, 0.2),
    "efficientnet-b2": (1.1, 1.2, 260, 0.3),
    "efficientnet-b3": (1.2, 1.4, 300, 0.3),
    "efficientnet-b4": (1.4, 1.8, 380, 0.4),
    "efficientnet-b5": (1.6, 2.2, 456, 0.4),
    "efficientnet-b6": (1.8, 2.6, 528, 0.5),
    "efficientnet-b7": (2.0, 3.1, 600, 0.5),
    "efficientnet-b8": (2.2, 3.6, 672, 0.5),
    "efficientnet-l2": (4.3, 5.3, 800, 0.5),
}

_LITE = {  # lite/efficientnet_lite_builder.py:38-45
    "efficientnet-lite0": (1.0, 1.0, 224, 0.2),
    "efficientnet-lite1": (1.0, 1.1, 240, 0.2),
    "efficientnet-lite2": (1.1, 1.2, 260, 0.3),
    "efficientnet-lite3": (1.2, 1.4, 280, 0.3),
    "efficientnet-lite4": (1.4, 1.8, 300, 0.3),
}

_EDGETPU = {  # edgetpu/efficientnet_edgetpu_builder.py:37-42
    "efficientnet-edgetpu-s": (1.0, 1.0, 224, 0.2),
    "efficientnet-edgetpu-m": (1.0, 1.1, 240, 0.2),
    "efficientnet-edgetpu-l": (1.2, 1.4, 300, 0.3),
}

_CONDCONV = {  # condconv/efficientnet_condconv_builder.py:36-42, by the number of experts
    4: {"efficientnet-condconv-b0-4e": (1.0, 1.0, 224, 0.25)},
    8: {
        "efficientnet-condconv-b0-8e": (1.0, 1.0, 224, 0.25),
        "efficientnet-condconv-b0-8e-depth": (1.0, 1.1, 224, 0.25),
    },
}

# Channels (expand, se, out) of each block, one line per stage: timm/models/_pruned/efficientnet_b*_pruned.txt, 1.0.31.
_PRUNED: dict[str, tuple[Widths, ...]] = {
    "efficientnet-b1": (
        *((0, 8, 16), (0, 4, 16)),
        *((48, 4, 12), (62, 6, 12), (48, 6, 12)),
        *((70, 6, 35), (61, 10, 35), (51, 10, 35)),
        *((175, 10, 74), (188, 20, 74), (137, 20, 74), (164, 20, 74)),
        *((399, 20, 67), (201, 28, 67), (160, 28, 67), (213, 28, 67)),
        *((637, 27, 192), (806, 48, 192), (798, 48, 192), (891, 48, 192), (990, 48, 192)),
        *((1152, 48, 320), (1912, 80, 320)),
    ),
    "efficientnet-b2": (
        *((0, 8, 16), (0, 4, 16)),
        *((54, 4, 17), (69, 6, 17), (61, 6, 17)),
        *((86, 6, 42), (72, 12, 42), (98, 12, 42)),
        *((245, 12, 85), (274, 22, 85), (254, 22, 85), (292, 22, 85)),
        *((502, 22, 116), (315, 30, 116), (354, 30, 116), (443, 30, 116)),
        *((719, 30, 208), (1148, 52, 208), (1160, 52, 208), (1182, 52, 208), (1228, 52, 208)),
        *((1248, 52, 352), (2112, 88, 352)),
    ),
    "efficientnet-b3": (
        *((0, 10, 24), (0, 6, 24)),
        *((27, 6, 12), (49, 8, 12), (48, 8, 12)),
        *((83, 8, 40), (90, 12, 40), (85, 12, 40)),
        *((215, 12, 93), (261, 24, 93), (219, 24, 93), (254, 24, 93), (236, 24, 93)),
        *((480, 24, 120), (235, 34, 120), (217, 34, 120), (226, 33, 120), (340, 34, 120)),
        *((802, 34, 232), (1030, 58, 232), (924, 58, 232), (1016, 58, 232), (1130, 58, 232), (1266, 58, 232)),
        *((1392, 58, 384), (2301, 96, 384)),
    ),
}

# Each table, and the fields that its rows share.
_FAMILIES: tuple[tuple[dict, dict], ...] = (
    (_B, {"stages": B0_STAGES, "source": "arXiv 1905.11946, table 1"}),
    (
        _LITE,
        {
            "stages": LITE_STAGES,
            "source": "tensorflow/tpu efficientnet/lite",
            "activation": "relu6",
            "fixed_ends": True,
            "preprocessing": "tpu127",
        },
    ),
    (
        _EDGETPU,
        {
            "stages": EDGETPU_STAGES,
            "source": "tensorflow/tpu efficientnet/edgetpu",
            "activation": "relu",
            "preprocessing": "tpu127",
            "class_offset": 1,  # background: edgetpu/README.md:35
        },
    ),
    *(
        (
            rows,
            {
                "stages": CONDCONV_STAGES[experts],
                "source": "tensorflow/tpu efficientnet/condconv",
                "preprocessing": "tpu127",
            },
        )
        for experts, rows in _CONDCONV.items()
    ),
)

VARIANTS: dict[str, Variant] = {
    name: Variant(name=name, width=width, depth=depth, resolution=resolution, dropout_rate=dropout_rate, **shared)
    for rows, shared in _FAMILIES
    for name, (width, depth, resolution, dropout_rate) in rows.items()
}

VARIANTS |= {
    f"{name}-pruned": replace(
        VARIANTS[name],
        name=f"{name}-pruned",
        widths=widths,
        preprocessing="inception",
        source="arXiv 2002.08258; timm's efficientnet_*_pruned",
    )
    for name, widths in _PRUNED.items()
}


# What follows `efficientnet` in timm's names where it differs from ours: timm/models/efficientnet.py.
TIMM_NAMES = {
    "es": "efficientnet-edgetpu-s",
    "em": "efficientnet-edgetpu-m",
    "el": "efficientnet-edgetpu-l",
    "cc_b0_4e": "efficientnet-condconv-b0-4e",
    "cc_b0_8e": "efficientnet-condconv-b0-8e",
    "cc_b1_8e": "efficientnet-condconv-b0-8e-depth",
}

# What follows `EfficientNet` in the names of our functions where it differs from the variant's.
_FUNCTIONS = {
    "CondConvB0x4": "efficientnet-condconv-b0-4e",
    "CondConvB0x8": "efficientnet-condconv-b0-8e",
    "CondConvB0x8Depth": "efficientnet-condconv-b0-8e-depth",
}


@cache
def _aliases() -> dict[str, str]:
    """Returns the variant of each name without case, punctuation, `tf` and `efficientnet`."""
    own = {name: name for name in VARIANTS}
    return {_short(alias): name for alias, name in (own | TIMM_NAMES | _FUNCTIONS).items()}


def _short(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower()).removeprefix("tf").removeprefix("efficientnet")


def find_model(name: str) -> str:
    """Returns the variant that a name refers to.

    Case and punctuation do not matter, and `efficientnet` may be left out: `"b0"`, `"EfficientNetB0"` and
    `"efficientnet_b0"` are `"efficientnet-b0"`. So are timm's and keras.applications' names for the same
    architecture.

    Args:
        name: String.

    Returns:
        String, a key of `VARIANTS`.

    Raises:
        ValueError: If there is no such variant. The message names the nearest ones.

    Example:

    >>> find_model("tf_efficientnet_lite0"), find_model("B7")
    ('efficientnet-lite0', 'efficientnet-b7')
    """
    if name in VARIANTS:
        return name
    found = _aliases().get(_short(name)) if isinstance(name, str) else None
    if found is None:
        raise unknown_model(name)
    return found


def unknown_model(name: object) -> ValueError:
    """Returns the error for a name that `find_model()` does not know.

    Args:
        name: The name.

    Returns:
        A `ValueError` for the caller to raise.
    """
    return unknown("model", name, VARIANTS, _short)


def is_model(name: object) -> bool:
    """Returns whether `find_model()` knows a name.

    Args:
        name: Any object.

    Returns:
        Boolean.
    """
    return isinstance(name, str) and (name in VARIANTS or _short(name) in _aliases())


def list_models(pattern: str | None = None) -> list[str]:
    """Lists the models that `create_model()` builds.

    Args:
        pattern: String with the wildcards * and ?. Defaults to None: all.

    Returns:
        List of strings.

    Raises:
        ValueError: If no name matches the pattern.

    Example:

    >>> import keras_effnet as ke
    >>> ke.list_models("*edgetpu*")
    ['efficientnet-edgetpu-s', 'efficientnet-edgetpu-m', 'efficientnet-edgetpu-l']
    """
    found = [name for name in VARIANTS if pattern is None or fnmatch(name, pattern)]
    if not found:
        raise unknown("model", pattern, VARIANTS)
    return found


@cache
def identify(blocks: tuple[Block, ...]) -> str | None:
    """Returns the name of the variant with these blocks.

    Args:
        blocks: Tuple of `Block`.

    Returns:
        String, or None if no variant has these blocks.
    """
    return next((name for name, row in VARIANTS.items() if resolve(row).blocks == blocks), None)


@cache
def nearest(architecture: Architecture) -> str | None:
    """Returns the variant with the same layers, whatever their channels: the one that a pruned net was cut from.

    Args:
        architecture: An `Architecture`.

    Returns:
        String, or None. If several variants match, the one whose channels differ least.
    """
    exact = identify(architecture.blocks)
    if exact:
        return exact

    def layers(net: Architecture):
        blocks = tuple(
            replace(block, filters_in=0, expand_filters=bool(expand), se_filters=bool(se), filters_out=0)
            for block, (expand, se, _) in zip(net.blocks, net.widths.values(), strict=True)
        )
        return net.stem_filters, blocks, net.head_filters, net.activation

    def distance(net: Architecture) -> float:
        pairs = zip(net.widths.values(), architecture.widths.values(), strict=True)
        return sum(abs(math.log(a / b)) for one, other in pairs for a, b in zip(one, other, strict=True) if a)

    nets = {name: resolve(row) for name, row in VARIANTS.items()}
    alike = [name for name, net in nets.items() if layers(net) == layers(architecture)]
    return min(alike, key=lambda name: distance(nets[name]), default=None)

"""Tables of all variants, one row each, with their sources. No Keras.

Line numbers refer to tensorflow/tpu @ 7dc921f, models/official/efficientnet.
"""

import math
import re
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

from keras_effnet.errors import unknown
from keras_effnet.nets.architecture import Architecture, Block, Stage, Variant, Widths
from keras_effnet.nets.scaling import resolve

# Stage(repeats, kernel_size, strides, expand_ratio, filters_in, filters_out, se_ratio, operator)

# Table 1 of arXiv 1905.11946; efficientnet_builder.py:172-177.
B0_STAGES = (
    Stage(1, 3, 1, 1, 32, 16),
    Stage(2, 3, 2, 6, 16, 24),
    Stage(2, 5, 2, 6, 24, 40),
    Stage(3, 3, 2, 6, 40, 80),
    Stage(3, 5, 1, 6, 80, 112),
    Stage(4, 5, 2, 6, 112, 192),
    Stage(1, 3, 1, 6, 192, 320),
)

# lite/efficientnet_lite_builder.py:49-54 and use_se=False.
LITE_STAGES = tuple(replace(stage, se_ratio=0.0) for stage in B0_STAGES)

# edgetpu/efficientnet_edgetpu_builder.py:51-58. A fused block's kernel is 3 (efficientnet_model.py:399-469).
EDGETPU_STAGES = (
    Stage(1, 3, 1, 4, 24, 24, 0.0, "fused", residual=False),
    Stage(2, 3, 2, 8, 24, 32, 0.0, "fused"),
    Stage(4, 3, 2, 8, 32, 48, 0.0, "fused"),
    Stage(5, 5, 2, 8, 48, 96, 0.0),
    Stage(4, 5, 1, 8, 96, 144, 0.0),
    Stage(2, 5, 2, 8, 144, 192, 0.0),
)

# condconv/efficientnet_condconv_builder.py:52-60: the blocks of the last three stages mix this many experts.
CONDCONV_STAGES = {
    experts: (*B0_STAGES[:4], *(replace(stage, num_experts=experts) for stage in B0_STAGES[4:])) for experts in (4, 8)
}

# Table 4 of arXiv 2104.00298 (S); google/automl @ 6a54c874, efficientnetv2/effnetv2_configs.py, `v2_*_block`.
V2_STAGES = {
    "b": (
        Stage(1, 3, 1, 1, 32, 16, 0.0, "conv", project_activation=True),
        Stage(2, 3, 2, 4, 16, 32, 0.0, "fused"),
        Stage(2, 3, 2, 4, 32, 48, 0.0, "fused"),
        Stage(3, 3, 2, 4, 48, 96),
        Stage(5, 3, 1, 6, 96, 112),
        Stage(8, 3, 2, 6, 112, 192),
    ),
    "s": (
        Stage(2, 3, 1, 1, 24, 24, 0.0, "conv", project_activation=True),
        Stage(4, 3, 2, 4, 24, 48, 0.0, "fused"),
        Stage(4, 3, 2, 4, 48, 64, 0.0, "fused"),
        Stage(6, 3, 2, 4, 64, 128),
        Stage(9, 3, 1, 6, 128, 160),
        Stage(15, 3, 2, 6, 160, 256),
    ),
    "m": (
        Stage(3, 3, 1, 1, 24, 24, 0.0, "conv", project_activation=True),
        Stage(5, 3, 2, 4, 24, 48, 0.0, "fused"),
        Stage(5, 3, 2, 4, 48, 80, 0.0, "fused"),
        Stage(7, 3, 2, 4, 80, 160),
        Stage(14, 3, 1, 6, 160, 176),
        Stage(18, 3, 2, 6, 176, 304),
        Stage(5, 3, 1, 6, 304, 512),
    ),
    "l": (
        Stage(4, 3, 1, 1, 32, 32, 0.0, "conv", project_activation=True),
        Stage(7, 3, 2, 4, 32, 64, 0.0, "fused"),
        Stage(7, 3, 2, 4, 64, 96, 0.0, "fused"),
        Stage(10, 3, 2, 4, 96, 192),
        Stage(19, 3, 1, 6, 192, 224),
        Stage(25, 3, 2, 6, 224, 384),
        Stage(7, 3, 1, 6, 384, 640),
    ),
    "xl": (
        Stage(4, 3, 1, 1, 32, 32, 0.0, "conv", project_activation=True),
        Stage(8, 3, 2, 4, 32, 64, 0.0, "fused"),
        Stage(8, 3, 2, 4, 64, 96, 0.0, "fused"),
        Stage(16, 3, 2, 4, 96, 192),
        Stage(24, 3, 1, 6, 192, 256),
        Stage(32, 3, 2, 6, 256, 512),
        Stage(8, 3, 1, 6, 512, 640),
    ),
}

# timm/models/efficientnet.py 1.0.31, `_gen_efficientnetv2_s` with rw=True: built before the original was published.
_RW_STAGES = (
    replace(V2_STAGES["s"][0], operator="fused", project_activation=False),
    *V2_STAGES["s"][1:5],
    replace(V2_STAGES["s"][5], filters_out=272),
)

_GC_STAGES = tuple(replace(stage, global_context=bool(stage.se_ratio)) for stage in V2_STAGES["s"])  # se_layer="gc"

# tpu/efficientnet_x_builder.py:81-100, by the family. The strides of stage 2 are those of the space-to-depth before it.
_X_STAGES = {
    family: (
        Stage(1, 2, 1, 1, 32, 16, space_to_depth=True),
        Stage(2, 3, 1, expand_ratio, 16, 24, operator="fused", activation="silu"),
        Stage(2, 5, 2, expand_ratio, 24, 40, operator="fused", activation="silu"),
        Stage(3, 3, 2, expand_ratio, 40, 80),
        *B0_STAGES[4:],
    )
    for family, expand_ratio in (("x", 6), ("h", 4))
}

# timm/models/efficientnet.py 1.0.31, `_gen_efficientnet_x`. Its activations are the other way round, only the first
# kernel is smaller, and the first block of stage 2 squeezes the channels that it receives.
_TIMM_X_STAGES = {
    family: (
        replace(first, kernel_size=3, first_kernel_size=2),
        replace(second, activation="relu", se_of_input=True),
        replace(third, activation="relu"),
        *others,
    )
    for family, (first, second, third, *others) in _X_STAGES.items()
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

# google/automl efficientnetv2/effnetv2_configs.py, `efficientnetv2_params`, at the size of its evaluation.
_V2_B = {
    "efficientnetv2-b0": (1.0, 1.0, 224, 0.2),
    "efficientnetv2-b1": (1.0, 1.1, 240, 0.2),
    "efficientnetv2-b2": (1.1, 1.2, 260, 0.3),
    "efficientnetv2-b3": (1.2, 1.4, 300, 0.3),
}
_V2 = {
    "s": (1.0, 1.0, 384, 0.2),
    "m": (1.0, 1.0, 480, 0.3),
    "l": (1.0, 1.0, 480, 0.4),
    "xl": (1.0, 1.0, 512, 0.4),
}

# timm/models/efficientnet.py 1.0.31: `efficientnetv2_rw_*`, at the size of their tests. Dropout is that of V2-S.
_V2_RW_T = {"efficientnetv2-rw-t": (0.8, 0.9, 288, 0.2)}
_V2_RW_T_GC = {"efficientnetv2-rw-t-gc": (0.8, 0.9, 288, 0.2)}
_V2_RW = {
    "efficientnetv2-rw-s": (1.0, 1.0, 384, 0.2),
    "efficientnetv2-rw-m": (1.2, (1.2,) * 4 + (1.6,) * 2, 416, 0.2),
}

# tpu/efficientnet_x_builder.py:36-55, by the coefficient of the squeeze-and-excite ratio.
_X = {
    4: {"efficientnet-x-b0": (1.0, 1.0, 224, 0.2)},
    2: {"efficientnet-x-b1": (1.0, 1.1, 240, 0.2)},
    1: {
        "efficientnet-x-b2": (1.1, 1.2, 260, 0.3),
        "efficientnet-x-b3": (1.2, 1.4, 300, 0.3),
        "efficientnet-x-b4": (1.4, 1.8, 380, 0.4),
        "efficientnet-x-b5": (1.6, 2.2, 456, 0.4),
        "efficientnet-x-b6": (1.8, 2.6, 528, 0.5),
        "efficientnet-x-b7": (2.0, 3.1, 600, 0.5),
    },
}
_H = {"efficientnet-h-b5": (1.92, 2.2, 456, 0.4)}

# timm/models/efficientnet.py 1.0.31: `efficientnet_x_b5` and `efficientnet_h_b5`, at the size of their tests.
_TIMM_X = {"efficientnet-x-b5-timm": (1.6, 2.2, 576, 0.4)}
_TIMM_H = {"efficientnet-h-b5-timm": (1.92, 2.2, 576, 0.4)}

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

_TPU = "tensorflow/tpu efficientnet/"
_V2_SHARED: dict[str, Any] = {
    "family": "V2",
    "source": "arXiv 2104.00298; google/automl efficientnetv2",
    "least_share": 0.0,
    "bn_momentum": 0.9,
    "depthwise_name": "dwconv2",
}
_RW_SHARED: dict[str, Any] = {"family": "V2, timm's own", "stem_filters": 24, "depthwise_name": "dwconv2"}
_X_SHARED: dict[str, Any] = {"family": "X and H", "source": f"{_TPU}tpu", "activation": "relu"}
_TIMM_SHARED: dict[str, Any] = {"source": "timm/models/efficientnet.py", "padding": "symmetric", "bn_momentum": 0.9}

# Composer @ 3c149064, composer/models/efficientnetb0/_layers.py:164-166: an activation after the first projection.
_COMPOSER = {"efficientnet-b0-composer": (1.0, 1.0, 224, 0.2)}

# Each table, and the fields that its rows share.
_FAMILIES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (_B, {"family": "V1", "stages": B0_STAGES, "source": "arXiv 1905.11946, table 1"}),
    (_V2_B, {"stages": V2_STAGES["b"]} | _V2_SHARED),
    *(
        (
            {f"efficientnetv2-{short}": row},
            {
                "stages": V2_STAGES[short],
                "stem_filters": V2_STAGES[short][0].filters_in,
                "preprocessing": "tpu128",
            }
            | _V2_SHARED,
        )
        for short, row in _V2.items()
    ),
    (_V2_RW_T, {"stages": V2_STAGES["s"]} | _RW_SHARED | _TIMM_SHARED),
    (_V2_RW_T_GC, {"stages": _GC_STAGES} | _RW_SHARED | _TIMM_SHARED),
    (_V2_RW, {"stages": _RW_STAGES, "head_filters": 1792} | _RW_SHARED | _TIMM_SHARED),
    (
        _LITE,
        {
            "family": "Lite",
            "stages": LITE_STAGES,
            "source": f"{_TPU}lite",
            "activation": "relu6",
            "fixed_ends": True,
            "preprocessing": "tpu127",
        },
    ),
    (
        _EDGETPU,
        {
            "family": "EdgeTPU",
            "stages": EDGETPU_STAGES,
            "source": f"{_TPU}edgetpu",
            "activation": "relu",
            "preprocessing": "tpu127",
            "class_offset": 1,  # background: edgetpu/README.md:35
        },
    ),
    *(
        (
            rows,
            {
                "family": "CondConv",
                "stages": CONDCONV_STAGES[experts],
                "source": f"{_TPU}condconv",
                "preprocessing": "tpu127",
            },
        )
        for experts, rows in _CONDCONV.items()
    ),
    *(
        (rows, {"stages": tuple(replace(stage, se_ratio=0.25 * se) for stage in _X_STAGES["x"])} | _X_SHARED)
        for se, rows in _X.items()
    ),
    (_H, {"stages": _X_STAGES["h"]} | _X_SHARED),
    (_TIMM_X, {"family": "X and H", "stages": _TIMM_X_STAGES["x"]} | _TIMM_SHARED),
    (_TIMM_H, {"family": "X and H", "stages": _TIMM_X_STAGES["h"]} | _TIMM_SHARED),
    (
        _COMPOSER,
        {
            "family": "Composer",
            "stages": (replace(B0_STAGES[0], project_activation=True), *B0_STAGES[1:]),
            "source": "Composer, composer/models/efficientnetb0",
            "padding": "symmetric",
            "bn_momentum": 0.9,
        },
    ),
)


def _variant(name: str, row: tuple[Any, ...], shared: dict[str, Any]) -> Variant:
    width, depth, resolution, dropout_rate = row
    return Variant(name=name, width=width, depth=depth, resolution=resolution, dropout_rate=dropout_rate, **shared)


VARIANTS: dict[str, Variant] = {
    name: _variant(name, row, shared) for rows, shared in _FAMILIES for name, row in rows.items()
}

VARIANTS |= {
    f"{name}-pruned": replace(
        VARIANTS[name],
        name=f"{name}-pruned",
        family="Pruned",
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
    "es_pruned": "efficientnet-edgetpu-s",  # pruned by zeros: all channels are there
    "el_pruned": "efficientnet-edgetpu-l",
}

# timm's names of nets that it builds otherwise than the TPU repository, whose names differ in punctuation alone.
_TIMM_EXACT = {
    "efficientnet_x_b5": "efficientnet-x-b5-timm",
    "efficientnet_h_b5": "efficientnet-h-b5-timm",
    "gc_efficientnetv2_rw_t": "efficientnetv2-rw-t-gc",
}

# What follows `EfficientNet` in the names of our functions where it differs from the variant's.
_FUNCTIONS = {
    "CondConvB0x4": "efficientnet-condconv-b0-4e",
    "CondConvB0x8": "efficientnet-condconv-b0-8e",
    "CondConvB0x8Depth": "efficientnet-condconv-b0-8e-depth",
}


def of_timm(name: str) -> tuple[str, str]:
    """Returns the variant and the padding of one of timm's nets.

    Args:
        name: String, timm's name of a net, such as `"tf_efficientnet_b0"`.

    Returns:
        Tuple of a key of `VARIANTS`, and a key of `EPSILONS`.

    Raises:
        ValueError: If there is no such variant.

    Reference:
        timm/models/efficientnet.py 1.0.31: nets whose names start with `tf_`, and those pruned by channels, pad as
        TensorFlow does. It has V2's B0 to B3 with `tf_` alone.
    """
    variant = find_model(name)
    row = VARIANTS[variant]
    ported = name.startswith("tf_") or row.widths is not None or variant.startswith("efficientnetv2-b")
    return variant, row.padding if ported else "symmetric"


def timm_name(variant: str, padding: str) -> str | None:
    """Returns timm's name of a net: the inverse of `of_timm()`.

    Args:
        variant: Key of `VARIANTS`.
        padding: Key of `EPSILONS`.

    Returns:
        String, or None where timm has no such net.
    """
    bare = next((short for short, name in TIMM_NAMES.items() if name == variant), None)
    exact = next((name for name, found in _TIMM_EXACT.items() if found == variant), None)
    name = exact or re.sub("^efficientnet-", "efficientnet_", variant).replace("-", "_")
    if bare:
        name = f"efficientnet_{bare}"
    row = VARIANTS[variant]
    known = row.source.startswith(("arXiv", _TPU, "timm")) and not row.source.endswith("efficientnet/tpu")
    if padding == "same" and row.widths is None:
        name = f"tf_{name}"
    return None if not known or of_timm(name) != (variant, padding) else name


@cache
def _aliases() -> dict[str, str]:
    """Returns the variant of each name without case, punctuation, `tf` and `efficientnet`."""
    own = {name: name for name in VARIANTS}
    # timm's X-B5 and H-B5 differ from the TPU repository's by punctuation alone.
    timms = {alias: name for alias, name in _TIMM_EXACT.items() if not name.endswith("-timm")}
    return {_short(alias): name for alias, name in (own | TIMM_NAMES | _FUNCTIONS | timms).items()}


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
    if name in _TIMM_EXACT:
        return _TIMM_EXACT[name]
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

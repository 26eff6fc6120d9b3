"""One table per foreign naming of the same tensors. Data only, no Keras.

Templates know `{layer}` (our layer's name), `{i}` (number of the block, from 0) and `{n}` (as TensorFlow numbers: empty
for the first layer of this template in the block, then _1, _2, ...).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Naming:
    """How a program names its tensors.

    Args:
        layers: Dict from the name of our layer, without its block, to a template. `"*"` stands for all others.
        variables: Dict from the layer's class to a dict from our variable's name to (suffix, layout).
        ignored: Dict from a regular expression to the reason why tensors of that name are not needed.
        scoped: Boolean, whether all names stand under one further name, the model's.
    """

    layers: dict[str, str]
    variables: dict[str, dict[str, tuple[str, str]]]
    ignored: dict[str, str] = field(default_factory=dict)
    scoped: bool = False


# Manifests of the original code: creation order decides the numbers (tests/golden/tpu/*.json).
TPU = Naming(
    layers={
        "stem_conv": "stem/conv2d",
        "stem_bn": "stem/tpu_batch_normalization",
        "expand_conv": "blocks_{i}/conv2d{n}",
        "expand_bn": "blocks_{i}/tpu_batch_normalization{n}",
        "dwconv": "blocks_{i}/depthwise_conv2d",
        "bn": "blocks_{i}/tpu_batch_normalization{n}",
        "se_reduce": "blocks_{i}/se/conv2d{n}",
        "se_expand": "blocks_{i}/se/conv2d{n}",
        "project_conv": "blocks_{i}/conv2d{n}",
        "project_bn": "blocks_{i}/tpu_batch_normalization{n}",
        "top_conv": "head/conv2d",
        "top_bn": "head/tpu_batch_normalization",
        "predictions": "head/dense",
    },
    variables={
        "Conv2D": {"kernel": ("/kernel", "keep"), "bias": ("/bias", "keep")},
        "DepthwiseConv2D": {"kernel": ("/depthwise_kernel", "keep")},
        "BatchNormalization": {
            name: (f"/{name}", "keep") for name in ("gamma", "beta", "moving_mean", "moving_variance")
        },
        "Dense": {"kernel": ("/kernel", "keep"), "bias": ("/bias", "keep")},
    },
    scoped=True,
)

# lukemelas/EfficientNet-PyTorch and its Lite descendants.
LUKEMELAS = Naming(
    layers={
        "stem_conv": "_conv_stem",
        "stem_bn": "_bn0",
        "expand_conv": "_blocks.{i}._expand_conv",
        "expand_bn": "_blocks.{i}._bn0",
        "dwconv": "_blocks.{i}._depthwise_conv",
        "bn": "_blocks.{i}._bn1",
        "se_reduce": "_blocks.{i}._se_reduce",
        "se_expand": "_blocks.{i}._se_expand",
        "project_conv": "_blocks.{i}._project_conv",
        "project_bn": "_blocks.{i}._bn2",
        "top_conv": "_conv_head",
        "top_bn": "_bn1",
        "predictions": "_fc",
    },
    variables={
        "Conv2D": {"kernel": (".weight", "OIHW->HWIO"), "bias": (".bias", "keep")},
        "DepthwiseConv2D": {"kernel": (".weight", "C1HW->HWC1")},
        "BatchNormalization": {
            "gamma": (".weight", "keep"),
            "beta": (".bias", "keep"),
            "moving_mean": (".running_mean", "keep"),
            "moving_variance": (".running_var", "keep"),
        },
        "Dense": {"kernel": (".weight", "OI->IO"), "bias": (".bias", "keep")},
    },
    ignored={r"\.num_batches_tracked$": "PyTorch's counter of training steps"},
)

# keras.applications, whose layer names are ours.
KERAS = Naming(
    layers={"*": "{layer}"},
    variables={
        layer_class: {name: (f"/{name}", "keep") for name in names}
        for layer_class, names in {
            "Conv2D": ("kernel", "bias"),
            "DepthwiseConv2D": ("kernel",),
            "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
            "Dense": ("kernel", "bias"),
        }.items()
    },
    ignored={r"^normalization(_\d+)?/": "statistics of the preprocessing, which is a constant here"},
)

NAMINGS = {"tpu": TPU, "lukemelas": LUKEMELAS, "keras": KERAS}

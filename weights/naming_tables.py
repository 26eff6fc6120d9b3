"""One table per program that names the same tensors differently. Data only, no Keras.

A layer's template may contain:

- `{layer}`: our layer's name; `{type}`: the layer's class in snake case.
- `{i}`: index of the block; `{s}`: index of its stage; `{b}`: its index within the stage. All count from 0.
- `{n}` and `{m}`: counters of equal names. `{n}` counts like TensorFlow and Keras (nothing, _1, _2, ...), `{m}` from 1.
- `{once}` and `{thrice[0]}` to `{thrice[2]}`: where blocks of mixed experts number their layers over the whole model,
  the number of a layer that each block has once, or three times. They count like TensorFlow.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)  # each is one program's, and hashable
class Naming:
    """How a program names its tensors.

    Args:
        mark: String. The name of a kernel by which files are recognized: the first convolution's, where only this
            program calls it so.
        layers: Dict from the name of our layer, without its block, to a template. `"kind:name"` has precedence in
            blocks of that kind: `"condconv"`, `"context"` (global context), `"fused"`, `"conv"`, or `"plain"` for a
            depthwise one without expansion. `"*"` matches all other layers.
        variables: Dict from the layer's class to a dict from our variable's name to (suffix, layout).
        title: String. How users know these files.
        checkpoint: String. How users know checkpoints of TensorFlow with these names, where both exist.
        ignored: Dict from a regular expression to the reason why tensors of that name are not needed.
        average: String. Suffix of a tensor's moving average, where training keeps one.
        counters: Dict from a layer's class to the suffix of an integer beside its variables. The key `""` gives the
            name of one for the whole file. They are written as 0.
        members: Regular expression that matches the start of a tensor's name, without prefix, if it belongs to the net.
            Others belong to layers around it. Empty where names do not tell.
        owns_classifier: Boolean, whether a classifier of the net's name is on the pooled features, whatever layers are
            around the net.
        spellings: Dict from a regular expression to its replacement, for other names of the same tensors.
        ranked: Regular expression with the groups `owner` and `number`, for names whose number counts over the whole
            model and so depends on what was built before. Only their order within the owner is compared.
        activation: Name of the activation of all its nets, where it is not always ours. Empty otherwise.
    """

    mark: str
    layers: dict[str, str]
    variables: dict[str, dict[str, tuple[str, str]]]
    title: str
    checkpoint: str = ""
    ignored: dict[str, str] = field(default_factory=dict)
    average: str = ""
    counters: dict[str, str] = field(default_factory=dict)
    members: str = ""
    owns_classifier: bool = False
    spellings: dict[str, str] = field(default_factory=dict)
    ranked: str = ""
    activation: str = ""


_NORM = ("gamma", "beta", "moving_mean", "moving_variance")

# Manifests of the original code (tests/golden/tpu/*.json). The order of creation decides the numbers.
TPU = Naming(
    mark="stem/conv2d/kernel",
    title="a TensorFlow checkpoint of the TPU repository",
    layers={
        "stem_conv": "stem/conv2d",
        "stem_bn": "stem/tpu_batch_normalization",
        "routing": "blocks_{i}/dense",
        "s2d_conv": "blocks_{i}/space2depth/conv2d",
        "s2d_bn": "blocks_{i}/space2depth/tpu_batch_normalization",
        "expand_conv": "blocks_{i}/conv2d{n}",
        # The first of the three belongs to a layer that is created but not used.
        "condconv:expand_conv": "model/blocks_{i}/cond_conv2d{thrice[1]}",
        "expand_bn": "blocks_{i}/tpu_batch_normalization{n}",
        "dwconv": "blocks_{i}/depthwise_conv2d",
        "condconv:dwconv": "model/blocks_{i}/depthwise_cond_conv2d{once}",
        "bn": "blocks_{i}/tpu_batch_normalization{n}",
        "se_reduce": "blocks_{i}/se/conv2d{n}",
        "se_expand": "blocks_{i}/se/conv2d{n}",
        "project_conv": "blocks_{i}/conv2d{n}",
        "condconv:project_conv": "model/blocks_{i}/cond_conv2d{thrice[2]}",
        "project_bn": "blocks_{i}/tpu_batch_normalization{n}",
        "top_conv": "head/conv2d",
        "top_bn": "head/tpu_batch_normalization",
        "predictions": "head/dense",
    },
    variables={
        "Conv2D": {"kernel": ("/kernel", "keep"), "bias": ("/bias", "keep")},
        "DepthwiseConv2D": {"kernel": ("/depthwise_kernel", "keep")},
        "CondConv2D": {"kernel": ("/condconv_kernel", "E(HWIO)->EHWIO")},
        "DepthwiseCondConv2D": {"kernel": ("/depthwise_condconv_kernel", "E(HWIO)->EHWIO")},
        "BatchNormalization": {name: (f"/{name}", "keep") for name in _NORM},
        "Dense": {"kernel": ("/kernel", "keep"), "bias": ("/bias", "keep")},
    },
    # tensorflow/tpu utils.py:83-111 (optimizers) and main.py:425-428 (averages).
    ignored={
        r"^global_step$": "the number of training steps",
        r"/(RMSProp(_1)?|Momentum|LARSOptimizer)$": "the optimizer's state",
    },
    average="/ExponentialMovingAverage",
    counters={"": "global_step"},
    # Keras layers of google/automl's efficientnetv2/effnetv2_model.py, which are numbered over a whole process.
    spellings={r"(^|/)(stem|head)_\d+(?=/)": r"\1\2", r"(^|/)head/dense_\d+(?=/)": r"\1head/dense"},
    # tensorflow/tpu condconv/condconv_layers.py: Keras layers, under a scope of their model.
    ranked=r"(?:model(?:_\d+)?/)?(?P<owner>blocks_\d+/(?:depthwise_)?cond_conv2d)(?:_(?P<number>\d{1,9}))?(?=/)",
)

_TORCH = {
    "Conv2D": {"kernel": (".weight", "OIHW->HWIO"), "bias": (".bias", "keep")},
    "DepthwiseConv2D": {"kernel": (".weight", "C1HW->HWC1")},
    "CondConv2D": {"kernel": (".weight", "E(OIHW)->EHWIO")},
    "DepthwiseCondConv2D": {"kernel": (".weight", "E(C1HW)->EHWC1")},
    "BatchNormalization": {
        "gamma": (".weight", "keep"),
        "beta": (".bias", "keep"),
        "moving_mean": (".running_mean", "keep"),
        "moving_variance": (".running_var", "keep"),
    },
    "LayerNormalization": {"gamma": (".weight", "keep"), "beta": (".bias", "keep")},
    "Dense": {"kernel": (".weight", "OI->IO"), "bias": (".bias", "keep")},
}

_TORCH_IGNORED = {
    r"\.num_batches_tracked$": "PyTorch's counter of training steps",
    r"^n_averaged$": "the number of averages",  # torch/optim/swa_utils.py, AveragedModel
}

# timm/models/_efficientnet_blocks.py, 1.0.31. Plain blocks are its DepthwiseSeparableConv, fused ones its EdgeResidual.
TIMM = Naming(
    mark="conv_stem.weight",
    title="a state dict of timm",
    layers={
        "stem_conv": "conv_stem",
        "stem_bn": "bn1",
        "routing": "blocks.{s}.{b}.routing_fn",
        "s2d_conv": "blocks.{s}.{b}.conv_s2d",
        "s2d_bn": "blocks.{s}.{b}.bn_s2d",
        "expand_conv": "blocks.{s}.{b}.conv_pw",
        "fused:expand_conv": "blocks.{s}.{b}.conv_exp",
        "expand_bn": "blocks.{s}.{b}.bn{m}",
        "dwconv": "blocks.{s}.{b}.conv_dw",
        "bn": "blocks.{s}.{b}.bn{m}",
        "se_reduce": "blocks.{s}.{b}.se.conv_reduce",
        "se_expand": "blocks.{s}.{b}.se.conv_expand",
        "se_share": "blocks.{s}.{b}.se.conv_attn",
        "se_norm": "blocks.{s}.{b}.se.mlp_scale.norm",
        "context:se_reduce": "blocks.{s}.{b}.se.mlp_scale.fc1",
        "context:se_expand": "blocks.{s}.{b}.se.mlp_scale.fc2",
        "project_conv": "blocks.{s}.{b}.conv_pwl",
        "plain:project_conv": "blocks.{s}.{b}.conv_pw",
        "conv:project_conv": "blocks.{s}.{b}.conv",
        "project_bn": "blocks.{s}.{b}.bn{m}",
        "top_conv": "conv_head",
        "top_bn": "bn2",
        "predictions": "classifier",
    },
    variables=_TORCH,
    ignored=_TORCH_IGNORED,
    counters={"BatchNormalization": ".num_batches_tracked"},
    members=r"(conv_stem|bn1|blocks|conv_head|bn2)\.|classifier\.(weight|bias)$",
    owns_classifier=True,
)

# lukemelas/EfficientNet-PyTorch and the Lite nets derived from it.
LUKEMELAS = Naming(
    mark="_conv_stem.weight",
    title="a state dict of EfficientNet-PyTorch",
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
    variables=_TORCH,
    ignored=_TORCH_IGNORED,
    members=r"_(conv_stem|bn0|blocks|conv_head|bn1)\.|_fc\.(weight|bias)$",
    owns_classifier=True,
)

_KERAS_VARIABLES = {
    "Conv2D": ("kernel", "bias"),
    "DepthwiseConv2D": ("kernel",),
    "CondConv2D": ("kernel",),
    "DepthwiseCondConv2D": ("kernel",),
    "BatchNormalization": _NORM,
    "LayerNormalization": ("gamma", "beta"),
    "Dense": ("kernel", "bias"),
}

_KERAS_SPELLINGS = {r"/depthwise_kernel$": "/kernel"}  # Keras 2

_NORMALIZATION = "statistics of the preprocessing, which is a constant here"

# tensorflow/python/checkpoint, 2.20: what a checkpoint of TensorFlow 2 holds beside the layers' variables.
_OBJECTS = {
    # Tutorials also call it opt and optim. Most of its variables are named after its class.
    r"/\.OPTIMIZER_SLOT/|^optimizer/|^opt(im)?/(_\w+|[A-Z]\w*/.*|iter|decay|learning_rate|momentum|rho|beta_[12])$": (
        "the optimizer's state"
    ),
    r"^(save_counter|step|epoch)(/|$)": "a counter",
    r"^(keras_api|metrics)/": "the state of metrics",
    r"/(seed|random)_generator/": "the state of a random number generator",
}

# keras.applications, whose layer names are ours, and the files of this package's store. qubvel/efficientnet calls the
# classifier probs (efficientnet/model.py, 1.1.1).
KERAS = Naming(
    mark="stem_conv/kernel",
    title="an h5 file of keras.applications",
    checkpoint="a checkpoint of TensorFlow 2 with the layers of keras.applications",
    layers={"*": "{layer}"},
    variables={kind: {name: (f"/{name}", "keep") for name in names} for kind, names in _KERAS_VARIABLES.items()},
    ignored={r"^normalization(_\d+)?/": _NORMALIZATION} | _OBJECTS,
    members=r"(stem|block\d+[a-z]+|top)_|predictions/",
    spellings={r"^probs/": "predictions/"} | _KERAS_SPELLINGS,
)

# keras_cv_attention_models/efficientnet/efficientnet_v2.py, 1.4.3, which builds its V1 nets too.
KECAM = Naming(
    mark="post_conv/kernel",
    title="an h5 file of keras_cv_attention_models",
    checkpoint="a checkpoint of TensorFlow 2 with the layers of keras_cv_attention_models",
    layers={
        "expand_conv": "stack_{s}_block{b}_sortcut_conv",
        "expand_bn": "stack_{s}_block{b}_sortcut_bn",
        "dwconv": "stack_{s}_block{b}_MB_dw_",
        "bn": "stack_{s}_block{b}_MB_dw_bn",
        "se_reduce": "stack_{s}_block{b}_se_1_conv",
        "se_expand": "stack_{s}_block{b}_se_2_conv",
        "project_conv": "stack_{s}_block{b}_MB_pw_conv",
        "project_bn": "stack_{s}_block{b}_MB_pw_bn",
        "top_conv": "post_conv",
        "top_bn": "post_bn",
        "stem_conv": "stem_conv",
        "stem_bn": "stem_bn",
        "predictions": "predictions",
    },
    variables={kind: {name: (f"/{name}", "keep") for name in names} for kind, names in _KERAS_VARIABLES.items()},
    ignored={r"^normalization(_\d+)?/": _NORMALIZATION} | _OBJECTS,
    members=r"(stem|stack_\d+_block\d+|post)_|predictions/",
    spellings=_KERAS_SPELLINGS,
    # keras_cv_attention_models 1.4.3, efficientnet_v1.py: its Lite nets leave EfficientNetV2()'s swish as it is.
    activation="silu",
)

# .weights.h5 files of Keras 3, alone or inside .keras: models of this package and of keras.applications. Layers are
# numbered by their class (keras/src/saving/saving_lib.py, 3.15.1).
KERAS3 = Naming(
    mark="conv2d/0",
    title="a .keras or .weights.h5 file of Keras 2.12 or later",
    layers={"*": "{type}{n}"},
    variables={
        kind: {name: (f"/{number}", "keep") for number, name in enumerate(names)}
        for kind, names in _KERAS_VARIABLES.items()
    },
    ignored={
        r"^normalization(_\d+)?/": _NORMALIZATION,
        r"^optimizer/": "the optimizer's state",
        r"^metrics/": "the state of metrics",
        r"/seed_generator/": "the state of a random number generator",
    },
)

# In this order: keras_cv_attention_models also has a stem_conv.
NAMINGS = {"tpu": TPU, "timm": TIMM, "lukemelas": LUKEMELAS, "kecam": KECAM, "keras": KERAS, "keras3": KERAS3}

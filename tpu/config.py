"""Recipes as frozen dataclasses, to and from JSON. A recipe holds everything that decides the result of a run."""

import contextlib
import dataclasses
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from keras_effnet.errors import one_line
from keras_effnet.nets.architecture import EPSILONS
from keras_effnet.nets.variants import VARIANTS, find_model, is_model
from keras_effnet.ranges import ABOVE_0, BELOW_1, COUNT, INSIDE, NOT_NEGATIVE, POSITIVE, SHARE, Range, check_fields

# Fields that a recipe may leave to the size of the data. `recipes.finetune.decided()` fills them before they are used.
SIZED = ("epochs", "batch_size", "schedule.warmup_epochs", "run.eval_every", "run.save_every")
if TYPE_CHECKING:
    SizedFloat: TypeAlias = float
    SizedInt: TypeAlias = int
else:
    SizedFloat, SizedInt = float | None, int | None

SIDE = Range(16)  # pixels. Four of a net's five strides leave one of them
SEED = Range(0, 2**32 - 1)  # of NumPy


@dataclass(frozen=True)
class Model:
    """The model and the values it starts from."""

    name: str = "efficientnet-b0"
    """A name from `keras-effnet list`."""
    image_size: Annotated[int | None, SIDE] = None
    """Height and width in pixels. None: the model's own."""
    dropout_rate: Annotated[float | None, BELOW_1] = None
    """Dropout rate before the classifier. None: the model's own."""
    drop_connect_rate: Annotated[float | None, BELOW_1] = None
    """Rate at which the last blocks are dropped. None: the model's own, 0.2."""
    bn_momentum: Annotated[float | None, BELOW_1] = None
    """Share of the moving statistics that each step keeps. None: the model's own, 0.9 for V2 and for
    nets that only timm or Composer has, else 0.99."""
    bn_epsilon: Annotated[float | None, POSITIVE] = None
    """Added to the variance in batch normalization. None: that of a .keras file of weights, else 1e-3, or 1e-5
    with symmetric padding."""
    padding: Literal["same", "symmetric"] | None = None
    """same as in TensorFlow, or symmetric as in PyTorch. None: that of the weights, or the model's own."""
    preprocessing: str = "auto"
    """Pixel normalization: auto, imagenet, inception, tpu127 or tpu128."""
    weights: str | None = None
    """Weights to start from: tag of a published set, or path of a file. None: random values."""
    keep_top: bool = False
    """Whether to load the classifier too. The classes must then be those of the weights."""
    freeze: Literal["none", "batch-norm", "all-but-top"] | str = "none"
    """What not to train: none, batch-norm, all-but-top (all but the classifier), or the first block to train, block1 to
    block7 or a single one such as block6a. block6 trains the blocks 6 and 7 and the top (last convolution and
    classifier); the stem and all blocks before are frozen. Frozen batch normalization uses its moving statistics.
    """


@dataclass(frozen=True)
class Data:
    """The data set and how it is read."""

    source: str = "imagenet2012"
    """Folder with one subfolder per class, or with train and val that each hold such subfolders;
    folder with metadata.csv as in Hugging Face's imagefolder; CSV file with the columns path and label;
    folder of TFRecords train-* and validation-* in the original's layout; digits; or the name of a TensorFlow dataset.
    """
    data_dir: str | None = None
    """Folder in which TensorFlow Datasets keeps its files."""
    train_split: str | None = None
    """Training split of a TensorFlow dataset, such as train[:90%]. None: train."""
    eval_split: str | None = None
    """Evaluation split of a TensorFlow dataset. None: the first that exists of validation, val and test."""
    eval_share: Annotated[float, INSIDE] = 0.2
    """Folders without val and CSV files without splits only: share of each class to evaluate on. Not trained on."""
    holdout_shards: Annotated[int, NOT_NEGATIVE] = 0
    """TFRecords only: number of first training shards to evaluate on. They are not trained on."""
    classes: Annotated[int | None, COUNT] = None
    """Number of classes. None: as in the data, or 1000 for TFRecords."""
    first_label: Annotated[int, NOT_NEGATIVE] = 1
    """Number of the first class in TFRecords. The original counts from 1 to 1000."""
    shuffle_buffer: Annotated[int, COUNT] = 2048
    """Records in the shuffle buffer. The order of files also changes each epoch. Folders are shuffled as a whole."""
    max_corrupt: Annotated[float, SHARE] = 0.05
    """The run stops when a larger share of an epoch's images is unreadable."""
    transfer: Literal["uint8", "float32"] = "uint8"
    """How training images leave the host. float32 keeps interpolated values outside 0-255, at four times the bytes."""
    interpolation: Literal["bicubic", "bilinear", "half-pixel-bilinear"] = "bicubic"
    """Interpolation of every resize. half-pixel-bilinear: that of TensorFlow 2, the others that of TensorFlow 1."""
    balance: bool = False
    """Whether to weight the loss of each class by the inverse of its frequency, in training only. The mean weight is 1.
    Needs a source that knows its labels: a folder or the digits.
    """
    eval_crop: Annotated[float | None, ABOVE_0] = None
    """Share of the shorter side to keep in evaluation. None: size / (size + 32), the original's first rule."""
    crop_mode: Literal["center", "squash"] = "center"
    """center: evaluate the square in the middle; squash: the whole image, whatever its proportions."""


@dataclass(frozen=True)
class Augment:
    """How training images are augmented."""

    crop: Literal["inception", "none"] = "inception"
    """inception: a random part of the image, resized; none: as in evaluation."""
    min_area: Annotated[float, ABOVE_0] = 0.08
    """Smallest area of the random part, as a share of the image."""
    min_covered: Annotated[float, SHARE] = 0.1
    """Smallest share of the image that a random part covers. The larger of min_area and this counts."""
    flip: bool = True
    """Whether to mirror half of the images."""
    policy: Literal["none", "autoaugment", "randaugment"] = "none"
    """Further augmentation: none, AutoAugment v0 or RandAugment."""
    layers: Annotated[int, NOT_NEGATIVE] = 2
    """Number of RandAugment operations per image."""
    magnitude: Annotated[float, NOT_NEGATIVE] = 10.0
    """Magnitude of RandAugment. 10 is AutoAugment's strongest; the published recipes go beyond."""
    magnitude_std: Annotated[float, NOT_NEGATIVE] = 0.0
    """Standard deviation of RandAugment's magnitude."""
    op_probability: Annotated[float, SHARE] = 1.0
    """Probability of applying an operation that RandAugment has picked."""
    erase: Annotated[float, SHARE] = 0.0
    """Probability of random erasing."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Parameter of mixup's beta distribution. 0: no mixup."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Parameter of cutmix's beta distribution. 0: no cutmix. With mixup too, each takes half of the batch."""


@dataclass(frozen=True)
class Progress:
    """Progressive learning: stages of equal length. Each field has one value per stage."""

    sizes: Annotated[tuple[int, ...], SIDE] = ()
    """Height and width of the training images in each stage. Empty: one stage. image_size is for evaluation only."""
    magnitudes: Annotated[tuple[float, ...], NOT_NEGATIVE] = ()
    """RandAugment's magnitude in each stage. Empty: augment.magnitude."""
    mixups: Annotated[tuple[float, ...], NOT_NEGATIVE] = ()
    """Parameter of mixup in each stage. Empty: augment.mixup."""
    cutmixes: Annotated[tuple[float, ...], NOT_NEGATIVE] = ()
    """Parameter of cutmix in each stage. Empty: augment.cutmix."""


# The original's: tensorflow/tpu efficientnet main.py:117-171, utils.py:83-101.
_ORIGINAL = {"per_256": 0.016, "momentum": 0.9, "decay": 0.9, "epsilon": 1e-3, "layer_decay": 0.0, "weight_decay": 1e-5}

# Where an optimizer's own defaults differ from the original's. Learning rate and decay of the squares: Kingma & Ba,
# arXiv 1412.6980. Epsilon: keras.optimizers. AdamW's weight decay: ConvNeXt, arXiv 2201.03545, table 5.
_OWN = {
    "adam": {"per_256": 1e-3, "decay": 0.999, "epsilon": 1e-7},
    "adamw": {"per_256": 1e-3, "decay": 0.999, "epsilon": 1e-7, "layer_decay": 0.05, "weight_decay": 0.0},
}

# Their steps are as long as the learning rate, whatever the gradients, and it does not follow the batch size.
_ANY_BATCH = ("adam", "adamw")

_UNSET: Any = None


@dataclass(frozen=True)
class Optimizer:
    """How a step updates the variables. What is not given is the default of the optimizer `name`."""

    name: Literal["rmsprop", "rmsprop-keras", "rmsprop-torch", "momentum", "sgd", "adam", "adamw", "lars", "lamb"] = (
        "rmsprop"
    )
    """rmsprop is the original's; rmsprop-keras and rmsprop-torch are those of tf.keras and PyTorch.
    With lars, the original shares batch statistics: --run.batch-norm-group all."""
    peak: Annotated[float | None, NOT_NEGATIVE] = None
    """Highest learning rate. None: per_256 * batch_size / 256, with adam and adamw per_256 for any batch."""
    per_256: Annotated[float, NOT_NEGATIVE] = _UNSET
    """Highest learning rate for a batch of 256 images."""
    momentum: Annotated[float, BELOW_1] = _UNSET
    """Share of the previous step that is kept: beta_1 of adam, adamw and lamb."""
    decay: Annotated[float, BELOW_1] = _UNSET
    """Decay of the mean of squared gradients: beta_2 of adam, adamw and lamb."""
    epsilon: Annotated[float, POSITIVE] = _UNSET
    """Keeps the divisor away from zero."""
    body_scale: Annotated[float, NOT_NEGATIVE] = 1.0
    """Factor of the learning rate for all variables but the classifier's."""
    clip_norm: Annotated[float | None, POSITIVE] = None
    """Largest global norm of the gradients. None: no clipping."""
    trust: Annotated[float, POSITIVE] = 1e-3
    """Trust coefficient of LARS."""
    layer_decay: Annotated[float, NOT_NEGATIVE] = _UNSET
    """Weight decay inside AdamW, LARS and LAMB, not part of the loss."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = _UNSET
    """Weight decay in the loss: this times half the sum of squares."""
    decayed: Literal["no-batch-norm", "all", "kernels"] = "no-batch-norm"
    """Variables with weight decay. The original decays all but the gamma and beta of normalizations."""

    def __post_init__(self):
        for name, value in (_ORIGINAL | _OWN.get(self.name, {})).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes during the run."""

    kind: Literal["exponential", "cosine", "constant", "poly"] = "exponential"
    """Shape of the decay after the warm-up."""
    warmup_epochs: Annotated[SizedFloat, NOT_NEGATIVE] = 5.0
    """Epochs in which the learning rate grows linearly. None: as fits the number of training images."""
    warmup_start: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate of the first step."""
    decay_rate: Annotated[float, ABOVE_0] = 0.97
    """Factor of the exponential decay."""
    decay_epochs: Annotated[float, POSITIVE] = 2.4
    """Epochs between two applications of the factor."""
    decay_from: Literal["start", "warmup"] = "start"
    """Whether the decay counts from the first step or from the end of the warm-up."""
    per_epoch: bool = False
    """Whether the learning rate changes only between epochs."""


@dataclass(frozen=True)
class Probe:
    """A classifier on the features of the frozen body, which are computed once. Uses no optimizer and no schedule."""

    views: Annotated[int, NOT_NEGATIVE] = 0
    """Views of each training photo: its center crop, then random ones, as augment says. 0: no probe, but training."""
    l2: Annotated[float | None, POSITIVE] = None
    """Strength of the penalty on the classifier's weights. None: the best of several on held-out training photos."""


@dataclass(frozen=True)
class Run:
    """How the run executes. Except for the seed, the batch-norm groups and the patience, this changes only rounding."""

    seed: Annotated[int, SEED] = 0
    """Seed of initial values, order, augmentation and masks."""
    devices: Literal["auto", "tpu", "gpu", "cpu"] = "auto"
    """auto: a TPU if one is available, else all GPUs, else the CPU."""
    tpu: str | None = None
    """Name of the TPU. local: the one attached to this machine. None: the environment's TPU_NAME, or local."""
    cpu_replicas: Annotated[int, COUNT] = 1
    """Number of replicas on the CPU, to try a distributed run without the devices."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    """auto: mixed_bfloat16 on TPUs and on GPUs that compute with it (compute capability 8.0 or more), else float32.
    mixed_float16: with dynamic loss scaling. The loss and all variables are float32."""
    batch_norm_group: str = "auto"
    """Number of replicas that share batch statistics: auto (the original's rule), all, or a number."""
    steps_per_loop: Annotated[int, COUNT] = 100
    """Steps that run in one graph, between two reports of the metrics."""
    eval_batch: Annotated[int | None, COUNT] = None
    """Batch size of the evaluation. None: that of the training."""
    eval_every: Annotated[SizedFloat, POSITIVE] = 1.0
    """Epochs between evaluations. None: as fits the number of epochs."""
    eval_raw: bool = True
    """Whether to evaluate the raw weights too, not only their moving average."""
    patience: Annotated[int | None, COUNT] = None
    """Evaluations without a better top-1 of the moving average after which the run ends early. None: it never does."""
    save_every: Annotated[SizedFloat, POSITIVE] = 1.0
    """Epochs between checkpoints. None: as fits the number of epochs."""
    save_minutes: Annotated[float | None, POSITIVE] = 10.0
    """Minutes after which a checkpoint is saved in any case. None: only save_every counts."""
    keep: Annotated[int, COUNT] = 3
    """Number of newest checkpoints to keep, besides the one with the best top-1 of the moving average."""
    deterministic: bool = False
    """Whether to use only operations that always return the same bits. On a CPU all do; on a GPU this costs speed."""
    report: bool = True
    """Whether to write report.html at the end."""
    fused: Literal["none", "layers", "kernels"] = "none"
    """JAX only: fuse layers, with the same mathematics, so that a TPU moves less memory.
    kernels: also use a kernel for the gradients of depthwise convolutions, on TPUs only."""
    xla: bool = False
    """Whether to compile the step of a single device with XLA. On a TPU and with JAX it always is."""
    threads: Annotated[int | None, COUNT] = None
    """Threads of the input pipeline. None: chosen by tf.data."""


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        model: `Model`, the model and the values it starts from.
        data: `Data`, the data set and how it is read.
        augment: `Augment`, how training images are augmented.
        progress: `Progress`, how their size and augmentation change.
        optimizer: `Optimizer`, how a step updates the variables.
        schedule: `Schedule`, how the learning rate changes.
        probe: `Probe`, a classifier on the features of the frozen body.
        run: `Run`, how the run executes.
        epochs: Float, passes over the training images. None: as fits their number. Defaults to 350.
        batch_size: Integer, images per step on all replicas together. None: as fits the number of training images.
            Defaults to 2048.
        loss: `"softmax"`: cross-entropy with one class for each image; `"sigmoid"`: one yes or no for each class.
            Defaults to `"softmax"`.
        label_smoothing: Float, share of a label that is spread evenly over all classes. Defaults to 0.1.
        average_decay: Float, decay of the moving average of all variables. Defaults to 0.9999.
        expected_top1: Float, top-1 in percent as published for the unchanged recipe. None if there is none.
        source: String, the source of these numbers.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    progress: Progress = field(default_factory=Progress)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    probe: Probe = field(default_factory=Probe)
    run: Run = field(default_factory=Run)
    epochs: Annotated[SizedFloat, POSITIVE] = 350.0
    """Passes over the training images. None: as fits their number."""
    batch_size: Annotated[SizedInt, COUNT] = 2048
    """Images per step, on all replicas together. None: as fits the number of training images."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy with one class for each image; sigmoid: one yes or no for each class."""
    label_smoothing: Annotated[float, BELOW_1] = 0.1
    """Share of a label that is spread evenly over all classes."""
    average_decay: Annotated[float, BELOW_1] = 0.9999
    """Decay of the moving average of all variables."""
    expected_top1: Annotated[float | None, Range(0, 100)] = None
    """Top-1 in percent, as published for the unchanged recipe."""
    source: str = ""
    """Source of these numbers."""

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.model.image_size or VARIANTS[self.model.name].resolution

    def stage(self, number: int) -> "Recipe":
        """Returns the recipe of one stage of progressive learning: `image_size` and `augment` are that stage's.

        Args:
            number: Integer, from 0.

        Returns:
            `Recipe`, without `progress`.
        """
        rows = self.progress
        if not rows.sizes:
            return self
        columns = {"magnitude": rows.magnitudes, "mixup": rows.mixups, "cutmix": rows.cutmixes}
        changed = {name: column[number] for name, column in columns.items() if column}
        model = replace(self.model, image_size=rows.sizes[number])
        return replace(self, model=model, augment=replace(self.augment, **changed), progress=Progress())

    def stage_ends(self, total: int) -> list[int]:
        """Returns the step after the last of each stage.

        Args:
            total: Integer, steps of the whole run.

        Returns:
            List of integers, one for each stage. The last is `total`.

        Reference:
            google/automl efficientnetv2/main.py: `max_steps = int(ratio * train_steps)`.
        """
        count = max(1, len(self.progress.sizes))
        return [int((number + 1) / count * total) for number in range(count)]

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        how = self.optimizer
        if how.peak is not None:
            return how.peak
        return how.per_256 if how.name in _ANY_BATCH else how.per_256 * self.batch_size / 256


def settled(recipe: Recipe, padding: str | None = None, bn_epsilon: float | None = None) -> Recipe:
    """Fills the fields of a recipe that follow from its model.

    Args:
        recipe: `Recipe`.
        padding: String, the padding of its weights. Defaults to None: the model's own.
        bn_epsilon: Float, the epsilon of its weights. Defaults to None: the padding's.

    Returns:
        `Recipe`.

    Example:

    >>> from keras_effnet.tpu.config import Model, Recipe, settled
    >>> settled(Recipe(Model("efficientnetv2-s"))).model.bn_momentum
    0.9
    """
    how, row = recipe.model, VARIANTS[recipe.model.name]
    padding = how.padding or padding or row.padding
    usual = {"padding": padding, "bn_momentum": row.bn_momentum, "bn_epsilon": bn_epsilon or EPSILONS[padding]}
    return replace(recipe, model=replace(how, **{k: v for k, v in usual.items() if getattr(how, k) is None}))


def with_fields(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    """Returns a recipe with other values of some fields.

    Args:
        recipe: `Recipe`.
        fields: Mapping from the names of fields, as in `flat()`, to their values.

    Returns:
        `Recipe`.

    Example:

    >>> from keras_effnet.tpu.config import Recipe, with_fields
    >>> with_fields(Recipe(), {"epochs": 2, "run.seed": 1}).run.seed
    1
    """
    for name, value in fields.items():
        group, _, leaf = name.rpartition(".")
        new = {leaf: value} if not group else {group: replace(getattr(recipe, group), **{leaf: value})}
        recipe = replace(recipe, **new)
    return recipe


def override(recipe: Recipe, arguments: Sequence[str], prog: str = "keras-effnet train RECIPE") -> Recipe:
    """Returns a recipe with some fields changed by command-line arguments.

    A change of the optimizer to or from Adam and AdamW also resets the fields whose defaults depend on it.

    Args:
        recipe: `Recipe`.
        arguments: Sequence of strings, such as `["--optimizer.peak", "0.128"]`.
        prog: String, the command in help and usage. Defaults to `"keras-effnet train RECIPE"`.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If a field does not exist (the message names the nearest ones), or a value has the wrong type.

    Example:

    >>> from keras_effnet.tpu.config import Recipe, override
    >>> override(Recipe(), ["--optimizer.peak", "0.128", "--epochs", "2"]).peak
    0.128
    """
    fields = flat(dataclasses.asdict(recipe))
    names = [f"--{name}" for name in fields]
    names += [f"--{_negated(name)}" for name, value in fields.items() if isinstance(value, bool)]
    for argument in arguments:
        name = f"--{_field(argument)}"
        if argument.startswith("--") and argument != "--help" and name not in names:
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all"
            raise ValueError(f"Expected a field of the recipe. Received: {argument}. {hint}")
    changed = _parsed(recipe, arguments, prog)
    before, after = recipe.optimizer.name, changed.optimizer.name
    if before != after and {before, after} & _OWN.keys():
        # Rates and decays of the one make no sense for the other, except those that the arguments give.
        own = replace(recipe.optimizer, name=after, peak=None, **dict.fromkeys(_ORIGINAL))
        changed = _parsed(replace(recipe, optimizer=own), arguments, prog)
    return _unsettled(recipe, changed, {_field(argument) for argument in arguments})


def _field(argument: str) -> str:
    """Returns the name of the field that an argument such as `--optimizer.peak=0.1` gives."""
    return argument[2:].split("=")[0].replace("-", "_")


def _unsettled(before: Recipe, after: Recipe, given: set[str]) -> Recipe:
    """Lets fields follow another model where they followed the one before. See `settled()`."""
    old, new = before.model, after.model
    if (old.name, old.weights, old.padding) == (new.name, new.weights, new.padding) or old.name not in VARIANTS:
        return after
    usual = settled(replace(before, model=replace(old, bn_momentum=None, bn_epsilon=None))).model
    followed = [key for key in ("bn_momentum", "bn_epsilon") if getattr(old, key) == getattr(usual, key)]
    if old.weights is not None or old.padding == VARIANTS[old.name].padding:
        followed.append("padding")
    free = [key for key in followed if f"model.{key}" not in given]
    return replace(after, model=replace(new, **dict.fromkeys(free)))


def _parsed(recipe: Recipe, arguments: Sequence[str], prog: str) -> Recipe:
    import tyro

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            changed = tyro.cli(Recipe, default=recipe, args=list(arguments), prog=prog, use_underscores=True)
    except SystemExit as end:
        if not end.code:
            print(output.getvalue())
            raise
        lines = [line.strip("│╭╮╰╯─- ") for line in output.getvalue().splitlines()][1:]
        problem = " ".join(line for line in lines if line).split("Argument helptext")[0].split("For full helptext")[0]
        raise ValueError(f"Expected values of the fields' types. {problem.strip()}") from end
    name = changed.model.name
    model = dataclasses.replace(changed.model, name=find_model(name) if is_model(name) else name)
    return dataclasses.replace(changed, model=model)


def _negated(name: str) -> str:
    *group, leaf = name.split(".")
    return ".".join([*group, f"no_{leaf}"])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested dict, joining the keys by dots.

    Args:
        tree: Nested dict.
        prefix: String before each key. Defaults to `""`.

    Returns:
        Dict.

    Example:

    >>> from keras_effnet.tpu.config import flat
    >>> flat({"run": {"seed": 1}, "epochs": 2})
    {'run.seed': 1, 'epochs': 2}
    """
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def to_json(recipe: Recipe, **resolved: Any) -> str:
    """Returns a recipe as JSON.

    Args:
        recipe: `Recipe`.
        **resolved: Numbers that follow from the recipe and the data, for readers of the file.

    Returns:
        String of JSON.

    Example:

    >>> from keras_effnet.tpu.config import Recipe, from_json, to_json
    >>> from_json(to_json(Recipe(epochs=2))) == Recipe(epochs=2)
    True
    """
    return json.dumps(dataclasses.asdict(recipe) | ({"resolved": resolved} if resolved else {}), indent=2) + "\n"


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields with tuples, which JSON writes as lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def from_json(text: str) -> Recipe:
    """Reads a recipe that `to_json()` has written.

    Args:
        text: String of JSON.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If the text has a field that this version lacks, or a value of another type.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError(f"Expected a recipe, a JSON object. Received: {type(tree).__name__}")
    tree.pop("resolved", None)
    parts: dict[str, Any] = {one.name: one.default_factory for one in dataclasses.fields(Recipe)}
    try:
        recipe = Recipe(
            **{
                name: parts[name](**_tuples(value)) if isinstance(value, dict) else value
                for name, value in tree.items()
            }
        )
        check_fields(recipe, ranges=False)  # a run of an earlier version may have had others
    except (TypeError, KeyError) as error:
        raise ValueError(f"Expected a recipe of this version. Received: {one_line(error)}") from error
    return recipe

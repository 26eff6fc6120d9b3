"""A recipe: everything that decides how a training run ends, as frozen dataclasses; to and from text."""

import contextlib
import dataclasses
import difflib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = "efficientnet-b0"
    """As in `keras-effnet list`."""
    image_size: int | None = None
    """Pixels of a side. None: the model's own."""
    dropout_rate: float | None = None
    """Before the classifier. None: the model's own."""
    drop_connect_rate: float | None = None
    """At which the last blocks are dropped. None: the model's own, 0.2."""
    bn_momentum: float = 0.99
    """Share of the old moving statistics that a step keeps."""
    bn_epsilon: float = 1e-3
    """Added to the variance."""
    preprocessing: str = "auto"
    """auto, imagenet, inception or tpu127."""
    weights: str | None = None
    """To start from: tag of a published set, or path of a file of weights. None: random values."""
    keep_top: bool = False
    """Whether the classifier is taken from the weights too; the classes are then the same."""
    freeze: Literal["none", "batch-norm", "all-but-top"] = "none"
    """What is not trained. Frozen batch normalisation takes its moving statistics."""


@dataclass(frozen=True)
class Data:
    """What is read."""

    source: str = "imagenet2012"
    """Folder with one per class, or with such ones called train and val; folder of TFRecords train-* and validation-*
    in the original's layout; digits; or the name of a TensorFlow dataset."""
    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its files."""
    train_split: str | None = None
    """Of a TensorFlow dataset, such as train[:90%]. None: train."""
    eval_split: str | None = None
    """Of a TensorFlow dataset. None: the first there is of validation, val and test."""
    holdout_shards: int = 0
    """Of TFRecords: the first training shards are evaluated on and not trained on."""
    classes: int | None = None
    """None: as many as the data says, or 1000 for TFRecords."""
    first_label: int = 1
    """Number of the first class in TFRecords; the original's are 1 to 1000."""
    shuffle_buffer: int = 2048
    """Records that are shuffled among each other; the files' order is another in each epoch. Folders are shuffled as a
    whole."""
    max_corrupt: float = 0.05
    """Share of an epoch's images that may be unreadable before the run stops."""
    transfer: Literal["uint8", "float32"] = "uint8"
    """How training images leave the host. float32 keeps what the interpolation overshoots, four times the bytes."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of every resize."""
    eval_crop: float | None = None
    """Share of the shorter side that is evaluated. None: size / (size + 32), the original's first rule."""


@dataclass(frozen=True)
class Augment:
    """What is done to training images."""

    crop: Literal["inception", "none"] = "inception"
    """inception: a random part, resized; none: as in evaluation."""
    min_area: float = 0.08
    """Smallest share of an image that a random part has."""
    flip: bool = True
    """Half of the images are mirrored."""
    policy: Literal["none", "autoaugment", "randaugment"] = "none"
    """AutoAugment v0, or RandAugment."""
    layers: int = 2
    """Operations of RandAugment on each image."""
    magnitude: float = 10.0
    """Of RandAugment; 10 is the strongest that AutoAugment has, and the published recipes go beyond."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude."""
    op_probability: float = 1.0
    """At which RandAugment's picked operation is applied."""
    erase: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Parameter of mixup's beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Parameter of cutmix's beta distribution; 0 is off."""


@dataclass(frozen=True)
class Optimizer:
    """How a step changes the variables."""

    name: Literal["rmsprop", "rmsprop-keras", "rmsprop-torch", "momentum", "sgd", "lars", "lamb"] = "rmsprop"
    """rmsprop is the original's; the others are those of tf.keras and PyTorch. With lars the original shares batch
    statistics: --run.batch-norm-group all."""
    peak: float | None = None
    """Highest learning rate. None: per_256 * batch_size / 256."""
    per_256: float = 0.016
    """Highest learning rate for a batch of 256 images."""
    momentum: float = 0.9
    """Share of the last step that is kept."""
    decay: float = 0.9
    """Of the mean of squared gradients."""
    epsilon: float = 1e-3
    """Keeps the divisor away from zero."""
    clip_norm: float | None = None
    """Largest norm of all gradients together. None: no limit."""
    trust: float = 1e-3
    """LARS' coefficient."""
    layer_decay: float = 0.0
    """Weight decay inside LARS and LAMB."""
    weight_decay: float = 1e-5
    """Times half the sum of squares, in the loss."""
    decayed: Literal["no-batch-norm", "all", "kernels"] = "no-batch-norm"
    """What the weight decay is of: the original's is of all but batch normalisation."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes."""

    kind: Literal["exponential", "cosine", "constant", "poly"] = "exponential"
    """After the warm-up."""
    warmup_epochs: float = 5.0
    """Of linear growth."""
    warmup_start: float = 0.0
    """Learning rate of the first step."""
    decay_rate: float = 0.97
    """Factor of the exponential."""
    decay_epochs: float = 2.4
    """After which the factor is applied."""
    decay_from: Literal["start", "warmup"] = "start"
    """Where the decay begins to count."""
    per_epoch: bool = False
    """Whether the rate changes only from epoch to epoch."""


@dataclass(frozen=True)
class Run:
    """How a machine goes through it. But for the seed and the groups, a change here changes nothing but rounding."""

    seed: int = 0
    """Of initial values, order, augmentation and masks."""
    devices: Literal["auto", "tpu", "gpu", "cpu"] = "auto"
    """auto: a TPU if there is one, else all GPUs, else the processor."""
    tpu: str | None = None
    """Name of the TPU; local is the one that this machine belongs to. None: TPU_NAME of the environment, or local."""
    cpu_replicas: int = 1
    """Replicas on the processor, to try a distributed run without the devices."""
    precision: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    """auto: mixed_bfloat16 on a TPU, else float32. The loss and all variables are float32."""
    batch_norm_group: str = "auto"
    """Replicas that share batch statistics: auto (the original's rule), all, or a number."""
    steps_per_loop: int = 100
    """Steps between two looks at the metrics, inside one graph."""
    eval_batch: int | None = None
    """Images of an evaluation's step. None: the batch size."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    eval_raw: bool = True
    """Whether the variables themselves are evaluated too, and not only their moving average."""
    save_every: float = 1.0
    """Epochs between checkpoints."""
    save_minutes: float | None = 10.0
    """Minutes after which there is one too. None: only after save_every."""
    keep: int = 3
    """Newest checkpoints that are kept, besides the one with the best top-1 of the moving average."""
    deterministic: bool = False
    """Only operations that always give the same bits. On a processor they do anyway; on a GPU it costs speed."""
    report: bool = True
    """Whether report.html is written at the end."""
    fused: Literal["none", "layers", "kernels"] = "none"
    """With JAX: which layers that belong together are one, of the same mathematics, so that a TPU moves less memory.
    kernels: with a kernel for the gradients of depthwise convolutions, on a TPU alone."""
    xla: bool = False
    """Compile the step of a single device with XLA. On a TPU, and with JAX, it is compiled anyway."""
    threads: int | None = None
    """Of the input pipeline. None: as many as it finds useful."""


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        model: `Model`, what is trained.
        data: `Data`, what is read.
        augment: `Augment`, what is done to training images.
        optimizer: `Optimizer`.
        schedule: `Schedule` of the learning rate.
        run: `Run`, how a machine goes through it.
        epochs: Float. Defaults to 350.
        batch_size: Integer, images of a step on all replicas together. Defaults to 2048.
        label_smoothing: Float. Defaults to 0.1.
        average_decay: Float, of the moving average of all variables. Defaults to 0.9999.
        expected_top1: Float in per cent, as published, or None where no number is.
        source: String, where the numbers are from.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)
    epochs: float = 350.0
    """Times that the training images are gone through."""
    batch_size: int = 2048
    """Images of a step, on all replicas together."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    average_decay: float = 0.9999
    """Of the moving average of all variables."""
    expected_top1: float | None = None
    """In per cent, as published for this recipe as it is."""
    source: str = ""
    """Where its numbers are from."""

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        given = self.optimizer.peak
        return self.optimizer.per_256 * self.batch_size / 256 if given is None else given


def override(recipe: Recipe, arguments: Sequence[str], prog: str = "keras-effnet train RECIPE") -> Recipe:
    """A recipe with some fields changed by command-line arguments.

    Args:
        recipe: `Recipe`.
        arguments: Sequence of strings, such as `["--optimizer.peak", "0.128"]`.
        prog: String, what help and usage say in front.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If there is no such field, with the nearest names; or its value is not of its type.

    Example:

    >>> from keras_effnet.tpu.config import Recipe, override
    >>> override(Recipe(), ["--optimizer.peak", "0.128", "--epochs", "2"]).peak
    0.128
    """
    import tyro

    fields = flat(dataclasses.asdict(recipe))
    names = [f"--{name}" for name in fields]
    names += [f"--{_negated(name)}" for name, value in fields.items() if isinstance(value, bool)]
    for argument in arguments:
        name = "--" + argument[2:].split("=")[0].replace("-", "_")
        if argument.startswith("--") and argument != "--help" and name not in names:
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "See --help for all"
            raise ValueError(f"Expected a field of the recipe. Received: {argument}. {hint}")
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            return tyro.cli(Recipe, default=recipe, args=list(arguments), prog=prog, use_underscores=True)
    except SystemExit as end:
        if not end.code:
            print(told.getvalue())
            raise
        lines = [line.strip("│╭╮╰╯─- ") for line in told.getvalue().splitlines()][1:]
        problem = " ".join(line for line in lines if line).split("Argument helptext")[0].split("For full helptext")[0]
        raise ValueError(f"Expected values of the fields' types. {problem.strip()}") from end


def _negated(name: str) -> str:
    *group, leaf = name.split(".")
    return ".".join([*group, f"no_{leaf}"])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one whose keys are joined by dots.

    Args:
        tree: Nested dict.
        prefix: String in front of each key. Defaults to none.

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
    """A recipe as text.

    Args:
        recipe: `Recipe`.
        **resolved: Numbers that follow from it and the data, for those who look at the text.

    Returns:
        String of JSON.

    Example:

    >>> from keras_effnet.tpu.config import Recipe, from_json, to_json
    >>> from_json(to_json(Recipe(epochs=2))) == Recipe(epochs=2)
    True
    """
    return json.dumps(dataclasses.asdict(recipe) | ({"resolved": resolved} if resolved else {}), indent=2) + "\n"


def from_json(text: str) -> Recipe:
    """The inverse of `to_json()`.

    Args:
        text: String of JSON.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If a field is missing here.
    """
    tree = json.loads(text)
    tree.pop("resolved", None)
    parts: dict[str, Any] = {one.name: one.default_factory for one in dataclasses.fields(Recipe)}
    try:
        return Recipe(
            **{name: parts[name](**value) if isinstance(value, dict) else value for name, value in tree.items()}
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"Expected a recipe of this version. Received: {error}") from error

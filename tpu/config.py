"""Recipes as frozen dataclasses, to and from JSON. A recipe holds everything that decides the result of a run."""

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
    """The model and the values it starts from."""

    name: str = "efficientnet-b0"
    """A name from `keras-effnet list`."""
    image_size: int | None = None
    """Height and width in pixels. None: the model's own."""
    dropout_rate: float | None = None
    """Dropout rate before the classifier. None: the model's own."""
    drop_connect_rate: float | None = None
    """Rate at which the last blocks are dropped. None: the model's own, 0.2."""
    bn_momentum: float = 0.99
    """Share of the moving statistics that each step keeps."""
    bn_epsilon: float = 1e-3
    """Added to the variance in batch normalization."""
    preprocessing: str = "auto"
    """Pixel normalization: auto, imagenet, inception or tpu127."""
    weights: str | None = None
    """Weights to start from: tag of a published set, or path of a file. None: random values."""
    keep_top: bool = False
    """Whether to load the classifier too. The classes must then be those of the weights."""
    freeze: Literal["none", "batch-norm", "all-but-top"] = "none"
    """What not to train. Frozen batch normalization uses its moving statistics."""


@dataclass(frozen=True)
class Data:
    """The data set and how it is read."""

    source: str = "imagenet2012"
    """Folder with one subfolder per class, or with train and val that each hold such subfolders;
    folder of TFRecords train-* and validation-* in the original's layout; digits; or the name of a TensorFlow dataset.
    """
    data_dir: str | None = None
    """Folder in which TensorFlow Datasets keeps its files."""
    train_split: str | None = None
    """Training split of a TensorFlow dataset, such as train[:90%]. None: train."""
    eval_split: str | None = None
    """Evaluation split of a TensorFlow dataset. None: the first that exists of validation, val and test."""
    holdout_shards: int = 0
    """TFRecords only: number of first training shards to evaluate on. They are not trained on."""
    classes: int | None = None
    """Number of classes. None: as in the data, or 1000 for TFRecords."""
    first_label: int = 1
    """Number of the first class in TFRecords. The original counts from 1 to 1000."""
    shuffle_buffer: int = 2048
    """Records in the shuffle buffer. The order of files also changes each epoch. Folders are shuffled as a whole."""
    max_corrupt: float = 0.05
    """The run stops when a larger share of an epoch's images is unreadable."""
    transfer: Literal["uint8", "float32"] = "uint8"
    """How training images leave the host. float32 keeps interpolated values outside 0-255, at four times the bytes."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of every resize."""
    eval_crop: float | None = None
    """Share of the shorter side to keep in evaluation. None: size / (size + 32), the original's first rule."""


@dataclass(frozen=True)
class Augment:
    """How training images are augmented."""

    crop: Literal["inception", "none"] = "inception"
    """inception: a random part of the image, resized; none: as in evaluation."""
    min_area: float = 0.08
    """Smallest area of the random part, as a share of the image."""
    flip: bool = True
    """Whether to mirror half of the images."""
    policy: Literal["none", "autoaugment", "randaugment"] = "none"
    """Further augmentation: none, AutoAugment v0 or RandAugment."""
    layers: int = 2
    """Number of RandAugment operations per image."""
    magnitude: float = 10.0
    """Magnitude of RandAugment. 10 is AutoAugment's strongest; the published recipes go beyond."""
    magnitude_std: float = 0.0
    """Standard deviation of RandAugment's magnitude."""
    op_probability: float = 1.0
    """Probability of applying an operation that RandAugment has picked."""
    erase: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Parameter of mixup's beta distribution. 0: no mixup."""
    cutmix: float = 0.0
    """Parameter of cutmix's beta distribution. 0: no cutmix."""


@dataclass(frozen=True)
class Optimizer:
    """How a step updates the variables."""

    name: Literal["rmsprop", "rmsprop-keras", "rmsprop-torch", "momentum", "sgd", "lars", "lamb"] = "rmsprop"
    """rmsprop is the original's; rmsprop-keras and rmsprop-torch are those of tf.keras and PyTorch.
    With lars, the original shares batch statistics: --run.batch-norm-group all."""
    peak: float | None = None
    """Highest learning rate. None: per_256 * batch_size / 256."""
    per_256: float = 0.016
    """Highest learning rate for a batch of 256 images."""
    momentum: float = 0.9
    """Share of the previous step that is kept."""
    decay: float = 0.9
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-3
    """Keeps the divisor away from zero."""
    clip_norm: float | None = None
    """Largest global norm of the gradients. None: no clipping."""
    trust: float = 1e-3
    """Trust coefficient of LARS."""
    layer_decay: float = 0.0
    """Weight decay inside LARS and LAMB, not part of the loss."""
    weight_decay: float = 1e-5
    """Weight decay in the loss: this times half the sum of squares."""
    decayed: Literal["no-batch-norm", "all", "kernels"] = "no-batch-norm"
    """Variables with weight decay. The original decays all but those of batch normalization."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes during the run."""

    kind: Literal["exponential", "cosine", "constant", "poly"] = "exponential"
    """Shape of the decay after the warm-up."""
    warmup_epochs: float = 5.0
    """Epochs in which the learning rate grows linearly."""
    warmup_start: float = 0.0
    """Learning rate of the first step."""
    decay_rate: float = 0.97
    """Factor of the exponential decay."""
    decay_epochs: float = 2.4
    """Epochs between two applications of the factor."""
    decay_from: Literal["start", "warmup"] = "start"
    """Whether the decay counts from the first step or from the end of the warm-up."""
    per_epoch: bool = False
    """Whether the learning rate changes only between epochs."""


@dataclass(frozen=True)
class Run:
    """How the run executes. Except for the seed and the batch-norm groups, these fields change only rounding."""

    seed: int = 0
    """Seed of initial values, order, augmentation and masks."""
    devices: Literal["auto", "tpu", "gpu", "cpu"] = "auto"
    """auto: a TPU if one is available, else all GPUs, else the CPU."""
    tpu: str | None = None
    """Name of the TPU. local: the one attached to this machine. None: the environment's TPU_NAME, or local."""
    cpu_replicas: int = 1
    """Number of replicas on the CPU, to try a distributed run without the devices."""
    precision: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    """auto: mixed_bfloat16 on a TPU, else float32. The loss and all variables are float32."""
    batch_norm_group: str = "auto"
    """Number of replicas that share batch statistics: auto (the original's rule), all, or a number."""
    steps_per_loop: int = 100
    """Steps that run in one graph, between two reports of the metrics."""
    eval_batch: int | None = None
    """Batch size of the evaluation. None: that of the training."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    eval_raw: bool = True
    """Whether to evaluate the raw weights too, not only their moving average."""
    save_every: float = 1.0
    """Epochs between checkpoints."""
    save_minutes: float | None = 10.0
    """Minutes after which a checkpoint is saved in any case. None: only save_every counts."""
    keep: int = 3
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
    threads: int | None = None
    """Threads of the input pipeline. None: chosen by tf.data."""


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        model: `Model`, the model and the values it starts from.
        data: `Data`, the data set and how it is read.
        augment: `Augment`, how training images are augmented.
        optimizer: `Optimizer`, how a step updates the variables.
        schedule: `Schedule`, how the learning rate changes.
        run: `Run`, how the run executes. Except for the seed and the batch-norm groups, it changes only rounding.
        epochs: Float, passes over the training images. Defaults to 350.
        batch_size: Integer, images per step on all replicas together. Defaults to 2048.
        label_smoothing: Float, share of a label that is spread evenly over all classes. Defaults to 0.1.
        average_decay: Float, decay of the moving average of all variables. Defaults to 0.9999.
        expected_top1: Float, top-1 in percent as published for the unchanged recipe. None if there is none.
        source: String, the source of these numbers.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)
    epochs: float = 350.0
    """Passes over the training images."""
    batch_size: int = 2048
    """Images per step, on all replicas together."""
    label_smoothing: float = 0.1
    """Share of a label that is spread evenly over all classes."""
    average_decay: float = 0.9999
    """Decay of the moving average of all variables."""
    expected_top1: float | None = None
    """Top-1 in percent, as published for the unchanged recipe."""
    source: str = ""
    """Source of these numbers."""

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        given = self.optimizer.peak
        return self.optimizer.per_256 * self.batch_size / 256 if given is None else given


def override(recipe: Recipe, arguments: Sequence[str], prog: str = "keras-effnet train RECIPE") -> Recipe:
    """Returns a recipe with some fields changed by command-line arguments.

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
    import tyro

    fields = flat(dataclasses.asdict(recipe))
    names = [f"--{name}" for name in fields]
    names += [f"--{_negated(name)}" for name, value in fields.items() if isinstance(value, bool)]
    for argument in arguments:
        name = "--" + argument[2:].split("=")[0].replace("-", "_")
        if argument.startswith("--") and argument != "--help" and name not in names:
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all"
            raise ValueError(f"Expected a field of the recipe. Received: {argument}. {hint}")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return tyro.cli(Recipe, default=recipe, args=list(arguments), prog=prog, use_underscores=True)
    except SystemExit as end:
        if not end.code:
            print(output.getvalue())
            raise
        lines = [line.strip("│╭╮╰╯─- ") for line in output.getvalue().splitlines()][1:]
        problem = " ".join(line for line in lines if line).split("Argument helptext")[0].split("For full helptext")[0]
        raise ValueError(f"Expected values of the fields' types. {problem.strip()}") from end


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


def from_json(text: str) -> Recipe:
    """Reads a recipe that `to_json()` has written.

    Args:
        text: String of JSON.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If the text has a field that this version lacks.
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

"""Knapsack pruning: which channels of a trained net to keep within a budget, and the smaller net without the others.

Method: arXiv 2002.08258, and its code (yoniaflalo/knapsack_pruning @ 375abf9, external/utils_pruning.py). Here the
budget is of the whole net, a channel's cost counts what the next layers save, and no group of channels vanishes.
"""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_effnet import arch, blocks, initializers, knapsack
from keras_effnet.arch import Architecture, Widths
from keras_effnet.describe import costs
from keras_effnet.distillation import Distiller, distill, first, fit, loss_of
from keras_effnet.errors import one_of, unknown
from keras_effnet.variants import VARIANTS, nearest

__all__ = ["Distiller", "Plan", "apply", "distill", "importance", "latency", "plan"]


class Group(NamedTuple):
    """Channels that can go one by one, each together with what belongs to it in other layers.

    Args:
        name: String, that of the first layer which puts the channels out, without `_conv`.
        width: Name of the `Block` field that counts them.
        blocks: Tuple of the indices of the blocks that share them.
        size: Integer, their number.
    """

    name: str
    width: str
    blocks: tuple[int, ...]
    size: int


def groups(architecture: Architecture) -> tuple[Group, ...]:
    """The groups of channels of a net that pruning may narrow.

    A block's expansion, with depthwise convolution and gate; its squeeze-and-excite width; and the projections that
    residual connections add up. Stem, first stage and head stay whole, as in the published nets (utils_pruning.py
    :437-472).

    Args:
        architecture: An `Architecture`.

    Returns:
        Tuple of `Group`.

    Example:

    >>> from keras_effnet.variants import VARIANTS
    >>> b0 = arch.resolve(VARIANTS["efficientnet-b0"])
    >>> [(group.name, group.blocks, group.size) for group in groups(b0)][:3]
    [('block2a_expand', (1,), 96), ('block2a_se_reduce', (1,), 4), ('block2a_project', (1, 2), 24)]
    """
    net, found = architecture.blocks, []
    for index, block in enumerate(net):
        if block.stage == 1:
            continue
        if block.expand_filters:
            found.append(Group(f"block{block.name}_expand", "expand_filters", (index,), block.expand_filters))
        if block.se_filters:
            found.append(Group(f"block{block.name}_se_reduce", "se_filters", (index,), block.se_filters))
        if not block.residual:
            last = index
            while last + 1 < len(net) and net[last + 1].residual:
                last += 1
            chain = tuple(range(index, last + 1))
            # The depthwise convolution of a block without expansion has the channels that arrive.
            if all(follower.expand_filters for follower in net[index + 1 : last + 2]):
                found.append(Group(f"block{block.name}_project", "filters_out", chain, block.filters_out))
    return tuple(found)


def _with_sizes(architecture: Architecture, sizes: Mapping[Group, int]) -> Architecture:
    """The net whose groups have other sizes."""
    rows: list[dict[str, int]] = [{} for _ in architecture.blocks]
    for group, size in sizes.items():
        for index in group.blocks:
            rows[index][group.width] = size
    narrow = dataclasses.replace(
        architecture,
        blocks=tuple(dataclasses.replace(block, **row) for block, row in zip(architecture.blocks, rows, strict=True)),
    )
    return arch.with_widths(architecture, narrow.widths)


# The layers of a block: what arrives on the last but one axis of their kernels and what leaves on the last.
_CHANNELS = {
    "routing": ("arriving", ""),
    "expand_conv": ("arriving", "expand_filters"),
    "expand_bn": ("", "expand_filters"),
    "dwconv": ("expand_filters", ""),
    "bn": ("", "expand_filters"),
    "se_reduce": ("expand_filters", "se_filters"),
    "se_expand": ("se_filters", "expand_filters"),
    "project_conv": ("expand_filters", "filters_out"),
    "project_bn": ("", "filters_out"),
}


# Plans


@dataclass(frozen=True)
class Plan:
    """Which channels of a net go. Its file is a small JSON object.

    Args:
        model: Name of the variant that the net is, or was cut from.
        blocks: Dict from a block's name to the channels that stay, `(expand, se, out)`.
        removed: Dict from a group's name to the tuple of its channels, from 0, that go.
        before: Float, cost of the whole net.
        after: Float, cost of the smaller one.
        asked: Float, the share of the cost that was to be saved.
        cost: `"macs"`, `"latency"` (in seconds) or `"params"`.
        solver: `"greedy"` or `"exact"`.
        gap: Float, how much less importance stays than the fractional bound, as a share of that: no choice of the same
            cost, summed up over the groups, has more than the bound.
        importance: String, how the channels were judged.
    """

    model: str | None
    blocks: dict[str, Widths]
    removed: dict[str, tuple[int, ...]] = field(repr=False)
    before: float
    after: float
    asked: float
    cost: str = "macs"
    solver: str = "greedy"
    gap: float = 0.0
    importance: str = "gradient"

    @property
    def reduction(self) -> float:
        """Share of the cost that is saved."""
        return 1 - self.after / self.before

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the plan as JSON.

        Args:
            path: Path of the file. Its folder exists.

        Returns:
            The path.

        Raises:
            OSError: If the file cannot be written.
        """
        from keras_effnet.weights import writers

        rows = dataclasses.asdict(self)
        rows["removed"] = {name: _told(channels) for name, channels in self.removed.items()}
        # A line per entry of a dict, and none per number.
        parts = [f"  {json.dumps(key)}: {_lines(value)}" for key, value in rows.items()]
        with writers.replacing(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads what `save()` wrote.

        Args:
            path: Path of the file.

        Returns:
            A `Plan`.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it holds no plan.
        """
        text = Path(path).read_bytes()
        try:
            rows = json.loads(text)
            rows["blocks"] = {str(name): tuple(widths) for name, widths in rows["blocks"].items()}
            rows["removed"] = {str(name): _channels(told) for name, told in rows["removed"].items()}
            plan = cls(**rows)
            if not 0 <= plan.after <= plan.before or not plan.before or not plan.blocks:
                raise ValueError("it saves nothing that can be")
            return plan
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Expected the JSON of a plan. Received: {str(path)!r} ({error})") from error


def _lines(value) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n  }"


def _told(channels: Sequence[int]) -> str:
    """Numbers in ascending order as ranges: "0-3,7"."""
    array = np.asarray(channels, int)
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1) if len(array) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _channels(told: str) -> tuple[int, ...]:
    ends = [run.partition("-")[::2] for run in told.split(",") if told]
    return tuple(channel for first, last in ends for channel in range(int(first), int(last or first) + 1))


def narrowed(architecture: Architecture, plan: Any) -> Architecture:
    """A variant with the channels of a plan.

    Args:
        architecture: An `Architecture`, that of a variant.
        plan: A `Plan`, the path of its file, or widths as `arch.with_widths()` takes them.

    Returns:
        An `Architecture`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the plan is of another net.
    """
    if isinstance(plan, str | os.PathLike):
        plan = Plan.load(plan)
    if isinstance(plan, Plan):
        if plan.model not in (None, architecture.name):
            raise ValueError(f"Expected a plan for {architecture.name!r}. Received: one for {plan.model!r}")
        plan = plan.blocks
    if not isinstance(plan, Mapping | Sequence):
        raise ValueError(
            "Expected a Plan, the path of one, or (expand, se, out) for each block. "
            f"Received: {type(plan).__name__} {plan!r}"
        )
    return arch.with_widths(architecture, plan)


# Importance


class _Sums(keras.optimizers.Optimizer):
    """Adds up gradients where an optimizer would move the variables, which stay as they are.

    Args:
        axes: Dict from the path of each variable that matters to the axis of its channels.
        by_channel: Boolean. False: gradients are added as they are. True: of each batch, the absolute value of each
            channel's sum of variable times gradient.
    """

    def __init__(self, axes: dict[str, int], by_channel: bool):
        super().__init__(learning_rate=0.0, name="sums")
        self.axes, self.by_channel = axes, by_channel
        self.sums: list[Any] = []  # of each variable; None where it does not matter
        self._axes: list[int] = []

    def build(self, variables):
        super().build(variables)
        for variable in variables:
            shape, axis = tuple(variable.shape), self.axes.get(variable.path)
            shape = (shape[axis],) if self.by_channel and axis is not None else shape
            self._axes.append(0 if axis is None else axis % len(variable.shape))
            self.sums.append(None if axis is None else self.add_variable(shape, "zeros", dtype="float32", name="sum"))

    def update_step(self, gradient, variable, learning_rate):
        place = self._get_variable_index(variable)
        if self.sums[place] is None:
            return
        gradient = keras.ops.cast(gradient, "float32")
        if self.by_channel:
            product = keras.ops.multiply(gradient, keras.ops.cast(variable, "float32"))
            others = [axis for axis in range(len(variable.shape)) if axis != self._axes[place]]
            gradient = keras.ops.abs(keras.ops.sum(product, axis=others))
        self.assign_add(self.sums[place], gradient)


class _AsInference(keras.Model):
    """A model that trains as it predicts: with its batch-norm statistics, and nothing dropped."""

    def __init__(self, net: keras.Model):
        super().__init__(name="as_inference")
        self.net = net

    def call(self, inputs, training=None):
        return self.net(inputs, training=False)


def _outer(block_layer: str) -> int:
    """Axis of a kernel's output channels; a depthwise kernel has them before its multiplier."""
    return -2 if block_layer == "dwconv" else -1


def _kernels(reading: blocks.Reading) -> dict[str, list[tuple[Any, int]]]:
    """Of each group the layers whose kernels put its channels out, with their axis."""
    found: dict[str, list[tuple[Any, int]]] = {}
    for group in groups(reading.architecture):
        members = found.setdefault(group.name, [])
        for index in group.blocks:
            start = f"block{reading.architecture.blocks[index].name}_"
            for name, channels in _CHANNELS.items():
                layer = reading.layers.get(start + name)
                if layer is not None and hasattr(layer, "kernel") and group.width == channels[_outer(name)]:
                    members.append((layer, _outer(name)))
    return found


def importance(
    model: keras.Model,
    dataset: Any,
    kind: str = "gradient",
    *,
    loss: Any = None,
    batch_size: int = 32,
    verbose: str | int = "auto",
) -> dict[str, np.ndarray]:
    """How much each channel matters to a model's loss.

    Args:
        model: A model of this package, or a functional or sequential one that holds one. It stays as it is.
        dataset: What the model is fitted on, such as a `tf.data.Dataset` of batches or a pair of arrays
            (pixels, labels). One pass is made, with the statistics of inference. Not used by `"magnitude"`.
        kind: `"gradient"`: the sum of |w * dL/dw| over a channel's weights, where dL/dw is the mean over the batches.
            `"taylor"`: the mean over the batches of |the sum of w * dL/dw|. `"magnitude"`: the sum of |w|.
        loss: A Keras loss. Defaults to None: the one that the model is compiled with, or the cross-entropy of its
            classes.
        batch_size: Integer, for arrays. Defaults to 32.
        verbose: As in `keras.Model.fit()`, whose progress bar is shown.

    Returns:
        Dict from the name of a group (see `groups()`) to an array of floats, one per channel: the sum over the
        convolutions of the group.

    Raises:
        ValueError: If the model holds no EfficientNet, or the data are none.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> model = ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> ke.pruning.importance(model, data, verbose=0)["block2a_expand"].shape
    (96,)

    Reference:
        arXiv 2002.08258, section 3; Molchanov et al., arXiv 1611.06440, for `"taylor"`.
    """
    one_of("importance", kind, KINDS)
    holder, reading = blocks.find(model)
    if kind == "magnitude":
        return {
            name: _summed([(_numbers(layer.kernel), axis) for layer, axis in members])
            for name, members in _kernels(reading).items()
        }
    # A copy, all of whose convolutions have gradients, whatever is frozen in the model.
    copy = _copied(model, holder, {})
    kernels = _kernels(blocks.find(copy)[1])
    wanted = {layer.kernel.path: axis for members in kernels.values() for layer, axis in members}
    for layer in copy._flatten_layers():
        if not isinstance(layer, keras.Model):
            layer.trainable = getattr(getattr(layer, "kernel", None), "path", None) in wanted
    runner = _AsInference(copy)
    optimizer = _Sums(wanted, by_channel=kind == "taylor")
    # One pass does not pay for XLA, which TensorFlow and PyTorch work without.
    jit: Any = "auto" if keras.backend.backend() == "jax" else False
    runner.compile(optimizer, loss_of(model, dataset, loss), jit_compile=jit, auto_scale_loss=False)
    fit(runner, dataset, batch_size, verbose=verbose, shuffle=False)
    batches = int(optimizer.iterations)
    sums = {
        variable.path: _numbers(total) / max(batches, 1)
        for variable, total in zip(runner.trainable_variables, optimizer.sums, strict=True)
        if total is not None
    }

    def scores(layer, axis):
        total = sums[layer.kernel.path]
        return (total, 0) if kind == "taylor" else (_numbers(layer.kernel) * total, axis)

    found = {name: _summed([scores(*member) for member in members]) for name, members in kernels.items()}
    if not batches or not all(np.isfinite(values).all() for values in found.values()):
        raise ValueError(
            f"Expected batches of pixels and labels with a finite loss. Received: {batches} batches, "
            "whose gradients are not all finite" * bool(batches)
        )
    return found


KINDS = ("gradient", "taylor", "magnitude")


def _summed(members: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Sum of absolute values per channel over several kernels."""
    rows = [np.abs(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1).sum(1) for array, axis in members]
    return np.sum(rows, axis=0, dtype=float)


def _numbers(variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")))


# The smaller model


def _copied(model: keras.Model, holder: keras.Model, configs: dict[str, dict], cut=lambda layer, weights: weights):
    """A model with layers of its own, some of other widths.

    Args:
        model: A functional or sequential model.
        holder: The model in it whose layers are changed.
        configs: Dict from a layer's name to what is other in its configuration.
        cut: Function of a layer and its list of arrays, which gives those of the new layer.

    Returns:
        A `keras.Model` of the same structure.
    """
    pairs: list[tuple[Any, Any]] = []

    def new(inside: keras.Model):
        def layer_of(layer):
            if isinstance(layer, keras.Sequential) or hasattr(layer, "_run_through_graph"):  # a graph of layers
                return new(layer)
            config = layer.get_config() | (configs.get(layer.name, {}) if inside is holder else {})
            fresh = layer.__class__.from_config(config)
            pairs.append((layer, fresh))
            return fresh

        def call(layer, *args, **kwargs):
            if kwargs or len(args) != 1 or isinstance(layer, keras.Model):
                return layer(*args, **kwargs)
            return initializers.apply(layer, args[0])

        calls: Any = {} if isinstance(inside, keras.Sequential) else {"call_function": call}
        # Keras would compile the copy, from names that it may not know, such as a loss of the user's own.
        compiled, inside.compiled = inside.compiled, False
        try:
            clone = keras.models.clone_model(inside, clone_function=layer_of, **calls)
        finally:
            inside.compiled = compiled
        if not inside.trainable:
            clone.trainable = False
        clone._called = True  # see models._functional()
        return clone

    copy = new(model)
    for old, fresh in pairs:
        values = cut(old, [np.asarray(keras.ops.convert_to_numpy(weight.value)) for weight in old.weights])
        for weight, value in zip(fresh.weights, values, strict=True):
            weight.assign(value)
        if hasattr(fresh, "finalize_state"):  # of Normalization, which computes with copies
            fresh.finalize_state()
    return copy


def apply(model: keras.Model, plan: "Plan | str | os.PathLike") -> keras.Model:
    """The smaller model: without the channels that a plan removes, with the weights of the others.

    It computes what the whole model computes with those channels set to zero.

    Args:
        model: The model that was planned for, or one with the same layers. It stays as it is.
        plan: A `Plan`, or the path of its file.

    Returns:
        A `keras.Model` of the same structure, with all that the user built around the network, not compiled. It can be
        trained, saved and exported as any other.

    Raises:
        OSError: If the plan's file cannot be read.
        ValueError: If the plan is of another net.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> model = ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> plan = ke.pruning.plan(model, data, reduction=0.4, verbose=0)
    >>> ke.pruning.apply(model, plan).count_params() < model.count_params()
    True
    """
    if isinstance(plan, str | os.PathLike):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise ValueError(f"Expected a Plan, or the path of one. Received: {type(plan).__name__}")
    holder, reading = blocks.find(model)
    architecture = reading.architecture
    parts = {group.name: group for group in groups(architecture)}
    kept: dict[tuple[int, str], np.ndarray] = {}
    for name, channels in plan.removed.items():
        if name not in parts:
            raise unknown("group of channels", name, parts)
        group = parts[name]
        wrong = [channel for channel in channels if not 0 <= channel < group.size]
        if wrong or len(set(channels)) >= group.size:
            raise ValueError(
                f"Expected fewer than {group.size} channels of {name} to go, numbers from 0. Received: "
                f"{len(set(channels))} of them, from {min(channels)} to {max(channels)}"
            )
        for index in group.blocks:
            kept[index, group.width] = np.setdiff1d(np.arange(group.size), channels)
    sizes = {group: group.size - len(set(plan.removed.get(name, ()))) for name, group in parts.items()}
    smaller = _with_sizes(architecture, sizes)
    if smaller.widths != plan.blocks:
        wrong = [name for name, row in smaller.widths.items() if plan.blocks.get(name) != row]
        name = wrong[0] if wrong else next(name for name in plan.blocks if name not in smaller.widths)
        raise ValueError(
            f"Expected a plan that was made for {model.name!r}, whose block {name} keeps {smaller.widths.get(name)} "
            f"without the channels that it removes. Received: {plan.blocks.get(name)}, of {plan.model or 'another'}"
        )
    by_layer, configs = _cuts(reading, kept, smaller)

    def cut(layer, values: list[np.ndarray]) -> list[np.ndarray]:
        arriving, leaving = by_layer.get(id(layer), (None, None))
        for place, value in enumerate(values):
            if arriving is not None and value.ndim > 1:
                value = value.take(arriving, -2)
            values[place] = value if leaving is None else value.take(leaving, -1)
        return values

    smaller_model = _copied(model, holder, configs, cut)
    for whole, part in ((model, smaller_model), (holder, blocks.find(smaller_model)[0])):
        if hasattr(whole, "weights_record"):  # whose photographs it expects
            part.weights_record = whole.weights_record
    return smaller_model


def _cuts(reading: blocks.Reading, kept: dict, smaller: Architecture) -> tuple[dict[int, tuple], dict[str, dict]]:
    """Of each layer the channels that stay, where they arrive and where they leave; and its new number of filters."""
    by_layer: dict[int, tuple] = {}
    configs: dict[str, dict] = {}
    arriving = None
    for index, block in enumerate(reading.architecture.blocks):
        tensors: dict[str, Any] = {"": None, "arriving": arriving}
        for width in ("expand_filters", "se_filters", "filters_out"):
            tensors[width] = kept.get((index, width))
        if not block.expand_filters and block.operator == "mbconv":
            tensors["expand_filters"] = arriving
        for name, (come, go) in _CHANNELS.items():
            layer = reading.layers.get(f"block{block.name}_{name}")
            if layer is None:
                continue
            _check_variables(layer)
            by_layer[id(layer)] = tensors[come], tensors[go]
            if hasattr(layer, "filters") and tensors[go] is not None:
                configs[layer.name] = {"filters": len(tensors[go])}
        arriving = tensors["filters_out"]
    by_layer[id(reading.layers["top_conv"])] = arriving, None
    return by_layer, configs


def _check_variables(layer) -> None:
    known = {"kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"}
    if not {weight.name for weight in layer.weights} <= known or "int" in str(layer.weights[0].dtype):
        kinds = ", ".join(f"{weight.name} ({weight.dtype})" for weight in layer.weights)
        raise ValueError(
            f"Expected layers as they were built. Received: {layer.name} with {kinds}, as of a quantized net"
        )


# Costs


def _size(model: keras.Model, reading: blocks.Reading, dataset) -> tuple[int, int]:
    """Height and width of the images: the model's, else the data's, else the usual ones."""
    channels_last = reading.layers["stem_conv"].data_format == "channels_last"
    shapes = [model.input_shape, () if dataset is None else first(dataset)[0].shape]
    for shape in shapes:
        size = tuple(shape[1:3] if channels_last else shape[2:4])
        if len(size) == 2 and None not in size:
            return size
    raise ValueError(f"Expected a model of known input size, or data. Received: {model.name!r} of {model.input_shape}")


def _around(model: keras.Model, reading: blocks.Reading) -> dict[str, int]:
    """What the layers of the user's own, around the network, cost."""
    ours = {id(layer) for layer in reading.layers.values()}
    macs = params = 0
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model) or id(layer) in ours:
            continue
        no_parameters = {"moving_mean", "moving_variance", "mean", "variance", "count"}
        params += sum(math.prod(weight.shape) for weight in layer.weights if weight.name not in no_parameters)
        kernel = getattr(layer, "kernel", None)
        if kernel is not None:
            outputs = math.prod(side or 1 for side in layer.output.shape[1:])
            macs += outputs // getattr(layer, "filters", kernel.shape[-1]) * math.prod(kernel.shape)
    return {"macs": macs, "params": params}


def _counted(model, reading: blocks.Reading, size, key: str) -> Callable[[Architecture], int]:
    around = _around(model, reading)[key]
    return lambda net: costs(net, size, reading.channels, reading.classes)[key] + around


def latency(models: Sequence[keras.Model], batch_size: int = 1, rounds: int = 20, size=None) -> list[float]:
    """Measures the time that models take to predict a batch, in turn.

    Args:
        models: Models of one input.
        batch_size: Integer, images at a time. Defaults to 1.
        rounds: Integer, times that each is measured. Defaults to 20.
        size: Tuple of height and width, for models of any size. Defaults to None.

    Returns:
        List of the median seconds of each.

    Example:

    >>> import keras_effnet as ke
    >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3))
    >>> seconds, = latency([model], rounds=3)
    """
    runs = []
    for model in models:
        shape = (batch_size, *known_shape(model, size))
        pixels = np.random.default_rng(0).uniform(0, 255, shape).astype("float32")
        runs.append(partial(model.predict_on_batch, pixels))
    return timed(runs, rounds)


def known_shape(model: keras.Model, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """Shape of one image that a model takes.

    Args:
        model: A model of one input, which holds an EfficientNet.
        size: Tuple of height and width, for a model of any size. Defaults to those of the nearest variant.

    Returns:
        Tuple of integers.
    """
    shape = tuple(model.input_shape[1:])
    if None not in shape:
        return shape
    if size is None:
        variant = nearest(blocks.find(model)[1].architecture)
        side = VARIANTS[variant].resolution if variant else 224
        size = side, side
    places = [place for place, side in enumerate(shape) if side is None]
    found = list(shape)
    for place, side in zip(places, size[2 - len(places) :], strict=True):
        found[place] = side
    return tuple(found)


def timed(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of calls that are made in turn, after two that warm up."""
    for run in runs:
        run()
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def _timed(model, reading: blocks.Reading, size) -> Callable[[Architecture], float]:
    """Seconds for one image: those of the whole model, less what each missing channel was measured to save.

    Each kind of block is measured whole and with half of the channels inside, at its input and at its output. Between
    that the time is taken to be linear, and blocks to add up.
    """
    (whole,) = latency([model], size=size)
    net = reading.architecture
    style = _style(reading)
    saved: dict[tuple, dict[str, float]] = {}
    slopes: list[dict[str, float]] = []
    height, width = (math.ceil(side / 2) for side in size)
    for block in net.blocks:
        plain = dataclasses.replace(block, name="0a")
        key = plain, height, width
        if key not in saved:
            saved[key] = _saved_per_channel(style, plain, (height, width))
        slopes.append(saved[key])
        height, width = (math.ceil(side / block.strides) for side in (height, width))
    end = keras.Input(_shape(style, (height, width), net.blocks[-1].filters_out))
    half = keras.Input(_shape(style, (height, width), net.blocks[-1].filters_out // 2))
    heads = [keras.Model(x, blocks.head(style, x, net.head_filters)) for x in (end, half)]
    slow, fast = latency(heads)
    head = max(0.0, (slow - fast) / (net.blocks[-1].filters_out // 2))

    def seconds(other: Architecture) -> float:
        total = whole
        for old, new, slope in zip(net.blocks, other.blocks, slopes, strict=True):
            total -= slope["expand_filters"] * (old.expand_filters - new.expand_filters)
            total -= slope["filters_out"] * (old.filters_out - new.filters_out)
            total -= slope["filters_in"] * (old.filters_in - new.filters_in)
        return total - head * (net.blocks[-1].filters_out - other.blocks[-1].filters_out)

    return seconds


def _saved_per_channel(style: blocks.Style, block: arch.Block, size: tuple[int, int]) -> dict[str, float]:
    """Seconds that a block takes less for each channel less."""

    def model(**widths):
        other = dataclasses.replace(block, **widths)
        x = keras.Input(_shape(style, size, other.filters_in))
        return keras.Model(x, blocks.body(style, x, other, 0.0))

    halves = {name: getattr(block, name) // 2 for name in ("expand_filters", "filters_in", "filters_out")}
    # A residual block's input and output have the same channels.
    names = ("expand_filters", "filters_out") if block.residual else tuple(halves)
    names = tuple(name for name in names if halves[name])
    tied = {"filters_in": halves["filters_in"]} if block.residual else {}
    smaller = [model(**{name: halves[name]} | (tied if name == "filters_out" else {})) for name in names]
    whole, *parts = latency([model(), *smaller])
    gains = {name: max(0.0, (whole - part) / halves[name]) for name, part in zip(names, parts, strict=True)}
    return dict.fromkeys(halves, 0.0) | gains


def _shape(style: blocks.Style, size, channels: int) -> tuple[int, ...]:
    return (*size, channels) if style.data_format == "channels_last" else (channels, *size)


def _style(reading: blocks.Reading) -> blocks.Style:
    conv, norm = reading.layers["stem_conv"], reading.layers["stem_bn"]
    return blocks.Style(
        activation=reading.architecture.activation,
        bn_momentum=norm.momentum,
        bn_epsilon=norm.epsilon,
        data_format=conv.data_format,
        dtype=conv.dtype_policy,
    )


COSTS: dict[str, Callable[..., Callable[[Architecture], float]]] = {
    "macs": partial(_counted, key="macs"),
    "params": partial(_counted, key="params"),
    "latency": _timed,
}


def cost(model: keras.Model, kind: str = "macs", dataset: Any = None) -> float:
    """What a model costs, with the dense layers around the network.

    Args:
        model: See `importance()`.
        kind: `"macs"`, `"params"` or `"latency"`, see `plan()`.
        dataset: Data, for the size of the images where the model takes any. Defaults to None.

    Returns:
        Number.

    Raises:
        ValueError: If the kind is unknown, or the model holds no EfficientNet.

    Example:

    >>> import keras_effnet as ke
    >>> cost(ke.EfficientNetB0(weights=None))
    385814752
    """
    one_of("cost", kind, COSTS)
    _, reading = blocks.find(model)
    return COSTS[kind](model, reading, _size(model, reading, dataset))(reading.architecture)


# The plan


def plan(
    model: keras.Model,
    dataset: Any,
    reduction: float = 0.4,
    cost: str = "macs",
    solver: str = "greedy",
    importance: str | Mapping[str, np.ndarray] = "gradient",
    *,
    floor: float = 0.1,
    divisor: int = 8,
    loss: Any = None,
    batch_size: int = 32,
    verbose: str | int = "auto",
) -> Plan:
    """Chooses the channels of a trained model that stay within a budget: those that matter most for what they cost.

    Args:
        model: A model of this package, or a functional or sequential one that holds one. It stays as it is.
        dataset: See `importance()`. A thousand images will do.
        reduction: Float between 0 and 1, share of the whole model's cost to save. Defaults to 0.4.
        cost: `"macs"` (multiply-adds of one image), `"params"` (trainable), or `"latency"` (measured on this machine
            and backend, for one image; the total is a sum of what single blocks were measured to save).
        solver: `"greedy"`, or `"exact"`, which finds a best choice at the same budget.
        importance: `"gradient"`, `"taylor"` or `"magnitude"`, see `importance()`; or a dict as it returns.
        floor: Float, smallest share of each group of channels that stays; at least one channel does. Defaults to 0.1
            (the published nets keep at least 0.19).
        divisor: Integer, of which the numbers of channels that stay are multiples, as far as the budget can be met
            so. Defaults to 8, the multiples that runtimes compute fastest with (benchmarks/pruning.py); the published
            nets have 1.
        loss: See `importance()`.
        batch_size: Integer, for arrays. Defaults to 32.
        verbose: As in `keras.Model.fit()`.

    Returns:
        A `Plan`. `plan.save(path)` writes it, `apply(model, plan)` carries it out, and
        `create_model(plan.model, blocks=plan)` builds such a net from scratch.

    Raises:
        ValueError: If an argument is not valid, or the floor keeps more than the budget.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> plan = ke.pruning.plan(model, data, reduction=0.4, verbose=0)
    >>> abs(plan.reduction - 0.4) < 0.004
    True

    Reference:
        arXiv 2002.08258, section 3.
    """
    one_of("cost", cost, COSTS)
    one_of("solver", solver, knapsack.SOLVERS)
    for name, share in (("reduction", reduction), ("floor", floor)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"Expected {name} between 0 and 1. Received: {name}={share!r}")
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise ValueError(f"Expected divisor as a positive integer. Received: divisor={divisor!r}")
    kind = importance if isinstance(importance, str) else "given"
    if kind != "given":
        one_of("importance", kind, KINDS)
    _, reading = blocks.find(model)
    net = reading.architecture
    parts = groups(net)
    price = COSTS[cost](model, reading, _size(model, reading, dataset))
    scores = (
        _checked(importance, parts)
        if not isinstance(importance, str)
        else _importance(model, dataset, kind, loss=loss, batch_size=batch_size, verbose=verbose)
    )
    before = price(net)
    target = (1 - reduction) * before
    # A coarse step may miss a small budget: a channel of a chain costs in many layers.
    while True:
        found = _chosen(net, scores, price, target, solver, floor, divisor)
        if found:
            stay, gap = found
            smaller = _with_sizes(net, stay)
            if divisor == 1 or target - price(smaller) <= 0.01 * reduction * before:
                break
        elif divisor == 1:
            lowest = 1 - price(_with_sizes(net, {group: _least(group.size, floor) for group in parts})) / before
            raise ValueError(
                f"Expected reduction of at most {lowest:.3f}, at which a share of {floor} of each group of channels "
                f"stays. Received: reduction={reduction}"
            )
        divisor = max(1, divisor // 2)
    removed = {
        group.name: tuple(np.sort(np.argsort(-scores[group.name], kind="stable")[stay[group] :]).tolist())
        for group in parts
    }
    return Plan(
        model=nearest(net),
        blocks=smaller.widths,
        removed={name: channels for name, channels in removed.items() if channels},
        before=before,
        after=price(smaller),
        asked=reduction,
        cost=cost,
        solver=solver,
        gap=gap,
        importance=kind,
    )


def _chosen(
    net: Architecture, scores, price, target: float, solver: str, floor: float, divisor: int
) -> tuple[dict[Group, int], float] | None:
    """How many channels of each group stay, those of the highest scores, and the solver's gap. None: too many do."""
    parts = groups(net)
    steps = [_steps(group.size, _least(group.size, floor), divisor) for group in parts]
    before = price(net)
    # The saving of one channel, with what the next layers save.
    unit = [before - price(_with_sizes(net, {group: group.size - 1})) if group.size > 1 else 0 for group in parts]
    ranked = [np.append(0, np.cumsum(-np.sort(-scores[group.name]))) for group in parts]
    items = knapsack.Items(
        [np.diff(sums[sizes]) for sums, sizes in zip(ranked, steps, strict=True)],
        [np.diff(sizes) * saving for sizes, saving in zip(steps, unit, strict=True)],
    )

    def sizes_of(counts) -> dict[Group, int]:
        return {group: int(step[count]) for group, step, count in zip(parts, steps, counts, strict=True)}

    def fits(counts) -> bool:
        return price(_with_sizes(net, sizes_of(counts))) <= target

    if not fits([0] * len(parts)):
        return None
    # Savings do not add up, so that the capacity with which the net meets the target is searched for.
    low, high = 0.0, float(np.sum(items.weights))
    for _ in range(50):
        middle = (low + high) / 2
        met = fits(items.counts(knapsack.greedy(items.values, items.weights, middle)))
        low, high = (middle, high) if met else (low, middle)
    counts = items.counts(knapsack.SOLVERS[solver](items.values, items.weights, low))
    counts = items.filled(counts, fits)
    return sizes_of(counts), items.solution(counts).gap


def _least(size: int, floor: float) -> int:
    return max(1, math.ceil(floor * size))


def _steps(size: int, least: int, divisor: int) -> np.ndarray:
    """The numbers of channels that a group may keep: multiples of the divisor, and all of them."""
    divisor = min(divisor, size)
    lowest = -(-least // divisor) * divisor
    return np.unique(np.append(np.arange(min(lowest, size), size, divisor), size))


_importance = importance  # the argument of the same name hides it


def _checked(scores: Mapping[str, np.ndarray], parts: tuple[Group, ...]) -> dict[str, np.ndarray]:
    found = {name: np.asarray(values, float) for name, values in scores.items()}
    for group in parts:
        values = found.get(group.name)
        if values is None or values.shape != (group.size,) or not np.isfinite(values).all() or (values < 0).any():
            shape = None if values is None else values.shape
            raise ValueError(
                f"Expected importance of {group.name} as {group.size} finite numbers of at least 0. Received: {shape}"
            )
    return found

"""The cost of a model: multiply-adds, parameters or measured latency."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.errors import one_of
from keras_effnet.nets import architecture, blocks, inspection
from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.params_and_macs import costs
from keras_effnet.nets.variants import VARIANTS, nearest
from keras_effnet.pruning.data_and_loss import first

Price = Callable[[Architecture], float]  # cost of a network with other widths


def cost(model: keras.Model, kind: str = "macs", dataset: Any = None) -> float:
    """Returns the cost of a model, including the layers around the network.

    Args:
        model: See `importance()`.
        kind: `"macs"`, `"params"` or `"latency"`. See `plan()`. Defaults to `"macs"`.
        dataset: Data to take the image size from, if the model accepts any size. Defaults to None.

    Returns:
        Number: multiply-adds, parameters or seconds.

    Raises:
        ValueError: If the kind is unknown, or the model contains no EfficientNet.

    Example:

    >>> import keras_effnet as ke
    >>> cost(ke.EfficientNetB0(weights=None))
    385814752
    """
    one_of("cost", kind, COSTS)
    _, reading = inspection.find(model)
    return COSTS[kind](model, reading, image_size(model, reading, dataset))(reading.architecture)


def image_size(model: keras.Model, reading: inspection.Reading, dataset) -> tuple[int, int]:
    """Returns the size of the images: the model's input size, else that of the data.

    Args:
        model: A model.
        reading: The `Reading` of the network in it.
        dataset: See `importance()`, or None.

    Returns:
        Tuple of height and width.

    Raises:
        ValueError: If neither is known.
    """
    channels_last = reading.layers["stem_conv"].data_format == "channels_last"
    shapes = [model.input_shape, () if dataset is None else first(dataset)[0].shape]
    for shape in shapes:
        size = tuple(shape[1:3] if channels_last else shape[2:4])
        if len(size) == 2 and None not in size:
            return size
    raise ValueError(
        f"Expected a model with a known input size, or a dataset. Received: {model.name!r} with input shape "
        f"{model.input_shape}"
    )


def latency(models: Sequence[keras.Model], batch_size: int = 1, rounds: int = 20, size=None) -> list[float]:
    """Measures how long models take to predict a batch. The models take turns.

    Args:
        models: Sequence of models with one input.
        batch_size: Integer, images per batch. Defaults to 1.
        rounds: Integer, measurements per model. Defaults to 20.
        size: Tuple of height and width, for models that accept any size. Defaults to None.

    Returns:
        List of the median seconds of each model.

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
    """Returns the shape of one input image of a model.

    Args:
        model: A model with one input that contains an EfficientNet.
        size: Tuple of height and width, for a model that accepts any size. Defaults to None: the size of the nearest
            variant.

    Returns:
        Tuple of integers.
    """
    shape = tuple(model.input_shape[1:])
    if None not in shape:
        return shape
    if size is None:
        variant = nearest(inspection.find(model)[1].architecture)
        side = VARIANTS[variant].resolution if variant else 224
        size = side, side
    places = [place for place, side in enumerate(shape) if side is None]
    found = list(shape)
    for place, side in zip(places, size[2 - len(places) :], strict=True):
        found[place] = side
    return tuple(found)


def timed(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Measures functions that take turns, after two calls each to warm up.

    Args:
        runs: Sequence of functions without arguments.
        rounds: Integer, measurements per function.

    Returns:
        List of the median seconds of each function.
    """
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


def _counted(model, reading: inspection.Reading, size, key: str) -> Price:
    """Returns a function that counts the cost of the model with other widths."""
    around = _around(model, reading)[key]
    return lambda net: costs(net, size, reading.channels, reading.classes)[key] + around


def _around(model: keras.Model, reading: inspection.Reading) -> dict[str, int]:
    """Returns the cost of the user's layers around the network."""
    ours = {id(layer) for layer in reading.layers.values()}
    macs = params = 0
    for layer in compat.all_layers(model):
        if isinstance(layer, keras.Model) or id(layer) in ours:
            continue
        no_parameters = {"moving_mean", "moving_variance", "mean", "variance", "count"}
        params += sum(math.prod(weight.shape) for weight in layer.weights if weight.name not in no_parameters)
        kernel = getattr(layer, "kernel", None)
        if kernel is not None:
            outputs = math.prod(side or 1 for side in layer.output.shape[1:])
            macs += outputs // getattr(layer, "filters", kernel.shape[-1]) * math.prod(kernel.shape)
    return {"macs": macs, "params": params}


def _timed(model, reading: inspection.Reading, size) -> Price:
    """Returns a function that estimates the seconds for one image with other widths.

    The estimate is the time of the whole model, minus the saving measured for each removed channel. Each kind of block
    is measured whole, and with half of its inner, input or output channels. This assumes that time is linear in
    between, and that the savings of blocks add up.
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


def _saved_per_channel(style: blocks.Style, block: architecture.Block, size: tuple[int, int]) -> dict[str, float]:
    """Returns the seconds that a block saves per removed channel, by the name of the width."""

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
    """Returns the shape of one image in the data format of a style."""
    return (*size, channels) if style.data_format == "channels_last" else (channels, *size)


def _style(reading: inspection.Reading) -> blocks.Style:
    """Returns the style to build single blocks like those of a model."""
    conv, norm = reading.layers["stem_conv"], reading.layers["stem_bn"]
    return blocks.Style(
        activation=reading.architecture.activation,
        bn_momentum=norm.momentum,
        bn_epsilon=norm.epsilon,
        data_format=conv.data_format,
        dtype=conv.dtype_policy,
        padding=reading.architecture.padding,
        depthwise_name=reading.architecture.depthwise_name,
    )


COSTS: dict[str, Callable[..., Price]] = {
    "macs": partial(_counted, key="macs"),
    "params": partial(_counted, key="params"),
    "latency": _timed,
}

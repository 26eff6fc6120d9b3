"""Cuts channels out of a model: the smaller net with the remaining weights."""

import os
from typing import Any

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.errors import unknown
from keras_effnet.nets import initializers, inspection
from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.pruning_plan import Plan
from keras_effnet.pruning.groups import CHANNELS, groups, with_sizes

# The smaller model


def copied(model: keras.Model, holder: keras.Model, configs: dict[str, dict], cut=lambda layer, weights: weights):
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
            if isinstance(layer, keras.Sequential) or compat.is_functional(layer):  # a graph of layers
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
        compat.mark_called(clone)
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
    holder, reading = inspection.find(model)
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
    smaller = with_sizes(architecture, sizes)
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

    smaller_model = copied(model, holder, configs, cut)
    for whole, part in ((model, smaller_model), (holder, inspection.find(smaller_model)[0])):
        if hasattr(whole, "weights_record"):  # whose photographs it expects
            part.weights_record = whole.weights_record
    return smaller_model


def _cuts(reading: inspection.Reading, kept: dict, smaller: Architecture) -> tuple[dict[int, tuple], dict[str, dict]]:
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
        for name, (come, go) in CHANNELS.items():
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

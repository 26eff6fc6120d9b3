"""Cuts channels out of a model and keeps the remaining weights."""

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


def copied(model: keras.Model, holder: keras.Model, configs: dict[str, dict], cut=lambda layer, weights: weights):
    """Copies a model, with new layers, some of which may have other widths.

    Args:
        model: A functional or sequential model.
        holder: The model whose layers `configs` changes: `model`, or a model nested in it.
        configs: Dict from a layer's name to the changed entries of its configuration.
        cut: Function of a layer and the list of its weights as arrays, which returns the arrays of the new layer.
            Defaults to a function that returns them unchanged.

    Returns:
        A `keras.Model` of the same structure, not compiled.
    """
    pairs: list[tuple[Any, Any]] = []

    def new(inside: keras.Model):
        def layer_of(layer):
            if isinstance(layer, keras.Sequential) or compat.is_functional(layer):
                return new(layer)
            config = layer.get_config() | (configs.get(layer.name, {}) if inside is holder else {})
            fresh = layer.__class__.from_config(config)
            if isinstance(layer, keras.Layer):  # bare operations, such as `keras.ops.relu`, have no weights
                pairs.append((layer, fresh))
            return fresh

        def call(layer, *args, **kwargs):
            if kwargs or len(args) != 1 or isinstance(layer, keras.Model):
                return layer(*args, **kwargs)
            return initializers.apply(layer, args[0])

        calls: Any = {} if isinstance(inside, keras.Sequential) else {"call_function": call}
        # Keras would compile the copy too, and fail if it cannot look up a custom loss by name.
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
        if hasattr(fresh, "finalize_state"):  # Normalization computes with copies of its weights
            fresh.finalize_state()
    return copy


def apply(model: keras.Model, plan: "Plan | str | os.PathLike") -> keras.Model:
    """Returns a smaller model: without the channels that a plan removes, with the weights of the others.

    It computes what the whole model computes with those channels set to zero.

    Args:
        model: The model that the plan was made for, or one with the same layers. It stays unchanged.
        plan: A `Plan`, or the path of its file.

    Returns:
        A `keras.Model` of the same structure, not compiled. Custom layers around the network are kept. It can be
        trained, saved and exported like any other model.

    Raises:
        OSError: If the plan's file cannot be read.
        ValueError: If the plan was made for another network.

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
    kept = _kept_channels(reading.architecture, plan)
    _check_widths(model, reading.architecture, plan)
    by_layer, configs = _cuts(reading, kept)

    def cut(layer, values: list[np.ndarray]) -> list[np.ndarray]:
        arriving, leaving = by_layer.get(id(layer), (None, None))
        for place, value in enumerate(values):
            if arriving is not None and value.ndim > 1:
                value = value.take(arriving, -2)
            values[place] = value if leaving is None else value.take(leaving, -1)
        return values

    smaller_model = copied(model, holder, configs, cut)
    for whole, part in ((model, smaller_model), (holder, inspection.find(smaller_model)[0])):
        if hasattr(whole, "weights_record"):  # says how to crop and resize photos
            part.weights_record = whole.weights_record
    return smaller_model


def _kept_channels(architecture: Architecture, plan: Plan) -> dict[tuple[int, str], np.ndarray]:
    """Returns the channels that a plan keeps, by index of the block and name of the width.

    Raises a `ValueError` if the plan removes a channel that does not exist, or all channels of a group.
    """
    parts = {group.name: group for group in groups(architecture)}
    kept: dict[tuple[int, str], np.ndarray] = {}
    for name, channels in plan.removed.items():
        if name not in parts:
            raise unknown("group of channels", name, parts)
        group = parts[name]
        wrong = [channel for channel in channels if not 0 <= channel < group.size]
        if wrong or len(set(channels)) >= group.size:
            raise ValueError(
                f"Expected the plan to remove fewer than {group.size} channels of {name}, counted from 0. Received: "
                f"{len(set(channels))} channels, from {min(channels)} to {max(channels)}"
            )
        for index in group.blocks:
            kept[index, group.width] = np.setdiff1d(np.arange(group.size), channels)
    return kept


def _check_widths(model: keras.Model, architecture: Architecture, plan: Plan) -> None:
    """Raises a `ValueError` if the channels that a plan keeps are not those that it leaves of this network."""
    sizes = {group: group.size - len(set(plan.removed.get(group.name, ()))) for group in groups(architecture)}
    widths = with_sizes(architecture, sizes).widths
    if widths == plan.blocks:
        return
    wrong = [name for name, row in widths.items() if plan.blocks.get(name) != row]
    name = wrong[0] if wrong else next(name for name in plan.blocks if name not in widths)
    raise ValueError(
        f"Expected a plan made for {model.name!r}, whose block {name} keeps {widths.get(name)} channels (expand, se, "
        f"out) after the removal. Received: {plan.blocks.get(name)}, in a plan for {plan.model or 'another model'}"
    )


def _cuts(reading: inspection.Reading, kept: dict) -> tuple[dict[int, tuple], dict[str, dict]]:
    """Returns what changes in each layer.

    Args:
        reading: The `Reading` of the whole model.
        kept: See `_kept_channels()`.

    Returns:
        Tuple of two dicts: from the id of a layer to the input and output channels that it keeps, None for all; and
        from the name of a layer to the changed entries of its configuration.
    """
    by_layer: dict[int, tuple] = {}
    configs: dict[str, dict] = {}
    arriving = None
    for index, block in enumerate(reading.architecture.blocks):
        tensors: dict[str, Any] = {"": None, "arriving": arriving}
        for width in ("expand_filters", "se_filters", "filters_out"):
            tensors[width] = kept.get((index, width))
        if not block.expand_filters:
            tensors["expand_filters"] = arriving
        for name, (come, go) in CHANNELS.items():
            layer = reading.layers.get(f"block{block.name}_{name}")
            if layer is None:
                continue
            _check_variables(layer)
            by_layer[id(layer)] = tensors[come], tensors[go]
            if tensors[go] is None:
                continue
            if hasattr(layer, "filters"):
                configs[layer.name] = {"filters": len(tensors[go])}
            if hasattr(layer, "target_shape"):
                shape = (size if size in (-1, 1) else len(tensors[go]) for size in layer.target_shape)
                configs[layer.name] = {"target_shape": tuple(shape)}
        arriving = tensors["filters_out"]
    by_layer[id(reading.layers["top_conv"])] = arriving, None
    return by_layer, configs


def _check_variables(layer) -> None:
    """Raises a `ValueError` if a layer has other variables than those it was built with, as after quantization."""
    known = {"kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"}
    quantized = any("int" in str(weight.dtype) for weight in layer.weights)
    if quantized or not {weight.name for weight in layer.weights} <= known:
        kinds = ", ".join(f"{weight.name} ({weight.dtype})" for weight in layer.weights)
        raise ValueError(f"Expected layers as built. Received: {layer.name} with {kinds}, as in a quantized model")

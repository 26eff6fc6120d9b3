"""The layers of a net that own variables, with the shape of each variable. Standard library only."""

from typing import NamedTuple

from keras_effnet.nets.architecture import Architecture


class Layer(NamedTuple):
    """A layer that owns variables.

    Args:
        kind: Name of the Keras layer's class.
        shapes: Dict from variable name to shape, in Keras' order.
    """

    kind: str
    shapes: dict[str, tuple[int, ...]]


def owners(architecture: Architecture, channels: int = 3, classes: int | None = 1000) -> dict[str, Layer]:
    """Returns the layers that own variables, in the model's order. A weights file has to contain all of them.

    Args:
        architecture: An `Architecture`.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.

    Returns:
        Dict from layer name, as in keras.applications, to `Layer`.

    Example:

    >>> from keras_effnet.nets.scaling import resolve
    >>> from keras_effnet.nets.variants import VARIANTS
    >>> owners(resolve(VARIANTS["efficientnet-b0"]))["block1a_dwconv"].shapes
    {'kernel': (3, 3, 32, 1)}
    """
    found: dict[str, Layer] = {}

    def kernels(name: str, kind: str, shape: tuple[int, ...], experts: int, **biases: tuple[int, ...]) -> None:
        kind, shape = (kind.replace("Conv", "CondConv"), (experts, *shape)) if experts else (kind, shape)
        found[name] = Layer(kind, {"kernel": shape, **biases})

    def conv(name: str, size: int, filters_in: int, filters: int, norm: str = "", experts: int = 0) -> None:
        biases: dict[str, tuple[int, ...]] = {} if norm else {"bias": (filters,)}
        kernels(name, "Conv2D", (size, size, filters_in, filters), experts, **biases)
        if norm:
            batch_norm(norm, filters)

    def batch_norm(name: str, filters: int) -> None:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        found[name] = Layer("BatchNormalization", dict.fromkeys(names, (filters,)))

    conv("stem_conv", 3, channels, architecture.stem_filters, norm="stem_bn")
    for block in architecture.blocks:
        start, inside, experts = f"block{block.name}_", block.inner_filters, block.num_experts
        arriving = block.filters_in
        if experts:
            found[f"{start}routing"] = Layer("Dense", {"kernel": (arriving, experts), "bias": (experts,)})
        if block.space_to_depth:
            conv(f"{start}s2d_conv", 2, arriving, inside, norm=f"{start}s2d_bn")
            arriving = inside
        if block.expand_filters:
            size = block.kernel_size if block.operator == "fused" else 1
            conv(f"{start}expand_conv", size, arriving, inside, norm=f"{start}expand_bn", experts=experts)
        if block.operator == "mbconv":
            shape = (block.kernel_size, block.kernel_size, inside, 1)
            kernels(start + architecture.depthwise_name, "DepthwiseConv2D", shape, experts)
            batch_norm(f"{start}bn", inside)
        if block.se_filters:
            if block.global_context:
                conv(f"{start}se_share", 1, inside, 1)
            conv(f"{start}se_reduce", 1, inside, block.se_filters)
            if block.global_context:
                found[f"{start}se_norm"] = Layer(
                    "LayerNormalization", dict.fromkeys(("gamma", "beta"), (block.se_filters,))
                )
            conv(f"{start}se_expand", 1, block.se_filters, inside)
        size = block.kernel_size if block.operator == "conv" else 1
        conv(f"{start}project_conv", size, inside, block.filters_out, norm=f"{start}project_bn", experts=experts)
    filters = architecture.head_filters
    conv("top_conv", 1, architecture.blocks[-1].filters_out, filters, norm="top_bn")
    if classes is not None:
        found["predictions"] = Layer("Dense", {"kernel": (filters, classes), "bias": (classes,)})
    return found

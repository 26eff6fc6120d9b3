"""Says where a net of keras.applications pads otherwise than this package: its layers pad by a rule that was fixed."""

from typing import Any, NamedTuple


class Padded(NamedTuple):
    """A layer that pads for a convolution with a stride of 2.

    Args:
        name: String. The layer's name.
        padding: Tuple of two pairs: zeros before and after, for height and width.
        kernel_size: Integer. Of the convolution.
    """

    name: str
    padding: tuple[tuple[int, int], tuple[int, int]]
    kernel_size: int


def difference(config: Any, resolution: int) -> str:
    """Returns where the maps of a net have other zeros around them than those of this package, in words.

    This package pads as TensorFlow does: (1, 1) for a kernel of 3 at odd sizes, (0, 1) at even ones. keras.applications
    pads by the size that the net was built for, and as at even sizes if that was open.

    Args:
        config: The config of a model of Keras 2, with the net in it.
        resolution: Integer. The size to compare at, in pixels, where the file leaves it open.

    Returns:
        String, empty where both agree.

    Reference:
        keras/src/applications/imagenet_utils.py, `correct_pad()`.
    """
    try:
        return _difference(config, resolution)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):  # a damaged config
        return ""


def _difference(config: Any, resolution: int) -> str:
    sizes, padded = _read(config, [])
    fixed = [[side for side in each if side is not None] for each in reversed(sizes)]
    size = next((each for each in fixed if len(each) == 2), [resolution] * 2)
    start = " x ".join(map(str, size))
    for layer in padded:
        ours = [_same(side, layer.kernel_size) for side in size]
        if ours != list(layer.padding):
            theirs = [_out(side, sum(pad), layer.kernel_size) for side, pad in zip(size, layer.padding, strict=True)]
            own = [-(-side // 2) for side in size]
            return (
                f"the padding of {layer.name[:80]}: at {start} pixels it pads {layer.padding[0]}, for a map of "
                f"{theirs[0]} x {theirs[1]}. This package pads {ours[0]}, for {own[0]} x {own[1]}, so outputs differ"
            )
        size = [-(-side // 2) for side in size]
    return ""


def _same(size: int, kernel: int) -> tuple[int, int]:
    total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
    return total // 2, total - total // 2


def _out(size: int, padding: int, kernel: int) -> int:
    return (size + padding - kernel) // 2 + 1


def _read(config: Any, sizes: list[list[int | None]]) -> tuple[list[list[int | None]], list[Padded]]:
    """Returns the input sizes of a model and of the net in it, and the net's layers that pad, in their order."""
    layers = config.get("layers", []) if isinstance(config, dict) else config
    entries = [(entry.get("class_name"), entry.get("config")) for entry in layers if isinstance(entry, dict)]
    found: list[Padded] = []
    inner: list[Any] = []
    waiting = None
    for kind, one in entries:
        if not isinstance(one, dict):
            if kind == "Sequential":
                inner.append(one)
            continue
        shape = one.get("batch_input_shape") or one.get("batch_shape")
        if isinstance(shape, list | tuple) and len(shape) == 4:
            channels_first = shape[1] in (1, 3) and shape[3] not in (1, 3)
            sizes = [*sizes, list(shape[2:] if channels_first else shape[1:3])]
        if isinstance(one.get("layers"), list):
            inner.append(one)
        elif kind == "ZeroPadding2D" and str(one.get("name", "")).endswith("_pad"):
            waiting = one
        elif waiting is not None and kind in ("Conv2D", "DepthwiseConv2D"):
            (top, bottom), (left, right) = waiting["padding"]
            found.append(Padded(str(one.get("name")), ((top, bottom), (left, right)), one["kernel_size"][0]))
            waiting = None
    if found:
        return sizes, found
    for one in inner:
        deeper, found = _read(one, sizes)
        if found:
            return deeper, found
    return sizes, []

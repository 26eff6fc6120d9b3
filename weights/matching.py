"""Compares the tensors of a file with a net, and names those that are missing, unexpected or wrong."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import numpy as np

from keras_effnet.errors import one_line
from keras_effnet.nets import weight_shapes
from keras_effnet.nets.architecture import Architecture, with_widths
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.weights import presets
from keras_effnet.weights.formats import h5_file, keras_file, tensorflow_checkpoint
from keras_effnet.weights.formats.tensors import Stored, Tensors
from keras_effnet.weights.layouts import LAYOUTS, adapt_channels
from keras_effnet.weights.name_translation import Name, foreign_names, has_names, keys_of
from keras_effnet.weights.naming_tables import NAMINGS, Naming

SOURCES = {"tpu": ("tpu",), "timm": ("timm",), "lukemelas": ("lukemelas",), "keras": ("keras", "kecam", "keras3")}

NO_TOP = "the classifier: the model has none"

AROUND = "layers around the net"

SHOWN = 3  # problems that an error names

_UP = "../"  # before the name of a tensor outside of the net's scope that would be taken for one of the net

Values = dict[tuple[str, str], np.ndarray]  # by (our layer, our variable)

Plan = dict[tuple[str, str], Callable[[], np.ndarray]]  # by (our layer, our variable)

Step = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # of an array and our shape


@dataclass(frozen=True, repr=False)
class Report:
    """What a file contains for a model. Its `repr()` is one line.

    Args:
        path: String. The file.
        format: Key of `naming_tables.NAMINGS`.
        loaded: Tuple of our variables (`layer/variable`) that the file fills.
        not_loaded: Tuple of our variables that are left unchanged because the caller asked for it.
        ignored: Dict from a reason to the number of tensors in the file that are not needed for that reason.
        problems: Tuple of strings: tensors that are missing (-), unexpected (+) or wrong (!).
        classes: Integer, classes of the file's classifier, or None.
        model: Name of the model whose tensors the file contains, as found by `verify()`, or None.
    """

    path: str
    format: str
    loaded: tuple[str, ...]
    not_loaded: tuple[str, ...]
    ignored: dict[str, int]
    problems: tuple[str, ...]
    classes: int | None
    model: str | None = None

    # What only `repr()` needs is not a field, since `verify --json` prints all fields.
    _call: ClassVar[str] = "verify"
    _target: ClassVar[str] = "the model"

    @property
    def fits(self) -> bool:
        """Whether the file fills all variables of the model, and nothing is left over."""
        return not self.problems

    def named(self, call: str, target: str) -> "Report":
        """Returns the same report, whose `repr()` names a call and a model.

        Args:
            call: `"load"` or `"verify"`.
            target: String. The model's name.

        Returns:
            A `Report`.
        """
        report = replace(self)
        object.__setattr__(report, "_call", call)
        object.__setattr__(report, "_target", target)
        return report

    def __repr__(self) -> str:
        if self.problems:
            signs = Counter(problem[0] for problem in self.problems)
            kinds = {"-": "missing", "+": "unexpected", "!": "wrong"}
            counts = ", ".join(f"{signs[sign]} {kind}" for sign, kind in kinds.items() if signs[sign])
            other = f"; it contains {self.model}" if self.model else ""
            return f"a {self.format} file does not fit {self._target}: {counts}{other}"
        needed = len(self.loaded) + len(self.not_loaded)
        tensors = f"{len(self.loaded)} of {needed} tensors of a {self.format} file"
        part = " (all but the classifier)" if self.not_loaded else ""
        if self._call == "load":
            return f"loaded {tensors} into {self._target}{part}"
        return f"{tensors} fit {self._target}{part}"


def _recognise(tensors: Tensors, path) -> tuple[str, str]:
    """Returns the key of a file's naming, and the prefix of all its names."""
    for key, naming in NAMINGS.items():
        # One prefix, such as the model's name or a wrapper's. It ends at a separator, so that "conv_stem" is not found
        # in "_conv_stem".
        marks = (naming.mark, naming.mark + naming.average) if naming.average else (naming.mark,)
        pattern = rf"(|.*[/.])({'|'.join(map(re.escape, marks))})"
        names = (_respelled(name, naming) for name in tensors)
        scopes = {match[1] for name in names if (match := re.fullmatch(pattern, name))}
        if len(scopes) > 1:
            shown = ", ".join(map(repr, sorted(scopes)[:5]))
            raise ValueError(f"Expected one net. Received: {str(path)!r}, which holds {len(scopes)}: {shown}")
        if scopes:
            return key, scopes.pop()
    marks = ", ".join(f"{key} ({naming.mark})" for key, naming in NAMINGS.items())
    shown = one_line(", ".join(list(tensors)[:3]) or "no tensor", 150)
    raise ValueError(f"Expected the names of an EfficientNet: {marks}. Received: {str(path)!r} with {shown}")


def _respelled(name: str, naming: Naming) -> str:
    for rule, usual in naming.spellings.items():
        name = re.sub(rule, usual, name)
    return name


def _before_last(name: str) -> str:
    """Returns the name of the layer that a tensor belongs to."""
    return re.split(r"[./](?=[^./]*$)", name)[0]


class Contents:
    """The tensors of a file by their names, without the prefix and the suffix that all names share.

    Args:
        tensors: Dict from name to `Stored`.
        path: Path of the file.
        source: See `convert.load()`.
        raw: See `convert.load()`.

    Raises:
        ValueError: If the names are not those of one EfficientNet, or not of `source`.
    """

    def __init__(self, tensors: Tensors, path, source: str, raw: bool):
        self.path = str(path)
        self._all = tensors
        self.format, self.scope = _recognise(tensors, path)
        self.naming = NAMINGS[self.format]
        self.title = self._title()
        # Keras 3 numbers layers by their class, so that a user's dense layer has the name of the net's classifier. That
        # of keras-hub is the classifier.
        preset = presets.read(path) if self.format == "keras3" else None
        self._is_numbered = self.format == "keras3" and not (preset and preset.head)
        if source != "auto" and self.format not in SOURCES[source]:
            raise ValueError(f"Expected {NAMINGS[source].title}. Received: {self.path!r}, which is {self.title}")
        self.ignored: Counter[str] = Counter()
        self._outside: set[str] = set()  # names that do not start with the scope
        self._called: dict[str, str] = {}  # names in the file of tensors that have a usual name
        found: Tensors = {}
        suffix = self.naming.average
        self.suffix = suffix if suffix and not raw and any(name.endswith(suffix) for name in tensors) else ""
        for name, stored in tensors.items():
            inside = name.startswith(self.scope)
            inner = name.removeprefix(self.scope) if inside else name
            reason = self._why_ignored(name, inner, tensors)
            if not inside:
                inner = self._name_outside(name)
                self._outside.add(inner)
            if reason is not None:
                self.ignored[reason] += 1
            elif self.suffix and not name.endswith(suffix):
                found[f"{inner} "] = stored  # a name that no variable has
            else:
                found[inner.removesuffix(self.suffix)] = stored
        found = self._spelled(self._unwrapped(found))
        keys = keys_of(found, self.naming)
        self.tensors: Tensors = {keys[name]: stored for name, stored in found.items()}
        self._names = {key: name for name, key in keys.items()}

    def _title(self) -> str:
        """Returns how users know a file of this kind."""
        if not self.naming.checkpoint or h5_file.is_h5(self.path):
            return self.naming.title
        if keras_file.is_keras(self.path):
            return NAMINGS["keras3"].title  # though its layers have their names, as in some files of Keras 2
        is_checkpoint = tensorflow_checkpoint.is_checkpoint(self.path)
        return self.naming.checkpoint if is_checkpoint else self.naming.title

    def _name_outside(self, name: str) -> str:
        """Returns a name for a tensor outside of the scope, which no tensor inside has."""
        return f"{_UP}{name}" if self._is_numbered or f"{self.scope}{name}" in self._all else name

    def _unwrapped(self, found: Tensors) -> Tensors:
        """Returns the tensors with the classifier's usual name, where it is the only layer with weights of a sequence.

        Torchvision's classifiers are a dropout and a linear layer.
        """
        if not self.naming.owns_classifier:
            return found
        usual, suffixes = self.naming.layers["predictions"], self.naming.variables["Dense"]
        (kernel, _), (bias, _) = suffixes["kernel"], suffixes["bias"]
        inside = {name: stored.shape for name, stored in found.items() if name.startswith(f"{usual}.")}
        owner = next(iter(inside), "").rpartition(".")[0]
        shapes = inside.get(owner + kernel, ()), inside.get(owner + bias, ())
        is_one = re.fullmatch(rf"{usual}\.\d+", owner) and inside.keys() == {owner + kernel, owner + bias}
        if not is_one or len(shapes[0]) != 2 or shapes[0][:1] != shapes[1]:
            return found
        names = {name: usual + name.removeprefix(owner) for name in inside}
        self._called |= {new: old for old, new in names.items()}
        return {names.get(name, name): stored for name, stored in found.items()}

    def _spelled(self, found: Tensors) -> Tensors:
        """Returns the tensors by their usual names."""
        for rule, usual in self.naming.spellings.items():
            names = {name: re.sub(rule, usual, name) for name in found}
            # A name that is taken already stays as it is.
            names = {old: new if new == old or new not in found else old for old, new in names.items()}
            self._called |= {new: self._called.get(old, old) for old, new in names.items() if new != old}
            found = {names[name]: stored for name, stored in found.items()}
        return found

    def is_around(self, key: str) -> bool:
        """Returns whether a tensor belongs to a layer around the net.

        Args:
            key: String. See `Name.key`.
        """
        name, members = self._names[key], self.naming.members
        return name.startswith(_UP) or (bool(members) and not re.match(members, name))

    def top(self, architecture: Architecture) -> int | None:
        """Returns the classes of the file's classifier, where it is known to be the net's.

        Args:
            architecture: An `Architecture`.

        Returns:
            Integer, or None: there is none, or a part of it is missing, or it has not the features of the net, or other
            layers may be between it and the net.
        """
        usual = self._usual(architecture)
        parts = (usual + suffix for suffix, _ in self.naming.variables["Dense"].values())
        inside = not any(self._called.get(name, name) in self._outside for name in parts)
        sure = (self.naming.owns_classifier and inside) or not any(map(self.is_around, self.tensors))
        return self._heads(architecture).get(usual) if sure else None

    def left(self, architecture: Architecture, classes: int | None) -> tuple[str, ...]:
        """Returns what of the file a net of its own cannot take, in words.

        Args:
            architecture: An `Architecture`.
            classes: Integer, classes of a new classifier, or None without one.
        """
        usual = None if self.top(architecture) else self._usual(architecture)
        around = [key for key in self.tensors if self.is_around(key) or self._owner(key) == usual]
        owners = list(dict.fromkeys(self._owner(key) for key in around))
        heads = self._heads(architecture)
        said = []
        taken = [owner for owner, found in heads.items() if found == classes]
        others = [owner for owner in owners if classes is None or taken != [owner]]
        if others:
            hint = "" if classes or {*heads} != {*others} else self._hint([*heads.values()])
            shown = ", ".join(self._called_owner(owner) for owner in others[:5])
            said.append(f"{shown}{' ...' if len(others) > 5 else ''}: {AROUND}{hint}")
        if classes and len(taken) != 1:
            said.append(f"a classifier of {classes} classes: the file has {len(taken)}. The new one is of zeros")
        return tuple(said)

    @staticmethod
    def _hint(classes: list[int]) -> str:
        """Returns the option that keeps a head: none where several have as many classes."""
        options = [f"--head linear:{count}" for count in classes if classes.count(count) == 1]
        return f". To keep {'it' if len(classes) == 1 else 'one'}: {' or '.join(options)}" if options else ""

    def _owner(self, key: str) -> str:
        return _before_last(self._names[key])

    def _called_owner(self, owner: str) -> str:
        """Returns the name of a layer in the file."""
        kernel = owner + self.naming.variables["Dense"]["kernel"][0]
        return _before_last(self._called[kernel]) if kernel in self._called else owner.removeprefix(_UP)

    def _usual(self, architecture: Architecture) -> str:
        """Returns the name that the classifier of the net has."""
        kernel, _ = self.naming.variables["Dense"]["kernel"]
        return foreign_names(architecture, self.naming)["predictions", "kernel"].foreign.removesuffix(kernel)

    def _heads(self, architecture: Architecture) -> dict[str, int]:
        """Returns the layers that can be a classifier on the pooled features, with their classes."""
        kernel, layout = self.naming.variables["Dense"]["kernel"]
        bias, _ = self.naming.variables["Dense"]["bias"]
        usual, found = self._usual(architecture), {}
        for key in self.tensors:
            owner = self._owner(key)
            if self._names[key] != owner + kernel or not (self.is_around(key) or owner == usual):
                continue
            shape = self.tensors[key].shape
            if len(shape) != 2:
                continue
            features, classes = shape if layout == "keep" else shape[::-1]
            other = self.tensors.get(owner + bias)
            if features == architecture.head_filters and other is not None and other.shape == (classes,):
                found[owner] = classes
        return found

    def classifier(self, architecture: Architecture, classes: int) -> Values:
        """Reads the only layer of a file that can be a classifier of so many classes, or returns one of zeros.

        Args:
            architecture: An `Architecture`.
            classes: Integer.

        Returns:
            Dict of the classifier's kernel and bias, by (our layer, our variable).
        """
        owners = [owner for owner, found in self._heads(architecture).items() if found == classes]
        whose = f"{self.path!r}, whose {self._called_owner(owners[0])}" if len(owners) == 1 else ""
        shapes = {"kernel": (architecture.head_filters, classes), "bias": (classes,)}
        values: Values = {}
        for variable, shape in shapes.items():
            suffix, layout = self.naming.variables["Dense"][variable]
            value = np.zeros(shape, np.float32)
            if len(owners) == 1:
                stored = self.tensors[owners[0] + suffix].read()
                _check_floats(stored, f"{whose} has ")
                value = LAYOUTS[layout].to_keras(stored, shape).astype(np.float32, copy=False)
            if not np.isfinite(value).all():
                raise ValueError(f"Expected finite numbers. Received: {whose} has others")
            values["predictions", variable] = value
        return values

    def normalization(self, version: str | None) -> tuple[list[float], list[float]] | None:
        """Returns the scale and offset of pixels that the statistics in a file of keras.applications amount to.

        Args:
            version: String, the version of Keras that wrote the file, or None if it is not known.

        Returns:
            Tuple of two lists, or None where the file has no statistics.

        Reference:
            keras/src/applications/efficientnet.py. Until 2.8, the weights' variance was a standard deviation in truth;
            2.9 and later divide by its root once more.
        """
        owner = rf"{re.escape(self.scope)}normalization(_\d+)?"
        found = [
            [stored for name, stored in self._all.items() if re.fullmatch(f"{owner}/{part}", name)]
            for part in (("0", "1") if self.format == "keras3" else ("mean", "variance"))
        ]
        if self.format not in ("keras", "keras3") or [len(each) for each in found] != [1, 1]:
            return None
        mean, variance = (np.ravel(stored.read()).astype(np.float64) for (stored,) in found)
        scale, offset = 1 / (255 * np.sqrt(variance)), -mean / np.sqrt(variance)
        deviation = (0.229, 0.224, 0.225)
        late = version is None or tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 9)
        if late and variance.shape == (3,) and np.allclose(variance, deviation, rtol=1e-5):
            scale, offset = scale / np.sqrt(deviation), offset / np.sqrt(deviation)
        return scale.tolist(), offset.tolist()

    def _why_ignored(self, name: str, inner: str, tensors: Tensors) -> str | None:
        average = self.naming.average
        for rule, why in self.naming.ignored.items():
            if re.search(rule, inner):
                return why
        if average and self.suffix != average and name.endswith(average):
            return "the moving averages, since raw weights are requested"
        if self.suffix and f"{name}{average}" in tensors:
            return "the raw weights, since the file has their moving averages"
        return None

    def told(self, key: str, usual: str = "") -> str:
        """Returns a tensor's name in the file.

        Args:
            key: String. See `Name.key`.
            usual: String. The usual name, returned where the file lacks the tensor, with * for a number that may vary.

        Returns:
            String.
        """
        name = self._names.get(key, usual)
        name = self._called.get(name, name)
        if name in self._outside:
            return name.removeprefix(_UP)
        if key not in self._names and self.naming.ranked:
            name = re.sub(self.naming.ranked, r"\g<owner>*", usual)
        return f"{self.scope}{name[:-1]}" if name.endswith(" ") else f"{self.scope}{name}{self.suffix}"

    def shape_of(self, architecture: Architecture, layer: str, variable: str) -> tuple[int, ...] | None:
        """Returns the shape that one of our variables has in the file, or None where the file lacks it.

        Args:
            architecture: An `Architecture`.
            layer: String. Our layer.
            variable: String. Our variable.

        Returns:
            Tuple of integers, or None.
        """
        key = foreign_names(architecture, self.naming)[layer, variable].key
        return self.tensors[key].shape if key in self.tensors else None


def match(
    contents: Contents,
    architecture: Architecture,
    channels: int,
    classes: int | None,
    include_top: bool,
    ignore_others: bool = False,
) -> tuple[Report, Plan]:
    """Compares a file with a net by names and shapes alone.

    Args:
        contents: A `Contents`.
        architecture: An `Architecture`.
        channels: Integer. Channels of the net's input.
        classes: Integer, or None for a net without a top.
        include_top: Boolean, whether to compare the classifier.
        ignore_others: Boolean, whether layers around the net are ignored beside a classifier, too. Defaults to False.

    Returns:
        Tuple of a `Report`, and a dict of functions that read the tensors that fit, by (our layer, our variable).
    """
    names = foreign_names(architecture, contents.naming, channels, classes)
    head = foreign_names(architecture, contents.naming)  # always with a classifier
    bias = contents.tensors.get(head["predictions", "bias"].key)
    file_classes = bias.shape[0] if bias and len(bias.shape) == 1 else None
    background = _has_background(contents, file_classes, classes)
    plan: Plan = {}
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
        steps, found = _steps(layer, name, stored.shape, background)
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
    if classes is None or not include_top or ignore_others:
        around = {key for key in contents.tensors.keys() - needed if contents.is_around(key)}
        ignored[AROUND] += len(around)
        needed |= around
    problems += [f"+ {contents.told(name)}" for name in contents.tensors if name not in needed]
    theirs = contents.naming.activation or architecture.activation
    if theirs != architecture.activation:
        problems.append(f"! the activation: expected {architecture.activation}, received {theirs}, as its program has")
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


def _steps(
    layer: str, name: Name, stored: tuple[int, ...], background: bool
) -> tuple[list[Step], tuple[int, ...] | None]:
    """Returns the steps from a foreign array to ours, and the shape after them: None where the layout does not fit."""
    found, shape = _as_ours(name, stored), name.shape
    steps: list[Step] = [LAYOUTS[name.layout].to_keras]
    if found != shape and layer == "predictions" and background:
        steps.append(LAYOUTS["drop-background-class"].to_keras)
        found = None if found is None else (*found[:-1], found[-1] - 1)
    if found != shape and layer == "stem_conv" and found == (*shape[:2], 3, shape[3]):
        steps.append(lambda kernel, shape: adapt_channels(kernel, shape[2]))
        found = shape
    return steps, found


def _as_ours(name: Name, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns a foreign shape in our order, or None where the layout does not fit it."""
    try:
        return LAYOUTS[name.layout].to_keras(np.broadcast_to(np.float32(0), shape), name.shape).shape
    except ValueError:
        return None


def _has_background(contents: Contents, file_classes: int | None, classes: int | None) -> bool:
    return contents.format == "tpu" and file_classes == 1001 and classes == 1000


def _check_floats(array: np.ndarray, of: str = "") -> None:
    if array.dtype.kind in "biu":  # of which only a quantized net's scales would make weights
        raise ValueError(f"Expected floats. Received: {of}{array.dtype}, as in a quantized net")


def _reader(stored: Stored, steps: list[Step], shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = stored.read()
        _check_floats(array)
        for step in steps:
            array = step(array, shape)
        return array

    return read


def read_values(report: Report, plan: Plan, contents: Contents, architecture: Architecture, told: str) -> Values:
    """Reads the tensors that were matched.

    Args:
        report: A `Report` of `match()`.
        plan: The functions that `match()` returns with it.
        contents: A `Contents`, whose file is still open.
        architecture: An `Architecture`.
        told: String. The model's name in errors.

    Returns:
        Dict of float32 arrays by (our layer, our variable), in the model's order.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape, unreadable or not finite.
    """
    values: Values = {}
    problems = list(report.problems)
    if not problems:
        names = foreign_names(architecture, contents.naming)
        for key, read in plan.items():
            try:
                values[key] = read().astype(np.float32, copy=False)
            except Exception as error:  # of whatever library reads the format
                raise ValueError(
                    f"Expected {contents.title}. Received: {report.path!r}, where "
                    f"{contents.told(names[key].key)} cannot be read ({' '.join(str(error).split())[:200]})"
                ) from error
            others = np.size(values[key]) - int(np.isfinite(values[key]).sum())
            if others:
                problems.append(f"! {contents.told(names[key].key)}: expected finite numbers, received {others} others")
    if problems:
        raise _misfit(report, problems, told)
    return values


def _misfit(report: Report, problems: list[str], model: str) -> ValueError:
    """Returns the error for a file whose tensors are not exactly the model's."""
    hint, more = "", len(problems) - SHOWN
    if all("predictions/" in problem for problem in problems):
        hint = ". To load all but the classifier: keras_effnet.weights.load(model, path, include_top=False)"
    elif more > 0 and report.problems and model in VARIANTS:
        hint = f" (`keras-effnet verify FILE --model {model}` lists all differences)"
    shown = one_line("; ".join(problems[:SHOWN]), 2000) + (f"; and {more} more" if more > 0 else "")
    return ValueError(
        f"Expected exactly the tensors of {model!r}{hint}. Received: {report.path}, where tensors are missing (-), "
        f"unexpected (+) or wrong (!): {shown}"
    )


def identify_model(
    contents: Contents, model: str | None, pruned: bool = False, known: Architecture | None = None
) -> tuple[str, Architecture, int, int | None]:
    """Finds the model whose tensors a file contains.

    Args:
        contents: A `Contents`.
        model: Name of the model, or None for the one that differs least from the file.
        pruned: Boolean, whether the blocks may have other numbers of channels, which are then read from the file.
            Defaults to False.
        known: The `Architecture` that the file describes, which is then the only one. Defaults to None.

    Returns:
        Tuple of the model's name, its `Architecture`, its channels, and its classes or None.

    Raises:
        ValueError: If `model` is None and the file has the tensors of no model, or describes another.
    """
    if known is not None:
        return _described(contents, model, known)
    found = []
    nets = [(name, resolve(VARIANTS[name])) for name in ([model] if model else VARIANTS)]
    nets = [(name, net) for name, net in nets if model or has_names(net, contents.naming)]
    if not model:  # those with as many tensors first: a file of one of them is not compared with the others
        nets.sort(key=lambda pair: abs(_tensors(pair[1]) - len(contents.tensors)))
    others = ((name, _with_widths_of(contents, net)) for name, net in nets if pruned)
    for name, architecture in chain(nets, others):
        channels, classes = _ends(contents, architecture)
        report, _ = match(contents, architecture, channels, contents.top(architecture), True, ignore_others=True)
        found.append((report.problems, name, architecture, channels, classes))
        if report.fits:
            break
    problems, name, architecture, channels, classes = min(found, key=lambda candidate: len(candidate[0]))
    if problems and model is None:
        more = f" ({problems[0]})" if len(problems) == 1 else ""
        raise ValueError(
            f"Expected the tensors of a known model. Received: {contents.path!r}. Nearest: {name} "
            f"(tensors that differ: {len(problems)}). `keras-effnet verify FILE --model {name}` lists them{more}"
        )
    return name, architecture, channels, classes


def _described(contents: Contents, model: str | None, known: Architecture) -> tuple[str, Architecture, int, int | None]:
    """Returns what `identify_model()` does, for a file that describes its net."""
    if model not in (None, known.name):
        raise ValueError(f"Expected {model!r}. Received: {contents.path!r}, which holds {known.name!r}")
    channels, classes = _ends(contents, known)
    report, _ = match(contents, known, channels, classes, include_top=True)
    if not report.fits:
        raise _misfit(report, list(report.problems), known.name)
    return known.name, known, channels, classes


def _ends(contents: Contents, architecture: Architecture) -> tuple[int, int | None]:
    """Returns the channels of a file's input, and the classes of its classifier or None."""
    stem = contents.shape_of(architecture, "stem_conv", "kernel")
    shape = stem and _as_ours(foreign_names(architecture, contents.naming)["stem_conv", "kernel"], stem)
    bias = contents.shape_of(architecture, "predictions", "bias")
    return shape[2] if shape and len(shape) == 4 else 3, bias[0] if bias else None


def _tensors(architecture: Architecture) -> int:
    return sum(len(layer.shapes) for layer in weight_shapes.owners(architecture, 3, 1000).values())


def _with_widths_of(contents: Contents, architecture: Architecture) -> Architecture:
    """Returns the net with the file's channels in each block, or unchanged where the file has other blocks."""
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

"""Checks the versions of the installed packages against each other, from their own metadata."""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from keras_effnet.tpu.doctor.finding import Finding

OURS = "keras-effnet"
TENSORFLOWS = ("tensorflow", "tensorflow-tpu", "tensorflow-cpu", "tf-nightly")
LAST_ON_TPU = "2.19.1"  # keras:requirements-tensorflow-tpu.txt
ON_A_TPU = "See On a Cloud TPU in docs/training.md"
INSTALL = "Install it with: pip install '{asked}{wanted}'"


@dataclass(frozen=True)
class Fit:
    """A requirement of one package on another. The required versions come from the metadata of the former.

    Args:
        asker: String, the package with the requirement.
        extra: String, the extra that adds the requirement. `""` if it always holds.
        asked: String, the required package.
        row: String, the key of `ROWS` whose finding reports a violation.
        verdict: String, the verdict of a violation.
        advice: String, template of the advice on a violation.
    """

    asker: str
    extra: str
    asked: str
    row: str
    verdict: str
    advice: str


FITS = (
    Fit("keras-effnet", "", "keras", "Keras", "problem", INSTALL),
    Fit("keras-effnet", "tensorflow", "tensorflow", "TensorFlow", "problem", INSTALL),
    Fit("keras-effnet", "jax", "jax", "JAX", "problem", INSTALL),
    Fit("tensorflow", "", "keras", "Keras", "problem", INSTALL),
    Fit("tensorflow", "", "libtpu", "libtpu", "problem", INSTALL),
    Fit("jax", "", "jaxlib", "jaxlib", "problem", INSTALL),
    Fit("jax", "tpu", "libtpu", "libtpu", "problem", "Install it with: pip install 'jax[tpu]=={version}'"),
    Fit("tf-keras", "", "tensorflow", "tf_keras", "problem", "Install it with: pip install 'tf_keras=={minor}.*'"),
    # orbit, the only part of it in use, requires no TensorFlow: docs/training.md.
    Fit("tf-models-official", "", "tensorflow", "tf-models-official", "warning", INSTALL),
)

ROWS = {
    "TensorFlow": TENSORFLOWS,
    "Keras": ("keras",),
    "JAX": ("jax",),
    "jaxlib": ("jaxlib",),
    "libtpu": ("libtpu",),
    "tf_keras": ("tf-keras",),
    "tf-models-official": ("tf-models-official",),
}

Complaints = dict[str, list[tuple[str, str]]]  # verdict and advice, by row


def installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Reads the metadata of the packages in `FITS` and of those that the extras of this package require.

    Returns:
        Tuple of two dicts: the version of each installed package, and its requirements.
    """
    names = {name for fit in FITS for name in (fit.asker, fit.asked)} | set(TENSORFLOWS)
    with contextlib.suppress(metadata.PackageNotFoundError):  # sources that are not installed
        names |= {Requirement(text).name for text in metadata.requires(OURS) or ()}
    versions, requires = {}, {}
    for name in map(canonicalize_name, names):
        with contextlib.suppress(metadata.PackageNotFoundError, InvalidVersion, TypeError):  # TypeError: half removed
            distribution = metadata.distribution(name)
            versions[name], requires[name] = str(Version(distribution.version)), distribution.requires or []
    return versions, requires


def compare(
    versions: Mapping[str, str],
    requires: Mapping[str, Iterable[str]],
    tpu: bool = False,
    backend: str = "tensorflow",
) -> list[Finding]:
    """Checks whether versions fit each other. A pure function of its arguments.

    Args:
        versions: Dict of the installed packages' versions by name.
        requires: Dict of the packages' requirements by name, as in their metadata.
        tpu: Boolean, whether the machine has a TPU. Defaults to False.
        backend: String, Keras' backend, with which training would run. Defaults to `"tensorflow"`.

    Returns:
        List of `Finding`.

    Example:

    >>> asks = {"tf_keras": ["tensorflow<2.20,>=2.19"]}
    >>> compare({"keras": "3.15.1", "tensorflow": "2.20.0", "tf_keras": "2.19.0"}, asks)[-1]
    Finding(what='tf_keras', found='2.19.0', verdict='problem', advice="Install it with: pip install
    'tf_keras==2.20.*'. tf-keras 2.19.0 requires tensorflow<2.20,>=2.19")
    """
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    requires = {canonicalize_name(name): list(asked) for name, asked in requires.items()}
    complaints: Complaints = {row: [] for row in ROWS}
    _complain_of_requirements(complaints, versions, requires, tpu)
    _complain_of_tpu(complaints, versions, tpu, backend)

    rows = []
    for row, names in ROWS.items():
        found = [versions[name] + (f" ({name})" if name != names[0] else "") for name in names if name in versions]
        if found:
            verdicts = [verdict for verdict, _ in complaints[row]]
            verdict = next((name for name in ("problem", "warning") if name in verdicts), "ok")
            rows.append(Finding(row, ", ".join(found), verdict, ". ".join(advice for _, advice in complaints[row])))
        elif row == "Keras":
            rows.append(Finding(row, "not installed", "problem", "Install it with: pip install keras"))
        elif row in ("TensorFlow", "JAX", "libtpu"):
            rows.append(Finding(row, "not installed", "none"))
    return rows


def extras(versions: Mapping[str, str], requires: Mapping[str, Iterable[str]]) -> list[Finding]:
    """Checks the requirements of this package and of its extras. A pure function of its arguments.

    Args:
        versions: See `compare()`.
        requires: See `compare()`.

    Returns:
        List of `Finding`: one for the package, one for all extras, and one for each partly installed extra.

    Example:

    >>> asks = {"keras_effnet": ["click>=8.2", "matplotlib>=3.9; extra == 'plot'", "pydot>=3; extra == 'plot'"]}
    >>> extras({"keras_effnet": "0.1.0", "click": "8.3", "pydot": "4.0"}, asks)[-1]
    Finding(what='Extra plot', found='no matplotlib', verdict='warning', advice="Install it with: pip install
    'keras_effnet[plot]'")
    """
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    asked = [Requirement(text) for name in requires if canonicalize_name(name) == OURS for text in requires[name]]
    named = sorted({name for one in asked for name in re.findall(r"extra == [\"'](.+?)[\"']", str(one.marker or ""))})
    checked_elsewhere = {fit.asked for fit in FITS if fit.asker == OURS}
    whole, absent, rows = [], [], []
    for extra in ("", *(name for name in named if name not in ("all", "dev", "test"))):
        if extra == "tpu" and "tensorflow-tpu" in versions:
            continue  # installed differently, as docs/training.md says; the row Training reports it
        group = [one for one in asked if _applies(one, extra)]
        missing = [f"no {one.name}" for one in group if canonicalize_name(one.name) not in versions]
        if extra == "tensorflow" and any(name in versions for name in TENSORFLOWS):
            missing = []
        wrong = [
            f"{one.name} {versions[name]} instead of {one.specifier}"
            for one in group
            if (name := canonicalize_name(one.name)) in versions and name not in checked_elsewhere
            if not one.specifier.contains(versions[name], prereleases=True)
        ]
        if not extra:
            found = ", ".join([versions.get(OURS, "not installed"), *missing, *wrong])
            verdict, advice = "ok", ""
            if OURS not in versions:
                verdict = "warning"
                advice = "Install it with: pip install keras_effnet. Only then are its requirements known"
            elif missing or wrong:
                verdict, advice = "problem", "Install it with: pip install keras_effnet"
            rows.append(Finding("keras_effnet", found, verdict, advice))
        elif not missing and not wrong:
            whole.append(extra)
        elif len(missing) == len(group):
            absent.append(extra)
        else:
            advice = f"Install it with: pip install 'keras_effnet[{extra}]'"
            rows.append(Finding(f"Extra {extra}", ", ".join([*missing, *wrong]), "warning", advice))
    parts = [", ".join(whole) or "none", *([f"not installed: {', '.join(absent)}"] if absent else [])]
    rows.insert(1, Finding("Extras", "; ".join(parts), "ok" if whole else "none"))
    return rows


def _complain_of_requirements(
    complaints: Complaints, versions: Mapping[str, str], requires: Mapping[str, Sequence[str]], tpu: bool
) -> None:
    on_tpu = "tensorflow-tpu" in versions
    for fit in FITS:
        for asker, asked in ((a, b) for a in _names(fit.asker, versions) for b in _names(fit.asked, versions)):
            if on_tpu and fit.asker == "tf-models-official":
                continue  # installed without its dependencies, as docs/training.md says
            wanted = _wanted(requires.get(asker, ()), fit.asked, fit.extra)
            if wanted.contains(versions[asked], prereleases=True):
                continue
            advice = fit.advice.format(
                asked=asked,
                wanted=wanted,
                version=versions[asker],
                minor=".".join(versions[asked].split(".")[:2]),
            )
            verdict = fit.verdict
            if fit.asked == "libtpu" and not tpu:
                verdict = "warning"
            elif on_tpu and (asker, asked) == ("jax", "libtpu"):
                # The libtpu of tensorflow-tpu is installed; JAX cannot have another.
                verdict, advice = "warning", "Keep JAX off the TPU with JAX_PLATFORMS=cpu"
            extra = f"[{fit.extra}]" if fit.extra and asker != "keras-effnet" else ""
            reason = f"{asker}{extra} {versions[asker]} requires {fit.asked}{wanted}"
            complaints[fit.row].append((verdict, f"{advice}. {reason}"))


def _complain_of_tpu(complaints: Complaints, versions: Mapping[str, str], tpu: bool, backend: str) -> None:
    frameworks = [name for name in TENSORFLOWS if name in versions]
    on_tpu = "tensorflow-tpu" in frameworks
    if len(frameworks) > 1:
        advice = f"Uninstall {' and '.join(frameworks)}, then install one of them: they write to the same folder"
        complaints["TensorFlow"].append(("problem", advice))
    if on_tpu and Version(versions["tensorflow-tpu"]) > Version(LAST_ON_TPU):
        advice = f"{ON_A_TPU}: Keras says that {LAST_ON_TPU} is the last version for TPUs"
        complaints["TensorFlow"].append(("warning", advice))
    if tpu and frameworks and not on_tpu and backend != "jax":
        advice = f"Train with --runner jax, or install tensorflow-tpu {LAST_ON_TPU}: this TensorFlow cannot use the TPU"
        complaints["TensorFlow"].append(("problem", f"{advice}. {ON_A_TPU}"))
    if on_tpu and backend == "jax":
        advice = "Replace it with: pip uninstall tensorflow-tpu, pip install 'tensorflow-cpu<2.21'"
        complaints["TensorFlow"].append(("problem", f"{advice}. It takes the TPU that JAX trains on"))
    elif on_tpu and "jax" in versions and "libtpu" in versions:
        # https://github.com/Kaggle/docker-python/issues/1370
        advice = "Set JAX_PLATFORMS=cpu, or uninstall JAX: it and tensorflow-tpu take the TPU, which only one can hold"
        complaints["JAX"].append(("warning", advice))


def _names(name: str, versions: Mapping[str, str]) -> list[str]:
    return [one for one in (TENSORFLOWS if name == "tensorflow" else (name,)) if one in versions]


def _wanted(requires: Iterable[str], name: str, extra: str) -> SpecifierSet:
    wanted = SpecifierSet()
    for requirement in map(Requirement, requires):
        if canonicalize_name(requirement.name) == name and _applies(requirement, extra, extra != ""):
            wanted &= requirement.specifier
    return wanted


def _applies(requirement: Requirement, extra: str, base_too: bool = False) -> bool:
    """Returns whether the requirement holds here with this extra, and not without it unless `base_too`."""
    marker = requirement.marker
    plain = marker is None or marker.evaluate({"extra": ""})
    if not extra or (plain and base_too):
        return plain
    return not plain and marker is not None and marker.evaluate({"extra": extra})

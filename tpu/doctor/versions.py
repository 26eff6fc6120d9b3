"""Versions of the installed packages, and whether they fit each other. Read from their own metadata."""

import contextlib
import re
from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True)
class Fit:
    """A version that one package asks another for, in its own metadata, with the name of the row that tells it."""

    asker: str
    extra: str
    asked: str
    row: str
    verdict: str
    advice: str


# What is asked is read from the packages that are installed: a row says whom to ask, and what to do.
FITS = (
    Fit("keras-effnet", "", "keras", "Keras", "problem", "pip install '{asked}{wanted}'"),
    Fit("keras-effnet", "tensorflow", "tensorflow", "TensorFlow", "problem", "pip install '{asked}{wanted}'"),
    Fit("keras-effnet", "jax", "jax", "JAX", "problem", "pip install '{asked}{wanted}'"),
    Fit("tensorflow", "", "keras", "Keras", "problem", "pip install '{asked}{wanted}'"),
    Fit("tensorflow", "", "libtpu", "libtpu", "problem", "pip install '{asked}{wanted}'"),
    Fit("jax", "", "jaxlib", "jaxlib", "problem", "pip install '{asked}{wanted}'"),
    Fit("jax", "tpu", "libtpu", "libtpu", "problem", "pip install 'jax[tpu]=={version}'"),
    Fit("tf-keras", "", "tensorflow", "tf_keras", "problem", "pip install 'tf_keras=={minor}.*'"),
    # orbit, which is what is taken of it, asks for no TensorFlow: docs/training.md.
    Fit("tf-models-official", "", "tensorflow", "tf-models-official", "warning", "pip install '{asked}{wanted}'"),
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


def compare(
    versions: Mapping[str, str],
    requires: Mapping[str, Iterable[str]],
    tpu: bool = False,
    backend: str = "tensorflow",
) -> list[Finding]:
    """Whether versions fit each other. Looks at nothing but what it is given.

    Args:
        versions: Dict of the installed packages' versions by name.
        requires: Dict of what packages ask for, by name, as in their metadata.
        tpu: Boolean, whether a TPU is there. Defaults to False.
        backend: String, Keras' backend: what would train. Defaults to `"tensorflow"`.

    Returns:
        List of `Finding`.

    Example:

    >>> asks = {"tf_keras": ["tensorflow<2.20,>=2.19"]}
    >>> compare({"keras": "3.15.1", "tensorflow": "2.20.0", "tf_keras": "2.19.0"}, asks)[-1]
    Finding(what='tf_keras', found='2.19.0', verdict='problem', advice="tf-keras 2.19.0 asks for tensorflow<2.20,>=2.19:
    pip install 'tf_keras==2.20.*'")
    """
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    requires = {canonicalize_name(name): list(asked) for name, asked in requires.items()}
    complaints: dict[str, list[tuple[str, str]]] = {row: [] for row in ROWS}
    frameworks = [name for name in TENSORFLOWS if name in versions]
    on_tpu = "tensorflow-tpu" in frameworks
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
                # tensorflow-tpu's libtpu is there; JAX cannot have another.
                verdict, advice = "warning", "keep JAX off the TPU: JAX_PLATFORMS=cpu"
            extra = f"[{fit.extra}]" if fit.extra and asker != "keras-effnet" else ""
            complaints[fit.row].append(
                (verdict, f"{asker}{extra} {versions[asker]} asks for {fit.asked}{wanted}: {advice}")
            )
    if len(frameworks) > 1:
        told = f"{' and '.join(frameworks)} write the same folder: pip uninstall all of them and install one"
        complaints["TensorFlow"].append(("problem", told))
    if on_tpu and Version(versions["tensorflow-tpu"]) > Version(LAST_ON_TPU):
        told = f"Keras says that {LAST_ON_TPU} is the last version for TPUs. {ON_A_TPU}"
        complaints["TensorFlow"].append(("warning", told))
    if tpu and frameworks and not on_tpu and backend != "jax":
        told = f"It cannot use the TPU; JAX can, with --runner jax, or tensorflow-tpu {LAST_ON_TPU}. {ON_A_TPU}"
        complaints["TensorFlow"].append(("problem", told))
    if on_tpu and backend == "jax":
        told = "It takes the TPU that JAX trains on: pip uninstall tensorflow-tpu, pip install 'tensorflow-cpu<2.21'"
        complaints["TensorFlow"].append(("problem", told))
    elif on_tpu and "jax" in versions and "libtpu" in versions:
        # https://github.com/Kaggle/docker-python/issues/1370
        told = "A process holds the TPU once, and both it and tensorflow-tpu take it: JAX_PLATFORMS=cpu, or uninstall"
        complaints["JAX"].append(("warning", told))

    rows = []
    for row, names in ROWS.items():
        found = [versions[name] + (f" ({name})" if name != names[0] else "") for name in names if name in versions]
        if found:
            verdicts = [verdict for verdict, _ in complaints[row]]
            verdict = next((name for name in ("problem", "warning") if name in verdicts), "ok")
            rows.append(Finding(row, ", ".join(found), verdict, ". ".join(told for _, told in complaints[row])))
        elif row == "Keras":
            rows.append(Finding(row, "not installed", "problem", "pip install keras"))
        elif row in ("TensorFlow", "JAX", "libtpu"):
            rows.append(Finding(row, "not installed", "none"))
    return rows


def extras(versions: Mapping[str, str], requires: Mapping[str, Iterable[str]]) -> list[Finding]:
    """What this package asks for and what of its extras is here. Looks at nothing but what it is given.

    Args:
        versions: See `compare()`.
        requires: See `compare()`.

    Returns:
        List of `Finding`: one for the package, one for all extras, and one for each that is here in part.

    Example:

    >>> asks = {"keras_effnet": ["click>=8.2", "matplotlib>=3.9; extra == 'plot'", "pydot>=3; extra == 'plot'"]}
    >>> extras({"keras_effnet": "0.1.0", "click": "8.3", "pydot": "4.0"}, asks)[-1]
    Finding(what='Extra plot', found='no matplotlib', verdict='warning', advice="pip install 'keras_effnet[plot]'")
    """
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    asked = [Requirement(text) for name in requires if canonicalize_name(name) == OURS for text in requires[name]]
    named = sorted({name for one in asked for name in re.findall(r"extra == [\"'](.+?)[\"']", str(one.marker or ""))})
    told_elsewhere = {fit.asked for fit in FITS if fit.asker == OURS}
    whole, absent, rows = [], [], []
    for extra in ("", *(name for name in named if name not in ("all", "dev", "test"))):
        if extra == "tpu" and "tensorflow-tpu" in versions:
            continue  # installed otherwise, as docs/training.md says; Training tells of it
        group = [one for one in asked if _applies(one, extra)]
        missing = [f"no {one.name}" for one in group if canonicalize_name(one.name) not in versions]
        if extra == "tensorflow" and any(name in versions for name in TENSORFLOWS):
            missing = []
        wrong = [
            f"{one.name} {versions[name]} where {one.specifier} is asked for"
            for one in group
            if (name := canonicalize_name(one.name)) in versions and name not in told_elsewhere
            if not one.specifier.contains(versions[name], prereleases=True)
        ]
        if not extra:
            found = ", ".join([versions.get(OURS, "not installed"), *missing, *wrong])
            verdict, advice = ("problem", "pip install keras_effnet") if missing or wrong else ("ok", "")
            if OURS not in versions:
                verdict, advice = "warning", "pip install keras_effnet: what it asks for is known only then"
            rows.append(Finding("keras_effnet", found, verdict, advice))
        elif not missing and not wrong:
            whole.append(extra)
        elif len(missing) == len(group):
            absent.append(extra)
        else:
            advice = f"pip install 'keras_effnet[{extra}]'"
            rows.append(Finding(f"Extra {extra}", ", ".join([*missing, *wrong]), "warning", advice))
    told = [f"{', '.join(whole)}" if whole else "none", *([f"not installed: {', '.join(absent)}"] if absent else [])]
    rows.insert(1, Finding("Extras", "; ".join(told), "ok" if whole else "none"))
    return rows


def installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Versions of what the table of versions and this package's extras name, and what each of them asks for."""
    names = {name for fit in FITS for name in (fit.asker, fit.asked)} | set(TENSORFLOWS)
    with contextlib.suppress(metadata.PackageNotFoundError):  # sources that are not installed
        names |= {Requirement(text).name for text in metadata.requires(OURS) or ()}
    versions, requires = {}, {}
    for name in map(canonicalize_name, names):
        with contextlib.suppress(metadata.PackageNotFoundError, InvalidVersion, TypeError):  # TypeError: half removed
            distribution = metadata.distribution(name)
            versions[name], requires[name] = str(Version(distribution.version)), distribution.requires or []
    return versions, requires


def _names(name: str, versions: Mapping[str, str]) -> list[str]:
    return [one for one in (TENSORFLOWS if name == "tensorflow" else (name,)) if one in versions]


def _wanted(requires: Iterable[str], name: str, extra: str) -> SpecifierSet:
    wanted = SpecifierSet()
    for requirement in map(Requirement, requires):
        if canonicalize_name(requirement.name) == name and _applies(requirement, extra, extra != ""):
            wanted &= requirement.specifier
    return wanted


def _applies(requirement: Requirement, extra: str, base_too: bool = False) -> bool:
    """Whether it is asked for here with this extra, and not without it unless `base_too`."""
    marker = requirement.marker
    plain = marker is None or marker.evaluate({"extra": ""})
    if not extra or (plain and base_too):
        return plain
    return not plain and marker is not None and marker.evaluate({"extra": extra})

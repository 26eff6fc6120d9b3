"""What a wheel installs, and which versions: of setup.cfg's bounds and of CI's lock."""

import configparser
import shutil
import subprocess
import sys

import pytest
from helpers import BACKEND, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_a_wheel_holds_one_package_and_its_command(tmp_path):
    sources = tmp_path / "sources"  # a build leaves files behind
    shutil.copytree(
        ROOT, sources, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", ".*cache")
    )
    target = tmp_path / "site"  # pip builds a wheel and unpacks it there
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", target, sources]
    subprocess.run(command, check=True, capture_output=True)
    names = {str(path.relative_to(target)) for path in target.rglob("*")}
    assert {path.name for path in target.iterdir()} == {
        "keras_effnet",
        "bin",
        next(path.name for path in target.glob("*.dist-info")),
    }
    files = [path for top in ("keras_effnet", "weights", "tpu") for path in (ROOT / top).rglob("*.py*")]
    files += [*ROOT.glob("keras_effnet/images/photographs/*"), ROOT / "keras_effnet" / "py.typed"]
    files += [*ROOT.glob("keras_effnet/imagenet_classes.*"), *ROOT.glob("keras_effnet/pages/*")]
    files = [path for path in files if path.suffix != ".pyc"]
    assert len(files) > 120
    for path in files:
        relative = path.relative_to(ROOT)
        inside = relative if relative.parts[0] == "keras_effnet" else f"keras_effnet/{relative}"
        assert str(inside) in names
    # Installed away from the sources, the package and the weights beside it work.
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import keras_effnet as ke; "
        "print(ke.__file__); print(ke.EfficientNetLite0().name)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == [str(target / "keras_effnet/__init__.py"), "efficientnet-lite0"], result.stderr
    assert (target / "bin" / "keras-effnet").exists()


def test_the_lock_of_ci_keeps_the_bounds_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()]).split("\n")
    requirements = [Requirement(line) for line in lines if line and not line.startswith("keras_effnet[")]
    assert len(requirements) > 40
    lines = (ROOT / ".ci" / "lock.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    wrong = [
        f"{requirement} is locked at {version}"
        for requirement in requirements
        if not (version := locked.get(canonicalize_name(requirement.name)))
        or not requirement.specifier.contains(version, prereleases=True)
    ]
    assert not wrong, f"Renew the lock with .ci/lock: {wrong}"

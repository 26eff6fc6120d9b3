"""Examples in docstrings and the README run; public names are documented."""

import doctest
import inspect
import os
import pickle
import re
from importlib import import_module

import keras
import pytest
from helpers import BACKEND, ROOT, modules

import keras_effnet as ke

README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.parametrize(
    "module",  # the README distills too
    [pytest.param(name, marks=pytest.mark.long) if name.endswith(".distillation") else name for name in modules()],
)
def test_examples_run(module, monkeypatch, tmp_path):
    os.symlink(ROOT / "docs", tmp_path / "docs")  # examples read there, and write into the current folder
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not result.failed


@pytest.mark.parametrize("name", [name for name in dir(ke) if not name.startswith("_") and callable(getattr(ke, name))])
def test_public_names_are_documented(name):
    value = getattr(ke, name)
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith(".")
    assert value.__name__ == name
    if name.startswith("EfficientNet"):
        theirs = list(inspect.signature(keras.applications.EfficientNetB0).parameters)
        assert list(inspect.signature(value).parameters)[: len(theirs)] == theirs
        assert pickle.loads(pickle.dumps(value)) is value
    else:
        for section in ("Args:", "Returns:", "Example:"):
            assert section in text
        for parameter in inspect.signature(value).parameters:
            assert parameter == "variant" or f"{parameter}:" in text


@pytest.mark.parametrize("name", ke.weights.__all__)
def test_the_functions_for_weights_are_documented(name):
    value = getattr(ke.weights, name)
    text = inspect.getdoc(value) or ""
    for section in ("Args:", "Returns:", "Raises:", "Example:", *inspect.signature(value).parameters):
        assert section in text


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_the_readmes_python_runs(monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    os.symlink(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_readmes_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target

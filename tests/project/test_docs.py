"""The documentation is true: examples run, tables and pictures follow from the code, public names are documented."""

import doctest
import importlib.util
import inspect
import os
import pickle
import re
from contextlib import nullcontext
from importlib import import_module

import keras
import pytest
from helpers import BACKEND, ROOT, modules

import keras_effnet as ke
from keras_effnet.inference.runtimes import has_bfloat16

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)

# Modules and pages whose examples build, save, export or prune nets, and show nothing that depends on their depth.
PRUNES = (".choose_channels", ".cut_channels", ".importance", "pruning.md")
OF_ANY_DEPTH = (
    *(".predictor", ".benchmark", ".export", ".folding", ".explain", ".model_metadata", ".model_loader"),
    *(".nets.build", ".nets.inspection", ".cross_replica"),
    *("old_models.md", "convert.md", "metadata.md", "faq.md", "condconv.md"),
    *PRUNES,
)
TRAINS = ("finetune.md", "pruning.md", ".choose_channels", ".cut_channels")  # for a few steps; .importance is traced


@pytest.fixture
def in_folder(request, monkeypatch, tmp_path):
    """Runs the examples of a module or page where they may write, on nets that are no deeper than they need."""
    (name,) = request.node.callspec.params.values()
    for endings, fixture in ((OF_ANY_DEPTH, "shallow"), (TRAINS, "eager")):
        if name.endswith(endings):
            request.getfixturevalue(fixture)
    os.symlink(ROOT / "docs", tmp_path / "docs")  # examples read there
    monkeypatch.chdir(tmp_path)


once = pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")


@once
@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    "module",  # the pages distill too
    [pytest.param(name, marks=pytest.mark.long) if name.endswith(".distillation") else name for name in modules()],
)
def test_examples_run(module):
    result = doctest.testmod(import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not result.failed


@once
@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    "page",
    [
        # It trains and exports several models, for which CI has no time.
        pytest.param(name, marks=pytest.mark.long if name == "finetune.md" else ())
        for name, path in PAGES.items()
        if BLOCK.search(path.read_text())
    ],
)
@pytest.mark.filterwarnings("ignore:On this machine, (int8|bfloat16) takes:UserWarning")
def test_the_python_of_the_pages_runs(page):
    names: dict = {}
    for block in BLOCK.findall(PAGES[page].read_text()):
        runs = has_bfloat16() or 'precision="bfloat16"' not in block
        told = pytest.raises(ValueError, match="Expected a processor that computes in bfloat16")
        with nullcontext() if runs else told:
            exec(compile(block, page, "exec"), names)


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


def test_the_readme_is_one_page_that_starts_with_the_two_commands():
    assert len(README.splitlines()) <= 150
    first, second, *_ = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert first == 'pip install ".[tensorflow,lite]"\nkeras-effnet predict docs/cat.png docs/coffee.png\n'
    assert second == 'pip install -e ".[all]"\npytest -n 2\n'


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "tests/README.md"])
def test_links_outside_the_site_lead_somewhere(page):  # those inside are checked by `mkdocs build --strict`
    path = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        assert (path.parent / name).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (path.parent / name).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


def test_each_promise_of_security_has_its_tests():
    rows = re.findall(r"^\| (?!promise|---)(.+) \| (.+) \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    modules = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for promise, tests in rows:
        for name in re.findall(r"`([^`]+)`", tests):
            if name.endswith(".py"):
                assert name.rpartition("/")[2] in modules, promise
            else:
                assert any(f"def {name}(" in text for text in modules.values()), promise
        assert "`" in tests, promise


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_models_are_those_of_the_registry():
    page = (ROOT / "docs" / "models.md").read_text()
    assert page.count("| `efficientnet-") > 100
    assert script("tables").filled(page) == page, "run: python docs/tables.py"


def test_the_drawing_shows_the_imports_and_none_runs_back_up():
    draw = script("draw_architecture")
    drawn = set(re.findall(r"<title>([\w.]+)&#45;&gt;([\w.]+)</title>", (ROOT / "docs/architecture.svg").read_text()))
    wanted = set()
    for title, package, floors in (
        ("keras_effnet", "keras_effnet", draw.FLOORS),
        ("tpu", "keras_effnet.tpu", draw.TPU_FLOORS),
    ):
        height = {room: number for number, floor in enumerate(floors) for room in floor}
        found = draw.arrows(package, list(height))
        assert all(height[one] < height[other] for one, other in found)
        wanted |= {(f"{title}.{one}", f"{title}.{other}") for one, other in draw.shortest(found)}
    assert drawn == wanted, "run: python docs/draw_architecture.py"

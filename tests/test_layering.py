"""Who imports whom, read from the source; and what an import costs."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDERS = {
    "keras_effnet": ROOT / "keras_effnet",
    "keras_effnet.weights": ROOT / "weights",
    "keras_effnet.tpu": ROOT / "tpu",
    "keras_effnet.tpu.recipes": ROOT / "tpu" / "recipes",
}
FILES = {f"{package}.{path.stem}": path for package, folder in FOLDERS.items() for path in folder.glob("*.py")}

# What a module may import while it is itself imported, of this package and of the heavy libraries.
ALLOWED = {
    "arch": set(),
    "errors": set(),
    "variants": {"arch", "errors"},
    "initializers": {"keras"},
    "preprocessing": {"errors", "variants"},
    "layers": {"errors", "initializers", "keras"},
    "blocks": {"arch", "initializers", "layers", "keras"},
    "models": {"arch", "blocks", "errors", "preprocessing", "variants", "keras"},
    "describe": {"arch", "errors", "preprocessing", "variants"},
    "folding": {"initializers", "layers", "keras"},
    "quantization": {"keras"},
    "runtimes": {"errors"},
    "exporter": {
        "blocks",
        "errors",
        "folding",
        "preprocessing",
        "quantization",
        "runtimes",
        "variants",
        "weights.writers",
        "keras",
    },
    "benchmark": {"predictor", "runtimes"},
    "knapsack": set(),
    "distillation": {"blocks", "keras"},
    "pruning": {
        "arch",
        "blocks",
        "describe",
        "distillation",
        "errors",
        "initializers",
        "knapsack",
        "variants",
        "keras",
    },
    "predictor": {
        "__version__",
        "errors",
        "preprocessing",
        "runtimes",
        "variants",
        "weights.registry",
        "weights.store",
        "weights.writers",
    },
    "pruner": {
        "blocks",
        "describe",
        "predictor",
        "preprocessing",
        "pruning",
        "weights.registry",
        "weights.writers",
        "keras",
    },
    "cli": {"__version__"},
    "__init__": set(),
    "weights.__init__": set(),
    "weights.registry": {"errors", "variants"},
    "weights.layouts": set(),
    "weights.namemaps": set(),
    "weights.torch_files": set(),
    "weights.tf_files": set(),
    "weights.readers": {"weights.registry", "weights.tf_files", "weights.torch_files"},
    "weights.writers": set(),
    "weights.convert": {
        "arch",
        "errors",
        "variants",
        "weights.layouts",
        "weights.namemaps",
        "weights.readers",
        "weights.registry",
        "weights.writers",
    },
    "weights.store": {"weights.registry", "weights.writers"},
    "tpu.__init__": set(),
    "tpu.augment": {"errors", "preprocessing", "tensorflow"},
    "tpu.config": set(),
    "tpu.checkpoints": {"tensorflow"},
    "tpu.data": {"tpu.augment", "tpu.config", "tpu.files", "tpu.sources", "tensorflow"},
    "tpu.doctor": {"tpu.config", "weights.store"},
    "tpu.ema": {"keras"},
    "tpu.evaluate": {
        "blocks",
        "errors",
        "models",
        "preprocessing",
        "tpu.checkpoints",
        "tpu.config",
        "tpu.data",
        "tpu.sources",
        "variants",
        "weights.convert",
        "weights.writers",
        "keras",
        "tensorflow",
    },
    "tpu.evaluator": {"tpu.stops", "orbit"},
    "tpu.files": {"tensorflow"},
    "tpu.losses": {"keras"},
    "tpu.optim": {"errors", "keras"},
    "tpu.jax_checkpoints": {"tpu.checkpoints", "tpu.files", "jax", "tensorflow"},
    "tpu.jax_convolutions": {"layers", "keras", "jax"},
    "tpu.jax_kernels": {"jax"},
    "tpu.jax_fused": {"blocks", "tpu.jax_kernels", "tpu.jax_convolutions", "tpu.replicas", "keras", "jax"},
    "tpu.jax_runner": {
        "layers",
        "tpu.config",
        "tpu.data",
        "tpu.evaluator",
        "tpu.jax_checkpoints",
        "tpu.jax_convolutions",
        "tpu.jax_fused",
        "tpu.replicas",
        "tpu.step",
        "tpu.stops",
        "weights.store",
        "keras",
        "jax",
        "orbit",
        "tensorflow",
    },
    "tpu.plan": {
        "tpu.config",
        "tpu.jax_runner",
        "tpu.replicas",
        "tpu.sources",
        "tpu.traffic",
        "tpu.train",
        "variants",
        "weights.store",
        "jax",
    },
    "tpu.progress": {"tpu.files", "tpu.stops", "tensorflow"},
    "tpu.replicas": {"keras"},
    "tpu.report": {
        "describe",
        "preprocessing",
        "tpu.augment",
        "tpu.config",
        "tpu.data",
        "tpu.evaluate",
        "tpu.files",
        "tpu.sources",
        "variants",
        "tensorflow",
    },
    "tpu.runner": {
        "tpu.checkpoints",
        "tpu.config",
        "tpu.data",
        "tpu.evaluator",
        "tpu.replicas",
        "tpu.step",
        "tpu.stops",
        "keras",
        "tensorflow",
        "orbit",
    },
    "tpu.sources": {"pruner", "tpu.config", "tpu.files", "tensorflow"},
    "tpu.step": {"errors", "tpu.ema", "tpu.losses", "tpu.optim", "tpu.replicas", "keras"},
    "tpu.stops": set(),
    "tpu.train": {
        "blocks",
        "errors",
        "models",
        "tpu.checkpoints",
        "tpu.config",
        "tpu.data",
        "tpu.files",
        "tpu.optim",
        "tpu.progress",
        "tpu.report",
        "tpu.replicas",
        "tpu.sources",
        "tpu.step",
        "tpu.stops",
        "variants",
        "keras",
        "tensorflow",
        "orbit",
    },
    "tpu.traffic": set(),
    "tpu.recipes.__init__": {"errors", "tpu.config"},
}
# A recipe is numbers: a file of them may import what they are put into.
ALLOWED |= {
    name.removeprefix("keras_effnet."): {"tpu.config"}
    for name in FILES
    if ".recipes." in name and not name.endswith("__init__")
}

HEAVY = {
    "keras",
    "orbit",
    "tensorflow",
    "jax",
    "torch",
    "h5py",
    "matplotlib",
    "PIL",
    "pooch",
    "requests",
    "rich",
    "safetensors",
}
TENSORFLOW_MAY_BE_USED_IN = ("tpu.", "weights.writers", "exporter", "quantization", "layers")


def imports(tree, everywhere: bool):
    """Modules that are imported at the top of a file, or also in functions; not what only type checkers read."""

    def walk(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.Lambda) and not everywhere:
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES or node.module == "keras_effnet" else node.module for name in submodules)


@pytest.mark.parametrize("module", FILES)
def test_modules_import_what_they_may(module):
    short = module.removeprefix("keras_effnet.")
    assert short in ALLOWED, f"{module} has no row: say in ALLOWED what it may import"
    tree = ast.parse(FILES[module].read_text())
    found = {
        name.removeprefix("keras_effnet.") if name.startswith("keras_effnet") else name.split(".")[0]
        for name in imports(tree, False)
    }
    ours = {name.removeprefix("keras_effnet.") for name in FILES} | {"__version__"}
    assert found & (ours | HEAVY) <= ALLOWED[short]
    everywhere = {name.split(".")[0] for name in imports(tree, True)}
    if not short.startswith(TENSORFLOW_MAY_BE_USED_IN):
        assert not everywhere & {"tensorflow", "jax", "torch", "orbit"}
    if short in ("arch", "errors", "variants", "weights.registry", "weights.namemaps", "weights.layouts"):
        assert "keras" not in everywhere
    # What every runner shares.
    if short in ("tpu.config", "tpu.ema", "tpu.losses", "tpu.optim", "tpu.replicas", "tpu.step", "tpu.stops"):
        assert not everywhere & {"tensorflow", "jax", "torch", "orbit"}
    # Of the two runners a run imports one; the planner is no run.
    if not short.startswith(("tpu.jax_", "tpu.plan")):
        assert not everywhere & {"jax"} and not any(".tpu.jax_" in name for name in imports(tree, False))
    if not short.startswith(("tpu.", "cli")):
        assert not any(name.startswith("keras_effnet.tpu") for name in imports(tree, True))


def test_describing_a_name_needs_no_keras():
    code = (
        "import sys, keras_effnet as ke; ke.describe('efficientnet-b0'); ke.list_models(); ke.weights; "
        "print('keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_predictors_need_no_backend_until_they_export():
    code = (
        "import sys, keras_effnet as ke; ke.Predictor; import keras_effnet.benchmark; "
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch', 'onnxruntime') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_images_and_names_need_no_backend():
    code = (
        "import sys, numpy, keras_effnet as ke; "
        "ke.load_image('docs/cat.png', 'efficientnet-lite0', weights='imagenet'); "
        "ke.decode_predictions(numpy.eye(1000)); "
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr

"""Tests keras_effnet/compat.py on real objects, and that no other module uses private API of other libraries."""

import ast
import contextlib
import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, modules, run

from keras_effnet import compat
from keras_effnet.inference import folding
from keras_effnet.pruning import cut_channels

needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="private API of TensorFlow")


@contextlib.contextmanager
def private(*names: str, used_in: str = "keras_effnet/compat.py"):
    """Reports a failure of a test, whatever its error is, as a change of these private names."""
    try:
        yield
    except Exception as error:
        releases = []
        for package in ("keras", "tensorflow"):
            with contextlib.suppress(PackageNotFoundError):
                releases.append(f"{package} {version(package)}")
        raise AssertionError(
            f"Private API changed in {' or '.join(releases)}: {', '.join(names)}. Adapt {used_in}. "
            f"{type(error).__name__}: {error}"
        ) from error


class Graph:
    """A graph with a layer that is called twice, of which no model has been made yet."""

    def __init__(self):
        self.one, self.two = keras.Input((4,), name="one"), keras.Input((4,), name="two")
        self.shared = keras.layers.Dense(4, name="shared")
        self.first, self.second = self.shared(self.one), self.shared(self.two)
        self.add = keras.layers.Add(name="add")
        self.sum = self.add([self.first, self.second])
        self.output = keras.ops.relu(self.sum)

    def model(self) -> keras.Model:
        return keras.Model([self.one, self.two], self.output, name="graph")


def same(found, expected) -> bool:
    """Returns whether two sequences hold the same objects. Keras tensors cannot be compared by `==`."""
    return [id(each) for each in found] == [id(each) for each in expected]


# Graphs


@private("KerasTensor._keras_history.operation")
def test_producer():
    graph = Graph()
    assert compat.producer(graph.first) is compat.producer(graph.second) is graph.shared
    assert compat.producer(graph.sum) is graph.add
    assert isinstance(compat.producer(graph.one), keras.layers.InputLayer)
    relu = compat.producer(graph.output)
    assert isinstance(relu, keras.Operation) and not isinstance(relu, keras.Layer)
    # A nested model is one operation of the outer graph.
    inner = graph.model()
    outer = inner([keras.Input((4,)), keras.Input((4,))])
    assert compat.producer(outer) is inner and compat.producer(inner.outputs[0]) is relu


@private("KerasTensor._keras_history", "Operation._inbound_nodes", "Node.input_tensors")
def test_inputs_of():
    graph = Graph()
    assert same(compat.inputs_of(graph.first), [graph.one])
    assert same(compat.inputs_of(graph.second), [graph.two])
    assert graph.shared.input is graph.one  # the reason: the first call only
    assert same(compat.inputs_of(graph.sum), [graph.first, graph.second])
    assert same(compat.inputs_of(graph.output), [graph.sum])
    assert compat.inputs_of(graph.one) == []


@private("Operation._inbound_nodes", "Node.output_tensors")
def test_first_outputs():
    graph = Graph()
    assert same(compat.first_outputs(graph.shared), [graph.first])
    split = keras.ops.split(graph.sum, 2, axis=-1)
    assert same(compat.first_outputs(compat.producer(split[1])), split)
    inner = graph.model()
    outer = inner([keras.Input((4,)), keras.Input((4,))])
    assert same(compat.first_outputs(inner), [outer])
    assert inner.output is graph.output  # the reason: the model's own graph


@private("Operation._inbound_nodes", "Operation._outbound_nodes", "Node.parent_nodes", "Node.operation")
def test_neighbors():
    graph = Graph()

    def names(operation):
        return sorted(neighbor.name for neighbor in compat.neighbors(operation))

    relu = compat.producer(graph.output)
    assert names(graph.shared) == ["add", "add", "one", "two"]
    assert names(graph.add) == sorted([relu.name, "shared", "shared"])
    assert names(compat.producer(graph.one)) == ["shared"]
    assert names(relu) == ["add"]


# Models


class Subclass(keras.Model):
    """A model with its own `call()`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


class FunctionalSubclass(keras.Model):
    """A functional model with its own `call()`."""

    def call(self, inputs):
        return -super().call(inputs)


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)], name="chain")


@private("Functional._run_through_graph", "Functional.call.__module__")
def test_is_functional():
    graph = Graph()
    functional = graph.model()
    own_call = FunctionalSubclass([graph.one, graph.two], graph.output)
    assert compat.is_functional(functional) and compat.is_functional(own_call)
    for other in (sequential(), Subclass(), graph.shared, keras.layers.InputLayer((4,)), compat.producer(graph.output)):
        assert not compat.is_functional(other), other
    # `inference.folding` looks inside graphs that Keras itself runs, not inside custom calls.
    assert folding.check(functional) is functional
    assert folding.check(chain := sequential()) is chain
    subclass = Subclass()
    subclass(np.zeros((1, 4)))
    for other in (own_call, subclass):
        with pytest.raises(ValueError, match="Expected a functional or sequential model"):
            folding.check(other)


@private("Functional._run_through_graph")
def test_copies_of_nested_models_share_no_layers():
    """`pruning.cut_channels` finds functional and sequential models at any depth."""
    graph = Graph()
    inputs = keras.Input((4,), name="input")
    model = keras.Model(inputs, sequential()(graph.model()([inputs, inputs])))
    copy = cut_channels.copied(model, model, {})
    assert len(compat.all_layers(copy)) == len(compat.all_layers(model)) == 11  # without the bare operation
    assert not {id(layer) for layer in compat.all_layers(copy)} & {id(layer) for layer in compat.all_layers(model)}
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    assert np.array_equal(run(copy, x), run(model, x))


@private("Functional._run_through_graph(call_fn=)")
def test_run_graph():
    graph = Graph()

    def call(operation, *args, **kwargs):
        (values,) = args
        return f"{operation.name}({'+'.join(values) if isinstance(values, list) else values})"

    relu = compat.producer(graph.output).name
    assert compat.run_graph(graph.model(), ["x", "y"], call) == f"{relu}(add(shared(x)+shared(y)))"
    # Arguments of a call arrive with it, and outputs have the model's structure.
    dropped = keras.layers.Dropout(0.5, name="drop")(graph.one, training=True)
    model = keras.Model({"one": graph.one, "two": graph.two}, {"drop": dropped, "sum": graph.sum})
    seen = {}

    def keep(operation, *args, **kwargs):
        seen[operation.name] = kwargs
        return operation.name

    assert compat.run_graph(model, {"one": 1, "two": 2}, keep) == {"drop": "drop", "sum": "add"}
    assert seen["drop"]["training"] is True


@private("Model._called")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_mark_called(tmp_path):
    pytest.importorskip({"tensorflow": "tf2onnx", "jax": "jax2onnx", "torch": "onnxscript"}[BACKEND])
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = keras.Input((4,), batch_size=1, name="input")
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="never called"):  # the reason
        model.export(str(path), format="onnx", verbose=False)
    compat.mark_called(model)
    model.export(str(path), format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.ones((1, 4), "float32")
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    assert np.allclose(found, run(model, x), atol=1e-6)


@private("Layer._flatten_layers")
def test_all_layers():
    class Wrapper(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="wrapper")
            self.inside = keras.layers.Dense(4, name="inside")

        def call(self, inputs):
            return self.inside(inputs)

    graph = Graph()
    inner = graph.model()
    inputs = keras.Input((4,), name="input")
    model = keras.Model(inputs, Wrapper()(inner([inputs, inputs])), name="outer")
    found = compat.all_layers(model)
    assert found[0] is model
    names = ["outer", "input", "graph", "one", "two", "shared", "add", "wrapper", "inside"]
    assert sorted(layer.name for layer in found) == sorted(names)
    assert "inside" not in [layer.name for layer in model.layers]  # the reason


@private("Layer._trainable")
def test_own_trainable():
    graph = Graph()
    model = graph.model()
    assert compat.own_trainable(model) is compat.own_trainable(graph.shared) is True
    compat.set_own_trainable(model, False)
    assert compat.own_trainable(model) is model.trainable is False and model.trainable_weights == []
    assert compat.own_trainable(graph.shared) is graph.shared.trainable is True
    assert all(variable.trainable for variable in model.variables)
    compat.set_own_trainable(model, True)
    assert model.trainable and len(model.trainable_weights) == 2
    model.trainable = False  # the reason: the public setter reaches the layers
    assert compat.own_trainable(graph.shared) is False
    compat.set_own_trainable(model, True)
    assert compat.own_trainable(model) is True and compat.own_trainable(graph.shared) is False


@private("Optimizer._get_variable_index")
def test_variable_index():
    seen = []

    class Recorder(keras.optimizers.Optimizer):
        def update_step(self, gradient, variable, learning_rate):
            seen.append((compat.variable_index(self, variable), tuple(variable.shape)))

    variables = [keras.Variable(np.zeros(size), name=f"v{size}") for size in (3, 1, 2)]
    optimizer = Recorder(learning_rate=0.1)
    optimizer.build(variables)
    assert [compat.variable_index(optimizer, variable) for variable in variables] == [0, 1, 2]
    optimizer.apply([keras.ops.ones(variable.shape) for variable in variables])
    assert seen == [(0, (3,)), (1, (1,)), (2, (2,))]


# TensorFlow


class Asks(keras.layers.Layer):
    """Records the answer to a question each time the layer is called or traced."""

    def __init__(self, question):
        super().__init__()
        self.question, self.answers = question, []

    def call(self, inputs):
        self.answers.append(self.question())
        return inputs * 2.0

    def answers_during(self, action) -> set[bool]:
        """Returns the answers given while a function runs."""
        self.answers.clear()
        action()
        return set(self.answers)


@needs_tensorflow
@private("tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext")
def test_in_xla():
    import tensorflow as tf

    asks = Asks(compat.in_xla)
    x = tf.ones((2, 3))
    assert not compat.in_xla()
    assert asks.answers_during(lambda: asks(x)) == {False}
    assert asks.answers_during(lambda: tf.function(asks)(x)) == {False}
    assert asks.answers_during(lambda: tf.function(asks, jit_compile=True)(x)) == {True}
    inner = tf.function(asks)
    assert asks.answers_during(lambda: tf.function(lambda x: inner(x) + 1.0, jit_compile=True)(x)) == {True}

    for compiled in (True, False):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), asks])
        model.compile("sgd", "mse", jit_compile=compiled)
        assert asks.answers_during(lambda model=model: model.train_on_batch(x, x)) >= {compiled}
        assert asks.answers[-1] is compiled


@needs_tensorflow
@private("keras.src.export.onnx", "keras.src.export.litert", "tf2onnx", "tensorflow.lite (names of modules)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_in_converter(tmp_path):
    import tensorflow as tf

    asks = Asks(compat.in_converter)
    model = keras.Sequential([keras.Input((4,), batch_size=1), keras.layers.Dense(2), asks])
    compat.mark_called(model)
    x = np.ones((1, 4), "float32")

    def export(name, form):
        return lambda: model.export(str(tmp_path / name), format=form, verbose=False)

    assert not compat.in_converter()
    assert asks.answers_during(lambda: model.predict(x, verbose=0)) == {False}
    assert asks.answers_during(export("saved_model", "tf_saved_model")) == {False}
    assert asks.answers_during(export("model.onnx", "onnx")) == {True}
    assert asks.answers_during(export("model.tflite", "litert")) == {True}
    assert asks.answers_during(tf.lite.TFLiteConverter.from_keras_model(model).convert) == {True}
    tf2onnx = pytest.importorskip("tf2onnx")
    signature = [tf.TensorSpec((1, 4))]
    traced = tf.function(model, input_signature=signature)
    assert asks.answers_during(lambda: tf2onnx.convert.from_function(traced, signature)) == {True}


@needs_tensorflow
@private("tensorflow.python.framework.convert_to_constants.convert_variables_to_constants_v2")
def test_frozen():
    import tensorflow as tf

    model, factor = sequential(), tf.Variable(2.0)
    traced = tf.function(lambda x: model(x) * factor, input_signature=[tf.TensorSpec((1, 4))])
    concrete = traced.get_concrete_function()
    x = tf.ones((1, 4))
    expected = concrete(x).numpy()
    frozen = compat.frozen(concrete)
    assert len(concrete.variables) == 5 and len(frozen.variables) == 0
    assert not {operation.type for operation in frozen.graph.get_operations()} & {"ReadVariableOp", "VarHandleOp"}
    assert [tuple(tensor.shape) for tensor in frozen.inputs] == [(1, 4)]
    factor.assign(3.0)
    assert np.allclose(concrete(x), 1.5 * expected) and np.allclose(frozen(x)[0], expected)


@needs_tensorflow
@private("tensorflow.python.distribute.collective_all_reduce_strategy.CollectiveAllReduceExtended")
def test_watch_hosts():
    """With real processes: `pytest -m long tests/tpu/resume/test_chaos.py -k full_disk_of_one`."""
    import inspect

    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    names = ("_check_health_interval", "_check_health_timeout")
    before = {name: getattr(CollectiveAllReduceExtended, name) for name in names}
    try:
        compat.watch_hosts(5)
        assert all(before[name] > getattr(CollectiveAllReduceExtended, name) == 5 for name in names)
        source = inspect.getsource(CollectiveAllReduceExtended._check_health)
        assert all(f"self.{name}" in source for name in names)
    finally:
        for name, value in before.items():
            setattr(CollectiveAllReduceExtended, name, value)


# Elsewhere


PRIVATE_MODULES = ("tensorflow.python", "keras.src", "jax._src")
# Allowed, by module or for all, with the reason.
PUBLIC = {("os", "_exit"): "documented in Python's library reference"}
OVERRIDES = {
    "tpu/step/cross_replica.py": (
        {"_moments", "_reduction_axes"},
        "a layer of our own overrides how Keras' batch normalization computes its statistics: see the test below",
    ),
}


def sources() -> dict[str, ast.Module]:
    """Returns all modules of the package, parsed, by their path."""
    found = {}
    for folder in ("keras_effnet", "weights", "tpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):  # does not follow the links to tpu/ and weights/
            found[str(path.relative_to(ROOT))] = ast.parse(path.read_text())
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def in_private_module(name: str) -> bool:
    return any(name == start or name.startswith(f"{start}.") for start in PRIVATE_MODULES)


def own_names(module: ast.Module) -> set[str]:
    """Returns the private names that a module defines, in classes or elsewhere."""
    found = set()
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
    return {name for name in found if is_private(name)}


def private_uses(module: ast.Module, defined: set[str]) -> list[str]:
    """Returns the uses of private API of other libraries in a module.

    An underscored attribute is one of ours if it is read from `self`, `cls`, `super()` or a name of this package, and
    `defined`, the private names that this package defines, contains it.
    """
    ours = {"self", "cls"}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("keras_effnet")):
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            ours.add(node.name)
    found = []
    for node in ast.walk(module):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in PUBLIC:
                continue  # `os._exit()`
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in ours and name in defined:
                continue
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if name in defined:
                continue
            case ast.Attribute(attr=name) if is_private(name):
                uses = [ast.unparse(node)]
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"), args=[_, name, *_]):
                uses = [ast.unparse(node)] * (isinstance(name, ast.Constant) and is_private(str(name.value)))
            case ast.Import(names=names):
                uses = [f"import {alias.name}" for alias in names if in_private_module(alias.name)]
            case ast.ImportFrom(module=str(start), names=names, level=0):
                full = [f"{start}.{alias.name}" for alias in names]
                private_names = not start.startswith("keras_effnet") and any(is_private(alias.name) for alias in names)
                uses = [ast.unparse(node)] * (private_names or any(map(in_private_module, full)))
            case ast.Constant(value=str(text)) if in_private_module(text):  # as of `importlib.import_module()`
                uses = [ast.unparse(node)]
            case _:
                continue
        found += [f"line {node.lineno}: {use}" for use in uses]
    return found


def test_private_api_is_used_in_compat_only():
    parsed = sources()
    assert {"keras_effnet/compat.py", "tpu/train.py", "weights/convert.py"} <= parsed.keys() and len(parsed) > 100
    defined = set().union(*map(own_names, parsed.values()))
    allowed = {path: names for path, (names, _) in OVERRIDES.items()}
    uses = {path: private_uses(module, defined | allowed.get(path, set())) for path, module in parsed.items()}
    assert len(uses.pop("keras_effnet/compat.py")) > 10  # the check finds them
    uses = {path: found for path, found in uses.items() if found}
    assert not uses, f"Use a function of keras_effnet/compat.py instead of private API of other libraries: {uses}"


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("tensor._keras_history", 1),
        ("self.model._called = True", 1),
        ("self._trainable", 1),  # which this package does not define
        ("class A:\n def _own(self): return self._own, super()._own(), A._own", 0),
        ("from keras_effnet.nets import build\nbuild._own()\ndef _own(): pass", 0),
        ("from keras_effnet.nets import build\nbuild._other()", 1),
        ("model._own()\ndef _own(): pass", 1),
        ("os._exit(0)", 0),
        ("getattr(layer, '_trainable', None)", 1),
        ("getattr(layer, name), hasattr(layer, 'trainable')", 0),
        ("import keras.src.ops\nimport jax._src.core as core", 2),
        ("from keras import src", 1),
        ("from tensorflow.python.ops import array_ops", 1),
        ("from jax import _src", 1),
        ("from keras_effnet import _own, __version__", 0),
        ("importlib.import_module('tensorflow.python.ops')", 1),
        ("__name__.startswith('keras')", 0),
    ],
)
def test_the_check_finds_private_api(code, count):
    module = ast.parse(code)
    assert len(private_uses(module, own_names(module))) == count


@needs_tensorflow
def test_no_class_overrides_private_api():
    """A private method that a new release renames would no longer be called, without an error."""
    machinery = {"_abc_impl", "_is_protocol"}  # which Python itself sets
    found = {}
    for name in modules():
        module = import_module(name)
        for each in vars(module).values():
            if not inspect.isclass(each) or each.__module__ != name:
                continue
            theirs = [base for base in each.__mro__[1:] if not base.__module__.startswith("keras_effnet")]
            private = {key for key in vars(each) if is_private(key) and any(key in vars(base) for base in theirs)}
            if private - machinery:
                found[f"{name}.{each.__name__}"] = private - machinery
    assert found == {"keras_effnet.tpu.step.cross_replica.GroupBatchNormalization": {"_moments"}}


@private("BatchNormalization._moments", "BatchNormalization._reduction_axes", used_in="tpu/step/cross_replica.py")
def test_batch_normalization_computes_its_statistics_in_moments():
    from keras_effnet.tpu.step.cross_replica import GroupBatchNormalization

    class Shifted(GroupBatchNormalization):
        def _moments(self, inputs, mask):
            mean, variance = super()._moments(inputs, mask)
            return mean + 1.0, variance

    x = np.random.default_rng(0).normal(size=(8, 2, 2, 3)).astype("float32")
    for one_pass in (False, True):
        layer = Shifted(momentum=0.0, one_pass=one_pass)
        layer(x, training=True)
        assert np.allclose(layer.moving_mean, x.mean((0, 1, 2)) + 1, atol=1e-5)
        assert np.allclose(layer.moving_variance, x.var((0, 1, 2)), atol=1e-5)

"""CondConv layers compute what a plain loop over examples and positions computes in float64."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND, fill, image, leading, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

import keras_effnet as ke
from keras_effnet.nets import condconv, initializers

KINDS = {"conv": ke.CondConv2D, "depthwise": ke.DepthwiseCondConv2D}
MODES = {"tensorflow": ("eager", "graph", "xla"), "jax": ("eager", "jit"), "torch": ("eager",)}[BACKEND]


def make(kind: str, case: dict, **kwargs):
    chosen = {"depth_multiplier": case["width"]} if kind == "depthwise" else {"filters": case["width"]}
    names = ("kernel_size", "num_experts", "strides", "padding", "dilation_rate", "use_bias", "data_format")
    return KINDS[kind](**chosen, **{name: case[name] for name in names}, **kwargs)


def loop(kind: str, case: dict, x, routing, kernel, bias, upstream=None):
    """Returns the output and, given `upstream`, the gradients of x, routing, kernel and bias. All channels last."""
    x, routing, kernel, bias = (np.asarray(value, np.float64) for value in (x, routing, kernel, bias))
    size, strides, dilation = case["kernel_size"], case["strides"], case["dilation_rate"]
    reach = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
    if case["padding"] == "same":
        out = [-(-n // s) for n, s in zip(x.shape[1:3], strides, strict=True)]
    else:
        out = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True)]
    spans = []
    for n, o, r, s in zip(x.shape[1:3], out, reach, strides, strict=True):
        total = max((o - 1) * s + r - n, 0) if case["padding"] == "same" else 0
        spans.append((total // 2, total - total // 2))
    padded = np.pad(x, ((0, 0), *spans, (0, 0)))
    product = "hwi,hwio->o" if kind == "conv" else "hwi,hwio->io"
    width = kernel.shape[4] if kind == "conv" else kernel.shape[3] * kernel.shape[4]
    y = np.zeros((len(x), *out, width))
    towards = [np.zeros_like(value) for value in (padded, routing, kernel, bias)]
    for example in range(len(x)):
        own = np.einsum("e,ehwio->hwio", routing[example], kernel)
        for row in range(out[0]):
            for column in range(out[1]):
                top, left = row * strides[0], column * strides[1]
                window = (
                    example,
                    slice(top, top + reach[0], dilation[0]),
                    slice(left, left + reach[1], dilation[1]),
                )
                y[example, row, column] = np.einsum(product, padded[window], own).ravel() + routing[example] @ bias
                if upstream is not None:
                    back = upstream[example, row, column].reshape((-1,) if kind == "conv" else kernel.shape[3:])
                    o = "o" if kind == "conv" else "io"
                    towards[0][window] += np.einsum(f"hwio,{o}->hwi", own, back)
                    part = np.einsum(f"hwi,{o}->hwio", padded[window], back)
                    towards[1][example] += np.einsum("ehwio,hwio->e", kernel, part) + bias @ back.ravel()
                    towards[2] += np.multiply.outer(routing[example], part)
                    towards[3] += np.outer(routing[example], back)
    (top, _), (left, _) = spans
    towards[0] = towards[0][:, top : top + x.shape[1], left : left + x.shape[2]]
    return y, towards


def differentiate(function, values, upstream, mode: str):
    """Returns a function's output and its gradients from the backend, compiled as in `mode`."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def both(*values):
            with tf.GradientTape() as tape:
                tape.watch(values)
                y = function(*values)
                loss = tf.reduce_sum(tf.cast(y, "float32") * upstream)
            return y, tape.gradient(loss, values, unconnected_gradients="zero")

        values = [tf.constant(value) for value in values]
        if mode == "graph":  # of any batch size, height and width
            signature = [tf.TensorSpec((None, *value.shape[1:]), value.dtype) for value in values[:2]]
            if values[0].shape.rank == 4:
                signature[0] = tf.TensorSpec((None, None, None, values[0].shape[3]), values[0].dtype)
            signature += [tf.TensorSpec(value.shape, value.dtype) for value in values[2:]]
            both = tf.function(both, input_signature=signature, autograph=False)
        elif mode == "xla":
            both = tf.function(both, jit_compile=True, autograph=False)
        return both(*values)
    if BACKEND == "jax":
        import jax

        def loss(*values):
            y = function(*values)
            return (y.astype("float32") * upstream).sum(), y

        graded = jax.grad(loss, argnums=tuple(range(len(values))), has_aux=True)
        gradients, y = (jax.jit(graded) if mode == "jit" else graded)(*map(jax.numpy.asarray, values))
        return y, gradients
    import torch

    values = [torch.tensor(value, requires_grad=True) for value in values]
    y = function(*values)
    (y.float() * torch.tensor(upstream)).sum().backward()
    return y.detach(), [torch.zeros_like(value) if value.grad is None else value.grad for value in values]


@st.composite
def cases(draw):
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    case = {
        "kernel_size": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "strides": draw(pair),
        "dilation_rate": draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)])),
        "padding": draw(st.sampled_from(["same", "valid"])),
        "num_experts": draw(st.integers(1, 5)),
        "use_bias": draw(st.booleans()),
        "width": draw(st.integers(1, 3)),
        "data_format": "channels_last",
        "batch": draw(st.integers(1, 4)),
        "channels": draw(st.integers(1, 3)),
    }
    reach = [(n - 1) * d + 1 for n, d in zip(case["kernel_size"], case["dilation_rate"], strict=True)]
    least = reach if case["padding"] == "valid" else (1, 1)
    case["size"] = tuple(draw(st.integers(side, side + 8)) for side in least)
    return case


def drawn(kind: str, case: dict):
    """Draws x, routing weights, kernel and bias, and the upstream gradient."""
    generator = np.random.default_rng(0)
    inside = (case["channels"], case["width"])
    shapes = [
        (case["batch"], *case["size"], case["channels"]),
        (case["batch"], case["num_experts"]),
        (case["num_experts"], *case["kernel_size"], *inside),
        (case["num_experts"], inside[1] if kind == "conv" else inside[0] * inside[1]),
    ]
    values = [generator.standard_normal(shape).astype("float32") for shape in shapes]
    values[1] = 1 / (1 + np.exp(-values[1]))
    if not case["use_bias"]:
        values[3] = np.zeros_like(values[3])
    upstream = generator.standard_normal(loop(kind, case, *values)[0].shape).astype("float32")
    return values, upstream


def compare(kind: str, case: dict, mode: str, dtype: str = "float32", tolerance: float = 1e-5):
    values, upstream = drawn(kind, case)
    if dtype != "float32":  # rounding to the layer's precision is not its error
        rounded = [ops.convert_to_numpy(ops.cast(ops.cast(value, dtype), "float32")) for value in values]
        values = [np.array(value) for value in rounded]
    layer = make(kind, case, dtype="float32" if dtype == "float32" else f"mixed_{dtype}")
    layer.build([values[0].shape, values[1].shape])
    used = values if case["use_bias"] else values[:3]

    def function(x, routing, *variables):
        return layer.stateless_call(list(variables), [], [x, routing])[0]

    y, gradients = differentiate(function, used, upstream, mode)
    expected, towards = loop(kind, case, *values, upstream)
    # All are sums of products. The sum of the products' magnitudes is the scale of rounding.
    scale, scales = loop(kind, case, *map(np.abs, values), np.abs(upstream))
    for found, right, size in zip((y, *gradients), (expected, *towards), (scale, *scales), strict=False):
        found = ops.convert_to_numpy(ops.cast(found, "float32"))
        assert found.shape == right.shape
        assert np.abs(found - right).max() <= tolerance * max(size.max(), 1e-3)


SETTINGS = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(case=cases())
def test_output_and_gradients_are_those_of_the_loop(kind, mode, case):
    compare(kind, case, mode)


@pytest.mark.parametrize("mode", leading(MODES[1:] or MODES, 1))
@pytest.mark.parametrize("kind", KINDS)
@settings(SETTINGS, max_examples=5)
@given(case=cases())
def test_bfloat16_is_right_to_its_precision(kind, mode, case):
    # Half a unit of 8 bits for the kernel, one for the sum of products, one for the upstream gradient, and a reserve.
    compare(kind, case, mode, "bfloat16", tolerance=4 * 2**-8)


CASE = {
    "kernel_size": (3, 5),
    "strides": (2, 1),
    "dilation_rate": (1, 1),
    "padding": "same",
    "num_experts": 3,
    "use_bias": True,
    "width": 2,
    "data_format": "channels_last",
    "batch": 4,
    "channels": 4,
    "size": (9, 8),
}


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 unless its process enables it")
@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    values, _ = drawn(kind, CASE)
    layer = make(kind, CASE, dtype="float64")
    layer.build([value.shape for value in values[:2]])
    layer.set_weights(values[2:])
    y = layer([ops.convert_to_tensor(value, "float64") for value in values[:2]])
    expected = loop(kind, CASE, *values)[0]
    assert keras.backend.standardize_dtype(y.dtype) == "float64"
    # On PyTorch, Keras multiplies matrices in float32.
    bound = 1e-12 if BACKEND == "tensorflow" else 1e-6
    assert np.abs(ops.convert_to_numpy(y) - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_integers_count_as_numbers(kind):
    """Pixels as they are decoded, and a routing that selects one expert."""
    (_, _, *variables), _ = drawn(kind, CASE)
    x = np.random.default_rng(0).integers(0, 256, (4, 9, 8, 4), "uint8")
    routing = np.eye(3, dtype="int32")[[0, 2, 1, 1]]
    layer = make(kind, CASE)
    layer.build([x.shape, routing.shape])
    layer.set_weights(variables)
    y = ops.convert_to_numpy(layer([ops.convert_to_tensor(value) for value in (x, routing)]))
    expected = loop(kind, CASE, x, routing, *variables)[0]
    assert y.dtype == "float32" and np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_first_computes_the_same(kind):
    (x, routing, *variables), _ = drawn(kind, CASE)
    found = []
    for data_format, order in (("channels_last", (0, 1, 2, 3)), ("channels_first", (0, 3, 1, 2))):
        layer = make(kind, CASE | {"data_format": data_format})
        inputs = [x.transpose(order), routing]
        layer.build([value.shape for value in inputs])
        layer.set_weights(variables)
        y = ops.convert_to_numpy(layer(inputs))
        assert y.shape == layer.compute_output_shape([value.shape for value in inputs])
        found.append(y if data_format == "channels_last" else y.transpose(0, 2, 3, 1))
    assert np.array_equal(*found)


@pytest.mark.parametrize(("side", "channels", "width"), [(1, 4, 2), (12, 4, 2), (14, 480, None)])
@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_independent(kind, side, channels, width):
    """To 1e-6: in another order, among other examples, and alone. Also at the size of the published nets."""
    case = CASE | {"batch": 7, "size": (side, side), "strides": (1, 1), "channels": channels}
    if width is None:
        case |= {"kernel_size": (1, 1), "width": 80} if kind == "conv" else {"kernel_size": (5, 5), "width": 1}
    (x, routing, *variables), _ = drawn(kind, case)
    layer = make(kind, case)
    layer.build([x.shape, routing.shape])
    layer.set_weights(variables)

    def call(x, routing):
        return ops.convert_to_numpy(layer([ops.convert_to_tensor(x), ops.convert_to_tensor(routing)]))

    y, order = call(x, routing), np.random.default_rng(1).permutation(7)
    assert np.abs(call(x[order], routing[order]) - y[order]).max() < 1e-6 * np.abs(y).max()
    others, weights = x + 1, routing / 2
    others[2], weights[2] = x[2], routing[2]
    assert np.abs(call(others, weights)[2] - y[2]).max() < 1e-6 * np.abs(y).max()
    assert np.abs(call(x[2:3], routing[2:3])[0] - y[2]).max() < 1e-6 * np.abs(y).max()


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_of_weight_1_is_the_ordinary_layer(kind):
    case = CASE | {"num_experts": 1, "strides": (1, 1)}
    (x, routing, kernel, bias), _ = drawn(kind, case)
    layer = make(kind, case, activation="relu")
    layer([x, np.ones_like(routing)])
    layer.set_weights([kernel, bias])
    arguments = {"padding": "same", "activation": "relu"}
    plain = (
        keras.layers.Conv2D(2, (3, 5), **arguments)
        if kind == "conv"
        else keras.layers.DepthwiseConv2D((3, 5), depth_multiplier=2, **arguments)
    )
    plain.build(x.shape)
    plain.set_weights([kernel[0], bias[0]])
    expected = ops.convert_to_numpy(plain(x))
    assert np.abs(ops.convert_to_numpy(layer([x, np.ones_like(routing)])) - expected).max() < 1e-5


def routed(**kwargs) -> keras.Model:
    """Builds a user's functional model: any size, one routing for two layers."""
    inputs = keras.Input((None, None, 3))
    routing = keras.layers.Dense(4, activation="sigmoid")(keras.layers.GlobalAveragePooling2D()(inputs))
    x = ke.CondConv2D(8, 3, num_experts=4, padding="same", activation="relu", **kwargs)([inputs, routing])
    x = ke.DepthwiseCondConv2D(5, num_experts=4, strides=2, padding="same")([x, routing])
    return keras.Model(inputs, keras.layers.GlobalMaxPooling2D()(x))


def test_any_batch_size_with_a_last_partial_one():
    model = routed()
    x = np.random.default_rng(0).random((5, 11, 6, 3), "float32")
    whole = run(model, x)
    assert model.output_shape == (None, 8) and whole.shape == (5, 8)
    for size in (1, 2, 3, 5):
        found = model.predict(x, batch_size=size, verbose=0)
        assert np.abs(found - whole).max() < 1e-6 * np.abs(whole).max()


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_users_model_learns_and_is_saved(dtype, tmp_path):
    keras.utils.set_random_seed(0)
    body = routed(dtype=dtype, kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(1, axis=[0, 1, 2]))
    model = keras.Sequential([body, keras.layers.Dense(1, dtype="float32")])
    x = np.random.default_rng(0).random((16, 8, 8, 3), "float32")
    y = x.mean((1, 2, 3))[:, None]
    model.compile(keras.optimizers.Adam(0.01), "mse")
    before = [np.array(value) for value in model.get_weights()]
    losses = model.fit(x, y, batch_size=6, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert not any(np.array_equal(*pair) for pair in zip(model.get_weights(), before, strict=True))
    layer = next(layer for layer in body.layers if isinstance(layer, ke.CondConv2D))
    assert layer.kernel.dtype == "float32" and layer.compute_dtype == dtype.removeprefix("mixed_")
    norms = np.sqrt((np.square(ops.convert_to_numpy(layer.kernel))).sum((1, 2, 3)))
    assert norms.shape == (4, 8) and norms.max() <= 1 + 1e-6  # for every filter of every expert
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(run(again, x), run(model, x))
    assert again.layers[0].get_layer(layer.name).get_config() == layer.get_config()


@pytest.mark.parametrize("kind", KINDS)
def test_regularizers_and_constraints_are_of_each_expert(kind):
    role = "kernel" if kind == "conv" else "depthwise"
    seen = []

    def recorded(kernel):
        seen.append(tuple(kernel.shape))
        return ops.sum(ops.square(kernel))

    layer = make(kind, CASE, **{f"{role}_regularizer": recorded, f"{role}_constraint": "non_neg"})
    layer.build([(None, 9, 8, 4), (None, 3)])
    kernel = ops.convert_to_numpy(layer.kernel)
    (loss,) = layer.losses
    assert set(seen) == {kernel.shape[1:]} and ops.convert_to_numpy(loss) == pytest.approx((kernel**2).sum(), rel=1e-5)
    layer.kernel.assign(layer.kernel.constraint(layer.kernel))
    assert np.array_equal(ops.convert_to_numpy(layer.kernel), np.maximum(kernel, 0))


@pytest.mark.parametrize("drawn_by", ["keras", "numpy"])
@pytest.mark.parametrize("seed", [None, 3, "generator"])
def test_each_expert_is_drawn_as_its_own_kernel(drawn_by, seed):
    seed = keras.random.SeedGenerator(3) if seed == "generator" else seed
    initializer = keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal", seed=seed)
    layer = ke.CondConv2D(64, 3, num_experts=4, kernel_initializer=initializer)
    shapes = [(1, 8, 8, 32), (1, 4)]
    initializers.apply(layer, [ops.ones(shape) for shape in shapes]) if drawn_by == "numpy" else layer.build(shapes)
    kernels = ops.convert_to_numpy(layer.kernel)
    for expert, kernel in enumerate(kernels):
        assert kernel.var() == pytest.approx(2 / (9 * 64), rel=0.05)
        assert not any(np.array_equal(kernel, other) for other in kernels[:expert])
        assert abs(np.corrcoef(kernel.ravel(), kernels[expert - 1].ravel())[0, 1]) < 0.05
    if seed == 3 and drawn_by == "keras":
        assert np.array_equal(kernels[0], ops.convert_to_numpy(initializer((3, 3, 32, 64))))


def test_experts_of_neighbouring_seeds_differ():
    kernels = []
    for seed in (0, 1, 2) if BACKEND == "jax" else (-1, 0, 1):  # JAX accepts no negative seeds
        layer = ke.CondConv2D(4, 3, num_experts=3, kernel_initializer=keras.initializers.GlorotUniform(seed))
        layer.build([(1, 8, 8, 2), (1, 3)])
        kernels += list(ops.convert_to_numpy(layer.kernel))
    assert len({kernel.tobytes() for kernel in kernels}) == 9


def test_an_initializer_of_the_users_own_needs_no_more_than_a_seed():
    class Mine(keras.initializers.Initializer):
        seed = 3

        def __call__(self, shape, dtype=None):
            return keras.random.normal(shape, dtype=dtype, seed=self.seed)

    layer = ke.CondConv2D(4, 3, num_experts=2, kernel_initializer=Mine())
    layer.build([(1, 8, 8, 2), (1, 2)])
    first, second = ops.convert_to_numpy(layer.kernel)
    assert np.array_equal(first, ops.convert_to_numpy(Mine()((3, 3, 2, 4)))) and not np.array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_rebuilds_the_layer(kind):
    role = "kernel" if kind == "conv" else "depthwise"
    layer = make(
        kind,
        CASE,
        activation="silu",
        name="mine",
        dtype="mixed_bfloat16",
        **{f"{role}_regularizer": "l1", "bias_constraint": "non_neg"},
    )
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert keras.saving.get_registered_name(type(layer)) == f"keras_effnet>{type(layer).__name__}"
    assert again.compute_output_shape([(None, 9, None, 4), (None, 3)]) == (None, 5, None, 2 if kind == "conv" else 8)


LOAD = """
import sys, numpy as np
{imports}
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], keras.ops.convert_to_numpy(model(np.load(sys.argv[2]))))
"""


@pytest.mark.parametrize(
    "imports",
    ["import keras, keras_effnet", pytest.param("import keras_effnet, keras", marks=pytest.mark.long)],
)
def test_a_fresh_process_loads_a_model_with_these_layers(imports, tmp_path):
    model = routed()
    x = np.random.default_rng(0).random((2, 8, 8, 3), "float32")
    np.save(tmp_path / "x.npy", x)
    model.save(tmp_path / "model.keras")
    paths = [str(tmp_path / name) for name in ("model.keras", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", LOAD.format(imports=imports), *paths], check=True, capture_output=True)
    assert np.abs(np.load(tmp_path / "y.npy") - run(model, x)).max() < 1e-6


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has only one order of computation")
def test_second_derivatives_do_not_depend_on_the_way(monkeypatch):
    case = CASE | {"strides": (2, 2), "use_bias": False}
    (x, routing, kernel, _), upstream = drawn("depthwise", case)
    layer = make("depthwise", case)
    layer.build([x.shape, routing.shape])

    def penalty(x, kernel):
        """Returns the gradient, by the kernel, of the squared gradient of the input, as in a gradient penalty."""
        if BACKEND == "tensorflow":
            import tensorflow as tf

            x, kernel = tf.constant(x), tf.constant(kernel)
            with tf.GradientTape() as outer:
                outer.watch(kernel)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = layer.stateless_call([kernel], [], [x, routing])[0]
                    loss = tf.reduce_sum(y**2 * upstream)
                total = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            return outer.gradient(total, kernel).numpy()
        import torch

        x, kernel = torch.tensor(x, requires_grad=True), torch.tensor(kernel, requires_grad=True)
        y = layer.stateless_call([kernel], [], [x, torch.tensor(routing)])[0]
        (first,) = torch.autograd.grad((y**2 * torch.tensor(upstream)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), kernel)
        return second.numpy()

    found = penalty(x, kernel)
    monkeypatch.setattr(condconv, "_fold_examples", lambda *args, **kwargs: False)
    expected = penalty(x, kernel)
    assert np.abs(expected).max() > 1 and np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.usefixtures("shallow")
def test_a_replicas_training_step_compiles_under_xla_with_static_shapes():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():  # in float64, since batch norm over few values magnifies rounding
        rates = {"drop_connect_rate": 0, "dropout_rate": 0, "dtype": "float64"}
        model = fill(ke.EfficientNetCondConvB0x4(weights=None, input_shape=(32, 32, 3), classes=10, **rates))
    x, y = tf.constant(image(32, 4), "float64"), tf.constant([0, 1, 2, 3])

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x, training=True)))
        return loss, tape.gradient(loss, [weight.value for weight in model.trainable_weights])

    compiled = tf.function(lambda x, y: strategy.run(step, (x, y)), jit_compile=True)
    loss, gradients = compiled(x, y)
    entry = compiled.experimental_get_compiler_ir(x, y)(stage="hlo").split("ENTRY")[1].split("\n")[0]
    assert "f64[4,32,32,3]" in entry and "<=" not in entry  # "<=" marks the bound of a dynamic size
    expected_loss, expected = tf.function(lambda x, y: strategy.run(step, (x, y)))(x, y)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-9)
    # A shift before the next batch normalization has no effect. Its gradient is rounding of others, of 1e3.
    rounding = 1e-15 * max(np.abs(right).max() for right in expected)
    for found, right in zip(gradients, expected, strict=True):
        assert np.abs(found - right).max() <= 1e-8 * np.abs(right).max() + rounding


@pytest.mark.skipif(BACKEND != "torch", reason="the other backends compile with XLA")
def test_a_compiled_layer_computes_the_same():
    import torch

    (x, routing, *variables), _ = drawn("depthwise", CASE)
    layer = make("depthwise", CASE)
    layer.build([x.shape, routing.shape])
    layer.set_weights(variables)
    compiled = torch.compile(lambda x, routing: layer([x, routing]), fullgraph=True, backend="aot_eager")
    for size in (4, 3):
        values = [torch.tensor(value[:size]) for value in (x, routing)]
        expected = layer(values)
        assert (compiled(*values) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_built_layer_refuses_other_inputs():
    layer = ke.DepthwiseCondConv2D(3, 4)
    layer([np.ones((1, 8, 8, 3)), np.ones((1, 4))])
    for shapes in ([(1, 8, 8, 4), (1, 4)], [(1, 8, 8, 3), (1, 5)], [(1, 8, 8), (1, 4)]):
        with pytest.raises(ValueError, match="incompatible"):
            layer([np.ones(shape) for shape in shapes])


WRONG = {
    "filters": (lambda: ke.CondConv2D(0, 3, 4), "filters to be a positive integer"),
    "kernel size": (lambda: ke.CondConv2D(8, (3, 3, 3), 4), "kernel_size to be a positive integer or a pair"),
    "strides": (lambda: ke.DepthwiseCondConv2D(3, 4, strides=0), "strides to be a positive"),
    "experts": (lambda: ke.DepthwiseCondConv2D(3, 2.5), "num_experts to be a positive integer"),
    "padding": (lambda: ke.CondConv2D(8, 3, 4, padding="sane"), "Nearest: 'same'"),
    "data format": (lambda: ke.CondConv2D(8, 3, 4, data_format="NHWC"), "channels_last, channels_first"),
    "no routing": (lambda: ke.CondConv2D(8, 3, 4)(np.ones((1, 8, 8, 3))), "a list of images of rank 4 and routing"),
    "routing": (lambda: ke.CondConv2D(8, 3, 4)([np.ones((1, 8, 8, 3)), np.ones((1, 5))]), "num_experts=4. Received: 5"),
    "rank": (lambda: ke.CondConv2D(8, 3, 4)([np.ones((1, 8, 3)), np.ones((1, 4))]), "rank 4"),
    "channels": (lambda: ke.CondConv2D(8, 3, 4)([keras.Input((8, 8, None)), keras.Input((4,))]), "number of channels"),
    "examples": (
        lambda: ke.CondConv2D(8, 3, 4)([np.ones((2, 8, 8, 3)), np.ones((1, 4))]),
        "2 examples. Received: 1",
    ),
    "symbolic examples": (
        lambda: ke.CondConv2D(8, 3, 4)([keras.Input((8, 8, 3), batch_size=2), keras.Input((4,), batch_size=3)]),
        "2 examples. Received: 3",
    ),
    "too small": (lambda: ke.CondConv2D(8, 3, 4)([np.ones((1, 2, 8, 3)), np.ones((1, 4))]), "spans 3. Received: 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_told(case):
    call, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected) as caught:
        call()
    assert "Received" in str(caught.value)

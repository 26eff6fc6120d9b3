"""Times mixed experts: our CondConv models, our plain B0, the form of the original code and, if installed, timm's.

    python benchmarks/condconv.py                 # inference of 32 images and training steps of 16, in turn
    python benchmarks/condconv.py --growth docs/condconv.svg
    python benchmarks/condconv.py --plans         # what `keras_effnet/nets/condconv.py` chooses between, by layer

`--backend` sets the backend of Keras. Each model runs in a separate process, since the threads of the libraries would
slow each other down, and computes only in its turn. Ratios are taken within a round. timm (`pip install timm`) is timed
with channels last, which is faster here, and with `--compile` also through torch.compile.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import click
import numpy as np
from timing import seconds, spread, told

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

B0, SMALL, LARGE = "efficientnet-b0", "efficientnet-condconv-b0-4e", "efficientnet-condconv-b0-8e"
TIMM = "tf_efficientnet_cc_b0_8e"


@contextmanager
def one_example_at_a_time():
    """Computes both layers as the original code does: splits the batch, and convolves each example separately."""
    from keras import ops

    from keras_effnet.nets import condconv

    def convolve(self, x, routing):
        depthwise = isinstance(self, condconv.DepthwiseCondConv2D)
        convolution = ops.depthwise_conv if depthwise else ops.conv
        kernels: Any = ops.tensordot(routing, self.kernel, 1)
        outputs = [
            convolution(x[i : i + 1], kernels[i], self.strides, self.padding, data_format="channels_last")
            for i in range(x.shape[0])
        ]
        return ops.concatenate(outputs, axis=0)

    classes = (condconv.CondConv2D, condconv.DepthwiseCondConv2D)
    ours = [one._convolve for one in classes]
    for one in classes:
        one._convolve = convolve
    try:
        yield
    finally:
        for one, method in zip(classes, ours, strict=True):
            one._convolve = method


def compiled(function: Callable, variables: list, arguments: tuple, train: bool) -> Callable[[], object]:
    """Returns a call of the usual kind for the backend: a graph, a jitted function, or eager PyTorch.

    `function(*arguments)` returns the outputs, or with `train` the loss. It reads `variables`, which a step updates.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def graph(*arguments):
            if not train:
                return function(*arguments)
            with tf.GradientTape() as tape:
                loss = function(*arguments)
            slopes: Any = tape.gradient(loss, [v.value for v in variables])
            for variable, slope in zip(variables, slopes, strict=True):
                variable.assign_sub(0.01 * slope)
            return loss

        constants = [tf.constant(argument) for argument in arguments]
        return lambda: graph(*constants).numpy()
    if backend == "jax":
        import jax
        from keras import StatelessScope

        def pure(values, *arguments):
            with StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*arguments)

        gradient: Any = jax.grad(pure)

        def step(values, *arguments):
            return jax.tree.map(lambda value, slope: value - 0.01 * slope, values, gradient(values, *arguments))

        jitted = jax.jit(step if train else pure)
        values, arrays = [v.value for v in variables], [jax.numpy.asarray(a) for a in arguments]
        return lambda: jax.block_until_ready(jitted(values, *arrays))
    return eager(function, [v.value for v in variables], arguments, train)


def eager(function: Callable, parameters: list, arguments: tuple, train: bool) -> Callable[[], object]:
    import torch

    tensors = [torch.from_numpy(argument) for argument in arguments]
    optimizer = torch.optim.SGD(parameters, 0.01)

    def call():
        if not train:
            with torch.no_grad():
                return function(*tensors)
        optimizer.zero_grad()
        function(*tensors).backward()
        return optimizer.step()

    return call


def within(context: Callable, call: Callable[[], object]) -> Callable[[], object]:
    """Runs each call in a context, so that a traced function is traced in it, and an eager one runs in it."""

    def inside():
        with context():
            return call()

    return inside


def images(batch: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return 255 * generator.random((batch, 224, 224, 3), "float32"), generator.integers(0, 1000, batch)


def ours(name: str, batch: int, train: bool) -> Callable[[], object]:
    import keras

    import keras_effnet as ke

    model = ke.create_model(name, weights=None, classifier_activation=None)

    def loss(x, y):
        losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
        return keras.ops.mean(losses)

    x, y = images(batch)
    if train:
        return compiled(loss, model.trainable_variables, (x, y), True)
    return compiled(lambda x: model(x, training=False), model.trainable_variables, (x,), False)


def theirs(batch: int, train: bool, compile_it: bool) -> Callable[[], object]:
    import torch

    timm = import_module("timm")
    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = timm.create_model(TIMM, drop_rate=0.25, drop_path_rate=0.2).to(memory_format=torch.channels_last)
    model = model.train() if train else model.eval()
    parameters = list(model.parameters())
    if compile_it:
        model = torch.compile(model)

    def function(x, *y):
        x = x.permute(0, 3, 1, 2)  # channels last in memory
        return torch.nn.functional.cross_entropy(model(x), *y) if train else model(x)

    x, y = images(batch)
    return eager(function, parameters, (x / 255, y) if train else (x / 255,), train)


class Worker:
    """A process that builds a model, and runs it on request."""

    _call: Any  # set in the process only

    def __init__(self, backend: str, make: Callable[..., Callable[[], object]], *arguments):
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), self._build, (backend, make, arguments))

    @classmethod
    def _build(cls, backend, make, arguments) -> None:
        os.environ["KERAS_BACKEND"] = backend
        cls._call = staticmethod(make(*arguments))

    @classmethod
    def _seconds(cls) -> float:
        return seconds(cls._call)

    def __call__(self) -> float:
        return self._pool.submit(self._seconds).result()

    def stop(self) -> None:
        self._pool.shutdown()


def in_turn(workers: dict[Any, Any], rounds: int, warm: int = 3) -> dict[Any, list[float]]:
    """Returns the seconds of each worker, by round. A call of a worker returns its seconds."""
    for worker in workers.values():
        for _ in range(warm):
            worker()
    found: dict[Any, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker())
    for worker in workers.values():
        if isinstance(worker, Worker):
            worker.stop()
    return found


def original(*arguments) -> Callable[[], object]:
    return within(one_example_at_a_time, ours(*arguments))


def nets(backend: str, batch: int, train: bool, rounds: int, compile_timm: bool) -> dict[str, dict[str, dict]]:
    workers = {name: Worker(backend, ours, name, batch, train) for name in (B0, SMALL, LARGE)}
    workers[f"{LARGE}, one example at a time"] = Worker(backend, original, LARGE, batch, train)
    if find_spec("timm"):
        workers[f"timm {TIMM}"] = Worker(backend, theirs, batch, train, False)
        if compile_timm:
            workers[f"timm {TIMM}, torch.compile"] = Worker(backend, theirs, batch, train, True)
    else:
        click.echo("timm is not installed: its model is not timed", err=True)
    times = in_turn(workers, rounds)
    per_image = {name: [1e3 * one / batch for one in found] for name, found in times.items()}
    return {
        name: {
            "ms_per_image": spread(found),
            "over_b0": spread([a / b for a, b in zip(found, per_image[B0], strict=True)]),
            "over_8e": spread([a / b for a, b in zip(found, per_image[LARGE], strict=True)]),
        }
        for name, found in per_image.items()
    }


def with_experts(number: int, batch: int) -> Callable[[], object]:
    from keras_effnet.nets import variants

    row = variants.VARIANTS[LARGE]
    stages = tuple(replace(stage, num_experts=number) if stage.num_experts else stage for stage in row.stages)
    variants.VARIANTS[LARGE] = replace(row, stages=stages)
    return ours(LARGE, batch, False)


def growth(backend: str, path: str, rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """Plots milliseconds per image over the batch size, and over the number of experts at batch 32."""
    from matplotlib.figure import Figure

    batches, experts = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16)
    found: dict[str, dict[int, dict[str, float]]] = {B0: {}, SMALL: {}, LARGE: {}, "experts": {}}
    for batch in batches:
        times = in_turn({name: Worker(backend, ours, name, batch, False) for name in (B0, SMALL, LARGE)}, rounds)
        for name, values in times.items():
            found[name][batch] = spread([1e3 * one / batch for one in values])
    times = in_turn({number: Worker(backend, with_experts, number, 32) for number in experts}, rounds)
    found["experts"] = {number: spread([1e3 * one / 32 for one in values]) for number, values in times.items()}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in ((B0, "#8c8c8c"), (SMALL, "#d99bc6"), (LARGE, "#b85c9a")):
        draw(left, found[name], colour, name)
    draw(right, found["experts"], "#b85c9a", f"{LARGE} with other numbers of experts, batch 32")
    right.axhline(found[B0][32]["median"], color="#8c8c8c", linestyle=":", label=f"{B0}, batch 32")
    for axes, label in ((left, "batch size"), (right, "experts")):
        axes.set(xscale="log", xlabel=label, ylabel="ms per image", ylim=(0, None))
        axes.set_xticks(batches if axes is left else experts)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(color="#eeeeee", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)
    return found


def draw(axes, points: dict[int, dict[str, float]], colour: str, label: str) -> None:
    median = [point["median"] for point in points.values()]
    axes.plot(list(points), median, "o-", color=colour, markersize=4, label=label)
    low, high = ([point[end] for point in points.values()] for end in ("min", "max"))
    axes.fill_between(list(points), low, high, color=colour, alpha=0.2, linewidth=0)


@contextmanager
def answered(choice: str, answer: bool):
    """Fixes one of the two choices that the layers make."""
    from keras_effnet.nets import condconv

    chosen = getattr(condconv, choice)
    setattr(condconv, choice, lambda *args, **kwargs: answer)
    try:
        yield
    finally:
        setattr(condconv, choice, chosen)


def plans(rounds: int) -> list[dict[str, Any]]:
    """Returns the milliseconds of each layer with both choices, for forward alone and with backward."""
    import keras
    from keras import ops

    from keras_effnet.nets import condconv

    rows = []
    for batch in (1, 32):
        cases = [
            ((side, side, 192), condconv.CondConv2D(1152, 1, experts, use_bias=False), experts, "_mix_kernels")
            for experts in (2, 8)
            for side in (1, 2, 3, 4, 6, 8)
        ]
        cases += [
            (shape, condconv.DepthwiseCondConv2D(size, 8, strides, "same", use_bias=False), 8, "_fold_examples")
            for shape, size, strides in (((14, 14, 672), 5, 1), ((14, 14, 672), 5, 2), ((7, 7, 1152), 3, 1))
            if keras.backend.backend() != "jax"  # no choice on JAX
        ]
        for shape, layer, experts, choice in cases:
            generator = np.random.default_rng(0)
            x = generator.standard_normal((batch, *shape)).astype("float32")
            routing = generator.random((batch, experts)).astype("float32")
            layer.build([x.shape, routing.shape])
            calls = {}
            for answer in (True, False):
                for train in (False, True):

                    def function(x, routing, layer=layer, train=train):
                        y = layer([x, routing])
                        return ops.mean(y * y) if train else y

                    call = compiled(function, [layer.kernel], (x, routing), train)
                    calls[answer, train] = partial(seconds, within(partial(answered, choice, answer), call))
            times = in_turn(calls, rounds)
            for train in (False, True):
                yes, no = (spread([1e3 * one for one in times[answer, train]]) for answer in (True, False))
                row = {"layer": type(layer).__name__, "batch": batch, "input": shape, "experts": experts}
                rows.append(row | {"question": choice, "train": train, "yes_ms": yes, "no_ms": no})
    return rows


@click.command()
@click.option("--backend", type=click.Choice(["tensorflow", "jax", "torch"]), default="tensorflow", show_default=True)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds, each of all models.")
@click.option("--compile", "compile_timm", is_flag=True, help="Also time timm's model through torch.compile.")
@click.option("--growth", "picture", type=click.Path(), help="Plot the time over batch sizes and experts to this file.")
@click.option("--plans", "layerwise", is_flag=True, help="Time each layer with both of its choices.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(backend, rounds, compile_timm, picture, layerwise, as_json) -> None:
    """Time mixed experts against plain convolutions, the form of the original code, and timm."""
    os.environ["KERAS_BACKEND"] = backend
    report: dict[str, Any] = {"backend": backend, "rounds": rounds, "cores": os.cpu_count()}
    if layerwise:
        report["plans"] = plans(rounds)
    elif picture:
        report["growth"] = growth(backend, picture, rounds)
    else:
        for what, batch, train in (("inference", 32, False), ("training step", 16, True)):
            report[what] = nets(backend, batch, train, rounds, compile_timm)
            if not as_json:
                click.echo(f"{what}, {backend}, batch {batch}: ms per image, ratio to B0, ratio to condconv-b0-8e")
                for name, row in report[what].items():
                    click.echo(f"  {name:55} " + "   ".join(told(values) for values in row.values()))
    if as_json or layerwise or picture:
        click.echo(json.dumps(report, indent=None if layerwise and not as_json else 2))


if __name__ == "__main__":
    main()

"""Times a training step of B0: ours, keras.applications' and timm's; and what our loop adds to a bare step.

    python benchmarks/train.py                            # 6 minutes on two cores
    python benchmarks/train.py --timm-python PATH         # the interpreter of an environment with timm
    python benchmarks/train.py --only jax                 # the loop of the runner on JAX: 5 minutes

With `--timm-python`, timm (`pip install timm`) may be installed in another environment. The default is this one. If
timm is not installed, its model is skipped with a message.

The first part times training steps of B0 at 224 pixels, with 16 images, float32, 1000 classes, and always the same
batch, in memory:

- ours: `tensorflow_runner.Trainer.train()` with the settings of the recipe b0_baseline: RMSprop, label smoothing,
  weight decay, dropout and drop connect, top-1 and top-5, and the moving average of all variables. It is timed again
  with `--run.deterministic`.
- keras.applications: `fit()` with RMSprop and momentum, cross entropy, dropout and drop connect. The first step of each
  call of `fit()` is not timed.
- timm: eager PyTorch, channels last, with torch.optim.RMSprop and momentum, dropout and drop path.

Both peers do less than ours: no metrics, no moving average, no weight decay.

The second part times Lite0: the bare step, which is `tensorflow_runner.replica_step()` compiled and called, and the
same steps as `keras-effnet train` runs them: orbit's controller, an iterator of the same batch, metrics, TensorBoard
files and the log, with 20 steps per loop. The third part does the same on JAX, with images of 96 pixels, since the step
that XLA compiles takes longer on a processor. There, the bare step is `jax_runner.train_step()`, whose result is not
read.

Each model runs in a separate process, since the threads of the libraries would slow each other down, and computes only
in its turn. Ratios are taken within a round. Besides the wall time, the time of all cores is reported, since a core of
a shared machine may be missing for a while.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
import numpy as np
from timing import spread, told

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIZE, BATCH, CLASSES = int(os.environ.get("BENCHMARK_SIZE", "224")), 16, 1000
OURS, APPLICATIONS, TIMM, BARE, LOOP = "ours", "keras.applications", "timm", "bare step", "our loop"
DETERMINISTIC = "ours, deterministic"

Run = Callable[[int], tuple[float, float]]  # from a number of steps to wall time and core time, in seconds


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def clocked(function: Callable[[int], object]) -> Run:
    def run(steps):
        start = clocks()
        function(steps)
        wall, processor = clocks() - start
        return wall, processor

    return run


def batch(size: int = SIZE, count: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, size, size, 3), "uint8")
    return images, generator.integers(0, CLASSES, count).astype("int32")


def prepared(name: str, size: int = SIZE, count: int = BATCH, precision: str = "float32", xla: bool = False):
    """Returns what `keras_effnet.tpu.train` sets up before its loop."""
    import keras
    import orbit
    import tensorflow as tf

    from keras_effnet.tpu.config import Model, Recipe
    from keras_effnet.tpu.model_from_recipe import build, make_learner
    from keras_effnet.tpu.train import runner

    recipe = Recipe(Model(name, image_size=size), batch_size=count)
    machine = runner.connect(recipe.run)
    with machine.scope():
        keras.utils.set_random_seed(0)
        model = machine.adapted(build(recipe, CLASSES, precision), 1)
        learner = make_learner(model, recipe, 1_281_167 / count, 28_000_000)
        state = machine.variables(learner)
    step = orbit.utils.create_global_step()

    def batches():
        return iter(machine.batches(lambda host, parts, python: tf.data.Dataset.from_tensors(rows).repeat()))

    rows = batch(size, count)
    return machine, learner, state, step, machine.trainer(learner, state, step, batches, count, xla)


def ours() -> dict[str, Run]:
    import tensorflow as tf

    *_, trainer = prepared("efficientnet-b0")
    return {OURS: clocked(lambda steps: trainer.train(tf.constant(steps)))}


def deterministic() -> dict[str, Run]:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    return {DETERMINISTIC: ours()[OURS]}


def applications() -> dict[str, Run]:
    import keras
    import tensorflow as tf

    networks: Any = keras.applications
    model = networks.EfficientNetB0(weights=None, classes=CLASSES)
    optimizer = keras.optimizers.RMSprop(0.016 * BATCH / 256, rho=0.9, momentum=0.9, epsilon=1e-3)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    images, labels = batch()
    data = tf.data.Dataset.from_tensors((images.astype("float32"), labels)).repeat()

    class Times(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(clocks())

    def run(steps):
        times = Times()
        model.fit(data, steps_per_epoch=steps + 1, epochs=1, shuffle=False, verbose=0, callbacks=[times])
        wall, processor = times.ends[-1] - times.ends[0]
        return wall, processor

    return {APPLICATIONS: run}


def timm() -> dict[str, Run]:
    import torch

    library: Any = import_module("timm")  # by name, since the package is not a dependency
    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = library.create_model("efficientnet_b0", drop_rate=0.2, drop_path_rate=0.2)
    model = model.to(memory_format=torch.channels_last).train()
    rate = 0.016 * BATCH / 256
    optimizer = torch.optim.RMSprop(model.parameters(), rate, alpha=0.9, eps=1e-3, momentum=0.9)
    images, labels = batch()
    # Channels last in memory.
    pixels, targets = torch.from_numpy(images / np.float32(255)).permute(0, 3, 1, 2), torch.from_numpy(labels).long()

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), targets).backward()
            optimizer.step()

    return {TIMM: clocked(train)}


def bare_on_tensorflow(learner, state) -> Callable[[int], None]:
    import tensorflow as tf

    from keras_effnet.tpu.runners.tensorflow_runner import replica_step

    one = tf.function(replica_step(learner, state, BATCH))
    images, labels = (tf.constant(part) for part in batch())

    def bare(steps):
        for number in range(steps):
            one(images, labels, tf.constant(number))

    return bare


def bare_on_jax(machine, learner) -> Callable[[int], None]:
    import jax

    from keras_effnet.tpu.runners.jax_runner import train_step

    one, kept = train_step(learner, machine.mesh, BATCH), machine.variables(learner)
    images, labels = (jax.device_put(part) for part in batch())

    def bare(steps):
        for number in range(steps):
            kept.state, _ = one(kept.state, images, labels, np.int32(number), np.zeros(1, np.float32))
        jax.block_until_ready(kept.state)

    return bare


def loop() -> dict[str, Run]:
    import orbit

    from keras_effnet.tpu.reports.progress import Log

    machine, learner, state, step, trainer = prepared("efficientnet-lite0")
    bare = bare_on_jax(machine, learner) if machine.strategy is None else bare_on_tensorflow(learner, state)

    def looped(steps):
        with contextlib.redirect_stdout(log.text):  # as in train(), since orbit prints its progress
            controller.train(int(step.numpy()) + steps, checkpoint_at_completion=False)

    workdir = tempfile.mkdtemp(dir=sys.argv[-1])
    log = Log(workdir, BATCH, 28_000_000, quiet=True)
    controller = orbit.Controller(
        strategy=machine.strategy,
        trainer=trainer,
        global_step=step,
        steps_per_loop=20,
        summary_dir=f"{workdir}/tensorboard",
        train_actions=[lambda metrics: log.trained(int(step.numpy()), metrics)],
    )
    log.begin()
    return {BARE: clocked(bare), LOOP: clocked(looped)}


PROCESSES = {
    "ours": ours,
    "deterministic": deterministic,
    "applications": applications,
    "timm": timm,
    "loop": loop,
}


def serve(name: str) -> None:
    """Runs in a worker: reads a name and a number of steps per line, runs them, and answers with the seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers
    runs = PROCESSES[name]()
    for line in sys.stdin:
        what, steps = json.loads(line)
        print(json.dumps(runs[what](steps)), file=answers, flush=True)


class Worker:
    """A process that trains a model on request."""

    def __init__(self, name: str, python: str, folder: str, **more: str):
        command, pipe = [python, __file__, "serve", name, folder], subprocess.PIPE
        # For PyTorch: while a core is missing, threads that wait actively make a step 10 times as long.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **more}
        self._process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __call__(self, what: str, steps: int) -> list[float]:
        """Returns wall time and core time per step, in seconds."""
        self._process.stdin.write(json.dumps([what, steps]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"Expected the seconds of {what}. Received: nothing, since its process ended")
        return [value / steps for value in json.loads(line)]

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def in_turn(workers: dict[str, Worker], base: str, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the figures of each worker, and the ratios to `base`. The first round, which compiles, is not counted."""
    found: dict[str, list[list[float]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            times = worker(name, steps if number else 2)
            if number:
                found[name].append(times)
    for worker in {id(worker): worker for worker in workers.values()}.values():
        worker.stop()
    return {
        name: {
            "ms_per_step": spread([1e3 * wall for wall, _ in rows]),
            "core_ms_per_step": spread([1e3 * processor for _, processor in rows]),
            "ratio": spread([wall / other for (wall, _), (other, _) in zip(rows, found[base], strict=True)]),
            "core_ratio": spread([cost / other for (_, cost), (_, other) in zip(rows, found[base], strict=True)]),
            "ratio_of_medians": dict(zip(("wall", "cores"), medians(rows) / medians(found[base]), strict=True)),
        }
        for name, rows in found.items()
    }


def medians(rows: list[list[float]]) -> np.ndarray:
    return np.median(np.array(rows), axis=0)


def has_timm(python: str) -> bool:
    return not subprocess.run([python, "-c", "import timm"], capture_output=True).returncode


def table(title: str, base: str, rows: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table("median (least-most)", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ms/step", f"ratio to {base}", "core ms/step", f"ratio to {base}"):
        shown.add_column(column, justify="right")
    for name, row in rows.items():
        wall, cores, over, cores_over, _ = row.values()
        ratios = ("", "") if name == base else (told(over, 3), told(cores_over, 3))
        shown.add_row(name, told(wall, 0), ratios[0], told(cores, 0), ratios[1])
    Console(width=120).print(shown)
    for name, row in rows.items():
        if name != base:
            of = row["ratio_of_medians"]
            click.echo(f"  {name} to {base}, ratio of medians: {of['wall']:.3f}, by core time {of['cores']:.3f}")


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds of each part.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1), help="Steps per turn of a model.")
@click.option("--loops", default=1, show_default=True, type=click.IntRange(1), help="Loops of 20 steps per turn.")
@click.option("--timm-python", default=sys.executable, help="Interpreter that has timm. Default: this one.")
@click.option("--only", type=click.Choice(["nets", "loop", "jax"]), help="Run only this part.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(rounds, steps, loops, timm_python, only, as_json) -> None:
    """Time training steps of B0, and what our loop adds to a bare step."""
    report: dict[str, Any] = {"rounds": rounds, "cores": os.cpu_count(), "batch": BATCH, "size": SIZE}
    with tempfile.TemporaryDirectory() as folder:
        if only in (None, "nets"):
            workers = {OURS: Worker("ours", sys.executable, folder)}
            workers[DETERMINISTIC] = Worker("deterministic", sys.executable, folder)
            workers[APPLICATIONS] = Worker("applications", sys.executable, folder)
            if has_timm(timm_python):
                workers[TIMM] = Worker("timm", timm_python, folder)
            else:
                click.echo("timm is not installed: its model is not timed", err=True)
            report["nets"] = in_turn(workers, OURS, rounds, steps)
            if not as_json:
                table(f"Training step of B0, {SIZE} pixels, {BATCH} images", OURS, report["nets"])
        if only in (None, "loop"):
            worker = Worker("loop", sys.executable, folder)
            report["loop"] = in_turn({BARE: worker, LOOP: worker}, BARE, rounds, 20 * loops)
            if not as_json:
                table(f"Our loop, Lite0, {SIZE} pixels, {BATCH} images, 20 steps per loop", BARE, report["loop"])
        if only in (None, "jax"):
            worker = Worker("loop", sys.executable, folder, KERAS_BACKEND="jax", BENCHMARK_SIZE="96")
            report["jax"] = in_turn({BARE: worker, LOOP: worker}, BARE, rounds, 20 * loops)
            if not as_json:
                table(f"Our loop on JAX, Lite0, 96 pixels, {BATCH} images, 20 steps per loop", BARE, report["jax"])
    if as_json:
        click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        main()

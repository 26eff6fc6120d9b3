"""Plans a training or evaluation step for TPUs with the TPU compiler, which needs no TPU."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from keras_effnet import cache
from keras_effnet.ranges import check_fields
from keras_effnet.tpu.config import Recipe
from keras_effnet.tpu.environment import without_tpu
from keras_effnet.tpu.input.sources import open_source
from keras_effnet.tpu.model_from_recipe import build, make_learner, policy
from keras_effnet.tpu.planning import memory_traffic
from keras_effnet.tpu.recipes.finetune import decided
from keras_effnet.tpu.runners import jax_runner, jax_step
from keras_effnet.tpu.step import cross_replica


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs. All figures are per chip.

    Args:
        flops: Float, peak bfloat16 multiplications and additions per second.
        hbm: Integer, bytes of memory.
        bandwidth: Float, bytes per second between the memory and the chip.
        shapes: Tuple of strings, the topologies for rent.
        options: Dict, further options of the compiler. Defaults to none.
    """

    flops: float
    hbm: int
    bandwidth: float
    shapes: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")

_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, read in November 2026; v2: the table in JAX 0.10.2,
# jax/_src/pallas/mosaic/tpu_info.py. With megacore both cores of a v4 are one device, as in JAX on such machines.
CHIPS = {
    "v2": Chip(46e12, 16 * 2**30, 716e9, _FLAT),
    "v3": Chip(123e12, 32 * 2**30, 900e9, (*_FLAT, "16x32", "32x32")),
    "v4": Chip(275e12, 32 * 2**30, 1200e9, _CUBE, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, ("1x1", "2x2", "2x4", *_FLAT[1:])),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, _CUBE),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, ("1x1", "2x2", "2x4", *_FLAT[1:])),
}

# Less effort halves the compilation time. For keras.applications' B0 the figures are the same (docs/tpu.md).
_OPTIONS = {"exec_time_optimization_effort": -1.0}

# In the compiler's error for a program that does not fit: the memory used, and the memory available.
_SIZE = r"([\d.]+)([KMGT]?)"

_USED = re.compile(rf"{_SIZE}\)? (?:exceeds available HBM \(|of ){_SIZE}(?:\)| hbm)", re.IGNORECASE)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def topology(name: str) -> list[Any]:
    """Returns the devices of a TPU slice, to compile for.

    Args:
        name: String such as `"v5e:2x4"`, the generation and the layout of its chips.

    Returns:
        List of JAX devices. Nothing can run on them.

    Raises:
        ImportError: If libtpu, the compiler, is not installed.
        ValueError: If the compiler does not know the slice.

    Example:

    >>> from keras_effnet.tpu.planning.planner import topology
    >>> len(topology("v5e:2x4"))
    8
    """
    if not find_spec("libtpu"):
        raise ImportError("Expected libtpu, the TPU compiler. Install it with: pip install libtpu")
    without_tpu()
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise ValueError(f"Expected a topology of {', '.join(CHIPS)}, such as v5e:2x4. Received: {name!r}")
    chip = CHIPS[generation]
    options = dict(chip.options)
    if shape == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(f"{generation}:{shape}" for shape in chip.shapes)
        problem = str(error).splitlines()[0]
        raise ValueError(f"Expected a topology, such as one of: {known}. Received: {name!r} ({problem})") from error


@dataclass(frozen=True)
class Program:
    """A lowered step and its configuration."""

    lowered: Any
    steps: int | None  # in the whole recipe
    size: int
    precision: str


def lowered(
    recipe: Recipe, devices: list[Any], evaluation: bool = False, fused: str | Collection[str] | None = None
) -> Program:
    """Lowers the JAX runner's step for devices of `topology()`.

    Args:
        recipe: `Recipe`.
        devices: List of JAX devices.
        evaluation: Boolean, whether to lower the evaluation step. Defaults to False, the training step.
        fused: As in `jax_runner.Devices.adapted()`. Defaults to `recipe.run.fused`.

    Returns:
        `Program`.

    Raises:
        ValueError: If the devices cannot share the batch evenly.
    """
    count, size = len(devices), recipe.image_size
    recipe = _decided(recipe, count)
    if recipe.batch_size < 1 or recipe.batch_size % count:
        raise ValueError(
            f"Expected a global batch that is a multiple of the {count} devices. Received: {recipe.batch_size}"
        )
    group = cross_replica.group_size(count, recipe.run.batch_norm_group)
    machine = jax_runner.Devices(jax_step.make_mesh(devices, group), 1)
    classes, examples = _data(recipe)
    steps_per_epoch = (examples or 1_000_000) / recipe.batch_size
    total = int(recipe.epochs * steps_per_epoch)
    plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights=None))
    with machine.scope():
        precision = policy(recipe.run, machine)
        model = machine.adapted(build(plain, classes, precision), group, recipe.run.fused if fused is None else fused)
        learner = make_learner(model, recipe, steps_per_epoch, max(total, 1))
        state = jax.eval_shape(learner.start)

    def array(shape, dtype, spec=jax_step.EACH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(machine.mesh, spec))

    batch = recipe.batch_size
    state = jax.tree.map(lambda value: array(value.shape, value.dtype, jax_step.ALL), state)
    mixed = recipe.augment.mixup or recipe.augment.cutmix
    labels = array((batch, classes), "float32") if mixed and not evaluation else array((batch,), "int32")
    images = array((batch, size, size, 3), "float32" if evaluation else recipe.data.transfer)
    stop = array((count,), "float32")
    if evaluation:
        step = jax_step.score_step(learner, machine.mesh, raw=False)
        weights = array((batch,), "float32")
        lowered = step.lower(state.trainable, state.moving, state.averages, images, labels, weights, stop)
    else:
        step = jax_step.train_step(learner, machine.mesh, batch)
        lowered = step.lower(state, images, labels, array((), "int32", jax_step.ALL), stop)
    return Program(lowered, total if examples else None, size, precision)


def _decided(recipe: Recipe, devices: int) -> Recipe:
    return decided(recipe, _data(recipe)[1], devices)[0] if recipe.batch_size is None else recipe


def _data(recipe: Recipe) -> tuple[int, int | None]:
    """Returns the numbers of classes and of training images, None if the data is neither ImageNet nor available."""
    if recipe.data.source == "imagenet2012":
        return recipe.data.classes or 1000, 1_281_167  # tensorflow/tpu efficientnet main.py: NUM_TRAIN_IMAGES
    try:
        source = open_source(recipe.data)
    except (ValueError, OSError):
        return recipe.data.classes or 1000, None
    return recipe.data.classes or source.classes, source.train_count


@contextlib.contextmanager
def _interruptible():
    """Lets Ctrl-C end the process. The compiler does not return to Python for minutes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def compiled(lowered) -> dict[str, Any]:
    """Compiles a step and returns what the compiler reports.

    Args:
        lowered: `jax.stages.Lowered`, for devices of `topology()`.

    Returns:
        Dict of `fits`, `compile_seconds`, and per device `peak`, `limit`, `arguments`, `temporaries` (bytes), `flop`,
        and the fields of `Traffic`. Unknown values are None, as for a step that does not fit.
    """
    names = ("peak", "limit", "arguments", "temporaries", "flop", "fusion", "hbm", "reductions", "reduced")
    found: dict[str, Any] = {"fits": False} | dict.fromkeys(names)
    began = time.monotonic()
    try:
        with _interruptible():
            program = lowered.compile(compiler_options=_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if not used:
            raise
        peak, limit = (float(used[n]) * _UNITS[used[n + 1]] for n in (1, 3))
        found |= {"peak": int(peak), "limit": int(limit)}
    else:
        memory: Any = program.memory_analysis()
        moved = memory_traffic.read(program.as_text())
        found |= {
            "fits": True,
            # All that is in memory at once, including the holes between temporary arrays.
            "peak": int(
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.generated_code_size_in_bytes
            ),
            "arguments": int(memory.argument_size_in_bytes),
            "temporaries": int(memory.temp_size_in_bytes),
            "flop": float(program.cost_analysis()["flops"]),
            **dataclasses.asdict(moved),
        }
    return found | {"compile_seconds": round(time.monotonic() - began, 1)}


_KEPT_AS = 1  # increased when the file changes


def _remembered(lowered, name: str, model: str) -> dict[str, Any]:
    """Returns `compiled()`, cached for each program and compiler."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("jaxlib", "libtpu")]
    key = json.dumps([_KEPT_AS, name, versions, _OPTIONS, lowered.as_text()])
    path = cache.folder("plans") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        kept = cache.read_json(path)
        if kept is not None:
            with contextlib.suppress(OSError):  # read-only
                os.utime(path)  # the time of its last use
            return kept["found"] | {"compile_seconds": 0.0}
        cache.tell_of_damage(path)
    found = compiled(lowered)
    cache.write_json(path, {"model": model, "found": found})
    cache.trim()
    return found


def plan(
    recipe: Recipe,
    where: str = "v5e:2x4",
    evaluation: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Plans a step of a recipe on a TPU slice: memory, traffic and lower bounds on the time.

    Nothing runs. The bounds follow from the arithmetic and the memory traffic of the compiled program. They ignore the
    vector unit, waiting for other chips, and the input. A recipe with progressive learning is planned stage by stage:
    the figures are those of the stage with the largest memory, `hours` is the sum, and `stages` lists all.

    Args:
        recipe: `Recipe`. Its `batch_size` is that of all chips together.
        where: String, see `topology()`. Defaults to `"v5e:2x4"`.
        evaluation: Boolean, whether to plan an evaluation step. Defaults to False, a training step.
        tell: Function that is called with a line of progress. Defaults to none.

    Returns:
        Dict, the fields of `keras-effnet tpu-plan --json`.

    Raises:
        ImportError: If libtpu is not installed.
        ValueError: If the compiler does not know the slice, or its devices cannot share the batch evenly.

    Example:

    >>> from keras_effnet.tpu import recipes
    >>> from keras_effnet.tpu.planning.planner import plan
    >>> plan(recipes.find("b0_baseline"), "v5e:4x4")["fits"]  # doctest: +SKIP
    True

    Reference:
        docs/tpu.md.
    """
    check_fields(recipe)
    if recipe.progress.sizes and not evaluation:
        return _plan_stages(recipe, where, tell)
    devices = topology(where)
    chip = CHIPS[where.partition(":")[0]]
    chips = len({tuple(device.coords) for device in devices})
    recipe = _decided(recipe, len(devices))
    per_chip = recipe.batch_size / chips
    tell(f"Tracing {_what(recipe, where)}")
    program = lowered(recipe, devices, evaluation)
    tell(f"Compiling {_what(recipe, where)}")
    found = _remembered(program.lowered, where, recipe.model.name)
    on_chip = len(devices) // chips  # without megacore, each core of a chip is a device
    steps = None if evaluation else program.steps
    return {
        "model": recipe.model.name,
        "step": "evaluation" if evaluation else "training",
        "topology": where,
        "chips": chips,
        "devices": len(devices),
        "global_batch": recipe.batch_size,
        "images_per_chip": per_chip,
        "image_size": program.size,
        "precision": program.precision,
        "fused": recipe.run.fused,
        **_takes(found, chip, on_chip, per_chip),
        **_bounds(found, chip, on_chip, per_chip, steps),
        "compile_seconds": found["compile_seconds"],
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }


def _plan_stages(recipe: Recipe, where: str, tell: Callable[[str], object]) -> dict[str, Any]:
    plans = [plan(recipe.stage(number), where, tell=tell) for number in range(len(recipe.progress.sizes))]
    hours = [one["hours"] for one in plans]  # each as if its stage were the whole run
    largest = max(plans, key=lambda one: one["peak_hbm_bytes_per_chip"])
    shown = ("image_size", "fits", "peak_hbm_bytes_per_chip", "roofline_seconds_per_step", "bound")
    return largest | {
        "fits": all(one["fits"] for one in plans),
        "hours": None if None in hours else sum(hours) / len(hours),
        "compile_seconds": sum(one["compile_seconds"] for one in plans),
        "stages": [{name: one[name] for name in shown} for one in plans],
    }


def _takes(found: dict[str, Any], chip: Chip, on_chip: int, per_chip: float) -> dict[str, Any]:
    """Memory, arithmetic and traffic, per chip and per image; `on_chip` devices share a chip's `per_chip` images."""

    def of_chip(name: str):
        return None if found[name] is None else int(found[name] * on_chip)

    def of_image(name: str):
        return None if found[name] is None else found[name] * on_chip / per_chip

    return {
        "fits": found["fits"],
        "peak_hbm_bytes_per_chip": of_chip("peak"),
        "hbm_bytes_of_chip": of_chip("limit") or chip.hbm,
        "argument_bytes_per_chip": of_chip("arguments"),
        "temporary_bytes_per_chip": of_chip("temporaries"),
        "flop_per_image": of_image("flop"),
        "fusion_bytes_per_image": of_image("fusion"),
        "hbm_bytes_per_image": of_image("hbm"),
        "reductions_per_step": found["reductions"],
    }


def _bounds(found: dict[str, Any], chip: Chip, on_chip: int, per_chip: float, steps: int | None) -> dict[str, Any]:
    """Bounds on time from the chip's arithmetic and memory; hours only where the number of steps is known."""
    limits = {"arithmetic": (found["flop"], chip.flops), "memory": (found["hbm"], chip.bandwidth)}
    seconds = {name: value * on_chip / rate for name, (value, rate) in limits.items() if value is not None}
    step = max(seconds.values(), default=None)
    return {
        "roofline_seconds_per_step": step,
        "bound": max(seconds, key=lambda name: seconds[name], default=None),
        "images_per_second_per_chip": step and per_chip / step,
        "hours": None if not step or steps is None else steps * step / 3600,
    }


def _what(recipe: Recipe, where: str) -> str:
    return f"{recipe.model.name}, {recipe.batch_size} images on {where}"


def plan_apart(
    recipe: Recipe,
    where: str = "v5e:2x4",
    evaluation: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Runs `plan()` in a separate process, because the compiler frees its memory only when its process ends.

    Five batches of B7 in one process took 15 GB.

    Args:
        recipe: `Recipe`, see `plan()`.
        where: String, see `topology()`. Defaults to `"v5e:2x4"`.
        evaluation: Boolean, see `plan()`. Defaults to False.
        tell: Function that is called with a line of progress. Defaults to none.

    Returns:
        Dict, see `plan()`.

    Raises:
        ImportError: See `plan()`.
        OSError: If the process is killed, for example because memory runs out.
        ValueError: See `plan()`.
    """
    tell(f"Compiling {_what(recipe, where)}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as process:
        try:
            return process.submit(plan, recipe, where, evaluation).result()
        except BrokenProcessPool as error:
            problem = "the compiler's process was killed, as happens when this machine's memory runs out"
            raise OSError(f"Expected to compile {_what(recipe, where)}. Received: {problem}") from error


def largest(
    recipe: Recipe,
    where: str = "v5e:2x4",
    evaluation: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Searches the largest batch that fits, in steps of 8 images per device, below 8 in steps of 1.

    Args:
        recipe: `Recipe`. The search begins at its `batch_size`.
        where: String, see `topology()`. Defaults to `"v5e:2x4"`.
        evaluation: Boolean, see `plan()`. Defaults to False.
        tell: Function that is called with a line of progress. Defaults to none.

    Returns:
        Dict, see `plan()`, with `tried`, a list of pairs of a batch and whether it fits. If not even one image per
        device fits, the plan for one.

    Raises:
        ImportError: See `plan()`.
        OSError: See `plan_apart()`.
        ValueError: See `plan()`.
    """
    count, capacity = len(topology(where)), CHIPS[where.partition(":")[0]].hbm
    recipe = _decided(recipe, count)
    tried: dict[int, dict[str, Any]] = {}

    def fits(images: int) -> bool:
        changed = dataclasses.replace(recipe, batch_size=images * count)
        tried[images] = plan_apart(changed, where, evaluation, tell)
        return tried[images]["fits"]

    unit, images = 8, max(8, recipe.batch_size // count // 8 * 8)
    while True:
        fits(images)
        good = max((n for n, one in tried.items() if one["fits"]), default=0)
        bad = min((n for n, one in tried.items() if not one["fits"]), default=None)
        if bad is not None and bad <= unit:
            unit = 1
        if bad is not None and bad - good <= unit:
            break
        images = _next(tried, good, bad, unit, capacity)
    best = tried[good or min(tried)]
    return best | {"tried": [[n * count, one["fits"]] for n, one in sorted(tried.items())]}


def _next(tried: dict[int, dict[str, Any]], good: int, bad: int | None, unit: int, capacity: int) -> int:
    """Returns the next number of images per device to try, between `good`, which fits, and `bad`, which does not.

    The guess is where a straight line through the known values reaches the memory limit. Near the limit the compiler
    recomputes what it cannot store, so the line is too low: the guess then adds at least twice the last step or a
    quarter, whichever is less, and at most half of the interval.
    """
    rows = {n: one["peak_hbm_bytes_per_chip"] for n, one in tried.items()}
    limit = min([capacity, *(one["hbm_bytes_of_chip"] for one in tried.values())])
    fits = sorted(n for n, one in tried.items() if one["fits"])
    if good and bad is not None:
        guess, top = good + (limit - rows[good]) * (bad - good) / (rows[bad] - rows[good]), bad - unit
    else:
        known = good or min(rows)
        guess, top = known * limit / rows[known], math.inf if good else known - unit
    if len(fits) > 1:
        guess = max(guess, good + min(2 * (good - fits[-2]), good / 4))
        top = top if bad is None else (good + bad) / 2
    return max(good + unit, int(min(guess, top)) // unit * unit)

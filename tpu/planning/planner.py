"""What a run takes on TPUs that are not here: their compiler is asked, which needs none."""

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

from keras_effnet.nets.variants import VARIANTS
from keras_effnet.tpu.config import Recipe
from keras_effnet.tpu.environment import without_tpu
from keras_effnet.tpu.from_recipe import build, make_learner, policy
from keras_effnet.tpu.input.sources import open_source
from keras_effnet.tpu.planning import memory_traffic
from keras_effnet.tpu.runners import jax_runner
from keras_effnet.tpu.step import replicas
from keras_effnet.weights import store


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs; all figures are of a chip.

    Args:
        flops: Float, multiplications and additions in bfloat16 per second, at most.
        hbm: Integer, bytes of memory.
        bandwidth: Float, bytes per second between that and the chip.
        shapes: Tuple of strings, the topologies that are rented.
        options: Dict, what else the compiler is told. Defaults to nothing.
    """

    flops: float
    hbm: int
    bandwidth: float
    shapes: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")

_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, read in November 2026; v2: the table in JAX 0.10.2,
# jax/_src/pallas/mosaic/tpu_info.py. Both cores of a v4 are one device there, as JAX has it on the machines.
CHIPS = {
    "v2": Chip(46e12, 16 * 2**30, 716e9, _FLAT),
    "v3": Chip(123e12, 32 * 2**30, 900e9, (*_FLAT, "16x32", "32x32")),
    "v4": Chip(275e12, 32 * 2**30, 1200e9, _CUBE, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, ("1x1", "2x2", "2x4", *_FLAT[1:])),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, _CUBE),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, ("1x1", "2x2", "2x4", *_FLAT[1:])),
}

# The compiler's effort: with less it takes half the time. For keras.applications' B0 the figures are the same
# (benchmarks/tpu_traffic.md).
_OPTIONS = {"exec_time_optimization_effort": -1.0}

# What a compiler says of a program for which there is no room: what it takes, of what there is.
_SIZE = r"([\d.]+)([KMGT]?)"

_USED = re.compile(rf"{_SIZE}\)? (?:exceeds available HBM \(|of ){_SIZE}(?:\)| hbm)", re.IGNORECASE)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def topology(name: str) -> list[Any]:
    """The devices of a slice of TPUs, to compile for.

    Args:
        name: String such as `"v5e:2x4"`: the generation, and how its chips are laid out.

    Returns:
        List of JAX devices that nothing can be computed on.

    Raises:
        ImportError: If libtpu, the compiler, is not installed.
        ValueError: If the compiler knows no such slice.

    Example:

    >>> from keras_effnet.tpu.planning.planner import topology
    >>> len(topology("v5e:2x4"))
    8
    """
    if not find_spec("libtpu"):
        raise ImportError("Expected libtpu, which has the TPUs' compiler. Bring it with: pip install libtpu")
    without_tpu()
    generation, _, shape = name.partition(":")
    problem = "no such generation"
    if generation in CHIPS:
        options = dict(CHIPS[generation].options)
        if shape == "1x1":
            options["chips_per_host_bounds"] = [1, 1, 1]
        try:
            return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
        except jax.errors.JaxRuntimeError as error:
            problem = str(error).splitlines()[0]
    known = ", ".join(f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes)
    raise ValueError(f"Expected a topology, such as one of: {known}. Received: {name!r} ({problem})")


@dataclass(frozen=True)
class Program:
    """A step, and what it is of."""

    lowered: Any
    steps: int | None  # of the whole recipe
    size: int
    precision: str


def lowered(
    recipe: Recipe, devices: list[Any], evaluation: bool = False, fused: str | Collection[str] | None = None
) -> Program:
    """The runner's own step, for devices that are not here; which units are fused, if not as the recipe says."""
    count, size = len(devices), recipe.model.image_size or VARIANTS[recipe.model.name].resolution
    if recipe.batch_size < 1 or recipe.batch_size % count:
        raise ValueError(f"Expected a global batch that the {count} devices share. Received: {recipe.batch_size}")
    group = replicas.group_size(count, recipe.run.batch_norm_group)
    machine = jax_runner.Devices(jax_runner.make_mesh(devices, group), 1)
    classes, examples = _data(recipe)
    steps_per_epoch = (examples or 1_000_000) / recipe.batch_size
    total = int(recipe.epochs * steps_per_epoch)
    plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights=None))
    with machine.scope():
        precision = policy(recipe.run, machine)
        model = machine.adapted(build(plain, classes, precision), group, recipe.run.fused if fused is None else fused)
        learner = make_learner(model, recipe, steps_per_epoch, max(total, 1))
        state = jax.eval_shape(learner.start)

    def told(shape, dtype, of=jax_runner.EACH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(machine.mesh, of))

    batch = recipe.batch_size
    state = jax.tree.map(lambda value: told(value.shape, value.dtype, jax_runner.ALL), state)
    shared = recipe.augment.mixup or recipe.augment.cutmix
    labels = told((batch, classes), "float32") if shared and not evaluation else told((batch,), "int32")
    images = told((batch, size, size, 3), "float32" if evaluation else recipe.data.transfer)
    stop = told((count,), "float32")
    if evaluation:
        step = jax_runner.score_step(learner, machine.mesh, raw=False)
        weights = told((batch,), "float32")
        lowered = step.lower(state.trainable, state.moving, state.averages, images, labels, weights, stop)
    else:
        step = jax_runner.train_step(learner, machine.mesh, batch)
        lowered = step.lower(state, images, labels, told((), "int32", jax_runner.ALL), stop)
    return Program(lowered, total if examples else None, size, precision)


def _data(recipe: Recipe) -> tuple[int, int | None]:
    """Classes, and training images where the data is here, or ImageNet."""
    if recipe.data.source == "imagenet2012":
        return recipe.data.classes or 1000, 1_281_167  # tensorflow/tpu efficientnet main.py: NUM_TRAIN_IMAGES
    try:
        source = open_source(recipe.data)
    except (ValueError, OSError):
        return recipe.data.classes or 1000, None
    return recipe.data.classes or source.classes, source.train_count


@contextlib.contextmanager
def _interruptible():
    """The compiler does not look up for minutes: Ctrl-C ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def compiled(lowered) -> dict[str, Any]:
    """What the compiler says of a step.

    Args:
        lowered: `jax.stages.Lowered`, for devices of `topology()`.

    Returns:
        Dict of `fits`, and per device `peak`, `limit`, `arguments`, `temporaries` (bytes), `flop`, `fusion` and `hbm`
        (bytes), `reductions` and `reduced`, as of `Traffic`. Where it does not fit, what is not known is None.
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
            # What has to be there at once: the place of all temporary arrays, with the holes between them.
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


def _remembered(lowered, name: str) -> dict[str, Any]:
    """`compiled()`, once for each program and compiler."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("jaxlib", "libtpu")]
    told = json.dumps([name, versions, _OPTIONS, lowered.as_text()])
    path = store.home() / "plans" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text()) | {"compile_seconds": 0.0}
    found = compiled(lowered)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(found))
    scratch.replace(path)
    return found


def plan(
    recipe: Recipe,
    where: str = "v5e:2x4",
    evaluation: bool = False,
    tell: Callable[[str], object] = lambda told: None,
) -> dict[str, Any]:
    """What a step of a recipe takes on a slice of TPUs, by their compiler.

    Nothing runs: the times are bounds that the chip's arithmetic and memory set, from what the compiled program
    computes and moves. They leave out the vector unit, waiting for other chips, and the input.

    Args:
        recipe: `Recipe`. Its `batch_size` is that of all chips together.
        where: String, see `topology()`. Defaults to `"v5e:2x4"`.
        evaluation: Boolean, whether the step is that of an evaluation. Defaults to False: of the training.
        tell: Function that is called with what is done now. Defaults to none.

    Returns:
        Dict of what stands in the table of `keras-effnet tpu-plan`, with the fields of its `--json`.

    Raises:
        ImportError: If libtpu is not installed.
        ValueError: If the compiler knows no such slice, or its devices cannot share the batch.

    Example:

    >>> from keras_effnet.tpu import recipes
    >>> from keras_effnet.tpu.planning.planner import plan
    >>> plan(recipes.find("b0_baseline"), "v5e:4x4")["fits"]  # doctest: +SKIP
    True

    Reference:
        benchmarks/tpu_traffic.md.
    """
    devices = topology(where)
    chip = CHIPS[where.partition(":")[0]]
    chips = len({tuple(device.coords) for device in devices})
    per_chip = recipe.batch_size / chips
    tell(f"Tracing {_what(recipe, where)}")
    program = lowered(recipe, devices, evaluation)
    tell(f"Compiling {_what(recipe, where)}")
    found = _remembered(program.lowered, where)
    on_chip = len(devices) // chips  # of a chip without megacore each core is a device

    def of_chip(name: str):
        return None if found[name] is None else int(found[name] * on_chip)

    def of_image(name: str):
        return None if found[name] is None else found[name] * on_chip / per_chip

    result: dict[str, Any] = {
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
    limits = {"arithmetic": (found["flop"], chip.flops), "memory": (found["hbm"], chip.bandwidth)}
    seconds = {name: value * on_chip / rate for name, (value, rate) in limits.items() if value is not None}
    step = max(seconds.values(), default=None)
    return result | {
        "roofline_seconds_per_step": step,
        "bound": max(seconds, key=lambda name: seconds[name], default=None),
        "images_per_second_per_chip": step and per_chip / step,
        "hours": None if evaluation or not step or program.steps is None else program.steps * step / 3600,
        "compile_seconds": found["compile_seconds"],
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }


def _what(recipe: Recipe, where: str) -> str:
    return f"{recipe.model.name}, {recipe.batch_size} images on {where}"


def plan_apart(
    recipe: Recipe,
    where: str = "v5e:2x4",
    evaluation: bool = False,
    tell: Callable[[str], object] = lambda told: None,
) -> dict[str, Any]:
    """`plan()`, in a process of its own: the compiler gives its memory back at a process' end only.

    Five batches of B7 in one process took 15 GB.

    Args:
        recipe: `Recipe`, see `plan()`.
        where: String, see `topology()`. Defaults to `"v5e:2x4"`.
        evaluation: Boolean, see `plan()`. Defaults to False.
        tell: Function that is called with what is done now. Defaults to none.

    Returns:
        Dict, see `plan()`.

    Raises:
        ImportError: See `plan()`.
        OSError: If the process is killed, as where memory runs out.
        ValueError: See `plan()`.
    """
    tell(f"Compiling {_what(recipe, where)}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as process:
        try:
            return process.submit(plan, recipe, where, evaluation).result()
        except BrokenProcessPool as error:
            told = "its process was killed, as where this machine's memory runs out"
            raise OSError(f"Expected to compile {_what(recipe, where)}. Received: {told}") from error


def largest(
    recipe: Recipe,
    where: str = "v5e:2x4",
    evaluation: bool = False,
    tell: Callable[[str], object] = lambda told: None,
) -> dict[str, Any]:
    """The plan with the largest batch that fits, in steps of 8 images per device; below 8 of 1.

    Args:
        recipe: `Recipe`. Its `batch_size` is where the search begins.
        where: String, see `topology()`. Defaults to `"v5e:2x4"`.
        evaluation: Boolean, see `plan()`. Defaults to False.
        tell: Function that is called with what is done now. Defaults to none.

    Returns:
        Dict, see `plan()`, with `tried`: a list of pairs of batches and whether they fit. If not even an image per
        device fits, that of one.

    Raises:
        ImportError: See `plan()`.
        OSError: See `plan_apart()`.
        ValueError: See `plan()`.
    """
    count, capacity = len(topology(where)), CHIPS[where.partition(":")[0]].hbm
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
    """Where a straight line through what is known comes to the memory's end, between what fits and what does not.

    Near the end the compiler computes again what it has no room for, and the line is too low: then twice the last step
    or a quarter more, and halves of what is left.
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

"""Reports the memory traffic of a training step of B0 on TPU, from the compiler: keras.applications' step and ours.

    python benchmarks/tpu_traffic.py                  # half an hour on two cores; pip install libtpu
    python benchmarks/tpu_traffic.py --only ours --only "and the kernel"

All steps are compiled with the same options, for 224 pixels, 1000 classes, mixed bfloat16, and 128 images per chip of a
v5e:2x4. Nothing runs. The step of keras.applications is forward, backward and SGD with momentum, with dropout and drop
connect, partitioned by GSPMD as in `keras.distribution.DataParallel`. Ours is the step of the JAX runner, with the same
optimizer and no weight decay. It also computes the moving average of all variables, and metrics.
"""

import json
import os
from typing import Any

import click

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_effnet.tpu.config import Model, Optimizer, Recipe
from keras_effnet.tpu.planning import planner

BATCH, APPLICATIONS = 128, "keras.applications"
# The units of `jax_fused` in each step. All but "none" compute batch statistics in one pass.
OURS: dict[str, str | tuple[str, ...]] = {
    "ours": "none",
    "one-pass statistics": (),
    "and expand units": ("expand",),
    "and excite units": "layers",
    "and the kernel": "kernels",
}
CONDCONV = "CondConv-b0-8e"


def applications(devices) -> Any:
    """Lowers the training step of B0 from keras.applications."""
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    networks: Any = keras.applications
    model = networks.EfficientNetB0(weights=None, classifier_activation=None)
    keras.mixed_precision.set_global_policy("float32")
    optimizer: Any = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    mesh = Mesh(np.asarray(devices), ("batch",))
    fixed = [v.value for v in model.non_trainable_variables]

    def loss(trainable, fixed, images, labels):
        logits, fixed = model.stateless_call(trainable, fixed, images, training=True)
        losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        return keras.ops.mean(losses), fixed

    def step(trainable, fixed, slots, images, labels):
        (value, fixed), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, fixed, images, labels)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return trainable, fixed, slots, value

    def told(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    trees = [v.value for v in model.trainable_variables], fixed, [v.value for v in optimizer.variables]
    trees = jax.tree.map(lambda value: told(value.shape, value.dtype), trees)
    count = BATCH * len(devices)
    images = told((count, 224, 224, 3), "bfloat16", "batch")
    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(*trees, images, told((count,), "int32", "batch"))


def ours(devices, fused: str | tuple[str, ...], model: str = "efficientnet-b0") -> Any:
    """Lowers the training step of the JAX runner."""
    optimizer = Optimizer("momentum", weight_decay=0.0)
    recipe = Recipe(Model(model), optimizer=optimizer, batch_size=BATCH * len(devices), label_smoothing=0.0)
    return planner.lowered(recipe, devices, fused=fused).lowered


@click.command()
@click.option("--topology", default="v5e:2x4", show_default=True, help="TPU generation and layout of its chips.")
@click.option("--only", multiple=True, type=click.Choice([APPLICATIONS, *OURS, CONDCONV]), help="Row to compile.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(topology, only, as_json) -> None:
    """Compile training steps for TPUs, without one, and report their memory traffic."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    devices, report = planner.topology(topology), {}
    for name in only or (APPLICATIONS, *OURS, CONDCONV):
        click.echo(f"Compiling {name}", err=True)
        if name == APPLICATIONS:
            lowered = applications(devices)
        elif name == CONDCONV:
            lowered = ours(devices, "none", "efficientnet-condconv-b0-8e")
        else:
            lowered = ours(devices, OURS[name])
        report[name] = planner.compiled(lowered)
    if as_json:
        click.echo(json.dumps({"topology": topology, "images_per_chip": BATCH, "rows": report}, indent=2))
        return
    base = report.get(APPLICATIONS)
    table = Table(title=f"Training step, 224 pixels, {BATCH} images per device of {topology}", box=box.SIMPLE_HEAD)
    for column in (
        "step",
        "fusions, MB/image",
        "memory, MB/image",
        "GFLOP/image",
        "temporaries, MB/image",
        "exchanges",
    ):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in report.items():
        cells = [name]
        for key in ("fusion", "hbm"):
            over = f" ({row[key] / base[key]:.3f})" if base and name != APPLICATIONS else ""
            cells.append(f"{row[key] / BATCH / 1e6:.1f}{over}")
        cells += [f"{row['flop'] / BATCH / 1e9:.3f}", f"{row['temporaries'] / BATCH / 1e6:.1f}", str(row["reductions"])]
        table.add_row(*cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

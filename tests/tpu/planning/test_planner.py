"""Protects the planner: the traffic of compiled programs, plans by the real TPU compiler, the search, its errors."""

import json
import math
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from helpers import BACKEND, ROOT

if BACKEND != "tensorflow":
    pytest.skip("runs JAX in subprocesses: one run is enough", allow_module_level=True)

from keras_effnet.tpu import recipes
from keras_effnet.tpu.config import Recipe
from keras_effnet.tpu.planning.memory_traffic import Traffic, read

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %e = bf16[4,8]{1,0} exponential(%p)
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = bf16[4,8]{1,0} get-tuple-element(%t), index=1
  %b = bf16[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
  ROOT %r = (s32[], bf16[4,8]{1,0}) tuple(%i, %b)
}

%condition (t: (s32[], bf16[4,8])) -> pred[] {
  %t = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: bf16[4,8], w: f32[10]) -> (f32[10], bf16[4,8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[10]{0:T(256)} parameter(1)
  %in = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %near = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} copy-done(%in)
  %cut = ((bf16[4,8]{1,0:T(8,128)(2,1)}), bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, s32[]) slice-start(%x), slice={[0:2], [0:8]}
  %half = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} slice-done(%cut)
  %both = bf16[4,8]{1,0:S(1)} custom-call(%half, %half), custom_call_target="ConcatBitcast"
  %kernel = bf16[4,8]{1,0} custom-call(%near, %both), custom_call_target="tpu_custom_call"
  %y = (bf16[4,8]{1,0:T(8,128)(2,1)}, f32[10]{0:T(256)S(1)}) fusion(%near, %w), kind=kOutput, calls=%fused
  %y0 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%y), index=0
  %y1 = f32[10]{0:T(256)S(1)} get-tuple-element(%y), index=1
  %sum = f32[10]{0:T(256)} all-reduce(%y1), replica_groups={{0,1}}, to_apply=%fused
  %n = s32[] constant(0)
  %init = (s32[], bf16[4,8]{1,0}) tuple(%n, %y0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body, backend_config=TRIPS
  %last = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %out = (f32[10]{0}, bf16[4,8]{1,0}) tuple(%sum, %last)
}
""".replace("TRIPS", '{"known_trip_count":{"n":"5"}}')


def test_traffic_is_counted_once_and_by_place():
    image, row = 4 * 8 * 2, 10 * 4
    found = read(PROGRAM)
    assert found == Traffic(
        # The kernel, the fusion, the all-reduce, and five times the loop. A ConcatBitcast moves nothing.
        fusion=3 * image + (2 * image + 2 * row) + 2 * row + 5 * 2 * image,
        # A copy to the chip and half an array; the kernel's result; the fusion's first result and its weights; the
        # all-reduce's result; the loop.
        hbm=image + image / 2 + image + (image + row) + row + 5 * 2 * image,
        reductions=1,
        reduced=row,
    )
    with pytest.raises(ValueError, match="with an ENTRY"):
        read("not a program")


def command(*arguments: str, status: int = 0, home=None, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, ROOT / "tests" / "mini.py", "tpu-plan", *arguments]
    environment |= {"KERAS_EFFNET_HOME": str(home)} if home else {}
    result = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == status, result.stderr[-3000:]
    return result


@pytest.mark.long
def test_topologies_are_those_that_the_compiler_knows():
    script = (
        "import os; os.environ.update(KERAS_BACKEND='jax', JAX_PLATFORMS='cpu')\n"
        "from keras_effnet.tpu.planning.planner import CHIPS, topology\n"
        "for kind, chip in CHIPS.items():\n"
        "    for shape in chip.shapes:\n"
        "        devices = topology(f'{kind}:{shape}')\n"
        "        print(shape, len(devices), len({tuple(one.coords) for one in devices}), devices[0].device_kind)\n"
        "try:\n"
        "    topology('v9:2x2')\n"
        "except ValueError as error:\n"
        "    assert \"v5p, v6e, such as v5e:2x4. Received: 'v9:2x2'\" in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split(maxsplit=3) for line in result.stdout.splitlines()]
    assert len(rows) > 40 and len({row[3] for row in rows}) == 6
    for shape, devices, chips, kind in rows:
        assert int(chips) == math.prod(map(int, shape.split("x"))), kind
        # Before v4, each of a chip's two cores is a device.
        assert int(devices) == int(chips) * (2 if kind in ("TPU v2", "TPU v3") else 1), kind


@pytest.mark.long
def test_what_is_missing_or_impossible_is_told_in_a_line():
    told = command("b0_baseline", "--topology", "v5e:3x5", status=2).stderr
    assert "v5e:2x4" in told and "v5e:16x16" in told and "Received: 'v5e:3x5'" in told
    assert (
        "a multiple of the 8 devices. Received: 12" in command("b0_baseline", "--global-batch", "12", status=2).stderr
    )
    assert "Nearest: 'b0_baseline'" in command("b0_basline", status=2).stderr
    script = "import sys; sys.modules['libtpu'] = None; from keras_effnet.commands import main; main()"
    hidden = subprocess.run(
        [sys.executable, "-c", script, "tpu-plan", "b0_baseline"], capture_output=True, text=True, env=os.environ
    )
    lines = [line for line in hidden.stderr.splitlines() if line.startswith("error")]
    assert hidden.returncode == 2 and lines == [
        "error: Expected libtpu, the TPU compiler. Install it with: pip install libtpu"
    ]


MINI = ("efficientnet-mini", "--model.image-size", "64", "--topology", "v5e:2x2")


@pytest.mark.long
def test_plans_by_the_real_compiler(tmp_path):
    small = json.loads(command(*MINI, "--global-batch", "512", "--json", home=tmp_path).stdout)
    assert small["fits"] and small["chips"] == 4 and small["images_per_chip"] == 128 and small["compile_seconds"] > 1
    assert 0 < small["temporary_bytes_per_chip"] < small["peak_hbm_bytes_per_chip"] < small["hbm_bytes_of_chip"]
    assert 0 < small["hbm_bytes_per_image"] < small["fusion_bytes_per_image"] and small["reductions_per_step"] >= 1
    rates = {"memory": small["hbm_bytes_per_image"] / 819e9, "arithmetic": small["flop_per_image"] / 197e12}
    assert small["bound"] == max(rates, key=lambda name: rates[name])
    assert small["images_per_second_per_chip"] == pytest.approx(1 / max(rates.values()))
    assert small["roofline_seconds_per_step"] == pytest.approx(128 * max(rates.values()))
    assert small["hours"] == pytest.approx(int(350 * 1281167 / 512) * small["roofline_seconds_per_step"] / 3600)

    again = json.loads(command(*MINI, "--global-batch", "512", "--json", home=tmp_path).stdout)
    assert again == {**small, "compile_seconds": 0}
    # Fused steps move less.
    moved = [small["fusion_bytes_per_image"]]
    for fused in ("layers", "kernels"):
        less = command(*MINI, "--global-batch", "512", "--run.fused", fused, "--json", home=tmp_path)
        moved.append(json.loads(less.stdout)["fusion_bytes_per_image"])
    assert moved[1] < 0.8 * moved[0] and moved[2] < 0.95 * moved[1]

    large = command(*MINI, "--global-batch", str(2**18), "--json", home=tmp_path, status=1)
    told = json.loads(large.stdout)
    assert not told["fits"] and told["peak_hbm_bytes_per_chip"] > told["hbm_bytes_of_chip"]
    assert told["images_per_second_per_chip"] is None and told["hours"] is None
    table = command(*MINI, "--global-batch", str(2**18), home=tmp_path, status=1)
    assert "Compiling efficientnet-mini, 262144 images on v5e:2x2" in table.stderr
    rows = dict(re.findall(r"^\W*(.+?)  +(.+?)\W*$", table.stdout, re.MULTILINE))
    assert rows["fits"] == "no" and rows["hours for the recipe, at least"] == rows["temporaries"] == "unknown"
    taken, there = map(float, re.match(r"([\d.]+) of ([\d.]+) GiB", rows["peak memory per chip"]).groups())
    assert [taken, there] == pytest.approx(
        [told[name] / 2**30 for name in ("peak_hbm_bytes_per_chip", "hbm_bytes_of_chip")], abs=0.01
    )


@pytest.mark.long
def test_search_ends_between_what_fits_and_what_does_not(tmp_path):
    arguments = ("efficientnet-mini", "--model.image-size", "256", "--topology", "v5e:1x1", "--search")
    found = json.loads(command(*arguments, "--global-batch", "64", "--json", home=tmp_path).stdout)
    fits = [images for images, one in found["tried"] if one]
    fails = [images for images, one in found["tried"] if not one]
    assert found["fits"] and found["global_batch"] == max(fits) and min(fails) == max(fits) + 8

    # Kill the compiler, as a machine that runs out of memory does.
    line = [sys.executable, ROOT / "tests" / "mini.py", "tpu-plan", *arguments, "--global-batch", "72"]
    running = subprocess.Popen(
        line, text=True, stderr=subprocess.PIPE, env={**os.environ, "KERAS_EFFNET_HOME": str(tmp_path)}
    )
    deadline, compilers = time.monotonic() + 60, []
    while not compilers and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process(running.pid).children()
        compilers = [one for one in children if any("spawn_main" in word for word in one.cmdline())]
    compilers[0].kill()
    _, told = running.communicate(timeout=60)
    assert running.returncode == 2 and "Traceback" not in told, told
    assert "Expected to compile efficientnet-mini, 72 images on v5e:1x1. Received: the compiler's process was" in told
    assert "was killed, as happens when this machine's memory runs out" in told


def test_every_recipe_is_in_the_table_of_the_docs():
    """The table shows the recorded plans, for the batch of each recipe."""
    line = [sys.executable, ROOT / "benchmarks" / "tpu_recipes.py", "--recorded"]
    table = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs" / "tpu.md").read_text()
    record = json.loads((ROOT / "benchmarks" / "tpu_recipes.json").read_text())
    # A probe has no steps, and V2's are not compiled yet, as the page says.
    trained = [name for name, recipe in recipes.every().items() if not recipe.probe.views and "v2_" not in name]
    assert list(record["recipes"]) == trained and record["topology"] == "v5e:2x4"
    for name, (first, *smaller) in record["recipes"].items():
        recipe = recipes.find(name)
        assert (first["model"], first["global_batch"]) == (recipe.model.name, recipe.batch_size or 32)
        assert first["fits"] or smaller[-1]["fits"]


@pytest.mark.parametrize(
    ("start", "most", "again"),
    [(2048, 48, 0), (2048, 48, 24), (64, 300, 0), (64, 300, 60), (2048, 3, 0), (8, 8, 0), (64, 0, 0)],
)
def test_search_needs_few_compilations(start, most, again, monkeypatch):
    """Both if memory grows with the batch, and if the compiler first saves memory by recomputing."""
    from keras_effnet.tpu.planning import planner

    def simulated(recipe, where, evaluation, tell):
        """A chip of 16 GiB that is full from `most - again` images on."""
        images = recipe.batch_size // 8
        taken = 16 * 2**30 * images / ((most - again or 1) + 0.5)
        fits = images <= most
        return {
            "global_batch": recipe.batch_size,
            "fits": fits,
            "hbm_bytes_of_chip": 16 * 2**30,
            "peak_hbm_bytes_per_chip": min(taken, 15.9 * 2**30) if fits else taken,
        }

    monkeypatch.setattr(planner, "plan_apart", simulated)
    monkeypatch.setattr(planner, "topology", lambda where: range(8))
    found = planner.largest(Recipe(batch_size=start), "v5e:2x4")
    assert found["global_batch"] // 8 == (most // 8 * 8 if most >= 8 else max(most, 1))
    assert found["fits"] == (most > 0) and len(found["tried"]) <= 7


FORWARD = """
import os, json, sys
os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
import jax, keras
import keras_effnet as ke
from keras_effnet.tpu.planning.memory_traffic import read
from keras_effnet.tpu.planning.planner import topology

devices = topology("v5e:2x4")
model = ke.EfficientNetB0(weights=None, classifier_activation=None, dtype="mixed_bfloat16")
mesh = jax.sharding.Mesh(devices, "batch")
array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
trees = [[array(v.shape, v.dtype) for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
forward = jax.jit(lambda variables, fixed, images: model.stateless_call(variables, fixed, images, training=False)[0])
compiled = forward.lower(*trees, array((1024, 224, 224, 3), "float32", "batch")).compile()
moved = read(compiled.as_text())
print(json.dumps([compiled.cost_analysis()["flops"] / 128, moved.fusion / 128, moved.hbm / 128]))
"""


@pytest.mark.long
def test_evaluation_is_what_a_plain_script_compiles(tmp_path):
    result = subprocess.run([sys.executable, "-c", FORWARD], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    flop, fusion, hbm = json.loads(result.stdout)
    arguments = ("efficientnet-b0", "--eval", "--global-batch", "1024", "--json")
    found = json.loads(command(*arguments, home=tmp_path).stdout)
    assert found["step"] == "evaluation" and found["hours"] is None
    assert found["flop_per_image"] == pytest.approx(flop, rel=0.01)
    assert found["fusion_bytes_per_image"] == pytest.approx(fusion, rel=0.02)
    assert found["hbm_bytes_per_image"] == pytest.approx(hbm, rel=0.05)

"""Draws architecture.svg from the imports between the rooms, and ways.svg: python docs/draw_architecture.py"""

import importlib.util
from itertools import pairwise
from pathlib import Path

import grimp
import pydot

HERE = Path(__file__).parent
# The rooms of keras_effnet and of keras_effnet.tpu, each row a floor.
FLOORS = [
    ["commands"],
    ["serving"],
    ["tpu"],
    ["pruning"],
    ["inference"],
    ["efficientnet"],
    ["images", "plots"],
    ["describe"],
    ["model_loader"],
    ["models"],
]
FLOORS += [["weights"], ["model_metadata"], ["nets"], ["cache"], ["class_names", "compat", "errors", "files", "ranges"]]
TPU_FLOORS = [
    ["train", "planning"],
    ["probe", "training_loop"],
    ["reports"],
    ["runners"],
    ["model_from_recipe"],
    ["input", "step"],
]
TPU_FLOORS += [["resume"], ["doctor", "recipes"], ["config", "environment"]]
INK, PAPER, QUIET = "#22304a", "#eef2f8", "#8b97ab"
WAYS = {
    "a photo": [
        "images/decoding\nfile to pixels",
        "images/resizing\ncrop of the weights",
        "inference/predictor\nfastest runtime",
        "inference/export_cache\ncached export",
        "inference/runtimes\nLiteRT, ONNX, OpenVINO",
        "class_names\nnames",
    ],
    "a training example": [
        "tpu/input/sources\nwhere it comes from",
        "tpu/input/pipeline\ndecode and crop",
        "tpu/input/augment\naugment",
        "tpu/runners\nto the devices",
        "tpu/step/train_step\nloss and update",
        "tpu/resume/checkpoints\nsaved state",
    ],
    "a checkpoint": [
        "weights/registry\naddress and hash",
        "weights/store\ndownload and cache",
        "weights/formats\nfile to tensors",
        "weights/naming_tables\nforeign names",
        "weights/matching\nall or nothing",
        "weights/convert\nto the model",
    ],
}


def arrows(package: str, rooms: list[str]) -> set[tuple[str, str]]:
    """Which room imports which."""
    graph = grimp.build_graph("keras_effnet", exclude_type_checking_imports=True)
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            names = [name.removeprefix(f"{package}.").split(".")[0] for name in (importer, imported)]
            inside = all(name.startswith(f"{package}.") for name in (importer, imported))
            if inside and names[0] != names[1] and set(names) <= set(rooms):
                found.add((names[0], names[1]))
    return found


def shortest(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that follow from no others: a picture of all of them shows nothing."""

    def reached(start: str, skip: tuple[str, str]) -> set[str]:
        seen, queue = set(), [start]
        while queue:
            here = queue.pop()
            for one, other in found:
                if one == here and (one, other) != skip and other not in seen:
                    seen.add(other)
                    queue.append(other)
        return seen

    return {arrow for arrow in found if arrow[1] not in reached(arrow[0], arrow)}


def house() -> pydot.Dot:
    """The rooms, with the arrows between them."""
    font = {"fontname": "Helvetica", "fontsize": "13", "fontcolor": INK}
    picture = pydot.Dot("architecture", rankdir="TB", ranksep="0.32", nodesep="0.3", bgcolor="white", compound="true")
    picture.set_node_defaults(shape="box", style="rounded,filled", fillcolor=PAPER, color=QUIET, **font)
    picture.set_edge_defaults(color=QUIET, arrowsize="0.7")
    for title, package, floors in (("keras_effnet", "keras_effnet", FLOORS), ("tpu", "keras_effnet.tpu", TPU_FLOORS)):
        part = pydot.Cluster(title, label=title, style="rounded", color=QUIET, labeljust="l", **font)
        rooms = [room for floor in floors for room in floor]
        for floor in floors:
            row = pydot.Subgraph(rank="same")
            for room in floor:
                row.add_node(pydot.Node(f"{title}.{room}", label=room))
            part.add_subgraph(row)
        for one, other in sorted(shortest(arrows(package, rooms))):
            part.add_edge(pydot.Edge(f"{title}.{one}", f"{title}.{other}"))
        picture.add_subgraph(part)
    return picture


def ways() -> pydot.Dot:
    """What a photo, a training example and a checkpoint pass through."""
    font = {"fontname": "Helvetica", "fontsize": "12", "fontcolor": INK}
    picture = pydot.Dot("ways", rankdir="TB", ranksep="0.3", nodesep="0.4", bgcolor="white")
    picture.set_node_defaults(shape="box", style="rounded,filled", fillcolor=PAPER, color=QUIET, width="2.2", **font)
    picture.set_edge_defaults(color=INK, arrowsize="0.7")
    for title, steps in WAYS.items():
        names = [f"{title} {number}" for number in range(len(steps) + 1)]
        picture.add_node(pydot.Node(names[0], label=title, fillcolor=INK, fontcolor="white"))
        for name, step in zip(names[1:], steps, strict=True):
            found = importlib.util.find_spec(f"keras_effnet.{step.partition(chr(10))[0].replace('/', '.')}")
            assert found, f"Expected a module of the package. Received: {step!r}"
            picture.add_node(pydot.Node(name, label=step))
        for one, other in pairwise(names):
            picture.add_edge(pydot.Edge(one, other))
    return picture


if __name__ == "__main__":
    house().write(HERE / "architecture.svg", format="svg")
    ways().write(HERE / "ways.svg", format="svg")

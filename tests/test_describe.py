"""Descriptions and plots match the models that they describe, and the paper's table."""

import math
import xml.etree.ElementTree as ElementTree

import keras
import pytest
from helpers import BACKEND, leading, shallow_nets
from PIL import Image

import keras_effnet as ke


def test_table_1_of_the_paper():
    rows = [
        ("Conv3x3", 224, 32, 1, 3),
        ("MBConv1", 112, 16, 1, 3),
        ("MBConv6", 112, 24, 2, 3),
        ("MBConv6", 56, 40, 2, 5),
        ("MBConv6", 28, 80, 3, 3),
        ("MBConv6", 14, 112, 3, 5),
        ("MBConv6", 14, 192, 4, 5),
        ("MBConv6", 7, 320, 1, 3),
        ("Conv1x1 & Pooling & FC", 7, 1280, 1, 1),
    ]
    stages = ke.describe("efficientnet-b0")["stages"]
    assert [(s["operator"], s["resolution"][0], s["channels"], s["layers"], s["kernel_size"]) for s in stages] == rows


@pytest.mark.skipif(BACKEND != "tensorflow", reason="no arithmetic")
@pytest.mark.parametrize("number", leading(range(8), 1))
def test_layers_are_counted_as_keras_applications_has_them(number):
    theirs = getattr(keras.applications, f"EfficientNetB{number}")(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    described = ke.describe(f"efficientnet-b{number}")
    assert described["layers"]["keras_applications"] == len(theirs.layers)
    for known, count in {0: 237, 7: 813}.items():
        assert ke.describe(f"efficientnet-b{known}")["layers"]["keras_applications"] == count


# One net of each family. All others, but the three largest, run with `-m long`.
FAMILIES = ("b0", "b3", "lite0", "edgetpu-s", "condconv-b0-4e", "b1-pruned")
LARGEST = ("efficientnet-l2", "efficientnet-b8", "efficientnet-b7")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.removeprefix("efficientnet-") in FAMILIES else pytest.mark.long)
        for name in ke.list_models()
        if name not in LARGEST
    ],
)
def test_a_name_and_its_model_are_described_alike(name):
    model = ke.create_model(name, weights=None)
    described = ke.describe(model)
    assert described == ke.describe(name)
    assert described["params"] + described["non_trainable_params"] == model.count_params()
    body = keras.Model(model.inputs, model.get_layer("top_activation").output)
    assert described["layers"]["ours"] == len(body.layers)


def test_a_changed_model_is_described_as_it_is():
    with shallow_nets():
        model = ke.EfficientNetB0(weights=None, include_top=False, input_shape=(64, 96, 1), name="mine")
        described = ke.describe(model)
    assert described["name"] == "mine" and described["variant"] == "efficientnet-b0"
    assert described["params"] + described["non_trainable_params"] == model.count_params()
    assert (
        described["classes"] is None and described["channels"] == 1 and described["stages"][-1]["resolution"] == [2, 3]
    )
    unknown = ke.describe(ke.EfficientNetB0(weights=None, include_top=False))
    assert unknown["macs"] == 384_534_752  # at the variant's own resolution, without the classifier's 1,280,000


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["efficientnet-edgetpu-m", "efficientnet-condconv-b0-4e"])
def test_macs_agree_with_the_layers_own_shapes(name):
    model = ke.create_model(name, weights=None, input_shape=(97, 131, 3))
    total = 0
    for layer in model.layers:
        if isinstance(layer, ke.CondConv2D | ke.DepthwiseCondConv2D):  # sums up the kernels, then convolves once
            pixels = layer.output.shape[1] * layer.output.shape[2]
            total += (pixels + layer.num_experts) * math.prod(layer.kernel.shape[1:])
        elif isinstance(layer, keras.layers.Dense):
            total += layer.kernel.shape[0] * layer.kernel.shape[1]
        elif isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            pixels = layer.output.shape[1] * layer.output.shape[2]
            total += (
                pixels * layer.kernel.shape[0] * layer.kernel.shape[1] * layer.kernel.shape[2] * layer.kernel.shape[3]
            )
    assert ke.describe(model)["macs"] == total


def test_plots_show_every_model_and_stage(tmp_path):
    path = ke.plot([f"efficientnet-b{n}" for n in range(8)], tmp_path / "family.svg")
    root = ElementTree.parse(path).getroot()
    # Text is drawn as shapes, with the text itself in a comment.
    text = path.read_text()
    assert root.tag.endswith("svg")
    for number in range(8):
        assert f"efficientnet-b{number}" in text
        for stage in ke.describe(f"efficientnet-b{number}")["stages"]:
            assert f"{stage['channels']} channels, {stage['resolution'][0]} px" in text
    once, again = (ke.plot(["efficientnet-b0", "efficientnet-b1"], tmp_path / f"{name}.svg") for name in ("x", "y"))
    assert again.read_bytes() == once.read_bytes()
    with shallow_nets():
        small = ke.EfficientNetLite0(weights=None)
    with Image.open(ke.plot(small, tmp_path / "lite0.png")) as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 10


def test_wrong_plots_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"Nearest: '\.svg'"):
        ke.plot("efficientnet-b0", tmp_path / "x.svgz")
    with pytest.raises(FileNotFoundError, match="folder"):
        ke.plot("efficientnet-b0", tmp_path / "nowhere" / "x.svg")
    with pytest.raises(ValueError, match="Nearest"):
        ke.plot(["efficientnet-b0", "efficientnet-x"], tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("shallow")
def test_keras_draws_and_summarises_too(tmp_path, capsys):
    model = ke.EfficientNetLite0(weights=None)
    model.summary()
    assert "block7a_project_bn" in capsys.readouterr().out
    if BACKEND == "tensorflow":
        import pydot

        try:
            pydot.Dot.create(pydot.Dot())
        except OSError:
            pytest.skip("graphviz, which plot_model calls, is not installed")
        keras.utils.plot_model(model, tmp_path / "model.png")
        assert (tmp_path / "model.png").stat().st_size > 10_000

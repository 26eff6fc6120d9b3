"""Variants resolve into the published parameters and multiply-adds, and into the blocks of the original and of timm."""

from dataclasses import replace

import pytest
from helpers import golden, shallow_nets
from hypothesis import given
from hypothesis import strategies as st

from keras_effnet import describe, list_models
from keras_effnet.nets.architecture import with_widths
from keras_effnet.nets.scaling import resolve, round_filters, round_repeats
from keras_effnet.nets.variants import VARIANTS, nearest

# Millions of trainable parameters: tables of arXiv 1905.11946 and of tensorflow/tpu's READMEs.
PUBLISHED_M = {
    "efficientnet-b0": 5.3,
    "efficientnet-b1": 7.8,
    "efficientnet-b2": 9.2,
    "efficientnet-b3": 12,
    "efficientnet-b4": 19,
    "efficientnet-b5": 30,
    "efficientnet-b6": 43,
    "efficientnet-b7": 66,
    "efficientnet-l2": 480,
    "efficientnet-lite0": 4.7,
    "efficientnet-lite1": 5.4,
    "efficientnet-lite2": 6.1,
    "efficientnet-lite3": 8.2,
    "efficientnet-lite4": 13.0,
}


@pytest.mark.parametrize("name", PUBLISHED_M)
def test_parameters_are_the_published_ones(name):
    published = PUBLISHED_M[name]
    # The paper's B2 rounds 9.11 up.
    assert describe(name)["params"] / 1e6 == pytest.approx(published, abs=0.1 if published < 10 else 0.5)


ORIGINALS = ["efficientnet-b0", "efficientnet-lite0", "efficientnet-edgetpu-S", "efficientnet-condconv-b0-4e"]


@pytest.mark.parametrize("file", ORIGINALS)
def test_blocks_are_the_originals(file):
    reference = golden(f"tpu/{file}.json")
    architecture = resolve(VARIANTS[file.lower()])
    assert len(architecture.blocks) == reference["num_blocks"]
    for block, rate, row in zip(architecture.blocks, architecture.drop_connect_rates, reference["blocks"], strict=True):
        assert [block.kernel_size, block.strides] == [row["kernel_size"], row["strides"][0]]
        assert (block.filters_out, block.se_filters, block.residual) == (
            row["output_filters"],
            row["se_filters"] or 0,
            row["residual"],
        )
        assert block.inner_filters == row["input_filters"] * row["expand_ratio"]
        assert block.num_experts == (reference["condconv_num_experts"] if row["condconv"] else 0)
        # The original has no rate for a block without a skip connection.
        assert 1 - rate == pytest.approx(row["survival_prob"], abs=1e-12)
    assert {f"reduction_{n + 1}": index for n, index in enumerate(architecture.reductions)} == reference[
        "reduction_endpoint_block"
    ]


def test_multiply_adds_are_those_that_timm_counts():
    # Convolutions and linear layers of timm 1.0.31's tf_efficientnet_* at their own resolution.
    assert describe("efficientnet-b0")["macs"] == 385_814_752
    assert describe("efficientnet-lite0")["macs"] == 385_187_552
    assert describe("efficientnet-b1")["macs"] == 686_802_832
    assert describe("efficientnet-b2")["macs"] == 993_561_872
    assert describe("efficientnet-b3")["macs"] == 1_827_141_392


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("4e", 13_314_116, 402e6), ("8e", 24_013_284, 413e6), ("8e-depth", 39_715_968, 614e6)],
)
def test_mixed_experts_cost_what_was_published(name, params, macs):
    """Parameters of timm 1.0.31's nets, and multiply-adds of tensorflow/tpu condconv/README.md:30-36, in millions.

    The paper's plain B0 has 391 M, of which 5 M (1.4 %) are neither convolutions nor the classifier.
    """
    described = describe(f"efficientnet-condconv-b0-{name}")
    assert described["params"] == params
    assert described["macs"] * 391 / 385.8 == pytest.approx(macs, rel=2e-3)
    assert described["preprocessing"] == "tpu127" and described["dropout_rate"] == 0.25
    assert described["resolution"] == [224, 224]


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("b1", 6_331_916, 391_208_019), ("b2", 8_309_737, 715_749_145), ("b3", 9_855_020, 1_020_257_090)],
)
def test_pruned_nets_have_timms_channels(name, params, macs):
    """Channels of timm 1.0.31's state dicts, and parameters and multiply-adds counted from its modules."""
    table = golden("timm/pruned_channels.json")[f"efficientnet_{name}_pruned"]
    described = describe(f"efficientnet-{name}-pruned")
    assert (described["params"], described["macs"]) == (params, macs) == (table["params"], macs)
    assert described["preprocessing"] == "inception" and described["resolution"][0] == table["resolution"]
    architecture = resolve(VARIANTS[f"efficientnet-{name}-pruned"])
    assert (architecture.stem_filters, architecture.head_filters) == (table["stem"], table["head"])
    for block, row in zip(architecture.blocks, table["blocks"], strict=True):
        assert (block.filters_in, block.inner_filters, block.se_filters, block.filters_out, block.residual) == tuple(
            row[key] for key in ("in", "expanded", "se", "out", "skip")
        )
        assert (block.kernel_size, block.strides) == (row["kernel"], row["stride"])
        assert bool(block.expand_filters) == (row["stage"] > 0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows[1:], "16 blocks of efficientnet-b0. Received: 15 widths"),
        (lambda rows: [(96, 4, 24, 1), *rows[1:]], r"block 1a .*such as \(0, 8, 16\). Received: \(96, 4, 24, 1\)"),
        (lambda rows: [*rows[:1], (0, 4, 24), *rows[2:]], "block 2a to be positive"),
        (lambda rows: [*rows[:1], (96, 0, 24), *rows[2:]], "block 2a to be positive"),
        (lambda rows: [*rows[:1], (96, 4.0, 24), *rows[2:]], "block 2a to be positive"),
        (lambda rows: [*rows[:2], (144, 6, 23), *rows[3:]], "Expected 24 output channels of block 2b"),
        (lambda rows: {"1a": (0, 8, 16)}, "Missing or unknown: '2a', "),
    ],
)
def test_widths_that_are_no_net_are_told(change, problem):
    b0 = resolve(VARIANTS["efficientnet-b0"])
    with pytest.raises(ValueError, match=problem):
        with_widths(b0, change(list(b0.widths.values())))


def test_a_net_has_its_own_widths():
    b0 = resolve(VARIANTS["efficientnet-b0"])
    assert with_widths(b0, b0.widths) == with_widths(b0, list(b0.widths.values())) == b0
    assert with_widths(b0, [(32, 8, 16), *list(b0.widths.values())[1:]]) == b0  # as timm writes a plain block


def test_parameters_are_exactly_the_originals():
    assert describe("efficientnet-b0")["params"] == golden("tpu/efficientnet-b0.json")["num_params_trainable"]
    assert describe("efficientnet-lite0")["params"] == golden("tpu/efficientnet-lite0.json")["num_params_trainable"]
    # 1001 classes there: one more column and one more bias.
    edgetpu = golden("tpu/efficientnet-edgetpu-S.json")["num_params_trainable"]
    assert describe("efficientnet-edgetpu-s")["params"] == edgetpu - 1281


@pytest.mark.parametrize("name", list_models())
def test_widths_fit_together(name):
    architecture = resolve(VARIANTS[name])
    arriving = architecture.stem_filters
    for block in architecture.blocks:
        assert block.filters_in == arriving
        assert not block.residual or block.filters_in == block.filters_out
        arriving = block.filters_out
    assert len({block.name for block in architecture.blocks}) == len(architecture.blocks)
    assert len(architecture.reductions) == 5
    assert max(architecture.drop_connect_rates) < architecture.drop_connect_rate


@given(st.integers(1, 4096), st.floats(0.1, 6))
def test_round_filters_keeps_within_a_tenth_and_the_divisor(filters, width):
    rounded = round_filters(filters, width)
    assert rounded % 8 == 0 and rounded >= 8
    assert rounded >= 0.9 * (filters * width)
    assert rounded <= max(8, filters * width + 8)


@given(st.integers(1, 20), st.floats(0.1, 6))
def test_round_repeats_never_loses_a_block(repeats, depth):
    assert round_repeats(repeats, depth) - 1 < repeats * depth <= round_repeats(repeats, depth)


def test_shallow_nets_are_known_only_while_they_are_variants():
    """What was looked up before the fixture, or within it, is not what is found within it, or after it."""
    deep = resolve(VARIANTS["efficientnet-lite0"])
    with shallow_nets():
        shallow = resolve(VARIANTS["efficientnet-lite0"])
        assert nearest(shallow) == "efficientnet-lite0" and nearest(deep) is None
    assert nearest(shallow) is None and nearest(deep) == "efficientnet-lite0"
    with shallow_nets():
        assert nearest(shallow) == "efficientnet-lite0"


@pytest.mark.parametrize("name", ["one", "other"])
def test_a_variant_of_a_test_is_known_in_it_alone(name, monkeypatch):
    row = VARIANTS["efficientnet-b0"]
    row = replace(row, name=name, stages=row.stages[:3])
    monkeypatch.setitem(VARIANTS, name, row)
    assert nearest(resolve(row)) == name

"""The registry has the published URLs, hashes and accuracies, and says to which net a set belongs."""

import collections
import re

import pytest
from helpers import golden

import keras_effnet as ke
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.weights import registry


def test_records_are_the_published_ones():
    published = golden("tpu/published.json")["checkpoints"]
    ours = {
        file.url: record.top1
        for record in registry.RECORDS
        for file in record.files
        if file.format == "tpu" and record.publisher == "tpu"
    }
    assert ours == {row["url"]: row["top1"] for row in published} and len(published) == 46


def test_records_of_v2_are_automls():
    """google/automl efficientnetv2/README.md, sections 2, and the sets of B0 to B3 that it does not list."""
    found = {record.model[15:]: {} for record in registry.RECORDS if record.publisher == "automl"}
    for record in registry.RECORDS:
        if record.publisher == "automl":
            found[record.model[15:]][record.tag] = record.top1
            (address,) = [file.url for file in record.files if file.format == "tpu"]
            suffix = "" if record.tag == "1k" else f"-{record.tag}"
            assert address.endswith(f"cloud-tpu-checkpoints/efficientnet/v2/{record.model}{suffix}.tgz")
            assert record.classes == (21843 if record.tag == "21k" else 1000)
    assert {short: sets.get("1k") for short, sets in found.items()} == {
        **{"b0": 78.7, "b1": 79.8, "b2": 80.5, "b3": 82.1},
        **{"s": 83.9, "m": 85.2, "l": 85.7, "xl": None},
    }
    assert [found[short]["21k-ft1k"] for short in ("s", "m", "l", "xl")] == [84.9, 86.2, 86.9, 87.2]
    assert sum(map(len, found.values())) == 23


def test_records_are_unique_and_their_defaults_too():
    keys = [(record.model, record.tag) for record in registry.RECORDS]
    assert len(set(keys)) == len(keys)
    defaults = collections.Counter(record.model for record in registry.RECORDS if record.default)
    assert set(defaults.values()) == {1}
    tpus_own = {name for name in VARIANTS if name[13:15] in ("x-", "h-") and not name.endswith("timm")}
    assert set(VARIANTS) - set(defaults) == {
        "efficientnet-l2",
        "efficientnetv2-xl",
        "efficientnet-b0-composer",
        *tpus_own,
    }
    # keras.applications: the same URLs and md5s as in the installed Keras.
    from keras.src.applications import efficientnet, efficientnet_v2

    for short, hashes in efficientnet_v2.WEIGHTS_HASHES.items():
        name = f"efficientnetv2-{short.strip('-')}"
        files = [file for file in registry.find(name, "imagenet").files if file.format == "keras"]
        assert [file.hash for file in files] == [f"md5:{value}" for value in hashes]
        assert files[0].url == f"{efficientnet_v2.BASE_WEIGHTS_PATH}{name}.h5"
    for short, hashes in efficientnet.WEIGHTS_HASHES.items():
        files = [file for file in registry.find(f"efficientnet-{short}", "imagenet").files if file.format == "keras"]
        assert [file.hash for file in files] == [f"md5:{value}" for value in hashes]
        assert files[0].url == f"{efficientnet.BASE_WEIGHTS_PATH}efficientnet{short}.h5"


def test_timm_records_are_timms():
    """Compares with timm's tables of 50 and 38 tags: URLs, hash, normalization, interpolation, size, crop, top-1."""
    records = {record.tag: record for record in registry.RECORDS}
    published = golden("timm/pretrained_cfgs.json")
    own = golden("timm/v2_native_cfgs.json")
    assert len(own) == 38 and own.keys() | published.keys() <= records.keys()
    for tag, row in (published | own).items():
        record, model = records[tag], tag.split(".")[0]
        *release, hub = record.files
        if row["url"]:
            assert release[0].url.split("/releases/")[1] == row["url"].split("/releases/")[1]
            assert release[0].hash == f"sha256:{row['url'][-12:-4]}"
        assert hub.url.endswith(f"timm/{tag}/resolve/main/model.safetensors")
        assert record.preprocessing == ("inception" if row["mean"][0] == 0.5 else "imagenet")
        assert record.interpolation == row["interpolation"]
        assert record.licence.lower() == row["license"]
        row = {"test": row["input_size"][1], "classes": 1000} | row if "input_size" in row else row
        size = record.resolution
        crop = row.get("test_crop_pct") or row["crop_pct"]
        assert (size, record.classes) == (row["test"], row["classes"])
        assert size / (size + record.crop_padding) == pytest.approx(crop, abs=0.0025)
        assert record.crop_mode == row.get("crop_mode", "center")
        for result in row.get("results", ()):
            if result["size"] == size:
                assert (record.top1, record.top5) == (result["top1"], result["top5"])
        is_port = tag.startswith("tf_") or re.match("efficientnet_b[123]_pruned", tag)
        assert record.padding == ("same" if is_port else "symmetric")
        for name in (tag, f"timm/{tag}", f"hf-hub:timm/{tag}"):
            assert registry.find(record.model, name) is record, model
        assert registry.find(record.model, tag.split(".")[1]).tag.split(".")[1] == tag.split(".")[1]


def test_a_tag_alone_is_that_of_the_port():
    assert registry.find("efficientnet-edgetpu-s", "in1k").tag == "tf_efficientnet_es.in1k"
    assert registry.find("efficientnet-b5", "ra_in1k").tag == "tf_efficientnet_b5.ra_in1k"


def test_the_best_sets_are_those_of_imagenet_alone():
    best = {name: found.tag for name in VARIANTS if (found := registry.best(name))}
    assert best["efficientnet-b0"] == "efficientnet_b0.ra4_e3600_r224_in1k"
    assert best["efficientnet-b7"] == "advprop"  # 85.2, Noisy Student and its port are better and had more data
    assert best["efficientnetv2-s"] == "1k" and best["efficientnet-lite0"] == "efficientnet_lite0.ra_in1k"
    assert "efficientnetv2-xl" not in best and "efficientnet-l2" not in best
    for name, tag in best.items():
        top1 = registry.find(name, "best").top1
        assert registry.find(name, "best").tag == tag
        assert all(record.extra_data or (record.top1 or 0) <= top1 for record in registry.of_model(name))


def test_ports_stand_in_for_the_originals():
    for record in registry.RECORDS:
        formats = [file.format for file in record.files]
        assert ("tpu" in formats) == (record.publisher != "timm")
        assert "timm" in formats or record.publisher == "automl", record
    offsets = {
        record.model: file.class_offset for record in registry.RECORDS for file in record.files if file.class_offset
    }
    assert offsets == {f"efficientnet-edgetpu-{size}": 1 for size in "sml"}


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("tf_efficientnetv2_b0.in1k", "They are of efficientnetv2-b0"),
        ("timm/efficientnet_b1.ft_in1k", "They are of efficientnet-b1"),
        ("hf-hub:timm/gc_efficientnetv2_rw_t.agc_in1k", "They are of efficientnetv2-rw-t-gc"),
        ("efficientnet_b2_pruned.in1k", "They are of efficientnet-b2-pruned"),
        ("in21k_ft_in1k", "Unknown weights"),
    ],
)
def test_other_nets_are_refused_by_tag(tag, reason):
    with pytest.raises(ValueError, match=reason):
        ke.EfficientNetB0(weights=tag)


def test_wrong_kinds_of_weights_are_told():
    for weights in (5, b"x", ["imagenet"]):
        with pytest.raises(ValueError, match="Expected weights to be a tag"):
            ke.EfficientNetB0(weights=weights)
        with pytest.raises(ValueError, match="Expected the path"):
            ke.weights.verify(weights, "efficientnet-b0")
        with pytest.raises(ValueError, match="Expected the tag"):
            ke.load_image("docs/cat.png", "efficientnet-b0", weights=weights)


def test_every_address_is_well_formed():
    files = {(file.url, file.package, file.path): file for record in registry.RECORDS for file in record.files}
    for file in files.values():
        assert bool(file.url) != bool(file.package)
        assert not file.url or re.fullmatch(r"https://[a-z.]+/[\w./-]+\.(h5|tar\.gz|tgz|pth|safetensors)", file.url)
        assert re.fullmatch(r"|sha256:([0-9a-f]{8}|[0-9a-f]{64})|md5:[0-9a-f]{32}", file.hash)
    assert sum(file.format == "keras" for file in files.values()) == 30

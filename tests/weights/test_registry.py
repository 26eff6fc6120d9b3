"""The registry has the published URLs, hashes and accuracies, and refuses weights of other nets."""

import collections
import re

import pytest
from helpers import golden

import keras_effnet as ke
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.weights import registry


def test_records_are_the_published_ones():
    published = golden("tpu/published.json")["checkpoints"]
    ours = {file.url: record.top1 for record in registry.RECORDS for file in record.files if file.format == "tpu"}
    assert ours == {row["url"]: row["top1"] for row in published} and len(published) == 46


def test_records_are_unique_and_their_defaults_too():
    keys = [(record.model, record.tag) for record in registry.RECORDS]
    assert len(set(keys)) == len(keys)
    defaults = collections.Counter(record.model for record in registry.RECORDS if record.default)
    assert set(defaults.values()) == {1}
    assert set(VARIANTS) - set(defaults) == {"efficientnet-l2"}
    # keras.applications: the same URLs and md5s as in the installed Keras.
    from keras.src.applications import efficientnet

    for short, hashes in efficientnet.WEIGHTS_HASHES.items():
        files = [file for file in registry.find(f"efficientnet-{short}", "imagenet").files if file.format == "keras"]
        assert [file.hash for file in files] == [f"md5:{value}" for value in hashes]
        assert files[0].url == f"{efficientnet.BASE_WEIGHTS_PATH}efficientnet{short}.h5"


def test_timm_records_are_timms():
    """Compares with timm's table of 50 tags: URLs, hash, normalization, interpolation, size and crop."""
    records = {record.tag: record for record in registry.RECORDS}
    published = golden("timm/pretrained_cfgs.json")
    refused = [tag for tag in published if tag not in records]
    assert len(published) - len(refused) == 46
    for tag, row in published.items():
        model = tag.split(".")[0]
        if tag in refused:
            for name in (tag, tag.split(".")[1], f"timm/{tag}"):
                if tag != "tf_efficientnetv2_s.in1k" or name != "in1k":  # a tag that B0 has as well
                    with pytest.raises(ValueError, match=r"wrong outputs here|another network"):
                        registry.find("efficientnet-b0", name)
            continue
        record = records[tag]
        release, hub = record.files
        assert release.url.split("/releases/")[1] == row["url"].split("/releases/")[1]
        assert release.hash == f"sha256:{row['url'][-12:-4]}"
        assert row["hf_hub_id_resolved"] in hub.url
        assert record.preprocessing == ("inception" if row["mean"][0] == 0.5 else "imagenet")
        assert record.interpolation == row["interpolation"]
        assert record.licence.lower() == row["license"]
        if record.model in VARIANTS:
            size = record.resolution or VARIANTS[record.model].resolution
            assert [size, size] == row["input_size"][1:]
            assert size / (size + record.crop_padding) == pytest.approx(row["crop_pct"], abs=0.0025)
            for name in (tag, tag.split(".")[1], f"timm/{tag}", f"hf-hub:timm/{tag}"):
                assert registry.find(record.model, name) is record, model


def test_ports_stand_in_for_the_originals():
    for record in registry.RECORDS:
        formats = [file.format for file in record.files]
        assert ("tpu" in formats) == (record.publisher == "tpu")
        assert "timm" in formats, record
    offsets = {
        record.model: file.class_offset for record in registry.RECORDS for file in record.files if file.class_offset
    }
    assert offsets == {f"efficientnet-edgetpu-{size}": 1 for size in "sml"}


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("efficientnet_b0.ra_in1k", "epsilon 1e-5"),
        ("efficientnet_lite0.ra_in1k", "epsilon 1e-5"),
        ("efficientnet_es_pruned.in1k", "epsilon 1e-5"),
        ("ra4_e3600_r224_in1k", "epsilon 1e-5"),
        ("tf_efficientnetv2_b0.in1k", "another network"),
        ("in21k_ft_in1k", "another network"),
        ("timm/efficientnet_b0.ra_in1k", "epsilon 1e-5"),
        ("hf-hub:timm/gc_efficientnetv2_rw_t.agc_in1k", "another network"),
        ("efficientnet_b2_pruned.in1k", "Unknown weights"),
    ],
)
def test_other_nets_are_refused_by_tag(tag, reason):
    with pytest.raises(ValueError, match=reason):
        ke.EfficientNetB0(weights=tag)


def test_timms_own_nets_are_refused_by_their_hash(tmp_path, monkeypatch):
    path = tmp_path / "b0.pth"
    path.write_bytes(b"some bytes")
    assert registry.recognise("efficientnet-b0", path) is None
    monkeypatch.setattr(registry, "_NATIVE_SHA256", (registry.digest(path, "sha256")[7:15],))
    with pytest.raises(ValueError, match="epsilon 1e-5"):
        ke.EfficientNetB0(weights=path)
    path.write_bytes(b"\x80 and more")
    monkeypatch.setattr(registry, "_NATIVE_SHA256", (registry.digest(path, "sha256")[7:15],))
    with pytest.raises(ValueError, match="epsilon 1e-5"):
        ke.weights.verify(path, "efficientnet-b0")


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
        assert not file.url or re.fullmatch(r"https://[a-z.]+/[\w./-]+\.(h5|tar\.gz|pth|safetensors)", file.url)
        assert re.fullmatch(r"|sha256:([0-9a-f]{8}|[0-9a-f]{64})|md5:[0-9a-f]{32}", file.hash)
    assert sum(file.format == "keras" for file in files.values()) == 16

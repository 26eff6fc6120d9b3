"""Damage to what the package keeps on disk changes no result: exports of a `Predictor`, features of a probe."""

import json

import numpy as np
import pytest
from fuzz.mutations import of_bytes, of_json
from helpers import BACKEND
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import keras_effnet as ke

if BACKEND != "tensorflow":
    pytest.skip("files that are kept do not depend on the backend", allow_module_level=True)


pytestmark = pytest.mark.filterwarnings("ignore:A kept file is damaged:UserWarning")


def hunt(cases: int, strategy, check) -> None:
    """Calls a function with damaged files."""

    @settings(
        max_examples=cases,
        derandomize=cases < 100,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        check(case)

    run()


@pytest.mark.parametrize("cases", [5, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["*.litert.json", pytest.param("*.fastest.json", marks=pytest.mark.long)])
def test_a_damaged_record_of_an_export_changes_no_prediction(kind, cases, tmp_path, monkeypatch):
    import keras

    pytest.importorskip("ai_edge_litert")
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    layers = keras.layers
    head = [layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(2, activation="softmax")]
    path = ke.save_model(keras.Sequential([keras.Input((8, 8, 3)), *head]), tmp_path / "x.keras", labels=["a", "b"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), "uint8")
    runtime = "auto" if "fastest" in kind else "litert"
    expected = ke.Predictor(path, runtime)(pixels)
    (record,) = (tmp_path / "home").rglob(kind)
    whole = record.read_bytes()

    def check(case: bytes) -> None:
        record.write_bytes(case)
        predictor = ke.Predictor(path, runtime)
        np.testing.assert_allclose(predictor(pixels), expected, atol=1e-5)
        assert predictor.labels == ["a", "b"]

    trees = of_json(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
    hunt(cases, st.one_of(of_bytes(whole), trees), check)


@pytest.mark.parametrize("cases", [10, pytest.param(1000, marks=pytest.mark.long)])
def test_damaged_features_change_nothing(cases, tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    from keras_effnet.tpu import recipes
    from keras_effnet.tpu.input import features
    from keras_effnet.tpu.input.example_readers import Items
    from keras_effnet.tpu.input.skipped_examples import Skipped

    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), "uint8")
    view = features.View(Items(images, np.arange(6)), 6, recipes.find("digits_demo"), 8)

    def compute() -> features.Features:
        return features.compute(view, "means", lambda batch: batch.mean((1, 2)), Skipped(None, 6))

    expected = compute()
    (kept,) = tmp_path.rglob("*.npz")

    def check(case: bytes) -> None:
        kept.write_bytes(case)
        found = compute()
        for name in ("values", "labels", "ordinals"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))

    hunt(cases, of_bytes(kept.read_bytes()), check)

"""Fixtures and settings of all tests."""

import os
import sys

import hypothesis
import keras
import pytest
from helpers import ROOT, VARIANTS, make_shallow

# A commit passes or fails: the same examples in each run. HYPOTHESIS_PROFILE=default looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Keras goes through L2's graph in 890 nested calls, to which pytest and its workers add theirs.
sys.setrecursionlimit(3000)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random values, whatever ran before it in its process."""
    keras.utils.set_random_seed(0)


@pytest.fixture
def shallow(monkeypatch):
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, variant)
    make_shallow()


@pytest.fixture
def photograph() -> str:
    return str(ROOT / "docs" / "cat.png")

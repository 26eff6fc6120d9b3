"""Settings and fixtures of all tests."""

import contextlib
import gc
import os
from unittest import mock

import hypothesis
import keras
import pytest
from helpers import BACKEND, ROOT, forget_variants, shallow_nets

# Layers and graphs are millions of objects that stay: with Python's own limits, an eighth of the time is collection.
gc.set_threshold(200_000, 20, 100)

# Every run tests the same examples, so that a commit passes or fails. HYPOTHESIS_PROFILE=default draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# Keras sets TensorFlow's own seed too. That discards all operations that are ready to run, and making them anew takes a
# tenth of the time of building nets. Only the dropout of tf_keras draws with it: test_keras2.py sets it.
KEEPS_KERNELS = mock.patch("tensorflow.random.set_seed") if BACKEND == "tensorflow" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _fresh():
    """Starts every test from the same random values and the whole table of variants, whatever ran before it."""
    with KEEPS_KERNELS:
        keras.utils.set_random_seed(0)
    forget_variants()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A folder of kept files that the tests of one module share."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_EFFNET_HOME", str(folder))
        yield folder


@pytest.fixture
def shallow():
    """Applies `shallow_nets()` for one test."""
    with shallow_nets():
        yield


@pytest.fixture
def mini():
    """Applies `shallow_nets()` for one test, to the first three stages."""
    with shallow_nets(stages=3):
        yield


@pytest.fixture
def eager():
    """Runs TensorFlow operation by operation. A few steps take less time than tracing them."""
    if BACKEND != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def photograph() -> str:
    """Path of a photo of a cat."""
    return str(ROOT / "docs" / "cat.png")

"""The names of inputs and outputs on docs/deploy.md, for TensorFlow Serving and Triton, are those of the exports."""

import re

import pytest
from helpers import BACKEND, ROOT

import keras_effnet as ke

PAGE = (ROOT / "docs" / "deploy.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the page tells of TensorFlow")
@pytest.mark.filterwarnings("ignore")  # converters
@pytest.mark.usefixtures("shallow")
def test_the_names_of_the_exports_are_those_of_the_page(tmp_path):
    import onnxruntime
    import tensorflow as tf

    net = ke.EfficientNetLite0(weights=None)
    ke.export(net, tmp_path / "1")
    ke.export(net, tmp_path / "model.onnx")
    (section,) = re.findall(r"### TensorFlow Serving\n(.*?)###", PAGE, re.DOTALL)
    signature = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    (image,) = signature.structured_input_signature[1].values()
    assert image.shape.as_list() == [None, 224, 224, 3] and image.dtype == tf.float32
    (name,) = signature.structured_outputs
    assert f"`serving_default`; its input is called `{image.name}` and its output `{name}`" in section
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for kind, places in (("input", session.get_inputs()), ("output", session.get_outputs())):
        (place,) = places
        assert place.type == "tensor(float)" and not isinstance(place.shape[0], int)  # any size of the batch
        told = f'{kind} [{{ name: "{place.name}", data_type: TYPE_FP32, dims: {place.shape[1:]} }}]'
        assert told in PAGE

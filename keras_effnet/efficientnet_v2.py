"""The names of `keras.applications.efficientnet_v2`: code that uses it runs with only the import changed.

One argument has another name: instead of `include_preprocessing=False`, pass `preprocessing=None`.
"""

from keras_effnet.class_names import decode_predictions
from keras_effnet.efficientnet import preprocess_input
from keras_effnet.models import (
    EfficientNetV2B0,
    EfficientNetV2B1,
    EfficientNetV2B2,
    EfficientNetV2B3,
    EfficientNetV2L,
    EfficientNetV2M,
    EfficientNetV2S,
)

__all__ = [
    "EfficientNetV2B0",
    "EfficientNetV2B1",
    "EfficientNetV2B2",
    "EfficientNetV2B3",
    "EfficientNetV2L",
    "EfficientNetV2M",
    "EfficientNetV2S",
    "decode_predictions",
    "preprocess_input",
]

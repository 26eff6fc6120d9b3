"""The names of `keras.applications.efficientnet`: code that uses it runs with only the import changed."""

from keras_effnet.class_names import decode_predictions
from keras_effnet.models import (
    EfficientNetB0,
    EfficientNetB1,
    EfficientNetB2,
    EfficientNetB3,
    EfficientNetB4,
    EfficientNetB5,
    EfficientNetB6,
    EfficientNetB7,
)

__all__ = [
    "EfficientNetB0",
    "EfficientNetB1",
    "EfficientNetB2",
    "EfficientNetB3",
    "EfficientNetB4",
    "EfficientNetB5",
    "EfficientNetB6",
    "EfficientNetB7",
    "decode_predictions",
    "preprocess_input",
]


def preprocess_input(x, data_format: str | None = None):
    """Returns its input unchanged, since the models normalize pixels 0-255 themselves.

    The normalization is the model's layer `preprocessing`. Its constants differ between sets of weights, so a function
    that knows neither the model nor its weights cannot apply them. Code written for `keras.applications` may keep its
    call.

    Args:
        x: Array or tensor of pixels 0-255.
        data_format: `"channels_last"`, `"channels_first"` or None. Has no effect. Defaults to None.

    Returns:
        `x`.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> ke.preprocess_input(np.array([0, 255])).tolist()
    [0, 255]
    """
    return x

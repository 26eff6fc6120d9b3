"""The loss and the top-k hits of a batch, in float32 whatever the model's precision."""

from typing import Any

import keras
import numpy as np

ops: Any = keras.ops


def cross_entropy(labels, logits, smoothing: float = 0.0, weights=None):
    """Returns the cross-entropy of each example.

    Args:
        labels: Class numbers, integers (batch,); or shares of classes, floats (batch, classes).
        logits: Floats (batch, classes), before the softmax.
        smoothing: Float, share of the label that is spread evenly over all classes. Defaults to 0.
        weights: Floats (classes,), factors of the loss of each class. A mixed example has the sum of the losses of its
            classes, each times its share and its factor. Defaults to None: 1 for all.

    Returns:
        Float32 tensor (batch,).

    Example:

    >>> import numpy as np
    >>> from keras_effnet.tpu.step.losses import cross_entropy
    >>> round(float(cross_entropy(np.array([1]), np.zeros((1, 10), "float32"), 0.1)[0]), 4)
    2.3026

    Reference:
        tensorflow/tpu efficientnet main.py:414-418.
    """
    logits = ops.cast(logits, "float32")
    classes = logits.shape[-1]
    if len(labels.shape) == 1:
        labels = ops.one_hot(ops.cast(labels, "int32"), classes, dtype="float32")
    labels, total = ops.cast(labels, "float32"), 1.0
    if weights is not None:
        labels = labels * ops.convert_to_tensor(weights, "float32")
        total = ops.sum(labels, axis=-1, keepdims=True)
    if smoothing:
        labels = labels * (1.0 - smoothing) + smoothing / classes * total
    return -ops.sum(labels * ops.log_softmax(logits, axis=-1), axis=-1)


def sigmoid_cross_entropy(labels, logits, smoothing: float = 0.0, weights=None):
    """Returns the mean over all classes of the cross-entropy of each class alone, for each example.

    Args:
        labels: See `cross_entropy()`. Several classes of one example may have a share of 1.
        logits: Floats (batch, classes), before the sigmoid.
        smoothing: Float, share of each yes or no that becomes half yes, half no. Defaults to 0.
        weights: See `cross_entropy()`. Here they are factors of the classes' own terms.

    Returns:
        Float32 tensor (batch,).

    Example:

    >>> import numpy as np
    >>> from keras_effnet.tpu.step.losses import sigmoid_cross_entropy
    >>> round(float(sigmoid_cross_entropy(np.array([1]), np.zeros((1, 10), "float32"))[0]), 4)
    0.6931

    Reference:
        google/automl efficientnetv2/main.py, `loss_type == "sigmoid"`: tf.losses.sigmoid_cross_entropy.
    """
    logits = ops.cast(logits, "float32")
    if len(labels.shape) == 1:
        labels = ops.one_hot(ops.cast(labels, "int32"), logits.shape[-1], dtype="float32")
    labels = ops.cast(labels, "float32") * (1.0 - smoothing) + 0.5 * smoothing
    terms = ops.relu(logits) - logits * labels + ops.log1p(ops.exp(-ops.abs(logits)))
    if weights is not None:
        terms = terms * ops.convert_to_tensor(weights, "float32")
    return ops.mean(terms, axis=-1)


LOSSES = {"softmax": cross_entropy, "sigmoid": sigmoid_cross_entropy}


def balancing(labels, classes: int) -> tuple[float, ...]:
    """Returns a factor for the loss of each class, by the inverse of its frequency. Their mean over all examples is 1.

    Args:
        labels: Class numbers of all training examples, integers (examples,).
        classes: Integer, number of classes.

    Returns:
        Tuple of floats, 1 for classes without examples.

    Example:

    >>> from keras_effnet.tpu.step.losses import balancing
    >>> balancing([0, 0, 0, 2], classes=3)
    (0.6666666666666666, 1.0, 2.0)
    """
    counts = np.bincount(labels, minlength=classes)
    present = int(np.count_nonzero(counts))
    return tuple(len(labels) / (present * count) if count else 1.0 for count in counts.tolist())


def l2(variables):
    """Returns half the sum of squares of all values.

    Args:
        variables: List of arrays.

    Returns:
        Float32 scalar tensor.

    Example:

    >>> import numpy as np
    >>> from keras_effnet.tpu.step.losses import l2
    >>> float(l2([np.array([1.0, 2.0], "float32"), np.array([3.0], "float32")]))
    7.0
    """
    return sum((ops.sum(ops.square(ops.cast(v, "float32"))) / 2 for v in variables), ops.zeros((), "float32"))


def hits(labels, logits, k: int):
    """Returns whether the label is among the `k` classes with the highest logits.

    Of equal logits, the first counts as higher.

    Args:
        labels: Class numbers, integers (batch,); or shares of classes (batch, classes), of which the largest counts.
        logits: Floats (batch, classes).
        k: Integer.

    Returns:
        Float32 tensor (batch,) of zeros and ones.

    Example:

    >>> import numpy as np
    >>> from keras_effnet.tpu.step.losses import hits
    >>> [float(hit) for hit in hits(np.array([0, 0]), np.array([[0.9, 0.1], [0.1, 0.9]], "float32"), 1)]
    [1.0, 0.0]
    """
    if len(labels.shape) == 2:
        labels = ops.argmax(labels, axis=-1)
    logits, labels = ops.cast(logits, "float32"), ops.cast(labels, "int32")[:, None]
    # Ties are broken as in argmax. in_top_k would count all equal logits, and in bfloat16 many are equal.
    own = ops.take_along_axis(logits, labels, axis=-1)
    before = ops.arange(logits.shape[-1], dtype="int32")[None] < labels
    rank = ops.sum(ops.cast((logits > own) | ((logits == own) & before), "int32"), axis=-1)
    return ops.cast(rank < k, "float32")

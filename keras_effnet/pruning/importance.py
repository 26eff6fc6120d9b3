"""Importance scores: how much each channel matters to the loss."""

from typing import Any

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.errors import one_of
from keras_effnet.nets import inspection
from keras_effnet.pruning.cut_channels import copied
from keras_effnet.pruning.data_and_loss import fit, loss_of
from keras_effnet.pruning.groups import kernels_of

KINDS = ("gradient", "taylor", "magnitude")


def importance(
    model: keras.Model,
    dataset: Any,
    kind: str = "gradient",
    *,
    loss: Any = None,
    batch_size: int = 32,
    verbose: str | int = "auto",
) -> dict[str, np.ndarray]:
    """Computes how much each channel matters to a model's loss.

    Args:
        model: A model of this package, or a functional or sequential model that contains one. It stays unchanged.
        dataset: Data that `keras.Model.fit()` accepts and that can be iterated again, such as a `tf.data.Dataset` of
            batches or a pair of arrays (pixels, labels). Makes one pass over it, with the batch-norm statistics of
            inference. Not used by `"magnitude"`.
        kind: String. `"gradient"`: the sum of |w * dL/dw| over a channel's weights, where dL/dw is the mean over the
            batches. `"taylor"`: the mean over the batches of |the sum of w * dL/dw|. `"magnitude"`: the sum of |w|.
            Defaults to `"gradient"`.
        loss: A Keras loss. Defaults to None: the loss that the model is compiled with, or the cross-entropy that suits
            its output and labels.
        batch_size: Integer. Batch size for arrays. Defaults to 32.
        verbose: See `keras.Model.fit()`. Defaults to `"auto"`.

    Returns:
        Dict from the name of a group (see `groups()`) to an array of floats, one per channel, summed over the
        convolutions of the group.

    Raises:
        ValueError: If the model contains no EfficientNet, the dataset has no batches of pixels and labels, or the loss
            is not finite.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> model = ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> ke.pruning.importance(model, data, verbose=0)["block2a_expand"].shape
    (96,)

    Reference:
        arXiv 2002.08258, section 3; Molchanov et al., arXiv 1611.06440, for `"taylor"`.
    """
    one_of("importance", kind, KINDS)
    holder, reading = inspection.find(model)
    if kind == "magnitude":
        return {
            name: _summed([(_numbers(layer.kernel), axis) for layer, axis in members])
            for name, members in kernels_of(reading).items()
        }
    # In the copy, all scored convolutions have gradients, even those that are frozen in the model.
    copy = copied(model, holder, {})
    kernels = kernels_of(inspection.find(copy)[1])
    wanted = {layer.kernel.path: axis for members in kernels.values() for layer, axis in members}
    for layer in compat.all_layers(copy):
        if not isinstance(layer, keras.Model):
            layer.trainable = getattr(getattr(layer, "kernel", None), "path", None) in wanted
    runner = _AsInference(copy)
    optimizer = _Sums(wanted, by_channel=kind == "taylor")
    # One pass is too short to pay for compiling with XLA. Only JAX needs it.
    jit: Any = "auto" if keras.backend.backend() == "jax" else False
    runner.compile(optimizer, loss_of(model, dataset, loss), jit_compile=jit, auto_scale_loss=False)
    fit(runner, dataset, batch_size, verbose=verbose, shuffle=False)
    batches = int(optimizer.iterations)
    sums = {
        variable.path: _numbers(total) / max(batches, 1)
        for variable, total in zip(runner.trainable_variables, optimizer.sums, strict=True)
        if total is not None
    }

    def scores(layer, axis):
        total = sums[layer.kernel.path]
        return (total, 0) if kind == "taylor" else (_numbers(layer.kernel) * total, axis)

    found = {name: _summed([scores(*member) for member in members]) for name, members in kernels.items()}
    if not batches or not all(np.isfinite(values).all() for values in found.values()):
        received = f"{batches} batches, whose gradients are not all finite" if batches else "no batches"
        raise ValueError(f"Expected batches of pixels and labels with a finite loss. Received: {received}")
    return found


class _Sums(keras.optimizers.Optimizer):
    """Adds up gradients instead of updating the variables, which stay unchanged.

    Args:
        axes: Dict from the path of each variable to score to the axis of its channels.
        by_channel: Boolean. If False, adds up the gradients. If True, adds up, over the batches, the absolute value of
            each channel's sum of variable times gradient.
    """

    def __init__(self, axes: dict[str, int], by_channel: bool):
        super().__init__(learning_rate=0.0, name="sums")
        self.axes, self.by_channel = axes, by_channel
        self.sums: list[Any] = []  # one per variable; None if it is not scored
        self._axes: list[int] = []

    def build(self, variables):
        super().build(variables)
        for variable in variables:
            shape, axis = tuple(variable.shape), self.axes.get(variable.path)
            shape = (shape[axis],) if self.by_channel and axis is not None else shape
            self._axes.append(0 if axis is None else axis % len(variable.shape))
            self.sums.append(None if axis is None else self.add_variable(shape, "zeros", dtype="float32", name="sum"))

    def update_step(self, gradient, variable, learning_rate):
        place = compat.variable_index(self, variable)
        if self.sums[place] is None:
            return
        gradient = keras.ops.cast(gradient, "float32")
        if self.by_channel:
            product = keras.ops.multiply(gradient, keras.ops.cast(variable, "float32"))
            others = [axis for axis in range(len(variable.shape)) if axis != self._axes[place]]
            gradient = keras.ops.abs(keras.ops.sum(product, axis=others))
        self.assign_add(self.sums[place], gradient)


class _AsInference(keras.Model):
    """Trains a model as it predicts: with its batch-norm statistics, and without dropout."""

    def __init__(self, net: keras.Model):
        super().__init__(name="as_inference")
        self.net = net

    def call(self, inputs, training=None):
        return self.net(inputs, training=False)


def _summed(members: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Returns the sum of absolute values per channel over several kernels."""
    rows = [np.abs(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1).sum(1) for array, axis in members]
    return np.sum(rows, axis=0, dtype=float)


def _numbers(variable) -> np.ndarray:
    """Returns a variable as a float32 array."""
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")))

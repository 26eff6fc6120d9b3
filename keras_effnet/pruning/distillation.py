"""Inner distillation: a pruned student learns from the labels and from the inner outputs of its teacher.

Method: arXiv 2002.08258 and its code (yoniaflalo/knapsack_pruning @ 375abf9, external/utils_pruning.py:982-1104).
`keras.distillation` only compares named pairs of equal width, and runs the student a second time for that.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import keras
from keras import ops

from keras_effnet import compat, ranges
from keras_effnet.nets import inspection
from keras_effnet.pruning.data_and_loss import ends_in_activation, fit, last_operation, loss_of


def distill(
    student: keras.Model,
    teacher: keras.Model,
    data: Any,
    validation_data: Any = None,
    *,
    epochs: int = 10,
    gamma: float = 0.2,
    optimizer: Any = None,
    learning_rate: float = 0.01,
    loss: Any = None,
    metrics: Sequence[Any] = ("accuracy",),
    backup_dir: str | os.PathLike | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    batch_size: int = 32,
    verbose: str | int = "auto",
    **kwargs,
) -> keras.callbacks.History:
    """Trains a pruned model to reproduce the whole model, by inner distillation.

    Args:
        student: The model to train in place, as returned by `apply()`. Frozen layers stay frozen.
        teacher: The whole model. It stays unchanged.
        data: Data that `keras.Model.fit()` accepts: batches of (pixels, labels), or a pair of arrays.
        validation_data: Data of the same kind. Defaults to None.
        epochs: Integer. Defaults to 10.
        gamma: Float. Weight of the distillation loss. Defaults to 0.2, as published.
        optimizer: A Keras optimizer. Defaults to None: SGD with momentum 0.9, weight decay 1e-4, and a learning rate
            that warms up over a tenth of the steps and then follows a cosine, as published.
        learning_rate: Float. Peak learning rate of the default optimizer. Defaults to 0.01.
        loss: A Keras loss. Defaults to None: the loss that the teacher is compiled with, or the cross-entropy that
            suits its output and labels.
        metrics: Sequence of Keras metrics of the student's output. Defaults to accuracy.
        backup_dir: Path of a folder to save the state of the training to after each epoch. The same call then resumes
            an interrupted training. Defaults to None.
        callbacks: Sequence of further Keras callbacks.
        batch_size: Integer. Batch size for arrays. Defaults to 32.
        verbose: See `keras.Model.fit()`. Defaults to `"auto"`.
        **kwargs: Further arguments of `keras.Model.fit()`.

    Returns:
        A `keras.callbacks.History` with, for each epoch, `loss`, `task_loss`, `distillation_loss`, the terms of the
        modules (such as `stage4_mse`) and the metrics.

    Raises:
        ValueError: If one of the models contains no EfficientNet, or the student is frozen.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> teacher = ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> student = ke.pruning.apply(teacher, ke.pruning.plan(teacher, None, importance="magnitude"))
    >>> history = ke.pruning.distill(student, teacher, data, epochs=1, verbose=0)
    >>> len(history.history["distillation_loss"])
    1

    Reference:
        arXiv 2002.08258, section 4; recipe of train_pruning.py:88-120.
    """
    ranges.check(
        epochs=(epochs, int, ranges.NOT_NEGATIVE),
        gamma=(gamma, float, ranges.NOT_NEGATIVE),
        learning_rate=(learning_rate, float, ranges.POSITIVE),
        batch_size=(batch_size, int, ranges.COUNT),
    )
    _check_trainable(student)
    with _restored_trainable(teacher):  # `Distiller` freezes it
        distiller = Distiller(student, teacher, gamma)
        distiller.compile(
            optimizer or _optimizer(learning_rate, _steps(data, batch_size), epochs),
            loss_of(teacher, data, loss),
            metrics=list(metrics),
        )
        # Saves weights, optimizer and the state of random numbers.
        backup = [keras.callbacks.BackupAndRestore(os.fspath(backup_dir), double_checkpoint=True)] if backup_dir else []
        return fit(
            distiller,
            data,
            batch_size,
            validation_data=validation_data,
            epochs=epochs,
            callbacks=[*backup, *callbacks],
            verbose=verbose,
            **kwargs,
        )


def _check_trainable(student: keras.Model) -> None:
    """Raises a `ValueError` if all blocks of the student are frozen."""
    holder, reading = inspection.find(student)
    if not any(layer.trainable_weights for name, layer in reading.layers.items() if name.startswith("block")):
        raise ValueError(
            f"Expected a trainable student. Received: {student.name!r}, whose blocks are frozen. Set "
            f"{'student' if holder is student else f'student.get_layer({holder.name!r})'}.trainable = True"
        )


@contextlib.contextmanager
def _restored_trainable(model: keras.Model) -> Iterator[None]:
    """Restores on exit which layers and variables of a model are trainable."""
    layers = [(layer, compat.own_trainable(layer)) for layer in compat.all_layers(model)]
    variables = [(variable, variable.trainable) for variable in model.variables]
    try:
        yield
    finally:
        # One by one: the public setter would also set all layers inside, or do nothing if the layer's own flag is
        # unchanged.
        for layer, trainable in layers:
            compat.set_own_trainable(layer, trainable)
        for variable, trainable in variables:
            variable.trainable = trainable


def _steps(data: Any, batch_size: int) -> int | None:
    """Returns the number of batches per epoch, or None if the dataset does not know it."""
    if isinstance(data, tuple | list):
        return -(-len(data[0]) // batch_size)
    try:
        return len(data)
    except TypeError:
        return None


def _optimizer(learning_rate: float, steps: int | None, epochs: int) -> keras.optimizers.Optimizer:
    """Returns the published optimizer. Without a known number of steps, its learning rate is constant."""
    rate: Any = learning_rate
    if steps is not None:
        warmup = steps * epochs // 10
        rate = keras.optimizers.schedules.CosineDecay(
            learning_rate / 100,
            max(1, steps * epochs - warmup),
            alpha=1e-3,
            warmup_target=learning_rate,
            warmup_steps=warmup,
        )
    return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-4)


class Distiller(keras.Model):
    """Trains a pruned student on the labels and on the outputs of its teacher, module by module.

    The loss is the task's loss plus `gamma` times the distillation loss. The distillation loss is the mean squared
    difference between the student's and the teacher's outputs, averaged over the modules: each layer of the stem and
    of the head, each stage, the pooled features and the logits. Where the student has fewer channels, a learned 1x1
    projection without bias maps them to the teacher's. The projections are discarded after training.

    Args:
        student: The model to train, as returned by `apply()`.
        teacher: The whole model. It is frozen and runs in inference mode.
        gamma: Float. Weight of the distillation loss. Defaults to 0.2.
        **kwargs: Further arguments of `keras.Model`.

    Raises:
        ValueError: If one of the models contains no EfficientNet, or their modules differ.

    Example:

    >>> import numpy as np, keras_effnet as ke
    >>> teacher = ke.EfficientNetLite0(weights=None, classes=2, input_shape=(32, 32, 3))
    >>> data = np.zeros((4, 32, 32, 3)), np.array([0, 1, 0, 1])
    >>> student = ke.pruning.apply(teacher, ke.pruning.plan(teacher, None, importance="magnitude"))
    >>> distiller = ke.pruning.Distiller(student, teacher)
    >>> distiller.compile("adam", "sparse_categorical_crossentropy")
    >>> logs = distiller.fit(*data, verbose=0).history
    >>> "task_loss" in logs, "distillation_loss" in logs, "stage4_mse" in logs
    (True, True, True)

    Reference:
        arXiv 2002.08258, section 4.
    """

    def __init__(self, student: keras.Model, teacher: keras.Model, gamma: float = 0.2, **kwargs):
        super().__init__(**kwargs)
        if {id(layer) for layer in compat.all_layers(student)} & {id(layer) for layer in compat.all_layers(teacher)}:
            raise ValueError(
                "Expected a student that shares no layers with its teacher. Received: "
                f"{student.name!r}, which shares some"
            )
        self.gamma = gamma
        self.student = student
        self._inner_student = _with_modules(student)
        self._inner_teacher = _with_modules(teacher)
        theirs: Any = self._inner_teacher.output
        ours: Any = self._inner_student.output
        if ours.keys() != theirs.keys() or ours["output"].shape != theirs["output"].shape:
            only_one = sorted(ours.keys() ^ theirs.keys())
            raise ValueError(
                "Expected a student and a teacher with the same modules and the same output shape. Received: output "
                f"shapes {ours['output'].shape} and {theirs['output'].shape}; modules of only one of them: "
                f"{', '.join(only_one[:5]) or 'none'}"
            )
        self._inner_teacher.trainable = False
        self.modules = tuple(name for name in theirs if name != "output")
        data_format = inspection.find(student)[1].layers["stem_conv"].data_format
        axis = -1 if data_format == "channels_last" else 1
        self.projections = {
            name: keras.layers.Conv2D(
                theirs[name].shape[axis], 1, use_bias=False, data_format=data_format, name=f"{name}_projection"
            )
            for name in self.modules
            if ours[name].shape[axis] != theirs[name].shape[axis]
        }
        for name, projection in self.projections.items():
            projection.build(ours[name].shape)
        self.terms = [keras.metrics.Mean(f"{name}_mse") for name in self.modules]
        self.task_loss, self.distillation_loss = map(keras.metrics.Mean, ("task_loss", "distillation_loss"))
        self.built = True

    def call(self, inputs, training=None):
        """Returns the student's output, and the mean squared difference of each module."""
        found, goal = self._inner_student(inputs, training=training), self._inner_teacher(inputs, training=False)
        terms = []
        for name in self.modules:
            ours = self.projections[name](found[name]) if name in self.projections else found[name]
            theirs = ops.stop_gradient(ops.cast(goal[name], "float32"))
            terms.append(ops.mean(ops.square(ops.subtract(ops.cast(ours, "float32"), theirs))))
        return {"output": found["output"], "terms": ops.stack(terms)}

    def compute_loss(self, x=None, y=None, y_pred: Any = None, sample_weight=None, training=True):
        """Returns the task's loss plus `gamma` times the mean of the terms."""
        task: Any = super().compute_loss(x, y, y_pred["output"], sample_weight, training)
        terms = y_pred["terms"]
        for place, term in enumerate(self.terms):
            term.update_state(terms[place])
        inner: Any = ops.mean(terms)
        self.task_loss.update_state(task)
        self.distillation_loss.update_state(inner)
        return ops.add(task, ops.multiply(self.gamma, inner))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Returns the metrics of the student's output."""
        return super().compute_metrics(x, y, y_pred["output"], sample_weight)

    def predict(self, *args, **kwargs):
        """Calls the student's `predict()`."""
        return self.student.predict(*args, **kwargs)


def _with_modules(model: keras.Model) -> keras.Model:
    """Returns the model with further outputs: those of the modules that the published code compares.

    They are each layer of the stem and of the head, each stage, the pooled features and the logits
    (utils_pruning.py:982-1104).
    """
    holder, reading = inspection.find(model)
    if model is not holder:
        return _around(model)
    modules = {name: reading.layers[name].output for name in ("stem_conv", "stem_bn", "stem_activation")}
    ends = [*zip(reading.architecture.blocks, reading.block_ends, strict=True), (None, None)]
    for (block, end), (following, _) in pairwise(ends):
        if following is None or following.stage != block.stage:
            modules[f"stage{block.stage}"] = end.output
    modules |= {
        name: reading.layers[name].output
        for name in ("top_conv", "top_bn", "top_activation", "avg_pool", "max_pool")
        if name in reading.layers
    }
    return keras.Model(model.inputs, {"output": model.output, **modules, "logits": _logits(model)})


def _around(model: keras.Model) -> keras.Model:
    """Does the same as `_with_modules()` for a model that contains the network as a layer."""
    modules: dict[str, Any] = {}

    def call(layer, *args, **kwargs):
        if not isinstance(layer, keras.Model):
            return layer(*args, **kwargs)
        try:
            inner = _with_modules(layer)
        except ValueError:  # a model other than the network
            return layer(*args, **kwargs)
        modules.update(inner(*args, **kwargs))
        return modules["output"]

    # `clone_model` takes a call function for functional models only, not for sequential ones.
    graph = keras.Model(model.inputs, model.outputs)
    same = keras.models.clone_model(graph, clone_function=lambda layer: layer, call_function=call)
    last = compat.producer(model.outputs[0])
    if not isinstance(last, keras.Model):
        modules["logits"] = _logits(same)
    elif inspection.find(model)[0] is not last:  # the head is itself a model
        modules["logits"] = same.outputs[0]
    return keras.Model(same.inputs, modules | {"output": same.outputs[0]})


def _logits(model: keras.Model):
    """Returns a classifier's output before its last activation, or the output of a model that ends without one."""
    operation, arriving = last_operation(model)
    if not ends_in_activation(model):
        return model.outputs[0]
    return _Logits(operation)(arriving) if isinstance(operation, keras.layers.Dense) else arriving


class _Logits(keras.layers.Layer):
    """Computes the output of a dense layer before its activation."""

    def __init__(self, dense: keras.layers.Dense):
        super().__init__(dtype=dense.dtype_policy, name=f"{dense.name}_logits")
        self.dense = dense

    def build(self, input_shape):
        self.built = True

    def call(self, inputs):
        outputs = ops.matmul(inputs, self.dense.kernel)
        return outputs if self.dense.bias is None else ops.add(outputs, self.dense.bias)

"""Builds the model and the learner of a recipe, and the model that a run exports."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_effnet import models
from keras_effnet.nets import inspection
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.tpu.config import Recipe, Run
from keras_effnet.tpu.step import optimizers, schedules
from keras_effnet.tpu.step.train_step import Learner


def policy(run: Run, machine) -> str:
    """Returns the dtype policy of the layers of a run.

    Args:
        run: `Run`.
        machine: `Devices` of a runner.

    Returns:
        String, name of a `keras.DTypePolicy`.
    """
    low = run.precision == "mixed_bfloat16" or (run.precision == "auto" and machine.is_tpu)
    return "mixed_bfloat16" if low else "float32"


def build(recipe: Recipe, classes: int, dtype: str) -> keras.Model:
    """Builds the model of a recipe, with the values that its training starts from.

    Args:
        recipe: `Recipe`.
        classes: Integer, number of classes.
        dtype: String, dtype or policy of the layers.

    Returns:
        A `keras.Model` that returns logits.
    """
    how, donor = recipe.model, None
    scheme: Any = how.preprocessing
    if how.weights is not None:
        top: dict[str, Any] = {"classes": classes} if how.keep_top else {"include_top": False}
        donor = models.create_model(
            how.name, weights=how.weights, preprocessing=scheme, classifier_activation=None, **top, **_shape(recipe)
        )
        scheme = _scheme(donor)
    model = models.create_model(
        how.name,
        weights=None,
        classes=classes,
        classifier_activation=None,
        preprocessing=scheme,
        dtype=dtype,
        **_shape(recipe),
    )
    for layer in donor.layers if donor else ():
        model.get_layer(layer.name).set_weights(layer.get_weights())
    if donor and not how.keep_top:
        # Zeros, as in Big Transfer (arXiv 1912.11370, `zero_head` in its code). The usual random values, up to
        # 1 / sqrt(classes), are meant for nets without weights: with few classes, their gradients undo what the body
        # has learned.
        classifier: Any = model.get_layer("predictions")
        classifier.set_weights([np.zeros_like(values) for values in classifier.get_weights()])
    for layer in model.layers:
        frozen = how.freeze == "batch-norm" and isinstance(layer, keras.layers.BatchNormalization)
        if frozen or (how.freeze == "all-but-top" and layer.name != "predictions"):
            layer.trainable = False
    return model


def _shape(recipe: Recipe) -> dict[str, Any]:
    how = recipe.model
    size = how.image_size or VARIANTS[how.name].resolution
    return {
        "input_shape": (size, size, 3),
        "dropout_rate": how.dropout_rate,
        "drop_connect_rate": how.drop_connect_rate,
        "bn_momentum": how.bn_momentum,
        "bn_epsilon": how.bn_epsilon,
    }


def _scheme(model: keras.Model) -> tuple[Any, Any]:
    """Returns scale and offset of a model's pixel normalization."""
    reading = inspection.read(model)
    return reading.scale, reading.offset


def make_learner(model: keras.Model, recipe: Recipe, steps_per_epoch: float, total: int) -> Learner:
    """Builds the learner of a recipe: its loss, optimizer, schedule and moving average.

    Args:
        model: A `keras.Model` that returns logits.
        recipe: `Recipe`.
        steps_per_epoch: Float, images divided by the global batch, not rounded.
        total: Integer, steps of the whole run.

    Returns:
        A `Learner`.
    """
    how = recipe.optimizer
    hyper = {field.name: getattr(how, field.name) for field in dataclasses.fields(optimizers.Hyperparameters)}
    schedule = dataclasses.asdict(recipe.schedule)
    return Learner(
        model,
        optimizers.Optimizer(how.name, optimizers.Hyperparameters(**hyper), how.clip_norm),
        schedules.Schedule(recipe.peak, steps_per_epoch, total, **schedule),
        smoothing=recipe.label_smoothing,
        weight_decay=how.weight_decay,
        decayed=how.decayed,
        average_decay=recipe.average_decay,
        seed=recipe.run.seed,
    )


def export(recipe: Recipe, classes: int, learner: Learner, state) -> keras.Model:
    """Builds a plain model with the moving average of all variables.

    Args:
        recipe: `Recipe`.
        classes: Integer, number of classes.
        learner: `Learner`.
        state: `State`, or any object with its `averages`.

    Returns:
        A `keras.Model` that returns probabilities.
    """
    scheme = _scheme(learner.model)
    model = models.create_model(
        recipe.model.name, weights=None, classes=classes, preprocessing=scheme, **_shape(recipe)
    )
    names = [v.path for v in (*learner.model.trainable_variables, *learner.moving)]
    averages = dict(zip(names, state.averages, strict=True))
    for variable in model.weights:
        variable.assign(averages[variable.path])
    return model

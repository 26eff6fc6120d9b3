"""Builds the model and the learner of a recipe, and the model that a run exports."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import keras
import numpy as np

from keras_effnet import model_metadata, models
from keras_effnet.errors import one_of
from keras_effnet.nets import inspection
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS, find_model
from keras_effnet.tpu.config import Model, Recipe, Run, settled
from keras_effnet.tpu.input.crops import eval_padding
from keras_effnet.tpu.input.sources import Source
from keras_effnet.tpu.resume import cloud_files
from keras_effnet.tpu.step import optimizers, schedules
from keras_effnet.tpu.step.train_step import Learner

# The first NVIDIA GPUs that compute with bfloat16: CUDA C++ Programming Guide, table of compute capabilities.
BFLOAT16 = (8, 0)


def policy(run: Run, machine) -> str:
    """Returns the dtype policy of the layers of a run.

    Args:
        run: `Run`.
        machine: `Devices` of a runner.

    Returns:
        String, name of a `keras.DTypePolicy`.
    """
    if run.precision != "auto":
        return run.precision
    return "mixed_bfloat16" if machine.is_tpu or machine.capability >= BFLOAT16 else "float32"


def whole(recipe: Recipe) -> Recipe:
    """Fills the fields of a recipe that follow from its model and its weights.

    Args:
        recipe: `Recipe`.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If there is no such model, or there are no such weights.
        OSError: If the file of the weights cannot be read.
    """
    how = replace(recipe.model, name=find_model(recipe.model.name))
    usual = {} if how.padding and how.bn_epsilon else models.numerics_of(how.name, how.weights, how.padding)
    return settled(replace(recipe, model=how), **usual)


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
        if how.keep_top and not models.has_classifier(how.name, how.weights, classes):
            raise ValueError(
                f"Expected weights with a classifier for {classes} classes, as --model.keep-top needs. Received: "
                f"--model.weights {how.weights}"
            )
        top: dict[str, Any] = {"classes": classes} if how.keep_top else {"include_top": False}
        donor = models.create_model(
            how.name, weights=how.weights, preprocessing=scheme, classifier_activation=None, **top, **_shape(recipe)
        )
        scheme = _scheme(donor)
    shape = _shape(recipe)
    if recipe.progress.sizes:
        shape["input_shape"] = (None, None, 3)
    model = models.create_model(
        how.name,
        weights=None,
        classes=classes,
        classifier_activation=None,
        preprocessing=scheme,
        dtype=dtype,
        **shape,
    )
    for layer in donor.layers if donor else ():
        model.get_layer(layer.name).set_weights(layer.get_weights())
    if donor and not how.keep_top:
        # Zeros, as in Big Transfer (arXiv 1912.11370, `zero_head` in its code). The usual random values, up to
        # 1 / sqrt(classes), are meant for nets without weights: with few classes, their gradients undo what the body
        # has learned.
        classifier: Any = model.get_layer("predictions")
        classifier.set_weights([np.zeros_like(values) for values in classifier.get_weights()])
    is_frozen = freezing(how)
    for layer in model.layers:
        if is_frozen(layer):
            layer.trainable = False
    return model


# Values of `Model.freeze` that name no block, and the layers that they freeze.
_FREEZE: dict[str, Callable[[keras.Layer], bool]] = {
    "none": lambda layer: False,
    "batch-norm": lambda layer: isinstance(layer, keras.layers.BatchNormalization),
    "all-but-top": lambda layer: layer.name != "predictions",
}


def freezing(how: Model) -> Callable[[keras.Layer], bool]:
    """Returns which layers are not trained.

    Args:
        how: `Model`.

    Returns:
        Function of a layer of the model that returns a boolean.

    Raises:
        ValueError: If the model has no block of that name. The message names the nearest ones.

    Example:

    >>> from keras_effnet.tpu.config import Model
    >>> from keras_effnet.tpu.model_from_recipe import freezing
    >>> freezing(Model(freeze="block8"))
    Traceback (most recent call last):
    ...
    ValueError: Unknown model.freeze. Received: 'block8'. Nearest: 'block7', 'block6', 'block5'
    """
    if how.freeze in _FREEZE:
        return _FREEZE[how.freeze]
    blocks = resolve(VARIANTS[how.name]).blocks
    names = [f"block{block.name}" for block in blocks]
    stages = [f"block{block.stage}" for block in blocks]
    one_of("model.freeze", how.freeze, [*_FREEZE, *dict.fromkeys(stages), *names])
    first = next(n for n, pair in enumerate(zip(stages, names, strict=True)) if how.freeze in pair)
    frozen = {"stem", *names[:first]}
    return lambda layer: layer.name.split("_")[0] in frozen


def _shape(recipe: Recipe) -> dict[str, Any]:
    how, size = recipe.model, recipe.image_size
    return {
        "input_shape": (size, size, 3),
        "dropout_rate": how.dropout_rate,
        "drop_connect_rate": how.drop_connect_rate,
        "bn_momentum": how.bn_momentum,
        "bn_epsilon": how.bn_epsilon,
        "padding": how.padding,
    }


def _scheme(model: keras.Model) -> tuple[Any, Any]:
    """Returns scale and offset of a model's pixel normalization."""
    reading = inspection.read(model)
    return reading.scale, reading.offset


def make_learner(
    model: keras.Model,
    recipe: Recipe,
    steps_per_epoch: float,
    total: int,
    class_weights: tuple[float, ...] | None = None,
) -> Learner:
    """Builds the learner of a recipe: its loss, optimizer, schedule and moving average.

    Args:
        model: A `keras.Model` that returns logits.
        recipe: `Recipe`.
        steps_per_epoch: Float, images divided by the global batch, not rounded.
        total: Integer, steps of the whole run.
        class_weights: See `Learner`. Defaults to None.

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
        loss=recipe.loss,
        smoothing=recipe.label_smoothing,
        weight_decay=how.weight_decay,
        decayed=how.decayed,
        average_decay=recipe.average_decay,
        body_scale=how.body_scale,
        seed=recipe.run.seed,
        class_weights=class_weights,
        scales_loss=recipe.run.precision == "mixed_float16",
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
        recipe.model.name,
        weights=None,
        classes=classes,
        preprocessing=scheme,
        classifier_activation=recipe.loss,
        **_shape(recipe),
    )
    names = [v.path for v in (*learner.model.trainable_variables, *learner.moving)]
    averages = dict(zip(names, state.averages, strict=True))
    for variable in model.weights:
        variable.assign(averages[variable.path])
    return model


def body(recipe: Recipe) -> keras.Model:
    """Builds the model of a recipe without its classifier, with the weights that the recipe starts from.

    Args:
        recipe: `Recipe`.

    Returns:
        A `keras.Model` that returns the features that the classifier takes.
    """
    how, scheme = recipe.model, cast(Any, recipe.model.preprocessing)
    return models.create_model(
        how.name, weights=how.weights, include_top=False, pooling="avg", preprocessing=scheme, **_shape(recipe)
    )


def with_classifier(recipe: Recipe, features: keras.Model, kernel: np.ndarray, bias: np.ndarray) -> keras.Model:
    """Builds a plain model of a body and a classifier.

    Args:
        recipe: `Recipe`.
        features: A `keras.Model` of `body()`.
        kernel: Array (features, classes).
        bias: Array (classes,).

    Returns:
        A `keras.Model` that returns probabilities.
    """
    model = models.create_model(
        recipe.model.name, weights=None, classes=len(bias), preprocessing=_scheme(features), **_shape(recipe)
    )
    for layer in features.layers:
        if layer.weights:
            model.get_layer(layer.name).set_weights(layer.get_weights())
    classifier: Any = model.get_layer("predictions")
    classifier.set_weights([kernel, bias])
    return model


def classes_of(recipe: Recipe, source: Source) -> int:
    """Returns the number of classes of a recipe's model.

    Args:
        recipe: `Recipe`.
        source: `Source` of its data.

    Returns:
        Integer.

    Raises:
        ValueError: If the recipe has fewer classes than the data.
    """
    classes = recipe.data.classes or source.classes
    if classes < source.classes:
        raise ValueError(
            f"Expected data.classes to be at least {source.classes}, as there are in the data. Received: {classes}"
        )
    return classes


def save(
    model: keras.Model, path: str, recipe: Recipe, labels: Sequence[str], step: int, epochs: float, top1: float
) -> dict[str, Any]:
    """Saves a trained model with all that it needs to classify photos.

    Args:
        model: A `keras.Model` that returns probabilities.
        path: String, path of the file, which may be on Cloud Storage.
        recipe: `Recipe`.
        labels: Sequence of the names of the classes in the data. Empty if unknown.
        step: Integer, number of the step.
        epochs: Float, passes over the training images.
        top1: Float, share.

    Returns:
        Dict, see `keras_effnet.metadata()`.
    """
    target: Any = model
    if labels:  # the recipe may have more classes than the data
        target.labels = [*labels, *map(str, range(len(labels), model.output_shape[-1]))]
    data = recipe.data
    target.expects = model_metadata.Expects(eval_padding(recipe.image_size, data), data.interpolation, data.crop_mode)
    target.training_record = {
        "data": recipe.data.source,
        "weights": recipe.model.weights,
        "step": step,
        "epochs": epochs,
        "top1": top1,
    }
    with cloud_files.replacing(path) as here:
        model_metadata.save_model(model, here)
    return model_metadata.of(model)

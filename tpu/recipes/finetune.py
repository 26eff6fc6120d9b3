"""Fine-tuning on your own photos, from Lite0's ImageNet weights.

Command: `keras-effnet train finetune --data FOLDER --workdir runs/mine` (another model: --model.name efficientnet-b0;
other weights: --model.weights noisy-student, or the path of a file)
Hardware: a laptop.
Top-1: depends on your data; for scikit-learn's digits, see docs/finetune.md. The steps are small. The moving average
and the batch-norm momentum are short enough for a short run. Epochs and batch size follow from the number of photos:
`decided()`.
Source: ours.
"""

import dataclasses
from typing import Any

from keras_effnet.tpu.config import SIZED, Augment, Data, Model, Optimizer, Recipe, Run, Schedule, flat, with_fields

_OPEN: Any = None  # until `decided()`

RECIPES = {
    "finetune": Recipe(
        model=Model("efficientnet-lite0", weights="imagenet", bn_momentum=0.9),
        data=Data("photographs"),
        augment=Augment(min_area=0.3),
        optimizer=Optimizer("momentum", per_256=0.08, weight_decay=1e-4),
        schedule=Schedule("cosine", warmup_epochs=_OPEN),
        run=Run(steps_per_loop=20, eval_every=_OPEN, save_every=_OPEN),
        epochs=_OPEN,
        batch_size=_OPEN,
        average_decay=0.99,
    )
}

# Up to so many training images, epochs and batch size. With few photos, what counts is the number of steps: Big
# Transfer (arXiv 1912.11370, section 3.3) takes 500 for all sets of fewer than 20,000 images. 300 photos in batches of
# 32 have 93 in 10 epochs. More epochs and smaller batches give at least 250 from 20 photos on, and mostly 400 to 1000
# (docs/training.md compares them). Batches of fewer than 8 make noisy batch statistics, and batches of more than 32
# take more memory than some laptops have. With many photos, an epoch has thousands of steps, and fewer epochs are
# enough.
_SIZES = (
    (50, 100, 8),
    (200, 40, 8),
    (500, 30, 16),
    (1_000, 15, 16),
    (5_000, 10, 32),
    (20_000, 6, 32),
    (100_000, 4, 32),
    (None, 3, 32),
)
_UNKNOWN = 5_000

_EVALUATIONS = 20  # at most, and as many checkpoints: with few photos, more of them take longer than the training

_PER_REPLICA = 4  # images: fewer make useless batch statistics


def decided(recipe: Recipe, images: int | None, replicas: int = 1) -> tuple[Recipe, dict[str, Any]]:
    """Fills the fields that a recipe leaves to the size of the data.

    Args:
        recipe: `Recipe`.
        images: Integer, number of training images. None if unknown: a few thousand.
        replicas: Integer, number of devices that share a batch. Defaults to 1.

    Returns:
        Tuple of the `Recipe` without such fields, and a dict of those that were filled. What was given stays.

    Example:

    >>> from keras_effnet.tpu import recipes
    >>> from keras_effnet.tpu.recipes.finetune import decided
    >>> decided(recipes.find("finetune"), 1437)[1]
    {'epochs': 10, 'batch_size': 32, 'schedule.warmup_epochs': 1.0, 'run.eval_every': 1.0, 'run.save_every': 1.0}
    """
    given = flat(dataclasses.asdict(recipe))
    count = _UNKNOWN if images is None else images
    epochs, batch = next((epochs, batch) for limit, epochs, batch in _SIZES if limit is None or count <= limit)
    batch = -(-max(batch, _PER_REPLICA * replicas) // replicas) * replicas
    epochs = epochs if given["epochs"] is None else given["epochs"]
    every = max(1.0, epochs / _EVALUATIONS)
    values = dict(zip(SIZED, (epochs, batch, epochs / 10, every, every), strict=True))
    chosen = {name: value for name, value in values.items() if given[name] is None}
    return with_fields(recipe, chosen), chosen

"""Lite0 trained from random values on scikit-learn's digits: a complete run in a few minutes.

Command: `keras-effnet train digits_demo --workdir runs/digits`
Hardware: two cores of a laptop.
Top-1: see docs/finetune.md; on 360 digits that are held out.
Source: ours.
"""

from keras_effnet.tpu.config import Augment, Data, Model, Optimizer, Recipe, Run, Schedule

RECIPES = {
    "digits_demo": Recipe(
        model=Model("efficientnet-lite0", image_size=40, drop_connect_rate=0.0, bn_momentum=0.9),
        data=Data("digits", eval_crop=1.0),
        augment=Augment(min_area=0.7, flip=False),
        optimizer=Optimizer(peak=0.016),
        schedule=Schedule("cosine", warmup_epochs=2),
        run=Run(steps_per_loop=22, eval_every=5, save_every=5),
        epochs=50,
        batch_size=64,
        average_decay=0.99,
    )
}

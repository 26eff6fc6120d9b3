"""Lite0 from random values on scikit-learn's digits: the whole path in a few minutes.

Command: `keras-effnet train digits_demo --workdir runs/digits`
Hardware: a laptop's two cores.
Top-1: of 360 digits that are kept for it, see the README.
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

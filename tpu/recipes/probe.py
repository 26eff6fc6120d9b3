"""A classifier on the features of a frozen body: the fastest way to a model of your own.

Command: `keras-effnet train probe --data FOLDER --workdir runs/mine` (another model: --model.name efficientnet-b0)
Hardware: a laptop.
Top-1: depends on your data; for scikit-learn's digits, see docs/finetune.md, which also says when to fine-tune instead.
Source: ours.
"""

from keras_effnet.tpu.config import Augment, Data, Model, Probe, Recipe, Run

RECIPES = {
    "probe": Recipe(
        model=Model("efficientnet-lite0", weights="imagenet", freeze="all-but-top"),
        data=Data("photographs"),
        augment=Augment(min_area=0.85),
        probe=Probe(views=3),
        run=Run(report=False),
        epochs=1,
        batch_size=32,
        label_smoothing=0.0,
    )
}

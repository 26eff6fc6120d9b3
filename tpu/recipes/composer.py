"""MosaicML Composer's B0: NVIDIA's numbers, PyTorch's batch normalization, and weight decay on that too.

Command: `keras-effnet train b0_composer --data PATH --workdir DIR`
Hardware: 8 GPUs; 23.3 hours on 3080s, says Composer's README. Not run by us.
Top-1: 77.22. Composer names label smoothing beside that number, without a value; 0.1 is NVIDIA's. The net is
Composer's: its padding is symmetric, its epsilon 1e-5, and an activation follows the first block's projection. Momentum
0.1 in PyTorch is 0.9 here. Neither Composer nor this recipe has a moving average: average_decay is 0.
Source: Composer @ 0acac4ca, composer/yamls/models/efficientnetb0.yaml:1-41; efficientnets.py:68-69.
"""

from keras_effnet.tpu.config import Model, Optimizer, Recipe, Schedule

RECIPES = {
    "b0_composer": Recipe(
        model=Model("efficientnet-b0-composer", drop_connect_rate=0.2, bn_momentum=0.9, bn_epsilon=1e-5),
        optimizer=Optimizer("rmsprop-torch", peak=0.08, epsilon=0.01, weight_decay=1e-5, decayed="all"),
        schedule=Schedule("cosine", warmup_epochs=16, decay_from="warmup"),
        epochs=400,
        batch_size=4096,
        average_decay=0.0,
        expected_top1=77.22,
        source="Composer @ 0acac4ca, efficientnetb0.yaml:1-41; README.md:28",
    )
}

"""timm's B0 with RandAugment, random erasing and a moving average.

Command: `keras-effnet train b0_timm --data PATH --workdir DIR`
Hardware: 2 GPUs with 384 images each. Not run by us.
Top-1: 77.7. RandAugment's operations are those of the TPU code, with timm's magnitude 9, deviation 0.5 and probability
0.5; timm computes them with Pillow, and without Cutout. Weight decay applies to kernels only, as in timm. The decay of
the moving average grows to 0.9999, as in the original. The command does not say how long the warm-up is; 5 epochs is
timm's current default.
Source: timm's documentation, training_script.mdx:68-73.
"""

from keras_effnet.tpu.config import Augment, Model, Optimizer, Recipe, Schedule

RECIPES = {
    "b0_timm": Recipe(
        model=Model("efficientnet-b0", dropout_rate=0.2, drop_connect_rate=0.2),
        augment=Augment(
            policy="randaugment", layers=2, magnitude=9.0, magnitude_std=0.5, op_probability=0.5, erase=0.2
        ),
        optimizer=Optimizer("rmsprop", peak=0.048, epsilon=1e-3, weight_decay=1e-5, decayed="kernels"),
        schedule=Schedule("exponential", warmup_start=1e-6, per_epoch=True),
        epochs=450,
        batch_size=768,
        expected_top1=77.7,
        source="timm hfdocs/source/training_script.mdx:68-73",
    )
}

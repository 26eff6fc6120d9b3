"""Fine-tuning on your own photos, from Lite0's ImageNet weights.

Command: `keras-effnet train finetune --data FOLDER --workdir runs/mine` (another model: --model.name efficientnet-b0;
other weights: --model.weights noisy-student, or the path of a file)
Hardware: a laptop.
Top-1: depends on your data; for scikit-learn's digits, see docs/finetune.md. The steps are small. The
moving average and the batch-norm momentum are short enough for a short run.
Source: ours.
"""

from keras_effnet.tpu.config import Augment, Data, Model, Optimizer, Recipe, Run, Schedule

RECIPES = {
    "finetune": Recipe(
        model=Model("efficientnet-lite0", weights="imagenet", bn_momentum=0.9),
        data=Data("photographs"),
        augment=Augment(min_area=0.3),
        optimizer=Optimizer("momentum", per_256=0.08, weight_decay=1e-4),
        schedule=Schedule("cosine", warmup_epochs=1),
        run=Run(steps_per_loop=20),
        epochs=10,
        batch_size=32,
        average_decay=0.99,
    )
}

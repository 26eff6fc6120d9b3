"""B0-B7 with AutoAugment: the weights that Keras ships as `imagenet`.

Command: `keras-effnet train b0_autoaugment --data gs://BUCKET/imagenet --workdir gs://BUCKET/b0_autoaugment`
Hardware: a Cloud TPU slice with memory for 2048 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us: every operation is tested against the original's at every level; the accuracy is the original's.
Top-1: 77.1 (B0), 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3 (B7), on the 50,000 validation images. The original held out
20 training shards and stopped where their accuracy was best. With TFRecords, --data.holdout_shards 20 holds them out
and evaluates on them.
Source: tensorflow/tpu models/official/efficientnet @ 7dc921f, README.md:65; policy v0 of autoaugment.py:36-68.
"""

from keras_effnet.tpu.config import Augment, Model, Recipe

TOP1 = (77.1, 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3)

RECIPES = {
    f"b{n}_autoaugment": Recipe(
        model=Model(f"efficientnet-b{n}"),
        augment=Augment(policy="autoaugment"),
        expected_top1=top1,
        source="tensorflow/tpu models/official/efficientnet @ 7dc921f, README.md:65",
    )
    for n, top1 in enumerate(TOP1)
}

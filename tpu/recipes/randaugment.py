"""B0-B8 with RandAugment, two operations per image.

Command: `keras-effnet train b5_randaugment --data gs://BUCKET/imagenet --workdir gs://BUCKET/b5_randaugment`
Hardware: a Cloud TPU slice with memory for 2048 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us.
Top-1: 83.7 (B5, magnitude 17) and 84.7 (B7, magnitude 28). Only these two magnitudes and B8's, 28, are published. B0's,
9, is that of timm's recipe (`b0_timm`). Those of B1-B4 and B6 are interpolated linearly, and no accuracy is known for
them.
Source: tensorflow/tpu models/official/efficientnet @ 7dc921f, README.md:66 and :76.
"""

from keras_effnet.tpu.config import Augment, Model, Recipe

MAGNITUDE = (9.0, 11.0, 12.0, 14.0, 15.0, 17.0, 22.0, 28.0, 28.0)
TOP1 = {5: 83.7, 7: 84.7}

RECIPES = {
    f"b{n}_randaugment": Recipe(
        model=Model(f"efficientnet-b{n}"),
        augment=Augment(policy="randaugment", layers=2, magnitude=magnitude),
        expected_top1=TOP1.get(n),
        source="tensorflow/tpu models/official/efficientnet @ 7dc921f, README.md:66, :76" if n in TOP1 else "",
    )
    for n, magnitude in enumerate(MAGNITUDE)
}

"""EdgeTPU-S, M and L.

Command: `keras-effnet train edgetpu_s --data gs://BUCKET/imagenet --workdir gs://BUCKET/edgetpu_s`
Hardware: a Cloud TPU slice with memory for 2048 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us.
Top-1: 77.23 (S), 78.69 (M), 80.62 (L). The original has one more class, 0 for background, without images. To keep it:
--data.classes 1001 --data.first_label 0. The README names no augmentation, so there is none here.
Source: tensorflow/tpu models/official/efficientnet @ 7dc921f, edgetpu/README.md:20-35 and :62-64.
"""

from keras_effnet.tpu.config import Model, Recipe

TOP1 = {"s": 77.23, "m": 78.69, "l": 80.62}

RECIPES = {
    f"edgetpu_{size}": Recipe(
        model=Model(f"efficientnet-edgetpu-{size}"),
        expected_top1=top1,
        source="tensorflow/tpu models/official/efficientnet @ 7dc921f, edgetpu/README.md:62-64",
    )
    for size, top1 in TOP1.items()
}

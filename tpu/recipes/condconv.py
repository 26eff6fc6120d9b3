"""CondConv B0 with 4 experts, with 8, and with 8 and B1's depth.

Command: `keras-effnet train condconv_b0_4e --data gs://BUCKET/imagenet --workdir gs://BUCKET/condconv_b0_4e`
Hardware: a Cloud TPU slice with memory for 2048 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us.
Top-1: 77.8, 78.3 and 79.5. The README names no augmentation, so there is none here.
Source: tensorflow/tpu models/official/efficientnet @ 7dc921f, condconv/README.md:30-36.
"""

from keras_effnet.tpu.config import Model, Recipe

TOP1 = {"b0-4e": 77.8, "b0-8e": 78.3, "b0-8e-depth": 79.5}

RECIPES = {
    f"condconv_{name.replace('-', '_')}": Recipe(
        model=Model(f"efficientnet-condconv-{name}"),
        expected_top1=top1,
        source="tensorflow/tpu models/official/efficientnet @ 7dc921f, condconv/README.md:30-36",
    )
    for name, top1 in TOP1.items()
}

"""Lite0-Lite4: relu6, no squeeze-and-excite, and the same stem and head in all sizes.

Command: `keras-effnet train lite0 --data gs://BUCKET/imagenet --workdir gs://BUCKET/lite0`
Hardware: a Cloud TPU slice with memory for 2048 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us.
Top-1: 75.1 (Lite0), 76.7, 77.6, 79.8, 81.5 (Lite4). The README names no augmentation, so there is none here. Resizing
is bicubic: with TFRecords the original ignores its flag (imagenet_input.py:344-355).
Source: tensorflow/tpu models/official/efficientnet @ 7dc921f, lite/README.md:16-20.
"""

from keras_effnet.tpu.config import Model, Recipe

TOP1 = (75.1, 76.7, 77.6, 79.8, 81.5)

RECIPES = {
    f"lite{n}": Recipe(
        model=Model(f"efficientnet-lite{n}"),
        expected_top1=top1,
        source="tensorflow/tpu models/official/efficientnet @ 7dc921f, lite/README.md:16-20",
    )
    for n, top1 in enumerate(TOP1)
}

"""B0-B7 as first published, with random crops and flips only.

Command: `keras-effnet train b0_baseline --data gs://BUCKET/imagenet --workdir gs://BUCKET/b0`
Hardware: a Cloud TPU slice with memory for 2048 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us: the arithmetic is tested against the original's; the accuracy is the original's.
Top-1: 76.7 (B0), 78.7, 79.8, 81.1, 82.5, 83.1 (B5), on the 50,000 validation images. The original held out 20 training
shards and stopped where their accuracy was best. With TFRecords, --data.holdout_shards 20 holds them out and evaluates
on them.
Source: tensorflow/tpu models/official/efficientnet @ 7dc921f, main.py:117-171 and README.md:52-64.
"""

from keras_effnet.tpu.config import Model, Recipe

SOURCE = "tensorflow/tpu models/official/efficientnet @ 7dc921f, README.md:64"
TOP1 = {0: 76.7, 1: 78.7, 2: 79.8, 3: 81.1, 4: 82.5, 5: 83.1}

RECIPES = {
    f"b{n}_baseline": Recipe(
        model=Model(f"efficientnet-b{n}"), expected_top1=TOP1.get(n), source=SOURCE if n in TOP1 else ""
    )
    for n in range(8)
}

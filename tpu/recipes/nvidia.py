"""NVIDIA's B0, as trained in its PyTorch and its TensorFlow repository.

Command: `keras-effnet train b0_nvidia_pytorch --data PATH --workdir DIR` (or b0_nvidia_tensorflow)
Hardware: 8 A100; 11 hours (PyTorch) and 8.5 hours (TensorFlow), say NVIDIA's READMEs. Not run by us.
Top-1: 77.42 (PyTorch, mixed precision) and 77.59 (TensorFlow, mixed precision).
The PyTorch recipe has symmetric padding, no moving average and no drop connect. Its batch-norm momentum of 0.01 is 0.99
here. The TensorFlow recipe's weight decay of 5e-6 is 1e-5 times half the sum of squares here, and all replicas share
batch statistics; we assume that its cosine ends with the last epoch. mixup is the original's: one weight per image, at
least 1/2 for the image itself. Initial values are the original's.
Source: NVIDIA DeepLearningExamples @ 729963dd, PyTorch/Classification/ConvNets configs.yml:99-125 and
efficientnet/README.md:555-568; TensorFlow2/Classification/ConvNets config/defaults.py:231-330 and
efficientnet_v1/README.md:393-404.
"""

from keras_effnet.tpu.config import Augment, Model, Optimizer, Recipe, Run, Schedule

RECIPES = {
    "b0_nvidia_pytorch": Recipe(
        model=Model("efficientnet-b0", drop_connect_rate=0.0, bn_epsilon=1e-3, padding="symmetric"),
        augment=Augment(policy="autoaugment", mixup=0.2),
        optimizer=Optimizer("rmsprop-torch", peak=0.08, epsilon=0.01, weight_decay=1e-5),
        schedule=Schedule("cosine", warmup_epochs=16, decay_from="warmup", per_epoch=True),
        epochs=400,
        batch_size=4096,
        average_decay=0.0,
        expected_top1=77.42,
        source="NVIDIA DeepLearningExamples @ 729963dd, PyTorch efficientnet/README.md:555-568",
    ),
    "b0_nvidia_tensorflow": Recipe(
        model=Model("efficientnet-b0", dropout_rate=0.2, drop_connect_rate=0.2),
        augment=Augment(policy="autoaugment"),
        optimizer=Optimizer("rmsprop-keras", peak=0.32, epsilon=1e-3, weight_decay=1e-5),
        schedule=Schedule("cosine", warmup_epochs=5),
        run=Run(batch_norm_group="all"),
        epochs=500,
        batch_size=8192,
        expected_top1=77.59,
        source="NVIDIA DeepLearningExamples @ 729963dd, TensorFlow2 efficientnet_v1/README.md:393-404",
    ),
}

"""EfficientNetV2: B0 to B3 and S, M, L with progressive learning, the 21k pretraining, and the fine-tuning from it.

Command: `keras-effnet train v2_s --data gs://BUCKET/imagenet --workdir gs://BUCKET/v2_s` (v2_s_21k: ImageNet-21k;
v2_s_21k_ft1k: from these weights to ImageNet, --model.weights FILE for your own)
Hardware: a Cloud TPU slice with memory for 4096 images per step. With a smaller --batch_size, the learning rate
follows. Not run by us.
Top-1: 78.7, 79.8, 80.5, 82.1 (B0 to B3), 83.9, 85.2, 85.7 (S, M, L); from 21k 84.9, 86.2, 86.9, 87.2 (S, M, L, XL).
In 4 stages of equal length, images grow in equal steps: 171, 214, 257 and 300 pixels for S, each a quarter of the way
from 128 to its training size. RandAugment's magnitude grows from 5, and mixup and cutmix from 0. The sizes are those of
the code; the paper's table 6 ends at 380.
Dropout is constant, as in the code; in the paper it grows. Evaluation is at the larger size of the model.
B0 to B3 train as V1 does, with AutoAugment. Its operations and policy, and those of RandAugment, are the TPU
repository's. Not rebuilt: several labels for one image of 21k, whose records automl does not publish; Cutout with noise
in the fine-tuning. There, automl takes pixels / 127.5 - 1, and we keep the (pixels - 128) / 128 of the pretraining.
timm's ra4 recipe is not here, since its numbers are not published in a repository.
Source: google/automl @ 6a54c874, efficientnetv2/effnetv2_configs.py, datasets.py, hparams.py and main.py.
"""

from dataclasses import replace

from keras_effnet.tpu.config import Augment, Data, Model, Optimizer, Progress, Recipe, Schedule

SOURCE = "google/automl @ 6a54c874, efficientnetv2/README.md"

# Training size, policy, magnitude of RandAugment, alpha of mixup and cutmix, top-1, top-1 after 21k.
_ROWS = {
    "b0": (192, "autoaugment", 10.0, 0.0, 78.7, None),
    "b1": (192, "autoaugment", 10.0, 0.0, 79.8, None),
    "b2": (208, "autoaugment", 10.0, 0.0, 80.5, None),
    "b3": (240, "autoaugment", 10.0, 0.0, 82.1, None),
    "s": (300, "randaugment", 10.0, 0.0, 83.9, 84.9),
    "m": (384, "randaugment", 15.0, 0.2, 85.2, 86.2),
    "l": (384, "randaugment", 20.0, 0.5, 85.7, 86.9),
    "xl": (384, "randaugment", 20.0, 0.5, None, 87.2),
}
_STAGES, _BASE, _FIRST_MAGNITUDE = 4, 128, 5.0


def _grown(first: float, last: float) -> tuple[float, ...]:
    """Values at equal distances, one for each stage."""
    return tuple(first + (last - first) * number / (_STAGES - 1) for number in range(_STAGES))


def _sizes(last: int) -> tuple[int, ...]:
    return tuple(int(_BASE + (last - _BASE) * (number + 1) / _STAGES) for number in range(_STAGES))


def _whole_image(share: float | None) -> Data:
    return Data(interpolation="half-pixel-bilinear", eval_crop=share, crop_mode="squash" if share else "center")


def _from_scratch(short: str) -> Recipe:
    size, policy, magnitude, alpha, top1, _ = _ROWS[short]
    grows = policy == "randaugment"
    recipe = Recipe(
        model=Model(f"efficientnetv2-{short}", drop_connect_rate=0.2),
        augment=Augment(policy=policy),
        progress=Progress(sizes=_sizes(size)),
        optimizer=Optimizer(decayed="kernels"),
        epochs=350,
        batch_size=4096,
        expected_top1=top1,
        source=SOURCE,
    )
    if not grows:
        return recipe
    rows = Progress(_sizes(size), _grown(_FIRST_MAGNITUDE, magnitude), *[_grown(0.0, alpha) if alpha else ()] * 2)
    augment = replace(recipe.augment, min_area=0.05, min_covered=0.0, magnitude=magnitude, mixup=alpha, cutmix=alpha)
    return replace(recipe, data=_whole_image(1.0), augment=augment, progress=rows)


def _pretraining(short: str) -> Recipe:
    return Recipe(
        model=Model(f"efficientnetv2-{short}", image_size=224, dropout_rate=1e-6, drop_connect_rate=0.0),
        data=replace(_whole_image(None), source="imagenet21k", classes=21843),
        augment=Augment(min_area=0.05, min_covered=0.0),
        optimizer=Optimizer(per_256=0.008, decayed="kernels"),
        schedule=Schedule("cosine", warmup_epochs=1),
        epochs=60,
        batch_size=4096,
        loss="sigmoid",
        label_smoothing=0.0,
        source=SOURCE,
    )


def _fine_tuning(short: str) -> Recipe:
    return Recipe(
        model=Model(f"efficientnetv2-{short}", weights="21k", dropout_rate=1e-6, drop_connect_rate=0.2),
        data=_whole_image(1.0),
        augment=Augment(crop="none"),
        optimizer=Optimizer(per_256=0.0005, decayed="kernels"),
        schedule=Schedule("constant", warmup_epochs=1),
        epochs=15,
        batch_size=512,
        average_decay=0.9996,
        expected_top1=_ROWS[short][5],
        source=SOURCE,
    )


RECIPES = {
    **{f"v2_{short}": _from_scratch(short) for short in _ROWS if short != "xl"},
    **{f"v2_{short}_21k": _pretraining(short) for short in _ROWS},
    **{f"v2_{short}_21k_ft1k": _fine_tuning(short) for short in _ROWS},
}

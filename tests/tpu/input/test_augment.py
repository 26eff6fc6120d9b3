"""Protects the augmentation ops: pixels equal the original's, and draws have the stated probabilities."""

import inspect
from collections import Counter

import numpy as np
import pytest
from helpers import BACKEND, GOLDEN, golden, leading

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow reads the data on all backends: one run is enough", allow_module_level=True)

import tensorflow as tf

from keras_effnet.tpu.input import augment, image_ops, mixing

RECORD = golden("tpu/autoaugment.json")
with np.load(GOLDEN / "tpu" / "autoaugment_outputs.npz") as file:
    PIXELS = dict(file)
IMAGE = PIXELS["input"]
CENTER = RECORD["cutout_center_y_x"]
HPARAMS = {"autoaugment": image_ops.AUTOAUGMENT, "randaugment": image_ops.RANDAUGMENT}
CASES = [(case["op"], case["level"], case["sign"], case["hparams"], case["key"]) for case in RECORD["ops"]] + [
    (case["op"], case["level"], 1, "randaugment", f"{case['op']}_wrapped_{int(case['level'])}")
    for case in RECORD["wrapped_arguments"]["cases"]
]

# Ops for which official.vision.ops.augment returns other pixels than the original.
HOLES = "fills the holes with the image's reflection, not with gray"
OFFICIAL_DIFFERS = {
    "Rotate": HOLES,
    "ShearX": HOLES,
    "ShearY": HOLES,
    "TranslateX": HOLES,
    "TranslateY": HOLES,
    "Contrast": "tf.image.adjust_contrast: uses the true mean, per channel, and rounds",
    "Sharpness": "a convolution: with oneDNN its sums are not rounded in between, and the result is truncated",
}
# Ops that are reimplemented although official's pixels equal the original's.
OFFICIAL_IS_NOT_USED = {
    "Cutout": "draws the place from the global generator",
    "Color": "compares the factor in Python, so it takes no tensor",
    "Brightness": "compares the factor in Python, so it takes no tensor",
    "AutoContrast": "ours is 1.5 times as fast",
    "Equalize": "ours is 1.5 times as fast",
    "Posterize": "ours is twice as fast",
    "Solarize": "ours is 5 times as fast",
    "SolarizeAdd": "ours is 4 times as fast",
    "Invert": "the import takes a second, for one subtraction",
}


def in_a_map(function, *arrays, count=None):
    """Returns a function's results for each row of the arrays, computed in a tf.data map."""
    rows = tf.data.Dataset.from_tensor_slices(arrays)
    batch = next(iter(rows.map(function, num_parallel_calls=2).batch(count or len(arrays[0]))))
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), batch)


# As in a pipeline. Outside of a graph, a thousand examples one by one take ten seconds.
MIX = tf.function(mixing.mix)


def seeds(count, of=7):
    return tf.random.split([of, 1], count)


def within(frequency, probability, count, sigmas=5):
    """Returns whether an observed frequency agrees with a probability."""
    return np.all(
        np.abs(frequency - probability) <= sigmas * np.sqrt(probability * (1 - np.array(probability)) / count)
    )


def test_the_golden_values_cover_every_op():
    assert {case[0] for case in CASES} == set(image_ops.OPS) == set(RECORD["randaugment_ops"])
    assert tuple(RECORD["randaugment_ops"]) == augment.RANDAUGMENT_OPS
    assert tuple(tuple(tuple(step) for step in row) for row in RECORD["policy_v0"]) == augment.POLICY_V0
    assert {name: hparams._asdict() for name, hparams in HPARAMS.items()} == RECORD["hparams"]
    for case in RECORD["ops"]:
        op = image_ops.OPS[case["op"]]
        arguments = [op.argument(case["level"], HPARAMS[case["hparams"]]) * case["sign"]] if op.argument else []
        assert arguments == case["args"]


def test_every_op_gives_the_originals_pixels_eagerly():
    image = tf.constant(IMAGE)
    for name, level, sign, hparams, key in CASES:
        found = image_ops.apply_op(name, image, level, sign, HPARAMS[hparams], CENTER)
        np.testing.assert_array_equal(found, PIXELS[key], err_msg=key)


def test_every_op_gives_the_originals_pixels_in_one_graph():
    def every_case(image):
        return {
            key: image_ops.apply_op(name, image, level, sign, HPARAMS[hparams], CENTER)
            for name, level, sign, hparams, key in CASES
        }

    for key, found in in_a_map(every_case, IMAGE[None]).items():
        np.testing.assert_array_equal(found[0], PIXELS[key], err_msg=key)


def test_every_op_gives_the_originals_pixels_where_level_and_sign_are_tensors():
    switch = [(name, hparams) for name in image_ops.OPS for hparams in HPARAMS]

    def one_case(index, level, sign):
        def branch(name, hparams):
            return lambda: image_ops.apply_op(
                name, tf.constant(IMAGE), level, sign, HPARAMS[hparams], tf.constant(CENTER)
            )

        return tf.switch_case(index, [branch(*each) for each in switch])

    index = [switch.index((name, hparams)) for name, _, _, hparams, _ in CASES]
    level, sign = (np.array([case[part] for case in CASES], "float64") for part in (1, 2))
    for case, found in zip(CASES, in_a_map(one_case, index, level, sign), strict=True):
        np.testing.assert_array_equal(found, PIXELS[case[-1]], err_msg=case[-1])


def test_a_tensors_argument_is_the_numbers():
    levels = np.concatenate([np.arange(31), np.linspace(0, 30, 1001), np.random.default_rng(0).uniform(0, 30, 1000)])
    for op in image_ops.OPS.values():
        for hparams in HPARAMS.values():
            if op.argument:
                numbers = [op.argument(float(level), hparams) for level in levels]
                np.testing.assert_array_equal(op.argument(tf.constant(levels), hparams), numbers)


def test_official_differs_where_the_table_says():
    from official.vision.ops import augment as official

    differs = Counter()
    for name, level, sign, hparams, key in CASES:
        op = image_ops.OPS[name]
        arguments = [op.argument(level, HPARAMS[hparams]) * sign] if op.argument else []
        if name == "Cutout":
            # Official's inner function takes the place.
            found = official._fill_rectangle(IMAGE, CENTER[1], CENTER[0], *arguments * 2, replace=[128] * 3)
        else:
            if name in official.REPLACE_FUNCS:
                arguments.append([128] * 3)
            found = official.NAME_TO_FUNC[name](tf.constant(IMAGE), *arguments)
        differs[name] += not np.array_equal(found, PIXELS[key])
    # Sharpness only differs on machines whose convolution is oneDNN's.
    assert differs.keys() == image_ops.OPS.keys()
    assert {name for name, count in differs.items() if count} | {"Sharpness"} == OFFICIAL_DIFFERS.keys()
    assert OFFICIAL_DIFFERS.keys() | OFFICIAL_IS_NOT_USED.keys() == image_ops.OPS.keys()

    assert "seed" not in inspect.signature(official.cutout).parameters
    for name in ("Color", "Brightness"):
        with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
            tf.function(official.NAME_TO_FUNC[name], autograph=False)(tf.constant(IMAGE), tf.constant(0.5))


@pytest.mark.parametrize("size", [(3, 5), (300, 260)])
def test_ops_take_images_of_unknown_and_odd_size(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), "uint8")

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
    def all_ops(image):
        return [image_ops.apply_op(name, image, 4) for name in image_ops.OPS]

    for name, found in zip(image_ops.OPS, all_ops(image), strict=True):
        np.testing.assert_array_equal(found, image_ops.apply_op(name, tf.constant(image), 4), err_msg=name)


def test_sharpness_rounds_each_term_at_any_size():
    image = np.random.default_rng(0).integers(0, 256, (224, 200, 3), "uint8")
    pixels = image.astype("float32")
    smooth = np.zeros((222, 198, 3), "float32")
    for y, x in np.ndindex(3, 3):
        weight = np.float32(5 if (y, x) == (1, 1) else 1) / np.float32(13)
        smooth += pixels[y : y + 222, x : x + 198] * weight
    smooth = np.floor(smooth)
    expected = image.copy()
    expected[1:-1, 1:-1] = smooth + np.float32(0.28) * (pixels[1:-1, 1:-1] - smooth)
    np.testing.assert_array_equal(image_ops.apply_op("Sharpness", image, 1), expected)


def test_few_or_one_colour_are_equalized_and_stretched_as_official_does():
    from official.vision.ops import augment as official

    rng = np.random.default_rng(0)
    for values in ([77], [0], [255], [0, 255], [3, 4, 90], range(0, 256, 5)):
        image = rng.choice(np.array(values, "uint8"), (40, 24, 3))
        image[..., 2] = 5
        for name, theirs in (("AutoContrast", official.autocontrast), ("Equalize", official.equalize)):
            np.testing.assert_array_equal(image_ops.apply_op(name, image, 1), theirs(tf.constant(image)))


def test_the_policys_draws_have_their_probabilities():
    count = 25_000
    steps = in_a_map(augment.draw_policy, seeds(count))
    names = sorted({name for row in augment.POLICY_V0 for name, _, _ in row})
    rows = {tuple((names.index(name), level) for name, _, level in row): row for row in augment.POLICY_V0}
    assert len(rows) == 25
    drawn = list(map(tuple, np.stack([steps.op, steps.level], axis=-1).reshape(count, 4).tolist()))
    for key, row in rows.items():
        chosen = np.array([each == sum(key, ()) for each in drawn])
        assert within(chosen.mean(), 1 / 25, count)
        assert within(steps.applied[chosen].mean(axis=0), [step[1] for step in row], chosen.sum())
    assert set(np.unique(steps.sign)) == {-1, 1}
    assert_independent(steps)


def test_rand_augments_draws_have_their_probabilities():
    count = 25_000
    steps = in_a_map(lambda seed: augment.draw_ops(seed, 2, 9.0, 0.5, 0.3), seeds(count))
    pairs = Counter(map(tuple, steps.op.tolist()))
    assert len(pairs) == 256
    assert within(np.array(list(pairs.values())) / count, 1 / 256, count)
    assert within(steps.applied.mean(axis=0), 0.3, count)
    np.testing.assert_allclose(steps.level.mean(axis=0), 9.0, atol=5 * 0.5 / count**0.5)
    np.testing.assert_allclose(steps.level.std(axis=0), 0.5, atol=0.02)
    assert_independent(steps)

    steps = in_a_map(lambda seed: augment.draw_ops(seed, 1, 0.1, 1.0), seeds(100))
    assert steps.level.min() == 0 and steps.applied.all()


def assert_independent(steps):
    count = len(steps.op)
    assert within((steps.sign > 0).mean(axis=0), 0.5, count)
    assert 0 <= steps.place.min() < 0.001 and 0.999 < steps.place.max() < 1
    np.testing.assert_allclose(steps.place.mean(axis=0), 0.5, atol=5 * 12**-0.5 / count**0.5)
    columns = np.concatenate([steps.sign, steps.place.reshape(count, 4)], axis=1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 5 / count**0.5


def rows_of(draws):
    """Returns the steps of each image."""
    return (augment.Steps(*row) for row in zip(*draws, strict=True))


def by_hand(steps, names, hparams):
    image = tf.constant(IMAGE)
    for op, level, sign, applied, place in zip(*steps, strict=True):
        if applied:
            center = (place * np.array(IMAGE.shape[:2], "float32")).astype(int)
            image = image_ops.apply_op(names[op], image, level, sign, hparams, center)
    return image.numpy()


def test_auto_augment_applies_what_was_drawn():
    names = sorted({name for row in augment.POLICY_V0 for name, _, _ in row})
    keys = seeds(100)
    found = in_a_map(lambda seed: augment.auto_augment(IMAGE, seed), keys)
    draws, again = in_a_map(augment.draw_policy, keys), in_a_map(augment.draw_policy, tf.cast(keys, tf.int64))
    for one, other in zip(draws, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for steps, image in zip(rows_of(draws), found, strict=True):
        np.testing.assert_array_equal(image, by_hand(steps, names, image_ops.AUTOAUGMENT))
    for dtype in (tf.int32, tf.int64):
        np.testing.assert_array_equal(augment.auto_augment(IMAGE, tf.cast(keys[0], dtype)), found[0])
    assert len({image.tobytes() for image in found}) > 30  # pairs of ops without a sign repeat


@pytest.mark.parametrize(
    "arguments",
    [
        {"magnitude": 17.0},
        pytest.param({"magnitude": 28.0}, marks=pytest.mark.long),  # another level
        {"magnitude": 9.0, "magnitude_std": 0.5, "probability": 0.5, "layers": 3, "ops": ("Color", "Cutout", "ShearX")},
    ],
)
def test_rand_augment_applies_what_was_drawn(arguments):
    keys = seeds(60)
    found = in_a_map(lambda seed: augment.rand_augment(IMAGE, seed, **arguments), keys)
    names = arguments.get("ops", augment.RANDAUGMENT_OPS)
    drawn = {name: value for name, value in arguments.items() if name != "ops"}
    draws = in_a_map(lambda seed: augment.draw_ops(seed, **drawn, count=len(names)), keys)
    for steps, image in zip(rows_of(draws), found, strict=True):
        np.testing.assert_array_equal(image, by_hand(steps, names, image_ops.RANDAUGMENT))
    np.testing.assert_array_equal(augment.rand_augment(IMAGE, keys[0], **arguments), found[0])
    assert len({image.tobytes() for image in found}) > 20


def test_erase_takes_rectangles_of_the_right_area_and_shape():
    count, side = 2000, 64
    image = np.zeros((side, side, 3), "uint8")
    found = in_a_map(lambda seed: augment.erase(image, seed, 0.6, mode="const"), seeds(count))
    marked = found[..., 0] > 0
    np.testing.assert_array_equal(found, marked[..., None] * np.array([124, 116, 104], "uint8"))
    erased = marked.any(axis=(1, 2))
    assert within(erased.mean(), 0.6, count)
    marked = marked[erased]
    heights, widths = (marked.any(axis=axis).sum(axis=1) for axis in (2, 1))
    np.testing.assert_array_equal(marked.sum(axis=(1, 2)), heights * widths)
    share = heights * widths / side**2
    assert 0.015 < share.min() < 0.03 and 0.31 < share.max() < 0.35
    assert np.abs(np.histogram(share, 4, (0.02, 1 / 3))[0] / erased.sum() - 0.25).max() < 0.06
    aspect = np.log(heights / widths)
    assert np.abs(aspect).max() < np.log(1 / 0.3) + 0.2 and abs(aspect.mean()) < 0.1 and 0.6 < aspect.std() < 0.75
    # Places are uniform: the first row is erased as often as the last.
    assert abs(marked[:, 0].any(axis=1).mean() - marked[:, -1].any(axis=1).mean()) < 0.04


def test_erase_fills_with_noise_around_the_mean():
    image = np.zeros((96, 96, 3), "uint8")
    found = in_a_map(lambda seed: augment.erase(image, seed, 1.0, 0.3, 0.3, 1.0, std=(5.0, 10.0, 20.0)), seeds(20))
    noise = found[found.any(axis=-1)]
    assert within(len(noise) / found[..., 0].size, 0.3, 1000)
    np.testing.assert_allclose(noise.mean(axis=0), [123.675, 116.28, 103.53], atol=0.5)
    np.testing.assert_allclose(noise.std(axis=0), [5, 10, 20], rtol=0.03)
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.05
    wild = augment.erase(image, [1, 2], 1.0, std=(1000.0,) * 3).numpy()
    assert {0, 255} <= set(wild.flat) and np.mean((wild > 0) & (wild < 255)) < 0.1


def test_erase_leaves_the_image_where_nothing_fits_or_nothing_is_drawn():
    for key in seeds(5):
        np.testing.assert_array_equal(augment.erase(IMAGE, key, 1.0, 1.0, 1.0, 1.0), IMAGE)
        np.testing.assert_array_equal(augment.erase(IMAGE, key, 0.0), IMAGE)
    np.testing.assert_array_equal(
        augment.erase(IMAGE, [3, 4], 0.9), tf.function(augment.erase)(IMAGE, tf.constant([3, 4]), 0.9)
    )


def batch(count, dtype="float32", size=(16, 24)):
    images = np.random.default_rng(0).uniform(0, 255, (count, *size, 3))
    return tf.cast(tf.constant(images), dtype), tf.eye(count)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bfloat16"])
def test_mixup_is_the_originals_formula(dtype):
    images, labels = batch(9, dtype)
    mixed, mixed_labels = mixing.mix(images, labels, seeds(9), mixup_alpha=0.4)
    weight = tf.linalg.diag_part(mixed_labels).numpy()
    weight[4] = 1  # its own partner
    assert (weight >= 0.5).all() and len(set(weight)) == 9
    np.testing.assert_array_equal(mixed_labels, weight[:, None] * labels + (1 - weight)[:, None] * labels[::-1])
    weight, pixels = weight[:, None, None, None], tf.cast(images, "float32").numpy()
    expected = pixels * weight + pixels[::-1] * (1 - weight)
    if dtype == "uint8":
        expected = np.rint(expected)
    different = np.arange(9) != 4  # which is mixed with itself, at a weight that the labels do not show
    np.testing.assert_array_equal(mixed[different], tf.cast(expected, dtype)[different])
    assert mixed.dtype == images.dtype and mixed_labels.dtype == tf.float32


@pytest.mark.parametrize("alpha", leading([0.2, 1.0], 1))
def test_mixups_weights_are_beta_distributed(alpha):
    count = 1000
    _, labels = MIX(tf.zeros((count, 1, 1, 1)), tf.eye(count), seeds(count), mixup_alpha=alpha)
    found = np.sort(tf.linalg.diag_part(labels))
    expected = np.random.default_rng(0).beta(alpha, alpha, 100 * count)
    expected = np.sort(np.maximum(expected, 1 - expected))[50::100]
    np.testing.assert_allclose(found, expected, atol=0.05)
    np.testing.assert_allclose(found.mean(), expected.mean(), atol=0.02)


def test_cutmix_gives_each_label_its_share_of_pixels():
    count, (height, width) = 500, (16, 24)
    images = tf.broadcast_to(tf.range(count, dtype=tf.int32)[:, None, None, None], (count, height, width, 3))
    mixed, labels = MIX(images, tf.eye(count), seeds(count), cutmix_alpha=1.0)
    own = (mixed == images).numpy()
    assert (own | (mixed == images[::-1]).numpy()).all()
    np.testing.assert_array_equal(own.min(axis=-1), own.max(axis=-1))
    share = own.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(tf.linalg.diag_part(labels), share, atol=1e-6)
    np.testing.assert_allclose(tf.reduce_sum(labels, axis=1), 1, atol=1e-6)
    other = ~own[..., 0]
    np.testing.assert_array_equal(other.any(2).sum(1) * other.any(1).sum(1), other.sum(axis=(1, 2)))

    rng = np.random.default_rng(0)
    box = np.sqrt(1 - rng.beta(1, 1, 100_000))[:, None] * (height, width) // 2
    center = np.floor(rng.uniform(size=box.shape) * (height, width))
    area = np.prod(np.minimum(center + box, (height, width)) - np.maximum(center - box, 0), axis=1)
    np.testing.assert_allclose(share.mean(), 1 - area.mean() / (height * width), atol=0.05)


def test_mixup_and_cutmix_take_half_of_the_batch_each():
    """As in google/automl efficientnetv2/datasets.py: each half is mixed with itself."""
    count = 602
    images = tf.broadcast_to(tf.range(count, dtype=tf.float32)[:, None, None, None], (count, 8, 8, 1))
    rows = tf.data.Dataset.from_tensor_slices((images, tf.eye(count), seeds(count))).batch(count)  # of unknown size
    mixed, labels = next(iter(rows.map(lambda *row: mixing.mix(*row, mixup_alpha=1.0, cutmix_alpha=1.0))))
    half = count // 2
    for part, how in ((slice(half), {"mixup_alpha": 1.0}), (slice(half, None), {"cutmix_alpha": 1.0})):
        own, shares = MIX(images[part], tf.eye(count)[part], seeds(count)[part], **how)
        np.testing.assert_array_equal(mixed[part], own)
        np.testing.assert_array_equal(labels[part], shares)
    assert np.unique(mixed[0]).size == 1 and 0 < mixed[0, 0, 0, 0] < half  # blended, with its own half
    assert set(np.unique(mixed[half])) <= {half, count - 1}  # pasted
    np.testing.assert_allclose(tf.reduce_sum(labels, axis=1), 1, atol=1e-6)


def test_automls_operations_are_the_tpu_repositorys():
    """google/automl efficientnetv2/autoaugment.py: `policy_v0`, `available_ops` and both `augmentation_params`."""
    policy = """Equalize .8 1 ShearY .8 4|Color .4 9 Equalize .6 3|Color .4 1 Rotate .6 8|Solarize .8 3 Equalize .4 7
    |Solarize .4 2 Solarize .6 2|Color .2 0 Equalize .8 8|Equalize .4 8 SolarizeAdd .8 3|ShearX .2 9 Rotate .6 8
    |Color .6 1 Equalize 1 2|Invert .4 9 Rotate .6 0|Equalize 1 9 ShearY .6 3|Color .4 7 Equalize .6 0
    |Posterize .4 6 AutoContrast .4 7|Solarize .6 8 Color .6 9|Solarize .2 4 Rotate .8 9|Rotate 1 7 TranslateY .8 9
    |ShearX 0 0 Solarize .8 4|ShearY .8 0 Color .6 4|Color 1 0 Rotate .6 2|Equalize .8 4 Equalize 0 8
    |Equalize 1 4 AutoContrast .6 2|ShearY .4 7 SolarizeAdd .6 7|Posterize .8 2 Solarize .6 10
    |Solarize .6 8 Equalize .6 1|Color .8 6 Rotate .4 5"""
    rows = [row.split() for row in policy.split("|")]
    theirs = tuple(tuple((row[at], float(row[at + 1]), int(row[at + 2])) for at in (0, 3)) for row in rows)
    assert theirs == augment.POLICY_V0
    names = """AutoContrast Equalize Invert Rotate Posterize Solarize Color Contrast Brightness Sharpness ShearX ShearY
    TranslateX TranslateY Cutout SolarizeAdd"""
    assert set(augment.RANDAUGMENT_OPS) == set(names.split())
    assert (image_ops.AUTOAUGMENT.cutout_const, image_ops.AUTOAUGMENT.translate_const) == (100, 250)
    assert (image_ops.RANDAUGMENT.cutout_const, image_ops.RANDAUGMENT.translate_const) == (40, 100)


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_an_examples_draw_depends_on_its_own_seed_alone(alphas):
    count = 8
    images, labels = batch(count, "uint8")
    one, other = seeds(count), seeds(count, of=8)
    _, first = mixing.mix(images, labels, one, *alphas)
    exchanged = tf.concat([one[:1], other[1:]], 0)
    _, second = tf.function(mixing.mix, reduce_retracing=True)(images, labels, exchanged, *alphas)
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[1:], second[1:])


def test_without_an_alpha_nothing_is_mixed():
    images, labels = batch(3)
    for before, after in zip((images, labels), mixing.mix(images, labels, seeds(3)), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_ops.apply_op("Rotat", IMAGE, 1), "Unknown op.*Nearest: 'Rotate'"),
        (lambda: augment.rand_augment(IMAGE, [1, 2], ops=("Shear",)), "Unknown op.*Received: 'Shear'"),
        (lambda: augment.rand_augment(IMAGE, [1, 2], ops=()), "at least one op"),
        (lambda: augment.rand_augment(IMAGE, [1, 2], layers=0), "at least one layer.*layers=0"),
        (lambda: augment.rand_augment(IMAGE, [1, 2], magnitude=-1), "magnitude=-1"),
        (lambda: augment.rand_augment(IMAGE, [1, 2], magnitude_std=-1), "magnitude_std=-1"),
        (lambda: augment.rand_augment(IMAGE, [1, 2], probability=2), "probability=2"),
        (lambda: augment.erase(IMAGE, [1, 2], 1.5), "probability=1.5"),
        (lambda: augment.erase(IMAGE, [1, 2], 1.0, mode="pixels"), "Unknown mode.*Nearest: 'pixel'"),
        (lambda: augment.erase(IMAGE, [1, 2], 1.0, 0.5, 0.3), "min_area=0.5, max_area=0.3"),
        (lambda: augment.erase(IMAGE, [1, 2], 1.0, min_aspect=3), "min_aspect=3"),
        (lambda: mixing.mix(*batch(2), seeds(2), mixup_alpha=-0.1), "mixup_alpha=-0.1"),
        (lambda: mixing.mix(*batch(2), seeds(2), cutmix_alpha=-0.1), "cutmix_alpha=-0.1"),
    ],
)
def test_a_wrong_argument_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()

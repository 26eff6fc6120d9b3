"""Protects the recipes, their published numbers, and how the command line changes their fields."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from typing import get_args, get_type_hints

import pytest
from click.testing import CliRunner
from helpers import BACKEND, invoked, same_weights

from keras_effnet.commands import main
from keras_effnet.nets.variants import VARIANTS
from keras_effnet.ranges import Range, check_fields
from keras_effnet.tpu import config, recipes
from keras_effnet.tpu.config import Recipe, override

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
EVERY = recipes.every()


def test_all_that_was_published_is_there():
    numbers = {name: recipe.expected_top1 for name, recipe in EVERY.items() if recipe.expected_top1}
    assert numbers == {
        **{f"b{n}_baseline": top1 for n, top1 in enumerate((76.7, 78.7, 79.8, 81.1, 82.5, 83.1))},
        **{f"b{n}_autoaugment": x for n, x in enumerate((77.1, 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3))},
        **{"b5_randaugment": 83.7, "b7_randaugment": 84.7},
        **{f"lite{n}": top1 for n, top1 in enumerate((75.1, 76.7, 77.6, 79.8, 81.5))},
        **{"edgetpu_s": 77.23, "edgetpu_m": 78.69, "edgetpu_l": 80.62},
        **{"condconv_b0_4e": 77.8, "condconv_b0_8e": 78.3, "condconv_b0_8e_depth": 79.5},
        **{f"v2_b{n}": top1 for n, top1 in enumerate((78.7, 79.8, 80.5, 82.1))},
        **{"v2_s": 83.9, "v2_m": 85.2, "v2_l": 85.7},
        **{"v2_s_21k_ft1k": 84.9, "v2_m_21k_ft1k": 86.2, "v2_l_21k_ft1k": 86.9, "v2_xl_21k_ft1k": 87.2},
        **{"b0_timm": 77.7, "b0_composer": 77.22, "b0_nvidia_pytorch": 77.42, "b0_nvidia_tensorflow": 77.59},
    }
    assert {"b6_baseline", "b7_baseline", "b0_randaugment", "b8_randaugment", "finetune", "digits_demo"} <= EVERY.keys()
    assert [EVERY[f"b{n}_randaugment"].augment.magnitude for n in (5, 7, 8)] == [17, 28, 28]
    assert all(recipe.model.name in VARIANTS for recipe in EVERY.values())
    known = {name: recipe for name, recipe in EVERY.items() if "21k" not in name}  # 21k has no top-1
    assert all(bool(recipe.source) == bool(recipe.expected_top1) for recipe in known.values())
    # The original's defaults, main.py:117-171 and :235.
    recipe = EVERY["b0_baseline"]
    assert recipe.peak == 0.128 and int(350 * 1281167 / recipe.batch_size) == 218949
    assert EVERY["b0_composer"].optimizer.decayed == "all" and EVERY["b0_composer"].model.bn_epsilon == 1e-5


def test_v2_grows_as_its_code_does():
    """google/automl efficientnetv2: main.py's loop over stages, with ibase=128 of hparams.py."""
    sizes = {name: EVERY[f"v2_{name}"].progress.sizes for name in ("b0", "b2", "s", "m")}
    assert sizes == {
        "b0": (144, 160, 176, 192),
        "b2": (148, 168, 188, 208),
        "s": (171, 214, 257, 300),
        "m": (192, 256, 320, 384),
    }
    small, large = EVERY["v2_s"], EVERY["v2_l"]
    assert small.progress.magnitudes == pytest.approx((5, 20 / 3, 25 / 3, 10)) and not small.progress.mixups
    assert large.progress.mixups == large.progress.cutmixes == pytest.approx((0, 1 / 6, 1 / 3, 0.5))
    assert (large.image_size, large.stage(3).image_size, large.stage(1).augment.magnitude) == (480, 384, 10)
    assert large.stage_ends(1001) == [250, 500, 750, 1001]
    assert EVERY["b0_baseline"].stage(0) == EVERY["b0_baseline"] and EVERY["b0_baseline"].stage_ends(7) == [7]
    assert config.from_json(config.to_json(large)) == large
    settled = config.settled(EVERY["v2_s"]).model
    assert (settled.padding, settled.bn_momentum, settled.bn_epsilon) == ("same", 0.9, 1e-3)
    assert EVERY["v2_s_21k"].loss == "sigmoid" and EVERY["v2_s_21k"].data.classes == 21843


def test_recipes_of_other_programs_train_their_very_nets():
    from keras_effnet.nets import inspection
    from keras_effnet.tpu import model_from_recipe

    nvidia = inspection.read(model_from_recipe.build(model_from_recipe.whole(EVERY["b0_nvidia_pytorch"]), 3, "float32"))
    assert (nvidia.architecture.padding, nvidia.architecture.bn_epsilon) == ("symmetric", 1e-3)
    composer = inspection.read(model_from_recipe.build(model_from_recipe.whole(EVERY["b0_composer"]), 3, "float32"))
    found = composer.architecture
    assert (found.padding, found.bn_epsilon, found.bn_momentum) == ("symmetric", 1e-5, 0.9)
    assert [block.project_activation for block in found.blocks] == [True] + [False] * 15
    assert "block1a_project_activation" in composer.layers and "block2a_project_activation" not in composer.layers


def test_training_starts_from_the_net_of_its_weights(tmp_path, shallow):
    """The padding, epsilon and values of weights that say theirs are those of the net that is trained and exported."""
    import keras_effnet as ke
    from keras_effnet.nets import inspection
    from keras_effnet.tpu import model_from_recipe

    donor = ke.EfficientNetB0(weights=None, padding="symmetric", classes=3, input_shape=(32, 32, 3))
    path = ke.save_model(donor, tmp_path / "mine.keras")
    recipe = override(Recipe(), ["--model.weights", str(path), "--model.image-size", "32", "--model.keep-top"])
    recipe = model_from_recipe.whole(recipe)
    model = model_from_recipe.build(recipe, 3, "float32")
    assert recipe.model.padding == inspection.read(model).architecture.padding == "symmetric"
    assert inspection.read(model).architecture.bn_epsilon == recipe.model.bn_epsilon == 1e-5
    assert same_weights(model, donor)


@pytest.mark.parametrize("module", sorted(info.name for info in pkgutil.iter_modules(recipes.__path__)))
def test_a_recipe_file_tells_what_it_is(module):
    text = inspect.getdoc(importlib.import_module(f"keras_effnet.tpu.recipes.{module}")) or ""
    for part in ("Command: `keras-effnet train", "Hardware:", "Top-1:", "Source:"):
        assert part in text


def test_a_kept_classifier_has_the_classes_of_the_weights():
    from keras_effnet.tpu import model_from_recipe

    recipe = override(Recipe(), ["--model.name=efficientnet-lite0", "--model.weights=imagenet", "--model.keep-top"])
    with pytest.raises(ValueError, match="Expected weights with a classifier for 5 classes"):
        model_from_recipe.build(recipe, 5, "float32")


def test_fields_are_changed_by_name_and_type():
    changed = override(EVERY["b0_baseline"], ["--optimizer.peak", "0.256", "--augment.no-flip", "--batch-size=4096"])
    assert (changed.peak, changed.augment.flip, changed.batch_size) == (0.256, False, 4096)
    assert changed.data == EVERY["b0_baseline"].data
    assert config.from_json(config.to_json(changed, steps=3)) == changed
    with pytest.raises(ValueError, match=r"Expected a recipe of this version.*'speed'"):
        config.from_json('{"model": {"speed": 1}}')
    assert (
        override(Recipe(), ["--optimizer.peak", "0"]).peak == 0
        and override(Recipe(), ["--batch-size=256"]).peak == 0.016
    )
    # AdamW has defaults of its own, in place of the recipe's for another optimizer. What is given stays.
    own = override(EVERY["finetune"], ["--optimizer.name", "adamw", "--optimizer.decay", "0.99"]).optimizer
    assert own == config.Optimizer("adamw", decay=0.99) and own.decay == 0.99
    assert (own.per_256, own.epsilon, own.layer_decay, own.weight_decay) == (1e-3, 1e-7, 0.05, 0.0)
    assert Recipe(optimizer=own, batch_size=8).peak == 1e-3  # for any batch size
    kept = override(EVERY["finetune"], ["--optimizer.name", "sgd"]).optimizer
    assert kept == dataclasses.replace(EVERY["finetune"].optimizer, name="sgd")
    assert override(Recipe(optimizer=own), ["--optimizer.name", "rmsprop"]) == Recipe()
    for arguments, told in (
        (["--optimizer.peek", "1"], "Did you mean --optimizer.peak"),
        (["--learning_rate", "1"], "Expected a field of the recipe. Received: --learning_rate"),
        (["--optimizer.peak", "fast"], "could not convert string to float: 'fast'"),
        (["--batch-size", "1.5"], "invalid literal for int"),
        (["--optimizer.name", "adamax"], "Expected one of ('rmsprop', 'rmsprop-keras', 'rmsprop-torch'"),
        (["--model.no_name"], "Expected a field of the recipe. Received: --model.no_name"),
        (["12"], "Unrecognized options: 12"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            override(Recipe(), arguments)
        assert told in str(error.value)


def test_every_number_has_a_range():
    leaves = list(config_fields(Recipe()))
    numbers = {name: hint for name, hint in leaves if re.search(r"\b(int|float)\b", str(hint))}
    without = [name for name, hint in numbers.items() if not any(isinstance(each, Range) for each in get_args(hint))]
    assert len(numbers) > 50 and not without
    for recipe in EVERY.values():
        check_fields(recipe)
    for name, hint in numbers.items():
        within = next(each for each in get_args(hint) if isinstance(each, Range))
        several = "tuple" in str(hint)
        for wrong in (within.least - 1, float("nan"), float("inf"), within.most + 1, True):
            value = (wrong,) if several else wrong
            with pytest.raises(ValueError, match=rf"Expected {name} (of|above|as|between) .*\. Received: "):
                check_fields(config.with_fields(Recipe(), {name: value}))


def config_fields(record, prefix=""):
    """Yields the names and the annotated types of all fields."""
    hints = get_type_hints(type(record), include_extras=True)
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from config_fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--optimizer.peak -1", "optimizer.peak of at least 0. Received: -1.0"),
        ("--label-smoothing 3", "label_smoothing of at least 0 and below 1. Received: 3.0"),
        ("--data.max-corrupt 5", "data.max_corrupt of at least 0 and at most 1. Received: 5.0"),
        ("--model.image-size 7", "model.image_size of at least 16. Received: 7"),
        ("--model.image-size 0", "model.image_size of at least 16. Received: 0"),
        ("--progress.sizes 32 8", "progress.sizes of at least 16. Received: (32, 8)"),
        ("--epochs nan", "epochs as a finite number above 0. Received: nan"),
        ("--run.save-minutes inf", "run.save_minutes as a finite number above 0. Received: inf"),
    ],
)
def test_values_out_of_their_range_are_refused_before_anything_starts(arguments, told, tmp_path):
    done = invoked("train", "digits_demo", "--workdir", tmp_path / "run", *arguments.split())
    assert (done.returncode, done.stderr.strip()) == (2, f"error: Expected {told}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("prune {} --gamma -1", "gamma of at least 0. Received: -1.0"),
        ("prune {} --learning-rate nan", "learning_rate as a finite number above 0. Received: nan"),
        ("prune {} --calibration 0", "calibration of at least 1. Received: 0"),
        ("prune {} --reduction 1", "reduction between 0 and 1. Received: 1.0"),
        ("eval b0 --data none --first-label -1", "first_label of at least 0. Received: -1"),
        ("eval b0 --data none --eval-crop nan", "crop as a finite number above 0 and at most 1. Received: nan"),
    ],
)
def test_so_are_those_of_other_commands(arguments, told):
    done = invoked(*arguments.format("none.keras --data none --out none").split())
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: Expected {told}")


def test_types_are_those_of_the_fields():
    for text in ('{"epochs": "3"}', '{"run": {"keep": 1.5}}', '{"run": {"report": 1}}', '{"model": 3}', "[]", "3", "{"):
        with pytest.raises(ValueError, match=r"Expected|JSON|Expecting"):
            config.from_json(text)


def test_the_command_lists_and_explains(tmp_path):
    run = CliRunner().invoke
    assert set(json.loads(run(main, ["train", "--json"]).output)["recipes"]) == EVERY.keys()
    assert "b5_randaugment" in run(main, ["train"]).output
    told = run(main, ["train", "b0_baseline", "--help"])
    assert told.exit_code == 0 and "--optimizer.peak" in told.output and "Highest learning rate" in told.output
    assert "Train RECIPE" in run(main, ["train", "--help"]).output
    for arguments, told in (
        (["digit_demo", "--workdir", str(tmp_path)], "Nearest: 'digits_demo'"),
        (["digits_demo"], "Expected a folder for the run: --workdir DIR"),
        (["--batch-size", "8", "digits_demo"], "Expected the name of the recipe first. Received: --batch-size"),
        (["digits_demo", "--workdir", str(tmp_path), "--batch_size", "x"], "invalid literal for int"),
    ):
        result = run(main, ["train", *arguments])
        assert result.exit_code == 2 and told in result.stderr
    assert not list(tmp_path.iterdir())

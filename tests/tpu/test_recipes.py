"""Protects the recipes, their published numbers, and how the command line changes their fields."""

import dataclasses
import importlib
import inspect
import json
import pkgutil

import pytest
from click.testing import CliRunner
from helpers import BACKEND

from keras_effnet.commands import main
from keras_effnet.nets.variants import VARIANTS
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
        **{"b0_timm": 77.7, "b0_composer": 77.22, "b0_nvidia_pytorch": 77.42, "b0_nvidia_tensorflow": 77.59},
    }
    assert {"b6_baseline", "b7_baseline", "b0_randaugment", "b8_randaugment", "finetune", "digits_demo"} <= EVERY.keys()
    assert [EVERY[f"b{n}_randaugment"].augment.magnitude for n in (5, 7, 8)] == [17, 28, 28]
    assert all(
        recipe.model.name in VARIANTS and bool(recipe.source) == bool(recipe.expected_top1) for recipe in EVERY.values()
    )
    # The original's defaults, main.py:117-171 and :235.
    recipe = EVERY["b0_baseline"]
    assert recipe.peak == 0.128 and int(350 * 1281167 / recipe.batch_size) == 218949
    assert EVERY["b0_composer"].optimizer.decayed == "all" and EVERY["b0_composer"].model.bn_epsilon == 1e-5


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

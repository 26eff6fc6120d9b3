"""The names, commands, options and recipe fields that scripts rely on are those of public_names.json.

A change on purpose is recorded with: python tests/project/test_public_names.py
"""

import dataclasses
import inspect
import json
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

from keras_effnet.commands import main
from keras_effnet.tpu import config, recipes

RECORDED = Path(__file__).with_name("public_names.json")


def signature(value) -> list[str] | str:
    if isinstance(value, types.ModuleType):
        return "module"
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return "attribute"
    return [f"{'*' * (each.kind is each.KEYWORD_ONLY)}{each.replace(annotation=each.empty)}" for each in parameters]


def names(module) -> dict:
    found = {}
    for name in module.__all__:
        value = getattr(module, name)
        found[name] = signature(value)
        if inspect.isclass(value):
            members = {key: getattr(value, key) for key in vars(value) if not key.startswith("_")}
            found |= {f"{name}.{key}": signature(member) for key, member in members.items()}
    return found


def options(command) -> list[dict]:
    return [
        {
            "names": [*each.opts, *each.secondary_opts],
            "type": each.type.name,
            "choices": list(getattr(each.type, "choices", ())),
            "default": None if each.param_type_name == "argument" else repr(each.default),
            "required": each.required,
            "many": each.multiple or each.nargs,
        }
        for each in command.params
    ]


def every(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from every(command, f"{prefix}{name} ")


def found() -> dict:
    modules = ("keras_effnet", "keras_effnet.weights", "keras_effnet.pruning", "keras_effnet.tpu")
    public = {name: names(import_module(name)) for name in modules}
    return public | {
        "commands": {name: options(command) for name, command in every(main)},
        "recipes": list(recipes.every()),
        "recipe fields": sorted(config.flat(dataclasses.asdict(config.Recipe()))),
    }


def test_public_names_are_as_recorded():
    recorded = json.loads(RECORDED.read_text())
    now = json.loads(json.dumps(found()))
    for group, values in recorded.items():
        missing = [name for name in values if name not in now[group]]
        assert not missing, f"{group}: {missing} is gone"
        assert now[group] == values


def lines(recorded: dict) -> str:
    """JSON with a line per name."""
    groups = []
    for group, values in sorted(recorded.items()):
        if isinstance(values, dict):
            rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(values.items()))
            groups.append(f"{json.dumps(group)}: {{\n{rows}\n }}")
        else:
            groups.append(f"{json.dumps(group)}: {json.dumps(values)}")
    return "{\n " + ",\n ".join(groups) + "\n}\n"


if __name__ == "__main__":
    RECORDED.write_text(lines(found()))

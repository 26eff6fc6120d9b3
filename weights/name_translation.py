"""Names of a net's variables in the files of other programs."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.weight_shapes import Layer, owners
from keras_effnet.weights.naming_tables import Naming


class Name(NamedTuple):
    """The name of one of our variables in another program.

    Args:
        foreign: String. The other program's name.
        layout: Key of `layouts.LAYOUTS`.
        shape: Tuple of integers. Our shape.
        key: String. Finds the tensor in a file. See `Naming.ranked`.
    """

    foreign: str
    layout: str
    shape: tuple[int, ...]
    key: str


@lru_cache(maxsize=64)
def foreign_names(
    architecture: Architecture, naming: Naming, channels: int = 3, classes: int | None = 1000
) -> dict[tuple[str, str], Name]:
    """Returns the other program's name of each variable of a net.

    Args:
        architecture: An `Architecture`.
        naming: A `Naming`.
        channels: Integer. Channels of the input. Defaults to 3.
        classes: Integer, or None for a net without a top. Defaults to 1000.

    Returns:
        Dict from (our layer, our variable) to `Name`, in the model's order. It is shared: do not change it.

    Raises:
        ValueError: If the other program has no such net.
    """
    if not has_names(architecture, naming):
        raise ValueError(f"Expected a net that {naming.title} can hold. Received: {architecture.name!r}")
    found = [
        (layer, variable, scope, shape, *naming.variables[kind][variable])
        for layer, scope, (kind, shapes) in scoped_layers(architecture, naming, channels, classes)
        for variable, shape in shapes.items()
    ]
    keys = keys_of([scope + suffix for _, _, scope, _, suffix, _ in found], naming)
    return {
        (layer, variable): Name(scope + suffix, layout, shape, keys[scope + suffix])
        for layer, variable, scope, shape, suffix, layout in found
    }


def has_names(architecture: Architecture, naming: Naming) -> bool:
    """Returns whether a naming covers all layers of a net.

    Some have no names for mixed experts, space-to-depth or global context.

    Args:
        architecture: An `Architecture`.
        naming: A `Naming`.

    Returns:
        Boolean.
    """
    needed = {"routing" for block in architecture.blocks if block.num_experts}
    needed |= {"se_share" for block in architecture.blocks if block.global_context}
    needed |= {"s2d_conv" for block in architecture.blocks if block.space_to_depth}
    return "*" in naming.layers or needed <= naming.layers.keys()


def keys_of(names: Iterable[str], naming: Naming) -> dict[str, str]:
    """Returns the keys by which names are compared.

    A key is the name itself, except where `Naming.ranked` applies: there only the order of the numbers counts.

    Args:
        names: Names of a file, or of a net in another program.
        naming: A `Naming`.

    Returns:
        Dict from name to key. A name whose key is taken already is its own key.
    """
    matches = {name: re.match(naming.ranked, name) if naming.ranked else None for name in names}
    numbers: dict[str, set[int]] = {}
    for match in filter(None, matches.values()):
        numbers.setdefault(match["owner"], set()).add(int(match["number"] or 0))
    keys, taken = {}, set()
    for name, match in matches.items():
        key = name
        if match:
            rank = sorted(numbers[match["owner"]]).index(int(match["number"] or 0))
            key = f"{match['owner']}#{rank}{name[match.end() :]}"
        keys[name] = name if key in taken else key
        taken.add(key)
    return keys


def scoped_layers(
    architecture: Architecture, naming: Naming, channels: int, classes
) -> Iterator[tuple[str, str, Layer]]:
    """Yields each layer that has variables, with its name in another program.

    Args:
        architecture: An `Architecture`.
        naming: A `Naming`.
        channels: Integer. Channels of the input.
        classes: Integer, or None for a net without a top.

    Yields:
        Tuple of our layer's name, its name in the other program, and the `Layer`.
    """
    blocks = {block.name: (index, block) for index, block in enumerate(architecture.blocks)}
    places: Counter[int] = Counter()  # in the block's stage
    within = {}
    for block in architecture.blocks:
        within[block.name] = places[block.stage]
        places[block.stage] += 1
    seen: Counter[str] = Counter()
    routed = [block.name for block in architecture.blocks if block.num_experts]
    for layer, owner in owners(architecture, channels, classes).items():
        match = re.fullmatch(r"block(\d+[a-z]+)_(.+)", layer)
        fields: dict[str, Any] = {"layer": layer, "type": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", owner.kind).lower()}
        role, kind, gate = layer, "", ""
        if match:
            role, (index, block) = match[2].replace("dwconv2", "dwconv"), blocks[match[1]]
            plain = block.operator == "mbconv" and not block.expand_filters
            kind = "plain" if plain else {"mbconv": ""}.get(block.operator, block.operator)
            gate = "context" if block.global_context else ""
            fields |= {"i": index, "s": block.stage - 1, "b": within[block.name]}
            if block.num_experts:
                kind, place = "condconv", routed.index(block.name)
                fields |= {"once": _number(place), "thrice": [_number(3 * place + step) for step in range(3)]}
        keys = (f"{gate}:{role}", f"{kind}:{role}", role, "*")
        template = next(naming.layers[key] for key in keys if key in naming.layers)
        bare = template.format(**fields, n="", m="")
        number = seen[bare]
        seen[bare] += 1
        yield layer, template.format(**fields, n=_number(number), m=number + 1), owner


def _number(count: int) -> str:
    """Returns the suffix by which TensorFlow and Keras number equal names."""
    return f"_{count}" if count else ""

"""Writes the tables of models.md from the registry: python docs/tables.py"""

import re
from pathlib import Path

import keras_effnet as ke

PAGE = Path(__file__).with_name("models.md")

# What the name of a family does not say. Sources: keras_effnet/nets/variants.py.
NOTES = {
    "X and H": "The TPU repository's nets with fused blocks and space-to-depth. Stages 2 to 4 expand the channels "
    "6 times in X and 4 times in H. timm's X B5 and H B5 differ from these: they have ReLU where the TPU repository's "
    "nets have SiLU, and the reverse; only their first block has a 2 x 2 kernel, instead of all blocks of stage 1; and "
    "they pad symmetrically.",
    "Composer": "The B0 of MosaicML's library Composer. It has one activation more, after the first block's "
    "projection.",
}


def functions() -> dict[str, str]:
    """The function of each variant by its name."""
    named = [name for name in dir(ke) if name.startswith("EfficientNet")]
    return {re.search(r"create_model\('(.*?)'", str(getattr(ke, name).__doc__))[1]: name for name in named}


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a column that begins with > is aligned to the right."""
    rule = ["---:" if column.startswith(">") else "---" for column in columns]
    lines = [[column.removeprefix(">") for column in columns], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models() -> str:
    """A table per family, with a row per model."""
    from keras_effnet.weights import registry

    columns = [
        "model",
        "function",
        ">pixels",
        ">parameters",
        ">multiply-adds",
        ">top-1 in %, `best`",
        ">top-1 with more data",
        "default weights",
    ]
    groups: dict[str, list[list[str]]] = {}
    for name, function in sorted(functions().items(), key=lambda item: ke.list_models().index(item[0])):
        found = ke.describe(name)
        more = [record for record in registry.of_model(name) if record.extra_data and record.top1]
        reached = [_reached(record) for record in (registry.best(name), more[0] if more else None)]
        default = next((f"`{record['tag']}`" for record in found["weights"] if record["default"]), "none")
        cost = [f"{found['params'] / 1e6:.1f} M", f"{found['macs'] / 1e9:.2f} G"]
        row = [f"`{name}`", f"`{function}`", str(found["resolution"][0]), *cost, *reached, default]
        groups.setdefault(found["family"], []).append(row)
    return "\n\n".join(
        "\n\n".join(filter(None, (f"### {family}", NOTES.get(family), table(columns, rows))))
        for family, rows in groups.items()
    )


def _reached(record) -> str:
    return f"{record.top1} (`{record.tag}`)" if record else ""


def weights() -> str:
    """A row per published set of weights."""
    from keras_effnet.weights import registry

    columns = ["model", "tag", ">top-1 in %", ">top-5 in %", ">pixels", "preprocessing", "padding", "source"]
    rows = [
        [
            f"`{record.model}`",
            f"`{record.tag}`" + " (default)" * record.default,
            str(record.top1 or ""),
            str(record.top5 or ""),
            str(record.resolution),
            record.preprocessing,
            record.padding,
            record.source,
        ]
        for record in registry.RECORDS
    ]
    return table(columns, rows)


def filled(text: str) -> str:
    """The page with its tables as they are now."""
    for name, content in (("models", models()), ("weights", weights())):
        pattern = rf"(<!-- {name} -->\n\n).*?(\n\n<!-- end -->)"
        text = re.sub(pattern, lambda match, content=content: match[1] + content + match[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))

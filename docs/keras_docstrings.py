"""Lets griffe read Keras' docstrings: the unindented `Example:` becomes the indented `Examples:` that griffe knows."""

import re
import textwrap

import griffe

# From "Example:" to the next section, or to the end.
EXAMPLE = re.compile(r"^Example:\n(.*?)(?=^[A-Z][a-z ]+:$|\Z)", re.MULTILINE | re.DOTALL)


class KerasDocstrings(griffe.Extension):
    """Rewrites each docstring before griffe parses it."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called once for each object."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                lambda match: f"Examples:\n{textwrap.indent(match[1].strip(), '    ')}\n\n", obj.docstring.value
            )

"""Reads the graph of objects of TensorFlow 2: which layer and attribute each variable of a checkpoint belongs to."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from keras_effnet.weights.formats.protobuf import fields, one


class Variable(NamedTuple):
    """A variable in the graph.

    Args:
        path: Tuple of strings. The names of the objects that lead to it, the last of which is the attribute's.
        name: String. The name that the variable had, such as `"stem_conv/kernel"`, or empty.
        key: String. Its tensor in the checkpoint.
    """

    path: tuple[str, ...]
    name: str
    key: str

    @property
    def title(self) -> str:
        """The variable's name as in an h5 file of Keras: the model's path, the layer's name and the attribute."""
        *outer, owner, attribute = ("", *self.path) if len(self.path) == 1 else self.path
        layer = self.name.rpartition("/")[0] or owner
        return "/".join(part for part in (*outer, layer, attribute) if part)


# Lists and helpers through which Keras refers to the variables of layers a second time, and what is not the model's.
_ASIDE = {
    "keras_api",
    "layers",
    "loss_tracker",
    "metrics",
    "non_trainable_variables",
    "optimizer",
    "regularization_losses",
    "save_counter",
    "signatures",
    "trainable_variables",
    "variables",
    "weights",
}

_NAME = 300  # characters

_DEPTH = 32  # of the paths that are followed: a deeper graph is none of a model


class ObjectGraph:
    """The objects of a checkpoint: node 0 is the root.

    Args:
        data: Bytes. A `TrackableObjectGraph` (tensorflow/core/protobuf/trackable_object_graph.proto, 2.20).

    Raises:
        ValueError: If it is damaged.
    """

    def __init__(self, data: bytes):
        self.children: list[dict[str, int]] = []
        self.values: list[tuple[str, str] | None] = []  # a variable's name and key
        for node in fields(data).get(1, []):
            parts = fields(node)
            references = [fields(reference) for reference in parts.get(1, [])]
            self.children.append({one(each, 2, b"").decode(): one(each, 1) for each in references})
            stored = [fields(attribute) for attribute in parts.get(2, [])]
            of = next((each for each in stored if one(each, 1, b"") == b"VARIABLE_VALUE"), None)
            value = (one(of, 2, b"").decode().split(":")[0], one(of, 3, b"").decode()) if of else None
            self.values.append(value)
        if any(len(name) > _NAME for names in self.children for name in names):
            raise ValueError("its graph of objects has a name that is too long")
        count = len(self.children)
        if not all(0 <= child < count for names in self.children for child in names.values()):
            raise ValueError("its graph of objects refers to an object that it lacks")

    def variables(self) -> Iterator[Variable]:
        """Yields the variables of layers, each once, by their shortest path."""
        if not self.children:
            return
        seen = {0}
        queue: deque[tuple[tuple[str, ...], int]] = deque([((), 0)])
        while queue:
            path, node = queue.popleft()
            value = self.values[node]
            if value is not None and path:
                yield Variable(path, *value)
            for name, child in self.children[node].items():
                if child not in seen and name not in _ASIDE and len(path) < _DEPTH:
                    seen.add(child)
                    queue.append(((*path, name), child))

    def at(self, path: tuple[str, ...]) -> int | None:
        """Returns the number of the object at a path, or None where there is none.

        Args:
            path: Tuple of strings.
        """
        node: int | None = 0
        for name in path:
            node = None if node is None else self.children[node].get(name)
        return node

    def attributes(self, node: int) -> dict[str, tuple[str, str]]:
        """Returns the variables that an object has itself.

        Args:
            node: Integer, the object's number.

        Returns:
            Dict from the attribute's name to the variable's name and key.
        """
        return {
            name: value
            for name, child in self.children[node].items()
            if name not in _ASIDE and (value := self.values[child]) is not None
        }

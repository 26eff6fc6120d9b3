"""Class activation maps: which places of an image support a class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_effnet import compat
from keras_effnet.errors import one_of
from keras_effnet.inference import batches, folding
from keras_effnet.inference.folding import Step, Tensor, Trace, numbers

BATCH = 8  # images at a time: gradients need the maps of all layers

_POOLING = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D)
_SQUASHING = ("softmax", "sigmoid")  # activations that turn logits into probabilities


class Explainer:
    """Explains many images with one model, as `explain()` does.

    Args:
        model: A functional or sequential `keras.Model`.
        method: See `explain()`. Defaults to `"cam"`.
        layer: See `explain()`. Defaults to None.

    Call arguments:
        images: See `explain()`.
        class_id: See `explain()`. Defaults to None.

    Returns:
        See `explain()`.

    Raises:
        ValueError: See `explain()`.
    """

    def __init__(self, model: keras.Model, method: str = "cam", layer: str | None = None):
        self._graph, self._method = _Graph(model), method
        self._shape = tuple(model.inputs[0].shape[1:])
        by_gradients = method != "cam"
        self._explained = self._grad_cam if by_gradients else self._cam
        self._head: Any = None if by_gradients else self._graph.head()
        self._source: Any = self._graph.layer(layer) if by_gradients else None

    def __call__(self, images: Any, class_id: int | Sequence[int] | None = None) -> np.ndarray:
        pixels = batches.of_images(images, self._shape)
        classes = classes_of(class_id, len(pixels), self._graph.classes)
        parts = [slice(start, start + BATCH) for start in range(0, len(pixels), BATCH)]
        maps = [self._explained(pixels[part], None if classes is None else classes[part]) for part in parts]
        return np.concatenate(maps).astype("float32")

    def _cam(self, pixels: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
        graph, head = self._graph, self._head
        features = graph.last(numbers(graph.run(pixels, [head.features])[0]))
        if classes is None:
            classes = (features.mean((1, 2)) @ head.kernel + head.bias).argmax(1)
        return np.einsum("nhwc,cn->nhw", features, head.kernel[:, classes]) / np.prod(features.shape[1:3])

    def _grad_cam(self, pixels: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
        if classes is None:
            classes = numbers(self._graph.run(pixels, [self._graph.scores])[0]).argmax(1)
        return _weighted(*self._graph.gradient(pixels, self._source, classes), self._method)


def with_maps(model: keras.Model, shape: tuple[int, ...]) -> keras.Model:
    """Adds the maps of all classes to the outputs of a model.

    Args:
        model: A functional or sequential model with one output, (batch, classes).
        shape: Tuple of integers. The shape of an image.

    Returns:
        A functional model for inference, see `folding.for_inference()`, whose outputs are a list: those of the model,
        and the maps, (batch, height, width, classes). `explain()` says what they contain.

    Raises:
        ValueError: If the model does not end in global average pooling and one dense layer.
    """
    net = folding.for_inference(model, shape)
    graph = _Graph(net)
    head = graph.head()
    if graph.calls(head.pooling) > 1:
        raise ValueError(
            f"Expected a pooling layer that is called once. Received: {head.pooling.name!r} of {model.name!r}. "
            "Nearest: ke.explain(model, images)"
        )
    features = head.pooling.input
    if graph.channels_first:
        features = keras.layers.Permute((2, 3, 1), name="features_last")(features)
    classes = head.kernel.shape[1]
    layer: Any = keras.layers.Conv2D(classes, 1, use_bias=False, data_format="channels_last", name="class_maps")
    maps = layer(features)
    layer.kernel.assign((head.kernel / np.prod(features.shape[1:3]))[None, None])
    both = keras.Model(net.input, [net.output, maps], name=model.name)
    compat.mark_called(both)
    return both


class _Head(NamedTuple):
    """Global average pooling, and the dense layer after it."""

    pooling: Any
    features: Tensor
    kernel: np.ndarray  # (channels, classes)
    bias: np.ndarray  # (classes,)


class _Graph:
    """The calls in a classifier, which can be run up to any of them.

    Attributes:
        classes: Integer, number of classes.
        scores: `Tensor` of the logits; or of the outputs, where no softmax or sigmoid makes them.
        channels_first: Boolean, whether the channels of feature maps come first.
    """

    def __init__(self, model):
        self._trace: Trace = folding.trace(model)
        self._name, self.classes = model.name, model.outputs[0].shape[-1]
        outputs = keras.tree.flatten(self._trace.outputs)
        if len(outputs) != 1 or outputs[0].rank != 2 or len(self._trace.inputs) != 1:
            raise ValueError(
                "Expected a model of images with one output of shape (batch, classes). Received: "
                f"{model.name!r} with {[tuple(each.shape) for each in model.outputs]}"
            )
        self._makers = {id(each): step for step in self._trace.steps for each in step.outputs}
        formats = (getattr(step.operation, "data_format", None) for step in self._trace.steps)
        self.channels_first = next(filter(None, formats), "") == "channels_first"
        self._bare: Any = None  # the dense layer that runs without its activation
        self.scores: Tensor = outputs[0]
        last = self._makers.get(id(self.scores))
        operation = last and last.operation
        if type(operation) is keras.layers.Dense and _name(operation.activation) in _SQUASHING:
            if getattr(operation, "quantization_mode", None):
                raise ValueError(
                    "Expected a classifier with weights of float. Received: "
                    f"{model.name!r}, whose layer {operation.name!r} has them in {operation.quantization_mode}"
                )
            self._bare = last
        elif last and not getattr(operation, "weights", None) and _squashes(operation):
            self.scores = last.source

    def head(self) -> _Head:
        """Returns the head, if it is linear after global average pooling."""
        token, kernel, bias = self.scores, None, np.zeros(1)
        while (step := self._makers.get(id(token))) is not None:
            layer = step.operation
            # A subclass may do more.
            linear = type(layer) is keras.layers.Dense and not getattr(layer, "quantization_mode", None)
            if type(layer) is keras.layers.GlobalAveragePooling2D and kernel is not None:
                return _Head(layer, step.source, kernel, np.broadcast_to(bias, kernel.shape[1]))
            if linear and (step is self._bare or layer.activation is keras.activations.linear):
                own = step.value("kernel")
                added = np.broadcast_to(step.bias, own.shape[1])
                bias = bias + (added if kernel is None else added @ kernel)
                kernel = own if kernel is None else own @ kernel
            elif step.affine is not None and kernel is not None:
                scale, offset = (np.broadcast_to(row, len(kernel)) for row in step.affine[:2])
                bias, kernel = bias + offset @ kernel, scale[:, None] * kernel
            elif not isinstance(layer, keras.layers.Flatten | keras.layers.Reshape):
                break
            token = step.source
        raise ValueError(
            "Expected a model that ends in global average pooling and one dense layer. Received: "
            f"{self._name!r}{', with ' + repr(step.operation.name) if step else ''}. "
            "Nearest: ke.explain(model, images, method='grad-cam'), or keras-effnet explain --method grad-cam"
        )

    def layer(self, name: str | None) -> Tensor:
        """Returns the output of a layer, by default of the last one whose outputs have a height and a width."""
        tokens = {step.operation.name: step.outputs[0] for step in self._trace.steps if step.outputs[0].rank == 4}
        if name is not None:
            return tokens[one_of("layer", name, list(tokens))]
        token = self.scores
        while (step := self._makers.get(id(token))) is not None:
            if isinstance(step.operation, _POOLING):
                return step.source
            if token.rank == 4 and (token.shape[2:] if self.channels_first else token.shape[1:3]) != (1, 1):
                return token
            token = step.source
        raise ValueError(f"Expected a model with a convolution. Received: {self._name!r}")

    def calls(self, layer: Any) -> int:
        """Returns how often a layer is called."""
        return sum(step.operation is layer for step in self._trace.steps)

    def last(self, maps: np.ndarray) -> np.ndarray:
        """Moves the channels of maps to the last axis."""
        return np.moveaxis(maps, 1, -1) if self.channels_first else maps

    def run(self, pixels, wanted: list[Tensor], added: tuple[Tensor, Any] | None = None) -> list[Any]:
        """Runs the model at inference up to the wanted tensors.

        Args:
            pixels: Array, a batch of images.
            wanted: List of `Tensor`.
            added: A `Tensor` and a value that is added to it. Defaults to None.

        Returns:
            List of the backend's tensors.
        """
        trace = self._trace
        keep = Counter(id(each) for step in trace.steps for each in _tokens(step))
        keep.update(map(id, wanted))
        known = {id(trace.inputs[0]): keras.ops.convert_to_tensor(pixels)}
        for step in trace.steps:
            args, kwargs = _mapped(lambda each: known[id(each)] if isinstance(each, Tensor) else each, step)
            made = _logits(step, args[0]) if step is self._bare else step.operation(*args, **kwargs)
            for token, value in zip(step.outputs, keras.tree.flatten(made), strict=True):
                if added and token is added[0]:
                    value = keras.ops.add(value, keras.ops.cast(added[1], value.dtype))
                known[id(token)] = value
            for each in _tokens(step):
                keep[id(each)] -= 1
                if not keep[id(each)]:
                    known.pop(id(each), None)
            if all(id(each) in known for each in wanted):
                break
        return [known[id(each)] for each in wanted]

    def gradient(self, pixels, source: Tensor, classes: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of a tensor, and the gradient of the classes' logits with respect to it."""
        (values,) = self.run(pixels, [source])
        chosen = keras.ops.one_hot(classes, self.classes)

        def total(added):
            scores = keras.ops.cast(self.run(pixels, [self.scores], (source, added))[0], "float32")
            return keras.ops.sum(keras.ops.multiply(scores, chosen))

        gradient = _gradient(total, keras.ops.zeros(values.shape, "float32"))
        return self.last(numbers(values)), self.last(numbers(gradient))


def _tokens(step: Step) -> list[Tensor]:
    """Returns what a call takes."""
    return [each for each in keras.tree.flatten((step.args, step.kwargs)) if isinstance(each, Tensor)]


def _mapped(function, step: Step) -> Any:
    taken: Any = (step.args, step.kwargs)
    return keras.tree.map_structure(function, taken)


def _logits(step: Step, x) -> Any:
    """Calls a dense layer without its activation."""
    layer = step.operation
    x, kernel = (keras.ops.cast(each, "float32") for each in (x, layer.kernel))
    scores = keras.ops.matmul(x, kernel)
    return keras.ops.add(scores, keras.ops.cast(layer.bias, "float32")) if layer.use_bias else scores


def _squashes(operation) -> bool:
    return _name(operation) in _SQUASHING or _name(getattr(operation, "activation", None)) in _SQUASHING


def _name(function) -> str:
    """Returns the name of an activation, of a layer or an operation that applies one, in lower case."""
    return (getattr(function, "__name__", "") or type(function).__name__).lower()


def _gradient(function, value) -> Any:
    """Returns the gradient of a scalar function at a value."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(value)
                result = function(value)
            return tape.gradient(result, value)
        case "jax":
            import jax

            return jax.grad(function)(value)
    import torch

    value.requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(function(value), value)[0]


def _weighted(maps: np.ndarray, gradient: np.ndarray, method: str) -> np.ndarray:
    """Returns the weighted sums of maps (images, height, width, channels)."""
    if method == "grad-cam":
        weights = gradient.mean((1, 2), keepdims=True)
    else:
        shares = 2 * gradient**2 + maps.sum((1, 2), keepdims=True) * gradient**3
        alpha = np.divide(gradient**2, shares, out=np.zeros_like(gradient), where=shares != 0)
        weights = (alpha * np.maximum(gradient, 0)).sum((1, 2), keepdims=True)
    return np.maximum((weights * maps).sum(-1), 0)


def classes_of(class_id: int | Sequence[int] | None, images: int, classes: int) -> np.ndarray | None:
    """Returns the class of each image.

    Args:
        class_id: See `explain()`.
        images: Integer, number of images.
        classes: Integer, number of classes.

    Returns:
        Array of integers, or None: the most likely.

    Raises:
        ValueError: If a class is not valid.
    """
    if class_id is None:
        return None
    given = np.asarray(class_id)
    if given.dtype.kind not in "iu" or given.shape not in ((), (images,)):
        raise ValueError(f"Expected class_id as an integer, or one for each of {images} images. Received: {class_id!r}")
    wrong = [int(each) for each in given.flat if not 0 <= each < classes]
    if wrong:
        raise ValueError(f"Expected class_id from 0 to {classes - 1}. Received: class_id={wrong[0]}")
    return np.broadcast_to(given, images)

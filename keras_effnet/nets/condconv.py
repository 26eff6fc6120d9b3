"""Conditionally parameterized convolutions (arXiv 1904.04971), on any backend and for any batch size.

Each example is convolved with its own kernel: the sum of the experts' kernels, weighted by the example's routing
weights. `_mix_kernels()` and `_fold_examples()` choose only the order of the computation.
"""

import math
from numbers import Integral
from typing import Any

import keras

from keras_effnet import compat
from keras_effnet.errors import one_of
from keras_effnet.nets.initializers import per_expert

ops: Any = keras.ops  # its annotations allow None as a result of every function

PACKAGE = "keras_effnet"


def _mix_kernels(num_experts: int, positions: int | None) -> bool:
    """Whether to sum the experts' kernels and convolve once, instead of convolving with each and summing the outputs.

    For E experts and an output of P positions, the first takes E + P multiply-adds per element of a kernel and writes a
    kernel per example. The second takes E * P and writes E times the inputs. benchmarks/condconv.py `--plans`: for 2 to
    8 experts, the second is faster if (E - 1) * P is at most about 32, forward and backward, on all three backends.
    """
    return positions is None or (num_experts - 1) * positions > 32


def _fold_examples(strides: tuple[int, int], dilated: bool) -> bool:
    """Whether to convolve all examples as the channels of a single one, instead of adding up shifted inputs.

    benchmarks/condconv.py `--plans`, 32 examples of 14 x 14 x 672, 5 x 5: the depthwise convolutions of TensorFlow and
    PyTorch take a fifth of the time of 25 shifted products, each of which goes through memory. A compiler fuses these
    products into one loop, while XLA takes over 20 times as long for so many groups, and tens of gigabytes for their
    gradient. ONNX and LiteRT have no convolution whose number of groups is unknown before the run. TensorFlow has no
    depthwise convolution with two different strides.
    """
    match keras.backend.backend():
        case "tensorflow":
            return strides[0] == strides[1] and not (dilated or compat.in_xla() or compat.in_converter())
        case "torch":
            import torch

            return not (dilated or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export())
    return False


class _CondConv(keras.Layer):
    """Base class: arguments, variables and mixing. `kernel` has the shape (experts, height, width, in, out)."""

    _ROLE = "kernel"  # prefix of the kernel's arguments, as in Keras

    def __init__(
        self,
        *,
        kernel_size,
        num_experts,
        strides,
        padding,
        data_format,
        dilation_rate,
        activation,
        use_bias,
        kernel_arguments,
        bias_initializer,
        bias_regularizer,
        activity_regularizer,
        bias_constraint,
        **kwargs,
    ):
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.kernel_size = _pair("kernel_size", kernel_size)
        self.num_experts = _positive("num_experts", num_experts)
        self.strides = _pair("strides", strides)
        self.padding = one_of("padding", padding.lower() if isinstance(padding, str) else padding, ("valid", "same"))
        self.data_format = one_of(
            "data_format",
            keras.config.image_data_format() if data_format is None else data_format,
            ("channels_last", "channels_first"),
        )
        self.dilation_rate = _pair("dilation_rate", dilation_rate)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        initializer, regularizer, constraint = kernel_arguments
        setattr(self, f"{self._ROLE}_initializer", keras.initializers.get(initializer))
        setattr(self, f"{self._ROLE}_regularizer", keras.regularizers.get(regularizer))
        setattr(self, f"{self._ROLE}_constraint", keras.constraints.get(constraint))
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def _outputs(self, channels: int) -> int:
        """Returns the number of output channels."""
        raise NotImplementedError

    def _kernel_shape(self, channels: int) -> tuple[int, ...]:
        """Returns the shape of one expert's kernel."""
        raise NotImplementedError

    def _convolve(self, x, routing):
        """Convolves, channels last, without bias and activation."""
        raise NotImplementedError

    def build(self, input_shape):
        channels = self._checked(input_shape)
        self.kernel = self._add("kernel", self._kernel_shape(channels), self._ROLE)
        self.bias = self._add("bias", (self._outputs(channels),), "bias") if self.use_bias else None
        axis = -1 if self.data_format == "channels_last" else 1
        image, routing = {axis: channels}, {-1: self.num_experts}
        self.input_spec = [keras.InputSpec(ndim=4, axes=image), keras.InputSpec(ndim=2, axes=routing)]
        self.built = True

    def _add(self, name: str, shape: tuple[int, ...], role: str):
        initializer, regularizer, constraint = (
            getattr(self, f"{role}_{kind}") for kind in ("initializer", "regularizer", "constraint")
        )
        return self.add_weight(
            name=name,
            shape=(self.num_experts, *shape),
            initializer=per_expert(initializer),
            regularizer=regularizer and _Experts(regularizer, sum),
            constraint=constraint and _Experts(constraint, ops.stack),
        )

    def _checked(self, input_shape) -> int:
        """Checks the shapes of the inputs and returns the number of input channels."""
        shapes = [tuple(shape) for shape in input_shape] if _is_two_shapes(input_shape) else None
        if shapes is None or len(shapes[0]) != 4 or len(shapes[1]) != 2:
            raise ValueError(
                f"Expected a list of images of rank 4 and routing weights of shape (batch, {self.num_experts}). "
                f"Received: input_shape={input_shape}"
            )
        channels = shapes[0][-1 if self.data_format == "channels_last" else 1]
        if channels is None:
            raise ValueError(f"Expected a known number of channels. Received: input_shape={input_shape}")
        if shapes[1][1] not in (None, self.num_experts):
            raise ValueError(
                f"Expected a routing weight per expert, num_experts={self.num_experts}. Received: {shapes[1][1]}"
            )
        _check_examples(shapes[0][0], shapes[1][0])
        return channels

    def call(self, inputs):
        x, routing = inputs
        _check_examples(x.shape[0], routing.shape[0])
        # Keras does not cast integers, such as pixels, or a routing that selects one expert.
        x, routing = ops.cast(x, self.compute_dtype), ops.cast(routing, self.compute_dtype)
        last = self.data_format == "channels_last"
        if not last:
            x = ops.transpose(x, (0, 2, 3, 1))
        x = self._convolve(x, routing)
        if self.bias is not None:
            x = x + _matmul(routing, self.bias)[:, None, None, :]
        if self.activation is not None:
            x = self.activation(x)
        return x if last else ops.transpose(x, (0, 3, 1, 2))

    def _padded(self, x):
        """Returns the part of the input that is used, padded with zeros, and the output's height and width."""
        sizes = ops.shape(x)[1:3]
        fits = [
            _fit(size, self._reach(axis), stride, self.padding)
            for axis, (size, stride) in enumerate(zip(sizes, self.strides, strict=True))
        ]
        spans, parts, lengths = zip(*fits, strict=True)
        if spans != ((0, 0), (0, 0)):
            x = ops.pad(x, ((0, 0), *spans, (0, 0)))
        if None in x.shape[1:3] or parts != tuple(slice(0, size) for size in x.shape[1:3]):
            x = x[:, parts[0], parts[1]]
        return x, lengths

    def _reach(self, axis: int) -> int:
        return (self.kernel_size[axis] - 1) * self.dilation_rate[axis] + 1

    def _taps(self, x, size):
        """Yields for each element of the kernel, row by row, the inputs that it multiplies, in the output's size."""
        if self.kernel_size == self.strides == (1, 1):
            yield x  # a full slice would be a copy, and so would its gradient
            return
        spans = [(length - 1) * stride + 1 for length, stride in zip(size, self.strides, strict=True)]
        for row in range(self.kernel_size[0]):
            for column in range(self.kernel_size[1]):
                top, left = row * self.dilation_rate[0], column * self.dilation_rate[1]
                yield x[:, top : top + spans[0] : self.strides[0], left : left + spans[1] : self.strides[1]]

    def compute_output_shape(self, input_shape):
        channels = self._checked(input_shape)
        shape = tuple(input_shape[0])
        last = self.data_format == "channels_last"
        size = [
            side and _length(side, self._reach(axis), self.strides[axis], self.padding)
            for axis, side in enumerate(shape[1:3] if last else shape[2:4])
        ]
        return (shape[0], *size, self._outputs(channels)) if last else (shape[0], self._outputs(channels), *size)

    def get_config(self):
        config = super().get_config()
        config |= {
            "kernel_size": self.kernel_size,
            "num_experts": self.num_experts,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer),
        }
        for role in (self._ROLE, "bias"):
            config |= {
                f"{role}_initializer": keras.initializers.serialize(getattr(self, f"{role}_initializer")),
                f"{role}_regularizer": keras.regularizers.serialize(getattr(self, f"{role}_regularizer")),
                f"{role}_constraint": keras.constraints.serialize(getattr(self, f"{role}_constraint")),
            }
        return config


@keras.saving.register_keras_serializable(package=PACKAGE)
class CondConv2D(_CondConv):
    """2D convolution whose kernel and bias are, for each example, a weighted sum of experts.

    The layer is called with a list, `layer([inputs, routing_weights])`. `routing_weights` are the weights of the sums,
    and several layers can share them. In the paper, they are the sigmoid of a dense layer on the block's globally
    averaged input.

    Args:
        filters: Integer, channels of the output.
        kernel_size: Integer or pair of integers, height and width of the kernels.
        num_experts: Integer, number of kernels.
        strides: Integer or pair of integers. Defaults to 1.
        padding: `"valid"`, or `"same"`: the output size is the input size over the strides, rounded up. Defaults to
            `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `keras.config.image_data_format()`.
        dilation_rate: Integer or pair of integers. Defaults to 1.
        activation: Activation function, or its name. Defaults to None.
        use_bias: Boolean, whether to add a bias. Each expert has its own. Defaults to True.
        kernel_initializer: Initializer of each expert's kernel, as in `keras.layers.Conv2D`. Defaults to
            `"glorot_uniform"`.
        bias_initializer: Initializer of each expert's bias. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer of each expert's kernel. The layer's loss is their sum. Defaults to None.
        bias_regularizer: Regularizer of each expert's bias. Defaults to None.
        activity_regularizer: Regularizer of the output. Defaults to None.
        kernel_constraint: Constraint of each expert's kernel. Defaults to None.
        bias_constraint: Constraint of each expert's bias. Defaults to None.
        **kwargs: `name`, `dtype` (also a `keras.DTypePolicy`), `trainable`.

    Call arguments:
        inputs: List of the tensor to convolve and the routing weights.

    Input shape:
        [(batch, height, width, channels), (batch, num_experts)]. With `channels_first`, the first is (batch, channels,
        height, width). The batch size is at least 1. Batch size, height and width may be unknown before the run.

    Output shape:
        (batch, new_height, new_width, filters), or (batch, filters, new_height, new_width) with `channels_first`.

    Returns:
        The convolved images. The layer's variables are `kernel`, (num_experts, kernel_height, kernel_width, channels,
        filters), and `bias`, (num_experts, filters).

    Raises:
        ValueError: If an argument or the shape of an input is not valid.

    Example:

    >>> import keras
    >>> from keras_effnet.nets.condconv import CondConv2D
    >>> inputs = keras.Input((32, 32, 16))
    >>> average = keras.layers.GlobalAveragePooling2D()(inputs)
    >>> routing = keras.layers.Dense(4, activation="sigmoid")(average)
    >>> outputs = CondConv2D(24, 3, num_experts=4, strides=2, padding="same")([inputs, routing])
    >>> outputs.shape
    (None, 16, 16, 24)

    Reference:
        arXiv 1904.04971, section 3; tensorflow/tpu condconv/condconv_layers.py:62-268.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        num_experts,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            kernel_size=kernel_size,
            num_experts=num_experts,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            activation=activation,
            use_bias=use_bias,
            kernel_arguments=(kernel_initializer, kernel_regularizer, kernel_constraint),
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.filters = _positive("filters", filters)

    def _outputs(self, channels):
        return self.filters

    def _kernel_shape(self, channels):
        return (*self.kernel_size, channels, self.filters)

    def _convolve(self, x, routing):
        x, (height, width) = self._padded(x)
        taps = list(self._taps(x, (height, width)))
        patches = taps[0] if len(taps) == 1 else ops.concatenate(taps, axis=-1)
        inside = math.prod(self.kernel.shape[1:4])
        static = isinstance(height, int) and isinstance(width, int)
        if _mix_kernels(self.num_experts, height * width if static else None):
            kernels = _matmul(routing, ops.reshape(self.kernel, (self.num_experts, -1)))
            kernels = ops.reshape(kernels, (-1, inside, self.filters))
            y = _matmul(ops.reshape(patches, (-1, height * width, inside)), kernels)
        else:
            scaled = patches[:, :, :, None, :] * routing[:, None, None, :, None]
            kernels = ops.reshape(self.kernel, (-1, self.filters))
            y = _matmul(ops.reshape(scaled, (-1, self.num_experts * inside)), kernels)
        return ops.reshape(y, (-1, height, width, self.filters))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


@keras.saving.register_keras_serializable(package=PACKAGE)
class DepthwiseCondConv2D(_CondConv):
    """2D depthwise convolution whose kernel and bias are, for each example, a weighted sum of experts.

    The layer is called with a list, `layer([inputs, routing_weights])`. See `CondConv2D`.

    Args:
        kernel_size: Integer or pair of integers, height and width of the kernels.
        num_experts: Integer, number of kernels.
        strides: Integer or pair of integers. Defaults to 1.
        padding: `"valid"`, or `"same"`: the output size is the input size over the strides, rounded up. Defaults to
            `"valid"`.
        depth_multiplier: Integer, output channels per input channel. Defaults to 1.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `keras.config.image_data_format()`.
        dilation_rate: Integer or pair of integers. Defaults to 1.
        activation: Activation function, or its name. Defaults to None.
        use_bias: Boolean, whether to add a bias. Each expert has its own. Defaults to True.
        depthwise_initializer: Initializer of each expert's kernel, as in `keras.layers.DepthwiseConv2D`. Defaults
            to `"glorot_uniform"`.
        bias_initializer: Initializer of each expert's bias. Defaults to `"zeros"`.
        depthwise_regularizer: Regularizer of each expert's kernel. The layer's loss is their sum. Defaults to None.
        bias_regularizer: Regularizer of each expert's bias. Defaults to None.
        activity_regularizer: Regularizer of the output. Defaults to None.
        depthwise_constraint: Constraint of each expert's kernel. Defaults to None.
        bias_constraint: Constraint of each expert's bias. Defaults to None.
        **kwargs: `name`, `dtype` (also a `keras.DTypePolicy`), `trainable`.

    Call arguments:
        inputs: List of the tensor to convolve and the routing weights.

    Input shape:
        [(batch, height, width, channels), (batch, num_experts)]. With `channels_first`, the first is (batch, channels,
        height, width). The batch size is at least 1. Batch size, height and width may be unknown before the run.

    Output shape:
        (batch, new_height, new_width, channels * depth_multiplier), or (batch, channels * depth_multiplier,
        new_height, new_width) with `channels_first`.

    Returns:
        The convolved images. The layer's variables are `kernel`, (num_experts, kernel_height, kernel_width, channels,
        depth_multiplier), and `bias`, (num_experts, channels * depth_multiplier).

    Raises:
        ValueError: If an argument or the shape of an input is not valid.

    Example:

    >>> import keras
    >>> from keras_effnet.nets.condconv import DepthwiseCondConv2D
    >>> layer = DepthwiseCondConv2D(5, num_experts=8, padding="same", use_bias=False)
    >>> tuple(layer([keras.ops.ones((2, 7, 7, 16)), keras.ops.ones((2, 8))]).shape)
    (2, 7, 7, 16)
    >>> tuple(layer.kernel.shape)
    (8, 5, 5, 16, 1)

    Reference:
        arXiv 1904.04971, section 3; tensorflow/tpu condconv/condconv_layers.py:271-471.
    """

    _ROLE = "depthwise"

    def __init__(
        self,
        kernel_size,
        num_experts,
        strides=1,
        padding="valid",
        depth_multiplier=1,
        data_format=None,
        dilation_rate=1,
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            kernel_size=kernel_size,
            num_experts=num_experts,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            activation=activation,
            use_bias=use_bias,
            kernel_arguments=(depthwise_initializer, depthwise_regularizer, depthwise_constraint),
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.depth_multiplier = _positive("depth_multiplier", depth_multiplier)

    def _outputs(self, channels):
        return channels * self.depth_multiplier

    def _kernel_shape(self, channels):
        return (*self.kernel_size, channels, self.depth_multiplier)

    def _convolve(self, x, routing):
        if self.depth_multiplier > 1:
            x = ops.repeat(x, self.depth_multiplier, axis=-1)
        kernels = self._mixed(routing)
        if _fold_examples(self.strides, dilated=self.dilation_rate != (1, 1)):
            return self._convolve_as_one(x, ops.reshape(kernels, (*self.kernel_size, -1, 1)))
        x, size = self._padded(x)
        products = (
            _wide(tap) * _wide(kernels[place])[:, None, None, :] for place, tap in enumerate(self._taps(x, size))
        )
        return ops.cast(sum(products), x.dtype)

    def _mixed(self, routing):
        """Returns the kernels of the examples, (taps, batch, channels)."""
        channels, taps = math.prod(self.kernel.shape[3:]), math.prod(self.kernel_size)
        experts = ops.transpose(ops.reshape(self.kernel, (self.num_experts, taps, channels)), (1, 0, 2))
        return _matmul(routing, experts)

    def _convolve_as_one(self, x, kernel):
        """Convolves a single example that has the channels of all examples.

        Channels come last on TensorFlow, whose convolutions on a CPU support no other layout, and first on PyTorch,
        which takes three times as long with channels last.
        """
        batch, rows, columns, channels = ops.shape(x)
        if keras.backend.backend() == "torch":
            x = ops.reshape(ops.transpose(x, (0, 3, 1, 2)), (1, batch * channels, rows, columns))
            y = ops.depthwise_conv(x, kernel, self.strides, self.padding, data_format="channels_first")
            y = ops.reshape(y, (batch, channels, *ops.shape(y)[2:]))
            return ops.transpose(y, (0, 2, 3, 1))
        x = ops.reshape(ops.transpose(x, (1, 2, 0, 3)), (1, rows, columns, batch * channels))
        y = _depthwise(x, kernel, self.strides, self.padding, self._padded)
        y = ops.reshape(y, (*ops.shape(y)[1:3], batch, channels))
        return ops.transpose(y, (2, 0, 1, 3))

    def get_config(self):
        return {**super().get_config(), "depth_multiplier": self.depth_multiplier}


def _depthwise(x, kernel, strides: tuple[int, int], padding: str, padded):
    """Applies TensorFlow's depthwise convolution to one example, with gradients that are depthwise convolutions too.

    TensorFlow's own gradient of the kernel is parallel over examples, and there is only one here: for 16 examples of
    14 x 14 x 672 and a kernel of 5 x 5 it takes 127 ms, while these gradients take 6. `padded` adds zeros to x, for the
    gradients only: forward, the convolution pads by itself, which saves a copy.
    """
    import tensorflow as tf

    def convolve(x, kernel, strides: Any = 1, padding="valid"):
        return ops.depthwise_conv(x, kernel, strides, padding, data_format="channels_last")

    @tf.custom_gradient
    def differentiable(x, kernel):
        def gradients(upstream):
            spread = _spread(upstream, strides)
            sides = [(size - 1, size - 1) for size in kernel.shape[:2]]
            with tf.GradientTape() as tape:
                tape.watch(x)
                whole, _ = padded(x)
            towards_whole = convolve(ops.pad(spread, ((0, 0), *sides, (0, 0))), ops.flip(kernel, (0, 1)))
            towards_kernel = convolve(whole, ops.reshape(spread, (*ops.shape(spread)[1:], 1)))
            return tape.gradient(whole, x, towards_whole), ops.reshape(towards_kernel, ops.shape(kernel))

        return convolve(x, kernel, strides, padding), gradients

    return differentiable(x, kernel)


def _spread(x, strides: tuple[int, int]):
    """Puts zeros between the rows and columns of a map (1, height, width, channels)."""
    if strides == (1, 1):
        return x
    _, height, width, channels = ops.shape(x)
    (down, across) = strides
    x = ops.pad(x[:, :, None, :, None], ((0, 0), (0, 0), (0, down - 1), (0, 0), (0, across - 1), (0, 0)))
    x = ops.reshape(x, (1, height * down, width * across, channels))
    return x[:, : (height - 1) * down + 1, : (width - 1) * across + 1]


class _Experts(keras.regularizers.Regularizer, keras.constraints.Constraint):
    """Applies a function of a kernel to the kernel of each expert."""

    def __init__(self, function, combine):
        self.function = function
        self.combine = combine

    def __call__(self, variable):
        return self.combine([self.function(variable[expert]) for expert in range(variable.shape[0])])


def _matmul(a, b):
    """Multiplies in the dtype of `a`. Keras returns float32 for float64 unless the backend is TensorFlow."""
    return ops.cast(ops.matmul(a, b), a.dtype)


def _wide(x):
    """Casts to at least float32, the dtype of sums."""
    return ops.cast(x, "float32") if keras.backend.standardize_dtype(x.dtype) in ("bfloat16", "float16") else x


def _length(size, reach: int, stride: int, padding: str):
    """Returns the output length for an input length, both integers or tensors."""
    if padding == "valid" and isinstance(size, int) and size < reach:
        raise ValueError(f"Expected an input at least as large as the kernel, which spans {reach}. Received: {size}")
    return (size - reach) // stride + 1 if padding == "valid" else (size + stride - 1) // stride


def _fit(size, reach: int, stride: int, padding: str):
    """Returns the zeros before and after an axis, the part of the padded axis that is used, and the output length."""
    length = _length(size, reach, stride, padding)
    used = (length - 1) * stride + reach
    if padding == "valid":
        return (0, 0), slice(0, used), length
    if isinstance(size, int):
        missing = max(used - size, 0)
        return (missing // 2, missing - missing // 2), slice(0, used), length
    # Unknown before the run: pad with as many zeros as can be missing, and cut off the surplus.
    missing = used - size
    if reach < stride:  # else never negative; Keras' maximum would change the type of PyTorch's integers
        missing = (missing + abs(missing)) // 2
    start = (reach - 1) // 2 - missing // 2
    return ((reach - 1) // 2, reach // 2), slice(start, start + used), length


def _check_examples(images, routings) -> None:
    """Compares the numbers of examples if they are known before the run."""
    if isinstance(images, int) and isinstance(routings, int) and images != routings:
        raise ValueError(f"Expected routing weights for each of {images} examples. Received: {routings}")


def _is_two_shapes(shapes) -> bool:
    return isinstance(shapes, list | tuple) and len(shapes) == 2 and all(isinstance(s, list | tuple) for s in shapes)


def _positive(name: str, value) -> int:
    if not _counts(value):
        raise ValueError(f"Expected {name} to be a positive integer. Received: {name}={value!r}")
    return int(value)


def _pair(name: str, value) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(map(_counts, pair)):
        raise ValueError(f"Expected {name} to be a positive integer or a pair of them. Received: {name}={value!r}")
    return int(pair[0]), int(pair[1])


def _counts(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0

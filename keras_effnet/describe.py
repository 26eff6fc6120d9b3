"""Describes the stages, the cost and the weights of a model as data. Describing a name needs no Keras."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from keras_effnet import model_loader, model_metadata
from keras_effnet.nets.normalization import scheme_near, scheme_of
from keras_effnet.nets.params_and_macs import stage_rows, total
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS, identify

if TYPE_CHECKING:
    import keras


def describe(model: "str | os.PathLike | keras.Model") -> dict[str, Any]:
    """Describes a model as data.

    Args:
        model: Name of a model; path of a `.keras` file or of a run's folder; or a `keras.Model` with an EfficientNet of
            this package or of keras.applications in it.

    Returns:
        Dict with

        - `name`, `variant` (None if no known model has these blocks), its `family` (`"V1"`, `"V2"`, ...), `activation`,
          `dropout_rate`, `drop_connect_rate`, `padding` and `bn_epsilon` (see `create_model()`), `preprocessing` (name
          of the scheme, None, or a pair);
        - `resolution` ([height, width] in pixels), `channels`, `classes` (None without a top);
        - `params` (trainable, as papers count them), `non_trainable_params` (batch-norm statistics), `macs`
          (multiply-adds for one image in convolutions, classifier and, with mixed experts, routing and sums of kernels;
          the TPU repository's figures for CondConv, whose B0 has 391 M, are 1.4 % higher);
        - `layers`, their number without the top: in this package (`ours`) and in keras.applications
          (`keras_applications`);
        - `stages`, a dict per row of the paper's table: `stage`, `operator`, `resolution` at its input, `channels` at
          its output, `layers`, `kernel_size`, `strides`, whether squeeze-and-excite has `global_context`, and lists of
          `expand_filters`, `se_filters` and `num_experts` per block;
        - `labels`, the list of class names, or None if they are not known;
        - `weights`, a dict per published set of weights: `tag`, `top1` and `top5` in percent (None if not published),
          `preprocessing`, `source`, `publisher` (`"tpu"`, `"automl"` or `"timm"`), and whether it is the `default` that
          `weights="imagenet"` loads.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If the model is unknown, or has no EfficientNet in it.

    Example:

    >>> import keras_effnet as ke
    >>> b0 = ke.describe("efficientnet-b0")
    >>> b0["params"], b0["macs"], b0["layers"]["keras_applications"]
    (5288548, 385814752, 237)

    Reference:
        arXiv 1905.11946, tables 1 and 2.
    """
    from keras_effnet.weights import registry

    found = model_loader.resolve(model) if isinstance(model, str | os.PathLike) else None
    labels = None
    if found and found.kind == "name":
        row = VARIANTS[found.place]
        architecture, size, channels, classes = resolve(row), (row.resolution,) * 2, 3, 1000
        variant, preprocessing = row.name, row.preprocessing
    else:
        from keras_effnet.nets import inspection

        net: Any = model_loader.load_model(found.place) if found else model
        reading = inspection.find(net, others=True)[1]
        architecture, channels = replace(reading.architecture, name=net.name), reading.channels
        classes, labels = reading.classes or _outputs(net), model_metadata.labels_of(net)
        variant = identify(architecture.blocks)
        usual = VARIANTS[variant].resolution if variant else None
        size = tuple(side or usual for side in reading.size)
        exact = scheme_of(reading.scale, reading.offset)
        preprocessing = exact and scheme_near(reading.scale, reading.offset)
    known_size: Any = size if None not in size else None
    stages = list(stage_rows(architecture, known_size, channels, classes))
    params, norms, macs = total(stages)
    ours, theirs = (sum(stage["_layers"][side] for stage in stages) for side in (0, 1))
    # keras.applications' V2 has one more layer where it divides by ImageNet's deviations.
    theirs += architecture.depthwise_name == "dwconv2" and preprocessing == "imagenet"
    return {
        "name": architecture.name,
        "variant": variant,
        "family": VARIANTS[variant].family if variant else None,
        "resolution": list(known_size) if known_size else None,
        "channels": channels,
        "classes": classes,
        "params": params + 2 * norms,
        "non_trainable_params": 2 * norms,
        "macs": macs if known_size else None,
        "layers": {"ours": ours, "keras_applications": theirs},
        "activation": architecture.activation,
        "dropout_rate": architecture.dropout_rate,
        "drop_connect_rate": architecture.drop_connect_rate,
        "padding": architecture.padding,
        "bn_epsilon": architecture.bn_epsilon,
        "preprocessing": preprocessing,
        "labels": labels,
        "stages": [{key: value for key, value in stage.items() if not key.startswith("_")} for stage in stages],
        "weights": [
            {
                "tag": record.tag,
                "top1": record.top1,
                "top5": record.top5,
                "preprocessing": record.preprocessing,
                "source": record.source,
                "publisher": record.publisher,
                "default": record.default,
            }
            for record in (registry.of_model(variant) if variant else ())
        ],
    }


def _outputs(model) -> int | None:
    """Returns the classes of a model whose head follows the EfficientNet, or None without a head."""
    shape = model.output_shape
    return shape[-1] if isinstance(shape, tuple) and len(shape) == 2 and model.layers[-1].weights else None

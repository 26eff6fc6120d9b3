"""Finds and loads the model that a user names: by its name, or the path of a file or of a training run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet import model_metadata
from keras_effnet.errors import command_line, one_line
from keras_effnet.nets.variants import VARIANTS, find_model, is_model, unknown_model

if TYPE_CHECKING:
    import keras

EXPORTS = (".tflite", ".onnx", ".xml")  # suffixes of exported files

_WEIGHTS = (".h5", ".hdf5", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".index", ".tar.gz")


@dataclass(frozen=True)
class Reference:
    """The model that a user has named.

    Args:
        kind: `"name"` for a variant, `"keras"` for a `.keras` file, `"export"` for an exported model.
        place: String, name of the variant or path of the file.
        weights: String, timm's tag or full name of a set that was part of the name, or empty.
    """

    kind: str
    place: str
    weights: str = ""

    def tag_of(self, weights: Any) -> Any:
        """Returns the weights to load: the tag that was part of the name, unless others are asked for.

        Args:
            weights: See `load_model()`.
        """
        return self.weights if self.weights and weights == "imagenet" else weights


def resolve(model: str | os.PathLike, best: bool = False, exports: bool = False) -> Reference:
    """Finds a model by its name or path, without loading it.

    Args:
        model: A name, see `nets.variants.find_model()`, perhaps with one of timm's tags, as in
            `"tf_efficientnet_b0.ns_jft_in1k"`; the path or the address of a `.keras` file; the folder of a training
            run; or the path of an exported model.
        best: Boolean, whether to choose a run's best.keras instead of its model.keras. Defaults to False.
        exports: Boolean, whether exported models are valid. Defaults to False.

    Returns:
        A `Reference`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the name is unknown, or a file is of another kind.
    """
    name = os.fspath(model)
    if name.startswith("hf://"):
        return _of_address(name)
    bare, _, tag = name.partition(".")
    path = Path(name)
    if name not in VARIANTS and path.exists():
        return _of_path(path, best, exports)
    if is_model(name):
        return Reference("name", find_model(name))
    weights = is_model(bare) and _timms(find_model(bare), name, tag)
    if weights:
        return Reference("name", find_model(bare), weights)
    if os.sep in name or name.endswith((".keras", *EXPORTS, *_WEIGHTS)):
        raise FileNotFoundError(f"Expected a model file. Received: {name!r}, which does not exist")
    raise ValueError(f"{unknown_model(name)}, or pass the path of a .keras file or of a run's folder")


def _timms(variant: str, name: str, tag: str) -> str:
    """Returns the name or the tag alone, whichever timm has for the variant, or an empty string."""
    from keras_effnet.weights import registry

    tags = [record.tag for record in registry.of_model(variant) if record.publisher == "timm"]
    known = tag in (each.partition(".")[2] for each in tags)
    return name if name in tags else tag if known else ""


def _of_path(path: Path, best: bool, exports: bool) -> Reference:
    name = str(path)
    if path.is_file() and path.suffix == ".keras":
        return Reference("keras", name)
    if (path / "config.json").is_file():
        from keras_effnet.weights.formats import preset_file

        if preset_file.folder_of(path) is not None:
            raise ValueError(
                f"Expected a model. Received: {name!r}, a preset of keras-hub. Convert it: "
                f"{command_line('convert', name, 'model.keras')}"
            )
        return _of_run(path, best)
    if path.suffix in EXPORTS or (path / "saved_model.pb").is_file():
        if exports:
            return Reference("export", name)
        raise ValueError(f"Expected a name, a .keras file or a run's folder. Received: {name!r}, an exported model")
    if name.endswith(_WEIGHTS):
        raise ValueError(
            f"Expected a model. Received: {name!r}, a file of weights. Name its model, and pass the file as weights: "
            f"--model efficientnet-b0 --weights {name}"
        )
    allowed = f" or {', '.join(EXPORTS)}" if exports else ""
    raise ValueError(
        f"Expected a name, a path that ends in .keras{allowed}, or the folder of a run. Received: {name!r}"
    )


def _of_address(address: str) -> Reference:
    from keras_effnet.weights import hub

    place = os.fspath(hub.local(address, whole=True))
    if place.endswith(".keras"):
        return Reference("keras", place)
    raise ValueError(
        f"Expected a model. Received: {address!r}, weights. Convert them: "
        f"{command_line('convert', address, 'model.keras')}"
    )


def _of_run(folder: Path, best: bool) -> Reference:
    last = folder / "model.keras"
    if not last.is_file():
        raise FileNotFoundError(
            f"Expected a finished run with its model.keras. Received: {str(folder)!r}, which has none yet. Resume the "
            "run: the same `keras-effnet train` command"
        )
    # Without best.keras, the last model is the best.
    chosen = folder / "best.keras" if best and (folder / "best.keras").is_file() else last
    return Reference("keras", str(chosen))


def load_model(
    model: str | os.PathLike, weights: str | os.PathLike | None = "imagenet", *, best: bool = False
) -> "keras.Model":
    """Loads a model by its name, from a `.keras` file, or from the folder of a training run.

    Args:
        model: A name such as `"efficientnet-b0"` or `"b0"`; the path of a `.keras` file, or its address on the Hugging
            Face Hub, `"hf://owner/name"`; or the folder of a run.
        weights: For a name: tag of its weights, path of a file, or None for random weights. Defaults to `"imagenet"`.
        best: Boolean, whether to load a run's best.keras instead of its model.keras, where it has one. Defaults to
            False.

    Returns:
        A `keras.Model` with `labels`, the list of its class names, or None if they are not known; and
        `weights_record`, the record of its published weights, or None.

    Raises:
        OSError: If the file does not exist, or the weights cannot be downloaded or read.
        ValueError: If the name is unknown, or the file is not a model.

    Example:

    >>> import keras_effnet as ke
    >>> path = ke.save_model(ke.EfficientNetB0(weights=None, classes=2), "pets.keras", labels=["cat", "dog"])
    >>> ke.load_model(path).labels
    ['cat', 'dog']
    """
    found = resolve(model, best)
    if found.kind == "name":
        from keras_effnet.models import classes_of, create_model

        chosen = found.tag_of(weights)
        made = create_model(found.place, weights=chosen, classes=classes_of(found.place, chosen))
        return attach(made, {})
    import keras

    from keras_effnet.weights.formats import keras_file

    try:
        keras_file.check_weights(found.place)
        loaded: Any = keras.saving.load_model(found.place, compile=False)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # Keras raises its own for an unknown layer, and any for a damaged file
        raise ValueError(
            f"Expected a model whose layers Keras knows. Received: {found.place!r}: {one_line(error)}"
        ) from error
    return attach(loaded, model_metadata.metadata(found.place))


def attach(model: "keras.Model", metadata: dict[str, Any]) -> "keras.Model":
    """Sets the attributes that a model's metadata describe.

    Args:
        model: A `keras.Model`.
        metadata: See `keras_effnet.metadata()`.

    Returns:
        The model.
    """
    from keras_effnet.weights import registry

    target: Any = model
    record, expects = metadata.get("weights"), model_metadata.expects_in(metadata)
    if expects is not None:
        target.expects = expects
    if metadata.get("schema"):
        target.weights_record = None
        target.training_record = metadata.get("training")
    if record:
        found = (one for one in registry.RECORDS if (one.model, one.tag) == (record["model"], record["tag"]))
        target.weights_record = next(found, None)
    target.labels = metadata.get("labels") or model_metadata.labels_of(model)
    return model


def check_finite(model: "keras.Model") -> None:
    """Checks that all weights of a model are numbers.

    Args:
        model: A `keras.Model`.

    Raises:
        ValueError: If a weight is NaN or infinite. The message names the first such variable.
    """
    import keras

    for variable in model.weights:
        if not keras.backend.is_float_dtype(variable.dtype):
            continue
        exact = "float64" if variable.dtype == "float64" else "float32"
        values = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(variable.value, exact)))
        wrong = values[~np.isfinite(values)]
        if len(wrong):
            raise ValueError(
                f"Expected finite weights. Received: {wrong[0]} in {variable.path!r} of the model {model.name!r}, "
                f"{len(wrong)} of {values.size} values"
            )

"""From arrays, in the names of the program that shall read them, to its files. A file is whole or not there."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

_PREFIX = ".keras_effnet-"


@contextmanager
def _writing(path) -> Iterator[None]:
    """Makes of a library's own exception, such as for a full disk, what Python calls such an error."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"Expected to write {str(path)!r}. Received: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def replacing(path) -> Iterator[Path]:
    """Gives a path beside the wanted one to write to, and moves it there once it is written.

    Args:
        path: Path of the file.
    """
    path = Path(path)
    with folder_beside(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def folder_beside(path) -> Iterator[Path]:
    """Gives a folder on the same disk as a file, and removes it in the end.

    Args:
        path: Path of the file.
    """
    parent = Path(path).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write to. Received: {str(parent)!r}, which does not exist")
    with tempfile.TemporaryDirectory(dir=parent, prefix=_PREFIX, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def sweep(folder: Path) -> None:
    """Removes what processes that were killed left of their work, once it is a day old.

    Args:
        folder: Path.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - newest > 24 * 3600:
                shutil.rmtree(left)


def safetensors(path, tensors: dict[str, np.ndarray], counters: Iterable[str] = (), metadata=None) -> Path:
    """Writes a .safetensors file.

    Args:
        path: Path of the file.
        tensors: Dict of arrays by name.
        counters: Names of integers that are written as 0.
        metadata: Dict of strings, kept in the file's header. Defaults to torch's.

    Returns:
        The path.
    """
    from safetensors.numpy import save_file

    everything = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    everything |= {name: np.zeros((), np.int64) for name in counters}
    with replacing(path) as temporary, _writing(path):
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(everything, temporary, metadata=metadata or {"format": "pt"})
        temporary.chmod(mode)  # the library keeps others from reading it
    return Path(path)


def h5(path, tensors: dict[str, np.ndarray], preprocessing) -> Path:
    """Writes an h5 file that a model of keras.applications loads by the order of its layers.

    Args:
        path: Path of the file.
        tensors: Dict of arrays by layer/variable, in that order.
        preprocessing: Pair (scale, offset) of sequences of floats, what the model does with pixels.

    Returns:
        The path.
    """
    import h5py

    # keras.applications divides by 255, then subtracts a mean and divides by the root of a variance.
    scale, offset = (np.asarray(numbers, np.float64) for numbers in preprocessing)
    deviation = 1 / (255 * scale)
    statistics = {
        "normalization/mean": np.float32(-offset * deviation),
        "normalization/variance": np.float32(deviation**2),
        "normalization/count": np.zeros((), np.int32),
    }
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in (statistics | tensors).items():
        layer, variable = name.split("/")
        layers.setdefault(layer, {})[variable] = value
    with replacing(path) as temporary, _writing(path), h5py.File(temporary, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"  # whose format this is
        for layer, variables in layers.items():
            group = file.create_group(layer)
            names = {variable: f"{layer}/{_keras2(layer, variable)}:0" for variable in variables}
            group.attrs["weight_names"] = [name.encode() for name in names.values()]
            for variable, value in variables.items():
                group.create_dataset(names[variable], data=value)
    return Path(path)


def _keras2(layer: str, variable: str) -> str:
    return "depthwise_kernel" if layer.endswith("dwconv") and variable == "kernel" else variable


def checkpoint(path, tensors: dict[str, np.ndarray], counter: str) -> Path:
    """Writes a TensorFlow checkpoint, and the text file that says which of the folder's is the latest.

    Args:
        path: Path of a folder (existing, or ending in a slash), or a prefix.
        tensors: Dict of arrays by name.
        counter: Name of the number of training steps, which is written as 0.

    Returns:
        The prefix.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "Expected TensorFlow, which writes its checkpoints. Bring it with: pip install tensorflow"
        ) from error
    prefix = Path(path)
    if str(path).endswith(("/", os.sep)):
        prefix.mkdir(parents=True, exist_ok=True)
    if prefix.is_dir():
        prefix = prefix / "model.ckpt"
    names = [*tensors, counter]
    with folder_beside(prefix) as folder:
        temporary = folder / prefix.name
        with _writing(prefix):
            tf.raw_ops.SaveV2(
                prefix=str(temporary),
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[*map(tf.constant, tensors.values()), tf.constant(0, tf.int64)],
            )
        state = folder / "checkpoint"
        state.write_text(f'model_checkpoint_path: "{prefix.name}"\nall_model_checkpoint_paths: "{prefix.name}"\n')
        # Without an index nobody takes the numbers for a checkpoint: the old one goes first, the new one comes last.
        Path(f"{prefix}.index").unlink(missing_ok=True)
        for file in sorted(folder.glob("*.data-*")):
            shutil.move(file, prefix.parent / file.name)
        os.replace(f"{temporary}.index", f"{prefix}.index")
        os.replace(state, prefix.parent / "checkpoint")
    return prefix

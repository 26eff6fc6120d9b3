"""Weights of a model hub: addresses `hf://owner/name[@revision][/file]` and `timm/name`, and what describes them there.

huggingface_hub downloads, into the folder `hub` of `cache.home()`. KERAS_EFFNET_MIRROR replaces it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_effnet import cache
from keras_effnet.errors import one_line
from keras_effnet.nets.architecture import Architecture
from keras_effnet.nets.normalization import scheme_near
from keras_effnet.nets.variants import is_model, of_timm
from keras_effnet.weights import downloads, presets, registry
from keras_effnet.weights.formats import preset_file, tensorflow_checkpoint

SERVER = "https://huggingface.co"

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.keras", "saved_model.pb", preset_file.BODY)
_MODELS = ("model.keras", "saved_model.pb")
_SAVEDMODEL = ("keras_metadata.pb", "variables/variables.index", "variables/variables.data-00000-of-00001")
_CONFIG = "config.json"
_OFFLINE = "no connection to the hub, and no copy is saved"
_DESCRIBED = ("model.safetensors", "pytorch_model.bin", preset_file.BODY)  # files that timm's config.json describes
# Arguments of timm's models that do not change what the weights compute.
_HARMLESS = {"drop_path_rate", "drop_rate", "img_size", "in_chans", "num_classes"}


@dataclass(frozen=True)
class Address:
    """A place on the hub.

    Args:
        repository: String, `"owner/name"`.
        revision: String: a branch, a tag or a commit, or None for the main branch.
        file: String, path of a file in the repository, or None for its weights.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, text: Any) -> "Address | None":
        """Returns the address that a string is, or None.

        Args:
            text: Any value.

        Raises:
            ValueError: If it starts like an address, and is none.
        """
        if not isinstance(text, str):
            return None
        short = re.fullmatch(r"(?:hf[-_]hub:)?(timm/(?!\.+$)[\w.-]+)", text)
        if short:
            return cls(short[1]) if text.startswith("hf") or not os.path.exists(text) else None
        if not text.startswith("hf://"):
            return None
        part = r"(?!\.+(?:[/@]|$))[\w.-]+"  # not "." and not ".."
        found = re.fullmatch(rf"hf://({part}/{part})(?:@([\w.-]+))?((?:/{part})*)/?", text)
        if found is None:
            raise ValueError(f"Expected an address as hf://owner/name[@revision][/file]. Received: {text!r}")
        return cls(found[1], found[2], found[3].lstrip("/") or None)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}{f'/{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Description:
    """What timm's `config.json`, or a preset of keras-hub, says of the weights beside it.

    Args:
        architecture: String, timm's name of the net; of a preset, ours.
        variant: String, our name of the net.
        classes: Integer, or None.
        preprocessing: See `nets.normalization.constants()`; or None if it is not known.
        resolution: Integer, or None.
        crop_padding: Integer. See `Expects`.
        interpolation: String. See `Expects`.
        crop_mode: String. See `Expects`.
        padding: Key of `nets.architecture.EPSILONS`.
        labels: List of class names, or None.
        preset: The `Preset`, or None for timm's.
    """

    architecture: str
    variant: str
    classes: int | None = None
    preprocessing: Any = None
    resolution: int | None = None
    crop_padding: int | None = None
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    padding: str = "same"
    labels: list[str] | None = None
    preset: presets.Preset | None = None

    @property
    def net(self) -> Architecture | None:
        """The net, where the description holds all of it."""
        return self.preset and self.preset.net


def local(path: Any, whole: bool = False) -> Any:
    """Returns the path on this machine of the weights that a path or an address names.

    Args:
        path: Path of a file; of a folder with a config.json and the weights, as timm, keras-hub and this package save
            them; of a file of a checkpoint or SavedModel; or an address. An address is downloaded.
        whole: See `fetch()`.

    Returns:
        The path of the file, of the folder of a preset or SavedModel, the prefix of a checkpoint, or `path` itself.

    Raises:
        ImportError: If huggingface_hub is needed and not installed.
        OSError: If the file cannot be downloaded.
        ValueError: If it is no address, or the config.json beside the weights names a net that this package lacks.
    """
    address = Address.of(path)
    if address is not None:
        path = fetch(address, whole)
    elif not isinstance(path, str | os.PathLike) or not os.fspath(path):
        return path
    elif (checkpoint := tensorflow_checkpoint.named_by(Path(path))) != Path(path):
        path = checkpoint
    elif (preset := preset_file.folder_of(Path(path))) is not None:
        path = preset
    elif (Path(path) / _CONFIG).is_file():
        path = next((Path(path) / name for name in _DESCRIBED if (Path(path) / name).is_file()), path)
    describe(path)
    return path


def fetch(address: Address, whole: bool = False) -> Path:
    """Downloads the weights at an address, and the config.json beside them, if they are not saved already.

    Args:
        address: An `Address`.
        whole: Boolean, whether a whole model is taken rather than weights, where a repository has both. Defaults to
            False.

    Returns:
        Path of the file, or of the folder of a SavedModel or a preset.

    Raises:
        ImportError: See `local()`.
        OSError: If there is no such file, or it cannot be downloaded, or has another hash than published.
    """
    failures: list[str] = []
    names = dict.fromkeys((*_MODELS, *WEIGHTS) if whole else WEIGHTS)
    for name in (address.file,) if address.file else names:
        found = _get(address, name, failures)
        if found is None and _refused(failures):
            break
        if found is None:
            continue
        inside = Address(address.repository, _commit_of(found) or address.revision)
        if Path(name).name == "saved_model.pb":
            for other in _SAVEDMODEL:
                _beside(inside, (Path(name).parent / other).as_posix())
            return found.parent
        if Path(name).name in (*WEIGHTS, preset_file.HEAD):
            _beside(inside, (Path(name).parent / _CONFIG).as_posix())
        if preset_file.folder_of(found) is not None:
            for other in preset_file.BESIDE:
                _beside(inside, (Path(name).parent / other).as_posix())
            return found.parent
        return found
    wanted = address.file or ", ".join(WEIGHTS)
    raise FileNotFoundError(f"Could not download {address}: {_reason(address, wanted, failures)}")


def _beside(address: Address, name: str) -> None:
    """Downloads a file that belongs to the weights, if the repository has it."""
    failures: list[str] = []
    _get(address, name, failures)
    if _refused(failures):  # without a connection, it is not known whether there is such a file
        raise OSError(f"Could not download {name} of {address}: {failures[-1]}")


def _refused(failures: list[str]) -> bool:
    """Returns whether the hub or its mirror has answered with an error, for the last file."""
    return bool(failures) and not failures[-1].startswith(_OFFLINE)


def _reason(address: Address, wanted: str, failures: list[str]) -> str:
    if failures:
        return failures[0]
    if downloads.is_mirrored():
        return f"KERAS_EFFNET_MIRROR={os.environ['KERAS_EFFNET_MIRROR']} has no {wanted} of it"
    others = [name for name in _listed(address) if name.endswith((".keras", ".h5", ".safetensors", ".bin", ".pth"))]
    hint = f". It has {', '.join(others[:5])}: name one, as in {address}/{others[0]}" if others else ""
    return f"the repository has no {wanted}{hint}"


def _listed(address: Address) -> list[str]:
    """Returns the names of a repository's files, or none where the hub does not tell."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi(endpoint=_endpoint()).list_repo_files(
            address.repository, revision=address.revision
        )
    except (OSError, ValueError):
        return []


def _get(address: Address, name: str, failures: list[str]) -> Path | None:
    """Downloads one file. Returns None, and why unless the repository has no such file, where it cannot."""
    if downloads.is_mirrored():
        url = f"{SERVER}/{address.repository}/resolve/{address.revision or 'main'}/{name}"
        file = registry.File("", url)
        try:
            path = downloads.locate(file)
            downloads.pin(file, path)
        except FileNotFoundError:
            return None
        except OSError as error:
            told = str(error).partition(": ")[2]
            failures.append(f"{_OFFLINE} ({told})" if isinstance(error, ConnectionError) else told)
            return None
        return path
    try:
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError as error:
        raise ImportError(
            f"Expected the package huggingface_hub, which downloads {address}. Received: it is not installed. "
            "Install it with: pip install 'keras_effnet[hub]'"
        ) from error
    place: dict[str, Any] = {"revision": address.revision, "endpoint": _endpoint()}
    try:
        connected = True
        try:
            # It asks once. hf_hub_download() asks six times, for half a minute.
            get_hf_file_metadata(hf_hub_url(address.repository, name, **place))
        except (errors.HfHubHTTPError, ValueError):
            raise
        except Exception:  # of the library that connects, which depends on the release
            connected = False
        saved = cache.home() / "hub"
        found = Path(
            hf_hub_download(address.repository, name, cache_dir=saved, local_files_only=not connected, **place)
        )
    except errors.LocalEntryNotFoundError:
        failures.append(_OFFLINE)
    except errors.EntryNotFoundError:
        pass
    except errors.GatedRepoError:
        failures.append("its owner gives access on request. Ask for it on its page, then log in: hf auth login")
    except errors.RepositoryNotFoundError:
        failures.append("there is no such repository, or it is private. To log in: hf auth login")
    except errors.RevisionNotFoundError:
        failures.append(f"it has no revision {address.revision!r}")
    except (OSError, ValueError) as error:
        failures.append(f"{' '.join(str(error).split())[:200]} ({type(error).__name__})")
    else:
        return _checked(found, failures)
    return None


def _endpoint() -> str | None:
    """Returns the server that HF_ENDPOINT names now. huggingface_hub reads it once."""
    return os.environ.get("HF_ENDPOINT") or None


def _checked(path: Path, failures: list[str]) -> Path | None:
    """Compares a download with its published hash, which is its name in the cache. Removes a damaged one."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and not downloads.matches(blob, f"sha256:{blob.name}"):
        received = registry.digest(blob, "sha256")
        blob.unlink()
        path.unlink(missing_ok=True)
        failures.append(f"the file has {received}, but sha256:{blob.name} is published. It is removed: try again")
        return None
    return path


def _commit_of(path: Path) -> str | None:
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return found and found[1]


def describe(path: Any) -> Description | None:
    """Returns what the files beside weights say of them, if timm, keras-hub or this package has saved them.

    Args:
        path: Path of a file, or of the folder of a preset.

    Returns:
        A `Description`, or None where there are no such files.

    Raises:
        OSError: If a file of a preset is missing.
        ValueError: If they name a net that is not one of this package, or are damaged.
    """
    preset = presets.read(path)
    if preset is not None:
        return _of_preset(preset)
    config = Path(path).parent / _CONFIG
    if Path(path).name not in _DESCRIBED or not config.is_file():
        return None
    with _damage_named(config):
        found = preset_file.parsed(config)
        architecture = found.get("architecture")
        arguments = {"global_pool": found.get("global_pool")} | (found.get("model_args") or {})
    if not isinstance(architecture, str):
        return None
    _check_net(architecture, arguments, path)
    with _damage_named(config):
        return _described(architecture, found)


def _of_preset(preset: presets.Preset) -> Description:
    pixels, name = preset.pixels, preset.net.name
    found = Description(
        name, name, preset.head and preset.head.classes, padding=preset.net.padding, crop_padding=0, preset=preset
    )
    if pixels is None:
        return found
    return replace(
        found,
        preprocessing=pixels.preprocessing,
        resolution=pixels.size[0] if pixels.size and pixels.size[0] == pixels.size[1] else None,
        interpolation=pixels.interpolation or "half-pixel-bilinear",
        crop_mode=pixels.crop_mode or "center",
    )


@contextmanager
def _damage_named(config: Path) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the config.json of a model. Received: {str(config)!r} ({one_line(error)})"
        ) from error


def _check_net(architecture: str, arguments: dict[str, Any], path) -> None:
    """Raises for a net that this package lacks, or one that its arguments change."""
    if not is_model(architecture):
        raise ValueError(f"Expected weights of this family. Received: {str(path)!r} of {architecture!r:.80}")
    changed = sorted(arguments.keys() - _HARMLESS - {"global_pool"})
    if arguments["global_pool"] not in (None, "", "avg"):
        changed.append("global_pool")
    if changed:
        raise ValueError(
            f"Expected a net of timm as published. Received: {str(path)!r}, whose model_args change "
            f"{', '.join(changed)[:80]}"
        )


def _described(architecture: str, found: dict[str, Any]) -> Description:
    inner = found.get("pretrained_cfg") or found
    variant, padding = of_timm(architecture)
    mean, deviation = (np.asarray(inner.get(key) or [], "float64").tolist() for key in ("mean", "std"))
    *_, height, width = inner.get("input_size") or [None, None]
    size = height if height == width else None
    crop = inner.get("crop_pct") or None
    labels = found.get("label_names") or inner.get("label_names")
    classes = found.get("num_classes", inner.get("num_classes"))
    whole = [size, crop, *mean, *deviation]
    if not all(each is None or (type(each) in (int, float) and abs(each) < 1e6) for each in whole):
        raise ValueError(f"expected numbers as input_size, crop_pct, mean and std. Received: {whole!s:.80}")
    if type(size) not in (int, type(None)) or not 0 < (crop or 1) <= 1:
        raise ValueError(f"expected a size in pixels and a share. Received: input_size={size}, crop_pct={crop}")
    if len(mean) != len(deviation) or not all(each > 0 for each in deviation):
        raise ValueError(f"expected a mean and a positive deviation per channel. Received: {mean}, {deviation}")
    interpolation = "bilinear" if inner.get("interpolation") == "bilinear" else "bicubic"
    if (found.get("keras_effnet") or {}).get("interpolation") == "half-pixel-bilinear":
        interpolation = "half-pixel-bilinear"
    scale = [1 / (255 * each) for each in deviation]
    offset = [-one / each for one, each in zip(mean, deviation, strict=True)]
    return Description(
        architecture,
        variant,
        classes,
        scheme_near(scale, offset) if mean else None,
        size,
        round(size / crop - size) if size and crop else None,
        interpolation,
        "squash" if inner.get("crop_mode") == "squash" else "center",
        padding,
        [str(label) for label in labels] if isinstance(labels, list) and len(labels) == classes else None,
    )

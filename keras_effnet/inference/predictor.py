"""`Predictor`: runs a model on the fastest runtime that is installed."""

import itertools
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_effnet import compat, model_metadata, ranges
from keras_effnet.errors import one_of
from keras_effnet.images import folders, photo_loader
from keras_effnet.inference import photo_stream, runtimes
from keras_effnet.inference.export_cache import ExportCache

if TYPE_CHECKING:
    import keras


class Predictor:
    """Runs a model for inference, on the fastest runtime that is installed.

    The first time, the model is folded (`fold_batch_norm()`), exported and checked against Keras. The export is cached
    on disk by the model's content. Later, the model starts without an export, and without importing Keras if it is
    given by name or path.

    Args:
        model: A functional or sequential `keras.Model` of images (of this package, of keras.applications, or built on
            them), with its current weights; or the name of a model; or the path of a `.keras` file, of a run's folder,
            or of an exported model (`.tflite`, `.onnx`, `.xml`, or the folder of a SavedModel).
        runtime: `"litert"`, `"onnxruntime"`, `"openvino"`, or `"keras"` for Keras itself. Defaults to `"auto"`: the
            fastest that is installed, by a short measurement on this machine, which is cached.
        precision: `"float32"`, `"float16"` or `"int8"`, see `export()`; or `"bfloat16"`: float32 weights, but OpenVINO
            computes in bfloat16, on processors that have it (AVX512-BF16 or AMX). Of a file that is already an export,
            only `"bfloat16"` changes the precision. Defaults to `"float32"`.
        threads: Integer. Processors to use. Defaults to None: all that this process may use.
        device: `"cpu"`; `"cuda"` for an NVIDIA GPU, with ONNX Runtime where onnxruntime-gpu is installed, else with
            Keras; or `"auto"`: the GPU if there is one and onnxruntime-gpu is installed. int8, LiteRT and OpenVINO run
            on the processor. Defaults to `"auto"`.
        weights: For the name of a model: tag of its weights, path of a file, or None for random weights. Defaults to
            `"imagenet"`.
        calibration: For `"int8"`, see `export()`. Defaults to None.
        input_shape: Tuple of integers. The shape of an image, for a model that takes any size. Defaults to None.

    Call arguments:
        images: Array of one or more images, with pixels 0-255 in uint8 or another numeric type. Several threads may
            call at once.

    Returns:
        The same as `model.predict(images)`: float32 arrays with one row per image. A single image gives one row.

    Attributes:
        device: String, `"cpu"` or `"cuda"`.
        metadata: Dict, see `keras_effnet.metadata()`.
        labels: List of the model's class names, or None.

    Raises:
        ImportError: If the runtime, or the package that exports to it, is not installed.
        OSError: If a file or the weights cannot be read.
        ValueError: If an argument is not valid, the model cannot be exported, or the images are an empty batch, have
            the wrong shape, or contain NaN or infinity.

    Example:

    >>> import keras_effnet as ke, numpy as np
    >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
    >>> predictor = ke.Predictor(model)
    >>> predictor(np.zeros((3, 32, 32, 3), "uint8")).shape
    (3, 2)
    """

    def __init__(
        self,
        model: "keras.Model | str | os.PathLike",
        runtime: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
        *,
        weights: str | os.PathLike | None = "imagenet",
        calibration: Any = None,
        input_shape: tuple[int, ...] | None = None,
        device: str = "auto",
    ):
        one_of("precision", precision, runtimes.PRECISIONS)
        if threads is not None:
            ranges.check(threads=(threads, int, ranges.COUNT))
        self.precision, self.threads = precision, threads or runtimes.cores()
        self._rules_of = (model, weights) if isinstance(model, str | os.PathLike) else None
        source = ExportCache(model, weights, precision, calibration, input_shape)
        self.device = runtimes.device_of(device, runtime, precision)
        if source.exported:
            self.runtime, self.path = runtimes.of_file(source.exported, runtime, precision), Path(source.exported)
            self._run: Any = self._opened(device)
            record = model_metadata.metadata(self.path) | {"input_shape": list(self._run.input_shape)}
            stored = record.get("precision", self.precision)
            if precision == "bfloat16" and stored == "int8":
                raise ValueError(
                    f"Expected a file of float32 for bfloat16. Received: {str(self.path)!r}, which computes in int8"
                )
            self.precision = precision if precision == "bfloat16" else stored
        else:
            self.runtime, self.path, record, self._run = self._opened_from(source, runtime, device)
            self._hold = source.hold  # while this object lives, its export stays
        self._check_device(device)
        self.metadata: dict[str, Any] = record
        self.input_shape: tuple[int, ...] = tuple(record["input_shape"])
        self.labels: list[str] | None = record.get("labels")
        self._structure = record.get("outputs")

    def _opened(self, device: str) -> Any:
        """Opens an exported file."""
        if self.device == "cuda":
            if self.runtime == "onnxruntime" and runtimes.has_cuda_provider():
                with self._falling_back(device):
                    session = runtimes.CudaSession(self.path)
                    if model_metadata.metadata(self.path).get("precision") != "int8":
                        return session
                if device == "cuda":
                    raise ValueError(f"Expected float32 or float16 for the GPU. Received: {str(self.path)!r} in int8")
            elif device == "cuda":
                raise ValueError(
                    "Expected an ONNX file and onnxruntime-gpu for device='cuda'. Received: "
                    f"{str(self.path)!r} on {self.runtime}"
                )
        self.device = "cpu"
        return runtimes.Pool(self.runtime, self.path, self.threads, str(self.precision))

    def _opened_from(self, source: ExportCache, runtime: str, device: str) -> tuple:
        if self.device == "cuda":
            with self._falling_back(device):
                return source.opened(runtime, self.threads, "cuda")
        self.device = "cpu"
        return source.opened(runtime, self.threads)

    def _check_device(self, device: str) -> None:
        """Keras and TensorFlow run on the GPU that they see."""
        if self.runtime in ("keras", "tensorflow") and runtimes.has_gpu() and compat.sees_gpu():
            if device == "cpu":
                raise ValueError(
                    f"Expected device='cuda' for runtime={self.runtime!r}, which runs on the GPU that it sees. "
                    "Received: device='cpu'. To hide the GPU, set CUDA_VISIBLE_DEVICES=-1"
                )
            self.device = "cuda"

    @contextmanager
    def _falling_back(self, device: str) -> Iterator[None]:
        """With `device="auto"`, warns that the GPU cannot be used, instead of raising an error."""
        try:
            yield
        except (ImportError, ValueError) as error:
            if device == "cuda":
                raise
            warnings.warn(f"Running on the processor, since the GPU cannot be used: {error}", stacklevel=5)

    def __repr__(self):
        place = "the GPU" if self.device == "cuda" else f"{self.threads} threads"
        return f"<Predictor {self.input_shape} {self.precision} on {self.runtime}, {place}>"

    def __call__(self, images) -> Any:
        return self._structured(self._run(self._checked(images)))

    def predict_files(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        recursive: bool = False,
        decode: str = "exact",
    ) -> Generator[photo_stream.FilePrediction, None, None]:
        """Runs the model on photos, which are cropped and resized as it expects.

        Decodes and predicts on all `threads` at once. Results come in order, as soon as they are ready, and memory does
        not grow with the number of photos.

        Args:
            paths: Path of an image file, or of a folder of them; or an iterable of such paths, which is read ahead of
                the results.
            recursive: Boolean, whether to search folders in folders too. Defaults to False.
            decode: See `load_image()`. Defaults to `"exact"`.

        Yields:
            Named tuples with `path`, `outputs` and `error`. `outputs` is what the call returns, without the axis of the
            batch: for a classifier, an array with a number per class. If a photo cannot be read, `outputs` is None and
            `error` is the exception; the others are not affected.

        Raises:
            ValueError: If `decode` is unknown, or the process was forked and the runtime does not survive that.

        Example:

        >>> import keras_effnet as ke
        >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
        >>> for path, outputs, error in ke.Predictor(model).predict_files(["docs/cat.png", "docs/coffee.png"]):
        ...     print(path, outputs.shape)
        docs/cat.png (2,)
        docs/coffee.png (2,)
        """
        self._run.check()
        given = [paths] if isinstance(paths, str | os.PathLike) else paths
        found = (path for each in given for path in folders.photographs([each], recursive))
        load = self.image_loader(decode)

        def rows() -> Generator[photo_stream.FilePrediction, None, None]:
            # With fewer photos than threads, each photo has all threads.
            head = list(itertools.islice(found, self.threads))
            run = self._run if len(head) < self.threads else self._run.on_one_thread
            stream = photo_stream.stream(itertools.chain(head, found), load, run, self.threads, self._run.batch)
            with closing(stream):
                for row in stream:
                    if row.error:
                        yield row
                    else:
                        yield photo_stream.FilePrediction(row.path, self._structured(row.outputs))

        return rows()

    def image_loader(self, decode: str = "exact") -> Callable[[Any], np.ndarray]:
        """Returns the function that loads photos as the model expects them.

        Args:
            decode: See `load_image()`. Defaults to `"exact"`.

        Returns:
            Function from a path, or a file's bytes, to an array of pixels.

        Raises:
            ValueError: If `decode` is unknown.
        """
        if self._rules_of:
            return photo_loader.loader_of_reference(*self._rules_of, self.metadata, self.input_shape, decode)
        return photo_loader.loader_of(self.metadata | {"input_shape": self.input_shape}, decode)

    def _structured(self, rows: list[np.ndarray]) -> Any:
        match self._structure:
            case list(names) if all(isinstance(name, str) for name in names):
                if len(names) != len(rows):
                    told = f"{len(rows)} of {str(self.path)!r}"
                    raise ValueError(f"Expected {len(names)} outputs, as its metadata say. Received: {told}")
                return dict(zip(names, rows, strict=True))
            case int():
                return rows
        return rows[0] if len(rows) == 1 else rows

    def _checked(self, images) -> np.ndarray:
        try:
            array = np.asarray(images)
        except ValueError as error:  # images of different shapes
            raise ValueError(f"Expected numeric pixels, in images of one shape. Received: {error}") from error
        if array.dtype.kind not in "uifb":
            raise ValueError(f"Expected numeric pixels, in images of one shape. Received: dtype {array.dtype}")
        if array.ndim == 3:
            array = array[None]
        told = ", ".join(map(str, self.input_shape))
        if array.ndim != 4 or array.shape[1:] != self.input_shape:
            raise ValueError(f"Expected images of shape (count, {told}). Received: {np.shape(images)}")
        if not len(array):
            raise ValueError(f"Expected at least one image of shape ({told}). Received: an empty batch")
        pixels = np.ascontiguousarray(array, "float32")
        if array.dtype.kind == "f" and not np.isfinite(pixels).all():
            wrong = np.flatnonzero(~np.isfinite(pixels).all((1, 2, 3)))
            raise ValueError(f"Expected finite pixels. Received: NaN or infinity in image {wrong[0]} of {len(array)}")
        return pixels

"""`Predictor`: runs a model on the fastest runtime that is installed."""

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_effnet import compat, model_metadata, ranges
from keras_effnet.errors import one_of
from keras_effnet.images import folders, photo_loader
from keras_effnet.inference import batches, photo_stream, runtimes
from keras_effnet.inference.export_cache import ExportCache

if TYPE_CHECKING:
    import keras


class Explained(NamedTuple):
    """What a model predicts for images, with a map for each class.

    Attributes:
        outputs: What the model returns.
        maps: float32 array (images, height, width, classes): what each place adds to the logit of each class.
    """

    outputs: Any
    maps: np.ndarray


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
        maps: Boolean, whether to compute class activation maps too, for `explain()`. Defaults to False.

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
        maps: bool = False,
    ):
        one_of("precision", precision, runtimes.PRECISIONS)
        if threads is not None:
            ranges.check(threads=(threads, int, ranges.COUNT))
        self.precision, self.threads = precision, threads or runtimes.cores()
        self._rules_of = (model, weights) if isinstance(model, str | os.PathLike) else None
        source = ExportCache(model, weights, precision, calibration, input_shape, maps=maps)
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
        self._has_maps = bool(record.get("maps"))
        if maps and not self._has_maps:
            raise ValueError(
                f"Expected an export with maps. Received: {str(self.path)!r} without them. Export the model again with "
                "ke.export(model, path, maps=True)"
            )

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
        return self._structured(self._without_maps(self._run)(batches.of_images(images, self.input_shape)))

    def explain(self, images) -> Explained:
        """Predicts, with maps of the places that support each class.

        Args:
            images: See the call.

        Returns:
            `Explained`. `keras_effnet.explain()` says what the maps contain.

        Raises:
            ValueError: If the predictor was created without `maps=True`, or the images are not valid.

        Example:

        >>> import keras_effnet as ke, numpy as np
        >>> model = ke.EfficientNetLite0(weights=None, input_shape=(64, 64, 3), classes=2)
        >>> outputs, maps = ke.Predictor(model, "keras", maps=True).explain(np.zeros((64, 64, 3), "uint8"))
        >>> outputs.shape, maps.shape
        ((1, 2), (1, 2, 2, 2))
        """
        self._check_maps()
        *rows, maps = self._run(batches.of_images(images, self.input_shape))
        return Explained(self._structured(rows), maps)

    def _check_maps(self) -> None:
        if not self._has_maps:
            raise ValueError("Expected a Predictor with maps: ke.Predictor(model, maps=True). Received: one without")

    def _without_maps(self, run: Callable) -> Callable[[np.ndarray], list[np.ndarray]]:
        return (lambda images: run(images)[:-1]) if self._has_maps else run

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
        stream = self._stream(paths, recursive, decode, self._without_maps)
        return (
            row if row.error else photo_stream.FilePrediction(row.path, self._structured(row.outputs)) for row in stream
        )

    def explain_files(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        recursive: bool = False,
        decode: str = "exact",
        classes: Callable[[Any], Sequence[int]] | None = None,
    ) -> Generator[photo_stream.FileExplanation, None, None]:
        """Explains photos as `predict_files()` predicts them.

        Args:
            paths: See `predict_files()`.
            recursive: See `predict_files()`.
            decode: See `predict_files()`.
            classes: Function from the outputs of a photo to the numbers of the classes whose maps to return. Defaults
                to None: all classes.

        Yields:
            `photo_stream.FileExplanation`.

        Raises:
            ValueError: See `explain()`.
        """
        self._check_maps()

        def explaining(run: Callable) -> Callable[[np.ndarray], list]:
            def explained(images: np.ndarray) -> list:
                *rows, maps = run(images)
                chosen = [self._structured(list(row)) for row in zip(*rows, strict=True)]
                if classes is not None:
                    maps = [each[..., list(classes(row))] for each, row in zip(maps, chosen, strict=True)]
                return [chosen, maps, [batches.viewed(image, self.input_shape[-1] <= 4) for image in images]]

            return explained

        stream = self._stream(paths, recursive, decode, explaining, photo_stream.AHEAD_WITH_MAPS)
        return (
            photo_stream.FileExplanation(row.path, None, row.error)
            if row.error
            else photo_stream.FileExplanation(row.path, row.outputs[0], None, *row.outputs[1:])
            for row in stream
        )

    def _stream(
        self, paths, recursive: bool, decode: str, around: Callable, ahead: int = photo_stream.AHEAD
    ) -> Generator[photo_stream.FilePrediction, None, None]:
        """Yields the rows of photos, as lists of what `around(run)` returns for them."""
        self._run.check()
        given = [paths] if isinstance(paths, str | os.PathLike) else paths
        found = (path for each in given for path in folders.photographs([each], recursive))
        load = self.image_loader(decode)

        run, run_few = around(self._run.on_one_thread), around(self._run)
        return photo_stream.stream(found, load, run, self.threads, self._run.batch, ahead, run_few)

    def on_one_thread(self, images) -> Any:
        """Runs the model as the call does, but with one thread, for a caller whose other threads do the same.

        On a processor, the results have the same bits as the call's, and many images in many threads take less time.

        Args:
            images: See `Predictor`.

        Returns:
            See `Predictor`.

        Raises:
            ValueError: See `Predictor`.

        Example:

        >>> import keras_effnet as ke, numpy as np
        >>> model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
        >>> ke.Predictor(model, "keras").on_one_thread(np.zeros((32, 32, 3), "uint8")).shape
        (1, 2)
        """
        run = self._without_maps(self._run.on_one_thread)
        return self._structured(run(batches.of_images(images, self.input_shape)))

    @property
    def batch(self) -> int:
        """Integer. Images to pass to `on_one_thread()` at a time: 1 on a processor, more on a GPU."""
        return self._run.batch

    def image_loader(self, decode: str = "exact", max_pixels: int | None = None) -> Callable[[Any], np.ndarray]:
        """Returns the function that loads photos as the model expects them.

        Args:
            decode: See `load_image()`. Defaults to `"exact"`.
            max_pixels: Integer. An image of more is refused before it is decoded. Defaults to None: Pillow's limit of
                179 million.

        Returns:
            Function from a path, or a file's bytes, to an array of pixels.

        Raises:
            ValueError: If `decode` is unknown.
        """
        if self._rules_of:
            found = (*self._rules_of, self.metadata, self.input_shape)
            return photo_loader.loader_of_reference(*found, decode, max_pixels)
        return photo_loader.loader_of(self.metadata | {"input_shape": self.input_shape}, decode, max_pixels)

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

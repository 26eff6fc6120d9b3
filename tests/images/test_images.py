"""Photos are decoded as viewers show them, and cropped and resized as in the original; class names need no network."""

import io
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, golden, shallow_nets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import keras_effnet as ke
from keras_effnet import class_names
from keras_effnet.images import resizing
from keras_effnet.images.decoding import decode_image
from keras_effnet.images.resizing import crop_and_resize, crop_window, twice_the_crop
from keras_effnet.nets.normalization import constants, scheme_of

REFERENCE = golden("tpu/preprocessing.json")


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def colours(mode: str = "RGB", size=(8, 6)) -> Image.Image:
    """Returns an image, red on the left and blue on the right: large areas, which survive JPEG."""
    image = Image.new("RGB", size, (200, 30, 30))
    image.paste((30, 30, 200), (size[0] // 2, 0, *size))
    return image.convert(mode)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the references' pixels are TensorFlow's decoder's")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("photograph", ["china", "flower"])
def test_equals_the_originals_evaluation(photograph, interpolation):
    import sklearn.datasets
    import tensorflow as tf

    path = f"{next(iter(sklearn.datasets.__path__))}/images/{photograph}.jpg"
    with open(path, "rb") as file:
        pixels = tf.io.decode_jpeg(file.read()).numpy()
    expected = REFERENCE["eval"][photograph]
    assert pixels.mean() == pytest.approx(expected["decoded"]["mean"], abs=1e-9)
    for size, row in expected["sizes"].items():
        size, row = int(size), row[f"resize_{interpolation}"]
        found = crop_and_resize(pixels, (size, size), interpolation=interpolation)
        assert list(found.shape) == row["shape"] and found.dtype == np.float32
        assert np.abs(found[:: size // 8, :: size // 8][:8, :8] - row["sample"]).max() < 1e-3
        for statistic in ("mean", "std", "min", "max"):
            assert getattr(found, statistic)() == pytest.approx(row[statistic], abs=1e-3)
        # The same through a lossless file and a model's name.
        name = {224: "efficientnet-b0", 240: "efficientnet-b1", 300: "efficientnet-b3"}[size]
        if interpolation == "bicubic":
            assert np.array_equal(ke.load_image(encoded(Image.fromarray(pixels)), name), found)
    # Decoders differ by a few gray levels.
    assert np.abs(decode_image(path).astype(int) - pixels).mean() < 3


def test_a_records_crop_differs_from_the_newest_codes(photograph):
    usual, record = (
        ke.load_image(photograph, "efficientnet-b3", weights=weights) for weights in ("auto", "autoaugment")
    )
    pixels = decode_image(photograph)
    assert np.array_equal(usual, crop_and_resize(pixels, (300, 300), crop_padding=43))
    assert np.array_equal(record, crop_and_resize(pixels, (300, 300), crop_padding=32))
    assert ke.load_image(photograph, "efficientnet-l2", weights="noisy-student-475").shape == (475, 475, 3)


def test_a_models_own_size_channels_and_record_hold(photograph):
    model = ke.EfficientNetLite0(input_shape=(100, 150, 3))
    assert np.array_equal(
        ke.load_image(photograph, model), crop_and_resize(decode_image(photograph), (100, 150), crop_padding=32)
    )
    with shallow_nets():
        grey = ke.EfficientNetB0(weights=None, input_shape=(None, None, 1))
        assert ke.load_image(photograph, grey).shape == (224, 224, 1)


def test_a_reloaded_model_and_one_with_an_own_head_keep_their_crop(photograph, tmp_path):
    made = ke.EfficientNetLite0(include_top=False, input_shape=(260, 260, 3), name="mine")
    expected = ke.load_image(photograph, made)
    made.save(tmp_path / "m.keras")
    headed = keras.Model(made.inputs, keras.layers.Flatten()(made.output))
    by_path = ke.EfficientNetLite0(include_top=False, weights=tmp_path / "m.keras", input_shape=(260, 260, 3))
    for model in (keras.saving.load_model(tmp_path / "m.keras"), headed, by_path):
        assert np.array_equal(ke.load_image(photograph, model), expected)
        assert np.array_equal(ke.load_image(photograph, model, weights="imagenet"), expected)
    assert not np.array_equal(ke.load_image(photograph, made, weights=None), expected)


def test_a_network_size_crop_of_the_same_size_is_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    assert np.array_equal(crop_and_resize(pixels, (64, 64), crop_padding=0), pixels)


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(*[st.integers(1, 400)] * 2),
    st.tuples(*[st.integers(1, 90)] * 2),
    st.sampled_from(sorted(resizing._TAPS)),
    st.sampled_from([1, 3, 4]),
    st.sampled_from(["uint8", "float32"]),
)
def test_equals_the_sum_over_all_pixels(shape, size, interpolation, channels, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels)).astype(dtype)
    top, left, rows, columns = crop_window(shape, size, 5)
    expected = pixels[top : top + rows, left : left + columns].astype("float64")
    for axis, (length, out) in enumerate(zip((rows, columns), size, strict=True)):
        dense = np.zeros((out, length))
        indices, weights = resizing._TAPS[interpolation](length, out)
        np.add.at(dense, (np.arange(out)[:, None], indices), weights)
        expected = np.moveaxis(np.tensordot(dense, expected, (1, axis)), 0, axis)
    found = crop_and_resize(pixels, size, 5, interpolation)
    assert found.shape == (*size, channels) and found.dtype == np.float32 and found.flags.c_contiguous
    assert np.abs(found - expected).max() < 2e-4


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 90)] * 2), st.tuples(*[st.integers(1, 90)] * 2), st.sampled_from(["bicubic", "bilinear"])
)
def test_a_flat_image_stays_flat(shape, size, interpolation):
    found = crop_and_resize(np.full((*shape, 3), 77, "uint8"), size, interpolation=interpolation)
    assert found.shape == (*size, 3)
    assert np.abs(found - 77).max() < 1e-3


VIEWS = {
    "grey": (encoded(colours("L")), colours("L").convert("RGB")),
    "1 bit": (encoded(colours("1")), colours("1").convert("RGB")),
    "palette": (encoded(colours().quantize(4)), colours()),
    "transparency on white": (
        encoded(Image.merge("RGBA", (*colours().split(), Image.new("L", (8, 6), 0)))),
        Image.new("RGB", (8, 6), "white"),
    ),
    "half transparent grey": (encoded(Image.new("LA", (8, 6), (0, 51))), Image.new("RGB", (8, 6), (204,) * 3)),
    "16-bit grey": (
        encoded(Image.fromarray(np.full((6, 8), 128 * 257, "uint16"))),
        Image.new("RGB", (8, 6), (128,) * 3),
    ),
    "16-bit TIFF": (
        encoded(Image.fromarray(np.full((6, 8), 128 * 257, "uint16")), "TIFF"),
        Image.new("RGB", (8, 6), (128,) * 3),
    ),
    "16-bit PGM": (b"P5 8 6 65535 " + b"\0\x80" * 48, Image.new("RGB", (8, 6))),
    "float TIFF with a glint": (
        encoded(Image.fromarray(np.array([[0.5] * 7 + [1.2]] * 6, "float32")), "TIFF"),
        Image.fromarray(np.array([[[128] * 3] * 7 + [[255] * 3]] * 6, "uint8")),
    ),
    "float TIFF": (
        encoded(Image.fromarray(np.full((6, 8), 0.5, "float32")), "TIFF"),
        Image.new("RGB", (8, 6), (128,) * 3),
    ),
    "CMYK JPEG": (encoded(colours("CMYK"), "JPEG", quality=100), colours()),
    "CMYK TIFF": (encoded(colours("CMYK"), "TIFF"), colours()),
    "animation": (
        encoded(colours(), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "green")]),
        colours(),
    ),
    "animated WebP": (
        encoded(colours(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (8, 6))]),
        colours(),
    ),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_images_are_taken_as_a_viewer_shows_them(kind):
    data, expected = VIEWS[kind]
    found = decode_image(data)
    assert found.shape == (6, 8, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= (12 if "JPEG" in kind else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = colours(size=(64, 32))
    # The orientation turns the stored image upright.
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    turned = Image.Exif()
    turned[0x0112] = inverse
    stored = Image.open(io.BytesIO(encoded(upright, exif=turned)))
    stored = ImageOps.exif_transpose(stored)
    found = decode_image(encoded(stored, "JPEG", quality=100, exif=exif))
    assert found.shape == (32, 64, 3)
    assert np.abs(found.astype(int) - np.asarray(upright)).mean() < 5


def smooth(height: int, width: int) -> Image.Image:
    """Returns a photo without edges, so that sampling every pixel or every fourth gives nearly the same."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(a * rows + b * columns + c) for a, b, c in ((9, 5, 0), (3, 14, 1), (12, 8, 2))]
    return Image.fromarray((127.5 + 120 * np.stack(waves, -1)).astype("uint8"))


@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.integers(30, 2000)] * 2), st.tuples(*[st.integers(20, 90)] * 2), st.integers(0, 40))
def test_a_jpeg_is_never_shrunk_below_twice_the_crop(shape, size, padding):
    file = encoded(smooth(*shape), "JPEG")
    shrunk = decode_image(file, at_least=twice_the_crop(size, padding)).shape[:2]
    factor = round(shape[0] / shrunk[0])
    assert shrunk == tuple(-(-side // factor) for side in shape)
    _, _, *kept = crop_window(shrunk, size, padding)
    assert factor == 1 or all(pixels >= 2 * side for pixels, side in zip(kept, size, strict=True))
    # And no more is decoded than that needs.
    _, _, *half = crop_window([side // (2 * factor) for side in shape], size, padding)
    assert factor == 8 or any(pixels < 2 * side + 4 for pixels, side in zip(half, size, strict=True))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_fast_decoding_sees_the_same_photograph(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(smooth(900, 1600), "JPEG", quality=95, exif=exif)
    net = ke.EfficientNetB0(weights=None, input_shape=(64, 160, 3))
    exact, fast = (ke.load_image(file, net, decode=how) for how in ("exact", "fast"))
    # A shrunk pixel stands for its neighbours: up to half of them beside it.
    assert np.abs(exact - fast).max() < 16 and not np.array_equal(exact, fast)
    if orientation == 1:
        png = encoded(smooth(900, 1600))
        assert np.array_equal(ke.load_image(png, net), ke.load_image(png, net, decode="fast"))


def test_broken_exif_does_not_hide_a_photograph():
    data = encoded(colours(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(data).shape == (6, 8, 3)


def png_header(width, height) -> bytes:
    """Returns a PNG of 100 bytes that declares a huge image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


DAMAGED = {
    "text": (b"no photograph at all", "is not an image"),
    "empty": (b"", "is not an image"),
    "truncated JPEG": (encoded(colours(size=(640, 480)), "JPEG")[:-900], "damaged"),
    "truncated PNG": (encoded(colours(size=(640, 480)))[:-500], "damaged"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),
    "bomb": (png_header(60_000, 60_000), "decompression bomb"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images_are_told_in_one_line(kind, tmp_path):
    data, expected = DAMAGED[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=expected) as caught:
        decode_image(path)
    assert "photo.jpg" in str(caught.value) and "Expected" in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_damage_gives_an_image_or_a_value_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
    file = bytearray(encoded(colours(size=(40, 30)), kind))
    for _ in range(data.draw(st.integers(1, 20))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_image(bytes(file))
    except ValueError:
        return
    assert found.ndim == 3 and found.shape[2] == 3


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: decode_image("nowhere.jpg"), "does not exist"),
        (lambda: decode_image("."), "is a folder"),
        (lambda: decode_image(3), "path of an image or its bytes"),
        (lambda: decode_image(encoded(colours()), channels=2), "channels to be 1, 3 or 4"),
        (lambda: ke.load_image(encoded(colours()), "efficientnet-b"), "Nearest"),
        (lambda: ke.load_image(encoded(colours()), "efficientnet-b0", weights="aa"), "Unknown weights"),
        (lambda: ke.load_image(encoded(colours()), "efficientnet-b0", decode="fat"), "Nearest: 'fast'"),
        (lambda: crop_and_resize(np.zeros((4, 4, 3)), (2, 2), interpolation="cubic"), "Nearest: 'bicubic'"),
        (lambda: ke.decode_predictions(np.zeros((1, 10))), r"\(1, 10\).*labels=model\.labels"),
        (lambda: ke.decode_predictions(np.zeros((1, 10)), labels=["a", "b"]), r"\(batch, 2\), for 2 labels.*\(1, 10\)"),
        (lambda: ke.decode_predictions(np.zeros((1, 1000)), top=0), "positive integer"),
    ],
)
def test_wrong_arguments(call, expected):
    with pytest.raises((ValueError, OSError), match=expected):
        call()


def test_four_channels_keep_the_transparency():
    data, _ = VIEWS["transparency on white"]
    assert (decode_image(data, channels=4)[..., 3] == 0).all()


def test_constants_and_their_inverse():
    for preprocessing in (None, "imagenet", "inception", "tpu127"):
        for channels in (1, 3, 4):
            assert scheme_of(*constants(preprocessing, channels)) == preprocessing
    assert scheme_of(*constants(([2, 3, 4], 1), 3)) == ([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])


def test_classes_have_the_names_of_keras_and_torchvision():
    wnids, names = zip(*class_names.classes(), strict=True)
    tfds = Path(find_spec("tensorflow_datasets").origin).parent / "datasets/imagenet2012/labels.txt"
    assert list(wnids) == tfds.read_text().split()
    assert list(names) == class_names.labels() and len(set(names)) == 1000
    assert [names[index] for index in (0, 282, 761, 999)] == ["tench", "tiger cat", "remote control", "toilet tissue"]
    # Keras has "crane" and "maillot" twice.
    assert [names[index] for index in (134, 517, 638, 639)] == ["crane bird", "crane", "maillot", "maillot tank suit"]


def test_predictions_are_decoded_as_in_keras():
    probabilities = np.zeros((2, 1000))
    probabilities[0, [281, 282]] = 0.3, 0.7
    probabilities[1, 639] = 1
    found = ke.decode_predictions(probabilities, top=2)
    assert found[0] == [("n02123159", "tiger_cat", 0.7), ("n02123045", "tabby", 0.3)]
    assert found[1][0] == ("n03710721", "maillot_tank_suit", 1)
    assert class_names.rank(probabilities, top=1)[0] == [(282, "n02123159", "tiger cat", 0.7)]
    assert ke.decode_predictions(keras.ops.convert_to_tensor(probabilities), top=2)[0][0][:2] == found[0][0][:2]
    assert len(ke.decode_predictions(preds=probabilities, top=2000)[0]) == 1000


def test_predictions_of_ones_own_classes_have_the_names_as_given():
    probabilities = np.array([[0.25, 0.0, 0.75]])
    found = ke.decode_predictions(probabilities, labels=["my cat", "Hund", "ein_Vogel"])
    assert found == [[(None, "ein_Vogel", 0.75), (None, "my cat", 0.25), (None, "Hund", 0.0)]]
    assert class_names.rank(probabilities, 1, ["a", "b", "c"]) == [[(2, None, "c", 0.75)]]

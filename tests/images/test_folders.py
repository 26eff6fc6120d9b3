"""What a folder of photos means, the same for every command: classes, splits, formats, and what is skipped."""

import csv
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from keras_effnet.images import folders


@pytest.fixture
def place(tmp_path):
    def made(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (len(name), 9, 9)).save(tmp_path / name)
        return tmp_path

    return made


def names(pairs) -> list[tuple[str, int]]:
    return [(Path(path).name, label) for path, label in pairs]


def test_a_share_of_each_class_is_held_out_by_name(place):
    root = place(
        *(f"{name}/{number}.png" for name, count in (("a", 20), ("b", 3), ("c", 2)) for number in range(count))
    )
    found = folders.labelled(root)
    assert found.labels == ["a", "b", "c"] and not found.notes
    assert [sum(label == number for _, label in found.test) for number in range(3)] == [4, 1, 1]
    assert not {path for path, _ in found.train} & {path for path, _ in found.test}
    assert len(found.train) + len(found.test) == 25
    assert found == folders.labelled(str(root)) and folders.labelled(root, 0.5) != found
    held = {path for path, _ in found.test}
    moved = folders.labelled(place(*(f"a/{number}.png" for number in range(20, 25))))
    # A few more photos move few of the others: what a model was trained on stays so.
    assert len(held - {path for path, _ in moved.test}) <= 1
    # A file system's order plays no role: a fifth that is each fifth file would be 4, 9, 14, 19.
    assert names(found.test)[:4] != [(f"{number}.png", 0) for number in (4, 9, 14, 19)]


def test_classes_without_photos_are_named_alone(place):
    root = place("a/1.png", "a/2.png", "b/1.png", "b/2.png", "single/1.png", ".hidden/1.png", "b/.hidden.png")
    (root / "empty").mkdir()
    (root / "a" / "notes.txt").write_text("not a photo by its name")
    (root / "a" / ".DS_Store").write_text("")
    found = folders.labelled(root)
    assert found.labels == ["a", "b", "single"]
    assert found.notes == ["Class 'empty' has no photo: it is left out", "Class 'single' has no photo to evaluate on"]
    assert len(found.train) == 3 and len(found.test) == 2
    for path in [*root.glob("[ab]/*"), *root.glob("single/*")]:
        path.unlink()
    with pytest.raises(ValueError, match="with no photos"):
        folders.labelled(root)


def test_a_class_may_not_be_new_in_val(place):
    with pytest.raises(ValueError, match="photos of c only to evaluate on"):
        folders.labelled(place("train/a/1.png", "val/a/1.png", "val/c/1.png"))


@pytest.mark.parametrize("table", ["photos.csv", "metadata.csv", "split.csv"])
def test_labels_from_a_csv_file(place, table):
    """`path,label`; Hugging Face's imagefolder with `file_name,label`; and a column `split`."""
    root = place(*(f"sub folder/{number}.png" for number in range(10)))
    path = root / table
    columns = ["file_name" if table == "metadata.csv" else "path", "label", "split"][: 3 if table == "split.csv" else 2]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for number in range(10):
            label, split = ("Große Katze", 'a "dog", really')[number % 2], ("train", "test")[number > 7]
            rows.writerow([f"sub folder/{number}.png", label, split][: len(columns)])
    found = folders.labelled(root if table == "metadata.csv" else path)
    assert found.labels == ["Große Katze", 'a "dog", really']
    assert sorted(names(found.train + found.test)) == [(f"{number}.png", number % 2) for number in range(10)]
    if table == "split.csv":
        assert names(found.test) == [("8.png", 0), ("9.png", 1)] and folders.splits_of(path) == ["train", "test"]
        assert folders.classes_of(path, "test")["Große Katze"] == [f"{root}/sub folder/8.png"]
    path.write_bytes("path,label\n1.png,Große\n".encode("latin-1"))
    with pytest.raises(ValueError, match="Expected a CSV file in UTF-8"):
        folders.labelled(root if table == "metadata.csv" else path)
    path.write_text("file,class\n1.png,a\n")
    with pytest.raises(ValueError, match="columns path and label"):
        folders.labelled(root if table == "metadata.csv" else path)


def test_photos_of_folders_and_of_the_folders_inside(place, monkeypatch):
    root = place("b.PNG", "a.jpg", "sub/c.webp", "sub/.x/d.png", ".e.png")
    inside = [f"{root}/a.jpg", f"{root}/b.PNG"]
    assert folders.photographs([root]) == inside
    assert folders.photographs([root], recursive=True) == [*inside, f"{root}/sub/c.webp"]
    assert folders.photographs([f"{root}//sub/./.x/no.txt"]) == [f"{root}/sub/.x/no.txt"]
    monkeypatch.chdir(root)
    assert folders.photographs(["."], recursive=True) == ["a.jpg", "b.PNG", "sub/c.webp"]


def test_unreadable_photos_are_named_once_and_too_many_raise(place):
    root = place(*(f"{number:02}.png" for number in range(30)))
    (root / "07.png").write_text("text")
    photos = folders.photographs([root])
    with pytest.warns(UserWarning, match=r"Skipped 1 of 30 photos that cannot be read: .*07\.png$"):
        found = folders.readable(photos)
    assert [os.path.basename(path) for path, _ in found] == [f"{number:02}.png" for number in range(30) if number != 7]
    assert found[0][1].shape == (6, 8, 3)
    (root / "08.png").write_bytes((root / "09.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"at most 5% of the photos to be unreadable\. Received: 2 of 30"):
        folders.readable(photos)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folders.readable(photos[:5])) == 5


def test_many_threads_leave_the_filters_of_warnings_as_they_were(place):
    photos = folders.photographs([place(*(f"{number:03}.png" for number in range(300)))])
    before = list(warnings.filters)
    for _ in range(3):
        folders.readable(photos)
    assert warnings.filters == before


def test_training_sees_the_pixels_that_load_image_sees(tmp_path):
    """Colors, depths, rotations and formats that TensorFlow alone decodes otherwise, or not at all."""
    tf = pytest.importorskip("tensorflow")
    from keras_effnet.images.decoding import decode_image
    from keras_effnet.tpu.input.example_readers import viewed

    whole = Image.open(ROOT / "docs" / "coffee.png").convert("RGB").resize((61, 43))
    rotated, clear = Image.Exif(), whole.convert("RGBA")
    rotated[0x0112] = 6
    clear.putalpha(Image.linear_gradient("L").resize(whole.size))
    gray = Image.fromarray(np.asarray(whole.convert("L")).astype("uint16") * 200)
    for name, image, more in (
        ("plain.jpg", whole, {}),
        ("gray.jpg", whole.convert("L"), {}),
        ("cmyk.jpg", whole.convert("CMYK"), {}),
        ("rotated.jpg", whole, {"exif": rotated}),
        ("clear.png", clear, {}),
        ("gray16.png", gray, {}),
        ("palette.png", whole.quantize(16), {}),
        ("one.webp", whole, {"lossless": True}),
        ("one.tiff", whole, {}),
        ("one.bmp", whole, {}),
        ("one.gif", whole.quantize(16), {}),
    ):
        path = tmp_path / name
        image.save(path, **more)
        content = path.read_bytes()
        pixels = tf.io.decode_image(viewed(content), channels=3, expand_animations=False).numpy()
        difference = np.abs(pixels.astype(int) - decode_image(content))
        assert pixels.shape[:2] == ((61, 43) if name == "rotated.jpg" else (43, 61))
        assert difference.mean() <= (1.5 if name in ("plain.jpg", "gray.jpg") else 0), name  # another decoder of JPEG
    assert viewed(b"text") == b"" and viewed((tmp_path / "one.webp").read_bytes()[:99]) == b""

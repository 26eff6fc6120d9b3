"""The HTML report: its content for finished, killed and damaged runs, and its rendering in a real browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import BACKEND, BROWSING, CHROMIUM, SHORT
from PIL import Image

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's runner", allow_module_level=True)

from keras_effnet.tpu import recipes
from keras_effnet.tpu.config import override
from keras_effnet.tpu.input import pipeline, skipped_examples
from keras_effnet.tpu.input.sources import open_source
from keras_effnet.tpu.reports import evaluation, html_report
from keras_effnet.tpu.reports.scoring import Scores
from keras_effnet.tpu.train import train

FLAGS = [*BROWSING, "--virtual-time-budget=4000", "--window-size=390,2000"]
RECIPE = override(recipes.find("digits_demo"), SHORT)
MIXING = override(RECIPE, ["--augment.mixup", "0.4", "--epochs", "0.4", "--model.image-size", "16"])

# Measures the rendered page and writes the result into it. The rest of the page is unchanged.
SCRIPT = """<script>
const told = []; addEventListener("error", event => told.push(event.message));
addEventListener("securitypolicyviolation", event => told.push(event.violatedDirective + " " + event.blockedURI));
addEventListener("load", () => {
  const shown = element => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const images = [...document.images], page = document.documentElement;
  const found = { images: images.length, whole: images.filter(i => i.complete && i.naturalWidth > 0 && shown(i)).length,
    svg: [...document.querySelectorAll("svg")].filter(shown).length, width: innerWidth,
    over: page.scrollWidth - page.clientWidth, told, fetched: performance.getEntriesByType("resource").length,
    dark: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.querySelector("svg text")).fill,
    // Elements that are referenced, markers and clip paths, need unique ids.
    ids: [...document.querySelectorAll("[id]")].map(e => e.id)
      .filter((id, n, all) => all.indexOf(id) != n && /^[mp][0-9a-f]{6}/.test(id)),
    headings: [...document.querySelectorAll("h2")].map(h => h.textContent) };
  const pre = document.createElement("pre"); pre.id = "found"; pre.textContent = JSON.stringify(found);
  document.body.append(pre); });
</script>"""


@pytest.mark.slow
@pytest.mark.usefixtures("mini")
def test_the_report_of_a_run(tmp_path):
    """Reports a finished run with the command, and the same run as if it had been killed."""
    workdir = tmp_path / "digits"
    result = train(MIXING, workdir, quiet=True)
    before = contents(workdir)
    line = [sys.executable, "-m", "keras_effnet", "report", str(workdir), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"path": f"{workdir}/report.html"}
    assert contents(workdir).keys() - before.keys() == {workdir / "report.html"}
    page = (workdir / "report.html").read_text()
    says_what_the_run_said(page, workdir, result)
    if CHROMIUM:
        looks_right_in_a_browser(page, tmp_path)
    serves_when_killed(workdir, result, tmp_path / "killed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed; everything else passed")


def browsed(page: str, folder, *flags: str) -> dict:
    """Returns what `SCRIPT` measures in the browser."""
    assert page.count(html_report._POLICY) == 1
    page = page.replace(html_report._POLICY, html_report._POLICY + "; script-src 'unsafe-inline'").replace(
        "</head>", SCRIPT + "</head>"
    )
    (folder / "page.html").write_text(page)
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            *flags,
            "--dump-dom",
            (folder / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def looks_right_in_a_browser(page, tmp_path):
    found = browsed(page, tmp_path)
    # 4 originals, 5 epochs and 2 mixed batches of each; 24 mistakes, each with its map of 2 x 2 places.
    assert found["images"] == found["whole"] == 4 * (1 + 5 + 2) + 2 * 24
    assert found["svg"] == 5 and found["ids"] == []
    assert found["told"] == [] and found["fetched"] == 0
    assert found["over"] <= 0 and found["width"] <= 500
    assert found["headings"] == [
        "Results",
        "Curves",
        "Training images",
        "Most confident mistakes",
        "Confusion matrix",
        "Classes",
        "Unreadable images",
    ]
    dark = browsed(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert found["dark"] == "rgb(255, 255, 255)" and dark["dark"] == "rgb(21, 23, 26)"
    assert found["text"] != dark["text"]  # labels of the curves


def says_what_the_run_said(page, workdir, result):
    assert (
        "Finished" in page and f"{result['steps']} of {result['steps']} steps" in page and 'class="lacking"' not in page
    )
    for name in ("ema_top1", "ema_top5", "top1", "top5"):
        assert f"<td class=right>{result[name]:.2%}</td>" in page
    # Evaluating the examples again gives the same result.
    assert (
        f"top-1 {result['ema_top1']:.2%}, top-5 {result['ema_top5']:.2%}, with the moving average in model.keras"
        in page
    )
    assert evaluation.evaluate(workdir)["top1"] == result["ema_top1"]
    assert "All images could be read." in page and "&quot;mixup&quot;: 0.4" in page


def mistakes(page: str) -> list[tuple]:
    card = (
        r'<figure class="card"><div><img .*?src="(.*?)"><img [^>]*alt="Places that support (.*?)" src="(.*?)"></div>'
        r"<figcaption><b>(.*?)</b>, (.*?)<br>(.*?)<br>"
    )
    found = re.findall(card, page)
    assert all(photo != explained and said == name for photo, said, explained, name, *_ in found)
    return found


def serves_when_killed(whole, result, workdir):
    """Reports from the newest readable checkpoint, without a model or result, and with a half-written line."""
    finished = (whole / "report.html").read_text()
    shutil.copytree(whole, workdir)
    for name in ("model.keras", "result.json", "report.html"):
        (workdir / name).unlink()
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "split": "tr')
    before = contents(workdir)
    assert html_report.write(workdir) == f"{workdir}/report.html"
    page = (workdir / "report.html").read_text()
    assert "Not finished" in page and f"{result['steps']} of {result['steps']} steps" in page
    assert len(mistakes(finished)) == 24 and mistakes(page) == mistakes(finished)
    (workdir / "report.html").unlink()
    assert contents(workdir) == before  # no other file changed
    # First truncate the newest checkpoint, then delete them all.
    index = max(workdir.glob("checkpoints/*.index"), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
    index.write_bytes(index.read_bytes()[:100])
    html_report.write(workdir, examples=50)
    page = (workdir / "report.html").read_text()
    assert "of 50 examples, sampled from 360, are wrong" in page and mistakes(page) != mistakes(finished)
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "metrics.jsonl").write_text("")
    (workdir / "skipped-0.jsonl").write_text('{"ordinal": 1, "name": "<b>&.jpg"}\n{"ordinal": 2, "na')
    html_report.write(workdir)
    page = (workdir / "report.html").read_text()
    assert "No evaluation yet" in page and "Received: none yet" in page and page.count('class="seen"') == 1
    assert "1 image could not be read" in page and "&lt;b&gt;&amp;.jpg" in page and "<b>&.jpg" not in page
    with pytest.raises(ValueError, match=r"Expected the folder of a run, with its config.json. Received: '.*/none'"):
        html_report.write(workdir / "none")


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def scores(labels, said, classes: int) -> Scores:
    """Returns scores of predictions that are certain."""
    ranked = np.stack([said, (np.array(said) + 1) % classes], 1).astype("int32")
    shares = np.tile(np.float32([1, 0]), (len(labels), 1))
    return Scores([str(n) for n in range(len(labels))], np.array(labels, "int32"), ranked, shares, [], [])


def test_the_confusion_matrix_is_a_picture():
    # Class 1 is never right and class 3 has no examples; class 2 does not occur.
    found = scores([0, 0, 0, 1, 4], [0, 0, 3, 4, 4], 5)
    present, counts = found.matrix()
    assert present == [0, 1, 3, 4] and counts.tolist() == [[2, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    picture = html_report._confusion_matrix(found, ["cats & dogs", "猫 $Käse$", "none", "x" * 40, "y"])
    texts = re.findall(r"<text[^>]*>(.*?)</text>", picture)
    names = ["cats &amp; dogs", "猫 $Käse$", f"{'x' * 19}…", "y"]
    assert texts.count("67") == texts.count("33") == 1 and texts.count("100") == 2
    assert all(texts.count(name) == 2 for name in names) and "none" not in texts
    table = html_report._classes(found, ["cats", "Käse", "none", "x", "y"])
    row = r"<tr><td>(.*?)</td>" + r"<td class=right>(.*?)</td>" * 4
    assert re.findall(row, table) == [
        ("Käse", "1", "", "0.0%", "0.0%"),
        ("y", "1", "50.0%", "100.0%", "66.7%"),
        ("cats", "3", "100.0%", "66.7%", "80.0%"),
    ]
    # Of many classes, a pixel for each pair.
    many = html_report._confusion_matrix(scores(range(100), [*range(50), *range(50)], 100), list(map(str, range(100))))
    data = re.search(r'src="data:image/png;base64,(.*?)"', many)
    assert data and "<svg" not in many
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))
    assert pixels.shape == (100, 100, 4) and (np.argwhere(pixels[..., 3]) == [[n, n % 50] for n in range(100)]).all()


def test_the_samples_are_what_the_run_saw():
    """Each image equals what training computes from that example in that epoch."""
    how = override(RECIPE, ["--augment.policy", "autoaugment", "--epochs", "0.4"])
    source = open_source(how.data)
    trained = pipeline.training(source, how, 32, 3, skipped_examples.Skipped(None, source.train_count))
    order = source.train.train(how.run.seed, 0, 0, 1, 3)
    names = [row["name"].numpy().decode() for row in order.take(source.train_count)]
    seen = {}
    wanted = html_report.samples(source, how, 32, 4, 1)
    for number, (images, _) in enumerate(trained.take(source.train_count // 3)):
        seen |= {names[3 * number + place]: image.numpy() for place, image in enumerate(images)}
    assert len(wanted) == 4 and len({row["name"] for row in wanted}) == 4
    for row in wanted:
        assert np.array_equal(row["seen"][0], seen[row["name"]]), row["name"]
        assert row["original"].shape == (8, 8, 3)

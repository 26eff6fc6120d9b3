"""The site in a real browser: no overflow, no script error, no request to another host, a search that finds."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import BACKEND, BROWSING, CHROMIUM, ROOT

FLAGS = [*BROWSING, "--window-size=1400,900"]
# Put into each page in front of its own scripts.
WATCH = """<script>
const tell = (what) => parent.postMessage(location.pathname + ": " + what, "*");
addEventListener("error", (event) => tell("error " + event.message), true);
addEventListener("unhandledrejection", (event) => tell("rejection " + event.reason));
addEventListener("securitypolicyviolation", (event) => tell("request " + event.blockedURI));
console.error = (...words) => tell("console " + words.join(" "));
</script>"""
# Opens each page in frames of both widths, then searches, and sends what it saw.
PROBE = """<!doctype html><body><script>
const seen = {problems: [], widths: [], found: []};
addEventListener("message", (event) => seen.problems.push(event.data));
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const open = async (page, width) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px`;
  frame.src = page;
  const loaded = new Promise((done) => frame.onload = done);
  document.body.append(frame);
  await loaded;
  await wait(200);
  return frame;
};
(async () => {
  for (const page of PAGES) {
    for (const width of [390, 1280]) {
      const frame = await open(page, width);
      const root = frame.contentDocument.scrollingElement;
      seen.widths.push([page, width, root.clientWidth, root.scrollWidth]);
      frame.remove();
    }
  }
  const frame = await open("index.html?q=CondConv", 1280);
  for (let tries = 0; tries < 100 && !seen.found.length; tries++) {
    await wait(100);
    seen.found = [...frame.contentDocument.querySelectorAll(".md-search-result__link")].map((link) => link.href);
  }
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script></body>"""


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def end_headers(self):
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:")
        super().end_headers()

    def do_GET(self):
        name = self.path.split("?")[0]
        if name == "/probe":
            return self.page(self.server.probe)
        if name.endswith(".html"):
            text = (self.server.site / name.lstrip("/")).read_text()
            return self.page(text.replace("<head>", f"<head>{WATCH}", 1))
        return super().do_GET()

    def page(self, text):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        self.server.seen = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_the_site_in_a_browser(tmp_path):
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [str(path.relative_to(site)) for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    docs = ROOT / "docs"
    assert pages == sorted(str(page.relative_to(docs).with_suffix(".html")) for page in docs.rglob("*.md"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site)) as server:
        server.site, server.seen, server.done = site, None, threading.Event()
        server.probe = PROBE.replace("PAGES", json.dumps(pages))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/probe"
        folder = f"--user-data-dir={tmp_path / 'browser'}"
        with subprocess.Popen(
            [CHROMIUM, *FLAGS, folder, "--remote-debugging-port=0", address], stderr=subprocess.PIPE
        ) as browser:
            arrived = server.done.wait(120)
            browser.kill()
        server.shutdown()
    assert arrived
    seen = server.seen
    assert not seen["problems"]
    assert len(seen["widths"]) == 2 * len(pages)
    assert not [row for row in seen["widths"] if row[3] > row[2]]
    assert any("condconv.html" in link for link in seen["found"])

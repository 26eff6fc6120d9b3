"""Downloads are complete and checked, whatever the network does: a real server misbehaves, processes are killed."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers import BACKEND, fill, invoked, same_weights, shallow_nets

import keras_effnet as ke
from keras_effnet import cache
from keras_effnet.weights import downloads, registry, store

MODEL = "efficientnet-edgetpu-s"  # the TPU repository's file has 1001 classes
BODY = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server:
    """A local server. `files` maps a path to its content, `behaviour` to how the next requests are answered."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.behaviour: dict[str, list[str]] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.requests.append(self.path)
                planned = outer.behaviour.get(self.path, [])
                how = (planned.pop(0) if len(planned) > 1 else planned[0]) if planned else "right"
                body = outer.files.get(self.path)
                if how == "error":
                    return self.send_error(500)
                if body is None:
                    return self.send_error(404)
                if how == "elsewhere":
                    self.send_response(302)
                    self.send_header("Location", f"/elsewhere{self.path}")
                    outer.files[f"/elsewhere{self.path}"] = body
                    return self.end_headers()
                if how == "wrong":
                    body = bytes(len(body))
                if how == "page":
                    body = b"<html>Please log in</html>"
                self.send_response(200)
                if how != "half without length":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if how.startswith(("half", "cut")):
                    body = body[: len(body) // 2]
                for start in range(0, len(body), 10_000):
                    self.wfile.write(body[start : start + 10_000])
                    if how == "slow":
                        time.sleep(0.05)
                if how == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                return None

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Checks 100 times a second whether to stop. The default, twice a second, would delay each test.
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Reduces all variants to three stages: nothing here depends on the net."""
    with shallow_nets(stages=3):
        yield


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("KERAS_EFFNET_MIRROR", raising=False)
    monkeypatch.setattr(downloads, "PAUSE", 0)
    return tmp_path / "home"


def published(server, name="x.h5", hashed=True) -> registry.File:
    server.files[f"/{name}"] = BODY
    return registry.File("keras", f"{server.url}/{name}", f"sha256:{SHA256}" if hashed else "")


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    "behaviour", [["right"], ["cut", "right"], ["half", "cut", "right"], ["error", "error", "right"], ["elsewhere"]]
)
def test_a_bad_network_costs_only_time(behaviour, hashed, server, home):
    file = published(server, hashed=hashed)
    server.behaviour["/x.h5"] = list(behaviour)
    path = downloads.locate(file)
    assert path == home / "x.h5" and path.read_bytes() == BODY
    assert not list(home.glob(".*"))
    count = len(server.requests)
    assert downloads.locate(file) == path and len(server.requests) == count


@pytest.mark.parametrize(
    ("behaviour", "hashed", "told", "requests"),
    [
        ("cut", True, "IncompleteRead", 3),
        ("half", False, "IncompleteRead", 3),
        ("half without length", True, "not sha256", 3),
        ("wrong", True, "not sha256", 3),
        ("page", True, "not sha256", 3),
        ("error", False, "500", 3),
        ("missing", True, "404", 1),
    ],
)
def test_what_cannot_be_brought_is_told_and_not_kept(behaviour, hashed, told, requests, server, home):
    file = published(server, hashed=hashed)
    server.behaviour["/x.h5"] = [behaviour]
    if behaviour == "missing":
        del server.files["/x.h5"]
    with pytest.raises(OSError, match=told) as caught:
        downloads.locate(file)
    for part in (file.url, str(home / "x.h5"), "a copy of your own", "KERAS_EFFNET_MIRROR"):
        assert part in str(caught.value)
    assert len(server.requests) == requests and not list(home.rglob("*.h5"))
    (home / "x.h5").write_bytes(BODY)  # the user's copy
    assert downloads.locate(file) == home / "x.h5"


def test_no_network_is_told_at_once(home):
    file = registry.File("keras", "http://127.0.0.1:9/a/b.h5", "md5:0")
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/a/b\.h5.*save it as .*home/a/b\.h5"):
        downloads.locate(file)
    assert time.monotonic() - begun < 5


def test_a_full_disk_is_told_and_leaves_nothing(server, home):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from keras_effnet.weights import downloads, registry; downloads.locate(registry.File('keras', sys.argv[1]))"
    )
    file = published(server)
    result = subprocess.run([sys.executable, "-c", code, file.url], capture_output=True, text=True)
    assert "File too large" in result.stderr.splitlines()[-1], result.stderr
    assert len(server.requests) == 1 and not [path for path in home.rglob("*") if path.is_file()]


def test_a_damaged_file_is_brought_again(server, home):
    file = published(server)
    downloads.locate(file).write_bytes(BODY[:-1])
    assert downloads.locate(file).read_bytes() == BODY and len(server.requests) == 2
    downloads.place(file).write_bytes(b"by hand, and wrong")
    del server.files["/x.h5"]
    with pytest.raises(OSError, match=r"The existing file has sha256:.*, but sha256:.* is published"):
        downloads.locate(file)


def test_a_login_page_for_the_original_leaves_its_port(mirror, loaded, server, monkeypatch):
    original, *_, hub = registry.find(MODEL, "baseline").files
    server.files[f"/{original.url.removeprefix('https://storage.googleapis.com/')}"] = b"<html>Please log in</html>"
    usual = ke.create_model(MODEL, weights=None)
    values = mirror[1].get_weights()
    usual.set_weights([*values[:-2], *(value[..., 1:] for value in values[-2:])])
    path = ke.weights.export(usual, cache.home().parent / "es.safetensors", target="timm")
    server.files[f"/{hub.url.removeprefix('https://huggingface.co/')}"] = path.read_bytes()
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", server.url)
    with pytest.warns(UserWarning, match="Using the timm file of the same weights instead"):
        assert loaded(ke.EfficientNetEdgeTPUS())


def test_a_hash_is_recorded_on_first_use_and_held_from_then_on(server, home):
    file = published(server, hashed=False)
    path = downloads.locate(file)
    downloads.pin(file, path)
    assert (home / "x.h5.sha256").read_text() == f"sha256:{SHA256}"
    path.write_bytes(b"damaged")
    assert downloads.locate(file).read_bytes() == BODY
    path.unlink()
    server.files["/x.h5"] = b"another file"
    with pytest.raises(OSError, match=f"not sha256:{SHA256}"):
        downloads.locate(file)


def test_the_first_digits_of_a_hash_are_held(server):
    good = registry.File("timm", published(server).url, f"sha256:{SHA256[:8]}")
    assert downloads.locate(good).read_bytes() == BODY
    wrong = registry.File("timm", published(server, "y.pth").url, "sha256:00000000")
    with pytest.raises(OSError, match="not sha256:00000000"):
        downloads.locate(wrong)


LOCATE = (
    "import sys; from keras_effnet.weights import downloads, registry; "
    "print(downloads.locate(registry.File('keras', sys.argv[1], sys.argv[2])))"
)


def test_processes_that_bring_the_same_file_at_once(server, home):
    file = published(server)
    server.behaviour["/x.h5"] = ["slow"]
    command = [sys.executable, "-c", LOCATE, file.url, file.hash]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == [str(home / "x.h5")] * 3
    assert (home / "x.h5").read_bytes() == BODY and not list(home.glob(".*"))


def test_a_killed_process_leaves_nothing_that_is_believed(server, home):
    file = published(server, hashed=False)
    server.behaviour["/x.h5"] = ["slow", "right"]
    process = subprocess.Popen([sys.executable, "-c", LOCATE, file.url, ""])
    while not any(path.stat().st_size for path in home.glob(".*/x.h5")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (home / "x.h5").exists()
    (left,) = home.glob(".*")
    os.utime(left / "x.h5", (0, 0))
    os.utime(left, (0, 0))
    assert downloads.locate(file).read_bytes() == BODY
    assert not left.exists()  # a day later


def test_a_copy_of_keras_applications_is_found(tmp_path, server):
    file = published(server)
    copy = tmp_path / "keras/models/x.h5"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"another file")
    assert downloads.locate(file) != copy
    downloads.place(file).unlink()
    copy.write_bytes(BODY)
    assert downloads.locate(file) == copy


def test_a_missing_package_names_the_command():
    file = registry.File("lukemelas", package="efficientnet-lite9-pytorch-model", path="x", hash="sha256:0")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite9-pytorch-model"):
        downloads.locate(file)


def test_a_changed_package_is_refused():
    file = next(file for file in registry.find("efficientnet-lite0", "imagenet").files if file.package)
    wrong = registry.File("lukemelas", package=file.package, path=file.path, hash="sha256:" + "0" * 64)
    with pytest.raises(OSError, match="Reinstall"):
        downloads.locate(wrong)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> tuple[Path, object]:
    """Returns a folder with a set's original file under its published path, and the model that it was made from."""
    folder = tmp_path_factory.mktemp("mirror")
    model = fill(ke.create_model(MODEL, weights=None, classes=1001))
    original, *_ = registry.find(MODEL, "baseline").files
    prefix = ke.weights.export(model, folder, target="tpu")
    archive = folder / original.url.removeprefix("https://storage.googleapis.com/")
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        for name in (f"{prefix.name}.index", f"{prefix.name}.data-00000-of-00001", "checkpoint"):
            file.add(folder / name, f"efficientnet-edgetpu-S/{name}")
            (folder / name).unlink()
    return folder, model


@pytest.fixture
def loaded(mirror):
    """Returns a function that checks whether a model has the mirror's weights."""

    def check(model) -> bool:
        *body, kernel, bias = mirror[1].get_weights()
        top = (kernel, bias) if model.output.shape[-1] == 1001 else (kernel[:, 1:], bias[1:])
        pairs = zip(model.get_weights(), [*body, *top], strict=True)
        return all(np.array_equal(found, expected) for found, expected in pairs)

    return check


def test_weights_by_name_from_the_original_checkpoint(mirror, loaded, home, monkeypatch):
    folder, _ = mirror
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(folder))
    model = ke.EfficientNetEdgeTPUS()
    assert loaded(model) and model.weights_record.tag == "baseline"
    assert loaded(ke.EfficientNetEdgeTPUS(classes=1001))
    body = ke.EfficientNetEdgeTPUS(include_top=False, classes=7)
    assert all(map(np.array_equal, body.get_weights(), model.get_weights()))
    # From here on without the mirror.
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(folder / "gone"))
    (kept,) = home.rglob("*.safetensors")
    assert loaded(ke.EfficientNetEdgeTPUS())
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    damaged = pytest.warns(UserWarning, match=f"A kept file is damaged and is made again: {kept}")
    with damaged, pytest.raises(OSError, match="gone is not a folder"):
        ke.EfficientNetEdgeTPUS()
    assert not kept.exists()
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(folder))
    assert loaded(ke.EfficientNetEdgeTPUS()) and kept.exists()


def test_a_server_as_mirror_and_a_home_as_mirror(mirror, loaded, home, server, tmp_path, monkeypatch):
    folder, _ = mirror
    for path in folder.rglob("*.tar.gz"):
        server.files[f"/weights/{path.relative_to(folder)}"] = path.read_bytes()
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", f"{server.url}/weights/")
    assert loaded(ke.EfficientNetEdgeTPUS()) and len(server.requests) == 1
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(home))
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "second"))
    assert loaded(ke.EfficientNetEdgeTPUS()) and len(server.requests) == 1


def test_a_mirror_may_hold_files_by_their_bare_names(mirror, loaded, server, tmp_path, monkeypatch):
    folder, _ = mirror
    (archive,) = folder.rglob("*.tar.gz")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / archive.name).write_bytes(archive.read_bytes())
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(flat))
    assert loaded(ke.EfficientNetEdgeTPUS())
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "second"))
    server.files[f"/{archive.name}"] = archive.read_bytes()
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", server.url)
    assert loaded(ke.EfficientNetEdgeTPUS())
    for tag in ("baseline", "autoaugment", "advprop"):  # whose files have the same name
        original = next(file for file in registry.find("efficientnet-b0", tag).files if file.format == "tpu")
        (flat / "efficientnet-b0.tar.gz").write_bytes(b"")
        monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(flat))
        with pytest.raises(OSError, match="has no cloud-tpu-checkpoints"):
            downloads.locate(original)


def test_a_port_stands_in_and_says_so(mirror, loaded, tmp_path, monkeypatch):
    _, model = mirror
    *_, hub = registry.find(MODEL, "baseline").files
    path = tmp_path / "mirror" / hub.url.removeprefix("https://huggingface.co/")
    path.parent.mkdir(parents=True)
    usual = ke.create_model(MODEL, weights=None)
    usual.set_weights([*model.get_weights()[:-2], *(value[..., 1:] for value in model.get_weights()[-2:])])
    ke.weights.export(usual, path, target="timm")
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(tmp_path / "mirror"))
    for _ in range(2):  # downloaded, then cached
        with pytest.warns(UserWarning, match=r"edgetpu-S\.tar\.gz.*Using the timm file of the same weights instead"):
            assert loaded(ke.EfficientNetEdgeTPUS())
    assert loaded(ke.EfficientNetEdgeTPUS(weights="tf_efficientnet_es.in1k", preprocessing=None))


def test_a_file_without_the_classifier_is_preferred_where_none_is_needed():
    b0 = registry.find("efficientnet-b0", "imagenet")
    assert [file.include_top for file in store.candidates(b0, include_top=False)][:2] == [False, True]
    assert all(file.include_top for file in store.candidates(b0))


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b"\x1f\x8b" + bytes(1000)])
def test_what_is_no_checkpoint_is_not_kept(content, home, tmp_path, server, monkeypatch):
    original = registry.find(MODEL, "baseline").files[0]
    where = "/" + original.url.removeprefix("https://storage.googleapis.com/")
    server.files[where] = content
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", server.url)
    with pytest.raises(ValueError, match=rf"Expected (weights as|a checkpoint in).*from {server.url}{where}"):
        ke.EfficientNetEdgeTPUS()
    assert not [path for path in home.rglob("*") if path.is_file()]
    by_hand = downloads.place(original)
    by_hand.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected (weights as|a checkpoint in)"):
        ke.EfficientNetEdgeTPUS()
    assert by_hand.read_bytes() == content  # the user's file is not deleted


def test_everything_missing_is_one_error(tmp_path, monkeypatch, home):
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(tmp_path))
    with pytest.raises(OSError, match="noisy_student_efficientnet-b3") as caught:
        ke.EfficientNetB3(weights="noisy-student")
    told = str(caught.value)
    assert str(home / "cloud-tpu-checkpoints/efficientnet/noisystudent") in told
    assert "Also tried" not in told  # in a folder
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"no connection to 127\.0\.0\.1:9\. Also tried: https://github.*To use a copy"):
        ke.EfficientNetB3(weights="noisy-student")
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(tmp_path / "none"))
    with pytest.raises(OSError, match="is not a folder"):
        ke.EfficientNetB3(weights="noisy-student")
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("KERAS_EFFNET_MIRROR")
    with pytest.raises(OSError, match=r"Expected a writable folder.*KERAS_EFFNET_HOME="):
        ke.EfficientNetB3(weights="noisy-student")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the command does not depend on the backend")
def test_the_download_command(mirror, home, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(mirror[0]))
    path = Path(json.loads(invoked("download", MODEL, "--json").stdout)["path"])
    assert path.is_relative_to(home) and path.suffix == ".safetensors"
    model = ke.create_model(MODEL, weights=path)
    assert same_weights(model, ke.create_model(MODEL))
    failed = invoked("download", "efficientnet-b0")
    assert failed.returncode == 2 and failed.stderr.startswith("error: Could not download https://")
    assert "\n" not in failed.stderr.strip()

"""Weights by their addresses on the Hugging Face Hub, from a real server that answers as the hub does."""

import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest
from helpers import ROOT, fill, golden, run, same_weights, shallow_nets

import keras_effnet as ke
from keras_effnet.weights import hub

COMMIT = "0123456789abcdef" * 2 + "01234567"
OTHER = "f" * 40


class Hub:
    """A local hub. `files` maps `owner/name` to a dict of contents by path; a second revision is `<name>@v2`."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.damaged: set[str] = set()  # names of files that arrive with another byte
        self.broken: set[str] = set()  # names of files for which it has an error
        self.status = 403  # of that error
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, whole: bool):
                outer.requests.append(self.path)
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(\?.*)?", self.path):
                    listed = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in outer.files[found[1]]]
                    return self.reply(json.dumps(listed).encode(), {"Content-Type": "application/json"}, whole)
                found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
                assert found is not None
                repository, revision, name = found.groups()
                if repository == "closed/one":
                    return self.refuse(403, "GatedRepo")
                if repository not in outer.files:
                    return self.refuse(401, "RepoNotFound")
                if revision not in ("main", "v2", COMMIT, OTHER):
                    return self.refuse(404, "RevisionNotFound")
                second = revision in ("v2", OTHER)
                body = outer.files[f"{repository}@v2" if second else repository].get(name)
                commit = {"X-Repo-Commit": OTHER if second else COMMIT}
                if name in outer.broken:
                    return self.refuse(outer.status, "Error", commit)
                if body is None:
                    return self.refuse(404, "EntryNotFound", commit)
                commit["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
                if name in outer.damaged:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                return self.reply(body, commit, whole)

            def reply(self, body: bytes, headers: dict[str, str], whole: bool):
                self.send_response(200)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if whole:
                    self.wfile.write(body)

            def refuse(self, status: int, code: str, headers=()):
                self.send_response(status)
                for name, value in {**dict(headers), "X-Error-Code": code, "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Checks 100 times a second whether to stop. The default, twice a second, would delay each test.
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, repository: str, folder) -> None:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files[repository] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_EFFNET_MIRROR", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens
    return tmp_path / "home"


@pytest.fixture(scope="module")
def saved_pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "pets"
    with shallow_nets(stages=3):
        model = fill(ke.EfficientNetB0(weights=None, classes=3, preprocessing="inception", input_shape=(64, 64, 3)))
        path = ke.save_model(model, folder.with_suffix(".keras"), ["cat", "dog", "red|fox"], crop_padding=0)
        ke.weights.convert_file(path, folder, target="hub")
    return folder, model


@pytest.fixture
def pets(saved_pets):
    """Returns a folder that is ready for the Hub, and the model that it was saved from."""
    with shallow_nets(stages=3):
        yield saved_pets


def test_a_saved_folder_goes_to_the_hub_and_comes_back(pets, server, tmp_path, monkeypatch):
    folder, model = pets
    server.put("me/pets", folder)
    again = ke.create_model("b0", weights="hf://me/pets", classes=3)
    assert same_weights(again, model)
    assert again.labels == ["cat", "dog", "red|fox"] and again.expects.crop_padding == 0
    assert again.input_shape == (None, 64, 64, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype("float32")
    np.testing.assert_allclose(run(again, pixels), run(model, pixels), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="preprocessing='inception'"):
        ke.create_model("b0", weights="hf://me/pets", classes=3, preprocessing="imagenet")
    with pytest.raises(ValueError, match=r"weights of efficientnet-b3.*of tf_efficientnet_b0"):
        ke.create_model("b3", weights="hf://me/pets", classes=3)
    body = ke.create_model("b0", weights="hf://me/pets", include_top=False)
    assert all(map(np.array_equal, body.get_weights(), model.get_weights()))
    # Without a connection, and from the folder itself.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    name = ke.weights.convert_file("hf://me/pets", tmp_path / "pets.keras")
    for path in (tmp_path / "pets.keras", folder):
        loaded = ke.load_model(path) if path != folder else ke.create_model(name, weights=folder, classes=3)
        assert same_weights(loaded, model) and loaded.labels == again.labels and loaded.expects == again.expects
    assert ke.weights.identify("hf://me/pets").classes == 3
    assert ke.weights.verify("hf://me/pets", "b0").fits


def test_the_card_and_the_config_say_what_the_model_is(pets):
    folder, _ = pets
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_b0" and config["num_classes"] == 3
    assert config["label_names"] == ["cat", "dog", "red|fox"]
    cfg = config["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"], cfg["input_size"], cfg["crop_pct"]) == ([0.5] * 3, [0.5] * 3, [3, 64, 64], 1)
    card = (folder / "README.md").read_text()
    header = card.split("---\n")[1]
    for said in ("license: other", "library_name: timm", "pipeline_tag: image-classification"):
        assert said in header
    assert "cat, dog, red\\|fox" in card and "64 x 64" in card and "not stated" in card


def test_the_card_of_published_weights_has_their_figures(tmp_path, monkeypatch):
    model = ke.EfficientNetLite0(weights="imagenet")
    folder = ke.weights.export(model, tmp_path / "lite0", target="hub")
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "75.1 % on ImageNet" in card and "lite/README.md:16" in card
    again = ke.create_model("lite0", weights=folder)
    assert same_weights(again, model) and again.get_config() == model.get_config()
    (folder / "notes.txt").write_text("kept")
    assert ke.weights.export(model, folder, target="hub") == folder and (folder / "notes.txt").exists()


def test_timms_names_are_addresses(pets, server, monkeypatch, tmp_path):
    folder, model = pets
    server.put("timm/tf_efficientnet_b0.mine_in1k", folder)
    assert same_weights(ke.create_model("b0", weights="timm/tf_efficientnet_b0.mine_in1k", classes=3), model)
    # A set that the registry knows needs no server, or another file than the hub's.
    asked = len(server.requests)
    with pytest.raises(ValueError, match="They are of efficientnetv2-s"):
        ke.create_model("b0", weights="hf-hub:timm/tf_efficientnetv2_s.in1k")
    with pytest.raises(ValueError, match="They are of efficientnet-b3"):
        ke.create_model("b0", weights="timm/tf_efficientnet_b3.ns_jft_in1k")
    assert len(server.requests) == asked
    for architecture, told in (("efficientnet_b0_gn", "efficientnet_b0_gn"), ("resnet50", "resnet50"), (5, None)):
        server.files["me/other"] = dict(server.files["timm/tf_efficientnet_b0.mine_in1k"])
        server.files["me/other"]["config.json"] = json.dumps({"architecture": architecture}).encode()
        monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / str(architecture)))
        if told:
            for refused in (
                lambda: ke.create_model("b0", weights="hf://me/other", classes=3),
                lambda: ke.weights.load(model, "hf://me/other"),
                lambda: ke.weights.convert_file("hf://me/other", tmp_path / "x.keras"),
                lambda: ke.weights.identify("hf://me/other"),
            ):
                with pytest.raises(ValueError, match=told):
                    refused()
    assert not (tmp_path / "x.keras").exists()


def test_revisions_files_and_folders(pets, server, tmp_path):
    folder, _ = pets
    server.put("me/pets", folder)
    server.files["me/pets"]["deep/er/w.keras"] = b"first"
    server.files["me/pets@v2"] = {"deep/er/w.keras": b"second"}
    assert hub.local("hf://me/pets/deep/er/w.keras").read_bytes() == b"first"
    assert hub.local("hf://me/pets@v2/deep/er/w.keras").read_bytes() == b"second"
    server.files["me/saved"] = {name: name.encode() for name in ("saved_model.pb", *hub._SAVEDMODEL)}
    found = hub.local("hf://me/saved")
    assert (
        found.is_dir() and (found / "variables/variables.index").is_file() and (found / "keras_metadata.pb").is_file()
    )


def test_files_beside_the_weights_are_there_or_an_error(pets, server, monkeypatch):
    server.put("me/pets", pets[0])
    server.broken = {"config.json"}
    with pytest.raises(OSError, match=r"config\.json of hf://me/pets"):
        hub.local("hf://me/pets")
    server.broken = set()
    server.files["me/deep"] = {f"a/{name}": b"x" for name in ("saved_model.pb", *hub._SAVEDMODEL)}
    assert (hub.local("hf://me/deep/a/saved_model.pb") / "variables/variables.index").is_file()
    # Without a connection, a saved file is found by whatever name it has.
    server.files["me/k"] = {"model.keras": b"x"}
    hub.local("hf://me/k")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.local("hf://me/k").name == "model.keras"


def test_a_keras_file_on_the_hub_is_a_model(pets, server, tmp_path):
    folder, model = pets
    server.files["me/k"] = {"model.keras": folder.with_suffix(".keras").read_bytes()}
    loaded = ke.load_model("hf://me/k")
    assert same_weights(loaded, model) and loaded.labels == ["cat", "dog", "red|fox"]
    server.put("me/pets", folder)
    with pytest.raises(ValueError, match="keras-effnet convert hf://me/pets"):
        ke.load_model("hf://me/pets")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://me/none", "no such repository, or it is private. To log in: hf auth login"),
        ("hf://closed/one", "access on request"),
        ("hf://me/pets@v9", "no revision 'v9'"),
        ("hf://me/pets/x.h5", r"no x\.h5. It has b\.keras: name one, as in hf://me/pets/"),
        ("hf://me/pets", r"no model\.safetensors, .*It has b\.keras: name one, as in hf://me/pets/b\.keras"),
    ],
)
def test_what_cannot_be_downloaded_is_one_error(address, told, server):
    server.files["me/pets"] = {"b.keras": b"x"}
    with pytest.raises(OSError, match=told):
        hub.local(address)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://me", "hf://me/../x", "hf://me/x/../../y", "hf://me/x@", "hf://a b/c"]
)
def test_what_is_no_address_is_told(address, server):
    with pytest.raises(ValueError, match=re.escape("hf://owner/name[@revision][/file]")):
        hub.local(address)
    assert not server.requests


def test_no_connection_is_told(home):
    with pytest.raises(OSError, match="no connection to the hub, and no copy is saved"):
        hub.local("hf://me/pets")


def test_a_damaged_download_is_removed(pets, server, home):
    server.put("me/pets", pets[0])
    server.damaged = {"model.safetensors"}
    with pytest.raises(OSError, match=r"is published\. It is removed"):
        hub.local("hf://me/pets")
    server.damaged = set()
    path = hub.local("hf://me/pets")
    assert path.read_bytes() == (pets[0] / "model.safetensors").read_bytes()


def test_a_folder_as_mirror(pets, tmp_path, monkeypatch, server):
    mirror = tmp_path / "mirror"
    place = mirror / "me/pets/resolve/main"
    place.parent.mkdir(parents=True)
    place.symlink_to(pets[0])
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(mirror))
    assert same_weights(ke.create_model("b0", weights="hf://me/pets", classes=3), pets[1])
    with pytest.raises(FileNotFoundError, match=r"MIRROR=.* has no model\.safetensors, .* of it"):
        hub.local("hf://me/none")
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="is not a folder"):
        hub.local("hf://me/none")
    assert not server.requests


def test_a_server_as_mirror_may_lack_a_config_but_not_fail(pets, monkeypatch, server):
    server.files["me/bare"] = {"model.safetensors": (pets[0] / "model.safetensors").read_bytes()}
    server.put("me/pets", pets[0])
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", server.url)
    server.broken, server.status = {"config.json"}, 401
    with pytest.raises(OSError, match=r"Could not download config\.json of hf://me/pets.*401"):
        hub.local("hf://me/pets")
    server.status = 403  # how a store of objects says that it has no such file
    path = hub.local("hf://me/bare")
    assert path.name == "model.safetensors" and not path.with_name("config.json").exists()
    server.broken, server.status = {"model.safetensors"}, 401
    server.files["me/other"] = {"model.keras": b"x"}
    with pytest.raises(OSError, match=r"Could not download hf://me/other: .*401"):  # not another file in its place
        hub.local("hf://me/other")
    # Without an answer, what is saved is used, also beside files that were never there.
    monkeypatch.setenv("KERAS_EFFNET_MIRROR", "http://127.0.0.1:9")
    assert hub.local("hf://me/bare") == path and hub.local("hf://me/bare", whole=True) == path
    # A saved file that is damaged is not one that is missing.
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"Could not download hf://me/bare: .*model\.safetensors"):
        hub.local("hf://me/bare")


def test_a_whole_model_is_taken_where_one_is_converted(pets, server, tmp_path):
    server.put("me/both", pets[0])
    server.files["me/both"]["model.keras"] = pets[0].with_suffix(".keras").read_bytes()
    assert hub.local("hf://me/both").name == "model.safetensors"
    assert ke.load_model("hf://me/both").labels == ["cat", "dog", "red|fox"]
    server.requests.clear()
    assert ke.weights.convert_file("hf://me/both", tmp_path / "new.keras") == "efficientnet-b0"
    assert not any("safetensors" in request for request in server.requests)


def test_a_damaged_config_is_told(pets, tmp_path):
    for content in (
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"architecture": "tf_efficientnet_b0", "pretrained_cfg": 5}',
    ):
        (tmp_path / "config.json").write_bytes(content)
        (tmp_path / "model.safetensors").write_bytes((pets[0] / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"config\.json"):
            hub.local(tmp_path)
    cfg = {"mean": [0.5] * 3, "std": [0, 1, 1]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_b0", "pretrained_cfg": cfg}))
    with pytest.raises(ValueError, match="positive deviation"):
        hub.local(tmp_path)
    for changed in ("pad_type", "global_pool"):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": "tf_efficientnet_b0", "model_args": {changed: "max"}})
        )
        with pytest.raises(ValueError, match=f"model_args change {changed}"):
            hub.local(tmp_path)
    for wrong in (
        '"input_size": [3]',
        '"mean": [[1], [1, 2]]',
        '"mean": [1e400]',
        f'"mean": [1{"0" * 400}]',
        '"input_size": [3, "a", "a"]',
        '"crop_pct": -1',
    ):
        text = '{"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"std": [1], ' + wrong + "}}"
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json|positive deviation"):
            hub.local(tmp_path)


def test_a_preset_of_keras_hub_is_downloaded_whole(server, tmp_path):
    recorded = golden("presets/classifier.json")
    (tmp_path / "pets").mkdir()
    for name, document in recorded["documents"].items():
        (tmp_path / "pets" / name).write_text(json.dumps(document))
    for name, groups in recorded["weights"].items():
        with h5py.File(tmp_path / "pets" / name, "w") as file:
            for group, shape in groups:
                if shape is not None:
                    file[group] = np.ones(shape, "float32")
    server.put("me/pets", tmp_path / "pets")
    found = ke.weights.identify("hf://me/pets")
    assert (found.kind, found.classes, found.loaded) == ("a preset of keras-hub 0.32.0", 4, 79)
    assert found.head[-1] == "Dense(4)" and found.preprocessing is not None
    assert ke.weights.identify("hf://me/pets/task.weights.h5") == found
    server.put("me/lost", tmp_path / "pets")
    del server.files["me/lost"]["task.weights.h5"]
    with pytest.raises(OSError, match=r"task\.weights\.h5"):
        ke.weights.identify("hf://me/lost")


def test_without_huggingface_hub_the_error_names_the_command():
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; from keras_effnet.weights import hub; hub.local('hf://a/b')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'keras_effnet[hub]'" in done.stderr and "ImportError" in done.stderr

"""Kept files: intact or made again, the user's own, listed, and removed unless a process uses them."""

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import BACKEND, invoked, tiny

import keras_effnet as ke
from keras_effnet import cache
from keras_effnet.inference import export
from keras_effnet.weights import downloads, registry

MINUTE = 60
DAY = 24 * 60 * MINUTE


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cache.LIMIT, raising=False)
    return tmp_path / "home"


def named(name: str) -> str:
    """Returns a name as entries have it: a hash."""
    return hashlib.md5(name.encode()).hexdigest()


@pytest.fixture
def download(home) -> Path:
    """Returns the path of a published file, which exists."""
    file = next(file for record in registry.of_model("efficientnet-b0") for file in record.files if file.url)
    path = downloads.place(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(5000))
    return path


def kept(name: str, age: float, size: int = 1000, kind: str = "predictor"):
    """Returns the path of an entry of a size, last used some seconds ago."""
    path = cache.use(kind, named(name), "efficientnet-b0").path
    (path / "file").write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_json_file_that_was_changed_is_not_read(home):
    path = cache.folder("plans") / "x.json"
    value = {"labels": ["cat", "coffee"], "size": [48, 40, 3], "seconds": 1e-3}
    cache.write_json(path, value)
    assert cache.read_json(path) == value
    content = path.read_bytes()
    unnoticed = []
    for place in range(len(content)):
        for new in (0, ord("7"), content[place] ^ 1):
            path.write_bytes(content[:place] + bytes([new]) + content[place + 1 :])
            found = cache.read_json(path)
            if found is not None and found != value:
                unnoticed.append((place, new))
    assert not unnoticed
    path.write_text("[1, 2]")
    assert cache.read_json(path) is None


def test_others_cannot_write_to_the_cache(home):
    before = os.umask(0)
    try:
        home.mkdir(mode=0o777)
        made = cache.folder("predictor", "x")
        assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700  # others can write to `home`
        assert stat.S_IMODE(made.stat().st_mode) == 0o755
        made.chmod(0o777)
        cache.folder("predictor", "x")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_others_is_not_used(home):
    mine = cache.folder("plans") / "x.json"
    cache.write_json(mine, {})
    made = cache.folder("features")
    others = 54321
    os.chown(mine, others, others)
    os.chown(made, others, others)
    assert cache.read_json(mine) is None
    with pytest.raises(OSError, match=f"of user {others}. Set KERAS_EFFNET_HOME to another folder"):
        cache.folder("features")
    # The work is done all the same, in a folder of this process.
    with pytest.warns(UserWarning, match="for this process alone. Expected a cache to which no other user can write"):
        hold = cache.use("features", named("x"), "")
    assert hold.path.is_dir() and home not in hold.path.parents and not list(made.iterdir())
    # The owner of KERAS_EFFNET_HOME is trusted: a container's root uses the cache of its host's user.
    os.chown(home, others, others)
    assert cache.read_json(mine) == {} and cache.use("features", named("x"), "").path.parent == made


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the same on all backends")
def test_a_cache_that_cannot_be_written_stops_nothing(home, tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    home.parent.joinpath("file").write_text("no folder")
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "file" / "home"))
    with pytest.warns(UserWarning, match="Exports and features are made for this process alone"):
        predictor = ke.Predictor(model, "onnxruntime")
    assert predictor(np.zeros((1, 16, 16, 3))).shape == (1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # its export is kept for the process, and intact
        ke.Predictor(model, "onnxruntime")


HOLDS = """
import os, sys, time
from keras_effnet import cache
hold = cache.use("predictor", sys.argv[1], "efficientnet-b0")
print("ready", flush=True)
time.sleep(600)
"""


def test_entries_in_use_stay_until_their_process_is_killed(home):
    used, unused = kept("used", 90 * DAY), kept("unused", 90 * DAY)
    with subprocess.Popen([sys.executable, "-c", HOLDS, used.name], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            _, stayed = cache.remove(cache.entries())
            assert [entry.path for entry in stayed] == [used] and (used / "file").is_file() and not unused.exists()
        finally:
            process.send_signal(signal.SIGKILL)
    removed, stayed = cache.remove(cache.entries())
    assert (len(removed), stayed) == (1, []) and not used.exists()
    assert not list((home / "predictor").iterdir())


def test_the_cache_has_a_limit(home, download, monkeypatch):
    ages = {name: kept(name, age * MINUTE, 1000) for age, name in enumerate("abcdef")}
    size = max(entry.bytes for entry in cache.entries())
    hold = cache.Hold(ages["f"])
    os.utime(ages["f"], (1, 1))
    theirs = [home / "features" / "mine", home / "photos"]
    for path in theirs:
        path.mkdir(parents=True)
        os.utime(path, (1, 1))
    monkeypatch.setenv(cache.LIMIT, str(3 * size))
    cache.trim()
    left = {name for name, path in ages.items() if path.exists()}
    assert left == {"a", "b", "c", "f"} and download.exists() and all(path.exists() for path in theirs)
    # What is too large alone does not drive out the others.
    large = kept("large", 0, 4 * size)
    cache.trim()
    assert not large.exists() and all(ages[name].exists() for name in left)
    del hold
    old, new = kept("old", 31 * DAY, kind="features"), kept("new", 29 * DAY, kind="features")
    monkeypatch.setenv(cache.LIMIT, "none")
    cache.trim()
    assert new.exists() and not old.exists() and ages["f"].exists()
    monkeypatch.setenv(cache.LIMIT, "2 apples")
    told = r"Expected a size such as 2GB. Received: '2 apples', in KERAS_EFFNET_CACHE_LIMIT, or none"
    with pytest.raises(ValueError, match=told):
        cache.use("predictor", named("g"), "")


def removed(*arguments) -> str:
    return invoked("cache", "clear", *arguments).stdout


def test_the_command_lists_and_clears(home, download):
    young, old = kept("young", 10 * DAY), kept("old", 40 * DAY)
    (home / "photo.jpg").write_text("somebody's")
    rows = json.loads(invoked("cache", "--json").stdout)
    assert rows["folder"] == str(home)
    assert {row["path"] for row in rows["entries"]} == {str(young), str(old), str(download)}
    found = invoked("cache").stdout
    assert re.search(r"exports +efficientnet-b0 +1\.\d kB +20\d\d-", found) and "limit 20.0 GB" in found
    assert removed("--older", "30d").startswith("Removed 1 of 1: 1.")
    assert young.exists() and not old.exists()
    assert removed("b1").startswith("Removed 0 of 0")
    assert removed("--over", "1MB").startswith("Removed 0 of 0")
    assert removed("b0").startswith("Removed 1 of 1") and not young.exists()
    assert removed().startswith("Removed 0 of 0") and download.exists()
    assert removed("b1", "--downloads").startswith("Removed 0 of 0")
    assert removed("b0", "--downloads").startswith("Removed 1 of 1") and not download.exists()
    assert (home / "photo.jpg").exists()
    for arguments, told in {
        ("--older", "soon"): "error: Expected a length of time such as 30d, 12h or 5m. Received: 'soon'",
        ("--over", "2 apples"): "error: Expected a size such as 2GB. Received: '2 apples'",
    }.items():
        done = invoked("cache", "clear", *arguments)
        assert done.returncode == 2 and done.stderr.strip() == told


def test_files_of_a_library_are_checked(home):
    """JAX' compiled programs: it writes and reads them itself."""
    folder = cache.folder("jax")

    def write(name: str, age: float = 60) -> None:
        (folder / name).write_bytes(os.urandom(1000))
        os.utime(folder / name, (time.time() - age,) * 2)

    def left() -> set[str]:
        return {path.name for path in folder.glob("*-cache")}

    for name in ("one-cache", "two-cache", "three-cache"):
        write(name)
    cache.record_sums(folder, "*-cache")
    content = (folder / "one-cache").read_bytes()
    (folder / "one-cache").write_bytes(content[:500] + bytes(64) + content[564:])
    (folder / "two-cache").unlink()
    with pytest.warns(UserWarning, match="A kept file is damaged and is made again: .*one-cache"):
        cache.remove_damaged(folder, "*-cache")
    assert left() == {"three-cache"}
    # They are compiled again, to other bytes. What may still be written has no sum yet.
    write("one-cache")
    write("two-cache")
    write("new-cache", age=0)
    cache.record_sums(folder, "*-cache")
    write("new-cache")
    cache.remove_damaged(folder, "*-cache")
    assert left() == {"one-cache", "two-cache", "three-cache", "new-cache"}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the same on all backends")
def test_a_predictor_protects_its_export(home):
    model = tiny((32, 32, 3), 2)
    predictor = ke.Predictor(model, "onnxruntime")
    (entry,) = cache.entries()
    assert entry.model == model.name and entry.path == predictor.path.parent
    assert cache.remove([entry]) == ([], [entry])
    image = np.zeros((3, 32, 32, 3), "uint8")
    assert predictor(image).shape == (3, 2)
    del predictor
    assert cache.remove([entry]) == ([entry], []) and not entry.path.exists()


EXPORTS = """
import keras, sys, keras_effnet as ke
from keras_effnet.inference import export
made = export.export
def told(*args, **kwargs):
    print("exported", flush=True)
    return made(*args, **kwargs)
export.export = told
ke.Predictor(sys.argv[1], "onnxruntime")
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_two_processes_make_an_export_once_and_leave_and_send_nothing(home, tmp_path, monkeypatch):
    """ONNX Runtime leaves a file of its telemetry unless it is told to send none."""
    layers = keras.layers
    head = [layers.Conv2D(2, 3), layers.GlobalAveragePooling2D(), layers.Dense(2)]
    keras.Sequential([keras.Input((16, 16, 3)), *head]).save(tmp_path / "x.keras")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    unset = ("CI", "ORT_DISABLE_TELEMETRY", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TMPDIR": str(temporary), "TF_CPP_MIN_LOG_LEVEL": "3"}
    made, here = export.export, []
    monkeypatch.setattr(export, "export", lambda *args, **kwargs: here.append(1) or made(*args, **kwargs))
    line = [sys.executable, "-W", "error::UserWarning", "-c", EXPORTS, str(tmp_path / "x.keras")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout.readline() == "exported\n"  # it has begun: this process finds no export, and waits for it
        predictor = ke.Predictor(tmp_path / "x.keras", "onnxruntime")
        assert not other.stdout.read()
    assert other.returncode == 0 and not here and not list(temporary.iterdir())
    assert predictor(np.zeros((1, 16, 16, 3))).shape == (1, 2)

"""Kept files: intact or made again, the user's own, listed, and removed unless a process uses them."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import BACKEND, invoked

import keras_effnet as ke
from keras_effnet import cache

MINUTE = 60
DAY = 24 * 60 * MINUTE


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cache.LIMIT, raising=False)
    return tmp_path / "home"


def kept(name: str, age: float, size: int = 1000, kind: str = "predictor"):
    """Returns the path of an entry of a size, last used some seconds ago."""
    path = cache.use(kind, name, "efficientnet-b0").path
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
def test_what_belongs_to_others_is_not_used(home, monkeypatch):
    mine = cache.folder("plans") / "x.json"
    cache.write_json(mine, {})
    made = cache.folder("features")
    others = 54321
    os.chown(mine, others, others)
    os.chown(made, others, others)
    assert cache.read_json(mine) is None
    with pytest.raises(OSError, match=f"belongs to user {others}. Set KERAS_EFFNET_HOME to another folder"):
        cache.use("features", "x", "")
    assert not list(made.iterdir())


HOLDS = """
import os, sys, time
from keras_effnet import cache
hold = cache.use("predictor", "used", "efficientnet-b0")
print("ready", flush=True)
time.sleep(600)
"""


def test_entries_in_use_stay_until_their_process_is_killed(home):
    used, unused = kept("used", 90 * DAY), kept("unused", 90 * DAY)
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            stayed = cache.remove(cache.entries())
            assert [entry.path for entry in stayed] == [used] and (used / "file").is_file() and not unused.exists()
        finally:
            process.send_signal(signal.SIGKILL)
    assert cache.remove(cache.entries()) == [] and not used.exists()
    assert not list((home / "predictor").iterdir())


def test_the_cache_has_a_limit(home, monkeypatch):
    ages = {name: kept(name, age * MINUTE, 1000) for age, name in enumerate("abcdef")}
    (home / "weights").mkdir()
    download = home / "weights" / "x.h5"
    download.write_bytes(bytes(5000))
    size = max(entry.bytes for entry in cache.entries() if entry.kind == "predictor")
    hold = cache.Hold(ages["f"])
    os.utime(ages["f"], (1, 1))
    monkeypatch.setenv(cache.LIMIT, str(3 * size))
    cache.trim()
    assert {name for name, path in ages.items() if path.exists()} == {"a", "b", "c", "f"} and download.exists()
    del hold
    old = kept("old", 31 * DAY, kind="features")
    new = kept("new", 29 * DAY, kind="features")
    monkeypatch.setenv(cache.LIMIT, "none")
    cache.trim()
    assert new.exists() and not old.exists() and ages["f"].exists()
    monkeypatch.setenv(cache.LIMIT, "2 apples")
    with pytest.raises(
        ValueError, match=r"size such as 2GB. Received: '2 apples', in KERAS_EFFNET_CACHE_LIMIT, or none"
    ):
        cache.use("predictor", "g", "")


def removed(*arguments) -> str:
    return invoked("cache", "clear", *arguments).stdout


def test_the_command_lists_and_clears(home):
    young, old = kept("young", 10 * DAY), kept("old", 40 * DAY)
    (home / "weights").mkdir()
    download = home / "weights" / "x.h5"
    download.write_bytes(bytes(5000))
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
    assert removed("--downloads").startswith("Removed 1 of 1") and not download.exists()
    for arguments, told in {
        ("--older", "soon"): "error: Expected a length of time such as 30d, 12h or 5m. Received: 'soon'",
        ("--over", "2 apples"): "error: Expected a size such as 2GB. Received: '2 apples'",
    }.items():
        done = invoked("cache", "clear", *arguments)
        assert done.returncode == 2 and done.stderr.strip() == told


def test_files_of_a_library_are_checked(home):
    """JAX' compiled programs: it writes and reads them itself."""
    folder = cache.folder("jax")
    for name in ("one-cache", "two-cache"):
        (folder / name).write_bytes(os.urandom(1000))
    cache.remove_damaged(folder, "*-cache")
    cache.record_sums(folder, "*-cache")
    content = (folder / "one-cache").read_bytes()
    (folder / "one-cache").write_bytes(content[:500] + bytes(64) + content[564:])
    (folder / "three-cache").write_bytes(b"new")
    with pytest.warns(UserWarning, match="A kept file is damaged and is made again: .*one-cache"):
        cache.remove_damaged(folder, "*-cache")
    assert sorted(path.name for path in folder.glob("*-cache")) == ["three-cache", "two-cache"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the same on all backends")
@pytest.mark.usefixtures("shallow")
def test_a_predictor_protects_its_export(home):
    model = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 3), classes=2)
    predictor = ke.Predictor(model, "onnxruntime")
    (entry,) = cache.entries()
    assert entry.model == model.name and entry.path == predictor.path.parent
    assert cache.remove([entry]) == [entry]
    image = np.zeros((3, 32, 32, 3), "uint8")
    assert predictor(image).shape == (3, 2)
    del predictor
    assert cache.remove([entry]) == [] and not entry.path.exists()


WORK = """
import keras, keras_effnet as ke
layers = keras.layers
head = [layers.Conv2D(2, 3), layers.GlobalAveragePooling2D(), layers.Dense(2)]
ke.Predictor(keras.Sequential([keras.Input((16, 16, 3)), *head]), "onnxruntime")
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough")
def test_nothing_is_left_and_nothing_is_sent(home, tmp_path):
    """ONNX Runtime leaves a file of its telemetry unless it is told to send none."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"TMPDIR": str(temporary), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", WORK], env=environment, check=True)
    assert not list(temporary.iterdir())

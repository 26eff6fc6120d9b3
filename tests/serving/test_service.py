"""`keras-effnet serve` answers what `Predictor` gives, and keeps its limits: a real process, real sockets."""

import base64
import errno
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers import BACKEND, ROOT, invoked
from PIL import Image
from starlette.datastructures import Headers

from keras_effnet.inference.classifier import Classifier
from keras_effnet.serving.limits import Limits
from keras_effnet.serving.own_page import is_own
from keras_effnet.serving.work_queue import _Together

pytestmark = [
    pytest.mark.skipif(BACKEND != "tensorflow", reason="one run is enough"),
    # Converters of the first export.
    pytest.mark.filterwarnings("ignore"),
]

CAT, COFFEE = ((ROOT / "docs" / name).read_bytes() for name in ("cat.png", "coffee.png"))
RUNTIME = "onnxruntime"  # bits are compared, and with another number of threads another runtime may be the fastest
SMALL = ("--threads", 1, "--timeout", 2, "--queue", 4, "--max-images", 4, "--max-bytes", 2_000_000)
SMALL += ("--max-pixels", 20_000_000)


class Server:
    """`keras-effnet serve` in its own process."""

    def __init__(self, log: Path, *options, port: int = 0, model="efficientnet-lite0"):
        line = [str(Path(sys.executable).parent / "keras-effnet"), "serve", str(model), "--port", str(port)]
        line += ["--runtime", RUNTIME]
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [*line, *map(str, options)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        ready = self.process.stdout.readline()
        self.process.stdout.close()
        found = re.search(r"at (http://127\.0\.0\.1:\d+) ", ready)
        assert found, ready + log.read_text()
        self.port = urlsplit(found[1]).port

    def ask(self, path: str, body: bytes | None = None, kind: str = "image/png", method: str = "", **more) -> tuple:
        """Returns the status, the headers, and the body, as JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = more | ({"Content-Type": kind} if body is not None else {})
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        found = json.loads(data) if answer.headers["Content-Type"] == "application/json" else data.decode()
        return answer.status, answer.headers, found

    def sent(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def count(self, line: str) -> float:
        found = re.search(rf"^{re.escape(line)} (\S+)$", self.ask("/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def serving(log: Path, *options, **more):
    server = Server(log, *options, **more)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("serve") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One with small limits."""
    with serving(tmp_path_factory.mktemp("serve") / "log", *SMALL) as found:
        yield found


@pytest.fixture(scope="module")
def expected():
    """The function from a photo to what `Predictor` gives for it."""
    classifier = Classifier(runtime=RUNTIME)
    load = classifier.predictor.image_loader()
    return lambda data, top=5: {"predictions": classifier.ranked(classifier.predictor(load(data))[0], top)}


def in_threads(count: int, work) -> None:
    """Calls a function with the numbers from 0, each in a thread of its own, and waits for all."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


def form(*parts: bytes, name: str = "image", filename: str = "x.png") -> tuple[bytes, str]:
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'.encode()
    return b"".join(head + part + b"\r\n" for part in parts) + b"--B--\r\n", "multipart/form-data; boundary=B"


def as_json(*images: bytes) -> tuple[bytes, str]:
    return json.dumps({"images": [base64.b64encode(one).decode() for one in images]}).encode(), "application/json"


def head(size: int, more: str = "") -> bytes:
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length: {size}\r\n\r\n".encode()


def photo(width: int, height: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(COFFEE)).convert("RGB").resize((width, height)).save(file, kind)
    return file.getvalue()


def plain(width: int, height: int, kind: str = "PNG") -> bytes:
    """A few kilobytes that take long to decode."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def test_the_three_ways_give_the_bits_of_predictor(server, expected):
    photos = [CAT, COFFEE, photo(90, 70), photo(333, 500, "WEBP")]
    right = [expected(data) for data in photos]
    for data, one in zip(photos, right, strict=True):
        for body, kind in ((data, "image/png"), (data, "application/x-www-form-urlencoded"), form(data), as_json(data)):
            status, _, found = server.ask("/predict", body, kind)
            assert (status, found) == (200, {"model": "efficientnet-lite0 imagenet", "images": [one]})
    for body, kind in (form(*photos), as_json(*photos)):
        assert server.ask("/predict", body, kind)[2]["images"] == right
    assert right[0]["predictions"][0]["name"] == "tiger cat"
    assert server.ask("/predict?top=1000", CAT)[2]["images"] == [expected(CAT, 1000)]


def test_many_clients_at_once_get_their_own_answers(server, expected):
    photos = [photo(60 + number, 80) for number in range(6)]
    right, wrong = [expected(data, 1) for data in photos], []

    def client(number: int) -> None:
        for turn in range(8):
            place = (number + turn) % len(photos)
            status, _, found = server.ask("/predict?top=1", photos[place])
            if status != 200 or found["images"] != [right[place]]:
                wrong.append(found)

    in_threads(12, client)
    assert not wrong


def test_a_bad_image_hurts_no_other(server, expected):
    cut = photo(200, 200)[:-2000]
    status, _, found = server.ask("/predict", *form(CAT, b"no image", cut, COFFEE))
    assert status == 422 and found["images"][0] == expected(CAT) and found["images"][3] == expected(COFFEE)
    assert found["images"][1]["error"].startswith("Expected an image")
    assert found["images"][2]["error"].startswith("Expected an intact image")
    body = json.dumps({"images": ["***", base64.b64encode(CAT).decode()]}).encode()
    status, _, found = server.ask("/predict", body, "application/json")
    assert status == 422 and "Expected base64" in found["images"][0]["error"] and found["images"][1] == expected(CAT)
    header = bytearray(photo(60, 60, "PNG"))
    header[16:24] = (60_000).to_bytes(4) * 2  # width and height; the checksum of the header follows
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    begun = time.perf_counter()
    status, _, found = server.ask("/predict", bytes(header))
    assert status == 422 and "pixels" in found["images"][0]["error"] and time.perf_counter() - begun < 5
    assert server.ask("/predict", b"")[0] == 422


def test_images_with_too_many_pixels_and_formats_without_a_bound_are_refused(small, expected):
    kinds = ("ICO", "JPEG2000", "TIFF")
    for data, told in (
        (plain(5000, 4001), "Expected an image of at most 20,000,000 pixels"),
        *((plain(60, 60, kind), f"bytes of {kind}, which the service does not read") for kind in kinds),
        (b"II*\0", "bytes of TIFF"),
        (b"\xff\x4f\xff\x51", "bytes of JPEG2000"),
    ):
        status, _, found = small.ask("/predict", *form(data, CAT))
        assert status == 422 and told in found["images"][0]["error"] and found["images"][1] == expected(CAT), found
    assert small.ask("/predict", plain(4000, 4000))[0] == 200
    assert all(kind in json.dumps(small.ask("/openapi.json")[2]) for kind in kinds)


def test_what_a_request_says_wrongly_is_told(server):
    for body, kind, status, told in (
        (*form(CAT, name="photo"), 400, "fields called image. Received: 'photo'"),
        (form(CAT)[0][:-8], form(CAT)[1], 400, "one that ends before"),
        (b"x" * 99, form(CAT)[1], 400, "Expected multipart/form-data"),
        (CAT, "multipart/form-data", 400, "boundary"),
        (form(CAT)[0].replace(b"--B\r\n", b"--Bx\r\n"), form(CAT)[1], 400, "Expected multipart/form-data"),
        (b"--B--\r\n", form(CAT)[1], 400, "Expected multipart/form-data"),
        (*form(CAT, filename="x" * 3000), 400, "bytes of headers"),
        (CAT, "x" * 2000, 400, "Content-Type of at most"),
        (*form(*[b"x"] * 33), 413, "at most 32 images"),
        (*as_json(*[b"x"] * 33), 413, "at most 32 images"),
        (b"{", "application/json", 400, "Expected JSON"),
        (b"[" * 40, "application/json", 400, "Expected JSON"),
        (b'{"images": []}', "application/json", 400, "at least one"),
        (b'{"images": [1]}', "application/json", 400, "at least one"),
        (b'{"images": ' + b"[" * 100_000, "application/json", 413, "at most 32 images"),
    ):
        found = server.ask("/predict", body, kind)
        assert found[0] == status and told in found[2]["error"], found
    for top in ("0", "1001", "-1", "x", "9" * 5000, "%F0%9F%90%88"):
        status, _, found = server.ask(f"/predict?top={top}", CAT)
        assert status == 400 and found["error"].startswith("Expected top of 1 to 1000") and len(found["error"]) < 100
    assert server.ask("/nothing")[0] == 404 and server.ask("/predict")[0] == 405


def test_ten_thousand_fields_cost_little(server):
    fields = b"".join(b'--B\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % n for n in range(10_000))
    before = server.count("process_cpu_seconds_total")
    for body in (fields + b"--B--\r\n", form(*[b""] * 10_000)[0]):
        assert server.ask("/predict", body, form()[1])[0] in (400, 413)
    assert server.count("process_cpu_seconds_total") - before < 0.3


def test_bodies_that_are_nearly_boundaries_cost_little(server):
    most = 1 << 22
    before = server.count("process_cpu_seconds_total")
    for near in (b"\r\n--Bx", b"\r\n--B-", b"\r\n--B\r", b"\r\n--B ", b"\r\n--", b"\r\n--" + b"B" * 9, b"\r", b" "):
        for start in (form(b"")[0][:-8], form(b"")[0][:-4] + b" ", b"--B\r\nA:", b"--B\r\n", b"\r\n"):
            body = start + near * ((most - len(start)) // len(near))
            assert server.ask("/predict", body, form()[1])[0] in (400, 413)
        assert server.ask("/predict", CAT, "multipart/form-data; boundary=" + near.strip().decode() * 5000)[0] == 400
    assert server.count("process_cpu_seconds_total") - before < 2  # of 160 MB


def test_other_web_pages_are_refused(server):
    """Those that name this server, and those whose name now has this machine's address."""
    own, page = f"127.0.0.1:{server.port}", {"Origin": "http://other.example"}
    for headers in ({}, {"Host": f"localhost:{server.port}"}, {"Host": "[::1]"}, {"Origin": f"http://{own}"}):
        assert server.ask("/healthz", **headers)[0] == 200 and server.ask("/predict", CAT, **headers)[0] == 200
    for headers in (page, {"Origin": "null"}, {"Host": "other.example"}, page | {"Host": "other.example"}):
        for path, body in (("/metadata", None), ("/predict", CAT), ("/healthz", None)):
            status, _, found = server.ask(path, body, **headers)
            assert status == 403 and "other" in found["error"]
    with server.sent(b"GET /healthz HTTP/1.0\r\n\r\n") as connection:  # as proxies ask, and no browser
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert is_own(Headers({"host": "own.example", "origin": "https://own.example"}), None)
    assert not is_own(Headers({"host": "own.example", "origin": "https://other.example"}), None)


def test_what_is_refused_before_its_body_is_sent_ends_the_connection(server):
    for start in (b"POST /nothing", b"PUT /predict", b"POST /predict?top=0", b"POST /healthz"):
        asked = start + b" HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        with server.sent(asked) as connection:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status in (400, 404, 405) and answer.headers["Connection"] == "close" and answer.read()
            assert connection.recv(1) == b""


def test_an_error_of_the_model_is_told(tmp_path):
    """An ONNX file that looks up how much more red than blue an image has, in a table that ends at 200."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shapes = ("x", [1, 32, 32, 3]), ("y", [1, 10])
    pixels, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "red-blue"], ["more"]),
        helper.make_node("Cast", ["more"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["y"]),
    ]
    tables = {"axes": np.array([1, 2]), "red-blue": np.float32([1, 0, -1]), "table": np.full((200, 10), 0.1, "float32")}
    constants = [numpy_helper.from_array(value, name) for name, value in tables.items()]
    graph = helper.make_graph(nodes, "table", [pixels], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "table.onnx")
    with serving(tmp_path / "log", model=tmp_path / "table.onnx") as server:
        assert server.ask("/predict", CAT)[0] == 200
        status, headers, found = server.ask("/predict", *form(plain(40, 40), CAT))
        assert status == 500 and headers["Connection"] == "close" and set(found) == {"error"}
        assert server.ask("/predict", CAT)[0] == 200
        assert server.count("keras_effnet_held_bytes") == server.count("keras_effnet_queue_images") == 0
        assert "500" in server.ask("/openapi.json")[2]["paths"]["/predict"]["post"]["responses"]
        assert re.search(r'"level": "error".*Gather', server.log.read_text())


def test_names_and_paths_of_clients_are_not_opened(server, tmp_path):
    """Who opens a pipe waits for its writer, and a writer finds who reads."""
    pipe = tmp_path / "photo.png"
    os.mkfifo(pipe)
    name = str(pipe)
    for body, kind in (
        (name.encode(), "image/png"),
        (f"file://{name}".encode(), "text/uri-list"),
        form(name.encode(), filename=name),
        form(b"", filename=f"../../../../../../../..{name}"),
        (json.dumps({"images": [name, f"file://{name}"]}).encode(), "application/json"),
    ):
        assert server.ask("/predict", body, kind)[0] == 422
    assert server.ask(f"/predict?path={name}&image={name}", b"x")[0] == 422
    for path in (name, f"/docs/{name}", f"/..%2f..%2f{name}", f"/predict/../{name}"):
        assert server.ask(path)[0] == 404
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


def test_it_listens_on_this_machine_only(server):
    listening = Path(f"/proc/{server.process.pid}/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    (row,) = [line.split() for line in listening.splitlines() if f":{server.port:04X} 0" in line and " 0A " in line]
    assert row[1] == f"0100007F:{server.port:04X}"


def test_a_body_that_is_too_large_is_refused(small):
    assert small.ask("/predict", bytes(2_000_001))[0] == 413
    with small.sent(head(1 << 30)) as connection:  # before it is sent
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with small.sent(head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")) as connection:
        with suppress(OSError):
            for _ in range(100):
                connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with small.sent(b"GET /healthz HTTP/1.1\r\n") as connection:
        with suppress(OSError):
            for _ in range(10_000):
                connection.sendall(b"X: " + b"y" * 60 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 431")


@pytest.mark.slow
def test_slow_senders_are_cut_while_others_are_answered(small, expected):
    slow = [small.sent(data) for data in (b"", b"GET /hea", head(len(CAT)) + CAT[:100], b"\r\n")]
    begun = time.monotonic()
    assert small.ask("/predict", CAT)[2]["images"] == [expected(CAT)]
    for number, connection in enumerate(slow):
        for letter in CAT[100:140] if number == 2 else b"":  # a byte at a time does not help
            with suppress(OSError):
                connection.sendall(bytes([letter]))
            time.sleep(0.1)
        with connection:
            answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408") and b"too slow" in answer
    assert time.monotonic() - begun < 9


@pytest.mark.slow
def test_slow_readers_are_cut(tmp_path):
    """The answer is larger than what the kernel holds."""
    body, kind = form(*[photo(40, 40)] * 100)
    with serving(tmp_path / "log", "--max-images", 100, "--timeout", 5) as server, socket.socket() as connection:
        before = server.count("process_open_fds")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        asked = head(len(body), f"Content-Type: {kind}\r\n").replace(b"/predict", b"/predict?top=1000")
        connection.sendall(asked + body)
        for _ in range(120):
            time.sleep(0.1)
            if "too slow" in server.log.read_text():
                break
        assert '"status": 200' in server.log.read_text() and "too slow" in server.log.read_text()
        assert server.count("process_open_fds") == before and "Traceback" not in server.log.read_text()


def test_a_request_before_the_answer_to_another_ends_the_connection(server, expected):
    """Neither is mixed with the other."""
    with server.sent(head(len(CAT)) + CAT + head(len(COFFEE)) + COFFEE) as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.headers["Connection"] == "close"
        assert json.loads(answer.read())["images"] == [expected(CAT)]
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_the_bytes_in_memory_are_limited(small):
    most = 2_000_000
    held = []
    for _ in range(8):  # each lacks its last bytes
        held.append(small.sent(head(most) + bytes(most - 10)))
    time.sleep(0.5)
    assert small.count("keras_effnet_held_bytes") == 8 * (most - 10)
    status, headers, _ = small.ask("/predict", CAT)
    assert status == 503 and headers["Retry-After"] == "1"
    for connection in held:
        connection.close()
    time.sleep(0.3)
    assert small.ask("/predict", CAT)[0] == 200


def test_a_full_queue_answers_503_at_once(small, expected):
    large, found = photo(1500, 1500), []
    body, kind = form(*[large] * 4)
    in_threads(12, lambda _: found.append(small.ask("/predict", body, kind)))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 503}
    for status, headers, answer in found:
        if status == 503:
            assert headers["Retry-After"] == "1" and "error" in answer
        else:
            assert answer["images"] == [expected(large)] * 4
    assert small.ask("/predict", CAT)[0] == 200


def test_who_leaves_costs_nothing_more(small):
    body, kind = form(*[photo(1500, 1500)] * 4)
    before = small.count('keras_effnet_images_total{result="dropped"}')
    connection = small.sent(head(len(body), f"Content-Type: {kind}\r\n") + body)
    time.sleep(0.02)
    connection.close()
    for _ in range(100):
        time.sleep(0.05)
        if small.count('keras_effnet_images_total{result="dropped"}') > before:
            break
    assert small.count('keras_effnet_images_total{result="dropped"}') > before
    assert small.count('keras_effnet_requests_total{route="/predict",status="499"}') > 0
    assert small.count("keras_effnet_held_bytes") == 0 and small.count("keras_effnet_queue_images") == 0


def test_what_nobody_waits_for_leaves_the_queue_at_once(small):
    """Its bytes are in memory no more, and others have its place, although nothing was taken from the queue since."""
    busy, rest = form(*[plain(4400, 4400)] * 2), form(*[CAT] * 3)
    found = []
    thread = threading.Thread(target=lambda: found.append(small.ask("/predict", *busy)[0]))
    thread.start()
    time.sleep(0.1)
    with small.sent(head(len(rest[0]), f"Content-Type: {rest[1]}\r\n") + rest[0]):
        time.sleep(0.05)
    time.sleep(0.05)
    assert small.count("keras_effnet_queue_images") <= 1
    assert small.ask("/predict", CAT)[0] == 200
    thread.join()
    assert found == [200]


def test_sigterm_answers_what_was_accepted(tmp_path, expected):
    with serving(tmp_path / "log") as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        idle.request("GET", "/healthz")
        assert json.loads(idle.getresponse().read()) == {"status": "ok"}
        with server.sent(head(len(CAT)) + CAT[:5000]) as connection:
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            status, headers, found = server.ask("/healthz")
            assert status == 503 and found == {"status": "draining"}
            status, headers, _ = server.ask("/predict", COFFEE)
            assert status == 503 and headers["Retry-After"]
            assert server.process.poll() is None
            connection.sendall(CAT[5000:])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert json.loads(answer.read())["images"] == [expected(CAT)]
        assert server.process.wait(20) == 0
        messages = [json.loads(line).get("message") for line in server.log.read_text().splitlines()]
        assert [each for each in messages if each] == ["ready", "draining", "ended"]


@pytest.mark.slow
def test_a_second_signal_and_kill_9_end_it_at_once_and_it_starts_again(tmp_path):
    with serving(tmp_path / "log") as server, server.sent(head(len(CAT)) + CAT[:5000]) as connection:
        time.sleep(0.3)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(5) == 128 + signal.SIGTERM
        assert connection.recv(100) == b""
        again = Server(tmp_path / "log", port=server.port)
        again.process.kill()
        again.process.wait()
        again = Server(tmp_path / "log", port=server.port)
        assert again.ask("/predict", CAT)[0] == 200
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(20) == 0


def test_the_document_describes_the_routes(server):
    document = server.ask("/openapi.json")[2]
    assert document["openapi"].startswith("3.1")
    for reference in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    status, headers, page = server.ask("/docs")
    assert status == 200 and "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    for path, methods in document["paths"].items():
        status, headers, _ = server.ask(path, method="DELETE")
        allowed = {each.strip().lower() for each in headers["Allow"].split(",")} - {"head"}
        assert status == 405 and allowed == set(methods)
        assert path in page
        for method, told in methods.items():
            status, _, found = server.ask(path, CAT if method == "post" else None)
            assert status == 200 and str(status) in told["responses"]
            (kind,) = told["responses"]["200"]["content"]
            assert isinstance(found, dict) is (kind == "application/json")
    answer = document["components"]["schemas"]["Answer"]
    assert set(server.ask("/predict", CAT)[2]) == set(answer["required"])


def test_the_document_is_valid_openapi(server):
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(server.ask("/openapi.json")[2])


def test_metadata_metrics_and_log(server):
    told = server.ask("/metadata")[2]
    assert told["limits"]["queue"] == Limits().queue and told["metadata"]["input_shape"] == [224, 224, 3]
    assert len(told["labels"]) == 1000
    before = server.count('keras_effnet_images_total{result="ok"}')
    server.ask("/predict", *form(CAT, CAT))
    assert server.count('keras_effnet_images_total{result="ok"}') == before + 2
    assert server.count('keras_effnet_requests_total{route="/predict",status="200"}') > 0
    assert server.count("keras_effnet_decode_seconds_count") >= server.count("keras_effnet_predict_seconds_count") > 0
    assert server.count('keras_effnet_request_seconds_count{route="/predict"}') > 0
    server.ask(f"/%0a%1b[31m{'x' * 5000}")
    for _ in range(50):  # a line is written after its answer
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        if lines[-1].get("status") == 404:
            break
        time.sleep(0.1)
    assert len(lines[-1]["path"]) == 200 and lines[-1]["status"] == 404 and "\x1b" not in server.log.read_text()
    row = next(line for line in reversed(lines) if line.get("images") == 2)
    assert row["method"] == "POST" and row["path"] == "/predict" and row["status"] == 200
    assert row["bytes"] > 2 * len(CAT) and row["milliseconds"] > 0


def test_wrong_options_are_told_before_the_work(server):
    for options, told in (
        (("--queue", 4), "Expected a queue of at least the 32 images"),
        (("--max-pixels", 0), "Expected pixels of at least 1"),
        (("--max-bytes", 1 << 40), "Expected bytes of at least 1024 and at most"),
        (("--timeout", "nan"), "Expected timeout as a finite number"),
        (("--port", server.port), "Expected a free port"),
        (("--host", "nowhere.invalid"), "Expected an address of this machine"),
    ):
        result = invoked("serve", "efficientnet-lite0", *options)
        assert result.returncode == 2 and told in result.stderr, result.stderr


def test_a_missing_package_is_told():
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'starlette' else real(name, *a)\n"
        "from keras_effnet.commands import main; main(['serve', 'b0'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    told = "error: Expected starlette. Received: not installed. Run: pip install 'keras_effnet[serve]'"
    assert result.stderr.strip() == told


def test_images_of_many_threads_run_together_and_each_gets_its_own():
    sizes = []

    def run(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        time.sleep(0.005)
        if images.max() >= 100:
            raise ValueError("too bright")
        return (images * 2).tolist()

    together, wrong = _Together(run, 4), []

    def work(number: int) -> None:
        chance = random.Random(number)
        for value in range(number, 100, 30):
            time.sleep(chance.random() / 100)  # an image may come between one that is ready and the lock
            if together(np.full(3, value), lambda: True) != [2 * value] * 3:
                wrong.append(value)

    in_threads(30, work)
    assert not wrong and max(sizes) == 4 and sum(sizes) == 100
    with pytest.raises(ValueError, match="too bright"):
        together(np.full(3, 100), lambda: False)

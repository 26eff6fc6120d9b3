"""Measures and attacks `keras-effnet serve` on loopback. Server and clients share two cores.

    python benchmarks/serve.py                          # all parts but the soak: minutes
    python benchmarks/serve.py --only throughput        # 64 clients, 5,000 requests, beside predict_files in turns
    python benchmarks/serve.py --only overload          # three times the requests that it can serve
    python benchmarks/serve.py --only hostile           # a tenth of the requests hostile
    python benchmarks/serve.py --only kill9             # kill -9 and restart under load
    python benchmarks/serve.py --only soak --minutes 20 # memory

The photos are cuts of the two photos in the package, in five sizes and three formats. Every answer with the status 200
is compared, to the last bit, with what `Predictor` gives for the photo. A part that is not as promised ends with status
1.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import uvloop
from soak import grown, tenths
from timing import memory, spread, told

LITE0 = "efficientnet-lite0"
SIZES = ((375, 500), (300, 451), (480, 640), (768, 1024), (1200, 1600))  # height, width
KINDS = ("jpg", "jpg", "jpg", "png", "webp")  # photos on the web are mostly JPEGs
TOP = 5
HOSTILE_SECONDS = 10  # the server's limit of time in the hostile part, for slow senders


# Photos and requests


def write_photos(folder: Path, count: int) -> list[Path]:
    """Writes cuts of the two bundled photos."""
    from PIL import Image

    from keras_effnet.images.folders import BUNDLED

    wholes = [Image.open(path).convert("RGB") for path in sorted(BUNDLED.glob("*.jpg"))]
    drawn, paths = random.Random(0), []
    for number in range(count):
        whole, (height, width) = wholes[number % len(wholes)], SIZES[number % len(SIZES)]
        kind = KINDS[number // len(SIZES) % len(KINDS)] if height < 600 else "jpg"
        share = drawn.uniform(0.6, 1)
        wide, high = (round(side * share) for side in whole.size)
        left, top = drawn.randint(0, whole.width - wide), drawn.randint(0, whole.height - high)
        cut = whole.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + wide, top + high))
        paths.append(folder / f"{number:04}.{kind}")
        cut.save(paths[-1], quality=90)  # of JPEG and WebP; PNG has none
    return paths


def request(body: bytes, kind: str = "image/jpeg", declared: int | None = None) -> bytes:
    size = len(body) if declared is None else declared
    head = (
        f"POST /predict?top={TOP} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + body


def form(parts: list[bytes], field: str = "image") -> bytes:
    """A form's body, whose file names are paths, with the boundary `B`."""
    head = f'--B\r\nContent-Disposition: form-data; name="{field}"; filename="/etc/passwd"\r\n\r\n'.encode()
    return b"".join(head + part + b"\r\n" for part in parts) + b"--B--\r\n"


def ways(photo: bytes) -> Iterator[bytes]:
    """The three ways to send a photo."""
    yield request(photo)
    yield request(form([photo]), "multipart/form-data; boundary=B")
    yield request(json.dumps({"images": [base64.b64encode(photo).decode()]}).encode(), "application/json")


# A light client


class ClosedError(Exception):
    """The connection ended before the answer."""


class Client(asyncio.Protocol):
    """A connection, kept alive: one request at a time."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self._data, self._answer = transport, bytearray(), None
        self.closed = False

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or self._answer is None or self._answer.done():
            return
        head = bytes(self._data[:end]).lower()
        size = int(re.findall(rb"content-length: (\d+)", head)[0])
        if len(self._data) >= end + 4 + size:
            body = bytes(self._data[end + 4 : end + 4 + size])
            del self._data[: end + 4 + size]
            if b"connection: close" in head:
                self.closed = True
            self._answer.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ClosedError())

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        if self.closed:
            raise ClosedError
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return await self._answer


async def connected(port: int) -> Client:
    return (await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port))[1]


class Asker:
    """A client that connects anew when its connection has ended."""

    def __init__(self, port: int):
        self._port, self._client = port, None

    async def __call__(self, data: bytes) -> tuple[int, bytes]:
        if self._client is None or self._client.closed:
            self._client = await connected(self._port)
        return await self._client.ask(data)


class Server:
    """`keras-effnet serve` in its own process."""

    def __init__(self, folder: str, *options: str, port: int = 0):
        line = [
            str(Path(sys.executable).parent / "keras-effnet"),
            "serve",
            LITE0,
            "--port",
            str(port),
            "--top",
            str(TOP),
        ]
        self.log = Path(folder) / f"log{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*line, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", ready)
        if not found:
            raise RuntimeError(f"Expected a service. Received: {ready!r} {self.log.read_text()}")
        self.port = int(found[1])

    @property
    def processor(self) -> float:
        """Seconds of the processor that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> float:
        return memory("VmRSS", self.process.pid)

    def stop(self) -> int:
        """Ends it as an operator does, and returns its status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(folder: str, *options: str) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        yield server
        status = server.stop()
        if status:
            raise RuntimeError(f"Expected status 0 after SIGTERM. Received: {status}, {server.log.read_text()[-2000:]}")
    finally:
        server.process.kill()
        server.process.wait()


class Photos:
    """Photos, and the answer that `Predictor` gives for each: the bits count.

    Args:
        folder: Path to write them to.
        count: Integer.
    """

    def __init__(self, folder: Path, count: int):
        from keras_effnet.inference.classifier import Classifier

        self.paths = write_photos(folder, count)
        classifier = Classifier(LITE0, top=TOP)
        self.predictor, self.name = classifier.predictor, classifier.name
        load = self.predictor.image_loader()
        self.data = [path.read_bytes() for path in self.paths]
        self.right = [classifier.ranked(self.predictor(load(data))[0]) for data in self.data]
        self.requests = [next(ways(data)) for data in self.data]

    def is_right(self, place: int, body: bytes) -> bool:
        return json.loads(body) == {"model": self.name, "images": [{"predictions": self.right[place]}]}


class Tally:
    """Counts answers, and keeps their times. Each body that came is checked once, after the clock has stopped."""

    def __init__(self, photos: Photos):
        self._photos = photos
        self.statuses: Counter[Any] = Counter()
        self.seconds: list[float] = []
        self._bodies: Counter[tuple[int, bytes]] = Counter()

    async def ask(self, ask: Callable[[bytes], Awaitable[tuple[int, bytes]]], place: int, data: bytes = b"") -> Any:
        begun = time.perf_counter()
        try:
            status, body = await ask(data or self._photos.requests[place])
        except (ClosedError, OSError) as error:
            self.statuses[type(error).__name__] += 1
            return None
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(time.perf_counter() - begun)
            self._bodies[place, body] += 1
        return status

    @property
    def wrong(self) -> int:
        return sum(count for (place, body), count in self._bodies.items() if not self._photos.is_right(place, body))

    def told(self) -> str:
        cuts = statistics.quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [0.0] * 99
        shown = {str(key): count for key, count in sorted(self.statuses.items(), key=str)}
        return f"p50 {cuts[49] * 1e3:.0f} ms, p99 {cuts[98] * 1e3:.0f} ms, statuses {shown}, wrong answers {self.wrong}"


async def load(port: int, tally: Tally, clients: int, places: Iterator[int]) -> None:
    """As many clients as are given ask in turn, each for the next photo as soon as it has its answer."""

    async def client() -> None:
        ask = Asker(port)
        for place in places:
            await tally.ask(ask, place)

    await asyncio.gather(*(client() for _ in range(clients)))


def run(what: Any) -> Any:
    return asyncio.run(what, loop_factory=uvloop.new_event_loop) if sys.version_info >= (3, 12) else uvloop.run(what)


def expect(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"Expected: {what}")


# Parts


def throughput(folder: str, photos: Photos, requests: int, clients: int, rounds: int) -> None:
    """Compares with `predict_files()` over the same photos, in turns, while the other one is idle."""
    each, count = requests // rounds, len(photos.paths)
    ours, theirs, tally = [], [], Tally(photos)
    used = {"predict_files": 0.0, "server": 0.0, "clients": 0.0}
    with serving(folder) as server:
        run(load(server.port, Tally(photos), clients, iter(range(min(count, each)))))  # warms up
        for turn in range(rounds):
            places = [(turn * each + number) % count for number in range(each)]
            files = [photos.paths[place] for place in places]
            begun, processor = time.perf_counter(), time.process_time()
            expect(all(row.error is None for row in photos.predictor.predict_files(files)), "photos without an error")
            between = time.perf_counter()
            used["predict_files"] += time.process_time() - processor
            processor, server_used = time.process_time(), server.processor
            run(load(server.port, tally, clients, iter(places)))
            theirs.append(each / (between - begun))
            ours.append(each / (time.perf_counter() - between))
            used["clients"] += time.process_time() - processor
            used["server"] += server.processor - server_used
        resident = server.memory
    share = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    print(f"throughput: {told(spread(ours), 1)} images/s, predict_files {told(spread(theirs), 1)}, share {told(share)}")
    each_used = ", ".join(f"{name} {1e3 * value / (rounds * each):.1f}" for name, value in used.items())
    print(f"  processor milliseconds per image, which busy machines change less: {each_used}")
    print(f"  {tally.told()}, memory {resident:.0f} MiB")
    expect(set(tally.statuses) == {200} and not tally.wrong, "every request answered rightly")
    expect(share["median"] >= 0.85, "at least 0.85 of predict_files")


def overload(folder: str, photos: Photos, clients: int, seconds: float) -> None:
    """Sends three times the requests that it can serve, whether or not earlier ones have been answered."""
    with serving(folder) as server:
        warm = Tally(photos)
        begun = time.perf_counter()
        run(load(server.port, warm, clients, (number % len(photos.paths) for number in range(500))))
        rate = 500 / (time.perf_counter() - begun)
        before, peak, tally = server.memory, [0.0], Tally(photos)
        refused: list[float] = []

        async def flood() -> None:
            free: list[Asker] = []
            asked: set[asyncio.Task] = set()

            async def one(place: int) -> None:
                ask = free.pop() if free else Asker(server.port)
                begun = time.perf_counter()
                if await tally.ask(ask, place) == 503:
                    refused.append(time.perf_counter() - begun)
                free.append(ask)

            start = time.perf_counter()
            for number in range(int(3 * rate * seconds)):
                await asyncio.sleep(max(0.0, start + number / (3 * rate) - time.perf_counter()))
                task = asyncio.create_task(one(number % len(photos.paths)))
                asked.add(task)
                task.add_done_callback(asked.discard)
                if number % 100 == 0:
                    peak[0] = max(peak[0], server.memory)
            await asyncio.gather(*asked)

        begun = time.perf_counter()
        run(flood())
        took = time.perf_counter() - begun
        good = tally.statuses[200] / took
    print(f"overload: {3 * rate:.0f} requests/s for {seconds:.0f} s; {good:.1f} answered per second of {rate:.1f}")
    print(f"  {tally.told()}, memory {before:.0f} to at most {peak[0]:.0f} MiB")
    if refused:
        print(f"  a 503 took {statistics.median(refused) * 1e3:.0f} ms, at most {max(refused) * 1e3:.0f}")
    expect(set(tally.statuses) <= {200, 503} and tally.statuses[503] > 0 and not tally.wrong, "only 200 and 503")
    expect(peak[0] < before + 600, "at most 600 MiB more memory")


def mutated(photos: Photos, count: int) -> list[bytes]:
    """Photos with damage: bytes flipped, cut, zeroed or repeated."""
    drawn, found = random.Random(1), []
    for number in range(count):
        data = bytearray(photos.data[number % len(photos.data)])
        for _ in range(drawn.randint(1, 4)):
            place = drawn.choice([drawn.randrange(len(data)), drawn.randrange(min(len(data), 200))])
            kind, length = drawn.randrange(4), drawn.randint(1, 64)
            if kind == 0:
                data[place] ^= drawn.randint(1, 255)
            elif kind == 1 and place > 100:
                del data[place:]
            elif kind == 2:
                data[place : place + length] = bytes(len(data[place : place + length]))
            else:
                data[place:place] = data[place : place + length] * drawn.randint(1, 20)
        found.append(bytes(data))
    return found


def huge_png(side: int = 60_000) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def hostile_acts(port: int, photos: Photos, count: int) -> Iterator[tuple[str, Callable[[], Awaitable]]]:
    """Yields hostile acts, with their names. Each returns a status, or None for a connection that ends."""
    damaged = mutated(photos, 300)

    def sent(data: bytes) -> Callable[[], Awaitable]:
        async def act() -> int | None:
            with contextlib.suppress(ClosedError, OSError):
                return (await (await connected(port)).ask(data))[0]

        return act

    async def slow() -> int | None:
        """Sends a byte at a time, until the service has enough."""
        client = await connected(port)
        data = request(photos.data[0])
        with contextlib.suppress(ClosedError, OSError):
            client._answer = asyncio.get_running_loop().create_future()
            for place in range(200):
                if client._answer.done():
                    break
                client.transport.write(data[place : place + 1])
                await asyncio.sleep(0.1)
            return (await asyncio.wait_for(client._answer, 10))[0]

    async def broken() -> None:
        client = await connected(port)
        client.transport.write(photos.requests[0][: len(photos.requests[0]) // 2])
        await asyncio.sleep(0.05)
        client.transport.abort()

    async def left() -> None:
        """Asks, and leaves before the answer."""
        client = await connected(port)
        client.transport.write(photos.requests[0])
        await asyncio.sleep(0.01)
        client.transport.abort()

    fields = b"".join(b'--B\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % n for n in range(10_000))
    empty = form([b""] * 10_000)
    others: list[tuple[str, Callable[[], Awaitable]]] = [
        ("60,000 x 60,000", sent(request(huge_png(), "image/png"))),
        ("1 GB declared", sent(request(photos.data[0], declared=1 << 30))),
        ("10,000 fields", sent(request(fields + b"--B--\r\n", "multipart/form-data; boundary=B"))),
        ("10,000 images", sent(request(empty, "multipart/form-data; boundary=B"))),
        ("10,000 empty lists", sent(request(b'{"images":[' + b"[]," * 10_000 + b"[]]}", "application/json"))),
        ("1 MB of headers", sent(b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 170_000)),
        ("no HTTP", sent(bytes(range(256)) * 50 + b"\r\n\r\n")),
        ("no image", sent(request(b"x" * 50_000))),
        ("slow sender", slow),
        ("broken connection", broken),
        ("client that left", left),
    ]
    for number in range(count):
        if number % 2 and number // 2 < len(damaged):
            yield "damaged photo", sent(request(damaged[number // 2]))
        else:
            yield others[number // 2 % len(others)]


ALLOWED = {
    "damaged photo": {200, 422},
    "60,000 x 60,000": {422},
    "1 GB declared": {413},
    "10,000 fields": {400, 413},
    "10,000 images": {413},
    "10,000 empty lists": {400, 413},
    "1 MB of headers": {431, None},
    "no HTTP": {400},
    "no image": {422},
    "slow sender": {408},
    "broken connection": {None},
    "client that left": {None},
}


def hostile(folder: str, photos: Photos, requests: int, clients: int) -> None:
    """A tenth of the requests are hostile. The others are sent in the three ways."""
    tally, acts = Tally(photos), Counter[tuple[str, Any]]()
    with serving(folder, "--timeout", str(HOSTILE_SECONDS)) as server:
        before = server.memory

        async def everything() -> float:
            good = iter(range(requests - requests // 10))
            peak, end = 0.0, asyncio.Event()

            async def client() -> None:
                ask = Asker(server.port)
                for number in good:
                    place = number % len(photos.data)
                    data = list(ways(photos.data[place]))[number % 3]
                    await tally.ask(ask, place, data)

            async def attacker() -> None:
                for name, act in acting:
                    acts[name, await act()] += 1

            async def watch() -> None:
                nonlocal peak
                while not end.is_set():
                    peak = max(peak, server.memory)
                    await asyncio.sleep(0.2)

            acting = hostile_acts(server.port, photos, requests // 10)
            watching = asyncio.create_task(watch())
            await asyncio.gather(*(client() for _ in range(clients)), *(attacker() for _ in range(1 + clients // 8)))
            end.set()
            await watching
            return peak

        peak = run(everything())
    print(f"hostile: {sum(acts.values())} of {requests} requests; memory {before:.0f} to at most {peak:.0f} MiB")
    print(f"  the others: {tally.told()}")
    for (name, status), count in sorted(acts.items(), key=str):
        print(f"  {name}: {status} x {count}")
    expect(set(tally.statuses) == {200} and not tally.wrong, "every good request answered rightly")
    strange = [(name, status) for name, status in acts if status not in ALLOWED[name]]
    expect(not strange, f"hostile requests refused. Received: {strange}")


def kill9(folder: str, photos: Photos, clients: int, kills: int) -> None:
    """Kills and restarts the service under load. Each client may lose the request that was in flight, no other."""
    tally = Tally(photos)
    server = Server(folder)
    port = server.port
    try:

        async def everything() -> None:
            nonlocal server
            ended = False

            async def client(number: int) -> None:
                ask = Asker(port)
                while not ended:
                    if await tally.ask(ask, number % len(photos.data)) is None:
                        await asyncio.sleep(0.2)
                    number += 1

            tasks = [asyncio.create_task(client(number)) for number in range(clients)]
            for _ in range(kills):
                await asyncio.sleep(2)
                server.process.kill()
                server.process.wait()
                server = await asyncio.to_thread(Server, folder, port=port)
            await asyncio.sleep(2)
            ended = True
            await asyncio.gather(*tasks)

        run(everything())
        status = server.stop()
    finally:
        server.process.kill()
        server.process.wait()
    lost = sum(count for key, count in tally.statuses.items() if key in ("ClosedError", "ConnectionResetError"))
    print(f"kill9: {kills} kills, {lost} requests lost in flight of at most {clients * kills}; {tally.told()}")
    expect(lost <= clients * kills and not tally.wrong, "only what was in flight is lost")
    expect(
        set(tally.statuses) <= {200, "ClosedError", "ConnectionResetError", "ConnectionRefusedError"}, "no other errors"
    )
    expect(status == 0, "status 0 after SIGTERM")


def soak(folder: str, photos: Photos, clients: int, minutes: float) -> None:
    """Serves for as long as is given. Growth is as in benchmarks/soak.py."""
    tally, rows = Tally(photos), []
    with serving(folder) as server:
        end = time.monotonic() + 60 * minutes

        def places() -> Iterator[int]:
            drawn, looked = random.Random(2), 0.0
            while time.monotonic() < end:
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    rows.append(server.memory)
                yield drawn.randrange(len(photos.data))

        run(load(server.port, tally, clients, places()))
        opened = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    print(f"soak: {minutes:g} minutes, {tally.told()}, {opened} open files")
    print(f"  memory {rows[len(rows) // 6]:.0f} to {rows[-1]:.0f} MiB, grown by {grown(rows):+.2%}")
    print("  medians of ten parts of the time, MiB:", *(f"{value:.1f}" for value in tenths(rows)))
    expect(set(tally.statuses) == {200} and not tally.wrong, "every request answered rightly")
    expect(abs(grown(rows)) < 0.02, "memory within 2 %")


PARTS = ("throughput", "overload", "hostile", "kill9", "soak")


@click.command()
@click.option("--only", type=click.Choice(PARTS), help="One part. Default: all but the soak.")
@click.option(
    "--requests", default=5000, show_default=True, type=click.IntRange(100), help="Of throughput and hostile."
)
@click.option("--clients", default=64, show_default=True, type=click.IntRange(1, 400))
@click.option("--photos", "count", default=200, show_default=True, type=click.IntRange(1), help="Different photos.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Turns of throughput.")
@click.option("--seconds", default=20.0, show_default=True, help="Of overload.")
@click.option("--kills", default=3, show_default=True, type=click.IntRange(1))
@click.option("--minutes", default=20.0, show_default=True, help="Of the soak.")
def main(only, requests, clients, count, rounds, seconds, kills, minutes) -> None:
    """Measure and attack the service."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # before threads start; the server inherits it
    with tempfile.TemporaryDirectory() as folder:
        photos = Photos(Path(folder), count)
        parts: dict[str, Callable[[], None]] = {
            "throughput": lambda: throughput(folder, photos, requests, clients, rounds),
            "overload": lambda: overload(folder, photos, clients, seconds),
            "hostile": lambda: hostile(folder, photos, requests, clients),
            "kill9": lambda: kill9(folder, photos, clients, kills),
            "soak": lambda: soak(folder, photos, clients, minutes),
        }
        for name in [only] if only else PARTS[:-1]:
            parts[name]()


if __name__ == "__main__":
    main()

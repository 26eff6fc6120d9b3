"""`keras-effnet demo`: a local page that classifies photos, for one user."""

import contextlib
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from keras_effnet.errors import one_line, unknown
from keras_effnet.serving import own_page, sockets
from keras_effnet.serving.demo_models import DemoModel

PORT = 7860  # if it is free
MOST_BYTES = 20_000_000  # of a photo's file

_PACKAGE = Path(__file__).parent.parent
_PAGES, _PHOTOGRAPHS = _PACKAGE / "pages", _PACKAGE / "images" / "photographs"

# The page runs its own scripts, asks this server alone, and is shown in no other page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class OwnPage:
    """ASGI middleware: answers this page only, and not other pages that are open in the browser.

    Args:
        app: The ASGI application.
        host: String, the address that the server listens at. It is a valid `Host`, as are localhost, this machine's
            name and all addresses that are numbers.
    """

    def __init__(self, app: Callable, host: str):
        self._app, self._names = app, {host.lower(), "localhost", socket.gethostname().lower()}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self._app if own_page.is_own(Headers(scope=scope), self._names) else _REFUSED
        await answer(scope, receive, send_with_headers)


_REFUSED = PlainTextResponse(
    "Expected a Host of the demo, and no Origin of another page. Received: another Host or Origin.\n", 403
)


def app(models: Sequence[DemoModel], host: str, started: Callable[[], None] = lambda: None) -> Starlette:
    """Returns the application that serves the page.

    Args:
        models: The models to choose from.
        host: See `OwnPage`.
        started: Function to call when the application starts. Defaults to one that does nothing.

    Returns:
        An ASGI application.
    """
    by_name = {model.name: model for model in models}
    examples = [{"name": path.stem, "url": f"photographs/{path.name}"} for path in sorted(_PHOTOGRAPHS.glob("*.jpg"))]

    async def page(_) -> FileResponse:
        return FileResponse(_PAGES / "demo.html")

    async def listed(_) -> JSONResponse:
        told = {"models": [model.facts() for model in models], "examples": examples, "most_bytes": MOST_BYTES}
        return JSONResponse(told)

    async def classify(request: Request) -> JSONResponse:
        try:
            name = request.query_params.get("model", models[0].name)
            if name not in by_name:
                raise unknown("model", name, by_name)
            also = _numbers(request.query_params.get("also", ""))
            photo = await _body(request)
            return JSONResponse(await run_in_threadpool(by_name[name].classify, photo, also))
        except (ClientDisconnect, OSError, ValueError) as error:  # nobody receives the answer to the first
            return JSONResponse({"error": one_line(error)}, 400)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        started()
        yield

    routes = [
        Route("/", page),
        Route("/models", listed),
        Route("/classify", classify, methods=["POST"]),
        Mount("/photographs", StaticFiles(directory=_PHOTOGRAPHS)),
        Mount("/", StaticFiles(directory=_PAGES)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(OwnPage, host=host)], lifespan=lifespan)


def _numbers(also: str) -> set[int]:
    numbers = [number for number in also.split(",") if number]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"Expected the numbers of classes, separated by commas. Received: also={also!r}")
    return {int(number) for number in numbers}


async def _body(request: Request) -> bytes:
    """Returns a photo's bytes. Too many are not read to their end."""
    parts, count = [], 0
    async for part in request.stream():
        count += len(part)
        if count > MOST_BYTES:
            raise ValueError(f"Expected a photo of at most {MOST_BYTES // 10**6} MB. Received: more")
        parts.append(part)
    return b"".join(parts)


def open_socket(host: str, port: int | None) -> socket.socket:
    """Binds the socket that the server listens at.

    Args:
        host: See `sockets.bound()`.
        port: See `sockets.bound()`. None is `PORT`, or any free port if that is taken.

    Returns:
        A socket.

    Raises:
        OSError: See `sockets.bound()`.
    """
    if port is not None:
        return sockets.bound(host, port)
    with contextlib.suppress(OSError):
        return sockets.bound(host, PORT)
    return sockets.bound(host, 0)


def serve(models: Sequence[DemoModel], listening: socket.socket, host: str, tell: Callable[[str], None], browser: bool):
    """Serves the page until the process is interrupted.

    Args:
        models: See `app()`.
        listening: See `open_socket()`.
        host: See `app()`.
        tell: Function to call with the page's address once the page can be opened.
        browser: Boolean, whether to open the page in the browser.
    """
    address = f"{sockets.address(listening)}/"

    def started() -> None:
        tell(address)
        if browser:  # in a thread: a browser in the terminal ends only when the user ends it
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    config = uvicorn.Config(
        app(models, host, started),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    listening.listen()  # uvicorn does so after `started()`, when the browser may have asked already
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its own end
        uvicorn.Server(config).run(sockets=[listening])

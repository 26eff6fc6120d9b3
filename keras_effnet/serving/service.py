"""The service's routes: an ASGI application around a classifier."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from keras_effnet.errors import one_line
from keras_effnet.inference.classifier import Classifier
from keras_effnet.serving import docs_page, logs, openapi, own_page
from keras_effnet.serving.bodies import BodyError, images_of
from keras_effnet.serving.limits import Limits
from keras_effnet.serving.metrics import Metrics
from keras_effnet.serving.work_queue import FullError, Ticket, WorkQueue

RETRY = {"Retry-After": "1"}
GONE = 499  # as nginx: the client left before the answer
TOP = 1000


class Service:
    """A classifier as an ASGI application.

    Args:
        classifier: `Classifier`.
        limits: `Limits`.
        name: String. The model, for the answers.
        names: Names of this machine that requests may ask for, see `own_page.is_own()`. Defaults to None: any.

    Attributes:
        draining: Boolean, whether new images are refused because the service ends.
        active: Integer. Requests for predictions that are received, wait, or are answered now.
        metrics: `Metrics`.
        routes: List of the pairs (method, path) that it answers.

    Raises:
        ValueError: If the model is not a classifier with one output.
    """

    def __init__(self, classifier: Classifier, limits: Limits, name: str, names: Collection[str] | None = None):
        self._classifier, self._limits, self._name, self._names = classifier, limits, name, names
        self.draining, self.active, self._held = False, 0, 0
        self.metrics = Metrics()
        self._queue = WorkQueue(classifier, limits.queue, limits.pixels, self.metrics)
        self.metrics.waiting.set_function(lambda: len(self._queue))
        self.metrics.held.set_function(lambda: self._held)
        self._openapi = openapi.document(limits, classifier.top, name)
        self._docs = docs_page.page(self._openapi)
        answers: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
            ("POST", "/predict"): self._predict,
            ("GET", "/healthz"): self._healthz,
            ("GET", "/metadata"): self._metadata,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi_json,
            ("GET", "/docs"): self._docs_page,
        }
        self.routes = list(answers)
        self._paths = {path for _, path in answers}
        routes = [Route(path, answer, methods=[method]) for (method, path), answer in answers.items()]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _refused, Exception: _failed})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, counts it, and writes a line to the log."""
        if scope["type"] != "http":
            return
        begun, status = time.perf_counter(), GONE
        told: dict[str, Any] = {"images": 0, "bytes": 0}
        scope["keras_effnet"] = told

        async def recording(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        answer = self._app if own_page.is_own(Headers(scope=scope), self._names) else _foreign
        try:
            await answer(scope, receive, recording)
        finally:
            seconds = time.perf_counter() - begun
            route = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.whole.labels(route).observe(seconds)
            line = {"method": one_line(scope["method"], 20), "path": one_line(scope["path"], 200), "status": status}
            logs.log(**line, milliseconds=round(1000 * seconds, 2), **told)

    def close(self, seconds: float) -> None:
        """Ends the threads once nothing waits.

        Args:
            seconds: Float. How long to wait for them.
        """
        self._queue.close(seconds)

    async def _predict(self, request: Request) -> Response:
        if self.draining:
            return _error(503, "The service is ending", RETRY | {"Connection": "close"})
        self.active += 1
        try:
            self._queue.check()
            return await self._answered(request)
        except FullError:
            return _error(503, "The queue is full", RETRY | _closing(request))
        except BodyError as error:
            return _error(error.status, str(error), _closing(request) | (RETRY if error.status == 503 else {}))
        except ClientDisconnect:
            return Response(status_code=GONE)
        finally:
            self.active -= 1

    async def _answered(self, request: Request) -> Response:
        told = request.scope["keras_effnet"]
        top = _top(request.query_params.get("top", str(self._classifier.top)))
        with self._holding() as hold:
            body = self._chunks(request, hold, told)
            images = await images_of(request.headers.get("content-type", ""), body, self._limits)
            told["images"] = len(images)
            ticket = Ticket(images, top, time.monotonic() + self._limits.timeout)
            del images
            self._queue.add(ticket)
            rows = await self._awaited(ticket, request)
        status = 422 if any("error" in row for row in rows) else 200
        return _json({"model": self._name, "images": rows}, status)

    @contextmanager
    def _holding(self):
        """Yields a function that counts the bytes of a request while it is in memory."""
        held = 0

        def hold(more: int) -> None:
            nonlocal held
            if self._held + more > self._limits.held:
                raise FullError
            held += more
            self._held += more

        try:
            yield hold
        finally:
            self._held -= held

    async def _chunks(self, request: Request, hold: Callable[[int], None], told: dict) -> AsyncIterator[bytes]:
        """Yields the body, as long as it is not too large."""
        most = self._limits.bytes
        too_large = BodyError(413, f"Expected a body of at most {most:,} bytes. Received: more")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 20 or int(declared) > most:
            raise too_large
        async for chunk in request.stream():
            told["bytes"] += len(chunk)
            if told["bytes"] > most:
                raise too_large
            hold(len(chunk))
            yield chunk

    async def _awaited(self, ticket: Ticket, request: Request) -> list[dict[str, Any]]:
        """Returns the answer. A request whose client has left, or whose time is over, is dropped."""
        gone = asyncio.ensure_future(request.receive())  # after the body, only the end of the connection comes
        gone.add_done_callback(ticket.drop)
        try:
            async with asyncio.timeout(self._limits.timeout):
                return await ticket.answer
        except TimeoutError:
            raise BodyError(503, f"Expected an answer within {self._limits.timeout:g} seconds. Try again") from None
        except asyncio.CancelledError:
            if gone.done() and not gone.cancelled():
                raise ClientDisconnect from None
            raise
        finally:
            gone.remove_done_callback(ticket.drop)
            gone.cancel()
            if not ticket.complete:
                self._queue.forget(ticket)

    async def _healthz(self, request: Request) -> Response:
        if self.draining:
            return _json({"status": "draining"}, 503, RETRY)
        return _json({"status": "ok"})

    async def _metadata(self, request: Request) -> Response:
        predictor = self._classifier.predictor
        told = {"runtime": predictor.runtime, "precision": predictor.precision, "device": predictor.device}
        told |= {"threads": predictor.threads, "limits": asdict(self._limits), "labels": predictor.labels}
        return _json({"model": self._name, **told, "metadata": predictor.metadata})

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _openapi_json(self, request: Request) -> Response:
        return _json(self._openapi)

    async def _docs_page(self, request: Request) -> Response:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(self._docs, headers=policy)


def _top(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 5 else 0
    if not 1 <= number <= TOP:
        raise BodyError(400, f"Expected top of 1 to {TOP}. Received: {one_line(text, 20)!r}")
    return number


def _closing(request: Request) -> dict[str, str]:
    """A client that waits for "100 Continue" does not send the body that the connection then expects."""
    return {"Connection": "close"} if "expect" in request.headers else {}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    more = {"X-Content-Type-Options": "nosniff"} | (headers or {})
    return Response(json.dumps(value), status, more, "application/json")


def _error(status: int, told: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": told}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    """Answers an unknown path or method."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}) | _closing(request))


async def _failed(request: Request, error: Exception) -> Response:
    """Answers a request that the model fails on. Starlette then raises the error, and uvicorn logs it."""
    return _error(500, "The model or the service failed: its log tells why", {"Connection": "close"})


async def _foreign(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request of another page."""
    told = "Expected the Host of this service, and no Origin of another page. Received: another Host or Origin"
    await _error(403, told, _closing(Request(scope)))(scope, receive, send)

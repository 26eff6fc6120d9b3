"""Runs the service: binds, says when it is ready, drains at the first signal, ends at the second."""

import os
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from keras_effnet.serving import logs
from keras_effnet.serving.limits import Limits
from keras_effnet.serving.protocol import protocol_of
from keras_effnet.serving.service import Service
from keras_effnet.serving.sockets import address

_ENDING = 5.0  # seconds to wait for images that are decoded although nobody waits for them


def run(service: Service, limits: Limits, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serves until a signal, and then answers what has been accepted.

    Args:
        service: `Service`.
        limits: `Limits`.
        listening: A bound socket, see `sockets.bound()`.
        ready: Function of the URL. It is called once connections are accepted.
    """
    logs.start()
    config = uvicorn.Config(
        service,
        http=protocol_of(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]  # it is passed to `call_later()`
        timeout_graceful_shutdown=int(limits.timeout) + 1,
    )
    _Server(config, service, limits, ready).run([listening])
    service.close(_ENDING)
    logs.log(message="ended")


class _Server(uvicorn.Server):
    """Drains at the first signal: /healthz says so, what was accepted is answered, and only then nothing is accepted.

    uvicorn itself stops to accept at once, so that nobody could ask why.
    """

    def __init__(self, config: uvicorn.Config, service: Service, limits: Limits, ready: Callable[[str], None]):
        super().__init__(config)
        self._service, self._limits, self._ready = service, limits, ready
        self._drained_from = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:
            url = address(sockets[0])
            logs.log(message="ready", url=url)
            self._ready(url)

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self._drained_from:
            self._drained_from = time.monotonic()
            logs.log(message="draining")
        # Twice: to receive and to answer.
        late = time.monotonic() > self._drained_from + 2 * self._limits.timeout
        if self._service.draining and (not self._service.active or late):
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:  # as if there were no handler
            os._exit(128 + sig)
        self._service.draining = True

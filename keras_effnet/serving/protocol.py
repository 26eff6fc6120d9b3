"""uvicorn's HTTP protocol with what it lacks: limits of time for slow clients, of bytes, and of connections.

uvicorn has no limit of time for a request's headers and body, nor for a client that does not read the answer, and its
parser has no limit of bytes for headers. A slow sender would hold a connection forever.
"""

from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from keras_effnet.serving import logs
from keras_effnet.serving.limits import HEAD_BYTES, Limits


def protocol_of(limits: Limits) -> type[HttpToolsProtocol]:
    """Returns the protocol for these limits.

    Args:
        limits: `Limits`.

    Returns:
        Class for uvicorn's option `http`.
    """

    class Limited(_Limited):
        bounds = limits

    return Limited


class _Limited(HttpToolsProtocol):
    bounds: Limits
    _timer: TimerHandle | None = None
    _whole = False  # whether the request has been received
    _in_body = False
    _early = False  # whether it is being received before the answer to the one before
    _received = 0  # bytes of the request, with headers and chunk sizes

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections:
            self._end(503, "too many connections")
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        # The rest of a body that is too large is read and thrown away, so that the client sees the answer.
        if self._received > HEAD_BYTES + (2 * self.bounds.bytes if self._in_body else 0):
            self._end(413 if self._in_body else 431, "too many bytes")
        elif self._timer is None and (not self._whole or self.cycle.response_complete):
            self._arm()

    def on_message_begin(self) -> None:
        # With several requests at once, uvicorn tells only the last that the client has left. So the connection ends
        # after the answer to the first, and the client asks again (RFC 9112, section 9.3.2).
        self._early = self.cycle is not None and not self.cycle.response_complete
        super().on_message_begin()
        if self._early:
            self.cycle.keep_alive = False
            return
        self._whole = self._in_body = False
        self._received = 0
        self._arm()

    def on_headers_complete(self) -> None:
        if not self._early:
            super().on_headers_complete()
            self._in_body = True

    def on_body(self, body: bytes) -> None:
        if not self._early:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._early:
            return
        super().on_message_complete()
        self._whole = True
        self._disarm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._arm()  # a client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._whole:
            self._disarm()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # a client that does not read
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.bounds.timeout, self._overdue)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        self._end(408, "too slow")

    def _end(self, status: int, why: str) -> None:
        """Ends the connection, with an answer if the request has none yet."""
        if self.transport.is_closing():  # and what was written last has not been read
            self.transport.abort()
            return
        logs.log(status=status, closed=why)
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the application sends is dropped: the transport raises errors
        answered = self._in_body and self.cycle.response_started
        if not answered and not self.transport.get_write_buffer_size():
            body = b'{"error": "%s"}' % why.encode()
            head = f"HTTP/1.1 {status} {why}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            head += "retry-after: 1\r\n" * (status == 503) + "connection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
            self.transport.close()
            self._arm()
        else:
            self.transport.abort()

"""What the service takes from a client, at most."""

from dataclasses import dataclass
from typing import Annotated

from keras_effnet import ranges
from keras_effnet.ranges import Range

HEAD_BYTES = 1 << 16  # of a request's line and headers, beside its body
HELD = 8  # requests of the largest size that may be in memory at once, in bytes


@dataclass(frozen=True)
class Limits:
    """What the service takes from a client, at most.

    Args:
        bytes: Integer. Size of a request's body.
        pixels: Integer. Pixels of an image.
        images: Integer. Images of a request.
        queue: Integer. Images that wait. A request that would make it more is answered with 503.
        timeout: Float. Seconds to receive a request, and again to answer it.
        connections: Integer. Open connections.
        keep_alive: Float. Seconds that a connection may be idle between two requests.
    """

    bytes: Annotated[int, Range(1 << 10, 1 << 31)] = 1 << 25
    pixels: Annotated[int, Range(1, 178_956_970)] = 50_000_000
    images: Annotated[int, Range(1, 10_000)] = 32
    queue: Annotated[int, Range(1, 100_000)] = 128
    timeout: Annotated[float, Range(0.1, 3600)] = 30.0
    connections: Annotated[int, Range(1, 100_000)] = 512
    keep_alive: Annotated[float, Range(0.1, 3600)] = 15.0

    def __post_init__(self):
        ranges.check_fields(self)
        if self.queue < self.images:
            raise ValueError(
                f"Expected a queue of at least the {self.images} images that a request may have. Received: {self.queue}"
            )

    @property
    def held(self) -> int:
        """Bytes of all requests that may be in memory at once."""
        return HELD * self.bytes

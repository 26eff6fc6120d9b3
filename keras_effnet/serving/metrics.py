"""The numbers of the service, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The numbers of one service, in a registry of their own.

    Attributes:
        registry: `prometheus_client.CollectorRegistry`.
        requests: Counter of requests by `route` and `status`. A client that left has the status 499.
        images: Counter of images by `result`: `ok`, `error`, or `dropped` because nobody waited any more.
        waiting: Gauge of the images that wait.
        held: Gauge of the bytes of requests in memory.
        decode: Histogram of the seconds to decode and resize an image.
        predict: Histogram of the seconds to run the model on an image.
        whole: Histogram of the seconds from a request's first line to its answer, by `route`.
    """

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        name = "keras_effnet"
        self.requests = Counter(f"{name}_requests", "Requests.", ("route", "status"), registry=registry)
        self.images = Counter(f"{name}_images", "Images.", ("result",), registry=registry)
        self.waiting = Gauge(f"{name}_queue_images", "Images that wait.", registry=registry)
        self.held = Gauge(f"{name}_held_bytes", "Bytes of requests in memory.", registry=registry)
        told = {"buckets": SECONDS, "registry": registry}
        self.decode = Histogram(f"{name}_decode_seconds", "Decoding and resizing an image.", **told)
        self.predict = Histogram(f"{name}_predict_seconds", "Running the model on an image.", **told)
        self.whole = Histogram(f"{name}_request_seconds", "A request, until its answer.", ("route",), **told)

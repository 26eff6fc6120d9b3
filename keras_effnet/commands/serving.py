"""`keras-effnet serve` and `demo`: a model behind HTTP, and a page to try it on."""

import contextlib
from importlib.util import find_spec

import click

from keras_effnet.commands.options import BEST, DEVICE, PRECISION, RUNTIME, WEIGHTS, choose_backend
from keras_effnet.commands.output import spinner

# What the service imports, and the name of its package where that differs.
_SERVE = {"starlette": "", "uvicorn": "", "httptools": "", "python_multipart": "python-multipart"}
_SERVE |= {"prometheus_client": "prometheus-client"}

HOST = click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0: all of this machine."
)


@click.command(short_help="Answer HTTP requests with a model.")
@click.argument("model")
@WEIGHTS
@BEST
@HOST
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="Classes per image.")
@RUNTIME
@PRECISION
@DEVICE
@click.option("--threads", type=click.IntRange(1, 1024), help="Processors to use. Default: all.")
@click.option("--max-bytes", type=int, default=1 << 25, show_default=True, help="Largest request, in bytes.")
@click.option("--max-pixels", type=int, default=50_000_000, show_default=True, help="Maximum pixels of an image.")
@click.option("--max-images", type=int, default=32, show_default=True, help="Maximum images of a request.")
@click.option(
    "--timeout", type=float, default=30.0, show_default=True, help="Seconds to receive a request, and to answer."
)
@click.option("--queue", type=int, default=128, show_default=True, help="Maximum images that wait. Beyond it: 503.")
def serve(
    model,
    weights,
    best,
    host,
    port,
    top,
    runtime,
    precision,
    device,
    threads,
    max_bytes,
    max_pixels,
    max_images,
    timeout,
    queue,
) -> None:
    """Answer HTTP requests with MODEL: a name, a .keras file, the folder of a run, or an exported model.

    POST images to /predict. /docs shows how. Other routes: /healthz, /metadata, /metrics, /openapi.json. The log is
    on standard error, a JSON object per line. After SIGTERM, the service answers what it has accepted, and ends.

    There is no password and no TLS: put a proxy in front before you open it to others.
    """
    _need(_SERVE, "serve")
    from keras_effnet.inference.classifier import Classifier
    from keras_effnet.serving.limits import Limits
    from keras_effnet.serving.run import run
    from keras_effnet.serving.service import Service
    from keras_effnet.serving.sockets import bound, is_local

    limits = Limits(bytes=max_bytes, pixels=max_pixels, images=max_images, queue=queue, timeout=timeout)
    listening = bound(host, port)
    names = {host.lower(), "localhost"} if is_local(listening) else None
    with contextlib.suppress(ImportError):  # a cached model needs no backend
        choose_backend()
    try:
        with spinner(f"Preparing {model}"):
            classifier = Classifier(model, weights, top, runtime, precision, best, device=device, threads=threads)
            service = Service(classifier, limits, classifier.name, names)
    except ModuleNotFoundError:
        choose_backend()
        raise
    if classifier.note:
        click.echo(classifier.note, err=True)
    run(service, limits, listening, lambda url: click.echo(f"Serving {classifier.name} at {url} (Ctrl-C ends it)"))


@click.command(short_help="Open a local page that classifies photos.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@HOST
@click.option("--port", type=click.IntRange(0, 65535), help="0: any free port. Default: 7860, or a free one.")
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
def demo(models, host, port, no_browser) -> None:
    """Open a local page that shows a photo's five most likely classes, the places that support them, and the time.

    MODEL is a name, a .keras file, the folder of a run or an exported model, perhaps with a precision: b0@int8. The
    page compares two of them side by side. Default: efficientnet-lite0. Ctrl-C ends it.
    """
    _need({"starlette": "", "uvicorn": ""}, "demo")
    from keras_effnet.serving import demo as server
    from keras_effnet.serving.demo_models import DemoModel

    with contextlib.suppress(ImportError):  # cached models need no backend
        choose_backend()
    with server.open_socket(host, port) as listening:  # a taken port is told before the work
        prepared = []
        for model in dict.fromkeys(models or ["efficientnet-lite0"]):
            try:
                with spinner(f"Preparing {model}"):
                    prepared.append(DemoModel(model))
            except ModuleNotFoundError:
                choose_backend()
                raise
        server.serve(
            prepared, listening, host, lambda address: click.echo(f"{address}\nCtrl-C ends it."), not no_browser
        )


def _need(modules: dict[str, str], extra: str) -> None:
    """Raises an error for the first package that is not installed."""
    for module, package in modules.items():
        if not find_spec(module):
            raise ImportError(
                f"Expected {package or module}. Received: not installed. Run: pip install 'keras_effnet[{extra}]'"
            )

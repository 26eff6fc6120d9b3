"""`keras-effnet explain`: show what a model looks at in photos."""

import contextlib

import click

from keras_effnet.commands.options import (
    AS_JSON,
    BEST,
    DECODE,
    DEVICE,
    MODEL,
    PRECISION,
    RECURSIVE,
    RUNTIME,
    WEIGHTS,
    choose_backend,
)
from keras_effnet.commands.output import complain, progress, quiet, show_json, spinner


@click.command(short_help="Show what a model looks at in photos.")
@click.argument("photographs", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--out", required=True, metavar="DIR", help="Folder for the pictures and the page.")
@MODEL
@WEIGHTS
@BEST
@RECURSIVE
@click.option("--top", default=3, show_default=True, type=click.IntRange(1, 10), help="Classes to explain per photo.")
@click.option(
    "--class", "classes", multiple=True, metavar="CLASS", help="Name or number of a class to explain. May be repeated."
)
@click.option(
    "--method",
    default="cam",
    show_default=True,
    help="cam; or grad-cam or grad-cam++, which work for any head and are slower.",
)
@click.option("--layer", help="Layer for grad-cam and grad-cam++. Default: the last one with a height and a width.")
@RUNTIME
@PRECISION
@DEVICE
@DECODE
@AS_JSON
@click.pass_context
def explain(
    ctx,
    photographs,
    out,
    model,
    weights,
    best,
    recursive,
    top,
    classes,
    method,
    layer,
    runtime,
    precision,
    device,
    decode,
    as_json,
) -> None:
    """Show what a model looks at in photos.

    Saves a picture of each photo in DIR: the photo as the model sees it and, for its most likely classes, the places
    that support them. DIR/index.html shows all photos and needs no other file.

    An exported model needs maps: export it with --maps.

    Exit status 2 if a photo cannot be read.
    """
    from keras_effnet.errors import one_of
    from keras_effnet.images.folders import photographs as listed
    from keras_effnet.inference.classifier import Classifier
    from keras_effnet.inference.explain import METHODS
    from keras_effnet.inference.explained_photos import explain_photos, photos_for

    by_gradients = one_of("method", method, METHODS) != "cam"
    if layer and not by_gradients:
        raise ValueError(f"Expected --method grad-cam or grad-cam++ for --layer. Received: --method {method}")
    paths = photos_for(out, listed(photographs, recursive))  # before the model is prepared
    with contextlib.nullcontext() if by_gradients else contextlib.suppress(ImportError):  # a cached model needs none
        choose_backend()
    with spinner(f"Preparing {model}"):
        classifier = Classifier(model, weights, top, runtime, precision, best, decode, device, maps=not by_gradients)
    rows, failed = [], 0
    with quiet(), progress("Photos", len(paths), len(paths) < 8, unit="images") as tell:
        for row in explain_photos(paths, out, classifier, classes, method, layer):
            rows += [row] if as_json else []
            if "error" in row:
                failed += 1
                complain(row["error"])
            tell(advance=1)
    page = f"{out}/index.html"
    if as_json:
        show_json({"model": model, "weights": weights, "page": page, "photographs": rows})
    else:
        click.echo(f"{page}: {len(paths)} photos{f', {failed} of them with an error' * bool(failed)}")
    if classifier.note:
        click.echo(classifier.note, err=True)
    ctx.exit(2 if failed else 0)

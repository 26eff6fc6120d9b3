"""`keras-effnet download`, `convert` and `verify`: weights files."""

import click

from keras_effnet.commands.options import AS_JSON, RAW, SOURCE, choose_backend
from keras_effnet.commands.output import show_json, spinner


@click.command()
@click.argument("model")
@click.argument("tag", default="imagenet")
@click.option("--no-top", is_flag=True, help="Download the file without the classifier, if there is one.")
@AS_JSON
def download(model, tag, no_top, as_json) -> None:
    """Download the weights TAG of MODEL, and print their path.

    TAG defaults to imagenet, the default weights of the model. `keras-effnet list --weights` shows all.
    """
    from keras_effnet.weights import registry, store

    path = store.fetch(registry.find(model, tag), include_top=not no_top)
    if as_json:
        show_json({"model": model, "tag": tag, "path": str(path)})
    else:
        click.echo(path)


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option("--model", help="Name of the model. Default: detected from the tensors.")
@SOURCE
@click.option("--to", "target", help="Format of the names in DST: tpu, timm, keras or own. Default: from its suffix.")
@RAW
@click.option(
    "--preprocessing",
    default="auto",
    show_default=True,
    help="Preprocessing to save in a .keras or .h5 file: imagenet, inception or tpu127.",
)
@AS_JSON
def convert(src, dst, model, source, target, raw, preprocessing, as_json) -> None:
    """Convert weights from SRC to DST.

    SRC is a .keras, .h5, .safetensors or torch file, or a TensorFlow checkpoint (folder, prefix or .tar.gz). DST ends
    in .keras or .weights.h5 (this package), .safetensors (timm) or .h5 (keras.applications), or is the prefix of a
    TensorFlow checkpoint.
    """
    choose_backend()
    from keras_effnet import weights

    with spinner("Converting"):
        name = weights.convert_file(src, dst, model, source, target, raw=raw, preprocessing=preprocessing)
    if as_json:
        show_json({"model": name, "path": dst})
    else:
        click.echo(f"Saved {dst}: {name}")


@click.command()
@click.argument("file")
@click.option("--model", required=True, help="Name of the model. `keras-effnet list` shows all.")
@SOURCE
@RAW
@click.option("--no-top", is_flag=True, help="Ignore the classifier.")
@AS_JSON
@click.pass_context
def verify(ctx, file, model, source, raw, no_top, as_json) -> None:
    """Check which tensors of FILE would load into a model.

    Exit status 1 if the file does not fit.
    """
    from dataclasses import asdict

    from keras_effnet import weights

    report = weights.verify(file, model, source, include_top=not no_top, raw=raw)
    if as_json:
        show_json(asdict(report) | {"fits": report.fits})
    else:
        for problem in report.problems:
            click.echo(problem)
        for reason, count in report.ignored.items():
            click.echo(f"{count} ignored: {reason}")
        if report.model and not report.fits:
            click.echo(f"These are the tensors of {report.model}.")
        top = "without classifier" if report.classes is None else f"with {report.classes} classes"
        verdict = (
            "fits" if report.fits else f"does not fit: {len(report.problems)} missing (-), unexpected (+) or wrong (!)"
        )
        click.echo(f"{len(report.loaded)} variables match. {report.format} file {top}: {verdict}")
    ctx.exit(0 if report.fits else 1)

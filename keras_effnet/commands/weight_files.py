"""`keras-effnet download`, `convert` and `verify`: weights files."""

import click

from keras_effnet.commands.options import AS_JSON, RAW, SOURCE, choose_backend
from keras_effnet.commands.output import show_json, spinner


@click.command()
@click.argument("model")
@click.argument("tag", default="imagenet")
@click.option("--no-top", is_flag=True, help="Download the weights without the classifier, if such a file exists.")
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
@click.option("--to", "target", help="Format of DST: tpu, timm, keras, hub or own. Default: from its suffix.")
@RAW
@click.option(
    "--preprocessing",
    default="auto",
    show_default=True,
    help="Preprocessing to save in a .keras or .h5 file: imagenet, inception or tpu127.",
)
@click.option(
    "--labels", type=click.File(), help="Text file with the class names to save in a .keras file, one a line."
)
@click.option("--head", help="linear:5: a classifier of 5 classes, instead of the layers that SRC has around the net.")
@click.option("--padding", help="Padding that the weights are for, where SRC does not say it: same or symmetric.")
@click.option("--verify", "compare", is_flag=True, help="Run the SavedModel SRC with TensorFlow, and compare outputs.")
@AS_JSON
def convert(src, dst, model, source, target, raw, preprocessing, labels, head, padding, compare, as_json) -> None:
    """Convert a model or its weights from SRC to DST.

    SRC is a .keras, .h5, .safetensors or torch file, a TensorFlow checkpoint (folder, prefix or .tar.gz), or a
    SavedModel of Keras 2. DST ends in .keras or .weights.h5 (this package), .safetensors (timm) or .h5
    (keras.applications), or is the prefix of a TensorFlow checkpoint. With --to hub it is a folder to upload to the
    Hugging Face Hub. SRC may be on the Hub: hf://owner/name or timm/name. No code in SRC is run, except with --verify.
    """
    choose_backend()
    from dataclasses import asdict

    from keras_effnet.weights import convert as conversion

    names = [line.strip() for line in labels if line.strip()] if labels else None
    options = {"raw": raw, "preprocessing": preprocessing, "labels": names, "head": head, "padding": padding}
    with spinner("Converting"):
        done = conversion.convert(src, dst, model, source, target, verify=compare, **options)
    if as_json:
        show_json(asdict(done))
        return
    click.echo(f"Saved {dst}: {done.model}" + (f", from {done.writer}" if done.writer else ""))
    for each in done.left:
        click.echo(f"Left: {each}")
    if done.difference is not None:
        click.echo(f"Outputs differ by at most {done.difference:.1e} of their standard deviation.")
    elif done.writer:
        click.echo("The weights are complete. The outputs were not compared.")


@click.command()
@click.argument("file")
@click.option("--model", help="Name of a model to compare FILE with. Default: say what FILE is.")
@SOURCE
@RAW
@click.option("--no-top", is_flag=True, help="Ignore the classifier.")
@AS_JSON
@click.pass_context
def verify(ctx, file, model, source, raw, no_top, as_json) -> None:
    """Say what FILE is, or compare it with a model. FILE may be an address, hf://owner/name or timm/name.

    Exit status 1 if the file does not fit, or holds no EfficientNet.
    """
    from dataclasses import asdict

    from keras_effnet import weights

    if model is None:
        choose_backend()
        found = weights.identify(file)
        show_json(asdict(found)) if as_json else click.echo(found)
        ctx.exit(1 if found.problem else 0)
        return
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

"""`keras-effnet cache`: what is kept on this machine, and how to remove it."""

import click

from keras_effnet.commands.options import AS_JSON
from keras_effnet.commands.output import show, show_json, table


@click.group("cache", invoke_without_command=True, short_help="List the files that are kept, or remove them.")
@AS_JSON
@click.pass_context
def cache_(ctx, as_json) -> None:
    """List the files that are kept on this machine: downloads, exports, features.

    They are in KERAS_EFFNET_HOME. When they exceed KERAS_EFFNET_CACHE_LIMIT (default: 20GB; none: no limit), not
    counting downloads, those that were not used for the longest time are removed. A removed file is made or downloaded
    again when it is needed.
    """
    if ctx.invoked_subcommand:
        return
    from datetime import datetime

    from rich.filesize import decimal

    from keras_effnet import cache
    from keras_effnet.weights import downloads

    found = sorted([*cache.entries(), *downloads.saved()], key=lambda entry: -entry.used)
    if as_json:
        show_json({"folder": str(cache.home()), "entries": [_row(entry) for entry in found]})
        return
    rows = table(str(cache.home()), "kept", "model", ">size", "last use")
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        rows.add_row(entry.title, entry.model, decimal(entry.bytes), used)
    counted = sum(entry.bytes for entry in found if entry.kind in cache.KINDS)
    limit = cache.limit()
    bound = "no limit" if limit == float("inf") else f"limit {decimal(int(limit))}"
    show(rows, f"{decimal(sum(entry.bytes for entry in found))}, without downloads {decimal(counted)} ({bound})")


@cache_.command()
@click.argument("model", required=False)
@click.option("--older", metavar="TIME", help="Remove only what was not used for this time, such as 30d or 12h.")
@click.option("--over", metavar="SIZE", help="Remove only as much as exceeds a size, such as 2GB, oldest use first.")
@click.option("--downloads", is_flag=True, help="Remove downloads too.")
@AS_JSON
def clear(model, older, over, downloads, as_json) -> None:
    """Remove kept files: all, or those of MODEL. Downloads stay unless you give --downloads.

    Files that a running process uses stay.
    """
    import time

    from rich.filesize import decimal

    from keras_effnet import cache
    from keras_effnet.nets.variants import find_model, is_model
    from keras_effnet.weights.downloads import saved

    wanted = find_model(model) if model and is_model(model) else model
    chosen = [*cache.entries(), *(saved() if downloads else ())]
    known = sorted({entry.model for entry in chosen if entry.model})
    if wanted:
        chosen = [entry for entry in chosen if entry.model == wanted]
        if not chosen and known and not is_model(wanted):
            from keras_effnet.errors import unknown

            raise unknown("kept model", model, known)
    if older:
        before = time.time() - cache.age_of(older)
        chosen = [entry for entry in chosen if entry.used < before]
    if over:
        chosen = cache.over(chosen, cache.size_of(over))
    removed, stayed = cache.remove(chosen)
    cache.trim()
    if as_json:
        show_json({"removed": [_row(entry) for entry in removed], "in_use": [_row(entry) for entry in stayed]})
        return
    click.echo(f"Removed {len(removed)} of {len(chosen)}: {decimal(sum(entry.bytes for entry in removed))}")
    for entry in stayed:
        click.echo(f"In use, or not permitted: {entry.path}")


def _row(entry) -> dict:
    from datetime import UTC, datetime

    used = datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds")
    row = {"kind": entry.title, "model": entry.model, "path": str(entry.path), "bytes": entry.bytes}
    return row | {"last_use": used}

"""Times `keras-effnet explain` beside `keras-effnet predict` on the same photos: whole commands, in turn.

    python benchmarks/explain.py                # Lite0, 100 JPEGs of mixed sizes

The JPEGs are cuts of the photos in scikit-image and scikit-learn. A first run of each command prepares the model.
Ratios are taken within a round.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import click
from folder import write_photos
from timing import seconds, spread, told


def command(*arguments: str) -> None:
    program = Path(sys.executable).parent / "keras-effnet"
    subprocess.run([program, *arguments], check=True, capture_output=True)


@click.command(help=__doc__)
@click.option("--photos", default=100, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--model", default="efficientnet-lite0", show_default=True)
def main(photos: int, rounds: int, model: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "photos")
        folder.mkdir()
        write_photos(folder, photos)
        lines = {
            "predict": ("predict", str(folder), "--model", model, "--json"),
            "explain": ("explain", str(folder), "--model", model, "--out", f"{scratch}/out"),
        }
        for line in lines.values():
            command(*line)
        times: dict[str, list[float]] = {name: [] for name in lines}
        for _ in range(rounds):
            for name, line in lines.items():
                times[name].append(seconds(lambda line=line: command(*line)))
    for name, row in times.items():
        print(f"{name}: {told(spread(row))} s for {photos} photos")
    ratios = [explain / predict for predict, explain in zip(times["predict"], times["explain"], strict=True)]
    print(f"explain / predict: {told(spread(ratios))}")


if __name__ == "__main__":
    main()

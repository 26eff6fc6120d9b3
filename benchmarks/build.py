"""Times the construction of B0 and V2-S and the import of the package, paired with keras.applications.

Each figure comes from a separate process, since a backend keeps what it has compiled. Ours and the peer alternate.
`python benchmarks/build.py --help`
"""

import json
import os
import subprocess
import sys

import click
from timing import spread

BUILD = """
import time, {imports}
start = time.perf_counter()
{call}(weights=None)
print(time.perf_counter() - start)
"""
IMPORT = """
import time
start = time.perf_counter()
{imports}
print(time.perf_counter() - start)
"""
# case: (ours, the peer)
CASES = {
    "build B0": (
        BUILD.format(imports="keras; from keras_effnet.models import EfficientNetB0", call="EfficientNetB0"),
        BUILD.format(imports="keras", call="keras.applications.EfficientNetB0"),
    ),
    "build V2-S": (
        BUILD.format(imports="keras; from keras_effnet.models import EfficientNetV2S", call="EfficientNetV2S"),
        BUILD.format(imports="keras", call="keras.applications.EfficientNetV2S"),
    ),
    "import": (
        IMPORT.format(imports="import keras, keras_effnet, keras_effnet.models"),
        IMPORT.format(imports="import keras"),
    ),
}


def seconds(code: str, backend: str) -> float:
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return float(result.stdout.split()[-1])


@click.command()
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=("tensorflow", "jax", "torch"),
    show_default=True,
    help="Backend to time. May be repeated.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds of each case.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(backends, rounds, as_json) -> None:
    """Time the construction of B0 and the import on each backend."""
    rows = []
    for backend in backends:
        for what, (ours, peer) in CASES.items():
            for code in (ours, peer):  # warms up the disk cache
                seconds(code, backend)
            pairs = [(seconds(ours, backend), seconds(peer, backend)) for _ in range(rounds)]
            rows.append(
                {
                    "backend": backend,
                    "what": what,
                    "keras_effnet_seconds": spread([one for one, _ in pairs]),
                    "peer_seconds": spread([other for _, other in pairs]),
                    "difference_seconds": spread([one - other for one, other in pairs]),
                    "ratio": spread([one / other for one, other in pairs]),
                }
            )
            if not as_json:
                click.echo(
                    f"{backend:10} {what:10}  "
                    + "  ".join(
                        f"{key.removesuffix('_seconds')} {value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"
                        for key, value in rows[-1].items()
                        if isinstance(value, dict)
                    )
                )
    if as_json:
        click.echo(json.dumps({"rounds": rounds, "results": rows}, indent=2))


if __name__ == "__main__":
    main()

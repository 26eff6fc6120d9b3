"""Checks that a long run does not grow in memory or on disk, with small steps and many evaluations and checkpoints.

    python benchmarks/soak.py --minutes 30

Runs `keras-effnet train digits_demo` in a separate process, and looks at it every five seconds. Growth is the median of
the last tenth of the time over that of the tenth after the first sixth, when everything is built.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

SMALL = [
    *("--epochs", "1000000", "--batch-size", "16", "--model.image-size", "32"),
    *("--run.steps-per-loop", "20", "--run.eval-every", "4", "--run.save-every", "2"),
]


def grown(values: list[float]) -> float:
    tenth = max(1, len(values) // 10)
    early = statistics.median(values[len(values) // 6 : len(values) // 6 + tenth])
    return statistics.median(values[-tenth:]) / early - 1


def tenths(values: list[float]) -> list[float]:
    """Returns the medians of ten parts, which show whether growth goes on or ends."""
    ends = [round(number * len(values) / 10) for number in range(11)]
    return [statistics.median(values[first:end]) for first, end in itertools.pairwise(ends) if end > first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "keras_effnet",
            "train",
            "digits_demo",
            "--workdir",
            folder,
            *SMALL,
        ]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        memory, files, end = [], [], time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            time.sleep(5)
            if process.poll() is not None:
                raise SystemExit(f"The run ended early with status {process.returncode}")
            memory.append(timing.memory("VmRSS", process.pid))
            # Counts names only, since a temporary file may be removed meanwhile.
            files.append(sum(len(names) for _, _, names in os.walk(folder)))
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        early = files[len(files) // 6]
        names = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        print(*names, sep="\n")
        print(f"{rows[-1]['step']} steps, {sum(row['split'] == 'eval' for row in rows)} evaluations, status {status}")
        print(f"memory {memory[len(memory) // 6]:.0f} MiB to {memory[-1]:.0f} MiB, grown by {grown(memory):+.2%}")
        print("medians of ten parts of the time, MiB:", *(f"{value:.1f}" for value in tenths(memory)))
        print(f"files in the folder: {early} to {files[-1]}, at most {max(files)}")
        if (
            grown(memory) >= 0.01 or files[-1] > early + 4
        ):  # one more checkpoint, the best one, and files that are being written
            raise SystemExit("The run grows. Expected less than 1 % of memory, and at most 4 files")


if __name__ == "__main__":
    main()

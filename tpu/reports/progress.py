"""Logs the progress of a run: metrics.jsonl for programs, a progress bar or lines for people."""

import contextlib
import io
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from keras_effnet.tpu.resume import cloud_files
from keras_effnet.tpu.resume.stop_signals import say


class Log:
    """Logs the metrics of a run.

    Args:
        workdir: String, path of the run's folder.
        batch: Integer, images per step.
        total: Integer, steps of the whole run.
        quiet: Boolean, whether to write files only. Defaults to False.
        writes: Boolean, whether to write and print anything. True on one host only. Defaults to True.
    """

    def __init__(self, workdir: str, batch: int, total: int, quiet: bool = False, writes: bool = True):
        self.workdir, self.batch, self.total, self.writes = workdir, batch, total, writes
        self.quiet = quiet or not writes
        self.text = io.StringIO()  # orbit's output, kept here: on Cloud Storage a file appears when it is closed
        self.last: dict[str, Any] = {}
        self.scores: dict[int, float] = {}  # top-1 of the moving average by step
        self.started = self._since = time.monotonic()
        self._step, self._rates, self._bar, self._task = 0, [], None, None

    def resume(self, step: int) -> None:
        """Reads the metrics up to a step and drops those of later steps.

        Args:
            step: Integer, number of completed steps.
        """
        path = f"{self.workdir}/metrics.jsonl"
        rows = [row for row in cloud_files.rows(path) if row["step"] <= step]
        if self.writes and tf.io.gfile.exists(path):
            cloud_files.write(path, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            if row["split"] == "eval":
                self.scores[row["step"]] = row["ema_top1"]
                self.last |= {name: value for name, value in row.items() if name not in ("step", "split")}
            else:
                self.last["images_per_second"] = row["images_per_second"]
        self._step = step

    def begin(self) -> None:
        """Starts the clock and, on a terminal, the progress bar."""
        self._since = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("Training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
                redirect_stdout=False,
            )
            self._task = self._bar.add_task("", total=self.total, completed=self._step, status="")
            self._bar.start()

    def end(self) -> None:
        """Stops the progress bar and flushes train.log."""
        with contextlib.suppress(OSError, ValueError, tf.errors.OpError):  # the run has already reported how it ended
            if self._bar:
                self._bar.stop()
            self._keep_text()

    def trained(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs training metrics. People see the loss without weight decay, as in an evaluation.

        Args:
            step: Integer, number of completed steps.
            metrics: Dict of numbers, means over the steps since the last call.
        """
        now = time.monotonic()
        rate = (step - self._step) * self.batch / (now - self._since)
        self._rates.append(rate)
        self._step, self._since = step, now
        row = {"step": step, "split": "train", **_numbers(metrics), "images_per_second": round(rate, 2)}
        self._write(row)
        # The first rate includes compilation.
        steady = sum(self._rates[1:]) / len(self._rates[1:]) if self._rates[1:] else rate
        self.last["images_per_second"] = round(steady, 2)
        left = (self.total - step) * self.batch / steady
        status = f"loss {row['data_loss']:.3f}  lr {row['learning_rate']:.2e}  {rate:.1f} images/s"
        if self._bar and self._task is not None:
            with contextlib.suppress(OSError):  # a terminal that was just closed
                self._bar.update(self._task, completed=step, status=status)
        else:
            self._tell(f"step {step}/{self.total}  {status}  {_time(left)} left")

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs an evaluation.

        Args:
            step: Integer, number of completed steps.
            metrics: Dict of numbers.
        """
        numbers = _numbers(metrics)
        self.last |= numbers
        self.scores[step] = numbers["ema_top1"]
        self._write({"step": step, "split": "eval", **numbers})
        raw = f" (raw weights {_percent(numbers['top1'])})" if "top1" in numbers else ""
        top1, top5 = _percent(numbers["ema_top1"]), _percent(numbers["ema_top5"])
        self._tell(f"step {step}/{self.total}  top-1 {top1}{raw}, top-5 {top5}")
        self._since = time.monotonic()

    @property
    def best(self) -> int | None:
        """Step with the highest top-1 of the moving average; the first one if several tie."""
        return max(self.scores, key=lambda step: (self.scores[step], -step), default=None)

    @property
    def waited(self) -> int:
        """Number of evaluations since the best one."""
        return sum(step > self.best for step in self.scores) if self.best else 0

    def note(self, text: str) -> None:
        """Prints a message and saves it in train.log.

        Args:
            text: String.
        """
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.text)
        self._tell(text)

    def _keep_text(self) -> None:
        if self.writes:
            with tf.io.gfile.GFile(f"{self.workdir}/train.log", "a") as file:
                file.write(self.text.getvalue())
        self.text.seek(0)
        self.text.truncate()

    def _write(self, row: dict[str, Any]) -> None:
        self._keep_text()
        if not self.writes:
            return
        with tf.io.gfile.GFile(f"{self.workdir}/metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def _tell(self, text: str) -> None:
        if self._bar:
            with contextlib.suppress(OSError):  # a terminal that was just closed
                self._bar.console.print(text, highlight=False)
        elif not self.quiet:
            say(text)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"

"""Writes predictions to JSON Lines or CSV, a row per photo, and continues the file of a run that was stopped."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_OWN = ("class_id", "name", "probability")
_LINES = 3  # a row that was cut off has no more line breaks, in paths and class names


def check_place(path: str | os.PathLike) -> None:
    """Checks that a file can be created at a path, or is there.

    Args:
        path: Path of the file.

    Raises:
        OSError: If the path is a folder, or its folder does not exist.
    """
    if not os.fspath(path):
        raise FileNotFoundError("Expected the path of a file. Received: ''")
    if os.path.isdir(path):
        raise IsADirectoryError(f"Expected the path of a file. Received: {os.fspath(path)!r}, a folder")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"Expected a folder to write to. Received: {parent!r}, which does not exist")


class PredictionFile:
    """A file of predictions. Each row is written before the next photo.

    A row that was cut off, since the process was killed, is removed when the file is opened again. Use it as a context
    manager.

    Args:
        path: Path of the file. It is created if it does not exist.
        kind: `"jsonl"` or `"csv"`.
        model: String, the model and its weights. Each row names it.
        top: Integer, the most classes per photo.

    Attributes:
        done: Set of the absolute paths of the photos that have a row.
        failed: Set of those whose row is an error.
        new: Integer, rows written since the file was opened.

    Raises:
        BlockingIOError: If the file is already open for predictions. Not checked on Windows.
        OSError: If the file cannot be read or written.
        ValueError: If the file has other rows: of another model, of another number of classes, or not predictions.
    """

    def __init__(self, path: str | os.PathLike, kind: str, model: str, top: int):
        self.path, self.done, self.failed, self.new = Path(path), set[str](), set[str](), 0
        self._model, self._top, self._classes = model, top, 0
        header = _csv_line(_columns(top))
        self._encode, self._decode, self._header, self._start = {
            "jsonl": (_json_row, _json_rows, b"", b'{"path": '),
            "csv": (self._csv_row, _csv_rows, header, b"path,model,error"),
        }[kind]
        check_place(self.path)
        self._file: BinaryIO = self.path.open("ab+")
        try:
            _lock(self._file, self.path)
            self._continue()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, result: dict[str, Any]) -> None:
        """Adds the row of a photo, unless the photo has one.

        Args:
            result: Dict with `path`, and `predictions` or `error`, as from `Classifier`.
        """
        path = os.path.abspath(result["path"])
        if path in self.done:
            return
        row = {"path": path, "model": self._model} | result | {"path": path}
        self._check(row, b"")
        self._append(self._encode(row))
        self._count(row)
        self.new += 1

    def _append(self, row: bytes) -> None:
        self._file.write(row)
        self._file.flush()

    def _count(self, result: dict[str, Any]) -> None:
        self.done.add(result["path"])
        if "error" in result:
            self.failed.add(result["path"])

    def _continue(self) -> None:
        """Reads the rows that are there, and cuts off what is not a complete row."""
        self._file.seek(0)
        start = self._file.read(len(self._start))
        if not (start.startswith(self._start) or self._start.startswith(start)):
            raise self._unlike(f"{start!r} at its beginning")
        self._file.seek(0)
        whole = 0
        for content, row in self._decode(self._file):
            self._check(row, content)
            whole += len(content)
            if "path" in row:
                self._count(row)
        self._file.seek(whole)
        rest = self._file.read()
        if rest.count(b"\n") > _LINES:
            raise self._unlike(f"a quote that does not end, in {rest[:80]!r}")
        last = None if self._header or not rest else _json_object(rest)  # a row of CSV may lack digits
        if last is not None:  # an editor has removed the line break
            self._check(last, rest)
            self._append(b"\n")
            self._count(last)
            return
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._append(self._header)

    def _check(self, row: dict[str, Any], content: bytes) -> None:
        if "columns" in row:
            if row["columns"] != _columns(self._top):
                raise self._unlike(f"the columns {', '.join(row['columns'])}"[:200])
        elif not isinstance(row.get("path"), str) or not ("error" in row or isinstance(row.get("predictions"), list)):
            raise self._unlike(f"the line {content[:80]!r}")
        elif row.get("model") != self._model:
            raise self._unlike(f"rows of {row.get('model')!r}")
        elif "predictions" in row:
            self._classes = self._classes or len(row["predictions"])
            if len(row["predictions"]) != self._classes:
                raise self._unlike(f"{self._classes} classes per photo, not {len(row['predictions'])}")

    def _unlike(self, received: str) -> ValueError:
        return ValueError(
            f"Expected a new file, or one to continue, with the {self._top} most likely classes of {self._model!r}. "
            f"Received: {str(self.path)!r} with {received}. Choose another file"
        )

    def _csv_row(self, result: dict[str, Any]) -> bytes:
        cells = [result["path"], result["model"], result.get("error", "")]
        for best in result.get("predictions", ()):
            cells += [best[key] for key in _OWN]
        return _csv_line(cells + [""] * (3 + self._top * len(_OWN) - len(cells)))


def _columns(top: int) -> list[str]:
    return ["path", "model", "error", *(f"{key}_{place}" for place in range(1, top + 1) for key in _OWN)]


def _json_row(result: dict[str, Any]) -> bytes:
    return json.dumps(result).encode() + b"\n"


def _json_rows(file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield line, _json_object(line) or {}


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else {}


def _csv_line(cells: list[Any]) -> bytes:
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if any("\r" in str(cell) for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file name may have any bytes


def _csv_rows(file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines, quotes, columns = [], 0, None
    for line in file:
        lines.append(line)
        quotes += line.count(b'"')
        if quotes % 2 or not line.endswith(b"\n"):  # a line break inside quotes, or a row that was cut off
            continue
        content = b"".join(lines)
        try:
            (cells,) = csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
        except (ValueError, csv.Error):  # not a row
            cells = [repr(content[:40])]
        if columns is None:
            columns = cells
            yield content, {"columns": columns}
        else:
            path, model, error, *rest = [*cells, "", "", ""][: max(3, len(cells))]
            told: dict[str, Any] = (
                {"error": error} if error else {"predictions": [each for each in rest[:: len(_OWN)] if each]}
            )
            yield content, {"path": path, "model": model} | told
        lines, quotes = [], 0


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(f"Expected a file that nothing else writes. Received: {str(path)!r}, in use") from error
    except OSError:  # a file system without locks
        return

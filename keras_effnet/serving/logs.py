"""The log of the service: a JSON object per line, on standard error."""

import json
import logging
import sys
import time
from typing import Any

from keras_effnet.errors import one_line

NAME = "keras_effnet.serving"
_LOG = logging.getLogger(NAME)


class _JsonLines(logging.Formatter):
    """Writes a record as one line. What clients send is escaped and cut."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"time": f"{moment}.{record.msecs:03.0f}Z", "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        told |= fields if fields is not None else {"message": one_line(record.getMessage())}
        if record.exc_info:
            told["error"] = one_line(self.formatException(record.exc_info)[-4000:], 4000)  # the cause is at the end
        return json.dumps(told)


def start() -> None:
    """Sends the log of the service, and warnings of the libraries, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in ((NAME, logging.INFO), (None, logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.captureWarnings(True)


def log(level: int = logging.INFO, **fields: Any) -> None:
    """Writes a line.

    Args:
        level: Integer, of `logging`. Defaults to `logging.INFO`.
        **fields: What to write. Strings of clients are cut by the caller.
    """
    _LOG.log(level, "", extra={"fields": fields})

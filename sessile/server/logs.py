"""Log lines on standard error: for people, or one JSON object a line. Fields of a line travel in `extra`."""

import logging
import sys
import time
from typing import Any

import orjson

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""Attributes that every record has; whatever else a record carries was given by the caller."""


def configure_logs(log_format: str, log_level: str) -> None:
    """Send the log of this process to standard error in the given format."""
    sink = logging.StreamHandler(sys.stderr)
    sink.setFormatter(JsonLines() if log_format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [sink]
    root.setLevel(log_level.upper())
    # uvicorn's own lines about its start and its accesses would only repeat ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave beside the message."""
    return {name: value for name, value in vars(record).items() if name not in STANDARD}


class TextLines(logging.Formatter):
    """12:00:00 INFO request rid=… session=… …"""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_shown(value)}" for name, value in fields_of(record).items() if value is not None)
        line = f"{moment} {record.levelname} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: Any) -> str:
    """A field's value on one line, whatever a client put into it."""
    text = str(value)
    return text if text.isprintable() else repr(text)


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message", fields …}"""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()

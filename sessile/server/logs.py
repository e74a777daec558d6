"""Log lines on standard error: for people, or one JSON object a line. Fields of a line travel in `extra`.

Lines leave on a thread of their own. Where they cannot, because a disk is full or a pipe has no reader, they are lost
and counted: nothing waits for them, and nothing ends for want of them.
"""

import atexit
import logging
import queue
import sys
import threading
import time
from contextvars import ContextVar
from typing import Any, TextIO

import orjson

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""Attributes that every record has; whatever else a record carries was given by the caller."""


LINES_MAX = 10_000
"""Lines that may wait to be written."""
LAST_LINES_S = 2.0
"""How long those that wait may take when the process ends."""

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the HTTP request that is being answered, for every line that is logged meanwhile."""


class LineWriter:
    """Writes lines to a stream, in order, from a thread of its own. Never raises, never blocks."""

    def __init__(self, stream: TextIO, lines_max: int = LINES_MAX) -> None:
        self.dropped = 0
        """Lines that were lost."""
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(lines_max)
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def put(self, line: str) -> None:
        """Write a line, or lose it."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def flush(self, limit_s: float = LAST_LINES_S) -> None:
        """Wait for what was put so far, but not for long."""
        deadline_s = time.monotonic() + limit_s
        while self._lines.unfinished_tasks and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the stream was closed
                self.dropped += 1
            self._lines.task_done()


class Sink(logging.Handler):
    """Formats records where they are made, and lets a LineWriter write them."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        if (asked := request_id.get()) is not None:
            record.request_id = asked
        self.writer.put(self.format(record))

    def flush(self) -> None:
        self.writer.flush()


def lines_dropped() -> int:
    """Log lines of this process that were lost."""
    return sum(handler.writer.dropped for handler in logging.getLogger().handlers if isinstance(handler, Sink))


def configure_logs(log_format: str, log_level: str) -> None:
    """Send the log of this process to standard error in the given format."""
    sink = Sink(LineWriter(sys.stderr))
    atexit.register(sink.flush)
    sink.setFormatter(JsonLines() if log_format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [sink]
    root.setLevel(log_level.upper())
    # uvicorn's own lines about its start and its accesses would only repeat ours.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))


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

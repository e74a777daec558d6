"""Log lines: one JSON object each, or one line for people."""

import errno
import io
import json
import logging
import sys
import threading
import time

import pytest

from sessile import commands
from sessile.server.logs import JsonLines, LineWriter, Sink, TextLines, configure_logs, request_id


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "sessile", "levelno": logging.INFO, "levelname": "INFO", "msg": message})
    vars(made).update(fields)
    return made


def test_a_json_line_carries_the_callers_fields_and_nothing_else() -> None:
    line = json.loads(JsonLines().format(record("request", rid="r-1", session=None, total_ms=1.5)))
    assert set(line) == {"time", "level", "logger", "message", "rid", "session", "total_ms"}
    assert (line["rid"], line["session"], line["total_ms"]) == ("r-1", None, 1.5)


def test_a_text_line_leaves_out_what_is_not_there() -> None:
    line = TextLines().format(record("request", rid="r-1", session=None))
    assert line.endswith("INFO request rid=r-1")


def test_text_lines_cannot_be_forged_by_a_clients_id() -> None:
    line = TextLines().format(record("request", rid="a\n12:00:00 ERROR forged"))
    assert "\n" not in line


def test_an_exception_comes_with_its_traceback() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        failed = record("failed", exc_info=sys.exc_info())
    assert "ValueError: broken" in TextLines().format(failed)
    assert "ValueError: broken" in json.loads(JsonLines().format(failed))["exception"]


def test_what_takes_long_is_told_once_in_a_while_to_whom_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "QUIET_S", 0)
    told: list[str] = []
    patience = commands.Patience(every_s=3600, tell=told.append)
    patience.report("loading weights, 0%")
    patience.report("loading weights, 1%")
    assert told == ["loading weights, 0%"]


class Disk(io.StringIO):
    """A stream whose disk may be full, or hang until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full = False
        self.free = threading.Event()
        self.free.set()

    def write(self, text: str) -> int:
        self.free.wait(60)
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_lines_come_out_in_order() -> None:
    disk = Disk()
    writer = LineWriter(disk)
    for n in range(100):
        writer.put(str(n))
    writer.flush()
    assert disk.getvalue().split() == [str(n) for n in range(100)]


def test_lines_that_a_full_disk_refuses_are_counted_and_the_next_ones_are_written() -> None:
    disk = Disk()
    writer = LineWriter(disk)
    disk.is_full = True
    writer.put("lost")
    writer.flush()
    disk.is_full = False
    writer.put("kept")
    writer.flush()
    assert (disk.getvalue(), writer.dropped) == ("kept\n", 1)


def test_nobody_waits_for_a_disk_that_hangs() -> None:
    disk = Disk()
    disk.free.clear()
    writer = LineWriter(disk, lines_max=3)
    started_s = time.monotonic()
    for n in range(10):
        writer.put(str(n))
    assert time.monotonic() - started_s < 1 and writer.dropped >= 6
    disk.free.set()
    writer.flush()
    assert disk.getvalue().startswith("0\n1\n2\n")


def test_a_line_names_the_request_that_it_is_about() -> None:
    disk = Disk()
    sink = Sink(LineWriter(disk))
    sink.setFormatter(JsonLines())
    token = request_id.set("r-7")
    sink.emit(record("one"))
    request_id.reset(token)
    sink.emit(record("two"))
    sink.flush()
    first, second = map(json.loads, disk.getvalue().splitlines())
    assert first["request_id"] == "r-7" and "request_id" not in second


@pytest.mark.parametrize(
    ("chosen", "other"), [("debug", logging.WARNING), ("info", logging.WARNING), ("error", logging.ERROR)]
)
def test_the_http_librarys_lines_are_bound_by_the_level_as_well(
    monkeypatch: pytest.MonkeyPatch, chosen: str, other: int
) -> None:
    root, library = logging.getLogger(), logging.getLogger("uvicorn")
    levels, handlers = (root.level, library.level), root.handlers[:]
    monkeypatch.setattr("sessile.server.logs.atexit.register", lambda act: None)
    try:
        configure_logs("text", chosen)
        assert (root.level, library.level) == (getattr(logging, chosen.upper()), other)
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        library.setLevel(levels[1])

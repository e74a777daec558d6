"""Log lines: one JSON object each, or one line for people."""

import json
import logging
import sys

import pytest

from sessile import commands
from sessile.server.logs import JsonLines, TextLines


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

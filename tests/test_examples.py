"""Every program in examples/ runs as it stands: on the embedded model, or on a served core."""

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.http.conftest import running_server
from tests.http.toy_engine import ToyEngine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def output(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text("utf-8")
    assert [path.name for path in sorted(EXAMPLES.iterdir()) if f'"{path.name}"' not in source] == []


def test_generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = output("generate.py", capsys, monkeypatch)
    assert "Paris" in shown and "is cold" in shown and "5 tokens of prompt" in shown
    assert shown.count("A short fact") == 5


def test_session(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = output("session.py", capsys, monkeypatch)
    assert "Rome" in shown and "Madrid" in shown
    assert "tokens were there" in shown and "tokens are left of" in shown


def test_stream_async(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = output("stream_async.py", capsys, monkeypatch)
    assert all(f"\nThe {animal}" in shown for animal in ("fox", "owl", "bear"))
    assert "left after" in shown


def test_client(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(partial(ToyEngine, pages=600)) as server:
        shown = output("client.py", capsys, monkeypatch, server.url)
    assert "(31 of 60 tokens were there)" in shown
    assert "refused: " in shown and "[True]" in shown

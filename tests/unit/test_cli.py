"""The command line: help, errors and exit statuses, without starting anything."""

import re
import subprocess
import sys

import pytest

from sessile import commands
from sessile.cli import COMMANDS, main
from sessile.config import Config, settings


class Calls:
    """Stands for a command; keeps what it was called with."""

    def __init__(self, status: int = 0) -> None:
        self.config: Config | None = None
        self.others: tuple[object, ...] = ()
        self.keywords: dict[str, object] = {}
        self._status = status

    def __call__(self, config: Config, *others: object, **keywords: object) -> int:
        self.config, self.others, self.keywords = config, others, keywords
        return self._status


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(commands, "serve", calls)
    return calls


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard error of a command that is refused: one line, status 2."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err


def test_flags_reach_the_command_as_configuration(serve: Calls) -> None:
    assert main(["serve", "--page-size", "1", "--port=1234"]) == 0
    assert serve.config is not None
    assert (serve.config.scheduler.page_size, serve.config.server.port) == (1, 1234)


def test_aliases_are_flags_too(serve: Calls) -> None:
    main(["serve", "--chunked-prefill-size", "128", "--context-length", "99", "--max-running-requests", "3"])
    assert serve.config is not None
    scheduler = serve.config.scheduler
    assert (scheduler.chunk_tokens, scheduler.context_tokens, scheduler.rows_max) == (128, 99, 3)


def test_the_last_of_several_equal_flags_counts(serve: Calls) -> None:
    main(["serve", "--page-size", "1", "--page-size", "2"])
    assert serve.config is not None and serve.config.scheduler.page_size == 2


def test_the_environment_reaches_the_command(serve: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSILE_PAGE_SIZE", "8")
    main(["serve"])
    assert serve.config is not None and serve.config.scheduler.page_size == 8


def test_a_wrong_flag_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown argument --pagesize=1; did you mean --page-size?" in refused(capsys, "serve", "--pagesize=1")


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown argument --page" in refused(capsys, "serve", "--page", "1")


def test_a_wrong_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'sreve'; did you mean serve?" in refused(capsys, "sreve")


def test_a_flag_without_its_value_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one argument" in refused(capsys, "serve", "--port")


def test_a_value_out_of_range_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--port must be from 0 to 65535" in refused(capsys, "serve", "--port", "65536")


def test_a_bench_without_a_name_lists_the_benches(capsys: pytest.CaptureFixture[str]) -> None:
    assert "say which: sessile bench step | history" in refused(capsys, "bench")


def test_chat_passes_its_flags_on_to_the_server_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Calls()
    monkeypatch.setattr(commands, "chat", chat)
    main(["chat", "--page-size", "1", "--temperature=0.5", "--context-length=512"])
    assert chat.others == (commands.ChatOptions(temperature=0.5),)
    assert chat.keywords == {
        "server_flags": ["--page-size=1", "--context-tokens=512"], "url": None, "api_key": None
    }  # fmt: skip


def test_chat_takes_its_key_from_the_environment_where_nobody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Calls()
    monkeypatch.setattr(commands, "chat", chat)
    monkeypatch.setenv("SESSILE_API_KEY", "sk-mine")
    main(["chat", "--url", "http://x"])
    assert chat.keywords["api_key"] == "sk-mine"


def test_the_status_of_a_command_is_the_status_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "doctor", Calls(status=1))
    assert main(["doctor"]) == 1


def test_help_shows_every_setting_with_its_unit_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for setting in settings():
        assert f"--{setting.flags[0]}" in text
    assert "--page-size TOKENS" in text and "[16]" in text


def test_help_of_the_program_lists_the_commands_but_not_the_child_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("serve", "chat", "doctor", "bench step"))
    assert "  engine" not in text


@pytest.mark.parametrize("argv", [["--help"], ["bench", "--help"]])
def test_what_a_command_is_for_stands_in_a_column_apart(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 0
    listed = {name: command.summary for name, command in COMMANDS.items() if command.summary}
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {line.rindex(listed[re.split("  +", line.strip())[0]]) for line in rows} == {20}


def test_help_needs_neither_torch_nor_a_web_framework() -> None:
    heavy = "{'torch', 'numpy', 'numba', 'fastapi', 'uvicorn', 'transformers', 'tokenizers', 'zmq', 'httpx', 'yaml'}"
    code = f"import sys, sessile.cli; print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"

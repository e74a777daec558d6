"""Shell completion as bash itself carries it out, for the commands and flags that there are."""

import subprocess
import sys
from pathlib import Path

import pytest

from sessile.cli import COMMANDS, main, parser_for
from sessile.shell import SHELLS

ASK = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
_sessile
printf '%s\\n' "${COMPREPLY[@]}"
"""
LISTED = [name for name, command in COMMANDS.items() if command.summary]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "sessile.bash"
    written = subprocess.run(
        [sys.executable, "-m", "sessile", "completion", "bash"], capture_output=True, text=True, check=True
    )
    path.write_text(written.stdout)
    return path


def completions(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    asked = ["bash", "--noprofile", "--norc", "-c", ASK, "bash", str(script), "sessile", *words]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_offers_every_command_and_no_child_process(script: Path) -> None:
    assert completions(script, "") == list(dict.fromkeys(name.split()[0] for name in LISTED))
    assert completions(script, "run") == ["run-batch"]
    assert completions(script, "eng") == []


def test_bash_offers_the_second_word_of_a_command(script: Path) -> None:
    assert completions(script, "corpus", "") == [name.split()[1] for name in LISTED if name.startswith("corpus ")]
    assert completions(script, "bench", "thr") == ["throughput"]
    assert completions(script, "completion", "b") == ["bash"]


@pytest.mark.parametrize("name", LISTED)
def test_bash_offers_every_flag_of_a_command(script: Path, name: str) -> None:
    flags = [flag.name for flag in parser_for(name).command_line(name, "").flags]
    assert completions(script, *name.split(), "--") == flags
    assert "--help" in flags and "--exit-with-stdin" not in flags


def test_bash_offers_the_values_of_a_choice_in_both_forms(script: Path) -> None:
    assert completions(script, "serve", "--load-format", "") == ["auto", "dummy"]
    assert completions(script, "serve", "--load-format", "=") == ["auto", "dummy"]
    assert completions(script, "serve", "--load-format", "=", "d") == ["dummy"]


def test_bash_leaves_a_value_that_may_be_anything_to_file_names(script: Path) -> None:
    assert completions(script, "serve", "--config", "") == []
    assert "-o default" in script.read_text()


def test_bash_goes_on_with_flags_behind_a_flag_without_value(script: Path) -> None:
    assert completions(script, "corpus", "add", "--replace", "--o") == ["--own"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name in LISTED:
        for flag in parser_for(name).command_line(name, "").flags:
            assert flag.name in text or f"-l {flag.name.removeprefix('--')}" in text


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'tcsh'" in error and error.count("\n") == 1

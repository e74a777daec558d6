"""The examples of the README, run as they stand against a real server with the embedded model."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SHOWN_ADDRESS = "127.0.0.1:30000"
START_TIMEOUT_S = 240


def example(language: str, word: str) -> str:
    """The one fenced block of a language that contains a word."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if word in block]
    assert len(found) == 1, f"the README has {len(found)} {language} examples with {word!r}"
    return str(found[0])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as `make serve ARGS="--speculate on"` starts it, on a port of its own."""
    where = f"127.0.0.1:{free_port()}"
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--port", where.split(":")[1], "--audit-level", "2", "--speculate", "on"]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "sessile", "serve", *flags], stdout=sink, stderr=sink, cwd=ROOT
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(where):
            assert process.poll() is None, f"the server ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"the server did not start: {log.read_text()}"
            time.sleep(0.2)
        yield where
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()


def answers(where: str) -> bool:
    try:
        return httpx.get(f"http://{where}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def run(command: list[str], source: str, where: str) -> str:
    """What an example prints, run against the server at `where`."""
    done = subprocess.run(
        [*command, source.replace(SHOWN_ADDRESS, where)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def json_values(text: str) -> list[Any]:
    """JSON values that follow one another without separator, as several curls print them."""
    decoder = json.JSONDecoder()
    values = []
    rest = text.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        values.append(value)
        rest = rest[end:].strip()
    return values


def test_the_curl_example_of_chat_answers_paris(address: str) -> None:
    (answer,) = json_values(run(["bash", "-ec"], example("bash", "/v1/chat/completions"), address))
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_the_openai_example_streams_an_answer(address: str) -> None:
    assert len(run([sys.executable, "-c"], example("python", "OpenAI("), address).split()) > 3


def test_the_session_example_computes_only_what_is_new(address: str) -> None:
    name, first, second, view = json_values(run(["bash", "-ec"], example("bash", "/open_session"), address))
    assert name == view["id"] == "tour"
    history_tokens = first["meta_info"]["prompt_tokens"] + first["meta_info"]["completion_tokens"]
    assert second["meta_info"]["cached_tokens"] == history_tokens - 1
    assert view["tokens"] == second["meta_info"]["prompt_tokens"] + second["meta_info"]["completion_tokens"]


def test_the_example_in_python_says_paris_and_computes_only_what_is_new() -> None:
    printed = run([sys.executable, "-c"], example("python", "LLM("), SHOWN_ADDRESS)
    assert "Paris" in printed and re.search(r"Rome\W.* \d+$", printed.strip())


def test_the_corpus_example_adds_shows_and_removes_a_corpus(address: str) -> None:
    lines = example("bash", "corpus add").splitlines()
    commands = [line.replace(".venv/bin/sessile", f"{sys.executable} -m sessile") for line in lines]
    assert len(commands) == 3 and commands != lines
    listed = run(["bash", "-ec"], "\n".join(f"{each} --url http://{SHOWN_ADDRESS}" for each in commands), address)
    assert re.search(r"^manual +ready ", listed, re.MULTILINE)
    assert httpx.get(f"http://{address}/v1/corpora").json()["data"] == []

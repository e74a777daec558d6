"""The examples of the README and of the guides, run as they stand against a real server with the embedded model."""

import json
import os
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

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
GUIDES = {name: (ROOT / "docs" / name).read_text("utf-8") for name in ("SESSIONS.md", "SPECULATION.md")}
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON_EXAMPLES = [
    pytest.param(source, id=f"{path.name}-{index}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for index, source in enumerate(PYTHON_BLOCK.findall(path.read_text("utf-8")))
]
MARK = "---- next block ----"
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


def run(command: list[str], source: str, where: str, folder: Path | None = None) -> str:
    """What an example prints, run against the server at `where`."""
    done = subprocess.run(
        [*command, source.replace(SHOWN_ADDRESS, where)],
        capture_output=True, text=True, timeout=240, check=False, cwd=folder,
    )  # fmt: skip
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


@pytest.mark.parametrize("source", PYTHON_EXAMPLES)
def test_every_python_example_of_a_document_runs_as_it_stands_and_prints(address: str, source: str) -> None:
    assert run([sys.executable, "-c"], source, address, ROOT).strip()


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


# -- the guides, each page in one shell --------------------------------------------------------------------------------


def blocks_of(page: str, where: str, folder: Path) -> list[str]:
    """What each block of commands of a guide prints, run one after the other."""
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDES[page], re.MULTILINE | re.DOTALL)
    script = f"echo; echo '{MARK}'\n".join(blocks)
    return run(["bash", "-euo", "pipefail", "-c"], script, where, folder).split(f"{MARK}\n")


@pytest.fixture(scope="module")
def sessions(address: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return blocks_of("SESSIONS.md", address, tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def speculation(address: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return blocks_of("SPECULATION.md", address, tmp_path_factory.mktemp("speculation"))


def test_the_guide_to_sessions_asks_with_the_history_in_place(sessions: list[str]) -> None:
    opened, read, answer = json_values(sessions[0])
    (asked,) = json_values(sessions[1])
    assert opened["tokens"] == 0
    assert answer["meta_info"]["cached_tokens"] == read["tokens"] - 1
    assert asked["tokens"] == answer["meta_info"]["session_tokens"] == asked["kv_tokens"] + 1


def test_the_fork_of_the_guide_shares_full_pages_and_leaves_its_parent_as_it_was(sessions: list[str]) -> None:
    (before,) = json_values(sessions[1])
    fork, answer, parent = json_values(sessions[2])
    assert fork["shared_pages"] == fork["kv_tokens"] // 16 > 0
    assert answer["meta_info"]["cached_tokens"] == parent["tokens"] - 1
    assert (parent["tokens"], parent["turns"]) == (before["tokens"], before["turns"])


def test_the_rewind_of_the_guide_leads_back_to_the_end_of_the_first_turn(sessions: list[str]) -> None:
    read = json_values(sessions[0])[1]
    (rewound,) = json_values(sessions[3])
    assert (rewound["tokens"], rewound["turns"]) == (read["tokens"], 1)


def test_the_turn_that_the_guide_tears_leaves_the_history_as_it_was(sessions: list[str]) -> None:
    (rewound,) = json_values(sessions[3])
    said, view = sessions[4].split("\n", 1)
    (after,) = json_values(view)
    assert said == "hung up"
    assert [after[name] for name in ("tokens", "kv_tokens", "turns")] == [rewound["tokens"], rewound["tokens"] - 1, 1]


def test_the_guide_is_told_the_real_length_of_the_history(sessions: list[str]) -> None:
    (rewound,), (refusal,) = json_values(sessions[3]), json_values(sessions[5])
    assert f"has {rewound['tokens']} tokens, not 3" in refusal["error"]["message"]


def test_the_pool_that_the_guide_shows_adds_up_and_the_sessions_end(sessions: list[str]) -> None:
    (pool,), closed = json_values(sessions[6]), json_values(sessions[7])
    assert sum(pages for owner, pages in pool["pages"].items() if owner != "total") == pool["pages"]["total"]
    assert [(each["id"], each["closed"]) for each in closed] == [("dogs", True), ("pets", True)]


def test_the_guide_to_speculation_gets_the_same_text_with_and_without_drafts(speculation: list[str]) -> None:
    (loaded,), (drafted, plain) = json_values(speculation[0]), json_values(speculation[1])
    assert loaded["success"] and drafted["text"] == plain["text"]
    assert drafted["meta_info"]["completion_tokens"] == plain["meta_info"]["completion_tokens"] == 24


def test_the_figures_that_the_guide_names_are_those_of_an_answer_and_add_up(speculation: list[str]) -> None:
    told = json_values(speculation[1])[0]["meta_info"]
    named = set(re.findall(r"^\| `(spec_\w+)`", GUIDES["SPECULATION.md"], re.MULTILINE))
    assert named == {name for name in told if name.startswith("spec_")}
    assert told["completion_tokens"] == told["spec_verify_ct"] + told["spec_accept_token_num"]
    corpus, figures = speculation[2].split("sessile_drafts", 1)
    used = told["spec_sources"].get("corpus:count", {"drafts_offered": 0, "drafts_accepted": 0})
    assert json_values(corpus)[0].items() >= used.items()
    assert "sessile_drafts_accepted_total" in f"sessile_drafts{figures}"


def test_the_corpus_of_the_guide_is_gone_at_its_end(address: str, speculation: list[str]) -> None:
    assert json_values(speculation[3])[0]["success"]
    assert "count" not in {each["id"] for each in httpx.get(f"http://{address}/v1/corpora").json()["data"]}


def test_the_page_on_python_answers_a_file_of_requests_and_completes_commands(address: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "PYTHON.md").read_text("utf-8")
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "default", "prompt": "Hi"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    for folder in (".zfunc", ".config/fish/completions", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    program = tmp_path / "bin" / "sessile"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sessile "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "SESSILE_CONTEXT_TOKENS": "512", "SESSILE_KV_MEMORY": "64M",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{script}\ncomplete -p sessile".replace(SHOWN_ADDRESS, address)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 answered" in done.stderr and "1 were done before" in done.stderr
    assert "_sessile" in done.stdout
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"]["status_code"] == 200
    assert "compdef" in (tmp_path / ".zfunc" / "_sessile").read_text()
    assert "complete -c sessile" in (tmp_path / ".config" / "fish" / "completions" / "sessile.fish").read_text()

"""`sessile run-batch`: rows answered once, whatever ends a run, and every bad line told by its number."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sessile.cli import main
from sessile.contract.messages import Done
from tests.http.conftest import Running, running_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def row(custom_id: str, prompt: str = "hi", **fields: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": prompt, "max_tokens": 8}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | fields


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return path


def run(server: Running, folder: Path, *flags: str) -> int:
    return main(["run-batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--url", server.url, *flags])


def answers(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "out.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def prompts(server: Running) -> list[str]:
    return [bytes(memoryview(submit.tokens).cast("i").tolist()).decode() for submit in server.engine.submits()]


def test_every_row_gets_an_answer_as_openai_has_them(
    server: Running, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    write(folder, row("a", "one"), row("b", "two"), row("c", url="/v1/chat/completions", body=chat))
    assert run(server, folder) == 0
    by_id = {each["custom_id"]: each for each in answers(folder)}
    assert set(by_id) == {"a", "b", "c"}
    assert by_id["a"]["error"] is None and by_id["a"]["response"]["status_code"] == 200
    assert by_id["b"]["response"]["body"]["choices"][0]["text"] == "two"
    assert by_id["c"]["response"]["body"]["object"] == "chat.completion"
    assert by_id["c"]["response"]["request_id"] == by_id["c"]["response"]["body"]["id"]
    assert "3 rows: 3 answered, 0 refused, 0 bad lines" in capsys.readouterr().err


def test_one_at_a_time_answers_are_in_the_order_of_the_rows(server: Running, folder: Path) -> None:
    write(folder, *(row(f"row {number}") for number in range(20)))
    assert run(server, folder, "--concurrency=1") == 0
    assert [each["custom_id"] for each in answers(folder)] == [f"row {number}" for number in range(20)]


def test_what_is_done_is_not_done_again(server: Running, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, row("a", "one"), "not json", row("b", "two"))
    run(server, folder)
    before = (folder / "out.jsonl").read_bytes()
    assert run(server, folder) == 0
    assert (folder / "out.jsonl").read_bytes() == before
    assert "3 rows: 3 were done before, 0 answered" in capsys.readouterr().err
    write(folder, row("a", "one"), "not json", row("b", "two"), row("c", "three"))
    assert run(server, folder) == 0
    assert sorted(prompts(server)) == ["one", "three", "two"]
    assert len(answers(folder)) == 4


def test_a_torn_last_line_is_taken_off_and_its_row_done_again(server: Running, folder: Path) -> None:
    write(folder, row("a", "one"), row("b", "two"))
    run(server, folder, "--concurrency=1")
    whole = (folder / "out.jsonl").read_bytes()
    first_bytes = whole.index(b"\n") + 1
    for torn_bytes in (first_bytes + 1, len(whole) - 1, 5):
        (folder / "out.jsonl").write_bytes(whole[:torn_bytes])
        assert run(server, folder, "--concurrency=1") == 0
        assert [each["custom_id"] for each in answers(folder)] == ["a", "b"]


def test_a_bad_line_is_told_by_its_number_and_the_others_are_done(server: Running, folder: Path) -> None:
    write(
        folder, row("a"), "{", "[]", row("a"), row("b", method="GET"), row("c", url="/v1/sessions"), "",
        row("d", body=[]), row("e", body={"stream": True}), row("f", priority=1), row("g"),
    )  # fmt: skip
    assert run(server, folder) == 0
    found = answers(folder)
    bad = {each["id"]: each["error"] for each in found if each["error"]}
    assert {each["custom_id"] for each in found if each["response"]} == {"a", "g"}
    assert {name: error["code"] for name, error in bad.items()} == {
        "batch_req_2": "invalid_json", "batch_req_3": "invalid_line", "batch_req_4": "duplicate_custom_id",
        "batch_req_5": "invalid_line", "batch_req_6": "invalid_line", "batch_req_8": "invalid_line",
        "batch_req_9": "invalid_line", "batch_req_10": "invalid_line",
    }  # fmt: skip
    assert "line 4 has the custom_id of line 1" in bad["batch_req_4"]["message"]
    assert "line 5: method" in bad["batch_req_5"]["message"]
    assert "body.stream" in bad["batch_req_9"]["message"]


def test_what_the_server_refuses_is_an_answer_with_its_status(server: Running, folder: Path) -> None:
    write(folder, row("a", body={"model": "default", "prompt": "x", "temperature": -1}), row("b"))
    assert run(server, folder) == 0
    refused = next(each for each in answers(folder) if each["custom_id"] == "a")
    assert (refused["error"], refused["response"]["status_code"]) == (None, 400)
    assert "temperature" in refused["response"]["body"]["error"]["message"]


def test_a_limit_is_waited_out(server: Running, folder: Path) -> None:
    server.engine.refusals.append(Done(key=0, reason="error", status=429, code="limit_reached", message="full"))
    write(folder, row("a"), row("b"))
    assert run(server, folder) == 0
    assert [each["response"]["status_code"] for each in answers(folder)] == [200, 200]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["run-batch", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_wrong_files_are_one_line(server: Running, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write(folder, row("a")))
    there = ("--url", server.url)
    assert "cannot read" in refused(capsys, str(folder / "nowhere"), str(folder / "out"), *there)
    assert "cannot write" in refused(capsys, source, str(folder / "no" / "out"), *there)
    (folder / "notes").write_text("my notes\n")
    assert "line 1, is no answer of a batch" in refused(capsys, source, str(folder / "notes"), *there)
    assert (folder / "notes").read_text() == "my notes\n"
    run(server, folder)
    capsys.readouterr()
    write(folder, row("another"))
    error = refused(capsys, source, str(folder / "out.jsonl"), *there)
    assert "answers to rows that the input has not, such as 'custom_id a'" in error
    assert "required: IN, OUT" in refused(capsys)


@pytest.fixture
def slow() -> Iterator[Running]:
    with running_server() as server:
        server.engine.token_interval_s = 0.02
        yield server


def test_a_batch_that_is_killed_goes_on_where_it_was(slow: Running, folder: Path) -> None:
    write(folder, *(row(f"row {number}", f"prompt {number}") for number in range(30)))
    command = [sys.executable, "-m", "sessile", "run-batch", "in.jsonl", "out.jsonl", "--url", slow.url]
    killed = subprocess.Popen([*command, "--concurrency=2"], cwd=folder, env={"PYTHONPATH": str(ROOT)})
    out = folder / "out.jsonl"
    slow.wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
    slow.engine.pause()
    other = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1) and "another batch writes" in other.stderr
    killed.kill()
    killed.wait(60)
    slow.engine.token_interval_s = 0.0
    slow.engine.resume()
    done = out.read_bytes().count(b"\n")
    assert 3 <= done < 30
    sent = len(prompts(slow))
    assert run(slow, folder) == 0
    assert sorted(each["custom_id"] for each in answers(folder)) == sorted(f"row {number}" for number in range(30))
    assert len(prompts(slow)) - sent == 30 - done


def test_a_server_that_dies_ends_the_batch_with_what_was_answered(
    slow: Running, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, *(row(f"row {number}") for number in range(30)))
    out = folder / "out.jsonl"

    def kill() -> None:
        slow.wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
        slow.engine.fail("out of memory")

    killer = threading.Thread(target=kill)
    killer.start()
    assert run(slow, folder, "--concurrency=1", "--patience-s=0.2") == 1
    killer.join()
    assert "run the same command again for the rest" in capsys.readouterr().err
    assert 3 <= len(answers(folder)) < 30

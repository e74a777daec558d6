"""What scripts/fuzz.py feeds: each target takes its seeds, and refuses some changes of them as documented."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from scripts import fuzz_http
from scripts.fuzz import TARGETS, Recorder, open_target
from scripts.fuzzing.mutations import mutated_bytes, mutated_json
from scripts.fuzzing.requests import SERVER_ERRORS
from scripts.fuzzing.target import refusing
from sessile.errors import InvalidRequest

SEEDS, CHANGES = 10, 10
"""Of each target; together they take a second or two."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_and_their_changes(tmp_path: Path, name: str) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "findings").mkdir()
    target, rng = open_target(name, tmp_path / "files"), Random(7)
    try:
        seeds = target.seeds()
        few = seeds if len(seeds) <= SEEDS else rng.sample(seeds, SEEDS)
        for raw in few:
            target.run(raw)
        recorder = Recorder(target.run, tmp_path / "findings")
        for _ in range(CHANGES):
            recorder(target.mutated(rng.choice(few), rng))
    finally:
        target.close()
    assert recorder.calls == CHANGES and list((tmp_path / "findings").iterdir()) == []


def test_what_is_no_documented_refusal_is_written_down_once_for_each_place(tmp_path: Path) -> None:
    def run(raw: bytes) -> None:
        if raw == b"refused":
            with refusing(InvalidRequest):
                raise InvalidRequest("no")
        elif raw:
            raise KeyError(raw)

    recorder = Recorder(run, tmp_path)
    for raw in (b"", b"refused", b"one", b"two"):
        recorder(raw)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]


def test_a_refusal_that_cannot_be_sent_is_a_finding() -> None:
    with pytest.raises(UnicodeEncodeError), refusing(InvalidRequest):
        raise InvalidRequest("half a pair: \ud800")
    with pytest.raises(AssertionError, match="5000 characters"), refusing(InvalidRequest):
        raise InvalidRequest("x" * 5000)


def test_the_same_seed_makes_the_same_change() -> None:
    raw = b'{"a": [1, {"b": "c"}], "d": null}'
    for mutate in (mutated_bytes, mutated_json):
        changes = [mutate(raw, Random(seed)) for seed in range(50)]
        assert changes == [mutate(raw, Random(seed)) for seed in range(50)] and len(set(changes)) > 40


@pytest.mark.long
def test_a_live_server_is_sent_some_and_answers_all(capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz_http.main(["--requests", "1600"]) == 0
    said = capfd.readouterr().out
    assert "1600 requests in" in said and "0 findings" in said


def streamed(event: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


def test_what_a_live_server_must_not_do_is_a_finding(tmp_path: Path) -> None:
    replies = {
        b"/fails": b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n",
        b"/cuts": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"/hangs-up": b"",
        **{b"/%d" % number: streamed(b'{"error":{' + words + b"}}") for number, words in enumerate(SERVER_ERRORS)},
        b"/is-good": streamed(b'{"type":"response.completed"}'),
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(replies[(await reader.readline()).split()[1]])
        writer.close()

    async def send(path: bytes, findings: fuzz_http.Findings) -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await fuzz_http.send_one(port, b"GET " + path + b"\n\n", findings)

    for path in replies:
        findings = fuzz_http.Findings(tmp_path)
        asyncio.run(send(path, findings))
        assert len(findings.kept) == (path != b"/is-good"), path

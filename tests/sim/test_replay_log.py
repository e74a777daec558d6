"""What a server was asked can be played to the core again, from a log that says nothing about anybody."""

import json
from pathlib import Path

import msgspec
import pytest

from sessile.contract.messages import (
    Batch,
    Branch,
    Cancel,
    CommittedTurn,
    Done,
    DropTurn,
    ForkSession,
    OpenSession,
    RestoreSession,
    RewindSession,
    Sampling,
    Submit,
    ToEngine,
    pack_tokens,
)
from sessile.core.marks import Mark
from sessile.errors import StartupError
from sessile.server.request_log import RequestLog
from sessile.sim.log_lines import RestoreLine, SubmitLine, read_log
from sessile.sim.replay import replay, tokens_of
from sessile.sim.run import main
from sessile.sim.simulation import Simulation
from sessile.sim.world import make_world
from tests.http.fake_engine import READY

SECRET_SESSION, SECRET_TENANT = "c0ffee" * 4, "acme"


def logged(path: Path, *messages: ToEngine | Batch) -> Path:
    log = RequestLog(path)
    log.note_ready(msgspec.structs.replace(READY, queue_max=100))
    for message in messages:
        (log.note_batch if isinstance(message, Batch) else log.note_sent)(message)
    log.close()
    return path


def submit(key: int, tokens: list[int], session: str | None = None) -> Submit:
    sampling = Sampling(seed=key, max_new_tokens=9)
    return Submit(key=key, tokens=pack_tokens(tokens), sampling=sampling, tenant=SECRET_TENANT, session=session)


def conversation() -> list[ToEngine | Batch]:
    prompt = list(range(100))
    return [
        OpenSession(op=1, session=SECRET_SESSION, tenant=SECRET_TENANT),
        submit(1, prompt, SECRET_SESSION),
        submit(2, [*prompt[:80], 7]),
        Batch(step=1, done=[Done(key=1, reason="stop", completion_tokens=5), Done(key=2, reason="length")]),
        submit(3, [4, 4], SECRET_SESSION),
        Cancel(3),
        RewindSession(op=2, session=SECRET_SESSION, tenant=SECRET_TENANT, to_tokens=40),
        ForkSession(op=3, session=SECRET_SESSION, child="fork", tenant=SECRET_TENANT),
        submit(4, [5], "fork"),
    ]


def test_a_log_names_nobody_and_holds_no_token(tmp_path: Path) -> None:
    text = logged(tmp_path / "log", *conversation()).read_text()
    assert SECRET_SESSION not in text and SECRET_TENANT not in text and "fork" in text
    tokens = [value for line in map(json.loads, text.splitlines()) for value in line.values() if value == [4, 4]]
    assert tokens == []


def test_prompts_that_begin_alike_are_told_and_nothing_more(tmp_path: Path) -> None:
    lines = [line for line in read_log(logged(tmp_path / "log", *conversation())) if isinstance(line, SubmitLine)]
    first, second = lines[0].prefixes, lines[1].prefixes
    assert first[0] == second[0] and first[1] != second[1]
    alike = [a == b for a, b in zip(tokens_of(first, 100), tokens_of(second, 81), strict=False)]
    assert all(alike[:64]) and not all(alike[64:])


def test_a_log_is_replayed_with_every_checker_looking(tmp_path: Path) -> None:
    report = replay(read_log(logged(tmp_path / "log", *conversation())))
    assert report.failure is None, report.failure
    assert report.totals["Submit"] == 4 and report.totals["ForkSession"] == 1 and report.steps > 0


@pytest.mark.parametrize("seed", [3, 11, 27])
def test_what_a_simulation_sent_can_be_logged_and_replayed(tmp_path: Path, seed: int) -> None:
    sent = Simulation(make_world(seed, frozenset({"cancel", "fork", "close"}))).run(150).script
    path = logged(tmp_path / "log", *(message for turn in sorted(sent) for message in sent[turn]))
    report = replay(read_log(path))
    assert report.failure is None, report.failure
    assert report.totals["Submit"] == sum(isinstance(each, Submit) for turn in sent.values() for each in turn)


def branching(key: int, rid: str, parent: str | None, session: str = "b") -> Submit:
    return msgspec.structs.replace(submit(key, [key] * 9, session), rid=rid, branch=Branch(parent=parent))


def ended(*keys: int) -> Batch:
    return Batch(step=1, done=[Done(key=key, reason="length", completion_tokens=4) for key in keys])


def test_turns_that_were_dropped_are_dropped_again(tmp_path: Path) -> None:
    path = logged(
        tmp_path / "log",
        OpenSession(op=1, session="b", tenant=SECRET_TENANT, branching=True),
        branching(1, "root", None), ended(1), branching(2, "leaf", "root"), ended(2),
        DropTurn(2, "b", "root", SECRET_TENANT),
        branching(3, "late", "root"),
    )  # fmt: skip
    report = replay(read_log(path))
    assert report.failure is None, report.failure
    assert (report.totals["dropped turns"], report.totals["refused 400"]) == (1, 1), "nothing goes on from it"


def test_answers_to_one_prompt_are_a_group_again(tmp_path: Path) -> None:
    prompt = list(range(100))
    path = logged(tmp_path / "log", *(msgspec.structs.replace(submit(key, prompt), group=7) for key in (1, 2, 3)))
    report = replay(read_log(path))
    assert report.failure is None, report.failure
    assert report.totals[f"mark: {Mark.LEADER_COPIED.value}"] == 2


def test_what_another_engine_restored_goes_on_without_kv_and_the_rest_is_gone(tmp_path: Path) -> None:
    opened = [OpenSession(op=1, session=name, tenant=SECRET_TENANT) for name in ("kept", "lost")]
    turn = CommittedTurn(rid="root", tokens=pack_tokens([1, 2, 3]), input_end=2)
    restored = RestoreSession(op=2, opening=opened[0], tokens=pack_tokens([5] * 44), turn_ends=(44,), nodes=(turn,))
    log = RequestLog(tmp_path / "log")
    for part in (
        [*opened, submit(1, [5] * 40, "kept"), ended(1), submit(2, [6] * 9), submit(3, [6] * 9, "lost")],
        [restored, OpenSession(op=3, session="lost", tenant=SECRET_TENANT), submit(4, [7], "kept"), ended(4)],
    ):
        log.note_ready(msgspec.structs.replace(READY, queue_max=100))
        for message in part:
            (log.note_batch if isinstance(message, Batch) else log.note_sent)(message)
    log.close()
    path = tmp_path / "log"
    lines = read_log(path)
    (told,) = [line for line in lines if isinstance(line, RestoreLine)]
    (written,) = [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "restore"]
    assert written["turns"] == [{"turn": 1, "parent": None, "base_tokens": 0, "tokens": 3}] and told.tokens == 44
    report = replay(lines)
    assert report.failure is None, report.failure
    assert (report.totals["CancelAll"], report.totals["Flush"] >= 1, report.totals["refused 400"]) == (1, True, 0)


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = logged(tmp_path / "log", *conversation())
    too_deep = '{"at_s": 9, "kind": "flush", "x": ' + "[" * 100_000
    path.write_text(path.read_text() + too_deep + '\n{"at_s": 9.1, "kind": "subm')
    assert main(["replay", str(path)]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("{}\nnonsense\n")
    with pytest.raises(StartupError, match="no request log"):
        read_log(path)
    with pytest.raises(StartupError, match="cannot write --request-log"):
        RequestLog(tmp_path)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("engine", "pages_total", 1e9), ("engine", "rows_max", 0), ("submit", "key", "1"), ("submit", "prefixes", [None]),
     ("open", "idle_timeout_s", "soon"), ("done", "completion_tokens", -1), ("rewind", "at_s", -1.0)],
)  # fmt: skip
def test_a_line_that_says_something_impossible_is_refused_with_its_number(
    tmp_path: Path, kind: str, field: str, value: object
) -> None:
    path = logged(tmp_path / "log", *conversation())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(number for number, line in enumerate(lines, 1) if line["kind"] == kind)
    lines[number - 1][field] = value
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(StartupError, match=f"line {number}: .*{field}"):
        read_log(path)

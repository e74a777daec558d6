"""`sessile bench sessions` puts the same conversations to a server twice and says what each turn cost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sessile.bench.client import percentile
from sessile.bench.sessions import SessionBenchOptions, Summary, TurnTimes, measure_sessions
from sessile.contract.messages import CloseSession, Done, OpenSession, unpack_tokens
from sessile.errors import StartupError
from tests.http.conftest import Running

SMALL = SessionBenchOptions(
    conversations=2, turns=3, first_tokens=20, added_tokens=4, generated_tokens=5, lowest_id=1, highest_id=255
)


def test_resending_grows_and_a_session_sends_only_what_is_new(server: Running) -> None:
    assert measure_sessions(replace(SMALL, url=server.url, mode="resend")) == 0
    resent = [len(unpack_tokens(submit.tokens)) for submit in server.engine.submits()]
    assert sorted(resent) == [20] * 4 + [29] * 4 + [38] * 2  # the warm-up has two turns of as many conversations
    server.engine.received.clear()
    assert measure_sessions(replace(SMALL, url=server.url, mode="session")) == 0
    sent = [len(unpack_tokens(submit.tokens)) for submit in server.engine.submits()]
    assert sorted(sent) == [4] * 6 + [20] * 4


def test_one_mode_leaves_nothing_in_a_cache_that_would_help_the_other(server: Running) -> None:
    measure_sessions(replace(SMALL, url=server.url))
    submits = server.engine.submits()
    resent = {submit.tokens[:80] for submit in submits if submit.session is None}
    in_sessions = {submit.tokens[:80] for submit in submits if submit.session is not None and len(submit.tokens) == 80}
    assert len(resent) == len(in_sessions) == 4
    assert resent.isdisjoint(in_sessions)


def test_the_same_seed_asks_the_same_again(server: Running) -> None:
    asked = []
    for _ in range(2):
        measure_sessions(replace(SMALL, url=server.url, mode="resend"))
        asked.append(sorted(submit.tokens for submit in server.engine.submits()))
        server.engine.received.clear()
    assert asked[0] == asked[1]


def test_every_session_is_closed(server: Running) -> None:
    measure_sessions(replace(SMALL, url=server.url, mode="session"))
    opened = [message.session for message in server.engine.received if isinstance(message, OpenSession)]
    closed = [message.session for message in server.engine.received if isinstance(message, CloseSession)]
    assert len(opened) == 4
    assert sorted(opened) == sorted(closed)


def test_the_table_and_the_file_have_every_mode(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    measure_sessions(replace(SMALL, url=server.url, json=str(path)))
    shown = capsys.readouterr().out
    assert "resend" in shown
    assert "session" in shown
    report = json.loads(path.read_text())
    assert [summary["mode"] for summary in report["summaries"]] == ["resend", "session"]
    assert len(report["turns"]["session"]) == 6
    # History before the last turn: 20 + 5 + 4 + 5 tokens, of which all but the last are there.
    assert report["summaries"][1]["last_cached_tokens"] == 33
    assert report["summaries"][1]["last_prompt_tokens"] == 38
    assert 0 < report["summaries"][1]["first_token_ms_mean"] <= report["summaries"][1]["turn_ms_mean"]


def test_a_summary_leaves_the_first_turn_out_and_tells_head_from_tail() -> None:
    times = [TurnTimes(0, turn, 0.001 * turn, 0.01 * turn, 100 * turn, 50 * turn) for turn in range(20)]
    summary = Summary.of("session", 20, times, run_s=1.0)
    assert summary.head_ms == pytest.approx(15)  # turns 1 and 2
    assert summary.tail_ms == pytest.approx(185)  # turns 18 and 19
    assert summary.turn_ms_mean == pytest.approx(100)
    assert summary.first_turn_first_token_ms == 0
    assert (summary.last_prompt_tokens, summary.last_cached_tokens) == (1900, 950)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(200)), 0.99) == 198
    assert percentile([7.0], 0.99) == 7.0


def test_no_server_is_told_in_one_line() -> None:
    with pytest.raises(StartupError, match="http://127.0.0.1:9 cannot be reached") as caught:
        measure_sessions(replace(SMALL, url="http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)


def test_a_refusal_by_the_server_is_passed_on(server: Running) -> None:
    server.engine.refusals.append(Done(key=0, reason="error", status=413, message="beyond the context length"))
    with pytest.raises(StartupError, match="beyond the context length"):
        measure_sessions(replace(SMALL, url=server.url, mode="resend"))


def test_an_empty_range_of_ids_is_refused() -> None:
    with pytest.raises(StartupError, match="--highest-id"):
        measure_sessions(replace(SMALL, lowest_id=9, highest_id=9))


def test_an_unwritable_report_is_refused(server: Running, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot write --json"):
        measure_sessions(replace(SMALL, url=server.url, mode="resend", json=str(tmp_path / "no" / "report.json")))

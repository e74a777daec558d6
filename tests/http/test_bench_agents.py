"""`sessile bench agents` puts the same agents to a server twice, checks every token and says what was computed."""

import asyncio
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sessile.bench.agent_clients import Agent, AgentTurn, InSession, Prompts
from sessile.bench.agent_plans import AgentPlan, AgentShape, Turn, plan_agent
from sessile.bench.agents import AgentBenchOptions, Outcome, measure_agents
from sessile.bench.client import Generated, connected
from sessile.errors import StartupError
from tests.http.conftest import Running, running_server
from tests.http.toy_engine import CONTEXT_TOKENS, ToyEngine

pytestmark = pytest.mark.long

SMALL = AgentBenchOptions(
    sessions=4, turns_median=6, turns_sigma=0.3, first_share=0.2, tool_share=0.05, generated_tokens=6,
    pause_scale=0.001, sub_agent_share=0.4, lowest_id=0, highest_id=255, require_equal="on", seed=3,
)  # fmt: skip
ROOMY_PAGES, TIGHT_PAGES = 2000, 140


@pytest.fixture(scope="module")
def roomy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=ROOMY_PAGES)) as running:
        yield running


def measured(running: Running, path: Path, **changes: object) -> dict:
    """Summaries of a run by mode, once it has ended well."""
    assert measure_agents(replace(SMALL, url=running.url, json=str(path), **changes)) == 0
    return {summary["mode"]: summary for summary in json.loads(path.read_text())["summaries"]}


def test_where_all_fits_sessions_compute_nothing_twice(roomy: Running, tmp_path: Path) -> None:
    summaries = measured(roomy, tmp_path / "report.json")
    assert summaries["session"]["computed_again_tokens"] == 0
    assert summaries["resend"]["computed_again_tokens"] > 0
    assert summaries["session"]["turns"] == summaries["resend"]["turns"] > 24


@pytest.mark.parametrize("context_full", ["rewind", "reopen"])
def test_agents_that_do_not_fit_say_in_sessions_what_they_say_resent(tmp_path: Path, context_full: str) -> None:
    with running_server(partial(ToyEngine, pages=TIGHT_PAGES)) as tight:
        changes = {"tool_share": 0.15, "turns_median": 12, "context_full": context_full}
        summaries = measured(tight, tmp_path / "report.json", **changes)
        plans = [plan_agent(replace(SMALL, **changes), CONTEXT_TOKENS, index) for index in range(SMALL.sessions)]
        assert any(turn.starts_over for plan in plans for turn in plan.turns)
        assert sum(plan.tokens_max for plan in plans) > 2 * 4 * TIGHT_PAGES
        assert summaries["session"]["computed_again_tokens"] > 0
        pool = tight.client.get("/v1/pool").json()
        assert pool["sessions"]["open"] == pool["rows"]["held"] == pool["pages"]["requests"] == 0


def test_the_table_fits_a_terminal_of_80_columns(roomy: Running, capsys: pytest.CaptureFixture[str]) -> None:
    measure_agents(replace(SMALL, url=roomy.url))
    shown = capsys.readouterr().out
    assert "time to first token, p99" in shown and "computed again" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_history_that_another_client_changed_ends_the_run_naming_the_turn(roomy: Running) -> None:
    class Meddled(InSession):
        async def say(self, added: Sequence[int], generated: int) -> Generated:
            reply = await asyncio.to_thread(
                roomy.client.post, f"/v1/sessions/{self._session}/append", json={"input_ids": [1]}
            )
            assert reply.status_code == 200
            return await super().say(added, generated)

    async def run() -> None:
        async with connected(roomy.url) as server:
            plan = AgentPlan(7, (Turn(5, 3, 0.0),), 8)
            conversation = await Meddled.open(server, reopens=False)
            await Agent(plan, conversation, Prompts(1, 0, 255), 0.0, lambda: None).run()

    with pytest.raises(StartupError, match="agent 7, turn 0: .*has 1 tokens, not 0"):
        asyncio.run(run())


def test_a_refused_call_ends_the_run_naming_it() -> None:
    crowded = running_server(partial(ToyEngine, sessions_max=2))
    with crowded as running, pytest.raises(StartupError, match="/open_session answered 429"):
        measure_agents(replace(SMALL, url=running.url))


def test_a_context_that_the_server_has_not_is_refused(roomy: Running) -> None:
    with pytest.raises(StartupError, match="--context-tokens 4096"):
        measure_agents(replace(SMALL, url=roomy.url, context_tokens=4096))


def test_a_server_of_another_make_is_told_from_ours(server: Running) -> None:
    with pytest.raises(StartupError, match="answered 4"):
        measure_agents(replace(SMALL, url=server.url + "/nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pause_low_s": 2.0, "pause_high_s": 1.0}, "--pause-high-s"),
        ({"mode": "session"}, "--require-equal"),
        ({"lowest_id": 9, "highest_id": 9}, "--highest-id"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        measure_agents(replace(SMALL, **changes))


def test_turns_with_different_outputs_are_named() -> None:
    def said(place: str, *output: int) -> AgentTurn:
        return AgentTurn(place, 0.1, 0.2, 10, 0, 10, output)

    turns = {"resend": [said("a", 1), said("b", 2)], "session": [said("b", 3), said("a", 1)]}
    assert Outcome([], 1, [], turns).different() == ["b"]


@pytest.mark.parametrize(("require_equal", "status"), [("on", 1), ("off", 0)])
def test_a_different_output_fails_the_run_where_none_may_differ(
    roomy: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], require_equal: str, status: int
) -> None:
    monkeypatch.setattr(Outcome, "different", lambda outcome: [outcome.turns["session"][0].place])
    assert measure_agents(replace(SMALL, url=roomy.url, sessions=1, require_equal=require_equal)) == status
    assert ("1 turns differ, first at agent 0, turn 0" in capsys.readouterr().out) == bool(status)


def test_plans_have_the_reported_shape_and_fit_the_context() -> None:
    shape = AgentShape()
    plans = [plan_agent(shape, 8192, index) for index in range(400)]
    assert plans == [plan_agent(shape, 8192, index) for index in range(400)]
    assert 38 <= statistics.median(len(plan.turns) for plan in plans) <= 48
    assert max(len(plan.turns) for plan in plans) <= 4 * 43
    assert 1900 <= statistics.median(plan.first_tokens for plan in plans) <= 2200
    later = [turn for plan in plans for turn in plan.turns[1:]]
    assert min(turn.pause_s for turn in later) >= 0.1 and max(turn.pause_s for turn in later) <= 10
    assert max(turn.added_tokens for turn in later) > 30 * statistics.median(turn.added_tokens for turn in later) / 2
    assert max(plan.tokens_max for plan in plans) <= 8192
    for plan in plans:
        tokens = 0
        for turn in plan.turns:
            tokens = (plan.first_tokens if turn.starts_over else tokens) + turn.added_tokens + turn.generated_tokens
            assert tokens <= 8192
            for sub_agent in turn.sub_agents:
                assert tokens + sum(t.added_tokens + t.generated_tokens for t in sub_agent) <= 8192

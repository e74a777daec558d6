"""Sessions: opening, turns after turns, closing, expiry, flushing; each hazard of turn ends and deferred ends."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from sessile.contract.messages import (
    Cancel,
    CloseSession,
    Flush,
    GetSession,
    ListSessions,
    SessionPage,
    SessionTokens,
)
from tests.unit.drafters import PerfectDrafter
from tests.unit.stage import FACTS, Stage, expected
from tests.unit.test_core_planning import prompt

BOS = 1
PROMPT = prompt(3, 9)
LONG = dataclasses.replace(FACTS, context_tokens=1024, bos_id=BOS)
SECOND_NS = 1_000_000_000


def open_stage(stage: Stage | None = None, **settings: Any) -> Stage:
    """A stage with an open session "s"."""
    stage = stage or Stage(facts=LONG, pages=100)
    stage.open("s", **settings)
    return stage


def turn(stage: Stage, key: int, tokens: list[int], **sampling: Any) -> None:
    """One turn of session "s", run to its end."""
    stage.submit(key, tokens, session="s", **sampling)
    stage.run()


def refusal(stage: Stage, operation: type, *arguments: Any, **named: Any) -> tuple[int, str]:
    error = stage.ask(operation, *arguments, **named).error
    assert error is not None
    return error.status, error.message


# -- opening and looking ------------------------------------------------------------------------------------------


def test_a_session_that_exists_is_not_opened_again() -> None:
    stage = open_stage()
    turn(stage, 1, PROMPT)
    error = stage.open("s").error
    assert error is not None
    assert (error.status, error.param) == (400, "session_id")
    assert stage.view("s").turns == 1


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 1e10, float("nan"), float("inf")])
def test_an_idle_timeout_is_positive_and_finite(timeout_s: float) -> None:
    error = Stage().open("s", idle_timeout_s=timeout_s).error
    assert error is not None
    assert error.param == "timeout"


@pytest.mark.parametrize("tokens_max", [-1, 0, 1, 257])
def test_a_cap_on_a_session_lies_within_the_context(tokens_max: int) -> None:
    error = Stage().open("s", tokens_max=tokens_max).error
    assert error is not None
    assert (error.param, "256" in error.message) == ("max_tokens", True)


def test_h43_more_sessions_than_the_limit_are_refused_until_one_is_closed() -> None:
    stage = Stage(sessions_max=2)
    replies = [stage.open(f"s{index}").error for index in range(3)]
    assert [error and error.status for error in replies] == [None, None, 429]
    stage.close("s0")
    assert stage.open("s2").error is None


@pytest.mark.parametrize("operation", [GetSession, SessionTokens, CloseSession])
def test_operations_on_unknown_sessions_are_refused(operation: type) -> None:
    assert refusal(open_stage(), operation, "other") == (404, "session 'other' does not exist")


def test_a_turn_of_an_unknown_session_is_refused() -> None:
    stage = Stage()
    stage.submit(1, PROMPT, session="other")
    assert (stage.done[1].status, stage.done[1].code) == (404, "not_found")


def test_sessions_are_listed_page_by_page_in_the_order_of_opening() -> None:
    stage = Stage()
    names = [f"s{index}" for index in (3, 1, 4, 0, 2)]
    for name in names:
        stage.open(name)
    listed: list[str] = []
    while True:
        page = stage.ask(ListSessions, after=listed[-1] if listed else None, limit=2).value
        assert isinstance(page, SessionPage)
        listed += [view.id for view in page.sessions]
        assert page.total == 5
        if not page.more:
            break
    assert listed == names
    assert refusal(stage, ListSessions, after="other", limit=2)[0] == 404


def test_a_view_says_where_a_session_is() -> None:
    stage = open_stage(Stage(chunk=4, rows=1))
    phases = [stage.view("s").phase]
    stage.submit(1, PROMPT, session="s")
    phases.append(stage.view("s").phase)
    stage.step(2)
    phases.append(stage.view("s").phase)
    stage.machine._planner.preempt(stage.machine._books.requests[1])
    phases.append(stage.view("s").phase)
    stage.close("s")
    phases.append(stage.view("s").phase)
    assert phases == ["idle", "queued", "running", "preempted", "closing"]


# -- turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_h10_h65_every_warm_turn_reuses_its_history_but_the_last_token(page_size: int, chunk: int) -> None:
    stage = Stage(facts=LONG, page_size=page_size, pages=2 + 1200 // page_size, chunk=chunk)
    open_stage(stage)
    turn(stage, 1, prompt(3, 250), max_new_tokens=5)
    for key, count in enumerate((1, 0, 15, 16, 240, 2), 2):
        history, before = stage.history("s"), stage.queries
        turn(stage, key, prompt(key, count) if count else [], max_new_tokens=3)
        done = stage.done[key]
        assert done.cached_tokens == len(history) - 1
        assert stage.queries - before - 2 == done.computed_tokens == done.prompt_tokens - done.cached_tokens
        assert stage.history("s") == history + (prompt(key, count) if count else []) + stage.output[key]


@pytest.mark.parametrize("right", [0, 2, 99])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_h10_no_speculative_tail_outlives_its_turn(right: int, page_size: int) -> None:
    stage = Stage(page_size=page_size, pages=100, drafter=PerfectDrafter(right), drafts_max=4)
    open_stage(stage)
    for key in range(1, 4):
        turn(stage, key, prompt(key, 5), max_new_tokens=7)
        view = stage.view("s")
        assert view.kv_tokens == view.tokens - 1 == 12 * key - 1
        assert view.own_pages + view.shared_pages == -(-view.kv_tokens // page_size)


def test_h12_an_aborted_turn_keeps_the_page_that_its_history_ends_in() -> None:
    stage = open_stage(Stage(page_size=8))
    turn(stage, 1, prompt(3, 9), max_new_tokens=3)
    stage.submit(2, prompt(4, 30), session="s")
    stage.step(2)
    stage.send(Cancel(2))
    assert (stage.view("s").kv_tokens, stage.view("s").own_pages + stage.view("s").shared_pages) == (11, 2)


def test_an_empty_turn_of_an_empty_session_is_refused() -> None:
    stage = open_stage()
    stage.submit(1, [], session="s")
    assert (stage.done[1].status, stage.done[1].param) == (400, "input_ids")
    assert stage.view("s").phase == "idle"


def test_the_first_turn_keeps_its_begin_of_sequence_and_later_ones_lose_theirs() -> None:
    stage = open_stage()
    turn(stage, 1, [BOS, 5, 6], max_new_tokens=2)
    first = [BOS, 5, 6, *stage.output[1]]
    turn(stage, 2, [BOS, 7], max_new_tokens=2)
    assert stage.history("s") == [*first, 7, *stage.output[2]]
    assert stage.output[2] == expected([*first, 7], 2)


def test_h39_a_turn_of_nothing_but_a_begin_of_sequence_goes_on_from_the_history() -> None:
    stage = open_stage()
    turn(stage, 1, [BOS, 5, 6], max_new_tokens=2)
    history = stage.history("s")
    turn(stage, 2, [BOS], max_new_tokens=2)
    assert stage.output[2] == expected(history, 2)


def test_only_the_first_begin_of_sequence_is_taken_away() -> None:
    stage = open_stage()
    turn(stage, 1, [5], max_new_tokens=1)
    turn(stage, 2, [BOS, BOS, 7], max_new_tokens=1)
    assert stage.history("s")[2:4] == [BOS, 7]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_turns_without_output_append_their_input(page_size: int) -> None:
    stage = open_stage(Stage(page_size=page_size, pages=100))
    turn(stage, 1, PROMPT, max_new_tokens=0)
    turn(stage, 2, [8, 9], max_new_tokens=0)
    turn(stage, 3, [], max_new_tokens=0)
    assert stage.history("s") == [*PROMPT, 8, 9]
    turn(stage, 4, [7])
    assert stage.done[4].cached_tokens == len(PROMPT) + 1
    assert stage.output[4] == expected([*PROMPT, 8, 9, 7])


def test_h39_a_session_may_fill_its_cap_exactly_and_not_exceed_it() -> None:
    stage = open_stage(tokens_max=20)
    turn(stage, 1, PROMPT, max_new_tokens=None)
    assert len(stage.history("s")) == 20
    stage.submit(2, [5], session="s")
    assert (stage.done[2].status, "20 tokens" in stage.done[2].message) == (413, True)
    assert stage.view("s").phase == "idle"


def test_a_history_and_its_turns_are_told_in_the_end() -> None:
    stage = open_stage()
    turn(stage, 1, PROMPT)
    turn(stage, 2, [7])
    done = stage.done[2]
    assert done.session_tokens == len(stage.history("s")) == len(PROMPT) + 4 + 1 + 4
    assert stage.view("s").turns == 2


def test_sessions_with_the_same_beginning_share_it_and_then_part() -> None:
    stage = Stage()
    for name in ("a", "b"):
        stage.open(name)
        stage.submit(ord(name), [*PROMPT, ord(name) % 50], session=name)
        stage.run()
    assert stage.done[ord("b")].cached_tokens == 8
    assert stage.view("a").shared_pages == stage.view("b").shared_pages == 2
    for name in ("a", "b"):
        history = stage.history(name)
        stage.submit(1000 + ord(name), [7], session=name)
        stage.run()
        assert stage.output[1000 + ord(name)] == expected([*history, 7])


def test_h25_a_turn_refused_beside_another_does_not_clear_the_mark_when_it_is_cancelled() -> None:
    stage = open_stage()
    turn(stage, 1, PROMPT)
    stage.submit(2, [7], session="s")
    stage.submit(3, [8], session="s")
    stage.send(Cancel(3))
    stage.submit(4, [9], session="s")
    assert [stage.done[key].code for key in (3, 4)] == ["session_busy", "session_busy"]
    stage.run()
    assert stage.done[2].reason == "length"


# -- closing ------------------------------------------------------------------------------------------------------


def test_h19_closing_frees_everything_at_once() -> None:
    stage = open_stage(Stage())
    turn(stage, 1, PROMPT)
    reply: Any = stage.close("s")
    assert reply.value.values == {"closed": True, "deferred": False}
    assert refusal(stage, GetSession, "s")[0] == 404
    stats = stage.stats()
    assert (stats.pages_sessions, stats.pages_tree_pinned, stats.sessions_open) == (0, 0, 0)
    assert (stats.rows_held, stats.session_tokens) == (0, 0)
    assert stage.gone == []


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_h23_a_close_in_mid_turn_waits_for_its_end_and_is_told_then(steps: int) -> None:
    stage = open_stage(Stage(chunk=4))
    turn(stage, 1, PROMPT)
    history = stage.history("s")
    stage.submit(2, prompt(8, 9), session="s")
    stage.step(steps)
    stage.launch()
    stage.close("s")
    assert stage.gone == []
    stage.run()
    assert stage.output[2] == expected(history + prompt(8, 9))
    assert [(gone.session, gone.reason) for gone in stage.gone] == [("s", "closed")]


def test_h23_a_closing_session_goes_when_its_turn_is_cancelled() -> None:
    stage = open_stage(Stage())
    stage.submit(1, PROMPT, session="s")
    stage.launch()
    stage.close("s")
    stage.send(Cancel(1))
    assert [gone.session for gone in stage.gone] == ["s"]
    stage.run()
    assert stage.stats().pages_sessions == stage.stats().rows_held == 0


def test_h60_a_close_between_done_and_the_end_of_the_drain_is_not_deferred() -> None:
    stage = open_stage(Stage())
    stage.submit(1, PROMPT, session="s", max_new_tokens=2, stop_token_ids=(expected(PROMPT)[0],))
    while 1 not in stage.done:
        stage.launch()
    assert stage.stats().requests_draining == 1
    reply: Any = stage.close("s")
    assert reply.value.values == {"closed": True, "deferred": False}
    stage.run()
    assert stage.stats().pages_limbo == 0


def test_h75_a_session_opened_under_an_old_name_knows_nothing_of_the_old_one() -> None:
    stage = open_stage(Stage(), idle_timeout_s=5)
    turn(stage, 1, PROMPT)
    stage.close("s")
    stage.open("s")
    stage.machine.tick(60 * SECOND_NS)
    turn(stage, 2, PROMPT)
    assert (stage.history("s"), stage.gone) == (PROMPT + stage.output[2], [])


# -- time ---------------------------------------------------------------------------------------------------------


def at(stage: Stage, second: float) -> None:
    stage.machine.tick(int(second * SECOND_NS))
    stage.run()
    stage.settle()


def test_an_idle_session_expires_when_its_time_is_over_and_not_before() -> None:
    stage = open_stage(Stage(), idle_timeout_s=10)
    assert stage.machine.next_deadline_ns == 10 * SECOND_NS
    at(stage, 9.9)
    assert stage.gone == []
    at(stage, 10)
    assert [(gone.session, gone.reason) for gone in stage.gone] == [("s", "expired")]
    assert (stage.stats().sessions_open, stage.machine.next_deadline_ns) == (0, None)


def test_a_session_without_a_timeout_never_expires() -> None:
    stage = open_stage(Stage())
    at(stage, 1e8)
    assert stage.stats().sessions_open == 1


def test_h41_idle_time_starts_when_a_turn_ends() -> None:
    stage = open_stage(Stage(), idle_timeout_s=10)
    stage.submit(1, PROMPT, session="s", max_new_tokens=12)
    stage.step(2)
    stage.machine.tick(30 * SECOND_NS)
    assert stage.machine.next_deadline_ns is None
    stage.run()
    assert (stage.done[1].reason, stage.machine.next_deadline_ns) == ("length", 40 * SECOND_NS)
    at(stage, 39)
    assert stage.gone == []
    at(stage, 41)
    assert len(stage.gone) == 1


def test_h41_a_queued_turn_is_not_idle() -> None:
    stage = open_stage(Stage(rows=1), idle_timeout_s=10)
    stage.submit(1, PROMPT, max_new_tokens=12)
    stage.step()
    stage.submit(2, PROMPT, session="s")
    stage.machine.tick(30 * SECOND_NS)
    stage.run()
    assert (stage.done[2].reason, stage.gone) == ("length", [])


def test_h40_a_refused_turn_does_not_keep_its_session_alive() -> None:
    stage = open_stage(Stage(), idle_timeout_s=10)
    stage.machine.tick(8 * SECOND_NS)
    for key, tokens in enumerate(([99], [5] * 300, [])):
        stage.submit(key, tokens, session="s")
        assert stage.done[key].reason == "error"
    assert stage.machine.next_deadline_ns == 10 * SECOND_NS
    at(stage, 10)
    assert len(stage.gone) == 1


def test_looking_at_a_session_does_not_keep_it_alive() -> None:
    stage = open_stage(Stage(), idle_timeout_s=10)
    stage.machine.tick(8 * SECOND_NS)
    stage.view("s")
    stage.history("s")
    assert stage.machine.next_deadline_ns == 10 * SECOND_NS


def test_a_cancelled_turn_was_a_use() -> None:
    stage = open_stage(Stage(), idle_timeout_s=10)
    stage.submit(1, PROMPT, session="s")
    stage.machine.tick(8 * SECOND_NS)
    stage.send(Cancel(1))
    assert stage.machine.next_deadline_ns == 18 * SECOND_NS


def test_sessions_expire_in_the_order_of_their_deadlines() -> None:
    stage = Stage()
    for name, timeout_s in (("slow", 30), ("quick", 5), ("middle", 20)):
        stage.open(name, idle_timeout_s=timeout_s)
    stage.machine.tick(100 * SECOND_NS)
    stage.launch()
    assert [gone.session for gone in stage.gone] == ["quick", "middle", "slow"]


def test_h42_time_does_not_run_backwards() -> None:
    stage = open_stage(Stage(), idle_timeout_s=10)
    stage.machine.tick(9 * SECOND_NS)
    stage.machine.tick(1 * SECOND_NS)
    assert stage.stats().time_s == 9


# -- flushing -----------------------------------------------------------------------------------------------------


def test_flushing_drops_all_kv_and_no_token() -> None:
    stage = open_stage(Stage())
    turn(stage, 1, PROMPT)
    stage.submit(2, prompt(8, 13))
    stage.run()
    history = stage.history("s")
    value: Any = stage.ask(Flush).value
    assert value.values["pages"] > 0
    assert (stage.stats().pages_tree, stage.stats().pages_sessions, stage.view("s").kv_tokens) == (0, 0, 0)
    turn(stage, 3, [7])
    assert (stage.done[3].cached_tokens, stage.output[3]) == (0, expected([*history, 7]))


def test_flushing_is_refused_while_anything_runs_or_waits() -> None:
    stage = Stage()
    stage.submit(1, PROMPT)
    status, message = refusal(stage, Flush)
    assert (status, message) == (400, "1 requests are running or waiting: flush when idle")
    stage.run()
    assert stage.output[1] == expected(PROMPT)


def test_h60_a_flush_while_the_last_request_drains_waits_for_it() -> None:
    stage = open_stage(Stage())
    stage.submit(1, PROMPT, session="s", max_new_tokens=9, stop_token_ids=(expected(PROMPT)[0],))
    while 1 not in stage.done:
        stage.launch()
    stage.send(Flush(77))
    assert 77 not in stage._replies
    stage.submit(2, [7], session="s")
    stage.run()
    value: Any = stage._replies[77].value
    assert value.values["pages"] > 0
    assert stage.done[2].cached_tokens == 0
    assert stage.output[2] == expected(PROMPT + stage.output[1] + [7])


def test_the_tokens_of_a_session_are_its_committed_ones() -> None:
    stage = open_stage(Stage())
    turn(stage, 1, PROMPT)
    history = stage.history("s")
    stage.submit(2, [7], session="s")
    stage.step(2)
    assert stage.history("s") == history
    assert np.array_equal(history, PROMPT + stage.output[1])


# -- KV that is cut -----------------------------------------------------------------------------------------------


def test_a_parked_session_shrinks_page_by_page_and_computes_again_only_what_is_gone() -> None:
    stage = open_stage(Stage(pages=13))
    turn(stage, 1, prompt(3, 2), max_new_tokens=1)
    turn(stage, 2, prompt(4, 24), max_new_tokens=2)  # 29 tokens, all of them private
    history = stage.history("s")
    stage.submit(3, prompt(5, 22), max_new_tokens=1)  # needs two pages more than are free
    stage.run()
    assert stage.view("s").kv_tokens == 24
    turn(stage, 4, [7])
    assert stage.done[4].cached_tokens == 24
    assert stage.output[4] == expected([*history, 7])


def test_h64_a_turn_rolled_back_into_a_shared_page_gives_that_page_up() -> None:
    stage = open_stage(Stage())
    turn(stage, 1, PROMPT, max_new_tokens=1)
    history = stage.history("s")  # 10 tokens: the next turn would write into the third page
    stage.ask(Flush)
    stage.submit(2, [*history, *prompt(8, 12)])  # a plain request leaves that page, and more, in the tree
    stage.run()
    stage.submit(3, prompt(8, 12), session="s")
    stage.step()
    stage.send(Cancel(3))
    assert (stage.view("s").kv_tokens, stage.view("s").shared_pages) == (8, 2)
    turn(stage, 4, [7, 7, 7])
    assert stage.output[4] == expected([*history, 7, 7, 7])
    stage.submit(5, [*history, *prompt(8, 12)])
    stage.run()
    assert stage.output[5] == stage.output[2]

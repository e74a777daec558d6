"""Branching sessions: any finished turn may be gone on from, side by side, and says what its tokens alone would say."""

from typing import Any

import pytest

from sessile.contract.messages import Branch, Cancel, CloseSession, DropTurn, Flush, ForkSession, SessionTokens
from tests.unit.stage import Stage, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
every_page_size = pytest.mark.parametrize("page_size", [1, 4, 16])


def branching(**settings: Any) -> Stage:
    stage = Stage(**({"pages": 120} | settings))
    assert stage.open("b", branching=True).error is None
    return stage


def turn(stage: Stage, key: int, rid: str, tokens: list[int], parent: str | None = None, **branch: Any) -> None:
    """Send a turn; `branch` may also hold settings of the request."""
    settings = {name: branch.pop(name) for name in ("max_new_tokens", "expect_tokens", "logprobs") if name in branch}
    where = Branch(parent=parent, **branch) if parent is not None or branch else None
    stage.submit(key, tokens, session="b", rid=rid, branch=where, **settings)


def said(stage: Stage, key: int, context: list[int]) -> list[int]:
    """The context behind a turn, once its output is held against the reference."""
    stage.run()
    assert stage.done[key].reason == "length", stage.done[key]
    assert stage.output[key] == expected(context)
    return context + stage.output[key]


def refusal(stage: Stage, key: int) -> tuple[int, str | None]:
    return stage.done[key].status, stage.done[key].param


def check_nothing_is_left(stage: Stage) -> None:
    stage.run()
    stage.ask(CloseSession, "b")
    stage.run()
    stage.ask(Flush)
    stats = stage.stats()
    assert (stats.pages_free, stats.rows_held, stats.sessions_open) == (stats.pages_total - 1, 0, 0)


@every_page_size
def test_a_turn_goes_on_from_any_finished_turn(page_size: int) -> None:
    stage = branching(page_size=page_size)
    turn(stage, 1, "root", PROMPT)
    root = said(stage, 1, PROMPT)
    turn(stage, 2, "left", [7, 7, 8], "root")
    left = said(stage, 2, root + [7, 7, 8])
    turn(stage, 3, "right", [9], "root")
    said(stage, 3, root + [9])
    turn(stage, 4, "left-left", [2], "left")
    said(stage, 4, left + [2])
    assert stage.view("b").turns == 4
    check_nothing_is_left(stage)


@every_page_size
def test_siblings_run_side_by_side_on_one_copy_of_what_they_share(page_size: int) -> None:
    stage = branching(page_size=page_size)
    turn(stage, 1, "root", PROMPT * 3)
    root = said(stage, 1, PROMPT * 3)
    for key in range(2, 6):
        turn(stage, key, f"child {key}", [key], "root")
    for key in range(2, 6):
        said(stage, key, root + [key])
        assert stage.done[key].cached_tokens >= (len(root) - 1) // page_size * page_size
    check_nothing_is_left(stage)


def test_a_turn_without_a_parent_is_a_new_root() -> None:
    stage = branching()
    turn(stage, 1, "one", PROMPT)
    turn(stage, 2, "two", [5, 5])
    said(stage, 1, PROMPT)
    said(stage, 2, [5, 5])


@every_page_size
@pytest.mark.parametrize("offset", [1, 4, 9, 10, 13, 14, -1, -3, -13])
def test_an_offset_cuts_the_parents_context_as_python_does(page_size: int, offset: int) -> None:
    stage = branching(page_size=page_size)
    turn(stage, 1, "root", PROMPT)
    root = said(stage, 1, PROMPT)
    turn(stage, 2, "child", [8], "root", offset=offset)
    said(stage, 2, root[:offset] + [8])
    check_nothing_is_left(stage)


def test_an_offset_cuts_what_is_left_without_the_parents_output() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    said(stage, 1, PROMPT)
    turn(stage, 2, "child", [8], "root", drop_previous_output=True)
    said(stage, 2, PROMPT + [8])
    turn(stage, 3, "shorter", [8], "root", drop_previous_output=True, offset=-2)
    said(stage, 3, PROMPT[:-2] + [8])


@pytest.mark.parametrize("offset", [15, -15, 1000])
def test_an_offset_beyond_the_context_is_refused_and_touches_nothing(offset: int) -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    stage.run()
    before = stage.view("b")
    turn(stage, 2, "child", [8], "root", offset=offset)
    assert refusal(stage, 2) == (400, "session_params.offset")
    assert "from -14 to 14" in stage.done[2].message
    assert stage.view("b") == before


def test_h25_a_parent_that_still_runs_is_refused_and_goes_on() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    stage.launch()
    turn(stage, 2, "child", [8], "root")
    assert refusal(stage, 2) == (400, "session_params.rid")
    said(stage, 1, PROMPT)


def test_an_unknown_parent_is_refused_and_names_it() -> None:
    stage = branching()
    turn(stage, 1, "child", [8], "nobody")
    assert refusal(stage, 1) == (400, "session_params.rid")
    assert "'nobody'" in stage.done[1].message


def test_h18_an_aborted_turn_is_no_parent_and_leaves_nothing() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    stage.run()
    before = stage.view("b")
    turn(stage, 2, "child", [8], "root", max_new_tokens=100)
    for _ in range(4):
        stage.launch()
    stage.send(Cancel(2))
    stage.run()
    after = stage.view("b")
    assert (after.turns, after.tokens, after.phase) == (before.turns, before.tokens, "idle")
    turn(stage, 3, "grandchild", [8], "child")
    assert refusal(stage, 3) == (400, "session_params.rid")
    turn(stage, 4, "child", [8], "root")
    stage.run()
    assert stage.done[4].reason == "length"
    check_nothing_is_left(stage)


@every_page_size
def test_replace_drops_the_parents_other_descendants_and_ends_a_running_one(page_size: int) -> None:
    stage = branching(page_size=page_size)
    turn(stage, 1, "root", PROMPT)
    root = said(stage, 1, PROMPT)
    turn(stage, 2, "old", [7], "root")
    old = said(stage, 2, root + [7])
    assert old
    turn(stage, 3, "older", [7], "old", max_new_tokens=100)
    for _ in range(3):
        stage.launch()
    turn(stage, 4, "new", [8], "root", replace=True)
    assert (stage.done[3].reason, stage.done[3].message) == ("abort", "replaced by another turn")
    said(stage, 4, root + [8])
    turn(stage, 5, "orphan", [8], "old")
    assert refusal(stage, 5) == (400, "session_params.rid")
    assert stage.view("b").turns == 2
    check_nothing_is_left(stage)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_replace_ends_a_running_parent_and_goes_on_from_what_it_delivered(steps: int) -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT, max_new_tokens=100)
    for _ in range(steps):
        stage.launch()
    turn(stage, 2, "child", [8], "root", replace=True)
    delivered = PROMPT + stage.output[1]
    assert stage.done[1].reason == "abort"
    said(stage, 2, delivered + [8])
    check_nothing_is_left(stage)


def test_replace_without_a_parent_drops_every_turn() -> None:
    stage = branching()
    for key in (1, 2):
        turn(stage, key, f"root {key}", [key, 5])
    stage.run()
    turn(stage, 3, "only", [8], replace=True)
    said(stage, 3, [8])
    assert stage.view("b").turns == 1


def test_h59_the_same_rid_repeats_the_reply_and_changes_nothing() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT, logprobs=2)
    stage.run()
    before = stage.view("b")
    turn(stage, 2, "root", PROMPT, logprobs=2)
    assert stage.output[2] == stage.output[1]
    assert stage.done[2].prompt_tokens == stage.done[1].prompt_tokens == len(PROMPT)
    assert stage.view("b") == before
    turn(stage, 3, "root", [1])
    assert refusal(stage, 3) == (400, "rid")


def test_a_turn_in_flight_keeps_its_rid_to_itself() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    turn(stage, 2, "root", PROMPT)
    assert refusal(stage, 2) == (400, "rid")
    said(stage, 1, PROMPT)


@pytest.mark.parametrize("field", [{"offset": 3}, {"replace": True}, {"drop_previous_output": True}])
def test_a_streaming_session_does_not_branch_and_is_untouched(field: dict[str, Any]) -> None:
    stage = Stage()
    stage.open("s")
    stage.submit(1, PROMPT, session="s")
    stage.run()
    before = stage.view("s")
    stage.submit(2, [8], session="s", branch=Branch(parent="whatever", **field))
    assert refusal(stage, 2) == (400, f"session_params.{next(iter(field))}")
    assert stage.view("s") == before
    stage.submit(3, [8], session="s", branch=Branch(parent="ignored"))
    stage.run()
    assert stage.output[3] == expected(PROMPT + stage.output[1] + [8])


@pytest.mark.parametrize("operation", [ForkSession, SessionTokens])
def test_what_is_about_one_line_of_tokens_is_refused(operation: type) -> None:
    stage = branching()
    fields = {"session": "b", "child": "c"} if operation is ForkSession else {"session": "b"}
    reply = stage.ask(operation, **fields)
    assert reply.error is not None and reply.error.status == 400 and "branching" in reply.error.message


def test_h23_a_close_waits_for_every_turn_in_flight() -> None:
    stage = branching()
    turn(stage, 1, "one", PROMPT, max_new_tokens=3)
    turn(stage, 2, "two", [5], max_new_tokens=9)
    stage.launch()
    assert stage.close("b").value.values["deferred"]
    turn(stage, 3, "three", [5])
    assert stage.done[3].status == 410
    stage.run()
    assert (stage.done[1].reason, stage.done[2].reason) == ("length", "length")
    assert [gone.session for gone in stage.gone] == ["b"]
    assert stage.stats().sessions_open == 0


def test_h41_idle_time_starts_when_the_last_turn_ends() -> None:
    stage = Stage()
    stage.open("b", branching=True, idle_timeout_s=1.0)
    turn(stage, 1, "one", [5], max_new_tokens=20)
    stage.launch()
    stage.machine.tick(5_000_000_000)
    stage.run()
    stage.machine.tick(5_900_000_000)
    assert stage.view("b").phase == "idle"
    stage.machine.tick(6_100_000_000)
    stage.run()
    stage.settle()
    assert stage.stats().sessions_open == 0


def test_h43_every_branch_counts_among_the_sessions() -> None:
    stage = branching(sessions_max=3)
    turn(stage, 1, "root", PROMPT)
    stage.run()
    turn(stage, 2, "child", [8], "root")
    stage.run()
    turn(stage, 3, "child too", [8], "root")
    assert stage.done[3].status == 429
    assert stage.view("b").turns == 2


def test_expect_tokens_is_held_against_the_context_that_the_turn_goes_on_from() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    root = said(stage, 1, PROMPT)
    turn(stage, 2, "child", [8], "root", offset=5, expect_tokens=len(root))
    assert stage.done[2].status == 409 and "has 5 tokens" in stage.done[2].message
    turn(stage, 3, "child", [8], "root", offset=5, expect_tokens=5)
    said(stage, 3, root[:5] + [8])


@every_page_size
def test_h35_branches_whose_kv_was_reclaimed_say_the_same(page_size: int) -> None:
    stage = branching(page_size=page_size, pages=2 + 64 // page_size)
    turn(stage, 1, "root", PROMPT)
    root = said(stage, 1, PROMPT)
    for key in range(2, 12):
        turn(stage, key, f"child {key}", [key] * 5, "root")
        said(stage, key, root + [key] * 5)
    stats = stage.stats()
    assert stats.evicted_pages_total + stats.demoted_pages_total > 0
    turn(stage, 20, "late", [1], "child 2")
    said(stage, 20, root + [2] * 5 + stage.output[2] + [1])
    check_nothing_is_left(stage)


def test_a_turn_that_is_dropped_leaves_those_that_went_on_from_it() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    root = said(stage, 1, PROMPT)
    turn(stage, 2, "child", [8], "root")
    child = said(stage, 2, root + [8])
    assert stage.ask(DropTurn, session="b", rid="root").error is None
    assert stage.view("b").turns == 1
    turn(stage, 3, "orphan", [8], "root")
    assert refusal(stage, 3) == (400, "session_params.rid")
    turn(stage, 4, "grandchild", [9], "child")
    said(stage, 4, child + [9])
    assert stage.done[4].cached_tokens == len(child) - 1
    check_nothing_is_left(stage)


def test_what_descends_from_a_dropped_turn_is_replaced_from_above_it() -> None:
    stage = branching()
    for key, (name, parent) in enumerate([("root", None), ("middle", "root"), ("leaf", "middle")], 1):
        turn(stage, key, name, PROMPT, *([parent] if parent else []))
        stage.run()
    stage.ask(DropTurn, session="b", rid="middle")
    turn(stage, 4, "new", [8], "root", replace=True)
    stage.run()
    turn(stage, 5, "late", [8], "leaf")
    assert refusal(stage, 5) == (400, "session_params.rid")


@pytest.mark.parametrize(("session", "rid", "status"), [("b", "nobody", 404), ("x", "root", 404), ("s", "root", 400)])
def test_a_turn_that_is_not_there_cannot_be_dropped(session: str, rid: str, status: int) -> None:
    stage = branching()
    stage.open("s")
    turn(stage, 1, "root", PROMPT)
    stage.run()
    error = stage.ask(DropTurn, session=session, rid=rid).error
    assert error is not None and error.status == status


def test_a_turn_in_flight_is_not_dropped() -> None:
    stage = branching()
    turn(stage, 1, "root", PROMPT)
    stage.launch()
    error = stage.ask(DropTurn, session="b", rid="root").error
    assert error is not None and error.status == 409
    said(stage, 1, PROMPT)

"""A session that an engine had goes on in the next one: the same history, nothing computed, nothing owed to anybody."""

from typing import Any

import pytest

from sessile.contract.messages import (
    CommittedTurn,
    Done,
    OpenSession,
    Reply,
    RestoreSession,
    RewindSession,
    SessionView,
    pack_tokens,
)
from sessile.core.limits import TenantPolicy
from tests.unit.stage import Stage, expected

FIRST, SECOND = [3, 1, 4, 1, 5], [9, 2, 6]


def restore(stage: Stage, tokens: list[int], *ends: int, last: CommittedTurn | None = None, **opening: Any) -> Reply:
    opened = OpenSession(**({"op": 0, "session": "s"} | opening))
    return stage.ask(RestoreSession, opening=opened, tokens=pack_tokens(tokens), turn_ends=ends, last=last)


def after_two_turns() -> Stage:
    stage = Stage()
    stage.open("s")
    for key, tokens in enumerate((FIRST, SECOND), 1):
        stage.submit(key, tokens, session="s", rid=f"turn {key}")
        stage.run()
    return stage


def test_a_restored_session_says_next_what_it_would_have_said() -> None:
    stage = Stage()
    history = [*FIRST, *expected(FIRST)]
    restore(stage, history, len(history))
    stage.submit(1, SECOND, session="s")
    stage.run()
    assert stage.output[1] == expected(history + SECOND)
    assert stage.done[1].cached_tokens == 0, "it begins without KV"


def test_a_restored_session_is_shown_as_it_was() -> None:
    view = restore(Stage(), FIRST, 2, 5, idle_timeout_s=9.0, tokens_max=40, metadata={"a": "b"}).value
    assert isinstance(view, SessionView)
    assert (view.tokens, view.turns, view.kv_tokens, view.own_pages) == (5, 2, 0, 0)
    assert (view.idle_timeout_s, view.tokens_max, view.metadata, view.phase) == (9.0, 40, {"a": "b"}, "idle")


def test_the_turns_of_a_restored_session_can_be_gone_back_to() -> None:
    stage = Stage()
    restore(stage, FIRST, 2, 5)
    stage.ask(RewindSession, session="s", to_turn=1)
    assert stage.history("s") == FIRST[:2]


def test_h59_the_last_reply_of_a_restored_session_is_said_again() -> None:
    before = after_two_turns()
    history, done = before.history("s"), before.done[2]
    stage = Stage()
    restore(stage, history, 9, 16, last=CommittedTurn(rid="turn 2", input=pack_tokens(SECOND), done=done))
    stage.submit(7, SECOND, session="s", rid="turn 2")
    assert stage.output[7] == before.output[2]
    assert stage.history("s") == history and stage.stats().turns_replayed_total == 1


def test_a_reservation_is_restored_with_its_session() -> None:
    stage = Stage(pages=200)
    view = restore(stage, FIRST, 5, reserve_tokens=16).value
    assert isinstance(view, SessionView) and view.reserved_tokens == 16


def test_of_a_reservation_as_much_is_restored_as_the_session_can_have_of_this_engine() -> None:
    stage = Stage(pages=200)
    view = restore(stage, FIRST, 5, reserve_tokens=10**6, tokens_max=40).value
    assert isinstance(view, SessionView) and view.reserved_tokens == 40


def test_what_a_tenant_holds_is_counted_again_and_not_refused() -> None:
    stage = Stage(tenants=(TenantPolicy("ada", held_tokens_max=3),))
    assert restore(stage, FIRST, 5, tenant="ada").error is None
    assert stage.stats().tenants[0].held_tokens == 5


@pytest.mark.parametrize(
    ("tokens", "opening", "status"),
    [([1] * 300, {}, 413), ([1] * 50, {"tokens_max": 40}, 413), ([99], {}, 400), ([], {"tokens_max": 1}, 400)],
)
def test_what_cannot_be_restored_is_refused_and_leaves_nothing(
    tokens: list[int], opening: dict[str, Any], status: int
) -> None:
    stage = Stage()
    error = restore(stage, tokens, *[len(tokens)][: len(tokens)], **opening).error
    assert error is not None and error.status == status
    assert stage.stats().sessions_open == 0 and stage.stats().session_tokens == 0


def test_a_session_that_is_open_is_not_restored_over() -> None:
    stage = after_two_turns()
    history = stage.history("s")
    error = restore(stage, FIRST, 5).error
    assert error is not None and error.code == "duplicate_session"
    assert stage.history("s") == history


def test_a_history_whose_turns_do_not_add_up_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="turns"):
        restore(Stage(), FIRST, 4)


def test_the_events_before_a_failure_hold_no_token_of_a_restored_history() -> None:
    stage = Stage()
    done = Done(key=0, reason="stop")
    restore(stage, FIRST, 5, last=CommittedTurn(rid="r", input=pack_tokens(FIRST), done=done))
    assert stage.machine.event_lines()[-1] == "received RestoreSession 's': 5 tokens"

"""Reservations: pages that a session is sure of, whoever else wants them, and that nobody waits for in vain."""

import pytest

from sessile.contract.messages import CloseSession, Flush, RewindSession
from sessile.contract.model import ModelFacts
from tests.unit.stage import Stage, expected

FACTS = ModelFacts(vocab_size=50, context_tokens=64, eos_ids=())
"""A context of 16 pages: in a pool of 49 pages, 32 may be reserved."""


def staged(**settings: int) -> Stage:
    return Stage(**({"pages": 49, "page_size": 4, "rows": 8, "facts": FACTS} | settings))


def storm(stage: Stage, keys: range, tokens: int = 40) -> None:
    for key in keys:
        stage.submit(key, [key % 40 + 2] * tokens, max_new_tokens=20)


def turn(stage: Stage, key: int, tokens: list[int], session: str = "s") -> None:
    history = stage.history(session)
    stage.submit(key, tokens, session=session)
    stage.run()
    assert stage.output[key] == expected(history + tokens, facts=FACTS)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_kv_within_the_reservation_outlives_a_storm(page_size: int) -> None:
    stage = staged(page_size=page_size, pages=196 // page_size)
    assert stage.open("s", reserve_tokens=32).error is None
    turn(stage, 1, [5] * 20)
    storm(stage, range(100, 140))
    stage.run()
    stats = stage.stats()
    assert stats.evicted_pages_total > 0
    turn(stage, 2, [8])
    assert stage.done[2].cached_tokens == 23


def test_kv_that_a_turn_without_a_row_found_in_the_tree_is_kept_as_well() -> None:
    """Appended tokens that a plain request computed before: nothing runs, and the KV is the session's all the same."""
    stage = staged()
    assert stage.open("s", reserve_tokens=32).error is None
    stage.submit(1, [5] * 21, max_new_tokens=2)
    stage.run()
    stage.submit(2, [5] * 21, session="s", max_new_tokens=0)
    stage.run()
    assert (stage.done[2].cached_tokens, stage.done[2].computed_tokens) == (20, 0)
    storm(stage, range(100, 140))
    stage.run()
    assert stage.stats().evicted_pages_total > 0
    turn(stage, 3, [8])
    assert stage.done[3].cached_tokens == 20


def test_without_a_reservation_the_same_storm_takes_the_kv() -> None:
    stage = staged()
    stage.open("s")
    turn(stage, 1, [5] * 20)
    storm(stage, range(100, 140))
    stage.run()
    turn(stage, 2, [8])
    assert stage.done[2].cached_tokens < 23


def test_pages_that_hold_nothing_yet_are_kept_too() -> None:
    stage = staged()
    stage.open("s", reserve_tokens=64)
    assert stage.stats().pages_sessions == 16
    storm(stage, range(100, 140))
    for _ in range(20):
        stage.launch()
        assert stage.stats().pages_sessions == 16
    preempted = stage.stats().preemptions_total
    stage.submit(1, [5] * 40, session="s", max_new_tokens=20)
    stage.run()
    assert stage.done[1].preemptions == 0 and stage.stats().preemptions_total >= preempted


def test_beyond_the_reservation_kv_is_reclaimed_and_within_it_stays() -> None:
    stage = staged()
    stage.open("s", reserve_tokens=12)
    turn(stage, 1, [5] * 40)
    storm(stage, range(100, 140))
    stage.run()
    turn(stage, 2, [8])
    assert stage.done[2].cached_tokens == 12


def test_h68_what_is_reserved_leaves_room_for_the_longest_request() -> None:
    stage = staged()
    assert stage.open("a", reserve_tokens=60).error is None
    assert stage.open("b", reserve_tokens=8).error is None
    refused = stage.open("c", reserve_tokens=64)
    assert refused.error is not None and refused.error.status == 429
    assert "60 are left" in refused.error.message
    assert stage.stats().sessions_open == 2
    assert stage.open("c", reserve_tokens=60).error is None
    stage.submit(1, [7] * 40, max_new_tokens=24)
    stage.run()
    assert stage.output[1] == expected([7] * 40, 24, FACTS)


def test_no_more_is_reserved_than_the_session_can_have() -> None:
    stage = staged()
    for reserved, settings, most in ((65, {}, 64), (31, {"tokens_max": 30}, 30), (10**6, {}, 64)):
        refused = stage.open("s", reserve_tokens=reserved, **settings)
        assert refused.error is not None and (refused.error.status, refused.error.param) == (400, "reserve_tokens")
        assert f"at most {most}, the most tokens that this session can have" in refused.error.message
        assert (stage.stats().sessions_open, stage.machine._books.reserved_pages) == (0, 0)
    assert stage.open("s", reserve_tokens=30, tokens_max=30).error is None


def test_h68_a_reservation_that_is_taken_under_a_large_request_does_not_stop_it() -> None:
    stage = staged(pages=33)
    for key in (1, 2):
        stage.submit(key, [key + 7] * 40, max_new_tokens=24)
    for _ in range(3):
        stage.launch()
    assert stage.open("s", reserve_tokens=64).error is None
    stage.run()
    assert [stage.output[key] for key in (1, 2)] == [expected([key + 7] * 40, 24, FACTS) for key in (1, 2)]
    stage.launch()
    assert stage.stats().pages_sessions == 16, "pages come to the reserve as they become free"


def test_h37_a_request_whose_pages_are_reserved_is_no_victim() -> None:
    stage = staged(pages=41)
    stage.open("s", reserve_tokens=64)
    for key in (1, 2):
        stage.submit(key, [key + 7] * 20, max_new_tokens=44)
    stage.submit(3, [5] * 20, session="s", max_new_tokens=40)
    stage.run()
    assert stage.done[3].preemptions == 0
    for key, prompt, count in ((1, [8] * 20, 44), (2, [9] * 20, 44), (3, [5] * 20, 40)):
        assert stage.output[key] == expected(prompt, count, FACTS)


@pytest.mark.parametrize("end", ["close", "expire"])
def test_the_end_of_a_session_gives_its_reservation_back(end: str) -> None:
    stage = staged()
    stage.open("s", reserve_tokens=64, idle_timeout_s=1.0)
    turn(stage, 1, [5] * 20)
    if end == "close":
        stage.ask(CloseSession, "s")
    else:
        stage.machine.tick(2_000_000_000)
    stage.run()
    stage.ask(Flush)
    stats = stage.stats()
    assert (stats.pages_free, stats.pages_reserved, stats.sessions_open) == (48, 0, 0)


def test_a_flush_drops_the_kv_and_keeps_the_promise() -> None:
    stage = staged()
    stage.open("s", reserve_tokens=32)
    turn(stage, 1, [5] * 20)
    stage.run()
    stage.ask(Flush)
    storm(stage, range(100, 110))
    stage.run()
    assert stage.stats().pages_reserved == 8 and stage.stats().pages_sessions == 8
    turn(stage, 2, [8])
    assert stage.done[2].cached_tokens == 0


def test_a_rewind_within_the_reservation_keeps_its_pages() -> None:
    stage = staged()
    stage.open("s", reserve_tokens=32)
    turn(stage, 1, [5] * 20)
    stage.ask(RewindSession, session="s", to_tokens=9)
    storm(stage, range(100, 140))
    stage.run()
    turn(stage, 2, [8])
    assert stage.done[2].cached_tokens == 8


def test_a_branching_session_has_no_line_to_reserve_for() -> None:
    refused = staged().open("b", branching=True, reserve_tokens=4)
    assert refused.error is not None and (refused.error.status, refused.error.param) == (400, "reserve_tokens")

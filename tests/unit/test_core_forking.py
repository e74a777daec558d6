"""Fork and rewind: what is shared, copied and refused; and outputs as if the tokens had been sent afresh."""

from random import Random

import pytest

from sessile.contract.messages import ForkSession, RewindSession, Sampling, SessionView, Submit, pack_tokens
from tests.unit.stage import Stage, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
QUESTION = [7, 7, 8]


def stage_with_turns(turns: int = 2, **settings: int) -> Stage:
    """A stage whose session "s" has finished these turns of 10 + 4 and then 3 + 4 tokens."""
    stage = Stage(**settings)
    stage.open("s")
    for turn in range(turns):
        stage.submit(100 + turn, QUESTION if turn else PROMPT, session="s")
        stage.run()
    return stage


def fork(stage: Stage, child: str = "f", session: str = "s", **place: int) -> SessionView:
    reply = stage.ask(ForkSession, session=session, child=child, **place)
    assert isinstance(reply.value, SessionView), reply.error
    return reply.value


def rewind(stage: Stage, session: str = "s", **place: int) -> SessionView:
    reply = stage.ask(RewindSession, session=session, **place)
    assert isinstance(reply.value, SessionView), reply.error
    return reply.value


def say(stage: Stage, key: int, session: str, tokens: list[int]) -> None:
    """Take a turn and hold its output against the reference for the same tokens."""
    history = stage.history(session)
    stage.submit(key, tokens, session=session)
    stage.run()
    assert stage.output[key] == expected(history + tokens)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("at", [0, 1, 4, 5, 9, 14, 17, 21])
def test_a_fork_says_what_a_fresh_prompt_with_its_tokens_would(page_size: int, at: int) -> None:
    stage = stage_with_turns(page_size=page_size, pages=200)
    history = stage.history("s")
    fork(stage, at_tokens=at)
    assert stage.history("f") == history[:at]
    say(stage, 1, "f", QUESTION)
    say(stage, 2, "s", [9, 9])
    assert stage.history("s")[: len(history)] == history


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_fork_at_the_end_computes_only_what_is_new(page_size: int) -> None:
    stage = stage_with_turns(page_size=page_size, pages=200)
    tokens = len(stage.history("s"))
    view = fork(stage)
    assert (view.tokens, view.kv_tokens, view.turns) == (tokens, tokens - 1, 2)
    stage.submit(1, QUESTION, session="f", max_new_tokens=1)
    stage.run()
    assert stage.done[1].cached_tokens == tokens - 1


def test_h29_a_fork_shares_full_pages_and_copies_one() -> None:
    stage = stage_with_turns(page_size=4, pages=64)
    free = stage.stats().pages_free
    view = fork(stage, at_tokens=20)
    assert stage.stats().pages_free == free - 1
    assert (view.shared_pages, view.own_pages) == (4, 1)
    say(stage, 1, "f", QUESTION)
    assert [plan.copies[:, 2].tolist() for plan in stage.plans if len(plan.copies)] == [[3]]


def test_a_fork_without_a_free_page_recomputes_less_than_a_page() -> None:
    stage = stage_with_turns(page_size=4, pages=7)
    assert stage.stats().pages_free == 1
    assert fork(stage, at_tokens=19).kv_tokens == 18
    assert fork(stage, child="g", at_tokens=19).kv_tokens == 16
    stage.close("f")
    say(stage, 1, "g", [1])


def test_a_fork_copies_as_well_while_the_copy_for_another_one_is_on_its_way() -> None:
    stage = stage_with_turns(page_size=4, pages=64)
    fork(stage, at_tokens=20)
    stage.submit(1, QUESTION, session="f")
    while not any(len(plan.copies) for plan in stage.plans):
        stage.launch()
    assert 1 not in stage.done
    assert fork(stage, child="g", at_tokens=20).kv_tokens == 19
    stage.run()
    for key, session in ((2, "g"), (3, "s"), (4, "f")):
        say(stage, key, session, [5])


def test_a_fork_of_a_turn_ends_where_the_turn_ended() -> None:
    stage = stage_with_turns(3)
    assert fork(stage, at_turn=1).tokens == 14
    assert fork(stage, child="g", at_turn=0).tokens == 0
    assert [stage.view("f").turns, stage.view("g").turns] == [1, 0]


def test_a_fork_of_a_fork_shares_the_same_pages() -> None:
    stage = stage_with_turns()
    fork(stage)
    fork(stage, child="g", session="f")
    for key, session in ((1, "g"), (2, "s"), (3, "f")):
        say(stage, key, session, [key])


def test_a_fork_outlives_its_parent() -> None:
    stage = stage_with_turns()
    fork(stage)
    stage.close("s")
    say(stage, 1, "f", QUESTION)


def test_h60_a_fork_between_done_and_the_end_of_the_drain_is_accepted() -> None:
    stage = stage_with_turns(1, chunk=4)
    stop = expected(stage.history("s") + QUESTION, 1)
    stage.submit(1, QUESTION, session="s", stop_token_ids=tuple(stop))
    while 1 not in stage.done:
        stage.launch()
    assert stage.stats().requests_draining == 1
    fork(stage)
    for key, session in ((2, "f"), (3, "s")):
        say(stage, key, session, [5])


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("to", [0, 1, 4, 6, 9, 13, 20, 21])
def test_h64_a_rewound_session_says_what_a_fresh_prompt_would(page_size: int, to: int) -> None:
    stage = stage_with_turns(page_size=page_size, pages=200)
    history = stage.history("s")
    view = rewind(stage, to_tokens=to)
    assert (view.tokens, view.kv_tokens) == (to, max(0, to - 1))
    assert stage.history("s") == history[:to]
    say(stage, 1, "s", QUESTION)


def test_a_rewind_into_a_page_that_a_fork_reads_leaves_the_fork_as_it_was() -> None:
    stage = stage_with_turns(page_size=4)
    fork(stage)
    rewind(stage, to_tokens=7)
    say(stage, 1, "s", [4, 4, 4])
    say(stage, 2, "f", QUESTION)


def test_a_copy_into_a_page_that_is_given_up_before_the_next_plan_harms_nobody() -> None:
    stage = stage_with_turns(page_size=4)
    fork(stage)
    stage.close("f")
    stage.submit(1, [8] * 30)
    say(stage, 2, "s", QUESTION)
    assert stage.output[1] == expected([8] * 30)


@pytest.mark.parametrize("operation", [ForkSession, RewindSession])
@pytest.mark.parametrize(
    ("place", "message"),
    [(22, "from 0 to 21"), (-1, "from 0 to 21"), (10**12, "from 0 to 21")],
)
def test_a_place_beyond_the_history_is_refused(operation: type, place: int, message: str) -> None:
    stage = stage_with_turns()
    named = {"child": "f", "at_tokens": place} if operation is ForkSession else {"to_tokens": place}
    error = stage.ask(operation, session="s", **named).error
    assert error is not None and message in error.message and error.status == 400
    assert len(stage.history("s")) == 21 and stage.stats().sessions_open == 1


@pytest.mark.parametrize("turn", [-1, 3])
def test_a_turn_that_the_session_never_had_is_refused(turn: int) -> None:
    error = stage_with_turns().ask(ForkSession, session="s", child="f", at_turn=turn).error
    assert error is not None and "from 0 to 2, the turns" in error.message


@pytest.mark.parametrize("operation", [ForkSession, RewindSession])
def test_a_busy_session_is_neither_forked_nor_rewound(operation: type) -> None:
    stage = stage_with_turns()
    stage.submit(1, QUESTION, session="s")
    named = {"child": "f"} if operation is ForkSession else {"to_turn": 0}
    error = stage.ask(operation, session="s", **named).error
    assert error is not None and error.status == 409
    stage.run()
    assert len(stage.history("s")) == 28


def test_a_fork_to_a_name_that_is_taken_is_refused() -> None:
    error = stage_with_turns().ask(ForkSession, session="s", child="s").error
    assert error is not None and error.code == "duplicate_session"


def test_h59_a_turn_on_another_history_than_the_client_thinks_is_refused() -> None:
    stage = stage_with_turns()
    wish = Sampling(seed=1, temperature=0.0, max_new_tokens=4)
    stage.send(Submit(key=1, tokens=pack_tokens(QUESTION), sampling=wish, session="s", expect_tokens=14))
    assert (stage.done[1].status, stage.done[1].code) == (409, "history_mismatch")
    assert "has 21 tokens, not 14" in stage.done[1].message
    stage.send(Submit(key=2, tokens=pack_tokens(QUESTION), sampling=wish, session="s", expect_tokens=21))
    stage.run()
    assert stage.done[2].reason == "length"


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_turns_forks_and_rewinds_says_what_fresh_prompts_would(seed: int) -> None:
    draw = Random(seed)
    page_size = draw.choice([1, 4, 8])
    stage = Stage(pages=draw.choice([48, 96, 240]) // page_size + 1, page_size=page_size, chunk=draw.choice([3, 16]))
    stage.open("s0")
    names = ["s0"]
    for key in range(40):
        session = draw.choice(names)
        action = draw.choice(["turn", "turn", "fork", "rewind", "close"])
        length = len(stage.history(session))
        if action == "turn" and length < 25:
            say(stage, key, session, [draw.randrange(50) for _ in range(draw.randint(1, 6))])
        elif action == "fork" and len(names) < 6:
            names.append(f"s{key}-f")
            fork(stage, child=names[-1], session=session, at_tokens=draw.randint(0, length))
        elif action == "rewind":
            rewind(stage, session, to_tokens=draw.randint(0, length))
        elif action == "close" and len(names) > 1:
            stage.close(session)
            names.remove(session)
        stage.machine.audit()
    for session in names:
        stage.close(session)
    assert stage.stats().pages_sessions == 0


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_h62_a_fork_of_a_fork_reads_the_trees_pages_where_it_has_copies_of_its_own(page_size: int) -> None:
    stage = Stage(page_size=page_size, pages=400 // page_size, rows=2)
    stage.open("s")
    say(stage, 1, "s", PROMPT * 3 + QUESTION)
    history = stage.history("s")
    fork(stage, "other", at_tokens=len(history) - 5)
    # The same tokens as in the parent, computed into pages of its own, and a page of which the fork copied the head.
    say(stage, 2, "other", history[len(history) - 5 :])
    say(stage, 3, "other", QUESTION)
    tokens = len(stage.history("other"))
    stage.run()
    stage.settle()
    view = fork(stage, "third", session="other")
    assert view.kv_tokens == tokens - 1
    say(stage, 4, "third", [9])
    assert stage.done[4].cached_tokens == tokens - 1
    say(stage, 5, "other", [9])
    assert stage.done[5].cached_tokens == tokens - 1

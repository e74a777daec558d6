"""Turns as transactions, preemption, draining: what docs/INVARIANTS.md claims of sessions and requests."""

import pytest

from sessile.contract.messages import Cancel, Flush
from tests.unit.stage import Stage, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
QUESTION = [7, 7, 8]


def warm_stage(**settings: int) -> Stage:
    """A stage whose session "s" has finished one turn."""
    stage = Stage(**settings)
    stage.open("s")
    stage.submit(1, PROMPT, session="s")
    stage.run()
    return stage


def test_a_plain_request_says_what_the_reference_says() -> None:
    stage = Stage()
    stage.submit(1, PROMPT)
    stage.run()
    assert stage.output[1] == expected(PROMPT)
    assert (stage.done[1].reason, stage.done[1].completion_tokens) == ("length", 4)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_h65_a_warm_turn_reuses_all_tokens_of_the_history_but_the_last(page_size: int) -> None:
    stage = warm_stage(page_size=page_size, pages=128)
    history = stage.history("s")
    before = stage.queries
    stage.submit(2, QUESTION, session="s", max_new_tokens=1)
    stage.run()
    done = stage.done[2]
    assert done.cached_tokens == len(history) - 1
    assert stage.queries - before == done.computed_tokens == done.prompt_tokens - done.cached_tokens
    assert stage.output[2] == expected(history + QUESTION, 1)


def test_a_finished_turn_is_history_input_and_output() -> None:
    stage = warm_stage()
    assert stage.history("s") == PROMPT + stage.output[1]
    assert stage.done[1].session_tokens == len(PROMPT) + 4


def test_an_empty_turn_goes_on_from_the_history() -> None:
    stage = warm_stage()
    history = stage.history("s")
    stage.submit(2, [], session="s")
    stage.run()
    assert stage.output[2] == expected(history)


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3])
def test_h18_h28_an_aborted_turn_leaves_history_and_kv_as_they_were(steps_before: int) -> None:
    stage = warm_stage(chunk=4)
    before = (stage.history("s"), stage.view("s").kv_tokens)
    stage.submit(2, QUESTION * 3, session="s")
    stage.step(steps_before)
    stage.send(Cancel(2))
    stage.run()
    assert (stage.history("s"), stage.view("s").kv_tokens) == before
    assert stage.done[2].reason == "abort"


def test_h27_a_turn_that_is_cancelled_in_flight_is_rolled_back_and_the_next_one_is_right() -> None:
    stage = warm_stage()
    history = stage.history("s")
    stage.submit(2, QUESTION, session="s")
    stage.launch()
    stage.send(Cancel(2))
    stage.submit(3, QUESTION, session="s")
    stage.run()
    assert stage.output[3] == expected(history + QUESTION)


def test_h17_the_pages_of_a_first_turn_that_is_aborted_have_an_owner_until_they_are_free() -> None:
    stage = Stage(chunk=4)
    stage.open("s")
    stage.submit(1, PROMPT, session="s")
    stage.step()
    stage.send(Cancel(1))
    stage.run()
    stage.close("s")
    stage.ask(Flush)
    assert stage.stats().pages_free == 63


def test_h25_a_second_turn_is_refused_and_takes_nothing_from_the_first() -> None:
    stage = warm_stage()
    stage.submit(2, QUESTION, session="s")
    stage.step()
    stage.submit(3, QUESTION, session="s")
    stage.submit(4, QUESTION, session="s")
    assert [stage.done[key].code for key in (3, 4)] == ["session_busy", "session_busy"]
    history = stage.history("s")
    stage.run()
    assert stage.output[2] == expected(history + QUESTION)


def test_h33_h34_a_turn_cancelled_before_it_ran_gives_the_right_to_be_in_flight_back() -> None:
    stage = warm_stage()
    stage.submit(2, QUESTION, session="s")
    stage.send(Cancel(2))
    stage.submit(3, QUESTION, session="s")
    stage.run()
    assert stage.done[3].reason == "length"


def test_h60_a_turn_sent_while_the_last_one_drains_is_taken() -> None:
    stage = Stage()
    stage.open("s")
    stage.submit(1, PROMPT, session="s", max_new_tokens=2)
    while 1 not in stage.done:
        stage.launch()
    stage.submit(2, QUESTION, session="s")
    stage.run()
    assert stage.output[2] == expected(PROMPT + stage.output[1] + QUESTION)


def test_h23_a_session_closed_in_mid_turn_ends_with_its_turn() -> None:
    stage = warm_stage()
    stage.submit(2, QUESTION, session="s")
    stage.launch()
    reply = stage.close("s")
    stage.submit(3, QUESTION, session="s")
    stage.run()
    assert reply.value is not None
    assert reply.value.values == {"closed": False, "deferred": True}  # type: ignore[union-attr]
    assert stage.done[2].reason == "length"
    assert stage.done[3].code == "session_closed"
    assert stage.stats().sessions_open == 0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_h26_h66_a_preempted_request_says_nothing_twice_and_nothing_else(every: int) -> None:
    calm, torn = Stage(), Stage(retract_every=every)
    for stage in (calm, torn):
        stage.open("s")
        stage.submit(1, PROMPT, session="s", max_new_tokens=8)
        stage.submit(2, PROMPT[:5], max_new_tokens=8, temperature=0.8)
        stage.run()
    assert torn.stats().preemptions_total > 0
    assert torn.output == calm.output
    assert torn.history("s") == calm.history("s")


def test_h38_an_idle_session_holds_no_row() -> None:
    stage = Stage(rows=1, pages=128)
    for index in range(5):
        stage.open(f"s{index}")
        stage.submit(index, PROMPT, session=f"s{index}")
        stage.run()
    assert stage.stats().rows_held == 0
    assert stage.stats().sessions_idle == 5


def test_h35_a_session_whose_kv_was_reclaimed_computes_it_again_and_says_the_same() -> None:
    stage = Stage(pages=10, page_size=4)
    stage.open("s")
    stage.submit(1, PROMPT, session="s")
    stage.run()
    history = stage.history("s")
    stage.submit(2, list(range(30)))
    stage.run()
    assert stage.view("s").kv_tokens < len(history) - 1
    stage.submit(3, QUESTION, session="s")
    stage.run()
    assert stage.output[3] == expected(history + QUESTION)


def test_a_shared_prefix_is_computed_once() -> None:
    stage = Stage()
    stage.submit(1, [*PROMPT, 1])
    stage.run()
    stage.submit(2, [*PROMPT, 2])
    stage.run()
    assert stage.done[2].cached_tokens == len(PROMPT) // stage.page_size * stage.page_size
    assert stage.output[2] == expected([*PROMPT, 2])


def test_mixed_steps_say_what_each_request_alone_says() -> None:
    stage = Stage(chunk=5, rows=3)
    prompts = [[(7 * i + j) % 50 for j in range(3 + 4 * i)] for i in range(6)]
    for key, prompt in enumerate(prompts):
        stage.submit(key, prompt, max_new_tokens=6)
    stage.run()
    assert [stage.output[key] for key in range(6)] == [expected(prompt, 6) for prompt in prompts]


def test_h39_a_turn_may_fill_the_context_exactly_and_one_token_more_is_refused() -> None:
    stage = Stage(pages=128)
    stage.open("s")
    stage.submit(1, [1] * 255, session="s", max_new_tokens=None)
    stage.submit(2, [1] * 256)
    stage.run()
    assert stage.done[1].completion_tokens == 1
    assert (stage.done[2].status, "context length" in stage.done[2].message) == (413, True)


def test_h16_a_refused_turn_touches_nothing_of_its_session() -> None:
    stage = warm_stage()
    before = stage.view("s")
    stage.submit(2, [1] * 300, session="s")
    assert stage.done[2].code == "too_long"
    assert stage.view("s") == before


def test_everything_is_free_again_when_all_has_ended() -> None:
    stage = warm_stage()
    stage.submit(2, PROMPT)
    stage.run()
    stage.close("s")
    stage.ask(Flush)
    stats = stage.stats()
    assert (stats.pages_free, stats.pages_limbo, stats.rows_held) == (63, 0, 0)

"""A lost reply costs nothing: the same turn sent again, by name, is answered again and changes nothing (H59)."""

from typing import Any

import pytest

from sessile.contract.messages import Cancel, ForkSession, RewindSession
from tests.unit.stage import Stage, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def session_after(key: int = 1, rid: str = "first", **settings: Any) -> Stage:
    stage = Stage()
    stage.open("s")
    stage.submit(key, PROMPT, session="s", rid=rid, **settings)
    stage.run()
    return stage


def again(stage: Stage, key: int, rid: str = "first", tokens: list[int] = PROMPT) -> None:
    stage.submit(key, tokens, session="s", rid=rid)


def test_h59_the_reply_is_said_again_and_the_history_stays() -> None:
    stage = session_after()
    history, steps = stage.history("s"), stage.stats().steps_total
    again(stage, 2)
    assert stage.output[2] == stage.output[1]
    first, second = stage.done[1], stage.done[2]
    assert (second.reason, second.prompt_tokens, second.completion_tokens, second.cached_tokens) == (
        first.reason, first.prompt_tokens, first.completion_tokens, first.cached_tokens,
    )  # fmt: skip
    assert stage.history("s") == history and second.session_tokens == len(history)
    stats = stage.stats()
    assert (stats.steps_total, stats.turns_committed_total, stats.turns_replayed_total) == (steps, 1, 1)


def test_h59_it_may_be_said_as_often_as_it_is_lost_and_while_the_next_turn_runs() -> None:
    stage = session_after()
    stage.submit(2, [7], session="s", rid="second")
    stage.launch()
    for key in (3, 4):
        again(stage, key)
        assert stage.output[key] == stage.output[1]
    stage.run()
    assert stage.output[2] == expected(PROMPT + stage.output[1] + [7])


def test_h59_only_the_last_turn_is_remembered() -> None:
    stage = session_after()
    stage.submit(2, [7], session="s", rid="second")
    stage.run()
    again(stage, 3)
    stage.run()
    assert stage.done[3].prompt_tokens == len(PROMPT) * 2 + 4 + 1 + 4, "it is a turn like any other"


def test_h59_another_input_under_the_same_name_is_refused() -> None:
    stage = session_after()
    again(stage, 2, tokens=[1, 2])
    assert (stage.done[2].status, stage.done[2].param) == (400, "rid")
    assert len(stage.history("s")) == len(PROMPT) + 4


def test_h59_a_turn_without_a_name_forgets_the_one_before() -> None:
    stage = session_after()
    stage.submit(2, [7], session="s")
    stage.run()
    again(stage, 3)
    stage.run()
    assert stage.done[3].prompt_tokens > len(PROMPT)


@pytest.mark.parametrize("length", [3, 8, 12])
def test_h59_a_rewind_forgets_the_reply_that_it_undid(length: int) -> None:
    stage = session_after()
    stage.ask(RewindSession, session="s", to_tokens=length)
    again(stage, 2)
    stage.run()
    assert stage.done[2].prompt_tokens == length + len(PROMPT)


def test_h59_a_fork_has_no_reply_of_its_own_to_repeat() -> None:
    stage = session_after()
    stage.ask(ForkSession, session="s", child="f")
    stage.submit(2, PROMPT, session="f", rid="first")
    stage.run()
    assert stage.done[2].prompt_tokens == 2 * len(PROMPT) + 4


def test_h59_an_aborted_turn_is_no_reply() -> None:
    stage = Stage()
    stage.open("s")
    stage.submit(1, PROMPT, session="s", rid="first", max_new_tokens=50)
    stage.launch()
    stage.send(Cancel(1))
    again(stage, 2)
    stage.run()
    assert stage.done[2].reason == "length" and stage.output[2] == expected(PROMPT)


def test_h59_log_probabilities_come_again_too() -> None:
    stage = Stage()
    stage.open("s")
    batches = []
    take = stage.machine.take_effects

    def recorded() -> Any:
        batch = take()
        batches.append(batch)
        return batch

    stage.machine.take_effects = recorded  # type: ignore[method-assign]
    stage.submit(1, PROMPT, session="s", rid="first", logprobs=2, prompt_logprobs_from=1)
    stage.run()
    stage.submit(2, PROMPT, session="s", rid="first", logprobs=2, prompt_logprobs_from=1)

    def told(key: int, kind: str, field: str) -> bytes:
        found = [each for batch in batches if batch for each in getattr(batch, kind) if each.key == key]
        return b"".join([getattr(each, field) for each in found])

    for kind, field in (("details", "logprobs"), ("details", "top_ids"), ("details", "top_logprobs"),
                        ("scores", "tokens"), ("scores", "logprobs"), ("scores", "top_ids")):  # fmt: skip
        assert told(1, kind, field) == told(2, kind, field) != b""

"""Groups: several answers to one prompt compute it once, whatever becomes of the first."""

import pytest

from sessile.contract.messages import Cancel
from tests.unit.stage import Stage, expected

PROMPT = [(7 * index) % 50 for index in range(37)]
every_page_size = pytest.mark.parametrize("page_size", [1, 4, 16, 256])


def staged(page_size: int = 4, **settings: object) -> Stage:
    return Stage(page_size=page_size, pages=max(12, 4 + 8 * 50 // page_size), **({"rows": 8} | settings))


def send(stage: Stage, keys: range, prompt: list[int] = PROMPT, **settings: object) -> None:
    for key in keys:
        stage.submit(key, prompt, group=keys[0], **settings)


@every_page_size
@pytest.mark.parametrize("prompt_tokens", [1, 2, 15, 16, 17, 32, 37])
def test_eight_answers_compute_their_prompt_once(page_size: int, prompt_tokens: int) -> None:
    stage = staged(page_size)
    send(stage, range(1, 9), PROMPT[:prompt_tokens], max_new_tokens=6)
    stage.run()
    for key in range(1, 9):
        assert stage.output[key] == expected(PROMPT[:prompt_tokens], 6)
    # Each runs the last prompt token for itself, from which its first token is sampled, and five tokens of its own.
    assert stage.queries == (prompt_tokens - 1) + 8 * 6
    assert [stage.done[key].cached_tokens for key in range(1, 9)] == [0] + 7 * [prompt_tokens - 1]
    assert sum(stage.done[key].computed_tokens for key in range(1, 9)) == prompt_tokens + 7


def check_nothing_is_left(stage: Stage) -> None:
    """All rows are free; what pages are held, the tree could let go of."""
    stats = stage.stats()
    assert (stats.rows_held, stats.requests_running, stats.requests_waiting, stats.pages_requests) == (0, 0, 0, 0)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_a_leader_that_is_cancelled_is_followed_by_the_next(steps: int) -> None:
    stage = staged(chunk=16)
    send(stage, range(1, 5))
    for _ in range(steps):
        stage.launch()
    stage.send(Cancel(1))
    stage.run()
    for key in (2, 3, 4):
        assert stage.output[key] == expected(PROMPT)
    assert [stage.done[key].cached_tokens for key in (3, 4)] == 2 * [len(PROMPT) - 1]
    check_nothing_is_left(stage)


def test_a_follower_that_is_cancelled_while_it_waits_leaves_the_others_alone() -> None:
    stage = staged(chunk=16)
    send(stage, range(1, 5))
    stage.launch()
    stage.send(Cancel(3))
    stage.run()
    assert (stage.done[3].reason, stage.output[3]) == ("abort", [])
    assert [stage.output[key] for key in (1, 2, 4)] == 3 * [expected(PROMPT)]
    check_nothing_is_left(stage)


def test_h29_a_leader_goes_on_writing_behind_what_was_copied() -> None:
    stage = staged(16)
    send(stage, range(1, 4), max_new_tokens=20)
    stage.run()
    assert len([copy for plan in stage.plans for copy in plan.copies.tolist()]) == 2
    assert [stage.output[key] for key in (1, 2, 3)] == 3 * [expected(PROMPT, 20)]


def test_a_leader_that_ends_with_its_prompt_leaves_less_than_a_page_to_compute() -> None:
    stage = staged(16)
    send(stage, range(1, 9), max_new_tokens=1)
    stage.run()
    assert [stage.done[key].cached_tokens for key in range(1, 9)] == [0] + 7 * [32]
    assert [stage.output[key] for key in range(1, 9)] == 8 * [expected(PROMPT, 1)]
    assert len(stage.plans) == 2, "nobody waits for what nobody can give"


def test_h26_a_group_that_is_preempted_says_the_same() -> None:
    stage = Stage(pages=20, page_size=4, rows=4, retract_every=3)
    send(stage, range(1, 5), max_new_tokens=24)
    stage.run()
    assert sum(stage.done[key].preemptions for key in range(1, 5)) > 0
    assert [stage.output[key] for key in range(1, 5)] == 4 * [expected(PROMPT, 24)]
    check_nothing_is_left(stage)


def test_prompts_that_are_to_be_scored_are_computed_as_far_as_the_scores_need_it() -> None:
    stage = staged()
    send(stage, range(1, 3), prompt_logprobs_from=0)
    stage.run()
    assert stage.done[2].cached_tokens == 0
    assert stage.output[2] == expected(PROMPT)


def test_a_request_of_another_prompt_or_tenant_is_not_of_the_group() -> None:
    stage = staged()
    send(stage, range(1, 2))
    stage.submit(2, [*PROMPT, 1], group=1)
    stage.submit(3, PROMPT, group=1, tenant="ada")
    stage.open("s")
    stage.submit(4, PROMPT, group=1, session="s")
    assert [stage.done[key].param for key in (2, 3, 4)] == ["n", "n", "n"]
    stage.run()
    assert stage.output[1] == expected(PROMPT)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_group_with_more_members_than_rows_runs_to_its_end(rows: int) -> None:
    stage = staged(rows=rows)
    send(stage, range(1, 6))
    stage.run()
    assert [stage.output[key] for key in range(1, 6)] == 5 * [expected(PROMPT)]


# -- nobody waits for nothing -----------------------------------------------------------------------------------


def in_steps(stage: Stage, step: int) -> list[int]:
    """Rows that run in a step, the first being 0."""
    return sorted(stage.plans[step].rows.tolist())


def test_who_has_to_score_its_prompt_does_not_wait_for_a_leader_that_can_give_it_nothing() -> None:
    stage = staged(chunk=64)
    send(stage, range(1, 3), prompt_logprobs_from=0)
    stage.launch()
    assert len(in_steps(stage, 0)) == 2, "both compute the prompt, side by side"
    stage.run()
    assert [stage.output[key] for key in (1, 2)] == 2 * [expected(PROMPT)]


def test_who_scores_the_end_of_its_prompt_waits_for_the_pages_before_it() -> None:
    stage = staged(page_size=4, chunk=16)
    send(stage, range(1, 3), prompt_logprobs_from=30)
    stage.run()
    assert stage.done[2].cached_tokens == 28, "the whole pages before the query of the first score"
    assert [stage.output[key] for key in (1, 2)] == 2 * [expected(PROMPT)]


def test_who_has_to_score_its_prompt_does_not_wait_for_a_prefix_that_is_of_no_use() -> None:
    stage = staged(chunk=64)
    stage.submit(1, PROMPT)
    stage.submit(2, PROMPT, prompt_logprobs_from=0)
    stage.launch()
    assert len(in_steps(stage, 0)) == 2
    stage.run()
    assert [stage.output[key] for key in (1, 2)] == 2 * [expected(PROMPT)]


def test_h77_followers_that_wait_do_not_hide_who_stands_behind_them() -> None:
    stage = staged(chunk=16, admissions_max=4)
    send(stage, range(1, 8))
    stage.submit(99, PROMPT[20:25])
    for _ in range(3):
        stage.launch()
    assert len(in_steps(stage, 2)) == 2, "the leader's last 5 tokens leave 11 of the budget"
    stage.run()
    assert stage.output[99] == expected(PROMPT[20:25])
    assert [stage.output[key] for key in range(1, 8)] == 7 * [expected(PROMPT)]


def test_a_step_admits_no_more_than_it_may_however_large_the_group() -> None:
    stage = staged(chunk=64, admissions_max=2)
    send(stage, range(1, 8))
    stage.run()
    assert max(len(plan.bind_rows) for plan in stage.plans) == 2
    assert [stage.output[key] for key in range(1, 8)] == 7 * [expected(PROMPT)]


# -- giving up waiting ------------------------------------------------------------------------------------------


def give_up(stage: Stage, *keys: int) -> None:
    for key in keys:
        stage.send(Cancel(key, "waited too long", if_waiting=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_followers_of_a_leader_that_runs_have_not_waited_in_vain(steps: int) -> None:
    stage = staged(chunk=16)
    send(stage, range(1, 5))
    for _ in range(steps):
        stage.launch()
    give_up(stage, 1, 2, 3, 4)
    stage.run()
    assert [stage.output[key] for key in range(1, 5)] == 4 * [expected(PROMPT)]


def test_h26_followers_of_a_leader_that_was_preempted_wait_on() -> None:
    stage = staged(rows=1)
    send(stage, range(1, 3))
    stage.step(2)
    stage.machine.preempt(1)
    give_up(stage, 1, 2)
    stage.run()
    assert [stage.output[key] for key in (1, 2)] == 2 * [expected(PROMPT)]


def test_a_group_of_which_nobody_was_admitted_is_refused_as_a_whole() -> None:
    stage = staged(rows=1)
    stage.submit(9, PROMPT[:3], max_new_tokens=8)
    stage.step()
    send(stage, range(1, 4))
    give_up(stage, 1, 2, 3)
    assert [stage.done[key].status for key in (1, 2, 3)] == [503, 503, 503]

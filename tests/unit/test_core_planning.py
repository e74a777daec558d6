"""What a step runs: the shared budget, who is admitted, who waits, who is preempted, and that all of them end."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sessile.contract.messages import Cancel
from sessile.contract.plan import FROM_DEVICE, SAMPLE, StepPlan
from sessile.core import rows
from sessile.core.limits import TenantPolicy
from sessile.core.marks import Mark
from tests.unit.drafters import PerfectDrafter
from tests.unit.stage import Stage, expected


def prompt(seed: int, count: int) -> list[int]:
    """Tokens that no other seed's prompt begins with."""
    return [seed, *((7 * seed + 3 * index) % 50 for index in range(count - 1))]


def decoding(plan: StepPlan) -> np.ndarray:
    """Which rows of a plan decode, as against reading a part of a prompt."""
    return (plan.query_counts == 1 + plan.draft_counts) & (plan.flags & SAMPLE > 0) & (plan.output_indices > 0)


def assert_said(stage: Stage, prompts: dict[int, list[int]], count: int) -> None:
    for key, tokens in prompts.items():
        assert stage.output[key] == expected(tokens, count)


def bound_order(stage: Stage) -> list[int]:
    """Seeds of requests, which are their keys, in the order in which they got a row."""
    return [int(ints[2]) for plan in stage.plans for ints in plan.bind_ints]


# -- the budget ---------------------------------------------------------------------------------------------------


def test_h15_several_partial_prompts_share_the_budget_of_a_step() -> None:
    stage = Stage(chunk=16)
    prompts = {key: prompt(key, 12) for key in (1, 2, 3)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens)
    stage.run()
    assert stage.plans[0].query_counts.tolist() == [12, 4]
    assert all(plan.query_counts.sum() <= 16 for plan in stage.plans)
    assert_said(stage, prompts, 4)


def test_a_prompt_longer_than_the_budget_is_read_in_chunks() -> None:
    stage = Stage(chunk=8)
    stage.submit(1, prompt(1, 21))
    stage.run()
    assert [plan.query_counts.tolist() for plan in stage.plans[:3]] == [[8], [8], [5]]
    assert [bool(plan.flags[0] & SAMPLE) for plan in stage.plans[:3]] == [False, False, True]


def test_a_step_in_which_anything_decodes_keeps_to_the_smaller_budget() -> None:
    stage = Stage(chunk=32, mixed_chunk_tokens=8)
    stage.submit(1, prompt(1, 5), max_new_tokens=12)
    stage.step()
    stage.submit(2, prompt(2, 40))
    stage.run()
    mixed = [plan for plan in stage.plans if decoding(plan).any()]
    assert max(int(plan.query_counts.sum()) for plan in mixed) == 8
    assert_said(stage, {2: prompt(2, 40)}, 4)


def test_the_engine_may_lower_the_budget_at_any_time() -> None:
    stage = Stage(chunk=32)
    stage.submit(1, prompt(1, 60))
    stage.step()
    stage.machine.set_chunk_tokens(5)
    stage.run()
    assert [int(plan.query_counts.sum()) for plan in stage.plans[:3]] == [32, 5, 5]
    assert_said(stage, {1: prompt(1, 60)}, 4)


def test_more_rows_than_the_budget_has_tokens_take_turns_oldest_first() -> None:
    stage = Stage(chunk=2, rows=4)
    prompts = {key: prompt(key, 3) for key in (1, 2, 3, 4)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens, max_new_tokens=6)
    stage.run()
    assert_said(stage, prompts, 6)
    assert list(stage.done) == [1, 2, 3, 4]


def test_without_mixed_steps_prompts_and_decoding_take_turns_and_neither_starves() -> None:
    stage = Stage(chunk=4, mixed_chunk=False)
    prompts = {1: prompt(1, 3), 2: prompt(2, 30), 3: prompt(3, 30)}
    stage.submit(1, prompts[1], max_new_tokens=12)
    stage.step(2)
    for key in (2, 3):
        stage.submit(key, prompts[key], max_new_tokens=12)
    stage.run()
    kinds = [set(decoding(plan).tolist()) for plan in stage.plans]
    assert all(len(kind) == 1 for kind in kinds)
    while_both = [kind.pop() for kind in kinds[2:16]]
    assert while_both == [False, True] * 7 or while_both == [True, False] * 7
    assert_said(stage, prompts, 12)


def test_no_step_computes_what_nobody_will_see() -> None:
    stage = Stage()
    stage.submit(1, prompt(1, 9), max_new_tokens=7)
    stage.run()
    assert stage.queries == 9 + 7 - 1


def test_a_row_in_flight_takes_its_next_input_from_the_device() -> None:
    stage = Stage()
    stage.submit(1, prompt(1, 5))
    stage.launch()
    stage.launch()
    assert (stage.plans[1].flags.tolist(), stage.plans[1].tokens.tolist()) == ([SAMPLE | FROM_DEVICE], [-1])
    stage.run()
    assert_said(stage, {1: prompt(1, 5)}, 4)


def test_a_settled_row_brings_its_next_input_along() -> None:
    stage = Stage()
    stage.submit(1, prompt(1, 5))
    stage.step(2)
    assert (stage.plans[1].flags.tolist(), stage.plans[1].tokens.tolist()) == ([SAMPLE], stage.output[1][:1])


# -- shortage -----------------------------------------------------------------------------------------------------


def test_h37_a_row_sits_out_a_step_when_limbo_covers_what_it_lacks() -> None:
    stage = Stage(pages=7, output_estimate_tokens=1)
    stage.submit(1, prompt(1, 6), max_new_tokens=6)
    stage.submit(2, prompt(2, 14), max_new_tokens=9)
    for _ in range(3):
        stage.launch()
    stage.send(Cancel(2))  # Its last page waits in limbo for the step in flight; request 1 needs one now.
    assert stage.stats().pages_free == 0
    assert not stage.launch()
    assert stage.launch()
    stage.run()
    assert stage.stats().preemptions_total == 0
    assert_said(stage, {1: prompt(1, 6)}, 6)


def tight_stage(**settings: Any) -> Stage:
    """Two requests that fit when they are admitted and do not when they have grown."""
    stage = Stage(pages=9, output_estimate_tokens=1, **settings)
    stage.submit(1, prompt(1, 9), max_new_tokens=16)
    stage.submit(2, prompt(2, 9), max_new_tokens=16)
    return stage


@pytest.mark.parametrize("overlap", [True, False])
def test_h77_the_newest_is_preempted_for_an_older_one_and_never_the_other_way(overlap: bool) -> None:
    stage = tight_stage()
    while stage.machine.has_work:
        stage.launch()
        if not overlap:
            stage.settle()
    assert (stage.done[1].preemptions, stage.done[2].preemptions > 0) == (0, True)
    assert_said(stage, {1: prompt(1, 9), 2: prompt(2, 9)}, 16)


def test_h77_a_newest_row_that_lacks_a_page_waits_for_the_older_one() -> None:
    stage = Stage(pages=7, output_estimate_tokens=1)
    stage.submit(1, prompt(1, 13), max_new_tokens=3)
    stage.submit(2, prompt(2, 8), max_new_tokens=6)
    stage.run()
    assert [stage.done[key].preemptions for key in (1, 2)] == [0, 0]
    assert_said(stage, {2: prompt(2, 8)}, 6)


def test_a_preempted_request_goes_before_whoever_came_after_it() -> None:
    stage = tight_stage(rows=2)
    for key in (3, 4):
        stage.submit(key, prompt(key, 9), max_new_tokens=16)
    stage.run()
    order = bound_order(stage)
    assert order.count(2) > 1
    assert max(index for index, key in enumerate(order) if key == 2) < order.index(4)


def test_h37_what_a_victim_held_is_there_for_the_row_that_needed_it() -> None:
    stage = tight_stage()
    while not stage.machine.stats().preemptions_total:
        stage.launch()
    stats = stage.stats()
    assert stats.requests_running == 1
    assert stats.pages_free + stats.pages_limbo + stats.pages_tree - stats.pages_tree_pinned >= 4


def test_h66_a_preempted_prompt_goes_on_behind_what_the_tree_kept() -> None:
    calm, torn = Stage(chunk=8), Stage(chunk=8, retract_every=2)
    for stage in (calm, torn):
        stage.submit(1, prompt(1, 60))
        stage.run()
    assert torn.done[1].preemptions > 0
    assert torn.queries < 2 * calm.queries
    assert torn.output == calm.output


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.8}, {"frequency_penalty": 0.5}, {"min_new_tokens": 8, "stop_token_ids": tuple(range(25))}],
    ids=["noise", "penalty", "bans"],
)
def test_h76_noise_penalties_and_bans_go_on_where_a_preempted_request_was(settings: dict[str, Any]) -> None:
    calm, torn = Stage(), Stage(retract_every=3)
    for stage in (calm, torn):
        stage.submit(1, prompt(1, 9), max_new_tokens=10, **settings)
        stage.run()
    assert torn.done[1].preemptions > 0
    assert torn.output == calm.output


# -- drafts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 3, 99])
@pytest.mark.parametrize("new_tokens", [1, 2, 5, 16])
def test_h49_drafts_change_the_number_of_steps_and_nothing_else(right: int, new_tokens: int) -> None:
    stage = Stage(drafter=PerfectDrafter(right), drafts_max=4)
    prompts = {key: prompt(key, 5 * key) for key in (1, 2, 3)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens, max_new_tokens=new_tokens)
    stage.run()
    assert_said(stage, prompts, new_tokens)
    assert all(stage.done[key].completion_tokens == new_tokens for key in prompts)


def test_right_drafts_save_steps() -> None:
    plain, drafted = Stage(), Stage(drafter=PerfectDrafter(), drafts_max=4)
    for stage in (plain, drafted):
        stage.submit(1, prompt(1, 9), max_new_tokens=20)
        stage.run()
    assert len(drafted.plans) * 3 < len(plain.plans)
    stats = drafted.stats()
    assert stats.drafts_accepted_total == stats.drafts_offered_total > 0


def test_a_drafter_sees_what_was_settled() -> None:
    drafter = PerfectDrafter()
    stage = Stage(drafter=drafter, drafts_max=2)
    stage.submit(1, prompt(1, 9), max_new_tokens=10)
    stage.run()
    told = prompt(1, 9) + stage.output[1]
    assert drafter.shown
    for text in drafter.shown:
        assert text == told[: len(text)]


def test_drafts_count_against_the_budget() -> None:
    stage = Stage(chunk=7, drafter=PerfectDrafter(), drafts_max=4, rows=3)
    for key in (1, 2, 3):
        stage.submit(key, prompt(key, 5), max_new_tokens=12)
    stage.run()
    assert max(int(plan.query_counts.sum()) for plan in stage.plans) == 7
    assert_said(stage, {key: prompt(key, 5) for key in (1, 2, 3)}, 12)


def test_h48_drafts_take_only_pages_that_nobody_needs() -> None:
    stage = Stage(pages=13, drafter=PerfectDrafter(right=0), drafts_max=8)
    for key in (1, 2):  # Together they need every page of the pool, and no more.
        stage.submit(key, prompt(key, 9), max_new_tokens=16)
    stage.run()
    assert stage.stats().drafts_offered_total > 0
    assert stage.stats().preemptions_total == 0
    assert_said(stage, {key: prompt(key, 9) for key in (1, 2)}, 16)


def test_h48_drafting_never_costs_an_older_request_its_pages() -> None:
    stage = tight_stage(drafter=PerfectDrafter(right=0), drafts_max=4)
    stage.run()
    assert_said(stage, {key: prompt(key, 9) for key in (1, 2)}, 16)
    assert stage.done[1].preemptions == 0


# -- admission ----------------------------------------------------------------------------------------------------


def test_h35_the_head_of_the_line_starts_though_idle_sessions_fill_the_pool() -> None:
    stage = Stage(pages=13)
    for key in (1, 2, 3):
        stage.open(f"s{key}")
        stage.submit(key, prompt(key, 10), session=f"s{key}", max_new_tokens=3)
        stage.run()
    stage.submit(4, prompt(4, 44), max_new_tokens=2)
    stage.run()
    assert_said(stage, {4: prompt(4, 44)}, 2)
    assert stage.stats().demoted_pages_total > 0


def test_h61_sessions_whose_turns_wait_give_their_pages_to_the_head_of_the_line() -> None:
    stage = Stage(pages=13, rows=1)
    for key in (1, 2, 3):
        stage.open(f"s{key}")
        stage.submit(key, prompt(key, 10), session=f"s{key}", max_new_tokens=3)
        stage.run()
    histories = {key: stage.history(f"s{key}") for key in (1, 2, 3)}
    stage.submit(4, prompt(4, 44), max_new_tokens=2)
    for key in (1, 2, 3):
        stage.submit(10 + key, [9], session=f"s{key}", max_new_tokens=3)
    stage.run()
    assert_said(stage, {4: prompt(4, 44)}, 2)
    assert_said(stage, {10 + key: [*history, 9] for key, history in histories.items()}, 3)


def test_reclaiming_takes_what_was_not_used_for_longest() -> None:
    stage = Stage(pages=13, page_size=4)
    for key in (1, 2):
        stage.open(f"s{key}")
        stage.submit(key, prompt(key, 14), session=f"s{key}", max_new_tokens=3)
        stage.run()
    stage.submit(3, [9], session="s1", max_new_tokens=1)  # Now s2 is the older one.
    stage.run()
    stage.submit(4, prompt(4, 14), max_new_tokens=2)
    stage.run()
    views = {key: stage.view(f"s{key}") for key in (1, 2)}
    assert (views[1].kv_tokens, views[2].kv_tokens < views[2].tokens - 1) == (views[1].tokens - 1, True)


def crowd(overtakes_max: int) -> list[int]:
    """The order in which requests get rows: 1 runs, 2 is big and has to wait for it, 3 … 8 are small and fit."""
    stage = Stage(pages=17, rows=8, overtakes_max=overtakes_max, output_estimate_tokens=100)
    stage.submit(1, prompt(1, 24), max_new_tokens=20)
    stage.step()
    stage.submit(2, prompt(2, 40), max_new_tokens=4)
    for key in range(3, 9):
        stage.submit(key, prompt(key, 2), max_new_tokens=1)
    stage.run()
    assert_said(stage, {2: prompt(2, 40)}, 4)
    return bound_order(stage)


def test_later_requests_that_fit_may_overtake_the_head_of_the_line() -> None:
    assert crowd(overtakes_max=64).index(2) == 7


@pytest.mark.parametrize("overtakes_max", [0, 1, 2, 4])
def test_h77_the_head_of_the_line_is_overtaken_a_bounded_number_of_times(overtakes_max: int) -> None:
    assert crowd(overtakes_max).index(2) == 1 + overtakes_max


def test_h67_unset_output_limits_are_admitted_by_estimate_not_by_bound() -> None:
    stage = Stage(pages=257, rows=16)
    for key in range(16):
        stage.submit(key, prompt(key, 8), max_new_tokens=None)
    stage.step()
    by_the_bound = 256 // (256 // 4)
    assert stage.stats().requests_running > by_the_bound


def test_h37_what_is_admitted_side_by_side_when_limits_are_exact_is_never_preempted() -> None:
    stage = Stage(pages=21, rows=8, output_estimate_tokens=4096)
    for _ in range(64):  # Every request uses all that it may, so that the forecast comes to expect it.
        stage.submit(len(stage.done), prompt(1, 4), max_new_tokens=14)
        stage.run()
    before = stage.stats().preemptions_total
    for key in range(100, 108):
        stage.submit(key, prompt(key % 50, 6), max_new_tokens=14)
    stage.run()
    assert stage.stats().preemptions_total - before <= 1
    assert_said(stage, {key: prompt(key % 50, 6) for key in range(100, 108)}, 14)


def test_no_more_rows_run_than_there_are() -> None:
    stage = Stage(rows=2)
    for key in range(6):
        stage.submit(key, prompt(key, 4))
    stage.run()
    assert max(len(plan.rows) for plan in stage.plans) == 2
    assert_said(stage, {key: prompt(key, 4) for key in range(6)}, 4)


def test_at_most_so_many_are_admitted_in_a_step() -> None:
    stage = Stage(rows=4, admissions_max=1)
    for key in range(4):
        stage.submit(key, prompt(key, 4))
    stage.run()
    assert max(len(plan.bind_rows) for plan in stage.plans) == 1


# -- sharing what is being computed -------------------------------------------------------------------------------


def test_a_prefix_that_is_being_computed_is_waited_for_and_then_shared() -> None:
    stage = Stage(chunk=8, rows=4)
    common = prompt(1, 32)
    for key in (1, 2, 3):
        stage.submit(key, [*common, key])
    stage.run()
    assert [stage.done[key].cached_tokens for key in (1, 2, 3)] == [0, 32, 32]
    assert_said(stage, {key: [*common, key] for key in (1, 2, 3)}, 4)


def test_the_wait_for_a_prefix_is_bounded() -> None:
    stage = Stage(chunk=8, rows=4, share_wait_steps=0)
    common = prompt(1, 30)
    for key in (1, 2):
        stage.submit(key, [*common, key])
    stage.run()
    assert stage.done[2].cached_tokens < 28
    assert_said(stage, {key: [*common, key] for key in (1, 2)}, 4)


def test_whoever_waits_for_a_prefix_goes_on_when_its_computation_is_cancelled() -> None:
    stage = Stage(chunk=8, rows=4)
    common = prompt(1, 32)
    for key in (1, 2):
        stage.submit(key, [*common, key])
    stage.step(2)
    stage.send(Cancel(1))
    stage.run()
    assert stage.done[2].cached_tokens == 16
    assert_said(stage, {2: [*common, 2]}, 4)


def test_nobody_waits_for_a_prefix_in_its_last_partial_page() -> None:
    stage = Stage(chunk=64, rows=4)
    for key in (1, 2):
        stage.submit(key, [7, 7, 7, key])
    stage.launch()
    assert len(stage.plans[0].rows) == 2


def test_a_pool_full_of_cache_makes_no_row_sit_out_a_step() -> None:
    stage = Stage(pages=12)
    for key in range(1, 5):
        stage.submit(key, prompt(key, 8), max_new_tokens=1)
        stage.run()
    assert stage.stats().pages_tree >= 8
    stage.submit(9, prompt(9, 4), max_new_tokens=24)
    steps = stage.stats().steps_total
    stage.run()
    assert stage.stats().evicted_pages_total > 0
    assert stage.stats().steps_total - steps == 24


@pytest.mark.parametrize("tokens", range(17, 24))
def test_prompts_take_their_turn_when_decoding_cannot_go_on(tokens: int) -> None:
    """Without mixed steps: the one row that decodes is the newest and gets no page. It sits out, and must not block."""
    tenants = TenantPolicy("old"), TenantPolicy("new")
    stage = Stage(pages=26, page_size=1, chunk=2, mixed_chunk=False, output_estimate_tokens=1, tenants=tenants)
    old, new = prompt(1, tokens), prompt(2, 2)
    stage.submit(1, old, tenant="old", max_new_tokens=2)
    stage.submit(2, new, tenant="new", max_new_tokens=20)
    stage.run()
    assert stage.output[1] == expected(old, 2) and stage.output[2] == expected(new, 20)


@pytest.mark.parametrize("tokens", [8, 9])
def test_a_partial_prompt_goes_on_when_the_budget_went_to_a_row_that_gets_no_page(tokens: int) -> None:
    """Mixed steps of one token: the newest decodes and sits out, and an older prompt must have its token instead."""
    tenants = TenantPolicy("old"), TenantPolicy("new")
    stage = Stage(pages=20, page_size=1, chunk=2, mixed_chunk_tokens=1, output_estimate_tokens=1, tenants=tenants)
    old, new = prompt(1, tokens), prompt(2, 3)
    stage.submit(1, old, tenant="old", max_new_tokens=2)
    stage.submit(2, new, tenant="new", max_new_tokens=15)
    stage.run()
    assert stage.output[1] == expected(old, 2) and stage.output[2] == expected(new, 15)


# -- steps that go on ---------------------------------------------------------------------------------------------


def goes_on(plan: StepPlan, before: StepPlan) -> bool:
    """Whether a plan was made from the one before: what both have in common is the very same arrays."""
    common = ("rows", "query_counts", "draft_counts", "flags", "logprob_tops", "tokens")
    is_same = [getattr(plan, name) is getattr(before, name) for name in common]
    assert all(is_same) or not any(is_same[:1])
    return is_same[0]


def test_rows_that_decode_on_are_planned_from_the_step_before() -> None:
    stage = Stage(audit_level=0)
    prompts = {1: prompt(1, 5), 2: prompt(2, 9)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens, max_new_tokens=14)
    stage.run()
    pairs = [(plan, before) for before, plan in itertools.pairwise(stage.plans) if goes_on(plan, before)]
    assert len(pairs) == len(stage.plans) - 2 == 12  # All but that of the prompts and the first that decodes.
    for plan, before in pairs:
        assert (plan.starts - before.starts).tolist() == [1, 1]
        assert (plan.output_indices - before.output_indices).tolist() == [1, 1]
    assert_said(stage, prompts, 14)


@pytest.mark.parametrize("event", ["comes", "leaves", "ends", "preempted"])
def test_whoever_comes_or_goes_ends_what_goes_on(event: str) -> None:
    stage = Stage(audit_level=0, rows=4)
    prompts = {1: prompt(1, 5), 2: prompt(2, 6)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens, max_new_tokens=12 if (event, key) == ("ends", 2) else 30)
    for _ in range(8):
        stage.launch()
    assert goes_on(stage.plans[-1], stage.plans[-2])
    if event == "comes":
        stage.submit(3, prompt(3, 7), max_new_tokens=10)
    elif event == "leaves":
        stage.send(Cancel(2))
    elif event == "preempted":
        stage.machine.preempt(2)
    stage.run()
    steady = [plan.rows.size for before, plan in itertools.pairwise(stage.plans) if goes_on(plan, before)]
    assert set(steady) == {"comes": {2, 3}, "leaves": {1, 2}, "ends": {1, 2}, "preempted": {2}}[event]
    assert stage.output[1] == expected(prompts[1], 30)
    assert stage.output[2] == expected(prompts[2], len(stage.output[2]))
    assert len(stage.output[2]) == {"leaves": 7, "ends": 12}.get(event, 30)


@pytest.mark.parametrize("audit_level", [0, 2])
def test_a_long_prompt_is_read_beside_rows_that_went_on(audit_level: int) -> None:
    stage = Stage(audit_level=audit_level, rows=4, chunk=32, mixed_chunk_tokens=6)
    stage.submit(1, prompt(1, 5), max_new_tokens=30)
    stage.submit(2, prompt(2, 6), max_new_tokens=30)
    for _ in range(8):
        stage.launch()
    assert goes_on(stage.plans[-1], stage.plans[-2])
    stage.submit(3, prompt(3, 20), max_new_tokens=5)
    stage.run()
    assert [plan.query_counts.tolist() for plan in stage.plans[8:14]] == [[1, 1, 4]] * 5 + [[1, 1, 1]]
    assert_said(stage, {1: prompt(1, 5), 2: prompt(2, 6)}, 30)
    assert_said(stage, {3: prompt(3, 20)}, 5)


@pytest.mark.parametrize("page_size", [1, 3, 8])
def test_what_goes_on_draws_its_pages_when_one_row_comes_to_their_end(page_size: int) -> None:
    stage = Stage(audit_level=0, pages=128, page_size=page_size)
    prompts = {key: prompt(key, 3 + key) for key in (1, 2, 3)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens, max_new_tokens=30)
    stage.run()
    pages: Counter[int] = Counter()
    draws = 0
    for before, plan in itertools.pairwise([stage.plans[0], *stage.plans]):
        if goes_on(plan, before) and plan is not before:
            starts = dict(zip(plan.rows.tolist(), plan.starts.tolist(), strict=True))
            room = {row: pages[row] * page_size - start for row, start in starts.items()}
            # Rows are taken in order of arrival, so row r has key r + 1.
            left = {row: len(prompts[row + 1]) + 29 - start for row, start in starts.items()}
            soon = [row for row in room if room[row] <= page_size // 2 and room[row] < left[row]]
            assert plan.table_rows.tolist() == (soon if min(room.values()) == 0 else [])
            draws += plan.table_rows.size > 0
        pages.update(dict(zip(plan.table_rows.tolist(), plan.table_counts.tolist(), strict=True)))
    assert draws == {1: 28, 3: 14, 8: 4}[page_size]
    assert_said(stage, prompts, 30)


def test_pages_drawn_for_steps_to_come_are_given_up_before_anybody_is_preempted() -> None:
    # The older row comes to the end of its page and draws one for the other too, which the newcomer needs sooner.
    stage = Stage(pages=12, page_size=4, rows=4, chunk=32, mixed_chunk_tokens=8, output_estimate_tokens=1)
    stage.submit(1, prompt(1, 8), max_new_tokens=12)
    stage.submit(2, prompt(2, 6), max_new_tokens=12)
    for _ in range(9):
        stage.launch()
    stage.submit(3, prompt(3, 4), max_new_tokens=4)
    stage.run()
    assert stage.machine.marks[Mark.SPARE_PAGES_GIVEN_UP] == 1
    assert stage.stats().preemptions_total == 0
    for key, tokens, count in ((1, prompt(1, 8), 12), (2, prompt(2, 6), 12), (3, prompt(3, 4), 4)):
        assert stage.output[key] == expected(tokens, count)


def test_what_goes_on_keeps_to_a_budget_that_has_shrunk() -> None:
    stage = Stage(audit_level=0, chunk=16)
    prompts = {key: prompt(key, 4) for key in (1, 2, 3)}
    for key, tokens in prompts.items():
        stage.submit(key, tokens, max_new_tokens=20)
    for _ in range(6):
        stage.launch()
    assert goes_on(stage.plans[-1], stage.plans[-2])
    stage.machine.set_chunk_tokens(2)
    stage.run()
    assert max(plan.tokens.size for plan in stage.plans[6:]) == 2
    assert_said(stage, prompts, 20)


def test_only_the_row_table_says_who_may_be_planned() -> None:
    """It counts each change there, and what goes on is asked whether any has happened."""
    is_written = re.compile(r"\.plannable(\[[^]]*\])? [|&]?= ")
    writers = {
        path.stem for path in Path(rows.__file__).parent.glob("*.py") if is_written.search(path.read_text("utf-8"))
    }
    assert writers == {"rows"}

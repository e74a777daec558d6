"""What a device checks of a plan before it runs it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sessile.contract.plan import FROM_DEVICE, SAMPLE, Ints, StepPlan
from sessile.device.inputs import StepFacts, check_plan, positions_around
from sessile.device.page_table import check_runs
from sessile.errors import PlanError

ROWS_MAX, VOCAB, TABLE_TOKENS = 4, 10, 8


def ints(values: list[int] | list[list[int]]) -> Ints:
    return np.array(values, np.int32)


def plan_of(
    rows: list[int], starts: list[int], counts: list[int], flags: list[int], tokens: list[int], drafts: list[int]
) -> StepPlan:
    return StepPlan.empty(
        1,
        rows=ints(rows),
        starts=ints(starts),
        query_counts=ints(counts),
        draft_counts=ints(drafts),
        flags=ints(flags),
        output_indices=ints([0] * len(rows)),
        logprob_tops=ints([-1] * len(rows)),
        tokens=ints(tokens),
    )


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Plans of few rows, right and wrong ones; wrong in one number at least as often as in many."""
    count = draw(st.integers(0, 3))

    def column(low: int, high: int, length: int = count) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=length, max_size=length))

    counts = draw(st.sampled_from([[1] * count, column(0, 2)]))
    tokens = sum(counts) + draw(st.sampled_from([0, 0, 0, 1]))
    return plan_of(
        draw(st.sampled_from([list(range(count)), column(-1, ROWS_MAX)])),
        column(-1, TABLE_TOKENS),
        counts,
        draw(st.sampled_from([[SAMPLE | FROM_DEVICE] * count, column(0, 3)])),
        draw(st.sampled_from([[1] * tokens, column(-1, VOCAB, tokens)])),
        draw(st.sampled_from([[0] * count, column(-1, 2)])),
    )


def verdict(plan: StepPlan) -> str:
    """What is wrong with the plan, or nothing."""
    try:
        check_plan(plan, ROWS_MAX, VOCAB, TABLE_TOKENS)
    except PlanError as error:
        return str(error)
    return ""


@given(plans())
def test_a_plan_passes_if_and_only_if_all_of_it_is_in_bounds(plan: StepPlan) -> None:
    rows, starts, counts = plan.rows.tolist(), plan.starts.tolist(), plan.query_counts.tolist()
    flags, drafts, tokens = plan.flags.tolist(), plan.draft_counts.tolist(), plan.tokens.tolist()
    is_right = len(set(rows)) == len(rows) and all(0 <= row < ROWS_MAX for row in rows)
    is_right &= all(count >= 1 for count in counts) and sum(counts) == len(tokens)
    place = 0
    for start, count, flag, draft in zip(starts, counts, flags, drafts, strict=True):
        is_right &= start >= 0 and start + count <= TABLE_TOKENS
        is_right &= draft == 0 or (0 < draft < count and bool(flag & SAMPLE))
        own = tokens[place : place + count]
        is_right &= all(0 <= token < VOCAB for token in (own[1:] if flag & FROM_DEVICE else own))
        place += count
    assert (verdict(plan) == "") == is_right


@pytest.mark.parametrize("changes", [{"starts": [6, 0]}, {"starts": [7, 0]}])
def test_the_last_token_of_a_rows_pages_may_be_used_and_none_behind_it(changes: dict[str, list[int]]) -> None:
    """The quick look at starts takes the largest count for all rows; a row with fewer tokens may begin later."""
    plan = plan_of([0, 1], changes["starts"], [1, 3], [SAMPLE] * 2, [1] * 4, [0, 0])
    assert verdict(plan) == ""
    assert "beyond" in verdict(replace(plan, starts=ints([8, 0])))


ONE_EACH = StepFacts(count_max=1, samples=2, are_tokens_own=False, has_drafts=False, has_logprobs=False)


def test_positions_of_several_steps_are_looked_at_once_if_nobody_can_write_to_them() -> None:
    block = ints([[3, 4], [6, TABLE_TOKENS - 1]])
    block.flags.writeable = False
    plan = plan_of([0, 1], [3, 4], [1, 1], [SAMPLE] * 2, [1] * 2, [0, 0])
    assert positions_around(replace(plan, starts=block[0]), ONE_EACH, TABLE_TOKENS) is block
    two_each = replace(ONE_EACH, count_max=2)
    assert positions_around(replace(plan, starts=block[0]), two_each, TABLE_TOKENS) is None, "the last would end beyond"


@pytest.mark.parametrize("values", [[[3, 4], [6, TABLE_TOKENS]], [[3, 4], [-1, 5]]])
def test_an_array_with_a_position_out_of_bounds_is_not_taken_for_several_steps(values: list[list[int]]) -> None:
    block = ints(values)
    block.flags.writeable = False
    plan = plan_of([0, 1], [3, 4], [1, 1], [SAMPLE] * 2, [1] * 2, [0, 0])
    assert positions_around(replace(plan, starts=block[0]), ONE_EACH, TABLE_TOKENS) is None


def test_an_array_that_may_change_is_not_taken_for_several_steps() -> None:
    plan = plan_of([0, 1], [3, 4], [1, 1], [SAMPLE] * 2, [1] * 2, [0, 0])
    block = ints([[3, 4], [5, 6]])
    wider = ints([[3, 4], [5, 6]]).view()
    wider.flags.writeable = False
    for starts in (plan.starts, block[0], wider[0], np.frombuffer(bytes(8), np.int32)):
        assert positions_around(replace(plan, starts=starts), ONE_EACH, TABLE_TOKENS) is None


# -- the page table's runs ----------------------------------------------------------------------------------------

WIDTH, PAGES_TOTAL = 4, 9
INT_MAX = 2**31 - 1


def runs_plan(runs: list[tuple[int, int, int]], pages: list[int], bound: list[int]) -> StepPlan:
    """runs: (row, first slot, count) of each."""
    rows, starts, counts = [list(column) for column in zip(*runs, strict=True)] if runs else ([], [], [])
    return StepPlan.empty(
        1, bind_rows=ints(bound), table_rows=ints(rows), table_starts=ints(starts), table_counts=ints(counts),
        table_pages=ints(pages),
    )  # fmt: skip


@st.composite
def runs_plans(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
    """Runs, pages and bound rows, of which often all are right, and often each run has one page."""
    slot = st.sampled_from([0, 1, WIDTH - 1]) | st.sampled_from([-1, WIDTH, INT_MAX])
    count = st.just(1) | st.sampled_from([0, 1, 2, WIDTH, -1, INT_MAX])
    row = st.integers(0, ROWS_MAX - 1) | st.sampled_from([-1, ROWS_MAX])
    runs = draw(st.lists(st.tuples(row, slot, count), max_size=3))
    named = sum(count for _, _, count in runs if 0 < count <= WIDTH) + draw(st.sampled_from([0, 0, 0, 1]))
    page = st.integers(1, PAGES_TOTAL - 1) | st.sampled_from([0, -1, PAGES_TOTAL])
    pages = draw(st.lists(page, min_size=named if runs else 0, max_size=named if runs else 0))
    return runs, pages, draw(st.lists(row, max_size=2))


@given(runs_plans())
@example(([(0, 0, 1), (1, 3, 1)], [1, 8], []))
@example(([(0, 0, 1), (1, 4, 1)], [1, 8], []))
@example(([(0, 2, 2), (1, 3, 1)], [1, 2, 8], [3]))
@example(([(0, INT_MAX, INT_MAX)], [], []))
@example(([(0, 1, -1)], [], []))
def test_runs_pass_if_and_only_if_all_of_them_are_in_bounds(
    case: tuple[list[tuple[int, int, int]], list[int], list[int]],
) -> None:
    runs, pages, bound = case
    is_right = all(0 <= row < ROWS_MAX for row in [*bound, *(row for row, _, _ in runs)])
    is_right &= all(start in range(WIDTH) and count >= 0 and start + count <= WIDTH for _, start, count in runs)
    is_right &= sum(count for _, _, count in runs) == len(pages) and all(0 < page < PAGES_TOTAL for page in pages)
    try:
        check_runs(runs_plan(runs, pages, bound), ROWS_MAX, WIDTH, PAGES_TOTAL)
        passed = True
    except PlanError:
        passed = False
    assert passed == is_right

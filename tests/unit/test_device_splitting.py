"""A step in two halves asks for what the step asks, no more and no less, and their results are its result."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from sessile.contract.plan import BIND_FLOATS, BIND_INTS, FROM_DEVICE, PLAN_ARRAYS, SAMPLE, StepPlan, StepResult
from sessile.device.splitting import BY_ROW, CHANGES, halves_of, joined

COUNTS = np.array([3, 1, 4, 2], np.int32)
WORDS = 2
"""Of a mask."""


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def full_plan() -> StepPlan:
    """A plan with something in every array: two prompts, a row with three drafts, and one that only decodes."""
    rng = np.random.default_rng(5)
    arrays: dict[str, Any] = {name: rng.integers(1, 9, 3).astype(np.int32) for name in CHANGES}
    arrays |= {"bind_ints": rng.integers(1, 9, (3, BIND_INTS)).astype(np.int32), "copies": np.ones((2, 3), np.int32)}
    arrays |= {"bind_floats": np.ones((3, BIND_FLOATS), np.float32), "bias_values": np.ones(3, np.float32)}
    return StepPlan.empty(
        7, **arrays, rows=ints(4, 1, 0, 9), starts=ints(0, 30, 12, 5), query_counts=COUNTS,
        draft_counts=ints(0, 0, 3, 0), flags=ints(0, SAMPLE | FROM_DEVICE, SAMPLE | FROM_DEVICE, SAMPLE),
        output_indices=ints(0, 3, 8, 0), logprob_tops=ints(-1, 0, 2, 4), tokens=ints(*range(20, 30)),
        score_queries=ints(0, 1, 2, 8), score_targets=ints(21, 22, 60, 29), score_tops=ints(0, 1, 2, 3),
        mask_queries=ints(3, 5, 9), mask_words=np.arange(3 * WORDS, dtype=np.int32),
    )  # fmt: skip


def prompt_plan(tokens: int, **arrays: Any) -> StepPlan:
    """One row that runs so many tokens and samples."""
    given = {"flags": ints(SAMPLE), "draft_counts": ints(0), "logprob_tops": ints(2)} | arrays
    return StepPlan.empty(
        7, rows=ints(3), starts=ints(16), query_counts=ints(tokens), output_indices=ints(0),
        tokens=np.arange(tokens, dtype=np.int32), **given,
    )  # fmt: skip


def halved(plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    halves = halves_of(plan)
    assert halves is not None
    return halves


@pytest.mark.parametrize("name", PLAN_ARRAYS)
def test_whatever_a_plan_has_one_of_its_halves_has(name: str) -> None:
    plan = full_plan()
    first, second = halved(plan)
    assert first.tokens.size == 4, "between the second row and the third"
    moved = first.tokens.size if name in ("score_queries", "mask_queries") else 0
    whole = getattr(plan, name)
    assert whole.size, f"this test's plan has no {name}, so nobody has tried to split it"
    parts = [getattr(first, name), getattr(second, name) + whole.dtype.type(moved)]
    assert np.array_equal(np.concatenate(parts), whole) and {part.dtype for part in parts} == {whole.dtype}
    assert (first.step, second.step) == (plan.step, plan.step)


def test_every_change_of_state_is_in_the_first_half() -> None:
    _, second = halved(full_plan())
    assert [name for name in CHANGES if getattr(second, name).size] == []


def test_a_row_that_is_cut_samples_only_at_its_end_and_goes_on_where_it_was() -> None:
    plan = prompt_plan(
        9, flags=ints(SAMPLE | FROM_DEVICE), score_queries=ints(0, 3, 4, 7), score_targets=ints(1, 2, 3, 4),
        score_tops=ints(0, 1, 2, 3), mask_queries=ints(8), mask_words=ints(5, 6),
    )  # fmt: skip
    first, second = halved(plan)
    assert (first.flags.tolist(), second.flags.tolist()) == ([FROM_DEVICE], [SAMPLE])
    assert (first.starts.tolist(), first.query_counts.tolist()) == ([16], [4])
    assert (second.starts.tolist(), second.query_counts.tolist()) == ([20], [5])
    assert (first.logprob_tops.tolist(), second.logprob_tops.tolist()) == ([-1], [2])
    assert (first.score_queries.tolist(), second.score_queries.tolist()) == ([0, 3], [0, 3])
    assert (first.mask_queries.size, second.mask_queries.tolist(), second.mask_words.tolist()) == (0, [4], [5, 6])
    assert plan.flags.tolist() == [SAMPLE | FROM_DEVICE] and plan.starts.tolist() == [16], "the plan is as it was"


@pytest.mark.parametrize(
    ("tokens", "drafts", "first_tokens"), [(1, 0, None), (4, 3, None), (2, 0, 1), (5, 3, 1), (9, 1, 4), (9, 5, 3)]
)
def test_drafts_stay_with_the_token_before_them(tokens: int, drafts: int, first_tokens: int | None) -> None:
    halves = halves_of(prompt_plan(tokens, draft_counts=ints(drafts)))
    if first_tokens is None:
        assert halves is None
    else:
        first, second = halves or ()
        assert first.tokens.size == first_tokens
        assert (first.draft_counts.tolist(), second.draft_counts.tolist()) == ([0], [drafts])


def test_a_plan_without_rows_cannot_be_halved() -> None:
    assert halves_of(StepPlan.empty(3, copies=np.ones((1, 3), np.int32))) is None


def test_rows_are_cut_before_they_are_split() -> None:
    first, second = halved(full_plan())
    assert all(getattr(half, name).size == 2 for half in (first, second) for name in BY_ROW)


def result_of(step: int, row_tokens: dict[int, tuple[int, list[int]]], **arrays: Any) -> StepResult:
    """row_tokens: of each row, how many tokens ran and what it emitted."""
    emitted = [tokens for _, tokens in row_tokens.values()]
    return StepResult(
        step, ints(*row_tokens), ints(*[count for count, _ in row_tokens.values()]), ints(*map(len, emitted)),
        ints(*[token for tokens in emitted for token in tokens]), np.array([row == 5 for row in row_tokens]), **arrays,
    )  # fmt: skip


def test_the_results_of_parts_are_joined_row_by_row() -> None:
    plan = StepPlan.empty(7, rows=ints(2, 5, 8))
    floats, others = np.array([0.5], np.float32), np.array([1.5, 2.5], np.float32)
    details = {"logprobs": floats, "top_ids": ints(1), "top_logprobs": floats, "score_logprobs": floats,
               "score_top_ids": ints(2), "score_top_logprobs": floats, "shortages": 1}  # fmt: skip
    more = {"logprobs": others, "top_ids": ints(3, 4), "top_logprobs": others, "score_logprobs": others,
            "score_top_ids": ints(5, 6), "score_top_logprobs": others, "shortages": 1}  # fmt: skip
    assert {*details} == {field.name for field in fields(StepResult)[6:]}, "a field that nobody has tried to join"
    parts = [
        result_of(7, {2: (1, [11]), 5: (40, [])}, **details),
        result_of(7, {5: (8, [])}),
        result_of(7, {5: (2, [12, 13]), 8: (3, [14])}, **more),
    ]
    whole = joined(plan, parts)
    assert (whole.step, whole.rows.tolist(), whole.query_counts.tolist()) == (7, [2, 5, 8], [1, 50, 3])
    assert (whole.emitted.tolist(), whole.tokens.tolist()) == ([1, 2, 1], [11, 12, 13, 14])
    assert (whole.faulty.tolist(), whole.shortages) == ([False, True, False], 2)
    for name in details.keys() - {"shortages"}:
        assert getattr(whole, name).tolist() == [*details[name].tolist(), *more[name].tolist()], name


def test_parts_that_ran_other_rows_than_the_plan_are_not_joined() -> None:
    with pytest.raises(AssertionError, match="its parts ran rows"):
        joined(StepPlan.empty(7, rows=ints(2, 5)), [result_of(7, {5: (1, [])}), result_of(7, {2: (1, [])})])

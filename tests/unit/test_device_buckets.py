"""Steps run at few sizes, each at least as large as its plan."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.contract.plan import SAMPLE, StepPlan
from sessile.device.buckets import (
    CAPTURED_TOKENS_MAX,
    DECODE_SIZES,
    VERIFYING_TOKENS_MAX,
    bucket_of,
    common_buckets,
    round_up,
    verifying_buckets,
)


def plan_of(counts: list[int], drafts: list[int], samples: list[bool]) -> StepPlan:
    rows = np.arange(len(counts), dtype=np.int32)
    return StepPlan.empty(
        1, rows=rows, query_counts=np.array(counts, np.int32), draft_counts=np.array(drafts, np.int32),
        flags=np.array(samples, np.int32) * SAMPLE, tokens=np.zeros(sum(counts), np.int32),
    )  # fmt: skip


row = st.tuples(st.integers(1, 300), st.booleans())


@given(st.lists(row, min_size=1, max_size=40), st.integers(0, 3))
def test_a_bucket_holds_its_plan(rows: list[tuple[int, bool]], drafts: int) -> None:
    drafted = [min(drafts, count - 1) if samples else 0 for count, samples in rows]
    plan = plan_of([count for count, _ in rows], drafted, [samples for _, samples in rows])
    bucket = bucket_of(plan, 4)
    places = sum(count + 1 for count, (_, samples) in zip(drafted, rows, strict=True) if samples)
    assert bucket.tokens >= plan.tokens.size and bucket.rows >= len(rows) and bucket.places >= places
    assert bucket.has_wide or all(count <= 4 for count, _ in rows)
    assert bucket.has_narrow or all(count > 4 for count, _ in rows)


def test_decoding_rows_share_a_bucket_with_batches_of_nearly_their_size() -> None:
    buckets = {bucket_of(plan_of([1] * rows, [0] * rows, [True] * rows), 4) for rows in range(1, 257)}
    assert len(buckets) == 19
    assert all(bucket.is_captured and not bucket.has_wide for bucket in buckets)


def test_long_steps_run_at_their_own_size_without_a_graph() -> None:
    bucket = bucket_of(plan_of([CAPTURED_TOKENS_MAX + 1], [0], [True]), 4)
    assert (bucket.tokens, bucket.rows, bucket.is_captured) == (CAPTURED_TOKENS_MAX + 1, 1, False)


def test_a_step_that_samples_nothing_needs_no_graph_of_its_own() -> None:
    for counts in ([1, 1], [7, 9]):
        silent, sampling = (bucket_of(plan_of(counts, [0, 0], [samples] * 2), 4) for samples in (False, True))
        assert silent == sampling


def test_mixed_steps_of_any_make_up_need_few_graphs() -> None:
    plans = [plan_of([tokens, *[1] * rows], [0] * (rows + 1), [True] * (rows + 1)) for tokens in range(2, 600, 7)
             for rows in (0, 3, 30, 200)]  # fmt: skip
    assert {bucket_of(plan, 4) for plan in plans} <= set(common_buckets(256))


@pytest.mark.parametrize("rows_max", [1, 8, 9, 64, 200, 256])
def test_what_common_steps_need_is_captured_before(rows_max: int) -> None:
    common = common_buckets(rows_max)
    assert len(set(common)) == len(common) <= 90
    decoding = range(1, rows_max + 1)
    assert {bucket_of(plan_of([1] * rows, [0] * rows, [True] * rows), 4) for rows in decoding} <= set(common)
    for tokens in (9, 400, CAPTURED_TOKENS_MAX - rows_max):
        assert bucket_of(plan_of([tokens, *[1] * (rows_max - 1)], [0] * rows_max, [True] * rows_max), 4) in common


@given(st.lists(st.integers(0, 7), min_size=1, max_size=256))
def test_a_step_that_verifies_drafts_finds_its_graph(drafts: list[int]) -> None:
    plan = plan_of([1 + count for count in drafts], drafts, [True] * len(drafts))
    if plan.tokens.size <= VERIFYING_TOKENS_MAX:
        assert bucket_of(plan, 4) in {*common_buckets(256), *verifying_buckets(256, 7)}


def test_where_nobody_drafts_no_graph_is_kept_for_drafts() -> None:
    assert verifying_buckets(256, 0) == []
    common = common_buckets(64)
    assert not set(verifying_buckets(64, 7)) & set(common)
    assert len(verifying_buckets(256, 7)) <= 16


def test_decoding_pads_batches_by_a_quarter_at_most() -> None:
    assert all(count <= round_up(count, DECODE_SIZES) <= 1.25 * count + 8 for count in range(1, 257))
    assert round_up(5000, DECODE_SIZES) == 5000

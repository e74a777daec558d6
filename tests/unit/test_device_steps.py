"""What a device does with a plan: every promise of contract/plan.py, seen through results."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.contract.plan import (
    FROM_DEVICE,
    PLAN_ARRAYS,
    SAMPLE,
    NextPlans,
    StepPlan,
    StepResult,
    decode_plan,
    encode_plan,
    goes_on_from,
)
from sessile.device.worker import Worker
from sessile.errors import NotReady, PlanError
from tests.parity.driver import Driver, Run
from tests.unit.stage_device import VOCAB, small_device

PROMPT = [5, 9, 77, 31, 8, 64, 101, 3, 3, 50]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with small_device(tmp_path_factory.mktemp("small")) as device:
        yield device


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def output(device: Worker, run: Run, *, chunk_tokens: int = 64) -> list[int]:
    Driver(device, chunk_tokens=chunk_tokens).run_all([run])
    return run.output


def prompt_plan(step: int = 1, *, pages: tuple[int, ...] = (1, 2, 3), row: int = 0, **changes: object) -> StepPlan:
    """Bind a greedy row and run PROMPT on it."""
    floats = np.zeros((1, 6), np.float32)
    floats[:, [1, 3]] = 1.0
    arrays: dict[str, object] = {
        "bind_rows": ints(row), "bind_ints": np.zeros((1, 4), np.int32), "bind_floats": floats, "bias_counts": ints(0),
        "ban_counts": ints(0), "prompt_counts": ints(0), "output_counts": ints(0), "table_rows": ints(row),
        "table_starts": ints(0), "table_counts": ints(len(pages)), "table_pages": ints(*pages), "rows": ints(row),
        "starts": ints(0), "query_counts": ints(len(PROMPT)), "draft_counts": ints(0), "flags": ints(SAMPLE),
        "output_indices": ints(0), "logprob_tops": ints(-1), "tokens": ints(*PROMPT),
    }  # fmt: skip
    return StepPlan.empty(step, **{**arrays, **changes})


def decode_step(step: int, start: int, token: int, *, row: int = 0, flags: int = SAMPLE) -> StepPlan:
    return StepPlan.empty(
        step, rows=ints(row), starts=ints(start), query_counts=ints(1), draft_counts=ints(0), flags=ints(flags),
        output_indices=ints(1), logprob_tops=ints(-1), tokens=ints(token),
    )  # fmt: skip


def run(device: Worker, *plans: StepPlan) -> list[StepResult]:
    return [ticket.result() for ticket in [device.launch(plan) for plan in plans]]


def test_steps_launched_ahead_feed_on_tokens_that_never_left_the_device(device: Worker) -> None:
    expected = output(device, Run(PROMPT, 2))
    first, second = run(device, prompt_plan(), decode_step(2, len(PROMPT), -1, flags=SAMPLE | FROM_DEVICE))
    assert [*first.tokens, *second.tokens] == expected


def test_a_token_of_the_plan_gives_what_the_same_token_from_the_device_gives(device: Worker) -> None:
    expected = output(device, Run(PROMPT, 2))
    _, second = run(device, prompt_plan(), decode_step(2, len(PROMPT), expected[0]))
    assert second.tokens.tolist() == expected[1:]


def test_a_plan_that_crossed_a_wire_gives_the_same_result(device: Worker) -> None:
    (direct,) = run(device, prompt_plan())
    (crossed,) = run(device, decode_plan(encode_plan(prompt_plan())))
    assert crossed.tokens.tolist() == direct.tokens.tolist()


def test_arrays_that_are_left_out_cross_as_if_they_were_empty() -> None:
    plan = prompt_plan()
    crossed = decode_plan(encode_plan(plan, left_out=[PLAN_ARRAYS.index("tokens"), PLAN_ARRAYS.index("bind_floats")]))
    assert (crossed.tokens.size, crossed.bind_floats.shape) == (0, (0, 6))
    assert all(
        (getattr(crossed, name) == getattr(plan, name)).all()
        for name in PLAN_ARRAYS
        if name not in ("tokens", "bind_floats")
    )


@given(st.lists(st.integers(1, 1 << 20), max_size=6), st.booleans())
def test_plans_that_go_on_are_packed_like_any_others(advances: list[int], leaves_out: bool) -> None:
    left_out = [PLAN_ARRAYS.index("tokens"), PLAN_ARRAYS.index("flags")] if leaves_out else []
    encoder, plan = NextPlans(left_out), decode_step(3, 7, -1, row=2)
    assert encoder.encode(plan).tolist() == encode_plan(plan, left_out).tolist()
    for advance in advances:
        plan = replace(
            plan, step=plan.step + 1, starts=plan.starts + advance, output_indices=plan.output_indices + advance
        )
        assert encoder.encode(plan).tolist() == encode_plan(plan, left_out).tolist()


@pytest.mark.parametrize("name", PLAN_ARRAYS)
def test_a_plan_goes_on_only_if_all_else_is_the_very_same(name: str) -> None:
    last = prompt_plan(row=1)
    assert goes_on_from(replace(last, step=2), last)
    may_differ = name in ("starts", "output_indices") or name.startswith("table_")
    assert goes_on_from(replace(last, **{name: getattr(last, name).copy()}), last) == may_differ


def test_a_plan_that_goes_on_with_other_rows_than_it_says_is_no_plan() -> None:
    encoder, plan = NextPlans(), decode_step(1, 7, 5)
    encoder.encode(plan)
    with pytest.raises(AssertionError, match="starts of a plan that goes on are more or fewer than before"):
        encoder.encode(replace(plan, starts=ints(1, 2)))
    with pytest.raises(AssertionError, match="brings pages"):
        encoder.encode(prompt_plan())


def test_without_sample_a_row_emits_nothing_but_counts(device: Worker) -> None:
    (result,) = run(device, prompt_plan(flags=ints(0)))
    assert result.emitted.tolist() == [0]
    assert result.tokens.size == 0
    assert result.query_counts.tolist() == [len(PROMPT)]


def test_h31_binding_a_row_clears_its_page_table(device: Worker) -> None:
    bound = prompt_plan(2, pages=(), table_rows=ints(), table_starts=ints(), table_counts=ints(), table_pages=ints())
    run(device, prompt_plan())
    with pytest.raises(PlanError, match="lacks a page"), small_copy(device) as copy:
        run(copy, prompt_plan(), bound)


def test_a_plan_of_copies_alone_moves_kv_to_another_page(device: Worker) -> None:
    expected = output(device, Run(PROMPT, 2))
    copies = StepPlan.empty(2, copies=np.array([[1, 11, 4], [2, 12, 4], [3, 13, 2]], np.int32))
    remap = {"table_rows": ints(0), "table_starts": ints(0), "table_counts": ints(3), "table_pages": ints(11, 12, 13)}
    last = decode_step(3, len(PROMPT), expected[0])
    moved = StepPlan.empty(3, **{name: getattr(last, name) for name in _STEP_NAMES}, **remap)
    results = run(device, prompt_plan(), copies, moved)
    assert results[1].rows.size == 0
    assert results[2].tokens.tolist() == expected[1:]


_STEP_NAMES = (
    "rows", "starts", "query_counts", "draft_counts", "flags", "output_indices", "logprob_tops", "tokens",
)  # fmt: skip


def test_right_drafts_are_all_accepted_and_wrong_ones_end_the_run(device: Worker) -> None:
    plain = output(device, Run(PROMPT, 24))
    right = Run(PROMPT, 24, drafts=plain, drafts_max=5)
    assert output(device, right) == plain
    assert right.steps < 8
    broken = [token if index % 4 else (token + 1) % VOCAB for index, token in enumerate(plain)]
    wrong = Run(PROMPT, 24, drafts=broken, drafts_max=5)
    assert output(device, wrong) == plain
    assert right.steps < wrong.steps < 24


@pytest.mark.parametrize("drafts_max", [1, 3, 8])
def test_drafts_change_neither_sampled_tokens_nor_penalties_nor_bans(device: Worker, drafts_max: int) -> None:
    asked = {
        "temperature": 0.9, "top_p": 0.95, "seed": 7, "repetition": 1.3, "frequency": 0.4, "presence": 0.3,
        "min_new_tokens": 9, "bans": [3, 4], "logprobs": 2,
    }  # fmt: skip
    plain, drafted = Run(PROMPT, 30, **asked), Run(PROMPT, 30, **asked, drafts_max=drafts_max)
    output(device, plain)
    drafted.drafts = [token if index % 5 else 0 for index, token in enumerate(plain.output)]
    assert output(device, drafted) == plain.output
    assert drafted.top_ids == plain.top_ids
    assert drafted.steps < plain.steps
    np.testing.assert_allclose(drafted.output_logprobs, plain.output_logprobs, atol=1e-4)


def is_alternating(index: int) -> list[int]:
    """A fixed mask: even tokens at even places, odd ones at odd places, and few of them."""
    return list(range(index % 2, VOCAB, 6))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 5}, {"temperature": 1.0, "top_k": 40}])
def test_a_mask_leaves_the_likeliest_of_what_it_allows(device: Worker, sampling: dict[str, Any]) -> None:
    allowed = [is_alternating(index) for index in range(12)]
    run = Run(PROMPT, 12, allowed=allowed, logprobs=VOCAB, **sampling)
    output(device, run)
    for index, token in enumerate(run.output):
        assert token in allowed[index]
        likeliest = next(each for each in run.top_ids[index] if each in allowed[index])
        assert sampling or token == likeliest


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 5}, {"repetition": 1.4, "frequency": 0.3}])
def test_masks_hold_at_each_place_of_a_draft(device: Worker, sampling: dict[str, Any]) -> None:
    allowed = [is_alternating(index) for index in range(20)]
    plain = Run(PROMPT, 20, allowed=allowed, **sampling)
    output(device, plain)
    # Right drafts, and every seventh one what the mask of its place forbids.
    drafts = [token if index % 7 else 1 - index % 2 for index, token in enumerate(plain.output)]
    drafted = Run(PROMPT, 20, allowed=allowed, drafts=drafts, drafts_max=5, **sampling)
    assert output(device, drafted) == plain.output
    assert drafted.steps < plain.steps


def test_a_mask_binds_its_own_row_alone(device: Worker) -> None:
    free, bound = Run(PROMPT, 8), Run(PROMPT, 8, allowed=[[3]] * 8)
    Driver(device, chunk_tokens=64).run_all([free, bound])
    assert (free.output, bound.output) == (output(device, Run(PROMPT, 8)), [3] * 8)


def test_company_changes_no_rows_tokens(device: Worker) -> None:
    runs = [Run(PROMPT[: 3 + i], 10, temperature=0.8 * (i % 3), top_k=5 * (i % 2), seed=i) for i in range(6)]
    alone = [output(device, Run(each.prompt, 10, temperature=each.temperature, top_k=each.top_k, seed=each.seed))
             for each in runs]  # fmt: skip
    Driver(device, chunk_tokens=11).run_all(runs)
    assert [each.output for each in runs] == alone


def test_the_same_seed_repeats_and_another_differs(device: Worker) -> None:
    outputs = [output(device, Run(PROMPT, 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2, 2**63 + 5)]
    assert outputs[0] == outputs[1]
    assert outputs[1] != outputs[2]
    assert outputs[2] != outputs[3]


def test_bias_decides_and_bans_hold_until_the_minimum(device: Worker) -> None:
    assert output(device, Run(PROMPT, 6, biases={17: 100.0})) == [17] * 6
    banned = output(device, Run(PROMPT, 6, biases={17: 100.0, 18: 50.0}, bans=[17], min_new_tokens=4))
    assert banned == [18] * 4 + [17] * 2


def test_frequency_and_presence_penalties_wear_a_favourite_down(device: Worker) -> None:
    worn = output(device, Run(PROMPT, 8, biases={17: 100.0, 18: 98.5}, frequency=1.0))
    assert worn == [17, 17, 18, 17, 18, 17, 18, 17]
    once = output(device, Run(PROMPT, 5, biases={17: 100.0, 18: 98.5}, presence=2.0))
    assert once == [17, 18, 17, 17, 17]


def test_repetition_looks_at_the_prompt_and_the_other_penalties_do_not(device: Worker) -> None:
    biases = {PROMPT[0]: 100.0, 18: 60.0}
    assert output(device, Run(PROMPT, 1, biases=biases, presence=2.0, frequency=2.0)) == [PROMPT[0]]
    plain, repeated = Run(PROMPT, 1, logprobs=0), Run(PROMPT, 4, repetition=1e6)
    output(device, plain)
    assert not set(output(device, repeated)) & set(PROMPT)


def test_logprobs_are_of_the_raw_distribution(device: Worker) -> None:
    plain = Run(PROMPT, 1, logprobs=VOCAB)
    output(device, plain)
    bent = Run(PROMPT, 1, logprobs=3, temperature=0.5, seed=3, biases={17: 100.0})
    output(device, bent)
    assert bent.output == [17]
    place = plain.top_ids[0].index(17)
    assert bent.output_logprobs[0] == pytest.approx(plain.top_logprobs[0][place], abs=1e-5)
    assert bent.top_ids[0] == plain.top_ids[0][:3]
    assert np.exp(plain.top_logprobs[0]).sum() == pytest.approx(1.0, abs=1e-4)


def test_prompt_scores_do_not_depend_on_chunks(device: Worker) -> None:
    whole, parts = Run(PROMPT * 4, 1, score_top=2), Run(PROMPT * 4, 1, score_top=2)
    output(device, whole)
    output(device, parts, chunk_tokens=7)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-4)
    assert parts.score_top_ids == whole.score_top_ids
    assert len(whole.scores) == len(PROMPT) * 4 - 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tokens": ints(*PROMPT[:-1], VOCAB)}, "vocabulary"),
        ({"tokens": ints(*PROMPT[:-1], -1)}, "vocabulary"),
        ({"query_counts": ints(3)}, "do not match"),
        ({"rows": ints(99)}, "not distinct rows"),
        ({"starts": ints(10_000)}, "beyond"),
        ({"table_pages": ints(1, 2, 100_000)}, "not in the pool"),
        ({"table_pages": ints(1, 0, 2)}, "not in the pool"),
        ({"table_starts": ints(5_000)}, "beyond"),
        ({"table_counts": ints(1)}, "page"),
        ({"draft_counts": ints(len(PROMPT))}, "drafts"),
        ({"draft_counts": ints(-1)}, "drafts"),
        ({"draft_counts": ints(1), "flags": ints(0)}, "drafts"),
        ({"tokens": ints(*PROMPT[:-1], -1), "flags": ints(SAMPLE | FROM_DEVICE)}, "vocabulary"),
        ({"starts": ints(-1)}, "beyond"),
        ({"table_counts": ints(-1)}, "page"),
        ({"bias_counts": ints(4)}, "do not add up"),
        ({"copies": np.array([[1, 2, 5]], np.int32)}, "out of bounds"),
        ({"mask_queries": ints(9), "mask_words": ints(0, 0, 0, 0)}, "no token"),
        ({"mask_queries": ints(9), "mask_words": ints(1)}, "words"),
        ({"mask_queries": ints(8), "mask_words": ints(1, 0, 0, 0)}, "nothing is sampled"),
        ({"mask_queries": ints(9, 9), "mask_words": ints(1, 0, 0, 0, 1, 0, 0, 0)}, "two masks"),
        ({"copies": np.array([[0, 2, 1]], np.int32)}, "out of bounds"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(device: Worker, changes: dict[str, object], word: str) -> None:
    with small_copy(device) as copy, pytest.raises(PlanError, match=word):
        run(copy, prompt_plan(**changes))


def test_after_a_failed_step_every_later_ticket_raises_its_error(device: Worker) -> None:
    with small_copy(device) as copy:
        bad, good = copy.launch(prompt_plan(rows=ints(99))), copy.launch(prompt_plan())
        with pytest.raises(PlanError):
            bad.result()
        with pytest.raises(PlanError):
            good.result()


def test_a_closed_device_finishes_what_was_launched_and_takes_no_more(device: Worker) -> None:
    with small_copy(device) as copy:
        ticket = copy.launch(prompt_plan())
        copy.close()
        assert ticket.result().emitted.tolist() == [1]
        with pytest.raises(NotReady):
            copy.launch(prompt_plan())


def small_copy(device: Worker):  # type: ignore[no-untyped-def]
    """A fresh device on the same weights, for tests that break it."""
    return small_device(Path(device.facts.model_path))

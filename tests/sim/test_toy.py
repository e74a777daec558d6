"""The toy device against hand-made plans: it must say what the reference says, and nothing if a page is wrong."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sessile.contract.messages import Sampling
from sessile.contract.model import ModelFacts
from sessile.contract.plan import FROM_DEVICE, SAMPLE, StepPlan
from sessile.sim.reference import Speaker
from sessile.sim.toy import DeviceFault, ToyDevice

FACTS = ModelFacts(vocab_size=50, context_tokens=64, eos_ids=(2,))
PROMPT = [7, 11, 13, 17, 19]
GREEDY = Sampling(seed=5, temperature=0.0)


def make_device(**settings: Any) -> ToyDevice:
    shape = {"pages_total": 12, "page_size": 4, "rows_max": 4, "context_tokens": 64, "drafts_max": 4, "vocab_size": 50}
    return ToyDevice(**(shape | settings))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def bound(row: int, pages: Sequence[int], sampling: Sampling = GREEDY) -> dict[str, np.ndarray]:
    """The arrays that bind one row and give it pages."""
    return {
        "bind_rows": ints(row),
        "bind_ints": np.array([[sampling.top_k, sampling.min_new_tokens, sampling.seed, 0]], np.int32),
        "bind_floats": np.array(
            [[sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty,
              sampling.frequency_penalty, sampling.presence_penalty]], np.float32,
        ),
        "bias_counts": ints(0),
        "ban_counts": ints(0),
        "prompt_counts": ints(0),
        "output_counts": ints(0),
        "table_rows": ints(row),
        "table_starts": ints(0),
        "table_counts": ints(len(pages)),
        "table_pages": ints(*pages),
    }


def run_of(
    row: int, start: int, tokens: Sequence[int], *, flags: int = SAMPLE, drafts: int = 0, index: int = 0
) -> dict[str, np.ndarray]:
    """The arrays that run one row."""
    return {
        "rows": ints(row),
        "starts": ints(start),
        "query_counts": ints(len(tokens)),
        "draft_counts": ints(drafts),
        "flags": ints(flags),
        "output_indices": ints(index),
        "logprob_tops": ints(-1),
        "tokens": ints(*tokens),
    }


def said(prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    speaker = Speaker(prompt, sampling, FACTS)
    output = []
    for _ in range(count):
        output.append(speaker.peek())
        speaker.push(output[-1])
    return output


def test_a_prompt_in_one_step_is_answered_like_the_reference() -> None:
    plan = StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT))
    assert make_device().launch(plan).result().tokens.tolist() == said(PROMPT, 1)


def test_chunks_and_decoding_from_the_device_give_the_same_tokens() -> None:
    device = make_device()
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT[:2], flags=0))).result()
    first = device.launch(StepPlan.empty(2, **run_of(0, 2, PROMPT[2:])))
    second = device.launch(StepPlan.empty(3, **run_of(0, 5, [-1], flags=SAMPLE | FROM_DEVICE, index=1)))
    assert [*first.result().tokens, *second.result().tokens] == said(PROMPT, 2)


def test_noise_depends_on_seed_and_output_index() -> None:
    warm = Sampling(seed=9, temperature=0.7, top_p=0.9)
    device = make_device()
    plan = StepPlan.empty(1, **bound(0, [3, 5], warm), **run_of(0, 0, PROMPT, index=3))
    speaker = Speaker(PROMPT, warm, FACTS)
    speaker.output_tokens = 3
    assert device.launch(plan).result().tokens.tolist() == [speaker.peek()]


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_drafts_are_accepted_up_to_the_first_wrong_one(right: int) -> None:
    truth = said(PROMPT, 4)
    drafts = truth[:right] + [(truth[i] + 1) % 50 for i in range(right, 3)]
    device = make_device()
    plan = StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT + drafts, drafts=3))
    result = device.launch(plan).result()
    assert result.tokens.tolist() == truth[: right + 1]
    assert result.query_counts.tolist() == [8]


def test_a_rejected_draft_is_overwritten_and_leaves_no_trace() -> None:
    truth = said(PROMPT, 2)
    device = make_device()
    wrong = (truth[0] + 1) % 50
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, [*PROMPT, wrong], drafts=1))).result()
    result = device.launch(StepPlan.empty(2, **run_of(0, 5, [truth[0]], index=1))).result()
    assert result.tokens.tolist() == truth[1:]


def test_an_aliased_page_changes_the_tokens() -> None:
    device = make_device(strict=False)
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT, flags=0))).result()
    device.launch(StepPlan.empty(2, **bound(1, [5]), **run_of(1, 0, [1, 2], flags=0))).result()
    result = device.launch(StepPlan.empty(3, **run_of(0, 5, [23]))).result()
    assert result.tokens.tolist() != said([*PROMPT, 23], 1)


def test_a_row_without_a_page_for_a_position_is_refused() -> None:
    plan = StepPlan.empty(1, **bound(0, [3]), **run_of(0, 0, PROMPT))
    with pytest.raises(DeviceFault, match="no page"):
        make_device().launch(plan)


def test_h31_binding_a_row_clears_its_page_table() -> None:
    device = make_device()
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT))).result()
    with pytest.raises(DeviceFault, match="no page"):
        device.launch(StepPlan.empty(2, **bound(0, [6]), **run_of(0, 0, PROMPT)))


def test_a_page_that_a_step_in_flight_uses_may_not_be_written_by_another_row() -> None:
    device = make_device()
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT)))
    with pytest.raises(DeviceFault, match="which step 1 still uses"):
        device.launch(StepPlan.empty(2, **bound(1, [5]), **run_of(1, 0, [1])))


def test_a_row_in_flight_may_not_be_bound_anew() -> None:
    device = make_device()
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT)))
    with pytest.raises(DeviceFault, match="binds row 0"):
        device.launch(StepPlan.empty(2, **bound(0, [6]), **run_of(0, 0, [1])))


def test_a_late_write_lands_on_top_of_the_next_owner() -> None:
    lateness = iter([False, True, False, False])
    device = make_device(strict=False, is_late=lambda: next(lateness))
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT, flags=0))).result()
    late = device.launch(StepPlan.empty(2, **run_of(0, 5, [23, 29])))
    early = device.launch(StepPlan.empty(3, **bound(1, [5]), **run_of(1, 0, [1, 4, 4])))
    late.result()
    early.result()
    spoilt = device.launch(StepPlan.empty(4, **run_of(1, 3, [23], index=1))).result()
    assert spoilt.tokens.tolist() != said([1, 4, 4, 23], 1)


def test_a_late_write_is_seen_by_its_own_row_in_the_next_step() -> None:
    device = make_device(strict=False, is_late=lambda: True)
    first = device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT)))
    second = device.launch(StepPlan.empty(2, **run_of(0, 5, [-1], flags=SAMPLE | FROM_DEVICE, index=1)))
    assert [*first.result().tokens, *second.result().tokens] == said(PROMPT, 2)


def test_a_copied_page_reads_like_its_source() -> None:
    device = make_device()
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT, flags=0))).result()
    plan = StepPlan.empty(
        2, **bound(1, [3, 6]), **run_of(1, 5, [23]), copies=np.array([[5, 6, 1]], np.int32)
    )
    assert device.launch(plan).result().tokens.tolist() == said([*PROMPT, 23], 1)


def test_scores_and_logprobs_are_those_of_the_text_read() -> None:
    device = make_device()
    scores = {"score_queries": ints(1, 2), "score_targets": ints(13, 17), "score_tops": ints(0, 2)}
    run = run_of(0, 0, PROMPT) | {"logprob_tops": ints(1)}
    result = device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run, **scores)).result()
    assert (result.score_logprobs.size, result.score_top_ids.size) == (2, 2)
    assert (result.logprobs.size, result.top_ids.size) == (1, 1)
    assert result.score_top_logprobs[0] >= result.score_top_logprobs[1] >= -64


def test_results_must_be_taken_in_order() -> None:
    device = make_device()
    device.launch(StepPlan.empty(1, **bound(0, [3, 5]), **run_of(0, 0, PROMPT)))
    second = device.launch(StepPlan.empty(2, **run_of(0, 5, [4])))
    with pytest.raises(DeviceFault, match="out of order"):
        second.result()

"""A step in two halves, which ask together for what the step asks, and one result out of those of its parts.

Nobody outside the device sees that a step ran in parts: they have its number, and `joined` is its result.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sessile.contract.plan import FROM_DEVICE, PLAN_ARRAYS, SAMPLE, StepPlan, StepResult

CHANGES = (
    "bind_rows", "bind_ints", "bind_floats", "bias_counts", "bias_tokens", "bias_values", "ban_counts", "ban_tokens",
    "prompt_counts", "output_counts", "seen_tokens", "table_rows", "table_starts", "table_counts", "table_pages",
    "copies",
)  # fmt: skip
"""Arrays that change the state of the device: the first half has them, for both."""
BY_ROW = ("rows", "starts", "query_counts", "draft_counts", "flags", "output_indices", "logprob_tops")
BY_TOKEN = ("tokens",)
BY_SCORE = ("score_queries", "score_targets", "score_tops")
BY_MASK = ("mask_queries", "mask_words")

assert {*CHANGES, *BY_ROW, *BY_TOKEN, *BY_SCORE, *BY_MASK} == {*PLAN_ARRAYS}, "an array that halves do not share out"


def halves_of(plan: StepPlan) -> tuple[StepPlan, StepPlan] | None:
    """Two steps, to be run one after the other, with about half of the tokens each; None if there is no place to cut.

    Rows keep their order. A row that is cut runs its first tokens without sampling, and the rest behind them. Drafts
    stay with the token before them, which they are verified with.
    """
    token = _cut(plan)
    if token is None:
        return None
    ends = np.cumsum(plan.query_counts)
    row = int(np.searchsorted(ends, token, "right"))
    before = token - int(ends[row] - plan.query_counts[row])  # tokens of this row in the first half
    first, second = _first_half(plan, token, row + (before > 0)), _second_half(plan, token, row)
    if before:
        first.query_counts[-1] = before
        first.draft_counts[-1] = 0
        first.flags[-1] &= ~SAMPLE
        first.logprob_tops[-1] = -1
        second.starts[0] += before
        second.query_counts[0] -= before
        second.flags[0] &= ~FROM_DEVICE
    assert first.query_counts.sum() == first.tokens.size and second.query_counts.sum() == second.tokens.size
    return first, second


def joined(plan: StepPlan, results: Sequence[StepResult]) -> StepResult:
    """The result of a plan from those of its parts, first to last."""
    if len(results) == 1:
        return results[0]
    rows = np.concatenate([result.rows for result in results])
    # Rows of a plan are distinct, so the same row twice in succession is one that was cut.
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    assert (rows[firsts] == plan.rows).all(), f"step {plan.step}: its parts ran rows {rows.tolist()}"
    return StepResult(
        step=plan.step,
        rows=plan.rows,
        query_counts=np.add.reduceat(_all(results, "query_counts"), firsts, dtype=np.int32),
        # Of a row that was cut, only the last part samples.
        emitted=np.add.reduceat(_all(results, "emitted"), firsts, dtype=np.int32),
        tokens=_all(results, "tokens"),
        faulty=np.logical_or.reduceat(_all(results, "faulty"), firsts),
        logprobs=_all(results, "logprobs"),
        top_ids=_all(results, "top_ids"),
        top_logprobs=_all(results, "top_logprobs"),
        score_logprobs=_all(results, "score_logprobs"),
        score_top_ids=_all(results, "score_top_ids"),
        score_top_logprobs=_all(results, "score_top_logprobs"),
        shortages=sum(result.shortages for result in results),
    )


def _cut(plan: StepPlan) -> int | None:
    """The token that the second half begins with: of all but the first and drafts, the one nearest to the middle."""
    counts, tokens = plan.query_counts, plan.tokens.size
    # Of each token's row: how many tokens there are from this one on.
    left = np.repeat(np.cumsum(counts), counts) - np.arange(tokens)
    places = np.flatnonzero(left > np.repeat(plan.draft_counts, counts))[1:]
    if not places.size:
        return None
    return int(places[np.argmin(np.abs(places - tokens / 2))])


def _first_half(plan: StepPlan, token: int, rows: int) -> StepPlan:
    """All changes of state, the rows before the given one and the tokens before the given one."""
    is_scored, is_masked = plan.score_queries < token, plan.mask_queries < token
    arrays: dict[str, Any] = {name: getattr(plan, name)[:rows].copy() for name in BY_ROW}
    arrays |= {name: getattr(plan, name)[:token] for name in BY_TOKEN}
    arrays |= {name: getattr(plan, name)[is_scored] for name in BY_SCORE}
    return replace(plan, **arrays, mask_queries=plan.mask_queries[is_masked], mask_words=_masks(plan, is_masked))


def _second_half(plan: StepPlan, token: int, row: int) -> StepPlan:
    """No change of state, the rows and the tokens from the given ones on."""
    is_scored, is_masked = plan.score_queries >= token, plan.mask_queries >= token
    arrays: dict[str, Any] = {name: getattr(plan, name)[row:].copy() for name in BY_ROW}
    arrays |= {name: getattr(plan, name)[token:] for name in BY_TOKEN}
    arrays |= {name: getattr(plan, name)[is_scored] for name in BY_SCORE}
    arrays["score_queries"] = arrays["score_queries"] - np.int32(token)
    arrays["mask_queries"] = plan.mask_queries[is_masked] - np.int32(token)
    return StepPlan.empty(plan.step, **arrays, mask_words=_masks(plan, is_masked))


def _masks(plan: StepPlan, is_kept: Any) -> Any:
    """The words of some of the plan's masks, flat."""
    if not plan.mask_queries.size:
        return plan.mask_words
    return plan.mask_words.reshape(plan.mask_queries.size, -1)[is_kept].reshape(-1)


def _all(results: Sequence[StepResult], name: str) -> Any:
    return np.concatenate([getattr(result, name) for result in results])

"""From a plan to the flat inputs of a forward pass: tokens, positions, write slots, and where logits are due."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sessile.contract.plan import FROM_DEVICE, SAMPLE, SCRATCH_PAGE, Ints, StepPlan
from sessile.errors import PlanError
from sessile.units import ceil_div

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FlatStep:
    """A step's t tokens laid end to end, all on the device.

    tokens, positions, slots int64[t]: id, position in its sequence, and pool slot for K and V. row_indices int64[t]:
    index into plan.rows of the row that each token belongs to.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    row_indices: Longs


@dataclass(frozen=True)
class SamplePositions:
    """Where the step samples; m places, row by row, each row's in order. Host arrays int64[m].

    flat: index into the step's tokens whose logits are sampled. row_indices: index into plan.rows. depths: 0 for the
    row's first sampled token, j after j drafts. firsts: of each sampling row, the index of its depth 0.
    """

    flat: Longs
    row_indices: Longs
    depths: Longs
    firsts: Longs


@dataclass(slots=True)  # As with a plan: not frozen, for speed only.
class StepFacts:
    """What follows from a plan's rows, query counts, draft counts, flags and logprob_tops."""

    count_max: int
    """The largest query count."""
    samples: int
    """How many rows sample."""
    are_tokens_own: bool
    """Whether all tokens are the device's own."""
    has_drafts: bool
    has_logprobs: bool


def check_plan(plan: StepPlan, rows_max: int, vocab_size: int, table_tokens: int) -> StepFacts:
    """What follows from a plan. Raises PlanError for what would make a device read or write out of bounds.

    vocab_size in tokens; table_tokens: most that a row's pages can hold.
    """
    facts = _look(plan, rows_max)
    check_ends(plan, facts, table_tokens)
    if not facts.are_tokens_own and not _are_known(plan, vocab_size):
        raise PlanError(f"step {plan.step}: a token id is not in the vocabulary of {vocab_size}")
    if plan.mask_queries.size or plan.mask_words.size:
        _check_masks(plan, vocab_size)
    return facts


def check_ends(plan: StepPlan, facts: StepFacts, table_tokens: int) -> None:
    """Raise PlanError if a row begins before its first page or ends beyond its last: all that can go wrong with a plan
    that goes on from one that passed."""
    if are_below(plan.starts, table_tokens + 1 - facts.count_max):
        return
    # Some row is near the end of its pages, if not beyond it.
    ends = plan.starts + plan.query_counts
    if np.minimum.reduce(plan.starts) < 0 or not are_below(ends, table_tokens + 1):
        raise PlanError(f"step {plan.step}: a row ends beyond the {table_tokens} tokens that its pages can hold")


def positions_around(plan: StepPlan, facts: StepFacts, table_tokens: int) -> Ints | None:
    """The array whose part `plan.starts` is, if rows that begin at any of its positions end within their pages.

    None as well if somebody could write to it: then it would have to be looked at again.
    """
    whole = plan.starts.base
    if not isinstance(whole, np.ndarray) or whole.dtype != np.int32 or whole.base is not None or whole.flags.writeable:
        return None
    return whole if are_below(whole.reshape(-1), table_tokens + 1 - facts.count_max) else None


def _look(plan: StepPlan, rows_max: int) -> StepFacts:
    """Check rows, counts, drafts and flags, and find out what follows from them."""
    rows, counts, tokens = plan.rows, plan.query_counts, plan.tokens
    if not are_below(rows, rows_max) or not _are_distinct(rows, rows_max):
        raise PlanError(f"step {plan.step}: rows {rows.tolist()} are not distinct rows below {rows_max}")
    if int(np.add.reduce(counts)) != tokens.size or (rows.size and np.minimum.reduce(counts) < 1):
        raise PlanError(f"step {plan.step}: query counts {counts.tolist()} do not match {tokens.size} tokens")
    has_drafts = bool(np.count_nonzero(plan.draft_counts))
    if has_drafts and not _have_their_tokens(plan):
        raise PlanError(f"step {plan.step}: drafts {plan.draft_counts.tolist()} without a token to follow")
    is_one_each = tokens.size == rows.size > 0
    return StepFacts(
        count_max=int(np.maximum.reduce(counts)) if rows.size else 0,
        samples=int(np.count_nonzero(plan.flags & SAMPLE)),
        are_tokens_own=is_one_each and bool(np.bitwise_and.reduce(plan.flags) & FROM_DEVICE),
        has_drafts=has_drafts,
        has_logprobs=bool(rows.size) and bool(np.maximum.reduce(plan.logprob_tops) >= 0),
    )


def are_below(values: Ints, limit: int) -> bool:
    """Whether all are from 0 to limit - 1, at the price of one look: read as unsigned, what is negative is large."""
    return not values.size or int(np.maximum.reduce(values.view(np.uint32))) < limit


def _are_distinct(rows: Ints, rows_max: int) -> bool:
    is_named = np.zeros(rows_max, np.bool_)
    is_named[rows] = True
    return np.count_nonzero(is_named) == rows.size


def _have_their_tokens(plan: StepPlan) -> bool:
    """Whether each row with drafts samples, and has a token before its drafts."""
    drafts = plan.draft_counts
    samples = (plan.flags & SAMPLE) != 0
    return not ((drafts < 0) | (drafts >= plan.query_counts) | ((drafts > 0) & ~samples)).any()


def _are_known(plan: StepPlan, vocab_size: int) -> bool:
    """Whether all tokens are in the vocabulary but those that the device replaces by its own."""
    unknown = plan.tokens.view(np.uint32) >= vocab_size
    if not np.count_nonzero(unknown):
        return True
    from_device = (plan.flags & FROM_DEVICE) != 0
    if plan.tokens.size == plan.rows.size:
        return not np.count_nonzero(unknown & ~from_device)
    allowed = np.zeros(plan.tokens.size, np.bool_)
    allowed[(np.cumsum(plan.query_counts) - plan.query_counts)[from_device]] = True
    return not np.count_nonzero(unknown & ~allowed)


def _check_masks(plan: StepPlan, vocab_size: int) -> None:
    """Each mask belongs to a place of its own where the step samples, and leaves a token to choose there."""
    queries, words = plan.mask_queries, ceil_div(vocab_size, 32)
    if plan.mask_words.size != queries.size * words:
        raise PlanError(f"step {plan.step}: {queries.size} masks have {plan.mask_words.size} words, not {words} each")
    if np.unique(queries).size != queries.size or not np.isin(queries, sample_positions(plan).flat).all():
        raise PlanError(f"step {plan.step}: nothing is sampled at one of {queries.tolist()}, or it has two masks")
    masks = plan.mask_words.reshape(-1, words).copy()
    if vocab_size % 32:
        masks[:, -1] &= np.int32((1 << vocab_size % 32) - 1)
    if not masks.any(axis=1).all():
        raise PlanError(f"step {plan.step}: a mask leaves no token to choose")


def flatten_step(plan: StepPlan, table: Tensor, page_size: int, last_tokens: Tensor) -> FlatStep:
    """Lay out a step. table int32[rows_max, width]; last_tokens int64[rows_max], read where a row is FROM_DEVICE."""
    device = table.device
    counts = plan.query_counts.astype(np.int64)
    offsets = np.cumsum(counts) - counts
    row_indices = np.repeat(np.arange(counts.size), counts)
    host_positions = np.arange(plan.tokens.size) - offsets[row_indices] + plan.starts[row_indices]
    positions = torch.from_numpy(host_positions).to(device)
    batch_rows = torch.from_numpy(plan.rows[row_indices].astype(np.int64)).to(device)
    pages = table[batch_rows, positions // page_size].to(torch.int64)
    if device.type == "cpu" and bool((pages == SCRATCH_PAGE).any()):
        raise PlanError(f"step {plan.step}: a token would be written to the scratch page; its row lacks a page")
    tokens = torch.from_numpy(plan.tokens.astype(np.int64)).to(device)
    fed = np.flatnonzero(plan.flags & FROM_DEVICE)
    if fed.size:
        fed_rows = torch.from_numpy(plan.rows[fed].astype(np.int64)).to(device)
        tokens[torch.from_numpy(offsets[fed]).to(device)] = last_tokens[fed_rows]
    return FlatStep(tokens, positions, pages * page_size + positions % page_size, row_indices)


def sample_positions(plan: StepPlan) -> SamplePositions:
    """Where the rows with SAMPLE sample: after their last query token that is no draft, and after each draft."""
    sampling = np.flatnonzero(plan.flags & SAMPLE)
    ends = np.cumsum(plan.query_counts.astype(np.int64))[sampling]
    places = plan.draft_counts[sampling].astype(np.int64) + 1
    firsts = np.cumsum(places) - places
    depths = np.arange(places.sum()) - np.repeat(firsts, places)
    flat = np.repeat(ends - places, places) + depths
    return SamplePositions(flat, np.repeat(sampling, places), depths, firsts)

"""From what was planned to the flat arrays of a StepPlan: the late part, drafts included."""

from array import array
from dataclasses import dataclass

import numpy as np

from sessile.contract.messages import Sampling, unpack_tokens
from sessile.contract.plan import FROM_DEVICE, NO_FLOATS, NO_INTS, SAMPLE, Floats, Ints, StepPlan
from sessile.core.books import Books
from sessile.core.planning import Drafter, Planned, PromptPart
from sessile.core.request import Phase
from sessile.core.rows import Column

_NO_COPIES: Ints = np.empty((0, 3), np.int32)
_CONTEXT_TOKENS = 64
"""What a drafter is shown of the end of a request's tokens."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way. The first `decodes` rows of the plan decode, the others run `parts`, in this order.

    Whoever sits in a row now still sits there when the step settles: a row outlives its request until then.
    """

    plan: StepPlan
    rows: Column
    allowed: Ints
    """Most tokens each row may emit: 0 without SAMPLE, else 1 + drafts."""
    has_drafts: bool
    decodes: int
    parts: list[PromptPart]


def assemble(books: Books, planned: Planned, drafter: Drafter | None) -> Flight | None:
    """Fill in the drafts and build the arrays. Drops rows that ended since the early part; None if none is left."""
    rows = books.rows
    decodes, caps, parts = planned.decodes, planned.draft_caps, planned.parts
    drafts: list[list[int]] | None = None
    if planned.late:
        alive = rows.live[decodes] == 1
        decodes, caps = decodes[alive], caps[alive]
        parts = [part for part in parts if part.request.phase is Phase.RUNNING]
        drafts = _ask(books, drafter, decodes, caps)
    if not len(decodes) and not parts and not books.copies:
        return None
    starts, draft_counts, tokens, from_device = _decode_columns(books, planned, decodes, drafts)
    decode_count, part_count = len(decodes), len(parts)
    all_rows = np.empty(decode_count + part_count, np.int64)
    all_rows[:decode_count] = decodes
    all_rows[decode_count:] = [part.row for part in parts]
    fields = np.zeros((5, len(all_rows)), np.int32)
    plan_starts, query_counts, plan_drafts, flags, output_indices = fields
    plan_starts[:decode_count] = starts
    query_counts[:decode_count] = 1 + draft_counts
    plan_drafts[:decode_count] = draft_counts
    flags[:decode_count] = SAMPLE | from_device * FROM_DEVICE
    if parts:
        plan_starts[decode_count:] = [part.start for part in parts]
        query_counts[decode_count:] = [part.count for part in parts]
        flags[decode_count:] = [SAMPLE * part.samples for part in parts]
    allowed = (flags & SAMPLE) + plan_drafts
    # The token about to be sampled comes after those that steps in flight sample; `pending` counts it already.
    ahead = rows.known - rows.prompt + rows.pending
    np.maximum(ahead[all_rows] - allowed, 0, out=output_indices, casting="unsafe")
    tops = np.where(allowed, rows.logprobs[all_rows], -1)
    flat = array("i", tokens)
    for part in parts:
        flat.frombytes(part.request.tokens(part.start, part.start + part.count))
    plan = StepPlan(
        planned.step,
        *_bindings(books, planned),
        *_table(planned),
        np.array(books.take_copies(planned.step), np.int32) if books.copies else _NO_COPIES,
        all_rows.astype(np.int32),
        plan_starts,
        query_counts,
        plan_drafts,
        flags,
        output_indices,
        tops.astype(np.int32),
        np.frombuffer(flat, np.int32),
        *_scores(parts, len(tokens)),
    )
    return Flight(plan, all_rows, allowed, bool(drafts), decode_count, parts)


def _ask(books: Books, drafter: Drafter | None, decodes: Column, caps: Column) -> list[list[int]]:
    drafts: list[list[int]] = []
    for row, cap in zip(decodes.tolist(), caps.tolist(), strict=True):
        request = books.rows.occupants[row]
        assert request is not None
        books.collect_output(request)
        # What was accepted meanwhile may have brought the end nearer.
        cap = min(cap, request.goal_tokens - 1 - request.known_tokens)
        if drafter is None or cap <= 0:
            drafts.append([])
            continue
        known = request.known_tokens
        context = unpack_tokens(request.tokens(max(0, known - _CONTEXT_TOKENS), known))
        proposed = list(drafter.draft(request.key, context, cap))
        assert len(proposed) <= cap, "a drafter proposed more than it was asked for"
        drafts.append(proposed)
    return drafts


def _decode_columns(
    books: Books, planned: Planned, decodes: Column, drafts: list[list[int]] | None
) -> tuple[Column, Column, list[int], Column]:
    """Of the decoding rows: starts [d], draft counts [d], tokens [sum 1 + drafts], and whether the first of a row's
    tokens is still on the device (its token is -1 then)."""
    rows = books.rows
    if drafts is None:
        on_device = rows.pending[decodes] > 1
        tokens = np.where(on_device, -1, rows.last_token[decodes])
        return rows.planned[decodes] - 1, np.zeros(len(decodes), np.int64), tokens.tolist(), on_device.astype(np.int64)
    # Everything before has settled: positions and tokens are known, and the caps shrink to what was proposed.
    counts = np.array([len(draft) for draft in drafts], np.int64)
    starts = rows.settled[decodes].copy()
    rows.planned[decodes] = starts + 1 + counts
    rows.pending[decodes] = 1 + counts
    books.totals.drafts_offered += int(counts.sum())
    flat: list[int] = []
    for token, draft in zip(rows.last_token[decodes].tolist(), drafts, strict=True):
        flat.append(token)
        flat.extend(draft)
    return starts, counts, flat, np.zeros(len(decodes), np.int64)


def _scores(parts: list[PromptPart], first_index: int) -> tuple[Ints, Ints, Ints]:
    """Which prompt positions to score: each once, the query of position p scoring the token at p + 1."""
    queries: list[int] = []
    targets: list[int] = []
    tops: list[int] = []
    index = first_index
    for part in parts:
        request = part.request
        if request.scores_from >= 0:
            first, last = scored_range(part)
            queries.extend(range(index + first - 1 - part.start, index + last - 1 - part.start))
            targets.extend(unpack_tokens(request.tokens(first, last)).tolist())
            tops.extend([max(request.logprobs, 0)] * (last - first))
        index += part.count
    if not queries:
        return NO_INTS, NO_INTS, NO_INTS
    return np.array(queries, np.int32), np.array(targets, np.int32), np.array(tops, np.int32)


def scored_range(part: PromptPart) -> tuple[int, int]:
    """[first, last) prompt positions that this part scores: asked for, within the turn's prompt, not scored before."""
    request = part.request
    first = max(request.scores_from, 1, request.base_tokens, request.scored_tokens, part.start + 1)
    return first, max(first, min(part.start + part.count + 1, request.prompt_tokens))


def _table(planned: Planned) -> tuple[Ints, Ints, Ints, Ints]:
    """Page-table runs: whole tables of the rows bound in this step, then what running rows drew."""
    table_rows: list[int] = []
    starts: list[int] = []
    counts: list[int] = []
    pages = array("i")
    for request in planned.bound:
        if request.row is None or request.pin is None or request.lease is None:
            continue  # It ended between the early part and now: its row is bound, but nothing of it runs.
        table_rows.append(request.row)
        starts.append(0)
        counts.append(len(request.pin.pages) + len(request.lease.pages))
        pages.extend(request.pin.pages)
        pages.extend(request.lease.pages)
    for row, start, drawn in planned.runs:
        table_rows.append(row)
        starts.append(start)
        counts.append(len(drawn))
        pages.extend(drawn)
    grown = len(planned.grown)
    if not table_rows and not grown:
        return NO_INTS, NO_INTS, NO_INTS, NO_INTS
    pages.extend(planned.grown_pages)
    return (
        np.array([*table_rows, *planned.grown.tolist()], np.int32),
        np.array([*starts, *planned.grown_slots.tolist()], np.int32),
        np.array([*counts, *(1,) * grown], np.int32),
        np.frombuffer(pages, np.int32),
    )


_NO_BINDINGS = (
    NO_INTS, np.empty((0, 4), np.int32), np.empty((0, 6), np.float32), NO_INTS, NO_INTS, NO_FLOATS, NO_INTS, NO_INTS,
    NO_INTS, NO_INTS, NO_INTS,
)  # fmt: skip
_Bindings = tuple[Ints, Ints, Floats, Ints, Ints, Floats, Ints, Ints, Ints, Ints, Ints]


def _bindings(books: Books, planned: Planned) -> _Bindings:
    """The eleven binding arrays of StepPlan, in its order."""
    bound = [request for request in planned.bound if request.row is not None]
    if not bound:
        return _NO_BINDINGS
    ints, floats = [], []
    biases: list[tuple[int, float]] = []
    bans: list[int] = []
    seen = []
    bias_counts, ban_counts, prompt_counts, output_counts = [], [], [], []
    for request in bound:
        sampling = request.sampling
        ints.append(
            (sampling.top_k, sampling.min_new_tokens, sampling.seed & 0xFFFFFFFF, sampling.seed >> 32 & 0xFFFFFFFF)
        )
        floats.append(
            (
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
        biases.extend(sampling.logit_bias)
        bias_counts.append(len(sampling.logit_bias))
        banned = request.stop_ids if sampling.min_new_tokens else ()
        bans.extend(banned)
        ban_counts.append(len(banned))
        if penalised(sampling):
            seen.append(request.tokens(0, request.known_tokens))
            prompt_counts.append(request.prompt_tokens)
            output_counts.append(request.output_tokens)
        else:
            prompt_counts.append(0)
            output_counts.append(0)
    return (
        np.array([request.row for request in bound], np.int32),
        np.array(ints, np.uint32).view(np.int32),
        np.array(floats, np.float32),
        np.array(bias_counts, np.int32),
        np.array([token for token, _ in biases], np.int32),
        np.array([bias for _, bias in biases], np.float32),
        np.array(ban_counts, np.int32),
        np.array(bans, np.int32),
        np.array(prompt_counts, np.int32),
        np.array(output_counts, np.int32),
        unpack_tokens(b"".join(seen)),
    )


def penalised(sampling: Sampling) -> bool:
    """Whether the device needs the counts of the tokens so far."""
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0

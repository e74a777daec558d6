"""From what was planned to the flat arrays of a StepPlan: the late part, drafts and masks included."""

from array import array
from dataclasses import dataclass
from struct import Struct

import numpy as np

from sessile.contract.messages import pack_tokens, unpack_tokens
from sessile.contract.plan import (
    BIND_FLOATS,
    BIND_INTS,
    FROM_DEVICE,
    NO_FLOATS,
    NO_INTS,
    SAMPLE,
    Floats,
    Ints,
    StepPlan,
    encode_plan,
)
from sessile.core.books import Books
from sessile.core.constraining import constrain
from sessile.core.drafting import drafts_for
from sessile.core.history import TOKEN_BYTES, Packed
from sessile.core.marks import Mark
from sessile.core.planned import NO_ROWS, Planned, PromptPart
from sessile.core.request import Phase, Request
from sessile.core.rows import ONES, Column, Flags

_NO_COPIES: Ints = np.empty((0, 3), np.int32)
_ROW, _START, _COUNT, _DRAFTS, _FLAGS, _OUTPUT, _TOP = range(7)
"""Rows to logprob_tops of StepPlan, in its order: built as one array."""
_PART = Struct("<7i")
_ZERO, _ONE = array("i", [0]), array("i", [1])
_ON_DEVICE = pack_tokens([-1])


AHEAD_STEPS = 16
"""Steps that go on whose positions are counted at once."""
_AHEAD: Ints = np.arange(1, AHEAD_STEPS + 1, dtype=np.int32)[:, np.newaxis]


class Ahead:
    """Positions and output indices of the next steps that go on, int32[AHEAD_STEPS, n] each; `taken` have theirs."""

    __slots__ = ("output_indices", "starts", "taken")

    def __init__(self, plan: StepPlan) -> None:
        self.starts: Ints = plan.starts + _AHEAD
        self.output_indices: Ints = plan.output_indices + _AHEAD
        for block in (self.starts, self.output_indices):
            block.flags.writeable = False  # A device may look at all of it at once.
        self.taken = 0


@dataclass(slots=True)
class Flight:
    """A step on its way. The first `decodes` rows of the plan decode, the others run `parts`, in this order.

    Whoever sits in a row now still sits there when the step settles: a row outlives its request until then.
    """

    plan: StepPlan
    rows: Column
    allowed: Ints
    """Most tokens each row may emit: 0 without SAMPLE, else 1 + drafts."""
    counted: Ints
    """How many of them count as pending: one less where all of them would end the request, as not all may come."""
    sampling: Flags
    """bool[rows_max]: the rows with SAMPLE and no drafts, each of which emits one token."""
    samples: int
    """How many they are."""
    is_drafted: bool
    """Whether any row has drafts, and emits one token or more."""
    decodes: int
    parts: list[PromptPart]
    is_steady: bool
    """Whether all it does is to decode, without drafts, from tokens that are still on the device."""
    ahead: Ahead | None = None
    """Of the steps behind it; None if it does not go on from another."""


def goes_on(books: Books, planned: Planned, flight: Flight) -> bool:
    """Whether a step only decodes the rows of the one in flight once more, each one position further.

    The same requests sit in them: whoever takes a row runs a part of its prompt before it decodes.
    """
    return (
        flight.is_steady
        and planned.step == flight.plan.step + 1
        and planned.draft_caps is None
        and not (planned.parts or planned.bound or books.copies)
        and (planned.decodes is flight.rows or planned.decodes.tobytes() == flight.rows.tobytes())
    )


def once_more(planned: Planned, flight: Flight) -> Flight:
    """What `assemble` makes of a step that goes on, from the one in flight. What has not changed is its very arrays.

    But the rows, which are equal: what is noted of steps is found by the array that the planner goes on with.
    """
    before, ahead = flight.plan, flight.ahead
    if ahead is None or ahead.taken == AHEAD_STEPS:
        ahead = Ahead(before)
    index = ahead.taken
    ahead.taken += 1
    plan = StepPlan(
        planned.step,
        *_NO_BINDINGS,
        *_table(planned),
        _NO_COPIES,
        before.rows,
        ahead.starts[index],
        before.query_counts,
        before.draft_counts,
        before.flags,
        ahead.output_indices[index],
        before.logprob_tops,
        before.tokens,
        NO_INTS,
        NO_INTS,
        NO_INTS,
        NO_INTS,
        NO_INTS,
    )
    return Flight(
        plan,
        planned.decodes,
        flight.allowed,
        flight.counted,
        planned.sampling,
        flight.samples,
        is_drafted=False,
        decodes=flight.decodes,
        parts=[],
        is_steady=True,
        ahead=ahead,
    )


def are_same(flight: Flight, other: Flight) -> bool:
    """Whether two flights run the same and expect the same."""
    return encode_plan(flight.plan).tobytes() == encode_plan(other.plan).tobytes() and all(
        one.tobytes() == another.tobytes()
        for one, another in (
            (flight.rows, other.rows), (flight.allowed, other.allowed), (flight.sampling, other.sampling)
        )
    )  # fmt: skip


def assemble(books: Books, planned: Planned) -> Flight | None:
    """Fill in the drafts and build the arrays. Drops rows that ended since the early part; None if none is left."""
    decodes, parts, caps = planned.decodes, planned.parts, planned.draft_caps
    if caps is not None:
        alive = books.rows.live[decodes] == 1
        books.marks[Mark.ROW_GONE] += len(decodes) - int(np.count_nonzero(alive))
        decodes = decodes[alive]
        parts = [part for part in parts if part.request.phase is Phase.RUNNING]
        caps = caps[alive]
    decode_count = len(decodes)
    total = decode_count + len(parts)
    if not total and not books.copies:
        return None
    counts, drafts, mask_queries, mask_words = _late_part(books, decodes, caps, parts)
    columns = np.zeros((7, total), np.int32)
    decoding = columns[:, :decode_count]
    decoding[_ROW] = decodes
    rows = decodes
    if caps is None:
        tokens = _decode_columns(books, decodes, decoding)
    else:
        tokens = _draft_columns(books, decodes, counts, drafts, decoding)
    is_steady = caps is None and not parts and tokens == _ON_DEVICE * decode_count
    scores = _scores(parts, len(tokens) // TOKEN_BYTES)
    if parts:
        table = [
            _PART.pack(part.row, part.start, part.count, 0, part.samples, part.request.output_tokens, part.top)
            for part in parts
        ]
        columns[:, decode_count:] = np.frombuffer(b"".join(table), np.int32).reshape(-1, 7).T
        rows = columns[_ROW].astype(np.int64)
        tokens = b"".join([tokens, *[part.request.tokens(part.start, part.end) for part in parts]])
    allowed = counted = columns[_FLAGS] & SAMPLE
    sampling, samples = planned.sampling, decode_count + sum([part.samples for part in parts])
    is_drafted = False
    if caps is not None:
        is_drafted = bool(np.count_nonzero(columns[_DRAFTS]))
        allowed += columns[_DRAFTS]
        if is_drafted:
            books.drafted_step = planned.step
            counted = allowed.copy()
            counted[:decode_count] = books.rows.pending[decodes]
        singles = rows[allowed == 1]
        sampling, samples = books.rows.flags_of(singles), len(singles)
    plan = StepPlan(
        planned.step,
        *_bindings(books, planned),
        *_table(planned),
        np.array(books.take_copies(planned.step), np.int32) if books.copies else _NO_COPIES,
        columns[_ROW],
        columns[_START],
        columns[_COUNT],
        columns[_DRAFTS],
        columns[_FLAGS],
        columns[_OUTPUT],
        columns[_TOP],
        unpack_tokens(tokens),
        *scores,
        mask_queries,
        mask_words,
    )
    return Flight(plan, rows, allowed, counted, sampling, samples, is_drafted, decode_count, parts, is_steady)


def _late_part(
    books: Books, decodes: Column, caps: Column | None, parts: list[PromptPart]
) -> tuple[Column, Column, Ints, Ints]:
    """What is known only now: drafts by decoding row, all of them end to end, places of masks, masks.

    caps: None where no decoding row has drafts or a grammar; then there are no drafts.
    """
    if caps is None and not books.rows.constraints_wanted:
        return NO_ROWS, NO_ROWS, NO_INTS, NO_INTS
    counts, drafts = np.zeros(len(decodes), np.int64), NO_ROWS
    if caps is not None:
        counts, drafts = drafts_for(books, decodes, caps)
    masks = constrain(books, decodes, counts, drafts, parts)
    if masks is None:
        return counts, drafts, NO_INTS, NO_INTS
    return masks.counts, masks.drafts, masks.queries(parts), masks.words.reshape(-1)


def _decode_columns(books: Books, decodes: Column, columns: Ints) -> Packed:
    """Fill the columns [7, d] of rows that decode without drafts; returns their tokens.

    The token of a row is -1 where it is still on the device.
    """
    rows = books.rows
    starts = rows.planned[decodes]
    starts -= 1
    columns[_START] = starts
    columns[_COUNT] = 1
    # A row's first output token is sampled by the query before it, at the prompt's last position.
    starts -= rows.prompt[decodes]
    starts += 1
    columns[_OUTPUT] = starts
    columns[_TOP] = rows.logprobs[decodes] if rows.logprobs_wanted else -1
    on_device = rows.pending[decodes] > 1
    if np.count_nonzero(on_device) == len(decodes):
        columns[_FLAGS] = SAMPLE | FROM_DEVICE
        return _ON_DEVICE * len(decodes)
    columns[_FLAGS] = SAMPLE + on_device * FROM_DEVICE
    return np.where(on_device, -1, rows.last_token[decodes]).astype(np.int32).tobytes()


def _draft_columns(books: Books, decodes: Column, counts: Column, drafts: Column, columns: Ints) -> Packed:
    """Fill the columns [7, d] of rows that decode with drafts; returns their tokens, drafts included.

    Everything before has settled: positions and tokens are known, and the caps have shrunk to what is proposed. A row
    that would be done if all its drafts were right is planned one token less far: so the next step, which waits for
    this one, has a place for it, and a wrong draft costs it no step.
    """
    rows = books.rows
    starts = rows.settled[decodes]
    reach = starts + 1 + counts
    uncounted: Flags = reach >= rows.kv_goal[decodes]
    uncounted &= counts > 0
    rows.planned[decodes] = reach - uncounted
    rows.pending[decodes] = 1 + counts - uncounted
    books.totals.drafts_offered += len(drafts)
    books.totals.verifications += int(np.count_nonzero(counts))
    columns[_START] = starts
    columns[_COUNT] = 1 + counts
    columns[_DRAFTS] = counts
    columns[_FLAGS] = SAMPLE
    columns[_OUTPUT] = rows.known[decodes] - rows.prompt[decodes]
    columns[_TOP] = rows.logprobs[decodes]
    tokens = np.empty(len(decodes) + len(drafts), np.int32)
    is_draft = np.ones(len(tokens), np.bool_)
    firsts = np.cumsum(1 + counts) - (1 + counts)
    is_draft[firsts] = False
    tokens[firsts] = rows.last_token[decodes]
    tokens[is_draft] = drafts
    return tokens.tobytes()


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
    pages = array("i")
    bound_rows: list[int] = []
    bound_counts: list[int] = []
    for request in planned.bound:
        if request.row is None or request.pin is None or request.lease is None:
            continue  # It ended between the early part and now: its row is bound, but nothing of it runs.
        shared, own = request.pin.pages, request.lease.pages
        bound_rows.append(request.row)
        bound_counts.append(len(shared) + len(own))
        pages.extend(shared)
        pages.extend(own)
    table_rows, starts, counts = array("i", bound_rows), _ZERO * len(bound_rows), array("i", bound_counts)
    for row, start, drawn in planned.runs:
        table_rows.append(row)
        starts.append(start)
        counts.append(len(drawn))
        pages.extend(drawn)
    grown = len(planned.grown_pages)
    if not table_rows:
        if not grown:
            return NO_INTS, NO_INTS, NO_INTS, NO_INTS
        rows, slots = planned.grown.astype(np.int32), planned.grown_slots.astype(np.int32)
        return rows, slots, ONES[:grown], np.frombuffer(planned.grown_pages, np.int32)
    if grown:
        table_rows.frombytes(planned.grown.astype(np.int32).tobytes())
        starts.frombytes(planned.grown_slots.astype(np.int32).tobytes())
        counts.extend(_ONE * grown)
        pages.extend(planned.grown_pages)
    return (
        np.frombuffer(table_rows, np.int32),
        np.frombuffer(starts, np.int32),
        np.frombuffer(counts, np.int32),
        np.frombuffer(pages, np.int32),
    )


_NO_BINDINGS = (
    NO_INTS, np.empty((0, 4), np.int32), np.empty((0, 6), np.float32), NO_INTS, NO_INTS, NO_FLOATS, NO_INTS, NO_INTS,
    NO_INTS, NO_INTS, NO_INTS,
)  # fmt: skip
_Shapes = tuple[Ints, Ints, Floats, Ints, Ints, Ints, Ints, Ints]
_Bindings = tuple[Ints, Ints, Floats, Ints, Ints, Floats, Ints, Ints, Ints, Ints, Ints]


def _bindings(books: Books, planned: Planned) -> _Bindings:
    """The eleven binding arrays of StepPlan, in its order."""
    bound = [request for request in planned.bound if request.row is not None]
    if not bound:
        return _NO_BINDINGS
    return (
        np.array([request.row for request in bound], np.int32),
        np.frombuffer(b"".join([request.bind_ints for request in bound]), np.int32).reshape(-1, BIND_INTS),
        np.frombuffer(b"".join([request.bind_floats for request in bound]), np.float32).reshape(-1, BIND_FLOATS),
        *(_shapes(bound) if any([request.shaped for request in bound]) else _no_shapes(len(bound))),
    )


def _shapes(bound: list[Request]) -> _Shapes:
    """Biases, bans and what penalties look at: the last eight arrays."""
    return (*_biases(bound), *_bans(bound), *_seen(bound))


def _no_shapes(count: int) -> _Shapes:
    none = np.zeros(count, np.int32)
    return none, NO_INTS, NO_FLOATS, none, NO_INTS, none, none, NO_INTS


def _biases(bound: list[Request]) -> tuple[Ints, Ints, Floats]:
    biases = [bias for request in bound for bias in request.sampling.logit_bias]
    return (
        np.array([len(request.sampling.logit_bias) for request in bound], np.int32),
        np.array([token for token, _ in biases], np.int32),
        np.array([value for _, value in biases], np.float32),
    )


def _bans(bound: list[Request]) -> tuple[Ints, Ints]:
    bans = [token for request in bound for token in request.ban_ids]
    return np.array([len(request.ban_ids) for request in bound], np.int32), np.array(bans, np.int32)


def _seen(bound: list[Request]) -> tuple[Ints, Ints, Ints]:
    """Prompt counts, output counts and the tokens counted, of requests with a penalty."""
    prompt_counts, output_counts, seen = [], [], []
    for request in bound:
        prompt_counts.append(request.prompt_tokens if request.penalised else 0)
        output_counts.append(request.output_tokens if request.penalised else 0)
        if request.penalised:
            seen.append(request.tokens(0, request.known_tokens))
    return np.array(prompt_counts, np.int32), np.array(output_counts, np.int32), unpack_tokens(b"".join(seen))

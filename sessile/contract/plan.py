"""What one step asks of a device and what the device answers.

The core and every device (CPU, GPU, the simulator's toy) know each other only through this file. A plan is a few flat
arrays; strings, ids and objects stay at the edge. `encode_plan` packs a plan into one int32 buffer, so that it
reaches a device in one transfer and another rank in one message.

Everything that changes device state travels here and must be applied in plan order, before the step's own reads and
writes: bindings, page-table runs, copies. A device keeps, per row: the page table, sampling parameters, token counts
for penalties, and the last token it sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter, is_
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from sessile.errors import PlanError

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# Columns of StepPlan.bind_ints.
BIND_TOP_K, BIND_MIN_NEW_TOKENS, BIND_SEED_LOW, BIND_SEED_HIGH = range(4)
BIND_INTS = 4
# Columns of StepPlan.bind_floats.
BIND_TEMPERATURE, BIND_TOP_P, BIND_MIN_P, BIND_REPETITION, BIND_FREQUENCY, BIND_PRESENCE = range(6)
BIND_FLOATS = 6

# Bits of StepPlan.flags.
SAMPLE = 1
"""The row samples after its last query token (and after each draft). Without it the step only writes KV."""
FROM_DEVICE = 2
"""The row's first query token is the last token the device sampled for this row; `tokens` holds -1 there."""

SCRATCH_PAGE = 0
"""Page 0 belongs to nobody's tokens: padding rows write there, and unused page-table entries hold it."""

NO_INTS: Ints = np.empty(0, np.int32)
NO_FLOATS: Floats = np.empty(0, np.float32)


@dataclass(slots=True)  # Not frozen, for speed only: nobody changes a plan.
class StepPlan:
    """One step. All arrays int32 unless said otherwise; n rows run, b rows are bound, first to last as listed.

    Applied first, in this order:
      bind_rows [b]            rows that get a new occupant: the device clears the row's page table, token counts and
                               last token, then takes the parameters below
      bind_ints [b, 4]         top_k (0 = off), min_new_tokens, low and high half of the 64-bit noise seed (as bits)
      bind_floats [b, 6] f32   temperature (0 = greedy), top_p (1 = off), min_p (0 = off), repetition (1 = off),
                               frequency (0 = off), presence (0 = off)
      bias_counts [b]          how many of bias_tokens / bias_values (f32) belong to each bound row
      ban_counts [b]           how many of ban_tokens belong to each bound row: never sampled while the output index
                               is below min_new_tokens
      prompt_counts [b], output_counts [b]
                               how many of seen_tokens belong to each bound row as prompt, then as output; both are 0
                               unless the row has a penalty. Repetition looks at both, frequency and presence at the
                               output. The device adds what it samples (accepted tokens only) by itself
      table_rows, table_starts, table_counts [t]
                               runs of the page table: page_table[row, start : start + count] = next of table_pages
      copies [c, 3]            (source page, target page, tokens): copy the KV of the first tokens of a page

    The step itself:
      rows [n]                 batch rows, each at most once
      starts [n]               KV tokens the row has before this step: its first query token has this position
      query_counts [n]         tokens to run, drafts included, ≥ 1
      draft_counts [n]         how many of them, at the end, are drafts: 0 unless SAMPLE
      flags [n]                SAMPLE | FROM_DEVICE
      output_indices [n]       index of the first token to be sampled in its request's output: noise is a function of
                               (seed, output index, token id); the j-th further token uses index + j
      logprob_tops [n]         -1: none wanted; k ≥ 0: log-probability of each emitted token and of the k most likely
      tokens [sum query_counts]
      score_queries, score_targets, score_tops [s]
                               log-probability of score_target given the query at flat index score_query (into
                               `tokens`), with the score_top most likely beside it: prompt logprobs, in the order of
                               their queries. Raw model distribution, no temperature or penalty
      mask_queries [k]         flat indices (into `tokens`) of queries after which a token is sampled, each once at
                               most: there only the tokens of a mask may be chosen
      mask_words [k, ceil(vocabulary / 32)] flat
                               the masks: bit t % 32 of word t // 32 is set if token t may be chosen; at least one is
    """

    step: int
    bind_rows: Ints
    bind_ints: Ints
    bind_floats: Floats
    bias_counts: Ints
    bias_tokens: Ints
    bias_values: Floats
    ban_counts: Ints
    ban_tokens: Ints
    prompt_counts: Ints
    output_counts: Ints
    seen_tokens: Ints
    table_rows: Ints
    table_starts: Ints
    table_counts: Ints
    table_pages: Ints
    copies: Ints
    rows: Ints
    starts: Ints
    query_counts: Ints
    draft_counts: Ints
    flags: Ints
    output_indices: Ints
    logprob_tops: Ints
    tokens: Ints
    score_queries: Ints
    score_targets: Ints
    score_tops: Ints
    mask_queries: Ints
    mask_words: Ints

    @classmethod
    def empty(cls, step: int, **arrays: Any) -> "StepPlan":
        """A plan whose arrays are empty but for those given: for tests and for plans that only copy."""
        values: dict[str, Any] = {name: _EMPTY[name] for name in PLAN_ARRAYS}
        values.update(arrays)
        return cls(step=step, **values)


@dataclass(slots=True)  # As with a plan: not frozen, for speed only.
class StepResult:
    """What a step produced. Row order is the plan's.

    step               the plan's
    rows [n]           the plan's rows, echoed: the core checks them
    query_counts [n]   query tokens as the device itself counted them while it ran
    emitted [n]        tokens each row emits: 0 without SAMPLE, else 1 + accepted drafts
    tokens [sum emitted]
    faulty [n] bool    the row's logits were not finite; its tokens mean nothing and the core ends it with an error
    logprobs f32       for each emitted token of rows with logprob_tops ≥ 0, in order: its log-probability under the
                       model (softmax of the raw logits, before temperature, penalties and bias)
    top_ids, top_logprobs
                       for each of those tokens, logprob_tops entries, most likely first
    score_logprobs [s] f32; score_top_ids, score_top_logprobs: for each score, score_tops entries
    shortages          how often memory ran out on the way here: the device then ran the step in smaller ones
    """

    step: int
    rows: Ints
    query_counts: Ints
    emitted: Ints
    tokens: Ints
    faulty: npt.NDArray[np.bool_]
    logprobs: Floats = field(default_factory=lambda: NO_FLOATS)
    top_ids: Ints = field(default_factory=lambda: NO_INTS)
    top_logprobs: Floats = field(default_factory=lambda: NO_FLOATS)
    score_logprobs: Floats = field(default_factory=lambda: NO_FLOATS)
    score_top_ids: Ints = field(default_factory=lambda: NO_INTS)
    score_top_logprobs: Floats = field(default_factory=lambda: NO_FLOATS)
    shortages: int = 0


PLAN_ARRAYS = tuple(f.name for f in fields(StepPlan) if f.name != "step")
"""The arrays of a plan in the order in which `encode_plan` packs them."""
_arrays_of = attrgetter(*PLAN_ARRAYS)
_ADVANCED = ("starts", "output_indices")
"""What is new in each plan, beside its step, that only goes on from the one before."""
_PAGED = ("table_rows", "table_starts", "table_counts", "table_pages")
"""What is new in it if it brings pages."""
_shared_of = attrgetter(*[name for name in PLAN_ARRAYS if name not in (*_ADVANCED, *_PAGED)])
PLAN_HEADER_WORDS = 2 + len(PLAN_ARRAYS)
"""Words before the first array: magic, step, and the length of each array."""
_FLOAT_ARRAYS = frozenset({"bind_floats", "bias_values"})
_WIDTHS = {"bind_ints": BIND_INTS, "bind_floats": BIND_FLOATS, "copies": 3}
_EMPTY: dict[str, npt.NDArray[Any]] = {
    name: np.empty((0, _WIDTHS[name]) if name in _WIDTHS else 0, np.float32 if name in _FLOAT_ARRAYS else np.int32)
    for name in PLAN_ARRAYS
}
_SHAPES = [(_EMPTY[name], _EMPTY[name].dtype.type, _WIDTHS.get(name, 1)) for name in PLAN_ARRAYS]
"""Of each array: one without entries, the type of its entries, and the width of a row."""
_HEADER = Struct(f"<{PLAN_HEADER_WORDS}i")
_MAGIC = 0x5E551


def encode_plan(plan: StepPlan, left_out: Sequence[int] = ()) -> Ints:
    """Pack a plan into one int32 buffer: magic, step, the length of each array, then the arrays (f32 as bits).

    left_out: arrays that are packed as if they were empty, as indices into PLAN_ARRAYS.
    """
    arrays = [*_arrays_of(plan)]
    for index in left_out:
        arrays[index] = NO_INTS
    lengths = [array.size for array in arrays]
    words = bytearray().join([_HEADER.pack(_MAGIC, plan.step, *lengths), *[array for array in arrays if array.size]])
    buffer = np.frombuffer(words, np.int32)
    assert buffer.size == PLAN_HEADER_WORDS + sum(lengths), "an array of a plan is not of 32-bit words"
    return buffer


def goes_on_from(plan: StepPlan, last: StepPlan) -> bool:
    """Whether a plan has new positions and output indices, and maybe pages, and of all else the last one's very arrays.
    """
    return plan.rows is last.rows and all(map(is_, _shared_of(plan), _shared_of(last)))


class NextPlans:
    """Packs plans that go on from one another and bring no pages as `encode_plan` does: of each only what is new."""

    def __init__(self, left_out: Sequence[int] = ()) -> None:
        """left_out: as for `encode_plan`."""
        self._left_out = left_out
        self._words = NO_INTS
        self._new: list[tuple[str, slice]] = []
        """Where in the words is what each plan has of its own."""

    def encode(self, plan: StepPlan) -> Ints:
        """The words of a plan; they are valid until the next call."""
        assert not plan.table_rows.size, "a plan that brings pages is packed by itself"
        if not self._words.size:
            self._words = encode_plan(plan, self._left_out)
            self._new = _places(self._words, _ADVANCED)
            return self._words
        words = self._words
        words[1] = plan.step
        for name, part in self._new:
            array = getattr(plan, name)
            assert array.size == part.stop - part.start, f"{name} of a plan that goes on are more or fewer than before"
            words[part] = array
        return words


def _places(words: Ints, names: Sequence[str]) -> list[tuple[str, slice]]:
    """Where arrays are in the words of a plan."""
    sizes, places = words[2:PLAN_HEADER_WORDS].tolist(), []
    for name in names:
        index = PLAN_ARRAYS.index(name)
        start = PLAN_HEADER_WORDS + sum(sizes[:index])
        places.append((name, slice(start, start + sizes[index])))
    return places


def decode_plan(buffer: Ints) -> StepPlan:
    """Unpack what `encode_plan` packed; the arrays are views of the buffer. Raises PlanError if it is not one."""
    header = PLAN_HEADER_WORDS
    if buffer.size < header or buffer[0] != _MAGIC:
        raise PlanError("buffer does not hold a step plan")
    lengths = buffer[:header].tolist()
    if header + sum(lengths[2:]) != buffer.size:
        raise PlanError(f"plan of step {lengths[1]}: buffer holds {buffer.size} words, its header says otherwise")
    values = []
    start = header
    for length, (empty, dtype, width) in zip(lengths[2:], _SHAPES, strict=True):
        if not length:
            values.append(empty)
            continue
        array: npt.NDArray[Any] = buffer[start : start + length]
        if dtype is not np.int32:
            array = array.view(dtype)
        if width > 1:
            array = array.reshape(-1, width)
        values.append(array)
        start += length
    return StepPlan(lengths[1], *values)

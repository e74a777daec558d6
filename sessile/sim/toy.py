"""A toy device: real pages, real page tables, a model that is a hash of what it reads through them.

It applies `contract/plan.py` to the letter and trusts nothing: what a plan may not ask raises DeviceFault. Steps are
computed when they are launched. Two tempers, chosen by the world's seed:

  strict   a step that touches a page or row which another request's unsettled step still uses raises at once
  loose    the race happens: writes of rows that the next step leaves out land when their own result is taken, on top of
           whatever was written meanwhile, and have to show in a token
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sessile.contract.plan import (
    BIND_FREQUENCY,
    BIND_MIN_NEW_TOKENS,
    BIND_MIN_P,
    BIND_PRESENCE,
    BIND_REPETITION,
    BIND_SEED_HIGH,
    BIND_SEED_LOW,
    BIND_TEMPERATURE,
    BIND_TOP_K,
    BIND_TOP_P,
    FROM_DEVICE,
    SAMPLE,
    SCRATCH_PAGE,
    Floats,
    Ints,
    StepPlan,
    StepResult,
)
from sessile.sim import hashing

NO_TOKEN = -1
POISON = 0xDEADBEEF_DEADBEEF


class DeviceFault(AssertionError):
    """A plan asked for what the contract forbids, or raced with a step in flight."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise DeviceFault(message)


@dataclass(slots=True)
class _Row:
    """What the device keeps of a batch row's occupant."""

    seed: int = -1
    flavour: int = 0
    is_greedy: bool = True
    min_new_tokens: int = 0
    banned: tuple[int, ...] = ()
    has_penalty: bool = False
    seen: int = 0
    last_token: int = NO_TOKEN

    def choose(self, digest: int, output_index: int, vocab_size: int) -> int:
        """Sample the token with this output index after the text with this digest."""
        noise = self.flavour if self.is_greedy else hashing.noise_of(self.flavour, self.seed, output_index)
        if self.has_penalty:
            noise ^= hashing.mix(self.seen)
        return hashing.token_of(digest, noise, vocab_size, self.banned if output_index < self.min_new_tokens else ())


@dataclass(slots=True)
class _Write:
    """One cell that a row of a step writes, and what was there before."""

    page: int
    offset: int
    cell: int
    before: int = POISON


@dataclass(slots=True)
class _Flight:
    """A launched step whose result has not been taken: the pages its rows touch, and writes held back."""

    step: int
    rows: frozenset[int] = frozenset()
    reads: dict[int, set[int]] = field(default_factory=dict)
    """page → rows that read it; likewise below."""
    writes: dict[int, set[int]] = field(default_factory=dict)
    late: dict[int, list[_Write]] = field(default_factory=dict)
    """row → its writes that have not reached the pool."""


class ToyTicket:
    """A step on its way. Taking the result settles it on the device: its late writes land now."""

    def __init__(self, device: "ToyDevice", flight: _Flight, result: StepResult) -> None:
        self._device = device
        self._flight = flight
        self._result = result

    def result(self) -> StepResult:
        """The step's result; steps must be taken in order, each once."""
        self._device.take(self._flight)
        return self._result


class ToyDevice:
    """An Executor over numpy arrays.

    is_late(): asked once a step in loose temper, whether its writes are held back. is_faulty(): asked once a row and
    step, whether its logits shall come out as not finite; `faulty_seeds` lists whom it hit.
    """

    def __init__(
        self,
        *,
        pages_total: int,
        page_size: int,
        rows_max: int,
        context_tokens: int,
        drafts_max: int,
        vocab_size: int,
        strict: bool = True,
        is_late: Callable[[], bool] = lambda: False,
        is_faulty: Callable[[], bool] = lambda: False,
    ) -> None:
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._strict = strict
        self._is_late = is_late
        self._is_faulty = is_faulty
        slots = (context_tokens + drafts_max) // page_size + 1
        self._table = np.full((rows_max, slots), SCRATCH_PAGE, np.int32)
        self._cells = np.full((pages_total, page_size), POISON, np.uint64)
        self._rows = [_Row() for _ in range(rows_max)]
        self._flights: list[_Flight] = []
        self._last_step = 0
        self.faulty_seeds: list[int] = []

    def seed_of(self, row: int) -> int:
        """The noise seed that the row was bound with, which names its request in a simulation."""
        return self._rows[row].seed

    def launch(self, plan: StepPlan) -> ToyTicket:
        """Run a step; its rows see their writes at once, the pool sees them at the latest when the result is taken."""
        self._check(plan)
        flight = _Flight(plan.step, rows=frozenset(plan.rows.tolist()))
        self._land_before(plan)
        self._bind(plan)
        self._write_table(plan)
        self._note_touches(plan, flight)
        self._copy(plan)
        writes = self._compute_cells(plan)
        for row_writes in writes.values():
            self._land(row_writes)
        result = self._sample(plan, [len(writes[row]) for row in plan.rows.tolist()])
        self._spoil([write for row in plan.rows[result.faulty].tolist() for write in writes[row]])
        if not self._strict and self._is_late():
            self._hold_back(flight, writes)
        self._flights.append(flight)
        return ToyTicket(self, flight, result)

    def take(self, flight: _Flight) -> None:
        """Settle the oldest step in flight: let the writes it held back land."""
        _require(bool(self._flights) and self._flights[0] is flight, f"step {flight.step} taken twice or out of order")
        self._flights.pop(0)
        for writes in flight.late.values():
            self._land(writes)

    def close(self) -> None:
        """Nothing to release."""

    # What changes before the step: occupants, page tables, copies.

    def _check(self, plan: StepPlan) -> None:
        rows = plan.rows.tolist()
        _require(plan.step > self._last_step, f"step {plan.step} after step {self._last_step}")
        self._last_step = plan.step
        _require(len(self._flights) <= 1, "a launch while two steps are in flight")
        for name in ("starts", "query_counts", "draft_counts", "flags", "output_indices", "logprob_tops"):
            _require(len(getattr(plan, name)) == len(rows), f"{name} is not one a row")
        _require(len(set(rows)) == len(rows), "a row runs twice in one step")
        _require(all(0 <= row < len(self._rows) for row in rows), "a row that does not exist")
        _require(bool((plan.query_counts >= 1).all()), "a row without query tokens")
        _require(bool((plan.starts >= 0).all()), "a row that starts below 0")
        _require(int(plan.query_counts.sum()) == len(plan.tokens), "tokens do not match the query counts")
        samples = (plan.flags & SAMPLE) != 0
        _require(bool((plan.draft_counts[~samples] == 0).all()), "drafts on a row that does not sample")
        _require(bool((plan.draft_counts < plan.query_counts).all()), "a row of nothing but drafts")

    def _bind(self, plan: StepPlan) -> None:
        biases, bans, seen = 0, 0, 0
        for i, row in enumerate(plan.bind_rows.tolist()):
            self._check_row_is_idle(row, plan.step)
            bias_end, ban_end = biases + int(plan.bias_counts[i]), bans + int(plan.ban_counts[i])
            output_start = seen + int(plan.prompt_counts[i])
            output_end = output_start + int(plan.output_counts[i])
            self._table[row] = SCRATCH_PAGE
            self._rows[row] = _bound_row(
                plan.bind_ints[i],
                plan.bind_floats[i],
                biases=list(zip(
                    plan.bias_tokens[biases:bias_end].tolist(), plan.bias_values[biases:bias_end].tolist(), strict=True
                )),
                banned=tuple(plan.ban_tokens[bans:ban_end].tolist()),
                prompt=plan.seen_tokens[seen:output_start].tolist(),
                output=plan.seen_tokens[output_start:output_end].tolist(),
            )
            biases, bans, seen = bias_end, ban_end, output_end
        _require((biases, bans, seen) == (len(plan.bias_tokens), len(plan.ban_tokens), len(plan.seen_tokens)),
                 "bound rows do not use up what came with them")

    def _check_row_is_idle(self, row: int, step: int) -> None:
        for flight in self._flights:
            _require(not (self._strict and row in flight.rows),
                     f"step {step} binds row {row} anew while step {flight.step} in flight still runs it")

    def _write_table(self, plan: StepPlan) -> None:
        at = 0
        runs = zip(plan.table_rows.tolist(), plan.table_starts.tolist(), plan.table_counts.tolist(), strict=True)
        for row, start, count in runs:
            pages = plan.table_pages[at : at + count]
            at += count
            _require(0 <= start and start + count <= self._table.shape[1], f"row {row}: run past its page table")
            _require(bool((pages > SCRATCH_PAGE).all() and (pages < len(self._cells)).all()),
                     f"row {row}: page table run of {pages.tolist()}")
            self._table[row, start : start + count] = pages
        _require(at == len(plan.table_pages), "page table runs do not use up their pages")

    def _copy(self, plan: StepPlan) -> None:
        for source, target, tokens in plan.copies.tolist():
            _require(SCRATCH_PAGE not in (source, target) and source != target and 0 < tokens <= self._page_size,
                     f"copy of {tokens} tokens from page {source} to page {target}")
            self._cells[target, :tokens] = self._cells[source, :tokens]

    # The step itself.

    def _pages_of(self, plan: StepPlan, i: int) -> tuple[list[int], list[int]]:
        """Pages that the i-th row reads, then those it writes; a page may be among both."""
        start, count = int(plan.starts[i]), int(plan.query_counts[i])
        slots = self._table[int(plan.rows[i])]
        last_slot = (start + count - 1) // self._page_size
        _require(last_slot < len(slots), f"step {plan.step}: row {plan.rows[i]} runs past its page table")
        pages = slots[: last_slot + 1].tolist()
        _require(SCRATCH_PAGE not in pages,
                 f"step {plan.step}: row {plan.rows[i]} has no page for one of its {start + count} positions")
        return pages[: -(-start // self._page_size)], pages[start // self._page_size :]

    def _note_touches(self, plan: StepPlan, flight: _Flight) -> None:
        """Record which pages this step's rows touch; strict: raise where a step in flight has another claim."""
        for i, row in enumerate(plan.rows.tolist()):
            reads, writes = self._pages_of(plan, i)
            for page in reads:
                flight.reads.setdefault(page, set()).add(row)
            for page in writes:
                others = flight.writes.setdefault(page, set())
                _require(not (self._strict and others), f"step {plan.step}: two rows write page {page}")
                others.add(row)
        if not self._strict:
            return
        for earlier in self._flights:
            # A copy is done when its step begins, so it only has to wait for what was launched before.
            for source, target, _ in plan.copies.tolist():
                _require(source not in earlier.writes and target not in earlier.writes and target not in earlier.reads,
                         f"step {plan.step} copies page {source} to {target}, which step {earlier.step} still uses")
            for page, rows in flight.writes.items():
                users = earlier.reads.get(page, set()) | earlier.writes.get(page, set())
                _require(users <= rows, f"step {plan.step} writes page {page}, which step {earlier.step} still uses")
            for page, rows in flight.reads.items():
                writers = earlier.writes.get(page, rows)
                _require(writers >= rows, f"step {plan.step} reads page {page}, which step {earlier.step} still writes")

    def _digests(self, plan: StepPlan) -> hashing.Cells:
        """Digest of the pool's content over positions 0..p, as each row reads it: uint64[n, longest]."""
        ends = plan.starts + plan.query_counts
        positions = np.arange(int(ends.max()), dtype=np.int64)
        slots = np.minimum(positions // self._page_size, self._table.shape[1] - 1)
        cells = self._cells[self._table[plan.rows][:, slots], positions % self._page_size]
        digests: hashing.Cells = np.cumsum(hashing.terms_array(cells, positions), axis=1, dtype=np.uint64)
        return digests

    def _compute_cells(self, plan: StepPlan) -> dict[int, list[_Write]]:
        """What each row writes, from what it reads before the step and its query tokens; rows last to first."""
        if not len(plan.rows):
            return {}
        digests = self._digests(plan)
        ends = np.cumsum(plan.query_counts).tolist()
        writes: dict[int, list[_Write]] = {}
        for i in reversed(range(len(ends))):
            row, start = int(plan.rows[i]), int(plan.starts[i])
            tokens = plan.tokens[ends[i] - int(plan.query_counts[i]) : ends[i]].tolist()
            if plan.flags[i] & FROM_DEVICE:
                _require(tokens[0] == NO_TOKEN, f"row {row}: a token where the device's own is to be used")
                tokens[0] = self._rows[row].last_token
            _require(all(0 <= token < self._vocab_size for token in tokens), f"row {row}: query tokens {tokens}")
            digest = int(digests[i, start - 1]) if start else 0
            writes[row] = []
            for position, token in enumerate(tokens, start):
                cell = hashing.cell_of(digest, token, position)
                digest = digest + hashing.term_of(cell, position) & hashing.MASK
                page = int(self._table[row, position // self._page_size])
                writes[row].append(_Write(page, position % self._page_size, cell))
        return writes

    def _sample(self, plan: StepPlan, written_counts: list[int]) -> StepResult:
        """Sample and verify drafts from what the rows read after all writes; cells written are what is counted."""
        if not len(plan.rows):
            none = np.empty(0, np.int32)
            return StepResult(plan.step, none, none, none, none, np.empty(0, np.bool_))
        digests = self._digests(plan)
        faulty = np.array([self._is_faulty() for _ in plan.rows], np.bool_)
        self.faulty_seeds += [self._rows[row].seed for row in plan.rows[faulty].tolist()]
        emitted, logprobs, tops, flat_digests, first_query = [], [], [], [], 0
        for i, row in enumerate(plan.rows.tolist()):
            start, count = int(plan.starts[i]), int(plan.query_counts[i])
            row_digests = digests[i, start : start + count].tolist()
            flat_digests += row_digests
            tokens = self._emit(plan, i, row_digests, plan.tokens[first_query : first_query + count].tolist())
            first_query += count
            if faulty[i] and tokens:
                tokens = [0]
            if tokens:
                self._rows[row].last_token = tokens[-1]
            emitted.append(tokens)
            if plan.logprob_tops[i] >= 0:
                sampled_at = row_digests[count - 1 - int(plan.draft_counts[i]) :]
                for digest, token in zip(sampled_at, tokens, strict=False):
                    logprobs.append(hashing.logprob_of(digest, token))
                    tops += hashing.top_of(digest, int(plan.logprob_tops[i]), self._vocab_size)
        scores, score_top_ids, score_top_logprobs = self._score(plan, flat_digests)
        top_ids, top_logprobs = _split_tops(tops)
        return StepResult(
            plan.step,
            plan.rows.copy(),
            np.array(written_counts, np.int32),
            np.array([len(tokens) for tokens in emitted], np.int32),
            np.array([token for tokens in emitted for token in tokens], np.int32),
            faulty,
            np.array(logprobs, np.float32),
            top_ids,
            top_logprobs,
            scores,
            score_top_ids,
            score_top_logprobs,
        )

    def _emit(self, plan: StepPlan, i: int, digests: list[int], queries: list[int]) -> list[int]:
        """Tokens that the i-th row emits: its next token, then one more for each draft that was right."""
        if not plan.flags[i] & SAMPLE:
            return []
        row = self._rows[int(plan.rows[i])]
        draft_count, output_index = int(plan.draft_counts[i]), int(plan.output_indices[i])
        drafts = queries[len(queries) - draft_count :]
        tokens: list[int] = []
        for digest in digests[len(queries) - 1 - draft_count :]:
            tokens.append(row.choose(digest, output_index + len(tokens), self._vocab_size))
            row.seen = row.seen + hashing.seen_term(tokens[-1], is_output=True) & hashing.MASK
            if len(tokens) > draft_count or drafts[len(tokens) - 1] != tokens[-1]:
                break
        return tokens

    def _score(self, plan: StepPlan, flat_digests: list[int]) -> tuple[Floats, Ints, Floats]:
        queries, targets = plan.score_queries.tolist(), plan.score_targets.tolist()
        tops: list[tuple[int, float]] = []
        for query, top in zip(queries, plan.score_tops.tolist(), strict=True):
            tops += hashing.top_of(flat_digests[query], top, self._vocab_size)
        scores = [hashing.logprob_of(flat_digests[q], t) for q, t in zip(queries, targets, strict=True)]
        return np.array(scores, np.float32), *_split_tops(tops)

    def _spoil(self, writes: list[_Write]) -> None:
        """What a row without finite logits wrote is worth nothing either: whoever reads it later shall stumble."""
        for write in writes:
            write.cell = POISON
            self._cells[write.page, write.offset] = POISON

    # Writes that arrive when they please.

    def _land(self, writes: list[_Write]) -> None:
        for write in writes:
            write.before = int(self._cells[write.page, write.offset])
            self._cells[write.page, write.offset] = write.cell

    def _hold_back(self, flight: _Flight, writes: dict[int, list[_Write]]) -> None:
        """Undo the step's writes in the pool, last first; they land when the row runs again or the result is taken."""
        for row_writes in reversed(writes.values()):
            for write in reversed(row_writes):
                self._cells[write.page, write.offset] = write.before
        flight.late = writes

    def _land_before(self, plan: StepPlan) -> None:
        """Let held-back writes of rows that go on in this step land: a row always sees what it wrote itself."""
        continuing = set(plan.rows.tolist()) - set(plan.bind_rows.tolist())
        for flight in self._flights:
            for row in [row for row in flight.late if row in continuing]:
                self._land(flight.late.pop(row))


def _bound_row(
    ints: npt.NDArray[Any],
    floats: npt.NDArray[Any],
    *,
    biases: list[tuple[int, float]],
    banned: tuple[int, ...],
    prompt: list[int],
    output: list[int],
) -> _Row:
    """What a row is bound to, from one row of the plan's bind arrays."""
    is_greedy = bool(floats[BIND_TEMPERATURE] == 0)
    penalties = [float(floats[column]) for column in (BIND_REPETITION, BIND_FREQUENCY, BIND_PRESENCE)]
    warmth = [float(floats[BIND_TEMPERATURE]), float(floats[BIND_TOP_P]), float(floats[BIND_MIN_P])]
    settings = penalties if is_greedy else [*penalties, *warmth, float(ints[BIND_TOP_K])]
    seen = sum(hashing.seen_term(token, is_output=False) for token in prompt)
    seen += sum(hashing.seen_term(token, is_output=True) for token in output)
    return _Row(
        seed=(int(ints[BIND_SEED_HIGH]) & 0xFFFFFFFF) << 32 | int(ints[BIND_SEED_LOW]) & 0xFFFFFFFF,
        flavour=hashing.flavour_of(settings, biases),
        is_greedy=is_greedy,
        min_new_tokens=int(ints[BIND_MIN_NEW_TOKENS]),
        banned=banned,
        has_penalty=penalties != [1.0, 0.0, 0.0],
        seen=seen & hashing.MASK,
    )


def _split_tops(tops: list[tuple[int, float]]) -> tuple[Ints, Floats]:
    return np.array([token for token, _ in tops], np.int32), np.array([score for _, score in tops], np.float32)

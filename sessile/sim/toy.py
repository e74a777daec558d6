"""A toy device: real pages, real page tables, a model that is a hash of what it reads through them.

It applies `contract/plan.py` to the letter and trusts nothing: what a plan may not ask raises DeviceFault. Steps are
computed when they are launched. Two tempers, chosen by the world's seed:

  strict   a step that touches a page or row which another request's unsettled step still uses raises at once
  loose    the race happens: writes of rows that the next step leaves out land when their own result is taken, on top of
           whatever was written meanwhile, and have to show in a token
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
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
    NO_FLOATS,
    NO_INTS,
    SAMPLE,
    SCRATCH_PAGE,
    Floats,
    Ints,
    StepPlan,
    StepResult,
)
from sessile.sim import hashing
from sessile.units import ceil_div

NO_TOKEN = -1
_NOBODY: frozenset[int] = frozenset()
_NO_MASKS: dict[int, frozenset[int]] = {}
POISON = 0xDEADBEEF_DEADBEEF


class DeviceFault(AssertionError):
    """A plan asked for what the contract forbids, or raced with a step in flight."""


def _require(holds: bool, message: str) -> None:
    """For fixed messages; one that has to be put together is raised by hand, lest every step write it in vain."""
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

    def choose(self, digest: int, output_index: int, vocab_size: int, masked: frozenset[int]) -> int:
        """Sample the token with this output index after the text with this digest; `masked` ones are impossible."""
        noise = self.flavour if self.is_greedy else hashing.noise_of(self.flavour, self.seed, output_index)
        if self.has_penalty:
            noise ^= hashing.mix(self.seen)
        banned = self.banned if output_index < self.min_new_tokens else ()
        return hashing.token_of(digest, noise, vocab_size, masked.union(banned) if masked else banned)


@dataclass(slots=True)
class _Write:
    """One cell that a row of a step writes, and what was there before."""

    page: int
    offset: int
    cell: int
    before: int = POISON


@dataclass(slots=True)
class _Part:
    """What a plan asks of one row, as plain numbers: a plan is short, and numpy's fixed cost is not."""

    row: int
    start: int
    count: int
    drafts: int
    flags: int
    output_index: int
    top: int
    tokens: list[int]
    first: int = 0
    """Where its tokens begin among those of the step."""


class _Pool:
    """Pages of cells, and the sum of terms of each page as it was last read: a digest is a sum."""

    def __init__(self, pages_total: int, page_size: int) -> None:
        self.page_size = page_size
        self.cells = [[POISON] * page_size for _ in range(pages_total)]
        self._sums: list[tuple[int, int] | None] = [None] * pages_total
        """(slot at which the page was read, sum of its terms there); None since it was written to."""

    def write(self, page: int, offset: int, cell: int) -> None:
        """Change one cell."""
        self.cells[page][offset] = cell
        self._sums[page] = None

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first cells of a page."""
        self.cells[target][:tokens] = self.cells[source][:tokens]
        self._sums[target] = None

    def term(self, slots: Sequence[int], position: int) -> int:
        """What the cell at a position adds to the digest, read through a page table."""
        return hashing.term_of(self.cells[slots[position // self.page_size]][position % self.page_size], position)

    def digest(self, slots: Sequence[int], tokens: int) -> int:
        """Digest of positions 0..tokens - 1, read through a page table."""
        size, sums = self.page_size, self._sums
        full = tokens // size
        digest = 0
        for slot in range(full):
            page = slots[slot]
            known = sums[page]
            if known is None or known[0] != slot:
                terms = map(hashing.term_of, self.cells[page], range(slot * size, (slot + 1) * size))
                known = sums[page] = slot, sum(terms)
            digest += known[1]
        for position in range(full * size, tokens):
            digest += self.term(slots, position)
        return digest & hashing.MASK


@dataclass(slots=True)
class _Flight:
    """A launched step whose result has not been taken: the pages its rows touch, and writes held back."""

    step: int
    rows: frozenset[int] = frozenset()
    reads: dict[int, set[int]] = field(default_factory=dict)
    """page → rows that read it; likewise below."""
    writes: dict[int, set[int]] = field(default_factory=dict)
    written_from: dict[int, int] = field(default_factory=dict)
    """page → the first place in it that is written."""
    late: dict[int, list[_Write]] = field(default_factory=dict)
    """row → its writes that have not reached the pool."""


class ToyTicket:
    """A step on its way. Taking the result settles it on the device: its late writes land now."""

    def __init__(self, device: "ToyDevice", flight: _Flight, result: StepResult) -> None:
        self._device = device
        self._flight = flight
        self.outcome = result
        """What the result will be, without taking it."""

    def is_done(self) -> bool:
        """Always: nothing is computed when the result is taken."""
        return True

    def result(self) -> StepResult:
        """The step's result; steps must be taken in order, each once."""
        self._device.take(self._flight)
        return self.outcome


class ToyDevice:
    """An Executor whose pool is a list of pages.

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
        self._vocab_size = vocab_size
        self._strict = strict
        self._is_late = is_late
        self._is_faulty = is_faulty
        self._slots = (context_tokens + drafts_max) // page_size + 1
        self._table = [[SCRATCH_PAGE] * self._slots for _ in range(rows_max)]
        self._pool = _Pool(pages_total, page_size)
        self._rows = [_Row() for _ in range(rows_max)]
        self._flights: list[_Flight] = []
        self._last_step = 0
        self.faulty_seeds: set[int] = set()

    def seed_of(self, row: int) -> int:
        """The noise seed that the row was bound with, which names its request in a simulation."""
        return self._rows[row].seed

    def pages_of(self, row: int) -> list[int]:
        """The row's page table as the device has it; read only."""
        return self._table[row]

    def launch(self, plan: StepPlan) -> ToyTicket:
        """Run a step; its rows see their writes at once, the pool sees them at the latest when the result is taken."""
        parts = self._parts(plan)
        flight = _Flight(plan.step, rows=frozenset([part.row for part in parts]))
        self._land_before(plan, flight)
        self._bind(plan)
        self._write_table(plan)
        self._note_touches(plan, parts, flight)
        self._copy(plan)
        writes = self._compute_cells(parts)
        for row_writes in writes.values():
            self._land(row_writes)
        result = self._sample(plan, parts, [len(writes[part.row]) for part in parts])
        for part, is_faulty in zip(parts, result.faulty.tolist(), strict=True):
            if is_faulty:
                self._spoil(writes[part.row])
        if not self._strict and self._is_late():
            self._hold_back(flight, writes)
        self._flights.append(flight)
        return ToyTicket(self, flight, result)

    def prepare(self) -> bool:
        """Nothing to make ready."""
        return False

    def take(self, flight: _Flight) -> None:
        """Settle the oldest step in flight: let the writes it held back land."""
        _require(bool(self._flights) and self._flights[0] is flight, "a step was taken twice or out of order")
        self._flights.pop(0)
        for writes in flight.late.values():
            self._land(writes)

    def digest_of(self, pages: Sequence[int], tokens: int) -> int:
        """Digest of the first tokens of KV on these pages, as a row with such a page table would read it."""
        return self._pool.digest(pages, tokens)

    def scramble(self, pages: Iterable[int], rows: Iterable[int]) -> None:
        """Spoil what nobody owns: whoever reads it afterwards stumbles, whatever was there before."""
        for page in pages:
            for offset in range(self._pool.page_size):
                self._pool.write(page, offset, POISON)
        for row in rows:
            self._table[row] = [SCRATCH_PAGE] * self._slots
            self._rows[row] = _Row()

    def close(self) -> None:
        """Nothing to release."""

    # What changes before the step: occupants, page tables, copies.

    def _parts(self, plan: StepPlan) -> list[_Part]:
        """What each row has to do; raises where the plan's arrays contradict each other."""
        rows, starts, counts = plan.rows.tolist(), plan.starts.tolist(), plan.query_counts.tolist()
        drafts, flags, tops = plan.draft_counts.tolist(), plan.flags.tolist(), plan.logprob_tops.tolist()
        indices, tokens = plan.output_indices.tolist(), plan.tokens.tolist()
        if plan.step <= self._last_step:
            raise DeviceFault(f"step {plan.step} after step {self._last_step}")
        self._last_step = plan.step
        _require(len(self._flights) <= 1, "a launch while two steps are in flight")
        _require(len(rows) == len(starts) == len(counts) == len(drafts) == len(flags) == len(indices) == len(tops),
                 "an array that is not one a row")
        _require(len(set(rows)) == len(rows), "a row runs twice in one step")
        _require(sum(counts) == len(tokens), "tokens do not match the query counts")
        parts, at = [], 0
        for part in map(_Part, rows, starts, counts, drafts, flags, indices, tops, repeat(tokens)):
            _require(0 <= part.row < len(self._rows), "a row that does not exist")
            _require(part.count >= 1, "a row without query tokens")
            _require(part.start >= 0, "a row that starts below 0")
            _require(not part.drafts or bool(part.flags & SAMPLE), "drafts on a row that does not sample")
            _require(part.drafts < part.count, "a row of nothing but drafts")
            part.tokens, part.first = tokens[at : at + part.count], at
            at += part.count
            parts.append(part)
        return parts

    def _bind(self, plan: StepPlan) -> None:
        biases, bans, seen = 0, 0, 0
        for i, row in enumerate(plan.bind_rows.tolist()):
            self._check_row_is_idle(row, plan.step)
            bias_end, ban_end = biases + int(plan.bias_counts[i]), bans + int(plan.ban_counts[i])
            output_start = seen + int(plan.prompt_counts[i])
            output_end = output_start + int(plan.output_counts[i])
            self._table[row] = [SCRATCH_PAGE] * self._slots
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
        table_pages = plan.table_pages.tolist()
        runs = zip(plan.table_rows.tolist(), plan.table_starts.tolist(), plan.table_counts.tolist(), strict=True)
        for row, start, count in runs:
            pages = table_pages[at : at + count]
            at += count
            if not 0 <= start <= start + count <= self._slots:
                raise DeviceFault(f"row {row}: run past its page table")
            if not all([SCRATCH_PAGE < page < len(self._pool.cells) for page in pages]):
                raise DeviceFault(f"row {row}: page table run of {pages}")
            self._table[row][start : start + count] = pages
        _require(at == len(table_pages), "page table runs do not use up their pages")

    def _copy(self, plan: StepPlan) -> None:
        for source, target, tokens in plan.copies.tolist():
            _require(SCRATCH_PAGE not in (source, target) and source != target and 0 < tokens <= self._pool.page_size,
                     f"copy of {tokens} tokens from page {source} to page {target}")
            self._pool.copy(source, target, tokens)

    # The step itself.

    def _pages_of(self, part: _Part, step: int) -> tuple[list[int], list[int]]:
        """Pages that a row reads, then those it writes; a page may be among both."""
        size, end = self._pool.page_size, part.start + part.count
        slots = self._table[part.row]
        last_slot = (end - 1) // size
        if last_slot >= len(slots):
            raise DeviceFault(f"step {step}: row {part.row} runs past its page table")
        pages = slots[: last_slot + 1]
        if SCRATCH_PAGE in pages:
            raise DeviceFault(f"step {step}: row {part.row} has no page for one of its {end} positions")
        return pages[: -(-part.start // size)], pages[part.start // size :]

    def _note_touches(self, plan: StepPlan, parts: list[_Part], flight: _Flight) -> None:
        """Record which pages this step's rows touch; strict: raise where a step in flight has another claim."""
        for part in parts:
            reads, writes = self._pages_of(part, plan.step)
            if not self._strict:
                continue
            for page in reads:
                flight.reads.setdefault(page, set()).add(part.row)
            for page in writes:
                others = flight.writes.setdefault(page, set())
                if others:
                    raise DeviceFault(f"step {plan.step}: two rows write page {page}")
                others.add(part.row)
                is_first = page == writes[0]
                flight.written_from[page] = part.start % self._pool.page_size if is_first else 0
        if not self._strict:
            return
        for earlier in self._flights:
            # A copy is done when its step begins, so it only has to wait for what was launched before. What is written
            # behind the copied head of a page does not concern it.
            for source, target, tokens in plan.copies.tolist():
                is_read = earlier.written_from.get(source, tokens) < tokens
                if is_read or target in earlier.writes or target in earlier.reads:
                    raise DeviceFault(
                        f"step {plan.step} copies page {source} to {target}, which step {earlier.step} still uses"
                    )
            for page, rows in flight.writes.items():
                if not (earlier.reads.get(page, _NOBODY) | earlier.writes.get(page, _NOBODY)) <= rows:
                    raise DeviceFault(f"step {plan.step} writes page {page}, which step {earlier.step} still uses")
            for page, rows in flight.reads.items():
                if not earlier.writes.get(page, rows) >= rows:
                    raise DeviceFault(f"step {plan.step} reads page {page}, which step {earlier.step} still writes")

    def _compute_cells(self, parts: list[_Part]) -> dict[int, list[_Write]]:
        """What each row writes, from what it reads before the step and its query tokens; rows last to first."""
        writes: dict[int, list[_Write]] = {}
        size = self._pool.page_size
        for part in reversed(parts):
            row, tokens = part.row, part.tokens
            if part.flags & FROM_DEVICE:
                _require(tokens[0] == NO_TOKEN, "a row has a token where the device's own is to be used")
                tokens = [self._rows[row].last_token, *tokens[1:]]
            if not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
                raise DeviceFault(f"row {row}: query tokens {tokens}")
            slots = self._table[row]
            digest = self._pool.digest(slots, part.start)
            writes[row] = []
            for position, token in enumerate(tokens, part.start):
                cell = hashing.cell_of(digest, token, position)
                digest = digest + hashing.term_of(cell, position) & hashing.MASK
                writes[row].append(_Write(slots[position // size], position % size, cell))
        return writes

    def _digests(self, part: _Part, queries: int) -> list[int]:
        """Digests behind the last `queries` query positions of a row, from the pool's content as the row reads it."""
        slots, end = self._table[part.row], part.start + part.count
        digests = [self._pool.digest(slots, end - queries + 1)] if queries else []
        for position in range(end - queries + 1, end):
            digests.append(digests[-1] + self._pool.term(slots, position) & hashing.MASK)
        return digests

    def _sample(self, plan: StepPlan, parts: list[_Part], written_counts: list[int]) -> StepResult:
        """Sample and verify drafts from what the rows read after all writes; cells written are what is counted."""
        faulty = [self._is_faulty() for _ in parts]
        scores, score_tops = self._score(plan, parts)
        masks = self._masks(plan, parts)
        emitted, logprobs = [], []
        tops: list[tuple[int, float]] = []
        for part, is_faulty in zip(parts, faulty, strict=True):
            if is_faulty:
                self.faulty_seeds.add(self._rows[part.row].seed)
            digests = self._digests(part, 1 + part.drafts if part.flags & SAMPLE else 0)
            tokens = self._emit(part, digests, masks)
            if is_faulty and tokens:
                tokens = [0]
            if tokens:
                self._rows[part.row].last_token = tokens[-1]
            emitted.append(tokens)
            if part.top >= 0:
                for digest, token in zip(digests, tokens, strict=False):
                    logprobs.append(hashing.logprob_of(digest, token))
                    tops += hashing.top_of(digest, part.top, self._vocab_size)
        return StepResult(
            plan.step,
            plan.rows.copy(),
            np.array(written_counts, np.int32),
            np.array([len(tokens) for tokens in emitted], np.int32),
            np.array([token for tokens in emitted for token in tokens], np.int32),
            np.array(faulty, np.bool_),
            np.array(logprobs, np.float32) if logprobs else NO_FLOATS,
            *_split_tops(tops),
            np.array(scores, np.float32) if scores else NO_FLOATS,
            *_split_tops(score_tops),
        )

    def _masks(self, plan: StepPlan, parts: list[_Part]) -> dict[int, frozenset[int]]:
        """By place where the step samples: the tokens that a mask leaves out."""
        places = plan.mask_queries.tolist()
        if not places and not len(plan.mask_words):
            return _NO_MASKS
        sampled = {
            place
            for part in parts
            if part.flags & SAMPLE
            for place in range(part.first + part.count - part.drafts - 1, part.first + part.count)
        }
        _require(len(set(places)) == len(places) and sampled.issuperset(places), "a mask where nothing is sampled")
        _require(len(plan.mask_words) == len(places) * ceil_div(self._vocab_size, 32), "masks of a wrong size")
        bits = np.unpackbits(plan.mask_words.reshape(len(places), -1).view(np.uint8), axis=1, bitorder="little")
        bits = bits[:, : self._vocab_size]
        _require(bool(bits.any(axis=1).all()), "a mask leaves no token")
        return {place: frozenset((row == 0).nonzero()[0].tolist()) for place, row in zip(places, bits, strict=True)}

    def _emit(self, part: _Part, digests: list[int], masks: dict[int, frozenset[int]]) -> list[int]:
        """Tokens that a row emits: its next token, then one more for each draft that was right."""
        first = part.first + part.count - part.drafts - 1
        row = self._rows[part.row]
        drafts = part.tokens[part.count - part.drafts :]
        tokens: list[int] = []
        for digest in digests:
            masked = masks.get(first + len(tokens), _NOBODY) if masks else _NOBODY
            tokens.append(row.choose(digest, part.output_index + len(tokens), self._vocab_size, masked))
            row.seen = row.seen + hashing.seen_term(tokens[-1], is_output=True) & hashing.MASK
            if len(tokens) > part.drafts or drafts[len(tokens) - 1] != tokens[-1]:
                break
        return tokens

    def _score(self, plan: StepPlan, parts: list[_Part]) -> tuple[list[float], list[tuple[int, float]]]:
        if not len(plan.score_queries):
            return [], []
        digests = [digest for part in parts for digest in self._digests(part, part.count)]
        queries, targets = plan.score_queries.tolist(), plan.score_targets.tolist()
        tops: list[tuple[int, float]] = []
        for query, top in zip(queries, plan.score_tops.tolist(), strict=True):
            tops += hashing.top_of(digests[query], top, self._vocab_size)
        return [hashing.logprob_of(digests[q], t) for q, t in zip(queries, targets, strict=True)], tops

    def _spoil(self, writes: list[_Write]) -> None:
        """What a row without finite logits wrote is worth nothing either: whoever reads it later shall stumble."""
        for write in writes:
            write.cell = POISON
            self._pool.write(write.page, write.offset, POISON)

    # Writes that arrive when they please.

    def _land(self, writes: list[_Write]) -> None:
        cells = self._pool.cells
        for write in writes:
            write.before = cells[write.page][write.offset]
            self._pool.write(write.page, write.offset, write.cell)

    def _hold_back(self, flight: _Flight, writes: dict[int, list[_Write]]) -> None:
        """Undo the step's writes in the pool, last first; they land when the row runs again or the result is taken."""
        for row_writes in reversed(writes.values()):
            for write in reversed(row_writes):
                self._pool.write(write.page, write.offset, write.before)
        flight.late = writes

    def _land_before(self, plan: StepPlan, flight: _Flight) -> None:
        """Let held-back writes of rows that go on in this step land: a row always sees what it wrote itself."""
        bound = plan.bind_rows.tolist()
        for earlier in self._flights:
            for row in [row for row in earlier.late if row in flight.rows and row not in bound]:
                self._land(earlier.late.pop(row))


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
        flavour=hashing.flavour_of(tuple(settings), tuple(biases)),
        is_greedy=is_greedy,
        min_new_tokens=int(ints[BIND_MIN_NEW_TOKENS]),
        banned=banned,
        has_penalty=penalties != [1.0, 0.0, 0.0],
        seen=seen & hashing.MASK,
    )


def _split_tops(tops: list[tuple[int, float]]) -> tuple[Ints, Floats]:
    if not tops:
        return NO_INTS, NO_FLOATS
    return np.array([token for token, _ in tops], np.int32), np.array([score for _, score in tops], np.float32)

"""The batch rows: who sits where, and the hot counters of whoever runs, one numpy column each and their only home.

Rows are accounted like pages: one owner each, free + held = total. A row is held from admission until the last step
that reads its page table has settled, so it outlives its request by at most one step (draining).
"""

from collections.abc import Sequence
from struct import Struct
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from sessile.errors import OwnershipError
from sessile.units import RowId

Column = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Occupant = TypeVar("Occupant")

STOP_COLUMNS = 4
"""Stop tokens that are compared for all rows at once; a request with more pays for a look of its own."""


OUTPUT_COLUMNS = 256
"""Output tokens a row gathers before its request takes them over."""

_NO_COLUMN: Column = np.empty(0, np.int64)
ONES: npt.NDArray[np.int32] = np.ones(4096, np.int32)
"""Counts of one for each of several rows; as long as a batch can be."""
ONES.flags.writeable = False


COLUMNS = (
    "key", "live", "slow", "arrival", "known", "filled", "settled", "planned",
    "pending", "kv_goal", "pages", "pinned", "prompt", "last_token", "last_step", "logprobs", "tenant",
    "drafts", "constrained",
)  # fmt: skip
"""The columns that a request sets when it takes a row, in the order of `pack_row`; RowTable describes them."""
COUNTED = frozenset(("known", "filled", "settled", "planned", "pending", "last_token", "last_step"))
"""Those in which a step that goes on counts: properties, which write what was only noted."""
pack_row = Struct(f"<{len(COLUMNS)}q").pack
"""A number for each of COLUMNS, as the bytes that `RowTable.seat` takes."""


def spread(counts: Column) -> tuple[Column, Column]:
    """Of runs of so many elements, end to end: (which run each element is of, its place in that)."""
    which = np.arange(len(counts)).repeat(counts)
    places = np.arange(len(which)) - (counts.cumsum() - counts)[which]
    return which, places


class _Run:
    """Steps in a row in which the same rows, and all of them plain, decode one token each: counted, not yet written.

    chosen bool[rows_max]: the rows. planned: so many steps were planned, the newest of them `newest_step`. tokens:
    those of each step that has settled, in the order of `rows`. room: so many may settle before a row's output is full
    or at its goal.
    """

    __slots__ = ("chosen", "keys", "newest_step", "planned", "room", "rows", "stops", "tokens")

    def __init__(self, chosen: Flags) -> None:
        self.chosen = chosen
        self.planned = 0
        self.newest_step = 0
        self.tokens: list[npt.NDArray[np.int32]] = []
        self.rows: Column | None = None
        self.keys: Column = _NO_COLUMN
        self.stops: list[Column] = []
        self.room = 0


def row_by_row(steps: list[npt.NDArray[np.int32]], which: Column) -> npt.NDArray[np.int32]:
    """The tokens that steps in a row had for the rows `which` of theirs, those of a row end to end: a copy."""
    whole = len(which) == len(steps[0])
    if len(steps) == 1:
        return steps[0].copy() if whole else steps[0][which]
    tokens = np.array(steps).T
    flat: npt.NDArray[np.int32] = (tokens if whole else tokens[which]).ravel()
    return flat


class RowTable(Generic[Occupant]):
    """rows_max batch rows. Lengths in tokens; settled ≤ planned ≤ pages × page size, settled < known ≤ goal.

    Most steps only count one up in the columns of all who run. Such steps are noted (`plan_once_more`,
    `append_once_more`), and written, all together, before anybody sees one of these columns.
    """

    key: Column
    """Request key."""
    _known: Column
    _filled: Column
    _settled: Column
    _planned: Column
    _pending: Column
    _last_token: Column
    _last_step: Column
    live: Column
    """1 while results count; 0 for a draining row, whose results are dropped."""
    plannable: Flags
    """Whether the row may be planned: live and not about to be preempted. Whatever changes it counts in `changes`."""
    slow: Column
    """1 if settling the row takes more than appending one token: stop strings, logprobs, many stop tokens, a grammar
    that failed. Whatever sets it in a row that is held counts in `changes`."""
    arrival: Column
    """Order of arrival of the request; survives preemption."""
    kv_goal: Column
    """prompt + max_new_tokens - 1: with this many KV tokens nothing is left to compute; it ends when known is above."""
    pages: Column
    """Pages in the row's table: pinned and own."""
    pinned: Column
    """Of these, pages of the tree that the row reads under its pin."""
    prompt: Column
    """Prompt tokens, a session's history included."""
    logprobs: Column
    """-1, or how many of the most likely tokens are wanted beside each output token."""
    tenant: Column
    """Index of the request's tenant."""
    drafts: Column
    """Most drafts that the request may have in a step."""
    constrained: Column
    """1 if a grammar says which tokens its output may have."""

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self._columns = np.zeros((len(COLUMNS), rows_max), np.int64)
        for index, name in enumerate(COLUMNS):
            setattr(self, f"_{name}" if name in COUNTED else name, self._columns[index])
        self._told = self._pair("known", "filled")
        self._run: _Run | None = None
        self.plannable = np.zeros(rows_max, np.bool_)
        self.changes = 0
        """How often who may be planned, or is slow, has changed."""
        self._plain, self._plain_since = np.zeros(rows_max, np.bool_), -1
        self._flags, self._ones = np.zeros(rows_max, np.bool_), np.zeros(rows_max, np.int64)
        self._outputs: npt.NDArray[np.int32] = np.zeros((rows_max, OUTPUT_COLUMNS), np.int32)
        self.stops: npt.NDArray[np.int64] = np.full((STOP_COLUMNS, rows_max), -1, np.int64)
        """Token ids that end a row's output, by column and row; -1 where unused."""
        self.stop_columns = 0
        """How many columns of `stops` any request ever needed."""
        self.logprobs_wanted = False
        """Whether any request ever had `logprobs`."""
        self.constraints_wanted = False
        """Whether any request ever had a grammar."""
        self.occupants: list[Occupant | None] = [None] * rows_max
        self._free = list(range(rows_max - 1, -1, -1))

    def _pair(self, name: str, next_name: str) -> Column:
        """Two columns side by side, [2, rows_max]: one array operation counts in both."""
        index = COLUMNS.index(name)
        assert COLUMNS[index + 1] == next_name
        return self._columns[index : index + 2]

    @property
    def known(self) -> Column:
        """Tokens known on the host: history, prompt and output so far."""
        if self._run is not None:
            self._write_run()
        return self._known

    @property
    def filled(self) -> Column:
        """Output tokens in `outputs` that the request has not taken over yet."""
        if self._run is not None:
            self._write_run()
        return self._filled

    @property
    def settled(self) -> Column:
        """Tokens whose KV is known to be right."""
        if self._run is not None:
            self._write_run()
        return self._settled

    @property
    def planned(self) -> Column:
        """settled, and what the steps in flight or being planned add, drafts included."""
        if self._run is not None:
            self._write_run()
        return self._planned

    @property
    def pending(self) -> Column:
        """Tokens that steps in flight may sample, at most."""
        if self._run is not None:
            self._write_run()
        return self._pending

    @property
    def last_token(self) -> Column:
        """The last known token."""
        if self._run is not None:
            self._write_run()
        return self._last_token

    @property
    def last_step(self) -> Column:
        """The newest step that reads or writes the row."""
        if self._run is not None:
            self._write_run()
        return self._last_step

    @property
    def outputs(self) -> npt.NDArray[np.int32]:
        """int32[rows_max, OUTPUT_COLUMNS]: the newest output tokens of each row, as many as `filled` says."""
        if self._run is not None:
            self._write_run()
        return self._outputs

    @property
    def free_rows(self) -> int:
        """Rows that nobody holds."""
        return len(self._free)

    @property
    def held_rows(self) -> int:
        """Rows that running or draining requests hold."""
        return self.rows_max - len(self._free)

    @property
    def free_list(self) -> list[int]:
        """The free rows; read only, for the audit."""
        return self._free

    def occupant(self, row: int) -> Occupant:
        """Who holds a row that is held."""
        occupant = self.occupants[row]
        assert occupant is not None, f"row {row} is free"
        return occupant

    def take(self, occupant: Occupant) -> RowId:
        """Give a free row to an occupant. It is not live until `seat` has set its columns."""
        row = self._free.pop()
        if self.occupants[row] is not None:
            raise OwnershipError(f"row {row} was on the free list while it was held")
        self.occupants[row] = occupant
        return RowId(row)

    def provide_for(self, stops: tuple[int, ...], logprobs: int, *, constrained: bool) -> None:
        """Look at what a request will need, before it has a row: columns that nobody needs are not looked at."""
        self.stop_columns = max(self.stop_columns, min(len(stops), STOP_COLUMNS))
        self.logprobs_wanted = self.logprobs_wanted or logprobs >= 0
        self.constraints_wanted = self.constraints_wanted or constrained

    def seat(self, rows: Sequence[RowId], starts: Sequence[bytes], stops: Sequence[tuple[int, ...]]) -> None:
        """Set all columns of rows that were taken, from `pack_row`: one array operation, however many they are."""
        if self._run is not None:
            self._write_run()
        self._columns[:, rows] = np.frombuffer(b"".join(starts), np.int64).reshape(len(rows), -1).T
        self.plannable[rows] = True
        self.changes += 1
        if self.stop_columns:
            padded = [(*ids[:STOP_COLUMNS], *(-1,) * (STOP_COLUMNS - len(ids))) for ids in stops]
            self.stops[:, rows] = np.array(padded, np.int64).T

    def flags_of(self, chosen: Column) -> Flags:
        """bool[rows_max]: which rows are among those."""
        flags = np.zeros(self.rows_max, np.bool_)
        flags[chosen] = True
        return flags

    def stop_planning(self, row: int) -> None:
        """The row is not to be planned any more."""
        self.plannable[row] = False
        self.changes += 1

    def make_slow(self, row: int) -> None:
        """From now on settling the row takes more than appending one token."""
        self.slow[row] = 1
        self.changes += 1

    def note_plain(self, chosen: Flags) -> None:
        """All of the rows that bool[rows_max] names are live, and none is slow."""
        self._plain, self._plain_since = chosen, self.changes

    def are_plain(self, chosen: Flags) -> bool:
        """Whether that was noted of the very array, and nothing has changed since; False may mean nothing."""
        return chosen is self._plain and self._plain_since == self.changes

    def plan_one(self, chosen: Flags, step: int) -> None:
        """Count one more planned and pending token for the rows that bool[rows_max] names, and the step as theirs."""
        ones = self._as_ones(chosen)
        planned = self.planned
        planned += ones
        self._pending += ones
        np.putmask(self._last_step, chosen, step)

    def settle_one(self, chosen: Flags) -> None:
        """One pending token less for these rows."""
        pending = self.pending
        pending -= self._as_ones(chosen)

    def append_one(self, active: Column, chosen: Flags, tokens: npt.NDArray[np.int32]) -> None:
        """One token more for each of the rows, which are named twice; the KV of what they had before is settled.

        active [d]: the rows, in the order of tokens [d]. chosen: the same as bool[rows_max]. None of them is full.
        """
        filled = self.filled[active]
        self._outputs[active, filled] = tokens
        self._last_token[active] = tokens
        np.copyto(self._settled, self._known, where=chosen)
        self._told += self._as_ones(chosen)

    def append_several(self, active: Column, counts: Column, settled: Column, tokens: npt.NDArray[np.int32]) -> None:
        """Append `counts` tokens to each of the rows, of which so many tokens have right KV then; none is full by that.

        active, counts, settled [d]. tokens: end to end.
        """
        which, places = spread(counts)
        places += self.filled[active][which]
        self._outputs[active[which], places] = tokens
        self._last_token[active] = tokens[counts.cumsum() - 1]
        self._settled[active] = settled
        self._told[:, active] += counts

    def planned_so_far(self) -> Column:
        """`planned`, as an array of its own for which nothing that was noted is written."""
        run = self._run
        if run is None or not run.planned:
            return self._planned.copy()
        planned: Column = self._planned + self._as_ones(run.chosen) * run.planned
        return planned

    def reached(self, active: Column) -> tuple[Column, Column]:
        """(`known`, `pending`) of these rows [d]; where the steps that were noted are all of this very array, without
        writing them."""
        run = self._run
        if run is not None and run.rows is not active:
            self._write_run()
            run = None
        known, pending = self._known[active], self._pending[active]
        if run is not None:
            known += len(run.tokens)
            pending += run.planned - len(run.tokens)
        return known, pending

    def newest_noted(self, active: Column, which: Column, counts: Column) -> npt.NDArray[np.int32] | None:
        """As `newest`, of the rows active[which], if as many tokens of each were noted of this very array; else None.

        Nothing is written. The result is a copy.
        """
        noted, count = self.noted_steps(active), int(counts[0])
        if noted is None or not 0 < count <= len(noted) or np.count_nonzero(counts == count) < len(counts):
            return None
        return row_by_row(noted[-count:], which)

    def noted_steps(self, active: Column) -> list[npt.NDArray[np.int32]] | None:
        """The tokens of the steps that were noted of this very array, a step each; None if none were.

        Only to be read. The same list for as long as nothing but such steps has changed the rows.
        """
        run = self._run
        return run.tokens if run is not None and run.rows is active else None

    def newest(self, active: Column, counts: Column) -> npt.NDArray[np.int32]:
        """The last `counts` tokens in `outputs` of each of the rows, end to end."""
        which, places = spread(counts)
        places += (self.filled[active] - counts)[which]
        newest: npt.NDArray[np.int32] = self._outputs[active[which], places]
        return newest

    # -- steps that go on -----------------------------------------------------------------------------------------

    def plan_once_more(self, chosen: Flags, step: int) -> None:
        """As `plan_one`, noted until somebody looks."""
        run = self._run_of(chosen)
        run.planned += 1
        run.newest_step = step

    def append_once_more(self, active: Column, chosen: Flags, tokens: npt.NDArray[np.int32]) -> Column | None:
        """As `settle_one` and `append_one` for plain rows, noted until somebody looks. Returns their keys [d].

        None, with nothing noted, if that is not all: some row may not be plain, ends with this token, or is full.
        """
        if not self.are_plain(chosen):
            return None
        run = self._run_of(chosen)
        if run.rows is not active:
            if run.tokens:
                self._write_run()
                run = self._run_of(chosen)
            self._begin_to_append(run, active)
        if len(run.tokens) >= run.room:
            return None
        for stops in run.stops:
            if np.count_nonzero(stops == tokens):
                return None
        run.tokens.append(tokens)
        return run.keys

    def _run_of(self, chosen: Flags) -> _Run:
        """What is noted of steps of these rows; what was noted of others is written."""
        if self._run is not None and self._run.chosen is not chosen:
            self._write_run()
        if self._run is None:
            self._run = _Run(chosen)
        return self._run

    def _begin_to_append(self, run: _Run, active: Column) -> None:
        run.rows, run.keys = active, self.key[active]
        left = np.minimum(self.kv_goal - self._known, OUTPUT_COLUMNS - 1 - self._filled)
        run.room = int(np.minimum.reduce(left[active]))
        run.stops = [stops[active] for stops in self.stops[: self.stop_columns]]

    def _write_run(self) -> None:
        """Count in the columns what was noted."""
        run, self._run = self._run, None
        assert run is not None
        ones, appended = self._as_ones(run.chosen), len(run.tokens)
        if run.planned:
            self._planned += ones * run.planned
            np.putmask(self._last_step, run.chosen, run.newest_step)
        self._pending += ones * (run.planned - appended)
        if appended:
            rows = run.rows
            assert rows is not None
            places = self._filled[rows][:, np.newaxis] + np.arange(appended)
            self._outputs[rows[:, np.newaxis], places] = np.array(run.tokens).T
            self._last_token[rows] = run.tokens[-1]
            self._told += ones * appended
            np.copyto(self._settled, self._known - 1, where=run.chosen)

    def _as_ones(self, flags: Flags) -> Column:
        """int64 for bool: once for the same array, as numpy would convert through a buffer of 64 KiB as it adds."""
        if flags is not self._flags:
            self._flags, self._ones = flags, flags.astype(np.int64)
        return self._ones

    def give_back(self, row: RowId, occupant: Occupant) -> None:
        """Free a row; raises OwnershipError if the occupant does not hold it."""
        if self.occupants[row] is not occupant:
            raise OwnershipError(f"row {row} was given back by somebody who does not hold it")
        self.occupants[row] = None
        self.live[row] = 0
        self.stop_planning(row)
        self._free.append(row)

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


OUTPUT_COLUMNS = 64
"""Output tokens a row gathers before its request takes them over."""

ONES: npt.NDArray[np.int32] = np.ones(4096, np.int32)
"""Counts of one for each of several rows; as long as a batch can be."""
ONES.flags.writeable = False


COLUMNS = (
    "key", "live", "slow", "arrival", "known", "filled", "settled", "planned",
    "pending", "kv_goal", "pages", "pinned", "prompt", "last_token", "last_step", "logprobs", "tenant",
    "drafts", "constrained",
)  # fmt: skip
"""The columns that a request sets when it takes a row, in the order of `pack_row`; RowTable describes them."""
pack_row = Struct(f"<{len(COLUMNS)}q").pack
"""A number for each of COLUMNS, as the bytes that `RowTable.seat` takes."""


class RowTable(Generic[Occupant]):
    """rows_max batch rows. Lengths in tokens; settled ≤ planned ≤ pages × page size, settled < known ≤ goal."""

    key: Column
    """Request key."""
    live: Column
    """1 while results count; 0 for a draining row, whose results are dropped."""
    plannable: Flags
    """Whether the row may be planned: live and not about to be preempted. Whatever changes it counts in `changes`."""
    slow: Column
    """1 if settling the row takes more than appending one token: stop strings, logprobs, many stop tokens, a grammar
    that failed. Whatever sets it in a row that is held counts in `changes`."""
    arrival: Column
    """Order of arrival of the request; survives preemption."""
    known: Column
    """Tokens known on the host: history, prompt and output so far."""
    settled: Column
    """Tokens whose KV is known to be right."""
    planned: Column
    """settled, and what the steps in flight or being planned add, drafts included."""
    pending: Column
    """Tokens that steps in flight may sample, at most."""
    kv_goal: Column
    """prompt + max_new_tokens - 1: with this many KV tokens nothing is left to compute; it ends when known is above."""
    pages: Column
    """Pages in the row's table: pinned and own."""
    pinned: Column
    """Of these, pages of the tree that the row reads under its pin."""
    prompt: Column
    """Prompt tokens, a session's history included."""
    last_token: Column
    """The last known token."""
    last_step: Column
    """The newest step that reads or writes the row."""
    logprobs: Column
    """-1, or how many of the most likely tokens are wanted beside each output token."""
    tenant: Column
    """Index of the request's tenant."""
    drafts: Column
    """Most drafts that the request may have in a step."""
    constrained: Column
    """1 if a grammar says which tokens its output may have."""
    filled: Column
    """Output tokens in `outputs` that the request has not taken over yet."""

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self._columns = np.zeros((len(COLUMNS), rows_max), np.int64)
        for index, name in enumerate(COLUMNS):
            setattr(self, name, self._columns[index])
        self._told, self._ahead = self._pair("known", "filled"), self._pair("planned", "pending")
        self.plannable = np.zeros(rows_max, np.bool_)
        self.changes = 0
        """How often who may be planned, or is slow, has changed."""
        self._plain, self._plain_since = np.zeros(rows_max, np.bool_), -1
        self._flags, self._ones = np.zeros(rows_max, np.bool_), np.zeros(rows_max, np.int64)
        self.outputs: npt.NDArray[np.int32] = np.zeros((rows_max, OUTPUT_COLUMNS), np.int32)
        """The newest output tokens of each row: appending to all rows at once costs one array operation."""
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

    def plan_one(self, chosen: Flags) -> None:
        """Count one more planned and pending token for the rows that bool[rows_max] names."""
        self._ahead += self._as_ones(chosen)

    def settle_one(self, chosen: Flags) -> None:
        """One pending token less for these rows."""
        self.pending -= self._as_ones(chosen)

    def grow(self, chosen: Flags) -> None:
        """Count one more known and gathered token for the rows that bool[rows_max] names; their KV is settled."""
        np.copyto(self.settled, self.known, where=chosen)
        self._told += self._as_ones(chosen)

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

"""What the core asks of a drafter: tokens that may come next, looked up instead of computed, for the model to verify.

The core and every drafter (sessile/draft, the simulator's toy) know each other only through this file. A drafter is a
pure function of what it was told: the same calls give the same drafts, whatever the clock, the threads or the hashes.
Only settled tokens are ever shown to it, so what it has learned needs no undoing.

Two things are kept, each with one owner who drops it by letting go of the record that holds it (H19):

  SequenceIndex   of the tokens of one sequence. It is with the session between turns, whether that has KV or not, and
                  with the request from when drafts are first prepared for it to its end, also while it is preempted.
                  It holds no more than the tokens its owner has: whoever cuts a sequence (rollback, rewind) cuts its
                  index with it.
  DraftLine       of one request: which sources it may use and how well each has done for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sessile.units import TokenId

Ints = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DraftWish:
    """What a request allows.

    tenant: whose it is; it is never shown another's history (H51). corpora: the ids it wants; None: all that its
    tenant may use. drafts_max: most drafts a step; 0 turns speculation off for it.
    """

    tenant: str
    corpora: tuple[str, ...] | None
    drafts_max: int


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What one source did for a request. source: "session", "history", or "corpus:" and its id."""

    source: str
    drafts_offered: int
    drafts_accepted: int


class SequenceIndex(Protocol):
    """Finds earlier places of a sequence that end like it does now. Costs what is told, never the whole length."""

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        ...

    def extend(self, tokens: bytes) -> None:
        """Settled tokens at the end: int32 little-endian."""
        ...

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`, 0 ≤ tokens ≤ self.tokens."""
        ...

    def fork(self, tokens: int) -> "SequenceIndex":
        """An index of the first `tokens`, independent of this one from here on."""
        ...


class DraftLine(Protocol):
    """One request as a drafter sees it."""

    @property
    def index(self) -> SequenceIndex:
        """That of the request's sequence; the core has it extended before it asks for drafts."""
        ...

    def uses(self) -> Sequence[SourceUse]:
        """By source, in a fixed order: what was offered and accepted so far."""
        ...


class Drafter(Protocol):
    """Proposes tokens. Called by the core on its own thread; what it does inside is its affair."""

    def check(self, wish: DraftWish) -> None:
        """Raise NotFound that names the first of the wished corpora that its tenant has none of. Asked at submission,
        before anything has changed."""
        ...

    def new_index(self) -> SequenceIndex:
        """An empty index, for a sequence that has none yet."""
        ...

    def start(self, index: SequenceIndex, wish: DraftWish) -> DraftLine:
        """A request begins whose sequence `index` is of."""
        ...

    def extend(self, lines: Sequence[DraftLine], tokens: Ints, counts: Counts) -> None:
        """Settled tokens at the end of the indexes of these lines: `counts[i]` ≥ 0 of `tokens` for line i, in order."""
        ...

    def limits(self, lines: Sequence[DraftLine], caps: Sequence[int], tokens: int) -> Sequence[int]:
        """Most drafts worth verifying for each line in a step that runs `tokens` tokens without them.

        At most `caps[i]` for line i: it has a use for no more. Asked early, when pages are set aside; the newest token
        may still be unknown. All 0: the step needs no late part, so it need not wait for the one in flight.
        """
        ...

    def draft(self, lines: Sequence[DraftLine], caps: Sequence[int]) -> Sequence[Sequence[TokenId]]:
        """At most `caps[i]` tokens that may follow the index of line i; asked late, every index up to date."""
        ...

    def settled(self, line: DraftLine, accepted: int) -> None:
        """How many of the line's last drafts the model accepted; the rest was wrong or was not judged."""
        ...

    def remember(self, tenant: str, tokens: bytes) -> None:
        """A finished request of a tenant that opted in to history."""
        ...

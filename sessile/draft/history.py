"""What a tenant's finished requests said, for those who opted in: looked up in the tenant's later requests only (H51).

The newest texts are in a tail with chains (session_index.py). A full tail is sealed: a thread of its own sorts it into
an immutable segment, half the size and searched by one search. The sealed tail serves until the *next* one is full, and
only then gives way to its segment: when that happens follows from what was remembered, never from how fast the thread
was (H45). Beyond the budget the oldest segments go.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.session_index import CAPACITY_MIN, SessionIndex
from sessile.draft.suffixes import SEPARATOR

Ints = npt.NDArray[np.int32]

SEGMENTS_MAX = 8
"""Sealed segments of a tenant: each costs every draft of the tenant's a search."""
SEGMENT_TOKEN_BYTES, TAIL_TOKEN_BYTES = 8, 12
TAILS = 2
"""The one that grows and the one that is being sealed."""


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """Bytes of all indexes of one tenant, and of all tenants together; tenant_bytes ≤ total_bytes."""

    tenant_bytes: int = 64 << 20
    total_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        assert self.tail_tokens >= CAPACITY_MIN, f"{self.tenant_bytes} bytes a tenant are too few for any history"
        assert self.tenant_bytes <= self.total_bytes, "one tenant may take more than all"

    @property
    def tail_tokens(self) -> int:
        """Tokens of a full tail, separators included: a power of two, as the tail's capacity is."""
        share = self.tenant_bytes // (SEGMENTS_MAX * SEGMENT_TOKEN_BYTES + TAILS * TAIL_TOKEN_BYTES)
        return 1 << (share.bit_length() - 1) if share else 0


@dataclass(slots=True)
class _Past:
    """What is remembered of one tenant."""

    tail: SessionIndex
    version: int
    """Another with every change of what there is to search; no two pasts ever have the same."""
    sealed: SessionIndex | None = None
    segment: "Future[CorpusIndex] | None" = None
    """What `sealed` will become."""
    segments: list[CorpusIndex] = field(default_factory=list)
    """Oldest first."""

    @property
    def resident_bytes(self) -> int:
        texts = self.tail.resident_bytes + (self.sealed.resident_bytes if self.sealed else 0)
        return texts + sum(segment.resident_bytes for segment in self.segments)


class History:
    """Histories by tenant. For one thread, that of the drafter; its own thread only sorts."""

    def __init__(self, limits: HistoryLimits) -> None:
        self._limits = limits
        self._pasts: OrderedDict[str, _Past] = OrderedDict()
        self._sealer = ThreadPoolExecutor(1, "history")
        self.changes = 0
        """How often what there is to search has changed, of any tenant."""

    @property
    def resident_bytes(self) -> int:
        """Of all tenants."""
        return sum(past.resident_bytes for past in self._pasts.values())

    def remember(self, tenant: str, tokens: Ints) -> None:
        """Add a text. Of one that is longer than a tail, the end."""
        room = self._limits.tail_tokens
        text = np.concatenate((tokens[max(len(tokens) - room + 2, 0) :], np.array([SEPARATOR], np.int32)))
        if tenant not in self._pasts:
            self._pasts[tenant] = _Past(_new_tail(), self._next_version())
        past = self._pasts[tenant]
        self._pasts.move_to_end(tenant)
        if past.tail.tokens + len(text) > room:
            self._seal(past)
        past.tail.append(text)
        while self.resident_bytes > self._limits.total_bytes:
            self._drop_oldest()

    def parts(self, tenant: str) -> list[npt.NDArray[np.int64]]:
        """What compiled code is to search for a tenant, oldest first; good until `version` is another."""
        past = self._pasts.get(tenant)
        if past is None:
            return []
        texts = [past.sealed, past.tail] if past.sealed else [past.tail]
        return [segment.part for segment in past.segments] + [text.part for text in texts]

    def version(self, tenant: str) -> int:
        """Of the parts of a tenant; 0: there are none."""
        past = self._pasts.get(tenant)
        return past.version if past else 0

    def close(self) -> None:
        """End the thread, without what it has not begun."""
        self._sealer.shutdown(cancel_futures=True)

    def _seal(self, past: _Past) -> None:
        """Begin a new tail; the last one is sealed, and the one before gives way to its segment."""
        if past.segment is not None:
            past.segments.append(past.segment.result())
            del past.segments[:-SEGMENTS_MAX]
        past.sealed, past.tail = past.tail, _new_tail()
        past.version = self._next_version()
        past.segment = self._sealer.submit(_segment_of, past.sealed.text)

    def _drop_oldest(self) -> None:
        """Of the tenant that was remembered longest ago the oldest segment, or if it has none, all."""
        tenant, past = next(iter(self._pasts.items()))
        if past.segments:
            del past.segments[0]
            past.version = self._next_version()
        else:
            del self._pasts[tenant]
            self.changes += 1

    def _next_version(self) -> int:
        self.changes += 1
        return self.changes


def _new_tail() -> SessionIndex:
    """An empty text; place 0 is no place, so that a separator may as well stand there."""
    tail = SessionIndex()
    tail.append(np.array([SEPARATOR], np.int32))
    return tail


def _segment_of(text: Ints) -> CorpusIndex:
    """The index of a sealed tail; it begins and ends with a separator."""
    ends = np.flatnonzero(text == SEPARATOR)
    return CorpusIndex.build([text[first + 1 : last] for first, last in pairwise(ends)])

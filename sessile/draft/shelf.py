"""Which corpora there are: one immutable snapshot, replaced as a whole (H44).

A writer builds its index in private and then swaps one reference. A reader takes the reference once a step and reads
what it found there for as long as it likes; an index goes when the last reader lets go. Nobody waits for anybody.
"""

import threading
from dataclasses import dataclass, field

from sessile.draft.corpus_index import CorpusIndex

OPERATOR = ""
"""The tenant whose corpora everybody may use."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A corpus under its name. tenant: whose it is; OPERATOR's may be used by all."""

    tenant: str
    corpus_id: str
    index: CorpusIndex


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What stands on the shelf. version: rises with every change. entries: sorted by (tenant, corpus_id)."""

    version: int
    entries: tuple[Entry, ...]

    def visible_to(self, tenant: str, corpora: tuple[str, ...] | None) -> tuple[Entry, ...]:
        """The operator's and the tenant's own entries in their order (H51); corpora: only those with these ids."""
        return tuple(
            entry
            for entry in self.entries
            if entry.tenant in (OPERATOR, tenant) and (corpora is None or entry.corpus_id in corpora)
        )


@dataclass(slots=True)
class Use:
    """What drafts from one corpus have come to since it was put on the shelf, by whoever drafted from it.

    offered, accepted: tokens. accepted_by_length[n]: steps of a request in which n of its tokens were accepted, of at
    least one that was offered.
    """

    offered: int = 0
    accepted: int = 0
    accepted_by_length: list[int] = field(default_factory=list)

    def note(self, offered: int, accepted: int) -> None:
        """One step of one request."""
        self.offered += offered
        self.accepted += accepted
        self.accepted_by_length += [0] * (accepted + 1 - len(self.accepted_by_length))
        self.accepted_by_length[accepted] += 1


class Shelf:
    """The one mutable reference. `put` and `remove` may be called from any thread; `snapshot` costs nothing.

    uses: by (tenant, id), what drafts from what stands there have come to; counted and read by who drafts.
    """

    def __init__(self) -> None:
        self.uses: dict[tuple[str, str], Use] = {}
        self._snapshot = Snapshot(0, ())
        # Two writers at once must not lose one's entry; readers take no lock.
        self._writing = threading.Lock()

    @property
    def snapshot(self) -> Snapshot:
        """What stands there now, for the reader to keep."""
        return self._snapshot

    def put(self, tenant: str, corpus_id: str, index: CorpusIndex) -> Snapshot:
        """Put a corpus there, in place of one of the same name if there is one; returns the new snapshot."""
        with self._writing:
            others = self._others(tenant, corpus_id)
            self.uses[(tenant, corpus_id)] = Use()
            return self._swap([*others, Entry(tenant, corpus_id, index)])

    def remove(self, tenant: str, corpus_id: str) -> bool:
        """Take a corpus away; whether it was there."""
        with self._writing:
            others = self._others(tenant, corpus_id)
            is_there = len(others) < len(self._snapshot.entries)
            if is_there:
                self._swap(others)
                del self.uses[(tenant, corpus_id)]
            return is_there

    def note(self, tenant: str, corpus_id: str, offered: int, accepted: int) -> None:
        """Count one step of one request that drafted from a corpus; without effect if that is gone meanwhile."""
        if (use := self.uses.get((tenant, corpus_id))) is not None:
            use.note(offered, accepted)

    def _others(self, tenant: str, corpus_id: str) -> list[Entry]:
        return [each for each in self._snapshot.entries if (each.tenant, each.corpus_id) != (tenant, corpus_id)]

    def _swap(self, entries: list[Entry]) -> Snapshot:
        ordered = sorted(entries, key=lambda each: (each.tenant, each.corpus_id))
        self._snapshot = Snapshot(self._snapshot.version + 1, tuple(ordered))
        return self._snapshot

"""The drafter: what the core asks for drafts. It joins the sequence's own index, history, corpora, merge and pace."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sessile.contract.drafting import Counts, DraftLine, DraftWish, Ints, SequenceIndex, SourceUse
from sessile.draft.history import History
from sessile.draft.lookup import LINE_PRIORS_AT, NODE_MATCH, NODE_SOURCE, NODE_TOKEN, PRIOR_ONE, append_to_texts
from sessile.draft.merge import DraftRules, Merger, Words, chain_of
from sessile.draft.pace import Acceptance, LateScale, StepTimes, affordable
from sessile.draft.session_index import SessionIndex
from sessile.draft.shelf import Shelf, Snapshot
from sessile.errors import NotFound
from sessile.units import TokenId

SESSION, HISTORY, CORPUS = "session", "history", "corpus:"
"""Names of sources, as statistics have them; a corpus' is followed by its id."""

LEARNED_EXPECTED, LEARNED_WEIGHT = 2, 4
"""Drafts accepted, of so many, that a source begins with."""
LEARNED_MAX = 64
"""Judged drafts of a source that its prior is learned from; then the older half fades."""

WISHES_MAX = 1024
"""Different wishes whose parts are kept; clients choose them, so there must be an end."""

SourceKey = tuple[int, str, str]
"""Identity and rank of a source: (0, "", "") the sequence, (1, "", "") history, (2, tenant, id) a corpus."""
CORPUS_RANK = 2
SEQUENCE_KEY: SourceKey = (0, "", "")
HISTORY_KEY: SourceKey = (1, "", "")
_NO_WORDS: Words = np.empty(0, np.int64)


@dataclass(slots=True)
class _Record:
    """What one source did for one line. judged, accepted fade, offered and taken do not."""

    judged: int = 0
    accepted: int = 0
    offered: int = 0
    taken: int = 0

    def judge(self, is_accepted: bool) -> None:
        if self.judged >= LEARNED_MAX:
            self.judged, self.accepted = self.judged // 2, self.accepted // 2
        self.judged += 1
        self.accepted += is_accepted

    def prior(self, base: int) -> int:
        """The source's weight: twice its base if all it said was accepted, almost nothing if nothing was."""
        return max(2 * base * (self.accepted + LEARNED_EXPECTED) // (self.judged + LEARNED_WEIGHT), 1)


@dataclass(frozen=True, slots=True)
class _Shown:
    """The parts that lines of one wish may look into. Addresses only: the snapshot, not this, keeps indexes alive.

    version: of the snapshot and of the tenant's history it was made of. parts: (address, number of the source).
    """

    version: tuple[int, int]
    parts: tuple[tuple[int, int], ...]
    sources: tuple[SourceKey, ...]
    numbers: dict[SourceKey, int]
    """Of the sources, by key."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What compiled code is told of lines that are asked together: most often they are those of the step before.

    By numbers and addresses alone: it keeps no line, index or corpus alive. serials: of the lines. as_of: changes of
    the shelf and of all history. records, texts, learned: addresses of the lines' records, of their indexes' parts and
    of what was learned of their drafts. parts: how many there are to search. allowed: most drafts of each line.
    """

    serials: list[int]
    as_of: tuple[int, int]
    records: Words
    texts: Words
    learned: Words
    parts: int
    allowed: npt.NDArray[np.int32]


class LookupLine:
    """One request. Made by `LookupDrafter.start`, which alone changes it. serial: no other line has it."""

    def __init__(self, index: SessionIndex, wish: DraftWish, rules: DraftRules, serial: int) -> None:
        self.wish = wish
        self.serial = serial
        self._rules = rules
        self.acceptance = Acceptance()
        self._index = index
        self._records: dict[SourceKey, _Record] = {}
        self._shown: _Shown | None = None
        self.shown_as_of = (-1, -1)
        """Changes of the shelf and of all history when it was last shown its parts."""
        self.parts = 0
        """How many it may look into, its own index included."""
        self._record = self._priors = _NO_WORDS
        """The line as compiled code sees it, and the end of it."""
        self.address = 0
        """Of the record; asking numpy for it takes a microsecond."""
        self._last: list[tuple[SourceKey, int]] = []
        """Source and match of each of the last drafts."""

    @property
    def index(self) -> SessionIndex:
        """That of the request's sequence."""
        return self._index

    @property
    def has_drafts(self) -> bool:
        """Whether some are in flight."""
        return bool(self._last)

    def uses(self) -> Sequence[SourceUse]:
        """By source, in the order of sources; corpora of one name count together."""
        totals: dict[str, tuple[int, int]] = {}
        for key in sorted(self._records):
            name, record = _name_of(key), self._records[key]
            offered, taken = totals.get(name, (0, 0))
            totals[name] = (offered + record.offered, taken + record.taken)
        return [SourceUse(name, offered, taken) for name, (offered, taken) in totals.items() if offered]

    def show(self, shown: _Shown, as_of: tuple[int, int]) -> None:
        """Make the line's record for compiled code, of these parts and its priors, if they are others."""
        self.shown_as_of = as_of
        if shown is self._shown:
            return
        own = self._index.address
        self._shown = shown
        self.parts = 1 + len(shown.parts)
        fields = [own, 0, self.parts, *[number for part in ((own, 0), *shown.parts) for number in part]]
        self._record = np.array([*fields, *[self._prior(key) for key in shown.sources]], np.int64)
        self._priors = self._record[len(fields) :]
        self.address = int(self._record.ctypes.data)
        self._record[LINE_PRIORS_AT] = self.address + self._record.itemsize * len(fields)

    def offer(self, nodes: Sequence[Sequence[int]]) -> list[TokenId]:
        """Take down what is offered from a tree's nodes; returns the tokens."""
        assert self._shown is not None
        self._last = [(self._shown.sources[node[NODE_SOURCE]], node[NODE_MATCH]) for node in nodes]
        for key, _ in self._last:
            self._records.setdefault(key, _Record()).offered += 1
        return [TokenId(node[NODE_TOKEN]) for node in nodes]

    def corpora_judged(self, accepted: int) -> list[tuple[str, str, int, int]]:
        """(tenant, id, offered, accepted) of each corpus that the last drafts came from, if `accepted` were right."""
        counts: dict[SourceKey, list[int]] = {}
        for number, (key, _) in enumerate(self._last):
            if key[0] == CORPUS_RANK:
                count = counts.setdefault(key, [0, 0])
                count[0] += 1
                count[1] += number < accepted
        return [(tenant, corpus_id, offered, taken) for (_, tenant, corpus_id), (offered, taken) in counts.items()]

    def judge(self, accepted: int) -> None:
        """The first `accepted` of the last drafts were right, the next one, if there is one, was wrong."""
        last, self._last = self._last, []
        assert 0 <= accepted <= len(last), f"{accepted} drafts accepted of {len(last)}"
        for number, (key, match) in enumerate(last[: accepted + 1]):
            is_accepted = number < accepted
            record = self._records[key]
            record.judge(is_accepted)
            record.taken += is_accepted
            self.acceptance.judge(match + number, is_accepted)
        for key in {key for key, _ in last[: accepted + 1]}:
            assert self._shown is not None, "what was offered was shown"
            source = self._shown.numbers.get(key)
            if source is not None:  # A corpus may have gone meanwhile.
                self._priors[source] = self._prior(key)

    def _prior(self, key: SourceKey) -> int:
        """A source's weight, as it follows from what was learned of it."""
        base = (self._rules.session_prior, self._rules.history_prior, 1)[key[0]] * PRIOR_ONE
        record = self._records.get(key)
        return record.prior(base) if record else base


class LookupDrafter:
    """Implements the contract's Drafter. One thread calls it; corpora come and go on `shelf` meanwhile (H44).

    step_times: of the device, measured at start. history: None: nothing is remembered. threads: that look things up,
    the caller's included; the drafts are the same for any number.
    """

    def __init__(
        self,
        shelf: Shelf,
        step_times: StepTimes,
        *,
        rules: DraftRules | None = None,
        history: History | None = None,
        threads: int = 1,
    ) -> None:
        self._shelf = shelf
        self._late = LateScale(step_times)
        self._history = history
        self._rules = rules or DraftRules()
        self._merger = Merger(self._rules, threads)
        self._shown: dict[tuple[str, tuple[str, ...] | None], _Shown] = {}
        self._serials = itertools.count()
        self._asked = _Asked([], (-1, -1), _NO_WORDS, _NO_WORDS, _NO_WORDS, 0, np.empty(0, np.int32))

    def check(self, wish: DraftWish) -> None:
        """Raise NotFound that names the first of the wished corpora that its tenant has none of."""
        if not wish.corpora:
            return
        there = {entry.corpus_id for entry in self._shelf.snapshot.visible_to(wish.tenant, wish.corpora)}
        for corpus_id in wish.corpora:
            if corpus_id not in there:
                raise NotFound(f"corpora: {corpus_id!r} does not exist, or is not loaded yet", param="corpora")

    def new_index(self) -> SessionIndex:
        """An empty index, for a sequence that has none yet."""
        return SessionIndex()

    def start(self, index: SequenceIndex, wish: DraftWish) -> LookupLine:
        """A request begins whose sequence `index` is of."""
        assert isinstance(index, SessionIndex), "an index of another drafter"
        return LookupLine(index, wish, self._rules, next(self._serials))

    def extend(self, lines: Sequence[DraftLine], tokens: Ints, counts: Counts) -> None:
        """Settled tokens at the end of the indexes of these lines: `counts[i]` ≥ 0 of `tokens` for line i, in order.

        tokens, counts: writable, as compiled code is compiled for that alone.
        """
        ours = [_ours(line) for line in lines]
        texts = self._asked_of(ours, self._shelf.snapshot).texts
        while (lacking := append_to_texts(texts, tokens, counts)) >= 0:
            ours[lacking].index.provide_for(int(counts[lacking]))

    def limits(self, lines: Sequence[DraftLine], caps: Sequence[int], tokens: int) -> Sequence[int]:
        """Most drafts worth verifying for each line, ≤ `caps[i]`, in a step that runs `tokens` tokens without them.

        Judged by what matches now, which may be a token behind what will match when the drafts are due.
        """
        ours = [_ours(line) for line in lines]
        matches, asked = self._matches(ours), self._asked
        begins = not any([line.has_drafts for line in ours])
        allowed = np.minimum(np.array(caps, np.int32), asked.allowed)
        limits = affordable(asked.learned, matches, allowed, tokens, self._late, begins=begins)
        told: list[int] = limits.tolist()
        return told

    def matches(self, lines: Sequence[DraftLine]) -> Sequence[int]:
        """The longest match of each line, in tokens, in all that it may look into: a search, and no more."""
        matches: list[int] = self._matches([_ours(line) for line in lines]).tolist()
        return matches

    def draft(self, lines: Sequence[DraftLine], caps: Sequence[int]) -> Sequence[Sequence[TokenId]]:
        """At most `caps[i]` tokens that may follow the index of line i; asked late, every index up to date."""
        ours = [_ours(line) for line in lines]
        snapshot = self._shelf.snapshot  # It lives until the drafts are made.
        asked = self._asked_of(ours, snapshot)
        budgets = np.minimum(np.array(caps, np.int32), asked.allowed)
        trees = self._merger.draft(asked.records, budgets, asked.parts)
        drafts: list[list[TokenId]] = []
        for line, nodes, count in zip(ours, trees.nodes.tolist(), trees.counts.tolist(), strict=True):
            taken = nodes[:count]
            drafts.append(line.offer([taken[i] for i in chain_of(taken)]))
        return drafts

    def observe_late(self, lines: int, late_ns: int) -> None:
        """A step of so many lines that waited for the one before it was launched so long after that was done."""
        self._late.observe(lines, late_ns)

    def settled(self, line: DraftLine, accepted: int) -> None:
        """How many of the line's last drafts the model accepted; the next one was wrong, the rest was not judged."""
        ours = _ours(line)
        for tenant, corpus_id, offered, taken in ours.corpora_judged(accepted):
            self._shelf.note(tenant, corpus_id, offered, taken)
        ours.judge(accepted)

    def remember(self, tenant: str, tokens: bytes) -> None:
        """A finished request of a tenant that opted in to history."""
        if self._history:
            self._history.remember(tenant, np.frombuffer(tokens, "<i4"))

    def prepare(self) -> None:
        """Compile what is compiled, or load it from the cache, so that no step waits for it."""
        index = self.new_index()
        index.extend(np.arange(8, dtype=np.int32).tobytes())
        index.truncate(4)
        line = self.start(index, DraftWish("", (), 1))
        self.extend([line], np.ones(1, np.int32), np.ones(1, np.int64))
        self.limits([line], [1], 1)
        self.draft([line], [1])

    def close(self) -> None:
        """End all threads."""
        self._merger.close()
        if self._history:
            self._history.close()

    def _matches(self, lines: list[LookupLine]) -> npt.NDArray[np.int32]:
        snapshot = self._shelf.snapshot  # It lives until all is searched.
        asked = self._asked_of(lines, snapshot)
        return self._merger.matches(asked.records, asked.parts)

    def _asked_of(self, lines: list[LookupLine], snapshot: Snapshot) -> _Asked:
        """What compiled code is told of these lines, each shown what is there for it in the snapshot."""
        asked, serials = self._asked, [line.serial for line in lines]
        as_of = (snapshot.version, self._history.changes if self._history else 0)
        if asked.serials != serials or asked.as_of != as_of:
            for line in lines:
                if line.shown_as_of != as_of:
                    line.show(self._shown_to(line.wish, snapshot), as_of)
            self._asked = asked = _Asked(
                serials, as_of,
                np.array([line.address for line in lines], np.int64),
                np.array([line.index.address for line in lines], np.int64),
                np.array([line.acceptance.address for line in lines], np.int64),
                sum([line.parts for line in lines]),
                np.array([line.wish.drafts_max for line in lines], np.int32),
            )  # fmt: skip
        return asked

    def _shown_to(self, wish: DraftWish, snapshot: Snapshot) -> _Shown:
        """The parts that a wish may look into, made anew only when the shelf or the history has changed."""
        version = (snapshot.version, self._history.version(wish.tenant) if self._history else 0)
        wanted = (wish.tenant, wish.corpora)
        shown = self._shown.get(wanted)
        if shown is None or shown.version != version:
            past = self._history.parts(wish.tenant) if self._history else []
            entries = snapshot.visible_to(wish.tenant, wish.corpora)
            parts = [(int(part.ctypes.data), 1) for part in past]
            parts += [(int(entry.index.part.ctypes.data), 2 + i) for i, entry in enumerate(entries)]
            keys = [(2, entry.tenant, entry.corpus_id) for entry in entries]
            sources = (SEQUENCE_KEY, HISTORY_KEY, *keys)
            shown = _Shown(version, tuple(parts), sources, {key: number for number, key in enumerate(sources)})
            if len(self._shown) >= WISHES_MAX:
                self._shown.clear()
            self._shown[wanted] = shown
        return shown


def _ours(line: DraftLine) -> LookupLine:
    assert isinstance(line, LookupLine), "a line of another drafter"
    return line


def _name_of(key: SourceKey) -> str:
    return CORPUS + key[2] if key[0] == 2 else HISTORY if key == HISTORY_KEY else SESSION

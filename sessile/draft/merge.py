"""How occurrences from all sources become one draft: the rules, and calling the compiled merge over lines and threads.

Weight of an occurrence = prior of its source × 2 ^ min(match, match_cap). All occurrences form one tree; a node's share
is the weight of those that say its path, of all, × decay a level. Likeliest nodes are taken first, until the share, the
budget or factor × match stops it. Ties: more weight, longer match, lower source, later place, lower token. Weights are
whole numbers: no sum depends on an order, no draft on hashes, insertion or threads (H45). The budget caps nodes,
never sources (H46).

`branches` is 1 today, and the tree a chain; a verifier of trees raises it and reads the parents.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sessile.draft.lookup import NODE_COLUMNS, draft_lines, match_lines

Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.int64]

SEARCHES_OF_A_THREAD = 128
"""Fewest parts to search that are worth a thread: some 0.5 ms. A thread that is woken may wait for a busy core."""


@dataclass(frozen=True, slots=True)
class DraftRules:
    """What a draft is made of. The defaults are the best of `sessile bench drafts`."""

    occurrences: int = 32
    """Most of one part: of the longest matches, in a text of the newest."""
    match_min: int = 1
    """Shortest match that counts, in tokens; texts find none below GRAM_TOKENS."""
    match_cap: int = 16
    """Match beyond which weight does not grow; ≤ 24, so that sums of weights fit."""
    window: int = 1
    """Occurrences that match more than so many tokens less than the longest, up to the cap, are left out. Small: many
    corpora that match a little must not outvote the one that matches best."""
    session_prior: int = 16
    """Weight of an occurrence in the sequence itself, before anything was learned, against one in a corpus: what was
    said here is likelier to be said again."""
    history_prior: int = 4
    """The same of an occurrence in the tenant's history."""
    branches: int = 1
    """Most children of a node."""
    decay: float = 0.97
    """Of the share, a level."""
    share_min: float = 0.05
    """Least share of a node."""
    factor: float = 4.0
    """Most depth of a node, in matches of its best occurrence."""

    def __post_init__(self) -> None:
        assert 1 <= self.occurrences <= 1024 and 1 <= self.branches and 1 <= self.match_min
        assert 1 <= self.session_prior <= 64 and 1 <= self.history_prior <= 64
        assert 1 <= self.match_cap <= 24 and 0 < self.decay <= 1 and 0 <= self.share_min <= 1 and self.factor > 0


@dataclass(frozen=True, slots=True)
class Trees:
    """What a batch of lines was told.

    nodes int32[lines, budget, NODE_COLUMNS]: see lookup.py; counts int32[lines]: nodes of each.
    """

    nodes: Ints
    counts: Ints


class Merger:
    """Drafts for many lines at once, on this thread and on some of its own where there is enough to do."""

    def __init__(self, rules: DraftRules, threads: int) -> None:
        self._occurrences = rules.occurrences
        self._whole = np.array(
            (rules.occurrences, rules.match_min, rules.match_cap, rules.window, rules.branches), np.int64
        )
        self._real = np.array((rules.decay, rules.share_min, rules.factor))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "draft") if threads > 1 else None

    def matches(self, lines: Words, parts: int) -> Ints:
        """int32[lines]: the longest match of each, in tokens. lines, parts: as of `draft`."""
        matches = np.empty(len(lines), np.int32)

        def match_range(first: int, last: int) -> None:
            match_lines(lines, first, last, self._occurrences, matches)

        self._share(match_range, len(lines), parts)
        return matches

    def draft(self, lines: Words, budgets: Ints, parts: int) -> Trees:
        """lines: addresses of line records; budgets: most nodes of each.

        parts: how many there are to search, of all lines.
        """
        count = len(lines)
        nodes = np.empty((count, max(int(budgets.max(initial=0)), 1), NODE_COLUMNS), np.int32)
        trees = Trees(nodes, np.zeros(count, np.int32))

        def draft_range(first: int, last: int) -> None:
            draft_lines(lines, budgets, first, last, self._whole, self._real, trees.nodes, trees.counts)

        self._share(draft_range, count, parts)
        return trees

    def _share(self, work: Callable[[int, int], None], count: int, parts: int) -> None:
        """Have work(first, last) done for all of `count` lines, on as many threads as so many parts are worth."""
        pieces = min(self._threads, max(parts // SEARCHES_OF_A_THREAD, 1), max(count, 1))
        if pieces == 1:
            work(0, count)
            return
        edges = [count * piece // pieces for piece in range(pieces + 1)]
        waiting = [self._pool.submit(work, *edge) for edge in pairwise(edges[1:]) if self._pool]
        work(edges[0], edges[1])
        for piece in waiting:
            piece.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()


def chain_of(nodes: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the nodes of a tree [n, NODE_COLUMNS] that one goes through by taking the likeliest child each time.

    Nodes are in the order in which they were taken, so the likeliest child is the first.
    """
    chain: list[int] = []
    for number, (_, parent, *_) in enumerate(nodes):
        if parent == (chain[-1] if chain else -1):
            chain.append(number)
    return chain

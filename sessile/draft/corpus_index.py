"""The index of a body of text: every position sorted by what stands before it, so that one search finds the longest
match of any context and, beside it, the next longest ones. 4 bytes a token and 4 a position; nothing else.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sessile.draft.corpus_file import read_corpus, write_corpus
from sessile.draft.lookup import KIND, PART_FIELDS, PLACES, PLACES_AT, SORTED, TOKENS, TOKENS_AT
from sessile.draft.suffixes import SEPARATOR, TOKEN_ID_MAX, count_positions, scatter_positions, sort_groups
from sessile.errors import BuildCancelled, InvalidRequest, TooLong

Ints = npt.NDArray[np.int32]

CORPUS_TOKENS_MAX = 2**31 - 2
"""Separators included: a position is an int32."""
TASKS = 64
"""About how many pieces the sorting is cut into, for progress and for threads to share."""
POLL_S = 0.05
"""How often a build asks whether it is still wanted."""


class CorpusIndex:
    """An immutable index of documents. Shared freely: between readers, threads, and by mapping, processes.

    tokens: of all documents. documents: how many. resident_bytes: what it takes in memory, or of a file that is mapped.
    flat: int32, the documents with SEPARATOR before, between and behind them. positions: int32, indices into flat,
    sorted as sessile/draft/suffixes.py says. part: what compiled code sees of it (sessile/draft/lookup.py).
    """

    def __init__(self, flat: Ints, positions: Ints, documents: int, label: bytes = b"") -> None:
        """Takes both arrays over and makes them read-only; they are what `build` or `load` made. label: see `save`."""
        flat.flags.writeable = False
        positions.flags.writeable = False
        self.flat = flat
        self.positions = positions
        self.documents = documents
        self.label = label
        self.tokens = max(len(flat) - documents - 1, 0)
        self.resident_bytes = flat.nbytes + positions.nbytes
        self.part = np.zeros(PART_FIELDS, np.int64)
        self.part[[KIND, TOKENS_AT, TOKENS, PLACES_AT, PLACES]] = (
            SORTED, flat.ctypes.data, len(flat), positions.ctypes.data, len(positions),
        )  # fmt: skip
        self.part.flags.writeable = False

    @classmethod
    def build(
        cls,
        documents: Sequence[Ints],
        *,
        threads: int = 1,
        is_cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[float], None] = lambda share: None,
    ) -> "CorpusIndex":
        """Index documents of token ids. Deterministic, whatever the threads.

        is_cancelled is asked on the calling thread every POLL_S, progress told a share from 0 to 1 that never falls.
        Raises BuildCancelled, InvalidRequest for ids that are no token's, TooLong beyond CORPUS_TOKENS_MAX.
        """
        flat = joined(documents)
        positions = _sorted_positions(flat, threads, is_cancelled, progress)
        progress(1.0)
        return cls(flat, positions, len(documents))

    @classmethod
    def build_flat(
        cls,
        tokens: Ints,
        starts: Sequence[int],
        *,
        threads: int = 1,
        is_cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[float], None] = lambda share: None,
    ) -> "CorpusIndex":
        """`build` from documents that lie behind each other; starts: where each begins, ascending, the first at 0."""
        ends = [*starts[1:], len(tokens)]
        documents = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
        return cls.build(documents, threads=threads, is_cancelled=is_cancelled, progress=progress)

    def save(self, path: str | Path, *, label: bytes = b"") -> None:
        """Write the index to a file, whole or not at all. Raises OSError.

        label: at most LABEL_BYTES that `load` gives back, filled up with zero bytes.
        """
        write_corpus(Path(path), self.flat, self.positions, self.documents, label)

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> "CorpusIndex":
        """Map the index in a file. verify: compare the checksum, which reads all of it.

        Raises CorpusFileError if it is foreign, truncated, damaged or of another version; OSError if it is not there.
        A file that is mapped must not be written to; `save` never does.
        """
        flat, positions, documents, label = read_corpus(Path(path), verify=verify)
        return cls(flat, positions, documents, label)


def joined(documents: Sequence[Ints]) -> Ints:
    """The documents with SEPARATOR before, between and behind them. Raises InvalidRequest or TooLong."""
    total = sum(len(document) for document in documents) + len(documents) + 1
    if total > CORPUS_TOKENS_MAX:
        raise TooLong(f"a corpus has at most {CORPUS_TOKENS_MAX:,} tokens; these are {total:,}")
    flat = np.full(total, SEPARATOR, np.int32)
    end = 1
    for number, document in enumerate(documents):
        if len(document) and not 0 <= int(document.min()) <= int(document.max()) <= TOKEN_ID_MAX:
            raise InvalidRequest(f"document {number} has a token id that is not within 0 … {TOKEN_ID_MAX}")
        flat[end : end + len(document)] = document
        end += len(document) + 1
    return flat


def _sorted_positions(
    flat: Ints, threads: int, is_cancelled: Callable[[], bool], progress: Callable[[float], None]
) -> Ints:
    """All positions of flat, in the index's order."""
    counts = np.zeros(int(flat.max(initial=0)) + 1, np.int64)
    total = int(count_positions(flat, counts))
    bounds = np.concatenate(([0], np.cumsum(counts)))
    positions = np.empty(total, np.int32)
    scatter_positions(flat, bounds[:-1].copy(), positions)
    keys = np.empty(total, np.uint64)
    stop = np.zeros(1, np.uint8)
    done = 0
    with ThreadPoolExecutor(threads, "corpus") as pool:
        # The groups' numbers at which a task ends: those that cross a multiple of the share of a task.
        ends = np.flatnonzero(np.diff(bounds // max(total // TASKS, 1))) + 1
        tasks = np.split(bounds, ends)
        edges = [np.append(task, after[0]) for task, after in pairwise(tasks)] + [tasks[-1]]
        edges.sort(key=lambda edge: int(edge[0] - edge[-1]))  # the longest first: none is left over at the end
        waiting = {pool.submit(sort_groups, flat, positions, keys, edge, stop): edge[-1] - edge[0] for edge in edges}
        while waiting:
            if is_cancelled():
                stop[0] = 1  # seen by the running ones at their next group; leaving the pool waits for them
                pool.shutdown(cancel_futures=True)
                raise BuildCancelled("the corpus was removed while its index was built")
            finished, _ = wait(waiting, POLL_S, FIRST_COMPLETED)
            for task in finished:
                task.result()
                done += waiting.pop(task)
            progress(done / total if total else 1.0)
    return positions

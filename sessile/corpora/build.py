"""One build: sources to documents of token ids, then to an index file. Says how it goes, and stops when told to."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sessile.contract.corpora import Source
from sessile.corpora.texts import encode_pieces, read_pieces
from sessile.draft.corpus_index import CorpusIndex
from sessile.errors import BuildCancelled, CorpusFileError, InvalidRequest, LimitReached
from sessile.text.documents import BadSource
from sessile.text.tokenizer import Tokenizer

Ints = npt.NDArray[np.int32]
Report = Callable[[str, float], None]
"""Told the stage, "reading" or "indexing", and the share of it that is done."""

REPORT_EVERY_S = 0.1


class OverBudget(LimitReached):
    """There are more tokens than there is room for."""

    code = "over_budget"


class NoText(InvalidRequest):
    """Nothing is left to index."""


@dataclass
class Gathered:
    """The token ids of a corpus: of each document that has any, its pieces."""

    documents: list[list[Ints]] = field(default_factory=list)
    tokens: int = 0

    def add(self, ids: Ints, *, begins: bool) -> None:
        """More of the last document, or the begin of another one."""
        if begins:
            self.documents.append([])
        self.documents[-1].append(ids)
        self.tokens += len(ids)

    def take(self) -> list[Ints]:
        """Each document in one piece; this object lets go of them."""
        documents, self.documents = self.documents, []
        return [np.concatenate(pieces) for pieces in documents]

    @property
    def index_bytes(self) -> int:
        """What the index will take: 4 bytes a token and as many for its position, and a separator."""
        return 4 * (2 * self.tokens + 1)


class Throttle:
    """Passes a report on every so often, and every last one of a stage."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._next_s = 0.0

    def __call__(self, stage: str, share: float) -> None:
        """Pass this one on if it is time to."""
        now_s = time.monotonic()
        if share >= 1.0 or now_s >= self._next_s:
            self._next_s = now_s + REPORT_EVERY_S
            self._report(stage, float(min(share, 1.0)))


def gather(
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    *,
    tokens_max: int,
    is_cancelled: Callable[[], bool],
    report: Report,
) -> Gathered:
    """Read and encode all sources. Raises BadSource, NoText, OverBudget, BuildCancelled."""
    bytes_total = max(1, sum(_size(source) for source in sources))
    read_bytes = 0

    def note_bytes(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count

    pieces = itertools.chain.from_iterable(read_pieces(source, note_bytes) for source in sources)
    gathered, last = Gathered(), -1
    for number, ids in encode_pieces(tokenizer, pieces):
        gathered.add(ids, begins=number != last)
        last = number
        if is_cancelled():
            raise BuildCancelled("the corpus was removed while its text was read")
        if gathered.tokens > tokens_max:
            raise OverBudget(f"the corpus has more than {tokens_max} tokens, and there is room for {tokens_max}")
        report("reading", read_bytes / bytes_total)
    if not gathered.tokens:
        raise NoText("the documents are empty: there is no token in them")
    return gathered


def make_index(
    gathered: Gathered,
    target: Path,
    label: bytes,
    *,
    threads: int,
    is_cancelled: Callable[[], bool],
    report: Report,
) -> None:
    """Index what was gathered and write it to target, whole or not at all. Raises BuildCancelled and OSError."""
    index = CorpusIndex.build(
        gathered.take(),
        threads=threads,
        is_cancelled=is_cancelled,
        progress=lambda share: report("indexing", share),
    )
    index.save(target, label=label)
    sync_folder(target.parent)


def open_index(source: Source, label: bytes) -> CorpusIndex:
    """An index that was built before, verified. Raises BadSource if it is broken or made with another tokenizer."""
    name = Path(source.path).name
    try:
        index = CorpusIndex.load(source.path, verify=True)
    except CorpusFileError as error:
        raise BadSource(str(error)) from error
    except OSError as error:
        raise BadSource(f"{name} cannot be read: {error.strerror}") from error
    if index.label != label:
        raise BadSource(f"{name} was built with another tokenizer than this model's; build it again with this --model")
    return index


def copy_index(source: Source, target: Path) -> None:
    """Copy an index file: what the operator does to the original afterwards is no concern of ours. Raises OSError."""
    part = target.with_name(f".{target.name}.part")
    try:
        with open(source.path, "rb") as original, part.open("wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(source: Source) -> int:
    try:
        return os.stat(source.path).st_size
    except OSError as error:
        raise BadSource(f"{Path(source.path).name} cannot be read: {error.strerror}") from error

"""Corpora on their way to the shelf and from it: read beside the step loop, swapped between two of its steps (H44)."""

import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from sessile.contract.corpora import AddCorpus, CorpusOperation, CorpusUse, CorpusUses, RemoveCorpus
from sessile.contract.messages import Outcome, Refusal, Reply
from sessile.draft.corpus_file import stored_checksum
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.shelf import Shelf
from sessile.errors import CorpusFileError

log = logging.getLogger("sessile.engine")

Place = tuple[str, str]
"""Tenant and id."""
BAD_INDEX = "bad_index"


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What became of one AddCorpus: an index, or why there is none."""

    message: AddCorpus
    index: CorpusIndex | None
    refusal: Refusal | None = None


class CorpusDesk:
    """Takes messages about corpora on the loop's thread and answers there; a thread of its own maps and verifies files.

    Loads are done one after the other, so that of two of one name the later one stays. Does not own the shelf, but is
    its only writer. vocab_size: of the model; what an index holds is offered to it as drafts.
    """

    def __init__(self, shelf: Shelf, vocab_size: int) -> None:
        self._shelf = shelf
        self._vocab_size = vocab_size
        self._waiting: dict[Place, int] = {}
        """The newest load of each name that has not been put on the shelf → its op."""
        self._loads: queue.SimpleQueue[AddCorpus] = queue.SimpleQueue()
        self._loaded: deque[_Loaded] = deque()
        self._unsettled = 0
        self._replies: list[Reply] = []
        self._reader: threading.Thread | None = None

    @property
    def is_loading(self) -> bool:
        """Whether a load will end before long; the loop should not wait for long then."""
        return self._unsettled > 0

    def receive(self, message: CorpusOperation) -> None:
        """Begin what the message asks for; the reply comes with `take_replies`, of this turn or a later one."""
        if isinstance(message, AddCorpus):
            self._begin(message)
        elif isinstance(message, RemoveCorpus):
            self._replies.append(Reply(message.op, Outcome({"removed": self._remove(message)})))
        else:
            self._replies.append(Reply(message.op, CorpusUses(self._uses())))

    def take_replies(self) -> list[Reply]:
        """Put on the shelf what has been read since the last call, and return all answers. Between two steps only."""
        while self._loaded:
            self._settle(self._loaded.popleft())
        replies, self._replies = self._replies, []
        return replies

    def _begin(self, message: AddCorpus) -> None:
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, name="corpus-reader", daemon=True)
            self._reader.start()
        self._waiting[(message.tenant, message.corpus)] = message.op
        self._unsettled += 1
        self._loads.put(message)

    def _read(self) -> None:
        while True:
            self._loaded.append(load(self._loads.get(), self._vocab_size))

    def _settle(self, loaded: _Loaded) -> None:
        message, place = loaded.message, (loaded.message.tenant, loaded.message.corpus)
        self._unsettled -= 1
        is_wanted = self._waiting.get(place) == message.op
        if is_wanted:
            del self._waiting[place]
        if loaded.index is None:
            self._replies.append(Reply(message.op, error=loaded.refusal))
        elif not is_wanted:
            gone = Refusal(409, "cancelled", f"corpus {message.corpus!r} was removed or replaced while it was loaded")
            self._replies.append(Reply(message.op, error=gone))
        else:
            index = loaded.index
            self._shelf.put(message.tenant, message.corpus, index)
            counts = {"tokens": index.tokens, "documents": index.documents, "bytes": index.resident_bytes}
            self._replies.append(Reply(message.op, Outcome(dict(counts))))

    def _remove(self, message: RemoveCorpus) -> bool:
        was_waiting = self._waiting.pop((message.tenant, message.corpus), None) is not None
        return self._shelf.remove(message.tenant, message.corpus) or was_waiting

    def _uses(self) -> list[CorpusUse]:
        return [
            CorpusUse(
                corpus=corpus,
                tenant=tenant,
                drafts_offered=use.offered,
                drafts_accepted=use.accepted,
                accepted_by_length=tuple(use.accepted_by_length),
            )
            for (tenant, corpus), use in sorted(self._shelf.uses.items())
        ]


def load(message: AddCorpus, vocab_size: int) -> _Loaded:
    """Map and verify the file that a message names. Whatever is wrong with it is the answer, and ends nothing."""
    path = Path(message.path)
    try:
        index = CorpusIndex.load(path, verify=True)
        if stored_checksum(path).hex() != message.checksum:
            raise CorpusFileError(f"{path.name} is another file than the one that was indexed: its checksum differs")
        if (largest := int(index.flat.max())) >= vocab_size:
            raise CorpusFileError(f"{path.name} has token {largest}, and the model's vocabulary {vocab_size} tokens")
        return _Loaded(message, index)
    except CorpusFileError as error:
        return _Loaded(message, None, Refusal(422, BAD_INDEX, str(error)))
    except Exception as error:  # whatever it is, it concerns one file: the reader and the loop go on
        log.exception("a corpus could not be mapped")
        return _Loaded(message, None, Refusal(500, "unreadable_index", f"the index cannot be mapped: {error}"))

"""What corpora there are: each by tenant and id, from the first byte of its text until its last file is gone.

A corpus is loaded by one task, from begin to end: text is counted, room for it claimed, the index built and written,
entered in the catalogue, and swapped in by the engine between two steps. Until that swap what was there before is
untouched (H44); whatever ends the task earlier gives everything back that it had claimed.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sessile.contract.corpora import AddCorpus, CorpusUse, GetCorpora, RemoveCorpus, Source
from sessile.errors import InvalidRequest, LimitReached, NotFound, NotReady, UserError
from sessile.server.corpora.budget import Budget, Claim, Size
from sessile.server.corpora.builder import BuilderLink, BuildError, BuildRun, Cancelled
from sessile.server.corpora.folder import Entry, StateFolder
from sessile.server.link import EngineLink

log = logging.getLogger("sessile.corpora")

COUNT_WAIT_S = 30.0
"""How long an add waits for its text to be read and counted, so that what is wrong with it is its answer. What takes
longer is answered as loading."""
CLOSE_WAIT_S = 3.0
"""How long a swap that has begun may take when the server ends."""

Place = tuple[str, str]
"""Tenant and id."""


class DuplicateCorpus(UserError):
    """A corpus of this id is there, and was not to be replaced."""

    status = 409
    code = "duplicate_corpus"


class CorpusBusy(UserError):
    """The corpus is being loaded or removed."""

    status = 409
    code = "corpus_busy"


class NoDrafts(InvalidRequest):
    """The engine does not draft."""

    code = "no_drafts"


@dataclass(eq=False)
class Load:
    """A corpus on its way in. claim and files are its own until the swap."""

    corpus: "Corpus"
    claim: Claim
    received_bytes: int = 0
    """Of an upload, so far."""
    uploads: list[Path] = field(default_factory=list)
    run: BuildRun | None = None
    is_swapping: bool = False
    is_cancelled: bool = False
    accepted: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when its text was counted and room for it claimed."""
    task: "asyncio.Task[None] | None" = None
    error: UserError | None = None
    """Why it failed."""
    is_return: bool = False
    """Its index is there, and only has to be shelved again."""

    @property
    def place(self) -> Place:
        """Of its corpus."""
        return self.corpus.place

    @property
    def stage(self) -> str:
        """What is being done at the moment."""
        if self.is_swapping:
            return "mapping"
        return self.run.stage if self.run else "receiving"

    @property
    def share(self) -> float:
        """How much of the stage is done, 0 to 1; of receiving nobody knows."""
        return self.run.share if self.run and not self.is_swapping else 0.0

    def grow(self, received_bytes: int) -> None:
        """More of its text has come. Raises TooLong or LimitReached for want of room, or why the load has ended."""
        self.received_bytes += received_bytes
        self.claim_at_least(Size.of_text(self.received_bytes))

    def claim_at_least(self, size: Size) -> None:
        """Its text is known to come to so much. Raises as `grow`."""
        if self.error:
            raise self.error
        self.claim.resize(size)

    def cancel(self) -> None:
        """Give it up as soon as that can be done; what is being swapped in already will be."""
        self.is_cancelled = True
        if self.run:
            self.run.cancel()

    def check_wanted(self) -> None:
        """Raise Cancelled if nobody wants it any more."""
        if self.is_cancelled:
            raise Cancelled(f"corpus {self.place[1]!r} was removed while it was loaded")


@dataclass(eq=False)
class Corpus:
    """What is known of one place. entry and claim: of the index that is on the engine's shelf, or was before a restart.

    catalogued: what the catalogue has to say of it; ahead of entry while a swap is on its way.

    state: "loading" (nothing to draft from yet), "ready", "removing" or "failed".
    """

    place: Place
    created_s: int
    entry: Entry | None = None
    catalogued: Entry | None = None
    claim: Claim | None = None
    is_shelved: bool = False
    is_removing: bool = False
    load: Load | None = None
    reason: str | None = None
    """Of the last failure; a corpus that was to be replaced is as ready as before."""

    @property
    def state(self) -> str:
        """See the class."""
        if self.is_removing:
            return "removing"
        if self.is_shelved:
            return "ready"
        return "loading" if self.load else "failed"


class CorpusStore:
    """All corpora of a server. Its only writer is the event loop; owns the folder and the builder, not the link."""

    def __init__(
        self,
        link: EngineLink,
        builder: BuilderLink,
        folder: StateFolder,
        budget: Budget,
        *,
        tokenizer: str,
        corpora_max: int,
        sources: Path | None = None,
    ) -> None:
        """tokenizer: fingerprint of the one in use. sources: the operator's directory. Raises StartupError."""
        self.budget = budget
        self.sources = sources
        self.folder = folder
        self.builder = builder
        self.failures = 0
        """Loads that failed, cancelled ones not counted."""
        self._link = link
        self._tokenizer = tokenizer
        self._corpora_max = corpora_max
        self._corpora: dict[Place, Corpus] = {}
        self._writing = asyncio.Lock()
        for entry in folder.entries:
            place = (entry.tenant, entry.id)
            corpus = self._corpora[place] = Corpus(place, entry.created_s, entry, catalogued=entry)
            corpus.load = Load(corpus, Claim(budget, entry.tenant), is_return=True)

    def start(self) -> None:
        """Bring back what the catalogue has, as soon as the engine is there."""
        for corpus in self._corpora.values():
            assert corpus.load is not None
            corpus.load.task = asyncio.create_task(self._restore(corpus, corpus.load))

    def reload(self) -> None:
        """The engine is another one, and its shelf empty: put back what was there, as soon as it is ready."""
        for corpus in self._corpora.values():
            corpus.is_shelved = False
            if corpus.entry and corpus.load is None:
                self._begin_return(corpus, corpus.entry)

    def _begin_return(self, corpus: Corpus, entry: Entry) -> None:
        claim, corpus.claim = corpus.claim or Claim(self.budget, entry.tenant), None
        load = corpus.load = Load(corpus, claim, is_return=True)
        load.task = asyncio.create_task(self._restore(corpus, load))

    async def close(self) -> None:
        """Give up what is being loaded and end the builder. Files that are kept stay as they are."""
        loads = [corpus.load for corpus in self._corpora.values() if corpus.load]
        for load in loads:
            load.cancel()
        await self.builder.close()
        if tasks := [load.task for load in loads if load.task]:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_WAIT_S)
            for task in late:
                task.cancel()
        self.folder.close()

    # -- looking ----------------------------------------------------------------------------------------------------

    def visible_to(self, tenant: str) -> list[Corpus]:
        """The tenant's own and everybody's, by tenant and id."""
        return [self._corpora[place] for place in sorted(self._corpora) if place[0] in ("", tenant)]

    def all(self) -> Iterable[Corpus]:
        """Every corpus of every tenant."""
        return self._corpora.values()

    def find(self, tenant: str, corpus: str) -> Corpus:
        """The tenant's own of that id, or everybody's. Raises NotFound."""
        found = self._corpora.get((tenant, corpus)) or self._corpora.get(("", corpus))
        if found is None:
            raise NotFound(f"corpus {corpus!r} does not exist", param="id")
        return found

    async def uses(self, timeout_s: float) -> dict[Place, CorpusUse]:
        """What drafts from each corpus have come to, as the engine counts it. Raises NotReady without an answer."""
        if not self._link.ready.drafts_max:
            return {}
        try:
            answer = await asyncio.wait_for(self._link.ask(GetCorpora), timeout_s)
        except TimeoutError:
            raise NotReady(f"the step loop did not answer within {timeout_s:g} s") from None
        return {(use.tenant, use.corpus): use for use in answer.uses}

    # -- adding -----------------------------------------------------------------------------------------------------

    def begin(self, place: Place, *, replace: bool) -> Load:
        """Take the place for a load; its text follows. Raises NoDrafts, DuplicateCorpus, CorpusBusy, LimitReached."""
        self._check_drafts()
        tenant, name = place
        corpus = self._corpora.get(place)
        if corpus is None and len(self._corpora) >= self._corpora_max and not self._forget_failed():
            raise LimitReached(f"there are {self._corpora_max} corpora, which is the limit; remove one first")
        if corpus and corpus.is_removing:
            raise CorpusBusy(f"corpus {name!r} is being removed; add it again in a moment", param="id")
        if corpus and corpus.load:
            raise CorpusBusy(f"corpus {name!r} is being loaded; wait for it, or remove it to give that up", param="id")
        if corpus and corpus.is_shelved and not replace:
            raise DuplicateCorpus(f'corpus {name!r} is there already; "replace": true replaces it', param="id")
        if corpus is None:
            corpus = self._corpora[place] = Corpus(place, int(time.time()))
        corpus.load = Load(corpus, Claim(self.budget, tenant))
        return corpus.load

    def build(self, load: Load, sources: Sequence[Source]) -> None:
        """The text is there, and room for the least that it can be was claimed: count, build and swap it in.

        Raises why the load has ended meanwhile, if it has.
        """
        if load.error:
            raise load.error
        load.task = asyncio.create_task(self._run(load, sources))

    async def wait_accepted(self, load: Load) -> Corpus:
        """Until the text was counted and has its room, or COUNT_WAIT_S have passed.

        Raises what is wrong with it; then nothing is left of the load, nor of a corpus that was not there before.
        """
        await asyncio.wait([load.accepted], timeout=COUNT_WAIT_S)
        self._raise_error(load)
        return load.corpus

    async def wait_loaded(self, load: Load) -> Corpus:
        """Until the corpus is ready. Raises what it failed for, as `wait_accepted`."""
        assert load.task is not None
        await asyncio.wait([load.task])
        self._raise_error(load)
        return load.corpus

    async def abandon(self, load: Load) -> None:
        """Its text will not come, or is not as it should be: as if nothing had been begun."""
        if load.error:
            self._discard_uploads(load)  # it was removed before its text was all written
        elif load.task is None:
            await self._give_back(load, None)
            self._end(load, Cancelled(f"corpus {load.place[1]!r} was removed while its text was received"))

    async def _run(self, load: Load, sources: Sequence[Source]) -> None:
        """One load from its text to the swap. Never raises: how it ended is in the load."""
        target = self.folder.new_index()
        error: UserError | None = None
        try:
            await self._build(load, sources, target)
        except UserError as failure:
            error = failure
        except Exception as failure:
            log.exception("a corpus could not be loaded", extra={"corpus": load.place[1]})
            error = BuildError(f"internal error: {type(failure).__name__}; see the server's log")
        await self._give_back(load, target if error else None)
        self._end(load, error)

    async def _build(self, load: Load, sources: Sequence[Source], target: Path) -> None:
        tenant, name = load.place
        tokens_max = load.claim.tokens_max
        load.run = await self.builder.begin(sources, str(target), tokens_max)
        load.check_wanted()
        try:
            counted = await load.run.counted
        except LimitReached:
            load.claim.resize(Size.of_tokens(tokens_max + 1))  # raises in more words, unless there is room by now
            raise
        load.claim.resize(Size(counted.tokens, counted.bytes))
        load.accepted.set_result(None)
        load.run.proceed()
        checksum = await load.run.built
        load.check_wanted()
        load.is_swapping = True
        entry = Entry(
            id=name,
            tenant=tenant,
            file=target.name,
            tokens=counted.tokens,
            documents=counted.documents,
            bytes=counted.bytes,
            tokenizer=load.run.tokenizer,
            checksum=checksum,
            created_s=int(time.time()),
        )
        if entry.tokenizer != self._tokenizer:
            raise BuildError("the process that builds indexes has another tokenizer than the server")
        await self._swap(load, entry)

    async def _swap(self, load: Load, entry: Entry) -> None:
        """Make an index what its place holds: in the catalogue, then on the shelf. Or neither."""
        corpus = load.corpus
        replaced, claim = corpus.entry, corpus.claim
        try:
            await self._catalogue(corpus, entry)
            await self._shelve(entry)
        except (OSError, UserError) as error:
            await self._catalogue_if_possible(corpus, replaced)
            if isinstance(error, UserError):
                raise
            raise BuildError(f"the catalogue of corpora cannot be written: {error.strerror}") from error
        corpus.entry, corpus.claim, corpus.is_shelved = entry, load.claim, True
        load.claim = Claim(self.budget, entry.tenant)
        if replaced:
            self.folder.discard(self.folder.index(replaced.file))
        if claim:
            claim.release()

    async def _restore(self, corpus: Corpus, load: Load) -> None:
        """Put on the shelf what an earlier server had there. A failure leaves the file: another start may do better."""
        entry, error = corpus.entry, None
        assert entry is not None
        try:
            await self._link.wait_ready()
            self._check_drafts()
            if entry.tokenizer != self._tokenizer:
                raise InvalidRequest(
                    f"corpus {entry.id!r} was indexed with another tokenizer than this model's; add or remove it"
                )
            load.claim.resize(Size(entry.tokens, entry.bytes))
            load.is_swapping = True
            await self._shelve(entry)
            corpus.claim, corpus.is_shelved = load.claim, True
        except UserError as failure:
            error = failure
            load.claim.release()
        self._end(load, error)

    async def _shelve(self, entry: Entry) -> None:
        """Let the engine map the file and draft from it. Raises UserError as the engine refuses it."""
        path = str(self.folder.index(entry.file))
        await self._link.ask(
            lambda op: AddCorpus(op=op, corpus=entry.id, tenant=entry.tenant, path=path, checksum=entry.checksum)
        )

    def _check_drafts(self) -> None:
        """Raise NoDrafts where corpora would be loaded and never looked into (H47)."""
        if not self._link.ready.drafts_max:
            raise NoDrafts("this server looks nothing up in corpora: start it with --speculate on or auto")

    # -- removing ---------------------------------------------------------------------------------------------------

    async def remove(self, place: Place) -> None:
        """Take a corpus away, and give up what is loaded in its place. Raises NotFound, CorpusBusy, NotReady."""
        corpus = self._corpora.get(place)
        if corpus is None:
            raise NotFound(f"corpus {place[1]!r} does not exist", param="id")
        if corpus.is_removing:
            raise CorpusBusy(f"corpus {place[1]!r} is being removed already", param="id")
        corpus.is_removing = True
        try:
            if corpus.load:
                await self._give_up(corpus.load)
            if corpus.is_shelved:
                tenant, name = place
                await self._link.ask(lambda op: RemoveCorpus(op=op, corpus=name, tenant=tenant))
                corpus.is_shelved = False
            if corpus.entry:
                await self._catalogue_if_possible(corpus, None)
                self.folder.discard(self.folder.index(corpus.entry.file))
        finally:
            corpus.is_removing = False
        if corpus.claim:
            corpus.claim.release()
        if self._corpora.get(place) is corpus:
            del self._corpora[place]

    async def _give_up(self, load: Load) -> None:
        """End a load, whatever it is doing."""
        if load.task is None:
            await self.abandon(load)
        else:
            load.cancel()
            await asyncio.wait([load.task])

    # -- books ------------------------------------------------------------------------------------------------------

    async def _give_back(self, load: Load, target: Path | None) -> None:
        """What a load still has: its build, its uploads, its claim; and its file, if it is not to be kept."""
        if load.run:
            load.run.cancel()
            await asyncio.wait([load.run.built])
        self._discard_uploads(load)
        if target:
            self.folder.discard(target)
        load.claim.release()

    def _discard_uploads(self, load: Load) -> None:
        for path in load.uploads:
            self.folder.discard(path)

    def _end(self, load: Load, error: UserError | None) -> None:
        """A load is over. A corpus without an index is forgotten if nobody wanted it, else it says why it has none."""
        corpus = load.corpus
        corpus.load, load.error = None, error
        corpus.reason = error.message if error else None
        if not load.accepted.done():
            load.accepted.set_result(None)
        fields = {"corpus": load.place[1], "tenant": load.place[0] or None}
        if error is None:
            assert corpus.entry is not None
            log.info("corpus loaded", extra=fields | {"tokens": corpus.entry.tokens, "bytes": corpus.entry.bytes})
        elif isinstance(error, Cancelled):
            log.info("corpus given up", extra=fields)
            corpus.reason = None
            self._forget(corpus)
        else:
            self.failures += 1
            log.warning("a corpus was not loaded", extra=fields | {"error": error.message})
        if error and corpus.entry and not (corpus.is_shelved or corpus.is_removing or load.is_return):
            self._begin_return(corpus, corpus.entry)  # The engine was replaced meanwhile.

    def _raise_error(self, load: Load) -> None:
        """Tell whoever asked for a load what it failed for; then nobody else need be told."""
        if load.error:
            load.corpus.reason = None
            self._forget(load.corpus)
            raise load.error

    def _forget(self, corpus: Corpus) -> None:
        """Drop a corpus that has neither an index nor a load."""
        if corpus.entry is None and corpus.load is None and self._corpora.get(corpus.place) is corpus:
            del self._corpora[corpus.place]

    def _forget_failed(self) -> bool:
        """Make room by dropping the oldest corpus that has only failed; False if there is none."""
        for corpus in self._corpora.values():
            if corpus.entry is None and corpus.load is None:
                self._forget(corpus)
                return True
        return False

    async def _catalogue(self, corpus: Corpus, entry: Entry | None) -> None:
        """Write down what a place holds. Raises OSError."""
        corpus.catalogued = entry
        async with self._writing:
            entries = [each.catalogued for each in self._corpora.values() if each.catalogued]
            await asyncio.to_thread(self.folder.write, entries)

    async def _catalogue_if_possible(self, corpus: Corpus, entry: Entry | None) -> None:
        """The same where there is no way back: an entry too many is found without its file at the next start."""
        try:
            await self._catalogue(corpus, entry)
        except OSError as error:
            log.error("the catalogue of corpora cannot be written", extra={"error": str(error)})

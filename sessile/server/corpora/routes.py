"""Corpora over HTTP: SGLang's three routes, and the same corpora as a resource under /v1/corpora.

With keys, a user's corpora are its tenant's own; what an administrator adds is everybody's unless it says otherwise.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query
from fastapi import Path as PathField
from pydantic import Field, model_validator
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from sessile.contract.corpora import CorpusUse, Source
from sessile.errors import InvalidRequest, NotReady, UserError
from sessile.server.auth import Asking, require_admin
from sessile.server.body import Body, check_coding, field_fault, read_body, shortened, takes
from sessile.server.calls import Service
from sessile.server.corpora.budget import Size
from sessile.server.corpora.sources import LineCheck, files_below, write_documents
from sessile.server.corpora.store import Corpus, CorpusStore, Load, Place
from sessile.server.keys import Caller
from sessile.server.names import ID_CHARS_MAX, ID_PATTERN, GivenId
from sessile.server.replies import JsonReply

log = logging.getLogger(__name__)

PATH_CHARS_MAX = 4096
WRITE_BYTES = 1 << 20
"""An upload is written to the disk in such portions, in a thread."""
DISCARDED_BYTES_MAX, DISCARD_S = 16 * 2**20, 2.0
"""How much of a refused upload is read, at most, so that its client gets to read why."""
LINE_TYPES = frozenset({"application/jsonl", "application/x-jsonl", "application/jsonlines", "application/x-ndjson",
                        "application/x-jsonlines", "application/ndjson"})  # fmt: skip
"""Content types of an upload: a document a line."""

CorpusId = GivenId
CorpusPath = Annotated[str, PathField(max_length=ID_CHARS_MAX)]


class Sources(Body):
    """What all bodies that add a corpus have in common: exactly one source."""

    documents: list[str] | None = None

    def _check_one(self, path: str | None, name: str) -> None:
        if self.documents is None and path is None:
            raise field_fault("documents", f"give documents or {name}")
        if self.documents is not None and path is not None:
            raise field_fault(name, f"give documents or {name}, not both")
        if self.documents is not None and not self.documents:
            raise field_fault("documents", "there are none")


class NativeAddBody(Sources):
    """The body of /add_external_corpus."""

    corpus_id: CorpusId | None = None
    file_path: str | None = Field(default=None, min_length=1, max_length=PATH_CHARS_MAX)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        self._check_one(self.file_path, "file_path")
        return self


class NativeRemoveBody(Body):
    """The body of /remove_external_corpus."""

    corpus_id: str = Field(max_length=ID_CHARS_MAX)


class AddBody(Sources):
    """The body of POST /v1/corpora."""

    id: CorpusId | None = None
    path: str | None = Field(default=None, min_length=1, max_length=PATH_CHARS_MAX)
    """Of a file or folder below the operator's directory."""
    replace: bool | None = None
    shared: bool | None = None
    """For everybody; an administrator's are unless this is false."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        self._check_one(self.path, "path")
        return self


def routes(service: Service) -> APIRouter:
    """The routes of this package."""
    router = APIRouter()
    _add_native(router, service)
    _add_resources(router, service)
    return router


def is_upload(scope: Scope) -> bool:
    """Whether a request brings lines of documents: its body is streamed, bounded by the budget and nothing else."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    return bool(scope["method"] == "POST" and scope["path"] == "/v1/corpora" and kind in LINE_TYPES)


def _add_native(router: APIRouter, service: Service) -> None:
    @router.post("/add_external_corpus", openapi_extra=takes(NativeAddBody))
    async def add_external_corpus(request: Request, caller: Asking) -> Response:
        corpus_id = ""
        try:
            body = await read_body(request, NativeAddBody)
            corpus_id = body.corpus_id or new_corpus_id()
            load = await _begin_sources(
                service, place_for(caller, corpus_id, None), body.documents, body.file_path, replace=False
            )
            corpus = await store_of(service).wait_loaded(load)
        except UserError as error:
            return _native_refusal(error, corpus_id=corpus_id, loaded_token_count=0)
        assert corpus.entry is not None
        tokens = corpus.entry.tokens
        message = f"corpus {corpus_id!r} is loaded"
        return JsonReply(
            {"success": True, "corpus_id": corpus_id, "message": message, "loaded_token_count": tokens}
        )

    @router.post("/remove_external_corpus", openapi_extra=takes(NativeRemoveBody))
    async def remove_external_corpus(request: Request, caller: Asking) -> Response:
        try:
            body = await read_body(request, NativeRemoveBody)
            await _remove(service, caller, body.corpus_id)
        except UserError as error:
            return _native_refusal(error)
        return JsonReply({"success": True, "message": f"corpus {body.corpus_id!r} is removed"})

    @router.get("/list_external_corpora")
    async def list_external_corpora(caller: Asking) -> Response:
        corpora = [corpus for corpus in store_of(service).visible_to(caller.tenant) if corpus.is_shelved]
        # A tenant's own comes after everybody's of the same id, and is the one that it means.
        counts = {corpus.place[1]: corpus.entry.tokens for corpus in corpora if corpus.entry}
        return JsonReply({"success": True, "corpus_token_counts": counts, "message": f"{len(counts)} corpora"})


def _native_refusal(error: UserError, **fields: Any) -> JsonReply:
    """A failure as SGLang's clients know it: the fields of a success, and status 400 for whatever they did wrong."""
    status = error.status if error.status >= 500 else 400
    return JsonReply({"success": False, "message": error.message, **fields}, status)


def _add_resources(router: APIRouter, service: Service) -> None:
    described = takes(AddBody)
    described["requestBody"]["content"]["application/jsonl"] = {"schema": {"type": "string"}}

    @router.post("/v1/corpora", openapi_extra=described)
    async def add(
        request: Request,
        caller: Asking,
        id: Annotated[str | None, Query(pattern=ID_PATTERN, max_length=ID_CHARS_MAX)] = None,
        replace: bool = False,
        shared: bool | None = None,
    ) -> Response:
        if is_upload(request.scope):
            check_upload(request)
            place = place_for(caller, id or new_corpus_id(), shared)
            load = await _begin_upload(service, place, request, replace=replace)
        else:
            if request.scope["query_string"]:
                raise InvalidRequest("id, replace and shared are fields of the body, where the body is JSON")
            body = await read_body(request, AddBody)
            place = place_for(caller, body.id or new_corpus_id(), body.shared)
            load = await _begin_sources(service, place, body.documents, body.path, replace=bool(body.replace))
        corpus = await store_of(service).wait_accepted(load)
        return JsonReply(corpus_content(corpus, None), 202 if corpus.load else 200)

    @router.get("/v1/corpora")
    async def list_all(caller: Asking) -> Response:
        store = store_of(service)
        uses = await store.uses(service.options.health_timeout_s)
        listed = [corpus_content(corpus, uses.get(corpus.place)) for corpus in store.visible_to(caller.tenant)]
        return JsonReply({"object": "list", "data": listed, "budget": budget_content(store, caller)})

    @router.get("/v1/corpora/{corpus}")
    async def get(corpus: CorpusPath, caller: Asking) -> Response:
        store = store_of(service)
        found = store.find(caller.tenant, corpus)
        uses = await store.uses(service.options.health_timeout_s)
        return JsonReply(corpus_content(found, uses.get(found.place)))

    @router.delete("/v1/corpora/{corpus}")
    async def delete(corpus: CorpusPath, caller: Asking) -> Response:
        await _remove(service, caller, corpus)
        return JsonReply({"id": corpus, "object": "corpus", "deleted": True})


async def _begin_sources(
    service: Service, place: Place, documents: list[str] | None, path: str | None, *, replace: bool
) -> Load:
    """Begin a load of documents or of files below the operator's directory. Raises UserError; nothing is begun then."""
    service.check_open()
    store = store_of(service)
    load = store.begin(place, replace=replace)
    try:
        if documents is None:
            assert path is not None
            sources, size = await asyncio.to_thread(files_below, store.sources, path)
            load.claim_at_least(size)
        else:
            sources = [_upload_of(store, load)]
            load.grow(await asyncio.to_thread(_write_all, sources[0], documents))
        store.build(load, sources)
    except BaseException:
        await store.abandon(load)
        raise
    return load


async def _begin_upload(service: Service, place: Place, request: Request, *, replace: bool) -> Load:
    """Receive lines of documents and begin their load. Nothing is held of the body but the portion to be written."""
    service.check_open()
    store = store_of(service)
    body = request.stream()
    try:
        load = store.begin(place, replace=replace)
        try:
            source = _upload_of(store, load)
            await _receive(body, Path(source.path), load)
            store.build(load, [source])
        except BaseException:
            await store.abandon(load)
            raise
    except UserError:
        await _discard(body)
        raise
    return load


async def _receive(body: AsyncIterator[bytes], path: Path, load: Load) -> None:
    """Write an upload to its file, checked as it comes. Raises UserError as soon as something is wrong with it."""
    check, portion = LineCheck(), bytearray()
    with open(path, "wb") as file:
        async for chunk in body:
            load.grow(len(chunk))
            check.feed(chunk)
            portion += chunk
            if len(portion) >= WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(portion))
                portion.clear()
        check.end()
        load.grow(0)  # it may have been removed meanwhile
        await asyncio.to_thread(file.write, bytes(portion))


async def _discard(body: AsyncIterator[bytes]) -> None:
    """Read on for a while: a connection that is closed with unread bytes is reset, and with it the refusal lost."""
    left = DISCARDED_BYTES_MAX
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_S):
            async for chunk in body:
                left -= len(chunk)
                if left < 0:
                    return


def _upload_of(store: CorpusStore, load: Load) -> Source:
    upload = store.folder.new_upload()
    load.uploads.append(upload)
    return Source(str(upload), "jsonl")


def _write_all(source: Source, documents: list[str]) -> int:
    with open(source.path, "wb") as file:
        return write_documents(file, documents)


def check_upload(request: Request) -> None:
    """Raise InvalidRequest for what an upload cannot say or be."""
    check_coding(request)
    for name in request.query_params:
        if name not in ("id", "replace", "shared"):
            raise InvalidRequest(f"{shortened(name)}: unknown field", param=shortened(name))


async def _remove(service: Service, caller: Caller, corpus: str) -> None:
    """Remove the caller's own corpus of that id, or everybody's if it may. Raises UserError."""
    store = store_of(service)
    found = store.find(caller.tenant, corpus)
    if found.place[0] != caller.tenant:
        require_admin(caller, f"removing {corpus!r}, which is everybody's,")
    await store.remove(found.place)
    log.info("corpus removed", extra={"corpus": corpus, "tenant": found.place[0] or None})


def store_of(service: Service) -> CorpusStore:
    """The corpora of a server. Raises NotReady while it starts."""
    if service.corpora is None:
        raise NotReady("this server has no place for corpora yet")
    return service.corpora


def place_for(caller: Caller, corpus: str, shared: bool | None) -> Place:
    """Where a corpus of the caller goes. Raises Forbidden."""
    if shared:
        require_admin(caller, "a corpus for everybody")
    is_shared = caller.is_admin if shared is None else shared
    return ("" if is_shared else caller.tenant), corpus


def new_corpus_id() -> str:
    """An id for a corpus whose owner gave it none."""
    return "corpus-" + secrets.token_hex(8)


def corpus_content(corpus: Corpus, use: CorpusUse | None) -> dict[str, Any]:
    """A corpus as JSON. use: what drafts from it have come to; None: nothing yet."""
    tenant, name = corpus.place
    entry, load = corpus.entry if corpus.is_shelved else None, corpus.load
    use = use or CorpusUse(corpus=name)
    return {
        "object": "corpus",
        "id": name,
        "tenant": tenant,
        "state": corpus.state,
        "reason": corpus.reason,
        "progress": progress_content(load) if load else None,
        "tokens": entry.tokens if entry else 0,
        "documents": entry.documents if entry else 0,
        "bytes": entry.bytes if entry else 0,
        "created": corpus.created_s if entry is None else entry.created_s,
        "drafts_offered": use.drafts_offered,
        "drafts_accepted": use.drafts_accepted,
        "accepted_by_length": list(use.accepted_by_length),
    }


def progress_content(load: Load) -> dict[str, Any]:
    """How far a load is."""
    return {"stage": load.stage, "share": round(load.share, 3), "received_bytes": load.received_bytes}


def budget_content(store: CorpusStore, caller: Caller) -> dict[str, Any]:
    """What those have and may still have whom the caller adds corpora for."""
    budget = store.budget
    tenant = "" if caller.is_admin else caller.tenant
    used, left = budget.used_by(tenant), budget.left(tenant)
    return {"used": _size_content(used), "left": _size_content(Size(max(0, left.tokens), max(0, left.bytes)))}


def _size_content(size: Size) -> dict[str, int]:
    return {"tokens": size.tokens, "bytes": size.bytes}

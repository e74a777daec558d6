"""Sessions: SGLang's /open_session and /close_session, and the same sessions as a resource under /v1/sessions."""

import logging
from typing import Annotated, Any, Self

import msgspec
from fastapi import APIRouter, Query
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from sessile.contract.messages import (
    CloseSession,
    ForkSession,
    GetSession,
    ListSessions,
    OpenSession,
    RewindSession,
    Sampling,
    SessionTokens,
    SessionView,
    unpack_tokens,
)
from sessile.errors import NotFound, UserError
from sessile.server.auth import Asking
from sessile.server.body import Body, TokenIds, field_fault, read_body, takes
from sessile.server.calls import Call, Order, Service, attended
from sessile.server.encoding import encode_text
from sessile.server.keys import Caller
from sessile.server.link import refusal_error
from sessile.server.names import ID_CHARS_MAX, Metadata, SessionId, SessionPath, new_session_id
from sessile.server.replies import JsonReply, engine_refusal
from sessile.server.sampling import COUNT_MAX, Count, check_vocabulary

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S_MAX = 31_536_000
IdleTimeout = Annotated[float, Field(gt=0, le=IDLE_TIMEOUT_S_MAX)]


class OpenBody(Body):
    """The body of /open_session."""

    capacity_of_str_len: int = Field(ge=0, le=COUNT_MAX)
    """Advisory, as in SGLang; a session grows as far as the context length."""
    session_id: SessionId | None = None
    streaming: bool | None = None
    """Turns follow one another; else any finished turn may be gone on from."""
    timeout: IdleTimeout | None = None


class CloseBody(Body):
    """The body of /close_session."""

    session_id: str = Field(max_length=ID_CHARS_MAX)


class CreateBody(Body):
    """The body of POST /v1/sessions."""

    id: SessionId | None = None
    idle_timeout_s: IdleTimeout | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=COUNT_MAX)
    reserve_tokens: Count | None = None
    """KV for so many tokens is the session's whether it uses it or not."""
    branching: bool | None = None
    metadata: Metadata | None = None


class AppendBody(Body):
    """The body of POST /v1/sessions/{id}/append."""

    text: str | None = Field(default=None, min_length=1)
    input_ids: TokenIds | None = Field(default=None, min_length=1)
    expect_tokens: Count | None = None

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise field_fault("text", "give either text or input_ids")
        return self


class ForkBody(Body):
    """The body of POST /v1/sessions/{id}/fork: at the end unless it says where."""

    id: SessionId | None = None
    """Of the fork; None: one that cannot be guessed."""
    at_tokens: Count | None = None
    at_turn: Count | None = None


class RewindBody(Body):
    """The body of POST /v1/sessions/{id}/rewind."""

    to_tokens: Count | None = None
    to_turn: Count | None = None


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter()
    _add_native(router, service)
    _add_resources(router, service)
    _add_places(router, service)
    return router


def _add_native(router: APIRouter, service: Service) -> None:
    @router.post("/open_session", openapi_extra=takes(OpenBody))
    async def open_session(request: Request, caller: Asking) -> Response:
        body = await read_body(request, OpenBody)
        service.check_open()
        create = CreateBody(id=body.session_id, idle_timeout_s=body.timeout, branching=not body.streaming)
        try:
            view = await _open(service, caller, create)
        except UserError as error:
            raise engine_refusal(error.status, error.code, error.message, error.param) from None
        return JsonReply(view.id)

    @router.post("/close_session", openapi_extra=takes(CloseBody))
    async def close_session(request: Request, caller: Asking) -> Response:
        body = await read_body(request, CloseBody)
        try:
            await _close(service, caller, body.session_id)
        except UserError as error:
            if error.status != NotFound.status:  # closing is idempotent: an unknown session is closed
                raise
        return Response()


def _add_resources(router: APIRouter, service: Service) -> None:
    link = service.link

    @router.post("/v1/sessions", openapi_extra=takes(CreateBody))
    async def create(request: Request, caller: Asking) -> Response:
        body = await read_body(request, CreateBody)
        service.check_open()
        return JsonReply(session_content(await _open(service, caller, body)))

    @router.get("/v1/sessions")
    async def list_all(
        caller: Asking,
        after: Annotated[str | None, Query(max_length=ID_CHARS_MAX)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        page = await link.ask(lambda op: ListSessions(op, after, limit, caller.tenant))
        listed = [session_content(view) for view in page.sessions]
        return JsonReply({"object": "list", "data": listed, "has_more": page.more, "total": page.total})

    @router.get("/v1/sessions/{session}")
    async def get(session: SessionPath, caller: Asking) -> Response:
        return JsonReply(session_content(await link.ask(lambda op: GetSession(op, session, caller.tenant))))

    @router.get("/v1/sessions/{session}/tokens")
    async def tokens(session: SessionPath, caller: Asking) -> Response:
        outcome = await link.ask(lambda op: SessionTokens(op, session, caller.tenant))
        return JsonReply({"id": session, "tokens": unpack_tokens(outcome.values["tokens"])})

    @router.delete("/v1/sessions/{session}")
    async def delete(session: SessionPath, caller: Asking) -> Response:
        return JsonReply({"id": session, "object": "session", **await _close(service, caller, session)})


def _add_places(router: APIRouter, service: Service) -> None:
    link = service.link

    @router.post("/v1/sessions/{session}/append", openapi_extra=takes(AppendBody))
    async def append(session: SessionPath, request: Request, caller: Asking) -> Response:
        body = await read_body(request, AppendBody)
        service.check_open()
        call = Call(service, await _append_order(service, caller, session, body), whole=True)
        async with attended(request.receive, call):
            done = (await call.next()).done
        assert done is not None
        if done.reason not in ("length", "stop"):
            status = done.status if done.status != 200 else 409
            raise refusal_error(status, done.code or "aborted", done.message, done.param)
        computed = {"appended_tokens": len(call.order.tokens), "computed_tokens": done.computed_tokens}
        return JsonReply({"id": session, "object": "session", "tokens": done.session_tokens, **computed})

    @router.post("/v1/sessions/{session}/fork", openapi_extra=takes(ForkBody))
    async def fork(session: SessionPath, request: Request, caller: Asking) -> Response:
        body = await read_body(request, ForkBody)
        service.check_open()
        child = body.id or new_session_id()
        view = await link.ask(
            lambda op: ForkSession(
                op=op,
                session=session,
                child=child,
                tenant=caller.tenant,
                at_tokens=body.at_tokens,
                at_turn=body.at_turn,
            )
        )
        fields = {"session": session, "child": child, "tokens": view.tokens, "tenant": caller.tenant or None}
        log.info("session forked", extra=fields)
        return JsonReply(session_content(view))

    @router.post("/v1/sessions/{session}/rewind", openapi_extra=takes(RewindBody))
    async def rewind(session: SessionPath, request: Request, caller: Asking) -> Response:
        body = await read_body(request, RewindBody)
        service.check_open()
        view = await link.ask(
            lambda op: RewindSession(
                op=op, session=session, tenant=caller.tenant, to_tokens=body.to_tokens, to_turn=body.to_turn
            )
        )
        fields = {"session": session, "tokens": view.tokens, "tenant": caller.tenant or None}
        log.info("session rewound", extra=fields)
        return JsonReply(session_content(view))


async def _append_order(service: Service, caller: Caller, session: str, body: AppendBody) -> Order:
    """A turn that computes its input and generates nothing."""
    if body.input_ids is None:
        assert body.text is not None
        tokens = await encode_text(service.tokenizer, body.text)
    else:
        check_vocabulary(body.input_ids, service.link.ready.vocab_size, "input_ids")
        tokens = body.input_ids
    return Order(
        tokens=tokens,
        input_field="text" if body.input_ids is None else "input_ids",
        sampling=Sampling(seed=0, max_new_tokens=0),
        tenant=caller.tenant,
        session=session,
        expect_tokens=-1 if body.expect_tokens is None else body.expect_tokens,
    )


async def _open(service: Service, caller: Caller, body: CreateBody) -> SessionView:
    """Open a session. Raises UserError as the engine refuses it."""
    view = await service.link.ask(
        lambda op: OpenSession(
            op=op,
            session=body.id or new_session_id(),
            tenant=caller.tenant,
            branching=bool(body.branching),
            reserve_tokens=body.reserve_tokens or 0,
            idle_timeout_s=body.idle_timeout_s,
            tokens_max=body.max_tokens,
            metadata=body.metadata or {},
        )
    )
    assert isinstance(view, SessionView)
    log.info("session opened", extra={"session": view.id, "tenant": caller.tenant or None})
    return view


async def _close(service: Service, caller: Caller, session: str) -> dict[str, Any]:
    """Close a session; whether that is done or deferred to the end of its turn. Raises UserError if it is unknown."""
    outcome = await service.link.ask(lambda op: CloseSession(op, session, caller.tenant))
    service.dialogues.forget(caller.tenant, session)
    log.info("session closed", extra={"session": session, "tenant": caller.tenant or None, **outcome.values})
    return dict(outcome.values)


def session_content(view: SessionView) -> dict[str, Any]:
    """A session as JSON."""
    fields: dict[str, Any] = msgspec.to_builtins(view)
    del fields["type"]
    return {"object": "session", **fields}

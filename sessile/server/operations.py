"""Everything around generation: health, figures, cache, aborts, and the tokenizer by itself."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from sessile import __version__
from sessile.contract.messages import CancelAll, Flush, GetPool, GetStats, Sampling, Stats
from sessile.contract.pool import PoolView
from sessile.errors import InvalidRequest, NotReady
from sessile.server.auth import Asking, require_admin
from sessile.server.body import Body, TokenIds, read_body, takes
from sessile.server.calls import Call, Order, Service, attended
from sessile.server.encoding import encode_text
from sessile.server.metrics import CorporaFigures, SupplyFigures
from sessile.server.replies import JsonReply
from sessile.server.sampling import check_vocabulary


class AbortBody(Body):
    """The body of /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None


class TokenizeBody(Body):
    """The body of /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """The body of /detokenize."""

    tokens: TokenIds
    model: str | None = None
    skip_special_tokens: bool | None = None


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter()
    _add_health(router, service)
    _add_figures(router, service)
    _add_actions(router, service)
    _add_tokenizer(router, service)
    return router


async def current_stats(service: Service) -> Stats:
    """Figures from the step loop itself, so that an answer proves that it turns (H54). Raises NotReady without one."""
    timeout_s = service.options.health_timeout_s
    try:
        stats = await asyncio.wait_for(service.link.ask(GetStats), timeout_s)
    except TimeoutError:
        raise NotReady(f"the step loop did not answer within {timeout_s:g} s") from None
    assert isinstance(stats, Stats)
    return stats


def _check_moving(service: Service) -> None:
    """Raise NotReady where the engine has work and gets nowhere: it is about to be replaced."""
    if service.is_stalled:
        raise NotReady(f"no step has settled for {service.options.stall_timeout_s:g} s, and there is work")


def _add_health(router: APIRouter, service: Service) -> None:
    @router.get("/health")
    @router.get("/health/ready")
    async def ready() -> Response:
        service.check_open()
        if service.leaving:
            raise NotReady("the server is about to shut down")
        await current_stats(service)
        _check_moving(service)
        return Response()

    @router.get("/health/live")
    async def live() -> Response:
        _check_moving(service)
        return Response()

    @router.get("/health_generate")
    async def health_generate(request: Request, caller: Asking) -> Response:
        service.check_open()
        sampling = Sampling(seed=0, temperature=0.0, max_new_tokens=1, ignore_eos=True)
        order = Order(tokens=[0], sampling=sampling, tenant=caller.tenant)
        call = Call(service, order, whole=True)
        async with attended(request.receive, call):
            try:
                arrival = await asyncio.wait_for(call.next(), service.options.health_timeout_s)
            except TimeoutError:
                raise NotReady("a request of one token did not end in time") from None
        assert arrival.done is not None
        if arrival.done.reason == "error":
            raise NotReady(f"a request of one token failed: {arrival.done.message}")
        return Response()


def _add_figures(router: APIRouter, service: Service) -> None:
    @router.get("/metrics")
    async def metrics(names: Literal["all", "sessile"] = "all") -> Response:
        try:
            stats = await current_stats(service)
        except NotReady:
            stats = None  # shown as sessile_engine_up 0
        model = service.options.served_name or (service.link.ready.model_name if stats else "")
        text = service.metrics.render(
            stats,
            model=model,
            in_flight=service.link.in_flight,
            corpora=corpora_figures(service),
            supply=SupplyFigures.of(service.link, service.supervisor.restarts if service.supervisor else 0),
            peers_names=names == "all",
        )
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get("/get_model_info")
    async def model_content() -> Response:
        ready = service.link.ready
        return JsonReply(
            {
                "model_path": ready.model_path,
                "tokenizer_path": ready.model_path,
                "is_generation": True,
                "served_model_name": service.model_name,
                "architecture": ready.architecture,
                "dtype": ready.dtype,
                "device": ready.device,
                "attention": ready.attention,
                "vocab_size": ready.vocab_size,
                "context_length": ready.context_tokens,
                "bos_token_id": service.tokenizer.bos_id,
                "eos_token_ids": service.tokenizer.eos_ids,
            }
        )

    @router.get("/get_server_info")
    async def server_content() -> Response:
        stats = await current_stats(service)
        return JsonReply(
            {
                "version": __version__,
                "settings": service.settings or {"server": dataclasses.asdict(service.options)},
                "engine": _plain(service.link.ready),
                "internal_states": [_plain(stats)],  # where SGLang's clients look for live figures
                "requests_in_flight": service.link.in_flight,
                "draining": service.draining,
            }
        )

    @router.get("/v1/pool")
    async def pool(holders: Annotated[int, Query(ge=0, le=1000)] = 100) -> Response:
        view = await service.link.ask(lambda op: GetPool(op, holders))
        assert isinstance(view, PoolView)
        return JsonReply(pool_content(view, {key: rid for (_, rid), key in service.keys_by_rid.items()}))


def corpora_figures(service: Service) -> CorporaFigures | None:
    """What /metrics shows of corpora; None where there are none to show."""
    store = service.corpora
    if store is None:
        return None
    by_state = Counter(corpus.state for corpus in store.all())
    return CorporaFigures(by_state, store.budget.used.tokens, store.budget.used.bytes, store.failures)


def pool_content(view: PoolView, rids: Mapping[int, str]) -> dict[str, Any]:
    """The body of /v1/pool. rids: names of requests in flight by their keys."""
    return {
        "object": "pool",
        "page_tokens": view.page_size,
        "pages": {
            "total": view.pages_total,
            "free": view.free,
            "limbo": sum(pages for _, pages in view.limbo),
            "tree": view.tree_pinned + view.tree_parked + view.tree_unpinned,
            "requests": view.request_pages,
            "sessions": view.session_pages,
            "quarantine": view.quarantine,
            "scratch": view.scratch,
        },
        "tree": {"pinned": view.tree_pinned, "parked": view.tree_parked, "unpinned": view.tree_unpinned},
        "limbo": [{"step": step, "pages": pages} for step, pages in view.limbo],
        "rows": {"total": view.rows_total, "held": view.requests_running + view.requests_draining},
        "requests": {
            "running": view.requests_running,
            "waiting": view.requests_waiting,
            "draining": view.requests_draining,
        },
        "sessions": {"open": view.sessions_open, "idle": view.sessions_idle, "tokens": view.session_tokens},
        "holders": [
            {
                "kind": "session" if holder.key is None else "request",
                "rid": None if holder.key is None else rids.get(holder.key),
                "session": holder.session,
                "tenant": holder.tenant,
                "phase": holder.phase,
                "own_pages": holder.own_pages,
                "shared_pages": holder.shared_pages,
                "reserve_pages": holder.reserve_pages,
                "row": holder.row,
            }
            for holder in view.holders
        ],
        "rest": {"requests": view.rest_requests, "sessions": view.rest_sessions, "own_pages": view.rest_own_pages},
    }


def _add_actions(router: APIRouter, service: Service) -> None:
    @router.post("/abort_request", openapi_extra=takes(AbortBody))
    async def abort_request(request: Request, caller: Asking) -> Response:
        body = await read_body(request, AbortBody)
        if body.abort_all:
            require_admin(caller, "abort_all")
            await service.link.ask(CancelAll)
        elif body.rid is None:
            raise InvalidRequest("rid: rid or abort_all: true is required", param="rid")
        else:
            service.abort(caller.tenant, body.rid)
        return Response()

    @router.get("/flush_cache")
    @router.post("/flush_cache")
    async def flush_cache() -> Response:
        outcome = await service.link.ask(Flush)
        return JsonReply({"success": True, **outcome.values})


def _add_tokenizer(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody)
        special = body.add_special_tokens is not False
        tokens = await encode_text(service.tokenizer, body.prompt, add_special_tokens=special)
        limit = service.link.ready.context_tokens
        return JsonReply({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    @router.post("/detokenize", openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody)
        check_vocabulary(body.tokens, service.link.ready.vocab_size, "tokens")
        skip = body.skip_special_tokens is not False
        return JsonReply({"text": service.tokenizer.decode(body.tokens, skip_special_tokens=skip)})


def _plain(struct: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(struct)
    fields.pop("type", None)
    return fields

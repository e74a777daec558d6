"""The routes of /v1/responses and /v1/conversations, as OpenAI's clients expect them (docs/HTTP.md)."""

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from sessile.errors import InvalidRequest, NotFound, UserError
from sessile.server.auth import Asking
from sessile.server.body import read_body, takes
from sessile.server.calls import Service, attended
from sessile.server.link import Arrival
from sessile.server.openai import check_model
from sessile.server.openai_replies import Choice
from sessile.server.replies import JsonReply
from sessile.server.responses.bodies import ConversationBody, ConversationUpdateBody, ItemsBody, ResponseBody
from sessile.server.responses.desk import Desk
from sessile.server.responses.items import list_content
from sessile.server.responses.record import Conversation, ResponseRecord
from sessile.server.stream import EventStream, event

Id = Annotated[str, Path(max_length=128)]
After = Annotated[str | None, Query(max_length=128)]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query()]


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(prefix="/v1")
    desk = Desk(service)
    _add_responses(router, service, desk)
    _add_conversations(router, service, desk)
    _add_items(router, desk)
    return router


def _add_responses(router: APIRouter, service: Service, desk: Desk) -> None:
    @router.post("/responses", openapi_extra=takes(ResponseBody))
    async def create(request: Request, caller: Asking) -> Response:
        body = await read_body(request, ResponseBody)
        service.check_open()
        check_model(service, body.model)
        record, choice = await desk.begin(caller, body)
        if body.background:
            desk.run_in_background(record, choice)
            return JsonReply(record.content())
        if body.stream:
            growing = _Growing(record, choice)
            return EventStream([choice.call], lambda _, arrival: growing.events(arrival), end=b"")
        async with attended(request.receive, choice.call):
            choice.add(await choice.call.next())
        return JsonReply(record.content())

    @router.get("/responses/{response}")
    async def retrieve(response: Id, caller: Asking, stream: Annotated[bool, Query()] = False) -> Response:
        if stream:
            raise InvalidRequest("stream: a response is streamed while it is created, not afterwards", param="stream")
        return JsonReply(desk.response(caller.tenant, response).content())

    @router.delete("/responses/{response}")
    async def delete(response: Id, caller: Asking) -> Response:
        desk.delete(desk.response(caller.tenant, response))
        return JsonReply({"id": response, "object": "response", "deleted": True})

    @router.post("/responses/{response}/cancel")
    async def cancel(response: Id, caller: Asking) -> Response:
        record = desk.response(caller.tenant, response)
        await desk.cancel(record)
        return JsonReply(record.content())

    @router.get("/responses/{response}/input_items")
    async def input_items(
        response: Id, caller: Asking, after: After = None, limit: Limit = 20, order: Order = "desc"
    ) -> Response:
        record = desk.response(caller.tenant, response)
        return JsonReply(list_content(record.input_items, after, limit, order))


class _Growing:
    """The typed events of a response as its answer grows."""

    def __init__(self, record: ResponseRecord, choice: Choice) -> None:
        self._record = record
        self._choice = choice
        self._numbered = _Numbered()

    def events(self, arrival: Arrival) -> bytes:
        """What an arrival says. An error before the first token is raised, a later one ends the response."""
        record, choice, numbered = self._record, self._choice, self._numbered
        is_first = not record.is_known
        try:
            choice.add(arrival)
        except UserError as error:
            if is_first:
                raise
            record.output.close("incomplete")
            record.note_failure(error)
            return numbered.event("response.failed", response=record.content())
        told = self._beginning() if is_first else b""
        told += b"".join([numbered.event(each.pop("type"), **each) for each in record.output.take(choice)])
        return told + self._ending() if choice.done is not None else told

    def _beginning(self) -> bytes:
        record, numbered = self._record, self._numbered
        record.is_known = True
        return numbered.event("response.created", response=record.content()) + numbered.event(
            "response.in_progress", response=record.content()
        )

    def _ending(self) -> bytes:
        self._choice.call.tell_end()
        kind = "response.completed" if self._record.status == "completed" else "response.incomplete"
        return self._numbered.event(kind, response=self._record.content())


class _Numbered:
    """Events with their type and their number in the stream."""

    def __init__(self) -> None:
        self._count = 0

    def event(self, kind: str, **content: Any) -> bytes:
        """One event, named as OpenAI's clients know it."""
        told = event({"type": kind, "sequence_number": self._count, **content})
        self._count += 1
        return b"event: " + kind.encode() + b"\n" + told


def _add_conversations(router: APIRouter, service: Service, desk: Desk) -> None:
    @router.post("/conversations", openapi_extra=takes(ConversationBody))
    async def create(request: Request, caller: Asking) -> Response:
        body = await read_body(request, ConversationBody)
        service.check_open()
        conversation = Conversation(f"conv_{uuid.uuid4().hex}", caller.tenant, body.metadata or {})
        if body.items:
            conversation.add(desk.items_of(caller.tenant, body.items, "items"))
        desk.put(conversation)
        return JsonReply(conversation.content())

    @router.get("/conversations/{conversation}")
    async def retrieve(conversation: Id, caller: Asking) -> Response:
        return JsonReply(desk.conversation(caller.tenant, conversation).content())

    @router.post("/conversations/{conversation}", openapi_extra=takes(ConversationUpdateBody))
    async def update(conversation: Id, request: Request, caller: Asking) -> Response:
        body = await read_body(request, ConversationUpdateBody)
        kept = desk.conversation(caller.tenant, conversation)
        kept.metadata = dict(body.metadata)
        desk.note_change(kept)
        return JsonReply(kept.content())

    @router.delete("/conversations/{conversation}")
    async def delete(conversation: Id, caller: Asking) -> Response:
        desk.conversations.remove(desk.conversation(caller.tenant, conversation))
        return JsonReply({"id": conversation, "object": "conversation.deleted", "deleted": True})


def _add_items(router: APIRouter, desk: Desk) -> None:
    @router.post("/conversations/{conversation}/items", openapi_extra=takes(ItemsBody))
    async def add(conversation: Id, request: Request, caller: Asking) -> Response:
        body = await read_body(request, ItemsBody)
        kept = desk.conversation(caller.tenant, conversation)
        items = desk.items_of(caller.tenant, body.items, "items", kept.line)
        kept.add(items)
        desk.note_change(kept)
        return JsonReply(list_content(items, None, len(items), "asc"))

    @router.get("/conversations/{conversation}/items")
    async def list_all(
        conversation: Id, caller: Asking, after: After = None, limit: Limit = 20, order: Order = "desc"
    ) -> Response:
        kept = desk.conversation(caller.tenant, conversation)
        return JsonReply(list_content(kept.items, after, limit, order))

    @router.get("/conversations/{conversation}/items/{item}")
    async def retrieve(conversation: Id, item: Id, caller: Asking) -> Response:
        return JsonReply(_item(desk.conversation(caller.tenant, conversation), item))

    @router.delete("/conversations/{conversation}/items/{item}")
    async def delete(conversation: Id, item: Id, caller: Asking) -> Response:
        kept = desk.conversation(caller.tenant, conversation)
        kept.remove(_item(kept, item))
        desk.note_change(kept)
        return JsonReply(kept.content())


def _item(conversation: Conversation, item_id: str) -> dict[str, Any]:
    for item in conversation.items:
        if item["id"] == item_id:
            return item
    raise NotFound(f"conversation {conversation.id!r} has no item {item_id!r}")

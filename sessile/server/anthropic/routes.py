"""/v1/messages and /v1/messages/count_tokens (docs/HTTP.md)."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sessile.server.anthropic.blocks import to_messages
from sessile.server.anthropic.bodies import CountBody, MessagesBody, PromptBody
from sessile.server.anthropic.replies import MessageReply, fault_event
from sessile.server.auth import Asking
from sessile.server.body import read_body, takes
from sessile.server.calls import Call, Order, Service, attended
from sessile.server.encoding import encode_text, render_prompt
from sessile.server.keys import Caller
from sessile.server.openai import check_model
from sessile.server.openai_replies import Choice
from sessile.server.replies import JsonReply
from sessile.server.sampling import to_sampling
from sessile.server.stream import EventStream
from sessile.server.tools import reading_of


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(prefix="/v1/messages")

    @router.post("", openapi_extra=takes(MessagesBody))
    async def messages(request: Request, caller: Asking) -> Response:
        body = await read_body(request, MessagesBody)
        service.check_open()
        check_model(service, body.model)
        choice = await _choice(service, caller, body)
        hides = body.thinking is not None and body.thinking.display == "omitted"
        reply = MessageReply(choice, service.model_name, max_tokens=body.max_tokens, hides_thinking=hides)
        if body.stream:
            return EventStream([choice.call], reply.events(), end=b"", fault=fault_event)
        async with attended(request.receive, choice.call):
            choice.add(await choice.call.next())
            return JsonReply(reply.whole())

    @router.post("/count_tokens", openapi_extra=takes(CountBody))
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountBody)
        service.check_open()
        check_model(service, body.model)
        prompt = await _prompt(service, body)
        tokens = await encode_text(service.tokenizer, prompt, add_special_tokens=False)
        return JsonReply({"input_tokens": len(tokens)})

    return router


async def _prompt(service: Service, body: PromptBody) -> str:
    """The rendered prompt; a last message of the assistant is the beginning of its answer."""
    return await render_prompt(
        service.tokenizer,
        lambda: to_messages(body.system, body.messages),
        body.variables,
        tools=body.tool_use.tools,
        may_continue=True,
    )


async def _choice(service: Service, caller: Caller, body: MessagesBody) -> Choice:
    prompt = await _prompt(service, body)
    reading = reading_of(
        service.options,
        service.tokenizer,
        body.tool_use,
        prompt,
        asked=body.grammar,
        skips_special=body.skip_special_tokens,
    )
    order = Order(
        tokens=await encode_text(service.tokenizer, prompt, add_special_tokens=False),
        sampling=to_sampling(
            body,
            max_new_tokens=body.max_tokens,
            min_new_tokens=None,
            vocab_size=service.link.ready.vocab_size,
        ),
        tenant=caller.tenant,
        priority=body.priority or 0,
        rid=body.rid,
        **body.wish,
    )
    call = Call(service, reading.of(order), whole=not body.stream)
    return Choice(0, call, service.tokenizer, trim_stop=not body.no_stop_trim, reader=reading.reader())

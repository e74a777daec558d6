"""/v1/models, /v1/completions and /v1/chat/completions, as OpenAI's clients expect them (docs/HTTP.md)."""

import uuid
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sessile.errors import NotFound
from sessile.server.auth import Asking
from sessile.server.body import read_body, takes
from sessile.server.calls import Call, Order, Service, attended
from sessile.server.encoding import Rendering, encode_text, render_messages
from sessile.server.keys import Caller
from sessile.server.link import Arrival
from sessile.server.openai_bodies import COMPLETION_TOKENS_DEFAULT, ChatBody, CompletionBody, OpenAIBody
from sessile.server.openai_replies import ChatShape, Choice, CompletionShape, Envelope, error_event
from sessile.server.replies import JsonReply
from sessile.server.sampling import check_vocabulary, to_sampling
from sessile.server.stream import EventStream
from sessile.server.tools import AnswerReading, reading_of
from sessile.text.template import check_messages


class ModelNotFound(NotFound):
    """A model that is not the one served here."""

    code = "model_not_found"


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> Response:
        return JsonReply({"object": "list", "data": [_model_content(service)]})

    @router.get("/models/{model:path}")
    async def model(model: str) -> Response:
        check_model(service, model)
        return JsonReply(_model_content(service))

    @router.post("/completions", openapi_extra=takes(CompletionBody))
    async def completions(request: Request, caller: Asking) -> Response:
        body = await read_body(request, CompletionBody)
        service.check_open()
        check_model(service, body.model)
        reply_id = body.rid or f"cmpl-{uuid.uuid4().hex}"
        choices = await _completion_choices(service, caller, body, reply_id)
        envelope = Envelope(reply_id, service.model_name, CompletionShape(service.tokenizer, body.logprobs))
        return await _reply(request, body, choices, envelope)

    @router.post("/chat/completions", openapi_extra=takes(ChatBody))
    async def chat_completions(request: Request, caller: Asking) -> Response:
        body = await read_body(request, ChatBody)
        service.check_open()
        check_model(service, body.model)
        reply_id = body.rid or f"chatcmpl-{uuid.uuid4().hex}"
        choices = await _chat_choices(service, caller, body, reply_id)
        shape = ChatShape(service.tokenizer, logprobs=bool(body.logprobs))
        return await _reply(request, body, choices, Envelope(reply_id, service.model_name, shape))

    return router


def _model_content(service: Service) -> dict[str, Any]:
    ready = service.link.ready
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "sessile",
        "root": ready.model_path,
        "max_model_len": ready.context_tokens,
    }


def check_model(service: Service, name: str | None) -> None:
    """Raise ModelNotFound unless the name is one of those of the model that is served."""
    ready = service.link.ready
    known = {"default", service.model_name, ready.model_name, ready.model_path, PurePath(ready.model_path).name}
    if name is not None and name not in known:
        raise ModelNotFound(f"model: {name!r} is not served here; {service.model_name!r} is", param="model")


async def _completion_choices(service: Service, caller: Caller, body: CompletionBody, rid: str) -> list[Choice]:
    vocab_size = service.link.ready.vocab_size
    max_tokens = COMPLETION_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens
    prompts = body.prompts
    choices: list[Choice] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            tokens, text = await encode_text(service.tokenizer, prompt), prompt
        else:
            check_vocabulary(prompt, vocab_size, "prompt")
            tokens, text = prompt, service.tokenizer.decode(prompt) if body.echo else ""
        order = Order(
            tokens=tokens,
            input_field="prompt",
            sampling=to_sampling(
                body, max_new_tokens=max_tokens, min_new_tokens=body.min_tokens, vocab_size=vocab_size
            ),
            tenant=caller.tenant,
            priority=body.priority or 0,
            rid=rid if len(prompts) == 1 else f"{rid}-{index}",
            logprobs=-1 if body.logprobs is None else body.logprobs,
            prompt_logprobs_from=0 if body.echo and body.logprobs is not None else -1,
            grammar=body.grammar,
            **body.wish,
        )
        choices += _choices(service, body, order, first_index=len(choices), echo=text if body.echo else "")
    return choices


def _choices(
    service: Service,
    body: OpenAIBody,
    order: Order,
    *,
    first_index: int = 0,
    echo: str = "",
    reading: AnswerReading | None = None,
) -> list[Choice]:
    """The answers to one prompt: the first one computes it, the others start from what it computed."""
    trim = not body.no_stop_trim
    return [
        Choice(
            index,
            Call(service, each, whole=not body.stream),
            service.tokenizer,
            trim_stop=trim,
            echo=echo,
            leads=index == first_index,
            reader=reading.reader() if reading else None,
        )
        for index, each in enumerate(service.answers(order, body.answers), first_index)
    ]


async def _chat_choices(service: Service, caller: Caller, body: ChatBody, rid: str) -> list[Choice]:
    order = Order(
        tokens=[],
        input_field="messages",
        sampling=to_sampling(
            body,
            max_new_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            min_new_tokens=body.min_tokens,
            vocab_size=service.link.ready.vocab_size,
        ),
        tenant=caller.tenant,
        priority=body.priority or 0,
        rid=rid,
        rid_drawn=body.rid is None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        **body.wish,
    )
    if body.session_id is not None:
        return [await _turn_choice(service, caller, body, order)]
    prompt = await render_messages(
        service.tokenizer, body.messages, body.chat_template_kwargs, tools=body.tool_use.tools
    )
    tokens = await encode_text(service.tokenizer, prompt, add_special_tokens=False)
    reading = _reading(service, body, prompt)
    return _choices(service, body, reading.of(replace(order, tokens=tokens)), reading=reading)


def _reading(service: Service, body: ChatBody, prompt: str) -> AnswerReading:
    return reading_of(
        service.options,
        service.tokenizer,
        body.tool_use,
        prompt,
        asked=body.grammar,
        skips_special=body.skip_special_tokens,
        separates_reasoning=body.separate_reasoning is not False,
        streams_reasoning=body.stream_reasoning is not False,
    )


async def _turn_choice(service: Service, caller: Caller, body: ChatBody, order: Order) -> Choice:
    """The answer to messages of which a session's turns have some: what they lack is its next turn."""
    assert body.session_id is not None
    messages, variables, tools = check_messages(body.messages), body.chat_template_kwargs, body.tool_use.tools
    rendering = Rendering(service.tokenizer, variables=variables, tools=tools)
    _reading(service, body, "")  # what it refuses is refused before a place is taken
    dialogues = service.dialogues
    dialogue = await dialogues.named(caller.tenant, body.session_id) if dialogues.keeps_kv else None
    place = await dialogues.place(dialogue, messages, rendering, beside=[variables, tools] if tools else variables)
    session = place.dialogue.session if place.dialogue else None
    try:
        reading = _reading(service, body, rendering.prompt)
        order = replace(order, tokens=place.tokens, session=session, branch=place.branch)
        (choice,) = _choices(service, body, reading.of(order), reading=reading)
    except BaseException:
        dialogues.give_back(place)
        raise

    def note_end() -> None:
        dialogues.end(place, choice.call, choice.message, keep=True)

    choice.call.at_end = note_end
    return choice


async def _reply(request: Request, body: OpenAIBody, choices: list[Choice], envelope: Envelope) -> Response:
    """The answer to checked choices, whole or as a stream."""
    calls = [choice.call for choice in choices]
    if body.stream:

        def tell(index: int, arrival: Arrival) -> bytes:
            flags = {"include_usage": body.include_usage, "counts_on": body.counts_on}
            return envelope.events(choices, choices[index], arrival, **flags)

        return EventStream(calls, tell, fault=error_event)
    async with attended(request.receive, *calls):
        for choice in choices:
            choice.add(await choice.call.next())
        return JsonReply(envelope.whole(choices))

"""/v1/models, /v1/completions and /v1/chat/completions, as OpenAI's clients expect them (docs/HTTP.md)."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sessile.errors import NotFound, UserError
from sessile.server.auth import Asking
from sessile.server.body import read_body, takes
from sessile.server.calls import Call, Order, Service, attended
from sessile.server.encoding import encode_text, render_messages
from sessile.server.keys import Caller
from sessile.server.link import Arrival
from sessile.server.openai_bodies import COMPLETION_TOKENS_DEFAULT, ChatBody, CompletionBody, OpenAIBody
from sessile.server.openai_replies import ChatShape, Choice, CompletionShape, Envelope, Shape, error_chunk, usage
from sessile.server.replies import JsonReply
from sessile.server.sampling import check_vocabulary, to_sampling
from sessile.server.stream import EventStream, event
from sessile.server.tools import answer_format, bound_answer, seen_sampling


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
        choices = await _completion_choices(service, caller, body)
        return await _reply(service, request, body, choices, CompletionShape(service.tokenizer, body.logprobs))

    @router.post("/chat/completions", openapi_extra=takes(ChatBody))
    async def chat_completions(request: Request, caller: Asking) -> Response:
        body = await read_body(request, ChatBody)
        service.check_open()
        check_model(service, body.model)
        choice = await _chat_choice(service, caller, body)
        return await _reply(
            service, request, body, [choice], ChatShape(service.tokenizer, logprobs=bool(body.logprobs))
        )

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
    """Raise ModelNotFound unless the name is one of the served model's."""
    ready = service.link.ready
    known = {"default", service.model_name, ready.model_name, ready.model_path, PurePath(ready.model_path).name}
    if name is not None and name not in known:
        raise ModelNotFound(f"model: {name!r} is not served here; {service.model_name!r} is", param="model")


async def _completion_choices(service: Service, caller: Caller, body: CompletionBody) -> list[Choice]:
    vocab_size = service.link.ready.vocab_size
    max_tokens = COMPLETION_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens
    prompts = body.prompts
    rid = body.rid or f"cmpl-{uuid.uuid4().hex}"
    choices = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            tokens, text = await encode_text(service.tokenizer, prompt), prompt
        else:
            check_vocabulary(prompt, vocab_size, "prompt")
            tokens, text = prompt, service.tokenizer.decode(prompt) if body.echo else ""
        order = Order(
            tokens=tokens,
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
        call = Call(service, order, whole=not body.stream)
        trim = not body.no_stop_trim
        choices.append(Choice(index, call, service.tokenizer, trim_stop=trim, echo=text if body.echo else ""))
    return choices


async def _chat_choice(service: Service, caller: Caller, body: ChatBody) -> Choice:
    use = body.tool_use
    form = answer_format(service.options, service.tokenizer, use)
    prompt = await render_messages(service.tokenizer, body.messages, body.chat_template_kwargs, tools=use.tools)
    grammar, form = bound_answer(use, form, service.tokenizer, prompt, body.grammar)
    sampling = to_sampling(
        body,
        max_new_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        min_new_tokens=body.min_tokens,
        vocab_size=service.link.ready.vocab_size,
    )
    if body.skip_special_tokens is None:
        sampling = seen_sampling(sampling, form, use, service.tokenizer)
    order = Order(
        tokens=await encode_text(service.tokenizer, prompt, add_special_tokens=False),
        sampling=sampling,
        tenant=caller.tenant,
        priority=body.priority or 0,
        rid=body.rid or f"chatcmpl-{uuid.uuid4().hex}",
        logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        grammar=grammar,
        **body.wish,
    )
    call = Call(service, order, whole=not body.stream)
    reader = form.reader(
        prompt,
        tool_names=use.names,
        is_parallel=use.is_parallel,
        separates_reasoning=body.separate_reasoning is not False,
        streams_reasoning=body.stream_reasoning is not False,
    )
    return Choice(0, call, service.tokenizer, trim_stop=not body.no_stop_trim, reader=reader)


async def _reply(service: Service, request: Request, body: OpenAIBody, choices: list[Choice], shape: Shape) -> Response:
    """The answer to checked choices, whole or as a stream."""
    calls = [choice.call for choice in choices]
    reply_id = calls[0].rid if len(calls) == 1 else calls[0].rid.removesuffix("-0")
    envelope = Envelope(reply_id, service.model_name, shape)
    if body.stream:
        return EventStream(calls, _events(choices, shape, envelope, include_usage=body.include_usage))
    async with attended(request.receive, *calls):
        for choice in choices:
            choice.add(await choice.call.next())
        return JsonReply(envelope.whole(choices))


async def _events(
    choices: list[Choice], shape: Shape, envelope: Envelope, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Chunks as they come. An error before the first one is raised, a later one is an event, which ends the stream."""
    more = {"usage": None} if include_usage else {}
    started = False
    async for index, arrival in _arrivals([choice.call for choice in choices]):
        choice = choices[index]
        try:
            choice.add(arrival)
        except UserError as error:
            if not started:
                raise
            yield event(error_chunk(error))
            return
        for content in shape.chunks(choice):
            started = True
            yield event(envelope.chunk([content], **more))
    if include_usage:
        yield event(envelope.chunk([], usage=usage(choices)))


async def _arrivals(calls: Sequence[Call]) -> AsyncIterator[tuple[int, Arrival]]:
    """What comes for any of the calls, until all have ended."""
    if len(calls) == 1:
        while calls[0].done is None:
            yield 0, await calls[0].next()
        return
    pending = {asyncio.create_task(call.next()): index for index, call in enumerate(calls)}
    try:
        while pending:
            arrived, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in arrived:
                index = pending.pop(task)
                yield index, task.result()
                if calls[index].done is None:
                    pending[asyncio.create_task(calls[index].next())] = index
    finally:
        for task in pending:
            task.cancel()

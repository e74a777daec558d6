"""POST /generate: the native surface, as SGLang has it (docs/HTTP.md)."""

from typing import Any, ClassVar, Literal, Self

import orjson
from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from sessile.contract.messages import Branch, Done
from sessile.errors import InvalidRequest
from sessile.server.auth import Asking
from sessile.server.body import ANYTHING, Body, TokenIds, Tolerated, field_fault, read_body, takes
from sessile.server.calls import Call, Order, Service, attended
from sessile.server.drafts import DraftFields, draft_figures
from sessile.server.encoding import encode_text
from sessile.server.grammars import NativeGrammarFields
from sessile.server.keys import Caller
from sessile.server.link import Arrival
from sessile.server.output import Logprobs, Output
from sessile.server.replies import JsonReply, engine_refusal
from sessile.server.sampling import (
    COUNT_MAX,
    LOGPROBS_MAX,
    Answers,
    Count,
    Priority,
    SamplingFields,
    check_vocabulary,
    to_sampling,
)
from sessile.server.stream import EventStream, event, one_line

ID_CHARS_MAX = 256


class SamplingParams(SamplingFields, NativeGrammarFields):
    """sampling_params of /generate."""

    max_new_tokens: Count | None = 128
    """null: as many as the context leaves."""
    min_new_tokens: Count | None = None
    n: Answers | None = None
    """How many answers; the i-th from 0 on has the seed plus i. More than one: the reply is a list of them."""

    tolerated: ClassVar[Tolerated] = {
        "spaces_between_special_tokens": (True,),
        "structural_tag": (),
        "custom_params": (),
        "stream_interval": (),
    }


class SessionParams(Body):
    """session_params of /generate: the session whose next turn this is, and in a branching one where it goes on."""

    id: str = Field(min_length=1, max_length=ID_CHARS_MAX)
    expect_tokens: Count | None = None
    """What the client believes the history's length to be; the turn is refused with 409 if it is another."""

    rid: str | None = Field(default=None, max_length=ID_CHARS_MAX)
    """The turn to go on from; null or empty: a new root. Ignored in a streaming session, where there is no choice."""
    offset: int | None = Field(default=None, ge=-COUNT_MAX, le=COUNT_MAX)
    replace: bool | None = None
    drop_previous_output: bool | None = None

    @property
    def branch(self) -> Branch:
        """Where the turn goes on. Whether the session has any such choice is the engine's to say."""
        return Branch(
            parent=self.rid or None,
            offset=self.offset or 0,
            replace=bool(self.replace),
            drop_previous_output=bool(self.drop_previous_output),
        )


class GenerateBody(DraftFields):
    """The body of /generate."""

    text: str | None = None
    input_ids: TokenIds | None = None
    sampling_params: SamplingParams | None = None
    stream: bool | None = None
    stream_output: Literal["cumulative", "delta"] | None = None
    rid: str | None = Field(default=None, min_length=1, max_length=ID_CHARS_MAX)
    return_logprob: bool | None = None
    logprob_start_len: int | None = Field(default=None, ge=-1, le=COUNT_MAX)
    top_logprobs_num: int | None = Field(default=None, ge=0, le=LOGPROBS_MAX)
    return_text_in_logprobs: bool | None = None
    session_params: SessionParams | None = None
    priority: Priority | None = None

    tolerated: ClassVar[Tolerated] = {
        "token_ids_logprob": ([],),
        "input_embeds": (),
        "image_data": ([],),
        "video_data": ([],),
        "audio_data": ([],),
        "modalities": ([], ["text"]),
        "lora_path": (),
        "lora_id": (),
        "custom_logit_processor": (),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "return_bytes": (False,),
        "return_entropy": (False,),
        "background": (False,),
        "extra_key": (),
        "conversation_id": (),
        "data_parallel_rank": (),
        "bootstrap_host": (),
        "bootstrap_port": (),
        "bootstrap_room": (),
        "log_metrics": ANYTHING,
        "no_logs": ANYTHING,
        "custom_labels": ANYTHING,
        "external_trace_header": ANYTHING,
    }

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if self.text is None and self.input_ids is None and self.session_params is None:
            raise field_fault("text", "text or input_ids is required")
        if self.text is not None and self.input_ids is not None:
            raise field_fault("input_ids", "give text or input_ids, not both")
        if not self.text and not self.input_ids and self.session_params is None:
            raise field_fault("text" if self.input_ids is None else "input_ids", "the prompt must not be empty")
        if self.session_params is not None and self.answers > 1:
            raise field_fault("sampling_params.n", "a turn of a session has one answer; branch for others")
        if not self.return_logprob:
            for name in ("logprob_start_len", "top_logprobs_num", "return_text_in_logprobs"):
                if getattr(self, name) not in (None, False, 0, -1):
                    raise field_fault(name, "needs return_logprob: true")
        return self

    @property
    def answers(self) -> int:
        """How many answers are wanted."""
        return (self.sampling_params.n if self.sampling_params else None) or 1


def routes(service: Service) -> APIRouter:
    """The route of this module."""
    router = APIRouter()

    @router.post("/generate", openapi_extra=takes(GenerateBody))
    async def generate(request: Request, caller: Asking) -> Response:
        body = await read_body(request, GenerateBody)
        service.check_open()
        order = await _order(service, caller, body)
        replies = [
            _Reply(service, body, Call(service, each, whole=not body.stream), index if body.answers > 1 else None)
            for index, each in enumerate(service.answers(order, body.answers))
        ]
        calls = [reply.call for reply in replies]
        if body.stream:
            return EventStream(calls, lambda index, arrival: replies[index].tell(arrival))
        async with attended(request.receive, *calls):
            contents = [await reply.whole() for reply in replies]
        return JsonReply(contents if len(contents) > 1 else contents[0])

    return router


async def _order(service: Service, caller: Caller, body: GenerateBody) -> Order:
    params = body.sampling_params or SamplingParams()
    vocab_size = service.link.ready.vocab_size
    if body.input_ids is None:
        tokens = await encode_text(service.tokenizer, body.text or "")  # a turn may send nothing
    else:
        check_vocabulary(body.input_ids, vocab_size, "input_ids")
        tokens = body.input_ids
    sampling = to_sampling(
        params,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        vocab_size=vocab_size,
    )
    start = -1 if body.logprob_start_len is None else body.logprob_start_len
    if start >= len(tokens) and body.session_params is None:
        raise InvalidRequest(
            f"logprob_start_len: {start} is not below the prompt's {len(tokens)} tokens", param="logprob_start_len"
        )
    return Order(
        tokens=tokens,
        input_field="text" if body.input_ids is None else "input_ids",
        sampling=sampling,
        tenant=caller.tenant,
        priority=body.priority or 0,
        rid=body.rid,
        session=body.session_params.id if body.session_params else None,
        branch=body.session_params.branch if body.session_params else None,
        expect_tokens=_expected(body.session_params),
        logprobs=(body.top_logprobs_num or 0) if body.return_logprob else -1,
        prompt_logprobs_from=start if body.return_logprob else -1,
        grammar=params.grammar_in("sampling_params."),
        **body.wish,
    )


def _expected(session: SessionParams | None) -> int:
    return -1 if session is None or session.expect_tokens is None else session.expect_tokens


class _Reply:
    """The JSON of one call, at its end or event by event. index: among several answers; None: it is the only one."""

    def __init__(self, service: Service, body: GenerateBody, call: Call, index: int | None = None) -> None:
        self.call = call
        self._body = body
        self._index = index
        self._is_delta = body.stream_output == "delta"
        self._frame: tuple[bytes, bytes] | None = None
        self._tokenizer = service.tokenizer
        params = body.sampling_params or SamplingParams()
        self._output = Output(service.tokenizer, call.order.sampling, trim_stop=not params.no_stop_trim)

    async def whole(self) -> dict[str, Any]:
        """Wait for the end. Raises UserError if the engine refused the request or it failed."""
        arrival = await self.call.next()
        assert arrival.done is not None
        if arrival.done.reason == "error":
            done = arrival.done
            raise engine_refusal(done.status, done.code, done.message, done.param)
        self._output.add(arrival)
        return self._content(arrival.done, self._output.text, 0)

    def tell(self, arrival: Arrival) -> bytes:
        """What an arrival says: text and ids so far, or with stream_output "delta" the new ones; may be nothing."""
        output = self._output
        start = len(output.tokens) if self._is_delta else 0
        fresh = output.add(arrival)
        text = fresh if self._is_delta else output.text
        if arrival.done is None:
            if not arrival.tokens:
                return b""
            if not self._body.return_logprob:
                return self._running_event(text, start)
        content = self._content(arrival.done, text, start)
        return event(content if self._index is None else content | {"index": self._index})

    def _running_event(self, text: str, start: int) -> bytes:
        """The event of `_content` before the end: it is most of a stream, and of it only this changes."""
        if self._frame is None:
            running = orjson.dumps(self._content(None, "", 0)["meta_info"] | {"completion_tokens": None})
            closing = b"}}" if self._index is None else b'},"index":%d}' % self._index
            self._frame = one_line(b',"meta_info":' + running.removesuffix(b"null}")), closing + b"\n\n"
        opening, closing = self._frame
        tokens = self._output.tokens
        told, ids = one_line(orjson.dumps(text)), orjson.dumps(tokens[start:] if start else tokens)
        return b'data: {"text":%b,"output_ids":%b%b%d%b' % (told, ids, opening, len(tokens), closing)

    def _content(self, done: Done | None, text: str, start: int) -> dict[str, Any]:
        """The reply with output tokens from index start on."""
        output = self._output
        order = self.call.order
        meta: dict[str, Any] = {
            "id": self.call.rid,
            "finish_reason": None if done is None else finish_reason(done),
            "prompt_tokens": done.prompt_tokens if done else None if order.session else len(order.tokens),
            "cached_tokens": done.cached_tokens if done else None,
            "completion_tokens": len(output.tokens),
        }
        if done is not None:
            meta["e2e_latency"] = self.call.seconds
            if done.session_tokens >= 0:
                meta["session_tokens"] = done.session_tokens
            meta |= draft_figures(done)
        if self._body.return_logprob:
            meta |= self._logprobs(start)
        return {"text": text, "output_ids": output.tokens[start:], "meta_info": meta}

    def _logprobs(self, start: int) -> dict[str, Any]:
        prompt = self._output.prompt_logprobs(self.call.order)
        generated = self._output.generated.since(start)
        named = {"input": prompt, "output": generated}
        lists = {f"{side}_token_logprobs": self._triples(logprobs) for side, logprobs in named.items()}
        if self._body.top_logprobs_num:
            for side, logprobs in named.items():
                lists[f"{side}_top_logprobs"] = [
                    [[value, token, self._text_of(token)] for token, value in tops] or None for tops in logprobs.tops
                ]
        return lists

    def _triples(self, logprobs: Logprobs) -> list[Any]:
        return [
            [value, token, self._text_of(token)]
            for value, token in zip(logprobs.logprobs, logprobs.tokens, strict=True)
        ]

    def _text_of(self, token: int) -> str | None:
        if not self._body.return_text_in_logprobs:
            return None
        return self._tokenizer.decode([token], skip_special_tokens=False)


def finish_reason(done: Done) -> dict[str, Any]:
    """SGLang's finish_reason object. A request that was refused or failed is an abort with its status."""
    if done.reason == "stop":
        matched = done.matched.decode(errors="replace") if isinstance(done.matched, bytes) else done.matched
        return {"type": "stop", "matched": matched}
    if done.reason == "length":
        return {"type": "length", "length": done.completion_tokens}
    status = engine_refusal(done.status, done.code, done.message).status
    return {"type": "abort", "message": done.message, "status_code": None if status == 200 else status}

"""Replies of the OpenAI-compatible routes: whole, and chunk by chunk."""

import time
import uuid
from typing import Any, Protocol

import orjson

from sessile.contract.messages import Done
from sessile.errors import UserError
from sessile.server.calls import Call
from sessile.server.link import Arrival
from sessile.server.output import NO_LOGPROBS, Logprobs, Output
from sessile.server.replies import engine_refusal
from sessile.server.stream import event, one_line
from sessile.server.tools import parsed_arguments
from sessile.text.answer.events import (
    Answer,
    CallArguments,
    CallBegan,
    CallEnded,
    CallFailed,
    Content,
    Event,
    Reasoning,
)
from sessile.text.answer.reader import AnswerReader
from sessile.text.template import Message
from sessile.text.tokenizer import Tokenizer
from sessile.text.tools import CalledFunction, CallMessage

LEAST_LOGPROB = -9999.0
"""What OpenAI's API writes for a token that cannot occur; JSON has no infinity."""


class Choice:
    """One answer to a prompt as it grows. echo: text of the prompt that is repeated before it.

    leads: whether it is the first one to its prompt, whose tokens count once however many answers there are. reader:
    of a chat's answer; None: all of it is text, and nobody asks for its parts.
    """

    def __init__(
        self,
        index: int,
        call: Call,
        tokenizer: Tokenizer,
        *,
        trim_stop: bool,
        echo: str = "",
        leads: bool = True,
        reader: AnswerReader | None = None,
    ) -> None:
        self.index = index
        self.leads = leads
        self.call = call
        self.answer = Answer()
        """All that the reader has read so far."""
        self.output = Output(tokenizer, call.order.sampling, trim_stop=trim_stop)
        self.done: Done | None = None
        self._unsent_text = echo
        self._echoes = bool(echo)
        self._sent_logprobs = 0
        self._reader = reader
        self._untold: list[Event] = []
        self._call_ids: dict[int, str] = {}

    def add(self, arrival: Arrival) -> None:
        """Take an arrival. Raises UserError if the engine refused the request or it failed."""
        done = arrival.done
        if done is not None and done.reason == "error":
            raise engine_refusal(done.status, done.code, done.message, done.param)
        fresh = self.output.add(arrival)
        self._unsent_text += fresh
        self.done = done
        if self._reader is None:
            return
        for each in self._reader.push(fresh) if done is None else self._reader.finish(fresh):
            self.answer.add(each)
            self._untold.append(each)

    def take(self) -> tuple[str, Logprobs]:
        """Text and log-probabilities that were not taken yet; those of a token that ended the answer are among them."""
        text, self._unsent_text = self._unsent_text, ""
        if self.call.order.logprobs < 0:
            return text, NO_LOGPROBS
        fresh = self.output.generated.since(self._sent_logprobs)
        first = self._sent_logprobs == 0
        self._sent_logprobs += len(fresh.tokens)
        if first and self._echoes:
            fresh = self.output.prompt_logprobs(self.call.order).followed_by(fresh)
        return text, fresh

    def take_answer(self) -> tuple[list[Event], Logprobs]:
        """Parts of the answer and log-probabilities that were not taken yet, without those of a token that ended it."""
        events, self._untold = self._untold, []
        fresh = self.take()[1]
        if self.done is not None and isinstance(self.done.matched, int):
            fresh = Logprobs(fresh.tokens[:-1], fresh.logprobs[:-1], fresh.tops[:-1])  # no part of the text
        return events, fresh

    def call_id(self, index: int) -> str:
        """What a call is known by, to whoever is told of it and sends it back."""
        return self._call_ids.setdefault(index, f"call_{uuid.uuid4().hex}")

    @property
    def knows_reasoning(self) -> bool:
        """Whether reasoning would be told apart if there were any."""
        return self._reader is not None and self._reader.knows_reasoning

    @property
    def reasoning_tokens(self) -> int:
        """How many of its tokens are reasoning."""
        return self.output.tokens_within(self._reader.reasoning_bytes) if self._reader else 0

    @property
    def message(self) -> Message:
        """The answer as the client was sent it, and as it will send it back."""
        content = self.answer.content if self._reader else self.output.text
        message = Message(role="assistant", content=content)
        if self.answer.reasoning:
            message["reasoning_content"] = self.answer.reasoning
        if self.answer.calls:
            message["tool_calls"] = [
                CallMessage(
                    id=self.call_id(call.index),
                    type="function",
                    function=CalledFunction(name=call.name, arguments=parsed_arguments(call.arguments)),
                )
                for call in self.answer.calls
            ]
        return message

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" or "abort"; None before the end."""
        return self.done.reason if self.done else None

    @property
    def matched_stop(self) -> int | str | None:
        """The stop string or token that ended the answer."""
        matched = self.done.matched if self.done else None
        return matched.decode(errors="replace") if isinstance(matched, bytes) else matched


class Shape(Protocol):
    """How a route writes its choices."""

    whole_object: str
    chunk_object: str

    def whole(self, choice: Choice) -> dict[str, Any]:
        """An ended choice."""
        ...

    def chunks(self, choice: Choice) -> list[dict[str, Any]]:
        """What is new of a choice; its end if it has ended."""
        ...


class CompletionShape:
    """/v1/completions. logprobs: number of alternatives wanted, or None."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, choice: Choice) -> dict[str, Any]:
        """See Shape."""
        text, logprobs = choice.take()
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._logprobs_content(choice.index, logprobs),
            "finish_reason": choice.finish_reason,
            "matched_stop": choice.matched_stop,
        }

    def chunks(self, choice: Choice) -> list[dict[str, Any]]:
        """See Shape."""
        content = self.whole(choice)
        is_new = content["text"] or choice.done or (content["logprobs"] and content["logprobs"]["tokens"])
        return [content] if is_new else []

    def _logprobs_content(self, index: int, logprobs: Logprobs) -> dict[str, Any]:
        pieces = [piece_text(self._tokenizer, token) for token in logprobs.tokens]
        offset = self._offsets.get(index, 0)
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece)
        self._offsets[index] = offset
        tops = [
            {piece_text(self._tokenizer, token): finite(value) for token, value in pairs}
            if value_of_token is not None
            else None
            for pairs, value_of_token in zip(logprobs.tops, logprobs.logprobs, strict=True)
        ]
        return {
            "tokens": pieces,
            "token_logprobs": [finite(value) for value in logprobs.logprobs],
            "top_logprobs": tops if self._logprobs else None,
            "text_offset": offsets,
        }


class ChatShape:
    """/v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def whole(self, choice: Choice) -> dict[str, Any]:
        """See Shape."""
        _, logprobs = choice.take_answer()
        answer = choice.answer
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        message["content"] = answer.content or (None if answer.calls else "")
        if choice.knows_reasoning:
            message["reasoning_content"] = answer.reasoning or None
        if answer.calls:
            message["tool_calls"] = [_call(choice, call.index, call.name, call.arguments) for call in answer.calls]
        return {**self._content(choice, "message", message, logprobs), **self._end(choice)}

    def chunks(self, choice: Choice) -> list[dict[str, Any]]:
        """See Shape: first the role, then what is said, and the end by itself, as OpenAI's API does."""
        events, logprobs = choice.take_answer()
        chunks = []
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            chunks.append(self._content(choice, "delta", {"role": "assistant", "content": ""}, Logprobs()))
        said = [delta for each in events if (delta := self._delta(choice, each)) is not None]
        if self._logprobs and logprobs.tokens and not said:
            said = [{"content": ""}]
        for delta in said:  # the tokens of a step are told together, whatever they came to
            chunks.append(self._content(choice, "delta", delta, logprobs))
            logprobs = Logprobs()
        if choice.done is not None:
            chunks.append({**self._content(choice, "delta", {}, Logprobs()), **self._end(choice)})
        return chunks

    def _content(self, choice: Choice, field: str, message: dict[str, Any], logprobs: Logprobs) -> dict[str, Any]:
        scored = self._logprobs and logprobs.tokens
        return {
            "index": choice.index,
            field: message,
            "logprobs": {"content": self._logprobs_content(logprobs), "refusal": None} if scored else None,
            "finish_reason": None,
        }

    def _delta(self, choice: Choice, event: Event) -> dict[str, Any] | None:
        """What a stream says of an event; None if nothing."""
        match event:
            case Reasoning(text):
                return {"reasoning_content": text}
            case Content(text) | CallFailed(_, text, _):
                return {"content": text}
            case CallBegan(index, name):
                return {"tool_calls": [{"index": index, **_call(choice, index, name, "")}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallEnded():
                return None

    def _end(self, choice: Choice) -> dict[str, Any]:
        answer = choice.answer
        reason = "tool_calls" if answer.calls and choice.finish_reason == "stop" else choice.finish_reason
        end: dict[str, Any] = {"finish_reason": reason, "matched_stop": choice.matched_stop}
        if answer.failures:
            end["tool_call_errors"] = call_errors(answer)
        return end

    def _logprobs_content(self, logprobs: Logprobs) -> list[dict[str, Any]]:
        return [
            {**self._token(token, value), "top_logprobs": [self._token(*pair) for pair in pairs]}
            for token, value, pairs in zip(logprobs.tokens, logprobs.logprobs, logprobs.tops, strict=True)
        ]

    def _token(self, token: int, value: float | None) -> dict[str, Any]:
        piece = piece_bytes(self._tokenizer, token)
        return {"token": piece.decode(errors="replace"), "logprob": finite(value), "bytes": list(piece)}


class Envelope:
    """What stands around choices: identity, and usage where it is due."""

    def __init__(self, reply_id: str, model: str, shape: Shape) -> None:
        self.shape = shape
        self._common = {"id": reply_id, "created": int(time.time()), "model": model}
        chunk = orjson.dumps({**self._common, "object": shape.chunk_object, "choices": []})
        self._opening = b"data: " + one_line(chunk.removesuffix(b"]}"))

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The reply of ended choices."""
        written = [self.shape.whole(choice) for choice in choices]
        return {**self._common, "object": self.shape.whole_object, "choices": written, "usage": usage(choices)}

    def events(
        self, choices: list[Choice], choice: Choice, arrival: Arrival, *, include_usage: bool, counts_on: bool
    ) -> bytes:
        """The chunks of a stream for what came for one of its choices. Raises UserError as `Choice.add` does.

        include_usage: the stream ends with its usage; counts_on: every chunk has its answer's so far.
        """
        choice.add(arrival)
        if choice.done is not None:
            choice.call.tell_end()
        closing = b"]}\n\n"
        if include_usage:
            closing = b'],"usage":%b}\n\n' % (orjson.dumps(usage_so_far(choice)) if counts_on else b"null")
        told = [
            self._opening + one_line(orjson.dumps(content)) + closing for content in self.shape.chunks(choice)
        ]
        if include_usage and all(each.done is not None for each in choices):
            told.append(b'%b],"usage":%b}\n\n' % (self._opening, orjson.dumps(usage(choices))))
        return b"".join(told)


def usage(choices: list[Choice]) -> dict[str, Any]:
    """Tokens of all choices, of each prompt once; cached_tokens are those whose KV was there already."""
    ends = [choice.done for choice in choices if choice.done is not None]
    leaders = [choice.done for choice in choices if choice.done is not None and choice.leads]
    prompt_tokens = sum(done.prompt_tokens for done in leaders)
    completion_tokens = sum(done.completion_tokens for done in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(done.cached_tokens for done in leaders)},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }


def usage_so_far(choice: Choice) -> dict[str, Any]:
    """Tokens of one answer that is not a session's turn, whether it has ended or not; what was cached is told last."""
    prompt_tokens, completion_tokens = len(choice.call.order.tokens), len(choice.output.tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def call_errors(answer: Answer) -> list[dict[str, Any]]:
    """What looked like calls and was none: their text is content. index: of one that a stream had begun, or None."""
    return [{"index": failure.index, "message": failure.reason} for failure in answer.failures]


def _call(choice: Choice, index: int, name: str, arguments: str) -> dict[str, Any]:
    return {"id": choice.call_id(index), "type": "function", "function": {"name": name, "arguments": arguments}}


def error_event(error: UserError) -> bytes:
    """An error in the middle of a stream."""
    return event(
        {"error": {"message": error.message, "type": "server_error", "param": error.param, "code": error.code}}
    )


def piece_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What one token adds to the text, special tokens spelled out."""
    return tokenizer.vocabulary.join((token,), skip_special_tokens=False)


def piece_text(tokenizer: Tokenizer, token: int) -> str:
    """The same as text; part of a character is U+FFFD."""
    return piece_bytes(tokenizer, token).decode(errors="replace")


def finite(value: float | None) -> float | None:
    """A log-probability as JSON can hold it."""
    return None if value is None else max(value, LEAST_LOGPROB)

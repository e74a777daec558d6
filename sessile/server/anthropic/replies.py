"""Replies of /v1/messages: whole, and event by event."""

import uuid
from typing import Any

import orjson

from sessile.contract.messages import Done
from sessile.errors import UserError
from sessile.server.link import Arrival
from sessile.server.openai_replies import Choice, call_errors
from sessile.server.replies import Surface, error_content
from sessile.server.stream import one_line
from sessile.text.answer.events import (
    CallArguments,
    CallBegan,
    CallEnded,
    CallFailed,
    Content,
    Event,
    Reasoning,
)

Block = dict[str, Any]


class MessageReply:
    """One answer in Anthropic's shape. max_tokens: what the request allowed; hides_thinking: display is "omitted"."""

    def __init__(self, choice: Choice, model: str, *, max_tokens: int, hides_thinking: bool) -> None:
        self._choice = choice
        self._max_tokens = max_tokens
        self._hides_thinking = hides_thinking
        self._common = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._blocks = _OpenBlocks(hides_thinking=hides_thinking)
        self._has_begun = False

    def whole(self) -> dict[str, Any]:
        """The message of an ended call."""
        done = self._ended()
        blocks: list[Block] = []
        arguments = ""
        for each in self._take():
            match each:
                case Reasoning(text):
                    _grow(blocks, "thinking", "" if self._hides_thinking else text, signature="")
                case Content(text):
                    _grow(blocks, "text", text)
                case CallBegan(_, name):
                    blocks.append(_call(name))
                    arguments = ""
                case CallArguments(_, text):
                    arguments += text
                case CallEnded():
                    # As the model wrote it: a number may have more digits than orjson writes.
                    blocks[-1]["input"] = orjson.Fragment(arguments)
                case CallFailed(index, text, _):
                    if index is not None:
                        blocks.pop()
                    _grow(blocks, "text", text)
        return {**self._common, "content": blocks, **self._end(done), "usage": self._usage(done)}

    def events(self, arrival: Arrival) -> bytes:
        """The message's events as it grows. Raises UserError if the engine refused the request or it failed."""
        self._choice.add(arrival)
        told: list[dict[str, Any]] = []
        if not self._has_begun:
            self._has_begun = True
            told.append({"type": "message_start", "message": self._begun()})
        for each in self._take():
            told += self._blocks.tell(each)
        if (done := self._choice.done) is not None:
            told += self._blocks.close()
            told.append({"type": "message_delta", "delta": self._end(done), "usage": self._usage(done)})
            told.append({"type": "message_stop"})
        return b"".join(map(_event, told))

    def _take(self) -> list[Event]:
        return self._choice.take_answer()[0]

    def _ended(self) -> Done:
        assert self._choice.done is not None
        return self._choice.done

    def _begun(self) -> dict[str, Any]:
        tokens = len(self._choice.call.order.tokens)
        usage = {"input_tokens": tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {
            **self._common,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage, "output_tokens": 0},
        }

    def _end(self, done: Done) -> dict[str, Any]:
        """Why the answer ended."""
        matched, reason = None, "end_turn"
        if done.reason == "length":
            reached = done.completion_tokens >= self._max_tokens
            reason = "max_tokens" if reached else "model_context_window_exceeded"
        elif isinstance(done.matched, bytes):
            matched, reason = done.matched.decode(errors="replace"), "stop_sequence"
        elif done.reason == "abort":
            # A reason that Anthropic does not have: an error of any status that fits would have clients ask again for
            # what they, or the operator, have just ended.
            reason = "abort"
        elif self._choice.answer.calls:
            reason = "tool_use"
        end: dict[str, Any] = {"stop_reason": reason, "stop_sequence": matched}
        if self._choice.answer.failures:
            end["tool_call_errors"] = call_errors(self._choice.answer)
        return end

    def _usage(self, done: Done) -> dict[str, Any]:
        return {
            "input_tokens": done.prompt_tokens - done.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": done.cached_tokens,
            "output_tokens": done.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._choice.reasoning_tokens},
        }


class _OpenBlocks:
    """The blocks of a stream, one open at a time."""

    def __init__(self, *, hides_thinking: bool) -> None:
        self._hides_thinking = hides_thinking
        self._index = -1
        self._open = ""

    def tell(self, event: Event) -> list[Block]:
        """What a stream says of an event."""
        match event:
            case Reasoning(text):
                begun = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return begun if self._hides_thinking else [*begun, self._delta("thinking_delta", thinking=text)]
            case Content(text) | CallFailed(None, text, _):
                return [*self._begin("text", {"type": "text", "text": ""}), self._delta("text_delta", text=text)]
            case CallBegan(_, name):
                return self._begin("tool_use", _call(name))
            case CallArguments(_, text):
                return [self._delta("input_json_delta", partial_json=text)]
            case CallEnded():
                return self.close()
            case CallFailed(_, text, _):
                return [*self.close(), *self.tell(Content(text))]

    def close(self) -> list[Block]:
        """The end of the open block, if there is one."""
        if not self._open:
            return []
        signed = [self._delta("signature_delta", signature="")] if self._open == "thinking" else []
        self._open = ""
        return [*signed, {"type": "content_block_stop", "index": self._index}]

    def _begin(self, kind: str, block: Block) -> list[Block]:
        if self._open == kind and kind != "tool_use":
            return []
        closed = self.close()
        self._open = kind
        self._index += 1
        return [*closed, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, kind: str, **content: str) -> Block:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **content}}


def _grow(blocks: list[Block], kind: str, text: str, **more: str) -> None:
    """Add text to the last block, or to a new one if that is of another kind."""
    if blocks and blocks[-1]["type"] == kind:
        blocks[-1][kind] += text
    else:
        blocks.append({"type": kind, kind: text, **more})


def _call(name: str) -> Block:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": name, "input": {}}


def fault_event(error: UserError) -> bytes:
    """An error on a stream, by the name without which clients pass it over."""
    return _event(error_content(Surface.ANTHROPIC, error))


def _event(content: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (content["type"].encode(), one_line(orjson.dumps(content)))

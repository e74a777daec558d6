"""What is known of a response, and a conversation: what clients are shown of them, and what goes on from them."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

from sessile.contract.messages import Done
from sessile.errors import UserError
from sessile.server.dialogues import Dialogue, Turn
from sessile.server.responses.bodies import ResponseBody
from sessile.server.responses.items import Item, messages_of
from sessile.server.responses.output import OutputItems
from sessile.text.template import Message

_STATUSES = {"stop": "completed", "length": "incomplete", "abort": "cancelled", "error": "failed"}


@dataclass(frozen=True, slots=True)
class Line:
    """Messages behind others: shared by all responses that go on from them, and there as long as one of these is."""

    before: "Line | None"
    messages: tuple[Message, ...]
    item_ids: tuple[str, ...]
    """Of the items that the messages are."""

    @classmethod
    def of(cls, before: "Line | None", items: Sequence[Item]) -> Self:
        """The messages of items behind others."""
        return cls(before, tuple(messages_of(items)), ids_of(items))

    def all(self) -> list[Message]:
        """Every message, first to last."""
        return [message for line in reversed(list(self._lines())) for message in line.messages]

    def all_ids(self) -> Iterator[str]:
        """The ids of all items, in no order."""
        return (item_id for line in self._lines() for item_id in line.item_ids)

    def _lines(self) -> "Iterator[Line]":
        """This one and those before it, last to first."""
        line: Line | None = self
        while line is not None:
            yield line
            line = line.before


def ids_of(items: Sequence[Item]) -> tuple[str, ...]:
    """The ids of items."""
    return tuple(item["id"] for item in items)


@dataclass(slots=True, eq=False)
class ResponseRecord:
    """One response, stored or not."""

    id: str
    tenant: str
    body: ResponseBody
    input_items: list[Item]
    line: Line
    """All messages up to its input; up to its answer, once it has finished."""
    model: str
    output: OutputItems = field(default_factory=OutputItems)
    dialogue: Dialogue | None = None
    turn: Turn | None = None
    """Where its answer can be gone on from without computing it again; None: it is sent again."""
    status: str = "in_progress"
    done: Done | None = None
    reasoning_tokens: int = 0
    error: dict[str, str] | None = None
    created_s: int = field(default_factory=lambda: int(time.time()))
    completed_s: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_stored: bool = False
    is_known: bool = False
    """Whether a client has been told its id already."""
    size_bytes: int = 0
    used_s: float = 0.0
    _tools_text: str = field(init=False)
    _text_shown: str = field(init=False)

    def __post_init__(self) -> None:
        self._tools_text = self.body.tools_text
        self._text_shown = self.body.text_shown

    @property
    def can_be_gone_on_from(self) -> bool:
        """Whether it has an answer that counts."""
        return self.status in ("completed", "incomplete")

    def note_end(self, done: Done | None, reasoning_tokens: int) -> None:
        """Its request has ended. done: how; None if nobody waited for it."""
        self.status = "cancelled" if done is None else _STATUSES[done.reason]
        self.done, self.reasoning_tokens = done, reasoning_tokens
        self.completed_s = int(time.time())

    def note_failure(self, error: UserError) -> None:
        """Its request was refused, or failed, after its client was told its id."""
        self.status = "failed"
        self.error = {"code": "server_error", "message": error.message}

    def measured_bytes(self) -> int:
        """What it counts for on its shelf."""
        body = self.body
        kept = orjson.dumps([self.input_items, self.output.items, body.instructions, body.metadata])
        return len(kept) + len(self._tools_text) + len(self._text_shown)

    def content(self) -> dict[str, Any]:
        """The response as OpenAI's API shows it."""
        body = self.body
        content = {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "completed_at": self.completed_s,
            "status": self.status,
            "background": bool(body.background),
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.model,
            "output": self.output.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "conversation": {"id": body.conversation_id} if body.conversation_id else None,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": orjson.Fragment(self._text_shown),
            "tool_choice": body.choice_shown,
            "tools": orjson.Fragment(self._tools_text),
            "top_logprobs": 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage(),
            "metadata": body.metadata or {},
        }
        return content | {"tool_call_errors": self.output.errors} if self.output.errors else content

    def _usage(self) -> dict[str, Any] | None:
        done = self.done
        if done is None:
            return None
        return {
            "input_tokens": done.prompt_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": done.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": done.prompt_tokens + done.completion_tokens,
        }


@dataclass(slots=True, eq=False)
class Conversation:
    """Items that responses go on from and add to. Its KV is with the turns of its dialogue."""

    id: str
    tenant: str
    metadata: dict[str, str]
    items: list[Item] = field(default_factory=list)
    line: Line | None = None
    """The messages of its items."""
    dialogue: Dialogue | None = None
    is_kept: bool = True
    is_busy: bool = False
    """Whether a response that will add to it is in flight."""
    created_s: int = field(default_factory=lambda: int(time.time()))
    size_bytes: int = 0
    used_s: float = 0.0

    def add(self, items: Sequence[Item], line: Line | None = None) -> None:
        """Put items behind the others. line: that of all of them, if somebody has it already."""
        self.items += items
        self.line = line or Line.of(self.line, items)

    def remove(self, item: Item) -> None:
        """Take an item out."""
        self.items.remove(item)
        self.line = Line.of(None, self.items)

    def measured_bytes(self) -> int:
        """What it counts for on its shelf."""
        return len(orjson.dumps([self.items, self.metadata]))

    def content(self) -> dict[str, Any]:
        """The conversation as OpenAI's API shows it."""
        return {
            "id": self.id,
            "object": "conversation",
            "created_at": self.created_s,
            "metadata": self.metadata,
        }

"""Bodies of /v1/responses and /v1/conversations. What means nothing here stands in the table below."""

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from sessile.server.body import ANYTHING, Body, Tolerated, field_fault
from sessile.server.drafts import DraftFields
from sessile.server.names import ID_CHARS_MAX, Metadata
from sessile.server.sampling import Count, Priority, SamplingFields

ITEMS_MAX = 1024
"""Most items that are given at once."""


class ConversationName(Body):
    """conversation of a response, as an object."""

    id: str = Field(min_length=1, max_length=ID_CHARS_MAX)


class ResponseStreamOptions(Body):
    """stream_options of a response; its last event has its usage in any case, as clients of chat ask for it."""

    tolerated: ClassVar[Tolerated] = {"include_obfuscation": ANYTHING, "include_usage": (True,)}


class ResponseBody(SamplingFields, DraftFields):
    """The body of POST /v1/responses."""

    input: Any = None
    """A text, or items; checked by items.py."""
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=(1 << 31) - 1)
    min_tokens: Count | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    """false: nothing of it is left when it has ended."""
    background: bool | None = None
    previous_response_id: str | None = Field(default=None, min_length=1, max_length=ID_CHARS_MAX)
    """The stored response to go on from."""
    conversation: str | ConversationName | None = None
    metadata: Metadata | None = None
    priority: Priority | None = None

    tolerated: ClassVar[Tolerated] = {
        "user": ANYTHING,
        "service_tier": ANYTHING,
        "safety_identifier": ANYTHING,
        "prompt_cache_key": ANYTHING,
        "prompt_cache_retention": ANYTHING,
        "parallel_tool_calls": ANYTHING,
        "max_tool_calls": ANYTHING,
        "include": ([],),
        "reasoning": ({},),
        "text": ({"format": {"type": "text"}}, {}),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "prompt": (),
    }

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        if self.background and self.stream:
            raise field_fault("background", "a response in the background is not streamed: retrieve it by its id")
        if self.background and self.store is False:
            raise field_fault("background", "needs store: true, or nobody could retrieve the response")
        if self.previous_response_id is not None and self.conversation is not None:
            raise field_fault("previous_response_id", "give either this or conversation")
        return self

    @property
    def conversation_id(self) -> str | None:
        """The conversation's id, whatever form it was given in."""
        return self.conversation.id if isinstance(self.conversation, ConversationName) else self.conversation


class ConversationBody(Body):
    """The body of POST /v1/conversations."""

    items: list[Any] | None = Field(default=None, max_length=ITEMS_MAX)
    metadata: Metadata | None = None


class ConversationUpdateBody(Body):
    """The body of POST /v1/conversations/{id}."""

    metadata: Metadata


class ItemsBody(Body):
    """The body of POST /v1/conversations/{id}/items."""

    items: list[Any] = Field(min_length=1, max_length=ITEMS_MAX)

"""Bodies of /v1/responses and /v1/conversations. What means nothing here stands in the table below."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from sessile.contract.messages import Grammar
from sessile.server.body import ANYTHING, Body, Tolerated, field_fault, says
from sessile.server.drafts import DraftFields
from sessile.server.grammars import TextSettings
from sessile.server.message_schemas import INPUT, ITEMS
from sessile.server.names import ID_CHARS_MAX, Metadata
from sessile.server.sampling import Count, Priority, SamplingFields
from sessile.server.tools import TOOLS_MAX, ToolName, ToolUse, check_choice, tool_spec
from sessile.text.tools import ToolSpec

ITEMS_MAX = 1024
"""Most items that are given at once."""


class ConversationName(Body):
    """conversation of a response, as an object."""

    id: str = Field(min_length=1, max_length=ID_CHARS_MAX)


Conversed = Annotated[str | ConversationName, says('must be the id of a conversation, or {"id": …}')]


class ResponseStreamOptions(Body):
    """stream_options of a response; its last event has its usage in any case, as clients of chat ask for it."""

    tolerated: ClassVar[Tolerated] = {"include_obfuscation": ANYTHING, "include_usage": (True,)}


class ResponseTool(Body):
    """One of `tools`: a function of the client's."""

    type: Annotated[
        Literal["function"], says('must be "function": tools that OpenAI\'s servers run are not supported here')
    ]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the arguments."""
    strict: bool | None = None
    """A call that is demanded follows the schema either way; any other is the model's own."""

    tolerated: ClassVar[Tolerated] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    @property
    def spec(self) -> ToolSpec:
        """The tool as templates know it."""
        return tool_spec(self.name, self.description, self.parameters)


class FunctionChoice(Body):
    """A tool_choice that names the function to be called."""

    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    """A tool_choice that names the functions that alone may be called. mode: whether one of them must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=TOOLS_MAX)


ResponseChoice = Annotated[
    Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions,
    says(
        'must be "none", "auto", "required", {"type": "function", "name": …} or {"type": "allowed_tools", '
        '"mode": "auto" or "required", "tools": [{"type": "function", "name": …}, …]}'
    ),
]


class ResponseToolFields(Body):
    """What a response's request says of tools."""

    tools: list[ResponseTool] | None = Field(default=None, max_length=TOOLS_MAX)
    tool_choice: ResponseChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.name for tool in self.tools or ()]
        check_choice(names, named=self._allowed or (), needs_tools=self.tool_choice == "required")
        return self

    @property
    def tool_use(self) -> ToolUse:
        """The same as any surface may say it."""
        choice = self.tool_choice
        must_call = choice == "required" or isinstance(choice, FunctionChoice)
        if isinstance(choice, AllowedFunctions):
            must_call = choice.mode == "required"
        return ToolUse(
            tools=tuple(tool.spec for tool in self.tools or () if choice != "none"),
            allowed=self._allowed,
            must_call=must_call,
            is_parallel=self.parallel_tool_calls is not False and not isinstance(choice, FunctionChoice),
        )

    @property
    def tools_text(self) -> str:
        """The tools as the response shows them, as JSON: schemas may have numbers that orjson does not write."""
        fields = {"type", "name", "description", "parameters", "strict"}
        return json.dumps([tool.model_dump(include=fields) for tool in self.tools or ()])

    @property
    def choice_shown(self) -> str | dict[str, Any]:
        """The tool_choice as the response shows it."""
        if isinstance(self.tool_choice, Body):
            return self.tool_choice.model_dump()
        return self.tool_choice or "auto"

    @property
    def _allowed(self) -> tuple[str, ...] | None:
        """The functions that alone may be called, where tool_choice names any."""
        match self.tool_choice:
            case FunctionChoice(name=name):
                return (name,)
            case AllowedFunctions(tools=tools):
                return tuple(tool.name for tool in tools)
        return None


class ResponseBody(SamplingFields, DraftFields, ResponseToolFields):
    """The body of POST /v1/responses."""

    input: Annotated[Any, WithJsonSchema(INPUT)]
    """A text, or items; checked by items.py."""
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=(1 << 31) - 1)
    min_tokens: Count | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextSettings | None = None
    """The form of the output: text, any JSON object, or JSON under a schema."""
    store: bool | None = None
    """false: nothing of it is left when it has ended."""
    background: bool | None = None
    previous_response_id: str | None = Field(default=None, min_length=1, max_length=ID_CHARS_MAX)
    """The stored response to go on from."""
    conversation: Conversed | None = None
    metadata: Metadata | None = None
    priority: Priority | None = None

    tolerated: ClassVar[Tolerated] = {
        "user": ANYTHING,
        "service_tier": ANYTHING,
        "safety_identifier": ANYTHING,
        "prompt_cache_key": ANYTHING,
        "prompt_cache_retention": ANYTHING,
        "max_tool_calls": ANYTHING,
        "include": ([],),
        "reasoning": ({},),
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
    def grammar(self) -> Grammar | None:
        """What the answer must be, where no call is demanded."""
        return self.text.grammar if self.text else None

    @property
    def text_shown(self) -> str:
        """The form of the output as the response shows it, as JSON: as with tools, it may have any numbers."""
        return json.dumps((self.text or TextSettings()).shown)

    @property
    def conversation_id(self) -> str | None:
        """The conversation's id, whatever form it was given in."""
        return self.conversation.id if isinstance(self.conversation, ConversationName) else self.conversation


Items = list[Annotated[Any, WithJsonSchema(ITEMS["items"])]]
"""Checked by items.py."""


class ConversationBody(Body):
    """The body of POST /v1/conversations."""

    items: Items | None = Field(default=None, max_length=ITEMS_MAX)
    metadata: Metadata | None = None


class ConversationUpdateBody(Body):
    """The body of POST /v1/conversations/{id}."""

    metadata: Metadata


class ItemsBody(Body):
    """The body of POST /v1/conversations/{id}/items."""

    items: Items = Field(min_length=1, max_length=ITEMS_MAX)

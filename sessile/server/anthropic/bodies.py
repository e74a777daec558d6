"""Bodies of /v1/messages and /v1/messages/count_tokens."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from sessile.contract.messages import Grammar
from sessile.server.body import ANYTHING, Body, Tolerated, field_fault
from sessile.server.drafts import DraftFields
from sessile.server.grammars import schema_text
from sessile.server.message_schemas import BLOCK_MESSAGES, SYSTEM
from sessile.server.sampling import Count, Priority, SamplingFields, Stops
from sessile.server.tools import TOOLS_MAX, ToolName, ToolUse, tool_spec
from sessile.text.tools import ToolSpec

TOLERATED: Tolerated = {
    # Anthropic's own, about accounts, billing and places: nothing of that exists here
    "metadata": ANYTHING,
    "service_tier": ANYTHING,
    "inference_geo": ANYTHING,
    "user_profile_id": ANYTHING,
    # accepted where they ask for nothing
    "speed": ("standard",),
    "container": (),
    "diagnostics": (),
    "context_management": (),
    "mcp_servers": ([],),
}


class CacheControl(Body):
    """cache_control: checked, and without effect, for whatever was computed is cached here by itself."""

    type: Literal["ephemeral"]

    tolerated: ClassVar[Tolerated] = {"ttl": ("5m", "1h")}


class ThinkingBody(Body):
    """thinking. Whether the model thinks is its template's to say; adaptive leaves it as it is."""

    type: Literal["enabled", "disabled", "adaptive"]
    display: Literal["summarized", "omitted"] | None = None

    tolerated: ClassVar[Tolerated] = {"budget_tokens": ANYTHING}


class OutputFormat(Body):
    """output_config.format: the answer is JSON that is valid under a schema."""

    type: Literal["json_schema"]
    given: dict[str, Any] = Field(validation_alias="schema")


class OutputConfig(Body):
    """output_config."""

    format: OutputFormat | None = None

    tolerated: ClassVar[Tolerated] = {"effort": ANYTHING}


class MessagesTool(Body):
    """One of `tools`: of the client's own. Those that Anthropic's servers run are refused by their type."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None

    tolerated: ClassVar[Tolerated] = {
        "strict": ANYTHING,
        "eager_input_streaming": ANYTHING,
        "input_examples": ([],),
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
    }

    @property
    def spec(self) -> ToolSpec:
        """The tool as templates know it."""
        return tool_spec(self.name, self.description, self.input_schema)


class MessagesChoice(Body):
    """tool_choice. name: of the tool, with type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class PromptBody(Body):
    """What makes the prompt. Messages and system are checked by blocks.py."""

    model: str
    messages: Annotated[Any, WithJsonSchema(BLOCK_MESSAGES)]
    system: Annotated[Any, WithJsonSchema(SYSTEM)] = None
    tools: list[MessagesTool] | None = Field(default=None, max_length=TOOLS_MAX)
    tool_choice: MessagesChoice | None = None
    thinking: ThinkingBody | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tolerated: ClassVar[Tolerated] = TOLERATED

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise field_fault("tools", "two have one name")
        choice = self.tool_choice
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise field_fault("tool_choice", f"{choice.name!r} is none of tools")
        if choice is not None and choice.type == "any" and not names:
            raise field_fault("tool_choice", "needs tools")
        return self

    @property
    def tool_use(self) -> ToolUse:
        """The same as any surface may say it."""
        choice = self.tool_choice or MessagesChoice(type="auto")
        named = choice.name if choice.type == "tool" else None
        return ToolUse(
            tools=tuple(tool.spec for tool in self.tools or () if choice.type != "none"),
            allowed=None if named is None else (named,),
            must_call=choice.type in ("any", "tool"),
            is_parallel=not choice.disable_parallel_tool_use and named is None,
        )

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must be, where no call is demanded."""
        form = self.output_config.format if self.output_config else None
        return Grammar("json_schema", schema_text(form.given), "output_config.format.schema") if form else None

    @property
    def variables(self) -> dict[str, Any]:
        """What the template may name beside messages and tools."""
        thinks = {"enabled": True, "disabled": False}.get(self.thinking.type) if self.thinking else None
        return {**({} if thinks is None else {"enable_thinking": thinks}), **(self.chat_template_kwargs or {})}


class MessagesBody(PromptBody, SamplingFields, DraftFields):
    """The body of /v1/messages."""

    max_tokens: Count
    stop: Stops | None = Field(default=None, validation_alias="stop_sequences")
    stream: bool | None = None
    rid: str | None = Field(default=None, min_length=1, max_length=256)
    priority: Priority | None = None

    stop_field: ClassVar[str] = "stop_sequences"


class CountBody(PromptBody):
    """The body of /v1/messages/count_tokens."""

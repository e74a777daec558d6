"""Tools of a request: their fields, what of them is offered to the model, and how its answer is then read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import Field, model_validator

from sessile.contract.messages import Grammar
from sessile.errors import InvalidRequest
from sessile.server.body import ANYTHING, Body, Tolerated, field_fault, says, shortened
from sessile.server.calls import Order
from sessile.server.config import ServerOptions
from sessile.text.answer.formats import AnswerFormat, reasoning_format, tool_format
from sessile.text.answer.grammar import WITH_GRAMMAR, call_grammar, reasoning_lead
from sessile.text.answer.reader import AnswerReader
from sessile.text.tokenizer import Tokenizer
from sessile.text.tools import FunctionSpec, ToolSpec

TOOLS_MAX = 512
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class FunctionBody(Body):
    """`function` of a tool."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None

    tolerated: ClassVar[Tolerated] = {"strict": ANYTHING}


class ToolBody(Body):
    """One of `tools`."""

    type: Literal["function"]
    function: FunctionBody

    @property
    def spec(self) -> ToolSpec:
        """The tool as templates know it."""
        return tool_spec(self.function.name, self.function.description, self.function.parameters)


class NamedFunction(Body):
    """`function` of a tool_choice."""

    name: str


class NamedChoice(Body):
    """A tool_choice that names the function to be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """`allowed_tools` of a tool_choice. mode: whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1, max_length=TOOLS_MAX)


class AllowedChoice(Body):
    """A tool_choice that names the functions that alone may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Choice = Annotated[
    Literal["none", "auto", "required"] | NamedChoice | AllowedChoice,
    says(
        'must be "none", "auto", "required", {"type": "function", "function": {"name": …}} or {"type": '
        '"allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [{"type": "function", …}, …]}}'
    ),
]


class ToolFields(Body):
    """What a chat request says of tools."""

    tools: list[ToolBody] | None = Field(default=None, max_length=TOOLS_MAX)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        check_choice(names, named=self._allowed or (), needs_tools=self.tool_choice == "required")
        return self

    @property
    def tool_use(self) -> "ToolUse":
        """The same as any surface may say it."""
        choice = self.tool_choice
        must_call = choice == "required" or isinstance(choice, NamedChoice)
        if isinstance(choice, AllowedChoice):
            must_call = choice.allowed_tools.mode == "required"
        return ToolUse(
            tools=tuple(tool.spec for tool in self.tools or () if choice != "none"),
            allowed=self._allowed,
            must_call=must_call,
            is_parallel=self.parallel_tool_calls is not False and not isinstance(choice, NamedChoice),
        )

    @property
    def _allowed(self) -> tuple[str, ...] | None:
        """The functions that alone may be called, where tool_choice names any."""
        match self.tool_choice:
            case NamedChoice(function=function):
                return (function.name,)
            case AllowedChoice(allowed_tools=allowed):
                return tuple(tool.function.name for tool in allowed.tools)
        return None


def tool_spec(name: str, description: str | None, parameters: dict[str, Any] | None) -> ToolSpec:
    """A function as templates know it, the same whatever the order of the client's fields."""
    function = FunctionSpec(name=name)
    if description is not None:
        function["description"] = description
    function["parameters"] = parameters or NO_PARAMETERS
    return ToolSpec(type="function", function=function)


def check_choice(names: Sequence[str], *, named: Sequence[str], needs_tools: bool) -> None:
    """For a body's validator: raise a fault of its tools or tool_choice. named: the functions that the choice names."""
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise field_fault("tools", f"two are called {twice!r}")
    for name in named:
        if name not in names:
            raise field_fault("tool_choice", f"{shortened(repr(name))} is none of tools")
    if needs_tools and not names:
        raise field_fault("tool_choice", "needs tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request allows. tools: those that are offered. allowed: the names of those that alone may be called.

    None allows all that are offered. What is not allowed is offered all the same: so the prompt, and its KV, stay as
    they are when another choice is made.
    """

    tools: Sequence[ToolSpec] = ()
    allowed: tuple[str, ...] | None = None
    must_call: bool = False
    is_parallel: bool = True

    @property
    def names(self) -> list[str]:
        """Of the tools that are offered."""
        return [tool["function"]["name"] for tool in self.tools]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerReading:
    """How the answer to one prompt is bound and read. shows_special: special tokens may not be left out of the text."""

    prompt: str
    use: ToolUse
    form: AnswerFormat
    grammar: Grammar | None
    shows_special: bool
    separates_reasoning: bool
    streams_reasoning: bool

    def of(self, order: Order) -> Order:
        """The order, bound as the answer has to be."""
        sampling = order.sampling
        if self.shows_special:
            sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
        return replace(order, grammar=self.grammar, sampling=sampling)

    def reader(self) -> AnswerReader:
        """A reader for one answer."""
        return self.form.reader(
            self.prompt,
            tool_names=self.use.names,
            allowed_names=self.use.allowed,
            is_parallel=self.use.is_parallel,
            separates_reasoning=self.separates_reasoning,
            streams_reasoning=self.streams_reasoning,
        )


def reading_of(
    options: ServerOptions,
    tokenizer: Tokenizer,
    use: ToolUse,
    prompt: str,
    *,
    asked: Grammar | None = None,
    skips_special: bool | None = None,
    separates_reasoning: bool = True,
    streams_reasoning: bool = True,
) -> AnswerReading:
    """How the answer to a prompt is bound and read. asked: a grammar of the client's own; skips_special: its word.

    Raises InvalidRequest for what cannot be asked of this model, or not together.
    """
    form = answer_format(options, tokenizer, use)
    grammar, form = bound_answer(use, form, tokenizer, prompt, asked)
    return AnswerReading(
        prompt=prompt,
        use=use,
        form=form,
        grammar=grammar,
        shows_special=skips_special is None and any(is_special(tokenizer, each) for each in form.markers(use.names)),
        separates_reasoning=separates_reasoning,
        streams_reasoning=streams_reasoning,
    )


def answer_format(options: ServerOptions, tokenizer: Tokenizer, use: ToolUse) -> AnswerFormat:
    """How the answer to a request will be written. Raises InvalidRequest for tools whose calls nobody would read."""
    template = tokenizer.template_for(use.tools)
    tools = options.tool_format
    if tools == "auto":
        tools = tool_format(template.source, knows_tools=template.knows_tools)
    if use.tools and tools == "none":
        raise InvalidRequest(
            "tools: this server does not read the calls that the model would write (--tool-format)", param="tools"
        )
    reasoning = options.reasoning_format
    return AnswerFormat(tools, reasoning_format(template.source) if reasoning == "auto" else reasoning)


def bound_answer(
    use: ToolUse, form: AnswerFormat, tokenizer: Tokenizer, prompt: str, asked: Grammar | None = None
) -> tuple[Grammar | None, AnswerFormat]:
    """What the answer must be, and how it is then read. asked: the grammar of a request that demands no call.

    A model that reasons does so before it answers in JSON; other grammars bind all that it says, which is then all
    answer. Raises InvalidRequest where a call is demanded beside another grammar, or in a format that has none.
    """
    special = frozenset(marker for marker in form.markers(use.names) if is_special(tokenizer, marker))
    if not use.must_call:
        if asked is None or form.reasoning == "none":
            return asked, form
        if asked.kind in ("json_schema", "json_object"):
            return msgspec.structs.replace(asked, lead=reasoning_lead(form, prompt, special)), form
        return asked, replace(form, reasoning="none")
    if asked is not None:
        raise InvalidRequest(f"tool_choice: a call is demanded, and {asked.field} as well", param="tool_choice")
    if form.tools not in WITH_GRAMMAR:
        raise InvalidRequest(
            f"tool_choice: a call cannot be demanded of a model that writes calls as {form.tools}", param="tool_choice"
        )
    tools = [tool for tool in use.tools if use.allowed is None or tool["function"]["name"] in use.allowed]
    source = call_grammar(form, tools, prompt, is_parallel=use.is_parallel, special=special)
    return Grammar("lark", source, "tools"), form


def is_special(tokenizer: Tokenizer, marker: str) -> bool:
    """Whether a marker is one token that counts as no text."""
    token = tokenizer.backend.token_to_id(marker)
    return token is not None and token in tokenizer.vocabulary.special_ids


def parsed_arguments(arguments: str) -> dict[str, Any]:
    """The object of a complete call's arguments."""
    parsed = json.loads(arguments)
    assert isinstance(parsed, dict), "a complete call has an object of arguments"
    return parsed

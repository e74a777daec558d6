"""Chat messages to one prompt, with the Jinja template that comes with a model, in a sandbox.

A template is foreign code: it reaches nothing outside the sandbox, nothing of it is evaluated when it is compiled, and
a render may take so many steps and write so much, no more (H57).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, TypedDict

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sessile.errors import InvalidRequest, StartupError
from sessile.modelfile import shown
from sessile.text.tools import CallMessage, ToolSpec, check_calls

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = frozenset({"role", "content", "name"})
_FIELDS_OF = {
    "assistant": _FIELDS | {"tool_calls", "reasoning_content"},
    "tool": _FIELDS | {"tool_call_id"},
}

SOURCE_CHARS_MAX = 1 << 20
"""Longest template that is compiled; those of the hub have some thousand characters."""
STEPS_MAX = 4_000_000
"""Rounds of loops and calls of one render: some seconds. A long conversation takes some thousand."""
WRITTEN_CHARS_MAX = 1 << 28
"""Most that one render writes: several times the largest body."""
_REPEATED_MAX = 1 << 20
_INTEGER_BITS_MAX = 4096
_BUDGET = "the budget of the render"
"""Where a render's budget lies among its variables: no template can name it."""


class Message(TypedDict, total=False):
    """One checked message: role, content as plain text, and perhaps a name; an assistant's calls, a tool's answer."""

    role: str
    content: str
    name: str
    reasoning_content: str
    tool_calls: list[CallMessage]
    tool_call_id: str


class ChatTemplate:
    """A compiled chat template.

    source: Jinja text. variables: what the template may name beside the messages, such as bos_token. Raises
    StartupError if the source is no template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self.knows_tools = False
        """Whether the template speaks of tools, and so renders those it is given."""
        self._variables = dict(variables)
        if len(source) > SOURCE_CHARS_MAX:
            raise StartupError(
                f"the model's chat template has {len(source)} characters, over {SOURCE_CHARS_MAX}. Use another model."
            )
        try:
            environment = _environment()
            tree = environment.parse(source)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise StartupError(
                f"the model's chat template is not valid Jinja (line {error.lineno}: {shown(error.message)}). "
                "Repair it in the model's folder, or use another model."
            ) from error
        except Exception as error:  # nested beyond what Jinja's parser or Python's compiler can take
            raise StartupError(
                f"the model's chat template cannot be compiled ({shown(error)}). Repair it, or use another model."
            ) from error
        self.knows_tools = any(name.name == "tools" and name.ctx == "load" for name in tree.find_all(nodes.Name))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[ToolSpec] | None = None,
    ) -> str:
        """The prompt for checked messages. Raises InvalidRequest with the template's own words if it refuses them."""
        names = {**self._variables, "tools": None, "documents": None, **(variables or {}), _BUDGET: _Budget()}
        if tools:
            names["tools"] = list(tools)
        try:
            return self._template.render(
                {**names, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
            )
        except TemplateError as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from error
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise InvalidRequest(
                f"the chat template failed on the messages: {type(error).__name__}: {error}", param="messages"
            ) from error


def check_messages(messages: object) -> list[Message]:
    """Check chat messages from a client; return them with content as one string (text parts joined by newlines).

    Raises InvalidRequest naming the field at fault. "developer" becomes "system", which is what templates know.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: object, field: str) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{field} must be an object with role and content", param=field)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{field}.role must be one of {', '.join(_ROLES)}; got {role!r}", param=f"{field}.role")
    for name in message:
        if name not in _FIELDS_OF.get(role, _FIELDS) and message[name] is not None:
            raise InvalidRequest(f"{field}.{name} is not supported", param=f"{field}.{name}")
    for name in ("name", "reasoning_content", "tool_call_id"):
        if message.get(name) is not None and not isinstance(message[name], str):
            raise InvalidRequest(f"{field}.{name} must be a string", param=f"{field}.{name}")
    calls = check_calls(message.get("tool_calls") or [], f"{field}.tool_calls")
    content = message.get("content")
    checked = Message(
        role="system" if role == "developer" else role,
        content="" if content is None and calls else _check_content(content, f"{field}.content"),
    )
    if message.get("name") is not None:
        checked["name"] = message["name"]
    if message.get("reasoning_content") is not None:
        checked["reasoning_content"] = message["reasoning_content"]
    if calls:
        checked["tool_calls"] = calls
    if role == "tool":
        if message.get("tool_call_id") is None:
            raise InvalidRequest(f"{field}.tool_call_id is required", param=f"{field}.tool_call_id")
        checked["tool_call_id"] = message["tool_call_id"]
    return checked


def _check_content(content: object, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{field} must be a string or a list of text parts", param=field)
    texts = []
    for index, part in enumerate(content):
        name = f"{field}[{index}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequest(f'{name} must be {{"type": "text", "text": …}}; got {kind!r}', param=name)
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{name}.text must be a string", param=f"{name}.text")
        if unknown := sorted(map(str, part.keys() - {"type", "text"})):
            raise InvalidRequest(f"{name}.{unknown[0]} is not supported", param=f"{name}.{unknown[0]}")
        texts.append(part["text"])
    return "\n".join(texts)


@dataclass(slots=True)
class _Budget:
    """What one render has left."""

    steps: int = STEPS_MAX
    chars: int = WRITTEN_CHARS_MAX

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError(f"rendering takes more than {STEPS_MAX} steps")

    def write(self, chars: int) -> None:
        self.chars -= chars
        if self.chars < 0:
            raise TemplateError(f"rendering writes more than {WRITTEN_CHARS_MAX} characters")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every round of a loop and every call counted, and no number or repetition out of bounds."""

    intercepted_binops = frozenset(("*", "**"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            count = nodes.Filter(nodes.Const(None), "count_step", [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(count, lineno=loop.lineno))
        return tree

    def call(self, context: Context, callee: Any, /, *arguments: Any, **named: Any) -> Any:
        """Every call in a template comes here."""
        context[_BUDGET].step()
        return super().call(context, callee, *arguments, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every product and power comes here."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _INTEGER_BITS_MAX:
                raise TemplateError(f"a number would have more than {_INTEGER_BITS_MAX} bits")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(sequence, "__len__") and len(sequence) * times > _REPEATED_MAX:
                    raise TemplateError(f"a repetition would have more than {_REPEATED_MAX} elements")
        return super().call_binop(context, operator, left, right)


@pass_context
def _count_step(context: Context, nothing: None) -> None:
    context[_BUDGET].step()


@pass_context
def _written(context: Context, value: Any) -> str:
    """Called for whatever a template writes. Because it wants the context, nothing is evaluated while compiling."""
    text = str(value)
    context[_BUDGET].write(len(text))
    return text


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    """The environment that templates of the hub are written for: transformers' settings, filters and globals."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        optimized=False,
        finalize=_written,
    )
    del environment.globals["lipsum"]  # writes as much as it is asked for
    environment.filters["tojson"] = _to_json
    environment.filters["count_step"] = _count_step
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

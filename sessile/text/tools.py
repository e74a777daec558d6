"""Tools in a prompt: calls and results in the messages, and the words for a template that knows nothing of either."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from sessile.errors import InvalidRequest

CALLS_MAX = 1024
"""Most calls of one message."""
DEPTH_MAX = 128
"""Objects and lists within each other in a call's arguments; more is taken from no model's answer either."""


class CalledFunction(TypedDict):
    """What was called. arguments as an object, as templates want them."""

    name: str
    arguments: dict[str, Any]


class CallMessage(TypedDict):
    """One call in an assistant's message."""

    id: str
    type: str
    function: CalledFunction


class FunctionSpec(TypedDict, total=False):
    """A function that may be called. parameters: a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class ToolSpec(TypedDict):
    """A tool as templates know it."""

    type: str
    function: FunctionSpec


def check_calls(calls: object, field: str) -> list[CallMessage]:
    """Check `tool_calls` of a message from a client. Raises InvalidRequest naming the field at fault."""
    if not isinstance(calls, list):
        raise InvalidRequest(f"{field} must be a list of calls", param=field)
    if len(calls) > CALLS_MAX:
        raise InvalidRequest(f"{field} has {len(calls)} calls, over {CALLS_MAX}", param=field)
    return [_check_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _check_call(call: object, field: str) -> CallMessage:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise InvalidRequest(f'{field} must be {{"id", "type": "function", "function": …}}', param=field)
    _refuse_others(call, {"id", "type", "function", "index"}, field)
    function = call.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{field}.function must be an object with name and arguments", param=f"{field}.function")
    _refuse_others(function, {"name", "arguments"}, f"{field}.function")
    for name, value in (("id", call.get("id")), ("function.name", function.get("name"))):
        if not isinstance(value, str) or not value:
            raise InvalidRequest(f"{field}.{name} must be a string", param=f"{field}.{name}")
    arguments = check_arguments(function.get("arguments"), f"{field}.function.arguments")
    called = CalledFunction(name=function["name"], arguments=arguments)
    return CallMessage(id=call["id"], type="function", function=called)


def check_arguments(arguments: object, field: str) -> dict[str, Any]:
    """Arguments as a client sends them back: a JSON object as text, or nothing where there are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field} must be the text of a JSON object", param=field)
    if _is_deeper(arguments, DEPTH_MAX):
        raise InvalidRequest(f"{field} has objects and lists more than {DEPTH_MAX} within each other", param=field)
    return arguments


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _parts(each)]
    return bool(level)


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _refuse_others(given: Mapping[str, Any], known: set[str], field: str) -> None:
    for name in given:
        if name not in known and given[name] is not None:
            raise InvalidRequest(f"{field}.{name} is not supported", param=f"{field}.{name}")


_OFFER = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The words of Hermes and Qwen, which most models have seen."""


def spelled_out(messages: Sequence[Mapping[str, Any]], tools: Sequence[ToolSpec] | None) -> list[dict[str, Any]]:
    """Messages for a template that knows nothing of tools: what is offered is in the system message, calls are text.

    So are results, those of neighbouring messages in one message of the user.
    """
    spelled: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if spelled and spelled[-1].get("results"):
                spelled[-1]["content"] += f"\n{result}"
            else:
                spelled.append({"role": "user", "content": result, "results": True})
        elif calls := message.get("tool_calls"):
            parts = [message["content"]] if message["content"] else []
            written = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            parts += [f"<tool_call>\n{call}\n</tool_call>" for call in written]
            spelled.append({"role": "assistant", "content": "\n".join(parts)})
        else:
            spelled.append(dict(message))
    if tools:
        offer = _OFFER.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if spelled[0]["role"] == "system":
            spelled[0]["content"] += f"\n\n{offer}"
        else:
            spelled.insert(0, {"role": "system", "content": offer})
    return [{name: value for name, value in message.items() if name != "results"} for message in spelled]

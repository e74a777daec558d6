"""Items: what the input and the output of responses, and conversations, are lists of.

They are messages, calls of functions and their outputs, and reasoning; a client may name one that is kept instead of
sending it. Neighbours that are one answer of the model's, such as its words and the calls behind them, are one message
of the prompt, as they were when it said them.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sessile.errors import InvalidRequest, NotFound
from sessile.text.template import Message, check_messages
from sessile.text.tools import CalledFunction, CallMessage, check_arguments

Item = dict[str, Any]
"""An item as OpenAI's API shows it: id, type, status, and what its type has beside."""

_PARTS = ("input_text", "output_text", "text")
_MEANINGLESS = frozenset({"id", "status", "phase", "type"})
"""Of an item that a client sends back as it got it."""
_FIELDS = {
    "message": _MEANINGLESS | {"role", "content"},
    "function_call": _MEANINGLESS | {"call_id", "name", "arguments"},
    "function_call_output": _MEANINGLESS | {"call_id", "output"},
    "reasoning": _MEANINGLESS | {"summary", "content"},
    "item_reference": {"type", "id"},
}
_ROLES = ("system", "developer", "user", "assistant")

Find = Callable[[str], Item | None]
"""An id → the item that is kept under it for whoever asks."""


# -- from clients -----------------------------------------------------------------------------------------------------


def items_of(given: object, field: str, find: Find) -> list[Item]:
    """Checked items: those that are kept where they are referred to, and others with an id of their own.

    Raises InvalidRequest naming what is wrong with them, or NotFound for a reference to what is not there.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest(f"{field} must be a text or a list of at least one item", param=field)
    return [_item_of(item, f"{field}[{index}]", find) for index, item in enumerate(given)]


def is_reference(given: object) -> bool:
    """Whether something that a client sent as an item names one that is kept. It may leave out the type."""
    if not isinstance(given, dict):
        return False
    said = {name for name, value in given.items() if value is not None}
    return given.get("type") == "item_reference" or said == {"id"}


def check_once(items: Sequence[Item], field: str, before: Iterable[str]) -> None:
    """Raise InvalidRequest for a reference to an item that is there already. before: ids of those before these."""
    known = set(before)
    for index, item in enumerate(items):
        if item["id"] in known:
            place = f"{field}[{index}].id"
            raise InvalidRequest(f"{place}: {item['id']!r} is there already: leave it out here", param=place)
        known.add(item["id"])


def check_outputs(items: Sequence[Item], field: str, before: Iterable[Message]) -> None:
    """Raise InvalidRequest for the output of a call that nobody made, in the messages before or in the items."""
    known = {call["id"] for message in before for call in message.get("tool_calls", ())}
    for index, item in enumerate(items):
        if item["type"] == "function_call":
            known.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in known:
            place = f"{field}[{index}].call_id"
            raise InvalidRequest(f"{place}: no call before it is {item['call_id'][:80]!r}", param=place)


def _item_of(item: object, field: str, find: Find) -> Item:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{field} must be an object with role and content", param=field)
    kind = "item_reference" if is_reference(item) else item.get("type", "message")
    if not isinstance(kind, str) or kind not in _FIELDS:
        place = f"{field}.type"
        raise InvalidRequest(f"{place} must be one of {', '.join(_FIELDS)}; got {kind!r:.60}", param=place)
    for name, value in item.items():
        if value is not None and name not in _FIELDS[kind]:
            raise InvalidRequest(f"{field}.{name[:60]} is not supported", param=f"{field}.{name[:60]}")
    match kind:
        case "function_call":
            return _call_of(item, field)
        case "function_call_output":
            output = _texts(item.get("output"), f"{field}.output")
            return output_item(_named(item, "call_id", field), _text(output, f"{field}.output"))
        case "reasoning":
            return reasoning_item(_thoughts(item, field))
        case "item_reference":
            return _referred_to(_named(item, "id", field), f"{field}.id", find)
        case _:
            return _message_of(item, field)


def _referred_to(item_id: str, field: str, find: Find) -> Item:
    item = find(item_id)
    if item is None:
        raise NotFound(
            f"{field}: no item {item_id[:80]!r} is kept: it was not stored, or is forgotten; send the item itself",
            param=field,
        )
    return item


def _message_of(item: Mapping[str, Any], field: str) -> Item:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        place = f"{field}.role"
        raise InvalidRequest(f"{place} must be one of {', '.join(_ROLES)}; got {role!r:.60}", param=place)
    text = _text(_texts(item.get("content"), f"{field}.content"), f"{field}.content")
    return message_item(role, text)


def _call_of(item: Mapping[str, Any], field: str) -> Item:
    call_id, name, arguments = _named(item, "call_id", field), _named(item, "name", field), item.get("arguments")
    if not isinstance(arguments, str):
        raise InvalidRequest(f"{field}.arguments must be a string", param=f"{field}.arguments")
    check_arguments(arguments, f"{field}.arguments")
    return call_item(call_id, name, arguments)


def _named(item: Mapping[str, Any], name: str, field: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field}.{name} must be a string", param=f"{field}.{name}")
    return value


def _thoughts(item: Mapping[str, Any], field: str) -> str:
    """The text of an item of reasoning; a summary is for people to read."""
    parts = item.get("content")
    if parts is not None and not isinstance(parts, list):
        raise InvalidRequest(f"{field}.content must be a list", param=f"{field}.content")
    return "".join([_thought(part, f"{field}.content[{index}]") for index, part in enumerate(parts or ())])


def _thought(part: object, field: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "reasoning_text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(f'{field} must be {{"type": "reasoning_text", "text": …}}', param=field)
    if unknown := sorted(part.keys() - {"type", "text"}):
        raise InvalidRequest(f"{field}.{unknown[0][:60]} is not supported", param=f"{field}.{unknown[0][:60]}")
    return str(part["text"])


def _text(content: object, field: str) -> str:
    """Content as check_messages joins it, for one that the client knows by another place."""
    try:
        (message,) = check_messages([{"role": "user", "content": content}])
    except InvalidRequest as error:
        place = (error.param or field).replace("messages[0].content", field)
        raise InvalidRequest(error.message.replace("messages[0].content", field), param=place) from None
    return message["content"]


def _texts(content: object, field: str) -> object:
    """Content with every part named as in chat messages."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequest(
                f"{field}[{index}].type must be one of {', '.join(_PARTS)}; got {kind!r:.60}",
                param=f"{field}[{index}].type",
            )
        named = {name: value for name, value in part.items() if name not in ("annotations", "logprobs")}
        parts.append({**named, "type": "text"})
    return parts


# -- as clients are shown them ----------------------------------------------------------------------------------------


def message_item(role: str, text: str, *, status: str = "completed") -> Item:
    """A message of one part."""
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": _new_id("msg"), "type": "message", "role": role, "status": status, "content": [part]}


def call_item(call_id: str, name: str, arguments: str, *, status: str = "completed") -> Item:
    """A call of a function."""
    item = {"id": _new_id("fc"), "type": "function_call", "status": status}
    return {**item, "call_id": call_id, "name": name, "arguments": arguments}


def output_item(call_id: str, output: str) -> Item:
    """What a call came to."""
    item = {"id": _new_id("fco"), "type": "function_call_output", "status": "completed"}
    return {**item, "call_id": call_id, "output": output}


def reasoning_item(text: str, *, status: str = "completed") -> Item:
    """What the model said to itself; nobody sums it up."""
    parts = [{"type": "reasoning_text", "text": text}]
    return {"id": _new_id("rs"), "type": "reasoning", "status": status, "summary": [], "content": parts}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def list_content(items: Sequence[Item], after: str | None, limit: int, order: str) -> dict[str, Any]:
    """One page of a list of items. order: "asc" or "desc". Raises NotFound if there is no item `after`."""
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise NotFound(f"after: there is no item {after!r}", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    shown = ordered[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else "",
        "last_id": shown[-1]["id"] if shown else "",
        "has_more": len(ordered) > limit,
    }


# -- as the template is given them ------------------------------------------------------------------------------------


def messages_of(items: Sequence[Item]) -> list[Message]:
    """The messages that items are.

    A call belongs to the answer that it follows; words, to the call or the reasoning before them. Messages of the
    assistant that follow each other are apart.
    """
    messages: list[Message] = []
    last = ""
    for item in items:
        kind = "answer" if item.get("role") == "assistant" else item["type"]
        if kind in ("answer", "function_call", "reasoning"):
            goes_on = last in ("function_call", "reasoning") or (kind == "function_call" and last == "answer")
            if not goes_on or (kind == "reasoning" and last != "reasoning"):
                messages.append(Message(role="assistant", content=""))
            _add_said(messages[-1], item)
        elif kind == "function_call_output":
            messages.append(Message(role="tool", content=item["output"], tool_call_id=item["call_id"]))
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            messages.append(Message(role=role, content=_joined(item)))
        last = kind
    return messages


def _add_said(message: Message, item: Item) -> None:
    """Add an item of the model's to its answer."""
    if item["type"] == "function_call":
        arguments = check_arguments(item["arguments"], "arguments")
        called = CalledFunction(name=item["name"], arguments=arguments)
        call = CallMessage(id=item["call_id"], type="function", function=called)
        message["tool_calls"] = [*message.get("tool_calls", []), call]
    elif item["type"] == "reasoning":
        message["reasoning_content"] = message.get("reasoning_content", "") + _joined(item)
    else:
        message["content"] += _joined(item)


def _joined(item: Item) -> str:
    return "".join([part["text"] for part in item["content"]])

"""Anthropic's messages of content blocks, checked, as the messages that chat templates know.

A message of the user with results of tools becomes one message for each result and one for the words behind them.
Neighbouring messages of one role are one turn, as Anthropic has it.
"""

from collections.abc import Mapping
from typing import Any

from sessile.errors import InvalidRequest
from sessile.text.template import Message
from sessile.text.tools import CalledFunction, CallMessage

MESSAGES_MAX = 100_000

_FIELDS = {
    "text": {"text"},
    "tool_use": {"id", "name", "input"},
    "tool_result": {"tool_use_id", "content", "is_error"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
}
_OF_ROLE = {"user": {"text", "tool_result"}, "assistant": {"text", "tool_use", "thinking", "redacted_thinking"}}


def to_messages(system: object, messages: object) -> list[Message]:
    """The messages of a request. Raises InvalidRequest naming the field at fault."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: must be a list of at least one message", param="messages")
    if len(messages) > MESSAGES_MAX:
        raise InvalidRequest(f"messages: at most {MESSAGES_MAX}", param="messages")
    turned: list[Message] = []
    if system:
        turned.append(Message(role="system", content=_text(system, "system")))
    for index, message in enumerate(messages):
        for each in _turn(message, f"messages.{index}"):
            _append(turned, each)
    last = turned[-1]
    if last["role"] == "assistant" and (not last["content"].strip() or last["content"] != last["content"].rstrip()):
        raise InvalidRequest(
            "messages: a last message of the assistant is the beginning of its answer: text that does not end in"
            " white space",
            param="messages",
        )
    if "tool_calls" in last:
        raise InvalidRequest("messages: the results of the last message's tool_use are missing", param="messages")
    return turned


def _append(turned: list[Message], message: Message) -> None:
    """Add a message, or join it to the last one if they are of one role."""
    last = turned[-1] if turned else None
    if last is None or last["role"] != message["role"] or message["role"] == "tool":
        turned.append(message)
        return
    last["content"] = "\n".join(content for content in (last["content"], message["content"]) if content)
    if "tool_calls" in message:
        last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
    if "reasoning_content" in message:
        last["reasoning_content"] = last.get("reasoning_content", "") + message["reasoning_content"]


def _turn(message: object, field: str) -> list[Message]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(role, str) or role not in _OF_ROLE:
        raise _fault(f"{field}.role", "must be user or assistant")
    _refuse_others(message, {"role", "content"}, field)
    content = message.get("content")
    if isinstance(content, str):
        return [Message(role=role, content=content)]
    if not isinstance(content, list):
        raise _fault(f"{field}.content", "must be a string or a list of blocks")
    if role == "user" and not content:
        raise _fault(f"{field}.content", "must have at least one block")
    blocks = [_block(block, _OF_ROLE[role], f"{field}.content.{index}") for index, block in enumerate(content)]
    return _said(blocks) if role == "assistant" else _asked(blocks)


def _said(blocks: list[dict[str, Any]]) -> list[Message]:
    """A turn of the assistant."""
    message = Message(role="assistant", content="\n".join(block["text"] for block in blocks if block["type"] == "text"))
    if thoughts := [block["thinking"] for block in blocks if block["type"] == "thinking"]:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls := [_call(block) for block in blocks if block["type"] == "tool_use"]:
        message["tool_calls"] = calls
    return [message]


def _call(block: Mapping[str, Any]) -> CallMessage:
    function = CalledFunction(name=block["name"], arguments=block["input"])
    return CallMessage(id=block["id"], type="function", function=function)


def _asked(blocks: list[dict[str, Any]]) -> list[Message]:
    """A turn of the user: results, and words in between and behind them."""
    turned: list[Message] = []
    for block in blocks:
        if block["type"] == "tool_result":
            turned.append(Message(role="tool", content=block["content"], tool_call_id=block["tool_use_id"]))
        else:
            _append(turned, Message(role="user", content=block["text"]))
    return turned


def _block(block: object, kinds: set[str], field: str) -> dict[str, Any]:
    """A checked block; the content of a result as text."""
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise _fault(f"{field}.type", "is required")
    kind = block["type"]
    if kind not in kinds:
        raise _fault(f"{field}.type", f"{kind[:40]!r} is not supported there; {', '.join(sorted(kinds))} are")
    _refuse_others(block, {"type", "cache_control", *_FIELDS[kind]}, field)
    _check_cache_control(block.get("cache_control"), f"{field}.cache_control")
    checked = dict(block)
    for name in ("text", "thinking", "id", "name", "tool_use_id"):
        if name in _FIELDS[kind] and not isinstance(block.get(name), str):
            raise _fault(f"{field}.{name}", "must be a string")
    if kind == "tool_use" and not isinstance(block.get("input"), dict):
        raise _fault(f"{field}.input", "must be an object")
    if kind == "tool_result":
        content = block.get("content")
        checked["content"] = "" if content is None else _text(content, f"{field}.content")
        if block.get("is_error") not in (None, False, True):
            raise _fault(f"{field}.is_error", "must be true or false")
        if block.get("is_error"):
            checked["content"] = f"Error: {checked['content']}"
    return checked


def _text(content: object, field: str) -> str:
    """A string, or blocks of text joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _fault(field, "must be a string or a list of text blocks")
    return "\n".join(_block(block, {"text"}, f"{field}.{index}")["text"] for index, block in enumerate(content))


def _check_cache_control(control: object, field: str) -> None:
    if control is None:
        return
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise _fault(field, 'must be {"type": "ephemeral"}')
    if control.get("ttl") not in (None, "5m", "1h"):
        raise _fault(f"{field}.ttl", 'must be "5m" or "1h"')
    _refuse_others(control, {"type", "ttl"}, field)


def _refuse_others(given: Mapping[str, Any], known: set[str], field: str) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            raise _fault(f"{field}.{name[:40]}", "is not supported")


def _fault(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", param=field)

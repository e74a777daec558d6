"""Items: what the input and the output of responses, and conversations, are lists of; here always messages."""

import uuid
from collections.abc import Sequence
from typing import Any

from sessile.errors import InvalidRequest, NotFound
from sessile.text.template import Message, check_messages

Item = dict[str, Any]
"""A message as OpenAI's API shows it: id, type, role, status, and content as a list of parts."""

_PARTS = ("input_text", "output_text", "text")
_MEANINGLESS = frozenset({"id", "status", "phase", "type"})
"""Of an item that a client sends back as it got it."""


def items_of(given: object, field: str) -> list[Item]:
    """Checked items, each with an id of its own. Raises InvalidRequest naming what is wrong with them."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest(f"{field} must be a text or a list of at least one item", param=field)
    return [_item_of(item, f"{field}[{index}]") for index, item in enumerate(given)]


def _item_of(item: object, field: str) -> Item:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{field} must be an object with role and content", param=field)
    if item.get("type", "message") != "message":
        raise InvalidRequest(f"{field}.type: only messages are supported", param=f"{field}.type")
    content = item.get("content")
    named = {name: value for name, value in item.items() if name not in _MEANINGLESS and name != "content"}
    (message,) = check_messages_at([{**named, "content": _texts(content, f"{field}.content")}], field)
    kind = "output_text" if message["role"] == "assistant" else "input_text"
    return message_item(item["role"], message["content"], kind=kind)


def check_messages_at(messages: list[dict[str, Any]], field: str) -> list[Message]:
    """The same as check_messages, for one message that the client knows by another place."""
    try:
        return check_messages(messages)
    except InvalidRequest as error:
        message = error.message.replace("messages[0]", field)
        raise InvalidRequest(message, param=(error.param or field).replace("messages[0]", field)) from None


def _texts(content: object, field: str) -> object:
    """Content with every part named as in chat messages."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequest(
                f"{field}[{index}].type must be one of {', '.join(_PARTS)}; got {kind!r}",
                param=f"{field}[{index}].type",
            )
        named = {name: value for name, value in part.items() if name not in ("annotations", "logprobs")}
        parts.append({**named, "type": "text"})
    return parts


def message_item(role: str, text: str, *, kind: str, item_id: str | None = None, status: str = "completed") -> Item:
    """A message of one part. kind: "input_text" or "output_text"."""
    part: dict[str, Any] = {"type": kind, "text": text}
    if kind == "output_text":
        part |= {"annotations": [], "logprobs": []}
    return {
        "id": item_id or new_item_id(),
        "type": "message",
        "role": role,
        "status": status,
        "content": [part],
    }


def new_item_id() -> str:
    """An id of an item."""
    return f"msg_{uuid.uuid4().hex}"


def messages_of(items: Sequence[Item]) -> list[Message]:
    """What the template is given for items."""
    return [
        Message(
            role="system" if item["role"] == "developer" else item["role"],
            content="".join([part["text"] for part in item["content"]]),
        )
        for item in items
    ]


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

"""Messages, items and blocks as /openapi.json describes them: they are checked by hand, so their shapes stand here.

A test holds them against what the server does with them. A field beside those that are listed may be null.
"""

from typing import Any

Schema = dict[str, Any]

ANY: Schema = {}
NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1}
TEXT_OR_NULL: Schema = {"anyOf": [TEXT, NULL]}


def word(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "const": values[0]} if len(values) == 1 else {"type": "string", "enum": list(values)}


def exactly(title: str, optional: Schema | None = None, **fields: Schema) -> Schema:
    """An object of these fields, and perhaps of optional ones."""
    properties = {**fields, **(optional or {})}
    return {
        "title": title,
        "type": "object",
        "required": list(fields),
        "properties": properties,
        "additionalProperties": False,
    }


def mostly(title: str, optional: Schema | None = None, **fields: Schema) -> Schema:
    """The same, where other fields may be null."""
    return exactly(title, optional, **fields) | {"additionalProperties": NULL}


def listed(*kinds: Schema, least: int = 1) -> Schema:
    """A list of such."""
    items = kinds[0] if len(kinds) == 1 else {"anyOf": list(kinds)}
    return {"type": "array", **({"minItems": least} if least else {}), "items": items}


def either(*kinds: Schema) -> Schema:
    """One of these."""
    return {"anyOf": list(kinds)}


# -- chat -------------------------------------------------------------------------------------------------------------

_PARTS = either(TEXT, listed(exactly("TextPart", type=word("text"), text=TEXT)))
_NAMED = {"name": TEXT_OR_NULL}
_FUNCTION = mostly("CalledFunction", name=NAME, arguments=either({"type": "object"}, TEXT))
_CALL = mostly("ToolCall", {"type": word("function"), "index": ANY}, id=NAME, function=_FUNCTION)
CHAT_MESSAGES = listed(
    mostly("Message", _NAMED, role=word("system", "developer", "user"), content=_PARTS),
    mostly(
        "AssistantMessage",
        {
            "content": either(*_PARTS["anyOf"], NULL),
            "reasoning_content": TEXT_OR_NULL,
            "tool_calls": either(listed(_CALL, least=0), NULL),
            **_NAMED,
        },
        role=word("assistant"),
    ),
    mostly("ToolMessage", _NAMED, role=word("tool"), content=_PARTS, tool_call_id=TEXT),
)

# -- responses --------------------------------------------------------------------------------------------------------

_SENT_BACK: Schema = {"id": ANY, "status": ANY, "phase": ANY}
_ITEM_PART = exactly(
    "ItemPart", {"annotations": ANY, "logprobs": ANY}, type=word("input_text", "output_text", "text"), text=TEXT
)
_ITEM_PARTS = either(TEXT, listed(_ITEM_PART))
_REASONING_PART = exactly("ReasoningPart", type=word("reasoning_text"), text=TEXT)
ITEMS = listed(
    mostly(
        "MessageItem",
        {"type": word("message"), **_SENT_BACK},
        role=word("system", "developer", "user", "assistant"),
        content=_ITEM_PARTS,
    ),
    mostly("CallItem", _SENT_BACK, type=word("function_call"), call_id=NAME, name=NAME, arguments=TEXT),
    mostly("OutputItem", _SENT_BACK, type=word("function_call_output"), call_id=NAME, output=_ITEM_PARTS),
    mostly(
        "ReasoningItem",
        {"summary": ANY, "content": either(listed(_REASONING_PART, least=0), NULL), **_SENT_BACK},
        type=word("reasoning"),
    ),
    mostly("ItemReference", {"type": either(word("item_reference"), NULL)}, id=NAME),
)
INPUT = either(TEXT, ITEMS)

# -- Anthropic's ------------------------------------------------------------------------------------------------------

_CACHE_CONTROL = mostly("CacheControl", {"ttl": either(word("5m", "1h"), NULL)}, type=word("ephemeral"))
_CACHED = {"cache_control": either(_CACHE_CONTROL, NULL)}
_TEXT_BLOCK = mostly("TextBlock", _CACHED, type=word("text"), text=TEXT)
_RESULT = mostly(
    "ToolResultBlock",
    {
        "content": either(TEXT, listed(_TEXT_BLOCK, least=0), NULL),
        "is_error": either({"type": "boolean"}, NULL),
        **_CACHED,
    },
    type=word("tool_result"),
    tool_use_id=TEXT,
)
_USE = mostly("ToolUseBlock", _CACHED, type=word("tool_use"), id=TEXT, name=TEXT, input={"type": "object"})
_THINKING = mostly("ThinkingBlock", {"signature": ANY, **_CACHED}, type=word("thinking"), thinking=TEXT)
_REDACTED = mostly("RedactedThinkingBlock", {"data": ANY, **_CACHED}, type=word("redacted_thinking"))
_SAID = listed(_TEXT_BLOCK, _USE, _THINKING, _REDACTED, least=0)
SYSTEM = either(TEXT, listed(_TEXT_BLOCK, least=0), NULL)
BLOCK_MESSAGES = listed(
    mostly("UserTurn", role=word("user"), content=either(TEXT, listed(_TEXT_BLOCK, _RESULT))),
    mostly("AssistantTurn", role=word("assistant"), content=either(TEXT, _SAID)),
)

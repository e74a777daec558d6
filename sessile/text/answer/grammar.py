"""What an answer must be where a call is demanded, and what may stand before it: Lark, as llguidance reads it."""

import json
from collections.abc import Sequence

from sessile.text.answer.formats import AnswerFormat
from sessile.text.answer.marked import HERMES
from sessile.text.answer.reasoning import CLOSE, OPEN
from sessile.text.tools import ToolSpec

WITH_GRAMMAR = frozenset({"hermes", "llama3"})
"""Formats in which a call can be demanded."""

_AS_MODELS_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How arguments are spaced: as templates render earlier calls, so that the KV of an answer is that of its history."""


def call_grammar(
    form: AnswerFormat, tools: Sequence[ToolSpec], prompt: str, *, is_parallel: bool, special: frozenset[str]
) -> str:
    """A grammar of one call of one of the tools, or with is_parallel of several; reasoning may come first.

    prompt: as it was rendered: reasoning that it has begun goes on. special: markers that are special tokens.
    """
    assert form.tools in WITH_GRAMMAR and tools
    key = "arguments" if form.tools == "hermes" else "parameters"
    rules = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        head = json.dumps({"name": function["name"]})[:-1] + f', "{key}": '
        schema = json.dumps({**function["parameters"], "x-guidance": _AS_MODELS_WRITE})
        rules.append(f'call{index}: {_literal(head)} %json {schema} "}}"')
    one = " | ".join(f"call{index}" for index in range(len(tools)))
    if form.tools == "hermes":
        begin, end = _marker(HERMES.open, special), _marker(HERMES.close, special)
        rules.append(f'marked: {begin} "\\n" call "\\n" {end}')
        calls = 'marked ("\\n" marked)*' if is_parallel else "marked"
    else:
        calls = 'call ("; " call)*' if is_parallel else "call"
    lead = reasoning_lead(form, prompt, special)
    return "\n".join([f"start: {'lead ' if lead else ''}{calls}", f"call: {one}", *rules, lead])


def reasoning_lead(form: AnswerFormat, prompt: str, special: frozenset[str]) -> str:
    """The rule `lead`, and those it needs: reasoning up to its end; "" for a model that does not reason.

    Where the prompt has not opened it, there may be none. No text can spell a marker that is a special token.
    """
    if form.reasoning != "think":
        return ""
    if CLOSE in special:
        thought, rule = f"thought {CLOSE} space", "thought: /(.|\\n)*/"
    else:
        thought, rule = "thought space", f"thought[lazy]: /(.|\\n)*{CLOSE.replace('/', chr(92) + '/')}/"
    is_open = prompt.rstrip().endswith(OPEN)
    lead = thought if is_open else f"({_marker(OPEN, special)} {thought})?"
    return "\n".join([f"lead: {lead}", rule, "space: /[ \\t\\r\\n]{0,32}/"])


def _marker(marker: str, special: frozenset[str]) -> str:
    """A special token is named as it is, between angle brackets; anything else is text."""
    return marker if marker in special else _literal(marker)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

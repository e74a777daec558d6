"""What an answer must be where a call is demanded: a grammar in Lark, as llguidance reads it."""

import json
from collections.abc import Sequence

from sessile.text.answer.formats import AnswerFormat
from sessile.text.answer.marked import HERMES
from sessile.text.answer.reasoning import CLOSE, OPEN
from sessile.text.tools import ToolSpec

WITH_GRAMMAR = frozenset({"hermes", "llama3"})
"""Formats in which a call can be demanded."""


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
        rules.append(f'call{index}: {_literal(head)} arguments{index} "}}"')
        rules.append(f"arguments{index}: %json {json.dumps(function['parameters'])}")
    one = " | ".join(f"call{index}" for index in range(len(tools)))
    if form.tools == "hermes":
        begin, end = _marker(HERMES.open, special), _marker(HERMES.close, special)
        rules.append(f'marked: {begin} "\\n" call "\\n" {end}')
        calls = 'marked ("\\n" marked)*' if is_parallel else "marked"
    else:
        calls = 'call ("; " call)*' if is_parallel else "call"
    start = f"start: {_reasoning(form, prompt, special)}{calls}"
    return "\n".join([start, f"call: {one}", *rules, *_thought(form, special)])


def _reasoning(form: AnswerFormat, prompt: str, special: frozenset[str]) -> str:
    if form.reasoning != "think":
        return ""
    thought = f"thought {CLOSE} space" if CLOSE in special else "thought space"
    return f"{thought} " if prompt.rstrip().endswith(OPEN) else f"({_marker(OPEN, special)} {thought})? "


def _thought(form: AnswerFormat, special: frozenset[str]) -> list[str]:
    """Reasoning up to the marker that closes it, which no text can spell where it is a special token."""
    if form.reasoning != "think":
        return []
    space = "space: /[ \\t\\r\\n]*/"
    if CLOSE in special:
        return ["thought: /(.|\\n)*/", space]
    return [f"thought[lazy]: /(.|\\n)*{CLOSE.replace('/', chr(92) + '/')}/", space]


def _marker(marker: str, special: frozenset[str]) -> str:
    """A special token is named as it is, between angle brackets; anything else is text."""
    return marker if marker in special else _literal(marker)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

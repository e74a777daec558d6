"""The grammar of an answer that must call: what it lets through is read as calls, and it lets nothing else through."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from msgspec.structs import replace

from sessile.contract.messages import Grammar
from sessile.contract.model import ModelFacts
from sessile.grammar.compiler import GrammarCompiler
from sessile.text.answer.formats import AnswerFormat
from sessile.text.answer.grammar import call_grammar, reasoning_lead
from sessile.text.tools import ToolSpec
from tests.unit.answers import HERMES, LLAMA3, THINKING, read

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[ToolSpec] = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
]
F, G = '{"name": "f", "arguments": {"a": 5}}', '{"name": "g", "arguments": {"any": ["thing"]}}'


def marked(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def lets_through(
    form: AnswerFormat, text: str, *, prompt: str = "", is_parallel: bool = True, special: frozenset[str] = frozenset()
) -> bool:
    source = call_grammar(form, TOOLS, prompt, is_parallel=is_parallel, special=special)
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(source))
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("form", "text", "prompt"),
    [
        (HERMES, marked(F), ""),
        (HERMES, marked(F, G, F), ""),
        (LLAMA3, F.replace("arguments", "parameters"), ""),
        (LLAMA3, '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', ""),
        (THINKING, marked(G), ""),
        (THINKING, f"<think>\nif a < b </b> then\n</think>\n\n{marked(F)}", ""),
        (THINKING, f"so\n</think>\n{marked(F)}", "<think>\n"),
    ],
)
def test_calls_are_let_through_and_are_read(form: AnswerFormat, text: str, prompt: str) -> None:
    assert lets_through(form, text, prompt=prompt)
    answer = read(form, text, prompt=prompt)
    assert answer.calls and not answer.content and not answer.failures


@pytest.mark.parametrize(
    ("form", "text", "prompt"),
    [
        (HERMES, "It rains.", ""),
        (HERMES, "", ""),
        (HERMES, marked(F) + " so", ""),
        (HERMES, marked(F.replace('"a"', '"b"')), ""),
        (HERMES, marked(F.replace('"f"', '"h"')), ""),
        (LLAMA3, '{"answer": 5}', ""),
        (THINKING, "<think>so</think>", ""),
        (THINKING, "so", "<think>\n"),
    ],
)
def test_nothing_else_is_let_through(form: AnswerFormat, text: str, prompt: str) -> None:
    assert not lets_through(form, text, prompt=prompt)


@pytest.mark.parametrize("grammar", [Grammar("json_object", ""), Grammar("json_schema", json.dumps(PARAMETERS))])
@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<think>\n", 'so {"\n</think>\n\n{"a": 5}', True),
        ("", '<think>so</think>{"a": 5}', True),
        ("", '{"a": 5}', True),
        ("", "so", False),
        ("<think>", "so</think>so", False),
    ],
)
def test_reasoning_may_stand_before_json(grammar: Grammar, prompt: str, text: str, expected: bool) -> None:
    facts = ModelFacts(
        vocab_size=257,
        context_tokens=100,
        eos_ids=(256,),
        token_bytes=(*(bytes([byte]) for byte in range(256)), b"</s>"),
        special_ids=frozenset({256}),
    )
    lead = reasoning_lead(THINKING, prompt, frozenset())
    matcher = GrammarCompiler(facts).compile(replace(grammar, lead=lead)).deep_copy()
    tokens = list(text.encode())
    assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == expected


def test_arguments_are_spaced_as_templates_space_them() -> None:
    assert not lets_through(HERMES, marked(F.replace('"a": 5', '"a":5')))
    assert not lets_through(HERMES, marked(F.replace('"a": 5', '\n"a": 5')))


def test_one_call_may_be_all_there_is_to_be() -> None:
    assert lets_through(HERMES, marked(F), is_parallel=False)
    assert not lets_through(HERMES, marked(F, G), is_parallel=False)


def test_markers_that_are_special_tokens_are_named_as_such() -> None:
    special = frozenset({"<tool_call>", "</tool_call>", "<think>", "</think>"})
    source = call_grammar(THINKING, TOOLS, "", is_parallel=True, special=special)
    assert "(<think> thought </think> space)?" in source
    assert 'marked: <tool_call> "\\n" call "\\n" </tool_call>' in source
    assert not LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(source))[0]

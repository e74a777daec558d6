"""Calls of tools, read out of the text of an answer."""

import json
from typing import Any

import pytest

from sessile.text.answer.events import CallArguments, CallBegan, CallEnded, CallFailed, Content
from sessile.text.answer.formats import AnswerFormat, tool_format
from tests.unit.answers import HERMES, LLAMA3, PYTHONIC, added_up, calls, events_of, read

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
ANOTHER = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


def test_text_before_between_and_behind_calls_is_content_without_the_white_space_at_calls() -> None:
    answer = read(HERMES, f"Let me see.\n{CALL}\n and \n{ANOTHER}\n\nDone. ")
    assert calls(answer) == [("f", '{"a": 1}'), ("g", "{}")]
    assert answer.content == "Let me see.andDone. "


def test_a_call_is_told_name_first_and_then_its_arguments_as_they_come() -> None:
    where = CALL.index('"a"')
    events = events_of(HERMES, [CALL[:where], CALL[where:]])
    assert events == [CallBegan(0, "f"), CallArguments(0, "{"), CallArguments(0, '"a": 1}'), CallEnded(0)]


def test_arguments_that_come_before_the_name_wait_for_it() -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    assert events_of(HERMES, [text]) == [CallBegan(0, "f"), CallArguments(0, '{"a": 1}'), CallEnded(0)]


def test_a_marker_within_an_argument_is_part_of_it() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>'
    assert calls(read(HERMES, text)) == [("f", '{"a": "</tool_call><tool_call>"}')]


def test_line_breaks_within_strings_become_escapes() -> None:
    (call,) = read(HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty"}}</tool_call>').calls
    assert json.loads(call.arguments) == {"a": "x\n\ty"}


def test_arguments_in_a_string_are_what_is_in_the_string() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": [1, \\"{\\"]}"}</tool_call>'
    assert calls(read(HERMES, text)) == [("f", '{"a": [1, "{"]}')]


@pytest.mark.parametrize("rest", ["</tool_call>", "", "</tool_ca"])
def test_a_last_brace_that_is_forgotten_is_forgiven(rest: str) -> None:
    answer = read(HERMES, f'<tool_call>{{"name": "f", "arguments": {{"a": 1}}{rest}')
    assert (calls(answer), answer.content, answer.failures) == ([("f", '{"a": 1}')], "", [])


def test_a_list_of_calls_between_one_pair_of_markers_is_taken_apart() -> None:
    text = '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]</tool_call> end'
    answer = read(HERMES, text)
    assert (calls(answer), answer.content) == ([("f", "{}"), ("g", '{"a": 1}')], "end")


def test_a_call_between_markers_may_name_what_is_no_tool_so_that_the_client_can_say_so() -> None:
    assert calls(read(HERMES, '<tool_call>{"name": "h", "arguments": {}}</tool_call>')) == [("h", "{}")]


BROKEN = {
    "no JSON": "<tool_call>f(a=1)</tool_call>",
    "no value": '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
    "no quotes": '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>',
    "quotes within": '<tool_call>{"name": "f", "arguments": {"a": "x"y"}}</tool_call>',
    "half a pair": '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
    "no name": '<tool_call>{"arguments": {"a": 1}}</tool_call>',
    "a number for a name": '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    "a list of arguments": '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    "a string of no object": '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
    "the name twice": '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>',
    "too deep": '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}</tool_call>",
    "a number without end": '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 600 + "}}</tool_call>",
    "nothing behind it": "<tool_call>",
    "an end within": '<tool_call>{"name": "f", "arguments": {"a": "x',
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_as_a_call_is_text_and_is_flagged(name: str) -> None:
    answer = read(HERMES, f"So: {BROKEN[name]}")
    assert answer.calls == []
    assert answer.content == f"So:{BROKEN[name]}"
    (failure,) = answer.failures
    assert failure.reason


def test_a_call_that_breaks_off_in_mid_stream_is_taken_back_by_its_index() -> None:
    events = events_of(HERMES, [f'{CALL}<tool_call>{{"name": "g", "arguments": {{"a": oh}}}}</tool_call>'])
    began, failed = events[3], events[-2]
    assert (began, type(failed), failed.index) == (CallBegan(1, "g"), CallFailed, 1)
    assert events[-1] == Content("oh}}</tool_call>")


def test_after_a_broken_call_the_next_one_is_read() -> None:
    answer = read(HERMES, BROKEN["no value"] + CALL)
    assert (calls(answer), len(answer.failures)) == ([("f", '{"a": 1}')], 1)


@pytest.mark.parametrize("text", ["", " a < b ", "<tool", "<tool_calls>", "{}", " \n", "</tool_call>", "x <tool_cal "])
def test_text_without_a_call_passes_unchanged(text: str) -> None:
    answer = read(HERMES, text)
    assert (answer.content, answer.calls, answer.failures) == (text, [], [])


@pytest.mark.parametrize("lead", ["", "\n", "<|python_tag|>", "Let me see. <|python_tag|>"])
def test_llama_calls_bare_or_behind_its_tag(lead: str) -> None:
    answer = read(LLAMA3, lead + '{"name": "f", "parameters": {"a": 1}}')
    assert (calls(answer), answer.content) == ([("f", '{"a": 1}')], lead.partition(" <|")[0] if "see" in lead else "")


@pytest.mark.parametrize("between", ["; ", "\n", ""])
def test_llama_calls_several_one_behind_the_other(between: str) -> None:
    text = f'{{"name": "f", "parameters": {{}}}}{between}{{"type": "function", "name": "g", "parameters": {{}}}}'
    assert [name for name, _ in calls(read(LLAMA3, text))] == ["f", "g"]


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 42}', '{"name": "Ada", "parameters": {}}', '{"name": "f", "born": 1815}', "{f}", "{}",
        'See {"name": "f", "parameters": {}}', '  {"nam',
    ],
)  # fmt: skip
def test_json_that_is_an_answer_stays_one(text: str) -> None:
    answer = read(LLAMA3, text)
    assert (answer.content, answer.calls) == (text, [])


def test_a_bare_object_with_the_name_of_a_tool_that_cannot_be_read_is_flagged() -> None:
    answer = read(LLAMA3, '{"name": "f", "parameters": {"a": b}}')
    assert (answer.content, len(answer.failures)) == ('{"name": "f", "parameters": {"a": b}}', 1)


def test_python_calls_are_read_with_all_plain_values() -> None:
    text = """ [f(a=1, b='it\\'s )', c=[True, None, -2.5], d={"k": (1, "x")}),
    g(s="two\nlines", t=\"\"\"a "q" b\"\"\")] """
    answer = read(PYTHONIC, text)
    assert [(name, json.loads(arguments)) for name, arguments in calls(answer)] == [
        ("f", {"a": 1, "b": "it's )", "c": [True, None, -2.5], "d": {"k": [1, "x"]}}),
        ("g", {"s": "two\nlines", "t": 'a "q" b'}),
    ]
    assert answer.content == ""


def test_python_calls_may_be_written_by_a_model_that_thinks_in_json() -> None:
    assert calls(read(PYTHONIC, "[f(a=true, b=null)]")) == [("f", '{"a": true, "b": null}')]


@pytest.mark.parametrize(
    "arguments",
    [
        "1", "a=b", "a=print(1)", "**x", "*x", "a=1+1", "a=f'{x}'", "a=b'x'", "a=1j", "a={1: 2}", "a={1, 2}",
        "a=__import__('os').system('true')", "a=lambda: 1", "a=[x for x in y]", "a=1e999", "a=1,, b=2", "a=1, a=2",
        "a='\\ud800'", "a=" + "[" * 100 + "]" * 100, "a=" + "-" * 5000 + "1", "a=" + "9" * 5000, "a='\0'",
        "#'''\n)+h(#'''",
    ],
)  # fmt: skip
def test_python_that_is_no_call_with_plain_values_is_text_and_never_evaluated(arguments: str) -> None:
    text = f"[f({arguments})]"
    answer = read(PYTHONIC, text)
    assert (answer.calls, answer.content, len(answer.failures)) == ([], text, 1)


@pytest.mark.parametrize("text", ["[1, 2]", "[see (1)]", "[h(a=1)]", "[", " [f", "f(a=1)", "[f]", "x [f(a=1)]", "[]"])
def test_lists_that_are_no_calls_pass_unchanged(text: str) -> None:
    answer = read(PYTHONIC, text)
    assert (answer.content, answer.calls, answer.failures) == (text, [], [])


def test_calls_before_a_broken_one_stand() -> None:
    answer = read(PYTHONIC, "[f(a=1), g(b=c)] so")
    assert (calls(answer), answer.content) == ([("f", '{"a": 1}')], ", g(b=c)] so")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, CALL + ANOTHER), (PYTHONIC, "[f(a=1), g()]"),
        (LLAMA3, '{"name": "f", "parameters": {"a": 1}}; {"name": "g"}'),
    ],
)  # fmt: skip
def test_without_parallel_calls_the_first_is_all_there_is(form: AnswerFormat, text: str) -> None:
    assert calls(read(form, text, is_parallel=False)) == [("f", '{"a": 1}')]
    assert [event for event in events_of(form, text, is_parallel=False) if isinstance(event, CallBegan)] == [
        CallBegan(0, "f")
    ]


ONLY_G: dict[str, Any] = {"allowed_names": ("g",)}
FORBIDDEN = {
    "hermes": (HERMES, CALL),
    "hermes, its name last": (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'),
    "hermes, no tool": (HERMES, CALL.replace('"f"', '"h"')),
    "hermes, a last brace forgotten": (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>'),
    "hermes, with a call in its arguments": (HERMES, CALL.replace("1", json.dumps(ANOTHER))),
    "llama3": (LLAMA3, '{"name": "f", "parameters": {"a": 1}}'),
    "llama3, behind its tag": (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}'),
    "pythonic": (PYTHONIC, "[f(a=1)]"),
    "pythonic, an allowed one behind it": (PYTHONIC, "[f(a=1), g()]"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_call_that_is_not_allowed_is_text_and_flagged_however_it_is_cut(name: str) -> None:
    form, text = FORBIDDEN[name]
    for pieces in ([text], list(text)):
        events = events_of(form, pieces, **ONLY_G)
        assert not any(isinstance(event, CallBegan) for event in events)
        answer = added_up(events)
        assert (answer.content, calls(answer)) == (text, [])
        (failure,) = answer.failures
        assert failure.index is None and "tool_choice" in failure.reason


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, f"{CALL}{ANOTHER}"),
        (HERMES, f"{ANOTHER}{CALL}"),
        (LLAMA3, '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {}}'),
        (PYTHONIC, "[g(), f(a=1)]"),
    ],
)
def test_an_allowed_call_beside_it_stands(form: AnswerFormat, text: str) -> None:
    answer = read(form, text, **ONLY_G)
    assert (calls(answer), len(answer.failures)) == ([("g", "{}")], 1)


def test_without_tools_nothing_is_a_call() -> None:
    assert read(HERMES, CALL, tool_names=()).content == CALL


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ tools }} within <tool_call></tool_call> tags", "hermes"),
        ('{{ tools }} in the format {"name": function name, "parameters": dictionary of', "llama3"),
        ("{{ tools }} in the format [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ tools }} <tool_call>\n<function=name>", "none"),
        ("{{ tools }} <｜tool▁calls▁begin｜>", "none"),
    ],
)
def test_the_format_is_the_one_that_the_template_asks_for(template: str, expected: str) -> None:
    assert tool_format(template, knows_tools=True) == expected


def test_a_template_that_knows_no_tools_gets_the_format_that_we_ask_for() -> None:
    assert tool_format("{{ messages }}", knows_tools=False) == "hermes"

"""Reasoning, told from the answer."""

import pytest

from sessile.text.answer.events import CallBegan, Content, Reasoning
from sessile.text.answer.formats import reasoning_format
from tests.unit.answers import HERMES, THINKING, calls, events_of, read

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("assistant\n", "<think>\nHm.\n</think>\n\nYes. "),
        ("assistant\n<think>\n", "Hm.\n</think>\n\nYes. "),
        ("assistant\n<think>\n", "<think>Hm.</think>Yes. "),
        ("assistant\n", "\n<think>Hm.</think>\nYes. "),
    ],
)
def test_reasoning_and_answer_are_told_apart_whoever_opened_it(prompt: str, text: str) -> None:
    answer = read(THINKING, text, prompt=prompt)
    assert (answer.reasoning, answer.content) == ("Hm.", "Yes. ")


@pytest.mark.parametrize("text", ["Yes.", " \n", "<thin", "a <think> b </think> c", "</think>", ""])
def test_an_answer_without_reasoning_passes_unchanged(text: str) -> None:
    answer = read(THINKING, text, prompt="<think>\n\n</think>\n\n")
    assert (answer.reasoning, answer.content) == ("", text)


def test_reasoning_that_never_ends_is_all_reasoning() -> None:
    answer = read(THINKING, "Hm. </thin", prompt="<think>")
    assert (answer.reasoning, answer.content) == ("Hm. </thin", "")


def test_a_call_behind_reasoning_is_one_and_a_call_within_is_not() -> None:
    answer = read(THINKING, f"<think>{CALL}</think>\n{CALL}")
    assert (answer.reasoning, calls(answer), answer.content) == (CALL, [("f", "{}")], "")


def test_reasoning_left_in_the_content_is_as_it_was_written_and_holds_no_calls() -> None:
    answer = read(THINKING, f"<think>\n{CALL}\n</think>\n\nYes.", separates_reasoning=False)
    assert (answer.reasoning, answer.content) == ("", f"<think>\n{CALL}\n</think>\n\nYes.")


def test_reasoning_may_be_told_in_one_piece() -> None:
    text = f"<think>One. Two.</think>Yes.{CALL}"
    events = events_of(THINKING, text, streams_reasoning=False)
    assert events[:2] == [Reasoning("One. Two."), Content("Y")]
    assert CallBegan(0, "f") in events
    assert events_of(THINKING, "<think>One.", streams_reasoning=False) == [Reasoning("One.")]


@pytest.mark.parametrize(
    ("text", "prompt", "reasoning"),
    [
        ("<think>é</think>\nYes", "", "<think>é</think>"),
        ("Yes", "", ""),
        ("so", "<think>", "so"),
        ("<think>é", "", "<think>é"),
    ],
)
def test_what_is_reasoning_is_counted_with_its_markers(text: str, prompt: str, reasoning: str) -> None:
    reader = THINKING.reader(prompt)
    reader.finish(text)
    assert reader.reasoning_bytes == len(reasoning.encode())


def test_a_model_whose_template_knows_no_reasoning_has_none() -> None:
    assert reasoning_format("{{ messages }}") == "none"
    assert reasoning_format("{{ content.split('</think>')[-1] }}") == "think"
    assert read(HERMES, "<think>Hm.</think>").content == "<think>Hm.</think>"

"""However an answer is cut into pieces, it is read as the same answer."""

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sessile.text.answer.events import CallArguments, CallFailed, Content
from sessile.text.answer.formats import AnswerFormat
from tests.unit.answers import TOOLS, added_up, events_of, read

FORMS = [AnswerFormat(tools, thought) for tools in ("hermes", "llama3", "pythonic") for thought in ("none", "think")]
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>")
SCRAPS = [
    *MARKERS, "<tool_", "</", "<", "call>", " ", "\n", "{", "}", "[", "]", "(", ")", '"', "'", '"""', "\\", "\\u00",
    ",", ":", ";", '{"name": "f", "arguments": {"a": ', '{"name": "g", "parameters": {}}', '"name"', '"arguments"',
    "f(a=", "[f(", "g()", "1", "-2.5e3", "true", "nul", "é", "😀", "words of an answer", "\u2028", "\x00", "#",
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(), json_values, max_size=4)
calls_made = st.lists(st.tuples(st.sampled_from(TOOLS), arguments), min_size=1, max_size=3)
keywords = st.dictionaries(st.sampled_from(["city", "count", "list_of"]), json_values)
python_calls = st.lists(st.tuples(st.sampled_from(TOOLS), keywords), min_size=1, max_size=3)
words = st.text(st.characters(blacklist_characters="<{[", blacklist_categories=("Cs",)), max_size=20)
anything = st.lists(st.sampled_from(SCRAPS) | st.text(max_size=5), max_size=30).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at these places."""
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


places = st.lists(st.integers(0, 10_000), max_size=40)


@given(st.sampled_from(FORMS), anything, places, st.sampled_from(["", "<think>\n"]), st.booleans(), st.booleans())
def test_any_text_cut_into_any_pieces_is_read_as_the_same_answer(
    form: AnswerFormat, text: str, where: list[int], prompt: str, is_parallel: bool, streams: bool
) -> None:
    wishes = {"prompt": prompt, "is_parallel": is_parallel, "streams_reasoning": streams}
    pieces = added_up(events_of(form, cut(text, where), **wishes))
    assert pieces == read(form, text, **wishes)
    assert pieces == added_up(events_of(form, text, **wishes))


@given(st.sampled_from(FORMS), anything)
def test_nothing_of_a_text_is_lost_where_no_call_was_read(form: AnswerFormat, text: str) -> None:
    answer = read(form, text)
    if not answer.calls:
        kept = answer.reasoning + answer.content
        dropped = [*MARKERS, " ", "\t", "\r", "\n"]
        assert bare(kept, dropped) == bare(text, dropped)


def bare(text: str, dropped: list[str]) -> str:
    for scrap in dropped:
        text = text.replace(scrap, "")
    return text


@given(st.sampled_from(FORMS), st.text(st.characters(blacklist_characters="<{[")))
def test_text_without_markers_passes_through_unchanged(form: AnswerFormat, text: str) -> None:
    answer = read(form, text)
    assert (answer.content, answer.reasoning, answer.calls, answer.failures) == (text, "", [], [])


@given(words, calls_made, words, places)
def test_no_piece_of_a_marker_is_content_when_a_call_follows(
    before: str, made: list[tuple[str, dict]], after: str, where: list[int]
) -> None:
    written = [json.dumps({"name": name, "arguments": given}) for name, given in made]
    text = before + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written) + after
    events = events_of(FORMS[0], cut(text, where))
    content = "".join(event.text for event in events if isinstance(event, Content))
    assert content == before.rstrip(" \t\r\n") + after.lstrip(" \t\r\n")
    assert [(call.name, json.loads(call.arguments)) for call in added_up(events).calls] == made


@given(calls_made, places)
def test_bare_calls_are_read_as_they_were_made(made: list[tuple[str, dict]], where: list[int]) -> None:
    text = "; ".join(json.dumps({"name": name, "parameters": given}, ensure_ascii=False) for name, given in made)
    answer = added_up(events_of(FORMS[2], cut(text, where)))
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == made


@given(python_calls, places)
def test_python_calls_are_read_as_they_were_made(made: list[tuple[str, dict]], where: list[int]) -> None:
    spelled = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in made]
    answer = added_up(events_of(FORMS[4], cut(f"[{', '.join(spelled)}]", where)))
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == made


@given(st.sampled_from(FORMS), anything, places)
def test_what_was_told_of_arguments_is_always_the_beginning_of_a_json_object(
    form: AnswerFormat, text: str, where: list[int]
) -> None:
    told: dict[int, str] = {}
    for event in events_of(form, cut(text, where)):
        if isinstance(event, CallArguments):
            told[event.index] = told.get(event.index, "") + event.text
        elif isinstance(event, CallFailed) and event.index is not None and event.index in told:
            assert begins_json(told.pop(event.index))
    for finished in told.values():
        assert isinstance(json.loads(finished), dict)


def begins_json(text: str) -> bool:
    """Whether some text could follow that makes JSON of it, as a parser of partial JSON sees it."""
    from jiter import from_json

    return isinstance(from_json(text.encode(), partial_mode=True), dict)

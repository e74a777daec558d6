"""Patterns that end an output: found where Python's own engine finds them first, in linear time, or refused."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.core.stop import PatternMatcher
from sessile.errors import InvalidRequest
from sessile.text.patterns import PATTERN_CHARS_MAX, compile_pattern

LEAVES = st.sampled_from(["a", "b", "ab", ".", "[ab]", "[^a]", "[a-c]", r"\d", r"\W", "é", "[é1]", r"\x41", r"\n"])


def combined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    )


PATTERNS = st.recursive(LEAVES, combined, max_leaves=5)


def end_of(pattern: str, text: bytes) -> int | None:
    """The number of bytes after which the matcher stops, fed byte by byte; None if it never does."""
    matcher = PatternMatcher([compile_pattern(pattern, param="stop_regex")])
    for index in range(len(text)):
        if matcher.feed(text[index : index + 1]):
            return index + 1
    return None


def pythons_end_of(pattern: str, text: str) -> int | None:
    anywhere = re.compile(f"(?s:.*)(?:{pattern})", re.ASCII)
    for length in range(1, len(text) + 1):
        if anywhere.fullmatch(text[:length]):
            return len(text[:length].encode())
    return None


@given(PATTERNS, st.text(alphabet="abcA1é\n", max_size=12))
def test_a_match_ends_where_pythons_first_one_does(pattern: str, text: str) -> None:
    if re.compile(pattern, re.ASCII).fullmatch(""):
        with pytest.raises(InvalidRequest, match="empty text"):
            compile_pattern(pattern, param="stop_regex")
        return
    assert end_of(pattern, text.encode()) == pythons_end_of(pattern, text)


def test_bytes_that_come_together_are_as_those_that_come_alone() -> None:
    matcher = PatternMatcher([compile_pattern("x+y", param="stop_regex"), compile_pattern("[0-9]{3}", param="p")])
    assert matcher.feed(b"axx") is None
    assert matcher.feed(b"x12") is None
    assert matcher.feed(b"3xy") == b"x+y"


def test_no_pattern_takes_more_than_linear_time() -> None:
    matcher = PatternMatcher([compile_pattern("(a|aa|a.a)*(a*)*b[^c]{20}c", param="stop_regex")])
    started_s = time.perf_counter()
    assert matcher.feed(b"ab" * 20_000) is None
    assert time.perf_counter() - started_s < 20


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        ("a(", 2), ("a)", 1), ("(a", 0), ("a||b", 2), ("*a", 0), ("a**", 2), ("^a", 0), ("a$", 1), (r"a\b", 1),
        (r"(a)\1", 3), ("(?=a)", 0), ("(?P<x>a)", 0), ("[a", 2), ("[b-a]", 0), ("[^é]", 0), ("[é-ü]", 0), ("a{", 1),
        ("a{3,2}", 1), ("a{0}", 1), ("a{999}", 1), ("a\\", 2), (r"\x4", 0), ("a*", 0), ("(ab){200}", 0),
        ("((a{99}){99}){99}", 0), ("(" * 60 + "a" + ")" * 60, 24),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_so_is_refused_with_its_place(pattern: str, place: int) -> None:
    with pytest.raises(InvalidRequest, match=f"stop_regex: at character {place}: ") as refusal:
        compile_pattern(pattern, param="stop_regex")
    assert refusal.value.param == "stop_regex"


def test_a_pattern_that_is_too_long_or_no_text_is_refused() -> None:
    for pattern in ("a" * (PATTERN_CHARS_MAX + 1), "\ud800"):
        with pytest.raises(InvalidRequest, match="stop_regex"):
            compile_pattern(pattern, param="stop_regex")


def test_counts_that_would_write_out_a_large_automaton_are_refused_at_once() -> None:
    started_s = time.perf_counter()
    with pytest.raises(InvalidRequest, match="too large"):
        compile_pattern("(((" + "[^a]{200}" + "){200}){200}){200}", param="stop_regex")
    assert time.perf_counter() - started_s < 5

"""Stop strings against a search that knows no automaton."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.core.stop import StopFound, StopMatcher

few_letters = st.text("ab", min_size=1, max_size=4).map(str.encode)
stops = st.lists(few_letters, min_size=1, max_size=4)
pieces = st.lists(st.text("abc", max_size=4).map(str.encode), max_size=12)


def searched(stops: Sequence[bytes], text: bytes) -> StopFound | None:
    """The stop that is complete first; of several that end together, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return StopFound(longest, end - len(longest))
    return None


def fed(matcher: StopMatcher, pieces: Sequence[bytes]) -> StopFound | None:
    for piece in pieces:
        found = matcher.feed(piece)
        if found is not None:
            return found
    return None


@given(stops, pieces)
def test_h58_the_matcher_finds_what_a_search_of_the_whole_text_finds(stops: list[bytes], pieces: list[bytes]) -> None:
    assert fed(StopMatcher(stops), pieces) == searched(stops, b"".join(pieces))


@given(stops, st.text("abc", max_size=20).map(str.encode), st.integers(0, 20))
def test_h58_where_the_text_is_cut_into_tokens_does_not_matter(stops: list[bytes], text: bytes, cut: int) -> None:
    assert fed(StopMatcher(stops), [text[:cut], text[cut:]]) == fed(StopMatcher(stops), [text])


@given(stops, pieces, pieces)
def test_skipped_text_is_counted_but_never_part_of_a_match(
    stops: list[bytes], skipped: list[bytes], pieces: list[bytes]
) -> None:
    matcher = StopMatcher(stops)
    for piece in skipped:
        matcher.skip(piece)
    found, alone = fed(matcher, pieces), searched(stops, b"".join(pieces))
    skipped_bytes = len(b"".join(skipped))
    assert found == (alone and StopFound(alone.stop, alone.kept_bytes + skipped_bytes))


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        ([b"abab"], b"aabab", StopFound(b"abab", 1)),
        ([b"b", b"abb"], b"aabb", StopFound(b"b", 2)),
        ([b"bc", b"abc", b"c"], b"abc", StopFound(b"abc", 0)),
        ([b"abcd", b"bc"], b"abcd", StopFound(b"bc", 1)),
        ([b"aaa"], b"aab", None),
    ],
)
def test_the_first_to_be_complete_wins_and_then_the_longest(
    stops: list[bytes], text: bytes, found: StopFound | None
) -> None:
    assert StopMatcher(stops).feed(text) == found


def test_a_stop_string_may_end_inside_a_character() -> None:
    euro = "€".encode()
    matcher = StopMatcher([euro])
    assert [matcher.feed(euro[i : i + 1]) for i in range(3)] == [None, None, StopFound(euro, 0)]


@pytest.mark.parametrize("stops", [[], [b""], [b"a", b""]])
def test_a_matcher_needs_something_to_find(stops: list[bytes]) -> None:
    with pytest.raises(AssertionError, match="at least one stop string"):
        StopMatcher(stops)

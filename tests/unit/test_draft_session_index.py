"""The index of a sequence: after any history of changes it is as if it had been given its tokens at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.contract.drafting import DraftWish
from sessile.draft.drafter import LookupDrafter
from sessile.draft.pace import StepTimes
from sessile.draft.session_index import CAPACITY_MIN, SessionIndex
from sessile.draft.shelf import Shelf
from sessile.errors import InvariantError

changes = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.lists(st.integers(0, 2), max_size=400)),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.just("fork"), st.floats(0, 1)),
    ),
    max_size=12,
)


def octets(tokens: list[int]) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def index_of(tokens: list[int]) -> SessionIndex:
    index = SessionIndex()
    index.extend(octets(tokens))
    return index


def drafts_of(index: SessionIndex, drafts_max: int = 8) -> list[int]:
    """What the sequence alone would have drafted."""
    drafter = LookupDrafter(Shelf(), StepTimes((1, 2), (1, 1)))
    return [int(token) for token in drafter.draft([drafter.start(index, DraftWish("", (), 8))], [drafts_max])[0]]


@given(changes=changes)
def test_whatever_was_appended_and_cut_only_what_is_left_counts(changes: list[tuple[str, object]]) -> None:
    index, tokens = SessionIndex(), list[int]()
    for kind, how in changes:
        if isinstance(how, list):
            index.extend(octets(how))
            tokens += how
        else:
            assert isinstance(how, float)
            left = int(how * len(tokens))
            tokens = tokens[:left]
            if kind == "fork":
                index = index.fork(left)
            else:
                index.truncate(left)
        assert index.text.tolist() == tokens
        assert drafts_of(index) == drafts_of(index_of(tokens))


def test_h45_a_fork_drafts_as_its_parent_and_neither_sees_the_other_go_on() -> None:
    parent = index_of([1, 2, 3, 4, 5, 6, 1, 2, 3])
    fork = parent.fork(9)
    assert drafts_of(fork) == drafts_of(parent) != []
    parent.extend(octets([9, 9, 1, 2, 3]))
    assert drafts_of(fork)[:3] == [4, 5, 6] and drafts_of(parent)[:2] == [9, 9]


def test_a_sequence_that_does_not_repeat_itself_has_no_drafts() -> None:
    assert drafts_of(index_of(list(range(100)))) == []


@pytest.mark.parametrize("tokens", [-1, 11])
def test_an_index_is_cut_within_its_length_only(tokens: int) -> None:
    with pytest.raises(InvariantError, match="10 tokens"):
        index_of([1] * 10).truncate(tokens)
    with pytest.raises(InvariantError, match="10 tokens"):
        index_of([1] * 10).fork(tokens)


def test_a_long_sequence_takes_twelve_bytes_a_token_of_room() -> None:
    index = index_of(list(range(CAPACITY_MIN * 16)))
    assert index.resident_bytes == 12 * CAPACITY_MIN * 16


def test_an_index_without_tokens_has_no_drafts() -> None:
    assert drafts_of(SessionIndex()) == []

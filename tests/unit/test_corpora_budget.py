"""The budget of corpora: claims before use, in tokens and bytes, of all and of each tenant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.errors import LimitReached, TooLong, UserError
from sessile.server.corpora.budget import Budget, Claim, CorpusLimits, Size

TENANTS = ("", "a", "b")


def budget() -> Budget:
    return Budget(CorpusLimits(100, 1000), {"a": CorpusLimits(tokens_max=40), "b": CorpusLimits(bytes_max=300)})


def claim(books: Budget, tenant: str, tokens: int, size_bytes: int = 0) -> Claim:
    made = Claim(books, tenant)
    made.resize(Size(tokens, size_bytes))
    return made


def test_a_claim_that_does_not_fit_changes_nothing() -> None:
    books = budget()
    claim(books, "a", 30)
    second = Claim(books, "a")
    with pytest.raises(LimitReached, match="room for 10 of 40 tokens and 1000 of 1000 bytes") as refusal:
        second.resize(Size(11, 0))
    assert refusal.value.code == "over_budget"
    assert (books.used, second.size) == (Size(30, 0), Size())


def test_what_fits_no_empty_server_is_refused_for_good() -> None:
    with pytest.raises(TooLong, match="at least 41 tokens"):
        claim(budget(), "a", 41)
    with pytest.raises(TooLong, match="of 300 bytes"):
        claim(budget(), "b", 1, 301)
    with pytest.raises(TooLong):
        claim(budget(), "", 101)


def test_a_refusal_counts_the_claims_own_room_as_left() -> None:
    books = budget()
    own = claim(books, "a", 30)
    own.resize(Size(40, 0))
    assert own.tokens_max == 40
    claim(books, "", 60)
    with pytest.raises(TooLong, match="room for 40 of 40"):
        own.resize(Size(41, 0))


def test_shrinking_is_never_refused() -> None:
    books = Budget(CorpusLimits(100, 1000), {})
    large = claim(books, "", 100, 1000)
    large.resize(Size(50, 999))
    large.release()
    large.release()
    assert books.used == books.used_by("") == Size()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.integers(0, 500)), max_size=40))
def test_no_sequence_of_claims_exceeds_a_limit_or_loses_room(changes: list[tuple[int, int, int]]) -> None:
    books = budget()
    claims = [Claim(books, tenant) for tenant in TENANTS for _ in range(2)]
    for index, tokens, size_bytes in changes:
        before = books.used
        try:
            claims[index].resize(Size(tokens, size_bytes))
        except UserError:
            assert books.used == before
        assert books.used.tokens <= 100 and books.used.bytes <= 1000
        assert books.used_by("a").tokens <= 40 and books.used_by("b").bytes <= 300
        assert books.used.tokens == sum(each.size.tokens for each in claims)
    for each in claims:
        each.release()
    assert books.used == Size()

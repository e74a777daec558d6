"""A session that loses its KV and keeps its tokens, untouched: what it held is left to `containment.restore`."""

from collections.abc import Callable, Sequence

from sessile.core.books import Books
from sessile.core.ledger import Lease
from sessile.core.session import Session


def abandon(books: Books, lease: Lease) -> None:
    """Leave a lease's pages to `restore`, as suspects. Does no harm twice."""
    if not lease.is_consumed:  # Two holders may have had the same one.
        books.suspects.extend(lease.pages)
        lease.abandon()


def go_cold(books: Books, session: Session) -> None:
    """Take a session's KV and reserve away without touching them; `restore` must follow, and fills the reserve anew.

    The index goes as well: the next turn makes it anew from the tokens.
    """
    parked = session.parked
    session.parked = None
    session.index = None
    if parked is not None:
        abandon(books, parked.lease)
    if session.reserve is not None:
        abandon(books, session.reserve)
        session.reserve = books.ledger.open()


def or_cold(
    books: Books, sessions: Sequence[Session], change: Callable[..., None], *arguments: object
) -> None:
    """Make a change to the KV of sessions without a turn; where violations are contained and it fails, they go cold.

    For changes that a session without KV has no need of: its tokens are whole, and that is all that is promised.
    """
    failure = ""
    leases = [lease for session in sessions for lease in _leases_of(session)]
    try:
        change(*arguments)
    except Exception as error:
        if not books.limits.contain_violations:
            raise
        failure = f"session {sessions[0].id!r}: {type(error).__name__}: {error}"
    # Outside of the handler: until it is left, the failed call's frames hold a lease that they had taken over.
    if failure:
        books.failures.append(("session", failure))
        for lease in leases:
            abandon(books, lease)
        for session in sessions:
            go_cold(books, session)


def _leases_of(session: Session) -> list[Lease]:
    leases = [session.parked.lease] if session.parked is not None else []
    return leases if session.reserve is None else [*leases, session.reserve]

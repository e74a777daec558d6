"""Reservations: pages that are a session's whether it uses them or not, taken at open and given back at close.

Those that hold no KV are owned by a lease of their own, the reserve. When the session needs pages they go back to FREE
and are drawn by the request like any others, so there is no further arrow of ownership. What the session gives up goes
to the reserve again as soon as pages are free. Parked KV within the reservation is not reclaimable.
"""

from sessile.core.books import Books
from sessile.core.cold import or_cold
from sessile.core.marks import Mark
from sessile.core.request import Request
from sessile.core.session import Session


def reserve(books: Books, session: Session, pages: int) -> None:
    """Promise pages to a new session; they are drawn as they become free, before anybody else's."""
    assert pages > 0 and session.reserve is None
    session.reserved_pages = pages
    session.reserve = books.ledger.open()
    books.reserved_pages += pages
    books.reserving.append(session)
    top_up(books)


def release_reserve(books: Books, session: Session) -> None:
    """Take the promise back; pages that were never written are free at once."""
    if session.reserve is None:
        return
    pages = len(session.reserve)
    books.ledger.release(session.reserve, 0)
    books.ledger.settle(books.settled_step)
    books.reserve_pages -= pages
    books.reserved_pages -= session.reserved_pages
    books.reserving.remove(session)
    session.reserve = None
    session.reserved_pages = 0


def top_up(books: Books) -> None:
    """Draw what sessions are owed, as far as pages are free or can be reclaimed."""
    for session in books.reserving:
        or_cold(books, (session,), _top_up_one, books, session)


def _top_up_one(books: Books, session: Session) -> None:
    assert session.reserve is not None
    owed = session.reserved_pages - len(session.reserve) - _held_pages(books, session)
    if owed < 0:
        books.reserve_pages -= books.ledger.drop_tail(session.reserve, max(0, len(session.reserve) + owed), 0)
        books.ledger.settle(books.settled_step)
    if owed <= 0:
        return
    if owed > books.ledger.free_pages:
        books.reclaim(owed - books.ledger.free_pages)
    granted = min(owed, books.ledger.free_pages)
    books.marks[Mark.RESERVE_OWED] += granted < owed
    if granted:
        books.ledger.draw(session.reserve, granted)
        books.reserve_pages += granted


def spend(books: Books, request: Request, pages: int) -> None:
    """Set up to `pages` of a session's reserve free, because its request is about to draw them."""
    session = request.session
    if session is None or session.reserve is None or pages <= 0:
        return
    books.marks[Mark.RESERVE_SPENT] += len(session.reserve) > 0
    books.reserve_pages -= books.ledger.drop_tail(session.reserve, max(0, len(session.reserve) - pages), 0)
    books.ledger.settle(books.settled_step)


def _held_pages(books: Books, session: Session) -> int:
    """Pages with KV of a session, own and shared, wherever they are."""
    if session.parked is not None:
        return len(session.parked.lease) + len(session.parked.pin.pages)
    if session.turn is None:
        return 0
    request = books.requests[session.turn]
    if request.lease is None or request.pin is None:
        return 0
    return len(request.lease) + len(request.pin.pages)

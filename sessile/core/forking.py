"""Fork and rewind: a session's history, and as much of its KV as can be shared, at an earlier place.

Full pages are shared through the tree: the parent's are published and pinned for both. What is left is less than a
page, and a page has one owner, so its tokens are copied: the copy travels with the next plan and runs before that
plan's writes. Pages that are given up before then wait in LIMBO for that plan, so neither end of the copy can be
drawn by anybody else. Whatever a step in flight still writes to the parent's page lies behind what is copied. Without
a free page for the copy the child recomputes less than a page.
"""

from sessile.core.books import Books
from sessile.core.cold import or_cold
from sessile.core.marks import Mark
from sessile.core.prefix import page_at
from sessile.core.session import ParkedKv, Session


def fork_session(books: Books, parent: Session, child: Session, tokens: int) -> None:
    """Give a new session the first `tokens` tokens of an idle one, 0 ≤ tokens ≤ its history, and their KV."""
    assert parent.turn is None and not len(child.history) and child.parked is None
    child.cut_history(parent.history.fork(tokens), parent.turn_ends)
    child.tenant.held_tokens += tokens
    if parent.index is not None and child.root is None:  # A branch's is forked when it first drafts: see drafting.py.
        child.index = parent.index.fork(min(parent.index.tokens, tokens))
    or_cold(books, (parent, child), _share_kv, books, parent, child, tokens)


def _share_kv(books: Books, parent: Session, child: Session, tokens: int) -> None:
    """Give the child KV of as many of its tokens but the last as the parent has KV of."""
    parked = parent.parked
    kv_tokens = min(parked.tokens, tokens - 1) if parked is not None else 0
    if parked is None or kv_tokens <= 0:
        return
    size = books.limits.page_size
    full = kv_tokens // size
    _publish_parked(books, parent, parked, full)
    match = books.tree.match(parent.tenant.namespace, parent.history.slice(0, full * size), full)
    lease, pin = books.ledger.open(), books.tree.pin(match)
    shared_tokens = match.pages * size
    if shared_tokens < full * size or not kv_tokens % size or not books.ledger.free_pages:
        books.marks[Mark.NOT_COPIED] += kv_tokens % size > 0
        books.park(child, lease, pin, shared_tokens)
        return
    target = books.ledger.draw(lease, 1)[0]
    books.queue_copy(page_at(parked.pin, parked.lease, full), target, kv_tokens % size, (parent, child))
    books.park(child, lease, pin, kv_tokens)


def rewind_session(books: Books, session: Session, tokens: int) -> None:
    """Cut an idle session's history to its first `tokens` tokens, 0 ≤ tokens ≤ its length, and its KV with it."""
    assert session.turn is None
    books.totals.rewinds += 1
    session.tenant.held_tokens -= len(session.history) - tokens
    session.cut_history(session.history.fork(tokens), session.turn_ends)
    session.reply = None
    or_cold(books, (session,), _cut_kv, books, session, max(0, tokens - 1))


def _cut_kv(books: Books, session: Session, kv_tokens: int) -> None:
    """Keep KV of at most so many tokens, the head of a shared page that they end in as a copy."""
    parked = session.parked
    if parked is None or parked.tokens <= kv_tokens:
        return
    size = books.limits.page_size
    inside_shared = kv_tokens < len(parked.pin.pages) * size and kv_tokens % size > 0
    source = page_at(parked.pin, parked.lease, kv_tokens // size)
    books.cut_parked(session, kv_tokens)
    if inside_shared and books.ledger.free_pages:
        # The cut gave up the shared page it fell into: a TREE page is never written (H64). Copy what is still wanted.
        _copy_behind(books, session, source, kv_tokens % size)
    elif inside_shared:
        books.marks[Mark.NOT_COPIED] += 1


def _publish_parked(books: Books, session: Session, parked: ParkedKv, full: int) -> None:
    """Move a parked session's own full pages to the tree, or give them up where the tree has them, and pin them."""
    books.harden(parked.pin)
    shared, size = len(parked.pin.pages), books.limits.page_size
    if full > shared:
        before = len(parked.lease.pages)
        books.tree.publish_parked(parked.pin, parked.lease, session.history.slice(shared * size, full * size))
        books.parked_pages -= before - len(parked.lease.pages)
    books.soften_parked(session, parked)
    books.rank_parked(session)


def _copy_behind(books: Books, session: Session, source: int, tokens: int) -> None:
    """Draw a page behind a session's parked KV, which ends with a page, and copy the first tokens of source to it."""
    parked = session.parked
    if parked is None:
        start = books.tree.pin(books.tree.match(session.tenant.namespace, b"", 0))
        lease = books.ledger.open()
        held = 0
    else:
        start, lease, held = parked.pin, parked.lease, parked.tokens
        books.parked_pages -= len(lease)
        session.parked = None
        books.harden(start)
    books.queue_copy(source, books.ledger.draw(lease, 1)[0], tokens, (session,))
    books.park(session, lease, start, held + tokens)

"""What the reply to an operation has to say, as checks made at the moment the operation is sent."""

from collections.abc import Callable, Iterable

from sessile.contract.messages import (
    GetStats,
    ListSessions,
    Outcome,
    Reply,
    SessionPage,
    SessionView,
    Stats,
)
from sessile.sim.records import SessionBook, check, fail

Verdict = Callable[[Reply], None]
"""Raises CheckFailed if the reply is not the right one."""

_BUSY_PHASES = ("queued", "running", "preempted")


def outcome(**values: int | bool | bytes) -> Verdict:
    """Succeeds with exactly these values."""

    def verdict(reply: Reply) -> None:
        if reply.error is not None or reply.value != Outcome(values):
            fail("reply", f"expected {values}: {reply}")

    return verdict


def refused(*statuses: int) -> Verdict:
    """Refused with one of these statuses, and with words."""

    def verdict(reply: Reply) -> None:
        if reply.error is None or reply.error.status not in statuses:
            fail("reply", f"expected {statuses}: {reply}")
        if not (reply.error.code and reply.error.message):
            fail("reply", f"silent: {reply}")

    return verdict


def flushed() -> Verdict:
    """Succeeds and counts pages."""

    def verdict(reply: Reply) -> None:
        pages = reply.value.values.get("pages") if isinstance(reply.value, Outcome) else None
        check(isinstance(pages, int) and pages >= 0, "reply", f"expected a count of pages: {reply}")

    return verdict


def view_of(session: SessionBook) -> Verdict:
    """The session as its client knows it now."""
    verdict = _view_check(session)

    def verdict_of_reply(reply: Reply) -> None:
        if not isinstance(reply.value, SessionView):
            fail("reply", f"expected a view: {reply}")
        verdict(reply.value)

    return verdict_of_reply


def page_of(message: ListSessions, sessions: Iterable[SessionBook]) -> Verdict:
    """The right sessions in order of opening, after the named one."""
    books = list(sessions)
    ids = [session.id for session in books]
    start = ids.index(message.after) + 1 if message.after in ids else 0
    shown = [_view_check(session) for session in books[start : start + message.limit]]
    has_more = len(books) > start + message.limit

    def verdict(reply: Reply) -> None:
        page = reply.value
        if not isinstance(page, SessionPage):
            fail("reply", f"expected a page of sessions: {reply}")
        if (len(page.sessions), page.more, page.total) != (len(shown), has_more, len(books)):
            fail("reply", f"expected {len(shown)} of {len(books)} sessions, more {has_more}: {page}")
        for check_view, view in zip(shown, page.sessions, strict=True):
            check_view(view)

    return verdict


def stats_of(message: GetStats) -> Verdict:
    """Any figures whose pages add up."""

    def verdict(reply: Reply) -> None:
        if not isinstance(reply.value, Stats):
            fail("reply", f"{message}: expected figures: {reply}")
        check_pages(reply.value)

    return verdict


def check_pages(stats: Stats) -> None:
    """Every page is somewhere, and none is in two places."""
    places = (
        stats.pages_free, stats.pages_limbo, stats.pages_tree, stats.pages_requests,
        stats.pages_sessions, stats.pages_quarantine, stats.pages_scratch,
    )  # fmt: skip
    if not (min(places) >= 0 and sum(places) == stats.pages_total):
        fail("pages", f"pages do not add up: {stats}")
    if stats.pages_tree_pinned > stats.pages_tree:
        fail("pages", f"more pinned than there are: {stats}")


def _view_check(session: SessionBook) -> Callable[[SessionView], None]:
    finished = [node for node in session.nodes.values() if node.turn is None]
    longest = max([len(line.history) for line in session.lines])
    expected = {
        "id": session.id,
        "tenant": session.tenant,
        "branching": session.branching,
        "tokens": longest,
        "turns": len(finished) if session.branching else len(session.turn_ends),
        "opened_s": session.opened_ns / 1e9,
        "metadata": session.metadata,
    }
    phases = _BUSY_PHASES if session.in_flight else ("idle",)
    if session.closing:
        phases = ("closing",)
    # A running turn may have got as far as to compute the last token of the history; a parked session never has.
    kv_tokens_max = max(0, longest - (not session.in_flight))

    def verdict(view: SessionView) -> None:
        shown = {name: getattr(view, name) for name in expected}
        if shown != expected:
            fail("view", f"expected {expected}: {view}")
        if view.phase not in phases:
            fail("view", f"expected one of {phases}: {view}")
        if not 0 <= view.kv_tokens <= kv_tokens_max:
            fail("view", f"KV beyond the history: {view}")

    return verdict

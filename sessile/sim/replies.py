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
from sessile.sim.records import SessionBook, check

Verdict = Callable[[Reply], None]
"""Raises CheckFailed if the reply is not the right one."""

_BUSY_PHASES = ("queued", "running", "preempted")


def outcome(**values: int | bool | bytes) -> Verdict:
    """Succeeds with exactly these values."""

    def verdict(reply: Reply) -> None:
        check(reply.error is None and reply.value == Outcome(values), "reply", f"expected {values}: {reply}")

    return verdict


def refused(*statuses: int) -> Verdict:
    """Refused with one of these statuses, and with words."""

    def verdict(reply: Reply) -> None:
        check(reply.error is not None and reply.error.status in statuses, "reply", f"expected {statuses}: {reply}")
        check(reply.error is not None and bool(reply.error.code and reply.error.message), "reply", f"silent: {reply}")

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
        check(isinstance(reply.value, SessionView), "reply", f"expected a view: {reply}")
        assert isinstance(reply.value, SessionView)
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
        check(isinstance(reply.value, SessionPage), "reply", f"expected a page of sessions: {reply}")
        assert isinstance(reply.value, SessionPage)
        page = reply.value
        check((len(page.sessions), page.more, page.total) == (len(shown), has_more, len(books)), "reply",
              f"expected {len(shown)} of {len(books)} sessions, more {has_more}: {page}")
        for check_view, view in zip(shown, page.sessions, strict=True):
            check_view(view)

    return verdict


def stats_of(message: GetStats) -> Verdict:
    """Any figures whose pages add up."""

    def verdict(reply: Reply) -> None:
        check(isinstance(reply.value, Stats), "reply", f"{message}: expected figures: {reply}")
        assert isinstance(reply.value, Stats)
        check_pages(reply.value)

    return verdict


def check_pages(stats: Stats) -> None:
    """Every page is somewhere, and none is in two places."""
    places = (
        stats.pages_free, stats.pages_limbo, stats.pages_tree, stats.pages_requests,
        stats.pages_sessions, stats.pages_quarantine, stats.pages_scratch,
    )  # fmt: skip
    check(min(places) >= 0 and sum(places) == stats.pages_total, "pages", f"pages do not add up: {stats}")
    check(stats.pages_tree_pinned <= stats.pages_tree, "pages", f"more pinned than there are: {stats}")


def _view_check(session: SessionBook) -> Callable[[SessionView], None]:
    expected = {
        "id": session.id,
        "tokens": len(session.history),
        "turns": len(session.turn_ends),
        "opened_s": session.opened_ns / 1e9,
        "metadata": session.metadata,
    }
    phases = _BUSY_PHASES if session.turn else ("idle",)
    if session.closing:
        phases = ("closing",)
    # A running turn may have got as far as to compute the last token of the history; a parked session never has.
    kv_tokens_max = max(0, len(session.history) - (session.turn is None))

    def verdict(view: SessionView) -> None:
        shown = {name: getattr(view, name) for name in expected}
        check(shown == expected, "view", f"expected {expected}: {view}")
        check(view.phase in phases, "view", f"expected one of {phases}: {view}")
        check(0 <= view.kv_tokens <= kv_tokens_max, "view", f"KV beyond the history: {view}")

    return verdict

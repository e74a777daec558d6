"""The operator's view of the pool: whatever goes on, every page and row is shown once."""

from sessile.contract.messages import Cancel, ForkSession, GetPool
from sessile.contract.pool import PoolView
from tests.unit.stage import Stage


def pool(stage: Stage, holders: int = 100) -> PoolView:
    """The view, after a check that it adds up."""
    view = stage.ask(GetPool, holders).value
    assert isinstance(view, PoolView)
    tree = view.tree_pinned + view.tree_parked + view.tree_unpinned
    limbo = sum(pages for _, pages in view.limbo)
    owned = view.request_pages + view.session_pages
    assert view.pages_total == view.free + limbo + tree + view.scratch + view.quarantine + owned
    assert owned == sum(holder.own_pages for holder in view.holders) + view.rest_own_pages
    assert len(view.holders) <= holders
    return view


def test_every_page_is_shown_at_every_step_of_a_busy_machine() -> None:
    stage = Stage(pages=48, rows=3)
    for session in ("kept", "forked"):
        stage.open(session)
        stage.submit(len(stage.done), [5] * 9, session=session)
        stage.run()
    stage.ask(ForkSession, session="forked", child="child", at_tokens=6)
    for key in range(10, 14):
        stage.submit(key, [key] * 11, max_new_tokens=12)
    stage.submit(20, [6] * 5, session="kept", max_new_tokens=9)
    seen_limbo = seen_draining = False
    for step in range(40):
        stage.launch()
        if step == 3:
            stage.send(Cancel(11))
        view = pool(stage)
        seen_limbo |= bool(view.limbo)
        seen_draining |= view.requests_draining > 0
    assert seen_limbo and seen_draining
    assert {holder.session for holder in pool(stage).holders} == {"kept", "forked", "child"}


def test_a_reserve_is_shown_with_its_session() -> None:
    stage = Stage(pages=200)
    stage.open("kept", reserve_tokens=40)
    (holder,) = pool(stage).holders
    assert (holder.session, holder.own_pages, holder.reserve_pages, holder.shared_pages) == ("kept", 10, 10, 0)
    stage.submit(1, [5] * 9, session="kept", max_new_tokens=30)
    stage.step(3)
    holders = pool(stage).holders
    assert {(holder.key, holder.phase) for holder in holders} == {(1, "running"), (None, "running")}
    assert sum(holder.own_pages + holder.shared_pages for holder in holders) == 10


def test_who_owns_most_is_named_first_and_the_rest_is_summed_up() -> None:
    stage = Stage(pages=200, rows=4)
    for key, tokens in enumerate((40, 8, 24, 16)):
        stage.submit(key, [key + 1] * tokens, max_new_tokens=30)
    stage.step(20)
    whole, part = pool(stage), pool(stage, holders=1)
    assert [holder.own_pages for holder in whole.holders] == sorted((h.own_pages for h in whole.holders), reverse=True)
    assert part.holders == whole.holders[:1]
    assert (part.rest_requests, part.rest_sessions) == (3, 0)
    assert {holder.row for holder in whole.holders} == {0, 1, 2, 3}

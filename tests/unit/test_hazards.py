"""Hazards of the books that no single part of the core could bring back alone, each set up as it once happened."""

from typing import Any

import pytest

from sessile.contract.messages import ForkSession, Sampling, Submit, pack_tokens
from sessile.contract.plan import SCRATCH_PAGE
from sessile.core.ledger import PageLedger
from tests.unit.drafters import PerfectDrafter
from tests.unit.stage import Stage, expected
from tests.unit.test_core_planning import prompt

OWNERS = ("free", "limbo", "tree", "requests", "sessions", "quarantine", "scratch")


def pages_by_owner(stage: Stage) -> dict[str, int]:
    """The owners that have pages, after checking that together they have all."""
    stats = stage.stats()
    pages = {owner: getattr(stats, f"pages_{owner}") for owner in OWNERS}
    assert sum(pages.values()) == stats.pages_total
    return {owner: count for owner, count in pages.items() if count}


def say(stage: Stage, key: int, tokens: list[int], *, session: str = "s", count: int = 4, **more: Any) -> None:
    """Take a turn, hold its output against the reference, and that it computed nothing it had."""
    history = stage.history(session)
    wish = Sampling(seed=key, temperature=0.0, max_new_tokens=count)
    stage.send(Submit(key=key, tokens=pack_tokens(tokens), sampling=wish, session=session, **more))
    stage.run()
    assert stage.output[key] == expected(history + tokens, count)
    assert stage.done[key].cached_tokens == max(0, len(history) - 1)


@pytest.mark.parametrize(("page_size", "pages"), [(1, 13), (4, 4), (16, 1), (256, 1)])
def test_h04_a_session_owns_pages_whatever_number_of_tokens_they_hold(page_size: int, pages: int) -> None:
    stage = Stage(page_size=page_size, pages=20)
    stage.open("s")
    stage.submit(1, prompt(3, 10), session="s")
    stage.run()
    view = stage.view("s")
    assert (view.tokens, view.kv_tokens, view.own_pages + view.shared_pages) == (14, 13, pages)
    held = pages_by_owner(stage)
    assert held.get("sessions", 0) + held.get("tree", 0) == pages


def test_h05_a_prompt_between_two_chunks_owns_its_pages_though_no_step_runs_it() -> None:
    stage = Stage(chunk=8, page_size=1, mixed_chunk=False)
    stage.submit(1, prompt(1, 4), max_new_tokens=20)
    stage.step()
    stage.submit(2, prompt(2, 20))
    in_steps = []
    while 2 not in stage.done and len(in_steps) < 40:
        stage.step()
        in_steps.append(len(stage.plans[-1].rows))
        pages_by_owner(stage)  # And an audit of every page after every step, as everywhere.
    assert 1 in in_steps, "there was a step that ran one of the two alone"
    stage.run()
    assert stage.output[2] == expected(prompt(2, 20))
    assert pages_by_owner(stage).keys() <= {"free", "tree", "scratch"}


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("overlap", [True, False])
def test_h08_no_page_table_entry_is_overwritten_while_its_row_has_the_same_owner(page_size: int, overlap: bool) -> None:
    drafter = PerfectDrafter(right=1)
    stage = Stage(page_size=page_size, drafter=drafter, drafts_max=4, pages=100)
    stage.open("s")
    for key in range(1, 5):
        history = stage.history("s")
        stage.submit(key, prompt(key, 5), session="s", max_new_tokens=7)
        if overlap:
            stage.run()
        while stage.machine.has_work:
            stage.step()
        assert stage.output[key] == expected(history + prompt(key, 5), 7)
    written: set[tuple[int, int]] = set()
    for plan in stage.plans:
        written = {(row, slot) for row, slot in written if row not in plan.bind_rows.tolist()}
        runs = zip(plan.table_rows.tolist(), plan.table_starts.tolist(), plan.table_counts.tolist(), strict=True)
        for row, start, count in runs:
            entries = {(row, slot) for slot in range(start, start + count)}
            assert not entries & written
            written |= entries


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("first", [0, 3])
def test_h13_a_turn_that_wants_logprobs_of_its_prompt_neither_loses_nor_recomputes_its_sessions_kv(
    page_size: int, first: int
) -> None:
    stage = Stage(page_size=page_size, pages=100)
    stage.open("s")
    say(stage, 1, prompt(3, 9))
    say(stage, 2, prompt(4, 5), prompt_logprobs_from=first, logprobs=2)
    say(stage, 3, prompt(5, 5))
    stage.close("s")
    assert pages_by_owner(stage).keys() <= {"free", "limbo", "tree", "scratch"}


@pytest.mark.parametrize("page_size", [4, 16])
def test_h29_drafts_of_a_fork_and_of_its_parent_go_to_pages_of_their_own(page_size: int) -> None:
    stage = Stage(page_size=page_size, drafter=PerfectDrafter(right=2), drafts_max=4, pages=100)
    stage.open("s")
    say(stage, 1, prompt(3, 9))
    stage.ask(ForkSession, session="s", child="f")
    histories = {name: stage.history(name) for name in ("s", "f")}
    for key, name in ((2, "s"), (3, "f")):
        stage.submit(key, [key], session=name, max_new_tokens=9)
    stage.run()
    for key, name in ((2, "s"), (3, "f")):
        assert stage.output[key] == expected([*histories[name], key], 9)
        say(stage, 10 + key, [5], session=name)


@pytest.mark.parametrize("right", [0, 1, 3])
def test_h30_what_the_tree_has_of_a_request_with_rejected_drafts_is_right(right: int) -> None:
    stage = Stage(page_size=2, drafter=PerfectDrafter(right=right), drafts_max=4, pages=100)
    stage.submit(1, prompt(3, 9), max_new_tokens=12)
    stage.run()
    assert int(sum(plan.draft_counts.sum() for plan in stage.plans)) > 0
    context = prompt(3, 9) + stage.output[1]
    stage.submit(2, [*context, 7], max_new_tokens=12)
    stage.run()
    assert stage.done[2].cached_tokens == 20, "all full pages that the first request has settled"
    assert stage.output[2] == expected([*context, 7], 12)


def test_h72_the_page_that_padding_writes_to_is_never_given_out() -> None:
    ledger = PageLedger(9)
    lease = ledger.open()
    assert SCRATCH_PAGE not in ledger.draw(lease, 8)
    assert ledger.free_pages == 0
    ledger.release(lease, 1)
    ledger.settle(1)
    assert SCRATCH_PAGE not in ledger.free_stack

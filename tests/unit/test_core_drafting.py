"""Drafts in the core: who holds an index and what it knows, what a drafter is asked, and what a request may ask."""

import gc
import weakref
from functools import partial
from typing import Any, ClassVar

import pytest

from sessile.contract.messages import Branch, Cancel, DropTurn, ForkSession, RewindSession, SourceFigures, unpack_tokens
from sessile.core.limits import TenantPolicy
from sessile.core.marks import Mark
from sessile.core.planning import ASK_EVERY_MAX, QUIET_ASKS
from sessile.core.session import Session
from sessile.errors import AuditError
from sessile.sim.drafter import ListIndex
from tests.unit.drafters import PerfectDrafter, ToldDrafter
from tests.unit.stage import Stage, expected
from tests.unit.test_core_planning import prompt


def drafting(right: int = 99, limit: int = 4, drafts_max: int = 4, **settings: Any) -> tuple[Stage, PerfectDrafter]:
    drafter = PerfectDrafter(right, limit)
    return Stage(drafter=drafter, drafts_max=drafts_max, **{"pages": 100} | settings), drafter


def session_of(stage: Stage, name: str = "a") -> Session:
    return stage.machine._books.sessions["", name]


def steps_of(stage: Stage, overlap: bool, count: int) -> None:
    """Launch so many steps, each settled before the next one is planned, or behind it."""
    for _ in range(count):
        stage.launch()
        if not overlap:
            stage.settle()


def index_of(stage: Stage, name: str = "a") -> list[int]:
    index = session_of(stage, name).index
    assert isinstance(index, ListIndex)
    return index.known.tolist()


def one_turn(stage: Stage, key: int = 1, session: str = "a", **settings: Any) -> list[int]:
    """Run a turn; the history after it."""
    if not stage.machine._books.sessions.get(("", session)):
        stage.open(session)
    stage.submit(key, prompt(key, 6), session=session, **{"max_new_tokens": 9} | settings)
    stage.run()
    return stage.history(session)


# -- who holds an index ---------------------------------------------------------------------------------------------


def test_an_index_goes_with_its_sessions_turn_and_comes_back() -> None:
    stage, drafter = drafting()
    one_turn(stage)
    index = session_of(stage).index
    assert index is drafter.lines[0].index
    stage.submit(2, [7], session="a", max_new_tokens=9)
    stage.step(2)
    assert session_of(stage).index is None
    stage.run()
    assert session_of(stage).index is index is drafter.lines[1].index


def test_an_index_holds_the_first_tokens_of_its_history() -> None:
    stage, _ = drafting()
    for key in (1, 2, 3):
        history = one_turn(stage, key)
        known = index_of(stage)
        assert len(known) > len(history) - 9 and known == history[: len(known)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_h18_a_turn_that_is_rolled_back_leaves_nothing_in_the_index(steps: int) -> None:
    stage, _ = drafting(right=2)
    history = one_turn(stage)
    stage.submit(2, prompt(2, 6), session="a", max_new_tokens=30)
    for _ in range(steps):
        stage.launch()
    stage.send(Cancel(2))
    stage.run()
    assert stage.history("a") == history
    assert index_of(stage) == history[: len(index_of(stage))]


def test_h26_a_preempted_turn_that_is_cancelled_while_it_waits_leaves_nothing_in_the_index() -> None:
    stage, _ = drafting(right=2)
    history = one_turn(stage)
    stage.submit(2, prompt(2, 6), session="a", max_new_tokens=30)
    stage.step(4)
    stage.machine.preempt(2)
    stage.send(Cancel(2))
    stage.run()
    assert index_of(stage) == history[: len(index_of(stage))]


def test_a_rewind_cuts_the_index() -> None:
    stage, _ = drafting()
    history = one_turn(stage)
    stage.ask(RewindSession, session="a", to_tokens=4)
    assert index_of(stage) == history[:4]
    stage.submit(2, [9], session="a", max_new_tokens=6)
    stage.run()
    assert stage.output[2] == expected([*history[:4], 9], 6)


@pytest.mark.parametrize("at_tokens", [None, 4])
def test_a_fork_has_an_index_of_its_own(at_tokens: int | None) -> None:
    stage, _ = drafting()
    history = one_turn(stage)
    stage.ask(ForkSession, session="a", child="b", at_tokens=at_tokens)
    known = index_of(stage, "b")
    assert known == history[: len(known)] and len(known) == min(len(index_of(stage)), at_tokens or 99)
    one_turn(stage, 2, "b")
    assert index_of(stage) == history[: len(index_of(stage))]
    assert index_of(stage, "b") == stage.history("b")[: len(index_of(stage, "b"))]


def test_a_branch_looks_its_drafts_up_in_what_it_goes_on_from() -> None:
    stage, drafter = drafting()
    stage.open("a", branching=True)
    stage.submit(1, prompt(1, 6), session="a", rid="one", max_new_tokens=9)
    stage.run()
    told = drafter.lines[0].index.tokens
    for key in (2, 3):
        branch = Branch(parent="one", offset=7)
        stage.submit(key, [key], session="a", rid=f"branch {key}", branch=branch, max_new_tokens=5)
    stage.run()
    context = (prompt(1, 6) + stage.output[1])[:7]
    for key, line in zip((2, 3), drafter.lines[1:], strict=True):
        assert stage.output[key] == expected([*context, key], 5)
        assert line.index.known.tolist()[:8] == [*context, key]
    assert drafter.lines[0].index.tokens == told > 7


def test_a_session_without_its_kv_keeps_its_index() -> None:
    stage, drafter = drafting()
    one_turn(stage)
    known = index_of(stage)
    stage.machine.demote("", "a")
    assert index_of(stage) == known
    one_turn(stage, 2)
    assert drafter.lines[0].index is drafter.lines[1].index

def test_a_branch_whose_parent_was_dropped_looks_its_drafts_up_in_what_it_has_in_common_with_the_one_above() -> None:
    stage, _ = drafting()
    stage.open("a", branching=True)
    stage.submit(1, prompt(1, 6), session="a", rid="root", max_new_tokens=9)
    stage.run()
    middle = Branch(parent="root", offset=7)
    stage.submit(2, [1, 2, 3], session="a", rid="middle", branch=middle, max_new_tokens=2, speculate=False)
    stage.run()
    leaf = Branch(parent="middle", offset=9)
    stage.submit(3, [4], session="a", rid="leaf", branch=leaf, max_new_tokens=5)
    assert stage.ask(DropTurn, session="a", rid="middle").error is None
    stage.run()
    index = session_of(stage).nodes["leaf"].index
    assert isinstance(index, ListIndex)
    history = [*prompt(1, 6), stage.output[1][0], 1, 2, 4, *stage.output[3]]
    assert index.tokens > 10 and index.known.tolist() == history[: index.tokens]


@pytest.mark.parametrize("ends", ["close", "plain", "branch"])
def test_h19_nobody_keeps_an_index_that_nobody_can_use(ends: str) -> None:
    stage, drafter = drafting()
    if ends == "plain":
        stage.submit(1, prompt(1, 6), max_new_tokens=9)
        stage.run()
    elif ends == "close":
        one_turn(stage)
        stage.close("a")
    else:
        stage.open("a", branching=True)
        stage.submit(1, prompt(1, 6), session="a", rid="one", max_new_tokens=9)
        stage.run()
        stage.close("a")
    index = weakref.ref(drafter.lines[0].index)
    drafter.lines.clear()
    gc.collect()
    assert index() is None


def test_an_index_is_told_each_token_once_and_only_when_drafts_are_asked_for() -> None:
    class Counting(ListIndex):
        told: ClassVar[list[int]] = []

        def extend(self, tokens: bytes) -> None:
            self.told.append(len(tokens) // 4)
            super().extend(tokens)

    stage, drafter = drafting(limit=0)
    drafter.new_index = Counting  # type: ignore[method-assign, assignment]
    history = one_turn(stage)
    assert Counting.told[0] >= 6 and set(Counting.told[1:]) == {1}
    first = sum(Counting.told)
    stage.submit(2, [7], session="a", max_new_tokens=1)  # Its only token needs no draft.
    stage.run()
    assert sum(Counting.told) == first
    one_turn(stage, 3)
    assert len(history) < sum(Counting.told) < len(stage.history("a"))


def test_who_drafts_nothing_for_long_is_asked_less_often() -> None:
    stage, drafter = drafting(limit=0, pages=200)
    for key in (1, 2):
        stage.submit(key, prompt(key, 6), max_new_tokens=200)
    asked: list[int] = []
    while len(asked) < 150:
        before = len(drafter.limit_calls)
        stage.step()
        asked.append(len(drafter.limit_calls) - before)
    assert set(asked[2:QUIET_ASKS]) == {1} and set(asked) == {0, 1}
    late = "".join(map(str, asked[-40:]))
    assert "0" * ASK_EVERY_MAX not in late and late.count("1") == 40 // ASK_EVERY_MAX
    known = [line.index.known.tolist() for line in drafter.lines]
    assert known == [(prompt(key, 6) + stage.output[key])[: len(each)] for key, each in zip((1, 2), known, strict=True)]
    drafter.limit = 4
    before = len(drafter.calls)
    stage.step(ASK_EVERY_MAX)
    assert len(drafter.calls) > before, "what begins to repeat itself is seen soon"
    before = len(drafter.limit_calls)
    stage.step(3)
    assert len(drafter.limit_calls) == before + 3, "and is asked for in every step from then on"
    stage.run()
    for key in (1, 2):
        assert stage.output[key] == expected(prompt(key, 6), 200)


@pytest.mark.parametrize("overlap", [False, True])
def test_indexes_are_told_all_that_settles_while_rows_come_and_go(overlap: bool) -> None:
    # An audit of level 2 has what was noted of steps written behind each, and nobody is told of noted steps.
    stage, drafter = drafting(limit=0, pages=200, rows=5, audit_level=1)
    step = partial(steps_of, stage, overlap)
    sent = {key: prompt(key, 4 + key) for key in range(1, 6)}
    for key in (1, 2):
        stage.submit(key, sent[key], max_new_tokens=150)
    step(60)
    stage.submit(3, sent[3], max_new_tokens=150, speculate=False)  # Some of the rows may draft, then.
    step(30)
    for key in (4, 5):
        stage.submit(key, sent[key], max_new_tokens=20)
    while len(stage.done) < 5:
        step(1)
        assert len(drafter.lines) in (2, 4)
        for line, key in zip(drafter.lines, (1, 2, 4, 5), strict=False):
            whole = sent[key] + stage.output[key]
            assert line.index.known.tolist() == whole[: line.index.tokens]
            assert line.index.tokens > len(whole) - 2 * ASK_EVERY_MAX
    assert stage.machine.marks[Mark.TOLD_BY_STEP] or not overlap
    assert {key: stage.output[key] for key in sent} == {
        key: expected(sent[key], 20 if key > 3 else 150) for key in sent
    }


def test_steps_are_noted_of_the_rows_that_the_planner_goes_on_with() -> None:
    """Whatever else changes in between: who is asked again is found by their array."""
    stage, _ = drafting(limit=0, pages=200, audit_level=1)
    for key, count in ((1, 100), (2, 100), (3, 40)):
        stage.submit(key, prompt(key, 6), max_new_tokens=count)
    for steps in (20, 60):
        for _ in range(steps):
            stage.launch()
        steady, rows = stage.machine._planner._steady, stage.machine._books.rows
        assert steady is not None and len(steady.decodes) == (3 if steps == 20 else 2)
        rows.changes += 1  # As when something is noted of a row: the planner looks anew and chooses the same ones.
        for _ in range(3):
            stage.launch()
        steady = stage.machine._planner._steady
        assert steady is not None and rows.noted_steps(steady.decodes)
    stage.run()


def test_rows_that_draft_nothing_draw_their_pages_together_as_without_a_drafter() -> None:
    def steps_that_bring_pages(stage: Stage) -> int:
        for key in range(1, 5):
            stage.submit(key, prompt(key, 6 + key), max_new_tokens=96)
        stage.run()
        return sum(plan.table_rows.size > 0 for plan in stage.plans)

    plain = steps_that_bring_pages(Stage(pages=200))
    assert plain < 96 // 4 * 3, "four rows that lack a page in different steps each"
    assert steps_that_bring_pages(drafting(limit=0, pages=200)[0]) == plain


@pytest.mark.parametrize("overlap", [False, True])
def test_who_drafts_nothing_is_asked_no_more_often_when_others_leave_but_when_somebody_comes(overlap: bool) -> None:
    stage, drafter = drafting(limit=0, pages=200)
    step = partial(steps_of, stage, overlap)
    for key, count in ((1, 200), (2, 130), (3, 130)):
        stage.submit(key, prompt(key, 6), max_new_tokens=count)

    def asks_in(steps: int) -> int:
        before = len(drafter.limit_calls)
        step(steps)
        return len(drafter.limit_calls) - before

    step(120)
    assert asks_in(2 * ASK_EVERY_MAX) == 2
    while len(stage.done) < 2:
        assert asks_in(ASK_EVERY_MAX) == 1, "those that end with the step in flight say nothing of the other"
    assert asks_in(2 * ASK_EVERY_MAX) == 2
    stage.submit(4, prompt(4, 6), max_new_tokens=40)
    step(2)
    assert asks_in(2 * ASK_EVERY_MAX) == 2 * ASK_EVERY_MAX
    stage.run()
    assert [len(stage.output[key]) for key in (1, 2, 3, 4)] == [200, 130, 130, 40]


def test_an_index_is_told_of_a_prompt_while_the_device_computes_it() -> None:
    stage, drafter = drafting(chunk=4)
    stage.submit(1, prompt(1, 10), max_new_tokens=9)
    stage.submit(2, prompt(2, 10), max_new_tokens=2)  # Its second token is its last: it needs no draft.
    stage.launch()
    assert not drafter.lines, "nobody waits for a line to begin either"
    stage.machine.look()
    assert drafter.lines[0].index.known.tolist() == prompt(1, 10)
    stage.run()
    assert [line.index.tokens > 10 for line in drafter.lines] == [True]
    for key, count in ((1, 9), (2, 2)):
        assert stage.output[key] == expected(prompt(key, 10), count)


def test_the_audit_finds_an_index_ahead_of_its_sequence_or_in_two_hands() -> None:
    stage, _ = drafting()
    one_turn(stage)
    index = session_of(stage).index
    assert index is not None
    index.extend(bytes(4 * 20))
    with pytest.raises(AuditError, match="its index"):
        stage.machine.audit()
    index.truncate(4)
    stage.submit(2, [7], session="a", max_new_tokens=9)
    stage.launch()
    stage.machine.look()
    assert session_of(stage).index is None
    session_of(stage).index = index
    with pytest.raises(AuditError, match="both hold an index"):
        stage.machine.audit()
    session_of(stage).index = None


def test_an_index_that_contradicts_its_session_is_made_anew() -> None:
    stage, _ = drafting(contain_violations=True)
    history = one_turn(stage)
    index = session_of(stage).index
    assert index is not None
    index.extend(bytes(4 * 20))
    stage.submit(5, prompt(5, 4))
    stage.run()
    assert stage.machine.take_reports()
    stage.submit(2, [7], session="a", max_new_tokens=9)
    stage.run()
    assert stage.output[2] == expected([*history, 7], 9)


# -- what a drafter is asked ------------------------------------------------------------------------------------------


def test_a_step_makes_one_call_for_all_its_rows() -> None:
    stage, drafter = drafting(limit=2)
    for key in (1, 2, 3):
        stage.submit(key, prompt(key, 6), max_new_tokens=12)
    stage.run()
    assert len(drafter.calls) <= len(drafter.limit_calls) <= len(stage.plans)
    assert max(drafter.calls) == 3
    assert (3, 3) in drafter.limit_calls


def test_h50_a_drafter_is_asked_for_no_more_than_requests_have_a_use_for() -> None:
    """Near the end of an answer few drafts can be of use, and a late part is not worth it for them."""
    stage, drafter = drafting(limit=0)
    stage.submit(1, prompt(1, 6), max_new_tokens=9)
    stage.submit(2, prompt(2, 6), max_new_tokens=7)
    stage.run()
    assert drafter.caps == [[4, 4], [4, 4], [4, 3], [4, 2], [3, 1], [2], [1]]


@pytest.mark.parametrize("accept", [0, 1, 2, 3, 4])
def test_a_drafter_is_told_how_many_of_its_drafts_were_right(accept: int) -> None:
    stage, drafter = drafting(right=accept)
    stage.submit(1, prompt(1, 6), max_new_tokens=40)
    stage.run()
    assert drafter.lines[0].verdicts.count(accept) >= len(drafter.lines[0].verdicts) - 2 > 2
    assert stage.output[1] == expected(prompt(1, 6), 40)


@pytest.mark.parametrize("new_tokens", [2, 3, 4, 7])
def test_h11_nothing_is_drafted_beyond_the_last_token(new_tokens: int) -> None:
    stage, _ = drafting(limit=8, drafts_max=8)
    stage.submit(1, prompt(1, 6), max_new_tokens=new_tokens)
    stage.run()
    for plan in stage.plans:
        assert (plan.output_indices + plan.draft_counts < new_tokens).all()
    assert stage.queries <= 6 + new_tokens - 1


def test_h11_a_stop_inside_accepted_drafts_is_the_end_for_the_index_too() -> None:
    stage, drafter = drafting()
    said = expected(prompt(1, 6), 9)
    stage.open("a")
    stop = next(index for index in range(2, 9) if said[index] not in said[:index] and index % 5 not in (0, 4))
    stage.submit(1, prompt(1, 6), session="a", max_new_tokens=40, stop_token_ids=(said[stop],))
    stage.run()
    history = stage.history("a")
    assert history == prompt(1, 6) + said[: stop + 1]
    assert index_of(stage) == history[: len(index_of(stage))]
    assert sum(drafter.lines[0].verdicts) == stage.done[1].drafts_accepted < stage.done[1].completion_tokens


def test_h50_a_step_in_which_nothing_is_worth_verifying_waits_for_nothing_and_verifies_nothing() -> None:
    stage, drafter = drafting(limit=0)
    stage.submit(1, prompt(1, 6), max_new_tokens=12)
    for _ in range(6):
        planned = stage.machine.plan()
        assert planned is not None and not planned.late
        plan = stage.machine.complete(planned)
        assert plan is not None and plan.draft_counts.sum() == 0
        ticket = stage.device.launch(plan)
        stage.settle()
        stage._in_flight = ticket
    stage.run()
    assert drafter.calls == []


def test_h50_only_what_is_proposed_is_verified() -> None:
    drafter = ToldDrafter(lambda text, count: expected(text, 1), limit=4)
    stage = Stage(drafter=drafter, drafts_max=4, pages=100)
    stage.submit(1, prompt(1, 6), max_new_tokens=21)
    stage.run()
    assert max(int(plan.query_counts.max()) for plan in stage.plans[2:]) == 2
    assert stage.queries == 6 + 20


@pytest.mark.parametrize("overlap", [True, False])
def test_h48_pages_drawn_for_drafts_are_given_up_before_anybody_is_preempted(overlap: bool) -> None:
    # Row 1 holds a page for drafts that were wrong; row 2, older, needs the last page of the pool.
    stage, _ = drafting(right=0, limit=8, drafts_max=8, pages=7, page_size=4, output_estimate_tokens=1)
    stage.submit(1, prompt(1, 6), max_new_tokens=8)
    stage.submit(2, prompt(2, 6), max_new_tokens=5)
    while stage.machine.has_work:
        stage.launch()
        if not overlap:
            stage.settle()
    assert stage.machine.marks[Mark.SPARE_PAGES_GIVEN_UP] > 0
    assert stage.stats().preemptions_total == 0
    for key, tokens, count in ((1, prompt(1, 6), 8), (2, prompt(2, 6), 5)):
        assert stage.output[key] == expected(tokens, count)


def test_h48_a_page_that_the_last_drafts_of_a_request_may_need_is_not_given_up_while_they_are_verified() -> None:
    # Prompts and decoding take turns: in the turn of row 2's prompt pages are short, and row 1 has drafts in flight.
    stage, _ = drafting(pages=15, page_size=1, chunk=4, output_estimate_tokens=1, mixed_chunk=False)
    stage.submit(1, prompt(1, 6), max_new_tokens=4)
    stage.submit(2, prompt(2, 6), max_new_tokens=3)
    while stage.machine.has_work:
        stage.launch()
    assert stage.machine.marks[Mark.WAITED_FOR_DRAFTS] > 0
    for key, count in ((1, 4), (2, 3)):
        assert stage.output[key] == expected(prompt(key, 6), count)


@pytest.mark.parametrize("right", [0, 1, 2, 9])
def test_wrong_drafts_near_the_end_of_a_request_cost_it_no_step(right: int) -> None:
    """Were its place given away on the guess that all are right, it would sit a step out whenever one is wrong."""
    stage, _ = drafting(right=right, limit=8, drafts_max=8)
    stage.submit(1, prompt(1, 6), max_new_tokens=6)
    steps = 0
    while 1 not in stage.done:
        stage.launch()
        steps += 1
    # One for the prompt, one for each 1 + right of the other five, and one that is behind the end of it.
    assert steps <= 1 + -(-5 // (1 + right)) + 1
    assert stage.output[1] == expected(prompt(1, 6), 6)


def test_rows_whose_drafts_were_right_are_told_of_together_and_get_what_each_is_owed() -> None:
    stage, drafter = drafting(limit=3, drafts_max=3)
    for key in range(1, 5):
        stage.submit(key, prompt(key, 6), max_new_tokens=30, speculate=None if key < 4 else False)
    effects, together = stage.machine._books.effects, []
    tell = effects.deltas

    def deltas(keys: Any, counts: Any, tokens: Any) -> None:
        together.append(counts.tolist())
        tell(keys, counts, tokens)

    effects.deltas = deltas  # type: ignore[method-assign]
    stage.run()
    assert [4, 4, 4] in together and [1] in together
    for key in range(1, 5):
        assert stage.output[key] == expected(prompt(key, 6), 30)
    assert all(max(line.verdicts) == 3 for line in drafter.lines)
    accepted = [stage.done[key].drafts_accepted for key in range(1, 4)]
    assert accepted == [sum(line.verdicts) for line in drafter.lines] and sum(accepted) == 63


def test_rows_that_draft_nothing_are_counted_ahead_beside_an_engine_that_could() -> None:
    stage, drafter = drafting(audit_level=1)
    for key in (1, 2):
        stage.submit(key, prompt(key, 6), max_new_tokens=20, speculate=False)
    noted = 0
    while stage.machine.has_work:
        stage.launch()
        noted += stage.machine._books.rows._run is not None
    assert noted > 10
    assert drafter.limit_calls == []
    for key in (1, 2):
        assert stage.output[key] == expected(prompt(key, 6), 20)


def test_rows_without_drafts_share_a_step_with_rows_that_have_some() -> None:
    stage, _ = drafting()
    for key in (1, 2, 3, 4):
        stage.submit(key, prompt(key, 6), max_new_tokens=20, speculate=None if key % 2 else False)
    stage.run()
    mixed = [plan for plan in stage.plans if set((plan.draft_counts > 0).tolist()) == {False, True}]
    assert mixed
    for key in (1, 2, 3, 4):
        assert stage.output[key] == expected(prompt(key, 6), 20)


# -- what a request may ask -------------------------------------------------------------------------------------------


def test_a_request_may_turn_drafts_off_or_bound_them() -> None:
    stage, drafter = drafting()
    stage.submit(1, prompt(1, 6), max_new_tokens=12, speculate=False)
    stage.run()
    assert (drafter.lines, stage.done[1].drafts_offered) == ([], -1)
    stage.submit(2, prompt(2, 6), max_new_tokens=12, drafts_max=2)
    stage.run()
    assert max(int(plan.draft_counts.max(initial=0)) for plan in stage.plans) == 2
    stage.submit(3, prompt(3, 6), max_new_tokens=12, drafts_max=0)
    stage.run()
    assert stage.done[3].drafts_offered == -1


def test_the_end_of_a_request_says_what_drafts_did_for_it() -> None:
    stage, _ = drafting(right=2)
    stage.submit(1, prompt(1, 6), max_new_tokens=20)
    stage.run()
    done, stats = stage.done[1], stage.stats()
    assert done.drafts_offered > done.drafts_accepted > 0
    assert done.sources == stats.sources == [SourceFigures("session", done.drafts_offered, done.drafts_accepted)]
    assert stats.verifications_total == sum(int((plan.draft_counts > 0).sum()) for plan in stage.plans)


def test_h47_an_unknown_corpus_is_refused_by_name_and_nothing_is_touched() -> None:
    stage, _ = drafting()
    history = one_turn(stage)
    stage.submit(2, [7], session="a", corpora=("python", "cobol"))
    assert (stage.done[2].status, stage.done[2].param) == (404, "corpora") and "cobol" in stage.done[2].message
    stage.submit(3, [7], session="a", corpora=("python",))
    stage.run()
    assert stage.output[3] == expected([*history, 7])


def test_a_wish_reaches_the_drafter() -> None:
    stage, drafter = drafting(tenants=(TenantPolicy("ada"),))
    stage.submit(1, prompt(1, 6), tenant="ada", corpora=("python",), drafts_max=3)
    stage.run()
    wish = drafter.lines[0].wish
    assert (wish.tenant, wish.corpora, wish.drafts_max) == ("ada", ("python",), 3)


@pytest.mark.parametrize("asked", [{"speculate": True}, {"corpora": ("python",)}, {"remember": True}])
def test_what_needs_a_drafter_is_refused_where_there_is_none(asked: dict[str, Any]) -> None:
    stage = Stage()
    stage.submit(1, prompt(1, 6), **asked)
    assert stage.done[1].status == 400 and "--speculate" in stage.done[1].message


def test_h51_only_what_ends_by_itself_is_remembered_and_only_where_that_is_asked_and_allowed() -> None:
    stage, drafter = drafting(tenants=(TenantPolicy("ada", remembers=True), TenantPolicy("bob")))
    stage.submit(1, prompt(1, 6), tenant="ada", remember=True)
    stage.submit(2, prompt(2, 6), tenant="ada")
    stage.submit(3, prompt(3, 6), tenant="bob", remember=True)
    stage.submit(4, prompt(4, 6), tenant="ada", remember=True, max_new_tokens=50)
    stage.step(3)
    stage.send(Cancel(4))
    stage.run()
    assert (stage.done[3].status, stage.done[3].param) == (400, "remember")
    remembered = [(tenant, unpack_tokens(tokens).tolist()) for tenant, tokens in drafter.remembered]
    assert remembered == [("ada", prompt(1, 6) + stage.output[1])]

"""Grammars in the core: where a step has masks, what of drafts is left, how a grammar ends an output or gives it up."""

from dataclasses import replace
from typing import Any

import pytest

from sessile.contract.messages import Cancel, Grammar, Sampling
from sessile.contract.plan import SAMPLE, StepPlan
from sessile.core.marks import Mark
from sessile.core.planning import ASK_EVERY_MAX
from sessile.sim.grammar import KIND, NEVER, ToyGrammars
from sessile.sim.reference import Speaker
from sessile.sim.world import EOS
from tests.unit.drafters import PerfectDrafter, ToldDrafter
from tests.unit.stage import FACTS, VOCABULARY, Stage, expected
from tests.unit.test_core_planning import prompt

WITH_EOS = replace(FACTS, eos_ids=(EOS,))


def rule(seed: int = 1, longest: int = 30, strays_at: int = NEVER) -> Grammar:
    return Grammar(KIND, f"{seed} {longest} {strays_at}", "regex")


def constrained(**settings: Any) -> Stage:
    return Stage(facts=WITH_EOS, grammars=ToyGrammars(VOCABULARY), **{"pages": 100} | settings)


def follows(context: list[int], grammar: Grammar, count: int = 30) -> list[int]:
    """What the toy model says under a grammar, greedily, up to its end."""
    speaker = Speaker(context, Sampling(seed=0, temperature=0.0), WITH_EOS, grammar)
    said: list[int] = []
    while len(said) < count and (not said or said[-1] != EOS) and not speaker.is_astray:
        said.append(speaker.peek())
        speaker.push(said[-1])
    return said


def masked_places(plan: StepPlan) -> list[int]:
    return plan.mask_queries.tolist()


def test_an_output_follows_its_grammar_and_stops_where_that_must_end() -> None:
    stage = constrained()
    stage.submit(1, prompt(1, 6), grammar=rule(longest=5), max_new_tokens=20)
    stage.run()
    assert stage.output[1] == follows(prompt(1, 6), rule(longest=5)) != expected(prompt(1, 6), len(stage.output[1]))
    assert stage.output[1][-1] == EOS and len(stage.output[1]) <= 6
    assert (stage.done[1].reason, stage.done[1].matched) == ("stop", EOS)


def test_the_length_limit_ends_an_output_whose_grammar_goes_on() -> None:
    stage = constrained()
    said = follows(prompt(1, 6), rule())
    stage.submit(1, prompt(1, 6), grammar=rule(), max_new_tokens=len(said) - 1)
    stage.run()
    assert (stage.output[1], stage.done[1].reason) == (said[:-1], "length")


def test_every_place_where_a_row_with_a_grammar_samples_has_a_mask_and_no_other() -> None:
    stage = constrained(chunk=4)
    stage.submit(1, prompt(1, 9), grammar=rule(), max_new_tokens=6)
    stage.submit(2, prompt(2, 5), max_new_tokens=12)
    stage.run()
    row_of_one = stage.plans[0].rows.tolist()[0]
    for plan in stage.plans:
        ends = plan.query_counts.cumsum().tolist()
        samples = [
            end - 1
            for end, row, flags in zip(ends, plan.rows.tolist(), plan.flags.tolist(), strict=True)
            if row == row_of_one and flags & SAMPLE
        ]
        assert masked_places(plan) == samples


def test_a_prompt_in_chunks_has_its_first_mask_with_its_last_chunk() -> None:
    stage = constrained(chunk=4)
    stage.submit(1, prompt(1, 10), grammar=rule(), max_new_tokens=3)
    stage.run()
    assert [len(masked_places(plan)) for plan in stage.plans[:4]] == [0, 0, 1, 1]


def test_rows_beside_one_with_a_grammar_say_what_they_say_alone() -> None:
    stage = constrained()
    stage.submit(1, prompt(1, 6), grammar=rule(), max_new_tokens=20)
    stage.submit(2, prompt(2, 6), max_new_tokens=12, ignore_eos=True)
    stage.run()
    assert stage.output[2] == expected(prompt(2, 6), 12)
    assert stage.output[1] == follows(prompt(1, 6), rule(), 20)


def test_h76_a_preempted_output_goes_on_where_its_grammar_was() -> None:
    stage = constrained(retract_every=3)
    for key in (1, 2, 3):
        stage.submit(key, prompt(key, 6), grammar=rule(key), max_new_tokens=25)
    stage.run()
    assert sum([done.preemptions for done in stage.done.values()]) > 2
    assert all([stage.output[key] == follows(prompt(key, 6), rule(key), 25) for key in (1, 2, 3)])


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_h76_rejected_drafts_leave_no_trace_in_a_grammar(page_size: int) -> None:
    def half_right(text: list[int], most: int) -> list[int]:
        # Right twice, then a token that the grammar allows now and then, and the model does not choose.
        said = follows(text[:6], rule())[len(text) - 6 :]
        return [*said[:2], *[(token + 1) % VOCABULARY for token in said[2:]]][:most]

    stage = constrained(drafter=ToldDrafter(half_right), drafts_max=4, page_size=page_size)
    stage.submit(1, prompt(1, 6), grammar=rule(), max_new_tokens=25)
    stage.run()
    assert stage.output[1] == follows(prompt(1, 6), rule(), 25)
    assert stage.done[1].drafts_accepted > 2 and len(stage.plans) < len(stage.output[1])


def test_h76_drafts_that_the_grammar_forbids_are_cut_before_they_are_verified() -> None:
    def forbidden(text: list[int], most: int) -> list[int]:
        return [EOS, 5, 6][:most]

    drafter = ToldDrafter(forbidden)
    stage = constrained(drafter=drafter, drafts_max=4)
    stage.submit(1, prompt(1, 6), grammar=rule(), max_new_tokens=25)
    stage.run()
    assert stage.machine.marks[Mark.DRAFTS_FORBIDDEN] > 0
    assert all([plan.draft_counts.max(initial=0) <= 1 for plan in stage.plans])
    assert sum([len(line.verdicts) for line in drafter.lines]) >= stage.machine.marks[Mark.DRAFTS_FORBIDDEN]
    assert stage.output[1] == follows(prompt(1, 6), rule(), 25)


def test_h76_a_stop_inside_a_run_of_drafts_leaves_the_next_turns_grammar_at_its_start() -> None:
    stage = constrained(
        drafter=ToldDrafter(lambda text, most: follows(text[:6], rule())[len(text) - 6 :][:most]), drafts_max=4
    )
    stage.open("a")
    said = follows(prompt(1, 6), rule())
    stage.submit(1, prompt(1, 6), session="a", grammar=rule(), max_new_tokens=30, stop_token_ids=(said[2],))
    stage.run()
    assert stage.output[1] == said[: said.index(said[2]) + 1]
    history = stage.history("a")
    stage.submit(2, [9], session="a", grammar=rule(), max_new_tokens=30)
    stage.run()
    assert stage.output[2] == follows([*history, 9], rule())


def test_a_grammar_binds_its_own_turn_alone() -> None:
    stage = constrained()
    stage.open("a")
    stage.submit(1, prompt(1, 6), session="a", grammar=rule(longest=3), max_new_tokens=8)
    stage.run()
    history = stage.history("a")
    stage.submit(2, [9], session="a", max_new_tokens=8, ignore_eos=True)
    stage.run()
    assert stage.output[2] == expected([*history, 9], 8)


def test_a_cancelled_request_leaves_the_others_their_masks() -> None:
    stage = constrained()
    for key in (1, 2):
        stage.submit(key, prompt(key, 6), grammar=rule(key), max_new_tokens=20)
    for _ in range(3):
        stage.launch()
    stage.send(Cancel(1))
    stage.run()
    assert stage.output[2] == follows(prompt(2, 6), rule(2), 20)


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone_and_nothing_is_said_against_it() -> None:
    stage = constrained()
    stage.submit(1, prompt(1, 6), grammar=rule(3, strays_at=2), max_new_tokens=20)
    stage.submit(2, prompt(2, 6), grammar=rule(2), max_new_tokens=20)
    stage.run()
    done = stage.done[1]
    assert (done.reason, done.status, len(stage.output[1])) == ("error", 400, 2) and "no further" in done.message
    assert stage.output[2] == follows(prompt(2, 6), rule(2), 20)


@pytest.mark.parametrize(("field", "value"), [("ignore_eos", True), ("min_new_tokens", 3)])
def test_what_would_go_on_where_the_grammar_must_end_is_refused_by_name(field: str, value: Any) -> None:
    stage = constrained()
    stage.open("a")
    stage.submit(1, prompt(1, 6), session="a", grammar=rule(), **{"max_new_tokens": 9, field: value})
    assert (stage.done[1].status, stage.done[1].param) == (400, field)
    assert stage.view("a").phase == "idle"


def test_an_engine_without_grammars_refuses_one_by_the_name_of_its_field() -> None:
    stage = Stage(facts=WITH_EOS)
    stage.submit(1, prompt(1, 6), grammar=rule())
    assert (stage.done[1].status, stage.done[1].param) == (400, "regex")


def test_a_step_waits_for_the_one_in_flight_only_while_a_row_with_a_grammar_decodes() -> None:
    stage = constrained()
    stage.submit(1, prompt(1, 6), max_new_tokens=30, ignore_eos=True)
    late = []
    for turn in range(12):
        if turn == 4:
            stage.submit(2, prompt(2, 6), grammar=rule(longest=3), max_new_tokens=9)
        planned = stage.machine.plan()
        assert planned is not None
        late.append(planned.late)
        if planned.late:
            stage.settle()
        plan = stage.machine.complete(planned)
        assert plan is not None
        ticket = stage.device.launch(plan)
        stage.settle()
        stage._in_flight = ticket
    assert late[:5] == [False] * 5 and late[5] and not late[-1]


def test_who_drafts_nothing_is_asked_no_more_often_beside_a_row_that_follows_a_grammar() -> None:
    """Whose mask each step waits for."""
    drafter = PerfectDrafter(limit=0)
    stage = Stage(drafter=drafter, drafts_max=4, pages=200, facts=WITH_EOS, grammars=ToyGrammars(VOCABULARY))
    stage.submit(1, prompt(1, 6), max_new_tokens=240, ignore_eos=True)
    stage.submit(2, prompt(2, 6), max_new_tokens=240, grammar=rule(10, longest=400))
    for _ in range(120):
        stage.launch()
    before = len(drafter.limit_calls)
    for _ in range(20 * ASK_EVERY_MAX):
        stage.launch()
    assert not stage.done and len(drafter.limit_calls) - before == 20

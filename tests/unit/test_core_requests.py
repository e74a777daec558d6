"""One request from submit to Done: limits, stops, cancels in every phase, log-probabilities, faulty devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sessile.contract.messages import Cancel, CancelAll, Sampling, Scores, Submit, TokenDetail, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepResult
from sessile.core.request import Phase
from sessile.errors import PlanError
from sessile.sim import hashing
from sessile.sim.reference import Chain
from tests.unit.stage import FACTS, Stage, expected
from tests.unit.test_core_planning import PerfectDrafter, prompt

PROMPT = prompt(3, 9)
SAID = expected(PROMPT, 12)
TEXT = dataclasses.replace(FACTS, token_bytes=tuple(b"%02d" % token for token in range(50)), special_ids=frozenset({0}))
"""Each token is its id in two digits."""


def ran(prompt: list[int], *, stage: Stage | None = None, **sampling: Any) -> Stage:
    stage = stage or Stage(facts=TEXT)
    stage.submit(1, prompt, **sampling)
    stage.run()
    return stage


def with_eos(*tokens: int) -> ModelFacts:
    return dataclasses.replace(FACTS, eos_ids=tokens)


# -- how much ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_request_gets_the_tokens_it_asked_for(count: int) -> None:
    stage = ran(PROMPT, max_new_tokens=count)
    assert (stage.output[1], stage.done[1].reason) == (SAID[:count], "length")


@pytest.mark.parametrize("prompt_tokens", [1, 3, 4, 5, 9])
def test_no_output_tokens_compute_the_prompt_and_end(prompt_tokens: int) -> None:
    stage = ran(PROMPT[:prompt_tokens], max_new_tokens=0)
    done = stage.done[1]
    assert (stage.output[1], done.reason, done.completion_tokens) == ([], "length", 0)
    assert done.prompt_tokens == prompt_tokens


def test_a_prompt_that_was_computed_without_output_is_cached() -> None:
    stage = ran(PROMPT, max_new_tokens=0)
    stage.submit(2, PROMPT)
    stage.run()
    assert stage.done[2].cached_tokens == 8
    assert stage.output[2] == SAID[:4]


@pytest.mark.parametrize("wanted", [None, 10**9])
def test_h67_unset_or_huge_output_limits_mean_what_the_context_leaves(wanted: int | None) -> None:
    stage = ran(PROMPT, stage=Stage(pages=128), max_new_tokens=wanted)
    assert stage.done[1].completion_tokens == FACTS.context_tokens - len(PROMPT)
    assert stage.done[1].reason == "length"


def test_h36_output_is_clamped_to_what_the_pool_holds() -> None:
    stage = ran(PROMPT, stage=Stage(pages=6), max_new_tokens=None)
    assert stage.done[1].completion_tokens == 20 - len(PROMPT)


@pytest.mark.parametrize(
    ("tokens", "new_tokens", "status"), [(255, 1, 200), (256, 0, 200), (256, 1, 413), (257, 0, 413), (256, None, 413)]
)
def test_h39_a_prompt_may_fill_the_context_exactly(tokens: int, new_tokens: int | None, status: int) -> None:
    stage = ran([5] * tokens, stage=Stage(pages=128), max_new_tokens=new_tokens)
    assert stage.done[1].status == status


def test_what_can_never_run_is_refused_when_it_is_submitted() -> None:
    stage = ran([5] * 30, stage=Stage(pages=7))
    assert (stage.done[1].status, stage.done[1].param) == (413, "input_ids")
    assert not stage.machine.has_work


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 50, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_named(token: int) -> None:
    stage = ran([1, 2, token])
    assert (stage.done[1].status, stage.done[1].reason) == (400, "error")
    assert f"token id {token} is outside the vocabulary of 50 tokens" in stage.done[1].message


def test_an_empty_prompt_is_refused() -> None:
    assert ran([]).done[1].param == "input_ids"


def test_h43_a_full_line_refuses_until_there_is_room() -> None:
    stage = Stage(rows=1, queue_max=2)
    for key in range(1, 6):
        stage.submit(key, PROMPT)
    assert {key: done.status for key, done in stage.done.items()} == {3: 429, 4: 429, 5: 429}
    stage.run()
    stage.submit(6, PROMPT)
    stage.run()
    assert stage.output[6] == SAID[:4]


def test_a_line_is_limited_in_tokens_too() -> None:
    stage = Stage(rows=1, queue_tokens_max=20)
    for key in range(1, 4):
        stage.submit(key, PROMPT)
    assert {key: done.code for key, done in stage.done.items()} == {3: "limit_reached"}


def test_a_refused_request_leaves_no_trace() -> None:
    stage = Stage()
    before = stage.stats()
    stage.submit(1, [99])
    after = stage.stats()
    assert after.finished_total.pop("error") == 1
    assert before.finished_total.pop("error") == 0
    assert after == before


def test_a_key_in_use_is_the_front_ends_bug() -> None:
    stage = Stage()
    stage.submit(1, PROMPT)
    with pytest.raises(AssertionError, match="request key 1 is in use"):
        stage.submit(1, PROMPT)


# -- stops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 5])
def test_an_end_of_sequence_token_ends_the_output_and_is_part_of_it(index: int) -> None:
    first = SAID.index(SAID[index])
    stage = ran(PROMPT, stage=Stage(facts=with_eos(SAID[index])), max_new_tokens=12)
    assert stage.output[1] == SAID[: first + 1]
    assert (stage.done[1].reason, stage.done[1].matched) == ("stop", SAID[index])


def test_end_of_sequence_is_ignored_on_demand() -> None:
    stage = ran(PROMPT, stage=Stage(facts=with_eos(*SAID)), max_new_tokens=12, ignore_eos=True)
    assert (stage.output[1], stage.done[1].reason) == (SAID, "length")


def test_any_number_of_stop_tokens_is_honoured() -> None:
    others = [token for token in range(50) if token not in SAID]
    stage = ran(PROMPT, max_new_tokens=12, stop_token_ids=(*others, SAID[3]))
    assert stage.output[1] == SAID[: SAID.index(SAID[3]) + 1]


def test_before_min_new_tokens_no_stop_token_is_said() -> None:
    stage = ran(PROMPT, max_new_tokens=12, min_new_tokens=5, stop_token_ids=tuple(range(25)))
    assert all(token >= 25 for token in stage.output[1][:5])
    assert (stage.done[1].reason, stage.output[1][-1] < 25) == ("stop", True)


def text_of(tokens: list[int]) -> bytes:
    return b"".join(TEXT.token_bytes[token] for token in tokens if token not in TEXT.special_ids)


@pytest.mark.parametrize("drafter", [None, PerfectDrafter(), PerfectDrafter(right=2)])
def test_h58_a_stop_string_across_tokens_ends_the_output_with_the_token_that_completes_it(
    drafter: PerfectDrafter | None,
) -> None:
    stop = text_of(SAID[4:6])[1:3]  # half of one token, half of the next
    stage = Stage(facts=TEXT, drafter=drafter, drafts_max=4 if drafter else 0)
    ran(PROMPT, stage=stage, max_new_tokens=12, stop=(stop,))
    done = stage.done[1]
    kept = text_of(SAID).index(stop)
    assert (done.reason, done.matched, done.kept_bytes) == ("stop", stop, kept)
    assert stage.output[1] == SAID[: -(-(kept + 2) // 2)]


def test_h58_of_a_stop_and_the_length_limit_at_one_token_the_stop_is_told() -> None:
    stage = ran(PROMPT, max_new_tokens=6, stop=(text_of(SAID[:6])[-2:],))
    assert stage.done[1].reason == "stop"


def test_h11_a_stop_inside_accepted_drafts_cuts_what_was_accepted_behind_it() -> None:
    stage = Stage(facts=with_eos(SAID[2]), drafter=PerfectDrafter(), drafts_max=4)
    stage.open("s")
    stage.submit(1, PROMPT, session="s", max_new_tokens=12)
    stage.run()
    history = PROMPT + SAID[: SAID.index(SAID[2]) + 1]
    assert stage.history("s") == history
    assert stage.view("s").kv_tokens == len(history) - 1


# -- cancels ------------------------------------------------------------------------------------------------------


def queued(stage: Stage) -> None:
    """Nothing has happened yet."""


def in_its_first_chunk(stage: Stage) -> None:
    stage.launch()


def between_chunks(stage: Stage) -> None:
    stage.step()


def in_its_last_chunk(stage: Stage) -> None:
    stage.step(2)
    stage.launch()


def decoding_in_flight(stage: Stage) -> None:
    stage.step(5)
    stage.launch()


def decoding_settled(stage: Stage) -> None:
    stage.step(5)


def about_to_be_preempted(stage: Stage) -> None:
    stage.step(5)
    stage.launch()
    planner = stage.machine._planner
    planner.preempt(stage.machine._books.requests[1])


def preempted(stage: Stage) -> None:
    stage.step(5)
    stage.machine._planner.preempt(stage.machine._books.requests[1])


PHASES: dict[Callable[[Stage], None], Phase] = {
    queued: Phase.QUEUED,
    in_its_first_chunk: Phase.RUNNING,
    between_chunks: Phase.RUNNING,
    in_its_last_chunk: Phase.RUNNING,
    decoding_in_flight: Phase.RUNNING,
    decoding_settled: Phase.RUNNING,
    about_to_be_preempted: Phase.RUNNING,
    preempted: Phase.QUEUED,
}


@pytest.mark.parametrize("bring", PHASES, ids=lambda bring: bring.__name__)
@pytest.mark.parametrize("warm", [False, True])
def test_h17_h18_h33_a_turn_cancelled_in_any_phase_is_rolled_back_and_leaves_nothing(
    bring: Callable[[Stage], None], warm: bool
) -> None:
    stage = Stage(chunk=4, pages=30)
    stage.open("s")
    if warm:
        stage.submit(0, PROMPT, session="s")
        stage.run()
    history, kv_tokens = stage.history("s"), stage.view("s").kv_tokens
    stage.submit(1, prompt(8, 12), session="s", max_new_tokens=12)
    bring(stage)
    assert stage.machine._books.requests[1].phase is PHASES[bring]
    stage.send(Cancel(1))
    assert (stage.done[1].reason, stage.done[1].status) == ("abort", 200)
    assert (stage.history("s"), stage.view("s").phase) == (history, "idle")
    stage.submit(2, [9, 9], session="s")
    stage.run()
    assert stage.done[2].cached_tokens == kv_tokens
    assert stage.output[2] == expected([*history, 9, 9])
    stage.close("s")
    assert_nothing_is_held(stage)


@pytest.mark.parametrize("bring", PHASES, ids=lambda bring: bring.__name__)
def test_h24_a_plain_request_cancelled_in_any_phase_leaves_nothing(bring: Callable[[Stage], None]) -> None:
    stage = Stage(chunk=4, pages=30)
    stage.submit(1, prompt(8, 12), max_new_tokens=12)
    bring(stage)
    stage.send(Cancel(1))
    stage.submit(2, PROMPT)
    stage.run()
    assert stage.output[2] == SAID[:4]
    assert_nothing_is_held(stage)


def assert_nothing_is_held(stage: Stage) -> None:
    stage.run()
    stage.launch()  # Nothing is left to plan; what waits in limbo is free now.
    stats = stage.stats()
    assert (stats.pages_requests, stats.pages_sessions, stats.pages_limbo, stats.rows_held) == (0, 0, 0, 0)
    assert stats.pages_free + stats.pages_tree == 29
    assert stats.pages_tree_pinned == 0


def test_a_cancel_that_comes_too_late_changes_nothing() -> None:
    stage = Stage()
    stage.submit(1, PROMPT, max_new_tokens=2)
    while 1 not in stage.done:
        stage.launch()
    stage.send(Cancel(1))
    stage.send(Cancel(77))
    stage.run()
    assert (stage.done[1].reason, stage.output[1]) == ("length", SAID[:2])


def test_what_was_said_before_a_cancel_is_told_and_nothing_after_it() -> None:
    stage = Stage()
    stage.submit(1, PROMPT, max_new_tokens=12)
    stage.step(4)
    stage.launch()
    stage.send(Cancel(1))
    stage.run()
    assert stage.output[1] == SAID[:4]
    assert stage.done[1].completion_tokens == 4


def test_all_requests_can_be_cancelled_at_once() -> None:
    stage = Stage(rows=2)
    for key in range(1, 6):
        stage.submit(key, PROMPT)
    stage.launch()
    value: Any = stage.ask(CancelAll).value
    assert value.values == {"cancelled": 5}
    assert {done.reason for done in stage.done.values()} == {"abort"}
    stage.run()
    assert stage.stats().rows_held == 0


# -- log-probabilities --------------------------------------------------------------------------------------------


def told(stage: Stage, submit: Submit) -> tuple[list[int], list[TokenDetail], list[Scores]]:
    """Run one request: its tokens, and the details and scores that came with them."""
    stage.machine.receive(submit)
    tokens: list[int] = []
    details: list[TokenDetail] = []
    scores: list[Scores] = []
    while stage.machine.has_work:
        planned = stage.machine.plan()
        plan = stage.machine.complete(planned) if planned else None
        if plan is not None:
            stage.machine.settle(stage.device.launch(plan).result())
        batch = stage.machine.take_effects()
        if batch is not None:
            tokens += np.frombuffer(batch.delta_tokens, "<i4").tolist()
            details += batch.details
            scores += batch.scores
    return tokens, details, scores


def wish(**settings: Any) -> Submit:
    sampling = Sampling(seed=1, temperature=0.0, max_new_tokens=settings.pop("max_new_tokens", 6))
    return Submit(key=1, tokens=pack_tokens(PROMPT), sampling=sampling, **settings)


def floats(packed: bytes) -> list[float]:
    return np.frombuffer(packed, "<f4").tolist()


def ints(packed: bytes) -> list[int]:
    return np.frombuffer(packed, "<i4").tolist()


@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("retract_every", [0, 2])
def test_every_output_token_comes_with_its_log_probability(top: int, retract_every: int) -> None:
    tokens, details, _ = told(Stage(retract_every=retract_every), wish(logprobs=top))
    digests = [Chain(PROMPT + tokens[:index]).digest for index in range(6)]
    logprobs = [value for detail in details for value in floats(detail.logprobs)]
    assert logprobs == [hashing.logprob_of(digest, token) for digest, token in zip(digests, tokens, strict=True)]
    tops = [hashing.top_of(digest, top, FACTS.vocab_size) for digest in digests]
    assert [id for detail in details for id in ints(detail.top_ids)] == [id for top in tops for id, _ in top]
    flat = [value for detail in details for value in floats(detail.top_logprobs)]
    assert flat == [value for top in tops for _, value in top]


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("retract_every", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 4, 8, 9])
def test_every_prompt_position_asked_for_is_scored_once_and_in_order(
    chunk: int, retract_every: int, first: int
) -> None:
    stage = Stage(chunk=chunk, retract_every=retract_every)
    stage.submit(7, PROMPT)  # The prefix is in the tree: a hit must not swallow positions that want a score.
    stage.run()
    _, _, scores = told(stage, wish(prompt_logprobs_from=first, logprobs=2))
    positions = [score.start + index for score in scores for index in range(len(ints(score.tokens)))]
    assert positions == list(range(max(first, 1), len(PROMPT)))
    assert [token for score in scores for token in ints(score.tokens)] == PROMPT[max(first, 1) :]
    wanted = [hashing.logprob_of(Chain(PROMPT[:position]).digest, PROMPT[position]) for position in positions]
    assert [value for score in scores for value in floats(score.logprobs)] == wanted


# -- faulty devices -----------------------------------------------------------------------------------------------


def two_in_flight() -> tuple[Stage, StepResult]:
    """Two decoding requests, and the result of a step of both that is yet to settle."""
    stage = Stage()
    for key in (1, 2):
        stage.submit(key, prompt(key, 5), max_new_tokens=8)
    stage.step(2)
    planned = stage.machine.plan()
    assert planned is not None
    plan = stage.machine.complete(planned)
    assert plan is not None
    return stage, stage.device.launch(plan).result()


WRONG_RESULTS: dict[str, Callable[[StepResult], dict[str, Any]]] = {
    "another step": lambda result: {"step": result.step + 1},
    "other rows": lambda result: {"rows": result.rows[::-1].copy()},
    "other token counts": lambda result: {"query_counts": result.query_counts + 1},
    "too many tokens": lambda result: {"emitted": result.emitted + 1},
    "no tokens": lambda result: {"emitted": result.emitted * 0, "tokens": result.tokens[:0]},
    "fewer tokens than it says": lambda result: {"tokens": result.tokens[:1]},
    "scores that nobody asked for": lambda result: {"score_logprobs": np.zeros(1, np.float32)},
    "faults of other rows": lambda result: {"faulty": result.faulty[:1]},
}


@pytest.mark.parametrize("change", WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_h74_a_result_that_does_not_answer_its_plan_changes_nothing(
    change: Callable[[StepResult], dict[str, Any]],
) -> None:
    stage, result = two_in_flight()
    before = stage.machine.stats()
    with pytest.raises(PlanError):
        stage.machine.settle(dataclasses.replace(result, **change(result)))
    assert stage.machine.stats() == before
    stage.machine.settle(result)
    stage.run()
    assert {key: stage.output[key] for key in (1, 2)} == {key: expected(prompt(key, 5), 8) for key in (1, 2)}


def test_h74_a_row_whose_logits_are_not_finite_ends_alone() -> None:
    stage, result = two_in_flight()
    stage.machine.settle(dataclasses.replace(result, faulty=np.array([True, False])))
    stage.run()
    assert (stage.done[1].reason, stage.done[1].status) == ("error", 500)
    assert stage.output[1] == expected(prompt(1, 5), 2)
    assert stage.output[2] == expected(prompt(2, 5), 8)


def test_a_result_without_a_step_in_flight_is_a_bug() -> None:
    stage, result = two_in_flight()
    stage.machine.settle(result)
    with pytest.raises(AssertionError, match="never launched"):
        stage.machine.settle(result)


# -- giving up waiting ------------------------------------------------------------------------------------------


def test_a_request_that_nobody_began_is_refused_when_its_client_waits_no_longer() -> None:
    stage = Stage(rows=1)
    stage.submit(1, PROMPT, max_new_tokens=8)
    stage.submit(2, PROMPT)
    stage.step()
    for key in (1, 2):
        stage.send(Cancel(key, "waited too long", if_waiting=True))
    done = stage.done[2]
    assert (done.reason, done.status, done.code, done.message) == ("error", 503, "not_ready", "waited too long")
    stage.run()
    assert (stage.output[1], stage.done[1].reason) == (SAID[:8], "length"), "one that runs goes on"


def test_h26_a_preempted_request_has_begun_and_is_not_refused_for_waiting() -> None:
    stage = Stage(rows=1)
    stage.submit(1, PROMPT, max_new_tokens=8)
    stage.step(2)
    stage.machine.preempt(1)
    stage.send(Cancel(1, "waited too long", if_waiting=True))
    stage.run()
    assert (stage.output[1], stage.done[1].reason) == (SAID[:8], "length")

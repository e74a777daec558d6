"""Memory that runs out in a step costs time and nothing else: the step is run in smaller ones, and later ones too."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sessile.contract.plan import SAMPLE, StepPlan, StepResult
from sessile.device import shortage
from sessile.device.shortage import NO_LIMIT_TOKENS, ShrinkingRunner, is_out_of_memory
from sessile.device.worker import DeviceFacts, StepRunner, Worker
from sessile.errors import OutOfMemory, PlanError
from tests.parity.driver import Driver, Run
from tests.unit.stage_device import small_device


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass
class Ready:
    """A step that has run."""

    outcome: StepResult

    def wait(self) -> StepResult:
        return self.outcome


class ShortRunner:
    """Runs steps of up to so many tokens and has too little memory for others. runner: None: nothing is computed."""

    def __init__(self, tokens_max: int, runner: StepRunner | None = None) -> None:
        self.tokens_max = tokens_max
        self.shortages = 0
        self.tried: list[int] = []
        self._runner = runner

    def start(self, plan: StepPlan) -> Ready:
        self.tried.append(plan.tokens.size)
        if plan.tokens.size > self.tokens_max:
            self.shortages += 1
            raise OutOfMemory(f"Too little memory for {plan.tokens.size} tokens.")
        if self._runner is not None:
            return Ready(self._runner.run(plan))
        none = np.zeros(plan.rows.size, np.int32)
        return Ready(StepResult(plan.step, plan.rows, plan.query_counts, none, ints(), none.astype(np.bool_)))


def prompt_plan(tokens: int, drafts: int = 0) -> StepPlan:
    return StepPlan.empty(
        1, rows=ints(0), starts=ints(0), query_counts=ints(tokens), draft_counts=ints(drafts), flags=ints(SAMPLE),
        output_indices=ints(0), logprob_tops=ints(-1), tokens=np.zeros(tokens, np.int32),
    )  # fmt: skip


def test_a_step_that_memory_suffices_for_is_the_runners_own() -> None:
    """Nothing is put around it: the host's time of a step is short."""
    runner = ShortRunner(8)
    started = ShrinkingRunner(runner).start(prompt_plan(8))
    assert isinstance(started, Ready)
    assert started.wait().shortages == 0


def test_a_step_that_does_not_fit_is_halved_until_it_does() -> None:
    short = ShortRunner(30)
    result = ShrinkingRunner(short).start(prompt_plan(100)).wait()
    assert short.tried == [100, 50, 25, 25, 25, 25]
    assert (result.query_counts.tolist(), result.shortages) == ([100], 2)


def test_two_parts_of_a_step_are_queued_at_a_time_however_many_there_are() -> None:
    class Counting(ShortRunner):
        queued = most = 0

        def start(self, plan: StepPlan) -> Any:
            ready = super().start(plan)
            self.queued += 1
            self.most = max(self.most, self.queued)
            return Counted(ready.outcome)

    class Counted(Ready):
        def wait(self) -> StepResult:
            runner.queued -= 1
            return self.outcome

    runner = Counting(1)
    result = ShrinkingRunner(runner).start(prompt_plan(300)).wait()
    assert (runner.most, runner.queued) == (2, 0)
    assert result.query_counts.tolist() == [300]


def test_later_steps_of_that_size_are_not_tried_whole_and_smaller_ones_are() -> None:
    short = ShortRunner(50)
    runner = ShrinkingRunner(short)
    for tokens in (100, 80, 50):
        runner.start(prompt_plan(tokens))
    assert short.tried == [100, 50, 50, 40, 40, 50]


def test_after_many_steps_larger_ones_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "STEPS_BEFORE_GROWTH", 4)
    short = ShortRunner(50)
    runner = ShrinkingRunner(short)
    results = [runner.start(prompt_plan(100)).wait() for _ in range(4)]
    assert short.tried == [100, 50, 50, 50, 50, 100, 50, 50, 50, 50]
    assert [result.shortages for result in results] == [1, 0, 1, 0]
    short.tokens_max = NO_LIMIT_TOKENS
    for _ in range(200):
        runner.start(prompt_plan(100))
    assert short.tried[-2:] == [100, 100] and runner.tokens_max == NO_LIMIT_TOKENS


@pytest.mark.parametrize(("tokens", "drafts"), [(1, 0), (4, 3)])
def test_a_step_that_cannot_be_made_smaller_fails(tokens: int, drafts: int) -> None:
    with pytest.raises(OutOfMemory, match=f"Too little memory for {tokens} tokens"):
        ShrinkingRunner(ShortRunner(0)).start(prompt_plan(tokens, drafts))


def test_what_else_fails_is_not_run_again() -> None:
    class Faulty(ShortRunner):
        def start(self, plan: StepPlan) -> Ready:
            self.tried.append(plan.tokens.size)
            raise PlanError("a row does not exist")

    faulty = Faulty(0)
    with pytest.raises(PlanError, match="does not exist"):
        ShrinkingRunner(faulty).start(prompt_plan(8))
    assert faulty.tried == [8]


def test_the_first_shortage_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    runner = ShrinkingRunner(ShortRunner(20))
    with caplog.at_level(logging.WARNING, "sessile.device"):
        runner.start(prompt_plan(100))
    (record,) = caplog.records
    assert record.getMessage().startswith("Too little memory for 100 tokens. It is run in smaller ones")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (PlanError("a plan that is out of memory's bounds"), False),
    ],
)
def test_a_shortage_of_memory_is_told_from_what_is_worse(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# -- nothing but time is lost ------------------------------------------------------------------------------------------


class ShortDevice:
    """The CPU's device, with too little memory for steps of more than so many tokens."""

    def __init__(self, worker: Worker, tokens_max: int) -> None:
        self.facts: DeviceFacts = worker.facts
        self.short = ShortRunner(tokens_max, worker._runner)
        self._runner = ShrinkingRunner(self.short)
        self._pending: Any = None

    def launch(self, plan: StepPlan) -> "ShortDevice":
        self._runner.tokens_max = NO_LIMIT_TOKENS  # each step finds out for itself
        self._pending = self._runner.start(plan)
        return self

    def result(self) -> StepResult:
        return self._pending.wait()


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with small_device(tmp_path_factory.mktemp("small")) as device:
        yield device


REQUESTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_k": 20, "seed": 2**63 + 5},
    {"repetition": 1.3, "frequency": 0.5, "presence": 0.2, "logprobs": 2},
    {"biases": {7: 3.0, 9: -50.0}, "bans": [7], "min_new_tokens": 3, "temperature": 1.0},
    {"logprobs": 3, "score_top": 2},
    {"drafts": [5] * 9, "drafts_max": 3, "frequency": 0.4},
    {"allowed": [[5, 7, 31, 33, 64, 127]] * 3, "drafts": [5] * 9, "drafts_max": 2, "temperature": 1.0, "logprobs": 0},
]


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(st.tuples(st.sampled_from(range(len(REQUESTS))), st.integers(1, 40)), min_size=1, max_size=5),
    chunk_tokens=st.integers(4, 64),
    tokens_max=st.integers(4, 24),
)
def test_whatever_runs_in_parts_says_what_it_would_have_said(
    device: Worker, asked: list[tuple[int, int]], chunk_tokens: int, tokens_max: int
) -> None:
    def runs() -> list[Run]:
        numbers = count()
        return [Run([next(numbers) * 37 % 128 for _ in range(n)], 4, **REQUESTS[kind]) for kind, n in asked]

    whole, parts = runs(), runs()
    Driver(device, chunk_tokens=chunk_tokens).run_all(whole)
    short = ShortDevice(device, tokens_max)
    Driver(short, chunk_tokens=chunk_tokens).run_all(parts)
    for one, other in zip(whole, parts, strict=True):
        assert (one.output, one.steps, one.is_faulty) == (other.output, other.steps, other.is_faulty)
        assert other.output_logprobs == pytest.approx(one.output_logprobs, abs=1e-4)
        assert (other.top_ids, other.score_top_ids) == (one.top_ids, one.score_top_ids)
        assert other.scores == pytest.approx(one.scores, abs=1e-4)

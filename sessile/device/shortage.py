"""What is done when memory runs out in a step: the step is run in smaller ones, and so are later ones of its size.

The KV pool and the weights are there from the start; what runs out is what a step computes in beside them.
"""

import logging
from typing import Protocol

import torch

from sessile.contract.plan import StepPlan, StepResult
from sessile.device.splitting import halves_of, joined
from sessile.errors import OutOfMemory

log = logging.getLogger("sessile.device")

NO_LIMIT_TOKENS = 1 << 30
STEPS_BEFORE_GROWTH = 1000
"""So many steps, parts counted one by one, go well before twice the tokens are tried: memory that others took may have
come back. Where it has not, one step in so many is run for nothing."""


class Pending(Protocol):
    """A step that was queued."""

    def is_done(self) -> bool:
        """Whether the device has passed it."""
        ...

    def wait(self) -> StepResult:
        """Wait for the device and return the step's result, once; raises what the device raised."""
        ...


class Runner(Protocol):
    """What queues steps on a device, one after the other."""

    @property
    def shortages(self) -> int:
        """How often memory ran out so far."""
        ...

    def start(self, plan: StepPlan) -> Pending:
        """Queue a step. Raises OutOfMemory; the plan may be started again then, whole or in parts."""
        ...


class StartedStep:
    """A step that was queued after memory ran out, whole or in parts: the last one, and the results of those before it.

    shortages: how often memory ran out meanwhile.
    """

    def __init__(self, plan: StepPlan, results: list[StepResult], last: Pending, shortages: int) -> None:
        self._plan, self._results, self._last, self._shortages = plan, results, last, shortages

    def is_done(self) -> bool:
        """Whether the device has passed all parts."""
        return self._last.is_done()

    def wait(self) -> StepResult:
        """Wait for the device and return the result, once. Raises what the device raised."""
        result = joined(self._plan, [*self._results, self._last.wait()])
        result.shortages += self._shortages
        return result


class ShrinkingRunner:
    """Starts steps whole as long as they fit, else in as many parts as it takes. Owns nothing.

    tokens_max: larger steps are not tried whole.
    """

    def __init__(self, runner: Runner) -> None:
        self.tokens_max = NO_LIMIT_TOKENS
        self._runner = runner
        self._steps_since = 0
        self._has_warned = False

    def start(self, plan: StepPlan) -> Pending:
        """Queue a step. Raises what the runner does, OutOfMemory if a part does not fit that cannot be made smaller.

        Of parts at most two are queued at a time, and waited for here: each takes memory of its own on the host, and a
        step may need a thousand of them.
        """
        before = self._runner.shortages
        last = self._start_whole(plan)
        results: list[StepResult] = []
        waiting = _reversed_halves(plan) if last is None else []
        while waiting:
            part = waiting.pop()
            started = self._start_whole(part)
            if started is None:
                waiting += _reversed_halves(part)
                continue
            if last is not None:
                results.append(last.wait())
            last = started
        assert last is not None, "a step has at least one part"
        shortages = self._runner.shortages - before
        return StartedStep(plan, results, last, shortages) if results or shortages else last

    def _start_whole(self, part: StepPlan) -> Pending | None:
        """Queue a part as it is; None if it is too large, and there are halves. Raises what the runner does."""
        if part.tokens.size > self.tokens_max and halves_of(part) is not None:
            return None
        try:
            started = self._runner.start(part)
        except OutOfMemory as error:
            if halves_of(part) is None:
                raise
            self._shrink(part.tokens.size, error)
            return None
        self._grow()
        return started

    def _shrink(self, tokens: int, error: OutOfMemory) -> None:
        """Try no step of so many tokens for some time, and say so the first time."""
        self.tokens_max, self._steps_since = max(tokens // 2, 1), 0
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s It is run in smaller ones, and so will others be, which is slower", error)

    def _grow(self) -> None:
        """A step went well; after enough of them try larger ones again."""
        if self.tokens_max < NO_LIMIT_TOKENS:
            self._steps_since += 1
            if self._steps_since >= STEPS_BEFORE_GROWTH:
                self.tokens_max, self._steps_since = min(self.tokens_max * 2, NO_LIMIT_TOKENS), 0


def _reversed_halves(part: StepPlan) -> list[StepPlan]:
    """The halves of a part that has two, the one that runs first at the end."""
    halves = halves_of(part)
    assert halves is not None, "a part that is not started whole has halves"
    return [*reversed(halves)]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the GPU's or the host's memory ran out, and nothing worse.

    PyTorch has a class for what its allocator lacks. What the driver lacks (for graphs, kernels, pinned memory) is a
    RuntimeError of PyTorch or Triton, with CUDA's own words.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def reason_of(error: Exception) -> str:
    """What ran out, in one line, without PyTorch's advice about its settings."""
    return " ".join(str(error).split()).partition(" If reserved but")[0].rstrip(".") or type(error).__name__

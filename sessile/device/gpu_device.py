"""A GPU as the engine sees it: `launch` queues a step on the caller's thread and returns at once."""

import torch

from sessile.contract.plan import StepPlan
from sessile.device.gpu_runner import GpuRunner
from sessile.device.pending import GpuTicket
from sessile.device.shortage import ShrinkingRunner
from sessile.device.worker import DeviceFacts
from sessile.errors import NotReady


class GpuDevice:
    """Runs steps in the order of their launch. Owns the runner, its pool and the model's weights until `close`.

    A step that memory is too short for is run in smaller ones (`shortage.py`). After a step that raised, the state of
    the device is unknown: that ticket and all later ones raise.
    """

    def __init__(self, runner: GpuRunner, facts: DeviceFacts) -> None:
        self.facts = facts
        self._runner: GpuRunner | None = runner
        self._steps: ShrinkingRunner | None = ShrinkingRunner(runner)
        self._broken: BaseException | None = None

    @property
    def graphs_captured(self) -> int:
        """How many sizes of step are kept as a graph by now."""
        return len(self._runner.graphs) if self._runner else 0

    def launch(self, plan: StepPlan) -> GpuTicket:
        """Queue a step; its arrays must not change until its result is taken. Raises NotReady after `close`."""
        if self._steps is None:
            raise NotReady("the device is closed")
        if self._broken is None:
            try:
                return GpuTicket(self._steps.start(plan))
            except BaseException as error:
                self._broken = error
        return GpuTicket(None, self._broken)

    def prepare(self) -> bool:
        """Capture a graph that a later step may need, in some ten milliseconds; whether there was one to capture."""
        return self._runner is not None and self._broken is None and self._runner.prepare_next()

    def close(self) -> None:
        """Finish what was launched and give the memory back. May be called again."""
        if self._runner is None:
            return
        if self.facts.device == "cuda":
            torch.cuda.synchronize()  # before the runner: what is queued writes to memory of its exchange
        self._runner = self._steps = None
        if self.facts.device == "cuda":
            torch.cuda.empty_cache()

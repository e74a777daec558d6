"""What the engine asks of a device: run steps in order, each answered through a ticket."""

from typing import Protocol

from sessile.contract.plan import StepPlan, StepResult


class Ticket(Protocol):
    """The promise of one launched step's result."""

    def is_done(self) -> bool:
        """Whether `result` would not block."""
        ...

    def result(self) -> StepResult:
        """Block until the step is done and return what it produced; raises what the device raised."""
        ...


class Executor(Protocol):
    """A device that runs steps. Steps run in the order of their launch; whoever opened the executor closes it."""

    def launch(self, plan: StepPlan) -> Ticket:
        """Hand the step over and return at once. The plan's arrays belong to the executor until its result is taken."""
        ...

    def prepare(self) -> bool:
        """Do a little of what will make later steps faster; nothing is in flight. Returns whether anything was done."""
        ...

    def close(self) -> None:
        """Stop the device's threads and give its memory back. Nothing may be launched after it."""
        ...

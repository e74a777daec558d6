"""Make a failing workload smaller: leave messages out as long as the same checker still fails."""

from collections.abc import Callable, Sequence

from sessile.contract.messages import ToEngine
from sessile.sim.records import Failure, Report, Script
from sessile.sim.simulation import Simulation
from sessile.sim.world import World

Event = tuple[int, ToEngine]
"""A turn of the loop, and a message of it."""


def shrink(
    world: World, steps: int, report: Report, *, runs_max: int = 200, simulation: type[Simulation] = Simulation
) -> tuple[Script, Failure]:
    """A part of the report's script that fails in the same checker, by leaving out ever smaller runs of messages.

    Returns the script and its failure; at worst the script that was recorded. simulation: the class to run it with, if
    the core is not the sound one.
    """
    assert report.failure is not None, "there is nothing to shrink"
    found = report.failure
    checker = found.checker
    events: list[Event] = [(turn, message) for turn, sent in sorted(report.script.items()) for message in sent]

    def fails(candidate: Sequence[Event]) -> bool:
        nonlocal found
        failure = simulation(world, script_of(candidate)).run(steps).failure
        if failure is None or failure.checker != checker:
            return False
        found = failure
        return True

    return script_of(_without_runs(events, fails, runs_max)), found


def script_of(events: Sequence[Event]) -> Script:
    """Messages by turn."""
    script: dict[int, list[ToEngine]] = {}
    for turn, message in events:
        script.setdefault(turn, []).append(message)
    return script


def _without_runs(events: list[Event], fails: Callable[[Sequence[Event]], bool], runs_max: int) -> list[Event]:
    length = max(1, len(events) // 2)
    runs = 0
    while runs < runs_max:
        start, shorter = 0, False
        while start < len(events) and runs < runs_max:
            candidate = events[:start] + events[start + length :]
            runs += 1
            if fails(candidate):
                events, shorter = candidate, True
            else:
                start += length
        if length == 1 and not shorter:
            break
        length = max(1, length // 2)
    return events

"""Corruption planted in mid-run, in any world: whoever it hits ends or goes cold, all others say what they would have.

The simulation's own checkers look on: every token against a reference, one end a request, an error for nobody but the
victims, everything free at the end.
"""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from sessile.core.ledger import FREE, Lease
from sessile.sim.simulation import Simulation
from sessile.sim.world import make_world

RATE = 0.1
"""Chance a step that something is planted."""


class CorruptedSimulation(Simulation):
    """Plants a fault just before the machine looks at its books, and tells the checkers whom it hits."""

    def __init__(self, seed: int) -> None:
        world = make_world(seed)
        limits = replace(world.limits, audit_level=2, contain_violations=True)
        super().__init__(replace(world, limits=limits))
        self.planted = 0
        self._told = 0
        self._dice = Random(f"corruption {seed}")
        self._core: Any = self._machine
        look = self._core._watch.settled

        def plant_and_look() -> None:
            if self._dice.random() < RATE:
                self._plant()
            look()

        self._core._watch.settled = plant_and_look

    def _reclaims(self) -> int:
        """A count that moves whenever sessions may have gone cold: before that and after it, none has to be warm."""
        news, self._told = self.planted - self._told, self.planted
        return super()._reclaims() + 1000 * (2 * self.planted + (news > 0))

    def _plant(self) -> None:
        books = self._core._books
        owners = [(lease, [request]) for request in books.requests.values() if (lease := request.lease)]
        owners += [(line.parked.lease, []) for line in books.lines() if line.parked is not None]
        owners = [(lease, victims) for lease, victims in owners if len(lease)]
        if not owners:
            return
        lease, victims = self._dice.choice(owners)
        other, bystanders = self._dice.choice(owners)
        self.planted += 1
        # What the device does for whoever has left no longer counts, so it may not strike while it is looked at.
        for request in victims + (bystanders if self._corrupt(lease, other) else []):
            self._device.faulty_seeds.add(request.sampling.seed)

    def _corrupt(self, lease: Lease, other: Lease) -> bool:
        """Corrupt what a lease has; whether another one suffers as well."""
        ledger = self._core._books.ledger
        index = self._dice.randrange(len(lease))
        page, theirs = lease.pages[index], self._dice.choice(other.pages)
        kind = self._dice.randrange(5)
        if kind == 0:
            ledger.tags[page] = FREE
        elif kind == 1:
            ledger.tags[page] = other.account
        elif kind == 2:
            lease.pages[index] = theirs
            return True
        elif kind == 3:
            lease.pages.append(page)
        else:
            ledger.tags[page], ledger.tags[theirs] = ledger.tags[theirs], ledger.tags[page]
            return True
        return False


@pytest.mark.parametrize("seed", range(12))
def test_h06_h07_corruption_costs_its_victims_alone(seed: int) -> None:
    simulation = CorruptedSimulation(seed)
    report = simulation.run(120)
    failure = report.failure
    assert failure is None, f"{failure.checker}, step {failure.step}: {failure.message}"


def test_corruption_of_every_kind_is_planted_and_contained() -> None:
    violations: dict[str, int] = {}
    planted = 0
    for seed in range(12, 20):
        simulation = CorruptedSimulation(seed)
        assert simulation.run(100).failure is None
        planted += simulation.planted
        for kind, count in simulation._core.stats().audit_violations_total.items():
            violations[kind] = violations.get(kind, 0) + count
    assert planted > 50
    assert violations["pages"] > 50

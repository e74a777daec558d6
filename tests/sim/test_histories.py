"""What the server holds of sessions is what the core has, in whatever order clients, faults and preemptions come."""

from typing import Any

import pytest

from sessile.contract.messages import Batch, ToEngine, pack_tokens
from sessile.server.histories import Histories
from sessile.sim.simulation import Simulation
from sessile.sim.world import FAULTS, make_world
from tests.unit.stage import deltas_of

STEPS = 250
LOOK_EVERY = 20
"""Messages between two comparisons."""


class Watched:
    """A simulation whose messages and effects pass by what a server would hold."""

    def __init__(self, seed: int) -> None:
        world = make_world(seed, frozenset(FAULTS))
        self.histories = Histories(1 << 30, bos_id=world.facts.bos_id)
        self.simulation = Simulation(world)
        self.compared = 0
        self._machine: Any = self.simulation._machine
        self._receive, self._take_effects = self._machine.receive, self._machine.take_effects
        self._machine.receive, self._machine.take_effects = self._received, self._taken
        self._messages = 0

    def _received(self, message: ToEngine) -> None:
        self._messages += 1
        self.histories.note_sent(message)
        self._receive(message)

    def _taken(self) -> Batch | None:
        batch: Batch | None = self._take_effects()
        if batch is None:
            return None
        for key, tokens in deltas_of(batch):
            if key in self.histories.collecting:
                self.histories.collecting[key].output += pack_tokens(tokens)
        self.histories.note_batch(batch)
        if self._messages // LOOK_EVERY > self.compared:
            self.compared = self._messages // LOOK_EVERY
            self.compare()
        return batch

    def compare(self) -> None:
        """All effects have been taken: what is held is what there is."""
        sessions = self._machine._books.sessions
        assert set(self.histories._sessions) == set(sessions)
        for place, session in sessions.items():
            held = self.histories._sessions[place]
            assert held.tokens is not None, f"{place} is held no longer"
            assert bytes(held.tokens) == session.history.slice(0, len(session.history)), place
            assert list(held.turn_ends) == list(session.turn_ends), place
            if held.branches is None:
                assert held.last is None or held.last.rid == (session.reply.rid if session.reply else ""), place
                continue
            committed = {rid: node for rid, node in session.nodes.items() if node.turn is None}
            nodes = held.branches._nodes
            assert set(committed) <= set(nodes), place
            for rid, node in committed.items():
                assert nodes[rid].length == len(node.history) and nodes[rid].input_end == node.input_end, (place, rid)
                assert _history(nodes[rid]) == node.history.slice(0, len(node.history)), (place, rid)


def _history(node: Any) -> bytes:
    before = _history(node.parent)[: node.base_tokens * 4] if node.parent else b""
    return bytes(before + node.tokens)


@pytest.mark.parametrize("seed", range(16))
def test_what_is_held_is_what_the_core_has(seed: int) -> None:
    watched = Watched(seed)
    report = watched.simulation.run(STEPS)
    assert report.failure is None, report.failure
    assert watched.compared > 0

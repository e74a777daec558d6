"""Faults planted in the core are caught; the core itself comes back untouched."""

import argparse
import importlib

import pytest

from sessile.core import ledger
from sessile.sim import mutants
from sessile.sim.faults import MUTANTS
from sessile.sim.mutants import Hunt, hunt
from sessile.sim.planting import Edit, NoPlace, planted
from sessile.sim.simulation import Simulation
from sessile.sim.world import make_world

QUICK = [
    "forgotten tail",
    "alias with balanced counts",
    "two owners swap a page",
    "free before drain",
    "stuck busy mark",
    "wrong page id",
    "emitted twice on resume",
]


def test_there_are_many_mutants_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_can_be_planted(mutant: "mutants.Mutant") -> None:
    with planted(mutant.edits) as simulation:
        assert simulation.Simulation is not Simulation


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_fault_is_caught(name: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    assert hunt(Hunt(mutant, seeds=12, steps=300)).failure is not None


def test_an_edit_without_a_place_is_refused() -> None:
    with pytest.raises(NoPlace, match="holds 0 times"), planted([Edit("sessile.core.ledger", "no such text", "")]):
        pass


def test_the_sound_core_is_back_after_planting() -> None:
    with planted(MUTANTS[0].edits):
        assert importlib.import_module("sessile.core.ledger") is not ledger
    assert importlib.import_module("sessile.core.ledger") is ledger
    assert Simulation(make_world(0)).run(50).failure is None


def test_a_missed_fault_fails_the_hunt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = mutants.Mutant("harmless", "", "", (Edit("sessile.core.ledger", "_SLOT_BITS = 20", "_SLOT_BITS = 19"),))
    monkeypatch.setattr(mutants, "MUTANTS", (harmless,))
    options = argparse.Namespace(seeds=1, steps=20, only="harm", workers=1, write=None)
    assert mutants.main(options) == 1
    assert "NOBODY" in capsys.readouterr().out

"""The planted faults."""

from dataclasses import dataclass

from sessile.sim.planting import Edit


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    hazards: str
    summary: str
    edits: tuple[Edit, ...]


MUTANTS: tuple[Mutant, ...] = ()

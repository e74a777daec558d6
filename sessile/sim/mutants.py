"""Faults planted in the shipped core, one at a time: each must be caught, and the sound core pass the same seeds."""

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sessile.sim.arguments import count
from sessile.sim.faults import MUTANTS, Mutant
from sessile.sim.planting import NoPlace, planted
from sessile.sim.records import Failure
from sessile.sim.simulation import Simulation
from sessile.sim.world import make_world

BALANCED_MIN = 8
"""At least so many mutants must keep every total balanced until they are caught: sums alone prove nothing."""


@dataclass(frozen=True)
class Hunt:
    """A mutant and the seeds to look for it with."""

    mutant: Mutant
    seeds: int
    steps: int


@dataclass(frozen=True)
class Catch:
    """Who caught a mutant, and where; failure None: nobody did, or it could not be planted."""

    name: str
    failure: Failure | None
    no_place: str = ""


def hunt(task: Hunt) -> Catch:
    """Run seeds until one fails. A top-level function, so that worker processes can be given it."""
    name = task.mutant.name
    try:
        with planted(task.mutant.edits) as simulation:
            for seed in range(task.seeds):
                report = simulation.Simulation(make_world(seed)).run(task.steps)
                if report.failure:
                    return Catch(name, report.failure)
    except NoPlace as error:
        return Catch(name, None, str(error))
    return Catch(name, None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m sessile.sim mutants`."""
    parser.add_argument("--seeds", type=count, default=130, help="seeds to look with, at most")
    parser.add_argument("--steps", type=count, default=400, help="steps a seed")
    parser.add_argument("--only", default="", help="only mutants whose name holds this")
    parser.add_argument("--workers", type=count, default=2, help="processes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table to this Markdown file")


def main(options: argparse.Namespace) -> int:
    """Hunt all mutants, print the table; the exit code: 0 if all were caught and the sound core passed."""
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    print(f"{'mutant':<38} {'sums':<9} caught by", flush=True)
    tasks = [Hunt(mutant, options.seeds, options.steps) for mutant in chosen]
    catches: list[Catch] = []
    for mutant, catch in zip(chosen, run_hunts(tasks, options.workers), strict=True):
        catches.append(catch)
        print(_line(mutant, catch), flush=True)
    sound = _check_sound(catches, options)
    missed = [catch.name for catch in catches if catch.failure is None]
    balanced = sum(catch.failure is not None and catch.failure.balanced for catch in catches)
    verdict = "passed" if sound is None else f"FAILED seed {sound.seed} step {sound.step} ({sound.checker})"
    print(f"{len(catches) - len(missed)} of {len(catches)} caught; {balanced} kept all sums balanced; sound: {verdict}")
    if options.write and not missed and sound is None:
        options.write.write_text(markdown(chosen, catches, options), encoding="utf-8")
    too_few = not options.only and balanced < BALANCED_MIN
    return 1 if missed or sound or too_few else 0


def run_hunts(tasks: Sequence[Hunt], workers: int) -> Iterator[Catch]:
    """Catches in the order of the tasks."""
    if workers <= 1 or len(tasks) == 1:
        yield from map(hunt, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(hunt, tasks)


def _check_sound(catches: Sequence[Catch], options: argparse.Namespace) -> Failure | None:
    """Run the sound core over every seed that was needed to catch a mutant; its first failure, or None."""
    last_seed = max((catch.failure.seed if catch.failure else options.seeds - 1 for catch in catches), default=0)
    for seed in range(last_seed + 1):
        failure = Simulation(make_world(seed)).run(options.steps).failure
        if failure:
            return failure
    return None


def _line(mutant: Mutant, catch: Catch) -> str:
    if catch.failure is None:
        return f"{mutant.name:<38} {'':<9} {f'NOT PLANTED: {catch.no_place}' if catch.no_place else 'NOBODY'}"
    failure = catch.failure
    sums = "balanced" if failure.balanced else "off"
    words = failure.message.splitlines()[0] if failure.message else ""
    return f"{mutant.name:<38} {sums:<9} {failure.checker}, seed {failure.seed} step {failure.step}: {words[:90]}"


def markdown(mutants: Sequence[Mutant], catches: Sequence[Catch], options: argparse.Namespace) -> str:
    """The table as a page of the docs."""
    lines = [
        "# Planted faults",
        "",
        f"Written by `python -m sessile.sim mutants --seeds {options.seeds} --steps {options.steps} --write FILE`.",
        "Each fault is planted in a private copy of the shipped core, alone. The hunt stops at the first seed that",
        "fails; the sound core passes all of these seeds. *Sums* says whether all totals of pages and rows still added",
        "up at that moment: where they did, only the identity of a page or a token's content gave the fault away.",
        "",
        "| fault | what is wrong | hazards | sums | caught by | seed | step |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for mutant, catch in zip(mutants, catches, strict=True):
        failure = catch.failure
        assert failure is not None, "only a full table is written"
        sums = "balanced" if failure.balanced else "off"
        lines.append(f"| {mutant.name} | {mutant.summary} | {mutant.hazards} | {sums} | {failure.checker} "
                     f"| {failure.seed} | {failure.step} |")
    return "\n".join(lines) + "\n"

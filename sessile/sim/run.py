"""Many seeds: run them, add up what happened, complain about what never did, and replay one that failed."""

import argparse
import hashlib
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sessile.core.marks import Mark
from sessile.errors import StartupError
from sessile.sim import closure, mutants, replay
from sessile.sim.arguments import Parser, count
from sessile.sim.records import Failure, Report
from sessile.sim.shrink import shrink
from sessile.sim.simulation import Simulation
from sessile.sim.world import FAULTS, make_world

EXPECTED = {
    "": (
        "steps", "turns", "tokens", "warm turns", "cold turns", "prefix hits", "scores",
        "done stop", "done length", "refused 404", "refused 409", "refused 413", "refused 429",
    ),
    "retract": ("preemptions",),
    "cancel": ("done abort", "roll-backs"),
    "close": ("deferred closes", "refused 410"),
    "drafts": ("drafts offered", "drafts accepted"),
    "faulty": ("done error",),
    "expire": ("expirations",),
    "flush": ("Flush",),
    "fork": ("forks", "rewinds", "copies"),
    "branch": ("branches", "warm branches", "replaced", "replaced parents"),
    "reserve": ("reservations",),
    "replay": ("replays",),
    "grammar": ("astray",),
}  # fmt: skip
"""Totals that a long run must have reached, by the fault that brings them; with all faults, every mark of the core."""
SEEDS_FOR_TOTALS = 100
"""Fewer seeds may miss a rare total."""
EXIT_WRONG_USE = 2


@dataclass(frozen=True)
class Task:
    """One seed to run."""

    seed: int
    steps: int
    faults: frozenset[str]


def run_task(task: Task) -> Report:
    """Run one seed; a top-level function, so that worker processes can be given it."""
    return Simulation(make_world(task.seed, task.faults)).run(task.steps)


def run_tasks(tasks: Sequence[Task], workers: int) -> Iterator[Report]:
    """Reports in the order of the tasks."""
    if workers <= 1 or len(tasks) == 1:
        yield from map(run_task, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(run_task, tasks)


def missing_totals(totals: Counter[str], faults: frozenset[str]) -> list[str]:
    """Names of totals that should have been reached and are 0."""
    groups = [names for fault, names in EXPECTED.items() if not fault or fault in faults]
    if faults == frozenset(FAULTS):
        groups.append(tuple(f"mark: {mark.value}" for mark in Mark))
    return [name for names in groups for name in names if not totals[name]]


def make_parser() -> Parser:
    """The command line of `python -m sessile.sim`."""
    parser = Parser(prog="python -m sessile.sim", description=__doc__)
    parser.add_argument("--seeds", type=count, default=300, help="how many seeds to run, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=count, default=1000, help="steps a seed that schedule at least one row")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--replay", action="store_true", help="with --seed: shrink the failure and print its events")
    parser.add_argument("--faults", default="all", help=f"'all', 'none' or some of {','.join(FAULTS)}")
    parser.add_argument("--workers", type=count, default=2, help="processes")
    commands = parser.add_subparsers(dest="command", metavar="mutants | closure | replay")
    planted = commands.add_parser("mutants", help="plant faults in the core; each must be caught")
    mutants.add_arguments(planted)
    closed = commands.add_parser("closure", help="explore small worlds to their last state")
    closure.add_arguments(closed)
    replayed = commands.add_parser("replay", help="play what a server was asked, from its --request-log")
    replay.add_arguments(replayed)
    return parser


def parse_faults(text: str) -> frozenset[str]:
    """Names after `--faults`; raises StartupError for an unknown one."""
    names = {"all": FAULTS, "none": ()}.get(text) or tuple(name for name in text.split(",") if name and name != "none")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise StartupError(f"--faults: unknown {', '.join(unknown)}; known: {', '.join(FAULTS)}")
    return frozenset(names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; the exit code: 0 if nothing was found, 2 if it is wrong, in one line."""
    try:
        return run(make_parser().parse_args(arguments))
    except StartupError as error:
        print(f"sessile: {error}", file=sys.stderr)
        return EXIT_WRONG_USE


def run(options: argparse.Namespace) -> int:
    """Run what was parsed; the exit code. Raises StartupError for a name or a file that is none."""
    if options.command == "mutants":
        return mutants.main(options)
    if options.command == "closure":
        return closure.main(options)
    if options.command == "replay":
        return replay.main(options)
    faults = parse_faults(options.faults)
    if options.seed is not None:
        return _run_one(Task(options.seed, options.steps, faults), replay=options.replay)
    tasks = [Task(seed, options.steps, faults) for seed in range(options.first, options.first + options.seeds)]
    return _run_many(tasks, faults, options.workers)


def _run_one(task: Task, *, replay: bool) -> int:
    report = run_task(task)
    print(f"seed {task.seed}: {report.steps} steps, trace {report.trace}")
    _print_totals(report.totals)
    if report.failure is None:
        return 0
    failure = report.failure
    if replay:
        world = make_world(task.seed, task.faults)
        print(world)
        script, failure = shrink(world, task.steps, report)
        print(f"shrunk to {sum(map(len, script.values()))} of {sum(map(len, report.script.values()))} messages")
    _print_failure(failure, task)
    print("\n".join(failure.events))
    return 1


def _run_many(tasks: Sequence[Task], faults: frozenset[str], workers: int) -> int:
    started_s = time.perf_counter()
    totals: Counter[str] = Counter()
    trace = hashlib.sha256()
    failures: list[tuple[Failure, Task]] = []
    for done, (task, report) in enumerate(zip(tasks, run_tasks(tasks, workers), strict=True), 1):
        totals.update(report.totals)
        trace.update(report.trace.encode())
        if report.failure:
            failures.append((report.failure, task))
            _print_failure(report.failure, task)
        if sys.stderr.isatty():
            print(f"\r{done}/{len(tasks)} seeds, {totals['steps']:,} steps", end="", file=sys.stderr, flush=True)
    _print_totals(totals)
    missing = missing_totals(totals, faults) if len(tasks) >= SEEDS_FOR_TOTALS else []
    for name in missing:
        print(f"NEVER HAPPENED: {name}")
    seconds = time.perf_counter() - started_s
    verdict = f"{len(failures)} FAILED" if failures else "nothing found"
    print(f"{len(tasks)} seeds, {totals['steps']:,} steps, {seconds:.0f} s: {verdict}; trace {trace.hexdigest()[:16]}")
    return 1 if failures or missing else 0


def _print_totals(totals: Counter[str]) -> None:
    width = max(map(len, totals), default=0)
    for name in sorted(totals):
        print(f"  {name:<{width}}  {totals[name]:>12,}")


def _print_failure(failure: Failure, task: Task) -> None:
    faults = ",".join(name for name in FAULTS if name in task.faults) or "none"
    flags = "" if task.faults == frozenset(FAULTS) else f" --faults {faults}"
    print(f"FAILED seed {failure.seed} step {failure.step} ({failure.checker}): {failure.message}")
    print(f"  replay: python -m sessile.sim --seed {failure.seed} --steps {task.steps}{flags} --replay")

"""`sessile bench audit`: what the audit costs on the books of a large, busy server.

The books are made by real operations: sessions of two turns whose first is in the prefix tree, plain prompts that
ended and left their pages there, and running requests, until the pool is nearly full. Level 2 is a check of everything
after every step; level 1 is a look at a few places every few steps, all of them in turn.
"""

import time
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from sessile.bench.null_device import EOS_ID, FIRST_PLAIN_ID, VOCAB_SIZE, OverlappedDriver
from sessile.contract.messages import OpenSession, Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.core.audit import check
from sessile.core.books import Books
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.core.rolling import LOOK_STEPS, RollingAudit
from sessile.engine.compiled import use_compiled_core
from sessile.engine.garbage import IdleCollector
from sessile.options import option

STEP_MS = 6.0
"""The step that shares are of."""
COVERAGE_S = 30.0
LEVEL_2_MS, LEVEL_1_SHARE = 4.0, 0.01
"""Targets, at the default size."""
PAGE_SIZE = 16
TURN_PAGES = 40
"""Pages of each of a session's two turns, of which the first go to the tree."""
RUNNING_PAGES = 100
FREE_SHARE = 0.2
"""Of the pool, about what is left free."""
ENDLESS_TOKENS = 30_000
"""Longest output of what is to be running still when the audit is measured."""


@dataclass(frozen=True)
class AuditBenchOptions:
    """The books to measure on."""

    requests: int = option(256, "Running requests.", unit="requests", low=1, high=4096)
    sessions: int = option(1000, "Idle sessions with KV.", unit="sessions", low=0)
    nodes: int = option(2000, "Nodes of the prefix tree, about.", unit="nodes", low=0)
    pages: int = option(200_000, "Pages of the pool.", unit="pages", low=1000)
    checks: int = option(50, "Full checks to measure.", low=1)


@dataclass(frozen=True)
class AuditTimes:
    """What was measured, and on how much."""

    requests: int
    sessions: int
    nodes: int
    full_ns: npt.NDArray[np.int64]
    """Of each full check."""
    look_ns: npt.NDArray[np.int64]
    """Of each look of the rolling audit."""
    round_looks: int
    """Looks from one coverage of everything to the next."""


def filled_machine(options: AuditBenchOptions) -> Machine:
    """A machine with books of that size; a step is in flight in none of them."""
    limits = Limits(
        pages_total=options.pages,
        page_size=PAGE_SIZE,
        rows_max=options.requests,
        context_tokens=65_536,
        chunk_tokens=8192,
        mixed_chunk_tokens=8192,
        queue_max=1_000_000,
        audit_level=0,
    )
    machine = Machine(limits, ModelFacts(vocab_size=VOCAB_SIZE, context_tokens=65_536, eos_ids=(EOS_ID,)))
    driver, keys, random = OverlappedDriver(machine), count(1), np.random.default_rng(1)

    def send(pages: int, session: str | None = None, output_tokens: int = 1) -> None:
        tokens = random.integers(FIRST_PLAIN_ID, VOCAB_SIZE, pages * PAGE_SIZE, np.int32)
        sampling = Sampling(seed=1, max_new_tokens=output_tokens, ignore_eos=True)
        machine.receive(Submit(key=next(keys), tokens=pack_tokens(tokens), sampling=sampling, session=session))

    def run(steps: int | None = None) -> None:
        while machine.has_work if steps is None else steps:
            driver.turn()
            steps = None if steps is None else steps - 1

    sessions = [f"session-{index}" for index in range(options.sessions)]
    for session in sessions:
        machine.receive(OpenSession(op=next(keys), session=session))
    for _ in range(2):
        for session in sessions:
            send(TURN_PAGES, session)
        run()
    plain = max(0, options.nodes - options.sessions - options.requests)
    taken = 2 * TURN_PAGES * options.sessions + (RUNNING_PAGES + 2) * options.requests
    room = max(plain, int(options.pages * (1 - FREE_SHARE)) - taken)
    for _ in range(plain):
        send(room // plain)
    run()
    for _ in range(options.requests):
        send(RUNNING_PAGES, output_tokens=ENDLESS_TOKENS)
    prompt_tokens = RUNNING_PAGES * PAGE_SIZE * options.requests
    run(prompt_tokens // (limits.chunk_tokens - options.requests) + 3)
    return machine


def measured_audit(options: AuditBenchOptions) -> AuditTimes:
    """Build the books and time both audits on them. Raises AuditError if the books are not sound."""
    machine = filled_machine(options)
    books: Books = machine._books
    collector = IdleCollector()
    collector.take_over()
    full_ns = []
    for _ in range(options.checks):
        started_ns = time.perf_counter_ns()
        check(books)
        full_ns.append(time.perf_counter_ns() - started_ns)
    rolling = RollingAudit(books)
    look_ns: list[int] = []
    ends: list[int] = []
    while len(ends) < 3:
        checks = books.totals.audit_checks
        started_ns = time.perf_counter_ns()
        rolling.look()
        look_ns.append(time.perf_counter_ns() - started_ns)
        if books.totals.audit_checks > checks:
            ends.append(len(look_ns))
    collector.release()
    return AuditTimes(
        requests=books.rows.held_rows,
        sessions=sum(session.parked is not None for session in books.sessions.values()),
        nodes=books.tree.nodes,
        full_ns=np.array(full_ns),
        look_ns=np.array(look_ns),
        round_looks=ends[-1] - ends[-2],
    )


def measure_audit(options: AuditBenchOptions) -> int:
    """Measure and print; 0 if every target is met, else 1."""
    console = Console()
    build = use_compiled_core()
    console.print(f"core: {build.found}. {build.remedy}".rstrip())
    with console.status("filling the pool"):
        times = measured_audit(options)
    console.print(
        f"{times.requests} requests, {times.sessions} sessions, {times.nodes} tree nodes, {options.pages:,} pages"
    )
    full_ms = float(np.median(times.full_ns)) / 1e6
    look_us = float(np.median(times.look_ns)) / 1e3
    looks_ms = LOOK_STEPS * STEP_MS
    """From one look to the next."""
    share, covered_s = look_us / 1e3 / looks_ms, times.round_looks * looks_ms / 1e3
    table = Table(box=None, pad_edge=False)
    for column in ("", "value", "target", ""):
        table.add_column(column, justify="left" if not column else "right")
    met = [
        _add(table, "level 2, p50 a step, ms", full_ms, LEVEL_2_MS, 2),
        _add(table, f"level 1, share of steps of {STEP_MS:g} ms, %", share * 100, LEVEL_1_SHARE * 100, 3),
        _add(table, f"level 1, everything seen within, s at {STEP_MS:g} ms a step", covered_s, COVERAGE_S, 1),
    ]
    table.add_row("level 2, least, ms", f"{times.full_ns.min() / 1e6:.2f}")
    for name, value in (("p50", look_us), ("p99", np.percentile(times.look_ns, 99) / 1e3)):
        table.add_row(f"level 1, {name} a look, every {LOOK_STEPS} steps, µs", f"{value:.1f}")
    console.print(table)
    return 0 if all(met) else 1


def _add(table: Table, name: str, value: float, target: float, digits: int) -> bool:
    met = value <= target
    table.add_row(name, f"{value:.{digits}f}", f"≤ {target:g}", "[green]met" if met else "[red]missed")
    return met

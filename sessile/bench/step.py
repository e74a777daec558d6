"""`sessile bench step`: the host time of a step of the scheduler, under a load that touches everything it does.

A step is planning, encoding and decoding the plan, and settling. In each step 8 rows finish and 8 are admitted, one
long prompt is computed chunk by chunk, half of the rows are turns of sessions, the other half plain requests that find
a prefix in the tree. Steps overlap; the audit is at level 1, as in production. No device: results are made by numpy.
"""

from dataclasses import dataclass
from itertools import count

import numpy as np
from rich.console import Console
from rich.table import Table

from sessile.bench.null_device import EOS_ID, FIRST_PLAIN_ID, VOCAB_SIZE, HostTimes, OverlappedDriver
from sessile.contract.messages import Batch, CloseSession, OpenSession, Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.engine.garbage import IdleCollector
from sessile.options import option

TURNOVER = 8
"""Rows that finish, and rows that are admitted, in each step."""
PREFIXES, PREFIX_TOKENS = 16, 512
"""What plain requests share."""
NEW_TOKENS = 16
"""Of each plain prompt beside its prefix, and of each turn."""
TURNS_MAX = 32
"""A session is closed after so many turns and another one opened."""
LONG_PROMPT_TOKENS = 32_768
PAGES_TOTAL = 40_960
PAGE_SIZE = 16
STEP_NS = 10**7
"""Virtual time between steps."""


@dataclass(frozen=True)
class StepBenchOptions:
    """What to measure."""

    rows: int | None = option(None, "Rows of the batch; default: 256, then 512.", unit="rows", low=16, high=4096)
    steps: int = option(2000, "Steps to measure, after a warm-up in which all rows are filled.", unit="steps", low=10)


@dataclass(frozen=True)
class Target:
    """Most milliseconds of host time a step."""

    p50_ms: float
    p99_ms: float | None


TARGETS = {256: Target(0.3, 1.0), 512: Target(0.6, None)}


class Load:
    """Clients of a machine: replaces each request that ends, so that the batch stays full and keeps turning over."""

    def __init__(self, machine: Machine, rows: int) -> None:
        self._machine = machine
        self._random = np.random.default_rng(1)
        self._prefixes = [self._tokens(PREFIX_TOKENS) for _ in range(PREFIXES)]
        self._keys = count(1)
        self._ops = count(1)
        self._output_tokens = rows // TURNOVER
        self._left_to_start = rows - 1
        self._session_of: dict[int, str] = {}
        self._turns: dict[str, int] = {}
        self._long_key = self._submit_long()

    def ramp(self) -> None:
        """Start a step's worth of clients, so that later each step sees as many ends."""
        for _ in range(min(TURNOVER, self._left_to_start)):
            self._left_to_start -= 1
            if self._left_to_start % 2:
                self._open_and_submit()
            else:
                self._submit_plain()

    def follow(self, batch: Batch) -> int:
        """Send what the clients of the requests that have ended send next; how many have ended."""
        for done in batch.done:
            assert done.reason == "length", f"a request of the bench ended with {done.reason}: {done.message}"
            session = self._session_of.pop(done.key, None)
            if done.key == self._long_key:
                self._long_key = self._submit_long()
            elif session is None:
                self._submit_plain()
            elif self._turns[session] < TURNS_MAX:
                self._submit_turn(session)
            else:
                self._machine.receive(CloseSession(next(self._ops), session))
                self._open_and_submit()
        return len(batch.done)

    def _tokens(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
        return self._random.integers(FIRST_PLAIN_ID, VOCAB_SIZE, count, np.int32)

    def _submit(self, tokens: "np.ndarray[tuple[int], np.dtype[np.int32]]", output: int, session: str | None) -> int:
        key = next(self._keys)
        sampling = Sampling(seed=key, max_new_tokens=output, ignore_eos=True)
        self._machine.receive(Submit(key=key, tokens=pack_tokens(tokens), sampling=sampling, session=session))
        return key

    def _submit_plain(self) -> None:
        prefix = self._prefixes[next(self._ops) % PREFIXES]
        self._submit(np.concatenate([prefix, self._tokens(NEW_TOKENS)]), self._output_tokens, None)

    def _submit_long(self) -> int:
        return self._submit(self._tokens(LONG_PROMPT_TOKENS), 1, None)

    def _open_and_submit(self) -> None:
        op = next(self._ops)
        session = f"session-{op}"
        self._machine.receive(OpenSession(op=op, session=session))
        self._turns[session] = 0
        self._submit_turn(session)

    def _submit_turn(self, session: str) -> None:
        self._turns[session] += 1
        self._session_of[self._submit(self._tokens(NEW_TOKENS), self._output_tokens, session)] = session


def limits_for(rows: int) -> Limits:
    """Limits of a large GPU, with the audit level of production."""
    return Limits(
        pages_total=PAGES_TOTAL,
        page_size=PAGE_SIZE,
        rows_max=rows,
        context_tokens=65_536,
        chunk_tokens=8192,
        mixed_chunk_tokens=1024,
        audit_level=1,
    )


def measured_steps(rows: int, steps: int) -> list[HostTimes]:
    """Host times of this many steps with a full batch."""
    facts = ModelFacts(vocab_size=VOCAB_SIZE, context_tokens=65_536, eos_ids=(EOS_ID,))
    machine = Machine(limits_for(rows), facts)
    driver, load = OverlappedDriver(machine), Load(machine, rows)
    collector = IdleCollector()
    measured: list[HostTimes] = []
    ends = 0
    warm_up = 4 * rows // TURNOVER
    for step in range(warm_up + steps):
        if step == warm_up:
            collector.take_over()
        machine.tick(step * STEP_NS)
        load.ramp()
        times, effects = driver.turn()
        if effects:
            ended = load.follow(effects)
            ends += ended if step >= warm_up else 0
        if step >= warm_up:
            measured.append(times)
    collector.release()
    machine.audit()
    assert ends >= 0.9 * steps * TURNOVER, f"only {ends} requests ended in {steps} steps: the load is not as described"
    return measured


def measure_steps(options: StepBenchOptions) -> int:
    """Measure and print; 0 if every target is met, else 1."""
    console = Console()
    table = Table(title="host time of a step, ms", title_justify="left")
    for column in ("rows", "steps", "plan", "encode+decode", "settle", "p50", "p99", "target p50 · p99", ""):
        table.add_column(column, justify="right" if column else "left")
    all_met = True
    for rows in [options.rows] if options.rows else list(TARGETS):
        with console.status(f"{options.steps} steps of {rows} rows"):
            times = measured_steps(rows, options.steps)
        met = add_line(table, rows, times)
        all_met = all_met and met
    console.print(table)
    return 0 if all_met else 1


def add_line(table: Table, rows: int, times: list[HostTimes]) -> bool:
    """Add a measurement to the table; whether it meets its target."""
    p50_ms, p99_ms = (float(q) for q in np.percentile([t.step_ns for t in times], [50, 99]) / 1e6)
    parts_ms = [float(np.median([getattr(t, name) for t in times])) / 1e6 for name in ("plan_ns", "code_ns", "settle_ns")]
    target = TARGETS.get(rows)
    met = target is None or (p50_ms <= target.p50_ms and (target.p99_ms is None or p99_ms <= target.p99_ms))
    wanted = "none" if target is None else f"{target.p50_ms} · {target.p99_ms or '–'}"
    verdict = "" if target is None else ("[green]met" if met else "[red]missed")
    figures = [f"{value:.3f}" for value in (*parts_ms, p50_ms, p99_ms)]
    table.add_row(str(rows), str(len(times)), *figures, wanted, verdict)
    return met

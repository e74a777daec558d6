"""`sessile bench step`: the host time of a step of the scheduler, under a load that touches everything it does.

A step is planning, encoding and decoding the plan, and settling. In each step 8 rows finish and 8 are admitted: four
turns of sessions, three plain requests that find a prefix in the tree, and one with a chunk of prompt that is new.
Steps overlap; the audit is at level 1, as in production. No device: results are made by numpy. Last, what asking a
drafter in vain adds to steps of a few rows.
"""

from dataclasses import dataclass
from itertools import count

import numpy as np
from rich.console import Console
from rich.table import Table

from sessile.bench.null_device import EOS_ID, FIRST_PLAIN_ID, VOCAB_SIZE, HostTimes, OverlappedDriver
from sessile.bench.quiet import measured_quiet
from sessile.contract.messages import Batch, CloseSession, OpenSession, Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.contract.plan import Ints
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.engine.compiled import use_compiled_core
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
CHUNK_TOKENS = 512
"""Length of a plain prompt that nobody has sent before."""
PAGES_TOTAL = 200_000
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
    """Most milliseconds of host time a step; None: no target."""

    p50_ms: float | None
    p99_ms: float | None


TARGETS = {256: Target(0.3, 1.0), 512: Target(0.6, None)}
QUIET_ROWS, QUIET_ROUNDS, QUIET_FACTOR_MAX = 8, 10, 2.0
"""Of steps in which nothing is drafted: what asking for drafts may cost, of all that a step takes without."""


class Load:
    """Clients of a machine, each sending its next request when one has ended.

    A request runs for rows / 8 steps. The next one of its client is admitted when the step in which the end was seen
    has passed, in a session one step later, when nothing in flight can touch its KV any more: so there are a few
    clients more than rows.
    """

    def __init__(self, machine: Machine, rows: int) -> None:
        self._machine = machine
        self._random = np.random.default_rng(1)
        self._prefixes = [self._tokens(PREFIX_TOKENS) for _ in range(PREFIXES)]
        self._keys = count(1)
        self._ops = count(1)
        self._output_tokens = rows // TURNOVER
        clients = range(rows + 2 * TURNOVER)
        self._clients_left = [client for client in clients if client < rows + TURNOVER or in_session(client)]
        self._client_of: dict[int, int] = {}
        self._session_of: dict[int, str] = {}
        self._turns: dict[str, int] = {}

    def ramp(self) -> None:
        """Start a step's worth of clients, so that later each step sees as many ends."""
        starting, self._clients_left = self._clients_left[:TURNOVER], self._clients_left[TURNOVER:]
        for client in starting:
            self._send(client)

    def follow(self, batch: Batch) -> int:
        """Send what the clients of the requests that have ended send next; how many have ended."""
        for done in batch.done:
            assert done.reason == "length", f"a request of the bench ended with {done.reason}: {done.message}"
            self._send(self._client_of.pop(done.key))
        return len(batch.done)

    def _send(self, client: int) -> None:
        """The next request of a client: of eight, four are in sessions, three share a prefix, one is new."""
        key = next(self._keys)
        self._client_of[key] = client
        kind = client % TURNOVER
        session = self._session(client) if in_session(client) else None
        tokens = self._tokens(CHUNK_TOKENS if kind == 7 else NEW_TOKENS)
        if 4 <= kind < 7:
            tokens = np.concatenate([self._prefixes[client % PREFIXES], tokens])
        sampling = Sampling(seed=key, max_new_tokens=self._output_tokens, ignore_eos=True)
        self._machine.receive(Submit(key=key, tokens=pack_tokens(tokens), sampling=sampling, session=session))

    def _session(self, client: int) -> str:
        """The client's session, replaced by a new one after its last turn."""
        session = self._session_of.get(client)
        if session is None or self._turns[session] == TURNS_MAX:
            if session is not None:
                self._machine.receive(CloseSession(next(self._ops), session))
            op = next(self._ops)
            session = self._session_of[client] = f"session-{op}"
            self._turns[session] = 0
            self._machine.receive(OpenSession(op=op, session=session))
        self._turns[session] += 1
        return session

    def _tokens(self, count: int) -> Ints:
        return self._random.integers(FIRST_PLAIN_ID, VOCAB_SIZE, count, np.int32)


def in_session(client: int) -> bool:
    """Every other client of a step's eight is in a session."""
    return client % TURNOVER < TURNOVER // 2


def limits_for(rows: int) -> Limits:
    """Limits of a large GPU, with the audit level of production."""
    return Limits(
        pages_total=PAGES_TOTAL,
        page_size=PAGE_SIZE,
        rows_max=rows + TURNOVER,
        context_tokens=65_536,
        chunk_tokens=8192,
        mixed_chunk_tokens=8192,
        audit_level=1,
    )


def measured_steps(rows: int, steps: int) -> list[HostTimes]:
    """Host times of this many steps with a full batch. Raises AssertionError if the load is not as described."""
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
            measured.clear()
            ends = 0
        machine.tick(step * STEP_NS)
        load.ramp()
        times, effects = driver.turn()
        measured.append(times)
        ends += load.follow(effects) if effects else 0
    collector.release()
    machine.audit()
    assert ends == steps * TURNOVER, f"{ends} requests ended in {steps} steps"
    assert min(times.rows for times in measured) == rows, "the batch was not always full"
    return measured


def measure_steps(options: StepBenchOptions) -> int:
    """Measure and print; 0 if every target is met, else 1."""
    console = Console()
    build = use_compiled_core()
    console.print(f"core: {build.found}. {build.remedy}".rstrip())
    console.print(f"Host time of a step in ms, {options.steps} steps. code: encoding and decoding the plan.")
    console.print("look: the rolling audit, once the step's effects are sent; not counted.")
    table = Table(box=None, pad_edge=False)
    for column in ("rows", "look", "plan", "code", "settle", "p50", "target", "p99", "target", ""):
        table.add_column(column, justify="right")
    all_met = True
    for rows in [options.rows] if options.rows else list(TARGETS):
        with console.status(f"{options.steps} steps of {rows} rows"):
            times = measured_steps(rows, options.steps)
        met = add_line(table, rows, times)
        all_met = all_met and met
    console.print(table)
    with console.status("steps with and without a drafter"):
        quiet = measured_quiet(QUIET_ROWS, QUIET_ROUNDS)
    factor = quiet.drafting_us / quiet.plain_us
    met = is_within(factor, QUIET_FACTOR_MAX)
    console.print(
        f"{QUIET_ROWS} rows that go on, mean: {quiet.plain_us:.0f} µs; with a drafter that finds nothing: "
        f"{quiet.drafting_us:.0f} µs, {factor:.2f} × (≤ {QUIET_FACTOR_MAX:g}) {'[green]met' if met else '[red]missed'}"
    )
    return 0 if all_met and met else 1


def add_line(table: Table, rows: int, times: list[HostTimes]) -> bool:
    """Add a measurement to the table; whether it meets its target."""
    p50_ms, p99_ms = (float(q) for q in np.percentile([t.step_ns for t in times], [50, 99]) / 1e6)
    parts_ms = np.median([(t.look_ns, t.plan_ns, t.code_ns, t.settle_ns) for t in times], axis=0) / 1e6
    target = TARGETS.get(rows, Target(None, None))
    met = is_within(p50_ms, target.p50_ms) and is_within(p99_ms, target.p99_ms)
    verdict = "" if target == Target(None, None) else ("[green]met" if met else "[red]missed")
    limits = ["" if limit is None else f"≤ {limit:g}" for limit in (target.p50_ms, target.p99_ms)]
    parts = [f"{value:.3f}" for value in parts_ms]
    table.add_row(str(rows), *parts, f"{p50_ms:.3f}", limits[0], f"{p99_ms:.3f}", limits[1], verdict)
    return met


def is_within(value: float, limit: float | None) -> bool:
    """Whether a value keeps to a limit, if there is one."""
    return limit is None or value <= limit

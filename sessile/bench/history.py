"""`sessile bench history`: the host time of a session's turn, on short and on long histories.

A turn's cost on the host is that of its new tokens, but for one copy of 4 bytes a page to bind its row. Everything the
engine's thread does for a turn is counted: taking the request in, planning, encoding, settling, sending.
"""

import time
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from sessile.bench.null_device import EOS_ID, FIRST_PLAIN_ID, VOCAB_SIZE, OverlappedDriver
from sessile.contract.messages import Done, OpenSession, Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.engine.garbage import IdleCollector
from sessile.options import option

LENGTHS_TOKENS = (1_000, 10_000, 100_000)
GROWTH_MAX = 1.1
"""Most that a turn on the longest history may cost, relative to the shortest."""
SESSIONS = 8
"""Of each length, taken in turn, so that no history grows much while it is measured."""
NEW_TOKENS, OUTPUT_TOKENS = 16, 8
CONTEXT_TOKENS = 131_072
PAGE_SIZE = 16
PAGES_TOTAL = 1 + SESSIONS * sum(length // PAGE_SIZE + 1_024 for length in LENGTHS_TOKENS)


@dataclass(frozen=True)
class HistoryBenchOptions:
    """What to measure."""

    turns: int = option(400, "Turns to measure on each length of history.", unit="turns", low=8, high=100_000)


class Conversations:
    """Sessions of given lengths on one machine, with nothing else running."""

    def __init__(self) -> None:
        limits = Limits(
            pages_total=PAGES_TOTAL,
            page_size=PAGE_SIZE,
            rows_max=256,
            context_tokens=CONTEXT_TOKENS,
            chunk_tokens=8192,
            audit_level=1,
        )
        facts = ModelFacts(vocab_size=VOCAB_SIZE, context_tokens=CONTEXT_TOKENS, eos_ids=(EOS_ID,))
        self._machine = Machine(limits, facts)
        self._driver = OverlappedDriver(self._machine)
        self._random = np.random.default_rng(1)
        self._number = 0

    def open(self, tokens: int) -> str:
        """A session with a history of this many tokens."""
        self._number += 1
        session = f"session-{self._number}"
        self._machine.receive(OpenSession(op=self._number, session=session))
        self._run_turn(session, tokens - OUTPUT_TOKENS)
        return session

    def turn_ns(self, session: str) -> int:
        """Host time of one turn."""
        return self._run_turn(session, NEW_TOKENS)

    def _run_turn(self, session: str, new_tokens: int) -> int:
        self._number += 1
        tokens = self._random.integers(FIRST_PLAIN_ID, VOCAB_SIZE, new_tokens, np.int32)
        sampling = Sampling(seed=1, max_new_tokens=OUTPUT_TOKENS, ignore_eos=True)
        submit = Submit(key=self._number, tokens=pack_tokens(tokens), sampling=sampling, session=session)
        self._machine.tick(self._number * 10**9)
        received_ns = time.perf_counter_ns()
        self._machine.receive(submit)
        total_ns = time.perf_counter_ns() - received_ns
        ends: list[Done] = []
        while not ends or self._driver.in_flight:
            times, effects = self._driver.turn()
            total_ns += times.step_ns + times.effects_ns
            ends += effects.done if effects else []
        assert ends[0].reason == "length", f"a turn of the bench ended with {ends[0].reason}: {ends[0].message}"
        return total_ns


def measured_turns(turns: int) -> dict[int, float]:
    """Median host time of a turn in milliseconds, by length of history. The lengths take turns, too."""
    conversations = Conversations()
    sessions = {length: [conversations.open(length) for _ in range(SESSIONS)] for length in LENGTHS_TOKENS}
    collector = IdleCollector()
    collector.take_over()
    taken_ns: dict[int, list[int]] = {length: [] for length in LENGTHS_TOKENS}
    for number in range(turns):
        for length in LENGTHS_TOKENS:
            taken_ns[length].append(conversations.turn_ns(sessions[length][number % SESSIONS]))
    collector.release()
    return {length: float(np.median(times)) / 1e6 for length, times in taken_ns.items()}


def measure_history(options: HistoryBenchOptions) -> int:
    """Measure and print; 0 if the target is met, else 1."""
    console = Console()
    with console.status(f"{options.turns} turns on each of {len(LENGTHS_TOKENS)} lengths of history"):
        turn_ms = measured_turns(options.turns)
    shortest_ms = turn_ms[LENGTHS_TOKENS[0]]
    console.print(f"Host time of a turn in ms, {NEW_TOKENS} tokens in, {OUTPUT_TOKENS} out.")
    table = Table(box=None, pad_edge=False)
    for column in ("history, tokens", "p50", "relative"):
        table.add_column(column, justify="right")
    for length, milliseconds in turn_ms.items():
        table.add_row(f"{length:,}", f"{milliseconds:.3f}", f"{milliseconds / shortest_ms:.2f}")
    console.print(table)
    growth = turn_ms[LENGTHS_TOKENS[-1]] / shortest_ms
    met = growth <= GROWTH_MAX
    console.print(f"growth {growth:.2f}, target ≤ {GROWTH_MAX}: " + ("[green]met" if met else "[red]missed"))
    return 0 if met else 1

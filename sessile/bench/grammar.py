"""`sessile bench grammar`: what outputs under a grammar cost the step loop, and what a grammar costs before its first.

No model runs: tokens are drawn among those that the masks allow, so that every grammar is walked from its start to its
end, or as far as it goes. The masks of a step are asked for as the core asks, all rows in one call.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from sessile.bench.grammar_schemas import SCHEMAS
from sessile.bench.null_device import OverlappedDriver
from sessile.contract.grammar import GrammarLine
from sessile.contract.messages import Grammar, Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import CompiledGrammars
from sessile.options import option
from sessile.text.load import load_tokenizer
from sessile.units import TokenId

Times = npt.NDArray[np.float64]

MASK_US, COMPILE_MS = 50.0, 100.0
"""Targets: of a mask, a row at the median; of compiling a schema, at the median."""


@dataclass(frozen=True)
class GrammarBenchOptions:
    """Which vocabulary, and how many rows."""

    model: str = option("default", "Model whose tokenizer is used: 'default', a .gguf file, or a hub folder.")
    rows: int = option(40, "Rows with a grammar in a step, over as many schemas.", unit="rows", low=1, high=4096)
    steps: int = option(300, "Steps to measure.", unit="steps", low=1)


@dataclass(frozen=True)
class GrammarTimes:
    """What was measured."""

    prepare_s: float
    """What all grammars share, once."""
    compile_ms: Times
    """Of each schema."""
    mask_us: Times
    """Of each mask, asked for by itself."""
    step_us: Times
    """Of the masks of each step, asked for together, by its rows."""
    draft_us: Times
    """The same where each row has four drafts, of which the first is allowed, by rows."""
    extend_us: Times
    """Of telling one token, a row."""
    host_us: Times
    """Of a whole step of the scheduler, masks included, by its rows: none of it overlaps with the device."""


def measured_grammars(options: GrammarBenchOptions) -> GrammarTimes:
    """Compile the schemas and walk them. Raises StartupError if there is no such model."""
    tokenizer = load_tokenizer(options.model)
    vocab_size = len(tokenizer.vocabulary.token_bytes)
    facts = tokenizer.facts(vocab_size=vocab_size, context_tokens=1 << 20)
    started_s = time.perf_counter()
    compiler = GrammarCompiler(facts, partial(tokenizer.encode, add_special_tokens=False))
    compiler.prepare()
    prepare_s = time.perf_counter() - started_s
    grammars = CompiledGrammars(vocab_size)
    compile_ms = []
    for schema in SCHEMAS.values():
        grammar = Grammar("json_schema", json.dumps(schema))
        started_s = time.perf_counter()
        grammars.put(grammar, compiler.compile(grammar))
        compile_ms.append((time.perf_counter() - started_s) * 1e3)
    walk = _Walk(grammars, facts, options.rows)
    for _ in range(options.steps):
        walk.step()
    return GrammarTimes(prepare_s, np.array(compile_ms), *walk.times(), _host_us(grammars, facts, options))


def _host_us(grammars: CompiledGrammars, facts: ModelFacts, options: GrammarBenchOptions) -> Times:
    """Host time of steps in which every row has a grammar, by rows, in µs; a null device picks what masks allow."""
    rows = options.rows
    limits = Limits(
        pages_total=64 * rows + 2, page_size=16, rows_max=rows, context_tokens=1000, chunk_tokens=max(512, rows),
        queue_max=1 << 20, audit_level=0,
    )  # fmt: skip
    driver = OverlappedDriver(Machine(limits, facts, grammars=grammars))
    keys = count(1)
    schemas = cycle([Grammar("json_schema", json.dumps(schema)) for schema in SCHEMAS.values()])
    times_us: list[float] = []
    while len(times_us) < options.steps:
        while len(driver.machine._books.requests) < rows:
            key = next(keys)
            sampling = Sampling(seed=key, max_new_tokens=200)
            driver.machine.receive(
                Submit(key=key, tokens=pack_tokens([key % 100 + 100]), sampling=sampling, grammar=next(schemas))
            )
        times, _ = driver.turn()
        times_us.append(times.step_ns / 1e3 / max(1, times.rows))
    return np.array(times_us)


class _Walk:
    """Rows that walk through the schemas, each beginning the next one when it has come to an end."""

    def __init__(self, grammars: CompiledGrammars, facts: ModelFacts, rows: int) -> None:
        self._mask_us: list[float] = []
        self._step_us: list[float] = []
        self._draft_us: list[float] = []
        self._extend_us: list[float] = []
        self._grammars = grammars
        self._facts = facts
        self._dice = np.random.default_rng(1)
        self._schemas = [Grammar("json_schema", json.dumps(schema)) for schema in SCHEMAS.values()]
        self._begun = 0
        self._steps = 0
        self._lines = [self._begin() for _ in range(rows)]

    def times(self) -> tuple[Times, Times, Times, Times]:
        """What was measured, in the order of GrammarTimes."""
        return np.array(self._mask_us), np.array(self._step_us), np.array(self._draft_us), np.array(self._extend_us)

    def step(self) -> None:
        """Masks for all rows, one by one or together by turns, then with drafts; then a token for each."""
        rows = len(self._lines)
        none: list[list[TokenId]] = [[] for _ in range(rows)]
        # What was asked once is remembered, so a row is asked either by itself or together with the others.
        self._steps += 1
        if self._steps % 2:
            started_s = time.perf_counter()
            _, words = self._grammars.masks(self._lines, none)
            self._step_us.append((time.perf_counter() - started_s) * 1e6 / rows)
        else:
            words = np.concatenate([self._mask(line) for line in self._lines])
        tokens = [self._draw(own) for own in words]
        drafts = [[token] * 4 for token in tokens]
        started_s = time.perf_counter()
        self._grammars.masks(self._lines, drafts)
        self._draft_us.append((time.perf_counter() - started_s) * 1e6 / rows)
        started_s = time.perf_counter()
        ends = [row for row, token in enumerate(tokens) if token in self._facts.eos_ids]
        for line, token in zip(self._lines, tokens, strict=True):
            if token not in self._facts.eos_ids:
                line.extend([token])
            assert not line.failure, line.failure
        self._extend_us.append((time.perf_counter() - started_s) * 1e6 / rows)
        for row in ends:
            self._lines[row] = self._begin()

    def _mask(self, line: GrammarLine) -> npt.NDArray[np.int32]:
        started_s = time.perf_counter()
        _, words = self._grammars.masks([line], [[]])
        self._mask_us.append((time.perf_counter() - started_s) * 1e6)
        return words

    def _begin(self) -> GrammarLine:
        self._begun += 1
        return self._grammars.start(self._schemas[self._begun % len(self._schemas)])

    def _draw(self, words: npt.NDArray[np.int32]) -> TokenId:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._facts.vocab_size]
        return TokenId(int(self._dice.choice(bits.nonzero()[0])))


def measure_grammars(options: GrammarBenchOptions) -> int:
    """Measure and print; 0 if every target is met, else 1."""
    console = Console()
    times = measured_grammars(options)
    console.print(
        f"{len(SCHEMAS)} schemas, {options.rows} rows, {options.steps} steps; {times.prepare_s:.2f} s once for the "
        "vocabulary"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "p50", "p99", "target at p50", ""):
        table.add_column(column, justify="left" if not column else "right")
    met = [
        _add(table, "a mask, µs", times.mask_us, MASK_US),
        _add(table, "compiling a schema, ms", times.compile_ms, COMPILE_MS),
    ]
    _add(table, "masks of a step, µs a row", times.step_us, None)
    _add(table, "masks with drafts, µs a row", times.draft_us, None)
    _add(table, "telling a token, µs a row", times.extend_us, None)
    _add(table, "all of a step on the host, µs a row", times.host_us, None)
    console.print(table)
    return 0 if all(met) else 1


def _add(table: Table, name: str, values: Times, target: float | None) -> bool:
    middle = float(np.median(values))
    shown = [name, f"{middle:.1f}", f"{np.percentile(values, 99):.1f}"]
    if target is None:
        table.add_row(*shown)
        return True
    met = middle <= target
    table.add_row(*shown, f"≤ {target:g}", "[green]met" if met else "[red]missed")
    return met

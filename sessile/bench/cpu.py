"""`sessile bench cpu`: decoding and prompts on the CPU, by each of our kernels and by other engines, in turn.

An arm is one way to run the same model: our engine with one kind of kernels and weights, or a command that runs another
engine. Each round runs all arms one after the other, every second round in reverse; a ratio to the first arm is taken
within a round, its median and interval over rounds. Prompts are random tokens, other ones each time, so that no cache
helps.

A command prints a line "B=8 decode 123.4 tok/s" for each batch, and "prefill2048 1234 tok/s".
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from sessile.bench.intervals import median_interval
from sessile.contract.messages import Batch, Sampling, Submit, pack_tokens, unpack_tokens
from sessile.core.limits import SchedulerOptions
from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.engine.build import Device, DeviceRequest, open_engine
from sessile.engine.clock import MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.inbox import LocalInbox
from sessile.engine.outbox import LocalOutbox
from sessile.errors import StartupError
from sessile.model.options import ModelOptions
from sessile.options import check_options, option
from sessile.text.load import load_tokenizer

TOKENS = 128
"""Of a prompt, and of an output, where decoding is measured."""
PREFILL_TOKENS = 2048
PREFILL = f"prefill of {PREFILL_TOKENS:,}"
PEER_TIMEOUT_S = 600
WIDTH_IN_A_FILE = 160
"""Columns of the table where nobody watches: room for every round."""


@dataclass(frozen=True)
class CpuBenchOptions:
    """What to measure."""

    model: str = option("default", "The model: a folder, a .gguf file, or `default`.")
    arms: str = option(
        "native:auto:auto:none,native:auto:auto:int8,numba:auto:none",
        "Ways of ours, as KERNELS:DTYPE:QUANTIZE:QUANTIZE_ACTIVATIONS:KV_DTYPE with commas between, what is left out "
        "as of `sessile serve`; the others are compared with the first.",
    )
    peers: str = option("", "Other engines, as NAME=COMMAND with semicolons between; see the bench's own words.")
    batches: str = option("1,8,32", "Requests at once, with commas between.")
    rounds: int = option(7, "How often every arm is run.", unit="rounds", low=1)


@dataclass
class Figures:
    """Tokens a second of one arm, by what was measured, one a round."""

    name: str
    rates: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, rate: float) -> None:
        """One more round."""
        self.rates.setdefault(what, []).append(rate)


class OwnArm:
    """Our engine in this process. Owns its device until `close`."""

    def __init__(self, way: str, options: CpuBenchOptions, batches: Sequence[int]) -> None:
        model, device = _options_of(way, options.model)
        clock = MonotonicClock()

        def open_for(request: DeviceRequest) -> Device:
            return open_device(
                model, device, page_size=request.page_size, context_tokens=request.context_tokens,
                rows_max=request.rows_max, drafts_max=request.drafts_max, progress=lambda stage, share: None,
            )  # fmt: skip

        scheduler = SchedulerOptions(context_tokens=PREFILL_TOKENS + TOKENS, rows_max=max(batches))
        self._engine = open_engine(
            scheduler, EngineOptions(speculate="off"), open_for, load_tokenizer(options.model).facts, on_cpu=True,
            clock=clock,
        )  # fmt: skip
        self.figures = Figures(way)
        self._inbox, self._outbox = LocalInbox(), LocalOutbox()
        self._loop = self._engine.loop(self._inbox, self._outbox, clock)
        self._dice = np.random.default_rng(7)
        self._keys = 0
        self._batches = batches

    def close(self) -> None:
        """Give the device back."""
        self._engine.close()

    def run(self) -> None:
        """One round."""
        for batch in self._batches:
            self._submit(batch, TOKENS, TOKENS)
            self.figures.note(f"batch {batch}", self._rate_of_decoding(batch))
        self._submit(1, PREFILL_TOKENS, 1)
        started_s = time.perf_counter()
        while not any(sent.done for sent in self._turn()):
            pass
        self.figures.note(PREFILL, PREFILL_TOKENS / (time.perf_counter() - started_s))

    def _submit(self, count: int, prompt_tokens: int, output_tokens: int) -> None:
        vocab = self._engine.ready.vocab_size
        for _ in range(count):
            self._keys += 1
            prompt = self._dice.integers(vocab // 10, vocab, prompt_tokens).astype(np.int32)
            sampling = Sampling(seed=0, temperature=0.0, max_new_tokens=output_tokens, ignore_eos=True)
            self._inbox.put(Submit(key=self._keys, tokens=pack_tokens(prompt.tolist()), sampling=sampling))

    def _rate_of_decoding(self, batch: int) -> float:
        """Tokens a second from when the last request has its first token."""
        counts: dict[int, int] = {}
        ended, started_s, before = 0, 0.0, 0
        while ended < batch:
            for sent in self._turn():
                keys = memoryview(sent.delta_keys).cast("q").tolist()
                for key, count in zip(keys, unpack_tokens(sent.delta_counts), strict=True):
                    counts[key] = counts.get(key, 0) + int(count)
                ended += len(sent.done)
            if not started_s and len(counts) == batch:
                started_s, before = time.perf_counter(), sum(counts.values())
        return (sum(counts.values()) - before) / (time.perf_counter() - started_s)

    def _turn(self) -> list[Batch]:
        self._loop.turn()
        return self._outbox.take()


def _options_of(way: str, model: str) -> tuple[ModelOptions, DeviceOptions]:
    """KERNELS:DTYPE:QUANTIZE:QUANTIZE_ACTIVATIONS:KV_DTYPE.

    Raises StartupError for what `sessile serve` would not take.
    """
    given = way.split(":")
    parts = given + ["auto", "auto", "auto", "none", "auto"][len(given) :]
    if len(parts) > 5:
        raise StartupError(f"--arms: {way!r} has more than five parts.")
    kernels, dtype, quantize, activations, kv_dtype = parts
    options = (
        ModelOptions(model, dtype=dtype, quantize=quantize, quantize_activations=activations),
        DeviceOptions(device="cpu", cpu_kernels=kernels, kv_dtype=kv_dtype),
    )
    for section in options:
        try:
            check_options(section)
        except ValueError as error:
            raise StartupError(f"--arms: {way!r}: {error}.") from None
    return options


class PeerArm:
    """Another engine, as a command."""

    def __init__(self, entry: str) -> None:
        name, equals, command = entry.partition("=")
        if not equals or not command.strip():
            raise StartupError(f"--peers: {entry!r} is no NAME=COMMAND.")
        self.figures = Figures(name.strip())
        self._argv = shlex.split(command)

    def close(self) -> None:
        """Nothing is kept between rounds."""

    def run(self) -> None:
        """One round. Raises StartupError for a command that fails or says nothing."""
        try:
            done = subprocess.run(self._argv, capture_output=True, text=True, check=True, timeout=PEER_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise StartupError(f"--peers: {self.figures.name} failed ({error}). Run its command by hand.") from error
        found = read_rates(done.stdout)
        if not found:
            name = self.figures.name
            raise StartupError(f"--peers: {name} printed no rate. docs/BENCHMARKS.md has the lines that it must print.")
        for what, rate in found.items():
            self.figures.note(what, rate)


def read_rates(text: str) -> dict[str, float]:
    """Tokens a second by what was measured, from the lines of a peer."""
    found = {f"batch {batch}": float(rate) for batch, rate in re.findall(r"B=(\d+) decode ([\d.]+) tok/s", text)}
    prefill = re.search(rf"prefill{PREFILL_TOKENS} ([\d.]+) tok/s", text)
    return found | ({PREFILL: float(prefill[1])} if prefill else {})


def measure_cpu(options: CpuBenchOptions) -> int:
    """Run all arms, print a table; the exit status. Raises StartupError."""
    batches = [int(part) for part in options.batches.split(",") if part.strip().isdigit()]
    if not batches:
        raise StartupError(f"--batches: {options.batches!r} names no number of requests.")
    arms: list[OwnArm | PeerArm] = [OwnArm(way.strip(), options, batches) for way in options.arms.split(",")]
    arms += [PeerArm(entry) for entry in options.peers.split(";") if entry.strip()]
    try:
        for number in range(options.rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                print(f"round {number + 1} of {options.rounds}: {arm.figures.name}", file=sys.stderr)
                arm.run()
    finally:
        for arm in arms:
            arm.close()
    console = Console()
    width = console.width if console.is_terminal else WIDTH_IN_A_FILE
    console.print(table_of([arm.figures for arm in arms], options.rounds), width=width)
    return 0


def table_of(arms: Sequence[Figures], rounds: int) -> Table:
    """Medians, all that they are of, and how many times as fast the first arm is, with its interval of 95 %."""
    table = Table(box=None, title=f"tokens a second, medians of {rounds} rounds")
    for name in ("", "arm", "median", "first arm ÷ it [95 %]", "each round"):
        table.add_column(name, justify="left" if name in ("", "arm") else "right", no_wrap=True)
    for what, firsts in arms[0].rates.items():
        for arm in arms:
            rates = arm.rates.get(what, [])
            if len(rates) != len(firsts):
                table.add_row(what, arm.name, "not measured", "", "")
                continue
            ratios = [first / rate for first, rate in zip(firsts, rates, strict=True)]
            low, high = median_interval(ratios)
            compared = "" if arm is arms[0] else f"{np.median(ratios):.2f} [{low:.2f}–{high:.2f}]"
            each = " ".join(f"{rate:.0f}" for rate in rates)
            table.add_row(what, arm.name, f"{np.median(rates):,.0f}", compared, each)
    return table

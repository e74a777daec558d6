"""`sessile bench throughput`: how many tokens a second, in this process or on a server, under a load as vLLM's benches.

Prompts of random token ids, each with the same number of tokens in and out, at once or as they come at a rate, at most
so many in flight. What is reported has the names and meanings of vLLM's `bench throughput` and `bench serve`: TTFT is
the time to the first token, TPOT the mean time of each further token of a request, ITL the time between two pieces of
its stream, E2EL the time to its end; all as its client saw them.
"""

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, Unpack

import uvloop
from rich.console import Console
from rich.table import Table

from sessile.bench.client import check_token_range, percentile, side_by_side, write_report
from sessile.bench.lean_client import LeanClient
from sessile.completion import GenerateFields, Generation, Prompt
from sessile.errors import StartupError, UserError
from sessile.offline.async_llm import AsyncLLM
from sessile.options import option

WARM_UP_TOKENS = 4
ENGINE_SETTINGS = ("load_format", "dtype", "quantize", "kv_memory", "context_tokens")


@dataclass(frozen=True)
class ThroughputBenchOptions:
    """The load, and what it is put to."""

    url: str | None = option(None, "Server to measure, one with the native interface; without it, an engine in here.")
    model: str = option("default", "Without --url: model, as for serve.")
    load_format: str = option("auto", "Without --url: as for serve; dummy: random weights.", choices=("auto", "dummy"))
    dtype: str = option("auto", "Without --url: as for serve.", choices=("auto", "float32", "bfloat16"))
    quantize: str = option("none", "Without --url: as for serve.", choices=("none", "int8", "int4"))
    kv_memory: str = option("auto", "Without --url: memory for the KV cache, as for serve.")
    context_tokens: int | None = option(None, "Without --url: context length, as for serve.", unit="tokens", low=2)
    prompts: int = option(64, "Requests in all.", unit="requests", low=1)
    input_tokens: int = option(128, "Prompt of each.", unit="tokens", low=1)
    output_tokens: int = option(64, "Output of each; the model's own end is passed over.", unit="tokens", low=1)
    batch: int = option(64, "Most requests in flight at a time.", unit="requests", low=1)
    rate: float = option(0.0, "Requests that come each second, at random times; 0: all at once.", unit="1/s", low=0)
    lowest_id: int = option(1000, "Prompts are random token ids from here on.", low=0)
    highest_id: int = option(40_000, "Highest token id in prompts; it must be in the model's vocabulary.", low=1)
    seed: int = option(1, "Seed of prompts and times; another one gives prompts that no cache has seen.", low=0)
    json: str | None = option(None, "Write every request and the summary to this file as well.")


class Target(Protocol):
    """What generates: an AsyncLLM or a LeanClient."""

    def generate(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> Generation:
        """An output, piece by piece."""
        ...


@dataclass(slots=True)
class RequestTimes:
    """One request as its client saw it; times in seconds."""

    first_token_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median and 99th percentile, in milliseconds."""

    mean_ms: float
    median_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread | None":
        """None where nothing was measured."""
        if not seconds:
            return None
        scaled = [each * 1e3 for each in seconds]
        return cls(statistics.fmean(scaled), percentile(scaled, 0.5), percentile(scaled, 0.99))


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole run."""

    duration_s: float
    requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None


def measure_throughput(options: ThroughputBenchOptions) -> int:
    """Put the load to the target and show what came of it. Raises StartupError for what cannot be measured."""
    check_token_range(options.lowest_id, options.highest_id)
    try:
        run = uvloop.run if options.url is not None else asyncio.run
        duration_s, times = run(_measure(options))
    except UserError as error:
        raise StartupError(error.message) from error
    summary = summarise(options, duration_s, times)
    _show(options, summary)
    if options.json:
        write_report(
            {
                "options": asdict(options),
                "summary": asdict(summary),
                "requests": [asdict(each) for each in times],
            },
            options.json,
        )
    return 0


async def _measure(options: ThroughputBenchOptions) -> tuple[float, list[RequestTimes]]:
    dice = random.Random(options.seed)
    ids = range(options.lowest_id, options.highest_id + 1)
    prompts = [dice.choices(ids, k=options.input_tokens) for _ in range(options.prompts)]
    starts_s = [0.0] * options.prompts
    if options.rate:
        for index in range(1, options.prompts):
            starts_s[index] = starts_s[index - 1] + dice.expovariate(options.rate)
    async with _target(options) as target:
        # The first steps compile and allocate; of a prompt that no other begins with.
        await target.generate(dice.choices(ids, k=options.input_tokens), max_new_tokens=WARM_UP_TOKENS, ignore_eos=True)
        places = asyncio.Semaphore(options.batch)
        started_s = time.perf_counter()

        async def run(prompt: Sequence[int], start_s: float) -> RequestTimes:
            await asyncio.sleep(max(0.0, started_s + start_s - time.perf_counter()))
            async with places:
                return await one_request(target, prompt, options.output_tokens)

        times = await side_by_side(list(map(run, prompts, starts_s)))
        return time.perf_counter() - started_s, times


async def one_request(target: Target, prompt: Sequence[int], output_tokens: int) -> RequestTimes:
    """Generate exactly so many tokens, greedily. Raises StartupError if it is refused, or fewer come."""
    times = RequestTimes()
    started_s = last_s = time.perf_counter()
    try:
        async for piece in target.generate(prompt, max_new_tokens=output_tokens, temperature=0, ignore_eos=True):
            now_s = time.perf_counter()
            if piece.tokens:
                if times.output_tokens:
                    times.gaps_s.append(now_s - last_s)
                else:
                    times.first_token_s = now_s - started_s
                times.output_tokens += len(piece.tokens)
                last_s = now_s
            if piece.completion:
                times.cached_tokens = piece.completion.cached_tokens
    except UserError as error:
        raise StartupError(error.message) from error
    times.total_s = time.perf_counter() - started_s
    if times.output_tokens != output_tokens:
        raise StartupError(
            f"a request ended after {times.output_tokens} of {output_tokens} tokens: input and output must fit the "
            "model's context"
        )
    return times


@contextlib.asynccontextmanager
async def _target(options: ThroughputBenchOptions) -> AsyncIterator[Target]:
    if options.url is not None:
        async with LeanClient(options.url) as client:
            yield client
        return
    settings = {name: getattr(options, name) for name in ENGINE_SETTINGS}
    async with AsyncLLM(options.model, **settings, rows_max=options.batch) as llm:
        yield llm


def summarise(options: ThroughputBenchOptions, duration_s: float, times: Sequence[RequestTimes]) -> Summary:
    """What all requests together come to."""
    inputs, outputs = options.input_tokens * len(times), sum(each.output_tokens for each in times)
    per_token = [
        (each.total_s - each.first_token_s) / (each.output_tokens - 1) for each in times if each.output_tokens > 1
    ]
    return Summary(
        duration_s=duration_s,
        requests=len(times),
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=sum(each.cached_tokens for each in times),
        requests_per_s=len(times) / duration_s,
        input_tokens_per_s=inputs / duration_s,
        output_tokens_per_s=outputs / duration_s,
        total_tokens_per_s=(inputs + outputs) / duration_s,
        ttft=Spread.of([each.first_token_s for each in times]),
        tpot=Spread.of(per_token),
        itl=Spread.of([gap for each in times for gap in each.gaps_s]),
        e2el=Spread.of([each.total_s for each in times]),
    )


def _show(options: ThroughputBenchOptions, summary: Summary) -> None:
    console = Console()
    load = f"{options.rate:g} requests/s" if options.rate else "all at once"
    where = options.url if options.url is not None else f"an engine in this process, model {options.model}"
    console.print(
        f"{summary.requests} requests of {options.input_tokens} + {options.output_tokens} tokens, {load}, at most "
        f"{options.batch} in flight; {where}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    rates = Table("", "total", "a second")
    for name, total, rate in (
        ("requests", summary.requests, summary.requests_per_s),
        ("input tokens", summary.input_tokens, summary.input_tokens_per_s),
        ("output tokens", summary.output_tokens, summary.output_tokens_per_s),
        ("all tokens", summary.input_tokens + summary.output_tokens, summary.total_tokens_per_s),
    ):
        rates.add_row(name, f"{total:,}", f"{rate:,.1f}")
    console.print(rates)
    spreads = Table("ms", "mean", "median", "p99")
    for name, spread in (("TTFT", summary.ttft), ("TPOT", summary.tpot), ("ITL", summary.itl), ("E2EL", summary.e2el)):
        if spread:
            spreads.add_row(name, f"{spread.mean_ms:,.1f}", f"{spread.median_ms:,.1f}", f"{spread.p99_ms:,.1f}")
    console.print(spreads)
    console.print(f"{summary.duration_s:.2f} s; {summary.cached_tokens:,} input tokens came from the cache")

"""`sessile bench sessions`: the latency of turns over HTTP, on any server with SGLang's native API.

Conversations run side by side. Each starts with `first_tokens` of prompt, gets `generated_tokens` of answer, and goes
on with turns that add `added_tokens`. They run twice: resending the whole history with every turn, and in streaming
sessions that are sent only what is new. The history grows, so beside mean and percentiles of all turns after the first
the table shows them early (head) and late (tail): a server that keeps its promise has them equal.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import uvloop
from rich.console import Console
from rich.table import Table

from sessile.bench.client import NativeServer, check_token_range, connected, percentile, side_by_side, write_report
from sessile.options import option

WARM_UP_CONVERSATIONS, WARM_UP_TOKENS, WARM_UP_TURNS = 2, 256, 2


@dataclass(frozen=True)
class SessionBenchOptions:
    """The workload and the server it is put to."""

    url: str = option("http://127.0.0.1:30000", "Server to measure; it must be running.")
    conversations: int = option(8, "Conversations that run side by side.", unit="conversations", low=1)
    turns: int = option(20, "Turns of each conversation, the first included.", unit="turns", low=2)
    first_tokens: int = option(512, "Prompt of the first turn.", unit="tokens", low=1)
    added_tokens: int = option(16, "What each later turn adds to the prompt.", unit="tokens", low=1)
    generated_tokens: int = option(16, "Output of every turn.", unit="tokens", low=1)
    mode: str = option(
        "both", "Resend the history, send only what is new in a session, or one after the other.",
        choices=("both", "resend", "session"),
    )
    lowest_id: int = option(1000, "Prompts are random token ids from here on.", low=0)
    highest_id: int = option(40_000, "Highest token id in prompts; it must be in the model's vocabulary.", low=1)
    seed: int = option(1, "Seed of the prompts; another one gives prompts that no cache has seen.", low=0)
    json: str | None = option(None, "Write every turn and the summary to this file as well.")


@dataclass(frozen=True, slots=True)
class TurnTimes:
    """One turn as its client saw it."""

    conversation: int
    turn: int
    first_token_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One run of the workload. Times in milliseconds but for run_s; of all turns but the first unless named so."""

    mode: str
    run_s: float
    first_turn_first_token_ms: float
    turn_ms_mean: float
    turn_ms_p50: float
    turn_ms_p99: float
    first_token_ms_mean: float
    first_token_ms_p50: float
    first_token_ms_p99: float
    head_ms: float
    """Mean of the first tenth of the later turns, at least one."""
    tail_ms: float
    """Mean of the last tenth."""
    last_prompt_tokens: int
    last_cached_tokens: int

    @classmethod
    def of(cls, mode: str, turns: int, times: Sequence[TurnTimes], run_s: float) -> "Summary":
        """From the times of all turns; turns: of each conversation."""
        first = [t.first_token_s for t in times if t.turn == 0]
        later = [t for t in times if t.turn > 0]
        total_ms = [t.total_s * 1e3 for t in later]
        first_token_ms = [t.first_token_s * 1e3 for t in later]
        tenth = max(1, turns // 10)
        last = max(later, key=lambda t: t.turn)
        return cls(
            mode=mode,
            run_s=run_s,
            first_turn_first_token_ms=statistics.mean(first) * 1e3,
            turn_ms_mean=statistics.mean(total_ms),
            turn_ms_p50=percentile(total_ms, 0.50),
            turn_ms_p99=percentile(total_ms, 0.99),
            first_token_ms_mean=statistics.mean(first_token_ms),
            first_token_ms_p50=percentile(first_token_ms, 0.50),
            first_token_ms_p99=percentile(first_token_ms, 0.99),
            head_ms=statistics.mean(t.total_s * 1e3 for t in later if t.turn <= tenth),
            tail_ms=statistics.mean(t.total_s * 1e3 for t in later if t.turn >= turns - tenth),
            last_prompt_tokens=last.prompt_tokens,
            last_cached_tokens=last.cached_tokens,
        )


def measure_sessions(options: SessionBenchOptions) -> int:
    """Run the workload, print a table; 0. Raises StartupError if the server cannot be reached or answers wrongly."""
    check_token_range(options.lowest_id, options.highest_id)
    console = Console()
    modes = ("resend", "session") if options.mode == "both" else (options.mode,)
    runs: dict[str, list[TurnTimes]] = {}
    summaries = []
    for mode in modes:
        with console.status(f"{mode}: {options.conversations} conversations of {options.turns} turns"):
            times, run_s = uvloop.run(_measure(options, mode))
        runs[mode] = times
        summaries.append(Summary.of(mode, options.turns, times, run_s))
    console.print(_table(options, summaries))
    if options.json:
        report = {
            "options": asdict(options),
            "summaries": [asdict(summary) for summary in summaries],
            "turns": {mode: [asdict(turn) for turn in times] for mode, times in runs.items()},
        }
        write_report(report, options.json)
    return 0


async def _measure(options: SessionBenchOptions, mode: str) -> tuple[list[TurnTimes], float]:
    """One run after a small one that warms the server; the times of all turns and the seconds of the run."""
    async with connected(options.url) as server:
        warm_up = [
            _Conversation(server, options, mode, index - WARM_UP_CONVERSATIONS)
            for index in range(min(WARM_UP_CONVERSATIONS, options.conversations))
        ]
        await _run_all(warm_up, min(WARM_UP_TOKENS, options.first_tokens), WARM_UP_TURNS)
        conversations = [_Conversation(server, options, mode, index) for index in range(options.conversations)]
        started_s = time.perf_counter()
        times = await _run_all(conversations, options.first_tokens, options.turns)
        return times, time.perf_counter() - started_s


async def _run_all(conversations: "Sequence[_Conversation]", first_tokens: int, turns: int) -> list[TurnTimes]:
    times = await side_by_side([conversation.run(first_tokens, turns) for conversation in conversations])
    return [turn for conversation in times for turn in conversation]


class _Conversation:
    """One client: its history, and where it is sent."""

    def __init__(self, server: NativeServer, options: SessionBenchOptions, mode: str, index: int) -> None:
        self._server = server
        self._options = options
        self._in_session = mode == "session"
        self._index = index
        # Other prompts in each mode: the second must not find those of the first in the server's prefix cache.
        self._random = random.Random(f"{options.seed} {mode} {index}")

    async def run(self, first_tokens: int, turns: int) -> list[TurnTimes]:
        """All turns, one after another."""
        session = await self._server.open_session() if self._in_session else None
        history: list[int] = []
        times = []
        for turn in range(turns):
            fresh = self._prompt(first_tokens if turn == 0 else self._options.added_tokens)
            history += fresh
            sent = fresh if session is not None else history
            answer = await self._server.generate(sent, self._options.generated_tokens, session)
            history += answer.tokens
            times.append(
                TurnTimes(
                    self._index, turn, answer.first_token_s, answer.total_s, answer.prompt_tokens, answer.cached_tokens
                )
            )
        if session is not None:
            await self._server.close_session(session)
        return times

    def _prompt(self, tokens: int) -> list[int]:
        low, high = self._options.lowest_id, self._options.highest_id
        return [self._random.randint(low, high) for _ in range(tokens)]


def _table(options: SessionBenchOptions, summaries: Sequence[Summary]) -> Table:
    """The summaries side by side."""
    table = Table(
        title=f"{options.conversations} conversations × {options.turns} turns: {options.first_tokens} tokens first, "
        f"{options.added_tokens} added, {options.generated_tokens} generated",
        caption="Milliseconds, of all turns but the first unless said otherwise.",
    )
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.mode, justify="right")
    rows = {
        "turn, mean": [f"{s.turn_ms_mean:.1f}" for s in summaries],
        "turn, p50": [f"{s.turn_ms_p50:.1f}" for s in summaries],
        "turn, p99": [f"{s.turn_ms_p99:.1f}" for s in summaries],
        "turn, first tenth (head)": [f"{s.head_ms:.1f}" for s in summaries],
        "turn, last tenth (tail)": [f"{s.tail_ms:.1f}" for s in summaries],
        "first token, mean": [f"{s.first_token_ms_mean:.1f}" for s in summaries],
        "first token, p50": [f"{s.first_token_ms_p50:.1f}" for s in summaries],
        "first token, p99": [f"{s.first_token_ms_p99:.1f}" for s in summaries],
        "first token of the first turn": [f"{s.first_turn_first_token_ms:.1f}" for s in summaries],
        "cached / prompt tokens, last turn": [f"{s.last_cached_tokens} / {s.last_prompt_tokens}" for s in summaries],
        "whole run, seconds": [f"{s.run_s:.2f}" for s in summaries],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table

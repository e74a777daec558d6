"""`sessile bench sessions`: the latency of turns over HTTP, on any server with SGLang's native API.

Conversations run side by side. Each starts with `first_tokens` of prompt, gets `generated_tokens` of answer, and goes
on with turns that add `added_tokens`. They run twice: resending the whole history with every turn, and in streaming
sessions that are sent only what is new. The history grows, so beside mean and percentiles of all turns after the first
the table shows them early (head) and late (tail): a server that keeps its promise has them equal.
"""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from sessile.errors import StartupError
from sessile.options import option

REQUEST_TIMEOUT_S = 600.0
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
    if options.highest_id <= options.lowest_id:
        raise StartupError(f"--highest-id must be above --lowest-id {options.lowest_id}; got {options.highest_id}")
    console = Console()
    modes = ("resend", "session") if options.mode == "both" else (options.mode,)
    runs: dict[str, list[TurnTimes]] = {}
    summaries = []
    for mode in modes:
        with console.status(f"{mode}: {options.conversations} conversations of {options.turns} turns"):
            times, run_s = asyncio.run(_measure(options, mode))
        runs[mode] = times
        summaries.append(Summary.of(mode, options.turns, times, run_s))
    console.print(_table(options, summaries))
    if options.json:
        report = {
            "options": asdict(options),
            "summaries": [asdict(summary) for summary in summaries],
            "turns": {mode: [asdict(turn) for turn in times] for mode, times in runs.items()},
        }
        try:
            Path(options.json).write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
        except OSError as error:
            raise StartupError(f"cannot write --json {options.json}: {error.strerror}. Give another path.") from error
    return 0


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed (nearest rank, no interpolation)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _measure(options: SessionBenchOptions, mode: str) -> tuple[list[TurnTimes], float]:
    """One run after a small one that warms the server; the times of all turns and the seconds of the run."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=10)
    async with httpx.AsyncClient(base_url=options.url, limits=limits, timeout=timeout, trust_env=False) as client:
        server = _Server(client, options.url)
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
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(conversation.run(first_tokens, turns)) for conversation in conversations]
    except* StartupError as failures:
        raise failures.exceptions[0] from None
    return [turn for task in tasks for turn in task.result()]


class _Conversation:
    """One client: its history, and where it is sent."""

    def __init__(self, server: "_Server", options: SessionBenchOptions, mode: str, index: int) -> None:
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
            output, first_token_s, total_s, meta = await self._server.generate(
                sent, self._options.generated_tokens, session
            )
            history += output
            times.append(
                TurnTimes(
                    self._index, turn, first_token_s, total_s, meta["prompt_tokens"], meta.get("cached_tokens") or 0
                )
            )
        if session is not None:
            await self._server.close_session(session)
        return times

    def _prompt(self, tokens: int) -> list[int]:
        low, high = self._options.lowest_id, self._options.highest_id
        return [self._random.randint(low, high) for _ in range(tokens)]


class _Server:
    """The three native calls that the workload needs. Raises StartupError naming the call that went wrong."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def open_session(self) -> str:
        session = await self._post("/open_session", {"capacity_of_str_len": 1_000_000, "streaming": True})
        if not isinstance(session, str):
            raise StartupError(f"{self._url}/open_session answered {session!r}, not a session id")
        return session

    async def close_session(self, session: str) -> None:
        await self._post("/close_session", {"session_id": session})

    async def generate(
        self, tokens: Sequence[int], generated: int, session: str | None
    ) -> tuple[list[int], float, float, dict[str, Any]]:
        """Generate exactly so many tokens; them, seconds to the first, seconds in all, and the last meta_info."""
        body: dict[str, Any] = {
            "input_ids": tokens,
            "stream": True,
            "sampling_params": {"max_new_tokens": generated, "temperature": 0, "ignore_eos": True},
        }
        if session is not None:
            body["session_params"] = {"id": session}
        output: list[int] = []
        first_token_s = 0.0
        meta: dict[str, Any] = {}
        started_s = time.perf_counter()
        async for event in self._events(body):
            ids, meta = event["output_ids"], event["meta_info"]
            # Cumulative ids by default; a server may be set to send only the new ones.
            output = ids if len(ids) == meta["completion_tokens"] else output + ids
            if output and not first_token_s:
                first_token_s = time.perf_counter() - started_s
        total_s = time.perf_counter() - started_s
        if len(output) != generated:
            reason = meta.get("finish_reason")
            raise StartupError(f"{self._url} generated {len(output)} tokens instead of {generated}: {reason}")
        return output, first_token_s, total_s, meta

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._client.stream("POST", "/generate", json=body) as reply:
                if reply.status_code != httpx.codes.OK:
                    raise self._failure("/generate", reply.status_code, await reply.aread())
                async for line in reply.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    content = line[5:].strip()
                    if content == "[DONE]":
                        return
                    event = orjson.loads(content)
                    if "error" in event:
                        raise self._failure("/generate", reply.status_code, content.encode())
                    yield event
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            reply = await self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if reply.status_code != httpx.codes.OK:
            raise self._failure(path, reply.status_code, reply.content)
        return orjson.loads(reply.content) if reply.content else None

    def _failure(self, path: str, status: int, content: bytes) -> StartupError:
        return StartupError(f"{self._url}{path} answered {status}: {content.decode(errors='replace')[:300]}")

    def _unreachable(self, error: httpx.TransportError) -> StartupError:
        reason = str(error) or type(error).__name__
        return StartupError(f"no server answers at {self._url} ({reason}). Start one with `sessile serve`.")


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

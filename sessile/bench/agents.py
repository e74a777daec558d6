"""`sessile bench agents`: agents with more KV than the pool holds, in sessions and by resending, on one server.

Each agent takes its planned turns (agent_plans.py) one after another; agents run side by side. They run twice, with a
flush before each: resending the whole conversation as a plain prompt with every turn, and in a streaming session that
is sent only what is new and forked for sub-agents. Prompts are the same both times. A session whose context is full is
rewound to its first prompt, or closed and opened again.

Every turn in a session says how long the client believes the history to be, so that a server which believes otherwise
refuses it; forks, rewinds and the whole history at the end are compared as well. What fails ends the run by its name.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import uvloop
from rich.console import Console
from rich.status import Status
from rich.table import Table

from sessile.bench.agent_clients import Agent, AgentTurn, InSession, Prompts, Resent
from sessile.bench.agent_plans import AgentPlan, AgentShape, plan_agent
from sessile.bench.client import (
    NativeServer,
    check_token_range,
    connected,
    percentile,
    side_by_side,
    write_report,
)
from sessile.errors import StartupError
from sessile.options import option

LINE_EVERY_S = 10.0
"""How often a run that nobody watches on a terminal says how far it is."""
WARM_UP_TOKENS, WARM_UP_GENERATED_TOKENS = 256, 8
TABLE_COLUMNS = 80


@dataclass(frozen=True)
class AgentBenchOptions(AgentShape):
    """The agents and the server they are put to."""

    url: str = option("http://127.0.0.1:30000", "Server to measure; it must be running.")
    mode: str = option(
        "both", "Resend the conversation, send only what is new in a session, or one after the other.",
        choices=("both", "resend", "session"),
    )
    context_tokens: int | None = option(
        None, "Context that the agents fill; default: all that model and pool allow.", unit="tokens", low=64
    )
    pause_scale: float = option(1.0, "Factor on all pauses, to run faster or slower than agents do.", low=0, high=100)
    context_full: str = option(
        "rewind", "What a session does whose context is full: go back to its first prompt, or close and open again.",
        choices=("rewind", "reopen"),
    )
    require_equal: str = option(
        "off", "Fail if a session says anything else than the resent conversation; expect that in float32 only.",
        choices=("on", "off"),
    )
    lowest_id: int = option(1000, "Prompts are random token ids from here on.", low=0)
    highest_id: int = option(40_000, "Highest token id in prompts; it must be in the model's vocabulary.", low=1)
    json: str | None = option(None, "Write every turn and the summary to this file as well.")


@dataclass(frozen=True, slots=True)
class AgentSummary:
    """One run of all agents. Times in milliseconds but for run_s; of all turns, those of sub-agents included."""

    mode: str
    run_s: float
    turns: int
    turns_per_s: float
    first_token_ms_p50: float
    first_token_ms_p99: float
    turn_ms_p50: float
    turn_ms_p99: float
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    """Prompt tokens that were not cached, and those of preempted requests once more."""
    computed_again_tokens: int
    """Of these, what had been computed for the same agent before."""
    preemptions: int
    generated_tokens: int

    @classmethod
    def of(cls, mode: str, turns: Sequence[AgentTurn], run_s: float, totals: "ServerTotals") -> "AgentSummary":
        """From all turns, and what the server counted during the run."""
        first_token_ms = [turn.first_token_s * 1e3 for turn in turns]
        turn_ms = [turn.total_s * 1e3 for turn in turns]
        prompt, cached = sum(t.prompt_tokens for t in turns), sum(t.cached_tokens for t in turns)
        computed = prompt - cached + totals.recomputed_tokens
        return cls(
            mode=mode,
            run_s=run_s,
            turns=len(turns),
            turns_per_s=len(turns) / run_s,
            first_token_ms_p50=percentile(first_token_ms, 0.50),
            first_token_ms_p99=percentile(first_token_ms, 0.99),
            turn_ms_p50=percentile(turn_ms, 0.50),
            turn_ms_p99=percentile(turn_ms, 0.99),
            prompt_tokens=prompt,
            cached_tokens=cached,
            computed_tokens=computed,
            computed_again_tokens=computed - sum(t.fresh_tokens for t in turns),
            preemptions=totals.preemptions,
            generated_tokens=sum(len(t.output) for t in turns),
        )


@dataclass(frozen=True, slots=True)
class ServerTotals:
    """What the server counts and no client sees."""

    preemptions: int
    recomputed_tokens: int

    @classmethod
    async def read(cls, server: NativeServer) -> "ServerTotals":
        """The totals of this moment. Raises StartupError if the server is not one of ours."""
        totals = await server.totals()
        names = ("sessile_preemptions_total", "sessile_recomputed_tokens_total")
        if missing := [name for name in names if name not in totals]:
            raise StartupError(f"/metrics of the server has no {missing[0]}: this bench needs a Sessile server")
        return cls(*(int(totals[name]) for name in names))

    def since(self, earlier: "ServerTotals") -> "ServerTotals":
        """What was counted since then."""
        return ServerTotals(
            self.preemptions - earlier.preemptions, self.recomputed_tokens - earlier.recomputed_tokens
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a whole bench found."""

    plans: Sequence[AgentPlan]
    pool_tokens: int
    summaries: list[AgentSummary]
    turns: dict[str, list[AgentTurn]]
    """By mode."""

    @property
    def pools(self) -> float:
        """KV of the longest history of every agent, counted in whole pools."""
        return sum(plan.tokens_max for plan in self.plans) / self.pool_tokens

    def different(self) -> list[str]:
        """Places of the turns whose output in a session is not the resent one's; empty for a single run."""
        said = [{turn.place: turn.output for turn in turns} for turns in self.turns.values()]
        return [place for place in said[0] if any(other[place] != said[0][place] for other in said[1:])]


def measure_agents(options: AgentBenchOptions) -> int:
    """Run the agents, print a table; 1 if outputs differ that must be equal, else 0. Raises StartupError."""
    check_token_range(options.lowest_id, options.highest_id)
    if options.pause_high_s < options.pause_low_s:
        raise StartupError(f"--pause-high-s must be at least --pause-low-s, {options.pause_low_s:g} s")
    if options.require_equal == "on" and options.mode != "both":
        raise StartupError("--require-equal on compares both runs: leave --mode both")
    console = Console()
    outcome = uvloop.run(_measure(options, console))
    console.print(_table(options, outcome))
    if options.json:
        turns = {mode: [asdict(turn) for turn in turns] for mode, turns in outcome.turns.items()}
        summaries = [asdict(summary) for summary in outcome.summaries]
        write_report({"options": asdict(options), "summaries": summaries, "turns": turns}, options.json)
    different = outcome.different()
    if different and options.require_equal == "on":
        console.print(f"{len(different)} turns differ, first at {different[0]}")
        return 1
    return 0


async def _measure(options: AgentBenchOptions, console: Console) -> Outcome:
    modes = ("resend", "session") if options.mode == "both" else (options.mode,)
    async with connected(options.url) as server:
        context_tokens, pool_tokens = await _scale(server, options)
        plans = [plan_agent(options, context_tokens, index) for index in range(options.sessions)]
        outcome = Outcome(plans, pool_tokens, [], {})
        await _warm_up(server, options, context_tokens)
        for mode in modes:
            await server.flush_cache()
            before = await ServerTotals.read(server)
            with _Progress(console, mode, sum(plan.turn_count for plan in plans)) as progress:
                turns, run_s = await _run(server, options, mode, plans, progress)
            totals = (await ServerTotals.read(server)).since(before)
            outcome.turns[mode] = turns
            outcome.summaries.append(AgentSummary.of(mode, turns, run_s, totals))
    return outcome


async def _scale(server: NativeServer, options: AgentBenchOptions) -> tuple[int, int]:
    """Tokens of the context that the agents fill, and of the pool. Raises StartupError if the server holds less."""
    pool = await server.pool()
    pool_tokens = (pool["pages"]["total"] - pool["pages"]["scratch"]) * pool["page_tokens"]
    limit_tokens = min((await server.model())["context_length"], pool_tokens)
    if options.context_tokens is not None and options.context_tokens > limit_tokens:
        raise StartupError(f"--context-tokens {options.context_tokens}: the server holds only {limit_tokens} tokens")
    return options.context_tokens or limit_tokens, pool_tokens


async def _warm_up(server: NativeServer, options: AgentBenchOptions, context_tokens: int) -> None:
    """Two requests, so that no run pays for what a server does once."""
    prompts = Prompts(options.seed, options.lowest_id, options.highest_id)
    tokens = min(WARM_UP_TOKENS, context_tokens - WARM_UP_GENERATED_TOKENS)
    for number in range(2):
        await server.generate(prompts.at(f"warm-up {number}", tokens), WARM_UP_GENERATED_TOKENS, None)


async def _run(
    server: NativeServer, options: AgentBenchOptions, mode: str, plans: Sequence[AgentPlan], progress: "_Progress"
) -> tuple[list[AgentTurn], float]:
    """All agents in one mode: their turns, and the seconds these took. All sessions stay open until the last turn."""
    prompts = Prompts(options.seed, options.lowest_id, options.highest_id)
    reopens = options.context_full == "reopen"
    started_s = time.perf_counter()
    agents = [
        Agent(
            plan,
            await InSession.open(server, reopens=reopens) if mode == "session" else Resent(server),
            prompts,
            options.pause_scale,
            progress.count,
        )
        for plan in plans
    ]
    turns = await side_by_side([agent.run() for agent in agents])
    run_s = time.perf_counter() - started_s
    await side_by_side([agent.close() for agent in agents])
    return [turn for agent in turns for turn in agent], run_s


class _Progress:
    """Shows how many turns are done: in place on a terminal, else as a line now and then."""

    def __init__(self, console: Console, mode: str, turns: int) -> None:
        self._console = console
        self._mode = mode
        self._turns = turns
        self._done = 0
        self._status: Status | None = None
        self._next_line_s = time.monotonic() + LINE_EVERY_S

    def count(self) -> None:
        """One more turn is done."""
        self._done += 1
        text = f"{self._mode}: {self._done} of {self._turns} turns"
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self._console.print(text)

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            self._status = self._console.status(f"{self._mode}: {self._turns} turns")
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()


def _table(options: AgentBenchOptions, outcome: Outcome) -> Table:
    """The summaries side by side, in 80 columns."""
    summaries = outcome.summaries
    starts_over = sum(turn.starts_over for plan in outcome.plans for turn in plan.turns)
    sub_agents = sum(1 for plan in outcome.plans for _ in plan.sub_agents())
    table = Table(
        title=f"{options.sessions} agents, {sub_agents} sub-agents, KV of {outcome.pools:.1f} pools",
        caption=f"Prompt tokens count the whole context of each turn. {starts_over} times the context was full"
        f" (--context-full {options.context_full}).",
        width=min(TABLE_COLUMNS, 46 + 16 * len(summaries)),
    )
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.mode, justify="right")
    rows = {
        "turns": [f"{s.turns:,}" for s in summaries],
        "turns/s": [f"{s.turns_per_s:.2f}" for s in summaries],
        "time to first token, p50, ms": [f"{s.first_token_ms_p50:,.1f}" for s in summaries],
        "time to first token, p99, ms": [f"{s.first_token_ms_p99:,.1f}" for s in summaries],
        "turn, p50, ms": [f"{s.turn_ms_p50:,.1f}" for s in summaries],
        "turn, p99, ms": [f"{s.turn_ms_p99:,.1f}" for s in summaries],
        "prompt tokens": [f"{s.prompt_tokens:,}" for s in summaries],
        "cached": [f"{s.cached_tokens:,}" for s in summaries],
        "computed": [f"{s.computed_tokens:,}" for s in summaries],
        "computed again": [f"{s.computed_again_tokens:,}" for s in summaries],
        "generated tokens": [f"{s.generated_tokens:,}" for s in summaries],
        "preemptions": [f"{s.preemptions:,}" for s in summaries],
        "whole run, seconds": [f"{s.run_s:.2f}" for s in summaries],
    }
    if len(summaries) > 1:
        same = summaries[0].turns - len(outcome.different())
        rows["turns with the same output"] = ["", f"{same:,}"]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table

"""What the agents of `sessile bench agents` do, planned ahead from a seed: turns, pauses, sub-agents, full contexts.

The shape is the one reported for coding agents: many turns (a median of 43), a long first prompt, tool results of very
different length, short outputs, pauses while a tool runs, sub-agents that begin with the parent's context. All lengths
scale with the model's context. Outputs have a planned length too, so a plan knows where the context is full.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from sessile.options import option

FIRST_SIGMA, OUTPUT_SIGMA = 0.3, 0.6
FIRST_SHARE_MAX, TOOL_SHARE_MAX, OUTPUT_SHARE_MAX = 1 / 2, 1 / 4, 1 / 8
"""Of the context: together less than all of it, so that a turn always fits behind the first prompt."""
TURNS_MAX_MEDIANS = 4
SUB_AGENT_TURNS_MAX = 5


@dataclass(frozen=True)
class AgentShape:
    """What agents are like."""

    sessions: int = option(20, "Agents that run side by side, each in a session of its own.", unit="sessions", low=1)
    turns_median: int = option(43, "Median of turns a session.", unit="turns", low=1)
    turns_sigma: float = option(
        0.6, "Spread of the number of turns (log-normal, at most four medians); 0: all have the median.", low=0, high=3
    )
    first_share: float = option(0.25, "Median of the first prompt, as a share of the context.", low=0.001, high=0.5)
    tool_share: float = option(0.01, "Median of a tool result, as a share of the context.", low=0.0001, high=0.25)
    tool_sigma: float = option(
        1.2, "Spread of tool results (log-normal, at most a quarter of the context).", low=0, high=3
    )
    generated_tokens: int = option(32, "Median of outputs.", unit="tokens", low=1)
    pause_low_s: float = option(0.1, "Shortest pause for a tool before the next turn.", unit="seconds", low=0.001)
    pause_high_s: float = option(
        10.0, "Longest such pause; between them log-uniform.", unit="seconds", low=0.001, high=3600
    )
    sub_agent_share: float = option(
        0.05, "Share of turns after which a sub-agent is forked, takes 1 to 5 turns and is closed.", low=0, high=1
    )
    seed: int = option(1, "Seed of plans and prompts.", low=0)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an agent."""

    added_tokens: int
    generated_tokens: int
    pause_s: float
    """Before the turn, while a tool runs; 0.0 before the first."""
    starts_over: bool = False
    """The context was full: before this turn the history is cut to the first prompt."""
    sub_agents: tuple[tuple["Turn", ...], ...] = ()
    """Forked when the turn is done; the parent's next turn waits for them."""


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """The turns of one agent. tokens_max: the longest history it reaches, sub-agents aside."""

    index: int
    turns: tuple[Turn, ...]
    tokens_max: int

    @property
    def first_tokens(self) -> int:
        """Tokens of the first prompt."""
        return self.turns[0].added_tokens

    @property
    def turn_count(self) -> int:
        """Turns, those of sub-agents included."""
        return len(self.turns) + sum(len(sub_agent) for sub_agent in self.sub_agents())

    def sub_agents(self) -> Iterator[tuple[Turn, ...]]:
        """All sub-agents of this agent."""
        for turn in self.turns:
            yield from turn.sub_agents


def plan_agent(shape: AgentShape, context_tokens: int, index: int) -> AgentPlan:
    """The plan of one agent: the same for the same shape, context and index."""
    dice = _Dice(shape, context_tokens, random.Random(f"{shape.seed} plan {index}"))
    turns = [Turn(dice.first_tokens(), dice.output_tokens(), 0.0)]
    first_tokens = turns[0].added_tokens
    history_tokens = longest_tokens = first_tokens + turns[0].generated_tokens
    for _ in range(dice.turn_count() - 1):
        added, generated, pause_s = dice.tool_tokens(), dice.output_tokens(), dice.pause_s()
        starts_over = history_tokens + added + generated > context_tokens
        history_tokens = (first_tokens if starts_over else history_tokens) + added + generated
        longest_tokens = max(longest_tokens, history_tokens)
        sub_agents = dice.sub_agents(history_tokens)
        turns.append(Turn(added, generated, pause_s, starts_over, sub_agents))
    return AgentPlan(index, tuple(turns), longest_tokens)


class _Dice:
    """Draws what varies, within what the context allows."""

    def __init__(self, shape: AgentShape, context_tokens: int, dice: random.Random) -> None:
        self._shape = shape
        self._context_tokens = context_tokens
        self._random = dice

    def turn_count(self) -> int:
        median = self._shape.turns_median
        return self._log_normal(median, self._shape.turns_sigma, TURNS_MAX_MEDIANS * median)

    def first_tokens(self) -> int:
        return self._of_context(self._shape.first_share, FIRST_SIGMA, FIRST_SHARE_MAX)

    def tool_tokens(self) -> int:
        return self._of_context(self._shape.tool_share, self._shape.tool_sigma, TOOL_SHARE_MAX)

    def output_tokens(self) -> int:
        cap = max(1, int(OUTPUT_SHARE_MAX * self._context_tokens))
        return self._log_normal(self._shape.generated_tokens, OUTPUT_SIGMA, cap)

    def pause_s(self) -> float:
        low, high = math.log(self._shape.pause_low_s), math.log(self._shape.pause_high_s)
        return math.exp(self._random.uniform(low, high))

    def sub_agents(self, history_tokens: int) -> tuple[tuple[Turn, ...], ...]:
        """None or one, cut where its context is full."""
        if self._random.random() >= self._shape.sub_agent_share:
            return ()
        turns: list[Turn] = []
        for _ in range(self._random.randint(1, SUB_AGENT_TURNS_MAX)):
            turn = Turn(self.tool_tokens(), self.output_tokens(), self.pause_s() if turns else 0.0)
            history_tokens += turn.added_tokens + turn.generated_tokens
            if history_tokens > self._context_tokens:
                break
            turns.append(turn)
        return (tuple(turns),) if turns else ()

    def _of_context(self, share: float, sigma: float, share_max: float) -> int:
        context_tokens = self._context_tokens
        return self._log_normal(share * context_tokens, sigma, max(1, int(share_max * context_tokens)))

    def _log_normal(self, median: float, sigma: float, high: int) -> int:
        """A whole number from 1 to high."""
        return min(high, max(1, round(median * math.exp(sigma * self._random.gauss()))))

"""The clients of `sessile bench agents`: a conversation that is resent or kept in a session, and who leads it."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from sessile.bench.agent_plans import AgentPlan, Turn
from sessile.bench.client import Generated, NativeServer, side_by_side
from sessile.errors import StartupError


@dataclass(frozen=True, slots=True)
class AgentTurn:
    """One turn as its client saw it."""

    place: str
    """"agent 3, turn 7", or "agent 3, sub-agent after turn 7, turn 0"."""
    first_token_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    fresh_tokens: int
    """Of the prompt, what nobody computed before: what the turn added, and the last token of the history."""
    output: tuple[int, ...]


class Conversation(Protocol):
    """A history of tokens that a server continues."""

    async def say(self, added: Sequence[int], generated: int) -> Generated:
        """Add to the history, let the server continue it."""
        ...

    async def start_over(self, tokens: int) -> None:
        """Go back to the first tokens of the history."""
        ...

    async def fork(self) -> Self:
        """Another conversation with the same history."""
        ...

    async def close(self) -> None:
        """Check the history where the server has one, and end the conversation."""
        ...


class Resent:
    """A conversation that only its client knows; the server gets all of it with every turn."""

    def __init__(self, server: NativeServer, history: Sequence[int] = ()) -> None:
        self._server = server
        self._history = list(history)

    async def say(self, added: Sequence[int], generated: int) -> Generated:
        """See Conversation."""
        self._history += added
        answer = await self._server.generate(self._history, generated, None)
        self._history += answer.tokens
        return answer

    async def start_over(self, tokens: int) -> None:
        """See Conversation."""
        del self._history[tokens:]

    async def fork(self) -> "Resent":
        """See Conversation."""
        return Resent(self._server, self._history)

    async def close(self) -> None:
        """See Conversation: the server knows nothing of it."""


class InSession:
    """A conversation in a streaming session. Whatever the server says of its history is compared with ours."""

    def __init__(self, server: NativeServer, session: str, history: Sequence[int] = (), *, reopens: bool) -> None:
        """reopens: start over in a new session rather than by a rewind. The session is ours to close."""
        self._server = server
        self._session = session
        self._history = list(history)
        self._reopens = reopens
        self._unsent = 0  # How much of the history's end a new session has not been told.

    @classmethod
    async def open(cls, server: NativeServer, *, reopens: bool) -> "InSession":
        """In a session of its own."""
        return cls(server, await server.open_session(), reopens=reopens)

    async def say(self, added: Sequence[int], generated: int) -> Generated:
        """See Conversation."""
        known = len(self._history) - self._unsent
        self._history += added
        answer = await self._server.generate(self._history[known:], generated, self._session, expect_tokens=known)
        self._expect("the turn's prompt", answer.prompt_tokens, len(self._history))
        self._unsent = 0
        self._history += answer.tokens
        self._expect("the session after the turn", answer.session_tokens, len(self._history))
        return answer

    async def start_over(self, tokens: int) -> None:
        """See Conversation."""
        del self._history[tokens:]
        if self._reopens:
            await self._server.close_session(self._session)
            self._session = await self._server.open_session()
            self._unsent = tokens
        else:
            await self._server.rewind_session(self._session, tokens)
            self._expect("the rewound session", await self._server.session_length(self._session), tokens)

    async def fork(self) -> "InSession":
        """See Conversation."""
        child = InSession(
            self._server, await self._server.fork_session(self._session), self._history, reopens=self._reopens
        )
        child._expect("the fork", await self._server.session_length(child._session), len(self._history))
        return child

    async def close(self) -> None:
        """See Conversation: the whole history is compared, token by token."""
        tokens = await self._server.session_tokens(self._session)
        if tokens != self._history:
            raise StartupError(f"session {self._session} has another history of {len(tokens)} tokens than its client")
        await self._server.close_session(self._session)

    def _expect(self, what: str, found: int | None, expected: int) -> None:
        if found != expected:
            raise StartupError(f"{what} has {found} tokens, not {expected} (session {self._session})")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where the token ids of prompts come from: the same place, the same ids."""

    seed: int
    lowest_id: int
    highest_id: int

    def at(self, place: str, tokens: int) -> list[int]:
        """So many random ids."""
        ids = range(self.lowest_id, self.highest_id + 1)
        return random.Random(f"{self.seed} prompt {place}").choices(ids, k=tokens)


class Agent:
    """Leads one conversation, and those of its sub-agents, by a plan."""

    def __init__(
        self, plan: AgentPlan, conversation: Conversation, prompts: Prompts, pause_scale: float,
        count_turn: Callable[[], None],
    ) -> None:  # fmt: skip
        """count_turn: called after every turn, those of sub-agents included."""
        self._plan = plan
        self._conversation = conversation
        self._prompts = prompts
        self._pause_scale = pause_scale
        self._count_turn = count_turn
        self._turns: list[AgentTurn] = []

    async def run(self) -> list[AgentTurn]:
        """All turns, one after another; the conversation stays open. Raises StartupError naming the failed turn."""
        history_tokens = 0
        for number, turn in enumerate(self._plan.turns):
            place = f"agent {self._plan.index}, turn {number}"
            with _told(place):
                if turn.starts_over:
                    await self._conversation.start_over(self._plan.first_tokens)
                    history_tokens = self._plan.first_tokens
                await self._take(turn, place, self._conversation, history_tokens)
                history_tokens += turn.added_tokens + turn.generated_tokens
            forked = [self._run_sub_agent(number, turns, history_tokens) for turns in turn.sub_agents]
            await side_by_side(forked)
        return self._turns

    async def close(self) -> None:
        """End the conversation."""
        with _told(f"agent {self._plan.index}, at its end"):
            await self._conversation.close()

    async def _run_sub_agent(self, after: int, turns: Sequence[Turn], history_tokens: int) -> None:
        name = f"agent {self._plan.index}, sub-agent after turn {after}"
        with _told(name):
            conversation = await self._conversation.fork()
            for number, turn in enumerate(turns):
                await self._take(turn, f"{name}, turn {number}", conversation, history_tokens)
                history_tokens += turn.added_tokens + turn.generated_tokens
            await conversation.close()

    async def _take(self, turn: Turn, place: str, conversation: Conversation, history_tokens: int) -> None:
        await asyncio.sleep(turn.pause_s * self._pause_scale)
        answer = await conversation.say(self._prompts.at(place, turn.added_tokens), turn.generated_tokens)
        self._turns.append(
            AgentTurn(
                place=place,
                first_token_s=answer.first_token_s,
                total_s=answer.total_s,
                prompt_tokens=answer.prompt_tokens,
                cached_tokens=answer.cached_tokens,
                # The last token of a history was sampled and has had no KV so far.
                fresh_tokens=turn.added_tokens + (history_tokens > 0),
                output=tuple(answer.tokens),
            )
        )
        self._count_turn()


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    """Say where it was that something failed, once."""
    try:
        yield
    except StartupError as error:
        raise error if str(error).startswith("agent ") else StartupError(f"{place}: {error}") from error

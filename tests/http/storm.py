"""Clients that use one server all at once, each of which knows what it must be told.

Whatever answer is complete goes to the journal: the tokens that the model saw, and what it said. Nothing here says
what would be right; that is for whoever reads the journal. What a client must be told at once (a refusal, a history
that is as long as it believes, a text that was aborted) it checks itself.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

ENDLESS = 1500
"""Output of a turn that is not meant to reach its end: many times longer than it takes to end it."""
PATIENCE_S = 20.0
LONG = 120
"""Output of a turn that reaches its end, most often after something else has come in between."""
OUTPUT_TOKENS = 8
ROUNDS = 5
"""Turns of a steady conversation; the others are of the same order."""
TRIES = 20
"""Of what must come while a turn runs: on a busy machine it may come too late, and is sent again with the next turn."""
PREFIXES = 3
LOWEST_ID, HIGHEST_ID = 3, 250


@dataclass(frozen=True)
class Answer:
    """One finished request. warm_tokens: how many tokens must have been cached; None if nobody can say.

    drafts: (offered, accepted), as the answer told.
    """

    client: str
    prompt: list[int]
    output: list[int]
    cached_tokens: int
    warm_tokens: int | None = None
    drafts: tuple[int, int] = (0, 0)


@dataclass
class Journal:
    """What all clients saw."""

    answers: list[Answer] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    """Of all replies."""
    torn: int = 0
    """Turns that were ended in the middle."""
    refused: int = 0
    """Turns, forks and rewinds that were refused because a turn ran."""
    deferred: int = 0
    """Sessions that were closed while their turn ran."""


class Client:
    """Calls a server and knows what the replies look like."""

    def __init__(self, http: httpx.AsyncClient, journal: Journal, page_size: int) -> None:
        self.http = http
        self.journal = journal
        self.page_size = page_size
        http.event_hooks["response"] = [self._note_status]

    async def post(self, path: str, body: dict[str, Any], *, expected: int = 200) -> Any:
        """The reply's JSON. Fails if the status is another than expected."""
        reply = await self.http.post(path, json=body)
        assert reply.status_code == expected, f"{path}: {reply.status_code} {reply.text}"
        return reply.json() if reply.content else None

    async def get(self, path: str) -> Any:
        reply = await self.http.get(path)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text}"
        return reply.json()

    @contextlib.asynccontextmanager
    async def streaming(self, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of a stream; leaving early closes the connection."""
        delta = body | {"stream": True, "stream_output": "delta"}
        async with self.http.stream("POST", "/generate", json=delta) as reply:
            assert reply.status_code == 200, (await reply.aread()).decode()
            yield events_of(reply)

    async def generate(self, body: dict[str, Any], *, stream: bool) -> tuple[list[int], dict[str, Any]]:
        """(output tokens, meta_info) of a request that runs to its end."""
        if not stream:
            whole = await self.post("/generate", body)
            return whole["output_ids"], whole["meta_info"]
        async with self.streaming(body) as events:
            return await read_to_end(events)

    async def ask(self, client: str, prompt: list[int], output_tokens: int, *, stream: bool, **fields: object) -> None:
        """A plain request. fields: of its body, besides."""
        output, meta = await self.generate(request_for(prompt, output_tokens) | fields, stream=stream)
        check_end(output, meta, output_tokens)
        assert meta["prompt_tokens"] == len(prompt)
        self.journal.answers.append(Answer(client, prompt, output, meta["cached_tokens"], drafts=drafts_of(meta)))

    async def abort(self, rid: str) -> None:
        await self.post("/abort_request", {"rid": rid})

    async def figures(self) -> dict[str, Any]:
        """The engine's live figures and totals."""
        figures: dict[str, Any] = (await self.get("/get_server_info"))["internal_states"][0]
        return figures

    async def _note_status(self, reply: httpx.Response) -> None:
        self.journal.statuses.add(reply.status_code)


def drafts_of(meta: dict[str, Any]) -> tuple[int, int]:
    """(offered, accepted) of a finished request; nothing where the server looks up none."""
    return meta.get("spec_draft_token_num", 0), meta.get("spec_accept_token_num", 0)


class Conversation:
    """A streaming session as its client knows it. Every turn says how long the history must be."""

    def __init__(self, client: Client, name: str, history: list[int] | None = None, warm: int | None = None) -> None:
        self.client = client
        self.name = name
        self.history = history or []
        self.warm_tokens = warm or None
        """KV tokens that the next turn must find; None while nobody can say: it may find what others have computed."""
        self._dice = random.Random(name)

    @classmethod
    async def opened(cls, client: Client, name: str) -> "Conversation":
        body = {"capacity_of_str_len": 0, "streaming": True, "session_id": name}
        assert await client.post("/open_session", body) == name
        return cls(client, name)

    def tokens(self, count: int) -> list[int]:
        return [self._dice.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count)]

    def body(self, tokens: list[int], output_tokens: int, rid: str | None = None) -> dict[str, Any]:
        session = {"session_params": {"id": self.name, "expect_tokens": len(self.history)}}
        return request_for(tokens, output_tokens) | session | ({} if rid is None else {"rid": rid})

    async def turn(self, new_tokens: int, output_tokens: int = OUTPUT_TOKENS, *, stream: bool = False) -> None:
        """A turn that runs to its end and becomes history."""
        tokens = self.tokens(new_tokens)
        output, meta = await self.client.generate(self.body(tokens, output_tokens), stream=stream)
        self.commit(tokens, output, meta, output_tokens)

    def commit(self, tokens: list[int], output: list[int], meta: dict[str, Any], output_tokens: int) -> None:
        """Take a finished turn into the history."""
        check_end(output, meta, output_tokens)
        prompt = self.history + tokens
        self.history = prompt + output
        assert (meta["prompt_tokens"], meta["session_tokens"]) == (len(prompt), len(self.history))
        self.client.journal.answers.append(
            Answer(self.name, prompt, output, meta["cached_tokens"], self.warm_tokens, drafts_of(meta))
        )
        self.warm_tokens = len(self.history) - 1

    async def append(self, new_tokens: int) -> None:
        """Compute tokens now, generate later."""
        tokens = self.tokens(new_tokens)
        body = {"input_ids": tokens, "expect_tokens": len(self.history)}
        reply = await self.client.post(f"/v1/sessions/{self.name}/append", body)
        self.history = self.history + tokens
        assert (reply["tokens"], reply["appended_tokens"]) == (len(self.history), new_tokens)
        self.warm_tokens = len(self.history) - 1

    async def fork(self, name: str, tokens: int, place: dict[str, int]) -> "Conversation":
        """A session that begins with the first `tokens` tokens of this one, which is where `place` must be."""
        view = await self.client.post(f"/v1/sessions/{self.name}/fork", {"id": name, **place})
        self._check_place(view, tokens)
        return Conversation(self.client, name, self.history[:tokens], view["kv_tokens"])

    async def rewind(self, tokens: int, place: dict[str, int]) -> None:
        """Forget what lies behind the first `tokens` tokens, which is where `place` must be."""
        view = await self.client.post(f"/v1/sessions/{self.name}/rewind", place)
        self._check_place(view, tokens)
        self.history, self.warm_tokens = self.history[:tokens], view["kv_tokens"] or None

    async def close(self) -> bool:
        """Close the session; whether that was deferred to the end of a turn that runs."""
        reply = await self.client.http.delete(f"/v1/sessions/{self.name}")
        assert reply.status_code == 200, reply.text
        return bool(reply.json()["deferred"])

    async def phase(self) -> str:
        return str((await self.client.get(f"/v1/sessions/{self.name}"))["phase"])

    async def check_history(self) -> None:
        """The server's history is the one that its client believes in."""
        assert (await self.client.get(f"/v1/sessions/{self.name}/tokens"))["tokens"] == self.history

    def _check_place(self, view: dict[str, Any], tokens: int) -> None:
        """Less than a page may be recomputed, as the session may still drain."""
        size, most = self.client.page_size, max(0, tokens - 1)
        least = most // size * size
        assert view["tokens"] == tokens and least <= view["kv_tokens"] <= most, view


# -- what single clients do -------------------------------------------------------------------------------------------


async def talk(client: Client, name: str) -> Conversation:
    """A steady conversation: short and long turns, streamed and whole; at the end one without input."""
    conversation = await Conversation.opened(client, name)
    dice = random.Random(name)
    for turn in range(ROUNDS):
        await conversation.turn(dice.choice((1, 5, 17, 40)), dice.randrange(4, 16), stream=turn % 2 == 0)
    await conversation.turn(0)
    return conversation


async def ask(client: Client, name: str) -> None:
    """Plain requests, half of them with a beginning that others share."""
    dice = random.Random(name)
    for number in range(ROUNDS):
        prefix = random.Random(dice.randrange(PREFIXES)).choices(range(LOWEST_ID, HIGHEST_ID), k=40 * (number % 2))
        prompt = prefix + dice.choices(range(LOWEST_ID, HIGHEST_ID), k=dice.randrange(1, 70))
        await client.ask(name, prompt, dice.randrange(4, 16), stream=number % 2 == 0)


async def tear(client: Client, name: str) -> Conversation:
    """Turns that end in the middle in every way there is, from the first on; a good one after each."""
    conversation = await Conversation.opened(client, name)
    for number, end in enumerate((leave_stream, abort_stream, leave_whole, abort_whole)):
        await end(conversation, f"{name}-torn-{number}")
        client.journal.torn += 1
        await until_idle(conversation)
        await conversation.turn(6, stream=number % 2 == 0)
    await leave_stream(conversation, f"{name}-torn-last")
    await until_idle(conversation)
    return conversation


async def leave_stream(conversation: Conversation, rid: str) -> None:
    """The client closes the connection after the first tokens."""
    async with conversation.client.streaming(conversation.body(conversation.tokens(30), ENDLESS, rid)) as events:
        assert (await anext(events))["output_ids"]


async def abort_stream(conversation: Conversation, rid: str) -> None:
    """An operator ends the request after its first tokens."""
    async with conversation.client.streaming(conversation.body(conversation.tokens(30), ENDLESS, rid)) as events:
        first = (await anext(events))["output_ids"]
        await conversation.client.abort(rid)
        output, meta = await read_to_end(events)
    assert meta["finish_reason"]["type"] == "abort"
    assert 0 < len(first + output) == meta["completion_tokens"] < ENDLESS


async def leave_whole(conversation: Conversation, rid: str) -> None:
    """The client of a reply that is not streamed closes the connection once its turn waits or runs."""
    body = conversation.body(conversation.tokens(30), ENDLESS, rid)
    reply = asyncio.create_task(conversation.client.post("/generate", body))
    while (await conversation.phase()) == "idle":
        assert not reply.done(), reply.result()
    reply.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reply


async def abort_whole(conversation: Conversation, rid: str) -> None:
    """An operator ends the request as soon as it is there, most often while it waits."""
    body = conversation.body(conversation.tokens(30), ENDLESS, rid)
    reply = asyncio.create_task(conversation.client.post("/generate", body))
    while not reply.done():
        await conversation.client.abort(rid)
        await asyncio.sleep(0.005)
    meta = (await reply)["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and meta["completion_tokens"] < ENDLESS


async def until_idle(conversation: Conversation) -> None:
    """Wait until the server has noticed that a turn has lost its client."""
    deadline_s = time.monotonic() + PATIENCE_S
    while (await conversation.phase()) != "idle":
        assert time.monotonic() < deadline_s, f"the turn of {conversation.name} goes on without a client"
        await asyncio.sleep(0.002)


async def crowd(client: Client, name: str) -> Conversation:
    """Whatever is sent to a session while its turn runs is refused, and the turn does not notice."""
    conversation = await Conversation.opened(client, name)
    refused = 0
    for _ in range(TRIES):
        tokens = conversation.tokens(3)
        async with client.streaming(conversation.body(tokens, LONG)) as events:
            first = (await anext(events))["output_ids"]
            turns = [turned_away(conversation) for _ in range(3)]
            refused += sum(await asyncio.gather(*turns, *no_place(conversation)))
            output, meta = await read_to_end(events)
        conversation.commit(tokens, first + output, meta, LONG)
        if refused >= 8:
            break
    client.journal.refused += refused
    return conversation


async def turned_away(conversation: Conversation) -> bool:
    """Whether a turn was refused because another one ran; if it came too late, the history was not what it expects."""
    reply = await conversation.client.http.post("/generate", json=conversation.body([5], 4))
    message = reply.json()["error"]["message"]
    busy = "already has an active request" in message
    assert reply.status_code == (400 if busy else 409) and (busy or "tokens, not" in message), message
    return busy


def no_place(conversation: Conversation) -> list[Awaitable[bool]]:
    """Whether a fork and a rewind were refused because a turn ran; if they came too late, there is no such place."""

    async def refused(route: str, place: str) -> bool:
        path = f"/v1/sessions/{conversation.name}/{route}"
        reply = await conversation.client.http.post(path, json={place: ENDLESS})
        assert reply.status_code in (409, 422), reply.text
        return reply.status_code == 409

    return [refused("fork", "at_tokens"), refused("rewind", "to_tokens")]


async def branch(client: Client, name: str) -> list[Conversation]:
    """Forks at the end, at a token and at a turn; appends and rewinds; all go their own ways at the same time."""
    parent = await Conversation.opened(client, name)
    await parent.turn(35)
    first_end = len(parent.history)
    await parent.append(12)
    await parent.turn(3, stream=True)
    end = len(parent.history)
    forks = [
        await parent.fork(f"{name}-end", end, {}),
        await parent.fork(f"{name}-token", first_end + 5, {"at_tokens": first_end + 5}),
        await parent.fork(f"{name}-turn", first_end, {"at_turn": 1}),
    ]
    await asyncio.gather(*(each.turn(4) for each in (parent, *forks)))
    await parent.rewind(end - 3, {"to_tokens": end - 3})
    await forks[0].rewind(first_end, {"to_turn": 1})
    await forks[1].append(40)
    grandchild = await forks[1].fork(f"{name}-grandchild", len(forks[1].history), {})
    branches = [parent, *forks, grandchild]
    await asyncio.gather(*(each.turn(index, stream=True) for index, each in enumerate(branches)))
    return branches


async def reopen(client: Client, name: str) -> Conversation:
    """A session that is closed during its turn ends with it; its id then names another session."""
    for _ in range(TRIES):
        session = await Conversation.opened(client, name)
        await session.turn(25)
        tokens = session.tokens(10)
        async with client.streaming(session.body(tokens, LONG)) as events:
            first = (await anext(events))["output_ids"]
            deferred = await session.close()
            reply = await client.http.post("/generate", json=session.body([5], 4))
            assert reply.status_code == 400, reply.text
            message = reply.json()["error"]["message"]
            assert "close was requested" in message or "does not exist" in message, message
            output, meta = await read_to_end(events)
        session.commit(tokens, first + output, meta, LONG)
        client.journal.deferred += deferred
        if deferred:
            break
    session = await Conversation.opened(client, name)
    await session.turn(25)
    await session.turn(2, stream=True)
    return session


# -- all of them ------------------------------------------------------------------------------------------------------


async def rage(client: Client) -> list[Conversation]:
    """All clients at once; the sessions that are open at the end."""
    single = [talk(client, f"talk-{number}") for number in range(4)]
    single += [tear(client, f"tear-{number}") for number in range(3)]
    single += [run(client, f"{run.__name__}-{number}") for run in (crowd, reopen) for number in range(2)]
    families = [branch(client, f"branch-{number}") for number in range(2)]
    plain = [ask(client, f"ask-{number}") for number in range(4)]
    conversations, branches, _ = await asyncio.gather(
        asyncio.gather(*single), asyncio.gather(*families), asyncio.gather(*plain)
    )
    return [*conversations, *(each for family in branches for each in family)]


# -- replies ----------------------------------------------------------------------------------------------------------


def request_for(tokens: list[int], output_tokens: int) -> dict[str, Any]:
    """The body of a greedy request with so many tokens of output."""
    sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
    return {"input_ids": tokens, "sampling_params": sampling}


async def events_of(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to [DONE], which must be its last line."""
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield orjson.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


async def read_to_end(events: AsyncIterator[dict[str, Any]]) -> tuple[list[int], dict[str, Any]]:
    """The tokens of the events that are left, and meta_info of the last one."""
    output: list[int] = []
    meta: dict[str, Any] = {}
    async for event in events:
        output += event["output_ids"]
        meta = event["meta_info"]
    return output, meta


def check_end(output: list[int], meta: dict[str, Any], output_tokens: int) -> None:
    """A request that was left alone has all of its tokens, each once."""
    assert meta["finish_reason"] == {"type": "length", "length": output_tokens}, meta
    assert len(output) == meta["completion_tokens"] == output_tokens

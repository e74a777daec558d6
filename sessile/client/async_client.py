"""`AsyncClient`: a server from asyncio; `Client` with await.

async with AsyncClient("http://127.0.0.1:30000") as client:
    async for piece in client.generate("Once upon a time", max_new_tokens=32):
        print(piece.text, end="")
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Self, Unpack

import httpx

from sessile.client.protocol import (
    PATIENCE_S,
    Attempts,
    Turn,
    broken_off,
    content_of,
    drawn_id,
    http_options,
    is_put_off,
    state_of,
)
from sessile.client.transport import SpreadTransport
from sessile.completion import GenerateFields, Generation, Piece, Prompt, SamplingParams, SessionState
from sessile.errors import DuplicateSession, NotFound, NotReady, UserError


class AsyncClient:
    """Talks to one server, from one event loop. A context manager.

    Raises the UserErrors that the server raised, as far as its reply tells, and NotReady if it cannot be reached.
    """

    def __init__(self, url: str, api_key: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """patience_s: how long a request is sent again while there is no server, no room, or no reply; 0: never."""
        self.url = url
        self._patience_s = patience_s
        self._http = httpx.AsyncClient(**http_options(url, api_key), transport=SpreadTransport())

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Generation:
        """Complete a prompt, given as text or token ids: await it for the whole, iterate over it for pieces."""
        return Generation(self.pieces(Turn(prompt, {**(sampling_params or {}), **fields}), self.attempts()))

    async def session(
        self,
        session_id: str | None = None,
        *,
        idle_timeout_s: float | None = None,
        reserve_tokens: int | None = None,
        max_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> "AsyncClientSession":
        """Open a session. Raises DuplicateSession if one with this id is open; `resume` goes on with that.

        That may be our own, if the reply to the request that opened it was lost. With a drawn id it is, and is taken.
        """
        body: dict[str, Any] = {"id": session_id or drawn_id()}
        for name, value in (
            ("idle_timeout_s", idle_timeout_s),
            ("reserve_tokens", reserve_tokens),
            ("max_tokens", max_tokens),
            ("metadata", metadata),
        ):
            if value is not None:
                body[name] = value
        return AsyncClientSession(self, await self.made("/v1/sessions", body, is_ours=session_id is None))

    async def resume(self, session_id: str) -> "AsyncClientSession":
        """Go on with a session that is open. Raises NotFound if it is not."""
        return AsyncClientSession(self, state_of(await self.ask("GET", f"/v1/sessions/{session_id}")))

    async def sessions(self) -> AsyncIterator[SessionState]:
        """All open sessions, in order of opening."""
        query = {"limit": "1000"}
        while True:
            page = await self.ask("GET", "/v1/sessions", params=query)
            for each in page["data"]:
                yield state_of(each)
            if not page["has_more"]:
                return
            query["after"] = page["data"][-1]["id"]

    async def model(self) -> dict[str, Any]:
        """What the server serves: name, architecture, context length."""
        return dict(await self.ask("GET", "/get_model_info"))

    async def close(self) -> None:
        """Close all connections. May be called again."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def ask(self, method: str, path: str, **content: Any) -> Any:
        """Send a request until it is answered; the JSON of the reply. content: as httpx takes it."""
        return content_of(await self.exchange(method, path, **content))

    async def exchange(self, method: str, path: str, **content: Any) -> httpx.Response:
        """The same, but whatever the server answers is the reply, an error too if sending again is of no use."""
        attempts = self.attempts()
        while True:
            try:
                reply = await self._http.request(method, path, **content)
                if not is_put_off(reply):
                    return reply
                content_of(reply)
            except (httpx.TransportError, UserError) as error:
                pause_s = attempts.pause_after(error)
            await asyncio.sleep(pause_s)

    async def made(self, path: str, body: Mapping[str, Any], *, is_ours: bool) -> SessionState:
        """Post what makes a session. is_ours: its id was drawn here, so if it is there our own post made it."""
        try:
            return state_of(await self.ask("POST", path, json=body))
        except DuplicateSession:
            if not is_ours:
                raise
            return state_of(await self.ask("GET", f"/v1/sessions/{body['id']}"))

    def attempts(self, *, waits_for_turn: bool = False) -> Attempts:
        """Those of a new request."""
        return Attempts(self.url, self._patience_s, waits_for_turn=waits_for_turn)

    async def pieces(self, turn: Turn, attempts: Attempts) -> AsyncGenerator[Piece, None]:
        """Send a turn until it has ended; what is new of its output."""
        while True:
            try:
                async with self._http.stream("POST", "/generate", json=turn.body) as reply:
                    if not reply.is_success:
                        await reply.aread()
                        content_of(reply)
                    async for line in reply.aiter_lines():
                        if piece := turn.take(line):
                            attempts.heard()
                            yield piece
                if turn.is_done:
                    return
                raise broken_off()
            except (httpx.TransportError, UserError) as error:
                if turn.is_done:
                    return
                pause_s = attempts.pause_after(error)
            turn.again()
            await asyncio.sleep(pause_s)


class AsyncClientSession:
    """A session on a server. As a context manager it is closed on leaving.

    It knows the length of the history and says it with every turn, so that nothing that somebody else appended goes
    unnoticed: HistoryMismatch then, until `state` has looked. One turn at a time.
    """

    def __init__(self, client: AsyncClient, state: SessionState) -> None:
        self.id = state.id
        self._client = client
        self._length: int | None = state.tokens

    def generate(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Generation:
        """Run the next turn: append the prompt to the history and complete it.

        Leaving it early ends the turn, and rolls it back if it was not done.
        """
        return Generation(self._pieces(prompt, {**(sampling_params or {}), **fields}))

    async def append(self, prompt: Prompt) -> int:
        """Compute a prompt now and generate later; the length of the history."""
        await self.generate(prompt, max_new_tokens=0)
        return self._length if self._length is not None else (await self.state()).tokens

    async def fork(
        self, *, at_tokens: int | None = None, at_turn: int | None = None, session_id: str | None = None
    ) -> "AsyncClientSession":
        """A new session that begins like this one, up to its end unless told where, and shares its KV.

        Raises SessionBusy while a turn runs, InvalidRequest for a place beyond the history.
        """
        body = {"id": session_id or drawn_id(), "at_tokens": at_tokens, "at_turn": at_turn}
        state = await self._client.made(f"/v1/sessions/{self.id}/fork", body, is_ours=session_id is None)
        return AsyncClientSession(self._client, state)

    async def rewind(self, *, to_tokens: int | None = None, to_turn: int | None = None) -> int:
        """Forget what came after a place; the length of the history. Raises as `fork` does."""
        body = {"to_tokens": to_tokens, "to_turn": to_turn}
        state = state_of(await self._client.ask("POST", f"/v1/sessions/{self.id}/rewind", json=body))
        self._length = state.tokens
        return state.tokens

    async def tokens(self) -> list[int]:
        """The history: inputs and outputs of all finished turns."""
        return list((await self._client.ask("GET", f"/v1/sessions/{self.id}/tokens"))["tokens"])

    async def state(self) -> SessionState:
        """The session at this moment. Raises NotFound if it is closed."""
        state = state_of(await self._client.ask("GET", f"/v1/sessions/{self.id}"))
        self._length = state.tokens if state.phase == "idle" else None
        return state

    async def close(self) -> None:
        """Close the session; its history and KV are gone. May be called again."""
        with contextlib.suppress(NotFound):
            await self._client.ask("DELETE", f"/v1/sessions/{self.id}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _pieces(self, prompt: Prompt, fields: GenerateFields) -> AsyncGenerator[Piece, None]:
        session: dict[str, Any] = {"id": self.id}
        if self._length is not None:
            session["expect_tokens"] = self._length
        turn = Turn(prompt, fields, session)
        attempts = self._client.attempts(waits_for_turn=self._length is None)
        self._length = None  # until we hear how it ended
        try:
            async with contextlib.aclosing(self._client.pieces(turn, attempts)) as pieces:
                async for piece in pieces:
                    yield piece
            self._length = turn.session_tokens if turn.session_tokens is not None else session.get("expect_tokens")
        except NotReady:
            raise  # perhaps it was done
        except UserError:
            self._length = session.get("expect_tokens")
            raise

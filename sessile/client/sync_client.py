"""`Client`: a server from a script or a thread.

with Client("http://127.0.0.1:30000") as client:
    print(client.generate("The capital of France is", max_new_tokens=8, temperature=0).text)
    with client.session() as session:
        for piece in session.stream("Once upon a time", max_new_tokens=32):
            print(piece.text, end="")
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self, Unpack

import httpx

from sessile.client.protocol import (
    ABORT_TIMEOUT_S,
    PATIENCE_S,
    Attempts,
    Turn,
    broken_off,
    content_of,
    drawn_id,
    http_options,
    is_put_off,
    state_of,
    unreachable,
)
from sessile.completion import Completion, GenerateFields, Piece, Prompt, SamplingParams, SessionState
from sessile.errors import DuplicateSession, NotFound, NotReady, UserError


class Client:
    """Talks to one server. A context manager; usable from several threads.

    Raises the UserErrors that the server raised, as far as its reply tells, and NotReady if it cannot be reached.
    """

    def __init__(self, url: str, api_key: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """patience_s: how long a request is sent again while there is no server, no room, or no reply; 0: never."""
        self.url = url
        self._patience_s = patience_s
        self._options = http_options(url, api_key)
        self._http = httpx.Client(**self._options)

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Completion:
        """Complete a prompt, given as text or token ids; keywords as in `sampling_params` of POST /generate."""
        return whole(self.stream(prompt, sampling_params, **fields))

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Iterator[Piece]:
        """Complete a prompt piece by piece. Closing the generator ends the request."""
        return self.pieces(Turn(prompt, {**(sampling_params or {}), **fields}), self.attempts())

    def session(
        self,
        session_id: str | None = None,
        *,
        idle_timeout_s: float | None = None,
        reserve_tokens: int | None = None,
        max_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> "ClientSession":
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
        return ClientSession(self, self.made("/v1/sessions", body, is_ours=session_id is None))

    def resume(self, session_id: str) -> "ClientSession":
        """Go on with a session that is open. Raises NotFound if it is not."""
        return ClientSession(self, state_of(self.ask("GET", f"/v1/sessions/{session_id}")))

    def sessions(self) -> Iterator[SessionState]:
        """All open sessions, in order of opening."""
        query = {"limit": "1000"}
        while True:
            page = self.ask("GET", "/v1/sessions", params=query)
            yield from map(state_of, page["data"])
            if not page["has_more"]:
                return
            query["after"] = page["data"][-1]["id"]

    def model(self) -> dict[str, Any]:
        """What the server serves: name, architecture, context length."""
        return dict(self.ask("GET", "/get_model_info"))

    def close(self) -> None:
        """Close all connections. May be called again."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, method: str, path: str, **content: Any) -> Any:
        """Send a request until it is answered; the JSON of the reply. content: as httpx takes it."""
        return content_of(self.exchange(method, path, **content))

    def exchange(self, method: str, path: str, **content: Any) -> httpx.Response:
        """The same, but whatever the server answers is the reply, an error too if sending again is of no use."""
        attempts = self.attempts()
        while True:
            try:
                reply = self._http.request(method, path, **content)
                if not is_put_off(reply):
                    return reply
                content_of(reply)
            except (httpx.TransportError, UserError) as error:
                pause_s = attempts.pause_after(error)
            time.sleep(pause_s)

    def made(self, path: str, body: Mapping[str, Any], *, is_ours: bool) -> SessionState:
        """Post what makes a session. is_ours: its id was drawn here, so if it is there our own post made it."""
        try:
            return state_of(self.ask("POST", path, json=body))
        except DuplicateSession:
            if not is_ours:
                raise
            return state_of(self.ask("GET", f"/v1/sessions/{body['id']}"))

    def attempts(self, *, waits_for_turn: bool = False) -> Attempts:
        """Those of a new request."""
        return Attempts(self.url, self._patience_s, waits_for_turn=waits_for_turn)

    def pieces(self, turn: Turn, attempts: Attempts) -> Iterator[Piece]:
        """Send a turn until it has ended; what is new of its output."""
        while True:
            try:
                with self._http.stream("POST", "/generate", json=turn.body) as reply:
                    if not reply.is_success:
                        reply.read()
                        content_of(reply)
                    for piece in filter(None, map(turn.take, reply.iter_lines())):
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
            time.sleep(pause_s)

    def abort(self, rid: str) -> None:
        """Ask the server to end a request; its stream then ends by itself. Safe in a signal handler."""
        # On a connection of its own: the pool may be locked by the very code that was interrupted.
        try:
            with httpx.Client(**self._options) as http:
                content_of(http.post("/abort_request", json={"rid": rid}, timeout=ABORT_TIMEOUT_S))
        except httpx.TransportError as error:
            raise unreachable(self.url, error) from error


class ClientSession:
    """A session on a server. As a context manager it is closed on leaving.

    It knows the length of the history and says it with every turn, so that nothing that somebody else appended goes
    unnoticed: HistoryMismatch then, until `state` has looked. One turn at a time.
    """

    def __init__(self, client: Client, state: SessionState) -> None:
        self.id = state.id
        self._client = client
        self._length: int | None = state.tokens
        self._turn: Turn | None = None

    def generate(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Completion:
        """Run the next turn: append the prompt to the history and complete it."""
        return whole(self.stream(prompt, sampling_params, **fields))

    def stream(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Iterator[Piece]:
        """The next turn piece by piece. Closing the generator ends the turn, and rolls it back if it was not done."""
        session: dict[str, Any] = {"id": self.id}
        if self._length is not None:
            session["expect_tokens"] = self._length
        self._turn = turn = Turn(prompt, {**(sampling_params or {}), **fields}, session)
        attempts = self._client.attempts(waits_for_turn=self._length is None)
        self._length = None  # until we hear how it ended
        try:
            yield from self._client.pieces(turn, attempts)
            self._length = turn.session_tokens if turn.session_tokens is not None else session.get("expect_tokens")
        except NotReady:
            raise  # perhaps it was done
        except UserError:
            self._length = session.get("expect_tokens")
            raise
        finally:
            self._turn = None

    def interrupt(self) -> None:
        """End the turn that runs, if one does; it ends as an abort and is rolled back. Safe in a signal handler."""
        if self._turn:
            self._client.abort(self._turn.rid)

    def append(self, prompt: Prompt) -> int:
        """Compute a prompt now and generate later; the length of the history."""
        self.generate(prompt, max_new_tokens=0)
        return self._length if self._length is not None else self.state().tokens

    def fork(
        self, *, at_tokens: int | None = None, at_turn: int | None = None, session_id: str | None = None
    ) -> "ClientSession":
        """A new session that begins like this one, up to its end unless told where, and shares its KV.

        Raises SessionBusy while a turn runs, InvalidRequest for a place beyond the history.
        """
        body = {"id": session_id or drawn_id(), "at_tokens": at_tokens, "at_turn": at_turn}
        state = self._client.made(f"/v1/sessions/{self.id}/fork", body, is_ours=session_id is None)
        return ClientSession(self._client, state)

    def rewind(self, *, to_tokens: int | None = None, to_turn: int | None = None) -> int:
        """Forget what came after a place; the length of the history. Raises as `fork` does."""
        body = {"to_tokens": to_tokens, "to_turn": to_turn}
        self._length = state_of(self._client.ask("POST", f"/v1/sessions/{self.id}/rewind", json=body)).tokens
        return self._length

    def tokens(self) -> list[int]:
        """The history: inputs and outputs of all finished turns."""
        return list(self._client.ask("GET", f"/v1/sessions/{self.id}/tokens")["tokens"])

    def state(self) -> SessionState:
        """The session at this moment. Raises NotFound if it is closed."""
        state = state_of(self._client.ask("GET", f"/v1/sessions/{self.id}"))
        self._length = state.tokens if state.phase == "idle" else None
        return state

    def close(self) -> None:
        """Close the session; its history and KV are gone. May be called again."""
        with contextlib.suppress(NotFound):
            self._client.ask("DELETE", f"/v1/sessions/{self.id}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def whole(pieces: Iterator[Piece]) -> Completion:
    """The completion that the last piece has."""
    completion = None
    for piece in pieces:
        completion = piece.completion
    assert completion is not None, "the last piece has the whole"
    return completion

"""What the benches ask of a server over HTTP: SGLang's native calls, and our sessions as a resource.

Every call that goes wrong raises StartupError naming it: a benchmark with holes in it measures nothing.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from sessile.bench.lean_client import LeanClient
from sessile.client.protocol import Turn, content_of
from sessile.errors import NotReady, StartupError, UserError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer as its client saw it. Times in seconds from the moment the request was sent.

    prompt_tokens: the whole context, a session's history included; cached_tokens: of these, not computed again, 0 from
    a server that does not say. session_tokens: the session's history after the turn, where the server says it.
    """

    tokens: list[int]
    first_token_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    session_tokens: int | None


class NativeServer:
    """The calls of the benches, by one client. Raises StartupError naming the call that went wrong."""

    def __init__(self, client: LeanClient) -> None:
        self._client = client

    async def open_session(self) -> str:
        """Open a streaming session; its id."""
        session = await self._ask("POST", "/open_session", {"capacity_of_str_len": 1_000_000, "streaming": True})
        if not isinstance(session, str):
            raise StartupError(f"{self._client.url}/open_session answered {session!r}, not a session id")
        return session

    async def close_session(self, session: str) -> None:
        """Close a session."""
        await self._ask("POST", "/close_session", {"session_id": session})

    async def fork_session(self, session: str) -> str:
        """Fork a session at its end; the fork's id."""
        return str((await self._ask("POST", f"/v1/sessions/{session}/fork", {}))["id"])

    async def rewind_session(self, session: str, to_tokens: int) -> None:
        """Cut a session's history to its first tokens."""
        await self._ask("POST", f"/v1/sessions/{session}/rewind", {"to_tokens": to_tokens})

    async def session_length(self, session: str) -> int:
        """Tokens of a session's history."""
        return int((await self._ask("GET", f"/v1/sessions/{session}"))["tokens"])

    async def session_tokens(self, session: str) -> list[int]:
        """A session's history."""
        return list((await self._ask("GET", f"/v1/sessions/{session}/tokens"))["tokens"])

    async def flush_cache(self) -> None:
        """Drop all KV."""
        await self._ask("POST", "/flush_cache", {})

    async def model(self) -> dict[str, Any]:
        """/get_model_info."""
        return dict(await self._ask("GET", "/get_model_info"))

    async def pool(self) -> dict[str, Any]:
        """/v1/pool: pages and rows by owner."""
        return dict(await self._ask("GET", "/v1/pool"))

    async def totals(self) -> dict[str, float]:
        """The samples of /metrics that have no label but the model's, by name."""
        with self._told("/metrics"):
            reply = await self._client.exchange("GET", "/metrics")
            content_of(reply)
        samples = [line.rpartition(" ") for line in reply.text.splitlines() if not line.startswith("#")]
        return {
            name.partition("{")[0]: float(value) for name, _, value in samples if name.count("=") == 1
        }

    async def generate(
        self, tokens: Sequence[int], generated: int, session: str | None, *, expect_tokens: int | None = None
    ) -> Generated:
        """Generate exactly so many tokens greedily; as a turn of a session, whose history has expect_tokens."""
        params: dict[str, Any] | None = None
        if session is not None:
            params = {"id": session} if expect_tokens is None else {"id": session, "expect_tokens": expect_tokens}
        turn = Turn(tokens, {"max_new_tokens": generated, "temperature": 0, "ignore_eos": True}, params)
        first_token_s = 0.0
        said = None
        started_s = time.perf_counter()
        with self._told("/generate"):
            async for piece in self._client.pieces(turn):
                if piece.tokens and not first_token_s:
                    first_token_s = time.perf_counter() - started_s
                said = piece.completion
        total_s = time.perf_counter() - started_s
        assert said is not None, "the last piece has the whole"
        if len(said.tokens) != generated:
            raise StartupError(
                f"{self._client.url}/generate: {len(said.tokens)} tokens instead of {generated}: {said.finish_reason}"
            )
        return Generated(
            said.tokens, first_token_s, total_s, said.prompt_tokens, said.cached_tokens, turn.session_tokens
        )

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with self._told(path):
            return await self._client.ask(method, path, body)

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """Say of which call something went wrong."""
        try:
            yield
        except NotReady as error:
            raise StartupError(f"{path}: {error.message}. Start one with `sessile serve`.") from error
        except UserError as error:
            raise StartupError(f"{self._client.url}{path} answered {error.status}: {error.message}") from error


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[NativeServer]:
    """A server to be measured, with as many connections as there are requests at once; nothing is sent twice."""
    async with LeanClient(url) as client:
        yield NativeServer(client)


async def side_by_side(clients: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all clients at once; their results in order. The first that fails ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client) for client in clients]
    except* StartupError as failures:
        raise first_failure(failures) from None
    return [task.result() for task in tasks]


def first_failure(failures: "BaseExceptionGroup[StartupError]") -> StartupError:
    """The first error of a group, however deep."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, BaseExceptionGroup) else first


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed (nearest rank, no interpolation)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def write_report(report: dict[str, Any], path: str) -> None:
    """Write what a bench measured to the file that --json names. Raises StartupError if that cannot be."""
    try:
        with open(path, "wb") as file:
            file.write(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise StartupError(f"cannot write --json {path}: {error.strerror}. Give another path.") from error


def check_token_range(lowest_id: int, highest_id: int) -> None:
    """Raise StartupError unless the range of prompt token ids has two ids or more."""
    if highest_id <= lowest_id:
        raise StartupError(f"--highest-id must be above --lowest-id {lowest_id}; got {highest_id}")

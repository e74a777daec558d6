"""What the benches ask of a server over HTTP: SGLang's native calls, and our sessions as a resource.

Every call that goes wrong raises StartupError naming it: a benchmark with holes in it measures nothing.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import orjson

from sessile.errors import StartupError

REQUEST_TIMEOUT_S = 600.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer as its client saw it. Times from the moment the request was sent; meta: the last meta_info."""

    tokens: list[int]
    first_token_s: float
    total_s: float
    meta: dict[str, Any]

    @property
    def prompt_tokens(self) -> int:
        """The whole context, a session's history included."""
        return int(self.meta["prompt_tokens"])

    @property
    def cached_tokens(self) -> int:
        """Of these, not computed again; 0 from a server that does not say."""
        return self.meta.get("cached_tokens") or 0


class NativeServer:
    """The calls of the benches, on one connection pool. Raises StartupError naming the call that went wrong."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def open_session(self) -> str:
        """Open a streaming session; its id."""
        session = await self._post("/open_session", {"capacity_of_str_len": 1_000_000, "streaming": True})
        if not isinstance(session, str):
            raise StartupError(f"{self._url}/open_session answered {session!r}, not a session id")
        return session

    async def close_session(self, session: str) -> None:
        """Close a session."""
        await self._post("/close_session", {"session_id": session})

    async def fork_session(self, session: str) -> str:
        """Fork a session at its end; the fork's id."""
        return str((await self._post(f"/v1/sessions/{session}/fork", {}))["id"])

    async def rewind_session(self, session: str, to_tokens: int) -> None:
        """Cut a session's history to its first tokens."""
        await self._post(f"/v1/sessions/{session}/rewind", {"to_tokens": to_tokens})

    async def session_length(self, session: str) -> int:
        """Tokens of a session's history."""
        return int((await self._get_json(f"/v1/sessions/{session}"))["tokens"])

    async def session_tokens(self, session: str) -> list[int]:
        """A session's history."""
        return list((await self._get_json(f"/v1/sessions/{session}/tokens"))["tokens"])

    async def flush_cache(self) -> None:
        """Drop all KV."""
        await self._post("/flush_cache", {})

    async def model(self) -> dict[str, Any]:
        """/get_model_info."""
        return dict(await self._get_json("/get_model_info"))

    async def pool(self) -> dict[str, Any]:
        """/v1/pool: pages and rows by owner."""
        return dict(await self._get_json("/v1/pool"))

    async def totals(self) -> dict[str, float]:
        """The samples of /metrics that have no label but the model's, by name."""
        lines = (await self._get("/metrics")).content.decode().splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {
            name.partition("{")[0]: float(value) for name, _, value in samples if name.count("=") == 1
        }

    async def generate(
        self, tokens: Sequence[int], generated: int, session: str | None, *, expect_tokens: int | None = None
    ) -> Generated:
        """Generate exactly so many tokens greedily; as a turn of a session, whose history has expect_tokens."""
        body: dict[str, Any] = {
            "input_ids": tokens,
            "stream": True,
            "sampling_params": {"max_new_tokens": generated, "temperature": 0, "ignore_eos": True},
        }
        if session is not None:
            body["session_params"] = {"id": session}
            if expect_tokens is not None:
                body["session_params"]["expect_tokens"] = expect_tokens
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
            raise StartupError(f"{self._url}/generate: {len(output)} tokens instead of {generated}: {reason}")
        return Generated(output, first_token_s, total_s, meta)

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
            raise self._unreachable("/generate", error) from error

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        reply = await self._send("POST", path, json=body)
        return orjson.loads(reply.content) if reply.content else None

    async def _get(self, path: str) -> httpx.Response:
        return await self._send("GET", path)

    async def _get_json(self, path: str) -> Any:
        return orjson.loads((await self._get(path)).content)

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            reply = await self._client.request(method, path, **content)
        except httpx.TransportError as error:
            raise self._unreachable(path, error) from error
        if reply.status_code != httpx.codes.OK:
            raise self._failure(path, reply.status_code, reply.content)
        return reply

    def _failure(self, path: str, status: int, content: bytes) -> StartupError:
        return StartupError(f"{self._url}{path} answered {status}: {content.decode(errors='replace')[:300]}")

    def _unreachable(self, path: str, error: httpx.TransportError) -> StartupError:
        reason = str(error) or type(error).__name__
        return StartupError(
            f"no server answers at {self._url} ({path}: {reason}). Start one with `sessile serve`."
        )


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[NativeServer]:
    """A server to be measured, with as many connections as there are requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=10)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, trust_env=False) as client:
        yield NativeServer(client, url)


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

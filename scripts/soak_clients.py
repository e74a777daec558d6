"""What the clients of the soak do: each act is something that a client does, right or wrong, and what must come of it.

An act says which statuses it may get; any other, and any 5xx, is a failure that names act and reply. So are a reply
that does not come, an event stream without an end, and a turn that says anything else than a fresh prompt.
"""

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

ACT_LIMIT_S = 120.0
FAILURES_SHOWN = 40
SHARED_SESSIONS = 8
Json = dict[str, Any]

QUEUED = ("/generate", "/v1/completions", "/v1/chat/completions")
NATIVE_BUSY = (200, 400, 409, 429)
RESOURCE_BUSY = (200, 404, 409, 410, 413, 422, 429)

MALFORMED = (
    b"", b"{", b"[1,2]", b"3", b'"text"', b"\xff\xfe{}", b'{"text": "a"', b'{"text": "\\ud800"}', b"null", b"{}" * 9,
    b"[" * 5000, b'{"text": "x", "text": 3}', b'{"input_ids": [1e400]}', b"NaN",
)  # fmt: skip
WRONG_FIELDS: tuple[Json, ...] = (
    {"text": 3}, {"input_ids": "abc"}, {"input_ids": [1.5]}, {"input_ids": [-1]}, {"input_ids": [260]},
    {"input_ids": [2**31]}, {"input_ids": [[1]]}, {"input_ids": []}, {"text": ""}, {"text": "a", "input_ids": [1]},
    {"text": "a", "nonsense": 1}, {"text": "a", "stream": "yes"}, {"text": "a", "rid": ""},
    {"text": "a", "rid": "r" * 999},
    {"text": "a", "session_params": {"id": ""}}, {"text": "a", "session_params": {"id": "a/b\n" * 3}},
    {"text": "a", "session_params": {"id": "x" * 10_000}}, {"text": "a", "session_params": {"offset": 3}},
    {"text": "a", "top_logprobs_num": 10**9, "return_logprob": True}, {"text": "a", "logprob_start_len": 999},
)  # fmt: skip
WRONG_SAMPLING: tuple[str, ...] = (
    '"temperature": NaN', '"temperature": Infinity', '"temperature": -1', '"temperature": "1"', '"top_p": 0',
    '"top_p": NaN', '"top_k": 1.5', '"min_p": 7', '"max_new_tokens": -1', '"max_new_tokens": 1e30', '"seed": -1.5',
    '"stop": 3', '"stop": [""]', '"stop_token_ids": [260]', '"logit_bias": {"x": 1}', '"logit_bias": {"1": NaN}',
    '"min_new_tokens": 129', '"repetition_penalty": 0', '"regex": "("', '"n": 0', '"unheard_of": 1',
)  # fmt: skip
WRONG_OPENS: tuple[Json, ...] = (
    {"id": "a/b"}, {"id": "x" * 10_000}, {"id": ""}, {"idle_timeout_s": -1}, {"idle_timeout_s": 0}, {"max_tokens": 0},
    {"idle_timeout_s": 1e300}, {"metadata": {"a": 1}}, {"metadata": {str(n): "v" for n in range(99)}}, {"id": 7},
    {"reserve_tokens": 10**12}, {"nonsense": True},
)  # fmt: skip
WRONG_REQUESTS = (
    ("GET", "/nowhere", (404,)), ("DELETE", "/generate", (405,)), ("PUT", "/v1/sessions", (405,)),
    ("GET", "/v1/sessions?limit=0", (422,)), ("GET", "/v1/sessions?limit=abc", (422,)),
    ("GET", "/v1/sessions?after=nobody", (200, 404, 422)), ("GET", "/v1/models/other", (404,)),
    ("POST", "/v1/sessions/a%2Fb/fork", (404, 422)), ("GET", "/v1/sessions/%00", (404, 422)),
    ("GET", "/v1/sessions/" + "x" * 4000, (404, 414, 422)),
)  # fmt: skip


@dataclass
class Findings:
    """What all clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """The first few, in words."""
    failure_count: int = 0
    lagging_streams_ended: int = 0
    """By the server, because their reader was too slow."""
    totals: dict[str, int] = field(default_factory=dict)
    """What the server counted."""

    @property
    def replies(self) -> int:
        """All replies so far."""
        return self.statuses.total()

    def expect(self, holds: bool, failure: str) -> None:
        """Note a failure unless something holds; the first few are told at once."""
        if not holds:
            self.failure_count += 1
            if len(self.failures) < FAILURES_SHOWN:
                self.failures.append(failure)
                print(f"FAILED {failure}", flush=True)


class Client:
    """One client; what it does is decided by its dice. All clients share a few sessions and get in each other's way."""

    def __init__(
        self, url: str, key: str, operator_key: str, number: int, seed: int, findings: Findings, context_tokens: int,
        body_bytes_max: int,
    ) -> None:  # fmt: skip
        """number: no other client's; the next one's client is of another tenant."""
        self._url = url
        self._key = key
        self._operator = {"Authorization": f"Bearer {operator_key}"}
        self._number = number
        self._dice = random.Random(f"{seed} {number}")
        self._findings = findings
        self._context_tokens = context_tokens
        self._body_bytes_max = body_bytes_max
        self._act = ""
        self._names = 0
        self._acts: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self._talk), (6, self._ask), (4, self._read_stream), (5, self._drop_stream), (4, self._kill_socket),
            (2, self._read_slowly), (2, self._send_half), (1, self._send_garbage), (4, self._send_malformed),
            (4, self._send_wrong), (2, self._send_too_much), (3, self._use_unknown_session), (4, self._take_busy_turn),
            (4, self._take_shared_turn), (4, self._fork_or_rewind), (3, self._open_twice), (2, self._reuse_rid),
            (3, self._abort), (3, self._close_in_turn), (1, self._flush), (3, self._exceed_context),
            (3, self._let_expire), (3, self._look_around), (2, self._use_openai), (2, self._append_and_leave),
            (2, self._send_wrong_requests), (4, self._branch), (3, self._reserve), (2, self._use_wrong_key),
            (2, self._look_next_door),
        ]  # fmt: skip

    async def run(self, until_s: float) -> None:
        """Act until that time of time.monotonic."""
        weights = [weight for weight, _ in self._acts]
        headers = {"Authorization": f"Bearer {self._key}"}
        async with httpx.AsyncClient(
            base_url=self._url, headers=headers, timeout=ACT_LIMIT_S, trust_env=False
        ) as self._http:
            while time.monotonic() < until_s:
                ((_, act),) = self._dice.choices(self._acts, weights)
                self._act = act.__name__.strip("_")
                self._findings.acts[self._act] += 1
                try:
                    await asyncio.wait_for(act(), ACT_LIMIT_S)
                except TimeoutError:
                    self._fail(f"did not end within {ACT_LIMIT_S:g} s")
                except httpx.TransportError as error:
                    self._fail(f"the connection broke: {error!r}")
                except ValueError as error:
                    self._fail(f"a reply is not the JSON that it should be: {error!r}")

    # ---- what is right ----

    async def _talk(self) -> None:
        """A few turns in a session: each must say what a fresh prompt says, or leave no trace if somebody ends it."""
        session = await self._opened()
        if session is None:
            return
        history: list[int] = []
        for _ in range(self._dice.randint(1, 4)):
            added = self._tokens(self._dice.choice((1, 7, 16, 40)))
            params = {"id": session, "expect_tokens": len(history)}
            reply = await self._post("/generate", greedy(added, 9) | {"session_params": params}, (200, 429))
            if reply.status_code == 200 and ended_well(reply.json()):
                history += added + reply.json()["output_ids"]
            known = await self._get(f"/v1/sessions/{session}/tokens", (200,))
            self._expect(known.json()["tokens"] == history, f"the history is not what its client knows: {known.text}")
        await self._compare(history[:-9], history[-9:])
        await self._delete(session, (200,))

    async def _compare(self, prompt: list[int], said: list[int]) -> None:
        """What a session said last, with the answer to a plain prompt of the same tokens."""
        if not prompt:
            return
        reply = await self._post("/generate", greedy(prompt, 9), (200, 429))
        if reply.status_code == 200 and ended_well(reply.json()):
            fresh = reply.json()["output_ids"]
            self._expect(fresh == said, f"a turn after {len(prompt)} tokens said {said}, a fresh prompt {fresh}")

    async def _ask(self) -> None:
        """A plain request with random sampling parameters."""
        body: Json = {"input_ids": self._tokens(self._dice.randint(1, 90)), "sampling_params": self._sampling()}
        if self._dice.random() < 0.3:
            body |= {"return_logprob": True, "top_logprobs_num": self._dice.randint(0, 5), "logprob_start_len": 0}
        await self._post("/generate", body, (200, 429))

    async def _read_stream(self) -> None:
        """A stream that is read to its end."""
        body = {"input_ids": self._tokens(20), "sampling_params": self._sampling()}
        if self._dice.random() < 0.5:
            body["stream_output"] = "delta"
        await self._stream(body)

    async def _look_around(self) -> None:
        """What a user may look at, and what only an operator may."""
        paths = ("/health", "/v1/sessions", "/get_model_info", "/v1/models")
        await self._get(self._dice.choice(paths), (200,))
        await self._get(self._dice.choice(("/metrics", "/v1/pool", "/get_server_info")), (403,))
        text = {"prompt": "héllo " * self._dice.randint(0, 40)}
        tokens = (await self._post("/tokenize", text, (200,))).json()["tokens"]
        await self._post("/detokenize", {"tokens": tokens}, (200,))

    async def _flush(self) -> None:
        """Drop all KV: refused while anything runs, and to who is no operator."""
        await self._post("/flush_cache", {}, (403,))
        await self._send("POST", "/flush_cache", (200, 400), json={}, headers=self._operator)

    async def _branch(self) -> None:
        """A branching session: two turns at once from the end of one, another from its middle, one in place of all.

        Each finished one must say what a fresh prompt of its own tokens says.
        """
        session = await self._opened(branching=True)
        if session is None:
            return
        root = self._tokens(self._dice.choice((3, 16, 33)))
        said = await self._branch_off(session, "root", root, {})
        if said is not None:
            history, ways = root + said, [self._tokens(5), self._tokens(17)]
            cut = self._dice.randint(1, len(history))
            outputs = await asyncio.gather(
                *(self._branch_off(session, f"way-{at}", way, {"rid": "root"}) for at, way in enumerate(ways)),
                self._branch_off(session, "cut", [9], {"rid": "root", "offset": cut}),
                self._branch_off(session, "again", [8], {"rid": "root", "drop_previous_output": True}),
            )
            prompts = [*(history + way for way in ways), [*history[:cut], 9], [*root, 8]]
            at = self._dice.randrange(len(prompts))
            if (chosen := outputs[at]) is not None:
                await self._compare(prompts[at], chosen)
            reading = asyncio.ensure_future(self._branch_off(session, "late", [7], {"rid": "root"}))
            await self._branch_off(session, "instead", [6], {"rid": "root", "replace": True})
            await reading
        await self._branch_off(session, "lost", [5], {"rid": "nobody"}, (400, 429))
        await self._delete(session, (200,))

    async def _branch_off(
        self, session: str, name: str, added: list[int], place: Json, allowed: Sequence[int] = (200, 400, 429)
    ) -> list[int] | None:
        """What a turn of a branching session says; None if it was refused or somebody ended it."""
        body = greedy(added, 9) | {"rid": f"{session}-{name}", "session_params": {"id": session, **place}}
        if (parent := place.get("rid")) is not None:
            body["session_params"]["rid"] = f"{session}-{parent}"
        reply = await self._post("/generate", body, allowed)
        if reply.status_code != 200 or not ended_well(reply.json()):
            return None
        return list(reply.json()["output_ids"])

    async def _reserve(self) -> None:
        """A session with KV of its own, refused where others have reserved too much; turns within it and beyond."""
        session = await self._opened(reserve_tokens=self._dice.choice((1, 40, 200, self._context_tokens)))
        if session is None:
            return
        for _ in range(self._dice.randint(0, 3)):
            body = greedy(self._tokens(self._dice.choice((5, 60))), 9) | {"session_params": {"id": session}}
            await self._post("/generate", body, (200, 429))
            await asyncio.sleep(self._dice.choice((0.0, 0.05)))
        if self._dice.random() < 0.8:
            await self._delete(session, (200,))

    async def _use_wrong_key(self) -> None:
        """No key, half a key, somebody's hash, or what is no header."""
        wrong = ("", "Bearer", f"Bearer {self._key[:-1]}", f"Basic {self._key}", "x" * 999)
        headers = {"Authorization": self._dice.choice(wrong)}
        await self._send("POST", "/generate", (401,), json=greedy([1], 2), headers=headers)
        await self._send("GET", "/v1/sessions", (401,), headers=headers)

    async def _look_next_door(self) -> None:
        """Sessions of another tenant are not there: names of the next client, which has another key."""
        name = f"own-{self._number + 1}-{self._dice.randint(1, 50)}"
        await self._get(f"/v1/sessions/{name}", (404,))
        await self._post(f"/v1/sessions/{name}/fork", {}, (404,))
        await self._post("/generate", greedy([1], 2) | {"session_params": {"id": name}}, (400,))

    # ---- connections that end early, late, or make no sense ----

    async def _drop_stream(self) -> None:
        """Leave in the middle of a stream, of a session's turn or not."""
        body = greedy(self._tokens(30), 400)
        if self._dice.random() < 0.5:
            body["session_params"] = {"id": self._shared()}
        await self._stream(body, events_max=self._dice.randint(0, 12))

    async def _kill_socket(self) -> None:
        """Reset the connection at any moment after sending a request."""
        body = greedy(self._tokens(self._dice.choice((5, 300))), 300) | {"stream": self._dice.random() < 0.5}
        if self._dice.random() < 0.3:
            body["session_params"] = {"id": self._shared()}
        async with self._socket() as (_, writer):
            writer.write(self._http_post("/generate", json.dumps(body).encode()))
            await asyncio.sleep(self._dice.choice((0.0, 0.001, 0.01, 0.1)))
            writer.transport.abort()

    async def _read_slowly(self) -> None:
        """Read a stream of megabytes a few bytes at a time through a small window, then to the end or not at all."""
        body = greedy(self._tokens(10), 300) | {"stream": True, "return_logprob": True, "top_logprobs_num": 5}
        async with self._socket(receive_bytes=32_768) as (reader, writer):
            writer.write(self._http_post("/generate", json.dumps(body).encode()))
            end: bytes | None = await reader.readexactly(len(b"HTTP/1.1 200"))
            if end != b"HTTP/1.1 200":
                self._expect(end == b"HTTP/1.1 429", f"a stream was answered {end!r}")
                return
            for _ in range(self._dice.randint(5, 60)):
                if (end := await self._read_on(reader, end, self._dice.randint(1, 400))) is None:
                    return
                await asyncio.sleep(0.02)
            if self._dice.random() < 0.5:
                await asyncio.sleep(self._dice.uniform(0, 10))
                while end is not None:
                    end = await self._read_on(reader, end, 65_536)

    async def _read_on(self, reader: asyncio.StreamReader, end: bytes, bytes_max: int) -> bytes | None:
        """Read a stream that is known up to `end` a little further; its new end, or None where it is over.

        Over it may be because the server lost patience with its reader.
        """
        content = end + await reader.read(bytes_max)
        self._findings.lagging_streams_ended += b"reads too slowly" in content
        self._expect(len(content) > len(end), f"a slow stream ended with {end!r}")
        if len(content) == len(end) or b"[DONE]" in content:
            return None
        return content[-15:]  # Enough for what is cut in two, too little to count a reason twice.

    async def _send_half(self) -> None:
        """A request that ends in the middle of its headers or its body."""
        request = self._http_post("/generate", json.dumps(greedy(self._tokens(50), 5)).encode())
        async with self._socket() as (_, writer):
            writer.write(request[: self._dice.randint(1, len(request) - 1)])
            await asyncio.sleep(self._dice.choice((0.0, 0.2, 1.0)))

    async def _send_garbage(self) -> None:
        """What is not HTTP gets a 400 or a closed connection."""
        async with self._socket() as (reader, writer):
            writer.write(self._dice.randbytes(self._dice.randint(1, 3000)) + b"\r\n\r\n")
            with contextlib.suppress(TimeoutError):
                reply = await asyncio.wait_for(reader.read(200), 1.0)
                self._expect(not reply.startswith(b"HTTP/1.1 5"), f"garbage was answered {reply!r}")

    async def _append_and_leave(self) -> None:
        """Append to a session and hang up before the reply."""
        body = json.dumps({"input_ids": self._tokens(100)}).encode()
        async with self._socket() as (_, writer):
            writer.write(self._http_post(f"/v1/sessions/{self._shared()}/append", body))
            await asyncio.sleep(self._dice.choice((0.0, 0.005, 0.05)))
            writer.transport.abort()

    # ---- content that is wrong ----

    async def _send_malformed(self) -> None:
        """Bodies that are no JSON object, to any route that takes one."""
        paths = ("/generate", "/open_session", "/close_session", "/v1/completions", "/tokenize", "/v1/chat/completions")
        await self._send("POST", self._dice.choice(paths), (400,), content=self._dice.choice(MALFORMED))
        await self._send("POST", "/v1/sessions", (422,), content=self._dice.choice(MALFORMED))

    async def _send_wrong(self) -> None:
        """Fields of wrong types, out of range, or of nobody's making."""
        await self._post("/generate", self._dice.choice(WRONG_FIELDS), (400,))
        raw = '{"text": "a", "sampling_params": {' + self._dice.choice(WRONG_SAMPLING) + "}}"
        reply = await self._send("POST", "/generate", (200, 400), content=raw.encode())
        # Somebody may abort all requests while a pattern waits to be found wrong.
        is_fine = reply.status_code == 200 and ended_well(reply.json())
        self._expect(not is_fine, f"{raw} was answered {reply.text}")
        await self._post("/v1/sessions", self._dice.choice(WRONG_OPENS), (422, 429))
        opening = {"capacity_of_str_len": -1} if self._dice.random() < 0.5 else {"streaming": True, "timeout": -1}
        await self._post("/open_session", opening, (400,))

    async def _send_wrong_requests(self) -> None:
        """Routes, methods and queries that are not there."""
        method, path, allowed = self._dice.choice(WRONG_REQUESTS)
        await self._send(method, path, allowed)

    async def _send_too_much(self) -> None:
        """A body over the limit, announced or in pieces. The server may hang up while we still send."""
        size = self._body_bytes_max + self._dice.randint(1, 200_000)

        async def pieces() -> Any:
            for _ in range(0, size, 10_000):
                yield b"x" * 10_000

        content = b"x" * size if self._dice.random() < 0.5 else pieces()
        with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            await self._send("POST", "/generate", (413,), content=content)

    async def _exceed_context(self) -> None:
        """A prompt that does not fit, or that just does."""
        tokens = self._context_tokens + self._dice.choice((-1, 0, 1, 500))
        reply = await self._post("/generate", greedy(self._tokens(tokens), 5), (200, 400, 429))
        if tokens >= self._context_tokens and reply.status_code == 400:
            self._expect("context length" in reply.text, f"a prompt that is too long was refused with {reply.text}")
        body = greedy(self._tokens(self._context_tokens - 5), 50) | {"session_params": {"id": self._shared()}}
        await self._post("/generate", body, NATIVE_BUSY)

    async def _use_openai(self) -> None:
        """OpenAI's routes, used rightly and wrongly."""
        body: Json = {"model": "default", "prompt": "ab" * self._dice.randint(1, 20), "max_tokens": 9}
        body |= self._dice.choice(({}, {"stream": True}, {"n": 3}, {"model": "x"}, {"seed": "a"}, {"tools": [1]}))
        await self._post("/v1/completions", body, (200, 400, 404, 429))
        chat = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        await self._post("/v1/chat/completions", chat, (200, 400, 429))

    # ---- sessions in the wrong state ----

    async def _use_unknown_session(self) -> None:
        """Every operation on a session that is not there."""
        name = f"nobody-{self._dice.randint(0, 99)}"
        await self._post("/generate", greedy([1], 3) | {"session_params": {"id": name}}, (400,))
        await self._post("/close_session", {"session_id": name}, (200,))
        await self._post(f"/v1/sessions/{name}/fork", {}, (404,))
        await self._post(f"/v1/sessions/{name}/rewind", {"to_tokens": 0}, (404,))
        await self._post(f"/v1/sessions/{name}/append", {"input_ids": [1]}, (404,))
        await self._get(f"/v1/sessions/{name}", (404,))
        await self._get(f"/v1/sessions/{name}/tokens", (404,))
        await self._delete(name, (404,))

    async def _take_busy_turn(self) -> None:
        """Several turns of one session at once: at most one at a time may run."""
        body = greedy(self._tokens(5), 30) | {"session_params": {"id": self._shared()}}
        await asyncio.gather(*(self._post("/generate", body, NATIVE_BUSY) for _ in range(3)))

    async def _take_shared_turn(self) -> None:
        """A turn of a session that others use as well, perhaps with an outdated belief of its length."""
        params: Json = {"id": self._shared()}
        if self._dice.random() < 0.5:
            params["expect_tokens"] = self._dice.randint(0, 200)
        body = {"input_ids": self._tokens(self._dice.randint(0, 30)), "sampling_params": self._sampling()}
        await self._post("/generate", body | {"session_params": params}, NATIVE_BUSY)

    async def _fork_or_rewind(self) -> None:
        """At places that are there, or are not, of sessions that are idle, or are not."""
        name = self._shared()
        place = self._dice.choice((0, 1, 15, 16, 17, 100, 511, 10**6, -1, "5", None))
        by_turn = self._dice.random() < 0.4
        if self._dice.random() < 0.4:
            target = {"to_turn" if by_turn else "to_tokens": place}
            await self._post(f"/v1/sessions/{name}/rewind", target, RESOURCE_BUSY)
            return
        body = {"at_turn" if by_turn else "at_tokens": place}
        if self._dice.random() < 0.3:
            body["id"] = self._shared()
        reply = await self._post(f"/v1/sessions/{name}/fork", body, RESOURCE_BUSY)
        if reply.status_code == 200:
            child = reply.json()["id"]
            await self._post("/generate", greedy([3], 4) | {"session_params": {"id": child}}, NATIVE_BUSY)
            await self._delete(child, (200, 404))

    async def _open_twice(self) -> None:
        """A name that is taken, mostly; now and then it is given up first."""
        name = self._shared()
        if self._dice.random() < 0.2:
            await self._delete(name, (200, 404))
        await self._post("/v1/sessions", {"id": name}, (200, 409, 410, 429))
        opening = {"capacity_of_str_len": 0, "streaming": True, "session_id": name}
        await self._post("/open_session", opening, (200, 400, 429))

    async def _reuse_rid(self) -> None:
        """The same request id twice at once."""
        body = greedy(self._tokens(5), 20) | {"rid": f"rid-{self._dice.randint(0, 3)}"}
        await asyncio.gather(*(self._post("/generate", body, (200, 400, 429)) for _ in range(2)))

    async def _abort(self) -> None:
        """End a request from another connection; now and then, end everything."""
        rid = self._name("aborted")
        body = greedy(self._tokens(8), 400) | {"rid": rid, "session_params": {"id": self._shared()}}
        reading = asyncio.ensure_future(self._stream(body))
        await asyncio.sleep(self._dice.choice((0.0, 0.005, 0.05)))
        if self._dice.random() < 0.05:
            await self._send("POST", "/abort_request", (200,), json={"abort_all": True}, headers=self._operator)
        await self._post("/abort_request", {"rid": rid}, (200,))
        await reading

    async def _close_in_turn(self) -> None:
        """Close a session whose turn runs, or expire it: the turn goes on to its end, the next is refused."""
        session = await self._opened()
        if session is None:
            return
        reading = asyncio.ensure_future(self._stream(greedy(self._tokens(8), 60) | {"session_params": {"id": session}}))
        await asyncio.sleep(self._dice.choice((0.0, 0.005, 0.05)))
        if self._dice.random() < 0.5:
            await self._delete(session, (200,))
        else:
            await self._post("/close_session", {"session_id": session}, (200,))
        await self._post("/generate", greedy([1], 2) | {"session_params": {"id": session}}, (400,))
        await reading

    async def _let_expire(self) -> None:
        """Open a session for a short time and leave it alone, perhaps after a turn."""
        session = await self._opened(idle_timeout_s=self._dice.choice((0.02, 0.2, 1.0)))
        if session and self._dice.random() < 0.5:
            await self._post("/generate", greedy(self._tokens(9), 9) | {"session_params": {"id": session}}, NATIVE_BUSY)

    # ---- the ways to the server ----

    async def _opened(self, **fields: Any) -> str | None:
        """A session of our own, or None where there are too many."""
        reply = await self._post("/v1/sessions", {"id": self._name("own"), **fields}, (200, 429))
        return str(reply.json()["id"]) if reply.status_code == 200 else None

    async def _post(self, path: str, body: Json, allowed: Sequence[int]) -> httpx.Response:
        return await self._send("POST", path, allowed, json=body)

    async def _get(self, path: str, allowed: Sequence[int]) -> httpx.Response:
        return await self._send("GET", path, allowed)

    async def _delete(self, session: str, allowed: Sequence[int]) -> httpx.Response:
        return await self._send("DELETE", f"/v1/sessions/{session}", allowed)

    async def _send(self, method: str, path: str, allowed: Sequence[int], **content: Any) -> httpx.Response:
        reply = await self._http.request(method, path, **content)
        self._findings.statuses[reply.status_code] += 1
        # A server whose queue is full says so before it reads what is wrong with a request.
        expected = reply.status_code in allowed or (reply.status_code == 429 and path in QUEUED)
        self._expect(expected, f"{method} {path[:80]} {str(content)[:200]}: {reply.status_code} {reply.text[:300]}")
        return reply

    async def _stream(self, body: Json, events_max: int | None = None) -> None:
        """Read a stream, to its end or until so many events have come."""
        content = ""
        async with self._http.stream("POST", "/generate", json=body | {"stream": True}) as reply:
            self._findings.statuses[reply.status_code] += 1
            if reply.status_code != 200:
                text = (await reply.aread()).decode()
                allowed = reply.status_code in NATIVE_BUSY
                self._expect(allowed, f"a stream was answered {reply.status_code} {text[:300]}")
                return
            events = 0
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    events += 1
                    reason = json.loads(line[6:])["meta_info"]["finish_reason"] or {}
                    self._expect((reason.get("status_code") or 0) < 500, f"a stream ended with {reason}")
                content = line or content
                if events_max is not None and events >= events_max:
                    return
        self._expect(content == "data: [DONE]", f"a stream ended with {content[:300]!r}")

    @contextlib.asynccontextmanager
    async def _socket(self, receive_bytes: int = 0) -> Any:
        """A bare connection; closed on leaving, whatever the server thinks of it."""
        where = urlsplit(self._url)
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (where.hostname, where.port))
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            with contextlib.suppress(ConnectionError):
                yield reader, writer
        finally:
            writer.transport.abort()

    def _http_post(self, path: str, body: bytes) -> bytes:
        """A request as it goes over the wire."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    # ---- dice and verdicts ----

    def _tokens(self, count: int) -> list[int]:
        return [self._dice.randrange(256) for _ in range(count)]

    def _shared(self) -> str:
        return f"shared-{self._dice.randrange(SHARED_SESSIONS)}"

    def _name(self, what: str) -> str:
        """A name that nobody had before."""
        self._names += 1
        return f"{what}-{self._number}-{self._names}"

    def _sampling(self) -> Json:
        """Some sampling parameters, all in range."""
        dice = self._dice
        choices: Json = {
            "temperature": dice.choice((0, 0.3, 1.0, 5.0)), "top_p": dice.uniform(0.01, 1),
            "top_k": dice.randint(1, 99), "min_p": dice.random(), "seed": dice.randrange(2**63),
            "frequency_penalty": dice.uniform(-2, 2), "presence_penalty": dice.uniform(-2, 2),
            "repetition_penalty": dice.uniform(0.5, 2), "ignore_eos": dice.random() < 0.5,
            "logit_bias": {str(dice.randrange(256)): dice.uniform(-50, 50)}, "min_new_tokens": 2,
            "stop": ["".join(dice.choices("abc", k=2))], "stop_token_ids": self._tokens(3),
            "no_stop_trim": dice.random() < 0.5,
        }  # fmt: skip
        kept = {name: value for name, value in choices.items() if dice.random() < 0.4}
        return kept | {"max_new_tokens": dice.choice((2, 9, 40, 100, 10**6)) if dice.random() < 0.5 else 9}

    def _expect(self, holds: bool, failure: str) -> None:
        self._findings.expect(holds, f"{self._act}: {failure}")

    def _fail(self, failure: str) -> None:
        self._expect(False, failure)


def greedy(tokens: list[int], new_tokens: int) -> Json:
    """The body of a request for exactly so many tokens."""
    return {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
    }


def ended_well(reply: Json) -> bool:
    """Whether nobody aborted the request."""
    return reply["meta_info"]["finish_reason"]["type"] in ("length", "stop")

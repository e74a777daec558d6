"""Requests to every route of the application, in front of the real core on the simulator's toy device."""

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote

from scripts.fuzzing.mutations import mutated_bytes, mutated_json
from scripts.fuzzing.target import Target
from sessile.server.app import create_app
from sessile.server.config import ServerOptions
from sessile.server.corpora.folder import open_folder
from sessile.server.corpora.opening import open_corpora
from sessile.server.histories import Histories
from sessile.server.link import EngineLink
from tests.http.fake_engine import byte_tokenizer
from tests.http.toy_engine import ToyEngine

BUILDER = [sys.executable, "-m", "tests.http.builder_child"]
ANEW_AFTER = 300
"""Requests after which everything that they left behind is closed and removed."""
TOKENS_MAX = 8
ANSWER_S_MAX = 60.0
REPEATED = {"max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens"}
SERVER_ERRORS = (
    b'"status_code":5', b'"type":"server_error"', b'"type":"api_error"', b'"type":"overloaded_error"',
    b'"type":"response.failed"',
)  # fmt: skip
HEADERS = b"content-type: application/json\n"
SESSION, CORPUS = "fuzz", "docs"
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "a", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "x"},
]
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
]
TURN = {"id": SESSION}
BODIES: list[tuple[str, Any]] = [
    ("/generate", {"text": "ab", "sampling_params": {"max_new_tokens": 4, "stop": ["x"], "stop_regex": "a+b"}}),
    ("/generate", {"text": "ab", "stream": True, "return_logprob": True, "sampling_params": {"max_new_tokens": 3}}),
    ("/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 2, "n": 2, "logit_bias": {"97": 1.5}}}),
    ("/generate", {"input_ids": [1, 2], "session_params": TURN, "sampling_params": {"max_new_tokens": 2}}),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 9, "json_schema": {"type": "integer"}}}),
    ("/v1/completions", {"model": "default", "prompt": ["a", [1, 2]], "max_tokens": 3, "logprobs": 1, "echo": True}),
    ("/v1/chat/completions", {"model": "default", "messages": CHAT, "tools": [TOOL], "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": CHAT[:2], "session_id": "chat", "max_tokens": 4, "stream": True}),
    ("/v1/responses", {"input": ITEMS, "max_output_tokens": 4, "store": True, "tools": [TOOL | TOOL["function"]]}),
    ("/v1/responses", {"input": "hi", "stream": True, "max_output_tokens": 2, "conversation": "none"}),
    ("/v1/conversations", {"items": ITEMS[:1], "metadata": {"a": "b"}}),
    ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": CHAT[1:2], "system": "s", "stream": True}),
    ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}),
    ("/open_session", {"capacity_of_str_len": 1, "session_id": SESSION, "streaming": True, "timeout": 5}),
    ("/v1/sessions", {"id": SESSION, "idle_timeout_s": 9, "reserve_tokens": 4, "max_tokens": 99, "metadata": {}}),
    (f"/v1/sessions/{SESSION}/append", {"text": "more"}),
    (f"/v1/sessions/{SESSION}/fork", {"at_tokens": 1}),
    (f"/v1/sessions/{SESSION}/rewind", {"to_tokens": 1}),
    ("/v1/corpora", {"id": CORPUS, "documents": ["one two", "three"], "replace": True}),
    ("/v1/corpora", {"id": CORPUS, "path": "a.txt"}),
    ("/add_external_corpus", {"corpus_id": CORPUS, "file_path": "../a.txt"}),
]


class Requests(Target):
    """An HTTP request as text: `METHOD path?query`, headers, an empty line, a body. No answer is a 5xx."""

    name = "request"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "texts").mkdir()
        (folder / "texts" / "a.txt").write_text("some text")
        self._place = tempfile.TemporaryDirectory()  # a short path, for a socket
        self._loop = asyncio.new_event_loop()
        self._requests = 0
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        options = ServerOptions(
            corpora_dir=str(self.folder / "texts"), corpora_max=8, responses_max=16, responses_bytes_max=1 << 20
        )
        address = f"ipc://{self._place.name}/link"
        self._engine = ToyEngine(address, pages=200, eos=0, audit_level=1, sessions_max=32, queue_max=64, drafts_max=2)
        self._link = EngineLink(address, lag_tokens_max=4096, histories=Histories(1 << 20))
        self._link.start()
        tokenizer = byte_tokenizer()
        indexes = open_folder(options, str(self.folder))
        self._corpora = open_corpora(self._link, tokenizer, options, indexes, BUILDER, "{}")
        self._corpora.start()
        self._app = create_app(self._link, tokenizer, options, corpora=self._corpora)
        self._engine.start()
        await self._link.wait_ready()

    def seeds(self) -> list[bytes]:
        """See `requests_of`."""
        return requests_of(self._app.openapi())

    def run(self, raw: bytes) -> None:
        """Send it and read the whole answer."""
        if self._requests % ANEW_AFTER == 0:
            self._loop.run_until_complete(self._begin_anew())
        self._requests += 1
        status, body = self._loop.run_until_complete(asyncio.wait_for(self._answered(raw), ANSWER_S_MAX))
        assert 200 <= status < 500, f"status {status}: {body[:500]!r}"
        assert not has_server_error(body), f"a stream failed: {body[-500:]!r}"
        body.decode()

    async def _begin_anew(self) -> None:
        """Nothing is left of what was sent before, and what seeds name is there."""
        await self._answered(b"POST /abort_request\n\n" + b'{"abort_all": true}')
        for place, keys in (("/v1/sessions", "data"), ("/v1/corpora", "data")):
            _, listed = await self._answered(f"GET {place}\n\n".encode())
            for each in json.loads(listed)[keys]:
                await self._answered(f"DELETE {place}/{each['id']}\n\n".encode())
        await self._answered(text_of("POST", "/open_session", dict(BODIES[13][1])))

    async def _answered(self, raw: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to a request in text."""
        head, _, body = raw.partition(b"\n\n")
        line, *headers = head.split(b"\n")
        method, _, target = line.decode("ascii", "ignore").partition(" ")
        path, _, query = target.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method.upper() or "GET", "scheme": "http", "path": unquote(path) or "/",
            "raw_path": path.encode(),
            "query_string": query.encode(), "root_path": "", "headers": list(_headers_of(headers)),
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 30000),
        }  # fmt: skip
        told, pieces, ended = [0], [], asyncio.Event()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                told[0] = message["status"]
            else:
                pieces.append(message.get("body", b""))

        await self._app(scope, receive, send)
        ended.set()
        return told[0], b"".join(pieces)

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """See `mutated_request`."""
        return mutated_request(raw, rng)

    def close(self) -> None:
        """End the engine, the builder and the loop."""
        self._loop.run_until_complete(self._corpora.close())
        self._loop.run_until_complete(self._link.close())
        self._engine.stop()
        self._loop.close()
        self._place.cleanup()


def requests_of(description: dict[str, Any]) -> list[bytes]:
    """All routes as OpenAPI describes them: with what they need, with each field more, and some bodies in full."""
    found = [text_of("POST", path, body) for path, body in BODIES]
    upload = b"POST /v1/corpora?id=docs&replace=true\ncontent-type: application/jsonl\n\n"
    found.append(upload + b'"one"\n{"text": "two"}\n')
    for path, methods in description["paths"].items():
        named = path.replace("{session}", SESSION).replace("{corpus}", CORPUS).replace("{model}", "toy")
        named = named.replace("{", "").replace("}", "")
        for method, described in methods.items():
            asked = [each["name"] for each in described.get("parameters", ()) if each["in"] == "query"]
            query = "&".join(f"{name}=1" for name in asked)
            schema = _body_schema(described)
            bodies = [None] if schema is None else list(_bodies_of(schema))
            found += [text_of(method.upper(), named, body) for body in bodies]
            if query:
                found.append(text_of(method.upper(), f"{named}?{query}", bodies[0]))
    return found


def mutated_request(raw: bytes, rng: Random) -> bytes:
    """Another request: mostly with another body, as JSON; else another line, other headers, or anything."""
    head, _, body = raw.partition(b"\n\n")
    if rng.random() < 0.8:
        return head + b"\n\n" + mutated_json(body, rng)
    return mutated_bytes(head, rng) + b"\n\n" + body if rng.random() < 0.7 else mutated_bytes(raw, rng)


def has_server_error(body: bytes | bytearray) -> bool:
    """Whether a stream, whose status was told before, ends with a failure of the server's, in any API's words."""
    return any(words in body for words in SERVER_ERRORS)


def text_of(method: str, path: str, body: Any) -> bytes:
    """A request with a JSON body, or with none."""
    line = f"{method} {path}\n".encode()
    return line + b"\n" if body is None else line + HEADERS + b"\n" + json.dumps(body).encode()


def _headers_of(lines: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Headers as a server passes them on; the length of the body is its own affair."""
    for line in lines:
        name, colon, value = line.partition(b":")
        if colon and name.strip() and name.strip().lower() != b"content-length":
            yield name.strip().lower(), value.strip()


def _body_schema(described: dict[str, Any]) -> Any:
    return described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")


def _bodies_of(schema: Any) -> Iterator[Any]:
    """The body with what it needs, then with one field more each time."""
    needed = least(schema)
    yield needed
    for name, field in schema.get("properties", {}).items():
        yield needed | {name: least(field)}


def least(schema: Any) -> Any:
    """A value that a schema allows; outputs stay short."""
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return least(schema["anyOf"][0])
    match schema.get("type"):
        case "object":
            fields = {name: least(schema["properties"][name]) for name in schema.get("required", ())}
            own = schema.get("properties", {}).keys()
            return fields | {name: TOKENS_MAX for name in sorted(REPEATED & own)[:1]}
        case "array":
            return [least(schema.get("items", {}))] * max(1, schema.get("minItems", 0))
        case "string":
            return "a" * max(schema.get("minLength", 0), 1)
        case "integer" | "number":
            return max(schema.get("minimum", 1), 1)
        case "boolean":
            return True
    return None

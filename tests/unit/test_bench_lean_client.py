"""The benches' own client: what it hears, however the bytes come, and how it says that something went wrong."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
import pytest

from sessile.bench.client import NativeServer
from sessile.bench.lean_client import LeanClient
from sessile.errors import StartupError

Result = TypeVar("Result")

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def event(text: str, ids: Sequence[int], count: int, finish: dict[str, Any] | None = None) -> bytes:
    meta = {"finish_reason": finish, "prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": count}
    return b"data: " + orjson.dumps({"text": text, "output_ids": ids, "meta_info": meta}) + b"\n\n"


EVENTS = [event("a", [1], 1), event("é\u2028b", [2, 3], 3), event("", [4], 4, {"type": "length", "length": 4})]
STREAM = HEAD + b"".join(map(chunk, EVENTS)) + chunk(b": keep-alive\n\n") + chunk(b"data: [DONE]\n\n") + END


class Stub:
    """Answers each request with the next reply, byte for byte, in packets of so many bytes; None: it hangs up."""

    def __init__(self, replies: Sequence[bytes | None], packet_bytes: int, *, hangs_up: bool = False) -> None:
        self.url = ""
        self.requests: list[bytes] = []
        self.connections = 0
        self._replies = list(replies)
        self._packet_bytes = packet_bytes
        self._hangs_up = hangs_up

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self._replies:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                self.requests.append(head + await reader.readexactly(length))
                reply = self._replies.pop(0) or b""
                for start in range(0, len(reply), self._packet_bytes):
                    writer.write(reply[start : start + self._packet_bytes])
                    await writer.drain()
                    await asyncio.sleep(0)
                if self._hangs_up:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has no more requests
        finally:
            writer.close()


@asynccontextmanager
async def stubbed(stub: Stub) -> AsyncIterator[LeanClient]:
    server = await asyncio.start_server(stub.serve, "127.0.0.1", 0)
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, LeanClient(stub.url) as client:
        yield client


def asked(stub: Stub, ask: Callable[[LeanClient], Awaitable[Result]]) -> Result:
    """What comes of a question to a stub."""

    async def main() -> Result:
        async with stubbed(stub) as client, asyncio.timeout(20):
            return await ask(client)

    return asyncio.run(main())


async def one_generation(client: LeanClient) -> tuple[list[str], list[int]]:
    pieces = [piece async for piece in client.generate([7, 8], max_new_tokens=4, temperature=0)]
    completion = pieces[-1].completion
    assert completion is not None and completion.text == "aé\u2028b"
    return [piece.text for piece in pieces], completion.tokens


@pytest.mark.parametrize("packet_bytes", [1, 3, 50, 1 << 20])
def test_events_are_the_same_however_the_bytes_are_cut(packet_bytes: int) -> None:
    texts, tokens = asked(Stub([STREAM], packet_bytes), one_generation)
    assert (texts, tokens) == (["a", "é\u2028b", ""], [1, 2, 3, 4])


def test_a_connection_is_kept_and_what_is_sent_is_a_request() -> None:
    stub = Stub([STREAM, STREAM, b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{} "], 1 << 20)

    async def ask(client: LeanClient) -> Any:
        await one_generation(client)
        await one_generation(client)
        return await client.ask("GET", "/get_model_info")

    assert asked(stub, ask) == {}
    assert stub.connections == 1
    head, _, body = stub.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1:")
    assert orjson.loads(body)["input_ids"] == [7, 8]


def test_one_more_request_at_once_is_one_more_connection() -> None:
    stub = Stub([STREAM] * 5, 40)

    async def ask(client: LeanClient) -> None:
        await asyncio.gather(one_generation(client), one_generation(client), one_generation(client))
        await one_generation(client)

    asked(stub, ask)
    assert stub.connections == 3


def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    last = STREAM.replace(b"transfer-encoding", b"connection: close\r\ntransfer-encoding")
    stub = Stub([last, STREAM], 1 << 20)

    async def ask(client: LeanClient) -> None:
        await one_generation(client)
        await one_generation(client)

    asked(stub, ask)
    assert stub.connections == 2


async def generated(client: LeanClient) -> Any:
    return await NativeServer(client).generate([7, 8], 4, None)


@pytest.mark.parametrize("length", [0, len(HEAD) // 2, len(HEAD), len(HEAD) + 40, STREAM.index(b"data: [DONE]") - 40])
def test_a_torn_stream_is_told_as_one(length: int) -> None:
    stub = Stub([STREAM[:length]], 1 << 20, hangs_up=True)
    with pytest.raises(StartupError, match=r"^/generate: the server at http://127.0.0.1:\d+ cannot be reached or is"):
        asked(stub, generated)


def test_a_stream_that_ends_before_the_output_does_is_torn_too() -> None:
    with pytest.raises(StartupError, match="the answer broke off"):
        asked(Stub([HEAD + chunk(EVENTS[0]) + chunk(b"data: [DONE]\n\n") + END], 1 << 20), generated)


def test_what_is_no_http_is_told() -> None:
    with pytest.raises(StartupError, match="does not answer as HTTP says"):
        asked(Stub([b"SSH-2.0-OpenSSH_9.6\r\n"], 1 << 20, hangs_up=True), generated)


def test_a_refusal_is_told_with_its_status_and_reason() -> None:
    content = b'{"error":{"message":"input_ids: 300 is not in the vocabulary"}}'
    refusal = b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content)
    with pytest.raises(StartupError, match="/generate answered 400: input_ids: 300 is not in the vocabulary"):
        asked(Stub([refusal], 7), generated)


def test_an_error_event_is_told_with_its_reason() -> None:
    error = chunk(b'data: {"error":{"message":"no page is free","code":503}}\n\n') + chunk(b"data: [DONE]\n\n") + END
    with pytest.raises(StartupError, match="no page is free"):
        asked(Stub([HEAD + chunk(EVENTS[0]) + error], 1 << 20), generated)


def test_a_stream_that_is_left_takes_its_connection_along() -> None:
    stub = Stub([HEAD + chunk(EVENTS[0]), STREAM], 1 << 20)

    async def ask(client: LeanClient) -> None:
        generation = client.generate([7])
        async for _ in generation:
            break
        await generation.aclose()
        await one_generation(client)

    asked(stub, ask)
    assert stub.connections == 2


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(StartupError, match="is not the address of a server"):
        LeanClient("ftp://here")

"""The connections of an AsyncClient: one a request, used again, and closed when nobody needs them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from sessile.client import transport
from sessile.client.transport import SpreadTransport

REPLY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Counter:
    """A server that answers once all of a round's requests are there, and counts its connections."""

    def __init__(self) -> None:
        self.made = self.open = 0
        self.round = 1
        self.hangs_up = False
        self._waiting = 0
        self._all_there = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        self.open += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                if self.hangs_up:
                    return
                self._waiting += 1
                if self._waiting == self.round:
                    self._waiting = 0
                    self._all_there.set()
                    self._all_there = asyncio.Event()
                else:
                    await self._all_there.wait()
                writer.write(REPLY)
        except asyncio.IncompleteReadError:
            return  # the client has closed it
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def connected(counter: Counter) -> AsyncIterator[httpx.AsyncClient]:
    server = await asyncio.start_server(counter.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(base_url=url, transport=SpreadTransport(), trust_env=False) as client:
        yield client


async def ask(client: httpx.AsyncClient, counter: Counter, count: int) -> None:
    counter.round = count
    replies = await asyncio.gather(*(client.get("/") for _ in range(count)))
    assert [reply.text for reply in replies] == ["ok"] * count


def run(scenario: Callable[[httpx.AsyncClient, Counter], Awaitable[None]]) -> None:
    async def main() -> None:
        counter = Counter()
        async with asyncio.timeout(30), connected(counter) as client:
            await scenario(client, counter)

    asyncio.run(main())


def test_requests_at_once_have_a_connection_each_and_later_ones_use_them_again() -> None:
    async def scenario(client: httpx.AsyncClient, counter: Counter) -> None:
        await ask(client, counter, 20)
        assert counter.made == 20
        await ask(client, counter, 20)
        await ask(client, counter, 1)
        assert counter.made == 20

    run(scenario)


def test_what_a_burst_needed_is_closed_when_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: httpx.AsyncClient, counter: Counter) -> None:
        await ask(client, counter, 20)
        monkeypatch.setattr(transport, "UNUSED_S", 0.0)
        await ask(client, counter, 1)
        while counter.open > 1:
            await asyncio.sleep(0.001)
        assert counter.made == 21

    run(scenario)


def test_a_connection_that_broke_off_is_replaced() -> None:
    async def scenario(client: httpx.AsyncClient, counter: Counter) -> None:
        counter.hangs_up = True
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
        counter.hangs_up = False
        await ask(client, counter, 1)
        assert counter.made == 2

    run(scenario)


def test_a_stream_that_is_left_takes_its_connection_along() -> None:
    async def scenario(client: httpx.AsyncClient, counter: Counter) -> None:
        async with client.stream("GET", "/"):
            pass  # nothing of its body was read
        await ask(client, counter, 1)
        assert counter.made == 2

    run(scenario)


def test_closing_the_client_closes_what_is_lent() -> None:
    async def scenario(client: httpx.AsyncClient, counter: Counter) -> None:
        async with client.stream("GET", "/"):
            await client.aclose()
            while counter.open:
                await asyncio.sleep(0.001)

    run(scenario)

"""A real server on a loopback port in front of the fake engine."""

import asyncio
import contextlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from sessile.server.app import create_app
from sessile.server.calls import Service
from sessile.server.config import ServerOptions
from sessile.server.connections import bounded_http
from sessile.server.corpora.folder import open_folder
from sessile.server.corpora.opening import open_corpora
from sessile.server.corpora.store import CorpusStore
from sessile.server.histories import Histories
from sessile.server.keys import Caller, Key, KeyRing, digest_of
from sessile.server.link import EngineLink
from sessile.text.tokenizer import Tokenizer
from tests.http.fake_engine import CONTEXT_TOKENS, FakeEngine, byte_tokenizer

PATIENCE_S = 60.0
"""How long anything may take that has to come: on a loaded machine much is slow, and a failure need not be quick."""


BUILDER = [sys.executable, "-m", "tests.http.builder_child"]


def ring_of(**tenants: str) -> KeyRing:
    """A key `TENANT-key` for each tenant, with the given role."""
    keys = [
        Key(digest_of(f"{tenant}-key"), Caller(tenant, is_admin=role == "admin")) for tenant, role in tenants.items()
    ]
    return KeyRing(tuple(keys), tuple(tenants))


def bearer(tenant: str) -> dict[str, str]:
    """The header of a tenant in `ring_of`."""
    return {"authorization": f"Bearer {tenant}-key"}


@dataclass
class Running:
    """A server under test: its client, its engine, and what its routes share."""

    client: httpx.Client
    engine: FakeEngine
    service: Service
    loop: asyncio.AbstractEventLoop
    url: str

    def generate(self, text: str = "hello", *, timeout_s: float = PATIENCE_S, **body: object) -> httpx.Response:
        return self.client.post("/generate", json={"text": text, **body}, timeout=timeout_s)

    @contextlib.contextmanager
    def in_background(self, text: str = "hello", **body: object) -> Iterator["Future[httpx.Response]"]:
        """The same from another thread; entered once the engine has the request."""
        submitted = len(self.engine.submits())
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(self.generate, text, **body)
            self.wait_until(lambda: len(self.engine.submits()) > submitted)
            yield reply

    def wait_until(self, holds: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
        """Wait for something to become true; fail if it does not."""
        deadline_s = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < deadline_s, "it did not happen in time"
            time.sleep(0.002)

    def as_tenant(self, tenant: str) -> httpx.Client:
        """A client with the key of a tenant in `ring_of`; a context manager."""
        return httpx.Client(base_url=self.url, headers=bearer(tenant), timeout=20)

    def call(self, function: object, *arguments: object) -> None:
        """Run a function on the server's event loop."""
        self.loop.call_soon_threadsafe(function, *arguments)


@contextlib.contextmanager
def running_server(
    make_engine: Callable[[str], Any] = FakeEngine,
    *,
    key_ring: KeyRing | None = None,
    tokenizer: Tokenizer | None = None,
    **options: object,
) -> Iterator[Running]:
    """Start a server in a thread, wait until it is ready, stop it on leaving. make_engine: takes the link's address."""
    tokenizer = tokenizer or byte_tokenizer()
    bound = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{Path(folder) / 'link'}"
        engine = make_engine(address)
        indexes = open_folder(ServerOptions(**options), folder)
        started = threading.Event()
        shared: dict[str, object] = {}

        def open_store(link: EngineLink) -> CorpusStore:
            return open_corpora(
                link, tokenizer, ServerOptions(**options), indexes, BUILDER, "{}", key_ring=key_ring
            )

        async def serve() -> None:
            lag_tokens_max = ServerOptions(**options).stream_lag_tokens_max
            link = EngineLink(address, lag_tokens_max=lag_tokens_max, histories=Histories(1 << 20))
            link.start()
            corpora = open_store(link)
            corpora.start()
            app = create_app(link, tokenizer, ServerOptions(**options), key_ring=key_ring, corpora=corpora)
            http = bounded_http(ServerOptions(**options).connections_max)
            server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="warning", lifespan="off"))
            shared.update(server=server, service=app.state.service, loop=asyncio.get_running_loop())
            engine.start()
            await link.wait_ready()
            started.set()
            await server.serve([bound])
            await corpora.close()
            await link.close()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        assert started.wait(PATIENCE_S), "the server did not start"
        try:
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
                yield Running(client, engine, shared["service"], shared["loop"], url)
        finally:
            shared["server"].should_exit = True
            thread.join(PATIENCE_S)
            engine.stop()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    with running_server() as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The module's server, its engine as new."""
    yield shared_server
    engine = shared_server.engine
    engine.resume()
    engine.script, engine.token_interval_s, engine.context_tokens = None, 0.0, CONTEXT_TOKENS
    engine.refusals.clear()
    engine.received.clear()


@pytest.fixture
def acme(toy: Running) -> Iterator[httpx.Client]:
    """A client with the key of a tenant, of the module's `toy`."""
    with toy.as_tenant("acme") as client:
        yield client


@pytest.fixture
def umbra(toy: Running) -> Iterator[httpx.Client]:
    """The same of another tenant."""
    with toy.as_tenant("umbra") as client:
        yield client

"""A server while it serves: HTTP and the engine behind it, kept together until either ends, and the draining.

Importing this takes longer than anything else that the server's process does at its start: `run.py` does it while the
engine starts.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from sessile import __version__
from sessile.contract.messages import EngineReady
from sessile.errors import NotReady
from sessile.server.app import create_app
from sessile.server.calls import Service
from sessile.server.config import ServerOptions
from sessile.server.connections import bounded_http
from sessile.server.corpora.store import CorpusStore
from sessile.server.engine_process import EngineProcess, Launcher
from sessile.server.histories import Histories
from sessile.server.keys import KeyRing
from sessile.server.link import EngineLink
from sessile.server.listening import shown_address
from sessile.server.request_log import RequestLog
from sessile.server.supervision import Supervisor
from sessile.server.tracing import Tracing
from sessile.text.tokenizer import Tokenizer

KEEP_ALIVE_S = 65
"""Longer than the 60 s for which most clients and proxies keep an idle connection, so that they are first to close."""
REPLIES_S = 3
"""How long replies may take to be written once all requests have ended."""

EXIT_OK, EXIT_FAILED, EXIT_WRONG_USE = 0, 1, 2

log = logging.getLogger("sessile.server")


class Host:
    """Keeps an HTTP server and an engine process together until either ends. For one run only."""

    def __init__(
        self,
        options: ServerOptions,
        launcher: Launcher,
        engine: EngineProcess,
        listeners: list[socket.socket],
        *,
        exit_with_stdin: bool,
    ) -> None:
        """engine: the first one, started already."""
        self._options = options
        self._launcher = launcher
        self._request_log = RequestLog(Path(options.request_log)) if options.request_log else None
        self._tracing = Tracing(options.otlp_endpoint, version=__version__)
        self._first = engine
        self._supervisor: Supervisor | None = None
        self._listeners = listeners
        self._exit_with_stdin = exit_with_stdin
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(
        self,
        tokenizer: Tokenizer,
        open_store: Callable[[EngineLink], CorpusStore],
        settings: Mapping[str, Any] | None,
        key_ring: KeyRing | None,
    ) -> int:
        """Serve until told to stop or the engine is gone for good; the exit status."""
        self._listen_to_signals()
        options = self._options
        link = EngineLink(
            self._first.address,
            lag_tokens_max=options.stream_lag_tokens_max,
            histories=Histories(options.held_bytes_max, bos_id=tokenizer.bos_id),
            request_log=self._request_log,
        )
        link.start()
        corpora = open_store(link)
        corpora.start()
        self._supervisor = Supervisor(link, self._launcher, self._first, options, corpora.reload)
        app = create_app(
            link, tokenizer, options, settings=settings, key_ring=key_ring, corpora=corpora,
            supervisor=self._supervisor, tracing=self._tracing,
        )  # fmt: skip
        if tokenizer.template is not None and not app.state.service.dialogues.keeps_kv:
            log.warning("the chat template rewrites earlier turns: chat sessions and responses send all messages again")
        http = HttpServer(app, options)
        serving = asyncio.create_task(http.serve(self._listeners))
        supervising = asyncio.create_task(self._supervisor.run())
        announcing = asyncio.create_task(self._announce(link))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({stopping, supervising, serving}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set() and not supervising.done():
                await self._drain(app.state.service, supervising)
                status = EXIT_OK
            else:
                reason = await supervising if supervising.done() else "the HTTP server ended by itself"
                log.error(f"cannot go on: {reason}")
                status = EXIT_WRONG_USE if self._supervisor.cannot_start else EXIT_FAILED
            http.should_exit = True
            await serving
            return status
        finally:
            for task in (announcing, supervising, stopping):
                task.cancel()
            await corpora.close()
            await link.close()
            if self._request_log is not None:
                self._request_log.close()
            self._tracing.close()

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        if self._exit_with_stdin:

            def watch() -> None:
                while os.read(sys.stdin.fileno(), 4096):
                    pass
                loop.call_soon_threadsafe(self._signalled)

            threading.Thread(target=watch, name="stdin-watch", daemon=True).start()

    def _signalled(self) -> None:
        """The first request to stop drains, the second does not wait."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _announce(self, link: EngineLink) -> None:
        """Say where we serve, once we do."""
        with contextlib.suppress(NotReady):  # whoever supervises the engine says why
            ready = await link.wait_ready()
            set_start_up_aside()
            self._say_ready(ready)

    def _say_ready(self, ready: EngineReady) -> None:
        name = self._options.served_name or ready.model_name
        where = shown_address(self._listeners[0], self._options)
        attention = f", attention: {ready.attention}" if ready.attention else ""
        log.info(f"serving {name} ({ready.dtype} on {ready.device}{attention}) at {where}")

    async def _drain(self, service: Service, supervising: "asyncio.Task[str]") -> None:
        """Refuse new requests, let those in flight end, then end the engine."""
        service.leaving = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._options.drain_notice_s)
        service.draining = True
        link = service.link
        limit = f": {link.in_flight} requests in flight may take {self._options.drain_timeout_s:g} s to end"
        log.info(f"stopping{limit if link.in_flight else ''}")
        deadline_s = asyncio.get_running_loop().time() + self._options.drain_timeout_s
        while link.in_flight and not self._hurry.is_set() and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.02)
        assert self._supervisor is not None
        self._supervisor.shut_down()
        await asyncio.wait({supervising}, timeout=REPLIES_S)
        link.fail("the server was stopped")


def set_start_up_aside() -> None:
    """Let no garbage collection look again at what start-up made and keeps: modules are set aside already.

    A full one is put off until what is new is a quarter of what was there: with all modules counted in, that lets
    some megabytes of the cycles that broken connections leave behind come and go. Now they are short and come in time.
    """
    gc.collect()
    gc.freeze()


class HttpServer(uvicorn.Server):
    """uvicorn with our own answer to signals."""

    def __init__(self, app: Any, options: ServerOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_http(options.connections_max),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=REPLIES_S,
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to Host."""
        yield

"""A server from its first socket to its exit status: bind, start the engine, serve, drain, stop.

The port is taken before the engine starts, so that a port in use costs nothing. Requests are answered from the first
moment: with 503 until the engine is ready.
"""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
import uvloop

from sessile.contract.messages import EngineReady, Shutdown
from sessile.errors import NotReady, StartupError
from sessile.server.allocator import return_freed_memory
from sessile.server.app import create_app
from sessile.server.calls import Service
from sessile.server.config import ServerOptions
from sessile.server.connections import BoundedHttp
from sessile.server.corpora.opening import open_corpora, open_folder
from sessile.server.corpora.store import CorpusStore
from sessile.server.engine_process import EngineProcess, describe_exit
from sessile.server.keys import KeyRing
from sessile.server.link import EngineLink
from sessile.server.logs import configure_logs
from sessile.text.tokenizer import Tokenizer

BACKLOG = 2048
KEEP_ALIVE_S = 65
"""Longer than the 60 s for which most clients and proxies keep an idle connection, so that they are first to close."""
LAST_WORDS_S = 0.5
"""How long after the engine's exit its last message, the reason, may take to be read."""
REPLIES_S = 3
"""How long replies may take to be written once all requests have ended."""
PROGRESS_AFTER_S, PROGRESS_EVERY_S = 2.0, 10.0
SOCKET_PATH_MAX = 90

EXIT_OK, EXIT_FAILED = 0, 1

log = logging.getLogger("sessile.server")


def serve(
    options: ServerOptions,
    load_tokenizer: Callable[[], Tokenizer],
    engine_argv: Sequence[str],
    engine_config: str,
    *,
    builder_argv: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    key_ring: KeyRing | None = None,
    exit_with_stdin: bool = False,
) -> int:
    """Serve until a signal, the end of standard input (with exit_with_stdin), or the engine's death; the exit status.

    engine_argv: command of the engine process; `--address=ipc://…` is appended. engine_config: one line of JSON for
    its standard input. builder_argv: command of the process that builds indexes of corpora, started when there is
    something to build; it gets the same line. load_tokenizer: called while the engine starts. settings: shown by
    /get_server_info. key_ring: the keys that are accepted; None: none is needed. Raises StartupError for an address we
    cannot listen on and a folder that we cannot use, and what load_tokenizer raises.
    """
    configure_logs(options.log_format, options.log_level)
    return_freed_memory()
    with ended_by_sigterm(), bind(options) as listener, private_folder() as folder:
        address = f"ipc://{folder}/engine"
        corpora = open_folder(options, folder)  # before the engine starts: a folder in use costs nothing either
        engine = EngineProcess([*engine_argv, f"--address={address}"], engine_config)
        try:
            tokenizer = load_tokenizer()
            host = Host(options, engine, listener, exit_with_stdin=exit_with_stdin)

            def open_store(link: EngineLink) -> CorpusStore:
                return open_corpora(
                    link, tokenizer, options, corpora, builder_argv, engine_config, key_ring=key_ring
                )

            return uvloop.run(host.run(address, tokenizer, open_store, settings, key_ring))
        finally:
            corpora.close()
            engine.stop()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Until the event loop takes the signal over, SIGTERM unwinds as Ctrl-C does: engine and folder do not outlive us.

    Without effect in a thread other than the main one, which gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        sys.exit(EXIT_OK)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def bind(options: ServerOptions) -> socket.socket:
    """A listening socket. Raises StartupError in one line that says what to do."""
    host, port = options.host, options.port
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    is_loopback = ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback
    if not is_loopback and options.keys is None and options.allow_remote == "off":
        raise StartupError(
            f"--host {host} lets other machines in, and whoever reaches the port can use the server: require keys with "
            "--keys FILE, put a proxy that authenticates in front of 127.0.0.1, or add --allow-remote on"
        )
    try:
        return socket.create_server((str(where[0]), port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} of {host} is in use: stop what listens there, or choose another with --port"
            ) from error
        raise StartupError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from error


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder that only this user may enter, for the link's socket; removed on leaving. Raises StartupError."""
    try:
        # The path of a unix socket is short by nature; a long TMPDIR would not fit.
        parent = "/tmp" if len(tempfile.gettempdir()) > SOCKET_PATH_MAX else None
        made = tempfile.TemporaryDirectory(prefix="sessile-", dir=parent)
    except OSError as error:
        raise StartupError(
            f"cannot make a folder for the socket to the engine: {error}. Set TMPDIR to one that can be written to."
        ) from error
    with made as folder:
        yield folder


class Host:
    """Keeps an HTTP server and an engine process together until either ends. For one run only."""

    def __init__(
        self, options: ServerOptions, engine: EngineProcess, listener: socket.socket, *, exit_with_stdin: bool
    ) -> None:
        self._options = options
        self._engine = engine
        self._listener = listener
        self._exit_with_stdin = exit_with_stdin
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(
        self,
        address: str,
        tokenizer: Tokenizer,
        open_store: Callable[[EngineLink], CorpusStore],
        settings: Mapping[str, Any] | None,
        key_ring: KeyRing | None,
    ) -> int:
        """Serve until told to stop or the engine is gone; the exit status."""
        self._listen_to_signals()
        link = EngineLink(address, lag_tokens_max=self._options.stream_lag_tokens_max)
        link.start()
        corpora = open_store(link)
        corpora.start()
        app = create_app(link, tokenizer, self._options, settings=settings, key_ring=key_ring, corpora=corpora)
        if tokenizer.template is not None and not app.state.service.dialogues.keeps_kv:
            log.warning("the chat template rewrites earlier turns: chat sessions and responses send all messages again")
        http = HttpServer(app)
        serving = asyncio.create_task(http.serve([self._listener]))
        watching = asyncio.create_task(self._watch_engine(link))
        starting = asyncio.create_task(self._announce(link))
        try:
            ended = {asyncio.create_task(self._stop.wait()), asyncio.create_task(link.wait_failed()), serving}
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            if link.failure is None and self._stop.is_set():
                await self._drain(app.state.service, watching)
                status = EXIT_OK
            else:
                log.error(f"cannot go on: {link.failure or 'the HTTP server ended by itself'}")
                status = EXIT_FAILED
            http.should_exit = True
            await serving
            return status
        finally:
            starting.cancel()
            watching.cancel()
            await corpora.close()
            await link.close()

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

    async def _watch_engine(self, link: EngineLink) -> None:
        code = await self._engine.exit()
        if code > 0:  # it had time to say why
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.wait_failed(), LAST_WORDS_S)
        stopped = self._stop.is_set() and code == 0
        link.fail("the server was stopped" if stopped else f"the engine process {describe_exit(code)}")

    async def _announce(self, link: EngineLink) -> None:
        """Say that we wait, then that we are ready; give up on an engine that takes too long."""
        limit_s = self._options.engine_start_timeout_s
        waiting = asyncio.create_task(link.wait_ready())
        waited_s, pause_s = 0.0, PROGRESS_AFTER_S
        while waited_s < limit_s:
            done, _ = await asyncio.wait({waiting}, timeout=min(pause_s, limit_s - waited_s))
            if done:
                if waiting.exception() is None:
                    set_start_up_aside()
                    self._say_ready(waiting.result())
                return
            waited_s += pause_s
            pause_s = PROGRESS_EVERY_S
            log.info(f"the engine is starting, {waited_s:.0f} s so far")
        waiting.cancel()
        link.fail(f"the engine was not ready after {limit_s:g} s (--engine-start-timeout-s)")

    def _say_ready(self, ready: EngineReady) -> None:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        name = self._options.served_name or ready.model_name
        log.info(f"serving {name} ({ready.dtype} on {ready.device}) at http://{shown}:{port}")

    async def _drain(self, service: Service, watching: "asyncio.Task[None]") -> None:
        """Refuse new requests, let those in flight end, then end the engine."""
        service.draining = True
        link = service.link
        limit = f": {link.in_flight} requests in flight may take {self._options.drain_timeout_s:g} s to end"
        log.info(f"stopping{limit if link.in_flight else ''}")
        deadline_s = asyncio.get_running_loop().time() + self._options.drain_timeout_s
        while link.in_flight and not self._hurry.is_set() and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.02)
        try:
            link.check_ready()
            link.send(Shutdown())  # whatever is left ends as an abort
        except NotReady:
            self._engine.terminate()  # it does not read messages yet
        await asyncio.wait({watching}, timeout=REPLIES_S)
        link.fail("the server was stopped")


def set_start_up_aside() -> None:
    """Let no garbage collection look again at what start-up made and keeps.

    A full one is put off until what is new is a quarter of what was there: with all modules counted in, that lets
    some megabytes of the cycles that broken connections leave behind come and go. Now they are short and come in time.
    """
    gc.collect()
    gc.freeze()


class HttpServer(uvicorn.Server):
    """uvicorn with our own answer to signals."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHttp,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=REPLIES_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to Host."""
        yield

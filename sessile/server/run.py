"""A server from its first socket to its exit status: bind, start the engine, serve, drain, stop.

The port is taken before the engine starts, so that a port in use costs nothing. What is needed up to there is all that
is imported here; the rest comes while the engine starts. Requests are answered as soon as that is there: with 503 until
the engine is ready.
"""

import contextlib
import gc
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sessile.errors import StartupError
from sessile.server.allocator import return_freed_memory
from sessile.server.config import ServerOptions
from sessile.server.corpora.folder import open_folder
from sessile.server.engine_process import Launcher
from sessile.server.listening import listening
from sessile.server.logs import configure_logs

if TYPE_CHECKING:
    from sessile.server.corpora.store import CorpusStore
    from sessile.server.keys import KeyRing
    from sessile.server.link import EngineLink
    from sessile.text.tokenizer import Tokenizer

SOCKET_PATH_MAX = 90


def serve(
    options: ServerOptions,
    load_tokenizer: "Callable[[], Tokenizer]",
    engine_argv: Sequence[str],
    engine_config: str,
    *,
    builder_argv: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    key_ring: "KeyRing | None" = None,
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
    with ended_by_sigterm(), listening(options) as listeners, private_folder() as folder:
        corpora = open_folder(options, folder)  # before the engine starts: a folder in use costs nothing either
        launcher = Launcher(engine_argv, engine_config, folder)
        try:
            engine = launcher.launch()
            with uncollected():
                import uvloop

                from sessile.server.corpora.opening import open_corpora
                from sessile.server.host import Host

                tokenizer = load_tokenizer()

            def open_store(link: "EngineLink") -> "CorpusStore":
                return open_corpora(
                    link, tokenizer, options, corpora, builder_argv, engine_config, key_ring=key_ring
                )

            host = Host(options, launcher, engine, listeners, exit_with_stdin=exit_with_stdin)
            return uvloop.run(host.run(tokenizer, open_store, settings, key_ring))
        finally:
            corpora.close()
            launcher.stop()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Until leaving, collect no garbage; then set all aside that was made, so that no collection looks at it again.

    Modules leave next to none behind, and collections that look for it again and again as they come in take a fifth of
    the time that importing them does.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Until the event loop takes the signal over, SIGTERM unwinds as Ctrl-C does: engine and folder do not outlive us.

    Without effect in a thread other than the main one, which gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        sys.exit(0)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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

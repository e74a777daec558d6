"""What each command does, once its configuration is known. Imports what a command needs when it runs."""

import contextlib
import dataclasses
import gc
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sessile.config import Config
from sessile.contract.corpora import INDEX_SUFFIX
from sessile.errors import StartupError
from sessile.options import option

if TYPE_CHECKING:
    from sessile.shell import CommandLine
    from sessile.text.tokenizer import Tokenizer

QUIET_S = 2.0
"""What takes longer shows on standard error how it goes."""
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05
CORPUS_TOKENS_MAX = 2_000_000_000
"""Of an index that is built by hand; a server has its own limit."""


@dataclass(frozen=True)
class ChatOptions:
    """How `sessile chat` asks for answers."""

    max_new_tokens: int = option(512, "Longest answer.", unit="tokens", low=1)
    temperature: float = option(0.0, "Randomness of answers; 0 always takes the most likely token.", low=0, high=2)
    history: str | None = option(None, "File that keeps what is typed at the terminal, for the next chat.")


@dataclass(frozen=True)
class BatchOptions:
    """How `sessile run-batch` asks."""

    concurrency: int = option(64, "Most requests in flight at a time.", unit="requests", low=1, high=4096)
    patience_s: float = option(
        600.0, "How long a row is sent again while the server is at a limit or gone, before the batch ends.",
        unit="seconds", low=0,
    )  # fmt: skip


def serve(config: Config, *, exit_with_stdin: bool = False) -> int:
    """Serve over HTTP until told to stop; with exit_with_stdin, also when standard input ends."""
    from sessile.server.run import serve as run_server

    keys = None
    if config.server.keys:
        from sessile.keyfile import read_keys

        keys = read_keys(Path(config.server.keys))
        config = dataclasses.replace(config, tenants=keys.policies)

    def tokenizer() -> "Tokenizer":
        from sessile.text.load import load_tokenizer

        return load_tokenizer(config.model.model)

    return run_server(
        config.server,
        tokenizer,
        engine_argv=[sys.executable, "-m", "sessile", "engine"],
        engine_config=config.to_json(),
        builder_argv=[sys.executable, "-m", "sessile", "builder"],
        settings=dataclasses.asdict(config),
        key_ring=keys.ring if keys else None,
        exit_with_stdin=exit_with_stdin,
    )


def engine(address: str) -> int:
    """Be the engine process of a server that listens at address and holds our standard input."""
    # Ctrl-C reaches every process of the terminal; what it means is the server's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A fifth of the time that importing torch takes is spent on looking for garbage, of which there is next to none. By
    # the time that there is some, the engine collects it itself (engine/garbage.py).
    gc.disable()
    from sessile.engine.compiled import use_compiled_core

    use_compiled_core()
    from sessile.engine.process import Server, run_engine
    from sessile.offline.opening import open_configured_engine
    from sessile.server.logs import configure_logs

    config = Config.from_json(sys.stdin.readline())
    server = Server()
    server.watch()
    configure_logs(config.server.log_format, config.server.log_level)
    # A log of JSON objects stays one, whatever is told while the model loads.
    tell = logging.getLogger("sessile.engine").info if config.server.log_format == "json" else None
    report = Patience(every_s=QUIET_S, tell=tell).report
    return run_engine(
        address,
        lambda clock: open_configured_engine(
            config.model,
            config.device,
            config.scheduler,
            config.engine,
            clock=clock,
            report=report,
            tenants=config.tenants,
        ),
        server,
    )


def builder() -> int:
    """Be the process that builds indexes of corpora for the server that holds our standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from sessile.corpora.builder import run_builder
    from sessile.server.logs import configure_logs
    from sessile.text.load import load_tokenizer

    config = Config.from_json(sys.stdin.buffer.readline().decode())
    configure_logs(config.server.log_format, config.server.log_level)
    return run_builder(load_tokenizer(config.model.model))


def corpus_build(model: str, places: Sequence[Path], output: Path) -> int:
    """Index texts into a file, without a server."""
    import os

    from sessile.corpora.build import Throttle, gather, make_index
    from sessile.corpora.client import texts_in
    from sessile.errors import InvalidRequest, TooLong
    from sessile.text.documents import source_of
    from sessile.text.load import load_tokenizer

    if output.suffix != INDEX_SUFFIX:
        raise StartupError(f"--output must end in {INDEX_SUFFIX}, as a server tells an index from a text by it")
    if not output.parent.is_dir():
        raise StartupError(f"there is no folder {output.parent} to write {output.name} into")
    sources = [source_of(path.resolve()) for path in texts_in(places)]
    tokenizer = load_tokenizer(model)
    label = bytes.fromhex(tokenizer.fingerprint())
    patience = Patience(every_s=QUIET_S)
    report = Throttle(lambda stage, share: patience.report(f"{stage}, {share:.0%}"))
    try:
        gathered = gather(
            tokenizer, sources, tokens_max=CORPUS_TOKENS_MAX, is_cancelled=lambda: False, report=report
        )
        tokens, documents = gathered.tokens, len(gathered.documents)
        threads = len(os.sched_getaffinity(0))
        make_index(gathered, output, label, threads=threads, is_cancelled=lambda: False, report=report)
    except (InvalidRequest, TooLong) as error:
        raise StartupError(error.message) from error
    except OSError as error:
        raise StartupError(f"cannot write {output}: {error.strerror}") from error
    say(f"{tokens:,} tokens of {documents:,} documents in {output.stat().st_size:,} bytes: {output}")
    return 0


def corpus_add(url: str, api_key: str | None, places: Sequence[Path], path: str | None, fields: dict[str, Any]) -> int:
    """Add files of this machine, or a path on the server's, to a running server as one corpus."""
    from sessile.corpora.client import CorpusClient, texts_in

    if bool(places) == bool(path):
        raise StartupError("name files to upload, or a path below the server's --corpora-dir with --path")
    report = Patience(every_s=QUIET_S).report
    with CorpusClient(url, api_key) as client:
        added = client.add_path(path, fields, report) if path else client.add_files(texts_in(places), fields, report)
    say(f"{added['id']} is ready: {added['tokens']:,} tokens of {added['documents']:,} documents")
    return 0


def corpus_list(url: str, api_key: str | None) -> int:
    """Show the corpora of a running server."""
    from sessile.corpora.client import CorpusClient, table_of

    with CorpusClient(url, api_key) as client:
        print(table_of(client.list()), file=sys.stdout)
    return 0


def corpus_remove(url: str, api_key: str | None, corpus: str) -> int:
    """Remove a corpus from a running server."""
    from sessile.corpora.client import CorpusClient

    with CorpusClient(url, api_key) as client:
        client.remove(corpus)
    say(f"{corpus} is removed")
    return 0


def key(tenant: str, role: str) -> int:
    """Draw a key: itself on standard error, its entry for the keys file on standard output."""
    from sessile.keyfile import draw_key

    drawn, entry = draw_key(tenant, role)
    say(f"the key, shown this once: {drawn}")
    print(entry, end="", file=sys.stdout)
    return 0


def doctor(config: Config) -> int:
    """Examine this machine; 1 if something prevents serving."""
    from sessile.doctor import main

    return main(config)


_BENCHES = {
    "step": ("StepBenchOptions", "measure_steps"),
    "history": ("HistoryBenchOptions", "measure_history"),
    "audit": ("AuditBenchOptions", "measure_audit"),
    "admission": ("AdmissionBenchOptions", "measure_admission"),
    "drafts": ("DraftBenchOptions", "measure_drafts"),
    "grammar": ("GrammarBenchOptions", "measure_grammars"),
    "speculate": ("SpeculateBenchOptions", "measure_speculation"),
    "profile": ("ProfileBenchOptions", "measure_profile"),
    "quality": ("QualityBenchOptions", "measure_quality"),
    "cpu": ("CpuBenchOptions", "measure_cpu"),
    "agents": ("AgentBenchOptions", "measure_agents"),
    "throughput": ("ThroughputBenchOptions", "measure_throughput"),
    "sessions": ("SessionBenchOptions", "measure_sessions"),
}
"""By name, which is that of its module too: its options and the function that runs it."""


def bench(name: str) -> tuple[Any, Callable[[Any], int]]:
    """The options of a bench (a dataclass) and the function that runs it with them."""
    from sessile.engine.compiled import use_compiled_core

    use_compiled_core()
    module = import_module(f"sessile.bench.{name}")
    options, measure = _BENCHES[name]
    return getattr(module, options), getattr(module, measure)


def chat(
    config: Config, options: ChatOptions, *, server_flags: Sequence[str], url: str | None, api_key: str | None = None
) -> int:
    """Talk to the server at url, or to one of our own that is started for the purpose and stopped afterwards.

    api_key: sent with every request, for a server that wants one.
    """
    from sessile.model.config import resolve_model_path

    resolve_model_path(config.model.model)  # Before a server is started that would only say the same.
    with contextlib.ExitStack() as stack:
        server = None if url is not None else stack.enter_context(OwnServer(config, server_flags))
        # While the server starts.
        from sessile.chat.terminal import run_chat
        from sessile.text.load import load_tokenizer

        tokenizer = load_tokenizer(config.model.model)
        if server:
            server.wait_until_healthy()
        return run_chat(
            server.url if server else str(url),
            tokenizer,
            stdin=sys.stdin,
            stdout=sys.stdout,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            api_key=api_key,
            history=Path(options.history) if options.history else None,
        )


def run_batch(
    config: Config,
    options: BatchOptions,
    places: tuple[Path, Path],
    *,
    server_flags: Sequence[str],
    url: str | None,
    api_key: str | None = None,
) -> int:
    """Do the rows of a file that have no answer in another one yet, on the server at url or on one of our own.

    Status 1 if rows are left, because the server was lost.
    """
    import asyncio

    from sessile.batch import Tally, answer_file, read_rows, run_batch, shown_progress
    from sessile.client.async_client import AsyncClient
    from sessile.errors import NotReady

    source, target = places
    next(read_rows(source), None)  # Before a server is started that nobody has a use for.

    async def run(server_url: str) -> Tally:
        with shown_progress(sys.stderr) as report:
            async with AsyncClient(server_url, api_key, patience_s=options.patience_s) as client:
                return await run_batch(client, source, answers, concurrency=options.concurrency, report=report)

    with answer_file(target) as answers, contextlib.ExitStack() as stack:
        answers.ids()
        server = None if url is not None else stack.enter_context(OwnServer(config, server_flags))
        if server:
            server.wait_until_healthy()
        try:
            tally = asyncio.run(run(server.url if server else str(url)))
        except KeyboardInterrupt:
            say(f"stopped. What was answered is in {target}; run the same command again for the rest.")
            raise
        except NotReady as error:
            say(f"{error.message}. What was answered is in {target}; run the same command again for the rest.")
            return 1
    say(tally.summary)
    return 0


def completion(shell: str, lines: Sequence["CommandLine"]) -> int:
    """Write the completion script of a shell to standard output."""
    from sessile.shell import SHELLS

    print(SHELLS[shell](lines), end="", file=sys.stdout)
    return 0


class OwnServer:
    """A server as a child process, on a port of its own; a context manager that stops it on leaving."""

    def __init__(self, config: Config, flags: Sequence[str]) -> None:
        """Start it. flags: settings for it; with a port among them, it gets that one."""
        host = config.server.host
        port = config.server.port if any(flag.startswith("--port=") for flag in flags) else free_port(host)
        self.url = f"http://{url_host(host)}:{port}"
        command = [sys.executable, "-m", "sessile", "serve", "--log-level=warning", *flags, f"--port={port}"]
        # A session of its own: Ctrl-C in the terminal is meant for the answer, not for the server. It ends with its
        # standard input, should this process die without stopping it.
        self._process = subprocess.Popen(
            [*command, "--exit-with-stdin"], stdin=subprocess.PIPE, start_new_session=True
        )

    def wait_until_healthy(self) -> None:
        """Return once it answers /health with 200. Raises StartupError if it ends first; it has said why by then."""
        import httpx

        waiting = Patience(every_s=30)
        with httpx.Client(trust_env=False, timeout=5) as client:
            while self._process.poll() is None:
                # A refused connection: it is not listening yet.
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").status_code == httpx.codes.OK:
                        return
                waiting.report("starting the model")
                time.sleep(POLL_S)
        raise StartupError("the server did not start; it says why above")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Patience:
    """Tells whoever watches the terminal what takes so long: nothing in the first two seconds, then every so often."""

    def __init__(self, every_s: float, tell: Callable[[str], None] | None = None) -> None:
        """tell: gets the lines; None: they go to standard error."""
        self._every_s = every_s
        self._tell = tell or say
        self._next_s = time.monotonic() + QUIET_S

    def report(self, line: str) -> None:
        """Show the line if it is time to."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._every_s
            self._tell(line)


def say(line: str) -> None:
    """Tell whoever watches the terminal."""
    print(f"sessile: {line}", file=sys.stderr, flush=True)


def free_port(host: str) -> int:
    """A port that is free on this host at the moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def url_host(host: str) -> str:
    """A host as it is written in a URL that reaches it from this machine."""
    if host == "0.0.0.0":
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host

"""What each command does, once its configuration is known. Imports what a command needs when it runs."""

import contextlib
import dataclasses
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
from typing import Any, Self

from sessile.config import Config
from sessile.errors import StartupError
from sessile.options import option

QUIET_S = 2.0
"""What takes longer shows on standard error how it goes."""
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05


@dataclass(frozen=True)
class ChatOptions:
    """How `sessile chat` asks for answers."""

    max_new_tokens: int = option(512, "Longest answer.", unit="tokens", low=1)
    temperature: float = option(0.0, "Randomness of answers; 0 always takes the most likely token.", low=0, high=2)


def serve(config: Config, *, exit_with_stdin: bool = False) -> int:
    """Serve over HTTP until told to stop; with exit_with_stdin, also when standard input ends."""
    from sessile.keyfile import read_keys
    from sessile.server.run import serve as run_server
    from sessile.text.load import load_tokenizer

    keys = read_keys(Path(config.server.keys)) if config.server.keys else None
    if keys:
        config = dataclasses.replace(config, tenants=keys.policies)
    return run_server(
        config.server,
        lambda: load_tokenizer(config.model.model),
        engine_argv=[sys.executable, "-m", "sessile", "engine"],
        engine_config=config.to_json(),
        settings=dataclasses.asdict(config),
        key_ring=keys.ring if keys else None,
        exit_with_stdin=exit_with_stdin,
    )


def engine(address: str) -> int:
    """Be the engine process of a server that listens at address and holds our standard input."""
    # Ctrl-C reaches every process of the terminal; what it means is the server's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from sessile.engine.compiled import use_compiled_core

    use_compiled_core()
    from sessile.engine.process import die_with_parent, run_engine
    from sessile.offline import open_configured_engine
    from sessile.server.logs import configure_logs

    config = Config.from_json(sys.stdin.readline())
    die_with_parent()
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
    )


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
    "speculate": ("SpeculateBenchOptions", "measure_speculation"),
    "agents": ("AgentBenchOptions", "measure_agents"),
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
        server = None if url else stack.enter_context(OwnServer(config, server_flags))
        # While the server starts.
        from sessile.chat import run_chat
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
        )


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

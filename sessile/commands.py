"""What each command does, once its configuration is known. Imports what a command needs when it runs."""

import contextlib
import dataclasses
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sessile.config import Config
from sessile.errors import StartupError
from sessile.options import option

QUIET_S = 2.0
"""What takes longer shows on standard error how it goes."""
LINE_EVERY_S = 5.0
SERVER_STOP_TIMEOUT_S = 15.0
POLL_S = 0.05


@dataclass(frozen=True)
class ChatOptions:
    """How `sessile chat` asks for answers."""

    max_new_tokens: int = option(512, "Longest answer.", unit="tokens", low=1)
    temperature: float = option(0.0, "Randomness of answers; 0 always takes the most likely token.", low=0, high=2)


def serve(config: Config, *, exit_with_stdin: bool = False) -> int:
    """Serve over HTTP until told to stop; with exit_with_stdin, also when standard input ends."""
    from sessile.server.run import serve as run_server
    from sessile.text.load import load_tokenizer

    return run_server(
        config.server,
        lambda: load_tokenizer(config.model.model),
        engine_argv=[sys.executable, "-m", "sessile", "engine"],
        engine_config=config.to_json(),
        settings=dataclasses.asdict(config),
        exit_with_stdin=exit_with_stdin,
    )


def engine(address: str) -> int:
    """Be the engine process of a server that listens at address and holds our standard input."""
    from sessile.engine.process import die_with_parent, ignore_interrupts, run_engine
    from sessile.offline import open_configured_engine
    from sessile.server.logs import configure_logs

    ignore_interrupts()
    config = Config.from_json(sys.stdin.readline())
    die_with_parent()
    configure_logs(config.server.log_format, config.server.log_level)
    return run_engine(
        address,
        lambda clock: open_configured_engine(
            config.model, config.device, config.scheduler, config.engine, clock=clock, report=report_slow_start()
        ),
    )


def doctor(config: Config) -> int:
    """Examine this machine; 1 if something prevents serving."""
    from sessile.doctor import main

    return main(config)


def bench(name: str) -> tuple[Any, Callable[[Any], int]]:
    """The options of a bench (a dataclass) and the function that runs it with them."""
    if name == "step":
        from sessile.bench.step import StepBenchOptions, measure_steps

        return StepBenchOptions, measure_steps
    if name == "history":
        from sessile.bench.history import HistoryBenchOptions, measure_history

        return HistoryBenchOptions, measure_history
    from sessile.bench.sessions import SessionBenchOptions, measure_sessions

    return SessionBenchOptions, measure_sessions


def chat(config: Config, options: ChatOptions, *, server_flags: Sequence[str], url: str | None) -> int:
    """Talk to the server at url, or to one of our own that is started for the purpose and stopped afterwards."""
    from sessile.chat import run_chat
    from sessile.text.load import load_tokenizer

    tokenizer = load_tokenizer(config.model.model)
    with contextlib.nullcontext(url) if url else own_server(config, server_flags) as base_url:
        return run_chat(
            base_url,
            tokenizer,
            stdin=sys.stdin,
            stdout=sys.stdout,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )


@contextlib.contextmanager
def own_server(config: Config, flags: Sequence[str]) -> Iterator[str]:
    """A server as a child process, ready to answer; its URL. Stopped on leaving.

    Raises StartupError if it does not come up; it has said why on standard error.
    """
    port = config.server.port if any(flag.startswith("--port=") for flag in flags) else free_port(config.server.host)
    command = [sys.executable, "-m", "sessile", "serve", "--log-level=warning", *flags, f"--port={port}"]
    # A session of its own: Ctrl-C in the terminal is meant for the answer, not for the server. It ends with its
    # standard input, should this process die without stopping it.
    server = subprocess.Popen([*command, "--exit-with-stdin"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        url = f"http://{url_host(config.server.host)}:{port}"
        wait_until_healthy(server, url)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(SERVER_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_healthy(server: "subprocess.Popen[bytes]", url: str) -> None:
    """Return once the server answers /health with 200, showing that we wait. Raises StartupError if it exits first."""
    import httpx

    started_s = time.monotonic()
    next_line_s = started_s + QUIET_S
    with httpx.Client(trust_env=False, timeout=5) as client:
        while server.poll() is None:
            # A refused connection: it is not listening yet.
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/health").status_code == httpx.codes.OK:
                    return
            if time.monotonic() >= next_line_s:
                say(f"starting the model, {time.monotonic() - started_s:.0f} s so far")
                next_line_s += LINE_EVERY_S
            time.sleep(POLL_S)
    raise StartupError("the server did not start; it says why above")


def report_slow_start() -> Callable[[str], None]:
    """A function that shows a line for each part of a start once the start has taken two seconds."""
    started_s = time.monotonic()

    def report(line: str) -> None:
        if time.monotonic() - started_s >= QUIET_S:
            say(line)

    return report


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

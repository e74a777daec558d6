"""Run the clients of this folder, each against a server that is started for it: `make clients`.

    make clients                                    # all of them
    make clients ARGS="openai_sdk anthropic_sdk"    # some
    make clients ARGS="openai_sdk --url http://127.0.0.1:30000"
    make clients ARGS="openapi_cases --cases 100000"

Answers are compared with each other and with transformers, so the server computes in float32. Exit status 1 if a check
of any client does not hold.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "clients")]

from write_tokenizer import write_tokenizer  # noqa: E402  (found by the line above)

from sessile.text.load import load_tokenizer  # noqa: E402
from tests.unit.tiny_folder import write_tiny_model  # noqa: E402

PLACE = ROOT / "build" / "clients"
START_S_MAX = 600.0
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REAL = {"dtype": "float32", "audit-level": 2}
"""The embedded model."""
TINY = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": 512, "kv-memory": "1M", "rows-max": 16, "threads": 1,
    "audit-level": 2, "speculate": "on", "retract-every": 97, "sessions-max": 200, "log-level": "warning",
}  # fmt: skip
"""A random model of two narrow layers, for requests that are judged by their form; preempted now and then."""
CLIENTS = ("openai_sdk", "anthropic_sdk", "guidellm_turns", "aiperf_turns", "lm_eval_tasks", "openapi_cases")
WITH_TOKENIZER = {"guidellm_turns", "aiperf_turns", "lm_eval_tasks"}


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def flags_of(client: str, folder: Path) -> list[str]:
    """How the server for a client is started."""
    settings: dict[str, object] = dict(REAL)
    if client == "openapi_cases":
        (folder / "corpora").mkdir()
        settings = TINY | {"model": write_tiny_model(folder), "corpora-dir": folder / "corpora"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<end>", "chat_template": CHAT_TEMPLATE})
        )
    return [f"--{name}={value}" for name, value in settings.items()]


@contextlib.contextmanager
def served(client: str, folder: Path) -> Iterator[str]:
    """The URL of a server for a client; it is gone on leaving. Raises SystemExit if it does not start."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    log = PLACE / f"server-{client}.log"
    with log.open("w") as sink:
        # It ends with its standard input, should this process die without stopping it.
        command = [sys.executable, "-m", "sessile", "serve", "--exit-with-stdin", f"--port={port}"]
        process = subprocess.Popen(
            [*command, *flags_of(client, folder)], stdin=subprocess.PIPE, stderr=sink, cwd=ROOT
        )
    try:
        deadline_s = time.monotonic() + START_S_MAX
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether a server is ready there."""
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def run(client: str, url: str, cases: int | None) -> bool:
    """Run a client in its environment; whether all of its checks hold. cases: see the flag."""
    command = [str(PLACE / ".venv" / "bin" / "python"), str(Path(__file__).parent / f"{client}.py"), url]
    more = [str(PLACE / "tokenizer")] if client in WITH_TOKENIZER else []
    if client == "openapi_cases" and cases is not None:
        more = [f"--cases={cases}"]
    started_s = time.monotonic()
    status = subprocess.run([*command, *more], cwd=ROOT, check=False).returncode
    print(f"  {client}: {'good' if status == 0 else 'NOT GOOD'}, {time.monotonic() - started_s:.0f} s", flush=True)
    return status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Each client that is named, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}; all if none is named")
    parser.add_argument("--url", help="of a server that runs already; without it one is started for each")
    parser.add_argument("--cases", type=int, help="requests that openapi_cases sends at least; else ten thousand")
    options = parser.parse_args(arguments)
    if unknown := set(options.clients) - set(CLIENTS):
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    write_tokenizer(load_tokenizer("default"), PLACE / "tokenizer")
    bad = []
    for client in options.clients or CLIENTS:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            url = options.url or stack.enter_context(served(client, Path(folder)))
            if not run(client, url, options.cases):
                bad.append(client)
    print(f"clients: {'not good: ' + ', '.join(bad) if bad else 'all good'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

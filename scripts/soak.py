"""Torment a server of its own with all that clients do wrong, and show that nothing is left behind: `make soak`.

Many clients at once send what is right, wrong, too much, twice, or half; read slowly, not at all, or hang up. Whatever
they do, no reply may be a 5xx, no page may be without an owner, turns must say what fresh prompts say, and both
processes must keep no more memory than they did after a warm-up of a quarter of the run. At the end all is closed and
flushed, and every page and row must be free. Exit status 1 if any of this does not hold.
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from soak_clients import ACT_LIMIT_S, Client, Findings  # noqa: E402  (found by the line above)

from sessile.keyfile import draw_key  # noqa: E402
from tests.unit.tiny_folder import write_tiny_model  # noqa: E402

CONTEXT_TOKENS, BODY_BYTES_MAX = 512, 100_000
SETTINGS = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": CONTEXT_TOKENS, "kv-memory": "1M", "rows-max": 16,
    "sessions-max": 24, "queue-max": 4, "body-bytes-max": BODY_BYTES_MAX, "stream-lag-tokens-max": 64, "threads": 1,
    "log-level": "warning", "retract-every": 97,
}  # fmt: skip
"""A pool of four contexts, limits that many clients reach, and a preemption now and then even so."""
SAMPLE_EVERY_S, LINE_EVERY_S = 2.0, 10.0
TENANTS = ("acme", "brook")
PAGE_OWNERS = ("free", "limbo", "tree", "requests", "sessions", "quarantine", "scratch")
"""As /v1/pool names them; every page has one."""
START_LIMIT_S, END_LIMIT_S = 120.0, 60.0
MEMORY_DRIFT_MAX = 0.02
JUDGED_MINUTES = 2.0
"""A shorter run says nothing about memory."""


@dataclass
class Sample:
    """Resident bytes of both processes at a moment."""

    at_s: float
    server_bytes: int
    engine_bytes: int


@dataclass
class Deployment:
    """The server under test: its two processes, where it answers, and what it says."""

    process: "subprocess.Popen[str]"
    url: str
    keys: list[str]
    """One a tenant; clients take turns in using them."""
    operator_key: str
    log: Path
    samples: list[Sample] = field(default_factory=list)

    def sample(self, at_s: float) -> Sample:
        """Look at the memory of both processes."""
        server = psutil.Process(self.process.pid)
        (engine,) = server.children()
        self.samples.append(Sample(at_s, server.memory_info().rss, engine.memory_info().rss))
        return self.samples[-1]


@contextlib.contextmanager
def deployed(folder: Path, port: int, audit_level: int) -> Iterator[Deployment]:
    """Start a server with a tiny random model; it is gone on leaving."""
    log = folder / "server.log"
    drawn = [draw_key(tenant, "user") for tenant in TENANTS]
    drawn.append(draw_key("operators", "admin"))
    keys = folder / "keys.yaml"
    keys.write_text(f"tenants: {{{', '.join([*TENANTS, 'operators'])}}}\nkeys:\n{''.join(entry for _, entry in drawn)}")
    settings = SETTINGS | {"keys": keys, "model": write_tiny_model(folder), "port": port, "audit-level": audit_level}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with log.open("w") as sink:
        # It ends with its standard input, should this process die without stopping it.
        command = [sys.executable, "-m", "sessile", "serve", "--exit-with-stdin", *flags]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=sink, cwd=ROOT, text=True)
    try:
        yield Deployment(process, f"http://127.0.0.1:{port}", [key for key, _ in drawn[:-1]], drawn[-1][0], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


async def wait_until_healthy(deployment: Deployment, http: httpx.AsyncClient) -> None:
    """Return once the server answers; SystemExit with its words if it ends first."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s and deployment.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if (await http.get("/health")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise SystemExit(f"the server did not start: {deployment.log.read_text()}")


async def soak(deployment: Deployment, arguments: argparse.Namespace) -> Findings:
    """Run all clients for so many minutes, then end everything and look at what is left."""
    findings = Findings()
    headers = bearer(deployment.operator_key)
    async with httpx.AsyncClient(
        base_url=deployment.url, headers=headers, timeout=ACT_LIMIT_S, trust_env=False
    ) as http:
        await wait_until_healthy(deployment, http)
        started_s = time.monotonic()
        until_s = started_s + arguments.minutes * 60
        clients = [
            Client(
                deployment.url, deployment.keys[number % len(TENANTS)], deployment.operator_key, number,
                arguments.seed, findings, CONTEXT_TOKENS, BODY_BYTES_MAX,
            )
            for number in range(arguments.clients)
        ]
        running = [asyncio.create_task(client.run(until_s)) for client in clients]
        await watch(deployment, http, findings, started_s, until_s)
        await asyncio.gather(*running)
        await check_end(deployment, http, findings)
    deployment.process.terminate()
    status = await asyncio.to_thread(deployment.process.wait, END_LIMIT_S)
    findings.expect(status == 0, f"the server ended with status {status} after SIGTERM")
    said = deployment.log.read_text()
    findings.expect("Traceback" not in said, f"the server logged an exception: {said[-4000:]}")
    return findings


async def watch(
    deployment: Deployment, http: httpx.AsyncClient, findings: Findings, started_s: float, until_s: float
) -> None:
    """Take samples and say how it goes until it is time."""
    next_line_s = started_s
    while (now_s := time.monotonic()) < until_s:
        findings.expect(deployment.process.poll() is None, "the server ended by itself")
        if deployment.process.poll() is not None:
            return
        sample = deployment.sample(now_s - started_s)
        pages = (await http.get("/v1/pool")).json()["pages"]
        owned = sum(pages[owner] for owner in PAGE_OWNERS)
        findings.expect(owned == pages["total"], f"pages without an owner, or with two: {pages}")
        if now_s >= next_line_s:
            next_line_s = now_s + LINE_EVERY_S
            print(
                f"{sample.at_s:6.0f} s: {findings.replies:,} replies, {findings.failure_count} failures, memory of the"
                f" server {sample.server_bytes / 2**20:.1f} MiB, of the engine {sample.engine_bytes / 2**20:.1f} MiB",
                flush=True,
            )
        await asyncio.sleep(SAMPLE_EVERY_S)


def bearer(key: str) -> dict[str, str]:
    """The header that a key goes in."""
    return {"Authorization": f"Bearer {key}"}


async def check_end(deployment: Deployment, http: httpx.AsyncClient, findings: Findings) -> None:
    """Close all sessions of all tenants, flush, and compare what is free with what there is."""
    deadline_s = time.monotonic() + END_LIMIT_S
    for headers in map(bearer, deployment.keys):
        while sessions := (await http.get("/v1/sessions", params={"limit": 1000}, headers=headers)).json()["data"]:
            findings.expect(time.monotonic() < deadline_s, f"sessions that do not close: {sessions}")
            if time.monotonic() >= deadline_s:
                return
            for session in sessions:
                await http.delete(f"/v1/sessions/{session['id']}", headers=headers)
    while (reply := await http.post("/flush_cache")).status_code != 200 and time.monotonic() < deadline_s:
        await asyncio.sleep(0.1)
    findings.expect(reply.status_code == 200, f"the last flush was refused: {reply.text}")
    pool = (await http.get("/v1/pool")).json()
    pages = pool["pages"]
    findings.expect(pages["free"] == pages["total"] - pages["scratch"], f"pages are left behind: {pages}")
    findings.expect(pool["rows"]["held"] == 0, f"rows are left behind: {pool['rows']}")
    findings.expect(not any(pool["requests"].values()), f"requests are left behind: {pool['requests']}")
    metrics = (await http.get("/metrics")).text.splitlines()
    figures = {line.partition("{")[0]: float(line.split()[-1]) for line in metrics if line.startswith("sessile_")}
    findings.expect(figures["sessile_audit_checks_total"] > 0, "no audit ran")
    findings.expect(figures["sessile_audit_failures_total"] == 0, "the audit found differences")
    findings.expect(figures["sessile_http_requests_in_flight"] == 0, "the server believes that clients wait")
    names = ("settled_steps", "turns_committed", "turns_rolled_back", "preemptions", "demoted_pages", "audit_checks")
    findings.totals = {name: int(figures[f"sessile_{name}_total"]) for name in names}
    findings.totals["lagging_streams_ended"] = findings.lagging_streams_ended


def drifts(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Of each process: the bytes it kept in the second quarter of the samples, and how far the last is from that."""
    quarter = len(samples) // 4
    sides = {
        "server": [sample.server_bytes for sample in samples],
        "engine": [sample.engine_bytes for sample in samples],
    }
    warm = {name: kept(sizes[quarter : 2 * quarter]) for name, sizes in sides.items()}
    return {name: (warm[name], kept(sizes[-quarter:]) / warm[name] - 1) for name, sizes in sides.items()}


def kept(sizes: list[int]) -> float:
    """What a process keeps: the size that a tenth of its samples stay below.

    Above it lies what is in use at the moment, bodies that are read and streams whose readers are slow. Limits bound
    that, it comes and goes by some percent, and a leak would show below it all the same.
    """
    return float(sorted(sizes)[len(sizes) // 10])


def report(findings: Findings, samples: list[Sample], minutes: float) -> int:
    """Print what was found; the exit status."""
    statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(findings.statuses.items()))
    print(f"replies by status: {statuses}")
    print("acts: " + ", ".join(f"{name} {count:,}" for name, count in sorted(findings.acts.items())))
    print("totals: " + ", ".join(f"{name} {count:,}" for name, count in findings.totals.items()))
    if minutes < JUDGED_MINUTES:
        print(f"memory: not judged in less than {JUDGED_MINUTES:g} minutes")
    else:
        for name, (warm_bytes, drift) in drifts(samples).items():
            print(f"memory that the {name} keeps: {warm_bytes / 2**20:.1f} MiB after warm-up, {drift:+.2%} at the end")
            findings.expect(abs(drift) <= MEMORY_DRIFT_MAX, f"the {name}'s memory is not flat: {drift:+.2%}")
    print("soak: " + (f"{findings.failure_count} failures" if findings.failure_count else "all good"))
    return 1 if findings.failure_count else 0


def main() -> int:
    """Run the soak that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long clients torment the server [30]")
    parser.add_argument("--clients", type=int, default=24, help="clients at once [24]")
    parser.add_argument("--seed", type=int, default=1, help="of what the clients do [1]")
    parser.add_argument("--port", type=int, default=31_399, help="of the server that is started [31399]")
    parser.add_argument("--audit-level", type=int, default=2, choices=(1, 2), help="of that server [2]")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        deployment = stack.enter_context(deployed(folder, arguments.port, arguments.audit_level))
        findings = asyncio.run(soak(deployment, arguments))
        return report(findings, deployment.samples, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())

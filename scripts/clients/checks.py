"""What the scripts of this folder have in common: one line a check, an exit status, tools run without a network."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MODEL = "default"
ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "build" / "clients" / "runs"
"""Where tools write what they measured."""
TOOL_TIMEOUT_S = 1800
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Checks:
    """Checks of one client; each is printed as it is made."""

    def __init__(self, *packages: str) -> None:
        """packages: whose versions are told first."""
        self.failed = 0
        self.made = 0
        print(", ".join(f"{name} {version(name)}" for name in packages), flush=True)

    def that(self, holds: bool, claim: str, *shown: object) -> None:
        """Print a claim and whether it holds; beside it what was seen."""
        self.made += 1
        self.failed += not holds
        seen = f" ({', '.join(map(str, shown))})" if shown else ""
        print(f"  {'ok  ' if holds else 'FAIL'} {claim}{seen}", flush=True)

    def end(self) -> int:
        """Print the sum; the exit status."""
        print(f"  {self.made - self.failed} of {self.made} hold", flush=True)
        return 1 if self.failed or not self.made else 0


def url_given(words: int = 1) -> str:
    """The server's URL, without /v1: the first of so many arguments, of which the second is a tokenizer's folder."""
    if len(sys.argv) != words + 1:
        raise SystemExit(f"usage: {sys.argv[0]} http://127.0.0.1:30000{' TOKENIZER' if words > 1 else ''}")
    return sys.argv[1].rstrip("/").removesuffix("/v1")


def run_tool(name: str, *arguments: str, offline: bool = True, timeout_s: float = TOOL_TIMEOUT_S) -> bool:
    """Run a program of this environment at the repository's root; whether it says that it succeeded.

    What it printed is shown if it did not. offline: whether the hub's libraries are told that there is no network.
    """
    command = [str(Path(sys.executable).parent / name), *arguments]
    environment = {**os.environ, **(OFFLINE if offline else {}), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    return done.returncode == 0

"""NVIDIA's aiperf, conversations of several turns on each route that it knows, with a tokenizer from this disk.

    python scripts/clients/aiperf_turns.py http://127.0.0.1:30000 build/clients/tokenizer

Every turn is sent with all that was said before, as clients without sessions do.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from checks import MODEL, RUNS, Checks, run_tool, url_given

CONVERSATIONS, TURNS, CONCURRENT = 6, 3, 3
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
ROUTES = ("chat", "responses", "messages")
UNTOLD = {"responses"}
"""Routes on which aiperf counts tokens itself: it reads usage of `response.completed` alone, and an answer that its
length ends is `response.incomplete`."""
RECOUNTED_MAX = 1
"""Tokens more or fewer, on average, when the text of an answer is cut into tokens anew."""


def measure(url: str, tokenizer: str, route: str, folder: Path) -> dict[str, Any] | None:
    """What aiperf measured on a route; None if it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    went = run_tool(
        "aiperf", "profile", "--model", MODEL, "--url", url, "--endpoint-type", route, "--streaming",
        "--tokenizer", tokenizer, "--num-conversations", str(CONVERSATIONS),
        "--conversation-turn-mean", str(TURNS), "--conversation-turn-stddev", "0",
        "--isl", str(PROMPT_TOKENS), "--isl-stddev", "0", "--osl", str(OUTPUT_TOKENS), "--osl-stddev", "0",
        "--extra-inputs", "ignore_eos:true", "--concurrency", str(CONCURRENT), "--random-seed", "1",
        *([] if route in UNTOLD else ["--use-server-token-count"]), "--ui", "none", "--artifact-dir", str(folder),
        offline=False,  # it would look for the folder in the hub's cache, and not on the disk
    )  # fmt: skip
    return json.loads((folder / "profile_export_aiperf.json").read_text()) if went else None


def check_route(url: str, tokenizer: str, route: str, checks: Checks) -> None:
    """Every turn was answered at its length, and later turns found what earlier ones had computed."""
    measured = measure(url, tokenizer, route, RUNS / f"aiperf-{route}")
    if measured is None:
        checks.that(False, f"{route}: aiperf runs")
        return

    def figure(name: str, part: str = "avg") -> float:
        return float(measured.get(name, {}).get(part, 0.0))

    asked = CONVERSATIONS * TURNS
    checks.that(figure("request_count") == asked and not measured["error_summary"], f"{route}: every turn is answered",
                f"{figure('request_count'):.0f} of {asked}")  # fmt: skip
    length = figure("output_sequence_length")
    off_by_max = RECOUNTED_MAX if route in UNTOLD else 0
    checks.that(abs(length - OUTPUT_TOKENS) <= off_by_max, f"{route}: each at its length", f"{length:g} tokens")
    if route not in UNTOLD:
        prompts, found = figure("total_usage_prompt_tokens"), figure("total_usage_prompt_cache_read_tokens")
        checks.that(found > 0, f"{route}: later turns find what earlier ones computed",
                    f"{found:.0f} of {prompts:.0f} tokens")  # fmt: skip
    print(f"       {figure('output_token_throughput'):.1f} tokens/s, first token p50"
          f" {figure('time_to_first_token', 'p50'):.0f} ms, between tokens p50"
          f" {figure('inter_token_latency', 'p50'):.1f} ms")  # fmt: skip


def main() -> int:
    """Every route, in turn."""
    url, tokenizer = url_given(2), str(Path(sys.argv[2]).resolve())
    checks = Checks("aiperf", "transformers")
    for route in ROUTES:
        check_route(url, tokenizer, route, checks)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

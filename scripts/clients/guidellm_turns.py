"""guidellm, conversations of several turns on each route that it knows, with a tokenizer from this disk.

    python scripts/clients/guidellm_turns.py http://127.0.0.1:30000 build/clients/tokenizer

On /v1/responses a second time with the history kept by the server, by `previous_response_id`.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from checks import MODEL, RUNS, Checks, run_tool, url_given

CONVERSATIONS, TURNS, CONCURRENT = 6, 3, 3
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
PAGE_TOKENS_MAX = 64
"""What a prompt that is sent whole may miss of what was computed: less than the largest page."""
ROUTES = {
    "chat": "request_format=/v1/chat/completions",
    "completions": "request_format=/v1/completions",
    "responses": "request_format=/v1/responses",
    "responses, history kept": "request_format=/v1/responses,server_history=true",
}


def measure(url: str, tokenizer: str, settings: str, path: Path) -> dict[str, Any] | None:
    """What guidellm measured on a route; None if it failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    went = run_tool(
        "guidellm", "run", "--backend", f"kind=openai_http,target={url},model={MODEL},{settings}",
        "--profile", f"kind=concurrent,streams={CONCURRENT}",
        "--constraint", f"kind=max_requests,count={CONVERSATIONS * TURNS}",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS},turns={TURNS}",
        "--output", f"kind=json,path={path}", "--disable-console-interactive",
    )  # fmt: skip
    return json.loads(path.read_text())["benchmarks"][0] if went else None


def misses(answered: list[dict[str, Any]]) -> list[int]:
    """Of each later turn, how many tokens of the conversation before it were computed again."""
    turns: dict[str, list[dict[str, Any]]] = {}
    for request in answered:
        turns.setdefault(request["info"]["conversation_id"], []).append(request)
    missed = []
    for conversation in turns.values():
        ordered = sorted(conversation, key=lambda request: request["info"]["turn_index"])
        missed += [before["total_tokens"] - after["cached_tokens"] for before, after in pairwise(ordered)]
    return missed


def check_route(url: str, tokenizer: str, route: str, checks: Checks) -> None:
    """Every turn was answered at its length, and later turns computed what is new."""
    measured = measure(url, tokenizer, ROUTES[route], RUNS / f"guidellm-{route.replace(', ', '-')}.json")
    if measured is None:
        checks.that(False, f"{route}: guidellm runs")
        return
    answered = measured["requests"]["successful"]
    asked, errors = CONVERSATIONS * TURNS, len(measured["requests"]["errored"])
    # It ends with the answer that makes the number full, and may leave out one that came together with that.
    complete = len(answered) > asked - CONCURRENT and not errors
    checks.that(complete, f"{route}: every turn is answered", f"{len(answered)} of {asked}, {errors} errors")
    lengths = {request["output_tokens"] for request in answered}
    checks.that(lengths == {OUTPUT_TOKENS}, f"{route}: each at its length", *lengths)
    missed = misses(answered)
    if route == "responses, history kept":
        checks.that(set(missed) == {1}, f"{route}: later turns find all but the last token", f"{len(missed)} turns")
    else:
        most = max(missed)
        checks.that(most <= OUTPUT_TOKENS + PAGE_TOKENS_MAX, f"{route}: later turns find what earlier ones computed",
                    f"at most {most} tokens again")  # fmt: skip
    figures = measured["metrics"]
    print(f"       {figures['output_tokens_per_second']['successful']['mean']:.1f} tokens/s, first token p50"
          f" {figures['time_to_first_token_ms']['successful']['median']:.0f} ms, between tokens p50"
          f" {figures['inter_token_latency_ms']['successful']['median']:.1f} ms")  # fmt: skip


def main() -> int:
    """Every route, in turn."""
    url, tokenizer = url_given(2), str(Path(sys.argv[2]).resolve())
    checks = Checks("guidellm", "transformers")
    for route in ROUTES:
        check_route(url, tokenizer, route, checks)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

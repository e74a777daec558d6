"""lm-eval with the tasks in tasks/ on both of OpenAI's completions routes, held against transformers on this machine.

    python scripts/clients/lm_eval_tasks.py http://127.0.0.1:30000 build/clients/tokenizer

Choices and passages are scored by /v1/completions with echo and logprobs, answers are generated on both routes. What
transformers says of the same file in float32 is the measure, so the server should run with --dtype float32.
"""

import json
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

from checks import MODEL, ROOT, RUNS, Checks, run_tool, url_given

METRICS = {"own_choices": ("acc", "acc_norm"), "own_passages": ("bits_per_byte",), "own_answers": ("exact_match",)}
TASKS = ",".join(METRICS)
DIFFERENCE_MAX = 0.02
"""In nats, of the log-likelihood of a whole passage: float32 sums that are added in another order."""

Samples = dict[tuple[str, int], Any]


def evaluate(folder: Path, tasks: str, *arguments: str) -> tuple[dict[str, Any], Samples] | None:
    """Results by task and the model's answers by task and document; None if lm-eval failed."""
    shutil.rmtree(folder, ignore_errors=True)
    went = run_tool(
        "lm-eval", "run", "--include_path", str(ROOT / "scripts" / "clients" / "tasks"), "--tasks", tasks,
        "--output_path", str(folder), "--log_samples", *arguments,
    )  # fmt: skip
    if not went:
        return None
    samples = {}
    for path in folder.glob("**/samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            samples[task, sample["doc_id"]] = sample["resps"]
    (results,) = [json.loads(path.read_text())["results"] for path in folder.glob("**/results_*.json")]
    return results, samples


def scores(samples: Samples, task: str) -> list[float]:
    """All log-likelihoods of a task."""
    found = []
    for (name, _), answers in sorted(samples.items()):
        if name == task:
            found += [float(answer[0][0] if isinstance(answer[0], list) else answer[0]) for answer in answers]
    return found


def main() -> int:
    """Both routes, then transformers."""
    url, tokenizer = url_given(2), sys.argv[2]
    checks = Checks("lm_eval", "transformers")
    server = f"model={MODEL},base_url={url}/v1"
    ours = evaluate(
        RUNS / "lm-eval-completions", TASKS, "--batch_size", "4", "--model", "local-completions",
        "--model_args", f"{server}/completions,tokenizer={tokenizer},num_concurrent=4",
    )  # fmt: skip
    chat = evaluate(
        RUNS / "lm-eval-chat", "own_answers", "--apply_chat_template", "--model", "local-chat-completions",
        "--model_args", f"{server}/chat/completions,num_concurrent=4",
    )  # fmt: skip
    checks.that(ours is not None, "local-completions: lm-eval runs")
    checks.that(chat is not None, "local-chat-completions: lm-eval runs")
    if chat is not None:
        said = [answers[0][0] for _, answers in sorted(chat[1].items())]
        checks.that(len(said) == 8 and all(said), "local-chat-completions: every question is answered", *said[:2])
    if ours is None:
        return checks.end()
    for task, names in METRICS.items():
        print(f"       {task}: " + ", ".join(f"{name} {ours[0][task][f'{name},none']:.4f}" for name in names))
    with urllib.request.urlopen(f"{url}/get_model_info") as reply:
        weights = Path(json.loads(reply.read())["model_path"])
    theirs = evaluate(
        RUNS / "lm-eval-transformers", TASKS, "--model", "hf", "--device", "cpu", "--batch_size", "1", "--model_args",
        f"pretrained={weights.parent},gguf_file={weights.name},dtype=float32,tokenizer={tokenizer}",
    )  # fmt: skip
    checks.that(theirs is not None, "transformers: lm-eval runs")
    if theirs is None:
        return checks.end()
    for task in ("own_choices", "own_passages"):
        pairs = list(zip(scores(ours[1], task), scores(theirs[1], task), strict=True))
        largest = max(abs(one - other) for one, other in pairs)
        checks.that(largest <= DIFFERENCE_MAX, f"{task}: scored as by transformers",
                    f"{len(pairs)} scores, at most {largest:.5f} apart")  # fmt: skip
    answers = [key for key in ours[1] if key[0] == "own_answers"]
    same = [key for key in answers if ours[1][key] == theirs[1][key]]
    checks.that(same == answers, "own_answers: answered as by transformers", f"{len(same)} of {len(answers)}")
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

"""Generate under forty JSON schemas with a real model, and have an independent library judge every output.

    python scripts/grammar_check.py                      # 1,120 generations: speculation on and off, preemption or not
    python scripts/grammar_check.py --rounds 1           # one under each schema, in each setting

An output that is cut off by the length limit is counted apart: it is the beginning of a valid one. What is said must
not depend on speculation or preemption; that is checked too, in float32: where two tokens are as likely as each other,
bfloat16 lets the shapes of a step decide. Exit status 1 if anything is wrong.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jsonschema_rs

from sessile import LLM, Completion
from sessile.bench.grammar_schemas import SCHEMAS

SETTINGS: dict[str, dict[str, object]] = {
    "plain": {"speculate": "off"},
    "speculation": {"speculate": "on"},
    "preemption": {"speculate": "off", "retract_every": 7},
    "both on pages of 1": {"speculate": "on", "retract_every": 7, "page_size": 1},
}
PROMPTS = (
    "Here is a record in JSON: ",
    "The answer, as JSON, is:\n",
    "User: give me an example.\nAssistant: ",
    "data = ",
)


@dataclass
class Verdict:
    """What became of the generations of one setting."""

    valid: int = 0
    cut: list[str] = field(default_factory=list)
    """Schemas of outputs that the length limit ended."""
    wrong: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def judge(name: str, completion: Completion, verdict: Verdict) -> None:
    """Count one output."""
    verdict.texts.append(completion.text)
    if completion.finish_reason == "length":
        verdict.cut.append(name)
        return
    try:
        value = json.loads(completion.text)
    except ValueError as error:
        verdict.wrong.append(f"{name}: {completion.text!r}: {error}")
        return
    judge = jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True)
    if completion.finish_reason == "stop" and judge.is_valid(value):
        verdict.valid += 1
    else:
        verdict.wrong.append(f"{name}: {completion.text!r} ({completion.finish_reason})")


def run(model: str, settings: dict[str, object], rounds: int, max_new_tokens: int, dtype: str) -> Verdict:
    """Generate `rounds` outputs under each schema, side by side; every second one is sampled, the others are greedy."""
    verdict = Verdict()
    with LLM(model, dtype=dtype, **settings) as llm:
        for name, schema in SCHEMAS.items():
            for temperature, first in ((0.0, 0), (0.9, 1)):
                prompts = [PROMPTS[turn % len(PROMPTS)] + f"({turn}) " for turn in range(first, rounds, 2)]
                completions = llm.generate(
                    prompts, temperature=temperature, max_new_tokens=max_new_tokens, json_schema=schema, seed=0
                )
                for completion in completions:
                    judge(name, completion, verdict)
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all settings and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=7, help="generations under each schema, in each setting")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which settings, separated by commas")
    parser.add_argument("--max-new-tokens", type=int, default=1500)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    verdicts = {}
    for name in options.settings.split(","):
        started_s = time.perf_counter()
        verdict = verdicts[name] = run(
            options.model, SETTINGS[name], options.rounds, options.max_new_tokens, options.dtype
        )
        seconds = time.perf_counter() - started_s
        counts = f"{verdict.valid} valid, {len(verdict.cut)} cut off, {len(verdict.wrong)} wrong"
        print(f"{name}: {counts}, {seconds:.0f} s", flush=True)
        print("\n".join([*verdict.wrong[:20], *(f"cut off: {each}" for each in verdict.cut[:20])]))
    first = next(iter(verdicts.values())).texts
    differing = [name for name, verdict in verdicts.items() if verdict.texts != first]
    print(f"same texts in every setting: {'no: ' + ', '.join(differing) if differing else 'yes'}")
    return 1 if differing or any(verdict.wrong for verdict in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The embedded default under grammars: what it says is valid, and the same with drafts and preemption as without.

A few schemas of forty; `scripts/grammar_check.py` runs all of them, a thousand generations.
"""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from sessile.bench.grammar_schemas import SCHEMAS
from sessile.offline.llm import LLM

CHOSEN = ("person", "tool call", "one of two kinds", "words of other scripts", "text by pattern")
PROMPTS = ("A record in JSON: ", "Answer:\n")


def said(llm: LLM, name: str) -> list[str]:
    """What two prompts get under a schema, the one sampled as the other."""
    completions = llm.generate(PROMPTS, json_schema=SCHEMAS[name], temperature=0.8, max_new_tokens=200, seed=0)
    assert [completion.finish_reason for completion in completions] == ["stop", "stop"]
    return [completion.text for completion in completions]


@pytest.fixture(scope="module")
def plain() -> Iterator[dict[str, list[str]]]:
    with LLM("default") as llm:
        yield {name: said(llm, name) for name in CHOSEN}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_said_under_a_schema_is_valid(plain: dict[str, list[str]], name: str) -> None:
    judge: Any = jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True)
    assert all([judge.is_valid(json.loads(text)) for text in plain[name]])


def test_h76_drafts_and_preemption_change_nothing_of_it(plain: dict[str, list[str]]) -> None:
    with LLM("default", speculate="on", retract_every=5, page_size=1) as llm:
        assert {name: said(llm, name) for name in CHOSEN} == plain

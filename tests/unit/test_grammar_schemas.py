"""Whatever is drawn among the tokens that masks allow is valid under its schema, as an independent library judges."""

import json
from random import Random
from typing import Any

import jsonschema_rs
import pytest

from sessile.bench.grammar_schemas import SCHEMAS
from sessile.contract.messages import Grammar
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import CompiledGrammars
from tests.unit.test_grammar import EOS, FACTS, allowed

WALKS, LONGEST = 6, 4000
BLANKS = {*b" \t\r\n"}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(FACTS)


def walked(compiler: GrammarCompiler, grammars: CompiledGrammars, schema: Any, seed: int) -> str:
    """An output that a die chose, which takes blanks seldom and ends as soon as it may half of the time."""
    grammar, dice = Grammar("json_schema", json.dumps(schema)), Random(seed)
    if grammar not in grammars:
        grammars.put(grammar, compiler.compile(grammar))
    line, text = grammars.start(grammar), b""
    while line.tokens < LONGEST:
        (tokens,) = allowed(grammars, line)  # type: ignore[arg-type]
        assert not line.failure, line.failure
        plain = [token for token in tokens if token not in BLANKS and token != EOS]
        if EOS in tokens and (not plain or dice.random() < 0.5):
            return text.decode()
        chosen = dice.choice(plain if plain and dice.random() < 0.95 else [token for token in tokens if token != EOS])
        text += FACTS.token_bytes[chosen]
        line.extend([chosen])
    raise AssertionError(f"no end after {LONGEST} tokens: {text[:200]!r} …")


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_output_that_masks_allow_is_valid_under_its_schema(compiler: GrammarCompiler, name: str) -> None:
    grammars = CompiledGrammars(FACTS.vocab_size, threads=1)
    judge: Any = jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True)
    texts = [walked(compiler, grammars, SCHEMAS[name], seed) for seed in range(WALKS)]
    assert [text for text in texts if not judge.is_valid(json.loads(text))] == []

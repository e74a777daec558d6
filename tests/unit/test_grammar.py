"""Grammars as they are compiled and followed: what is refused and where, what a mask allows, when an output may end."""

import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sessile.contract.messages import Grammar
from sessile.contract.model import ModelFacts
from sessile.errors import InvalidRequest
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import KEPT_MAX, CompiledGrammars, MatcherLine
from sessile.grammar.schema import least_length

EOS, SPECIAL, YES = 256, 257, 258
TOKENS = (*(bytes([byte]) for byte in range(256)), b"</s>", b"<tool>", b"yes", b'{"')
FACTS = ModelFacts(
    vocab_size=len(TOKENS) + 5, context_tokens=100, eos_ids=(EOS,), token_bytes=(*TOKENS, *(b"",) * 5),
    special_ids=frozenset({EOS, SPECIAL}),
)  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(FACTS)


@pytest.fixture
def grammars() -> CompiledGrammars:
    return CompiledGrammars(FACTS.vocab_size, threads=1)


def started(compiler: GrammarCompiler, grammars: CompiledGrammars, kind: str, source: Any) -> MatcherLine:
    grammar = Grammar(kind, source if isinstance(source, str) else json.dumps(source))
    grammars.put(grammar, compiler.compile(grammar))
    line = grammars.start(grammar)
    assert isinstance(line, MatcherLine)
    return line


def allowed(grammars: CompiledGrammars, line: MatcherLine, drafts: list[int] | None = None) -> list[list[int]]:
    """The tokens that each place of a line allows."""
    _, words = grammars.masks([line], [drafts or []])  # type: ignore[list-item]
    return [np.unpackbits(own.view(np.uint8), bitorder="little").nonzero()[0].tolist() for own in words]


# -- what a mask allows ---------------------------------------------------------------------------------------------


def test_a_mask_allows_all_tokens_that_begin_what_may_follow(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "regex", "(yes|yak|no)!")
    assert allowed(grammars, line) == [[*b"ny", YES]]
    line.extend([*b"n"])
    assert allowed(grammars, line) == [[*b"o"]]


def test_an_output_may_end_exactly_where_the_grammar_may(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "regex", "ab?")
    ends = []
    for token in b"ab":
        ends.append(EOS in allowed(grammars, line)[0])
        line.extend([token])
    assert ends == [False, True] and allowed(grammars, line) == [[EOS]]


def test_special_tokens_and_those_without_bytes_are_no_text(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "regex", "(?s:.*)")
    (mask,) = allowed(grammars, line)
    assert EOS in mask and SPECIAL not in mask and not [token for token in mask if token >= len(TOKENS)]


def test_each_place_behind_a_draft_has_a_mask_of_its_own(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "regex", "abc?")
    assert allowed(grammars, line, [*b"ab"]) == [[*b"a"], [*b"b"], [*b"c", EOS]]
    assert allowed(grammars, line) == [[*b"a"]]


def test_h76_drafts_are_allowed_up_to_the_first_that_is_forbidden(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "regex", "abcd")
    other = started(compiler, grammars, "regex", "x+")
    counts, words = grammars.masks([line, other], [[*b"abx"], [*b"yx"]])
    assert list(counts) == [2, 0] and len(words) == 4


def test_lines_of_one_grammar_are_independent(compiler: GrammarCompiler, grammars: Any) -> None:
    first = started(compiler, grammars, "regex", "ab|cd")
    second = grammars.start(Grammar("regex", "ab|cd"))
    first.extend([*b"a"])
    assert allowed(grammars, first) == [[*b"b"]] and allowed(grammars, second) == [[*b"ac"]]


def test_a_text_without_choice_is_masked_to_the_models_own_tokens_of_it() -> None:
    def tokenize(text: str) -> list[int]:
        return [*text.encode()]

    compiler, grammars = GrammarCompiler(FACTS, tokenize), CompiledGrammars(FACTS.vocab_size, threads=1)
    assert allowed(grammars, started(compiler, grammars, "regex", "yes, sir")) == [[*b"y"]]
    compiler = GrammarCompiler(FACTS, lambda text: [SPECIAL])
    grammars = CompiledGrammars(FACTS.vocab_size, threads=1)
    assert allowed(grammars, started(compiler, grammars, "regex", "yes, sir")) == [[YES]]


def test_a_token_against_the_grammar_is_a_failure_that_says_where(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "regex", "ab")
    line.extend([*b"x"])
    assert line.failure.startswith("the grammar cannot be followed beyond output token 1: ")


def test_a_plain_object_is_any_json_object(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "json_object", "")
    assert not {*b"[1tnf"} & set(allowed(grammars, line)[0]) and ord("{") in allowed(grammars, line)[0]


def test_blank_space_comes_to_an_end(compiler: GrammarCompiler, grammars: Any) -> None:
    line = started(compiler, grammars, "json_schema", {"type": "array", "items": {"type": "null"}})
    line.extend([*b"[", *b" " * 32])
    assert not {*b" \n\t"} & set(allowed(grammars, line)[0])


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("json_schema", '{"type": "object"', "not valid JSON at line 1, column 18"),
        ("json_schema", '{"minimum": NaN}', "not valid JSON: NaN"),
        ("json_schema", "[1]", "at #: a schema must be an object"),
        ("json_schema", {"properties": {"a": {"items": {"not": {}}}}}, "at #/properties/a/items: keyword 'not'"),
        ("json_schema", {"properties": {"a/b": {"nullable": True}}}, "at #/properties/a~1b: keyword 'nullable'"),
        ("json_schema", {"x-guidance": {"lenient": True}}, "keyword 'x-guidance'"),
        ("json_schema", {"uniqueItems": True}, "keyword 'uniqueItems'"),
        ("json_schema", {"properties": {"a": {"type": "strin"}}}, "at #/properties/a: Invalid type: strin"),
        ("json_schema", {"anyOf": [{}, {"type": "string", "format": "iri"}]}, "at #/anyOf/1: Unknown format: iri"),
        ("json_schema", {"items": {"pattern": "a(b"}}, "at #/items: pattern 'a(b', character 2: unclosed group"),
        ("json_schema", {"$ref": "#/$defs/x"}, "at #: Pointer '/$defs/x' does not exist"),
        ("json_schema", {"$ref": "http://example.org/x"}, "at #: "),
        ("json_schema", {"$defs": {"t": {"type": "t"}}, "items": {"$ref": "#/$defs/t"}}, "Invalid type: t"),
        ("json_schema", '{"properties": {"\\ud800": {"foo": 1}}}', "half a surrogate pair"),
        ("json_schema", '{"const": "\\udc00"}', "half a surrogate pair"),
        ("json_schema", '{"minimum": 1e999}', "number out of range"),
        ("json_schema", f'{{"minimum": {"9" * 400}}}', "number out of range"),
        ("json_schema", False, "nothing is valid under false"),
        ("json_schema", {"items": {"const": "a" * 4097}}, "at #/items: a text has more than 4096 characters"),
        ("json_schema", {"items": {"pattern": "(a{100}){100}"}}, "at #/items: a pattern asks for more than 4096"),
        ("regex", "(a{100}|b){100}", "asks for more than 4096 characters"),
        ("lark", "\n".join(f'r{n}: "a"' for n in range(500)), "more than 400 rules"),
        ("regex", "ab(c", "pattern 'ab(c', character 3: unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("ebnf", 'root ::= "a" foo', "Rule 'foo' not found"),
        ("ebnf", 'root ::= "a', "line 1"),
        ("ebnf", 'start: "a" foo', "at 1("),
        ("lark", "start: foo", "at 1("),
        ("json_schema", {"$ref": "#"}, "no output is valid under it"),
        ("ebnf", 'root ::= root "a"', "no output is valid under it"),
        ("regex", r"[^\s\S]", "no output is valid under it"),
        ("prolog", "a.", "no kind of grammar called 'prolog'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_field(
    compiler: GrammarCompiler, kind: str, source: Any, said: str
) -> None:
    grammar = Grammar(kind, source if isinstance(source, str) else json.dumps(source), "the_field")
    with pytest.raises(InvalidRequest) as refusal:
        compiler.compile(grammar)
    assert said in refusal.value.message and refusal.value.message.startswith("the_field: ")
    assert refusal.value.param == "the_field" and "\n" not in refusal.value.message


def test_a_refusal_repeats_little_of_long_names(compiler: GrammarCompiler) -> None:
    schema: Any = {"foo": 1}
    for _ in range(20):
        schema = {"properties": {"x" * 3000: schema}}
    with pytest.raises(InvalidRequest, match="x…/properties/xx") as refusal:
        compiler.compile(Grammar("json_schema", json.dumps(schema)))
    assert len(refusal.value.message) < 2000


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


def doubling(keyword: str, levels: int) -> dict[str, Any]:
    """A schema whose expansion has two to the power of `levels` parts."""
    definitions: dict[str, Any] = {"d0": {"type": "object", "properties": {"a": {"type": "string"}}}}
    for level in range(1, levels + 1):
        below = {"$ref": f"#/$defs/d{level - 1}"}
        definitions[f"d{level}"] = {keyword: [below, below]}
    return {"$ref": f"#/$defs/d{levels}", "$defs": definitions}


FORCING = '%llguidance {"no_forcing": false}'
BOMBS: dict[str, tuple[str, Any]] = {
    "enum of 6,000": ("json_schema", {"enum": [f"value{n}" for n in range(6000)]}),
    "1,500 properties": ("json_schema", {"properties": {f"p{n}": {"pattern": f"a{n}{{1,50}}"} for n in range(1500)}}),
    "nested 80 deep": ("json_schema", nested(40)),
    "nested beyond Python": ("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000),
    "doubling anyOf": ("json_schema", doubling("anyOf", 24)),
    "doubling allOf": ("json_schema", doubling("allOf", 24)),
    "itself": ("json_schema", {"$ref": "#"}),
    "a list of a billion": ("json_schema", {"type": "array", "minItems": 10**8, "maxItems": 10**9}),
    "a text of a billion": ("json_schema", {"type": "string", "minLength": 10**8, "maxLength": 10**9}),
    "a multiple of a large prime": ("json_schema", {"type": "integer", "multipleOf": 999_983}),
    "a multiple of a prime": ("json_schema", {"type": "integer", "multipleOf": 9973}),
    "the longest constant": ("json_schema", {"const": "a" * 4096}),
    "optional letters": ("regex", "(a?){500}a{500}"),
    "counted counts": ("regex", "(((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000})"),
    "looking back": ("regex", "(a|b)*a(a|b){40}"),
    "letters of all scripts": ("regex", r"(\p{L}|\p{N}|\w){1,2000}"),
    "5,000 parentheses": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "60,000 parentheses": ("regex", "(" * 60_000 + "a" + ")" * 60_000),
    "parentheses in EBNF": ("ebnf", "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "parentheses in Lark": ("lark", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "390 rules": ("ebnf", "\n".join(f'r{n} ::= r{n + 1} | "a"' for n in range(388)) + '\nr388 ::= "b"\nroot ::= r0'),
    "doubling rules": ("lark", "start: r0\n" + "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(40)) + '\nr40: "a"'),
    "counted rules": ("lark", 'start: (("a"{1,100}){1,100}){1,100}'),
    "left recursion": ("lark", 'start: start start | start start start | "a"'),
    "too long": ("regex", "a" * 131_073),
    "classes that do not end": ("regex", "[" * 131_072),
    "a schema's classes that do not end": ("json_schema", {"pattern": "[a" * 65_000}),
    "classes that do not end in EBNF": ("ebnf", 'root ::= "a"\n' + "[" * 131_000),
    "65,536 optional letters": ("regex", "a?" * 65_536),
    "65,000 optional letters in Lark": ("lark", "start: /" + "a?" * 65_000 + "/"),
    "65,000 optional letters in a schema": ("json_schema", {"patternProperties": {"a?" * 65_000: {}}}),
    "blank lines in EBNF": ("ebnf", 'root ::= "a"' + "\n" * 131_000),
    "4,096 lines in EBNF": ("ebnf", 'root ::= "a"' + "\n" * 4096),
    "a terminal that forces itself for ever": ("ebnf", 'start: /ab+/ "b" "c"'),
    "a terminal that forces itself, by a client who wants it": (
        "ebnf", f'{FORCING}\nstart: rest | /ab+/ "b" "c"\nrest: %lark {{\nstart: /ab+/ "b"\n{FORCING}\n}}\n{FORCING}',
    ),
    "a choice of 120,000 letters": ("lark", 'start: "' + "a" * 120_000 + '"'),
    "a tool's constant of 100,000 letters": ("lark", 'start: "x" %json {"const": "' + "a" * 100_000 + '"} "y"'),
    "lines of blanks in Lark": ("lark", 'start: "a"' + " \n" * 65_000),
}


def refused_or_kept(
    compiler: GrammarCompiler, grammars: CompiledGrammars, grammar: Grammar
) -> InvalidRequest | None:
    try:
        grammars.put(grammar, compiler.compile(grammar))
    except InvalidRequest as refusal:
        return refusal
    return None


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Nothing made so far is gone over by the collector: what other tests left would count as a grammar's work."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize("name", BOMBS)
def test_h57_no_grammar_takes_more_of_the_processor_than_it_may(
    compiler: GrammarCompiler, grammars: CompiledGrammars, name: str
) -> None:
    kind, source = BOMBS[name]
    grammar = Grammar(kind, source if isinstance(source, str) else json.dumps(source), "f")
    compiler.prepare()
    started_s = time.process_time()
    refusal = refused_or_kept(compiler, grammars, grammar)
    assert time.process_time() - started_s < 1.0
    if refusal is not None:
        assert refusal.param == "f" and refusal.message.startswith("f: ") and len(refusal.message) < 300
        return
    line = grammars.start(grammar)
    started_s = time.process_time()
    for _ in range(20):
        if line.failure:
            break
        tokens = [token for token in allowed(grammars, line)[0] if token != EOS]  # type: ignore[arg-type]
        if line.failure or not tokens:
            break
        line.extend(tokens[:1])
    assert time.process_time() - started_s < 1.0


def collections() -> list[int]:
    return [generation["collections"] for generation in gc.get_stats()]


@pytest.mark.parametrize("pattern", ["(" * 60_000 + "a" + ")" * 60_000, "(" * 60_000, "(a|b)?" * 20_000])
def test_h57_counting_what_a_pattern_asks_for_has_nothing_collected(pattern: str) -> None:
    gc.collect(0)  # It begins to count here.
    before = collections()
    least_length(pattern)
    assert collections() == before


@pytest.mark.parametrize(
    ("source", "place"),
    [('start: "a" | "' + "b" * 4097 + '"', "a text"),
     ('start: "a" %json {"enum": ["' + "b" * 4097 + '"]} "c"', "at #: a text"),
     ('start: "a" %json {"properties": {"x": {"pattern": "b{4097}"}}}', "at #/properties/x: a pattern")],
)  # fmt: skip
def test_texts_in_rules_of_the_servers_own_are_bounded(compiler: GrammarCompiler, source: str, place: str) -> None:
    with pytest.raises(InvalidRequest, match=f"f: {place} .*more than 4096 characters"):
        compiler.compile(Grammar("lark", source, "f"))


def test_what_is_only_said_about_a_tool_may_be_long(compiler: GrammarCompiler) -> None:
    said = json.dumps({"type": "object", "description": "b" * 9000, "unknown": "c" * 9000})
    compiler.compile(Grammar("lark", f'start: "a %json {{" %json {said} "c"', "tools"))


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_grammars_used_least_recently_are_forgotten(compiler: GrammarCompiler, grammars: CompiledGrammars) -> None:
    matcher = compiler.compile(Grammar("regex", "a"))
    for number in range(KEPT_MAX):
        grammars.put(Grammar("regex", f"a{number}"), matcher)
    grammars.start(Grammar("regex", "a0"))
    grammars.put(Grammar("regex", "one more"), matcher)
    assert Grammar("regex", "a0", "another field") in grammars and Grammar("regex", "a1") not in grammars


def test_long_grammars_are_forgotten_sooner(compiler: GrammarCompiler, grammars: CompiledGrammars) -> None:
    matcher = compiler.compile(Grammar("regex", "a"))
    for number in range(40):
        grammars.put(Grammar("regex", f"{number:0130000}"), matcher)
    kept = [number for number in range(40) if Grammar("regex", f"{number:0130000}") in grammars]
    assert kept == list(range(8, 40))


def test_a_grammar_that_was_forgotten_is_not_taken_for_another(grammars: CompiledGrammars) -> None:
    with pytest.raises(InvalidRequest, match="not compiled"):
        grammars.start(Grammar("regex", "a"))

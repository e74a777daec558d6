"""From a grammar's text to a matcher at its start, within bounds of size, depth and work (H57)."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from sessile.contract.messages import Grammar
from sessile.contract.model import ModelFacts
from sessile.errors import InvalidRequest
from sessile.grammar.following import has_no_extension
from sessile.grammar.schema import (
    DEPTH_MAX,
    FORCED_CHARS_MAX,
    QUANTIFIERS_MAX,
    check_schema,
    checked_schema,
    least_length,
    place_of_fault,
    quantifiers_of,
)

Tokenize = Callable[[str], Sequence[int]]

SOURCE_BYTES_MAX = 131_072
ANY_OBJECT = '{"type": "object"}'

_FORCED_TEXTS_KEPT = 4096
"""Names of properties and the like, whose tokens are asked for again and again while masks are filled."""
RULES_MAX = 400
LINES_MAX = 4096
_RULE = re.compile(r"^[^\S\n]*[?!]?[\w.-]+\s*(?:\[[^\]\n]*\]\s*)?(?:::=|:)", re.MULTILINE)
_BOUNDS = LLParserLimits(
    max_items_in_row=1_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,  # of 1 to 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""What a compilation, and the mask of one step, may cost: some hundred milliseconds, and some milliseconds."""
_NOTHING_FORCED = '%llguidance {"no_forcing": true}\n'
"""Behind the rules that clients write (kind "ebnf"; those of kind "lark" are the server's own), where it has the last
word: a terminal that goes on as what follows it begins, such as /ab+/ before "b", forces the same byte for ever, and
llguidance would look for the end of that for ever."""
_JSON_OPTIONS: dict[str, Any] = {
    # Bounded: a small model that has begun to indent may never stop.
    "whitespace_pattern": r"[ \t\r\n]{0,32}",
    "lenient": False,
    "coerce_one_of": False,
}
_SCHEMA_AHEAD = re.compile(r"%json\s+(?=\{)")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DECODER = json.JSONDecoder()
_PARSE_ERROR = re.compile(
    r"regex parse error:\n    (?P<pattern>.*)\n    (?P<indent> *)\^+.*\nerror: (?P<reason>[^\n]*)"
)


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Any thread may call it, several at once.

    The trie of the vocabulary is built with the first grammar: who needs none does not wait for it.
    """

    def __init__(self, facts: ModelFacts, tokenize: Tokenize | None = None) -> None:
        """tokenize: as the model knows text; None: the longest tokens that fit are as good."""
        self._vocabulary = _Vocabulary(facts, tokenize)
        self._eos_ids = list(facts.eos_ids)
        self._building = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def prepare(self) -> None:
        """Build what all grammars share, unless it is there: some tenths of a second."""
        with self._building:
            if self._tokenizer is None:
                self._vocabulary.prepare()
                size, wrapped = len(self._vocabulary.tokens), TokenizerWrapper(self._vocabulary)
                self._tokenizer = LLTokenizer(wrapped, n_vocab=size, eos_token=self._eos_ids)
                # The first JSON grammar warms up what later ones share.
                LLMatcher(self._tokenizer, _from_schema(ANY_OBJECT), log_level=0)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the start of the grammar, never to be advanced: requests get copies. Raises InvalidRequest."""
        self.prepare()
        assert self._tokenizer is not None
        text, field = grammar.source, grammar.field or grammar.kind
        if len(text.encode()) > SOURCE_BYTES_MAX:
            raise InvalidRequest(f"{field}: longer than {SOURCE_BYTES_MAX} bytes", param=field)
        try:
            translated = _translated(grammar, field)
        except ValueError as error:  # of a schema that is JSON to Python and not to llguidance: a number of 400 digits
            raise InvalidRequest(f"{field}: {_shortened(str(error))}", param=field) from None
        matcher = LLMatcher(self._tokenizer, translated, log_level=0, limits=_BOUNDS)
        if matcher.is_error():
            raise InvalidRequest(f"{field}: {_explained(grammar, matcher.get_error())}", param=field)
        _check_beginning(matcher, field)
        return matcher


class _Vocabulary:
    """A vocabulary as llguidance asks for one."""

    def __init__(self, facts: ModelFacts, tokenize: Tokenize | None) -> None:
        self.tokens = facts.token_bytes
        self.special_token_ids = sorted(facts.special_ids)
        self.eos_token_id = facts.eos_ids[0]
        self.bos_token_id = facts.bos_id
        self._special_ids = facts.special_ids
        self._tokenize = tokenize
        self._cached = lru_cache(_FORCED_TEXTS_KEPT)(self._tokens_of)
        self._ids: dict[bytes, int] = {}
        self._longest_bytes = 0

    def prepare(self) -> None:
        """Look at all tokens once; to be called before any text comes."""
        plain = [token for token in range(len(self.tokens)) if token not in self._special_ids]
        self._ids = {self.tokens[token]: token for token in reversed(plain) if self.tokens[token]}
        self._longest_bytes = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that must follow, where all but these are masked: as the model knows it, if that is exact.

        It is not where a tokenizer adds a space in front, or takes the text for a special token.
        """
        return list(self._cached(text))

    def _tokens_of(self, text: bytes) -> Sequence[int]:
        if self._tokenize is not None:
            ids = self._tokenize(text.decode())
            if self._special_ids.isdisjoint(ids) and b"".join([self.tokens[token] for token in ids]) == text:
                return ids
        return self._longest(text)

    def _longest(self, text: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest_bytes), start, -1):
                if (token := self._ids.get(text[start:end])) is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                start += 1  # A byte that no token stands for cannot be said in any way.
        return ids


def _translated(grammar: Grammar, field: str) -> str:
    """The grammar in llguidance's own form. Raises InvalidRequest."""
    match grammar.kind:
        case "json_object":
            return _behind(grammar.lead, ANY_OBJECT)
        case "json_schema":
            schema = checked_schema(grammar.source, field)
            if schema is False:
                raise InvalidRequest(f"{field}: at #: nothing is valid under false", param=field)
            return _behind(grammar.lead, "{}" if schema is True else grammar.source)
        case "regex":
            if least_length(grammar.source) > FORCED_CHARS_MAX:
                raise InvalidRequest(f"{field}: it asks for more than {FORCED_CHARS_MAX} characters", param=field)
            _check_quantifiers(grammar.source, field)
            return LLMatcher.grammar_from_regex(grammar.source)
        case "ebnf" | "lark":
            _check_rules(grammar.source, field)
            if grammar.kind == "lark":
                _check_own_rules(grammar.source, field)
            try:
                rules = grammar_from(grammar.kind, grammar.source)
                return f"{rules}\n{_NOTHING_FORCED}" if grammar.kind == "ebnf" else rules
            except ValueError as error:
                reason = str(error).partition("Lark: ")[2] or str(error)
                raise InvalidRequest(f"{field}: {_shortened(reason)}", param=field) from None
        case kind:
            raise InvalidRequest(f"{field}: there is no kind of grammar called {kind!r}", param=field)


def _behind(lead: str, source: str) -> str:
    """A schema's JSON, behind what the rules of a lead say."""
    if not lead:
        return _from_schema(source)
    schema = json.dumps({**json.loads(source), "x-guidance": _JSON_OPTIONS})
    return LLMatcher.grammar_from_lark(f"start: lead json\njson: %json {schema}\n{lead}")


def _from_schema(source: str) -> str:
    return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


def _check_rules(source: str, field: str) -> None:
    """Bound what the translation from GBNF and the compilation of rules take the square of."""
    if len(_RULE.findall(source)) > RULES_MAX:
        raise InvalidRequest(f"{field}: more than {RULES_MAX} rules", param=field)
    if source.count("\n") > LINES_MAX:
        raise InvalidRequest(f"{field}: more than {LINES_MAX} lines", param=field)
    _check_quantifiers(source, field)
    depth = 0
    for character in source:
        depth += (character in "([{") - (character in ")]}")
        if depth > DEPTH_MAX:
            raise InvalidRequest(f"{field}: brackets nested more than {DEPTH_MAX} deep", param=field)
    if least_length(source) > SOURCE_BYTES_MAX:
        raise InvalidRequest(f"{field}: counts ask for more than {SOURCE_BYTES_MAX} characters", param=field)


def _check_own_rules(source: str, field: str) -> None:
    """Bound what rules that the server wrote itself must say as it stands: texts to choose among, schemas of tools."""
    texts, end = [], 0
    for place in _SCHEMA_AHEAD.finditer(source):
        if place.start() >= end:
            try:
                schema, behind = _DECODER.raw_decode(source, place.end())
            except ValueError:
                continue  # in the name of a tool
            check_schema(schema, field, ignores=True)
            texts.append(source[end : place.start()])
            end = behind
    texts.append(source[end:])
    if any(len(text) > FORCED_CHARS_MAX for text in _TEXT.findall("\n".join(texts))):
        raise InvalidRequest(f"{field}: a text has more than {FORCED_CHARS_MAX} characters", param=field)


def _check_quantifiers(source: str, field: str) -> None:
    if quantifiers_of(source) > QUANTIFIERS_MAX:
        raise InvalidRequest(f"{field}: more than {QUANTIFIERS_MAX} of ?, * and {{", param=field)


def _check_beginning(matcher: LLMatcher, field: str) -> None:
    """Refuse a grammar that no output can begin, before anybody is told that one comes. Raises InvalidRequest."""
    beginning = matcher.deep_copy()
    beginning.compute_bitmask()
    if beginning.is_error():
        reason = "no output is valid under it" if has_no_extension(beginning) else _reason(beginning.get_error())
        raise InvalidRequest(f"{field}: {reason}", param=field)


def _explained(grammar: Grammar, error: str) -> str:
    """What llguidance says is wrong, with the place."""
    if grammar.kind == "json_schema":
        schema = json.loads(grammar.source)
        return f"at {place_of_fault(schema, error, _fault_of)}: {_reason(error)}"
    return _reason(error)


def _fault_of(schema: Any) -> str:
    if isinstance(schema, bool):
        return ""
    return LLMatcher.validate_grammar(_from_schema(json.dumps(schema)), limits=_BOUNDS)


def _reason(error: str) -> str:
    """One line: of a regular expression the character where it is wrong, else the first line."""
    if parse := _PARSE_ERROR.search(error):
        where = f"pattern {_shortened(parse['pattern'])!r}, character {len(parse['indent']) + 1}"
        return f"{where}: {parse['reason']}"
    if "too big" in error or "fuel" in error:
        return f"too complex to be compiled within bounds ({_shortened(error.splitlines()[0])})"
    return _shortened(error.splitlines()[0])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"
